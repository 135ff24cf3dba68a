//! The tokenizers library's pipeline, with our own parts where it has none.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Deserializer};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizedString, NormalizerWrapper, PostProcessorWrapper,
    PreTokenizerWrapper, Result, Token, TokenizerImpl,
};

use super::chinese::{self, WordPieces};
use super::icetk;
use super::sentencepiece::{self, SentencePiece};

/// Added tokens, normalizer, pre-tokenizer, model, post-processor, decoder.
pub(super) type Engine = TokenizerImpl<Model, Normalizer, PreTokenizerWrapper, PostProcessorWrapper, Decoder>;

/// What cuts normalized text into tokens.
#[derive(Clone, Debug)]
#[expect(clippy::large_enum_variant, reason = "there is one to a tokenizer")]
pub(super) enum Model {
    Library(ModelWrapper),
    SentencePiece(Arc<SentencePiece>),
    /// SentencePiece, then a comma after a digit by itself.
    Cpm(Arc<SentencePiece>),
    WordPieces(Arc<WordPieces>),
}

impl tokenizers::Model for Model {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, text: &str) -> Result<Vec<Token>> {
        let cut = |model: &SentencePiece| {
            let cuts = model.cut(text).into_iter();
            cuts.map(|cut| token(model.id(cut.piece))).collect()
        };
        Ok(match self {
            Model::Library(model) => return model.tokenize(text),
            Model::SentencePiece(model) => cut(model),
            Model::Cpm(model) => chinese::cut_cpm(model, text).into_iter().map(token).collect(),
            Model::WordPieces(pieces) => pieces.cut(text).into_iter().map(token).collect(),
        })
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Model::Library(model) => model.token_to_id(token),
            Model::SentencePiece(model) | Model::Cpm(model) => model.token_to_id(token),
            Model::WordPieces(pieces) => pieces.id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Model::Library(model) => model.id_to_token(id),
            Model::SentencePiece(model) | Model::Cpm(model) => model.tokens().get(id as usize).cloned(),
            Model::WordPieces(pieces) => pieces.tokens().get(id as usize).cloned(),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        let numbered = |tokens: &[String]| tokens.iter().cloned().zip(0..).collect();
        match self {
            Model::Library(model) => model.get_vocab(),
            Model::SentencePiece(model) | Model::Cpm(model) => numbered(model.tokens()),
            Model::WordPieces(pieces) => numbered(pieces.tokens()),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Model::Library(model) => model.get_vocab_size(),
            Model::SentencePiece(model) | Model::Cpm(model) => model.tokens().len(),
            Model::WordPieces(pieces) => pieces.tokens().len(),
        }
    }

    fn save(&self, folder: &Path, prefix: Option<&str>) -> Result<Vec<PathBuf>> {
        match self {
            Model::Library(model) => model.save(folder, prefix),
            _ => Err("a model read from vocabulary files is not written again".into()),
        }
    }

    fn get_trainer(&self) -> TrainerWrapper {
        match self {
            Model::Library(model) => model.get_trainer(),
            _ => TrainerWrapper::BpeTrainer(BpeTrainer::default()),
        }
    }
}

/// A token of the pipeline; nobody reads its spelling or its place.
fn token(id: u32) -> Token {
    Token::new(id, String::new(), (0, 0))
}

impl<'de> Deserialize<'de> for Model {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        ModelWrapper::deserialize(deserializer).map(Model::Library)
    }
}

/// One change to the text.
#[derive(Clone, Debug)]
pub(super) enum Step {
    Library(NormalizerWrapper),
    /// Words by jieba, one space between them.
    Words,
    CpmCleaning(chinese::Cleaning),
    PlatoCleaning,
    IceSpaces,
    SentencePiece(Arc<SentencePiece>, Prefix),
}

/// Where a text, of several around special tokens, gets the space before its first word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Prefix {
    /// After every special token too.
    Always,
    /// Only at the very beginning.
    First,
}

/// The changes to a text before it is cut.
#[derive(Clone, Debug)]
pub(super) struct Normalizer(pub Vec<Step>);

impl tokenizers::Normalizer for Normalizer {
    fn normalize(&self, text: &mut NormalizedString) -> Result<()> {
        let begins = text.offsets_original().0 == 0;
        for step in &self.0 {
            let changed = match step {
                Step::Library(normalizer) => {
                    normalizer.normalize(text)?;
                    continue;
                }
                Step::Words => chinese::spaced_words(text.get()),
                Step::CpmCleaning(cleaning) => cleaning.apply(text.get())?,
                Step::PlatoCleaning => chinese::clean_plato(text.get())?,
                Step::IceSpaces => icetk::spell_spaces(text.get()),
                Step::SentencePiece(model, prefix) => {
                    model.normalize(text.get(), begins || *prefix == Prefix::Always)
                }
            };
            *text = NormalizedString::from(changed);
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Normalizer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        NormalizerWrapper::deserialize(deserializer)
            .map(|normalizer| Normalizer(vec![Step::Library(normalizer)]))
    }
}

/// How tokens become text.
#[derive(Clone, Debug)]
pub(super) enum Decoder {
    Library(DecoderWrapper),
    SentencePiece(Arc<SentencePiece>),
    /// Without the spaces between words, with those that the text had.
    Blocks(Box<Decoder>),
    IceSpaces(Arc<SentencePiece>),
    WordPieces(Arc<WordPieces>),
}

impl tokenizers::Decoder for Decoder {
    fn decode_chain(&self, tokens: Vec<String>) -> Result<Vec<String>> {
        let join = |model: &SentencePiece| {
            let trim_first = model.add_dummy_prefix || model.remove_extra_spaces;
            sentencepiece::join(&tokens, trim_first, model.remove_extra_spaces, model.has_bytes())
        };
        Ok(vec![match self {
            Decoder::Library(decoder) => return decoder.decode_chain(tokens),
            Decoder::SentencePiece(model) => join(model),
            Decoder::IceSpaces(model) => icetk::read_spaces(&join(model)),
            Decoder::Blocks(inner) => chinese::unblock(&inner.decode_chain(tokens)?.concat()),
            Decoder::WordPieces(pieces) => pieces.join(&tokens),
        }])
    }
}

impl<'de> Deserialize<'de> for Decoder {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        DecoderWrapper::deserialize(deserializer).map(Decoder::Library)
    }
}
