use burn::tensor::{Device, Tensor, Tolerance};

use super::dpm_solver::DpmSolver;
use super::lcm::Distilled;
use super::pndm::Start;
use super::schedule::SigmaEnd;
use super::*;

/// Numbers that look like noise, `[2, 3, 4, 5]`.
fn tensor(seed: u64) -> Tensor<4> {
    let value = |at: u64| ((at * 37 + seed * 101 + at * at % 29) % 61) as f32 / 20.0 - 1.5;
    let values: Vec<f32> = (0..120).map(value).collect();
    Tensor::<1>::from_floats(values.as_slice(), &Device::flex()).reshape([2, 3, 4, 5])
}

fn latent(method: Method) -> NoiseScheduler {
    let betas = Betas::ScaledLinear { start: 0.00085, end: 0.012 };
    NoiseScheduler { betas, offset: 1, method, ..NoiseScheduler::default() }
}

fn solver(order: usize) -> DpmSolver {
    DpmSolver {
        order,
        estimate: Estimate::Original,
        motion: Motion::Ode,
        second: SecondOrder::Midpoint,
        steps: SigmaSteps::Visited,
        end: SigmaEnd::Zero,
        lower_order_at_end: true,
        euler_at_end: false,
        least_log_snr: f64::NEG_INFINITY,
    }
}

/// Walks with a model's answers.
fn walk(
    sampler: &dyn Sampler,
    mut sample: Tensor<4>,
    model: impl Fn(usize, &Tensor<4>) -> Tensor<4>,
) -> Tensor<4> {
    let mut history = History::default();
    for at in 0..sampler.timesteps().len() {
        let output = model(at, &sample);
        let stepped = sampler.step(Step { at, sample, output, noise: None }, history);
        (sample, history) = (stepped.sample, stepped.history);
    }
    sample
}

fn assert_close(found: Tensor<4>, expected: Tensor<4>) {
    found.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(2e-5));
}

#[test]
fn where_the_model_knows_the_noise_every_sampler_finds_the_sample() {
    let (original, noise) = (tensor(1), tensor(2));
    let karras = SigmaSteps::Karras { least: None, most: None };
    let methods = [
        Method::Ddim { last: Last::Clean, eta: 0.0 },
        Method::Pndm { last: Last::Clean, start: Start::Multistep },
        Method::Pndm { last: Last::Clean, start: Start::RungeKutta },
        Method::Euler { steps: SigmaSteps::Visited, end: SigmaEnd::Zero },
        Method::Euler { steps: karras, end: SigmaEnd::Zero },
        Method::DpmSolver(solver(1)),
        Method::DpmSolver(DpmSolver { second: SecondOrder::Heun, ..solver(2) }),
        Method::DpmSolver(DpmSolver { steps: karras, ..solver(3) }),
    ];
    for method in methods {
        let sampler = Scheduler::Noise(latent(method.clone())).sampler(7).unwrap();
        let start = sampler.noised(0, original.clone(), noise.clone());
        println!("{method:?}");
        assert_close(walk(sampler.as_ref(), start, |_, _| noise.clone()), original.clone());
    }
    let flow = FlowScheduler { train_steps: 1000, shift: 3.0, is_stochastic: false };
    let sampler = Scheduler::Flow(flow).sampler(7).unwrap();
    let velocity = noise.clone() - original.clone();
    assert_close(walk(sampler.as_ref(), noise, |_, _| velocity.clone()), original);
}

#[test]
fn ddim_is_undone_by_its_inverse() {
    let (sample, noise) = (tensor(3), tensor(4));
    let of = |method| Scheduler::Noise(latent(method)).sampler(10).unwrap();
    let forth = of(Method::DdimInverse { first: Last::First });
    let back = of(Method::Ddim { last: Last::First, eta: 0.0 });
    // a model whose answer depends on the step alone, so that both walks are told the same
    let told = |timestep: f64| noise.clone() * (timestep / 1000.0);
    let noised = walk(forth.as_ref(), sample.clone(), |at, _| told(forth.timesteps()[at]));
    assert!((noised.clone() - sample.clone()).abs().max().into_scalar::<f32>() > 0.5);
    assert_close(walk(back.as_ref(), noised, |at, _| told(back.timesteps()[at])), sample);
}

#[test]
fn what_a_model_should_say_of_a_noised_sample_gives_sample_and_noise_back() {
    let (original, noise) = (tensor(5), tensor(6));
    let schedule = latent(Method::EulerAncestral).noise().unwrap();
    let timesteps = [40, 700];
    let noised = schedule.noised(original.clone(), noise.clone(), &timesteps);
    let velocity = schedule.velocity(original.clone(), noise.clone(), &timesteps);
    for (row, timestep) in timesteps.into_iter().enumerate() {
        let of = |tensor: &Tensor<4>| tensor.clone().narrow(0, row, 1);
        let level = schedule.level(timestep);
        assert_close(of(&noised), level.noised(of(&original), of(&noise)));
        let answers = [
            (Prediction::Noise, of(&noise)),
            (Prediction::Velocity, of(&velocity)),
            (Prediction::Sample, of(&original)),
        ];
        for (prediction, answer) in answers {
            assert_close(prediction.original(level, of(&noised), answer.clone()), of(&original));
            assert_close(prediction.noise(level, of(&noised), answer), of(&noise));
        }
    }
}

#[test]
fn ddim_that_draws_all_noise_anew_is_ddpm() {
    let of = |method| Scheduler::Noise(latent(method)).sampler(5).unwrap();
    let ddpm = of(Method::Ddpm(Variance::Small));
    let ddim = of(Method::Ddim { last: Last::Clean, eta: 1.0 });
    for at in 0..5 {
        let step = || Step { at, sample: tensor(7), output: tensor(8), noise: Some(tensor(9)) };
        let found = ddim.step(step(), History::default());
        let expected = ddpm.step(step(), History::default());
        assert_close(found.sample, expected.sample);
        assert_close(found.original, expected.original);
    }
}

#[test]
fn the_last_step_draws_no_noise_where_nothing_follows() {
    let lcm = Scheduler::Noise(latent(Method::Lcm(Distilled { steps: 50, timestep_scale: 10.0 })));
    let lcm = lcm.sampler(4).unwrap();
    assert_eq!(lcm.timesteps(), [999.0, 759.0, 499.0, 259.0]);
    assert_eq!([0, 1, 2, 3].map(|at| lcm.draws_noise(at)), [true, true, true, false]);
    let ddpm = NoiseScheduler { offset: 0, ..latent(Method::Ddpm(Variance::Small)) };
    let ddpm = Scheduler::Noise(ddpm).sampler(2).unwrap();
    assert_eq!([0, 1].map(|at| ddpm.draws_noise(at)), [true, false]);
}

#[test]
fn literals_of_timesteps() {
    let of = |spacing: Spacing| spacing.timesteps(1000, 4, 1).unwrap();
    assert_eq!(of(Spacing::Leading), [751.0, 501.0, 251.0, 1.0]);
    assert_eq!(of(Spacing::Trailing), [999.0, 749.0, 499.0, 249.0]);
    assert_eq!(of(Spacing::Linspace), [999.0, 666.0, 333.0, 0.0]);
    let pndm = |start| {
        let method = Method::Pndm { last: Last::First, start };
        Scheduler::Noise(latent(method)).sampler(5).unwrap().timesteps().to_vec()
    };
    assert_eq!(pndm(Start::Multistep), [801.0, 601.0, 601.0, 401.0, 201.0, 1.0]);
    let runge_kutta =
        [801.0, 701.0, 701.0, 601.0, 601.0, 501.0, 501.0, 401.0, 401.0, 301.0, 301.0, 201.0, 201.0, 1.0];
    assert_eq!(pndm(Start::RungeKutta), runge_kutta);
    // numpy's `arange` gives one more, before the training's first
    let odd = Spacing::Trailing.timesteps(1000, 61, 0).unwrap();
    assert_eq!((odd.len(), odd[60]), (61, 15.0));
}

#[test]
fn a_schedule_without_signal_at_its_end_keeps_its_beginning() {
    let betas = Betas::ScaledLinear { start: 0.00085, end: 0.012 };
    let of = |terminal| NoiseSchedule::new(&betas, 1000, terminal).unwrap();
    let (with, without) = (of(Terminal::AsIs), of(Terminal::NoSignal));
    assert!((with.products()[999] - 0.00466).abs() < 1e-5);
    assert_eq!(without.products()[999], 0.0);
    assert!((with.products()[0] - without.products()[0]).abs() < 1e-12);
    assert_eq!(without.with_some_signal().products()[999], 2f64.powi(-24));
}

#[test]
fn betas_of_a_product_follow_it() {
    let schedule = NoiseSchedule::new(&Betas::SquaredCosine, 100, Terminal::AsIs).unwrap();
    let cosine = |t: f64| ((t + 0.008) / 1.008 * std::f64::consts::FRAC_PI_2).cos().powi(2);
    for (at, product) in schedule.products().iter().enumerate().take(99) {
        assert!((product - cosine((at + 1) as f64 / 100.0) / cosine(0.0)).abs() < 1e-12);
    }
    let sigmoid = Betas::Sigmoid { start: 0.1, end: 0.3 }.values(3);
    assert!((sigmoid[1] - 0.2).abs() < 1e-12 && sigmoid[0] > 0.1 && sigmoid[2] < 0.3);
}

#[test]
fn a_dynamic_bound_keeps_a_share_and_divides_by_its_limit() {
    let device = Device::flex();
    let sample = Tensor::<4>::from_floats([[[[0.0, 1.0, -2.0, 3.0, -8.0]]]], &device);
    let bounded = |share, most| {
        let bounded = Bound::Dynamic { share, most }.apply(sample.clone());
        bounded.into_data().iter::<f32>().collect::<Vec<_>>()
    };
    assert_eq!(bounded(0.75, 10.0), [0.0, 1.0 / 3.0, -2.0 / 3.0, 1.0, -1.0]);
    assert_eq!(bounded(0.75, 2.0), [0.0, 0.5, -1.0, 1.0, -1.0]);
    assert_eq!(bounded(0.0, 10.0), [0.0, 1.0, -1.0, 1.0, -1.0]); // never below 1
}

#[test]
fn impossible_steps_are_refused() {
    let of = |scheduler: NoiseScheduler, steps| Scheduler::Noise(scheduler).sampler(steps).err().unwrap();
    let ddim = || Method::Ddim { last: Last::First, eta: 0.0 };
    for steps in [0, 1001] {
        let expected = ScheduleError::Steps { found: steps, least: 1, most: 1000 };
        assert_eq!(of(latent(ddim()), steps), expected);
    }
    let message = of(latent(ddim()), 1000).to_string();
    assert_eq!(message, "1000 steps lead to timestep 1000, but the training has 1000, from 0 on");
    let start = Start::RungeKutta;
    let few = of(latent(Method::Pndm { last: Last::First, start }), 3);
    assert_eq!(few, ScheduleError::Steps { found: 3, least: 4, most: 1000 });
    assert_eq!(
        of(latent(Method::DpmSolver(solver(2))), 1000),
        ScheduleError::Steps { found: 1000, least: 1, most: 999 }
    );
    let silent =
        NoiseScheduler { terminal: Terminal::NoSignal, spacing: Spacing::Trailing, ..latent(ddim()) };
    assert_eq!(of(silent, 10), ScheduleError::NoSignal { timestep: 999.0 });
    let betas = Betas::Listed(vec![0.1, f64::NAN]);
    let listed = NoiseScheduler { betas, train_steps: 2, ..latent(ddim()) };
    assert!(of(listed.clone(), 1).to_string().starts_with("beta 1 is NaN"));
    let longer = NoiseScheduler { train_steps: 3, ..listed };
    assert_eq!(of(longer, 1), ScheduleError::Betas { expected: 3, found: 2 });
}
