//! `volary.lock`: which commit of each repository, and the SHA-256 of each of its files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cache::write_whole;
use super::error::HubError;
use super::hash::Hash;
use super::id::{MAIN, RepoId, check_path, is_commit};

/// The name of the lock file in a project's folder.
pub const LOCK_FILE: &str = "volary.lock";

const HEAD: &str = "# Written by `volary fetch`, checked by `volary verify`, used with `--locked`.\n\n";
const VERSION: u32 = 1;

/// What a lock file holds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    version: u32,
    /// The repositories, in order.
    #[serde(default, rename = "repository")]
    pub repositories: Vec<Locked>,
}

/// One repository at one revision.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Locked {
    /// `owner/name`
    pub id: String,
    /// The branch, tag or commit that was asked for.
    pub revision: String,
    /// The commit that it was.
    pub commit: String,
    /// The files, by name.
    #[serde(default)]
    pub files: BTreeMap<String, LockedFile>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedFile {
    /// In bytes.
    pub size: u64,
    /// 64 hexadecimal digits.
    pub sha256: String,
}

impl LockedFile {
    /// Its hash.
    pub fn hash(&self) -> Hash {
        Hash::Sha256(self.sha256.clone())
    }
}

impl Locked {
    /// The repository at the revision that was asked for.
    pub fn repo(&self) -> RepoId {
        RepoId { name: self.id.clone(), revision: Some(self.revision.clone()) }
    }

    /// Whether it says only what can be true.
    fn problem(&self) -> Option<String> {
        let id = format!("{}@{}", self.id, self.revision).parse::<RepoId>();
        if let Err(error) = id {
            return Some(error.to_string());
        }
        if !is_commit(&self.commit) {
            return Some(format!("{}: `{}` is no commit", self.id, self.commit));
        }
        self.files.iter().find_map(|(name, file)| {
            if let Err(error) = check_path(name) {
                return Some(format!(
                    "{}: the file name `{}` is refused: {error}",
                    self.id,
                    name.escape_debug()
                ));
            }
            let is_sha256 =
                matches!(Hash::parse(&file.sha256), Some(Hash::Sha256(digits)) if digits == file.sha256);
            (!is_sha256).then(|| format!("{}: `{name}`: `{}` is no sha256", self.id, file.sha256))
        })
    }
}

impl Lock {
    /// Reads a lock file; an empty lock where there is none.
    ///
    /// # Errors
    /// If it cannot be read, or does not hold what it should.
    pub fn read(path: &Path) -> Result<Self, HubError> {
        let broken = |problem: String| HubError::Lock { path: path.into(), problem };
        let text = match fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Self { version: VERSION, repositories: Vec::new() });
            }
            Err(error) => return Err(broken(error.to_string())),
        };
        let lock: Self = toml::from_str(&text).map_err(|error| {
            broken(format!("not a lock file: {}", error.message().lines().next().unwrap_or_default()))
        })?;
        if lock.version != VERSION {
            return Err(broken(format!("version {}, expected {VERSION}", lock.version)));
        }
        match lock.repositories.iter().find_map(Locked::problem) {
            Some(problem) => Err(broken(problem)),
            None => Ok(lock),
        }
    }

    /// The entry for a repository. Without a revision: that of the main branch, or the only one.
    pub fn entry(&self, repo: &RepoId) -> Option<&Locked> {
        let of_repo: Vec<&Locked> = self.repositories.iter().filter(|entry| entry.id == repo.name).collect();
        match &repo.revision {
            Some(revision) => {
                let is_it = |entry: &&&Locked| entry.revision == *revision || entry.commit == *revision;
                of_repo.iter().find(is_it).copied()
            }
            None => {
                of_repo.iter().find(|entry| entry.revision == MAIN).copied().or(match of_repo.as_slice() {
                    [only] => Some(only),
                    _ => None,
                })
            }
        }
    }

    /// Puts entries into a lock file, in place of those for the same repository and revision.
    ///
    /// # Errors
    /// If the file is there and cannot be read, or cannot be written.
    pub fn merge(path: &Path, entries: impl IntoIterator<Item = Locked>) -> Result<(), HubError> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        // Held until the new file has its name: no other process of ours reads and writes in between.
        let guard = File::open(folder).ok();
        let _ = guard.as_ref().map(File::lock);
        let mut lock = Self::read(path)?;
        for new in entries {
            lock.repositories.retain(|old| (&old.id, &old.revision) != (&new.id, &new.revision));
            lock.repositories.push(new);
        }
        lock.repositories.sort_by(|a, b| (&a.id, &a.revision).cmp(&(&b.id, &b.revision)));
        let broken = |problem: String| HubError::Lock { path: path.into(), problem };
        let text = toml::to_string(&lock).map_err(|error| broken(error.to_string()))?;
        write_whole(path, format!("{HEAD}{text}").as_bytes()).map_err(|error| match error {
            HubError::ReadOnly { source, .. } | HubError::Io { source, .. } => {
                broken(format!("the lock file cannot be written: {source}"))
            }
            other => other,
        })
    }
}

/// A lock that decides: with it, commits and contents are those of the lock and no others.
#[derive(Debug, Clone)]
pub struct Pins {
    pub(super) path: PathBuf,
    pub(super) lock: Lock,
}

impl Pins {
    /// Reads a lock file, which has to be there.
    ///
    /// # Errors
    /// If it is not, or does not hold what it should.
    pub fn read(path: &Path) -> Result<Self, HubError> {
        if !path.exists() {
            let problem = format!("there is no lock file: `volary fetch` writes one named {LOCK_FILE}");
            return Err(HubError::Lock { path: path.into(), problem });
        }
        Ok(Self { path: path.into(), lock: Lock::read(path)? })
    }

    /// What the file holds.
    pub fn into_lock(self) -> Lock {
        self.lock
    }

    /// The entry for a repository.
    ///
    /// # Errors
    /// If there is none.
    pub(super) fn entry(&self, repo: &RepoId) -> Result<&Locked, HubError> {
        self.lock.entry(repo).ok_or_else(|| {
            let known: Vec<String> =
                self.lock.repositories.iter().map(|entry| entry.repo().to_string()).collect();
            let known = if known.is_empty() { "nothing".into() } else { known.join(", ") };
            let problem = format!("{repo} is not in it; it has {known}: `volary fetch {repo}` adds it");
            HubError::Lock { path: self.path.clone(), problem }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(id: &str, revision: &str, digit: char) -> Locked {
        let file = LockedFile { size: 3, sha256: digit.to_string().repeat(64) };
        Locked {
            id: id.into(),
            revision: revision.into(),
            commit: digit.to_string().repeat(40),
            files: BTreeMap::from([("unet/config.json".into(), file)]),
        }
    }

    #[test]
    fn entries_are_merged_and_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOCK_FILE);
        Lock::merge(&path, [entry("b/b", "main", '1'), entry("a/a", "v1", '2')]).unwrap();
        Lock::merge(&path, [entry("b/b", "main", '3')]).unwrap();
        let lock = Lock::read(&path).unwrap();
        assert_eq!(lock.repositories, [entry("a/a", "v1", '2'), entry("b/b", "main", '3')]);
        for (repo, found) in [
            ("b/b", Some("main")),
            ("a/a", Some("v1")),
            ("a/a@main", None),
            ("a/a@2222222222222222222222222222222222222222", Some("v1")),
            ("c/c", None),
        ] {
            let entry = lock.entry(&repo.parse().unwrap());
            assert_eq!(entry.map(|entry| entry.revision.as_str()), found, "{repo}");
        }
    }

    #[test]
    fn a_lock_that_lies_is_refused_and_not_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(LOCK_FILE);
        let good =
            toml::to_string(&Lock { version: 1, repositories: vec![entry("a/a", "v1", '2')] }).unwrap();
        for (from, to) in [
            ("version = 1", "version = 2"),
            ("version = 1", "no toml"),
            ("unet/config", "../config"),
            ("2222222222", "222"),
            ("a/a", "../a"),
        ] {
            let text = good.replace(from, to);
            assert_ne!(text, good);
            fs::write(&path, &text).unwrap();
            let error = Lock::merge(&path, [entry("b/b", "main", '1')]).unwrap_err();
            assert!(error.to_string().contains(LOCK_FILE), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
