//! Activations and softmax beside Burn's operations and PyTorch, in turns: f32, as wide as the MLP of a ViT-B has them for
//! eight pictures, and the scores of its attention.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench -p volary-kernels --bench activations -- [rounds]
//! ```

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Device, Distribution, Tensor, activation};
use volary_kernels::ops::{Activation, softmax};

#[path = "../../benches/peers/program.rs"]
#[allow(dead_code)] // it has no candle, and does not look at memory
mod program;

use program::{Done, Program, Work, apart, in_turns, told};

const SHAPE: [usize; 2] = [400, 3072];
const SCORES: [usize; 2] = [8 * 12 * 50, 50];
const TIMES: usize = 20;
const WORKS: [&str; 9] =
    ["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "tanh", "bias_gelu", "gated_silu", "softmax"];
const TOLERANCE: f64 = 1e-6;
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../benches/peers/activations.py");

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", values] => child(Path::new(values)),
        [] => compare(5),
        [rounds] => compare(rounds.parse()?),
        _ => bail!("expected at most: ROUNDS"),
    }
}

/// Prints the table.
fn compare(rounds: usize) -> Result<()> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let values = folder.join("activations.f32");
    let device = Device::flex();
    device.seed(1);
    let random = Tensor::<2>::random(SHAPE, Distribution::Normal(0.0, 2.0), &device);
    program::write(&values, &random.into_data().iter::<f32>().collect::<Vec<_>>())?;
    println!("| what | threads | volary ms | Burn ms | PyTorch ms | of PyTorch |\n|{}", " --- |".repeat(6));
    for threads in [1, 2] {
        let ours = Program::start(Command::new(std::env::current_exe()?).arg("child").arg(&values), threads)?;
        let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
        let mut programs = [ours, Program::start(Command::new(python).arg(PEER).arg(&values), threads)?];
        for what in WORKS {
            let mut of = |program: usize, work: &str| programs[program].values(work, folder);
            let (ours, burn, theirs) = (of(0, what)?, of(0, &format!("burn-{what}"))?, of(1, what)?);
            let errors = [apart(&ours, &burn)?, apart(&ours, &theirs)?];
            let agree = errors.iter().all(|&error| error <= TOLERANCE);
            ensure!(agree, "{what}: Burn and PyTorch differ by {errors:?}, {TOLERANCE:e} is allowed");
            let works = [(0, what.to_owned()), (0, format!("burn-{what}")), (1, what.to_owned())];
            let works = works.map(|(program, work)| Work { program, work, times: TIMES });
            in_turns(&mut programs, &works, 1)?; // the first time takes longer
            let figures = in_turns(&mut programs, &works, rounds)?;
            let ratio = figures[0].median() / figures[2].median();
            let each = figures.iter().map(|figures| {
                let sorted: Vec<f64> = figures.wall.iter().map(|seconds| seconds * 1e3).collect();
                told(&sorted)
            });
            println!("| {what} | {threads} | {} | {ratio:.2} |", each.collect::<Vec<_>>().join(" | "));
        }
    }
    Ok(())
}

fn activation_of(name: &str) -> Option<Activation> {
    Activation::from_name(if name == "gelu_tanh" { "gelu_pytorch_tanh" } else { name })
}

fn burn(name: &str, x: Tensor<2>, other: &Tensor<2>, bias: &Tensor<1>) -> Option<Tensor<2>> {
    Some(match name {
        "gelu" => activation::gelu(x),
        "gelu_tanh" => activation::gelu_approximate(x),
        "quick_gelu" => x.clone() * activation::sigmoid(x * 1.702),
        "silu" => activation::silu(x),
        "relu" => activation::relu(x),
        "tanh" => x.tanh(),
        "bias_gelu" => activation::gelu(x + bias.clone().unsqueeze()),
        "gated_silu" => activation::silu(x) * other.clone(),
        "softmax" => activation::softmax(scores(x), 1),
        _ => return None,
    })
}

fn volary(name: &str, x: Tensor<2>, other: &Tensor<2>, bias: &Tensor<1>) -> Option<Tensor<2>> {
    Some(match name {
        "bias_gelu" => Activation::Gelu.biased(x, Some(bias.clone())),
        "gated_silu" => Activation::Silu.gated(x, other.clone()),
        "softmax" => softmax(scores(x)),
        name => activation_of(name)?.forward(x),
    })
}

/// The first values, as scores.
fn scores(x: Tensor<2>) -> Tensor<2> {
    x.reshape([SHAPE[0] * SHAPE[1]]).narrow(0, 0, SCORES[0] * SCORES[1]).reshape(SCORES)
}

/// Does what it is asked to.
fn child(values: &Path) -> Result<()> {
    let device = Device::flex();
    let values = program::read(values)?;
    let x = Tensor::<1>::from_data(values.as_slice(), &device).reshape(SHAPE);
    let (other, bias) = (x.clone() * 0.5, x.clone().narrow(0, 7, 1).reshape([SHAPE[1]]));
    program::serve(|work| {
        let start = Instant::now();
        let output = match work.strip_prefix("burn-") {
            Some(name) => burn(name, x.clone(), &other, &bias),
            None => volary(work, x.clone(), &other, &bias),
        };
        let seconds = start.elapsed().as_secs_f64();
        let output = output.with_context(|| format!("`{work}` is no work"))?.into_data();
        Ok(Done { seconds, output })
    })
}
