//! Helpers of the tests of gates: random logits, and scalar functions to compare with.

use burn::tensor::{Device, Tensor};

use super::Routing;
use crate::testing::{assert_close, floats, noise};

/// Sizes, and a seed of random logits.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub tokens: usize,
    pub n_experts: usize,
    pub top_k: usize,
    pub seed: u64,
}

impl Case {
    /// Of several sizes and seeds: more and fewer tokens than experts, one expert, all of them chosen.
    pub fn some() -> Vec<Self> {
        let sizes = [(24, 4, 2), (7, 5, 3), (1, 8, 1), (32, 8, 2), (9, 1, 1), (12, 2, 2), (16, 12, 4)];
        let each = |seed: u64| {
            sizes.map(|(tokens, n_experts, top_k)| Self { tokens, n_experts, top_k, seed: 17 * seed })
        };
        (1..4).flat_map(each).collect()
    }

    /// Logits `[tokens, n_experts]`, the first experts preferred.
    pub fn tensor(&self) -> Tensor<2> {
        let Self { tokens, n_experts, seed, .. } = *self;
        let device = Device::flex();
        let preference = Tensor::arange(0..n_experts as i64, &device).float().unsqueeze() * -0.3;
        noise([tokens, n_experts], seed, &device) * 3.0 + preference
    }

    /// The same on the host.
    pub fn logits(&self) -> Vec<f64> {
        floats(self.tensor())
    }
}

/// The places of the largest values, the largest first.
pub fn best(row: &[f64], count: usize) -> Vec<usize> {
    let mut left: Vec<usize> = (0..row.len()).collect();
    let mut found = Vec::new();
    while found.len() < count {
        let at = (1..left.len()).fold(0, |best, at| if row[left[at]] > row[left[best]] { at } else { best });
        found.push(left.remove(at));
    }
    found
}

/// The softmax of a row.
pub fn softmax_of(row: &[f64]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|value| value.exp()).sum();
    row.iter().map(|value| value.exp() / sum).collect()
}

/// A routing is as expected, and its counts are those of its experts.
#[track_caller]
pub fn assert_routing(found: &Routing, ids: &[Option<usize>], weights: &[f64], loss: Option<f64>) {
    assert_eq!(found.experts.ids, ids);
    assert_close(found.weights.clone(), weights, 2e-5);
    assert_eq!(found.dropped, ids.iter().filter(|id| id.is_none()).count());
    for (expert, &load) in found.load.iter().enumerate() {
        assert_eq!(load, ids.iter().filter(|id| **id == Some(expert)).count());
    }
    match (found.aux_loss.clone().map(|loss| loss.into_scalar::<f64>()), loss) {
        (Some(found), Some(expected)) => {
            assert!((found - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{found} {expected}");
        }
        (found, expected) => assert_eq!(found, expected),
    }
}
