//! Tokens sorted by expert, products with each expert's own matrix, and the way back.
//!
//! A token has `top_k` choices of an expert. [`Dispatch`] sorts the choices by expert, stably, so that each expert's rows
//! lie side by side; [`permute`] brings the tokens into that order, [`grouped_matmul`] multiplies each segment with the
//! matrix of its expert, [`combine`] sums a token's rows up again. Nothing is as large as tokens times experts.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{Device, Element, Int, Tensor, TensorData};
use rayon::prelude::*;

use super::Activation;
use crate::count;
use crate::cpu::host::{self, Values, is_host};
use crate::cpu::matmul::FEW;
use crate::cpu::tiles::Number;
use crate::cpu::{self, Instructions};
#[cfg(feature = "cube")]
use crate::cube::{self, is_cube};

/// Choices sorted by expert.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dispatch {
    top_k: usize,
    /// Of each sorted row, its place among the choices `[tokens, top_k]`.
    order: Vec<usize>,
    /// Of each choice, its sorted row; none where it was dropped.
    places: Vec<Option<usize>>,
    /// Where each expert's rows begin, and where the last one's end.
    offsets: Vec<usize>,
}

impl Dispatch {
    /// - `choices`: the expert of each choice, `[tokens, top_k]` row after row; none where it was dropped.
    ///
    /// # Panics
    /// If `top_k` does not divide the choices, or an expert is not below `n_experts`.
    pub fn new(choices: &[Option<usize>], top_k: usize, n_experts: usize) -> Self {
        assert!(
            top_k > 0 && choices.len().is_multiple_of(top_k),
            "{} choices are not {top_k} for each token",
            choices.len()
        );
        let mut offsets = vec![0; n_experts + 1];
        for &expert in choices.iter().flatten() {
            assert!(expert < n_experts, "expert {expert} of {n_experts}");
            offsets[expert + 1] += 1;
        }
        for expert in 0..n_experts {
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let (mut order, mut places) = (vec![0; offsets[n_experts]], vec![None; choices.len()]);
        for (choice, &expert) in choices.iter().enumerate() {
            let Some(expert) = expert else { continue };
            order[next[expert]] = choice;
            places[choice] = Some(next[expert]);
            next[expert] += 1;
        }
        Self { top_k, order, places, offsets }
    }

    /// How many rows there are: choices that were not dropped.
    pub fn rows(&self) -> usize {
        self.order.len()
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.places.len() / self.top_k
    }

    /// How many experts there are.
    pub fn n_experts(&self) -> usize {
        self.offsets.len() - 1
    }

    /// The rows of an expert.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn segment(&self, expert: usize) -> Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// The experts that have rows, and these.
    fn segments(&self) -> Vec<(usize, Range<usize>)> {
        let all = (0..self.n_experts()).map(|expert| (expert, self.segment(expert)));
        all.filter(|(_, rows)| !rows.is_empty()).collect()
    }
}

/// Whole numbers as a tensor.
fn indices(values: impl Iterator<Item = usize>, device: &Device) -> Tensor<1, Int> {
    let values: Vec<i64> = values.map(|value| value as i64).collect();
    let count = values.len();
    Tensor::from_data(TensorData::new(values, [count]), device)
}

/// The tokens in the order of their experts: `[tokens, width] -> [rows, width]`, one row for each choice that was not
/// dropped.
///
/// # Panics
/// If there are not as many tokens as were dispatched.
pub fn permute(x: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [tokens, width] = x.dims();
    assert_eq!(tokens, dispatch.tokens(), "tokens (left) and those that were dispatched");
    let tokens = dispatch.order.iter().map(|choice| choice / dispatch.top_k);
    #[cfg(feature = "cube")]
    if is_cube(&x) && dispatch.rows() * width > 0 {
        let tokens: Vec<u32> = tokens.map(|token| token as u32).collect();
        return cube::moe::gather(x, &tokens);
    }
    if !is_host(&x) || width == 0 {
        let tokens = indices(tokens, &x.device());
        return x.select(0, tokens);
    }
    let tokens: Vec<usize> = tokens.collect();
    host::by_type!(x.dtype(), T => gather::<T>(x, &tokens))
}

/// Rows of a tensor on the CPU.
fn gather<T: Number + Element>(x: Tensor<2>, rows: &[usize]) -> Tensor<2> {
    let [_, width] = x.dims();
    let x = Values::<T>::held(x);
    let mut out = vec![T::default(); rows.len() * width];
    host::by_rows(&mut out, width, |first, out| {
        for (out, row) in out.chunks_mut(width).zip(&rows[first..]) {
            out.copy_from_slice(&x[row * width..(row + 1) * width]);
        }
    });
    host::tensor(out, [rows.len(), width])
}

/// What each row's expert has: `[n_experts, width] -> [rows, width]`, as biases.
///
/// # Panics
/// If there are not as many experts as were dispatched to.
pub fn of_each_row(values: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n_experts, _] = values.dims();
    assert_eq!(n_experts, dispatch.n_experts(), "experts (left) and those that were dispatched to");
    let experts = dispatch.segments().into_iter().flat_map(|(expert, rows)| rows.map(move |_| expert));
    let experts = indices(experts, &values.device());
    values.select(0, experts)
}

/// The product of each row with the matrix of its expert: `[rows, d_in] -> [rows, d_out]`.
///
/// - `weight`: `[n_experts, d_in, d_out]`
///
/// On the CPU each segment is multiplied with its part of `weight` where it lies, several segments, and parts of long
/// ones, at a time; sums are f32, and rounded at the end. On a GPU all segments are one launch,
/// half precision being summed up in f32. Where gradients are wanted, and on other devices, segments of similar length are
/// padded to one batched product: at most half of its rows are padding.
///
/// # Panics
/// If there are not as many rows or experts as in `dispatch`, or the widths differ.
pub fn grouped_matmul(x: Tensor<2>, weight: Tensor<3>, dispatch: &Dispatch) -> Tensor<2> {
    grouped_linear(x, &Projection { weight, bias: None }, dispatch)
}

/// A projection of each expert.
#[derive(Clone, Debug)]
pub struct Projection {
    /// `[n_experts, d_in, d_out]`.
    pub weight: Tensor<3>,
    /// `[n_experts, d_out]`.
    pub bias: Option<Tensor<2>>,
}

impl Projection {
    /// The width of what comes out, for rows of `width`.
    fn d_out(&self, width: usize, dispatch: &Dispatch) -> usize {
        let [n_experts, d_in, d_out] = self.weight.dims();
        assert_eq!(
            [dispatch.n_experts(), width],
            [n_experts, d_in],
            "experts and width (left) and those of a projection"
        );
        if let Some(bias) = &self.bias {
            assert_eq!(bias.dims(), [n_experts, d_out], "biases (left) of so many experts and values");
        }
        d_out
    }

    /// Counts what its products take: the weights of experts that have rows.
    fn count(&self, dispatch: &Dispatch) {
        let [n_experts, d_in, d_out] = self.weight.dims();
        let of_expert = count::bytes(&self.weight) / n_experts.max(1);
        count::add(dispatch.rows() * d_in * d_out, dispatch.segments().len() * of_expert);
    }

    /// Whether it lies in this machine's memory as `x` does, in its type, and no gradients are wanted.
    fn is_host(&self, x: &Tensor<2>) -> bool {
        is_host(x)
            && is_host(&self.weight)
            && self.weight.dtype() == x.dtype()
            && self.bias.as_ref().is_none_or(is_host)
    }

    /// Whether it lies on a device of CubeCL as `x` does, in its type, and no gradients are wanted.
    #[cfg(feature = "cube")]
    fn is_cube(&self, x: &Tensor<2>) -> bool {
        let bias = self.bias.as_ref();
        is_cube(&self.weight)
            && self.weight.dtype() == x.dtype()
            && bias.is_none_or(|bias| is_cube(bias) && bias.dtype() == x.dtype())
    }

    /// That of one expert, in the type of its weight. Nothing but half precision of biases is copied.
    fn of_expert<T: Number + Element>(&self, expert: usize) -> cpu::moe::Projection<T> {
        let [_, d_in, d_out] = self.weight.dims();
        let weight = Values::held(self.weight.clone().narrow(0, expert, 1));
        let bias = self.bias.clone().map(|bias| Values::of(bias.narrow(0, expert, 1)));
        cpu::moe::Projection { weight, bias, d_in, d_out }
    }
}

/// Each row through the projection of its expert, `x W + b`: `[rows, d_in] -> [rows, d_out]`. As [`grouped_matmul`].
///
/// # Panics
/// If there are not as many rows or experts as in `dispatch`, or the widths differ.
pub fn grouped_linear(x: Tensor<2>, projection: &Projection, dispatch: &Dispatch) -> Tensor<2> {
    let [rows, width] = x.dims();
    assert_eq!(rows, dispatch.rows(), "rows (left) and those that were dispatched");
    let d_out = projection.d_out(width, dispatch);
    if rows == 0 {
        return Tensor::zeros([0, d_out], (&x.device(), x.dtype()));
    }
    projection.count(dispatch);
    if projection.is_host(&x) {
        return host::by_type!(x.dtype(), T => {
            let of_expert = |expert| projection.of_expert::<T>(expert);
            by_segment(x, d_out, dispatch, of_expert, cpu::moe::Projection::forward)
        });
    }
    #[cfg(feature = "cube")]
    if is_cube(&x) && projection.is_cube(&x) && width * d_out > 0 {
        let Projection { weight, bias } = projection.clone();
        return cube::moe::grouped_linear(x, weight, bias, &dispatch.offsets);
    }
    let y = by_tier(x, projection.weight.clone(), dispatch);
    match &projection.bias {
        Some(bias) => y + of_each_row(bias.clone(), dispatch),
        None => y,
    }
}

/// Each row through the MLP of its expert, `down(act(up(x)))` or `down(act(gate(x)) * up(x))`:
/// `[rows, d_model] -> [rows, d_model]`.
///
/// On the CPU a part of a segment goes through all of it at once, so that what is between the projections stays in the caches.
/// Where gradients are wanted, and on other devices, it is composed of [`grouped_linear`]s.
///
/// # Panics
/// If there are not as many rows or experts as in `dispatch`, or the widths differ.
pub fn grouped_mlp(
    x: Tensor<2>,
    gate: Option<&Projection>,
    up: &Projection,
    down: &Projection,
    activation: Activation,
    dispatch: &Dispatch,
) -> Tensor<2> {
    let [rows, width] = x.dims();
    let mut projections = [gate, Some(up), Some(down)].into_iter().flatten();
    if rows == 0 || !projections.all(|projection| projection.is_host(&x)) {
        let inner = match gate {
            None => activation.forward(grouped_linear(x, up, dispatch)),
            Some(gate) => {
                activation.gated(grouped_linear(x.clone(), gate, dispatch), grouped_linear(x, up, dispatch))
            }
        };
        return grouped_linear(inner, down, dispatch);
    }
    assert_eq!(rows, dispatch.rows(), "rows (left) and those that were dispatched");
    let d_ff = up.d_out(width, dispatch);
    assert!(
        gate.is_none_or(|gate| gate.d_out(width, dispatch) == d_ff),
        "a gate is as wide as what it scales"
    );
    let d_out = down.d_out(d_ff, dispatch);
    gate.into_iter().chain([up, down]).for_each(|projection| projection.count(dispatch));
    host::by_type!(x.dtype(), T => {
        let of_expert = |expert| cpu::moe::Mlp::<T> {
            gate: gate.map(|gate| gate.of_expert(expert)),
            up: up.of_expert(expert),
            down: down.of_expert(expert),
            activation,
        };
        by_segment(x, d_out, dispatch, of_expert, cpu::moe::Mlp::forward)
    })
}

/// `body` of what `of_expert` gives for an expert, of some of its rows, and of as many that come out, `[rows, d_out]`.
fn by_segment<T: Number + Element, E: Sync>(
    x: Tensor<2>,
    d_out: usize,
    dispatch: &Dispatch,
    of_expert: impl Fn(usize) -> E,
    body: impl Fn(&E, &[T], &mut [T]) + Sync,
) -> Tensor<2> {
    /// Tasks for each thread, where there are rows for so many.
    const TASKS: usize = 4;
    let [rows, width] = x.dims();
    let x = Values::<T>::held(x);
    let mut out = vec![T::default(); rows * d_out];
    // of a task; half of the fewest are not yet few for a product, so that its sums do not depend on the threads
    let most = rows.div_ceil(TASKS * rayon::current_num_threads()).clamp(2 * FEW + 32, 512);
    let segments = dispatch.segments();
    let experts: Vec<E> = segments.iter().map(|(expert, _)| of_expert(*expert)).collect();
    let (mut parts, mut left) = (Vec::new(), &mut out[..]);
    for ((_, segment), expert) in segments.into_iter().zip(&experts) {
        let (own, rest) = left.split_at_mut(segment.len() * d_out);
        let size = segment.len().div_ceil(segment.len().div_ceil(most)); // parts of similar size
        let starts = segment.step_by(size);
        parts.extend(starts.zip(own.chunks_mut(size * d_out)).map(|(start, out)| (expert, start, out)));
        left = rest;
    }
    parts.into_par_iter().for_each(|(expert, first, out)| {
        let rows = first..first + out.len() / d_out;
        body(expert, &x[rows.start * width..rows.end * width], out);
    });
    host::tensor(out, [rows, d_out])
}

/// One batched product for the segments between one power of two and the next.
fn by_tier(x: Tensor<2>, weight: Tensor<3>, dispatch: &Dispatch) -> Tensor<2> {
    let (device, dtype) = (x.device(), x.dtype());
    let ([rows, d_in], [n_experts, _, d_out]) = (x.dims(), weight.dims());
    let mut tiers: BTreeMap<usize, Vec<(usize, Range<usize>)>> = BTreeMap::new();
    for (expert, segment) in dispatch.segments() {
        tiers.entry(segment.len().next_power_of_two()).or_default().push((expert, segment));
    }
    let padding = Tensor::zeros([1, d_in], (&device, dtype));
    let x = Tensor::cat(vec![x, padding], 0); // the last row is padding
    let (mut products, mut places, mut before) = (Vec::new(), vec![0; rows], 0);
    for tier in tiers.into_values() {
        let longest = tier.iter().map(|(_, rows)| rows.len()).max().unwrap_or(0);
        let mut taken = Vec::with_capacity(tier.len() * longest);
        for (_, segment) in &tier {
            for row in segment.clone() {
                places[row] = before + taken.len();
                taken.push(row);
            }
            taken.extend(std::iter::repeat_n(rows, longest - segment.len()));
        }
        before += taken.len();
        let x = x.clone().select(0, indices(taken.into_iter(), &device));
        let weight = match tier.len() == n_experts {
            true => weight.clone(),
            false => weight.clone().select(0, indices(tier.iter().map(|(expert, _)| *expert), &device)),
        };
        let product = x.reshape([tier.len(), longest, d_in]).matmul(weight); // [experts, longest, d_out]
        products.push(product.reshape([tier.len() * longest, d_out]));
    }
    Tensor::cat(products, 0).select(0, indices(places.into_iter(), &device))
}

/// The sum of each token's rows, weighted: `[rows, width] -> [tokens, width]`. A choice that was dropped adds nothing.
///
/// - `weights`: `[tokens, top_k]`
///
/// On the CPU and on a GPU rows are added where they lie, always in the order of the choices; where gradients are wanted,
/// and on other devices, they are gathered first.
///
/// # Panics
/// If there are not as many rows or weights as in `dispatch`.
pub fn combine(rows: Tensor<2>, weights: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [count, width] = rows.dims();
    let (tokens, top_k) = (dispatch.tokens(), dispatch.top_k);
    assert_eq!(count, dispatch.rows(), "rows (left) and those that were dispatched");
    assert_eq!(weights.dims(), [tokens, top_k], "weights (left) of so many tokens and choices");
    if is_host(&rows) && is_host(&weights) && width > 0 {
        return host::by_type!(rows.dtype(), T => {
            let (rows, weights) = (Values::<T>::held(rows), Values::of(weights));
            let mut out = vec![T::default(); tokens * width];
            host::by_rows(&mut out, width, |first, out| {
                let choices = first * top_k..(first + out.len() / width) * top_k;
                let (weights, places) = (&weights[choices.clone()], &dispatch.places[choices]);
                let mut sums = vec![0.0; out.len()];
                let combine = cpu::moe::Combine { rows: &rows, weights, places, width, out: &mut sums };
                Instructions::in_use().run(combine);
                T::narrow(&sums, out);
            });
            host::tensor(out, [tokens, width])
        });
    }
    #[cfg(feature = "cube")]
    if is_cube(&rows) && is_cube(&weights) && count * width > 0 {
        return cube::moe::combine(rows, weights, &dispatch.places);
    }
    let padding = Tensor::zeros([1, width], (&rows.device(), rows.dtype()));
    let rows = Tensor::cat(vec![rows, padding], 0); // the last row stands for those dropped
    let places = dispatch.places.iter().map(|place| place.unwrap_or(count));
    let places = indices(places, &rows.device());
    let rows = rows.select(0, places).reshape([tokens, top_k, width]);
    (rows * weights.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};
    use burn::tensor::DType;

    /// Choices of experts, some dropped.
    fn choices(count: usize, n_experts: usize, seed: u64) -> Vec<Option<usize>> {
        let mut rng = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| Some(rng.usize(0..n_experts)).filter(|_| rng.u8(0..5) > 0)).collect()
    }

    /// Every token through its experts one by one, in f64.
    fn one_by_one(x: &Tensor<2>, weight: &Tensor<3>, mix: &Tensor<2>, choices: &[Option<usize>]) -> Vec<f64> {
        let ([tokens, d_in], [_, _, d_out]) = (x.dims(), weight.dims());
        let (x, weight, mix) = (floats(x.clone()), floats(weight.clone()), floats(mix.clone()));
        let mut out = vec![0.0; tokens * d_out];
        for (at, expert) in choices.iter().enumerate() {
            let (token, Some(expert)) = (at / (choices.len() / tokens), expert) else { continue };
            for column in 0..d_out {
                let product: f64 = (0..d_in)
                    .map(|row| x[token * d_in + row] * weight[(expert * d_in + row) * d_out + column])
                    .sum();
                out[token * d_out + column] += mix[at] * product;
            }
        }
        out
    }

    #[test]
    fn choices_are_sorted_by_expert_and_the_first_come_first() {
        let dispatch = Dispatch::new(&[Some(2), Some(0), None, Some(2), Some(0), Some(2)], 2, 4);
        assert_eq!([dispatch.rows(), dispatch.tokens(), dispatch.n_experts()], [5, 3, 4]);
        assert_eq!(dispatch.order, [1, 4, 0, 3, 5]);
        assert_eq!(dispatch.places, [Some(2), Some(0), None, Some(3), Some(1), Some(4)]);
        let segments: Vec<_> = (0..4).map(|expert| dispatch.segment(expert)).collect();
        assert_eq!(segments, [0..2, 2..2, 2..5, 5..5]);
    }

    fn devices() -> Vec<Device> {
        vec![
            Device::flex(),
            Device::flex().autodiff(),
            #[cfg(feature = "cube-cpu")]
            Device::cpu(),
            #[cfg(feature = "cube-cpu")]
            Device::cpu().autodiff(),
        ]
    }

    /// All bodies, on even and uneven segments, one expert, one token, and with all choices dropped.
    #[test]
    fn bodies_are_every_token_through_its_experts() {
        for (at, (tokens, top_k, n_experts, d_in, d_out)) in
            [(17, 2, 5, 7, 3), (1, 1, 1, 4, 4), (40, 1, 64, 3, 5), (33, 3, 4, 8, 16), (6, 2, 3, 1, 1)]
                .into_iter()
                .enumerate()
        {
            let choices = match at {
                4 => vec![None; 12],
                _ => choices(tokens * top_k, n_experts, at as u64),
            };
            let dispatch = Dispatch::new(&choices, top_k, n_experts);
            let device = Device::flex();
            let x = noise([tokens, d_in], 1, &device);
            let weight = noise([n_experts, d_in, d_out], 2, &device);
            let mix = noise([tokens, top_k], 3, &device);
            let expected = one_by_one(&x, &weight, &mix, &choices);
            let through = |device: &Device, dtype| {
                let rows = permute(x.clone().cast(dtype).to_device(device), &dispatch);
                let rows = grouped_matmul(rows, weight.clone().cast(dtype).to_device(device), &dispatch);
                combine(rows, mix.clone().cast(dtype).to_device(device), &dispatch)
            };
            for device in devices() {
                assert_close(through(&device, DType::F32), &expected, 1e-5);
                assert_close(through(&device, DType::BF16), &expected, 0.1);
            }
        }
    }

    #[test]
    fn half_precision_is_rounded_once_for_each_product() {
        let device = Device::flex();
        let dispatch = Dispatch::new(&choices(9, 3, 4), 1, 3);
        let [x, weight] =
            [noise([dispatch.rows(), 65], 1, &device).unsqueeze::<3>(), noise([3, 65, 4], 2, &device)]
                .map(|values| values.cast(DType::BF16));
        let x = x.squeeze_dim::<2>(0);
        let found = grouped_matmul(x.clone(), weight.clone(), &dispatch);
        assert_eq!(found.dtype(), DType::BF16);
        let whole = grouped_matmul(x.cast(DType::F32), weight.cast(DType::F32), &dispatch);
        assert_close(found, &floats(whole.cast(DType::BF16)), 0.0);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let device = Device::flex().autodiff();
        let choices = choices(10, 3, 2);
        let dispatch = Dispatch::new(&choices, 2, 3);
        assert!((6..10).contains(&dispatch.rows()), "{choices:?}");
        let x = noise([5, 3], 1, &device);
        let weight = noise([3, 3, 4], 2, &device);
        let mix = noise([5, 2], 3, &device);
        let layer = |x: Tensor<2>, weight: Tensor<3>, mix: Tensor<2>| {
            combine(grouped_matmul(permute(x, &dispatch), weight, &dispatch), mix, &dispatch)
        };
        let at = |count| random(count, &mut fastrand::Rng::with_seed(7));
        assert_gradient(|x| layer(x, weight.clone(), mix.clone()), [5, 3], &at(15));
        assert_gradient(|weight| layer(x.clone(), weight, mix.clone()), [3, 3, 4], &at(36));
        assert_gradient(|mix| layer(x.clone(), weight.clone(), mix), [5, 2], &at(10));
        let bias = |bias: Tensor<2>| of_each_row(bias, &dispatch);
        assert_gradient(bias, [3, 4], &at(12));
    }

    #[test]
    fn each_row_has_what_its_expert_has() {
        let values = tensor([3, 1], &[5.0, 6.0, 7.0], &Device::flex());
        let dispatch = Dispatch::new(&[Some(2), None, Some(0), Some(2)], 2, 3);
        assert_close(of_each_row(values, &dispatch), &[5.0, 7.0, 7.0], 0.0);
    }

    /// One after the other through all of an expert's projections, and all at once.
    #[test]
    fn an_mlp_is_its_projections() {
        let device = Device::flex();
        let dispatch = Dispatch::new(&choices(700, 3, 6), 2, 3);
        let projection = |seed, d_in, d_out| Projection {
            weight: noise([3, d_in, d_out], seed, &device),
            bias: Some(noise([3, d_out], seed + 1, &device)),
        };
        let (gate, up, down) = (projection(1, 7, 33), projection(3, 7, 33), projection(5, 33, 5));
        let rows = noise([dispatch.rows(), 7], 7, &device);
        let act = Activation::Silu;
        let plain = grouped_mlp(rows.clone(), None, &up, &down, act, &dispatch);
        let gated = grouped_mlp(rows.clone(), Some(&gate), &up, &down, act, &dispatch);
        let through = |x: Tensor<2>, projection: &Projection| {
            let bias = of_each_row(projection.bias.clone().unwrap(), &dispatch);
            by_tier(x, projection.weight.clone(), &dispatch) + bias
        };
        let (of_gate, of_up) = (through(rows.clone(), &gate), through(rows, &up));
        assert_close(plain, &floats(through(act.forward(of_up.clone()), &down)), 2e-5);
        assert_close(gated, &floats(through(act.forward(of_gate) * of_up, &down)), 2e-5);
    }

    #[test]
    fn there_may_be_no_tokens() {
        let (device, dispatch) = (Device::flex(), Dispatch::new(&[], 2, 3));
        let empty = |width| Tensor::<2>::zeros([0, width], &device);
        let rows = grouped_matmul(permute(empty(4), &dispatch), noise([3, 4, 5], 1, &device), &dispatch);
        assert_eq!(combine(rows, empty(2), &dispatch).dims(), [0, 5]);
    }

    #[test]
    #[should_panic(expected = "expert 3 of 3")]
    fn an_expert_exists() {
        let _ = Dispatch::new(&[Some(3)], 1, 3);
    }
}
