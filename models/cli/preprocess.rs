//! `volary preprocess`

use std::path::PathBuf;

use anyhow::Result;
use burn::tensor::TensorData;
use clap::Args;
use volary_vision::image::{Orientation, Picture};
use volary_weights::save_tensors;

use super::Shared;

/// Arguments of `preprocess`.
#[derive(Args)]
pub struct Arguments {
    /// A folder with a preprocessor configuration.
    folder: String,
    /// Pictures, read as their files store them.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// Where the tensors `pixel_values.0`, `.1`, ... go, `[3, height, width]` each; open_clip's are named
    /// `image.0`, ... as well.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let folder = shared.folder(&arguments.folder)?;
    let preprocessor = folder.preprocessor()?;
    let names: &[&str] =
        if folder.has("open_clip_config.json") { &["pixel_values", "image"] } else { &["pixel_values"] };
    let mut tensors = Vec::new();
    for (index, path) in arguments.images.iter().enumerate() {
        let picture = Picture::read(path, Orientation::AsStored)?;
        let pixels = preprocessor.apply_picture(&picture)?;
        let data = TensorData::new(pixels.data, [pixels.channels, pixels.height, pixels.width]);
        tensors.extend(names.iter().map(|name| (format!("{name}.{index}"), data.clone())));
    }
    save_tensors(&arguments.output, &tensors)?;
    Ok(())
}
