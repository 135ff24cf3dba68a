//! Weights in 8 or 4 bits: a safetensors file in which matrices are cut into blocks of whole numbers.
//!
//! # The layout, version 1
//!
//! The file's `__metadata__` has the key `volary.quantization`, whose text is a JSON object with exactly these fields:
//!
//! ```json
//! {"version": 1, "bits": 8, "block": 32, "symmetric": true}
//! ```
//!
//! `bits` is 8 (then `symmetric` is true) or 4 (then it is false); `block` is an even number from 2 to 65536. In place of a
//! matrix `<key>` of `[rows, cols]` the file has two or three tensors. A block is `block` neighbouring values of one row,
//! the last one of a row may be shorter; a row has `blocks = ceil(cols / block)` of them.
//!
//! | bits | tensor | dtype | shape | holds |
//! |---|---|---|---|---|
//! | 8 | `<key>.q8` | I8 | `[rows, cols]` | `q`, from -127 to 127 |
//! | 8 | `<key>.scales` | F16 | `[rows, blocks]` | `scale` |
//! | 4 | `<key>.q4` | U8 | `[rows, cols / 2]` | two `q` from 0 to 15: the even column in the low four bits, the odd one above it |
//! | 4 | `<key>.scales` | F16 | `[rows, blocks]` | `scale` |
//! | 4 | `<key>.mins` | F16 | `[rows, blocks]` | `min` |
//!
//! The values, in f32, are `q * scale` with 8 bits and `q * scale + min` with 4. Every other tensor is stored under its own
//! key as it is; no key of the original ends in `.q8`, `.q4`, `.scales` or `.mins`. A reader refuses other versions.
//!
//! # How it is read
//!
//! [`load()`](crate::load()) gives linear layers and embeddings their matrices as they are packed
//! ([`Packed`](volary_kernels::layers::Packed)), unless floats are asked for; everything else is unpacked.
//!
//! # How it is written
//!
//! Two-dimensional floats with at least one block of columns (4 bits: an even number of columns) are quantized, unless a
//! pattern keeps them: the weights of linear layers and embeddings. Biases, norms, convolutions and small matrices stay.
//! With 8 bits `scale` is the largest magnitude of a block over 127; with 4 bits `min` is the smallest value and `scale` the
//! span over 15. Both are rounded to f16 outwards, so that no value of the block lies outside of what `q` can say: each
//! comes back within `scale / 2`. On normally distributed values in blocks of 32 the mean error is 0.56 % of the mean
//! magnitude with 8 bits and 8.1 % with 4; 4 bits about zero, with the largest magnitude over 7, would give 10.2 %, for
//! 4.5 bits a value in place of 5.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::path::Path;

use burn::tensor::{Bytes, FloatDType};
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
pub use volary_kernels::ops::{Bits, Quantization};
use volary_kernels::ops::{BlockRange, PackedMatrix};

use crate::cast::{read_into, values, zeros};
use crate::convert::{ConvertOptions, Copier};
use crate::error::{Error, Problem, QuantizedError, nearest};
use crate::format::safetensors::Safetensors;
use crate::format::{Backing, Checkpoint, Contents, Dtype, Entry};
use crate::save::{Pending, Written, write};

/// The key of the description in a file's metadata.
const METADATA: &str = "volary.quantization";
const VERSION: u64 = 1;
const SCALES: &str = ".scales";
const MINS: &str = ".mins";

/// What the numbers of a matrix are called after its key.
const fn suffix(bits: Bits) -> &'static str {
    match bits {
        Bits::Eight => ".q8",
        Bits::Four => ".q4",
    }
}

const fn dtype_of(bits: Bits) -> Dtype {
    match bits {
        Bits::Eight => Dtype::I8,
        Bits::Four => Dtype::U8,
    }
}

/// The description in a file's metadata.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    version: u64,
    bits: u64,
    block: u64,
    symmetric: bool,
}

impl Description {
    fn of(Quantization { bits, block }: Quantization) -> Self {
        let symmetric = bits == Bits::Eight;
        Self { version: VERSION, bits: bits.count(), block: block as u64, symmetric }
    }

    fn read(description: &str) -> Result<Quantization, QuantizedError> {
        #[derive(Deserialize)]
        struct Version {
            version: u64,
        }
        // the version first: a later one may have other fields
        let malformed = |error: serde_json::Error| QuantizedError::Description(error.to_string());
        let Version { version } = serde_json::from_str(description).map_err(malformed)?;
        if version != VERSION {
            return Err(QuantizedError::Version { found: version, known: VERSION });
        }
        let Description { bits, block, symmetric, .. } =
            serde_json::from_str(description).map_err(malformed)?;
        let bits = match (bits, symmetric) {
            (8, true) => Bits::Eight,
            (4, false) => Bits::Four,
            _ => {
                let form = if symmetric { "symmetric" } else { "with minima" };
                return Err(QuantizedError::Scheme { bits, form });
            }
        };
        match is_block(block) {
            true => Ok(Quantization { bits, block: block as usize }),
            false => Err(QuantizedError::Block { found: block }),
        }
    }
}

fn is_block(block: u64) -> bool {
    (2..=1 << 16).contains(&block) && block.is_multiple_of(2)
}

/// A quantized file as if it were not: entries have the original keys and shapes, values are worked out when asked for,
/// in f32. Who wants the numbers themselves gets them from [`Checkpoint::packed`].
struct Quantized<B> {
    file: Safetensors<B>,
    quantization: Quantization,
    /// The originals.
    contents: Contents,
    /// The shapes of those that are quantized.
    packed: HashMap<String, [usize; 2]>,
}

/// The originals of a quantized file.
struct Originals {
    entries: Vec<Entry>,
    /// The shapes of those that are quantized.
    packed: HashMap<String, [usize; 2]>,
}

/// The checkpoint that a safetensors file means: itself, or [`Quantized`].
///
/// # Errors
/// [`Error::Quantized`] with everything that does not hold in a file that says it is quantized.
pub(crate) fn unpacked<B: Backing + 'static>(file: Safetensors<B>) -> Result<Box<dyn Checkpoint>, Error> {
    let Some(description) = file.metadata().get(METADATA) else { return Ok(Box::new(file)) };
    let quantized = |problems| Error::Quantized { path: file.path().to_owned(), problems };
    let quantization = Description::read(description).map_err(|problem| quantized(vec![problem]))?;
    let Originals { entries, packed } = originals(file.entries(), quantization).map_err(quantized)?;
    let contents = Contents::new(file.path().to_owned(), entries);
    Ok(Box::new(Quantized { file, quantization, contents, packed }))
}

/// What the tensors of a quantized file stand for, or everything that does not hold.
fn originals(
    stored: &[Entry],
    Quantization { bits, block }: Quantization,
) -> Result<Originals, Vec<QuantizedError>> {
    let by_name: HashMap<&str, &Entry> = stored.iter().map(|entry| (entry.name.as_str(), entry)).collect();
    let (mut entries, mut packed, mut problems) = (Vec::new(), HashMap::new(), Vec::new());
    let expect = |part: String, beside: &Entry, shape: [usize; 2], problems: &mut Vec<QuantizedError>| {
        let Some(entry) = by_name.get(part.as_str()) else {
            problems.push(QuantizedError::Missing { part, beside: beside.name.clone() });
            return;
        };
        if entry.dtype != Dtype::F16 {
            problems.push(QuantizedError::Dtype {
                part: part.clone(),
                expected: Dtype::F16,
                found: entry.dtype,
            });
        }
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            problems.push(QuantizedError::Shape { part, expected, found });
        }
    };
    for entry in stored {
        if let Some(key) = entry.name.strip_suffix(suffix(bits)) {
            if by_name.contains_key(key) {
                problems.push(QuantizedError::Twice { key: key.to_owned() });
            }
            if entry.dtype != dtype_of(bits) {
                let (part, found) = (entry.name.clone(), entry.dtype);
                problems.push(QuantizedError::Dtype { part, expected: dtype_of(bits), found });
            }
            let [rows, width] = entry.shape[..] else {
                let (part, found) = (entry.name.clone(), entry.shape.clone());
                problems.push(QuantizedError::Rank { part, found });
                continue;
            };
            // no overflow: the file holds rows * width bytes, or one of them is 0
            let cols = if bits == Bits::Four { width.saturating_mul(2) } else { width };
            let scales = [rows, cols.div_ceil(block)];
            expect(format!("{key}{SCALES}"), entry, scales, &mut problems);
            if bits == Bits::Four {
                expect(format!("{key}{MINS}"), entry, scales, &mut problems);
            }
            entries.push(Entry { name: key.to_owned(), shape: vec![rows, cols], dtype: Dtype::F32 });
            packed.insert(key.to_owned(), [rows, cols]);
        } else if let Some(key) = [SCALES, MINS].iter().find_map(|suffix| entry.name.strip_suffix(suffix)) {
            let wanted = format!("{key}{}", suffix(bits));
            let has_part = bits == Bits::Four || entry.name.ends_with(SCALES);
            if !by_name.contains_key(wanted.as_str()) || !has_part {
                problems.push(QuantizedError::Orphan { part: entry.name.clone(), wanted });
            }
        } else {
            entries.push(entry.clone());
        }
    }
    if problems.is_empty() { Ok(Originals { entries, packed }) } else { Err(problems) }
}

impl<B: Backing> Checkpoint for Quantized<B> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let Some(matrix) = self.packed(name)? else { return self.file.bytes(name) };
        let [rows, cols] = matrix.shape();
        let mut out = vec![0; rows * cols * size_of::<f32>()];
        if !out.is_empty() {
            out.par_chunks_mut(cols * size_of::<f32>()).enumerate().for_each_init(
                || vec![0.0; cols],
                |values, (row, out)| {
                    matrix.unpack_row(row, values);
                    out.copy_from_slice(bytemuck::cast_slice(values));
                },
            );
        }
        Ok(Cow::Owned(out))
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>, Error> {
        self.contents.position(name)?;
        let Some(&shape) = self.packed.get(name) else { return Ok(None) };
        let Quantization { bits, block } = self.quantization;
        let codes = self.file.bytes(&format!("{name}{}", suffix(bits)))?.into_owned();
        let halves = |part: &str| -> Result<Vec<f16>, Error> {
            Ok(values(Dtype::F16, &self.file.bytes(&format!("{name}{part}"))?))
        };
        Ok(Some(match bits {
            Bits::Eight => PackedMatrix::symmetric(self.quantization, shape, codes, halves(SCALES)?),
            Bits::Four => PackedMatrix::from_minima(block, shape, codes, halves(SCALES)?, halves(MINS)?),
        }))
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        if self.packed.contains_key(name) || self.contents.find(name).is_none() {
            return None;
        }
        self.file.shared(name)
    }

    fn quantization(&self) -> Option<Quantization> {
        Some(self.quantization)
    }

    fn release(&self, name: &str) {
        self.file.release(name);
        for suffix in [suffix(self.quantization.bits), SCALES, MINS] {
            self.file.release(&format!("{name}{suffix}"));
        }
    }
}

/// How a checkpoint is quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizeOptions {
    /// How matrices are packed.
    pub quantization: Quantization,
    /// Keys that stay as they are; `*` stands for anything, e.g. `*embed*`.
    pub keep: Vec<String>,
    /// The dtype of the floats that stay; `None` keeps each as it is stored.
    pub dtype: Option<FloatDType>,
}

/// What became of a matrix.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Loss {
    /// Its key.
    pub key: String,
    /// Its shape.
    pub shape: [usize; 2],
    /// The largest error over the largest magnitude.
    pub max: f64,
    /// The mean error over the mean magnitude.
    pub mean: f64,
}

/// Writes `checkpoint` as a quantized safetensors file in the layout that [the module](self) describes; [`open`](crate::open)
/// reads it like any other. `progress` gets the bytes of each tensor that is done.
///
/// Returns what was lost, by matrix.
///
/// # Errors
/// [`Error::Reserved`] for keys that a quantized file cannot hold; [`Error::NoTensor`] for a pattern to keep that keeps
/// nothing; [`Error::Values`] with all tensors that hold NaN, infinite, or too large values; [`Error::Quantized`] for a
/// block size that is not allowed; [`Error::Io`].
pub fn quantize(
    checkpoint: &dyn Checkpoint,
    path: &Path,
    options: &QuantizeOptions,
    progress: &dyn Fn(u64),
) -> Result<Vec<Loss>, Error> {
    let QuantizeOptions { quantization, keep, dtype } = options;
    let block = quantization.block;
    if !is_block(block as u64) {
        let problems = vec![QuantizedError::Block { found: block as u64 }];
        return Err(Error::Quantized { path: path.to_owned(), problems });
    }
    let entries = checkpoint.entries();
    let reserved = |name: &str| {
        [SCALES, MINS].into_iter().chain(Bits::ALL.map(suffix)).any(|suffix| name.ends_with(suffix))
    };
    let keys: Vec<String> =
        entries.iter().filter(|entry| reserved(&entry.name)).map(|entry| entry.name.clone()).collect();
    if !keys.is_empty() {
        return Err(Error::Reserved { file: checkpoint.path().to_owned(), keys });
    }
    if let Some(useless) = keep.iter().find(|pattern| !entries.iter().any(|entry| fits(pattern, &entry.name)))
    {
        return Err(Error::NoTensor {
            file: checkpoint.path().to_owned(),
            key: useless.clone(),
            nearest: nearest(useless, entries.iter().map(|entry| entry.name.as_str())),
        });
    }

    let convert = ConvertOptions { dtype: *dtype, ..ConvertOptions::default() };
    let copier = Copier::new(checkpoint, &convert, progress);
    let packer = Packer {
        checkpoint,
        copier: &copier,
        quantization: *quantization,
        progress,
        losses: RefCell::default(),
    };
    let mut tensors = Vec::new();
    for entry in entries {
        match entry.shape[..] {
            [rows, cols]
                if entry.dtype.is_float()
                    && quantization.fits([rows, cols])
                    && !keep.iter().any(|pattern| fits(pattern, &entry.name)) =>
            {
                tensors.extend(packer.pack(entry, [rows, cols]));
            }
            _ => tensors.push(copier.copy(entry)),
        }
    }
    let description = serde_json::json!(Description::of(*quantization)).to_string();
    let metadata = [("format".to_owned(), "pt".to_owned()), (METADATA.to_owned(), description)];
    let written = write(path, tensors, HashMap::from(metadata));
    let mut losses = packer.losses.take();
    losses.sort_by(|a, b| a.key.cmp(&b.key));
    written?;
    copier.finish().inspect_err(|_| drop(std::fs::remove_file(path)))?;
    Ok(losses)
}

/// Whether `name` has the form of `pattern`, in which `*` stands for anything.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(start) else { return false };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    for part in middle.split('*') {
        // the earliest place leaves most for the parts after it
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(end)
}

/// A matrix as it is read.
struct Read {
    values: Vec<f32>,
    /// How many of them are no numbers, and the place of the first.
    not_finite: Option<(usize, usize)>,
}

/// Makes the parts of quantized matrices.
struct Packer<'a> {
    checkpoint: &'a dyn Checkpoint,
    copier: &'a Copier<'a>,
    quantization: Quantization,
    progress: &'a dyn Fn(u64),
    losses: RefCell<Vec<Loss>>,
}

impl Packer<'_> {
    /// The parts of one matrix. Each reads it again when its turn comes, so that only one is held.
    fn pack<'s>(&'s self, entry: &'s Entry, [rows, cols]: [usize; 2]) -> Vec<Pending<'s>> {
        let Quantization { bits, block } = self.quantization;
        let scales = [rows, cols.div_ceil(block)];
        let part = |suffix: &str, choose: fn(BlockRange) -> f16| {
            Pending::new(&format!("{}{suffix}", entry.name), Dtype::F16, &scales, move || {
                let ranges = self.quantization.ranges(cols, &self.values(entry)?.values);
                Ok(Box::new(Bytes::from_elems(ranges.into_iter().map(choose).collect::<Vec<f16>>())))
            })
        };
        let width = if bits == Bits::Four { cols / 2 } else { cols };
        let codes = Pending::new(
            &format!("{}{}", entry.name, suffix(bits)),
            dtype_of(bits),
            &[rows, width],
            move || self.codes(entry, [rows, cols]),
        );
        let mut parts = vec![codes, part(SCALES, |range| range.scale)];
        if bits == Bits::Four {
            parts.push(part(MINS, |range| range.min));
        }
        parts
    }

    fn values(&self, entry: &Entry) -> Result<Read, Error> {
        let bytes = self.checkpoint.bytes(&entry.name)?;
        let mut values = zeros(bytes.len() / entry.dtype.size());
        let not_finite = read_into(entry.dtype, &bytes, &mut values);
        drop(bytes);
        self.checkpoint.release(&entry.name);
        Ok(Read { values, not_finite })
    }

    /// The whole numbers, and what they lose.
    fn codes(&self, entry: &Entry, [rows, cols]: [usize; 2]) -> Result<Written<'static>, Error> {
        let Quantization { bits, block } = self.quantization;
        let Read { values, not_finite } = self.values(entry)?;
        (self.progress)((values.len() * entry.dtype.size()) as u64);
        let key = entry.name.clone();
        if let Some((count, first_index)) = not_finite {
            self.copier.note(Problem::NotFinite { key, dtype: Dtype::F32, count, first_index });
            return Ok(Box::new(vec![0; bits.bytes(values.len())]));
        }
        let ranges = self.quantization.ranges(cols, &values);
        if let Some(first) = ranges.iter().position(|range| !range.is_finite()) {
            let count = ranges.iter().filter(|range| !range.is_finite()).count();
            let blocks = cols.div_ceil(block);
            let first_index = first / blocks * cols + first % blocks * block;
            self.copier.note(Problem::Overflow { key, dtype: Dtype::F16, count, first_index });
            return Ok(Box::new(vec![0; bits.bytes(values.len())]));
        }

        let mut codes = vec![0_u8; bits.bytes(values.len())];
        let [max_error, error, max, sum] = codes
            .par_chunks_mut(bits.bytes(cols))
            .zip(values.par_chunks(cols))
            .zip(ranges.par_chunks(cols.div_ceil(block)))
            .map(|((codes, row), ranges)| {
                let mut sums = [0.0_f64; 4];
                for (col, &value) in row.iter().enumerate() {
                    let (code, read) = ranges[col / block].code(value);
                    bits.put(codes, col, code);
                    let (error, size) = (f64::from((read - value).abs()), f64::from(value.abs()));
                    sums = [sums[0].max(error), sums[1] + error, sums[2].max(size), sums[3] + size];
                }
                sums
            })
            .reduce(|| [0.0; 4], |a, b| [a[0].max(b[0]), a[1] + b[1], a[2].max(b[2]), a[3] + b[3]]);
        let over = |error: f64, size: f64| if size > 0.0 { error / size } else { 0.0 };
        let (max, mean) = (over(max_error, max), over(error, sum));
        self.losses.borrow_mut().push(Loss { key, shape: [rows, cols], max, mean });
        Ok(Box::new(codes))
    }
}

#[cfg(test)]
mod tests;
