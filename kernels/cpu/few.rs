//! Products of few rows with a matrix, which is read once, where it lies, several of its rows at a time: more streams of
//! memory, and sums that do not wait for each other.

use half::{bf16, f16};
use rayon::prelude::*;

use super::instructions::Instructions;
use super::pointwise::fma;

/// Rows of the matrix that are walked at a time.
pub const STREAMS: usize = 4;
/// Values of a matrix that are worth a thread.
const TASK: usize = 128 * 1024;

/// `y = x Wᵀ`: `weight` is `[rows, cols]`, `x` `[many, cols]`, `y` `[many, rows]`; sums are f32.
///
/// # Panics
/// If the sizes do not fit.
pub fn products<T: Held>(weight: &[T], x: &[T], cols: usize, y: &mut [f32]) {
    T::products(Instructions::in_use(), weight, x, cols, y);
}

/// The same in f32.
fn widened_products<T: Held>(instructions: Instructions, weight: &[T], x: &[T], cols: usize, y: &mut [f32]) {
    let x: Vec<f32> = x.iter().map(|x| x.widen()).collect();
    products_with(instructions, weight, &x, cols, y);
}

fn products_with<T: Sync, X: Sync>(
    body: impl RowSums<T, X>,
    weight: &[T],
    x: &[X],
    cols: usize,
    y: &mut [f32],
) {
    if y.is_empty() || cols == 0 {
        return y.fill(0.0);
    }
    let (rows, many) = (weight.len() / cols, x.len() / cols);
    assert_eq!(
        [weight.len(), x.len(), y.len()],
        [rows * cols, many * cols, many * rows],
        "values of [{rows}, {cols}], of {many} rows, and of their products"
    );
    by_streams(y, [many, rows], cols, |first, y| {
        let weight = &weight[first * cols..][..y.len() / many * cols];
        match y.len() / many {
            STREAMS => some_rows::<T, X, STREAMS>(body, weight, x, cols, y),
            _ => {
                for (weight, y) in weight.chunks(cols).zip(y.chunks_mut(many)) {
                    some_rows::<T, X, 1>(body, weight, x, cols, y);
                }
            }
        }
    });
}

/// Calls `body` with the number of a row and room for the products of it and those that follow, [`STREAMS`] or fewer,
/// `[.., many]`, until all rows have theirs, several calls beside each other; then they are in `y`, `[many, rows]`.
pub(super) fn by_streams(
    y: &mut [f32],
    [many, rows]: [usize; 2],
    cols: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) {
    let task = (TASK / cols).next_multiple_of(STREAMS).max(STREAMS); // of rows
    let all = |y: &mut [f32]| {
        let some = |first: usize, y: &mut [f32]| {
            for (at, y) in y.chunks_mut(STREAMS * many).enumerate() {
                body(first + at * STREAMS, y);
            }
        };
        match rows <= task {
            true => some(0, y),
            false => {
                y.par_chunks_mut(task * many).enumerate().for_each(|(number, y)| some(number * task, y));
            }
        }
    };
    if many == 1 {
        return all(y);
    }
    let mut by_row = vec![0.0; many * rows];
    all(&mut by_row);
    for (at, y) in y.chunks_mut(rows).enumerate() {
        for (y, by_row) in y.iter_mut().zip(by_row.chunks(many)) {
            *y = by_row[at];
        }
    }
}

/// `R` rows; `y` is `[R, many]`.
fn some_rows<T, X, const R: usize>(
    body: impl RowSums<T, X>,
    weight: &[T],
    x: &[X],
    cols: usize,
    y: &mut [f32],
) {
    let many = y.len() / R;
    let row = |at: usize| &weight[at * cols..(at + 1) * cols];
    let rows: [&[T]; R] = std::array::from_fn(row);
    let mut at = 0;
    macro_rules! together {
        ($($count:literal),*) => { $(while many - at >= $count {
            let x: [&[X]; $count] = std::array::from_fn(|m| &x[(at + m) * cols..(at + m + 1) * cols]);
            let sums = body.row_sums(rows, x);
            for (y, sums) in y.chunks_mut(many).zip(&sums) {
                y[at..at + $count].copy_from_slice(sums);
            }
            at += $count;
        })* };
    }
    together!(4, 2, 1);
}

/// What multiplies rows.
trait RowSums<T, X>: Copy + Sync {
    /// The products of rows that are equally long.
    fn row_sums<const R: usize, const M: usize>(self, rows: [&[T]; R], x: [&[X]; M]) -> [[f32; M]; R];
}

impl<T: Held> RowSums<T, f32> for Instructions {
    #[inline]
    fn row_sums<const R: usize, const M: usize>(self, rows: [&[T]; R], x: [&[f32]; M]) -> [[f32; M]; R] {
        match self {
            Self::Plain => plain(rows, x),
            // SAFETY: `all` found the instructions on this machine.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { avx2(rows, x) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => unsafe { avx512(rows, x) },
        }
    }
}

/// Pairs of bf16, where [`Instructions::has_pairs`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct Pairs;

#[cfg(target_arch = "x86_64")]
impl RowSums<bf16, bf16> for Pairs {
    #[inline]
    fn row_sums<const R: usize, const M: usize>(self, rows: [&[bf16]; R], x: [&[bf16]; M]) -> [[f32; M]; R] {
        // SAFETY: it is only made where the machine has them.
        unsafe { pairs(rows, x) }
    }
}

/// The product of two rows, of as many values.
#[inline(always)]
pub fn dot<T: Held, const FMA: bool>(x: &[f32], values: &[T]) -> f32 {
    /// Sums that are kept side by side.
    const LANES: usize = 16;

    let (wide, rest) = x.as_chunks::<LANES>();
    let (held, held_rest) = values.as_chunks::<LANES>();
    let mut sums = [0.0_f32; LANES];
    for (x, values) in wide.iter().zip(held) {
        for lane in 0..LANES {
            sums[lane] = fma::<FMA>(x[lane], values[lane].widen(), sums[lane]);
        }
    }
    let rest: f32 = rest.iter().zip(held_rest).map(|(x, value)| x * value.widen()).sum();
    sums.iter().sum::<f32>() + rest
}

/// How values of a matrix are held.
pub trait Held: Copy + Sync {
    /// The value.
    fn widen(self) -> f32;

    /// See [`products`].
    fn products(instructions: Instructions, weight: &[Self], x: &[Self], cols: usize, y: &mut [f32]) {
        widened_products(instructions, weight, x, cols, y);
    }

    /// Eight of them.
    ///
    /// # Safety
    /// There are so many, and the machine has AVX2 and F16C.
    #[cfg(target_arch = "x86_64")]
    unsafe fn eight(from: *const Self) -> std::arch::x86_64::__m256;

    /// Sixteen of them.
    ///
    /// # Safety
    /// There are so many, and the machine has AVX-512 F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn sixteen(from: *const Self) -> std::arch::x86_64::__m512;
}

/// `widen`, `eight` and `sixteen` of a type.
macro_rules! held {
    ($type:ty, |$value:ident| $widen:expr, |$from:ident| $eight:expr, $sixteen:expr $(, $products:item)?) => {
        impl Held for $type {
            $($products)?

            #[inline(always)]
            fn widen(self) -> f32 {
                let $value = self;
                $widen
            }

            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx2,f16c")]
            unsafe fn eight($from: *const Self) -> std::arch::x86_64::__m256 {
                use std::arch::x86_64::*;
                // SAFETY: the caller's.
                unsafe { $eight }
            }

            #[cfg(target_arch = "x86_64")]
            #[inline]
            #[target_feature(enable = "avx512f")]
            unsafe fn sixteen($from: *const Self) -> std::arch::x86_64::__m512 {
                use std::arch::x86_64::*;
                // SAFETY: the caller's.
                unsafe { $sixteen }
            }
        }
    };
}

held!(f32, |value| value, |from| _mm256_loadu_ps(from), _mm512_loadu_ps(from));
held!(
    f16,
    |value| value.to_f32(),
    |from| _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
    _mm512_cvtph_ps(_mm256_loadu_si256(from.cast()))
);
held!(
    bf16,
    |value| f32::from_bits(u32::from(value.to_bits()) << 16),
    |from| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())))),
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())))),
    fn products(instructions: Instructions, weight: &[Self], x: &[Self], cols: usize, y: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if instructions.has_pairs() {
            return products_with(Pairs, weight, x, cols, y);
        }
        widened_products(instructions, weight, x, cols, y);
    }
);

/// For whatever instructions it is compiled.
fn plain<T: Held, const R: usize, const M: usize>(rows: [&[T]; R], x: [&[f32]; M]) -> [[f32; M]; R] {
    const LANES: usize = 8;
    let one = |row: &[T], x: &[f32]| {
        let mut sums = [0.0_f32; LANES];
        for (row, x) in row.chunks(LANES).zip(x.chunks(LANES)) {
            for ((sum, value), x) in sums.iter_mut().zip(row).zip(x) {
                *sum += value.widen() * x;
            }
        }
        sums.iter().sum()
    };
    rows.map(|row| x.map(|x| one(row, x)))
}

/// The same with vectors that the compiler cannot but keep in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    ($name:ident, $features:literal, $lanes:literal, $load:ident, $zero:ident, $fma:ident, $add:ident, $store:ident) => {
        #[target_feature(enable = $features)]
        fn $name<T: Held, const R: usize, const M: usize>(rows: [&[T]; R], x: [&[f32]; M]) -> [[f32; M]; R] {
            use std::arch::x86_64::*;

            let cols = rows.iter().map(|row| row.len()).chain(x.iter().map(|x| x.len())).min().unwrap_or(0);
            // two sums of each hide how long one addition takes
            let mut sums = [[[$zero(); 2]; M]; R];
            let whole = cols / (2 * $lanes) * (2 * $lanes);
            for at in (0..whole).step_by(2 * $lanes) {
                for half in 0..2 {
                    let at = at + half * $lanes;
                    for r in 0..R {
                        // SAFETY: so many columns are left in all rows.
                        let row = unsafe { T::$load(rows[r].as_ptr().add(at)) };
                        for m in 0..M {
                            // SAFETY: as above.
                            let x = unsafe { f32::$load(x[m].as_ptr().add(at)) };
                            sums[r][m][half] = $fma(row, x, sums[r][m][half]);
                        }
                    }
                }
            }
            let mut out = plain(rows.map(|row| &row[whole..]), x.map(|x| &x[whole..]));
            for r in 0..R {
                for m in 0..M {
                    let mut lanes = [0.0_f32; $lanes];
                    // SAFETY: an array of exactly as many bytes.
                    unsafe { $store(lanes.as_mut_ptr(), $add(sums[r][m][0], sums[r][m][1])) };
                    out[r][m] += lanes.iter().sum::<f32>();
                }
            }
            out
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(
    avx2,
    "avx2,fma,f16c",
    8,
    eight,
    _mm256_setzero_ps,
    _mm256_fmadd_ps,
    _mm256_add_ps,
    _mm256_storeu_ps
);
#[cfg(target_arch = "x86_64")]
vectors!(avx512, "avx512f", 16, sixteen, _mm512_setzero_ps, _mm512_fmadd_ps, _mm512_add_ps, _mm512_storeu_ps);

/// The same of pairs: half as many instructions for a line of memory, so that more lines are on their way.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
#[allow(clippy::needless_range_loop)] // several arrays side by side
fn pairs<const R: usize, const M: usize>(rows: [&[bf16]; R], x: [&[bf16]; M]) -> [[f32; M]; R] {
    use std::arch::x86_64::{
        __m512, __m512bh, _MM_HINT_T1, _mm_prefetch, _mm512_add_ps, _mm512_dpbf16_ps, _mm512_loadu_ps,
        _mm512_reduce_add_ps, _mm512_setzero_ps,
    };

    /// Of a line of memory.
    const LANES: usize = 32;
    let cols = rows.iter().chain(&x).map(|row| row.len()).min().unwrap_or(0);
    let mut sums = [[[_mm512_setzero_ps(); 2]; M]; R];
    let whole = cols / (2 * LANES) * (2 * LANES);
    // SAFETY: so many columns are left in all rows; pairs of bf16 are words.
    let load = |row: &[bf16], at: usize| unsafe {
        std::mem::transmute::<__m512, __m512bh>(_mm512_loadu_ps(row.as_ptr().add(at).cast()))
    };
    for at in (0..whole).step_by(2 * LANES) {
        for half in 0..2 {
            let at = at + half * LANES;
            for r in 0..R {
                // rows are too short for the machine to foresee those that come next
                _mm_prefetch::<_MM_HINT_T1>(rows[r].as_ptr().wrapping_add(R * cols + at).cast());
                let row = load(rows[r], at);
                for m in 0..M {
                    sums[r][m][half] = _mm512_dpbf16_ps(sums[r][m][half], row, load(x[m], at));
                }
            }
        }
    }
    let rest = x.map(|x| x[whole..].iter().map(|x| x.widen()).collect::<Vec<f32>>());
    let mut out = plain(rows.map(|row| &row[whole..]), rest.each_ref().map(Vec::as_slice));
    for r in 0..R {
        for m in 0..M {
            out[r][m] += _mm512_reduce_add_ps(_mm512_add_ps(sums[r][m][0], sums[r][m][1]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    fn noise(count: usize, seed: u64) -> Vec<f32> {
        random(count, &mut fastrand::Rng::with_seed(seed)).iter().map(|&x| x as f32).collect()
    }

    fn agree<T: Held>(hold: impl Fn(f32) -> T) {
        for (rows, cols) in [(1, 1), (3, 7), (4, 16), (5, 33), (9, 64), (130, 70), (70, 1025)] {
            let weight: Vec<T> = noise(rows * cols, 1).into_iter().map(&hold).collect();
            for many in [1, 2, 3, 4, 7, 15] {
                let x = noise(many * cols, 2);
                for body in Instructions::all() {
                    let mut y = vec![f32::NAN; rows * many];
                    products_with(body, &weight, &x, cols, &mut y);
                    for (at, y) in y.iter().enumerate() {
                        let row = &weight[at % rows * cols..][..cols];
                        let x = &x[at / rows * cols..][..cols];
                        let terms = row.iter().zip(x).map(|(w, x)| f64::from(w.widen()) * f64::from(*x));
                        let expected: f64 = terms.sum();
                        assert!(
                            (f64::from(*y) - expected).abs() < 1e-6 * (cols as f64).sqrt().max(2.0),
                            "{body:?} [{rows}, {cols}], {many}: value {at} is {y}, expected {expected}"
                        );
                    }
                }
            }
        }
    }

    /// Every body, whole and broken chunks of columns, groups of rows and of what they are taken times.
    #[test]
    fn bodies_agree() {
        agree(|value| value);
        agree(f16::from_f32);
        agree(bf16::from_f32);
    }

    #[test]
    fn of_nothing_come_zeros() {
        let mut y = [f32::NAN; 6];
        products::<f32>(&[], &[], 0, &mut y);
        assert_eq!(y, [0.0; 6]);
        products::<f32>(&[], &[1.0; 4], 2, &mut []);
    }

    #[test]
    #[should_panic(expected = "values of [2, 3]")]
    fn sizes_must_fit() {
        products(&[1.0_f32; 6], &[1.0; 3], 3, &mut [0.0; 3]);
    }
}
