//! `volary variations`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use volary::record::Record;

use super::Shared;
use super::drawing::{Drawing, Given, Subject};

/// Arguments of `variations`.
#[derive(Args)]
pub struct Arguments {
    /// The picture.
    #[arg(value_name = "IMAGE")]
    picture: PathBuf,
    /// What it shows; without it what its record says, if it was imagined here, or nothing.
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// How far they are from it: 0 is the picture itself, 1 has nothing of it.
    #[arg(long, value_name = "X", default_value_t = 0.3, allow_negative_numbers = true)]
    strength: f64,
    #[command(flatten)]
    drawing: Drawing,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { picture, prompt, strength, drawing } = arguments;
    let recorded = || Record::read(&picture).map(|record| record.prompt);
    let prompt = prompt.or_else(|| recorded().ok()).unwrap_or_default();
    let init = Some(Given { picture, strength, mask: None });
    drawing.run(Subject { prompt, size: None, init }, shared)
}
