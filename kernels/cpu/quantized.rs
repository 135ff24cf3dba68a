//! Products with a packed matrix: it is read once, block by block, and unpacked in registers.
//!
//! A row is walked in chunks of 32 columns, several rows at a time: more streams of memory and independent sums. The
//! chunk of a 4-bit row is 16 bytes whose low halves are its even columns, so the activations are laid out alike: the
//! 16 even columns of every chunk before the 16 odd ones.

use rayon::prelude::*;

use super::instructions::Instructions;
use crate::ops::{Bits, PackedMatrix, Quantization};

/// Columns of a chunk.
const CHUNK: usize = 32;
/// Sums that are kept side by side: half of a chunk.
const LANES: usize = CHUNK / 2;
/// Rows that are walked at a time.
const STREAMS: usize = 4;
/// Rows of a parallel task.
const TASK: usize = 32;

/// `y = x Wᵀ`: `x` is `[many, cols]`, `y` `[many, rows]`; none of them is empty.
pub fn products(weight: &PackedMatrix, x: &[f32], y: &mut [f32]) {
    let [rows, cols] = weight.shape();
    let many = x.len() / cols;
    let bits = weight.quantization().bits;
    let laid_out: Vec<f32> = x.chunks(cols).flat_map(|x| lay_out(x, bits)).collect();
    let x = Activations { x: &laid_out, width: cols.next_multiple_of(CHUNK) };
    let body = Instructions::in_use();
    if many == 1 {
        return by_rows(weight, x, y, body);
    }
    let mut by_row = vec![0.0; rows * many];
    by_rows(weight, x, &mut by_row, body);
    for (many_th, y) in y.chunks_mut(rows).enumerate() {
        for (y, by_row) in y.iter_mut().zip(by_row.chunks(many)) {
            *y = by_row[many_th];
        }
    }
}

/// Rows of activations, each laid out in whole chunks.
#[derive(Clone, Copy)]
struct Activations<'a> {
    x: &'a [f32],
    width: usize,
}

/// Whole chunks, the last one filled up with zeros; for 4 bits even columns before odd ones.
fn lay_out(x: &[f32], bits: Bits) -> Vec<f32> {
    let mut out = vec![0.0; x.len().next_multiple_of(CHUNK)];
    for (out, x) in out.chunks_mut(CHUNK).zip(x.chunks(CHUNK)) {
        for (col, &x) in x.iter().enumerate() {
            let place = match bits {
                Bits::Eight => col,
                Bits::Four => col / 2 + col % 2 * LANES,
            };
            out[place] = x;
        }
    }
    out
}

/// `y` is `[rows, many]`.
fn by_rows(weight: &PackedMatrix, x: Activations, y: &mut [f32], body: Instructions) {
    let [rows, _] = weight.shape();
    let many = y.len() / rows;
    y.par_chunks_mut(TASK * many).enumerate().for_each_init(Scratch::default, |scratch, (task, y)| {
        let mut row = task * TASK;
        for y in y.chunks_mut(STREAMS * many) {
            match y.len() / many {
                STREAMS => some_rows::<STREAMS>(weight, row, x, y, body, scratch),
                left => {
                    for (i, y) in y.chunks_mut(many).enumerate().take(left) {
                        some_rows::<1>(weight, row + i, x, y, body, scratch);
                    }
                }
            }
            row += STREAMS;
        }
    });
}

/// Room for what is unpacked beforehand.
#[derive(Default)]
struct Scratch {
    scales: Vec<f32>,
    mins: Vec<f32>,
    row: Vec<f32>,
}

/// `y` is `[R, many]`.
fn some_rows<const R: usize>(
    weight: &PackedMatrix,
    first: usize,
    x: Activations,
    y: &mut [f32],
    body: Instructions,
    Scratch { scales, mins, row }: &mut Scratch,
) {
    let Quantization { bits, block } = weight.quantization();
    let [_, cols] = weight.shape();
    let many = y.len() / R;
    if !block.is_multiple_of(CHUNK) && block < cols {
        // blocks that end within a chunk
        for (r, y) in y.chunks_mut(many).enumerate() {
            row.resize(cols, 0.0);
            weight.unpack_row(first + r, row);
            let row = lay_out(row, bits);
            for (y, x) in y.iter_mut().zip(x.x.chunks(x.width)) {
                *y = row.iter().zip(x).map(|(w, x)| w * x).sum();
            }
        }
        return;
    }
    weight.ranges(first..first + R, scales, mins);
    let rows = Rows {
        codes: weight.codes(first..first + R),
        scales,
        mins,
        width: bits.bytes(cols),
        chunks_per_block: block.div_ceil(CHUNK),
    };
    for (i, x) in x.x.chunks(x.width).enumerate() {
        let sums = match bits {
            Bits::Eight => body.sums::<R, 8>(&rows, x),
            Bits::Four => body.sums::<R, 4>(&rows, x),
        };
        for (y, sum) in y.chunks_mut(many).zip(sums) {
            y[i] = sum;
        }
    }
}

/// Packed rows whose blocks are whole chunks.
struct Rows<'a> {
    /// `[R, width]`
    codes: &'a [u8],
    /// `[R, blocks]`
    scales: &'a [f32],
    /// `[R, blocks]`
    mins: &'a [f32],
    width: usize,
    chunks_per_block: usize,
}

impl Rows<'_> {
    /// The bytes of a chunk of a row; what it lacks at the row's end, where activations are 0, is 0.
    #[inline(always)]
    fn chunk<const BYTES: usize>(&self, row: usize, chunk: usize) -> [u8; BYTES] {
        let codes = &self.codes[row * self.width..(row + 1) * self.width];
        let start = chunk * BYTES;
        match codes.get(start..start + BYTES).and_then(|codes| codes.first_chunk()) {
            Some(chunk) => *chunk,
            None => {
                let mut chunk = [0; BYTES];
                chunk[..codes.len() - start].copy_from_slice(&codes[start..]);
                chunk
            }
        }
    }
}

impl Instructions {
    /// The products of `R` rows with one row of activations.
    #[inline]
    fn sums<const R: usize, const BITS: usize>(self, rows: &Rows, x: &[f32]) -> [f32; R] {
        match self {
            Self::Plain => plain::<R, BITS>(rows, x),
            // SAFETY: `all` found the instructions on this machine.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::<R, BITS>(rows, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::<R, BITS>(rows, x) },
        }
    }
}

/// For whatever instructions it is compiled.
#[inline(always)]
fn plain<const R: usize, const BITS: usize>(rows: &Rows, x: &[f32]) -> [f32; R] {
    let blocks = rows.scales.len() / R;
    let mut sums = [[0.0_f32; LANES]; R];
    for (chunk, x) in x.as_chunks::<CHUNK>().0.iter().enumerate() {
        let block = chunk / rows.chunks_per_block;
        for (r, sums) in sums.iter_mut().enumerate() {
            let scale = rows.scales[r * blocks + block];
            if BITS == 8 {
                let codes: [u8; CHUNK] = rows.chunk(r, chunk);
                for lane in 0..LANES {
                    let low = f32::from(codes[lane] as i8) * x[lane];
                    let high = f32::from(codes[lane + LANES] as i8) * x[lane + LANES];
                    sums[lane] += scale * (low + high);
                }
            } else {
                let min = rows.mins[r * blocks + block];
                let codes: [u8; LANES] = rows.chunk(r, chunk);
                for lane in 0..LANES {
                    let low = f32::from(codes[lane] & 0xf) * scale + min;
                    let high = f32::from(codes[lane] >> 4) * scale + min;
                    sums[lane] += low * x[lane] + high * x[lane + LANES];
                }
            }
        }
    }
    sums.map(|sums| sums.iter().sum())
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn avx2<const R: usize, const BITS: usize>(rows: &Rows, x: &[f32]) -> [f32; R] {
    plain::<R, BITS>(rows, x)
}

#[cfg(target_arch = "x86_64")]
const NUMBERS: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// As [`plain`]; the sixteen values of a 4-bit block are worked out once and then looked up.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[allow(clippy::needless_range_loop)] // several arrays side by side
fn avx512<const R: usize, const BITS: usize>(rows: &Rows, x: &[f32]) -> [f32; R] {
    use std::arch::x86_64::*;

    // SAFETY (of all loads below): arrays of exactly as many bytes, of any alignment.
    let floats = |x: &[f32; LANES]| unsafe { _mm512_loadu_ps(x.as_ptr()) };
    let bytes = |x: &[u8; LANES]| unsafe { _mm_loadu_si128(x.as_ptr().cast()) };
    let codes = floats(&NUMBERS);
    let blocks = rows.scales.len() / R;
    let mut low_sums = [_mm512_setzero_ps(); R];
    let mut high_sums = [_mm512_setzero_ps(); R];
    let (mut scales, mut values) = ([_mm512_setzero_ps(); R], [_mm512_setzero_ps(); R]);
    let x = x.as_chunks::<LANES>().0;
    for (block, x) in x.chunks(2 * rows.chunks_per_block).enumerate() {
        for r in 0..R {
            scales[r] = _mm512_set1_ps(rows.scales[r * blocks + block]);
            values[r] = _mm512_fmadd_ps(codes, scales[r], _mm512_set1_ps(rows.mins[r * blocks + block]));
        }
        for (chunk, x) in (block * rows.chunks_per_block..).zip(x.as_chunks::<2>().0) {
            let (low_x, high_x) = (floats(&x[0]), floats(&x[1]));
            for r in 0..R {
                if BITS == 8 {
                    let chunk: [u8; CHUNK] = rows.chunk(r, chunk);
                    let [low, high] = chunk.as_chunks::<LANES>().0 else { return [f32::NAN; R] };
                    let low = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(low))), low_x);
                    let high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes(high)));
                    low_sums[r] = _mm512_fmadd_ps(scales[r], _mm512_fmadd_ps(high, high_x, low), low_sums[r]);
                } else {
                    // a look-up minds the lowest four bits alone
                    let halves = _mm512_cvtepu8_epi32(bytes(&rows.chunk(r, chunk)));
                    let low = _mm512_permutexvar_ps(halves, values[r]);
                    let high = _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(halves), values[r]);
                    low_sums[r] = _mm512_fmadd_ps(low, low_x, low_sums[r]);
                    high_sums[r] = _mm512_fmadd_ps(high, high_x, high_sums[r]);
                }
            }
        }
    }
    let mut sums = [0.0; R];
    for r in 0..R {
        sums[r] = _mm512_reduce_add_ps(_mm512_add_ps(low_sums[r], high_sums[r]));
    }
    sums
}

#[cfg(test)]
mod tests;
