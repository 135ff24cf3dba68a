use burn::tensor::{DType, Tensor, activation};

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
    pub fn forward<const D: usize>(self, x: Tensor<D>) -> Tensor<D> {
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
    use crate::testing::{assert_close, assert_gradient, floats, tensor};
    use burn::tensor::Device;

    const ALL: [Activation; 6] = [
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::Silu,
        Activation::Relu,
        Activation::Tanh,
    ];

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
            for activation in ALL {
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
        for activation in ALL {
            assert_gradient(|x| activation.forward(x), [5], &[-3.0, -1.0, -0.2, 0.5, 2.0]);
        }
    }

    #[test]
    fn every_listed_name_is_known() {
        for name in Activation::NAMES {
            assert!(Activation::from_name(name).is_some(), "{name}");
        }
        assert_eq!(Activation::from_name("mish"), None);
    }
}
