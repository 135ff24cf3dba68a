//! What the commands that write text share: the model, and how it writes.

use std::io::{self, Read, Write};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::Args;
use volary::folder::Folder;
use volary::generation_config::GenerationConfig;
use volary::writer::Writer;
use volary_text::generate::{Patience, Settings, Stop};

use super::{Shared, Usage};

/// Which model writes.
#[derive(Args)]
pub struct WriterModel {
    /// A folder, a preset, or owner/name.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
}

impl WriterModel {
    /// Its name.
    ///
    /// # Errors
    /// [`Usage`] with what could be fetched, if none is given: no model that writes text is inside this program.
    pub fn name(&self) -> Result<&str> {
        self.model.as_deref().ok_or_else(|| {
            let name = "TinyLlama/TinyLlama-1.1B-Chat-v1.0";
            Usage(format!(
                "no text model is inside this program: give --model a folder, a preset or owner/name. For example:\n  \
                 volary fetch {name}\n  \
                 volary generate \"Once upon a time\" --model {name}\n\
                 `volary list --task generate` shows what can be read."
            ))
            .into()
        })
    }

    /// Its folder.
    pub fn folder(&self, shared: &Shared) -> Result<Folder> {
        Ok(shared.folder(self.name()?)?)
    }

    /// Loads it.
    pub fn load(&self, shared: &Shared) -> Result<Writer> {
        load(&self.folder(shared)?, shared)
    }
}

/// Loads the model of a folder.
pub fn load(folder: &Folder, shared: &Shared) -> Result<Writer> {
    Ok(Writer::load(folder, &shared.load_options(), &shared.device()?)?)
}

/// How text is written. What is not given is as the folder's generation_config.json has it.
#[derive(Args)]
pub struct Writing {
    /// The most tokens to write; 128 unless the folder says otherwise, or as many as fit.
    #[arg(long, value_name = "N")]
    pub max_new: Option<usize>,
    /// No end before so many tokens.
    #[arg(long, value_name = "N")]
    min_new: Option<usize>,
    /// Draw tokens by their probabilities; above 1 more freely, below 1 less, 0 takes the likeliest.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Draw among so many of the likeliest tokens; 0 is all, without it 50.
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Draw among the likeliest tokens that together have this probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// Draw among the tokens that have this share of the likeliest one's probability.
    #[arg(long, value_name = "P", allow_negative_numbers = true)]
    min_p: Option<f64>,
    /// Draw, and begin the draws here: equal seeds give equal texts. Without it 0.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Above 1 tokens that occurred become less likely.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    repetition_penalty: Option<f64>,
    /// Taken from the scores of tokens that were written.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    presence_penalty: Option<f64>,
    /// Taken from the scores of tokens as often as they were written.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    frequency_penalty: Option<f64>,
    /// No sequence of so many tokens comes twice.
    #[arg(long, value_name = "N")]
    no_repeat_ngram: Option<usize>,
    /// Search with so many beams in place of drawing.
    #[arg(long, value_name = "N", conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    beams: Option<usize>,
    /// Of beams: above 0 long texts gain.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    length_penalty: Option<f64>,
    /// Of beams: end as soon as there are enough finished texts.
    #[arg(long)]
    early_stopping: bool,
    /// End before this text; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Say on standard error how it is written, and who says so.
    #[arg(long)]
    verbose: bool,
}

impl Writing {
    /// What the flags say, `count` texts per prompt.
    ///
    /// # Errors
    /// [`Usage`] with all that means nothing.
    pub fn flags(&self, count: Option<usize>) -> Result<GenerationConfig> {
        let draws = self.temperature.is_some()
            || self.top_k.is_some()
            || self.top_p.is_some()
            || self.min_p.is_some()
            || self.seed.is_some();
        let flags = GenerationConfig {
            max_new: self.max_new,
            min_new: self.min_new,
            sample: draws.then_some(true).or(self.beams.map(|_| false)),
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed,
            beams: self.beams,
            length_penalty: self.length_penalty,
            patience: self.early_stopping.then_some(Patience::First),
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            no_repeat_ngram: self.no_repeat_ngram,
            banned: None,
            stop_tokens: None,
            stop_texts: (!self.stop.is_empty()).then(|| self.stop.clone()),
            count,
        };
        // the length and the number of texts may yet depend on the folder
        let alone = GenerationConfig { count: None, ..flags.clone() };
        let alone = Settings { max_new: self.max_new.unwrap_or(usize::MAX), ..alone.settings() };
        alone.check().map_err(|error| Usage(error.to_string()))?;
        Ok(flags)
    }

    /// The settings, once the folder is known and how many tokens fit after the prompts.
    pub fn settings(&self, flags: GenerationConfig, writer: &Writer, room: Option<usize>) -> Settings {
        let free = self.max_new.is_none();
        let (asked, folder) = (flags.set(), writer.config.set());
        let mut settings = flags.over(writer.config.clone()).settings();
        // more than fits is an error only where it was asked for
        if let Some(room) = room.filter(|_| free) {
            settings.max_new = settings.max_new.min(room.max(1));
            settings.min_new = settings.min_new.min(settings.max_new);
        }
        if self.verbose {
            eprintln!("{settings:?}");
            eprintln!("from flags: {}; from the folder: {}", asked.join(", "), folder.join(", "));
        }
        settings
    }
}

/// Shows a text as it grows; what fails, as a closed pipe does, ends it and waits to be asked for.
pub struct Live {
    out: io::StdoutLock<'static>,
    failed: Option<io::Error>,
}

impl Live {
    /// On standard output.
    pub fn new() -> Self {
        Self { out: io::stdout().lock(), failed: None }
    }

    /// Shows some more.
    pub fn show(&mut self, text: &str) -> ControlFlow<()> {
        match self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush()) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                self.failed = Some(error);
                ControlFlow::Break(())
            }
        }
    }

    /// Whether all was shown.
    ///
    /// # Errors
    /// What failed.
    pub fn finish(self) -> Result<()> {
        self.failed.map_or(Ok(()), |error| Err(error.into()))
    }
}

/// Why a text ended, in words.
pub fn told(stop: &Stop) -> String {
    match stop {
        Stop::Token(id) => format!("token {id}"),
        Stop::Text(text) => format!("text {text:?}"),
        Stop::Length => "length".into(),
        Stop::Caller => "stopped".into(),
    }
}

/// The text of a file, or of standard input for `-`.
///
/// # Errors
/// If it cannot be read or is not UTF-8.
pub fn read_text(file: &Path) -> Result<String> {
    let (bytes, name) = match file == Path::new("-") {
        true => {
            let mut bytes = Vec::new();
            io::stdin().lock().read_to_end(&mut bytes).context("standard input")?;
            (bytes, "standard input".to_owned())
        }
        false => {
            let name = file.display().to_string();
            (std::fs::read(file).with_context(|| name.clone())?, name)
        }
    };
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => bail!("{name}: not UTF-8 at byte {}", error.utf8_error().valid_up_to()),
    }
}
