//! The tensors of checkpoints under other names, in parts, several times, or beside others that were made.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;

use super::{Checkpoint, Contents, Entry};
use crate::error::Error;

/// Where the values of a tensor are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// In a tensor of one of the sources.
    Stored {
        /// Which source.
        source: usize,
        /// The tensor's name there.
        key: String,
        /// Which of its bytes; all of them without it.
        bytes: Option<Range<usize>>,
    },
    /// Here.
    Made(Vec<u8>),
}

impl Origin {
    /// All of a tensor of the first source.
    pub fn whole(key: impl Into<String>) -> Self {
        Self::Stored { source: 0, key: key.into(), bytes: None }
    }
}

/// Tensors that are those of other checkpoints. Nothing is copied before it is read.
pub struct Rearranged<'a> {
    contents: Contents,
    sources: Vec<Box<dyn Checkpoint + 'a>>,
    /// Of each entry.
    origins: Vec<Origin>,
}

impl fmt::Debug for Rearranged<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rearranged").field("path", &self.contents.path).finish_non_exhaustive()
    }
}

impl<'a> Rearranged<'a> {
    /// Tensors in this order. `path` stands for the whole in messages.
    ///
    /// # Errors
    /// [`Error::Duplicate`] for a name that is there twice.
    pub fn new(
        path: impl Into<PathBuf>,
        sources: Vec<Box<dyn Checkpoint + 'a>>,
        tensors: Vec<(Entry, Origin)>,
    ) -> Result<Self, Error> {
        let path = path.into();
        let mut names = HashSet::new();
        if let Some((twice, _)) = tensors.iter().find(|(entry, _)| !names.insert(&entry.name)) {
            return Err(Error::Duplicate { key: twice.name.clone(), file: path });
        }
        let (entries, origins) = tensors.into_iter().unzip();
        Ok(Self { contents: Contents::new(path, entries), sources, origins })
    }
}

impl Checkpoint for Rearranged<'_> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let at = self.contents.position(name)?;
        Ok(match &self.origins[at] {
            Origin::Made(bytes) => Cow::Borrowed(bytes),
            Origin::Stored { source, key, bytes } => match (self.sources[*source].bytes(key)?, bytes) {
                (whole, None) => whole,
                (Cow::Borrowed(whole), Some(part)) => Cow::Borrowed(&whole[part.clone()]),
                (Cow::Owned(whole), Some(part)) => Cow::Owned(whole[part.clone()].to_vec()),
            },
        })
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        match &self.origins[self.contents.find(name)?] {
            Origin::Made(_) => None,
            Origin::Stored { source, key, bytes } => {
                let whole = self.sources[*source].shared(key)?;
                match bytes {
                    None => Some(whole),
                    Some(part) => whole.view(part.start, part.end).ok(),
                }
            }
        }
    }

    fn release(&self, name: &str) {
        if let Some(Origin::Stored { source, key, .. }) = self.contents.find(name).map(|at| &self.origins[at])
        {
            self.sources[*source].release(key);
        }
    }
}
