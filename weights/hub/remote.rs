//! A look at weights before they are downloaded: their headers, by ranged requests.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{MmapMut, MmapOptions};
use ureq::http::StatusCode;

use super::cache::{Known, Look};
use super::client::{Part, with_retries};
use super::error::HubError;
use super::select::{self, Choice};
use super::{Cached, Fetch, Hub, MOST_NAMES, Network, Outset, RepoId, Snapshot, Trouble, at_once};
use crate::Error;
use crate::format::{Checkpoint, Entry, Mapped, SafetensorsFile, TorchFile, zip};

/// The longest header that is fetched.
const LONGEST_HEADER: u64 = 100_000_000;

/// What a zip, and each of its entries, starts with.
const ZIP: &[u8] = b"PK\x03\x04";
/// How much of a zip's end is fetched: its directory is there, or what tells where it is.
const ZIP_TAIL: u64 = 64 << 10;
/// The longest fields before an entry's content, beside its name.
const ZIP_SLACK: u64 = 512;

/// What is known of a repository without its weights.
#[derive(Debug, Clone)]
pub enum Outline {
    /// Everything is in the cache.
    Here(Snapshot),
    /// The small files are; of the weights there are only the headers.
    There {
        /// With the small files alone.
        snapshot: Snapshot,
        /// The headers of the weights.
        headers: Headers,
        /// The bytes that a download would bring.
        bytes: u64,
    },
}

/// Names, shapes and dtypes of tensors that are somewhere else.
#[derive(Debug, Clone)]
pub struct Headers {
    path: PathBuf,
    entries: Arc<[Entry]>,
}

impl Checkpoint for Headers {
    fn path(&self) -> &Path {
        &self.path
    }

    fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// There are none.
    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        Err(Error::NotHere { path: self.path.clone(), key: name.into() })
    }
}

impl Hub {
    /// What is known of a repository without its weights. Downloads its small files and reads the headers of its weights.
    ///
    /// # Errors
    /// As [`Hub::snapshot`]; [`HubError::Header`] for weights that cannot be read by parts.
    pub fn outline(&self, repo: &RepoId, choice: &Choice) -> Result<Outline, HubError> {
        let shelf = self.cache.shelf(repo);
        let pinned = self.pins.as_ref().map(|pins| pins.entry(repo)).transpose()?;
        let commit = match pinned {
            Some(entry) => Some(entry.commit.clone()),
            None => self.cached_commit(repo, super::Freshness::Cached),
        };
        let mut missing = vec![format!("the commit of `{}`", repo.revision())];
        if let Some(commit) = &commit {
            match self.cached(repo, &shelf, commit, pinned, choice, Look::Quick)? {
                Cached::Whole(snapshot) => return Ok(Outline::Here(snapshot)),
                Cached::Lacking(lacking) => missing = lacking,
            }
        }
        let Network::Online(client) = &self.network else {
            return Err(HubError::Offline { repo: repo.clone(), folder: self.cache.root.clone(), missing });
        };
        let fetch = Fetch { hub: self, client, repo, shelf: &shelf, pinned, choice };
        let mut name = repo.name.clone();
        for _ in 0..MOST_NAMES {
            match fetch.outline(&name, commit.as_deref()) {
                Err(Trouble::Moved(other)) => name = other,
                Err(Trouble::Hub(error @ HubError::NoRepository { .. })) if name == repo.name => {
                    name = client.renamed(repo, &name).ok_or(error)?;
                }
                result => return result.map_err(Trouble::into_error),
            }
        }
        let problem = format!("{repo} is redirected from name to name");
        Err(HubError::Redirect { url: client.page(repo), problem })
    }
}

impl Fetch<'_> {
    fn outline(&self, name: &str, commit: Option<&str>) -> Result<Outline, Trouble> {
        let Outset { commit, listing } = self.outset(name, commit)?;
        self.hub.cache.make()?;
        self.shelf.make_blobs()?;
        let selection = select::select(self.repo, listing.keys().map(String::as_str), self.choice)?;
        let small = [selection.small, selection.indices.clone()].concat();
        self.obtain_all(name, &commit, &listing, &small)?;
        let folder = self.shelf.snapshot(&commit);
        let mut weights = selection.weights;
        for index in &selection.indices {
            weights.extend(self.shards(&commit, &listing, index)?);
        }
        let bytes = weights.iter().filter_map(|file| listing.get(file)?.size).sum();
        let known = |file: &String| listing.get(file).cloned().unwrap_or_default();
        let headers = at_once(&weights, |file| self.header(name, &commit, file, &known(file)))?;
        let path = match weights.as_slice() {
            [only] => folder.join(only),
            _ => folder.clone(),
        };
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen = HashMap::new();
        for (file, of_file) in weights.iter().zip(headers) {
            for entry in of_file {
                if let Some(first) = seen.insert(entry.name.clone(), file) {
                    let problem = format!("`{}` is in {first} too", entry.name);
                    return Err(
                        HubError::Header { repo: self.repo.clone(), file: file.clone(), problem }.into()
                    );
                }
                entries.push(entry);
            }
        }
        let snapshot = Snapshot { repo: self.repo.clone(), commit, folder, files: small };
        Ok(Outline::There { snapshot, headers: Headers { path, entries: entries.into() }, bytes })
    }

    /// The tensors of a file, of which only the header is read.
    fn header(&self, name: &str, commit: &str, file: &str, known: &Known) -> Result<Vec<Entry>, HubError> {
        let broken =
            |problem: String| HubError::Header { repo: self.repo.clone(), file: file.into(), problem };
        let size = match known.size {
            Some(size) => size,
            None => self
                .client
                .meta(self.repo, name, commit, file)?
                .size
                .ok_or_else(|| broken("its size is unknown".into()))?,
        };
        let path = self.shelf.snapshot(commit).join(file);
        let mut sparse = Sparse::new(size).map_err(|error| broken(error.to_string()))?;
        let fetch = |start: u64, length: u64| {
            self.slice(name, commit, file, start, length.min(size.saturating_sub(start)))
        };
        if file.ends_with(".safetensors") {
            let start = fetch(0, 8)?;
            sparse.put(0, &start);
            let length = start.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            if length > LONGEST_HEADER.min(size) {
                return Err(broken(format!("its header should have {length} bytes, it has {size} in all")));
            }
            sparse.put(8, &fetch(8, length)?);
            let opened = SafetensorsFile::parse(path, sparse.finish(broken)?);
            return Ok(opened.map_err(|error| broken(error.to_string()))?.entries().to_vec());
        }
        // A torch file is a zip: its directory is at the end, its pickle of names and shapes usually at the start.
        let start = fetch(0, 4)?;
        if start != ZIP {
            let problem = "neither safetensors nor a torch file in the zip format: it tells its tensors only after a download";
            return Err(broken(problem.into()));
        }
        sparse.put(0, &start);
        let tail = size.saturating_sub(ZIP_TAIL);
        sparse.put(tail, &fetch(tail, ZIP_TAIL)?);
        let no_end = || broken("its zip directory cannot be found".into());
        let directory = zip::directory_start(sparse.bytes()).ok_or_else(no_end)? as u64;
        if tail.saturating_sub(directory) > LONGEST_HEADER {
            return Err(broken("its zip directory is too long".into()));
        }
        if directory < tail {
            sparse.put(directory, &fetch(directory, tail - directory)?);
        }
        for entry in zip::listed(sparse.bytes()).map_err(|error| broken(error.to_string()))? {
            let (start, length) = (entry.local as u64, (entry.size + entry.name.len()) as u64 + ZIP_SLACK);
            let is_needed = entry.name.ends_with("data.pkl") || entry.name.ends_with("byteorder");
            if !is_needed {
                // values are not read; that they are there is all that is wanted
                sparse.put(start, ZIP);
            } else if length > LONGEST_HEADER {
                return Err(broken(format!("its list of tensors has {length} bytes")));
            } else {
                sparse.put(start, &fetch(start, length)?);
            }
        }
        let opened = TorchFile::parse(path, sparse.finish(broken)?);
        Ok(opened.map_err(|error| broken(error.to_string()))?.entries().to_vec())
    }

    /// A part of a file.
    fn slice(
        &self,
        name: &str,
        commit: &str,
        file: &str,
        start: u64,
        length: u64,
    ) -> Result<Vec<u8>, HubError> {
        if length == 0 {
            return Ok(Vec::new());
        }
        with_retries(|| {
            let mut answer = self.client.file(self.repo, name, commit, file, Part::Slice(start, length))?;
            let is_part = answer.status == StatusCode::PARTIAL_CONTENT;
            if !is_part && start > 0 && start + length > LONGEST_HEADER {
                let problem = "the server does not send parts of files".into();
                return Err(HubError::Header { repo: self.repo.clone(), file: file.into(), problem });
            }
            let skip = if is_part { 0 } else { start };
            let mut bytes = Vec::new();
            let result = answer.body.by_ref().take(skip + length).read_to_end(&mut bytes);
            let found = bytes.len() as u64;
            match result {
                Err(error) => Err(self.client.broken_body(&answer.url, &error, found, Some(skip + length))),
                Ok(_) if found < skip + length => {
                    Err(HubError::Cut { url: answer.url, expected: Some(skip + length), found })
                }
                Ok(_) => Ok(bytes.split_off(skip as usize)),
            }
        })
    }
}

/// A file of which some parts are known; the rest reads as zeros and takes no memory.
struct Sparse(MmapMut);

impl Sparse {
    fn new(size: u64) -> std::io::Result<Self> {
        let size = usize::try_from(size).map_err(|_| std::io::ErrorKind::FileTooLarge)?;
        Ok(Self(MmapOptions::new().len(size.max(1)).no_reserve_swap().map_anon()?))
    }

    fn put(&mut self, start: u64, bytes: &[u8]) {
        let start = start as usize;
        if let Some(place) = self.0.get_mut(start..start + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn finish(self, broken: impl Fn(String) -> HubError) -> Result<Mapped, HubError> {
        self.0.make_read_only().map(Mapped::from).map_err(|error| broken(error.to_string()))
    }
}
