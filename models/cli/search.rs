//! `volary search`

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use volary::index::{Index, pictures_in};
use volary_vision::image::{ReadOptions, read};

use super::{Model, Shared, Usage, say, say_json};

/// Arguments of `search`.
#[derive(Args)]
pub struct Arguments {
    /// A folder of pictures; folders inside it are searched as well.
    folder: PathBuf,
    /// What to look for, in Chinese or English.
    query: Option<String>,
    /// Look for what resembles this picture.
    #[arg(long, value_name = "IMAGE")]
    like: Option<PathBuf>,
    /// Where the index is kept; without it in the folder, as `.volary-index.safetensors`.
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// How many pictures to show.
    #[arg(long, default_value_t = 10, value_name = "N")]
    top: usize,
    #[command(flatten)]
    model: Model,
}

#[derive(Serialize)]
struct Found {
    image: String,
    similarity: f32,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { folder, query, like, index, top, model } = arguments;
    if query.is_none() && like.is_none() {
        return Err(Usage("give a text to look for, or a picture with --like".into()).into());
    }
    let clip = model.load(shared)?;
    let file = index.unwrap_or_else(|| folder.join(".volary-index.safetensors"));
    let mut index = Index::open(&file, &clip, model.name())?;
    let (paths, mut unreadable) = pictures_in(&folder)?;
    let stale = index.stale(&folder, &paths);
    let bar = ProgressBar::new(stale.len() as u64).with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} pictures {per_sec} eta {eta}")
            .expect("the template is valid"),
    );
    for chunk in stale.chunks(64) {
        unreadable.extend(index.add(&clip, &folder, chunk)?);
        bar.inc(chunk.len() as u64);
    }
    bar.finish_and_clear();
    index.keep(&folder, &paths);
    index.save(&file)?;
    for problem in &unreadable {
        eprintln!("skipped: {problem}");
    }

    let vector = query_vector(&clip, query.as_deref(), like.as_deref())?;
    let found: Vec<Found> = index
        .search(&vector, top)
        .into_iter()
        .map(|(path, similarity)| Found { image: folder.join(path).display().to_string(), similarity })
        .collect();
    if shared.json {
        return say_json(&found);
    }
    for Found { image, similarity } in found {
        say(format!("{similarity:>7.3}  {image}"))?;
    }
    Ok(())
}

/// The text's vector, the picture's, or the unit vector of their sum.
fn query_vector(clip: &volary::Clip, text: Option<&str>, picture: Option<&Path>) -> Result<Vec<f32>> {
    let mut sum = vec![0.0; clip.d_embed()];
    let mut add =
        |row: ndarray::ArrayView1<f32>| sum.iter_mut().zip(row).for_each(|(sum, value)| *sum += value);
    if let Some(text) = text {
        add(clip.encode_texts(&[text])?.row(0));
    }
    if let Some(picture) = picture {
        add(clip.encode_images(&[read(picture, ReadOptions::SEEN)?])?.row(0));
    }
    let length = sum.iter().map(|value| value * value).sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
    Ok(sum.into_iter().map(|value| value / length).collect())
}
