//! Reading pictures: PNG, JPEG, WebP, GIF (first frame) and BMP, told apart by content and never by file name.
//!
//! A [`Picture`] keeps what the references look at before they see RGB (transparency, a palette); an [`Rgb8`] is what
//! everything else wants. The conversions are Pillow's, bit for bit, with four exceptions:
//! - 16-bit grey keeps its high byte. Pillow 13 clips such a picture at 255, which leaves little but white.
//! - a CMYK JPEG (Adobe CMYK and YCCK) is read as RGB. The numbers are those of Pillow's `convert("RGB")`, but a
//!   reference that resizes before it converts would have resized the inks.
//! - a BMP with a palette is read as RGB, not as indices.
//! - JPEG: decoders may differ by a few grey levels (the standard leaves the inverse DCT and chroma upsampling open).

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufWriter, Cursor, Read};
use std::path::Path;

use ::image::codecs::jpeg::{JpegDecoder, JpegEncoder};
use ::image::codecs::{bmp::BmpDecoder, webp::WebPDecoder};
use ::image::metadata::Orientation as Exif;
use ::image::{ExtendedColorType, ImageDecoder};

use crate::resample::{Filter, Samples, resize};

/// No picture larger than this is decoded: 256 megapixels, three quarters of a gigabyte of RGB.
pub const MAX_PIXELS: u64 = 1 << 28;
/// No file longer than this is read: 1 GiB.
pub const MAX_BYTES: u64 = 1 << 30;

/// The pixels of a picture by its header, `[height, width]`; nothing is decoded. Fit to decide whether to decode it.
///
/// # Errors
/// When it is no picture, or its header is damaged.
pub fn size(bytes: &[u8], name: &str) -> Result<[u64; 2], ImageError> {
    let file = Source { bytes, name, format: recognise(bytes, name)? };
    let damaged = |error: ::image::ImageError| file.damaged(error);
    let (width, height) = match file.format {
        Format::Png => {
            let mut decoder = png::Decoder::new(Cursor::new(bytes));
            let header = decoder.read_header_info().map_err(|error| file.damaged(error))?;
            (header.width, header.height)
        }
        Format::Gif => {
            let decoder = gif::DecodeOptions::new().read_info(Cursor::new(bytes));
            let decoder = decoder.map_err(|error| file.damaged(error))?;
            (decoder.width().into(), decoder.height().into())
        }
        Format::Jpeg => JpegDecoder::new(Cursor::new(bytes)).map_err(damaged)?.dimensions(),
        Format::WebP => WebPDecoder::new(Cursor::new(bytes)).map_err(damaged)?.dimensions(),
        Format::Bmp => BmpDecoder::new(Cursor::new(bytes)).map_err(damaged)?.dimensions(),
    };
    Ok([height.into(), width.into()])
}

/// The texts of a PNG by keyword, `tEXt` before `zTXt` before `iTXt`; those of other formats are not read.
///
/// # Errors
/// When it is no PNG, or damaged.
pub fn png_texts(bytes: &[u8], name: &str) -> Result<Vec<(String, String)>, ImageError> {
    /// Of all texts together, unpacked.
    const LIMIT: usize = 16 << 20;
    let file = Source { bytes, name, format: recognise(bytes, name)? };
    if file.format != Format::Png {
        return Err(file.damaged("it is no PNG: other formats hold no texts by keyword"));
    }
    let damaged = |error: png::DecodingError| file.damaged(error);
    let limits = png::Limits { bytes: LIMIT };
    let decoder = png::Decoder::new_with_limits(Cursor::new(bytes), limits);
    let mut reader = decoder.read_info().map_err(damaged)?;
    reader.finish().map_err(damaged)?; // texts may follow the pixels
    let info = reader.info();
    let mut texts: Vec<(String, String)> =
        info.uncompressed_latin1_text.iter().map(|text| (text.keyword.clone(), text.text.clone())).collect();
    for text in &info.compressed_latin1_text {
        let unpacked = text.get_text().map_err(|error| file.damaged(error))?;
        texts.push((text.keyword.clone(), unpacked));
    }
    for text in &info.utf8_text {
        let unpacked = text.get_text().map_err(|error| file.damaged(error))?;
        texts.push((text.keyword.clone(), unpacked));
    }
    Ok(texts)
}

/// Which way up a photo is returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Orientation {
    /// As the file stores it. The references' `Image.open` does this, so parity needs it.
    AsStored,
    /// As the camera was held, by the file's EXIF orientation. This is what a person sees.
    Exif,
}

/// What becomes of transparency when a picture turns into RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Background {
    /// The colours under the transparency appear, whatever they are: Pillow's `convert("RGB")`.
    DropAlpha,
    /// The picture is laid over this colour: Pillow's `alpha_composite`.
    Over([u8; 3]),
}

impl Background {
    /// Paper white.
    pub const WHITE: Background = Background::Over([255; 3]);
}

/// How [`read`] and [`decode`] turn a file into RGB.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadOptions {
    /// Which way up.
    pub orientation: Orientation,
    /// Over what.
    pub background: Background,
}

impl ReadOptions {
    /// What a person sees: upright, transparency over white.
    pub const SEEN: ReadOptions =
        ReadOptions { orientation: Orientation::Exif, background: Background::WHITE };
    /// What Pillow's `Image.open(file).convert("RGB")` returns.
    pub const STORED: ReadOptions =
        ReadOptions { orientation: Orientation::AsStored, background: Background::DropAlpha };
}

/// The formats that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Portable Network Graphics.
    Png,
    /// JPEG, baseline or progressive, 8 bits.
    Jpeg,
    /// WebP, lossy or lossless.
    WebP,
    /// Graphics Interchange Format; the first frame.
    Gif,
    /// Windows bitmap.
    Bmp,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Png => "PNG",
            Format::Jpeg => "JPEG",
            Format::WebP => "WebP",
            Format::Gif => "GIF",
            Format::Bmp => "BMP",
        })
    }
}

/// Why a picture could not be read. Every variant names the file.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file could not be opened or read.
    #[error("{name}: {source}")]
    Io {
        /// The file.
        name: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file has no bytes.
    #[error("{name}: the file is empty; expected a picture")]
    Empty {
        /// The file.
        name: String,
    },
    /// The content is not a picture in any known format.
    #[error("{name}: not a picture: expected PNG, JPEG, WebP, GIF or BMP, found {found}")]
    NotAPicture {
        /// The file.
        name: String,
        /// What its first bytes look like.
        found: String,
    },
    /// The content is a picture in a format that is not read.
    #[error("{name}: {format} is not supported; convert it to PNG, JPEG, WebP, GIF or BMP")]
    Unsupported {
        /// The file.
        name: String,
        /// The format that its first bytes announce.
        format: &'static str,
    },
    /// The content starts as a picture, and then breaks off or contradicts itself.
    #[error("{name}: damaged or truncated {format}: {reason}")]
    Damaged {
        /// The file.
        name: String,
        /// The format that its first bytes announce.
        format: Format,
        /// What the decoder found.
        reason: String,
    },
    /// A side is zero.
    #[error("{name}: {width}x{height} pixels; expected at least one each way")]
    ZeroSize {
        /// The file.
        name: String,
        /// Pixels across.
        width: u64,
        /// Pixels down.
        height: u64,
    },
    /// More pixels than [`MAX_PIXELS`], or more bytes than [`MAX_BYTES`].
    #[error("{name}: {found} {unit}; at most {limit} are read")]
    TooLarge {
        /// The file.
        name: String,
        /// How many.
        found: u64,
        /// Of what.
        unit: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A buffer does not hold the samples that its size implies.
    #[error("{width}x{height} RGB pixels are {expected} bytes, found {found}")]
    Length {
        /// Pixels across.
        width: usize,
        /// Pixels down.
        height: usize,
        /// Bytes that the size implies.
        expected: u64,
        /// Bytes given.
        found: usize,
    },
}

/// An 8-bit RGB picture, `[height, width, 3]`, row by row from the top left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rgb8 {
    pub(crate) width: usize,
    pub(crate) height: usize,
    pub(crate) pixels: Vec<u8>,
}

impl Rgb8 {
    /// A picture from its samples, `[height, width, 3]`.
    ///
    /// # Errors
    /// When a side is zero, or `pixels` is not `height * width * 3` long.
    pub fn new(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self, ImageError> {
        if width == 0 || height == 0 {
            let name = "pixels".to_string();
            return Err(ImageError::ZeroSize { name, width: width as u64, height: height as u64 });
        }
        let expected = (width as u64).saturating_mul(height as u64).saturating_mul(3);
        if expected != pixels.len() as u64 {
            return Err(ImageError::Length { width, height, expected, found: pixels.len() });
        }
        Ok(Rgb8 { width, height, pixels })
    }

    /// Pixels across.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Pixels down.
    pub fn height(&self) -> usize {
        self.height
    }

    /// The samples, `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// The samples, `[height, width, 3]`, without a copy.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }

    /// Writes it as a PNG file. The file is complete under its name or not there: it is written beside it and renamed.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save_png(&self, path: &Path) -> Result<(), ImageError> {
        self.save_png_with(path, &[])
    }

    /// As [`Rgb8::save_png`], with texts by keyword (`iTXt` chunks: 1 to 79 Latin letters, and any text): [`png_texts`]
    /// reads them.
    ///
    /// # Errors
    /// When it cannot be written, or a keyword is none.
    pub fn save_png_with(&self, path: &Path, texts: &[(&str, &str)]) -> Result<(), ImageError> {
        let io = |source| ImageError::Io { name: path.display().to_string(), source };
        let mut partial = path.as_os_str().to_owned();
        partial.push(format!(".{}.partial", std::process::id()));
        let partial = Path::new(&partial);
        let written = self.write_png(partial, texts).and_then(|()| std::fs::rename(partial, path));
        if written.is_err() {
            let _ = std::fs::remove_file(partial); // the first error is the one to tell
        }
        written.map_err(io)
    }

    fn write_png(&self, path: &Path, texts: &[(&str, &str)]) -> std::io::Result<()> {
        let side = |side: usize| u32::try_from(side).map_err(std::io::Error::other);
        let mut encoder =
            png::Encoder::new(BufWriter::new(File::create(path)?), side(self.width)?, side(self.height)?);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        for (keyword, text) in texts {
            encoder.add_itxt_chunk((*keyword).to_owned(), (*text).to_owned())?;
        }
        let mut writer = encoder.write_header()?;
        writer.write_image_data(&self.pixels)?;
        Ok(writer.finish()?)
    }

    /// The picture, made smaller so that neither side is longer than `side` pixels; at least one pixel each way.
    pub fn thumbnail(&self, side: usize) -> Rgb8 {
        let (width, height) = (self.width, self.height);
        let longest = width.max(height);
        if longest <= side {
            return self.clone();
        }
        let [height, width] = [height, width].map(|length| (length * side / longest).max(1));
        let source = Samples { height: self.height, width: self.width, channels: 3, data: &self.pixels };
        let pixels = resize(source, [height, width], [0..height, 0..width], Filter::Bilinear);
        Rgb8 { width, height, pixels }
    }

    /// Pictures beside and below each other, so many in a row; a last row that is not full ends black.
    ///
    /// # Errors
    /// When there is none, or they are not of one size.
    pub fn sheet(pictures: &[Rgb8], columns: usize) -> Result<Rgb8, ImageError> {
        let (width, height) = pictures.first().map_or((0, 0), |first| (first.width, first.height));
        if let Some(other) = pictures.iter().find(|other| [other.width, other.height] != [width, height]) {
            let (expected, found) = (3 * (width * height) as u64, other.pixels.len());
            return Err(ImageError::Length { width, height, expected, found });
        }
        let mut pixels = Vec::new();
        for row in pictures.chunks(columns.max(1)) {
            for y in 0..height {
                let start = pixels.len();
                for picture in row {
                    pixels.extend_from_slice(&picture.pixels[3 * y * width..][..3 * width]);
                }
                pixels.resize(start + 3 * columns * width, 0);
            }
        }
        Rgb8::new(columns * width, pictures.len().div_ceil(columns.max(1)) * height, pixels)
    }

    /// The picture as a JPEG file, at a quality from 1 to 100.
    ///
    /// # Errors
    /// When a side is longer than the 65,535 pixels that a JPEG can have.
    pub fn to_jpeg(&self, quality: u8) -> Result<Vec<u8>, ImageError> {
        let mut file = Vec::new();
        let [width, height] = [self.width, self.height].map(|side| u32::try_from(side).unwrap_or(u32::MAX));
        JpegEncoder::new_with_quality(&mut file, quality)
            .encode(&self.pixels, width, height, ExtendedColorType::Rgb8)
            .map_err(|_| {
                let found = self.width.max(self.height) as u64;
                ImageError::TooLarge { name: "a JPEG".into(), found, unit: "pixels a side", limit: 65_535 }
            })?;
        Ok(file)
    }
}

/// How a file stores its colours, as far as a reference that resizes before it converts to RGB can tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Storage {
    /// Grey or RGB, perhaps with one colour declared transparent.
    Direct,
    /// Grey or RGB with an alpha channel, which weighs the colours when they are averaged.
    Alpha,
    /// Indices into this palette, or single bits; they cannot be averaged.
    Indexed(Vec<[u8; 3]>),
}

/// A decoded picture, before its transparency and palette are resolved to RGB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    pub(crate) width: usize,
    pub(crate) height: usize,
    /// 3, or 4 with alpha.
    pub(crate) channels: usize,
    /// `[height, width, channels]`
    pub(crate) pixels: Vec<u8>,
    pub(crate) storage: Storage,
}

impl Picture {
    /// Reads a file.
    ///
    /// # Errors
    /// When it cannot be read, is no picture, is damaged or too large.
    pub fn read(path: &Path, orientation: Orientation) -> Result<Self, ImageError> {
        Picture::decode(&content(path)?, &path.display().to_string(), orientation)
    }

    /// Decodes a file's content; `name` stands for it in errors.
    ///
    /// # Errors
    /// When it is no picture, is damaged or too large.
    pub fn decode(bytes: &[u8], name: &str, orientation: Orientation) -> Result<Self, ImageError> {
        if bytes.len() as u64 > MAX_BYTES {
            let (found, limit) = (bytes.len() as u64, MAX_BYTES);
            return Err(ImageError::TooLarge { name: name.to_string(), found, unit: "bytes", limit });
        }
        let file = Source { bytes, name, format: recognise(bytes, name)? };
        let (picture, exif) = match file.format {
            Format::Png => file.png(),
            Format::Gif => file.gif(),
            Format::Jpeg => {
                file.jpeg_ends()?;
                file.decode(JpegDecoder::new(Cursor::new(bytes)))
            }
            Format::WebP => file.decode(WebPDecoder::new(Cursor::new(bytes))),
            Format::Bmp => file.decode(BmpDecoder::new(Cursor::new(bytes))),
        }?;
        Ok(match orientation {
            Orientation::AsStored => picture,
            Orientation::Exif => picture.turned(exif),
        })
    }

    /// Pixels across.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Pixels down.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Whether the file declares any transparency.
    pub fn has_alpha(&self) -> bool {
        self.channels == 4
    }

    /// The picture in RGB.
    pub fn to_rgb(&self, background: Background) -> Rgb8 {
        let pixels = match (self.channels, background) {
            (4, Background::DropAlpha) => {
                self.pixels.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect()
            }
            (4, Background::Over(paper)) => {
                self.pixels.chunks_exact(4).flat_map(|p| over(p, paper)).collect()
            }
            _ => self.pixels.clone(),
        };
        Rgb8 { width: self.width, height: self.height, pixels }
    }

    /// The picture as it looks once `exif` is heeded.
    fn turned(self, exif: Exif) -> Picture {
        if exif == Exif::NoTransforms {
            return self;
        }
        let (width, height, channels) = (self.width, self.height, self.channels);
        let code = exif.to_exif();
        let sideways = code >= 5;
        let (new_width, new_height) = if sideways { (height, width) } else { (width, height) };
        let mut pixels = Vec::with_capacity(self.pixels.len());
        for y in 0..new_height {
            for x in 0..new_width {
                let (row, column) = match code {
                    2 => (y, width - 1 - x),
                    3 => (height - 1 - y, width - 1 - x),
                    4 => (height - 1 - y, x),
                    5 => (x, y),
                    6 => (height - 1 - x, y),
                    7 => (height - 1 - x, width - 1 - y),
                    8 => (x, width - 1 - y),
                    _ => (y, x),
                };
                let start = (row * width + column) * channels;
                pixels.extend_from_slice(&self.pixels[start..start + channels]);
            }
        }
        Picture { width: new_width, height: new_height, pixels, ..self }
    }
}

/// So many bytes tell what a file is, also in an error.
const SNIFFED: u64 = 64;

/// The bytes of a picture file. Of what is no picture, or too long for one, only the first few are read.
///
/// # Errors
/// When it cannot be read, does not begin as a picture, or is longer than [`MAX_BYTES`].
pub fn content(path: &Path) -> Result<Vec<u8>, ImageError> {
    let name = path.display().to_string();
    let io = |source| ImageError::Io { name: name.clone(), source };
    let file = File::open(path).map_err(io)?;
    let mut bytes = Vec::new();
    (&file).take(SNIFFED).read_to_end(&mut bytes).map_err(io)?;
    recognise(&bytes, &name)?;
    let (found, limit) = (file.metadata().map_err(io)?.len(), MAX_BYTES);
    if found > limit {
        return Err(ImageError::TooLarge { name, found, unit: "bytes", limit });
    }
    // a file that grows meanwhile is cut off, too
    (&file).take(limit + 1 - SNIFFED).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

/// Reads a picture file as RGB.
///
/// # Errors
/// When it cannot be read, is no picture, is damaged or too large.
pub fn read(path: &Path, options: ReadOptions) -> Result<Rgb8, ImageError> {
    Ok(Picture::read(path, options.orientation)?.to_rgb(options.background))
}

/// Decodes a picture file's content as RGB; `name` stands for it in errors.
///
/// # Errors
/// When it is no picture, is damaged or too large.
pub fn decode(bytes: &[u8], name: &str, options: ReadOptions) -> Result<Rgb8, ImageError> {
    Ok(Picture::decode(bytes, name, options.orientation)?.to_rgb(options.background))
}

/// One RGBA pixel over an opaque colour, with the rounding of Pillow's `alpha_composite`.
fn over(pixel: &[u8], paper: [u8; 3]) -> [u8; 3] {
    let alpha = u32::from(pixel[3]);
    std::array::from_fn(|c| {
        let sum = (u32::from(pixel[c]) * alpha + u32::from(paper[c]) * (255 - alpha)) * 128 + (0x80 << 7);
        ((((sum >> 8) + sum) >> 8) >> 7) as u8
    })
}

/// A file whose format is known.
struct Source<'a> {
    bytes: &'a [u8],
    name: &'a str,
    format: Format,
}

impl Source<'_> {
    fn damaged(&self, reason: impl ToString) -> ImageError {
        ImageError::Damaged { name: self.name.to_string(), format: self.format, reason: reason.to_string() }
    }

    /// The sides of a picture, once they are known to be sane.
    fn size(&self, width: u32, height: u32) -> Result<(usize, usize), ImageError> {
        let (width, height) = (u64::from(width), u64::from(height));
        let name = || self.name.to_string();
        if width == 0 || height == 0 {
            return Err(ImageError::ZeroSize { name: name(), width, height });
        }
        if width * height > MAX_PIXELS {
            let (found, limit) = (width * height, MAX_PIXELS);
            return Err(ImageError::TooLarge { name: name(), found, unit: "pixels", limit });
        }
        Ok((width as usize, height as usize))
    }

    /// Decodes with one of the `image` crate's decoders, which yield 8-bit grey, RGB or RGBA.
    fn decode<D: ImageDecoder>(
        &self,
        decoder: Result<D, ::image::ImageError>,
    ) -> Result<(Picture, Exif), ImageError> {
        let mut decoder = decoder.map_err(|e| self.damaged(e))?;
        let (width, height) = decoder.dimensions();
        let (width, height) = self.size(width, height)?;
        let exif = decoder.orientation().unwrap_or(Exif::NoTransforms);
        let mut limits = ::image::Limits::no_limits();
        limits.max_alloc = Some(MAX_PIXELS * 8);
        decoder.set_limits(limits).map_err(|e| self.damaged(e))?;
        let found = usize::from(decoder.color_type().channel_count());
        let samples = width * height * found;
        if decoder.total_bytes() != samples as u64 {
            return Err(self.damaged(format!("{:?} is not an 8-bit layout", decoder.color_type())));
        }
        let mut pixels = vec![0; samples];
        decoder.read_image(&mut pixels).map_err(|e| self.damaged(e))?;
        let (channels, storage) = match found {
            1 | 3 => (3, Storage::Direct),
            _ => (4, Storage::Alpha),
        };
        let pixels = match found {
            1 => pixels.iter().flat_map(|&grey| [grey; 3]).collect(),
            2 => pixels.chunks_exact(2).flat_map(|p| [p[0], p[0], p[0], p[1]]).collect(),
            _ => pixels,
        };
        Ok((Picture { width, height, channels, pixels, storage }, exif))
    }

    /// The JPEG decoder fills in what a truncated file lacks, so the end is looked for here: after the header
    /// segments (which may hold a thumbnail with an end of its own), an end-of-image marker must follow.
    fn jpeg_ends(&self) -> Result<(), ImageError> {
        let mut at = 2; // past the start-of-image marker
        loop {
            let truncated = || self.damaged("it ends within its header");
            let Some(&[marker, kind]) = self.bytes.get(at..at + 2) else {
                return Err(truncated());
            };
            match (marker, kind) {
                (0xFF, 0xDA) => break,
                (0xFF, 0xFF) | (0..0xFF, _) => at += 1, // fill and stray bytes
                (0xFF, 0x00 | 0x01 | 0xD0..=0xD8) => at += 2,
                (0xFF, 0xD9) => return Err(self.damaged("it ends before its first scan")),
                _ => {
                    let length = self.bytes.get(at + 2..at + 4).ok_or_else(truncated)?;
                    at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
                }
            }
        }
        match self.bytes[at..].windows(2).rposition(|pair| pair == [0xFF, 0xD9]) {
            Some(_) => Ok(()),
            None => Err(self.damaged("it ends within its pixels")),
        }
    }

    fn png(&self) -> Result<(Picture, Exif), ImageError> {
        let damaged = |e: png::DecodingError| self.damaged(e);
        let limits = png::Limits { bytes: MAX_BYTES as usize };
        let mut decoder = png::Decoder::new_with_limits(Cursor::new(self.bytes), limits);
        decoder.set_transformations(png::Transformations::IDENTITY);
        decoder.set_ignore_text_chunk(true);
        decoder.set_ignore_iccp_chunk(true);
        let header = decoder.read_header_info().map_err(damaged)?;
        let (width, height) = self.size(header.width, header.height)?;
        let mut reader = decoder.read_info().map_err(damaged)?;
        let size = reader.output_buffer_size().ok_or_else(|| self.damaged("its size overflows"))?;
        let mut packed = vec![0; size];
        let frame = reader.next_frame(&mut packed).map_err(damaged)?;
        if (frame.width as usize, frame.height as usize) != (width, height) {
            return Err(self.damaged(format!("its first frame is {}x{}", frame.width, frame.height)));
        }

        let info = reader.info();
        let depth = info.bit_depth as usize;
        let per_pixel = info.color_type.samples();
        let row = |y: usize| &packed[y * frame.line_size..][..frame.line_size];
        // The samples of one row, at the file's own depth.
        let samples = |y: usize| (0..width * per_pixel).map(move |i| sample(row(y), depth, i));
        let all = || (0..height).flat_map(samples);
        let transparent = info.trns.as_deref();

        let (channels, pixels, storage) = match info.color_type {
            png::ColorType::Indexed => {
                let colours = info.palette.as_deref().unwrap_or(&[]).chunks_exact(3);
                let palette: Vec<[u8; 3]> = colours.map(|c| [c[0], c[1], c[2]]).collect();
                let colour = |i: u16| palette.get(usize::from(i)).copied().unwrap_or_default();
                let (channels, pixels) = match transparent {
                    None => (3, all().flat_map(colour).collect()),
                    Some(alphas) => {
                        (4, all().flat_map(|i| with_alpha(colour(i), alphas.get(usize::from(i)))).collect())
                    }
                };
                (channels, pixels, Storage::Indexed(palette))
            }
            png::ColorType::Grayscale => {
                let key = transparent.and_then(|trns| key::<1>(trns, depth)).map(|[grey]| grey);
                let (channels, pixels) = match key {
                    None => (3, all().flat_map(|v| [eight_bits(v, depth); 3]).collect()),
                    Some(key) => {
                        (4, all().flat_map(|v| keyed([eight_bits(v, depth); 3], v == key)).collect())
                    }
                };
                let two_tone = || (0..256).map(|i| if i == 0 { [0; 3] } else { [255; 3] }).collect();
                let storage = if depth == 1 { Storage::Indexed(two_tone()) } else { Storage::Direct };
                (channels, pixels, storage)
            }
            png::ColorType::Rgb => {
                let key = transparent.and_then(|trns| key::<3>(trns, depth));
                let values: Vec<u16> = if key.is_some() { all().collect() } else { Vec::new() };
                let (channels, pixels) = match key {
                    None => (3, all().map(|v| eight_bits(v, depth)).collect()),
                    Some(key) => {
                        let pixel =
                            |v: &[u16]| keyed([v[0], v[1], v[2]].map(|v| eight_bits(v, depth)), v == key);
                        (4, values.chunks_exact(3).flat_map(pixel).collect())
                    }
                };
                (channels, pixels, Storage::Direct)
            }
            png::ColorType::GrayscaleAlpha => {
                let values: Vec<u8> = all().map(|v| eight_bits(v, depth)).collect();
                let pixels = values.chunks_exact(2).flat_map(|p| [p[0], p[0], p[0], p[1]]).collect();
                (4, pixels, Storage::Alpha)
            }
            png::ColorType::Rgba => (4, all().map(|v| eight_bits(v, depth)).collect(), Storage::Alpha),
        };
        let exif =
            info.exif_metadata.as_deref().and_then(Exif::from_exif_chunk).unwrap_or(Exif::NoTransforms);
        Ok((Picture { width, height, channels, pixels, storage }, exif))
    }

    fn gif(&self) -> Result<(Picture, Exif), ImageError> {
        let damaged = |e: gif::DecodingError| self.damaged(e);
        let mut options = gif::DecodeOptions::new();
        options.set_color_output(gif::ColorOutput::Indexed);
        options
            .set_memory_limit(gif::MemoryLimit::Bytes(std::num::NonZeroU64::MIN.saturating_add(MAX_PIXELS)));
        let mut decoder = options.read_info(Cursor::new(self.bytes)).map_err(damaged)?;
        let screen = [usize::from(decoder.width()), usize::from(decoder.height())];
        self.size(screen[0].max(1) as u32, screen[1].max(1) as u32)?;
        let global = decoder.global_palette().map(<[u8]>::to_vec);
        let frame =
            decoder.read_next_frame().map_err(damaged)?.ok_or_else(|| self.damaged("it has no frame"))?;
        let [left, top] = [frame.left, frame.top].map(usize::from);
        let [across, down] = [frame.width, frame.height].map(usize::from);
        // As Pillow has it, the first frame widens a screen that is too small.
        let [width, height] = [screen[0].max(left + across), screen[1].max(top + down)];
        self.size(width as u32, height as u32)?;

        // Where the frame does not reach, the screen shows the transparent colour, or else the first one.
        let mut indices = vec![frame.transparent.unwrap_or(0); width * height];
        if across > 0 {
            for (y, row) in frame.buffer.chunks_exact(across).take(down).enumerate() {
                indices[(top + y) * width + left..][..across].copy_from_slice(row);
            }
        }
        let colours = frame.palette.clone().or(global);
        let is_ramp =
            |c: &[u8]| c.chunks_exact(3).enumerate().all(|(i, c)| c.iter().all(|&v| usize::from(v) == i));
        let ramp = colours.as_deref().is_none_or(is_ramp);
        let palette: Vec<[u8; 3]> = match colours.filter(|_| !ramp) {
            Some(colours) => colours.chunks_exact(3).map(|c| [c[0], c[1], c[2]]).collect(),
            None => (0..=255).map(|grey| [grey; 3]).collect(),
        };
        let colour = |i: u8| palette.get(usize::from(i)).copied().unwrap_or_default();
        let (channels, pixels) = match frame.transparent {
            None => (3, indices.iter().flat_map(|&i| colour(i)).collect()),
            Some(key) => (4, indices.iter().flat_map(|&i| keyed(colour(i), i == key)).collect()),
        };
        let storage = if ramp { Storage::Direct } else { Storage::Indexed(palette) };
        Ok((Picture { width, height, channels, pixels, storage }, Exif::NoTransforms))
    }
}

/// The `i`th sample of a row that packs samples of `depth` bits, the first in the highest bits.
fn sample(row: &[u8], depth: usize, i: usize) -> u16 {
    match depth {
        16 => u16::from_be_bytes([row[2 * i], row[2 * i + 1]]),
        8 => u16::from(row[i]),
        _ => {
            let per_byte = 8 / depth;
            let shift = (per_byte - 1 - i % per_byte) * depth;
            u16::from(row[i / per_byte] >> shift) & ((1 << depth) - 1)
        }
    }
}

/// A sample of `depth` bits on the scale 0 to 255; of 16 bits the high byte.
fn eight_bits(value: u16, depth: usize) -> u8 {
    match depth {
        16 => (value >> 8) as u8,
        8 => value as u8,
        _ => (value * (255 / ((1 << depth) - 1))) as u8,
    }
}

/// The transparent colour of a PNG, as the `png` crate hands on the chunk that holds it: two bytes a sample at a depth
/// of 16 bits, otherwise one.
fn key<const N: usize>(trns: &[u8], depth: usize) -> Option<[u16; N]> {
    let bytes = if depth == 16 { 2 } else { 1 };
    (trns.len() >= N * bytes).then(|| std::array::from_fn(|i| sample(trns, 8 * bytes, i)))
}

fn keyed([r, g, b]: [u8; 3], transparent: bool) -> [u8; 4] {
    [r, g, b, if transparent { 0 } else { 255 }]
}

fn with_alpha([r, g, b]: [u8; 3], alpha: Option<&u8>) -> [u8; 4] {
    [r, g, b, alpha.copied().unwrap_or(255)]
}

/// Formats that people do have, and that are not read, by their first bytes.
const UNSUPPORTED: &[(&[u8], &str)] = &[
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "BigTIFF"),
    (b"\xFF\x0A", "JPEG XL"),
    (b"\0\0\0\x0CJXL ", "JPEG XL"),
    (b"\0\0\0\x0CjP  ", "JPEG 2000"),
    (b"\xFF\x4F\xFF\x51", "JPEG 2000"),
    (b"8BPS", "Photoshop PSD"),
    (b"\0\0\x01\0", "ICO"),
    (b"%PDF", "PDF"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"\x76\x2F\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"<svg", "SVG"),
    (b"P1\n", "PBM"),
    (b"P2\n", "PGM"),
    (b"P3\n", "PPM"),
    (b"P4\n", "PBM"),
    (b"P5\n", "PGM"),
    (b"P6\n", "PPM"),
];

/// The format that a file's first bytes announce.
fn recognise(bytes: &[u8], name: &str) -> Result<Format, ImageError> {
    let name = || name.to_string();
    match bytes {
        [] => return Err(ImageError::Empty { name: name() }),
        [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1A, b'\n', ..] => return Ok(Format::Png),
        [0xFF, 0xD8, 0xFF, ..] => return Ok(Format::Jpeg),
        [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => return Ok(Format::Gif),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => return Ok(Format::WebP),
        // "BM" alone begins many a text; the header's length settles it.
        [b'B', b'M', rest @ ..]
            if matches!(rest.get(12..16), Some([12 | 40 | 52 | 56 | 64 | 108 | 124, 0, 0, 0])) =>
        {
            return Ok(Format::Bmp);
        }
        _ => {}
    }
    if let Some((_, format)) = UNSUPPORTED.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Err(ImageError::Unsupported { name: name(), format });
    }
    match bytes.get(4..12) {
        Some(b"ftypavif" | b"ftypavis") => {
            return Err(ImageError::Unsupported { name: name(), format: "AVIF" });
        }
        Some(b"ftypheic" | b"ftypheix" | b"ftypmif1" | b"ftypheif" | b"ftypmsf1") => {
            return Err(ImageError::Unsupported { name: name(), format: "HEIC" });
        }
        _ => {}
    }
    Err(ImageError::NotAPicture { name: name(), found: describe(bytes) })
}

/// What bytes that are no picture look like, for a person.
fn describe(bytes: &[u8]) -> String {
    let head = &bytes[..bytes.len().min(40)];
    let text: Cow<'_, str> = match std::str::from_utf8(head) {
        Ok(text) => text.into(),
        Err(e) if e.error_len().is_none() => String::from_utf8_lossy(&head[..e.valid_up_to()]),
        Err(_) => "".into(),
    };
    if text.starts_with("version https://git-lfs") {
        "a Git LFS pointer, not the file it stands for".to_string()
    } else if !text.is_empty() && text.chars().all(|c| !c.is_control() || c.is_whitespace()) {
        format!("text that begins {:?}", text.trim_end())
    } else {
        let hex: Vec<String> = head.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
        format!("bytes that begin {}", hex.join(" "))
    }
}

#[cfg(test)]
mod tests;
