//! Rows brought into another order, and summed up.

use burn::backend::cubecl::dtype_to_elem_type;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{address_type, by_rows, empty, upload, width};

/// Units that share a row, at most.
const UNITS: usize = 256;

/// The units for a row of so many vectors.
fn cube(vectors: usize, client: &cubecl::client::Client) -> CubeDim {
    let most = UNITS.min(client.properties().hardware.max_units_per_cube as usize);
    CubeDim::new_1d(vectors.next_power_of_two().min(most) as u32)
}

/// `out[row] = x[from[row]]`, `[_, width] -> [from, width]`.
pub fn gather(x: CubeTensor, from: &[u32]) -> CubeTensor {
    let x = by_rows(x);
    let [_, length] = x.meta.shape().dims();
    let stride = x.meta.strides()[0];
    let out = empty(&x, [from.len(), length]);
    let read = width(&x, &[length, stride]);
    let (client, dtype) = (x.client.clone(), dtype_to_elem_type(x.dtype));
    // SAFETY: a unit reads within the row of `x` that it is told, and writes within a row of `out`.
    unsafe {
        gather_kernel::launch_unchecked(
            &client,
            CubeCount::Static(from.len() as u32, 1, 1),
            cube(length / read, &client),
            address_type(&[&x, &out]),
            read,
            x.into_buffer_arg(),
            upload(&client, from),
            out.clone().into_buffer_arg(),
            length,
            stride,
            dtype,
        );
    }
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn gather_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    from: &[u32],
    out: &mut [Vector<F, N>],
    length: usize,
    stride: usize,
    #[define(F)] _dtype: ElemType,
) {
    let size = N::value();
    let row = CUBE_POS_X as usize;
    let start = from[row] as usize * (stride / size);
    let vectors = length / size;
    for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
        out[row * vectors + at] = x[start + at];
    }
}

/// `out[token]` is the sum of `weights[token][choice] * rows[places[token][choice]]` over the choices, in their order, whose
/// place is a row: `[rows, width] -> [tokens, width]`. Summed up in f32.
///
/// - `weights`: `[tokens, top_k]`, in f32
/// - `places`: `[tokens, top_k]`
pub fn combine(rows: CubeTensor, weights: CubeTensor, places: &[u32]) -> CubeTensor {
    let (rows, weights) = (by_rows(rows), by_rows(weights));
    let ([count, length], [tokens, top_k]) = (rows.meta.shape().dims(), weights.meta.shape().dims());
    let strides = [rows.meta.strides()[0], weights.meta.strides()[0]];
    let out = empty(&rows, [tokens, length]);
    let read = width(&rows, &[length, strides[0]]);
    let (client, dtype) = (rows.client.clone(), dtype_to_elem_type(rows.dtype));
    // SAFETY: a unit reads within the rows that there are, and writes within a row of `out`.
    unsafe {
        combine_kernel::launch_unchecked(
            &client,
            CubeCount::Static(tokens as u32, 1, 1),
            cube(length / read, &client),
            address_type(&[&rows, &out]),
            read,
            rows.into_buffer_arg(),
            weights.into_buffer_arg(),
            upload(&client, places),
            out.clone().into_buffer_arg(),
            count,
            length,
            strides[0],
            strides[1],
            top_k,
            dtype,
        );
    }
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn combine_kernel<F: Float, N: Size>(
    rows: &[Vector<F, N>],
    weights: &[f32],
    places: &[u32],
    out: &mut [Vector<F, N>],
    count: usize,
    length: usize,
    stride: usize,
    weight_stride: usize,
    top_k: usize,
    #[define(F)] _dtype: ElemType,
) {
    let size = N::value();
    let token = CUBE_POS_X as usize;
    let vectors = length / size;
    for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
        let mut sum = Vector::<f32, N>::new(0.0);
        for choice in 0..top_k {
            let place = places[token * top_k + choice] as usize;
            if place < count {
                let weight = Vector::<f32, N>::new(weights[token * weight_stride + choice]);
                let row = Vector::<f32, N>::cast_from(rows[place * (stride / size) + at]);
                sum = fma(weight, row, sum);
            }
        }
        out[token * vectors + at] = Vector::<F, N>::cast_from(sum);
    }
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use super::super::held;
    use super::*;
    use crate::testing::{assert_close, assert_rounded, cube_device, cube_types, floats, noise};
    use burn::tensor::{Device, Tensor};
    use burn_cubecl::Cube;

    /// Whole tensors, and parts of rows of others.
    fn on_device(x: &Tensor<2>) -> [CubeTensor; 2] {
        let [_, width] = x.dims();
        let x = x.clone().to_device(&cube_device());
        [held(x.clone()), held(Tensor::cat(vec![x.clone(), x], 1).narrow(1, 0, width))]
    }

    #[test]
    fn rows_are_gathered() {
        let from = [3, 0, 0, 6, 1];
        for (dtype, width) in
            cube_types().into_iter().flat_map(|dtype| [1, 7, 64, 100].map(|width| (dtype, width)))
        {
            let x = noise([7, width], 1, &Device::flex()).cast(dtype);
            let values = floats(x.clone());
            let rows = from.iter().map(|&row| &values[row as usize * width..(row as usize + 1) * width]);
            let expected = rows.collect::<Vec<_>>().concat();
            for x in on_device(&x) {
                assert_close(Tensor::<2>::from_primitive::<Cube>(gather(x, &from)), &expected, 0.0);
            }
        }
    }

    #[test]
    fn rows_are_summed_up() {
        let places = [4, u32::MAX, 2, 0, u32::MAX, u32::MAX, 1, 3];
        for (dtype, width) in
            cube_types().into_iter().flat_map(|dtype| [1, 7, 64, 100].map(|width| (dtype, width)))
        {
            let rows = noise([5, width], 1, &Device::flex()).cast(dtype);
            let weights = noise([4, 2], 2, &Device::flex());
            let (values, mix) = (floats(rows.clone()), floats(weights.clone()));
            let mut expected = vec![0.0; 4 * width];
            for (choice, &place) in places.iter().enumerate().filter(|(_, place)| **place < 5) {
                for at in 0..width {
                    expected[choice / 2 * width + at] += mix[choice] * values[place as usize * width + at];
                }
            }
            let weights = held(weights.to_device(&cube_device()));
            for rows in on_device(&rows) {
                let found = combine(rows, weights.clone(), &places);
                assert_rounded(Tensor::<2>::from_primitive::<Cube>(found), &expected, 1e-6);
            }
        }
    }
}
