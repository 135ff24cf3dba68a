//! A folder's pictures as vectors, kept in a file beside them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use burn::tensor::TensorData;
use half::f16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use volary_vision::image::{ReadOptions, read};
use volary_weights::{read_tensors, save_tensors};

use crate::error::Error;
use crate::pretrained::Clip;

/// Endings of the pictures that are looked for.
const ENDINGS: &[&str] = &["png", "jpg", "jpeg", "webp", "gif", "bmp"];

/// A folder's pictures, each with its vector by one model.
///
/// Its file has the tensors `vectors` (f16, `[pictures, d_embed]`) and `entries` (JSON as bytes).
pub struct Index {
    head: Head,
    /// `[entries, d_embed]`, row after row.
    vectors: Vec<f16>,
    d_embed: usize,
}

#[derive(Serialize, Deserialize)]
struct Head {
    /// The model's name and a number that changes with its weights.
    model: String,
    entries: Vec<Entry>,
}

#[derive(Clone, Serialize, Deserialize)]
struct Entry {
    /// Relative to the folder.
    path: String,
    bytes: u64,
    /// Nanoseconds since 1970.
    modified: u128,
}

/// The pictures in `folder` and the folders inside it, relative to it, in order; and what could not be read.
///
/// # Errors
/// If `folder` itself cannot be read.
pub fn pictures_in(folder: &Path) -> Result<(Vec<PathBuf>, Vec<String>), Error> {
    let (mut found, mut problems) = (Vec::new(), Vec::new());
    let mut open = vec![PathBuf::new()];
    while let Some(inside) = open.pop() {
        let path = folder.join(&inside);
        let entries = match std::fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if inside.as_os_str().is_empty() => return Err(Error::io(path)(error)),
            Err(error) => {
                problems.push(format!("{}: {error}", path.display()));
                continue;
            }
        };
        for entry in entries.flatten() {
            let relative = inside.join(entry.file_name());
            let Ok(kind) = entry.file_type() else { continue };
            let ending = relative.extension().map(|ending| ending.to_string_lossy().to_lowercase());
            if kind.is_dir() {
                open.push(relative);
            } else if ending.is_some_and(|ending| ENDINGS.contains(&ending.as_str())) {
                found.push(relative);
            }
        }
    }
    found.sort();
    Ok((found, problems))
}

impl Index {
    /// The index in `file`; an empty one if there is none or if another model made it.
    ///
    /// # Errors
    /// If the file is there and is no index.
    pub fn open(file: &Path, clip: &Clip, name: &str) -> Result<Self, Error> {
        let model = format!("{name} {:016x}", fingerprint(clip)?);
        let d_embed = clip.d_embed();
        let empty = Self { head: Head { model, entries: Vec::new() }, vectors: Vec::new(), d_embed };
        if !file.exists() {
            return Ok(empty);
        }
        let broken = |problem: &str| Error::Data {
            file: file.into(),
            problem: format!("not an index of this program ({problem}); delete it to have it made again"),
        };
        let tensors = read_tensors(file)?;
        let tensor = |key: &str| tensors.get(key).ok_or_else(|| broken(&format!("no tensor `{key}`")));
        let head: Head = serde_json::from_slice(tensor("entries")?.as_bytes())
            .map_err(|error| broken(&format!("`entries`: {error}")))?;
        if head.model != empty.head.model {
            return Ok(empty);
        }
        let stored = tensor("vectors")?;
        let vectors: Vec<f16> = stored.iter::<f32>().map(f16::from_f32).collect();
        if vectors.len() != head.entries.len() * d_embed {
            return Err(broken("vectors and entries differ in number"));
        }
        Ok(Self { head, vectors, d_embed })
    }

    /// The pictures whose vectors are missing or older than the file.
    pub fn stale(&self, folder: &Path, paths: &[PathBuf]) -> Vec<PathBuf> {
        let known: BTreeMap<&str, &Entry> =
            self.head.entries.iter().map(|entry| (entry.path.as_str(), entry)).collect();
        let is_fresh = |path: &PathBuf| {
            let entry = known.get(path.to_string_lossy().as_ref());
            entry.is_some_and(|entry| stamp(&folder.join(path)) == Some((entry.bytes, entry.modified)))
        };
        paths.iter().filter(|path| !is_fresh(path)).cloned().collect()
    }

    /// Encodes pictures anew. Returns what could not be read.
    ///
    /// # Errors
    /// If the model cannot encode them.
    pub fn add(&mut self, clip: &Clip, folder: &Path, paths: &[PathBuf]) -> Result<Vec<String>, Error> {
        let pictures: Vec<_> =
            paths.par_iter().map(|path| read(&folder.join(path), ReadOptions::SEEN)).collect();
        let (mut readable, mut entries, mut problems) = (Vec::new(), Vec::new(), Vec::new());
        for (path, picture) in paths.iter().zip(pictures) {
            match (picture, stamp(&folder.join(path))) {
                (Ok(picture), Some((bytes, modified))) => {
                    readable.push(picture);
                    entries.push(Entry { path: path.to_string_lossy().into_owned(), bytes, modified });
                }
                (Ok(_), None) => problems.push(format!("{}: it is gone", path.display())),
                (Err(error), _) => problems.push(error.to_string()),
            }
        }
        let vectors = clip.encode_images(&readable)?;
        for (entry, vector) in entries.into_iter().zip(vectors.rows()) {
            self.remove(|known| known.path == entry.path);
            self.head.entries.push(entry);
            self.vectors.extend(vector.iter().copied().map(f16::from_f32));
        }
        Ok(problems)
    }

    /// Forgets pictures that are not among `paths`, or that changed and could not be read again.
    pub fn keep(&mut self, folder: &Path, paths: &[PathBuf]) {
        let stale = self.stale(folder, paths);
        let stale: HashSet<&PathBuf> = stale.iter().collect();
        let kept: HashSet<String> = paths
            .iter()
            .filter(|path| !stale.contains(path))
            .map(|path| path.to_string_lossy().into_owned())
            .collect();
        self.remove(|entry| !kept.contains(&entry.path));
    }

    fn remove(&mut self, gone: impl Fn(&Entry) -> bool) {
        let d_embed = self.d_embed;
        let keep: Vec<bool> = self.head.entries.iter().map(|entry| !gone(entry)).collect();
        if keep.iter().all(|&keep| keep) {
            return;
        }
        let rows = self.vectors.chunks_exact(d_embed).zip(&keep).filter(|(_, keep)| **keep);
        self.vectors = rows.flat_map(|(row, _)| row.iter().copied()).collect();
        let mut keep = keep.into_iter();
        self.head.entries.retain(|_| keep.next().unwrap_or(false));
    }

    /// Writes the index; a half-written file never has its name.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, file: &Path) -> Result<(), Error> {
        let entries = serde_json::to_vec(&self.head).expect("strings and numbers serialise");
        let length = entries.len();
        Ok(save_tensors(
            file,
            &[
                ("entries".into(), TensorData::new(entries, [length])),
                (
                    "vectors".into(),
                    TensorData::new(self.vectors.clone(), [self.head.entries.len(), self.d_embed]),
                ),
            ],
        )?)
    }

    /// The `top` pictures nearest to a unit vector, by cosine similarity, the nearest first.
    pub fn search(&self, query: &[f32], top: usize) -> Vec<(&str, f32)> {
        let similarity =
            |row: &[f16]| row.iter().zip(query).map(|(value, query)| value.to_f32() * query).sum::<f32>();
        let mut scored: Vec<(usize, f32)> =
            self.vectors.par_chunks_exact(self.d_embed).map(similarity).enumerate().collect();
        scored.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        scored.truncate(top);
        scored.into_iter().map(|(row, score)| (self.head.entries[row].path.as_str(), score)).collect()
    }
}

/// Size and time of a file.
fn stamp(path: &Path) -> Option<(u64, u128)> {
    let metadata = std::fs::metadata(path).ok()?;
    let modified = metadata.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some((metadata.len(), modified.as_nanos()))
}

/// A number that changes with the weights: the bits of a text's vector (FNV-1a).
fn fingerprint(clip: &Clip) -> Result<u64, Error> {
    let vector = clip.encode_texts(&["volary 1 一"])?;
    let bits = vector.iter().map(|value| f16::from_f32(*value).to_bits());
    Ok(bits.fold(0xCBF2_9CE4_8422_2325, |hash, bits| {
        (hash ^ u64::from(bits)).wrapping_mul(0x0000_0100_0000_01B3)
    }))
}
