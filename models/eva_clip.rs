//! EVA-CLIP: an EVA and CLIP's text tower, trained together from 0.15 to 18 billion parameters (Sun et al. 2023, 2024,
//! <https://arxiv.org/abs/2303.15389>, <https://arxiv.org/abs/2402.04252>).
//!
//! The numbers match open_clip, which knows the sizes up to E+, and the authors' own code (`baaivision/EVA`, `eva_clip`,
//! with plain attention in place of xformers), which also makes 8B and 18B: norms by root mean squares, no biases on
//! queries and values, and with 18B (as with E) norms after the branches. 8B and 18B are also on the hub with the names of
//! transformers, and code of their own (`EvaCLIPModel` in `modeling_evaclip.py`), whose wiring is the same. It keeps no
//! temperature; the authors take 100 for the factor on cosines, and so it is here.
//!
//! ```sh
//! volary classify cat.jpg --labels "a cat,a dog" --model timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::ops::{Activation, Mask};
use volary_multimodal::contrastive::info_nce;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Ignore, Rename, Reshape, Under};

use crate::clip::{self, Pooling as TextPooling, TextConfig, TextTower, TransformerConfig, normalise};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::eva::{self, Eva, EvaConfig, GridRope, Head, LAYER, MlpKind, NormKind, PAIR, RMS, Wiring};
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill, first_config};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared, compared_embeddings};
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
    /// Whether the factor on cosine similarities is learned; else it is [`FIXED_SCALE`].
    pub learned_scale: bool,
}

/// The factor on cosine similarities where none is kept.
pub const FIXED_SCALE: f64 = 100.0;

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct EvaClip {
    /// Pictures.
    pub vision: Eva,
    /// Text.
    pub text: TextTower,
    /// Logarithm of the factor on cosine similarities; `[1]`.
    pub logit_scale: Option<Param<Tensor<1>>>,
}

impl EvaClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> EvaClip {
        let start = Initializer::Constant { value: (1.0_f64 / 0.07).ln() };
        EvaClip {
            vision: self.vision.init(device),
            text: self.text.init(self.d_embed, device),
            logit_scale: self.learned_scale.then(|| start.init([1], device)),
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
        let class = &self.vision.class_token.val();
        let fixed = || Tensor::full([1], FIXED_SCALE, (&class.device(), class.dtype()));
        self.logit_scale.as_ref().map_or_else(fixed, |scale| scale.val().exp())
    }
}

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// open_clip: `open_clip_config.json` that names a tower of timm, whose arguments `timm_model_args.json` may change.
    OpenClip,
    /// The authors' configuration as `config.json`, with `model_type` `eva_clip`.
    Authors,
    /// The authors' `EvaCLIPModel` for transformers.
    HuggingFace,
}

/// Whether this `config.json` is one of the authors' `EvaCLIPModel` for transformers. Its `model_type` is CLIP's.
pub fn is_hugging_face(config: &Config) -> bool {
    config.first_of("architectures") == Some("EvaCLIPModel")
}

/// Whether this `vision_cfg` of open_clip is an EVA.
pub fn is_eva(vision: &Config) -> bool {
    vision.text("timm_model_name").is_some_and(|name| eva::architecture(name).is_some())
}

impl Layout {
    fn of(config: &Config) -> Option<Self> {
        if is_hugging_face(config) {
            return Some(Self::HuggingFace);
        }
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
            Some(Layout::HuggingFace) => {
                let checkpoint = folder.checkpoint()?;
                let has = |key: &str| checkpoint.entries().iter().any(|entry| entry.name == key);
                let (projection_bias, scale) = (has("visual_projection.bias"), has("logit_scale"));
                let model = Self::hugging_face(&config, projection_bias, scale)?;
                Ok((model, Layout::HuggingFace))
            }
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
            learned_scale: true,
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
            learned_scale: true,
        })
    }

    /// `config.json` of the authors' `EvaCLIPModel`; what it leaves out has the values of `EvaCLIPConfig`. Whether pictures
    /// are projected with a bias, and the factor on cosines was learned, is seen in the weights.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn hugging_face(
        config: &Config,
        projection_bias: bool,
        learned_scale: bool,
    ) -> Result<Self, ConfigError> {
        let (vision, text) =
            (config.object_or_empty("vision_config")?, config.object_or_empty("text_config")?);
        for (tower, fixed) in [(&vision, VISION_FIXED), (&text, TEXT_FIXED)] {
            for (field, allowed) in fixed {
                tower.only(field, allowed)?;
            }
        }
        let d_embed = config.size_or("projection_dim", 512)?;
        let qkv_bias = vision.flag_or("q_bias", true)?;
        if vision.flag_or("v_bias", true)? != qkv_bias {
            return Err(vision.error("v_bias", "as `q_bias` (others are not supported)"));
        }
        if vision.flag_or("k_bias", true)? {
            return Err(vision.error("k_bias", "false (others are not supported)"));
        }
        let vision_config = EvaConfig {
            image_size: side_or(&vision, "image_size", 224)?,
            patch_size: side_or(&vision, "patch_size", 32)?,
            channels: vision.size_or("num_channels", 3)?,
            d_model: vision.size_or("hidden_size", 768)?,
            d_ff: vision.size_or("intermediate_size", 3072)?,
            n_layers: vision.blocks_or("num_hidden_layers", 12)?,
            n_heads: vision.size_or("num_attention_heads", 12)?,
            norm: if vision.flag_or("use_rms_norm", false)? { NormKind::Rms } else { NormKind::Layer },
            norm_eps: vision.number_or("layer_norm_eps", 1e-5)?,
            wiring: if vision.flag_or("post_layernorm", false)? { Wiring::Post } else { Wiring::Pre },
            qkv_bias,
            head: match projection_bias {
                true => Head::Projection(d_embed),
                false => Head::UnbiasedProjection(d_embed),
            },
            ..eva::CLIP_GIANT
        };
        let transformer = TransformerConfig {
            activation: text.activation_or("hidden_act", Activation::Gelu)?,
            ..TransformerConfig::transformers(&text, 512, 2048, 8)?
        };
        Ok(Self {
            vision: vision_config.checked(&vision, "num_attention_heads")?,
            text: TextConfig {
                context_length: text.size_or("max_position_embeddings", 77)?,
                vocab_size: text.size_or("vocab_size", 49408)?,
                transformer,
                pooling: TextPooling::HighestId,
            },
            d_embed,
            learned_scale,
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self, layout: Layout) -> &'static KeyMap {
        match (layout, self.vision.norm, self.vision.mlp) {
            (Layout::HuggingFace, NormKind::Layer, _) => &KEYS_HUGGING_FACE,
            (Layout::HuggingFace, NormKind::Rms, _) => &KEYS_HUGGING_FACE_RMS,
            (_, NormKind::Layer, MlpKind::Plain) => &KEYS,
            (_, NormKind::Layer, _) => &KEYS_GATED,
            (_, NormKind::Rms, MlpKind::Plain) => &KEYS_RMS,
            (_, NormKind::Rms, _) => &KEYS_RMS_GATED,
        }
    }

    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(
        &self,
        folder: &Folder,
        layout: Layout,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<EvaClip, Error> {
        fill(folder, self.init(device), self.keys(layout), options)
    }
}

/// Settings of the authors' `vision_cfg` of which only these values are built.
const AUTHORS_FIXED: &[(&str, &[&str])] =
    &[("ls_init_value", &[]), ("global_average_pool", &["false"]), ("timm_model_name", &[])];

/// Settings of `EvaCLIPModel`'s towers of which only these values are built.
const VISION_FIXED: &[(&str, &[&str])] = &[
    ("hidden_act", &["\"gelu\""]),
    ("use_rope", &["false"]),
    ("use_sub_ln", &["false"]),
    ("use_swiglu_mlp", &["false"]),
];
const TEXT_FIXED: &[(&str, &[&str])] = &[
    ("use_rms_norm", &["false"]),
    ("post_layernorm", &["false"]),
    ("q_bias", &["true"]),
    ("k_bias", &["true"]),
    ("v_bias", &["true"]),
    ("use_rope", &["false"]),
    ("use_sub_ln", &["false"]),
    ("use_swiglu_mlp", &["false"]),
];

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

macro_rules! hugging_face {
    ($norm:expr) => {
        KeyMap::new(&[
            Reshape("logit_scale", "logit_scale", Ones::Scalar),
            Under("visual_projection.", "vision.head.", PAIR),
            Rename("text_projection.weight", "text.projection.weight"),
            Under("text_model.", "text.", clip::TEXT_TRANSFORMERS),
            Rename("vision_model.embeddings.class_embedding", "vision.class_token"),
            Under("vision_model.embeddings.patch_embedding.", "vision.patches.", PAIR),
            Rename("vision_model.embeddings.position_embedding.weight", "vision.positions.weight"),
            Ignore("vision_model.embeddings.position_ids"),
            Under(
                "vision_model.encoder.layers.{}.",
                "vision.blocks.{}.",
                &[
                    Under("layer_norm1.", "norm1.", $norm),
                    Under("self_attn.q_proj.", "attention.query.", PAIR),
                    Under("self_attn.k_proj.", "attention.key.", PAIR),
                    Under("self_attn.v_proj.", "attention.value.", PAIR),
                    Under("self_attn.out_proj.", "attention.output.", PAIR),
                    Under("layer_norm2.", "norm2.", $norm),
                    Under("mlp.fc1.", "mlp.Plain.up.", PAIR),
                    Under("mlp.fc2.", "mlp.Plain.down.", PAIR),
                ],
            ),
            Under("vision_model.post_layernorm.", "vision.norm.", $norm),
        ])
    };
}

/// Keys of the authors' `EvaCLIPModel` with layer norms.
pub const KEYS_HUGGING_FACE: KeyMap = hugging_face!(LAYER);
/// The same with norms by root mean squares.
pub const KEYS_HUGGING_FACE_RMS: KeyMap = hugging_face!(RMS);

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
        let (config, layout) = EvaClipConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys(layout))
    },
    open: |folder, options, device| {
        let (config, layout) = EvaClipConfig::of(folder)?;
        let model = config.load(folder, layout, options, device)?;
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
        let EvaClipConfig { vision, text, d_embed, .. } = &self.config;
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
    /// `image` and `text`, or in Hugging Face's layout `pixel_values`, `input_ids` and if wanted `attention_mask`. The
    /// authors' layout also gives the tokens of the pictures before the last norm and, of as many pictures as texts, the
    /// contrastive loss.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let text = &self.config.text;
        let of_hugging_face = self.layout == Layout::HuggingFace;
        let names = if of_hugging_face { ("pixel_values", "input_ids") } else { ("image", "text") };
        let pixels = self.config.vision.pixels(&mut inputs, names.0);
        let ids = inputs.ids::<2>(names.1, text.vocab_size);
        inputs.missing(names.1);
        let [_, seq] = ids.as_ref().map_or([0; 2], Tensor::dims);
        if seq > text.context_length {
            let limit = text.context_length;
            inputs.problem(format!("`{}` has {seq} tokens a row, at most {limit} fit", names.1));
        }
        let real = if of_hugging_face { inputs.mask("attention_mask") } else { None };
        if let Some(ids) = &ids {
            inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        }
        inputs.finish()?;
        let (Some(pixels), Some(ids)) = (pixels, ids) else { return Ok(Outputs::new()) }; // finished with an error

        let Eva { patches, .. } = &self.model.vision;
        let tokens = self.model.vision.encode(patches.forward(pixels.cast(patches.weight.val().dtype())));
        let images = self.model.vision.pool(self.model.vision.normed(tokens.clone()));
        let mask = match real {
            Some(real) => Mask::All(vec![Mask::Causal, Mask::Padding(real)]),
            None => Mask::Causal,
        };
        let states = self.model.text.encode(ids.clone(), &mask);
        let texts = self.model.text.pool(ids, &states);
        let (image_features, text_features) =
            (images.output, self.model.text.projection.forward(texts.clone()));
        let scale = self.model.scale();
        if of_hugging_face {
            let mut outputs = compared_embeddings(image_features, text_features, scale);
            outputs.extend([
                output("vision_model_output.last_hidden_state", tokens),
                output("vision_model_output.pooler_output", images.pooled),
                output("text_model_output.last_hidden_state", states),
                output("text_model_output.pooler_output", texts),
            ]);
            return Ok(outputs);
        }
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
        learned_scale: true,
    }
}

const fn hub(name: &'static str, config: EvaClipConfig, parameters: usize) -> Preset {
    let (shape, source) = (Shape::EvaClip(config), "open_clip, sum over the parameters");
    Preset { name, shape, weights: Weights::Hub, license: "MIT", parameters, source }
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
    learned_scale: true,
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
    d_embed: 1536,
    ..EIGHT
};

const fn large(name: &'static str, config: EvaClipConfig, parameters: usize) -> Preset {
    let source =
        "counted here; the authors say 8.1 and 18.1 billion, and 7.5 and 17.6 of the towers for pictures";
    let shape = Shape::EvaClip(config);
    Preset { name, shape, weights: Weights::Hub, license: "Apache-2.0", parameters, source }
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

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};
    use serde_json::{Value, json};
    use volary_weights::{parameters, read_tensors, save};

    use super::*;

    fn fixture(name: &str) -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
    }

    fn tensors(folder: &Folder, file: &str) -> BTreeMap<String, TensorData> {
        read_tensors(&folder.path().join(file)).unwrap()
    }

    fn config(value: &Value) -> Config {
        Config::parse(Path::new("config.json"), value.to_string().as_bytes()).unwrap()
    }

    /// What Hugging Face's `config.json` says of the shape of one of the authors'.
    fn described(shape: &EvaClipConfig) -> Value {
        let EvaClipConfig { vision, text, d_embed, .. } = shape;
        let TransformerConfig { d_model, d_ff, n_layers, n_heads, .. } = text.transformer;
        json!({
            "architectures": ["EvaCLIPModel"], "model_type": "clip", "projection_dim": d_embed,
            "vision_config": {
                "hidden_size": vision.d_model, "intermediate_size": vision.d_ff, "num_hidden_layers": vision.n_layers,
                "num_attention_heads": vision.n_heads, "image_size": vision.image_size,
                "patch_size": vision.patch_size, "layer_norm_eps": vision.norm_eps, "hidden_act": "gelu",
                "use_rms_norm": vision.norm == NormKind::Rms, "post_layernorm": vision.wiring == Wiring::Post,
                "q_bias": vision.qkv_bias, "k_bias": false, "v_bias": vision.qkv_bias,
            },
            "text_config": {
                "hidden_size": d_model, "intermediate_size": d_ff, "num_hidden_layers": n_layers,
                "num_attention_heads": n_heads, "vocab_size": text.vocab_size, "hidden_act": "gelu",
                "max_position_embeddings": text.context_length, "use_rms_norm": false, "post_layernorm": false,
            },
        })
    }

    /// Every parameter has one name of its own in Hugging Face's layout, that leads to it alone; with layer norms and by
    /// root mean squares.
    #[test]
    fn names_of_hugging_face_and_parameters_are_one_to_one() {
        for name in ["eva01_clip_g", "eva02_clip_e", "eva_clip_8b", "eva_clip_18b"] {
            let (config, _) = EvaClipConfig::of(&fixture(name)).unwrap();
            let (keys, model) = (config.keys(Layout::HuggingFace), config.init(&Device::flex()));
            let mut named = BTreeSet::new();
            for parameter in parameters(&model) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{name}: {}", parameter.path);
                assert_eq!(keys.paths(&found[0]).unwrap(), [parameter.path]);
                assert!(named.insert(found[0].clone()), "{name}: {}", found[0]);
            }
        }
        let block = "vision_model.encoder.layers.31.layer_norm2.weight";
        assert_eq!(KEYS_HUGGING_FACE_RMS.paths(block).unwrap(), ["vision.blocks.31.norm2.Rms.weight"]);
    }

    /// The authors' weights under Hugging Face's names say the same, with their temperature and without.
    #[test]
    fn a_folder_in_hugging_faces_layout_agrees() {
        let device = Device::flex();
        let options = LoadOptions::default();
        for name in ["eva01_clip_g", "eva02_clip_e", "eva_clip_8b", "eva_clip_18b"] {
            let (config, layout) = EvaClipConfig::of(&fixture(name)).unwrap();
            let model = config.load(&fixture(name), layout, &options, &device).unwrap();
            let inputs = tensors(&fixture(name), "inputs.safetensors");
            let expected = tensors(&fixture(name), "outputs.safetensors");
            let inputs: BTreeMap<_, _> = [("pixel_values", "image"), ("input_ids", "text")]
                .map(|(to, from)| (to.into(), inputs[from].clone()))
                .into();
            let unit = |name: &str| normalise(Tensor::from_data(expected[name].clone(), &device));
            let (images, texts) = (unit("image_features"), unit("text_features"));
            let fixed = images.clone().matmul(texts.clone().transpose()) * FIXED_SCALE;
            for (learned, logits) in
                [(true, expected["logits_per_image"].clone()), (false, fixed.into_data())]
            {
                let folder = tempfile::tempdir().unwrap();
                let weights = folder.path().join("model.safetensors");
                let model =
                    EvaClip { logit_scale: model.logit_scale.clone().filter(|_| learned), ..model.clone() };
                save(&model, config.keys(Layout::HuggingFace), None, &weights, None).unwrap();
                std::fs::write(folder.path().join("config.json"), described(&config).to_string()).unwrap();
                let folder = Folder::Disk(folder.path().into());
                let system = System::of(&folder).unwrap();
                assert_eq!(
                    (system.name, (system.describe)(&folder).unwrap().problems.len()),
                    ("eva_clip", 0)
                );
                let found: BTreeMap<_, _> = crate::registry::forward(&folder, &inputs, &options, &device)
                    .unwrap()
                    .into_iter()
                    .collect();
                let close = |name: &str, expected: TensorData| {
                    found[name].assert_approx_eq::<f32>(&expected, Tolerance::absolute(2e-4));
                };
                close("image_embeds", images.clone().into_data());
                close("text_embeds", texts.clone().into_data());
                close("logits_per_image", logits);
                close("vision_model_output.last_hidden_state", expected["image_tokens"].clone());
            }
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let of = |tower: &str, field: &str, value: Value| {
            let mut described = described(&EIGHT);
            described[tower][field] = value;
            EvaClipConfig::hugging_face(&config(&described), false, false)
        };
        assert_eq!(of("text_config", "dropout", json!(0.0)).unwrap().vision, EIGHT.vision);
        for (tower, field, value) in [
            ("vision_config", "k_bias", json!(true)),
            ("vision_config", "v_bias", json!(true)),
            ("vision_config", "use_swiglu_mlp", json!(true)),
            ("vision_config", "hidden_act", json!("quick_gelu")),
            ("vision_config", "num_attention_heads", json!(31)),
            ("text_config", "use_rms_norm", json!(true)),
            ("text_config", "post_layernorm", json!(true)),
        ] {
            let message = of(tower, field, value).unwrap_err().to_string();
            assert!(message.contains(&format!("`{tower}.{field}`")), "{message}");
        }
    }
}
