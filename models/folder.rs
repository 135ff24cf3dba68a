//! A checkpoint folder: configuration, weights, tokenizer and preprocessor as one unit.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use volary_text::tokenizer::Tokenizer;
use volary_vision::preprocess::Preprocessor;
use volary_weights::format::{Checkpoint, Memory, OpenOptions, RowScaled, looked_for, open_with};
use volary_weights::hub::Headers;

use crate::config::Config;
use crate::error::Error;

/// Files that together are a model: a folder on disk, or one inside the program.
#[derive(Clone, Debug)]
pub enum Folder {
    /// On disk, in a public layout.
    Disk(PathBuf),
    /// On disk, with another version of its weights.
    Variant {
        /// The folder.
        path: PathBuf,
        /// What the names of its files say, e.g. `fp16` in `model.fp16.safetensors`.
        variant: String,
    },
    /// On disk but for the weights, of which only the headers were fetched.
    Headers {
        /// The folder.
        path: PathBuf,
        /// Stands for the weights.
        weights: Headers,
    },
    /// Inside the program.
    Embedded {
        /// Stands for the path in messages.
        name: &'static str,
        /// Names and contents.
        files: &'static [(&'static str, &'static [u8])],
        /// Folders inside it, by their names.
        parts: &'static [(&'static str, Folder)],
    },
}

impl Folder {
    /// The same with the weights of that variant, if one is named: the others never take its place.
    ///
    /// # Errors
    /// Inside the program there is none.
    pub fn variant(self, variant: Option<&str>) -> Result<Folder, Error> {
        Ok(match (self, variant.map(str::to_owned)) {
            (Folder::Disk(path) | Folder::Variant { path, .. }, Some(variant)) => {
                Folder::Variant { path, variant }
            }
            (Folder::Embedded { name, .. }, Some(variant)) => {
                let (folder, looked_for) = (name.into(), looked_for(Some(&variant)));
                return Err(volary_weights::Error::NoVariant { folder, variant, looked_for }.into());
            }
            (folder, _) => folder,
        })
    }

    /// The folder, or the name that stands for it.
    pub fn path(&self) -> &Path {
        match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => path,
            Folder::Embedded { name, .. } => Path::new(name),
        }
    }

    /// Whether it has a file of that name.
    pub fn has(&self, name: &str) -> bool {
        match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => {
                path.join(name).is_file()
            }
            Folder::Embedded { files, .. } => files.iter().any(|(file, _)| *file == name),
        }
    }

    /// The names of its files, sorted; not those in folders inside it.
    ///
    /// # Errors
    /// If it cannot be listed.
    pub fn files(&self) -> Result<Vec<String>, Error> {
        let mut names: Vec<String> = match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => {
                std::fs::read_dir(path)
                    .and_then(Iterator::collect::<std::io::Result<Vec<_>>>)
                    .map_err(Error::io(path))?
                    .into_iter()
                    .filter(|entry| entry.path().is_file())
                    .filter_map(|entry| entry.file_name().into_string().ok())
                    .collect()
            }
            Folder::Embedded { files, .. } => files.iter().map(|(name, _)| (*name).to_owned()).collect(),
        };
        names.sort();
        Ok(names)
    }

    /// The content of a file.
    ///
    /// # Errors
    /// If it is missing or unreadable.
    pub fn read(&self, name: &str) -> Result<Cow<'static, [u8]>, Error> {
        match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => {
                let path = path.join(name);
                std::fs::read(&path).map(Cow::Owned).map_err(Error::io(path))
            }
            Folder::Embedded { name: folder, files, .. } => {
                match files.iter().find(|(file, _)| *file == name) {
                    Some((_, bytes)) => Ok(Cow::Borrowed(bytes)),
                    None => Err(Error::io(Path::new(folder).join(name))(std::io::ErrorKind::NotFound.into())),
                }
            }
        }
    }

    /// The JSON object in a file.
    ///
    /// # Errors
    /// If it is missing or malformed.
    pub fn config(&self, name: &str) -> Result<Config, Error> {
        Ok(Config::parse(&self.path().join(name), &self.read(name)?)?)
    }

    /// The JSON objects in the list of a file.
    ///
    /// # Errors
    /// If it is missing or malformed.
    pub fn config_list(&self, name: &str) -> Result<Vec<Config>, Error> {
        Ok(Config::parse_list(&self.path().join(name), &self.read(name)?)?)
    }

    /// The folder of that name inside it, if there is one. What is known by its headers has none.
    pub fn part(&self, name: &str) -> Option<Folder> {
        match self {
            Folder::Disk(path) => Some(path.join(name)).filter(|part| part.is_dir()).map(Folder::Disk),
            Folder::Variant { path, variant } => {
                let (path, variant) = (path.join(name), variant.clone());
                path.is_dir().then_some(Folder::Variant { path, variant })
            }
            Folder::Embedded { parts, .. } => {
                parts.iter().find(|(part, _)| *part == name).map(|(_, folder)| folder.clone())
            }
            Folder::Headers { .. } => None,
        }
    }

    /// The weights.
    ///
    /// # Errors
    /// If there are none, or the file is broken.
    pub fn checkpoint(&self) -> Result<Box<dyn Checkpoint>, Error> {
        self.checkpoint_with(&OpenOptions::default())
    }

    /// The weights, with a say in what is taken and how ranks are merged. What is inside the
    /// program comes in one form.
    ///
    /// # Errors
    /// As [`Folder::checkpoint`]; if ranks do not fit together.
    pub fn checkpoint_with(&self, options: &OpenOptions) -> Result<Box<dyn Checkpoint>, Error> {
        match self {
            Folder::Disk(path) => Ok(open_with(path, options)?),
            Folder::Variant { path, variant } => {
                Ok(open_with(path, &OpenOptions { variant: Some(variant), ..*options })?)
            }
            Folder::Headers { weights, .. } => Ok(Box::new(RowScaled::new(weights.clone(), options.scaled)?)),
            Folder::Embedded { name, files, .. } => {
                let found = volary_weights::format::FILES
                    .iter()
                    .find_map(|weights| files.iter().find(|(file, _)| file == weights));
                match found {
                    Some((file, bytes)) => Ok(Box::new(Memory::new(Path::new(name).join(file), *bytes)?)),
                    None => Err(volary_weights::Error::NoWeights {
                        folder: self.path().into(),
                        looked_for: volary_weights::format::FILES,
                    }
                    .into()),
                }
            }
        }
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// If there is none, or its files are broken.
    pub fn tokenizer(&self) -> Result<Tokenizer, Error> {
        match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => {
                Ok(Tokenizer::from_folder(path)?)
            }
            Folder::Embedded { .. } => {
                let config = self.read("tokenizer_config.json").ok();
                Ok(Tokenizer::from_bytes(&self.read("tokenizer.json")?, config.as_deref())?)
            }
        }
    }

    /// The license that the head of its README names.
    pub fn license(&self) -> Option<String> {
        let text = self.read("README.md").ok()?;
        let text = String::from_utf8_lossy(&text);
        let (head, _) = text.trim_start().strip_prefix("---")?.split_once("\n---")?;
        let field = |name: &str| {
            let value = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            Some(value.trim().trim_matches(['"', '\'']).to_owned()).filter(|value| !value.is_empty())
        };
        field("license").map(|license| match license.as_str() {
            "other" => field("license_name").unwrap_or(license),
            _ => license,
        })
    }

    /// What is done to pictures.
    ///
    /// # Errors
    /// If that is not described, or malformed.
    pub fn preprocessor(&self) -> Result<Preprocessor, Error> {
        match self {
            Folder::Disk(path) | Folder::Variant { path, .. } | Folder::Headers { path, .. } => {
                Ok(Preprocessor::from_folder(path)?)
            }
            Folder::Embedded { .. } => {
                let name = "preprocessor_config.json";
                let text = String::from_utf8_lossy(&self.read(name)?).into_owned();
                Ok(Preprocessor::from_json(&self.path().join(name), &text)?)
            }
        }
    }
}
