//! The safetensors format: 8 bytes of length, a JSON header, the tensors without gaps.
//!
//! The header is read here and not by the `safetensors` crate because that one lets a key that is described twice
//! pass, and does not say which key is wrong. The tests read and write with it for comparison.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{Backing, Checkpoint, Contents, Dtype, Entry, Mapped, lookalike, map};
use crate::error::{Error, HeaderError};

/// The bytes before the header: its length.
const LENGTH: usize = 8;
/// The longest header that is read, as in the reference implementation.
const HEADER_LIMIT: usize = 100_000_000;

/// A safetensors checkpoint in `B`: a mapped file ([`SafetensorsFile`]) or memory ([`Memory`]).
#[derive(Debug)]
pub struct Safetensors<B> {
    contents: Contents,
    bytes: B,
    /// Where each entry's values are in `bytes`.
    ranges: Vec<Range<usize>>,
    metadata: HashMap<String, String>,
}

/// A memory-mapped safetensors file.
pub type SafetensorsFile = Safetensors<Mapped>;

/// A safetensors checkpoint in memory, e.g. one that is embedded in the program.
pub type Memory = Safetensors<Cow<'static, [u8]>>;

impl SafetensorsFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotWeights`] for something else under this name; [`Error::Header`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let bytes = map(&path)?;
        Self::parse(path, bytes)
    }
}

impl Memory {
    /// Reads a checkpoint that is in memory. `name` stands for its file in messages.
    ///
    /// # Errors
    /// As [`SafetensorsFile::open`].
    pub fn new(name: impl Into<PathBuf>, bytes: impl Into<Cow<'static, [u8]>>) -> Result<Self, Error> {
        Self::parse(name.into(), bytes.into())
    }
}

impl<B: AsRef<[u8]>> Safetensors<B> {
    /// Reads the header of `bytes`, found at `path`.
    ///
    /// # Errors
    /// [`Error::NotWeights`] for something else under this name; [`Error::Header`].
    pub fn parse(path: PathBuf, bytes: B) -> Result<Self, Error> {
        match Layout::read(bytes.as_ref()) {
            Ok(Layout { entries, ranges, metadata }) => {
                Ok(Self { contents: Contents::new(path, entries), bytes, ranges, metadata })
            }
            Err(reason) => Err(match lookalike(bytes.as_ref()) {
                Some(found) => Error::NotWeights { path, found },
                None => Error::Header { path, reason },
            }),
        }
    }

    /// The free text of the header, `__metadata__`.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }
}

impl<B: Backing> Checkpoint for Safetensors<B> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = self.contents.position(name)?;
        Ok(Cow::Borrowed(&self.bytes.as_ref()[self.ranges[i].clone()]))
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        self.bytes.shared(self.ranges[self.contents.find(name)?].clone())
    }

    fn release(&self, name: &str) {
        if let Some(i) = self.contents.find(name) {
            self.bytes.release(self.ranges[i].clone());
        }
    }
}

/// What a header says, once it has been found to be true.
struct Layout {
    entries: Vec<Entry>,
    ranges: Vec<Range<usize>>,
    metadata: HashMap<String, String>,
}

impl Layout {
    fn read(file: &[u8]) -> Result<Self, HeaderError> {
        let (length, rest) =
            file.split_first_chunk::<LENGTH>().ok_or(HeaderError::TooShort { found: file.len() })?;
        let length = u64::from_le_bytes(*length);
        if length > rest.len() as u64 {
            return Err(HeaderError::HeaderLength { expected: length, found: rest.len() });
        }
        if length > HEADER_LIMIT as u64 {
            return Err(HeaderError::HeaderTooLong { found: length, limit: HEADER_LIMIT });
        }
        let (header, data) = rest.split_at(length as usize);
        let header = std::str::from_utf8(header).map_err(|_| HeaderError::NotText)?;
        let Header { metadata, mut tensors } =
            serde_json::from_str(header).map_err(|error| HeaderError::NotJson(error.to_string()))?;

        tensors.sort_by(|(a, x), (b, y)| (x.data_offsets, a).cmp(&(y.data_offsets, b)));
        let data_start = file.len() - data.len();
        let mut layout = Self { entries: Vec::new(), ranges: Vec::new(), metadata };
        let mut names = std::collections::HashSet::new();
        // What is wrong with a tensor itself is told before the gap that it leaves to its neighbour.
        for (key, Info { dtype, shape, data_offsets: (begin, end) }) in tensors {
            if !names.insert(key.clone()) {
                return Err(HeaderError::DuplicateKey { key });
            }
            let Some(dtype) = Dtype::from_name(&dtype) else {
                return Err(HeaderError::UnknownDtype { key, found: dtype });
            };
            let Some(length) = dtype.bytes_of(&shape) else {
                return Err(HeaderError::TooLarge { key, shape });
            };
            if end < begin {
                return Err(HeaderError::Backwards { key, begin, end });
            }
            if end > data.len() {
                return Err(HeaderError::OutOfFile { key, end, found: data.len() });
            }
            if end - begin != length {
                let found = end - begin;
                return Err(HeaderError::Length { key, dtype, shape, expected: length, found });
            }
            layout.ranges.push(data_start + begin..data_start + end);
            layout.entries.push(Entry { name: key, shape, dtype });
        }
        let mut expected = 0;
        for (entry, range) in layout.entries.iter().zip(&layout.ranges) {
            let found = range.start - data_start;
            if found != expected {
                return Err(HeaderError::Gap { key: entry.name.clone(), expected, found });
            }
            expected = range.end - data_start;
        }
        if expected != data.len() {
            return Err(HeaderError::Trailing { expected, found: data.len() });
        }
        Ok(layout)
    }
}

/// The header as written. A list, so that a key that is there twice is seen.
struct Header {
    metadata: HashMap<String, String>,
    tensors: Vec<(String, Info)>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut header = Header { metadata: HashMap::new(), tensors: Vec::new() };
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        header.metadata = map.next_value::<Option<_>>()?.unwrap_or_default();
                    } else {
                        header.tensors.push((key, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}
