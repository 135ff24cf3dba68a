//! Pictures of named things, drawn in several styles: the prepared emoji, or others.

use std::path::Path;

use fastrand::Rng;
use serde::{Deserialize, Serialize};
use volary_vision::image::{ReadOptions, Rgb8, read as read_picture};
use volary_weights::read_tensors;

use crate::error::Error;

/// What may be done to a picture without changing what it shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Freedom {
    /// Mirroring is allowed.
    Mirror,
    /// Left and right matter: arrows, letters, flags, pointing hands.
    KeepSides,
}

/// What a picture shows, in both languages.
#[derive(Clone, Debug, Deserialize)]
pub struct Concept {
    /// Its name in file names; of an emoji the code points.
    pub hexcode: String,
    /// The emoji itself, or nothing.
    pub emoji: String,
    /// What it belongs to; of an emoji CLDR's group, e.g. `food-drink`.
    pub group: String,
    /// English captions.
    pub en: Captions,
    /// Chinese captions.
    pub zh: Captions,
}

/// A name and words that go with it.
#[derive(Clone, Debug, Deserialize)]
pub struct Captions {
    /// What it is called; of an emoji the CLDR short name.
    pub name: String,
    /// Words that go with it; of an emoji CLDR's and emojibase's.
    pub keywords: Vec<String>,
}

/// The language of a caption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English.
    En,
    /// Chinese.
    Zh,
}

impl Language {
    /// Both.
    pub const ALL: [Language; 2] = [Language::En, Language::Zh];

    /// `English` or `Chinese`.
    pub const fn name(self) -> &'static str {
        match self {
            Language::En => "English",
            Language::Zh => "Chinese",
        }
    }
}

/// One vendor's pictures.
pub struct Style {
    /// Who drew them.
    pub name: String,
    /// `count * size * size * 4` bytes, straight-alpha RGBA.
    pub pixels: Vec<u8>,
    /// The concept of each picture.
    pub concepts: Vec<usize>,
}

/// Captioned pictures in all their styles.
pub struct Dataset {
    /// Side of a picture in pixels.
    pub size: usize,
    /// What there is to see.
    pub concepts: Vec<Concept>,
    /// Who drew it.
    pub styles: Vec<Style>,
}

impl Dataset {
    /// Reads `emoji.safetensors` and `captions.json` of `folder`, only the styles that `wanted` accepts.
    ///
    /// # Errors
    /// If a file is missing or its parts do not fit together.
    pub fn read(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Self, Error> {
        let concepts = captions(folder)?;
        let file = folder.join(PICTURES);
        let malformed = |problem: String| Error::Data { file: file.clone(), problem };
        let tensors = read_tensors(&file)?;
        let names = tensors.keys().filter_map(|key| key.strip_suffix(".pixels")).filter(|name| wanted(name));
        let mut size = 0;
        let mut styles = Vec::new();
        for name in names {
            let pixels = &tensors[&format!("{name}.pixels")];
            let dims: Vec<usize> = pixels.shape().iter().copied().collect();
            let &[count, height, width, 4] = &dims[..] else {
                return Err(malformed(format!("{name}.pixels is {dims:?}, not [pictures, size, size, 4]")));
            };
            let index = tensors.get(&format!("{name}.index")).cloned();
            let index = index.ok_or_else(|| malformed(format!("{name}.index is missing")))?;
            let of_index: Vec<usize> = index.iter::<i64>().map(|concept| concept as usize).collect();
            let fits = height == width
                && (size == 0 || size == height)
                && of_index.len() == count
                && of_index.iter().all(|&concept| concept < concepts.len());
            if !fits {
                return Err(malformed(format!("{name}: pictures, index and captions disagree")));
            }
            size = height;
            styles.push(Style { name: name.into(), pixels: pixels.as_bytes().to_vec(), concepts: of_index });
        }
        if styles.is_empty() {
            return Err(malformed("none of the styles that were asked for".into()));
        }
        Ok(Self { size, concepts, styles })
    }

    /// Bytes of one picture.
    pub fn picture(&self, style: usize, picture: usize) -> &[u8] {
        let length = self.size * self.size * 4;
        &self.styles[style].pixels[picture * length..][..length]
    }

    /// One picture over white.
    pub fn over_white(&self, style: usize, picture: usize) -> Rgb8 {
        let blend = |pixel: &[u8]| {
            let alpha = u32::from(pixel[3]);
            let over = |channel: u8| ((u32::from(channel) * alpha + 255 * (255 - alpha) + 127) / 255) as u8;
            [over(pixel[0]), over(pixel[1]), over(pixel[2])]
        };
        let pixels = self.picture(style, picture).chunks_exact(4).flat_map(blend).collect();
        Rgb8::new(self.size, self.size, pixels).expect("three bytes for each pixel")
    }

    /// Every (style, picture).
    pub fn pictures(&self) -> Vec<(usize, usize)> {
        let of_style = |(style, pictures): (usize, &Style)| {
            (0..pictures.concepts.len()).map(move |picture| (style, picture))
        };
        self.styles.iter().enumerate().flat_map(of_style).collect()
    }
}

/// Pictures of one style and what they show, for evaluation.
pub struct Gallery {
    /// Who drew them.
    pub name: String,
    /// Over white.
    pub pictures: Vec<Rgb8>,
    /// The concept of each picture.
    pub targets: Vec<usize>,
    /// All candidates.
    pub concepts: Vec<Concept>,
}

impl Gallery {
    /// The galleries of `folder`: the wanted styles of prepared data, or `captions.json` beside one
    /// `<hexcode>.png` for each of its rows.
    ///
    /// # Errors
    /// If a file is missing or malformed.
    pub fn read(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<Vec<Self>, Error> {
        if folder.join(PICTURES).is_file() {
            let data = Dataset::read(folder, wanted)?;
            let galleries = (0..data.styles.len()).map(|style| Gallery {
                name: data.styles[style].name.clone(),
                pictures: (0..data.styles[style].concepts.len()).map(|i| data.over_white(style, i)).collect(),
                targets: data.styles[style].concepts.clone(),
                concepts: data.concepts.clone(),
            });
            return Ok(galleries.collect());
        }
        let concepts = captions(folder)?;
        let picture = |concept: &Concept| {
            Ok(read_picture(&folder.join(format!("{}.png", concept.hexcode)), ReadOptions::SEEN)?)
        };
        Ok(vec![Self {
            name: folder.file_name().map_or("pictures".into(), |name| name.to_string_lossy().into_owned()),
            pictures: concepts.iter().map(picture).collect::<Result<_, Error>>()?,
            targets: (0..concepts.len()).collect(),
            concepts,
        }])
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
        if choice < 0.8 || keywords.is_empty() {
            words.push(name);
        }
        if choice >= 0.6 && !keywords.is_empty() {
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

const TEMPLATES_EN: &[&str] =
    &["a picture of {}", "an emoji of {}", "a photo of a {}", "{} emoji", "a drawing of {}"];
const TEMPLATES_ZH: &[&str] = &["{}的图片", "一张{}的照片", "{}表情", "一幅{}的画", "一个{}"];

/// Styles of emoji that are never trained on: the first is used to develop, the second is looked at once.
pub const HELD_OUT: [&str; 2] = ["openmoji", "emojione2"];

const PICTURES: &str = "emoji.safetensors";

fn captions(folder: &Path) -> Result<Vec<Concept>, Error> {
    let file = folder.join("captions.json");
    let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
    serde_json::from_slice(&bytes).map_err(|error| Error::Data { file, problem: error.to_string() })
}
