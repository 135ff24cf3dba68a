//! Modality-free mathematics: tensor functions ([`ops`]), the layers built on them ([`layers`]), and mixtures of experts
//! ([`moe`]).
//!
//! Nothing here knows a model's name, a file, a token or a pixel. The residual wiring of a model is
//! not here either: it is spelled in the model's own file.

mod cpu;
pub mod layers;
pub mod moe;
pub mod ops;

#[cfg(test)]
mod testing;
