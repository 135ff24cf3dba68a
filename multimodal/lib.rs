//! What needs pictures and text both: two-tower losses, momentum contrast and retrieval.

pub mod contrastive;
pub mod distillation;
pub mod moco;
pub mod retrieval;
