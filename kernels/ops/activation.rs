use burn::tensor::{DType, Tensor, activation};

use crate::cpu::Instructions;
#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::{self, Values, is_host};
use crate::cpu::pointwise::Finish;
#[cfg(feature = "cube")]
use crate::cube::{is_cube_with, pointwise};

/// A pointwise non-linearity, named as checkpoints' configurations name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// Gaussian error linear unit by the error function, `x Φ(x)` (Hendrycks & Gimpel 2016).
    #[default]
    Gelu,
    /// The hyperbolic-tangent approximation of GELU: `gelu_new`, `gelu_pytorch_tanh`.
    GeluTanh,
    /// `x σ(1.702 x)`, the approximation OpenAI's CLIP was trained with.
    QuickGelu,
    /// `x σ(x)`, also called swish.
    Silu,
    /// `max(x, 0)`.
    Relu,
    /// Hyperbolic tangent.
    Tanh,
}

impl Activation {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Gelu, Self::GeluTanh, Self::QuickGelu, Self::Silu, Self::Relu, Self::Tanh];

    /// The names that [`Activation::from_name`] knows.
    pub const NAMES: &[&str] = &[
        "gelu",
        "gelu_python",
        "gelu_new",
        "gelu_fast",
        "gelu_accurate",
        "gelu_python_tanh",
        "gelu_pytorch_tanh",
        "quick_gelu",
        "silu",
        "swish",
        "relu",
        "tanh",
    ];

    /// The activation that Hugging Face configurations call `name`; `None` for an unknown name.
    pub fn from_name(name: &str) -> Option<Self> {
        Some(match name {
            "gelu" | "gelu_python" => Self::Gelu,
            "gelu_new" | "gelu_fast" | "gelu_accurate" | "gelu_python_tanh" | "gelu_pytorch_tanh" => {
                Self::GeluTanh
            }
            "quick_gelu" => Self::QuickGelu,
            "silu" | "swish" => Self::Silu,
            "relu" => Self::Relu,
            "tanh" => Self::Tanh,
            _ => return None,
        })
    }

    /// Applies the activation to every element; the shape stays.
    ///
    /// On the CPU, in vectors and in place where nobody else holds `x`; errors are at most `3e-7 |y| + 1e-8`. On a GPU in one
    /// launch, in f32. Gradients in f32 on the CPU are by a body of ours, too. For other gradients, and on other devices, it is
    /// composed of Burn's operations.
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        #[cfg(feature = "autodiff")]
        if is_tracked(&x) {
            return gradient::activated(x, self);
        }
        #[cfg(feature = "cube")]
        if is_cube_with::<D, D>(&x, &[]) {
            return pointwise::finish(x, None, self, None);
        }
        match is_host(&x) && self != Self::Relu {
            true => finish(x, None, Some(self), None),
            false => self.composed(x), // where it is vectors already
        }
    }

    /// `act(x + bias)`: `x` `[..., width]`, `bias` `[width]`; on the CPU in one pass, on a GPU in one launch.
    ///
    /// # Panics
    /// If the widths differ.
    pub fn biased<const D: usize>(self, x: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
        #[cfg(feature = "cube")]
        if is_cube_with(&x, bias.as_ref().as_slice()) {
            return pointwise::finish(x, bias, self, None);
        }
        match (is_host(&x), bias) {
            (true, bias) => finish(x, bias, Some(self), None),
            (false, Some(bias)) => self.forward(x + bias.unsqueeze()),
            (false, None) => self.forward(x),
        }
    }

    /// `act(gate) * x`, of the same shape; on the CPU in one pass, on a GPU in one launch.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn gated<const D: usize>(self, gate: Tensor<D>, x: Tensor<D>) -> Tensor<D> {
        assert_eq!(gate.dims(), x.dims(), "shapes of a gate (left) and of what it scales");
        #[cfg(feature = "autodiff")]
        if is_tracked(&gate) && is_tracked(&x) {
            return gradient::gated(gate, x, self);
        }
        #[cfg(feature = "cube")]
        if is_cube_with(&gate, &[&gate, &x]) {
            return pointwise::finish(gate, None, self, Some(x));
        }
        match is_host(&gate) && is_host(&x) && gate.dtype() == x.dtype() {
            true => finish(gate, None, Some(self), Some(x)),
            false => self.composed(gate) * x,
        }
    }

    /// Of Burn's operations.
    fn composed<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Gelu => activation::gelu(x),
            Self::GeluTanh => gelu_tanh(x),
            Self::QuickGelu => x.clone() * activation::sigmoid(x * 1.702),
            Self::Silu => activation::silu(x),
            Self::Relu => activation::relu(x),
            Self::Tanh => x.tanh(),
        }
    }
}

/// `act(x + bias)`, of what there is of both: see [`Activation::biased`] and [`add_bias`].
///
/// # Panics
/// If the widths differ.
pub(crate) fn finished<const D: usize>(
    x: Tensor<D>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    match (activation, bias) {
        (Some(activation), bias) => activation.biased(x, bias),
        (None, Some(bias)) => add_bias(x, bias),
        (None, None) => x,
    }
}

/// `x + bias`: `x` `[..., width]`, `bias` `[width]`. On the CPU in place where nobody else holds `x`.
///
/// # Panics
/// If the widths differ.
fn add_bias<const D: usize>(x: Tensor<D>, bias: Tensor<1>) -> Tensor<D> {
    match is_host(&x) && is_host(&bias) {
        true => finish(x, Some(bias), None, None),
        false => x + bias.unsqueeze(),
    }
}

/// `act(x + bias) * factors` on the CPU.
fn finish<const D: usize>(
    x: Tensor<D>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
    factors: Option<Tensor<D>>,
) -> Tensor<D> {
    let width = x.dims()[D - 1].max(1);
    let (bias, factors) = (bias.map(Values::of), factors.map(Values::of));
    if let Some(bias) = &bias {
        assert_eq!(bias.len(), width, "width of a bias (left) and of what it is added to");
    }
    host::change(x, width, |row, values| {
        let factors = factors.as_ref().map(|factors| &factors[row * width..row * width + values.len()]);
        Instructions::in_use().run(Finish { values, bias: bias.as_deref(), activation, factors });
    })
}

/// `x / 2 (1 + tanh(√(2/π) (x + 0.044715 x³)))`; half precision in f32, as `1 + tanh` cancels for negative `x`.
fn gelu_tanh<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if let dtype @ (DType::F16 | DType::BF16) = x.dtype() {
        return gelu_tanh(x.cast(DType::F32)).cast(dtype);
    }
    let cubic = x.clone() + x.clone().powi_scalar(3) * 0.044715;
    let gate = (cubic * (2.0 / core::f64::consts::PI).sqrt()).tanh() + 1.0;
    x * gate * 0.5
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, tensor};
    use burn::tensor::Device;

    /// Values of `torch.nn.functional` at -3, -1, 0, 0.5 and 2.
    #[test]
    fn literals() {
        let x = tensor([5], &[-3.0, -1.0, 0.0, 0.5, 2.0], &Device::flex());
        let cases = [
            (Activation::Gelu, [-0.00404969, -0.15865526, 0.0, 0.34573123, 1.9544997]),
            (Activation::GeluTanh, [-0.00363739, -0.158808, 0.0, 0.345714, 1.9545977]),
            (Activation::QuickGelu, [-0.0180717, -0.15420423, 0.0, 0.3503885, 1.9356586]),
            (Activation::Silu, [-0.14227763, -0.26894143, 0.0, 0.31122968, 1.761594]),
            (Activation::Relu, [0.0, 0.0, 0.0, 0.5, 2.0]),
            (Activation::Tanh, [-0.9950548, -0.7615942, 0.0, 0.46211717, 0.9640276]),
        ];
        for (activation, expected) in cases {
            assert_close(activation.forward(x.clone()), &expected, 2e-6);
        }
    }

    #[test]
    fn half_precision_is_within_rounding_of_f32() {
        let x = tensor([9], &[-60.0, -5.0, -3.0, -1.0, -0.25, 0.0, 0.5, 2.0, 60.0], &Device::flex());
        for (dtype, tolerance) in [(DType::F16, 5e-3), (DType::BF16, 4e-2)] {
            for activation in Activation::ALL {
                let expected = floats(activation.forward(x.clone()));
                let found = floats(activation.forward(x.clone().cast(dtype)));
                for (found, expected) in found.iter().zip(&expected) {
                    let error = (found - expected).abs();
                    assert!(
                        error <= tolerance * expected.abs() + 1e-7,
                        "{activation:?} {dtype:?}: {found} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        for activation in Activation::ALL {
            assert_gradient(|x| activation.forward(x), [5], &[-3.0, -1.0, -0.2, 0.5, 2.0]);
        }
    }

    /// Beside those of Burn's operations, and far from 0, where they are flat.
    #[test]
    fn gradients_agree() {
        let device = Device::flex().autodiff();
        let gradient = |x: &Tensor<2>, y: Tensor<2>| {
            let factors = noise(y.dims(), 2, &device);
            floats(x.grad(&(y * factors).sum().backward()).unwrap())
        };
        for activation in Activation::ALL {
            let x = (noise([70, 301], 1, &device) * 8.0).detach().require_grad();
            let other = noise([70, 301], 3, &device).require_grad();
            let expected = gradient(&x, activation.composed(x.clone()));
            let found = gradient(&x, activation.forward(x.clone()));
            assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 3e-6), "{activation:?}");
            for of in [&x, &other] {
                let expected = gradient(of, activation.composed(x.clone()) * other.clone());
                let found = gradient(of, activation.gated(x.clone(), other.clone()));
                assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 2e-5), "{activation:?}");
            }
            let far = [-1e30, -1e4, -60.0, 60.0, 1e4, 1e30];
            let x = tensor([1, 6], &far, &device).require_grad();
            let found = floats(x.grad(&activation.forward(x.clone()).sum().backward()).unwrap());
            let rise = if activation == Activation::Tanh { 0.0 } else { 1.0 };
            for (found, x) in found.iter().zip(far) {
                let expected = if x < 0.0 { 0.0 } else { rise };
                assert!((found - expected).abs() < 1e-6, "{activation:?} at {x}: {found}");
            }
        }
    }

    /// The bodies of the CPU against Burn's operations: whole tensors, parts, turned ones, one value, none.
    #[test]
    fn bodies_agree() {
        let device = Device::flex();
        let large = noise([3, 70, 301], 1, &device) * 8.0;
        let (bias, none) = (noise([301], 2, &device), tensor([0, 301], &[], &device));
        for x in [
            large.clone().reshape([210, 301]),
            large.clone().narrow(0, 1, 1).squeeze_dim::<2>(0),
            large.clone().narrow(1, 5, 1).squeeze_dim::<2>(1),
            large.swap_dims(0, 1).slice([0..70, 0..1, 0..301]).squeeze_dim::<2>(1),
            none,
        ] {
            let factors = x.clone() * 0.5 - 1.0;
            let sum = x.clone() + bias.clone().unsqueeze();
            assert_close(add_bias(x.clone(), bias.clone()), &floats(sum.clone()), 0.0);
            for activation in Activation::ALL {
                let composed = activation.composed(x.clone());
                assert_close(activation.forward(x.clone()), &floats(composed.clone()), 2e-6);
                let biased = activation.biased(x.clone(), Some(bias.clone()));
                assert_close(biased, &floats(activation.composed(sum.clone())), 2e-6);
                let gated = activation.gated(x.clone(), factors.clone());
                assert_close(gated, &floats(composed * factors.clone()), 1e-5);
            }
        }
    }

    #[test]
    fn biases_and_gates_have_gradients() {
        let at = [-3.0, -1.0, -0.2, 0.5, 2.0, 0.1];
        let other = noise([3, 2], 1, &Device::flex().autodiff());
        for activation in [Activation::Gelu, Activation::Silu] {
            assert_gradient(|x| activation.gated(x, other.clone()), [3, 2], &at);
            assert_gradient(|x| activation.gated(other.clone(), x), [3, 2], &at);
            assert_gradient(|bias| activation.biased(other.clone(), Some(bias)), [2], &at[..2]);
        }
        assert_gradient(|bias| add_bias(other.clone(), bias), [2], &at[..2]);
    }

    #[test]
    fn every_listed_name_is_known() {
        for name in Activation::NAMES {
            assert!(Activation::from_name(name).is_some(), "{name}");
        }
        assert_eq!(Activation::from_name("mish"), None);
    }
}
