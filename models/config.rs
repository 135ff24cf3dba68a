//! Reading a checkpoint's `config.json` with errors that name the file and the field.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use volary_kernels::ops::Activation;

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not JSON.
    #[error("{}: not valid JSON: {problem}", file.display())]
    Syntax {
        /// The file.
        file: PathBuf,
        /// Where and why.
        problem: String,
    },
    /// A field is missing or has the wrong kind of value.
    #[error("{}: `{field}`: expected {expected}, found {found}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with the objects that lead to it: `text_config.hidden_size`.
        field: String,
        /// What would have been right.
        expected: String,
        /// What is there.
        found: String,
    },
}

/// A JSON object of a configuration file, knowing where it stands.
#[derive(Clone, Debug)]
pub struct Config {
    file: Arc<Path>,
    /// With a dot at the end, or empty at the root.
    prefix: String,
    value: Value,
}

impl Config {
    /// Parses the bytes of `file`.
    ///
    /// # Errors
    /// If they are not a JSON object.
    pub fn parse(file: &Path, bytes: &[u8]) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_slice(bytes)
            .or_else(|error| serde_json::from_slice(&with_infinities_quoted(bytes)).map_err(|_| error))
            .map_err(|error| ConfigError::Syntax { file: file.into(), problem: error.to_string() })?;
        if !value.is_object() {
            let problem = "the file does not hold an object".into();
            return Err(ConfigError::Syntax { file: file.into(), problem });
        }
        Ok(Self { file: file.into(), prefix: String::new(), value })
    }

    /// Parses the bytes of `file`, a list of objects.
    ///
    /// # Errors
    /// If they are not.
    pub fn parse_list(file: &Path, bytes: &[u8]) -> Result<Vec<Self>, ConfigError> {
        let values: Vec<serde_json::Map<String, Value>> = serde_json::from_slice(bytes)
            .map_err(|error| ConfigError::Syntax { file: file.into(), problem: error.to_string() })?;
        let file: Arc<Path> = file.into();
        let object =
            |(at, value)| Self { file: file.clone(), prefix: format!("{at}."), value: Value::Object(value) };
        Ok(values.into_iter().enumerate().map(object).collect())
    }

    /// The file this comes from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Whether the field is there and not null.
    pub fn has(&self, field: &str) -> bool {
        self.value.get(field).is_some_and(|value| !value.is_null())
    }

    /// The object under `field`.
    ///
    /// # Errors
    /// If there is no object of that name.
    pub fn object(&self, field: &str) -> Result<Config, ConfigError> {
        match self.value.get(field) {
            Some(value) if value.is_object() => Ok(self.inside(field, value.clone())),
            _ => Err(self.error(field, "an object")),
        }
    }

    /// The object under `field`, or an empty one.
    ///
    /// # Errors
    /// If something else is there.
    pub fn object_or_empty(&self, field: &str) -> Result<Config, ConfigError> {
        if self.has(field) {
            self.object(field)
        } else {
            Ok(self.inside(field, Value::Object(Default::default())))
        }
    }

    fn inside(&self, field: &str, value: Value) -> Config {
        Config { file: self.file.clone(), prefix: format!("{}{field}.", self.prefix), value }
    }

    /// This object with the fields of `over` in place of its own.
    pub fn overlaid(&self, over: &Config) -> Config {
        let mut merged = self.clone();
        if let (Some(fields), Some(new)) = (merged.value.as_object_mut(), over.value.as_object()) {
            fields.extend(new.iter().map(|(key, value)| (key.clone(), value.clone())));
        }
        merged
    }

    /// The names of the fields.
    pub fn fields(&self) -> impl Iterator<Item = &str> {
        self.value.as_object().into_iter().flat_map(|fields| fields.keys().map(String::as_str))
    }

    /// The fields with their values.
    pub fn values(&self) -> serde_json::Map<String, Value> {
        self.value.as_object().cloned().unwrap_or_default()
    }

    /// A size: a whole number from 1 to 2³¹.
    ///
    /// # Errors
    /// If it is missing or something else.
    pub fn size(&self, field: &str) -> Result<usize, ConfigError> {
        match self.value.get(field).and_then(Value::as_u64) {
            Some(size @ 1..=0x8000_0000) => Ok(size as usize),
            _ => Err(self.error(field, "a whole number from 1 to 2147483648")),
        }
    }

    /// A size, or `default` where the field is missing or null.
    ///
    /// # Errors
    /// If something else is there.
    pub fn size_or(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        if self.has(field) { self.size(field) } else { Ok(default) }
    }

    /// A size from 1 to `limit` for each of `count`, of which one alone stands for all, or `default`.
    ///
    /// # Errors
    /// If something else is there.
    pub fn each_size_or(
        &self,
        field: &str,
        count: usize,
        limit: usize,
        default: usize,
    ) -> Result<Vec<usize>, ConfigError> {
        let fits = |size: &usize| (1..=limit).contains(size);
        if !self.has(field) {
            return Ok(vec![default; count]);
        }
        let one = self.value.get(field).and_then(Value::as_u64).map(|size| vec![size as usize; count]);
        let each = one.or_else(|| self.sizes(field));
        each.filter(|sizes| sizes.len() == count && sizes.iter().all(fits)).ok_or_else(|| {
            self.error(field, &format!("a whole number from 1 to {limit}, or a list of {count} of them"))
        })
    }

    /// A number of blocks, at most 1,000, or `default`: an absurd one would fill the memory with empty blocks
    /// before the weights are compared.
    ///
    /// # Errors
    /// If something else is there.
    pub fn blocks_or(&self, field: &str, default: usize) -> Result<usize, ConfigError> {
        match self.size_or(field, default)? {
            blocks @ 1..=1000 => Ok(blocks),
            _ => Err(self.error(field, "at most 1000 blocks")),
        }
    }

    /// A whole number, or `default`.
    ///
    /// # Errors
    /// If something else is there.
    pub fn integer_or(&self, field: &str, default: i64) -> Result<i64, ConfigError> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_i64().ok_or_else(|| self.error(field, "a whole number")),
        }
    }

    /// A token: a whole number from 0 to `vocab_size - 1`, or `default`.
    ///
    /// # Errors
    /// If something else is there.
    pub fn token_or(&self, field: &str, default: u32, vocab_size: usize) -> Result<u32, ConfigError> {
        let token = u32::try_from(self.integer_or(field, default.into())?).ok();
        let token = token.filter(|&token| (token as usize) < vocab_size);
        token.ok_or_else(|| self.error(field, &format!("a token, 0 to {}", vocab_size - 1)))
    }

    /// A finite number, or `default`.
    ///
    /// # Errors
    /// If something else is there.
    pub fn number_or(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_f64()
                .filter(|number| number.is_finite())
                .ok_or_else(|| self.error(field, "a number")),
        }
    }

    /// `true` or `false`, or `default`.
    ///
    /// # Errors
    /// If something else is there.
    pub fn flag_or(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(field, "true or false")),
        }
    }

    /// A text, if there is one.
    pub fn text(&self, field: &str) -> Option<&str> {
        self.value.get(field).and_then(Value::as_str)
    }

    /// A list of whole numbers, if there is one.
    pub fn sizes(&self, field: &str) -> Option<Vec<usize>> {
        let list = self.value.get(field)?.as_array()?;
        list.iter().map(|value| value.as_u64().map(|size| size as usize)).collect()
    }

    /// A list of lists of whole numbers, if there is one.
    pub fn size_lists(&self, field: &str) -> Option<Vec<Vec<usize>>> {
        let whole = |value: &Value| value.as_u64().map(|size| size as usize);
        let list = self.value.get(field)?.as_array()?;
        list.iter().map(|list| list.as_array()?.iter().map(whole).collect()).collect()
    }

    /// A list of finite numbers, if there is one.
    pub fn numbers(&self, field: &str) -> Option<Vec<f64>> {
        let list = self.value.get(field)?.as_array()?;
        list.iter().map(Value::as_f64).collect()
    }

    /// A list of texts, if there is one.
    pub fn texts(&self, field: &str) -> Option<Vec<String>> {
        let list = self.value.get(field)?.as_array()?;
        list.iter().map(|text| text.as_str().map(str::to_owned)).collect()
    }

    /// How many entries the object under `field` has.
    pub fn count(&self, field: &str) -> Option<usize> {
        self.value.get(field).and_then(Value::as_object).map(|object| object.len())
    }

    /// The first text of a list, as of `architectures`.
    pub fn first_of(&self, field: &str) -> Option<&str> {
        self.value.get(field)?.as_array()?.first()?.as_str()
    }

    /// An activation by its Hugging Face name, or `default`.
    ///
    /// # Errors
    /// If the name is unknown.
    pub fn activation_or(&self, field: &str, default: Activation) -> Result<Activation, ConfigError> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(default),
            Some(value) => value
                .as_str()
                .and_then(Activation::from_name)
                .ok_or_else(|| self.error(field, &format!("one of {}", Activation::NAMES.join(", ")))),
        }
    }

    /// Refuses a field that is set to anything but one of `allowed` (JSON texts), unless it is missing or null.
    ///
    /// # Errors
    /// If it is set to something else.
    pub fn only(&self, field: &str, allowed: &[&str]) -> Result<(), ConfigError> {
        match self.value.get(field) {
            None | Some(Value::Null) => Ok(()),
            Some(value) if allowed.contains(&value.to_string().as_str()) => Ok(()),
            Some(_) => {
                Err(self.error(field, &format!("{} (others are not supported)", allowed.join(" or "))))
            }
        }
    }

    /// That `parts` divide `whole`, e.g. heads a width.
    ///
    /// # Errors
    /// Naming `field` if they do not.
    pub fn divides(&self, field: &str, parts: usize, whole: usize) -> Result<(), ConfigError> {
        if parts > 0 && whole.is_multiple_of(parts) {
            Ok(())
        } else {
            Err(self.error(field, &format!("a divisor of {whole}")))
        }
    }

    /// The error that `field` is not what was `expected`.
    pub fn error(&self, field: &str, expected: &str) -> ConfigError {
        let mut found = self.value.get(field).map_or("nothing".into(), Value::to_string);
        if found.chars().count() > 80 {
            found = found.chars().take(80).chain("...".chars()).collect();
        }
        ConfigError::Field {
            file: self.file.to_path_buf(),
            field: format!("{}{field}", self.prefix),
            expected: expected.into(),
            found,
        }
    }
}

/// What Python writes for numbers that JSON lacks, as texts: `-Infinity` becomes `"-Infinity"` where it is no text yet.
fn with_infinities_quoted(bytes: &[u8]) -> Vec<u8> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let (mut quoted, mut rest, mut in_text) = (Vec::with_capacity(bytes.len()), bytes, false);
    while let [first, after @ ..] = rest {
        let word = WORDS.into_iter().find(|word| !in_text && rest.starts_with(word));
        let length = match (word, first, after) {
            (Some(word), ..) => {
                quoted.push(b'"');
                word.len()
            }
            (None, b'\\', [_, ..]) if in_text => 2,
            _ => 1,
        };
        in_text ^= length == 1 && *first == b'"';
        quoted.extend_from_slice(&rest[..length]);
        if word.is_some() {
            quoted.push(b'"');
        }
        rest = &rest[length..];
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    #[test]
    fn an_error_names_file_field_expected_and_found() {
        let text = config(r#"{"text_config": {"hidden_size": "wide"}}"#).object("text_config").unwrap();
        let message = text.size("hidden_size").unwrap_err().to_string();
        assert_eq!(
            message,
            "config.json: `text_config.hidden_size`: expected a whole number from 1 to 2147483648, found \"wide\""
        );
    }

    #[test]
    fn zero_negative_and_huge_are_no_sizes() {
        for value in ["0", "-3", "1e30", "2.5", "null", "99999999999"] {
            assert!(config(&format!("{{\"n\": {value}}}")).size("n").is_err(), "{value}");
        }
    }

    #[test]
    fn numbers_that_json_lacks_are_texts() {
        let read = config(r#"{"a": -Infinity, "b": [NaN, "x\"-Infinity"], "c": Infinity, "d": 2}"#);
        assert_eq!((read.text("a"), read.text("c")), (Some("-Infinity"), Some("Infinity")));
        assert_eq!(read.texts("b").unwrap(), ["NaN", "x\"-Infinity"]);
        assert_eq!(read.size("d").unwrap(), 2);
        let message = Config::parse(Path::new("a.json"), b"{\"a\": Infinite}").unwrap_err().to_string();
        assert!(message.contains("not valid JSON: expected value at line 1 column 7"), "{message}");
    }

    #[test]
    fn a_list_is_no_configuration() {
        assert!(Config::parse(Path::new("config.json"), b"[1]").is_err());
    }
}
