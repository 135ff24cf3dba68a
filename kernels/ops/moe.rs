//! Tokens sorted by expert, products with each expert's own matrix, and the way back.
//!
//! A token has `top_k` choices of an expert. [`Dispatch`] sorts the choices by expert, stably, so that each expert's rows
//! lie side by side; [`permute`] brings the tokens into that order, [`grouped_matmul`] multiplies each segment with the
//! matrix of its expert, [`combine`] sums a token's rows up again. Nothing is as large as tokens times experts.

use std::collections::BTreeMap;
use std::ops::Range;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use rayon::prelude::*;

use crate::cpu;

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
    let [tokens, _] = x.dims();
    assert_eq!(tokens, dispatch.tokens(), "tokens (left) and those that were dispatched");
    let tokens = indices(dispatch.order.iter().map(|choice| choice / dispatch.top_k), &x.device());
    x.select(0, tokens)
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
/// On the CPU each segment is one product with a part of `weight`, several segments at a time; half precision is
/// multiplied in f32 and rounded at the end. Where gradients are wanted, and on other devices, segments of similar length
/// are padded to one batched product: at most half of its rows are padding.
///
/// # Panics
/// If there are not as many rows or experts as in `dispatch`, or the widths differ.
pub fn grouped_matmul(x: Tensor<2>, weight: Tensor<3>, dispatch: &Dispatch) -> Tensor<2> {
    let ([rows, width], [n_experts, d_in, d_out]) = (x.dims(), weight.dims());
    assert_eq!(
        [rows, n_experts, width],
        [dispatch.rows(), dispatch.n_experts(), d_in],
        "rows, experts and width (left) and those expected"
    );
    let device = x.device();
    if rows == 0 {
        return Tensor::zeros([0, d_out], (&device, x.dtype()));
    }
    match device == Device::flex() && !device.is_autodiff() {
        true => by_segment(x, weight, dispatch),
        false => by_tier(x, weight, dispatch),
    }
}

/// One product per segment.
fn by_segment(x: Tensor<2>, weight: Tensor<3>, dispatch: &Dispatch) -> Tensor<2> {
    let dtype = x.dtype();
    let product = |(expert, rows): (usize, Range<usize>)| {
        let weight = weight.clone().narrow(0, expert, 1).squeeze_dim::<2>(0); // [d_in, d_out]
        let x = x.clone().narrow(0, rows.start, rows.len());
        x.cast(DType::F32).matmul(weight.cast(DType::F32)).cast(dtype)
    };
    Tensor::cat(dispatch.segments().into_par_iter().map(product).collect(), 0)
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
/// On the CPU rows are added where they lie; where gradients are wanted, and on other devices, they are gathered first.
///
/// # Panics
/// If there are not as many rows or weights as in `dispatch`.
pub fn combine(rows: Tensor<2>, weights: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [count, width] = rows.dims();
    let (tokens, top_k) = (dispatch.tokens(), dispatch.top_k);
    assert_eq!(count, dispatch.rows(), "rows (left) and those that were dispatched");
    assert_eq!(weights.dims(), [tokens, top_k], "weights (left) of so many tokens and choices");
    let device = rows.device();
    match device == Device::flex() && !device.is_autodiff() {
        true => in_place(rows, weights, dispatch),
        false => {
            let padding = Tensor::zeros([1, width], (&device, rows.dtype()));
            let rows = Tensor::cat(vec![rows, padding], 0); // the last row stands for those dropped
            let places = dispatch.places.iter().map(|place| place.unwrap_or(count));
            let rows = rows.select(0, indices(places, &device)).reshape([tokens, top_k, width]);
            (rows * weights.unsqueeze_dim(2)).sum_dim(1).squeeze_dim(1)
        }
    }
}

/// On the CPU, in f32.
fn in_place(rows: Tensor<2>, weights: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let ([_, width], device, dtype) = (rows.dims(), rows.device(), rows.dtype());
    let [rows, weights] = [rows, weights].map(|values| values.cast(DType::F32).into_data());
    let cast = "values that were cast to f32";
    let mut out = vec![0.0; dispatch.tokens() * width];
    let (rows, weights) = (rows.as_slice().expect(cast), weights.as_slice().expect(cast));
    cpu::moe::combine(rows, weights, &dispatch.places, width, &mut out);
    let out = TensorData::new(out, [dispatch.tokens(), width]);
    Tensor::<2>::from_data(out, (&device, DType::F32)).cast(dtype)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};

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

    /// Both bodies, on even and uneven segments, one expert, one token, and with all choices dropped.
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
            assert_close(through(&device, DType::F32), &expected, 1e-5);
            assert_close(through(&device.clone().autodiff(), DType::F32), &expected, 1e-5);
            assert_close(through(&device, DType::BF16), &expected, 0.1);
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

    #[test]
    #[should_panic(expected = "expert 3 of 3")]
    fn an_expert_exists() {
        let _ = Dispatch::new(&[Some(3)], 1, 3);
    }
}
