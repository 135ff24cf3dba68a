use std::fmt::{self, Debug};
use std::sync::Arc;

/// What ranks do together. Each calls the same functions in the same order.
///
/// Implementations have to move bytes and to form groups; they may know better ways for the rest.
///
/// # Panics
/// All functions do if another rank has ended, or calls something else.
pub trait Collectives: Debug + Send + Sync {
    /// Which one this is, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn size(&self) -> usize;

    /// Begins to send a part of `bytes` to each rank, in the order of ranks and this one among them, and to receive a part
    /// from each. Several may be on the way.
    ///
    /// - `send`, `receive`: lengths of the parts
    fn exchange(&self, bytes: Vec<u8>, send: &[usize], receive: &[usize]) -> Pending;

    /// The ranks that give the same colour, in the order of their ranks here.
    fn split(&self, color: usize) -> Arc<dyn Collectives>;

    /// The sum of what all ranks have.
    fn all_reduce(&self, values: Vec<f32>) -> Vec<f32> {
        let sent: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let lengths = vec![sent.len(); self.size()];
        sum(&self.exchange(sent.repeat(self.size()), &lengths, &lengths).wait(), values.len())
    }

    /// The sum of what all ranks have, for `root` alone.
    fn reduce(&self, values: Vec<f32>, root: usize) -> Option<Vec<f32>> {
        let sent: Vec<u8> = values.iter().flat_map(|value| value.to_ne_bytes()).collect();
        let (length, size) = (sent.len(), self.size());
        let is_root = self.rank() == root;
        let receive = vec![if is_root { length } else { 0 }; size];
        let all = self.exchange(sent, &only(root, length, size), &receive).wait();
        is_root.then(|| sum(&all, values.len()))
    }

    /// What `root` has. The others give as many bytes.
    fn broadcast(&self, bytes: Vec<u8>, root: usize) -> Vec<u8> {
        let (length, size) = (bytes.len(), self.size());
        let receive = only(root, length, size);
        match self.rank() == root {
            true => self.exchange(bytes.repeat(size), &vec![length; size], &receive).wait(),
            false => self.exchange(Vec::new(), &vec![0; size], &receive).wait(),
        }
    }

    /// Waits until all ranks are here.
    fn barrier(&self) {
        let nothing = vec![0; self.size()];
        self.exchange(Vec::new(), &nothing, &nothing).wait();
    }
}

/// Lengths of the parts where there is but one, of `rank`.
fn only(rank: usize, length: usize, size: usize) -> Vec<usize> {
    (0..size).map(|other| if other == rank { length } else { 0 }).collect()
}

/// Of the values of all ranks, so many of each.
fn sum(bytes: &[u8], count: usize) -> Vec<f32> {
    let mut sum = vec![0.0; count];
    for (at, bytes) in bytes.chunks_exact(size_of::<f32>()).enumerate() {
        let mut value = [0; size_of::<f32>()];
        value.copy_from_slice(bytes);
        sum[at % count] += f32::from_ne_bytes(value);
    }
    sum
}

/// Bytes that are on their way.
pub struct Pending(Box<dyn FnOnce() -> Vec<u8> + Send>);

impl Pending {
    /// What `receive` returns.
    pub fn new(receive: impl FnOnce() -> Vec<u8> + Send + 'static) -> Self {
        Self(Box::new(receive))
    }

    /// The parts in the order of ranks, once all are here.
    ///
    /// # Panics
    /// If another rank has ended.
    pub fn wait(self) -> Vec<u8> {
        (self.0)()
    }
}

impl Debug for Pending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pending")
    }
}
