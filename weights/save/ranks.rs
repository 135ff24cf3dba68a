//! A checkpoint that several processes (ranks) write together.
//!
//! Every rank writes the experts that it holds into a file of its own, the first one also all the rest. The files are the
//! shards of a checkpoint in the public layout (`model.safetensors.index.json` beside them), in which experts have the
//! numbers that they have in the whole model: any number of ranks loads it, and so does whoever reads shards.
//!
//! A save never touches the files of the checkpoint that is there. Its shards have names of their own,
//! `model-g000007-00002-of-00004.safetensors` for the seventh save (generation), which mean nothing until the index names
//! them; the index is replaced at once, by a renaming. Whatever ends a process on the way, what was there before is whole,
//! and the next save removes what the unfinished one has left. Optimizers and schedules are saved by recipes, not here.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::FloatDType;

use super::{PARTIAL, index, write_module, write_whole};
use crate::error::{Error, PartProblem};
use crate::experts::disagreements;
use crate::files;
use crate::format::shards::{is_shard, named_by};
use crate::format::{Checkpoint, Entry, SafetensorsFile, file_names};
use crate::rule::KeyMap;
use crate::share::Share;

/// The file that says where every tensor is.
const INDEX: &str = "model.safetensors.index.json";
/// The file that readers prefer to an index.
const WHOLE: &str = "model.safetensors";

/// A checkpoint that ranks are about to write into a folder. Only one at a time is written into it.
///
/// ```
/// use burn::{module::Module, tensor::Device};
/// use volary_kernels::moe::ExpertMlpConfig;
/// use volary_weights::{KeyMap, LoadOptions, Ones, Rule, Saving, Share, load};
///
/// const KEYS: KeyMap = KeyMap::new(&[
///     Rule::StackTranspose("experts.{}.w1.weight", "up.weight", Ones::Before(0)),
///     Rule::StackTranspose("experts.{}.w2.weight", "down.weight", Ones::Before(0)),
/// ]);
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let experts = ExpertMlpConfig::new(4, 8, 16).with_bias(false);
/// let folder = tempfile::tempdir()?;
///
/// // what one of two ranks does; a communicator's barriers stand where they are named
/// let saving = Saving::begin(folder.path(), 2)?; // rank 0, which tells the others the generation
/// // barrier
/// for rank in [0, 1] {
///     let share = Share::new(rank, 2).ok_or("no such rank")?;
///     let part = share.of(experts.init(&Device::flex()), &KEYS)?;
///     Saving::join(folder.path(), 2, saving.generation()).write(rank, &part, &KEYS, None)?;
/// }
/// // barrier
/// saving.commit(&KEYS)?; // rank 0
///
/// // the third of four ranks reads one expert
/// let share = Share::new(2, 4).ok_or("no such rank")?;
/// let part = share.of(experts.init(&Device::flex()), &KEYS)?;
/// let options = LoadOptions { share, ..LoadOptions::default() };
/// let part = load(part, volary_weights::open(folder.path())?.as_ref(), &KEYS, &options)?;
/// assert_eq!(part.up.weight.dims(), [1, 8, 16]);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Saving {
    folder: PathBuf,
    ranks: usize,
    generation: u64,
}

impl Saving {
    /// Begins a save: one rank does this before any writes. What an unfinished save has left is removed.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Shards`] if the folder's index cannot be read.
    pub fn begin(folder: &Path, ranks: usize) -> Result<Self, Error> {
        let names = file_names(folder)?;
        let last = names.iter().filter_map(|name| generation_of(name)).max().unwrap_or(0);
        let saving = Self::join(folder, ranks, last.saturating_add(1));
        let live = saving.live()?;
        let is_half_an_index =
            |name: &str| name.starts_with(&format!(".{INDEX}.")) && name.ends_with(PARTIAL);
        let is_left =
            |name: &str| generation_of(name).is_some() && !live.contains(name) || is_half_an_index(name);
        for name in names.iter().filter(|name| is_left(name)) {
            saving.remove(name)?;
        }
        Ok(saving)
    }

    /// The save that another rank has begun as this `generation`.
    pub fn join(folder: &Path, ranks: usize, generation: u64) -> Self {
        Self { folder: folder.to_owned(), ranks, generation }
    }

    /// The number of the save, which the other ranks are told.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Writes the part of a rank, and returns its file. `module` holds the [share](Share::of) of the rank. Floats are
    /// written as `dtype`, or as the module holds them.
    ///
    /// # Errors
    /// As [`save()`](super::save()); [`Error::Parts`] if there is no such rank.
    pub fn write<M: Module>(
        &self,
        rank: usize,
        module: &M,
        keys: &KeyMap,
        dtype: Option<FloatDType>,
    ) -> Result<PathBuf, Error> {
        let Some(share) = Share::new(rank, self.ranks) else {
            return Err(self.wrong(vec![PartProblem::NoRank { rank, ranks: self.ranks }]));
        };
        let path = self.folder.join(self.part(rank));
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        write_module(module, keys, dtype, &path, metadata, Some(share))?;
        Ok(path)
    }

    /// Makes the parts the folder's checkpoint: one rank does this after all have written. The one before is removed, but
    /// for torch files, which readers like less. What of it cannot be removed now the next save removes.
    ///
    /// Returns the files, the index last.
    ///
    /// # Errors
    /// [`Error::Parts`] with everything that is wrong with the parts: missing ones, broken ones, such that do not agree
    /// about the number of experts, shapes or dtypes; [`Error::Io`]. Whichever checkpoint is there then is whole.
    pub fn commit(&self, keys: &KeyMap) -> Result<Vec<PathBuf>, Error> {
        let parts = self.parts()?;
        let entries: Vec<Vec<&Entry>> = parts.iter().map(|part| part.entries().iter().collect()).collect();
        let problems = disagreements(&entries, &keys.lines()?);
        if !problems.is_empty() {
            return Err(self.wrong(problems));
        }
        let names: Vec<String> = (0..self.ranks).map(|rank| self.part(rank)).collect();
        let tensor = |entry: &Entry| (entry.name.clone(), entry.bytes());
        let tensors = |part: &SafetensorsFile| part.entries().iter().map(tensor).collect::<Vec<_>>();
        let index = index(names.iter().cloned().zip(parts.iter().map(tensors)));
        let path = self.folder.join(INDEX);
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Io { path, source }
        };
        write_whole(&path, |out| out.write_all(index.as_bytes()).map_err(io(&path)))?;
        // readers prefer it to an index: until it is gone, it is the checkpoint
        let whole = self.folder.join(WHOLE);
        if whole.symlink_metadata().is_ok() {
            files::remove(&whole).map_err(io(&whole))?;
            files::sync_folder(&self.folder).map_err(io(&self.folder))?;
        }
        self.remove_old();
        Ok(names.iter().map(|name| self.folder.join(name)).chain([path]).collect())
    }

    /// The files that the folder's index names.
    fn live(&self) -> Result<BTreeSet<String>, Error> {
        let index = self.folder.join(INDEX);
        if index.is_file() { named_by(&index) } else { Ok(BTreeSet::new()) }
    }

    /// Removes the shards that the index does not name, as far as that can be done.
    fn remove_old(&self) {
        let (Ok(names), Ok(live)) = (file_names(&self.folder), self.live()) else { return };
        for name in names {
            if (generation_of(&name).is_some() || is_shard(&name)) && !live.contains(&name) {
                let _ = self.remove(&name);
            }
        }
    }

    fn remove(&self, name: &str) -> Result<(), Error> {
        let path = self.folder.join(name);
        files::remove(&path).map_err(|source| Error::Io { path, source })
    }

    /// The file of a rank.
    fn part(&self, rank: usize) -> String {
        format!("model-g{:06}-{:05}-of-{:05}.safetensors", self.generation, rank + 1, self.ranks)
    }

    fn wrong(&self, problems: Vec<PartProblem>) -> Error {
        Error::Parts { path: self.folder.clone(), problems }
    }

    fn parts(&self) -> Result<Vec<SafetensorsFile>, Error> {
        let (mut parts, mut problems) = (Vec::new(), Vec::new());
        for rank in 0..self.ranks {
            let file = self.part(rank);
            let path = self.folder.join(&file);
            if !path.exists() {
                problems.push(PartProblem::Missing { rank, file });
                continue;
            }
            match SafetensorsFile::open(path) {
                Ok(part) => parts.push(part),
                Err(error) => problems.push(PartProblem::Broken(Box::new(error))),
            }
        }
        if problems.is_empty() { Ok(parts) } else { Err(self.wrong(problems)) }
    }
}

/// The generation of a file that a save has written, or was about to.
fn generation_of(name: &str) -> Option<u64> {
    let name = match name.strip_prefix('.') {
        Some(hidden) => hidden.strip_suffix(PARTIAL)?,
        None => name,
    };
    name.strip_prefix("model-g")?.split_once('-')?.0.parse().ok()
}

#[cfg(test)]
mod tests;
