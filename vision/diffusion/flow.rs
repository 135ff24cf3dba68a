//! Rectified flow (Liu et al. 2022, <https://arxiv.org/abs/2209.03003>; Lipman et al. 2022): a model that says the way from
//! sample to noise, and Euler's method along it. The numbers match diffusers' `FlowMatchEulerDiscreteScheduler`.

use burn::tensor::Tensor;

use super::schedule::{ScheduleError, linspace, within};
use super::{History, Sampler, Step, Stepped};

/// A straight line between noise and sample.
#[derive(Clone, Debug, PartialEq)]
pub struct FlowScheduler {
    /// What the timestep is at the end where there is only noise.
    pub train_steps: usize,
    /// How much more time is spent where there is much noise: 1 for none (Esser et al. 2024, equation 23).
    pub shift: f64,
    /// Whether each step goes to the sample and draws noise anew.
    pub is_stochastic: bool,
}

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct FlowEuler {
    timesteps: Vec<f64>,
    /// The share of noise before each step and after the last.
    sigmas: Vec<f64>,
    is_stochastic: bool,
}

impl FlowScheduler {
    fn shifted(&self, sigma: f64) -> f64 {
        self.shift * sigma / (1.0 + (self.shift - 1.0) * sigma)
    }
}

impl FlowEuler {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps.
    pub fn new(flow: &FlowScheduler, steps: usize) -> Result<Self, ScheduleError> {
        within(1, steps, flow.train_steps)?;
        let train_steps = flow.train_steps as f64;
        // the least noise is shifted twice
        let visited = linspace(flow.shifted(1.0), flow.shifted(1.0 / train_steps), steps);
        let mut sigmas: Vec<f64> = visited.into_iter().map(|sigma| flow.shifted(sigma)).collect();
        let timesteps = sigmas.iter().map(|sigma| sigma * train_steps).collect();
        sigmas.push(0.0);
        Ok(Self { timesteps, sigmas, is_stochastic: flow.is_stochastic })
    }
}

impl Sampler for FlowEuler {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn sigmas(&self) -> Option<&[f64]> {
        Some(&self.sigmas)
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        original * (1.0 - self.sigmas[at]) + noise * self.sigmas[at]
    }

    fn draws_noise(&self, _at: usize) -> bool {
        self.is_stochastic
    }

    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let [sigma, next] = [self.sigmas[at], self.sigmas[at + 1]];
        let original = sample.clone() - output.clone() * sigma;
        let sample = match (self.is_stochastic, noise) {
            (true, Some(noise)) => original.clone() * (1.0 - next) + noise * next,
            (true, None) => original.clone() * (1.0 - next),
            (false, _) => sample + output * (next - sigma),
        };
        Stepped { sample, original, history: history.and_one() }
    }
}
