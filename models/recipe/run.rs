//! What runs of all recipes share: the schedule of the learning rate, gradients computed in parts on threads, checkpoints
//! that survive a kill, and the bar.

use std::fs;
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::optim::{GradientsAccumulator, GradientsParams, ModuleOptimizer};
use burn::tensor::{Device, Tensor};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use serde::de::DeserializeOwned;
use volary_text::tokenizer::TokenizerError;

use super::curve;
use crate::error::Error;

/// Linear warm-up to the highest rate, then half a cosine to zero.
pub fn learning_rate(highest: f64, step: usize, warmup: usize, steps: usize) -> f64 {
    if step < warmup {
        return highest * (step + 1) as f64 / warmup as f64;
    }
    let span = steps.saturating_sub(warmup).max(1);
    let progress = (step - warmup) as f64 / span as f64;
    highest * 0.5 * (1.0 + (core::f64::consts::PI * progress).cos())
}

/// What can stop a run.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// A file of the run could not be read or written.
    #[error("{}: {problem}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        problem: String,
    },
    /// A folder holds a run with other settings.
    #[error("{}: holds a run with other settings; resume it with those or name another folder", folder.display())]
    OtherRun {
        /// The run's folder.
        folder: PathBuf,
    },
    /// A caption could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The development pictures could not be read.
    #[error(transparent)]
    Model(#[from] Error),
    /// There are no patches to do without.
    #[error("`patch_dropout` needs a vision transformer; this tower is convolutional")]
    NoPatches,
    /// The loss is not a number any more.
    #[error("step {step}: the loss is {loss}; lower the learning rate")]
    Diverged {
        /// Where.
        step: usize,
        /// The loss.
        loss: f32,
    },
}

/// What one part of a batch gives: its share of the loss, `[1]`, and what else the recipe wants to know.
pub struct Computed<T> {
    /// Already times the part's share of the batch: losses of all parts are added up.
    pub loss: Tensor<1>,
    /// Besides.
    pub seen: T,
}

/// Computes parts of a batch, so many beside each other and each on a thread of its own: the CPU backend runs most operations
/// on one core.
pub fn on_threads<M: Module + Sync, P: Send, T: Send>(
    at_once: usize,
    model: &M,
    device: &Device,
    parts: Vec<P>,
    compute: impl Fn(&M, P) -> T + Sync,
) -> Vec<T> {
    let mut computed = Vec::with_capacity(parts.len());
    let mut parts = parts.into_iter().peekable();
    while parts.peek().is_some() {
        std::thread::scope(|scope| {
            let compute = &compute;
            let of_part = |part: P| {
                // a graph of its own: threads that share leaves deadlock in Burn 0.22.1's autodiff
                let model = model.clone().fork(device);
                scope.spawn(move || compute(&model, part))
            };
            let running: Vec<_> = parts.by_ref().take(at_once.max(1)).map(of_part).collect();
            computed.extend(running.into_iter().map(|part| part.join().expect("a part does not panic")));
        });
    }
    computed
}

/// The loss of a batch, what was seen, and the gradients, by [`on_threads`].
///
/// # Errors
/// Those of `compute`.
pub fn gradients<M: Module + Sync, P: Send, T: Send>(
    at_once: usize,
    model: &M,
    device: &Device,
    parts: Vec<P>,
    compute: impl Fn(&M, P) -> Result<Computed<T>, TrainError> + Sync,
) -> Result<(f32, Vec<T>, GradientsParams), TrainError> {
    let computed = on_threads(at_once, model, device, parts, |model, part| {
        let Computed { loss, seen } = compute(model, part)?;
        let value = loss.clone().into_scalar::<f32>();
        Ok::<_, TrainError>((value, seen, GradientsParams::from_grads(loss.backward(), model)))
    });
    let mut accumulator = GradientsAccumulator::new();
    let (mut total, mut all) = (0.0, Vec::new());
    for part in computed {
        let (loss, seen, gradients) = part?;
        total += loss;
        all.push(seen);
        accumulator.accumulate(model, gradients);
    }
    Ok((total, all, accumulator.grads()))
}

/// The values of a tensor, row by row.
pub fn floats<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().convert::<f32>().try_into_vec().expect("converted to f32")
}

/// Everything of a run that changes from step to step.
pub struct State<M> {
    /// What is trained.
    pub model: M,
    /// Its moments.
    pub optimizer: ModuleOptimizer,
    /// One per step that was done.
    pub losses: Vec<f32>,
}

/// The folder of a run: its checkpoint and the curve of its loss.
///
/// A checkpoint is written whole beside the old one before the names are swapped: a run that is killed at any moment has
/// one.
#[derive(Clone, Copy, Debug)]
pub struct Store<'a> {
    /// The run's folder.
    pub folder: &'a Path,
    /// What the curve is of.
    pub title: &'a str,
}

impl Store<'_> {
    /// The state to go on from, and the folder with whatever else was saved; as it was given and none, where there is no
    /// checkpoint. `is_same` tells whether a run with the saved settings may go on.
    ///
    /// # Errors
    /// If the checkpoint cannot be read, or belongs to a run with other settings.
    pub fn resume<M: Module, R: DeserializeOwned>(
        &self,
        fresh: State<M>,
        is_same: impl Fn(R) -> bool,
    ) -> Result<(State<M>, Option<PathBuf>), TrainError> {
        fs::create_dir_all(self.folder).map_err(|error| file_error(self.folder, error))?;
        let (checkpoint, old) = (self.folder.join("checkpoint"), self.folder.join("checkpoint.old"));
        if !checkpoint.exists() && old.exists() {
            // killed between the two renames of a save
            fs::rename(&old, &checkpoint).map_err(|error| file_error(&old, error))?;
        }
        if !checkpoint.exists() {
            return Ok((fresh, None));
        }
        let file = checkpoint.join("recipe.json");
        let bytes = fs::read(&file).map_err(|error| file_error(&file, error))?;
        if !is_same(serde_json::from_slice(&bytes).map_err(|error| file_error(&file, error))?) {
            return Err(TrainError::OtherRun { folder: self.folder.into() });
        }
        let file = checkpoint.join("model.bpk");
        let model = fresh.model.try_load_file(&file).map_err(|error| file_error(&file, error))?;
        let file = checkpoint.join("optimizer.bpk");
        let optimizer = fresh.optimizer.load(&file).map_err(|error| file_error(&file, error))?;
        let file = checkpoint.join("losses.csv");
        let text = fs::read_to_string(&file).map_err(|error| file_error(&file, error))?;
        let loss = |line: &str| {
            let value = line.split(',').nth(1).unwrap_or_default();
            value.parse().map_err(|_| file_error(&file, format!("`{line}` is not `step,loss`")))
        };
        let losses = text.lines().map(loss).collect::<Result<_, TrainError>>()?;
        Ok((State { model, optimizer, losses }, Some(checkpoint)))
    }

    /// Writes a whole checkpoint, with `more` files by their names, and draws the curve.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save<M: Module>(
        &self,
        state: &State<M>,
        recipe: &impl Serialize,
        more: &[(&str, &[u8])],
    ) -> Result<(), TrainError> {
        let [fresh, current, old] =
            ["checkpoint.new", "checkpoint", "checkpoint.old"].map(|name| self.folder.join(name));
        for leftover in [&fresh, &old] {
            if leftover.exists() {
                fs::remove_dir_all(leftover).map_err(|error| file_error(leftover, error))?;
            }
        }
        fs::create_dir(&fresh).map_err(|error| file_error(&fresh, error))?;
        let file = fresh.join("model.bpk");
        state.model.clone().save_file(&file).map_err(|error| file_error(&file, error))?;
        let file = fresh.join("optimizer.bpk");
        state.optimizer.save(&file).map_err(|error| file_error(&file, error))?;
        let recipe = serde_json::to_vec_pretty(recipe).expect("numbers serialise");
        let losses = state.losses.iter().enumerate();
        let losses: String = losses.map(|(step, loss)| format!("{step},{loss}\n")).collect();
        let own: [(&str, &[u8]); 2] = [("recipe.json", &recipe), ("losses.csv", losses.as_bytes())];
        for (name, bytes) in own.iter().chain(more) {
            let file = fresh.join(name);
            fs::write(&file, bytes).map_err(|error| file_error(&file, error))?;
        }
        self.draw(&state.losses)?;
        if current.exists() {
            fs::rename(&current, &old).map_err(|error| file_error(&current, error))?;
        }
        fs::rename(&fresh, &current).map_err(|error| file_error(&current, error))
    }

    /// Draws the curve, `loss.svg`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn draw(&self, losses: &[f32]) -> Result<(), TrainError> {
        let drawn = self.folder.join("loss.svg");
        let line = curve::Line { name: "loss", values: losses };
        fs::write(&drawn, curve::svg(self.title, &[line])).map_err(|error| file_error(&drawn, error))
    }
}

/// That a loss is a number.
///
/// # Errors
/// If it is not.
pub fn check(step: usize, loss: f32) -> Result<(), TrainError> {
    if loss.is_finite() { Ok(()) } else { Err(TrainError::Diverged { step, loss }) }
}

/// The mean of the newest losses.
pub fn mean_of_last(losses: &[f32], count: usize) -> f32 {
    let last = &losses[losses.len().saturating_sub(count)..];
    last.iter().sum::<f32>() / last.len().max(1) as f32
}

/// One seed out of several numbers (the finaliser of SplitMix64, applied to each).
pub fn mix<const N: usize>(numbers: [u64; N]) -> u64 {
    numbers.into_iter().fold(0x9E37_79B9_7F4A_7C15, |state, value| {
        let z = (state ^ value).wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    })
}

/// A bar of steps; it shows nothing where standard error is no terminal.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {per_sec} eta {eta} {msg}");
    ProgressBar::new(steps as u64).with_style(style.expect("the template is valid"))
}

/// That a file of a run could not be read or written.
pub fn file_error(file: &Path, problem: impl core::fmt::Display) -> TrainError {
    TrainError::File { file: file.into(), problem: problem.to_string() }
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
