use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use half::f16;
use half::slice::HalfBitsSliceExt;

use super::file::{Head, ModelHash, VectorFileError, bytes_of};

/// Vectors on their way into a [`VectorFile`](super::VectorFile): appended batch by batch, so that a program that is
/// killed loses at most the batch at hand.
///
/// The file is a row of segments, each of the form of a `VectorFile`. A last segment that was not written whole is cut
/// off when the journal is opened again. Who has it open has it alone.
pub struct Journal {
    path: PathBuf,
    file: File,
    model: ModelHash,
    d_embed: usize,
}

/// What one call of [`Journal::append`] wrote.
#[derive(Debug, PartialEq)]
pub struct Segment {
    /// `[rows, d_embed]`
    pub vectors: Vec<f16>,
    /// What was noted beside them.
    pub notes: Vec<u8>,
}

impl Journal {
    /// Opens or makes a journal and returns what is in it. Waits for whoever has it open.
    ///
    /// # Errors
    /// If it cannot be read or written, is no journal, or another model's vectors are in it.
    pub fn open(
        path: &Path,
        model: &ModelHash,
        d_embed: usize,
    ) -> Result<(Self, Vec<Segment>), VectorFileError> {
        let io = || VectorFileError::io(path);
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io())?;
        file.lock().map_err(io())?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(io())?;
        let (mut segments, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            let (head, vectors, notes) = match Head::parse(&bytes[at..], path) {
                Ok(parts) => parts,
                // somebody else's file
                Err(error @ VectorFileError::NotAnIndex { .. }) if at == 0 => return Err(error),
                Err(_) => break,
            };
            head.expect(model, d_embed, path)?;
            let values = bytes[at..][vectors].as_chunks::<2>().0;
            let bits: Vec<u16> = values.iter().map(|bytes| u16::from_le_bytes(*bytes)).collect();
            let (vectors, end) = (bits.reinterpret_cast().to_vec(), notes.end);
            segments.push(Segment { vectors, notes: bytes[at..][notes].to_vec() });
            at += end;
        }
        if at < bytes.len() {
            file.set_len(at as u64).map_err(io())?;
        }
        file.seek(SeekFrom::Start(at as u64)).map_err(io())?;
        Ok((Self { path: path.into(), file, model: *model, d_embed }, segments))
    }

    /// Adds a segment; when this returns, it is on disk.
    ///
    /// # Errors
    /// If it cannot be written.
    ///
    /// # Panics
    /// If `vectors` is not whole rows.
    pub fn append(&mut self, vectors: &[f16], notes: &[u8]) -> Result<(), VectorFileError> {
        assert!(vectors.len().is_multiple_of(self.d_embed), "whole rows");
        let rows = vectors.len() / self.d_embed;
        let head = Head { model: self.model, d_embed: self.d_embed, rows, notes: notes.len() };
        let segment = [&head.bytes(notes), bytes_of(vectors), notes].concat();
        let written = self.file.write_all(&segment).and_then(|()| self.file.sync_data());
        written.map_err(VectorFileError::io(&self.path))
    }

    /// Ends it, once what it holds is elsewhere.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn remove(self) -> Result<(), VectorFileError> {
        std::fs::remove_file(&self.path).map_err(VectorFileError::io(&self.path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEL: ModelHash = [3; 32];

    /// Wherever the last segment breaks off, those before it are there, and the journal goes on after them.
    #[test]
    fn whole_segments_survive() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let segment = |value: f32, note: &str| Segment {
            vectors: vec![f16::from_f32(value); 2],
            notes: note.as_bytes().to_vec(),
        };
        let (mut journal, found) = Journal::open(&path, &MODEL, 2).unwrap();
        assert_eq!(found, []);
        let mut ends = Vec::new();
        for Segment { vectors, notes } in [segment(1.0, "one"), segment(2.0, "two")] {
            journal.append(&vectors, &notes).unwrap();
            ends.push(std::fs::metadata(&path).unwrap().len() as usize);
        }
        drop(journal);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let (mut journal, found) = Journal::open(&path, &MODEL, 2).unwrap();
            assert_eq!(found.len(), ends.iter().filter(|end| **end <= cut).count(), "{cut} bytes");
            journal.append(&[], b"three").unwrap();
            drop(journal);
            let (_, again) = Journal::open(&path, &MODEL, 2).unwrap();
            assert_eq!(again.len(), found.len() + 1, "{cut} bytes");
            assert_eq!(again.last().unwrap().notes, b"three");
        }
        std::fs::write(&path, &whole).unwrap();
        assert!(matches!(Journal::open(&path, &[4; 32], 2), Err(VectorFileError::Model { .. })));
        let other = folder.path().join("other");
        std::fs::write(&other, "a letter").unwrap();
        assert!(matches!(Journal::open(&other, &MODEL, 2), Err(VectorFileError::NotAnIndex { .. })));
        assert_eq!(std::fs::read(&other).unwrap(), b"a letter");
        let (journal, found) = Journal::open(&path, &MODEL, 2).unwrap();
        assert_eq!(found, [segment(1.0, "one"), segment(2.0, "two")]);
        journal.remove().unwrap();
        assert!(!path.exists());
    }
}
