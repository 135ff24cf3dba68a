//! Pictures from texts, whichever way a folder draws them.

use std::ops::ControlFlow;

use burn::tensor::Device;
use sha2::{Digest, Sha256};
use volary_vision::image::Rgb8;
use volary_weights::LoadOptions;

use crate::error::Error;
use crate::folder::Folder;
use crate::imagine::{Extras, Imagine, Imagined, TextToImage, Update};
use crate::index::model_hash;
use crate::registry::System;
use crate::stable_diffusion;

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

/// Loads what draws out of a folder, with what comes beside it.
pub type OpenDraws = fn(&Folder, &Extras, &LoadOptions, &Device) -> Result<Box<dyn Draws>, Error>;

/// The systems that draw.
const DRAWING: &[(&System, OpenDraws)] = &[(&stable_diffusion::SYSTEM, |folder, extras, options, device| {
    Ok(Box::new(TextToImage::load(folder, extras, options, device)?))
})];

/// What loads a folder for drawing.
///
/// # Errors
/// If the folder holds no system that draws.
pub fn drawing(folder: &Folder) -> Result<OpenDraws, Error> {
    let found = System::of(folder)?.name;
    let row = DRAWING.iter().find(|(system, _)| system.name == found);
    row.map(|(_, open)| *open).ok_or(Error::Task { system: found, task: "draw pictures from texts" })
}

/// 64 digits that stand for a pipeline: of its `model_index.json`, and of the folders of the parts that it names, with
/// [`model_hash`]'s samples of what is large.
///
/// # Errors
/// If the folder holds no system that draws, or a file cannot be read.
pub fn pipeline_hash(folder: &Folder) -> Result<String, Error> {
    drawing(folder)?;
    let index = folder.config(stable_diffusion::INDEX)?;
    let mut names: Vec<&str> = index.fields().collect();
    names.sort_unstable();
    let mut hash = Sha256::new();
    hash.update(folder.read(stable_diffusion::INDEX)?);
    for name in names {
        if let Some(part) = folder.part(name) {
            hash.update(name);
            hash.update(model_hash(&part)?);
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
