//! Checkpoint -> safetensors files, under the checkpoint's own names.
//!
//! No model is needed: whatever can be opened can be converted. One tensor is held at a time.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};

use burn::tensor::{Bytes, FloatDType};
use half::{bf16, f16};

use crate::cast::{Value, float_stored, read_into, zeros};
use crate::error::{Error, Problem};
use crate::experts::{homes, one_by_one};
use crate::format::{Checkpoint, Dtype, Entry};
use crate::load::NotFinite;
use crate::rule::KeyMap;
use crate::save::{Pending, Written, index, write, write_whole};

/// How a checkpoint is converted. The default copies every tensor as it is, into one file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConvertOptions {
    /// The dtype that floats get; `None` keeps each as it is stored. Integers and truth values always stay.
    pub dtype: Option<FloatDType>,
    /// The most bytes of tensors in one file, unless a single tensor is larger; `None` for one file.
    pub max_shard_size: Option<u64>,
    /// What to do about NaN and infinite weights.
    pub not_finite: NotFinite,
    /// What to do about numbers that [`ConvertOptions::dtype`] cannot hold.
    pub overflow: Overflow,
}

/// What to do about numbers that are too large for the dtype they are to be stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// They are an error.
    #[default]
    Refuse,
    /// They become infinite.
    Allow,
}

/// Writes `checkpoint` into `folder` as transformers does: `{stem}.safetensors`, or, when that would be larger than a
/// shard may be, `{stem}-00001-of-0000N.safetensors` and `{stem}.safetensors.index.json`, which is written last.
/// Tensors stay whole and fill the shards in their order. `progress` gets the bytes of each tensor that was read.
///
/// Returns the files. On an error none of them is left.
///
/// # Errors
/// [`Error::Values`] with all tensors that hold values which cannot be kept; what opening and reading the checkpoint
/// says; [`Error::Io`].
pub fn convert(
    checkpoint: &dyn Checkpoint,
    folder: &Path,
    stem: &str,
    options: &ConvertOptions,
    progress: &dyn Fn(u64),
) -> Result<Vec<PathBuf>, Error> {
    let copier = Copier::new(checkpoint, options, progress);
    let tensors = checkpoint.entries().iter().map(|entry| copier.copy(entry)).collect();
    write_shards(&copier, shards(tensors, options.max_shard_size.unwrap_or(u64::MAX)), folder, stem)
}

/// As [`convert`], with a shard for each of so many ranks, whatever its size: an equal share of the experts, one by one,
/// and in the first one all the rest. `keys` says which tensors are experts'.
///
/// # Errors
/// As [`convert`]; [`Error::Parts`] if there are no experts, or they cannot be spread evenly; [`Error::Rule`].
pub fn spread(
    checkpoint: &dyn Checkpoint,
    folder: &Path,
    stem: &str,
    (keys, ranks): (&KeyMap, usize),
    options: &ConvertOptions,
    progress: &dyn Fn(u64),
) -> Result<Vec<PathBuf>, Error> {
    let checkpoint = one_by_one(checkpoint, keys)?;
    let homes = homes(&checkpoint, keys, ranks)?;
    let copier = Copier::new(&checkpoint, options, progress);
    let mut shards: Vec<Vec<Pending>> = (0..ranks).map(|_| Vec::new()).collect();
    for (entry, home) in checkpoint.entries().iter().zip(homes) {
        shards[home].push(copier.copy(entry));
    }
    write_shards(&copier, shards, folder, stem)
}

/// Writes the shards, and then what names them.
fn write_shards(
    copier: &Copier,
    mut shards: Vec<Vec<Pending>>,
    folder: &Path,
    stem: &str,
) -> Result<Vec<PathBuf>, Error> {
    let names: Vec<String> = match shards.len() {
        0 | 1 => vec![format!("{stem}.safetensors")],
        n => (1..=n).map(|i| format!("{stem}-{i:05}-of-{n:05}.safetensors")).collect(),
    };
    shards.resize_with(names.len(), Vec::new); // a checkpoint without tensors is a file without tensors

    let tensors = |shard: &Vec<Pending>| {
        shard.iter().map(|tensor| (tensor.key.clone(), tensor.length())).collect::<Vec<_>>()
    };
    let index = (names.len() > 1).then(|| index(names.iter().cloned().zip(shards.iter().map(tensors))));
    let mut files = Files(Vec::new());
    for (name, shard) in names.iter().zip(shards) {
        let path = folder.join(name);
        write(&path, shard, HashMap::from([("format".to_owned(), "pt".to_owned())]))?;
        files.0.push(path);
    }
    copier.finish()?;
    if let Some(index) = index {
        let path = folder.join(format!("{stem}.safetensors.index.json"));
        let io = |source| Error::Io { path: path.clone(), source };
        write_whole(&path, |out| out.write_all(index.as_bytes()).map_err(io))?;
        files.0.push(path);
    }
    Ok(std::mem::take(&mut files.0))
}

/// Which tensor goes into which file. A tensor that is larger than a shard has one of its own, which does not end
/// the shard that is being filled: as in huggingface_hub, so that files have the same names and contents.
fn shards(tensors: Vec<Pending>, limit: u64) -> Vec<Vec<Pending>> {
    let (mut shards, mut shard, mut filled) = (Vec::new(), Vec::new(), 0);
    for tensor in tensors {
        let length = tensor.length() as u64;
        if length > limit {
            shards.push(vec![tensor]);
            continue;
        }
        if length > limit - filled {
            shards.push(std::mem::take(&mut shard));
            filled = 0;
        }
        filled += length;
        shard.push(tensor);
    }
    if !shard.is_empty() {
        shards.push(shard);
    }
    shards
}

/// Written files, removed unless they are taken.
struct Files(Vec<PathBuf>);

impl Drop for Files {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The bytes of a tensor, which need not stay in memory after this.
struct Read<'a> {
    checkpoint: &'a dyn Checkpoint,
    bytes: Cow<'a, [u8]>,
    entry: &'a Entry,
}

impl Deref for Read<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Read<'_> {
    fn drop(&mut self) {
        self.checkpoint.release(&self.entry.name);
    }
}

/// Copies the tensors of a checkpoint, floats in another dtype if one is asked for, and notes the values that do not
/// come through.
pub(crate) struct Copier<'a> {
    checkpoint: &'a dyn Checkpoint,
    options: &'a ConvertOptions,
    progress: &'a dyn Fn(u64),
    /// Of tensors that have been read so far.
    problems: RefCell<Vec<Problem>>,
}

impl<'a> Copier<'a> {
    pub fn new(
        checkpoint: &'a dyn Checkpoint,
        options: &'a ConvertOptions,
        progress: &'a dyn Fn(u64),
    ) -> Self {
        Self { checkpoint, options, progress, problems: RefCell::default() }
    }

    /// The tensor as it will be stored.
    pub fn copy<'s>(&'s self, entry: &'s Entry) -> Pending<'s> {
        let to = match self.options.dtype {
            Some(dtype) if entry.dtype.is_float() => float_stored(dtype),
            _ => entry.dtype,
        };
        Pending::new(&entry.name, to, &entry.shape, move || {
            let bytes =
                Read { checkpoint: self.checkpoint, bytes: self.checkpoint.bytes(&entry.name)?, entry };
            (self.progress)(bytes.len() as u64);
            let written: Written = match to {
                Dtype::F64 => self.float::<f64>(entry, to, &bytes),
                Dtype::F32 => self.float::<f32>(entry, to, &bytes),
                Dtype::F16 => self.float::<f16>(entry, to, &bytes),
                Dtype::BF16 => self.float::<bf16>(entry, to, &bytes),
                _ => return Ok(Box::new(bytes)),
            };
            Ok(if to == entry.dtype { Box::new(bytes) } else { written })
        })
    }

    /// Stored floats as values of `T`, which is what `to` calls them.
    fn float<T: Value>(&self, entry: &Entry, to: Dtype, bytes: &[u8]) -> Written<'static> {
        let mut read: Vec<T> = zeros(bytes.len() / entry.dtype.size());
        if read_into(entry.dtype, bytes, &mut read).is_some() {
            let mut wide: Vec<f64> = zeros(read.len());
            let before = read_into(entry.dtype, bytes, &mut wide);
            let key = entry.name.clone();
            let lost = |&i: &usize| !Value::is_finite(read[i]) && wide[i].is_finite();
            if let Some((count, first_index)) = before
                && self.options.not_finite == NotFinite::Refuse
            {
                self.note(Problem::NotFinite { key: key.clone(), dtype: entry.dtype, count, first_index });
            }
            if let Some(first_index) = (0..read.len()).find(lost)
                && self.options.overflow == Overflow::Refuse
            {
                let count = (0..read.len()).filter(lost).count();
                self.note(Problem::Overflow { key, dtype: to, count, first_index });
            }
        }
        Box::new(Bytes::from_elems(read))
    }

    /// That something does not come through.
    pub fn note(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }

    /// That everything came through.
    pub fn finish(&self) -> Result<(), Error> {
        let problems = self.problems.take();
        if problems.is_empty() {
            return Ok(());
        }
        Err(Error::Values { file: self.checkpoint.path().to_owned(), problems })
    }
}

#[cfg(test)]
mod tests;
