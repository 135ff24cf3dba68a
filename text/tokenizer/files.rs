//! Vocabulary files without a `tokenizer.json`: the `tokenizer.json` they stand for.
//!
//! Sources: transformers 5 `BertTokenizer`, `CLIPTokenizer`, `GPT2Tokenizer`, `RobertaTokenizer`, whose ids
//! these match; THUDM/GLM's tokenizers for the command tokens after them.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::TokenizerError;
use super::TokenizerKind;
use super::check::{check_ids, check_merge};
use super::config::{Config, Role, wrong};

/// CLIP splits text into contractions, letters, single digits and runs of anything else.
const CLIP_WORDS: &str =
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+";

/// WordPiece gives up on longer words.
pub(super) const MAX_WORD_CHARS: usize = 100;

/// The lines of `vocab.txt`: the id is the line's number, the last of equal lines counts.
pub(super) fn read_vocab_txt(file: &Path, bytes: &[u8]) -> Result<Map<String, Value>, TokenizerError> {
    let vocab: Map<String, Value> = utf8(file, bytes)?
        .lines()
        .enumerate()
        .map(|(id, line)| (token_of(line).trim_end().to_owned(), json!(id)))
        .collect();
    match vocab.is_empty() {
        true => Err(TokenizerError::EmptyVocab { file: file.into() }),
        false => Ok(vocab),
    }
}

/// A line of `vocab.txt`; Paddle's say the id, which is the line's number, after a tab.
fn token_of(line: &str) -> &str {
    match line.split_once('\t') {
        Some((token, id)) if id.trim().parse::<u32>().is_ok() => token,
        _ => line,
    }
}

/// The tokens of a `vocab.txt` without the white space around them.
pub(super) fn lines(file: &Path, bytes: &[u8]) -> Result<Vec<String>, TokenizerError> {
    let lines: Vec<String> =
        utf8(file, bytes)?.lines().map(|line| token_of(line).trim().to_owned()).collect();
    match lines.is_empty() {
        true => Err(TokenizerError::EmptyVocab { file: file.into() }),
        false => Ok(lines),
    }
}

/// `vocab.json`, `{"token": id}`.
pub(super) fn read_vocab_json(
    file: &Path,
    bytes: &[u8],
    config: &Config,
) -> Result<Map<String, Value>, TokenizerError> {
    match read_json(file, bytes)? {
        Value::Object(vocab) => {
            check_ids(file, "", &vocab, config.added.keys().copied())?;
            Ok(vocab)
        }
        other => Err(wrong(file, "the file", "an object of tokens and ids", &other)),
    }
}

/// The lines of `merges.txt`, two tokens each, the most frequent first.
pub(super) fn read_merges(
    file: &Path,
    bytes: &[u8],
    vocab: &Map<String, Value>,
) -> Result<Vec<[String; 2]>, TokenizerError> {
    let mut merges = Vec::new();
    for (i, line) in utf8(file, bytes)?.lines().enumerate() {
        if line.starts_with("#version") {
            continue;
        }
        let at = format!("line {}", i + 1);
        let Some((left, right)) = pair(line) else {
            return Err(TokenizerError::MergeNotPair { file: file.into(), at, text: line.into() });
        };
        check_merge(file, &at, vocab, "", left, right)?;
        merges.push([left.to_owned(), right.to_owned()]);
    }
    Ok(merges)
}

/// `"a b"` is `("a", "b")`; any other number of spaces is no merge.
pub(super) fn pair(merge: &str) -> Option<(&str, &str)> {
    merge
        .split_once(' ')
        .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
}

/// One place of the row that a text, or a pair, becomes.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place<'a> {
    First,
    Second(u32),
    Mark(&'a str, u32),
}

/// The post-processor that puts marks around texts.
pub(super) fn template(single: &[Place], pair: &[Place], id: impl Fn(&str) -> Option<u64>) -> Value {
    let place = |place: &Place| match place {
        Place::First => json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        Place::Second(type_id) => json!({ "Sequence": { "id": "B", "type_id": type_id } }),
        Place::Mark(token, type_id) => json!({ "SpecialToken": { "id": token, "type_id": type_id } }),
    };
    let mut tokens = Map::new();
    for place in single.iter().chain(pair) {
        if let Place::Mark(token, _) = place {
            tokens.insert((*token).into(), json!({ "id": token, "ids": [id(token)], "tokens": [token] }));
        }
    }
    json!({
        "type": "TemplateProcessing",
        "single": single.iter().map(place).collect::<Vec<_>>(),
        "pair": pair.iter().map(place).collect::<Vec<_>>(),
        "special_tokens": tokens,
    })
}

/// BERT: clean, split Chinese, lower, split at spaces and punctuation, longest pieces first.
pub(super) fn bert(vocab: Map<String, Value>, config: &Config, kind: TokenizerKind) -> Value {
    use Place::{First, Mark, Second};
    let [unk, cls, sep] = [Role::Unk, Role::Cls, Role::Sep].map(|role| spelled(config, kind, role));
    let added = Added::of(&vocab, config, kind);
    let single = [Mark(&cls, 0), First, Mark(&sep, 0)];
    let pair = [Mark(&cls, 0), First, Mark(&sep, 0), Second(1), Mark(&sep, 1)];
    json!({
        "version": "1.0",
        "added_tokens": added.json(),
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": true,
            "handle_chinese_chars": config.chinese_chars.unwrap_or(true),
            "strip_accents": config.strip_accents.flatten(),
            "lowercase": config.lower_case.unwrap_or(true),
        },
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": template(&single, &pair, |token| added.id(&vocab, token)),
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": {
            "type": "WordPiece",
            "unk_token": unk,
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": MAX_WORD_CHARS,
            "vocab": vocab,
        },
    })
}

/// CLIP: NFC, lower, its own words, bytes, merges that know a word's end by `</w>`.
pub(super) fn clip(vocab: Map<String, Value>, merges: Vec<[String; 2]>, config: &Config) -> Value {
    let [unk, bos, eos] =
        [Role::Unk, Role::Bos, Role::Eos].map(|role| spelled(config, TokenizerKind::Clip, role));
    let added = Added::of(&vocab, config, TokenizerKind::Clip);
    json!({
        "version": "1.0",
        "added_tokens": added.json(),
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "NFC" },
            { "type": "Replace", "pattern": { "Regex": r"\s+" }, "content": " " },
            { "type": "Lowercase" },
        ] },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "Split", "pattern": { "Regex": CLIP_WORDS }, "behavior": "Removed", "invert": true },
            { "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true },
        ] },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [eos, added.id(&vocab, &eos)],
            "cls": [bos, added.id(&vocab, &bos)],
            "trim_offsets": false,
            "add_prefix_space": false,
        },
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "unk_token": unk,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "vocab": vocab,
            "merges": merges,
        },
    })
}

/// Bytes, with the space before a word part of the word: GPT-2, RoBERTa, and GLM's two that are built on them.
pub(super) fn byte_level(
    vocab: Map<String, Value>,
    merges: Vec<[String; 2]>,
    config: &Config,
    kind: TokenizerKind,
) -> Value {
    use Place::{First, Mark, Second};
    let [bos, eos, cls, sep] =
        [Role::Bos, Role::Eos, Role::Cls, Role::Sep].map(|role| spelled(config, kind, role));
    let added = Added::of(&vocab, config, kind);
    let (single, pair) = match kind {
        TokenizerKind::Roberta | TokenizerKind::GlmRoberta => {
            let (cls, sep) = (Mark(&cls, 0), Mark(&sep, 0));
            (vec![cls, First, sep], vec![cls, First, sep, sep, Second(0), sep])
        }
        TokenizerKind::GlmGpt2 => {
            let (cls, eos) = (Mark(&cls, 0), Mark(&eos, 0));
            (vec![cls, First, eos], vec![cls, First, eos, Second(0), eos])
        }
        _ => {
            let wanted = |add: Option<bool>, token| add.unwrap_or(false).then_some(token);
            let around = |text, type_id| {
                let before = wanted(config.add_bos, Mark(&bos, type_id));
                before.into_iter().chain([text]).chain(wanted(config.add_eos, Mark(&eos, type_id)))
            };
            (around(First, 0).collect(), around(First, 0).chain(around(Second(1), 1)).collect())
        }
    };
    json!({
        "version": "1.0",
        "added_tokens": added.json(),
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": config.add_prefix_space,
            "trim_offsets": true,
            "use_regex": true,
        },
        "post_processor": template(&single, &pair, |token| added.id(&vocab, token)),
        "decoder": { "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true },
        "model": {
            "type": "BPE",
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "vocab": vocab,
            "merges": merges,
        },
    })
}

/// The tokens that are matched in the text before anything else looks at it.
struct Added(Vec<(u64, AddedToken)>);

impl Added {
    /// First those with a declared id, then GLM's commands, the named ones, and the rest; those that the vocabulary
    /// lacks follow its last token in this order. Of two spellings of a token's options the later counts.
    fn of(vocab: &Map<String, Value>, config: &Config, kind: TokenizerKind) -> Added {
        let mut added = Added(Vec::new());
        for (id, token) in &config.added {
            added.0.push((u64::from(*id), token.clone()));
        }
        let mut next =
            config.added.keys().map(|id| u64::from(*id) + 1).chain([vocab.len() as u64]).max().unwrap_or(0);
        let named = Role::ALL.into_iter().filter_map(|role| {
            let default = || kind.spellings(role).first();
            let token = config.token(role).cloned();
            token.or_else(|| default().map(|token| AddedToken::from(*token, true)))
        });
        let declared = added.0.len();
        let commands = kind.commands().iter().map(|token| command(token));
        for token in commands.chain(named).chain(config.extra.iter().cloned()) {
            let same = |(_, known): &(u64, AddedToken)| known.content == token.content;
            match added.0.iter().position(same) {
                Some(known) if known < declared => {}
                Some(known) => added.0[known].1 = token,
                None => {
                    let id = vocab.get(&token.content).and_then(Value::as_u64);
                    next += u64::from(id.is_none());
                    added.0.push((id.unwrap_or(next - 1), token));
                }
            }
        }
        added
    }

    fn id(&self, vocab: &Map<String, Value>, token: &str) -> Option<u64> {
        let added = self.0.iter().find(|(_, known)| known.content == token);
        let known = vocab.get(token).and_then(Value::as_u64);
        known.or(added.map(|(id, _)| *id))
    }

    fn json(&self) -> Vec<Value> {
        let entry = |(id, token): &(u64, AddedToken)| {
            json!({
                "id": id,
                "content": token.content,
                "single_word": token.single_word,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            })
        };
        self.0.iter().map(entry).collect()
    }
}

/// How a role's token is written: as the configuration says, or as the kind does.
pub(super) fn spelled(config: &Config, kind: TokenizerKind, role: Role) -> String {
    config.token(role).map_or_else(|| first_spelling(kind, role), |token| token.content.clone())
}

fn first_spelling(kind: TokenizerKind, role: Role) -> String {
    kind.spellings(role).first().copied().unwrap_or_default().to_owned()
}

/// A command token of GLM; masks take the space before them.
pub(super) fn command(token: &str) -> AddedToken {
    AddedToken::from(token, true).lstrip(token.ends_with("MASK]"))
}

pub(crate) fn read_json(file: &Path, bytes: &[u8]) -> Result<Value, TokenizerError> {
    serde_json::from_slice(bytes).map_err(|source| TokenizerError::Json { file: file.into(), source })
}

pub(crate) fn utf8<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a str, TokenizerError> {
    std::str::from_utf8(bytes)
        .map_err(|error| TokenizerError::NotUtf8 { file: file.into(), at: error.valid_up_to() })
}
