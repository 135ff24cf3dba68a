//! torch.save files: the zip archive of torch 1.6 and later, the legacy layout before it, TorchScript archives, and
//! Paddle's `.pdparams`, a pickled dictionary of numpy arrays.
//!
//! The object is read as data (see `pickle.rs`), never run. Where it wraps a state dict as training programs do
//! (`{"model": {...}, "optimizer": {...}}`, one of [`WRAPPERS`]), the state dict is the checkpoint and the rest is
//! passed over. Otherwise tensors are found in dictionaries and lists to any depth; their keys are joined by dots.
//! Whatever else is pickled beside them (settings, counters, random states) is passed over. The keys of a TorchScript
//! archive are the attributes that lead to each tensor, as in its `state_dict()`.
//!
//! The `pytorch-reader` crate reads the same files; here they stay in the mapped file, are refused with the tensor's
//! name, and cost no unpacking libraries.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;

use super::pickle::{Array, Id, Node, Pickle, Storage, Tensor};
use super::{Backing, Checkpoint, Contents, Dtype, Entry, Mapped, lookalike, map, zip};
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

/// numpy's names of dtypes in Paddle's files, where 16 bits without a sign are bfloat16.
const NUMPY: &[(&str, Dtype)] = &[
    ("f8", Dtype::F64),
    ("f4", Dtype::F32),
    ("f2", Dtype::F16),
    ("u2", Dtype::BF16),
    ("i8", Dtype::I64),
    ("i4", Dtype::I32),
    ("i2", Dtype::I16),
    ("i1", Dtype::I8),
    ("u1", Dtype::U8),
    ("b1", Dtype::Bool),
];

/// The names under which training programs put the state dict, the first that is there.
pub const WRAPPERS: &[&str] = &["state_dict", "model_state_dict", "model", "module"];
/// The entry of a Paddle file whose arrays are cut into slices.
const PADDLE_SLICES: &str = "UnpackBigParamInfor@@";

/// The number with which the legacy layout starts, as the pickle holds it.
const LEGACY_MAGIC: &[u8] = b"\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19";
/// How deep dictionaries may nest.
const DEEPEST: usize = 32;
/// How often each byte of a file may be looked at in search of tensors: a value that is shared is looked at in every
/// place.
const MOST_LOOKS: usize = 4;
/// What the names and places of all tensors may take, in bytes for each byte of the file: a shared dictionary has
/// them in every place.
const MOST_NAMES: usize = 8;
/// The bytes that a tensor's name and place take beside the text and the dimensions.
const ENTRY_BYTES: usize = 256;
/// Above the limits that depend on the file's length, for the smallest.
const SLACK: usize = 1 << 16;
/// The longest key.
const LONGEST_KEY: usize = 4096;
/// What a tensor that repeats its storage (an expanded buffer) may take although the file is smaller.
const REPEATED: usize = 16 << 20;

/// A torch.save checkpoint in `B`: a mapped file ([`TorchFile`]) or memory.
#[derive(Debug)]
pub struct Torch<B> {
    contents: Contents,
    bytes: B,
    views: Vec<View>,
    numbers: HashMap<String, i64>,
}

/// A memory-mapped torch.save file (`.bin`, `.pt`, `.pth`) or Paddle file (`.pdparams`).
pub type TorchFile = Torch<Mapped>;

/// Where an entry's values are.
#[derive(Debug)]
struct View {
    /// The storage, in the file.
    storage: Range<usize>,
    /// Whether its bytes are written as the characters 0 to 255 in UTF-8.
    is_text: bool,
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
            Ok(Found { entries, views, numbers }) => {
                Ok(Self { contents: Contents::new(path, entries), bytes, views, numbers })
            }
            Err(Refusal::Not) => {
                let found = lookalike(bytes.as_ref()).unwrap_or(Lookalike::Unknown);
                Err(Error::NotWeights { path, found })
            }
            Err(Refusal::Broken(reason)) => Err(Error::Torch { path, reason }),
        }
    }
}

impl<B> Torch<B> {
    /// The integers that stand beside the state dict, e.g. `iteration` or DeepSpeed's `mp_world_size`.
    pub fn numbers(&self) -> &HashMap<String, i64> {
        &self.numbers
    }
}

impl<B: Backing> Checkpoint for Torch<B> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = self.contents.position(name)?;
        let Entry { shape, dtype, .. } = &self.contents.entries[i];
        let View { storage, is_text, offset, strides } = &self.views[i];
        if shape.contains(&0) {
            return Ok(Cow::Borrowed(&[]));
        }
        let storage = &self.bytes.as_ref()[storage.clone()];
        let length = shape.iter().product::<usize>() * dtype.size();
        if *is_text {
            let decoded = latin1(storage);
            return Ok(Cow::Owned(if is_contiguous(shape, strides) {
                decoded
            } else {
                gathered(&decoded, *offset, shape, strides, dtype.size(), length)
            }));
        }
        if is_contiguous(shape, strides) {
            let start = offset * dtype.size();
            return Ok(Cow::Borrowed(&storage[start..start + length]));
        }
        Ok(Cow::Owned(gathered(storage, *offset, shape, strides, dtype.size(), length)))
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        let i = self.contents.find(name)?;
        let Entry { shape, dtype, .. } = &self.contents.entries[i];
        let View { storage, is_text, offset, strides } = &self.views[i];
        if *is_text || shape.contains(&0) || !is_contiguous(shape, strides) {
            return None;
        }
        let start = storage.start + offset * dtype.size();
        let length = shape.iter().product::<usize>() * dtype.size();
        self.bytes.shared(start..start + length)
    }

    fn release(&self, name: &str) {
        if let Some(i) = self.contents.find(name) {
            self.bytes.release(self.views[i].storage.clone());
        }
    }
}

/// The bytes that are written as characters; what is not UTF-8 was refused when the file was opened.
fn latin1(text: &[u8]) -> Vec<u8> {
    String::from_utf8_lossy(text).chars().map(|c| c as u8).collect()
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

/// The values of a view in row-major order.
fn gathered(
    storage: &[u8],
    offset: usize,
    shape: &[usize],
    strides: &[usize],
    size: usize,
    length: usize,
) -> Vec<u8> {
    let mut out = Vec::with_capacity(length);
    gather(storage, offset, shape, strides, size, &mut out);
    out
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

/// What a file has.
#[derive(Default)]
struct Found {
    entries: Vec<Entry>,
    views: Vec<View>,
    numbers: HashMap<String, i64>,
}

fn read(file: &[u8]) -> Result<Found, Refusal> {
    match file {
        [b'P', b'K', ..] => Ok(read_zip(file)?),
        [0x80, 1..=5, ..] => Ok(read_pickles(file)?),
        _ if is_tar(file) => Err(TorchError::Tar.into()),
        _ => Err(Refusal::Not),
    }
}

fn read_zip(file: &[u8]) -> Result<Found, TorchError> {
    let contents = zip::entries(file)?;
    let is_pickle = |name: &&String| *name == "data.pkl" || name.ends_with("/data.pkl");
    let pickle = contents.keys().filter(is_pickle).min().ok_or(TorchError::NoPickle)?;
    let folder = pickle.trim_end_matches("data.pkl");
    let content = |name: &str| contents.get(&format!("{folder}{name}")).cloned();

    if content("byteorder").is_some_and(|order| &file[order] == b"big") {
        return Err(TorchError::BigEndian);
    }
    let pickle = content("data.pkl").ok_or(TorchError::NoPickle)?;
    let pickle = Pickle::read(&file[pickle], 0)?;
    // TorchScript may keep a storage beside the folder of the others, and says so in its name
    let place = |storage: &Storage| content(&format!("data/{}", storage.key)).or(content(storage.key));
    Collector { object: &pickle, file, place, with_arrays: false }.collect()
}

/// A file of pickles: torch's legacy layout, or Paddle's dictionary of arrays.
fn read_pickles(file: &[u8]) -> Result<Found, TorchError> {
    let first = Pickle::read(file, 0)?;
    if file[..first.end].ends_with(&[LEGACY_MAGIC, b"."].concat()) {
        return read_legacy(file, first.end);
    }
    let collector = Collector { object: &first, file, place: |_: &Storage| None, with_arrays: true };
    match collector.collect() {
        Err(TorchError::NoTensors) => {
            Err(TorchError::Legacy("no torch magic number: a pickle of another program"))
        }
        found => found,
    }
}

/// The legacy layout: a magic number, a version, a description of the machine, the object, the keys of the storages,
/// each as a pickle; then each storage as its number of elements and its bytes.
fn read_legacy(file: &[u8], after_magic: usize) -> Result<Found, TorchError> {
    let version = Pickle::read(file, after_magic)?;
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
    let place = |storage: &Storage| storages.get(storage.key).cloned();
    Collector { object: &object, file, place, with_arrays: false }.collect()
}

fn dtype_named(names: &[(&str, Dtype)], name: &str) -> Option<Dtype> {
    names.iter().find(|(known, _)| *known == name).map(|(_, dtype)| *dtype)
}

/// Finds the tensors of an object and where their values are.
struct Collector<'a, 'b, P> {
    object: &'b Pickle<'a>,
    file: &'a [u8],
    /// Gives the bytes of a storage in the file.
    place: P,
    /// Whether numpy arrays are tensors. Beside torch's they are the state of a random generator.
    with_arrays: bool,
}

impl<P: Fn(&Storage) -> Option<Range<usize>>> Collector<'_, '_, P> {
    fn collect(&self) -> Result<Found, TorchError> {
        let object = self.object;
        let limit = |per_byte: usize| self.file.len().saturating_mul(per_byte).saturating_add(SLACK);
        let mut search = Search {
            nodes: &object.nodes,
            with_arrays: self.with_arrays,
            looks: limit(MOST_LOOKS),
            bytes: limit(MOST_NAMES),
            found: Vec::new(),
        };
        search.walk(state_dict(object), String::new(), 0)?;
        let values = search.found;
        if values.is_empty() {
            return Err(TorchError::NoTensors);
        }

        let mut found = Found::default();
        let mut names = std::collections::HashSet::new();
        if let Some((key, _)) = values.iter().find(|(key, _)| !names.insert(key.as_str())) {
            return Err(TorchError::DuplicateKey { key: key.clone() });
        }
        drop(names);
        for (key, value) in values {
            let (entry, view) = match value {
                Value::Tensor(tensor) => self.locate(key, tensor)?,
                Value::Array(array) => self.locate_array(key, array)?,
            };
            found.entries.push(entry);
            found.views.push(view);
        }
        if let Node::Dict(items) = object.root() {
            for &(name, value) in items {
                if let (Node::Text(name), &Node::Int(value)) = (&object.nodes[name], &object.nodes[value]) {
                    found.numbers.insert((*name).to_owned(), value);
                }
            }
        }
        Ok(found)
    }

    /// Checks that a tensor lies inside its storage, and that inside the file.
    fn locate(&self, key: String, tensor: &Tensor) -> Result<(Entry, View), TorchError> {
        let Tensor { storage, offset, shape, strides, dtype: named } = tensor;
        let stored = dtype_named(STORAGES, storage.class);
        let dtype = match named {
            Some(name) => dtype_named(DTYPES, name),
            None => stored,
        };
        let (Some(stored), Some(dtype), Some(shape), Some(strides)) =
            (stored, dtype, self.object.sizes(*shape), self.object.sizes(*strides))
        else {
            return Err(TorchError::Unsupported { key, found: named.unwrap_or(storage.class).to_owned() });
        };

        let name = || storage.key.to_owned();
        let bytes = (self.place)(storage)
            .ok_or_else(|| TorchError::NoStorage { key: key.clone(), storage: name() })?;
        let start = storage.start.saturating_mul(stored.size());
        let length = storage.elements.saturating_mul(stored.size());
        let end = start.saturating_add(length);
        if end > bytes.len() {
            let (storage, found) = (name(), bytes.len());
            return Err(TorchError::StorageLength { key, storage, expected: end, found });
        }
        let storage = bytes.start + start..bytes.start + end;
        self.fit(key, dtype, shape, View { storage, is_text: false, offset: *offset, strides }, length)
    }

    /// Checks that a numpy array has the bytes that it needs.
    fn locate_array(&self, key: String, array: &Array) -> Result<(Entry, View), TorchError> {
        let nodes = &self.object.nodes;
        let dtype = match &nodes[array.dtype] {
            Node::NumpyDtype(name) => match dtype_named(NUMPY, name) {
                Some(dtype) => dtype,
                None => return Err(TorchError::Unsupported { key, found: format!("numpy dtype {name}") }),
            },
            Node::Opaque(module, name) => {
                return Err(TorchError::Unsupported { key, found: format!("{module} {name}") });
            }
            _ => return Err(TorchError::Unsupported { key, found: "a numpy array without dtype".into() }),
        };
        let Some(shape) = self.object.sizes(array.shape) else {
            return Err(TorchError::Unsupported { key, found: "a numpy array without shape".into() });
        };
        let (storage, is_text, length) = match nodes[array.data] {
            Node::Bytes(start, end) => (start..end, false, end - start),
            Node::Latin1(text) if text.chars().all(|c| u32::from(c) < 256) => {
                let start = text.as_ptr().addr() - self.file.as_ptr().addr();
                (start..start + text.len(), true, text.chars().count())
            }
            _ => return Err(TorchError::Unsupported { key, found: "a numpy array of objects".into() }),
        };
        let Some(expected) = dtype.bytes_of(&shape) else {
            return Err(TorchError::TooLarge { key, shape });
        };
        if expected != length {
            let storage = "its own".to_owned();
            return Err(TorchError::StorageLength { key, storage, expected, found: length });
        }
        let mut strides = vec![1; shape.len()];
        if array.is_fortran {
            for i in 1..shape.len() {
                strides[i] = strides[i - 1] * shape[i - 1].max(1);
            }
        } else {
            for i in (1..shape.len()).rev() {
                strides[i - 1] = strides[i] * shape[i].max(1);
            }
        }
        self.fit(key, dtype, shape, View { storage, is_text, offset: 0, strides }, length)
    }

    /// Checks that a view stays inside its storage of `length` bytes.
    fn fit(
        &self,
        key: String,
        dtype: Dtype,
        shape: Vec<usize>,
        view: View,
        length: usize,
    ) -> Result<(Entry, View), TorchError> {
        let View { offset, strides, .. } = &view;
        let elements = length / dtype.size();
        let last = shape.iter().zip(strides).try_fold(*offset, |last, (&size, &stride)| {
            size.saturating_sub(1).checked_mul(stride).and_then(|step| last.checked_add(step))
        });
        let is_empty = shape.contains(&0);
        let fits = if is_empty { *offset <= elements } else { last.is_some_and(|last| last < elements) };
        if !fits {
            let (offset, strides) = (*offset, view.strides);
            return Err(TorchError::Extent { key, offset, shape, strides, elements });
        }
        let most = self.file.len().max(REPEATED);
        if dtype.bytes_of(&shape).is_none_or(|bytes| bytes > most) {
            return Err(TorchError::TooLarge { key, shape });
        }
        Ok((Entry { name: key, shape, dtype }, view))
    }
}

/// The state dict inside what a training program saved, or all of it.
fn state_dict(object: &Pickle) -> Id {
    let nodes = &object.nodes;
    let Node::Dict(items) = object.root() else { return object.root };
    let wrapped = |wrapper: &&str| {
        let is_named = |name: Id| matches!(nodes[name], Node::Text(name) if name == *wrapper);
        let &(_, value) = items.iter().rfind(|(name, _)| is_named(*name))?;
        matches!(&nodes[value], Node::Dict(items) if !items.is_empty()).then_some(value)
    };
    WRAPPERS.iter().find_map(wrapped).unwrap_or(object.root)
}

/// A value that is weights.
enum Value<'a, 'b> {
    Tensor(&'b Tensor<'a>),
    Array(&'b Array),
}

/// The search for tensors in an object.
struct Search<'a, 'b> {
    nodes: &'b [Node<'a>],
    with_arrays: bool,
    /// How many values may still be looked at.
    looks: usize,
    /// How many bytes may still be taken by names and places.
    bytes: usize,
    found: Vec<(String, Value<'a, 'b>)>,
}

impl<'a, 'b> Search<'a, 'b> {
    fn walk(&mut self, id: Id, key: String, depth: usize) -> Result<(), TorchError> {
        self.look(1)?;
        if depth > DEEPEST {
            return Err(TorchError::Nested);
        }
        if key.len() > LONGEST_KEY {
            return Err(TorchError::LongKey { length: key.len() });
        }
        let nodes = self.nodes;
        let join = |part: &str| if key.is_empty() { part.to_owned() } else { format!("{key}.{part}") };
        match &nodes[id] {
            Node::Tensor(tensor) => {
                let dimensions = match &nodes[tensor.shape] {
                    Node::Tuple(sizes) | Node::List(sizes) => sizes.len(),
                    _ => 0,
                };
                self.keep(key, dimensions, Value::Tensor(tensor))?;
            }
            Node::Array(array) if self.with_arrays => self.keep(key, 0, Value::Array(array))?,
            Node::Dict(items) => {
                self.look(items.len())?;
                for (name, value) in last_values(nodes, items) {
                    if name == PADDLE_SLICES && self.with_arrays {
                        return Err(TorchError::Unsupported { key: name, found: "arrays in slices".into() });
                    }
                    self.walk(value, join(&name), depth + 1)?;
                }
            }
            Node::Object(attributes) => self.walk(*attributes, key, depth + 1)?,
            // how Paddle writes a tensor inside a larger object: its own name and its values
            Node::Tuple(items) if self.with_arrays && is_named_array(nodes, items) => {
                self.walk(items[1], key, depth + 1)?;
            }
            Node::List(items) | Node::Tuple(items) => {
                self.look(items.len())?;
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

    fn look(&mut self, count: usize) -> Result<(), TorchError> {
        self.looks = self.looks.checked_sub(count).ok_or(TorchError::Nested)?;
        Ok(())
    }

    fn keep(&mut self, key: String, dimensions: usize, value: Value<'a, 'b>) -> Result<(), TorchError> {
        // the name twice, the sizes and the strides
        let taken = 2 * key.len() + 2 * size_of::<usize>() * dimensions + ENTRY_BYTES;
        self.bytes = self.bytes.checked_sub(taken).ok_or(TorchError::Nested)?;
        self.found.push((key, value));
        Ok(())
    }
}

/// The entries of a dictionary whose keys are text or numbers: one that is set twice has the last value, as in Python.
fn last_values(nodes: &[Node], items: &[(Id, Id)]) -> Vec<(String, Id)> {
    let mut values: Vec<(String, Id)> = Vec::new();
    let mut places: HashMap<Cow<str>, usize> = HashMap::new();
    for &(name, value) in items {
        let name = match nodes[name] {
            Node::Text(name) => Cow::Borrowed(name),
            Node::Int(name) => Cow::Owned(name.to_string()),
            _ => continue,
        };
        match places.get(&name) {
            Some(&place) => values[place].1 = value,
            None => {
                values.push((name.clone().into_owned(), value));
                places.insert(name, values.len() - 1);
            }
        }
    }
    values
}

fn is_named_array(nodes: &[Node], items: &[Id]) -> bool {
    matches!(items, &[name, array] if matches!((&nodes[name], &nodes[array]), (Node::Text(_), Node::Array(_))))
}
