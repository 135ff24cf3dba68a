//! Which bytes of a checkpoint fill which parameter of a module, worked out from names, shapes and dtypes alone.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::Range;

use crate::error::{Error, Problem, is_shown, nearest};
use crate::format::{Checkpoint, Dtype, Entry};
use crate::load::{Kind, LoadOptions, Parameter};
use crate::rule::{KeyMap, Line, Pattern, Rule, choose_prefix, strip};
use crate::share::Share;

/// Where the values of one parameter come from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Source {
    /// Stacked one after the other.
    pub parts: Vec<Part>,
    /// Whether the last two dimensions of the one part have to be swapped.
    pub transpose: Option<Swap>,
}

/// The dimensions of a part that are swapped: `[.., rows, columns]` as stored, of which some columns are taken.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Swap {
    pub rows: usize,
    pub columns: usize,
    pub taken: Range<usize>,
}

impl Source {
    /// How many values of a part it takes.
    pub fn taken(&self, part: &Part) -> usize {
        match &self.transpose {
            Some(swap) if swap.taken.len() < swap.columns => swap.rows * swap.taken.len(),
            _ => part.elements.len(),
        }
    }

    /// How many values it has.
    pub fn elements(&self) -> usize {
        self.parts.iter().map(|part| self.taken(part)).sum()
    }
}

impl Swap {
    /// The bytes of the taken columns, row by row, of a matrix of values of this size.
    pub fn take(&self, matrix: &[u8], size: usize) -> Vec<u8> {
        let mut taken = Vec::with_capacity(self.rows * self.taken.len() * size);
        for row in matrix.chunks_exact(self.columns * size) {
            taken.extend_from_slice(&row[self.taken.start * size..self.taken.end * size]);
        }
        taken
    }

    /// Where in the matrix the value at `place` among the taken ones stands.
    pub fn place(&self, place: usize) -> usize {
        let (row, column) = (place / self.taken.len(), place % self.taken.len());
        row * self.columns + self.taken.start + column
    }
}

/// A run of values of one stored tensor.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Part {
    pub key: String,
    pub dtype: Dtype,
    pub elements: Range<usize>,
}

/// The sources by parameter path, and everything that does not fit.
#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub sources: HashMap<String, Source>,
    pub problems: Vec<Problem>,
}

impl Plan {
    /// Pairs the parameters with the checkpoint. Parameters whose path has the form of one that may be missing may stay
    /// without a source.
    pub fn new(
        parameters: &[Parameter],
        checkpoint: &dyn Checkpoint,
        keys: &KeyMap,
        options: &LoadOptions,
    ) -> Result<Self, Error> {
        let lines = keys.lines()?;
        let may_miss = patterns(options.allow_missing)?;
        let entries = checkpoint.entries();
        let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        let prefix = choose_prefix(&lines, keys.prefixes, &names);
        let planner = Planner {
            prefix,
            names,
            lines: &lines,
            share: options.share,
            shapes: parameters
                .iter()
                .map(|parameter| (parameter.path.as_str(), &parameter.shape[..]))
                .collect(),
        };

        let mut plan = Plan::default();
        let stored = planner.stored(entries, &mut plan.problems);
        let mut used: HashSet<&str> = HashSet::new();
        let mut wanted: BTreeSet<String> = BTreeSet::new();
        for parameter in parameters {
            let optional = may_miss.iter().any(|pattern| pattern.indices_of(&parameter.path).is_some());
            planner.fill(parameter, optional, &stored, &mut used, &mut wanted, &mut plan);
        }
        planner.unexpected(entries, &stored, &used, &wanted, &mut plan.problems);
        Ok(plan)
    }
}

fn patterns(allow_missing: &[&'static str]) -> Result<Vec<Pattern>, Error> {
    let read = |&pattern: &&'static str| {
        Pattern::new(pattern).map_err(|reason| Error::Rule { rule: Rule::Ignore(pattern), reason })
    };
    allow_missing.iter().map(read).collect()
}

struct Planner<'a> {
    prefix: &'static str,
    /// The checkpoint's keys.
    names: Vec<&'a str>,
    lines: &'a [Line],
    /// The places that the module has of stacks.
    share: Share,
    /// The module's parameters.
    shapes: HashMap<&'a str, &'a [usize]>,
}

impl<'a> Planner<'a> {
    /// The entries that a rule wants for something, by their name without prefix.
    fn stored<'b>(
        &self,
        entries: &'b [Entry],
        problems: &mut Vec<Problem>,
    ) -> HashMap<&'b str, Vec<&'b Entry>> {
        let mut stored: HashMap<&str, Vec<&Entry>> = HashMap::new();
        for entry in entries {
            let name = strip(&entry.name, self.prefix);
            match &*self.matching(name) {
                [line] if !line.is_ignored() => stored.entry(name).or_default().push(entry),
                [] | [_] => {}
                lines => problems.push(Problem::Ambiguous {
                    key: entry.name.clone(),
                    rules: lines.iter().map(|line| line.rule).collect(),
                }),
            }
        }
        stored
    }

    fn matching(&self, name: &str) -> Vec<&'a Line> {
        self.lines.iter().filter(|line| line.matches(name)).collect()
    }

    /// Finds the source of one parameter, or what is wrong with it.
    fn fill<'b>(
        &self,
        parameter: &Parameter,
        optional: bool,
        stored: &HashMap<&'b str, Vec<&'b Entry>>,
        used: &mut HashSet<&'b str>,
        wanted: &mut BTreeSet<String>,
        plan: &mut Plan,
    ) {
        let path = &parameter.path;
        // several rules may lead to one parameter (old and new names of a key): the checkpoint decides
        let candidates: Vec<(&Line, Vec<String>)> = self
            .lines
            .iter()
            .filter_map(|line| Some((line, line.keys_of(path, &parameter.shape, self.share)?)))
            .collect();
        wanted.extend(candidates.iter().flat_map(|(_, keys)| keys.clone()));
        let present = |keys: &[String]| keys.iter().filter(|key| stored.contains_key(key.as_str())).count();

        let offered: Vec<_> = candidates.iter().filter(|(_, keys)| present(keys) > 0).collect();
        let mut found = Vec::new(); // the entries of all keys that are there
        for (_, keys) in &offered {
            for (name, entries) in keys.iter().filter_map(|key| stored.get_key_value(key.as_str())) {
                used.insert(name);
                found.push(entries);
            }
        }
        if offered.len() > 1 || found.iter().any(|entries| entries.len() > 1) {
            let keys =
                found.iter().flat_map(|entries| entries.iter().map(|entry| entry.name.clone())).collect();
            plan.problems.push(Problem::Conflict { parameter: path.clone(), keys });
            return;
        }
        let Some((line, keys)) = offered.first().copied().or(candidates.first()) else {
            if !optional {
                plan.problems.push(Problem::Unmapped { parameter: path.clone() });
            }
            return;
        };
        if found.is_empty() && optional {
            return;
        }
        if found.len() < keys.len() {
            for key in keys.iter().filter(|key| !stored.contains_key(key.as_str())) {
                let key = format!("{}{key}", self.prefix);
                let names = self.names.iter().copied().filter(|_| is_shown(plan.problems.len()));
                let nearest = nearest(&key, names);
                plan.problems.push(Problem::Missing { key, parameter: path.clone(), nearest });
            }
            return;
        }

        let entries: Vec<&Entry> = found.iter().map(|entries| entries[0]).collect();
        if let Some(problem) = entries.iter().find_map(|entry| wrong_kind(entry, parameter.kind)) {
            if !plan.problems.contains(&problem) {
                plan.problems.push(problem);
            }
            return;
        }
        match self.arrange(line.rule, line, keys, &entries, parameter) {
            Ok(source) => drop(plan.sources.insert(path.clone(), source)),
            // the parts of a split share one problem
            Err(problem) if plan.problems.contains(&problem) => {}
            Err(problem) => plan.problems.push(problem),
        }
    }

    /// Fits the shapes of the stored tensors to the parameter's as the rule says.
    fn arrange(
        &self,
        rule: Rule,
        line: &Line,
        keys: &[String],
        entries: &[&Entry],
        parameter: &Parameter,
    ) -> Result<Source, Problem> {
        let wanted = &parameter.shape;
        let first = entries[0];
        let mismatch = |entry: &Entry, expected: Vec<usize>| Problem::Shape {
            key: entry.name.clone(),
            expected,
            found: entry.shape.clone(),
        };
        let fit = |fits: bool, expected: &[usize]| {
            if fits { Ok(()) } else { Err(mismatch(first, expected.to_vec())) }
        };
        match rule {
            Rule::Split(..) | Rule::SplitTranspose(..) => {
                let paths = line.paths_of(&keys[0]).unwrap_or_default();
                let rows_of = |path: &String| {
                    self.shapes.get(path.as_str()).map(|shape| shape.first().copied().unwrap_or(0))
                };
                let mut rows = Vec::new();
                for path in &paths {
                    rows.push(rows_of(path).ok_or_else(|| Problem::Unexpected {
                        key: first.name.clone(),
                        parameter: Some(path.clone()),
                        nearest: nearest(path, self.shapes.keys().copied()),
                    })?);
                }
                let total = rows.iter().sum();
                let stacked: Vec<usize> =
                    std::iter::once(total).chain(wanted.iter().skip(1).copied()).collect();
                let before = paths.iter().take_while(|path| **path != parameter.path).count();
                let start = rows[..before].iter().sum::<usize>();
                let taken = start..start + rows[before];
                if let Rule::SplitTranspose(..) = rule {
                    let expected = swapped(&stacked);
                    fit(wanted.len() == 2 && first.shape == expected, &expected)?;
                    let swap = Swap { rows: expected[0], columns: expected[1], taken };
                    return Ok(Source { transpose: Some(swap), ..run(first, 0..elements(first)) });
                }
                fit(!wanted.is_empty() && first.shape == stacked, &stacked)?;
                let width = elements(first) / total.max(1);
                Ok(run(first, taken.start * width..taken.end * width))
            }
            Rule::Concat(..) => {
                for entry in entries {
                    let rows = entry.shape.first().copied().unwrap_or(0);
                    let expected: Vec<usize> =
                        std::iter::once(rows).chain(wanted.iter().skip(1).copied()).collect();
                    if wanted.is_empty() || entry.shape != expected {
                        return Err(mismatch(entry, expected));
                    }
                }
                let rows: usize = entries.iter().map(|entry| entry.shape[0]).sum();
                if rows != wanted[0] {
                    let key = entries.iter().map(|entry| entry.name.as_str()).collect::<Vec<_>>().join(" + ");
                    let found = std::iter::once(rows).chain(wanted.iter().skip(1).copied()).collect();
                    return Err(Problem::Shape { key, expected: wanted.clone(), found });
                }
                let parts = entries.iter().flat_map(|entry| run(entry, 0..elements(entry)).parts).collect();
                Ok(Source { parts, transpose: None })
            }
            Rule::Stack(_, _, ones) | Rule::StackTranspose(_, _, ones) => {
                let is_swapped = matches!(rule, Rule::StackTranspose(..));
                let one = wanted.get(1..).unwrap_or_default();
                let one = if is_swapped { swapped(one) } else { one.to_vec() };
                for entry in entries {
                    if squeeze(&entry.shape) != squeeze(&one) {
                        return Err(mismatch(entry, ones.stored(&one)));
                    }
                }
                let parts = entries.iter().flat_map(|entry| run(entry, 0..elements(entry)).parts).collect();
                let transpose = match one[..] {
                    [.., rows, columns] if is_swapped => Some(Swap { rows, columns, taken: 0..columns }),
                    _ => None,
                };
                Ok(Source { parts, transpose })
            }
            Rule::Transpose(..) => {
                let (whole, taken) = self.shared(parameter);
                let expected = swapped(&whole);
                fit(wanted.len() >= 2 && first.shape == expected, &expected)?;
                let [.., rows, columns] = first.shape[..] else { return Err(mismatch(first, expected)) };
                let swap = Swap { rows, columns, taken: 0..columns };
                Ok(Source { transpose: Some(swap), ..run(first, taken) })
            }
            Rule::Reshape(_, _, ones) => {
                fit(squeeze(&first.shape) == squeeze(wanted), &ones.stored(wanted))?;
                Ok(run(first, 0..elements(first)))
            }
            Rule::Rename(..) | Rule::Ignore(..) | Rule::Under(..) => {
                let (whole, taken) = self.shared(parameter);
                fit(first.shape == whole, &whole)?;
                Ok(run(first, taken))
            }
        }
    }

    /// The shape of a parameter in a file that has it as one tensor, and which of its values the share has: all, but of
    /// what another rule stacks.
    fn shared(&self, parameter: &Parameter) -> (Vec<usize>, Range<usize>) {
        let (mut whole, own) = (parameter.shape.clone(), parameter.shape.iter().product());
        if !self.lines.iter().any(|line| line.is_stack() && line.leads_to(&parameter.path)) {
            return (whole, 0..own);
        }
        if let Some(places) = whole.first_mut() {
            *places = places.saturating_mul(self.share.ranks());
        }
        (whole, self.share.places(own))
    }

    /// Whether a key is that of a place that other ranks have.
    fn is_of_others(&self, name: &str) -> bool {
        let place = |line: &Line| {
            let (path, place) = line.place_of(name)?;
            let own = *self.shapes.get(path.as_str())?.first()?;
            Some(place < own.saturating_mul(self.share.ranks()))
        };
        self.lines.iter().find_map(place) == Some(true)
    }

    /// The keys that no rule knows, and those that lead to parameters the module does not have.
    fn unexpected(
        &self,
        entries: &[Entry],
        stored: &HashMap<&str, Vec<&Entry>>,
        used: &HashSet<&str>,
        wanted: &BTreeSet<String>,
        problems: &mut Vec<Problem>,
    ) {
        for entry in entries {
            let name = strip(&entry.name, self.prefix);
            let key = entry.name.clone();
            let lines = self.matching(name);
            if lines.is_empty() {
                let wanted = wanted.iter().map(String::as_str).filter(|_| is_shown(problems.len()));
                let nearest = nearest(name, wanted);
                problems.push(Problem::Unexpected { key, parameter: None, nearest });
            } else if stored.contains_key(name) && !used.contains(name) && !self.is_of_others(name) {
                let parameter = lines.iter().find_map(|line| line.paths_of(name)?.into_iter().next());
                let paths = self.shapes.keys().copied().filter(|_| is_shown(problems.len()));
                let nearest = nearest(parameter.as_deref().unwrap_or_default(), paths);
                problems.push(Problem::Unexpected { key, parameter, nearest });
            }
        }
    }
}

/// The last two dimensions swapped.
pub(crate) fn swapped(shape: &[usize]) -> Vec<usize> {
    let mut shape = shape.to_vec();
    if let [.., rows, cols] = &mut shape[..] {
        std::mem::swap(rows, cols);
    }
    shape
}

/// The dimensions whose size is not 1.
fn squeeze(shape: &[usize]) -> Vec<usize> {
    shape.iter().copied().filter(|&size| size != 1).collect()
}

fn run(entry: &Entry, elements: Range<usize>) -> Source {
    let part = Part { key: entry.name.clone(), dtype: entry.dtype, elements };
    Source { parts: vec![part], transpose: None }
}

/// A checkpoint only has entries whose bytes can be counted.
fn elements(entry: &Entry) -> usize {
    entry.dtype.bytes_of(&entry.shape).unwrap_or(0) / entry.dtype.size()
}

fn wrong_kind(entry: &Entry, kind: Kind) -> Option<Problem> {
    let fits = match kind {
        Kind::Float => entry.dtype.is_float(),
        Kind::Int => !entry.dtype.is_float() && !matches!(entry.dtype, Dtype::Bool | Dtype::U64),
        Kind::Bool => matches!(entry.dtype, Dtype::Bool | Dtype::U8),
    };
    (!fits).then(|| Problem::Dtype { key: entry.name.clone(), expected: kind.name(), found: entry.dtype })
}
