use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, module::linear};

/// Configuration of a [`Linear`] layer.
#[derive(Config, Debug)]
pub struct LinearConfig {
    /// Width of the input.
    pub d_in: usize,
    /// Width of the output.
    pub d_out: usize,
    /// Whether a learned bias is added.
    #[config(default = true)]
    pub bias: bool,
}

/// `y = x Wᵀ + b`, the weight stored as checkpoints store it, `[d_out, d_in]`.
///
/// Burn's own layer keeps `[d_in, d_out]`, which costs a transposition per tensor at load and, on the
/// CPU backend, a wrong product for a single f16 row.
#[derive(Module, Debug)]
pub struct Linear {
    /// `[d_out, d_in]`.
    pub weight: Param<Tensor<2>>,
    /// `[d_out]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl LinearConfig {
    /// An untrained layer: weight and bias uniform in `±1/√d_in`. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Linear {
        let bound = 1.0 / (self.d_in as f64).sqrt();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        Linear {
            weight: uniform.init([self.d_out, self.d_in], device),
            bias: self.bias.then(|| uniform.init([self.d_out], device)),
        }
    }
}

impl Linear {
    /// `[..., d_in] -> [..., d_out]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        linear(x, self.weight.val().transpose(), bias)
    }
}
