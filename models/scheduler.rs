//! The schedulers of diffusion models: what a folder's `scheduler_config.json` says, and the trace of a walk.
//!
//! The classes of diffusers that are read: `DDPMScheduler`, `DDIMScheduler`, `DDIMInverseScheduler`, `PNDMScheduler`,
//! `EulerDiscreteScheduler`, `EulerAncestralDiscreteScheduler`, `DPMSolverMultistepScheduler`, `LCMScheduler` and
//! `FlowMatchEulerDiscreteScheduler`. The numbers match theirs ([`volary_vision::diffusion`]).
//!
//! A folder that holds nothing else is stepped with given answers of a model, one for each step:
//!
//! ```sh
//! volary forward path/to/scheduler --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::{Tensor, TensorData};
use volary_vision::diffusion::dpm_solver::DpmSolver;
use volary_vision::diffusion::lcm::Distilled;
use volary_vision::diffusion::pndm::Start;
use volary_vision::diffusion::schedule::SigmaEnd;
use volary_vision::diffusion::{
    Betas, Bound, Estimate, FlowScheduler, History, Last, Method, Motion, NoiseScheduler, Prediction,
    Sampler, Scheduler, SecondOrder, SigmaSteps, Spacing, Step, Terminal, Variance,
};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::registry::{Description, Forward, System};
use crate::tensors::{Inputs, Outputs, output};

/// The file that says what a scheduler is.
pub const FILE: &str = "scheduler_config.json";

/// The classes that are read, and what their configurations leave out.
const CLASSES: &[(&str, Class, Defaults)] = &[
    ("DDPMScheduler", Class::Ddpm, DDPM),
    ("DDIMScheduler", Class::Ddim, DDPM),
    ("DDIMInverseScheduler", Class::DdimInverse, DDPM),
    ("PNDMScheduler", Class::Pndm, Defaults { clip: false, ..DDPM }),
    ("EulerDiscreteScheduler", Class::Euler, EVEN),
    ("EulerAncestralDiscreteScheduler", Class::EulerAncestral, EVEN),
    ("DPMSolverMultistepScheduler", Class::DpmSolver, EVEN),
    ("LCMScheduler", Class::Lcm, LATENT),
    ("FlowMatchEulerDiscreteScheduler", Class::Flow, DDPM),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Ddpm,
    Ddim,
    DdimInverse,
    Pndm,
    Euler,
    EulerAncestral,
    DpmSolver,
    Lcm,
    Flow,
}

/// What stands where a configuration says nothing.
struct Defaults {
    betas: (&'static str, f64, f64),
    spacing: &'static str,
    clip: bool,
}

const DDPM: Defaults = Defaults { betas: ("linear", 0.0001, 0.02), spacing: "leading", clip: true };
const EVEN: Defaults = Defaults { spacing: "linspace", clip: false, ..DDPM };
const LATENT: Defaults = Defaults { betas: ("scaled_linear", 0.00085, 0.012), clip: false, ..DDPM };

/// More training steps than any model has: their list would fill the memory.
const MOST_TRAIN_STEPS: usize = 100_000;

/// The scheduler that a configuration says.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config) -> Result<Scheduler, ConfigError> {
    let known = CLASSES.iter().map(|(name, ..)| *name).collect::<Vec<_>>().join(", ");
    let name = config.text("_class_name");
    let name = name.ok_or_else(|| config.error("_class_name", &format!("one of {known}")))?;
    parse_as(config, name)
}

/// The scheduler of another class with what the configuration says of noise and steps, as `from_config` of diffusers. What
/// the folder's own class has no word for is left at the other's default.
///
/// # Errors
/// If the class is unknown, the configuration malformed, or it asks for what is not built.
pub fn parse_as(config: &Config, class: &str) -> Result<Scheduler, ConfigError> {
    let Some((_, class, defaults)) = CLASSES.iter().find(|(name, ..)| *name == class) else {
        let known: Vec<&str> = CLASSES.iter().map(|(name, ..)| *name).collect();
        return Err(config.error("_class_name", &format!("one of {}", known.join(", "))));
    };
    let train_steps = match config.size_or("num_train_timesteps", 1000)? {
        steps @ 1..=MOST_TRAIN_STEPS => steps,
        _ => return Err(config.error("num_train_timesteps", &format!("1 to {MOST_TRAIN_STEPS}"))),
    };
    if *class == Class::Flow {
        return flow(config, train_steps).map(Scheduler::Flow);
    }
    let zero_snr = config.flag_or("rescale_betas_zero_snr", false)?;
    Ok(Scheduler::Noise(NoiseScheduler {
        train_steps,
        betas: betas(config, defaults)?,
        terminal: if zero_snr { Terminal::NoSignal } else { Terminal::AsIs },
        prediction: one_of(config, "prediction_type", "epsilon", PREDICTIONS)?,
        bound: bound(config, defaults)?,
        spacing: one_of(config, "timestep_spacing", defaults.spacing, SPACINGS)?,
        offset: natural(config, "steps_offset")?,
        method: method(config, *class)?,
    }))
}

const PREDICTIONS: &[(&str, Prediction)] =
    &[("epsilon", Prediction::Noise), ("v_prediction", Prediction::Velocity), ("sample", Prediction::Sample)];

const SPACINGS: &[(&str, Spacing)] =
    &[("leading", Spacing::Leading), ("trailing", Spacing::Trailing), ("linspace", Spacing::Linspace)];

const VARIANCES: &[(&str, Variance)] = &[
    ("fixed_small", Variance::Small),
    ("fixed_small_log", Variance::Small),
    ("fixed_large", Variance::Large),
    ("learned", Variance::Learned),
    ("learned_range", Variance::LearnedRange),
];

const ALGORITHMS: &[(&str, (Estimate, Motion))] = &[
    ("dpmsolver++", (Estimate::Original, Motion::Ode)),
    ("dpmsolver", (Estimate::Noise, Motion::Ode)),
    ("sde-dpmsolver++", (Estimate::Original, Motion::Sde)),
    ("sde-dpmsolver", (Estimate::Noise, Motion::Sde)),
];

const SECOND_ORDERS: &[(&str, SecondOrder)] =
    &[("midpoint", SecondOrder::Midpoint), ("heun", SecondOrder::Heun)];

const ENDS: &[(&str, SigmaEnd)] = &[("zero", SigmaEnd::Zero), ("sigma_min", SigmaEnd::First)];

/// What a field's text stands for, or `default`'s.
fn one_of<T: Copy>(
    config: &Config,
    field: &str,
    default: &str,
    table: &[(&str, T)],
) -> Result<T, ConfigError> {
    let wrong = || {
        let names: Vec<&str> = table.iter().map(|(name, _)| *name).collect();
        config.error(field, &format!("one of {} (others are not built)", names.join(", ")))
    };
    let text = match config.has(field) {
        true => config.text(field).ok_or_else(wrong)?,
        false => default,
    };
    table.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(wrong)
}

/// A whole number from 0 on, 0 where there is none.
fn natural(config: &Config, field: &str) -> Result<usize, ConfigError> {
    usize::try_from(config.integer_or(field, 0)?).map_err(|_| config.error(field, "0 or more"))
}

fn betas(config: &Config, defaults: &Defaults) -> Result<Betas, ConfigError> {
    if config.has("trained_betas") {
        let betas = config.numbers("trained_betas");
        return betas.map(Betas::Listed).ok_or_else(|| config.error("trained_betas", "a list of numbers"));
    }
    let (schedule, start, end) = defaults.betas;
    let start = config.number_or("beta_start", start)?;
    let end = config.number_or("beta_end", end)?;
    match config.text("beta_schedule").unwrap_or(schedule) {
        "linear" => Ok(Betas::Linear { start, end }),
        "scaled_linear" => Ok(Betas::ScaledLinear { start, end }),
        "squaredcos_cap_v2" => Ok(Betas::SquaredCosine),
        "laplace" => Ok(Betas::Laplace),
        "sigmoid" => Ok(Betas::Sigmoid { start, end }),
        _ => {
            Err(config.error("beta_schedule", "linear, scaled_linear, squaredcos_cap_v2, laplace or sigmoid"))
        }
    }
}

fn bound(config: &Config, defaults: &Defaults) -> Result<Bound, ConfigError> {
    if config.flag_or("thresholding", false)? {
        let share = config.number_or("dynamic_thresholding_ratio", 0.995)?;
        if !(0.0..=1.0).contains(&share) {
            return Err(config.error("dynamic_thresholding_ratio", "0 to 1"));
        }
        return Ok(Bound::Dynamic { share, most: positive(config, "sample_max_value", 1.0)? });
    }
    match config.flag_or("clip_sample", defaults.clip)? {
        true => Ok(Bound::Clip(positive(config, "clip_sample_range", 1.0)?)),
        false => Ok(Bound::None),
    }
}

fn positive(config: &Config, field: &str, default: f64) -> Result<f64, ConfigError> {
    let number = config.number_or(field, default)?;
    if number > 0.0 { Ok(number) } else { Err(config.error(field, "more than 0")) }
}

fn method(config: &Config, class: Class) -> Result<Method, ConfigError> {
    let last = |default| {
        let clean = config.flag_or("set_alpha_to_one", default)?;
        Ok::<_, ConfigError>(if clean { Last::Clean } else { Last::First })
    };
    Ok(match class {
        Class::Ddpm => Method::Ddpm(one_of(config, "variance_type", "fixed_small", VARIANCES)?),
        Class::Ddim => Method::Ddim { last: last(true)?, eta: 0.0 },
        Class::DdimInverse => match config.has("set_alpha_to_zero") {
            // its first name
            true => {
                let clean = config.flag_or("set_alpha_to_zero", true)?;
                Method::DdimInverse { first: if clean { Last::Clean } else { Last::First } }
            }
            false => Method::DdimInverse { first: last(true)? },
        },
        Class::Pndm => {
            let multistep = config.flag_or("skip_prk_steps", false)?;
            let start = if multistep { Start::Multistep } else { Start::RungeKutta };
            Method::Pndm { last: last(false)?, start }
        }
        Class::Euler => {
            config.only("interpolation_type", &["\"linear\""])?;
            config.only("timestep_type", &["\"discrete\""])?;
            let steps = sigma_steps(config)?;
            Method::Euler { steps, end: one_of(config, "final_sigmas_type", "zero", ENDS)? }
        }
        Class::EulerAncestral => Method::EulerAncestral,
        Class::DpmSolver => Method::DpmSolver(dpm_solver(config)?),
        Class::Lcm => Method::Lcm(Distilled {
            steps: config.size_or("original_inference_steps", 50)?,
            timestep_scale: positive(config, "timestep_scaling", 10.0)?,
        }),
        Class::Flow => unreachable!("read before"),
    })
}

fn sigma_steps(config: &Config) -> Result<SigmaSteps, ConfigError> {
    config.only("use_beta_sigmas", &["false"])?;
    let limit = |field: &str| config.has(field).then(|| positive(config, field, 1.0)).transpose();
    let (least, most) = (limit("sigma_min")?, limit("sigma_max")?);
    let karras = config.flag_or("use_karras_sigmas", false)?;
    match (karras, config.flag_or("use_exponential_sigmas", false)?) {
        (false, false) => Ok(SigmaSteps::Visited),
        (true, false) => Ok(SigmaSteps::Karras { least, most }),
        (false, true) => Ok(SigmaSteps::Exponential { least, most }),
        (true, true) => Err(config.error("use_exponential_sigmas", "false beside `use_karras_sigmas`")),
    }
}

fn dpm_solver(config: &Config) -> Result<DpmSolver, ConfigError> {
    for field in ["use_lu_lambdas", "use_flow_sigmas", "use_dynamic_shifting"] {
        config.only(field, &["false"])?;
    }
    config.only("variance_type", &[])?;
    let (estimate, motion) = one_of(config, "algorithm_type", "dpmsolver++", ALGORITHMS)?;
    let order = config.size_or("solver_order", 2)?;
    let most = if motion == Motion::Sde { 2 } else { 3 };
    if order > most {
        return Err(config.error("solver_order", &format!("1 to {most} with this `algorithm_type`")));
    }
    let end = one_of(config, "final_sigmas_type", "zero", ENDS)?;
    if estimate == Estimate::Noise && end == SigmaEnd::Zero {
        return Err(config.error("final_sigmas_type", "sigma_min with this `algorithm_type`"));
    }
    Ok(DpmSolver {
        order,
        estimate,
        motion,
        second: one_of(config, "solver_type", "midpoint", SECOND_ORDERS)?,
        steps: sigma_steps(config)?,
        end,
        lower_order_at_end: config.flag_or("lower_order_final", true)?,
        euler_at_end: config.flag_or("euler_at_final", false)?,
        least_log_snr: match config.text("lambda_min_clipped") {
            Some("-Infinity") => f64::NEG_INFINITY,
            _ => config.number_or("lambda_min_clipped", f64::NEG_INFINITY)?,
        },
    })
}

fn flow(config: &Config, train_steps: usize) -> Result<FlowScheduler, ConfigError> {
    for field in [
        "use_dynamic_shifting",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
    ] {
        config.only(field, &["false"])?;
    }
    config.only("shift_terminal", &[])?;
    Ok(FlowScheduler {
        train_steps,
        shift: positive(config, "shift", 1.0)?,
        is_stochastic: config.flag_or("stochastic_sampling", false)?,
    })
}

/// Schedulers as the registry knows them.
pub const SYSTEM: System = System {
    name: "scheduler",
    about: "how diffusion models add noise and take it away: DDPM, DDIM, PNDM, Euler, DPM-Solver, LCM, flow matching",
    file: "models/scheduler.rs",
    tasks: &["forward"],
    proved: &[
        "sched_ddpm",
        "sched_ddim",
        "sched_ddim_eta",
        "sched_pndm",
        "sched_pndm_prk",
        "sched_euler",
        "sched_euler_karras",
        "sched_euler_ancestral",
        "sched_dpmpp_2m",
        "sched_dpmpp_karras",
        "sched_dpm_3",
    ],
    presets: &[],
    recognises: |folder, config| config.is_none() && folder.has(FILE),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        parse(&folder.config(FILE)?)?;
        Ok(Description {
            parameters: Vec::new(),
            problems: Vec::new(),
            dtypes: Default::default(),
            quantization: None,
        })
    },
    open: |folder, _, _| {
        let scheduler = parse(&folder.config(FILE)?)?;
        Ok(Box::new(Runner { scheduler, eta: stated_eta(folder) }))
    },
    generator: None,
};

/// The `eta` that the notes of a trace's `reference.json` say it was made with: no configuration has a field for it.
fn stated_eta(folder: &Folder) -> Option<f64> {
    let reference = folder.config("reference.json").ok()?;
    let (_, eta) = reference.text("notes")?.split_once("eta ")?;
    let end = eta.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(eta.len());
    eta[..end].trim_end_matches('.').parse().ok()
}

/// A scheduler behind the forward contract.
struct Runner {
    scheduler: Scheduler,
    eta: Option<f64>,
}

impl Forward for Runner {
    /// `sample` `[batch, channels, height, width]` is unit noise; `model_output`, and if wanted `noise`, have one such for
    /// each step, `[steps, batch, channels, height, width]`. `eta`, a number, is that of DDIM; without it the one in the
    /// notes of a `reference.json` beside the configuration, or 0.
    ///
    /// Gives `timesteps`, `init_noise_sigma`, for each step what enters it scaled for the model (`scaled_input`) and what it
    /// gives (`prev_sample`), `sigmas` and `alphas_cumprod` where there are such, and `add_noise`: the sample with the
    /// first noise as it enters the third step.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let sample = inputs.float::<4>("sample");
        let answers = inputs.float::<5>("model_output");
        let noise = inputs.float::<5>("noise");
        let eta = inputs.float::<1>("eta");
        for name in ["sample", "model_output"] {
            inputs.missing(name);
        }
        let mut sampler = None;
        if let (Some(sample), Some(answers)) = (&sample, &answers) {
            let [batch, channels, height, width] = sample.dims();
            let [steps, _, said, ..] = answers.dims();
            // a learned variance comes in channels of its own
            let said = if self.learns_variance() && said == 2 * channels { said } else { channels };
            inputs.shaped("model_output", Some(answers.dims()), [steps, batch, said, height, width]);
            let wanted = [steps, batch, channels, height, width];
            inputs.shaped("noise", noise.as_ref().map(Tensor::dims), wanted);
            let eta = eta.map(|eta| eta.narrow(0, 0, 1).into_scalar::<f64>()).or(self.eta).unwrap_or(0.0);
            if !(0.0..=1.0).contains(&eta) {
                inputs.problem(format!("`eta` is {eta}, expected 0 to 1"));
            }
            sampler = self.sampler_of(steps, eta);
            if sampler.is_none() {
                inputs.problem(format!("`model_output` has {steps} steps, which this scheduler never takes"));
            }
        }
        inputs.finish()?;
        let (Some(sample), Some(answers), Some(sampler)) = (sample, answers, sampler) else {
            return Ok(Outputs::new()); // finished with an error
        };
        let mut outputs = trace(sampler.as_ref(), &sample, &answers, noise.as_ref());
        outputs.push(listed("init_noise_sigma", &[sampler.initial_sigma()]));
        outputs.push(match &self.scheduler {
            Scheduler::Noise(NoiseScheduler { method, .. })
                if !matches!(method, Method::Euler { .. } | Method::EulerAncestral) =>
            {
                let whole: Vec<i64> = sampler.timesteps().iter().map(|&timestep| timestep as i64).collect();
                ("timesteps".into(), TensorData::from(&whole[..]))
            }
            _ => listed("timesteps", sampler.timesteps()),
        });
        if let Some(sigmas) = sampler.sigmas() {
            outputs.push(listed("sigmas", sigmas));
        }
        if let Some(schedule) = self.scheduler.noise()? {
            outputs.push(listed("alphas_cumprod", schedule.products()));
        }
        Ok(outputs)
    }
}

impl Runner {
    fn learns_variance(&self) -> bool {
        let Scheduler::Noise(NoiseScheduler { method, .. }) = &self.scheduler else { return false };
        matches!(method, Method::Ddpm(Variance::Learned | Variance::LearnedRange))
    }

    /// The sampler that asks the model so often.
    fn sampler_of(&self, answers: usize, eta: f64) -> Option<Box<dyn Sampler>> {
        let mut scheduler = self.scheduler.clone();
        if let Scheduler::Noise(NoiseScheduler { method: Method::Ddim { eta: of_method, .. }, .. }) =
            &mut scheduler
        {
            *of_method = eta;
        }
        let mut samplers = (1..=answers).rev().filter_map(|steps| scheduler.sampler(steps).ok());
        samplers.find(|sampler| sampler.timesteps().len() == answers)
    }
}

/// What enters each step and what it gives, and the sample as noise is added to it.
fn trace(
    sampler: &dyn Sampler,
    start: &Tensor<4>,
    answers: &Tensor<5>,
    noise: Option<&Tensor<5>>,
) -> Outputs {
    let at = |tensor: &Tensor<5>, step: usize| tensor.clone().narrow(0, step, 1).squeeze_dim::<4>(0);
    let mut sample = start.clone() * sampler.initial_sigma();
    let mut history = History::default();
    let (mut scaled, mut given) = (Vec::new(), Vec::new());
    for step in 0..sampler.timesteps().len() {
        scaled.push(sampler.scaled(step, sample.clone()));
        let noise = noise.map(|noise| at(noise, step));
        let stepped = sampler.step(Step { at: step, sample, output: at(answers, step), noise }, history);
        (sample, history) = (stepped.sample, stepped.history);
        given.push(sample.clone());
    }
    let mut outputs = vec![
        output("scaled_input", Tensor::stack::<5>(scaled, 0)),
        output("prev_sample", Tensor::stack::<5>(given, 0)),
    ];
    if let (Some(noise), true) = (noise, sampler.timesteps().len() > 2) {
        outputs.push(output("add_noise", sampler.noised(2, start.clone(), at(noise, 0))));
    }
    outputs
}

fn listed(name: &str, numbers: &[f64]) -> (String, TensorData) {
    let numbers: Vec<f32> = numbers.iter().map(|&number| number as f32).collect();
    (name.into(), TensorData::from(&numbers[..]))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new(FILE), text.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let refused = [
            (r#"{"_class_name": "UniPCMultistepScheduler"}"#, "`_class_name`: expected one of DDPMScheduler"),
            (r#"{"_class_name": 3}"#, "`_class_name`"),
            (r#"{"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": true}"#, "`use_beta_sigmas`"),
            (
                r#"{"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++",
                    "solver_order": 3}"#,
                "`solver_order`: expected 1 to 2 with this `algorithm_type`, found 3",
            ),
            (r#"{"_class_name": "DDPMScheduler", "variance_type": "fixed_large_log"}"#, "`variance_type`"),
            (r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": 1000000000}"#, "1 to 100000"),
            (r#"{"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}"#, "found \"cosine\""),
            (r#"{"_class_name": "DDIMScheduler", "steps_offset": -1}"#, "expected 0 or more, found -1"),
        ];
        for (text, expected) in refused {
            let message = parse(&config(text)).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn another_class_keeps_the_noise_and_takes_its_own_defaults() {
        let pndm = config(
            r#"{"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                "beta_end": 0.012, "steps_offset": 1, "skip_prk_steps": true}"#,
        );
        let Scheduler::Noise(euler) = parse_as(&pndm, "EulerDiscreteScheduler").unwrap() else { panic!() };
        assert_eq!(euler.betas, Betas::ScaledLinear { start: 0.00085, end: 0.012 });
        assert_eq!((euler.spacing, euler.offset), (Spacing::Linspace, 1));
        assert!(matches!(euler.method, Method::Euler { steps: SigmaSteps::Visited, end: SigmaEnd::Zero }));
    }
}
