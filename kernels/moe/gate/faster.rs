use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use super::gshard::best_two;
use crate::layers::{Linear, LinearConfig};
use crate::moe::Routing;
use crate::moe::routing::{host, largest};
use crate::ops::softmax;

/// Two experts, few of them on other machines (He et al. 2022, "FasterMoE", section 5; FastMoE's `FasterGate`): where the
/// first choices of at least `⌊0.14 tokens⌋` tokens are far away, so many of them, those of the largest logits, keep theirs
/// as their second choice; all other choices are among the experts of this machine. The loss is GShard's.
#[derive(Module, Debug)]
pub struct FasterGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// Which experts are near.
    #[module(skip)]
    pub node: Node,
}

/// A machine with several workers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Which of the machines.
    pub rank: usize,
    /// How many experts a worker has.
    pub n_local: usize,
    /// How many workers a machine has.
    pub workers: usize,
    /// Experts of other machines of which it has a copy.
    pub shadowed: Vec<usize>,
}

/// What part of the tokens may go to another machine.
const FAR: f64 = 0.14;

impl Node {
    fn is_far(&self, expert: usize) -> bool {
        expert / (self.n_local * self.workers) != self.rank && !self.shadowed.contains(&expert)
    }
}

impl FasterGate {
    /// An untrained gate.
    pub fn new(d_model: usize, n_experts: usize, node: Node, device: &Device) -> Self {
        Self { gate: LinearConfig::new(d_model, n_experts).init(device), node }
    }

    /// `[tokens, d_model]`, of a worker.
    ///
    /// # Panics
    /// If fewer than two experts are near.
    pub fn route(&self, x: Tensor<2>) -> Routing {
        self.choose(self.gate.forward(x))
    }

    /// Of logits `[tokens, n_experts]`.
    ///
    /// # Panics
    /// If fewer than two experts are near.
    pub fn choose(&self, logits: Tensor<2>) -> Routing {
        let [tokens, n_experts] = logits.dims();
        let logits = logits.cast(DType::F32);
        let n_workers = n_experts / self.node.n_local;
        let (best, weights, loss) = best_two(logits.clone(), n_workers);
        let is_far: Vec<bool> = (0..n_experts).map(|expert| self.node.is_far(expert)).collect();
        let near = is_far.iter().filter(|far| !**far).count();
        assert!(near >= 2, "{near} experts are near, and a token goes to two");
        let values = host(&logits);
        let first = |token: usize| best.ids[2 * token].unwrap_or(0);
        let mut travellers: Vec<usize> = (0..tokens).filter(|&token| is_far[first(token)]).collect();
        let allowed = (tokens as f64 * FAR) as usize;
        if travellers.len() < allowed {
            return Routing::new(best, weights, Some(loss));
        }
        let logit = |token: usize| values[token * n_experts + first(token)];
        travellers.sort_by(|&a, &b| logit(b).total_cmp(&logit(a)));
        let at_home = |(at, &value): (usize, &f32)| match is_far[at % n_experts] {
            true => f32::NEG_INFINITY,
            false => value,
        };
        let local: Vec<f32> = values.iter().enumerate().map(at_home).collect();
        let mut experts = largest(&local, n_experts, 2);
        for &token in &travellers[..allowed] {
            experts.ids[2 * token + 1] = Some(first(token));
        }
        let weights = softmax(experts.pick(logits));
        Routing::new(experts, weights, Some(loss))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best, softmax_of};

    #[test]
    fn it_is_the_scalar_reference() {
        let (mut stayed, mut sent) = (0, 0);
        for seed in 0..12 {
            let (tokens, n_experts) = (22, 8);
            let case = Case { tokens, n_experts, top_k: 2, seed };
            // one expert for each of two workers: the machine has experts 2 and 3, and a copy of 6
            let shadowed = if seed % 3 == 0 { vec![6] } else { (4..8).chain([0, 1]).collect() };
            let node = Node { rank: 1, n_local: 1, workers: 2, shadowed };
            let is_far = |expert: usize| !matches!(expert, 2 | 3) && !node.shadowed.contains(&expert);
            let logits = case.logits();
            let rows: Vec<&[f64]> = logits.chunks(n_experts).collect();
            let firsts: Vec<usize> = rows.iter().map(|row| best(row, 1)[0]).collect();
            let mut far: Vec<usize> = (0..tokens).filter(|&token| is_far(firsts[token])).collect();
            far.sort_by(|&a, &b| rows[b][firsts[b]].total_cmp(&rows[a][firsts[a]]));
            let mut ids = Vec::new();
            for (token, row) in rows.iter().enumerate() {
                let two = match far.len() < 3 {
                    true => best(row, 2),
                    false => {
                        let near: Vec<f64> = (0..n_experts)
                            .map(|expert| if is_far(expert) { f64::NEG_INFINITY } else { row[expert] })
                            .collect();
                        let mut two = best(&near, 2);
                        if far[..3].contains(&token) {
                            two[1] = firsts[token];
                            sent += 1;
                        }
                        two
                    }
                };
                stayed += usize::from(!far.is_empty() && far.len() < 3);
                ids.extend(two.into_iter().map(Some));
            }
            let weights: Vec<f64> = rows
                .iter()
                .zip(ids.chunks(2))
                .flat_map(|(row, ids)| softmax_of(&[row[ids[0].unwrap()], row[ids[1].unwrap()]]))
                .collect();
            let gate = FasterGate::new(3, n_experts, node, &Device::flex());
            let routing = gate.choose(case.tensor());
            let loss = routing.aux_loss.clone().map(|loss| loss.into_scalar::<f64>());
            assert_routing(&routing, &ids, &weights, loss);
        }
        assert!(sent > 0 && stayed == 0);
    }

    /// Few first choices that are far away are left where they are.
    #[test]
    fn few_may_travel() {
        let node = Node { rank: 0, n_local: 1, workers: 2, shadowed: vec![] };
        let gate = FasterGate::new(3, 3, node, &Device::flex());
        let mut rows = vec![[2.0, 1.0, 0.0]; 15];
        rows[4] = [1.0, 0.0, 2.0];
        let logits = Tensor::<2>::from_data(
            burn::tensor::TensorData::new(rows.concat(), [15, 3]),
            (&Device::flex(), DType::F32),
        );
        let routing = gate.choose(logits);
        assert_eq!(routing.experts.ids[8..10], [Some(2), Some(0)]);
        assert_eq!(routing.load, [15, 14, 1]);
    }
}
