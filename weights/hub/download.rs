//! One file: resumed where it broke off, hashed as it comes, named only when it is right.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use ureq::http::StatusCode;
use ureq::http::header::{CONTENT_RANGE, HeaderMap};

use super::cache::Known;
use super::client::{Client, Linked, Meta, Part, Patience};
use super::error::{HubError, Mismatch, is_full};
use super::hash::{Hash, Hasher};
use super::id::RepoId;

/// So much is read at once.
const CHUNK: usize = 256 << 10;
/// So many bytes between two failures make all before forgotten.
const PROGRESS: u64 = 1 << 20;
/// How often fewer bytes do so too.
const SMALL_STEPS: u32 = 100;
/// How often a file that came wrong is fetched again from its start.
const FRESH_STARTS: u32 = 1;

/// A file to be downloaded.
pub(super) struct Wanted<'a> {
    pub(super) repo: &'a RepoId,
    /// The repository that is asked, which may have another name by now.
    pub(super) name: &'a str,
    pub(super) commit: &'a str,
    pub(super) file: &'a str,
    pub(super) hash: &'a Hash,
    /// What the list says; the answer's own word counts for more.
    pub(super) size: Option<u64>,
}

/// Told how far a file is.
pub trait Bar: Send {
    /// So many bytes are here, of so many, if that is known.
    fn at(&mut self, here: u64, of: Option<u64>);
}

/// A bar that nobody sees.
pub(super) struct NoBar;

impl Bar for NoBar {
    fn at(&mut self, _: u64, _: Option<u64>) {}
}

/// What is here of a file.
struct Partial<'a> {
    path: &'a Path,
    file: File,
    /// How many bytes.
    here: u64,
    /// Their hash.
    hasher: Hasher,
}

impl Partial<'_> {
    fn restart(&mut self) -> Result<(), HubError> {
        self.here = 0;
        self.hasher = Hasher::default();
        let cut = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        cut.map(drop).map_err(HubError::write(self.path))
    }

    fn add(&mut self, bytes: &[u8], needed: Option<u64>) -> Result<(), HubError> {
        self.file.write_all(bytes).map_err(|error| match error.kind() {
            kind if is_full(kind) => {
                // what did land is the resumed download's
                let written = self.file.metadata().map_or(self.here, |metadata| metadata.len());
                HubError::Full { path: self.path.into(), needed, written }
            }
            _ => HubError::write(self.path)(error),
        })?;
        self.hasher.add(bytes);
        self.here += bytes.len() as u64;
        Ok(())
    }
}

/// Downloads into `path` until its content has the hash that it should have. Returns its size.
///
/// # Errors
/// Whatever does not pass. What came so far stays at `path`, unless it is wrong.
pub(super) fn download(
    client: &Client,
    wanted: &Wanted,
    path: &Path,
    bar: &mut dyn Bar,
    give_up: &AtomicBool,
) -> Result<u64, HubError> {
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).truncate(false).open(path);
    let mut file = file.map_err(HubError::write(path))?;
    let mut hasher = Hasher::default();
    let here = hasher.add_file(&mut file).map_err(HubError::write(path))?;
    let mut partial = Partial { path, file, here, hasher };

    let mut patience = Patience::default();
    let (mut fresh_starts, mut small_steps) = (0, 0);
    loop {
        let before = partial.here;
        let wrong = match attempt(client, wanted, &mut partial, bar, give_up) {
            Ok(()) => {
                partial.file.sync_all().map_err(HubError::write(path))?;
                let found = match wanted.hash {
                    Hash::Sha256(_) => partial.hasher.clone().finish(),
                    git => git.of_file_like(path).map_err(HubError::write(path))?,
                };
                if found == *wanted.hash {
                    return Ok(partial.here);
                }
                HubError::Wrong {
                    repo: wanted.repo.clone(),
                    file: wanted.file.into(),
                    problem: Box::new(Mismatch::Hash { expected: wanted.hash.clone(), found }),
                }
            }
            Err(error @ HubError::Wrong { .. }) => error,
            Err(error) => {
                let gained = partial.here.saturating_sub(before);
                // a server that falls silent again and again is not waited for by small steps
                let is_cut = matches!(error, HubError::Cut { .. });
                if gained >= PROGRESS {
                    small_steps = 0;
                    patience.restore();
                } else if gained > 0 && is_cut && small_steps < SMALL_STEPS {
                    small_steps += 1;
                    patience.restore();
                }
                patience.wait(error)?;
                continue;
            }
        };
        partial.restart()?;
        fresh_starts += 1;
        if fresh_starts > FRESH_STARTS {
            drop(partial);
            let _ = std::fs::remove_file(path);
            return Err(wrong);
        }
    }
}

/// Asks once for what is missing, and takes what comes.
fn attempt(
    client: &Client,
    wanted: &Wanted,
    partial: &mut Partial,
    bar: &mut dyn Bar,
    give_up: &AtomicBool,
) -> Result<(), HubError> {
    match wanted.size {
        Some(size) if partial.here == size && size > 0 => return Ok(()),
        Some(size) if partial.here > size => partial.restart()?,
        _ => {}
    }
    let ask = |part| client.file(wanted.repo, wanted.name, wanted.commit, wanted.file, part);
    let mut answer = ask(if partial.here > 0 { Part::From(partial.here) } else { Part::Whole })?;
    if answer.status == StatusCode::RANGE_NOT_SATISFIABLE
        || answer.status == StatusCode::PARTIAL_CONTENT && start(&answer.headers) != Some(partial.here)
    {
        partial.restart()?;
        answer = ask(Part::Whole)?;
    }
    check_meta(wanted, &answer.meta)?;
    let is_part = match answer.status {
        StatusCode::OK => {
            partial.restart()?;
            false
        }
        StatusCode::PARTIAL_CONTENT if start(&answer.headers) == Some(partial.here) => true,
        status => {
            return Err(HubError::Status {
                url: answer.url,
                status: status.as_u16(),
                message: String::new(),
                wait: None,
            });
        }
    };
    let plain = if is_part { total(&answer.headers) } else { length(&answer.headers) };
    let linked = answer.meta.size.filter(|_| answer.meta.linked == Linked::Elsewhere);
    let size = linked.or(plain).or(wanted.size);

    let mut chunk = vec![0; CHUNK];
    loop {
        bar.at(partial.here, size);
        if give_up.load(Ordering::Relaxed) {
            return Err(HubError::GivenUp);
        }
        let read = match answer.body.read(&mut chunk) {
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(client.broken_body(&answer.url, &error, partial.here, size)),
        };
        if read == 0 {
            break;
        }
        let after = partial.here + read as u64;
        if let Some(expected) = size.filter(|&size| after > size) {
            let problem = Box::new(Mismatch::Size { expected, found: after });
            return Err(HubError::Wrong { repo: wanted.repo.clone(), file: wanted.file.into(), problem });
        }
        partial.add(&chunk[..read], size)?;
    }
    match size {
        Some(size) if partial.here < size => {
            Err(HubError::Cut { url: answer.url, expected: Some(size), found: partial.here })
        }
        _ => Ok(()),
    }
}

/// Whether the answer is about the file that was asked for.
fn check_meta(wanted: &Wanted, meta: &Meta) -> Result<(), HubError> {
    if let Some(commit) = meta.commit.as_deref().filter(|commit| *commit != wanted.commit) {
        return Err(HubError::OtherCommit {
            repo: wanted.repo.clone(),
            expected: wanted.commit.into(),
            found: commit.into(),
        });
    }
    // Of a linked content whose ETag is not given, the ETag is that of the pointer, or anything.
    let said = meta.etag.as_deref().and_then(Hash::parse);
    match said {
        Some(said) if said != *wanted.hash && said.kind() == wanted.hash.kind() => {
            Err(HubError::Contradiction {
                repo: wanted.repo.clone(),
                file: wanted.file.into(),
                problem: Box::new(Mismatch::Hash { expected: wanted.hash.clone(), found: said }),
            })
        }
        _ => Ok(()),
    }
}

/// What the hub's word on a file amounts to, where no list has it.
pub(super) fn known(meta: &Meta) -> Known {
    Known { size: meta.size, hash: meta.etag.as_deref().and_then(Hash::parse) }
}

/// The first byte of `bytes 5-9/10`.
fn start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(CONTENT_RANGE)?.to_str().ok()?.trim().strip_prefix("bytes ")?;
    range.split('-').next()?.trim().parse().ok()
}

/// The total of `bytes 5-9/10`.
fn total(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_RANGE)?.to_str().ok()?.rsplit('/').next()?.trim().parse().ok()
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(ureq::http::header::CONTENT_LENGTH)?.to_str().ok()?.trim().parse().ok()
}
