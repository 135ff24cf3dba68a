use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Tensor, TensorData};

use super::Choices;

/// How evenly experts are loaded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Balance {
    /// Standard deviation of the loads over their mean.
    pub variation: f64,
    /// The largest load over the mean.
    pub max_over_mean: f64,
    /// The largest load over the smallest, one added to each.
    pub max_over_min: f64,
    /// Entropy of the loads in nats, at most `ln n_experts`.
    pub entropy: f64,
    /// What part of the choices was dropped.
    pub drop_rate: f64,
}

impl Balance {
    /// Of the choices that each expert gets, and how many were dropped. Without any choice all is 0 but `max_over_min`.
    pub fn of(load: &[usize], dropped: usize) -> Self {
        let kept: usize = load.iter().sum();
        let mean = kept as f64 / load.len().max(1) as f64;
        let (max, min) = (load.iter().max().copied().unwrap_or(0), load.iter().min().copied().unwrap_or(0));
        let over_mean = |value: f64| if mean > 0.0 { value / mean } else { 0.0 };
        let squares: f64 = load.iter().map(|&load| (load as f64 - mean).powi(2)).sum();
        let part = |load: usize| load as f64 / kept as f64;
        let surprise = |&load: &usize| if load > 0 { -part(load) * part(load).ln() } else { 0.0 };
        Self {
            variation: over_mean((squares / load.len().max(1) as f64).sqrt()),
            max_over_mean: over_mean(max as f64),
            max_over_min: (max + 1) as f64 / (min + 1) as f64,
            entropy: load.iter().map(surprise).sum(),
            drop_rate: dropped as f64 / (kept + dropped).max(1) as f64,
        }
    }
}

/// What part of so many tokens each expert gets: `[n_experts]`. It has no gradient.
fn fractions(choices: &Choices, of: usize, like: &Tensor<2>) -> Tensor<1> {
    let parts: Vec<f32> = choices.load().into_iter().map(|load| load as f32 / of.max(1) as f32).collect();
    let count = parts.len();
    Tensor::from_data(TensorData::new(parts, [count]), (&like.device(), DType::F32))
}

/// The loss of GShard (Lepikhin et al. 2020, <https://arxiv.org/abs/2006.16668>) as FastMoE has it: the mean over
/// experts of `c m`, times the square of `n_local`, where `c` is the part of the tokens whose first choice is the expert
/// and `m` its mean probability; `[1]`.
///
/// - `logits`: `[tokens, n_experts]`
/// - `first`: the first choice of each token, before any is dropped
/// - `n_local`: how many experts a worker has.
pub fn gshard_loss(logits: Tensor<2>, first: &Choices, n_local: usize) -> Tensor<1> {
    let tokens = first.ids.len();
    let probabilities = log_softmax(logits.cast(DType::F32), 1).exp();
    let part = fractions(first, tokens, &probabilities);
    let mean = probabilities.mean_dim(0).squeeze_dim::<1>(0);
    (part * mean).mean() * (n_local * n_local) as f64
}

/// The loss of Switch Transformers (Fedus et al. 2021, <https://arxiv.org/abs/2101.03961>, equation 4): `E Σ f P`, where
/// `f` is the part of the tokens that the expert gets and `P` its mean probability; `[1]`. Both are over `of` tokens,
/// which are those that were not dropped in FastMoE.
///
/// - `probabilities`: `[tokens, n_experts]`.
pub fn switch_loss(probabilities: Tensor<2>, choices: &Choices, of: usize) -> Tensor<1> {
    let part = fractions(choices, of, &probabilities);
    let mean = probabilities.sum_dim(0).squeeze_dim::<1>(0) / of.max(1) as f64;
    (part * mean).sum() * choices.n_experts as f64
}

/// The square of the coefficient of variation of `[n_experts]` (Shazeer et al. 2017, equation 7), the variance that of a
/// sample; `[1]`. Of one expert it is 0.
pub fn cv_squared(values: Tensor<1>) -> Tensor<1> {
    let [count] = values.dims();
    let mean = values.clone().mean();
    let squares = (values - mean.clone()).square().sum() / count.saturating_sub(1).max(1) as f64;
    squares / (mean.square() + 1e-10)
}

/// The router z-loss of ST-MoE (Zoph et al. 2022, <https://arxiv.org/abs/2202.08906>, equation 5): the mean square of the
/// logarithm of the sum of exponentials; `[1]`.
///
/// - `logits`: `[tokens, n_experts]`.
pub fn z_loss(logits: Tensor<2>) -> Tensor<1> {
    let logits = logits.cast(DType::F32);
    let chosen = logits.clone().narrow(1, 0, 1);
    (chosen.clone() - log_softmax(logits, 1).narrow(1, 0, 1)).square().mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, random, tensor};
    use burn::tensor::Device;

    #[test]
    fn balance_of_literal_loads() {
        let even = Balance::of(&[3, 3], 0);
        let expected = Balance {
            variation: 0.0,
            max_over_mean: 1.0,
            max_over_min: 1.0,
            entropy: 2f64.ln(),
            drop_rate: 0.0,
        };
        assert_eq!(even, expected);
        // mean 2, variance 4
        let uneven = Balance::of(&[0, 4], 1);
        assert_eq!((uneven.variation, uneven.max_over_mean, uneven.max_over_min), (1.0, 2.0, 5.0));
        assert_eq!((uneven.entropy, uneven.drop_rate), (0.0, 0.2));
        let nothing = Balance::of(&[0, 0], 0);
        assert_eq!((nothing.variation, nothing.entropy, nothing.max_over_min), (0.0, 0.0, 1.0));
    }

    /// Two tokens with probabilities (3/4, 1/4) and (1/2, 1/2) both choose the first expert.
    #[test]
    fn losses_of_literal_logits() {
        let logits = || tensor([2, 2], &[3f64.ln(), 0.0, 0.0, 0.0], &Device::flex());
        let first = Choices { ids: vec![Some(0); 2], top_k: 1, n_experts: 2 };
        assert_close(gshard_loss(logits(), &first, 2), &[0.5 * 0.625 * 4.0], 1e-6);
        let probabilities = || tensor([2, 2], &[0.75, 0.25, 0.5, 0.5], &Device::flex());
        assert_close(switch_loss(probabilities(), &first, 2), &[2.0 * 0.625], 1e-6);
        let pruned = Choices { ids: vec![Some(0), None], ..first };
        assert_close(switch_loss(probabilities(), &pruned, 1), &[2.0 * 1.25], 1e-6);
        assert_close(z_loss(logits()), &[(4f64.ln().powi(2) + 2f64.ln().powi(2)) / 2.0], 1e-6);
        assert_close(cv_squared(tensor([2], &[1.0, 3.0], &Device::flex())), &[0.5], 1e-6);
        assert_close(cv_squared(tensor([1], &[3.0], &Device::flex())), &[0.0], 0.0);
    }

    #[test]
    fn gradients_match_finite_differences() {
        let at = random(6, &mut fastrand::Rng::with_seed(2));
        let first = Choices { ids: vec![Some(0), Some(2)], top_k: 1, n_experts: 3 };
        assert_gradient(|logits| gshard_loss(logits, &first, 3), [2, 3], &at);
        assert_gradient(|logits| switch_loss(logits, &first, 2), [2, 3], &at);
        assert_gradient(z_loss, [2, 3], &at);
        let importance = |values: Tensor<1>| cv_squared(values + 2.0);
        assert_gradient(importance, [6], &at);
    }
}
