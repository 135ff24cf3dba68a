//! The cache in the layout of Python's huggingface_hub:
//!
//! ```text
//! models--owner--name/refs/main                     a commit
//! models--owner--name/snapshots/COMMIT/config.json  -> ../../blobs/HASH
//! models--owner--name/blobs/HASH                    contents by their hash, HASH.incomplete while they come
//! models--owner--name/trees/COMMIT.json             every file of a commit, where Python listed them
//! models--owner--name/.volary/COMMIT.json           the same where we did
//! .locks/models--owner--name/HASH.lock              held by whoever downloads the content
//! ```
//!
//! Our list is not in `trees`: Python takes a snapshot for broken that lacks any file of a list there, and we leave out
//! what no system needs.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::environment::Placing;
use super::error::{HubError, Mismatch};
use super::hash::Hash;
use super::id::{RepoId, check_path, is_commit};

/// Files up to this size are hashed whenever they are used.
const SMALL: u64 = 1 << 20;

/// A folder with repositories.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    pub(super) root: PathBuf,
    pub(super) placing: Placing,
}

/// One repository in it.
#[derive(Debug, Clone)]
pub(super) struct Shelf {
    folder: PathBuf,
    locks: PathBuf,
    placing: Placing,
}

/// Every file of a commit with what is known of it.
pub(super) type Listing = BTreeMap<String, Known>;

/// What is known of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) size: Option<u64>,
    pub(super) hash: Option<Hash>,
}

/// Who wrote a list, and with it decided which of its files to bring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum By {
    Us,
    Python,
}

/// How well a cached file is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Look {
    /// Its size, its header, its hash if it is small.
    Quick,
    /// Every byte.
    Full,
}

/// A lock on a content, held until it is dropped.
pub(super) struct Guard {
    _file: Option<File>,
}

/// Python's format of a list.
#[derive(Serialize, Deserialize)]
struct Tree {
    format_version: u32,
    files: BTreeMap<String, TreeFile>,
}

#[derive(Serialize, Deserialize)]
struct TreeFile {
    #[serde(skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    blob_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_sha256: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lfs_size: Option<u64>,
}

impl Cache {
    pub(super) fn shelf(&self, repo: &RepoId) -> Shelf {
        let name = format!("models--{}", repo.name.replace('/', "--"));
        Shelf {
            folder: self.root.join(&name),
            locks: self.root.join(".locks").join(name),
            placing: self.placing,
        }
    }

    /// Makes the folder, and says to backup programs that they may leave it out.
    pub(super) fn make(&self) -> Result<(), HubError> {
        fs::create_dir_all(&self.root).map_err(HubError::write(&self.root))?;
        let tag = self.root.join("CACHEDIR.TAG");
        if !tag.exists() {
            let _ = fs::write(tag, "Signature: 8a477f597d28d172789f06886806bc55\n");
        }
        Ok(())
    }
}

impl Shelf {
    /// The commit that a branch or tag was at when it was last asked for.
    pub(super) fn reference(&self, revision: &str) -> Option<String> {
        let commit = fs::read_to_string(self.folder.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(super) fn set_reference(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if revision == commit || self.reference(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        write_whole(&self.folder.join("refs").join(revision), commit.as_bytes())
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    pub(super) fn blob(&self, hash: &Hash) -> PathBuf {
        self.folder.join("blobs").join(hash.digits())
    }

    pub(super) fn incomplete(&self, hash: &Hash) -> PathBuf {
        self.folder.join("blobs").join(format!("{hash}.incomplete"))
    }

    pub(super) fn make_blobs(&self) -> Result<(), HubError> {
        let blobs = self.folder.join("blobs");
        fs::create_dir_all(&blobs).map_err(HubError::write(&blobs))
    }

    /// The names of the files in a snapshot, with `/`.
    pub(super) fn files(&self, commit: &str) -> Vec<String> {
        let root = self.snapshot(commit);
        let (mut files, mut open) = (Vec::new(), vec![String::new()]);
        while let Some(folder) = open.pop() {
            for entry in fs::read_dir(root.join(&folder)).into_iter().flatten().flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
                match fs::metadata(entry.path()) {
                    Ok(metadata) if metadata.is_dir() => open.push(name),
                    Ok(_) => files.push(name),
                    // a link to nothing
                    Err(_) => {}
                }
            }
        }
        files.sort();
        files
    }

    /// The files of a commit, if they were listed, and by whom.
    pub(super) fn listed(&self, commit: &str) -> Option<(Listing, By)> {
        let read = |folder: &str| -> Option<Listing> {
            let text = fs::read(self.folder.join(folder).join(format!("{commit}.json"))).ok()?;
            let tree: Tree =
                serde_json::from_slice(&text).ok().filter(|tree: &Tree| tree.format_version == 1)?;
            let files = tree.files.into_iter().filter(|(name, _)| check_path(name).is_ok());
            Some(files.map(|(name, file)| (name, file.known())).collect())
        };
        let ours = read(".volary").map(|listing| (listing, By::Us));
        ours.or_else(|| read("trees").map(|listing| (listing, By::Python)))
    }

    /// The files of a commit, if they were listed.
    pub(super) fn listing(&self, commit: &str) -> Option<Listing> {
        self.listed(commit).map(|(listing, _)| listing)
    }

    pub(super) fn set_listing(&self, commit: &str, listing: &Listing) -> Result<(), HubError> {
        let files = listing.iter().map(|(name, known)| (name.clone(), TreeFile::of(known))).collect();
        let text = serde_json::to_vec_pretty(&Tree { format_version: 1, files }).unwrap_or_default();
        write_whole(&self.folder.join(".volary").join(format!("{commit}.json")), &text)
    }

    /// What the content of a snapshot's file is called: by the link that leads to it, else by the list.
    pub(super) fn hash(&self, path: &Path, known: Option<&Known>) -> Option<Hash> {
        let link = fs::read_link(path).ok();
        let name = link.as_ref().and_then(|to| to.file_name()?.to_str());
        name.and_then(Hash::parse).or_else(|| known?.hash.clone())
    }

    /// Whether a file of a snapshot is there and what it should be.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn check(&self, path: &Path, known: Option<&Known>, look: Look) -> Result<(), Mismatch> {
        let found = fs::metadata(path).map_err(|_| Mismatch::Missing)?.len();
        let named = self.hash(path, None);
        let expected = known.and_then(|known| known.hash.clone());
        if let (Some(expected), Some(found)) = (&expected, &named)
            && expected != found
        {
            return Err(Mismatch::Hash { expected: expected.clone(), found: found.clone() });
        }
        if let Some(expected) = known.and_then(|known| known.size)
            && expected != found
        {
            return Err(Mismatch::Size { expected, found });
        }
        match (named.or(expected), look) {
            (Some(hash), _) if look == Look::Full || found <= SMALL => check_hash(path, &hash),
            (None, Look::Full) => Err(Mismatch::Unknown),
            _ => check_end(path, found),
        }
    }

    /// Makes a snapshot's file lead to a content that is there.
    pub(super) fn place(&self, commit: &str, name: &str, hash: &Hash) -> Result<(), HubError> {
        let path = self.snapshot(commit).join(name);
        if self.placing == Placing::Link && fs::read_link(&path).is_ok_and(|to| to.ends_with(hash.digits())) {
            return Ok(());
        }
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(HubError::write(folder))?;
        let own = path.file_name().unwrap_or_default().to_string_lossy();
        let new = path.with_file_name(format!(".{own}.{}.tmp", std::process::id()));
        let up = "../".repeat(2 + name.matches('/').count());
        let placed = match self.placing {
            Placing::Link => link(Path::new(&format!("{up}blobs/{hash}")), &new),
            Placing::Copy => Err(io::ErrorKind::Unsupported.into()),
        };
        // Some systems and file systems have no links.
        let placed = placed.or_else(|_| fs::copy(self.blob(hash), &new).map(drop));
        placed.and_then(|()| fs::rename(&new, &path)).map_err(|source| {
            let _ = fs::remove_file(&new);
            HubError::write(&path)(source)
        })
    }

    /// Takes a wrong content away, so that it is never served again.
    pub(super) fn discard(&self, path: &Path) -> Result<(), HubError> {
        if let Ok(link) = fs::read_link(path)
            && let Some(name) = link.file_name()
        {
            remove(&self.folder.join("blobs").join(name))?;
        }
        remove(path)
    }

    /// Waits until no other process downloads this content, ours or Python's.
    pub(super) fn lock(&self, hash: &Hash) -> Result<Guard, HubError> {
        fs::create_dir_all(&self.locks).map_err(HubError::write(&self.locks))?;
        let path = self.locks.join(format!("{hash}.lock"));
        loop {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false);
            #[cfg(unix)]
            std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o664); // as Python: groups share caches
            let file = options.open(&path).map_err(HubError::write(&path))?;
            match file.lock() {
                Ok(()) if is_still(&file, &path) => return Ok(Guard { _file: Some(file) }),
                // whoever held it took the file away
                Ok(()) => {}
                // A file system without locks: two downloads may disturb each other, which their hashes show.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => return Ok(Guard { _file: None }),
                Err(error) => return Err(HubError::write(&path)(error)),
            }
        }
    }
}

impl TreeFile {
    fn known(self) -> Known {
        match self.lfs_sha256 {
            Some(sha256) => Known { size: self.lfs_size.or(self.size), hash: Hash::parse(&sha256) },
            None => Known { size: self.size, hash: self.blob_id.as_deref().and_then(Hash::parse) },
        }
    }

    fn of(known: &Known) -> Self {
        let sha256 = known.hash.as_ref().filter(|hash| matches!(hash, Hash::Sha256(_)));
        let git = known.hash.as_ref().filter(|hash| matches!(hash, Hash::Git(_)));
        Self {
            size: known.size,
            blob_id: git.map(ToString::to_string),
            lfs_size: known.size.filter(|_| sha256.is_some()),
            lfs_sha256: sha256.map(ToString::to_string),
        }
    }
}

/// Whether a file's content has this hash.
///
/// # Errors
/// If not, or if it cannot be read.
pub(super) fn check_hash(path: &Path, expected: &Hash) -> Result<(), Mismatch> {
    let found = expected.of_file_like(path).map_err(|_| Mismatch::Missing)?;
    if found == *expected { Ok(()) } else { Err(Mismatch::Hash { expected: expected.clone(), found }) }
}

/// Whether a safetensors file is as long as its header says.
fn check_end(path: &Path, found: u64) -> Result<(), Mismatch> {
    if path.extension().is_none_or(|extension| extension != "safetensors") {
        return Ok(());
    }
    let read = || -> Option<u64> {
        use std::io::Read;
        let mut file = File::open(path).ok()?;
        let mut length = [0; 8];
        file.read_exact(&mut length).ok()?;
        let length = u64::from_le_bytes(length);
        if length > found.min(100_000_000) {
            return Some(length.saturating_add(8));
        }
        let mut header = Vec::new();
        file.take(length).read_to_end(&mut header).ok()?;
        let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
        let ends = header.as_object()?.values().filter_map(|tensor| tensor["data_offsets"][1].as_u64());
        Some(ends.max().unwrap_or(0).saturating_add(8 + length))
    };
    match read() {
        Some(expected) if expected != found => Err(Mismatch::Size { expected, found }),
        // whoever reads the weights says what is wrong with the header
        _ => Ok(()),
    }
}

/// Writes a file that is either not there or whole.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), HubError> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(HubError::write(folder))?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let new = folder.join(format!(".{name}.{}.tmp", std::process::id()));
    let write = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write().map_err(|source| {
        let _ = fs::remove_file(&new);
        HubError::write(path)(source)
    })
}

fn remove(path: &Path) -> Result<(), HubError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(HubError::write(path)(error)),
        _ => Ok(()),
    }
}

#[cfg(unix)]
fn link(to: &Path, at: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(to, at)
}

#[cfg(windows)]
fn link(to: &Path, at: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(to.to_string_lossy().replace('/', "\\"), at)
}

#[cfg(not(any(unix, windows)))]
fn link(_: &Path, _: &Path) -> io::Result<()> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether the open file is still the one of that name.
#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}
