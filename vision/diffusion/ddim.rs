//! Implicit models (Song et al. 2020, <https://arxiv.org/abs/2010.02502>), and their inverse, which leads from a sample to
//! the noise that it comes from. The numbers match diffusers' `DDIMScheduler` and `DDIMInverseScheduler`.

use burn::tensor::Tensor;

use super::prediction::{Bound, Prediction, speaks};
use super::schedule::{Level, NoiseSchedule, ScheduleError};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// What lies before the training's first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Last {
    /// No noise (`set_alpha_to_one`).
    Clean,
    /// As much noise as at the training's first step.
    First,
}

impl Last {
    /// The level at a timestep, which may be before the first.
    pub(super) fn level(self, noise: &NoiseSchedule, timestep: i64) -> Level {
        match (usize::try_from(timestep), self) {
            (Ok(timestep), _) => noise.level(timestep.min(noise.products().len() - 1)),
            (Err(_), Self::Clean) => Level::CLEAN,
            (Err(_), Self::First) => noise.level(0),
        }
    }
}

/// A walk of so many steps, either way.
#[derive(Clone, Debug)]
pub struct Ddim {
    timesteps: Vec<f64>,
    /// Before and after each step.
    levels: Vec<[Level; 2]>,
    prediction: Prediction,
    bound: Bound,
    eta: f64,
}

impl Ddim {
    /// The walk from noise to a sample in so many steps; `eta` is 0 to 1.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(
        scheduler: &NoiseScheduler,
        last: Last,
        eta: f64,
        steps: usize,
    ) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, spacing, offset, .. } = *scheduler;
        let noise = scheduler.noise()?;
        let timesteps = spacing.timesteps(train_steps, steps, offset)?;
        let stride = (train_steps / steps) as i64;
        let level = |timestep: i64| last.level(&noise, timestep);
        let pair = |&timestep: &f64| [level(timestep as i64), level(timestep as i64 - stride)];
        let levels = timesteps.iter().map(pair).collect();
        Self::of(scheduler, timesteps, levels, eta)
    }

    /// The walk from a sample to its noise in so many steps.
    ///
    /// # Errors
    /// As [`Ddim::new`].
    pub fn inverse(scheduler: &NoiseScheduler, first: Last, steps: usize) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, spacing, offset, .. } = *scheduler;
        let noise = scheduler.noise()?;
        let mut timesteps = spacing.timesteps(train_steps, steps, offset)?;
        timesteps.reverse();
        let stride = (train_steps / steps) as i64;
        let level = |timestep: i64| first.level(&noise, timestep);
        let pair = |&timestep: &f64| [level(timestep as i64 - stride), level(timestep as i64)];
        let levels = timesteps.iter().map(pair).collect();
        Self::of(scheduler, timesteps, levels, 0.0)
    }

    fn of(
        scheduler: &NoiseScheduler,
        timesteps: Vec<f64>,
        levels: Vec<[Level; 2]>,
        eta: f64,
    ) -> Result<Self, ScheduleError> {
        let NoiseScheduler { prediction, bound, .. } = *scheduler;
        let before: Vec<Level> = levels.iter().map(|[before, _]| *before).collect();
        speaks(prediction, &timesteps, &before)?;
        Ok(Self { timesteps, levels, prediction, bound, eta })
    }
}

impl Sampler for Ddim {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.levels[at][0].noised(original, noise)
    }

    fn draws_noise(&self, _at: usize) -> bool {
        self.eta > 0.0
    }

    /// Equation 12. The noise is that of the output, even where the bound changed the sample.
    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let [here, next] = self.levels[at];
        let direction = self.prediction.noise(here, sample.clone(), output.clone());
        let original = self.bound.apply(self.prediction.original(here, sample, output));
        // equation 16, in which rounding may leave less than nothing
        let variance = (1.0 - next.product) / (1.0 - here.product) * (1.0 - here.product / next.product);
        let drawn = self.eta * variance.max(0.0).sqrt();
        let rest = (1.0 - next.product - drawn * drawn).max(0.0).sqrt();
        let mean = original.clone() * next.alpha() + direction * rest;
        let sample = match noise.filter(|_| self.draws_noise(at)) {
            Some(noise) => mean + noise * drawn,
            None => mean,
        };
        Stepped { sample, original, history: history.and_one() }
    }
}
