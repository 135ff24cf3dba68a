//! Repositories of the Hugging Face hub, in the cache that Python's huggingface_hub uses, or brought there.
//!
//! The cache comes first: a repository whose needed files are there costs no request. Otherwise its files are listed,
//! those that a system needs are downloaded side by side at one commit, resumed where they broke off, and get their
//! names only when their hashes are those that the hub gave. Every failure is a [`HubError`].
//!
//! ```no_run
//! use volary_weights::hub::{Choice, Environment, Hub, Look};
//!
//! # fn main() -> Result<(), volary_weights::hub::HubError> {
//! let hub = Hub::new(&Environment::read()?)?;
//! let snapshot = hub.snapshot(&"openai/clip-vit-base-patch32@main".parse()?, &Choice::default(), Look::Quick)?;
//! println!("{}", snapshot.folder.display());
//! # Ok(())
//! # }
//! ```
//!
//! With [`Environment::network`] at [`Reach::Offline`] there is no client: not one request can be made.

mod cache;
mod client;
mod download;
mod environment;
mod error;
mod hash;
mod id;
mod lockfile;
mod remote;
mod select;
mod verify;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use cache::{By, Cache, Known, Listing, Shelf};
use client::Client;
use download::{NoBar, Wanted};

pub use cache::Look;
pub use download::Bar;
pub use environment::{Bars, Environment, Placing, Proxies, Reach, Token};
pub use error::{HubError, Mismatch};
pub use hash::{Hash, sha256};
pub use id::{MAIN, NameError, RepoId};
pub use lockfile::{LOCK_FILE, Lock, Locked, LockedFile, Pins};
pub use remote::{Headers, Outline};
pub use select::Choice;
pub use verify::{Finding, Report};

/// So many files come at once.
const AT_ONCE: usize = 4;
/// How often a repository may turn out to have another name.
const MOST_NAMES: usize = 3;

/// A cache and, where the network may be used, the hub behind it.
#[derive(Clone)]
pub struct Hub {
    cache: Cache,
    network: Network,
    pins: Option<Pins>,
    progress: Arc<dyn Progress>,
}

/// The hub itself, or nothing to ask.
#[derive(Clone)]
enum Network {
    Online(Arc<Client>),
    Offline,
}

/// Whether a branch is asked for its newest commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freshness {
    /// The commit that the cache has for it will do.
    Cached,
    /// The hub is asked.
    Newest,
}

/// Shows downloads.
pub trait Progress: Send + Sync {
    /// A file that begins to come.
    fn begin(&self, file: &str) -> Box<dyn Bar>;
}

/// Shows nothing.
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str) -> Box<dyn Bar> {
        Box::new(NoBar)
    }
}

/// A repository's files at one commit, in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The repository and the revision that was asked for.
    pub repo: RepoId,
    /// The commit that it is.
    pub commit: String,
    /// Where the files are.
    pub folder: PathBuf,
    /// The files that were wanted, by name, with `/`.
    pub files: Vec<String>,
}

impl Snapshot {
    /// The entry of a lock file for these files. Reads every byte.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn locked(&self) -> Result<Locked, HubError> {
        let mut files = BTreeMap::new();
        for name in &self.files {
            let path = self.folder.join(name);
            let io = |source| HubError::Io { path: path.clone(), source };
            let size = std::fs::metadata(&path).map_err(io)?.len();
            let link = std::fs::read_link(&path).ok();
            let named = link.as_ref().and_then(|to| Hash::parse(to.file_name()?.to_str()?));
            let hash = match named {
                // the name of a content that was verified is its hash
                Some(hash @ Hash::Sha256(_)) => hash,
                _ => hash::sha256(&path).map_err(io)?,
            };
            files.insert(name.clone(), LockedFile { size, sha256: hash.digits().into() });
        }
        Ok(Locked {
            id: self.repo.name.clone(),
            revision: self.repo.revision().into(),
            commit: self.commit.clone(),
            files,
        })
    }
}

impl Hub {
    /// The cache and the hub of an environment.
    ///
    /// # Errors
    /// If the endpoint or the certificates cannot be used.
    pub fn new(environment: &Environment) -> Result<Self, HubError> {
        let network = match environment.network {
            Reach::Online => Network::Online(Arc::new(Client::new(environment)?)),
            Reach::Offline => Network::Offline,
        };
        let root = std::path::absolute(&environment.cache).unwrap_or_else(|_| environment.cache.clone());
        let cache = Cache { root, placing: environment.placing };
        Ok(Self { cache, network, pins: None, progress: Arc::new(Silent) })
    }

    /// Holds every repository to the commits and contents of a lock file.
    pub fn with_pins(self, pins: Pins) -> Self {
        Self { pins: Some(pins), ..self }
    }

    /// Shows downloads.
    pub fn with_progress(self, progress: Arc<dyn Progress>) -> Self {
        Self { progress, ..self }
    }

    /// The folder with the repositories.
    pub fn cache(&self) -> &Path {
        &self.cache.root
    }

    /// A repository's files in a folder; what the cache lacks is downloaded.
    ///
    /// # Errors
    /// If something is missing and cannot be had, or is not what it should be.
    pub fn snapshot(&self, repo: &RepoId, choice: &Choice, look: Look) -> Result<Snapshot, HubError> {
        self.snapshot_as(repo, choice, look, Freshness::Cached)
    }

    /// As [`Hub::snapshot`]; with [`Freshness::Newest`] the hub is asked where a branch is by now.
    ///
    /// # Errors
    /// As [`Hub::snapshot`].
    pub fn snapshot_as(
        &self,
        repo: &RepoId,
        choice: &Choice,
        look: Look,
        freshness: Freshness,
    ) -> Result<Snapshot, HubError> {
        let shelf = self.cache.shelf(repo);
        let pinned = self.pins.as_ref().map(|pins| pins.entry(repo)).transpose()?;
        let commit = match pinned {
            Some(entry) => Some(entry.commit.clone()),
            None => self.cached_commit(repo, freshness),
        };
        let missing = match &commit {
            None => vec![format!("the commit of `{}`", repo.revision())],
            Some(commit) => match self.cached(repo, &shelf, commit, pinned, choice, look)? {
                Cached::Whole(snapshot) => return Ok(snapshot),
                Cached::Lacking(missing) => missing,
            },
        };
        match &self.network {
            Network::Offline => {
                Err(HubError::Offline { repo: repo.clone(), folder: self.cache.root.clone(), missing })
            }
            Network::Online(client) => {
                let fetch = Fetch { hub: self, client, repo, shelf: &shelf, pinned, choice };
                let is_fixed = pinned.is_some() || repo.commit().is_some();
                match fetch.run(commit) {
                    // The cache has a part of a commit that the hub no longer has: a branch stands for the newest.
                    Err(HubError::OtherCommit { .. } | HubError::NoRevision { .. }) if !is_fixed => {
                        fetch.run(None)
                    }
                    result => result,
                }
            }
        }
    }

    fn cached_commit(&self, repo: &RepoId, freshness: Freshness) -> Option<String> {
        if let Some(commit) = repo.commit() {
            return Some(commit.into());
        }
        match (freshness, &self.network) {
            (Freshness::Newest, Network::Online(_)) => None,
            _ => self.cache.shelf(repo).reference(repo.revision()),
        }
    }

    /// What the cache has of a commit.
    fn cached(
        &self,
        repo: &RepoId,
        shelf: &Shelf,
        commit: &str,
        pinned: Option<&Locked>,
        choice: &Choice,
        look: Look,
    ) -> Result<Cached, HubError> {
        let folder = shelf.snapshot(commit);
        let (listing, by) = match pinned {
            Some(_) => (listing_of(pinned), By::Us),
            None => match shelf.listed(commit) {
                Some((listing, by)) => (Some(listing), by),
                None => (None, By::Python),
            },
        };
        let here = shelf.files(commit);
        let (files, mut missing) = match (&listing, pinned) {
            (Some(listing), Some(_)) => (listing.keys().cloned().collect(), Vec::new()),
            (Some(listing), None) => {
                (self.chosen(repo, &folder, listing.keys().map(String::as_str), choice)?, Vec::new())
            }
            // What the choice wants may be on the hub.
            (None, _) => match self.chosen(repo, &folder, here.iter().map(String::as_str), choice) {
                Ok(files) => (files, select::lacking(&here)),
                Err(error) => return Ok(Cached::Lacking(vec![error.to_string()])),
            },
        };
        let mut wanted = Vec::new();
        for file in files {
            let is_here = here.binary_search(&file).is_ok();
            // Whoever only uses a model does without texts, and without what Python's client left out.
            let may_lack = look == Look::Quick
                && pinned.is_none()
                && (select::is_text(&file)
                    || by == By::Python && !select::is_weights(&file) && file != "config.json");
            match (is_here, may_lack) {
                (true, _) => wanted.push(file),
                (false, true) => {}
                (false, false) => missing.push(file),
            }
        }
        let known = |file: &str| listing.as_ref().and_then(|listing| listing.get(file));
        for (file, problem) in check_all(shelf, &folder, &wanted, known, pinned, look) {
            let path = folder.join(&file);
            match self.network {
                Network::Offline => return Err(HubError::Damaged { path, problem: Box::new(problem) }),
                Network::Online(_) => {
                    shelf.discard(&path)?;
                    missing.push(file);
                }
            }
        }
        missing.sort();
        missing.dedup();
        if missing.is_empty() && !wanted.is_empty() {
            wanted.sort();
            return Ok(Cached::Whole(Snapshot {
                repo: repo.clone(),
                commit: commit.into(),
                folder,
                files: wanted,
            }));
        }
        if missing.is_empty() {
            missing.push("every file".into());
        }
        Ok(Cached::Lacking(missing))
    }
}

impl Hub {
    /// The files that are chosen from a commit's, with the shards of every index that is in the snapshot.
    fn chosen<'a>(
        &self,
        repo: &RepoId,
        snapshot: &Path,
        names: impl Iterator<Item = &'a str>,
        choice: &Choice,
    ) -> Result<Vec<String>, HubError> {
        let selection = select::select(repo, names, choice)?;
        let mut files = [selection.small, selection.weights].concat();
        for index in selection.indices {
            // where the index is missing, that is told first
            if let Ok(text) = std::fs::read(snapshot.join(&index)) {
                files.extend(select::shards(repo, &index, &text)?);
            }
            files.push(index);
        }
        Ok(files)
    }
}

enum Cached {
    Whole(Snapshot),
    Lacking(Vec<String>),
}

/// A lock's files as a list.
fn listing_of(pinned: Option<&Locked>) -> Option<Listing> {
    let known = |file: &LockedFile| Known { size: Some(file.size), hash: None };
    Some(pinned?.files.iter().map(|(name, file)| (name.clone(), known(file))).collect())
}

/// What is wrong with files of a snapshot.
fn check_all<'a>(
    shelf: &Shelf,
    folder: &Path,
    files: &[String],
    known: impl Fn(&str) -> Option<&'a Known> + Sync,
    pinned: Option<&Locked>,
    look: Look,
) -> Vec<(String, Mismatch)> {
    let found = at_once(files, |file| {
        let path = folder.join(file);
        let checked = shelf.check(&path, known(file), look);
        let locked = pinned.and_then(|entry| entry.files.get(file)).map(LockedFile::hash);
        let result = match (checked, locked) {
            // a content that is named by the hash of the lock was verified when it got its name
            (Ok(()), Some(locked)) => match shelf.hash(&path, None) {
                Some(named) if named == locked => Ok(()),
                Some(Hash::Sha256(found)) => {
                    Err(Mismatch::Hash { expected: locked, found: Hash::Sha256(found) })
                }
                _ => cache::check_hash(&path, &locked),
            },
            // Python's copies without a name: the lock's hash is enough
            (Err(Mismatch::Unknown), Some(locked)) => cache::check_hash(&path, &locked),
            // Nothing was ever said of its hash: another download may know.
            (checked, _) => checked,
        };
        Ok(result.err().map(|problem| (file.clone(), problem)))
    });
    found.unwrap_or_default().into_iter().flatten().collect()
}

/// Runs `work` for each item, a few at once. The first error ends it.
fn at_once<T: Sync, R: Send>(
    items: &[T],
    work: impl Fn(&T) -> Result<R, HubError> + Sync,
) -> Result<Vec<R>, HubError> {
    let next = AtomicUsize::new(0);
    let results: Mutex<Vec<(usize, Result<R, HubError>)>> = Mutex::new(Vec::new());
    let failed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE.min(items.len()) {
            scope.spawn(|| {
                while !failed.load(Ordering::Relaxed) {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(item) = items.get(at) else { break };
                    let result = work(item);
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push((at, result));
                }
            });
        }
    });
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_by_key(|(at, _)| *at);
    // of several failures, those that only followed another say nothing
    let reason = results
        .iter()
        .position(|(_, result)| result.as_ref().is_err_and(|error| !matches!(error, HubError::GivenUp)));
    if let Some(at) = reason {
        results.swap(0, at);
    }
    results.into_iter().map(|(_, result)| result).collect()
}

/// A download of what a repository's snapshot lacks.
struct Fetch<'a> {
    hub: &'a Hub,
    client: &'a Client,
    repo: &'a RepoId,
    shelf: &'a Shelf,
    pinned: Option<&'a Locked>,
    choice: &'a Choice,
}

impl Fetch<'_> {
    fn run(&self, commit: Option<String>) -> Result<Snapshot, HubError> {
        let mut name = self.repo.name.clone();
        for _ in 0..MOST_NAMES {
            match self.from(&name, commit.as_deref()) {
                Ok(snapshot) => return Ok(snapshot),
                Err(Trouble::Moved(other)) => name = other,
                Err(Trouble::Hub(error @ HubError::NoRepository { .. })) if name == self.repo.name => {
                    name = self.client.renamed(self.repo, &name).ok_or(error)?;
                }
                Err(trouble) => return Err(trouble.into_error()),
            }
        }
        let problem = format!("{} is redirected from name to name", self.repo);
        Err(HubError::Redirect { url: self.client.page(self.repo), problem })
    }

    /// Downloads from the repository that is now called `name`.
    fn from(&self, name: &str, commit: Option<&str>) -> Result<Snapshot, Trouble> {
        let Outset { commit, listing } = self.outset(name, commit)?;
        self.hub.cache.make()?;
        self.shelf.make_blobs()?;
        let files = match self.pinned {
            Some(entry) => {
                let names: Vec<String> = entry.files.keys().cloned().collect();
                self.obtain_all(name, &commit, &listing, &names)?;
                names
            }
            None => {
                let selection = select::select(self.repo, listing.keys().map(String::as_str), self.choice)?;
                // The indices first: they name shards.
                self.obtain_all(name, &commit, &listing, &selection.indices)?;
                let mut weights = selection.weights;
                for index in &selection.indices {
                    weights.extend(self.shards(&commit, &listing, index)?);
                }
                let names = [selection.small, weights].concat();
                self.obtain_all(name, &commit, &listing, &names)?;
                [names, selection.indices].concat()
            }
        };
        let folder = self.shelf.snapshot(&commit);
        if self.pinned.is_none() {
            // what turned out to be true
            let mut listing = listing;
            for file in &files {
                let size = std::fs::metadata(folder.join(file)).map(|metadata| metadata.len()).ok();
                let hash = self.shelf.hash(&folder.join(file), listing.get(file));
                listing.insert(file.clone(), Known { size, hash });
            }
            self.shelf.set_listing(&commit, &listing)?;
            self.shelf.set_reference(self.repo.revision(), &commit)?;
        }
        let mut files = files;
        files.sort();
        files.dedup();
        Ok(Snapshot { repo: self.repo.clone(), commit, folder, files })
    }

    /// The shards of an index that is in the snapshot.
    fn shards(&self, commit: &str, listing: &Listing, index: &str) -> Result<Vec<String>, HubError> {
        let path = self.shelf.snapshot(commit).join(index);
        let text = std::fs::read(&path).map_err(|source| HubError::Io { path, source })?;
        let shards = select::shards(self.repo, index, &text)?;
        match shards.iter().find(|shard| !listing.contains_key(*shard)) {
            Some(shard) => {
                Err(HubError::NoShard { repo: self.repo.clone(), index: index.into(), shard: shard.clone() })
            }
            None => Ok(shards),
        }
    }

    /// Which commit it is, and what it has.
    fn outset(&self, name: &str, commit: Option<&str>) -> Result<Outset, Trouble> {
        if let Some(commit) = commit
            && let Some(listing) = listing_of(self.pinned).or_else(|| self.shelf.listing(commit))
        {
            return Ok(Outset { commit: commit.into(), listing });
        }
        let asked = match commit {
            Some(commit) => self.repo.at(commit),
            None => self.repo.clone(),
        };
        let info = self.client.info(&asked, name).map_err(|error| match error {
            // of the revision that the user said, not of what it stands for
            HubError::NoRevision { revision, .. } => {
                HubError::NoRevision { repo: self.repo.clone(), revision }
            }
            other => other,
        })?;
        if let Some(expected) = commit.filter(|commit| *commit != info.commit) {
            let (repo, expected) = (self.repo.clone(), expected.into());
            return Err(HubError::OtherCommit { repo, expected, found: info.commit }.into());
        }
        let name = info.name.as_deref().unwrap_or(name);
        let listing = match self.client.tree(&asked, name, &info.commit) {
            Ok(files) => files
                .into_iter()
                .map(|file| (file.name, Known { size: file.size, hash: file.hash }))
                .collect(),
            // a mirror that only has the one list
            Err(HubError::NoRepository { .. } | HubError::NoRevision { .. }) => {
                info.files.into_iter().map(|name| (name, Known::default())).collect()
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Outset { commit: info.commit, listing })
    }

    fn obtain_all(
        &self,
        name: &str,
        commit: &str,
        listing: &Listing,
        files: &[String],
    ) -> Result<(), Trouble> {
        let give_up = AtomicBool::new(false);
        let moved = Mutex::new(None);
        let obtained = at_once(files, |file| {
            let known = listing.get(file).cloned().unwrap_or_default();
            let result = self.obtain(name, commit, file, &known, &give_up).map_err(|trouble| match trouble {
                Trouble::Moved(other) => {
                    *moved.lock().unwrap_or_else(PoisonError::into_inner) = Some(other);
                    HubError::GivenUp
                }
                Trouble::Hub(error) => error,
            });
            give_up.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        });
        match moved.into_inner().unwrap_or_else(PoisonError::into_inner) {
            Some(other) => Err(Trouble::Moved(other)),
            None => obtained.map(drop).map_err(Trouble::Hub),
        }
    }

    /// Brings one file into the snapshot, from the cache or from the hub.
    fn obtain(
        &self,
        name: &str,
        commit: &str,
        file: &str,
        known: &Known,
        give_up: &AtomicBool,
    ) -> Result<(), Trouble> {
        let known = match known.hash {
            Some(_) => known.clone(),
            None => {
                let meta = self.client.meta(self.repo, name, commit, file)?;
                if let Some(other) = meta.moved_to {
                    return Err(Trouble::Moved(other));
                }
                if let Some(found) = meta.commit.as_deref().filter(|found| *found != commit) {
                    let (repo, expected) = (self.repo.clone(), commit.into());
                    return Err(HubError::OtherCommit { repo, expected, found: found.into() }.into());
                }
                download::known(&meta)
            }
        };
        let Some(hash) = &known.hash else {
            return Err(HubError::Unverifiable { repo: self.repo.clone(), file: file.into() }.into());
        };
        let _guard = self.shelf.lock(hash)?;
        let blob = self.shelf.blob(hash);
        if blob.exists() {
            // A content that another commit or another process brought.
            let by_hash = Known { size: None, hash: Some(hash.clone()) };
            if self.shelf.check(&blob, Some(&by_hash), Look::Full).is_ok() {
                self.shelf.place(commit, file, hash)?;
                return self.check_pin(commit, file);
            }
            self.shelf.discard(&blob)?;
        }
        let incomplete = self.shelf.incomplete(hash);
        let mut bar = self.hub.progress.begin(file);
        let wanted = Wanted { repo: self.repo, name, commit, file, hash, size: known.size };
        match download::download(self.client, &wanted, &incomplete, bar.as_mut(), give_up) {
            Ok(_) => {}
            Err(error @ HubError::OtherCommit { .. }) => {
                let meta = self.client.meta(self.repo, name, commit, file);
                return Err(match meta.ok().and_then(|meta| meta.moved_to) {
                    Some(other) => Trouble::Moved(other),
                    None => error.into(),
                });
            }
            Err(error) => return Err(error.into()),
        }
        std::fs::rename(&incomplete, &blob).map_err(HubError::write(&blob))?;
        self.shelf.place(commit, file, hash)?;
        self.check_pin(commit, file)
    }

    /// Whether a file has the hash of the lock; if not, it is taken out of the snapshot.
    fn check_pin(&self, commit: &str, file: &str) -> Result<(), Trouble> {
        let Some(locked) = self.pinned.and_then(|entry| entry.files.get(file)) else { return Ok(()) };
        let path = self.shelf.snapshot(commit).join(file);
        cache::check_hash(&path, &locked.hash()).map_err(|problem| {
            let _ = std::fs::remove_file(&path);
            Trouble::Hub(HubError::Wrong {
                repo: self.repo.clone(),
                file: file.into(),
                problem: Box::new(problem),
            })
        })
    }
}

/// Where a download begins.
struct Outset {
    commit: String,
    listing: Listing,
}

/// Why a download stops.
enum Trouble {
    /// The repository is somewhere else.
    Moved(String),
    Hub(HubError),
}

impl Trouble {
    fn into_error(self) -> HubError {
        match self {
            Trouble::Moved(_) => HubError::GivenUp,
            Trouble::Hub(error) => error,
        }
    }
}

impl From<HubError> for Trouble {
    fn from(error: HubError) -> Self {
        Trouble::Hub(error)
    }
}
