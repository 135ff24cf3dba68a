//! Toys' runs: a few minutes over examples that are drawn as they are needed, without checkpoints.

use std::path::Path;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Tensor};

use super::run::{Computed, Store, TrainError, check, gradients, learning_rate, progress};
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
    ) -> Result<(M, Vec<f32>), TrainError> {
        let mut optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(0.01).init();
        let bar = progress(self.steps);
        let mut losses = Vec::with_capacity(self.steps);
        for step in 0..self.steps {
            let first = (step * self.batch) as u64;
            let rows: Vec<u64> = (first..first + self.batch as u64).collect();
            let parts: Vec<&[u64]> = rows.chunks(self.batch.div_ceil(self.parts.max(1)).max(1)).collect();
            let (value, _, gradients) = gradients(parts.len(), &model, device, parts, |model, rows| {
                let share = rows.len() as f64 / self.batch as f64;
                Ok(Computed { loss: loss(model, rows)? * share, seen: () })
            })?;
            check(step, value)?;
            let rate = learning_rate(self.learning_rate, step, (self.steps / 20).max(1), self.steps);
            model = optimizer.step(rate, model, gradients);
            losses.push(value);
            bar.inc(1);
            bar.set_message(format!("loss {value:.3}"));
        }
        bar.finish();
        Store { folder, title: "training loss by step" }.draw(&losses)?;
        Ok((model, losses))
    }
}
