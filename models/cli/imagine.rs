//! `volary imagine`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::Shared;
use super::drawing::{Drawing, Given, Subject, pair};

/// Arguments of `imagine`.
#[derive(Args)]
pub struct Arguments {
    /// What the picture shows; "" for anything.
    #[arg(value_name = "PROMPT")]
    prompt: String,
    /// Width and height in pixels, multiples of 8; without it those of --init-image, or those that the model was made for.
    #[arg(long, value_name = "WxH", value_parser = pair)]
    size: Option<[usize; 2]>,
    /// Change this picture in place of beginning from noise.
    #[arg(long, value_name = "FILE")]
    init_image: Option<PathBuf>,
    /// How much of --init-image is made anew: 0 leaves it, 1 forgets it; 0.8 without it, 1 with --mask.
    #[arg(long, value_name = "X", requires = "init_image", allow_negative_numbers = true)]
    strength: Option<f64>,
    /// A picture as large as --init-image, white where something new is painted, black where it stays.
    #[arg(long, value_name = "FILE", requires = "init_image")]
    mask: Option<PathBuf>,
    #[command(flatten)]
    drawing: Drawing,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { prompt, size, init_image, strength, mask, drawing } = arguments;
    let usual = if mask.is_some() { 1.0 } else { 0.8 }; // as in diffusers
    let init = init_image.map(|picture| Given { picture, strength: strength.unwrap_or(usual), mask });
    let size = size.map(|[width, height]| [height, width]);
    drawing.run(Subject { prompt, size, init }, shared)
}
