//! A mixture of experts of 2,048 tokens, 512 wide, 8 experts 2,048 wide of which each token goes to two, f32: beside
//! PyTorch, one expert after the other; beside candle, the same; beside an MLP of as many products; and beside every token
//! through the layer alone. And as experts get more while tokens stay as many.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench -p volary-kernels --bench moe -- [rounds] [threads]
//! ```
//!
//! `plot FILE SECONDS...` draws the seconds of the table's `experts-` rows as an SVG.
//!
//! `VOLARY_CANDLE` names the program of `benches/peers/candle`; without it, cargo builds it. All have the same random weights and
//! tokens, and must agree before anything is timed.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{DType, Device};
use volary_kernels::moe::Moe;
use volary_kernels::ops::Activation;

#[path = "../../benches/peers/program.rs"]
#[allow(dead_code)] // it does not look at memory
mod program;
#[path = "../../benches/peers/sparse.rs"]
mod sparse;

use program::{Program, Work, apart, in_turns, timed, told};
use sparse::{Sparse, TOKENS, TOP_K, forward};

const NAMES: [&str; 3] = ["volary", "PyTorch", "candle"];
const MORE_EXPERTS: [usize; 6] = [8, 16, 32, 64, 128, 256];
const TOLERANCE: f64 = 1e-5;
const PEERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/peers");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", folder] => child(Path::new(folder)),
        [] => compare(5, &[1, 2]),
        [rounds] => compare(rounds.parse()?, &[1, 2]),
        [rounds, threads] => compare(rounds.parse()?, &[threads.parse()?]),
        ["plot", file, ref seconds @ ..] => {
            let seconds: Result<Vec<f64>, _> = seconds.iter().map(|seconds| seconds.parse()).collect();
            Ok(std::fs::write(file, plot(&seconds?))?)
        }
        _ => bail!("expected at most: ROUNDS THREADS, or: plot FILE SECONDS..."),
    }
}

/// Prints the tables.
fn compare(rounds: usize, threads: &[usize]) -> Result<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    sparse::write(folder)?;
    let candle = program::candle(Path::new(PEERS));
    for &threads in threads {
        println!(
            "\n{threads} threads\n\n| what | program | seconds | CPU seconds | of volary's layer |\n| --- | --- | --- | --- | --- |"
        );
        let ours = Program::start(Command::new(std::env::current_exe()?).arg("child").arg(folder), threads)?;
        let mut pytorch = program::pytorch(Path::new(PEERS));
        let pytorch = Program::start(pytorch.args(["moe", "f32"]).arg(folder), threads)?;
        let mut programs = vec![ours, pytorch];
        if let Some(candle) = &candle {
            programs.push(Program::start(Command::new(candle).arg("moe").arg(folder), threads)?);
        }
        for what in ["layer", "dense"] {
            let found = programs.iter_mut().map(|program| program.values(what, folder));
            let found: Vec<Vec<f32>> = found.collect::<Result<_>>()?;
            for (theirs, name) in found.iter().zip(NAMES).skip(1) {
                let apart = apart(&found[0], theirs)?;
                eprintln!("{what}: {name} differs by {apart:.1e}");
                ensure!(apart <= TOLERANCE, "{TOLERANCE:e} is allowed");
            }
        }
        let mut works = Vec::new();
        for what in ["layer", "dense"] {
            works.extend((0..programs.len()).map(|program| (program, what.to_owned())));
        }
        works.extend([0, 1].map(|program| (program, "tokens".to_owned())));
        works.extend(MORE_EXPERTS.map(|experts| (0, format!("experts-{experts}"))));
        let works = works.into_iter().map(|(program, work)| Work { program, work, times: 1 });
        let works: Vec<Work> = works.collect();
        in_turns(&mut programs, &works, 1)?; // the first time takes longer
        let figures = in_turns(&mut programs, &works, rounds)?;
        for (Work { program, work, .. }, found) in works.iter().zip(&figures) {
            let ratio = found.median() / figures[0].median();
            let (wall, cpu) = (told(&found.wall), told(&found.cpu));
            println!("| {work} | {} | {wall} | {cpu} | {ratio:.2} |", NAMES[*program]);
        }
    }
    Ok(())
}

/// A curve of the seconds of 8, 16, ... experts.
fn plot(seconds: &[f64]) -> String {
    use std::fmt::Write;

    let (width, height, margin) = (640.0, 360.0, 56.0);
    let most = seconds.iter().copied().fold(0.05, f64::max);
    let place = |at: usize, seconds: f64| {
        let x = margin + (width - 2.0 * margin) * at as f64 / (MORE_EXPERTS.len() - 1) as f64;
        (x, height - margin - (height - 2.0 * margin) * seconds / most)
    };
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">
<rect width="{width}" height="{height}" fill="#fff"/>
<text x="{margin}" y="28">Seconds of a sparse layer by its number of experts: {TOKENS} tokens, top {TOP_K}</text>
<path d="M{margin} {margin}V{0}H{1}" fill="none" stroke="#888"/>
"##,
        height - margin,
        width - margin
    );
    let mut points = String::new();
    for (at, (&seconds, experts)) in seconds.iter().zip(MORE_EXPERTS).enumerate() {
        let (x, y) = place(at, seconds);
        let below = height - margin + 20.0;
        let _ = write!(points, "{x:.1},{y:.1} "); // a string takes all
        let _ = writeln!(
            svg,
            r##"<circle cx="{x:.1}" cy="{y:.1}" r="3" fill="#0a5"/><text x="{x:.1}" y="{:.1}" text-anchor="middle">{seconds:.3}</text><text x="{x:.1}" y="{below}" text-anchor="middle">{experts}</text>"##,
            y - 10.0
        );
    }
    let line = points.trim_end();
    let _ = writeln!(svg, r##"<polyline points="{line}" fill="none" stroke="#0a5" stroke-width="2"/>"##);
    svg + "</svg>\n"
}

/// Does what it is asked to: the layer, the MLP, every token through the layer alone, layers of more experts.
fn child(folder: &Path) -> Result<()> {
    let device = Device::flex();
    let Sparse { x, layer, dense } = Sparse::read(folder, DType::F32, &device)?;
    let mut more: Option<(usize, Moe)> = None;
    program::serve(|work| {
        if let Some(experts) = work.strip_prefix("experts-") {
            let experts = experts.parse()?;
            if more.as_ref().is_none_or(|(held, _)| *held != experts) {
                drop(more.take());
                let layer = sparse::untrained(experts, &device);
                forward(&layer, x.clone()); // weights are drawn when they are first used
                more = Some((experts, layer));
            }
            let layer = &more.as_ref().context("it was just made")?.1;
            return Ok(timed(|| forward(layer, x.clone())));
        }
        Ok(match work {
            "layer" => timed(|| forward(&layer, x.clone())),
            "dense" => timed(|| dense.forward(x.clone(), Activation::Gelu)),
            "tokens" => timed(|| {
                let each = (0..TOKENS).map(|token| forward(&layer, x.clone().narrow(0, token, 1)));
                each.fold(x.clone(), |_, y| y)
            }),
            _ => bail!("`{work}` is no work"),
        })
    })
}
