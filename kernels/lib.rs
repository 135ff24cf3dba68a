//! Modality-free mathematics: tensor functions ([`ops`]), the layers built on them ([`layers`]), and mixtures of experts
//! ([`moe`]); and random weights that a seed determines ([`random`]).
//!
//! Nothing here knows a model's name, a file, a token or a pixel. The residual wiring of a model is
//! not here either: it is spelled in the model's own file.

mod cpu;
pub mod layers;
pub mod moe;
pub mod ops;
pub mod random;

pub use cpu::Instructions;

#[cfg(test)]
mod testing;
