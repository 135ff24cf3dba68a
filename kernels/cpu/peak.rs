//! What this machine can do: products in registers, and reading from memory.

use std::hint::black_box;
use std::time::Instant;

use rayon::prelude::*;

use super::instructions::Instructions;

/// The most that was measured, by all threads together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Peak {
    /// Floating point operations in f32 a second, between registers, with the [`Instructions`] in use.
    pub operations: f64,
    /// Bytes a second that are read from memory, in order.
    pub bytes: f64,
}

impl Peak {
    /// Measures for about half a second; what else runs meanwhile is missing from it.
    pub fn measure() -> Self {
        const ROUNDS: usize = 1 << 20;
        const BYTES: usize = 256 << 20;
        let threads = rayon::current_num_threads();
        let operations = best(|| {
            let lanes =
                (0..threads).into_par_iter().map(|_| black_box(chains(Instructions::in_use(), ROUNDS)).0);
            (lanes.sum::<usize>() * ROUNDS * CHAINS * 2) as f64
        });
        let words = vec![1_u64; BYTES / size_of::<u64>()];
        let bytes = best(|| {
            let sum: u64 = words.par_chunks(1 << 16).map(|words| words.iter().sum::<u64>()).sum();
            black_box(sum);
            BYTES as f64
        });
        Self { operations, bytes }
    }
}

/// The highest of a few rates.
fn best(mut work: impl FnMut() -> f64) -> f64 {
    let mut rate = || {
        let start = Instant::now();
        work() / start.elapsed().as_secs_f64()
    };
    (0..5).map(|_| rate()).fold(0.0, f64::max)
}

/// Sums side by side: as many as hide how long one product takes.
const CHAINS: usize = 12;

/// Where `x = a x + b` goes, again and again, from 1 on. Returns how many numbers that was and where one of them got.
fn chains(instructions: Instructions, rounds: usize) -> (usize, f32) {
    match instructions {
        Instructions::Plain => plain(rounds),
        // SAFETY (of both): these are instructions of this machine.
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx2 => unsafe { avx2(rounds) },
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => unsafe { avx512(rounds) },
    }
}

/// The fixed point is 1.
const FACTOR: f32 = 0.75;
const SUMMAND: f32 = 0.25;

fn plain(rounds: usize) -> (usize, f32) {
    let (a, b) = (black_box([FACTOR; 4]), black_box([SUMMAND; 4]));
    let mut chains = [[1.0_f32; 4]; CHAINS];
    for _ in 0..rounds {
        for chain in &mut chains {
            for (x, (a, b)) in chain.iter_mut().zip(a.iter().zip(&b)) {
                *x = match cfg!(target_arch = "aarch64") {
                    true => x.mul_add(*a, *b),
                    false => *x * a + b,
                };
            }
        }
    }
    (4, black_box(chains)[0][0])
}

#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    ($name:ident, $features:literal, $lanes:literal, $set:ident, $fma:ident, $first:ident) => {
        #[target_feature(enable = $features)]
        fn $name(rounds: usize) -> (usize, f32) {
            use std::arch::x86_64::*;

            let (a, b) = ($set(black_box(FACTOR)), $set(black_box(SUMMAND)));
            let mut chains = [$set(1.0); CHAINS];
            for _ in 0..rounds {
                for chain in &mut chains {
                    *chain = $fma(*chain, a, b);
                }
            }
            let first = chains.into_iter().fold(0.0, |sum, chain| sum + $first(chain));
            ($lanes, first / CHAINS as f32)
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(avx2, "avx2,fma", 8, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_cvtss_f32);
#[cfg(target_arch = "x86_64")]
vectors!(avx512, "avx512f", 16, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_cvtss_f32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_computes_and_reads() {
        let Peak { operations, bytes } = Peak::measure();
        assert!(operations.is_finite() && operations > 1e7, "{operations}");
        assert!(bytes.is_finite() && bytes > 1e7, "{bytes}");
    }

    /// They stay at the fixed point.
    #[test]
    fn chains_are_computed() {
        for body in Instructions::all() {
            let (lanes, reached) = chains(body, 1000);
            assert!(lanes >= 4 && (reached - 1.0).abs() < 1e-4, "{body:?} {reached}");
        }
    }
}
