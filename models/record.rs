//! What a picture was imagined from, kept in its PNG: enough to make it again.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use volary_vision::image::{Rgb8, content, png_texts};
use volary_weights::hub::sha256;

use crate::error::Error;
use crate::imagine::{Coding, Extras, Imagine, Init};

/// The keyword of the record, as JSON.
pub const KEYWORD: &str = "volary";
/// The keyword of the same for people, as the web UI has it.
pub const PARAMETERS: &str = "parameters";

/// What a picture was imagined from.
///
/// Paths and the model's name are as they were given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// Of the program.
    pub version: String,
    /// What it shows.
    pub prompt: String,
    /// What it does not show.
    pub negative: String,
    /// What drew it.
    pub model: Model,
    /// The scheduler's class in diffusers; empty for a model without one.
    pub scheduler: String,
    /// How many steps were asked for.
    pub steps: usize,
    /// How strictly the prompt was followed.
    pub guidance: f64,
    /// How much noise DDIM drew at each step.
    pub eta: f64,
    /// How freely codes were drawn, if it was drawn by tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// The picture's, or that of a sheet's first picture: the next one has the next.
    pub seed: u64,
    /// Pixels across, of one picture.
    pub width: usize,
    /// Pixels down, of one picture.
    pub height: usize,
    /// Whether the autoencoder saw it in tiles.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tiled: bool,
    /// Rows and columns, if it is a sheet of pictures.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grid: Option<[usize; 2]>,
    /// The picture that was changed, if one was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init: Option<Change>,
    /// Low-rank changes of the weights, and how much each counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub loras: Vec<Weighted>,
    /// Learned tokens.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub embeddings: Vec<Source>,
    /// A single file with the weights of all parts, if it took their place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub single_file: Option<Source>,
}

/// A model that drew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Model {
    /// A folder, a preset or owner/name.
    pub name: String,
    /// The variant of the weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// [`crate::pictures::pipeline_hash`].
    pub hash: String,
    /// The numbers that its weights were held and computed in, if not those that are usual.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<String>,
    /// Where it computed.
    pub device: String,
}

/// A picture that was changed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Change {
    /// Where it was.
    pub picture: Source,
    /// How much of the way from noise was walked anew.
    pub strength: f64,
    /// White where something new was painted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<Source>,
}

/// A file that counted so much.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weighted {
    /// Where it was.
    pub file: Source,
    /// How much it counted.
    pub weight: f64,
}

/// A file that went into a picture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Where it was.
    pub path: PathBuf,
    /// Of its content.
    pub sha256: String,
}

impl Source {
    /// A file as it is now.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let hash = sha256(path).map_err(Error::io(path))?;
        Ok(Self { path: path.into(), sha256: hash.digits().into() })
    }

    /// Where the same content is: among `given` files, or where it was.
    ///
    /// # Errors
    /// If it is in none of these places, with what is where it was.
    pub fn find(&self, given: &[Source]) -> Result<Source, Error> {
        if let Some(found) = given.iter().find(|source| source.sha256 == self.sha256) {
            return Ok(found.clone());
        }
        let found = Source::of(&self.path)?;
        if found.sha256 != self.sha256 {
            let [then, now] = [&self.sha256, &found.sha256].map(|digits| short(digits));
            let problem = format!("another file than the picture was made with: SHA-256 {now}…, not {then}…");
            return Err(Error::Data { file: self.path.clone(), problem });
        }
        Ok(found)
    }
}

/// The first digits of a hash, which people compare.
fn short(digits: &str) -> &str {
    digits.get(..10).unwrap_or(digits)
}

impl Record {
    /// The record of a PNG.
    ///
    /// # Errors
    /// If the file cannot be read, is no PNG, or has no record or a malformed one.
    pub fn read(file: &Path) -> Result<Self, Error> {
        let texts = png_texts(&content(file)?, &file.display().to_string())?;
        let wrong = |problem: String| Error::Data { file: file.into(), problem };
        let Some((_, text)) = texts.iter().find(|(keyword, _)| keyword == KEYWORD) else {
            let problem = "no record of how it was made (a PNG text `volary`): another program made it, or one that changed \
                           it left its texts out";
            return Err(wrong(problem.into()));
        };
        serde_json::from_str(text).map_err(|error| wrong(format!("its record cannot be read: {error}")))
    }

    /// Writes a picture as a PNG that carries this record, and the same for people.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn save(&self, picture: &Rgb8, file: &Path) -> Result<(), Error> {
        let wrong = |error: serde_json::Error| Error::Data { file: file.into(), problem: error.to_string() };
        let record = serde_json::to_string(self).map_err(wrong)?;
        Ok(picture.save_png_with(file, &[(KEYWORD, &record), (PARAMETERS, &self.told())])?)
    }

    /// The files that went into it.
    pub fn sources_mut(&mut self) -> impl Iterator<Item = &mut Source> {
        let Self { init, loras, embeddings, single_file, .. } = self;
        let pictures = init.iter_mut().flat_map(|change| [Some(&mut change.picture), change.mask.as_mut()]);
        let loras = loras.iter_mut().map(|lora| &mut lora.file);
        pictures.flatten().chain(loras).chain(embeddings).chain(single_file)
    }

    /// What is loaded beside the model.
    pub fn extras(&self) -> Extras {
        Extras {
            loras: self.loras.iter().map(|lora| (lora.file.path.clone(), lora.weight)).collect(),
            embeddings: self.embeddings.iter().map(|file| file.path.clone()).collect(),
            single_file: self.single_file.as_ref().map(|file| file.path.clone()),
        }
    }

    /// What is to be asked for so that the picture comes again; `init` is what the record's names.
    pub fn asked(&self, init: Option<Init>) -> Imagine {
        Imagine {
            prompt: self.prompt.clone(),
            negative: self.negative.clone(),
            size: Some([self.height, self.width]),
            steps: self.steps,
            guidance: self.guidance,
            seed: self.seed,
            count: self.grid.map_or(1, |[rows, columns]| rows.saturating_mul(columns)),
            scheduler: Some(self.scheduler.clone()).filter(|class| !class.is_empty()),
            eta: self.eta,
            temperature: self.temperature,
            init,
            coding: Some(if self.tiled { Coding::Tiled } else { Coding::Whole }),
            ..Imagine::default()
        }
    }

    /// For people, in the form that the web UI made common.
    pub fn told(&self) -> String {
        let Self { prompt, negative, model, steps, guidance, seed, width, height, version, .. } = self;
        let mut told = format!("{prompt}\n");
        if !negative.is_empty() {
            told += &format!("Negative prompt: {negative}\n");
        }
        told += &format!("Steps: {steps}");
        let mut add = |name: &str, value: &dyn std::fmt::Display| {
            write!(told, ", {name}: {value}").expect("a text has room")
        };
        if !self.scheduler.is_empty() {
            add("Sampler", &self.scheduler);
        }
        add("CFG scale", guidance);
        add("Seed", seed);
        add("Size", &format!("{width}x{height}"));
        if self.eta != 0.0 {
            add("Eta", &self.eta);
        }
        if self.tiled {
            add("VAE", &"tiled");
        }
        if let Some(temperature) = &self.temperature {
            add("Temperature", temperature);
        }
        if let Some([rows, columns]) = self.grid {
            add("Grid", &format!("{rows}x{columns}"));
        }
        if let Some(Change { picture, strength, mask }) = &self.init {
            add("Denoising strength", strength);
            add("Picture", &picture.told());
            if let Some(mask) = mask {
                add("Mask", &mask.told());
            }
        }
        for Weighted { file, weight } in &self.loras {
            add("LoRA", &format!("{}:{weight}", file.told()));
        }
        for file in &self.embeddings {
            add("Embedding", &file.told());
        }
        if let Some(file) = &self.single_file {
            add("Weights", &file.told());
        }
        add("Model", &model.name);
        if let Some(variant) = &model.variant {
            add("Variant", variant);
        }
        add("Model hash", &short(&model.hash));
        if let Some(dtype) = &model.dtype {
            add("Numbers", dtype);
        }
        add("Device", &model.device);
        add("Version", &format!("volary {version}"));
        told
    }
}

impl Source {
    fn told(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        format!("{name} ({})", short(&self.sha256))
    }
}
