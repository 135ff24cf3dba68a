//! Stable Diffusion 1 and 2 and their kin: pictures by latent diffusion, told by a text (Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>). They differ in who reads the text:
//!
//! - Stable Diffusion 1 (CompVis, Runway) and 2 (Stability AI): CLIP's text transformer, [`crate::clip_text`];
//! - Taiyi-Stable-Diffusion (IDEA-CCNL, <https://arxiv.org/abs/2209.02970>): a Chinese BERT in its place, [`crate::bert`];
//! - AltDiffusion, -m9 and -m18 (BAAI, <https://arxiv.org/abs/2211.06679>, <https://arxiv.org/abs/2308.09991>): XLM-R of 2, 9
//!   and 18 languages, [`crate::roberta_series`].
//!
//! A folder is a pipeline of diffusers: `model_index.json`, and the parts in folders of their own. The numbers match its
//! `StableDiffusionPipeline`, `StableDiffusionImg2ImgPipeline`, `StableDiffusionInpaintPipeline` (4 and 9 channels),
//! `AltDiffusionPipeline` and `AltDiffusionImg2ImgPipeline`. [`crate::TextToImage`] is the way to use one; `forward` runs what
//! a `prompt.json` beside the parts says.
//!
//! ```sh
//! volary imagine "一只戴帽子的猫" --model path/to/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 -o cat.png
//! volary forward path/to/Taiyi-Stable-Diffusion-1B-Chinese-v0.1 --input noise.safetensors --output out.safetensors
//! ```

use std::ops::ControlFlow;

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_kernels::ops::Mask;
use volary_multimodal::imagine::{Codec, Denoiser, Draw, Long, TextEncoder};
use volary_vision::autoencoder::{AutoencoderKl, AutoencoderKlConfig};
use volary_vision::unet::{UNet, UNetConfig};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, CHINESE};
use crate::clip_text::{self, ClipText, ClipTextConfig};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::imagine::{Coding, Extras, Job, Picture, TextToImage};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Description, Forward, System, describe_with};
use crate::roberta_series::{ALT, ALT_M18, RobertaSeries, RobertaSeriesConfig};
use crate::tensors::{Inputs, Outputs, output};
use crate::{autoencoder, unet};

/// What says which parts there are.
pub const INDEX: &str = "model_index.json";

/// The folders of the parts.
pub const PARTS: &[&str] = &["text_encoder", "tokenizer", "unet", "vae", "scheduler"];

/// Shape of a pipeline's models.
#[derive(Clone, Debug, PartialEq)]
pub struct StableDiffusionConfig {
    /// Reads the text.
    pub text: TextConfig,
    /// Answers with noise.
    pub unet: UNetConfig,
    /// Makes latents of pictures and pictures of latents.
    pub vae: AutoencoderKlConfig,
}

/// Shape of what reads the text.
#[derive(Clone, Debug, PartialEq)]
pub enum TextConfig {
    /// CLIP's.
    Clip(ClipTextConfig),
    /// BERT.
    Bert(BertConfig),
    /// XLM-R, mapped.
    Series(RobertaSeriesConfig),
}

/// A pipeline's models.
#[derive(Module, Debug)]
pub struct StableDiffusion {
    /// Reads the text.
    pub text: TextModel,
    /// Answers with noise.
    pub unet: UNet,
    /// Makes latents of pictures and pictures of latents.
    pub vae: AutoencoderKl,
}

/// What reads the text.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)] // there is one
pub enum TextModel {
    /// CLIP's.
    Clip(ClipText),
    /// BERT.
    Bert(Bert),
    /// XLM-R, mapped.
    Series(RobertaSeries),
}

impl StableDiffusionConfig {
    /// Untrained models. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> StableDiffusion {
        StableDiffusion {
            text: self.text.init(device),
            unet: self.unet.init(device),
            vae: self.vae.init(device),
        }
    }
}

impl TextConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> TextModel {
        match self {
            Self::Clip(config) => TextModel::Clip(config.init(device)),
            Self::Bert(config) => TextModel::Bert(config.init(device)),
            Self::Series(config) => TextModel::Series(config.init(device)),
        }
    }

    /// The `config.json` of a `text_encoder`, of the class that `model_index.json` names.
    ///
    /// # Errors
    /// If the class is another, the configuration malformed, or it asks for what is not built.
    pub fn parse(index: &Config, config: &Config) -> Result<Self, ConfigError> {
        let class = index.texts("text_encoder").and_then(|names| names.into_iter().nth(1));
        match class.as_deref() {
            Some("CLIPTextModel") => Ok(Self::Clip(ClipTextConfig::parse(config)?)),
            Some("BertModel") => {
                Ok(Self::Bert(BertConfig { pooler: false, head: false, ..BertConfig::parse(config)? }))
            }
            Some("RobertaSeriesModelWithTransformation") => {
                Ok(Self::Series(RobertaSeriesConfig::parse(config)?))
            }
            _ => {
                let known = "CLIPTextModel, BertModel or RobertaSeriesModelWithTransformation of a library";
                Err(index.error("text_encoder", known))
            }
        }
    }

    /// The longest text in tokens.
    pub fn context_length(&self) -> usize {
        match self {
            Self::Clip(config) => config.context_length,
            Self::Bert(config) => config.context_length(),
            Self::Series(config) => config.roberta.context_length(),
        }
    }

    /// Number of tokens.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Clip(config) => config.vocab_size,
            Self::Bert(config) => config.vocab_size,
            Self::Series(config) => config.roberta.vocab_size,
        }
    }

    /// Width of what the U-Net reads.
    pub fn d_context(&self) -> usize {
        match self {
            Self::Clip(config) => config.transformer.d_model,
            Self::Bert(config) => config.d_model,
            Self::Series(config) => config.d_context,
        }
    }

    /// Width of a token's embedding.
    pub fn d_token(&self) -> usize {
        match self {
            Self::Clip(config) => config.transformer.d_model,
            Self::Bert(config) => config.d_model,
            Self::Series(config) => config.roberta.d_model,
        }
    }

    /// The key map of a `text_encoder`.
    pub fn keys(&self) -> &'static KeyMap {
        match self {
            Self::Clip(_) => &clip_text::KEYS,
            Self::Bert(_) => &BERT_KEYS,
            Self::Series(config) => config.keys(),
        }
    }
}

/// BERT's, whose pooler and head have no use here.
const BERT_KEYS: KeyMap = KeyMap::new(&[Under("", "", bert::TRUNK_WITHOUT_POOLER), Ignore("cls.{*}")])
    .with_prefixes(bert::PREFIXES);

impl TextModel {
    /// What the U-Net reads of a text: `[batch, seq] -> [batch, seq, d_context]`. CLIP looks back only, so that its text never
    /// sees what pads it; `mask` is for the others.
    ///
    /// # Panics
    /// If a text is longer than the context.
    pub fn forward(&self, ids: Tensor<2, Int>, mask: Mask) -> Tensor<3> {
        match self {
            Self::Clip(clip) => clip.forward(ids),
            Self::Bert(bert) => bert.forward(BertInput { mask, ..ids.into() }).hidden,
            Self::Series(series) => series.forward(BertInput { mask, ..ids.into() }).context,
        }
    }

    /// With more tokens at the end of the vocabulary, `[more, d_token]`.
    pub fn with_tokens(mut self, more: Tensor<2>) -> Self {
        let tokens = match &mut self {
            Self::Clip(clip) => &mut clip.tokens,
            Self::Bert(bert) => &mut bert.tokens,
            Self::Series(series) => &mut series.roberta.tokens,
        };
        let extended = |weight: Tensor<2>| {
            let more = more.to_device(&weight.device()).cast(weight.dtype());
            Tensor::cat(vec![weight, more], 0)
        };
        tokens.weight = tokens.weight.clone().map(extended);
        self
    }
}

/// A text model behind the pipeline's trait.
pub(crate) struct Reader<'a> {
    pub model: &'a TextModel,
    pub config: &'a TextConfig,
    /// Whether what pads a text is hidden.
    pub hides_padding: bool,
    /// Of the tokenizer, at most the model's.
    pub context_length: usize,
}

impl TextEncoder for Reader<'_> {
    fn context_length(&self) -> usize {
        self.context_length
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size()
    }

    fn encode(&self, ids: Tensor<2, Int>, real: &[usize]) -> Tensor<3> {
        let [rows, seq] = ids.dims();
        let mask = match self.hides_padding {
            true => {
                let real: Vec<bool> =
                    real.iter().flat_map(|&real| (0..seq).map(move |at| at < real)).collect();
                Mask::Padding(Tensor::from_data(TensorData::new(real, [rows, seq]), &ids.device()))
            }
            false => Mask::Full,
        };
        self.model.forward(ids, mask).cast(burn::tensor::DType::F32)
    }
}

/// A U-Net behind the pipeline's trait.
pub(crate) struct Answers<'a> {
    pub model: &'a UNet,
    pub config: &'a UNetConfig,
}

impl Denoiser for Answers<'_> {
    fn channels_in(&self) -> usize {
        self.config.channels_in
    }

    fn denoise(&self, sample: Tensor<4>, timestep: f64, context: Tensor<3>) -> Tensor<4> {
        let timestep = Tensor::<1>::from_floats([timestep as f32], &sample.device());
        let answer = self.model.forward(sample, timestep, context, &Mask::Full);
        answer.cast(burn::tensor::DType::F32)
    }
}

/// An autoencoder behind the pipeline's trait.
#[derive(Clone, Copy)]
pub(crate) struct Latents<'a> {
    pub model: &'a AutoencoderKl,
    pub config: &'a AutoencoderKlConfig,
    pub coding: Coding,
}

impl Codec for Latents<'_> {
    fn channels(&self) -> usize {
        self.config.codec.d_latent
    }

    fn factor(&self) -> usize {
        self.config.codec.factor()
    }

    fn encode(&self, pictures: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        let posterior = match self.coding {
            Coding::Whole => self.model.encode(pictures),
            Coding::Tiled => self.model.encode_tiled(pictures, &self.config.tiles()),
        };
        let latents = posterior.sample(noise).cast(burn::tensor::DType::F32);
        (latents - self.config.shift_factor) * self.config.scaling_factor
    }

    fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let latents = latents / self.config.scaling_factor + self.config.shift_factor;
        let pictures = match self.coding {
            Coding::Whole => self.model.decode(latents),
            Coding::Tiled => self.model.decode_tiled(latents, &self.config.tiles()),
        };
        pictures.cast(burn::tensor::DType::F32)
    }
}

/// The parts of a pipeline's folder.
#[derive(Clone, Debug)]
pub struct Parts {
    /// `model_index.json`.
    pub index: Config,
    /// The folders, in the order of [`PARTS`].
    pub folders: [Folder; 5],
}

impl Parts {
    /// The parts of a folder.
    ///
    /// # Errors
    /// With all folders that are missing.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        let index = folder.config(INDEX)?;
        let found: Vec<Option<Folder>> = PARTS.iter().map(|part| folder.part(part)).collect();
        match <[Folder; 5]>::try_from(found.iter().flatten().cloned().collect::<Vec<_>>()) {
            Ok(folders) => Ok(Self { index, folders }),
            Err(_) => {
                let missing = PARTS.iter().zip(&found).filter(|(_, found)| found.is_none());
                let missing = missing.map(|(part, _)| (*part).to_owned()).collect();
                Err(Error::NoParts { folder: folder.path().into(), missing, parts: PARTS })
            }
        }
    }

    /// The configuration of the models.
    ///
    /// # Errors
    /// If one is missing, malformed or asks for what is not built, or the U-Net reads another width than the text encoder
    /// gives.
    pub fn config(&self) -> Result<StableDiffusionConfig, Error> {
        let [text, _, unet, vae, _] = &self.folders;
        let unet_config = unet.config("config.json")?;
        let config = StableDiffusionConfig {
            text: TextConfig::parse(&self.index, &text.config("config.json")?)?,
            unet: unet::parse(&unet_config)?,
            vae: autoencoder::parse(&vae.config("config.json")?)?,
        };
        if config.text.d_context() != config.unet.d_context {
            let expected = format!("{}, the text encoder's width", config.text.d_context());
            return Err(unet_config.error("cross_attention_dim", &expected).into());
        }
        Ok(config)
    }

    /// Whether the text encoder is told which tokens pad.
    ///
    /// # Errors
    /// If its configuration is missing or malformed.
    pub fn hides_padding(&self, text: &TextConfig) -> Result<bool, Error> {
        let config = self.folders[0].config("config.json")?;
        Ok(config.flag_or("use_attention_mask", matches!(text, TextConfig::Series(_)))?)
    }

    /// The weights of text encoder, U-Net and autoencoder.
    ///
    /// # Errors
    /// If there are none, or a file is broken.
    pub fn checkpoints(&self) -> Result<[Box<dyn Checkpoint>; 3], Error> {
        let [text, _, unet, vae, _] = &self.folders;
        Ok([text.checkpoint()?, unet.checkpoint()?, vae.checkpoint()?])
    }

    /// The models, filled from the weights of text encoder, U-Net and autoencoder.
    ///
    /// # Errors
    /// If weights cannot be read or do not fit.
    pub fn load(
        &self,
        config: &StableDiffusionConfig,
        checkpoints: [Box<dyn Checkpoint>; 3],
        keys: [&KeyMap; 3],
        options: &LoadOptions,
        device: &Device,
    ) -> Result<StableDiffusion, Error> {
        let [text, unet, vae] = checkpoints;
        let [text_keys, unet_keys, vae_keys] = keys;
        let untrained = config.init(device);
        Ok(StableDiffusion {
            text: match untrained.text {
                TextModel::Clip(model) => TextModel::Clip(load(model, text.as_ref(), text_keys, options)?),
                TextModel::Bert(model) => TextModel::Bert(load(model, text.as_ref(), text_keys, options)?),
                TextModel::Series(model) => {
                    TextModel::Series(load(model, text.as_ref(), text_keys, options)?)
                }
            },
            unet: load(untrained.unet, unet.as_ref(), unet_keys, options)?,
            vae: load(untrained.vae, vae.as_ref(), vae_keys, options)?,
        })
    }

    /// The key maps of text encoder, U-Net and autoencoder in folders of their own.
    ///
    /// # Errors
    /// If the U-Net's configuration is missing or malformed.
    pub fn keys(&self, config: &StableDiffusionConfig) -> Result<[&'static KeyMap; 3], Error> {
        let [_, _, unet, ..] = &self.folders;
        Ok([config.text.keys(), unet::keys(&unet.config("config.json")?)?, &autoencoder::KEYS])
    }
}

/// The pipelines that are run.
const CLASSES: &[(&str, Kind)] = &[
    ("StableDiffusionPipeline", Kind::Text),
    ("StableDiffusionImg2ImgPipeline", Kind::Picture),
    ("StableDiffusionInpaintPipeline", Kind::Mask),
    ("AltDiffusionPipeline", Kind::Text),
    ("AltDiffusionImg2ImgPipeline", Kind::Picture),
];

/// What a pipeline begins from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Text,
    Picture,
    Mask,
}

fn kind(index: &Config) -> Option<Kind> {
    let class = index.text("_class_name")?;
    CLASSES.iter().find(|(name, _)| *name == class).map(|(_, kind)| *kind)
}

/// Stable Diffusion as the registry knows it.
pub const SYSTEM: System = System {
    name: "stable_diffusion",
    about: "pictures from texts by latent diffusion: Stable Diffusion 1 and 2, Taiyi, AltDiffusion",
    file: "models/stable_diffusion.rs",
    tasks: &["imagine", "forward"],
    proved: &["pipe_sd", "pipe_sd_img2img", "pipe_sd_inpaint", "pipe_taiyi", "pipe_alt"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| kind(config).is_some()),
    checkpoint: Folder::checkpoint,
    describe,
    open: |folder, options, device| {
        let pipeline = TextToImage::load(folder, &Extras::default(), options, device)?;
        let index = folder.config(INDEX)?;
        let prompt = folder.config("prompt.json")?;
        let kind = kind(&index).ok_or_else(|| index.error("_class_name", "a pipeline that is run"))?;
        Ok(Box::new(Runner { pipeline, prompt, kind }))
    },
    generator: None,
};

/// Of all three models together.
fn describe(folder: &Folder) -> Result<Description, Error> {
    let (parts, device) = (Parts::of(folder)?, Device::flex());
    let config = parts.config()?;
    let [text, unet, vae] = parts.checkpoints()?;
    let [text_keys, unet_keys, vae_keys] = parts.keys(&config)?;
    let described = [
        (
            "text_encoder",
            match config.text.init(&device) {
                TextModel::Clip(model) => describe_with(text.as_ref(), &model, text_keys)?,
                TextModel::Bert(model) => describe_with(text.as_ref(), &model, text_keys)?,
                TextModel::Series(model) => describe_with(text.as_ref(), &model, text_keys)?,
            },
        ),
        ("unet", describe_with(unet.as_ref(), &config.unet.init(&device), unet_keys)?),
        ("vae", describe_with(vae.as_ref(), &config.vae.init(&device), vae_keys)?),
    ];
    Ok(Description::of_parts(described))
}

/// A pipeline behind the forward contract.
struct Runner {
    pipeline: TextToImage,
    /// What is wanted.
    prompt: Config,
    kind: Kind,
}

impl Forward for Runner {
    /// `latents`, the unit noise of a picture, `[batch, channels, height / factor, width / factor]`. Where a picture is changed,
    /// `image` `[batch, 3, height, width]`, 0 to 1, with `noise` in place of `latents`, `vae_noise`, which picks the picture's
    /// latent, and for a part of it `mask_image` `[batch, 1, height, width]`, 0.5 or more where something new is painted. What
    /// is wanted stands in the folder's `prompt.json`: `prompt`, `negative_prompt`, `num_inference_steps`, `guidance_scale`,
    /// `strength`. A prompt that is too long is cut, as diffusers does.
    ///
    /// Gives `prompt_embeds` and `negative_prompt_embeds`, `latents` after the last step, and the `image`, 0 to 1.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let changes = self.kind != Kind::Text;
        let name = if changes { "noise" } else { "latents" };
        let start = inputs.float::<4>(name);
        inputs.missing(name);
        let (mut image, mut picked, mut mask) = (None, None, None);
        if changes {
            image = inputs.float::<4>("image");
            picked = inputs.float::<4>("vae_noise");
            inputs.missing("image");
            inputs.missing("vae_noise");
        }
        if self.kind == Kind::Mask {
            mask = inputs.float::<4>("mask_image");
            inputs.missing("mask_image");
        }
        let steps = self.prompt.size_or("num_inference_steps", 50)?;
        let scale = self.prompt.number_or("guidance_scale", 7.5)?;
        let strength = match self.kind {
            Kind::Text => 1.0,
            Kind::Picture => self.prompt.number_or("strength", 0.8)?,
            Kind::Mask => self.prompt.number_or("strength", 1.0)?,
        };
        let codec = self.pipeline.codec(Coding::Whole);
        if let Some(start) = &start {
            let [batch, _, height, width] = start.dims();
            let latent = [batch, codec.channels(), height, width];
            let factor = codec.factor();
            let pixels = |channels| [batch, channels, factor * height, factor * width];
            inputs.shaped(name, Some(start.dims()), latent);
            inputs.shaped("vae_noise", picked.as_ref().map(Tensor::dims), latent);
            inputs.shaped("image", image.as_ref().map(Tensor::dims), pixels(3));
            inputs.shaped("mask_image", mask.as_ref().map(Tensor::dims), pixels(1));
        }
        inputs.finish()?;
        let Some(start) = start else { return Ok(Outputs::new()) }; // finished with an error
        let text = |field| self.prompt.text(field).unwrap_or_default();
        let texts = [text("prompt"), text("negative_prompt")];
        let (guidance, _) = self.pipeline.guidance(texts, scale, Long::Cut)?;
        let job = Job {
            guidance: guidance.clone(),
            sampler: self.pipeline.scheduler(None, 0.0)?.sampler(steps)?,
            steps,
            picture: image.map(|image| Picture { pixels: image * 2.0 - 1.0, strength, mask }),
            coding: codec.coding,
        };
        let mut draw = |draw: Draw| match (draw, &picked) {
            (Draw::Picture | Draw::Masked, Some(picked)) => picked.clone(),
            (Draw::Start, _) | (Draw::Picture | Draw::Masked, None) => start.clone(),
            // none is given, and what could be drawn is 0 in the mean
            (Draw::Step(_), _) => start.zeros_like(),
        };
        let latents = self.pipeline.run(job, &mut draw, &mut |_| ControlFlow::Continue(()))?;
        let image = (codec.decode(latents.clone()) / 2.0 + 0.5).clamp(0.0, 1.0);
        let mut outputs = vec![
            output("image", image),
            output("latents", latents),
            output("prompt_embeds", guidance.context),
        ];
        outputs.extend(guidance.negative.map(|negative| output("negative_prompt_embeds", negative)));
        Ok(outputs)
    }
}

/// Stable Diffusion 1.
const V1: StableDiffusionConfig =
    StableDiffusionConfig { text: TextConfig::Clip(clip_text::L14), unet: unet::V1, vae: autoencoder::F8 };

/// Stable Diffusion 2.
const V2: StableDiffusionConfig =
    StableDiffusionConfig { text: TextConfig::Clip(clip_text::H14), unet: unet::V2, vae: autoencoder::F8 };

const TAIYI: StableDiffusionConfig = StableDiffusionConfig {
    text: TextConfig::Bert(BertConfig { pooler: false, ..CHINESE }),
    unet: unet::V1,
    vae: autoencoder::F8,
};

const ALT_DIFFUSION: StableDiffusionConfig =
    StableDiffusionConfig { text: TextConfig::Series(ALT), unet: unet::V1, vae: autoencoder::F8 };

const ALT_DIFFUSION_M18: StableDiffusionConfig =
    StableDiffusionConfig { text: TextConfig::Series(ALT_M18), unet: unet::V2, vae: autoencoder::F8 };

const fn preset(
    name: &'static str,
    license: &'static str,
    shape: &'static StableDiffusionConfig,
    parameters: usize,
) -> Preset {
    let source = "diffusers' parts together, without what has no use";
    Preset { name, shape: Shape::StableDiffusion(shape), weights: Weights::Hub, license, parameters, source }
}

const OPENRAIL: &str = "CreativeML OpenRAIL-M";

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("CompVis/stable-diffusion-v1-4", OPENRAIL, &V1, 1_066_235_307),
    preset("stable-diffusion-v1-5/stable-diffusion-v1-5", OPENRAIL, &V1, 1_066_235_307),
    preset("stabilityai/stable-diffusion-2-1", "CreativeML OpenRAIL++-M", &V2, 1_289_952_427),
    preset("IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1", OPENRAIL, &TAIYI, 1_044_851_883),
    preset("BAAI/AltDiffusion", OPENRAIL, &ALT_DIFFUSION, 1_502_802_859),
    preset("BAAI/AltDiffusion-m9", OPENRAIL, &ALT_DIFFUSION, 1_502_802_859),
    preset("BAAI/AltDiffusion-m18", OPENRAIL, &ALT_DIFFUSION_M18, 1_509_457_067),
];
