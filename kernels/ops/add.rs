use burn::tensor::Tensor;

use crate::cpu::host::{self, is_host};

/// `x + y`, of one shape. On the CPU by several threads, and in place where nobody else holds one of them; elsewhere it is
/// Burn's.
///
/// # Panics
/// If the shapes differ.
pub fn add<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    host::same_shape(&x, &y);
    match are_host(&x, &y) {
        true => host::add(x, y),
        false => x + y,
    }
}

/// Whether a body for the CPU adds them up.
pub(super) fn are_host<const D: usize>(x: &Tensor<D>, y: &Tensor<D>) -> bool {
    is_host(x) && is_host(y) && x.dtype() == y.dtype()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random};
    use burn::tensor::{DType, Device};

    /// Beside Burn's sum: parts of tensors and turned ones, those that others hold, one value, none.
    #[test]
    fn bodies_agree() {
        let device = Device::flex();
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for [rows, width] in [[1, 1], [70, 333], [0, 4]] {
                let held = noise([rows, width], 1, &device).cast(dtype);
                let part = || noise([rows, width + 1], 2, &device).cast(dtype).narrow(1, 1, width);
                let turned = || noise([width, rows], 3, &device).cast(dtype).transpose();
                for (x, y) in
                    [(held.clone(), part()), (part(), held.clone()), (turned(), part()), (turned(), turned())]
                {
                    let expected = x.clone() + y.clone();
                    let found = add(x, y);
                    assert_eq!(found.dtype(), dtype);
                    assert_close(found, &floats(expected), 0.0);
                }
            }
        }
    }

    #[test]
    fn both_have_gradients() {
        let y = noise([2, 3], 1, &Device::flex().autodiff());
        let at = random(6, &mut fastrand::Rng::with_seed(2));
        assert_gradient(|x| add(x.clone(), y.clone()) * x, [2, 3], &at);
        assert_gradient(|x| add(y.clone(), x.clone()) * x, [2, 3], &at);
    }

    #[test]
    #[should_panic(expected = "shapes of what is added up")]
    fn what_is_added_up_is_of_one_shape() {
        let ones = |shape| Tensor::<2>::ones(shape, &Device::flex());
        let _ = add(ones([2, 3]), ones([1, 3]));
    }
}
