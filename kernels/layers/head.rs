use burn::module::{Initializer, Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Device, Tensor};

use super::{LayerNorm, Linear, LinearConfig};
use crate::ops::Activation;

/// Scores of tokens by the table that embeds them: `norm(act(transform(x))) tableᵀ + bias` (the masked-LM head of
/// Devlin et al. 2018, section 3.1, which many decoders took over).
#[derive(Module, Debug)]
pub struct TiedHead {
    /// `[d_model, d_model]`.
    pub transform: Linear,
    /// After the activation.
    pub norm: LayerNorm,
    /// `[vocab_size]`.
    pub bias: Param<Tensor<1>>,
}

impl TiedHead {
    /// An untrained head.
    pub fn new(d_model: usize, vocab_size: usize, eps: f64, device: &Device) -> Self {
        Self {
            transform: LinearConfig::new(d_model, d_model).init(device),
            norm: LayerNorm::new(d_model, eps, device),
            bias: Initializer::Zeros.init([vocab_size], device),
        }
    }

    /// States `[..., d_model]` and the token table `[vocab_size, d_model] ->` scores `[..., vocab_size]`.
    pub fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        table: Tensor<2>,
        activation: Activation,
    ) -> Tensor<D> {
        let x = self.norm.forward(activation.forward(self.transform.forward(x)));
        linear(x, table.transpose(), Some(self.bias.val()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, tensor};

    /// `transform` swaps, ReLU cuts, the norm makes `[1, -1]` of `[3, 0]`, the table has three tokens.
    #[test]
    fn literal() {
        let device = Device::flex();
        let head = TiedHead {
            transform: Linear {
                weight: Param::from_tensor(tensor([2, 2], &[0.0, 1.0, 1.0, 0.0], &device)),
                bias: None,
            },
            norm: LayerNorm::new(2, 0.0, &device),
            bias: Param::from_tensor(tensor([3], &[10.0, 20.0, 30.0], &device)),
        };
        let table = tensor([3, 2], &[1.0, 0.0, 0.0, 1.0, 2.0, -2.0], &device);
        let x = tensor([1, 1, 2], &[-4.0, 3.0], &device);
        assert_close(head.forward(x, table, Activation::Relu), &[11.0, 19.0, 34.0], 1e-6);
    }
}
