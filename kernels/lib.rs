//! Modality-free mathematics: tensor functions ([`ops`]), the layers built on them ([`layers`]), and mixtures of experts
//! ([`moe`]); random weights that a seed determines ([`random`]); what products cost ([`count`]); and the
//! memory of tensors ([`memory`]).
//!
//! Nothing here knows a model's name, a file, a token or a pixel. The residual wiring of a model is
//! not here either: it is spelled in the model's own file.

pub mod count;
mod cpu;
#[cfg(feature = "cube")]
mod cube;
pub mod layers;
pub mod memory;
pub mod moe;
pub mod ops;
pub mod random;

pub use cpu::Instructions;
pub use cpu::peak::Peak;

#[cfg(test)]
mod testing;
