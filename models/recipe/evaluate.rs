//! How well a two-tower model knows a gallery of pictures.

use fastrand::Rng;
use ndarray::Array2;
use serde::Serialize;
use volary_multimodal::retrieval::{Recall, recall};

use super::data::{Gallery, Language};
use crate::error::Error;
use crate::pretrained::Clip;

/// Recall in both directions and the five-way questions, of one gallery in one language.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// The gallery.
    pub gallery: String,
    /// How many pictures.
    pub pictures: usize,
    /// The language of the names.
    pub language: Language,
    /// Each picture against all names.
    pub image_to_text: Recall,
    /// Each picture's name against all pictures.
    pub text_to_image: Recall,
    /// Share of five-way questions answered right.
    pub five_way: f64,
}

impl Score {
    /// The mean of scores in one language, as of one gallery of this name; `None` of none.
    pub fn mean(gallery: &str, scores: &[&Self]) -> Option<Self> {
        let first = scores.first()?;
        let mean =
            |of: fn(&Self) -> f64| scores.iter().map(|score| of(score)).sum::<f64>() / scores.len() as f64;
        Some(Self {
            gallery: gallery.into(),
            pictures: scores.iter().map(|score| score.pictures).sum(),
            language: first.language,
            image_to_text: Recall {
                at_1: mean(|score| score.image_to_text.at_1),
                at_5: mean(|score| score.image_to_text.at_5),
                at_10: mean(|score| score.image_to_text.at_10),
            },
            text_to_image: Recall {
                at_1: mean(|score| score.text_to_image.at_1),
                at_5: mean(|score| score.text_to_image.at_5),
                at_10: mean(|score| score.text_to_image.at_10),
            },
            five_way: mean(|score| score.five_way),
        })
    }
}

/// Scores `clip` on a gallery in both languages. The candidates are the bare names of all its concepts.
///
/// A five-way question shows a picture with its own name and those of four concepts of four other groups,
/// drawn with a fixed seed; one question a picture.
///
/// # Errors
/// If a picture or a name cannot be encoded.
pub fn evaluate(clip: &Clip, gallery: &Gallery) -> Result<Vec<Score>, Error> {
    let images = clip.encode_images(&gallery.pictures)?;
    let scores = Language::ALL.map(|language| -> Result<Score, Error> {
        let names: Vec<&str> =
            gallery.concepts.iter().map(|concept| concept.captions(language).name.as_str()).collect();
        let texts = clip.encode_texts(&names)?;
        let own = texts.select(ndarray::Axis(0), &gallery.targets);
        let each: Vec<usize> = (0..gallery.pictures.len()).collect();
        let d_embed = clip.d_embed();
        Ok(Score {
            gallery: gallery.name.clone(),
            pictures: gallery.pictures.len(),
            language,
            image_to_text: recall(rows(&images), rows(&texts), &gallery.targets, d_embed),
            text_to_image: recall(rows(&own), rows(&images), &each, d_embed),
            five_way: five_way(&images, &texts, gallery),
        })
    });
    scores.into_iter().collect()
}

/// Of vectors that were encoded together, one after the other.
pub(super) fn rows(array: &Array2<f32>) -> &[f32] {
    array.as_slice().expect("rows lie one after the other")
}

fn five_way(images: &Array2<f32>, texts: &Array2<f32>, gallery: &Gallery) -> f64 {
    let group = |concept: usize| gallery.concepts[concept].group.as_str();
    let mut groups: Vec<&str> = (0..gallery.concepts.len()).map(group).collect();
    groups.sort_unstable();
    groups.dedup();
    let mut rng = Rng::with_seed(5);
    let right = gallery.targets.iter().enumerate().filter(|&(picture, &target)| {
        let mut others: Vec<&str> = groups.iter().copied().filter(|&other| other != group(target)).collect();
        rng.shuffle(&mut others);
        let wrong: Vec<usize> = others
            .iter()
            .take(4)
            .map(|&other| {
                let members: Vec<usize> =
                    (0..gallery.concepts.len()).filter(|&concept| group(concept) == other).collect();
                members[rng.usize(0..members.len())]
            })
            .collect();
        let similarity = |concept: usize| images.row(picture).dot(&texts.row(concept));
        wrong.into_iter().all(|concept| similarity(concept) < similarity(target))
    });
    right.count() as f64 / gallery.targets.len().max(1) as f64
}

/// Among the first, five and ten, in percent.
pub(super) fn percent(recall: &Recall) -> String {
    format!("{:5.1} /{:5.1} /{:5.1}", 100.0 * recall.at_1, 100.0 * recall.at_5, 100.0 * recall.at_10)
}

/// The scores as lines of text.
pub fn table(scores: &[Score]) -> String {
    let mut lines = format!(
        "{:<16} {:>8}  {:<8} {:<21} {:<21} {}\n",
        "gallery", "pictures", "language", "image->text R@1/5/10", "text->image R@1/5/10", "five-way"
    );
    for score in scores {
        lines += &format!(
            "{:<16} {:>8}  {:<8} {:<21} {:<21} {:5.1}\n",
            score.gallery,
            score.pictures,
            score.language.name(),
            percent(&score.image_to_text),
            percent(&score.text_to_image),
            100.0 * score.five_way,
        );
    }
    lines
}
