//! Tiles of a product, which are summed in registers.
//!
//! Rows are words that follow each other, a panel is words of `C` columns. A word is a number in f32, or two neighbours of the
//! inner axis in bf16.

use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
use super::amx::{Amx, Released, has_amx};
use super::chunks::Chunks;
use super::instructions::Instructions;

/// Words of a row, at most.
pub const DEPTH: usize = 256;
/// Words of a cache's line.
pub const LINE: usize = 16;

/// What matrices hold.
pub trait Number: Pod + Default + Send + Sync {
    /// The fastest tiles that these instructions have.
    fn tiles(instructions: Instructions) -> Tiles {
        Tiles::of_floats(instructions)
    }

    /// Numbers that follow each other on the inner axis, as words.
    fn words<K: Tile<C>, const C: usize>(from: &[Self], to: &mut [f32]);

    /// The same where they are words as they lie.
    fn as_words<K: Tile<C>, const C: usize>(_from: &[Self]) -> Option<&[f32]> {
        None
    }

    /// Numbers beside each other on the other axis, each a word with that in `next`, if there is such.
    fn across<K: Tile<C>, const C: usize>(from: &[Self], next: Option<&[Self]>, to: &mut [f32]);

    /// Rounds.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Number for f32 {
    fn as_words<K: Tile<C>, const C: usize>(from: &[f32]) -> Option<&[f32]> {
        Some(from)
    }

    #[inline(always)]
    fn words<K: Tile<C>, const C: usize>(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn across<K: Tile<C>, const C: usize>(from: &[f32], _: Option<&[f32]>, to: &mut [f32]) {
        match (from.first_chunk::<C>(), to.first_chunk_mut::<C>()) {
            (Some(from), Some(to)) => *to = *from, // without a call
            _ => to.copy_from_slice(from),
        }
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for f16 {
    fn words<K: Tile<C>, const C: usize>(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn across<K: Tile<C>, const C: usize>(from: &[f16], _: Option<&[f16]>, to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Number for bf16 {
    fn tiles(instructions: Instructions) -> Tiles {
        match Tiles::of_floats(instructions) {
            #[cfg(target_arch = "x86_64")]
            Tiles::Avx512 if has_amx() => Tiles::Amx,
            #[cfg(target_arch = "x86_64")]
            Tiles::Avx512 if instructions.has_pairs() => Tiles::Pairs,
            tiles => tiles,
        }
    }

    fn as_words<K: Tile<C>, const C: usize>(from: &[bf16]) -> Option<&[f32]> {
        bytemuck::try_cast_slice(from).ok().filter(|_| K::PER_WORD == 2)
    }

    #[inline(always)]
    fn words<K: Tile<C>, const C: usize>(from: &[bf16], to: &mut [f32]) {
        if K::PER_WORD == 1 {
            return from.iter().zip(to).for_each(|(&from, to)| *to = pair(bf16::ZERO, from));
        }
        let (pairs, odd) = from.as_chunks::<2>();
        to.iter_mut().zip(pairs).for_each(|(to, &[low, high])| *to = pair(low, high));
        if let (Some(to), Some(&odd)) = (to.get_mut(pairs.len()), odd.first()) {
            *to = pair(odd, bf16::ZERO);
        }
    }

    #[inline(always)]
    fn across<K: Tile<C>, const C: usize>(from: &[bf16], next: Option<&[bf16]>, to: &mut [f32]) {
        let both = to.iter_mut().zip(from);
        match next {
            Some(next) => both.zip(next).for_each(|((to, &low), &high)| *to = pair(low, high)),
            None if K::PER_WORD == 2 => both.for_each(|(to, &low)| *to = pair(low, bf16::ZERO)),
            None => both.for_each(|(to, &from)| *to = pair(bf16::ZERO, from)),
        }
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(from);
    }
}

/// Two numbers in a word. One above zero is the same number in f32.
#[inline(always)]
fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
}

/// What is done by tiles.
pub trait ByTile {
    /// Does it.
    fn run<K: Tile<C>, const C: usize>(self);
}

/// Adds to rows of `sums`, `stride` apart, the products of as many rows of `x` with a panel, which has whole words (see
/// [`Tile::whole_words`]). `next` is asked for on the way.
pub fn multiply<K: Tile<C>, const C: usize>(
    mut x: &[[f32; DEPTH]],
    panel: &[[f32; C]],
    mut sums: &mut [f32],
    stride: usize,
    mut next: Option<Ahead>,
) {
    // tiles of similar height: low ones wait for each sum
    let mut tiles = x.len().div_ceil(K::ROWS);
    while !x.is_empty() {
        let rows = x.len().div_ceil(tiles);
        // SAFETY: whoever chose the tile found its instructions on this machine.
        unsafe { K::add(&x[..rows], panel, sums, stride, next.take()) };
        (x, tiles) = (&x[rows..], tiles - 1);
        sums = sums.get_mut(rows * stride..).unwrap_or_default();
    }
}

/// Which tiles there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiles {
    /// Those of the compiler's choice.
    Plain,
    /// 8 numbers at a time.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 numbers at a time.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 16 pairs of bf16 at a time.
    #[cfg(target_arch = "x86_64")]
    Pairs,
    /// 16 rows of 16 pairs of bf16 at a time.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// Chunks of whole numbers.
    Chunks(Chunks),
}

impl Tiles {
    /// Those of f32.
    pub fn of_floats(instructions: Instructions) -> Self {
        match instructions {
            Instructions::Plain => Self::Plain,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
        }
    }

    /// Does something by them.
    pub fn run(self, body: impl ByTile) {
        match self {
            Self::Plain => body.run::<Plain, 8>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => body.run::<Avx2, 16>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => body.run::<Avx512, 32>(),
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => body.run::<Pairs, 32>(),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => {
                let _released = Released;
                body.run::<Amx, 32>();
            }
            Self::Chunks(chunks) => chunks.run(body),
        }
    }
}

/// Tiles of `C` columns.
pub trait Tile<const C: usize> {
    /// Places of the inner axis in a word.
    const PER_WORD: usize = 1;
    /// Words that are multiplied at a time.
    const WORDS: usize = 1;
    /// Rows of a tile, at most.
    const ROWS: usize;
    /// Columns that are turned at a time.
    const LANES: usize;

    /// Words that so many places of the inner axis take in a panel and in rows: a multiple of [`Self::WORDS`], zeros beyond.
    fn whole_words(places: usize) -> usize {
        places.div_ceil(Self::PER_WORD).next_multiple_of(Self::WORDS)
    }

    /// Adds to rows of `sums`, `stride` apart, the products of as many of `x`, up to [`Self::ROWS`], with a panel.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn add(
        x: &[[f32; DEPTH]],
        panel: &[[f32; C]],
        sums: &mut [f32],
        stride: usize,
        next: Option<Ahead>,
    );

    /// [`Self::LANES`] rows of words, `stride` apart, become columns of a panel, from `first` on.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn turn(words: &[f32], stride: usize, panel: &mut [[f32; C]], first: usize);
}

/// `lanes` rows of words, `stride` apart, become columns of a panel, from `first` on; their words from `from` on alone.
fn turn<const C: usize>(
    words: &[f32],
    stride: usize,
    lanes: usize,
    panel: &mut [[f32; C]],
    first: usize,
    from: usize,
) {
    for (at, row) in words.chunks(stride).take(lanes).enumerate() {
        for (words, word) in panel.iter_mut().zip(row).skip(from) {
            words[first + at] = *word;
        }
    }
}

/// Tiles of the compiler's choice.
#[derive(Debug)]
pub struct Plain;

impl<const C: usize> Tile<C> for Plain {
    const ROWS: usize = 4;
    const LANES: usize = C;

    unsafe fn add(x: &[[f32; DEPTH]], panel: &[[f32; C]], sums: &mut [f32], stride: usize, _: Option<Ahead>) {
        let mut held = [[0.0_f32; C]; 4];
        for (at, columns) in panel.iter().enumerate() {
            for (x, held) in x.iter().zip(&mut held) {
                for (sum, &column) in held.iter_mut().zip(columns) {
                    *sum = match cfg!(target_arch = "aarch64") {
                        true => x[at].mul_add(column, *sum),
                        false => x[at] * column + *sum,
                    };
                }
            }
        }
        for ((held, sums), _) in held.iter().zip(sums.chunks_mut(stride)).zip(x) {
            sums.iter_mut().zip(held).for_each(|(sum, held)| *sum += held);
        }
    }

    unsafe fn turn(words: &[f32], stride: usize, panel: &mut [[f32; C]], first: usize) {
        turn(words, stride, C, panel, first, 0);
    }
}

/// The same with vectors that the compiler cannot but keep in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    (
        $(#[$doc:meta])* $name:ident, $features:literal, $per_word:literal, $lanes:literal, [$($rows:literal),*],
        $zero:ident, $splat:ident, $load:ident, $plus:ident, $store:ident, $turn:ident,
        |$sum:ident, $value:ident, $other:ident| $add:expr
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name;

        impl $name {
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
                let (x, sums) = (x.as_ptr(), sums.as_mut_ptr());
                let mut held = [[$zero(); 2]; R];
                for (at, columns) in panel.iter().enumerate() {
                    if let Some(next) = next {
                        for line in 0..2 * $lanes / LINE {
                            _mm_prefetch::<_MM_HINT_T1>(next.line(at * (2 * $lanes / LINE) + line));
                        }
                    }
                    // SAFETY: both halves of an array.
                    let halves = unsafe { [$load(columns.as_ptr()), $load(columns.as_ptr().add($lanes))] };
                    for row in 0..R {
                        // SAFETY: there are `R` rows, and each has as many words as a panel may have.
                        let $value = $splat(unsafe { *x.add(row).cast::<f32>().add(at) });
                        for half in 0..2 {
                            let ($sum, $other) = (held[row][half], halves[half]);
                            held[row][half] = $add;
                        }
                    }
                }
                for row in 0..R {
                    for half in 0..2 {
                        // SAFETY: so many rows were asked for.
                        unsafe {
                            let sum = sums.add(row * stride + half * $lanes);
                            $store(sum, $plus($load(sum), held[row][half]));
                        }
                    }
                }
            }
        }

        impl Tile<{ 2 * $lanes }> for $name {
            const PER_WORD: usize = $per_word;
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
                let whole = panel.len() / $lanes * $lanes;
                for (at, block) in (0..).step_by($lanes).zip(panel[..whole].chunks_mut($lanes)) {
                    $turn(&words[at..], stride, block, first);
                }
                if whole < panel.len() {
                    turn(words, stride, $lanes, panel, first, whole);
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 8 numbers at a time.
    Avx2,
    "avx2,fma",
    1,
    8,
    [1, 2, 3, 4, 5, 6],
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_add_ps,
    _mm256_storeu_ps,
    turn_8,
    |sum, value, other| _mm256_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 16 numbers at a time.
    Avx512,
    "avx512f",
    1,
    16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_add_ps,
    _mm512_storeu_ps,
    turn_16,
    |sum, value, other| _mm512_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 16 pairs of bf16 at a time.
    Pairs,
    "avx512f,avx512bf16",
    2,
    16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_add_ps,
    _mm512_storeu_ps,
    turn_16,
    |sum, value, other| {
        // SAFETY: words of as many bits.
        let [value, other] = unsafe { std::mem::transmute::<[__m512; 2], [__m512bh; 2]>([value, other]) };
        _mm512_dpbf16_ps(sum, value, other)
    }
);

/// 8 rows of `w`, `stride` apart, become columns of `panel` from `first` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn turn_8(w: &[f32], stride: usize, panel: &mut [[f32; 16]], first: usize) {
    use std::arch::x86_64::*;

    let mut rows = [_mm256_setzero_ps(); 8];
    for (at, row) in rows.iter_mut().enumerate() {
        // SAFETY: so many numbers were just cut out.
        *row = unsafe { _mm256_loadu_ps(w[at * stride..][..8].as_ptr()) };
    }
    let pairs: [__m256; 8] = std::array::from_fn(|at| match at % 2 {
        0 => _mm256_unpacklo_ps(rows[at], rows[at + 1]),
        _ => _mm256_unpackhi_ps(rows[at - 1], rows[at]),
    });
    // Of four rows, place `at % 4` in each half.
    let fours: [__m256; 8] = std::array::from_fn(|at| {
        let (low, high) = (pairs[at / 4 * 4 + at % 4 / 2], pairs[at / 4 * 4 + at % 4 / 2 + 2]);
        match at % 2 {
            0 => _mm256_shuffle_ps::<0x44>(low, high),
            _ => _mm256_shuffle_ps::<0xee>(low, high),
        }
    });
    for (at, packed) in panel[..8].iter_mut().enumerate() {
        let (low, high) = (fours[at % 4], fours[4 + at % 4]);
        let row = match at / 4 {
            0 => _mm256_permute2f128_ps::<0x20>(low, high),
            _ => _mm256_permute2f128_ps::<0x31>(low, high),
        };
        // SAFETY: so many numbers were just cut out.
        unsafe { _mm256_storeu_ps(packed[first..first + 8].as_mut_ptr(), row) };
    }
}

/// 16 rows of `w`, `stride` apart, become columns of `panel` from `first` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn turn_16(w: &[f32], stride: usize, panel: &mut [[f32; 32]], first: usize) {
    use std::arch::x86_64::*;

    let mut rows = [_mm512_setzero_ps(); 16];
    for (at, row) in rows.iter_mut().enumerate() {
        // SAFETY: so many numbers were just cut out.
        *row = unsafe { _mm512_loadu_ps(w[at * stride..][..16].as_ptr()) };
    }
    let mut pairs = rows;
    for at in (0..16).step_by(2) {
        pairs[at] = _mm512_unpacklo_ps(rows[at], rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_ps(rows[at], rows[at + 1]);
    }
    // Of four rows, place `at % 4` in each quarter.
    let mut fours = pairs;
    for at in (0..16).step_by(4) {
        for half in 0..2 {
            let [low, high] = [pairs[at + half], pairs[at + 2 + half]].map(|pair| _mm512_castps_pd(pair));
            fours[at + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            fours[at + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for place in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|rows| fours[rows + place]);
        let [low, high] = [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)];
        let [low_2, high_2] = [_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d)];
        let quarters = [
            _mm512_shuffle_f32x4::<0x88>(low, low_2),
            _mm512_shuffle_f32x4::<0xdd>(low, low_2),
            _mm512_shuffle_f32x4::<0x88>(high, high_2),
            _mm512_shuffle_f32x4::<0xdd>(high, high_2),
        ];
        for (quarter, row) in quarters.into_iter().enumerate() {
            let packed = &mut panel[4 * quarter + place][first..first + 16];
            // SAFETY: so many numbers were just cut out.
            unsafe { _mm512_storeu_ps(packed.as_mut_ptr(), row) };
        }
    }
}

/// Lines of memory that are asked for early.
#[derive(Clone, Copy, Debug)]
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))] // nothing else is told to ask
pub struct Ahead {
    start: *const u8,
    /// Bytes from one run of lines to the next.
    stride: usize,
    /// The logarithm of how many lines follow each other.
    run: u32,
    /// Lines that are left out.
    from: usize,
}

impl Ahead {
    /// Runs of so many numbers, every `stride` numbers.
    pub fn new<T>(start: *const T, stride: usize, run: usize) -> Self {
        let run = (run / (4 * LINE) * size_of::<T>()).max(1).ilog2();
        Self { start: start.cast(), stride: stride * size_of::<T>(), run, from: 0 }
    }

    /// Without so many of the first ones.
    pub fn after(self, lines: usize) -> Self {
        Self { from: self.from + lines, ..self }
    }

    /// A line.
    #[inline(always)]
    #[cfg(target_arch = "x86_64")]
    pub fn line(self, at: usize) -> *const i8 {
        let at = self.from + at;
        let within = at & ((1 << self.run) - 1);
        self.start.wrapping_add((at >> self.run) * self.stride + within * 4 * LINE).cast()
    }
}
