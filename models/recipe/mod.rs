//! Recipes: data, evaluation and (feature `train`) training.

#[cfg(feature = "train")]
pub mod augment;
#[cfg(feature = "train")]
pub mod contrastive;
#[cfg(feature = "train")]
pub mod curve;
pub mod data;
#[cfg(feature = "train")]
pub mod descent;
#[cfg(feature = "train")]
pub mod emoji;
pub mod evaluate;
#[cfg(feature = "train")]
pub mod mim;
#[cfg(feature = "train")]
pub mod segmentation;
#[cfg(feature = "train")]
pub mod shapes;
