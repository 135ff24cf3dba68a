//! A folder's pictures as vectors, kept in a file beside them.
//!
//! The file is a [`VectorFile`]; its notes are a JSON list of the files that were looked at. While pictures are
//! encoded, every batch is appended to a [`Journal`] beside it, so that a run that is killed is gone on with.

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use volary_multimodal::retrieval::{Journal, ModelHash, VectorFile, VectorFileError, nearest, write_vectors};
use volary_vision::image::{ImageError, ReadOptions, Rgb8, content, decode, size};

use crate::error::Error;
use crate::folder::Folder;
use crate::pretrained::Clip;

/// So many pictures are encoded together, and appended to the journal.
const BATCH: usize = 64;
/// Pictures of so many pixels in all are held at a time, and none larger is decoded beside others: 100 MB.
const PIXELS: u64 = 1 << 25;
/// A file that was changed so short a time before it was read may have been changed again since, unseen: file systems
/// count time in steps of up to two seconds.
const STEP: u64 = 2_000_000_000;

/// A folder's pictures, each with its vector by one model.
pub struct Index {
    file: PathBuf,
    model: ModelHash,
    d_embed: usize,
    stored: Option<VectorFile>,
    /// Rows after those of `stored`.
    added: Vec<f16>,
    /// By path, relative to the folder, with `/` between its parts.
    known: BTreeMap<String, Entry>,
}

/// A file that was looked at.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    stamp: Stamp,
    /// When that was, in nanoseconds since 1970.
    at: u64,
    found: Found,
}

/// What tells, without reading it, that a file is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Found {
    /// The row of its vector, and the SHA-256 of its content.
    Picture { row: usize, sha256: String },
    /// Why there is none.
    Problem(String),
}

/// What an update did.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    /// Pictures in the index.
    pub pictures: usize,
    /// Pictures of which a vector was made now.
    pub encoded: usize,
    /// Files that are gone.
    pub gone: usize,
    /// What could not be indexed, each with its reason.
    pub skipped: Vec<String>,
}

/// What a look at a file gives.
enum Look {
    /// The SHA-256 of its content, and the picture.
    Decoded(String, Rgb8),
    /// The SHA-256 of its content, of which the index has a vector.
    Known(String),
    /// Too large to be decoded beside others.
    Large,
    Problem(String),
}

/// What the last looks gave, on its way into the journal.
#[derive(Default)]
struct Batch {
    entries: BTreeMap<String, Entry>,
    vectors: Vec<f16>,
    /// Pictures to be encoded; the rows of their entries are still to come.
    pictures: Vec<Rgb8>,
    waiting: Vec<(String, Entry)>,
}

impl Batch {
    fn is_full(&self) -> bool {
        let pixels: usize = self.pictures.iter().map(|picture| picture.width() * picture.height()).sum();
        self.pictures.len() >= BATCH || self.entries.len() >= 16 * BATCH || pixels as u64 >= PIXELS
    }
}

/// A hash that stands for a model: of the names, lengths and contents of its folder's files. Of large ones, samples
/// of 4 KiB at 256 places are hashed: training changes all weights.
///
/// # Errors
/// If a file cannot be read.
pub fn model_hash(folder: &Folder) -> Result<ModelHash, Error> {
    const WHOLE: u64 = 1 << 20;
    let mut hash = Sha256::new();
    if let Folder::Variant { variant, .. } = folder {
        hash.update(variant);
    }
    let is_text = |name: &str| name.starts_with('.') || name.ends_with(".md") || name.starts_with("LICENSE");
    for name in folder.files()?.iter().filter(|name| !is_text(name)) {
        hash.update(name);
        if matches!(folder, Folder::Embedded { .. }) {
            hash.update(folder.read(name)?);
            continue;
        }
        let path = folder.path().join(name);
        let mut samples = || -> std::io::Result<()> {
            let mut file = std::fs::File::open(&path)?;
            let bytes = file.metadata()?.len();
            hash.update(bytes.to_le_bytes());
            if bytes <= WHOLE {
                std::io::copy(&mut file, &mut hash)?;
                return Ok(());
            }
            let mut sample = [0; 4096];
            for place in 0..256 {
                file.seek(SeekFrom::Start((bytes - sample.len() as u64) / 255 * place))?;
                file.read_exact(&mut sample)?;
                hash.update(sample);
            }
            Ok(())
        };
        samples().map_err(Error::io(&path))?;
    }
    Ok(hash.finalize().into())
}

impl Index {
    /// The index in `file`; an empty one if there is none. `d_embed` is the width of the model's vectors.
    ///
    /// # Errors
    /// If the file is there and is no index, is damaged, or another model made it.
    pub fn open(file: &Path, model: ModelHash, d_embed: usize) -> Result<Self, Error> {
        let mut index = Self {
            file: file.into(),
            model,
            d_embed,
            stored: None,
            added: Vec::new(),
            known: BTreeMap::new(),
        };
        index.read()?;
        Ok(index)
    }

    /// Takes over what is in the file.
    fn read(&mut self) -> Result<(), Error> {
        let stored = match VectorFile::open(&self.file, &self.model, self.d_embed) {
            Ok(stored) => stored,
            Err(VectorFileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        self.known = self.notes(stored.notes(), stored.rows())?;
        self.added = Vec::new();
        self.stored = Some(stored);
        Ok(())
    }

    fn notes(&self, notes: &[u8], rows: usize) -> Result<BTreeMap<String, Entry>, Error> {
        let broken = |problem: String| Error::Data { file: self.file.clone(), problem };
        let entries: BTreeMap<String, Entry> =
            serde_json::from_slice(notes).map_err(|error| broken(format!("its notes: {error}")))?;
        for (path, entry) in &entries {
            if matches!(entry.found, Found::Picture { row, .. } if row >= rows) {
                return Err(broken(format!("its notes: {path} has no vector among {rows}")));
            }
        }
        Ok(entries)
    }

    fn journal(&self) -> PathBuf {
        let mut name = self.file.clone().into_os_string();
        name.push(".journal");
        name.into()
    }

    fn row(&self, row: usize) -> &[f16] {
        let stored = self.stored.as_ref().map_or(&[][..], VectorFile::vectors);
        match row.checked_sub(stored.len() / self.d_embed) {
            None => &stored[row * self.d_embed..][..self.d_embed],
            Some(row) => &self.added[row * self.d_embed..][..self.d_embed],
        }
    }

    /// Brings the index up to date with `folder`: encodes what is new or has changed, forgets what is gone. What a
    /// killed run had encoded is taken over. `progress` is told how many files of how many are done.
    ///
    /// # Errors
    /// If the folder cannot be listed, the model fails, or the index cannot be written. What is wrong with single
    /// files is in the report.
    pub fn update(
        &mut self,
        clip: &Clip,
        folder: &Path,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Report, Error> {
        let (files, problems) = self.files_in(folder)?;
        let mut report = Report::default();
        let is_current = self.pending(&files).is_empty() && self.known.len() == files.len();
        if !is_current || self.journal().exists() {
            let (mut journal, segments) = Journal::open(&self.journal(), &self.model, self.d_embed)?;
            self.read()?; // whoever had the journal may have changed it
            for segment in segments {
                let entries = self.notes(&segment.notes, segment.vectors.len() / self.d_embed)?;
                self.take(entries, &segment.vectors);
            }
            report.encoded = self.look_at(&self.pending(&files), clip, folder, &mut journal, progress)?;
            let before = self.known.len();
            self.known.retain(|path, _| files.contains_key(path));
            report.gone = before - self.known.len();
            self.write()?;
            journal.remove()?;
        }
        for (path, entry) in &self.known {
            match &entry.found {
                Found::Picture { .. } => report.pictures += 1,
                Found::Problem(problem) => {
                    report.skipped.push(format!("{}: {problem}", folder.join(path).display()));
                }
            }
        }
        report.skipped.extend(problems);
        Ok(report)
    }

    /// Looks at files and encodes the pictures among them. Returns how many were encoded.
    fn look_at(
        &mut self,
        pending: &[(String, Stamp)],
        clip: &Clip,
        folder: &Path,
        journal: &mut Journal,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<usize, Error> {
        let contents = self.contents();
        let (mut batch, mut done, mut encoded) = (Batch::default(), 0, 0);
        progress(0, pending.len());
        for group in pending.chunks(2 * rayon::current_num_threads()) {
            let look = |file: &(String, Stamp)| (now(), look(folder, file, &contents, PIXELS));
            let looks: Vec<(u64, Look)> = group.par_iter().map(look).collect();
            for (file, (at, mut found)) in group.iter().zip(looks) {
                if matches!(found, Look::Large) {
                    self.flush(clip, &mut batch, journal)?;
                    found = self::look(folder, file, &contents, u64::MAX);
                }
                let (path, stamp) = file.clone();
                let entry = |found| Entry { stamp, at, found };
                match found {
                    Look::Decoded(sha256, picture) => {
                        encoded += 1;
                        batch.pictures.push(picture);
                        batch.waiting.push((path, entry(Found::Picture { row: 0, sha256 })));
                    }
                    Look::Known(sha256) => {
                        let row = batch.vectors.len() / self.d_embed;
                        batch.vectors.extend_from_slice(self.row(contents[&sha256]));
                        batch.entries.insert(path, entry(Found::Picture { row, sha256 }));
                    }
                    Look::Problem(problem) => {
                        batch.entries.insert(path, entry(Found::Problem(problem)));
                    }
                    Look::Large => {
                        batch.entries.insert(path, entry(Found::Problem("it is too large".into())));
                    }
                }
                if batch.is_full() {
                    self.flush(clip, &mut batch, journal)?;
                }
                done += 1;
                progress(done, pending.len());
            }
        }
        self.flush(clip, &mut batch, journal)?;
        Ok(encoded)
    }

    /// Encodes a batch and appends it to the journal.
    fn flush(&mut self, clip: &Clip, batch: &mut Batch, journal: &mut Journal) -> Result<(), Error> {
        let Batch { mut entries, mut vectors, pictures, waiting } = std::mem::take(batch);
        if entries.is_empty() && waiting.is_empty() {
            return Ok(());
        }
        let together = clip.encode_images(&pictures);
        for (i, (path, mut entry)) in waiting.into_iter().enumerate() {
            // one that the model cannot take does not keep the others out
            let vector = match &together {
                Ok(rows) => Ok(rows.row(i).to_vec()),
                Err(_) => clip.encode_images(&pictures[i..=i]).map(|rows| rows.row(0).to_vec()),
            };
            match (vector, &mut entry.found) {
                (Ok(vector), Found::Picture { row, .. }) if vector.iter().all(|value| value.is_finite()) => {
                    *row = vectors.len() / self.d_embed;
                    vectors.extend(vector.into_iter().map(f16::from_f32));
                }
                (Ok(_), found) => *found = Found::Problem("the model makes no finite vector of it".into()),
                (Err(error), found) => *found = Found::Problem(error.to_string()),
            }
            entries.insert(path, entry);
        }
        journal.append(&vectors, &json(&entries))?;
        self.take(entries, &vectors);
        Ok(())
    }

    /// Adds entries whose rows are counted within `vectors`.
    fn take(&mut self, entries: BTreeMap<String, Entry>, vectors: &[f16]) {
        let before = self.stored.as_ref().map_or(0, VectorFile::rows) + self.added.len() / self.d_embed;
        self.added.extend_from_slice(vectors);
        self.known.extend(entries.into_iter().map(|(path, mut entry)| {
            if let Found::Picture { row, .. } = &mut entry.found {
                *row += before;
            }
            (path, entry)
        }));
    }

    /// Writes the index, its rows in the order of their paths, and reads it again.
    fn write(&mut self) -> Result<(), Error> {
        let mut entries = self.known.clone();
        let mut rows = Vec::new();
        for entry in entries.values_mut() {
            if let Found::Picture { row, .. } = &mut entry.found {
                rows.push(std::mem::replace(row, rows.len()));
            }
        }
        let vectors = rows.iter().map(|&row| self.row(row));
        let shape = [rows.len(), self.d_embed];
        write_vectors(&self.file, &self.model, shape, vectors, &json(&entries))?;
        self.read()
    }

    /// The `top` pictures most similar to each query, the most similar first, by the product of their vectors; of
    /// equally similar ones the first by name. `queries` `[queries, d_embed]`.
    pub fn search(&self, queries: &[f32], top: usize) -> Vec<Vec<(&str, f32)>> {
        let Some(stored) = &self.stored else {
            return queries.chunks_exact(self.d_embed).map(|_| Vec::new()).collect();
        };
        // rows are in the order of the paths
        let pictures = self.known.iter().filter(|(_, entry)| matches!(entry.found, Found::Picture { .. }));
        let paths: Vec<&str> = pictures.map(|(path, _)| path.as_str()).collect();
        nearest(stored.vectors(), queries, self.d_embed, top)
            .into_iter()
            .map(|hits| hits.into_iter().map(|hit| (paths[hit.row], hit.similarity)).collect())
            .collect()
    }

    /// Rows by the SHA-256 of their pictures.
    fn contents(&self) -> HashMap<String, usize> {
        let pictures = self.known.values().filter_map(|entry| match &entry.found {
            Found::Picture { row, sha256 } => Some((sha256.clone(), *row)),
            Found::Problem(_) => None,
        });
        pictures.collect()
    }

    /// The files that must be looked at: new ones, changed ones, and those that may have changed unseen.
    fn pending(&self, files: &BTreeMap<String, Stamp>) -> Vec<(String, Stamp)> {
        let is_known = |(path, stamp): &(&String, &Stamp)| {
            let entry = self.known.get(*path);
            entry
                .is_some_and(|entry| entry.stamp == **stamp && stamp.modified.saturating_add(STEP) < entry.at)
        };
        let pending = files.iter().filter(|file| !is_known(file));
        pending.map(|(path, stamp)| (path.clone(), *stamp)).collect()
    }

    /// The files in `folder` and the folders inside it, without hidden ones; and what cannot be looked at.
    fn files_in(&self, folder: &Path) -> Result<(BTreeMap<String, Stamp>, Vec<String>), Error> {
        let own = [self.file.clone(), self.journal()].map(|own| own.canonicalize().ok());
        let (mut files, mut problems) = (BTreeMap::new(), Vec::new());
        let mut open = vec![String::new()];
        while let Some(inside) = open.pop() {
            let here = folder.join(&inside);
            let entries = match std::fs::read_dir(&here) {
                Ok(entries) => entries,
                Err(error) if inside.is_empty() => return Err(Error::io(here)(error)),
                Err(error) => {
                    problems.push(format!("{}: {error}", here.display()));
                    continue;
                }
            };
            for entry in entries.flatten() {
                let path = entry.path();
                let name = entry.file_name();
                let Some(name) = name.to_str() else {
                    problems.push(format!("{}: its name is not UTF-8", path.display()));
                    continue;
                };
                if name.starts_with('.') {
                    continue;
                }
                let relative = if inside.is_empty() { name.into() } else { format!("{inside}/{name}") };
                let is_link = entry.file_type().is_ok_and(|kind| kind.is_symlink());
                match std::fs::metadata(&path) {
                    Err(error) => problems.push(format!("{}: {error}", path.display())),
                    Ok(metadata) if metadata.is_dir() && is_link => {
                        problems.push(format!("{}: a link to a folder is not followed", path.display()));
                    }
                    Ok(metadata) if metadata.is_dir() => open.push(relative),
                    Ok(metadata) if metadata.is_file() => {
                        let is_own = own.iter().flatten().any(|own| own.file_name() == path.file_name())
                            && own.contains(&path.canonicalize().ok());
                        if !is_own {
                            let modified = metadata.modified().map_or(0, since_1970);
                            files.insert(relative, Stamp { bytes: metadata.len(), modified });
                        }
                    }
                    Ok(_) => problems.push(format!("{}: neither a file nor a folder", path.display())),
                }
            }
        }
        problems.sort();
        Ok((files, problems))
    }
}

/// Reads a file. What has more pixels than `largest`, or a great many bytes, is only decoded if that is `u64::MAX`.
fn look(
    folder: &Path,
    (path, stamp): &(String, Stamp),
    contents: &HashMap<String, usize>,
    largest: u64,
) -> Look {
    if stamp.bytes > largest.saturating_mul(2) {
        return Look::Large;
    }
    let file = folder.join(path);
    let name = file.display().to_string();
    let looked = || -> Result<Look, ImageError> {
        let bytes = content(&file)?;
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        if contents.contains_key(&sha256) {
            return Ok(Look::Known(sha256));
        }
        let [height, width] = size(&bytes, &name)?;
        if height.saturating_mul(width) > largest {
            return Ok(Look::Large);
        }
        Ok(Look::Decoded(sha256, decode(&bytes, &name, ReadOptions::SEEN)?))
    };
    looked().unwrap_or_else(|error| {
        let told = error.to_string();
        let problem = told.strip_prefix(&name).and_then(|told| told.strip_prefix(": "));
        Look::Problem(problem.unwrap_or(&told).into())
    })
}

fn json(entries: &BTreeMap<String, Entry>) -> Vec<u8> {
    serde_json::to_vec(entries).expect("strings and numbers serialise")
}

fn now() -> u64 {
    since_1970(SystemTime::now())
}

/// Nanoseconds; 0 for what is before.
fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}
