//! Products of many rows with a packed matrix, in whole numbers.
//!
//! Rows are rounded to 16 bits, each [`CHUNK`] of columns by a scale of its own, and codes are widened to as many. Their
//! products are summed up exactly within a chunk, and as [those of floats](super::matmul) from chunk to chunk, taken times
//! both scales: what is laid out are words of [chunks](super::chunks).

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Zeroable;
use half::f16;
use rayon::prelude::*;

use super::chunks::{CHUNK, Chunks, EIGHT, FOUR, PAIRS};
use super::instructions::{self, Instructions};
use super::matmul::{Right, product_with};
use super::quantized;
use super::tiles::{Ahead, LINE, Tile, Tiles};
use crate::ops::{Bits, PackedMatrix, Quantization};

/// Whether the blocks of a matrix are whole chunks, or its rows are blocks.
pub fn has_whole_chunks(weight: &PackedMatrix) -> bool {
    let block = weight.quantization().block;
    block.is_multiple_of(CHUNK) || block >= weight.shape()[1]
}

/// `x Wᵀ`, `[many, rows]`, for a matrix that [has whole chunks](has_whole_chunks): `x` is `[many, cols]`; none of them is
/// empty.
///
/// A value is rounded by at most 1.6e-5 of the greatest magnitude in its chunk. Rows that are not finite are not rounded.
pub fn products(weight: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    products_with(Instructions::in_use(), weight, x)
}

fn products_with(instructions: Instructions, weight: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let ([rows, cols], bits) = (weight.shape(), weight.quantization().bits);
    let many = x.len() / cols;
    let words = cols.div_ceil(CHUNK) * words_of(bits);
    let mut rounded = vec![0.0; many * words];
    let each = rounded.par_chunks_mut(words).zip(x.par_chunks(cols));
    let are_finite: Vec<bool> = each.map(|(to, x)| instructions.run(Round { x, bits, to })).collect();
    let tiles = Tiles::Chunks(Chunks::of(instructions, bits));
    let codes = Codes { weight, instructions };
    let mut y = product_with(tiles, &rounded, &[codes], [many, words, rows], |_, _, _| ());
    for (at, _) in are_finite.iter().enumerate().filter(|(_, is_finite)| !**is_finite) {
        quantized::products_with(instructions, weight, &x[at * cols..][..cols], &mut y[at * rows..][..rows]);
    }
    y
}

/// Words of a chunk.
const fn words_of(bits: Bits) -> usize {
    match bits {
        Bits::Eight => EIGHT,
        Bits::Four => FOUR,
    }
}

/// Columns whose codes are a word.
const fn columns_of_a_word(words: usize) -> usize {
    if words == FOUR { 8 } else { 4 }
}

/// Rounds a row to words of chunks, and tells whether all of it is finite.
struct Round<'a> {
    x: &'a [f32],
    bits: Bits,
    to: &'a mut [f32],
}

impl instructions::Body for Round<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<const FMA: bool>(self) -> bool {
        match self.bits {
            Bits::Eight => round_row::<EIGHT>(self.x, self.to),
            Bits::Four => round_row::<FOUR>(self.x, self.to),
        }
    }
}

#[inline(always)]
fn round_row<const WORDS: usize>(x: &[f32], to: &mut [f32]) -> bool {
    let mut is_finite = true;
    for (x, to) in x.chunks(CHUNK).zip(to.as_chunks_mut::<WORDS>().0) {
        match x.first_chunk() {
            Some(x) => is_finite &= round(x, to),
            None => {
                let mut last = [0.0; CHUNK];
                last[..x.len()].copy_from_slice(x);
                is_finite &= round(&last, to);
            }
        }
    }
    is_finite
}

/// The order of a chunk's numbers is that of [`widen`].
#[inline(always)]
fn round<const WORDS: usize>(x: &[f32; CHUNK], to: &mut [f32; WORDS]) -> bool {
    /// The greatest number.
    const GREATEST: f32 = i16::MAX as f32;
    /// What a number of 16 bits is added to, it is the lowest bits of, rounded.
    const ROUNDS: f32 = 12_582_912.0;

    // magnitudes have the order of their bits, in which those that are not finite come last
    let magnitudes = x.map(|x| (x.to_bits() & 0x7fff_ffff) as i32);
    let greatest = f32::from_bits(magnitudes.into_iter().fold(0, i32::max) as u32);
    let scale = (greatest / GREATEST).max(f32::MIN_POSITIVE);
    let each = 1.0 / scale;
    let numbers = x.map(|x| (x * each + ROUNDS).to_bits());
    let group = columns_of_a_word(WORDS);
    for (to, numbers) in to[..PAIRS].chunks_exact_mut(group / 2).zip(numbers.chunks_exact(group)) {
        for (at, to) in to.iter_mut().enumerate() {
            *to = f32::from_bits(numbers[at] & 0xffff | numbers[at + group / 2] << 16);
        }
    }
    to[PAIRS] = scale;
    if WORDS == FOUR {
        let number = |at: usize| i32::from(numbers[at] as i16);
        let sums: [i32; PAIRS] = std::array::from_fn(|at| number(at) + number(at + PAIRS));
        to[PAIRS + 1] = sums.iter().sum::<i32>() as f32 * scale;
    }
    greatest.is_finite()
}

/// A matrix whose panels are words of chunks.
#[derive(Clone, Copy, Debug)]
struct Codes<'a> {
    weight: &'a PackedMatrix,
    instructions: Instructions,
}

impl Right<f32> for Codes<'_> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let chunks = inner.start / K::WORDS..inner.end / K::WORDS;
        self.instructions.run(LayOut { weight: self.weight, chunks, first, panel, tile: PhantomData::<K> });
    }

    fn ahead(&self, inner: Range<usize>, columns: Range<usize>) -> Option<Ahead> {
        let ([rows, cols], bits) = (self.weight.shape(), self.weight.quantization().bits);
        let chunks = inner.start / words_of(bits)..inner.end / words_of(bits);
        let codes = self.weight.codes(columns.start..rows).as_ptr();
        let run = bits.bytes(chunks.len() * CHUNK).next_power_of_two();
        Some(Ahead::new(codes.wrapping_add(bits.bytes(chunks.start * CHUNK)), bits.bytes(cols), run))
    }
}

/// Lays out chunks of columns from the first one on.
struct LayOut<'a, K, const C: usize> {
    weight: &'a PackedMatrix,
    chunks: Range<usize>,
    first: usize,
    panel: &'a mut [[f32; C]],
    tile: PhantomData<K>,
}

impl<K: Tile<C>, const C: usize> instructions::Body for LayOut<'_, K, C> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        match self.weight.quantization().bits {
            Bits::Eight => self.chunks::<EIGHT>(),
            Bits::Four => self.chunks::<FOUR>(),
        }
    }
}

impl<K: Tile<C>, const C: usize> LayOut<'_, K, C> {
    #[inline(always)]
    fn chunks<const WORDS: usize>(self) {
        let Quantization { bits, block } = self.weight.quantization();
        let [rows, cols] = self.weight.shape();
        let panel = self.panel.as_chunks_mut::<WORDS>().0;
        let columns = self.first..rows.min(self.first + C);
        let mut turned = Turned::new(columns.len());

        let (codes, width) = (self.weight.codes(columns.clone()), bits.bytes(cols));
        let words = CHUNK / columns_of_a_word(WORDS);
        let starts = (bits.bytes(self.chunks.start * CHUNK)..).step_by(4 * LINE);
        for (panel, start) in panel.chunks_mut(LINE / words).zip(starts) {
            let codes = turned.of::<K>(|column| {
                let codes = &codes[column * width + start..(column + 1) * width];
                match codes.first_chunk::<{ 4 * LINE }>() {
                    Some(codes) => bytemuck::cast(*codes),
                    None => bytemuck::cast(filled_up::<u8, { 4 * LINE }>(codes)),
                }
            });
            for (codes, panel) in codes.chunks_exact(words).zip(panel) {
                widen(codes, panel);
            }
        }

        let (scales, mins) = self.weight.halves(columns);
        let (blocks, first) = (cols.div_ceil(block), self.chunks.start * CHUNK / block);
        for (word, halves) in (PAIRS..).zip([Some(scales), mins].into_iter().flatten()) {
            let halves = turned.of::<K>(|column| {
                let halves = &halves[column * blocks + first..];
                let halves: [f16; LINE] = match halves.first_chunk() {
                    Some(halves) => *halves,
                    None => filled_up(halves),
                };
                halves.map(|half| half.to_bits().into())
            });
            for (chunk, panel) in self.chunks.clone().zip(&mut *panel) {
                let halves = &halves[chunk * CHUNK / block - first];
                panel[word].iter_mut().zip(halves).for_each(|(to, half)| *to = from_half(half.to_bits()));
            }
        }
        if WORDS == FOUR && mins.is_none() {
            for panel in panel {
                let (scales, mins) = panel.split_at_mut(PAIRS + 1);
                mins[0].iter_mut().zip(scales[PAIRS]).for_each(|(min, scale)| *min = -8.0 * scale);
            }
        }
    }
}

/// The first values, fewer than `N`, before zeros.
#[cold]
fn filled_up<T: Copy + Zeroable, const N: usize>(values: &[T]) -> [T; N] {
    let mut whole = [T::zeroed(); N];
    whole[..values.len()].copy_from_slice(values);
    whole
}

/// Lines of words, one of each column, become lines across columns.
struct Turned<const C: usize> {
    /// How many columns there are.
    columns: usize,
    /// Of some columns.
    lines: [[u32; LINE]; LINE],
    /// Zeros beyond the last column.
    across: [[f32; C]; LINE],
}

impl<const C: usize> Turned<C> {
    fn new(columns: usize) -> Self {
        Self { columns, lines: [[0; LINE]; LINE], across: [[0.0; C]; LINE] }
    }

    #[inline(always)]
    fn of<K: Tile<C>>(&mut self, line: impl Fn(usize) -> [u32; LINE]) -> &[[f32; C]; LINE] {
        for first in (0..C).step_by(K::LANES) {
            for (column, to) in (first..).zip(&mut self.lines).take(K::LANES) {
                *to = if column < self.columns { line(column) } else { [0; LINE] };
            }
            // SAFETY: whoever chose the tile found its instructions on this machine.
            unsafe {
                K::turn(bytemuck::cast_slice(self.lines.as_flattened()), LINE, &mut self.across, first)
            };
        }
        &self.across
    }
}

/// Words of codes become words of two numbers: a code and that which is half a word further on.
#[inline(always)]
fn widen<const C: usize, const WORDS: usize>(codes: &[[f32; C]], to: &mut [[f32; C]; WORDS]) {
    if WORDS == FOUR {
        for (codes, [first, second, third, fourth]) in codes.iter().zip(to.as_chunks_mut().0) {
            for (at, codes) in codes.iter().enumerate() {
                let pair = |from: u32| f32::from_bits(codes.to_bits() >> from & 0x000f_000f);
                [first[at], second[at]] = [pair(0), pair(4)];
                [third[at], fourth[at]] = [pair(8), pair(12)];
            }
        }
    } else {
        for (codes, [first, second]) in codes.iter().zip(to.as_chunks_mut().0) {
            for (at, codes) in codes.iter().enumerate() {
                let code = |at: u32| (codes.to_bits() as i32) << (24 - 8 * at) >> 24;
                let pair = |low: i32, high: i32| f32::from_bits((low & 0xffff | high << 16) as u32);
                [first[at], second[at]] = [pair(code(0), code(2)), pair(code(1), code(3))];
            }
        }
    }
}

/// A number of half precision, by instructions that all machines have.
#[inline(always)]
fn from_half(bits: u32) -> f32 {
    /// By how much exponents differ.
    const FACTOR: f32 = f32::from_bits((127 + 112) << 23);
    const INFINITE: u32 = 0x7c00 << 13;
    let (sign, magnitude) = ((bits & 0x8000) << 16, (bits & 0x7fff) << 13);
    let finite = (f32::from_bits(magnitude) * FACTOR).to_bits();
    let beyond = magnitude | f32::INFINITY.to_bits();
    f32::from_bits(sign | if magnitude < INFINITE { finite } else { beyond })
}

#[cfg(test)]
mod tests;
