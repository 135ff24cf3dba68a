//! `volary replay`

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use volary::Error;
use volary::pictures::pipeline_hash;
use volary::record::{Change, Model, Record, Source, Weighted};

use super::drawing::{Problems, check_output, load, make};
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
    /// A file that it was made with (picture, mask, LoRA or embedding), if it is no longer where it was: it is known by its
    /// content. May be repeated.
    #[arg(long = "file", visible_aliases = ["init-image", "mask", "lora", "embedding"], value_name = "FILE")]
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
    // where the files are now; the record goes on saying where they were
    let mut find = |source: &Source| problems.find(source, &given);
    let loras: Vec<Weighted> = recorded
        .loras
        .iter()
        .filter_map(|lora| Some(Weighted { file: find(&lora.file)?, weight: lora.weight }))
        .collect();
    let embeddings: Vec<Source> = recorded.embeddings.iter().filter_map(&mut find).collect();
    let change = recorded.init.as_ref().and_then(|Change { picture, strength, mask }| {
        let (picture, mask) = (find(picture), mask.as_ref().map(&mut find));
        Some(Change { picture: picture?, strength: *strength, mask: mask.flatten() })
    });
    let asked = recorded.asked(change.and_then(|change| problems.init(&change)));
    problems.none(&asked)?;

    let name = model.unwrap_or_else(|| recorded.model.name.clone());
    let folder = shared.folder(&name)?;
    let hash = pipeline_hash(&folder)?;
    let is_same = hash == recorded.model.hash;
    if !is_same && !force {
        let problem = format!(
            "another model than {} made it with, {}: the hash is {hash}, not {}; --force goes on with it",
            picture.display(),
            recorded.model.name,
            recorded.model.hash,
        );
        return Err(Error::Data { file: folder.path().into(), problem }.into());
    }
    let model = load(&folder, &loras, &embeddings, &shared)?;
    let record = Record {
        version: env!("CARGO_PKG_VERSION").into(),
        model: Model {
            name: if is_same { recorded.model.name } else { name },
            variant: shared.variant.clone(),
            hash,
            dtype: shared.dtype_name(),
            device: shared.device.clone(),
        },
        ..recorded
    };
    make(model.as_ref(), &asked, &record, &output, preview, &shared)
}
