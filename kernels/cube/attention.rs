//! Attention: by the flash kernel of `cubek-attention` where it can be had, else as two products with all that is between
//! them in one launch.
//!
//! Burn's `module::attention` never takes the flash kernel without its feature `autotune`, nor where a scale or a bias is given,
//! and composes scale, masks and softmax of a launch each. Here the kernel is asked for by name: a scale goes into the queries,
//! and queries are filled up at the front, where causal masks stay as they are. It takes half precision on tensor cores, enough
//! queries, and no mask but a causal one; its products are in f16 even of bf16.

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{DType, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::kernel::attention::flash_attention;
use cubecl::ir::{ElemType, FloatKind};
use cubek_attention::forward::launch::{BlueprintStrategy, Strategy};
use cubek_attention::forward::routines::blackbox_accelerated::BlackboxAcceleratedStrategy;

use super::held;
use super::softmax::{self, Seen};
use crate::ops::repeat_heads;

/// `softmax(q kᵀ · scale + mask) v`: `[batch, heads, queries, d_head] -> [batch, heads, queries, d_value]`.
///
/// - `key`, `value`: `[batch, kv_heads, keys, _]`, where `kv_heads` divides `heads`; the cache is not copied for them
pub fn attention(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, seen: Seen, scale: f64) -> Tensor<4> {
    let ([batch, heads, queries, _], [_, _, keys, d_value]) = (query.dims(), value.dims());
    let shape = [batch, heads, queries, d_value];
    if keys * shape.iter().product::<usize>() == 0 {
        return Tensor::zeros(shape, (&query.device(), query.dtype()));
    }
    if let Some((strategy, rows)) = flash_strategy(&query, &value, &seen) {
        let keys_values = [key.clone(), value.clone()];
        if let Some(out) = flash(query.clone(), keys_values, seen.causal, scale, strategy, rows) {
            return out;
        }
    }
    composed(query, key, value, seen, scale)
}

/// As two products.
fn composed(query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, seen: Seen, scale: f64) -> Tensor<4> {
    let [batch, heads, queries, d_head] = query.dims();
    let [_, kv_heads, keys, d_value] = value.dims();
    let rows = heads / kv_heads * queries; // of the queries that share keys
    // of unscaled products f16 may not hold the largest
    let (query, scale) = if query.dtype() == DType::F16 { (query * scale, 1.0) } else { (query, scale) };
    let products = query.reshape([batch, kv_heads, rows, d_head]).matmul(key.swap_dims(2, 3));
    let shares = softmax::scores(products.reshape([batch, heads, queries, keys]), scale, seen);
    let out = shares.reshape([batch, kv_heads, rows, keys]).matmul(value);
    out.reshape([batch, heads, queries, d_value])
}

/// Rows and columns of a fragment, and what a head's width is a multiple of.
const FRAGMENT: usize = 16;

/// How the flash kernel works, and of how many queries it takes a multiple, where it can be had and every query sees a key.
fn flash_strategy(query: &Tensor<4>, value: &Tensor<4>, seen: &Seen) -> Option<(Strategy, usize)> {
    let ([_, _, queries, d_head], [_, _, keys, d_value]) = (query.dims(), value.dims());
    let is_half = matches!(query.dtype(), DType::F16 | DType::BF16);
    let is_open = seen.hidden.is_none() && seen.bias.is_none() && (!seen.causal || queries <= keys);
    let fits = queries >= 2 * FRAGMENT && [d_head, d_value].iter().all(|width| width % FRAGMENT == 0);
    if !(is_half && is_open && fits) {
        return None;
    }
    let [value, sum] = [FloatKind::F16, FloatKind::F32].map(ElemType::Float);
    let client = held(query.clone()).client;
    let has_them = client.properties().features.matmul.cmma.iter().any(|config| {
        (config.a_type, config.b_type, config.cd_type) == (value, value, sum) && config.m as usize == FRAGMENT
    });
    let num_planes = if queries < 8 * FRAGMENT { 2 } else { 4 };
    let strategy = BlackboxAcceleratedStrategy { num_planes, seq_q: 1, seq_kv: 1 };
    let rows = usize::from(num_planes) * FRAGMENT;
    has_them.then_some((Strategy::BlackboxAccelerated(BlueprintStrategy::Inferred(strategy)), rows))
}

/// By the flash kernel, which divides products by `√d_head` and has a key and a value for every query head. None where it
/// does not take these sizes.
///
/// - `rows`: of how many queries it takes a multiple
fn flash(
    query: Tensor<4>,
    keys_values: [Tensor<4>; 2],
    causal: bool,
    scale: f64,
    strategy: Strategy,
    rows: usize,
) -> Option<Tensor<4>> {
    let [batch, heads, queries, d_head] = query.dims();
    let factor = scale * (d_head as f64).sqrt();
    let query = if (factor - 1.0).abs() < 1e-6 { query } else { query * factor };
    let missing = queries.next_multiple_of(rows) - queries;
    let query = match missing {
        0 => query,
        _ => {
            let none = Tensor::zeros([batch, heads, missing, d_head], (&query.device(), query.dtype()));
            Tensor::cat(vec![none, query], 2)
        }
    };
    let [key, value] = keys_values.map(|x| {
        let [_, kv_heads, ..] = x.dims();
        held(repeat_heads(x, heads / kv_heads))
    });
    let options = AttentionModuleOptions { is_causal: causal, ..Default::default() };
    let out = flash_attention(held(query), key, value, None, None, options, strategy).ok()?;
    Some(Tensor::<4>::from_primitive::<Cube>(out).narrow(2, missing, queries))
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod tests {
    use super::*;
    use crate::ops::{self, Mask};
    use crate::testing::{assert_rounded, cube_device, cube_types, floats, noise, on_cube};
    use burn::tensor::{Bool, Device};

    fn masks(device: &Device, [batch, heads, queries, keys]: [usize; 4]) -> Vec<Mask> {
        let drawn = |shape, seed| noise::<4>(shape, seed, device);
        let real: Tensor<2, Bool> = drawn([1, 1, batch, keys], 4).greater_elem(-0.3).reshape([batch, keys]);
        let visible = drawn([batch, 1, queries, keys], 5).greater_elem(0.4); // some see nothing
        vec![
            Mask::Full,
            Mask::Causal,
            Mask::Window(2),
            Mask::Prefix(vec![3; batch]),
            Mask::Padding(real.clone()),
            Mask::Visible(visible),
            Mask::Bias(drawn([1, heads, queries, keys], 6)),
            Mask::All(vec![Mask::Causal, Mask::Padding(real), Mask::Bias(drawn([1, heads, 1, keys], 7))]),
        ]
    }

    /// Beside that of the CPU: every mask, one query and several, shared keys, odd lengths, parts of caches.
    #[test]
    fn attention_is_that_of_the_cpu() {
        let sizes = [(1, 2, 2, 1, 1, 3), (2, 4, 2, 3, 5, 7), (2, 2, 1, 8, 8, 8)];
        for (batch, heads, kv_heads, queries, keys, d_head) in sizes {
            for dtype in cube_types() {
                let flex = Device::flex();
                let query = noise([batch, heads, queries, d_head], 1, &flex).cast(dtype) * 2.0;
                let [key, value] =
                    [2, 3].map(|seed| noise([batch, kv_heads, keys, d_head], seed, &flex).cast(dtype));
                let shape = [batch, heads, queries, keys];
                for (at, (here, there)) in
                    masks(&flex, shape).into_iter().zip(masks(&cube_device(), shape)).enumerate()
                {
                    let [q, k, v] = [&query, &key, &value].map(|x| x.clone().cast(DType::F32));
                    let scale = [None, Some(0.7)][at % 2];
                    let expected = floats(ops::attention(q, k, v, &here, scale));
                    let [query, key, value] = [&query, &key, &value]
                        .map(|x| on_cube(x).into_iter().nth(at % 3).expect("one of three"));
                    let found = ops::attention(query, key, value, &there, scale);
                    let tolerance = if dtype == DType::F32 { 1e-5 } else { 4e-3 };
                    assert_rounded(found, &expected, tolerance);
                }
            }
        }
        let none = Tensor::zeros([1, 2, 0, 4], &cube_device());
        let query = Tensor::ones([1, 2, 3, 4], &cube_device());
        assert_eq!(floats(ops::attention(query, none.clone(), none, &Mask::Full, None)), [0.0; 24]);
    }

    /// By its body without tensor cores: what is put before the queries, and into them, changes nothing.
    #[test]
    fn flash_is_that_of_the_cpu() {
        for (queries, keys, causal) in [(5, 9, true), (32, 32, true), (33, 20, false)] {
            let flex = Device::flex();
            let query = noise([2, 4, queries, 16], 1, &flex);
            let [key, value] = [2, 3].map(|seed| noise([2, 2, keys, 16], seed, &flex));
            let mask = if causal { Mask::Causal } else { Mask::Full };
            let expected = ops::attention(query.clone(), key.clone(), value.clone(), &mask, Some(0.7));
            let [query, key, value] = [query, key, value].map(|x| x.to_device(&cube_device()));
            let strategy = Strategy::Unit(BlueprintStrategy::Inferred(()));
            let found = flash(query, [key, value], causal, 0.7, strategy, 32);
            let found = found.expect("such sizes are taken");
            assert_rounded(found, &floats(expected), 1e-5);
        }
    }
}
