//! How fast a model runs on a machine.

use std::ops::ControlFlow;
use std::time::Instant;

use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::count::Cost;
use volary_weights::LoadOptions;

use crate::error::Error;
use crate::folder::Folder;
use crate::generator::Generator;
use crate::imagine::{Extras, Imagine};
use crate::pictures::{Draws, drawing};
use crate::registry::System;
use crate::two_tower::TwoTower;

/// Tokens that a model reads at once, and that it writes one by one, if it has room for them.
const TOKENS: [usize; 2] = [128, 32];
/// Pictures, or texts, at once.
const BATCHES: [usize; 2] = [1, 8];
/// Steps of a picture.
const STEPS: usize = 2;

/// What a model does again and again.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// What is done.
    pub what: String,
    /// What is counted: tokens, images, texts, pictures.
    pub unit: &'static str,
    /// How many of it at a time.
    pub count: usize,
    /// How long that takes, the median.
    pub seconds: f64,
    /// What that costs.
    pub cost: Cost,
}

impl Rate {
    /// Of the unit, a second.
    pub fn per_second(&self) -> f64 {
        self.count as f64 / self.seconds
    }

    /// Floating point operations a second.
    pub fn operations(&self) -> f64 {
        self.cost.operations as f64 / self.seconds
    }

    /// Bytes of weights a second.
    pub fn weights(&self) -> f64 {
        self.cost.weights as f64 / self.seconds
    }
}

/// What was measured of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Measured {
    /// How long it took to load.
    pub seconds_to_load: f64,
    /// How fast it is.
    pub rates: Vec<Rate>,
}

/// Loads a folder's model and does `rounds` times, after once for nothing, what it is good for: reads and writes tokens,
/// embeds pictures and texts, or makes the first steps of a picture.
///
/// # Errors
/// If the model cannot be loaded, or does none of this.
pub fn bench(
    folder: &Folder,
    options: &LoadOptions,
    device: &Device,
    rounds: usize,
) -> Result<Measured, Error> {
    let start = Instant::now();
    let loaded = || start.elapsed().as_secs_f64();
    if let Ok(drawing) = drawing(folder) {
        let model = (drawing.open)(folder, &Extras::default(), options, device)?;
        return Ok(Measured { seconds_to_load: loaded(), rates: vec![drawn(&*model, rounds)?] });
    }
    let system = System::of(folder)?;
    if let Some(open) = system.generator {
        let generator = open(folder, options, device)?;
        return Ok(Measured { seconds_to_load: loaded(), rates: written(&*generator, device, rounds)? });
    }
    match (system.open)(folder, options, device)?.into_towers() {
        Some(towers) => {
            Ok(Measured { seconds_to_load: loaded(), rates: embedded(&*towers, device, rounds)? })
        }
        None => {
            Err(Error::Task { system: system.name, task: "be timed: it neither writes, embeds nor draws" })
        }
    }
}

/// The peak of this process's resident set so far in MiB, mapped files included. Only Linux tells.
pub fn peak_memory() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse().ok()?;
    Some(kib / 1024.0)
}

/// The median of what `work` says it took, and what it cost.
fn rate(
    (what, unit, count): (String, &'static str, usize),
    rounds: usize,
    mut work: impl FnMut() -> Result<(f64, Cost), Error>,
) -> Result<Rate, Error> {
    let mut taken = Vec::with_capacity(rounds);
    let (_, cost) = work()?;
    for _ in 0..rounds.max(1) {
        taken.push(work()?.0);
    }
    taken.sort_by(f64::total_cmp);
    Ok(Rate { what, unit, count, seconds: taken[taken.len() / 2], cost })
}

/// How long something takes, and what it costs.
fn timed<T>(device: &Device, work: impl FnOnce() -> T) -> (T, (f64, Cost)) {
    let (start, before) = (Instant::now(), Cost::so_far());
    let done = work();
    let _ = device.sync(); // what was asked of a device may still be going on there
    (done, (start.elapsed().as_secs_f64(), Cost::so_far() - before))
}

fn written(generator: &dyn Generator, device: &Device, rounds: usize) -> Result<Vec<Rate>, Error> {
    let [most, new] = TOKENS;
    let new = new.min(generator.room(1).unwrap_or(new)).max(1);
    let read = most.min(generator.context().map_or(most, |context| context.saturating_sub(new))).max(1);
    let prompt: Vec<u32> = (0..read).map(|at| (at % generator.vocab_size()) as u32).collect();
    let prompts = [prompt];
    let prefill = rate((format!("read {read} tokens"), "tokens", read), rounds, || {
        let mut session = generator.session(&prompts, new)?;
        Ok(timed(device, || session.start().into_data()).1)
    })?;
    let decode = rate((format!("write {new} tokens"), "tokens", new), rounds, || {
        let mut session = generator.session(&prompts, new)?;
        let _ = session.start().into_data();
        Ok(timed(device, || (0..new).for_each(|_| drop(session.read(&[0]).into_data()))).1)
    })?;
    Ok(vec![prefill, decode])
}

fn embedded(towers: &dyn TwoTower, device: &Device, rounds: usize) -> Result<Vec<Rate>, Error> {
    let fit = towers.fit();
    let mut rates = Vec::new();
    for batch in BATCHES {
        let pixels = Tensor::<4>::zeros([batch, 3, fit.image_size, fit.image_size], device);
        let pixels = pixels.cast(towers.scale().dtype());
        rates.push(rate((format!("embed {batch} images"), "images", batch), rounds, || {
            Ok(timed(device, || towers.encode_images(pixels.clone()).into_data()).1)
        })?);
    }
    for batch in BATCHES {
        let shape = [batch, fit.context_length];
        let (ids, real) =
            (Tensor::<2, Int>::zeros(shape, device), Tensor::<2, Bool>::full(shape, true, device));
        rates.push(rate((format!("embed {batch} texts"), "texts", batch), rounds, || {
            Ok(timed(device, || towers.encode_texts(ids.clone(), real.clone()).into_data()).1)
        })?);
    }
    Ok(rates)
}

fn drawn(model: &dyn Draws, rounds: usize) -> Result<Rate, Error> {
    let usual = model.usual();
    let by_tokens = usual.temperature.is_some(); // whose steps are the codes of a picture
    let steps = if by_tokens { usual.steps } else { STEPS };
    let asked = Imagine { prompt: "a cat".into(), steps, ..usual };
    rate((format!("draw a picture in {steps} steps"), "pictures", 1), rounds, || {
        let (made, taken) = timed(&Device::flex(), || model.draw(&asked, &mut |_| ControlFlow::Continue(())));
        made.map(|_| taken)
    })
}
