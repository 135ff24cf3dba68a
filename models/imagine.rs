//! Pictures from texts: a loaded pipeline, what can be asked of it, and what it did.

use std::ops::ControlFlow;
use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use volary_multimodal::imagine::{
    Codec, Draw, Guidance, Kept, Long, Marks, Progress, TextEncoder, Walk, noise,
};
use volary_text::tokenizer::Tokenizer;
use volary_vision::diffusion::{Bound, Method, NoiseScheduler, Sampler, Scheduler};
use volary_vision::image::Rgb8;
use volary_weights::{LoadOptions, open};

use crate::config::Config;
use crate::embeddings::Embeddings;
use crate::error::Error;
use crate::folder::Folder;
use crate::ldm;
use crate::lora::{self, Lora};
use crate::scheduler;
use crate::stable_diffusion::{Answers, Latents, Parts, Reader, StableDiffusion, StableDiffusionConfig};

/// What is loaded beside a pipeline.
#[derive(Clone, Debug, Default)]
pub struct Extras {
    /// A single file of Stable Diffusion 1 with the weights of all parts, under the names of its authors ([`crate::ldm`]), in
    /// place of those in the parts' folders, which need hold configurations and the tokenizer only.
    pub single_file: Option<PathBuf>,
    /// Files of low-rank changes of the weights, and how much each counts: 1 as it was trained.
    pub loras: Vec<(PathBuf, f64)>,
    /// Files of learned tokens (textual inversion).
    pub embeddings: Vec<PathBuf>,
}

/// A picture to be imagined.
///
/// ```
/// let asked = volary::Imagine { prompt: "一只戴帽子的猫".into(), seed: 7, ..Default::default() };
/// assert_eq!((asked.steps, asked.guidance), (50, 7.5));
/// ```
#[derive(Clone, Debug)]
pub struct Imagine {
    /// What it shows. Nothing is allowed: then it shows anything.
    pub prompt: String,
    /// What it does not show.
    pub negative: String,
    /// Height and width in pixels, multiples of what a latent's side stands for (8); the pipeline's own without.
    pub size: Option<[usize; 2]>,
    /// How many steps are made.
    pub steps: usize,
    /// How strictly the prompt is followed; up to 1 `negative` has no effect, and each step takes half the time.
    pub guidance: f64,
    /// The first picture's; the next one has the next.
    pub seed: u64,
    /// How many pictures.
    pub count: usize,
    /// A scheduler's class in diffusers, in place of the pipeline's own.
    pub scheduler: Option<String>,
    /// How much noise DDIM draws at each step, 0 to 1.
    pub eta: f64,
    /// How freely codes are drawn, 0 for the likeliest; the model's own without. Only models that draw by tokens have one.
    pub temperature: Option<f64>,
    /// A picture that is changed.
    pub init: Option<Init>,
    /// What becomes of a prompt that is longer than the text encoder reads.
    pub long: Long,
    /// How the autoencoder sees a picture; without it in tiles where it has more than 1024 x 1024 pixels.
    pub coding: Option<Coding>,
}

/// How an autoencoder sees a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// As it is: 512 x 512 pixels take about a gigabyte, four times as many four of them.
    Whole,
    /// In overlapping tiles: the memory of one, and not quite the same picture.
    Tiled,
}

impl Coding {
    /// What is usual for a picture of so many pixels.
    fn usual([height, width]: [usize; 2]) -> Self {
        if height.saturating_mul(width) > WHOLE { Coding::Tiled } else { Coding::Whole }
    }
}

/// A picture that is changed.
#[derive(Clone, Debug)]
pub struct Init {
    /// Of the size that is asked for.
    pub picture: Rgb8,
    /// How much of the way from noise is walked anew: 0 leaves the picture, 1 forgets it.
    pub strength: f64,
    /// White where something new is painted and black where the picture stays; of the picture's size.
    pub mask: Option<Rgb8>,
}

/// Pictures of more pixels are cut into tiles, if nothing else is said.
const WHOLE: usize = 1024 * 1024;
/// So many rows of a long prompt are read, if nothing else is said.
const ROWS: usize = 8;
/// More steps or pictures than anyone waits for.
const MOST: usize = 10_000;

impl Default for Imagine {
    fn default() -> Self {
        Self {
            prompt: String::new(),
            negative: String::new(),
            size: None,
            steps: 50,
            guidance: 7.5,
            seed: 0,
            count: 1,
            scheduler: None,
            eta: 0.0,
            temperature: None,
            init: None,
            long: Long::Rows(ROWS),
            coding: None,
        }
    }
}

impl Imagine {
    /// Everything that is wrong with it, whatever the model.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |is_right: bool, problem: String| {
            if !is_right {
                problems.push(problem);
            }
        };
        let Self { steps, guidance, eta, temperature, count, .. } = self;
        check(*steps > 0, "0 steps: expected 1 or more".into());
        check((1..=MOST).contains(count), format!("{count} pictures: expected 1 to {MOST}"));
        check(guidance.is_finite(), format!("a guidance of {guidance}"));
        check((0.0..=1.0).contains(eta), format!("an eta of {eta}: expected 0 to 1"));
        if let Some(temperature) = temperature {
            let is_right = temperature.is_finite() && *temperature >= 0.0;
            check(is_right, format!("a temperature of {temperature}: expected 0 or more"));
        }
        if let Some(Init { picture, strength, mask }) = &self.init {
            let found @ [height, width] = [picture.height(), picture.width()];
            let [asked_height, asked_width] = self.size.unwrap_or(found);
            let same = [asked_height, asked_width] == found;
            check(
                same,
                format!("the picture has {width}x{height} pixels, asked are {asked_width}x{asked_height}"),
            );
            if let Some(mask) = mask {
                let [mask_height, mask_width] = [mask.height(), mask.width()];
                let same = [mask_height, mask_width] == found;
                check(
                    same,
                    format!("the mask has {mask_width}x{mask_height} pixels, the picture {width}x{height}"),
                );
            }
            problems.extend(strength_problem(*strength));
        }
        problems
    }
}

/// What is wrong with a strength, if anything.
pub fn strength_problem(strength: f64) -> Option<String> {
    let is_right = (0.0..=1.0).contains(&strength);
    (!is_right).then(|| format!("a strength of {strength}: expected 0 to 1"))
}

/// What was imagined, and how.
#[derive(Clone, Debug)]
pub struct Imagined {
    /// The pictures.
    pub pictures: Vec<Rgb8>,
    /// The seed of each.
    pub seeds: Vec<u64>,
    /// Height and width in pixels.
    pub size: [usize; 2],
    /// The scheduler's class in diffusers; empty where there is none.
    pub scheduler: String,
    /// How often the model was asked for each picture.
    pub steps: usize,
    /// What the prompts came to.
    pub texts: Texts,
    /// How the autoencoder saw them.
    pub coding: Coding,
}

/// What became of the prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Texts {
    /// How many rows of the text encoder's context the longer one fills.
    pub rows: usize,
    /// How many tokens of both did not fit and were left out.
    pub left_out: usize,
}

/// How far a picture is, told after each step.
pub struct Update<'a> {
    /// Which picture, from 0.
    pub picture: usize,
    /// How far it is.
    pub progress: &'a Progress,
    codec: Latents<'a>,
}

impl Update<'_> {
    /// What the picture is believed to become. It takes as long as decoding does.
    pub fn preview(&self) -> Rgb8 {
        picture(self.codec.decode(self.progress.original.clone()))
    }
}

/// A pipeline that makes pictures from texts.
///
/// ```no_run
/// use std::ops::ControlFlow;
///
/// use burn::tensor::Device;
/// use volary::folder::Folder;
/// use volary::imagine::Extras;
/// use volary::{Imagine, TextToImage};
///
/// # fn main() -> Result<(), volary::Error> {
/// let folder = Folder::Disk("path/to/Taiyi-Stable-Diffusion-1B-Chinese-v0.1".into());
/// let pipeline = TextToImage::load(&folder, &Extras::default(), &Default::default(), &Device::flex())?;
/// let asked = Imagine { prompt: "一只戴帽子的猫".into(), steps: 20, seed: 7, ..Default::default() };
/// let imagined = pipeline.imagine(&asked, |update| {
///     eprintln!("{} of {}", update.progress.done, update.progress.total);
///     ControlFlow::Continue(())
/// })?;
/// imagined.pictures[0].save_png("cat.png".as_ref())?;
/// # Ok(())
/// # }
/// ```
pub struct TextToImage {
    config: StableDiffusionConfig,
    models: StableDiffusion,
    scheduler: Config,
    tokenizer: Tokenizer,
    marks: Marks,
    context_length: usize,
    hides_padding: bool,
    embeddings: Embeddings,
    /// The side of a latent that the U-Net was trained on.
    side: usize,
    device: Device,
}

/// One walk of a pipeline.
pub(crate) struct Job {
    /// What is wanted.
    pub guidance: Guidance,
    /// How the steps are made.
    pub sampler: Box<dyn Sampler>,
    /// How many were asked for.
    pub steps: usize,
    /// What is changed.
    pub picture: Option<Picture>,
    /// How the autoencoder sees it.
    pub coding: Coding,
}

/// A picture as tensors.
pub(crate) struct Picture {
    /// `[batch, 3, height, width]`, -1 to 1.
    pub pixels: Tensor<4>,
    /// How much of the way is walked anew.
    pub strength: f64,
    /// `[batch, 1, height, width]`, 0.5 or more where something new is painted.
    pub mask: Option<Tensor<4>>,
}

impl TextToImage {
    /// Loads a folder of diffusers' layout, with what comes beside it.
    ///
    /// # Errors
    /// If parts are missing or do not fit together, weights cannot be read, do not fit or are no numbers, or an extra file fits
    /// nothing.
    pub fn load(
        folder: &Folder,
        extras: &Extras,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<Self, Error> {
        let parts = Parts::of(folder)?;
        let [_, tokenizer, unet, _, scheduler] = &parts.folders;
        let config = parts.config()?;
        let hides_padding = parts.hides_padding(&config.text)?;
        let scheduler = scheduler.config(scheduler::FILE)?;
        scheduler::parse(&scheduler)?;
        let tokenizer = tokenizer.tokenizer()?;
        if tokenizer.vocab_size() > config.text.vocab_size() {
            return Err(Error::Vocabulary {
                folder: folder.path().into(),
                expected: config.text.vocab_size(),
                found: tokenizer.vocab_size(),
            });
        }
        let longest = config.text.context_length();
        let context_length = tokenizer.model_max_length().map_or(longest, |length| length.min(longest));
        let marks = marks(&tokenizer, context_length)?;
        let side = unet.config("config.json")?.size_or("sample_size", 64)?;
        let loras = extras.loras.iter().map(|(path, weight)| Lora::open(path, *weight));
        let loras = loras.collect::<Result<Vec<_>, _>>()?;
        let named = parts.keys(&config)?;
        let (checkpoints, keys) = match &extras.single_file {
            None => (parts.checkpoints()?, named),
            Some(file) => {
                let whole = [open(file)?, open(file)?, open(file)?];
                (whole, [&ldm::TEXT, &ldm::UNET, &ldm::AUTOENCODER])
            }
        };
        let checkpoints = lora::apply(&loras, checkpoints, keys, named)?;
        let mut models = parts.load(&config, checkpoints, keys, options, device)?;
        let embeddings =
            Embeddings::open(&extras.embeddings, config.text.vocab_size(), config.text.d_token())?;
        if let Some(rows) = embeddings.rows(device) {
            models.text = models.text.with_tokens(rows);
        }
        Ok(Self {
            config,
            models,
            scheduler,
            tokenizer,
            marks,
            context_length,
            hides_padding,
            embeddings,
            side,
            device: device.clone(),
        })
    }

    /// Makes the pictures, one after the other; `watch` is told of each step, and may stop.
    ///
    /// A picture depends on its own seed alone, not on how many are made, and its noise is the same on every device.
    ///
    /// # Errors
    /// [`Error::Request`] with everything that is wrong with the request; [`Error::Stopped`] if it was stopped.
    pub fn imagine(
        &self,
        asked: &Imagine,
        mut watch: impl FnMut(&Update) -> ControlFlow<()>,
    ) -> Result<Imagined, Error> {
        let factor = self.config.vae.codec.factor();
        let given = asked.init.as_ref().map(|init| [init.picture.height(), init.picture.width()]);
        let size = asked.size.or(given).unwrap_or([self.side * factor; 2]);
        let problems = self.problems(asked, size);
        if !problems.is_empty() {
            return Err(Error::Request { problems });
        }
        let coding = asked.coding.unwrap_or(Coding::usual(size));
        let codec = self.codec(coding);
        let (guidance, texts) =
            self.guidance([&asked.prompt, &asked.negative], asked.guidance, asked.long)?;
        let scheduler = self.scheduler(asked.scheduler.as_deref(), asked.eta)?;
        let has_eta = |noise: &NoiseScheduler| matches!(noise.method, Method::Ddim { .. });
        if asked.eta != 0.0 && !matches!(&scheduler, Scheduler::Noise(noise) if has_eta(noise)) {
            let problem = format!("an eta of {}: only DDIM has one", asked.eta);
            return Err(Error::Request { problems: vec![problem] });
        }
        let latent = [codec.channels(), size[0] / factor, size[1] / factor];
        let (mut pictures, mut seeds, mut steps) = (Vec::new(), Vec::new(), 0);
        for at in 0..asked.count {
            let seed = asked.seed.wrapping_add(at as u64);
            let picture_of = |init: &Init| Picture {
                pixels: pixels(&init.picture, &self.device) * 2.0 - 1.0,
                strength: init.strength,
                // grey, as diffusers takes it
                mask: init.mask.as_ref().map(|mask| pixels(mask, &self.device).mean_dim(1)),
            };
            let job = Job {
                guidance: guidance.clone(),
                sampler: scheduler.sampler(asked.steps)?,
                steps: asked.steps,
                picture: asked.init.as_ref().map(picture_of),
                coding,
            };
            let mut draw = |draw| noise(&[seed], latent, draw, &self.device);
            let mut told = |progress: &Progress| {
                steps = progress.total;
                watch(&Update { picture: at, progress, codec })
            };
            let latents = self.run(job, &mut draw, &mut told)?;
            pictures.push(picture(codec.decode(latents)));
            seeds.push(seed);
        }
        let own = self.scheduler.text("_class_name").unwrap_or_default();
        let scheduler = asked.scheduler.clone().unwrap_or_else(|| own.to_owned());
        Ok(Imagined { pictures, seeds, size, scheduler, steps, texts, coding })
    }

    /// Everything that is wrong with a request.
    fn problems(&self, asked: &Imagine, size @ [height, width]: [usize; 2]) -> Vec<String> {
        let factor = self.config.vae.codec.factor();
        let mut problems = asked.problems();
        let sides = size.iter().all(|side| *side > 0 && side.is_multiple_of(factor));
        if !sides {
            problems.push(format!("{width}x{height} pixels: both sides must be multiples of {factor}"));
        }
        if size.iter().any(|side| *side > volary_vision::preprocess::MAX_SIDE) {
            problems.push(format!("{width}x{height} pixels are too many"));
        }
        if asked.temperature.is_some() {
            problems.push("a diffusion takes no temperature".into());
        }
        problems
    }

    /// What the texts mean, `[1, rows * seq, d_context]`, and what became of them.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub(crate) fn guidance(
        &self,
        [wanted, unwanted]: [&str; 2],
        scale: f64,
        long: Long,
    ) -> Result<(Guidance, Texts), Error> {
        let reader = Reader {
            model: &self.models.text,
            config: &self.config.text,
            hides_padding: self.hides_padding,
            context_length: self.context_length,
        };
        let seq = reader.context_length();
        let rows = |text: &str| -> Result<_, Error> {
            Ok(self.marks.rows(&self.embeddings.tokens(&self.tokenizer, text)?, seq, long))
        };
        let is_guided = scale > 1.0;
        let wanted = rows(wanted)?;
        let unwanted = if is_guided { Some(rows(unwanted)?) } else { None };
        let count = wanted.ids.len().max(unwanted.as_ref().map_or(0, |rows| rows.ids.len()));
        let left_out = wanted.left_out + unwanted.as_ref().map_or(0, |rows| rows.left_out);
        let encode = |rows: volary_multimodal::imagine::Rows| {
            rows.and_empty(count, &self.marks, seq).encode(&reader, &self.device)
        };
        let guidance = Guidance { context: encode(wanted), negative: unwanted.map(encode), scale };
        Ok((guidance, Texts { rows: count, left_out }))
    }

    /// The pipeline's scheduler, or that of another class with its noise. As in diffusers' pipelines, the steps begin one after
    /// the training's first, and no sample is clipped: latents are not bounded.
    ///
    /// # Errors
    /// If the class is none that is built.
    pub(crate) fn scheduler(&self, class: Option<&str>, eta: f64) -> Result<Scheduler, Error> {
        let scheduler = match class {
            Some(class) => scheduler::parse_as(&self.scheduler, class)?,
            None => scheduler::parse(&self.scheduler)?,
        };
        Ok(match scheduler {
            Scheduler::Noise(noise) => {
                let bound = if let Bound::Clip(_) = noise.bound { Bound::None } else { noise.bound };
                let method = match noise.method {
                    Method::Ddim { last, .. } => Method::Ddim { last, eta },
                    method => method,
                };
                Scheduler::Noise(NoiseScheduler { offset: 1, bound, method, ..noise })
            }
            flow => flow,
        })
    }

    /// Pictures to latents and back.
    pub(crate) fn codec(&self, coding: Coding) -> Latents<'_> {
        Latents { model: &self.models.vae, config: &self.config.vae, coding }
    }

    /// One walk, to latents.
    ///
    /// # Errors
    /// If the U-Net paints into pictures and there is none, or no step is left, or it was stopped.
    pub(crate) fn run(
        &self,
        job: Job,
        draw: &mut dyn FnMut(Draw) -> Tensor<4>,
        watch: &mut dyn FnMut(&Progress) -> ControlFlow<()>,
    ) -> Result<Tensor<4>, Error> {
        let Job { guidance, sampler, steps, picture, coding } = job;
        let codec = self.codec(coding);
        let denoiser = Answers { model: &self.models.unet, config: &self.config.unet };
        let refuse = |problem: &str| Err(Error::Request { problems: vec![problem.to_owned()] });
        let paints = self.config.unet.channels_in == 2 * codec.channels() + 1;
        let has_mask = picture.as_ref().is_some_and(|picture| picture.mask.is_some());
        if !paints && self.config.unet.channels_in != codec.channels() {
            return refuse(
                "this U-Net reads neither latents alone nor latents with a mask and a masked picture",
            );
        }
        if paints && !has_mask {
            return refuse("this U-Net paints into pictures: it needs a picture and a mask");
        }
        let strength = picture.as_ref().map_or(1.0, |picture| picture.strength);
        let start = steps - ((steps as f64 * strength) as usize).min(steps);
        if start >= sampler.timesteps().len() {
            return refuse(&format!("a strength of {strength} leaves none of {steps} steps"));
        }

        let noise = draw(Draw::Start);
        let [batch, ..] = noise.dims();
        let (mut sample, mut beside, mut kept) = (noise.clone() * sampler.initial_sigma(), None, None);
        if let Some(Picture { pixels, mask, .. }) = picture {
            let mask = mask.map(|mask| mask.greater_equal_elem(0.5).float());
            let latents = codec.encode(pixels.clone(), draw(Draw::Picture));
            // of what is painted in part, nothing is left at full strength
            if mask.is_none() || strength < 1.0 {
                sample = sampler.noised(start, latents.clone(), noise.clone());
            }
            match mask {
                Some(mask) if paints => {
                    let masked = codec.encode(pixels * (1.0 - mask.clone()), draw(Draw::Masked));
                    beside = Some(Tensor::cat(vec![thinned(mask, codec.factor()), masked], 1));
                }
                Some(mask) => kept = Some(Kept { latents, noise, mask: thinned(mask, codec.factor()) }),
                None => {}
            }
        }
        let rows = |context: Tensor<3>| {
            let [_, seq, width] = context.dims();
            context.expand([batch, seq, width])
        };
        let guidance = Guidance {
            context: rows(guidance.context),
            negative: guidance.negative.map(rows),
            scale: guidance.scale,
        };
        let walk = Walk { denoiser: &denoiser, sampler: sampler.as_ref(), guidance, start, beside, kept };
        Ok(walk.run(sample, &mut |at| draw(Draw::Step(at)), watch)?)
    }
}

/// What a tokenizer puts around a text.
fn marks(tokenizer: &Tokenizer, context_length: usize) -> Result<Marks, Error> {
    let empty = tokenizer.encode("")?.ids;
    // a beginning and an end, or an end alone
    let (before, behind) = empty.split_at(empty.len() / 2);
    if context_length <= empty.len() {
        let found = format!("a context of {context_length} tokens has no room beside {} marks", empty.len());
        return Err(Error::Request { problems: vec![found] });
    }
    let pad = tokenizer.pad_id().or(behind.last().copied()).unwrap_or(0);
    Ok(Marks { before: before.to_vec(), behind: behind.to_vec(), pad })
}

/// A mask's value at the first pixel of each latent: `[batch, 1, height, width]`.
fn thinned(mask: Tensor<4>, factor: usize) -> Tensor<4> {
    let [batch, channels, height, width] = mask.dims();
    let (rows, columns) = (height / factor, width / factor);
    let mask = mask.reshape([batch * channels * rows, factor, columns, factor]);
    mask.narrow(1, 0, 1).narrow(3, 0, 1).reshape([batch, channels, rows, columns])
}

/// `[1, 3, height, width]`, 0 to 1.
fn pixels(picture: &Rgb8, device: &Device) -> Tensor<4> {
    let values: Vec<f32> = picture.pixels().iter().map(|&value| f32::from(value) / 255.0).collect();
    let data = TensorData::new(values, [1, picture.height(), picture.width(), 3]);
    Tensor::<4>::from_data(data, device).permute([0, 3, 1, 2])
}

/// Pictures of `[batch, 3, height, width]`, -1 to 1. What is no number is black.
pub(crate) fn pictures(pixels: Tensor<4>) -> Vec<Rgb8> {
    let [_, _, height, width] = pixels.dims();
    let values = pixels.permute([0, 2, 3, 1]).into_data().convert::<f32>();
    let byte = |value: f32| ((value / 2.0 + 0.5).clamp(0.0, 1.0) * 255.0).round() as u8;
    let bytes: Vec<u8> = values.iter::<f32>().map(byte).collect();
    let each = bytes.chunks_exact(3 * height * width);
    each.map(|bytes| Rgb8::new(width, height, bytes.to_vec()).expect("three samples a pixel")).collect()
}

/// The only picture of `[1, 3, height, width]`.
pub(crate) fn picture(pixels: Tensor<4>) -> Rgb8 {
    pictures(pixels).swap_remove(0)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::{read_tensors, save_tensors};

    use super::*;

    fn fixture(name: &str) -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
    }

    fn load_with(folder: &Folder, extras: &Extras) -> Result<TextToImage, Error> {
        TextToImage::load(folder, extras, &LoadOptions::default(), &Device::flex())
    }

    fn load(name: &str) -> TextToImage {
        load_with(&fixture(name), &Extras::default()).unwrap()
    }

    fn asked() -> Imagine {
        Imagine { prompt: "a small cat".into(), steps: 3, size: Some([16, 24]), ..Default::default() }
    }

    fn imagine(pipeline: &TextToImage, asked: &Imagine) -> Result<Imagined, Error> {
        pipeline.imagine(asked, |_| ControlFlow::Continue(()))
    }

    fn pictures(pipeline: &TextToImage, asked: &Imagine) -> Vec<Rgb8> {
        imagine(pipeline, asked).unwrap().pictures
    }

    /// A copy of a pipeline, to be spoiled.
    fn copy(name: &str) -> tempfile::TempDir {
        let scratch = tempfile::tempdir().unwrap();
        let source = fixture(name);
        std::fs::copy(source.path().join("model_index.json"), scratch.path().join("model_index.json"))
            .unwrap();
        for part in crate::stable_diffusion::PARTS {
            std::fs::create_dir(scratch.path().join(part)).unwrap();
            for file in source.part(part).unwrap().files().unwrap() {
                let place = Path::new(part).join(file);
                std::fs::copy(source.path().join(&place), scratch.path().join(&place)).unwrap();
            }
        }
        scratch
    }

    fn grey(height: usize, width: usize, value: u8) -> Rgb8 {
        Rgb8::new(width, height, vec![value; height * width * 3]).unwrap()
    }

    #[test]
    fn a_picture_is_its_seeds_and_its_prompts() {
        for name in ["pipe_sd", "pipe_taiyi", "pipe_alt"] {
            let pipeline = load(name);
            let two = imagine(&pipeline, &Imagine { seed: 5, count: 2, ..asked() }).unwrap();
            assert_eq!((two.seeds, two.size, two.steps), (vec![5, 6], [16, 24], 3));
            assert_eq!((two.pictures[1].height(), two.pictures[1].width()), (16, 24));
            assert_eq!(pictures(&pipeline, &Imagine { seed: 6, ..asked() })[0], two.pictures[1], "{name}");
            assert_ne!(two.pictures[0], two.pictures[1], "{name}");
            let other = Imagine { seed: 5, prompt: "the table".into(), ..asked() };
            assert_ne!(pictures(&pipeline, &other)[0], two.pictures[0], "{name}");
        }
    }

    #[test]
    fn prompts_may_be_empty_or_very_long() {
        let pipeline = load("pipe_sd");
        let texts = |prompt: &str, long| {
            imagine(&pipeline, &Imagine { prompt: prompt.into(), long, ..asked() }).unwrap().texts
        };
        let rows = Long::Rows(ROWS);
        assert_eq!(texts("", rows), Texts { rows: 1, left_out: 0 });
        let long = "cat ".repeat(2500);
        let (cut, more) = (texts(&long, Long::Cut), texts(&long, rows));
        assert_eq!((cut.rows, more.rows), (1, ROWS));
        // a row of this toy has room for 18
        assert_eq!(cut.left_out - more.left_out, 18 * (ROWS - 1));
        assert!(more.left_out > 2000);
    }

    #[test]
    fn everything_wrong_with_a_request_is_told_at_once() {
        let pipeline = load("pipe_sd");
        let mask = Some(grey(8, 8, 255));
        let init = Some(Init { picture: grey(16, 16, 90), strength: 2.0, mask });
        let wrong = Imagine { size: Some([16, 20]), steps: 0, count: 0, eta: -1.0, init, ..asked() };
        let message = imagine(&pipeline, &wrong).unwrap_err().to_string();
        for expected in [
            "20x16 pixels: both sides must be multiples of 8",
            "0 steps: expected 1 or more",
            "0 pictures: expected 1 to 10000",
            "an eta of -1: expected 0 to 1",
            "the picture has 16x16 pixels, asked are 20x16",
            "a strength of 2: expected 0 to 1",
            "the mask has 8x8 pixels, the picture 16x16",
        ] {
            assert!(message.contains(expected), "{message}");
        }
        let message = imagine(&pipeline, &Imagine { steps: 1001, ..asked() }).unwrap_err().to_string();
        assert_eq!(message, "1001 steps: expected 1 to 1000");
        let unknown = Imagine { scheduler: Some("BestScheduler".into()), ..asked() };
        assert!(imagine(&pipeline, &unknown).unwrap_err().to_string().contains("one of DDPMScheduler"));
        let message = imagine(&load("pipe_sd_inpaint"), &asked()).unwrap_err().to_string();
        assert_eq!(message, "this U-Net paints into pictures: it needs a picture and a mask");
        let init = Some(Init { picture: grey(16, 24, 90), strength: 0.1, mask: None });
        let message = imagine(&pipeline, &Imagine { init, ..asked() }).unwrap_err().to_string();
        assert_eq!(message, "a strength of 0.1 leaves none of 3 steps");
    }

    #[test]
    fn any_scheduler_may_take_the_place_of_the_pipelines() {
        let pipeline = load("pipe_sd");
        let own = pictures(&pipeline, &asked());
        for class in [
            "DDPMScheduler",
            "PNDMScheduler",
            "EulerDiscreteScheduler",
            "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler",
            "LCMScheduler",
        ] {
            let imagined = Imagine { scheduler: Some(class.into()), steps: 5, ..asked() };
            let found = imagine(&pipeline, &imagined).unwrap();
            assert_eq!(found.scheduler, class);
            assert_ne!(found.pictures, own, "{class}");
            assert_eq!(found.pictures, pictures(&pipeline, &imagined), "{class}");
        }
    }

    #[test]
    fn where_nothing_is_masked_no_prompt_changes_the_picture() {
        let pipeline = load("pipe_sd");
        let of = |prompt: &str, value| {
            let init = Init { picture: grey(16, 24, 90), strength: 1.0, mask: Some(grey(16, 24, value)) };
            pictures(&pipeline, &Imagine { prompt: prompt.into(), init: Some(init), ..asked() })
        };
        assert_eq!(of("a small cat", 0), of("the table", 0));
        assert_ne!(of("a small cat", 255), of("the table", 255));
    }

    #[test]
    fn who_watches_sees_previews_and_may_stop() {
        let mut seen = Vec::new();
        let stopped = load("pipe_sd").imagine(&asked(), |update| {
            let preview = update.preview();
            seen.push((update.picture, update.progress.done, preview.height(), preview.width()));
            if update.progress.done == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        assert_eq!(stopped.unwrap_err().to_string(), "stopped after 2 of 3 steps");
        assert_eq!(seen, [(0, 1, 16, 24), (0, 2, 16, 24)]);
    }

    #[test]
    fn missing_parts_and_weights_that_are_no_numbers_are_told() {
        let scratch = copy("pipe_sd");
        let folder = Folder::Disk(scratch.path().into());
        let file = scratch.path().join("unet/diffusion_pytorch_model.safetensors");
        let mut tensors = read_tensors(&file).unwrap();
        let bias = tensors.get_mut("conv_out.bias").unwrap();
        *bias = TensorData::from([1f32, f32::NAN, 0.0, 0.0]);
        save_tensors(&file, &tensors.into_iter().collect::<Vec<_>>()).unwrap();
        let message = load_with(&folder, &Extras::default()).err().unwrap().to_string();
        assert!(message.contains("conv_out.bias"), "{message}");
        std::fs::remove_dir_all(scratch.path().join("vae")).unwrap();
        let message = load_with(&folder, &Extras::default()).err().unwrap().to_string();
        let expected = "no folder vae; a pipeline has text_encoder, tokenizer, unet, vae, scheduler";
        assert!(message.ends_with(expected), "{message}");
    }

    #[test]
    fn low_rank_changes_of_both_namings_are_the_same() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |file: &str, names: [&str; 3], key: &str| {
            let data = [
                TensorData::new(vec![0.5f32; 4], [1, 4]),
                TensorData::new(vec![1f32, -1.0, 2.0, 0.5], [4, 1]),
                TensorData::new(vec![1f32], [0; 0]),
            ];
            let tensors: Vec<_> =
                names.iter().zip(data).map(|(end, data)| (format!("{key}.{end}"), data)).collect();
            let path = scratch.path().join(file);
            save_tensors(&path, &tensors).unwrap();
            path
        };
        let kohya = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q";
        let diffusers = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q";
        let parts = ["lora_down.weight", "lora_up.weight", "alpha"];
        let kohya = write("kohya.safetensors", parts, kohya);
        let peft = write("peft.safetensors", ["lora_A.weight", "lora_B.weight", "alpha"], diffusers);
        let of = |loras: &[(PathBuf, f64)]| {
            let extras = Extras { loras: loras.to_vec(), ..Extras::default() };
            pictures(&load_with(&fixture("pipe_sd"), &extras).unwrap(), &asked())
        };
        let plain = of(&[]);
        let changed = of(&[(kohya.clone(), 1.0)]);
        assert_ne!(changed, plain);
        assert_eq!(changed, of(&[(peft.clone(), 1.0)]));
        assert_eq!(changed, of(&[(peft.clone(), 0.5), (kohya.clone(), 0.5)]));
        assert_eq!(plain, of(&[(kohya, 0.0)]));

        let nowhere = write("nowhere.safetensors", parts, "lora_unet_mid_block_nothing");
        let unfit = write("unfit.safetensors", parts, "lora_unet_conv_in");
        for (path, expected) in [
            (nowhere, "no weights here are changed by `unet_mid_block_nothing`"),
            (unfit, "these do not fit the weights they change: `unet_conv_in`"),
        ] {
            let extras = Extras { loras: vec![(path, 1.0)], ..Extras::default() };
            let message = load_with(&fixture("pipe_sd"), &extras).err().unwrap().to_string();
            assert!(message.ends_with(expected), "{message}");
        }
    }

    /// One tile is the whole; of more the seams are not quite it.
    #[test]
    fn a_picture_may_be_seen_in_tiles() {
        let pipeline = load("pipe_sd");
        let tile = pipeline.config.vae.tile;
        let of = |height, coding| {
            let init = Init { picture: grey(height, tile, 90), strength: 0.7, mask: None };
            let asked = Imagine { size: None, init: Some(init), coding, ..asked() };
            imagine(&pipeline, &asked).unwrap()
        };
        let (whole, tiled) = (Some(Coding::Whole), Some(Coding::Tiled));
        assert_eq!(of(tile, tiled).pictures, of(tile, whole).pictures);
        assert_ne!(of(2 * tile, tiled).pictures, of(2 * tile, whole).pictures);
        assert_eq!((of(tile, None).coding, of(tile, tiled).coding), (Coding::Whole, Coding::Tiled));
        let usual = [[1024, 1024], [1024, 1032], [usize::MAX, 8]].map(Coding::usual);
        assert_eq!(usual, [Coding::Whole, Coding::Tiled, Coding::Tiled]);
    }

    #[test]
    fn a_learned_token_changes_the_picture_of_a_prompt_that_names_it() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("learned_embeds.safetensors");
        let vector = TensorData::new((0..16).map(|x| x as f32 / 4.0 - 2.0).collect(), [16]);
        save_tensors(&path, &[("<toy>".to_owned(), vector)]).unwrap();
        let extras = Extras { embeddings: vec![path], ..Extras::default() };
        let (plain, learned) = (load("pipe_sd"), load_with(&fixture("pipe_sd"), &extras).unwrap());
        let of = |pipeline, prompt: &str| pictures(pipeline, &Imagine { prompt: prompt.into(), ..asked() });
        assert_eq!(of(&plain, "a small cat"), of(&learned, "a small cat"));
        assert_ne!(of(&plain, "a <toy>"), of(&learned, "a <toy>"));
    }
}
