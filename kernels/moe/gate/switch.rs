use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use super::gshard::{RATES, of_phase};
use crate::layers::{Linear, LinearConfig};
use crate::moe::routing::{host, largest};
use crate::moe::{Noise, Phase, Routing, switch_loss};
use crate::ops::softmax;

/// One expert of limited capacity (Fedus et al. 2021, <https://arxiv.org/abs/2101.03961>) as FastMoE's `SwitchGate`: in
/// training, numbers drawn evenly from `1 ± jitter` are added to the logits; the weight is the probability among all
/// experts; an expert takes `⌈rate tokens / n_experts⌉`, those that come first. Its loss counts the tokens that are left.
#[derive(Module, Debug)]
pub struct SwitchGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// Capacities over an even load, in training and at evaluation.
    #[module(skip)]
    pub rates: [f64; 2],
    /// How far what is added in training is from 1.
    #[module(skip)]
    pub jitter: f64,
}

impl SwitchGate {
    /// An untrained gate with FastMoE's rates and jitter.
    pub fn new(d_model: usize, n_experts: usize, device: &Device) -> Self {
        Self { gate: LinearConfig::new(d_model, n_experts).init(device), rates: RATES, jitter: 0.1 }
    }

    /// `[tokens, d_model]`; draws even numbers `[tokens, n_experts]` in training.
    ///
    /// # Panics
    /// If the noise that was given has another shape.
    pub fn route(&self, x: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        self.choose(self.gate.forward(x), phase, noise)
    }

    /// Of logits `[tokens, n_experts]`.
    ///
    /// # Panics
    /// As [`SwitchGate::route`].
    pub fn choose(&self, logits: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        let [tokens, n_experts] = logits.dims();
        let logits = logits.cast(DType::F32);
        let logits = match phase {
            Phase::Train => {
                let drawn = noise.uniform(logits.dims(), &logits.device());
                logits + drawn * (2.0 * self.jitter) + (1.0 - self.jitter)
            }
            Phase::Eval => logits,
        };
        let probabilities = softmax(logits);
        let mut experts = largest(&host(&probabilities), n_experts, 1);
        let weights = experts.pick(probabilities.clone());
        let rate = of_phase(self.rates, phase);
        experts.prune((rate * tokens as f64 / n_experts as f64).ceil() as usize, tokens);
        let loss = switch_loss(probabilities, &experts, tokens - experts.dropped());
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
        for case in Case::some() {
            for phase in [Phase::Train, Phase::Eval] {
                let Case { tokens, n_experts, seed, .. } = case;
                let gate = SwitchGate {
                    rates: [0.8, 1.3],
                    jitter: 0.3,
                    ..SwitchGate::new(3, n_experts, &Device::flex())
                };
                let drawn = noise::<2>([tokens, n_experts], seed, &Device::flex()) / 2.0 + 0.5;
                let draws = floats(drawn.clone());
                let is_training = phase == Phase::Train;
                let rate = if is_training { 0.8 } else { 1.3 };
                let capacity = (rate * tokens as f64 / n_experts as f64).ceil() as usize;
                let (mut ids, mut weights) = (Vec::new(), Vec::new());
                let (mut taken, mut chances) = (vec![0; n_experts], vec![0.0; n_experts]);
                for (token, row) in case.logits().chunks(n_experts).enumerate() {
                    let drawn = &draws[token * n_experts..];
                    let row: Vec<f64> = row
                        .iter()
                        .zip(drawn)
                        .map(|(logit, drawn)| logit + if is_training { 0.7 + 0.6 * drawn } else { 0.0 })
                        .collect();
                    let probabilities = softmax_of(&row);
                    let expert = best(&row, 1)[0];
                    let fits = taken[expert] < capacity;
                    taken[expert] += usize::from(fits);
                    ids.push(Some(expert).filter(|_| fits));
                    weights.push(probabilities[expert]);
                    chances.iter_mut().zip(probabilities).for_each(|(sum, chance)| *sum += chance);
                }
                let kept = taken.iter().sum::<usize>() as f64;
                let dot: f64 = taken.iter().zip(&chances).map(|(&taken, sum)| taken as f64 * sum).sum();
                let loss = dot / kept / kept * n_experts as f64;
                let routing = gate.choose(case.tensor(), phase, &mut Noise::Given(drawn));
                assert_routing(&routing, &ids, &weights, Some(loss));
            }
        }
    }
}
