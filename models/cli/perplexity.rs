//! `volary perplexity`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::writing::{WriterModel, read_text};
use super::{Shared, say, say_json};

/// Arguments of `perplexity`.
#[derive(Args)]
pub struct Arguments {
    /// A text; `-` is standard input.
    file: PathBuf,
    /// How far a window of the model's context is moved, in tokens: the shorter, the more tokens each one sees, and the
    /// longer it takes. Without it half of the context.
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    #[command(flatten)]
    model: WriterModel,
}

#[derive(Serialize)]
struct Report {
    /// Scored, so without the first.
    tokens: usize,
    bytes: usize,
    nats_per_token: f64,
    perplexity: f64,
    bits_per_byte: f64,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { file, stride, model } = arguments;
    model.name()?;
    let text = read_text(&file)?;
    let writer = model.load(shared)?;
    let bar = ProgressBar::new(0).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} tokens {per_sec} eta {eta}")
            .expect("the template is valid"),
    );
    let found = writer.likelihood(&text, stride, &mut |done, of| {
        bar.set_length(of as u64);
        bar.set_position(done as u64);
    })?;
    bar.finish_and_clear();
    let nats_per_token = -found.mean();
    let report = Report {
        tokens: found.tokens,
        bytes: text.len(),
        nats_per_token,
        perplexity: nats_per_token.exp(),
        bits_per_byte: -found.sum / std::f64::consts::LN_2 / text.len() as f64,
    };
    if shared.json {
        return say_json(&report);
    }
    let Report { tokens, bytes, perplexity, bits_per_byte, .. } = report;
    say(format!("tokens          {tokens:>12}"))?;
    say(format!("bytes           {bytes:>12}"))?;
    say(format!("nats per token  {nats_per_token:>12.4}"))?;
    say(format!("perplexity      {perplexity:>12.4}"))?;
    say(format!("bits per byte   {bits_per_byte:>12.4}"))
}
