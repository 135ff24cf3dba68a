//! Euler's method along the sigmas (Karras et al. 2022, <https://arxiv.org/abs/2206.00364>, algorithm 2), and the ancestral
//! one, which goes a little too far and draws noise anew (k-diffusion). Samples are kept with their noise beside them at
//! full size, `sample + sigma * noise`. The numbers match diffusers' `EulerDiscreteScheduler` and
//! `EulerAncestralDiscreteScheduler`.

use burn::tensor::Tensor;

use super::prediction::Prediction;
use super::schedule::{Level, ScheduleError, SigmaEnd, SigmaSteps, Spacing, interpolate, timestep_of};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct Euler {
    timesteps: Vec<f64>,
    /// Before each step and after the last.
    sigmas: Vec<f64>,
    initial_sigma: f64,
    prediction: Prediction,
    is_ancestral: bool,
}

impl Euler {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(
        scheduler: &NoiseScheduler,
        spread: SigmaSteps,
        end: SigmaEnd,
        steps: usize,
    ) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, spacing, offset, prediction, .. } = *scheduler;
        let ratios = scheduler.noise()?.ratios();
        let mut timesteps = spacing.unrounded(train_steps, steps, offset)?;
        let mut sigmas = interpolate(&ratios, &timesteps);
        if let Some(spread) = spread.spread([sigmas[0], sigmas[steps - 1]], steps) {
            timesteps = spread.iter().map(|&sigma| timestep_of(sigma, &ratios)).collect();
            sigmas = spread;
        }
        sigmas.push(end.ratio(&ratios));
        let most = sigmas.iter().copied().fold(0.0, f64::max);
        let initial_sigma = match spacing {
            Spacing::Leading => (most * most + 1.0).sqrt(),
            Spacing::Linspace | Spacing::Trailing => most,
        };
        Ok(Self { timesteps, sigmas, initial_sigma, prediction, is_ancestral: false })
    }

    /// The walk of so many steps that draw noise.
    ///
    /// # Errors
    /// As [`Euler::new`].
    pub fn ancestral(scheduler: &NoiseScheduler, steps: usize) -> Result<Self, ScheduleError> {
        let euler = Self::new(scheduler, SigmaSteps::Visited, SigmaEnd::Zero, steps)?;
        Ok(Self { is_ancestral: true, ..euler })
    }
}

impl Sampler for Euler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn sigmas(&self) -> Option<&[f64]> {
        Some(&self.sigmas)
    }

    fn initial_sigma(&self) -> f64 {
        self.initial_sigma
    }

    fn scaled(&self, at: usize, sample: Tensor<4>) -> Tensor<4> {
        sample * Level::of_ratio(self.sigmas[at]).alpha()
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        original + noise * self.sigmas[at]
    }

    fn draws_noise(&self, _at: usize) -> bool {
        self.is_ancestral
    }

    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let [sigma, next] = [self.sigmas[at], self.sigmas[at + 1]];
        let original = match self.prediction {
            Prediction::Noise => sample.clone() - output * sigma,
            Prediction::Velocity => {
                let Level { product } = Level::of_ratio(sigma);
                sample.clone() * product - output * (sigma * product.sqrt())
            }
            Prediction::Sample => output,
        };
        let drawn = match self.is_ancestral {
            true => next * (sigma * sigma - next * next).max(0.0).sqrt() / sigma,
            false => 0.0,
        };
        let down = (next * next - drawn * drawn).max(0.0).sqrt();
        let slope = (sample.clone() - original.clone()) / sigma;
        let mean = sample + slope * (down - sigma);
        let sample = match noise.filter(|_| self.is_ancestral) {
            Some(noise) => mean + noise * drawn,
            None => mean,
        };
        Stepped { sample, original, history: history.and_one() }
    }
}
