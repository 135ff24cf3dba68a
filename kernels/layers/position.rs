use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

/// A learned vector per position, added to the sequence.
#[derive(Module, Debug)]
pub struct LearnedPositions {
    /// `[positions, d_model]`.
    pub weight: Param<Tensor<2>>,
}

impl LearnedPositions {
    /// An untrained table, normal with deviation `std`.
    pub fn new(positions: usize, d_model: usize, std: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Normal { mean: 0.0, std }.init([positions, d_model], device),
        }
    }

    /// Adds the first `seq` positions to `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If the sequence is longer than the table.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, seq, _] = x.dims();
        x + self.weight.val().narrow(0, 0, seq).unsqueeze()
    }
}
