//! Exact search among vectors, the file that keeps them, and how well queries find their counterparts.

mod file;
mod journal;
mod nearest;

pub use file::{ModelHash, VectorFile, VectorFileError, write_vectors};
pub use journal::{Journal, Segment};
pub use nearest::{Hit, nearest};

/// The share of queries whose counterpart is among the best `k` candidates.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Recall {
    /// Among the first.
    pub at_1: f64,
    /// Among the first five.
    pub at_5: f64,
    /// Among the first ten.
    pub at_10: f64,
}

/// Recall of `queries` against `candidates`, both unit vectors of width `d_embed`, row after row; query
/// `i`'s counterpart is candidate `targets[i]`. Of equal similarities the lower index comes first.
///
/// # Panics
/// If the slices are not whole rows, or a target is out of range.
pub fn recall(queries: &[f32], candidates: &[f32], targets: &[usize], d_embed: usize) -> Recall {
    assert_eq!(queries.len(), targets.len() * d_embed, "one target per query");
    let mut found = [0usize; 3];
    for (query, &target) in queries.chunks_exact(d_embed).zip(targets) {
        let similarity = |candidate: &[f32]| -> f32 { query.iter().zip(candidate).map(|(a, b)| a * b).sum() };
        let own = similarity(&candidates[target * d_embed..][..d_embed]);
        let better = candidates.chunks_exact(d_embed).enumerate().filter(|(index, candidate)| {
            let other = similarity(candidate);
            other > own || (other == own && *index < target)
        });
        let rank = better.count();
        for (hits, k) in found.iter_mut().zip([1, 5, 10]) {
            *hits += usize::from(rank < k);
        }
    }
    let share = |hits: usize| hits as f64 / targets.len().max(1) as f64;
    Recall { at_1: share(found[0]), at_5: share(found[1]), at_10: share(found[2]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_counted_from_one() {
        // Candidates at growing angles from the query; the counterpart is the sixth best.
        let candidates: Vec<f32> = (0..12)
            .flat_map(|i| {
                let angle = i as f32 * 0.1;
                [angle.cos(), angle.sin()]
            })
            .collect();
        let found = recall(&[1.0, 0.0], &candidates, &[5], 2);
        assert_eq!(found, Recall { at_1: 0.0, at_5: 0.0, at_10: 1.0 });
    }

    #[test]
    fn a_tie_goes_to_the_lower_index() {
        let candidates = [1.0, 0.0, 1.0, 0.0];
        let found = recall(&[1.0, 0.0, 1.0, 0.0], &candidates, &[0, 1], 2);
        assert_eq!(found.at_1, 0.5);
    }
}
