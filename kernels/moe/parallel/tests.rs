use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor};

use super::*;
use crate::moe::gate::*;
use crate::moe::{Gate, Moe, MoeConfig, Noise, Phase};
use crate::ops::Activation;
use crate::random::seeded;
use crate::testing::{floats, noise};

const WIDTH: usize = 5;

/// A layer, and how many tokens each rank has.
#[derive(Clone, Debug)]
struct Case {
    tokens: Vec<usize>,
    n_local: usize,
    chunks: usize,
    phase: Phase,
    seed: u64,
    kind: Kind,
}

/// What the layer is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Naive,
    Noisy,
    GShard,
    Switch,
    Swipe,
    Dc,
    Base,
    KTop1,
    /// All experts but the first have no token.
    Zero,
}

impl Case {
    fn n_experts(&self) -> usize {
        self.n_local * self.tokens.len()
    }

    /// Made for `n_workers`.
    fn gate(&self, n_workers: usize, device: &Device) -> Gate {
        let n_experts = self.n_experts();
        match self.kind {
            Kind::Naive => Gate::Naive(NaiveGate::new(WIDTH, n_experts, 2, device)),
            Kind::Noisy => Gate::Noisy(NoisyGate::new(WIDTH, n_experts, 2, device)),
            Kind::GShard => {
                let gate = GShardGate::new(WIDTH, n_experts, device);
                Gate::GShard(GShardGate { rates: [0.8, 1.0], n_workers, ..gate })
            }
            Kind::Switch => Gate::Switch(SwitchGate::new(WIDTH, n_experts, device)),
            Kind::Swipe => Gate::Swipe(SwipeGate { n_workers, ..SwipeGate::new(WIDTH, n_experts, 2, device) }),
            Kind::Dc => Gate::Dc(DcGate { rates: [0.4, 0.5], n_workers, ..DcGate::new(WIDTH, n_experts, device) }),
            Kind::Base => Gate::Base(BaseGate::new(WIDTH, n_experts, device)),
            Kind::KTop1 => Gate::KTop1(KTop1Gate::new(WIDTH, n_experts, 2, Capacity::Factor(1.0), device)),
            Kind::Zero => Gate::Zero(ZeroGate { n_experts, top_k: 2 }),
        }
    }

    fn layer(&self, n_workers: usize) -> Moe {
        let config = MoeConfig::new(self.n_experts(), WIDTH, 7);
        seeded(self.seed, &Device::flex(), |device| match self.seed % 2 {
            0 => config.init(self.gate(n_workers, device), Activation::Gelu, device),
            _ => config.clone().with_bias(false).init_gated(self.gate(n_workers, device), Activation::Silu, device),
        })
    }

    /// The tokens of a rank.
    fn x(&self, rank: usize, device: &Device) -> Tensor<2> {
        noise([self.tokens[rank], WIDTH], 100 * self.seed + rank as u64, device)
    }

    /// What the output of a rank is weighed with in its loss.
    fn projection(&self, rank: usize, device: &Device) -> Tensor<2> {
        noise([self.tokens[rank], WIDTH], 100 * self.seed + 50 + rank as u64, device)
    }

    /// The random numbers of a rank's gate.
    fn noise(&self, rank: usize) -> Noise {
        Noise::Seeded(self.seed + rank as u64)
    }
}

/// What comes out of a rank.
#[derive(Debug)]
struct Outcome {
    y: Vec<f64>,
    aux_loss: Option<f64>,
    load: Vec<usize>,
    of_x: Vec<f64>,
    /// Of each parameter.
    of_gate: Vec<Vec<f64>>,
    of_experts: Vec<Vec<f64>>,
}

struct Read<'a> {
    gradients: &'a Gradients,
    read: Vec<Vec<f64>>,
}

impl ModuleVisitor for Read<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let gradient = value.grad(self.gradients).unwrap_or_else(|| value.inner().zeros_like());
        self.read.push(floats(gradient));
    }
}

/// The gradients of a module's parameters, zeros where there is none.
fn read(module: &impl Module, gradients: &Gradients) -> Vec<Vec<f64>> {
    let mut read = Read { gradients, read: Vec::new() };
    module.visit(&mut read);
    read.read
}

/// The layer on ranks that are threads.
fn spread(case: &Case, ranks: &Ranks) -> Outcome {
    let rank = ranks.rank();
    let layer = ParallelMoe::share_of(&case.layer(ranks.size()), ranks).with_chunks(case.chunks).train();
    let device = Device::flex().autodiff();
    let x = case.x(rank, &device).require_grad();
    let (y, routing) = layer.forward(x.clone(), case.phase, &mut case.noise(rank));
    let loss = (y.clone() * case.projection(rank, &device)).sum();
    let loss = routing.aux_loss.clone().map_or(loss.clone(), |aux| loss + aux);
    let mut gradients = loss.backward();
    Groups::new(ranks, ranks.size()).reduce(&layer, &mut gradients);
    Outcome {
        y: floats(y),
        aux_loss: routing.aux_loss.map(|loss| loss.into_scalar()),
        load: routing.load,
        of_x: floats(x.grad(&gradients).unwrap()),
        of_gate: read(&layer.gate, &gradients),
        of_experts: read(&layer.experts, &gradients),
    }
}

/// The layer in one piece, which each rank's tokens go through.
fn whole(case: &Case) -> Vec<Outcome> {
    let layer = case.layer(1).train();
    let device = Device::flex().autodiff();
    let mut sum = Tensor::<1>::zeros([1], &device);
    let mut outputs = Vec::new();
    for rank in 0..case.tokens.len() {
        let x = case.x(rank, &device).require_grad();
        if case.tokens[rank] == 0 {
            outputs.push((x, None));
            continue;
        }
        let (y, mut routing) = layer.forward(x.clone(), case.phase, &mut case.noise(rank));
        if case.kind == Kind::GShard {
            let share = 1.0 / (case.tokens.len() as f64).powi(2);
            routing.aux_loss = routing.aux_loss.map(|loss| loss * share); // experts of a rank, squared
        }
        sum = sum + (y.clone() * case.projection(rank, &device)).sum();
        sum = routing.aux_loss.clone().map_or(sum.clone(), |aux| sum + aux);
        outputs.push((x, Some((y, routing))));
    }
    let gradients = match sum.is_tracked() {
        true => sum.backward(),
        false => return Vec::new(), // no rank has a token
    };
    let (of_gate, of_experts) = (read(&layer.gate, &gradients), read(&layer.experts, &gradients));
    let outcome = |(x, output): (Tensor<2>, Option<(Tensor<2>, crate::moe::Routing)>)| {
        let (y, routing) = output.unzip();
        Outcome {
            y: y.map_or(Vec::new(), floats),
            aux_loss: routing.as_ref().and_then(|r| r.aux_loss.clone()).map(|loss| loss.into_scalar()),
            load: routing.map_or(vec![0; case.n_experts()], |routing| routing.load),
            of_x: x.grad(&gradients).map_or(Vec::new(), floats),
            of_gate: of_gate.clone(),
            of_experts: of_experts.clone(),
        }
    };
    outputs.into_iter().map(outcome).collect()
}

#[track_caller]
fn assert_near(found: &[f64], expected: &[f64], what: &str, case: &Case) {
    assert_eq!(found.len(), expected.len(), "{what} of {case:?}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!((found - expected).abs() <= 1e-5, "{what} {at} of {case:?}: found {found}, expected {expected}");
    }
}

#[track_caller]
fn assert_same(found: &[Outcome], expected: &[Outcome], case: &Case) {
    for (found, expected) in found.iter().zip(expected) {
        assert_eq!(found.load, expected.load, "{case:?}");
        assert_near(&found.y, &expected.y, "output", case);
        assert_near(&found.of_x, &expected.of_x, "gradient of x", case);
        let aux = |outcome: &Outcome| outcome.aux_loss.into_iter().collect::<Vec<_>>();
        assert_near(&aux(found), &aux(expected), "loss", case);
        for (found, expected) in found.of_gate.iter().zip(&expected.of_gate) {
            assert_near(found, expected, "gradient of the gate", case);
        }
    }
    for (at, expected) in expected[0].of_experts.iter().enumerate() {
        let found: Vec<f64> = found.iter().flat_map(|rank| rank.of_experts[at].clone()).collect();
        assert_near(&found, expected, "gradient of experts", case);
    }
}

/// One to four ranks; tokens in equal numbers, unequal ones, and none on a rank; more and fewer experts than are chosen.
fn cases() -> Vec<Case> {
    let kinds = [Kind::Naive, Kind::Noisy, Kind::GShard, Kind::Switch, Kind::Base, Kind::KTop1, Kind::Zero];
    let tokens: [&[usize]; 8] = [&[6], &[8, 8], &[4, 0], &[0, 12], &[2, 6, 4], &[9, 0, 4], &[4, 4, 8, 4], &[0, 3, 1, 0]];
    let mut rng = fastrand::Rng::with_seed(11);
    let mut cases = Vec::new();
    for tokens in tokens {
        for kind in kinds {
            cases.push(Case {
                tokens: tokens.to_vec(),
                n_local: 2 * rng.usize(1..3),
                chunks: rng.usize(1..5),
                phase: if rng.bool() { Phase::Train } else { Phase::Eval },
                seed: rng.u64(0..1000),
                kind,
            });
        }
    }
    cases
}

#[test]
fn ranks_together_are_the_layer() {
    for case in cases() {
        let found = threads::run(case.tokens.len(), |ranks| spread(&case, &ranks));
        assert_same(&found, &whole(&case), &case);
    }
}
