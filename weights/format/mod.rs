//! Checkpoint files as lists of named tensors.
//!
//! - [`mod@safetensors`], [`torch`] (also TorchScript and Paddle) and [`gguf`] read single files;
//! - [`shards`] reads a checkpoint in several files as one;
//! - [`megatron`] merges the files of tensor-parallel ranks;
//! - [`row_scaled`] reads weight-only quantized ones as if they were not;
//! - [`rearranged`] gives the tensors of others new names;
//! - [`pipeline`] lists the parts of a diffusers folder.
//!
//! All readers are lazy: opening reads the names, a tensor's bytes are touched when they are asked for. Files are
//! memory-mapped, and stay so for as long as the checkpoint or a tensor that views the file lives (see
//! [`mod@crate::load`]). A mapped file may be deleted or replaced by another of its name: the mapping keeps what it
//! was. It must not be changed in place: what is overwritten changes in the tensors as well, and a file that is cut
//! short ends this program (SIGBUS), as with every mapping.

pub mod gguf;
pub mod low_rank;
pub mod megatron;
mod pickle;
pub mod pipeline;
pub mod rearranged;
pub mod row_scaled;
pub mod safetensors;
pub mod shards;
pub mod torch;
pub(crate) mod zip;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use burn::tensor::{AllocationProperty, Bytes};
use memmap2::Mmap;
use volary_kernels::ops::PackedMatrix;

use crate::error::{Error, Lookalike, nearest};
use crate::quantized::{Bits, Quantization, unpacked};

pub use gguf::GgufFile;
pub use megatron::{MegatronLayout, Merge, RankOptions, Ranks};
pub use pipeline::Pipeline;
pub use rearranged::{Origin, Rearranged};
pub use row_scaled::RowScaled;
pub use safetensors::{Memory, SafetensorsFile};
pub use shards::Sharded;
pub use torch::TorchFile;

/// The file names that are taken from a folder, the first that exists: of transformers, open_clip, timm, diffusers and
/// PaddleNLP, safetensors before pickles, one file before several.
pub const FILES: &[&str] = &[
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "model_state.pdparams",
];

/// What ends the name of an index of shards.
const INDEX: &str = ".index.json";

/// What is wanted from a folder. The default is the weights themselves, in one or several files.
#[derive(Debug, Clone, Copy, Default)]
pub struct OpenOptions<'a> {
    /// Another version of the weights, e.g. `fp16` for `model.fp16.safetensors`. A folder without it is an error: the
    /// other weights never take its place.
    pub variant: Option<&'a str>,
    /// How the tensors of tensor-parallel ranks are put together, for a folder that has nothing else.
    pub ranks: Option<&'a RankOptions>,
    /// How many bits the numbers have in matrices beside which scales of their rows stand, as [`row_scaled`] says.
    /// Without it, they are what is stored.
    pub scaled: Option<Bits>,
}

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

    /// What [`Checkpoint::bytes`] gives, without a copy and for as long as it is held, where it lies so in the file:
    /// of any alignment. Whoever writes to it gets a copy first; the file never changes.
    fn shared(&self, _name: &str) -> Option<Bytes> {
        None
    }

    /// A matrix as it is packed in the file, if it is; [`Checkpoint::bytes`] gives the values that it means.
    ///
    /// # Errors
    /// As [`Checkpoint::bytes`].
    fn packed(&self, _name: &str) -> Result<Option<PackedMatrix>, Error> {
        Ok(None)
    }

    /// How values are packed, if they are.
    fn quantization(&self) -> Option<Quantization> {
        None
    }

    /// Says that a tensor has been read: what of its file is kept in memory may go. Reading it again still works.
    fn release(&self, _name: &str) {}
}

/// What points to a checkpoint is one.
macro_rules! pointers {
    ($($pointer:ty),*) => {
        $(impl<C: Checkpoint + ?Sized> Checkpoint for $pointer {
            fn path(&self) -> &Path {
                (**self).path()
            }

            fn entries(&self) -> &[Entry] {
                (**self).entries()
            }

            fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
                (**self).bytes(name)
            }

            fn shared(&self, name: &str) -> Option<Bytes> {
                (**self).shared(name)
            }

            fn packed(&self, name: &str) -> Result<Option<PackedMatrix>, Error> {
                (**self).packed(name)
            }

            fn quantization(&self) -> Option<Quantization> {
                (**self).quantization()
            }

            fn release(&self, name: &str) {
                (**self).release(name);
            }
        })*
    };
}

pointers!(&C, Box<C>);

/// Where the bytes of a checkpoint lie.
pub(crate) trait Backing: AsRef<[u8]> + Send + Sync {
    /// A range that keeps what it lies in alive; `None` where that cannot be.
    fn shared(&self, range: Range<usize>) -> Option<Bytes>;

    /// Says that a range has been read, and need not be kept in memory.
    fn release(&self, _range: Range<usize>) {}
}

impl Backing for Cow<'static, [u8]> {
    fn shared(&self, range: Range<usize>) -> Option<Bytes> {
        match *self {
            Cow::Borrowed(bytes) => {
                Some(Bytes::from_shared(bytes::Bytes::from_static(&bytes[range]), AllocationProperty::Other))
            }
            Cow::Owned(_) => None,
        }
    }
}

/// A file that is mapped into memory, for as long as this value or a tensor that views it lives.
#[derive(Debug, Clone)]
pub struct Mapped(Arc<Mmap>);

impl From<Mmap> for Mapped {
    fn from(file: Mmap) -> Self {
        Self(Arc::new(file))
    }
}

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Backing for Mapped {
    /// Not on Windows, where a file cannot be replaced while it is mapped: a loaded model must not stand in the way of
    /// saving it under its old name.
    fn shared(&self, range: Range<usize>) -> Option<Bytes> {
        cfg!(unix).then(|| {
            let bytes = bytes::Bytes::from_owner(self.clone()).slice(range);
            Bytes::from_shared(bytes, AllocationProperty::File)
        })
    }

    fn release(&self, range: Range<usize>) {
        // Only the mapped copy of the page goes: the file stays, and in the system's cache as well.
        // SAFETY: nothing can be lost, for the mapping is read-only; later reads come from the file again.
        #[cfg(unix)]
        let _ = unsafe {
            self.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
        };
    }
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

impl Entry {
    /// The bytes that its values take.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
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

/// Opens a checkpoint: a file, the index of several, or a folder in which the first of [`FILES`] is taken, or else its only
/// `.pth` file.
///
/// The content decides how a file is read, not its name.
///
/// # Errors
/// [`Error::NoWeights`] for a folder without any; [`Error::Shards`] for files that do not belong together;
/// [`Error::NotWeights`], [`Error::Header`], [`Error::Torch`] or [`Error::Gguf`] for a file that is something else or
/// broken.
pub fn open(path: &Path) -> Result<Box<dyn Checkpoint>, Error> {
    open_with(path, &OpenOptions::default())
}

/// As [`open`], with a say in what is taken from a folder.
///
/// # Errors
/// As [`open`]; [`Error::NoVariant`] when a variant is not there; [`Error::Ranks`] for tensor-parallel ranks that do
/// not fit together; [`Error::Quantized`] for scales that do not fit their matrices.
pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Box<dyn Checkpoint>, Error> {
    let stored = open_stored(path, options)?;
    match options.scaled {
        Some(_) => Ok(Box::new(RowScaled::new(stored, options.scaled)?)),
        None => Ok(stored),
    }
}

/// As [`open_with`], with whole numbers as they are stored; but ranks may each have scales of their own.
fn open_stored(path: &Path, options: &OpenOptions) -> Result<Box<dyn Checkpoint>, Error> {
    if !path.is_dir() {
        return open_named(path);
    }
    let looked_for = looked_for(options.variant);
    // a link to nothing is a file that is missing, not a reason to take another
    let is_there = |path: &PathBuf| path.symlink_metadata().is_ok();
    let taken = looked_for.iter().map(|name| path.join(name)).find(is_there);
    if let Some(file) = taken.filter(|_| options.variant.is_none_or(shards::is_file_name)) {
        return open_named(&file);
    }
    let listing = file_names(path)?;
    for file in FILES.iter().filter(|file| !file.ends_with(INDEX)) {
        if let Some(shards) = shards::set_of(path, &listing, file, options.variant)? {
            return Ok(Box::new(Sharded::of(path, shards)?));
        }
    }
    let folder = path.to_owned();
    if let Some(variant) = options.variant {
        return Err(Error::NoVariant { folder, variant: variant.to_owned(), looked_for });
    }
    if let Some(ranks) = megatron::open(path, options.ranks, options.scaled)? {
        return Ok(ranks);
    }
    match &alone(&listing)[..] {
        [file] => open_file(&path.join(file)),
        _ => Err(Error::NoWeights { folder, looked_for: FILES }),
    }
}

/// The files that can only be weights, whatever their names: authors who post one `.pth` name it after the model.
fn alone(listing: &[String]) -> Vec<&String> {
    listing.iter().filter(|name| Path::new(name).extension().is_some_and(|end| end == "pth")).collect()
}

/// The file names that are taken from a folder: [`FILES`], or those of a variant, which may stand before the last part of
/// a name or before `.json` of an index.
pub fn looked_for(variant: Option<&str>) -> Vec<String> {
    let Some(variant) = variant else { return FILES.iter().map(|&name| name.to_owned()).collect() };
    let of_file = |name: &str| match name.rsplit_once('.') {
        Some((stem, extension)) => format!("{stem}.{variant}.{extension}"),
        None => format!("{name}.{variant}"),
    };
    let both = |&name: &&str| match name.strip_suffix(INDEX) {
        Some(file) => vec![format!("{}{INDEX}", of_file(file)), format!("{file}.index.{variant}.json")],
        None => vec![of_file(name)],
    };
    FILES.iter().flat_map(both).collect()
}

/// The names in a folder.
pub(crate) fn file_names(folder: &Path) -> Result<Vec<String>, Error> {
    let io = |source| Error::Io { path: folder.to_owned(), source };
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

/// Opens a file, or the files that an index names.
fn open_named(path: &Path) -> Result<Box<dyn Checkpoint>, Error> {
    let file = map(path)?;
    let is_json = path.extension().is_some_and(|extension| extension == "json");
    match is_json && Format::of(path, file.as_ref()).is_none() {
        true => Ok(Box::new(Sharded::open(path)?)),
        false => open_mapped(path, file),
    }
}

/// Opens one file, which is a checkpoint by itself.
pub(crate) fn open_file(path: &Path) -> Result<Box<dyn Checkpoint>, Error> {
    open_mapped(path, map(path)?)
}

fn open_mapped(path: &Path, file: Mapped) -> Result<Box<dyn Checkpoint>, Error> {
    let path = path.to_owned();
    match Format::of(&path, file.as_ref()) {
        Some(Format::Safetensors) => unpacked(SafetensorsFile::parse(path, file)?),
        Some(Format::Torch) => Ok(Box::new(TorchFile::parse(path, file)?)),
        Some(Format::Gguf) => Ok(Box::new(GgufFile::parse(path, file)?)),
        None => {
            Err(Error::NotWeights { path, found: lookalike(file.as_ref()).unwrap_or(Lookalike::Unknown) })
        }
    }
}

/// Maps a file into memory.
fn map(path: &Path) -> Result<Mapped, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let metadata = std::fs::metadata(path).map_err(io)?;
    if !metadata.is_file() {
        return Err(Error::NotWeights { path: path.to_owned(), found: Lookalike::NotAFile });
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is read-only. That no other program changes the file while it is
    // mapped is the caller's part, as said in the module's documentation; the bytes are only ever read as numbers.
    unsafe { Mmap::map(&file) }.map(Mapped::from).map_err(io)
}

enum Format {
    Safetensors,
    Torch,
    Gguf,
}

impl Format {
    /// How a file wants to be read, by its first bytes; by its name when they are odd, for the better message.
    fn of(path: &Path, bytes: &[u8]) -> Option<Self> {
        match bytes {
            // the header is a JSON object after its length, of less than 4 GB
            [_, _, _, _, 0, 0, 0, 0, b'{', ..] => Some(Format::Safetensors),
            [b'P', b'K', 3, 4, ..] => Some(Format::Torch),
            [b'G', b'G', b'U', b'F', ..] => Some(Format::Gguf),
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

/// The tensors of a checkpoint, found by their names.
#[derive(Debug)]
pub(crate) struct Contents {
    pub path: PathBuf,
    pub entries: Vec<Entry>,
    index: HashMap<String, usize>,
}

impl Contents {
    /// The names are each there once.
    pub fn new(path: PathBuf, entries: Vec<Entry>) -> Self {
        let index = entries.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i)).collect();
        Self { path, entries, index }
    }

    /// The place of `name` among the entries, if it is there.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    /// The place of `name` among the entries.
    pub fn position(&self, name: &str) -> Result<usize, Error> {
        self.find(name).ok_or_else(|| Error::NoTensor {
            file: self.path.clone(),
            key: name.to_owned(),
            nearest: nearest(name, self.entries.iter().map(|entry| entry.name.as_str())),
        })
    }
}

#[cfg(test)]
mod tests;
