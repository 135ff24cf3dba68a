//! Volary: a multimodal model zoo on Burn.

pub mod clip;
#[cfg(feature = "train")]
pub mod train;
