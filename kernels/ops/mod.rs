//! Functions on tensors.

mod activation;
mod add;
mod attention;
mod codebook;
mod convolution;
mod linear;
pub mod moe;
mod norm;
mod products;
mod quantized;
mod rope;
mod softmax;

pub use activation::Activation;
pub(crate) use activation::finished;
pub use add::add;
#[cfg(feature = "cube")]
pub(crate) use attention::repeat_heads;
pub use attention::{Mask, attention};
pub use codebook::nearest;
pub use convolution::convolution;
pub use linear::linear;
pub use norm::{add_layer_norm, add_rms_norm, group_norm, layer_norm, layer_norm_of_sum, rms_norm};
pub use products::products;
pub use quantized::{Bits, BlockRange, PackedMatrix, Quantization, quantized_linear};
pub use rope::{
    DynamicScaling, GridRopeConfig, Llama3Scaling, Pairing, Positions, Rope, RopeConfig, RopeScaling,
    YarnScaling,
};
pub use softmax::softmax;
