//! Segmentations as pictures: a colour for every class, and back.
//!
//! The colours and the numbers are those of `SegGptImageProcessor` in transformers, after Wang et al. 2022
//! (<https://arxiv.org/abs/2212.02499>), section 3.1: what is segmented is a picture like any other.

use crate::image::{ImageError, Rgb8};
use crate::interpolation::Interpolation;
use crate::preprocess::{Normalize, Pixels};

/// A class per pixel, `[height, width]`, row by row; 0 is the background.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassMap {
    /// `[height, width]`
    pub classes: Vec<usize>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Why a class map cannot be painted.
#[derive(Debug, thiserror::Error)]
pub enum PaletteError {
    /// A class without a colour.
    #[error(
        "class {class} at row {row}, column {column}: the palette has {labels} classes and the background"
    )]
    Class {
        /// The class.
        class: usize,
        /// From the top.
        row: usize,
        /// From the left.
        column: usize,
        /// How many classes have a colour, without the background.
        labels: usize,
    },
    /// Sides and classes do not fit together.
    #[error(transparent)]
    Picture(#[from] ImageError),
}

/// Colours that are far from each other: black for the background, then one for each class.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Palette(Vec<[u8; 3]>);

impl Palette {
    /// The colours of so many classes, the background not counted: points of a grid in the cube of colours, white first.
    pub fn new(labels: usize) -> Self {
        let base = (labels as f64).powf(1.0 / 3.0) as usize + 1;
        let margin = 256 / base;
        let side = |steps: usize| 255_usize.saturating_sub(steps * margin) as u8;
        let colour = |at: usize| [side(at / (base * base)), side(at % (base * base) / base), side(at % base)];
        Self([[0; 3]].into_iter().chain((0..labels).map(colour)).collect())
    }

    /// The colours, the background's first.
    pub fn colours(&self) -> &[[u8; 3]] {
        &self.0
    }

    /// Every class in its colour.
    ///
    /// # Errors
    /// If a class has none, or the map's sides do not fit its classes.
    pub fn paint(&self, map: &ClassMap) -> Result<Rgb8, PaletteError> {
        let wrong = map.classes.iter().enumerate().find(|&(_, &class)| class >= self.0.len());
        if let Some((at, &class)) = wrong {
            let (row, column, labels) = (at / map.width.max(1), at % map.width.max(1), self.0.len() - 1);
            return Err(PaletteError::Class { class, row, column, labels });
        }
        let pixels = map.classes.iter().flat_map(|&class| self.0[class]).collect();
        Ok(Rgb8::new(map.width, map.height, pixels)?)
    }

    /// The class whose colour is nearest, for every pixel; the first of several that are.
    pub fn classes(&self, painting: &Painting) -> ClassMap {
        let nearest = |pixel: [f32; 3]| {
            let distance = |colour: &[u8; 3]| -> f32 {
                pixel.iter().zip(colour).map(|(value, &side)| (value - f32::from(side)).powi(2)).sum()
            };
            let mut best = (0, f32::INFINITY);
            for (class, distance) in self.0.iter().map(distance).enumerate() {
                if distance < best.1 {
                    best = (class, distance);
                }
            }
            best.0
        };
        let &Painting { height, width, .. } = painting;
        ClassMap { classes: painting.pixels().map(nearest).collect(), height, width }
    }
}

/// What a model painted, colours from 0 to 255: `[3, height, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Painting {
    /// As the model makes them: some lie outside, and are cut off when they are looked at.
    data: Vec<f32>,
    height: usize,
    width: usize,
}

impl Painting {
    /// Pixels as a model makes them, with the scale of 0 to 1 and the normalisation of its preprocessor undone.
    ///
    /// # Panics
    /// If there are not 3 channels.
    pub fn new(pixels: &Pixels, normalize: Option<Normalize>) -> Self {
        let &Pixels { channels, height, width, .. } = pixels;
        assert_eq!(channels, 3, "channels (left) of a painting");
        let of_channel = |(channel, values): (usize, &[f32])| -> Vec<f32> {
            let undo = |value: f32| normalize.map_or(value, |n| value * n.std[channel] + n.mean[channel]);
            values.iter().map(|&value| undo(value) * 255.0).collect()
        };
        let data = pixels.data.chunks_exact(height * width).enumerate().flat_map(of_channel).collect();
        Self { data, height, width }
    }

    /// The same as large as a picture of `[height, width]`. What lies outside of 0 to 255 is cut off before, but for
    /// [`Interpolation::Bicubic`], which overshoots itself.
    pub fn resized(mut self, size: [usize; 2], interpolation: Interpolation) -> Self {
        if interpolation != Interpolation::Bicubic {
            self.data.iter_mut().for_each(|value| *value = shown(*value));
        }
        let (from, [height, width]) = ([self.height, self.width], size);
        let maps = self.data.chunks_exact(self.height * self.width);
        let data = maps.flat_map(|map| interpolation.resize(map, from, size)).collect();
        Self { data, height, width }
    }

    /// As a picture: fractions are cut off.
    pub fn to_rgb(&self) -> Rgb8 {
        let pixels = self.pixels().flatten().map(|value| value as u8).collect();
        Rgb8 { width: self.width, height: self.height, pixels }
    }

    /// Red, green and blue of every pixel, row by row.
    pub fn pixels(&self) -> impl Iterator<Item = [f32; 3]> {
        let size = self.height * self.width;
        (0..size).map(move |at| [at, size + at, 2 * size + at].map(|at| shown(self.data[at])))
    }
}

/// What lies outside of 0 to 255 is cut off.
fn shown(value: f32) -> f32 {
    value.clamp(0.0, 255.0)
}

/// A segmentation laid over its picture: 4 parts of the picture, and 6 of it in the light of the painting. Both are as
/// large.
///
/// The look of the authors' own `seggpt_inference.py`.
///
/// # Errors
/// If they are not of one size.
pub fn overlay(picture: &Rgb8, painting: &Rgb8) -> Result<Rgb8, ImageError> {
    let (width, height) = (picture.width(), picture.height());
    if [painting.width(), painting.height()] != [width, height] {
        let (expected, found) = (picture.pixels().len() as u64, painting.pixels().len());
        return Err(ImageError::Length { width, height, expected, found });
    }
    let lit =
        |(&pixel, &light): (&u8, &u8)| (f64::from(pixel) * (0.6 * f64::from(light) / 255.0 + 0.4)) as u8;
    let pixels = picture.pixels().iter().zip(painting.pixels()).map(lit).collect();
    Rgb8::new(width, height, pixels)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `build_palette` in transformers' `image_processing_seggpt.py`; 64 ** (1 / 3) falls short of 4.
    #[test]
    fn colours_of_the_reference() {
        assert_eq!(Palette::new(0).colours(), [[0; 3]]);
        assert_eq!(Palette::new(1).colours(), [[0; 3], [255; 3]]);
        let five = [[0; 3], [255; 3], [255, 255, 127], [255, 127, 255], [255, 127, 127], [127, 255, 255]];
        assert_eq!(Palette::new(5).colours(), five);
        assert_eq!(Palette::new(64).colours()[64], [63; 3]);
    }

    #[test]
    fn what_is_painted_is_recognised_again() {
        let palette = Palette::new(30);
        let classes: Vec<usize> = (0..31).chain([7, 7, 0, 30, 12]).collect();
        let map = ClassMap { classes, height: 4, width: 9 };
        let painted = palette.paint(&map).unwrap();
        let data = (0..3).flat_map(|channel| painted.pixels()[channel..].iter().step_by(3).copied());
        let data = data.map(|value| f32::from(value) / 255.0).collect();
        let painting = Painting::new(&Pixels { data, channels: 3, height: 4, width: 9 }, None);
        assert_eq!(palette.classes(&painting), map);
        let twice = palette.classes(&painting.resized([8, 18], Interpolation::Nearest));
        assert_eq!(twice.classes[..18], twice.classes[18..36]);
        assert_eq!(twice.classes[..18].iter().step_by(2).copied().collect::<Vec<_>>(), map.classes[..9]);
    }

    /// What is too bright counts as 255 between two pixels, but in a cubic as it was painted.
    #[test]
    fn what_lies_outside_is_cut_off_where_the_authors_do_it() {
        let painting = || {
            let data = [[0.0, 2.0], [0.0, 1.0], [-1.0, 1.0]].concat();
            Painting::new(&Pixels { data, channels: 3, height: 1, width: 2 }, None)
        };
        assert_eq!(painting().to_rgb().pixels(), [0, 0, 0, 255, 255, 255]);
        let middle =
            |interpolation| painting().resized([1, 4], interpolation).to_rgb().pixels()[3..9].to_vec();
        assert_eq!(middle(Interpolation::Nearest), [0, 0, 0, 255, 255, 255]);
        assert_eq!(middle(Interpolation::Bilinear), [63, 63, 63, 191, 191, 191]);
        // 0.2265625 of the way and 0.7734375
        assert_eq!(middle(Interpolation::Bicubic), [115, 57, 0, 255, 197, 139]);
    }

    #[test]
    fn a_class_without_a_colour_is_told() {
        let map = ClassMap { classes: vec![0, 1, 2, 255, 0, 0], height: 2, width: 3 };
        let message = Palette::new(5).paint(&map).unwrap_err().to_string();
        assert_eq!(message, "class 255 at row 1, column 0: the palette has 5 classes and the background");
        let map = ClassMap { classes: vec![0; 5], height: 2, width: 3 };
        assert!(matches!(Palette::new(5).paint(&map), Err(PaletteError::Picture(_))));
    }

    #[test]
    fn an_overlay_is_dark_where_nothing_was_painted() {
        let picture = Rgb8::new(2, 1, vec![100, 200, 50, 100, 200, 50]).unwrap();
        let painting = Rgb8::new(2, 1, vec![0, 0, 0, 255, 255, 0]).unwrap();
        let found = overlay(&picture, &painting).unwrap();
        assert_eq!(found.pixels(), [40, 80, 20, 100, 200, 20]);
        assert!(overlay(&picture, &Rgb8::new(1, 1, vec![0; 3]).unwrap()).is_err());
    }
}
