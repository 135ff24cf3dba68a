//! Group normalisation in place, one group after the other.

use rayon::prelude::*;

/// Values whose sum is kept in f32 before it goes on in f64.
const BLOCK: usize = 1024;
/// Sums that are kept side by side.
const LANES: usize = 16;

/// `x`, `[batch, channels, places]`, is normalised by groups of channels, scaled, moved, and `finish`ed value by value.
pub fn group_norm(
    x: &mut [f32],
    [weight, bias]: [&[f32]; 2],
    n_groups: usize,
    places: usize,
    eps: f64,
    finish: impl Fn(f32) -> f32 + Sync,
) {
    if x.is_empty() {
        return;
    }
    let width = weight.len() / n_groups; // channels of a group
    x.par_chunks_mut(width * places).enumerate().for_each(|(at, group)| {
        let count = group.len() as f64;
        let mean = sum(group, |value| value) / count;
        let mean = mean as f32;
        let variance = sum(group, |value| (value - mean) * (value - mean)) / count;
        let inverse = (1.0 / (variance + eps).sqrt()) as f32;
        let first = at % n_groups * width;
        for (channel, values) in (first..).zip(group.chunks_mut(places)) {
            let (scale, shift) = (inverse * weight[channel], bias[channel]);
            for value in values {
                *value = finish((*value - mean) * scale + shift);
            }
        }
    });
}

/// The sum of `f` of all values.
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let block = |block: &[f32]| {
        let (chunks, rest) = block.as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane += f(value);
            }
        }
        f64::from(lanes.iter().sum::<f32>() + rest.iter().map(|&value| f(value)).sum::<f32>())
    };
    values.chunks(BLOCK).map(block).sum()
}
