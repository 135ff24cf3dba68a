use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{Linear, LinearConfig};
use crate::ops::Activation;

/// Configuration of an [`Mlp`].
#[derive(Config, Debug)]
pub struct MlpConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the two projections.
    pub d_ff: usize,
    /// Whether both projections have a bias.
    #[config(default = true)]
    pub bias: bool,
}

/// `down(act(up(x)))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[d_ff, d_model]`.
    pub up: Linear,
    /// `[d_model, d_ff]`.
    pub down: Linear,
}

impl MlpConfig {
    /// An untrained layer.
    pub fn init(&self, device: &Device) -> Mlp {
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(self.bias).init(device);
        Mlp { up: linear(self.d_model, self.d_ff), down: linear(self.d_ff, self.d_model) }
    }
}

impl Mlp {
    /// `[..., d_model] -> [..., d_model]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        self.down.forward(self.up.activated(x, activation))
    }
}

/// Configuration of a [`GatedMlp`].
#[derive(Config, Debug)]
pub struct GatedMlpConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the projections.
    pub d_ff: usize,
    /// Whether the projections have a bias.
    #[config(default = true)]
    pub bias: bool,
}

/// `down(act(gate(x)) * up(x))`: SwiGLU, GEGLU, ReGLU by the activation (Shazeer 2020).
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `[d_ff, d_model]`, goes through the activation.
    pub gate: Linear,
    /// `[d_ff, d_model]`.
    pub up: Linear,
    /// `[d_model, d_ff]`.
    pub down: Linear,
}

impl GatedMlpConfig {
    /// An untrained layer.
    pub fn init(&self, device: &Device) -> GatedMlp {
        let linear = |d_in, d_out| LinearConfig::new(d_in, d_out).with_bias(self.bias).init(device);
        GatedMlp {
            gate: linear(self.d_model, self.d_ff),
            up: linear(self.d_model, self.d_ff),
            down: linear(self.d_ff, self.d_model),
        }
    }
}

impl GatedMlp {
    /// `[..., d_model] -> [..., d_model]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        let gate = self.gate.forward(x.clone());
        self.down.forward(activation.gated(gate, self.up.forward(x)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, tensor};
    use burn::module::Param;

    fn linear(shape: [usize; 2], weight: &[f64], bias: &[f64]) -> Linear {
        let device = Device::flex();
        Linear {
            weight: Param::from_tensor(tensor(shape, weight, &device)),
            bias: Some(Param::from_tensor(tensor([shape[0]], bias, &device))),
        }
    }

    /// up = [[1, 2], [-1, 0], [0, 3]] + [0, 1, -1], down = [[1, 2, 3], [-1, 0, 1]] + [0.5, -0.5].
    fn mlp() -> Mlp {
        Mlp {
            up: linear([3, 2], &[1.0, 2.0, -1.0, 0.0, 0.0, 3.0], &[0.0, 1.0, -1.0]),
            down: linear([2, 3], &[1.0, 2.0, 3.0, -1.0, 0.0, 1.0], &[0.5, -0.5]),
        }
    }

    /// (2, 1) goes up to (4, -1, 2), through max(x, 0) to (4, 0, 2) and down to (10.5, -2.5).
    #[test]
    fn mlp_literal() {
        let x = tensor([1, 1, 2], &[2.0, 1.0], &Device::flex());
        assert_close(mlp().forward(x, Activation::Relu), &[10.5, -2.5], 0.0);
    }

    /// The gate of (2, 1) is (2, -1), silu of it (1.7615942, -0.2689414); times up (3, 4) and down.
    #[test]
    fn gated_mlp_literal() {
        let mlp = GatedMlp {
            gate: linear([2, 2], &[1.0, 0.0, 0.0, -1.0], &[0.0, 0.0]),
            up: linear([2, 2], &[1.0, 1.0, 2.0, 0.0], &[0.0, 0.0]),
            down: linear([2, 2], &[1.0, 0.0, 1.0, 1.0], &[0.0, 1.0]),
        };
        let x = tensor([1, 2], &[2.0, 1.0], &Device::flex());
        assert_close(mlp.forward(x, Activation::Silu), &[5.2847825, 5.2090168], 2e-6);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let device = Device::flex();
        let at = random(6, &mut fastrand::Rng::with_seed(1));
        let plain = mlp().train();
        assert_gradient(|x| plain.forward(x, Activation::Gelu), [3, 2], &at);
        let gated = GatedMlpConfig::new(3, 5).init(&device).train();
        assert_gradient(|x| gated.forward(x, Activation::Silu), [2, 3], &at);
    }

    #[test]
    fn parameters_are_counted() {
        let device = Device::flex();
        assert_eq!(MlpConfig::new(768, 3072).init(&device).num_params(), 4_722_432);
        let unbiased = GatedMlpConfig::new(4096, 11008).with_bias(false).init(&device);
        assert_eq!(unbiased.num_params(), 3 * 4096 * 11008);
    }
}
