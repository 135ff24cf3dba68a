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
//! `VOLARY_CANDLE` names the program of `benches/peers/candle`, where it was built. All have the same random weights and
//! tokens, and must agree before anything is timed.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::Param;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use volary_kernels::layers::{Linear, Mlp};
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::{ExpertLinear, ExpertMlp, Experts, Gate, Moe, MoeConfig, Noise, Phase};
use volary_kernels::ops::Activation;

#[path = "../../benches/peers/program.rs"]
mod program;

use program::{Program, Work, agree, in_turns, told};

const TOKENS: usize = 2048;
const D_MODEL: usize = 512;
const D_FF: usize = 2048;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;
const MORE_EXPERTS: [usize; 6] = [8, 16, 32, 64, 128, 256];
const TOLERANCE: f32 = 1e-5;
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/peers/moe.py");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", values] => child(Path::new(values)),
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
    let values = folder.join("moe.f32");
    program::write(&values, &random())?;
    for threads in threads {
        println!(
            "\n{threads} threads\n\n| what | program | seconds | CPU seconds | of volary's layer |\n| --- | --- | --- | --- | --- |"
        );
        let mut programs =
            vec![start(Command::new(std::env::current_exe()?).arg("child"), &values, *threads)?];
        let mut names = vec!["volary"];
        let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
        programs.push(start(Command::new(python).arg(PEER), &values, *threads)?);
        names.push("PyTorch");
        if let Some(candle) = std::env::var_os("VOLARY_CANDLE") {
            programs.push(start(&mut Command::new(candle), &values, *threads)?);
            names.push("candle");
        }
        for what in ["layer", "dense"] {
            let found = programs.iter_mut().map(|program| {
                let file = folder.join("moe.out");
                program.ask(&format!("write {what} {}", file.display()))?;
                program::read(&file)
            });
            let found: Vec<Vec<f32>> = found.collect::<Result<_>>()?;
            found[1..].iter().try_for_each(|theirs| agree(&found[0], theirs, TOLERANCE))?;
        }
        let mut works = Vec::new();
        for what in ["layer", "dense"] {
            works.extend((0..programs.len()).map(|program| (program, what.to_owned(), 1)));
        }
        works.extend([0, 1].map(|program| (program, "tokens".to_owned(), 1)));
        works.extend(MORE_EXPERTS.map(|experts| (0, format!("experts-{experts}"), 1)));
        let asked = works.iter().map(|(program, what, times)| Work {
            program: *program,
            question: format!("time {what} {times}"),
            times: *times,
        });
        let figures = in_turns(&mut programs, &asked.collect::<Vec<_>>(), rounds)?;
        for ((program, what, _), found) in works.iter().zip(&figures) {
            let ratio = found.median() / figures[0].median();
            let (wall, cpu) = (told(&found.wall), told(&found.cpu));
            println!("| {what} | {} | {wall} | {cpu} | {ratio:.2} |", names[*program]);
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

fn start(command: &mut Command, values: &Path, threads: usize) -> Result<Program> {
    let threads = threads.to_string();
    Program::start(command.arg(values).env("RAYON_NUM_THREADS", &threads).env("OMP_NUM_THREADS", &threads))
}

/// The shapes of tokens, router, experts and the MLP, in the order of the file.
fn shapes() -> [Vec<usize>; 10] {
    let wide = TOP_K * D_FF;
    [
        vec![TOKENS, D_MODEL],
        vec![EXPERTS, D_MODEL],
        vec![EXPERTS, D_MODEL, D_FF],
        vec![EXPERTS, D_FF],
        vec![EXPERTS, D_FF, D_MODEL],
        vec![EXPERTS, D_MODEL],
        vec![wide, D_MODEL],
        vec![wide],
        vec![D_MODEL, wide],
        vec![D_MODEL],
    ]
}

/// Normal tokens; weights uniform in `±1/√d_in`, about.
fn random() -> Vec<f32> {
    let device = Device::flex();
    device.seed(1);
    let values = |shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        let (tokens, bound) = (shape[0] == TOKENS, 1.0 / (D_MODEL as f64).sqrt());
        let uniform = Distribution::Uniform(-bound, bound);
        let distribution = if tokens { Distribution::Normal(0.0, 1.0) } else { uniform };
        Tensor::<1>::random([count], distribution, &device).into_data().iter::<f32>().collect::<Vec<_>>()
    };
    shapes().into_iter().flat_map(values).collect()
}

fn layer(n_experts: usize, device: &Device) -> Moe {
    let gate = Gate::Naive(NaiveGate::new(D_MODEL, n_experts, TOP_K, device));
    MoeConfig::new(n_experts, D_MODEL, D_FF).init(gate, Activation::Gelu, device)
}

fn forward(layer: &Moe, x: Tensor<2>) -> Tensor<2> {
    layer.forward(x, Phase::Eval, &mut Noise::Seeded(0)).0
}

/// Answers `write WHAT FILE` and `time WHAT TIMES`, line by line, until there is no more.
fn child(values: &Path) -> Result<()> {
    let device = Device::flex();
    let values = program::read(values)?;
    let mut left = &values[..];
    let mut parts = shapes().into_iter().map(|shape| {
        let (part, rest) = left.split_at(shape.iter().product());
        left = rest;
        TensorData::new(part.to_vec(), shape)
    });
    let mut next = || parts.next().context("the file is too short");
    let two = |data| Param::from_tensor(Tensor::<2>::from_data(data, &device));
    let three = |data| Param::from_tensor(Tensor::<3>::from_data(data, &device));
    let one = |data| Some(Param::from_tensor(Tensor::<1>::from_data(data, &device)));
    let x = Tensor::<2>::from_data(next()?, &device);
    let gate = NaiveGate { gate: Linear { weight: two(next()?), bias: None }, top_k: TOP_K };
    let up = ExpertLinear { weight: three(next()?), bias: Some(two(next()?)) };
    let down = ExpertLinear { weight: three(next()?), bias: Some(two(next()?)) };
    let mut eight = layer(EXPERTS, &device);
    eight.gate = Gate::Naive(gate);
    eight.experts = Experts::Plain(ExpertMlp { up, down });
    let dense = Mlp {
        up: Linear { weight: two(next()?), bias: one(next()?) },
        down: Linear { weight: two(next()?), bias: one(next()?) },
    };
    let mut more: Option<(usize, Moe)> = None;
    println!("volary, {} threads", rayon::current_num_threads());
    for line in std::io::stdin().lines() {
        let line = line?;
        let [what, work, rest] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            bail!("`{line}` is not three words")
        };
        let run: Box<dyn Fn() -> Tensor<2>> = match work.strip_prefix("experts-") {
            Some(experts) => {
                let experts = experts.parse()?;
                if more.as_ref().is_none_or(|(held, _)| *held != experts) {
                    drop(more.take());
                    let layer = layer(experts, &device);
                    forward(&layer, x.clone()); // weights are drawn when they are first used
                    more = Some((experts, layer));
                }
                let layer = &more.as_ref().context("it was just made")?.1;
                Box::new(|| forward(layer, x.clone()))
            }
            None if work == "layer" => Box::new(|| forward(&eight, x.clone())),
            None if work == "dense" => Box::new(|| dense.forward(x.clone(), Activation::Gelu)),
            None if work == "tokens" => Box::new(|| {
                let each = (0..TOKENS).map(|token| forward(&eight, x.clone().narrow(0, token, 1)));
                each.fold(x.clone(), |_, y| y)
            }),
            None => bail!("`{work}` is no work"),
        };
        match what {
            "write" => {
                program::write(Path::new(rest), &run().into_data().iter::<f32>().collect::<Vec<_>>())?;
                println!("written");
            }
            "time" => {
                let start = Instant::now();
                for _ in 0..rest.parse()? {
                    std::hint::black_box(run());
                }
                println!("{}", start.elapsed().as_secs_f64());
            }
            _ => bail!("`{what}` is neither `write` nor `time`"),
        }
    }
    Ok(())
}
