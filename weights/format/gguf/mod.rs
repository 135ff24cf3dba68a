//! GGUF files, versions 2 and 3: typed metadata, then tensors, some of them quantized in blocks.
//!
//! Tensors that are quantized appear as F32, and are multiplied out when they are asked for (`blocks.rs`), with the
//! bits of ggml's own `dequantize_row`. Dimensions are stored innermost first and given outermost first, as everywhere
//! else here. The format is described at <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

mod blocks;

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;

use super::{Backing, Checkpoint, Contents, Dtype, Entry, Mapped, lookalike, map};
use crate::error::Error;
use blocks::Blocks;

const MAGIC: &[u8] = b"GGUF";
/// Where tensors begin when the metadata does not say it.
const ALIGNMENT: usize = 32;
/// How deep arrays may nest in the metadata.
const DEEPEST: usize = 8;
/// As many dimensions as ggml has.
const MOST_DIMENSIONS: u32 = 4;
/// The longest name of a tensor; ggml's own limit is 64.
const LONGEST_NAME: usize = 1024;

/// What can be wrong with a GGUF file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum GgufError {
    #[error("it does not begin with GGUF")]
    Magic,
    #[error("version {found} is not read, only 2 and 3 are")]
    Version { found: u32 },
    #[error("it is big-endian")]
    BigEndian,
    #[error("it ends in the middle of {what}: truncated?")]
    Truncated { what: &'static str },
    #[error("{what} is not UTF-8")]
    NotText { what: &'static str },
    #[error("the metadata `{key}` is there twice")]
    DuplicateMetadata { key: String },
    #[error("the metadata `{key}` has the unknown type {found}")]
    MetadataType { key: String, found: u32 },
    #[error("the metadata `{key}` has arrays nested deeper than {DEEPEST}")]
    MetadataDepth { key: String },
    #[error("the metadata `general.alignment` is {found}, expected a power of two from 8 to 65536")]
    Alignment { found: String },
    #[error("a tensor name of {length} bytes")]
    LongName { length: usize },
    #[error("tensor `{key}` is described twice")]
    DuplicateKey { key: String },
    #[error("tensor `{key}` has {found} dimensions, at most {MOST_DIMENSIONS} are read")]
    Dimensions { key: String, found: u32 },
    #[error("tensor `{key}` has the type {id} ({name}), which is not read")]
    TensorType { key: String, id: u32, name: &'static str },
    #[error("tensor `{key}` has rows of {row} values, {name} has blocks of {block}")]
    Row { key: String, row: usize, name: &'static str, block: usize },
    #[error("tensor `{key}` has a shape of more bytes than can be counted: {shape:?}")]
    TooLarge { key: String, shape: Vec<usize> },
    #[error("tensor `{key}` begins at byte {offset} of the data, which is not a multiple of {alignment}")]
    Unaligned { key: String, offset: usize, alignment: usize },
    #[error("tensor `{key}` ends at byte {end} of the data, the file has {found}: truncated?")]
    OutOfFile { key: String, end: usize, found: usize },
    #[error("tensor `{key}` begins at byte {begin} of the data, inside `{other}`")]
    Overlap { key: String, begin: usize, other: String },
}

/// A GGUF checkpoint in `B`: a mapped file ([`GgufFile`]) or memory.
#[derive(Debug)]
pub struct Gguf<B> {
    contents: Contents,
    bytes: B,
    stored: Vec<Stored>,
    metadata: Vec<Pair>,
}

/// A memory-mapped GGUF file.
pub type GgufFile = Gguf<Mapped>;

/// How an entry's values are stored.
#[derive(Debug)]
struct Stored {
    kind: Kind,
    /// Where in the file.
    range: Range<usize>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Plain(Dtype),
    Blocks(Blocks),
}

/// A line of the metadata.
#[derive(Debug)]
struct Pair {
    key: Range<usize>,
    kind: u32,
    /// The value, in the file.
    value: Range<usize>,
}

impl GgufFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotWeights`] for something else under this name; [`Error::Gguf`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let bytes = map(&path)?;
        Self::parse(path, bytes)
    }
}

impl<B: AsRef<[u8]>> Gguf<B> {
    /// Reads the names in `bytes`, found at `path`.
    ///
    /// # Errors
    /// [`Error::NotWeights`] for something else under this name; [`Error::Gguf`].
    pub fn parse(path: PathBuf, bytes: B) -> Result<Self, Error> {
        match Layout::read(bytes.as_ref()) {
            Ok(Layout { metadata, entries, stored }) => {
                Ok(Self { contents: Contents::new(path, entries), bytes, stored, metadata })
            }
            Err(reason) => Err(match lookalike(bytes.as_ref()) {
                Some(found) if reason == GgufError::Magic => Error::NotWeights { path, found },
                _ => Error::Gguf { path, reason },
            }),
        }
    }

    /// The metadata in the order of the file, e.g. `general.architecture`.
    pub fn metadata(&self) -> impl Iterator<Item = (&str, Value<'_>)> {
        let file = self.bytes.as_ref();
        self.metadata.iter().filter_map(|Pair { key, kind, value }| {
            let key = std::str::from_utf8(file.get(key.clone())?).ok()?;
            let mut cursor = Cursor { bytes: file.get(..value.end)?, at: value.start };
            Some((key, cursor.value(*kind, DEEPEST, "").ok()?))
        })
    }

    /// One value of the metadata.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.metadata().find(|(name, _)| *name == key).map(|(_, value)| value)
    }

    /// The name of the type in which a tensor is stored, e.g. `Q4_K`.
    pub fn stored_as(&self, name: &str) -> Option<&'static str> {
        Some(match self.stored[self.contents.find(name)?].kind {
            Kind::Plain(dtype) => dtype.name(),
            Kind::Blocks(blocks) => blocks.name(),
        })
    }
}

impl<B: Backing> Checkpoint for Gguf<B> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = self.contents.position(name)?;
        let Stored { kind, range } = &self.stored[i];
        let stored = &self.bytes.as_ref()[range.clone()];
        Ok(match kind {
            Kind::Plain(_) => Cow::Borrowed(stored),
            Kind::Blocks(blocks) => Cow::Owned(blocks.dequantize(stored)),
        })
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        let Stored { kind, range } = &self.stored[self.contents.find(name)?];
        match kind {
            Kind::Plain(_) => self.bytes.shared(range.clone()),
            Kind::Blocks(_) => None,
        }
    }

    fn release(&self, name: &str) {
        if let Some(i) = self.contents.find(name) {
            self.bytes.release(self.stored[i].range.clone());
        }
    }
}

/// A value of the metadata.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)] // the names say it
pub enum Value<'a> {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    U64(u64),
    I64(i64),
    F64(f64),
    Bool(bool),
    String(&'a str),
    Array(Array<'a>),
}

impl Value<'_> {
    /// The value as a whole number that is not negative, whatever its width.
    pub fn as_u64(&self) -> Option<u64> {
        match *self {
            Value::U8(value) => Some(value.into()),
            Value::U16(value) => Some(value.into()),
            Value::U32(value) => Some(value.into()),
            Value::U64(value) => Some(value),
            Value::I8(value) => value.try_into().ok(),
            Value::I16(value) => value.try_into().ok(),
            Value::I32(value) => value.try_into().ok(),
            Value::I64(value) => value.try_into().ok(),
            _ => None,
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::U8(value) => write!(f, "{value}"),
            Value::I8(value) => write!(f, "{value}"),
            Value::U16(value) => write!(f, "{value}"),
            Value::I16(value) => write!(f, "{value}"),
            Value::U32(value) => write!(f, "{value}"),
            Value::I32(value) => write!(f, "{value}"),
            Value::F32(value) => write!(f, "{value}"),
            Value::U64(value) => write!(f, "{value}"),
            Value::I64(value) => write!(f, "{value}"),
            Value::F64(value) => write!(f, "{value}"),
            Value::Bool(value) => write!(f, "{value}"),
            Value::String(value) => write!(f, "{value}"),
            Value::Array(array) => write!(f, "[{} values]", array.len()),
        }
    }
}

/// An array of the metadata, read as it is walked through: a vocabulary stays in the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    kind: u32,
    length: usize,
    /// The items.
    bytes: &'a [u8],
    depth: usize,
}

impl<'a> Array<'a> {
    /// How many items.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The items.
    pub fn iter(&self) -> impl Iterator<Item = Value<'a>> + use<'a> {
        let Array { kind, length, bytes, depth } = *self;
        let mut cursor = Cursor { bytes, at: 0 };
        (0..length).map_while(move |_| cursor.value(kind, depth, "").ok())
    }
}

/// What a file says, once it has been found to be true.
struct Layout {
    metadata: Vec<Pair>,
    entries: Vec<Entry>,
    stored: Vec<Stored>,
}

impl Layout {
    fn read(file: &[u8]) -> Result<Self, GgufError> {
        if !file.starts_with(MAGIC) {
            return Err(GgufError::Magic);
        }
        let mut cursor = Cursor { bytes: file, at: MAGIC.len() };
        match cursor.u32("the version")? {
            2 | 3 => {}
            found if matches!(found.swap_bytes(), 1..=3) => return Err(GgufError::BigEndian),
            found => return Err(GgufError::Version { found }),
        }
        let tensors = cursor.u64("the number of tensors")?;
        let pairs = cursor.u64("the number of metadata pairs")?;

        let mut metadata = Vec::new();
        let mut alignment = ALIGNMENT;
        let mut keys = std::collections::HashSet::new();
        for _ in 0..pairs {
            let (range, key) = cursor.string("a metadata key")?;
            if !keys.insert(key) {
                return Err(GgufError::DuplicateMetadata { key: key.to_owned() });
            }
            let kind = cursor.u32("a metadata type")?;
            let start = cursor.at;
            let value = cursor.value(kind, DEEPEST, key)?;
            if key == "general.alignment" {
                let is_fit = |&size: &usize| size.is_power_of_two() && (8..=65536).contains(&size);
                let size = value.as_u64().and_then(|size| usize::try_from(size).ok()).filter(is_fit);
                alignment = size.ok_or_else(|| GgufError::Alignment { found: value.to_string() })?;
            }
            metadata.push(Pair { key: range, kind, value: start..cursor.at });
        }

        let mut infos = Vec::new();
        let mut names = std::collections::HashSet::new();
        for _ in 0..tensors {
            let info = Info::read(&mut cursor)?;
            if !names.insert(info.key) {
                return Err(GgufError::DuplicateKey { key: info.key.to_owned() });
            }
            infos.push(info);
        }
        drop(names);

        let data_start = cursor.at.checked_next_multiple_of(alignment).unwrap_or(usize::MAX).min(file.len());
        let data = file.len() - data_start;
        infos.sort_by_key(|info| info.offset);
        let mut layout = Self { metadata, entries: Vec::new(), stored: Vec::new() };
        let mut previous: Option<(usize, &str)> = None;
        for Info { key, shape, kind, offset } in infos {
            let owned = || key.to_owned();
            let Some(length) = kind.bytes_of(&shape) else {
                return Err(GgufError::TooLarge { key: owned(), shape });
            };
            if !offset.is_multiple_of(alignment) {
                return Err(GgufError::Unaligned { key: owned(), offset, alignment });
            }
            let end = offset.saturating_add(length);
            if end > data {
                return Err(GgufError::OutOfFile { key: owned(), end, found: data });
            }
            if let Some((last, other)) = previous
                && offset < last
                && length > 0
            {
                return Err(GgufError::Overlap { key: owned(), begin: offset, other: other.to_owned() });
            }
            if length > 0 {
                previous = Some((end, key));
            }
            let dtype = match kind {
                Kind::Plain(dtype) => dtype,
                Kind::Blocks(_) => Dtype::F32,
            };
            layout.entries.push(Entry { name: owned(), shape, dtype });
            layout.stored.push(Stored { kind, range: data_start + offset..data_start + end });
        }
        Ok(layout)
    }
}

/// A tensor's description.
struct Info<'a> {
    key: &'a str,
    /// Outermost first.
    shape: Vec<usize>,
    kind: Kind,
    offset: usize,
}

impl<'a> Info<'a> {
    fn read(cursor: &mut Cursor<'a>) -> Result<Self, GgufError> {
        let (range, key) = cursor.string("a tensor's name")?;
        if range.len() > LONGEST_NAME {
            return Err(GgufError::LongName { length: range.len() });
        }
        let what = "a tensor's description";
        let dimensions = cursor.u32(what)?;
        if dimensions > MOST_DIMENSIONS {
            return Err(GgufError::Dimensions { key: key.to_owned(), found: dimensions });
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(cursor.length(what)?);
        }
        let id = cursor.u32(what)?;
        let offset = cursor.length(what)?;
        let kind = Kind::of(id).map_err(|name| GgufError::TensorType { key: key.to_owned(), id, name })?;
        if let Kind::Blocks(blocks) = kind {
            // rows are the first dimension as stored
            let row = shape.first().copied().unwrap_or(1);
            if !row.is_multiple_of(blocks.values()) {
                let (key, name, block) = (key.to_owned(), blocks.name(), blocks.values());
                return Err(GgufError::Row { key, row, name, block });
            }
        }
        shape.reverse();
        Ok(Self { key, shape, kind, offset })
    }
}

/// ggml's types that are not read, by number.
const NOT_READ: &[(u32, &str)] = &[
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
];

impl Kind {
    /// The kind of ggml's number for it, or the name of one that is not read.
    fn of(id: u32) -> Result<Self, &'static str> {
        Ok(Kind::Plain(match id {
            0 => Dtype::F32,
            1 => Dtype::F16,
            24 => Dtype::I8,
            25 => Dtype::I16,
            26 => Dtype::I32,
            27 => Dtype::I64,
            28 => Dtype::F64,
            30 => Dtype::BF16,
            _ => {
                let unknown =
                    NOT_READ.iter().find(|(known, _)| *known == id).map_or("unknown", |(_, name)| name);
                return Blocks::of(id).map(Kind::Blocks).ok_or(unknown);
            }
        }))
    }

    /// The bytes that a tensor takes in the file; `None` when they, or those of its values, cannot be counted.
    fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        match self {
            Kind::Plain(dtype) => dtype.bytes_of(shape),
            Kind::Blocks(blocks) => {
                let values = Dtype::F32.bytes_of(shape)? / Dtype::F32.size();
                (values / blocks.values()).checked_mul(blocks.bytes())
            }
        }
    }
}

/// A place in a file.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], GgufError> {
        let end = self.at.checked_add(length).ok_or(GgufError::Truncated { what })?;
        let taken = self.bytes.get(self.at..end).ok_or(GgufError::Truncated { what })?;
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufError> {
        self.take(N, what)?.first_chunk().copied().ok_or(GgufError::Truncated { what })
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufError> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufError> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn length(&mut self, what: &'static str) -> Result<usize, GgufError> {
        usize::try_from(self.u64(what)?).map_err(|_| GgufError::Truncated { what })
    }

    fn string(&mut self, what: &'static str) -> Result<(Range<usize>, &'a str), GgufError> {
        let length = self.length(what)?;
        let start = self.at;
        let text = std::str::from_utf8(self.take(length, what)?).map_err(|_| GgufError::NotText { what })?;
        Ok((start..self.at, text))
    }

    /// A value of the metadata, passed over; arrays may nest `depth` deep. `key` is for messages.
    fn value(&mut self, kind: u32, depth: usize, key: &str) -> Result<Value<'a>, GgufError> {
        let what = "a metadata value";
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array(what)?)),
            1 => Value::I8(i8::from_le_bytes(self.array(what)?)),
            2 => Value::U16(u16::from_le_bytes(self.array(what)?)),
            3 => Value::I16(i16::from_le_bytes(self.array(what)?)),
            4 => Value::U32(self.u32(what)?),
            5 => Value::I32(i32::from_le_bytes(self.array(what)?)),
            6 => Value::F32(f32::from_le_bytes(self.array(what)?)),
            7 => Value::Bool(self.array::<1>(what)? != [0]),
            8 => Value::String(self.string(what)?.1),
            9 => {
                let depth =
                    depth.checked_sub(1).ok_or_else(|| GgufError::MetadataDepth { key: key.to_owned() })?;
                let kind = self.u32(what)?;
                let length = self.length(what)?;
                let start = self.at;
                match fixed_size(kind) {
                    Some(size) => {
                        let length = length.checked_mul(size).ok_or(GgufError::Truncated { what })?;
                        self.take(length, what)?;
                    }
                    None => {
                        for _ in 0..length {
                            self.value(kind, depth, key)?;
                        }
                    }
                }
                Value::Array(Array { kind, length, bytes: &self.bytes[start..self.at], depth })
            }
            10 => Value::U64(self.u64(what)?),
            11 => Value::I64(i64::from_le_bytes(self.array(what)?)),
            12 => Value::F64(f64::from_le_bytes(self.array(what)?)),
            found => return Err(GgufError::MetadataType { key: key.to_owned(), found }),
        })
    }
}

/// The bytes of a metadata value, where all of its type have as many.
fn fixed_size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
