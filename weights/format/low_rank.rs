//! A checkpoint with low-rank changes of some of its tensors added as they are read.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;

use burn::tensor::Bytes;

use super::{Checkpoint, Dtype, Entry};
use crate::cast::values;
use crate::error::Error;

/// A change of a tensor, `scale * up * down`, where the tensor is seen as `[rows, columns]`: its first dimension, and all
/// others.
#[derive(Debug, Clone, PartialEq)]
pub struct LowRank {
    /// `[rows, rank]`
    pub up: Vec<f32>,
    /// `[rank, columns]`
    pub down: Vec<f32>,
    /// At least 1.
    pub rank: usize,
    /// What the product is taken times.
    pub scale: f32,
}

impl LowRank {
    /// Whether it fits a tensor of this shape.
    pub fn fits(&self, shape: &[usize]) -> bool {
        let [rows, columns] = matrix(shape);
        self.rank > 0 && self.up.len() == rows * self.rank && self.down.len() == self.rank * columns
    }

    fn add(&self, tensor: &mut [f32]) {
        let columns = self.down.len() / self.rank;
        for (row, up) in tensor.chunks_mut(columns).zip(self.up.chunks(self.rank)) {
            for (down, factor) in self.down.chunks(columns).zip(up) {
                let factor = factor * self.scale;
                row.iter_mut().zip(down).for_each(|(value, down)| *value += factor * down);
            }
        }
    }
}

fn matrix(shape: &[usize]) -> [usize; 2] {
    let (rows, rest) = shape.split_first().map_or((1, shape), |(rows, rest)| (*rows, rest));
    [rows, rest.iter().product()]
}

/// A checkpoint with changes. Changed tensors are f32; all others are as they are stored.
pub struct WithLowRank {
    stored: Box<dyn Checkpoint>,
    entries: Vec<Entry>,
    changes: HashMap<String, Vec<LowRank>>,
}

impl WithLowRank {
    /// The checkpoint with the changes of the tensors that they name.
    ///
    /// # Errors
    /// [`Error::NoTensor`] for a change of a tensor that is not there.
    ///
    /// # Panics
    /// If a change does not fit its tensor: ask [`LowRank::fits`].
    pub fn new(stored: Box<dyn Checkpoint>, changes: HashMap<String, Vec<LowRank>>) -> Result<Self, Error> {
        let mut entries = stored.entries().to_vec();
        for (name, changes) in &changes {
            stored.bytes(name)?; // names those that come near
            for entry in entries.iter_mut().filter(|entry| entry.name == *name) {
                assert!(
                    changes.iter().all(|change| change.fits(&entry.shape)),
                    "a change does not fit `{name}`"
                );
                entry.dtype = Dtype::F32;
            }
        }
        Ok(Self { stored, entries, changes })
    }
}

impl Checkpoint for WithLowRank {
    fn path(&self) -> &Path {
        self.stored.path()
    }

    fn entries(&self) -> &[Entry] {
        &self.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let bytes = self.stored.bytes(name)?;
        let Some(changes) = self.changes.get(name) else { return Ok(bytes) };
        let entry = self.stored.entries().iter().find(|entry| entry.name == name);
        let Some(entry) = entry else { return Ok(bytes) };
        let mut tensor: Vec<f32> = values(entry.dtype, &bytes);
        changes.iter().for_each(|change| change.add(&mut tensor));
        Ok(Cow::Owned(bytemuck::cast_slice(&tensor).to_vec()))
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        if self.changes.contains_key(name) { None } else { self.stored.shared(name) }
    }

    fn release(&self, name: &str) {
        self.stored.release(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{open, save_tensors};
    use burn::tensor::TensorData;

    #[test]
    fn a_change_is_added_to_what_is_stored() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let stored = [
            ("a".to_owned(), TensorData::from([[1f32, 2.0, 3.0], [4.0, 5.0, 6.0]])),
            ("b".to_owned(), TensorData::from([7f32])),
        ];
        save_tensors(&path, &stored).unwrap();
        let change = LowRank { up: vec![1.0, -1.0], down: vec![1.0, 0.0, 2.0], rank: 1, scale: 0.5 };
        assert!(change.fits(&[2, 3, 1, 1]) && !change.fits(&[3, 2]));
        let changes = HashMap::from([("a".to_owned(), vec![change.clone(), change.clone()])]);
        let changed = WithLowRank::new(open(folder.path()).unwrap(), changes).unwrap();
        let of = |name: &str| bytemuck::pod_collect_to_vec::<u8, f32>(&changed.bytes(name).unwrap());
        assert_eq!(of("a"), [2.0, 2.0, 5.0, 3.0, 5.0, 4.0]);
        assert_eq!(of("b"), [7.0]);
        let absent = HashMap::from([("c".to_owned(), vec![change])]);
        assert!(WithLowRank::new(open(folder.path()).unwrap(), absent).is_err());
    }
}
