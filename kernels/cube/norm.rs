//! Normalised rows and groups of channels, each read and written by one cube. Sums are in f32.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::Tensor;
use cubecl::prelude::*;

use super::pointwise::activated;
use super::together::{Fold, Team, fold};
use super::{address_type, by_rows, cubes, empty, held, is_empty, rows_of, shaped, side_by_side, width};
use crate::ops::Activation;

/// Units that share a row, at most.
const OF_ROW: usize = 256;
/// Units that share a group of channels, at most.
const OF_GROUP: usize = 1024;

/// `(x - mean) / √(variance + eps) * weight + bias` of each row, or `x / √(mean(x²) + eps) * weight` if it is not
/// `centred`: `[..., width]`, the shape stays.
///
/// - `weight`, `bias`: `[width]`, of one type
///
/// # Panics
/// If these are not as wide.
pub fn by_row<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
    centred: bool,
) -> Tensor<D> {
    let shape = x.dims();
    let widths = [weight.dims()[0], bias.as_ref().map_or(shape[D - 1], |bias| bias.dims()[0])];
    assert_eq!(widths, [shape[D - 1]; 2], "widths of weight and bias (left) and of what is normalised");
    if is_empty(&x) {
        return x;
    }
    let (x, weight, bias) = (by_rows(rows_of(x)), by_rows(held(weight)), bias.map(held));
    let [rows, length] = x.meta.shape().dims();
    let stride = x.meta.strides()[0];
    let out = empty(&x, [rows, length]);
    let read = width(&x, &[length, stride]).min(width(&weight, &[length]));
    let (client, dtypes) = (x.client.clone(), [x.dtype, weight.dtype].map(dtype_to_elem_type));
    let team = Team::new(length / read, OF_ROW, &client);
    // SAFETY: a cube reads and writes within a row that there is, and what has its width.
    unsafe {
        by_row_kernel::launch_unchecked(
            &client,
            cubes(rows, &client),
            team.cube(),
            address_type(&[&x, &out]),
            read,
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.map(|bias| by_rows(bias).into_buffer_arg()).into(),
            out.clone().into_buffer_arg(),
            rows,
            length,
            stride,
            eps as f32,
            centred,
            team,
            dtypes,
        );
    }
    shaped::<D, 2>(out, shape)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn by_row_kernel<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[Vector<G, N>],
    bias: ComptimeOption<&[Vector<G, N>]>,
    out: &mut [Vector<F, N>],
    rows: usize,
    length: usize,
    stride: usize,
    eps: f32,
    #[comptime] centred: bool,
    #[comptime] team: Team,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let row = CUBE_POS;
    if row < rows {
        let vectors = length / N::value();
        let start = row * (stride / N::value());
        let mut shared = Shared::<[f32]>::new_slice(comptime!(team.parts()));
        let mut mean = 0.0f32;
        if comptime!(centred) {
            mean = mean_of(x, start, vectors, &mut shared, team);
        }
        let factor = factor_of(x, start, vectors, mean, eps, &mut shared, team);
        for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
            let value = Vector::<f32, N>::cast_from(x[start + at]) - Vector::new(mean);
            let value = value * Vector::new(factor) * Vector::cast_from(weight[at]);
            let bias: ComptimeOption<Vector<f32, N>> = bias.as_ref().map(|bias| Vector::cast_from(bias[at]));
            out[row * vectors + at] = Vector::cast_from(value + bias.unwrap_or(Vector::new(0.0)));
        }
    }
}

/// The mean of a cube's vectors.
#[cube]
fn mean_of<F: Float, N: Size>(
    x: &[Vector<F, N>],
    start: usize,
    vectors: usize,
    shared: &mut Shared<[f32]>,
    #[comptime] team: Team,
) -> f32 {
    let mut sum = Vector::<f32, N>::new(0.0);
    for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
        sum += Vector::cast_from(x[start + at]);
    }
    fold(sum.vector_sum(), shared, team, Fold::Sum) / f32::cast_from(vectors * N::value())
}

/// `1 / √(mean((x - mean)²) + eps)` of a cube's vectors.
#[cube]
fn factor_of<F: Float, N: Size>(
    x: &[Vector<F, N>],
    start: usize,
    vectors: usize,
    mean: f32,
    eps: f32,
    shared: &mut Shared<[f32]>,
    #[comptime] team: Team,
) -> f32 {
    let mut sum = Vector::<f32, N>::new(0.0);
    for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
        let value = Vector::<f32, N>::cast_from(x[start + at]) - Vector::new(mean);
        sum += value * value;
    }
    let sum = fold(sum.vector_sum(), shared, team, Fold::Sum);
    1.0 / (sum / f32::cast_from(vectors * N::value()) + eps).sqrt()
}

/// Each of `n_groups` groups of channels normalised over its channels and places, scaled and moved by channel, and through the
/// activation: `[batch, channels, ...]`, the shape stays.
///
/// - `weight`, `bias`: `[channels]`, of one type
pub fn by_group<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    n_groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Tensor<D> {
    if is_empty(&x) {
        return x;
    }
    let shape = x.dims();
    let (batch, channels) = (shape[0], shape[1]);
    let places = shape[2..].iter().product();
    let x = side_by_side(held(x.reshape([batch, channels, places])));
    let [weight, bias] = [weight, bias].map(|factor| by_rows(held(factor)));
    let out = empty(&x, [batch, channels, places]);
    let read = width(&x, &[places]);
    let (groups, length) = (batch * n_groups, channels / n_groups * places);
    let (client, dtypes) = (x.client.clone(), [x.dtype, weight.dtype].map(dtype_to_elem_type));
    let team = Team::new(length / read, OF_GROUP, &client);
    // SAFETY: a cube reads and writes within a group that there is, and what its channels have.
    unsafe {
        by_group_kernel::launch_unchecked(
            &client,
            cubes(groups, &client),
            team.cube(),
            address_type(&[&x, &out]),
            read,
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            groups,
            n_groups,
            length,
            places,
            eps as f32,
            activation,
            team,
            dtypes,
        );
    }
    shaped::<D, 3>(out, shape)
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn by_group_kernel<F: Float, G: Float, N: Size>(
    x: &[Vector<F, N>],
    weight: &[G],
    bias: &[G],
    out: &mut [Vector<F, N>],
    groups: usize,
    n_groups: usize,
    length: usize,
    places: usize,
    eps: f32,
    #[comptime] activation: Option<Activation>,
    #[comptime] team: Team,
    #[define(F, G)] _dtypes: [ElemType; 2],
) {
    let group = CUBE_POS;
    if group < groups {
        let vectors = length / N::value();
        let start = group * vectors;
        let of_channel = places / N::value();
        let first = group % n_groups * (vectors / of_channel);
        let mut shared = Shared::<[f32]>::new_slice(comptime!(team.parts()));
        let mean = mean_of(x, start, vectors, &mut shared, team);
        let factor = factor_of(x, start, vectors, mean, eps, &mut shared, team);
        for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
            let channel = first + at / of_channel;
            let scale = factor * f32::cast_from(weight[channel]);
            let value = Vector::<f32, N>::cast_from(x[start + at]) - Vector::new(mean);
            let value = value * Vector::new(scale) + Vector::new(f32::cast_from(bias[channel]));
            out[start + at] = Vector::cast_from(activated(value, activation));
        }
    }
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use crate::ops::{Activation, group_norm, layer_norm, rms_norm};
    use crate::testing::{
        assert_close, assert_rounded, cube_device, cube_types, floats, noise, on_cube, tensor,
    };
    use burn::tensor::{DType, Device, Tensor};

    /// Beside those of the CPU: odd widths, one value, wide rows, parts of others, far from zero, in half precision.
    #[test]
    fn rows_are_those_of_the_cpu() {
        for (seed, shape) in (0..).zip([[1, 1, 1], [2, 3, 5], [1, 70, 33], [3, 2, 1032]]) {
            for dtype in cube_types() {
                let x = (noise(shape, seed, &Device::flex()) + 3.0).cast(dtype);
                let factors = [8, 9].map(|seed| noise([shape[2]], seed, &Device::flex()).cast(dtype));
                let [weight, bias] = factors.clone().map(|factor| factor.cast(DType::F32));
                let exact = x.clone().cast(DType::F32);
                let centred = floats(layer_norm(exact.clone(), weight.clone(), Some(bias), 1e-5));
                let expected = floats(rms_norm(exact, weight, 1e-5));
                let [weight, bias] = factors.map(|factor| factor.to_device(&cube_device()));
                for x in on_cube(&x) {
                    let found = layer_norm(x.clone(), weight.clone(), Some(bias.clone()), 1e-5);
                    assert_rounded(found, &centred, 1e-5);
                    assert_rounded(rms_norm(x, weight.clone(), 1e-5), &expected, 1e-5);
                }
            }
        }
    }

    /// More rows than a device may have cubes in one direction; weights of another type; none.
    #[test]
    fn rows_may_be_many_or_none() {
        let device = cube_device();
        let x = tensor([1, 3], &[2.0, -2.0, 2.0], &device).repeat_dim(0, 70_000);
        let weight = tensor([3], &[1.0, 2.0, -1.0], &device);
        let found = rms_norm(x, weight.clone(), 0.0).narrow(0, 69_990, 10);
        assert_close(found, &[1.0, -2.0, -1.0].repeat(10), 1e-6);
        for dtype in cube_types() {
            let x = tensor([1, 3], &[2.0, -2.0, 2.0], &device).cast(dtype);
            assert_close(
                layer_norm(x * 0.0, weight.clone(), Some(weight.clone()), 1.0),
                &[1.0, 2.0, -1.0],
                0.0,
            );
        }
        assert_eq!(rms_norm(Tensor::<2>::zeros([0, 3], &device), weight, 0.1).dims(), [0, 3]);
    }

    #[test]
    fn groups_are_those_of_the_cpu() {
        let cases = [
            ([1, 1, 1, 1], 1),
            ([2, 6, 3, 5], 3),
            ([1, 4, 33, 32], 2),
            ([2, 8, 1, 17], 8),
            ([1, 4, 2, 4], 2),
        ];
        for (at, (shape, n_groups)) in cases.into_iter().enumerate() {
            for dtype in cube_types() {
                let x = (noise(shape, at as u64, &Device::flex()) + 3.0).cast(dtype);
                let factors = [8, 9].map(|seed| noise([shape[1]], seed, &Device::flex()).cast(dtype));
                let [weight, bias] = factors.clone().map(|factor| factor.cast(DType::F32));
                let activation = [None, Some(Activation::Silu)][at % 2];
                let exact = x.clone().cast(DType::F32);
                let expected = floats(group_norm(exact, weight, bias, n_groups, 1e-5, activation));
                let [weight, bias] = factors.map(|factor| factor.to_device(&cube_device()));
                for x in on_cube(&x) {
                    let found = group_norm(x, weight.clone(), bias.clone(), n_groups, 1e-5, activation);
                    assert_rounded(found, &expected, 2e-5);
                }
            }
        }
        let ones = Tensor::ones([4], &cube_device());
        let none = Tensor::<3>::zeros([2, 4, 0], &cube_device());
        assert_eq!(group_norm(none, ones.clone(), ones, 2, 1e-5, None).dims(), [2, 4, 0]);
    }
}
