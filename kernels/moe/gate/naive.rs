use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use crate::layers::{Linear, LinearConfig};
use crate::moe::Routing;
use crate::moe::routing::{host, largest};
use crate::ops::softmax;

/// The `top_k` experts of the largest logits, weighed by the softmax over these alone: FastMoE's `NaiveGate`, and without
/// a bias the router of Mixtral.
#[derive(Module, Debug)]
pub struct NaiveGate {
    /// `[n_experts, d_model]`.
    pub gate: Linear,
    /// How many experts a token goes to.
    #[module(skip)]
    pub top_k: usize,
}

impl NaiveGate {
    /// An untrained gate, with a bias.
    pub fn new(d_model: usize, n_experts: usize, top_k: usize, device: &Device) -> Self {
        Self { gate: LinearConfig::new(d_model, n_experts).init(device), top_k }
    }

    /// `[tokens, d_model] -> [tokens, n_experts]`.
    pub fn logits(&self, x: Tensor<2>) -> Tensor<2> {
        self.gate.forward(x)
    }

    /// Of logits `[tokens, n_experts]`.
    pub fn choose(&self, logits: Tensor<2>) -> Routing {
        let [_, n_experts] = logits.dims();
        let logits = logits.cast(DType::F32);
        let experts = largest(&host(&logits), n_experts, self.top_k);
        let weights = softmax(experts.pick(logits));
        Routing::new(experts, weights, None)
    }

    /// `[tokens, d_model]`.
    pub fn route(&self, x: Tensor<2>) -> Routing {
        self.choose(self.logits(x))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best};

    #[test]
    fn it_is_the_scalar_reference() {
        for case in Case::some() {
            let Case { tokens, n_experts, top_k, .. } = case;
            let logits = case.logits();
            let gate = NaiveGate::new(3, n_experts, top_k, &Device::flex());
            let routing = gate.choose(case.tensor());
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            for row in logits.chunks(n_experts) {
                let chosen = best(row, top_k);
                let sum: f64 = chosen.iter().map(|&expert| row[expert].exp()).sum();
                weights.extend(chosen.iter().map(|&expert| row[expert].exp() / sum));
                ids.extend(chosen.into_iter().map(Some));
            }
            assert_eq!(ids.len(), tokens * top_k);
            assert_routing(&routing, &ids, &weights, None);
        }
    }
}
