//! Vocabulary files without a `tokenizer.json`: the `tokenizer.json` they stand for.
//!
//! Sources: transformers 5 `BertTokenizer`, `CLIPTokenizer`, `GPT2Tokenizer`, whose ids these match.

use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::TokenizerError;
use super::check::{check_ids, check_merge};
use super::config::{Config, Family, Role, wrong};

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
        .map(|(id, token)| (token.trim_end().to_owned(), json!(id)))
        .collect();
    match vocab.is_empty() {
        true => Err(TokenizerError::EmptyVocab { file: file.into() }),
        false => Ok(vocab),
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

/// BERT: clean, split Chinese, lower, split at spaces and punctuation, longest pieces first.
pub(super) fn bert(vocab: Map<String, Value>, config: &Config) -> Value {
    let [unk, cls, sep] = [Role::Unk, Role::Cls, Role::Sep].map(|role| spelled(config, Family::Bert, role));
    let added = Added::of(&vocab, config, Family::Bert);
    let special = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 0 } });
    let special_b = |token: &str| json!({ "SpecialToken": { "id": token, "type_id": 1 } });
    let a = json!({ "Sequence": { "id": "A", "type_id": 0 } });
    let b = json!({ "Sequence": { "id": "B", "type_id": 1 } });
    let mut tokens = Map::new();
    for token in [&cls, &sep] {
        tokens.insert(
            token.clone(),
            json!({ "id": token, "ids": [added.id(&vocab, token)], "tokens": [token] }),
        );
    }
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
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [special(&cls), a, special(&sep)],
            "pair": [special(&cls), a, special(&sep), b, special_b(&sep)],
            "special_tokens": tokens,
        },
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
    let [unk, bos, eos] = [Role::Unk, Role::Bos, Role::Eos].map(|role| spelled(config, Family::Clip, role));
    let added = Added::of(&vocab, config, Family::Clip);
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

/// GPT-2: bytes, with the space before a word part of the word.
pub(super) fn gpt2(vocab: Map<String, Value>, merges: Vec<[String; 2]>, config: &Config) -> Value {
    let [bos, eos] = [Role::Bos, Role::Eos].map(|role| spelled(config, Family::Gpt2, role));
    let added = Added::of(&vocab, config, Family::Gpt2);
    let ends: Vec<&String> = [(config.add_bos, &bos), (config.add_eos, &eos)]
        .into_iter()
        .filter_map(|(add, token)| add.then_some(token))
        .collect();
    let sequence = |name: &str, type_id: u32| {
        let special = |add: bool, token: &str| {
            add.then(|| json!({ "SpecialToken": { "id": token, "type_id": type_id } }))
        };
        [
            special(config.add_bos, &bos),
            Some(json!({ "Sequence": { "id": name, "type_id": type_id } })),
            special(config.add_eos, &eos),
        ]
        .into_iter()
        .flatten()
        .collect::<Vec<_>>()
    };
    let tokens: Map<String, Value> = ends
        .iter()
        .map(|token| {
            let entry = json!({ "id": token, "ids": [added.id(&vocab, token)], "tokens": [token] });
            ((*token).clone(), entry)
        })
        .collect();
    let pair = [sequence("A", 0), sequence("B", 1)].concat();
    json!({
        "version": "1.0",
        "added_tokens": added.json(),
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": config.add_prefix_space,
            "trim_offsets": true,
            "use_regex": true,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": sequence("A", 0),
            "pair": pair,
            "special_tokens": tokens,
        },
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
    /// First those with a declared id, then the named ones, then the rest; those that the vocabulary
    /// lacks follow its last token in this order. Of two spellings of a token's options the later counts.
    fn of(vocab: &Map<String, Value>, config: &Config, family: Family) -> Added {
        let mut added = Added(Vec::new());
        for (id, token) in &config.added {
            added.0.push((u64::from(*id), token.clone()));
        }
        let mut next =
            config.added.keys().map(|id| u64::from(*id) + 1).chain([vocab.len() as u64]).max().unwrap_or(0);
        let named = Role::ALL.into_iter().filter_map(|role| {
            let default = || family.spellings(role).first();
            let token = config.token(role).cloned();
            token.or_else(|| default().map(|token| AddedToken::from(*token, true)))
        });
        let declared = added.0.len();
        for token in named.chain(config.extra.iter().cloned()) {
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

/// How a role's token is written: as the configuration says, or as the family does.
fn spelled(config: &Config, family: Family, role: Role) -> String {
    config.token(role).map_or_else(|| family.spellings(role).concat(), |token| token.content.clone())
}

pub(super) fn read_json(file: &Path, bytes: &[u8]) -> Result<Value, TokenizerError> {
    serde_json::from_slice(bytes).map_err(|source| TokenizerError::Json { file: file.into(), source })
}

fn utf8<'a>(file: &Path, bytes: &'a [u8]) -> Result<&'a str, TokenizerError> {
    std::str::from_utf8(bytes)
        .map_err(|error| TokenizerError::NotUtf8 { file: file.into(), at: error.valid_up_to() })
}
