//! Pictures from texts, whichever way a folder draws them.

use std::ops::ControlFlow;

use burn::tensor::Device;
use sha2::{Digest, Sha256};
use volary_multimodal::imagine::Stopped;
use volary_text::generate::{Piece, Sampling};
use volary_vision::image::Rgb8;
use volary_weights::LoadOptions;

use crate::error::Error;
use crate::folder::Folder;
use crate::imagine::{Coding, Extras, Imagine, Imagined, TextToImage, Texts, Update, picture};
use crate::index::model_hash;
use crate::registry::System;
use crate::stable_diffusion;
use crate::token_drawing::{self, DrawSettings, TokenDrawing};

/// Draws pictures from texts.
pub trait Draws {
    /// What is asked of it where nothing else is said.
    fn usual(&self) -> Imagine;

    /// Makes the pictures, one after the other; `watch` is told of each step, and may stop. A picture depends on its own
    /// seed alone, not on how many are made.
    ///
    /// # Errors
    /// [`Error::Request`] with everything that is wrong with the request, what this model has no use for included;
    /// [`Error::Stopped`] if it was stopped.
    fn draw(
        &self,
        asked: &Imagine,
        watch: &mut dyn FnMut(&Sketch) -> ControlFlow<()>,
    ) -> Result<Imagined, Error>;
}

/// How far a picture is.
pub struct Sketch<'a> {
    /// How many steps were made.
    pub done: usize,
    /// How many there are.
    pub total: usize,
    /// What it is believed to become; this may take longer than a step.
    pub preview: &'a dyn Fn() -> Rgb8,
}

impl Draws for TextToImage {
    fn usual(&self) -> Imagine {
        Imagine::default()
    }

    fn draw(
        &self,
        asked: &Imagine,
        watch: &mut dyn FnMut(&Sketch) -> ControlFlow<()>,
    ) -> Result<Imagined, Error> {
        self.imagine(asked, |update: &Update| {
            let (done, total) = (update.progress.done, update.progress.total);
            watch(&Sketch { done, total, preview: &|| update.preview() })
        })
    }
}

/// A token is a step. Of the numbers that can be asked for it has guidance and seed.
impl Draws for TokenDrawing {
    fn usual(&self) -> Imagine {
        Imagine {
            steps: self.plan.len(),
            guidance: DrawSettings::default().guidance.into(),
            temperature: Some(DrawSettings::default().sampling.temperature),
            size: Some([self.side(); 2]),
            ..Imagine::default()
        }
    }

    fn draw(
        &self,
        asked: &Imagine,
        watch: &mut dyn FnMut(&Sketch) -> ControlFlow<()>,
    ) -> Result<Imagined, Error> {
        let (side, total) = (self.side(), self.plan.len());
        let mut problems = asked.problems();
        let mut check = |is_right: bool, problem: String| {
            if !is_right {
                problems.push(problem);
            }
        };
        let is_own = asked.size.is_none_or(|size| size == [side; 2]);
        check(is_own, format!("this model draws pictures of {side}x{side} pixels"));
        check(asked.steps == total, format!("this model draws in {total} steps"));
        let refused = [
            ("scheduler", asked.scheduler.is_some()),
            ("eta", asked.eta != 0.0),
            ("picture to change", asked.init.is_some()),
            ("tiles", asked.coding == Some(Coding::Tiled)),
        ];
        for (name, is_asked) in refused {
            check(!is_asked, format!("this model draws by tokens: it takes no {name}"));
        }
        if !problems.is_empty() {
            return Err(Error::Request { problems });
        }
        let (mut pictures, mut seeds) = (Vec::new(), Vec::new());
        for at in 0..asked.count {
            let seed = asked.seed.wrapping_add(at as u64);
            let usual = DrawSettings::default();
            let temperature = asked.temperature.unwrap_or(usual.sampling.temperature);
            let sampling = Sampling { temperature, seed, ..usual.sampling };
            let settings = DrawSettings { guidance: asked.guidance as f32, sampling, ..usual };
            let (mut codes, mut stopped) = (Vec::new(), false);
            let mut told = |piece: Piece| {
                codes.push(piece.token);
                let preview = || picture(self.paint(std::slice::from_ref(&codes)));
                let flow = watch(&Sketch { done: codes.len(), total, preview: &preview });
                stopped = flow.is_break();
                flow
            };
            let drawn = TokenDrawing::draw(self, &[&asked.prompt], &asked.negative, &settings, &mut told)?;
            if stopped {
                return Err(Stopped { done: codes.len(), total }.into());
            }
            pictures.extend(drawn.into_iter().flatten());
            seeds.push(seed);
        }
        let left_out = self.plan.caption(&self.tokenizer, &asked.prompt)?.cut;
        let texts = Texts { rows: 1, left_out };
        let (scheduler, coding) = (String::new(), Coding::Whole);
        Ok(Imagined { pictures, seeds, size: [side; 2], scheduler, steps: total, texts, coding })
    }
}

/// A system that draws.
pub struct Drawing {
    system: &'static System,
    /// The folders of a pipeline's parts.
    parts: &'static [&'static str],
    /// Loads a folder, with what comes beside it.
    pub open: Open,
}

/// Loads a folder, with what comes beside it.
pub type Open = fn(&Folder, &Extras, &LoadOptions, &Device) -> Result<Box<dyn Draws>, Error>;

/// The systems that draw.
const DRAWING: &[Drawing] = &[
    Drawing {
        system: &stable_diffusion::SYSTEM,
        parts: stable_diffusion::PARTS,
        open: |folder, extras, options, device| {
            Ok(Box::new(TextToImage::load(folder, extras, options, device)?))
        },
    },
    Drawing {
        system: &token_drawing::SYSTEM,
        parts: &token_drawing::PARTS,
        open: |folder, extras, options, device| {
            let Extras { loras, embeddings, single_file } = extras;
            if !loras.is_empty() || !embeddings.is_empty() || single_file.is_some() {
                let problem = "a model that draws by tokens takes no LoRA, embedding or single file";
                return Err(Error::Request { problems: vec![problem.into()] });
            }
            Ok(Box::new(TokenDrawing::load(folder, options, device)?))
        },
    },
];

/// The system of a folder that draws.
///
/// # Errors
/// If the folder holds none.
pub fn drawing(folder: &Folder) -> Result<&'static Drawing, Error> {
    let system = System::of(folder)?.name;
    let row = DRAWING.iter().find(|row| row.system.name == system);
    row.ok_or(Error::Task { system, task: "draw pictures from texts" })
}

/// The parts of a pipeline that draws, by the names of their folders.
///
/// # Errors
/// If the folder holds no system that draws.
pub fn parts(folder: &Folder) -> Result<Vec<(&'static str, Folder)>, Error> {
    Ok(drawing(folder)?.parts.iter().filter_map(|name| Some((*name, folder.part(name)?))).collect())
}

/// 64 digits that stand for a pipeline: of its `model_index.json` and of its parts' folders, with [`model_hash`]'s samples of
/// what is large.
///
/// # Errors
/// If the folder holds no system that draws, or a file cannot be read.
pub fn pipeline_hash(folder: &Folder) -> Result<String, Error> {
    let mut hash = Sha256::new();
    for (name, part) in parts(folder)? {
        hash.update(name);
        hash.update(model_hash(&part)?);
    }
    hash.update(folder.read(stable_diffusion::INDEX)?);
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
