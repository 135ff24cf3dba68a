//! Ancestral sampling (Ho et al. 2020, <https://arxiv.org/abs/2006.11239>). The numbers match diffusers'
//! `DDPMScheduler`.

use burn::tensor::Tensor;

use super::prediction::{Bound, Prediction, speaks};
use super::schedule::{Level, ScheduleError};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// How much noise a step draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variance {
    /// That of the step back where the sample is known.
    Small,
    /// As much as the step forward adds.
    Large,
    /// What the model says, in channels after those of its prediction.
    Learned,
    /// Between the two, where the model says (Nichol and Dhariwal 2021, equation 15).
    LearnedRange,
}

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct Ddpm {
    timesteps: Vec<f64>,
    /// Before and after each step.
    levels: Vec<[Level; 2]>,
    prediction: Prediction,
    bound: Bound,
    variance: Variance,
}

/// The least variance, so that it has a logarithm.
const LEAST: f64 = 1e-20;

impl Ddpm {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(scheduler: &NoiseScheduler, variance: Variance, steps: usize) -> Result<Self, ScheduleError> {
        let noise = scheduler.noise()?;
        let timesteps = scheduler.spacing.timesteps(scheduler.train_steps, steps, scheduler.offset)?;
        let mut levels: Vec<Level> =
            timesteps.iter().map(|&timestep| noise.level(timestep as usize)).collect();
        levels.push(Level::CLEAN);
        speaks(scheduler.prediction, &timesteps, &levels)?;
        let levels = levels.windows(2).map(|pair| [pair[0], pair[1]]).collect();
        let NoiseScheduler { prediction, bound, .. } = *scheduler;
        Ok(Self { timesteps, levels, prediction, bound, variance })
    }
}

impl Sampler for Ddpm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.levels[at][0].noised(original, noise)
    }

    fn draws_noise(&self, at: usize) -> bool {
        self.timesteps[at] > 0.0
    }

    /// Equation 7; the variance is said by the last channels of the output where it is learned.
    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let [here, next] = self.levels[at];
        let [_, channels, ..] = sample.dims();
        let [_, said, ..] = output.dims();
        let is_learned = matches!(self.variance, Variance::Learned | Variance::LearnedRange);
        let (output, learned) = match is_learned && said == 2 * channels {
            true => (output.clone().narrow(1, 0, channels), Some(output.narrow(1, channels, channels))),
            false => (output, None),
        };
        let original = self.bound.apply(self.prediction.original(here, sample.clone(), output));
        let alpha = here.product / next.product; // of this step alone
        let beta = 1.0 - alpha;
        let [noise_here, noise_next] = [1.0 - here.product, 1.0 - next.product];
        let mean = original.clone() * (next.alpha() * beta / noise_here)
            + sample * (alpha.sqrt() * noise_next / noise_here);
        let small = (noise_next / noise_here * beta).max(LEAST);
        let drawn = noise.filter(|_| self.draws_noise(at)).map(|noise| match (self.variance, learned) {
            (Variance::Large, _) => noise * beta.sqrt(),
            (Variance::Learned, Some(variance)) => noise * variance.sqrt(),
            (Variance::LearnedRange, Some(place)) => {
                let share = (place + 1.0) / 2.0;
                let log = share * (beta.ln() - small.ln()) + small.ln();
                noise * (log * 0.5).exp()
            }
            (_, _) => noise * small.sqrt(),
        });
        let sample = match drawn {
            Some(drawn) => mean + drawn,
            None => mean,
        };
        Stepped { sample, original, history: history.and_one() }
    }
}
