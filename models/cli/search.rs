//! `volary search`

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use ndarray::{Array1, Array2};
use serde::Serialize;
use volary::Error;
use volary::index::{Index, Report, model_hash};
use volary_multimodal::retrieval::VectorFileError;
use volary_vision::image::{ReadOptions, read};

use super::{Model, Shared, Usage, contact_sheet, say, say_json};

/// Arguments of `search`.
#[derive(Args)]
pub struct Arguments {
    /// A folder of pictures; folders inside it are searched as well.
    folder: PathBuf,
    /// What to look for, in Chinese or English; several are answered one after the other.
    #[arg(value_name = "QUERY")]
    queries: Vec<String>,
    /// Look for what resembles this picture; with a text, for what has to do with both. Several are averaged.
    #[arg(long, value_name = "IMAGE")]
    like: Vec<PathBuf>,
    /// How much the text counts and how much the pictures of --like, where both are given. A negative weight looks
    /// for the opposite.
    #[arg(long, value_delimiter = ',', num_args = 1, allow_hyphen_values = true, value_name = "TEXT,IMAGE")]
    #[arg(default_values_t = [0.5, 0.5])]
    weight: Vec<f32>,
    /// Where the index is kept; without it in the folder, as `.volary-index-` and eight digits of the model's hash.
    #[arg(long, value_name = "FILE")]
    index: Option<PathBuf>,
    /// How many pictures to show.
    #[arg(long, default_value_t = 10, value_name = "N")]
    top: usize,
    /// Write a page that shows the pictures; it needs no other file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    #[command(flatten)]
    model: Model,
}

/// What was found for one query.
#[derive(Serialize)]
pub struct Answer {
    /// The text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// The pictures that others were to resemble.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub like: Vec<String>,
    /// The most similar first.
    pub images: Vec<Found>,
}

/// A picture that was found.
#[derive(Serialize)]
pub struct Found {
    /// Its file.
    pub image: String,
    /// By cosine.
    pub similarity: f32,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { folder, queries, like, weight, index, top, html, model } = arguments;
    if queries.is_empty() && like.is_empty() {
        return Err(Usage("give a text to look for, or a picture with --like".into()).into());
    }
    let weights = match weight[..] {
        [text, image] if (text.abs() + image.abs()).is_finite() && text.abs() + image.abs() > 0.0 => {
            [text, image]
        }
        _ => return Err(Usage("--weight takes two numbers, not both 0: --weight 0.3,0.7".into()).into()),
    };
    let hash = model_hash(&shared.folder(model.name())?)?;
    let clip = model.load(shared)?;
    let vectors = query_vectors(&clip, &queries, &like, weights)?;

    let file = index.unwrap_or_else(|| {
        let digits: String = hash[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        folder.join(format!(".volary-index-{digits}"))
    });
    let mut index = Index::open(&file, hash, vectors.ncols()).map_err(|error| advised(error, &model))?;
    let bar = ProgressBar::no_length().with_style(
        ProgressStyle::with_template("{bar:30} {pos}/{len} files {per_sec} eta {eta}")
            .expect("the template is valid"),
    );
    let report = index.update(&clip, &folder, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let Report { pictures, encoded, gone, skipped } = report.map_err(|error| advised(error, &model))?;
    for problem in &skipped {
        eprintln!("skipped: {problem}");
    }
    let n_skipped = skipped.len();
    eprintln!("{pictures} pictures, {encoded} of them encoded now; {gone} files gone, {n_skipped} skipped");

    let found = index.search(vectors.as_slice().context("rows lie one after the other")?, top);
    let mut queries: Vec<Option<String>> = queries.into_iter().map(Some).collect();
    if queries.is_empty() {
        queries.push(None);
    }
    let answers: Vec<Answer> = queries
        .into_iter()
        .zip(found)
        .map(|(query, found)| Answer {
            query,
            like: like.iter().map(|path| path.display().to_string()).collect(),
            images: found
                .into_iter()
                .map(|(path, similarity)| Found {
                    image: folder.join(path).display().to_string(),
                    similarity,
                })
                .collect(),
        })
        .collect();
    if let Some(file) = html {
        std::fs::write(&file, contact_sheet::page(&answers)).map_err(Error::io(&file))?;
    }
    if shared.json {
        return say_json(&answers);
    }
    for Answer { query, images, .. } in &answers {
        if let Some(query) = query
            && answers.len() > 1
        {
            say(query)?;
        }
        for Found { image, similarity } in images {
            say(format!("{similarity:>7.3}  {image}"))?;
        }
    }
    Ok(())
}

/// What to do about an index that is not this model's, or broken.
fn advised(error: Error, model: &Model) -> anyhow::Error {
    let advice = match &error {
        Error::Index(VectorFileError::Model { .. } | VectorFileError::Width { .. }) => {
            format!("; --index keeps one for `{}` elsewhere", model.name())
        }
        Error::Index(VectorFileError::Io { .. }) => return error.into(),
        Error::Index(_) | Error::Data { .. } => String::new(),
        _ => return error.into(),
    };
    anyhow::anyhow!("{error}; delete it to have it made again{advice}")
}

/// Unit vectors to look for, `[queries, d_embed]`: of each text, of the pictures' mean, or the weighted sum of both.
fn query_vectors(
    clip: &volary::Clip,
    texts: &[String],
    like: &[PathBuf],
    [text_weight, image_weight]: [f32; 2],
) -> Result<Array2<f32>> {
    let mut mean: Option<Array1<f32>> = None;
    for path in like {
        let vectors = clip.encode_images(&[read(path, ReadOptions::SEEN)?])?;
        let vector = vectors.row(0);
        mean = Some(mean.map_or_else(|| vector.to_owned(), |mean| mean + vector));
    }
    let unit = |vector: Array1<f32>| -> Result<Array1<f32>> {
        let length = vector.dot(&vector).sqrt();
        anyhow::ensure!(
            length > 1e-6,
            "these weights leave nothing to look for: text and pictures cancel out"
        );
        Ok(vector / length)
    };
    let mean = mean.map(unit).transpose()?;
    let rows: Vec<Array1<f32>> = match (clip.encode_texts(texts)?, mean) {
        (_, Some(mean)) if texts.is_empty() => vec![mean],
        (texts, mean) => texts
            .rows()
            .into_iter()
            .map(|text| match &mean {
                Some(mean) => unit(&text * text_weight + mean * image_weight),
                None => Ok(text.to_owned()),
            })
            .collect::<Result<_>>()?,
    };
    let width = rows.first().map_or(0, Array1::len);
    let values = rows.iter().flatten().copied().collect();
    Ok(Array2::from_shape_vec((rows.len(), width), values)?)
}
