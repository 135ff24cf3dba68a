//! Learning to draw emoji: first the codes of pictures (a VQ-GAN without the adversary), then a decoder that writes them after
//! captions.
//!
//! Pictures are also painted in colours that nobody drew them in ([`super::colour`]). Everything random is drawn from
//! (seed, step, row), so a run that is resumed at any step sees the batches that an unbroken one would have seen.

use std::collections::HashMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, FloatDType, Int, Tensor, TensorData};
use fastrand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use volary_kernels::random::seeded;
use volary_multimodal::retrieval::{Recall, recall};
use volary_text::generate::LeftPadded;
use volary_text::tokenizer::Tokenizer;
use volary_vision::image::Rgb8;
use volary_vision::vq::VqModel;
use volary_weights::save;

use super::colour::{COLOURS, Colour, is_held_out, is_paintable};
use super::data::{Concept, Dataset, Freedom, Gallery, Language};
use super::evaluate::{percent, rows};
use super::run::{
    Computed, State, Store, TrainError, check, floats, gradients, learning_rate, mean_of_last, mix, progress,
};
use crate::error::Error;
use crate::folder::Folder;
use crate::llama::{self, Llama, LlamaConfig, LlamaInput};
use crate::pretrained::Clip;
use crate::token_drawing::{DrawSettings, PARTS, Plan, TokenDrawing, TokenDrawingConfig, folders};
use crate::vqmodel;

/// The styles that the codes are learned from: flat ones, alike enough that a mean of them is still a picture.
pub const STYLES: [&str; 3] = ["twemoji", "noto", "fluent_flat"];

/// The style that is drawn after captions: a caption that has one picture is learned sooner than one that has three.
pub const DRAWN_STYLE: &str = "twemoji";

/// The settings of one of the two runs; written beside its checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Optimizer steps in all. A run may go on with another number: the schedule is the new one from there on.
    pub steps: usize,
    /// Pictures per step.
    pub batch: usize,
    /// Parts of a batch, each computed on a thread of its own.
    pub parts: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// Decay of the weights.
    pub weight_decay: f32,
    /// How many of the pictures that may be painted in another colour are.
    pub painted: f32,
    /// How many of those whose sides do not matter are mirrored.
    pub mirrored: f32,
    /// How many of the codes that the decoder reads are others than those of the picture, drawn evenly: it is to go on with
    /// what its caption says where it has drawn something else.
    pub confused: f32,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Of initial weights, order, captions and colours.
    pub seed: u64,
}

impl Recipe {
    /// Of the codes.
    pub fn codes() -> Self {
        Self {
            steps: 3600,
            batch: 32,
            parts: 2,
            learning_rate: 2e-3,
            warmup: 100,
            weight_decay: 1e-4,
            painted: 0.25,
            mirrored: 0.5,
            confused: 0.0,
            checkpoint_every: 200,
            seed: 1,
        }
    }

    /// Of the decoder.
    pub fn decoder() -> Self {
        Self {
            steps: 4500,
            batch: 64,
            parts: 2,
            learning_rate: 2e-3,
            warmup: 200,
            weight_decay: 0.02,
            painted: 0.25,
            mirrored: 0.0,
            confused: 0.1,
            checkpoint_every: 200,
            seed: 1,
        }
    }

    fn learning_rate_at(&self, step: usize) -> f64 {
        learning_rate(self.learning_rate, step, self.warmup, self.steps)
    }

    fn is_same(&self, saved: Self) -> bool {
        Recipe { steps: self.steps, ..saved } == *self
    }
}

/// A picture of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shown {
    /// Whose.
    pub style: usize,
    /// Which.
    pub picture: usize,
    /// Which of [`COLOURS`] it is painted in.
    pub colour: Option<usize>,
    /// Left and right are exchanged.
    pub mirrored: bool,
}

impl Shown {
    fn draw(data: &Dataset, recipe: &Recipe, rng: &mut Rng) -> Self {
        let pictures: usize = data.styles.iter().map(|style| style.concepts.len()).sum();
        let (mut style, mut picture) = (0, rng.usize(0..pictures));
        while picture >= data.styles[style].concepts.len() {
            picture -= data.styles[style].concepts.len();
            style += 1;
        }
        let concept = &data.concepts[data.styles[style].concepts[picture]];
        let wished = rng.usize(0..COLOURS.len());
        let is_wished = rng.f32() < recipe.painted && is_paintable(concept) && !is_held_out(concept, wished);
        let mirrored = concept.freedom() == Freedom::Mirror && rng.f32() < recipe.mirrored;
        Self { style, picture, colour: is_wished.then_some(wished), mirrored }
    }

    /// Over white, `3 * size * size` values from -1 to 1, channel after channel.
    pub fn pixels(&self, data: &Dataset) -> Vec<f32> {
        let rgba = data.picture(self.style, self.picture);
        let painted = self.colour.map(|colour| COLOURS[colour].paint(rgba));
        let rgba = painted.as_deref().unwrap_or(rgba);
        let size = data.size;
        let value = |channel: usize, row: usize, column: usize| {
            let column = if self.mirrored { size - 1 - column } else { column };
            let pixel = &rgba[(row * size + column) * 4..][..4];
            let alpha = f32::from(pixel[3]) / 255.0;
            let over = f32::from(pixel[channel]) / 255.0 * alpha + 1.0 - alpha;
            2.0 * over - 1.0
        };
        let places = (0..3).flat_map(|channel| {
            (0..size).flat_map(move |row| (0..size).map(move |column| (channel, row, column)))
        });
        places.map(|(channel, row, column)| value(channel, row, column)).collect()
    }

    /// What it shows, in one language, or nothing now and then: that is what guidance leads away from.
    fn caption(&self, data: &Dataset, rng: &mut Rng) -> String {
        const NOTHING: f32 = 0.1;
        let concept = &data.concepts[data.styles[self.style].concepts[self.picture]];
        let language = Language::ALL[rng.usize(0..2)];
        if rng.f32() < NOTHING {
            return String::new();
        }
        match self.colour {
            Some(colour) => COLOURS[colour].caption(&concept.captions(language).name, language),
            None => concept.caption(language, rng),
        }
    }
}

/// The pictures of a step.
fn shown(data: &Dataset, recipe: &Recipe, step: usize) -> Vec<(Shown, Rng)> {
    let row = |row: usize| {
        let mut rng = Rng::with_seed(mix([recipe.seed, step as u64, row as u64]));
        (Shown::draw(data, recipe, &mut rng), rng)
    };
    (0..recipe.batch).map(row).collect()
}

/// Trains the codes, or goes on where the folder has a checkpoint.
///
/// The loss is the mean of absolute and squared differences, plus what pulls codes and encodings together (van den Oord et al.
/// 2017, <https://arxiv.org/abs/1711.00937>). Codes that nothing used for a while become encodings of the batch.
///
/// # Errors
/// If files of the run cannot be read or written, or the loss diverges.
pub fn train_codes(
    recipe: &Recipe,
    TokenDrawingConfig { vq: config, plan, .. }: &TokenDrawingConfig,
    data: &Dataset,
    folder: &Path,
    device: &Device,
) -> Result<VqModel, TrainError> {
    const REVIVED_EVERY: usize = 50;
    const COMMITMENT: f64 = 0.25;
    let device = &device.clone().autodiff();
    let optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(recipe.weight_decay).init();
    let store = Store { folder, title: "loss of the codes by step" };
    let model = seeded(recipe.seed, device, |device| config.init(device));
    let fresh = State { model, optimizer, losses: Vec::new() };
    let (mut state, _) = store.resume(fresh, |saved| recipe.is_same(saved))?;
    let bar = progress(recipe.steps);
    bar.set_position(state.losses.len() as u64);
    let mut uses = vec![0_u32; config.n_codes];
    for step in state.losses.len()..recipe.steps {
        let pixels: Vec<Vec<f32>> =
            shown(data, recipe, step).par_iter().map(|(shown, _)| shown.pixels(data)).collect();
        let parts: Vec<TensorData> = pixels
            .chunks(recipe.batch.div_ceil(recipe.parts))
            .map(|part| TensorData::new(part.concat(), [part.len(), 3, data.size, data.size]))
            .collect();
        let (loss, seen, gradients) =
            gradients(recipe.parts, &state.model, device, parts, |model, pixels| {
                let share = pixels.shape()[0] as f64 / recipe.batch as f64;
                let pixels = plan.fold(Tensor::from_data(pixels, device));
                let encoded = model.encode(pixels.clone());
                let quantized = model.quantize(encoded.clone());
                let off = model.decode(quantized.latents) - pixels;
                let loss = off.clone().square().mean()
                    + off.abs().mean() * 0.3
                    + quantized.codebook_loss
                    + quantized.commitment_loss * COMMITMENT;
                let codes: Vec<i64> = quantized.indices.into_data().convert::<i64>().iter::<i64>().collect();
                Ok(Computed { loss: loss * share, seen: (codes, encoded.detach()) })
            })?;
        check(step, loss)?;
        state.model = state.optimizer.step(recipe.learning_rate_at(step), state.model, gradients);
        state.losses.push(loss);
        seen.iter().flat_map(|(codes, _)| codes).for_each(|&code| uses[code as usize] += 1);
        let done = step + 1;
        if done % REVIVED_EVERY == 0 && done < recipe.steps / 2 {
            let encoded = seen.into_iter().map(|(_, encoded)| encoded.inner()).collect();
            revive(&mut state.model, &uses, Tensor::cat(encoded, 0), mix([recipe.seed, step as u64]));
            uses.fill(0);
        }
        bar.inc(1);
        bar.set_message(format!("loss {:.4}", mean_of_last(&state.losses, 50)));
        if done % recipe.checkpoint_every == 0 || done == recipe.steps {
            store.save(&state, recipe, &[])?;
        }
    }
    bar.finish();
    Ok(state.model.valid())
}

/// Codes that were used less than twice become encodings, `[pictures, width, rows, columns]`, at random places.
fn revive(model: &mut VqModel, uses: &[u32], encoded: Tensor<4>, seed: u64) {
    let [pictures, width, rows, columns] = encoded.dims();
    let encoded = encoded.permute([0, 2, 3, 1]).reshape([pictures * rows * columns, width]);
    let places = floats(encoded);
    let mut rng = Rng::with_seed(seed);
    model.codebook.weight = model.codebook.weight.clone().map(|table| {
        let device = table.device();
        let mut values = floats(table.inner());
        for (row, _) in values.chunks_exact_mut(width).zip(uses).filter(|(_, uses)| **uses < 2) {
            let place = rng.usize(0..places.len() / width);
            row.copy_from_slice(&places[place * width..][..width]);
        }
        Tensor::<2>::from_data(TensorData::new(values, [uses.len(), width]), &device).require_grad()
    });
}

/// A caption's tokens and the codes that follow it.
struct Line {
    caption: Vec<u32>,
    codes: Vec<u32>,
    /// The codes as they are read, but for the last one.
    read: Vec<u32>,
}

/// Some of these as the decoder reads them.
struct Lines {
    /// Captions, then all codes but the last.
    read: LeftPadded,
    /// All codes, `[rows * codes]`.
    codes: Tensor<1, Int>,
}

/// What a decoder learns from.
pub struct Drawn<'a> {
    /// The pictures.
    pub data: &'a Dataset,
    /// What makes codes of them.
    pub vq: &'a VqModel,
    /// Of captions.
    pub tokenizer: &'a Tokenizer,
    /// How the parts fit together.
    pub plan: &'a Plan,
}

/// Trains the decoder, or goes on where the folder has a checkpoint. The loss is the cross-entropy of the codes; captions are
/// only read.
///
/// # Errors
/// If files of the run cannot be read or written, a caption cannot be tokenized, or the loss diverges.
pub fn train_decoder(
    recipe: &Recipe,
    config: &LlamaConfig,
    drawn: &Drawn,
    folder: &Path,
    device: &Device,
) -> Result<Llama, TrainError> {
    let plain = device;
    let device = &device.clone().autodiff();
    let optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(recipe.weight_decay).init();
    let store = Store { folder, title: "cross-entropy of codes by step" };
    let model = seeded(recipe.seed, device, |device| config.init(device));
    let fresh = State { model, optimizer, losses: Vec::new() };
    let (mut state, _) = store.resume(fresh, |saved| recipe.is_same(saved))?;
    let mut known = HashMap::new();
    let bar = progress(recipe.steps);
    bar.set_position(state.losses.len() as u64);
    for step in state.losses.len()..recipe.steps {
        let rows = drawn.rows(recipe, step, &mut known, plain)?;
        let parts: Vec<&[Line]> = rows.chunks(recipe.batch.div_ceil(recipe.parts)).collect();
        let (loss, _, gradients) = gradients(recipe.parts, &state.model, device, parts, |model, rows| {
            let share = rows.len() as f64 / recipe.batch as f64;
            let lines = Lines::new(rows, drawn.plan, device);
            Ok(Computed { loss: lines.loss(model, drawn.plan) * share, seen: () })
        })?;
        check(step, loss)?;
        state.model = state.optimizer.step(recipe.learning_rate_at(step), state.model, gradients);
        state.losses.push(loss);
        let done = step + 1;
        bar.inc(1);
        bar.set_message(format!("loss {:.3}", mean_of_last(&state.losses, 50)));
        if done % recipe.checkpoint_every == 0 || done == recipe.steps {
            store.save(&state, recipe, &[])?;
        }
    }
    bar.finish();
    Ok(state.model.valid())
}

impl Drawn<'_> {
    /// Captions and codes of a step's pictures. Codes that were looked up once are `known`.
    fn rows(
        &self,
        recipe: &Recipe,
        step: usize,
        known: &mut HashMap<Shown, Vec<u32>>,
        device: &Device,
    ) -> Result<Vec<Line>, Error> {
        let mut shown = shown(self.data, recipe, step);
        let new: Vec<Shown> =
            shown.iter().map(|(shown, _)| *shown).filter(|shown| !known.contains_key(shown)).collect();
        if !new.is_empty() {
            let pixels: Vec<f32> = new.par_iter().flat_map_iter(|shown| shown.pixels(self.data)).collect();
            let size = self.data.size;
            let pixels = Tensor::from_data(TensorData::new(pixels, [new.len(), 3, size, size]), device);
            let codes = self.vq.quantize(self.vq.encode(self.plan.fold(pixels))).indices;
            let codes: Vec<u32> =
                codes.into_data().convert::<i64>().iter::<i64>().map(|code| code as u32).collect();
            let each = codes.chunks_exact(self.plan.len()).map(<[u32]>::to_vec);
            known.extend(new.into_iter().zip(each));
        }
        let row = |(shown, rng): &mut (Shown, Rng)| {
            let caption = self.plan.caption(self.tokenizer, &shown.caption(self.data, rng))?;
            let codes = known[shown].clone();
            let mut read = codes[..codes.len() - 1].to_vec();
            for code in &mut read {
                if rng.f32() < recipe.confused {
                    *code = rng.u32(0..self.plan.n_codes as u32);
                }
            }
            Ok(Line { caption: caption.ids, codes, read })
        };
        shown.iter_mut().map(row).collect()
    }
}

impl Lines {
    fn new(rows: &[Line], plan: &Plan, device: &Device) -> Self {
        let first = plan.first_code as u32;
        let read = rows.iter().map(|Line { caption, read, .. }| {
            caption.iter().copied().chain(read.iter().map(|code| code + first)).collect::<Vec<_>>()
        });
        let codes: Vec<i64> = rows.iter().flat_map(|row| &row.codes).map(|&code| i64::from(code)).collect();
        let count = codes.len();
        let codes = Tensor::from_data(TensorData::new(codes, [count]), device);
        Self { read: LeftPadded::new(&read.collect::<Vec<_>>(), device), codes }
    }

    /// `[1]`; scores are of codes alone, as when they are drawn.
    fn loss(self, model: &Llama, plan: &Plan) -> Tensor<1> {
        let Self { read, codes } = self;
        let longest = read.longest();
        let input =
            LlamaInput { ids: read.ids(), positions: read.positions(0, longest), mask: read.mask(longest) };
        let states = model.forward(input); // [rows, longest, d_model]
        let [rows, _, d_model] = states.dims();
        let states = states.narrow(1, longest - plan.len(), plan.len());
        let states = states.reshape([rows * plan.len(), d_model]);
        let table = model.tokens.weight.val().narrow(0, plan.first_code, plan.n_codes);
        let scores = log_softmax(states.matmul(table.transpose()), 1); // [rows * codes, n_codes]
        -scores.gather(1, codes.unsqueeze_dim(1)).mean()
    }
}

/// Writes a trained model as a folder, weights in f16, the rest as it is in a folder `like` it. The model card is written by
/// hand.
///
/// # Errors
/// If a file cannot be read or written.
pub fn export(vq: &VqModel, transformer: &Llama, like: &Folder, folder: &Path) -> Result<(), Error> {
    for part in PARTS {
        let part = folder.join(part);
        fs::create_dir_all(&part).map_err(Error::io(&part))?;
    }
    let f16 = Some(FloatDType::F16);
    let metadata = || Some(HashMap::from([("format".into(), "pt".into())]));
    let weights = folder.join("vqvae/diffusion_pytorch_model.safetensors");
    save(vq, &vqmodel::KEYS, f16, &weights, metadata())?;
    let weights = folder.join("transformer/model.safetensors");
    save(transformer, &llama::KEYS_WITHOUT_HEAD, f16, &weights, metadata())?;
    let copy = |from: &Folder, name: &str, to: &Path| {
        let file = to.join(name);
        fs::write(&file, from.read(name)?).map_err(Error::io(&file))
    };
    copy(like, "model_index.json", folder)?;
    for (from, part) in folders(like)?.iter().zip(PARTS) {
        for name in from.files()?.iter().filter(|name| name.ends_with(".json")) {
            copy(from, name, &folder.join(part))?;
        }
    }
    Ok(())
}

/// What is asked of a model that draws, and where the answers to it are among all candidates.
struct Exam {
    /// What is drawn.
    captions: Vec<String>,
    /// What drawings are told apart by.
    candidates: Vec<String>,
    /// Which candidate each caption is.
    targets: Vec<usize>,
    /// The same things as nobody drew them for the model.
    real: Vec<Rgb8>,
}

/// How often a judge finds what was asked for in a drawing, and in a real picture of it.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// Names that were trained on, or colours of things that were not.
    pub what: &'static str,
    /// The language of the captions.
    pub language: Language,
    /// How many were drawn.
    pub drawings: usize,
    /// Among how many captions.
    pub candidates: usize,
    /// Of drawings.
    pub drawn: Recall,
    /// Of held-out pictures.
    pub real: Recall,
}

/// What a model drew, and how a judge found it.
pub struct Judged {
    /// Names in both languages, then new colours in both.
    pub scores: Vec<Score>,
    /// In the same order.
    pub drawings: Vec<Rgb8>,
}

/// Every `stride`-th of the development pictures' names, and the same of things in colours that no drawing of them had in
/// training: drawn, and judged by `judge`.
///
/// # Errors
/// If captions or pictures cannot be encoded.
pub fn evaluate(
    model: &TokenDrawing,
    judge: &Clip,
    development: &Gallery,
    stride: usize,
    settings: &DrawSettings,
) -> Result<Judged, Error> {
    let (mut scores, mut drawings) = (Vec::new(), Vec::new());
    for (what, exam) in
        [("names", names as fn(&Gallery, Language, usize) -> Exam), ("new colours", new_colours)]
    {
        for language in Language::ALL {
            let exam = exam(development, language, stride);
            let drawn = model.draw(&exam.captions, "", settings, &mut |_| ControlFlow::Continue(()))?;
            let drawn: Vec<Rgb8> = drawn.into_iter().flatten().collect();
            let candidates = judge.encode_texts(&exam.candidates)?;
            let found = |pictures: &[Rgb8]| -> Result<Recall, Error> {
                let pictures = judge.encode_images(pictures)?;
                Ok(recall(rows(&pictures), rows(&candidates), &exam.targets, judge.d_embed()))
            };
            scores.push(Score {
                what,
                language,
                drawings: drawn.len(),
                candidates: exam.candidates.len(),
                drawn: found(&drawn)?,
                real: found(&exam.real)?,
            });
            drawings.extend(drawn);
        }
    }
    Ok(Judged { scores, drawings })
}

/// Among all names.
fn names(development: &Gallery, language: Language, stride: usize) -> Exam {
    let name = |concept: &Concept| concept.captions(language).name.clone();
    let candidates: Vec<String> = development.concepts.iter().map(name).collect();
    let chosen: Vec<usize> = (0..development.pictures.len()).step_by(stride).collect();
    let targets: Vec<usize> = chosen.iter().map(|&picture| development.targets[picture]).collect();
    Exam {
        captions: targets.iter().map(|&concept| candidates[concept].clone()).collect(),
        real: chosen.iter().map(|&picture| development.pictures[picture].clone()).collect(),
        candidates,
        targets,
    }
}

/// One new colour of each thing that has one, among all colours of all these things.
fn new_colours(development: &Gallery, language: Language, stride: usize) -> Exam {
    let mut exam = Exam { captions: vec![], candidates: vec![], targets: vec![], real: vec![] };
    for picture in 0..development.pictures.len() {
        let concept = &development.concepts[development.targets[picture]];
        let new: Vec<usize> = (0..COLOURS.len()).filter(|&colour| is_held_out(concept, colour)).collect();
        let Some(&colour) = new.first().filter(|_| is_paintable(concept) && picture % stride == 0) else {
            continue;
        };
        let caption = |colour: &Colour| colour.caption(&concept.captions(language).name, language);
        exam.targets.push(exam.candidates.len() + colour);
        exam.captions.push(caption(&COLOURS[colour]));
        exam.candidates.extend(COLOURS.iter().map(caption));
        exam.real.push(COLOURS[colour].over_white(&development.pictures[picture]));
    }
    exam
}

/// Pictures of one size, in rows of 20; the rest of the last row is white.
///
/// # Errors
/// If there is none.
pub fn sheet(pictures: &[Rgb8]) -> Result<Rgb8, Error> {
    const COLUMNS: usize = 20;
    let mut pictures = pictures.to_vec();
    if let Some(first) = pictures.first() {
        let (width, height) = (first.width(), first.height());
        let blank = Rgb8::new(width, height, vec![255; 3 * width * height])?;
        pictures.resize(pictures.len().next_multiple_of(COLUMNS), blank);
    }
    Ok(Rgb8::sheet(&pictures, COLUMNS)?)
}

/// The scores as lines of text.
pub fn table(scores: &[Score]) -> String {
    let head = ["what", "language", "drawings", "candidates", "drawn R@1/5/10", "real R@1/5/10"];
    let [what, language, drawings, candidates, drawn, real] = head;
    let mut lines = format!("{what:<12} {language:<8} {drawings:>8} {candidates:>10}  {drawn:<21} {real}\n");
    for score in scores {
        let Score { what, drawings, candidates, drawn, real, .. } = score;
        let (language, drawn, real) = (score.language.name(), percent(drawn), percent(real));
        lines += &format!("{what:<12} {language:<8} {drawings:>8} {candidates:>10}  {drawn:<21} {real}\n");
    }
    lines
}
