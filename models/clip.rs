//! CLIP: two towers, one for pictures and one for text, whose embeddings meet (Radford et al. 2021,
//! <https://arxiv.org/abs/2103.00020>).
//!
//! The numbers match `transformers` (`CLIPModel`) and open_clip; OpenAI's own release has open_clip's names
//! and says its sizes by its shapes. All three layouts of the same weights are read.
//!
//! ```sh
//! volary classify cat.jpg --labels "a cat,a dog" --model path/to/clip-vit-base-patch32
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, FloatDType, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, LayerNorm, LearnedPositions, Linear, LinearConfig, Mlp, MlpConfig,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_vision::masking::Kept;
use volary_vision::patch::PatchEmbedding;
use volary_vision::resnet::{ResNet, ResNetConfig};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Ones, Rule};

use Rule::{Ignore, Rename, Reshape, Split, Transpose, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared, compared_embeddings};

/// Shape of a whole CLIP.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipConfig {
    /// The tower for pictures.
    pub vision: VisionConfig,
    /// The tower for text.
    pub text: TextConfig,
    /// Width of the space where both meet.
    pub d_embed: usize,
}

/// The tower for pictures.
#[derive(Clone, Debug, PartialEq)]
pub enum VisionConfig {
    /// A vision transformer.
    Vit(VitConfig),
    /// A convolutional tower with attention pooling.
    ResNet(ResNetConfig),
}

/// What the transformers of both towers share.
#[derive(Clone, Debug, PartialEq)]
pub struct TransformerConfig {
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
}

/// Shape of the vision transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct VitConfig {
    /// Side of the square input in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// The blocks.
    pub transformer: TransformerConfig,
}

/// Shape of the text tower.
#[derive(Clone, Debug, PartialEq)]
pub struct TextConfig {
    /// The longest text in tokens.
    pub context_length: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// The blocks.
    pub transformer: TransformerConfig,
    /// Where the text's embedding is read off.
    pub pooling: Pooling,
}

/// The position whose hidden state stands for the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Of the highest token id: the end token, in OpenAI's vocabulary.
    HighestId,
    /// Of the first token with this id.
    First(i64),
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct ClipModel {
    /// Pictures.
    pub vision: VisionTower,
    /// Text.
    pub text: TextTower,
    /// Logarithm of the factor on cosine similarities; `[1]`.
    pub logit_scale: Param<Tensor<1>>,
}

/// The tower for pictures.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum VisionTower {
    /// A vision transformer.
    Vit(VitTower),
    /// A convolutional tower.
    ResNet(ResNet),
}

/// The vision transformer: a class token, patches, blocks, the class token's state projected.
#[derive(Module, Debug)]
pub struct VitTower {
    /// `[d_model]`.
    pub class_token: Param<Tensor<1>>,
    /// `[d_model, 3, patch_size, patch_size]`, no bias.
    pub patches: PatchEmbedding,
    /// `[1 + patches, d_model]`.
    pub positions: LearnedPositions,
    /// Before the blocks.
    pub pre_norm: LayerNorm,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// On the class token after the blocks.
    pub post_norm: LayerNorm,
    /// `[d_embed, d_model]`, no bias.
    pub projection: Linear,
}

/// The text transformer: causal, read off at the end token.
#[derive(Module, Debug)]
pub struct TextTower {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[context_length, d_model]`.
    pub positions: LearnedPositions,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// After the blocks.
    pub final_norm: LayerNorm,
    /// `[d_embed, d_model]`, no bias.
    pub projection: Linear,
    #[module(skip)]
    pooling: Pooling,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct Block {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    #[module(skip)]
    activation: Activation,
}

/// What a tower gives.
pub struct TowerOutput {
    /// `[batch, seq, d_model]`: after the blocks, and for text after the final norm. A convolutional tower
    /// has none.
    pub hidden: Option<Tensor<3>>,
    /// `[batch, d_embed]`, not normalised.
    pub embedding: Tensor<2>,
}

impl ClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> ClipModel {
        ClipModel {
            vision: self.vision.init(self.d_embed, device),
            text: self.text.init(self.d_embed, device),
            logit_scale: Initializer::Constant { value: (1.0_f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl VisionConfig {
    /// An untrained tower. A vision transformer allocates nothing before first use.
    pub(crate) fn init(&self, d_embed: usize, device: &Device) -> VisionTower {
        match self {
            VisionConfig::Vit(vit) => VisionTower::Vit(vit.init(d_embed, device)),
            VisionConfig::ResNet(resnet) => VisionTower::ResNet(resnet.init(device)),
        }
    }

    /// Side of the square pictures that the tower sees, in pixels.
    pub fn image_size(&self) -> usize {
        match self {
            VisionConfig::Vit(vit) => vit.image_size,
            VisionConfig::ResNet(resnet) => resnet.image_size,
        }
    }
}

impl TransformerConfig {
    pub(crate) fn blocks(&self, device: &Device) -> Vec<Block> {
        let block = |_| Block {
            norm1: LayerNorm::new(self.d_model, self.layer_norm_eps, device),
            attention: AttentionConfig::new(self.d_model, self.n_heads).init(device),
            norm2: LayerNorm::new(self.d_model, self.layer_norm_eps, device),
            mlp: MlpConfig::new(self.d_model, self.d_ff).init(device),
            activation: self.activation,
        };
        (0..self.n_layers).map(block).collect()
    }
}

impl VitConfig {
    /// An untrained tower. Nothing is allocated before first use.
    pub(crate) fn init(&self, d_embed: usize, device: &Device) -> VitTower {
        let TransformerConfig { d_model, layer_norm_eps, .. } = self.transformer;
        let std = (d_model as f64).powf(-0.5);
        let patches = (self.image_size / self.patch_size).pow(2);
        VitTower {
            class_token: Initializer::Normal { mean: 0.0, std }.init([d_model], device),
            patches: PatchEmbedding::new(3, self.patch_size, d_model, device).without_bias(),
            positions: LearnedPositions::new(1 + patches, d_model, std, device),
            pre_norm: LayerNorm::new(d_model, layer_norm_eps, device),
            blocks: self.transformer.blocks(device),
            post_norm: LayerNorm::new(d_model, layer_norm_eps, device),
            projection: LinearConfig::new(d_model, d_embed).with_bias(false).init(device),
        }
    }
}

impl TextConfig {
    /// An untrained tower. Nothing is allocated before first use.
    pub(crate) fn init(&self, d_embed: usize, device: &Device) -> TextTower {
        let TransformerConfig { d_model, layer_norm_eps, .. } = self.transformer;
        TextTower {
            tokens: Embedding::new(self.vocab_size, d_model, 0.02, device),
            positions: LearnedPositions::new(self.context_length, d_model, 0.01, device),
            blocks: self.transformer.blocks(device),
            final_norm: LayerNorm::new(d_model, layer_norm_eps, device),
            projection: LinearConfig::new(d_model, d_embed).with_bias(false).init(device),
            pooling: self.pooling,
        }
    }
}

impl Block {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), mask);
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed, self.activation))
    }
}

impl VitTower {
    /// Pixels `[batch, 3, image_size, image_size]`, normalised.
    pub fn forward(&self, pixels: Tensor<4>) -> TowerOutput {
        self.output(self.encode(pixels))
    }

    /// [`VitTower::forward`] in training with patches left out: `hidden` is `[batch, 1 + kept, d_model]`.
    ///
    /// # Panics
    /// If the pictures are not of the model's size, or others than `kept` was drawn for.
    pub fn forward_kept(&self, pixels: Tensor<4>, kept: &Kept) -> TowerOutput {
        self.output(self.blocks(kept.pick(self.embed(pixels), 1)))
    }

    /// What the blocks give: `[batch, 3, image_size, image_size] -> [batch, 1 + patches, d_model]`.
    pub fn encode(&self, pixels: Tensor<4>) -> Tensor<3> {
        self.blocks(self.embed(pixels))
    }

    /// The class token and the patches with their positions: `[batch, 1 + patches, d_model]`.
    fn embed(&self, pixels: Tensor<4>) -> Tensor<3> {
        let patches = self.patches.forward(pixels); // [batch, patches, d_model]
        let [batch, _, d_model] = patches.dims();
        let class = self.class_token.val().reshape([1, 1, d_model]).expand([batch, 1, d_model]);
        self.positions.forward(Tensor::cat(vec![class, patches], 1))
    }

    fn blocks(&self, x: Tensor<3>) -> Tensor<3> {
        let x = self.pre_norm.forward(x);
        self.blocks.iter().fold(x, |x, block| block.forward(x, &Mask::Full))
    }

    fn output(&self, hidden: Tensor<3>) -> TowerOutput {
        let embedding = self.projection.forward(self.pool(&hidden));
        TowerOutput { hidden: Some(hidden), embedding }
    }

    /// The class token's state, normed: `[batch, 1 + patches, d_model] -> [batch, d_model]`.
    pub fn pool(&self, hidden: &Tensor<3>) -> Tensor<2> {
        self.post_norm.forward(hidden.clone().narrow(1, 0, 1).squeeze_dim(1))
    }
}

impl TextTower {
    /// Token ids `[batch, seq]`, under a causal mask (and one of padding, if rows are padded in front).
    pub fn forward(&self, ids: Tensor<2, Int>, mask: &Mask) -> TowerOutput {
        let hidden = self.encode(ids.clone(), mask);
        let embedding = self.projection.forward(self.pool(ids, &hidden));
        TowerOutput { hidden: Some(hidden), embedding }
    }

    /// What the blocks give, normed: token ids `[batch, seq]` to `[batch, seq, d_model]`.
    pub fn encode(&self, ids: Tensor<2, Int>, mask: &Mask) -> Tensor<3> {
        let x = self.positions.forward(self.tokens.forward(ids));
        self.final_norm.forward(self.blocks.iter().fold(x, |x, block| block.forward(x, mask)))
    }

    /// The state of the end token: of ids `[batch, seq]` and `[batch, seq, d_model]`, `[batch, d_model]`.
    pub fn pool(&self, ids: Tensor<2, Int>, hidden: &Tensor<3>) -> Tensor<2> {
        let [batch, _, d_model] = hidden.dims();
        // Of equals `argmax` takes the first: [batch, 1].
        let end = match self.pooling {
            Pooling::HighestId => ids.argmax(1),
            Pooling::First(id) => ids.equal_elem(id).int().argmax(1),
        };
        let at = end.reshape([batch, 1, 1]).expand([batch, 1, d_model]);
        hidden.clone().gather(1, at).reshape([batch, d_model])
    }
}

impl VisionTower {
    /// Pixels `[batch, 3, image_size, image_size]`, normalised.
    pub fn forward(&self, pixels: Tensor<4>) -> TowerOutput {
        match self {
            VisionTower::Vit(vit) => vit.forward(pixels),
            VisionTower::ResNet(resnet) => TowerOutput { hidden: None, embedding: resnet.forward(pixels) },
        }
    }
}

impl ClipModel {
    /// Unit vectors of pictures: `[batch, 3, image_size, image_size] -> [batch, d_embed]`.
    pub fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(self.vision.forward(pixels).embedding)
    }

    /// Unit vectors of texts: token ids `[batch, seq] -> [batch, d_embed]`.
    pub fn encode_texts(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        normalise(self.text.forward(ids, &Mask::Causal).embedding)
    }
}

/// Divides every row by its Euclidean length, whose square may be too much for f16.
pub fn normalise(x: Tensor<2>) -> Tensor<2> {
    let length = x.clone().cast(FloatDType::F32).square().sum_dim(1).sqrt();
    x.clone() / length.cast(x.dtype())
}

/// The public layouts of CLIP weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `CLIPModel` of transformers: `config.json` with `model_type` `clip`.
    Transformers,
    /// open_clip: `open_clip_config.json`.
    OpenClip,
    /// OpenAI's state dictionary, without a configuration.
    OpenAi,
}

impl Layout {
    fn of(folder: &Folder, config: Option<&Config>) -> Option<Self> {
        match config {
            // EVA-CLIP is another system
            Some(config) if crate::eva_clip::is_hugging_face(config) => None,
            Some(config) if config.text("model_type") == Some("clip") => Some(Self::Transformers),
            Some(config) if config.has("model_cfg") => {
                let vision = config.object("model_cfg").and_then(|model| model.object("vision_cfg"));
                let is_eva = vision.is_ok_and(|vision| crate::eva_clip::is_eva(&vision));
                (!is_eva).then_some(Self::OpenClip)
            }
            Some(_) => None,
            None => {
                let checkpoint = folder.checkpoint().ok()?;
                let has = |key| checkpoint.entries().iter().any(|entry| entry.name == key);
                (has("visual.conv1.weight") && has("token_embedding.weight")).then_some(Self::OpenAi)
            }
        }
    }

    /// The key map of the layout.
    pub fn keys(self, vision: &VisionConfig) -> &'static KeyMap {
        match (self, vision) {
            (Self::Transformers, _) => &KEYS_TRANSFORMERS,
            (_, VisionConfig::Vit(_)) => &KEYS_OPEN_CLIP_VIT,
            (_, VisionConfig::ResNet(_)) => &KEYS_OPEN_CLIP_RESNET,
        }
    }
}

impl ClipConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let config = crate::registry::first_config(folder)?;
        match Layout::of(folder, config.as_ref()).zip(config) {
            Some((Layout::Transformers, config)) => Ok((transformers(&config)?, Layout::Transformers)),
            Some((layout, config)) => Ok((open_clip(&config)?, layout)),
            None => Ok((open_ai(folder.checkpoint()?.as_ref())?, Layout::OpenAi)),
        }
    }
}

/// `config.json` of transformers' `CLIPModel`; what it leaves out has the values of `CLIPConfig`.
fn transformers(config: &Config) -> Result<ClipConfig, ConfigError> {
    let text = config.object_or_empty("text_config")?;
    // The first uploads say 2 whatever the vocabulary: their end token has the highest id.
    let pooling = match text.integer_or("eos_token_id", 49407)? {
        2 => Pooling::HighestId,
        id => Pooling::First(id),
    };
    Ok(ClipConfig {
        vision: VisionConfig::Vit(VitConfig::transformers(&config.object_or_empty("vision_config")?)?),
        text: TextConfig {
            context_length: text.size_or("max_position_embeddings", 77)?,
            vocab_size: text.size_or("vocab_size", 49408)?,
            transformer: TransformerConfig::transformers(&text, 512, 2048, 8)?,
            pooling,
        },
        d_embed: config.size_or("projection_dim", 512)?,
    })
}

impl VitConfig {
    /// A `vision_config` of transformers; what it leaves out has the values of `CLIPVisionConfig`, as its sisters' do.
    pub(crate) fn transformers(config: &Config) -> Result<Self, ConfigError> {
        config.only("num_channels", &["3"])?;
        let vit = Self {
            image_size: config.size_or("image_size", 224)?,
            patch_size: config.size_or("patch_size", 32)?,
            transformer: TransformerConfig::transformers(config, 768, 3072, 12)?,
        };
        match vit.patch_size > vit.image_size {
            true => Err(config.error("patch_size", "at most image_size")),
            false => Ok(vit),
        }
    }
}

impl TransformerConfig {
    /// The blocks of a tower of transformers, with the sizes that it has if it says nothing else.
    pub(crate) fn transformers(
        config: &Config,
        d_model: usize,
        d_ff: usize,
        n_heads: usize,
    ) -> Result<Self, ConfigError> {
        let blocks = Self {
            d_model: config.size_or("hidden_size", d_model)?,
            d_ff: config.size_or("intermediate_size", d_ff)?,
            n_layers: config.blocks_or("num_hidden_layers", 12)?,
            n_heads: config.size_or("num_attention_heads", n_heads)?,
            activation: config.activation_or("hidden_act", Activation::QuickGelu)?,
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-5)?,
        };
        config.divides("num_attention_heads", blocks.n_heads, blocks.d_model)?;
        Ok(blocks)
    }
}

/// `open_clip_config.json`; what it leaves out has open_clip's defaults.
fn open_clip(config: &Config) -> Result<ClipConfig, ConfigError> {
    let model = config.object("model_cfg")?;
    let (vision, text) = (model.object("vision_cfg")?, model.object("text_cfg")?);
    known(&model, &["embed_dim", "vision_cfg", "text_cfg", "quick_gelu"])?;
    for field in ["init_logit_scale", "custom_text", "multimodal_cfg", "init_logit_bias"] {
        model.only(field, if field == "custom_text" { &["false"] } else { &[] })?;
    }
    let quick_gelu = model.flag_or("quick_gelu", false)?;
    let activation = if quick_gelu { Activation::QuickGelu } else { Activation::Gelu };
    let d_embed = model.size("embed_dim")?;
    let image_size = vision.size_or("image_size", 224)?;
    let head_width = vision.size_or("head_width", 64)?;
    let width = vision.size_or("width", 768)?;
    known(&vision, VISION_FIELDS)?;
    vision.only("ls_init_value", &[])?;
    vision.only("pool_type", &["\"tok\""])?;
    vision.only("pos_embed_type", &["\"learnable\""])?;
    for field in ["attentional_pool", "no_ln_pre", "final_ln_after_pool", "input_patchnorm"] {
        vision.only(field, &["false"])?;
    }
    let vision_config = if let Some(layers) = vision.sizes("layers") {
        vision.divides("head_width", head_width, width * 32)?;
        let (layers, n_heads) = (resnet_stages(&vision, "layers", layers)?, width * 32 / head_width);
        let resnet = ResNetConfig { image_size, width, layers, n_heads, d_embed };
        VisionConfig::ResNet(checked_resnet(resnet, &vision, "image_size")?)
    } else {
        vision.divides("head_width", head_width, width)?;
        let patch_size = vision.size_or("patch_size", 16)?;
        if patch_size > image_size {
            return Err(vision.error("patch_size", "at most image_size"));
        }
        let layers = vision.blocks_or("layers", 12)?;
        let transformer = open_clip_blocks(&vision, 768, layers, width / head_width, activation)?;
        VisionConfig::Vit(VitConfig { image_size, patch_size, transformer })
    };
    Ok(ClipConfig { vision: vision_config, text: open_clip_text(&text, activation)?, d_embed })
}

/// The blocks of a convolutional tower's stages, which stand in `field`.
pub(crate) fn resnet_stages(
    config: &Config,
    field: &str,
    layers: Vec<usize>,
) -> Result<[usize; 4], ConfigError> {
    match <[usize; 4]>::try_from(layers) {
        Ok(layers) if layers.iter().all(|layers| (1..=1000).contains(layers)) => Ok(layers),
        Ok(_) => Err(config.error(field, "1 to 1000 blocks")),
        Err(_) => Err(config.error(field, "a number or four")),
    }
}

/// That every stage of a convolutional tower halves the picture, whose size stands in `field`, and the stem is whole.
pub(crate) fn checked_resnet(
    resnet: ResNetConfig,
    config: &Config,
    field: &str,
) -> Result<ResNetConfig, ConfigError> {
    match resnet.image_size.is_multiple_of(32) && resnet.width.is_multiple_of(2) {
        true => Ok(resnet),
        false => Err(config.error(field, "a multiple of 32, with an even width")),
    }
}

/// `text_cfg` of open_clip; the code of EVA-CLIP has two more settings, which change no number.
pub(crate) fn open_clip_text(text: &Config, activation: Activation) -> Result<TextConfig, ConfigError> {
    known(text, TEXT_FIELDS)?;
    text.only("ls_init_value", &[])?;
    for field in ["embed_cls", "no_causal_mask", "final_ln_after_pool", "proj_bias", "output_tokens"] {
        text.only(field, &["false"])?;
    }
    text.only("proj_type", &["\"linear\""])?;
    let n_heads = text.size_or("heads", 8)?;
    let transformer = open_clip_blocks(text, 512, text.blocks_or("layers", 12)?, n_heads, activation)?;
    text.divides("heads", n_heads, transformer.d_model)?;
    let pooling = match text.text("pool_type") {
        None | Some("argmax") => Pooling::HighestId,
        Some("eos") => Pooling::First(text.integer_or("eos_id", 2)?),
        Some(_) => return Err(text.error("pool_type", "argmax or eos (others are not supported)")),
    };
    Ok(TextConfig {
        context_length: text.size_or("context_length", 77)?,
        vocab_size: text.size_or("vocab_size", 49408)?,
        transformer,
        pooling,
    })
}

/// The blocks of a tower of open_clip, `width` wide if it says nothing else.
fn open_clip_blocks(
    config: &Config,
    width: usize,
    layers: usize,
    n_heads: usize,
    activation: Activation,
) -> Result<TransformerConfig, ConfigError> {
    let d_model: usize = config.size_or("width", width)?;
    Ok(TransformerConfig {
        d_model,
        d_ff: (d_model as f64 * config.number_or("mlp_ratio", 4.0)?) as usize,
        n_layers: layers,
        n_heads,
        activation,
        layer_norm_eps: config.object_or_empty("norm_kwargs")?.number_or("eps", 1e-5)?,
    })
}

/// Fields of `vision_cfg` that are read, checked, or without effect on a forward pass.
const VISION_FIELDS: &[&str] = &[
    "image_size",
    "layers",
    "width",
    "head_width",
    "patch_size",
    "mlp_ratio",
    "norm_kwargs",
    "ls_init_value",
    "pool_type",
    "pos_embed_type",
    "attentional_pool",
    "no_ln_pre",
    "final_ln_after_pool",
    "input_patchnorm",
    "patch_dropout",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "output_tokens",
];
/// The same of `text_cfg`.
const TEXT_FIELDS: &[&str] = &[
    "context_length",
    "vocab_size",
    "width",
    "heads",
    "layers",
    "mlp_ratio",
    "norm_kwargs",
    "ls_init_value",
    "embed_cls",
    "no_causal_mask",
    "final_ln_after_pool",
    "proj_bias",
    "proj_type",
    "pool_type",
    "eos_id",
    "pad_id",
    "output_tokens",
    "hf_tokenizer_name",
    "tokenizer_kwargs",
    "tokenizer_mode",
    "xattn",
    "fusedLN",
];

/// Refuses settings that would change the numbers and are not built.
fn known(config: &Config, fields: &[&str]) -> Result<(), ConfigError> {
    let harmless = ["custom_text", "init_logit_scale", "init_logit_bias", "multimodal_cfg"];
    match config.fields().find(|field| !fields.contains(field) && !harmless.contains(field)) {
        Some(field) => Err(config.error(field, "no such setting (it is not supported)")),
        None => Ok(()),
    }
}

/// OpenAI's checkpoints say their sizes by their shapes; heads are 64 wide.
fn open_ai(checkpoint: &dyn Checkpoint) -> Result<ClipConfig, Error> {
    const HEAD_WIDTH: usize = 64;
    let shape = |key: &str| -> Result<Vec<usize>, Error> {
        let entry = checkpoint.entries().iter().find(|entry| entry.name == key);
        match entry.filter(|entry| !entry.shape.is_empty() && !entry.shape.contains(&0)) {
            Some(entry) => Ok(entry.shape.clone()),
            None => Err(volary_weights::Error::NoTensor {
                file: checkpoint.path().into(),
                key: key.into(),
                nearest: Vec::new(),
            }
            .into()),
        }
    };
    let last = |key: &str| -> Result<usize, Error> { Ok(shape(key)?.last().copied().unwrap_or(1)) };
    let first = |key: &str| -> Result<usize, Error> { Ok(shape(key)?[0]) };
    let layers = |prefix: &str| {
        let index = |name: &str| name.strip_prefix(prefix)?.split('.').next()?.parse::<usize>().ok();
        checkpoint.entries().iter().filter_map(|entry| index(&entry.name)).max().map_or(0, |last| last + 1)
    };
    let blocks = |d_model: usize, n_layers: usize| TransformerConfig {
        d_model,
        d_ff: 4 * d_model,
        n_layers,
        n_heads: (d_model / HEAD_WIDTH).max(1),
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    };
    let d_embed = last("text_projection")?;
    let root = |positions: usize| ((positions.saturating_sub(1)) as f64).sqrt().round() as usize;
    let vision = if shape("visual.proj").is_ok() {
        let patch_size = last("visual.conv1.weight")?;
        VisionConfig::Vit(VitConfig {
            image_size: root(first("visual.positional_embedding")?) * patch_size,
            patch_size,
            transformer: blocks(first("visual.conv1.weight")?, layers("visual.transformer.resblocks.")),
        })
    } else {
        let width = first("visual.layer1.0.conv1.weight")?;
        VisionConfig::ResNet(ResNetConfig {
            image_size: root(first("visual.attnpool.positional_embedding")?) * 32,
            width,
            layers: [1, 2, 3, 4].map(|stage| layers(&format!("visual.layer{stage}."))),
            n_heads: (width * 32 / HEAD_WIDTH).max(1),
            d_embed,
        })
    };
    let d_text = last("token_embedding.weight")?;
    Ok(ClipConfig {
        vision,
        text: TextConfig {
            context_length: first("positional_embedding")?,
            vocab_size: first("token_embedding.weight")?,
            transformer: blocks(d_text, layers("transformer.resblocks.")),
            pooling: Pooling::HighestId,
        },
        d_embed,
    })
}

const BLOCK_TRANSFORMERS: &[Rule] = &[
    Rename("layer_norm1.weight", "norm1.weight"),
    Rename("layer_norm1.bias", "norm1.bias"),
    Rename("self_attn.q_proj.weight", "attention.query.weight"),
    Rename("self_attn.q_proj.bias", "attention.query.bias"),
    Rename("self_attn.k_proj.weight", "attention.key.weight"),
    Rename("self_attn.k_proj.bias", "attention.key.bias"),
    Rename("self_attn.v_proj.weight", "attention.value.weight"),
    Rename("self_attn.v_proj.bias", "attention.value.bias"),
    Rename("self_attn.out_proj.weight", "attention.output.weight"),
    Rename("self_attn.out_proj.bias", "attention.output.bias"),
    Rename("layer_norm2.weight", "norm2.weight"),
    Rename("layer_norm2.bias", "norm2.bias"),
    Rename("mlp.fc1.weight", "mlp.up.weight"),
    Rename("mlp.fc1.bias", "mlp.up.bias"),
    Rename("mlp.fc2.weight", "mlp.down.weight"),
    Rename("mlp.fc2.bias", "mlp.down.bias"),
];

/// The vision transformer of transformers' `CLIPModel` and its sisters. `encoder.layer` is what version 5 writes for some.
pub(crate) const VIT_TRANSFORMERS: &[Rule] = &[
    Rename("embeddings.class_embedding", "class_token"),
    Rename("embeddings.patch_embedding.weight", "patches.weight"),
    Rename("embeddings.position_embedding.weight", "positions.weight"),
    Ignore("embeddings.position_ids"),
    Rename("pre_layrnorm.weight", "pre_norm.weight"),
    Rename("pre_layrnorm.bias", "pre_norm.bias"),
    Under("encoder.layers.{}.", "blocks.{}.", BLOCK_TRANSFORMERS),
    Under("encoder.layer.{}.", "blocks.{}.", BLOCK_TRANSFORMERS),
    Rename("post_layernorm.weight", "post_norm.weight"),
    Rename("post_layernorm.bias", "post_norm.bias"),
];

/// The text tower of transformers' `CLIPModel`.
pub(crate) const TEXT_TRANSFORMERS: &[Rule] = &[
    Rename("embeddings.token_embedding.weight", "tokens.weight"),
    Rename("embeddings.position_embedding.weight", "positions.weight"),
    Ignore("embeddings.position_ids"),
    Under("encoder.layers.{}.", "blocks.{}.", BLOCK_TRANSFORMERS),
    Rename("final_layer_norm.weight", "final_norm.weight"),
    Rename("final_layer_norm.bias", "final_norm.bias"),
];

/// Keys of transformers' `CLIPModel`.
pub const KEYS_TRANSFORMERS: KeyMap = KeyMap::new(&[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Rename("visual_projection.weight", "vision.Vit.projection.weight"),
    Rename("text_projection.weight", "text.projection.weight"),
    Under("vision_model.", "vision.Vit.", VIT_TRANSFORMERS),
    Under("text_model.", "text.", TEXT_TRANSFORMERS),
]);

const BLOCK_OPEN_CLIP: &[Rule] = &[
    Rename("ln_1.weight", "norm1.weight"),
    Rename("ln_1.bias", "norm1.bias"),
    Split(
        "attn.in_proj_weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Split("attn.in_proj_bias", &["attention.query.bias", "attention.key.bias", "attention.value.bias"]),
    Rename("attn.out_proj.weight", "attention.output.weight"),
    Rename("attn.out_proj.bias", "attention.output.bias"),
    Rename("ln_2.weight", "norm2.weight"),
    Rename("ln_2.bias", "norm2.bias"),
    Rename("mlp.c_fc.weight", "mlp.up.weight"),
    Rename("mlp.c_fc.bias", "mlp.up.bias"),
    Rename("mlp.c_proj.weight", "mlp.down.weight"),
    Rename("mlp.c_proj.bias", "mlp.down.bias"),
];

/// Batch norms of PyTorch.
pub(crate) const BATCH_NORM: &[Rule] = &[
    Rename("weight", "weight"),
    Rename("bias", "bias"),
    Rename("running_mean", "running_mean"),
    Rename("running_var", "running_var"),
    Ignore("num_batches_tracked"),
];

const BOTTLENECK: &[Rule] = &[
    Reshape("conv1.weight", "conv1.weight", Ones::After(2)),
    Under("bn1.", "bn1.", BATCH_NORM),
    Rename("conv2.weight", "conv2.weight"),
    Under("bn2.", "bn2.", BATCH_NORM),
    Reshape("conv3.weight", "conv3.weight", Ones::After(2)),
    Under("bn3.", "bn3.", BATCH_NORM),
    Reshape("downsample.0.weight", "shortcut.conv.weight", Ones::After(2)),
    Under("downsample.1.", "shortcut.bn.", BATCH_NORM),
];

/// The text tower of open_clip and OpenAI.
pub(crate) const TEXT_OPEN_CLIP: &[Rule] = &[
    Rename("token_embedding.weight", "tokens.weight"),
    Rename("positional_embedding", "positions.weight"),
    Under("transformer.resblocks.{}.", "blocks.{}.", BLOCK_OPEN_CLIP),
    Rename("ln_final.weight", "final_norm.weight"),
    Rename("ln_final.bias", "final_norm.bias"),
    Transpose("text_projection", "projection.weight"),
    Ignore("attn_mask"),
];

/// The vision transformer of open_clip and OpenAI.
pub(crate) const VIT_OPEN_CLIP: &[Rule] = &[
    Rename("class_embedding", "class_token"),
    Rename("conv1.weight", "patches.weight"),
    Rename("positional_embedding", "positions.weight"),
    Rename("ln_pre.weight", "pre_norm.weight"),
    Rename("ln_pre.bias", "pre_norm.bias"),
    Under("transformer.resblocks.{}.", "blocks.{}.", BLOCK_OPEN_CLIP),
    Rename("ln_post.weight", "post_norm.weight"),
    Rename("ln_post.bias", "post_norm.bias"),
    Transpose("proj", "projection.weight"),
];

/// The convolutional tower of open_clip and OpenAI.
pub(crate) const RESNET_OPEN_CLIP: &[Rule] = &[
    Rename("conv1.weight", "conv1.weight"),
    Under("bn1.", "bn1.", BATCH_NORM),
    Rename("conv2.weight", "conv2.weight"),
    Under("bn2.", "bn2.", BATCH_NORM),
    Rename("conv3.weight", "conv3.weight"),
    Under("bn3.", "bn3.", BATCH_NORM),
    Under("layer1.{}.", "stages.0.blocks.{}.", BOTTLENECK),
    Under("layer2.{}.", "stages.1.blocks.{}.", BOTTLENECK),
    Under("layer3.{}.", "stages.2.blocks.{}.", BOTTLENECK),
    Under("layer4.{}.", "stages.3.blocks.{}.", BOTTLENECK),
    Rename("attnpool.positional_embedding", "pool.positions"),
    Rename("attnpool.q_proj.weight", "pool.query.weight"),
    Rename("attnpool.q_proj.bias", "pool.query.bias"),
    Rename("attnpool.k_proj.weight", "pool.key.weight"),
    Rename("attnpool.k_proj.bias", "pool.key.bias"),
    Rename("attnpool.v_proj.weight", "pool.value.weight"),
    Rename("attnpool.v_proj.bias", "pool.value.bias"),
    Rename("attnpool.c_proj.weight", "pool.output.weight"),
    Rename("attnpool.c_proj.bias", "pool.output.bias"),
];

/// What open_clip and OpenAI name alike whatever the tower for pictures.
const SHARED_OPEN_CLIP: &[Rule] = &[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Under("", "text.", TEXT_OPEN_CLIP),
    Ignore("input_resolution"),
    Ignore("context_length"),
    Ignore("vocab_size"),
];

/// Keys of open_clip and OpenAI with a vision transformer.
pub const KEYS_OPEN_CLIP_VIT: KeyMap =
    KeyMap::new(&[Under("", "", SHARED_OPEN_CLIP), Under("visual.", "vision.Vit.", VIT_OPEN_CLIP)]);

/// Keys of open_clip and OpenAI with a convolutional tower.
pub const KEYS_OPEN_CLIP_RESNET: KeyMap =
    KeyMap::new(&[Under("", "", SHARED_OPEN_CLIP), Under("visual.", "vision.ResNet.", RESNET_OPEN_CLIP)]);

/// CLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "clip",
    about: "two towers for pictures and text whose embeddings meet",
    file: "models/clip.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["clip", "clip_gelu", "open_clip_vit", "open_clip_resnet"],
    presets: PRESETS,
    recognises: |folder, config| Layout::of(folder, config).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = ClipConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), layout.keys(&config.vision))
    },
    open: |folder, options, device| {
        let (config, layout) = ClipConfig::of(folder)?;
        let model = config.load(folder, layout, options, device)?;
        Ok(Box::new(Loaded { model, config, layout }))
    },
    generator: None,
};

impl ClipConfig {
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
    ) -> Result<ClipModel, Error> {
        fill(folder, self.init(device), layout.keys(&self.vision), options)
    }

    /// How many patches a picture has; a convolutional tower has none.
    pub fn patches(&self) -> Option<usize> {
        match &self.vision {
            VisionConfig::Vit(vit) => Some((vit.image_size / vit.patch_size).pow(2)),
            VisionConfig::ResNet(_) => None,
        }
    }

    /// Side of the square pictures that the model sees, in pixels.
    pub fn image_size(&self) -> usize {
        self.vision.image_size()
    }
}

/// A CLIP and what it was loaded from.
pub struct Loaded {
    /// The towers.
    pub model: ClipModel,
    /// Their shapes.
    pub config: ClipConfig,
    /// Of the folder.
    pub layout: Layout,
}

impl TwoTower for Loaded {
    fn fit(&self) -> Fit {
        let TextConfig { context_length, vocab_size, .. } = self.config.text;
        let image_size = self.config.image_size();
        Fit { image_size, context_length, vocab_size, d_embed: self.config.d_embed }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.model.encode_images(pixels)
    }

    /// Under the causal mask no text sees its padding.
    fn encode_texts(&self, ids: Tensor<2, Int>, _real: Tensor<2, Bool>) -> Tensor<2> {
        self.model.encode_texts(ids)
    }

    fn scale(&self) -> Tensor<1> {
        self.model.logit_scale.val().exp()
    }
}

impl Forward for Loaded {
    /// `pixel_values`, `input_ids` and `attention_mask` for transformers' layout; `image` and `text` for the
    /// others.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let (size, text) = (self.config.image_size(), &self.config.text);
        let of_transformers = self.layout == Layout::Transformers;
        let names = if of_transformers { ("pixel_values", "input_ids") } else { ("image", "text") };
        let pixels = inputs.needed_pictures(names.0, [3, size, size]);
        let ids = inputs.ids::<2>(names.1, text.vocab_size);
        let mask = if of_transformers { inputs.mask("attention_mask") } else { None };
        let seq = ids.as_ref().map_or(0, |ids| ids.dims()[1]);
        if seq > text.context_length {
            inputs.problem(format!(
                "`{}` has {seq} tokens a row, at most {} fit",
                names.1, text.context_length
            ));
        }
        if let (Some(ids), Some(mask)) = (&ids, &mask)
            && ids.dims() != mask.dims()
        {
            let (mask, ids) = (mask.dims(), ids.dims());
            inputs.problem(format!("`attention_mask` is {mask:?}, `input_ids` {ids:?}"));
        }
        inputs.missing(names.1);
        inputs.finish()?;
        let (Some(pixels), Some(ids)) = (pixels, ids) else { return Ok(Outputs::new()) }; // finished with an error

        let mask = match mask {
            Some(real) => Mask::All(vec![Mask::Causal, Mask::Padding(real)]),
            None => Mask::Causal,
        };
        let scale = self.scale();
        let vision = self.model.vision.forward(pixels.cast(scale.dtype()));
        let text = self.model.text.forward(ids, &mask);
        let (images, texts) = (vision.embedding.clone(), text.embedding.clone());
        if !of_transformers {
            let mut outputs = compared(images, texts, scale);
            outputs.extend([
                output("image_features", vision.embedding),
                output("text_features", text.embedding),
            ]);
            return Ok(outputs);
        }
        let mut outputs = compared_embeddings(images, texts, scale);
        outputs.extend([
            output("vision_model_output.pooler_output", vision.embedding),
            output("text_model_output.pooler_output", text.embedding),
        ]);
        for (name, hidden) in [("vision", vision.hidden), ("text", text.hidden)] {
            outputs.extend(
                hidden.map(|hidden| output(&format!("{name}_model_output.last_hidden_state"), hidden)),
            );
        }
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

/// The MLP of every published CLIP is four times as wide as the model.
const fn blocks(d_model: usize, n_layers: usize, activation: Activation) -> TransformerConfig {
    TransformerConfig {
        d_model,
        d_ff: 4 * d_model,
        n_layers,
        n_heads: d_model / 64,
        activation,
        layer_norm_eps: 1e-5,
    }
}

const fn text(d_model: usize, n_layers: usize, activation: Activation) -> TextConfig {
    let transformer = blocks(d_model, n_layers, activation);
    TextConfig { context_length: 77, vocab_size: 49408, transformer, pooling: Pooling::HighestId }
}

const fn vit(image_size: usize, patch_size: usize, transformer: TransformerConfig) -> VisionConfig {
    VisionConfig::Vit(VitConfig { image_size, patch_size, transformer })
}

const fn openai_vit(image_size: usize, patch_size: usize, widths: [usize; 2], n_layers: usize) -> Shape {
    use Activation::QuickGelu;
    Shape::Clip(ClipConfig {
        vision: vit(image_size, patch_size, blocks(widths[0], n_layers, QuickGelu)),
        text: text(widths[1], 12, QuickGelu),
        d_embed: widths[1],
    })
}

const fn openai_resnet(
    image_size: usize,
    width: usize,
    layers: [usize; 4],
    d_text: usize,
    d_embed: usize,
) -> Shape {
    let n_heads = width * 32 / 64;
    Shape::Clip(ClipConfig {
        vision: VisionConfig::ResNet(ResNetConfig { image_size, width, layers, n_heads, d_embed }),
        text: text(d_text, 12, Activation::QuickGelu),
        d_embed,
    })
}

/// open_clip's larger towers: heads of another width, and exact GELU.
const fn laion(
    width: usize,
    n_layers: usize,
    n_heads: usize,
    d_ff: usize,
    text_width: usize,
    text_layers: usize,
    d_embed: usize,
) -> Shape {
    let transformer = TransformerConfig { d_ff, n_heads, ..blocks(width, n_layers, Activation::Gelu) };
    Shape::Clip(ClipConfig {
        vision: vit(224, 14, transformer),
        text: text(text_width, text_layers, Activation::Gelu),
        d_embed,
    })
}

const fn openai(name: &'static str, shape: Shape, parameters: usize) -> Preset {
    let (weights, license) = (Weights::Hub, "MIT");
    Preset { name, shape, weights, license, parameters, source: "sum over OpenAI's state dictionary" }
}

const fn laion_preset(name: &'static str, shape: Shape, parameters: usize) -> Preset {
    let (weights, license) = (Weights::Hub, "MIT");
    Preset {
        name,
        shape,
        weights,
        license,
        parameters,
        source: "open_clip's model_profile.csv (in millions)",
    }
}

/// The model inside this program: `recipe::contrastive` trains it.
pub const EMOJI: ClipConfig = ClipConfig {
    vision: VisionConfig::ResNet(ResNetConfig {
        image_size: 64,
        width: 24,
        layers: [2, 2, 3, 1],
        n_heads: 12,
        d_embed: 256,
    }),
    text: TextConfig {
        context_length: 24,
        vocab_size: 4096,
        transformer: TransformerConfig { n_heads: 4, ..blocks(192, 3, Activation::QuickGelu) },
        pooling: Pooling::First(3),
    },
    d_embed: 256,
};

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "volary/emoji-clip",
        shape: Shape::Clip(EMOJI),
        weights: Weights::Embedded,
        license: "MIT OR Apache-2.0, trained on CC-BY-4.0, Apache-2.0 and MIT pictures",
        parameters: 5_647_829,
        source: "this repository",
    },
    openai("openai/clip-vit-base-patch32", openai_vit(224, 32, [768, 512], 12), 151_277_313),
    openai("openai/clip-vit-base-patch16", openai_vit(224, 16, [768, 512], 12), 149_620_737),
    openai("openai/clip-vit-large-patch14", openai_vit(224, 14, [1024, 768], 24), 427_616_513),
    openai("openai/clip-vit-large-patch14-336", openai_vit(336, 14, [1024, 768], 24), 427_944_193),
    openai("timm/resnet50_clip.openai", openai_resnet(224, 64, [3, 4, 6, 3], 512, 1024), 102_007_137),
    openai("timm/resnet101_clip.openai", openai_resnet(224, 64, [3, 4, 23, 3], 512, 512), 119_688_033),
    openai("timm/resnet50x4_clip.openai", openai_resnet(288, 80, [4, 6, 10, 6], 640, 640), 178_300_601),
    openai("timm/resnet50x16_clip.openai", openai_resnet(384, 96, [6, 8, 18, 8], 768, 768), 290_979_217),
    openai("timm/resnet50x64_clip.openai", openai_resnet(448, 128, [3, 15, 36, 10], 1024, 1024), 623_258_305),
    laion_preset(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        laion(1280, 32, 16, 5120, 1024, 24, 1024),
        986_109_441,
    ),
    laion_preset(
        "laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
        laion(1408, 40, 16, 6144, 1024, 24, 1024),
        1_366_678_273,
    ),
    laion_preset(
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
        laion(1664, 48, 16, 8192, 1280, 32, 1280),
        2_539_567_105,
    ),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Distribution, Tolerance};
    use fastrand::Rng;
    use volary_vision::masking::PatchDropout;
    use volary_weights::save;

    use super::*;

    fn tiny(vision: VisionConfig) -> ClipConfig {
        let text = TextConfig { context_length: 8, vocab_size: 20, ..text(64, 2, Activation::QuickGelu) };
        ClipConfig { vision, text, d_embed: 16 }
    }

    fn tiny_vit() -> ClipConfig {
        tiny(vit(16, 8, blocks(64, 2, Activation::QuickGelu)))
    }

    fn tiny_resnet() -> ClipConfig {
        let layers = [1, 2, 1, 1];
        tiny(VisionConfig::ResNet(ResNetConfig { image_size: 64, width: 4, layers, n_heads: 2, d_embed: 16 }))
    }

    /// With all patches the embedding is the whole picture's; with half of them it is not, but has its shape.
    #[test]
    fn patches_are_left_out() {
        let device = Device::flex();
        let VisionTower::Vit(tower) = tiny_vit().init(&device).vision else { panic!("a transformer") };
        let pixels = Tensor::<4>::random([3, 3, 16, 16], Distribution::Normal(0.0, 1.0), &device);
        let embedded = |rate| {
            let kept = PatchDropout { rate }.draw(3, 4, &mut Rng::with_seed(1));
            tower.forward_kept(pixels.clone(), &kept)
        };
        let whole = tower.forward(pixels.clone()).embedding.into_data();
        embedded(0.0).embedding.into_data().assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-5));
        let half = embedded(0.5);
        assert_eq!(half.hidden.unwrap().dims(), [3, 3, 64]);
        let half = half.embedding.into_data();
        let apart = half.iter::<f32>().zip(whole.iter::<f32>()).map(|(half, whole)| (half - whole).abs());
        assert!(apart.fold(0.0, f32::max) > 1e-3);
    }

    /// OpenAI's layout: no configuration, the weights' shapes tell it; and what is saved is what is loaded.
    #[test]
    fn a_state_dictionary_says_its_sizes() {
        let device = Device::flex();
        for config in [tiny_vit(), tiny_resnet()] {
            let folder = tempfile::tempdir().unwrap();
            let model = config.init(&device);
            let keys = Layout::OpenAi.keys(&config.vision);
            save(&model, keys, None, &folder.path().join("model.safetensors"), None).unwrap();
            let folder = Folder::Disk(folder.path().into());
            let (found, layout) = ClipConfig::of(&folder).unwrap();
            assert_eq!((&found, layout), (&config, Layout::OpenAi));
            let loaded = found.load(&folder, layout, &LoadOptions::default(), &device).unwrap();
            let size = config.image_size();
            let pixels = Tensor::<4>::random([2, 3, size, size], Distribution::Normal(0.0, 1.0), &device);
            loaded
                .encode_images(pixels.clone())
                .into_data()
                .assert_approx_eq::<f32>(&model.encode_images(pixels).into_data(), Tolerance::default());
        }
    }

    #[test]
    fn long_rows_of_half_precision_get_length_one() {
        let rows = Tensor::<2>::full([2, 256], 100.0, &Device::flex()).cast(FloatDType::F16);
        let found = normalise(rows).into_data().convert::<f32>();
        found.assert_eq(&burn::tensor::TensorData::new(vec![0.0625f32; 512], [2, 256]), true);
    }

    /// Padding with the end token, as OpenAI's tokenizer does, leaves the embedding where it was.
    #[test]
    fn the_first_of_equal_end_tokens_counts() {
        let device = Device::flex();
        for pooling in [Pooling::HighestId, Pooling::First(19)] {
            let mut config = tiny_vit();
            config.text.pooling = pooling;
            let model = config.init(&device);
            let short = Tensor::<2, Int>::from_ints([[1, 5, 19]], &device);
            let padded = Tensor::<2, Int>::from_ints([[1, 5, 19, 19, 19]], &device);
            model
                .encode_texts(padded)
                .into_data()
                .assert_approx_eq::<f32>(&model.encode_texts(short).into_data(), Tolerance::default());
        }
    }

    #[test]
    fn settings_that_are_not_built_are_refused_by_name() {
        let message = |vision: &str, text: &str, model: &str| {
            let json = format!(
                r#"{{"model_cfg": {{"embed_dim": 16, "vision_cfg": {{"layers": 2{vision}}}, "text_cfg": {{"layers": 2{text}}}{model}}}}}"#
            );
            let config = Config::parse(Path::new("open_clip_config.json"), json.as_bytes()).unwrap();
            open_clip(&config).map_err(|error| error.to_string())
        };
        assert!(message("", "", "").is_ok());
        for (vision, text, model, named) in [
            (r#", "timm_model_name": "vit_base""#, "", "", "model_cfg.vision_cfg.timm_model_name"),
            (r#", "pool_type": "avg""#, "", "", "model_cfg.vision_cfg.pool_type"),
            (r#", "head_width": 60"#, "", "", "model_cfg.vision_cfg.head_width"),
            (r#", "ls_init_value": 0.1"#, "", "", "model_cfg.vision_cfg.ls_init_value"),
            ("", r#", "hf_model_name": "xlm-roberta-base""#, "", "model_cfg.text_cfg.hf_model_name"),
            ("", r#", "no_causal_mask": true"#, "", "model_cfg.text_cfg.no_causal_mask"),
            ("", r#", "pool_type": "cls""#, "", "model_cfg.text_cfg.pool_type"),
            ("", "", r#", "custom_text": true"#, "model_cfg.custom_text"),
        ] {
            let error = message(vision, text, model).unwrap_err();
            assert!(error.contains(&format!("`{named}`")), "{error}");
        }
    }
}
