//! Rows of experts: through their projections, and summed up.

use super::host::Values;
use super::instructions::{Body, Instructions};
use super::matmul::{Right, matmul};
use super::pointwise::Finish;
use crate::ops::Activation;

/// A projection of one expert.
pub struct Projection {
    /// `[d_in, d_out]`.
    pub weight: Values,
    /// `[d_out]`.
    pub bias: Option<Values>,
    pub d_in: usize,
    pub d_out: usize,
}

impl Projection {
    /// `act(x W + b) * factors`: `x` `[rows, d_in]`, `out` and `factors` `[rows, d_out]`. On the calling thread alone.
    pub fn forward(
        &self,
        x: &[f32],
        activation: Option<Activation>,
        factors: Option<&[f32]>,
        out: &mut [f32],
    ) {
        matmul(x, Right::Rows(&self.weight), [self.d_in, self.d_out], out);
        let bias = self.bias.as_deref();
        Instructions::in_use().run(Finish { values: out, bias, activation, factors });
    }
}

/// `out[token]` becomes the sum of `weights[token][choice] * rows[places[token][choice]]` over the choices that have a
/// place. `rows` and `out` are `width` wide; `weights` and `places` are `[tokens, top_k]`.
pub struct Combine<'a> {
    pub rows: &'a [f32],
    pub weights: &'a [f32],
    pub places: &'a [Option<usize>],
    pub width: usize,
    pub out: &'a mut [f32],
}

impl Body for Combine<'_> {
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
                    *out += weight * value;
                }
            }
        }
    }
}
