//! `volary embed`

use std::path::{Path, PathBuf};

use anyhow::Result;
use burn::tensor::TensorData;
use clap::{Args, ValueEnum};
use ndarray::Array2;
use serde::Serialize;
use volary::registry::System;
use volary::sentence::SentenceEncoder;
use volary::{Clip, Error};
use volary_vision::image::{ReadOptions, Rgb8, read};
use volary_weights::save_tensors;

use super::{Model, Shared, say, say_json};

/// Arguments of `embed`.
#[derive(Args)]
pub struct Arguments {
    /// Pictures and texts: what is the name of a file is a picture, anything else a text.
    #[arg(required = true, value_name = "IMAGE|TEXT")]
    inputs: Vec<String>,
    /// Take every input as this.
    #[arg(long, value_enum)]
    r#as: Option<Kind>,
    /// Write the tensors `image` and `text`, `[inputs, d_embed]` each, to a safetensors file.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    model: Model,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Image,
    Text,
}

#[derive(Serialize)]
struct Embedded<'a> {
    input: &'a str,
    kind: Kind,
    embedding: Vec<f32>,
}

/// What turns inputs into vectors.
enum Embedder {
    Clip(Box<Clip>),
    Sentences(Box<SentenceEncoder>),
}

impl Embedder {
    fn load(model: &Model, shared: &Shared) -> Result<Self> {
        let folder = shared.folder(model.name())?;
        let system = System::of(&folder)?;
        if !system.tasks.contains(&"classify") && system.tasks.contains(&"embed") {
            let encoder = SentenceEncoder::load(&folder, &shared.load_options(), &shared.device()?)?;
            return Ok(Self::Sentences(Box::new(encoder)));
        }
        Ok(Self::Clip(Box::new(model.load(shared)?)))
    }

    fn images(&self, pictures: &[Rgb8]) -> Result<Array2<f32>> {
        match self {
            Self::Clip(clip) => Ok(clip.encode_images(pictures)?),
            Self::Sentences(encoder) if pictures.is_empty() => Ok(Array2::zeros((0, encoder.width()))),
            Self::Sentences(_) => Err(Error::Task {
                system: "a text encoder",
                task: "look at pictures (--as text takes names as texts)",
            }
            .into()),
        }
    }

    fn texts(&self, texts: &[&String]) -> Result<Array2<f32>> {
        match self {
            Self::Clip(clip) => Ok(clip.encode_texts(texts)?),
            Self::Sentences(encoder) => Ok(encoder.encode(texts)?),
        }
    }
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let embedder = Embedder::load(&arguments.model, shared)?;
    let kind = |input: &str| match arguments.r#as {
        Some(kind) => kind,
        None if Path::new(input).is_file() => Kind::Image,
        None => Kind::Text,
    };
    let of = |wanted: Kind| arguments.inputs.iter().filter(move |input| kind(input) == wanted);
    let pictures = of(Kind::Image)
        .map(|path| read(Path::new(path), ReadOptions::SEEN))
        .collect::<Result<Vec<_>, _>>()?;
    let texts: Vec<&String> = of(Kind::Text).collect();
    let (images, texts) = (embedder.images(&pictures)?, embedder.texts(&texts)?);

    if let Some(file) = &arguments.output {
        let tensors = [("image", &images), ("text", &texts)];
        let tensors: Vec<(String, TensorData)> = tensors
            .into_iter()
            .filter(|(_, rows)| rows.nrows() > 0)
            .map(|(name, rows)| {
                let values: Vec<f32> = rows.iter().copied().collect();
                (name.to_owned(), TensorData::new(values, [rows.nrows(), rows.ncols()]))
            })
            .collect();
        save_tensors(file, &tensors)?;
        let (n_images, n_texts) = (images.nrows(), texts.nrows());
        eprintln!("{}: {n_images} pictures, {n_texts} texts", file.display());
        return Ok(());
    }
    let (mut images, mut texts) = (images.rows().into_iter(), texts.rows().into_iter());
    let embedded = arguments.inputs.iter().filter_map(|input| {
        let kind = kind(input);
        let row = if kind == Kind::Image { images.next() } else { texts.next() }?;
        Some(Embedded { input, kind, embedding: row.to_vec() })
    });
    let embedded: Vec<Embedded> = embedded.collect();
    if shared.json {
        return say_json(&embedded);
    }
    for Embedded { input, embedding, .. } in embedded {
        let numbers: Vec<String> = embedding.iter().map(|value| format!("{value:.5}")).collect();
        say(format!("{input}\t{}", numbers.join(" ")))?;
    }
    Ok(())
}
