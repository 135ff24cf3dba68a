use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use crate::layers::{Linear, LinearConfig};
use crate::moe::routing::{Choices, host, largest};
use crate::moe::{Routing, switch_loss};
use crate::ops::softmax;

/// One expert in each of `k` groups (Yang et al. 2021, "M6-T", <https://arxiv.org/abs/2105.15082>): every group, called a
/// prototype, has a router of its own, whose softmax weighs the choice. With one group it is the router of Switch
/// Transformers. The loss is that of Switch, summed over groups, before any token is dropped; M6-T does without.
#[derive(Module, Debug)]
pub struct KTop1Gate {
    /// `[n_experts / k, d_model]` for each group.
    pub routers: Vec<Linear>,
    /// How many tokens an expert takes.
    #[module(skip)]
    pub capacity: Capacity,
}

/// How many tokens an expert takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Capacity {
    /// So many times what it had were the load even, rounded up.
    Factor(f64),
    /// So many.
    Tokens(usize),
}

impl Capacity {
    /// Of so many tokens and experts.
    pub fn of(self, tokens: usize, n_experts: usize) -> usize {
        match self {
            Capacity::Factor(factor) => (factor * tokens as f64 / n_experts.max(1) as f64).ceil() as usize,
            Capacity::Tokens(tokens) => tokens,
        }
    }
}

impl KTop1Gate {
    /// An untrained gate, without biases.
    ///
    /// # Panics
    /// If `k` does not divide the experts.
    pub fn new(d_model: usize, n_experts: usize, k: usize, capacity: Capacity, device: &Device) -> Self {
        assert!(k > 0 && n_experts.is_multiple_of(k), "{n_experts} experts do not divide into {k} groups");
        let router = |_| LinearConfig::new(d_model, n_experts / k).with_bias(false).init(device);
        Self { routers: (0..k).map(router).collect(), capacity }
    }

    /// Of each group: `[tokens, d_model] -> [tokens, n_experts / k]`.
    pub fn logits(&self, x: &Tensor<2>) -> Vec<Tensor<2>> {
        self.routers.iter().map(|router| router.forward(x.clone())).collect()
    }

    /// `[tokens, d_model]`.
    pub fn route(&self, x: Tensor<2>) -> Routing {
        let [tokens, _] = x.dims();
        self.choose(self.logits(&x), tokens)
    }

    /// Of the logits `[tokens, n_experts / k]` of each group. An expert's capacity is for every `sequence` tokens.
    ///
    /// # Panics
    /// If there is no group.
    pub fn choose(&self, logits: Vec<Tensor<2>>, sequence: usize) -> Routing {
        let k = logits.len();
        let [tokens, size] = logits[0].dims();
        let mut ids = vec![None; tokens * k];
        let (mut weights, mut losses) = (Vec::with_capacity(k), Vec::with_capacity(k));
        for (group, logits) in logits.into_iter().enumerate() {
            let probabilities = softmax(logits.cast(DType::F32));
            let best = largest(&host(&probabilities), size, 1);
            for (token, expert) in best.ids.iter().enumerate() {
                ids[token * k + group] = expert.map(|expert| group * size + expert);
            }
            weights.push(best.pick(probabilities.clone())); // [tokens, 1]
            losses.push(switch_loss(probabilities, &best, tokens));
        }
        let mut experts = Choices { ids, top_k: k, n_experts: k * size };
        experts.prune(self.capacity.of(sequence, size), sequence * k);
        let loss = losses.into_iter().reduce(|sum, loss| sum + loss);
        Routing::new(experts, Tensor::cat(weights, 1), loss)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best, softmax_of};

    #[test]
    fn it_is_the_scalar_reference() {
        for case in Case::some() {
            for (k, sequence) in [(1, case.tokens), (2, case.tokens), (3, 1), (1, 4)] {
                let Case { tokens, n_experts: size, .. } = case;
                if !tokens.is_multiple_of(sequence) {
                    continue;
                }
                let groups: Vec<Case> =
                    (0..k).map(|group| Case { seed: case.seed + 100 * group, ..case }).collect();
                let capacity = (1.25 * sequence as f64 / size as f64).ceil() as usize;
                let k = k as usize;
                let (mut ids, mut weights) = (vec![None; tokens * k], vec![0.0; tokens * k]);
                let mut loss = 0.0;
                for (group, case) in groups.iter().enumerate() {
                    let (mut taken, mut chosen) = (vec![0; size], vec![0.0; size]);
                    let mut mean = vec![0.0; size];
                    for (token, row) in case.logits().chunks(size).enumerate() {
                        if token.is_multiple_of(sequence) {
                            taken = vec![0; size];
                        }
                        let (expert, probabilities) = (best(row, 1)[0], softmax_of(row));
                        taken[expert] += 1;
                        chosen[expert] += 1.0 / tokens as f64;
                        weights[token * k + group] = probabilities[expert];
                        mean.iter_mut().zip(probabilities).for_each(|(mean, p)| *mean += p / tokens as f64);
                        if taken[expert] <= capacity {
                            ids[token * k + group] = Some(group * size + expert);
                        }
                    }
                    loss += size as f64 * chosen.iter().zip(mean).map(|(f, p)| f * p).sum::<f64>();
                }
                let gate = KTop1Gate::new(3, size * k, k, Capacity::Factor(1.25), &Device::flex());
                let logits = groups.iter().map(Case::tensor).collect();
                assert_routing(&gate.choose(logits, sequence), &ids, &weights, Some(loss));
            }
        }
    }
}
