//! Rows of experts: through their projections, and summed up.

use std::ops::Range;

use burn::tensor::Element;

use super::few::Held;
use super::host::Values;
use super::instructions::{Body, Instructions};
use super::matmul::{Rows, Sums, add};
use super::pointwise::Finish;
use super::tiles::{DEPTH, Number};
use crate::ops::Activation;

/// Sums of rows that go through a projection at a time: as many as stay in a core's cache.
const PART: usize = 128 * 1024;

/// A projection of one expert.
pub struct Projection<T> {
    /// `[d_in, d_out]`.
    pub weight: Values<T>,
    /// `[d_out]`.
    pub bias: Option<Values>,
    pub d_in: usize,
    pub d_out: usize,
}

impl<T: Number + Element> Projection<T> {
    /// `x W + b`: `x` `[rows, d_in]`, `out` `[rows, d_out]`. On the calling thread alone.
    pub fn forward(&self, x: &[T], out: &mut [T]) {
        let mut sums = Sums::zeros(out.len() / self.d_out, self.d_out);
        self.add(x, 0..self.d_out, &mut sums);
        self.put(&mut sums, 0..self.d_out, None, out);
    }

    /// `sums` of `columns` alone, without the bias.
    fn add(&self, x: &[T], columns: Range<usize>, sums: &mut Sums) {
        add(x, &Rows::new(&self.weight, self.d_out), self.d_in, columns, sums);
    }

    /// `out` becomes `act(sums + b)`, rounded, of sums of `columns`.
    fn put(&self, sums: &mut Sums, columns: Range<usize>, activation: Option<Activation>, out: &mut [T]) {
        for (sums, out) in sums.rows().zip(out.chunks_mut(columns.len())) {
            self.finish(sums, columns.clone(), activation, None);
            T::narrow(sums, out);
        }
    }

    /// Sums of `columns` become `act(sums + b) * factors`.
    fn finish(
        &self,
        values: &mut [f32],
        columns: Range<usize>,
        activation: Option<Activation>,
        factors: Option<&[f32]>,
    ) {
        let bias = self.bias.as_deref().map(|bias| &bias[columns]);
        Instructions::in_use().run(Finish { values, bias, activation, factors });
    }
}

/// The MLP of one expert.
pub struct Mlp<T> {
    pub gate: Option<Projection<T>>,
    pub up: Projection<T>,
    pub down: Projection<T>,
    pub activation: Activation,
}

impl<T: Number + Element> Mlp<T> {
    /// `down(act(up(x)))`, or `down(act(gate(x)) * up(x))`: `x` `[rows, d_model]`, `out` `[rows, d_out]`. On the calling thread
    /// alone; some columns of what is between the projections at a time.
    pub fn forward(&self, x: &[T], out: &mut [T]) {
        let Self { gate, up, down, activation } = self;
        let rows = out.len() / down.d_out;
        // whole depths of the product with `down`, whatever a word holds: sums are taken in one order
        let part = (PART / rows).next_multiple_of(2 * DEPTH);
        let mut out_sums = Sums::zeros(rows, down.d_out);
        for first in (0..up.d_out).step_by(part) {
            let columns = first..up.d_out.min(first + part);
            let mut sums = Sums::zeros(rows, columns.len());
            up.add(x, columns.clone(), &mut sums);
            let mut inner = vec![T::default(); rows * columns.len()];
            match gate {
                None => up.put(&mut sums, columns.clone(), Some(*activation), &mut inner),
                Some(gate) => {
                    let mut gates = Sums::zeros(rows, columns.len());
                    gate.add(x, columns.clone(), &mut gates);
                    let out = inner.chunks_mut(columns.len());
                    for ((sums, gates), out) in sums.rows().zip(gates.rows()).zip(out) {
                        up.finish(sums, columns.clone(), None, None);
                        gate.finish(gates, columns.clone(), Some(*activation), Some(sums));
                        T::narrow(gates, out);
                    }
                }
            }
            let weight = &down.weight[first * down.d_out..columns.end * down.d_out];
            add(&inner, &Rows::new(weight, down.d_out), columns.len(), 0..down.d_out, &mut out_sums);
        }
        down.put(&mut out_sums, 0..down.d_out, None, out);
    }
}

/// `out[token]` becomes the sum of `weights[token][choice] * rows[places[token][choice]]` over the choices that have a
/// place. `rows` and `out` are `width` wide; `weights` and `places` are `[tokens, top_k]`.
pub struct Combine<'a, T> {
    pub rows: &'a [T],
    pub weights: &'a [f32],
    pub places: &'a [Option<usize>],
    pub width: usize,
    pub out: &'a mut [f32],
}

impl<T: Held> Body for Combine<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { rows, weights, places, width, out } = self;
        let top_k = places.len() * width / out.len();
        let tokens = weights.chunks(top_k).zip(places.chunks(top_k));
        for (out, (weights, places)) in out.chunks_mut(width).zip(tokens) {
            out.fill(0.0);
            for (weight, place) in weights.iter().zip(places) {
                let Some(place) = place else { continue };
                for (out, value) in out.iter_mut().zip(&rows[place * width..(place + 1) * width]) {
                    *out += weight * value.widen();
                }
            }
        }
    }
}
