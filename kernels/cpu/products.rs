//! Dot products of f16 rows with one f32 row.

use half::f16;

use super::instructions::Instructions;

impl Instructions {
    /// `out[i]` becomes the product of row `i` with `x`. Rows are as wide as `x`; empty ones give 0.
    pub(crate) fn products(self, rows: &[f16], x: &[f32], out: &mut [f32]) {
        if x.is_empty() {
            return out.fill(0.0);
        }
        for (row, out) in rows.chunks_exact(x.len()).zip(out) {
            *out = match self {
                Self::Plain => plain(row, x),
                // SAFETY: `all` found the instructions on this machine.
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => unsafe { avx2(row, x) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => unsafe { avx512(row, x) },
            };
        }
    }
}

fn plain(row: &[f16], x: &[f32]) -> f32 {
    row.iter().zip(x).map(|(value, x)| value.to_f32() * x).sum()
}

/// So many sums side by side hide how long one addition takes.
#[cfg(target_arch = "x86_64")]
const SUMS: usize = 4;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn avx2(row: &[f16], x: &[f32]) -> f32 {
    use std::arch::x86_64::*;

    const LANES: usize = 8;
    let (row_chunks, row_rest) = row.as_chunks::<LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let mut sums = [_mm256_setzero_ps(); SUMS];
    for (row, x) in row_chunks.chunks(SUMS).zip(x_chunks.chunks(SUMS)) {
        for ((row, x), sum) in row.iter().zip(x).zip(&mut sums) {
            // SAFETY: arrays of exactly as many bytes, of any alignment.
            let (row, x) = unsafe { (_mm_loadu_si128(row.as_ptr().cast()), _mm256_loadu_ps(x.as_ptr())) };
            *sum = _mm256_fmadd_ps(_mm256_cvtph_ps(row), x, *sum);
        }
    }
    let [a, b, c, d] = sums;
    let sum = _mm256_add_ps(_mm256_add_ps(a, b), _mm256_add_ps(c, d));
    let mut lanes = [0.0_f32; LANES];
    // SAFETY: as above.
    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
    lanes.iter().sum::<f32>() + plain(row_rest, x_rest)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn avx512(row: &[f16], x: &[f32]) -> f32 {
    use std::arch::x86_64::*;

    const LANES: usize = 16;
    let (row_chunks, row_rest) = row.as_chunks::<LANES>();
    let (x_chunks, x_rest) = x.as_chunks::<LANES>();
    let mut sums = [_mm512_setzero_ps(); SUMS];
    for (row, x) in row_chunks.chunks(SUMS).zip(x_chunks.chunks(SUMS)) {
        for ((row, x), sum) in row.iter().zip(x).zip(&mut sums) {
            // SAFETY: arrays of exactly as many bytes, of any alignment.
            let (row, x) = unsafe { (_mm256_loadu_si256(row.as_ptr().cast()), _mm512_loadu_ps(x.as_ptr())) };
            *sum = _mm512_fmadd_ps(_mm512_cvtph_ps(row), x, *sum);
        }
    }
    let [a, b, c, d] = sums;
    _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d))) + plain(row_rest, x_rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals() {
        let rows = [1.0, 2.0, -3.0, 0.5, 0.0, 4.0].map(f16::from_f32);
        for body in Instructions::all() {
            let mut out = [f32::NAN; 2];
            body.products(&rows, &[10.0, 100.0, 1000.0], &mut out);
            assert_eq!(out, [10.0 + 200.0 - 3000.0, 5.0 + 4000.0], "{body:?}");
            body.products(&[], &[], &mut out);
            assert_eq!(out, [0.0; 2], "{body:?}");
        }
    }

    /// Every body against the plain one, over whole and broken chunks.
    #[test]
    fn bodies_agree() {
        let mut random = fastrand::Rng::with_seed(5);
        for width in (1..70).chain([127, 512, 513]) {
            let mut value = || random.f32() * 2.0 - 1.0;
            let rows: Vec<f16> = (0..3 * width).map(|_| f16::from_f32(value())).collect();
            let x: Vec<f32> = (0..width).map(|_| value()).collect();
            let mut expected = [0.0; 3];
            Instructions::Plain.products(&rows, &x, &mut expected);
            for body in Instructions::all() {
                let mut found = [f32::NAN; 3];
                body.products(&rows, &x, &mut found);
                for (found, expected) in found.iter().zip(expected) {
                    assert!(
                        (found - expected).abs() < 1e-5 * width as f32,
                        "{body:?} {width}: {found} {expected}"
                    );
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "one output per row")]
    fn rows_must_be_whole() {
        crate::ops::products(&[f16::ONE; 5], &[1.0; 2], &mut [0.0; 2]);
    }
}
