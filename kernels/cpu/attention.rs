//! Attention without the matrix of all scores (Dao et al. 2022, <https://arxiv.org/abs/2205.14135>): queries see the keys
//! block by block, and what they have gathered is scaled whenever a greater score turns up.

use burn::tensor::Element;
use bytemuck::Pod;
use rayon::prelude::*;

use super::few::Held;
use super::host::{Rows, Strided, by_task};
use super::instructions::{self, Instructions};
use super::pointwise::{exp, exponentials, fma, greatest};
use super::tiles::{Body, LANES, Number, PANEL, ROWS};

/// Queries of a block.
const QUERIES: usize = 16 * ROWS;
/// Keys of a block.
const KEYS: usize = 4 * PANEL;
/// Tasks for each thread, where there are queries for so many.
const TASKS: usize = 2;

/// Sizes of an attention.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// How many queries there are.
    pub queries: usize,
    /// How many keys and values there are.
    pub keys: usize,
    /// Width of a key.
    pub d_head: usize,
    /// Width of a value.
    pub d_value: usize,
    /// What scores are taken times.
    pub scale: f32,
    /// Whether a query sees only the keys up to its own place; the last ones are at the same place.
    pub causal: bool,
}

impl Sizes {
    /// How many keys a query sees.
    fn seen(self, query: usize) -> usize {
        let Self { queries, keys, causal, .. } = self;
        if causal { (query + 1 + keys).saturating_sub(queries).min(keys) } else { keys }
    }
}

/// `out`, `[heads, queries, d_value]`, becomes `softmax(q kᵀ · scale) v` of each head of `query`, `[heads, queries, d_head]`,
/// `key`, `[heads, keys, d_head]`, and `value`, `[heads, keys, d_value]`. A query that sees no key gets zeros.
///
/// # Panics
/// If sizes do not fit.
pub fn attention<T: Number>(query: &[T], key: &[T], value: &[T], sizes: Sizes, out: &mut [T]) {
    let Sizes { queries, keys, d_head, d_value, .. } = sizes;
    if out.is_empty() {
        return;
    }
    let heads = out.len() / (queries * d_value);
    assert_eq!(
        [query.len(), key.len(), value.len()],
        [heads * queries * d_head, heads * keys * d_head, heads * keys * d_value],
        "queries, keys and values of {heads} heads"
    );
    let parts = (TASKS * rayon::current_num_threads()).div_ceil(heads);
    let rows = queries.div_ceil(parts).next_multiple_of(QUERIES);
    let tasks: Vec<_> = out
        .chunks_mut(queries * d_value)
        .enumerate()
        .flat_map(|(head, out)| {
            let parts = out.chunks_mut(rows * d_value).enumerate();
            parts.map(move |(part, out)| (head, part * rows, out))
        })
        .collect();
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, (head, first, out)| {
        let own = |length: usize| head * length..(head + 1) * length;
        scratch.lay_out(&key[own(keys * d_head)], &value[own(keys * d_value)], sizes);
        let query = &query[own(queries * d_head)];
        for (at, out) in out.chunks_mut(QUERIES * d_value).enumerate() {
            let first = first + at * QUERIES;
            scratch.block(&query[first * d_head..], first, sizes, out);
        }
    });
}

/// The same for few queries, whose keys and values are read where they lie, one after the other. Each head of keys serves
/// `group` heads of queries that follow each other; `query` is `[batch, heads, queries, d_head]`.
///
/// # Panics
/// If sizes do not fit.
pub fn of_few<T: Held + Element + Pod>(
    query: &[f32],
    [key, value]: [&Rows<T>; 2],
    kv_heads: usize,
    group: usize,
    sizes: Sizes,
    out: &mut [f32],
) {
    /// Products that are worth a thread.
    const WORTH: usize = 128 * 1024;
    if out.is_empty() {
        return;
    }
    let Sizes { queries, keys, d_head, d_value, .. } = sizes;
    let rows = group * queries; // of queries that share keys
    let work = out.len() / d_value * keys * (d_head + d_value);
    let all = out.len();
    by_task(out, if work < WORTH { all } else { rows * d_value }, |at, out| {
        let first = at / d_value / rows;
        for (number, out) in (first..).zip(out.chunks_mut(rows * d_value)) {
            let place = [number / kv_heads, number % kv_heads];
            let query = &query[number * rows * d_head..][..rows * d_head];
            let few = Few { query, key: key.at(place), value: value.at(place), sizes, out };
            Instructions::in_use().run(few);
        }
    });
}

/// Queries that share keys.
struct Few<'a, T> {
    /// `[rows, d_head]`, where rows are those of several heads
    query: &'a [f32],
    key: Strided<'a, T>,
    value: Strided<'a, T>,
    sizes: Sizes,
    /// `[rows, d_value]`
    out: &'a mut [f32],
}

impl<T: Held> instructions::Body for Few<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { query, key, value, sizes, out } = self;
        let Sizes { queries, keys, d_head, d_value, scale, .. } = sizes;
        let rows = out.len() / d_value;
        let mut weights = vec![0.0_f32; rows * keys];
        for at in 0..keys {
            let key = key.row(at);
            for (query, weights) in query.chunks(d_head).zip(weights.chunks_mut(keys)) {
                weights[at] = dot::<T, FMA>(query, key) * scale;
            }
        }
        for (row, weights) in weights.chunks_mut(keys.max(1)).enumerate() {
            let weights = &mut weights[..sizes.seen(row % queries)];
            // of scores that are all -∞ nothing is gathered
            let most = greatest(weights).max(f32::MIN);
            let total = exponentials::<FMA>(weights, most);
            if total != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= total);
            }
        }
        out.fill(0.0);
        for at in 0..keys {
            let value = value.row(at);
            for (row, (out, weights)) in out.chunks_mut(d_value).zip(weights.chunks(keys)).enumerate() {
                if at < sizes.seen(row % queries) {
                    for (sum, value) in out.iter_mut().zip(value) {
                        *sum = fma::<FMA>(weights[at], value.widen(), *sum);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn dot<T: Held, const FMA: bool>(query: &[f32], key: &[T]) -> f32 {
    let (queries, query_rest) = query.as_chunks::<LANES>();
    let (keys, key_rest) = key.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (query, key) in queries.iter().zip(keys) {
        for lane in 0..LANES {
            sums[lane] = fma::<FMA>(query[lane], key[lane].widen(), sums[lane]);
        }
    }
    let rest: f32 = query_rest.iter().zip(key_rest).map(|(query, key)| query * key.widen()).sum();
    sums.iter().sum::<f32>() + rest
}

/// Room for what a task lays out.
#[derive(Default)]
struct Scratch {
    /// `[panels, d_head, PANEL]`, keys across
    keys: Vec<f32>,
    /// `[keys, d_value]` in panels of values, each `[keys, width]`; keys in whole panels
    values: Vec<f32>,
    /// `[QUERIES, d_head]`, scaled
    queries: Vec<f32>,
    /// `[QUERIES, keys of a block]`
    scores: Vec<f32>,
    /// `[QUERIES, whole lanes of d_value]`
    sums: Vec<f32>,
    wide: Vec<f32>,
}

/// Panels of `d_value` columns: where each begins, and its width.
fn panels(d_value: usize) -> impl Iterator<Item = (usize, usize)> {
    let padded = d_value.next_multiple_of(LANES);
    (0..padded).step_by(PANEL).map(move |start| (start, PANEL.min(padded - start)))
}

impl Scratch {
    /// Keys and values of a head.
    fn lay_out<T: Number>(&mut self, key: &[T], value: &[T], Sizes { keys, d_head, d_value, .. }: Sizes) {
        let padded = keys.next_multiple_of(PANEL);
        let Self { keys: laid_out, values, wide, .. } = self;
        widen(key, wide);
        laid_out.clear();
        laid_out.resize(padded * d_head, 0.0);
        for (at, key) in wide.chunks(d_head.max(1)).enumerate() {
            let panel = &mut laid_out[at / PANEL * PANEL * d_head..];
            for (place, value) in key.iter().enumerate() {
                panel[place * PANEL + at % PANEL] = *value;
            }
        }
        widen(value, wide);
        values.clear();
        values.resize(padded * d_value.next_multiple_of(LANES), 0.0);
        for (start, width) in panels(d_value) {
            let own = width.min(d_value - start);
            let panel = &mut values[padded * start..];
            for (value, panel) in wide.chunks(d_value).zip(panel.chunks_mut(width)) {
                panel[..own].copy_from_slice(&value[start..start + own]);
            }
        }
    }

    /// A block of queries, of which the first is at `first`.
    fn block<T: Number>(&mut self, query: &[T], first: usize, sizes: Sizes, out: &mut [T]) {
        let Sizes { keys, d_head, d_value, scale, .. } = sizes;
        let Self { keys: laid_out, values, queries: rows, scores, sums, .. } = self;
        let (body, count) = (Body::of_floats(), out.len() / d_value);
        let (padded, width) = (keys.next_multiple_of(PANEL), d_value.next_multiple_of(LANES));
        widen(&query[..count * d_head], rows);
        rows.iter_mut().for_each(|value| *value *= scale);
        sums.clear();
        sums.resize(count * width, 0.0);
        let (mut greatest, mut totals) = ([f32::NEG_INFINITY; QUERIES], [0.0_f32; QUERIES]);
        let seen = |row: usize| sizes.seen(first + row);
        for start in (0..seen(count - 1)).step_by(KEYS) {
            let length = KEYS.min(padded - start);
            scores.clear();
            scores.resize(count * length, 0.0);
            for (rows, scores) in rows.chunks(ROWS * d_head).zip(scores.chunks_mut(ROWS * length)) {
                for (at, panel) in
                    laid_out[start * d_head..][..length * d_head].chunks(PANEL * d_head).enumerate()
                {
                    body.add(rows, panel, PANEL, &mut scores[at * PANEL..], length);
                }
            }
            for (row, scores) in scores.chunks_mut(length).enumerate() {
                let visible = seen(row).saturating_sub(start).min(length);
                let (scores, hidden) = scores.split_at_mut(visible);
                hidden.fill(0.0);
                if scores.is_empty() {
                    continue;
                }
                let (greatest, total) = (&mut greatest[row], &mut totals[row]);
                let factor = Instructions::in_use().run(Gather { scores, greatest, total });
                if factor != 1.0 {
                    sums[row * width..][..width].iter_mut().for_each(|sum| *sum *= factor);
                }
            }
            for (start_value, width_value) in panels(d_value) {
                let panel = &values[padded * start_value + start * width_value..][..length * width_value];
                let sums = sums.chunks_mut(ROWS * width);
                for (scores, sums) in scores.chunks(ROWS * length).zip(sums) {
                    body.add(scores, panel, width_value, &mut sums[start_value..], width);
                }
            }
        }
        for (at, (sums, out)) in sums.chunks_mut(width).zip(out.chunks_mut(d_value)).enumerate() {
            if totals[at] != 0.0 {
                sums.iter_mut().for_each(|sum| *sum /= totals[at]);
            }
            T::narrow(&sums[..d_value], out);
        }
    }
}

fn widen<T: Number>(from: &[T], to: &mut Vec<f32>) {
    to.resize(from.len(), 0.0);
    T::lay_out(Body::of_floats(), from, from.len(), to);
}

/// Scores of a query become `exp(score - greatest)`, where the greatest so far and the total follow. Gives what was gathered
/// with the old one is to be taken times.
struct Gather<'a> {
    scores: &'a mut [f32],
    greatest: &'a mut f32,
    total: &'a mut f32,
}

impl instructions::Body for Gather<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        let most = greatest(self.scores).max(*self.greatest);
        let factor = if *self.greatest == most { 1.0 } else { exp::<FMA>(*self.greatest - most) };
        *self.greatest = most;
        // of scores that are all -∞ nothing is gathered
        let most = if most == f32::NEG_INFINITY { 0.0 } else { most };
        *self.total = *self.total * factor + exponentials::<FMA>(self.scores, most);
        factor
    }
}
