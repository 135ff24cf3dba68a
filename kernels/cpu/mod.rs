//! Bodies for the CPU behind [`crate::ops`].

pub mod products;
pub mod quantized;
