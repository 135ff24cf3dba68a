//! Bodies for the CPU behind [`crate::ops`].

pub mod quantized;
