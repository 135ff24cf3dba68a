use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use crate::layers::{Linear, LinearConfig};
use crate::moe::routing::{Choices, host, largest};
use crate::moe::{Phase, Routing};
use crate::ops::softmax;

/// As [`super::NaiveGate`] at evaluation; in training tokens are moved to workers that have room, so that all work the
/// same: FastMoE's `SwipeGate`. The logits are read anew where tokens are moved to, and the weights are their softmax.
#[derive(Module, Debug)]
pub struct SwipeGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// How many experts a token goes to. Moved, it may have the same twice.
    #[module(skip)]
    pub top_k: usize,
    /// How many workers hold an equal share of the tokens, one after the other, and of the experts.
    #[module(skip)]
    pub n_workers: usize,
}

/// What [`swipe`] makes of choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Swipe {
    /// Where tokens go now.
    pub experts: Choices,
    /// How much room each worker has after the first choice, after the second, ...
    pub room: Vec<Vec<usize>>,
    /// How many choices were moved.
    pub moved: usize,
}

/// Moves choices to workers that have room. Tokens and experts are in equal shares on `n_workers`; each takes as many
/// choices as its tokens have. One choice of all tokens after the other: at a worker, the tokens of the first worker come
/// first; those that find no room go to the first worker that has some, there to the expert `choice mod n_local`.
///
/// # Panics
/// If the workers do not divide tokens and experts, or a choice was dropped.
pub fn swipe(chosen: &Choices, n_workers: usize) -> Swipe {
    let Choices { top_k, n_experts, .. } = *chosen;
    let tokens = chosen.ids.len() / top_k;
    assert!(
        n_workers > 0 && tokens.is_multiple_of(n_workers) && n_experts.is_multiple_of(n_workers),
        "{n_workers} workers do not divide {tokens} tokens and {n_experts} experts"
    );
    let (resident, n_local) = (tokens / n_workers, n_experts / n_workers);
    let mut experts = chosen.clone();
    let mut room = vec![resident * top_k; n_workers];
    let (mut history, mut moved) = (Vec::new(), 0);
    for choice in 0..top_k {
        let mut homeless = Vec::new();
        for token in 0..tokens {
            let expert = chosen.ids[token * top_k + choice].expect("no choice is dropped before");
            match room[expert / n_local] {
                0 => homeless.push(token),
                _ => room[expert / n_local] -= 1,
            }
        }
        moved += homeless.len();
        for token in homeless {
            let worker = room.iter().position(|&room| room > 0).expect("there is room for all choices");
            room[worker] -= 1;
            experts.ids[token * top_k + choice] = Some(worker * n_local + choice % n_local);
        }
        history.push(room.clone());
    }
    Swipe { experts, room: history, moved }
}

impl SwipeGate {
    /// An untrained gate of one worker, where nothing moves.
    pub fn new(d_model: usize, n_experts: usize, top_k: usize, device: &Device) -> Self {
        Self { gate: LinearConfig::new(d_model, n_experts).init(device), top_k, n_workers: 1 }
    }

    /// `[tokens, d_model] -> [tokens, n_experts]`.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        self.gate.forward(x).cast(DType::F32)
    }

    /// The experts of the largest logits, before any is moved.
    pub fn best(&self, logits: &Tensor<2>) -> Choices {
        let [_, n_experts] = logits.dims();
        largest(&host(logits), n_experts, self.top_k)
    }

    /// Of logits `[tokens, n_experts]` and where tokens go.
    pub fn weigh(&self, logits: Tensor<2>, experts: Choices) -> Routing {
        let weights = softmax(experts.pick(logits));
        Routing::new(experts, weights, None)
    }

    /// `[tokens, d_model]`.
    ///
    /// # Panics
    /// In training, if the workers do not divide the tokens.
    pub fn route(&self, x: Tensor<2>, phase: Phase) -> Routing {
        let logits = self.logits(x);
        let best = self.best(&logits);
        let experts = match phase {
            Phase::Train => swipe(&best, self.n_workers).experts,
            Phase::Eval => best,
        };
        self.weigh(logits, experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best, softmax_of};

    /// The rule in the words of the original: counts of each source for each worker are cut to what fits, source by source;
    /// what is over is given to the workers in order; then each source moves its last tokens.
    fn by_counts(chosen: &Choices, n_workers: usize) -> Vec<Option<usize>> {
        let Choices { ids, top_k, n_experts } = chosen;
        let (resident, n_local) = (ids.len() / top_k / n_workers, n_experts / n_workers);
        let mut room = vec![resident * top_k; n_workers];
        let mut out = ids.clone();
        for choice in 0..*top_k {
            let of = |source: usize, token: usize| (source * resident + token) * top_k + choice;
            let mut keep = vec![vec![0; n_workers]; n_workers];
            for source in 0..n_workers {
                for worker in 0..n_workers {
                    let wanted = (0..resident)
                        .filter(|&token| ids[of(source, token)].unwrap() / n_local == worker)
                        .count();
                    keep[source][worker] = wanted.min(room[worker]);
                    room[worker] -= keep[source][worker];
                }
            }
            for source in 0..n_workers {
                for token in 0..resident {
                    let worker = ids[of(source, token)].unwrap() / n_local;
                    if keep[source][worker] > 0 {
                        keep[source][worker] -= 1;
                        continue;
                    }
                    let worker = (0..n_workers).find(|&worker| room[worker] > 0).unwrap();
                    room[worker] -= 1;
                    out[of(source, token)] = Some(worker * n_local + choice % n_local);
                }
            }
        }
        out
    }

    #[test]
    fn it_is_the_scalar_reference() {
        let mut moved = 0;
        for case in Case::some() {
            let Case { tokens, n_experts, top_k, .. } = case;
            for n_workers in [1, 2, 4] {
                if !tokens.is_multiple_of(n_workers) || !n_experts.is_multiple_of(n_workers) {
                    continue;
                }
                let gate = SwipeGate { n_workers, ..SwipeGate::new(3, n_experts, top_k, &Device::flex()) };
                let logits = case.logits();
                let first: Vec<_> =
                    logits.chunks(n_experts).flat_map(|row| best(row, top_k)).map(Some).collect();
                let chosen = gate.best(&case.tensor());
                assert_eq!(chosen.ids, first);
                let found = swipe(&chosen, n_workers);
                let expected = by_counts(&chosen, n_workers);
                moved += found.moved;
                let weights: Vec<f64> = logits
                    .chunks(n_experts)
                    .zip(expected.chunks(top_k))
                    .flat_map(|(row, ids)| {
                        softmax_of(&ids.iter().map(|id| row[id.unwrap()]).collect::<Vec<_>>())
                    })
                    .collect();
                let routing = gate.weigh(case.tensor(), found.experts);
                assert_routing(&routing, &expected, &weights, None);
                let share = tokens * top_k / n_workers;
                for load in routing.load.chunks(n_experts / n_workers) {
                    assert_eq!(load.iter().sum::<usize>(), share);
                }
            }
        }
        assert!(moved > 20);
    }
}
