//! Pseudo numerical methods (Liu et al. 2022, <https://arxiv.org/abs/2202.09778>): steps of four answers of the model
//! each (Runge-Kutta) to begin with, then of one answer and what is left of those before it (linear multistep). The numbers
//! match diffusers' `PNDMScheduler`.

use burn::tensor::Tensor;

use super::ddim::Last;
use super::prediction::{Prediction, speaks};
use super::schedule::{Level, NoiseSchedule, ScheduleError, trained, within};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// How the first steps are made, before there are answers to remember.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// Three Runge-Kutta steps of four answers each.
    RungeKutta,
    /// A step of two answers, then multistep of rising order (`skip_prk_steps`).
    Multistep,
}

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct Pndm {
    timesteps: Vec<f64>,
    /// How many of them are of Runge-Kutta steps.
    runge_kutta: usize,
    stride: i64,
    noise: NoiseSchedule,
    last: Last,
    prediction: Prediction,
}

/// So many timesteps are taken by Runge-Kutta, at least.
const ORDER: usize = 4;

impl Pndm {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(
        scheduler: &NoiseScheduler,
        last: Last,
        start: Start,
        steps: usize,
    ) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, spacing, offset, prediction, .. } = *scheduler;
        let noise = scheduler.noise()?;
        let visited = spacing.timesteps(train_steps, steps, offset)?;
        let stride = train_steps / steps;
        let runge_kutta: Vec<f64> = match start {
            Start::Multistep => Vec::new(),
            Start::RungeKutta => {
                within(ORDER, steps, train_steps)?;
                // from each of the first three to the next: its start, twice the middle, its end
                let half = (stride / 2) as f64;
                let step = |pair: &[f64]| [pair[0], pair[1] + half, pair[1] + half, pair[1]];
                visited[..ORDER].windows(2).flat_map(step).collect()
            }
        };
        let multistep = match (start, &visited[..]) {
            (Start::RungeKutta, visited) => visited[ORDER - 1..].to_vec(),
            // the second is visited twice
            (Start::Multistep, [first, second, rest @ ..]) => [&[*first, *second, *second], rest].concat(),
            (Start::Multistep, visited) => visited.to_vec(),
        };
        let timesteps = trained(train_steps, [&runge_kutta[..], &multistep].concat())?;
        let levels: Vec<Level> = timesteps.iter().map(|&timestep| noise.level(timestep as usize)).collect();
        speaks(prediction, &timesteps, &levels)?;
        let runge_kutta = runge_kutta.len();
        Ok(Self { timesteps, runge_kutta, stride: stride as i64, noise, last, prediction })
    }

    fn level(&self, timestep: i64) -> Level {
        self.last.level(&self.noise, timestep)
    }

    /// A step of four answers: where it leads from and to after the answer that is `taken` steps after the first, the
    /// answers' mean so far, and what is kept.
    fn runge_kutta(&self, at: usize, sample: Tensor<4>, output: Tensor<4>, history: History) -> Move {
        let taken = history.taken;
        let back = if taken.is_multiple_of(2) { self.stride / 2 } else { 0 };
        let to = self.timesteps[at] as i64 - back;
        let from = self.timesteps[taken / 4 * 4] as i64;
        let start = history.start.clone().filter(|_| !taken.is_multiple_of(4)).unwrap_or(sample);
        let mut history = History { start: Some(start.clone()), ..history };
        let slope = match (taken % 4, &history.slopes[..]) {
            (3, [first, second, third]) => {
                let middle = second.clone() + third.clone();
                let slope = first.clone() / 6.0 + middle / 3.0 + output / 6.0;
                history = History { start: None, slopes: Vec::new(), ..history };
                slope
            }
            (phase, _) => {
                history.slopes.push(output.clone());
                if phase == 0 {
                    history = history.with_output(output.clone(), ORDER);
                }
                output
            }
        };
        Move { from, to, sample: start, slope, history }
    }

    /// A step of one answer and those before it (Adams and Bashforth), or one of the two that make up the first.
    fn multistep(&self, at: usize, sample: Tensor<4>, output: Tensor<4>, history: History) -> Move {
        let here = self.timesteps[at] as i64;
        if history.taken == 1
            && let ([first], Some(start)) = (&history.outputs[..], history.start.clone())
        {
            let slope = (first.clone() + output) / 2.0;
            let history = History { start: None, ..history };
            return Move { from: here + self.stride, to: here, sample: start, slope, history };
        }
        let start = (history.taken == 0).then(|| sample.clone());
        let history = History { start, ..history }.with_output(output, ORDER);
        let slope = match &history.outputs[..] {
            [a] => a.clone(),
            [b, a] => (a.clone() * 3.0 - b.clone()) / 2.0,
            [c, b, a] => (a.clone() * 23.0 - b.clone() * 16.0 + c.clone() * 5.0) / 12.0,
            [.., d, c, b, a] => {
                (a.clone() * 55.0 - b.clone() * 59.0 + c.clone() * 37.0 - d.clone() * 9.0) / 24.0
            }
            [] => unreachable!("an output was added"),
        };
        Move { from: here, to: here - self.stride, sample, slope, history }
    }
}

/// A step that is about to be made.
struct Move {
    from: i64,
    to: i64,
    sample: Tensor<4>,
    /// What stands for the model's answer.
    slope: Tensor<4>,
    history: History,
}

impl Sampler for Pndm {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        self.level(self.timesteps[at] as i64).noised(original, noise)
    }

    /// Equation 11.
    fn step(&self, Step { at, sample, output, .. }: Step, history: History) -> Stepped {
        let made = match history.taken < self.runge_kutta {
            true => self.runge_kutta(at, sample, output, history),
            false => self.multistep(at, sample, output, history),
        };
        let Move { from, to, sample, slope, history } = made;
        let [here, next] = [self.level(from), self.level(to)];
        let original = self.prediction.original(here, sample.clone(), slope.clone());
        let noise = self.prediction.noise(here, sample.clone(), slope);
        let denominator = here.product * next.sigma() + here.alpha() * here.sigma() * next.alpha();
        let sample =
            sample * (next.alpha() / here.alpha()) - noise * ((next.product - here.product) / denominator);
        Stepped { sample, original, history: history.and_one() }
    }
}
