use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Gradients, Tensor};

use super::*;
use crate::layers::{Linear, LinearConfig};
use crate::moe::gate::*;
use crate::moe::{Choices, Gate, Moe, MoeConfig, Noise, Phase, Placement, Routing, ShadowCost};
use crate::ops::Activation;
use crate::random::seeded;
use crate::testing::{floats, noise};

const WIDTH: usize = 5;

/// A row costs 7, a copy 2.
const BY_COST: Shadowing =
    Shadowing::ByCost(ShadowCost { d_model: 1, d_ff: 1, bytes: 1, network: 1.0, compute: 4.0 });

/// A layer, and how many tokens each rank has.
#[derive(Clone, Debug)]
struct Case {
    tokens: Vec<usize>,
    n_local: usize,
    chunks: usize,
    phase: Phase,
    seed: u64,
    kind: Kind,
    shadowing: Option<Shadowing>,
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
    Faster,
    /// All experts but the first have no token.
    Zero,
}

impl Case {
    fn n_experts(&self) -> usize {
        self.n_local * self.tokens.len()
    }

    /// With no copies, with the busiest ones, and with the first expert of each rank and all of the last one.
    fn shadowed(&self) -> [Self; 3] {
        let last = self.n_experts() - self.n_local..self.n_experts();
        let experts = (0..self.n_experts()).step_by(self.n_local).chain(last).collect();
        [None, Some(BY_COST), Some(Shadowing::Always(experts))]
            .map(|shadowing| Self { shadowing, ..self.clone() })
    }

    /// This rank's share of a layer.
    fn share(&self, layer: &Moe, ranks: &Ranks) -> ParallelMoe {
        let share = ParallelMoe::share_of(layer, ranks).with_chunks(self.chunks);
        match &self.shadowing {
            None => share,
            Some(shadowing) => share.with_shadowing(shadowing.clone()),
        }
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
            Kind::Swipe => {
                Gate::Swipe(SwipeGate { n_workers, ..SwipeGate::new(WIDTH, n_experts, 2, device) })
            }
            Kind::Dc => {
                Gate::Dc(DcGate { rates: [0.4, 0.5], n_workers, ..DcGate::new(WIDTH, n_experts, device) })
            }
            Kind::Base => Gate::Base(BaseGate::new(WIDTH, n_experts, device)),
            Kind::KTop1 => Gate::KTop1(KTop1Gate::new(WIDTH, n_experts, 2, Capacity::Factor(1.0), device)),
            Kind::Faster => {
                let node = Node { rank: 0, n_local: self.n_local, workers: 1, shadowed: Vec::new() };
                Gate::Faster(FasterGate::new(WIDTH, n_experts, node, device))
            }
            Kind::Zero => Gate::Zero(ZeroGate { n_experts, top_k: 2 }),
        }
    }

    fn layer(&self, n_workers: usize) -> Moe {
        let config = MoeConfig::new(self.n_experts(), WIDTH, 7);
        seeded(self.seed, &Device::flex(), |device| match self.seed % 2 {
            0 => config.init(self.gate(n_workers, device), Activation::Gelu, device),
            _ => config.clone().with_bias(false).init_gated(
                self.gate(n_workers, device),
                Activation::Silu,
                device,
            ),
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

/// Each rank is a machine of its own.
fn on_machine(rank: usize, mut layer: Moe) -> Moe {
    if let Gate::Faster(gate) = &mut layer.gate {
        gate.node.rank = rank;
    }
    layer
}

/// The layer on ranks that are threads.
fn spread(case: &Case, ranks: &Ranks) -> Outcome {
    spread_with(case, ranks, Losses::Both)
}

/// What gradients are of.
#[derive(PartialEq)]
enum Losses {
    /// The output alone.
    Output,
    /// The output, and the loss of the gate.
    Both,
}

fn spread_with(case: &Case, ranks: &Ranks, losses: Losses) -> Outcome {
    let rank = ranks.rank();
    let layer = case.share(&on_machine(rank, case.layer(ranks.size())), ranks).train();
    let device = Device::flex().autodiff();
    let x = case.x(rank, &device).require_grad();
    let (y, routing) = layer.forward(x.clone(), case.phase, &mut case.noise(rank));
    let loss = (y.clone() * case.projection(rank, &device)).sum();
    let aux_loss = routing.aux_loss.filter(|_| losses == Losses::Both);
    let loss = aux_loss.clone().map_or(loss.clone(), |aux| loss + aux);
    let mut gradients = loss.backward();
    Groups::new(ranks, ranks.size()).reduce(&layer, &mut gradients);
    Outcome {
        y: floats(y),
        aux_loss: aux_loss.map(|loss| loss.into_scalar()),
        load: routing.load,
        of_x: floats(x.grad(&gradients).unwrap()),
        of_gate: read(&layer.gate, &gradients),
        of_experts: read(&layer.experts, &gradients),
    }
}

/// The layer in one piece, which each rank's tokens go through.
fn whole(case: &Case) -> Vec<Outcome> {
    let mut layer = case.layer(1).train();
    let device = Device::flex().autodiff();
    let mut sum = Tensor::<1>::zeros([1], &device);
    let mut outputs = Vec::new();
    for rank in 0..case.tokens.len() {
        let x = case.x(rank, &device).require_grad();
        layer = on_machine(rank, layer);
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
    let gradients = sum.backward();
    let (of_gate, of_experts) = (read(&layer.gate, &gradients), read(&layer.experts, &gradients));
    let outcome = |(x, output): (Tensor<2>, Option<(Tensor<2>, Routing)>)| {
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
        assert!(
            (found - expected).abs() <= 1e-5,
            "{what} {at} of {case:?}: found {found}, expected {expected}"
        );
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
    const KINDS: [Kind; 8] = [
        Kind::Naive,
        Kind::Noisy,
        Kind::GShard,
        Kind::Switch,
        Kind::Base,
        Kind::KTop1,
        Kind::Faster,
        Kind::Zero,
    ];
    let tokens: [&[usize]; 8] =
        [&[6], &[8, 8], &[4, 0], &[0, 12], &[2, 6, 4], &[9, 0, 4], &[4, 4, 8, 4], &[0, 3, 1, 0]];
    let mut rng = fastrand::Rng::with_seed(11);
    let mut cases = Vec::new();
    for tokens in tokens {
        for kind in KINDS {
            for phase in [Phase::Train, Phase::Eval] {
                let (tokens, seed) = (tokens.to_vec(), rng.u64(0..1000));
                let (n_local, chunks) = (2 * rng.usize(1..3), rng.usize(1..5));
                cases.push(Case { tokens, n_local, chunks, phase, seed, kind, shadowing: None });
            }
        }
    }
    cases
}

#[test]
fn ranks_together_are_the_layer() {
    let mut copied = 0;
    for case in cases() {
        let expected = whole(&case);
        let totals: Vec<usize> =
            (0..case.n_experts()).map(|expert| expected.iter().map(|rank| rank.load[expert]).sum()).collect();
        copied += BY_COST.choose(&totals).len();
        for case in case.shadowed() {
            let found = threads::run(case.tokens.len(), |ranks| spread(&case, &ranks));
            assert_same(&found, &expected, &case);
        }
    }
    assert!(copied > 100, "{copied} copies of {} cases", cases().len());
}

#[test]
fn ranks_without_tokens_go_through_all_the_same() {
    let tokens = vec![0, 0];
    let (phase, kind) = (Phase::Train, Kind::Naive);
    let case = Case { tokens, n_local: 2, chunks: 3, phase, seed: 2, kind, shadowing: None };
    for case in case.shadowed() {
        for found in threads::run(2, |ranks| spread(&case, &ranks)) {
            assert!(found.y.is_empty() && found.of_x.is_empty());
            let sizes: Vec<usize> = found.of_experts.iter().map(Vec::len).collect();
            assert_eq!(sizes, [2 * WIDTH * 7, 2 * 7, 2 * 7 * WIDTH, 2 * WIDTH]);
            assert!(found.of_experts.concat().iter().all(|value| *value == 0.0));
        }
    }
}

#[test]
#[should_panic(expected = "workers of the gate (left) and ranks")]
fn a_gate_is_of_as_many_workers_as_there_are_ranks() {
    threads::run(2, |ranks| ParallelMoe::share_of(&two(Kind::Dc).layer(4), &ranks));
}

/// Two ranks with a token each.
fn two(kind: Kind) -> Case {
    let (tokens, phase) = (vec![1, 1], Phase::Train);
    Case { tokens, n_local: 2, chunks: 1, phase, seed: 1, kind, shadowing: None }
}

#[test]
#[should_panic(expected = "experts [0, 4], of which there are 4, cannot be copied")]
fn an_expert_that_is_copied_is_there() {
    let case = Case { shadowing: Some(Shadowing::Always(vec![0, 4])), ..two(Kind::Naive) };
    threads::run(2, |ranks| case.share(&case.layer(2), &ranks));
}

#[test]
fn no_expert_is_copied_twice() {
    assert_eq!(Shadowing::Always(vec![3, 1, 3]).choose(&[9; 4]), [1, 3]);
    assert_eq!(BY_COST.choose(&[9, 3, 10, 3]), [0, 2]);
}

/// As in a forward pass that nobody goes back through.
#[test]
fn copies_answer_without_gradients() {
    let case = Case { tokens: vec![5, 9], seed: 6, ..two(Kind::Naive) };
    let device = Device::flex();
    let expected = whole(&case);
    for case in case.shadowed() {
        let found = threads::run(2, |ranks| {
            let layer = case.share(&case.layer(2), &ranks);
            let x = case.x(ranks.rank(), &device);
            let (y, _) = layer.forward(x, case.phase, &mut case.noise(ranks.rank()));
            (floats(y), ranks.sent())
        });
        for ((y, sent), expected) in found.iter().zip(&expected) {
            assert_near(y, &expected.y, "output", &case);
            assert_eq!(sent.broadcast > 0 && sent.reduced == 0, case.shadowing.is_some(), "{case:?}");
        }
    }
}

/// The layer in one piece, whose gate is of as many workers as there are ranks: all tokens go through it at once.
fn whole_of_workers(case: &Case) -> Vec<Outcome> {
    let size = case.tokens.len();
    let layer = case.layer(size).train();
    let device = Device::flex().autodiff();
    let of_ranks = |part: &dyn Fn(usize) -> Tensor<2>| Tensor::cat((0..size).map(part).collect(), 0);
    let x = of_ranks(&|rank| case.x(rank, &device)).require_grad();
    let drawn = of_ranks(&|rank| case.noise(rank).uniform([case.tokens[rank], 1], &device));
    let (y, routing) = layer.forward(x.clone(), case.phase, &mut Noise::Given(drawn));
    let gradients = (y.clone() * of_ranks(&|rank| case.projection(rank, &device))).sum().backward();
    let (y, of_x) = (floats(y), floats(x.grad(&gradients).unwrap()));
    let (of_gate, of_experts) = (read(&layer.gate, &gradients), read(&layer.experts, &gradients));
    let outcome = |rank: usize| {
        let first: usize = case.tokens[..rank].iter().sum();
        let (tokens, top_k) = (first..first + case.tokens[rank], routing.experts.top_k);
        let own = Choices {
            ids: routing.experts.ids[tokens.start * top_k..tokens.end * top_k].to_vec(),
            ..routing.experts.clone()
        };
        Outcome {
            y: y[tokens.start * WIDTH..tokens.end * WIDTH].to_vec(),
            aux_loss: None,
            load: own.load(),
            of_x: of_x[tokens.start * WIDTH..tokens.end * WIDTH].to_vec(),
            of_gate: of_gate.clone(),
            of_experts: of_experts.clone(),
        }
    };
    (0..size).map(outcome).collect()
}

/// Gates that know of workers choose as those of one process that has the tokens of all of them. The losses are of the tokens
/// of each rank, and left out here.
#[test]
fn ranks_are_workers() {
    let tokens: [&[usize]; 5] = [&[5], &[8, 8], &[6, 6, 6], &[4, 4, 4, 4], &[3, 0, 7]];
    for tokens in tokens {
        for (seed, kind) in
            [(1, Kind::GShard), (2, Kind::Dc), (3, Kind::Swipe), (4, Kind::Dc), (6, Kind::Swipe)]
        {
            let is_even = tokens.iter().all(|count| *count == tokens[0]);
            if kind != Kind::Dc && !is_even {
                continue;
            }
            let case = Case { tokens: tokens.to_vec(), chunks: 2, seed, ..two(kind) };
            let expected = whole_of_workers(&case);
            for case in case.shadowed() {
                let found = threads::run(tokens.len(), |ranks| spread_with(&case, &ranks, Losses::Output));
                assert_same(&found, &expected, &case);
            }
        }
    }
}

/// As many bytes as the formulas say, on each rank and on all.
#[test]
fn what_is_sent_is_what_the_formula_says() {
    for (at, tokens) in [vec![7], vec![5, 0], vec![3, 4, 11], vec![2, 3, 0, 9]].into_iter().enumerate() {
        let kind = if at == 2 { Kind::Zero } else { Kind::Naive };
        let case = Case { tokens, chunks: at + 1, phase: Phase::Eval, seed: 9 + at as u64, ..two(kind) };
        for case in case.shadowed() {
            assert_sent(&case);
        }
    }
    let (size, n_local, chunks, d_model, value) = (4, 8, 2, 512, 2);
    let traffic = LayerTraffic { size, n_local, chunks, d_model, value, numbers: 1000, is_told: false };
    let expected = Traffic { counts: 192, rows: 307_200, ..Traffic::default() };
    assert_eq!(traffic.forward(100, 200, 0), expected);
    assert_eq!(traffic.backward(100, 200, 0), Traffic { counts: 0, ..expected });
    let told = LayerTraffic { is_told: true, ..traffic };
    // 32 loads for each of three others, three experts of 2000 bytes for each of them, five gradients of 4000
    assert_eq!(told.forward(100, 200, 3), Traffic { counts: 192 + 384, broadcast: 18_000, ..expected });
    assert_eq!(told.backward(100, 200, 5), Traffic { counts: 0, reduced: 20_000, ..expected });
}

/// What the ranks of a layer send is what the formula says, and what [`Placement`] counts.
fn assert_sent(case: &Case) {
    let size = case.tokens.len();
    let device = Device::flex().autodiff();
    let ranks = threads::run(size, |ranks| {
        let layer = case.share(&case.layer(size), &ranks).train();
        let x = case.x(ranks.rank(), &device).require_grad();
        let (y, routing) = layer.forward(x, case.phase, &mut Noise::Seeded(1));
        let forward = ranks.sent();
        y.sum().backward();
        (forward, ranks.sent(), routing.load, layer.traffic(4))
    });
    let loads: Vec<Vec<usize>> = ranks.iter().map(|(.., load, _)| load.clone()).collect();
    let placement = Placement::new(size, case.n_experts());
    let shadowing = case.shadowing.clone().filter(|_| size > 1);
    let copied = shadowing.map_or(Vec::new(), |shadowing| shadowing.choose(&placement.totals(&loads)));
    let at = |rank: usize, owner: usize| -> u64 {
        let experts = (owner * case.n_local..(owner + 1) * case.n_local).filter(|id| !copied.contains(id));
        experts.map(|expert| loads[rank][expert] as u64).sum()
    };
    let mut sums = [Traffic::default(); 2];
    for (rank, (forward, both, _, traffic)) in ranks.iter().enumerate() {
        let others = (0..size).filter(|other| *other != rank);
        let (out, back) =
            (others.clone().map(|other| at(rank, other)).sum(), others.map(|o| at(o, rank)).sum());
        let own = copied.iter().filter(|expert| placement.home(**expert) == rank).count() as u64;
        let expected = traffic.forward(out, back, own);
        assert_eq!(*forward, expected, "rank {rank} of {case:?}");
        let expected = expected + traffic.backward(out, back, copied.len() as u64 - own);
        assert_eq!(*both, expected, "rank {rank} of {case:?}");
        sums = [sums[0] + *forward, sums[1] + *both];
    }
    let exchange = placement.shadowing(&copied).exchange(&loads);
    let rows = 2 * (exchange.rows * WIDTH * 4) as u64;
    let experts = exchange.experts as u64 * ranks[0].3.numbers * 4;
    assert_eq!([sums[0].rows, sums[0].broadcast, sums[0].reduced], [rows, experts, 0], "{case:?}");
    assert_eq!([sums[1].rows, sums[1].broadcast, sums[1].reduced], [2 * rows, experts, experts], "{case:?}");
}

/// Two layers after each other with what is the same on all ranks between them, on two sets of experts.
#[derive(Module, Debug)]
struct Model {
    first: ParallelMoe,
    between: Linear,
    second: ParallelMoe,
}

#[test]
fn data_and_experts_are_in_groups_of_their_own() {
    let device = Device::flex().autodiff();
    let whole = seeded(5, &Device::flex(), |device| {
        let layer = || {
            let gate = Gate::Naive(NaiveGate::new(WIDTH, 4, 2, device));
            MoeConfig::new(4, WIDTH, 6).init(gate, Activation::Gelu, device)
        };
        (layer(), LinearConfig::new(WIDTH, WIDTH).init(device), layer())
    });
    let tokens = [3, 4, 0, 5];
    let x = |rank: usize| noise::<2>([tokens[rank], WIDTH], rank as u64, &device);
    let found = threads::run(4, |world| {
        let groups = Groups::new(&world, 2);
        assert_eq!([groups.experts.size(), groups.data.size()], [2, 2]);
        assert_eq!([groups.experts.rank(), groups.data.rank()], [world.rank() % 2, world.rank() / 2]);
        let part = |layer: &Moe| {
            ParallelMoe::share_of(layer, &groups.experts).with_chunks(2).with_shadowing(BY_COST)
        };
        let model = Model { first: part(&whole.0), between: whole.1.clone(), second: part(&whole.2) }.train();
        let pass = |layer: &ParallelMoe, x: Tensor<2>| {
            x.clone() + layer.forward(x, Phase::Train, &mut Noise::Seeded(1)).0
        };
        let y = pass(&model.second, model.between.forward(pass(&model.first, x(world.rank()))));
        let mut gradients = y.square().sum().backward();
        groups.reduce(&model, &mut gradients);
        [read(&model.first, &gradients), read(&model.between, &gradients), read(&model.second, &gradients)]
    });
    let whole = whole.train();
    let pass =
        |layer: &Moe, x: Tensor<2>| x.clone() + layer.forward(x, Phase::Train, &mut Noise::Seeded(1)).0;
    let x = Tensor::cat((0..4).map(x).collect(), 0);
    let y = pass(&whole.2, whole.1.forward(pass(&whole.0, x)));
    let gradients = y.square().sum().backward();
    let expected = [read(&whole.0, &gradients), read(&whole.1, &gradients), read(&whole.2, &gradients)];
    for (rank, found) in found.iter().enumerate() {
        for (part, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                // experts are halves
                let first = if found.len() < expected.len() { rank % 2 * found.len() } else { 0 };
                let expected = &expected[first..first + found.len()];
                let error = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
                assert!(error <= 5e-5, "part {part} of rank {rank} differs by {error}");
            }
        }
    }
}

/// Burn's other way to keep a graph, and half precision on the way.
#[test]
fn checkpointing_and_half_precision_work() {
    let shadowing = Some(Shadowing::Always(vec![1]));
    let case = Case { tokens: vec![6, 3], chunks: 2, seed: 8, shadowing, ..two(Kind::Naive) };
    let gradient = |device: &Device, dtype: DType| {
        threads::run(2, |ranks| {
            let layer = case.share(&case.layer(2), &ranks);
            let layer = layer.map(&mut To { device, dtype });
            let x = case.x(ranks.rank(), device).cast(dtype).require_grad();
            let (y, _) = layer.forward(x.clone(), case.phase, &mut Noise::Seeded(1));
            let gradients = y.square().sum().backward();
            let sent = ranks.sent();
            (floats(x.grad(&gradients).unwrap()), sent.rows + sent.broadcast)
        })
    };
    let device = Device::flex().autodiff();
    let expected = gradient(&device, DType::F32);
    assert!(expected.iter().flat_map(|(of_x, _)| of_x).any(|value| value.abs() > 1e-3));
    let kept = gradient(&device.clone().gradient_checkpointing(), DType::F32);
    assert_eq!(kept, expected);
    for ((half, sent), (whole, all)) in gradient(&device, DType::BF16).iter().zip(&expected) {
        assert_eq!(2 * sent, *all);
        for (half, whole) in half.iter().zip(whole) {
            assert!((half - whole).abs() < 0.05, "{half} {whole}");
        }
    }
}

struct To<'a> {
    device: &'a Device,
    dtype: DType,
}

impl ModuleMapper for To<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| Tensor::from_data(value.into_data(), (self.device, self.dtype)).require_grad())
    }
}

#[test]
fn ranks_tell_each_other() {
    let device = Device::flex();
    let found = threads::run(3, |ranks| {
        let rank = ranks.rank();
        let each = ranks.all_to_all(&[10 * rank, 10 * rank + 1, 10 * rank + 2]);
        let sum = ranks.all_reduce(Tensor::<1>::from_data([rank as f32, 1.0], &device));
        let of_one = ranks.reduce(Tensor::<1>::from_data([rank as f32], &device), 2).map(floats);
        let given = ranks.broadcast(Tensor::<2>::full([2, 1], rank as f32, &device), 1);
        let odd = ranks.split(rank % 2);
        // the groups do different things
        for _ in 0..rank % 2 {
            odd.all_gather(&[rank]);
        }
        ranks.barrier();
        (each, floats(sum), of_one, floats(given), odd.all_gather(&[rank]), ranks.sent())
    });
    for (rank, (each, sum, of_one, given, same, sent)) in found.into_iter().enumerate() {
        assert_eq!(each, [rank, 10 + rank, 20 + rank]);
        assert_eq!((sum, given), (vec![3.0, 3.0], vec![1.0, 1.0]));
        assert_eq!(same, if rank == 1 { vec![1] } else { vec![0, 2] });
        assert_eq!(of_one, (rank == 2).then_some(vec![3.0]));
        let (broadcast, reduced) = (if rank == 1 { 16 } else { 0 }, if rank == 2 { 8 } else { 12 });
        assert_eq!(sent, Traffic { counts: 8, rows: 0, reduced, broadcast });
    }
}

#[test]
fn a_shared_module_is_that_of_its_root() {
    let found = threads::run(2, |ranks| {
        let device = Device::flex();
        let gate = seeded(ranks.rank() as u64, &device, |device| NaiveGate::new(WIDTH, 4, 2, device));
        let shared = ranks.share(gate.clone(), 1);
        (floats(gate.gate.weight.val()), floats(shared.gate.weight.val()))
    });
    assert_ne!(found[0].0, found[1].0);
    assert_eq!(found[0].1, found[1].0);
    assert_eq!(found[1].1, found[1].0);
}

/// Nobody waits for ever.
#[test]
fn a_rank_that_panics_ends_all() {
    let ended = std::panic::catch_unwind(|| {
        threads::run(3, |ranks| {
            ranks.barrier();
            if ranks.rank() == 2 {
                std::panic::resume_unwind(Box::new("two is broken"));
            }
            ranks.barrier();
        })
    });
    assert_eq!(ended.unwrap_err().downcast_ref(), Some(&"two is broken"));
}

#[test]
#[should_panic(expected = "rank 0 waited for rank 1, which has ended")]
fn a_rank_that_leaves_is_missed() {
    threads::run(2, |ranks| {
        if ranks.rank() == 0 {
            ranks.barrier();
        }
    });
}
