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
        Self { weight: Initializer::Normal { mean: 0.0, std }.init([positions, d_model], device) }
    }

    /// Adds the first `seq` positions to `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If the sequence is longer than the table.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, seq, _] = x.dims();
        let [positions, _] = self.weight.val().dims();
        assert!(seq <= positions, "a sequence of {seq} tokens is longer than {positions} positions");
        x + self.weight.val().narrow(0, 0, seq).unsqueeze()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, tensor};

    fn positions() -> LearnedPositions {
        let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        LearnedPositions { weight: Param::from_tensor(tensor([3, 2], &table, &Device::flex())) }
    }

    #[test]
    fn the_first_rows_are_added_to_every_row_of_the_batch() {
        let x = tensor([2, 2, 2], &[0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 20.0, 20.0], &Device::flex());
        let expected = [1.0, 2.0, 3.0, 4.0, 11.0, 12.0, 23.0, 24.0];
        assert_close(positions().forward(x), &expected, 0.0);
    }

    #[test]
    #[should_panic(expected = "a sequence of 4 tokens is longer than 3 positions")]
    fn a_longer_sequence_panics() {
        positions().forward(Tensor::zeros([1, 4, 2], &Device::flex()));
    }
}
