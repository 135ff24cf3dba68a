//! Stable Diffusion 1 at full size beside diffusers, in turns: one step of the U-Net for a picture of 512 x 512, and the
//! decoding of that picture's latents, in f32 and bf16.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench --bench diffusion -- [rounds] [unet|vae] [f32|bf16]
//! ```
//!
//! Writes random weights and inputs once to a temporary folder, in the layout of diffusers, where both programs read them.
//! Every run is a process of its own: it loads, runs once, writes what came out, and runs once more, which is timed; memory
//! is the peak of the resident set, mapped files included. What came out is compared before the next run. Times are
//! medians, the least and the greatest beside them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::module::Module;
use burn::tensor::{Device, Distribution, FloatDType, Tensor, TensorData};
use serde_json::json;
use volary::folder::Folder;
use volary::registry::System;
use volary::tensors::Inputs;
use volary::{autoencoder, unet};
use volary_weights::{KeyMap, LoadOptions, read_tensors, save, save_tensors};

mod support;
use support::{Figure, measured, peak_mib, python, run, sorted};

/// What is run, and what the table calls it.
const MODELS: [(&str, &str); 2] = [("unet", "U-Net, one step"), ("vae", "decoding 64 x 64 latents")];
/// What weights and activations are held in, and how far two programs may be apart: the root of the mean square of the
/// difference, as a share of that of the peer's f32.
const DTYPES: [(&str, FloatDType, f64); 2] =
    [("f32", FloatDType::F32, 1e-4), ("bf16", FloatDType::BF16, 6e-2)];
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/diffusion.py");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["write", folder] => write(Path::new(folder)),
        ["run", _, dtype, folder, inputs, output] => {
            child(dtype, folder.as_ref(), inputs.as_ref(), output.as_ref())
        }
        [] => compare(3, "", ""),
        [rounds] => compare(rounds.parse()?, "", ""),
        [rounds, model] => compare(rounds.parse()?, model, ""),
        [rounds, model, dtype] => compare(rounds.parse()?, model, dtype),
        _ => bail!("expected at most: ROUNDS unet|vae f32|bf16"),
    }
}

/// Prints the table, or the part of it that is asked for.
fn compare(rounds: usize, only_model: &str, only_dtype: &str) -> Result<()> {
    ensure!(rounds > 0, "there is nothing to measure");
    let folder = tempfile::tempdir()?;
    let at = |name: &str| folder.path().join(name);
    let program = std::env::current_exe()?;
    run(Command::new(&program).arg("write").arg(folder.path()))?;
    println!(
        "| what | dtype | volary s | diffusers s | ratio | volary peak MiB | diffusers peak MiB | error |"
    );
    println!("|{}", " --- |".repeat(8));
    let is_asked = |name: &str, only: &str| only.is_empty() || name == only;
    for (model, what) in MODELS.into_iter().filter(|(model, _)| is_asked(model, only_model)) {
        let mut exact = None;
        for (dtype, _, tolerance) in DTYPES.into_iter().filter(|(dtype, ..)| is_asked(dtype, only_dtype)) {
            let outputs = ["volary", "diffusers"].map(|name| at(&format!("{name}-{model}-{dtype}")));
            let mut ours = Command::new(&program);
            ours.arg("run");
            let mut peer = Command::new(python());
            peer.arg(PEER);
            let mut programs = [ours, peer];
            for (command, output) in programs.iter_mut().zip(&outputs) {
                command.args([model, dtype]).arg(at(&format!("{model}-{dtype}")));
                command.arg(at(&format!("{model}-inputs"))).arg(output);
            }
            let mut figures: [Vec<Figure>; 2] = Default::default();
            let mut error = f64::NAN;
            for _ in 0..rounds {
                for (command, figures) in programs.iter_mut().zip(&mut figures) {
                    figures.push(measured(command)?);
                }
                let [ours, theirs] = [values(&outputs[0])?, values(&outputs[1])?];
                error = apart(&ours, exact.get_or_insert_with(|| theirs.clone()))?;
                eprintln!(
                    "{model} {dtype}: {error:.1e}; diffusers {:.1e}",
                    apart(&theirs, exact.as_ref().context("is there")?)?
                );
                ensure!(
                    error <= tolerance,
                    "{what}: the programs differ by {error:e}, {tolerance:e} is allowed"
                );
            }
            let [ours, theirs] = figures.each_ref().map(|figures| sorted(figures, |figure| figure.seconds));
            let [mib, peer_mib] =
                figures.each_ref().map(|figures| sorted(figures, |figure| figure.mib)[rounds / 2]);
            let ratio = ours[rounds / 2] / theirs[rounds / 2];
            let [ours, theirs] = [told(&ours), told(&theirs)];
            println!(
                "| {what} | {dtype} | {ours} | {theirs} | {ratio:.2} | {mib:.0} | {peer_mib:.0} | {error:.1e} |"
            );
        }
    }
    Ok(())
}

/// The median, the least and the greatest.
fn told(sorted: &[f64]) -> String {
    let (median, least, greatest) = (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]);
    format!("{median:.2} ({least:.2}-{greatest:.2})")
}

fn values(file: &Path) -> Result<Vec<f32>> {
    let (_, data) = read_tensors(file)?.pop_first().context("a file without tensors")?;
    Ok(data.iter::<f32>().collect())
}

/// How far `found` is from `expected`.
fn apart(found: &[f32], expected: &[f32]) -> Result<f64> {
    ensure!(found.len() == expected.len(), "{} numbers for {}", found.len(), expected.len());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let apart: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    Ok((apart / expected.iter().map(|&value| square(value)).sum::<f64>()).sqrt())
}

/// Random weights of both models in both dtypes, and what goes into them.
fn write(folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(1);
    let config =
        json!({ "_class_name": "UNet2DConditionModel", "cross_attention_dim": 768, "sample_size": 64 });
    let unet = unet::V1.init(&device);
    ensure!(unet.num_params() == 859_520_964, "{} parameters", unet.num_params());
    write_model(folder, "unet", &unet, &unet::KEYS, &config)?;
    drop(unet);
    let blocks = |block| vec![block; 4];
    let config = json!({
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": blocks("DownEncoderBlock2D"),
        "up_block_types": blocks("UpDecoderBlock2D"),
        "layers_per_block": 2,
        "sample_size": 512,
    });
    write_model(folder, "vae", &autoencoder::F8.init(&device), &autoencoder::KEYS, &config)?;

    let inputs = [
        ("sample".to_owned(), noise([1, 4, 64, 64], &device)),
        ("timestep".to_owned(), TensorData::from([421.0_f32])),
        ("encoder_hidden_states".to_owned(), noise([1, 77, 768], &device)),
    ];
    save_tensors(&folder.join("unet-inputs"), &inputs)?;
    Ok(save_tensors(&folder.join("vae-inputs"), &[("latents".to_owned(), noise([1, 4, 64, 64], &device))])?)
}

fn noise<const D: usize>(shape: [usize; D], device: &Device) -> TensorData {
    Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), device).into_data()
}

fn write_model<M: Module>(
    folder: &Path,
    name: &str,
    model: &M,
    keys: &KeyMap,
    config: &serde_json::Value,
) -> Result<()> {
    for (dtype, float, _) in DTYPES {
        let folder = folder.join(format!("{name}-{dtype}"));
        fs::create_dir(&folder)?;
        fs::write(folder.join("config.json"), config.to_string())?;
        save(model, keys, Some(float), &folder.join(WEIGHTS), None)?;
    }
    Ok(())
}

/// Loads, runs once and writes the output, runs once more and prints seconds and MiB.
fn child(dtype: &str, folder: &Path, inputs: &Path, output: &Path) -> Result<()> {
    let (folder, device) = (Folder::Disk(folder.to_owned()), Device::flex());
    let dtype = DTYPES.iter().find(|(name, ..)| *name == dtype).map(|(_, float, _)| *float);
    let options = LoadOptions { dtype, ..LoadOptions::default() };
    let system = System::of(&folder)?;
    let model = (system.open)(&folder, &options, &device)?;
    let inputs = read_tensors(inputs)?;
    let run = || model.forward(Inputs::new(system.name, &inputs, &device));
    save_tensors(output, &run()?)?;
    let start = Instant::now();
    run()?;
    println!("{} {}", start.elapsed().as_secs_f64(), peak_mib()?);
    Ok(())
}
