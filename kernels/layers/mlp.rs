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
        Mlp {
            up: linear(self.d_model, self.d_ff),
            down: linear(self.d_ff, self.d_model),
        }
    }
}

impl Mlp {
    /// `[..., d_model] -> [..., d_model]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        self.down.forward(activation.forward(self.up.forward(x)))
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
        let gate = activation.forward(self.gate.forward(x.clone()));
        self.down.forward(gate * self.up.forward(x))
    }
}
