//! Bodies for the CPU behind [`crate::ops`].

pub mod attention;
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

pub use instructions::Instructions;
