//! Layers: parameters and the function over them.

mod attention;
mod block;
mod embedding;
mod head;
mod linear;
mod mlp;
mod norm;
mod packed;
mod position;

pub use attention::{Attention, AttentionConfig, KvCache};
pub use block::PreNormBlock;
pub use embedding::Embedding;
pub use head::TiedHead;
pub use linear::{Linear, LinearConfig};
pub use mlp::{GatedMlp, GatedMlpConfig, Mlp, MlpConfig};
pub use norm::{BatchNorm, GroupNorm, LayerNorm, RmsNorm};
pub use packed::Packed;
pub use position::{LearnedPositions, Reach, RelativeBias};
