//! ViT: the vision transformer, a picture as a sequence of patches (Dosovitskiy et al. 2020,
//! <https://arxiv.org/abs/2010.11929>).
//!
//! The numbers match `transformers` (`ViTModel`, `ViTForImageClassification`) and timm (`VisionTransformer`
//! with its registers, layer scales, norms and poolings), whose two layouts are read: Google's uploads and the
//! `vit_*` ones of timm. So is EVA's large size (Fang et al. 2022, <https://arxiv.org/abs/2211.07636>), which is no
//! [`mod@crate::eva`] but a plain vision transformer: `eva_large_patch14_*` of timm.
//!
//! ```sh
//! volary forward path/to/vit-base-patch16-224 --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, LayerNorm, LearnedPositions, Linear, LinearConfig, Mlp, MlpConfig,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_vision::masking::Kept;
use volary_vision::patch::PatchEmbedding;
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Ignore, Rename, Reshape, Split, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a vision transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Height and width of the input in pixels.
    pub image_size: [usize; 2],
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
    /// The MLP's activation.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// Whether a class token comes first.
    pub class_token: bool,
    /// Learned tokens between the class token and the patches (Darcet et al. 2023).
    pub n_registers: usize,
    /// Which tokens have a position.
    pub positioned: Positioned,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether queries and keys are normalised head by head.
    pub qk_norm: bool,
    /// Whether the output projection and the MLP have a bias.
    pub projection_bias: bool,
    /// What a scale per channel on each residual branch starts from (Touvron et al. 2021), if there is one.
    pub layer_scale: Option<f64>,
    /// Whether there is a norm before the blocks, as in CLIP; then patches have no bias.
    pub pre_norm: bool,
    /// Where the last norm stands.
    pub last_norm: LastNorm,
    /// What stands for the picture.
    pub pooling: Pooling,
    /// What is done with it.
    pub head: Head,
}

/// Which tokens have a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positioned {
    /// All of them.
    All,
    /// The patches.
    Patches,
    /// None: the patches are a set.
    Nothing,
}

/// Where the last norm stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastNorm {
    /// Before the pooling, on all tokens.
    Tokens,
    /// After the pooling.
    Pooled,
    /// Nowhere.
    Absent,
}

/// What stands for the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// The class token.
    Class,
    /// The mean of the patches.
    MeanOfPatches,
    /// The mean of all tokens.
    MeanOfAll,
    /// All tokens, one by one.
    Nothing,
}

/// What is done with what stands for the picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Nothing.
    Absent,
    /// A projection to this width, and its activation.
    Pooler(usize, Activation),
    /// A score for each of so many classes.
    Classes(usize),
}

/// A vision transformer.
#[derive(Module, Debug)]
pub struct Vit {
    /// `[d_model, channels, patch_size, patch_size]`.
    pub patches: PatchEmbedding,
    /// `[d_model]`.
    pub class_token: Option<Param<Tensor<1>>>,
    /// `[n_registers, d_model]`.
    pub registers: Option<Param<Tensor<2>>>,
    /// `[positioned tokens, d_model]`.
    pub positions: Option<LearnedPositions>,
    /// Before the blocks.
    pub pre_norm: Option<LayerNorm>,
    /// The blocks.
    pub blocks: Vec<VitBlock>,
    /// After the blocks, on all tokens.
    pub norm: Option<LayerNorm>,
    /// After the pooling.
    pub pooled_norm: Option<LayerNorm>,
    /// `[width of the head, d_model]`.
    pub head: Option<Linear>,
    #[module(skip)]
    positioned: Positioned,
    #[module(skip)]
    pooling: Pooling,
    #[module(skip)]
    head_activation: Option<Activation>,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct VitBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// On each head of the queries.
    pub query_norm: Option<LayerNorm>,
    /// On each head of the keys.
    pub key_norm: Option<LayerNorm>,
    /// On the attention's result.
    pub scale1: Option<LayerScale>,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    /// On the MLP's result.
    pub scale2: Option<LayerScale>,
    #[module(skip)]
    activation: Activation,
}

/// A learned factor per channel.
#[derive(Module, Debug)]
pub struct LayerScale {
    /// `[d_model]`.
    pub weight: Param<Tensor<1>>,
}

/// What stands for a picture, and what the head makes of it; `D` is 2, or 3 when tokens are not pooled.
#[derive(Clone, Debug)]
pub struct HeadOutput<const D: usize> {
    /// `[..., d_model]`.
    pub pooled: Tensor<D>,
    /// `[..., width of the head]`: scores, or the pooler's state; `pooled` itself without a head.
    pub output: Tensor<D>,
}

impl VitConfig {
    /// How many patches a picture has.
    pub const fn patches(&self) -> usize {
        let [height, width] = self.image_size;
        (height / self.patch_size) * (width / self.patch_size)
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Vit {
        let Self { d_model, n_registers, .. } = *self;
        let norm = |width| LayerNorm::new(width, self.layer_norm_eps, device);
        let normal = Initializer::Normal { mean: 0.0, std: 0.02 };
        let patches = PatchEmbedding::new(self.channels, self.patch_size, d_model, device);
        let positioned = match self.positioned {
            Positioned::All => usize::from(self.class_token) + n_registers + self.patches(),
            Positioned::Patches => self.patches(),
            Positioned::Nothing => 0,
        };
        let linear = |d_out| LinearConfig::new(d_model, d_out).init(device);
        let (head, head_activation) = match self.head {
            Head::Absent => (None, None),
            Head::Pooler(width, activation) => (Some(linear(width)), Some(activation)),
            Head::Classes(classes) => (Some(linear(classes)), None),
        };
        Vit {
            patches: if self.pre_norm { patches.without_bias() } else { patches },
            class_token: self.class_token.then(|| normal.init([d_model], device)),
            registers: (n_registers > 0).then(|| normal.init([n_registers, d_model], device)),
            positions: (positioned > 0).then(|| LearnedPositions::new(positioned, d_model, 0.02, device)),
            pre_norm: self.pre_norm.then(|| norm(d_model)),
            blocks: (0..self.n_layers).map(|_| self.block(device)).collect(),
            norm: (self.last_norm == LastNorm::Tokens).then(|| norm(d_model)),
            pooled_norm: (self.last_norm == LastNorm::Pooled).then(|| norm(d_model)),
            head,
            positioned: self.positioned,
            pooling: self.pooling,
            head_activation,
        }
    }

    /// An untrained block.
    pub(crate) fn block(&self, device: &Device) -> VitBlock {
        let Self { d_model, n_heads, .. } = *self;
        let norm = |width| LayerNorm::new(width, self.layer_norm_eps, device);
        let head_norm = || self.qk_norm.then(|| norm(d_model / n_heads));
        let scale = || self.layer_scale.map(|start| LayerScale::new(d_model, start, device));
        VitBlock {
            norm1: norm(d_model),
            attention: AttentionConfig::new(d_model, n_heads)
                .with_bias(self.qkv_bias)
                .with_output_bias(self.projection_bias)
                .init(device),
            query_norm: head_norm(),
            key_norm: head_norm(),
            scale1: scale(),
            norm2: norm(d_model),
            mlp: MlpConfig::new(d_model, self.d_ff).with_bias(self.projection_bias).init(device),
            scale2: scale(),
            activation: self.activation,
        }
    }
}

impl LayerScale {
    /// Untrained: `start` for each of `d_model` channels.
    pub fn new(d_model: usize, start: f64, device: &Device) -> Self {
        Self { weight: Initializer::Constant { value: start }.init([d_model], device) }
    }

    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        x * self.weight.val().unsqueeze()
    }
}

impl VitBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let attended = scaled(&self.scale1, self.attend(self.norm1.forward(x.clone())));
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, scaled(&self.scale2, self.mlp.forward(normed, self.activation)))
    }

    fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let query = normed(&self.query_norm, self.attention.queries(x.clone()));
        let (key, value) = self.attention.keys_values(x); // [batch, n_heads, seq, d_head]
        let key = normed(&self.key_norm, key);
        self.attention.merge(ops::attention(query, key, value, &Mask::Full, None))
    }
}

/// A branch with its scale, if it has one.
pub(crate) fn scaled(scale: &Option<LayerScale>, x: Tensor<3>) -> Tensor<3> {
    scale.iter().fold(x, |x, scale| scale.forward(x))
}

fn normed<const D: usize>(norm: &Option<LayerNorm>, x: Tensor<D>) -> Tensor<D> {
    norm.iter().fold(x, |x, norm| norm.forward(x))
}

impl Vit {
    /// Pixels `[batch, channels, height, width]`, normalised, to tokens `[batch, prefix + patches, d_model]`:
    /// class token, registers, patches.
    ///
    /// # Panics
    /// If the pictures have more or fewer patches than the model has positions.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.encode(self.embed(pixels))
    }

    /// [`Vit::forward`] in training with patches left out: the tokens that stay, `[batch, prefix + kept, d_model]`.
    ///
    /// # Panics
    /// As [`Vit::forward`]; if the pictures are others than `kept` was drawn for.
    pub fn forward_kept(&self, pixels: Tensor<4>, kept: &Kept) -> Tensor<3> {
        self.encode(kept.pick(self.embed(pixels), self.prefix()))
    }

    /// The tokens before the blocks, with their positions: `[batch, prefix + patches, d_model]`.
    fn embed(&self, pixels: Tensor<4>) -> Tensor<3> {
        let patches = self.patches.forward(pixels); // [batch, patches, d_model]
        match self.positioned {
            Positioned::All => self.add_positions(self.with_prefix(patches)),
            Positioned::Patches => self.with_prefix(self.add_positions(patches)),
            Positioned::Nothing => self.with_prefix(patches),
        }
    }

    /// `[batch, tokens, d_model] -> [batch, tokens, d_model]`.
    fn encode(&self, x: Tensor<3>) -> Tensor<3> {
        let x = normed(&self.pre_norm, x);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x));
        normed(&self.norm, x)
    }

    /// What stands for the picture in the tokens of [`Vit::forward`], and what the head makes of it:
    /// `[batch, tokens, d_model] -> [batch, ...]`.
    ///
    /// # Panics
    /// If the model does not pool ([`Pooling::Nothing`]): use [`Vit::head`] on the tokens.
    pub fn pool(&self, x: Tensor<3>) -> HeadOutput<2> {
        let [batch, tokens, d_model] = x.dims();
        let prefix = self.prefix();
        let x = match self.pooling {
            Pooling::Class => x.narrow(1, 0, 1),
            Pooling::MeanOfPatches => x.narrow(1, prefix, tokens - prefix).mean_dim(1),
            Pooling::MeanOfAll => x.mean_dim(1),
            Pooling::Nothing => panic!("this vision transformer does not pool its tokens"),
        };
        self.head(x.reshape([batch, d_model]))
    }

    /// The norm after the pooling and the head: `[..., d_model] -> [..., d_model]` and `[..., width]`.
    pub fn head<const D: usize>(&self, x: Tensor<D>) -> HeadOutput<D> {
        let pooled = normed(&self.pooled_norm, x);
        let output = self.head.iter().fold(pooled.clone(), |x, head| head.forward(x));
        let output = self.head_activation.iter().fold(output, |x, activation| activation.forward(x));
        HeadOutput { pooled, output }
    }

    fn add_positions(&self, x: Tensor<3>) -> Tensor<3> {
        let Some(positions) = &self.positions else { return x };
        let ([_, tokens, _], [expected, _]) = (x.dims(), positions.weight.dims());
        assert_eq!(tokens, expected, "tokens of the picture (left) and of the model");
        positions.forward(x)
    }

    /// `[batch, patches, d_model] -> [batch, prefix + patches, d_model]`.
    fn with_prefix(&self, patches: Tensor<3>) -> Tensor<3> {
        let [batch, _, d_model] = patches.dims();
        let class = self.class_token.as_ref().map(|token| token.val().unsqueeze::<2>());
        let registers = self.registers.as_ref().map(|tokens| tokens.val());
        let every = |tokens: Tensor<2>| {
            let [n, _] = tokens.dims();
            tokens.unsqueeze::<3>().expand([batch, n, d_model])
        };
        let prefix = class.into_iter().chain(registers).map(every);
        Tensor::cat(prefix.chain([patches]).collect(), 1)
    }

    /// How many tokens come before the patches.
    fn prefix(&self) -> usize {
        let registers = self.registers.as_ref().map_or(0, |tokens| tokens.dims()[0]);
        usize::from(self.class_token.is_some()) + registers
    }
}

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `transformers`.
    Transformers,
    /// timm.
    Timm,
}

impl Layout {
    /// The layout of a configuration, if it is one of a vision transformer.
    pub fn of(config: &Config) -> Option<Self> {
        match (config.text("model_type"), config.text("architecture")) {
            (Some("vit"), _) => Some(Self::Transformers),
            (_, Some(name)) if name.starts_with("vit_") || name.starts_with("eva_large_") => Some(Self::Timm),
            _ => None,
        }
    }

    /// The key map of the layout.
    pub const fn keys(self, head: Head) -> &'static KeyMap {
        match (self, head) {
            (Self::Timm, _) => &KEYS_TIMM,
            (Self::Transformers, Head::Classes(_)) => &KEYS_CLASSIFIER,
            (Self::Transformers, _) => &KEYS,
        }
    }
}

impl VitConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let config = folder.config("config.json")?;
        match Layout::of(&config) {
            Some(Layout::Transformers) => {
                let vit = Self::transformers(&config)?;
                let checkpoint = folder.checkpoint()?;
                let pooler = |name: &str| name.strip_prefix("vit.").unwrap_or(name) == "pooler.dense.weight";
                let pooler = checkpoint.entries().iter().any(|entry| pooler(&entry.name));
                let head = match vit.head {
                    Head::Pooler(..) if !pooler => Head::Absent,
                    head => head,
                };
                Ok((Self { head, ..vit }, Layout::Transformers))
            }
            Some(Layout::Timm) => Ok((Self::timm(&config)?, Layout::Timm)),
            None => Err(config.error("model_type", "vit, or an `architecture` vit_*").into()),
        }
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `ViTConfig`. A head that only the
    /// weights can tell is a pooler.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn transformers(config: &Config) -> Result<Self, ConfigError> {
        let d_model = config.size_or("hidden_size", 768)?;
        let n_heads = config.size_or("num_attention_heads", 12)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        config.only("head_dim", &[&(d_model / n_heads).to_string()])?;
        let head = match config.first_of("architectures") {
            None | Some("ViTModel") => {
                let activation = config.activation_or("pooler_act", Activation::Tanh)?;
                Head::Pooler(config.size_or("pooler_output_size", d_model)?, activation)
            }
            Some("ViTForImageClassification") => Head::Classes(labels(config)?),
            Some(_) => return Err(config.error("architectures", "ViTModel or ViTForImageClassification")),
        };
        Self {
            image_size: sides_or(config, "image_size", 224)?,
            patch_size: side_or(config, "patch_size", 16)?,
            channels: config.size_or("num_channels", 3)?,
            d_model,
            d_ff: config.size_or("intermediate_size", 3072)?,
            n_layers: config.blocks_or("num_hidden_layers", 12)?,
            n_heads,
            activation: config.activation_or("hidden_act", Activation::Gelu)?,
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-12)?,
            qkv_bias: config.flag_or("qkv_bias", true)?,
            head,
            ..BASE
        }
        .checked(config)
    }

    /// `config.json` of timm: `model_args` over the architecture's own arguments, and over what
    /// `pretrained_cfg` says of input and classes.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn timm(config: &Config) -> Result<Self, ConfigError> {
        let architecture = config.text("architecture").and_then(architecture);
        let known = "vit_{tiny,small,base,large,huge,giant,gigantic}_patch{N}_ with {N}, clip_{N}, \
                     clip_quickgelu_{N}, dinov2 or reg4_dinov2; or eva_large_patch14_{N}";
        let own = architecture.ok_or_else(|| config.error("architecture", known))?;
        let args = config.object_or_empty("model_args")?;
        timm_args(&args, &[ARGS, ARGS_OF_TRAINING], ARGS_FIXED)?;
        let pretrained = timm_pretrained(config)?;
        let (channels, image_size) = timm_input(&pretrained, &args, 224)?;
        let classes = timm_classes(config, &pretrained, &args)?;

        let d_model = args.size_or("embed_dim", own.d_model)?;
        let d_ff = mlp_width(&args, own.mlp_ratio, d_model)?;
        let n_heads = args.size_or("num_heads", own.n_heads)?;
        args.divides("num_heads", n_heads, d_model)?;
        let class_token = args.flag_or("class_token", true)?;
        let n_registers = match args.integer_or("reg_tokens", own.n_registers)? {
            n @ 0..=0x8000_0000 => n as usize,
            _ => return Err(args.error("reg_tokens", "a whole number from 0 to 2147483648")),
        };
        let pooling = match (args.text("global_pool"), args.flag_or("pool_include_prefix", false)?) {
            (None, _) if args.has("global_pool") => return Err(args.error("global_pool", "a text")),
            (None, _) => own.pooling,
            (Some("token"), _) => Pooling::Class,
            (Some("avg"), false) => Pooling::MeanOfPatches,
            (Some("avg"), true) => Pooling::MeanOfAll,
            (Some(""), _) => Pooling::Nothing,
            (Some(_), _) => {
                return Err(
                    args.error("global_pool", "token, avg or an empty text (others are not supported)")
                );
            }
        };
        if pooling == Pooling::Class && !class_token {
            return Err(args.error("class_token", "true, as the class token is what is pooled"));
        }
        let mean = matches!(pooling, Pooling::MeanOfPatches | Pooling::MeanOfAll);
        let last_norm = match (args.flag_or("final_norm", true)?, args.flag_or("fc_norm", mean)?) {
            (false, _) => LastNorm::Absent,
            (true, true) => LastNorm::Pooled,
            (true, false) => LastNorm::Tokens,
        };
        let positioned = match args.text("pos_embed") {
            Some("" | "none") => Positioned::Nothing,
            _ if args.flag_or("no_embed_class", own.no_embed_class)? => Positioned::Patches,
            _ => Positioned::All,
        };
        let layer_scale = args.number_or("init_values", own.init_values)?;
        Self {
            image_size,
            patch_size: side_or(&args, "patch_size", own.patch_size)?,
            channels,
            d_model,
            d_ff,
            n_layers: args.blocks_or("depth", own.n_layers)?,
            n_heads,
            activation: timm_activation(&args, own.activation)?,
            layer_norm_eps: own.layer_norm_eps,
            class_token,
            n_registers,
            positioned,
            qkv_bias: args.flag_or("qkv_bias", true)?,
            qk_norm: args.flag_or("qk_norm", false)?,
            projection_bias: args.flag_or("proj_bias", true)?,
            layer_scale: (layer_scale != 0.0).then_some(layer_scale),
            pre_norm: args.flag_or("pre_norm", own.pre_norm)?,
            last_norm,
            pooling,
            head: match classes {
                0 => Head::Absent,
                classes => Head::Classes(classes),
            },
        }
        .checked(&args)
    }

    /// That a picture has patches.
    fn checked(self, config: &Config) -> Result<Self, ConfigError> {
        let [height, width] = self.image_size;
        if self.patches() == 0 {
            return Err(
                config.error("patch_size", &format!("at most the picture's {height} x {width} pixels"))
            );
        }
        Ok(self)
    }
}

/// The number of classes of a classifier of transformers.
pub(crate) fn labels(config: &Config) -> Result<usize, ConfigError> {
    match config.count("id2label") {
        Some(0) => Err(config.error("id2label", "at least one class")),
        Some(classes) => Ok(classes),
        None => config.size_or("num_labels", 2),
    }
}

/// What timm's `config.json` says of the training; before there was a `pretrained_cfg`, its fields stood by themselves.
pub(crate) fn timm_pretrained(config: &Config) -> Result<Config, ConfigError> {
    if config.has("pretrained_cfg") { config.object("pretrained_cfg") } else { Ok(config.clone()) }
}

/// Channels, height and width of a timm model's input: of `model_args`, of `pretrained_cfg` what is fixed there, or `side`.
pub(crate) fn timm_input(
    pretrained: &Config,
    args: &Config,
    side: usize,
) -> Result<(usize, [usize; 2]), ConfigError> {
    let input = match pretrained.sizes("input_size").as_deref() {
        Some(&[channels, height, width]) if channels > 0 => Some((channels, [height, width])),
        None if !pretrained.has("input_size") => None,
        _ => return Err(pretrained.error("input_size", "channels, height and width")),
    };
    let channels = args.size_or("in_chans", input.map_or(3, |(channels, _)| channels))?;
    let fixed = pretrained.flag_or("fixed_input_size", false)? && !args.flag_or("dynamic_img_size", false)?;
    let size = match input {
        Some((_, size)) if fixed && !args.has("img_size") => size,
        _ => sides_or(args, "img_size", side)?,
    };
    Ok((channels, size))
}

/// The number of classes of a timm model, 0 without a head: of `model_args`, of the file, or of `pretrained_cfg`.
pub(crate) fn timm_classes(
    config: &Config,
    pretrained: &Config,
    args: &Config,
) -> Result<usize, ConfigError> {
    let classes = if config.has("num_classes") { config } else { pretrained };
    let classes = match classes.integer_or("num_classes", 1000)? {
        classes if classes < 0 => 1000,
        classes => classes,
    };
    match args.integer_or("num_classes", classes)? {
        classes @ 0..=0x8000_0000 => Ok(classes as usize),
        _ => Err(args.error("num_classes", "a whole number from 0 to 2147483648")),
    }
}

/// The width of an MLP by its `mlp_ratio` to the model's, rounded down.
pub(crate) fn mlp_width(config: &Config, ratio: f64, d_model: usize) -> Result<usize, ConfigError> {
    match config.number_or("mlp_ratio", ratio)? * d_model as f64 {
        d_ff @ 1.0..=2_147_483_648.0 => Ok(d_ff as usize),
        _ => Err(config.error("mlp_ratio", "a ratio that leaves the MLP a width")),
    }
}

/// Sides beyond this are no pictures.
const MAX_SIDE: usize = 65536;

/// A side in pixels, alone or as two that are equal.
pub(crate) fn side_or(config: &Config, field: &str, default: usize) -> Result<usize, ConfigError> {
    match sides_or(config, field, default)? {
        [height, width] if height == width => Ok(height),
        _ => Err(config.error(field, "a square (others are not supported)")),
    }
}

/// Height and width in pixels, or the one side of a square.
pub(crate) fn sides_or(config: &Config, field: &str, default: usize) -> Result<[usize; 2], ConfigError> {
    match config.sizes(field).as_deref() {
        Some(&[height @ 1..=MAX_SIDE, width @ 1..=MAX_SIDE]) => Ok([height, width]),
        None if !config.has(field) => Ok([default; 2]),
        None => match config.size(field)? {
            side @ 1..=MAX_SIDE => Ok([side; 2]),
            _ => Err(config.error(field, "at most 65536 pixels")),
        },
        Some(_) => Err(config.error(field, "one or two whole numbers from 1 to 65536")),
    }
}

/// What an architecture of timm says of itself.
struct Architecture {
    patch_size: usize,
    d_model: usize,
    n_layers: usize,
    n_heads: usize,
    mlp_ratio: f64,
    activation: Activation,
    layer_norm_eps: f64,
    pre_norm: bool,
    init_values: f64,
    n_registers: i64,
    no_embed_class: bool,
    pooling: Pooling,
}

/// Widths, depths, heads and MLP ratios of timm's sizes.
const SIZES: &[(&str, usize, usize, usize, f64)] = &[
    ("tiny", 192, 12, 3, 4.0),
    ("small", 384, 12, 6, 4.0),
    ("base", 768, 12, 12, 4.0),
    ("large", 1024, 24, 16, 4.0),
    ("huge", 1280, 32, 16, 4.0),
    ("giant", 1408, 40, 16, 48.0 / 11.0),
    ("gigantic", 1664, 48, 16, 64.0 / 13.0),
];

/// `vit_{size}_patch{N}_{rest}` or `eva_large_patch14_{N}`.
fn architecture(name: &str) -> Option<Architecture> {
    let (family, name) = name.split_once('_').filter(|(family, _)| ["vit", "eva"].contains(family))?;
    let (size, rest) = name.split_once("_patch")?;
    let &(_, d_model, n_layers, n_heads, mlp_ratio) = SIZES.iter().find(|row| row.0 == size)?;
    let (patch_size, rest) = rest.split_once('_')?;
    let plain = Architecture {
        patch_size: patch_size.parse().ok().filter(|&side| side > 0)?,
        d_model,
        n_layers,
        n_heads,
        mlp_ratio,
        activation: Activation::Gelu,
        layer_norm_eps: 1e-6,
        pre_norm: false,
        init_values: 0.0,
        n_registers: 0,
        no_embed_class: false,
        pooling: Pooling::Class,
    };
    let clip = Architecture { pre_norm: true, layer_norm_eps: 1e-5, ..plain };
    let is_number = |text: &str| text.parse::<usize>().is_ok();
    if family == "eva" {
        let eva = Architecture { pooling: Pooling::MeanOfPatches, ..plain };
        return (size == "large" && is_number(rest)).then_some(eva);
    }
    Some(match rest {
        // the giant one has another width, and a gated MLP
        "dinov2" if size != "giant" => Architecture { init_values: 1e-5, ..plain },
        "reg4_dinov2" if size != "giant" => {
            Architecture { init_values: 1e-5, n_registers: 4, no_embed_class: true, ..plain }
        }
        rest if is_number(rest) => plain,
        rest if rest.strip_prefix("clip_quickgelu_").is_some_and(is_number) => {
            Architecture { activation: Activation::QuickGelu, ..clip }
        }
        rest if rest.strip_prefix("clip_").is_some_and(is_number) => clip,
        _ => return None,
    })
}

/// Arguments of timm's `VisionTransformer` that are read.
const ARGS: &[&str] = &[
    "img_size",
    "patch_size",
    "in_chans",
    "num_classes",
    "global_pool",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "qk_norm",
    "proj_bias",
    "init_values",
    "class_token",
    "no_embed_class",
    "reg_tokens",
    "pre_norm",
    "final_norm",
    "fc_norm",
    "pool_include_prefix",
    "act_layer",
];

/// Those that only matter for training; `dynamic_img_size` lets in other sizes, which are refused here.
const ARGS_OF_TRAINING: &[&str] = &[
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "weight_init",
    "fix_init",
    "dynamic_img_size",
];

/// Those of which only these values are built.
const ARGS_FIXED: &[(&str, &[&str])] = &[
    ("pos_embed", &["\"learn\"", "\"\"", "\"none\""]),
    ("scale_attn_norm", &["false"]),
    ("scale_mlp_norm", &["false"]),
    ("dynamic_img_pad", &["false"]),
    ("norm_layer", &["\"layernorm\"", "\"LayerNorm\"", "\"layer_norm\"", "\"\""]),
    ("embed_norm_layer", &["\"\""]),
    ("attn_layer", &["\"\"", "\"attn\""]),
];

/// Refuses arguments of timm that would change the numbers and are not built: all but those in `known`, and of those in
/// `fixed` all but some values.
pub(crate) fn timm_args(
    args: &Config,
    known: &[&[&str]],
    fixed: &[(&str, &[&str])],
) -> Result<(), ConfigError> {
    for (field, allowed) in fixed {
        args.only(field, allowed)?;
    }
    let is_known = |field: &str| {
        known.iter().any(|known| known.contains(&field)) || fixed.iter().any(|(name, _)| *name == field)
    };
    match args.fields().find(|&field| args.has(field) && !is_known(field)) {
        Some(field) => Err(args.error(field, "no such argument (it is not supported)")),
        None => Ok(()),
    }
}

fn timm_activation(args: &Config, default: Activation) -> Result<Activation, ConfigError> {
    if !args.has("act_layer") {
        return Ok(default);
    }
    Ok(match args.text("act_layer").map(str::to_lowercase).as_deref() {
        Some("" | "gelu") => Activation::Gelu,
        Some("gelu_tanh") => Activation::GeluTanh,
        Some("quick_gelu") => Activation::QuickGelu,
        Some("silu" | "swish") => Activation::Silu,
        Some("relu") => Activation::Relu,
        Some("tanh") => Activation::Tanh,
        _ => return Err(args.error("act_layer", "gelu, gelu_tanh, quick_gelu, silu, relu or tanh")),
    })
}

const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// Of one block.
pub(crate) const BLOCK: &[Rule] = &[
    Under("layernorm_before.", "norm1.", PAIR),
    Under("attention.attention.query.", "attention.query.", PAIR),
    Under("attention.attention.key.", "attention.key.", PAIR),
    Under("attention.attention.value.", "attention.value.", PAIR),
    Under("attention.output.dense.", "attention.output.", PAIR),
    Under("layernorm_after.", "norm2.", PAIR),
    Under("intermediate.dense.", "mlp.up.", PAIR),
    Under("output.dense.", "mlp.down.", PAIR),
];

/// All but the head.
pub(crate) const TRUNK: &[Rule] = &[
    Under("embeddings.patch_embeddings.projection.", "patches.", PAIR),
    Reshape("embeddings.cls_token", "class_token", Ones::Before(2)),
    Reshape("embeddings.position_embeddings", "positions.weight", Ones::Before(1)),
    Ignore("embeddings.mask_token"),
    Under("encoder.layer.{}.", "blocks.{}.", BLOCK),
    Under("layernorm.", "norm.", PAIR),
];

/// Keys of `ViTModel`; a classifier beside it is ignored.
pub const KEYS: KeyMap =
    KeyMap::new(&[Under("", "", TRUNK), Under("pooler.dense.", "head.", PAIR), Ignore("classifier.{*}")])
        .with_prefixes(&["vit."]);

/// Keys of `ViTForImageClassification`; a pooler beside it is ignored.
pub const KEYS_CLASSIFIER: KeyMap =
    KeyMap::new(&[Under("", "", TRUNK), Under("classifier.", "head.", PAIR), Ignore("pooler.{*}")])
        .with_prefixes(&["vit."]);

/// Keys of timm.
pub const KEYS_TIMM: KeyMap = KeyMap::new(&[
    Under("patch_embed.proj.", "patches.", PAIR),
    Reshape("cls_token", "class_token", Ones::Before(2)),
    Reshape("reg_token", "registers", Ones::Before(1)),
    Reshape("pos_embed", "positions.weight", Ones::Before(1)),
    Under("norm_pre.", "pre_norm.", PAIR),
    Under(
        "blocks.{}.",
        "blocks.{}.",
        &[
            Under("norm1.", "norm1.", PAIR),
            Split(
                "attn.qkv.weight",
                &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
            ),
            Split("attn.qkv.bias", &["attention.query.bias", "attention.key.bias", "attention.value.bias"]),
            Under("attn.q_norm.", "query_norm.", PAIR),
            Under("attn.k_norm.", "key_norm.", PAIR),
            Under("attn.proj.", "attention.output.", PAIR),
            Rename("ls1.gamma", "scale1.weight"),
            Under("norm2.", "norm2.", PAIR),
            Under("mlp.fc1.", "mlp.up.", PAIR),
            Under("mlp.fc2.", "mlp.down.", PAIR),
            Rename("ls2.gamma", "scale2.weight"),
        ],
    ),
    Under("norm.", "norm.", PAIR),
    Under("fc_norm.", "pooled_norm.", PAIR),
    Under("head.", "head.", PAIR),
    Ignore("pre_logits.{*}"),
]);

/// ViT as the registry knows it.
pub const SYSTEM: System = System {
    name: "vit",
    about: "vision transformers of transformers and timm",
    file: "models/vit.rs",
    tasks: &["forward"],
    proved: &["vit", "vit_f16", "timm_vit", "timm_eva_large"],
    presets: PRESETS,
    recognises: |_, config| config.and_then(Layout::of).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = VitConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), layout.keys(config.head))
    },
    open: |folder, options, device| {
        let (config, layout) = VitConfig::of(folder)?;
        let model = fill(folder, config.init(device), layout.keys(config.head), options)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// A vision transformer behind the forward contract.
struct Runner {
    model: Vit,
    config: VitConfig,
    layout: Layout,
}

impl Forward for Runner {
    /// `pixel_values`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let VitConfig { image_size: [height, width], channels, pooling, head, .. } = self.config;
        let pixels = inputs.needed_pictures("pixel_values", [channels, height, width]);
        inputs.finish()?;
        let Some(pixels) = pixels else { return Ok(Outputs::new()) }; // finished with an error

        let hidden = self.model.forward(pixels.cast(self.model.patches.weight.val().dtype()));
        Ok(match (self.layout, head, pooling) {
            (Layout::Timm, _, Pooling::Nothing) => {
                let head = self.model.head(hidden.clone());
                timm_outputs(hidden, head)
            }
            (Layout::Timm, ..) => {
                let head = self.model.pool(hidden.clone());
                timm_outputs(hidden, head)
            }
            (Layout::Transformers, Head::Classes(_), _) => {
                vec![output("logits", self.model.pool(hidden).output)]
            }
            (Layout::Transformers, Head::Pooler(..), _) => {
                let pooled = self.model.pool(hidden.clone()).output;
                vec![output("last_hidden_state", hidden), output("pooler_output", pooled)]
            }
            (Layout::Transformers, Head::Absent, _) => vec![output("last_hidden_state", hidden)],
        })
    }
}

/// What timm's models give of tokens `[batch, tokens, d_model]` and what is made of them.
pub(crate) fn timm_outputs<const D: usize>(hidden: Tensor<3>, head: HeadOutput<D>) -> Outputs {
    let HeadOutput { pooled, output: logits } = head;
    vec![output("forward_features", hidden), output("pre_logits", pooled), output("logits", logits)]
}

/// Dosovitskiy et al. 2020, table 1: ViT-B, with 16 x 16 patches.
pub(crate) const BASE: VitConfig = VitConfig {
    image_size: [224; 2],
    patch_size: 16,
    channels: 3,
    d_model: 768,
    d_ff: 3072,
    n_layers: 12,
    n_heads: 12,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-12,
    class_token: true,
    n_registers: 0,
    positioned: Positioned::All,
    qkv_bias: true,
    qk_norm: false,
    projection_bias: true,
    layer_scale: None,
    pre_norm: false,
    last_norm: LastNorm::Tokens,
    pooling: Pooling::Class,
    head: Head::Classes(1000),
};
const LARGE: VitConfig = VitConfig { d_model: 1024, d_ff: 4096, n_layers: 24, n_heads: 16, ..BASE };
const POOLER: Head = Head::Pooler(768, Activation::Tanh);

/// Steiner et al. 2021 (<https://arxiv.org/abs/2106.10270>), table 2; timm's norms add 1e-6.
const TIMM_BASE: VitConfig = VitConfig { layer_norm_eps: 1e-6, ..BASE };
const TIMM_SMALL: VitConfig = VitConfig { d_model: 384, d_ff: 1536, n_heads: 6, ..TIMM_BASE };
const TIMM_TINY: VitConfig = VitConfig { d_model: 192, d_ff: 768, n_heads: 3, ..TIMM_BASE };
const TIMM_LARGE: VitConfig = VitConfig { layer_norm_eps: 1e-6, ..LARGE };

const fn google(name: &'static str, config: VitConfig, parameters: usize) -> Preset {
    let source = match config.head {
        Head::Classes(_) => "transformers, ViTForImageClassification",
        _ => "transformers, ViTModel with its pooler",
    };
    let (shape, weights, license) = (Shape::Vit(config), Weights::Hub, "Apache-2.0");
    Preset { name, shape, weights, license, parameters, source }
}

const fn timm(name: &'static str, config: VitConfig, parameters: usize) -> Preset {
    let (shape, weights, license) = (Shape::Vit(config), Weights::Hub, "Apache-2.0");
    Preset { name, shape, weights, license, parameters, source: "timm, results-imagenet.csv (in millions)" }
}

/// EVA's large size, which pools by the mean.
const fn eva_large(name: &'static str, image_size: usize, parameters: usize) -> Preset {
    let config = VitConfig {
        image_size: [image_size; 2],
        patch_size: 14,
        last_norm: LastNorm::Pooled,
        pooling: Pooling::MeanOfPatches,
        ..TIMM_LARGE
    };
    let (shape, weights, source) = (Shape::Vit(config), Weights::Hub, "timm, sum over the parameters");
    Preset { name, shape, weights, license: "MIT", parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    google("google/vit-base-patch16-224", BASE, 86_567_656),
    google("google/vit-large-patch16-224", LARGE, 304_326_632),
    google("google/vit-base-patch16-224-in21k", VitConfig { head: POOLER, ..BASE }, 86_389_248),
    timm("timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", TIMM_TINY, 5_717_416),
    timm("timm/vit_small_patch16_224.augreg_in21k_ft_in1k", TIMM_SMALL, 22_050_664),
    timm("timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", TIMM_BASE, 86_567_656),
    timm("timm/vit_large_patch16_224.augreg_in21k_ft_in1k", TIMM_LARGE, 304_326_632),
    eva_large("timm/eva_large_patch14_196.in22k_ft_in22k_in1k", 196, 304_142_312),
    eva_large("timm/eva_large_patch14_336.in22k_ft_in22k_in1k", 336, 304_531_432),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{Distribution, FloatDType, TensorData, Tolerance};
    use fastrand::Rng;
    use volary_vision::masking::PatchDropout;
    use volary_weights::{LoadOptions, parameters};

    use super::*;

    const TINY: VitConfig = VitConfig {
        image_size: [4, 6],
        patch_size: 2,
        d_model: 8,
        d_ff: 16,
        n_layers: 2,
        n_heads: 2,
        n_registers: 2,
        layer_norm_eps: 1e-6,
        ..BASE
    };

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    fn pixels(config: &VitConfig) -> Tensor<4> {
        let [height, width] = config.image_size;
        let shape = [2, config.channels, height, width];
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    fn run(fixture: &str, inputs: &[(&str, TensorData)], options: &LoadOptions) -> Result<Outputs, Error> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
        crate::registry::forward(&Folder::Disk(folder), &inputs, options, &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_leads_back() {
        let everything = VitConfig { pre_norm: true, qk_norm: true, layer_scale: Some(1e-5), ..TINY };
        let pooled =
            VitConfig { last_norm: LastNorm::Pooled, pooling: Pooling::MeanOfPatches, ..everything.clone() };
        let cases =
            [(Layout::Transformers, BASE), (Layout::Transformers, VitConfig { head: POOLER, ..BASE })]
                .into_iter()
                .chain([TIMM_LARGE, everything, pooled].map(|config| (Layout::Timm, config)));
        for (layout, config) in cases {
            let keys = layout.keys(config.head);
            for parameter in parameters(&config.init(&Device::flex())) {
                let from = keys.keys(&parameter.path).unwrap();
                assert_eq!(from.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&from[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
            }
        }
    }

    /// Class token and registers stay; with all patches the numbers are the whole picture's; what is left out changes nothing.
    #[test]
    fn patches_that_are_left_out_are_not_seen() {
        for positioned in [Positioned::All, Positioned::Patches, Positioned::Nothing] {
            let config = VitConfig { positioned, ..TINY };
            let (model, pixels) = (config.init(&Device::flex()), pixels(&config));
            let all = PatchDropout { rate: 0.0 }.draw(2, 6, &mut Rng::with_seed(1));
            let whole = model.forward(pixels.clone()).into_data();
            let found = model.forward_kept(pixels.clone(), &all).into_data();
            found.assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-5));
            let one = PatchDropout { rate: 0.9 }.draw(2, 6, &mut Rng::with_seed(1));
            let seen = model.forward_kept(pixels.clone(), &one);
            assert_eq!(seen.dims(), [2, 4, 8]);
            let missing = (0..6).find(|patch| !one.rows().any(|row| row.contains(patch))).unwrap() as usize;
            let (top, left) = (missing / 3 * 2, missing % 3 * 2);
            let painted = pixels.slice_fill([0..2, 0..3, top..top + 2, left..left + 2], 9.0);
            assert_ne!(model.forward(painted.clone()).into_data(), whole);
            let found = model.forward_kept(painted, &one).into_data();
            found.assert_approx_eq::<f32>(&seen.into_data(), Tolerance::absolute(1e-6));
        }
    }

    #[test]
    fn architectures_of_timm_have_the_published_shapes() {
        let of = |name: &str| VitConfig::timm(&config(&format!("{{\"architecture\": \"{name}\"}}"))).unwrap();
        assert_eq!(of("vit_base_patch16_224"), TIMM_BASE);
        assert_eq!(of("vit_small_patch16_224"), TIMM_SMALL);
        assert_eq!(of("vit_tiny_patch16_224"), TIMM_TINY);
        assert_eq!(of("vit_large_patch16_384"), TIMM_LARGE); // what is 384 stands in `pretrained_cfg`
        assert_eq!((of("vit_giant_patch14_224").d_ff, of("vit_gigantic_patch14_224").d_ff), (6144, 8192));
        let clip = VitConfig { patch_size: 32, pre_norm: true, layer_norm_eps: 1e-5, ..TIMM_BASE };
        assert_eq!(of("vit_base_patch32_clip_224"), clip);
        let eva = of("eva_large_patch14_196");
        assert_eq!((eva.last_norm, eva.pooling), (LastNorm::Pooled, Pooling::MeanOfPatches));
        assert_eq!((eva.d_model, eva.n_layers, eva.patch_size), (1024, 24, 14));
        let dinov2 = of("vit_small_patch14_reg4_dinov2");
        assert_eq!(
            (dinov2.n_registers, dinov2.positioned, dinov2.layer_scale),
            (4, Positioned::Patches, Some(1e-5))
        );
    }

    #[test]
    fn arguments_stand_over_the_pretrained_cfg_and_that_over_the_architecture() {
        let pretrained = r#""architecture": "vit_tiny_patch16_384", "num_classes": 7,
            "pretrained_cfg": {"num_classes": 9, "input_size": [1, 384, 320], "fixed_input_size": true}"#;
        let vit = VitConfig::timm(&config(&format!("{{{pretrained}}}"))).unwrap();
        let expected = VitConfig { image_size: [384, 320], channels: 1, head: Head::Classes(7), ..TIMM_TINY };
        assert_eq!(vit, expected);
        let args = r#""model_args": {"img_size": 32, "num_classes": 0, "global_pool": "avg", "depth": null}"#;
        let vit = VitConfig::timm(&config(&format!("{{{pretrained}, {args}}}"))).unwrap();
        let (last_norm, pooling) = (LastNorm::Pooled, Pooling::MeanOfPatches);
        assert_eq!(
            vit,
            VitConfig { image_size: [32; 2], head: Head::Absent, last_norm, pooling, ..expected }
        );
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let of_timm = |args: &str| {
            let text = format!("{{\"architecture\": \"vit_base_patch16_224\", \"model_args\": {{{args}}}}}");
            VitConfig::timm(&config(&text)).unwrap_err().to_string()
        };
        for (args, named) in [
            (r#""global_pool": "map""#, "`model_args.global_pool`: expected token, avg or an empty text"),
            (r#""attn_layer": "diff""#, "`model_args.attn_layer`"),
            (r#""norm_layer": "rmsnorm""#, "`model_args.norm_layer`"),
            (r#""scale_mlp_norm": true"#, "`model_args.scale_mlp_norm`"),
            (r#""dynamic_img_pad": true"#, "`model_args.dynamic_img_pad`"),
            (r#""act_layer": "mish""#, "`model_args.act_layer`"),
            (r#""rope": true"#, "`model_args.rope`: expected no such argument"),
            (r#""class_token": false"#, "`model_args.class_token`"),
            (r#""num_heads": 5"#, "`model_args.num_heads`: expected a divisor of 768"),
            (r#""patch_size": [16, 8]"#, "`model_args.patch_size`: expected a square"),
            (r#""patch_size": 225"#, "`model_args.patch_size`: expected at most the picture's 224 x 224"),
            (r#""img_size": [224]"#, "`model_args.img_size`"),
            (r#""img_size": 99999"#, "`model_args.img_size`: expected at most 65536"),
            (r#""reg_tokens": -1"#, "`model_args.reg_tokens`"),
            (r#""mlp_ratio": 0"#, "`model_args.mlp_ratio`"),
            (r#""depth": 2000000000"#, "`model_args.depth`: expected at most 1000 blocks"),
        ] {
            let message = of_timm(args);
            assert!(message.contains(named), "{message}");
        }
        for name in [
            "vit_base_patch16_xp_224",
            "vit_so400m_patch14_siglip_224",
            "vit_giant_patch14_dinov2",
            "vit_base",
            "eva_giant_patch14_224",
            "eva_large_patch14_clip_224",
        ] {
            let message = VitConfig::timm(&config(&format!("{{\"architecture\": \"{name}\"}}"))).unwrap_err();
            assert!(message.to_string().contains("`architecture`"), "{message}");
        }
        for (fields, named) in [
            (r#""architectures": ["ViTForMaskedImageModeling"]"#, "`architectures`"),
            (r#""architectures": ["ViTForImageClassification"], "id2label": {}"#, "`id2label`"),
            (r#""image_size": 8"#, "`patch_size`"),
            (r#""head_dim": 32"#, "`head_dim`"),
            (r#""hidden_act": "gelu_10""#, "`hidden_act`"),
            (r#""num_hidden_layers": 0"#, "`num_hidden_layers`"),
        ] {
            let message = VitConfig::transformers(&config(&format!("{{{fields}}}"))).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn without_positions_the_patches_are_a_set() {
        let set = VitConfig { positioned: Positioned::Nothing, ..TINY };
        let model = set.init(&Device::flex());
        let x = pixels(&set);
        let halves = [x.clone().narrow(3, 4, 2), x.clone().narrow(3, 0, 4)];
        let turned = Tensor::cat(halves.to_vec(), 3); // the columns of patches, turned by one
        let scores = |x| model.pool(model.forward(x)).output.into_data();
        scores(x.clone()).assert_approx_eq::<f32>(&scores(turned.clone()), Tolerance::default());
        let ordered = TINY.init(&Device::flex());
        let scores = |x| ordered.pool(ordered.forward(x)).output;
        assert!((scores(x) - scores(turned)).abs().max().into_scalar::<f32>() > 1e-6);
    }

    #[test]
    fn a_layer_scale_of_zero_takes_the_blocks_out() {
        let config = VitConfig { layer_scale: Some(0.0), ..TINY };
        let model = config.init(&Device::flex());
        let x = pixels(&config);
        let without = Vit { blocks: Vec::new(), ..model.clone() };
        model.forward(x.clone()).into_data().assert_eq(&without.forward(x).into_data(), true);
    }

    #[test]
    fn inputs_that_do_not_fit_are_told() {
        let floats = |shape: &[usize]| TensorData::new(vec![0.5_f32; shape.iter().product()], shape);
        let whole = TensorData::new(vec![1_i64; 3 * 16 * 16], [1, 3, 16, 16]);
        for fixture in ["vit", "vit_f16", "timm_vit"] {
            let cases: &[(&[(&str, TensorData)], &str)] = &[
                (&[], "`pixel_values` is missing"),
                (&[("pixel_values", floats(&[1, 3, 16, 8]))], "[3, 16, 8], expected [3, 16, 16]"),
                (&[("pixel_values", floats(&[1, 1, 16, 16]))], "[1, 16, 16], expected [3, 16, 16]"),
                (&[("pixel_values", floats(&[3, 16, 16]))], "expected 4 dimensions"),
                (&[("pixel_values", whole.clone())], "expected floating-point numbers"),
                (&[("image", floats(&[1, 3, 16, 16]))], "`image` is not one of pixel_values"),
            ];
            for (inputs, named) in cases {
                let message = run(fixture, inputs, &LoadOptions::default()).unwrap_err().to_string();
                assert!(message.contains(named), "{message}");
            }
        }
    }

    #[test]
    fn half_precision_stays_close() {
        let inputs = [("pixel_values", pixels(&VitConfig { image_size: [16; 2], ..BASE }).into_data())];
        for fixture in ["vit", "vit_f16", "timm_vit"] {
            let first = |dtype| {
                let options = LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
                run(fixture, &inputs, &options).unwrap().remove(0).1
            };
            let tolerance = Tolerance::absolute(5e-2);
            first(FloatDType::F16).assert_approx_eq::<f32>(&first(FloatDType::F32), tolerance);
        }
    }
}
