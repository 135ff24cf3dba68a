//! The recipe of the embedded model: sizes, files, and the folder it is written to.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::FloatDType;
use volary_text::tokenizer::{Tokenizer, train_wordpiece};
use volary_vision::preprocess::Preprocessor;
use volary_weights::save;

use super::data::{EmojiData, Language};
use crate::clip::{ClipModel, EMOJI, Layout};
use crate::error::Error;
use crate::folder::Folder;

/// Styles that are never trained on: the first is used to develop, the second is looked at once.
pub const HELD_OUT: [&str; 2] = ["openmoji", "emojione2"];

const OPEN_CLIP_CONFIG: &str = include_str!("emoji/open_clip_config.json");
const PREPROCESSOR_CONFIG: &str = include_str!("emoji/preprocessor_config.json");
const TOKENIZER_CONFIG: &str = include_str!("emoji/tokenizer_config.json");

/// The preprocessor of the embedded model.
///
/// # Errors
/// Never, unless the file in this repository is malformed.
pub fn preprocessor() -> Result<Preprocessor, Error> {
    Ok(Preprocessor::from_json(Path::new("preprocessor_config.json"), PREPROCESSOR_CONFIG)?)
}

/// The run's tokenizer: `folder/tokenizer.json`; if it is not there yet, a copy of the one that the run's first
/// weights came with, or one trained on all captions.
///
/// # Errors
/// If it cannot be read or written.
pub fn tokenizer(data: &EmojiData, init: Option<&Folder>, folder: &Path) -> Result<Tokenizer, Error> {
    let file = folder.join("tokenizer.json");
    if !file.exists() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let json = match init {
            Some(init) => init.read("tokenizer.json")?.into_owned(),
            None => train(data)?,
        };
        fs::write(&file, json).map_err(Error::io(&file))?;
    }
    let json = fs::read(&file).map_err(Error::io(&file))?;
    Ok(Tokenizer::from_bytes(&json, Some(TOKENIZER_CONFIG.as_bytes()))?)
}

fn train(data: &EmojiData) -> Result<Vec<u8>, Error> {
    let captions = data.concepts.iter().flat_map(|concept| {
        Language::ALL.into_iter().flat_map(|language| {
            let captions = concept.captions(language);
            std::iter::once(&captions.name).chain(&captions.keywords)
        })
    });
    Ok(train_wordpiece(captions, EMOJI.text.vocab_size)?.into())
}

/// Writes the trained model as a folder in open_clip's layout, weights in f16. The model card is written by
/// hand.
///
/// # Errors
/// If a file cannot be written.
pub fn export(model: &ClipModel, tokenizer_json: &Path, folder: &Path) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let weights = folder.join("open_clip_model.safetensors");
    let keys = Layout::OpenClip.keys(&EMOJI.vision);
    let metadata = HashMap::from([("format".into(), "pt".into())]);
    save(model, keys, Some(FloatDType::F16), &weights, Some(metadata))?;
    let copied = folder.join("tokenizer.json");
    fs::copy(tokenizer_json, &copied).map_err(Error::io(&copied))?;
    for (name, text) in [
        ("open_clip_config.json", OPEN_CLIP_CONFIG),
        ("preprocessor_config.json", PREPROCESSOR_CONFIG),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ] {
        let file = folder.join(name);
        fs::write(&file, text).map_err(Error::io(&file))?;
    }
    Ok(())
}
