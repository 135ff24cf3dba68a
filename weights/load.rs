//! Checkpoint -> module, strictly: every parameter is filled and every key is used, or the error lists all that is not.
//!
//! On the processor a parameter that the file has in its dtype and order, aligned, is not copied: the tensor is a view of
//! the mapped file (on Unix), which stays mapped for as long as the tensor lives. It may be changed and trained as any
//! other; the first change copies it. What must not happen to the file meanwhile is in [`mod@crate::format`].

use std::collections::HashMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Bool, BoolStore, Bytes, DType, Device, FloatDType, Int, Shape, Tensor, TensorData};
use half::{bf16, f16};
use volary_kernels::layers::Packed;
use volary_kernels::ops::{PackedMatrix, Quantization};

use crate::cast::{Value, as_stored, find_not_finite, read_into, stored, transposed, zeros};
use crate::error::{Error, Problem};
use crate::format::{Checkpoint, Dtype};
use crate::plan::{Part, Plan, Source, Swap};
use crate::rule::KeyMap;
use crate::share::Share;

/// How a module is loaded. The default reads into f32, keeps matrices packed that are, and wants every parameter, and
/// numbers only.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// The dtype that the float parameters get; `None` keeps each as it is stored.
    pub dtype: Option<FloatDType>,
    /// Which matrices are held in 8 or 4 bits.
    pub packing: Packing,
    /// Module paths (with `{}` and `{*}`, as in rules) that keep their initial values when the checkpoint lacks them,
    /// e.g. a new head.
    pub allow_missing: &'static [&'static str],
    /// What to do about NaN and infinite weights.
    pub not_finite: NotFinite,
    /// The part of a mixture's experts that the module holds, for one that is [cut](Share::of) to it. Of the checkpoint
    /// nothing else is read.
    pub share: Share,
}

/// Which matrices of linear layers and embeddings are held in 8 or 4 bits; see [`Packed`]. All else is floats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Packing {
    /// Those that are packed in the checkpoint, unless a rule turns them around or cuts their rows apart.
    #[default]
    AsStored,
    /// None: what is packed in the checkpoint is unpacked.
    Floats,
    /// All that [`Quantization::fits`], packed one by one as they are read. What is packed so in the checkpoint is
    /// taken as it is; what is packed otherwise loses twice.
    Into(Quantization),
}

/// What to do about weights that are no finite numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NotFinite {
    /// They are an error.
    #[default]
    Refuse,
    /// They are loaded. Nobody looks for them: what is not copied is not read.
    Allow,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            dtype: Some(FloatDType::F32),
            packing: Packing::AsStored,
            allow_missing: &[],
            not_finite: NotFinite::Refuse,
            share: Share::WHOLE,
        }
    }
}

/// A parameter of a module, as a checkpoint would store it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// The field names and indices that lead to it, joined by dots.
    pub path: String,
    /// Its dimensions in a checkpoint: `[d_out, d_in]` for a `Linear` in column layout, whatever Burn holds.
    pub shape: Vec<usize>,
    /// What its values are.
    pub kind: Kind,
    /// Whether it is the matrix of a linear layer or an embedding, which can be held packed.
    pub can_pack: bool,
}

/// What the values of a parameter are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Floating-point numbers.
    Float,
    /// Integers.
    Int,
    /// Truth values.
    Bool,
}

impl Kind {
    /// `float`, `int` or `bool`.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Float => "float",
            Kind::Int => "int",
            Kind::Bool => "bool",
        }
    }
}

/// Lists a module's parameters. Lazy ones stay lazy: listing a model of any size allocates no tensor.
pub fn parameters<M: Module>(module: &M) -> Vec<Parameter> {
    let mut listing = Listing { path: Path::default(), parameters: Vec::new() };
    module.visit(&mut listing);
    listing.parameters
}

/// What would be wrong with loading `checkpoint` into `module`, from names, shapes and dtypes alone: no tensor is read.
///
/// # Errors
/// [`Error::Rule`] when a rule cannot be followed.
pub fn check<M: Module>(
    module: &M,
    checkpoint: &dyn Checkpoint,
    keys: &KeyMap,
    options: &LoadOptions,
) -> Result<Vec<Problem>, Error> {
    Ok(Plan::new(&parameters(module), checkpoint, keys, options)?.problems)
}

/// Fills `module` from `checkpoint`. Each tensor is read, cast and placed on its parameter's device before the next;
/// parameters keep their ids, and whether they are trained.
///
/// # Errors
/// [`Error::Mismatch`] with everything that does not fit; [`Error::Rule`] when a rule cannot be followed;
/// [`Error::Packed`] for a module that holds packed matrices already.
pub fn load<M: Module>(
    module: M,
    checkpoint: &dyn Checkpoint,
    keys: &KeyMap,
    options: &LoadOptions,
) -> Result<M, Error> {
    let Plan { sources, mut problems } = Plan::new(&parameters(&module), checkpoint, keys, options)?;
    let mut loader =
        Loader { path: Path::default(), sources, checkpoint, options, not_finite: Vec::new(), error: None };
    let module = if problems.is_empty() {
        module.map(&mut loader)
    } else {
        loader.inspect(); // so that one error has all the problems
        module
    };
    if let Some(error) = loader.error {
        return Err(error);
    }
    problems.extend(loader.not_finite);
    if problems.is_empty() {
        Ok(module)
    } else {
        Err(Error::Mismatch { file: checkpoint.path().to_owned(), problems })
    }
}

/// The way from the module's root to the parameter that is being visited.
#[derive(Default)]
pub(crate) struct Path {
    names: Vec<String>,
    /// What Burn calls the modules that have these names inside them.
    containers: Vec<String>,
}

impl Path {
    pub fn enter(&mut self, name: &str, container: &str) {
        self.names.push(name.to_owned());
        self.containers.push(container.to_owned());
    }

    pub fn exit(&mut self) {
        self.names.pop();
        self.containers.pop();
    }

    pub fn joined(&self) -> String {
        self.names.join(".")
    }

    /// Whether a float parameter of so many dimensions is a matrix that its layer can compute with packed.
    pub fn can_pack(&self, dimensions: usize) -> bool {
        dimensions == 2
            && self.containers.last().is_some_and(|container| Packed::LAYERS.contains(&container.as_str()))
    }

    /// The parameter that is held packed, when that is what is being visited.
    pub fn packed(&self) -> Option<String> {
        let (last, parameter) = self.names.split_last()?;
        (last == Packed::NAME).then(|| parameter.join("."))
    }
}

/// The shape that a parameter has in a checkpoint.
///
/// A lazy parameter knows it. An initialized one may hold its value in another layout, which its save mapper undoes.
macro_rules! stored_shape {
    ($param:expr) => {
        if $param.is_initialized() { $param.transform_for_save().lazy_shape() } else { $param.lazy_shape() }
    };
}

/// Whether a parameter holds its values in another layout than checkpoints do.
fn rearranges<const D: usize>(param: &Param<Tensor<D>>) -> bool {
    let probe: [usize; D] = std::array::from_fn(|dimension| dimension + 1);
    let probed = Tensor::<D>::zeros(probe, &param.lazy_device());
    param.clone().transform_for_load(probed, param.id).base().dims() != probe
}

struct Listing {
    path: Path,
    parameters: Vec<Parameter>,
}

impl Listing {
    fn push(&mut self, shape: Shape, kind: Kind) {
        let shape = shape.as_slice().to_vec();
        let can_pack = kind == Kind::Float && self.path.can_pack(shape.len());
        self.parameters.push(Parameter { path: self.path.joined(), shape, kind, can_pack });
    }
}

impl ModuleVisitor for Listing {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.push(stored_shape!(param), Kind::Float);
    }

    fn visit_int<const D: usize>(&mut self, param: &Param<Tensor<D, Int>>) {
        self.push(stored_shape!(param), Kind::Int);
    }

    fn visit_bool<const D: usize>(&mut self, param: &Param<Tensor<D, Bool>>) {
        self.push(stored_shape!(param), Kind::Bool);
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

struct Loader<'a> {
    path: Path,
    sources: HashMap<String, Source>,
    checkpoint: &'a dyn Checkpoint,
    options: &'a LoadOptions,
    /// One problem per key.
    not_finite: Vec<Problem>,
    /// The first failure to read; the rest of the module is passed over.
    error: Option<Error>,
}

impl Loader<'_> {
    /// The values for the parameter at the current path; `None` when it is to stay as it is.
    fn take(&mut self, shape: Shape, kind: Kind, device: &Device) -> Option<TensorData> {
        if self.error.is_some() {
            return None;
        }
        let source = self.sources.remove(&self.path.joined())?;
        match self.read(&source, shape, kind, device) {
            Ok(data) => Some(data),
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }

    /// The packed matrix for the parameter at the current path; `None` when it is to be floats, or to stay as it is.
    fn take_packed<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<PackedMatrix> {
        let [rows, cols] = param.lazy_shape().as_slice().try_into().ok()?;
        if self.error.is_some() || !self.path.can_pack(D) || rearranges(param) {
            return None;
        }
        let path = self.path.joined();
        let source = self.sources.get(&path)?.clone();
        match self.pack(&source, [rows, cols]) {
            Ok(None) => None,
            Ok(Some(matrix)) => {
                self.sources.remove(&path);
                Some(matrix)
            }
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }

    fn pack(&mut self, source: &Source, shape: [usize; 2]) -> Result<Option<PackedMatrix>, Error> {
        let wanted = match self.options.packing {
            Packing::Floats => return Ok(None),
            Packing::AsStored => None,
            Packing::Into(quantization) => Some(quantization),
        };
        if let Some(matrix) = self.packed_as_stored(source, shape)?
            && wanted.is_none_or(|wanted| wanted == matrix.quantization())
        {
            return Ok(Some(matrix));
        }
        let Some(wanted) = wanted.filter(|wanted| wanted.fits(shape)) else { return Ok(None) };
        let matrix = PackedMatrix::pack(wanted, shape, &self.assemble::<f32>(source)?);
        if let Some((count, first_index)) = matrix.not_finite() {
            let key = source.parts[0].key.clone();
            self.not_finite.push(Problem::Overflow { key, dtype: Dtype::F16, count, first_index });
        }
        Ok(Some(matrix))
    }

    /// The rows of packed matrices, when whole rows of such are what the source consists of.
    fn packed_as_stored(
        &self,
        source: &Source,
        [_, cols]: [usize; 2],
    ) -> Result<Option<PackedMatrix>, Error> {
        let mut matrices = Vec::new();
        for Part { key, elements, .. } in &source.parts {
            let is_whole = |at: usize| cols > 0 && at.is_multiple_of(cols);
            if source.transpose.is_some() || !is_whole(elements.start) || !is_whole(elements.end) {
                return Ok(None);
            }
            let Some(matrix) = self.checkpoint.packed(key)? else { return Ok(None) };
            self.checkpoint.release(key);
            let [rows, width] = matrix.shape();
            // scales that are no numbers: as floats their places are told
            if width != cols || matrix.not_finite().is_some() {
                return Ok(None);
            }
            let wanted = elements.start / cols..elements.end / cols;
            matrices.push(if wanted == (0..rows) { matrix } else { matrix.rows(wanted) });
        }
        Ok(PackedMatrix::stack(matrices))
    }

    fn read(
        &mut self,
        source: &Source,
        shape: Shape,
        kind: Kind,
        device: &Device,
    ) -> Result<TensorData, Error> {
        let float = self.options.dtype.unwrap_or_else(|| as_stored(source.parts[0].dtype));
        if *device == Device::flex() {
            let dtype = match (kind, float) {
                (Kind::Int, _) => DType::I64,
                (Kind::Bool, _) => DType::Bool(BoolStore::Native),
                (Kind::Float, FloatDType::Flex32) => DType::F32,
                (Kind::Float, float) => float.into(),
            };
            if let Some(view) = self.view(source, dtype) {
                return Ok(TensorData::from_bytes(view, shape, dtype));
            }
        }
        Ok(match (kind, float) {
            (Kind::Int, _) => TensorData::new(self.assemble::<i64>(source)?, shape),
            (Kind::Bool, _) => TensorData::new(self.assemble::<bool>(source)?, shape),
            (Kind::Float, FloatDType::F64) => TensorData::new(self.assemble::<f64>(source)?, shape),
            (Kind::Float, FloatDType::F32 | FloatDType::Flex32) => {
                TensorData::new(self.assemble::<f32>(source)?, shape)
            }
            (Kind::Float, FloatDType::F16) => TensorData::new(self.assemble::<f16>(source)?, shape),
            (Kind::Float, FloatDType::BF16) => TensorData::new(self.assemble::<bf16>(source)?, shape),
        })
    }

    /// The source's part of the file, when it has the values as the parameter wants them.
    fn view(&mut self, source: &Source, dtype: DType) -> Option<Bytes> {
        let [part] = &source.parts[..] else { return None };
        // a truth value is any byte but 0 in a file, and 1 in a tensor
        if source.transpose.is_some() || part.dtype == Dtype::Bool || stored(dtype) != Some(part.dtype) {
            return None;
        }
        let size = part.dtype.size();
        let whole = self.checkpoint.shared(&part.key)?;
        let view = whole.view(part.elements.start * size, part.elements.end * size).ok()?;
        if !view.as_ptr().addr().is_multiple_of(size) {
            return None;
        }
        if self.options.not_finite == NotFinite::Refuse
            && let Some((count, first)) = find_not_finite(part.dtype, &view)
        {
            self.report(&part.key, part.dtype, count, part.elements.start + first);
        }
        Some(view)
    }

    /// The values of a source in the order of the parameter.
    fn assemble<T: Value>(&mut self, source: &Source) -> Result<Vec<T>, Error> {
        // some columns only, the rest of each row is passed over
        let cut = source.transpose.as_ref().filter(|swap| swap.taken.len() < swap.columns);
        let mut assembled = zeros(source.elements());
        let mut rest = &mut assembled[..];
        for part in &source.parts {
            let bytes = self.checkpoint.bytes(&part.key)?;
            let size = part.dtype.size();
            let (out, after) = rest.split_at_mut(source.taken(part));
            rest = after;
            let values = &bytes[part.elements.start * size..part.elements.end * size];
            let not_finite = match cut {
                None => read_into(part.dtype, values, out),
                Some(swap) => read_into(part.dtype, &swap.take(values, size), out)
                    .map(|(count, first)| (count, swap.place(first))),
            };
            drop(bytes);
            self.checkpoint.release(&part.key);
            if self.options.not_finite == NotFinite::Refuse
                && let Some((count, first)) = not_finite
            {
                self.report(
                    &part.key,
                    stored(T::dtype()).unwrap_or(part.dtype),
                    count,
                    part.elements.start + first,
                );
            }
        }
        Ok(match &source.transpose {
            Some(Swap { rows, taken, .. }) => transposed(&assembled, *rows, taken.len()),
            None => assembled,
        })
    }

    /// Notes values that are no numbers; the parts of one key add up.
    fn report(&mut self, key: &str, dtype: Dtype, count: usize, first_index: usize) {
        for problem in &mut self.not_finite {
            if let Problem::NotFinite { key: known, count: counted, first_index: first, .. } = problem
                && known == key
            {
                *counted += count;
                *first = first_index.min(*first);
                return;
            }
        }
        self.not_finite.push(Problem::NotFinite { key: key.to_owned(), dtype, count, first_index });
    }

    /// Reads all that could be loaded, only to find values that are no numbers.
    fn inspect(&mut self) {
        if self.options.not_finite == NotFinite::Allow {
            return;
        }
        let mut sources: Vec<_> = std::mem::take(&mut self.sources).into_iter().collect();
        sources.sort_by(|(a, _), (b, _)| a.cmp(b));
        for (_, source) in sources {
            let shape = Shape::new([source.elements()]);
            if source.parts[0].dtype.is_float()
                && let Err(error) = self.read(&source, shape, Kind::Float, &Device::flex())
            {
                self.error = Some(error);
                return;
            }
        }
    }
}

impl ModuleMapper for Loader<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if let Some(matrix) = self.take_packed(&param) {
            return Packed::hold(param, matrix, self.options.dtype.unwrap_or(FloatDType::F32).into());
        }
        let device = param.lazy_device();
        let Some(data) = self.take(stored_shape!(param), Kind::Float, &device) else { return param };
        let dtype = match self.options.dtype {
            Some(FloatDType::Flex32) => DType::Flex32,
            _ => data.dtype(),
        };
        let tensor = Tensor::from_data(data, (&device, dtype));
        let id = param.id;
        param.transform_for_load(tensor, id)
    }

    fn map_int<const D: usize>(&mut self, param: Param<Tensor<D, Int>>) -> Param<Tensor<D, Int>> {
        let device = param.lazy_device();
        let Some(data) = self.take(stored_shape!(param), Kind::Int, &device) else { return param };
        let tensor = Tensor::from_data(data, &device);
        let id = param.id;
        param.transform_for_load(tensor, id)
    }

    fn map_bool<const D: usize>(&mut self, param: Param<Tensor<D, Bool>>) -> Param<Tensor<D, Bool>> {
        let device = param.lazy_device();
        let Some(data) = self.take(stored_shape!(param), Kind::Bool, &device) else { return param };
        let tensor = Tensor::from_data(data, &device);
        let id = param.id;
        param.transform_for_load(tensor, id)
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
        if let Some(parameter) = self.path.packed() {
            self.error.get_or_insert(Error::Packed { parameter });
        }
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}

#[cfg(test)]
mod tests;
