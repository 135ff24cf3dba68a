//! The folder of a trained CLIP, in open_clip's layout. All but its weights and its tokenizer is that of a template: the
//! configuration, and what is done to pictures and texts.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use burn::tensor::FloatDType;
use volary_text::tokenizer::{Tokenizer, train_wordpiece};
use volary_weights::save;

use super::data::{Dataset, Language};
use crate::clip::{ClipConfig, ClipModel};
use crate::error::Error;
use crate::folder::Folder;

const COPIED: [&str; 3] = ["open_clip_config.json", "preprocessor_config.json", "tokenizer_config.json"];

/// The run's tokenizer: `folder/tokenizer.json`; if it is not there yet, a copy of the one that the run's first weights came
/// with, or one trained on all captions.
///
/// # Errors
/// If it cannot be read or written, or the captions have more characters than the template's model has tokens.
pub fn tokenizer(
    data: &Dataset,
    template: &Folder,
    init: Option<&Folder>,
    folder: &Path,
) -> Result<Tokenizer, Error> {
    let file = folder.join("tokenizer.json");
    if !file.exists() {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let json = match init {
            Some(init) => init.read("tokenizer.json")?.into_owned(),
            None => train(data, ClipConfig::of(template)?.0.text.vocab_size)?,
        };
        fs::write(&file, json).map_err(Error::io(&file))?;
    }
    let json = fs::read(&file).map_err(Error::io(&file))?;
    Ok(Tokenizer::from_bytes(&json, Some(template.read("tokenizer_config.json")?.as_ref()))?)
}

fn train(data: &Dataset, vocab_size: usize) -> Result<Vec<u8>, Error> {
    let captions = data.concepts.iter().flat_map(|concept| {
        Language::ALL.into_iter().flat_map(|language| {
            let captions = concept.captions(language);
            std::iter::once(&captions.name).chain(&captions.keywords)
        })
    });
    Ok(train_wordpiece(captions, vocab_size)?.into())
}

/// Writes a trained model of the template's shape, weights in f16. The model card is written by hand.
///
/// # Errors
/// If a file cannot be written.
pub fn export(
    model: &ClipModel,
    template: &Folder,
    tokenizer_json: &Path,
    folder: &Path,
) -> Result<(), Error> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let weights = folder.join("open_clip_model.safetensors");
    let (config, layout) = ClipConfig::of(template)?;
    let metadata = HashMap::from([("format".into(), "pt".into())]);
    save(model, layout.keys(&config.vision), Some(FloatDType::F16), &weights, Some(metadata))?;
    let copied = folder.join("tokenizer.json");
    fs::copy(tokenizer_json, &copied).map_err(Error::io(&copied))?;
    for name in COPIED {
        let file = folder.join(name);
        fs::write(&file, template.read(name)?).map_err(Error::io(&file))?;
    }
    Ok(())
}
