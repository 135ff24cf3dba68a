//! Resampling of 8-bit pictures, bit for bit as Pillow's `Image.resize` does it.
//!
//! Every reference preprocessor ends in that function, and a model sees its rounding: weights are fixed-point
//! numbers, each pass rounds to 8 bits, and which pass comes first decides what the other one sees. Crates that keep
//! fewer bits of weight differ by one grey level in places, a thousand times the tolerance of the fixtures.
//! Matches Pillow 13 (`Resample.c`, and `Geometry.c` for [`Filter::Nearest`]). Before 13 the horizontal pass always
//! came first; now the vertical one does where more than twice as many rows as columns are lost, so a tall picture
//! that is squashed comes out one grey level different in places from one version to the other.

use std::f64::consts::PI;
use std::ops::Range;

use rayon::prelude::*;

/// The kernel of a resize. When a picture shrinks, the kernel widens with the scale, so that nothing aliases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Filter {
    /// The pixel under the centre; no averaging.
    Nearest,
    /// The mean over one output pixel's footprint.
    Box,
    /// A triangle of radius 1.
    Bilinear,
    /// A Hamming-windowed sinc of radius 1.
    Hamming,
    /// Keys' cubic with `a = -0.5`, radius 2.
    Bicubic,
    /// A sinc windowed by a sinc, radius 3.
    Lanczos,
}

impl Filter {
    /// How far the kernel reaches, in input pixels at scale 1.
    fn radius(self) -> f64 {
        match self {
            Filter::Nearest | Filter::Box => 0.5,
            Filter::Bilinear | Filter::Hamming => 1.0,
            Filter::Bicubic => 2.0,
            Filter::Lanczos => 3.0,
        }
    }

    /// The kernel at `x`, not normalised.
    fn weight(self, x: f64) -> f64 {
        let a = x.abs();
        match self {
            Filter::Nearest | Filter::Box if x > -0.5 && x <= 0.5 => 1.0,
            Filter::Nearest | Filter::Box => 0.0,
            Filter::Bilinear if a < 1.0 => 1.0 - a,
            Filter::Hamming if a == 0.0 => 1.0,
            Filter::Hamming if a < 1.0 => (a * PI).sin() / (a * PI) * (0.54 + 0.46 * (a * PI).cos()),
            Filter::Bicubic if a < 1.0 => (1.5 * a - 2.5) * a * a + 1.0,
            Filter::Bicubic if a < 2.0 => (((a - 5.0) * a + 8.0) * a - 4.0) * -0.5,
            Filter::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            _ => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 { 1.0 } else { (x * PI).sin() / (x * PI) }
}

/// Interleaved 8-bit samples: `[height, width, channels]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Samples<'a> {
    pub height: usize,
    pub width: usize,
    pub channels: usize,
    pub data: &'a [u8],
}

impl<'a> Samples<'a> {
    /// The samples of some columns of one row.
    fn part(&self, row: usize, columns: &Range<usize>) -> &'a [u8] {
        let start = (row * self.width + columns.start) * self.channels;
        &self.data[start..start + columns.len() * self.channels]
    }
}

/// Resizes `source` to `[height, width]` and returns the rows and columns of `window` of the result:
/// `[rows.len(), columns.len(), channels]`. Only what the window needs is computed, so a long thin picture whose
/// centre is wanted costs no more than its centre.
///
/// `source` has 3 or 4 channels and at least one pixel; `window` lies within the result.
pub(crate) fn resize(
    source: Samples<'_>,
    [height, width]: [usize; 2],
    [rows, columns]: [Range<usize>; 2],
    filter: Filter,
) -> Vec<u8> {
    if filter == Filter::Nearest {
        return nearest(source, [height, width], [rows, columns]);
    }
    match source.channels {
        3 => two_passes::<3>(source, [height, width], [rows, columns], filter),
        4 => two_passes::<4>(source, [height, width], [rows, columns], filter),
        channels => unreachable!("pictures have 3 or 4 channels, not {channels}"),
    }
}

/// Weights are integers in units of `2^-BITS`: 8 bits of sample and 2 of overshoot fit beside them in an `i32`.
const BITS: u32 = 32 - 8 - 2;

/// What one output position averages: `weights.len()` input positions from `start` on.
struct Taps {
    start: usize,
    weights: Vec<i32>,
}

/// The taps of the output positions `wanted`, for an axis going from `input` to `output` positions.
fn taps(input: usize, output: usize, wanted: Range<usize>, filter: Filter) -> Vec<Taps> {
    let scale = input as f64 / output as f64;
    let stretch = scale.max(1.0);
    let radius = filter.radius() * stretch;
    let inverse = 1.0 / stretch;
    wanted
        .map(|position| {
            let centre = (position as f64 + 0.5) * scale;
            let start = (centre - radius + 0.5).max(0.0) as usize;
            let end = ((centre + radius + 0.5) as usize).min(input);
            let mut weights: Vec<f64> =
                (start..end).map(|x| filter.weight((x as f64 - centre + 0.5) * inverse)).collect();
            let sum: f64 = weights.iter().sum();
            if sum != 0.0 {
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
            let weights = weights
                .iter()
                .map(|weight| (weight * f64::from(1u32 << BITS) + 0.5f64.copysign(*weight)) as i32)
                .collect();
            Taps { start, weights }
        })
        .collect()
}

const HALF: i32 = 1 << (BITS - 1);

fn round(sum: i32) -> u8 {
    (sum >> BITS).clamp(0, 255) as u8
}

fn two_passes<const C: usize>(
    source: Samples<'_>,
    [height, width]: [usize; 2],
    [rows, columns]: [Range<usize>; 2],
    filter: Filter,
) -> Vec<u8> {
    let mut down = taps(source.height, height, rows, filter);
    let mut across = taps(source.width, width, columns, filter);
    let (rows_read, columns_read) = (rebase(&mut down), rebase(&mut across));

    let [lost_rows, lost_columns] =
        [(source.height, height), (source.width, width)].map(|(from, to)| from as isize - to as isize);
    if lost_rows > 0 && lost_rows > lost_columns * 2 {
        let data = vertical::<C>(source, rows_read, columns_read.clone(), &down);
        let shorter = Samples { height: down.len(), width: columns_read.len(), channels: C, data: &data };
        horizontal::<C>(shorter, 0..down.len(), 0..columns_read.len(), &across)
    } else {
        let data = horizontal::<C>(source, rows_read.clone(), columns_read, &across);
        let narrower = Samples { height: rows_read.len(), width: across.len(), channels: C, data: &data };
        vertical::<C>(narrower, 0..rows_read.len(), 0..across.len(), &down)
    }
}

/// The input positions that any of these taps reads; the taps then count from the first of them.
fn rebase(taps: &mut [Taps]) -> Range<usize> {
    let first = taps.iter().map(|taps| taps.start).min().unwrap_or(0);
    let last = taps.iter().map(|taps| taps.start + taps.weights.len()).max().unwrap_or(0);
    taps.iter_mut().for_each(|taps| taps.start -= first);
    first..last
}

/// Each row of the part `[rows, columns]` of the source, averaged across: `[rows, taps, C]`.
fn horizontal<const C: usize>(
    source: Samples<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    taps: &[Taps],
) -> Vec<u8> {
    let mut result = vec![0u8; rows.len() * taps.len() * C];
    result.par_chunks_exact_mut((taps.len() * C).max(1)).zip(rows).for_each(|(out, row)| {
        let input = source.part(row, &columns);
        for (pixel, taps) in out.chunks_exact_mut(C).zip(taps) {
            let mut sums = [HALF; C];
            for (sample, weight) in input[taps.start * C..].chunks_exact(C).zip(&taps.weights) {
                for channel in 0..C {
                    sums[channel] += i32::from(sample[channel]) * weight;
                }
            }
            for channel in 0..C {
                pixel[channel] = round(sums[channel]);
            }
        }
    });
    result
}

/// Each column of the part `[rows, columns]` of the source, averaged down: `[taps, columns, C]`.
fn vertical<const C: usize>(
    source: Samples<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    taps: &[Taps],
) -> Vec<u8> {
    let stride = columns.len() * C;
    let mut result = vec![0u8; taps.len() * stride];
    result.par_chunks_exact_mut(stride.max(1)).zip(taps).for_each(|(out, taps)| {
        let mut sums = vec![HALF; stride];
        for (row, weight) in (rows.start + taps.start..).zip(&taps.weights) {
            for (sum, sample) in sums.iter_mut().zip(source.part(row, &columns)) {
                *sum += i32::from(*sample) * weight;
            }
        }
        for (sample, sum) in out.iter_mut().zip(sums) {
            *sample = round(sum);
        }
    });
    result
}

fn nearest(source: Samples<'_>, [height, width]: [usize; 2], [rows, columns]: [Range<usize>; 2]) -> Vec<u8> {
    let channels = source.channels;
    let across = centres(source.width, width, columns);
    centres(source.height, height, rows)
        .iter()
        .flat_map(|y| across.iter().map(move |x| (y * source.width + x) * channels))
        .flat_map(|start| &source.data[start..start + channels])
        .copied()
        .collect()
}

/// The input position under each wanted output position. Pillow steps from the first centre by repeated addition,
/// and where a centre falls on a border that decides the side.
fn centres(input: usize, output: usize, wanted: Range<usize>) -> Vec<usize> {
    let step = input as f64 / output as f64;
    std::iter::successors(Some(step * 0.5), |centre| Some(centre + step))
        .take(wanted.end)
        .skip(wanted.start)
        .map(|centre| (centre as usize).min(input - 1))
        .collect()
}

#[cfg(test)]
mod tests;
