//! EVA: vision transformers that learned to see by predicting CLIP's features at masked patches. EVA-01 (Fang et al.
//! 2022, <https://arxiv.org/abs/2211.07636>), EVA-02 with gated MLPs, sub-norms and rotary positions (Fang et al. 2023,
//! <https://arxiv.org/abs/2303.11331>), and the towers of EVA-CLIP up to 18B (Sun et al. 2023, 2024,
//! <https://arxiv.org/abs/2303.15389>, <https://arxiv.org/abs/2402.04252>), whose two-tower half is [`crate::eva_clip`].
//!
//! The numbers match timm (`Eva`), and for the masked pretraining the authors' own code (`baaivision/EVA`, without
//! xformers and apex), whose names of weights are read beside timm's.
//!
//! ```sh
//! volary forward path/to/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Tensor, TensorData};
use volary_kernels::layers::{
    Attention, AttentionConfig, GatedMlp, GatedMlpConfig, LayerNorm, LearnedPositions, Linear, LinearConfig,
    Mlp, MlpConfig, RmsNorm,
};
use volary_kernels::ops::{self, Activation, GridRopeConfig, Mask, Positions, Rope};
use volary_vision::masking::Kept;
use volary_vision::patch::{PatchEmbedding, hide};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Ignore, Rename, Reshape, Split, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::vit::{HeadOutput, LastNorm, Pooling, mlp_width, side_or, timm_args, timm_classes, timm_outputs};

/// Shape of an EVA.
#[derive(Clone, Debug, PartialEq)]
pub struct EvaConfig {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Colours of a pixel.
    pub channels: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// What all norms are.
    pub norm: NormKind,
    /// Added to variances, or mean squares.
    pub norm_eps: f64,
    /// Where the norms of a block stand.
    pub wiring: Wiring,
    /// Whether queries and values have a bias; keys never do.
    pub qkv_bias: bool,
    /// Whether there is a norm before the attention's output projection (Wang et al. 2022, "Foundation Transformers").
    pub attention_norm: bool,
    /// The MLP.
    pub mlp: MlpKind,
    /// Whether queries and keys turn by their patch's row and column.
    pub rope: Option<GridRope>,
    /// Where the last norm stands.
    pub last_norm: LastNorm,
    /// What stands for the picture.
    pub pooling: Pooling,
    /// What is done with it.
    pub head: Head,
}

/// What a norm is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// With mean and bias.
    Layer,
    /// Without either.
    Rms,
}

/// Where the norms of a block stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wiring {
    /// `x + f(norm(x))`
    Pre,
    /// `x + norm(f(x))`
    Post,
}

/// The MLP of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpKind {
    /// Two projections with GELU between them.
    Plain,
    /// Three projections, gated with SiLU.
    Gated,
    /// The same with a norm before the last one.
    GatedNormed,
}

/// Rotary positions over the grid of patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GridRope {
    /// Side of the grid of the pretraining, over which the patches are spread. `None` is the model's own.
    pub pretrained_side: Option<usize>,
}

/// What is done with what stands for the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Nothing.
    Absent,
    /// A projection to this width: scores of classes, or an embedding.
    Projection(usize),
    /// The same without a bias.
    UnbiasedProjection(usize),
    /// Every masked patch is projected to the width of the features that it should predict.
    Masked(usize),
}

/// An EVA.
#[derive(Module, Debug)]
pub struct Eva {
    /// `[d_model, channels, patch_size, patch_size]`.
    pub patches: PatchEmbedding,
    /// `[d_model]`.
    pub class_token: Param<Tensor<1>>,
    /// What stands in the place of a masked patch, `[d_model]`.
    pub mask_token: Option<Param<Tensor<1>>>,
    /// `[1 + patches, d_model]`.
    pub positions: LearnedPositions,
    /// The blocks.
    pub blocks: Vec<EvaBlock>,
    /// After the blocks, on all tokens.
    pub norm: Option<Norm>,
    /// After the pooling.
    pub pooled_norm: Option<Norm>,
    /// `[width of the head, d_model]`.
    pub head: Option<Linear>,
    #[module(skip)]
    rope: Option<GridRopeConfig>,
    #[module(skip)]
    pooling: Pooling,
}

/// A transformer block, pre- or post-norm.
#[derive(Module, Debug)]
pub struct EvaBlock {
    /// Of the attention: before it, or after it.
    pub norm1: Norm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the attention's output projection.
    pub attention_norm: Option<Norm>,
    /// Of the MLP: before it, or after it.
    pub norm2: Norm,
    /// The MLP.
    pub mlp: EvaMlp,
    #[module(skip)]
    wiring: Wiring,
}

/// A layer norm, or one by root mean squares.
#[derive(Module, Debug)]
pub enum Norm {
    /// With mean and bias.
    Layer(LayerNorm),
    /// Without either.
    Rms(RmsNorm),
}

/// The MLP of a block.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum EvaMlp {
    /// `down(gelu(up(x)))`
    Plain(Mlp),
    /// `down(norm(silu(gate(x)) * up(x)))`
    Gated(NormedGatedMlp),
}

/// A gated MLP, maybe with a norm before its last projection.
#[derive(Module, Debug)]
pub struct NormedGatedMlp {
    /// Three projections.
    pub projections: GatedMlp,
    /// `[d_ff]`.
    pub norm: Option<Norm>,
}

impl EvaConfig {
    /// How many patches a side has.
    pub const fn side(&self) -> usize {
        self.image_size / self.patch_size
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Eva {
        let Self { d_model, .. } = *self;
        let normal = Initializer::Normal { mean: 0.0, std: 0.02 };
        let side = self.side();
        let head = |width, bias| LinearConfig::new(d_model, width).with_bias(bias).init(device);
        Eva {
            patches: PatchEmbedding::new(self.channels, self.patch_size, d_model, device),
            class_token: normal.init([d_model], device),
            mask_token: matches!(self.head, Head::Masked(_)).then(|| normal.init([d_model], device)),
            positions: LearnedPositions::new(1 + side * side, d_model, 0.02, device),
            blocks: (0..self.n_layers).map(|_| self.block(device)).collect(),
            norm: (self.last_norm == LastNorm::Tokens).then(|| self.norm(d_model, device)),
            pooled_norm: (self.last_norm == LastNorm::Pooled).then(|| self.norm(d_model, device)),
            head: match self.head {
                Head::Absent => None,
                Head::Projection(width) | Head::Masked(width) => Some(head(width, true)),
                Head::UnbiasedProjection(width) => Some(head(width, false)),
            },
            rope: self.rope.map(|GridRope { pretrained_side }| {
                GridRopeConfig::new(d_model / self.n_heads, side, side)
                    .with_class_tokens(1)
                    .with_pretrained_side(pretrained_side)
            }),
            pooling: self.pooling,
        }
    }

    fn block(&self, device: &Device) -> EvaBlock {
        let Self { d_model, d_ff, n_heads, .. } = *self;
        let gated = |norm| {
            let projections = GatedMlpConfig::new(d_model, d_ff).init(device);
            EvaMlp::Gated(NormedGatedMlp { projections, norm })
        };
        EvaBlock {
            norm1: self.norm(d_model, device),
            attention: AttentionConfig::new(d_model, n_heads)
                .with_bias(self.qkv_bias)
                .with_key_bias(false)
                .init(device),
            attention_norm: self.attention_norm.then(|| self.norm(d_model, device)),
            norm2: self.norm(d_model, device),
            mlp: match self.mlp {
                MlpKind::Plain => EvaMlp::Plain(MlpConfig::new(d_model, d_ff).init(device)),
                MlpKind::Gated => gated(None),
                MlpKind::GatedNormed => gated(Some(self.norm(d_ff, device))),
            },
            wiring: self.wiring,
        }
    }

    fn norm(&self, width: usize, device: &Device) -> Norm {
        match self.norm {
            NormKind::Layer => Norm::Layer(LayerNorm::new(width, self.norm_eps, device)),
            NormKind::Rms => Norm::Rms(RmsNorm::new(width, self.norm_eps, device)),
        }
    }
}

impl Norm {
    /// `[..., width] -> [..., width]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Norm::Layer(norm) => norm.forward(x),
            Norm::Rms(norm) => norm.forward(x),
        }
    }

    /// `x + y`, and the norm of it, each `[..., width]`.
    pub fn add<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        match self {
            Norm::Layer(norm) => norm.add(x, y),
            Norm::Rms(norm) => norm.add(x, y),
        }
    }
}

fn normed<const D: usize>(norm: &Option<Norm>, x: Tensor<D>) -> Tensor<D> {
    norm.iter().fold(x, |x, norm| norm.forward(x))
}

impl EvaMlp {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        match self {
            EvaMlp::Plain(mlp) => mlp.forward(x, Activation::Gelu),
            EvaMlp::Gated(NormedGatedMlp { projections: GatedMlp { gate, up, down }, norm }) => {
                let gated = Activation::Silu.gated(gate.forward(x.clone()), up.forward(x));
                down.forward(normed(norm, gated))
            }
        }
    }
}

impl EvaBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`; `positions` are those of the tokens in the table of `rope`.
    pub fn forward(&self, x: Tensor<3>, rope: Option<&Rope>, positions: &Positions) -> Tensor<3> {
        match self.wiring {
            Wiring::Pre => {
                let attended = self.attend(self.norm1.forward(x.clone()), rope, positions);
                let (x, normed) = self.norm2.add(x, attended);
                ops::add(x, self.mlp.forward(normed))
            }
            Wiring::Post => {
                let x = x.clone() + self.norm1.forward(self.attend(x, rope, positions));
                x.clone() + self.norm2.forward(self.mlp.forward(x))
            }
        }
    }

    fn attend(&self, x: Tensor<3>, rope: Option<&Rope>, positions: &Positions) -> Tensor<3> {
        let turned = |x: Tensor<4>| rope.iter().fold(x, |x, rope| rope.apply(x, positions));
        let query = turned(self.attention.queries(x.clone()));
        let (key, value) = self.attention.keys_values(x); // [batch, n_heads, seq, d_head]
        let x = ops::attention(query, turned(key), value, &Mask::Full, None);
        let [batch, n_heads, seq, d_head] = x.dims();
        let x = x.swap_dims(1, 2).reshape([batch, seq, n_heads * d_head]);
        self.attention.output.forward(normed(&self.attention_norm, x))
    }
}

impl Eva {
    /// Pixels `[batch, channels, height, width]`, normalised, to tokens `[batch, 1 + patches, d_model]`: the class token,
    /// then the patches row by row.
    ///
    /// # Panics
    /// If the pictures are not of the model's size.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.normed(self.encode(self.patches.forward(pixels)))
    }

    /// The last norm, where it is on all tokens: `[batch, 1 + patches, d_model]` to the same.
    pub fn normed(&self, x: Tensor<3>) -> Tensor<3> {
        normed(&self.norm, x)
    }

    /// The same of pictures some of whose patches are hidden (`true`): `masked` is `[batch, patches]`.
    ///
    /// # Panics
    /// If the model has no mask token, or shapes differ.
    pub fn forward_masked(&self, pixels: Tensor<4>, masked: Tensor<2, Bool>) -> Tensor<3> {
        let mask_token =
            self.mask_token.as_ref().expect("a model of masked pretraining has a mask token").val();
        self.normed(self.encode(hide(self.patches.forward(pixels), masked, mask_token)))
    }

    /// The tokens of [`Eva::forward`] before the last norm, `[batch, 1 + patches, d_model]`, of patches that are projected:
    /// `[batch, patches, d_model]`.
    pub fn encode(&self, patches: Tensor<3>) -> Tensor<3> {
        self.blocks(self.positioned(patches), &Positions::From(0))
    }

    /// [`Eva::forward`] in training with patches left out, as of EVA-CLIP: the tokens that stay, `[batch, 1 + kept,
    /// d_model]`, each with the position that it has in the whole picture.
    ///
    /// # Panics
    /// If the pictures are not of the model's size, or others than `kept` was drawn for.
    pub fn forward_kept(&self, pixels: Tensor<4>, kept: &Kept) -> Tensor<3> {
        let x = kept.pick(self.positioned(self.patches.forward(pixels)), 1); // [batch, 1 + kept, d_model]
        let places = kept.places(1, &x.device());
        self.normed(self.blocks(x, &Positions::Each(places)))
    }

    /// The class token and the patches with their positions: `[batch, patches, d_model] -> [batch, 1 + patches, d_model]`.
    fn positioned(&self, patches: Tensor<3>) -> Tensor<3> {
        let [batch, _, d_model] = patches.dims();
        let class = self.class_token.val().reshape([1, 1, d_model]).expand([batch, 1, d_model]);
        self.positions.forward(Tensor::cat(vec![class, patches], 1))
    }

    fn blocks(&self, x: Tensor<3>, positions: &Positions) -> Tensor<3> {
        let rope = self.rope.as_ref().map(|rope| rope.init(&x.device()));
        self.blocks.iter().fold(x, |x, block| block.forward(x, rope.as_ref(), positions))
    }

    /// What stands for the picture in the tokens of [`Eva::forward`], and what the head makes of it.
    ///
    /// # Panics
    /// If the model does not pool ([`Pooling::Nothing`]).
    pub fn pool(&self, x: Tensor<3>) -> HeadOutput<2> {
        let [batch, tokens, d_model] = x.dims();
        let x = match self.pooling {
            Pooling::Class => x.narrow(1, 0, 1),
            Pooling::MeanOfPatches => x.narrow(1, 1, tokens - 1).mean_dim(1),
            Pooling::MeanOfAll => x.mean_dim(1),
            Pooling::Nothing => panic!("this model does not pool its tokens"),
        };
        let pooled = normed(&self.pooled_norm, x.reshape([batch, d_model]));
        let output = self.head.iter().fold(pooled.clone(), |x, head| head.forward(x));
        HeadOutput { pooled, output }
    }

    /// What is predicted at the masked patches, row by row of the batch: `[batch, 1 + patches, d_model] -> [masked, width]`;
    /// `None` where nothing is masked.
    pub fn predict(&self, tokens: Tensor<3>, masked: Tensor<2, Bool>) -> Option<Tensor<2>> {
        let [batch, seq, d_model] = tokens.dims();
        let patches = tokens.narrow(1, 1, seq - 1).reshape([batch * (seq - 1), d_model]);
        let at: Vec<i64> = (0..)
            .zip(masked.into_data().iter::<bool>())
            .filter(|(_, hidden)| *hidden)
            .map(|(at, _)| at)
            .collect();
        let count = at.len();
        if count == 0 {
            return None;
        }
        let at = Tensor::from_data(TensorData::new(at, [count]), &patches.device());
        let chosen = patches.select(0, at);
        Some(self.head.iter().fold(chosen, |x, head| head.forward(x)))
    }
}

/// The loss of the masked pretraining: the mean of `-cos(prediction, target)`, `[1]` (EVA-01, section 2.1).
///
/// - `predictions`, `targets`: `[masked, width]`.
pub fn negative_cosine(predictions: Tensor<2>, targets: Tensor<2>) -> Tensor<1> {
    let length = |x: &Tensor<2>| x.clone().square().sum_dim(1).sqrt().clamp_min(1e-8); // [masked, 1]
    let product = (predictions.clone() * targets.clone()).sum_dim(1);
    -(product / (length(&predictions) * length(&targets))).mean()
}

/// How a folder describes an EVA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// timm's `config.json`, with an `architecture` `eva*`.
    Timm,
    /// The arguments of the authors' code for masked pretraining, as `model_type` `eva_mim` or `eva02_mim`.
    Masked,
}

impl Layout {
    /// The layout of a configuration, if it is one of an EVA.
    pub fn of(config: &Config) -> Option<Self> {
        match (config.text("model_type"), config.text("architecture")) {
            (Some("eva_mim" | "eva02_mim"), _) => Some(Self::Masked),
            (_, Some(name)) if name.starts_with("eva_") || name.starts_with("eva02_") => Some(Self::Timm),
            _ => None,
        }
    }
}

impl EvaConfig {
    /// The configuration of a folder and its layout.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let config = folder.config("config.json")?;
        match Layout::of(&config) {
            Some(Layout::Timm) => Ok((Self::timm(&config)?, Layout::Timm)),
            Some(Layout::Masked) => Ok((Self::masked(&config)?, Layout::Masked)),
            None => Err(config.error("model_type", "eva_mim, eva02_mim, or an `architecture` eva*").into()),
        }
    }

    /// `config.json` of timm: `model_args` over the architecture's own arguments, and over what `pretrained_cfg` says of
    /// classes.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn timm(config: &Config) -> Result<Self, ConfigError> {
        let pretrained = config.object_or_empty("pretrained_cfg")?;
        let args = config.object_or_empty("model_args")?;
        let own = config.text("architecture").and_then(architecture);
        let own = own.ok_or_else(|| config.error("architecture", KNOWN))?;
        let classes = timm_classes(config, &pretrained, &args)?;
        Self::timm_args(own, &args, classes)
    }

    /// The architecture that timm knows by this name, with `args` over its own arguments, and so many `classes`: scores, or
    /// the width of an embedding; 0 without a head.
    ///
    /// # Errors
    /// If there is none, or `args` are malformed or ask for what is not built.
    pub fn timm_args(own: Self, args: &Config, classes: usize) -> Result<Self, ConfigError> {
        timm_args(args, &[ARGS], ARGS_FIXED)?;
        let d_model = args.size_or("embed_dim", own.d_model)?;
        let pooling = match args.text("global_pool") {
            None if args.has("global_pool") => return Err(args.error("global_pool", "a text")),
            None => own.pooling,
            Some("token") => Pooling::Class,
            Some("avg") => Pooling::MeanOfPatches,
            Some(_) => return Err(args.error("global_pool", "token or avg (others are not supported)")),
        };
        let ratio = match own.mlp {
            MlpKind::Plain => own.d_ff as f64 / own.d_model as f64,
            _ => 4.0 * 2.0 / 3.0, // EVA-02 L's width is rounded down from it
        };
        let gated = args.flag_or("swiglu_mlp", own.mlp != MlpKind::Plain)?;
        let normed = args.flag_or("scale_mlp", own.mlp == MlpKind::GatedNormed)?;
        let pretrained_side = match args.sizes("ref_feat_shape").as_deref() {
            Some(&[height, width]) if height == width && height > 0 => Some(height),
            None if !args.has("ref_feat_shape") => own.rope.and_then(|rope| rope.pretrained_side),
            _ => return Err(args.error("ref_feat_shape", "a square (others are not supported)")),
        };
        let rope = args.flag_or("use_rot_pos_emb", own.rope.is_some())?;
        let after = args.flag_or("use_post_norm", own.wiring == Wiring::Post)?;
        Self {
            image_size: side_or(args, "img_size", own.image_size)?,
            patch_size: side_or(args, "patch_size", own.patch_size)?,
            channels: args.size_or("in_chans", 3)?,
            d_model,
            d_ff: mlp_width(args, ratio, d_model)?,
            n_layers: args.blocks_or("depth", own.n_layers)?,
            n_heads: args.size_or("num_heads", own.n_heads)?,
            wiring: if after { Wiring::Post } else { Wiring::Pre },
            qkv_bias: args.flag_or("qkv_bias", own.qkv_bias)?,
            attention_norm: args.flag_or("scale_attn_inner", own.attention_norm)?,
            mlp: match (gated, normed) {
                (false, false) => MlpKind::Plain,
                (true, false) => MlpKind::Gated,
                (true, true) => MlpKind::GatedNormed,
                (false, true) => return Err(args.error("scale_mlp", "false without `swiglu_mlp`")),
            },
            rope: rope.then_some(GridRope { pretrained_side }),
            last_norm: match pooling {
                Pooling::MeanOfPatches => LastNorm::Pooled,
                _ => LastNorm::Tokens,
            },
            pooling,
            head: match classes {
                0 => Head::Absent,
                classes => Head::Projection(classes),
            },
            ..own
        }
        .checked(args, "num_heads")
    }

    /// The arguments of the authors' `VisionTransformerForMaskedImageModeling`.
    ///
    /// # Errors
    /// If they are malformed, or ask for what is not built.
    pub fn masked(config: &Config) -> Result<Self, ConfigError> {
        for (field, allowed) in MASKED_FIXED {
            config.only(field, allowed)?;
        }
        let d_model = config.size_or("embed_dim", 768)?;
        Self {
            image_size: side_or(config, "img_size", 224)?,
            patch_size: side_or(config, "patch_size", 16)?,
            channels: config.size_or("in_chans", 3)?,
            d_model,
            d_ff: mlp_width(config, 4.0, d_model)?,
            n_layers: config.blocks_or("depth", 12)?,
            n_heads: config.size_or("num_heads", 12)?,
            norm_eps: config.number_or("layer_norm_eps", 1e-6)?,
            qkv_bias: config.flag_or("qkv_bias", true)?,
            // the sub-norms of the masked pretraining are those of the MLP alone
            attention_norm: false,
            mlp: MlpKind::authors(config)?,
            rope: config.flag_or("rope", false)?.then_some(GridRope { pretrained_side: None }),
            last_norm: LastNorm::Tokens,
            pooling: Pooling::Class,
            head: Head::Masked(config.size_or("predict_feature_dim", 768)?),
            ..GIANT
        }
        .checked(config, "num_heads")
    }

    /// That a picture has patches and a head whole pairs.
    pub(crate) fn checked(self, config: &Config, heads: &str) -> Result<Self, ConfigError> {
        if self.patch_size > self.image_size {
            return Err(
                config.error("patch_size", &format!("at most the picture's {} pixels", self.image_size))
            );
        }
        config.divides(heads, self.n_heads, self.d_model)?;
        if self.rope.is_some() && !(self.d_model / self.n_heads).is_multiple_of(4) {
            return Err(
                config.error(heads, "heads of a multiple of 4 channels, as they turn by rows and columns")
            );
        }
        Ok(self)
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match (self.norm, self.mlp) {
            (NormKind::Layer, MlpKind::Plain) => &KEYS,
            (NormKind::Layer, _) => &KEYS_GATED,
            (NormKind::Rms, MlpKind::Plain) => &KEYS_RMS,
            (NormKind::Rms, _) => &KEYS_RMS_GATED,
        }
    }
}

impl MlpKind {
    /// As the settings `naiveswiglu` and `subln` of the authors' code say.
    pub(crate) fn authors(config: &Config) -> Result<Self, ConfigError> {
        match (config.flag_or("naiveswiglu", false)?, config.flag_or("subln", false)?) {
            (true, true) => Ok(Self::GatedNormed),
            (true, false) => Ok(Self::Gated),
            (false, false) => Ok(Self::Plain),
            (false, true) => Err(config.error("subln", "false without `naiveswiglu`")),
        }
    }
}

/// What timm calls the architectures here.
const KNOWN: &str = "eva_giant_patch14_{N}, eva02_{tiny,small,base,large}_patch14_{N}, or a tower of EVA-CLIP, \
                     eva_giant_patch14_clip_224, eva02_base_patch16_clip_224, eva02_large_patch14_clip_{N}, \
                     eva02_enormous_patch14_clip_224";

/// Arguments of timm's `Eva` that are read, or only matter for training.
const ARGS: &[&str] = &[
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
    "qkv_bias",
    "qkv_fused",
    "mlp_ratio",
    "swiglu_mlp",
    "scale_mlp",
    "scale_attn_inner",
    "use_rot_pos_emb",
    "use_post_norm",
    "ref_feat_shape",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "dynamic_img_size",
];

/// Those of which only these values are built.
const ARGS_FIXED: &[(&str, &[&str])] = &[
    ("class_token", &["true"]),
    ("use_abs_pos_emb", &["true"]),
    ("init_values", &[]),
    ("num_reg_tokens", &["0"]),
    ("swiglu_align_to", &["0"]),
    ("attn_type", &["\"eva\""]),
    ("qk_norm", &["false"]),
    ("dynamic_img_pad", &["false"]),
];

/// Arguments of the authors' code of which only these values are built; `init_values` would be a scale per channel.
const MASKED_FIXED: &[(&str, &[&str])] = &[
    ("init_values", &["0", "0.0"]),
    ("use_abs_pos_emb", &["true"]),
    ("use_rel_pos_bias", &["false"]),
    ("use_shared_rel_pos_bias", &["false"]),
    ("postnorm", &["false"]),
    ("deepnorm", &["false"]),
    ("swiglu", &["false"]),
    ("decoupled_rope", &["false"]),
];

/// The architecture of timm's name, without classes.
pub(crate) fn architecture(name: &str) -> Option<EvaConfig> {
    let numbered = |rest: &str| rest.parse::<usize>().ok().filter(|&side| side >= 14);
    let (family, rest) = name.split_once("_patch")?;
    let (patch_size, rest) = rest.split_once('_')?;
    let patch_size = numbered(patch_size)?;
    let (clip, size) = match rest.strip_prefix("clip_") {
        Some(size) => (true, numbered(size)?),
        None => (false, numbered(rest)?),
    };
    let own = match (family, clip) {
        ("eva_giant", false) => GIANT,
        ("eva_giant", true) => CLIP_GIANT,
        ("eva02_tiny", false) => TINY,
        ("eva02_small", false) => SMALL,
        ("eva02_base", false) => BASE,
        ("eva02_base", true) => CLIP_BASE,
        ("eva02_large", false) => LARGE,
        ("eva02_large", true) => CLIP_LARGE,
        ("eva02_enormous", true) => CLIP_ENORMOUS,
        _ => return None,
    };
    Some(EvaConfig { image_size: size, patch_size, ..own })
}

pub(crate) const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];
pub(crate) const LAYER: &[Rule] = &[Rename("weight", "Layer.weight"), Rename("bias", "Layer.bias")];
pub(crate) const RMS: &[Rule] = &[Rename("weight", "Rms.weight")];

/// timm fuses the three projections or not; the authors too, and keep the biases apart.
const ATTENTION: &[Rule] = &[
    Rename("q_proj.weight", "query.weight"),
    Rename("k_proj.weight", "key.weight"),
    Rename("v_proj.weight", "value.weight"),
    Split("qkv.weight", &["query.weight", "key.weight", "value.weight"]),
    Rename("q_bias", "query.bias"),
    Rename("v_bias", "value.bias"),
    Rename("q_proj.bias", "query.bias"),
    Rename("v_proj.bias", "value.bias"),
    Under("proj.", "output.", PAIR),
    Ignore("rope.{*}"),
];

const PLAIN: &[Rule] = &[Under("fc1.", "Plain.up.", PAIR), Under("fc2.", "Plain.down.", PAIR)];

macro_rules! gated {
    ($norm:expr) => {
        &[
            // the authors, in one piece and in three
            Under("w1.", "Gated.projections.gate.", PAIR),
            Under("w2.", "Gated.projections.up.", PAIR),
            Under("w3.", "Gated.projections.down.", PAIR),
            Split("w12.weight", &["Gated.projections.gate.weight", "Gated.projections.up.weight"]),
            Split("w12.bias", &["Gated.projections.gate.bias", "Gated.projections.up.bias"]),
            Under("ffn_ln.", "Gated.norm.", $norm),
            // timm
            Under("fc1_g.", "Gated.projections.gate.", PAIR),
            Under("fc1_x.", "Gated.projections.up.", PAIR),
            Split("fc1.weight", &["Gated.projections.gate.weight", "Gated.projections.up.weight"]),
            Split("fc1.bias", &["Gated.projections.gate.bias", "Gated.projections.up.bias"]),
            Under("fc2.", "Gated.projections.down.", PAIR),
            Under("norm.", "Gated.norm.", $norm),
        ]
    };
}

macro_rules! trunk {
    ($norm:expr, $mlp:expr) => {
        &[
            Under("patch_embed.proj.", "patches.", PAIR),
            Reshape("cls_token", "class_token", Ones::Before(2)),
            Reshape("mask_token", "mask_token", Ones::Before(2)),
            Reshape("pos_embed", "positions.weight", Ones::Before(1)),
            Under(
                "blocks.{}.",
                "blocks.{}.",
                &[
                    Under("norm1.", "norm1.", $norm),
                    Under("attn.", "attention.", ATTENTION),
                    Under("attn.inner_attn_ln.", "attention_norm.", $norm),
                    Under("attn.norm.", "attention_norm.", $norm),
                    Under("norm2.", "norm2.", $norm),
                    Under("mlp.", "mlp.", $mlp),
                ],
            ),
            Under("norm.", "norm.", $norm),
            Under("fc_norm.", "pooled_norm.", $norm),
            Under("head.", "head.", PAIR),
            Under("lm_head.", "head.", PAIR),
            Ignore("rope.{*}"),
        ]
    };
}

/// Keys of an EVA with layer norms and plain MLPs, of timm and of the authors.
pub const TRUNK: &[Rule] = trunk!(LAYER, PLAIN);
/// The same with gated MLPs.
pub const TRUNK_GATED: &[Rule] = trunk!(LAYER, gated!(LAYER));
/// The same with norms by root mean squares.
pub const TRUNK_RMS: &[Rule] = trunk!(RMS, PLAIN);
/// The same with both.
pub const TRUNK_RMS_GATED: &[Rule] = trunk!(RMS, gated!(RMS));

/// [`TRUNK`] as a whole file.
pub const KEYS: KeyMap = KeyMap::new(TRUNK);
/// [`TRUNK_GATED`] as a whole file.
pub const KEYS_GATED: KeyMap = KeyMap::new(TRUNK_GATED);
/// [`TRUNK_RMS`] as a whole file.
pub const KEYS_RMS: KeyMap = KeyMap::new(TRUNK_RMS);
/// [`TRUNK_RMS_GATED`] as a whole file.
pub const KEYS_RMS_GATED: KeyMap = KeyMap::new(TRUNK_RMS_GATED);

/// EVA as the registry knows it.
pub const SYSTEM: System = System {
    name: "eva",
    about: "vision transformers that predict CLIP's features: EVA-01, EVA-02",
    file: "models/eva.rs",
    tasks: &["forward"],
    proved: &["timm_eva_giant", "timm_eva02", "timm_eva02_packed", "eva_mim", "eva02_mim"],
    presets: PRESETS,
    recognises: |_, config| config.and_then(Layout::of).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, _) = EvaConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let (config, layout) = EvaConfig::of(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// An EVA behind the forward contract.
struct Runner {
    model: Eva,
    config: EvaConfig,
    layout: Layout,
}

impl Forward for Runner {
    /// timm's layout takes `pixel_values`; the masked pretraining `image`, `bool_masked_pos` and, for the loss,
    /// `clip_targets` `[masked, width]`.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        match self.layout {
            Layout::Timm => self.pooled(inputs),
            Layout::Masked => self.masked(inputs),
        }
    }
}

impl EvaConfig {
    /// The pictures of the input `name`, if they fit; a problem is noted if not.
    pub(crate) fn pixels(&self, inputs: &mut Inputs, name: &'static str) -> Option<Tensor<4>> {
        inputs.needed_pictures(name, [self.channels, self.image_size, self.image_size])
    }
}

impl Runner {
    fn pooled(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pixels = self.config.pixels(&mut inputs, "pixel_values");
        inputs.finish()?;
        let Some(pixels) = pixels else { return Ok(Outputs::new()) }; // finished with an error
        let hidden = self.model.forward(pixels.cast(self.model.patches.weight.val().dtype()));
        let head = self.model.pool(hidden.clone());
        Ok(timm_outputs(hidden, head))
    }

    fn masked(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pixels = self.config.pixels(&mut inputs, "image");
        let masked = inputs.mask("bool_masked_pos");
        let targets = inputs.float::<2>("clip_targets");
        inputs.missing("bool_masked_pos");
        let patches = self.config.side().pow(2);
        if let (Some(pixels), Some(masked)) = (&pixels, &masked)
            && masked.dims() != [pixels.dims()[0], patches]
        {
            let expected = [pixels.dims()[0], patches];
            inputs.problem(format!("`bool_masked_pos` is {:?}, expected {expected:?}", masked.dims()));
        }
        let hidden =
            masked.as_ref().map_or(0, |masked| masked.clone().int().sum().into_scalar::<i64>() as usize);
        if let (Some(targets), Head::Masked(width)) = (&targets, self.config.head)
            && targets.dims() != [hidden, width]
        {
            inputs.problem(format!("`clip_targets` is {:?}, expected [{hidden}, {width}]", targets.dims()));
        }
        inputs.finish()?;
        let (Some(pixels), Some(masked)) = (pixels, masked) else { return Ok(Outputs::new()) }; // as above
        let pixels = pixels.cast(self.model.patches.weight.val().dtype());
        let features = self.model.forward_masked(pixels, masked.clone());
        let mut outputs = vec![output("features", features.clone())];
        if let Some(predictions) = self.model.predict(features, masked) {
            outputs.push(output("predictions", predictions.clone()));
            outputs.extend(targets.map(|targets| {
                output(
                    "loss",
                    negative_cosine(predictions, targets.to_device(&self.model.class_token.device())),
                )
            }));
        }
        Ok(outputs)
    }
}

/// EVA-01, section 2.2: g, with 14 x 14 patches.
pub(crate) const GIANT: EvaConfig = EvaConfig {
    image_size: 224,
    patch_size: 14,
    channels: 3,
    d_model: 1408,
    d_ff: 6144,
    n_layers: 40,
    n_heads: 16,
    norm: NormKind::Layer,
    norm_eps: 1e-6,
    wiring: Wiring::Pre,
    qkv_bias: true,
    attention_norm: false,
    mlp: MlpKind::Plain,
    rope: None,
    last_norm: LastNorm::Pooled,
    pooling: Pooling::MeanOfPatches,
    head: Head::Absent,
};

/// EVA-02, table 3; its MLPs are 8/3 as wide as the model.
const TINY: EvaConfig = EvaConfig {
    d_model: 192,
    d_ff: 512,
    n_layers: 12,
    n_heads: 3,
    mlp: MlpKind::Gated,
    rope: Some(GridRope { pretrained_side: Some(16) }),
    ..GIANT
};
const SMALL: EvaConfig = EvaConfig { d_model: 384, d_ff: 1024, n_heads: 6, ..TINY };
const BASE: EvaConfig =
    EvaConfig { d_model: 768, d_ff: 2048, n_heads: 12, mlp: MlpKind::GatedNormed, ..TINY };
const LARGE: EvaConfig = EvaConfig { d_model: 1024, d_ff: 2730, n_layers: 24, n_heads: 16, ..BASE };

/// EVA-CLIP, tables of section 3: the class token stands for the picture.
pub(crate) const CLIP_GIANT: EvaConfig =
    EvaConfig { last_norm: LastNorm::Tokens, pooling: Pooling::Class, ..GIANT };
const CLIP_BASE: EvaConfig =
    EvaConfig { attention_norm: true, last_norm: LastNorm::Tokens, pooling: Pooling::Class, ..BASE };
pub(crate) const CLIP_LARGE: EvaConfig =
    EvaConfig { d_model: 1024, d_ff: 2730, n_layers: 24, n_heads: 16, ..CLIP_BASE };
pub(crate) const CLIP_ENORMOUS: EvaConfig =
    EvaConfig { d_model: 1792, d_ff: 15360, n_layers: 64, wiring: Wiring::Post, ..CLIP_GIANT };

const fn timm(name: &'static str, config: EvaConfig, parameters: usize) -> Preset {
    let (weights, license, source) = (Weights::Hub, "MIT", "timm, sum over the parameters");
    Preset { name, shape: Shape::Eva(config), weights, license, parameters, source }
}

const fn classes(config: EvaConfig, image_size: usize, classes: usize) -> EvaConfig {
    EvaConfig { image_size, head: Head::Projection(classes), ..config }
}

/// Published sizes. Several of the authors' trainings have one size; the name is of one of them.
pub const PRESETS: &[Preset] = &[
    timm("timm/eva_giant_patch14_224.clip_ft_in1k", classes(GIANT, 224, 1000), 1_012_555_112),
    timm("timm/eva_giant_patch14_336.m30m_ft_in22k_in1k", classes(GIANT, 336, 1000), 1_013_005_672),
    timm("timm/eva_giant_patch14_560.m30m_ft_in22k_in1k", classes(GIANT, 560, 1000), 1_014_447_464),
    timm("timm/eva_giant_patch14_clip_224.merged2b", classes(CLIP_GIANT, 224, 1024), 1_012_588_928),
    timm("timm/eva02_tiny_patch14_224.mim_in22k", TINY, 5_502_144),
    timm("timm/eva02_tiny_patch14_336.mim_in22k_ft_in1k", classes(TINY, 336, 1000), 5_756_584),
    timm("timm/eva02_small_patch14_224.mim_in22k", SMALL, 21_621_120),
    timm("timm/eva02_small_patch14_336.mim_in22k_ft_in1k", classes(SMALL, 336, 1000), 22_129_000),
    timm("timm/eva02_base_patch14_224.mim_in22k", BASE, 85_758_720),
    timm("timm/eva02_base_patch14_448.mim_in22k_ft_in22k", classes(BASE, 448, 21841), 103_144_273),
    timm("timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", classes(BASE, 448, 1000), 87_117_544),
    timm("timm/eva02_large_patch14_224.mim_m38m", LARGE, 303_268_800),
    timm("timm/eva02_large_patch14_448.mim_m38m_ft_in22k", classes(LARGE, 448, 21841), 326_442_257),
    timm("timm/eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", classes(LARGE, 448, 1000), 305_080_232),
    timm("timm/eva02_base_patch16_clip_224.merged2b", CLIP_BASE_16, 86_263_040),
    timm("timm/eva02_large_patch14_clip_224.merged2b", classes(CLIP_LARGE, 224, 768), 304_105_152),
    timm("timm/eva02_large_patch14_clip_336.merged2b", classes(CLIP_LARGE, 336, 768), 304_432_832),
    timm(
        "timm/eva02_enormous_patch14_clip_224.laion2b_plus",
        classes(CLIP_ENORMOUS, 224, 1024),
        4_350_556_928,
    ),
];
pub(crate) const CLIP_BASE_16: EvaConfig = EvaConfig { patch_size: 16, ..classes(CLIP_BASE, 224, 512) };

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Distribution, Int, Tolerance};
    use fastrand::Rng;
    use volary_vision::masking::PatchDropout;
    use volary_weights::parameters;

    use super::*;

    const TOY: EvaConfig = EvaConfig {
        image_size: 8,
        patch_size: 2,
        d_model: 16,
        d_ff: 24,
        n_layers: 2,
        n_heads: 2,
        head: Head::Masked(5),
        last_norm: LastNorm::Tokens,
        ..BASE
    };

    fn variants() -> Vec<EvaConfig> {
        let mut variants = Vec::new();
        for norm in [NormKind::Layer, NormKind::Rms] {
            for mlp in [MlpKind::Plain, MlpKind::Gated, MlpKind::GatedNormed] {
                for wiring in [Wiring::Pre, Wiring::Post] {
                    let attention_norm = mlp == MlpKind::GatedNormed;
                    variants.push(EvaConfig { norm, mlp, wiring, attention_norm, ..TOY });
                }
            }
        }
        variants
    }

    fn pixels(batch: usize) -> Tensor<4> {
        Tensor::random([batch, 3, 8, 8], Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        for config in variants() {
            let keys = config.keys();
            for parameter in parameters(&config.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
            }
        }
    }

    /// Rows of a batch do not see each other.
    #[test]
    fn a_picture_alone_gives_what_it_gives_in_a_batch() {
        for config in variants() {
            let (model, pixels) = (config.init(&Device::flex()), pixels(3));
            let whole = model.forward(pixels.clone()).narrow(0, 1, 1).into_data();
            let alone = model.forward(pixels.narrow(0, 1, 1)).into_data();
            alone.assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-5));
        }
    }

    /// Patches that are left out change nothing, in whatever wiring; with all of them the numbers are the whole picture's.
    #[test]
    fn patches_that_are_left_out_are_not_seen() {
        for config in variants() {
            let (model, pixels) = (config.init(&Device::flex()), pixels(2));
            let all = PatchDropout { rate: 0.0 }.draw(2, 16, &mut Rng::with_seed(1));
            let whole = model.forward(pixels.clone()).into_data();
            let found = model.forward_kept(pixels.clone(), &all).into_data();
            found.assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-5));
            let half = PatchDropout { rate: 0.5 }.draw(2, 16, &mut Rng::with_seed(1));
            let seen = model.forward_kept(pixels.clone(), &half);
            assert_eq!(seen.dims(), [2, 9, 16]);
            let missing: Vec<i64> =
                (0..16).filter(|patch| !half.rows().any(|row| row.contains(patch))).collect();
            for patch in missing {
                let (top, left) = (patch as usize / 4 * 2, patch as usize % 4 * 2);
                let painted = pixels.clone().slice_fill([0..2, 0..3, top..top + 2, left..left + 2], 9.0);
                let found = model.forward_kept(painted, &half).into_data();
                found.assert_approx_eq::<f32>(&seen.to_data(), Tolerance::absolute(1e-6));
            }
        }
    }

    /// A row is turned by the places of its own patches: alone it gives what it gives beside another one.
    #[test]
    fn patches_that_stay_keep_their_places() {
        let (model, pixels) = (TOY.init(&Device::flex()), pixels(2));
        let kept = PatchDropout { rate: 0.7 }.draw(2, 16, &mut Rng::with_seed(3));
        let rows: Vec<&[i64]> = kept.rows().collect();
        assert_ne!(rows[0], rows[1]);
        let both = model.forward_kept(pixels.clone(), &kept);
        // the same patches as pictures of their own: the others are hidden from the attention by a mask
        for (row, patches) in rows.iter().enumerate() {
            let x = model.positioned(model.patches.forward(pixels.clone().narrow(0, row, 1)));
            let mut seen = [false; 17];
            seen[0] = true;
            patches.iter().for_each(|&patch| seen[1 + patch as usize] = true);
            let rope = model.rope.as_ref().unwrap().init(&x.device());
            let mask = Mask::Padding(Tensor::<1, Bool>::from_data(seen, &x.device()).unsqueeze());
            let x = model.blocks.iter().fold(x, |x, block| {
                let normed = block.norm1.forward(x.clone());
                let turned = |x: Tensor<4>| rope.apply(x, &Positions::From(0));
                let (key, value) = block.attention.keys_values(normed.clone());
                let query = turned(block.attention.queries(normed));
                let attended = ops::attention(query, turned(key), value, &mask, None);
                let attended = attended.swap_dims(1, 2).reshape([1, 17, 16]);
                let x = x + block.attention.output.forward(super::normed(&block.attention_norm, attended));
                x.clone() + block.mlp.forward(block.norm2.forward(x))
            });
            let places: Vec<i64> = [0].into_iter().chain(patches.iter().map(|patch| 1 + patch)).collect();
            let places = Tensor::<1, Int>::from_data(&places[..], &x.device());
            let alone = model.normed(x.select(1, places)).into_data();
            both.clone()
                .narrow(0, row, 1)
                .into_data()
                .assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-5));
        }
    }

    /// What is under a mask changes nothing; what is beside it does.
    #[test]
    fn masked_patches_are_not_seen() {
        let model = TOY.init(&Device::flex());
        let mut hidden = [false; 16];
        hidden[5] = true; // row 1, column 1: pixels 2 and 3 of both axes
        let masked = || Tensor::<1, Bool>::from_data(hidden, &Device::flex()).unsqueeze();
        let pixels = pixels(1);
        let features = |pixels: Tensor<4>| model.forward_masked(pixels, masked()).into_data();
        let expected = features(pixels.clone());
        let painted = |at: usize| pixels.clone().slice_fill([0..1, 0..3, at..at + 2, at..at + 2], 9.0);
        features(painted(2)).assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-6));
        let beside = features(painted(4));
        let differ = beside.iter::<f32>().zip(expected.iter::<f32>()).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(differ);
        let predicted = model.predict(model.forward_masked(pixels.clone(), masked()), masked());
        assert_eq!(predicted.unwrap().dims(), [1, 5]);
        let nothing = Tensor::<2, Bool>::full([1, 16], false, &Device::flex());
        assert!(model.predict(model.forward(pixels), nothing).is_none());
    }

    /// The same direction is -1, the opposite 1, a right angle 0; lengths do not matter.
    #[test]
    fn the_loss_is_the_mean_negative_cosine() {
        let rows = |rows: [[f32; 2]; 3]| Tensor::<2>::from_data(rows, &Device::flex());
        let of = |a, b| negative_cosine(rows(a), rows(b)).into_scalar::<f32>();
        let x = [[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]];
        assert!((of(x, [[6.0, 8.0], [5.0, 0.0], [0.0, 0.1]]) + 1.0).abs() < 1e-6);
        assert!((of(x, [[-3.0, -4.0], [0.0, 7.0], [0.0, 1.0]]) - 0.0).abs() < 1e-6);
    }

    /// EVA-02 L's MLP is 8/3 as wide as the model, rounded down, at every width.
    #[test]
    fn the_width_of_a_gated_mlp_follows_that_of_the_model() {
        let width = |d_model: usize| {
            let args = format!(r#"{{"embed_dim": {d_model}, "num_heads": 4}}"#);
            EvaConfig::timm_args(LARGE, &config(&args), 0).unwrap().d_ff
        };
        assert_eq!([width(1024), width(96), width(32)], [2730, 256, 85]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (text, named) in [
            (r#"{"architecture": "eva02_colossal_patch14_224"}"#, "`architecture`"),
            (
                r#"{"architecture": "eva02_base_patch14_224", "model_args": {"qk_norm": true}}"#,
                "`model_args.qk_norm`",
            ),
            (
                r#"{"architecture": "eva02_base_patch14_224", "model_args": {"num_heads": 7}}"#,
                "`model_args.num_heads`: expected a divisor of 768",
            ),
            (
                r#"{"architecture": "eva02_base_patch14_224", "model_args": {"num_heads": 384}}"#,
                "a multiple of 4 channels",
            ),
            (
                r#"{"architecture": "eva02_base_patch14_224", "model_args": {"img_size": 8}}"#,
                "at most the picture's 8 pixels",
            ),
            (
                r#"{"architecture": "eva02_base_patch14_224", "model_args": {"color": 8}}"#,
                "`model_args.color`",
            ),
            (
                r#"{"architecture": "eva_giant_patch14_224", "model_args": {"scale_mlp": true}}"#,
                "`model_args.scale_mlp`",
            ),
        ] {
            let message = EvaConfig::timm(&config(text)).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        let message = EvaConfig::masked(&config(r#"{"subln": true}"#)).unwrap_err().to_string();
        assert!(message.contains("`subln`"), "{message}");
    }
}
