//! The experts of a checkpoint: one by one or all in one tensor, with the numbers of the whole model or, as
//! [FastMoE](https://github.com/laekov/fastmoe) writes them, those within each of its workers.
//!
//! Which tensors are experts' a key map says: those that it stacks ([`Rule::Stack`], [`Rule::StackTranspose`]).
//!
//! A worker's file has its own experts alone, the first one's all the rest besides; the folders are those of Megatron-LM,
//! `mp_rank_00` and `mp_rank_00_dp_rank_0001`. Expert `i` of worker `r` is the model's `r * n + i`, where each has `n`.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use crate::error::{Error, PartProblem};
use crate::format::megatron::worker_files;
use crate::format::{Checkpoint, Entry, Origin, Rearranged, open_file};
use crate::rule::{KeyMap, Line, Ones, Rule};

pub use crate::format::megatron::worker_folder;

/// What a worker's file in its folder is called, without what ends its name.
pub const WORKER_STEM: &str = "model_optim_rng";

/// A file may claim any number of them, and each gets a name.
const MOST_EXPERTS: usize = 1 << 16;

/// What a tensor has of experts.
enum Form<'a> {
    /// Nothing.
    Shared,
    /// One of a parameter's.
    One { line: &'a Line, parameter: String, place: usize },
    /// All of a parameter's, which `line` names one by one.
    All { line: &'a Line, ones: Ones, parameter: String, count: usize },
}

impl<'a> Form<'a> {
    fn of(entry: &Entry, lines: &'a [Line]) -> Self {
        let one = |line: &'a Line| {
            let (parameter, place) = line.place_of(&entry.name)?;
            Some(Form::One { line, parameter, place })
        };
        lines.iter().find_map(one).or_else(|| Self::all(entry, lines)).unwrap_or(Form::Shared)
    }

    fn all(entry: &Entry, lines: &'a [Line]) -> Option<Self> {
        let fused = lines.iter().find(|line| line.matches(&entry.name))?;
        let (parameter, &count) = (fused.paths_of(&entry.name)?.pop()?, entry.shape.first()?);
        let ones = |line: &Line| match (fused.rule, line.rule) {
            (Rule::Rename(..), Rule::Stack(_, _, ones)) => Some(ones),
            (Rule::Transpose(..), Rule::StackTranspose(_, _, ones)) => Some(ones),
            _ => None,
        };
        let mut named = lines.iter().filter(|line| line.leads_to(&parameter));
        let (line, ones) = named.find_map(|line| Some((line, ones(line)?)))?;
        (count <= MOST_EXPERTS).then_some(Form::All { line, ones, parameter, count })
    }
}

/// A tensor of an expert or of several, with the place of its values.
type Tensor = (Entry, Origin);

/// The names of a parameter's experts.
fn names(line: &Line, parameter: &str, places: Range<usize>) -> Vec<String> {
    places.filter_map(|place| line.key_at(parameter, place)).collect()
}

/// Each expert of a tensor that has several, under these names.
fn cut(entry: &Entry, source: usize, ones: Ones, names: Vec<String>) -> impl Iterator<Item = Tensor> {
    let length = entry.bytes() / names.len().max(1);
    names.into_iter().enumerate().map(move |(at, name)| {
        let bytes = Some(at * length..(at + 1) * length);
        let origin = Origin::Stored { source, key: entry.name.clone(), bytes };
        (Entry { name, shape: ones.stored(&entry.shape[1..]), dtype: entry.dtype }, origin)
    })
}

/// The checkpoint with every expert as a tensor of its own, however it has them.
///
/// # Errors
/// [`Error::Rule`]; [`Error::Duplicate`] for an expert that is there both ways.
pub fn one_by_one<'a>(checkpoint: &'a dyn Checkpoint, keys: &KeyMap) -> Result<Rearranged<'a>, Error> {
    let lines = keys.lines()?;
    let mut tensors = Vec::new();
    for entry in checkpoint.entries() {
        match Form::of(entry, &lines) {
            Form::All { line, ones, parameter, count } => {
                tensors.extend(cut(entry, 0, ones, names(line, &parameter, 0..count)));
            }
            Form::Shared | Form::One { .. } => tensors.push((entry.clone(), Origin::whole(&entry.name))),
        }
    }
    Rearranged::new(checkpoint.path(), vec![Box::new(checkpoint)], tensors)
}

/// How the experts of a checkpoint are spread over ranks.
struct Spread<'a> {
    /// Of every tensor.
    forms: Vec<Form<'a>>,
    /// How many experts of each parameter a rank has.
    own: HashMap<String, usize>,
}

impl<'a> Spread<'a> {
    fn new(checkpoint: &dyn Checkpoint, lines: &'a [Line], ranks: usize) -> Result<Self, Error> {
        let forms: Vec<Form> = checkpoint.entries().iter().map(|entry| Form::of(entry, lines)).collect();
        let mut experts: BTreeMap<&str, usize> = BTreeMap::new();
        for form in &forms {
            match form {
                Form::Shared => {}
                Form::One { parameter, .. } => *experts.entry(parameter).or_default() += 1,
                Form::All { parameter, count, .. } => *experts.entry(parameter).or_default() += count,
            }
        }
        let mut problems = Vec::new();
        if experts.is_empty() {
            problems.push(PartProblem::NoExperts);
        }
        for (parameter, &experts) in &experts {
            if ranks == 0 || !experts.is_multiple_of(ranks) {
                let parameter = (*parameter).to_owned();
                problems.push(PartProblem::Uneven { parameter, experts, ranks });
            }
        }
        for form in &forms {
            if let Form::One { parameter, place, .. } = form
                && *place >= experts[parameter.as_str()]
            {
                let (parameter, expert) = (parameter.clone(), *place);
                problems.push(PartProblem::Gap { experts: experts[parameter.as_str()], parameter, expert });
            }
        }
        if !problems.is_empty() {
            return Err(Error::Parts { path: checkpoint.path().to_owned(), problems });
        }
        let own = experts.into_iter().map(|(parameter, experts)| (parameter.to_owned(), experts / ranks));
        let own = own.collect();
        Ok(Self { forms, own })
    }
}

/// The rank of each tensor when so many ranks have an equal share of the experts each, and the first one all the rest. No
/// tensor has several experts.
///
/// # Errors
/// [`Error::Parts`] if there are no experts, or they cannot be spread evenly; [`Error::Rule`].
pub(crate) fn homes(checkpoint: &dyn Checkpoint, keys: &KeyMap, ranks: usize) -> Result<Vec<usize>, Error> {
    let lines = keys.lines()?;
    let Spread { forms, own } = Spread::new(checkpoint, &lines, ranks)?;
    let home = |form: &Form| match form {
        Form::One { parameter, place, .. } => place / own[parameter],
        Form::Shared | Form::All { .. } => 0,
    };
    Ok(forms.iter().map(home).collect())
}

/// What each of so many workers has of a checkpoint, whose experts stay one by one or together as they are.
///
/// # Errors
/// [`Error::Parts`] if there are no experts, or they cannot be spread evenly; [`Error::Rule`].
pub fn workers<'a>(
    checkpoint: &'a dyn Checkpoint,
    keys: &KeyMap,
    ranks: usize,
) -> Result<Vec<Rearranged<'a>>, Error> {
    let lines = keys.lines()?;
    let Spread { forms, own } = Spread::new(checkpoint, &lines, ranks)?;
    let mut parts: Vec<Vec<Tensor>> = (0..ranks).map(|_| Vec::new()).collect();
    for (entry, form) in checkpoint.entries().iter().zip(&forms) {
        match form {
            Form::Shared => parts[0].push((entry.clone(), Origin::whole(&entry.name))),
            Form::One { line, parameter, place } => {
                let own = own[parameter];
                let name = line.key_at(parameter, place % own).unwrap_or_default();
                let entry_of_worker = Entry { name, ..entry.clone() };
                parts[place / own].push((entry_of_worker, Origin::whole(&entry.name)));
            }
            Form::All { parameter, .. } => {
                let (own, length) = (own[parameter], entry.bytes() / ranks);
                for (rank, part) in parts.iter_mut().enumerate() {
                    let mut entry_of_worker = entry.clone();
                    entry_of_worker.shape[0] = own;
                    let bytes = Some(rank * length..(rank + 1) * length);
                    let origin = Origin::Stored { source: 0, key: entry.name.clone(), bytes };
                    part.push((entry_of_worker, origin));
                }
            }
        }
    }
    let part = |tensors| Rearranged::new(checkpoint.path(), vec![Box::new(checkpoint)], tensors);
    parts.into_iter().map(part).collect()
}

/// The files of workers in a folder, found as [`megatron`](crate::format::megatron)'s are, as one checkpoint with every
/// expert as a tensor of its own; none where the folder has no such files.
///
/// # Errors
/// [`Error::Parts`] with all that does not fit between the workers; [`Error::Ranks`] for such that are tensor-parallel
/// too; [`Error::Rule`], [`Error::Io`].
pub fn open_workers(folder: &Path, keys: &KeyMap) -> Result<Option<Box<dyn Checkpoint>>, Error> {
    let Some((path, files)) = worker_files(folder)? else { return Ok(None) };
    let lines = keys.lines()?;
    let ranks = files.last_key_value().map_or(0, |(rank, _)| rank + 1);
    let wrong = |problems| Err(Error::Parts { path: path.clone(), problems });
    let (mut sources, mut problems) = (Vec::new(), Vec::new());
    for rank in 0..ranks {
        match files.get(&rank).map(|file| open_file(file)) {
            Some(Ok(source)) => sources.push(source),
            Some(Err(error)) => problems.push(PartProblem::Broken(Box::new(error))),
            None => problems.push(PartProblem::Missing { rank, file: worker_folder(rank) }),
        }
    }
    if !problems.is_empty() {
        return wrong(problems);
    }

    // the first worker tells how many experts each has
    let own = Spread::new(sources[0].as_ref(), &lines, 1)?.own;
    let mut parts: Vec<Vec<Tensor>> = Vec::with_capacity(ranks);
    for (rank, source) in sources.iter().enumerate() {
        let first = |parameter: &str| rank.saturating_mul(own.get(parameter).copied().unwrap_or(0));
        let mut part = Vec::new();
        for entry in source.entries() {
            let origin = || Origin::Stored { source: rank, key: entry.name.clone(), bytes: None };
            match Form::of(entry, &lines) {
                Form::Shared => part.push((entry.clone(), origin())),
                Form::One { line, parameter, place } => {
                    let place = first(&parameter).saturating_add(place);
                    let name = line.key_at(&parameter, place).unwrap_or_default();
                    part.push((Entry { name, ..entry.clone() }, origin()));
                }
                Form::All { line, ones, parameter, count } => {
                    let first = first(&parameter);
                    part.extend(cut(entry, rank, ones, names(line, &parameter, first..first + count)));
                }
            }
        }
        parts.push(part);
    }
    let entries: Vec<Vec<&Entry>> =
        parts.iter().map(|part| part.iter().map(|(entry, _)| entry).collect()).collect();
    let problems = disagreements(&entries, &lines);
    if !problems.is_empty() {
        return wrong(problems);
    }
    Ok(Some(Box::new(Rearranged::new(path, sources, parts.into_iter().flatten().collect())?)))
}

/// What the parts of all ranks, which have no tensors of several experts, do not agree about.
pub(crate) fn disagreements(parts: &[Vec<&Entry>], lines: &[Line]) -> Vec<PartProblem> {
    let mut problems = Vec::new();
    let mut owners: HashMap<&str, usize> = HashMap::new();
    // of every stacked parameter, the experts of each rank and one of their tensors
    type OfRank<'a> = (Vec<usize>, &'a Entry);
    let mut stacks: BTreeMap<String, BTreeMap<usize, OfRank>> = BTreeMap::new();
    for (rank, part) in parts.iter().enumerate() {
        for &entry in part {
            if let Some(first) = owners.insert(&entry.name, rank) {
                problems.push(PartProblem::Twice { key: entry.name.clone(), first, second: rank });
            }
            if let Some((path, place)) = lines.iter().find_map(|line| line.place_of(&entry.name)) {
                let ranks = stacks.entry(path).or_default();
                ranks.entry(rank).or_insert((Vec::new(), entry)).0.push(place);
            }
        }
    }
    for (parameter, ranks) in stacks {
        let own = ranks.get(&0).map_or(0, |(places, _)| places.len());
        let first = ranks.values().next().map(|(_, entry)| *entry);
        for rank in 0..parts.len() {
            let expected = rank * own..(rank + 1) * own;
            let mut found = ranks.get(&rank).map_or(Vec::new(), |(found, _)| found.clone());
            found.sort_unstable();
            if !found.iter().copied().eq(expected.clone()) {
                let parameter = parameter.clone();
                problems.push(PartProblem::Experts { parameter, rank, expected, found });
            }
            if let (Some(first), Some((_, entry))) = (first, ranks.get(&rank))
                && (first.dtype, &first.shape) != (entry.dtype, &entry.shape)
            {
                let say = |entry: &Entry| format!("{} {:?}", entry.dtype, entry.shape);
                let (expected, found) = (say(first), say(entry));
                problems.push(PartProblem::Unlike { key: entry.name.clone(), rank, expected, found });
            }
        }
    }
    problems
}

#[cfg(test)]
mod tests;
