//! Diffusers folders: `model_index.json` and a subfolder for each part.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::shards::is_file_name;
use crate::error::Error;

/// The file that describes a pipeline.
pub const FILE: &str = "model_index.json";
/// The longest description that is read.
const LIMIT: u64 = 1 << 20;

/// A pipeline: the parts that a `model_index.json` names.
#[derive(Debug, Clone, PartialEq)]
pub struct Pipeline {
    /// Its class, e.g. `StableDiffusionPipeline`.
    pub class: String,
    /// Its parts by name.
    pub components: Vec<Component>,
    /// The parts that it could have and has not (`[null, null]`).
    pub absent: Vec<String>,
    /// Everything else that is said, e.g. `requires_safety_checker`.
    pub settings: BTreeMap<String, Value>,
}

/// A part of a pipeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Component {
    /// Its name, e.g. `unet`.
    pub name: String,
    /// Its folder.
    pub folder: PathBuf,
    /// The library that its class is from, e.g. `diffusers`.
    pub library: String,
    /// Its class, e.g. `UNet2DConditionModel`.
    pub class: String,
}

/// One thing that is wrong with a `model_index.json`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PipelineProblem {
    /// Not an object in JSON.
    #[error("it is not the expected JSON: {0}")]
    NotJson(String),
    /// It is larger than any honest one.
    #[error("it has {found} bytes, at most {LIMIT} are accepted")]
    TooLong {
        /// Its length.
        found: u64,
    },
    /// It does not say what the pipeline is.
    #[error("it has no `_class_name`, the name of the pipeline")]
    NoClass,
    /// A part that is not a library and a class.
    #[error("`{name}` is {found}, expected a library and a class")]
    NotAComponent {
        /// The part.
        name: String,
        /// What is there.
        found: String,
    },
    /// A part whose name leads out of the folder.
    #[error("`{name}` is not the name of a folder beside it")]
    OutOfFolder {
        /// The part.
        name: String,
    },
    /// A part without its folder.
    #[error("`{name}` is {library}'s {class}, and its folder is missing")]
    NoFolder {
        /// The part.
        name: String,
        /// Its library.
        library: String,
        /// Its class.
        class: String,
    },
}

impl Pipeline {
    /// Reads the description of a folder.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Pipeline`] with all that is wrong.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let path = folder.join(FILE);
        let io = |source| Error::Io { path: path.clone(), source };
        let wrong = |problems| Error::Pipeline { path: path.clone(), problems };
        let found = std::fs::metadata(&path).map_err(io)?.len();
        if found > LIMIT {
            return Err(wrong(vec![PipelineProblem::TooLong { found }]));
        }
        let text = std::fs::read(&path).map_err(io)?;
        let (pipeline, mut problems) = Self::parse(folder, &text).map_err(|problem| wrong(vec![problem]))?;
        for Component { name, folder, library, class } in &pipeline.components {
            if !folder.is_dir() {
                let [name, library, class] = [name, library, class].map(String::clone);
                problems.push(PipelineProblem::NoFolder { name, library, class });
            }
        }
        if problems.is_empty() { Ok(pipeline) } else { Err(wrong(problems)) }
    }

    fn parse(folder: &Path, text: &[u8]) -> Result<(Self, Vec<PipelineProblem>), PipelineProblem> {
        let described: BTreeMap<String, Value> =
            serde_json::from_slice(text).map_err(|error| PipelineProblem::NotJson(error.to_string()))?;
        let mut problems = Vec::new();
        let mut pipeline = Self {
            class: String::new(),
            components: Vec::new(),
            absent: Vec::new(),
            settings: BTreeMap::new(),
        };
        for (name, value) in described {
            match value {
                Value::String(class) if name == "_class_name" => pipeline.class = class,
                Value::Array(items) if !name.starts_with('_') => match items.as_slice() {
                    [Value::Null, Value::Null] => pipeline.absent.push(name),
                    [Value::String(_), Value::String(_)] if !is_file_name(&name) => {
                        problems.push(PipelineProblem::OutOfFolder { name });
                    }
                    [Value::String(library), Value::String(class)] => {
                        let (library, class) = (library.clone(), class.clone());
                        pipeline.components.push(Component {
                            folder: folder.join(&name),
                            name,
                            library,
                            class,
                        });
                    }
                    [Value::String(_), _] | [_, Value::String(_)] => {
                        let found = Value::Array(items).to_string();
                        problems.push(PipelineProblem::NotAComponent { name, found });
                    }
                    _ => drop(pipeline.settings.insert(name, Value::Array(items))),
                },
                value => drop(pipeline.settings.insert(name, value)),
            }
        }
        if pipeline.class.is_empty() {
            problems.push(PipelineProblem::NoClass);
        }
        Ok((pipeline, problems))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn folder(index: &str, parts: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(FILE), index).unwrap();
        parts.iter().for_each(|part| fs::create_dir(folder.path().join(part)).unwrap());
        folder
    }

    const INDEX: &str = r#"{"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.42.1",
        "feature_extractor": [null, null], "requires_safety_checker": false, "sizes": [512, 768],
        "unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}"#;

    #[test]
    fn the_parts_are_named_with_folder_library_and_class() {
        let folder = folder(INDEX, &["unet", "text_encoder"]);
        let pipeline = Pipeline::open(folder.path()).unwrap();
        assert_eq!(pipeline.class, "StableDiffusionPipeline");
        let [text_encoder, unet] = &pipeline.components[..] else { panic!("{pipeline:?}") };
        let expected = ("text_encoder", "transformers", "CLIPTextModel");
        assert_eq!((&*text_encoder.name, &*text_encoder.library, &*text_encoder.class), expected);
        assert_eq!(unet.folder, folder.path().join("unet"));
        assert_eq!(pipeline.absent, ["feature_extractor"]);
        assert_eq!(pipeline.settings["requires_safety_checker"], false);
        assert_eq!(pipeline.settings["sizes"], serde_json::json!([512, 768]));
    }

    #[test]
    fn everything_that_is_wrong_comes_at_once() {
        let index = r#"{"../unet": ["diffusers", "X"], "vae": ["diffusers", "AutoencoderKL"], "tokenizer": ["x", 1]}"#;
        let Err(Error::Pipeline { problems, .. }) = Pipeline::open(folder(index, &[]).path()) else {
            panic!()
        };
        assert_eq!(
            problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [
                "`../unet` is not the name of a folder beside it",
                r#"`tokenizer` is ["x",1], expected a library and a class"#,
                "it has no `_class_name`, the name of the pipeline",
                "`vae` is diffusers's AutoencoderKL, and its folder is missing",
            ]
        );
    }

    #[test]
    fn what_is_no_description_is_refused() {
        let problem = |index: &str| match Pipeline::open(folder(index, &[]).path()) {
            Err(Error::Pipeline { mut problems, .. }) => problems.remove(0),
            other => panic!("{other:?}"),
        };
        assert!(matches!(problem("[]"), PipelineProblem::NotJson(_)));
        assert!(matches!(problem(&"[".repeat(100_000)), PipelineProblem::NotJson(_)));
        assert!(matches!(problem(&" ".repeat(2 << 20)), PipelineProblem::TooLong { .. }));
        assert!(matches!(Pipeline::open(Path::new("/none")), Err(Error::Io { .. })));
    }
}
