use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::f16;
use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use memmap2::Mmap;
use sha2::{Digest, Sha256};

const _: () = assert!(cfg!(target_endian = "little"), "vectors are mapped as they are stored: little-endian");

/// A SHA-256 that stands for a model: vectors of two models cannot be compared.
pub type ModelHash = [u8; 32];

const MAGIC: [u8; 8] = *b"VOLARYIX";
const VERSION: u32 = 1;
/// Bytes before the vectors.
const HEAD: usize = 96;

/// Why a file of vectors could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VectorFileError {
    /// The file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It does not begin as such a file does.
    #[error("{}: not an index: it does not begin with VOLARYIX", path.display())]
    NotAnIndex {
        /// The file.
        path: PathBuf,
    },
    /// Another program's, or a later one's.
    #[error("{}: version {found} of the index format; this program knows version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// What it says.
        found: u32,
    },
    /// Its length is not what its header says.
    #[error("{}: truncated or damaged: by its header it is {expected} bytes long, and it has {found}", path.display())]
    Length {
        /// The file.
        path: PathBuf,
        /// Bytes by the header.
        expected: String,
        /// Bytes there are.
        found: u64,
    },
    /// Header or notes are not those that were written.
    #[error("{}: damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// Another model made it.
    #[error("{}: made by another model (its hash begins with {found}, this model's with {expected})", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// The hash that was wanted, its first eight digits.
        expected: String,
        /// The hash in the file, its first eight digits.
        found: String,
    },
    /// Vectors of another width.
    #[error("{}: vectors of {found} numbers; this model's have {expected}", path.display())]
    Width {
        /// The file.
        path: PathBuf,
        /// The width that was wanted.
        expected: usize,
        /// The width in the file.
        found: usize,
    },
}

impl VectorFileError {
    pub(super) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { path: path.into(), source }
    }
}

/// What stands before the vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    pub model: ModelHash,
    pub d_embed: usize,
    pub rows: usize,
    pub notes: usize,
}

impl Head {
    /// The header's bytes, for these notes.
    pub fn bytes(&self, notes: &[u8]) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&(self.d_embed as u32).to_le_bytes());
        bytes[16..24].copy_from_slice(&(self.rows as u64).to_le_bytes());
        bytes[24..32].copy_from_slice(&(self.notes as u64).to_le_bytes());
        bytes[32..64].copy_from_slice(&self.model);
        let digest = Sha256::new().chain_update(&bytes[..64]).chain_update(notes).finalize();
        bytes[64..].copy_from_slice(&digest);
        bytes
    }

    /// The header at the beginning of `bytes`, and where its vectors and notes lie. They all lie within `bytes`; what
    /// comes after them is the caller's.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<(Self, Range<usize>, Range<usize>), VectorFileError> {
        let path = || path.to_owned();
        if !bytes.starts_with(&MAGIC[..bytes.len().min(8)]) || bytes.is_empty() {
            return Err(VectorFileError::NotAnIndex { path: path() });
        }
        let found = bytes.len() as u64;
        let length = |expected: String| VectorFileError::Length { path: path(), expected, found };
        let Some(head) = bytes.first_chunk::<HEAD>() else {
            return Err(length(format!("at least {HEAD}")));
        };
        let u32_at = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        match u32_at(8) {
            VERSION => {}
            found => return Err(VectorFileError::Version { path: path(), found }),
        }
        let (d_embed, rows, notes) = (u64::from(u32_at(12)), u64_at(16), u64_at(24));
        let end = |start: u64, bytes: Option<u64>| start.checked_add(bytes?);
        let vectors_end = end(HEAD as u64, rows.checked_mul(2 * d_embed));
        let notes_end = vectors_end.and_then(|start| end(start, Some(notes)));
        let (Some(vectors_end), Some(notes_end)) = (vectors_end, notes_end) else {
            return Err(length("more than can be counted".into()));
        };
        if notes_end > found {
            return Err(length(notes_end.to_string()));
        }
        let (vectors_end, notes_end) = (vectors_end as usize, notes_end as usize);
        let mut model = [0; 32];
        model.copy_from_slice(&head[32..64]);
        let parsed = Self { model, d_embed: d_embed as usize, rows: rows as usize, notes: notes as usize };
        if parsed.bytes(&bytes[vectors_end..notes_end])[64..] != head[64..] {
            let what = "header and notes are not those that were written";
            return Err(VectorFileError::Damaged { path: path(), what });
        }
        if d_embed == 0 {
            return Err(VectorFileError::Damaged { path: path(), what: "its vectors have no width" });
        }
        Ok((parsed, HEAD..vectors_end, vectors_end..notes_end))
    }

    /// Whether vectors of this model and width belong to it.
    pub fn expect(&self, model: &ModelHash, d_embed: usize, path: &Path) -> Result<(), VectorFileError> {
        let short = |hash: &ModelHash| hash[..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        if self.model != *model {
            let (expected, found) = (short(model), short(&self.model));
            return Err(VectorFileError::Model { path: path.into(), expected, found });
        }
        if self.d_embed != d_embed {
            let (expected, found) = (d_embed, self.d_embed);
            return Err(VectorFileError::Width { path: path.into(), expected, found });
        }
        Ok(())
    }
}

/// Vectors of one model in f16, mapped from a file, with notes of whoever wrote it.
///
/// The file, little-endian:
///
/// | bytes | what |
/// |---|---|
/// | 0..8 | `VOLARYIX` |
/// | 8..12 | version of the format: 1 |
/// | 12..16 | `d_embed` |
/// | 16..24 | `rows` |
/// | 24..32 | bytes of the notes |
/// | 32..64 | SHA-256 that stands for the model |
/// | 64..96 | SHA-256 of bytes 0..64 and the notes |
/// | 96.. | vectors, `[rows, d_embed]`, f16 |
/// | then | notes |
///
/// It is replaced as a whole and never changed ([`write_vectors`]); no other program may change it while it is mapped.
pub struct VectorFile {
    map: Mmap,
    head: Head,
    vectors: Range<usize>,
    notes: Range<usize>,
}

impl VectorFile {
    /// Maps a file of this model's vectors.
    ///
    /// # Errors
    /// If it cannot be read; if it is no such file, of another version, truncated, damaged in header or notes, or
    /// another model's. The vectors' own bytes are not checked: that would read them all.
    pub fn open(path: &Path, model: &ModelHash, d_embed: usize) -> Result<Self, VectorFileError> {
        let file = File::open(path).map_err(VectorFileError::io(path))?;
        let metadata = file.metadata().map_err(VectorFileError::io(path))?;
        if !metadata.is_file() || metadata.len() == 0 {
            return Err(VectorFileError::NotAnIndex { path: path.into() });
        }
        // SAFETY: the mapping is read-only, and its bytes are only ever read as numbers. We replace such files and never
        // change them; that no other program does is said above.
        let map = unsafe { Mmap::map(&file) }.map_err(VectorFileError::io(path))?;
        let (head, vectors, notes) = Head::parse(&map, path)?;
        if notes.end != map.len() {
            let (expected, found) = (notes.end.to_string(), map.len() as u64);
            return Err(VectorFileError::Length { path: path.into(), expected, found });
        }
        head.expect(model, d_embed, path)?;
        Ok(Self { map, head, vectors, notes })
    }

    /// How many vectors there are.
    pub fn rows(&self) -> usize {
        self.head.rows
    }

    /// `[rows, d_embed]`
    pub fn vectors(&self) -> &[f16] {
        bytemuck::cast_slice::<u8, u16>(&self.map[self.vectors.clone()]).reinterpret_cast()
    }

    /// What the writer noted beside them.
    pub fn notes(&self) -> &[u8] {
        &self.map[self.notes.clone()]
    }
}

/// Writes the file that [`VectorFile`] maps, `rows` each of width `d_embed`. It replaces what has that name all at
/// once: until then, and if anything fails, the old file stays; who has mapped the old one keeps it.
///
/// # Errors
/// If it cannot be written.
///
/// # Panics
/// If a row is not `d_embed` wide, or there are not `rows` of them.
pub fn write_vectors<'a>(
    path: &Path,
    model: &ModelHash,
    [rows, d_embed]: [usize; 2],
    vectors: impl Iterator<Item = &'a [f16]>,
    notes: &[u8],
) -> Result<(), VectorFileError> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}.partial", std::process::id()));
    let partial = path.with_file_name(name);
    let head = Head { model: *model, d_embed, rows, notes: notes.len() };
    let write = || -> std::io::Result<()> {
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&partial)?;
        let mut out = BufWriter::with_capacity(1 << 20, &file);
        out.write_all(&head.bytes(notes))?;
        let mut written = 0;
        for row in vectors {
            assert_eq!(row.len(), d_embed, "rows are as wide as the header says");
            out.write_all(bytes_of(row))?;
            written += 1;
        }
        assert_eq!(written, rows, "as many rows as the header says");
        out.write_all(notes)?;
        out.flush()?;
        file.sync_all()?;
        std::fs::rename(&partial, path)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&partial); // the failure matters, not what is left of it
        VectorFileError::io(path)(error)
    })
}

/// The values as they are stored.
pub(super) fn bytes_of(values: &[f16]) -> &[u8] {
    bytemuck::cast_slice(values.reinterpret_cast())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MODEL: ModelHash = [7; 32];

    fn halves(values: &[f32]) -> Vec<f16> {
        values.iter().copied().map(f16::from_f32).collect()
    }

    fn written(rows: usize, d_embed: usize, notes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        let vectors: Vec<f16> = (0..rows * d_embed).map(|i| f16::from_f32(i as f32)).collect();
        write_vectors(&path, &MODEL, [rows, d_embed], vectors.chunks_exact(d_embed), notes).unwrap();
        (folder, path)
    }

    fn refusal(path: &Path) -> String {
        match VectorFile::open(path, &MODEL, 3) {
            Ok(_) => panic!("{} was opened", path.display()),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn what_was_written_is_read() {
        let (folder, path) = written(2, 3, b"notes");
        let file = VectorFile::open(&path, &MODEL, 3).unwrap();
        assert_eq!((file.rows(), file.notes()), (2, &b"notes"[..]));
        assert_eq!(file.vectors(), halves(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        // replaced under a reader: it keeps what it has mapped
        write_vectors(&path, &MODEL, [0, 3], std::iter::empty(), b"").unwrap();
        assert_eq!(file.vectors().len(), 6);
        assert_eq!(VectorFile::open(&path, &MODEL, 3).unwrap().vectors(), []);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half-written is left");
    }

    #[test]
    fn a_failed_write_leaves_the_old_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("index");
        std::fs::create_dir(&path).unwrap(); // a folder cannot be replaced by a file
        assert!(write_vectors(&path, &MODEL, [0, 3], std::iter::empty(), b"").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(path.is_dir());
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        let (_folder, path) = written(2, 3, b"notes");
        let whole = std::fs::read(&path).unwrap();
        let told = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            std::fs::write(&path, bytes).unwrap();
            refusal(&path)
        };
        assert!(told(&|bytes| bytes.clear()).ends_with("not an index: it does not begin with VOLARYIX"));
        assert!(told(&|bytes| bytes[0] = b'v').contains("not an index"));
        assert!(told(&|bytes| bytes[8] = 9).contains("version 9 of the index format"));
        assert!(told(&|bytes| bytes.truncate(50)).contains("it is at least 96 bytes long, and it has 50"));
        assert!(told(&|bytes| bytes.truncate(110)).contains("it is 113 bytes long, and it has 110"));
        assert!(told(&|bytes| bytes.push(0)).contains("it is 113 bytes long, and it has 114"));
        assert!(told(&|bytes| bytes[16] = 200).contains("it is 1301 bytes long"), "a lying header");
        assert!(told(&|bytes| bytes[16..24].fill(0xFF)).contains("more than can be counted"));
        assert!(told(&|bytes| bytes[109] ^= 1).contains("header and notes are not those that were written"));
        assert!(told(&|bytes| bytes[33] ^= 1).contains("header and notes"));
        std::fs::write(&path, &whole).unwrap();
        let other = VectorFile::open(&path, &[8; 32], 3).err().unwrap().to_string();
        assert!(other.contains("made by another model (its hash begins with 07070707"), "{other}");
        let wider = VectorFile::open(&path, &MODEL, 4).err().unwrap().to_string();
        assert!(wider.contains("vectors of 3 numbers; this model's have 4"), "{wider}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        /// However header and notes are damaged, and wherever the file ends, it is refused and nothing panics.
        #[test]
        fn damage_is_refused(at in 0_usize..101, bit in 0_u32..8, cut in 0_usize..113) {
            let (_folder, path) = written(2, 3, b"notes");
            let mut bytes = std::fs::read(&path).unwrap();
            std::fs::write(&path, &bytes[..cut]).unwrap();
            prop_assert!(VectorFile::open(&path, &MODEL, 3).is_err());
            let at = if at < HEAD { at } else { at + 12 }; // not the vectors
            bytes[at] ^= 1 << bit;
            std::fs::write(&path, &bytes).unwrap();
            prop_assert!(VectorFile::open(&path, &MODEL, 3).is_err(), "byte {at}");
        }
    }
}
