use std::path::PathBuf;

use volary_multimodal::imagine::Stopped;
use volary_multimodal::retrieval::VectorFileError;
use volary_text::chat::ChatError;
use volary_text::generate::GenerateError;
use volary_text::infill::BlanksError;
use volary_text::tokenizer::TokenizerError;
use volary_vision::diffusion::ScheduleError;
use volary_vision::image::ImageError;
use volary_vision::preprocess::PreprocessError;
use volary_weights::hub::HubError;

use crate::config::ConfigError;

/// Why a model could not be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Neither a folder, nor a preset, nor the form of a hub id.
    #[error("`{name}` is neither a folder nor a preset{}", hint.as_deref().unwrap_or_default())]
    UnknownModel {
        /// What was asked for.
        name: String,
        /// What to do instead.
        hint: Option<String>,
    },
    /// A repository could not be brought here.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// A folder without a configuration.
    #[error("{}: no configuration; looked for {}", folder.display(), looked_for.join(", "))]
    NoConfig {
        /// The folder.
        folder: PathBuf,
        /// The files that would have told.
        looked_for: &'static [&'static str],
    },
    /// A configuration of no system we have.
    #[error("{}: {found} is none of the systems here; known: {}", file.display(), known.join(", "))]
    UnknownSystem {
        /// The configuration file.
        file: PathBuf,
        /// What it calls itself.
        found: String,
        /// What is known.
        known: Vec<String>,
    },
    /// The configuration is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The weights are wrong.
    #[error(transparent)]
    Weights(#[from] volary_weights::Error),
    /// The tokenizer is wrong, or a text cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A picture cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// An index of pictures cannot be read or written.
    #[error(transparent)]
    Index(#[from] VectorFileError),
    /// The preprocessor is wrong, or does not fit.
    #[error(transparent)]
    Preprocess(#[from] PreprocessError),
    /// A scheduler has no such steps.
    #[error(transparent)]
    Schedule(#[from] ScheduleError),
    /// A pipeline lacks folders that its parts are in.
    #[error("{}: no folder {}; a pipeline has {}", folder.display(), missing.join(", "), parts.join(", "))]
    NoParts {
        /// The pipeline's folder.
        folder: PathBuf,
        /// The folders that are not there.
        missing: Vec<String>,
        /// All that there should be.
        parts: &'static [&'static str],
    },
    /// A picture that cannot be imagined as it was asked for; everything wrong with the request.
    #[error("{}", problems.join("; "))]
    Request {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// A picture was stopped by who watched it.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// Tensors that do not fit the model; everything wrong with them.
    #[error("{system}: {}", problems.join("; "))]
    Input {
        /// The system.
        system: &'static str,
        /// One sentence each.
        problems: Vec<String>,
    },
    /// Prompts that the model cannot go on from; everything wrong with them.
    #[error("{}", problems.join("; "))]
    Prompt {
        /// One sentence each.
        problems: Vec<String>,
    },
    /// A text that cannot be written.
    #[error(transparent)]
    Generate(#[from] GenerateError),
    /// A text whose blanks cannot be read.
    #[error(transparent)]
    Blanks(#[from] BlanksError),
    /// A chat template is wrong, or refuses a conversation.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// A model without a chat template.
    #[error("{}: no chat template here, so the model was not made for conversations; `generate` continues a text", folder.display())]
    NoTemplate {
        /// The checkpoint folder.
        folder: PathBuf,
    },
    /// The preprocessor and the model disagree.
    #[error("{}: the preprocessor makes pictures of {found} pixels, the model sees {expected}", folder.display())]
    PictureSize {
        /// The checkpoint folder.
        folder: PathBuf,
        /// Side in pixels.
        expected: usize,
        /// Height and width in pixels, or that they vary.
        found: String,
    },
    /// The tokenizer knows more tokens than the model.
    #[error("{}: the tokenizer has {found} tokens, the model {expected}", folder.display())]
    Vocabulary {
        /// The checkpoint folder.
        folder: PathBuf,
        /// The model's.
        expected: usize,
        /// The tokenizer's.
        found: usize,
    },
    /// Two towers do not meet in one space.
    #[error("{}: texts get {found} numbers, pictures {expected}", folder.display())]
    Width {
        /// The folder of the tower for texts.
        folder: PathBuf,
        /// Of pictures.
        expected: usize,
        /// Of texts.
        found: usize,
    },
    /// A file of pictures and captions does not hold what it should.
    #[error("{}: {problem}", file.display())]
    Data {
        /// The file.
        file: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A folder cannot be written where it was asked for.
    #[error("{}: {reason}", path.display())]
    Target {
        /// The place.
        path: PathBuf,
        /// What is in the way.
        reason: String,
    },
    /// The model cannot do this.
    #[error("{system} cannot {task}")]
    Task {
        /// The system.
        system: &'static str,
        /// What was asked.
        task: &'static str,
    },
    /// The device that was asked for is not there.
    #[error("{0}")]
    Device(String),
}

impl Error {
    /// An [`Error::Io`] of `path`.
    pub fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
