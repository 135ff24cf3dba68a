use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData, module::embedding};

use super::Packed;
use super::linear::project;

/// A learned vector per token.
#[derive(Module, Debug)]
pub struct Embedding {
    /// `[vocab_size, d_model]`, as floats or [`Packed`].
    pub weight: Param<Tensor<2>>,
}

impl Embedding {
    /// An untrained table, normal with deviation `std`.
    pub fn new(vocab_size: usize, d_model: usize, std: f64, device: &Device) -> Self {
        Self { weight: Initializer::Normal { mean: 0.0, std }.init([vocab_size, d_model], device) }
    }

    /// Token ids `[batch, seq] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary.
    pub fn forward(&self, ids: Tensor<2, Int>) -> Tensor<3> {
        let Some(packed) = Packed::of(&self.weight) else { return embedding(self.weight.val(), ids) };
        let [batch, seq] = ids.dims();
        let [_, d_model] = packed.shape();
        let ids = ids.into_data().convert::<i64>();
        let mut values = vec![0.0; batch * seq * d_model];
        for (out, id) in values.chunks_mut(d_model).zip(ids.iter::<i64>()) {
            packed.unpack_row(id as usize, out);
        }
        let base = self.weight.base();
        Tensor::from_data(TensorData::new(values, [batch, seq, d_model]), (&base.device(), base.dtype()))
    }

    /// The table as a head: scores of every token, `[..., d_model] -> [..., vocab_size]`.
    pub fn scores<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        project(x, &self.weight, None, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, tensor};

    #[test]
    fn ids_pick_rows() {
        let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let embedding = Embedding { weight: Param::from_tensor(tensor([3, 2], &table, &Device::flex())) };
        let ids = Tensor::<2, Int>::from_data([[2, 0], [1, 2]], &Device::flex());
        assert_close(embedding.forward(ids), &[5.0, 6.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.0);
    }

    /// 400 GB, were it allocated.
    #[test]
    fn counting_allocates_nothing() {
        assert_eq!(Embedding::new(1_000_000, 100_000, 0.02, &Device::flex()).num_params(), 100_000_000_000);
    }
}
