//! `volary replay`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use volary::Error;
use volary::pictures::drawing;
use volary::record::{Record, Source};

use super::drawing::{Problems, check_output, make, model_of};
use super::{Shared, examples};

/// Arguments of `replay`.
#[derive(Args)]
pub struct Arguments {
    /// A PNG that `imagine` or `variations` wrote.
    #[arg(value_name = "IMAGE")]
    picture: PathBuf,
    /// Where it goes, a PNG; IMAGE.replay.png here without it.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The model, if it is no longer where it was.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// A file that it was made with (picture, mask, LoRA, embedding, weights), if it is no longer where it was: it is known
    /// by its content. May be repeated.
    #[arg(
        long = "file",
        visible_aliases = ["init-image", "mask", "lora", "embedding", "single-file"],
        value_name = "FILE"
    )]
    files: Vec<PathBuf>,
    /// Go on with another model than it was made with.
    #[arg(long)]
    force: bool,
    /// Show the picture as it becomes, as `imagine` does.
    #[arg(long)]
    preview: bool,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { picture, output, model, files, force, preview } = arguments;
    let recorded = Record::read(&picture)?;
    let output = output.unwrap_or_else(|| examples::beside(&picture, "replay.png"));
    check_output(&output)?;
    let mut shared = shared.clone();
    shared.variant = shared.variant.or(recorded.model.variant.clone());
    if let Some(dtype) = &recorded.model.dtype {
        shared = shared.with_dtype(dtype)?;
    }

    let mut problems = Problems::default();
    let given: Vec<Source> = files.iter().filter_map(|path| problems.source(path)).collect();
    // the files where they are now; the record goes on saying where they were
    let mut found = recorded.clone();
    for source in found.sources_mut() {
        if let Some(here) = problems.find(source, &given) {
            *source = here;
        }
    }
    let asked = found.asked(found.init.as_ref().and_then(|change| problems.init(change)));
    problems.none(&asked)?;

    let name = model.unwrap_or_else(|| recorded.model.name.clone());
    let folder = shared.folder(&name)?;
    let mut model = model_of(&name, &folder, &shared)?;
    if model.hash == recorded.model.hash {
        model.name.clone_from(&recorded.model.name);
    } else if !force {
        let [now, then] = [&model.hash, &recorded.model.hash];
        let (picture, name) = (picture.display(), &recorded.model.name);
        let problem = format!(
            "another model than {picture} was made with, {name}: its hash is {now}, not {then}; --force goes on with it"
        );
        return Err(Error::Data { file: folder.path().into(), problem }.into());
    }
    let draws =
        (drawing(&folder)?.open)(&folder, &found.extras(), &shared.load_options(), &shared.device()?)?;
    let record = Record { version: env!("CARGO_PKG_VERSION").into(), model, ..recorded };
    make(draws.as_ref(), &asked, &record, &output, preview, &shared)
}
