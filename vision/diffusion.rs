//! Diffusion: noise that is added by a schedule, and taken away again step by step.
//!
//! A [`Scheduler`] is data; for so many steps it makes a [`Sampler`], whose [`Sampler::step`] is a pure function: what
//! later steps need of earlier ones is a [`History`] that goes in and comes out. All coefficients are computed in f64 on
//! the host. Each sampler's numbers match the class of `diffusers` that its file names.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use volary_vision::diffusion::*;
//!
//! let scheduler = Scheduler::Noise(NoiseScheduler {
//!     betas: Betas::ScaledLinear { start: 0.00085, end: 0.012 },
//!     method: Method::Ddim { last: Last::First, eta: 0.0 },
//!     ..NoiseScheduler::default()
//! });
//! let sampler = scheduler.sampler(4)?;
//! let mut sample = Tensor::<4>::ones([1, 4, 8, 8], &Device::flex()) * sampler.initial_sigma();
//! let mut history = History::default();
//! for at in 0..sampler.timesteps().len() {
//!     let output = sampler.scaled(at, sample.clone()) * 0.1; // a model's answer at `sampler.timesteps()[at]`
//!     let stepped = sampler.step(Step { at, sample, output, noise: None }, history);
//!     (sample, history) = (stepped.sample, stepped.history);
//! }
//! # Ok::<(), ScheduleError>(())
//! ```

use burn::tensor::Tensor;

pub mod ddim;
pub mod ddpm;
pub mod dpm_solver;
pub mod euler;
pub mod flow;
pub mod lcm;
pub mod pndm;
pub mod prediction;
pub mod schedule;

pub use ddim::Last;
pub use ddpm::Variance;
pub use dpm_solver::{DpmSolver, Estimate, Motion, SecondOrder};
pub use flow::FlowScheduler;
pub use prediction::{Bound, Prediction};
pub use schedule::{Betas, Level, NoiseSchedule, ScheduleError, SigmaSteps, Spacing, Terminal};

/// A schedule and a way to walk it.
#[derive(Clone, Debug, PartialEq)]
pub enum Scheduler {
    /// Noise is added by betas.
    Noise(NoiseScheduler),
    /// A straight line between noise and sample.
    Flow(FlowScheduler),
}

/// Noise added by betas, and a way to take it away. The defaults are diffusers' own.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseScheduler {
    /// How many steps the noise was added in when the model learned.
    pub train_steps: usize,
    /// How much noise each of them adds.
    pub betas: Betas,
    /// What the last of them leaves of the sample.
    pub terminal: Terminal,
    /// What the model says.
    pub prediction: Prediction,
    /// What is done to the model's idea of the sample.
    pub bound: Bound,
    /// Which of the training's steps are visited.
    pub spacing: Spacing,
    /// Added to them where the spacing is [`Spacing::Leading`].
    pub offset: usize,
    /// How noise is taken away.
    pub method: Method,
}

/// How noise is taken away.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// [`ddpm`]
    Ddpm(Variance),
    /// [`ddim`]
    Ddim {
        /// Where the last step leads.
        last: Last,
        /// How much noise is drawn anew: 0 none, 1 as much as DDPM.
        eta: f64,
    },
    /// [`ddim`] the other way round, from a sample to the noise it came from.
    DdimInverse {
        /// Where the first step begins.
        first: Last,
    },
    /// [`pndm`]
    Pndm {
        /// Where the last step leads.
        last: Last,
        /// How the first steps are made.
        start: pndm::Start,
    },
    /// [`euler`]
    Euler {
        /// Where the steps lie.
        steps: SigmaSteps,
        /// Where the last step leads.
        end: schedule::SigmaEnd,
    },
    /// [`euler`] with noise drawn anew at every step.
    EulerAncestral,
    /// [`dpm_solver`]
    DpmSolver(DpmSolver),
    /// [`lcm`]
    Lcm(lcm::Distilled),
}

impl Default for NoiseScheduler {
    fn default() -> Self {
        Self {
            train_steps: 1000,
            betas: Betas::Linear { start: 0.0001, end: 0.02 },
            terminal: Terminal::AsIs,
            prediction: Prediction::Noise,
            bound: Bound::None,
            spacing: Spacing::Leading,
            offset: 0,
            method: Method::Ddim { last: Last::Clean, eta: 0.0 },
        }
    }
}

impl Scheduler {
    /// The sampler that makes so many steps; [`Method::Pndm`] asks the model more often than that.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn sampler(&self, steps: usize) -> Result<Box<dyn Sampler>, ScheduleError> {
        let scheduler = match self {
            Self::Noise(scheduler) => scheduler,
            Self::Flow(flow) => return Ok(Box::new(flow::FlowEuler::new(flow, steps)?)),
        };
        Ok(match &scheduler.method {
            Method::Ddpm(variance) => Box::new(ddpm::Ddpm::new(scheduler, *variance, steps)?),
            Method::Ddim { last, eta } => Box::new(ddim::Ddim::new(scheduler, *last, *eta, steps)?),
            Method::DdimInverse { first } => Box::new(ddim::Ddim::inverse(scheduler, *first, steps)?),
            Method::Pndm { last, start } => Box::new(pndm::Pndm::new(scheduler, *last, *start, steps)?),
            Method::Euler { steps: spread, end } => {
                Box::new(euler::Euler::new(scheduler, *spread, *end, steps)?)
            }
            Method::EulerAncestral => Box::new(euler::Euler::ancestral(scheduler, steps)?),
            Method::DpmSolver(solver) => Box::new(dpm_solver::Multistep::new(scheduler, solver, steps)?),
            Method::Lcm(distilled) => Box::new(lcm::Lcm::new(scheduler, *distilled, steps)?),
        })
    }

    /// The noise of every training step, if it is added by betas.
    ///
    /// # Errors
    /// If the betas are no such numbers.
    pub fn noise(&self) -> Result<Option<NoiseSchedule>, ScheduleError> {
        match self {
            Self::Noise(scheduler) => scheduler.noise().map(Some),
            Self::Flow(_) => Ok(None),
        }
    }
}

impl NoiseScheduler {
    /// The noise of every training step.
    ///
    /// # Errors
    /// If the betas are no such numbers.
    pub fn noise(&self) -> Result<NoiseSchedule, ScheduleError> {
        let noise = NoiseSchedule::new(&self.betas, self.train_steps, self.terminal)?;
        Ok(match self.method {
            Method::Euler { .. } | Method::EulerAncestral | Method::DpmSolver(_) => noise.with_some_signal(),
            _ => noise,
        })
    }
}

/// A walk from noise to a sample in a fixed number of steps. Samples are `[batch, channels, height, width]`.
pub trait Sampler {
    /// What the model is told at each step, in the order of the steps: where in its training's steps they are.
    fn timesteps(&self) -> &[f64];

    /// How much noise there is beside a sample of unit size before each step and after the last one, if the steps are
    /// laid out so.
    fn sigmas(&self) -> Option<&[f64]> {
        None
    }

    /// What unit noise is multiplied by before the first step.
    fn initial_sigma(&self) -> f64 {
        1.0
    }

    /// What the model sees of the sample that enters step `at`.
    fn scaled(&self, _at: usize, sample: Tensor<4>) -> Tensor<4> {
        sample
    }

    /// A sample with as much noise as enters step `at`.
    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4>;

    /// Whether step `at` draws noise.
    fn draws_noise(&self, _at: usize) -> bool {
        false
    }

    /// One step.
    ///
    /// # Panics
    /// If there is no such step, or the tensors differ in shape.
    fn step(&self, step: Step, history: History) -> Stepped;
}

/// What a step reads.
#[derive(Clone, Debug)]
pub struct Step {
    /// Which step it is, from 0.
    pub at: usize,
    /// What enters it.
    pub sample: Tensor<4>,
    /// What the model says of it.
    pub output: Tensor<4>,
    /// Unit noise, read where the step draws it. Without it the step gives the mean of what could be drawn.
    pub noise: Option<Tensor<4>>,
}

/// What a step gives.
#[derive(Clone, Debug)]
pub struct Stepped {
    /// What enters the next step.
    pub sample: Tensor<4>,
    /// What the model believes to be the sample without noise: a preview.
    pub original: Tensor<4>,
    /// For the next step.
    pub history: History,
}

/// What earlier steps leave to later ones; empty before the first.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// How many steps were made.
    pub taken: usize,
    /// What the model said, the newest last, as many as are needed.
    pub outputs: Vec<Tensor<4>>,
    /// Of a step that asks the model more than once: where it began.
    pub start: Option<Tensor<4>>,
    /// And the answers so far.
    pub slopes: Vec<Tensor<4>>,
}

impl History {
    /// After one more step.
    fn and_one(self) -> Self {
        Self { taken: self.taken + 1, ..self }
    }

    /// With one more output, the oldest forgotten where there are more than `most`.
    fn with_output(mut self, output: Tensor<4>, most: usize) -> Self {
        self.outputs.push(output);
        let forgotten = self.outputs.len().saturating_sub(most);
        self.outputs.drain(..forgotten);
        self
    }
}

#[cfg(test)]
mod tests;
