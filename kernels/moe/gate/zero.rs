use burn::module::Module;
use burn::tensor::{DType, Tensor};

use crate::moe::Routing;
use crate::moe::routing::Choices;

/// Always the first expert, as often as there are choices, each counting the same part: FastMoE's `ZeroGate`, for
/// comparison.
#[derive(Module, Debug)]
pub struct ZeroGate {
    /// How many experts there are.
    #[module(skip)]
    pub n_experts: usize,
    /// How many choices a token has.
    #[module(skip)]
    pub top_k: usize,
}

impl ZeroGate {
    /// `[tokens, d_model]`.
    pub fn route(&self, x: Tensor<2>) -> Routing {
        let ([tokens, _], Self { n_experts, top_k }) = (x.dims(), self);
        let experts = Choices { ids: vec![Some(0); tokens * top_k], top_k: *top_k, n_experts: *n_experts };
        let weights = Tensor::full([tokens, *top_k], 1.0 / *top_k as f64, (&x.device(), DType::F32));
        Routing::new(experts, weights, None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::assert_routing;
    use burn::tensor::Device;

    #[test]
    fn literal() {
        let gate = ZeroGate { n_experts: 3, top_k: 2 };
        let routing = gate.route(Tensor::zeros([2, 5], &Device::flex()));
        assert_routing(&routing, &[Some(0); 4], &[0.5; 4], None);
        assert_eq!(routing.load, [4, 0, 0]);
    }
}
