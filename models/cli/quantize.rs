//! `volary quantize`

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;
use volary::export::quantize_folder;
use volary_weights::quantized::Loss;
use volary_weights::{Bits, Quantization, QuantizeOptions};

use super::convert::{Bar, Written, existing, mebibytes};
use super::{Shared, say, say_json};

/// Arguments of `quantize`.
#[derive(Args)]
pub struct Arguments {
    /// A checkpoint folder, a preset, or owner/name.
    source: String,
    /// The folder to be written.
    out: PathBuf,
    /// Bits of a value.
    #[arg(long, value_enum, default_value = "8")]
    bits: BitsArgument,
    /// Neighbouring values that share a scale.
    #[arg(long, value_enum, default_value = "32")]
    block: Block,
    /// Keys that stay as they are, `*` for anything, e.g. '*embed*'; may be given several times.
    #[arg(long, value_name = "PATTERN")]
    keep: Vec<String>,
    /// Replace the folder if it is there and has weights in it.
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum BitsArgument {
    #[value(name = "8")]
    Eight,
    #[value(name = "4")]
    Four,
}

#[derive(Clone, Copy, ValueEnum)]
enum Block {
    #[value(name = "32")]
    B32,
    #[value(name = "64")]
    B64,
    #[value(name = "128")]
    B128,
}

#[derive(Serialize)]
struct Report {
    quantization: String,
    /// Of all tensors, before.
    bytes_before: u64,
    /// Of all weights files, after.
    bytes_after: u64,
    tensors: Vec<Loss>,
    #[serde(flatten)]
    written: Written,
}

/// Runs the command. What is not quantized gets the `--dtype`, if one is given.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { source, out, bits, block, keep, force } = arguments;
    let bits = match bits {
        BitsArgument::Eight => Bits::Eight,
        BitsArgument::Four => Bits::Four,
    };
    let block = match block {
        Block::B32 => 32,
        Block::B64 => 64,
        Block::B128 => 128,
    };
    let quantization = Quantization { bits, block };
    let options = QuantizeOptions { quantization, keep, dtype: shared.written_dtype()? };
    let bar = Bar::default();
    let (export, losses) = quantize_folder(&shared.folder(&source)?, &out, existing(force), &options, &bar)?;
    drop(bar);
    let is_weights = |(file, _): &&(String, u64)| file.ends_with(".safetensors");
    let report = Report {
        quantization: quantization.to_string(),
        bytes_before: export.tensors,
        bytes_after: export.files.iter().filter(is_weights).map(|(_, bytes)| bytes).sum(),
        tensors: losses,
        written: Written::new(&export),
    };
    if shared.json {
        return say_json(&report);
    }
    report.written.say()?;
    say("max error  mean error  of the largest and the mean magnitude")?;
    for Loss { key, shape: [rows, cols], max, mean } in &report.tensors {
        say(format!("{:>8.3} %  {:>8.3} %  {key} [{rows}, {cols}]", 100.0 * max, 100.0 * mean))?;
    }
    let Report { quantization, bytes_before, bytes_after, tensors, .. } = &report;
    say(format!(
        "{}: {} tensors in {quantization}; weights {:.1} MiB -> {:.1} MiB",
        out.display(),
        tensors.len(),
        mebibytes(*bytes_before),
        mebibytes(*bytes_after),
    ))
}
