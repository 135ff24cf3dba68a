use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor, module::embedding};

/// A learned vector per token.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab_size, d_model]`.
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// An untrained table, normal with deviation `std`.
    pub fn new(vocab_size: usize, d_model: usize, std: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Normal { mean: 0.0, std }.init([vocab_size, d_model], device),
        }
    }

    /// Token ids `[batch, seq] -> [batch, seq, d_model]`.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        embedding(self.weight.val(), ids)
    }
}
