//! What needs pictures and text both: two-tower losses and retrieval.

pub mod contrastive;
pub mod distillation;
pub mod retrieval;
