//! Functions on tensors.

mod activation;
mod attention;
mod rope;

pub use activation::Activation;
pub use attention::{Mask, attention};
pub use rope::{GridRopeConfig, Llama3Scaling, Pairing, Positions, Rope, RopeConfig, RopeScaling};
