//! Time and memory of loading a checkpoint of 2 GB, beside Python's safetensors and torch, in turns.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench --bench load
//! ```
//!
//! Writes CLIP ViT-H/14 with random weights in f16 to a temporary folder, as one safetensors file and, with torch, as a
//! sharded `pytorch_model.bin`. Every load is a process of its own; the files are in the system's cache. Times are from
//! before the file is opened until the values have been read as far as the row says; memory is the peak of the resident
//! set.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, FloatDType, Tensor, s};
use volary::bench::peak_memory;
use volary::clip::{ClipConfig, Layout};
use volary::preset::Shape;
use volary::registry::SYSTEMS;
use volary_weights::{LoadOptions, NotFinite, load, open, save};

mod support;
use support::{measured, python, run, sorted};

const MODEL: &str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K";
/// How far the values are read, for the programs and for the table.
const READ: [(&str, &str); 3] =
    [("none", "not read"), ("pages", "one of every page"), ("all", "all checked")];
/// Bytes of a page.
const PAGE: usize = 4096;
/// Runs of each program, in turns.
const RUNS: usize = 5;
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/load.py");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", path, dtype, read] => child(Path::new(path), dtype, read),
        ["write", path] => write(Path::new(path)),
        _ => parent(),
    }
}

/// The rows of the table: what is loaded, and into what.
fn parent() -> Result<()> {
    let python = python();
    let folder = tempfile::tempdir()?;
    let whole = folder.path().join("model.safetensors");
    // A process of its own as well: the memory of writing must not be seen in what follows.
    let program = std::env::current_exe()?;
    run(Command::new(&program).arg("write").arg(&whole))?;
    let shards = folder.path().join("shards");
    fs::create_dir(&shards)?;
    let has_torch = run(Command::new(&python).arg(PEER).arg("shard").arg(&whole).arg(&shards)).is_ok();
    if !has_torch {
        eprintln!("{python} has no torch and safetensors: only our own figures are measured");
    }
    println!("| checkpoint | into | values | program | seconds | peak MiB |\n|{}", " --- |".repeat(6));
    let size = fs::metadata(&whole)?.len() as f64 / 1e9;
    for (path, what) in [(&whole, "one safetensors file"), (&shards, "sharded .bin")] {
        if path == &shards && !has_torch {
            continue;
        }
        for (dtype, (read, values)) in
            ["f16", "f32"].into_iter().flat_map(|dtype| READ.map(|read| (dtype, read)))
        {
            if dtype == "f32" && read == "pages" {
                continue; // every page is read by the conversion
            }
            let mut programs =
                vec![("volary", arguments(Command::new(&program), "child", path, dtype, read))];
            if has_torch {
                let mut peer = Command::new(&python);
                peer.arg(PEER);
                programs.push(("Python", arguments(peer, "load", path, dtype, read)));
            }
            let mut figures = vec![Vec::new(); programs.len()];
            for _ in 0..RUNS {
                for ((_, command), figures) in programs.iter_mut().zip(&mut figures) {
                    figures.push(measured(command)?);
                }
            }
            for ((name, _), figures) in programs.iter().zip(figures) {
                let seconds = sorted(&figures, |figure| figure.seconds)[RUNS / 2];
                let memory = sorted(&figures, |figure| figure.mib)[RUNS / 2];
                println!(
                    "| {size:.2} GB, {what} | {dtype} | {values} | {name} | {seconds:.3} | {memory:.0} |"
                );
            }
        }
    }
    Ok(())
}

fn arguments(mut program: Command, what: &str, path: &Path, dtype: &str, read: &str) -> Command {
    program.arg(what).arg(path).args([dtype, read]);
    program
}

fn config() -> Result<&'static ClipConfig> {
    let presets = SYSTEMS.iter().flat_map(|system| system.presets);
    match presets.filter(|preset| preset.name == MODEL).map(|preset| &preset.shape).next() {
        Some(Shape::Clip(config)) => Ok(config),
        _ => bail!("{MODEL} is not a CLIP among the presets"),
    }
}

fn write(path: &Path) -> Result<()> {
    let config = config()?;
    let keys = Layout::Transformers.keys(&config.vision);
    Ok(save(&config.init(&Device::flex()), keys, Some(FloatDType::F16), path, None)?)
}

/// Loads, reads, and prints seconds and MiB.
fn child(path: &Path, dtype: &str, read: &str) -> Result<()> {
    let dtype = if dtype == "f16" { FloatDType::F16 } else { FloatDType::F32 };
    let config = config()?;
    let not_finite = if read == "all" { NotFinite::Refuse } else { NotFinite::Allow };
    let options = LoadOptions { dtype: Some(dtype), not_finite, ..LoadOptions::default() };
    let start = Instant::now();
    let checkpoint = open(path)?;
    let keys = Layout::Transformers.keys(&config.vision);
    let model = load(config.init(&Device::flex()), checkpoint.as_ref(), keys, &options)?;
    if read == "pages" {
        model.visit(&mut Pages);
    }
    let seconds = start.elapsed().as_secs_f64();
    println!("{seconds} {}", peak_memory().context("only Linux tells")?);
    drop(model);
    Ok(())
}

/// Reads one value of every page, in the order in which they are stored.
struct Pages;

impl ModuleVisitor for Pages {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.transform_for_save().val();
        let step = (PAGE / tensor.dtype().size()) as isize;
        std::hint::black_box(tensor.flatten::<1>(0, D - 1).slice(s![..;step]).sum().into_data());
    }
}
