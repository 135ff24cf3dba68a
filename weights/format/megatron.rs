//! The files of tensor-parallel ranks, merged: `mp_rank_00_model_states.pt` as DeepSpeed writes them,
//! `mp_rank_00/model_optim_rng.pt` as Megatron-LM does, `consolidated.00.pth` as Meta does for LLaMA.
//!
//! Each rank holds a part of every wide tensor. Which part is not in the files; a [`MegatronLayout`] says it as data,
//! one line for each kind of tensor. Names, shapes and dtypes are compared when the ranks are opened; values are read
//! when they are asked for, and only then is it seen whether the copies of a [`Merge::Replicated`] tensor agree.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::shards::is_file_name;
use super::{Checkpoint, Contents, Entry, RowScaled, TorchFile, file_names};
use crate::error::Error;
use crate::quantized::Bits;
use crate::rule::{Pattern, RuleError};

/// How the parts of a tensor make it whole. `d_out` is the first dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merge {
    /// Every rank has all of it.
    Replicated,
    /// Each rank has rows: a layer that is parallel over its outputs, and its bias.
    Column,
    /// Each rank has columns (the second dimension): a layer that is parallel over its inputs.
    Row,
    /// Each rank has so many equal parts one under the other, merged part by part: 3 for `[q; k; v]`, 2 for `[k; v]`
    /// and for the halves of a gated layer.
    Fused(usize),
    /// Each rank has rows over `(head, [q, k, v], d_head)`, as Megatron-LM writes since checkpoint version 2. They are
    /// merged to `[q; k; v]`, each over `(head, d_head)`; needs [`RankOptions::n_heads`]. With [`Merge::Column`] in
    /// its place the rows keep their order.
    PerHead,
    /// As [`Merge::Column`]; rows beyond [`RankOptions::vocab_size`], which make the table divisible, are cut.
    Vocabulary,
}

/// How each tensor is merged, by the form of its key: the first pattern that matches counts. `{}` stands for an index,
/// as in rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MegatronLayout {
    /// Patterns with what is done.
    pub merges: &'static [(&'static str, Merge)],
}

/// Megatron-LM's first GPT-2, whose names many systems kept: `[q; k; v]` in each rank.
pub const GPT2: MegatronLayout = MegatronLayout {
    merges: &[
        ("word_embeddings.weight", Merge::Vocabulary),
        ("position_embeddings.weight", Merge::Replicated),
        ("transformer.position_embeddings.weight", Merge::Replicated),
        ("transformer.block_position_embeddings.weight", Merge::Replicated),
        ("transformer.layers.{}.input_layernorm.weight", Merge::Replicated),
        ("transformer.layers.{}.input_layernorm.bias", Merge::Replicated),
        ("transformer.layers.{}.attention.query_key_value.weight", Merge::Fused(3)),
        ("transformer.layers.{}.attention.query_key_value.bias", Merge::Fused(3)),
        ("transformer.layers.{}.attention.dense.weight", Merge::Row),
        ("transformer.layers.{}.attention.dense.bias", Merge::Replicated),
        ("transformer.layers.{}.post_attention_layernorm.weight", Merge::Replicated),
        ("transformer.layers.{}.post_attention_layernorm.bias", Merge::Replicated),
        ("transformer.layers.{}.mlp.dense_h_to_4h.weight", Merge::Column),
        ("transformer.layers.{}.mlp.dense_h_to_4h.bias", Merge::Column),
        ("transformer.layers.{}.mlp.dense_4h_to_h.weight", Merge::Row),
        ("transformer.layers.{}.mlp.dense_4h_to_h.bias", Merge::Replicated),
        ("transformer.final_layernorm.weight", Merge::Replicated),
        ("transformer.final_layernorm.bias", Merge::Replicated),
    ],
};

/// What has to be known to merge ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RankOptions {
    /// How each tensor is merged.
    pub layout: MegatronLayout,
    /// How many ranks there must be; without it, as many as the files say or, if they do not, as there are.
    pub ranks: Option<usize>,
    /// How many attention heads the whole model has, for [`Merge::PerHead`].
    pub n_heads: Option<usize>,
    /// How many rows a [`Merge::Vocabulary`] table keeps; without it, all.
    pub vocab_size: Option<usize>,
}

impl RankOptions {
    /// All ranks, by this layout alone.
    pub const fn new(layout: MegatronLayout) -> Self {
        Self { layout, ranks: None, n_heads: None, vocab_size: None }
    }
}

/// One thing that is wrong with tensor-parallel ranks.
#[derive(Debug, thiserror::Error)]
pub enum RankProblem {
    /// The file that names the subfolder of the newest checkpoint says something else.
    #[error("{file} should name a folder beside it, and says `{found}`")]
    Tracker {
        /// Its name.
        file: &'static str,
        /// What it says.
        found: String,
    },
    /// Ranks in several subfolders, and nothing that says which is meant.
    #[error("there are ranks in each of {}: open one of them", folders.join(", "))]
    SeveralFolders {
        /// The subfolders.
        folders: Vec<String>,
    },
    /// Layers are spread over files as well.
    #[error("{found} is a pipeline-parallel rank, which is not merged")]
    PipelineParallel {
        /// The name.
        found: String,
    },
    /// Experts are spread over files as well.
    #[error("{found} has experts of its own, which only a system with experts merges")]
    Workers {
        /// The name.
        found: String,
    },
    /// The same rank in two files.
    #[error("rank {rank} is there twice, as {}", files.join(" and "))]
    Twice {
        /// The rank.
        rank: usize,
        /// The files.
        files: Vec<String>,
    },
    /// Several ranks, without a layout.
    #[error("{ranks} ranks hold parts of each tensor, and nothing was given that says how they are merged")]
    NoLayout {
        /// How many.
        ranks: usize,
    },
    /// A rank that is not there.
    #[error("rank {rank} of {ranks} is missing")]
    Missing {
        /// The rank, from 0.
        rank: usize,
        /// How many there should be.
        ranks: usize,
    },
    /// More ranks than there should be.
    #[error("rank {rank} is one too many, expected {ranks} ranks")]
    TooMany {
        /// The rank, from 0.
        rank: usize,
        /// How many there should be.
        ranks: usize,
    },
    /// A file that says it belongs to another number of ranks.
    #[error("rank {rank} was written as one of {found} ranks, expected {expected}")]
    WorldSize {
        /// The rank.
        rank: usize,
        /// What the caller or rank 0 said.
        expected: usize,
        /// What it says.
        found: i64,
    },
    /// A rank that cannot be read.
    #[error("{0}")]
    Broken(Box<Error>),
    /// A pattern of the layout that cannot be followed.
    #[error("the layout's pattern `{pattern}`: {reason}")]
    Pattern {
        /// The pattern.
        pattern: &'static str,
        /// What is wrong with it.
        reason: RuleError,
    },
    /// A tensor about which the layout says nothing.
    #[error("`{key}`: the layout does not say how it is merged")]
    NoRule {
        /// The tensor.
        key: String,
    },
    /// A tensor that some ranks lack.
    #[error("`{key}` is not in rank {rank}")]
    MissingKey {
        /// The tensor.
        key: String,
        /// The rank.
        rank: usize,
    },
    /// A tensor that is not the same kind of thing in all ranks.
    #[error("`{key}` is {found} in rank {rank}, expected {expected} as in rank 0")]
    Unlike {
        /// The tensor.
        key: String,
        /// The rank.
        rank: usize,
        /// The dtype and shape in rank 0.
        expected: String,
        /// The dtype and shape here.
        found: String,
    },
    /// A tensor that cannot be merged as the layout says.
    #[error("`{key}` of shape {shape:?} in each rank cannot be merged as {merge:?}: {reason}")]
    Shape {
        /// The tensor.
        key: String,
        /// Its shape in each rank.
        shape: Vec<usize>,
        /// What the layout says.
        merge: Merge,
        /// Why not.
        reason: &'static str,
    },
    /// A table with fewer rows than the vocabulary has.
    #[error("`{key}` has {found} rows in all ranks together, expected at least the vocabulary's {expected}")]
    Vocabulary {
        /// The tensor.
        key: String,
        /// The size of the vocabulary.
        expected: usize,
        /// The rows.
        found: usize,
    },
    /// A tensor that should be the same in all ranks, and is not.
    #[error("`{key}` should be the same in all ranks, and differs between rank 0 and rank {rank}")]
    Differs {
        /// The tensor.
        key: String,
        /// The first rank that differs.
        rank: usize,
    },
}

/// The merged tensors of all ranks.
#[derive(Debug)]
pub struct Ranks {
    contents: Contents,
    ranks: Vec<RowScaled<TorchFile>>,
    /// How each entry is merged.
    merges: Vec<Merge>,
    n_heads: Option<usize>,
}

impl Ranks {
    /// Opens the ranks in a folder, in the subfolder that its `latest` (DeepSpeed) or
    /// `latest_checkpointed_iteration.txt` (Megatron-LM) names, or in the only one with ranks, at most two folders deep.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NoWeights`] for a folder without ranks; [`Error::Ranks`] with all that is wrong.
    pub fn open(folder: &Path, options: &RankOptions) -> Result<Self, Error> {
        match find(folder, DEPTH)? {
            Some((path, files)) => Self::merge(path, files, options, None),
            None => Err(Error::NoWeights {
                folder: folder.to_owned(),
                looked_for: &["mp_rank_00_model_states.pt", "mp_rank_00/model_optim_rng.pt"],
            }),
        }
    }

    fn merge(
        path: PathBuf,
        files: Files,
        options: &RankOptions,
        scaled: Option<Bits>,
    ) -> Result<Self, Error> {
        let mut problems = Vec::new();
        let wrong = |problems| Error::Ranks { path: path.clone(), problems };
        let mut ranks = Vec::new();
        for (rank, file) in &files {
            match TorchFile::open(file) {
                Ok(file) => ranks.push((*rank, file)),
                Err(error) => problems.push(RankProblem::Broken(Box::new(error))),
            }
        }

        // how many there are: the caller knows best, then the files themselves
        let said = |file: &TorchFile| file.numbers().get("mp_world_size").copied();
        let claimed = ranks.iter().find_map(|(_, file)| usize::try_from(said(file)?).ok());
        let highest = files.last_key_value().map_or(0, |(rank, _)| rank + 1);
        // a file may claim any number: no more missing ranks are listed than three digits can name
        let expected = options.ranks.or(claimed).unwrap_or(highest);
        let missing = (0..expected.min(MOST_RANKS)).filter(|rank| !files.contains_key(rank));
        problems.extend(missing.map(|rank| RankProblem::Missing { rank, ranks: expected }));
        let extra = files.keys().filter(|&&rank| rank >= expected);
        problems.extend(extra.map(|&rank| RankProblem::TooMany { rank, ranks: expected }));
        for (rank, file) in &ranks {
            if let Some(found) = said(file).filter(|&found| usize::try_from(found) != Ok(expected)) {
                problems.push(RankProblem::WorldSize { rank: *rank, expected, found });
            }
        }
        let mut patterns = Vec::new();
        for &(pattern, merge) in options.layout.merges {
            match Pattern::new(pattern) {
                Ok(read) => patterns.push((read, merge)),
                Err(reason) => problems.push(RankProblem::Pattern { pattern, reason }),
            }
        }
        if !problems.is_empty() {
            return Err(wrong(problems));
        }

        let ranks: Vec<RowScaled<TorchFile>> =
            ranks.into_iter().map(|(_, file)| RowScaled::new(file, scaled)).collect::<Result<_, _>>()?;
        let merger = Merger { options, patterns, ranks: ranks.len() };
        let tables: Vec<HashMap<&str, &Entry>> = ranks
            .iter()
            .map(|rank| rank.entries().iter().map(|entry| (entry.name.as_str(), entry)).collect())
            .collect();
        let mut known = BTreeSet::new();
        let (mut entries, mut merges) = (Vec::new(), Vec::new());
        for entry in ranks.iter().flat_map(|rank| rank.entries()) {
            if !known.insert(entry.name.as_str()) {
                continue;
            }
            let before = problems.len();
            for (rank, table) in tables.iter().enumerate() {
                let key = || entry.name.clone();
                match table.get(entry.name.as_str()) {
                    None => problems.push(RankProblem::MissingKey { key: key(), rank }),
                    Some(other) if (&other.shape, other.dtype) != (&entry.shape, entry.dtype) => {
                        let say = |entry: &Entry| format!("{} {:?}", entry.dtype, entry.shape);
                        let (expected, found) = (say(entry), say(other));
                        problems.push(RankProblem::Unlike { key: key(), rank, expected, found });
                    }
                    Some(_) => {}
                }
            }
            if problems.len() > before {
                continue;
            }
            match merger.whole(entry) {
                Ok((whole, merge)) => {
                    entries.push(whole);
                    merges.push(merge);
                }
                Err(problem) => problems.push(problem),
            }
        }
        if !problems.is_empty() {
            return Err(wrong(problems));
        }
        Ok(Self { contents: Contents::new(path, entries), ranks, merges, n_heads: options.n_heads })
    }
}

/// Ranks are written with two or three digits.
const MOST_RANKS: usize = 1000;

struct Merger<'a> {
    options: &'a RankOptions,
    patterns: Vec<(Pattern, Merge)>,
    ranks: usize,
}

impl Merger<'_> {
    /// The merged tensor of which each rank has a part like `part`.
    fn whole(&self, part: &Entry) -> Result<(Entry, Merge), RankProblem> {
        let key = || part.name.clone();
        let matching = self.patterns.iter().find(|(pattern, _)| pattern.indices_of(&part.name).is_some());
        let &(_, merge) = matching.ok_or_else(|| RankProblem::NoRule { key: key() })?;
        let refuse = |reason| RankProblem::Shape { key: key(), shape: part.shape.clone(), merge, reason };
        let times = |size: usize| {
            size.checked_mul(self.ranks).ok_or_else(|| refuse("it has more values than can be counted"))
        };
        let mut shape = part.shape.clone();
        match (merge, shape.as_mut_slice()) {
            (Merge::Replicated, _) => {}
            (Merge::Row, [_, columns, ..]) => *columns = times(*columns)?,
            (Merge::Row, _) => return Err(refuse("it has no second dimension")),
            (_, []) => return Err(refuse("it has no dimension")),
            (Merge::Column, [rows, ..]) => *rows = times(*rows)?,
            (Merge::Fused(parts), [rows, ..]) => {
                if parts == 0 || !rows.is_multiple_of(parts) {
                    return Err(refuse("its rows are not so many equal parts"));
                }
                *rows = times(*rows)?;
            }
            (Merge::PerHead, [rows, ..]) => {
                let Some(n_heads) = self.options.n_heads else {
                    return Err(refuse("the number of heads was not given"));
                };
                let heads = n_heads / self.ranks;
                if heads == 0 || !n_heads.is_multiple_of(self.ranks) || !rows.is_multiple_of(3 * heads) {
                    return Err(refuse("its rows are not q, k and v for each of the rank's heads"));
                }
                *rows = times(*rows)?;
            }
            (Merge::Vocabulary, [rows, ..]) => {
                *rows = times(*rows)?;
                if let Some(expected) = self.options.vocab_size {
                    if *rows < expected {
                        return Err(RankProblem::Vocabulary { key: key(), expected, found: *rows });
                    }
                    *rows = expected;
                }
            }
        }
        if part.dtype.bytes_of(&shape).is_none() {
            return Err(refuse("it has more values than can be counted"));
        }
        Ok((Entry { name: key(), shape, dtype: part.dtype }, merge))
    }
}

impl Checkpoint for Ranks {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = self.contents.position(name)?;
        let (entry, merge) = (&self.contents.entries[i], self.merges[i]);
        let mut parts: Vec<Cow<[u8]>> =
            self.ranks.iter().map(|rank| rank.bytes(name)).collect::<Result<_, _>>()?;
        if merge == Merge::Replicated {
            if let Some(rank) = parts.iter().position(|part| part != &parts[0]) {
                let problems = vec![RankProblem::Differs { key: name.to_owned(), rank }];
                return Err(Error::Ranks { path: self.contents.path.clone(), problems });
            }
            return Ok(parts.swap_remove(0));
        }
        let length = entry.dtype.bytes_of(&entry.shape).unwrap_or(0);
        if length == 0 {
            return Ok(Cow::Borrowed(&[]));
        }
        let rows = entry.shape.first().copied().unwrap_or(1);
        let mut whole = Vec::with_capacity(length);
        for (rank, run) in runs(merge, parts.len(), parts[0].len(), rows, self.n_heads) {
            let run = &parts[rank][run];
            whole.extend_from_slice(&run[..run.len().min(length - whole.len())]);
        }
        Ok(Cow::Owned(whole))
    }

    fn release(&self, name: &str) {
        self.ranks.iter().for_each(|rank| rank.release(name));
    }
}

/// Which bytes of which rank follow each other in the merged tensor. `length` is that of one rank's part, `rows` those
/// of the whole, which only matter where every rank has all of them.
fn runs(
    merge: Merge,
    ranks: usize,
    length: usize,
    rows: usize,
    n_heads: Option<usize>,
) -> impl Iterator<Item = (usize, Range<usize>)> {
    // each rank's part is `outer` times `inner` equal runs; the merged tensor has them by outer, rank, inner
    let (outer, inner, is_per_head) = match merge {
        Merge::Row => (rows, 1, false),
        Merge::Fused(parts) => (parts, 1, false),
        Merge::PerHead => (3, n_heads.unwrap_or(ranks) / ranks, true),
        Merge::Replicated | Merge::Column | Merge::Vocabulary => (1, 1, false),
    };
    let run = length / (outer * inner).max(1);
    (0..outer).flat_map(move |part| {
        (0..ranks).flat_map(move |rank| {
            (0..inner).map(move |head| {
                let place = if is_per_head { head * outer + part } else { part * inner + head };
                (rank, place * run..(place + 1) * run)
            })
        })
    })
}

/// The ranks of a folder in order.
pub(crate) type Files = BTreeMap<usize, PathBuf>;

/// The ranks of a folder as a checkpoint; `None` when there are none.
pub(super) fn open(
    folder: &Path,
    options: Option<&RankOptions>,
    scaled: Option<Bits>,
) -> Result<Option<Box<dyn Checkpoint>>, Error> {
    let Some((path, files)) = find(folder, DEPTH)? else { return Ok(None) };
    if let Some(worker) = workers_in(&path)?.into_keys().next() {
        let problems = vec![RankProblem::Workers { found: worker_folder(worker) }];
        return Err(Error::Ranks { path, problems });
    }
    match (options, files.first_key_value()) {
        (Some(options), _) => Ok(Some(Box::new(Ranks::merge(path, files, options, scaled)?))),
        (None, Some((0, file))) if files.len() == 1 => {
            let file = TorchFile::open(file)?;
            match file.numbers().get("mp_world_size") {
                None | Some(1) => Ok(Some(Box::new(file))),
                Some(&found) => {
                    let problems = vec![RankProblem::WorldSize { rank: 0, expected: 1, found }];
                    Err(Error::Ranks { path, problems })
                }
            }
        }
        (None, _) => Err(Error::Ranks { problems: vec![RankProblem::NoLayout { ranks: files.len() }], path }),
    }
}

/// The files that name the subfolder of the newest checkpoint.
const TRACKERS: [&str; 2] = ["latest", "latest_checkpointed_iteration.txt"];

/// How deep inside a folder the ranks may be: the authors' name of the model, and the iteration.
const DEPTH: usize = 2;

/// Where the ranks are: in the folder, in the subfolder that a tracker names, or in its only subfolder with ranks.
fn find(folder: &Path, depth: usize) -> Result<Option<(PathBuf, Files)>, Error> {
    let here = ranks_in(folder)?;
    if !here.is_empty() {
        return Ok(Some((folder.to_owned(), here)));
    }
    if depth == 0 {
        return Ok(None);
    }
    let wrong = |problem| Error::Ranks { path: folder.to_owned(), problems: vec![problem] };
    for file in TRACKERS {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let found = read_start(&path)?;
        let name = found.trim();
        // Megatron-LM names the iteration, and the folder `iter_` and seven digits
        let iteration = name.parse::<u32>().map(|iteration| format!("iter_{iteration:07}"));
        let names = std::iter::once(name.to_owned()).chain(iteration);
        for name in names.filter(|name| is_file_name(name)) {
            let folder = folder.join(name);
            let ranks = if folder.is_dir() { ranks_in(&folder)? } else { Files::new() };
            if !ranks.is_empty() {
                return Ok(Some((folder, ranks)));
            }
        }
        return Err(wrong(RankProblem::Tracker { file, found: name.to_owned() }));
    }
    let mut found = Vec::new();
    for name in file_names(folder)? {
        let path = folder.join(&name);
        if path.is_dir()
            && let Some(ranks) = find(&path, depth - 1)?
        {
            found.push((name, ranks));
        }
    }
    match found.len() {
        0 | 1 => Ok(found.pop().map(|(_, ranks)| ranks)),
        _ => {
            let folders = found.into_iter().map(|(name, _)| name).collect();
            Err(wrong(RankProblem::SeveralFolders { folders }))
        }
    }
}

/// The first bytes of a text file that should hold one name.
fn read_start(path: &Path) -> Result<String, Error> {
    use std::io::Read;
    let io = |source| Error::Io { path: path.to_owned(), source };
    let mut start = Vec::new();
    std::fs::File::open(path).map_err(io)?.take(256).read_to_end(&mut start).map_err(io)?;
    Ok(String::from_utf8_lossy(&start).into_owned())
}

/// The ranks that lie in a folder itself.
fn ranks_in(folder: &Path) -> Result<Files, Error> {
    let wrong = |problem| Error::Ranks { path: folder.to_owned(), problems: vec![problem] };
    let mut files = Files::new();
    for name in file_names(folder)? {
        let of_meta = name.strip_prefix("consolidated.").and_then(|rest| rest.strip_suffix(".pth"));
        let Some(rest) = of_meta.or(name.strip_prefix("mp_rank_")) else { continue };
        let (number, path) = match of_meta.or(rest.strip_suffix("_model_states.pt")) {
            Some(number) => (number, folder.join(&name)),
            None => match inside(&folder.join(&name)) {
                Some(path) => (rest, path),
                None => continue,
            },
        };
        let is_number = |text: &str| matches!(text.len(), 2..=3) && text.bytes().all(|b| b.is_ascii_digit());
        match number.parse::<usize>() {
            Ok(rank) if is_number(number) => {
                if let Some(other) = files.insert(rank, path) {
                    let files = vec![other.display().to_string(), name];
                    return Err(wrong(RankProblem::Twice { rank, files }));
                }
            }
            _ if number.split('_').count() > 1 && number.split('_').all(is_number) => {
                return Err(wrong(RankProblem::PipelineParallel { found: name }));
            }
            _ => {}
        }
    }
    Ok(files)
}

/// The file of a rank in its folder.
fn inside(folder: &Path) -> Option<PathBuf> {
    let names = ["model_optim_rng.pt", "model_rng.pt", "model_optim_rng.safetensors"];
    names.map(|file| folder.join(file)).into_iter().find(|path| path.is_file())
}

/// The folder of a worker of FastMoE's, from 0, beside those of the others.
pub fn worker_folder(rank: usize) -> String {
    match rank {
        0 => "mp_rank_00".to_owned(),
        rank => format!("mp_rank_00_dp_rank_{rank:04}"),
    }
}

/// The workers of FastMoE's in a folder, but for the first.
fn workers_in(folder: &Path) -> Result<Files, Error> {
    let file = |name: &String| {
        let rank = name.strip_prefix("mp_rank_00_dp_rank_")?.parse().ok()?;
        Some((rank, inside(&folder.join(name)).filter(|_| *name == worker_folder(rank))?))
    };
    Ok(file_names(folder)?.iter().filter_map(file).collect())
}

/// The files of FastMoE's workers, and the folder that they are in; none where there is but one.
///
/// # Errors
/// [`Error::Io`]; [`Error::Ranks`] if the workers are tensor-parallel too, or the folder cannot be told.
pub(crate) fn worker_files(folder: &Path) -> Result<Option<(PathBuf, Files)>, Error> {
    let Some((path, ranks)) = find(folder, DEPTH)? else { return Ok(None) };
    let mut workers = workers_in(&path)?;
    match (workers.len(), ranks.len()) {
        (0, _) => Ok(None),
        (_, 1) => {
            workers.extend(ranks);
            Ok(Some((path, workers)))
        }
        (_, ranks) => Err(Error::Ranks { path, problems: vec![RankProblem::NoLayout { ranks }] }),
    }
}

#[cfg(test)]
mod tests;
