//! Tiles of chunks: 16-bit numbers by codes of 8 or 4 bits, summed up exactly within a chunk.
//!
//! A [`CHUNK`] of columns is [`PAIRS`] words of two numbers each, then a scale, and with 4 bits what is multiplied besides:
//! the sum of a row's numbers by what code 0 means in a panel's columns. [`rounded`](super::rounded) lays them out.

use super::instructions::Instructions;
use super::tiles::{Ahead, ByTile, DEPTH, Plain, Tile};
#[cfg(target_arch = "x86_64")]
use super::tiles::{Avx2, Avx512, LINE};
use crate::ops::Bits;

/// Columns of a chunk.
pub const CHUNK: usize = 32;
/// Words of two numbers in a chunk.
pub const PAIRS: usize = CHUNK / 2;
/// Words of a chunk with 8 bits.
pub const EIGHT: usize = PAIRS + 1;
/// Words of a chunk with 4 bits.
pub const FOUR: usize = PAIRS + 2;

/// Which tiles of chunks there are, of so many bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunks {
    /// Those of the compiler's choice.
    Plain(Bits),
    /// 8 sums at a time.
    #[cfg(target_arch = "x86_64")]
    Avx2(Bits),
    /// 16 sums at a time, by one instruction.
    #[cfg(target_arch = "x86_64")]
    Vnni(Bits),
}

impl Chunks {
    /// The fastest that these instructions have.
    pub fn of(instructions: Instructions, bits: Bits) -> Self {
        match instructions {
            Instructions::Plain => Self::Plain(bits),
            #[cfg(target_arch = "x86_64")]
            _ if instructions.has_vnni() => Self::Vnni(bits),
            #[cfg(target_arch = "x86_64")]
            _ => Self::Avx2(bits),
        }
    }

    /// Does something by them.
    pub fn run(self, body: impl ByTile) {
        match self {
            Self::Plain(Bits::Eight) => body.run::<PlainChunks<EIGHT>, 8>(),
            Self::Plain(Bits::Four) => body.run::<PlainChunks<FOUR>, 8>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(Bits::Eight) => body.run::<Avx2Chunks<EIGHT>, 16>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(Bits::Four) => body.run::<Avx2Chunks<FOUR>, 16>(),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(Bits::Eight) => body.run::<VnniChunks<EIGHT>, 32>(),
            #[cfg(target_arch = "x86_64")]
            Self::Vnni(Bits::Four) => body.run::<VnniChunks<FOUR>, 32>(),
        }
    }
}

/// Tiles of the compiler's choice.
#[derive(Debug)]
struct PlainChunks<const WORDS: usize>;

impl<const C: usize, const WORDS: usize> Tile<C> for PlainChunks<WORDS> {
    const WORDS: usize = WORDS;
    const ROWS: usize = 4;
    const LANES: usize = C;

    unsafe fn add(x: &[[f32; DEPTH]], panel: &[[f32; C]], sums: &mut [f32], stride: usize, _: Option<Ahead>) {
        let pair = |word: f32| [word.to_bits() as i16, (word.to_bits() >> 16) as i16].map(i32::from);
        for (number, panel) in panel.as_chunks::<WORDS>().0.iter().enumerate() {
            for (x, sums) in x.iter().zip(sums.chunks_mut(stride)) {
                let x = &x[number * WORDS..][..WORDS];
                let mut held = [0; C];
                for (&x, columns) in x.iter().zip(&panel[..PAIRS]) {
                    let [first, second] = pair(x);
                    for (held, &column) in held.iter_mut().zip(columns) {
                        let [low, high] = pair(column);
                        *held += first * low + second * high;
                    }
                }
                for (at, (sum, held)) in sums.iter_mut().zip(held).enumerate() {
                    *sum += held as f32 * panel[PAIRS][at] * x[PAIRS];
                    if WORDS == FOUR {
                        *sum += panel[PAIRS + 1][at] * x[PAIRS + 1];
                    }
                }
            }
        }
    }

    unsafe fn turn(words: &[f32], stride: usize, panel: &mut [[f32; C]], first: usize) {
        // SAFETY: the compiler's choice is instructions that all machines have.
        unsafe { Plain::turn(words, stride, panel, first) };
    }
}

/// The same with vectors that the compiler cannot but keep in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    (
        $(#[$doc:meta])* $name:ident, $features:literal, $floats:ident, $lanes:literal, [$($rows:literal),*],
        [$zero:ident, $splat:ident, $load:ident, $widen:ident],
        [$splat_float:ident, $load_floats:ident, $times:ident, $fma:ident, $store:ident],
        |$sum:ident, $value:ident, $other:ident| $add:expr
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        struct $name<const WORDS: usize>;

        impl<const WORDS: usize> $name<WORDS> {
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // several arrays side by side
            fn tile<const R: usize>(
                x: &[[f32; DEPTH]],
                panel: &[[f32; 2 * $lanes]],
                sums: &mut [f32],
                stride: usize,
                next: Option<Ahead>,
            ) {
                use std::arch::x86_64::*;

                assert!(x.len() == R && panel.len() <= DEPTH && sums.len() >= (R - 1) * stride + 2 * $lanes);
                let (x, sums) = (x.as_ptr().cast::<f32>(), sums.as_mut_ptr());
                for (number, panel) in panel.as_chunks::<WORDS>().0.iter().enumerate() {
                    // SAFETY: there are `R` rows, each of `DEPTH` words, which are as many as a panel may have.
                    let word = |row: usize, at: usize| unsafe { x.add(row * DEPTH + number * WORDS + at) };
                    let halves = |at: usize| [&panel[at][..$lanes], &panel[at][$lanes..]];
                    let mut held = [[$zero(); 2]; R];
                    for at in 0..PAIRS {
                        if let Some(next) = next {
                            let lines = 2 * $lanes / LINE;
                            for line in (number * PAIRS + at) * lines..(number * PAIRS + at + 1) * lines {
                                _mm_prefetch::<_MM_HINT_T1>(next.line(line));
                            }
                        }
                        // SAFETY: both have as many words.
                        let halves = halves(at).map(|half| unsafe { $load(half.as_ptr().cast()) });
                        for row in 0..R {
                            // SAFETY: as above.
                            let $value = $splat(unsafe { *word(row, at).cast() });
                            for half in 0..2 {
                                let ($sum, $other) = (held[row][half], halves[half]);
                                held[row][half] = $add;
                            }
                        }
                    }
                    // SAFETY: as above.
                    let scales = halves(PAIRS).map(|half| unsafe { $load_floats(half.as_ptr()) });
                    // SAFETY: as above.
                    let mins = halves(WORDS - 1).map(|half| unsafe { $load_floats(half.as_ptr()) });
                    // each row on its own, for a loop would have all sums in memory first
                    $(if $rows <= R {
                        let row = $rows - 1;
                        // SAFETY: as above.
                        let scale = $splat_float(unsafe { *word(row, PAIRS) });
                        // SAFETY: as above.
                        let total = $splat_float(unsafe { *word(row, WORDS - 1) });
                        for half in 0..2 {
                            let products = $times($widen(held[row][half]), scales[half]);
                            // SAFETY: so many sums were asked for.
                            unsafe {
                                let to = sums.add(row * stride + half * $lanes);
                                let mut sum = $fma(products, scale, $load_floats(to));
                                if WORDS == FOUR {
                                    sum = $fma(mins[half], total, sum);
                                }
                                $store(to, sum);
                            }
                        }
                    })*
                }
            }
        }

        impl<const WORDS: usize> Tile<{ 2 * $lanes }> for $name<WORDS> {
            const WORDS: usize = WORDS;
            const ROWS: usize = [$($rows),*].len();
            const LANES: usize = $lanes;

            #[target_feature(enable = $features)]
            unsafe fn add(
                x: &[[f32; DEPTH]],
                panel: &[[f32; 2 * $lanes]],
                sums: &mut [f32],
                stride: usize,
                next: Option<Ahead>,
            ) {
                match x.len() {
                    $($rows => Self::tile::<$rows>(x, panel, sums, stride, next),)*
                    rows => panic!("a tile of {rows} rows"),
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn turn(words: &[f32], stride: usize, panel: &mut [[f32; 2 * $lanes]], first: usize) {
                // SAFETY: they need no more than these tiles.
                unsafe { $floats::turn(words, stride, panel, first) };
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 8 sums at a time.
    Avx2Chunks,
    "avx2,fma",
    Avx2,
    8,
    [1, 2, 3, 4, 5, 6],
    [_mm256_setzero_si256, _mm256_set1_epi32, _mm256_loadu_si256, _mm256_cvtepi32_ps],
    [_mm256_set1_ps, _mm256_loadu_ps, _mm256_mul_ps, _mm256_fmadd_ps, _mm256_storeu_ps],
    |sum, value, other| _mm256_add_epi32(sum, _mm256_madd_epi16(value, other))
);
#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 16 sums at a time, by one instruction.
    VnniChunks,
    "avx512f,avx512vnni",
    Avx512,
    16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    [_mm512_setzero_si512, _mm512_set1_epi32, _mm512_loadu_si512, _mm512_cvtepi32_ps],
    [_mm512_set1_ps, _mm512_loadu_ps, _mm512_mul_ps, _mm512_fmadd_ps, _mm512_storeu_ps],
    |sum, value, other| _mm512_dpwssd_epi32(sum, value, other)
);
