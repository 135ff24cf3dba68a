use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use crate::layers::{Linear, LinearConfig};
use crate::moe::routing::{Choices, host, largest};
use crate::moe::{Noise, Phase, Routing, gshard_loss};
use crate::ops::softmax;

/// Two experts of limited capacity, the second by chance (Lepikhin et al. 2020, <https://arxiv.org/abs/2006.16668>), as
/// FastMoE's `GShardGate`: weights are the softmax over the two; an expert takes `⌈rate tokens⌉ · 2 / n_experts` choices of
/// a worker, those that come first; after that a second choice is dropped where twice its weight is below a number drawn
/// evenly from `0..1`, at evaluation too. What is left is not weighed anew.
#[derive(Module, Debug)]
pub struct GShardGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// Capacities over an even load, in training and at evaluation.
    #[module(skip)]
    pub rates: [f64; 2],
    /// How many workers hold an equal share of the tokens, one after the other, and of the experts.
    #[module(skip)]
    pub n_workers: usize,
}

/// FastMoE's own rates.
pub(super) const RATES: [f64; 2] = [1.2, 2.4];

/// The rate of a phase.
pub(super) fn of_phase([train, eval]: [f64; 2], phase: Phase) -> f64 {
    match phase {
        Phase::Train => train,
        Phase::Eval => eval,
    }
}

/// The two largest logits of each token, their softmax, and the loss.
///
/// # Panics
/// If there are fewer than two experts.
pub(super) fn best_two(logits: Tensor<2>, n_workers: usize) -> (Choices, Tensor<2>, Tensor<1>) {
    let [_, n_experts] = logits.dims();
    assert!(n_experts >= 2, "there are two experts to choose");
    let logits = logits.cast(DType::F32);
    let values = host(&logits);
    let loss = gshard_loss(logits.clone(), &largest(&values, n_experts, 1), n_experts / n_workers);
    let experts = largest(&values, n_experts, 2);
    let weights = softmax(experts.pick(logits));
    (experts, weights, loss)
}

/// Drops second choices whose doubled weight is below the number that is drawn for the token.
pub(super) fn drop_by_chance(experts: &mut Choices, weights: &Tensor<2>, noise: &mut Noise) {
    let [tokens, _] = weights.dims();
    let drawn = host(&noise.uniform([tokens, 1], &weights.device()));
    let weights = host(weights);
    for (token, drawn) in drawn.into_iter().enumerate() {
        if 2.0 * weights[2 * token + 1] < drawn {
            experts.ids[2 * token + 1] = None;
        }
    }
}

impl GShardGate {
    /// An untrained gate of one worker, with FastMoE's rates.
    pub fn new(d_model: usize, n_experts: usize, device: &Device) -> Self {
        Self { gate: LinearConfig::new(d_model, n_experts).init(device), rates: RATES, n_workers: 1 }
    }

    /// `[tokens, d_model]`; draws even numbers `[tokens, 1]`.
    ///
    /// # Panics
    /// If the noise that was given has another shape.
    pub fn route(&self, x: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        self.choose(self.gate.forward(x), phase, noise)
    }

    /// Of logits `[tokens, n_experts]`.
    ///
    /// # Panics
    /// If there are fewer than two experts; as [`GShardGate::route`].
    pub fn choose(&self, logits: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        let [tokens, _] = logits.dims();
        self.limit(logits, tokens.div_ceil(self.n_workers), phase, noise)
    }

    /// As [`GShardGate::route`], of the tokens of one worker: capacity and loss are of these.
    #[cfg(feature = "parallel")]
    pub(in crate::moe) fn route_own(&self, x: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        let [tokens, _] = x.dims();
        self.limit(self.gate.forward(x), tokens, phase, noise)
    }

    /// Of logits `[tokens, n_experts]`, of which a worker has `resident`.
    fn limit(&self, logits: Tensor<2>, resident: usize, phase: Phase, noise: &mut Noise) -> Routing {
        let [_, n_experts] = logits.dims();
        let (mut experts, weights, loss) = best_two(logits, self.n_workers);
        let capacity = (of_phase(self.rates, phase) * resident as f64).ceil() as usize * 2 / n_experts;
        experts.prune(capacity, 2 * resident);
        drop_by_chance(&mut experts, &weights, noise);
        Routing::new(experts, weights, Some(loss))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best, softmax_of};
    use crate::testing::{floats, noise};

    #[test]
    fn it_is_the_scalar_reference() {
        for case in Case::some().into_iter().filter(|case| case.n_experts > 1) {
            for (phase, n_workers) in [(Phase::Train, 1), (Phase::Eval, 1), (Phase::Train, 2)] {
                let Case { tokens, n_experts, seed, .. } = case;
                if !tokens.is_multiple_of(n_workers) || !n_experts.is_multiple_of(n_workers) {
                    continue;
                }
                let gate = GShardGate {
                    rates: [0.7, 1.1],
                    n_workers,
                    ..GShardGate::new(3, n_experts, &Device::flex())
                };
                let drawn = (noise::<2>([tokens, 1], seed, &Device::flex()) + 1.0) / 2.0;
                let draws = floats(drawn.clone());
                let (rate, resident) = (if phase == Phase::Train { 0.7 } else { 1.1 }, tokens / n_workers);
                let capacity = (rate * resident as f64).ceil() as usize * 2 / n_experts;
                let (mut ids, mut weights) = (Vec::new(), Vec::new());
                let (mut first, mut mean) = (vec![0.0; n_experts], vec![0.0; n_experts]);
                let mut taken = vec![0; n_experts];
                for (token, row) in case.logits().chunks(n_experts).enumerate() {
                    if token.is_multiple_of(resident) {
                        taken = vec![0; n_experts];
                    }
                    let two = best(row, 2);
                    let of_two = softmax_of(&[row[two[0]], row[two[1]]]);
                    first[two[0]] += 1.0 / tokens as f64;
                    for (mean, chance) in mean.iter_mut().zip(softmax_of(row)) {
                        *mean += chance / tokens as f64;
                    }
                    for (choice, &expert) in two.iter().enumerate() {
                        let fits = taken[expert] < capacity;
                        taken[expert] += usize::from(fits);
                        let lucky = choice == 0 || 2.0 * of_two[1] >= draws[token];
                        ids.push(Some(expert).filter(|_| fits && lucky));
                    }
                    weights.extend(of_two);
                }
                let local = (n_experts / n_workers) as f64;
                let dot: f64 = first.iter().zip(&mean).map(|(first, mean)| first * mean).sum();
                let loss = dot / n_experts as f64 * local * local;
                let routing = gate.choose(case.tensor(), phase, &mut Noise::Given(drawn));
                assert_routing(&routing, &ids, &weights, Some(loss));
            }
        }
    }
}
