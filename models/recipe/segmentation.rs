//! A tiny SegGPT on drawn shapes: each question has one example, what is marked there is to be found in another picture.
//!
//! The pictures never end: those of a step are drawn from (seed, step, row).

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, FloatDType, Tensor};
use fastrand::Rng;
use indicatif::{ProgressBar, ProgressStyle};
use volary_vision::image::Rgb8;
use volary_vision::preprocess::Preprocessor;
use volary_vision::resample::Filter;
use volary_weights::{LoadOptions, save};

use super::curve;
use super::shapes::{Part, SIDE, Task};
use crate::config::Config;
use crate::error::Error;
use crate::folder::Folder;
use crate::paint::{Easel, Example};
use crate::painter::Rows;
use crate::seggpt::{Layout, Meant, SegGpt, SegGptConfig, Segmenter, loss};

const CONFIG: &str = include_str!("shapes/config.json");
const PREPROCESSOR_CONFIG: &str = include_str!("shapes/preprocessor_config.json");

/// The settings of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Recipe {
    /// Optimizer steps.
    pub steps: usize,
    /// Questions per step.
    pub batch: usize,
    /// Parts of a batch, each computed on a thread of its own.
    pub parts: usize,
    /// The highest learning rate, after a twentieth of the steps; from there half a cosine to zero.
    pub learning_rate: f64,
    /// Of initial weights and pictures.
    pub seed: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self { steps: 1400, batch: 16, parts: 2, learning_rate: 2e-3, seed: 1 }
    }
}

impl Recipe {
    fn learning_rate_at(&self, step: usize) -> f64 {
        let warmup = (self.steps / 20).max(1);
        if step < warmup {
            return self.learning_rate * (step + 1) as f64 / warmup as f64;
        }
        let progress = (step - warmup) as f64 / (self.steps - warmup).max(1) as f64;
        self.learning_rate * 0.5 * (1.0 + (core::f64::consts::PI * progress).cos())
    }
}

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
pub fn train(recipe: &Recipe, folder: &Path, device: &Device) -> Result<Outcome, Error> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let config = SegGptConfig::transformers(&Config::parse(Path::new("config.json"), CONFIG.as_bytes())?)?;
    let preprocessor = Preprocessor::from_json(Path::new("preprocessor_config.json"), PREPROCESSOR_CONFIG)?;
    let easel = Easel { preprocessor, filter: Filter::Nearest };
    let device = device.clone().autodiff();
    device.seed(recipe.seed);
    let mut model = config.init(&device);
    let mut optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(0.01).init();
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec} eta {eta} {msg}");
    let bar = ProgressBar::new(recipe.steps as u64).with_style(style.expect("the template is valid"));
    let mut losses = Vec::with_capacity(recipe.steps);
    for step in 0..recipe.steps {
        let (loss, gradients) = gradients(recipe, &config, &easel, &model, step, &device)?;
        if !loss.is_finite() {
            let problem = format!("step {step}: the loss is {loss}; lower the learning rate");
            return Err(Error::Data { file: folder.into(), problem });
        }
        model = optimizer.step(recipe.learning_rate_at(step), model, gradients);
        losses.push(loss);
        bar.inc(1);
        bar.set_message(format!("loss {loss:.3}"));
    }
    bar.finish();
    let points: Vec<(usize, f32)> = losses.iter().copied().enumerate().collect();
    let drawn = folder.join("loss.svg");
    fs::write(&drawn, curve::svg("training loss by step", &points)).map_err(Error::io(&drawn))?;
    let exported = folder.join("export");
    export(&model.valid(), &exported)?;
    Ok(Outcome { folder: exported, losses })
}

/// The mean loss of a step's batch, and its gradients.
fn gradients(
    recipe: &Recipe,
    config: &SegGptConfig,
    easel: &Easel,
    model: &SegGpt,
    step: usize,
    device: &Device,
) -> Result<(f32, GradientsParams), Error> {
    let rows: Vec<usize> = (0..recipe.batch).collect();
    let parts: Vec<&[usize]> = rows.chunks(recipe.batch.div_ceil(recipe.parts)).collect();
    let computed: Vec<Result<(f32, GradientsParams), Error>> = std::thread::scope(|scope| {
        let of_part = |rows: &&[usize]| {
            // a graph of its own: threads that share leaves deadlock in Burn 0.22.1's autodiff
            let (model, rows) = (model.clone().fork(device), rows.to_vec());
            let share = rows.len() as f64 / recipe.batch as f64;
            scope.spawn(move || {
                let batch = Batch::draw(recipe, easel, step, &rows, device)?;
                let loss = batch.loss(config, &model) * share;
                let value = loss.clone().into_scalar::<f32>();
                Ok((value, GradientsParams::from_grads(loss.backward(), &model)))
            })
        };
        let running: Vec<_> = parts.iter().map(of_part).collect();
        running.into_iter().map(|part| part.join().expect("a part does not panic")).collect()
    });
    let mut accumulator = GradientsAccumulator::new();
    let mut total = 0.0;
    for part in computed {
        let (loss, gradients) = part?;
        total += loss;
        accumulator.accumulate(model, gradients);
    }
    Ok((total, accumulator.grads()))
}

/// Examples above questions, and their answers: `[rows, 3, 2 * side, side]` each.
struct Batch {
    pictures: Tensor<4>,
    answers: Tensor<4>,
}

impl Batch {
    fn draw(
        recipe: &Recipe,
        easel: &Easel,
        step: usize,
        rows: &[usize],
        device: &Device,
    ) -> Result<Self, Error> {
        let (mut above, mut below) = (Vec::new(), Vec::new());
        for row in rows {
            let row = (step * recipe.batch + row) as u64;
            let mut rng = Rng::with_seed(mix(recipe.seed, row));
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
