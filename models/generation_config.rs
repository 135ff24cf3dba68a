//! What `generation_config.json` says of writing text, and what is asked for besides.

use volary_text::generate::{Beams, Method, Patience, Sampling, Settings};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::end_tokens;

/// Settings of which any may be open. The fields are those of [`Settings`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// `max_new_tokens`.
    pub max_new: Option<usize>,
    /// `min_new_tokens`.
    pub min_new: Option<usize>,
    /// `do_sample`: whether tokens are drawn, unless there are beams.
    pub sample: Option<bool>,
    /// `temperature`.
    pub temperature: Option<f64>,
    /// `top_k`.
    pub top_k: Option<usize>,
    /// `top_p`.
    pub top_p: Option<f64>,
    /// `min_p`.
    pub min_p: Option<f64>,
    /// Where the draws begin; no file says so.
    pub seed: Option<u64>,
    /// `num_beams`.
    pub beams: Option<usize>,
    /// `length_penalty`.
    pub length_penalty: Option<f64>,
    /// `early_stopping`.
    pub patience: Option<Patience>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f64>,
    /// No file says so.
    pub presence_penalty: Option<f64>,
    /// No file says so.
    pub frequency_penalty: Option<f64>,
    /// `no_repeat_ngram_size`.
    pub no_repeat_ngram: Option<usize>,
    /// `bad_words_ids` and `suppress_tokens`.
    pub banned: Option<Vec<Vec<u32>>>,
    /// `eos_token_id`; that of `config.json` where this file has none.
    pub stop_tokens: Option<Vec<u32>>,
    /// `stop_strings`.
    pub stop_texts: Option<Vec<String>>,
    /// How many texts per prompt. Files are not asked.
    pub count: Option<usize>,
}

impl GenerationConfig {
    /// That of a folder, for a model with so many tokens.
    ///
    /// # Errors
    /// If a file is malformed.
    pub fn of(folder: &Folder, vocab_size: usize) -> Result<Self, Error> {
        let file = "generation_config.json";
        let read = match folder.has(file) {
            true => Self::parse(&folder.config(file)?)?,
            false => Self::default(),
        };
        Ok(Self { stop_tokens: Some(end_tokens(folder, vocab_size)?), ..read })
    }

    /// All but the stop tokens.
    ///
    /// # Errors
    /// If a field holds something else than it should.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let number = |field| config.has(field).then(|| config.number_or(field, 0.0)).transpose();
        let count = |field| {
            let found = config.has(field).then(|| config.integer_or(field, 0)).transpose()?;
            let count = found.map(|found| found.try_into().map_err(|_| config.error(field, "0 or more")));
            count.transpose()
        };
        let patience = match (config.has("early_stopping"), config.text("early_stopping")) {
            (false, _) => None,
            (true, Some("never")) => Some(Patience::Certain),
            (true, _) => Some(match config.flag_or("early_stopping", false)? {
                true => Patience::First,
                false => Patience::Estimate,
            }),
        };
        let texts = |field| {
            let one = config.text(field).map(|text| vec![text.to_owned()]);
            one.or_else(|| config.texts(field))
        };
        let mut banned = config.size_lists("bad_words_ids").unwrap_or_default();
        banned.extend(config.sizes("suppress_tokens").unwrap_or_default().into_iter().map(|id| vec![id]));
        let banned: Vec<Vec<u32>> =
            banned.into_iter().map(|ids| ids.into_iter().map(|id| id as u32).collect()).collect();
        Ok(Self {
            max_new: count("max_new_tokens")?,
            min_new: count("min_new_tokens")?,
            sample: config.has("do_sample").then(|| config.flag_or("do_sample", false)).transpose()?,
            temperature: number("temperature")?,
            top_k: count("top_k")?,
            top_p: number("top_p")?,
            min_p: number("min_p")?,
            seed: None,
            beams: count("num_beams")?,
            length_penalty: number("length_penalty")?,
            patience,
            repetition_penalty: number("repetition_penalty")?,
            presence_penalty: None,
            frequency_penalty: None,
            no_repeat_ngram: count("no_repeat_ngram_size")?,
            banned: (!banned.is_empty()).then_some(banned),
            stop_tokens: None,
            stop_texts: texts("stop_strings"),
            count: None,
        })
    }

    /// These, and where they are open those of `under`. Who asks for draws asks for no beams, and the other way round.
    pub fn over(self, under: Self) -> Self {
        let beams = match self.sample {
            Some(true) => self.beams,
            _ => self.beams.or(under.beams),
        };
        Self {
            max_new: self.max_new.or(under.max_new),
            min_new: self.min_new.or(under.min_new),
            sample: self.sample.or(under.sample),
            temperature: self.temperature.or(under.temperature),
            top_k: self.top_k.or(under.top_k),
            top_p: self.top_p.or(under.top_p),
            min_p: self.min_p.or(under.min_p),
            seed: self.seed.or(under.seed),
            beams,
            length_penalty: self.length_penalty.or(under.length_penalty),
            patience: self.patience.or(under.patience),
            repetition_penalty: self.repetition_penalty.or(under.repetition_penalty),
            presence_penalty: self.presence_penalty.or(under.presence_penalty),
            frequency_penalty: self.frequency_penalty.or(under.frequency_penalty),
            no_repeat_ngram: self.no_repeat_ngram.or(under.no_repeat_ngram),
            banned: self.banned.or(under.banned),
            stop_tokens: self.stop_tokens.or(under.stop_tokens),
            stop_texts: self.stop_texts.or(under.stop_texts),
            count: self.count.or(under.count),
        }
    }

    /// The names of the fields that are not open.
    pub fn set(&self) -> Vec<&'static str> {
        let fields = [
            ("max_new", self.max_new.is_some()),
            ("min_new", self.min_new.is_some()),
            ("sample", self.sample.is_some()),
            ("temperature", self.temperature.is_some()),
            ("top_k", self.top_k.is_some()),
            ("top_p", self.top_p.is_some()),
            ("min_p", self.min_p.is_some()),
            ("seed", self.seed.is_some()),
            ("beams", self.beams.is_some()),
            ("length_penalty", self.length_penalty.is_some()),
            ("patience", self.patience.is_some()),
            ("repetition_penalty", self.repetition_penalty.is_some()),
            ("presence_penalty", self.presence_penalty.is_some()),
            ("frequency_penalty", self.frequency_penalty.is_some()),
            ("no_repeat_ngram", self.no_repeat_ngram.is_some()),
            ("banned", self.banned.is_some()),
            ("stop_tokens", self.stop_tokens.is_some()),
            ("stop_texts", self.stop_texts.is_some()),
            ("count", self.count.is_some()),
        ];
        fields.into_iter().filter(|(_, set)| *set).map(|(name, _)| name).collect()
    }

    /// The settings; what is open gets the value that it has in `transformers`, a `top_k` of 50 among them, and a
    /// `max_new` of 128.
    pub fn settings(self) -> Settings {
        let usual = Settings::default();
        let method = match (self.beams, self.sample) {
            (Some(width), _) if width != 1 => Method::Beams(Beams {
                width,
                length_penalty: self.length_penalty.unwrap_or(1.0),
                patience: self.patience.unwrap_or(Patience::Estimate),
            }),
            (_, Some(true)) => Method::Sample(Sampling {
                temperature: self.temperature.unwrap_or(1.0),
                top_k: self.top_k.unwrap_or(50),
                top_p: self.top_p.unwrap_or(1.0),
                min_p: self.min_p.unwrap_or(0.0),
                seed: self.seed.unwrap_or(0),
            }),
            _ => Method::Greedy,
        };
        Settings {
            max_new: self.max_new.unwrap_or(usual.max_new),
            min_new: self.min_new.unwrap_or(usual.min_new),
            stop_tokens: self.stop_tokens.unwrap_or_default(),
            stop_texts: self.stop_texts.unwrap_or_default(),
            repetition_penalty: self.repetition_penalty.unwrap_or(usual.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(usual.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(usual.frequency_penalty),
            no_repeat_ngram: self.no_repeat_ngram.unwrap_or(usual.no_repeat_ngram),
            banned: self.banned.unwrap_or_default(),
            forced_first: None,
            method,
            count: self.count.unwrap_or(usual.count),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn parse(text: &str) -> Result<GenerationConfig, ConfigError> {
        GenerationConfig::parse(&Config::parse(Path::new("generation_config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn a_file_is_read_and_flags_are_over_it() {
        let file = parse(
            r#"{"max_new_tokens": 30, "do_sample": true, "temperature": 0.6, "top_p": 0.9, "num_beams": 3,
                "early_stopping": "never", "bad_words_ids": [[1, 2], [3]], "suppress_tokens": [4],
                "stop_strings": "END", "repetition_penalty": null, "no_repeat_ngram_size": 0}"#,
        )
        .unwrap();
        assert_eq!(
            file.set(),
            [
                "max_new",
                "sample",
                "temperature",
                "top_p",
                "beams",
                "patience",
                "no_repeat_ngram",
                "banned",
                "stop_texts"
            ]
        );
        let beams = Beams { width: 3, length_penalty: 1.0, patience: Patience::Certain };
        assert_eq!(
            file.clone().settings(),
            Settings {
                max_new: 30,
                banned: vec![vec![1, 2], vec![3], vec![4]],
                stop_texts: vec!["END".into()],
                method: Method::Beams(beams),
                ..Settings::default()
            }
        );
        // draws in place of the file's beams, with the file's temperature
        let flags =
            GenerationConfig { sample: Some(true), top_p: Some(0.5), seed: Some(7), ..Default::default() };
        let sampling = Sampling { temperature: 0.6, top_k: 50, top_p: 0.5, min_p: 0.0, seed: 7 };
        assert_eq!(flags.over(file.clone()).settings().method, Method::Sample(sampling));
        // one beam is none
        let flags = GenerationConfig { beams: Some(1), sample: Some(false), ..Default::default() };
        assert_eq!(flags.over(file).settings().method, Method::Greedy);
        assert_eq!(GenerationConfig::default().settings(), Settings::default());
    }

    #[test]
    fn what_is_malformed_is_named() {
        for (text, named) in [
            (r#"{"temperature": "hot"}"#, "`temperature`: expected a number, found \"hot\""),
            (r#"{"max_new_tokens": -1}"#, "`max_new_tokens`: expected 0 or more, found -1"),
            (r#"{"early_stopping": 3}"#, "`early_stopping`: expected true or false, found 3"),
            (r#"{"do_sample": 1}"#, "`do_sample`: expected true or false, found 1"),
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
