use burn::tensor::module::linear as burns;
use burn::tensor::{Element, Tensor};

use super::{Activation, finished};
use crate::count;
use crate::cpu::Instructions;
use crate::cpu::few::products;
#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::{self, Values, is_host, is_in_order};
use crate::cpu::matmul::{Columns, product};
use crate::cpu::pointwise::Finish;
use crate::cpu::tiles::Number;

/// Fewer rows read the weight where it lies, once, and do not pack it.
const FEW: usize = 16;

/// `act(x Wᵀ + b)`: `[..., d_in] -> [..., d_out]`.
///
/// - `weight`: `[d_out, d_in]`
/// - `bias`: `[d_out]`
///
/// On the CPU rows of the weight's type go through all of it at once, several threads beside each other; sums are f32 and are
/// rounded once, at the end. Gradients of products in f32 are such products too. Other devices and types: Burn's product.
///
/// # Panics
/// If the widths differ.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    let values: usize = x.dims().iter().product();
    count::add(values * weight.dims()[0], count::bytes(&weight));
    uncounted(x, weight, bias, activation)
}

/// The same without adding to the [cost](crate::count).
pub(super) fn uncounted<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    let shape = x.dims();
    let [d_out, d_in] = weight.dims();
    assert_eq!(shape[D - 1], d_in, "width of the input (left) and of a weight of {d_out} rows");
    let rows: usize = shape[..D - 1].iter().product();
    if rows == 0 {
        // Of no rows Burn's product reads what is not there. Gradients are to find their way back all the same.
        let y = x.sum_dim(D - 1) * weight.sum_dim(1).transpose().unsqueeze();
        return finished(y, bias, None);
    }
    let dtypes = [x.dtype(), weight.dtype()];
    let is_few = rows < FEW && dtypes[0] == dtypes[1] && is_host(&x) && is_host(&weight);
    if is_few && is_in_order(&weight) {
        return few(x, weight, bias, activation);
    }
    if is_host(&x) && is_host(&weight) && dtypes[0] == dtypes[1] {
        return host::by_type!(dtypes[0], T => many::<T, D>(x, weight, bias, activation));
    }
    #[cfg(feature = "autodiff")]
    if rows >= FEW && [is_tracked(&x), is_tracked(&weight), bias.as_ref().is_none_or(is_tracked)] == [true; 3]
    {
        let mut shape = shape;
        shape[D - 1] = d_out;
        let y = gradient::linear(x.reshape([rows, d_in]), weight, bias).reshape(shape);
        return finished(y, None, activation);
    }
    finished(burns(x, weight.transpose(), None), bias, activation)
}

/// The same for rows and a weight of one type, on the CPU.
fn many<T: Number + Element, const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    let (mut shape, [d_out, d_in]) = (x.dims(), weight.dims());
    shape[D - 1] = d_out;
    let rows = shape[..D - 1].iter().product();
    let (x, weight, bias) = (Values::<T>::held(x), Values::<T>::held(weight), bias.map(Values::of));
    if let Some(bias) = &bias {
        assert_eq!(bias.len(), d_out, "width of a bias (left) and of what it is added to");
    }
    let weight = [Columns::new(&weight, d_in)];
    let out = product(&x, &weight, [rows, d_in, d_out], |_, first, values| {
        let bias = bias.as_deref().map(|bias| &bias[first..first + values.len()]);
        Instructions::in_use().run(Finish { values, bias, activation, factors: None });
    });
    host::tensor(out, shape)
}

/// The same for few rows, on the CPU.
fn few<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    activation: Option<Activation>,
) -> Tensor<D> {
    let (dtype, mut shape) = (x.dtype(), x.dims());
    let [d_out, d_in] = weight.dims();
    shape[D - 1] = d_out;
    let mut out = vec![0.0; shape.iter().product()];
    host::by_type!(dtype, T => {
        products(&Values::<T>::held(weight), &Values::<T>::held(x), d_in, &mut out);
    });
    finished(host::tensor(out, shape), bias, activation).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, floats, noise};
    use burn::tensor::{DType, Device};

    /// Few rows and many, parts of tensors, turned weights, against Burn's operations.
    #[test]
    fn bodies_agree() {
        let device = Device::flex();
        for (seed, [batch, seq, d_in, d_out]) in
            (0..).zip([[1, 3, 7, 5], [1, 15, 40, 130], [2, 33, 40, 17], [3, 200, 65, 33], [1, 600, 8, 300]])
        {
            let x = noise([batch, seq, d_in + 1], seed, &device).narrow(2, 1, d_in);
            let bias = noise([d_out], 8, &device);
            for weight in [noise([d_out, d_in], 9, &device), noise([d_in, d_out], 9, &device).transpose()] {
                let y = x.clone().reshape([batch * seq, d_in]).matmul(weight.clone().transpose());
                let y = y.reshape([batch, seq, d_out]);
                let plain = linear(x.clone(), weight.clone(), None, None);
                assert_close(plain, &floats(y.clone()), 2e-5);
                let y = y + bias.clone().unsqueeze();
                let biased = linear(x.clone(), weight.clone(), Some(bias.clone()), None);
                assert_close(biased, &floats(y.clone()), 2e-5);
                let activated = linear(x.clone(), weight, Some(bias.clone()), Some(Activation::Gelu));
                assert_close(activated, &floats(Activation::Gelu.forward(y)), 2e-5);
            }
        }
    }

    /// Beside those of Burn's operations: of all, and of some.
    #[test]
    fn gradients_agree() {
        let device = Device::flex().autodiff();
        for [batch, seq, d_in, d_out] in [[1, 16, 1, 1], [2, 33, 40, 17], [3, 200, 65, 33]] {
            for wanted in [[true; 3], [true, false, false], [false, true, false], [false, false, true]] {
                let gradients = |linear: &dyn Fn(Tensor<3>, Tensor<2>, Tensor<1>) -> Tensor<3>| {
                    let [to_x, to_weight, to_bias] = wanted;
                    let x = noise([batch, d_in, seq], 1, &device).set_require_grad(to_x);
                    let weight = noise([d_out, d_in], 2, &device).set_require_grad(to_weight);
                    let bias = noise([d_out], 4, &device).set_require_grad(to_bias);
                    let y = linear(x.clone().swap_dims(1, 2), weight.clone(), bias.clone());
                    let gradients = (y * noise([batch, seq, d_out], 3, &device)).sum().backward();
                    let of_x = x.grad(&gradients).map(floats);
                    [of_x, weight.grad(&gradients).map(floats), bias.grad(&gradients).map(floats)]
                };
                let found = gradients(&|x, weight, bias| linear(x, weight, Some(bias), None));
                let expected = gradients(&|x, weight, bias| burns(x, weight.transpose(), Some(bias)));
                assert_eq!(found.each_ref().map(Option::is_some), wanted);
                for (found, expected) in found.into_iter().zip(expected) {
                    let [found, expected] = [found, expected].map(Option::unwrap_or_default);
                    assert_eq!(found.len(), expected.len());
                    assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 4e-5));
                }
            }
        }
    }

    #[test]
    fn there_may_be_no_rows() {
        let (x, weight) =
            (Tensor::<3>::zeros([0, 20, 4], &Device::flex()), noise([3, 4], 1, &Device::flex()));
        assert_eq!(linear(x, weight, None, Some(Activation::Gelu)).dims(), [0, 20, 3]);

        let device = Device::flex().autodiff();
        let [x, weight] =
            [Tensor::<2>::zeros([0, 4], &device), noise([3, 4], 1, &device)].map(Tensor::require_grad);
        let y = linear(x.clone(), weight.clone(), Some(noise([3], 2, &device)), None);
        let gradients = y.sum().backward();
        assert_eq!(x.grad(&gradients).unwrap().dims(), [0, 4]);
        assert_close(weight.grad(&gradients).unwrap(), &[0.0; 12], 0.0);
    }

    #[test]
    fn half_precision_stays() {
        for dtype in [DType::F16, DType::BF16] {
            let cast = |shape, seed| noise(shape, seed, &Device::flex()).cast(dtype);
            for rows in [2, 40] {
                let (x, weight) = (cast([rows, 8], 1), cast([3, 8], 2));
                let found = linear(x.clone(), weight.clone(), None, Some(Activation::Silu));
                assert_eq!(found.dtype(), dtype);
                let whole = linear(x.cast(DType::F32), weight.cast(DType::F32), None, Some(Activation::Silu));
                assert_close(found, &floats(whole), 4e-2);
            }
        }
    }

    /// Beside Burn's in f32: few rows and many, odd widths.
    #[test]
    fn bodies_agree_in_bf16() {
        for [rows, d_in, d_out] in
            [[1, 1, 1], [1, 737, 5], [3, 64, 300], [16, 65, 9], [31, 33, 7], [32, 33, 70], [77, 520, 65]]
        {
            let x = noise([rows, d_in], 1, &Device::flex()).cast(DType::BF16);
            let weight = noise([d_out, d_in + 1], 2, &Device::flex()).narrow(1, 1, d_in).cast(DType::BF16);
            let bias = noise([d_out], 3, &Device::flex()).cast(DType::BF16);
            let found = linear(x.clone(), weight.clone(), Some(bias.clone()), None);
            let [x, weight] = [x, weight].map(|tensor| tensor.cast(DType::F32));
            let expected = x.matmul(weight.transpose()) + bias.cast(DType::F32).unsqueeze();
            assert_close(found, &floats(expected), 8e-3 * (d_in as f64).sqrt().max(1.0));
        }
    }

    #[test]
    #[should_panic(expected = "width of the input")]
    fn widths_must_fit() {
        let ones = |shape| Tensor::<2>::ones(shape, &Device::flex());
        let _ = linear(ones([20, 3]), ones([2, 4]), None, None);
    }
}
