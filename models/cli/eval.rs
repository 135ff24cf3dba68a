//! `volary eval`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use volary::recipe::data::Gallery;
use volary::recipe::evaluate::{evaluate, table};

use super::{Model, Shared, say, say_json};

/// Arguments of `eval`.
#[derive(Args)]
pub struct Arguments {
    /// Prepared data (`emoji.safetensors` and `captions.json`), or `captions.json` beside `<hexcode>.png`.
    data: PathBuf,
    /// Of prepared data, the styles to measure.
    #[arg(long, value_delimiter = ',', default_value = "openmoji")]
    style: Vec<String>,
    #[command(flatten)]
    model: Model,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let clip = arguments.model.load(shared)?;
    let galleries =
        Gallery::read(&arguments.data, |style| arguments.style.iter().any(|wanted| wanted == style))?;
    let mut scores = Vec::new();
    for gallery in &galleries {
        scores.extend(evaluate(&clip, gallery)?);
    }
    if shared.json { say_json(&scores) } else { say(table(&scores).trim_end()) }
}
