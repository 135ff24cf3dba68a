//! `volary segment`

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};
use serde::Serialize;
use volary::seggpt::{Meant, Segmenter};
use volary_vision::palette::overlay;

use super::{Shared, Usage, examples, say, say_json};

/// Arguments of `segment`.
#[derive(Args)]
pub struct Arguments {
    /// The picture to segment.
    #[arg(value_name = "QUERY")]
    query: PathBuf,
    /// A picture whose segmentation is given; may be repeated.
    #[arg(long, required = true, value_name = "IMAGE")]
    prompt: Vec<PathBuf>,
    /// The segmentation of the prompt of the same place: as large, in colours on black.
    #[arg(long, required = true, value_name = "IMAGE")]
    mask: Vec<PathBuf>,
    /// A SegGPT: a folder, a preset, or owner/name.
    #[arg(long, value_name = "NAME")]
    model: String,
    /// Whether the masks mark one thing, or a kind of things.
    #[arg(long, value_enum, default_value = "instance")]
    meant: Kind,
    /// Where the segmentation goes, a PNG in the masks' colours; QUERY.mask.png here unless said otherwise.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Where the picture under its segmentation goes, a PNG; QUERY.overlay.png here unless said otherwise.
    #[arg(long, value_name = "FILE")]
    overlay: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kind {
    Instance,
    Semantic,
}

#[derive(Serialize)]
struct Answer {
    image: String,
    mask: String,
    overlay: String,
    /// The share of the picture that is marked: brighter than half.
    covered: f64,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { query, prompt, mask, .. } = &arguments;
    let place = |given: &Option<PathBuf>, end| given.clone().unwrap_or_else(|| examples::beside(query, end));
    let [mask_file, overlay_file] =
        [place(&arguments.output, "mask.png"), place(&arguments.overlay, "overlay.png")];
    if mask_file == overlay_file {
        let file = mask_file.display();
        return Err(Usage(format!("--output and --overlay are both {file}")).into());
    }
    // the pictures before the model: they are read in no time
    let (asked, examples) = examples::read_all(query, prompt, mask, "mask")?;
    let meant = match arguments.meant {
        Kind::Instance => Meant::Instance,
        Kind::Semantic => Meant::Semantic,
    };
    let folder = shared.folder(&arguments.model)?;
    let segmenter = Segmenter::load(&folder, &shared.load_options(), &shared.device()?)?;
    let painting = segmenter.segment(&asked, &examples, meant)?;

    let segmented = painting.to_rgb();
    segmented.save_png(&mask_file)?;
    overlay(&asked, &segmented)?.save_png(&overlay_file)?;
    let bright = painting.pixels().filter(|pixel| pixel.iter().any(|&value| value > 127.5)).count();
    let covered = bright as f64 / (asked.width() * asked.height()) as f64;
    let told = |path: &Path| path.display().to_string();
    if shared.json {
        let (image, mask, overlay) = (told(query), told(&mask_file), told(&overlay_file));
        return say_json(&[Answer { image, mask, overlay, covered }]);
    }
    let (query, mask, overlay) = (told(query), told(&mask_file), told(&overlay_file));
    say(format!("{query}: {:.1} % marked; {mask}, {overlay}", 100.0 * covered))
}
