//! How much noise there is at each of a training's steps, and which of them are visited.

use std::f64::consts::PI;

use burn::tensor::{Tensor, TensorData};

/// Why there are no such steps.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum ScheduleError {
    /// Too few or too many steps.
    #[error("{found} steps: expected {least} to {most}")]
    Steps {
        /// What was asked for.
        found: usize,
        /// At least so many.
        least: usize,
        /// At most so many.
        most: usize,
    },
    /// A step lies after the last that was trained.
    #[error("{steps} steps lead to timestep {timestep}, but the training has {train_steps}, from 0 on")]
    Timestep {
        /// How many steps were asked for.
        steps: usize,
        /// What they visit.
        timestep: f64,
        /// The training's.
        train_steps: usize,
    },
    /// A beta that is no share of noise.
    #[error("beta {at} is {found}: expected more than 0 and less than 1")]
    Beta {
        /// Which one.
        at: usize,
        /// Its value.
        found: f64,
    },
    /// A list of betas of the wrong length.
    #[error("{found} betas for {expected} training steps")]
    Betas {
        /// The training's steps.
        expected: usize,
        /// How many there are.
        found: usize,
    },
    /// The model says what the noise is where there is nothing else.
    #[error(
        "timestep {timestep} has no signal, so that a model which predicts noise says nothing of the sample"
    )]
    NoSignal {
        /// Where.
        timestep: f64,
    },
}

/// How much noise each training step adds.
#[derive(Clone, Debug, PartialEq)]
pub enum Betas {
    /// Evenly from `start` to `end` (Ho et al. 2020).
    Linear {
        /// The first.
        start: f64,
        /// The last.
        end: f64,
    },
    /// The squares of what goes evenly from the root of `start` to that of `end` (latent diffusion).
    ScaledLinear {
        /// The first.
        start: f64,
        /// The last.
        end: f64,
    },
    /// So that the product follows a squared cosine (Nichol and Dhariwal 2021, equation 17), each at most 0.999.
    SquaredCosine,
    /// So that the logarithm of signal to noise follows a Laplace distribution, each at most 0.999.
    Laplace,
    /// Along a sigmoid from `start` to `end` (GeoDiff).
    Sigmoid {
        /// The lower end.
        start: f64,
        /// The upper end.
        end: f64,
    },
    /// As listed.
    Listed(Vec<f64>),
}

impl Betas {
    /// One for each of `count` training steps, if they are not listed.
    pub fn values(&self, count: usize) -> Vec<f64> {
        match self {
            Self::Linear { start, end } => linspace(*start, *end, count),
            Self::ScaledLinear { start, end } => {
                linspace(start.sqrt(), end.sqrt(), count).iter().map(|root| root * root).collect()
            }
            Self::SquaredCosine => from_product(count, |t| ((t + 0.008) / 1.008 * PI / 2.0).cos().powi(2)),
            Self::Laplace => from_product(count, |t| {
                let half = 0.5 - t;
                let log_snr = -0.5 * 1f64.copysign(half) * (1.0 - 2.0 * half.abs() + 1e-6).ln();
                let snr = log_snr.exp();
                (snr / (1.0 + snr)).sqrt()
            }),
            Self::Sigmoid { start, end } => linspace(-6.0, 6.0, count)
                .iter()
                .map(|x| (end - start) / (1.0 + (-x).exp()) + start)
                .collect(),
            Self::Listed(values) => values.clone(),
        }
    }
}

/// The betas whose product of `1 - beta` follows `product` over the time from 0 to 1.
fn from_product(count: usize, product: impl Fn(f64) -> f64) -> Vec<f64> {
    let time = |step: usize| step as f64 / count as f64;
    (0..count).map(|step| (1.0 - product(time(step + 1)) / product(time(step))).min(0.999)).collect()
}

/// `count` numbers from `start` to `end`, both among them.
pub(crate) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = (end - start) / count.saturating_sub(1).max(1) as f64;
    (0..count).map(|at| if at > 0 && at + 1 == count { end } else { start + step * at as f64 }).collect()
}

/// What the last training step leaves of the sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// What the betas say.
    AsIs,
    /// Nothing: the roots of the products are moved and stretched, the first stays (Lin et al. 2023, algorithm 1).
    NoSignal,
}

/// How much of a noised sample is signal and how much noise: `alpha * sample + sigma * noise`, where the squares of both
/// make 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// The square of alpha: the product of `1 - beta` up to here.
    pub product: f64,
}

impl Level {
    /// No noise.
    pub const CLEAN: Self = Self { product: 1.0 };

    /// The level where there is `ratio` times as much noise as signal.
    pub fn of_ratio(ratio: f64) -> Self {
        Self { product: 1.0 / (ratio * ratio + 1.0) }
    }

    /// How much is signal.
    pub fn alpha(self) -> f64 {
        self.product.sqrt()
    }

    /// How much is noise.
    pub fn sigma(self) -> f64 {
        (1.0 - self.product).sqrt()
    }

    /// So many times as much noise as signal.
    pub fn ratio(self) -> f64 {
        ((1.0 - self.product) / self.product).sqrt()
    }

    /// A sample with noise.
    pub fn noised(self, original: Tensor<4>, noise: Tensor<4>) -> Tensor<4> {
        original * self.alpha() + noise * self.sigma()
    }
}

/// The noise of every training step.
#[derive(Clone, Debug, PartialEq)]
pub struct NoiseSchedule {
    products: Vec<f64>,
}

impl NoiseSchedule {
    /// The schedule of `train_steps` steps.
    ///
    /// # Errors
    /// If a beta is not between 0 and 1, or there are too few or too many of them.
    pub fn new(betas: &Betas, train_steps: usize, terminal: Terminal) -> Result<Self, ScheduleError> {
        let betas = betas.values(train_steps);
        if betas.len() != train_steps || betas.is_empty() {
            return Err(ScheduleError::Betas { expected: train_steps, found: betas.len() });
        }
        if let Some(at) = betas.iter().position(|beta| !(*beta > 0.0 && *beta < 1.0)) {
            return Err(ScheduleError::Beta { at, found: betas[at] });
        }
        let running = |product: &mut f64, beta: f64| {
            *product *= 1.0 - beta;
            Some(*product)
        };
        let products: Vec<f64> = betas.into_iter().scan(1.0, running).collect();
        let products = match terminal {
            Terminal::AsIs => products,
            Terminal::NoSignal => {
                let roots: Vec<f64> = products.iter().map(|product| product.sqrt()).collect();
                let (first, last) = (roots[0], roots[train_steps - 1]);
                roots.iter().map(|root| ((root - last) * first / (first - last)).powi(2)).collect()
            }
        };
        Ok(Self { products })
    }

    /// The same, but for a trace of signal at its end if there is none, for samplers that divide by it.
    pub fn with_some_signal(mut self) -> Self {
        if let Some(last) = self.products.last_mut().filter(|last| **last == 0.0) {
            *last = 2f64.powi(-24);
        }
        self
    }

    /// The products of `1 - beta` up to each step.
    pub fn products(&self) -> &[f64] {
        &self.products
    }

    /// The level of a step.
    ///
    /// # Panics
    /// If the training has no such step.
    pub fn level(&self, timestep: usize) -> Level {
        Level { product: self.products[timestep] }
    }

    /// So many times as much noise as signal, at each step.
    pub fn ratios(&self) -> Vec<f64> {
        self.products.iter().map(|&product| Level { product }.ratio()).collect()
    }

    /// Samples with the noise of a training step each, `[batch, channels, height, width]`: what a model learns from.
    ///
    /// # Panics
    /// If there is not one timestep for each of the batch, or the training has no such step.
    pub fn noised(&self, original: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        let [alpha, sigma] = self.columns(timesteps, &original);
        original * alpha + noise * sigma
    }

    /// What a model that says the velocity learns to say of [`NoiseSchedule::noised`] (Salimans and Ho 2022, appendix D).
    ///
    /// # Panics
    /// As [`NoiseSchedule::noised`].
    pub fn velocity(&self, original: Tensor<4>, noise: Tensor<4>, timesteps: &[usize]) -> Tensor<4> {
        let [alpha, sigma] = self.columns(timesteps, &original);
        noise * alpha - original * sigma
    }

    /// Alpha and sigma of each of a batch, `[batch, 1, 1, 1]`.
    fn columns(&self, timesteps: &[usize], like: &Tensor<4>) -> [Tensor<4>; 2] {
        let [batch, ..] = like.dims();
        assert_eq!(timesteps.len(), batch, "timesteps (left), and samples of the batch");
        [Level::alpha, Level::sigma].map(|part| {
            let values: Vec<f32> = timesteps.iter().map(|&t| part(self.level(t)) as f32).collect();
            let data = TensorData::new(values, [batch, 1, 1, 1]);
            Tensor::<4>::from_data(data, &like.device()).cast(like.dtype())
        })
    }
}

/// Which of the training's steps are visited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spacing {
    /// Every so many steps from the first on, moved by the offset.
    Leading,
    /// Every so many steps from the last one back.
    Trailing,
    /// Evenly from the first to the last.
    Linspace,
}

impl Spacing {
    /// `steps` of `train_steps` steps, the last first.
    ///
    /// # Errors
    /// If there are no such steps.
    pub fn timesteps(
        self,
        train_steps: usize,
        steps: usize,
        offset: usize,
    ) -> Result<Vec<f64>, ScheduleError> {
        let mut timesteps = self.unrounded(train_steps, steps, offset)?;
        timesteps.iter_mut().for_each(|timestep| *timestep = timestep.round_ties_even());
        Ok(timesteps)
    }

    /// As [`Spacing::timesteps`], but between the training's steps where [`Spacing::Linspace`] leads there.
    ///
    /// # Errors
    /// If there are no such steps.
    pub fn unrounded(
        self,
        train_steps: usize,
        steps: usize,
        offset: usize,
    ) -> Result<Vec<f64>, ScheduleError> {
        within(1, steps, train_steps)?;
        let timesteps: Vec<f64> = match self {
            Self::Leading => {
                let stride = train_steps / steps;
                (0..steps).rev().map(|step| (step * stride + offset) as f64).collect()
            }
            Self::Trailing => {
                let stride = train_steps as f64 / steps as f64;
                let timestep = |step| (train_steps as f64 - step as f64 * stride).round_ties_even() - 1.0;
                (0..steps).map(timestep).collect()
            }
            Self::Linspace => linspace(0.0, (train_steps - 1) as f64, steps).into_iter().rev().collect(),
        };
        trained(train_steps, timesteps)
    }
}

/// That `steps` are at least `least` and at most `most`.
pub(crate) fn within(least: usize, steps: usize, most: usize) -> Result<(), ScheduleError> {
    match (least..=most).contains(&steps) {
        true => Ok(()),
        false => Err(ScheduleError::Steps { found: steps, least, most }),
    }
}

/// The timesteps, if all are of the training.
pub(crate) fn trained(train_steps: usize, timesteps: Vec<f64>) -> Result<Vec<f64>, ScheduleError> {
    match timesteps.iter().find(|timestep| !(0.0..=(train_steps - 1) as f64).contains(*timestep)) {
        None => Ok(timesteps),
        Some(&timestep) => Err(ScheduleError::Timestep { steps: timesteps.len(), timestep, train_steps }),
    }
}

/// Where steps lie between the most and the least noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum SigmaSteps {
    /// As the training's steps that are visited.
    Visited,
    /// Evenly in the seventh root (Karras et al. 2022, equation 5), or within the limits that are set.
    Karras {
        /// The least noise, if not that of the steps that are visited.
        least: Option<f64>,
        /// The most noise, if not that of the steps that are visited.
        most: Option<f64>,
    },
    /// Evenly in the logarithm.
    Exponential {
        /// The least noise, if not that of the steps that are visited.
        least: Option<f64>,
        /// The most noise, if not that of the steps that are visited.
        most: Option<f64>,
    },
}

impl SigmaSteps {
    /// `steps` ratios of noise to signal from `most` to `least`, which the configuration may replace; nothing where they
    /// are those of the visited steps.
    pub(crate) fn spread(self, [most, least]: [f64; 2], steps: usize) -> Option<Vec<f64>> {
        const RHO: f64 = 7.0;
        match self {
            Self::Visited => None,
            Self::Karras { least: l, most: m } => {
                let root = |sigma: f64| sigma.powf(1.0 / RHO);
                let roots = linspace(root(m.unwrap_or(most)), root(l.unwrap_or(least)), steps);
                Some(roots.into_iter().map(|root| root.powf(RHO)).collect())
            }
            Self::Exponential { least: l, most: m } => {
                let logs = linspace(m.unwrap_or(most).ln(), l.unwrap_or(least).ln(), steps);
                Some(logs.into_iter().map(f64::exp).collect())
            }
        }
    }
}

/// Where the last step leads, where steps are laid out by sigmas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SigmaEnd {
    /// To no noise.
    Zero,
    /// To the noise of the training's first step.
    First,
}

impl SigmaEnd {
    /// The ratio of noise to signal there.
    pub(crate) fn ratio(self, ratios: &[f64]) -> f64 {
        match self {
            Self::Zero => 0.0,
            Self::First => ratios[0],
        }
    }
}

/// The value of `table`, linear between its places, at each of `places`.
pub(crate) fn interpolate(table: &[f64], places: &[f64]) -> Vec<f64> {
    let value = |place: &f64| {
        let below = (place.floor() as usize).min(table.len() - 1);
        let above = (below + 1).min(table.len() - 1);
        table[below] + (table[above] - table[below]) * (place - below as f64)
    };
    places.iter().map(value).collect()
}

/// The timestep, between the training's, where the ratio of noise to signal is `ratio`: linear in its logarithm between
/// those of `ratios`, which rise.
pub(crate) fn timestep_of(ratio: f64, ratios: &[f64]) -> f64 {
    if ratios.len() < 2 {
        return 0.0;
    }
    let wanted = ratio.max(1e-10).ln();
    let low = ratios.iter().rposition(|known| known.ln() <= wanted).unwrap_or(0).min(ratios.len() - 2);
    let (below, above) = (ratios[low].ln(), ratios[low + 1].ln());
    low as f64 + ((below - wanted) / (below - above)).clamp(0.0, 1.0)
}
