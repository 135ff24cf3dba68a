//! Bodies for the CPU behind [`crate::ops`].

#[cfg(target_arch = "x86_64")]
mod amx;
pub mod attention;
mod chunks;
pub mod convolution;
pub mod few;
#[cfg(feature = "autodiff")]
pub mod gradient;
pub mod host;
mod instructions;
pub mod matmul;
pub mod moe;
pub mod norm;
pub mod peak;
pub mod pointwise;
pub mod products;
pub mod quantized;
pub mod rope;
pub mod rounded;
pub mod tiles;

pub use instructions::Instructions;
