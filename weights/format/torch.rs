//! torch.save files: the zip archive of torch 1.6 and later, and the legacy layout before it.
//!
//! The object is read as data (see `pickle.rs`), never run. Tensors are found in dictionaries and lists to any
//! depth; their keys are joined by dots, so that `{"model": {"head.weight": ...}}` has the key `model.head.weight`.
//! Whatever else is pickled beside them (settings, counters, random states) is passed over.
//!
//! The `pytorch-reader` crate reads the same files; here they stay in the mapped file, are refused with the tensor's
//! name, and cost no unpacking libraries.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use super::pickle::{Id, Node, Pickle, Storage, Tensor};
use super::{Checkpoint, Dtype, Entry, lookalike, map, position, zip};
use crate::error::{Error, Lookalike, TorchError};

/// The classes of storages with their dtype.
const STORAGES: &[(&str, Dtype)] = &[
    ("DoubleStorage", Dtype::F64),
    ("FloatStorage", Dtype::F32),
    ("HalfStorage", Dtype::F16),
    ("BFloat16Storage", Dtype::BF16),
    ("LongStorage", Dtype::I64),
    ("IntStorage", Dtype::I32),
    ("ShortStorage", Dtype::I16),
    ("CharStorage", Dtype::I8),
    ("ByteStorage", Dtype::U8),
    ("BoolStorage", Dtype::Bool),
    ("UntypedStorage", Dtype::U8),
];

/// torch's names of dtypes, for tensors whose storage does not say it.
const DTYPES: &[(&str, Dtype)] = &[
    ("float64", Dtype::F64),
    ("float32", Dtype::F32),
    ("float16", Dtype::F16),
    ("bfloat16", Dtype::BF16),
    ("int64", Dtype::I64),
    ("int32", Dtype::I32),
    ("int16", Dtype::I16),
    ("int8", Dtype::I8),
    ("uint64", Dtype::U64),
    ("uint32", Dtype::U32),
    ("uint16", Dtype::U16),
    ("uint8", Dtype::U8),
    ("bool", Dtype::Bool),
];

/// The number with which the legacy layout starts, as the pickle holds it.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// How deep dictionaries may nest.
const DEEPEST: usize = 32;
/// How many values may be looked at in search of tensors: one that is shared is looked at in every place.
const MOST_VALUES: usize = 1 << 22;
/// The longest key.
const LONGEST_KEY: usize = 4096;
/// What a tensor that repeats its storage (an expanded buffer) may take although the file is smaller.
const REPEATED: usize = 16 << 20;

/// A torch.save checkpoint in `B`: a mapped file ([`TorchFile`]) or memory.
#[derive(Debug)]
pub struct Torch<B> {
    path: PathBuf,
    bytes: B,
    entries: Vec<Entry>,
    views: Vec<View>,
    index: HashMap<String, usize>,
}

/// A memory-mapped torch.save file (`.bin`, `.pt`, `.pth`).
pub type TorchFile = Torch<Mmap>;

/// Where an entry's values are.
#[derive(Debug)]
struct View {
    /// The storage, in the file.
    storage: Range<usize>,
    /// The first element and the steps along each dimension, in elements.
    offset: usize,
    strides: Vec<usize>,
}

impl TorchFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotWeights`] for something else under this name; [`Error::Torch`].
    pub fn open(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let bytes = map(&path)?;
        Self::parse(path, bytes)
    }
}

impl<B: AsRef<[u8]>> Torch<B> {
    /// Reads the names in `bytes`, found at `path`.
    ///
    /// # Errors
    /// [`Error::NotWeights`] for something else under this name; [`Error::Torch`].
    pub fn parse(path: PathBuf, bytes: B) -> Result<Self, Error> {
        match read(bytes.as_ref()) {
            Ok((entries, views)) => {
                let index = entries.iter().enumerate().map(|(i, entry)| (entry.name.clone(), i)).collect();
                Ok(Self { path, bytes, entries, views, index })
            }
            Err(Refusal::Not) => {
                let found = lookalike(bytes.as_ref()).unwrap_or(Lookalike::Unknown);
                Err(Error::NotWeights { path, found })
            }
            Err(Refusal::Broken(reason)) => Err(Error::Torch { path, reason }),
        }
    }
}

impl<B: AsRef<[u8]> + Send + Sync> Checkpoint for Torch<B> {
    fn path(&self) -> &Path {
        &self.path
    }

    fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = position(&self.path, &self.entries, &self.index, name)?;
        let Entry { shape, dtype, .. } = &self.entries[i];
        let View { storage, offset, strides } = &self.views[i];
        if shape.contains(&0) {
            return Ok(Cow::Borrowed(&[]));
        }
        let storage = &self.bytes.as_ref()[storage.clone()];
        let length = shape.iter().product::<usize>() * dtype.size();
        if is_contiguous(shape, strides) {
            let start = offset * dtype.size();
            return Ok(Cow::Borrowed(&storage[start..start + length]));
        }
        let mut gathered = Vec::with_capacity(length);
        gather(storage, *offset, shape, strides, dtype.size(), &mut gathered);
        Ok(Cow::Owned(gathered))
    }
}

/// Whether the values lie one after the other in row-major order.
fn is_contiguous(shape: &[usize], strides: &[usize]) -> bool {
    let mut expected = 1;
    for (&size, &stride) in shape.iter().zip(strides).rev() {
        if size != 1 && stride != expected {
            return false;
        }
        expected *= size;
    }
    true
}

/// Appends the values of a view in row-major order.
fn gather(storage: &[u8], offset: usize, shape: &[usize], strides: &[usize], size: usize, out: &mut Vec<u8>) {
    let (Some((&length, shape)), Some((&stride, strides))) = (shape.split_first(), strides.split_first())
    else {
        out.extend_from_slice(&storage[offset * size..(offset + 1) * size]);
        return;
    };
    for i in 0..length {
        gather(storage, offset + i * stride, shape, strides, size, out);
    }
}

/// Whether this is a tar archive, torch's very first format.
pub(super) fn is_tar(bytes: &[u8]) -> bool {
    bytes.get(257..).is_some_and(|rest| rest.starts_with(b"ustar"))
}

enum Refusal {
    /// Another kind of file altogether.
    Not,
    Broken(TorchError),
}

impl From<TorchError> for Refusal {
    fn from(error: TorchError) -> Self {
        Refusal::Broken(error)
    }
}

type Tensors = (Vec<Entry>, Vec<View>);

fn read(file: &[u8]) -> Result<Tensors, Refusal> {
    match file {
        [b'P', b'K', ..] => Ok(read_zip(file)?),
        [0x80, 1..=5, ..] => Ok(read_legacy(file)?),
        _ if is_tar(file) => Err(TorchError::Tar.into()),
        _ => Err(Refusal::Not),
    }
}

fn read_zip(file: &[u8]) -> Result<Tensors, TorchError> {
    let contents = zip::entries(file)?;
    let folder =
        contents.keys().find_map(|name| name.strip_suffix("data.pkl")).ok_or(TorchError::NoPickle)?;
    let content = |name: &str| contents.get(&format!("{folder}{name}")).cloned();

    if content("byteorder").is_some_and(|order| &file[order] == b"big") {
        return Err(TorchError::BigEndian);
    }
    let pickle = content("data.pkl").ok_or(TorchError::NoPickle)?;
    let pickle = Pickle::read(&file[pickle], 0)?;
    collect(&pickle, file.len(), |storage| content(&format!("data/{}", storage.key)))
}

/// The legacy layout: a magic number, a version, a description of the machine, the object, the keys of the storages,
/// each as a pickle; then each storage as its number of elements and its bytes.
fn read_legacy(file: &[u8]) -> Result<Tensors, TorchError> {
    let magic = Pickle::read(file, 0)?;
    if !file[..magic.end].ends_with(&[LEGACY_MAGIC, b"."].concat()) {
        return Err(TorchError::Legacy("no torch magic number: a pickle of another program"));
    }
    let version = Pickle::read(file, magic.end)?;
    if !matches!(version.root(), Node::Int(1001)) {
        return Err(TorchError::Legacy("not version 1001"));
    }
    let machine = Pickle::read(file, version.end)?;
    if let Node::Dict(items) = machine.root() {
        let is_little_endian = |id: &Id| matches!(machine.nodes[*id], Node::Text("little_endian"));
        let little_endian = items.iter().find(|(key, _)| is_little_endian(key));
        if little_endian.is_some_and(|(_, value)| matches!(machine.nodes[*value], Node::Bool(false))) {
            return Err(TorchError::BigEndian);
        }
    }
    let object = Pickle::read(file, machine.end)?;
    let keys = Pickle::read(file, object.end)?;

    // how many bytes an element takes is only known from the tensors
    let sizes: HashMap<&str, usize> = object
        .nodes
        .iter()
        .filter_map(|node| match node {
            Node::Storage(storage) => Some((storage.key, dtype_named(STORAGES, storage.class)?.size())),
            _ => None,
        })
        .collect();
    let Node::List(order) = keys.root() else { return Err(TorchError::Legacy("no list of storages")) };
    let mut storages: HashMap<&str, Range<usize>> = HashMap::new();
    let mut at = keys.end;
    for &key in order {
        let Node::Text(key) = keys.nodes[key] else {
            return Err(TorchError::Legacy("a storage without a name"));
        };
        let &size = sizes.get(key).ok_or(TorchError::Legacy("a storage of unknown dtype"))?;
        let truncated = TorchError::Legacy("a storage is cut short: truncated?");
        let elements = file.get(at..).and_then(<[u8]>::first_chunk).ok_or(truncated.clone())?;
        let start = at + size_of::<u64>();
        let length = usize::try_from(u64::from_le_bytes(*elements)).ok().and_then(|n| n.checked_mul(size));
        let end = length.and_then(|length| start.checked_add(length)).filter(|&end| end <= file.len());
        at = end.ok_or(truncated)?;
        storages.insert(key, start..at);
    }
    collect(&object, file.len(), |storage| storages.get(storage.key).cloned())
}

fn dtype_named(names: &[(&str, Dtype)], name: &str) -> Option<Dtype> {
    names.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

/// Finds the tensors of an object and where their values are; `place` gives the bytes of a storage in the file.
fn collect(
    object: &Pickle,
    file_length: usize,
    place: impl Fn(&Storage) -> Option<Range<usize>>,
) -> Result<Tensors, TorchError> {
    let mut search = Search { nodes: &object.nodes, looked_at: 0, found: Vec::new() };
    search.walk(object.root, String::new(), 0)?;
    let found = search.found;
    if found.is_empty() {
        return Err(TorchError::NoTensors);
    }

    let (mut entries, mut views) = (Vec::new(), Vec::new());
    let mut names = std::collections::HashSet::new();
    for (key, tensor) in found {
        if !names.insert(key.clone()) {
            return Err(TorchError::DuplicateKey { key });
        }
        let (entry, view) = locate(key, tensor, file_length, &place)?;
        entries.push(entry);
        views.push(view);
    }
    Ok((entries, views))
}

/// The search for tensors in an object.
struct Search<'a, 'b> {
    nodes: &'b [Node<'a>],
    looked_at: usize,
    found: Vec<(String, &'b Tensor<'a>)>,
}

impl Search<'_, '_> {
    fn walk(&mut self, id: Id, key: String, depth: usize) -> Result<(), TorchError> {
        self.looked_at += 1;
        if depth > DEEPEST || self.looked_at > MOST_VALUES {
            return Err(TorchError::Nested);
        }
        if key.len() > LONGEST_KEY {
            return Err(TorchError::LongKey { length: key.len() });
        }
        let nodes = self.nodes;
        let join = |part: &str| if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") };
        match &nodes[id] {
            Node::Tensor(tensor) => self.found.push((key, tensor)),
            Node::Dict(items) => {
                // a key that is set twice has the last value, as in Python
                let mut last: HashMap<String, (usize, Id)> = HashMap::new();
                for (place, &(name, value)) in items.iter().enumerate() {
                    let name = match nodes[name] {
                        Node::Text(name) => name.to_owned(),
                        Node::Int(name) => name.to_string(),
                        _ => continue,
                    };
                    last.entry(name).and_modify(|entry| entry.1 = value).or_insert((place, value));
                }
                let mut items: Vec<_> = last.into_iter().collect();
                items.sort_by_key(|(_, (place, _))| *place);
                for (name, (_, value)) in items {
                    self.walk(value, join(&name), depth + 1)?;
                }
            }
            Node::List(items) | Node::Tuple(items) => {
                for (i, &item) in items.iter().enumerate() {
                    self.walk(item, join(&i.to_string()), depth + 1)?;
                }
            }
            // a quantized, sparse or nested tensor: weights that would silently be missing
            Node::Opaque("torch._utils", function) if function.starts_with("_rebuild") => {
                return Err(TorchError::Unsupported { key, found: function.to_string() });
            }
            _ => {}
        }
        Ok(())
    }
}

/// Checks that a tensor lies inside its storage, and that inside the file.
fn locate(
    key: String,
    tensor: &Tensor,
    file_length: usize,
    place: impl Fn(&Storage) -> Option<Range<usize>>,
) -> Result<(Entry, View), TorchError> {
    let Tensor { storage, offset, shape, strides, dtype: named } = tensor;
    let stored = dtype_named(STORAGES, storage.class);
    let dtype = match named {
        Some(name) => dtype_named(DTYPES, name),
        None => stored,
    };
    let (Some(stored), Some(dtype)) = (stored, dtype) else {
        return Err(TorchError::Unsupported { key, found: named.unwrap_or(storage.class).to_owned() });
    };

    let name = || storage.key.to_owned();
    let bytes = place(storage).ok_or_else(|| TorchError::NoStorage { key: key.clone(), storage: name() })?;
    let start = storage.start.saturating_mul(stored.size());
    let length = storage.elements.saturating_mul(stored.size());
    let end = start.saturating_add(length);
    if end > bytes.len() {
        let (storage, found) = (name(), bytes.len());
        return Err(TorchError::StorageLength { key, storage, expected: end, found });
    }
    let elements = length / dtype.size();

    let last = shape.iter().zip(strides).try_fold(*offset, |last, (&size, &stride)| {
        size.saturating_sub(1).checked_mul(stride).and_then(|step| last.checked_add(step))
    });
    let is_empty = shape.contains(&0);
    let fits = if is_empty { *offset <= elements } else { last.is_some_and(|last| last < elements) };
    if !fits {
        let (offset, shape, strides) = (*offset, shape.clone(), strides.clone());
        return Err(TorchError::Extent { key, offset, shape, strides, elements });
    }
    let most = file_length.max(REPEATED);
    if dtype.bytes_of(shape).is_none_or(|bytes| bytes > most) {
        return Err(TorchError::TooLarge { key, shape: shape.clone() });
    }
    let view =
        View { storage: bytes.start + start..bytes.start + end, offset: *offset, strides: strides.clone() };
    Ok((Entry { name: key, shape: shape.clone(), dtype }, view))
}
