//! Attention without the matrix of all scores (Dao et al. 2022, <https://arxiv.org/abs/2205.14135>): queries see the keys
//! block by block, and what they have gathered is scaled whenever a greater score turns up.

use std::ops::Range;

use burn::tensor::Element;
use bytemuck::Pod;
use rayon::prelude::*;

use super::few::{Held, dot};
use super::host::{Rows, Strided, by_task};
use super::instructions::{self, Instructions};
use super::matmul::{self, Columns, Right, Room};
use super::pointwise::{exp, exponentials, fma, greatest};
use super::tiles::{ByTile, DEPTH, Number, Tile, multiply};

/// Queries of a block.
const QUERIES: usize = 98;
/// Keys of a block: weights of them are as wide as rows of a product.
const KEYS: usize = DEPTH;
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
    pub fn seen(self, query: usize) -> usize {
        let Self { queries, keys, causal, .. } = self;
        if causal { (query + 1 + keys).saturating_sub(queries).min(keys) } else { keys }
    }
}

/// What is added to the scores of all heads, `[batch, heads, queries, keys]`; `-∞` hides a key.
pub type Bias<'a> = Option<&'a Rows<f32>>;

/// A score, and what is added to it: a key that is hidden is hidden, whatever its score is.
#[inline(always)]
fn biased<const FMA: bool>(score: f32, scale: f32, bias: f32) -> f32 {
    if bias == f32::NEG_INFINITY { bias } else { fma::<FMA>(score, scale, bias) }
}

/// `softmax(q kᵀ · scale + bias) v` of each head: `[batch, queries, heads, d_value]`, as the next projection reads it. Queries, keys
/// and values are read where they lie; each head of keys serves `group` heads of queries that follow each other. A query that
/// sees no key gets zeros.
///
/// - `query`: `[batch, heads, queries, d_head]`
/// - `key`, `value`: `[batch, heads / group, keys, ..]`
pub fn attention<T: Number + Element>(
    query: &Rows<T>,
    [key, value]: [&Rows<T>; 2],
    bias: Bias,
    [batch, heads, group]: [usize; 3],
    sizes: Sizes,
) -> Vec<T> {
    let Sizes { queries, keys, d_value, .. } = sizes;
    let mut out = vec![T::default(); batch * queries * heads * d_value];
    if out.is_empty() {
        return out;
    }
    let parts = (TASKS * rayon::current_num_threads()).div_ceil(batch * heads);
    let rows = queries.div_ceil(parts).next_multiple_of(QUERIES); // of a task
    let parts = queries.div_ceil(rows);
    let mut tasks: Vec<Vec<&mut [T]>> = Vec::new();
    tasks.resize_with(batch * heads * parts, || Vec::with_capacity(rows.min(queries)));
    for (at, row) in out.chunks_mut(d_value).enumerate() {
        let (batch, query, head) = (at / heads / queries, at / heads % queries, at % heads);
        tasks[(batch * heads + head) * parts + query / rows].push(row);
    }
    let tiles = T::tiles(Instructions::in_use());
    tasks.into_par_iter().enumerate().for_each_init(Scratch::default, |scratch, (at, out)| {
        let (batch, head, first) = (at / parts / heads, at / parts % heads, at % parts * rows);
        let key = Columns::of(key.at([batch, head / group]), keys);
        let value = matmul::Rows::of(value.at([batch, head / group]));
        let query = query.at([batch, head]);
        let bias = bias.map(|bias| bias.at([batch, head]));
        tiles.run(Part { query, key, value, bias, first, sizes, scratch, out });
    });
    out
}

/// The same for few queries, whose keys and values are read where they lie, one after the other. Each head of keys serves
/// `group` heads of queries that follow each other; `query` is `[batch, heads, queries, d_head]`.
///
/// # Panics
/// If sizes do not fit.
pub fn of_few<T: Held + Element + Pod>(
    query: &[f32],
    [key, value]: [&Rows<T>; 2],
    bias: Bias,
    [kv_heads, group]: [usize; 2],
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
            let bias = bias.map(|bias| (bias, [place[0], place[1] * group]));
            let few = Few { query, key: key.at(place), value: value.at(place), bias, sizes, out };
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
    /// With the place of the first head's.
    bias: Option<(&'a Rows<f32>, [usize; 2])>,
    sizes: Sizes,
    /// `[rows, d_value]`
    out: &'a mut [f32],
}

impl<T: Held> instructions::Body for Few<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { query, key, value, bias, sizes, out } = self;
        let Sizes { queries, keys, d_head, d_value, scale, .. } = sizes;
        let rows = out.len() / d_value;
        let mut weights = vec![0.0_f32; rows * keys];
        for at in 0..keys {
            let key = key.row(at);
            for (query, weights) in query.chunks(d_head).zip(weights.chunks_mut(keys)) {
                weights[at] = dot::<T, FMA>(query, key);
            }
        }
        for (row, weights) in weights.chunks_mut(keys.max(1)).enumerate() {
            let bias =
                bias.map(|(bias, [batch, head])| bias.at([batch, head + row / queries]).row(row % queries));
            let weights = &mut weights[..sizes.seen(row % queries)];
            scale_scores::<FMA>(weights, scale, bias);
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

/// Queries of a head.
struct Part<'a, T> {
    /// All of the head
    query: Strided<'a, T>,
    key: Columns<'a, T>,
    value: matmul::Rows<'a, T>,
    /// All of the head
    bias: Option<Strided<'a, f32>>,
    /// The place of the first query of the part.
    first: usize,
    sizes: Sizes,
    scratch: &'a mut Scratch,
    /// `[queries of the part, d_value]`
    out: Vec<&'a mut [T]>,
}

/// Room for what a part lays out.
#[derive(Default)]
struct Scratch {
    /// Keys in panels, `[blocks of d_head, panels of keys, words, C]`
    keys: Room,
    /// Values in panels, `[blocks of keys, panels of d_value, words, C]`
    values: Room,
    /// `[blocks of d_head, QUERIES, DEPTH]`
    queries: Room,
    /// `[QUERIES, KEYS]`
    scores: Room,
    /// `[QUERIES, whole panels of d_value]`
    sums: Room,
}

impl<T: Number> ByTile for Part<'_, T> {
    fn run<K: Tile<C>, const C: usize>(self) {
        let Self { query, key, value, bias, first, sizes, scratch, mut out } = self;
        let Sizes { d_head, d_value, .. } = sizes;
        let seen = sizes.seen(first + out.len() - 1);
        let [keys, values] = [(d_head, DEPTH * K::PER_WORD, seen), (seen, KEYS, d_value)]
            .map(|(inner, block, columns)| Panels::new::<K, C>(inner, block, columns));
        keys.lay_out::<T, K, C>(&key, scratch.keys.of(keys.words()));
        values.lay_out::<T, K, C>(&value, scratch.values.of(values.words()));
        for (at, out) in out.chunks_mut(QUERIES).enumerate() {
            scratch.block::<T, K, C>(query, bias, first + at * QUERIES, [keys, values], sizes, out);
        }
    }
}

/// A matrix in panels, `[blocks of the inner axis, panels, words, C]`.
#[derive(Clone, Copy)]
struct Panels {
    inner: usize,
    /// Places of a block.
    block: usize,
    /// Words of a panel.
    deep: usize,
    /// Words of a block.
    size: usize,
}

impl Panels {
    fn new<K: Tile<C>, const C: usize>(inner: usize, block: usize, columns: usize) -> Self {
        let deep = K::whole_words(inner.min(block));
        Self { inner, block, deep, size: deep * columns.next_multiple_of(C) }
    }

    fn words(self) -> usize {
        self.inner.div_ceil(self.block) * self.size
    }

    /// Places of the inner axis, block by block.
    fn blocks(self) -> impl Iterator<Item = Range<usize>> {
        let Self { inner, block, .. } = self;
        (0..inner).step_by(block).map(move |start| start..inner.min(start + block))
    }

    fn lay_out<T: Number, K: Tile<C>, const C: usize>(self, matrix: &impl Right<T>, room: &mut [f32]) {
        for (part, room) in self.blocks().zip(room.chunks_mut(self.size.max(1))) {
            matrix.lay_out_all::<K, C>(part, 0, room.as_chunks_mut().0, self.deep);
        }
    }

    /// Some panels of a block of so many places, with where their columns begin.
    fn of_block<'a, K: Tile<C>, const C: usize>(
        self,
        room: &'a [f32],
        part: &Range<usize>,
        columns: Range<usize>,
    ) -> impl Iterator<Item = (usize, &'a [[f32; C]])> {
        let words = K::whole_words(part.len());
        let block = &room[part.start / self.block * self.size..][..self.size];
        let columns = columns.start * self.deep..(columns.end.next_multiple_of(C) * self.deep).min(self.size);
        let panels = block[columns].chunks(self.deep * C);
        (0..).step_by(C).zip(panels.map(move |panel| &panel.as_chunks().0[..words]))
    }
}

impl Scratch {
    /// A block of queries, of which the first is at `first`.
    fn block<T: Number, K: Tile<C>, const C: usize>(
        &mut self,
        query: Strided<T>,
        bias: Option<Strided<f32>>,
        first: usize,
        [keys, values]: [Panels; 2],
        sizes: Sizes,
        out: &mut [&mut [T]],
    ) {
        let Sizes { d_value, scale, .. } = sizes;
        let (count, width) = (out.len(), d_value.next_multiple_of(C));
        let queries = self.queries.of(keys.blocks().count() * count * DEPTH).as_chunks_mut().0;
        for (part, queries) in keys.blocks().zip(queries.chunks_mut(count)) {
            for (at, words) in (first..).zip(queries) {
                let words = &mut words[..K::whole_words(part.len())];
                let (words, beyond) = words.split_at_mut(part.len().div_ceil(K::PER_WORD));
                T::words::<K, C>(&query.row(at)[part.clone()], words);
                beyond.fill(0.0);
            }
        }
        let (laid_out, scores) = (self.keys.of(keys.words()), self.scores.of(count * KEYS).as_chunks_mut().0);
        let (values_of, sums) = (self.values.of(values.words()), self.sums.of(count * width));
        sums.fill(0.0);
        let (mut greatest, mut totals) = ([f32::NEG_INFINITY; QUERIES], [0.0_f32; QUERIES]);
        let seen = |row: usize| sizes.seen(first + row);
        for part in values.blocks().take_while(|part| part.start < seen(count - 1)) {
            scores.as_flattened_mut().fill(0.0);
            for (block, queries) in keys.blocks().zip(queries.chunks(count)) {
                for (at, panel) in keys.of_block::<K, C>(laid_out, &block, part.clone()) {
                    multiply::<K, C>(queries, panel, &mut scores.as_flattened_mut()[at..], KEYS, None);
                }
            }
            for (row, scores) in scores.iter_mut().enumerate() {
                let visible = seen(row).saturating_sub(part.start).min(part.len());
                let (seen, hidden) = scores.split_at_mut(visible);
                hidden.fill(0.0);
                if seen.is_empty() {
                    continue;
                }
                let bias = bias.map(|bias| &bias.row(first + row)[part.start..][..visible]);
                let (greatest, total) = (&mut greatest[row], &mut totals[row]);
                let gather = Gather { scores: seen, scale, bias, greatest, total };
                let factor = Instructions::in_use().run(gather);
                if factor != 1.0 {
                    sums[row * width..][..width].iter_mut().for_each(|sum| *sum *= factor);
                }
                if K::PER_WORD > 1 {
                    let mut narrow = [T::default(); KEYS];
                    T::narrow(scores, &mut narrow);
                    T::words::<K, C>(&narrow, &mut scores[..KEYS / K::PER_WORD]);
                }
            }
            for (at, panel) in values.of_block::<K, C>(values_of, &part, 0..d_value) {
                multiply::<K, C>(scores, panel, &mut sums[at..], width, None);
            }
        }
        for (at, (sums, out)) in sums.chunks_mut(width).zip(out).enumerate() {
            if totals[at] != 0.0 {
                sums.iter_mut().for_each(|sum| *sum /= totals[at]);
            }
            T::narrow(&sums[..d_value], out);
        }
    }
}

/// Scores become `score · scale + bias`.
#[inline(always)]
pub fn scale_scores<const FMA: bool>(scores: &mut [f32], scale: f32, bias: Option<&[f32]>) {
    match bias {
        None => scores.iter_mut().for_each(|score| *score *= scale),
        Some(bias) => {
            let each = scores.iter_mut().zip(bias);
            each.for_each(|(score, &bias)| *score = biased::<FMA>(*score, scale, bias));
        }
    }
}

/// Scores of a query become `exp(score · scale + bias - greatest)`, where the greatest so far and the total follow. Gives what was gathered
/// with the old one is to be taken times.
struct Gather<'a> {
    scores: &'a mut [f32],
    scale: f32,
    bias: Option<&'a [f32]>,
    greatest: &'a mut f32,
    total: &'a mut f32,
}

impl instructions::Body for Gather<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> f32 {
        scale_scores::<FMA>(self.scores, self.scale, self.bias);
        let most = greatest(self.scores).max(*self.greatest);
        let factor = if *self.greatest == most { 1.0 } else { exp::<FMA>(*self.greatest - most) };
        *self.greatest = most;
        // of scores that are all -∞ nothing is gathered
        let most = if most == f32::NEG_INFINITY { 0.0 } else { most };
        *self.total = *self.total * factor + exponentials::<FMA>(self.scores, most);
        factor
    }
}
