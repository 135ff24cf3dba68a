//! CLIP's text transformer by itself, as diffusion models read it: the states of all tokens, without the projection to
//! where texts meet pictures (Radford et al. 2021, <https://arxiv.org/abs/2103.00020>).
//!
//! The numbers match transformers' `CLIPTextModel`: the `text_encoder` of Stable Diffusion 1 (CLIP ViT-L/14) and 2
//! (OpenCLIP ViT-H/14, all blocks but the last).

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{Embedding, LayerNorm, LearnedPositions};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, Rule};

use Rule::{Ignore, Under};

use crate::clip::{Block, TEXT_TRANSFORMERS, TransformerConfig};
use crate::config::{Config, ConfigError};

/// Shape of a text transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ClipTextConfig {
    /// The longest text in tokens.
    pub context_length: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// The blocks.
    pub transformer: TransformerConfig,
}

/// A text transformer: causal, pre-norm.
#[derive(Module, Debug)]
pub struct ClipText {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[context_length, d_model]`.
    pub positions: LearnedPositions,
    /// The blocks.
    pub blocks: Vec<Block>,
    /// After the blocks.
    pub final_norm: LayerNorm,
}

impl ClipTextConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> ClipText {
        let TransformerConfig { d_model, layer_norm_eps, .. } = self.transformer;
        ClipText {
            tokens: Embedding::new(self.vocab_size, d_model, 0.02, device),
            positions: LearnedPositions::new(self.context_length, d_model, 0.01, device),
            blocks: self.transformer.blocks(device),
            final_norm: LayerNorm::new(d_model, layer_norm_eps, device),
        }
    }

    /// `config.json` of transformers' `CLIPTextModel`; what it leaves out has the values of `CLIPTextConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        Ok(Self {
            context_length: config.size_or("max_position_embeddings", 77)?,
            vocab_size: config.size_or("vocab_size", 49408)?,
            transformer: TransformerConfig::transformers(config, 512, 2048, 8)?,
        })
    }
}

impl ClipText {
    /// The states of all tokens: `[batch, seq] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If a text is longer than the context.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.positions.forward(self.tokens.forward(ids));
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, &Mask::Causal));
        self.final_norm.forward(x)
    }
}

/// Keys of transformers' `CLIPTextModel`; a file may hold the rest of CLIP too.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("text_model.", "", TEXT_TRANSFORMERS),
    Ignore("text_projection.weight"),
    Ignore("logit_scale"),
    Ignore("visual_projection.weight"),
    Ignore("vision_model.{*}"),
]);

/// Of CLIP ViT-L/14, which Stable Diffusion 1 reads.
pub const L14: ClipTextConfig = ClipTextConfig {
    context_length: 77,
    vocab_size: 49408,
    transformer: TransformerConfig {
        d_model: 768,
        d_ff: 3072,
        n_layers: 12,
        n_heads: 12,
        activation: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    },
};

/// Of OpenCLIP ViT-H/14 without its last block, which Stable Diffusion 2 reads.
pub const H14: ClipTextConfig = ClipTextConfig {
    transformer: TransformerConfig {
        d_model: 1024,
        d_ff: 4096,
        n_layers: 23,
        n_heads: 16,
        activation: Activation::Gelu,
        layer_norm_eps: 1e-5,
    },
    ..L14
};
