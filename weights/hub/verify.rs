//! Whether what is in the cache is still what it was.

use std::path::{Path, PathBuf};

use super::cache::{self, Look};
use super::error::{HubError, Mismatch};
use super::hash::Hash;
use super::id::RepoId;
use super::lockfile::{Lock, Locked};
use super::{Hub, at_once, check_all};

/// What was found in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The repository, or the folder where no repository was named.
    pub name: String,
    /// The folder.
    pub folder: PathBuf,
    /// Every file that was looked at, in order.
    pub findings: Vec<Finding>,
}

/// One file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its name in the folder, with `/`.
    pub file: String,
    /// What is wrong with it, if anything.
    pub problem: Option<Mismatch>,
}

impl Hub {
    /// Hashes a repository's cached files again, and compares them with the lock, or where it has no entry, with the
    /// names of their contents. Makes no request and changes nothing.
    ///
    /// # Errors
    /// [`HubError::NotCached`] if there is nothing to look at.
    pub fn verify(&self, repo: &RepoId, lock: &Lock) -> Result<Report, HubError> {
        let shelf = self.cache.shelf(repo);
        let entry = lock.entry(repo);
        let commit = entry.map(|entry| entry.commit.clone());
        let commit =
            commit.or_else(|| repo.commit().map(Into::into)).or_else(|| shelf.reference(repo.revision()));
        let not_cached = || HubError::NotCached { repo: repo.clone(), folder: self.cache.root.clone() };
        let commit = commit.ok_or_else(not_cached)?;
        let folder = shelf.snapshot(&commit);
        let files = match entry {
            Some(entry) => entry.files.keys().cloned().collect(),
            None => shelf.files(&commit),
        };
        if files.is_empty() || !folder.is_dir() {
            return Err(not_cached());
        }
        let listing = shelf.listing(&commit);
        let known = |file: &str| listing.as_ref().and_then(|listing| listing.get(file));
        let problems = check_all(&shelf, &folder, &files, known, entry, Look::Full);
        Ok(Report { name: repo.to_string(), folder, findings: findings(files, problems) })
    }

    /// The same for a folder: a snapshot in any cache, or one that the only entry of the lock describes.
    ///
    /// # Errors
    /// If there is nothing to look at.
    pub fn verify_folder(&self, folder: &Path, lock: &Lock) -> Result<Report, HubError> {
        let io = |source| HubError::Io { path: folder.into(), source };
        let whole = folder.canonicalize().map_err(io)?;
        let commit = whole.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let entry = match lock.repositories.iter().find(|entry| entry.commit == commit) {
            Some(entry) => Some(entry),
            None => match lock.repositories.as_slice() {
                [only] => Some(only),
                _ => None,
            },
        };
        let mut files = Vec::new();
        walk(&whole, "", &mut files);
        let has_names = files.iter().any(|file| named(&whole.join(file)).is_some());
        let entry = entry.filter(|entry| entry.commit == commit || !has_names);
        if let Some(entry) = entry {
            files = entry.files.keys().cloned().collect();
        }
        files.sort();
        if files.is_empty() {
            return Err(io(std::io::ErrorKind::NotFound.into()));
        }
        let problems = at_once(&files, |file| {
            let path = whole.join(file);
            let expected = expected(&path, file, entry);
            let result = match expected.as_slice() {
                [] => Err(Mismatch::Unknown),
                hashes => hashes.iter().try_for_each(|hash| cache::check_hash(&path, hash)),
            };
            Ok(result.err().map(|problem| (file.clone(), problem)))
        })?;
        let problems = problems.into_iter().flatten().collect();
        Ok(Report {
            name: folder.display().to_string(),
            folder: folder.into(),
            findings: findings(files, problems),
        })
    }
}

/// The hashes that a file should have: its content's name, and that of the lock.
fn expected(path: &Path, file: &str, entry: Option<&Locked>) -> Vec<Hash> {
    let locked = entry.and_then(|entry| entry.files.get(file)).map(|file| file.hash());
    named(path).into_iter().chain(locked).collect()
}

/// The name of the content that a link leads to.
fn named(path: &Path) -> Option<Hash> {
    Hash::parse(std::fs::read_link(path).ok()?.file_name()?.to_str()?)
}

fn walk(root: &Path, inside: &str, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(root.join(inside)).into_iter().flatten().flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = if inside.is_empty() { name } else { format!("{inside}/{name}") };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk(root, &name, files);
        } else {
            files.push(name);
        }
    }
}

fn findings(mut files: Vec<String>, problems: Vec<(String, Mismatch)>) -> Vec<Finding> {
    files.sort();
    let problem =
        |file: &str| problems.iter().find(|(name, _)| name == file).map(|(_, problem)| problem.clone());
    files.into_iter().map(|file| Finding { problem: problem(&file), file }).collect()
}
