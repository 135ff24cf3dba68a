//! Text to token ids and back, with the ids that Python's `transformers` gives.
//!
//! A tokenizer is read from a checkpoint folder: from `tokenizer.json` if it is there, else from the
//! vocabulary files of its family, which become the same thing on the way:
//!
//! | files | family |
//! | --- | --- |
//! | `tokenizer.json` | any that the `tokenizers` library knows: BPE, WordPiece, Unigram |
//! | `vocab.json` + `merges.txt` | CLIP, GPT-2, RoBERTa, GLM in English |
//! | `spiece.model`, `tokenizer.model`, ... | SentencePiece: T5, XLM-R, LLaMA, CPM-1, PanGu-alpha, Chinese GLM, GLM-130B |
//! | `spm.model` + `vocab.txt` | PLATO |
//! | `vocab.txt` | BERT, ERNIE, PLUG; CPM-2 and Yuan 1.0 if it has `<eod>` |
//!
//! Whose files they are, [`TokenizerKind`], is said by `tokenizer_class`, else by `config.json`'s `model_type`,
//! else by the files' names.
//!
//! `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say which tokens are special,
//! which one pads, on which side, and how long a text may be.
//!
//! ```no_run
//! use volary_text::tokenizer::{BatchOptions, PadTo, Tokenizer};
//!
//! let tokenizer = Tokenizer::from_folder("openai/clip-vit-base-patch32".as_ref())?;
//! let ids = tokenizer.encode("a photo of a cat")?.ids;
//! let options = BatchOptions { max_length: Some(77), pad: PadTo::Length(77) };
//! let batch = tokenizer.encode_batch(&["a cat", "一只狗"], &options)?; // [2, 77]
//! # Ok::<(), volary_text::tokenizer::TokenizerError>(())
//! ```

mod batch;
mod charsmap;
mod check;
mod chinese;
mod config;
mod engine;
mod error;
mod files;
mod icetk;
mod kind;
mod proto;
mod raw;
mod sentencepiece;
mod stream;
#[cfg(test)]
mod tests;
mod train;

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::utils::padding::{PaddingDirection, PaddingParams};
use tokenizers::utils::truncation::TruncationDirection;
use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessor};

pub use batch::{Batch, BatchOptions, PadTo};
pub use error::TokenizerError;
pub use kind::TokenizerKind;
pub use stream::DecodeStream;
pub use train::train_wordpiece;

pub(crate) use files::{read_json, utf8};

use check::{Ids, added_tokens, check};
use config::{Config, Role};
use engine::{Decoder, Engine, Model, Normalizer, Step};

/// An end of a row of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The beginning.
    Left,
    /// The end.
    Right,
}

/// Whether the tokens that mark a text's beginning and end are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Marks {
    With,
    Without,
}

/// The tokens of one text, or of a pair.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Encoding {
    /// The ids, `[seq]`.
    pub ids: Vec<u32>,
    /// The tokens as the vocabulary spells them, `[seq]`.
    pub tokens: Vec<String>,
    /// 0 for the first text and 1 for the second, as the family has it, `[seq]`.
    pub type_ids: Vec<u32>,
}

/// A vocabulary, and the rules that cut text into its tokens.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Engine,
    kind: TokenizerKind,
    file: PathBuf,
    named: [Option<u32>; Role::ALL.len()],
    model_max_length: Option<usize>,
    padding_side: Side,
    truncation_side: Side,
    clean_up: bool,
    word_end: Option<String>,
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint folder.
    ///
    /// # Errors
    /// [`TokenizerError`] names the file, the field, what was expected and what was found.
    pub fn from_folder(dir: &Path) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::read(dir, None)
    }

    /// Reads the tokenizer of a checkpoint folder whose kind is known, whatever its files say of it.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`].
    pub fn from_folder_as(dir: &Path, kind: TokenizerKind) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::read(dir, Some(kind))
    }

    fn read(dir: &Path, kind: Option<TokenizerKind>) -> Result<Tokenizer, TokenizerError> {
        let json = |name: &str| -> Result<Option<(PathBuf, Value)>, TokenizerError> {
            let file = dir.join(name);
            match read(&file)? {
                Some(bytes) => Ok(Some((file.clone(), files::read_json(&file, &bytes)?))),
                None => Ok(None),
            }
        };
        let settings = json("tokenizer_config.json")?;
        let special_map = json("special_tokens_map.json")?;
        let added = json("added_tokens.json")?;
        let config = Config::read(
            settings.as_ref().map(by_ref),
            special_map.as_ref().map(by_ref),
            added.as_ref().map(by_ref),
        )?;
        let named = Named::find(dir, &config, kind)?;

        let file = dir.join("tokenizer.json");
        if let Some(bytes) = read(&file)? {
            let root = files::read_json(&file, &bytes)?;
            return assemble(file, &bytes, &root, Ids::Contiguous, &config, named.kind);
        }
        let (vocab_file, merges_file) = (dir.join("vocab.json"), dir.join("merges.txt"));
        if let (Some(vocab), Some(merges)) = (read(&vocab_file)?, read(&merges_file)?) {
            let vocab = files::read_vocab_json(&vocab_file, &vocab, &config)?;
            let merges = files::read_merges(&merges_file, &merges, &vocab)?;
            let kind = match named.kind {
                Some(kind) => kind,
                None if vocab.keys().any(|token| token.ends_with("</w>")) => TokenizerKind::Clip,
                None => TokenizerKind::Gpt2,
            };
            let root = match kind {
                TokenizerKind::Clip => files::clip(vocab, merges, &config),
                TokenizerKind::Gpt2
                | TokenizerKind::Roberta
                | TokenizerKind::GlmGpt2
                | TokenizerKind::GlmRoberta => files::byte_level(vocab, merges, &config, kind),
                _ => {
                    let known = vec!["CLIPTokenizer", "GPT2Tokenizer", "RobertaTokenizer"];
                    return Err(named.unknown("vocab.json + merges.txt", known));
                }
            };
            let bytes = root.to_string().into_bytes();
            return assemble(vocab_file, &bytes, &root, Ids::Contiguous, &config, Some(kind));
        }

        let vocab_file = dir.join("vocab.txt");
        let vocab = read(&vocab_file)?;
        for name in MODEL_FILES {
            let file = dir.join(name);
            let Some(bytes) = read(&file)? else {
                continue;
            };
            let words = vocab.as_ref().map(|vocab| files::lines(&vocab_file, vocab)).transpose()?;
            let kind = match named.kind {
                None if name == "spm.model" && words.is_some() => TokenizerKind::Plato,
                None => TokenizerKind::of_model_file(name),
                Some(TokenizerKind::GlmChinese) if config.fix_command_token == Some(false) => {
                    TokenizerKind::GlmChineseUnfixed
                }
                Some(kind) => kind,
            };
            let inner = raw::sentencepiece(&file, &bytes, words, kind, &config)?;
            return finish(file, inner, None, &config, kind);
        }
        if let Some(bytes) = vocab {
            let tokens = files::lines(&vocab_file, &bytes)?;
            let words = TokenizerKind::of_words(tokens.iter().map(String::as_str));
            let kind = named.kind.filter(|kind| *kind != TokenizerKind::Library).unwrap_or(words);
            if kind == TokenizerKind::Cpm2 {
                let inner = raw::word_pieces(&vocab_file, tokens)?;
                return finish(vocab_file, inner, None, &config, kind);
            }
            let root = files::bert(files::read_vocab_txt(&vocab_file, &bytes)?, &config, kind);
            let bytes = root.to_string().into_bytes();
            return assemble(vocab_file, &bytes, &root, Ids::Lines, &config, Some(kind));
        }
        let others = ["tokenizer.json", "vocab.json + merges.txt", "vocab.txt"];
        Err(TokenizerError::NotFound {
            folder: dir.into(),
            looked_for: others.into_iter().chain(MODEL_FILES).collect(),
        })
    }

    /// Reads a tokenizer embedded in a program: the bytes of `tokenizer.json` and `tokenizer_config.json`.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`], under those two file names.
    pub fn from_bytes(tokenizer_json: &[u8], config: Option<&[u8]>) -> Result<Tokenizer, TokenizerError> {
        let settings = config
            .map(|bytes| {
                let file = PathBuf::from("tokenizer_config.json");
                files::read_json(&file, bytes).map(|value| (file, value))
            })
            .transpose()?;
        let config = Config::read(settings.as_ref().map(by_ref), None, None)?;
        let file = PathBuf::from("tokenizer.json");
        let root = files::read_json(&file, tokenizer_json)?;
        let kind = config.class.as_deref().map(TokenizerKind::of_name);
        assemble(file, tokenizer_json, &root, Ids::Contiguous, &config, kind)
    }

    /// The tokens of a text, between the special tokens that its family puts around it.
    ///
    /// # Errors
    /// [`TokenizerError::Library`] if a word is unknown and the vocabulary has no token for that.
    pub fn encode(&self, text: &str) -> Result<Encoding, TokenizerError> {
        self.encode_input(text.into(), Marks::With)
    }

    /// The tokens of a text alone. Special tokens that the text itself spells out are still found.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_without_special(&self, text: &str) -> Result<Encoding, TokenizerError> {
        self.encode_input(text.into(), Marks::Without)
    }

    /// Two texts as one sequence, told apart by special tokens and, in BERT, by type ids.
    /// An empty second text counts as none, as in transformers.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_pair(&self, first: &str, second: &str) -> Result<Encoding, TokenizerError> {
        match second {
            "" => self.encode(first),
            _ => self.encode_input((first, second).into(), Marks::With),
        }
    }

    /// The text of some tokens. Ids outside the vocabulary are passed over.
    ///
    /// `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let text = self
            .guard(|inner| inner.decode(ids, skip_special))
            .unwrap_or_else(|_| self.tokens(ids).join(" "));
        let text = match &self.word_end {
            Some(end) => strip(&text.replace(end, " ")).to_owned(),
            None => text,
        };
        match self.clean_up {
            true => CLEAN_UP.iter().fold(text, |text, (apart, together)| text.replace(apart, together)),
            false => text,
        }
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, an added one as the normalizer leaves it.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// How many tokens there are, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The token that fills short rows.
    pub fn pad_id(&self) -> Option<u32> {
        self.named(Role::Pad)
    }

    /// The token before a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.named(Role::Bos)
    }

    /// The token after a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.named(Role::Eos)
    }

    /// BERT's first token, whose state stands for the sentence.
    pub fn cls_id(&self) -> Option<u32> {
        self.named(Role::Cls)
    }

    /// The token between two texts.
    pub fn sep_id(&self) -> Option<u32> {
        self.named(Role::Sep)
    }

    /// The token for what the vocabulary cannot spell.
    pub fn unk_id(&self) -> Option<u32> {
        self.named(Role::Unk)
    }

    /// The token that hides a word.
    pub fn mask_id(&self) -> Option<u32> {
        self.named(Role::Mask)
    }

    /// The token that ends a document in CPM's vocabularies, where generation stops.
    pub fn eod_id(&self) -> Option<u32> {
        self.token_to_id("<eod>")
    }

    /// GLM's token before a piece to be generated.
    pub fn sop_id(&self) -> Option<u32> {
        self.first_of(&["<|startofpiece|>", "<sop>"])
    }

    /// GLM's token after a generated piece.
    pub fn eop_id(&self) -> Option<u32> {
        self.first_of(&["<|endofpiece|>", "<eop>"])
    }

    /// GLM's token for a sentence to be generated.
    pub fn smask_id(&self) -> Option<u32> {
        self.token_to_id("[sMASK]")
    }

    /// GLM's token for the rest of a document.
    pub fn gmask_id(&self) -> Option<u32> {
        self.token_to_id("[gMASK]")
    }

    /// Whether a token is left out where special ones are skipped.
    pub fn is_special(&self, id: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        self.id_to_token(id).is_some_and(|token| added.is_special_token(&token))
    }

    /// The ids of all special tokens, ascending.
    pub fn special_ids(&self) -> Vec<u32> {
        let added = self.inner.get_added_tokens_decoder();
        let mut ids: Vec<u32> = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    /// Whose conventions this tokenizer follows.
    pub fn kind(&self) -> TokenizerKind {
        self.kind
    }

    /// The most tokens the model takes, special ones included; `None` where the files set no limit.
    pub fn model_max_length(&self) -> Option<usize> {
        self.model_max_length
    }

    /// Where padding goes.
    pub fn padding_side(&self) -> Side {
        self.padding_side
    }

    /// Where long texts are cut.
    pub fn truncation_side(&self) -> Side {
        self.truncation_side
    }

    fn first_of(&self, tokens: &[&str]) -> Option<u32> {
        tokens.iter().find_map(|token| self.token_to_id(token))
    }

    fn named(&self, role: Role) -> Option<u32> {
        self.named[role as usize]
    }

    fn encode_input(&self, input: tokenizers::EncodeInput, marks: Marks) -> Result<Encoding, TokenizerError> {
        let encoded = self.guard(|inner| inner.encode_fast(input, marks == Marks::With))?;
        Ok(self.encoding(&encoded))
    }

    /// Each text with its special tokens in at most `limit` tokens, and whether it was cut.
    fn encode_truncated(
        &self,
        texts: Vec<&str>,
        limit: Option<usize>,
    ) -> Result<Vec<(tokenizers::Encoding, bool)>, TokenizerError> {
        let processor = self.inner.get_post_processor();
        let special = processor.map_or(0, |processor| processor.added_tokens(false));
        let room = match limit {
            None => usize::MAX,
            Some(length) => {
                length.checked_sub(special).ok_or(TokenizerError::TooShort { length, special })?
            }
        };
        let side = match self.truncation_side {
            Side::Left => TruncationDirection::Left,
            Side::Right => TruncationDirection::Right,
        };
        let rows = self.guard(|inner| inner.encode_batch_fast(texts, false))?;
        rows.into_iter()
            .map(|mut row| {
                let truncated = row.len() > room;
                row.truncate(room, 0, side);
                row.take_overflowing();
                let row = self.guard(|inner| inner.post_process(row, None, true))?;
                Ok((row, truncated))
            })
            .collect()
    }

    fn encoding(&self, encoded: &tokenizers::Encoding) -> Encoding {
        Encoding {
            ids: encoded.get_ids().to_vec(),
            tokens: self.tokens(encoded.get_ids()),
            type_ids: encoded.get_type_ids().to_vec(),
        }
    }

    fn tokens(&self, ids: &[u32]) -> Vec<String> {
        ids.iter().filter_map(|id| self.id_to_token(*id)).collect()
    }

    fn guard<T>(&self, call: impl FnOnce(&Engine) -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
        guard(&self.file, || call(&self.inner))
    }
}

/// What `clean_up_tokenization_spaces` puts together again, in this order.
const CLEAN_UP: [(&str, &str); 10] = [
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
];

/// The names under which SentencePiece models are posted.
const MODEL_FILES: [&str; 8] = [
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "spm.model",
    "cog-pretrain.model",
    "ice_text.model",
    "chinese_vocab.model",
    "vocab.model",
];

/// Which kind a folder's files name, and where.
struct Named {
    file: PathBuf,
    name: String,
    kind: Option<TokenizerKind>,
}

impl Named {
    fn find(dir: &Path, config: &Config, kind: Option<TokenizerKind>) -> Result<Named, TokenizerError> {
        let (file, name) = match &config.class {
            Some(class) => (dir.join("tokenizer_config.json"), Some(class.clone())),
            None => (dir.join("config.json"), class_of_model(dir)?),
        };
        let kind = kind.or_else(|| name.as_deref().map(TokenizerKind::of_name));
        Ok(Named { file, name: name.unwrap_or_default(), kind })
    }

    fn unknown(self, files: &'static str, known: Vec<&'static str>) -> TokenizerError {
        TokenizerError::UnknownClass { file: self.file, class: self.name, files, known }
    }
}

/// Reads a `tokenizer.json`, checked, and refines it by the configuration.
fn assemble(
    file: PathBuf,
    bytes: &[u8],
    root: &Value,
    ids: Ids,
    config: &Config,
    kind: Option<TokenizerKind>,
) -> Result<Tokenizer, TokenizerError> {
    check(&file, root, ids)?;
    let mut inner = guard(&file, || Engine::from_bytes(bytes))?;
    for (declared, token) in root.as_object().map_or(Ok(Vec::new()), |root| added_tokens(&file, root))? {
        check_added_id(&file, &inner, &token, declared)?;
    }
    // Texts are cut and padded here, for each batch; the file's padding tells how.
    let padding = inner.get_padding().cloned();
    inner.with_padding(None);
    guard(&file, || inner.with_truncation(None).map(|_| ()))?;
    guard(&file, || refine_normalizer(&mut inner, config))?;
    let kind = kind.unwrap_or_else(|| TokenizerKind::of_model(&inner));
    if matches!(kind, TokenizerKind::Cpm | TokenizerKind::PanguAlpha) {
        guard(&file, || raw::cut_words_first(&mut inner))?;
    }
    finish(file, inner, padding, config, kind)
}

/// Adds the tokens that the configuration names, and finds the special ones.
fn finish(
    file: PathBuf,
    mut inner: Engine,
    padding: Option<PaddingParams>,
    config: &Config,
    kind: TokenizerKind,
) -> Result<Tokenizer, TokenizerError> {
    for (declared, token) in &config.added {
        guard(&file, || inner.add_tokens([token.clone()]))?;
        check_added_id(&file, &inner, &token.content, *declared)?;
    }
    let named = config.named.iter().map(|(_, token)| token);
    for token in named.chain(&config.extra) {
        let added = inner.get_added_vocabulary().get_vocab();
        if !added.contains_key(&token.content) {
            guard(&file, || inner.add_tokens([token.clone()]))?;
        }
    }

    let named = Role::ALL.map(|role| match config.token(role) {
        Some(token) => inner.token_to_id(&token.content),
        None => {
            let padding = padding.as_ref().filter(|_| role == Role::Pad);
            let padding = padding.map(|padding| padding.pad_token.as_str());
            let spellings = padding.into_iter().chain(kind.spellings(role).iter().copied());
            spellings.into_iter().find_map(|token| inner.token_to_id(token))
        }
    });
    let side = padding.map(|padding| match padding.direction {
        PaddingDirection::Left => Side::Left,
        PaddingDirection::Right => Side::Right,
    });
    Ok(Tokenizer {
        named,
        kind,
        model_max_length: config.model_max_length,
        padding_side: config.padding_side.or(side).unwrap_or(Side::Right),
        truncation_side: config.truncation_side.unwrap_or(Side::Right),
        clean_up: config.clean_up && !matches!(inner.get_model(), Model::Library(ModelWrapper::BPE(_))),
        word_end: word_end(&inner),
        inner,
        file,
    })
}

impl TokenizerKind {
    /// From the tokenizer itself, where no file names its class.
    fn of_model(inner: &Engine) -> TokenizerKind {
        match inner.get_model() {
            Model::Library(ModelWrapper::WordPiece(_)) => TokenizerKind::Bert,
            Model::Library(ModelWrapper::BPE(_)) if inner.token_to_id("<|startoftext|>").is_some() => {
                TokenizerKind::Clip
            }
            _ => TokenizerKind::Library,
        }
    }
}

/// BERT's own settings outrank the normalizer of its `tokenizer.json`, as in transformers.
fn refine_normalizer(inner: &mut Engine, config: &Config) -> tokenizers::Result<()> {
    let steps = inner.get_normalizer().map_or(&[][..], |normalizer| &normalizer.0);
    let [Step::Library(NormalizerWrapper::BertNormalizer(bert))] = steps else {
        return Ok(());
    };
    let refined = BertNormalizer::new(
        bert.clean_text,
        config.chinese_chars.unwrap_or(bert.handle_chinese_chars),
        config.strip_accents.unwrap_or(bert.strip_accents),
        config.lower_case.unwrap_or(bert.lowercase),
    );
    let refined = NormalizerWrapper::BertNormalizer(refined);
    inner.with_normalizer(Some(Normalizer(vec![Step::Library(refined)]))).map(|_| ())
}

/// An added token has the id it declares, and no other token has it.
fn check_added_id(file: &Path, inner: &Engine, token: &str, declared: u32) -> Result<(), TokenizerError> {
    match inner.token_to_id(token) {
        Some(found) if found != declared => {
            Err(TokenizerError::AddedTokenId { file: file.into(), token: token.into(), declared, found })
        }
        _ => Ok(()),
    }
}

/// CLIP marks the ends of words, and its byte-level decoder leaves the marks in.
fn word_end(inner: &Engine) -> Option<String> {
    match (inner.get_model(), inner.get_decoder()) {
        (Model::Library(ModelWrapper::BPE(bpe)), Some(Decoder::Library(DecoderWrapper::ByteLevel(_)))) => {
            bpe.end_of_word_suffix.clone().filter(|suffix| !suffix.is_empty())
        }
        _ => None,
    }
}

/// Python's `str.strip`, which also takes the four ASCII separators.
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

/// A file's bytes, or `None` if it is not there.
pub(crate) fn read(file: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(TokenizerError::Read { file: file.into(), source }),
    }
}

/// `tokenizer_class`, or else `model_type`, of the model beside the tokenizer.
fn class_of_model(dir: &Path) -> Result<Option<String>, TokenizerError> {
    let file = dir.join("config.json");
    let Some(bytes) = read(&file)? else {
        return Ok(None);
    };
    let config = files::read_json(&file, &bytes)?;
    let field = |name: &str| config.get(name).and_then(Value::as_str).map(String::from);
    Ok(field("tokenizer_class").or_else(|| field("model_type")))
}

fn by_ref((file, value): &(PathBuf, Value)) -> (&Path, &Value) {
    (file, value)
}

/// Runs the library; its errors, and its panics on tables that contradict themselves, become ours.
fn guard<T>(file: &Path, call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, TokenizerError> {
    let message = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(done)) => return Ok(done),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "its tables contradict themselves".to_owned(),
    };
    Err(TokenizerError::Library { file: file.into(), message })
}
