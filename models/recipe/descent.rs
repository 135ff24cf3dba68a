//! What recipes share: the learning rate, batches that are computed in parts, and what is seen of a run.

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};

use super::curve;
use crate::error::Error;

/// A run of a few minutes over examples that are drawn as they are needed.
#[derive(Clone, Debug, PartialEq)]
pub struct Descent {
    /// Optimizer steps.
    pub steps: usize,
    /// Examples per step.
    pub batch: usize,
    /// Parts of a batch, each computed on a thread of its own.
    pub parts: usize,
    /// The highest learning rate, after a twentieth of the steps; from there half a cosine to zero.
    pub learning_rate: f64,
    /// Of initial weights and examples.
    pub seed: u64,
}

impl Descent {
    /// Trains a model on a device with autodiff by AdamW, and writes the curve of its loss into `folder`. `loss` says the mean
    /// loss of the examples of these numbers, `[1]`; numbers go up from 0 over all steps. Returns the model and the loss of
    /// each step.
    ///
    /// # Errors
    /// Those of `loss`; if the curve cannot be written, or the loss is not a number any more.
    pub fn run<M: Module + Sync>(
        &self,
        mut model: M,
        folder: &Path,
        device: &Device,
        loss: impl Fn(&M, &[u64]) -> Result<Tensor<1>, Error> + Sync,
    ) -> Result<(M, Vec<f32>), Error> {
        let mut optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(0.01).init();
        let bar = progress(self.steps);
        let mut losses = Vec::with_capacity(self.steps);
        for step in 0..self.steps {
            let (value, gradients) = self.gradients(&model, step, device, &loss)?;
            if !value.is_finite() {
                let problem = format!("step {step}: the loss is {value}; lower the learning rate");
                return Err(Error::Data { file: folder.into(), problem });
            }
            let rate = learning_rate(self.learning_rate, step, (self.steps / 20).max(1), self.steps);
            model = optimizer.step(rate, model, gradients);
            losses.push(value);
            bar.inc(1);
            bar.set_message(format!("loss {value:.3}"));
        }
        bar.finish();
        let points: Vec<(usize, f32)> = losses.iter().copied().enumerate().collect();
        let drawn = folder.join("loss.svg");
        fs::write(&drawn, curve::svg("training loss by step", &points)).map_err(Error::io(&drawn))?;
        Ok((model, losses))
    }

    /// The mean loss of a step's batch, and its gradients.
    fn gradients<M: Module + Sync>(
        &self,
        model: &M,
        step: usize,
        device: &Device,
        loss: &(impl Fn(&M, &[u64]) -> Result<Tensor<1>, Error> + Sync),
    ) -> Result<(f32, GradientsParams), Error> {
        let first = (step * self.batch) as u64;
        let rows: Vec<u64> = (first..first + self.batch as u64).collect();
        let computed: Vec<Result<(f32, GradientsParams), Error>> = std::thread::scope(|scope| {
            let of_part = |rows: &[u64]| {
                // a graph of its own: threads that share leaves deadlock in Burn 0.22.1's autodiff
                let (model, rows) = (model.clone().fork(device), rows.to_vec());
                let share = rows.len() as f64 / self.batch as f64;
                scope.spawn(move || {
                    let loss = loss(&model, &rows)? * share;
                    let value = loss.clone().into_scalar::<f32>();
                    Ok((value, GradientsParams::from_grads(loss.backward(), &model)))
                })
            };
            let running: Vec<_> =
                rows.chunks(self.batch.div_ceil(self.parts.max(1)).max(1)).map(of_part).collect();
            running.into_iter().map(|part| part.join().expect("a part does not panic")).collect()
        });
        let mut accumulator = GradientsAccumulator::new();
        let mut total = 0.0;
        for part in computed {
            let (loss, gradients) = part?;
            total += loss;
            accumulator.accumulate(model, gradients);
        }
        Ok((total, accumulator.grads()))
    }
}

/// Linear warm-up to the highest rate, then half a cosine to zero.
pub fn learning_rate(highest: f64, step: usize, warmup: usize, steps: usize) -> f64 {
    if step < warmup {
        return highest * (step + 1) as f64 / warmup as f64;
    }
    let span = steps.saturating_sub(warmup).max(1);
    let progress = (step - warmup) as f64 / span as f64;
    highest * 0.5 * (1.0 + (core::f64::consts::PI * progress).cos())
}

/// One seed out of three numbers (the finaliser of SplitMix64, applied to each).
pub fn mix(seed: u64, step: u64, row: u64) -> u64 {
    [seed, step, row].into_iter().fold(0x9E37_79B9_7F4A_7C15, |state, value| {
        let z = (state ^ value).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// A bar of so many steps.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec} eta {eta} {msg}");
    ProgressBar::new(steps as u64).with_style(style.expect("the template is valid"))
}

#[cfg(test)]
mod tests {
    use super::learning_rate;

    #[test]
    fn the_rate_goes_up_and_then_down() {
        let rates: Vec<f64> = (0..8).map(|step| learning_rate(4.0, step, 4, 8)).collect();
        let half = 2.0 * (1.0 + core::f64::consts::FRAC_PI_4.cos());
        let expected = [1.0, 2.0, 3.0, 4.0, 4.0, half, 2.0, 4.0 - half];
        assert!(
            rates.iter().zip(expected).all(|(rate, expected)| (rate - expected).abs() < 1e-12),
            "{rates:?}"
        );
    }
}
