//! Weighted sums of rows that lie apart.

use rayon::prelude::*;

/// `out[token]` becomes the sum of `weights[token][choice] * rows[places[token][choice]]` over the choices that have a
/// place. `rows` and `out` are `width` wide; `weights` and `places` are `[tokens, top_k]`.
pub fn combine(rows: &[f32], weights: &[f32], places: &[Option<usize>], width: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let top_k = places.len() / (out.len() / width);
    let tokens = weights.par_chunks(top_k).zip(places.par_chunks(top_k));
    out.par_chunks_mut(width).zip(tokens).for_each(|(out, (weights, places))| {
        out.fill(0.0);
        for (weight, place) in weights.iter().zip(places) {
            let Some(place) = place else { continue };
            for (out, value) in out.iter_mut().zip(&rows[place * width..(place + 1) * width]) {
                *out += weight * value;
            }
        }
    });
}
