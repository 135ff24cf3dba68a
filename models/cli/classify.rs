//! `volary classify`

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use ndarray::{Array2, Axis};
use serde::Serialize;
use volary::Clip;
use volary::vocabulary::{Word, words};
use volary_vision::image::{ReadOptions, Rgb8, read};

use super::{Model, Shared, Usage, say, say_json};

/// Arguments of `classify`.
#[derive(Args)]
pub struct Arguments {
    /// Pictures: PNG, JPEG, WebP, GIF or BMP.
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<PathBuf>,
    /// What the pictures may show, separated by commas, in Chinese or English; without it, everything that
    /// the embedded model was trained to name.
    #[arg(long, value_delimiter = ',', value_name = "A,B,C")]
    labels: Vec<String>,
    /// A file with one label a line.
    #[arg(long, value_name = "FILE", conflicts_with = "labels")]
    labels_file: Option<PathBuf>,
    /// A sentence for the label, `{}` in its place; several are averaged.
    #[arg(long, value_name = "TEXT")]
    template: Vec<String>,
    /// How many labels to show.
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
    #[command(flatten)]
    model: Model,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Labels { image: String, labels: Vec<Label> },
    Failed { image: String, error: String },
}

#[derive(Clone, Serialize)]
struct Label {
    label: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    zh: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    emoji: Option<String>,
    probability: f32,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let templates = templates(&arguments.template)?;
    let labels = labels(&arguments)?;
    let clip = arguments.model.load(shared)?;
    let (texts, shown) = match labels {
        Some(labels) => (encode(&clip, &labels, &templates)?, labels.into_iter().map(plain).collect()),
        None if arguments.model.is_embedded() => vocabulary(&clip, &templates)?,
        None => {
            let model = arguments.model.name();
            return Err(
                Usage(format!("`{model}` has no labels of its own: give --labels or --labels-file")).into()
            );
        }
    };

    // The pictures that can be read go through the model together.
    let pictures: Vec<_> = arguments.images.iter().map(|path| read(path, ReadOptions::SEEN)).collect();
    let readable: Vec<Rgb8> = pictures.iter().filter_map(|picture| picture.as_ref().ok().cloned()).collect();
    let images = clip.encode_images(&readable)?;
    let mut rows = volary::pretrained::softmax(images.dot(&texts.t()) * clip.scale()).into_iter();
    let mut row = || -> Vec<f32> { rows.by_ref().take(texts.nrows()).collect() };
    let answers: Vec<Answer> = arguments
        .images
        .iter()
        .zip(pictures)
        .map(|(path, picture)| {
            let image = path.display().to_string();
            match picture {
                Ok(_) => Answer::Labels { image, labels: best(&row(), &shown, arguments.top) },
                Err(error) => Answer::Failed { image, error: error.to_string() },
            }
        })
        .collect();
    report(&answers, shared)
}

fn report(answers: &[Answer], shared: &Shared) -> Result<()> {
    if shared.json {
        say_json(&answers)?;
    }
    let mut failed = 0;
    for answer in answers {
        match answer {
            Answer::Labels { image, labels } if !shared.json => {
                say(image)?;
                for Label { label, zh, emoji, probability } in labels {
                    let words = [emoji.as_deref(), Some(label.as_str()), zh.as_deref()];
                    let words: Vec<&str> = words.into_iter().flatten().collect();
                    say(format!("{:>7.1} %  {}", 100.0 * probability, words.join("  ")))?;
                }
            }
            Answer::Labels { .. } => {}
            Answer::Failed { error, .. } => {
                eprintln!("error: {error}");
                failed += 1;
            }
        }
    }
    match failed {
        0 => Ok(()),
        _ => anyhow::bail!("{failed} of {} pictures could not be read", answers.len()),
    }
}

fn best(probabilities: &[f32], shown: &[Label], top: usize) -> Vec<Label> {
    let mut order: Vec<usize> = (0..shown.len()).collect();
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
    let label = |index: usize| Label { probability: probabilities[index], ..shown[index].clone() };
    order.into_iter().take(top.max(1)).map(label).collect()
}

fn plain(label: String) -> Label {
    Label { label, zh: None, emoji: None, probability: 0.0 }
}

/// Everything the embedded model was trained to name; each concept by the mean of its names in both languages.
fn vocabulary(clip: &Clip, templates: &[String]) -> Result<(Array2<f32>, Vec<Label>)> {
    let words = words();
    let en: Vec<String> = words.iter().map(|word| word.en.to_owned()).collect();
    let zh: Vec<String> = words.iter().map(|word| word.zh.to_owned()).collect();
    let texts = unit(encode(clip, &en, templates)? + encode(clip, &zh, templates)?);
    let label = |Word { emoji, en, zh }| Label {
        label: en.to_owned(),
        zh: Some(zh.to_owned()),
        emoji: Some(emoji.to_owned()),
        probability: 0.0,
    };
    Ok((texts, words.into_iter().map(label).collect()))
}

fn encode(clip: &Clip, labels: &[String], templates: &[String]) -> Result<Array2<f32>> {
    let mut sum: Option<Array2<f32>> = None;
    for template in templates {
        let sentences: Vec<String> = labels.iter().map(|label| template.replace("{}", label)).collect();
        let encoded = clip.encode_texts(&sentences)?;
        sum = Some(match sum {
            Some(sum) => sum + encoded,
            None => encoded,
        });
    }
    Ok(unit(sum.context("there is at least one template")?))
}

/// Rows to unit length.
fn unit(mut vectors: Array2<f32>) -> Array2<f32> {
    for mut row in vectors.axis_iter_mut(Axis(0)) {
        let length = row.dot(&row).sqrt().max(f32::MIN_POSITIVE);
        row /= length;
    }
    vectors
}

fn templates(given: &[String]) -> Result<Vec<String>> {
    if let Some(wrong) = given.iter().find(|template| !template.contains("{}")) {
        return Err(Usage(format!("the template `{wrong}` has no {{}} for the label")).into());
    }
    Ok(if given.is_empty() { vec!["{}".into()] } else { given.to_vec() })
}

fn labels(arguments: &Arguments) -> Result<Option<Vec<String>>> {
    let given = match &arguments.labels_file {
        Some(file) => {
            let text = std::fs::read_to_string(file).with_context(|| file.display().to_string())?;
            text.lines().map(str::to_owned).collect()
        }
        None if arguments.labels.is_empty() => return Ok(None),
        None => arguments.labels.clone(),
    };
    let labels: Vec<String> =
        given.iter().map(|label| label.trim().to_owned()).filter(|label| !label.is_empty()).collect();
    match labels.is_empty() {
        true => Err(Usage("there is no label among the labels".into()).into()),
        false => Ok(Some(labels)),
    }
}
