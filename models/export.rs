//! Checkpoint folder -> checkpoint folder: the weights written anew, everything else taken along.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use burn::tensor::FloatDType;
use serde_json::Value;
use volary_weights::experts::worker_folder;
use volary_weights::format::pipeline::{self, Component, Pipeline};
use volary_weights::quantized::Loss;
use volary_weights::{Checkpoint, ConvertOptions, QuantizeOptions, convert, quantize};

use crate::error::Error;
use crate::folder::Folder;
use crate::registry::System;

/// What was written.
pub struct Export {
    /// Paths inside the new folder, and bytes.
    pub files: Vec<(String, u64)>,
    /// Files of the old folder that are neither its weights nor known to belong to them.
    pub left_out: Vec<String>,
    /// Bytes of the tensors before.
    pub tensors: u64,
}

/// What may be at the place of the new folder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// Nothing.
    Refuse,
    /// An empty folder or one with weights, which it then replaces.
    Replace,
}

/// The most bytes of tensors in one file, as transformers has it.
pub const MAX_SHARD_SIZE: u64 = 5_000_000_000;
/// What open_clip calls its weights.
const OPEN_CLIP: &str = "open_clip_model";
/// Endings of the files that are taken along: configurations, tokenizers, preprocessors, code, documents.
const COMPANIONS: &[&str] =
    &["json", "jsonl", "txt", "md", "model", "vocab", "bpe", "tiktoken", "jinja", "py", "yaml", "yml", "gz"];
/// Endings of files with weights, whatever reads them.
const WEIGHTS: &[&str] = &["safetensors", "bin", "pt", "pth", "ckpt", "gguf", "pdparams"];

/// Writes the folder's weights as safetensors under their own names, and its other files as they are. With a dtype
/// the configuration names it in place of the old one. Without a size of shards it is [`MAX_SHARD_SIZE`], but for
/// open_clip, which reads no shards.
///
/// The new folder is complete under its name or not there.
///
/// # Errors
/// If the source cannot be read or holds values that cannot be kept, if there is something at `out`, or it cannot be
/// written.
pub fn convert_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Export, Error> {
    let open = |folder: &Folder| match folder.checkpoint() {
        // tensor-parallel ranks, which only their system can merge
        Err(error) => meant(folder).map_err(|_| error),
        checkpoint => checkpoint,
    };
    write_folder(source, out, existing, options, progress, &open, &|config| config.to_vec())
}

/// As [`convert_folder`], of weights that `open` opens and what `edit` makes of `config.json`.
///
/// # Errors
/// As [`convert_folder`].
pub(crate) fn write_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    options: &ConvertOptions,
    progress: &dyn Progress,
    open: OpenWeights,
    edit: EditConfig,
) -> Result<Export, Error> {
    let edit = |config: &[u8]| said(edit(config), options.dtype);
    export(source, out, existing, &edit, progress, open, &mut |checkpoint, folder, stem| {
        let shards = (stem != OPEN_CLIP).then_some(MAX_SHARD_SIZE);
        let options = ConvertOptions { max_shard_size: options.max_shard_size.or(shards), ..*options };
        Ok(convert(checkpoint, folder, stem, &options, &|bytes| progress.done(bytes)).map(drop)?)
    })
}

/// Writes the folder's weights in 8 or 4 bits in the layout of [`volary_weights::quantized`], and its other files as
/// they are. Returns what every matrix lost.
///
/// # Errors
/// As [`convert_folder`].
pub fn quantize_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    options: &QuantizeOptions,
    progress: &dyn Progress,
) -> Result<(Export, Vec<Loss>), Error> {
    let mut losses = Vec::new();
    let export =
        export(source, out, existing, &<[u8]>::to_vec, progress, &meant, &mut |checkpoint, folder, stem| {
            let path = folder.join(format!("{stem}.safetensors"));
            losses.extend(quantize(checkpoint, &path, options, &|bytes| progress.done(bytes))?);
            Ok(())
        })?;
    Ok((export, losses))
}

/// The weights of a folder as its system takes them; where there is none, as they are stored.
pub(crate) fn meant(folder: &Folder) -> Result<Box<dyn Checkpoint>, Error> {
    match System::of(folder) {
        Ok(system) => (system.checkpoint)(folder),
        Err(_) => folder.checkpoint(),
    }
}

/// Who wants to know how far it is.
pub trait Progress {
    /// So many bytes of tensors will be read.
    fn begin(&self, bytes: u64);
    /// So many more have been.
    fn done(&self, bytes: u64);
}

/// What becomes of a `config.json`.
pub(crate) type EditConfig<'a> = &'a dyn Fn(&[u8]) -> Vec<u8>;

/// Opens the weights of a folder.
pub(crate) type OpenWeights<'a> = &'a dyn Fn(&Folder) -> Result<Box<dyn Checkpoint>, Error>;

/// Writes a checkpoint into a folder under a stem.
pub(crate) type WriteWeights<'a> = &'a mut dyn FnMut(&dyn Checkpoint, &Path, &str) -> Result<(), Error>;

/// Writes all of a folder beside the place where it will be, and gives it its name.
pub(crate) fn export(
    source: &Folder,
    out: &Path,
    existing: Existing,
    edit: EditConfig,
    progress: &dyn Progress,
    open: OpenWeights,
    write: WriteWeights,
) -> Result<Export, Error> {
    let staging = Staging::new(source, out, existing)?;
    let export = fill(source, &staging.path, edit, progress, open, write)
        .map_err(|error| staging.by_its_name(error))?;
    staging.publish()?;
    Ok(export)
}

/// Writes all of `source` into the folder at `path`.
fn fill(
    source: &Folder,
    path: &Path,
    edit: EditConfig,
    progress: &dyn Progress,
    open: OpenWeights,
    write: WriteWeights,
) -> Result<Export, Error> {
    let mut parts = vec![(String::new(), source.clone())];
    parts.extend(components(source)?);

    // Everything is opened before anything is written: what is broken is told at once.
    let mut opened = Vec::new();
    let is_pipeline = parts.len() > 1;
    for (prefix, folder) in &parts {
        opened.push(match open(folder) {
            Ok(checkpoint) => Some(checkpoint),
            // A component without weights, e.g. a tokenizer. Beside the index of a pipeline there may be the whole of
            // it as one file under any name, which is no component.
            Err(Error::Weights(
                volary_weights::Error::NoWeights { .. } | volary_weights::Error::NoVariant { .. },
            )) if is_pipeline
                && (prefix.is_empty() || !folder.files()?.iter().any(|file| has_ending(file, WEIGHTS))) =>
            {
                None
            }
            Err(error) => return Err(error),
        });
    }
    let entries = opened.iter().flatten().flat_map(|checkpoint| checkpoint.entries());
    let tensors =
        entries.map(|entry| (entry.shape.iter().product::<usize>() * entry.dtype.size()) as u64).sum();
    progress.begin(tensors);

    let mut export = Export { files: Vec::new(), left_out: Vec::new(), tensors };
    for ((prefix, folder), checkpoint) in parts.iter().zip(&opened) {
        let target = path.join(prefix);
        if !prefix.is_empty() {
            fs::create_dir(&target).map_err(Error::io(&target))?;
        }
        for name in folder.files()? {
            if is_companion(&name) {
                let mut content = folder.read(&name)?;
                if name == "config.json" {
                    content = edit(&content).into();
                }
                let file = target.join(&name);
                write_file(&file, &content).map_err(Error::io(file))?;
            } else if checkpoint.is_none() || !is_weights(&name) {
                export.left_out.push(inside(prefix, &name));
            }
        }
        if let Some(checkpoint) = checkpoint {
            write(checkpoint.as_ref(), &target, stem(folder, checkpoint.path())?)?;
        }
        // so that the names in it are on the disk; not every system can sync a folder
        let _ = File::open(&target).and_then(|folder| folder.sync_all());
        list(&target, prefix, &mut export.files)?;
    }
    Ok(export)
}

/// The files of a folder and of those inside it, and their bytes.
fn list(folder: &Path, prefix: &str, files: &mut Vec<(String, u64)>) -> Result<(), Error> {
    let mut entries =
        fs::read_dir(folder).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(Error::io(folder))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), inside(prefix, &entry.file_name().to_string_lossy()));
        match path.is_dir() {
            true => list(&path, &name, files)?,
            false => files.push((name, fs::metadata(&path).map_err(Error::io(path))?.len())),
        }
    }
    Ok(())
}

/// The parts of a pipeline with their folders, if that is what the folder holds.
fn components(source: &Folder) -> Result<Vec<(String, Folder)>, Error> {
    match source {
        Folder::Disk(path) | Folder::Variant { path, .. } if source.has(pipeline::FILE) => {
            let variant = match source {
                Folder::Variant { variant, .. } => Some(variant.as_str()),
                _ => None,
            };
            let part = |part: Component| Ok((part.name, Folder::Disk(part.folder).variant(variant)?));
            Pipeline::open(path)?.components.into_iter().map(part).collect()
        }
        _ => Ok(Vec::new()),
    }
}

fn inside(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") }
}

/// What the weights are called: as before, where that is how they are found.
fn stem(folder: &Folder, weights: &Path) -> Result<&'static str, Error> {
    // shards without an index go by their folder
    let name = match weights.file_name() {
        Some(name) if !weights.is_dir() => Some(name.to_string_lossy().into_owned()),
        _ => folder.files()?.into_iter().find(|name| is_weights(name)),
    };
    Ok(match name.unwrap_or_default() {
        name if name.starts_with("open_clip") => OPEN_CLIP,
        name if name.starts_with("diffusion_pytorch_model") => "diffusion_pytorch_model",
        _ => "model",
    })
}

fn has_ending(name: &str, endings: &[&str]) -> bool {
    let ending = Path::new(name).extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    endings.contains(&ending.to_lowercase().as_str())
}

/// Whether a file holds weights or says where they are.
fn is_weights(name: &str) -> bool {
    has_ending(name, WEIGHTS)
        || name.ends_with(".safetensors.index.json")
        || name.ends_with(".bin.index.json")
}

/// Whether a file belongs to the weights without being any.
fn is_companion(name: &str) -> bool {
    let is_document = ["LICENSE", "LICENCE", "NOTICE", "README", "COPYING", "USE_POLICY", "MODEL_LICENSE"]
        .iter()
        .any(|document| name.to_uppercase().starts_with(document));
    !is_weights(name) && !name.starts_with('.') && (is_document || has_ending(name, COMPANIONS))
}

/// A configuration that says the dtype that weights were given, if they were.
pub(crate) fn said(config: Vec<u8>, dtype: Option<FloatDType>) -> Vec<u8> {
    dtype.map_or(config.clone(), |dtype| with_dtype(&config, dtype_name(dtype)))
}

/// What `config.json` calls a dtype.
fn dtype_name(dtype: FloatDType) -> &'static str {
    match dtype {
        FloatDType::F64 => "float64",
        FloatDType::F32 | FloatDType::Flex32 => "float32",
        FloatDType::F16 => "float16",
        FloatDType::BF16 => "bfloat16",
    }
}

/// A configuration in which `dtype` and `torch_dtype` say `name`; every other byte as it was. What is no JSON, or does
/// not say a dtype, stays.
fn with_dtype(config: &[u8], name: &str) -> Vec<u8> {
    let text = match std::str::from_utf8(config) {
        Ok(text) if serde_json::from_str::<Value>(text).is_ok() => text,
        _ => return config.to_vec(),
    };
    let mut out = String::new();
    let mut rest = text;
    // the string before the one at hand, if only a colon is between them
    let mut key = "";
    while let Some(begin) = rest.find('"') {
        let between = rest[..begin].trim();
        let string = &rest[begin + 1..];
        let end = closing_quote(string);
        let content = &string[..end];
        let is_dtype = between == ":" && ["dtype", "torch_dtype"].contains(&key);
        out.push_str(&rest[..=begin]);
        match content.strip_prefix("torch.").unwrap_or(content) {
            "float64" | "float32" | "float16" | "bfloat16" if is_dtype => out.push_str(name),
            _ => out.push_str(content),
        }
        key = content;
        rest = &string[end..];
        out.push('"');
        rest = rest.strip_prefix('"').unwrap_or(rest);
    }
    out.push_str(rest);
    out.into_bytes()
}

/// Where a JSON string ends.
fn closing_quote(string: &str) -> usize {
    let mut escaped = false;
    let end = string.bytes().position(|byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    });
    end.unwrap_or(string.len())
}

fn write_file(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// A folder that is being written beside the place where it will be; removed unless it is published.
struct Staging {
    path: PathBuf,
    out: PathBuf,
    existing: Existing,
}

impl Staging {
    fn new(source: &Folder, out: &Path, existing: Existing) -> Result<Self, Error> {
        let refuse = |reason: &str| {
            let (path, reason) = (out.to_owned(), reason.to_owned());
            Err(Error::Target { path, reason })
        };
        // also a link to nothing is something
        if out.symlink_metadata().is_ok() {
            if existing == Existing::Refuse {
                return refuse("there is something here already, and only --force replaces it");
            }
            if !out.is_dir() || out.is_symlink() {
                return refuse("this is no folder, and only a folder of weights is replaced");
            }
            let files = Folder::Disk(out.to_owned()).files()?;
            let is_empty = fs::read_dir(out).map_err(Error::io(out))?.next().is_none();
            let has_workers = out.join(worker_folder(0)).is_dir();
            if !is_empty && !has_workers && !files.iter().any(|name| is_weights(name)) {
                return refuse("this folder has no weights in it, and only a folder of weights is replaced");
            }
            if let Folder::Disk(source) | Folder::Variant { path: source, .. } = source
                && let (Ok(source), Ok(out)) = (source.canonicalize(), out.canonicalize())
                && source.starts_with(out)
            {
                return refuse("this is where the weights are read from");
            }
        }
        let Some(name) = out.file_name() else { return refuse("this is not the name of a folder") };
        let name = format!(".{}.{}.partial", name.to_string_lossy(), std::process::id());
        let path = out.with_file_name(name);
        fs::create_dir(&path).map_err(Error::io(out))?;
        Ok(Self { path, out: out.to_owned(), existing })
    }

    /// An error with files by the names that they would have had.
    fn by_its_name(&self, error: Error) -> Error {
        match error {
            Error::Io { path, source } | Error::Weights(volary_weights::Error::Io { path, source }) => {
                match path.strip_prefix(&self.path) {
                    Ok(inside) => Error::Io { path: self.out.join(inside), source },
                    Err(_) => Error::Io { path, source },
                }
            }
            error => error,
        }
    }

    /// Gives the folder its name.
    fn publish(self) -> Result<(), Error> {
        let old = self.path.with_extension("old");
        let replaces = self.existing == Existing::Replace && self.out.is_dir();
        if replaces {
            fs::rename(&self.out, &old).map_err(Error::io(&self.out))?;
        } else if self.out.symlink_metadata().is_ok() {
            // it was not there before; an empty folder would be replaced silently
            return Err(Error::io(&self.out)(io::ErrorKind::AlreadyExists.into()));
        }
        if let Err(error) = fs::rename(&self.path, &self.out) {
            if replaces {
                let _ = fs::rename(&old, &self.out);
            }
            return Err(Error::io(&self.out)(error));
        }
        let parent = self.out.parent().filter(|parent| !parent.as_os_str().is_empty());
        let _ = File::open(parent.unwrap_or(Path::new("."))).and_then(|folder| folder.sync_all());
        if replaces {
            fs::remove_dir_all(&old).map_err(Error::io(&old))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // after publishing there is nothing under this name
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_dtype_of_a_configuration_changes() {
        let config = r#"{ "a\"dtype":"float32","dtype" :  "float32", "note": "dtype",
  "text_config": {"torch_dtype":"torch.bfloat16"}, "dtype_of": "float32", "list": ["dtype", "float32"], "x": {"dtype": null} }
"#;
        let expected = r#"{ "a\"dtype":"float32","dtype" :  "float16", "note": "dtype",
  "text_config": {"torch_dtype":"float16"}, "dtype_of": "float32", "list": ["dtype", "float32"], "x": {"dtype": null} }
"#;
        let found = with_dtype(config.as_bytes(), "float16");
        assert_eq!(String::from_utf8(found).unwrap(), expected);
        assert_eq!(with_dtype(b"no \"dtype\": \"float32\"", "float16"), b"no \"dtype\": \"float32\"");
    }

    #[test]
    fn weights_are_told_from_what_belongs_to_them() {
        for name in ["config.json", "vocab.txt", "LICENSE", "README.md", "spiece.model", "modeling_x.py"] {
            assert!(is_companion(name) && !is_weights(name), "{name}");
        }
        for name in ["model.safetensors", "pytorch_model.bin.index.json", "a.PT"] {
            assert!(is_weights(name) && !is_companion(name), "{name}");
        }
        for name in [".gitattributes", "cat.png", "tf_model.h5"] {
            assert!(!is_weights(name) && !is_companion(name), "{name}");
        }
    }
}
