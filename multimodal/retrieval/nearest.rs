use std::cmp::Ordering;
use std::collections::BinaryHeap;

use half::f16;
use rayon::prelude::*;
use volary_kernels::ops::products;

/// So many bytes of vectors are compared with every query before the next ones are read: they stay in a core's cache.
const BLOCK: usize = 1 << 17;

/// A vector that was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Its place among the vectors.
    pub row: usize,
    /// Its dot product with the query: the cosine, if both are unit vectors.
    pub similarity: f32,
}

impl Eq for Hit {}

/// What comes first is less: the more similar, and of equally similar ones the lower row.
impl Ord for Hit {
    fn cmp(&self, other: &Self) -> Ordering {
        other.similarity.total_cmp(&self.similarity).then(self.row.cmp(&other.row))
    }
}

impl PartialOrd for Hit {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The best hits so far; the worst of them is at the heap's top.
struct Best {
    hits: BinaryHeap<Hit>,
    top: usize,
}

impl Best {
    fn new(top: usize) -> Self {
        Self { hits: BinaryHeap::new(), top }
    }

    fn offer(&mut self, hit: Hit) {
        if self.hits.len() < self.top {
            self.hits.push(hit);
        } else if let Some(mut worst) = self.hits.peek_mut()
            && hit < *worst
        {
            *worst = hit;
        }
    }

    fn merged(mut self, other: Self) -> Self {
        other.hits.into_iter().for_each(|hit| self.offer(hit));
        self
    }
}

/// The `top` vectors most similar to each query, the most similar first; of equally similar ones the lower row comes
/// first. Every vector is compared (no approximation), products are summed in f32. What gives NaN comes last.
///
/// `vectors` `[rows, d_embed]` and `queries` `[queries, d_embed]`, row after row.
///
/// # Panics
/// If `d_embed` is 0, or a slice does not hold whole rows.
pub fn nearest(vectors: &[f16], queries: &[f32], d_embed: usize, top: usize) -> Vec<Vec<Hit>> {
    assert!(d_embed > 0, "vectors have a width");
    assert!(vectors.len().is_multiple_of(d_embed), "whole rows of vectors");
    assert!(queries.len().is_multiple_of(d_embed), "whole rows of queries");
    let rows = (BLOCK / 2 / d_embed).max(1);
    let none = || -> Vec<Best> { queries.chunks_exact(d_embed).map(|_| Best::new(top)).collect() };
    let best = vectors
        .par_chunks(rows * d_embed)
        .enumerate()
        .fold(
            || (none(), vec![0.0; rows]),
            |(mut best, mut scores), (block, vectors)| {
                let scores_here = &mut scores[..vectors.len() / d_embed];
                for (best, query) in best.iter_mut().zip(queries.chunks_exact(d_embed)) {
                    products(vectors, query, scores_here);
                    for (row, &score) in scores_here.iter().enumerate() {
                        // one zero, not two; and NaN is no similarity
                        let similarity = if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 };
                        best.offer(Hit { row: block * rows + row, similarity });
                    }
                }
                (best, scores)
            },
        )
        .map(|(best, _)| best)
        .reduce(none, |a, b| a.into_iter().zip(b).map(|(a, b)| a.merged(b)).collect());
    best.into_iter().map(|best| best.hits.into_sorted_vec()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The plain twin: all scores, sorted.
    fn brute_force(vectors: &[f16], query: &[f32], top: usize) -> Vec<Hit> {
        let score = |row: &[f16]| row.iter().zip(query).map(|(a, b)| a.to_f32() * b).sum::<f32>();
        let scores = vectors.chunks_exact(query.len()).map(score);
        let mut hits: Vec<Hit> =
            scores.enumerate().map(|(row, similarity)| Hit { row, similarity: similarity + 0.0 }).collect();
        hits.sort_by(|a, b| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row)));
        hits.truncate(top);
        hits
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Small whole numbers: every sum is exact in any order, and ties are many.
        #[test]
        fn equals_brute_force(d_embed in 1_usize..40, rows in 0_usize..300, n in 0_usize..4, top in 0_usize..20, seed: u64) {
            let mut random = fastrand::Rng::with_seed(seed);
            let vectors: Vec<f16> =
                (0..rows * d_embed).map(|_| f16::from_f32(random.i8(-2..=2).into())).collect();
            let queries: Vec<f32> = (0..n * d_embed).map(|_| random.i8(-2..=2).into()).collect();
            let found = nearest(&vectors, &queries, d_embed, top);
            prop_assert_eq!(found.len(), n);
            for (found, query) in found.iter().zip(queries.chunks_exact(d_embed)) {
                prop_assert_eq!(found, &brute_force(&vectors, query, top));
            }
        }
    }

    /// More rows than one block has, wide rows.
    #[test]
    fn blocks_are_put_together() {
        let d_embed = 512;
        let mut random = fastrand::Rng::with_seed(9);
        let vectors: Vec<f16> =
            (0..1000 * d_embed).map(|_| f16::from_f32(random.i8(-2..=2).into())).collect();
        let query: Vec<f32> = (0..d_embed).map(|_| random.i8(-2..=2).into()).collect();
        assert_eq!(nearest(&vectors, &query, d_embed, 50), [brute_force(&vectors, &query, 50)]);
    }

    #[test]
    fn ties_go_to_the_lower_row_and_nan_comes_last() {
        let vectors = [f16::NAN, f16::from_f32(-1.0), f16::NEG_ZERO, f16::ZERO, f16::ONE, f16::ONE];
        let rows: Vec<usize> =
            nearest(&vectors, &[1.0], 1, usize::MAX)[0].iter().map(|hit| hit.row).collect();
        assert_eq!(rows, [4, 5, 2, 3, 1, 0]);
    }
}
