use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{ExpertMlpConfig, Experts, Gate, Noise, Phase, Routing};
use crate::ops::Activation;
use crate::ops::moe::{Dispatch, combine, permute};

/// Configuration of a [`Moe`] layer.
#[derive(Config, Debug)]
pub struct MoeConfig {
    /// Number of experts.
    pub n_experts: usize,
    /// Width of input and output.
    pub d_model: usize,
    /// Width between an expert's projections.
    pub d_ff: usize,
    /// Whether experts have biases.
    #[config(default = true)]
    pub bias: bool,
}

/// A mixture of experts in the place of an MLP: a gate and the experts that it chooses from.
#[derive(Module, Debug)]
pub struct Moe {
    /// Says where tokens go.
    pub gate: Gate,
    /// Where they go.
    pub experts: Experts,
    #[module(skip)]
    pub(super) activation: Activation,
}

impl MoeConfig {
    /// An untrained layer of experts with two projections.
    pub fn init(&self, gate: Gate, activation: Activation, device: &Device) -> Moe {
        let experts = Experts::Plain(self.experts().init(device));
        Moe { gate, experts, activation }
    }

    /// An untrained layer of experts with three projections.
    pub fn init_gated(&self, gate: Gate, activation: Activation, device: &Device) -> Moe {
        let experts = Experts::Gated(self.experts().init_gated(device));
        Moe { gate, experts, activation }
    }

    fn experts(&self) -> ExpertMlpConfig {
        ExpertMlpConfig::new(self.n_experts, self.d_model, self.d_ff).with_bias(self.bias)
    }
}

/// Each token through the experts that `routing` gives it: `[tokens, width] -> [tokens, width]`. A token whose choices were
/// all dropped gives zeros: where the layer is added to what goes into it, the token passes through.
///
/// - `experts`: rows sorted by expert to as many rows.
///
/// # Panics
/// If the routing is of another number of tokens.
pub fn mix(
    x: Tensor<2>,
    routing: &Routing,
    experts: impl FnOnce(Tensor<2>, &Dispatch) -> Tensor<2>,
) -> Tensor<2> {
    let dispatch = routing.experts.dispatch();
    if dispatch.rows() == 0 {
        return x.zeros_like();
    }
    let rows = experts(permute(x, &dispatch), &dispatch); // [rows, width]
    let weights = routing.weights.clone().cast(rows.dtype());
    combine(rows, weights, &dispatch)
}

impl Moe {
    /// `[..., d_model] -> [..., d_model]`, and where the tokens went.
    ///
    /// # Panics
    /// If the noise that was given does not fit the gate.
    pub fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        phase: Phase,
        noise: &mut Noise,
    ) -> (Tensor<D>, Routing) {
        let shape = x.dims();
        let (d_model, tokens) = (shape[D - 1], shape[..D - 1].iter().product::<usize>());
        let x = x.reshape([tokens, d_model]);
        let routing = self.gate.route(x.clone(), phase, noise);
        let y = mix(x, &routing, |rows, dispatch| self.experts.forward(rows, self.activation, dispatch));
        (y.reshape(shape), routing)
    }
}

#[cfg(test)]
mod tests {
    use super::super::gate::*;
    use super::*;
    use crate::random::seeded;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random};

    const TOKENS: usize = 12;
    const EXPERTS: usize = 4;
    const WIDTH: usize = 5;

    fn gates(device: &Device) -> Vec<Gate> {
        let node = Node { rank: 0, n_local: 1, workers: 2, shadowed: vec![2] };
        vec![
            Gate::Naive(NaiveGate::new(WIDTH, EXPERTS, 2, device)),
            Gate::Noisy(NoisyGate::new(WIDTH, EXPERTS, 2, device)),
            Gate::GShard(GShardGate { rates: [0.8, 1.0], ..GShardGate::new(WIDTH, EXPERTS, device) }),
            Gate::Switch(SwitchGate { rates: [0.8, 1.0], ..SwitchGate::new(WIDTH, EXPERTS, device) }),
            Gate::Swipe(SwipeGate { n_workers: 2, ..SwipeGate::new(WIDTH, EXPERTS, 2, device) }),
            Gate::Dc(DcGate { rates: [0.3, 1.0], ..DcGate::new(WIDTH, EXPERTS, device) }),
            Gate::Faster(FasterGate::new(WIDTH, EXPERTS, node, device)),
            Gate::Base(BaseGate::new(WIDTH, EXPERTS, device)),
            Gate::KTop1(KTop1Gate::new(WIDTH, EXPERTS, 2, Capacity::Factor(1.0), device)),
            Gate::Zero(ZeroGate { n_experts: EXPERTS, top_k: 2 }),
        ]
    }

    /// Every expert on every token, weighed by a table that is zero where a token did not go.
    fn dense(layer: &Moe, x: Tensor<2>, routing: &Routing) -> Tensor<2> {
        let top_k = routing.experts.top_k;
        let [tokens, d_model] = x.dims();
        let mut sum = Tensor::zeros([tokens, d_model], &x.device());
        for choice in 0..top_k {
            for expert in 0..EXPERTS {
                let went: Vec<f32> = (0..tokens)
                    .map(|token| routing.experts.ids[token * top_k + choice] == Some(expert))
                    .map(f32::from)
                    .collect();
                let went = Tensor::<1>::from_data(went.as_slice(), &x.device()).unsqueeze_dim::<2>(1);
                let project = |linear: &super::super::ExpertLinear, x: Tensor<2>| {
                    let weight = linear.weight.val().narrow(0, expert, 1).squeeze_dim::<2>(0);
                    let bias = linear.bias.as_ref().map(|bias| bias.val().narrow(0, expert, 1));
                    let y = x.matmul(weight);
                    bias.map_or(y.clone(), |bias| y + bias)
                };
                let y = match &layer.experts {
                    Experts::Plain(mlp) => {
                        project(&mlp.down, layer.activation.forward(project(&mlp.up, x.clone())))
                    }
                    Experts::Gated(mlp) => {
                        let gate = layer.activation.forward(project(&mlp.gate, x.clone()));
                        project(&mlp.down, gate * project(&mlp.up, x.clone()))
                    }
                };
                sum = sum + y * went * routing.weights.clone().narrow(1, choice, 1);
            }
        }
        sum
    }

    /// Forward and backward, with every gate, in both phases and with both forms of experts.
    #[test]
    fn the_layer_is_the_dense_oracle() {
        let config = MoeConfig::new(EXPERTS, WIDTH, 7);
        let plain = Device::flex();
        for device in [plain.clone(), plain.autodiff()] {
            for (at, gate) in gates(&device).into_iter().enumerate() {
                for phase in [Phase::Train, Phase::Eval] {
                    let layer = match at % 2 {
                        0 => config.init(gate.clone(), Activation::Gelu, &device),
                        _ => config.clone().with_bias(false).init_gated(
                            gate.clone(),
                            Activation::Silu,
                            &device,
                        ),
                    };
                    let layer = if device.is_autodiff() { layer.train() } else { layer };
                    let x = noise([TOKENS, WIDTH], at as u64, &device);
                    let x = if device.is_autodiff() { x.require_grad() } else { x };
                    let run = || layer.forward(x.clone(), phase, &mut Noise::Seeded(3));
                    let (y, expected) = (run().0, dense(&layer, x.clone(), &run().1));
                    assert_close(y.clone(), &floats(expected.clone()), 1e-5);
                    if device.is_autodiff() {
                        let weights = noise([TOKENS, WIDTH], 9, &device);
                        let gradient = |y: Tensor<2>| {
                            let gradients = (y * weights.clone()).sum().backward();
                            let experts = layer.experts.up().weight.val().grad(&gradients);
                            (x.grad(&gradients).unwrap(), experts.unwrap())
                        };
                        let (found, expected) = (gradient(y), gradient(expected));
                        assert_close(found.0, &floats(expected.0), 2e-5);
                        assert_close(found.1, &floats(expected.1), 2e-5);
                    }
                }
            }
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let device = Device::flex();
        // weights by whose routing a small step changes nothing
        let layer = seeded(1, &device, |device| {
            let gate = Gate::Naive(NaiveGate::new(3, 3, 2, device));
            MoeConfig::new(3, 3, 4).init(gate, Activation::Gelu, device)
        });
        let layer = layer.train();
        let at = random(12, &mut fastrand::Rng::with_seed(5));
        assert_gradient(
            |x: Tensor<3>| layer.forward(x, Phase::Eval, &mut Noise::Seeded(1)).0,
            [2, 2, 3],
            &at,
        );
    }

    /// One expert of capacity 0.
    #[test]
    fn a_token_that_is_dropped_gives_zeros() {
        let device = Device::flex();
        let gate = KTop1Gate::new(3, 2, 1, Capacity::Tokens(0), &device);
        let layer = MoeConfig::new(2, 3, 4).init(Gate::KTop1(gate), Activation::Gelu, &device);
        let (y, routing) = layer.forward(noise([2, 2, 3], 1, &device), Phase::Eval, &mut Noise::Seeded(1));
        assert_close(y, &[0.0; 12], 0.0);
        assert_eq!((routing.dropped, routing.load), (4, vec![0, 0]));
    }

    /// 10 billion parameters, were they allocated.
    #[test]
    fn counting_allocates_nothing() {
        let device = Device::flex();
        let gate = Gate::Zero(ZeroGate { n_experts: 1000, top_k: 1 });
        let layer = MoeConfig::new(1000, 1000, 5000).with_bias(false).init(gate, Activation::Gelu, &device);
        assert_eq!(layer.num_params(), 10_000_000_000);
    }
}
