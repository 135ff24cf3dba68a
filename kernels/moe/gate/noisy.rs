use burn::module::{Initializer, Module, Param};
use burn::tensor::activation::softplus;
use burn::tensor::{DType, Device, IndexingUpdateOp, Tensor};

use crate::moe::routing::{Choices, host, largest};
use crate::moe::{Noise, Phase, Routing, cv_squared};
use crate::ops::softmax;

/// The `top_k` experts of the largest logits after normal noise of a learned width (Shazeer et al. 2017, section 2.1),
/// weighed by the softmax over these: FastMoE's `NoisyGate`. Its loss is the squared coefficient of variation of the
/// experts' importance, the sum of their weights, and that of their load, the chances that tokens would choose them were
/// their noise drawn anew. At evaluation there is no noise, and so no loss; nor is there one without tokens.
#[derive(Module, Debug)]
pub struct NoisyGate {
    /// `[d_model, n_experts]`.
    pub gate: Param<Tensor<2>>,
    /// `[d_model, n_experts]`: the width of the noise, before the softplus.
    pub noise: Param<Tensor<2>>,
    /// How many experts a token goes to.
    #[module(skip)]
    pub top_k: usize,
}

/// Added to the width of the noise.
const NARROWEST: f64 = 1e-2;

impl NoisyGate {
    /// An untrained gate.
    pub fn new(d_model: usize, n_experts: usize, top_k: usize, device: &Device) -> Self {
        let bound = 1.0 / (d_model as f64).sqrt();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        let matrix = || uniform.init([d_model, n_experts], device);
        Self { gate: matrix(), noise: matrix(), top_k }
    }

    /// `[tokens, d_model]`; draws normal numbers `[tokens, n_experts]` in training.
    ///
    /// # Panics
    /// If the noise that was given has another shape.
    pub fn route(&self, x: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        let clean = x.clone().matmul(self.gate.val()).cast(DType::F32); // [tokens, n_experts]
        if phase == Phase::Eval || clean.dims()[0] == 0 {
            return self.choose(clean);
        }
        let width = softplus(x.matmul(self.noise.val()).cast(DType::F32), 1.0) + NARROWEST;
        let noisy = clean.clone() + noise.normal(clean.dims(), &clean.device()) * width.clone();
        let Routing { experts, weights, .. } = self.choose(noisy.clone());
        let importance = spread(&experts, weights.clone()).sum_dim(0).squeeze_dim::<1>(0);
        let load = match self.top_k < experts.n_experts {
            true => self.chances(clean, noisy, width).sum_dim(0).squeeze_dim::<1>(0),
            false => importance.ones_like(), // all have all tokens
        };
        let loss = cv_squared(importance) + cv_squared(load);
        Routing::new(experts, weights, Some(loss))
    }

    fn choose(&self, logits: Tensor<2>) -> Routing {
        let [_, n_experts] = logits.dims();
        let experts = largest(&host(&logits), n_experts, self.top_k);
        let weights = softmax(experts.pick(logits));
        Routing::new(experts, weights, None)
    }

    /// How likely each token would choose each expert: `[tokens, n_experts]`. An expert that was chosen has to stay above
    /// the best of those that were not; one that was not has to rise above the last of those that were.
    fn chances(&self, clean: Tensor<2>, noisy: Tensor<2>, width: Tensor<2>) -> Tensor<2> {
        let [_, n_experts] = clean.dims();
        let order = largest(&host(&noisy), n_experts, self.top_k + 1).pick(noisy.clone());
        let best_out = order.clone().narrow(1, self.top_k, 1); // [tokens, 1]
        let last_in = order.narrow(1, self.top_k - 1, 1);
        let is_in = noisy.greater(best_out.clone().expand(clean.dims()));
        let above = |threshold: Tensor<2>| {
            let distance = (clean.clone() - threshold) / width.clone();
            ((distance / std::f64::consts::SQRT_2).erf() + 1.0) / 2.0
        };
        above(last_in).mask_where(is_in, above(best_out))
    }
}

/// The weights in a table `[tokens, n_experts]`.
fn spread(experts: &Choices, weights: Tensor<2>) -> Tensor<2> {
    let ([tokens, _], device) = (weights.dims(), weights.device());
    let numbers = Tensor::from_data(experts.numbers(), &device);
    let table = Tensor::zeros([tokens, experts.n_experts], (&device, DType::F32));
    table.scatter(1, numbers, weights, IndexingUpdateOp::Add)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moe::testing::{Case, assert_routing, best};
    use crate::testing::{assert_gradient, floats, noise, random};

    /// By the series of the error function.
    fn normal_cdf(x: f64) -> f64 {
        let (x, mut term, mut sum, mut n) = (x.clamp(-6.0, 6.0) / 2f64.sqrt(), 0.0, 0.0, 0.0);
        while n < 200.0 {
            term = if n == 0.0 { x } else { -term * x * x / n };
            sum += term / (2.0 * n + 1.0);
            n += 1.0;
        }
        0.5 + sum / std::f64::consts::PI.sqrt()
    }

    fn variation(values: &[f64]) -> f64 {
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        values.iter().map(|value| (value - mean).powi(2)).sum::<f64>()
            / (values.len() - 1) as f64
            / mean.powi(2)
    }

    #[test]
    fn it_is_the_scalar_reference() {
        for case in Case::some().into_iter().filter(|case| case.n_experts > 1) {
            let Case { tokens, n_experts, top_k, seed } = case;
            let (d_model, device) = (3, Device::flex());
            let gate = NoisyGate {
                gate: Param::from_tensor(noise([d_model, n_experts], seed, &device)),
                noise: Param::from_tensor(noise([d_model, n_experts], seed + 1, &device)),
                top_k,
            };
            let x = noise([tokens, d_model], seed + 2, &device) * 2.0;
            let drawn = noise([tokens, n_experts], seed + 3, &device);
            let product = |weight: &Param<Tensor<2>>| floats(x.clone().matmul(weight.val()));
            let (clean, raw, draws) = (product(&gate.gate), product(&gate.noise), floats(drawn.clone()));
            let width: Vec<f64> = raw.iter().map(|raw| (1.0 + raw.exp()).ln() + 0.01).collect();
            let (mut importance, mut load) = (vec![0.0; n_experts], vec![0.0; n_experts]);
            let (mut ids, mut weights) = (Vec::new(), Vec::new());
            for token in 0..tokens {
                let at = |expert| token * n_experts + expert;
                let noisy: Vec<f64> =
                    (0..n_experts).map(|e| clean[at(e)] + draws[at(e)] * width[at(e)]).collect();
                let order = best(&noisy, n_experts);
                let sum: f64 = order[..top_k].iter().map(|&e| noisy[e].exp()).sum();
                for &expert in &order[..top_k] {
                    let weight = noisy[expert].exp() / sum;
                    importance[expert] += weight;
                    ids.push(Some(expert));
                    weights.push(weight);
                }
                for expert in 0..n_experts {
                    load[expert] += match order.get(top_k) {
                        None => 1.0,
                        Some(&out) => {
                            let kept = order[..top_k].contains(&expert);
                            let threshold = noisy[if kept { out } else { order[top_k - 1] }];
                            normal_cdf((clean[at(expert)] - threshold) / width[at(expert)])
                        }
                    };
                }
            }
            let loss = variation(&importance) + variation(&load);
            let routing = gate.route(x.clone(), Phase::Train, &mut Noise::Given(drawn));
            assert_routing(&routing, &ids, &weights, Some(loss));
            assert!(gate.route(x, Phase::Eval, &mut Noise::Seeded(1)).aux_loss.is_none());
        }
    }

    #[test]
    fn the_gradient_of_the_loss_matches_finite_differences() {
        let device = Device::flex().autodiff();
        let x = noise([6, 3], 1, &device);
        let drawn = noise([6, 4], 2, &device);
        let other = noise([3, 4], 3, &device);
        let loss = |gate: Tensor<2>| {
            let gate = NoisyGate {
                gate: Param::from_tensor(gate),
                noise: Param::from_tensor(other.clone()),
                top_k: 2,
            };
            let routing = gate.route(x.clone(), Phase::Train, &mut Noise::Given(drawn.clone()));
            routing.aux_loss.expect("it is being trained")
        };
        // choices do not change within a step
        assert_gradient(loss, [3, 4], &random(12, &mut fastrand::Rng::with_seed(11)));
    }
}
