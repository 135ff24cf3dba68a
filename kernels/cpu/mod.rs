//! Bodies for the CPU behind [`crate::ops`].

pub mod moe;
pub mod norm;
pub mod products;
pub mod quantized;
