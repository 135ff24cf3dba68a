//! BriVL: a tower for pictures and one for Chinese text, trained to meet by momentum contrast. WenLan 1.0 (Huo et al.
//! 2021, <https://arxiv.org/abs/2103.06561>) and the release with Fei et al. 2022
//! (<https://www.nature.com/articles/s41467-022-30761-2>), which sees a grid of regions instead of those of a detector.
//!
//! Regions are read off EfficientNet's map, texts off BERT's states; each tower makes one vector of them. The numbers
//! match the authors' code with `BertModel` of transformers and `TransformerEncoder` of torch; the fixture puts one
//! convolution in EfficientNet's place (`"CNN": "tiny"`), and what training adds is checked against an oracle written
//! from that code. EfficientNet itself is proved in [`crate::efficientnet`].
//!
//! Weights are given on application. Beside them a `config.json` is needed: `{"model_type": "brivl"}` is WenLan 1.0, with
//! the names of the authors' `cfg/*.yml` for what differs. To see pictures and read texts, as `classify` and `search` do,
//! a folder also needs a tokenizer and a `preprocessor_config.json`. There pictures fall into the later release's grid of
//! regions, for there is no detector here; and since BERT sees padding, all texts are padded alike, to `MAX_TEXT_LEN`.
//!
//! ```sh
//! volary classify cat.jpg --labels "一只猫,一条狗" --model path/to/brivl
//! ```

use burn::module::Module;
use burn::tensor::activation::relu;
use burn::tensor::ops::PadMode;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use volary_kernels::layers::{Attention, AttentionConfig, LayerNorm, Linear, LinearConfig, Mlp, MlpConfig};
use volary_kernels::ops::{Activation, Mask};
use volary_multimodal::contrastive::info_nce;
use volary_multimodal::moco::{Queue, momentum_update, queue_cross_entropy};
use volary_vision::efficientnet::{EfficientNet, EfficientNetConfig};
use volary_vision::patch::PatchEmbedding;
use volary_vision::sample::{affine_grid, grid_sample};
use volary_weights::{Checkpoint, Entry, KeyMap, Ones, Rule};

use Rule::{Rename, Reshape, Split, Under};

use crate::bert::{self, BASE, Bert, BertConfig, BertInput, LARGE};
use crate::config::{Config, ConfigError};
use crate::efficientnet;
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::sentence::unit;
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower};

/// The default of torch's `TransformerEncoderLayer`.
const LAYER_NORM_EPS: f64 = 1e-5;

/// Shape of a whole BriVL.
#[derive(Clone, Debug, PartialEq)]
pub struct BrivlConfig {
    /// Height of the pictures that boxes are measured on, in pixels.
    pub image_size: usize,
    /// Each region is read at so many times so many points.
    pub grid_size: usize,
    /// Into how many rows and columns a picture falls of which nobody says the regions.
    pub box_grid: usize,
    /// To how many tokens texts are padded.
    pub text_length: usize,
    /// What makes a picture a map.
    pub backbone: BackboneConfig,
    /// What makes tokens states.
    pub bert: BertConfig,
    /// On regions; its width is that of the space where both towers meet.
    pub image: EncoderConfig,
    /// On tokens.
    pub text: EncoderConfig,
    /// Whether there are slow copies of both towers.
    pub slow: bool,
    /// How many embeddings the queues hold; `None` without queues.
    pub queue_size: Option<usize>,
    /// The share of themselves that slow copies keep in an update.
    pub momentum: f64,
    /// Cosines are divided by this.
    pub temperature: f64,
}

/// What makes a picture a map.
#[derive(Clone, Debug, PartialEq)]
pub enum BackboneConfig {
    /// As published.
    EfficientNet(EfficientNetConfig),
    /// One convolution of patches, for tests.
    Patches {
        /// Side of a patch in pixels.
        side: usize,
    },
}

/// Shape of what stands on a backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncoderConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
}

/// Both towers, and what training keeps beside them.
#[derive(Module, Debug)]
pub struct Brivl {
    /// Those that learn.
    pub towers: Towers,
    /// Those that follow.
    pub slow: Option<Towers>,
    /// What the slow ones made of the last batches.
    pub queues: Option<Queues>,
}

/// A tower for pictures and one for text.
#[derive(Module, Debug)]
pub struct Towers {
    /// Pictures.
    pub image: ImageTower,
    /// Text.
    pub text: TextTower,
}

/// The last embeddings of both slow towers.
#[derive(Module, Debug)]
pub struct Queues {
    /// Of pictures.
    pub image_queue: Queue,
    /// Of texts.
    pub text_queue: Queue,
}

/// Pictures: a map, regions read off it, an encoder over them.
#[derive(Module, Debug)]
pub struct ImageTower {
    /// Makes the map.
    pub backbone: Backbone,
    /// `[d_model, d_model]`, on every point of a region.
    pub pool: Linear,
    /// Over regions.
    pub encoder: Encoder,
    image_size: usize,
    grid_size: usize,
}

/// What makes a picture a map.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Backbone {
    /// As published.
    EfficientNet(EfficientNet),
    /// One convolution.
    Patches(PatchEmbedding),
}

/// Text: BERT, an encoder over its states.
#[derive(Module, Debug)]
pub struct TextTower {
    /// It sees padding as it sees text.
    pub bert: Bert,
    /// Over tokens.
    pub encoder: Encoder,
}

/// A transformer over unit vectors, whose mean a two-layer MLP makes an embedding.
#[derive(Module, Debug)]
pub struct Encoder {
    /// The blocks.
    pub blocks: Vec<Block>,
    /// `d_model -> d_embed -> d_embed`, through ReLU.
    pub projection: Mlp,
}

/// A post-norm transformer block with ReLU.
#[derive(Module, Debug)]
pub struct Block {
    /// Self-attention.
    pub attention: Attention,
    /// After the attention's residual.
    pub norm1: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    /// After the MLP's residual.
    pub norm2: LayerNorm,
}

/// Unit vectors of pairs, row for row.
#[derive(Clone, Debug)]
pub struct Pairs {
    /// `[batch, d_embed]`.
    pub images: Tensor<2>,
    /// `[batch, d_embed]`.
    pub texts: Tensor<2>,
}

/// How a batch fares against the queues.
#[derive(Clone, Debug)]
pub struct Contrast {
    /// Of pictures to their texts and to the queue of texts, `[batch, 1 + size]`.
    pub image_to_text: Tensor<2>,
    /// Of texts to their pictures and to the queue of pictures, `[batch, 1 + size]`.
    pub text_to_image: Tensor<2>,
    /// Both directions' cross-entropies added up, `[1]`.
    pub loss: Tensor<1>,
}

impl BrivlConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Brivl {
        let queue = |size| Queue::new(self.image.d_model, size, device);
        Brivl {
            towers: self.towers(device),
            slow: self.slow.then(|| self.towers(device).no_grad()),
            queues: self.queue_size.map(|size| Queues { image_queue: queue(size), text_queue: queue(size) }),
        }
    }

    fn towers(&self, device: &Device) -> Towers {
        let d_embed = self.image.d_model;
        Towers {
            image: ImageTower {
                backbone: match &self.backbone {
                    BackboneConfig::EfficientNet(config) => Backbone::EfficientNet(config.init(device)),
                    BackboneConfig::Patches { side } => {
                        Backbone::Patches(PatchEmbedding::new(3, *side, d_embed, device))
                    }
                },
                pool: LinearConfig::new(d_embed, d_embed).init(device),
                encoder: self.image.init(d_embed, device),
                image_size: self.image_size,
                grid_size: self.grid_size,
            },
            text: TextTower { bert: self.bert.init(device), encoder: self.text.init(d_embed, device) },
        }
    }

    /// The regions of a picture of which nobody says them: `box_grid x box_grid` equal parts, column by column, and the
    /// whole: `[1, box_grid² + 1, 4]`, left, top, right and bottom in pixels.
    pub fn grid(&self, device: &Device) -> Tensor<3> {
        let (whole, parts) = (self.image_size as f32, self.box_grid);
        let at = |part: usize| part as f32 * (whole / parts as f32);
        let part = |column: usize, row: usize| [at(column), at(row), at(column + 1), at(row + 1)];
        let parts = (0..parts).flat_map(|column| (0..parts).flat_map(move |row| part(column, row)));
        let values: Vec<f32> = parts.chain([0.0, 0.0, whole, whole]).collect();
        let boxes = values.len() / 4;
        Tensor::from_data(TensorData::new(values, [1, boxes, 4]), device)
    }
}

impl EncoderConfig {
    fn init(&self, d_embed: usize, device: &Device) -> Encoder {
        let norm = || LayerNorm::new(self.d_model, LAYER_NORM_EPS, device);
        let block = |_| Block {
            attention: AttentionConfig::new(self.d_model, self.n_heads).init(device),
            norm1: norm(),
            mlp: MlpConfig::new(self.d_model, self.d_ff).init(device),
            norm2: norm(),
        };
        Encoder {
            blocks: (0..self.n_layers).map(block).collect(),
            projection: Mlp {
                up: LinearConfig::new(self.d_model, d_embed).init(device),
                down: LinearConfig::new(d_embed, d_embed).init(device),
            },
        }
    }
}

impl Backbone {
    /// `[batch, 3, height, width] -> [batch, rows, columns, d_model]`.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<4> {
        match self {
            Self::EfficientNet(net) => net.features(pixels),
            Self::Patches(patches) => {
                let [batch, _, height, width] = pixels.dims();
                let [d_model, _, side, _] = patches.weight.dims();
                relu(patches.forward(pixels)).reshape([batch, height / side, width / side, d_model])
            }
        }
    }

    /// Rows and columns of the map of a picture of `[height, width]`.
    fn cells(&self, size: [usize; 2]) -> [usize; 2] {
        match self {
            Self::EfficientNet(_) => size.map(|side| side.div_ceil(32)),
            Self::Patches(patches) => size.map(|side| side / patches.weight.dims()[2]),
        }
    }
}

impl ImageTower {
    /// What is in each region: normalised pixels `[batch, 3, height, width]` and boxes `[batch, boxes, 4]` (left, top,
    /// right, bottom in pixels) `-> [batch, boxes, d_model]`.
    ///
    /// A box's corners count as the middles of the map's outermost cells, yet its points are placed between the cells'
    /// edges; so it was trained.
    ///
    /// # Panics
    /// If the map has only one row or column.
    pub fn regions(&self, pixels: Tensor<4>, boxes: Tensor<3>) -> Tensor<3> {
        let map = self.backbone.forward(pixels); // [batch, rows, columns, d_model]
        let [batch, rows, columns, d_model] = map.dims();
        assert!(rows > 1 && columns > 1, "a map of {rows} x {columns} has no regions");
        let [_, n_boxes, _] = boxes.dims();
        let points = self.grid_size * self.grid_size;

        let boxes = boxes / (self.image_size as f64 / rows as f64); // in cells
        let edge = |at: usize| boxes.clone().narrow(2, at, 1); // [batch, n_boxes, 1]
        let (left, top, right, bottom) = (edge(0), edge(1), edge(2), edge(3));
        let stretch =
            |from: &Tensor<3>, to: &Tensor<3>, cells: usize| (to.clone() - from.clone()) / (cells - 1) as f64;
        let shift = |from: &Tensor<3>, to: &Tensor<3>, cells: usize| {
            (from.clone() + to.clone() - (cells - 1) as f64) / (cells - 1) as f64
        };
        let zero = left.zeros_like();
        let theta = vec![
            stretch(&left, &right, columns),
            zero.clone(),
            shift(&left, &right, columns),
            zero,
            stretch(&top, &bottom, rows),
            shift(&top, &bottom, rows),
        ];
        let theta = Tensor::cat(theta, 2).reshape([batch * n_boxes, 2, 3]);
        let grid = affine_grid(theta, [self.grid_size; 2]).reshape([batch, n_boxes * points, 2]);
        let sampled = self.pool.forward(grid_sample(map, grid)); // [batch, n_boxes * points, d_model]
        sampled.reshape([batch * n_boxes, points, d_model]).mean_dim(1).reshape([batch, n_boxes, d_model])
    }

    /// Unit vectors of pictures, by the `real` ones of their regions: `[batch, boxes, d_model] -> [batch, d_embed]`.
    pub fn forward(&self, regions: Tensor<3>, real: &Tensor<2, Bool>) -> Tensor<2> {
        self.encoder.forward(regions, real)
    }
}

impl TextTower {
    /// Unit vectors of texts, by the `real` ones of their tokens: `[batch, seq] -> [batch, d_embed]`.
    pub fn forward(&self, ids: Tensor<2, Int>, real: &Tensor<2, Bool>) -> Tensor<2> {
        self.encoder.forward(self.bert.forward(BertInput::from(ids)).hidden, real)
    }
}

impl Encoder {
    /// `[batch, seq, d_model] -> [batch, d_embed]`.
    pub fn forward(&self, x: Tensor<3>, real: &Tensor<2, Bool>) -> Tensor<2> {
        let mask = Mask::Padding(real.clone());
        let x = self.blocks.iter().fold(unit(x), |x, block| block.forward(x, &mask));
        let [batch, _, d_model] = x.dims();
        let counts = real.clone().float(); // [batch, seq]
        let sum = (x * counts.clone().unsqueeze_dim(2)).sum_dim(1).reshape([batch, d_model]);
        unit(self.projection.forward(sum / counts.sum_dim(1), Activation::Relu))
    }
}

impl Block {
    fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let x = self.norm1.of_sum(x.clone(), self.attention.forward(x, mask));
        self.norm2.of_sum(x.clone(), self.mlp.forward(x, Activation::Relu))
    }
}

impl Queues {
    /// How `pairs` fare against the queues, when the slow towers made `slow` of them.
    pub fn contrast(&self, pairs: &Pairs, slow: &Pairs, temperature: f64) -> Contrast {
        let Pairs { images, texts } = pairs.clone();
        let image_to_text = self.text_queue.logits(images, slow.texts.clone(), temperature);
        let text_to_image = self.image_queue.logits(texts, slow.images.clone(), temperature);
        let loss = queue_cross_entropy(image_to_text.clone()) + queue_cross_entropy(text_to_image.clone());
        Contrast { image_to_text, text_to_image, loss }
    }

    /// Takes in what the slow towers made of a batch.
    pub fn enqueue(self, slow: &Pairs) -> Self {
        Self {
            image_queue: self.image_queue.enqueue(slow.images.clone()),
            text_queue: self.text_queue.enqueue(slow.texts.clone()),
        }
    }
}

impl Brivl {
    /// The slow towers follow the others, of themselves keeping a share of `momentum`; with 0 they become like them, as
    /// training starts.
    pub fn follow(self, momentum: f64) -> Self {
        let slow = self.slow.map(|slow| momentum_update(slow, &self.towers, momentum));
        Self { slow, ..self }
    }
}

/// The id of `[PAD]`.
const PADDING: f32 = 0.0;

/// The weights' names end in these.
const CONVOLUTION: &str = "imgencoder.backbone.conv_stem.weight";
const CLASSIFIER: &str = "imgencoder.backbone.classifier.weight";
const POOLER: &str = "textencoder.backbone.bert.pooler.dense.weight";
const SLOW: &str = "imgencoder_mom.learnable.imgFC.fc1.weight";
const QUEUE: &str = "img_queue";

impl BrivlConfig {
    /// The configuration of a folder. Slow copies, queues and parts that no output needs are there if the weights have
    /// them.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built, or there are no weights.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::fitted(&folder.config("config.json")?, folder.checkpoint()?.as_ref())?)
    }

    /// `config.json` with the names of the authors' `cfg/*.yml`; what it leaves out is WenLan 1.0's.
    fn fitted(config: &Config, checkpoint: &dyn Checkpoint) -> Result<Self, ConfigError> {
        let entry = |end: &str| -> Option<&Entry> {
            checkpoint.entries().iter().find(|entry| entry.name.ends_with(end))
        };
        config.only("model_type", &["\"brivl\""])?;
        let image = EncoderConfig {
            d_model: config.size_or("IMG_FEATURE_DIM", WENLAN.image.d_model)?,
            d_ff: config.size_or("TRANSFORMER_FFN", WENLAN.image.d_ff)?,
            n_layers: config.blocks_or("IMG_TRANSFORMER_LAYER", WENLAN.image.n_layers)?,
            n_heads: config.size_or("IMG_TRANSFORMER_HEAD", WENLAN.image.n_heads)?,
        };
        config.divides("IMG_TRANSFORMER_HEAD", image.n_heads, image.d_model)?;

        let cnn = config.text("CNN").unwrap_or("tf_efficientnet_b5_ns");
        let backbone = match efficientnet::architecture(cnn) {
            Some(net) if net.d_features() != image.d_model => {
                let expected = format!("{}, the width of {cnn}", net.d_features());
                return Err(config.error("IMG_FEATURE_DIM", &expected));
            }
            Some(net) => {
                let classes = entry(CLASSIFIER).and_then(|entry| entry.shape.first());
                BackboneConfig::EfficientNet(net.with_classes(classes.copied().unwrap_or(0)))
            }
            None if cnn == "tiny" => {
                let side = entry(CONVOLUTION).and_then(|entry| entry.shape.last()).copied();
                BackboneConfig::Patches { side: side.unwrap_or(8).max(1) }
            }
            None => return Err(config.error("CNN", "tf_efficientnet_ with b0 to b8 or l2, or tiny")),
        };

        let is_large = config.text("ENCODER").is_some_and(|name| name.contains("large"));
        let default = if is_large { ROBERTA_LARGE } else { ROBERTA };
        let bert = BertConfig::shape(&config.object_or_empty("bert")?, &default)?;
        let bert = BertConfig { pooler: entry(POOLER).is_some(), ..bert };
        let text = EncoderConfig {
            d_model: config.size_or("TEXT_FEATURE_DIM", bert.d_model)?,
            d_ff: image.d_ff,
            n_layers: config.blocks_or("TEXT_TRANSFORMER_LAYER", WENLAN.text.n_layers)?,
            n_heads: config.size_or("TEXT_TRANSFORMER_HEAD", WENLAN.text.n_heads)?,
        };
        config.divides("TEXT_TRANSFORMER_HEAD", text.n_heads, text.d_model)?;
        if text.d_model != bert.d_model {
            return Err(config.error("TEXT_FEATURE_DIM", &format!("{}, the width of BERT", bert.d_model)));
        }

        let image_size = crate::vit::side_or(config, "IMG_SIZE", WENLAN.image_size)?;
        let cells = match backbone {
            BackboneConfig::EfficientNet(_) => image_size.div_ceil(32),
            BackboneConfig::Patches { side } => image_size / side,
        };
        if cells < 2 {
            return Err(config.error("IMG_SIZE", "so many pixels that the map has 2 x 2 cells"));
        }

        let text_length = config.size_or("MAX_TEXT_LEN", WENLAN.text_length.min(bert.context_length()))?;
        if text_length > bert.context_length() {
            let expected = format!("at most the {} positions of BERT", bert.context_length());
            return Err(config.error("MAX_TEXT_LEN", &expected));
        }

        let momentum = config.number_or("MOMENTUM", WENLAN.momentum)?;
        if !(0.0..=1.0).contains(&momentum) {
            return Err(config.error("MOMENTUM", "a number from 0 to 1"));
        }
        let temperature = config.number_or("TEMPERATURE", WENLAN.temperature)?;
        if temperature <= 0.0 {
            return Err(config.error("TEMPERATURE", "a number above 0"));
        }
        let small = |field: &str, default: usize| match config.size_or(field, default)? {
            size @ 1..=64 => Ok(size),
            _ => Err(config.error(field, "at most 64")),
        };
        let queue_size = entry(QUEUE).map(|_| config.size_or("QUEUE_SIZE", QUEUE_SIZE)).transpose()?;
        Ok(Self {
            image_size,
            grid_size: small("GRID_SIZE", WENLAN.grid_size)?,
            box_grid: small("BOX_GRID", WENLAN.box_grid)?,
            text_length,
            backbone,
            bert,
            image,
            text,
            slow: entry(SLOW).is_some(),
            queue_size,
            momentum,
            temperature,
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.backbone {
            BackboneConfig::EfficientNet(_) => &KEYS,
            BackboneConfig::Patches { .. } => &KEYS_PATCHES,
        }
    }
}

/// A block of torch's `TransformerEncoder`.
const BLOCK: &[Rule] = &[
    Split(
        "self_attn.in_proj_weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Split("self_attn.in_proj_bias", &["attention.query.bias", "attention.key.bias", "attention.value.bias"]),
    Rename("self_attn.out_proj.weight", "attention.output.weight"),
    Rename("self_attn.out_proj.bias", "attention.output.bias"),
    Rename("norm1.weight", "norm1.weight"),
    Rename("norm1.bias", "norm1.bias"),
    Rename("linear1.weight", "mlp.up.weight"),
    Rename("linear1.bias", "mlp.up.bias"),
    Rename("linear2.weight", "mlp.down.weight"),
    Rename("linear2.bias", "mlp.down.bias"),
    Rename("norm2.weight", "norm2.weight"),
    Rename("norm2.bias", "norm2.bias"),
];

const PROJECTION: &[Rule] = &[
    Rename("fc1.weight", "up.weight"),
    Rename("fc1.bias", "up.bias"),
    Rename("fc2.weight", "down.weight"),
    Rename("fc2.bias", "down.bias"),
];

/// What stands on any backbone.
const IMAGE: &[Rule] = &[
    Reshape("max_pool.0.weight", "pool.weight", Ones::After(2)),
    Rename("max_pool.0.bias", "pool.bias"),
    Under("imgAtt.layers.{}.", "encoder.blocks.{}.", BLOCK),
    Under("imgFC.", "encoder.projection.", PROJECTION),
];

const IMAGE_EFFICIENTNET: &[Rule] =
    &[Under("learnable.", "", IMAGE), Under("backbone.", "backbone.EfficientNet.", efficientnet::TRUNK)];

const IMAGE_PATCHES: &[Rule] = &[
    Under("learnable.", "", IMAGE),
    Rename("backbone.conv_stem.weight", "backbone.Patches.weight"),
    Rename("backbone.conv_stem.bias", "backbone.Patches.bias"),
];

const TEXT: &[Rule] = &[
    Under("backbone.bert.", "bert.", bert::TRUNK),
    Under("learnable.textAtt.layers.{}.", "encoder.blocks.{}.", BLOCK),
    Under("learnable.textFC.", "encoder.projection.", PROJECTION),
];

/// Whatever the backbone.
const SHARED: &[Rule] = &[
    Under("textencoder.", "towers.text.", TEXT),
    Under("textencoder_mom.", "slow.text.", TEXT),
    Rename("img_queue", "queues.image_queue.entries"),
    Rename("img_queue_ptr", "queues.image_queue.next"),
    Rename("text_queue", "queues.text_queue.entries"),
    Rename("text_queue_ptr", "queues.text_queue.next"),
];

/// The authors' file holds both towers under this, queues beside it.
const PREFIXES: &[&str] = &["learnable."];

/// Keys of the authors' code.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "", SHARED),
    Under("imgencoder.", "towers.image.", IMAGE_EFFICIENTNET),
    Under("imgencoder_mom.", "slow.image.", IMAGE_EFFICIENTNET),
])
.with_prefixes(PREFIXES);

/// The same with one convolution for a backbone.
pub const KEYS_PATCHES: KeyMap = KeyMap::new(&[
    Under("", "", SHARED),
    Under("imgencoder.", "towers.image.", IMAGE_PATCHES),
    Under("imgencoder_mom.", "slow.image.", IMAGE_PATCHES),
])
.with_prefixes(PREFIXES);

/// BriVL as the registry knows it.
pub const SYSTEM: System = System {
    name: "brivl",
    about: "two towers for pictures and Chinese text: BriVL (WenLan)",
    file: "models/brivl.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["brivl"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("brivl")),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = BrivlConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let config = BrivlConfig::of(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Box::new(Runner { model, config, device: device.clone() }))
    },
    generator: None,
};

/// A BriVL behind the forward contract.
struct Runner {
    model: Brivl,
    config: BrivlConfig,
    device: Device,
}

impl TwoTower for Runner {
    fn fit(&self) -> Fit {
        let BrivlConfig { image_size, text_length: context_length, ref bert, ref image, .. } = self.config;
        Fit { image_size, context_length, vocab_size: bert.vocab_size, d_embed: image.d_model }
    }

    /// By the grid of regions.
    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        let [batch, ..] = pixels.dims();
        let boxes = self.grid(batch);
        let [_, n_boxes, _] = boxes.dims();
        let tower = &self.model.towers.image;
        tower.forward(tower.regions(pixels, boxes), &self.all_real([batch, n_boxes]))
    }

    /// Padded to the length of all texts, for BERT sees padding.
    ///
    /// # Panics
    /// If a text is longer.
    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        let [_, seq] = ids.dims();
        let padding = self.config.text_length - seq;
        let ids = ids.pad((0, padding, 0, 0), PadMode::Constant(PADDING));
        let real = real.int().pad((0, padding, 0, 0), PadMode::Constant(0.0)).equal_elem(1);
        self.model.towers.text.forward(ids, &real)
    }

    fn scale(&self) -> Tensor<1> {
        let dtype = self.model.towers.image.pool.weight.val().dtype();
        Tensor::full([1], 1.0 / self.config.temperature, (&self.device, dtype))
    }
}

/// A batch of pictures.
struct Images {
    pixels: Tensor<4>,
    boxes: Tensor<3>,
    real: Tensor<2, Bool>,
}

/// A batch of texts.
struct Texts {
    ids: Tensor<2, Int>,
    real: Tensor<2, Bool>,
}

impl Forward for Runner {
    /// `image`, normalised pixels, and if wanted `image_boxes` (left, top, right, bottom; a grid and the whole where
    /// nobody says them) and `mask_images`, which of them are real; `texts` and if wanted `mask_texts`. Either kind alone
    /// will do.
    ///
    /// Gives `box_features`, `image_features`, `text_features`, and of slow towers `*_features_momentum`. Of as many texts
    /// as pictures it takes row and row for pairs and gives `similarity`, the loss in the batch and, with slow towers and
    /// queues, one step of training before any gradient: `moco.logits_*` and `moco.loss`, both queues after it has taken
    /// in what the slow towers made, and the first projection of the slow tower for pictures after an update.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let images = self.images(&mut inputs);
        let texts = self.texts(&mut inputs);
        inputs.needed(&["image", "texts"]);
        inputs.finish()?;

        let mut outputs = Outputs::new();
        let mut features = |towers: &Towers, suffix: &str| {
            let images = images.as_ref().map(|images| {
                let regions = towers.image.regions(images.pixels.clone(), images.boxes.clone());
                let features = towers.image.forward(regions.clone(), &images.real);
                if suffix.is_empty() {
                    outputs.push(output("box_features", regions));
                }
                outputs.push(output(&format!("image_features{suffix}"), features.clone()));
                features
            });
            let texts = texts.as_ref().map(|texts| {
                let features = towers.text.forward(texts.ids.clone(), &texts.real);
                outputs.push(output(&format!("text_features{suffix}"), features.clone()));
                features
            });
            images.zip(texts).map(|(images, texts)| Pairs { images, texts })
        };
        let pairs = features(&self.model.towers, "");
        let slow = self.model.slow.as_ref().and_then(|slow| features(slow, "_momentum"));

        let Some(pairs) = pairs else { return Ok(outputs) };
        let similarity = pairs.images.clone().matmul(pairs.texts.clone().transpose());
        outputs.push(output("similarity", similarity.clone()));
        let [batch, others] = similarity.dims();
        if batch != others {
            return Ok(outputs);
        }
        let BrivlConfig { temperature, momentum, .. } = self.config;
        let scale = Tensor::from_data([1.0 / temperature], &self.device);
        let numbers = Tensor::arange(0..batch as i64, &self.device);
        let loss = info_nce(pairs.images.clone(), pairs.texts.clone(), scale, numbers);
        outputs.push(output(&format!("in_batch_infonce_loss_T{temperature}"), loss));

        let (Some(queues), Some(slow)) = (&self.model.queues, slow) else { return Ok(outputs) };
        let contrast = queues.contrast(&pairs, &slow, temperature);
        let after = queues.clone().enqueue(&slow);
        outputs.extend([
            output("moco.logits_i2t", contrast.image_to_text),
            output("moco.logits_t2i", contrast.text_to_image),
            output("moco.loss", contrast.loss),
            output("moco.img_queue_after", after.image_queue.entries.val()),
            output("moco.text_queue_after", after.text_queue.entries.val()),
        ]);
        if let Some(towers) = &self.model.slow {
            let [slow, model] =
                [towers, &self.model.towers].map(|towers| &towers.image.encoder.projection.up);
            let after = momentum_update(slow.clone(), model, momentum).weight.val();
            outputs.push(output("moco.imgFC.fc1.weight_momentum_after", after));
        }
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

impl Runner {
    /// The regions of pictures of which nobody says them.
    fn grid(&self, batch: usize) -> Tensor<3> {
        let grid = self.config.grid(&self.device);
        let [_, n_boxes, _] = grid.dims();
        grid.expand([batch, n_boxes, 4])
    }

    fn all_real(&self, shape: [usize; 2]) -> Tensor<2, Bool> {
        Tensor::<2>::zeros(shape, &self.device).equal_elem(0.0)
    }

    fn images(&self, inputs: &mut Inputs) -> Option<Images> {
        let pixels = inputs.float::<4>("image");
        let boxes = inputs.float::<3>("image_boxes");
        let real = inputs.mask("mask_images");
        let pixels = pixels?;
        let [batch, channels, height, width] = pixels.dims();
        let cells = self.model.towers.image.backbone.cells([height, width]);
        if channels != 3 || cells.iter().any(|&cells| cells < 2) {
            let found = [channels, height, width];
            inputs.problem(format!(
                "`image` has pictures of {found:?}, expected [3, height, width] with at least 2 x 2 cells on the map"
            ));
        }
        let boxes = boxes.unwrap_or_else(|| self.grid(batch));
        let [rows, n_boxes, edges] = boxes.dims();
        if [rows, edges] != [batch, 4] {
            let found = boxes.dims();
            inputs
                .problem(format!("`image_boxes` is {found:?}, expected {batch} rows of boxes of 4 numbers"));
        }
        let real = self.real(inputs, "mask_images", real, ("image_boxes", [batch, n_boxes]));
        Some(Images { pixels, boxes, real })
    }

    fn texts(&self, inputs: &mut Inputs) -> Option<Texts> {
        let BertConfig { vocab_size, n_positions, .. } = self.config.bert;
        let ids = inputs.ids::<2>("texts", vocab_size);
        let real = inputs.mask("mask_texts");
        let ids = ids?;
        let [_, seq] = ids.dims();
        if seq > n_positions {
            inputs.problem(format!("`texts` has {seq} tokens a row, at most {n_positions} fit"));
        }
        let real = self.real(inputs, "mask_texts", real, ("texts", ids.dims()));
        Some(Texts { ids, real })
    }

    /// The mask `name`, all real where there is none. One of another shape, or with a row of which nothing is real, is
    /// noted.
    fn real(
        &self,
        inputs: &mut Inputs,
        name: &str,
        mask: Option<Tensor<2, Bool>>,
        of: (&str, [usize; 2]),
    ) -> Tensor<2, Bool> {
        let Some(mask) = mask else { return self.all_real(of.1) };
        inputs.like(name, Some(mask.dims()), of);
        let counts = mask.clone().int().sum_dim(1).into_data();
        if let Some(row) = counts.iter::<i64>().position(|count| count == 0) {
            inputs.problem(format!("row {row} of `{name}` has nothing that is real"));
        }
        mask
    }
}

/// hfl/chinese-roberta-wwm-ext and its large sister, of whom the authors keep the pooler.
const ROBERTA: BertConfig = BertConfig { vocab_size: 21128, ..BASE };
const ROBERTA_LARGE: BertConfig = BertConfig { vocab_size: 21128, ..LARGE };
const QUEUE_SIZE: usize = 9600;

/// `BriVL-1.0`, pictures of 380 pixels.
const WENLAN: BrivlConfig = BrivlConfig {
    image_size: 380,
    grid_size: 4,
    box_grid: 6,
    text_length: 80,
    backbone: BackboneConfig::EfficientNet(EfficientNetConfig::scaled(1.6, 2.2).with_classes(1000)),
    bert: ROBERTA,
    image: EncoderConfig { d_model: 2048, d_ff: 2048, n_layers: 4, n_heads: 4 },
    text: EncoderConfig { d_model: 768, d_ff: 2048, n_layers: 4, n_heads: 4 },
    slow: true,
    queue_size: Some(QUEUE_SIZE),
    momentum: 0.99,
    temperature: 0.07,
};
/// `cfg/eval.yml` of the release with the paper of 2022.
const GRID: BrivlConfig = BrivlConfig { image_size: 456, ..WENLAN };
const GRID_LARGE: BrivlConfig =
    BrivlConfig { bert: ROBERTA_LARGE, text: EncoderConfig { d_model: 1024, ..WENLAN.text }, ..GRID };

const fn preset(
    name: &'static str,
    config: BrivlConfig,
    weights: Weights,
    license: &'static str,
    parameters: usize,
) -> Preset {
    let source =
        "timm, transformers and torch, both towers and their slow copies, classifier and pooler included";
    Preset { name, shape: Shape::Brivl(config), weights, license, parameters, source }
}

/// Published sizes. Four bytes for each parameter of the first are the 2.19 GB of `BriVL-1.0-5500w.pth`. Of BriVL 2.0, of
/// 5.3 B parameters, nobody says what it consists of.
pub const PRESETS: &[Preset] = &[
    preset("BriVL-1.0-5500w", WENLAN, Weights::Application, "MIT", 547_637_808),
    preset(
        "brivl-with-roberta-base",
        GRID,
        Weights::Elsewhere("the authors' drives"),
        "CC-BY-NC-ND-4.0",
        547_637_808,
    ),
    preset("brivl-with-roberta-large", GRID_LARGE, Weights::Unreleased, "not released", 1_018_283_056),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::Tolerance;
    use volary_weights::{LoadOptions, parameters, read_tensors};

    use super::*;

    fn fixture() -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/brivl"))
    }

    fn tensors(file: &str) -> BTreeMap<String, TensorData> {
        read_tensors(&fixture().path().join(file)).unwrap()
    }

    fn load() -> Brivl {
        let config = BrivlConfig::of(&fixture()).unwrap();
        fill(&fixture(), config.init(&Device::flex()), config.keys(), &LoadOptions::default()).unwrap()
    }

    fn run(inputs: &BTreeMap<String, TensorData>) -> Result<BTreeMap<String, TensorData>, Error> {
        let outputs = crate::registry::forward(&fixture(), inputs, &LoadOptions::default(), &Device::flex())?;
        Ok(outputs.into_iter().collect())
    }

    fn fitted(text: &str) -> Result<BrivlConfig, ConfigError> {
        let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        BrivlConfig::fitted(&config, fixture().checkpoint().unwrap().as_ref())
    }

    #[test]
    fn every_parameter_has_one_key_and_leads_back() {
        let tiny = BackboneConfig::EfficientNet(EfficientNetConfig::scaled(0.1, 0.5).with_classes(3));
        let encoder = EncoderConfig { d_model: 128, d_ff: 8, n_layers: 1, n_heads: 4 };
        let bert = BertConfig { n_layers: 1, ..ROBERTA };
        let net = BrivlConfig { backbone: tiny, bert, image: encoder, queue_size: Some(4), ..WENLAN };
        for config in [net, BrivlConfig::of(&fixture()).unwrap()] {
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = config.keys().keys(&parameter.path).unwrap();
                assert_eq!(keys.len(), 1, "{}", parameter.path);
                assert!(config.keys().paths(&keys[0]).unwrap().contains(&parameter.path), "{keys:?}");
            }
        }
    }

    /// The authors' `cfg/eval.yml`, and nothing at all.
    #[test]
    fn the_authors_configuration_is_read() {
        let released = r#"{"model_type": "brivl", "ENCODER": "hfl/chinese-roberta-wwm-ext", "TEXT_FEATURE_DIM": 768,
            "TEXT_TRANSFORMER_HEAD": 4, "TEXT_TRANSFORMER_LAYER": 4, "MAX_TEXT_LEN": 80, "CNN": "tf_efficientnet_b5_ns",
            "IMG_SIZE": 456, "IMG_FEATURE_DIM": 2048, "IMG_TRANSFORMER_HEAD": 4, "IMG_TRANSFORMER_LAYER": 4,
            "MAX_IMG_LEN": 37, "BOX_GRID": 6, "TOPK": 1, "QUEUE_SIZE": 9600, "MOMENTUM": 0.99, "TEMPERATURE": 0.07,
            "GRID_SIZE": 4}"#;
        let without_classes = |config: BrivlConfig| BrivlConfig {
            backbone: BackboneConfig::EfficientNet(EfficientNetConfig::scaled(1.6, 2.2)),
            ..config
        };
        assert_eq!(fitted(released).unwrap(), without_classes(GRID));
        assert_eq!(fitted(r#"{"model_type": "brivl"}"#).unwrap(), without_classes(WENLAN));
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, field) in [
            (r#""CNN": "resnet50""#, "`CNN`"),
            (r#""CNN": "tf_efficientnet_b0""#, "`IMG_FEATURE_DIM`: expected 1280"),
            (r#""IMG_TRANSFORMER_HEAD": 5"#, "`IMG_TRANSFORMER_HEAD`: expected a divisor of 2048"),
            (r#""TEXT_TRANSFORMER_HEAD": 5"#, "`TEXT_TRANSFORMER_HEAD`: expected a divisor of 768"),
            (r#""TEXT_FEATURE_DIM": 512"#, "`TEXT_FEATURE_DIM`: expected 768"),
            (r#""GRID_SIZE": 65"#, "`GRID_SIZE`: expected at most 64"),
            (r#""BOX_GRID": 0"#, "`BOX_GRID`"),
            (r#""QUEUE_SIZE": 0"#, "`QUEUE_SIZE`"),
            (r#""MOMENTUM": 1.5"#, "`MOMENTUM`"),
            (r#""TEMPERATURE": 0"#, "`TEMPERATURE`"),
            (r#""MAX_TEXT_LEN": 513"#, "`MAX_TEXT_LEN`: expected at most the 512 positions"),
            (r#""IMG_SIZE": 70000"#, "`IMG_SIZE`"),
            (r#""IMG_SIZE": 32"#, "`IMG_SIZE`: expected so many pixels"),
            (r#""TEXT_TRANSFORMER_LAYER": 5000"#, "`TEXT_TRANSFORMER_LAYER`"),
            (r#""bert": {"num_attention_heads": 7}"#, "`bert.num_attention_heads`"),
        ] {
            let message = fitted(&format!(r#"{{"model_type": "brivl", {fields}}}"#)).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }

    /// Column by column, as the authors' loader has it.
    #[test]
    fn a_grid_of_boxes() {
        let config = BrivlConfig { image_size: 60, box_grid: 2, ..WENLAN };
        let expected = [
            [0.0f32, 0.0, 30.0, 30.0],
            [0.0, 30.0, 30.0, 60.0],
            [30.0, 0.0, 60.0, 30.0],
            [30.0, 30.0, 60.0, 60.0],
            [0.0, 0.0, 60.0, 60.0],
        ];
        config.grid(&Device::flex()).into_data().assert_eq(&TensorData::from([expected]), true);
        assert_eq!(WENLAN.grid(&Device::flex()).dims(), [1, 37, 4]);
    }

    #[test]
    fn one_kind_alone_gives_what_both_give() {
        let all = tensors("inputs.safetensors");
        let both = run(&all).unwrap();
        let part = |names: &[&str]| {
            let inputs = names.iter().map(|name| (name.to_string(), all[*name].clone())).collect();
            run(&inputs).unwrap()
        };
        let images = part(&["image", "image_boxes", "mask_images"]);
        let texts = part(&["texts", "mask_texts"]);
        let names = |outputs: &BTreeMap<String, TensorData>| outputs.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&images), ["box_features", "image_features", "image_features_momentum"]);
        assert_eq!(names(&texts), ["text_features", "text_features_momentum"]);
        for (name, found) in images.iter().chain(&texts) {
            found.assert_approx_eq::<f32>(&both[name], Tolerance::absolute(1e-6));
        }
    }

    /// What stands in a hidden box, or after a text's end, is not seen in the vector; BERT alone sees padding, so the
    /// tokens there stay.
    #[test]
    fn hidden_boxes_are_not_seen() {
        let mut inputs = tensors("inputs.safetensors");
        let before = run(&inputs).unwrap();
        let hidden: Vec<bool> = inputs["mask_images"].iter::<f32>().map(|value| value == 0.0).collect();
        assert!(hidden.contains(&true));
        let boxes = inputs["image_boxes"].iter::<f32>().collect::<Vec<_>>();
        let moved = boxes
            .chunks(4)
            .zip(hidden)
            .flat_map(|(edges, hidden)| if hidden { vec![1.0, 2.0, 30.0, 9.0] } else { edges.to_vec() });
        let shape = inputs["image_boxes"].shape().clone();
        inputs.insert("image_boxes".into(), TensorData::new(moved.collect::<Vec<f32>>(), shape));
        let after = run(&inputs).unwrap();
        after["image_features"].assert_approx_eq::<f32>(&before["image_features"], Tolerance::absolute(1e-6));
        assert_ne!(after["box_features"], before["box_features"]);
    }

    /// What the towers say of a text does not depend on those beside it: as of the forward pass, padded.
    #[test]
    fn texts_are_padded_alike() {
        let device = Device::flex();
        let towers = (SYSTEM.open)(&fixture(), &LoadOptions::default(), &device).unwrap();
        let towers = towers.into_towers().unwrap();
        assert_eq!(towers.fit(), Fit { image_size: 32, context_length: 20, vocab_size: 60, d_embed: 28 });
        let short = Tensor::<2, Int>::from_data([[11, 7, 12]], &device);
        let beside = Tensor::<2, Int>::from_data([[11, 7, 12, 0, 0], [11, 9, 8, 30, 12]], &device);
        let real = |ids: &Tensor<2, Int>| ids.clone().not_equal_elem(0);
        let alone = towers.encode_texts(short.clone(), real(&short)).into_data();
        let first = towers.encode_texts(beside.clone(), real(&beside)).narrow(0, 0, 1).into_data();
        alone.assert_approx_eq::<f32>(&first, Tolerance::absolute(1e-6));
        let padded = |from: &[i64]| {
            let row = from.iter().copied().chain(std::iter::repeat(0)).take(20).collect::<Vec<_>>();
            TensorData::new(row, [1, 20])
        };
        let inputs = [("texts", padded(&[11, 7, 12])), ("mask_texts", padded(&[1, 1, 1]))];
        let outputs = run(&inputs.map(|(name, data)| (name.to_owned(), data)).into()).unwrap();
        alone.assert_approx_eq::<f32>(&outputs["text_features"], Tolerance::absolute(1e-6));
    }

    #[test]
    fn without_boxes_there_is_a_grid() {
        let mut inputs = tensors("inputs.safetensors");
        inputs.retain(|name, _| name == "image");
        assert_eq!(run(&inputs).unwrap()["box_features"].shape().as_slice(), [3, 37, 28]);
    }

    #[test]
    fn what_is_wrong_with_the_inputs_is_told() {
        let all = tensors("inputs.safetensors");
        let floats = |shape: &[usize]| TensorData::new(vec![0.5f32; shape.iter().product()], shape.to_vec());
        let ids = |shape: [usize; 2], id: i64| TensorData::new(vec![id; shape[0] * shape[1]], shape);
        let error = |name: &str, data: TensorData| {
            let mut inputs = all.clone();
            inputs.insert(name.into(), data);
            run(&inputs).unwrap_err().to_string()
        };
        for (name, data, told) in [
            ("image", floats(&[3, 1, 32, 32]), "`image` has pictures of [1, 32, 32]"),
            ("image", floats(&[3, 3, 32, 15]), "at least 2 x 2 cells"),
            ("image", floats(&[2, 3, 32, 32]), "`image_boxes` is [3, 5, 4], expected 2 rows"),
            ("image_boxes", floats(&[3, 5, 3]), "boxes of 4 numbers"),
            ("mask_images", floats(&[3, 4]), "`mask_images` is [3, 4]"),
            ("mask_images", floats(&[3, 5]).convert::<i64>(), "row 0 of `mask_images`"),
            ("mask_texts", floats(&[2, 8]), "`mask_texts` is [2, 8]"),
            ("texts", ids([3, 8], 60), "`texts` holds 60"),
            ("texts", ids([3, 21], 1), "at most 20 fit"),
        ] {
            let message = error(name, data);
            assert!(message.contains(told), "{message}");
        }
        assert!(run(&BTreeMap::new()).unwrap_err().to_string().contains("`image` is missing"));
    }

    /// The fixture's slow towers differ from the others; when they have become like them, so have their vectors.
    #[test]
    fn slow_towers_follow() {
        let model = load();
        let inputs = tensors("inputs.safetensors");
        let device = Device::flex();
        let ids: Vec<i64> = inputs["texts"].iter::<i64>().collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [3, 8]), &device);
        let real = ids.clone().greater_equal_elem(0);
        let text = |towers: &Towers| towers.text.forward(ids.clone(), &real).into_data();
        let fast = text(&model.towers);
        let slow = |model: &Brivl| text(model.slow.as_ref().unwrap());
        let far = |data: TensorData| -> f32 {
            fast.iter::<f32>().zip(data.iter::<f32>()).map(|(a, b)| (a - b).abs()).sum()
        };
        let before = far(slow(&model));
        assert!(before > 0.1, "{before}");
        let kept = model.clone().follow(1.0);
        assert_eq!(far(slow(&kept)), before);
        slow(&model.follow(0.0)).assert_eq(&fast, true);
    }
}
