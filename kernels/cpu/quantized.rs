//! Products of few rows with a packed matrix: it is read once, block by block, and unpacked in registers.
//!
//! A row is walked in chunks of 32 columns, several rows at a time: more streams of memory and independent sums. The
//! chunk of a 4-bit row is 16 bytes whose low halves are its even columns, so the activations are laid out alike: the
//! 16 even columns of every chunk before the 16 odd ones. Packed rows are too short for the machine to foresee what is
//! read next: it is told.

use half::f16;

use super::few::{STREAMS, by_streams};
use super::instructions::{self, Instructions};
use crate::ops::{Bits, PackedMatrix, Quantization};

/// Columns of a chunk.
const CHUNK: usize = 32;
/// Sums that are kept side by side: half of a chunk.
const LANES: usize = CHUNK / 2;
/// How many bytes of a row are asked for before they are needed.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 2048;

/// `y = x Wᵀ`: `x` is `[many, cols]`, `y` `[many, rows]`; none of them is empty.
pub fn products(weight: &PackedMatrix, x: &[f32], y: &mut [f32]) {
    products_with(Instructions::in_use(), weight, x, y);
}

pub(super) fn products_with(body: Instructions, weight: &PackedMatrix, x: &[f32], y: &mut [f32]) {
    let [rows, cols] = weight.shape();
    let Quantization { bits, block } = weight.quantization();
    let laid_out: Vec<f32> = x.chunks(cols).flat_map(|x| lay_out(x, bits)).collect();
    let x = Activations { x: &laid_out, width: cols.next_multiple_of(CHUNK) };
    let many = laid_out.len() / x.width;
    by_streams(y, [many, rows], cols, |first, y| {
        if !block.is_multiple_of(CHUNK) && block < cols {
            return broken(weight, first, x, y);
        }
        match y.len() / many {
            STREAMS => some_rows::<STREAMS>(body, weight, first, x, y),
            _ => {
                for (row, y) in (first..).zip(y.chunks_mut(many)) {
                    some_rows::<1>(body, weight, row, x, y);
                }
            }
        }
    });
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

/// The values of a row, `q * scale + min`.
pub(crate) struct Unpack<'a> {
    /// How the row is packed.
    pub quantization: Quantization,
    /// Its codes.
    pub codes: &'a [u8],
    /// Of each block.
    pub scales: &'a [f16],
    /// Of each block; see [`PackedMatrix::halves`].
    pub mins: Option<&'a [f16]>,
    /// As many as there are codes.
    pub out: &'a mut [f32],
}

impl instructions::Body for Unpack<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { quantization: Quantization { bits, block }, codes, scales, mins, out } = self;
        match bits {
            Bits::Eight => {
                out.iter_mut().zip(codes).for_each(|(out, &code)| *out = f32::from(code as i8));
            }
            Bits::Four => {
                for ([even, odd], &code) in out.as_chunks_mut().0.iter_mut().zip(codes) {
                    (*even, *odd) = (f32::from(code & 0xf), f32::from(code >> 4));
                }
            }
        }
        for (at, out) in out.chunks_mut(block).enumerate() {
            let scale = scales[at].to_f32();
            let min = match (mins, bits) {
                (Some(mins), _) => mins[at].to_f32(),
                (None, Bits::Eight) => 0.0,
                (None, Bits::Four) => -8.0 * scale,
            };
            out.iter_mut().for_each(|value| *value = *value * scale + min);
        }
    }
}

/// Rows of blocks that end within a chunk, unpacked beforehand; `y` is `[.., many]`.
fn broken(weight: &PackedMatrix, first: usize, x: Activations, y: &mut [f32]) {
    let [_, cols] = weight.shape();
    let mut row = vec![0.0; cols];
    for (at, y) in (first..).zip(y.chunks_mut(x.x.len() / x.width)) {
        weight.unpack_row(at, &mut row);
        let row = lay_out(&row, weight.quantization().bits);
        for (y, x) in y.iter_mut().zip(x.x.chunks(x.width)) {
            *y = row.iter().zip(x).map(|(w, x)| w * x).sum();
        }
    }
}

/// `y` is `[R, many]`.
fn some_rows<const R: usize>(
    body: Instructions,
    weight: &PackedMatrix,
    first: usize,
    x: Activations,
    y: &mut [f32],
) {
    let Quantization { bits, block } = weight.quantization();
    let [_, cols] = weight.shape();
    let (scales, mins) = weight.halves(first..first + R);
    let rows = Rows {
        codes: weight.codes(first..first + R),
        scales,
        mins,
        width: bits.bytes(cols),
        chunks_per_block: block.div_ceil(CHUNK),
    };
    let many = y.len() / R;
    let mut at = 0;
    macro_rules! together {
        ($($count:literal),*) => { $(while many - at >= $count {
            let x: [&[f32]; $count] = std::array::from_fn(|m| &x.x[(at + m) * x.width..(at + m + 1) * x.width]);
            let sums = match bits {
                Bits::Eight => body.packed_sums::<8, R, $count>(&rows, x),
                Bits::Four => body.packed_sums::<4, R, $count>(&rows, x),
            };
            for (y, sums) in y.chunks_mut(many).zip(&sums) {
                y[at..at + $count].copy_from_slice(sums);
            }
            at += $count;
        })* };
    }
    together!(2, 1);
}

/// Packed rows whose blocks are whole chunks.
struct Rows<'a> {
    /// `[R, width]`
    codes: &'a [u8],
    /// `[R, blocks]`
    scales: &'a [f16],
    /// `[R, blocks]`; see [`PackedMatrix::halves`]
    mins: Option<&'a [f16]>,
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

    /// Scale and minimum of a block.
    #[inline(always)]
    fn range(&self, at: usize) -> (f32, f32) {
        let scale = self.scales[at].to_f32();
        (scale, self.mins.map_or(-8.0 * scale, |mins| mins[at].to_f32()))
    }
}

impl Instructions {
    /// The products of `R` rows with `M` rows of activations.
    #[inline]
    fn packed_sums<const BITS: usize, const R: usize, const M: usize>(
        self,
        rows: &Rows,
        x: [&[f32]; M],
    ) -> [[f32; M]; R] {
        match self {
            Self::Plain => plain::<BITS, R, M>(rows, x),
            // SAFETY: `all` found the instructions on this machine.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2::<BITS, R, M>(rows, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512::<BITS, R, M>(rows, x) },
        }
    }
}

/// For whatever instructions it is compiled.
#[inline(always)]
fn plain<const BITS: usize, const R: usize, const M: usize>(rows: &Rows, x: [&[f32]; M]) -> [[f32; M]; R] {
    let blocks = rows.scales.len() / R;
    let mut out = [[0.0; M]; R];
    for (r, out) in out.iter_mut().enumerate() {
        for (x, out) in x.iter().zip(out) {
            let mut sums = [0.0_f32; LANES];
            for (block, x) in x.chunks(rows.chunks_per_block * CHUNK).enumerate() {
                let (scale, min) = rows.range(r * blocks + block);
                for (chunk, x) in (block * rows.chunks_per_block..).zip(x.as_chunks::<CHUNK>().0) {
                    if BITS == 8 {
                        let codes: [u8; CHUNK] = rows.chunk(r, chunk);
                        for lane in 0..LANES {
                            let low = f32::from(codes[lane] as i8) * x[lane];
                            let high = f32::from(codes[lane + LANES] as i8) * x[lane + LANES];
                            sums[lane] += scale * (low + high);
                        }
                    } else {
                        let codes: [u8; LANES] = rows.chunk(r, chunk);
                        for lane in 0..LANES {
                            let low = f32::from(codes[lane] & 0xf) * scale + min;
                            let high = f32::from(codes[lane] >> 4) * scale + min;
                            sums[lane] += low * x[lane] + high * x[lane + LANES];
                        }
                    }
                }
            }
            *out = sums.iter().sum();
        }
    }
    out
}

/// Broken chunks at the ends of rows, filled up with zeros, and how many whole ones come before.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn last<const R: usize>(rows: &Rows, chunk_bytes: usize) -> ([[u8; CHUNK]; R], usize) {
    let whole = rows.width / chunk_bytes;
    let last = std::array::from_fn(|r| {
        let mut last = [0; CHUNK];
        let rest = &rows.codes[r * rows.width + whole * chunk_bytes..(r + 1) * rows.width];
        last[..rest.len()].copy_from_slice(rest);
        last
    });
    (last, whole)
}

/// As [`plain`], eight values at a time.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
#[allow(clippy::needless_range_loop)] // several arrays side by side
fn avx2<const BITS: usize, const R: usize, const M: usize>(rows: &Rows, x: [&[f32]; M]) -> [[f32; M]; R] {
    use std::arch::x86_64::*;

    let half = |half: f16| _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half.to_bits().into())));
    let blocks = rows.scales.len() / R;
    let chunks = x.iter().map(|x| x.len() / CHUNK).min().unwrap_or(0);
    let chunk_bytes = CHUNK * BITS / 8;
    let (last, whole) = last::<R>(rows, chunk_bytes);
    let mut ahead = Ahead::new(rows.width);
    let mut sums = [[_mm256_setzero_ps(); M]; R];
    for block in 0..blocks {
        let first = block * rows.chunks_per_block;
        let scales: [__m256; R] = std::array::from_fn(|r| half(rows.scales[r * blocks + block]));
        let mins: [__m256; R] = std::array::from_fn(|r| match (BITS, rows.mins) {
            (8, _) => _mm256_setzero_ps(),
            (_, Some(mins)) => half(mins[r * blocks + block]),
            (_, None) => _mm256_mul_ps(scales[r], _mm256_set1_ps(-8.0)),
        });
        for chunk in first..chunks.min(first + rows.chunks_per_block) {
            if (chunk * chunk_bytes).is_multiple_of(LINE) {
                ahead.codes::<R>(rows);
            }
            for r in 0..R {
                // SAFETY: a whole chunk is within its row, and the last one an array of its own.
                let codes: [__m256i; 4] = unsafe {
                    let codes = match chunk < whole {
                        true => rows.codes.as_ptr().add(r * rows.width + chunk * chunk_bytes),
                        false => last[r].as_ptr(),
                    };
                    if BITS == 8 {
                        [0, 8, 16, 24].map(|at| _mm256_cvtepi8_epi32(_mm_loadl_epi64(codes.add(at).cast())))
                    } else {
                        let (both, lowest) = (_mm_loadu_si128(codes.cast()), _mm_set1_epi8(0xf));
                        let low = _mm_and_si128(both, lowest);
                        let high = _mm_and_si128(_mm_srli_epi16::<4>(both), lowest);
                        [low, _mm_srli_si128::<8>(low), high, _mm_srli_si128::<8>(high)]
                            .map(|codes| _mm256_cvtepu8_epi32(codes))
                    }
                };
                let values =
                    codes.map(|codes| _mm256_fmadd_ps(_mm256_cvtepi32_ps(codes), scales[r], mins[r]));
                for m in 0..M {
                    for (at, value) in values.into_iter().enumerate() {
                        // SAFETY: all activations have so many chunks.
                        let x = unsafe { _mm256_loadu_ps(x[m].as_ptr().add(chunk * CHUNK + 8 * at)) };
                        sums[r][m] = _mm256_fmadd_ps(value, x, sums[r][m]);
                    }
                }
            }
        }
    }
    sums.map(|sums| {
        sums.map(|sums| {
            let mut lanes = [0.0_f32; 8];
            // SAFETY: an array of exactly as many bytes.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sums) };
            lanes.iter().sum()
        })
    })
}

#[cfg(target_arch = "x86_64")]
const NUMBERS: [f32; LANES] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// As [`plain`]; the sixteen values of a 4-bit block are worked out once and then looked up.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
#[allow(clippy::needless_range_loop)] // several arrays side by side
fn avx512<const BITS: usize, const R: usize, const M: usize>(rows: &Rows, x: [&[f32]; M]) -> [[f32; M]; R] {
    use std::arch::x86_64::*;

    /// Blocks whose scales are read at a time.
    const BLOCKS: usize = 16;
    // SAFETY: an array of exactly as many bytes.
    let numbers = unsafe { _mm512_loadu_ps(NUMBERS.as_ptr()) };
    let halves = |halves: &[f16]| {
        let mask = ((1_u32 << halves.len()) - 1) as u16;
        // SAFETY: what is beyond the slice is masked out.
        _mm512_cvtph_ps(unsafe { _mm256_maskz_loadu_epi16(mask, halves.as_ptr().cast()) })
    };
    let blocks = rows.scales.len() / R;
    let chunks = x.iter().map(|x| x.len() / CHUNK).min().unwrap_or(0);
    let chunk_bytes = CHUNK * BITS / 8;
    let (last, whole) = last::<R>(rows, chunk_bytes);
    let mut ahead = Ahead::new(rows.width);
    let mut sums = [[[_mm512_setzero_ps(); 2]; M]; R];
    let (mut scales, mut mins) = ([[0.0_f32; BLOCKS]; R], [[0.0_f32; BLOCKS]; R]);
    for group in (0..blocks).step_by(BLOCKS) {
        let count = BLOCKS.min(blocks - group);
        for r in 0..R {
            let here = r * blocks + group;
            let scale = halves(&rows.scales[here..here + count]);
            ahead.ranges(&rows.scales[here], R * blocks);
            let mut min = _mm512_mul_ps(scale, _mm512_set1_ps(-8.0));
            if let Some(all) = rows.mins {
                min = halves(&all[here..here + count]);
                ahead.ranges(&all[here], R * blocks);
            }
            // SAFETY: arrays of exactly as many bytes.
            unsafe {
                _mm512_storeu_ps(scales[r].as_mut_ptr(), scale);
                _mm512_storeu_ps(mins[r].as_mut_ptr(), min);
            }
        }
        for at in 0..count {
            let values: [__m512; R] = std::array::from_fn(|r| {
                let scale = _mm512_set1_ps(scales[r][at]);
                match BITS {
                    8 => scale,
                    _ => _mm512_fmadd_ps(numbers, scale, _mm512_set1_ps(mins[r][at])),
                }
            });
            let first = (group + at) * rows.chunks_per_block;
            for chunk in first..chunks.min(first + rows.chunks_per_block) {
                if (chunk * chunk_bytes).is_multiple_of(LINE) {
                    ahead.codes::<R>(rows);
                }
                for r in 0..R {
                    // SAFETY: a whole chunk is within its row, and the last one an array of its own.
                    let [low, high] = unsafe {
                        let codes = match chunk < whole {
                            true => rows.codes.as_ptr().add(r * rows.width + chunk * chunk_bytes),
                            false => last[r].as_ptr(),
                        };
                        if BITS == 8 {
                            [codes, codes.add(LANES)].map(|codes| {
                                let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(codes.cast()));
                                _mm512_mul_ps(_mm512_cvtepi32_ps(codes), values[r])
                            })
                        } else {
                            // a look-up minds the lowest four bits alone
                            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()));
                            [codes, _mm512_srli_epi32::<4>(codes)]
                                .map(|codes| _mm512_permutexvar_ps(codes, values[r]))
                        }
                    };
                    for m in 0..M {
                        // SAFETY: all activations have so many chunks.
                        unsafe {
                            let x = x[m].as_ptr().add(chunk * CHUNK);
                            sums[r][m][0] = _mm512_fmadd_ps(low, _mm512_loadu_ps(x), sums[r][m][0]);
                            sums[r][m][1] =
                                _mm512_fmadd_ps(high, _mm512_loadu_ps(x.add(LANES)), sums[r][m][1]);
                        }
                    }
                }
            }
        }
    }
    sums.map(|sums| sums.map(|[low, high]| _mm512_reduce_add_ps(_mm512_add_ps(low, high))))
}

/// What is fetched at a time.
#[cfg(target_arch = "x86_64")]
const LINE: usize = 64;

/// Asks for what is needed [`AHEAD`] of a row later, there or in the rows behind these, which are walked next.
#[cfg(target_arch = "x86_64")]
struct Ahead {
    /// Rows of so many bytes.
    width: usize,
    /// The place in a row.
    place: usize,
    /// How many groups of rows come before its own.
    groups: usize,
}

#[cfg(target_arch = "x86_64")]
impl Ahead {
    fn new(width: usize) -> Self {
        Self { width, place: AHEAD % width, groups: AHEAD / width }
    }

    /// For the next line of each row.
    #[inline(always)]
    fn codes<const R: usize>(&mut self, rows: &Rows) {
        for r in 0..R {
            fetch(rows.codes.as_ptr().wrapping_add((self.groups * R + r) * self.width + self.place));
        }
        self.place += LINE;
        if self.place >= self.width {
            self.place -= self.width;
            self.groups += 1;
        }
    }

    /// For what is at the same place of a later group of rows; `size` is how far groups are apart.
    #[inline(always)]
    fn ranges(&self, here: &f16, size: usize) {
        fetch(std::ptr::from_ref(here).wrapping_add(AHEAD.div_ceil(self.width) * size).cast());
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch(from: *const u8) {
    use std::arch::x86_64::*;
    // SAFETY: a hint, which any address may be given.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(from.cast()) };
}

#[cfg(test)]
mod tests;
