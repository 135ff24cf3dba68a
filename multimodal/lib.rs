//! What needs pictures and text both: two-tower losses, momentum contrast, retrieval, and text to image.

pub mod contrastive;
pub mod distillation;
pub mod imagine;
pub mod moco;
pub mod noise;
pub mod retrieval;
