//! CLIP: two towers, one for pictures and one for text, whose embeddings meet (Radford et al. 2021,
//! <https://arxiv.org/abs/2103.00020>).
//!
//! The numbers match `transformers` (`CLIPModel`), open_clip and OpenAI's own release, whose three
//! layouts of the same weights are read.
//!
//! ```sh
//! volary classify cat.jpg --labels "a cat,a dog" --model path/to/clip-vit-base-patch32
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, LayerNorm, LearnedPositions, Linear, LinearConfig, Mlp,
    MlpConfig,
};
use volary_kernels::ops::{Activation, Mask};
use volary_vision::patch::PatchEmbedding;
use volary_vision::resnet::{ResNet, ResNetConfig};

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
pub struct Clip {
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
    end: i64,
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
    /// `[batch, seq, d_model]`: after the blocks, and for text after the final norm.
    pub hidden: Tensor<3>,
    /// `[batch, d_embed]`, not normalised.
    pub embedding: Tensor<2>,
}

impl ClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Clip {
        Clip {
            vision: match &self.vision {
                VisionConfig::Vit(vit) => VisionTower::Vit(vit.init(self.d_embed, device)),
                VisionConfig::ResNet(resnet) => VisionTower::ResNet(resnet.init(device)),
            },
            text: self.text.init(self.d_embed, device),
            logit_scale: Initializer::Constant { value: (1.0_f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl TransformerConfig {
    fn blocks(&self, device: &Device) -> Vec<Block> {
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
    fn init(&self, d_embed: usize, device: &Device) -> VitTower {
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
    fn init(&self, d_embed: usize, device: &Device) -> TextTower {
        let TransformerConfig { d_model, layer_norm_eps, .. } = self.transformer;
        TextTower {
            tokens: Embedding::new(self.vocab_size, d_model, 0.02, device),
            positions: LearnedPositions::new(self.context_length, d_model, 0.01, device),
            blocks: self.transformer.blocks(device),
            final_norm: LayerNorm::new(d_model, layer_norm_eps, device),
            projection: LinearConfig::new(d_model, d_embed).with_bias(false).init(device),
            end: match self.pooling {
                Pooling::HighestId => -1,
                Pooling::First(id) => id,
            },
        }
    }
}

impl Block {
    fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let x = x.clone() + self.attention.forward(self.norm1.forward(x), mask);
        x.clone() + self.mlp.forward(self.norm2.forward(x), self.activation)
    }
}

impl VitTower {
    /// Pixels `[batch, 3, image_size, image_size]`, normalised.
    pub fn forward(&self, pixels: Tensor<4>) -> TowerOutput {
        let patches = self.patches.forward(pixels); // [batch, patches, d_model]
        let [batch, _, d_model] = patches.dims();
        let class = self.class_token.val().reshape([1, 1, d_model]).expand([batch, 1, d_model]);
        let x = self.positions.forward(Tensor::cat(vec![class, patches], 1));
        let x = self.pre_norm.forward(x);
        let hidden = self.blocks.iter().fold(x, |x, block| block.forward(x, &Mask::Full));
        let class = hidden.clone().narrow(1, 0, 1).reshape([batch, d_model]);
        let embedding = self.projection.forward(self.post_norm.forward(class));
        TowerOutput { hidden, embedding }
    }
}

impl TextTower {
    /// Token ids `[batch, seq]` and, where rows are padded in front of the end token, which of them are
    /// real, `[batch, seq]`.
    pub fn forward(&self, ids: Tensor<2, Int>, mask: &Mask) -> TowerOutput {
        let [batch, _] = ids.dims();
        let x = self.positions.forward(self.tokens.forward(ids.clone()));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, mask));
        let hidden = self.final_norm.forward(x); // [batch, seq, d_model]
        let d_model = hidden.dims()[2];
        let end = match self.end {
            -1 => ids.argmax(1),                         // [batch, 1]
            end => ids.equal_elem(end).int().argmax(1), // the first of equals
        };
        let at = end.reshape([batch, 1, 1]).expand([batch, 1, d_model]);
        let pooled = hidden.clone().gather(1, at).reshape([batch, d_model]);
        TowerOutput { hidden, embedding: self.projection.forward(pooled) }
    }
}

impl Clip {
    /// Unit vectors of pictures: `[batch, 3, size, size] -> [batch, d_embed]`.
    pub fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(match &self.vision {
            VisionTower::Vit(vit) => vit.forward(pixels).embedding,
            VisionTower::ResNet(resnet) => resnet.forward(pixels),
        })
    }

    /// Unit vectors of texts: token ids `[batch, seq] -> [batch, d_embed]`.
    pub fn encode_texts(&self, ids: Tensor<2, Int>) -> Tensor<2> {
        normalise(self.text.forward(ids, &Mask::Causal).embedding)
    }
}

/// Divides every row by its Euclidean length.
pub fn normalise(x: Tensor<2>) -> Tensor<2> {
    let length = x.clone().square().sum_dim(1).sqrt();
    x / length
}
