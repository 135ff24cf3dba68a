//! Experts spread over ranks do what one process with all experts does: outputs, gradients and bytes, compared. With `time`,
//! how long a layer takes whose tokens are cut into 1, 2 and 4 chunks.
//!
//! ```sh
//! cargo run --workspace --features train --example expert_parallel           # ranks are threads
//! cargo build --workspace --features train,mpi --example expert_parallel
//! mpirun -n 4 target/debug/examples/expert_parallel                          # ranks are processes
//! mpirun -n 4 target/debug/examples/expert_parallel panic                    # the last one panics, or `kill`: all end
//! mpirun -n 2 target/debug/examples/expert_parallel time
//! ```
//!
//! Without MPI, `RANKS` says how many threads there are, 4 unless it is set, and `LINK` how many bytes a second each sends to
//! others, as many as it can unless it is set.

use std::time::Instant;

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::parallel::{Groups, ParallelMoe, Ranks, Shadowing, Traffic};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase, ShadowCost};
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
    shadowing: Option<Shadowing>,
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
            shadowing: match seed % 3 {
                0 => None,
                1 => Some(Shadowing::Always((0..n_local * spread).step_by(2).collect())),
                // a row costs 4, a copy 2
                _ => Some(Shadowing::ByCost(ShadowCost {
                    d_model: 1,
                    d_ff: 1,
                    bytes: 1,
                    network: 1.0,
                    compute: f64::INFINITY,
                })),
            },
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
    let part = match &case.shadowing {
        Some(shadowing) => part.with_shadowing(shadowing.clone()),
        None => part,
    };
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
    let first = rank - groups.experts.rank();
    let group = first..first + case.spread;
    let totals: Vec<usize> = (0..case.n_local * case.spread)
        .map(|expert| group.clone().map(|rank| loads[rank][expert]).sum())
        .collect();
    let shadowing = case.shadowing.as_ref().filter(|_| case.spread > 1);
    let copied = shadowing.map_or(Vec::new(), |shadowing| shadowing.choose(&totals));
    let choices = |rank: usize, is_own: bool| -> u64 {
        let travelling = |expert: &usize| own.contains(expert) == is_own && !copied.contains(expert);
        (0..totals.len()).filter(travelling).map(|expert| loads[rank][expert] as u64).sum()
    };
    let out = choices(rank, false);
    let back = group.filter(|other| *other != rank).map(|other| choices(other, true)).sum();
    let copied_here = copied.iter().filter(|expert| own.contains(expert)).count() as u64;
    let traffic = part.traffic(size_of::<f32>());
    let formula = traffic.forward(out, back, copied_here)
        + traffic.backward(out, back, copied.len() as u64 - copied_here);
    (differences, [sent, formula])
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
        let bytes = [sent.rows, sent.counts, sent.broadcast + sent.reduced].map(|bytes| bytes as f32);
        let rows = gather([y, of_x, of_gate, of_experts, bytes[0], bytes[1], bytes[2]], world);
        if world.rank() == 0 {
            let Case { tokens, spread, n_local, top_k, chunks, d_model, d_ff, .. } = &case;
            println!(
                "{} of {n_local} experts {d_model} -> {d_ff} on each, top {top_k}, {chunks} chunks, tokens {tokens:?}",
                if *spread == 1 { "1 rank".into() } else { format!("{spread} ranks") },
            );
            println!("  rank  y        of x     of gate  of experts  bytes of rows  of counts  of copies");
            for (rank, [y, of_x, of_gate, of_experts, rows, counts, copies]) in rows.iter().enumerate() {
                println!(
                    "  {rank:<4}  {y:<7.1e}  {of_x:<7.1e}  {of_gate:<7.1e}  {of_experts:<10.1e}  {rows:<13}  {counts:<9}  {copies}"
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

/// How long a forward and a backward pass of a layer take, from when all ranks begin to when the last one has ended: eight
/// experts 256 -> 1024, top 2, 1024 tokens on each rank. The median of five rounds in turns, the least and the greatest.
fn time(world: &Ranks) {
    const CHUNKS: [usize; 3] = [1, 2, 4];
    const ROUNDS: usize = 5;
    let n_local = 8 / world.size();
    let case = Case {
        tokens: vec![1024; world.size()],
        spread: world.size(),
        n_local,
        d_model: 256,
        d_ff: 1024,
        top_k: 2,
        chunks: 1,
        shadowing: None,
        seed: 0,
    };
    let (layer, device) = (ParallelMoe::share_of(&case.layer(), world).train(), Device::flex().autodiff());
    let [x, projection] = case.data(world.rank(), &device);
    let mut seconds = CHUNKS.map(|_| Vec::new());
    for round in 0..=ROUNDS {
        for (chunks, seconds) in CHUNKS.into_iter().zip(&mut seconds) {
            let layer = layer.clone().with_chunks(chunks);
            world.barrier();
            let begin = Instant::now();
            let (y, _) = layer.forward(x.clone().require_grad(), Phase::Train, &mut Noise::Seeded(0));
            (y * projection.clone()).sum().backward();
            let slowest =
                gather([begin.elapsed().as_secs_f32()], world).concat().into_iter().fold(0.0, f32::max);
            // the first one warms up
            if round > 0 {
                seconds.push(slowest);
            }
        }
    }
    for (chunks, mut seconds) in CHUNKS.into_iter().zip(seconds) {
        seconds.sort_by(f32::total_cmp);
        if world.rank() == 0 {
            println!(
                "{} ranks, {chunks} chunks: {:.3} s ({:.3}-{:.3})",
                world.size(),
                seconds[ROUNDS / 2],
                seconds[0],
                seconds[ROUNDS - 1]
            );
        }
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
            _ => panic!("{how} is neither `time` nor a way to end: panic, kill"),
        }
    }
    world.barrier();
}

fn main() {
    let how = std::env::args().nth(1);
    let work = |world: Ranks| match how.as_deref() {
        Some("time") => time(&world),
        Some(how) => end(how, &world),
        None => compare_all(&world),
    };
    #[cfg(feature = "mpi")]
    volary_kernels::moe::parallel::mpi::run(work);
    #[cfg(not(feature = "mpi"))]
    {
        let number = |name: &str| std::env::var(name).ok().and_then(|number| number.parse::<f64>().ok());
        let (size, link) = (number("RANKS").unwrap_or(4.0), number("LINK").unwrap_or(f64::INFINITY));
        volary_kernels::moe::parallel::threads::run_over(link, size as usize, work);
    }
}
