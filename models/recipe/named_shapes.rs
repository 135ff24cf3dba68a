//! Drawn shapes with their names in English and Chinese, for a tiny CLIP: what is learned of a colour and of a form is to serve
//! for the two together, also where they never met.

use fastrand::Rng;

use super::contrastive::Recipe;
use super::data::{Captions, Concept, Dataset, Gallery, Language, Style};
use super::evaluate::{Score, evaluate};
use super::run::mix;
use super::shapes::{Form, SIDE, alone};
use crate::error::Error;
use crate::folder::Folder;
use crate::pretrained::Clip;

/// The model's folder without weights and tokenizer.
pub const SHAPES_CLIP: Folder = Folder::Embedded {
    name: "shapes-clip",
    files: &[
        ("open_clip_config.json", include_bytes!("named_shapes/open_clip_config.json")),
        ("preprocessor_config.json", include_bytes!("named_shapes/preprocessor_config.json")),
        ("tokenizer_config.json", include_bytes!("named_shapes/tokenizer_config.json")),
    ],
    parts: &[],
};

/// Styles that are learned from.
pub const STYLES: usize = 32;

/// Pairs that are computed at once.
pub const CHUNK: usize = 16;

/// The run that the documentation speaks of.
pub fn recipe() -> Recipe {
    Recipe {
        steps: 600,
        batch: 64,
        learning_rate: 2e-3,
        warmup: 50,
        in_batch: 1.0,
        bank_period: 8,
        augmentation: 0.25,
        checkpoint_every: 100,
        chunk: Some(CHUNK),
        ..Recipe::default()
    }
}

/// A hue, in turns, and what it is called.
const COLOURS: [(f32, &str, &str); 8] = [
    (0.0, "red", "红色"),
    (0.08, "orange", "橙色"),
    (0.16, "yellow", "黄色"),
    (0.33, "green", "绿色"),
    (0.5, "cyan", "青色"),
    (0.65, "blue", "蓝色"),
    (0.77, "purple", "紫色"),
    (0.89, "pink", "粉色"),
];

const FORMS: [(Form, &str, &str); 6] = [
    (Form::Disc, "circle", "圆形"),
    (Form::Square, "square", "方形"),
    (Form::Triangle, "triangle", "三角形"),
    (Form::Diamond, "diamond", "菱形"),
    (Form::Cross, "cross", "十字形"),
    (Form::HalfDisc, "half circle", "半圆形"),
];

/// A colour and a form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Thing {
    colour: usize,
    form: usize,
}

impl Thing {
    /// All that there are, and those of them that are learned: of each colour one form is not.
    fn all() -> impl Iterator<Item = Self> {
        (0..COLOURS.len()).flat_map(|colour| (0..FORMS.len()).map(move |form| Self { colour, form }))
    }

    fn is_learned(self) -> bool {
        self.form != self.colour % FORMS.len()
    }

    fn concept(self) -> Concept {
        let ((_, colour_en, colour_zh), (_, form_en, form_zh)) = (COLOURS[self.colour], FORMS[self.form]);
        let captions = |name| Captions { name, keywords: Vec::new() };
        Concept {
            hexcode: format!("{colour_en}-{form_en}"),
            emoji: String::new(),
            group: form_en.into(),
            en: captions(format!("{colour_en} {form_en}")),
            zh: captions(format!("{colour_zh}{form_zh}")),
        }
    }

    fn draw(self, rng: &mut Rng) -> Vec<u8> {
        let hue = COLOURS[self.colour].0 + 0.04 * (rng.f32() - 0.5);
        alone(FORMS[self.form].0, hue, rng)
    }
}

/// Pictures of the things that `wanted` accepts, one of each in each of so many styles. The same seed draws the same.
fn draw(wanted: impl Fn(Thing) -> bool, styles: usize, seed: u64) -> Dataset {
    let things: Vec<Thing> = Thing::all().filter(|&thing| wanted(thing)).collect();
    let style = |style: usize| {
        let mut rng = Rng::with_seed(mix([seed, style as u64, 0]));
        Style {
            name: format!("hand {style}"),
            pixels: things.iter().flat_map(|thing| thing.draw(&mut rng)).collect(),
            concepts: (0..things.len()).collect(),
        }
    };
    Dataset {
        size: SIDE,
        concepts: things.iter().map(|thing| thing.concept()).collect(),
        styles: (0..styles).map(style).collect(),
    }
}

/// What is learned: each of 40 things in so many styles.
pub fn learned(styles: usize, seed: u64) -> Dataset {
    draw(Thing::is_learned, styles, seed)
}

/// Which pictures are asked about; the names of all 48 things are to choose from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// One picture of each thing.
    All,
    /// One of each thing that was not learned: its colour and its form were, apart from each other.
    Unseen,
}

/// New pictures of these things, a gallery for each style.
pub fn galleries(asked: Asked, styles: usize, seed: u64) -> Vec<Gallery> {
    let data = draw(|_| true, styles, seed);
    let of_style = |style: usize| {
        let concepts = &data.styles[style].concepts;
        let things: Vec<Thing> = Thing::all().collect();
        let shown: Vec<usize> = (0..concepts.len())
            .filter(|&picture| asked == Asked::All || !things[concepts[picture]].is_learned())
            .collect();
        Gallery {
            name: data.styles[style].name.clone(),
            pictures: shown.iter().map(|&picture| data.over_white(style, picture)).collect(),
            targets: shown.iter().map(|&picture| concepts[picture]).collect(),
            concepts: data.concepts.clone(),
        }
    };
    (0..styles).map(of_style).collect()
}

/// The scores in each language of [`galleries`], means over the styles.
///
/// # Errors
/// If a picture or a name cannot be encoded.
pub fn scores(clip: &Clip, asked: Asked, styles: usize, seed: u64) -> Result<Vec<Score>, Error> {
    let galleries = galleries(asked, styles, seed);
    let of_styles: Vec<Vec<Score>> =
        galleries.iter().map(|gallery| evaluate(clip, gallery)).collect::<Result<_, _>>()?;
    let name = match asked {
        Asked::All => "all",
        Asked::Unseen => "unseen",
    };
    let of_language = |language| -> Option<Score> {
        let scores: Vec<&Score> =
            of_styles.iter().flatten().filter(|score| score.language == language).collect();
        Score::mean(name, &scores)
    };
    Ok(Language::ALL.into_iter().filter_map(of_language).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight things are not learned, but their colours and forms are; every picture is asked about by its own name.
    #[test]
    fn what_is_not_learned_is_made_of_what_is() {
        let learned = learned(2, 1);
        let names = |concepts: &[Concept]| -> Vec<[String; 2]> {
            concepts.iter().map(|concept| [concept.en.name.clone(), concept.zh.name.clone()]).collect()
        };
        let learned_names = names(&learned.concepts);
        assert_eq!(learned_names.len(), 40);
        assert!(learned_names.contains(&["red half circle".into(), "红色半圆形".into()]));
        let [all, unseen] = [Asked::All, Asked::Unseen].map(|asked| galleries(asked, 1, 1).remove(0));
        assert_eq!([all.pictures.len(), unseen.pictures.len()], [48, 8]);
        let all_names = names(&all.concepts);
        assert_eq!(all_names, names(&unseen.concepts));
        for (picture, &target) in unseen.pictures.iter().zip(&unseen.targets) {
            assert_eq!(picture, &all.pictures[target]);
            let [en, zh] = &all_names[target];
            assert!(!learned_names.contains(&all_names[target]), "{en}");
            let (colour, form) = en.split_once(' ').unwrap();
            let other = |part: &str| learned_names.iter().any(|[name, _]| name != en && name.contains(part));
            assert!(other(colour) && other(form), "{en} {zh}");
        }
    }

    /// Of the pixels that are covered, all have the hue of the name: of red ones red is the most, of blue ones blue.
    #[test]
    fn colours_are_what_they_are_called() {
        let data = learned(3, 2);
        for (style, picture) in data.pictures() {
            let name = &data.concepts[data.styles[style].concepts[picture]].en.name;
            let bytes = data.picture(style, picture).chunks_exact(4);
            let covered: Vec<&[u8]> = bytes.filter(|pixel| pixel[3] > 0).collect();
            assert!(covered.len() > 20 && covered.iter().all(|pixel| *pixel == covered[0]), "{name}");
            let strongest = (0..3).max_by_key(|&channel| covered[0][channel]).unwrap();
            for (colour, channel) in [("red", 0), ("green", 1), ("blue", 2)] {
                assert!(!name.starts_with(colour) || strongest == channel, "{name} {:?}", covered[0]);
            }
        }
    }
}
