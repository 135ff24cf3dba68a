//! A tiny SegGPT on drawn shapes: each question has one example, what is marked there is to be found in another picture.
//!
//! The pictures never end: those of a step are drawn from (seed, step, row).

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Device, FloatDType, Tensor};
use fastrand::Rng;
use volary_kernels::random::seeded;
use volary_vision::image::Rgb8;
use volary_vision::preprocess::Preprocessor;
use volary_vision::resample::Filter;
use volary_weights::{LoadOptions, save};

use super::descent::Descent;
use super::run::TrainError;
use super::shapes::{Part, SIDE, Task};
use crate::config::Config;
use crate::error::Error;
use crate::folder::Folder;
use crate::paint::{Easel, Example};
use crate::painter::Rows;
use crate::seggpt::{Layout, Meant, SegGpt, SegGptConfig, Segmenter, loss};

const CONFIG: &str = include_str!("shapes/config.json");
const PREPROCESSOR_CONFIG: &str = include_str!("shapes/preprocessor_config.json");

/// The run that the documentation speaks of.
pub const RECIPE: Descent = Descent { steps: 1400, batch: 16, parts: 2, learning_rate: 2e-3, seed: 1 };

/// What came of a run.
pub struct Outcome {
    /// The model's folder, in the layout of transformers.
    pub folder: PathBuf,
    /// One loss per step.
    pub losses: Vec<f32>,
}

/// Trains from random weights, and writes the model's folder and the curve of its loss into `folder`.
///
/// # Errors
/// If a file cannot be written, or the loss is not a number any more.
pub fn train(recipe: &Descent, folder: &Path, device: &Device) -> Result<Outcome, TrainError> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let (config, preprocessor) = shape()?;
    let easel = Easel { preprocessor, filter: Filter::Nearest };
    let device = device.clone().autodiff();
    let model = seeded(recipe.seed, &device, |device| config.init(device));
    let (model, losses) = recipe.run(model, folder, &device, |model, rows| {
        Ok(Batch::draw(recipe.seed, &easel, rows, &device)?.loss(&config, model))
    })?;
    let exported = folder.join("export");
    export(&model.valid(), &exported)?;
    Ok(Outcome { folder: exported, losses })
}

fn shape() -> Result<(SegGptConfig, Preprocessor), Error> {
    let config = SegGptConfig::transformers(&Config::parse(Path::new("config.json"), CONFIG.as_bytes())?)?;
    let preprocessor = Preprocessor::from_json(Path::new("preprocessor_config.json"), PREPROCESSOR_CONFIG)?;
    Ok((config, preprocessor))
}

/// Examples above questions, and their answers: `[rows, 3, 2 * side, side]` each.
struct Batch {
    pictures: Tensor<4>,
    answers: Tensor<4>,
}

impl Batch {
    fn draw(seed: u64, easel: &Easel, rows: &[u64], device: &Device) -> Result<Self, Error> {
        let (mut above, mut below) = (Vec::new(), Vec::new());
        for &row in rows {
            let mut rng = Rng::with_seed(mix(seed, row));
            let task = Task::draw(Part::Learned, &mut rng);
            above.push(task.example(&mut rng)?);
            below.push(task.example(&mut rng)?);
        }
        let [shown, answers] = easel.examples(&above, device)?;
        let [asked, wanted] = easel.examples(&below, device)?;
        let both = |above, below| Tensor::cat(vec![above, below], 2);
        Ok(Self { pictures: both(shown, asked), answers: both(answers, wanted) })
    }

    /// `[1]`
    fn loss(self, config: &SegGptConfig, model: &SegGpt) -> Tensor<1> {
        let Self { pictures, answers } = self;
        let [rows, ..] = pictures.dims();
        let masked = config.trunk.lower_half(rows, &pictures.device());
        let meant = vec![Some(Meant::Instance); rows];
        let painted = model.forward(pictures, answers.clone(), masked.clone(), &meant, Rows::Questions);
        let valid = answers.ones_like();
        loss(&config.trunk, painted, answers, masked, valid)
    }
}

/// Writes the trained model as a folder in the layout of transformers.
fn export(model: &SegGpt, folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    let weights = folder.join("model.safetensors");
    save(model, Layout::Transformers.keys(), Some(FloatDType::F32), &weights, Some(metadata))?;
    for (name, text) in [("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR_CONFIG)] {
        let file = folder.join(name);
        fs::write(&file, text).map_err(Error::io(&file))?;
    }
    Ok(())
}

/// A drawn question.
struct Question {
    /// The colour of what is marked.
    mark: [u8; 3],
    /// What is asked, and what is right.
    asked: Example,
    examples: Vec<Example>,
}

impl Question {
    fn draw(part: Part, examples: usize, seed: u64) -> Result<Self, Error> {
        let mut rng = Rng::with_seed(seed);
        let task = Task::draw(part, &mut rng);
        let asked = task.example(&mut rng)?;
        let examples = (0..examples).map(|_| task.example(&mut rng)).collect::<Result<_, _>>()?;
        Ok(Self { mark: task.mark, asked, examples })
    }
}

/// How much of what should be marked and of what a model marks is common to both, of all that either marks: the mean over
/// drawn questions, each with so many examples. The same seed asks the same.
///
/// # Errors
/// If the folder cannot be loaded.
pub fn evaluate(
    folder: &Path,
    part: Part,
    examples: usize,
    questions: usize,
    seed: u64,
    device: &Device,
) -> Result<f64, Error> {
    let segmenter = Segmenter::load(&Folder::Disk(folder.into()), &LoadOptions::default(), device)?;
    let mut sum = 0.0;
    for question in 0..questions as u64 {
        let Question { mark, asked, examples } = Question::draw(part, examples, mix(seed, question))?;
        let painting = segmenter.segment(&asked.picture, &examples, Meant::Instance)?;
        let towards = |pixel: [f32; 3]| {
            let light: f32 = mark.iter().map(|&side| f32::from(side).powi(2)).sum();
            let along: f32 = pixel.iter().zip(mark).map(|(value, side)| value * f32::from(side)).sum();
            along > 0.5 * light // nearer to the mark than to black
        };
        sum += overlap(painting.pixels().map(towards), &asked.answer);
    }
    Ok(sum / questions as f64)
}

/// The questions of [`evaluate`] with one example, a row each: the example, its mask, what is asked, what the model paints;
/// three times as large as they are drawn.
///
/// # Errors
/// If the folder cannot be loaded.
pub fn sheet(folder: &Path, part: Part, questions: usize, seed: u64, device: &Device) -> Result<Rgb8, Error> {
    const TIMES: usize = 3;
    const COLUMNS: usize = 4;
    let segmenter = Segmenter::load(&Folder::Disk(folder.into()), &LoadOptions::default(), device)?;
    let mut pixels = Vec::new();
    for question in 0..questions as u64 {
        let Question { asked, examples, .. } = Question::draw(part, 1, mix(seed, question))?;
        let painted = segmenter.segment(&asked.picture, &examples, Meant::Instance)?.to_rgb();
        let row: [&Rgb8; COLUMNS] = [&examples[0].picture, &examples[0].answer, &asked.picture, &painted];
        for y in 0..SIDE * TIMES {
            let line = row
                .iter()
                .flat_map(|picture| picture.pixels()[3 * SIDE * (y / TIMES)..].chunks_exact(3).take(SIDE));
            pixels.extend(line.flat_map(|pixel| pixel.repeat(TIMES)));
        }
    }
    Ok(Rgb8::new(COLUMNS * SIDE * TIMES, questions * SIDE * TIMES, pixels)?)
}

/// One seed out of two numbers.
fn mix(seed: u64, row: u64) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ row
}

/// Intersection over union of what is marked with what is not black in a mask.
fn overlap(marked: impl Iterator<Item = bool>, mask: &Rgb8) -> f64 {
    let wanted = mask.pixels().chunks_exact(3).map(|pixel| pixel.iter().any(|&side| side > 0));
    let (mut common, mut either) = (0, 0);
    for (marked, wanted) in marked.zip(wanted) {
        common += usize::from(marked && wanted);
        either += usize::from(marked || wanted);
    }
    common as f64 / either.max(1) as f64
}
