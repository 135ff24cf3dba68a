//! Activations, with what comes before and after them.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::Tensor;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{address_type, by_rows, by_unit, empty, held, is_empty, rows_of, shaped, width};
use crate::ops::Activation;

/// `act(x + bias) * factors`, of what there is of these: `[..., width]`, the shape stays. Computed in f32.
///
/// - `bias`: `[width]`
/// - `factors`: of the shape and in the type of `x`
///
/// # Panics
/// If the bias is not as wide.
pub fn finish<const D: usize>(
    x: Tensor<D>,
    bias: Option<Tensor<1>>,
    activation: Activation,
    factors: Option<Tensor<D>>,
) -> Tensor<D> {
    let shape = x.dims();
    let width_of_bias = bias.as_ref().map_or(shape[D - 1], |bias| bias.dims()[0]);
    assert_eq!(width_of_bias, shape[D - 1], "width of a bias (left) and of what it is added to");
    if is_empty(&x) {
        return x;
    }
    let (x, bias) = (by_rows(rows_of(x)), bias.map(|bias| by_rows(held(bias))));
    let factors = factors.map(|factors| by_rows(rows_of(factors)));
    let [rows, length] = x.meta.shape().dims();
    let stride_of = |x: &CubeTensor| x.meta.strides()[0];
    let (stride, factor_stride) = (stride_of(&x), factors.as_ref().map_or(0, stride_of));
    let out = empty(&x, [rows, length]);
    let of_bias = bias.as_ref().unwrap_or(&x);
    let read = width(&x, &[length, stride, factor_stride]).min(width(of_bias, &[length]));
    let (client, dtypes) = (x.client.clone(), [x.dtype, of_bias.dtype].map(dtype_to_elem_type));
    let (count, cube) = by_unit(rows * length / read, &client);
    // SAFETY: a unit reads and writes at a row and within a width that there are.
    unsafe {
        finish_kernel::launch_unchecked(
            &client,
            count,
            cube,
            address_type(&[&x, factors.as_ref().unwrap_or(&x), &out]),
            read,
            x.into_buffer_arg(),
            bias.map(CubeTensor::into_buffer_arg).into(),
            factors.map(CubeTensor::into_buffer_arg).into(),
            out.clone().into_buffer_arg(),
            rows,
            length,
            stride,
            factor_stride,
            activation,
            dtypes,
        );
    }
    shaped::<D, 2>(out, shape)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn finish_kernel<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    bias: ComptimeOption<&[Vector<G, N>]>,
    factors: ComptimeOption<&[Vector<F, N>]>,
    out: &mut [Vector<F, N>],
    rows: usize,
    length: usize,
    stride: usize,
    factor_stride: usize,
    #[comptime] activation: Activation,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let at = ABSOLUTE_POS;
    let vectors = length / N::value();
    if at < rows * vectors {
        let row = at / vectors;
        let column = at % vectors;
        let value = Vector::<f32, N>::cast_from(x[row * (stride / N::value()) + column]);
        let bias: ComptimeOption<Vector<f32, N>> = bias.as_ref().map(|bias| Vector::cast_from(bias[column]));
        let value = activated(value + bias.unwrap_or(Vector::new(0.0)), comptime!(Some(activation)));
        let factors: ComptimeOption<Vector<f32, N>> = factors
            .as_ref()
            .map(|factors| Vector::cast_from(factors[row * (factor_stride / N::value()) + column]));
        out[at] = Vector::cast_from(value * factors.unwrap_or(Vector::new(1.0)));
    }
}

/// Values through the activation, if there is one.
#[cube]
pub fn activated<N: Size>(x: Vector<f32, N>, #[comptime] activation: Option<Activation>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(1.0);
    match comptime!(activation) {
        None => x,
        Some(Activation::Gelu) => {
            x * Vector::new(0.5) * (one + (x * Vector::new(std::f32::consts::FRAC_1_SQRT_2)).erf())
        }
        // x / 2 (1 + tanh(u)) = x σ(2u), which does not cancel
        Some(Activation::GeluTanh) => {
            let cubic = x + x * x * x * Vector::new(0.044715);
            times_sigmoid(x, cubic * Vector::new(1.595_769))
        }
        Some(Activation::QuickGelu) => times_sigmoid(x, x * Vector::new(1.702)),
        Some(Activation::Silu) => times_sigmoid(x, x),
        Some(Activation::Relu) => max(x, Vector::new(0.0)),
        Some(Activation::Tanh) => x.tanh(),
    }
}

/// `x σ(at)`.
#[cube]
fn times_sigmoid<N: Size>(x: Vector<f32, N>, at: Vector<f32, N>) -> Vector<f32, N> {
    x / (Vector::new(1.0) + (-at).exp())
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use crate::ops::Activation;
    use crate::testing::{assert_rounded, cube_device, cube_types, floats, noise, on_cube};
    use burn::tensor::{DType, Device, Tensor};

    /// Beside those of the CPU: odd widths, one value, parts of others, large values, in half precision.
    #[test]
    fn activations_are_those_of_the_cpu() {
        for (seed, shape) in (0..).zip([[1, 1], [5, 7], [3, 64]]) {
            for dtype in cube_types() {
                let x = (noise(shape, seed, &Device::flex()) * 40.0).cast(dtype);
                let factors = noise(shape, 8, &Device::flex()).cast(dtype);
                let bias = noise([shape[1]], 9, &Device::flex()).cast(dtype);
                for activation in Activation::ALL {
                    let [x32, factors32] = [&x, &factors].map(|x| x.clone().cast(DType::F32));
                    let of_cpu = activation.biased(x32.clone(), Some(bias.clone().cast(DType::F32)));
                    let [biased, gated] = [of_cpu, activation.gated(x32, factors32)].map(floats);
                    let bias = bias.clone().to_device(&cube_device());
                    for (x, factors) in on_cube(&x).into_iter().zip(on_cube(&factors)) {
                        assert_rounded(activation.biased(x.clone(), Some(bias.clone())), &biased, 1e-5);
                        assert_rounded(activation.gated(x, factors), &gated, 1e-5);
                    }
                }
            }
        }
        let none = Tensor::<2>::zeros([0, 3], &cube_device());
        assert_eq!(Activation::Silu.forward(none).dims(), [0, 3]);
    }
}
