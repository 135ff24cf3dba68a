use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::gshard::{RATES, best_two, drop_by_chance, of_phase};
use crate::layers::{Linear, LinearConfig};
use crate::moe::{Noise, Phase, Routing};

/// As [`super::GShardGate`], but an expert takes `⌈rate tokens of a worker⌉` choices, and those of all workers together:
/// FastMoE's `DCGate`.
#[derive(Module, Debug)]
pub struct DcGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// Capacities over the tokens of a worker, in training and at evaluation.
    #[module(skip)]
    pub rates: [f64; 2],
    /// How many workers hold an equal share of the tokens, one after the other, and of the experts.
    #[module(skip)]
    pub n_workers: usize,
}

impl DcGate {
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
    /// If there are fewer than two experts; as [`DcGate::route`].
    pub fn choose(&self, logits: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        let [tokens, _] = logits.dims();
        let (mut experts, weights, loss) = best_two(logits, self.n_workers);
        experts.prune(self.capacity(tokens, phase), 2 * tokens);
        drop_by_chance(&mut experts, &weights, noise);
        Routing::new(experts, weights, Some(loss))
    }

    /// As [`DcGate::route`], of the tokens of one worker.
    ///
    /// - `others`: of how many choices each expert has here, to how many it has at the workers before, and at all
    #[cfg(feature = "parallel")]
    pub(in crate::moe) fn route_own(
        &self,
        x: Tensor<2>,
        phase: Phase,
        noise: &mut Noise,
        others: impl FnOnce(&[usize]) -> (Vec<usize>, Vec<usize>),
    ) -> Routing {
        let (mut experts, weights, loss) = best_two(self.gate.forward(x), self.n_workers);
        let (before, all) = others(&experts.load());
        let capacity = self.capacity(all.into_iter().sum::<usize>() / 2, phase);
        experts.fit(before.into_iter().map(|taken| capacity.saturating_sub(taken)).collect());
        drop_by_chance(&mut experts, &weights, noise);
        Routing::new(experts, weights, Some(loss))
    }

    /// How many choices an expert takes, of so many tokens of all workers.
    fn capacity(&self, tokens: usize, phase: Phase) -> usize {
        (of_phase(self.rates, phase) * tokens.div_ceil(self.n_workers) as f64).ceil() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best, softmax_of};

    /// No second choice is dropped by chance here: the number drawn is 0.
    #[test]
    fn it_is_the_scalar_reference() {
        for case in Case::some().into_iter().filter(|case| case.n_experts > 1) {
            let Case { tokens, n_experts, .. } = case;
            let n_workers = if tokens.is_multiple_of(2) { 2 } else { 1 };
            if !n_experts.is_multiple_of(n_workers) {
                continue;
            }
            let gate = DcGate { rates: [0.4, 0.9], n_workers, ..DcGate::new(3, n_experts, &Device::flex()) };
            let capacity = (0.4 * (tokens / n_workers) as f64).ceil() as usize;
            let (mut ids, mut weights, mut taken) = (Vec::new(), Vec::new(), vec![0; n_experts]);
            for row in case.logits().chunks(n_experts) {
                let two = best(row, 2);
                weights.extend(softmax_of(&[row[two[0]], row[two[1]]]));
                for expert in two {
                    taken[expert] += 1;
                    ids.push(Some(expert).filter(|&expert| taken[expert] <= capacity));
                }
            }
            let none = Noise::Given(Tensor::zeros([tokens, 1], &Device::flex()));
            let routing = gate.choose(case.tensor(), Phase::Train, &mut none.clone());
            let loss = super::super::GShardGate {
                n_workers,
                ..super::super::GShardGate::new(3, n_experts, &Device::flex())
            };
            let loss = loss.choose(case.tensor(), Phase::Train, &mut none.clone()).aux_loss;
            let loss = loss.map(|loss| loss.into_scalar::<f64>());
            assert_routing(&routing, &ids, &weights, loss);
        }
    }
}
