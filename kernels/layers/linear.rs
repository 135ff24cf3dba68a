use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use super::Packed;
use crate::ops::{Activation, finished, linear, quantized_linear};

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
    /// `[d_out, d_in]`, as floats or [`Packed`].
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
        project(x, &self.weight, self.bias(), None)
    }

    /// `act(x Wᵀ + b)`, `[..., d_in] -> [..., d_out]`.
    pub fn activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        project(x, &self.weight, self.bias(), Some(activation))
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }
}

/// `act(x Wᵀ + b)`, `[..., d_in] -> [..., d_out]`, whichever way the matrix `W` of `[d_out, d_in]` is held.
pub(super) fn project<const D: usize>(
    x: Tensor<D>,
    weight: &Param<Tensor<2>>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    let Some(packed) = Packed::of(weight) else {
        return linear(x, weight.val(), bias, activation);
    };
    finished(quantized_linear(x, packed), bias, activation)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};
    use burn::tensor::DType;

    /// `[[1, 2, 3], [4, 5, 6]]` and the bias `[10, 20]`.
    fn linear() -> Linear {
        let device = Device::flex();
        Linear {
            weight: Param::from_tensor(tensor([2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &device)),
            bias: Some(Param::from_tensor(tensor([2], &[10.0, 20.0], &device))),
        }
    }

    #[test]
    fn literal() {
        let x = tensor([2, 1, 3], &[1.0, 0.0, -1.0, 0.5, 2.0, 1.0], &Device::flex());
        assert_close(linear().forward(x.clone()), &[8.0, 18.0, 17.5, 38.0], 0.0);
        let unbiased = Linear { bias: None, ..linear() };
        assert_close(unbiased.forward(x), &[-2.0, -2.0, 7.5, 18.0], 0.0);
    }

    /// The backend's f16 product of one row is wrong when the weight lies as `[d_in, d_out]`.
    #[test]
    fn few_rows_in_half_precision_are_right() {
        let mut rng = fastrand::Rng::with_seed(1);
        for (d_in, d_out) in [(737, 1), (737, 5), (64, 33), (3, 2), (1024, 512)] {
            // whole numbers, so that products and sums up to 2048 are exact in both
            let sparse = |count: usize, rng: &mut fastrand::Rng| -> Vec<f64> {
                (0..count).map(|_| f64::from(rng.i32(-1..=2))).collect()
            };
            let weight = tensor([d_out, d_in], &sparse(d_in * d_out, &mut rng), &Device::flex());
            for (dtype, rows) in [(DType::F16, 1), (DType::F16, 2), (DType::F16, 7), (DType::BF16, 1)] {
                let x = sparse(rows * d_in, &mut rng);
                let x = tensor([rows, d_in], &x, &Device::flex());
                let layer =
                    |dtype| Linear { weight: Param::from_tensor(weight.clone().cast(dtype)), bias: None };
                let expected = layer(DType::F32).forward(x.clone()).cast(dtype);
                assert_close(layer(dtype).forward(x.cast(dtype)), &floats(expected), 0.0);
            }
        }
        // the reported case: a sum of 737 ones
        let ones = |shape| Tensor::<2>::ones(shape, (&Device::flex(), DType::F16));
        let layer = Linear { weight: Param::from_tensor(ones([3, 737])), bias: None };
        assert_close(layer.forward(ones([1, 737])), &[737.0; 3], 0.0);
        assert_close(layer.forward(ones([1, 737]).unsqueeze::<3>()), &[737.0; 3], 0.0);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let layer = linear().train();
        let at = random(6, &mut fastrand::Rng::with_seed(1));
        assert_gradient(|x| layer.forward(x), [2, 3], &at);
        let x = noise([4, 3], 2, &Device::flex().autodiff());
        let with_weight = |weight| {
            let layer = Linear { weight: Param::from_tensor(weight), bias: None };
            layer.forward(x.clone())
        };
        assert_gradient(with_weight, [2, 3], &at);
    }

    #[test]
    fn an_untrained_layer_stays_within_its_bound() {
        let layer = LinearConfig::new(25, 40).init(&Device::flex());
        let weight = floats(layer.weight.val());
        assert!(weight.iter().all(|w| w.abs() <= 0.2));
        assert!(weight.iter().any(|w| w.abs() > 0.15));
    }

    /// 40 GB, were it allocated.
    #[test]
    fn counting_allocates_nothing() {
        let layer = LinearConfig::new(100_000, 100_000).init(&Device::flex());
        assert_eq!(layer.num_params(), 10_000_100_000);
    }
}
