//! `volary paint`

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;
use volary::painter::Artist;
use volary::registry::System;
use volary::seggpt::{self, Meant, Segmenter};
use volary_vision::interpolation::Interpolation;

use super::{Shared, examples, say, say_json};

/// Arguments of `paint`.
#[derive(Args)]
pub struct Arguments {
    /// The picture whose answer is to be painted.
    #[arg(value_name = "QUERY")]
    query: PathBuf,
    /// A picture whose answer is given; may be repeated.
    #[arg(long, required = true, value_name = "IMAGE")]
    prompt: Vec<PathBuf>,
    /// The answer of the prompt of the same place, as large: a depth map, a segmentation, keypoints, the picture without
    /// noise or rain.
    #[arg(long, required = true, value_name = "IMAGE")]
    target: Vec<PathBuf>,
    /// A Painter or a SegGPT (which takes what is shown for one thing): a folder, a preset, or owner/name.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// How the painting becomes as large as QUERY. Painter's authors take bilinear for depth and kinds of things, nearest
    /// for keypoints and single things, bicubic for what is restored; without it bilinear, and nearest for a SegGPT.
    #[arg(long, value_enum)]
    resize: Option<Resize>,
    /// Where the painting goes, a PNG; QUERY.painting.png here unless said otherwise.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Resize {
    Nearest,
    Bilinear,
    Bicubic,
}

#[derive(Serialize)]
struct Answer {
    image: String,
    painting: String,
    width: usize,
    height: usize,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { query, prompt, target, model, resize, output } = arguments;
    // the pictures before the model: they are read in no time
    let (asked, examples) = examples::read_all(&query, &prompt, &target, "target")?;
    let interpolation = resize.map(|resize| match resize {
        Resize::Nearest => Interpolation::Nearest,
        Resize::Bilinear => Interpolation::Bilinear,
        Resize::Bicubic => Interpolation::Bicubic,
    });
    let folder = shared.folder(&model)?;
    let (options, device) = (shared.load_options(), shared.device()?);
    let painting = if System::of(&folder)?.name == seggpt::SYSTEM.name {
        let interpolation = interpolation.unwrap_or(Interpolation::Nearest);
        let segmenter = Segmenter::load(&folder, &options, &device)?;
        segmenter.paint(&asked, &examples, Meant::Instance, interpolation)?
    } else {
        let interpolation = interpolation.unwrap_or(Interpolation::Bilinear);
        Artist::load(&folder, &options, &device)?.paint(&asked, &examples, interpolation)?
    };
    let file = output.unwrap_or_else(|| examples::beside(&query, "painting.png"));
    painting.to_rgb().save_png(&file)?;
    let (image, painting) = (query.display().to_string(), file.display().to_string());
    if shared.json {
        return say_json(&[Answer { image, painting, width: asked.width(), height: asked.height() }]);
    }
    say(format!("{image}: {painting}"))
}
