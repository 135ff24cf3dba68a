//! Recipes: data, evaluation and (feature `train`) training.

#[cfg(feature = "train")]
pub mod augment;
#[cfg(feature = "train")]
pub mod clip_folder;
#[cfg(feature = "train")]
pub mod colour;
#[cfg(feature = "train")]
pub mod contrastive;
#[cfg(feature = "train")]
pub mod curve;
pub mod data;
#[cfg(feature = "train")]
pub mod descent;
#[cfg(feature = "train")]
pub mod drawing;
pub mod evaluate;
#[cfg(feature = "train")]
pub mod mim;
#[cfg(feature = "train")]
pub mod named_shapes;
#[cfg(feature = "train")]
pub mod run;
#[cfg(feature = "train")]
pub mod segmentation;
#[cfg(feature = "train")]
pub mod shapes;
