//! DPM-Solver (Lu et al. 2022, <https://arxiv.org/abs/2206.00927>) and DPM-Solver++ (<https://arxiv.org/abs/2211.01095>) of
//! orders 1 to 3, which remember the model's last answers, and their stochastic kin. The numbers match diffusers'
//! `DPMSolverMultistepScheduler`.

use burn::tensor::Tensor;

use super::prediction::{Bound, Prediction};
use super::schedule::{
    Betas, Level, ScheduleError, SigmaEnd, SigmaSteps, Spacing, interpolate, linspace, timestep_of, trained,
    within,
};
use super::{History, NoiseScheduler, Sampler, Step, Stepped};

/// How the steps are made.
#[derive(Clone, Debug, PartialEq)]
pub struct DpmSolver {
    /// How many answers of the model a step reads: 1 to 3, or 2 at most where noise is drawn.
    pub order: usize,
    /// What the answers are taken for.
    pub estimate: Estimate,
    /// Whether noise is drawn.
    pub motion: Motion,
    /// How a step of order 2 is made.
    pub second: SecondOrder,
    /// Where the steps lie.
    pub steps: SigmaSteps,
    /// Where the last step leads.
    pub end: SigmaEnd,
    /// Whether the last two of fewer than 15 steps are of lower order.
    pub lower_order_at_end: bool,
    /// Whether the last step is of order 1 in any case.
    pub euler_at_end: bool,
    /// The least logarithm of signal to noise that is visited.
    pub least_log_snr: f64,
}

/// What the model's answers are taken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimate {
    /// The noise (DPM-Solver).
    Noise,
    /// The sample without noise (DPM-Solver++).
    Original,
}

/// Whether noise is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Motion {
    /// None: an ordinary differential equation is solved.
    Ode,
    /// At every step: a stochastic one is, of order 1 or 2.
    Sde,
}

/// How a step of order 2 is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SecondOrder {
    /// By the middle of the step.
    Midpoint,
    /// By both its ends.
    Heun,
}

/// A walk of so many steps.
#[derive(Clone, Debug)]
pub struct Multistep {
    solver: DpmSolver,
    timesteps: Vec<f64>,
    /// Before each step and after the last.
    sigmas: Vec<f64>,
    prediction: Prediction,
    bound: Bound,
}

/// From so many steps on, the last are of full order.
const FEW: usize = 15;

impl Multistep {
    /// The walk of so many steps.
    ///
    /// # Errors
    /// If there are no such steps, or the betas are no such numbers.
    pub fn new(scheduler: &NoiseScheduler, solver: &DpmSolver, steps: usize) -> Result<Self, ScheduleError> {
        let NoiseScheduler { train_steps, spacing, offset, prediction, bound, .. } = *scheduler;
        let ratios = scheduler.noise()?.ratios();
        let log_snrs = ratios.iter().map(|ratio| -ratio.ln());
        // the training's steps with enough signal
        let usable = log_snrs.filter(|log_snr| *log_snr >= solver.least_log_snr).count();
        let last = usable.saturating_sub(1);
        within(1, steps, if spacing == Spacing::Trailing { usable } else { last })?;
        let visited: Vec<f64> = match spacing {
            // one more than there are steps, of which the last is where they lead
            Spacing::Linspace => linspace(0.0, last as f64, steps + 1).into_iter().skip(1).rev().collect(),
            Spacing::Leading => {
                let stride = usable / (steps + 1);
                (1..=steps).rev().map(|step| (step * stride + offset) as f64).collect()
            }
            Spacing::Trailing => {
                let stride = train_steps as f64 / steps as f64;
                let timesteps = (0..steps).map(|step| usable as f64 - step as f64 * stride);
                timesteps
                    .filter(|timestep| *timestep > 0.0)
                    .map(|timestep| timestep.round_ties_even() - 1.0)
                    .collect()
            }
        };
        let visited: Vec<f64> = visited.into_iter().map(f64::round_ties_even).collect();
        let range = [ratios[train_steps - 1], ratios[0]];
        let (timesteps, mut sigmas) = match solver.steps.spread(range, steps) {
            None => {
                let visited = trained(train_steps, visited)?;
                (visited.clone(), interpolate(&ratios, &visited))
            }
            Some(sigmas) => {
                // cut where the reference rounds no more, but for an error of rounding
                let is_cut = matches!(solver.steps, SigmaSteps::Exponential { .. })
                    || scheduler.betas == Betas::SquaredCosine;
                let whole =
                    |place: f64| if is_cut { (place + 1e-6).floor() } else { place.round_ties_even() };
                let timesteps = sigmas.iter().map(|&sigma| whole(timestep_of(sigma, &ratios)));
                (timesteps.collect(), sigmas)
            }
        };
        sigmas.push(solver.end.ratio(&ratios));
        Ok(Self { solver: solver.clone(), timesteps, sigmas, prediction, bound })
    }

    /// How many answers the step reads when so many were remembered.
    fn order(&self, at: usize, remembered: usize) -> usize {
        let DpmSolver { order, motion, end, lower_order_at_end, euler_at_end, .. } = self.solver;
        let order = order.min(if motion == Motion::Sde { 2 } else { 3 });
        let steps = self.timesteps.len();
        let lower = lower_order_at_end && steps < FEW;
        let is_last = at + 1 == steps;
        // a last step may lead nowhere, where differences mean nothing
        let stands = (self.log_snr(at + 1) - self.log_snr(at)).abs() < 1e-6;
        if is_last && (euler_at_end || lower || end == SigmaEnd::Zero || stands) {
            return 1;
        }
        let order = order.min(remembered + 1);
        if at + 2 == steps && lower { order.min(2) } else { order }
    }

    /// The logarithm of signal to noise before a step.
    fn log_snr(&self, at: usize) -> f64 {
        -self.sigmas[at].ln()
    }

    /// What a step of this order multiplies with what.
    fn weights(&self, at: usize, order: usize) -> Weights {
        let [here, next] = [Level::of_ratio(self.sigmas[at]), Level::of_ratio(self.sigmas[at + 1])];
        let (alpha, sigma) = (next.alpha(), next.sigma());
        let h = self.log_snr(at + 1) - self.log_snr(at);
        let DpmSolver { estimate, motion, second, .. } = self.solver;
        // what the first, the second and the third difference of the answers contribute, per unit of `scale`
        let (scale, differences) = match (estimate, motion) {
            (Estimate::Original, Motion::Ode) => (alpha, differences(-h)),
            (Estimate::Original, Motion::Sde) => (alpha, differences(-2.0 * h)),
            (Estimate::Noise, Motion::Ode) => (sigma, differences(h)),
            (Estimate::Noise, Motion::Sde) => (2.0 * sigma, differences(h)),
        };
        let [first, heun, third] = differences;
        let second = match (order, second) {
            (2, SecondOrder::Midpoint) => 0.5 * first,
            _ => heun,
        };
        let sample = match (estimate, motion) {
            (Estimate::Original, Motion::Ode) => sigma / here.sigma(),
            (Estimate::Original, Motion::Sde) => sigma / here.sigma() * (-h).exp(),
            (Estimate::Noise, _) => alpha / here.alpha(),
        };
        let noise = match (estimate, motion) {
            (_, Motion::Ode) => 0.0,
            (Estimate::Original, Motion::Sde) => sigma * (-(-2.0 * h).exp_m1()).sqrt(),
            (Estimate::Noise, Motion::Sde) => sigma * (2.0 * h).exp_m1().sqrt(),
        };
        Weights { sample, answers: [first, second, third].map(|weight| -scale * weight), noise }
    }
}

/// `e^x - 1`, `(e^x - 1) / x - 1`, and `(e^x - 1 - x) / x² - 1/2`.
fn differences(x: f64) -> [f64; 3] {
    let first = x.exp_m1();
    [first, first / x - 1.0, (first - x) / (x * x) - 0.5]
}

/// What a step multiplies with what.
struct Weights {
    sample: f64,
    /// The newest answer, and the first and second differences of answers.
    answers: [f64; 3],
    noise: f64,
}

impl Sampler for Multistep {
    fn timesteps(&self) -> &[f64] {
        &self.timesteps
    }

    fn sigmas(&self) -> Option<&[f64]> {
        Some(&self.sigmas)
    }

    fn noised(&self, at: usize, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        Level::of_ratio(self.sigmas[at]).noised(original, noise)
    }

    fn draws_noise(&self, _at: usize) -> bool {
        self.solver.motion == Motion::Sde
    }

    fn step(&self, Step { at, sample, output, noise }: Step, history: History) -> Stepped {
        let here = Level::of_ratio(self.sigmas[at]);
        let original = self.prediction.original(here, sample.clone(), output.clone());
        let bounded = self.bound.apply(original);
        let answer = match (self.solver.estimate, self.bound) {
            (Estimate::Original, _) => bounded.clone(),
            (Estimate::Noise, Bound::None) => self.prediction.noise(here, sample.clone(), output),
            // what the bounded sample leaves
            (Estimate::Noise, _) => (sample.clone() - bounded.clone() * here.alpha()) / here.sigma(),
        };
        let order = self.order(at, history.outputs.len());
        let history = history.with_output(answer, self.solver.order);
        let weights = self.weights(at, order);
        let [w0, w1, w2] = weights.answers;
        let h = self.log_snr(at + 1) - self.log_snr(at);
        // how long the steps before were, in lengths of this one
        let length = |back: usize| (self.log_snr(at + 1 - back) - self.log_snr(at - back)) / h;
        let x = sample * weights.sample;
        let mean = match (order, &history.outputs[..]) {
            (2, [.., m1, m0]) => {
                let d1 = (m0.clone() - m1.clone()) / length(1);
                x + m0.clone() * w0 + d1 * w1
            }
            (3, [m2, m1, m0]) => {
                let [r0, r1] = [length(1), length(2)];
                let d10 = (m0.clone() - m1.clone()) / r0;
                let d11 = (m1.clone() - m2.clone()) / r1;
                let d2 = (d10.clone() - d11) / (r0 + r1);
                let d1 = d10 + d2.clone() * r0;
                x + m0.clone() * w0 + d1 * w1 + d2 * w2
            }
            (_, [.., m0]) => x + m0.clone() * w0,
            (_, []) => unreachable!("an answer was added"),
        };
        let sample = match noise.filter(|_| self.draws_noise(at)) {
            Some(noise) => mean + noise * weights.noise,
            None => mean,
        };
        Stepped { sample, original: bounded, history: history.and_one() }
    }
}
