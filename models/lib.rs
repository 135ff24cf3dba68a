//! Volary: a multimodal model zoo on Burn.

pub mod alm;
pub mod bert;
pub mod causal;
pub mod clip;
pub mod config;
pub mod consert;
pub mod cpm;
pub mod decoder;
pub mod cpm2;
pub mod device;
pub mod ernie;
mod error;
pub mod export;
pub mod folder;
pub mod generation_config;
pub mod generator;
pub mod glm;
pub mod gpt2;
pub mod index;
pub mod llama;
pub mod pangu;
pub mod plato;
pub mod plug;
pub mod preset;
pub mod pretrained;
pub mod recipe;
pub mod registry;
pub mod sentence;
pub mod t5;
pub mod tensors;
pub mod vit;
pub mod vocabulary;
pub mod writer;
pub mod yuan;

pub use error::Error;
pub use pretrained::Clip;
