//! Checkpoint files as lists of named tensors.
//!
//! Both readers are lazy: opening reads the names, a tensor's bytes are touched when they are asked for. Files are
//! memory-mapped; one that is cut short by another program while it is mapped ends this one (SIGBUS), as with every
//! mapping.

mod pickle;
pub mod safetensors;
pub mod torch;
mod zip;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::error::{Error, Lookalike, nearest};

pub use safetensors::{Memory, SafetensorsFile};
pub use torch::TorchFile;

/// The file names that are taken from a folder, the first that exists.
pub const FILES: &[&str] =
    &["model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin", "open_clip_pytorch_model.bin"];

/// The indices of checkpoints that are split into several files.
const SHARD_INDICES: &[&str] = &["model.safetensors.index.json", "pytorch_model.bin.index.json"];

/// Named tensors, read when asked for.
pub trait Checkpoint: Send + Sync {
    /// The file, for messages.
    fn path(&self) -> &Path;

    /// What there is, in the order of the file.
    fn entries(&self) -> &[Entry];

    /// The values of one tensor: little-endian, row-major, exactly as many as its entry says.
    ///
    /// # Errors
    /// [`Error::NoTensor`] for a name that is not among the entries.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error>;
}

/// A tensor's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key in the checkpoint.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What each value is.
    pub dtype: Dtype,
}

/// What a stored value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names say it
pub enum Dtype {
    F64,
    F32,
    F16,
    BF16,
    I64,
    I32,
    I16,
    I8,
    U64,
    U32,
    U16,
    U8,
    Bool,
}

impl Dtype {
    /// Every dtype with its name in a safetensors header.
    const NAMES: &[(Dtype, &str)] = &[
        (Dtype::F64, "F64"),
        (Dtype::F32, "F32"),
        (Dtype::F16, "F16"),
        (Dtype::BF16, "BF16"),
        (Dtype::I64, "I64"),
        (Dtype::I32, "I32"),
        (Dtype::I16, "I16"),
        (Dtype::I8, "I8"),
        (Dtype::U64, "U64"),
        (Dtype::U32, "U32"),
        (Dtype::U16, "U16"),
        (Dtype::U8, "U8"),
        (Dtype::Bool, "BOOL"),
    ];

    /// Bytes per value.
    pub const fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
            Dtype::F32 | Dtype::I32 | Dtype::U32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 | Dtype::U16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool => 1,
        }
    }

    /// Whether the values are floating-point numbers.
    pub const fn is_float(self) -> bool {
        matches!(self, Dtype::F64 | Dtype::F32 | Dtype::F16 | Dtype::BF16)
    }

    /// The name in a safetensors header, e.g. `BF16`.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(dtype, _)| *dtype == self).map_or("", |(_, name)| name)
    }

    /// The dtype of a name in a safetensors header.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(_, known)| *known == name).map(|(dtype, _)| *dtype)
    }

    /// The bytes that a tensor of this dtype takes; `None` when they cannot be counted.
    pub(crate) fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        shape.iter().try_fold(self.size(), |bytes, &size| bytes.checked_mul(size))
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Opens a checkpoint: a file, or a folder in which the first of [`FILES`] is taken.
///
/// The content decides how a file is read, not its name.
///
/// # Errors
/// [`Error::NoWeights`] for a folder without any; [`Error::Sharded`] when it only has the index of a sharded
/// checkpoint; [`Error::NotWeights`], [`Error::Header`] or [`Error::Torch`] for a file that is something else or broken.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>, Error> {
    let path = if path.is_dir() { find(path)? } else { path.to_owned() };
    let file = map(&path)?;
    match Format::of(&path, &file) {
        Some(Format::Safetensors) => Ok(Box::new(SafetensorsFile::parse(path, file)?)),
        Some(Format::Torch) => Ok(Box::new(TorchFile::parse(path, file)?)),
        None => Err(Error::NotWeights { path, found: lookalike(&file).unwrap_or(Lookalike::Unknown) }),
    }
}

/// The weights file of a folder.
fn find(folder: &Path) -> Result<PathBuf, Error> {
    if let Some(path) = FILES.iter().map(|name| folder.join(name)).find(|path| path.exists()) {
        return Ok(path);
    }
    match SHARD_INDICES.iter().map(|name| folder.join(name)).find(|path| path.exists()) {
        Some(index) => Err(Error::Sharded { index }),
        None => Err(Error::NoWeights { folder: folder.to_owned(), looked_for: FILES }),
    }
}

/// Maps a file into memory.
fn map(path: &Path) -> Result<Mmap, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::NotWeights { path: path.to_owned(), found: Lookalike::NotAFile });
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only and private to this value. That no other program changes the file while it is
    // mapped is the caller's part, as said in the module's documentation; the bytes are only ever read as numbers.
    unsafe { Mmap::map(&file) }.map_err(io)
}

enum Format {
    Safetensors,
    Torch,
}

impl Format {
    /// How a file wants to be read, by its first bytes; by its name when they are odd, for the better message.
    fn of(path: &Path, bytes: &[u8]) -> Option<Self> {
        match bytes {
            // the header is a JSON object after its length
            [_, _, _, _, _, _, _, _, b'{', ..] => Some(Format::Safetensors),
            [b'P', b'K', 3, 4, ..] => Some(Format::Torch),
            _ if path.extension().is_some_and(|extension| extension == "safetensors") => {
                Some(Format::Safetensors)
            }
            [0x80, 1..=5, ..] => Some(Format::Torch),
            _ if torch::is_tar(bytes) => Some(Format::Torch),
            _ => None,
        }
    }
}

/// What is often found under the name of a weights file, by its first bytes.
fn lookalike(bytes: &[u8]) -> Option<Lookalike> {
    if bytes.is_empty() {
        return Some(Lookalike::Empty);
    }
    let start = &bytes[..bytes.len().min(256)];
    let start = match std::str::from_utf8(start) {
        Ok(start) => start,
        // cut in the middle of a character
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&start[..error.valid_up_to()]).ok()?
        }
        Err(_) => return None,
    };
    let start = start.trim_start().to_lowercase();
    if start.starts_with("version https://git-lfs") {
        Some(Lookalike::LfsPointer)
    } else if start.starts_with("<!doctype html") || start.starts_with("<html") {
        Some(Lookalike::WebPage)
    } else if !start.is_empty() && !start.chars().any(|c| c.is_control() && !c.is_whitespace()) {
        Some(Lookalike::Text)
    } else {
        None
    }
}

/// The place of `name` among `entries`, by `index`.
fn position(
    file: &Path,
    entries: &[Entry],
    index: &HashMap<String, usize>,
    name: &str,
) -> Result<usize, Error> {
    index.get(name).copied().ok_or_else(|| Error::NoTensor {
        file: file.to_owned(),
        key: name.to_owned(),
        nearest: nearest(name, entries.iter().map(|entry| entry.name.as_str())),
    })
}

#[cfg(test)]
mod tests;
