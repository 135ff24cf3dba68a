//! Functions on tensors.

mod activation;
mod attention;

pub use activation::Activation;
pub use attention::{Mask, attention};
