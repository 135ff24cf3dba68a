use burn::tensor::module::attention as scaled_dot_product;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, DType, Device, Int, Tensor};

use crate::count;
use crate::cpu;
use crate::cpu::attention::Bias;
#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::{Rows, Values, by_type, is_host, tensor};
#[cfg(feature = "cube")]
use crate::cube::softmax::Seen;
#[cfg(feature = "cube")]
use crate::cube::{self, is_cube, is_cube_with};

/// Fewer queries read keys and values where they lie: there is nothing to gain from laying them out.
const FEW: usize = 16;

/// Which keys a query may attend to.
///
/// With fewer queries than keys (a cache holds the past) the last query is aligned with the last key.
#[derive(Clone, Debug)]
pub enum Mask {
    /// Every key.
    Full,
    /// The keys up to the query's own position.
    Causal,
    /// So many keys up to the query's own position, itself among them.
    Window(usize),
    /// Causal, and besides every query of row `b` sees the first `prefix[b]` keys; one length per row.
    Prefix(Vec<usize>),
    /// Keys that are real tokens (`true`); `[batch, keys]`.
    Padding(Tensor<2, Bool>),
    /// Keys that each query may attend to (`true`); `[batch, heads, queries, keys]`, where any axis may be 1.
    Visible(Tensor<4, Bool>),
    /// Added to the scores before the softmax, in their dtype; `[batch, heads, queries, keys]`, where any axis
    /// may be 1.
    Bias(Tensor<4>),
    /// All of these at once: a key must be allowed by each, and biases add up.
    All(Vec<Mask>),
}

/// Scaled dot-product attention, `softmax(q kᵀ · scale + mask) v` (Vaswani et al. 2017, section 3.2.1).
///
/// - `query`: `[batch, heads, queries, d_head]`
/// - `key`, `value`: `[batch, kv_heads, keys, d_head]`; with fewer than `heads`, each serves a group of
///   `heads / kv_heads` consecutive query heads (grouped-query attention).
/// - `scale`: `1 / √d_head` when `None`.
///
/// Returns `[batch, heads, queries, d_head]`. A query that may attend to no key gets zeros.
///
/// On the CPU scores are never held as a whole, whatever the mask is. Gradients in f32 on the CPU work them out once more, block by
/// block, unless something is added to them, which may want gradients itself. On a GPU it is the flash kernel for many queries in
/// half precision that nothing but a causal mask hides, else two products with one launch between them. Otherwise Burn's.
///
/// # Panics
/// - If `key` or `value` does not fit `query`, or `heads` is not a multiple of `kv_heads`.
/// - If [`Mask::Prefix`] has not one length per row, [`Mask::Padding`] is not `[batch, keys]`, or an axis of
///   [`Mask::Visible`] or [`Mask::Bias`] is neither 1 nor that of the scores.
pub fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    mask: &Mask,
    scale: Option<f64>,
) -> Tensor<4> {
    let [batch, heads, queries, d_head] = query.dims();
    let [_, kv_heads, keys, _] = key.dims();
    assert_eq!(
        key.dims(),
        [batch, kv_heads, keys, d_head],
        "keys (left) share batch and d_head with the queries {:?}",
        query.dims()
    );
    assert_eq!(
        value.dims()[..3],
        [batch, kv_heads, keys],
        "values (left) share batch, heads and length with the keys {:?}",
        key.dims()
    );
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} query heads do not divide into {kv_heads} key-value heads"
    );
    count::add(batch * heads * queries * keys * (d_head + value.dims()[3]), 0);
    let mut resolved = Resolved::default();
    let shape = [batch, heads, queries, keys];
    resolved.add(mask, shape, &query.device());
    if is_fast(&query, &key, &value) {
        let (causal, bias) = (resolved.causal, resolved.added(shape));
        return by_bodies([query, key, value], bias, causal, scale);
    }
    #[cfg(feature = "autodiff")]
    if resolved.bias.is_none() && d_head > 0 && [&query, &key, &value].into_iter().all(is_tracked) {
        let (sizes, _) = sizes(&query, &value, resolved.causal, scale);
        let bias = resolved.added(shape);
        return gradient::attention([query, key, value], bias.clone(), sizes, |all| {
            by_bodies(all, bias, sizes.causal, scale)
        });
    }
    let Resolved { causal, hidden, bias } = resolved;
    let (hidden, bias) = (hidden.map(|hidden| hidden.expand(shape)), bias.map(|bias| bias.expand(shape)));
    #[cfg(feature = "cube")]
    if is_cube_with(&query, &[&query, &key, &value]) && bias.as_ref().is_none_or(is_cube) {
        let scale = scale.unwrap_or(1.0 / (d_head as f64).sqrt());
        return cube::attention::attention(query, key, value, Seen { causal, hidden, bias }, scale);
    }
    let options = AttentionModuleOptions { scale, is_causal: causal, ..Default::default() };
    // Burn's grouped path panics under autodiff and is unchecked on CubeCL: expand always.
    let key = repeat_heads(key, heads / kv_heads);
    let value = repeat_heads(value, heads / kv_heads);
    let bias = bias.map(|bias| bias.cast(query.dtype()));
    scaled_dot_product(query, key, value, hidden, bias, options)
}

/// On the CPU, without gradients.
///
/// - `bias`: in f32, `[batch, heads, queries, keys]`
fn by_bodies(all: [Tensor<4>; 3], bias: Option<Tensor<4>>, causal: bool, scale: Option<f64>) -> Tensor<4> {
    let [_, _, queries, _] = all[0].dims();
    let bias = bias.map(Rows::held);
    match queries < FEW {
        true => of_few(all, bias.as_ref(), causal, scale),
        false => on_cpu(all, bias.as_ref(), causal, scale),
    }
}

/// Whether the own bodies are for it.
fn is_fast(query: &Tensor<4>, key: &Tensor<4>, value: &Tensor<4>) -> bool {
    let [.., d_head] = query.dims();
    let is_one = [key, value].iter().all(|other| other.dtype() == query.dtype() && is_host(other));
    is_host(query) && is_one && d_head > 0
}

/// What the bodies are told of an attention.
fn sizes(
    query: &Tensor<4>,
    value: &Tensor<4>,
    causal: bool,
    scale: Option<f64>,
) -> (cpu::attention::Sizes, [usize; 4]) {
    let [batch, heads, queries, d_head] = query.dims();
    let [_, _, keys, d_value] = value.dims();
    let scale = scale.unwrap_or(1.0 / (d_head as f64).sqrt()) as f32;
    let sizes = cpu::attention::Sizes { queries, keys, d_head, d_value, scale, causal };
    (sizes, [batch, heads, queries, d_value])
}

/// Without a matrix of scores; nothing is copied that lies row by row.
fn on_cpu([query, key, value]: [Tensor<4>; 3], bias: Bias, causal: bool, scale: Option<f64>) -> Tensor<4> {
    let (sizes, [batch, heads, queries, d_value]) = sizes(&query, &value, causal, scale);
    let group = heads / key.dims()[1];
    by_type!(query.dtype(), T => {
        let [query, key, value] = [query, key, value].map(Rows::<T>::held);
        let out = cpu::attention::attention(&query, [&key, &value], bias, [batch, heads, group], sizes);
        tensor(out, [batch, queries, heads, d_value]).swap_dims(1, 2)
    })
}

/// For few queries; nothing of `key` and `value` is copied.
fn of_few([query, key, value]: [Tensor<4>; 3], bias: Bias, causal: bool, scale: Option<f64>) -> Tensor<4> {
    let (dtype, [_, heads, ..], [_, kv_heads, ..]) = (query.dtype(), query.dims(), key.dims());
    let (sizes, shape) = sizes(&query, &value, causal, scale);
    let mut out = vec![0.0; shape.iter().product()];
    let query = Values::of(query);
    by_type!(dtype, T => {
        let [key, value] = [key, value].map(Rows::<T>::held);
        let group = heads / kv_heads;
        cpu::attention::of_few(&query, [&key, &value], bias, [kv_heads, group], sizes, &mut out);
    });
    tensor(out, shape).cast(dtype)
}

/// Repeats every head `times` times in a row: `[batch, heads, seq, d] -> [batch, heads * times, seq, d]`.
pub(crate) fn repeat_heads(x: Tensor<4>, times: usize) -> Tensor<4> {
    if times == 1 {
        return x;
    }
    let [batch, heads, seq, d_head] = x.dims();
    let x = x.unsqueeze_dim::<5>(2).expand([batch, heads, times, seq, d_head]);
    x.reshape([batch, heads * times, seq, d_head])
}

/// That every axis is 1 or that of the scores.
fn assert_fits(what: &str, dims: [usize; 4], scores: [usize; 4]) {
    assert!(
        dims.iter().zip(scores).all(|(&axis, wanted)| axis == 1 || axis == wanted),
        "a {what} of {dims:?} does not fit scores [batch, heads, queries, keys] of {scores:?}"
    );
}

/// A mask in the three forms that the kernel takes.
#[derive(Default)]
struct Resolved {
    causal: bool,
    /// `true` hides the key; `[batch, heads, queries, keys]`, where any axis may be 1.
    hidden: Option<Tensor<4, Bool>>,
    /// As `hidden`.
    bias: Option<Tensor<4>>,
}

impl Resolved {
    fn add(&mut self, mask: &Mask, shape: [usize; 4], device: &Device) {
        let [batch, _, queries, keys] = shape;
        match mask {
            Mask::Full => {}
            Mask::Causal => self.causal = true,
            Mask::Window(window) => {
                self.causal = true;
                if *window < keys {
                    let key = Tensor::<1, Int>::arange(0..keys as i64, device).reshape([1, 1, 1, keys]);
                    let first = (keys as i64 - queries as i64 + 1)..(keys as i64 + 1);
                    let first = Tensor::<1, Int>::arange(first, device) - *window as i64; // that a query sees
                    let first = first.reshape([1, 1, queries, 1]);
                    let gone = key.expand([1, 1, queries, keys]).lower(first.expand([1, 1, queries, keys]));
                    self.hide(gone);
                }
            }
            Mask::Prefix(prefix) => {
                assert_eq!(prefix.len(), batch, "a prefix mask has one length (left) per row of the batch");
                let lengths: Vec<i64> = prefix.iter().map(|&length| length as i64).collect();
                let lengths = Tensor::<1, Int>::from_ints(lengths.as_slice(), device);
                let key = Tensor::<1, Int>::arange(0..keys as i64, device);
                let last = keys as i64 - queries as i64;
                let query = Tensor::<1, Int>::arange(last..keys as i64, device);
                let future = key
                    .clone()
                    .reshape([1, 1, 1, keys])
                    .expand([1, 1, queries, keys])
                    .greater(query.reshape([1, 1, queries, 1]).expand([1, 1, queries, keys]));
                let beyond = key
                    .reshape([1, 1, 1, keys])
                    .expand([batch, 1, 1, keys])
                    .greater_equal(lengths.reshape([batch, 1, 1, 1]).expand([batch, 1, 1, keys]));
                self.hide(
                    future
                        .expand([batch, 1, queries, keys])
                        .bool_and(beyond.expand([batch, 1, queries, keys])),
                );
            }
            Mask::Padding(real) => {
                assert_eq!(real.dims(), [batch, keys], "a padding mask (left) is [batch, keys]");
                self.hide(real.clone().bool_not().reshape([batch, 1, 1, keys]));
            }
            Mask::Visible(visible) => {
                assert_fits("mask", visible.dims(), shape);
                self.hide(visible.clone().bool_not());
            }
            Mask::Bias(bias) => {
                assert_fits("bias", bias.dims(), shape);
                self.bias = Some(match self.bias.take() {
                    Some(sum) => {
                        let both = common(sum.dims(), bias.dims());
                        sum.expand(both) + bias.clone().expand(both)
                    }
                    None => bias.clone(),
                });
            }
            Mask::All(masks) => masks.iter().for_each(|mask| self.add(mask, shape, device)),
        }
    }

    fn hide(&mut self, hidden: Tensor<4, Bool>) {
        self.hidden = Some(match self.hidden.take() {
            Some(already) => {
                let both = common(already.dims(), hidden.dims());
                already.expand(both).bool_or(hidden.expand(both))
            }
            None => hidden,
        });
    }

    /// What is added to scores of this shape, in f32 and without gradients: `-∞` where a key is hidden. Nothing where it is alike
    /// along an axis takes more room for it.
    fn added(self, shape: [usize; 4]) -> Option<Tensor<4>> {
        let Self { hidden, bias, .. } = self;
        let bias = bias.map(|bias| bias.cast(DType::F32));
        let added = match (hidden, bias) {
            (None, bias) => bias?,
            (Some(hidden), bias) => {
                let hidden = if hidden.device().is_autodiff() { hidden.inner() } else { hidden };
                let zeros = || Tensor::zeros(hidden.dims(), (&hidden.device(), DType::F32));
                let bias = bias.unwrap_or_else(zeros);
                let both = common(bias.dims(), hidden.dims());
                bias.expand(both).mask_fill(hidden.expand(both), f64::NEG_INFINITY)
            }
        };
        Some(added.expand(shape))
    }
}

/// The axes that two have, of which each may be 1 in one of them.
fn common(one: [usize; 4], other: [usize; 4]) -> [usize; 4] {
    std::array::from_fn(|axis| if one[axis] == 1 { other[axis] } else { one[axis] })
}

#[cfg(test)]
mod tests;
