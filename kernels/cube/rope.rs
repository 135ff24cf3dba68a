//! Queries and keys turned by their positions.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::Tensor;
use burn_cubecl::Cube;
use cubecl::prelude::*;

use super::{address_type, by_rows, by_unit, empty, held, is_empty, rows_of, side_by_side, width};
use crate::ops::Pairing;

/// Each pair of channels turned by its angle, and the channels after the pairs as they are:
/// `[batch, heads, seq, d_head]`, the shape stays. Computed in f32, and rounded at the end.
///
/// - `cos`, `sin`: `[batch or 1, 1, seq, pairs]`, in f32
pub fn turn(x: Tensor<4>, cos: Tensor<4>, sin: Tensor<4>, pairing: Pairing) -> Tensor<4> {
    if is_empty(&x) {
        return x;
    }
    let shape = x.dims();
    let [_, heads, seq, d_head] = shape;
    let [of_batch, _, _, pairs] = cos.dims();
    let x = by_rows(held(x));
    let [cos, sin] = [cos, sin].map(|table| side_by_side(rows_of(table)));
    let strides = [0, 1, 2].map(|axis| x.meta.strides()[axis]);
    let out = empty(&x, shape);
    let rest = d_head - 2 * pairs;
    let read = match pairing {
        Pairing::Half => width(&x, &[&strides[..], &[pairs, rest]].concat()).min(width(&cos, &[pairs])),
        Pairing::Interleaved => 1,
    };
    let (client, dtype) = (x.client.clone(), dtype_to_elem_type(x.dtype));
    let rows = shape[..3].iter().product::<usize>();
    let (count, cube) = by_unit(rows * (pairs + rest) / read, &client);
    // SAFETY: a unit reads and writes at a row and at channels of it that there are, and so do the tables, by `turn`'s terms.
    unsafe {
        turn_kernel::launch_unchecked(
            &client,
            count,
            cube,
            address_type(&[&x, &out]),
            read,
            x.into_buffer_arg(),
            cos.into_buffer_arg(),
            sin.into_buffer_arg(),
            out.clone().into_buffer_arg(),
            rows,
            heads,
            seq,
            if of_batch == 1 { 0 } else { seq },
            pairs,
            rest,
            strides[0],
            strides[1],
            strides[2],
            pairing,
            dtype,
        );
    }
    Tensor::from_primitive::<Cube>(out)
}

/// - `of_batch`: from a row of the batch to the next in the tables, in lines
#[cube(launch_unchecked, address_type = "dynamic")]
fn turn_kernel<F: Float, N: Size>(
    x: &[Vector<F, N>],
    cos: &[Vector<f32, N>],
    sin: &[Vector<f32, N>],
    out: &mut [Vector<F, N>],
    rows: usize,
    heads: usize,
    seq: usize,
    of_batch: usize,
    pairs: usize,
    rest: usize,
    batch_stride: usize,
    head_stride: usize,
    token_stride: usize,
    #[comptime] pairing: Pairing,
    #[define(F)] _dtype: ElemType,
) {
    let size = N::value();
    let turning = pairs / size;
    let items = turning + rest / size;
    let at = ABSOLUTE_POS;
    if at < rows * items {
        let row = at / items;
        let item = at % items;
        let token = row % seq;
        let head = row / seq % heads;
        let batch = row / (seq * heads);
        let start = (batch * batch_stride + head * head_stride + token * token_stride) / size;
        let out_start = row * (turning + items);
        if item < turning {
            let first = if comptime!(pairing == Pairing::Half) { item } else { 2 * item };
            let second = if comptime!(pairing == Pairing::Half) { item + turning } else { 2 * item + 1 };
            let angle = (batch * of_batch + token) * turning + item;
            let a = Vector::<f32, N>::cast_from(x[start + first]);
            let b = Vector::<f32, N>::cast_from(x[start + second]);
            let cos = cos[angle];
            let sin = sin[angle];
            out[out_start + first] = Vector::cast_from(a * cos - b * sin);
            out[out_start + second] = Vector::cast_from(b * cos + a * sin);
        } else {
            out[out_start + turning + item] = x[start + turning + item];
        }
    }
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use crate::ops::{Pairing, Positions, RopeConfig};
    use crate::testing::{assert_rounded, cube_device, cube_types, floats, noise, on_cube};
    use burn::tensor::{DType, Device, Int, Tensor};

    /// Beside that of the CPU: whole heads and parts of them, odd widths, one table for all rows of the batch and one for each.
    #[test]
    fn heads_are_turned_as_on_the_cpu() {
        for (seed, (d_rot, d_head)) in (0..).zip([(2, 2), (8, 8), (6, 7), (16, 24)]) {
            for (dtype, pairing) in cube_types()
                .into_iter()
                .flat_map(|dtype| [Pairing::Half, Pairing::Interleaved].map(|pairing| (dtype, pairing)))
            {
                let rope = |device: &Device| RopeConfig::new(d_rot, 12).with_pairing(pairing).init(device);
                let x = noise([2, 3, 5, d_head], seed, &Device::flex()).cast(dtype);
                let each = |device: &Device| {
                    let each = [[3, 0, 11, 2, 1], [5, 6, 7, 8, 9]];
                    Positions::Each(Tensor::<2, Int>::from_data(each, device))
                };
                let positions: [&dyn Fn(&Device) -> Positions; 2] = [&|_| Positions::From(4), &each];
                for positions in positions {
                    let flex = Device::flex();
                    let exact = x.clone().cast(DType::F32);
                    let expected = floats(rope(&flex).apply(exact, &positions(&flex)));
                    for x in on_cube(&x) {
                        let found = rope(&cube_device()).apply(x, &positions(&cube_device()));
                        assert_rounded(found, &expected, 1e-6);
                    }
                }
            }
        }
    }
}
