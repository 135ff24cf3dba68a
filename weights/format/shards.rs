//! A checkpoint in several files (shards), with or without the index that says which tensor is in which.
//!
//! The index must tell the truth about names: every shard and every key is checked when it is opened, from headers
//! alone, and everything that does not hold is listed. Its `metadata` is not read: `total_size` is wrong in many
//! uploads (it counts shared tensors twice, or the dtype before a conversion), and nothing depends on it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use burn::tensor::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use volary_kernels::ops::PackedMatrix;

use super::{Checkpoint, Contents, Entry, lookalike, map, open_file};
use crate::error::{Error, Lookalike};
use crate::quantized::Quantization;

/// The largest index that is read; the index of a trillion parameters has a few megabytes.
const INDEX_LIMIT: usize = 100_000_000;

/// One thing that is wrong with a checkpoint in several files.
#[derive(Debug, thiserror::Error)]
pub enum ShardProblem {
    /// The index is not what it should be.
    #[error("the index is not the expected JSON: {0}")]
    NotJson(String),
    /// The index is larger than any honest one.
    #[error("the index has {found} bytes, at most {limit} are accepted")]
    IndexTooLong {
        /// Its length.
        found: usize,
        /// What is accepted.
        limit: usize,
    },
    /// An index without `weight_map`.
    #[error("the index has no `weight_map`, which says where each tensor is")]
    NoWeightMap,
    /// A tensor that the index lists, without the name of a file.
    #[error("the index gives no file name for `{key}`, but something else")]
    NotAName {
        /// The tensor.
        key: String,
    },
    /// A file name that leads out of the folder.
    #[error("the index wants `{key}` from `{found}`, which is not the name of a file beside it")]
    OutOfFolder {
        /// The tensor.
        key: String,
        /// The name.
        found: String,
    },
    /// A tensor that the index lists twice.
    #[error("the index lists `{key}` twice")]
    ListedTwice {
        /// The tensor.
        key: String,
    },
    /// A shard that is not there.
    #[error("the shard {shard} is missing")]
    MissingShard {
        /// Its file name.
        shard: String,
    },
    /// A shard that cannot be read.
    #[error("{0}")]
    Broken(Box<Error>),
    /// A tensor that is not where the index says.
    #[error("`{key}` is not in {shard}, where the index has it")]
    MissingKey {
        /// The tensor.
        key: String,
        /// The file name of the shard.
        shard: String,
    },
    /// A tensor of which the index does not know.
    #[error("{shard} has `{key}`, which the index does not list")]
    Unlisted {
        /// The tensor.
        key: String,
        /// The file name of the shard.
        shard: String,
    },
    /// A tensor that is in several shards.
    #[error("`{key}` is in each of {}", shards.join(", "))]
    Duplicate {
        /// The tensor.
        key: String,
        /// The file names of the shards.
        shards: Vec<String>,
    },
    /// Shards without an index that do not belong together.
    #[error("there are shards of sets of {} files, and no index that says which set is meant", all(totals))]
    SeveralSets {
        /// The numbers after `-of-`.
        totals: Vec<usize>,
    },
}

fn all(totals: &[usize]) -> String {
    totals.iter().map(usize::to_string).collect::<Vec<_>>().join(" and ")
}

/// A checkpoint in several files, each read as its content says.
pub struct Sharded {
    contents: Contents,
    shards: Vec<Box<dyn Checkpoint>>,
    /// The shard of each entry.
    homes: Vec<usize>,
}

impl fmt::Debug for Sharded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shards: Vec<_> = self.shards.iter().map(|shard| shard.path()).collect();
        f.debug_struct("Sharded")
            .field("path", &self.contents.path)
            .field("shards", &shards)
            .finish_non_exhaustive()
    }
}

impl Sharded {
    /// Opens the shards that an index (`model.safetensors.index.json`) names, beside it.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::NotWeights`] for something else under the index's name; [`Error::Shards`] with all that
    /// is wrong between the index and the shards.
    pub fn open(index: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = index.into();
        let file = map(&path)?;
        let bytes = file.as_ref();
        let mut problems = Vec::new();
        let listed = match read_index(bytes, &mut problems) {
            Ok(listed) => listed,
            Err(problem) => {
                return Err(match lookalike(bytes) {
                    Some(found) if found != Lookalike::Text => Error::NotWeights { path, found },
                    _ => Error::Shards { path, problems: vec![problem] },
                });
            }
        };
        let shards: BTreeSet<String> = listed.values().cloned().collect();
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        Self::assemble(path, &folder, shards, Some(&listed), problems)
    }

    /// Opens files of one folder that together are a checkpoint, without an index.
    pub(super) fn of(folder: &Path, shards: BTreeSet<String>) -> Result<Self, Error> {
        Self::assemble(folder.to_owned(), folder, shards, None, Vec::new())
    }

    fn assemble(
        path: PathBuf,
        folder: &Path,
        names: BTreeSet<String>,
        listed: Option<&BTreeMap<String, String>>,
        mut problems: Vec<ShardProblem>,
    ) -> Result<Self, Error> {
        let mut shards = Vec::new();
        let mut opened: Vec<&str> = Vec::new();
        for name in &names {
            let shard = folder.join(name);
            if !shard.exists() {
                problems.push(ShardProblem::MissingShard { shard: name.clone() });
                continue;
            }
            match open_file(&shard) {
                Ok(shard) => {
                    shards.push(shard);
                    opened.push(name);
                }
                Err(error) => problems.push(ShardProblem::Broken(Box::new(error))),
            }
        }

        // all shards of each key
        let mut homes: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for entry in shard.entries() {
                homes.entry(&entry.name).or_default().push(i);
            }
        }
        for (key, homes) in &homes {
            let key = || (*key).to_owned();
            if homes.len() > 1 {
                let shards = homes.iter().map(|&i| opened[i].to_owned()).collect();
                problems.push(ShardProblem::Duplicate { key: key(), shards });
            } else if listed.is_some_and(|listed| !listed.contains_key(&key())) {
                problems.push(ShardProblem::Unlisted { key: key(), shard: opened[homes[0]].to_owned() });
            }
        }
        for (key, shard) in listed.into_iter().flatten() {
            let Some(place) = opened.iter().position(|name| name == shard) else { continue };
            if !homes.get(key.as_str()).is_some_and(|homes| homes.contains(&place)) {
                problems.push(ShardProblem::MissingKey { key: key.clone(), shard: shard.clone() });
            }
        }
        if !problems.is_empty() {
            return Err(Error::Shards { path, problems });
        }

        let entries: Vec<Entry> = shards.iter().flat_map(|shard| shard.entries()).cloned().collect();
        let homes = shards.iter().enumerate().flat_map(|(i, shard)| vec![i; shard.entries().len()]).collect();
        Ok(Self { contents: Contents::new(path, entries), shards, homes })
    }
}

impl Checkpoint for Sharded {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let i = self.contents.position(name)?;
        self.shards[self.homes[i]].bytes(name)
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        self.shards[self.homes[self.contents.find(name)?]].shared(name)
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>, Error> {
        let i = self.contents.position(name)?;
        self.shards[self.homes[i]].packed(name)
    }

    fn quantization(&self) -> Option<Quantization> {
        self.shards.iter().find_map(|shard| shard.quantization())
    }

    fn release(&self, name: &str) {
        if let Some(i) = self.contents.find(name) {
            self.shards[self.homes[i]].release(name);
        }
    }
}

/// The files that an index names.
///
/// # Errors
/// [`Error::Io`]; [`Error::Shards`] for something else under the index's name.
pub(crate) fn named_by(index: &Path) -> Result<BTreeSet<String>, Error> {
    let mut problems = Vec::new();
    let listed = match read_index(map(index)?.as_ref(), &mut problems) {
        Ok(listed) => listed,
        Err(problem) => return Err(Error::Shards { path: index.to_owned(), problems: vec![problem] }),
    };
    Ok(listed.into_values().collect())
}

/// Whether this is the name of a shard that can do without an index.
pub(crate) fn is_shard(name: &str) -> bool {
    numbers(name, "model", "safetensors", None).is_some()
}

/// The file name for each key; what is wrong with single keys goes to `problems`.
fn read_index(
    bytes: &[u8],
    problems: &mut Vec<ShardProblem>,
) -> Result<BTreeMap<String, String>, ShardProblem> {
    if bytes.len() > INDEX_LIMIT {
        return Err(ShardProblem::IndexTooLong { found: bytes.len(), limit: INDEX_LIMIT });
    }
    let Index { weight_map } =
        serde_json::from_slice(bytes).map_err(|error| ShardProblem::NotJson(error.to_string()))?;
    let WeightMap(places) = weight_map.ok_or(ShardProblem::NoWeightMap)?;
    let mut listed = BTreeMap::new();
    for (key, Name(name)) in places {
        match name {
            _ if listed.contains_key(&key) => problems.push(ShardProblem::ListedTwice { key }),
            None => problems.push(ShardProblem::NotAName { key }),
            Some(name) if is_file_name(&name) => drop(listed.insert(key, name)),
            Some(found) => problems.push(ShardProblem::OutOfFolder { key, found }),
        }
    }
    Ok(listed)
}

/// Whether this names a file in the same folder, on any system.
pub(super) fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', ':', '\0'])
}

#[derive(Deserialize)]
struct Index {
    weight_map: Option<WeightMap>,
}

/// Lists, so that a key that is there twice is seen.
struct WeightMap(Vec<(String, Name)>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(WeightMap(entries))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

/// A file name, or anything else that JSON has, which is passed over.
struct Name(Option<String>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Name;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a file name")
            }

            fn visit_str<E>(self, name: &str) -> Result<Name, E> {
                Ok(Name(Some(name.to_owned())))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Name, E> {
                Ok(Name(None))
            }

            fn visit_i64<E>(self, _: i64) -> Result<Name, E> {
                Ok(Name(None))
            }

            fn visit_u64<E>(self, _: u64) -> Result<Name, E> {
                Ok(Name(None))
            }

            fn visit_f64<E>(self, _: f64) -> Result<Name, E> {
                Ok(Name(None))
            }

            fn visit_unit<E>(self) -> Result<Name, E> {
                Ok(Name(None))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Name, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Name(None))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Name, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Name(None))
            }
        }

        deserializer.deserialize_any(Any)
    }
}

/// The number of a shard and of the set it belongs to, from names like `model-00001-of-00002.safetensors`, for the
/// single file `stem.extension`. A variant stands before the numbers or after them.
fn numbers(name: &str, stem: &str, extension: &str, variant: Option<&str>) -> Option<(usize, usize)> {
    let number = |digits: &str| match digits.len() {
        5 if digits.bytes().all(|byte| byte.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    };
    let of = |rest: &str| {
        let (number_text, total) = rest.strip_prefix('-')?.split_once("-of-")?;
        Some((number(number_text)?, number(total)?))
    };
    let rest = name.strip_prefix(stem)?.strip_suffix(extension)?.strip_suffix('.')?;
    match variant {
        None => of(rest),
        Some(variant) => {
            let before = rest.strip_prefix('.').and_then(|rest| rest.strip_prefix(variant));
            let after = rest.strip_suffix(variant).and_then(|rest| rest.strip_suffix('.'));
            before.and_then(of).or_else(|| after.and_then(of))
        }
    }
}

/// The files of a folder that are shards of `file` (`model.safetensors`), when there are any.
///
/// # Errors
/// [`Error::Shards`] when they are not one complete set.
pub(super) fn set_of(
    folder: &Path,
    names: &[String],
    file: &str,
    variant: Option<&str>,
) -> Result<Option<BTreeSet<String>>, Error> {
    let Some((stem, extension)) = file.rsplit_once('.') else { return Ok(None) };
    let mut found: BTreeMap<usize, BTreeMap<usize, &String>> = BTreeMap::new();
    for name in names {
        if let Some((number, total)) = numbers(name, stem, extension, variant) {
            found.entry(total).or_default().insert(number, name);
        }
    }
    if found.is_empty() {
        return Ok(None);
    }
    let wrong = |problems| Error::Shards { path: folder.to_owned(), problems };
    if found.len() > 1 {
        return Err(wrong(vec![ShardProblem::SeveralSets { totals: found.into_keys().collect() }]));
    }
    let (total, shards) = found.pop_first().unwrap_or_default();
    let variant = variant.map(|variant| format!(".{variant}")).unwrap_or_default();
    let missing: Vec<_> = (1..=total)
        .filter(|number| !shards.contains_key(number))
        .map(|number| format!("{stem}{variant}-{number:05}-of-{total:05}.{extension}"))
        .map(|shard| ShardProblem::MissingShard { shard })
        .collect();
    if !missing.is_empty() {
        return Err(wrong(missing));
    }
    Ok(Some(shards.into_values().cloned().collect()))
}

#[cfg(test)]
mod tests;
