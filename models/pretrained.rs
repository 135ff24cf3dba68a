//! From a name to a model with its tokenizer and preprocessor.

use std::path::Path;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use ndarray::Array2;
use volary_text::tokenizer::{BatchOptions, PadTo, Tokenizer};
use volary_vision::image::Rgb8;
use volary_vision::preprocess::Preprocessor;
use volary_weights::LoadOptions;
use volary_weights::hub::{Choice, Environment, Hub, Look, RepoId};

use crate::error::Error;
use crate::folder::Folder;
use crate::preset::Weights;
use crate::registry::{SYSTEMS, System};
use crate::taiyi::TaiyiClip;
use crate::two_tower::{Fit, TwoTower};

/// The name of [`EMOJI_CLIP`].
pub const EMBEDDED: &str = "volary/emoji-clip";

/// The name of [`EMOJI_DRAW`].
pub const EMBEDDED_DRAWER: &str = "volary/emoji-draw";

/// The bilingual model of pictures and texts inside this program; `models/embedded/emoji-clip/README.md` says what it is.
pub const EMOJI_CLIP: Folder = Folder::Embedded {
    name: EMBEDDED,
    files: &[
        ("open_clip_config.json", include_bytes!("embedded/emoji-clip/open_clip_config.json")),
        ("open_clip_model.safetensors", include_bytes!("embedded/emoji-clip/open_clip_model.safetensors")),
        ("preprocessor_config.json", include_bytes!("embedded/emoji-clip/preprocessor_config.json")),
        ("tokenizer.json", include_bytes!("embedded/emoji-clip/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("embedded/emoji-clip/tokenizer_config.json")),
        ("README.md", include_bytes!("embedded/emoji-clip/README.md")),
    ],
    parts: &[],
};

/// The bilingual model inside this program that draws; `models/embedded/emoji-draw/README.md` says what it is.
pub const EMOJI_DRAW: Folder = Folder::Embedded {
    name: EMBEDDED_DRAWER,
    files: &[
        ("model_index.json", include_bytes!("embedded/emoji-draw/model_index.json")),
        ("README.md", include_bytes!("embedded/emoji-draw/README.md")),
    ],
    parts: &[
        (
            "transformer",
            Folder::Embedded {
                name: "volary/emoji-draw/transformer",
                files: &[
                    ("config.json", include_bytes!("embedded/emoji-draw/transformer/config.json")),
                    (
                        "model.safetensors",
                        include_bytes!("embedded/emoji-draw/transformer/model.safetensors"),
                    ),
                ],
                parts: &[],
            },
        ),
        (
            "vqvae",
            Folder::Embedded {
                name: "volary/emoji-draw/vqvae",
                files: &[
                    ("config.json", include_bytes!("embedded/emoji-draw/vqvae/config.json")),
                    (
                        "diffusion_pytorch_model.safetensors",
                        include_bytes!("embedded/emoji-draw/vqvae/diffusion_pytorch_model.safetensors"),
                    ),
                ],
                parts: &[],
            },
        ),
        (
            "tokenizer",
            Folder::Embedded {
                name: "volary/emoji-draw/tokenizer",
                files: &[
                    ("tokenizer.json", include_bytes!("embedded/emoji-draw/tokenizer/tokenizer.json")),
                    (
                        "tokenizer_config.json",
                        include_bytes!("embedded/emoji-draw/tokenizer/tokenizer_config.json"),
                    ),
                ],
                parts: &[],
            },
        ),
    ],
};

/// Where the model of a name is.
#[derive(Clone, Debug)]
pub enum Place {
    /// At hand.
    Here(Folder),
    /// In a repository of the hub, or in the cache.
    Hub(RepoId),
}

/// Where the model of a name is: a folder on disk, a model inside this program, a preset, or `owner/name[@revision]`.
///
/// # Errors
/// If the name is none of these, or its weights were never released.
pub fn locate(name: &str) -> Result<Place, Error> {
    let path = Path::new(name);
    if path.is_dir() {
        return Ok(Place::Here(Folder::Disk(path.into())));
    }
    match name {
        EMBEDDED => return Ok(Place::Here(EMOJI_CLIP)),
        EMBEDDED_DRAWER => return Ok(Place::Here(EMOJI_DRAW)),
        _ => {}
    }
    if path.exists() {
        let hint = Some(": it is a file; name the folder that holds it with its configuration".into());
        return Err(Error::UnknownModel { name: name.into(), hint });
    }
    let repository = name.split_once('@').map_or(name, |(repository, _)| repository);
    let presets = || SYSTEMS.iter().flat_map(|system| system.presets);
    let hint = match presets().find(|preset| preset.name == repository).map(|preset| preset.weights) {
        Some(Weights::Unreleased) => Some(": its weights were never released".into()),
        Some(Weights::Elsewhere(place)) => Some(format!(": its weights are not on the hub ({place})")),
        Some(Weights::Application) => Some(": its authors give its weights to those who apply".into()),
        Some(Weights::Hub | Weights::Embedded) | None => None,
    };
    if hint.is_some() {
        return Err(Error::UnknownModel { name: name.into(), hint });
    }
    match name.parse() {
        Ok(repo) => Ok(Place::Hub(repo)),
        // what reads like a repository is told what is wrong with it
        Err(error) if repository.matches('/').count() == 1 && !repository.starts_with(['/', '.', '~']) => {
            Err(error.into())
        }
        Err(_) => {
            let ends = |preset: &&crate::preset::Preset| preset.name.rsplit('/').next() == Some(repository);
            let near = presets().find(ends).map(|preset| format!("; did you mean `{}`?", preset.name));
            let hint = near.unwrap_or_else(|| ", nor does it read owner/name; see `volary list`".into());
            Err(Error::UnknownModel { name: name.into(), hint: Some(hint) })
        }
    }
}

/// The folder of a model's name, with a variant of its weights if one is named. What comes from the hub is downloaded
/// unless it is in the cache.
///
/// `hub` is only asked for where it is needed.
///
/// # Errors
/// As [`locate`]; if the repository cannot be had.
pub fn resolve(
    name: &str,
    variant: Option<&str>,
    hub: impl FnOnce() -> Result<Hub, Error>,
) -> Result<Folder, Error> {
    bring(locate(name)?, variant, hub)
}

/// The folder at a place.
fn bring(
    place: Place,
    variant: Option<&str>,
    hub: impl FnOnce() -> Result<Hub, Error>,
) -> Result<Folder, Error> {
    let folder = match place {
        Place::Here(folder) => folder,
        Place::Hub(repo) => {
            // the revision may come from the program
            let repo: RepoId = repo.to_string().parse()?;
            let choice = Choice { variant: variant.map(str::to_owned), ..Choice::default() };
            Folder::Disk(hub()?.snapshot(&repo, &choice, Look::Quick)?.folder)
        }
    };
    folder.variant(variant)
}

/// The hub and the cache that the environment variables of Python's huggingface_hub name.
///
/// # Errors
/// If a variable cannot be followed.
pub fn hub_of_environment() -> Result<Hub, Error> {
    Ok(Hub::new(&Environment::read()?)?)
}

/// A two-tower model with all it needs: weights, tokenizer and preprocessor of one folder.
///
/// ```
/// use burn::tensor::Device;
/// use volary::Clip;
///
/// # fn main() -> Result<(), volary::Error> {
/// let clip = Clip::embedded().load(&Device::flex())?;
/// let similarity = clip.encode_texts(&["a cat"])?.dot(&clip.encode_texts(&["一只猫"])?.t());
/// assert!(similarity[[0, 0]] > 0.0);
/// # Ok(())
/// # }
/// ```
pub struct Clip {
    /// The towers.
    pub towers: Box<dyn TwoTower>,
    /// For texts.
    pub tokenizer: Tokenizer,
    /// For pictures.
    pub preprocessor: Preprocessor,
    pub(crate) device: Device,
}

/// A model that is about to be loaded.
pub struct Pretrained {
    place: Place,
    variant: Option<String>,
    hub: Option<Hub>,
    options: LoadOptions,
    texts: Option<Folder>,
}

impl Pretrained {
    fn at(place: Place) -> Self {
        Self { place, variant: None, hub: None, options: LoadOptions::default(), texts: None }
    }

    /// The branch, tag or commit of its repository. A folder has none: there it says nothing.
    pub fn revision(mut self, revision: &str) -> Self {
        if let Place::Hub(repo) = &mut self.place {
            repo.revision = Some(revision.into());
        }
        self
    }

    /// The variant of its weights, e.g. `fp16` for `model.fp16.safetensors`.
    pub fn variant(mut self, variant: &str) -> Self {
        self.variant = Some(variant.into());
        self
    }

    /// The hub to use in place of the environment's.
    pub fn hub(mut self, hub: Hub) -> Self {
        self.hub = Some(hub);
        self
    }

    /// The dtype that the weights get; f32 unless said otherwise.
    pub fn dtype(mut self, dtype: FloatDType) -> Self {
        self.options.dtype = Some(dtype);
        self
    }

    /// How the weights are read: what may be packed in 8 or 4 bits, what may be missing.
    pub fn options(mut self, options: LoadOptions) -> Self {
        self.options = options;
        self
    }

    /// Another tower for texts, with its tokenizer, beside the model's tower for pictures: a [`crate::taiyi`].
    pub fn texts_by(mut self, folder: Folder) -> Self {
        self.texts = Some(folder);
        self
    }

    /// Reads the folder onto `device`, after downloading what the cache lacks.
    ///
    /// # Errors
    /// If a file is missing or broken, or weights, configuration and preprocessor do not fit together.
    pub fn load(self, device: &Device) -> Result<Clip, Error> {
        let Self { place, variant, hub, options, texts } = self;
        let folder = bring(place, variant.as_deref(), || hub.map_or_else(hub_of_environment, Ok))?;
        let system = System::of(&folder)?;
        let others = || Error::Task { system: system.name, task: "compare pictures with text" };
        if !system.tasks.contains(&"classify") {
            return Err(others());
        }
        let preprocessor = folder.preprocessor()?;
        let tokenizer = texts.as_ref().unwrap_or(&folder).tokenizer()?;
        let model = (system.open)(&folder, &options, device)?;
        let mut towers = model.into_towers().ok_or_else(others)?;
        if let Some(texts) = &texts {
            towers = Box::new(TaiyiClip::load(towers, texts, &options, device)?);
        }
        let Fit { image_size: expected, vocab_size, .. } = towers.fit();
        match preprocessor.image_size() {
            Some(size) if size == [expected; 2] => {}
            found => {
                let found = found.map_or("varying".into(), |[height, width]| format!("{height}x{width}"));
                return Err(Error::PictureSize { folder: folder.path().into(), expected, found });
            }
        }
        if tokenizer.vocab_size() > vocab_size {
            return Err(Error::Vocabulary {
                folder: texts.as_ref().unwrap_or(&folder).path().into(),
                expected: vocab_size,
                found: tokenizer.vocab_size(),
            });
        }
        Ok(Clip { towers, tokenizer, preprocessor, device: device.clone() })
    }
}

/// So many pictures or texts go through a tower at once.
const BATCH: usize = 64;

impl Clip {
    /// A model by its name: a folder, a model inside this program, a preset, or `owner/name[@revision]`.
    ///
    /// # Errors
    /// If the name is none of these.
    pub fn from_pretrained(name: &str) -> Result<Pretrained, Error> {
        Ok(Pretrained::at(locate(name)?))
    }

    /// The model in a folder.
    pub fn in_folder(folder: Folder) -> Pretrained {
        Pretrained::at(Place::Here(folder))
    }

    /// The model inside this program.
    pub fn embedded() -> Pretrained {
        Self::in_folder(EMOJI_CLIP)
    }

    /// Width of the space where pictures and texts meet.
    pub fn d_embed(&self) -> usize {
        self.towers.fit().d_embed
    }

    /// The factor on cosine similarities.
    pub fn scale(&self) -> f32 {
        self.towers.scale().into_scalar()
    }

    /// Unit vectors of pictures, `[pictures, d_embed]`.
    ///
    /// # Errors
    /// If a picture cannot be preprocessed.
    pub fn encode_images(&self, pictures: &[Rgb8]) -> Result<Array2<f32>, Error> {
        self.stack(pictures.chunks(BATCH).map(|chunk| {
            let pixels = self.preprocessor.batch(chunk, &self.device)?;
            Ok(self.towers.encode_images(pixels.cast(self.towers.scale().dtype())))
        }))
    }

    /// Unit vectors of texts, `[texts, d_embed]`. What is longer than the context is cut.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub fn encode_texts(&self, texts: &[impl AsRef<str>]) -> Result<Array2<f32>, Error> {
        let longest = self.towers.fit().context_length;
        let options = BatchOptions { max_length: Some(longest), pad: PadTo::Longest };
        self.stack(texts.chunks(BATCH).map(|chunk| {
            let (ids, real) = self.tokenizer.encode_batch(chunk, &options)?.to_tensors(&self.device);
            Ok(self.towers.encode_texts(ids, real.equal_elem(1)))
        }))
    }

    /// The probability of each label for each picture, `[pictures, labels]`: the softmax over the labels of
    /// scaled similarities.
    ///
    /// # Errors
    /// As [`Clip::encode_images`] and [`Clip::encode_texts`].
    pub fn zero_shot(&self, pictures: &[Rgb8], labels: &[impl AsRef<str>]) -> Result<Array2<f32>, Error> {
        let scale = self.scale();
        let similarities = self.encode_images(pictures)?.dot(&self.encode_texts(labels)?.t());
        Ok(softmax(similarities * scale))
    }

    fn stack(&self, parts: impl Iterator<Item = Result<Tensor<2>, Error>>) -> Result<Array2<f32>, Error> {
        let mut values = Vec::new();
        for part in parts {
            let data: TensorData = part?.into_data().convert::<f32>();
            values.extend(data.iter::<f32>());
        }
        let d_embed = self.d_embed();
        Ok(Array2::from_shape_vec((values.len() / d_embed, d_embed), values).expect("whole rows of d_embed"))
    }
}

/// Each row to probabilities, by the softmax.
pub fn softmax(mut logits: Array2<f32>) -> Array2<f32> {
    for mut row in logits.rows_mut() {
        let highest = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.mapv_inplace(|logit| (logit - highest).exp());
        let sum = row.sum();
        row.mapv_inplace(|value| value / sum);
    }
    logits
}
