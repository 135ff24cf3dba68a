//! `tokenizer_config.json` and `special_tokens_map.json`: what refines a vocabulary.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::{Side, TokenizerError};

/// The named special tokens, in the order in which missing ones get their ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Bos,
    Eos,
    Unk,
    Sep,
    Pad,
    Cls,
    Mask,
}

impl Role {
    pub const ALL: [Role; 7] = [Role::Bos, Role::Eos, Role::Unk, Role::Sep, Role::Pad, Role::Cls, Role::Mask];

    pub fn key(self) -> &'static str {
        match self {
            Role::Bos => "bos_token",
            Role::Eos => "eos_token",
            Role::Unk => "unk_token",
            Role::Sep => "sep_token",
            Role::Pad => "pad_token",
            Role::Cls => "cls_token",
            Role::Mask => "mask_token",
        }
    }
}

/// What the two configuration files say; `None` where they are silent.
#[derive(Clone, Debug, Default)]
pub(super) struct Config {
    pub class: Option<String>,
    pub named: Vec<(Role, AddedToken)>,
    pub extra: Vec<AddedToken>,
    pub added: BTreeMap<u32, AddedToken>,
    pub model_max_length: Option<usize>,
    pub padding_side: Option<Side>,
    pub truncation_side: Option<Side>,
    pub clean_up: bool,
    pub lower_case: Option<bool>,
    pub chinese_chars: Option<bool>,
    /// `Some(None)` is an explicit null: strip accents when lower-casing.
    pub strip_accents: Option<Option<bool>>,
    pub add_prefix_space: bool,
    pub add_bos: Option<bool>,
    pub add_eos: Option<bool>,
    /// T5's sentinels.
    pub extra_ids: Option<usize>,
    /// Whether a text after a special token gets a space in front, as one at the beginning does.
    pub legacy: Option<bool>,
    pub fix_command_token: Option<bool>,
    pub keep_accents: bool,
    pub remove_space: Option<bool>,
}

impl Config {
    /// The token of a role, where a file names one.
    pub fn token(&self, role: Role) -> Option<&AddedToken> {
        self.named.iter().find(|(named, _)| *named == role).map(|(_, token)| token)
    }

    /// Reads the three refining files, each with the path to name in errors.
    ///
    /// `special_tokens_map.json` overrides `tokenizer_config.json`, unless the latter holds
    /// `added_tokens_decoder`; then it is the newer layout, and complete (transformers 5 reads them so).
    pub fn read(
        config: Option<(&Path, &Value)>,
        special_map: Option<(&Path, &Value)>,
        added_tokens: Option<(&Path, &Value)>,
    ) -> Result<Config, TokenizerError> {
        let mut read = Config::default();
        let mut sources: Vec<Fields> = Vec::new();
        if let Some((file, value)) = config {
            let fields = Fields::of(file, value, Special::IfSaid)?;
            read.settings(&fields)?;
            sources.push(fields);
        }
        if let Some((file, value)) = special_map {
            let fields = Fields::of(file, value, Special::Always)?;
            if read.added.is_empty() {
                sources.insert(0, fields);
            } else {
                sources.push(fields);
            }
        }

        for role in Role::ALL {
            for fields in &sources {
                if let Some(token) = fields.token(role.key())? {
                    let known = read.added.values().find(|t| t.content == token.content);
                    let token = known.cloned().unwrap_or(token).special(true);
                    read.named.push((role, token));
                    break;
                }
            }
        }
        for fields in &sources {
            for key in ["additional_special_tokens", "extra_special_tokens"] {
                for token in fields.tokens(key)? {
                    if !read.extra.iter().any(|t| t.content == token.content) {
                        read.extra.push(token);
                    }
                }
            }
        }
        if let (Some((file, value)), true) = (added_tokens, read.added.is_empty()) {
            read.legacy_added_tokens(&Fields::of(file, value, Special::IfSaid)?)?;
        }
        Ok(read)
    }

    fn settings(&mut self, fields: &Fields) -> Result<(), TokenizerError> {
        self.class = fields.string("tokenizer_class")?;
        self.model_max_length = fields.length("model_max_length")?;
        self.padding_side = fields.side("padding_side")?;
        self.truncation_side = fields.side("truncation_side")?;
        self.clean_up = fields.bool("clean_up_tokenization_spaces")?.unwrap_or(false);
        self.lower_case = fields.bool("do_lower_case")?;
        self.chinese_chars = fields.bool("tokenize_chinese_chars")?;
        self.strip_accents = match fields.map.contains_key("strip_accents") {
            true => Some(fields.bool("strip_accents")?),
            false => None,
        };
        self.add_prefix_space = fields.bool("add_prefix_space")?.unwrap_or(false);
        self.add_bos = fields.bool("add_bos_token")?;
        self.add_eos = fields.bool("add_eos_token")?;
        self.extra_ids = fields.count("extra_ids")?;
        self.legacy = fields.bool("legacy")?;
        self.fix_command_token = fields.bool("fix_command_token")?;
        self.keep_accents = fields.bool("keep_accents")?.unwrap_or(false);
        self.remove_space = fields.bool("remove_space")?;

        let Some(decoder) = fields.present("added_tokens_decoder") else {
            return Ok(());
        };
        let Value::Object(decoder) = decoder else {
            return Err(fields.wrong("added_tokens_decoder", "an object", decoder));
        };
        for (id, token) in decoder {
            let field = format!("added_tokens_decoder.{id}");
            let id =
                id.parse().map_err(|_| fields.wrong(&field, "keyed by an id", &Value::from(id.as_str())))?;
            self.added.insert(id, fields.added_token(&field, token)?);
        }
        Ok(())
    }

    /// `added_tokens.json`, `{"token": id}`: special where a configuration file names the token.
    fn legacy_added_tokens(&mut self, fields: &Fields) -> Result<(), TokenizerError> {
        for (content, id) in fields.map {
            let special = self.named.iter().any(|(_, t)| t.content == *content)
                || self.extra.iter().any(|t| t.content == *content);
            let id = id
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| fields.wrong(content, "an id", id))?;
            self.added.insert(id, AddedToken::from(content.clone(), special));
        }
        Ok(())
    }
}

/// Whether a token written as an object is special when the object does not say.
#[derive(Clone, Copy)]
enum Special {
    Always,
    IfSaid,
}

/// The fields of one file, read with errors that name the file and the field.
struct Fields<'a> {
    file: &'a Path,
    map: &'a Map<String, Value>,
    special: Special,
}

impl<'a> Fields<'a> {
    fn of(file: &'a Path, value: &'a Value, special: Special) -> Result<Self, TokenizerError> {
        let Value::Object(map) = value else {
            return Err(wrong(file, "the file", "an object", value));
        };
        Ok(Fields { file, map, special })
    }

    fn wrong(&self, field: &str, expected: &'static str, found: &Value) -> TokenizerError {
        wrong(self.file, field, expected, found)
    }

    /// A field that is there and not null.
    fn present(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn string(&self, key: &str) -> Result<Option<String>, TokenizerError> {
        self.present(key)
            .map(|value| match value {
                Value::String(text) => Ok(text.clone()),
                other => Err(self.wrong(key, "a string", other)),
            })
            .transpose()
    }

    fn bool(&self, key: &str) -> Result<Option<bool>, TokenizerError> {
        self.present(key)
            .map(|value| match value {
                Value::Bool(set) => Ok(*set),
                other => Err(self.wrong(key, "true or false", other)),
            })
            .transpose()
    }

    /// A length; the 1e30 that stands for "no limit" reads as `None`.
    fn length(&self, key: &str) -> Result<Option<usize>, TokenizerError> {
        let Some(value) = self.present(key) else {
            return Ok(None);
        };
        match value.as_f64() {
            Some(length) if length >= 1e15 => Ok(None),
            Some(length) if length >= 1.0 && length.fract() == 0.0 => Ok(Some(length as usize)),
            _ => Err(self.wrong(key, "a length", value)),
        }
    }

    /// How many tokens there are of a sort, at most a million.
    fn count(&self, key: &str) -> Result<Option<usize>, TokenizerError> {
        let count = |value: &Value| value.as_u64().filter(|count| *count <= 1_000_000);
        let read = |value| count(value).ok_or_else(|| self.wrong(key, "a number of tokens", value));
        Ok(self.present(key).map(read).transpose()?.map(|count| count as usize))
    }

    fn side(&self, key: &str) -> Result<Option<Side>, TokenizerError> {
        match self.string(key)?.as_deref() {
            None => Ok(None),
            Some("left") => Ok(Some(Side::Left)),
            Some("right") => Ok(Some(Side::Right)),
            Some(_) => Err(self.wrong(key, "\"left\" or \"right\"", &self.map[key])),
        }
    }

    fn token(&self, key: &str) -> Result<Option<AddedToken>, TokenizerError> {
        self.present(key).map(|value| self.added_token(key, value)).transpose()
    }

    /// A list of tokens, or an object of named ones.
    fn tokens(&self, key: &str) -> Result<Vec<AddedToken>, TokenizerError> {
        let values: Vec<&Value> = match self.present(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().collect(),
            Some(Value::Object(map)) => map.values().collect(),
            Some(other) => return Err(self.wrong(key, "a list of tokens", other)),
        };
        values
            .iter()
            .enumerate()
            .map(|(i, value)| Ok(self.added_token(&format!("{key}.{i}"), value)?.special(true)))
            .collect()
    }

    /// `"[CLS]"` or `{"content": "[CLS]", "lstrip": false, ...}`.
    fn added_token(&self, field: &str, value: &Value) -> Result<AddedToken, TokenizerError> {
        let map = match value {
            Value::String(content) => return Ok(AddedToken::from(content.clone(), true)),
            Value::Object(map) => map,
            other => return Err(self.wrong(field, "a token", other)),
        };
        let inner = Fields { map, ..*self };
        let content = inner
            .string("content")?
            .ok_or_else(|| self.wrong(&format!("{field}.content"), "a string", &Value::Null))?;
        let special = match self.special {
            Special::Always => true,
            Special::IfSaid => inner.bool("special")?.unwrap_or(false),
        };
        let mut token = AddedToken::from(content, special);
        if let Some(normalized) = inner.bool("normalized")? {
            token = token.normalized(normalized);
        }
        Ok(token
            .lstrip(inner.bool("lstrip")?.unwrap_or(false))
            .rstrip(inner.bool("rstrip")?.unwrap_or(false))
            .single_word(inner.bool("single_word")?.unwrap_or(false)))
    }
}

/// The error for a field that holds the wrong thing.
pub(super) fn wrong(file: &Path, field: &str, expected: &'static str, found: &Value) -> TokenizerError {
    let mut text = found.to_string();
    if text.chars().count() > 80 {
        text = text.chars().take(80).chain("...".chars()).collect();
    }
    TokenizerError::Field { file: file.into(), field: field.into(), expected, found: text }
}
