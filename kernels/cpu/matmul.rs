//! Products of two matrices.
//!
//! The right one is packed, some columns and rows of it at a time, so that it stays in the nearest cache while rows of the
//! left one go by; a tile of the product is summed in registers. What is packed next is asked for while the first tile is
//! summed, as few rows wait for memory only. How large the tiles are depends on the instructions.

use super::host::by_task;
use super::instructions::Instructions;

/// So many rows, at most, are one thread's at a time.
const BLOCK: usize = 256;
/// Rows of the right matrix that are packed at a time.
const DEPTH: usize = 256;

/// The right matrix, `[d_in, d_out]`.
#[derive(Clone, Copy)]
pub enum Right<'a> {
    /// Row after row.
    Rows(&'a [f32]),
    /// Column after column, as checkpoints have the weights of linear layers.
    Columns(&'a [f32]),
}

/// `x w`: `x` is `[rows, d_in]`, `w` `[d_in, d_out]`; several threads beside each other; `finish` gets whole rows of it as they are done.
///
/// # Panics
/// If the sizes do not fit.
pub fn by_blocks(
    x: &[f32],
    w: Right,
    [rows, d_in, d_out]: [usize; 3],
    finish: impl Fn(&mut [f32]) + Sync,
) -> Vec<f32> {
    let mut out = vec![0.0; rows * d_out];
    let block = rows.div_ceil(rayon::current_num_threads()).clamp(1, BLOCK);
    by_task(&mut out, block * d_out, |at, values| {
        let (first, count) = (at / d_out, values.len() / d_out);
        matmul(&x[first * d_in..(first + count) * d_in], w, [d_in, d_out], values);
        finish(values);
    });
    out
}

/// `out = x w` on the calling thread: `x` is `[rows, d_in]`, `w` `[d_in, d_out]`, `out` `[rows, d_out]`, row after row.
///
/// # Panics
/// If the sizes do not fit.
pub fn matmul(x: &[f32], w: Right, shape: [usize; 2], out: &mut [f32]) {
    multiply(Instructions::in_use(), x, w, shape, out);
}

fn multiply(instructions: Instructions, x: &[f32], w: Right, [d_in, d_out]: [usize; 2], out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let rows = out.len() / d_out;
    let (Right::Rows(weights) | Right::Columns(weights)) = w;
    assert_eq!(
        [x.len(), weights.len(), out.len()],
        [rows * d_in, d_in * d_out, rows * d_out],
        "values of both matrices and of their product (left) of [{rows}, {d_in}, {d_out}]"
    );
    if d_in == 0 {
        return out.fill(0.0);
    }
    match instructions {
        Instructions::Plain => by_tiles::<Plain, 4, 8>(x, w, [d_in, d_out], out),
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => by_tiles::<Avx2, 6, 16>(x, w, [d_in, d_out], out),
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => by_tiles::<Avx512, 14, 32>(x, w, [d_in, d_out], out),
    }
}

/// By tiles of `R` rows and `C` columns.
fn by_tiles<T: Tiles<C>, const R: usize, const C: usize>(
    x: &[f32],
    w: Right,
    [d_in, d_out]: [usize; 2],
    out: &mut [f32],
) {
    let mut panel = [[0.0_f32; C]; DEPTH];
    for depth in (0..d_in).step_by(DEPTH) {
        let panel = &mut panel[..DEPTH.min(d_in - depth)];
        for column in (0..d_out).step_by(C) {
            let wide = C.min(d_out - column);
            let next = match w {
                Right::Rows(w) => {
                    let w = &w[depth * d_out..];
                    pack_rows(w, d_out, column, wide, panel);
                    Next { start: w.as_ptr().wrapping_add(column + C), stride: d_out, lines: 0 }
                }
                Right::Columns(w) => {
                    let w = &w[column * d_in..];
                    // SAFETY: `multiply` chose instructions of this machine.
                    unsafe { T::pack_columns(w, d_in, depth, wide, panel) };
                    let start = w.as_ptr().wrapping_add(C * d_in + depth);
                    Next { start, stride: d_in, lines: (DEPTH / C).ilog2() }
                }
            };
            let mut place = Place { d_in, d_out, wide, add: depth > 0, next: Some(next) };
            let (mut x, mut out) = (x, &mut *out);
            macro_rules! tiles {
                ($($rows:expr),*) => { $(while $rows <= R && out.len() >= $rows * d_out {
                    let x_tile = &x[depth..($rows - 1) * d_in + depth + panel.len()];
                    // SAFETY: `multiply` chose instructions of this machine, and so many rows were just cut out.
                    unsafe { T::tile::<{ $rows }>(x_tile, panel, &mut out[column..], place) };
                    place.next = None;
                    (x, out) = (&x[$rows * d_in..], &mut out[$rows * d_out..]);
                })* };
            }
            tiles!(R, 8, 4, 2, 1);
        }
    }
}

/// `wide` columns from `column` on of rows that follow each other.
#[inline(always)]
fn pack_rows<const C: usize>(w: &[f32], d_out: usize, column: usize, wide: usize, panel: &mut [[f32; C]]) {
    for (packed, row) in panel.iter_mut().zip(w.chunks(d_out)) {
        match row[column..].first_chunk::<C>() {
            Some(whole) => *packed = *whole,
            None => {
                *packed = [0.0; C];
                packed[..wide].copy_from_slice(&row[column..]);
            }
        }
    }
}

/// Rows from `depth` on of `wide` columns that follow each other.
#[inline(always)]
fn pack_columns<const C: usize>(w: &[f32], d_in: usize, depth: usize, wide: usize, panel: &mut [[f32; C]]) {
    if wide < C {
        panel.fill([0.0; C]);
    }
    for (at, column) in w.chunks(d_in).take(wide).enumerate() {
        for (packed, &value) in panel.iter_mut().zip(&column[depth..]) {
            packed[at] = value;
        }
    }
}

/// Where a tile is.
#[derive(Clone, Copy)]
struct Place {
    /// How far rows of `x` are apart.
    d_in: usize,
    /// How far rows of the product are apart.
    d_out: usize,
    /// How many of the packed columns there are.
    wide: usize,
    /// Whether it is added to what is there.
    add: bool,
    /// What is packed next, asked for on the way.
    next: Option<Next>,
}

/// What is packed after a panel.
#[derive(Clone, Copy)]
struct Next {
    start: *const f32,
    /// How far what follows each other there is apart.
    stride: usize,
    /// The logarithm of how many times as wide as a panel each is.
    lines: u32,
}

/// Tiles of `C` columns.
trait Tiles<const C: usize> {
    /// `R` rows of `out` become those of `x` times the packed columns.
    ///
    /// # Safety
    /// The machine has the instructions, and `x` has `R` rows, `panel` long.
    unsafe fn tile<const R: usize>(x: &[f32], panel: &[[f32; C]], out: &mut [f32], place: Place);

    /// Rows from `depth` on of `wide` columns that follow each other.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn pack_columns(w: &[f32], d_in: usize, depth: usize, wide: usize, panel: &mut [[f32; C]]) {
        pack_columns(w, d_in, depth, wide, panel);
    }
}

struct Plain;

impl<const C: usize> Tiles<C> for Plain {
    unsafe fn tile<const R: usize>(x: &[f32], panel: &[[f32; C]], out: &mut [f32], place: Place) {
        let mut sums = [[0.0_f32; C]; R];
        for (at, columns) in panel.iter().enumerate() {
            for (row, sums) in sums.iter_mut().enumerate() {
                let value = x[row * place.d_in + at];
                for (sum, &column) in sums.iter_mut().zip(columns) {
                    *sum = match cfg!(target_arch = "aarch64") {
                        true => value.mul_add(column, *sum),
                        false => value * column + *sum,
                    };
                }
            }
        }
        for (row, sums) in sums.iter().enumerate() {
            put(sums, &mut out[row * place.d_out..][..place.wide], place.add);
        }
    }
}

/// The same with vectors that the compiler cannot but keep in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    ($name:ident, $features:literal, $lanes:literal, $zero:ident, $splat:ident, $load:ident, $fma:ident, $store:ident, $turn:ident) => {
        struct $name;

        impl Tiles<{ 2 * $lanes }> for $name {
            #[target_feature(enable = $features)]
            unsafe fn tile<const R: usize>(
                x: &[f32],
                panel: &[[f32; 2 * $lanes]],
                out: &mut [f32],
                place: Place,
            ) {
                use std::arch::x86_64::*;

                let mut sums = [[$zero(); 2]; R];
                for (at, columns) in panel.iter().enumerate() {
                    if let Some(Next { start, stride, lines }) = place.next {
                        let within = (at & ((1 << lines) - 1)) * 2 * $lanes;
                        let next = start.wrapping_add((at >> lines) * stride + within);
                        for line in (0..2 * $lanes).step_by(16) {
                            _mm_prefetch::<_MM_HINT_T0>(next.wrapping_add(line).cast());
                        }
                    }
                    // SAFETY: both halves of an array.
                    let halves = unsafe { [$load(columns.as_ptr()), $load(columns.as_ptr().add($lanes))] };
                    for row in 0..R {
                        // SAFETY: `x` has `R` rows, as the caller made sure.
                        let value = $splat(unsafe { *x.get_unchecked(row * place.d_in + at) });
                        sums[row][0] = $fma(value, halves[0], sums[row][0]);
                        sums[row][1] = $fma(value, halves[1], sums[row][1]);
                    }
                }
                for row in 0..R {
                    let mut values = [0.0; 2 * $lanes];
                    // SAFETY: as above.
                    unsafe {
                        $store(values.as_mut_ptr(), sums[row][0]);
                        $store(values.as_mut_ptr().add($lanes), sums[row][1]);
                    }
                    put(&values, &mut out[row * place.d_out..][..place.wide], place.add);
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn pack_columns(
                w: &[f32],
                d_in: usize,
                depth: usize,
                wide: usize,
                panel: &mut [[f32; 2 * $lanes]],
            ) {
                let whole = if wide < 2 * $lanes { 0 } else { panel.len() / $lanes * $lanes };
                let (blocks, rest) = panel.split_at_mut(whole);
                pack_columns(w, d_in, depth + whole, wide, rest);
                for (depth, block) in (depth..).step_by($lanes).zip(blocks.chunks_mut($lanes)) {
                    for half in [0, $lanes] {
                        $turn(&w[half * d_in + depth..], d_in, block, half);
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(
    Avx2,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_fmadd_ps,
    _mm256_storeu_ps,
    turn_8
);
#[cfg(target_arch = "x86_64")]
vectors!(
    Avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_fmadd_ps,
    _mm512_storeu_ps,
    turn_16
);

/// `[rows, columns]` turned, `[columns, rows]`.
#[cfg(feature = "autodiff")]
pub fn turned(x: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    /// Both sides of what is turned at a time: a line of a cache, which is read and written whole.
    const SIDE: usize = 16;
    let mut out = vec![0.0; rows * columns];
    by_task(&mut out, SIDE * rows.max(1), |at, values| {
        let first = at / rows;
        for row in (0..rows).step_by(SIDE) {
            for (column, out) in (first..).zip(values.chunks_mut(rows)) {
                let out = &mut out[row..rows.min(row + SIDE)];
                for (at, out) in out.iter_mut().enumerate() {
                    *out = x[(row + at) * columns + column];
                }
            }
        }
    });
    out
}

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

/// Writes sums, or adds them to what is there.
#[inline(always)]
fn put<const C: usize>(sums: &[f32; C], out: &mut [f32], add: bool) {
    match add {
        true => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum),
        false => out.copy_from_slice(&sums[..out.len()]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    /// Whole and broken tiles and depths, one of each, none, with all instructions.
    #[test]
    fn bodies_are_sums_of_products() {
        let sizes = [
            (1, 1, 1),
            (3, 2, 5),
            (14, 256, 32),
            (31, 257, 33),
            (5, 600, 70),
            (29, 40, 16),
            (0, 3, 4),
            (4, 0, 3),
            (3, 4, 0),
        ];
        for (rows, d_in, d_out) in sizes {
            let mut rng = fastrand::Rng::with_seed(rows as u64);
            let mut values =
                |count| -> Vec<f32> { random(count, &mut rng).iter().map(|&x| x as f32).collect() };
            let (x, w) = (values(rows * d_in), values(d_in * d_out));
            let columns: Vec<f32> =
                (0..d_in * d_out).map(|at| w[at % d_in.max(1) * d_out + at / d_in.max(1)]).collect();
            let expected: Vec<f64> = (0..rows * d_out)
                .map(|at| {
                    let (row, column) = (at / d_out, at % d_out);
                    let product = |k| f64::from(x[row * d_in + k]) * f64::from(w[k * d_out + column]);
                    (0..d_in).map(product).sum()
                })
                .collect();
            for (instructions, right) in Instructions::all().into_iter().flat_map(|instructions| {
                [Right::Rows(&w), Right::Columns(&columns)].map(|right| (instructions, right))
            }) {
                let mut out = vec![f32::NAN; rows * d_out];
                multiply(instructions, &x, right, [d_in, d_out], &mut out);
                for (at, (found, expected)) in out.iter().zip(&expected).enumerate() {
                    let error = (f64::from(*found) - expected).abs();
                    assert!(
                        error <= 1e-6 * (d_in as f64).sqrt(),
                        "{instructions:?} [{rows}, {d_in}, {d_out}] {at}: {found} for {expected}"
                    );
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "of [2, 3, 4]")]
    fn sizes_must_fit() {
        matmul(&[0.0; 5], Right::Rows(&[0.0; 12]), [3, 4], &mut [0.0; 8]);
    }
}
