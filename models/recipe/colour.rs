//! Pictures in colours that nobody drew them in, with captions that say so: `a blue banana`.

use volary_vision::image::Rgb8;

use super::data::{Concept, Language};
use super::run::mix;

/// A colour and its names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Colour {
    /// English, an adjective.
    pub en: &'static str,
    /// Chinese, before 的.
    pub zh: &'static str,
    /// sRGB of its middle tone.
    pub rgb: [u8; 3],
}

/// The colours that pictures are painted in.
pub const COLOURS: [Colour; 8] = [
    Colour { en: "red", zh: "红色", rgb: [214, 40, 40] },
    Colour { en: "orange", zh: "橙色", rgb: [245, 130, 20] },
    Colour { en: "yellow", zh: "黄色", rgb: [245, 205, 30] },
    Colour { en: "green", zh: "绿色", rgb: [60, 165, 60] },
    Colour { en: "blue", zh: "蓝色", rgb: [40, 105, 220] },
    Colour { en: "purple", zh: "紫色", rgb: [135, 60, 190] },
    Colour { en: "pink", zh: "粉色", rgb: [245, 120, 175] },
    Colour { en: "grey", zh: "灰色", rgb: [130, 130, 130] },
];

/// Groups whose pictures stay what they are in another colour.
const PAINTABLE: [&str; 5] = ["animals-nature", "food-drink", "travel-places", "activities", "objects"];

/// Words in whose company another colour would be a contradiction.
const WORDS: [&str; 11] =
    ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "rainbow"];

/// Whether pictures of a concept are painted at all: a thing, whose name says no colour.
pub fn is_paintable(concept: &Concept) -> bool {
    let name = &concept.en.name;
    PAINTABLE.contains(&concept.group.as_str())
        && !name.split([' ', '-', ':']).any(|word| WORDS.contains(&word))
}

/// Whether a concept is never trained on in a colour: one pair in eight, by the name and the colour alone.
pub fn is_held_out(concept: &Concept, colour: usize) -> bool {
    let letters = concept.hexcode.bytes().map(u64::from);
    let name = letters.fold(0, |name, letter| mix([name, letter]));
    mix([name, colour as u64]).is_multiple_of(8)
}

impl Colour {
    /// `blue banana`, `蓝色的香蕉`.
    pub fn caption(&self, name: &str, language: Language) -> String {
        match language {
            Language::En => format!("{} {name}", self.en),
            Language::Zh => format!("{}的{name}", self.zh),
        }
    }

    /// Paints a picture that is over white.
    pub fn over_white(&self, picture: &Rgb8) -> Rgb8 {
        let rgba: Vec<u8> =
            picture.pixels().chunks_exact(3).flat_map(|rgb| [rgb[0], rgb[1], rgb[2], 255]).collect();
        let painted =
            self.paint(&rgba).chunks_exact(4).flat_map(|rgba| [rgba[0], rgba[1], rgba[2]]).collect();
        Rgb8::new(picture.width(), picture.height(), painted).expect("as many pixels")
    }

    /// Paints straight-alpha RGBA: every pixel's lightness stays, between black, the colour and white.
    pub fn paint(&self, rgba: &[u8]) -> Vec<u8> {
        let luma = |rgb: &[u8]| {
            (0.299 * f32::from(rgb[0]) + 0.587 * f32::from(rgb[1]) + 0.114 * f32::from(rgb[2])) / 255.0
        };
        let middle = luma(&self.rgb);
        let painted = rgba.chunks_exact(4).flat_map(|pixel| {
            // what was of middle lightness takes the colour; what was nearly black or white stays so
            let light = luma(pixel);
            let target = middle + 0.45 * (light - 0.6);
            let channel = |colour: u8| {
                let colour = f32::from(colour) / 255.0;
                let value = if target <= middle {
                    colour * (target / middle).max(0.0)
                } else {
                    colour + (1.0 - colour) * ((target - middle) / (1.0 - middle)).min(1.0)
                };
                let kept = ((light - 0.9) * 10.0).max((0.1 - light) * 10.0).clamp(0.0, 1.0);
                ((value * (1.0 - kept) + light * kept) * 255.0).round() as u8
            };
            [channel(self.rgb[0]), channel(self.rgb[1]), channel(self.rgb[2]), pixel[3]]
        });
        painted.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::data::Captions;

    fn concept(name: &str, group: &str) -> Concept {
        let captions = |name: &str| Captions { name: name.into(), keywords: vec![] };
        let (en, zh) = (captions(name), captions("香蕉"));
        Concept { hexcode: "1F34C".into(), emoji: "🍌".into(), group: group.into(), en, zh }
    }

    #[test]
    fn black_white_and_what_is_transparent_stay() {
        for colour in COLOURS {
            assert_eq!(colour.paint(&[0, 0, 0, 255, 255, 255, 255, 0]), [0, 0, 0, 255, 255, 255, 255, 0]);
        }
    }

    #[test]
    fn what_is_painted_has_the_colour_s_hue() {
        let [red, .., blue] = COLOURS[4].paint(&[240, 200, 40, 200])[..3] else { panic!() };
        assert!(blue > red + 60, "{red} {blue}");
        let grey = COLOURS[7].paint(&[240, 100, 40, 255]);
        assert!(grey[0] == grey[1] && grey[1] == grey[2]);
    }

    #[test]
    fn captions_say_it() {
        assert_eq!(COLOURS[4].caption("banana", Language::En), "blue banana");
        assert_eq!(COLOURS[4].caption("香蕉", Language::Zh), "蓝色的香蕉");
    }

    #[test]
    fn flags_and_blue_books_are_not_painted() {
        assert!(is_paintable(&concept("banana", "food-drink")));
        assert!(!is_paintable(&concept("blue book", "objects")));
        assert!(!is_paintable(&concept("flag: France", "flags")));
    }

    #[test]
    fn about_one_pair_in_eight_is_held_out() {
        let held = (0..1000).filter(|code| {
            let concept = Concept { hexcode: format!("{code:X}"), ..concept("banana", "food-drink") };
            is_held_out(&concept, 3)
        });
        let count = held.count();
        assert!((80..170).contains(&count), "{count}");
    }
}
