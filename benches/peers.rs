//! The same work in Volary, PyTorch (eager) and candle, in turns: CLIP, EVA-CLIP, a LLaMA of half a billion parameters, Stable
//! Diffusion, and a sparse layer.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench --bench peers -- [ROW...] [--rounds 5] [--threads 2] [--dtype f32|bf16]
//!     [--models FOLDER] [--chart FILE]
//! cargo bench --bench peers -- draw TABLE CHART     # the chart of a table that was printed
//! ```
//!
//! A row is `clip`, `clip/image-8` and so on, as the first column of the table names them; without any, all are run. Models
//! with random weights are written once, in their public layouts, to a temporary folder or the one that is named (9.5 GB
//! are needed), where all programs read them. candle's program is the one that `VOLARY_CANDLE` names, or cargo builds it.
//!
//! Each program is a process of its own for each row, which waits while another one computes. First all do the work once, and
//! what comes out is compared with PyTorch's in f32: the root of the mean square of the difference, as a share of that of the
//! answer. Then it is timed: medians, the least and the greatest beside them. Memory is the peak of the resident set, loading
//! and mapped files included.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;

#[path = "peers/chart.rs"]
mod chart;
#[path = "peers/ours.rs"]
mod ours;
#[path = "peers/program.rs"]
mod program;
#[path = "peers/sparse.rs"]
mod sparse;

use chart::Bar;
use program::{Figures, Program, Work, apart, in_turns, told};

struct Row {
    model: &'static str,
    work: &'static str,
    what: &'static str,
    /// How many times it is done in one measurement.
    times: usize,
    in_candle: bool,
}

impl Row {
    const fn new(model: &'static str, work: &'static str, what: &'static str, times: usize) -> Self {
        Self { model, work, what, times, in_candle: true }
    }

    fn name(&self) -> String {
        format!("{}/{}", self.model, self.work)
    }
}

const ROWS: [Row; 10] = [
    Row::new("clip", "image-1", "CLIP ViT-B/32, 1 picture", 8),
    Row::new("clip", "image-8", "CLIP ViT-B/32, 8 pictures", 2),
    Row::new("clip", "image-32", "CLIP ViT-B/32, 32 pictures", 1),
    Row::new("clip", "text-8", "CLIP ViT-B/32, 8 texts", 2),
    Row { in_candle: false, ..Row::new("eva", "image-8", "EVA02-B/16, 8 pictures", 1) },
    Row::new("llama", "prefill", "LLaMA 0.53 B, prompt of 128", 1),
    Row::new("llama", "decode", "LLaMA 0.53 B, 64 tokens", 1),
    Row::new("unet", "step", "SD 1 U-Net, one step", 1),
    // candle's does not end within 100 s
    Row { in_candle: false, ..Row::new("vae", "decode", "SD 1, decoding 512 x 512", 1) },
    Row::new("moe", "layer", "sparse layer, 2,048 tokens", 8),
];

/// How far a program may be from PyTorch's f32.
fn tolerance(dtype: &str) -> f64 {
    if dtype == "f32" { 1e-4 } else { 6e-2 }
}

const PEERS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers");
const CHART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers.svg");

#[derive(Parser)]
struct Arguments {
    /// As the table names them; all of a model, by its name.
    rows: Vec<String>,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Only this one.
    #[arg(long)]
    dtype: Option<String>,
    /// Where models are, or are written to.
    #[arg(long)]
    models: Option<PathBuf>,
    #[arg(long, default_value = CHART)]
    chart: PathBuf,
    /// cargo says it.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", model, dtype, folder] => ours::child(model, dtype, Path::new(folder)),
        ["write", model, folder] => ours::write(model, Path::new(folder)),
        ["draw", table, chart] => draw(&fs::read_to_string(table)?, Path::new(chart)),
        _ => compare(&Arguments::parse()),
    }
}

/// Prints the table, and draws it.
fn compare(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "there is nothing to measure");
    let is_asked = |row: &&Row| {
        let asked = |asked: &String| *asked == row.model || *asked == row.name();
        arguments.rows.is_empty() || arguments.rows.iter().any(asked)
    };
    let rows: Vec<&Row> = ROWS.iter().filter(is_asked).collect();
    ensure!(!rows.is_empty(), "no row is called so: {}", ROWS.map(|row| row.name()).join(", "));
    let temporary = tempfile::tempdir()?;
    let folder = arguments.models.as_deref().unwrap_or(temporary.path());
    let candle = program::candle(Path::new(PEERS));
    let bench = Bench { arguments, folder, candle, volary: std::env::current_exe()? };
    let head = "| row | what | dtype | volary s | PyTorch s | candle s | of PyTorch | of candle | peak MiB | error |";
    println!("{head}\n|{}", " --- |".repeat(10));
    let mut table = String::new();
    for row in rows {
        let inputs = ours::inputs(row.model, folder);
        if !inputs.exists() {
            // in a process of its own: this one stays small
            let status = Command::new(&bench.volary).args(["write", row.model]).arg(folder).status()?;
            ensure!(status.success(), "{} is not written, see above", row.model);
        }
        let mut exact = None;
        for (dtype, _) in ours::DTYPES {
            if arguments.dtype.as_deref().is_none_or(|only| only == dtype) {
                let line = bench.line(row, dtype, &mut exact)?;
                println!("{line}");
                table += &(line + "\n");
            }
        }
    }
    draw(&table, &arguments.chart)
}

struct Bench<'a> {
    arguments: &'a Arguments,
    folder: &'a Path,
    candle: Option<PathBuf>,
    volary: PathBuf,
}

impl Bench<'_> {
    fn pytorch(&self, model: &str, dtype: &str) -> Result<Program> {
        let mut command = program::pytorch(Path::new(PEERS));
        Program::start(command.args([model, dtype]).arg(self.folder), self.arguments.threads)
    }

    /// A line of the table. `exact` is PyTorch's answer in f32, once it is known.
    fn line(&self, row: &Row, dtype: &str, exact: &mut Option<Vec<f32>>) -> Result<String> {
        let Row { model, work, what, times, in_candle } = *row;
        let exact = match exact {
            Some(exact) => exact,
            None => exact.insert(self.pytorch(model, "f32")?.values(work, self.folder)?),
        };
        let threads = self.arguments.threads;
        let mut ours = Command::new(&self.volary);
        let ours = Program::start(ours.args(["child", model, dtype]).arg(self.folder), threads)?;
        let mut programs = vec![ours, self.pytorch(model, dtype)?];
        if let (Some(candle), "f32", true) = (&self.candle, dtype, in_candle) {
            programs.push(Program::start(Command::new(candle).arg(model).arg(self.folder), threads)?);
        }
        let mut errors = Vec::new();
        for program in &mut programs {
            errors.push(apart(&program.values(work, self.folder)?, exact)?);
        }
        let (errors_told, tolerance) = (each(&errors, |error| format!("{error:.1e}")), tolerance(dtype));
        ensure!(
            errors.iter().all(|&error| error <= tolerance),
            "{what}, {dtype}: the programs differ from PyTorch's f32 by {errors_told}, {tolerance:e} is allowed"
        );
        let works: Vec<Work> =
            (0..programs.len()).map(|program| Work { program, work: work.to_owned(), times }).collect();
        let figures = in_turns(&mut programs, &works, self.arguments.rounds)?;
        let peaks: Vec<f64> = programs.iter().map(Program::peak_mib).collect::<Result<_>>()?;
        let absent = match (in_candle && dtype == "f32", &self.candle) {
            (true, None) => "not run",
            _ => "-",
        };
        let of = |other: Option<&Figures>| match other {
            Some(other) => format!("{:.2}", figures[0].median() / other.median()),
            None => absent.to_owned(),
        };
        let wall = |at: usize| figures.get(at).map_or(absent.to_owned(), |figures| told(&figures.wall));
        let (name, to_pytorch, to_candle) = (row.name(), of(figures.get(1)), of(figures.get(2)));
        let peaks = each(&peaks, |mib| format!("{mib:.0}"));
        Ok(format!(
            "| {name} | {what} | {dtype} | {} | {} | {} | {to_pytorch} | {to_candle} | {peaks} | {errors_told} |",
            wall(0),
            wall(1),
            wall(2),
        ))
    }
}

/// One after the other, in the order of the programs.
fn each(values: &[f64], tell: impl Fn(&f64) -> String) -> String {
    values.iter().map(tell).collect::<Vec<_>>().join(" / ")
}

/// Draws the lines of a table; whatever else the text has is left out.
fn draw(table: &str, chart: &Path) -> Result<()> {
    let mut bars: Vec<Bar> = Vec::new();
    for line in table.lines() {
        let cells: Vec<&str> = line.split('|').map(str::trim).collect();
        let ["", name, what, dtype, volary, pytorch, candle, ..] = cells[..] else { continue };
        if !ROWS.iter().any(|row| row.name() == name) {
            continue;
        }
        let median = |cell: &str| cell.split(' ').next().and_then(|median| median.parse::<f64>().ok());
        let at = match bars.iter().position(|bar| bar.what == what) {
            Some(at) => at,
            None => {
                bars.push(Bar { what: what.to_owned(), seconds: Default::default() });
                bars.len() - 1
            }
        };
        let slots: &[usize] = match dtype {
            "f32" => &[0, 1, 2],
            "bf16" => &[3, 4],
            _ => bail!("`{dtype}` is no dtype"),
        };
        for (&slot, cell) in slots.iter().zip([volary, pytorch, candle]) {
            bars[at].seconds[slot] = median(cell);
        }
    }
    fs::write(chart, chart::svg(&bars)).with_context(|| format!("{} is not written", chart.display()))
}
