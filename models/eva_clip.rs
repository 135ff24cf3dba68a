//! EVA-CLIP: an EVA and CLIP's text tower, trained together from 0.15 to 18 billion parameters (Sun et al. 2023, 2024,
//! <https://arxiv.org/abs/2303.15389>, <https://arxiv.org/abs/2402.04252>).
//!
//! The numbers match open_clip, which knows the sizes up to E+, and the authors' own code (`baaivision/EVA`, `eva_clip`,
//! with plain attention in place of xformers), which also makes 8B and 18B: norms by root mean squares, no biases on
//! queries and values, and with 18B (as with E) norms after the branches.
//!
//! ```sh
//! volary classify cat.jpg --labels "a cat,a dog" --model timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::ops::{Activation, Mask};
use volary_multimodal::contrastive::info_nce;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Reshape, Under};

use crate::clip::{self, Pooling as TextPooling, TextConfig, TextTower, TransformerConfig, normalise};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::eva::{self, Eva, EvaConfig, GridRope, Head, MlpKind, NormKind, Wiring};
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill, first_config};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared};
use crate::vit::{LastNorm, Pooling, mlp_width, side_or};

/// Shape of a whole EVA-CLIP.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaClipConfig {
    /// The tower for pictures; its head projects into the space where both meet.
    pub vision: EvaConfig,
    /// The tower for text.
    pub text: TextConfig,
    /// Width of that space.
    pub d_embed: usize,
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct EvaClip {
    /// Pictures.
    pub vision: Eva,
    /// Text.
    pub text: TextTower,
    /// Logarithm of the factor on cosine similarities; `[1]`.
    pub logit_scale: Param<Tensor<1>>,
}

impl EvaClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> EvaClip {
        EvaClip {
            vision: self.vision.init(device),
            text: self.text.init(self.d_embed, device),
            logit_scale: Initializer::Constant { value: (1.0_f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl EvaClip {
    /// Pictures' embeddings, not normalised: `[batch, 3, image_size, image_size] -> [batch, d_embed]`.
    pub fn image_features(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.vision.pool(self.vision.forward(pixels)).output
    }

    /// Texts' embeddings, not normalised: token ids `[batch, seq] -> [batch, d_embed]`.
    pub fn text_features(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        self.text.forward(ids, &Mask::Causal).embedding
    }

    /// Unit vectors of pictures: `[batch, 3, image_size, image_size] -> [batch, d_embed]`.
    pub fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(self.image_features(pixels))
    }

    /// Unit vectors of texts: token ids `[batch, seq] -> [batch, d_embed]`.
    pub fn encode_texts(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        normalise(self.text_features(ids))
    }

    /// The factor on cosine similarities, `[1]`.
    pub fn scale(&self) -> Tensor<1> {
        self.logit_scale.val().exp()
    }
}

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// open_clip: `open_clip_config.json` that names a tower of timm, whose arguments `timm_model_args.json` may change.
    OpenClip,
    /// The authors' configuration as `config.json`, with `model_type` `eva_clip`.
    Authors,
}

/// Whether this `vision_cfg` of open_clip is an EVA.
pub fn is_eva(vision: &Config) -> bool {
    vision.text("timm_model_name").is_some_and(|name| eva::architecture(name).is_some())
}

impl Layout {
    fn of(config: &Config) -> Option<Self> {
        if config.text("model_type") == Some("eva_clip") {
            return Some(Self::Authors);
        }
        let vision = config.object("model_cfg").and_then(|model| model.object("vision_cfg")).ok()?;
        is_eva(&vision).then_some(Self::OpenClip)
    }
}

impl EvaClipConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let Some(config) = first_config(folder)? else {
            return Err(Error::NoConfig {
                folder: folder.path().into(),
                looked_for: crate::registry::CONFIGS,
            });
        };
        match Layout::of(&config) {
            Some(Layout::OpenClip) => Ok((Self::open_clip(folder, &config)?, Layout::OpenClip)),
            Some(Layout::Authors) => Ok((Self::authors(&config)?, Layout::Authors)),
            None => Err(config.error("model_type", "eva_clip, or a `timm_model_name` eva*").into()),
        }
    }

    fn open_clip(folder: &Folder, config: &Config) -> Result<Self, Error> {
        let model = config.object("model_cfg")?;
        let (vision, text) = (model.object("vision_cfg")?, model.object("text_cfg")?);
        model.only("custom_text", &["true"])?;
        for field in ["quick_gelu", "init_logit_bias", "multimodal_cfg"] {
            model.only(field, &["false"])?;
        }
        vision.only("timm_proj", &["\"\""])?;
        for field in ["timm_proj_bias", "timm_use_rope"] {
            vision.only(field, &["false"])?;
        }
        let name = vision.text("timm_model_name").unwrap_or_default();
        let own = eva::architecture(name).ok_or_else(|| vision.error("timm_model_name", "an EVA"))?;
        // timm's own pooling serves unless another is named
        let pooling = match vision.text("timm_pool") {
            None | Some("token" | "") => own.pooling,
            Some(_) => return Err(vision.error("timm_pool", "token (others are not supported)").into()),
        };
        let d_embed = model.size("embed_dim")?;
        let own = EvaConfig { image_size: side_or(&vision, "image_size", own.image_size)?, pooling, ..own };
        const ARGS: &str = "timm_model_args.json";
        let args = match folder.has(ARGS) {
            true => folder.config(ARGS)?.object("model_args")?,
            false => vision.object_or_empty("timm_kwargs")?,
        };
        Ok(Self {
            vision: EvaConfig::timm_args(own, &args, d_embed)?,
            text: clip::open_clip_text(&text, Activation::Gelu)?,
            d_embed,
        })
    }

    /// A configuration of the authors' code (`model_configs/*.json`).
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn authors(config: &Config) -> Result<Self, ConfigError> {
        let (vision, text) = (config.object("vision_cfg")?, config.object("text_cfg")?);
        for (field, allowed) in AUTHORS_FIXED {
            vision.only(field, allowed)?;
        }
        config.only("quick_gelu", &["false"])?;
        let d_embed = config.size("embed_dim")?;
        let d_model = vision.size_or("width", 768)?;
        let head_width = vision.size_or("head_width", 64)?;
        vision.divides("head_width", head_width, d_model)?;
        let mlp = MlpKind::authors(&vision)?;
        let qkv_bias = vision.flag_or("qkv_bias", true)?;
        let image_size = side_or(&vision, "image_size", 224)?;
        let patch_size = side_or(&vision, "patch_size", 16)?;
        let pretrained_side = vision.size_or("pt_hw_seq_len", 16)?;
        let rope = vision.flag_or("rope", false)?;
        if rope && !vision.flag_or("intp_freq", false)? && pretrained_side != image_size / patch_size {
            let expected = format!("{}, the patches of a side, without `intp_freq`", image_size / patch_size);
            return Err(vision.error("pt_hw_seq_len", &expected));
        }
        let vision_config = EvaConfig {
            image_size,
            patch_size,
            channels: 3,
            d_model,
            d_ff: mlp_width(&vision, 4.0, d_model)?,
            n_layers: vision.blocks_or("layers", 12)?,
            n_heads: d_model / head_width,
            norm: if vision.flag_or("use_rms_norm", false)? { NormKind::Rms } else { NormKind::Layer },
            norm_eps: 1e-6,
            wiring: if vision.flag_or("postnorm", false)? { Wiring::Post } else { Wiring::Pre },
            qkv_bias,
            attention_norm: mlp == MlpKind::GatedNormed,
            mlp,
            rope: rope.then_some(GridRope { pretrained_side: Some(pretrained_side) }),
            last_norm: LastNorm::Tokens,
            pooling: Pooling::Class,
            head: if qkv_bias { Head::Projection(d_embed) } else { Head::UnbiasedProjection(d_embed) },
        };
        Ok(Self {
            vision: vision_config.checked(&vision, "head_width")?,
            text: clip::open_clip_text(&text, Activation::Gelu)?,
            d_embed,
        })
    }

    /// The key map of a model of this shape, in either layout.
    pub const fn keys(&self) -> &'static KeyMap {
        match (self.vision.norm, self.vision.mlp) {
            (NormKind::Layer, MlpKind::Plain) => &KEYS,
            (NormKind::Layer, _) => &KEYS_GATED,
            (NormKind::Rms, MlpKind::Plain) => &KEYS_RMS,
            (NormKind::Rms, _) => &KEYS_RMS_GATED,
        }
    }

    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<EvaClip, Error> {
        fill(folder, self.init(device), self.keys(), options)
    }
}

/// Settings of the authors' `vision_cfg` of which only these values are built.
const AUTHORS_FIXED: &[(&str, &[&str])] =
    &[("ls_init_value", &[]), ("global_average_pool", &["false"]), ("timm_model_name", &[])];

macro_rules! keys {
    ($trunk:expr) => {
        KeyMap::new(&[
            Reshape("logit_scale", "logit_scale", Ones::Scalar),
            Under("text.", "text.", clip::TEXT_OPEN_CLIP),
            Under("visual.trunk.", "vision.", $trunk),
            Under("visual.", "vision.", $trunk),
        ])
    };
}

/// Keys of a tower with layer norms and plain MLPs.
pub const KEYS: KeyMap = keys!(eva::TRUNK);
/// The same with gated MLPs.
pub const KEYS_GATED: KeyMap = keys!(eva::TRUNK_GATED);
/// The same with norms by root mean squares.
pub const KEYS_RMS: KeyMap = keys!(eva::TRUNK_RMS);
/// The same with both.
pub const KEYS_RMS_GATED: KeyMap = keys!(eva::TRUNK_RMS_GATED);

/// EVA-CLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "eva_clip",
    about: "two towers, an EVA for pictures and CLIP's for text, to 18 billion parameters",
    file: "models/eva_clip.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &[
        "open_clip_evag",
        "open_clip_eva02",
        "eva01_clip_g",
        "eva02_clip_e",
        "eva02_clip_l",
        "eva_clip_8b",
        "eva_clip_18b",
    ],
    presets: PRESETS,
    recognises: |_, config| config.and_then(Layout::of).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, _) = EvaClipConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let (config, layout) = EvaClipConfig::of(folder)?;
        let model = config.load(folder, options, device)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// An EVA-CLIP behind the forward contract.
struct Runner {
    model: EvaClip,
    config: EvaClipConfig,
    layout: Layout,
}

impl TwoTower for Runner {
    fn fit(&self) -> Fit {
        let EvaClipConfig { vision, text, d_embed } = &self.config;
        let TextConfig { context_length, vocab_size, .. } = *text;
        Fit { image_size: vision.image_size, context_length, vocab_size, d_embed: *d_embed }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.model.encode_images(pixels)
    }

    /// Under the causal mask no text sees its padding.
    fn encode_texts(&self, ids: Tensor<2, Int>, _real: Tensor<2, Bool>) -> Tensor<2> {
        self.model.encode_texts(ids)
    }

    fn scale(&self) -> Tensor<1> {
        self.model.scale()
    }
}

impl Forward for Runner {
    /// `image` and `text`. The authors' layout also gives the tokens of the pictures before the last norm and, of as many
    /// pictures as texts, the contrastive loss.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let text = &self.config.text;
        let pixels = self.config.vision.pixels(&mut inputs, "image");
        let ids = inputs.ids::<2>("text", text.vocab_size);
        inputs.missing("text");
        let seq = ids.as_ref().map_or(0, |ids| ids.dims()[1]);
        if seq > text.context_length {
            inputs.problem(format!("`text` has {seq} tokens a row, at most {} fit", text.context_length));
        }
        inputs.finish()?;
        let (Some(pixels), Some(ids)) = (pixels, ids) else { return Ok(Outputs::new()) }; // finished with an error

        let Eva { patches, .. } = &self.model.vision;
        let tokens = self.model.vision.encode(patches.forward(pixels.cast(patches.weight.val().dtype())));
        let image_features = self.model.vision.pool(self.model.vision.normed(tokens.clone())).output;
        let text_features = self.model.text_features(ids);
        let scale = self.model.scale();
        let mut outputs = compared(image_features.clone(), text_features.clone(), scale.clone());
        outputs.push(output("image_features", image_features.clone()));
        outputs.push(output("text_features", text_features.clone()));
        if self.layout == Layout::Authors {
            outputs.push(output("image_tokens", tokens));
            outputs.push(output("logit_scale_exp", scale.clone()));
            let pairs = image_features.dims()[0];
            if pairs == text_features.dims()[0] {
                let (images, texts) = (normalise(image_features), normalise(text_features));
                let each = Tensor::arange(0..pairs as i64, &images.device());
                outputs.push(output("clip_loss", info_nce(images, texts, scale, each)));
            }
        }
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

const fn text(d_model: usize, n_layers: usize) -> TextConfig {
    let transformer = TransformerConfig {
        d_model,
        d_ff: 4 * d_model,
        n_layers,
        n_heads: d_model / 64,
        activation: Activation::Gelu,
        layer_norm_eps: 1e-5,
    };
    TextConfig { context_length: 77, vocab_size: 49408, transformer, pooling: TextPooling::HighestId }
}

const fn clip(vision: EvaConfig, image_size: usize, d_embed: usize, text: TextConfig) -> EvaClipConfig {
    EvaClipConfig {
        vision: EvaConfig { image_size, head: Head::Projection(d_embed), ..vision },
        text,
        d_embed,
    }
}

const fn preset(
    name: &'static str,
    config: EvaClipConfig,
    parameters: usize,
    source: &'static str,
) -> Preset {
    Preset { name, shape: Shape::EvaClip(config), weights: Weights::Hub, license: "MIT", parameters, source }
}

const fn hub(name: &'static str, config: EvaClipConfig, parameters: usize) -> Preset {
    preset(name, config, parameters, "open_clip, sum over the parameters")
}

/// "EVA-CLIP-18B", table 1: 8B, whose text tower is that of E+.
const EIGHT: EvaClipConfig = EvaClipConfig {
    vision: EvaConfig {
        d_model: 4096,
        d_ff: 20480,
        n_layers: 32,
        n_heads: 32,
        norm: NormKind::Rms,
        qkv_bias: false,
        head: Head::UnbiasedProjection(1280),
        ..eva::CLIP_GIANT
    },
    text: text(1280, 32),
    d_embed: 1280,
};
const EIGHT_448: EvaClipConfig =
    EvaClipConfig { vision: EvaConfig { image_size: 448, ..EIGHT.vision }, ..EIGHT };
const EIGHTEEN: EvaClipConfig = EvaClipConfig {
    vision: EvaConfig {
        d_model: 5120,
        d_ff: 25600,
        n_layers: 48,
        n_heads: 40,
        wiring: Wiring::Post,
        head: Head::UnbiasedProjection(1536),
        ..EIGHT.vision
    },
    text: text(1280, 32),
    d_embed: 1536,
};

const fn large(name: &'static str, config: EvaClipConfig, parameters: usize) -> Preset {
    let source =
        "counted here; the authors say 8.1 and 18.1 billion, and 7.5 and 17.6 of the towers for pictures";
    preset(name, config, parameters, source)
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    hub(
        "timm/eva_giant_patch14_clip_224.laion400m_s11b_b41k",
        clip(eva::CLIP_GIANT, 224, 1024, text(768, 12)),
        1_136_435_841,
    ),
    hub(
        "timm/eva_giant_patch14_plus_clip_224.merged2b_s11b_b114k",
        clip(eva::CLIP_GIANT, 224, 1024, text(1024, 24)),
        1_366_621_569,
    ),
    hub(
        "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k",
        clip(eva::CLIP_BASE_16, 224, 512, text(512, 12)),
        149_691_137,
    ),
    hub(
        "timm/eva02_large_patch14_clip_224.merged2b_s4b_b131k",
        clip(eva::CLIP_LARGE, 224, 768, text(768, 12)),
        427_755_457,
    ),
    hub(
        "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k",
        clip(eva::CLIP_LARGE, 336, 768, text(768, 12)),
        428_083_137,
    ),
    hub(
        "timm/eva02_enormous_patch14_clip_224.laion2b_s4b_b115k",
        clip(eva::CLIP_ENORMOUS, 224, 1024, text(1024, 24)),
        4_704_589_569,
    ),
    hub(
        "timm/eva02_enormous_patch14_plus_clip_224.laion2b_s9b_b144k",
        clip(eva::CLIP_ENORMOUS, 224, 1024, text(1280, 32)),
        5_044_889_089,
    ),
    large("BAAI/EVA-CLIP-8B", EIGHT, 8_220_748_545),
    large("BAAI/EVA-CLIP-8B-448", EIGHT_448, 8_223_894_273),
    large("BAAI/EVA-CLIP-18B", EIGHTEEN, 18_325_482_241),
];
