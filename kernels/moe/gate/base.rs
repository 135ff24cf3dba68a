use burn::module::{Initializer, Module, Param};
use burn::tensor::{DType, Device, Tensor};

use crate::moe::routing::{Choices, host, largest, ones};
use crate::moe::{Phase, Routing, auction};

/// An equal share of the tokens for each expert (Lewis et al. 2021, "BASE Layers", <https://arxiv.org/abs/2103.16716>): in
/// training tokens are assigned by an auction of their affinities to the experts' centroids, at evaluation each goes to its
/// best. Every choice counts 1 and the centroids are not learned, as in CPM-2-MoE.
#[derive(Module, Debug)]
pub struct BaseGate {
    /// `[n_experts, d_model]`.
    pub centroids: Param<Tensor<2>>,
}

impl BaseGate {
    /// Untrained centroids.
    pub fn new(d_model: usize, n_experts: usize, device: &Device) -> Self {
        let normal = Initializer::Normal { mean: 0.0, std: 1.0 / (d_model as f64).sqrt() };
        Self { centroids: normal.init([n_experts, d_model], device) }
    }

    /// Of normalised states: `[tokens, d_model] -> [tokens, n_experts]`. It has no gradient.
    pub fn affinity(&self, features: Tensor<2>) -> Tensor<2> {
        let centroids = self.centroids.val().detach().transpose();
        features.detach().cast(DType::F32).matmul(centroids.cast(DType::F32))
    }

    /// `[tokens, d_model]`, normalised.
    pub fn route(&self, features: Tensor<2>, phase: Phase) -> Routing {
        let affinity = self.affinity(features);
        let [tokens, n_experts] = affinity.dims();
        let (device, affinity) = (affinity.device(), host(&affinity));
        let experts = match phase {
            Phase::Train => {
                let ids = auction(&affinity, n_experts).into_iter().map(Some).collect();
                Choices { ids, top_k: 1, n_experts }
            }
            Phase::Eval => largest(&affinity, n_experts, 1),
        };
        Routing::new(experts, ones(tokens, 1, &device), None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, best};
    use crate::testing::{floats, noise};

    #[test]
    fn it_is_balanced_in_training_and_the_best_at_evaluation() {
        for Case { tokens, n_experts, seed, .. } in Case::some() {
            let device = Device::flex();
            let gate = BaseGate { centroids: Param::from_tensor(noise([n_experts, 5], seed, &device)) };
            let x = noise([tokens, 5], seed + 1, &device);
            let routing = gate.route(x.clone(), Phase::Train);
            assert!(
                routing.load.iter().all(|&load| load <= tokens.div_ceil(n_experts)),
                "{:?}",
                routing.load
            );
            assert_eq!((routing.dropped, routing.load.iter().sum()), (0, tokens));
            let affinity = floats(x.clone().matmul(gate.centroids.val().transpose()));
            let expected: Vec<_> = affinity.chunks(n_experts).map(|row| Some(best(row, 1)[0])).collect();
            assert_eq!(gate.route(x, Phase::Eval).experts.ids, expected);
        }
    }
}
