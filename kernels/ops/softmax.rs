use burn::tensor::{Tensor, activation};

use crate::cpu::Instructions;
#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::{self, is_host};
use crate::cpu::pointwise::Softmax;
#[cfg(feature = "cube")]
use crate::cube::{self, is_cube_with};

/// `exp(x) / Σ exp(x)` over the last axis.
///
/// On the CPU, in vectors and in place where nobody else holds `x`: half precision is computed in f32 and rounded at the end,
/// and a row of `-∞` alone, a query that sees nothing, becomes zeros; on a GPU the same in one launch. Gradients in f32 on the CPU
/// are by a body of ours, too. For other gradients, and on other devices, it is Burn's, which makes NaN of such a row.
pub fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    #[cfg(feature = "autodiff")]
    if is_tracked(&x) {
        return gradient::softmax(x);
    }
    #[cfg(feature = "cube")]
    if is_cube_with::<D, D>(&x, &[]) {
        return cube::softmax::softmax(x);
    }
    if !is_host(&x) {
        return activation::softmax(x, D - 1);
    }
    let width = x.dims()[D - 1].max(1);
    host::change(x, width, |_, values| Instructions::in_use().run(Softmax { values, width }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, tensor};
    use burn::tensor::{DType, Device};

    /// 1 : 2 : 4, and what is hidden gets nothing.
    #[test]
    fn literals() {
        let (ln_2, hidden) = (2.0_f64.ln(), f64::NEG_INFINITY);
        let values = [0.0, ln_2, 2.0 * ln_2, 7.0, hidden, 7.0, hidden, hidden, hidden, -1e30, 1e30, 0.0];
        let x = tensor([4, 3], &values, &Device::flex());
        let sevenths = [1.0, 2.0, 4.0].map(|part| part / 7.0);
        let expected = [&sevenths[..], &[0.5, 0.0, 0.5], &[0.0; 3], &[0.0, 1.0, 0.0]].concat();
        assert_close(softmax(x), &expected, 1e-7);
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for odd in [f64::NAN, f64::INFINITY] {
            for rest in [0.0, f64::NEG_INFINITY] {
                let x =
                    tensor([2, 17], &[[rest; 16].as_slice(), &[odd], &[1.0; 17]].concat(), &Device::flex());
                let found = floats(softmax(x));
                assert!(found[..17].iter().any(|x| x.is_nan()), "{odd} {rest}: {found:?}");
                assert!(found[17..].iter().all(|x| (x - 1.0 / 17.0).abs() < 1e-7));
            }
        }
    }

    /// Whole and broken chunks, many and few rows, parts of tensors, none.
    #[test]
    fn bodies_agree() {
        let device = Device::flex();
        for (seed, shape) in (0..).zip([[1, 1], [3, 5], [2, 16], [70, 33], [2, 9000], [300, 128], [0, 4]]) {
            let x = noise([shape[0], shape[1] + 1], seed, &device).narrow(1, 0, shape[1]) * 20.0;
            let expected = activation::softmax(x.clone(), 1);
            assert_close(softmax(x), &floats(expected), 3e-7);
        }
        assert_eq!(softmax(Tensor::<2>::zeros([4, 0], &device)).dims(), [4, 0]);
    }

    #[test]
    fn half_precision_is_rounded_at_the_end() {
        let x = noise([3, 40], 1, &Device::flex()) * 4.0;
        for dtype in [DType::F16, DType::BF16] {
            let found = softmax(x.clone().cast(dtype));
            assert_eq!(found.dtype(), dtype);
            let expected = softmax(x.clone().cast(dtype).cast(DType::F32)).cast(dtype);
            assert_close(found, &floats(expected), 0.0);
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        assert_gradient(softmax, [2, 3], &[0.5, -1.0, 2.0, 0.0, 0.3, -0.7]);
    }
}
