//! BEiT: a vision transformer that learns as BERT does, guessing the visual tokens of hidden patches (Bao et al. 2021,
//! <https://arxiv.org/abs/2106.08254>; BEiT v2, Peng et al. 2022, <https://arxiv.org/abs/2208.06366>). Painter, MAE and EVA
//! go on from it.
//!
//! The numbers match `transformers` (`BeitModel`, `BeitForImageClassification`, `BeitForMaskedImageModeling`) and timm
//! (`Beit`), whose two layouts are read: Microsoft's uploads, and timm's `beit_*` and `beitv2_*` with the authors' names.
//! Pictures are of the model's own size.
//!
//! ```sh
//! volary forward path/to/beit-base-patch16-224 --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, LayerNorm, LearnedPositions, Linear, LinearConfig, Mlp, MlpConfig,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_vision::patch::{PatchEmbedding, hide};
use volary_vision::position::GridBias;
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Ignore, Rename, Reshape, Split, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::vit::{
    BLOCK, HeadOutput, LastNorm, LayerScale, Pooling, labels, mlp_width, scaled, side_or, timm_args,
    timm_classes, timm_input, timm_outputs, timm_pretrained,
};

/// Shape of a BEiT.
#[derive(Clone, Debug, PartialEq)]
pub struct BeitConfig {
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
    /// Whether every token has a learned position.
    pub positions: bool,
    /// Whether all blocks share one table of distances.
    pub shared_distances: bool,
    /// Whether every block has a table of its own.
    pub own_distances: bool,
    /// Whether queries and values have a bias; keys never do.
    pub qkv_bias: bool,
    /// What a scale per channel on each residual branch starts from (Touvron et al. 2021), if there is one.
    pub layer_scale: Option<f64>,
    /// Whether patches can be hidden.
    pub mask_token: bool,
    /// Where the last norm stands.
    pub last_norm: LastNorm,
    /// What stands for the picture.
    pub pooling: Pooling,
    /// What is done with it.
    pub head: Head,
}

/// What is done with tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// Nothing, after the pooling.
    Absent,
    /// After the pooling a score for each of so many classes.
    Classes(usize),
    /// Every patch gets a score for each of so many visual tokens. A norm comes before.
    VisualTokens(usize),
}

/// A BEiT.
#[derive(Module, Debug)]
pub struct Beit {
    /// `[d_model, channels, patch_size, patch_size]`.
    pub patches: PatchEmbedding,
    /// `[d_model]`.
    pub class_token: Param<Tensor<1>>,
    /// What stands in the place of a hidden patch, `[d_model]`.
    pub mask_token: Option<Param<Tensor<1>>>,
    /// `[1 + patches, d_model]`.
    pub positions: Option<LearnedPositions>,
    /// Added to the scores of all blocks.
    pub distances: Option<GridBias>,
    /// The blocks.
    pub blocks: Vec<BeitBlock>,
    /// After the blocks, on all tokens.
    pub norm: Option<LayerNorm>,
    /// After the pooling, or before the scores of visual tokens.
    pub head_norm: Option<LayerNorm>,
    /// `[width of the head, d_model]`.
    pub head: Option<Linear>,
    #[module(skip)]
    pooling: Pooling,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct BeitBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Added to its scores.
    pub distances: Option<GridBias>,
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

impl BeitConfig {
    /// Rows and columns of patches.
    pub const fn grid(&self) -> [usize; 2] {
        let [height, width] = self.image_size;
        [height / self.patch_size, width / self.patch_size]
    }

    /// How many patches there are.
    pub const fn patches(&self) -> usize {
        let [rows, columns] = self.grid();
        rows * columns
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Beit {
        let Self { d_model, n_heads, .. } = *self;
        let token = || Initializer::Normal { mean: 0.0, std: 0.02 }.init([d_model], device);
        let norm = || LayerNorm::new(d_model, self.layer_norm_eps, device);
        let head_norm = self.last_norm == LastNorm::Pooled || matches!(self.head, Head::VisualTokens(_));
        let positions = || LearnedPositions::new(1 + self.patches(), d_model, 0.02, device);
        Beit {
            patches: PatchEmbedding::new(self.channels, self.patch_size, d_model, device),
            class_token: token(),
            mask_token: self.mask_token.then(token),
            positions: self.positions.then(positions),
            distances: self.shared_distances.then(|| GridBias::new(self.grid(), n_heads, device)),
            blocks: (0..self.n_layers).map(|_| self.block(device)).collect(),
            norm: (self.last_norm == LastNorm::Tokens).then(norm),
            head_norm: head_norm.then(norm),
            head: match self.head {
                Head::Absent => None,
                Head::Classes(width) | Head::VisualTokens(width) => {
                    Some(LinearConfig::new(d_model, width).init(device))
                }
            },
            pooling: self.pooling,
        }
    }

    fn block(&self, device: &Device) -> BeitBlock {
        let Self { d_model, n_heads, .. } = *self;
        let norm = || LayerNorm::new(d_model, self.layer_norm_eps, device);
        let scale = || self.layer_scale.map(|start| LayerScale::new(d_model, start, device));
        BeitBlock {
            norm1: norm(),
            attention: AttentionConfig::new(d_model, n_heads)
                .with_bias(self.qkv_bias)
                .with_key_bias(false)
                .init(device),
            distances: self.own_distances.then(|| GridBias::new(self.grid(), n_heads, device)),
            scale1: scale(),
            norm2: norm(),
            mlp: MlpConfig::new(d_model, self.d_ff).init(device),
            scale2: scale(),
            activation: self.activation,
        }
    }
}

impl BeitBlock {
    /// `[batch, 1 + patches, d_model]` to the same, with what all blocks add to their scores.
    pub fn forward(&self, x: Tensor<3>, shared: &Mask) -> Tensor<3> {
        let own = self.distances.as_ref().map(|distances| Mask::Bias(distances.forward()));
        let mask = own.map_or(shared.clone(), |own| Mask::All(vec![shared.clone(), own]));
        let attended = scaled(&self.scale1, self.attention.forward(self.norm1.forward(x.clone()), &mask));
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, scaled(&self.scale2, self.mlp.forward(normed, self.activation)))
    }
}

impl Beit {
    /// Pixels `[batch, channels, height, width]`, normalised, to tokens `[batch, 1 + patches, d_model]`: the class token,
    /// then the patches row by row.
    ///
    /// # Panics
    /// If the pictures are not of the model's size.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.encode(self.patches.forward(pixels))
    }

    /// The same of pictures some of whose patches are hidden (`true`): `masked` is `[batch, patches]`.
    ///
    /// # Panics
    /// If the model has no mask token, or shapes differ.
    pub fn forward_masked(&self, pixels: Tensor<4>, masked: Tensor<2, Bool>) -> Tensor<3> {
        let token = self.mask_token.as_ref().expect("a model that hides patches has a mask token").val();
        self.encode(hide(self.patches.forward(pixels), masked, token))
    }

    /// `[batch, patches, d_model] -> [batch, 1 + patches, d_model]`
    fn encode(&self, patches: Tensor<3>) -> Tensor<3> {
        let [batch, _, d_model] = patches.dims();
        let class = self.class_token.val().unsqueeze::<3>().expand([batch, 1, d_model]);
        let x = Tensor::cat(vec![class, patches], 1);
        let x = self.positions.iter().fold(x, |x, positions| positions.forward(x));
        let shared = self.distances.as_ref().map_or(Mask::Full, |distances| Mask::Bias(distances.forward()));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, &shared));
        self.norm.iter().fold(x, |x, norm| norm.forward(x))
    }

    /// What stands for the picture in the tokens of [`Beit::forward`], and its classes' scores.
    pub fn pool(&self, x: Tensor<3>) -> HeadOutput<2> {
        let [batch, tokens, d_model] = x.dims();
        let x = match self.pooling {
            Pooling::Class => x.narrow(1, 0, 1),
            _ => x.narrow(1, 1, tokens - 1).mean_dim(1),
        };
        self.head(x.reshape([batch, d_model]))
    }

    /// Every patch's scores of visual tokens: `[batch, 1 + patches, d_model] -> [batch, patches, visual tokens]`.
    pub fn predict(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, tokens, _] = x.dims();
        self.head(x.narrow(1, 1, tokens - 1)).output
    }

    fn head<const D: usize>(&self, x: Tensor<D>) -> HeadOutput<D> {
        let pooled = self.head_norm.iter().fold(x, |x, norm| norm.forward(x));
        let output = self.head.iter().fold(pooled.clone(), |x, head| head.forward(x));
        HeadOutput { pooled, output }
    }
}

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `transformers`.
    Transformers,
    /// timm, and the authors'.
    Timm,
}

impl Layout {
    /// The layout of a configuration, if it is one of a BEiT.
    pub fn of(config: &Config) -> Option<Self> {
        match (config.text("model_type"), config.text("architecture")) {
            (Some("beit"), _) => Some(Self::Transformers),
            (_, Some(name)) if name.starts_with("beit_") || name.starts_with("beitv2_") => Some(Self::Timm),
            _ => None,
        }
    }

    /// The key map of the layout.
    pub const fn keys(self, head: Head) -> &'static KeyMap {
        match (self, head) {
            (Self::Timm, _) => &KEYS_TIMM,
            (Self::Transformers, Head::Absent) => &KEYS,
            (Self::Transformers, Head::Classes(_)) => &KEYS_CLASSIFIER,
            (Self::Transformers, Head::VisualTokens(_)) => &KEYS_MASKED,
        }
    }
}

impl BeitConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let config = folder.config("config.json")?;
        match Layout::of(&config) {
            Some(Layout::Transformers) => Ok((Self::transformers(&config)?, Layout::Transformers)),
            Some(Layout::Timm) => Ok((Self::timm(&config)?, Layout::Timm)),
            None => Err(config.error("model_type", "beit, or an `architecture` beit_* or beitv2_*").into()),
        }
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `BeitConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn transformers(config: &Config) -> Result<Self, ConfigError> {
        let image_size = side_or(config, "image_size", 224)?;
        let mean = config.flag_or("use_mean_pooling", true)?;
        let layer_scale = config.number_or("layer_scale_init_value", 0.1)?;
        Self {
            image_size: [image_size; 2],
            patch_size: side_or(config, "patch_size", 16)?,
            channels: config.size_or("num_channels", 3)?,
            d_model: config.size_or("hidden_size", 768)?,
            d_ff: config.size_or("intermediate_size", 3072)?,
            n_layers: config.blocks_or("num_hidden_layers", 12)?,
            n_heads: config.size_or("num_attention_heads", 12)?,
            activation: config.activation_or("hidden_act", Activation::Gelu)?,
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-12)?,
            positions: config.flag_or("use_absolute_position_embeddings", false)?,
            shared_distances: config.flag_or("use_shared_relative_position_bias", false)?,
            own_distances: config.flag_or("use_relative_position_bias", false)?,
            qkv_bias: true,
            layer_scale: (layer_scale > 0.0).then_some(layer_scale),
            mask_token: config.flag_or("use_mask_token", false)?,
            last_norm: if mean { LastNorm::Pooled } else { LastNorm::Tokens },
            pooling: if mean { Pooling::MeanOfPatches } else { Pooling::Class },
            head: match config.first_of("architectures") {
                None | Some("BeitModel") => Head::Absent,
                Some("BeitForImageClassification") => Head::Classes(labels(config)?),
                Some("BeitForMaskedImageModeling") => Head::VisualTokens(config.size_or("vocab_size", 8192)?),
                Some(_) => {
                    let built = "BeitModel, BeitForImageClassification or BeitForMaskedImageModeling";
                    return Err(config.error("architectures", built));
                }
            },
        }
        .checked(config, "num_attention_heads")
    }

    /// `config.json` of timm: `model_args` over the architecture's own arguments, and over what `pretrained_cfg` says of
    /// input and classes.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn timm(config: &Config) -> Result<Self, ConfigError> {
        let own = config.text("architecture").and_then(architecture);
        let own =
            own.ok_or_else(|| config.error("architecture", "beit or beitv2, _{base,large}_patch16_{N}"))?;
        let args = config.object_or_empty("model_args")?;
        timm_args(&args, &[ARGS], ARGS_FIXED)?;
        let pretrained = timm_pretrained(config)?;
        let (channels, image_size) = timm_input(&pretrained, &args, own.image_size[0])?;
        let d_model = args.size_or("embed_dim", own.d_model)?;
        let pooling = match args.text("global_pool") {
            None if args.has("global_pool") => return Err(args.error("global_pool", "a text")),
            None | Some("avg") => Pooling::MeanOfPatches,
            Some("token") => Pooling::Class,
            Some(_) => return Err(args.error("global_pool", "token or avg (others are not supported)")),
        };
        let pooled_norm = args.flag_or("use_fc_norm", pooling == Pooling::MeanOfPatches)?;
        let layer_scale = args.number_or("init_values", own.layer_scale.unwrap_or(0.0))?;
        Self {
            image_size,
            patch_size: side_or(&args, "patch_size", 16)?,
            channels,
            d_model,
            d_ff: mlp_width(&args, 4.0, d_model)?,
            n_layers: args.blocks_or("depth", own.n_layers)?,
            n_heads: args.size_or("num_heads", own.n_heads)?,
            positions: args.flag_or("use_abs_pos_emb", own.positions)?,
            shared_distances: args.flag_or("use_shared_rel_pos_bias", own.shared_distances)?,
            own_distances: args.flag_or("use_rel_pos_bias", own.own_distances)?,
            qkv_bias: args.flag_or("qkv_bias", own.qkv_bias)?,
            layer_scale: (layer_scale != 0.0).then_some(layer_scale),
            last_norm: if pooled_norm { LastNorm::Pooled } else { LastNorm::Tokens },
            pooling,
            head: match timm_classes(config, &pretrained, &args)? {
                0 => Head::Absent,
                classes => Head::Classes(classes),
            },
            ..own
        }
        .checked(&args, "num_heads")
    }

    /// That a picture has patches, and that heads divide the width.
    fn checked(self, config: &Config, heads: &str) -> Result<Self, ConfigError> {
        config.divides(heads, self.n_heads, self.d_model)?;
        if self.patches() == 0 {
            let [height, width] = self.image_size;
            let wanted = format!("at most the picture's {height} x {width} pixels");
            return Err(config.error("patch_size", &wanted));
        }
        Ok(self)
    }
}

/// `beit_{size}_patch16_{N}` or `beitv2_{size}_patch16_{N}`, without classes.
fn architecture(name: &str) -> Option<BeitConfig> {
    let (family, rest) = name.split_once('_')?;
    let (size, side) = rest.split_once("_patch16_")?;
    let side: usize = side.parse().ok().filter(|&side| side >= 16)?;
    let own = match (family, size) {
        ("beit", "base") => BASE,
        ("beitv2", "base") => BASE_V2,
        ("beit" | "beitv2", "large") => LARGE,
        _ => return None,
    };
    Some(BeitConfig { image_size: [side; 2], layer_norm_eps: 1e-6, ..own })
}

/// Arguments of timm's `Beit` that are read, or only matter for training.
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
    "mlp_ratio",
    "init_values",
    "use_abs_pos_emb",
    "use_rel_pos_bias",
    "use_shared_rel_pos_bias",
    "use_fc_norm",
    "drop_rate",
    "pos_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "head_init_scale",
];

/// Those of which only these values are built.
const ARGS_FIXED: &[(&str, &[&str])] = &[("swiglu_mlp", &["false"]), ("scale_mlp", &["false"])];

const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// A table of distances; where its entries go can be counted, and older files hold it.
const DISTANCES: &[Rule] =
    &[Rename("relative_position_bias_table", "table"), Ignore("relative_position_index")];

/// All but norms and heads, of transformers.
const TRUNK: &[Rule] = &[
    Under("embeddings.patch_embeddings.projection.", "patches.", PAIR),
    Reshape("embeddings.cls_token", "class_token", Ones::Before(2)),
    Reshape("embeddings.mask_token", "mask_token", Ones::Before(2)),
    Reshape("embeddings.position_embeddings", "positions.weight", Ones::Before(1)),
    Under("encoder.relative_position_bias.", "distances.", DISTANCES),
    Under("encoder.layer.{}.", "blocks.{}.", BLOCK),
    Under("encoder.layer.{}.attention.attention.relative_position_bias.", "blocks.{}.distances.", DISTANCES),
    Rename("encoder.layer.{}.lambda_1", "blocks.{}.scale1.weight"),
    Rename("encoder.layer.{}.lambda_2", "blocks.{}.scale2.weight"),
    Under("layernorm.", "norm.", PAIR),
];

/// Keys of `BeitModel`; a classifier beside it is ignored.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "", TRUNK),
    Under("pooler.layernorm.", "head_norm.", PAIR),
    Ignore("classifier.{*}"),
])
.with_prefixes(&["beit."]);

/// Keys of `BeitForImageClassification`.
pub const KEYS_CLASSIFIER: KeyMap = KeyMap::new(&[
    Under("beit.", "", TRUNK),
    Under("beit.pooler.layernorm.", "head_norm.", PAIR),
    Under("classifier.", "head.", PAIR),
]);

/// Keys of `BeitForMaskedImageModeling`.
pub const KEYS_MASKED: KeyMap = KeyMap::new(&[
    Under("beit.", "", TRUNK),
    Under("layernorm.", "head_norm.", PAIR),
    Under("lm_head.", "head.", PAIR),
]);

/// Keys of timm and the authors.
pub const KEYS_TIMM: KeyMap = KeyMap::new(&[
    Under("patch_embed.proj.", "patches.", PAIR),
    Reshape("cls_token", "class_token", Ones::Before(2)),
    Reshape("pos_embed", "positions.weight", Ones::Before(1)),
    Under("rel_pos_bias.", "distances.", DISTANCES),
    Under(
        "blocks.{}.",
        "blocks.{}.",
        &[
            Under("norm1.", "norm1.", PAIR),
            Split(
                "attn.qkv.weight",
                &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
            ),
            Rename("attn.q_bias", "attention.query.bias"),
            Rename("attn.v_bias", "attention.value.bias"),
            Under("attn.proj.", "attention.output.", PAIR),
            Under("attn.", "distances.", DISTANCES),
            Rename("gamma_1", "scale1.weight"),
            Under("norm2.", "norm2.", PAIR),
            Under("mlp.fc1.", "mlp.up.", PAIR),
            Under("mlp.fc2.", "mlp.down.", PAIR),
            Rename("gamma_2", "scale2.weight"),
        ],
    ),
    Under("norm.", "norm.", PAIR),
    Under("fc_norm.", "head_norm.", PAIR),
    Under("head.", "head.", PAIR),
]);

/// BEiT as the registry knows it.
pub const SYSTEM: System = System {
    name: "beit",
    about: "vision transformers that guess visual tokens of hidden patches: BEiT, BEiT v2",
    file: "models/beit.rs",
    tasks: &["forward"],
    proved: &["beit", "beit_mim", "timm_beit"],
    presets: PRESETS,
    recognises: |_, config| config.and_then(Layout::of).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = BeitConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), layout.keys(config.head))
    },
    open: |folder, options, device| {
        let (config, layout) = BeitConfig::of(folder)?;
        let model = fill(folder, config.init(device), layout.keys(config.head), options)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// A BEiT behind the forward contract.
struct Runner {
    model: Beit,
    config: BeitConfig,
    layout: Layout,
}

impl Forward for Runner {
    /// `pixel_values`, and in transformers' layout, if the model has a mask token, `bool_masked_pos`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let BeitConfig { image_size: [height, width], channels, .. } = self.config;
        let pixels = inputs.needed_pictures("pixel_values", [channels, height, width]);
        let masked = match self.model.mask_token {
            Some(_) => inputs.mask("bool_masked_pos"),
            None => None,
        };
        if let (Some(pixels), Some(masked)) = (&pixels, &masked) {
            let wanted = [pixels.dims()[0], self.config.patches()];
            inputs.shaped("bool_masked_pos", Some(masked.dims()), wanted);
        }
        inputs.finish()?;
        let Some(pixels) = pixels else { return Ok(Outputs::new()) }; // finished with an error

        let pixels = pixels.cast(self.model.patches.weight.val().dtype());
        let hidden = match masked {
            Some(masked) => self.model.forward_masked(pixels, masked),
            None => self.model.forward(pixels),
        };
        Ok(match (self.layout, self.config.head) {
            (Layout::Timm, _) => {
                let head = self.model.pool(hidden.clone());
                timm_outputs(hidden, head)
            }
            (Layout::Transformers, Head::Absent) => {
                let pooled = self.model.pool(hidden.clone()).pooled;
                vec![output("last_hidden_state", hidden), output("pooler_output", pooled)]
            }
            (Layout::Transformers, Head::Classes(_)) => {
                vec![output("logits", self.model.pool(hidden).output)]
            }
            (Layout::Transformers, Head::VisualTokens(_)) => {
                vec![output("logits", self.model.predict(hidden))]
            }
        })
    }
}

/// Bao et al. 2021, section 2.6 and appendix D: base, fine-tuned.
const BASE: BeitConfig = BeitConfig {
    image_size: [224; 2],
    patch_size: 16,
    channels: 3,
    d_model: 768,
    d_ff: 3072,
    n_layers: 12,
    n_heads: 12,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-12,
    positions: false,
    shared_distances: false,
    own_distances: true,
    qkv_bias: true,
    layer_scale: Some(0.1),
    mask_token: false,
    last_norm: LastNorm::Pooled,
    pooling: Pooling::MeanOfPatches,
    head: Head::Classes(1000),
};
/// Peng et al. 2022, appendix C.
const BASE_V2: BeitConfig = BeitConfig { layer_scale: Some(1e-5), ..BASE };
const LARGE: BeitConfig = BeitConfig { d_model: 1024, d_ff: 4096, n_layers: 24, n_heads: 16, ..BASE_V2 };

/// As they learn to guess visual tokens: one table of distances for all blocks.
const fn masked(config: BeitConfig) -> BeitConfig {
    let head = Head::VisualTokens(8192);
    BeitConfig { shared_distances: true, own_distances: false, mask_token: true, head, ..config }
}

const fn classes(config: BeitConfig, image_size: usize, classes: usize) -> BeitConfig {
    BeitConfig { image_size: [image_size; 2], head: Head::Classes(classes), ..config }
}

const fn preset(name: &'static str, config: BeitConfig, parameters: usize, source: &'static str) -> Preset {
    let (shape, weights, license) = (Shape::Beit(config), Weights::Hub, "Apache-2.0");
    Preset { name, shape, weights, license, parameters, source }
}

const fn microsoft(name: &'static str, config: BeitConfig, parameters: usize) -> Preset {
    let source = match config.head {
        Head::VisualTokens(_) => "transformers, BeitForMaskedImageModeling",
        _ => "transformers, BeitForImageClassification",
    };
    preset(name, config, parameters, source)
}

const fn timm(name: &'static str, config: BeitConfig, parameters: usize) -> Preset {
    let config = BeitConfig { layer_norm_eps: 1e-6, ..config };
    preset(name, config, parameters, "timm, sum over the parameters")
}

/// Published sizes. Several trainings of timm have one size; the name is of one of them.
pub const PRESETS: &[Preset] = &[
    microsoft("microsoft/beit-base-patch16-224", BASE, 86_530_984),
    microsoft("microsoft/beit-base-patch16-384", classes(BASE, 384, 1000), 86_744_104),
    microsoft("microsoft/beit-base-patch16-224-pt22k", masked(BASE), 91_965_776),
    microsoft("microsoft/beit-base-patch16-224-pt22k-ft22k", classes(BASE, 224, 21841), 102_557_713),
    microsoft("microsoft/beit-large-patch16-224", LARGE, 304_430_568),
    microsoft("microsoft/beit-large-patch16-384", classes(LARGE, 384, 1000), 304_998_888),
    microsoft("microsoft/beit-large-patch16-512", classes(LARGE, 512, 1000), 305_674_728),
    microsoft("microsoft/beit-large-patch16-224-pt22k", masked(LARGE), 311_534_016),
    microsoft("microsoft/beit-large-patch16-224-pt22k-ft22k", classes(LARGE, 224, 21841), 325_792_593),
    timm("timm/beitv2_base_patch16_224.in1k_ft_in22k_in1k", BASE_V2, 86_530_984),
    timm("timm/beitv2_large_patch16_224.in1k_ft_in22k_in1k", LARGE, 304_430_568),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Distribution, Tolerance};
    use volary_weights::parameters;

    use super::*;

    const TINY: BeitConfig = BeitConfig {
        image_size: [4, 6],
        patch_size: 2,
        d_model: 8,
        d_ff: 16,
        n_layers: 2,
        n_heads: 2,
        positions: true,
        shared_distances: true,
        mask_token: true,
        head: Head::Classes(3),
        ..BASE
    };

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        let timm = BeitConfig { mask_token: false, ..TINY };
        let class = BeitConfig { last_norm: LastNorm::Tokens, pooling: Pooling::Class, ..TINY };
        let cases = [
            (Layout::Transformers, BeitConfig { head: Head::Absent, ..TINY }),
            (Layout::Transformers, TINY),
            (Layout::Transformers, class.clone()),
            (Layout::Transformers, BeitConfig { head: Head::VisualTokens(5), ..TINY }),
            (Layout::Transformers, BeitConfig { head: Head::VisualTokens(5), ..class.clone() }),
            (Layout::Timm, BeitConfig { mask_token: false, ..class }),
            (Layout::Timm, timm),
        ];
        for (layout, config) in cases {
            let keys = layout.keys(config.head);
            for parameter in parameters(&config.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
            }
        }
    }

    /// What is under a mask changes nothing; what is beside it does.
    #[test]
    fn hidden_patches_are_not_seen() {
        let model = TINY.init(&Device::flex());
        let hidden = [false, false, false, false, true, false]; // row 1, column 1: pixels 2 and 3 of both axes
        let masked = || Tensor::<1, Bool>::from_data(hidden, &Device::flex()).unsqueeze();
        let pixels = random([1, 3, 4, 6]);
        let painted = |at: usize| pixels.clone().slice_fill([0..1, 0..3, 2..4, at..at + 2], 9.0);
        let tokens = |pixels: Tensor<4>| model.forward_masked(pixels, masked());
        let expected = tokens(pixels.clone());
        let under = tokens(painted(2)).into_data();
        under.assert_approx_eq::<f32>(&expected.clone().into_data(), Tolerance::absolute(1e-6));
        assert!((tokens(painted(4)) - expected).abs().max().into_scalar::<f32>() > 1e-3);
    }

    /// Without positions and distances a picture is a set of patches.
    #[test]
    fn distances_alone_tell_places_apart() {
        let bare = BeitConfig { positions: false, shared_distances: false, own_distances: false, ..TINY };
        let pixels = random([1, 3, 4, 6]);
        let halves = [pixels.clone().narrow(3, 4, 2), pixels.clone().narrow(3, 0, 4)];
        let turned = Tensor::cat(halves.to_vec(), 3); // the columns of patches, turned by one
        let apart = |model: &Beit| {
            let scores = |pixels| model.pool(model.forward(pixels)).output;
            (scores(pixels.clone()) - scores(turned.clone())).abs().max().into_scalar::<f32>()
        };
        assert!(apart(&bare.init(&Device::flex())) < 1e-5);
        let mut model = BeitConfig { shared_distances: true, ..bare }.init(&Device::flex());
        let table = random::<2>([18, 2]) * 5.0;
        model.distances.iter_mut().for_each(|distances| distances.table = Param::from_tensor(table.clone()));
        assert!(apart(&model) > 1e-4, "{}", apart(&model));
    }

    #[test]
    fn architectures_of_timm() {
        let of = |text: &str| BeitConfig::timm(&config(text)).unwrap();
        let base = BeitConfig { layer_norm_eps: 1e-6, ..BASE };
        assert_eq!(of(r#"{"architecture": "beit_base_patch16_224"}"#), base);
        let large = BeitConfig { layer_norm_eps: 1e-6, ..classes(LARGE, 384, 9) };
        assert_eq!(of(r#"{"architecture": "beit_large_patch16_384", "num_classes": 9}"#), large);
        let token =
            of(r#"{"architecture": "beitv2_base_patch16_224", "model_args": {"global_pool": "token"}}"#);
        assert_eq!((token.last_norm, token.pooling), (LastNorm::Tokens, Pooling::Class));
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""architectures": ["BeitForSemanticSegmentation"]"#, "`architectures`"),
            (r#""architectures": ["BeitForImageClassification"], "id2label": {}"#, "`id2label`"),
            (r#""image_size": [224, 208]"#, "`image_size`: expected a square"),
            (r#""image_size": 8"#, "`patch_size`: expected at most the picture's 8 x 8"),
            (r#""num_attention_heads": 5"#, "`num_attention_heads`: expected a divisor of 768"),
            (r#""hidden_act": "gelu_10""#, "`hidden_act`"),
            (r#""num_hidden_layers": 5000"#, "`num_hidden_layers`"),
        ] {
            let message =
                BeitConfig::transformers(&config(&format!("{{{fields}}}"))).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        for (architecture, args, named) in [
            ("beit_huge_patch16_224", "", "`architecture`"),
            ("beit3_base_patch16_224", "", "`architecture`"),
            ("beit_base_patch16_224", r#""swiglu_mlp": true"#, "`model_args.swiglu_mlp`"),
            ("beit_base_patch16_224", r#""global_pool": """#, "`model_args.global_pool`"),
            ("beit_base_patch16_224", r#""num_heads": 7"#, "`model_args.num_heads`"),
            ("beit_base_patch16_224", r#""colour": 1"#, "`model_args.colour`"),
        ] {
            let text = format!(r#"{{"architecture": "{architecture}", "model_args": {{{args}}}}}"#);
            let message = BeitConfig::timm(&config(&text)).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
