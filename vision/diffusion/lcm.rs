//! Consistency in latent space (Luo et al. 2023, <https://arxiv.org/abs/2310.04378>): a distilled model's answer leads to the
//! sample at once, and noise is added again for the next step. The numbers match diffusers' `LCMScheduler`.

use burn::tensor::Tensor;

use super::prediction::{Bound, Prediction, speaks};
use super::schedule::{Level, ScheduleError, trained, within};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// How the model was distilled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distilled {
    /// From a sampler of so many steps.
    pub steps: usize,
    /// What a timestep is multiplied by where it says how much the sample itself counts.
    pub timestep_scale: f64,
}

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct Lcm {
    timesteps: Vec<f64>,
    levels: Vec<Level>,
    timestep_scale: f64,
    prediction: Prediction,
    bound: Bound,
}

/// The spread of the data, as the boundary condition takes it to be.
const SIGMA_DATA: f64 = 0.5;

impl Lcm {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(
        scheduler: &NoiseScheduler,
        distilled: Distilled,
        steps: usize,
    ) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, prediction, bound, .. } = *scheduler;
        within(1, distilled.steps, train_steps)?;
        within(1, steps, distilled.steps)?;
        let noise = scheduler.noise()?;
        let stride = train_steps / distilled.steps;
        // the distillation's steps, from the last one down
        let timestep = |step: usize| {
            let skipped = (distilled.steps as f64 / steps as f64 * step as f64).floor() as usize;
            ((distilled.steps - skipped) * stride) as f64 - 1.0
        };
        let timesteps = trained(train_steps, (0..steps).map(timestep).collect())?;
        let levels: Vec<Level> = timesteps.iter().map(|&timestep| noise.level(timestep as usize)).collect();
        speaks(prediction, &timesteps, &levels)?;
        Ok(Self { timesteps, levels, timestep_scale: distilled.timestep_scale, prediction, bound })
    }
}

impl Sampler for Lcm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.levels[at].noised(original, noise)
    }

    fn draws_noise(&self, at: usize) -> bool {
        at + 1 < self.timesteps.len()
    }

    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let time = self.timesteps[at] * self.timestep_scale;
        let spread = time * time + SIGMA_DATA * SIGMA_DATA;
        let (skip, out) = (SIGMA_DATA * SIGMA_DATA / spread, time / spread.sqrt());
        let original = self.bound.apply(self.prediction.original(self.levels[at], sample.clone(), output));
        let original = original * out + sample * skip;
        let next = self.levels.get(at + 1);
        let sample = match (next, noise) {
            (Some(next), Some(noise)) => next.noised(original.clone(), noise),
            (Some(next), None) => original.clone() * next.alpha(),
            (None, _) => original.clone(),
        };
        Stepped { sample, original, history: history.and_one() }
    }
}
