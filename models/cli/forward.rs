//! `volary forward`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use volary::folder::Folder;
use volary::registry::forward;
use volary_weights::{read_tensors, save_tensors};

use super::Shared;

/// Arguments of `forward`.
#[derive(Args)]
pub struct Arguments {
    /// A checkpoint folder as the hub lays it out.
    folder: String,
    /// Tensors by the reference implementation's argument names.
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Where the outputs go, by the reference's names.
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let folder: Folder = shared.folder(&arguments.folder)?;
    let inputs = read_tensors(&arguments.input)?;
    let outputs = forward(&folder, &inputs, &shared.load_options(), &shared.device()?)?;
    save_tensors(&arguments.output, &outputs)?;
    for (name, data) in &outputs {
        let dims: Vec<usize> = data.shape().iter().copied().collect();
        eprintln!("{name} {dims:?}");
    }
    Ok(())
}
