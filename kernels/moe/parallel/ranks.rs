use std::sync::{Arc, Mutex, PoisonError};

use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Tensor, TensorData};

use super::{Collectives, Pending, Traffic};

/// Some ranks, one of which this is. It counts what this one sends.
///
/// Ranks call the same functions in the same order.
#[derive(Clone, Debug)]
pub struct Ranks {
    collectives: Arc<dyn Collectives>,
    sent: Arc<Mutex<Traffic>>,
}

impl Ranks {
    /// Nothing has been sent.
    pub fn new(collectives: Arc<dyn Collectives>) -> Self {
        Self { collectives, sent: Arc::default() }
    }

    /// Which one this is, from 0.
    pub fn rank(&self) -> usize {
        self.collectives.rank()
    }

    /// How many there are.
    pub fn size(&self) -> usize {
        self.collectives.size()
    }

    /// What this rank has sent to others, here; not what it sent in groups that were split off.
    pub fn sent(&self) -> Traffic {
        *self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ranks that give the same colour, in the order of their ranks here.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn split(&self, color: usize) -> Self {
        Self::new(self.collectives.split(color))
    }

    /// Waits until all ranks are here.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn barrier(&self) {
        self.collectives.barrier();
    }

    /// Each rank's numbers for this one, in the order of ranks.
    ///
    /// - `counts`: as many for each rank, in the order of ranks
    ///
    /// # Panics
    /// If the ranks do not divide them, a number is not below 2³², or another rank has ended.
    pub fn all_to_all(&self, counts: &[usize]) -> Vec<usize> {
        let size = self.size();
        assert!(counts.len().is_multiple_of(size), "{} counts for {size} ranks", counts.len());
        let bytes: Vec<u8> = counts
            .iter()
            .flat_map(|&count| u32::try_from(count).expect("counts are below 2^32").to_ne_bytes())
            .collect();
        let lengths = vec![bytes.len() / size; size];
        self.count(|sent| sent.counts += (bytes.len() / size * (size - 1)) as u64);
        let received = self.collectives.exchange(bytes, &lengths, &lengths).wait();
        let number = |bytes: &[u8]| {
            let mut number = [0; size_of::<u32>()];
            number.copy_from_slice(bytes);
            u32::from_ne_bytes(number) as usize
        };
        received.chunks_exact(size_of::<u32>()).map(number).collect()
    }

    /// The numbers of all ranks, as many of each, in the order of ranks.
    ///
    /// # Panics
    /// As [`Ranks::all_to_all`].
    pub fn all_gather(&self, counts: &[usize]) -> Vec<usize> {
        self.all_to_all(&counts.repeat(self.size()))
    }

    /// Begins to send rows to each rank and to receive rows from each.
    ///
    /// - `bytes`: the rows for each rank, in the order of ranks
    /// - `send`, `receive`: how many rows
    /// - `width`: bytes of a row
    pub(super) fn rows(&self, bytes: Vec<u8>, send: &[usize], receive: &[usize], width: usize) -> Pending {
        let lengths = |rows: &[usize]| rows.iter().map(|rows| rows * width).collect::<Vec<_>>();
        let (send, receive) = (lengths(send), lengths(receive));
        let own = send[self.rank()];
        self.count(|sent| sent.rows += (bytes.len() - own) as u64);
        self.collectives.exchange(bytes, &send, &receive)
    }

    /// The sum of what all ranks have, in f32, rounded to the dtype of `values` at the end.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn all_reduce<const D: usize>(&self, values: Tensor<D>) -> Tensor<D> {
        let (numbers, like) = numbers(values);
        if self.size() > 1 {
            self.count(|sent| sent.reduced += (numbers.len() * size_of::<f32>()) as u64);
        }
        tensor(self.collectives.all_reduce(numbers), like)
    }

    /// As [`Ranks::all_reduce`], for `root` alone.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn reduce<const D: usize>(&self, values: Tensor<D>, root: usize) -> Option<Tensor<D>> {
        let (numbers, like) = numbers(values);
        if self.rank() != root {
            self.count(|sent| sent.reduced += (numbers.len() * size_of::<f32>()) as u64);
        }
        Some(tensor(self.collectives.reduce(numbers, root)?, like))
    }

    /// What `root` has. The others give a tensor of the same shape and dtype.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn broadcast<const D: usize>(&self, values: Tensor<D>, root: usize) -> Tensor<D> {
        let (device, dtype, shape) = (values.device(), values.dtype(), values.dims());
        let bytes = values.into_data().as_bytes().to_vec();
        if self.rank() == root {
            self.count(|sent| sent.broadcast += (bytes.len() * (self.size() - 1)) as u64);
        }
        let bytes = self.collectives.broadcast(bytes, root);
        Tensor::from_data(TensorData::from_bytes_vec(bytes, shape, dtype), (&device, dtype))
    }

    /// The module with the parameters that `root` has: what is on every rank begins alike.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn share<M: Module>(&self, module: M, root: usize) -> M {
        module.map(&mut Share { ranks: self, root })
    }

    fn count(&self, add: impl FnOnce(&mut Traffic)) {
        add(&mut self.sent.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Where values are, of what dtype and shape.
type Like<const D: usize> = (Device, DType, [usize; D]);

/// The values in f32.
fn numbers<const D: usize>(values: Tensor<D>) -> (Vec<f32>, Like<D>) {
    let like = (values.device(), values.dtype(), values.dims());
    (values.into_data().convert::<f32>().iter::<f32>().collect(), like)
}

/// What [`numbers`] was given, of other values.
fn tensor<const D: usize>(numbers: Vec<f32>, (device, dtype, shape): Like<D>) -> Tensor<D> {
    Tensor::<D>::from_data(TensorData::new(numbers, shape), (&device, DType::F32)).cast(dtype)
}

struct Share<'a> {
    ranks: &'a Ranks,
    root: usize,
}

impl ModuleMapper for Share<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| {
            let is_tracked = value.is_require_grad();
            self.ranks.broadcast(value.detach(), self.root).set_require_grad(is_tracked)
        })
    }
}
