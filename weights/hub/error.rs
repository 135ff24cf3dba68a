use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::hash::Hash;
use super::id::{NameError, RepoId};

/// Why a repository could not be brought here, or is not what it should be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    /// Not the name of a repository.
    #[error("`{found}` is no repository: {problem}")]
    Id {
        /// What was given.
        found: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An environment variable that cannot be followed.
    #[error("{name}=`{found}`: {expected}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// Its value; never a token.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A token that cannot be sent. It is not shown.
    #[error("the token in {origin} holds spaces or characters that no token has")]
    Token {
        /// The variable or file.
        origin: String,
    },
    /// The network may not be used, and the cache does not have everything.
    #[error("{repo} is not complete in {} and the network is off: missing {}", folder.display(), missing.join(", "))]
    Offline {
        /// The repository.
        repo: RepoId,
        /// Where it was looked for.
        folder: PathBuf,
        /// What is missing.
        missing: Vec<String>,
    },
    /// The cache has nothing of it.
    #[error("{repo} is not in {}: `volary fetch {repo}` brings it there", folder.display())]
    NotCached {
        /// The repository.
        repo: RepoId,
        /// Where it was looked for.
        folder: PathBuf,
    },
    /// A file in the cache that is not what it was.
    #[error("{}: {problem}; the network is off, so it cannot be downloaded again", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: Box<Mismatch>,
    },
    /// A file name that would lead out of the snapshot.
    #[error("{repo}: the file name `{}` is refused: {problem}", name.escape_debug())]
    UnsafeName {
        /// The repository.
        repo: RepoId,
        /// The name as it was sent.
        name: String,
        /// What is wrong with it.
        problem: NameError,
    },
    /// Nothing of that name, or nothing that may be seen.
    #[error(
        "{repo}: no such repository at {endpoint}, or it is private: check the name, or set HF_TOKEN to a token that may read it"
    )]
    NoRepository {
        /// The repository.
        repo: RepoId,
        /// The hub.
        endpoint: String,
    },
    /// The repository has no such branch, tag or commit.
    #[error("{repo}: the repository has no branch, tag or commit `{revision}`")]
    NoRevision {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        revision: String,
    },
    /// A file that is listed and is not there.
    #[error("{repo}: the hub has no file `{file}` at {revision}")]
    NoFile {
        /// The repository.
        repo: RepoId,
        /// The file.
        file: String,
        /// The commit.
        revision: String,
    },
    /// The license has to be accepted first.
    #[error("{repo} is gated: accept its terms at {page}, then set HF_TOKEN to a token of that account")]
    Gated {
        /// The repository.
        repo: RepoId,
        /// Where to accept.
        page: String,
    },
    /// 401 or 403.
    #[error(
        "{url} was refused with status {status}: set HF_TOKEN to a token that may read {repo}{}",
        said(message)
    )]
    Denied {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        url: String,
        /// 401 or 403.
        status: u16,
        /// What the server said.
        message: String,
    },
    /// Another status than was hoped for.
    #[error("{url} answered with status {status}{}", said(message))]
    Status {
        /// What was asked for.
        url: String,
        /// The status.
        status: u16,
        /// What the server said.
        message: String,
        /// How long it asked to wait.
        wait: Option<Duration>,
    },
    /// No connection.
    #[error("{url} cannot be reached: {reason}")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// Why.
        reason: String,
    },
    /// No such host, or no network at all.
    #[error("{url} cannot be reached: no such host, or no network (`--offline` works from the cache alone)")]
    NoHost {
        /// What was asked for.
        url: String,
    },
    /// No trust in the connection.
    #[error("{url}: no secure connection: {reason}")]
    Insecure {
        /// What was asked for.
        url: String,
        /// Why.
        reason: String,
    },
    /// Silence.
    #[error("{url}: not a byte for {} s", wait.as_secs_f32())]
    Stalled {
        /// What was asked for.
        url: String,
        /// For how long.
        wait: Duration,
    },
    /// The connection ended early.
    #[error("{url}: the connection ended after {found} of {} bytes", known(*expected))]
    Cut {
        /// What was asked for.
        url: String,
        /// The size, if it is known.
        expected: Option<u64>,
        /// The bytes that came.
        found: u64,
    },
    /// Redirects without end, or to nowhere.
    #[error("{url}: {problem}")]
    Redirect {
        /// What was asked for.
        url: String,
        /// What is wrong.
        problem: String,
    },
    /// Something answered that is no hub.
    #[error(
        "{url} answered with a web page: this is no hub, a login page of the network (captive portal) or a proxy may be in the way"
    )]
    WebPage {
        /// What was asked for.
        url: String,
    },
    /// An answer that is not what the hub's interface promises.
    #[error("{url}: {problem}")]
    Answer {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Nothing says what the bytes should be.
    #[error(
        "{repo}: the server gives no hash (ETag) for `{file}`, so it cannot be verified: is the endpoint a hub?"
    )]
    Unverifiable {
        /// The repository.
        repo: RepoId,
        /// The file.
        file: String,
    },
    /// The server says two different things of one file.
    #[error("{repo}: the hub contradicts itself on `{file}`, its list and its answer differ: {problem}")]
    Contradiction {
        /// The repository.
        repo: RepoId,
        /// The file.
        file: String,
        /// The answer's hash, measured by that of the list.
        problem: Box<Mismatch>,
    },
    /// What came is not what was announced; it was thrown away.
    #[error("{repo}: `{file}`: {problem}; nothing of it is kept")]
    Wrong {
        /// The repository.
        repo: RepoId,
        /// The file.
        file: String,
        /// What is wrong.
        problem: Box<Mismatch>,
    },
    /// The server is at another commit than the one asked for.
    #[error("{repo}: asked for commit {expected}, the server answers with {found}")]
    OtherCommit {
        /// The repository.
        repo: RepoId,
        /// The commit asked for.
        expected: String,
        /// The commit of the answer.
        found: String,
    },
    /// A shard that the index names and the repository lacks.
    #[error("{repo}: `{index}` names `{shard}`, which the repository does not have")]
    NoShard {
        /// The repository.
        repo: RepoId,
        /// The index.
        index: String,
        /// The shard.
        shard: String,
    },
    /// An index that cannot be read.
    #[error("{repo}: `{index}` is no index of shards: {problem}")]
    Index {
        /// The repository.
        repo: RepoId,
        /// The index.
        index: String,
        /// What is wrong with it.
        problem: String,
    },
    /// None of the weights has the variant that was asked for.
    #[error("{repo} has no weights of the variant `{variant}`; it has {}", some(known))]
    NoVariant {
        /// The repository.
        repo: RepoId,
        /// What was asked for.
        variant: String,
        /// What there is.
        known: Vec<String>,
    },
    /// Several files that could each be the weights.
    #[error("{repo} has several files of weights; name one with --include: {}", some(found))]
    Ambiguous {
        /// The repository.
        repo: RepoId,
        /// The files.
        found: Vec<String>,
    },
    /// No file matches what was asked for.
    #[error("{repo} has no file that matches {}; it has {}", asked.join(", "), some(known))]
    NoMatch {
        /// The repository.
        repo: RepoId,
        /// The patterns.
        asked: Vec<String>,
        /// The files there are.
        known: Vec<String>,
    },
    /// The disk is full.
    #[error("{}: the disk is full after {written} of {} bytes", path.display(), known(*needed))]
    Full {
        /// The file that was written.
        path: PathBuf,
        /// Its size, if it is known.
        needed: Option<u64>,
        /// How much of it was written.
        written: u64,
    },
    /// The cache may not be written.
    #[error("{}: the cache cannot be written ({source}): set HF_HUB_CACHE to a folder that can", path.display())]
    ReadOnly {
        /// What could not be written.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The lock file cannot be read, or does not hold what it should.
    #[error("{}: {problem}", path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The header of a remote file cannot be read.
    #[error("{repo}: `{file}`: {problem}")]
    Header {
        /// The repository.
        repo: RepoId,
        /// The file.
        file: String,
        /// What is wrong.
        problem: String,
    },
    /// Another download failed first.
    #[error("given up because another file failed")]
    GivenUp,
}

/// What a file should be and is not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// Its bytes differ.
    #[error("its {} is {found}, expected {expected}", expected.kind())]
    Hash {
        /// The hash it should have.
        expected: Hash,
        /// The hash it has.
        found: Hash,
    },
    /// Its length differs.
    #[error("it has {found} bytes, expected {expected}")]
    Size {
        /// The size it should have.
        expected: u64,
        /// The size it has.
        found: u64,
    },
    /// It is not there.
    #[error("it is missing")]
    Missing,
    /// Nothing says what it should be.
    #[error("nothing says what its hash should be")]
    Unknown,
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" (the server says: {message})") }
}

fn known(size: Option<u64>) -> String {
    size.map_or("an unknown number of".into(), |size| size.to_string())
}

/// A list for a message: the first few, the rest counted.
fn some(names: &[String]) -> String {
    const SHOWN: usize = 12;
    match names.len() {
        0 => "none".into(),
        n if n <= SHOWN => names.join(", "),
        n => format!("{} and {} more", names[..SHOWN].join(", "), n - SHOWN),
    }
}

impl HubError {
    /// Whether trying again may help, and how long the server asks to wait before.
    pub(super) fn transient(&self) -> Option<Duration> {
        match self {
            HubError::Unreachable { .. } | HubError::Stalled { .. } | HubError::Cut { .. } => {
                Some(Duration::ZERO)
            }
            HubError::Status { status: 408 | 425 | 429 | 500..=599, wait, .. } => {
                Some(wait.unwrap_or_default())
            }
            _ => None,
        }
    }

    /// An error of writing below the cache.
    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    HubError::ReadOnly { path, source }
                }
                kind if is_full(kind) => HubError::Full { path, needed: None, written: 0 },
                _ => HubError::Io { path, source },
            }
        }
    }
}

/// Whether there is no more room.
pub(super) fn is_full(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge)
}
