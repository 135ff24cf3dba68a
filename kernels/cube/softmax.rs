//! Rows of scores that become shares, in one launch.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::{Bool, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::together::{Fold, Team, fold};
use super::{address_type, by_rows, cubes, empty, held, is_empty, rows_of, shaped, width};

/// Units that share a row, at most.
const UNITS: usize = 256;

/// `exp(x) / Σ exp(x)` of each row, in f32: `[..., width]`, the shape stays. A row of `-∞` alone becomes zeros.
pub fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if is_empty(&x) {
        return x;
    }
    let shape = x.dims();
    shaped::<D, 2>(launch(by_rows(rows_of(x)), [1, 1], 1.0, false, None, None), shape)
}

/// What hides keys, and what is added to scores: `[batch, heads, queries, keys]`, whose axes may be repeated.
#[derive(Default)]
pub struct Seen {
    /// Whether a query sees its own key, aligned at the end, and those before it.
    pub causal: bool,
    /// `true` hides a key.
    pub hidden: Option<Tensor<4, Bool>>,
    /// Added to the scores after they were scaled.
    pub bias: Option<Tensor<4>>,
}

/// `softmax(scores · scale + mask)` over the last axis, in f32: `[batch, heads, queries, keys]`, the shape stays. A query that
/// sees no key gets zeros.
pub fn scores(scores: Tensor<4>, scale: f64, seen: Seen) -> Tensor<4> {
    let shape = scores.dims();
    let [_, heads, queries, _] = shape;
    let hidden = seen.hidden.map(|hidden| {
        let hidden = hidden.try_into_primitive::<Cube>();
        hidden.unwrap_or_else(|error| panic!("the mask is not on a device of CubeCL: {error:?}"))
    });
    let scores = by_rows(rows_of(scores));
    let out = launch(scores, [heads, queries], scale, seen.causal, hidden, seen.bias.map(held));
    shaped::<4, 2>(out, shape)
}

/// From one to the next along an axis of what goes with scores.
#[derive(CubeLaunch, CubeType, Clone, Copy)]
struct Steps {
    batch: usize,
    head: usize,
    query: usize,
    key: usize,
}

fn steps(x: Option<&CubeTensor>) -> StepsLaunch {
    let [batch, head, query, key] = x.map_or([0; 4], |x| [0, 1, 2, 3].map(|axis| x.meta.strides()[axis]));
    StepsLaunch::new(batch, head, query, key)
}

fn launch(
    x: CubeTensor,
    [heads, queries]: [usize; 2],
    scale: f64,
    causal: bool,
    hidden: Option<CubeTensor>,
    bias: Option<CubeTensor>,
) -> CubeTensor {
    let [rows, length] = x.meta.shape().dims();
    let stride = x.meta.strides()[0];
    let out = empty(&x, [rows, length]);
    let read = width(&x, &[length, stride]);
    let client = x.client.clone();
    let of = |other: Option<&CubeTensor>| dtype_to_elem_type(other.unwrap_or(&x).dtype);
    let dtypes = [of(None), of(hidden.as_ref()), of(bias.as_ref())];
    let (hidden_steps, bias_steps) = (steps(hidden.as_ref()), steps(bias.as_ref()));
    let team = Team::new(length / read, UNITS, &client);
    let others = [hidden.as_ref(), bias.as_ref(), Some(&out)].into_iter().flatten();
    let address = address_type(&std::iter::once(&x).chain(others).collect::<Vec<_>>());
    // SAFETY: a cube reads and writes within a row that there is, and at its places of what goes with it.
    unsafe {
        softmax_kernel::launch_unchecked(
            &client,
            cubes(rows, &client),
            team.cube(),
            address,
            read,
            x.into_buffer_arg(),
            hidden.map(CubeTensor::into_buffer_arg).into(),
            bias.map(CubeTensor::into_buffer_arg).into(),
            out.clone().into_buffer_arg(),
            rows,
            length,
            stride,
            heads,
            queries,
            hidden_steps,
            bias_steps,
            scale as f32,
            causal,
            team,
            dtypes,
        );
    }
    out
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn softmax_kernel<F: Float, H: Int, G: Float, N: Size>(
    x: &[Vector<F, N>],
    hidden: ComptimeOption<&[H]>,
    bias: ComptimeOption<&[G]>,
    out: &mut [Vector<F, N>],
    rows: usize,
    length: usize,
    stride: usize,
    heads: usize,
    queries: usize,
    hidden_steps: Steps,
    bias_steps: Steps,
    scale: f32,
    #[comptime] causal: bool,
    #[comptime] team: Team,
    #[define(F, H, G)] _dtypes: [ElemType; 3],
) {
    let row = CUBE_POS;
    if row < rows {
        let vectors = length / N::value();
        let query = row % queries;
        let head = row / queries % heads;
        let batch = row / (queries * heads);
        let place = Place {
            start: row * (stride / N::value()),
            hidden: batch * hidden_steps.batch + head * hidden_steps.head + query * hidden_steps.query,
            bias: batch * bias_steps.batch + head * bias_steps.head + query * bias_steps.query,
            hidden_step: hidden_steps.key,
            bias_step: bias_steps.key,
            // of the keys below which it sees
            end: query + 1 + length,
            queries,
        };
        let mut shared = Shared::<[f32]>::new_slice(comptime!(team.parts()));
        let mut highest = f32::min_value();
        for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
            let value = score(x, &hidden, &bias, &place, at, scale, causal);
            #[unroll]
            for lane in 0..N::value() {
                highest = max(highest, value.extract(lane));
            }
        }
        let highest = fold(highest, &mut shared, team, Fold::Max);
        let mut sum = Vector::<f32, N>::new(0.0);
        for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
            let value = score(x, &hidden, &bias, &place, at, scale, causal);
            sum += (value - Vector::new(highest)).exp();
        }
        let sum = fold(sum.vector_sum(), &mut shared, team, Fold::Sum);
        // where nothing is seen, every score is the lowest
        let share = select(highest == f32::min_value(), 0.0, 1.0 / sum);
        for at in range_stepped(UNIT_POS as usize, vectors, CUBE_DIM as usize) {
            let value = score(x, &hidden, &bias, &place, at, scale, causal);
            let value = (value - Vector::new(highest)).exp() * Vector::new(share);
            out[row * vectors + at] = Vector::cast_from(value);
        }
    }
}

/// Where a row lies, and what goes with it.
#[derive(CubeType)]
struct Place {
    start: usize,
    hidden: usize,
    bias: usize,
    hidden_step: usize,
    bias_step: usize,
    /// A query sees keys of which so many queries later are before this.
    end: usize,
    queries: usize,
}

/// Scores scaled, with what is added to them; the lowest where the key is hidden.
#[cube]
fn score<F: Float, H: Int, G: Float, N: Size>(
    x: &[Vector<F, N>],
    hidden: &ComptimeOption<&[H]>,
    bias: &ComptimeOption<&[G]>,
    place: &Place,
    at: usize,
    scale: f32,
    #[comptime] causal: bool,
) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::cast_from(x[place.start + at]) * Vector::new(scale);
    #[unroll]
    for lane in 0..N::value() {
        let key = at * N::value() + lane;
        let added: ComptimeOption<f32> =
            bias.as_ref().map(|bias| f32::cast_from(bias[place.bias + key * place.bias_step]));
        let mut of_lane = value.extract(lane) + added.unwrap_or(0.0);
        let is_hidden: ComptimeOption<bool> =
            hidden.as_ref().map(|hidden| hidden[place.hidden + key * place.hidden_step] != H::from_int(0));
        if is_hidden.unwrap_or(false) {
            of_lane = f32::min_value();
        }
        if comptime!(causal) {
            of_lane = select(key + place.queries >= place.end, f32::min_value(), of_lane);
        }
        value.insert(lane, of_lane);
    }
    value
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use crate::ops::softmax;
    use crate::testing::{
        assert_close, assert_rounded, cube_device, cube_types, floats, noise, on_cube, tensor,
    };
    use burn::tensor::{DType, Device, Tensor};

    #[test]
    fn shares_are_those_of_the_cpu() {
        for (seed, shape) in (0..).zip([[1, 1], [3, 5], [70, 33], [2, 1032]]) {
            for dtype in cube_types() {
                let x = (noise(shape, seed, &Device::flex()) * 20.0).cast(dtype);
                let expected = floats(softmax(x.clone().cast(DType::F32)));
                for x in on_cube(&x) {
                    assert_rounded(softmax(x), &expected, 1e-6);
                }
            }
        }
        assert_eq!(softmax(Tensor::<2>::zeros([0, 4], &cube_device())).dims(), [0, 4]);
    }

    /// 1 : 2 : 4, and what is hidden gets nothing, not even where all is.
    #[test]
    fn literals() {
        let (ln_2, hidden) = (2.0_f64.ln(), f64::NEG_INFINITY);
        let values = [0.0, ln_2, 2.0 * ln_2, 7.0, hidden, 7.0, hidden, hidden, hidden];
        let sevenths = [1.0, 2.0, 4.0].map(|part| part / 7.0);
        let expected = [&sevenths[..], &[0.5, 0.0, 0.5], &[0.0; 3]].concat();
        assert_close(softmax(tensor([3, 3], &values, &cube_device())), &expected, 1e-6);
    }
}
