//! What a model says of a noised sample, and what is made of it.

use burn::tensor::{Tensor, TensorData};

use super::schedule::{Level, ScheduleError};

/// What a model says of a noised sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prediction {
    /// The noise in it (`epsilon`).
    Noise,
    /// `alpha * noise - sigma * sample` (`v_prediction`; Salimans and Ho 2022).
    Velocity,
    /// The sample without noise.
    Sample,
}

impl Prediction {
    /// The sample without noise, by the model's output for the noised one.
    pub fn original(self, at: Level, sample: Tensor<4>, output: Tensor<4>) -> Tensor<4> {
        let (alpha, sigma) = (at.alpha(), at.sigma());
        match self {
            Self::Noise => (sample - output * sigma) / alpha,
            Self::Velocity => sample * alpha - output * sigma,
            Self::Sample => output,
        }
    }

    /// The noise in the sample, by the model's output for it.
    pub fn noise(self, at: Level, sample: Tensor<4>, output: Tensor<4>) -> Tensor<4> {
        let (alpha, sigma) = (at.alpha(), at.sigma());
        match self {
            Self::Noise => output,
            Self::Velocity => output * alpha + sample * sigma,
            Self::Sample => (sample - output * alpha) / sigma,
        }
    }
}

/// That the model says something of the sample at every step.
pub(super) fn speaks(
    prediction: Prediction,
    timesteps: &[f64],
    levels: &[Level],
) -> Result<(), ScheduleError> {
    let silent = |level: &Level| prediction == Prediction::Noise && level.product == 0.0;
    match timesteps.iter().zip(levels).find(|(_, level)| silent(level)) {
        None => Ok(()),
        Some((&timestep, _)) => Err(ScheduleError::NoSignal { timestep }),
    }
}

/// What is done to a model's idea of the sample without noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// Nothing.
    None,
    /// It is cut at so much on both sides of 0.
    Clip(f64),
    /// Of each sample, it is cut where so large a share of the values stays, but not below 1 nor above `most`, and divided
    /// by that (Saharia et al. 2022, section 2.3).
    Dynamic {
        /// The share, 0 to 1.
        share: f64,
        /// Where it is cut at most.
        most: f64,
    },
}

impl Bound {
    /// The bounded sample.
    pub fn apply(self, sample: Tensor<4>) -> Tensor<4> {
        match self {
            Self::None => sample,
            Self::Clip(range) => sample.clamp(-range, range),
            Self::Dynamic { share, most } => {
                let limits = limits(&sample, share, most);
                sample.min_pair(limits.clone()).max_pair(-limits.clone()) / limits
            }
        }
    }
}

/// Where each sample is cut, `[batch, 1, 1, 1]`.
fn limits(sample: &Tensor<4>, share: f64, most: f64) -> Tensor<4> {
    let [batch, ..] = sample.dims();
    let values: Vec<f32> = sample.clone().abs().into_data().convert::<f32>().iter::<f32>().collect();
    let limit = |row: &[f32]| {
        let mut row = row.to_vec();
        row.sort_by(f32::total_cmp);
        let place = share * (row.len() - 1) as f64;
        let (below, above) = (row[place.floor() as usize] as f64, row[place.ceil() as usize] as f64);
        // not `clamp`: where `most` is below 1, it decides
        (below + (above - below) * place.fract()).max(1.0).min(most) as f32
    };
    let limits: Vec<f32> = values.chunks(values.len() / batch).map(limit).collect();
    Tensor::<4>::from_data(TensorData::new(limits, [batch, 1, 1, 1]), &sample.device()).cast(sample.dtype())
}
