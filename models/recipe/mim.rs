//! EVA's pretraining at the size of a toy: a tiny EVA-02 sees drawn pictures of which blocks are hidden, and says there what
//! CLIP would see (Fang et al. 2022, <https://arxiv.org/abs/2211.07636>, section 2.1).
//!
//! The teacher is the tower for pictures of the CLIP inside this program. A picture of 128 x 128 pixels gives 8 x 8 features
//! after its third stage of four, a feature for each of the student's patches. Its last stage would need pictures of 256
//! pixels for as many, on which a drawn shape is larger than anything that it was trained on.
//!
//! The pictures never end: each is drawn from (seed, number).

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::{Bool, Device, FloatDType, Tensor, TensorData};
use fastrand::Rng;
use volary_kernels::random::seeded;
use volary_vision::image::Rgb8;
use volary_vision::masking::BlockMasking;
use volary_vision::preprocess::{Preprocessor, Resize};
use volary_vision::resnet::ResNet;
use volary_weights::{LoadOptions, save};

use super::descent::Descent;
use super::run::{TrainError, mix};
use super::shapes::{Part, SIDE, Task};
use crate::clip::{ClipConfig, VisionTower};
use crate::config::Config;
use crate::error::Error;
use crate::eva::{Eva, EvaConfig, negative_cosine};
use crate::folder::Folder;
use crate::pretrained::EMOJI_CLIP;
use crate::registry::fill;

const CONFIG: &str = include_str!("mim/config.json");
const PREPROCESSOR_CONFIG: &str = include_str!("mim/preprocessor_config.json");

/// The run that the documentation speaks of.
pub const RECIPE: Descent = Descent { steps: 1200, batch: 16, parts: 2, learning_rate: 2e-3, seed: 1 };

/// Two fifths of the patches are hidden, as EVA hides 105 of 256.
const MASKING: BlockMasking = BlockMasking { grid: [8, 8], masked: 26, smallest: 4 };

/// What came of a run.
pub struct Outcome {
    /// The model's folder, in the layout of the authors' masked pretraining.
    pub folder: PathBuf,
    /// The negative mean cosine of each step.
    pub losses: Vec<f32>,
}

/// Trains from random weights, and writes the model's folder and the curve of its loss into `folder`.
///
/// # Errors
/// If a file cannot be written, or the loss is not a number any more.
pub fn train(recipe: &Descent, folder: &Path, device: &Device) -> Result<Outcome, TrainError> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let config = config()?;
    let views = Views::load(device)?;
    let device = device.clone().autodiff();
    let model = seeded(recipe.seed, &device, |device| config.init(device));
    let (model, losses) = recipe.run(model, folder, &device, |model, rows| {
        let questions = Question::draw(Part::Learned, recipe.seed, rows.iter().copied())?;
        let Batch { pixels, masked, targets } = views.batch(&questions)?;
        let (pixels, targets) = (Tensor::from_inner(pixels), Tensor::from_inner(targets));
        let masked = Tensor::from_data(masked, &device);
        Ok(negative_cosine(predictions(model, pixels, masked), targets))
    })?;
    let exported = folder.join("export");
    export(&config, &model.valid(), &exported)?;
    Ok(Outcome { folder: exported, losses })
}

fn config() -> Result<EvaConfig, Error> {
    Ok(EvaConfig::masked(&Config::parse(Path::new("config.json"), CONFIG.as_bytes())?)?)
}

/// What a model says of the hidden patches of pictures that hide at least one: `[masked, width]`.
fn predictions(model: &Eva, pixels: Tensor<4>, masked: Tensor<2, Bool>) -> Tensor<2> {
    let tokens = model.forward_masked(pixels, masked.clone());
    model.predict(tokens, masked).expect("a masking hides at least one patch")
}

/// A drawn picture, and which of its patches are hidden.
struct Question {
    picture: Rgb8,
    masked: Vec<bool>,
}

impl Question {
    fn draw(part: Part, seed: u64, numbers: impl Iterator<Item = u64>) -> Result<Vec<Self>, Error> {
        let draw = |number| {
            let mut rng = Rng::with_seed(mix([seed, number, 0]));
            let picture = Task::draw(part, &mut rng).example(&mut rng)?.picture;
            Ok(Self { picture, masked: MASKING.draw(&mut rng) })
        };
        numbers.map(draw).collect()
    }
}

/// What the student sees, and what it should say.
struct Batch {
    /// `[batch, 3, side, side]`.
    pixels: Tensor<4>,
    /// `[batch, patches]`.
    masked: TensorData,
    /// What the teacher sees where the student does not: `[masked, width]`.
    targets: Tensor<2>,
}

/// How both see a picture.
struct Views {
    student: Preprocessor,
    teacher: Preprocessor,
    tower: ResNet,
    device: Device,
}

impl Views {
    /// Stages of the teacher, whose features are taken after the last of them.
    const STAGES: usize = 3;
    /// Side of a cell after them in pixels.
    const CELL: usize = 2 << Self::STAGES;

    fn load(device: &Device) -> Result<Self, Error> {
        let student = Preprocessor::from_json(Path::new("preprocessor_config.json"), PREPROCESSOR_CONFIG)?;
        let size = MASKING.grid.map(|cells| cells * Self::CELL);
        let teacher = Preprocessor { resize: Resize::Exact(size), crop: None, ..EMOJI_CLIP.preprocessor()? };
        let (config, layout) = ClipConfig::of(&EMOJI_CLIP)?;
        let model = config.load(&EMOJI_CLIP, layout, &LoadOptions::default(), device)?;
        let VisionTower::ResNet(tower) = model.vision else {
            let problem = "the teacher is no convolutional tower".into();
            return Err(Error::Data { file: EMOJI_CLIP.path().into(), problem });
        };
        Ok(Self { student, teacher, tower, device: device.clone() })
    }

    fn batch(&self, questions: &[Question]) -> Result<Batch, Error> {
        let pictures: Vec<Rgb8> = questions.iter().map(|question| question.picture.clone()).collect();
        let masked: Vec<bool> =
            questions.iter().flat_map(|question| question.masked.iter().copied()).collect();
        let seen = self.teacher.batch(&pictures, &self.device)?;
        let features = self.tower.features(seen, Self::STAGES); // [batch, rows, columns, width]
        let [batch, rows, columns, width] = features.dims();
        let features = features.reshape([batch * rows * columns, width]);
        let hidden: Vec<i64> = (0..).zip(&masked).filter(|(_, hidden)| **hidden).map(|(at, _)| at).collect();
        let count = hidden.len();
        let targets = features.select(0, Tensor::from_data(TensorData::new(hidden, [count]), &self.device));
        Ok(Batch {
            pixels: self.student.batch(&pictures, &self.device)?,
            masked: TensorData::new(masked, [batch, rows * columns]),
            targets,
        })
    }
}

/// Writes the trained model as a folder in the layout of the authors' masked pretraining.
fn export(config: &EvaConfig, model: &Eva, folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let metadata = [("format".to_owned(), "pt".to_owned())].into();
    save(model, config.keys(), Some(FloatDType::F32), &folder.join("model.safetensors"), Some(metadata))?;
    for (name, text) in [("config.json", CONFIG), ("preprocessor_config.json", PREPROCESSOR_CONFIG)] {
        let file = folder.join(name);
        fs::write(&file, text).map_err(Error::io(&file))?;
    }
    Ok(())
}

/// Cosines with the teacher's features at hidden patches: means over all of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Score {
    /// Of what the model says.
    pub model: f64,
    /// Of one vector for all of these patches, the best that there is.
    pub constant: f64,
    /// Of one vector for all of these patches in the same place of the grid, the best that there are: the teacher pads its
    /// pictures, and sees it.
    pub places: f64,
}

/// Each hidden patch of drawn pictures.
struct Answers {
    /// Where it is in its grid.
    places: Vec<usize>,
    /// What the model says, and what the teacher sees, of each.
    said: Vec<Vec<f32>>,
    seen: Vec<Vec<f32>>,
}

impl Answers {
    fn of(model: &Eva, views: &Views, questions: &[Question]) -> Result<Self, Error> {
        let mut answers = Self { places: Vec::new(), said: Vec::new(), seen: Vec::new() };
        for questions in questions.chunks(32) {
            let Batch { pixels, masked, targets } = views.batch(questions)?;
            let said = predictions(model, pixels, Tensor::from_data(masked, &views.device));
            answers.said.extend(rows(said));
            answers.seen.extend(rows(targets));
            let places = |question: &Question| -> Vec<usize> {
                (0..question.masked.len()).filter(|&place| question.masked[place]).collect()
            };
            answers.places.extend(questions.iter().flat_map(places));
        }
        Ok(answers)
    }
}

/// How well a model says what is hidden in so many drawn pictures. The same seed draws the same.
///
/// # Errors
/// If the folder cannot be loaded.
pub fn evaluate(
    folder: &Path,
    part: Part,
    pictures: usize,
    seed: u64,
    device: &Device,
) -> Result<Score, Error> {
    let (model, views) = (load(folder, device)?, Views::load(device)?);
    let questions = Question::draw(part, seed, 0..pictures as u64)?;
    let Answers { places, said, seen } = Answers::of(&model, &views, &questions)?;
    let count = seen.len().max(1) as f64;
    let of_model =
        said.iter().zip(&seen).map(|(said, seen)| f64::from(cosine(said, seen))).sum::<f64>() / count;
    let with_best = |features: &[&[f32]]| -> f64 {
        let best = best_constant(features);
        features.iter().map(|seen| f64::from(cosine(&best, seen))).sum()
    };
    let all: Vec<&[f32]> = seen.iter().map(Vec::as_slice).collect();
    let [rows, columns] = MASKING.grid;
    let of_places = (0..rows * columns).map(|place| {
        let there = places.iter().zip(&all).filter(|(at, _)| **at == place);
        with_best(&there.map(|(_, seen)| *seen).collect::<Vec<_>>())
    });
    Ok(Score { model: of_model, constant: with_best(&all) / count, places: of_places.sum::<f64>() / count })
}

/// The vector whose mean cosine with these is the highest: the mean of their directions, as the mean cosine with a unit
/// vector is its product with that mean. Empty of none.
pub fn best_constant(features: &[&[f32]]) -> Vec<f32> {
    let mut mean = vec![0.0; features.first().map_or(0, |feature| feature.len())];
    for feature in features {
        let length = length(feature) * features.len() as f32;
        mean.iter_mut().zip(*feature).for_each(|(mean, value)| *mean += value / length);
    }
    mean
}

/// The cosine of two vectors, as [`negative_cosine`] has it.
pub fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>() / (length(a) * length(b))
}

fn length(vector: &[f32]) -> f32 {
    vector.iter().map(|value| value * value).sum::<f32>().sqrt().max(1e-8)
}

fn load(folder: &Path, device: &Device) -> Result<Eva, Error> {
    let folder = Folder::Disk(folder.into());
    let (config, _) = EvaConfig::of(&folder)?;
    fill(&folder, config.init(device), config.keys(), &LoadOptions::default())
}

fn rows(x: Tensor<2>) -> Vec<Vec<f32>> {
    let [_, width] = x.dims();
    let values: Vec<f32> = x.into_data().iter::<f32>().collect();
    values.chunks_exact(width).map(<[f32]>::to_vec).collect()
}

/// Pictures of [`evaluate`], a row each, three times as large as they are drawn: the picture, what the model sees, the cosine
/// of what it says at each hidden patch, and that of the best constant of [`Score`]; cosines from 0, black, to 1, white.
///
/// # Errors
/// If the folder cannot be loaded.
pub fn sheet(folder: &Path, part: Part, pictures: usize, seed: u64, device: &Device) -> Result<Rgb8, Error> {
    const TIMES: usize = 3;
    const COLUMNS: usize = 4;
    /// What is seen, where cosines of what is not are shown; and the other way round.
    const SEEN: [u8; 3] = [40, 60, 110];
    const HIDDEN: [u8; 3] = [0; 3];
    let (model, views) = (load(folder, device)?, Views::load(device)?);
    let questions = Question::draw(part, seed, 0..pictures as u64)?;
    let Answers { said, seen, .. } = Answers::of(&model, &views, &questions)?;
    let best = best_constant(&seen.iter().map(Vec::as_slice).collect::<Vec<_>>());
    let grey = |cosine: f32| [(255.0 * cosine.clamp(0.0, 1.0)) as u8; 3];
    let mut cosines =
        said.iter().zip(&seen).map(|(said, seen)| [cosine(said, seen), cosine(&best, seen)].map(grey));
    let [rows, columns] = MASKING.grid;
    let mut pixels = Vec::new();
    for Question { picture, masked } in &questions {
        let shown: Vec<Option<[[u8; 3]; 2]>> =
            masked.iter().map(|&hidden| if hidden { cosines.next() } else { None }).collect();
        for y in 0..SIDE * TIMES {
            for x in 0..COLUMNS * SIDE * TIMES {
                let (row, column) = (y / TIMES, x / TIMES % SIDE);
                let own = &picture.pixels()[3 * (row * SIDE + column)..][..3];
                let patch = shown[row * rows / SIDE * columns + column * columns / SIDE];
                pixels.extend_from_slice(match (x / (SIDE * TIMES), &patch) {
                    (0, _) | (1, None) => own,
                    (1, Some(_)) => &HIDDEN,
                    (_, None) => &SEEN,
                    (2, Some([of_model, _])) => of_model,
                    (_, Some([_, of_constant])) => of_constant,
                });
            }
        }
    }
    Ok(Rgb8::new(COLUMNS * SIDE * TIMES, pictures * SIDE * TIMES, pixels)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// No other vector has a higher mean cosine: none of them, not their mean, and none near the best.
    #[test]
    fn no_constant_is_better_than_the_best() {
        let mut rng = Rng::with_seed(4);
        let draw = |rng: &mut Rng, lengths: f32| -> Vec<f32> {
            let length = 0.1 + lengths * rng.f32();
            (0..6).map(|_| length * (rng.f32() - 0.2)).collect()
        };
        let features: Vec<Vec<f32>> = (0..40).map(|_| draw(&mut rng, 30.0)).collect();
        let features: Vec<&[f32]> = features.iter().map(Vec::as_slice).collect();
        let mean_cosine = |constant: &[f32]| -> f32 {
            features.iter().map(|feature| cosine(constant, feature)).sum::<f32>() / features.len() as f32
        };
        let best = best_constant(&features);
        let highest = mean_cosine(&best);
        let mean: Vec<f32> = (0..6).map(|at| features.iter().map(|feature| feature[at]).sum()).collect();
        assert!(
            mean_cosine(&mean) < highest - 1e-3,
            "the mean of the features is not that of their directions"
        );
        for feature in &features {
            assert!(mean_cosine(feature) < highest);
        }
        for _ in 0..200 {
            let near: Vec<f32> = best.iter().map(|value| value + 0.1 * (rng.f32() - 0.5)).collect();
            assert!(mean_cosine(&near) <= highest + 1e-6);
        }
    }

    /// The student's patches and the teacher's cells are one grid.
    #[test]
    fn what_the_teacher_sees_in_a_cell_is_what_the_student_lacks() {
        let views = Views::load(&Device::flex()).unwrap();
        let mut question = Question::draw(Part::Learned, 1, 0..1).unwrap().remove(0);
        let [rows, columns] = MASKING.grid;
        let at = |row: usize, column: usize| row * columns + column;
        question.masked = (0..rows * columns).map(|place| [at(1, 6), at(6, 1)].contains(&place)).collect();
        let seen = |question: &Question| rows_of(&views, question);
        let before = seen(&question);
        // the patch of row 1 and column 6 is painted over: 4 x 4 pixels of 32 x 32
        let mut pixels = question.picture.pixels().to_vec();
        for (row, column) in (4..8).flat_map(|row| (24..28).map(move |column| (row, column))) {
            pixels[3 * (row * SIDE + column)..][..3].copy_from_slice(&[255, 0, 255]);
        }
        question.picture = Rgb8::new(SIDE, SIDE, pixels).unwrap();
        let after = seen(&question);
        let change = |at: usize| 1.0 - cosine(&before[at], &after[at]);
        assert!(change(0) > 0.1 && change(0) > 5.0 * change(1), "{} {}", change(0), change(1));
    }

    fn rows_of(views: &Views, question: &Question) -> Vec<Vec<f32>> {
        let question = Question { picture: question.picture.clone(), masked: question.masked.clone() };
        rows(views.batch(&[question]).unwrap().targets)
    }
}
