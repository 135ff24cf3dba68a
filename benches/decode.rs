//! Decoding with a LLaMA of half a billion parameters beside PyTorch, in turns: f32, bf16, 8 and 4 bits.
//!
//! ```sh
//! VOLARY_PYTHON=python3 cargo bench --bench decode -- [rounds] [threads]
//! ```
//!
//! Writes random weights once to a temporary folder, as floats and packed, where both programs read them. What they make of
//! a text in f32 is compared before anything is timed. Each row of the table is a process that waits while the others
//! compute; every figure is the median of some rounds (5). A round reads a prompt, which is timed apart, and then decodes
//! one text token by token. The error is that of the next token's distribution against f32, over all places of a text:
//! the mean of the divergence KL(f32 || other), whose exponential is what the perplexity of a text that the f32 model wrote
//! is multiplied by.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, FloatDType, Int, Tensor};
use volary::causal::Head;
use volary::llama::{KEYS, Llama, LlamaCache, LlamaConfig, LlamaInput};
use volary_kernels::ops::{Activation, Mask, Pairing, Positions, Quantization, RopeScaling};
use volary_weights::{LoadOptions, QuantizeOptions, load, open, quantize, save};

#[allow(dead_code)] // the processes here answer by themselves
#[path = "peers/program.rs"]
mod program;

use program::{Program, Work, apart, in_turns, python, told};

const CONFIG: LlamaConfig = LlamaConfig {
    vocab_size: 32_000,
    n_positions: 2048,
    d_model: 2048,
    d_ff: 5632,
    n_layers: 9,
    n_heads: 32,
    n_kv_heads: 8,
    d_head: 64,
    activation: Activation::Silu,
    attention_bias: false,
    mlp_bias: false,
    rms_norm_eps: 1e-5,
    rope_theta: 10_000.0,
    rope_scaling: RopeScaling::Unscaled,
    pairing: Pairing::Half,
    head: Head::Own,
};
const PROMPT: usize = 128;
const TOKENS: usize = 64;
/// Places whose distributions are compared.
const TEXT: usize = 96;
/// How far two programs may be apart in f32: [`apart`].
const TOLERANCE: f64 = 1e-4;
const PEER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/peers/decode.py");
/// Program and how it holds weights; the first is what the others are measured by.
const ROWS: [(&str, &str); 6] = [
    ("PyTorch", "f32"),
    ("PyTorch", "bf16"),
    ("volary", "f32"),
    ("volary", "bf16"),
    ("volary", "int8"),
    ("volary", "int4"),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["child", held, folder] => rayon::scope(|_| child(held, Path::new(folder))),
        [] => compare(5, 2),
        [rounds] => compare(rounds.parse()?, 2),
        [rounds, threads] => compare(rounds.parse()?, threads.parse()?),
        _ => bail!("expected at most: ROUNDS THREADS"),
    }
}

/// Prints the table.
fn compare(rounds: usize, threads: usize) -> Result<()> {
    ensure!(rounds > 0 && threads > 0, "there is nothing to measure");
    let folder = tempfile::tempdir()?;
    write(folder.path())?;
    let mut programs = Vec::new();
    for (program, held) in ROWS {
        let mut command = match program {
            "volary" => Command::new(std::env::current_exe()?),
            _ => python(Path::new(PEER)),
        };
        if program == "volary" {
            command.arg("child");
        }
        command.arg(held).arg(folder.path());
        programs.push(Program::start(&mut command, threads)?);
    }
    let scores = programs.iter_mut().map(|program| program.values("scores", folder.path()));
    let scores = scores.collect::<Result<Vec<_>>>()?;
    let error = apart(&scores[2], &scores[0])?;
    ensure!(error <= TOLERANCE, "the programs differ by {error:e}, {TOLERANCE:e} is allowed");

    let work = |what: &str, times: usize| {
        let of = |program| Work { program, work: what.to_owned(), times };
        (0..ROWS.len()).map(of).collect::<Vec<_>>()
    };
    in_turns(&mut programs, &work("tokens", TOKENS), 1)?; // what is done for the first time takes longer
    let decoding = in_turns(&mut programs, &work("tokens", TOKENS), rounds)?;
    let prompts = in_turns(&mut programs, &work("prompt", PROMPT), rounds.min(3))?;
    println!(
        "{threads} threads, prompt of {PROMPT}, {TOKENS} tokens, median of {rounds} (least to greatest)"
    );
    println!(
        "| program | weights | tokens/s | of PyTorch f32 | ms a token | prompt tokens/s | peak MiB | KL, nats |"
    );
    println!("|{}", " --- |".repeat(8));
    for (at, (program, held)) in ROWS.into_iter().enumerate() {
        let [own, first] = [at, 0].map(|at| decoding[at].median());
        let milliseconds: Vec<f64> = decoding[at].wall.iter().map(|seconds| seconds * 1e3).collect();
        println!(
            "| {program} | {held} | {:.1} | {:.2} | {} | {:.0} | {:.0} | {:.1e} |",
            1.0 / own,
            first / own,
            told(&milliseconds),
            1.0 / prompts[at].median(),
            programs[at].peak_mib()?,
            divergence(&scores[0], &scores[at]),
        );
    }
    Ok(())
}

/// The mean over all places of KL(ours || theirs), in nats.
fn divergence(ours: &[f32], theirs: &[f32]) -> f64 {
    let logarithms = |scores: &[f32]| {
        let shape = [scores.len() / CONFIG.vocab_size, CONFIG.vocab_size];
        let scores = Tensor::<1>::from_data(scores, &Device::flex()).reshape(shape);
        log_softmax(scores, 1)
    };
    let [ours, theirs] = [ours, theirs].map(logarithms);
    (ours.clone().exp() * (ours - theirs)).sum_dim(1).mean().into_scalar()
}

/// Random weights: `f32.safetensors`, `int8.safetensors` and `int4.safetensors`.
fn write(folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(1);
    let floats = folder.join("f32.safetensors");
    save(&CONFIG.init(&device), &KEYS, None, &floats, None)?;
    for (name, quantization) in [("int8", Quantization::INT8), ("int4", Quantization::INT4)] {
        let options = QuantizeOptions { quantization, keep: Vec::new(), dtype: None };
        let file = folder.join(format!("{name}.safetensors"));
        quantize(open(&floats)?.as_ref(), &file, &options, &|_| ())?;
    }
    Ok(())
}

/// So many tokens of a text that has no meaning, `[1, count]`.
fn text(count: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..count as i64).map(|at| at * 1543 % CONFIG.vocab_size as i64).collect();
    Tensor::<1, Int>::from_data(&ids[..], device).unsqueeze()
}

/// The likeliest token after `ids`, `[1, seq] -> [1, 1]`.
fn next(model: &Llama, ids: Tensor<2, Int>, cache: &mut LlamaCache) -> Tensor<2, Int> {
    let [_, seq] = ids.dims();
    let input = LlamaInput { ids, positions: Positions::From(cache.len()), mask: Mask::Full };
    let states = model.decode(input, cache).narrow(1, seq - 1, 1); // [1, 1, d_model]
    model.logits(states).argmax(2).reshape([1, 1])
}

/// Answers `write scores FILE`, `time prompt N` and `time tokens N`, of the one prompt and its tokens, line by line, until there
/// is no more.
fn child(held: &str, folder: &Path) -> Result<()> {
    let device = Device::flex();
    let (file, dtype) = match held {
        "bf16" => ("f32", FloatDType::BF16),
        _ => (held, FloatDType::F32),
    };
    let checkpoint = open(&folder.join(format!("{file}.safetensors")))?;
    let options = LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
    let model = load(CONFIG.init(&device), checkpoint.as_ref(), &KEYS, &options)?;
    drop(checkpoint);
    println!("volary, {held}, {} threads", rayon::current_num_threads());
    for line in std::io::stdin().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["write", "scores", file] => {
                let scores = model.logits(model.forward(text(TEXT, &device)));
                let scores: Vec<f32> = scores.into_data().iter().collect();
                program::write(Path::new(file), &scores)?;
                println!("written");
            }
            ["time", what @ ("prompt" | "tokens"), _] => {
                let mut cache = model.cache(PROMPT + TOKENS);
                let start = Instant::now();
                let mut token = next(&model, text(PROMPT, &device), &mut cache);
                let mut seconds = start.elapsed().as_secs_f64();
                if what == "tokens" {
                    let start = Instant::now();
                    for _ in 0..TOKENS {
                        token = next(&model, token, &mut cache);
                    }
                    token.into_data();
                    seconds = start.elapsed().as_secs_f64();
                }
                println!("{seconds}");
            }
            _ => bail!("`{line}` is not a question"),
        }
    }
    Ok(())
}
