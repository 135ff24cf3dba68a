//! Contrastive training of a bilingual CLIP: AdamW, warm-up and cosine, InfoNCE over captions,
//! cross-entropy of pictures against a bank of all names, and of captions against a bank of all pictures.
//!
//! Both banks matter: without the second the captions only tell apart what happens to meet in a batch, and
//! names of like things end up in one place. A batch may be larger than memory: it is then computed in chunks.
//!
//! Everything random is drawn from (seed, step, row), so a run that is resumed at any step sees the
//! batches that an unbroken one would have seen.

use std::fs;
use std::path::Path;
use std::sync::mpsc;

use burn::module::{Module, ParamGroup};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use fastrand::Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use volary_kernels::random::seeded;
use volary_multimodal::contrastive::{CachedInfoNce, bank_cross_entropy, info_nce};
use volary_text::tokenizer::{Tokenizer, TokenizerError};
use volary_vision::masking::{Kept, PatchDropout};
use volary_vision::preprocess::Preprocessor;

use super::augment::augment;
use super::data::{Dataset, Gallery, Language};
use super::evaluate::{evaluate, table};
use super::run::{
    Computed, State, Store, TrainError, check, file_error, floats, gradients, learning_rate, mean_of_last,
    mix, on_threads, progress,
};
use crate::clip::{ClipConfig, ClipModel, Layout, Loaded, VisionTower, normalise};
use crate::pretrained::Clip;

/// The settings of a run; written beside its checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Optimizer steps in all. A run may go on with another number: the schedule is the new one from there on.
    pub steps: usize,
    /// Pairs per step.
    pub batch: usize,
    /// Parts that a batch is computed in, their gradients added up; the in-batch loss sees one part. Of chunks, so many are
    /// computed beside each other.
    pub accumulate: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Steps of linear warm-up.
    pub warmup: usize,
    /// Decay of matrices and convolutions; norms, biases and the temperature are not decayed.
    pub weight_decay: f32,
    /// Label smoothing against the banks.
    pub smoothing: f64,
    /// The in-batch loss's weight beside the banks'.
    pub in_batch: f64,
    /// Steps until the bank of all names has been encoded anew.
    pub bank_period: usize,
    /// How far and how often augmented pictures stray from the drawn ones, between 0 and 1.
    pub augmentation: f32,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Steps between evaluations on the development pictures.
    pub evaluate_every: usize,
    /// Of initial weights, order, captions and augmentation.
    pub seed: u64,
    /// Pairs that are computed at once on a thread; the in-batch loss then sees the whole batch, by gradient caching. Batch
    /// norms take the statistics of a chunk.
    #[serde(default)]
    pub chunk: Option<usize>,
    /// The share of its patches that a vision transformer in training does without.
    #[serde(default)]
    pub patch_dropout: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            steps: 4600,
            batch: 128,
            accumulate: 2,
            learning_rate: 1.5e-3,
            warmup: 250,
            weight_decay: 0.05,
            smoothing: 0.1,
            in_batch: 0.5,
            bank_period: 32,
            augmentation: 0.5,
            checkpoint_every: 200,
            evaluate_every: 400,
            seed: 1,
            chunk: None,
            patch_dropout: 0.0,
        }
    }
}

impl Recipe {
    fn learning_rate_at(&self, step: usize) -> f64 {
        learning_rate(self.learning_rate, step, self.warmup, self.steps)
    }
}

/// A trained model and its loss per step.
pub struct Outcome {
    /// Without autodiff.
    pub model: ClipModel,
    /// The same with all that it needs.
    pub clip: Clip,
    /// One loss per step.
    pub losses: Vec<f32>,
}

/// A part of a step's batch, ready for the device.
struct Part {
    pixels: TensorData,
    /// Patches that are seen; all of them without.
    kept: Option<Kept>,
    captions: Captions,
    concepts: TensorData,
}

/// The embeddings of a part.
struct Embedded {
    /// `[pictures, d_embed]`.
    images: Tensor<2>,
    /// Of the captions of each language, `[pictures, d_embed]`.
    texts: [Tensor<2>; 2],
}

impl Part {
    fn len(&self) -> usize {
        self.concepts.num_elements()
    }

    fn encode(&self, model: &ClipModel, device: &Device) -> Embedded {
        let pixels = Tensor::from_data(self.pixels.clone(), device);
        let images = match (&model.vision, &self.kept) {
            (VisionTower::Vit(vit), Some(kept)) => normalise(vit.forward_kept(pixels, kept).embedding),
            _ => model.encode_images(pixels),
        };
        let texts = self.captions.encode(model, device);
        let of_language = |language| texts.clone().narrow(0, language * self.len(), self.len());
        Embedded { images, texts: [of_language(0), of_language(1)] }
    }
}

/// A caption in each language for every picture, English ones first, sorted by length: what is padded is
/// computed.
struct Captions {
    /// Token ids of like lengths, `[captions, longest]` each.
    groups: Vec<TensorData>,
    /// Where each caption went.
    places: TensorData,
}

impl Captions {
    const GROUPS: usize = 4;

    fn new(rows: &[Vec<i64>], pad_id: i64) -> Self {
        let mut order: Vec<usize> = (0..rows.len()).collect();
        order.sort_by_key(|&row| rows[row].len());
        let mut places = vec![0_i64; rows.len()];
        order.iter().enumerate().for_each(|(place, &row)| places[row] = place as i64);
        let group = |members: &[usize]| {
            let members: Vec<&[i64]> = members.iter().map(|&row| &rows[row][..]).collect();
            pad(&members, pad_id)
        };
        let groups = order.chunks(rows.len().div_ceil(Self::GROUPS)).map(group).collect();
        Self { groups, places: TensorData::new(places, [rows.len()]) }
    }

    /// `[captions, d_embed]`, as they were given.
    fn encode(&self, model: &ClipModel, device: &Device) -> Tensor<2> {
        let encode = |ids: &TensorData| model.encode_texts(Tensor::from_data(ids.clone(), device));
        let sorted = Tensor::cat(self.groups.iter().map(encode).collect(), 0);
        sorted.select(0, Tensor::<1, Int>::from_data(self.places.clone(), device))
    }
}

/// All that a run is made of.
pub struct Job<'a> {
    /// The settings.
    pub recipe: &'a Recipe,
    /// The model's shape.
    pub config: &'a ClipConfig,
    /// Weights to start from; random ones without.
    pub init: Option<&'a ClipModel>,
    /// What is learned.
    pub data: &'a Dataset,
    /// What the run is watched on; never trained on.
    pub development: &'a [Gallery],
    /// For the captions.
    pub tokenizer: &'a Tokenizer,
    /// For the development pictures.
    pub preprocessor: &'a Preprocessor,
    /// Where the checkpoint and the loss curve go.
    pub folder: &'a Path,
    /// Stops early, after so many steps of all; the schedule is that of the whole run.
    pub until: usize,
    /// Where to compute.
    pub device: &'a Device,
}

/// Trains, or goes on where the job's folder has a checkpoint.
///
/// # Errors
/// If files of the run cannot be read or written, the loss diverges, or patches should be left out of a convolutional tower.
pub fn train(job: &Job) -> Result<Outcome, TrainError> {
    let &Job { recipe, data, tokenizer, folder, .. } = job;
    let patches = job.config.patches();
    if patches.is_none() && recipe.patch_dropout > 0.0 {
        return Err(TrainError::NoPatches);
    }
    fs::create_dir_all(folder).map_err(|error| file_error(folder, error))?;
    let device = job.device.clone().autodiff();
    let bank = Bank::tokenize(data, tokenizer)?;
    let mut run = Run::begin(job, &bank, &device)?;
    let until = job.until.min(recipe.steps);
    let bar = progress(recipe.steps);
    bar.set_position(run.state.losses.len() as u64);
    std::thread::scope(|scope| {
        // Two batches ahead: augmentation runs beside the model.
        let (send, receive) = mpsc::sync_channel(2);
        let first = run.state.losses.len();
        scope.spawn(move || {
            let mut order = Order::new(data, recipe.seed);
            for step in first..until {
                let batch = parts(recipe, data, tokenizer, patches, &mut order, step);
                if send.send(batch).is_err() {
                    return;
                }
            }
        });
        for step in first..until {
            let batch = receive.recv().expect("the loader sends one batch per step")?;
            let loss = run.step(recipe, &bank, step, batch, &device)?;
            check(step, loss)?;
            run.state.losses.push(loss);
            bar.inc(1);
            bar.set_message(format!("loss {:.3}", mean_of_last(&run.state.losses, 50)));
            let done = step + 1;
            if done % recipe.checkpoint_every == 0 || done == until {
                run.save(recipe, folder)?;
            }
            if done % recipe.evaluate_every == 0 || done == until {
                let clip = job.clip(run.state.model.valid());
                for gallery in job.development {
                    let scores = table(&evaluate(&clip, gallery)?);
                    let loss = mean_of_last(&run.state.losses, 200);
                    bar.suspend(|| eprintln!("step {done}, loss {loss:.3}\n{scores}"));
                }
            }
        }
        Ok::<(), TrainError>(())
    })?;
    bar.finish();
    let model = run.state.model.valid();
    Ok(Outcome { clip: job.clip(model.clone()), model, losses: run.state.losses })
}

impl Job<'_> {
    fn clip(&self, model: ClipModel) -> Clip {
        let (tokenizer, preprocessor) = (self.tokenizer.clone(), self.preprocessor.clone());
        let towers = Loaded { model, config: self.config.clone(), layout: Layout::OpenClip };
        Clip { towers: Box::new(towers), tokenizer, preprocessor, device: self.device.clone() }
    }
}

/// Everything that changes from step to step.
struct Run {
    state: State<ClipModel>,
    /// Names' embeddings per language, and the running mean of each concept's pictures, `[concepts, d_embed]`.
    banks: Banks,
}

/// What pictures and captions are told apart from; not trained, without autodiff.
struct Banks {
    /// Per language, unit vectors.
    names: [Tensor<2>; 2],
    /// Unit vectors once a concept's picture was seen, zeros before.
    pictures: Tensor<2>,
}

impl Banks {
    /// The share of a new picture in its concept's mean.
    const MOMENTUM: f32 = 0.2;

    /// Moves the means towards the embeddings of a batch's pictures.
    fn see(&mut self, seen: Vec<(i64, Vec<f32>)>) {
        let device = self.pictures.device();
        let [concepts, d_embed] = self.pictures.dims();
        let mut rows = floats(self.pictures.clone());
        for (concept, picture) in seen {
            let row = &mut rows[concept as usize * d_embed..][..d_embed];
            let is_new = row.iter().all(|value| *value == 0.0);
            let momentum = if is_new { 1.0 } else { Self::MOMENTUM };
            row.iter_mut().zip(picture).for_each(|(mean, new)| *mean += momentum * (new - *mean));
            let length = row.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
            row.iter_mut().for_each(|value| *value /= length);
        }
        self.pictures = Tensor::from_data(TensorData::new(rows, [concepts, d_embed]), &device);
    }
}

/// Token ids of every name, per language.
struct Bank {
    ids: [Vec<Vec<i64>>; 2],
    pad: i64,
}

impl Bank {
    fn tokenize(data: &Dataset, tokenizer: &Tokenizer) -> Result<Self, TokenizerError> {
        let names = |language| -> Result<Vec<Vec<i64>>, TokenizerError> {
            data.concepts.iter().map(|concept| ids(tokenizer, &concept.captions(language).name)).collect()
        };
        let ids = [names(Language::En)?, names(Language::Zh)?];
        Ok(Self { ids, pad: pad_id(tokenizer) })
    }

    /// Encodes names `from..to` of one language, `[to - from, d_embed]`, without autodiff.
    fn encode(
        &self,
        model: &ClipModel,
        language: usize,
        from: usize,
        to: usize,
        device: &Device,
    ) -> Tensor<2> {
        Captions::new(&self.ids[language][from..to], self.pad).encode(model, device)
    }
}

impl Run {
    fn begin(job: &Job, bank: &Bank, device: &Device) -> Result<Self, TrainError> {
        let &Job { recipe, folder, .. } = job;
        let model = match job.init {
            Some(weights) => weights.clone().fork(device).train(),
            None => seeded(recipe.seed, device, |device| job.config.init(device)),
        };
        let decayed =
            AdamWConfig::new().with_beta_2(0.98).with_epsilon(1e-6).with_weight_decay(recipe.weight_decay);
        let plain = decayed.clone().with_weight_decay(0.0).build();
        let undecayed = ParamGroup::from_any_regexes(vec!["bias$", "norm", r"bn\d?\.", "logit_scale"])
            .expect("the patterns are valid");
        let optimizer = decayed.init().with_group(undecayed, plain, None);
        let plain_device = device.clone().inner();
        let is_same = |saved| (Recipe { steps: recipe.steps, ..saved }) == *recipe;
        let fresh = State { model, optimizer, losses: Vec::new() };
        let (state, checkpoint) = store(folder).resume(fresh, is_same)?;
        let Some(checkpoint) = checkpoint else {
            let inner = state.model.valid();
            let count = bank.ids[0].len();
            let encode = |language| {
                let chunks = (0..count)
                    .step_by(256)
                    .map(|from| bank.encode(&inner, language, from, count.min(from + 256), &plain_device));
                Tensor::cat(chunks.collect(), 0)
            };
            let names = [encode(0), encode(1)];
            let pictures = Tensor::zeros(names[0].dims(), &plain_device);
            return Ok(Self { banks: Banks { names, pictures }, state });
        };
        let file = checkpoint.join(BANKS);
        let bytes = fs::read(&file).map_err(|error| file_error(&file, error))?;
        let saved: SavedBank = serde_json::from_slice(&bytes).map_err(|error| file_error(&file, error))?;
        let width = saved.d_embed;
        let [english, chinese, pictures] = saved.rows.map(|rows| {
            let values: Vec<f32> = rows.into_iter().map(f32::from_bits).collect();
            let count = values.len() / width;
            Tensor::from_data(TensorData::new(values, [count, width]), &plain_device)
        });
        let banks = Banks { names: [english, chinese], pictures };
        Ok(Self { state, banks })
    }

    fn step(
        &mut self,
        recipe: &Recipe,
        bank: &Bank,
        step: usize,
        batch: Vec<Part>,
        device: &Device,
    ) -> Result<f32, TrainError> {
        self.refresh(recipe, bank, step, device);
        let whole = recipe.chunk.map(|_| whole(recipe, &self.state.model, &batch, device));
        let (model, banks) = (&self.state.model, &self.banks);
        let (total, seen, gradients) =
            gradients(recipe.accumulate, model, device, placed(&batch), |model, (first, part)| {
                let (loss, seen) = part_loss(recipe, model, banks, whole.as_ref(), first, part, device);
                Ok(Computed { loss, seen })
            })?;
        seen.into_iter().for_each(|seen| self.banks.see(seen));
        let rate = recipe.learning_rate_at(step);
        self.state.model = self.state.optimizer.step(rate, self.state.model.clone(), gradients);
        Ok(total)
    }

    /// Encodes the next share of the names anew, in both languages.
    fn refresh(&mut self, recipe: &Recipe, bank: &Bank, step: usize, device: &Device) {
        let count = bank.ids[0].len();
        let share = count.div_ceil(recipe.bank_period);
        let from = (step % recipe.bank_period) * share;
        let to = count.min(from + share);
        if from >= to {
            return;
        }
        let model = self.state.model.valid();
        let device = device.clone().inner();
        for language in 0..2 {
            let fresh = bank.encode(&model, language, from, to, &device);
            let d_embed = fresh.dims()[1];
            let names = &mut self.banks.names[language];
            *names = names.clone().slice_assign([from..to, 0..d_embed], fresh);
        }
    }

    fn save(&self, recipe: &Recipe, folder: &Path) -> Result<(), TrainError> {
        let Banks { names: [english, chinese], pictures } = &self.banks;
        let rows = [english, chinese, pictures]
            .map(|bank| -> Vec<u32> { floats(bank.clone()).into_iter().map(f32::to_bits).collect() });
        let saved = SavedBank { d_embed: pictures.dims()[1], rows };
        let banks = serde_json::to_vec(&saved).expect("numbers serialise");
        store(folder).save(&self.state, recipe, &[(BANKS, &banks)])
    }
}

/// The concept and the embedding of each picture of a part.
type Seen = Vec<(i64, Vec<f32>)>;

/// Each part of a batch, and which of the batch's pairs is its first.
fn placed(batch: &[Part]) -> Vec<(usize, &Part)> {
    let firsts = batch.iter().scan(0, |next, part| {
        let first = *next;
        *next += part.len();
        Some(first)
    });
    firsts.zip(batch).collect()
}

/// What the pairs of a whole batch cost each other, per language.
fn whole(recipe: &Recipe, model: &ClipModel, batch: &[Part], device: &Device) -> [CachedInfoNce; 2] {
    // as in training: batch norms take a chunk's statistics both times
    let embedded = on_threads(recipe.accumulate, model, device, batch.iter().collect(), |model, part| {
        let Embedded { images, texts } = part.encode(model, device);
        Embedded { images: images.inner(), texts: texts.map(Tensor::inner) }
    });
    let (model, device) = (model.valid(), &device.clone().inner());
    let cat = |of: fn(&Embedded) -> &Tensor<2>| Tensor::cat(embedded.iter().map(of).cloned().collect(), 0);
    let concepts: Vec<i64> = batch.iter().flat_map(|part| part.concepts.iter::<i64>()).collect();
    let concepts = Tensor::<1, Int>::from_data(&concepts[..], device);
    let images = cat(|part| &part.images);
    let of_language = |texts| CachedInfoNce::new(images.clone(), texts, factor(&model), concepts.clone());
    [of_language(cat(|part| &part.texts[0])), of_language(cat(|part| &part.texts[1]))]
}

/// On cosine similarities, `[1]`.
fn factor(model: &ClipModel) -> Tensor<1> {
    model.logit_scale.val().clamp(0.0, 4.6).exp()
}

/// The share in a batch's loss of one part, `[1]`: its pictures against all names and its captions against all pictures'
/// means, in both languages, and its pairs, from the batch's `first` on, against each other or against the whole batch's.
fn part_loss(
    recipe: &Recipe,
    model: &ClipModel,
    banks: &Banks,
    whole: Option<&[CachedInfoNce; 2]>,
    first: usize,
    part: &Part,
    device: &Device,
) -> (Tensor<1>, Seen) {
    let Embedded { images, texts } = part.encode(model, device);
    let concepts = Tensor::<1, Int>::from_data(part.concepts.clone(), device);
    let (scale, share) = (factor(model), part.len() as f64 / recipe.batch as f64);
    let against = |queries: &Tensor<2>, bank: &Tensor<2>| {
        let bank = Tensor::from_inner(bank.clone());
        bank_cross_entropy(queries.clone(), bank, scale.clone(), concepts.clone(), recipe.smoothing)
    };
    let of_language = |language: usize| {
        let texts = texts[language].clone();
        let banks = against(&images, &banks.names[language]) + against(&texts, &banks.pictures);
        let pairs = match whole {
            None => info_nce(images.clone(), texts, scale.clone(), concepts.clone()) * share,
            Some(whole) => whole[language].chunk(first, images.clone(), texts, scale.clone()),
        };
        banks * share + pairs * recipe.in_batch
    };
    let loss = (of_language(0) + of_language(1)) * 0.5;
    let d_embed = images.dims()[1];
    let embedded = floats(images.detach());
    let shown = part.concepts.iter::<i64>();
    let seen = shown.zip(embedded.chunks_exact(d_embed).map(<[f32]>::to_vec)).collect();
    (loss, seen)
}

/// The banks' file in a checkpoint.
const BANKS: &str = "bank.json";

fn store(folder: &Path) -> Store<'_> {
    Store { folder, title: "training loss by step" }
}

/// Floats by their bits: what is read back is what was written.
#[derive(Serialize, Deserialize)]
struct SavedBank {
    d_embed: usize,
    /// English names, Chinese names, pictures.
    rows: [Vec<u32>; 3],
}

/// Pictures in a new order every epoch.
struct Order {
    pictures: Vec<(usize, usize)>,
    epoch: Option<usize>,
    shuffled: Vec<(usize, usize)>,
    seed: u64,
}

impl Order {
    fn new(data: &Dataset, seed: u64) -> Self {
        Self { pictures: data.pictures(), epoch: None, shuffled: Vec::new(), seed }
    }

    fn at(&mut self, index: usize) -> (usize, usize) {
        let epoch = index / self.pictures.len();
        if self.epoch != Some(epoch) {
            self.shuffled = self.pictures.clone();
            Rng::with_seed(mix([self.seed, epoch as u64, u64::MAX])).shuffle(&mut self.shuffled);
            self.epoch = Some(epoch);
        }
        self.shuffled[index % self.pictures.len()]
    }
}

fn parts(
    recipe: &Recipe,
    data: &Dataset,
    tokenizer: &Tokenizer,
    patches: Option<usize>,
    order: &mut Order,
    step: usize,
) -> Result<Vec<Part>, TokenizerError> {
    let chosen: Vec<(usize, usize)> =
        (0..recipe.batch).map(|row| order.at(step * recipe.batch + row)).collect();
    let rows: Vec<(Vec<f32>, [Vec<i64>; 2], i64)> = chosen
        .par_iter()
        .enumerate()
        .map(|(row, &(style, picture))| {
            let mut rng = Rng::with_seed(mix([recipe.seed, step as u64, row as u64]));
            let index = data.styles[style].concepts[picture];
            let concept = &data.concepts[index];
            let picture = data.picture(style, picture);
            let pixels = augment(picture, data.size, concept.freedom(), recipe.augmentation, &mut rng);
            let mut caption = |language| ids(tokenizer, &concept.caption(language, &mut rng));
            let captions = [caption(Language::En)?, caption(Language::Zh)?];
            Ok((centred(pixels), captions, index as i64))
        })
        .collect::<Result<_, TokenizerError>>()?;
    let length = recipe.chunk.unwrap_or(recipe.batch.div_ceil(recipe.accumulate.max(1))).max(1);
    // drawn for the batch, so that it is the same in chunks of any size
    let mut rng = Rng::with_seed(mix([recipe.seed, step as u64, recipe.batch as u64]));
    let dropout = PatchDropout { rate: recipe.patch_dropout };
    let kept = patches.filter(|_| recipe.patch_dropout > 0.0);
    let kept = kept.map(|patches| dropout.draw(recipe.batch, patches, &mut rng));
    Ok(rows
        .chunks(length)
        .enumerate()
        .map(|(part, rows)| {
            let pixels: Vec<f32> = rows.iter().flat_map(|row| row.0.iter().copied()).collect();
            let captions: Vec<Vec<i64>> =
                (0..2).flat_map(|language| rows.iter().map(move |row| row.1[language].clone())).collect();
            let concepts: Vec<i64> = rows.iter().map(|row| row.2).collect();
            Part {
                pixels: TensorData::new(pixels, [rows.len(), 3, data.size, data.size]),
                kept: kept.as_ref().map(|kept| kept.of(part * length, rows.len())),
                captions: Captions::new(&captions, pad_id(tokenizer)),
                concepts: TensorData::new(concepts, [rows.len()]),
            }
        })
        .collect())
}

/// To -1..1, the mean and deviation 0.5 of the model's preprocessor.
fn centred(mut pixels: Vec<f32>) -> Vec<f32> {
    pixels.iter_mut().for_each(|value| *value = (*value - 0.5) / 0.5);
    pixels
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<i64>, TokenizerError> {
    let limit = tokenizer.model_max_length().unwrap_or(usize::MAX);
    let mut ids: Vec<i64> = tokenizer.encode(text)?.ids.into_iter().map(i64::from).collect();
    if ids.len() > limit {
        let end = ids[ids.len() - 1];
        ids.truncate(limit);
        ids[limit - 1] = end;
    }
    Ok(ids)
}

fn pad_id(tokenizer: &Tokenizer) -> i64 {
    tokenizer.pad_id().map_or(0, i64::from)
}

/// Rows of equal length, `[rows, longest]`.
fn pad(rows: &[&[i64]], pad: i64) -> TensorData {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let padded: Vec<i64> = rows
        .iter()
        .flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(pad, longest - row.len())))
        .collect();
    TensorData::new(padded, [rows.len(), longest])
}
