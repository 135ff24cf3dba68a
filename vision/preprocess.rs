//! From a picture to `pixel_values`: what a checkpoint's own files say, as the reference library would do it.
//!
//! Three libraries describe preprocessing in three files, and round differently:
//! - transformers 5.23 (`preprocessor_config.json`, or `image_processor` in `processor_config.json`), PIL backend;
//! - open_clip 3.3 (`open_clip_config.json`);
//! - timm 1.0 (`pretrained_cfg` in `config.json`).
//!
//! [`Preprocessor`] is what all of them come down to, as data: resize, crop, scale, normalise.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use rayon::prelude::*;

use crate::image::{Background, MAX_PIXELS, Picture, Rgb8, Storage};
use crate::resample::{self, Filter, Samples};

mod config;

/// The longest side that a configuration may ask for.
pub const MAX_SIDE: usize = 1 << 14;

/// Which size a picture is resized to. Sizes are `[height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resize {
    /// None: it stays as it is.
    Keep,
    /// Exactly this; the aspect ratio is not kept.
    Exact([usize; 2]),
    /// The shorter side gets this length, the longer one `int(length * long / short)`.
    ShortestEdge(usize),
    /// As [`Resize::ShortestEdge`], but smaller where the longer side would exceed `longest`.
    ShortestEdgeUpTo {
        /// The length of the shorter side, if there is room.
        shortest: usize,
        /// What the longer side may not exceed.
        longest: usize,
    },
    /// As large as fits, sides truncated (transformers' `max_height` and `max_width`).
    Within([usize; 2]),
    /// As small as covers this, sides rounded (timm's and open_clip's `ResizeKeepRatio`, `longest=0`).
    Cover([usize; 2]),
    /// As large as fits into this, sides rounded (`ResizeKeepRatio`, `longest=1`).
    Contain([usize; 2]),
}

impl Resize {
    /// The size, `[height, width]`, that a picture of `[height, width]` gets; at least 1 each way.
    pub fn target(self, [height, width]: [usize; 2]) -> [usize; 2] {
        // Python's `int(a * b / c)`
        let part = |a: usize, b: usize, c: usize| (a as f64 * b as f64 / c as f64) as usize;
        let shortest_edge = |edge| match width <= height {
            true => [part(edge, height, width), edge],
            false => [edge, part(edge, width, height)],
        };
        let keep_ratio =
            |ratio: f64| [height, width].map(|side| (side as f64 / ratio).round_ties_even() as usize);
        let ratios = |[h, w]: [usize; 2]| [height as f64 / h as f64, width as f64 / w as f64];
        let size = match self {
            Resize::Keep => [height, width],
            Resize::Exact(size) => size,
            Resize::ShortestEdge(edge) => shortest_edge(edge),
            Resize::ShortestEdgeUpTo { shortest, longest } => {
                let [short, long] = [height.min(width) as f64, height.max(width) as f64];
                if long / short * shortest as f64 > longest as f64 {
                    let raw = longest as f64 * short / long;
                    let edge = raw.round_ties_even() as usize;
                    match (edge == height.min(width), width < height) {
                        (true, _) => [height, width],
                        (false, true) => [(raw * height as f64 / width as f64) as usize, edge],
                        (false, false) => [edge, (raw * width as f64 / height as f64) as usize],
                    }
                } else {
                    shortest_edge(shortest)
                }
            }
            Resize::Within([h, w]) => {
                let scale = (h as f64 / height as f64).min(w as f64 / width as f64);
                [height, width].map(|side| (side as f64 * scale) as usize)
            }
            Resize::Cover(size) => keep_ratio(ratios(size)[0].min(ratios(size)[1])),
            Resize::Contain(size) => keep_ratio(ratios(size)[0].max(ratios(size)[1])),
        };
        size.map(|side| side.max(1))
    }
}

/// How a library rounds when what it cuts off, or adds, is odd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Centre {
    /// transformers: the cut starts at `floor((side - crop) / 2)`; padding puts the odd pixel before the picture.
    Floor,
    /// torchvision: the cut starts at the nearest (ties to even); padding puts the odd pixel after the picture.
    Nearest,
}

/// A cut from the centre, with padding where the picture is smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Crop {
    /// `[height, width]` of the result.
    pub size: [usize; 2],
    /// How halves are rounded.
    pub centre: Centre,
    /// The colour of the padding.
    pub fill: [u8; 3],
}

impl Crop {
    /// Where the cut starts along one side; negative where padding comes first.
    fn start(self, side: usize, crop: usize) -> isize {
        let spare = side as isize - crop as isize;
        match self.centre {
            Centre::Floor => spare.div_euclid(2),
            Centre::Nearest if spare < 0 => spare / 2,
            Centre::Nearest => (spare as f64 / 2.0).round_ties_even() as isize,
        }
    }
}

/// How samples 0 to 255 become numbers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rescale {
    /// They stay 0 to 255.
    Keep,
    /// Times a factor, in double precision, rounded to f32 (transformers).
    Times(f64),
    /// The same, less 1 in f32 (`rescale_offset` of EfficientNet's).
    TimesLessOne(f64),
    /// Divided by 255 in f32 (torchvision).
    Over255,
}

/// `(x - mean) / std` for each channel, in f32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalize {
    /// Subtracted first.
    pub mean: [f32; 3],
    /// Divided by then; never zero.
    pub std: [f32; 3],
}

/// When a stored picture turns into RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Convert {
    /// Before anything else, with this background.
    First(Background),
    /// After resizing and cropping (open_clip): transparency weighs the colours that are averaged, and a palette
    /// cannot be averaged at all, so such a picture is resized by [`Filter::Nearest`].
    Last,
}

/// What is done to a picture before a model sees it.
///
/// The references do these steps in this order; each may be absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Preprocessor {
    /// When, and over what, a [`Picture`] turns into RGB. An [`Rgb8`] is past it.
    pub convert: Convert,
    /// To which size.
    pub resize: Resize,
    /// With which kernel.
    pub filter: Filter,
    /// What is cut out.
    pub crop: Option<Crop>,
    /// On which scale.
    pub rescale: Rescale,
    /// About which mean.
    pub normalize: Option<Normalize>,
}

/// One preprocessed picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Pixels {
    /// `[channels, height, width]`
    pub data: Vec<f32>,
    /// 3: red, green, blue.
    pub channels: usize,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
}

/// Why a preprocessor could not be read, or a picture not be preprocessed.
#[derive(Debug, thiserror::Error)]
pub enum PreprocessError {
    /// The folder has no file that describes preprocessing.
    #[error("{}: no preprocessor; looked for {}", folder.display(), looked_for.join(", "))]
    Missing {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The files that would have described it.
        looked_for: &'static [&'static str],
    },
    /// A file could not be read.
    #[error("{}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not JSON.
    #[error("{}: not valid JSON: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The file's name says nothing about its kind.
    #[error("{}: not a preprocessor file; known are {}", file.display(), known.join(", "))]
    UnknownFile {
        /// The file.
        file: PathBuf,
        /// The names that are read.
        known: &'static [&'static str],
    },
    /// The image processor is none of those that are implemented.
    #[error("{}: {found} is not a known image processor; known are {}", file.display(), known.join(", "))]
    UnknownType {
        /// The file.
        file: PathBuf,
        /// What it names.
        found: String,
        /// What is implemented.
        known: Vec<String>,
    },
    /// A field holds what it should not.
    #[error("{}: `{field}`: expected {expected}, found {found}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, dotted.
        field: String,
        /// What may stand there.
        expected: String,
        /// What stands there.
        found: String,
    },
    /// A picture would become unreasonably large.
    #[error("a {}x{} picture would be resized to {}x{}; at most {limit} pixels are made", from[1], from[0], to[1], to[0])]
    TooLarge {
        /// `[height, width]` before.
        from: [usize; 2],
        /// `[height, width]` after.
        to: [usize; 2],
        /// The limit.
        limit: u64,
    },
    /// Pictures of different sizes cannot be one batch.
    #[error("picture {index} of the batch is {}x{} after preprocessing, picture 0 is {}x{}", found[1], found[0], expected[1], expected[0])]
    Ragged {
        /// Which picture.
        index: usize,
        /// `[height, width]` of the first.
        expected: [usize; 2],
        /// `[height, width]` of this one.
        found: [usize; 2],
    },
    /// A batch has at least one picture.
    #[error("a batch of no pictures")]
    EmptyBatch,
}

impl Preprocessor {
    /// The preprocessor of a checkpoint folder, from the first of these that is there: `processor_config.json` (with
    /// an `image_processor`), `preprocessor_config.json`, `open_clip_config.json`, `config.json` (timm's).
    ///
    /// # Errors
    /// When there is none, or it cannot be followed exactly.
    pub fn from_folder(folder: &Path) -> Result<Self, PreprocessError> {
        config::from_folder(folder)
    }

    /// The preprocessor that one file describes; its name says which library's it is.
    ///
    /// # Errors
    /// When the file cannot be read, or not be followed exactly.
    pub fn from_file(file: &Path) -> Result<Self, PreprocessError> {
        config::from_json(file, &config::text(file)?)
    }

    /// As [`Preprocessor::from_file`], for a file's content; `file` need not exist, its name says which library's
    /// it is, and errors name it.
    ///
    /// # Errors
    /// When it cannot be followed exactly.
    pub fn from_json(file: &Path, json: &str) -> Result<Self, PreprocessError> {
        config::from_json(file, json)
    }

    /// `[height, width]` of what comes out, unless that depends on the picture.
    pub fn image_size(&self) -> Option<[usize; 2]> {
        match (self.crop, self.resize) {
            (Some(crop), _) => Some(crop.size),
            (None, Resize::Exact(size)) => Some(size),
            _ => None,
        }
    }

    /// Preprocesses an RGB picture: `[3, height, width]`.
    ///
    /// # Errors
    /// When nothing bounds the result and the picture is so long and thin that it would be too large.
    pub fn apply(&self, image: &Rgb8) -> Result<Pixels, PreprocessError> {
        let samples =
            Samples { height: image.height(), width: image.width(), channels: 3, data: image.pixels() };
        let fill = self.crop.map_or([0; 3], |crop| crop.fill);
        Ok(self.scale(self.place(samples, self.filter, fill)?))
    }

    /// Preprocesses a picture as the reference does when it opens the file itself, transparency and palette
    /// included: `[3, height, width]`. For opaque pictures without a palette this is [`Preprocessor::apply`].
    ///
    /// # Errors
    /// As [`Preprocessor::apply`].
    pub fn apply_picture(&self, picture: &Picture) -> Result<Pixels, PreprocessError> {
        let fill = self.crop.map_or([0; 3], |crop| crop.fill);
        match (self.convert, &picture.storage) {
            (Convert::First(background), _) => self.apply(&picture.to_rgb(background)),
            (Convert::Last, Storage::Direct) => self.apply(&picture.to_rgb(Background::DropAlpha)),
            (Convert::Last, Storage::Indexed(palette)) => {
                let rgb = picture.to_rgb(Background::DropAlpha);
                let samples =
                    Samples { height: rgb.height(), width: rgb.width(), channels: 3, data: rgb.pixels() };
                let fill = palette.get(usize::from(fill[0])).copied().unwrap_or_default();
                Ok(self.scale(self.place(samples, Filter::Nearest, fill)?))
            }
            (Convert::Last, Storage::Alpha) => {
                let [height, width] = [picture.height, picture.width];
                let resized = self.resize.target([height, width]) != [height, width];
                let weighed = resized && self.filter != Filter::Nearest;
                let premultiplied: Vec<u8> = match weighed {
                    true => picture.pixels.chunks_exact(4).flat_map(premultiply).collect(),
                    false => picture.pixels.clone(),
                };
                let samples = Samples { height, width, channels: 4, data: &premultiplied };
                let mut placed = self.place(samples, self.filter, fill)?;
                placed.data = match weighed {
                    true => placed.data.chunks_exact(4).flat_map(unpremultiply).collect(),
                    false => placed.data.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect(),
                };
                placed.channels = 3;
                Ok(self.scale(placed))
            }
        }
    }

    /// Preprocesses RGB pictures in parallel: `[batch, 3, height, width]`.
    ///
    /// # Errors
    /// When there are none, when their sizes differ afterwards, or as [`Preprocessor::apply`].
    pub fn batch(&self, images: &[Rgb8], device: &Device) -> Result<Tensor<4>, PreprocessError> {
        let pixels: Result<Vec<Pixels>, _> = images.par_iter().map(|image| self.apply(image)).collect();
        stack(&pixels?, device)
    }

    /// Resizes and cuts: `[height, width, channels]`.
    fn place(&self, source: Samples<'_>, filter: Filter, fill: [u8; 3]) -> Result<Placed, PreprocessError> {
        let from = [source.height, source.width];
        let to = self.resize.target(from);
        let size = self.crop.map_or(to, |crop| crop.size);
        let limited =
            |[height, width]: [usize; 2]| (height as u64).saturating_mul(width as u64) <= MAX_PIXELS;
        if !limited(size) {
            return Err(PreprocessError::TooLarge { from, to: size, limit: MAX_PIXELS });
        }
        // Along each side: where the cut starts, and which part of it lies within the resized picture.
        let [top, left] =
            [0, 1].map(|side| self.crop.map_or(0, |crop| crop.start(to[side], crop.size[side])));
        let inside = |start: isize, side: usize, length: usize| {
            start.max(0) as usize..side.min((start + length as isize).max(0) as usize)
        };
        let window = [inside(top, to[0], size[0]), inside(left, to[1], size[1])];
        let channels = source.channels;
        let [above, before] = [top, left].map(|start| start.min(0).unsigned_abs());
        let columns = window[1].len();
        let visible = match to == from {
            true => window[0]
                .clone()
                .flat_map(|y| {
                    &source.data[(y * from[1] + window[1].start) * channels..][..columns * channels]
                })
                .copied()
                .collect(),
            false => resample::resize(source, to, window, filter),
        };
        let [height, width] = size;
        if visible.len() == height * width * channels {
            return Ok(Placed { height, width, channels, data: visible });
        }
        let mut data: Vec<u8> = [fill[0], fill[1], fill[2], 255][..channels]
            .iter()
            .copied()
            .cycle()
            .take(height * width * channels)
            .collect();
        for (y, row) in visible.chunks_exact(columns * channels).enumerate() {
            data[((above + y) * width + before) * channels..][..row.len()].copy_from_slice(row);
        }
        Ok(Placed { height, width, channels, data })
    }

    /// Samples to numbers, `[height, width, 3]` to `[3, height, width]`. There are only 256 samples for each channel,
    /// so each is computed once, in the reference's order and precision.
    fn scale(&self, placed: Placed) -> Pixels {
        let Placed { height, width, data, .. } = placed;
        let number = |channel: usize, sample: u8| {
            let x = match self.rescale {
                Rescale::Keep => f32::from(sample),
                Rescale::Times(factor) => (f64::from(sample) * factor) as f32,
                Rescale::TimesLessOne(factor) => (f64::from(sample) * factor) as f32 - 1.0,
                Rescale::Over255 => f32::from(sample) / 255.0,
            };
            self.normalize.map_or(x, |n| (x - n.mean[channel]) / n.std[channel])
        };
        let data = (0..3)
            .flat_map(|channel| {
                let table: Vec<f32> = (0..=255).map(|sample| number(channel, sample)).collect();
                data[channel..].iter().step_by(3).map(move |&sample| table[usize::from(sample)])
            })
            .collect();
        Pixels { data, channels: 3, height, width }
    }
}

/// Pictures of one size as a tensor: `[batch, 3, height, width]`.
///
/// # Errors
/// When there are none, or their sizes differ.
pub fn stack(pixels: &[Pixels], device: &Device) -> Result<Tensor<4>, PreprocessError> {
    let first = pixels.first().ok_or(PreprocessError::EmptyBatch)?;
    let expected = [first.height, first.width];
    let odd = pixels.iter().map(|p| [p.height, p.width]).enumerate().find(|(_, size)| *size != expected);
    if let Some((index, found)) = odd {
        return Err(PreprocessError::Ragged { index, expected, found });
    }
    let data: Vec<f32> = pixels.iter().flat_map(|p| &p.data).copied().collect();
    let shape = [pixels.len(), first.channels, first.height, first.width];
    Ok(Tensor::from_data(TensorData::new(data, shape), device))
}

/// A resized and cut picture: `[height, width, channels]`.
struct Placed {
    height: usize,
    width: usize,
    channels: usize,
    data: Vec<u8>,
}

/// Colours times alpha, rounded as Pillow's `RGBA` to `RGBa`.
fn premultiply(pixel: &[u8]) -> [u8; 4] {
    let times_alpha = |sample: u8| {
        let product = u32::from(sample) * u32::from(pixel[3]) + 128;
        (((product >> 8) + product) >> 8) as u8
    };
    [times_alpha(pixel[0]), times_alpha(pixel[1]), times_alpha(pixel[2]), pixel[3]]
}

/// Colours over alpha, rounded as Pillow's `RGBa` to `RGBA`, and alpha dropped.
fn unpremultiply(pixel: &[u8]) -> [u8; 3] {
    let alpha = u32::from(pixel[3]);
    [pixel[0], pixel[1], pixel[2]].map(|sample| match alpha {
        0 | 255 => sample,
        _ => (255 * u32::from(sample) / alpha).min(255) as u8,
    })
}

#[cfg(test)]
mod tests;
