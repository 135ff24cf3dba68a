//! Painter: what is to be done is shown in pictures, and the answer is a picture (Wang et al. 2022,
//! <https://arxiv.org/abs/2212.02499>, BAAI). A picture whose answer is known stands above the one that is asked about;
//! the model paints what is missing of the answers.
//!
//! The numbers match the authors' `models_painter.py`, whose layout is read (`painter_vit_large.pth`, with or without a
//! `config.json` of the constructor's arguments). As released, every block attends to the whole picture: the authors'
//! list of blocks with windows is a tuple of lists, in which no block's number is found.
//!
//! ```sh
//! volary paint street.jpg --prompt room.jpg --target room_depth.png --model BAAI/Painter
//! ```

use std::borrow::Cow;

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, LayerNorm, LearnedPositions, Linear, LinearConfig, Mlp, MlpConfig,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_vision::conv::Conv3x3;
use volary_vision::image::Rgb8;
use volary_vision::interpolation::Interpolation;
use volary_vision::palette::Painting;
use volary_vision::patch::{PatchEmbedding, patchify, unpatchify};
use volary_vision::position::{DecomposedPositions, resize_positions};
use volary_vision::resample::Filter;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Rename, Reshape, Split, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::paint::{Easel, Example};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::vit::{side_or, sides_or};

/// Colours of a pixel.
pub(crate) const CHANNELS: usize = 3;
/// What a preprocessor subtracts, and divides by (ImageNet's).
pub(crate) const MEAN: [f64; 3] = [0.485, 0.456, 0.406];
pub(crate) const STD: [f64; 3] = [0.229, 0.224, 0.225];

/// Shape of a Painter.
#[derive(Clone, Debug, PartialEq)]
pub struct PainterConfig {
    /// Height and width of two pictures, one above the other, in pixels.
    pub image_size: [usize; 2],
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// The activation of MLP and decoder.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// Whether queries, keys and values have a bias.
    pub qkv_bias: bool,
    /// Whether scores depend on how far a key stands from its query.
    pub relative_positions: bool,
    /// Rows, and as many columns, of the table of positions, which is resized to the pictures.
    pub position_grid: usize,
    /// Whether the table begins with a class token's position, which is not used.
    pub class_position: bool,
    /// After which block (from 0) pictures and answers, until then apart, are averaged.
    pub merge: usize,
    /// After which blocks (from 0) features are taken for the decoder.
    pub taps: Cow<'static, [usize]>,
    /// Channels of the decoder.
    pub d_decoder: usize,
    /// Added to variances in the decoder.
    pub decoder_norm_eps: f64,
    /// How far a painted pixel is from the right one.
    pub distance: Distance,
}

/// How far a painted pixel is from the right one, `d` apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Distance {
    /// `|d|`
    L1,
    /// `d²`
    L2,
    /// `(|d| + d²) / 2`
    L1L2,
    /// `d² / 2 beta` below `beta`, `|d| - beta / 2` beyond.
    SmoothL1(f64),
}

impl Distance {
    /// Pixel by pixel.
    pub fn of<const D: usize>(self, found: Tensor<D>, wanted: Tensor<D>) -> Tensor<D> {
        let apart = (found - wanted).abs();
        match self {
            Self::L1 => apart,
            Self::L2 => apart.square(),
            Self::L1L2 => (apart.clone() + apart.square()) * 0.5,
            Self::SmoothL1(beta) => {
                let near = apart.clone().clamp_max(beta);
                near.clone() * (apart - near * 0.5) / beta
            }
        }
    }
}

/// A Painter.
#[derive(Module, Debug)]
pub struct Painter {
    /// `[d_model, 3, patch_size, patch_size]`, for pictures and answers.
    pub patches: PatchEmbedding,
    /// `[d_model]`, stands for a patch of an answer that is to be painted.
    pub mask_token: Param<Tensor<1>>,
    /// `[d_model]`, added to pictures.
    pub picture_token: Param<Tensor<1>>,
    /// `[d_model]`, added to answers.
    pub answer_token: Param<Tensor<1>>,
    /// `[positions, d_model]`.
    pub positions: LearnedPositions,
    /// The blocks.
    pub blocks: Vec<PainterBlock>,
    /// On the features.
    pub norm: LayerNorm,
    /// From features to a picture.
    pub decoder: Decoder,
    #[module(skip)]
    config: PainterConfig,
}

/// A pre-norm transformer block over a grid of patches.
#[derive(Module, Debug)]
pub struct PainterBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Added to its scores.
    pub distances: Option<DecomposedPositions>,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    #[module(skip)]
    activation: Activation,
}

/// From the features of some blocks to a picture.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[patch_size² * d_decoder, taps * d_model]`.
    pub embed: Linear,
    /// `[d_decoder, d_decoder, 3, 3]`.
    pub conv: Conv3x3,
    /// On the channels of each pixel.
    pub norm: LayerNorm,
    /// `[3, d_decoder]`.
    pub colours: Linear,
    #[module(skip)]
    activation: Activation,
}

/// What the rows of a batch have to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Nothing: each is a question of its own.
    Questions,
    /// They ask the same with different examples, which are averaged.
    Examples,
}

impl Rows {
    /// What is shared in block `layer` (from 0); in `apart` blocks, streams are averaged each for itself.
    pub fn sharing(self, layer: usize, apart: usize) -> Sharing {
        match self {
            Self::Questions => Sharing::Nothing,
            Self::Examples if layer < apart => Sharing::EachStream,
            Self::Examples => Sharing::All,
        }
    }
}

/// Whether what a block's attention says of the lower half, where the question stands, is shared within a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Everyone for itself.
    Nothing,
    /// The mean of the first half of the batch, which are pictures, and that of the second half, which are answers.
    EachStream,
    /// The mean of the batch.
    All,
}

impl Sharing {
    /// `[batch, patches, d_model] -> [batch, patches, d_model]`.
    fn apply(self, x: Tensor<3>) -> Tensor<3> {
        let [batch, patches, d_model] = x.dims();
        let streams = match self {
            Self::Nothing => return x,
            Self::EachStream => 2,
            Self::All => 1,
        };
        let half = patches / 2;
        let asked = x.clone().narrow(1, half, half).reshape([streams, batch / streams, half, d_model]);
        let asked = asked.mean_dim(1).expand([streams, batch / streams, half, d_model]);
        Tensor::cat(vec![x.narrow(1, 0, half), asked.reshape([batch, half, d_model])], 1)
    }
}

impl PainterConfig {
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

    /// Height and width of one picture.
    pub const fn picture_size(&self) -> [usize; 2] {
        let [height, width] = self.image_size;
        [height / 2, width]
    }

    /// Nothing of the upper picture's answer is masked, all of the lower one's: `[batch, patches]`.
    pub fn lower_half(&self, batch: usize, device: &Device) -> Tensor<2> {
        let half = self.patches() / 2;
        Tensor::cat(vec![Tensor::zeros([batch, half], device), Tensor::ones([batch, half], device)], 1)
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Painter {
        let &Self { patch_size, d_model, d_decoder, activation, .. } = self;
        let token = || Initializer::Normal { mean: 0.0, std: 0.02 }.init([d_model], device);
        let positions = usize::from(self.class_position) + self.position_grid * self.position_grid;
        let features = self.taps.len() * d_model;
        Painter {
            patches: PatchEmbedding::new(CHANNELS, patch_size, d_model, device),
            mask_token: token(),
            picture_token: token(),
            answer_token: token(),
            positions: LearnedPositions::new(positions, d_model, 0.02, device),
            blocks: (0..self.n_layers).map(|_| self.block(device)).collect(),
            norm: LayerNorm::new(d_model, self.layer_norm_eps, device),
            decoder: Decoder {
                embed: LinearConfig::new(features, patch_size * patch_size * d_decoder).init(device),
                conv: Conv3x3::new(d_decoder, d_decoder, 1, device).with_bias(device),
                norm: LayerNorm::new(d_decoder, self.decoder_norm_eps, device),
                colours: LinearConfig::new(d_decoder, CHANNELS).init(device),
                activation,
            },
            config: self.clone(),
        }
    }

    fn block(&self, device: &Device) -> PainterBlock {
        let &Self { d_model, n_heads, .. } = self;
        let norm = || LayerNorm::new(d_model, self.layer_norm_eps, device);
        let distances = || DecomposedPositions::new(self.grid(), d_model / n_heads, device);
        PainterBlock {
            norm1: norm(),
            attention: AttentionConfig::new(d_model, n_heads).with_bias(self.qkv_bias).init(device),
            distances: self.relative_positions.then(distances),
            norm2: norm(),
            mlp: MlpConfig::new(d_model, self.d_ff).init(device),
            activation: self.activation,
        }
    }
}

impl PainterBlock {
    /// `[batch, patches, d_model] -> [batch, patches, d_model]`.
    pub fn forward(&self, x: Tensor<3>, sharing: Sharing) -> Tensor<3> {
        let attended = sharing.apply(self.attend(self.norm1.forward(x.clone())));
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed, self.activation))
    }

    fn attend(&self, x: Tensor<3>) -> Tensor<3> {
        let query = self.attention.queries(x.clone());
        let (key, value) = self.attention.keys_values(x); // [batch, n_heads, patches, d_head]
        let mask = match &self.distances {
            Some(distances) => Mask::Bias(distances.forward(query.clone())),
            None => Mask::Full,
        };
        self.attention.attend(query, key, value, &mask)
    }
}

impl Painter {
    /// Pictures and answers as tokens, each `[batch, patches, d_model]`, the masked patches of the answers hidden.
    ///
    /// - `pictures`, `answers`: `[batch, 3, height, width]`, normalised
    /// - `masked`: `[batch, patches]`, 1 where a patch of the answer is to be painted, else 0
    ///
    /// # Panics
    /// If the pictures are not of the model's size.
    pub fn embed(&self, pictures: Tensor<4>, answers: Tensor<4>, masked: Tensor<2>) -> [Tensor<3>; 2] {
        let positions = self.positions_of_patches().unsqueeze::<3>(); // [1, patches, d_model]
        let x = self.patches.forward(pictures);
        let y = self.patches.forward(answers);
        let token = |token: &Param<Tensor<1>>| token.val().unsqueeze::<3>();
        let masked = masked.unsqueeze_dim::<3>(2); // [batch, patches, 1]
        let y = y * (masked.clone() * -1.0 + 1.0) + token(&self.mask_token) * masked;
        let x = x + token(&self.picture_token) + positions.clone();
        let y = y + token(&self.answer_token) + positions;
        [x, y]
    }

    /// `[patches, d_model]`
    fn positions_of_patches(&self) -> Tensor<2> {
        let PainterConfig { position_grid: side, class_position, .. } = self.config;
        let table = self.positions.weight.val().narrow(0, usize::from(class_position), side * side);
        resize_positions(table, [side; 2], self.config.grid())
    }

    /// The features of both streams that the decoder takes, `[batch, patches, d_model]` each; `sharing` says for every
    /// block (from 0) what is shared within the batch.
    pub fn encode(
        &self,
        [pictures, answers]: [Tensor<3>; 2],
        sharing: impl Fn(usize) -> Sharing,
    ) -> Vec<Tensor<3>> {
        let mut x = Tensor::cat(vec![pictures, answers], 0); // [2 batch, patches, d_model]
        let mut features = Vec::with_capacity(self.config.taps.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, sharing(layer));
            if layer == self.config.merge {
                let [pictures, answers] = halves(x);
                x = (pictures + answers) * 0.5;
            }
            if self.config.taps.contains(&layer) {
                features.push(self.norm.forward(x.clone()));
            }
        }
        features
    }

    /// What is painted: features as [`Painter::encode`] gives them to `[batch, 3, height, width]`.
    pub fn decode(&self, features: Vec<Tensor<3>>) -> Tensor<4> {
        let Decoder { embed, conv, norm, colours, activation } = &self.decoder;
        let PainterConfig { patch_size, .. } = self.config;
        let x = embed.forward(Tensor::cat(features, 2)); // [batch, patches, patch_size² * d_decoder]
        let x = unpatchify(x, self.config.grid(), patch_size); // [batch, height, width, d_decoder]
        let x = activation.forward(norm.forward(conv.forward(x)));
        colours.forward(x).permute([0, 3, 1, 2])
    }

    /// What the model paints, prompts included: `[batch, 3, height, width]`. Inputs as of [`Painter::embed`].
    ///
    /// # Panics
    /// As [`Painter::embed`].
    pub fn forward(&self, pictures: Tensor<4>, answers: Tensor<4>, masked: Tensor<2>) -> Tensor<4> {
        let streams = self.embed(pictures, answers, masked);
        self.decode(self.encode(streams, |_| Sharing::Nothing))
    }

    /// The mean distance of what is painted from the answers, `[batch, 3, height, width]` both, where it counts: at valid
    /// pixels (1, else 0) of masked patches. A sample whose answer is all but black where it is not masked does not count.
    /// `[1]`
    pub fn loss(
        &self,
        painted: Tensor<4>,
        answers: Tensor<4>,
        masked: Tensor<2>,
        valid: Tensor<4>,
    ) -> Tensor<1> {
        /// Of a sample's samples, which are 0 to 1.
        const DARK: f64 = 300.0;
        let masked = self.config.pixels(masked);
        let device = answers.device();
        let of_channels = |values: [f64; 3]| {
            Tensor::<1>::from_floats(values, &device).cast(answers.dtype()).reshape([1, CHANNELS, 1, 1])
        };
        let shown = answers.clone() * of_channels(STD) + of_channels(MEAN);
        let shown = shown * (masked.clone() * -1.0 + 1.0);
        let light = shown.sum_dim(1).sum_dim(2).sum_dim(3); // [batch, 1, 1, 1]
        let counts = light.greater_equal_elem(DARK).float().cast(answers.dtype());
        let counted = masked * valid * counts;
        let distance = self.config.distance.of(painted, answers);
        (distance * counted.clone()).sum() / (counted.sum() + 1e-2)
    }
}

impl PainterConfig {
    /// What is said of patches, `[batch, patches]`, of every pixel: `[batch, 3, height, width]`.
    pub(crate) fn pixels(&self, of_patches: Tensor<2>) -> Tensor<4> {
        let [batch, patches] = of_patches.dims();
        let values = self.patch_size * self.patch_size * CHANNELS;
        let repeated = of_patches.unsqueeze_dim::<3>(2).expand([batch, patches, values]);
        unpatchify(repeated, self.grid(), self.patch_size).permute([0, 3, 1, 2])
    }
}

/// The two halves of a batch.
fn halves(x: Tensor<3>) -> [Tensor<3>; 2] {
    let [both, _, _] = x.dims();
    [x.clone().narrow(0, 0, both / 2), x.narrow(0, both / 2, both / 2)]
}

impl PainterConfig {
    /// The authors' constructor arguments; what is left out has the values of the released model.
    ///
    /// # Errors
    /// If they are malformed, or ask for what is not built.
    pub fn authors(config: &Config) -> Result<Self, ConfigError> {
        config.only("in_chans", &["3"])?;
        config.only("use_abs_pos", &["true"])?;
        let windows = config.sizes("window_block_indexes").is_some_and(|blocks| !blocks.is_empty());
        if windows && config.integer_or("window_size", 14)? != 0 {
            return Err(config.error("window_block_indexes", "lists of blocks: windows are not supported"));
        }
        config.only("residual_block_indexes", &["[]"])?;
        let d_model = config.size_or("embed_dim", LARGE.d_model)?;
        let d_ff = match config.number_or("mlp_ratio", 4.0)? * d_model as f64 {
            d_ff @ 1.0..=2_147_483_648.0 => d_ff as usize,
            _ => return Err(config.error("mlp_ratio", "a ratio that leaves the MLP a width")),
        };
        let image_size = match config.has("img_size") {
            true => sides_or(config, "img_size", 0)?,
            false => LARGE.image_size,
        };
        if image_size[0] != 2 * image_size[1] {
            return Err(config.error("img_size", "twice as high as wide, for one square above another"));
        }
        let patch_size = side_or(config, "patch_size", LARGE.patch_size)?;
        Self {
            image_size,
            patch_size,
            d_model,
            d_ff,
            n_layers: config.blocks_or("depth", LARGE.n_layers)?,
            n_heads: config.size_or("num_heads", LARGE.n_heads)?,
            layer_norm_eps: config.number_or("layer_norm_eps", LARGE.layer_norm_eps)?,
            qkv_bias: config.flag_or("qkv_bias", true)?,
            relative_positions: config.flag_or("use_rel_pos", true)?,
            position_grid: side_or(config, "pretrain_img_size", 224)? / patch_size,
            class_position: config.flag_or("pretrain_use_cls_token", true)?,
            d_decoder: config.size_or("decoder_embed_dim", LARGE.d_decoder)?,
            distance: match config.text("loss_func") {
                Some("l1") => Distance::L1,
                Some("l2") => Distance::L2,
                Some("l1l2") => Distance::L1L2,
                Some("smoothl1") => LARGE.distance,
                None if !config.has("loss_func") => LARGE.distance,
                _ => return Err(config.error("loss_func", "l1, l2, l1l2 or smoothl1")),
            },
            ..LARGE
        }
        .checked(config, ["img_size", "pretrain_img_size", "num_heads", "depth", "depth"])
    }

    /// That everything fits together. `fields` are the names of picture size, size of the table of positions, heads, and
    /// of what says after which blocks streams are averaged and features taken.
    pub(crate) fn checked(
        self,
        config: &Config,
        [image_size, position_size, heads, merge, taps]: [&str; 5],
    ) -> Result<Self, ConfigError> {
        config.divides(heads, self.n_heads, self.d_model)?;
        let [height, width] = self.image_size;
        if !height.is_multiple_of(2 * self.patch_size) || !width.is_multiple_of(self.patch_size) {
            let wanted =
                format!("two pictures of patches of {0} x {0} pixels, one above the other", self.patch_size);
            return Err(config.error(image_size, &wanted));
        }
        if self.position_grid == 0 {
            return Err(
                config.error(position_size, &format!("at least a patch's {} pixels", self.patch_size))
            );
        }
        if self.taps.is_empty() || !self.taps.is_sorted_by(|a, b| a < b) {
            return Err(config.error(taps, "the numbers of blocks, ascending"));
        }
        if self.taps.iter().any(|&layer| layer >= self.n_layers) {
            let last = self.taps[self.taps.len() - 1];
            return Err(config.error(taps, &format!("features of block {last}, of {} from 0", self.n_layers)));
        }
        if self.merge > self.taps[0] {
            return Err(config.error(merge, &format!("at most {}, where features are taken", self.taps[0])));
        }
        Ok(self)
    }
}

const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// The authors' names, of Painter and of what SegGPT has of it.
pub(crate) const RULES: &[Rule] = &[
    Under("patch_embed.proj.", "patches.", PAIR),
    Reshape("mask_token", "mask_token", Ones::Before(3)),
    Reshape("segment_token_x", "picture_token", Ones::Before(3)),
    Reshape("segment_token_y", "answer_token", Ones::Before(3)),
    Reshape("pos_embed", "positions.weight", Ones::Before(1)),
    Under(
        "blocks.{}.",
        "blocks.{}.",
        &[
            Under("norm1.", "norm1.", PAIR),
            Under("attn.", "", ATTENTION),
            Under("norm2.", "norm2.", PAIR),
            Under("mlp.fc1.", "mlp.up.", PAIR),
            Under("mlp.fc2.", "mlp.down.", PAIR),
        ],
    ),
    Under("norm.", "norm.", PAIR),
    Under("decoder_embed.", "decoder.embed.", PAIR),
    Under("decoder_pred.0.", "decoder.conv.", PAIR),
    Under("decoder_pred.1.", "decoder.norm.", PAIR),
    Reshape("decoder_pred.3.weight", "decoder.colours.weight", Ones::After(2)),
    Rename("decoder_pred.3.bias", "decoder.colours.bias"),
];

/// Of one block, authors and transformers alike.
pub(crate) const ATTENTION: &[Rule] = &[
    Split("qkv.weight", &["attention.query.weight", "attention.key.weight", "attention.value.weight"]),
    Split("qkv.bias", &["attention.query.bias", "attention.key.bias", "attention.value.bias"]),
    Under("proj.", "attention.output.", PAIR),
    Rename("rel_pos_h", "distances.rows"),
    Rename("rel_pos_w", "distances.columns"),
];

/// Keys of the authors.
pub const KEYS: KeyMap = KeyMap::new(RULES);

/// The authors' file, which they post without a configuration.
const FILE: &str = "painter_vit_large.pth";

fn of(folder: &Folder) -> Result<PainterConfig, Error> {
    match folder.has("config.json") {
        true => Ok(PainterConfig::authors(&folder.config("config.json")?)?),
        false => Ok(LARGE),
    }
}

/// Painter as the registry knows it.
pub const SYSTEM: System = System {
    name: "painter",
    about: "Painter: tasks shown and answered in pictures",
    file: "models/painter.rs",
    tasks: &["paint", "forward"],
    proved: &["painter"],
    presets: PRESETS,
    recognises: |folder, config| match config {
        Some(config) => config.text("model_type") == Some("painter"),
        None => folder.has(FILE),
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let model = fill(folder, of(folder)?.init(device), &KEYS, options)?;
        Ok(Box::new(Runner { model }))
    },
    generator: None,
};

/// A Painter behind the forward contract.
struct Runner {
    model: Painter,
}

/// Pictures, answers and what of them is to be painted, by the authors' argument names.
pub(crate) struct Asked {
    /// `imgs`: `[batch, 3, height, width]`
    pub pictures: Tensor<4>,
    /// `tgts`, as large
    pub answers: Tensor<4>,
    /// `bool_masked_pos`: `[batch, patches]`, 0 or 1; nothing unless it is given
    pub masked: Tensor<2>,
    /// `valid`: which pixels count, all unless it is given
    pub valid: Tensor<4>,
}

impl Asked {
    /// Asks for the inputs of the case.
    pub fn of(inputs: &mut Inputs, config: &PainterConfig) -> Option<Self> {
        let [height, width] = config.image_size;
        let pictures = inputs.needed_pictures("imgs", [CHANNELS, height, width]);
        let answers = inputs.needed_pictures("tgts", [CHANNELS, height, width]);
        let masked = inputs.mask("bool_masked_pos");
        let valid = inputs.float::<4>("valid");
        let pictures = pictures?;
        let [batch, ..] = pictures.dims();
        inputs.like("tgts", answers.as_ref().map(Tensor::dims), ("imgs", pictures.dims()));
        inputs.like("valid", valid.as_ref().map(Tensor::dims), ("imgs", pictures.dims()));
        inputs.shaped("bool_masked_pos", masked.as_ref().map(Tensor::dims), [batch, config.patches()]);
        let device = pictures.device();
        let masked = masked.map(|masked| masked.float());
        Some(Self {
            answers: answers?,
            masked: masked.unwrap_or_else(|| Tensor::zeros([batch, config.patches()], &device)),
            valid: valid.unwrap_or_else(|| Tensor::ones(pictures.dims(), &device)),
            pictures,
        })
    }

    /// The same in the numbers of a model's weights.
    pub fn like(self, model: &Painter) -> Self {
        let dtype = model.patches.weight.val().dtype();
        let Self { pictures, answers, masked, valid } = self;
        let (pictures, answers) = (pictures.cast(dtype), answers.cast(dtype));
        Self { pictures, answers, masked: masked.cast(dtype), valid: valid.cast(dtype) }
    }
}

impl Forward for Runner {
    /// `imgs`, `tgts`, and optionally `bool_masked_pos` and `valid`. `loss_all_valid` takes all pixels for valid.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let asked = Asked::of(&mut inputs, &self.model.config);
        inputs.finish()?;
        let Some(asked) = asked else { return Ok(Outputs::new()) }; // finished with an error
        let Asked { pictures, answers, masked, valid } = asked.like(&self.model);

        let [batch, ..] = pictures.dims();
        let PainterConfig { patch_size, d_model, .. } = self.model.config;
        let [rows, columns] = self.model.config.grid();
        let streams = self.model.embed(pictures, answers.clone(), masked.clone());
        let features = self.model.encode(streams, |_| Sharing::Nothing);
        let last = features[features.len() - 1].clone();
        let painted = self.model.decode(features);
        let loss = |valid| self.model.loss(painted.clone(), answers.clone(), masked.clone(), valid);
        Ok(vec![
            output("latent_last", last.reshape([batch, rows, columns, d_model])),
            output("pred_patches", patchify(painted.clone(), patch_size)),
            output("loss", loss(valid.clone())),
            output("loss_all_valid", loss(valid.ones_like())),
            output("pred_image", painted),
        ])
    }
}

/// A Painter that answers pictures.
pub struct Artist {
    /// The model.
    pub model: Painter,
    /// For pictures and answers.
    pub easel: Easel,
}

impl Artist {
    /// Loads a folder.
    ///
    /// # Errors
    /// If it is malformed, or of another system.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let system = System::of(folder)?;
        if system.name != SYSTEM.name {
            let task = "paint answers as examples show them (systems that can: painter, seggpt)";
            return Err(Error::Task { system: system.name, task });
        }
        let config = of(folder)?;
        let easel = Easel::of_authors(config.picture_size(), Filter::Bicubic);
        Ok(Self { model: fill(folder, config.init(device), &KEYS, options)?, easel })
    }

    /// The answer to a picture as the examples show it, at the picture's size. Of several examples, what each says of the
    /// question is averaged in every block, as SegGPT does it with the same trunk; the authors' Painter is shown one.
    ///
    /// The authors resize depths and semantic segmentations bilinear, instances and keypoints by the nearest pixel, and
    /// pictures that are restored bicubic.
    ///
    /// # Errors
    /// If there is no example, or an answer is not as large as its picture.
    pub fn paint(
        &self,
        picture: &Rgb8,
        examples: &[Example],
        interpolation: Interpolation,
    ) -> Result<Painting, Error> {
        let weight = self.model.patches.weight.val();
        let (device, dtype) = (weight.device(), weight.dtype());
        let config = &self.model.config;
        let asked = self.easel.question(picture, examples, &device)?;
        let [pictures, answers] = asked.map(|pictures| pictures.cast(dtype));
        let masked = config.lower_half(examples.len(), &device).cast(dtype);
        let streams = self.model.embed(pictures, answers, masked);
        let features = self.model.encode(streams, |layer| Rows::Examples.sharing(layer, config.merge + 1));
        Ok(self.easel.answer(self.model.decode(features), picture, interpolation))
    }
}

/// `painter_vit_large_patch16_input896x448_win_dec64_8glb_sl1` of the authors.
pub(crate) const LARGE: PainterConfig = PainterConfig {
    image_size: [896, 448],
    patch_size: 16,
    d_model: 1024,
    d_ff: 4096,
    n_layers: 24,
    n_heads: 16,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-6,
    qkv_bias: true,
    relative_positions: true,
    position_grid: 14,
    class_position: true,
    merge: 2,
    taps: Cow::Borrowed(&[5, 11, 17, 23]),
    d_decoder: 64,
    decoder_norm_eps: 1e-6,
    distance: Distance::SmoothL1(0.01),
};

/// What a preset points to.
const RELEASED: &PainterConfig = &LARGE;

/// Published sizes.
pub const PRESETS: &[Preset] = &[Preset {
    name: "BAAI/Painter",
    shape: Shape::Painter(RELEASED),
    weights: Weights::Hub,
    license: "MIT",
    parameters: 370_721_155,
    source: "the authors' constructor; painter_vit_large.pth is 1.48 GB of f32",
}];

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{Distribution, TensorData, Tolerance};
    use volary_weights::parameters;

    use super::*;

    /// Three blocks over two pictures of 2 x 2 patches.
    pub(crate) const TINY: PainterConfig = PainterConfig {
        image_size: [8, 4],
        patch_size: 2,
        d_model: 8,
        d_ff: 12,
        n_layers: 3,
        n_heads: 2,
        position_grid: 3,
        merge: 1,
        taps: Cow::Borrowed(&[1, 2]),
        d_decoder: 4,
        ..LARGE
    };

    pub(crate) fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    pub(crate) fn config(fields: &str) -> Config {
        Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap()
    }

    /// What the folder of a fixture makes of these inputs.
    pub(crate) fn run(fixture: &str, inputs: &[(&str, TensorData)]) -> Result<Outputs, Error> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
        crate::registry::forward(&Folder::Disk(folder), &inputs, &LoadOptions::default(), &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_leads_back() {
        for parameter in parameters(&TINY.init(&Device::flex())) {
            let from = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(from.len(), 1, "{}", parameter.path);
            assert!(KEYS.paths(&from[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
        }
    }

    #[test]
    fn nothing_said_is_the_released_model() {
        assert_eq!(PainterConfig::authors(&config(r#""model_type": "painter""#)).unwrap(), LARGE);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""img_size": [448, 448]"#, "`img_size`: expected twice as high as wide"),
            (r#""img_size": [880, 440]"#, "`img_size`: expected two pictures of patches of 16 x 16"),
            (r#""window_block_indexes": [0, 1, 3]"#, "`window_block_indexes`"),
            (r#""residual_block_indexes": [2]"#, "`residual_block_indexes`"),
            (r#""use_abs_pos": false"#, "`use_abs_pos`"),
            (r#""in_chans": 1"#, "`in_chans`"),
            (r#""num_heads": 5"#, "`num_heads`: expected a divisor of 1024"),
            (r#""depth": 23"#, "`depth`: expected features of block 23, of 23 from 0"),
            (r#""mlp_ratio": 0"#, "`mlp_ratio`"),
            (r#""pretrain_img_size": 8"#, "`pretrain_img_size`"),
            (r#""loss_func": "huber""#, "`loss_func`"),
        ] {
            let message = PainterConfig::authors(&config(fields)).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        // windows of size 0 are none, and so are lists of blocks in a list, as released
        for fields in [
            r#""window_block_indexes": [0, 1], "window_size": 0"#,
            r#""window_block_indexes": [[0, 1], [3, 4]], "window_size": 14"#,
        ] {
            assert_eq!(PainterConfig::authors(&config(fields)).unwrap(), LARGE);
        }
    }

    /// Half a step, a step and three steps of a beta of 1 apart.
    #[test]
    fn distances_literal() {
        for (distance, wanted) in [
            (Distance::L1, [0.5, 1.0, 3.0]),
            (Distance::L2, [0.25, 1.0, 9.0]),
            (Distance::L1L2, [0.375, 1.0, 6.0]),
            (Distance::SmoothL1(1.0), [0.125, 0.5, 2.5]),
            (Distance::SmoothL1(2.0), [0.0625, 0.25, 2.0]),
        ] {
            let found = Tensor::<1>::from_floats([0.5, 2.0, -4.0], &Device::flex());
            let right = Tensor::<1>::from_floats([1.0, 1.0, -1.0], &Device::flex());
            let apart = distance.of(found, right).into_data();
            apart.assert_approx_eq::<f32>(&TensorData::from(wanted), Tolerance::default());
        }
    }

    /// Four rows of two patches, of which the second is asked about.
    #[test]
    fn what_is_shared_is_the_mean_of_the_lower_half() {
        let x = || {
            Tensor::<3>::from_floats(
                [[[1.0], [2.0]], [[3.0], [4.0]], [[5.0], [8.0]], [[7.0], [0.0]]],
                &Device::flex(),
            )
        };
        let lower = |sharing: Sharing| -> Vec<f32> {
            let shared = sharing.apply(x());
            let upper: Vec<f32> = shared.clone().narrow(1, 0, 1).into_data().iter().collect();
            assert_eq!(upper, [1.0, 3.0, 5.0, 7.0]);
            shared.narrow(1, 1, 1).into_data().iter().collect()
        };
        assert_eq!(lower(Sharing::Nothing), [2.0, 4.0, 8.0, 0.0]);
        assert_eq!(lower(Sharing::EachStream), [3.0, 3.0, 4.0, 4.0]);
        assert_eq!(lower(Sharing::All), [3.5; 4]);
    }

    /// What an answer shows where it is masked changes nothing of what is painted.
    #[test]
    fn masked_patches_are_not_seen() {
        let model = TINY.init(&Device::flex());
        let masked = Tensor::<2>::from_floats([[0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]], &Device::flex());
        let (pictures, answers) = (random([1, 3, 8, 4]), random([1, 3, 8, 4]));
        let other = answers.clone() + TINY.pixels(masked.clone()) * 5.0;
        let paint = |answers| model.forward(pictures.clone(), answers, masked.clone()).into_data();
        paint(answers.clone()).assert_approx_eq::<f32>(&paint(other), Tolerance::absolute(1e-5));
        let seen = answers.clone() + (TINY.pixels(masked.clone()) * -1.0 + 1.0) * 5.0;
        let [found, other] = [answers, seen].map(|answers| paint(answers).iter::<f32>().collect::<Vec<_>>());
        assert!(found.iter().zip(other).any(|(a, b)| (a - b).abs() > 1e-3));
    }

    /// Two samples, two of eight patches masked; what is painted is 1 off everywhere, of one sample nothing counts.
    #[test]
    fn the_loss_counts_valid_pixels_of_masked_patches_of_bright_samples() {
        let config = PainterConfig { distance: Distance::L1, ..TINY };
        let model = config.init(&Device::flex());
        let row = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0];
        let masked = Tensor::<2>::from_floats([row, row], &Device::flex());
        let black =
            Tensor::<1>::from_floats(MEAN, &Device::flex()) / Tensor::from_floats(STD, &Device::flex());
        let black = (black * -1.0).reshape([1, 3, 1, 1]).expand([1, 3, 8, 4]);
        // 3 of 4 patches are shown, 72 numbers of each sample: of brightness 5, above 300 in all
        let bright = black.clone()
            + Tensor::<1>::from_floats(STD, &Device::flex()).recip().reshape([1, 3, 1, 1]) * 5.0;
        let answers = Tensor::cat(vec![black, bright], 0);
        let valid = answers
            .ones_like()
            .slice_assign([0..2, 0..3, 0..1, 0..4], Tensor::zeros([2, 3, 1, 4], &Device::flex()));
        let off = Tensor::<1>::from_floats([100.0, 1.0], &Device::flex()).reshape([2, 1, 1, 1]);
        let found = model.loss(answers.clone() + off, answers, masked, valid).into_scalar::<f32>();
        // 2 patches of 12 numbers, less the 6 of the first row that are not valid
        assert!((found - 18.0 / 18.01).abs() < 1e-4, "{found}");
    }

    #[test]
    fn inputs_that_do_not_fit_are_told() {
        let floats = |shape: &[usize]| TensorData::new(vec![0.5_f32; shape.iter().product()], shape);
        let (one, two) = (floats(&[1, 3, 32, 16]), floats(&[2, 3, 32, 16]));
        let cases: &[(&[(&str, TensorData)], &str)] = &[
            (&[("tgts", one.clone())], "`imgs` is missing"),
            (&[("imgs", one.clone())], "`tgts` is missing"),
            (
                &[("imgs", floats(&[1, 3, 16, 16])), ("tgts", one.clone())],
                "[3, 16, 16], expected [3, 32, 16]",
            ),
            (&[("imgs", one.clone()), ("tgts", two)], "`tgts` is [2, 3, 32, 16], `imgs` [1, 3, 32, 16]"),
            (
                &[("imgs", one.clone()), ("tgts", one.clone()), ("bool_masked_pos", floats(&[1, 31]))],
                "`bool_masked_pos` is [1, 31], expected [1, 32]",
            ),
        ];
        for fixture in ["painter", "seggpt"] {
            for (inputs, named) in cases {
                let message = run(fixture, inputs).unwrap_err().to_string();
                assert!(message.contains(named), "{message}");
            }
        }
    }

    #[test]
    fn the_authors_file_tells_itself() {
        for (file, name) in [(FILE, "painter"), ("seggpt_vit_large.pth", "seggpt")] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join(file), "").unwrap();
            assert_eq!(System::of(&Folder::Disk(folder.path().into())).unwrap().name, name);
        }
    }
}
