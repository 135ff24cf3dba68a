//! Module -> safetensors file, by the same rules as loading, and files of plain tensors.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{BufWriter, Write};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Bool, Bytes, DType, FloatDType, Int, Tensor, TensorData};
use half::{bf16, f16};

use crate::cast::{Value, as_stored, native, stored, transposed, values};
use crate::error::{Error, Problem};
use crate::files::{self, Output};
use crate::format::{Dtype, Entry, open};
use crate::load::{self, Kind, Parameter};
use crate::plan::swapped;
use crate::rule::{KeyMap, Line, Rule};
use crate::share::Share;

mod ranks;

pub use ranks::Saving;

/// Writes `module` as a safetensors file under the checkpoint's names: the reverse of [`load()`](crate::load()).
///
/// Floats are written as `dtype`, or as the module holds them; integers as I64. A parameter that several rules name
/// goes by the first. The file is complete under its name or not there: it is written beside it, flushed to the disk
/// and renamed.
///
/// # Errors
/// [`Error::Mismatch`] when the rules do not cover the module; [`Error::Uneven`] when a [`Rule::Concat`] cannot be cut
/// into equal parts; [`Error::Unsaveable`] when a matrix is held packed (`Module::materialize` unpacks it);
/// [`Error::Rule`], [`Error::Duplicate`], [`Error::Io`].
pub fn save<M: Module>(
    module: &M,
    keys: &KeyMap,
    dtype: Option<FloatDType>,
    path: &Path,
    metadata: Option<HashMap<String, String>>,
) -> Result<(), Error> {
    write_module(module, keys, dtype, path, metadata.unwrap_or_default(), None)
}

/// Writes what a module holds, or, of a module that holds a share of experts, what its rank has to write: those, each as a
/// tensor of its own wherever a rule can name it so, and with the first rank everything else.
fn write_module<M: Module>(
    module: &M,
    keys: &KeyMap,
    dtype: Option<FloatDType>,
    path: &Path,
    metadata: HashMap<String, String>,
    share: Option<Share>,
) -> Result<(), Error> {
    let mut lines = keys.lines()?;
    if share.is_some() {
        lines.sort_by_key(|line| !line.is_stack()); // stable
    }
    let mut collector = Collector { path: load::Path::default(), held: Vec::new(), packed: None };
    module.visit(&mut collector);
    if let Some(key) = collector.packed {
        let found = "held packed in 8 or 4 bits".to_owned();
        return Err(Error::Unsaveable { file: path.to_owned(), key, found });
    }
    let shelf = Shelf::new(collector.held, path)?;

    let (mut files, mut problems) = (Vec::new(), Vec::new());
    let mut done: HashSet<String> = HashSet::new();
    for held in &shelf.held {
        let Parameter { path, shape, .. } = &held.parameter;
        let keyed = |line: &Line| line.keys_of(path, shape, share.unwrap_or(Share::WHOLE));
        let Some((line, keys)) = lines.iter().find_map(|line| Some((line, keyed(line)?))) else {
            problems.push(Problem::Unmapped { parameter: path.clone() });
            continue;
        };
        if !line.is_stack() && share.is_some_and(|share| share.rank() > 0) {
            continue; // written by the first rank
        }
        if matches!(line.rule, Rule::Split(..) | Rule::SplitTranspose(..)) && !done.insert(keys[0].clone()) {
            continue; // written with the first of its parameters
        }
        match shelf.recipes(line, keys, held, dtype)? {
            Ok(recipes) => files.extend(recipes),
            Err(problem) => problems.push(problem),
        }
    }
    if !problems.is_empty() {
        return Err(Error::Mismatch { file: path.to_owned(), problems });
    }
    write(path, files, metadata)
}

/// Writes tensors as they are.
///
/// # Errors
/// [`Error::Duplicate`] for a name that is there twice; [`Error::Unsaveable`] for a quantized tensor; [`Error::Io`].
pub fn save_tensors(path: &Path, tensors: &[(String, TensorData)]) -> Result<(), Error> {
    let mut files = Vec::new();
    for (key, data) in tensors {
        let dtype = dtype_of(key, data.dtype(), path)?;
        let bytes = move || match dtype {
            Dtype::Bool => Bytes::from_elems(data.iter::<bool>().map(u8::from).collect()),
            _ => data.bytes().clone(),
        };
        files.push(Pending::new(key, dtype, data.shape().as_slice(), move || Ok(Box::new(bytes()))));
    }
    write(path, files, HashMap::new())
}

/// Reads every tensor of a checkpoint file as it is.
///
/// # Errors
/// As [`open`].
pub fn read_tensors(path: &Path) -> Result<BTreeMap<String, TensorData>, Error> {
    let checkpoint = open(path)?;
    let mut tensors = BTreeMap::new();
    for Entry { name, shape, dtype } in checkpoint.entries() {
        let bytes = checkpoint.bytes(name)?;
        let data = match dtype {
            // a stored byte may be other than 0 and 1
            Dtype::Bool => TensorData::new(values::<bool>(*dtype, &bytes), shape.clone()),
            _ => TensorData::from_bytes_vec(bytes.into_owned(), shape.clone(), native(*dtype)),
        };
        tensors.insert(name.clone(), data);
    }
    Ok(tensors)
}

fn dtype_of(key: &str, dtype: DType, path: &Path) -> Result<Dtype, Error> {
    stored(dtype).ok_or_else(|| Error::Unsaveable {
        file: path.to_owned(),
        key: key.to_owned(),
        found: dtype.name().to_owned(),
    })
}

/// A parameter and the way to its values, which are fetched one tensor at a time.
struct Held {
    parameter: Parameter,
    dtype: DType,
    data: Box<dyn Fn() -> TensorData>,
}

struct Collector {
    path: load::Path,
    held: Vec<Held>,
    /// The first parameter whose values are not there as floats.
    packed: Option<String>,
}

macro_rules! hold {
    ($self:ident, $param:ident, $kind:expr) => {{
        let tensor = $param.transform_for_save();
        let shape = tensor.lazy_shape().as_slice().to_vec();
        let dtype = tensor.val().dtype();
        let can_pack = $kind == Kind::Float && $self.path.can_pack(shape.len());
        let parameter = Parameter { path: $self.path.joined(), shape, kind: $kind, can_pack };
        $self.held.push(Held { parameter, dtype, data: Box::new(move || tensor.val().into_data()) });
    }};
}

impl ModuleVisitor for Collector {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        hold!(self, param, Kind::Float);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        hold!(self, param, Kind::Int);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        hold!(self, param, Kind::Bool);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        if let Some(parameter) = self.path.packed() {
            self.packed.get_or_insert(parameter);
        }
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

/// A module's parameters by their paths.
struct Shelf {
    held: Vec<Held>,
    index: HashMap<String, usize>,
    file: PathBuf,
}

/// A run of the values of one parameter.
type Run<'a> = (&'a Held, Range<usize>);

impl Shelf {
    fn new(held: Vec<Held>, file: &Path) -> Result<Self, Error> {
        let index = held.iter().enumerate().map(|(i, held)| (held.parameter.path.clone(), i)).collect();
        for held in &held {
            dtype_of(&held.parameter.path, held.dtype, file)?;
        }
        Ok(Self { held, index, file: file.to_owned() })
    }

    /// The stored tensors that `held` goes into, by its rule; or why there are none.
    fn recipes<'a>(
        &'a self,
        line: &Line,
        keys: Vec<String>,
        held: &'a Held,
        dtype: Option<FloatDType>,
    ) -> Result<Result<Vec<Pending<'a>>, Problem>, Error> {
        let Parameter { path, shape, kind, .. } = &held.parameter;
        let float = dtype.unwrap_or_else(|| stored(held.dtype).map_or(FloatDType::F32, as_stored));
        let elements: usize = shape.iter().product();
        let one = |key: &str, shape: Vec<usize>, runs: Vec<Run<'a>>, swap: Option<(usize, usize)>| {
            pending(key, shape, *kind, float, runs, swap)
        };
        Ok(Ok(match line.rule {
            Rule::Split(..) | Rule::SplitTranspose(..) => {
                let mut runs = Vec::new();
                let mut rows = 0;
                for path in line.paths_of(&keys[0]).unwrap_or_default() {
                    let Some(&i) = self.index.get(&path) else {
                        let (key, parameter) = (keys[0].clone(), Some(path));
                        return Ok(Err(Problem::Unexpected { key, parameter, nearest: Vec::new() }));
                    };
                    let part = &self.held[i].parameter;
                    if part.shape.is_empty() || part.shape.get(1..) != shape.get(1..) || part.kind != *kind {
                        let (key, expected, found) = (keys[0].clone(), shape.clone(), part.shape.clone());
                        return Ok(Err(Problem::Shape { key, expected, found }));
                    }
                    rows += part.shape[0];
                    runs.push((&self.held[i], 0..part.shape.iter().product()));
                }
                let stacked: Vec<usize> =
                    std::iter::once(rows).chain(shape.iter().skip(1).copied()).collect();
                match (line.rule, &stacked[..]) {
                    (Rule::SplitTranspose(..), &[rows, columns]) => {
                        vec![one(&keys[0], swapped(&stacked), runs, Some((rows, columns)))]
                    }
                    (Rule::SplitTranspose(..), _) => {
                        let (key, expected) = (keys[0].clone(), vec![0, 0]);
                        return Ok(Err(Problem::Shape { key, expected, found: shape.clone() }));
                    }
                    _ => vec![one(&keys[0], stacked, runs, None)],
                }
            }
            Rule::Concat(..) => {
                let (parts, rows) = (keys.len(), shape.first().copied().unwrap_or(0));
                if shape.is_empty() || !rows.is_multiple_of(parts) {
                    return Err(Error::Uneven {
                        file: self.file.clone(),
                        parameter: path.clone(),
                        rows,
                        parts,
                    });
                }
                let cut: Vec<usize> =
                    std::iter::once(rows / parts).chain(shape.iter().skip(1).copied()).collect();
                let length = elements / parts;
                let part = |(i, key): (usize, &String)| {
                    one(key, cut.clone(), vec![(held, i * length..(i + 1) * length)], None)
                };
                keys.iter().enumerate().map(part).collect()
            }
            Rule::Stack(_, _, ones) | Rule::StackTranspose(_, _, ones) => {
                let one_of = shape.get(1..).unwrap_or_default();
                let (stored, swap) = match (line.rule, one_of) {
                    (Rule::StackTranspose(..), &[.., rows, columns]) => {
                        (swapped(one_of), Some((rows, columns)))
                    }
                    _ => (one_of.to_vec(), None),
                };
                let length = one_of.iter().product::<usize>();
                let part = |(i, key): (usize, &String)| {
                    one(key, ones.stored(&stored), vec![(held, i * length..(i + 1) * length)], swap)
                };
                keys.iter().enumerate().map(part).collect()
            }
            Rule::Transpose(..) => {
                let swap = match shape[..] {
                    [.., rows, cols] => (rows, cols),
                    _ => {
                        let (key, expected) = (keys[0].clone(), vec![0, 0]);
                        return Ok(Err(Problem::Shape { key, expected, found: shape.clone() }));
                    }
                };
                vec![one(&keys[0], swapped(shape), vec![(held, 0..elements)], Some(swap))]
            }
            Rule::Reshape(_, _, ones) => {
                vec![one(&keys[0], ones.stored(shape), vec![(held, 0..elements)], None)]
            }
            Rule::Rename(..) | Rule::Ignore(..) | Rule::Under(..) => {
                vec![one(&keys[0], shape.clone(), vec![(held, 0..elements)], None)]
            }
        }))
    }
}

fn pending<'a>(
    key: &str,
    shape: Vec<usize>,
    kind: Kind,
    float: FloatDType,
    runs: Vec<Run<'a>>,
    swap: Option<(usize, usize)>,
) -> Pending<'a> {
    let (dtype, bytes): (_, Box<dyn Fn() -> Bytes>) = match (kind, float) {
        (Kind::Float, FloatDType::F64) => (Dtype::F64, Box::new(move || floats::<f64>(&runs, swap))),
        (Kind::Float, FloatDType::F16) => (Dtype::F16, Box::new(move || floats::<f16>(&runs, swap))),
        (Kind::Float, FloatDType::BF16) => (Dtype::BF16, Box::new(move || floats::<bf16>(&runs, swap))),
        (Kind::Float, _) => (Dtype::F32, Box::new(move || floats::<f32>(&runs, swap))),
        (Kind::Int, _) => (Dtype::I64, Box::new(move || others::<i64>(&runs, swap))),
        (Kind::Bool, _) => (Dtype::Bool, Box::new(move || others::<bool>(&runs, swap))),
    };
    Pending::new(key, dtype, &shape, move || Ok(Box::new(bytes())))
}

fn floats<T: Value>(runs: &[Run], swap: Option<(usize, usize)>) -> Bytes {
    gather(runs, swap, |data| {
        let dtype = stored(data.dtype()).unwrap_or(Dtype::F32);
        values::<T>(dtype, data.as_bytes())
    })
}

fn others<T: Value>(runs: &[Run], swap: Option<(usize, usize)>) -> Bytes {
    gather(runs, swap, |data| data.iter::<T>().collect())
}

fn gather<T: Value>(
    runs: &[Run],
    swap: Option<(usize, usize)>,
    read: impl Fn(&TensorData) -> Vec<T>,
) -> Bytes {
    let mut gathered = Vec::new();
    for (held, elements) in runs {
        gathered.extend_from_slice(&read(&(held.data)())[elements.clone()]);
    }
    Bytes::from_elems(match swap {
        Some((rows, cols)) => transposed(&gathered, rows, cols),
        None => gathered,
    })
}

/// What ends the name of a file that is being written.
pub(crate) const PARTIAL: &str = ".partial";

/// The bytes of one tensor: made for it, or those of a mapped file.
pub(crate) type Written<'a> = Box<dyn Deref<Target = [u8]> + 'a>;

/// A tensor to be written, whose bytes are made when their turn comes.
pub(crate) struct Pending<'a> {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    bytes: Box<dyn Fn() -> Result<Written<'a>, Error> + 'a>,
}

impl<'a> Pending<'a> {
    pub fn new(
        key: &str,
        dtype: Dtype,
        shape: &[usize],
        bytes: impl Fn() -> Result<Written<'a>, Error> + 'a,
    ) -> Self {
        Self { key: key.to_owned(), dtype, shape: shape.to_vec(), bytes: Box::new(bytes) }
    }

    /// How many bytes it will take.
    pub fn length(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.size()
    }
}

/// Writes a safetensors file, one tensor at a time.
pub(crate) fn write(
    path: &Path,
    mut tensors: Vec<Pending>,
    metadata: HashMap<String, String>,
) -> Result<(), Error> {
    // wide values first, so that each tensor is aligned, then by name: the same tensors give the same file
    tensors.sort_by(|a, b| b.dtype.size().cmp(&a.dtype.size()).then_with(|| a.key.cmp(&b.key)));
    let mut keys: HashSet<&str> = HashSet::from(["__metadata__"]);
    if let Some(twice) = tensors.iter().find(|tensor| !keys.insert(&tensor.key)) {
        return Err(Error::Duplicate { file: path.to_owned(), key: twice.key.clone() });
    }
    let header = header(&tensors, metadata);
    write_whole(path, |out| {
        let io = |source| Error::Io { path: path.to_owned(), source };
        out.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
        out.write_all(&header).map_err(io)?;
        tensors.iter().try_for_each(|tensor| out.write_all(&(tensor.bytes)()?).map_err(io))
    })
}

/// `model.safetensors.index.json`, of each file's name and its tensors: keys and bytes.
pub(crate) fn index(files: impl Iterator<Item = (String, Vec<(String, usize)>)>) -> String {
    let (mut total_size, mut weight_map) = (0, BTreeMap::new());
    for (file, tensors) in files {
        for (key, bytes) in tensors {
            total_size += bytes;
            weight_map.insert(key, file.clone());
        }
    }
    let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
    format!("{index:#}\n")
}

/// Writes a file under another name, and gives it its own when all of it is on the disk.
pub(crate) fn write_whole(
    path: &Path,
    content: impl FnOnce(&mut dyn Write) -> Result<(), Error>,
) -> Result<(), Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut partial = Partial::beside(path).map_err(io)?;
    let mut out = BufWriter::with_capacity(1 << 20, &mut partial.file);
    content(&mut out)?;
    out.flush().map_err(io)?;
    drop(out);
    partial.publish(path).map_err(io)
}

/// The JSON header, filled with spaces to a multiple of 8 bytes.
fn header(tensors: &[Pending], metadata: HashMap<String, String>) -> Vec<u8> {
    let mut items = Vec::new();
    if !metadata.is_empty() {
        let sorted: BTreeMap<_, _> = metadata.into_iter().collect();
        items.push(format!("\"__metadata__\":{}", serde_json::json!(sorted)));
    }
    let mut begin = 0;
    for tensor in tensors {
        let Pending { key, dtype, shape, .. } = tensor;
        let end = begin + tensor.length();
        let info = serde_json::json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end] });
        items.push(format!("{}:{info}", serde_json::json!(key)));
        begin = end;
    }
    let mut header = format!("{{{}}}", items.join(",")).into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    header
}

/// A file that is not finished: removed unless it is published.
struct Partial {
    file: Output,
    path: PathBuf,
}

impl Partial {
    fn beside(path: &Path) -> std::io::Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = path.file_name().ok_or(std::io::ErrorKind::InvalidInput)?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!(".{}.{}-{count}{PARTIAL}", name.to_string_lossy(), std::process::id());
        let path = path.with_file_name(name);
        Ok(Self { file: files::create(&path)?, path })
    }

    fn publish(self, path: &Path) -> std::io::Result<()> {
        self.file.sync()?;
        files::rename(&self.path, path)?;
        // the new name is safe once the folder is on the disk
        files::sync_folder(path.parent().unwrap_or(Path::new("")))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        // after publishing there is nothing under this name
        let _ = files::remove(&self.path);
    }
}

#[cfg(test)]
mod tests;
