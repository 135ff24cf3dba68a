//! Image towers beside PyTorch, in turns: ViT-B/32 as CLIP has it and EVA02-B/16, f32, batches of 1, 8 and 32.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench --bench towers -- [rounds] [largest batch]
//! ```
//!
//! Writes random weights and pixels once to a temporary folder, where both programs read them; what they make of two
//! pictures is compared before anything is timed. Each program is a process that waits while the other one computes. Every
//! figure is the median of some rounds (5; 3 of the largest batches), the least and the greatest beside it. Where PyTorch's
//! threads wait for each other they spin, so that its walls with two threads are noisy: one thread is measured as well, and
//! the CPU time of the whole process.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Device, Distribution, Tensor};
use volary::clip::{ClipConfig, Layout};
use volary::eva_clip::{self, EvaClipConfig};
use volary::preset::Shape;
use volary::registry::SYSTEMS;
use volary_weights::{LoadOptions, load, open, read_tensors, save, save_tensors};

#[path = "peers/program.rs"]
mod program;

use program::{Program, Work, in_turns, told};

/// What the table calls it, our preset, and open_clip's name.
const TOWERS: [(&str, &str, &str); 2] = [
    ("ViT-B/32", "openai/clip-vit-base-patch32", "ViT-B-32-quickgelu"),
    ("EVA02-B/16", "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k", "EVA02-B-16"),
];
const BATCHES: [usize; 3] = [1, 8, 32];
const THREADS: [usize; 2] = [1, 2];
/// Pictures that one measurement encodes at least: small batches are run several times.
const PICTURES: usize = 8;
/// From this batch on there are fewer rounds.
const LARGE: usize = 32;
const IMAGE_SIZE: usize = 224;
/// How far two programs may be apart, as a share of the greatest number.
const TOLERANCE: f32 = 1e-4;
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/towers.py");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", preset, weights, pixels] => child(preset, Path::new(weights), Path::new(pixels)),
        [] => compare(5, LARGE),
        [rounds] => compare(rounds.parse()?, LARGE),
        [rounds, largest] => compare(rounds.parse()?, largest.parse()?),
        _ => bail!("expected at most: ROUNDS LARGEST_BATCH"),
    }
}

/// Prints the table.
fn compare(rounds: usize, largest: usize) -> Result<()> {
    ensure!(rounds > 0 && largest > 0, "there is nothing to measure");
    let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
    println!("| tower | threads | batch | volary s | PyTorch s | ratio | volary CPU s | PyTorch CPU s |");
    println!("|{}", " --- |".repeat(8));
    for (tower, preset, open_clip) in TOWERS {
        let folder = tempfile::tempdir()?;
        let [weights, pixels] =
            ["model", "pixels"].map(|name| folder.path().join(format!("{name}.safetensors")));
        write(preset, &weights, &pixels)?;
        for threads in THREADS {
            let mut volary = Command::new(std::env::current_exe()?);
            volary.args(["child", preset]).env("RAYON_NUM_THREADS", threads.to_string());
            let mut peer = Command::new(&python);
            peer.args([PEER, open_clip, &threads.to_string()]);
            let start = |command: &mut Command| Program::start(command.arg(&weights).arg(&pixels));
            let mut programs = [start(&mut volary)?, start(&mut peer)?];
            agree(&mut programs, folder.path())?;
            for batch in BATCHES.into_iter().filter(|&batch| batch <= largest) {
                let rounds = if batch >= LARGE { rounds.min(3) } else { rounds };
                let times = (PICTURES / batch).max(1);
                let work = |program| Work { program, question: format!("time {batch} {times}"), times };
                let figures = in_turns(&mut programs, &[work(0), work(1)], rounds)?;
                let [ours, theirs] = [&figures[0], &figures[1]];
                let ratio = ours.median() / theirs.median();
                let [wall, peer] = [ours, theirs].map(|figures| told(&figures.wall));
                let [cpu, peer_cpu] = [ours, theirs].map(|figures| told(&figures.cpu));
                println!(
                    "| {tower} | {threads} | {batch} | {wall} | {peer} | {ratio:.2} | {cpu} | {peer_cpu} |"
                );
            }
        }
    }
    Ok(())
}

/// Random weights under open_clip's names, and as many pictures as the largest batch has.
fn write(preset: &str, weights: &Path, pixels: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(1);
    match shape(preset)? {
        Wanted::Clip(config) => {
            save(&config.init(&device), Layout::OpenClip.keys(&config.vision), None, weights, None)?;
        }
        Wanted::Eva(config) => {
            save(&config.init(&device), config.keys(eva_clip::Layout::OpenClip), None, weights, None)?
        }
    }
    let shape = [LARGE, 3, IMAGE_SIZE, IMAGE_SIZE];
    let data = Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &device).into_data();
    Ok(save_tensors(pixels, &[("pixels".to_owned(), data)])?)
}

enum Wanted {
    Clip(&'static ClipConfig),
    Eva(&'static EvaClipConfig),
}

fn shape(name: &str) -> Result<Wanted> {
    let presets = SYSTEMS.iter().flat_map(|system| system.presets);
    match presets.filter(|preset| preset.name == name).map(|preset| &preset.shape).next() {
        Some(Shape::Clip(config)) => Ok(Wanted::Clip(config)),
        Some(Shape::EvaClip(config)) => Ok(Wanted::Eva(config)),
        _ => bail!("{name} is neither a CLIP nor an EVA-CLIP among the presets"),
    }
}

/// That both make the same of two pictures.
fn agree(programs: &mut [Program; 2], folder: &Path) -> Result<()> {
    let mut found = Vec::new();
    for (number, program) in programs.iter_mut().enumerate() {
        let file = folder.join(format!("features-{number}.safetensors"));
        program.ask(&format!("write 2 {}", file.display()))?;
        let features = read_tensors(&file)?.remove("features").context("no tensor `features`")?;
        found.push(features);
    }
    ensure!(found[0].shape() == found[1].shape(), "{:?} and {:?}", found[0].shape(), found[1].shape());
    let [ours, theirs] = [0, 1].map(|at| found[at].iter::<f32>().collect::<Vec<_>>());
    program::agree(&ours, &theirs, TOLERANCE)
}

/// `[batch, 3, 224, 224] -> [batch, 512]`, not normalised.
type Tower = Box<dyn Fn(Tensor<4>) -> Tensor<2>>;

/// Answers `write BATCH FILE` and `time BATCH TIMES`, line by line, until there is no more.
fn child(preset: &str, weights: &Path, pixels: &Path) -> Result<()> {
    let (device, options, checkpoint) = (Device::flex(), LoadOptions::default(), open(weights)?);
    let tower: Tower = match shape(preset)? {
        Wanted::Clip(config) => {
            let keys = Layout::OpenClip.keys(&config.vision);
            let tower = load(config.init(&device), checkpoint.as_ref(), keys, &options)?.vision;
            Box::new(move |pixels| tower.forward(pixels).embedding)
        }
        Wanted::Eva(config) => {
            let tower = load(
                config.init(&device),
                checkpoint.as_ref(),
                config.keys(eva_clip::Layout::OpenClip),
                &options,
            )?
            .vision;
            Box::new(move |pixels| tower.pool(tower.forward(pixels)).output)
        }
    };
    let features = |pixels| tower(pixels).into_data();
    let pixels = read_tensors(pixels)?.remove("pixels").context("no tensor `pixels`")?;
    let pixels = Tensor::<4>::from_data(pixels, &device);
    println!("volary, {} threads", rayon::current_num_threads());
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[what, batch, rest] = &words[..] else { bail!("`{line}` is not three words") };
        let batch = pixels.clone().narrow(0, 0, batch.parse()?);
        match what {
            "write" => {
                save_tensors(Path::new(rest), &[("features".to_owned(), features(batch))])?;
                println!("written");
            }
            "time" => {
                let start = Instant::now();
                for _ in 0..rest.parse()? {
                    std::hint::black_box(features(batch.clone()));
                }
                println!("{}", start.elapsed().as_secs_f64());
            }
            _ => bail!("`{what}` is neither `write` nor `time`"),
        }
    }
    Ok(())
}
