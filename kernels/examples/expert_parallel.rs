//! Experts spread over ranks do what one process with all experts does: outputs, gradients and bytes, compared.
//!
//! ```sh
//! cargo run --workspace --features train --example expert_parallel           # ranks are threads
//! cargo build --workspace --features train,mpi --example expert_parallel
//! mpirun -n 4 target/debug/examples/expert_parallel                          # ranks are processes
//! mpirun -n 4 target/debug/examples/expert_parallel panic                    # the last one panics, or `kill`: all end
//! ```
//!
//! Without MPI, `RANKS` says how many threads there are: 4 unless it is set.

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::parallel::{Groups, ParallelMoe, Ranks, Traffic};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase};
use volary_kernels::ops::Activation;
use volary_kernels::random::seeded;

/// A layer, and how many tokens each rank has.
#[derive(Debug)]
struct Case {
    tokens: Vec<usize>,
    /// How many ranks share the experts.
    spread: usize,
    n_local: usize,
    d_model: usize,
    d_ff: usize,
    top_k: usize,
    chunks: usize,
    seed: u64,
}

/// What differs most from one process.
#[derive(Default)]
struct Differences {
    y: f32,
    of_x: f32,
    of_gate: f32,
    of_experts: f32,
}

const TOLERANCE: f32 = 1e-5;

impl Case {
    /// Of random sizes. Now and then a rank has no tokens.
    fn random(seed: u64, size: usize) -> Self {
        let mut rng = fastrand::Rng::with_seed(seed);
        let spreads: Vec<usize> = (1..=size).filter(|spread| size.is_multiple_of(*spread)).collect();
        let spread = if seed == 0 { size } else { spreads[rng.usize(..spreads.len())] };
        let n_local = rng.usize(1..5);
        Self {
            tokens: (0..size)
                .map(|rank| rng.usize(0..40).saturating_sub(8).max(usize::from(rank == 0)))
                .collect(),
            spread,
            n_local,
            d_model: rng.usize(1..24),
            d_ff: rng.usize(1..48),
            top_k: rng.usize(1..=(n_local * spread).min(3)),
            chunks: rng.usize(1..5),
            seed,
        }
    }

    fn layer(&self) -> Moe {
        let n_experts = self.n_local * self.spread;
        seeded(self.seed, &Device::flex(), |device| {
            let gate = Gate::Naive(NaiveGate::new(self.d_model, n_experts, self.top_k, device));
            let config =
                MoeConfig::new(n_experts, self.d_model, self.d_ff).with_bias(self.seed.is_multiple_of(3));
            match self.seed.is_multiple_of(2) {
                true => config.init(gate, Activation::Gelu, device),
                false => config.init_gated(gate, Activation::Silu, device),
            }
        })
    }

    /// Tokens of a rank, and what their outputs are weighed with in its loss.
    fn data(&self, rank: usize, device: &Device) -> [Tensor<2>; 2] {
        let mut rng = fastrand::Rng::with_seed(1000 * self.seed + rank as u64);
        let shape = [self.tokens[rank], self.d_model];
        [(); 2].map(|()| {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|_| 2.0 * rng.f32() - 1.0).collect();
            Tensor::from_data(TensorData::new(values, shape), device)
        })
    }
}

/// A layer on these ranks beside the whole one, and the bytes that this rank sent, counted and by the formula.
fn compare(case: &Case, world: &Ranks) -> (Differences, [Traffic; 2]) {
    let (rank, device) = (world.rank(), Device::flex().autodiff());
    let whole = case.layer();
    let groups = Groups::new(world, case.spread);
    let part = ParallelMoe::share_of(&whole, &groups.experts).with_chunks(case.chunks).train();
    let [x, projection] = case.data(rank, &device);
    let x = x.require_grad();
    let (y, routing) = part.forward(x.clone(), Phase::Train, &mut Noise::Seeded(0));
    let mut gradients = (y.clone() * projection).sum().backward();
    let sent = groups.experts.sent();
    groups.reduce(&part, &mut gradients);

    // every rank computes all of it
    let whole = whole.train();
    let (mut outputs, mut inputs, mut loads) = (Vec::new(), Vec::new(), Vec::new());
    let mut loss = Tensor::<1>::zeros([1], &device);
    for rank in 0..world.size() {
        let [x, projection] = case.data(rank, &device);
        let x = x.require_grad();
        let (y, routing) = whole.forward(x.clone(), Phase::Train, &mut Noise::Seeded(0));
        if case.tokens[rank] > 0 {
            loss = loss + (y.clone() * projection).sum();
        }
        loads.push(routing.load);
        outputs.push(y);
        inputs.push(x);
    }
    let expected = loss.backward();
    assert_eq!(routing.load, loads[rank], "choices of each expert, here (left) and in one process");

    let experts = read(&whole.experts, &expected).into_iter().map(|all| {
        let share = all.len() / case.spread;
        all[groups.experts.rank() * share..][..share].to_vec()
    });
    let differences = Differences {
        y: furthest(&values(y), &values(outputs.swap_remove(rank))),
        of_x: furthest(&of(&x, &gradients), &of(&inputs[rank], &expected)),
        of_gate: furthest(&read(&part.gate, &gradients).concat(), &read(&whole.gate, &expected).concat()),
        of_experts: furthest(
            &read(&part.experts, &gradients).concat(),
            &experts.collect::<Vec<_>>().concat(),
        ),
    };

    let own = groups.experts.rank() * case.n_local..(groups.experts.rank() + 1) * case.n_local;
    let choices = |load: &[usize]| load.iter().sum::<usize>() as u64;
    let first = rank - groups.experts.rank();
    let others = (first..first + case.spread).filter(|other| *other != rank);
    let out = choices(&loads[rank]) - choices(&loads[rank][own.clone()]);
    let back = others.map(|other| choices(&loads[other][own.clone()])).sum();
    let traffic = part.traffic(size_of::<f32>());
    (differences, [sent, traffic.forward(out, back) + traffic.backward(out, back)])
}

/// The gradients of a module's parameters in order.
fn read(module: &impl Module, gradients: &Gradients) -> Vec<Vec<f32>> {
    struct Read<'a>(&'a Gradients, Vec<Vec<f32>>);
    impl ModuleVisitor for Read<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push(of(&param.val(), self.0));
        }
    }
    let mut found = Read(gradients, Vec::new());
    module.visit(&mut found);
    found.1
}

/// The gradient of a tensor, zeros where it has none.
fn of<const D: usize>(tensor: &Tensor<D>, gradients: &Gradients) -> Vec<f32> {
    values(tensor.grad(gradients).unwrap_or_else(|| tensor.clone().inner().zeros_like()))
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().iter::<f32>().collect()
}

fn furthest(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len(), "values (left) and those expected");
    found.iter().zip(expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f32::max)
}

/// The numbers of all ranks.
fn gather<const N: usize>(numbers: [f32; N], ranks: &Ranks) -> Vec<[f32; N]> {
    let mut table = vec![[0.0; N]; ranks.size()];
    table[ranks.rank()] = numbers;
    let sum = ranks.all_reduce(Tensor::<1>::from_data(table.concat().as_slice(), &Device::flex()));
    values(sum).chunks(N).map(|row| std::array::from_fn(|at| row[at])).collect()
}

fn compare_all(world: &Ranks) {
    for seed in 0..12 {
        let case = Case::random(seed, world.size());
        let (differences, [sent, formula]) = compare(&case, world);
        assert_eq!(sent, formula, "bytes that were counted (left) and those of the formula, {case:?}");
        let Differences { y, of_x, of_gate, of_experts } = differences;
        let rows = gather([y, of_x, of_gate, of_experts, sent.rows as f32, sent.counts as f32], world);
        if world.rank() == 0 {
            let Case { tokens, spread, n_local, top_k, chunks, d_model, d_ff, .. } = &case;
            println!(
                "{} of {n_local} experts {d_model} -> {d_ff} on each, top {top_k}, {chunks} chunks, tokens {tokens:?}",
                if *spread == 1 { "1 rank".into() } else { format!("{spread} ranks") },
            );
            println!("  rank  y        of x     of gate  of experts  bytes of rows  of counts");
            for (rank, [y, of_x, of_gate, of_experts, rows, counts]) in rows.iter().enumerate() {
                println!(
                    "  {rank:<4}  {y:<7.1e}  {of_x:<7.1e}  {of_gate:<7.1e}  {of_experts:<10.1e}  {rows:<13}  {counts}"
                );
            }
        }
        let worst = rows.iter().flat_map(|row| &row[..4]).fold(0.0_f32, |worst, value| worst.max(*value));
        assert!(worst <= TOLERANCE, "a value differs by {worst}, {case:?}");
    }
    if world.rank() == 0 {
        println!(
            "{} ranks agree with one process within {TOLERANCE:e}, and sent what the formula says",
            world.size()
        );
    }
}

/// The last rank ends in this way, and the others wait for it.
fn end(how: &str, world: &Ranks) {
    world.barrier();
    if world.rank() + 1 == world.size() {
        match how {
            "panic" => panic!("as was asked"),
            "kill" => {
                let process = std::process::id().to_string();
                let killed = std::process::Command::new("kill").args(["-9", &process]).status();
                panic!("kill -9: {killed:?}")
            }
            _ => panic!("{how} is no way to end: panic, kill"),
        }
    }
    world.barrier();
}

fn main() {
    let how = std::env::args().nth(1);
    let work = |world: Ranks| match &how {
        Some(how) => end(how, &world),
        None => compare_all(&world),
    };
    #[cfg(feature = "mpi")]
    volary_kernels::moe::parallel::mpi::run(work);
    #[cfg(not(feature = "mpi"))]
    {
        let size = std::env::var("RANKS").ok().and_then(|size| size.parse().ok()).unwrap_or(4);
        volary_kernels::moe::parallel::threads::run(size, work);
    }
}
