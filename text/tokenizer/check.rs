//! What must hold of a `tokenizer.json` before the tokenizers library sees it.
//!
//! The library panics on some malformed files and quietly renumbers tokens in others.

use std::collections::HashSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::TokenizerError;
use super::config::wrong;
use super::files::pair;

/// Checks the vocabulary, the merges, the unknown token and the templates of a `tokenizer.json`.
pub(super) fn check(file: &Path, root: &Value, ids: Ids) -> Result<(), TokenizerError> {
    let Value::Object(root) = root else {
        return Err(wrong(file, "the file", "an object", root));
    };
    let model = root.get("model").unwrap_or(&Value::Null);
    let Value::Object(model) = model else {
        return Err(wrong(file, "model", "an object", model));
    };
    let added = added_tokens(file, root)?;
    match model.get("vocab").unwrap_or(&Value::Null) {
        Value::Object(vocab) if vocab.is_empty() => {
            return Err(TokenizerError::EmptyVocab { file: file.into() });
        }
        Value::Array(pieces) if pieces.is_empty() => {
            return Err(TokenizerError::EmptyVocab { file: file.into() });
        }
        Value::Object(vocab) => {
            if ids == Ids::Contiguous {
                check_ids(file, "model.vocab.", vocab, added.iter().map(|(id, _)| *id))?;
            }
            check_unk(file, model, vocab)?;
            check_merges(file, model, vocab)?;
        }
        Value::Array(pieces) => {
            let unk = model.get("unk_id").unwrap_or(&Value::Null);
            let inside = |id| id < pieces.len() as u64;
            if !unk.is_null() && !unk.as_u64().is_some_and(inside) {
                return Err(wrong(file, "model.unk_id", "the index of a piece", unk));
            }
        }
        other => return Err(wrong(file, "model.vocab", "the tokens", other)),
    }
    match root.get("post_processor") {
        Some(processor) => check_processor(file, "post_processor", processor),
        None => Ok(()),
    }
}

/// Whether the ids of a vocabulary may have gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ids {
    /// No: every id up to the last is a token's.
    Contiguous,
    /// Yes: they are the lines of a `vocab.txt`, in which a later line replaces an equal earlier one.
    Lines,
}

/// The ids and contents under `added_tokens`.
pub(super) fn added_tokens(
    file: &Path,
    root: &Map<String, Value>,
) -> Result<Vec<(u32, String)>, TokenizerError> {
    let list = match root.get("added_tokens") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(file, "added_tokens", "a list", other)),
    };
    list.iter()
        .enumerate()
        .map(|(i, token)| {
            let field = |name: &str| format!("added_tokens.{i}.{name}");
            let id = token.get("id").unwrap_or(&Value::Null);
            let content = token.get("content").unwrap_or(&Value::Null);
            match (id_of(id), content.as_str()) {
                (Some(id), Some(content)) => Ok((id, content.to_owned())),
                (None, _) => Err(wrong(file, &field("id"), "an id", id)),
                (_, None) => Err(wrong(file, &field("content"), "a string", content)),
            }
        })
        .collect()
}

/// The ids of a vocabulary, together with `added` ones, must be 0, 1, 2, ... and all different.
pub(super) fn check_ids(
    file: &Path,
    prefix: &str,
    vocab: &Map<String, Value>,
    added: impl Iterator<Item = u32>,
) -> Result<(), TokenizerError> {
    if vocab.is_empty() {
        return Err(TokenizerError::EmptyVocab { file: file.into() });
    }
    let mut seen = HashSet::with_capacity(vocab.len());
    let mut repeated = Vec::new();
    for (token, id) in vocab {
        let id = id_of(id).ok_or_else(|| wrong(file, &format!("{prefix}{token}"), "an id", id))?;
        if !seen.insert(id) {
            repeated.push(id);
        }
    }
    let last = seen.iter().copied().max().unwrap_or(0);
    seen.extend(added);
    let missing: Vec<u32> = (0..last).filter(|id| !seen.contains(id)).take(16).collect();
    if missing.is_empty() && repeated.is_empty() {
        return Ok(());
    }
    repeated.sort_unstable();
    repeated.dedup();
    repeated.truncate(16);
    Err(TokenizerError::Ids { file: file.into(), last, missing, repeated })
}

/// Both tokens of a merge, and what they make, must be in the vocabulary; a continuing piece carries `prefix`.
pub(super) fn check_merge(
    file: &Path,
    at: &str,
    vocab: &Map<String, Value>,
    prefix: &str,
    left: &str,
    right: &str,
) -> Result<(), TokenizerError> {
    let unknown =
        |token: &str| TokenizerError::MergeUnknown { file: file.into(), at: at.into(), token: token.into() };
    let rest = right.strip_prefix(prefix).ok_or_else(|| unknown(&format!("{prefix}{right}")))?;
    let merged = format!("{left}{rest}");
    match [left, right, &merged].iter().find(|token| !vocab.contains_key(**token)) {
        Some(token) => Err(unknown(token)),
        None => Ok(()),
    }
}

fn check_merges(
    file: &Path,
    model: &Map<String, Value>,
    vocab: &Map<String, Value>,
) -> Result<(), TokenizerError> {
    let merges = match model.get("merges") {
        None => return Ok(()),
        Some(Value::Array(merges)) => merges,
        Some(other) => return Err(wrong(file, "model.merges", "a list", other)),
    };
    let prefix = model.get("continuing_subword_prefix").and_then(Value::as_str);
    for (i, merge) in merges.iter().enumerate() {
        let at = format!("model.merges.{i}");
        let tokens = match merge {
            Value::String(line) if line.starts_with("#version") => continue,
            Value::String(line) => pair(line),
            Value::Array(two) => match two.as_slice() {
                [Value::String(left), Value::String(right)] => Some((left.as_str(), right.as_str())),
                _ => None,
            },
            _ => None,
        };
        let Some((left, right)) = tokens else {
            return Err(TokenizerError::MergeNotPair { file: file.into(), at, text: merge.to_string() });
        };
        check_merge(file, &at, vocab, prefix.unwrap_or(""), left, right)?;
    }
    Ok(())
}

/// The token that stands for unknown words must itself be known.
fn check_unk(
    file: &Path,
    model: &Map<String, Value>,
    vocab: &Map<String, Value>,
) -> Result<(), TokenizerError> {
    match model.get("unk_token") {
        Some(Value::String(token)) if !token.is_empty() && !vocab.contains_key(token) => {
            Err(TokenizerError::UnknownToken {
                file: file.into(),
                field: "unk_token".into(),
                token: token.clone(),
            })
        }
        _ => Ok(()),
    }
}

/// A template may only use the tokens that it lists, and the second sequence only in pairs.
fn check_processor(file: &Path, field: &str, processor: &Value) -> Result<(), TokenizerError> {
    if let Some(Value::Array(processors)) = processor.get("processors") {
        for (i, processor) in processors.iter().enumerate() {
            check_processor(file, &format!("{field}.processors.{i}"), processor)?;
        }
        return Ok(());
    }
    let listed = processor.get("special_tokens").and_then(Value::as_object);
    for (template, sequences) in [("single", &["A"][..]), ("pair", &["A", "B"][..])] {
        let Some(Value::Array(pieces)) = processor.get(template) else {
            continue;
        };
        for (i, piece) in pieces.iter().enumerate() {
            let at = format!("{field}.{template}.{i}");
            if let Some(id) = piece.pointer("/SpecialToken/id") {
                let known = |id: &str| listed.is_some_and(|tokens| tokens.contains_key(id));
                if !id.as_str().is_some_and(known) {
                    return Err(wrong(file, &at, "one of its special_tokens", id));
                }
            }
            if let Some(id) = piece.pointer("/Sequence/id")
                && !id.as_str().is_some_and(|id| sequences.contains(&id))
            {
                return Err(wrong(file, &at, "a sequence of this template", id));
            }
        }
    }
    Ok(())
}

fn id_of(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}
