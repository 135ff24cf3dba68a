//! Training recipes.

pub mod augment;
pub mod contrastive;
pub mod curve;
pub mod data;
