//! The prepared emoji pictures and their captions.

use std::path::{Path, PathBuf};

use fastrand::Rng;
use safetensors::SafeTensors;
use serde::Deserialize;

use super::augment::Freedom;

/// What can be wrong with prepared data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file could not be read.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {problem}", file.display())]
    Malformed {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// What a picture shows, in both languages.
#[derive(Clone, Debug, Deserialize)]
pub struct Concept {
    /// The emoji itself.
    pub emoji: String,
    /// CLDR's group, e.g. `food-drink`.
    pub group: String,
    /// English captions.
    pub en: Captions,
    /// Chinese captions.
    pub zh: Captions,
}

/// A name and words that go with it.
#[derive(Clone, Debug, Deserialize)]
pub struct Captions {
    /// The CLDR short name.
    pub name: String,
    /// CLDR and emojibase keywords.
    pub keywords: Vec<String>,
}

/// The language of a caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Language {
    /// English.
    En,
    /// Chinese.
    Zh,
}

impl Language {
    /// Both.
    pub const ALL: [Language; 2] = [Language::En, Language::Zh];
}

/// One vendor's pictures.
pub struct Style {
    /// The vendor's short name.
    pub name: String,
    /// `count * size * size * 4` bytes, straight-alpha RGBA.
    pub pixels: Vec<u8>,
    /// The concept of each picture.
    pub concepts: Vec<usize>,
}

/// All styles and captions.
pub struct EmojiData {
    /// Side of a picture in pixels.
    pub size: usize,
    /// What there is to see.
    pub concepts: Vec<Concept>,
    /// Who drew it.
    pub styles: Vec<Style>,
}

impl EmojiData {
    /// Reads `emoji.safetensors` and `captions.json` of `folder`, only the styles that `wanted` accepts.
    ///
    /// # Errors
    /// If a file is missing or its parts do not fit together.
    pub fn read(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self, DataError> {
        let captions = folder.join("captions.json");
        let concepts: Vec<Concept> = serde_json::from_slice(&read(&captions)?)
            .map_err(|error| malformed(&captions, error.to_string()))?;
        let pictures = folder.join("emoji.safetensors");
        let bytes = read(&pictures)?;
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|error| malformed(&pictures, error.to_string()))?;
        let mut names: Vec<&str> = tensors
            .names()
            .into_iter()
            .filter_map(|key| key.strip_suffix(".pixels"))
            .filter(|name| wanted(name))
            .collect();
        names.sort_unstable();
        let mut size = 0;
        let mut styles = Vec::new();
        for name in names {
            let missing = |error: safetensors::SafeTensorError| malformed(&pictures, error.to_string());
            let pixels = tensors.tensor(&format!("{name}.pixels")).map_err(missing)?;
            let index = tensors.tensor(&format!("{name}.index")).map_err(missing)?;
            let &[count, height, width, 4] = pixels.shape() else {
                let problem = format!("{name}.pixels is {:?}, not [pictures, size, size, 4]", pixels.shape());
                return Err(malformed(&pictures, problem));
            };
            let of_index: Vec<usize> = index
                .data()
                .chunks_exact(8)
                .map(|bytes| i64::from_le_bytes(bytes.try_into().expect("eight bytes")) as usize)
                .collect();
            let fits = height == width
                && (size == 0 || size == height)
                && of_index.len() == count
                && of_index.iter().all(|&concept| concept < concepts.len());
            if !fits {
                return Err(malformed(&pictures, format!("{name}: pictures, index and captions disagree")));
            }
            size = height;
            styles.push(Style { name: name.into(), pixels: pixels.data().to_vec(), concepts: of_index });
        }
        if styles.is_empty() {
            return Err(malformed(&pictures, "no style of the wanted ones".into()));
        }
        Ok(Self { size, concepts, styles })
    }

    /// Bytes of one picture.
    pub fn picture(&self, style: usize, picture: usize) -> &[u8] {
        let length = self.size * self.size * 4;
        &self.styles[style].pixels[picture * length..][..length]
    }

    /// Every (style, picture).
    pub fn pictures(&self) -> Vec<(usize, usize)> {
        let of_style = |(style, pictures): (usize, &Style)| {
            (0..pictures.concepts.len()).map(move |picture| (style, picture))
        };
        self.styles.iter().enumerate().flat_map(of_style).collect()
    }
}

impl Concept {
    /// The captions in `language`.
    pub fn captions(&self, language: Language) -> &Captions {
        match language {
            Language::En => &self.en,
            Language::Zh => &self.zh,
        }
    }

    /// Whether its picture may be mirrored.
    pub fn freedom(&self) -> Freedom {
        match self.group.as_str() {
            "flags" | "symbols" | "people-body" => Freedom::KeepSides,
            _ => Freedom::Mirror,
        }
    }

    /// A random caption: the name, the name with keywords, or keywords, sometimes in a sentence.
    pub fn caption(&self, language: Language, rng: &mut Rng) -> String {
        let Captions { name, keywords } = self.captions(language);
        let mut words: Vec<&str> = Vec::new();
        let choice = rng.f32();
        if choice < 0.7 || keywords.is_empty() {
            words.push(name);
        }
        if choice >= 0.5 && !keywords.is_empty() {
            let count = rng.usize(1..=3.min(keywords.len()));
            words.extend(rng.choose_multiple(keywords.iter(), count).into_iter().map(String::as_str));
        }
        let (comma, templates) = match language {
            Language::En => (", ", TEMPLATES_EN),
            Language::Zh => ("，", TEMPLATES_ZH),
        };
        let caption = words.join(comma);
        if rng.f32() < 0.2 {
            templates[rng.usize(0..templates.len())].replace("{}", &caption)
        } else {
            caption
        }
    }
}

const TEMPLATES_EN: &[&str] = &["a picture of {}", "an emoji of {}", "a photo of a {}", "{} emoji", "a drawing of {}"];
const TEMPLATES_ZH: &[&str] = &["{}的图片", "一张{}的照片", "{}表情", "一幅{}的画", "一个{}"];

fn read(file: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(file).map_err(|source| DataError::Io { file: file.into(), source })
}

fn malformed(file: &Path, problem: String) -> DataError {
    DataError::Malformed { file: file.into(), problem }
}
