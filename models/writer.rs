//! A folder that writes text: its tokenizer, its model and its own settings.

use std::ops::ControlFlow;

use burn::tensor::Device;
use volary_text::generate::{Piece, Settings, Spelling, Window, Written, log_likelihoods, windows, write};
use volary_text::tokenizer::Tokenizer;
use volary_weights::LoadOptions;

use crate::error::Error;
use crate::folder::Folder;
use crate::generation_config::GenerationConfig;
use crate::generator::Generator;
use crate::registry::System;

/// A model that writes text, loaded.
///
/// ```no_run
/// use std::ops::ControlFlow;
///
/// use burn::tensor::Device;
/// use volary::folder::Folder;
/// use volary::writer::Writer;
/// use volary_weights::LoadOptions;
///
/// let folder = Folder::Disk("TinyLlama-1.1B-Chat-v1.0".into());
/// let writer = Writer::load(&folder, &LoadOptions::default(), &Device::flex())?;
/// let prompt = writer.encode("The largest moon of Saturn is")?;
/// let texts = writer.write(&[prompt], &writer.config.clone().settings(), &mut |piece| {
///     print!("{}", piece.text);
///     ControlFlow::Continue(())
/// })?;
/// println!("\n{:?}", texts[0][0].stop);
/// # Ok::<(), volary::Error>(())
/// ```
pub struct Writer {
    /// Between text and tokens.
    pub tokenizer: Tokenizer,
    /// The model.
    pub generator: Box<dyn Generator>,
    /// What the folder says of writing.
    pub config: GenerationConfig,
}

/// How likely a text is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// How many tokens were scored: all but the first.
    pub tokens: usize,
    /// The sum of their log-probabilities.
    pub log_likelihood: f64,
}

impl Writer {
    /// Loads a folder.
    ///
    /// # Errors
    /// If it is malformed, or of a system that does not write text.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let system = System::of(folder)?;
        let open = system.generator.ok_or(Error::Task { system: system.name, task: "write text" })?;
        // the tokenizer first: it takes no time to say that there is none
        let tokenizer = folder.tokenizer()?;
        let generator = open(folder, options, device)?;
        let config = GenerationConfig::of(folder, generator.vocab_size())?;
        Ok(Self { tokenizer, generator, config })
    }

    /// The tokens of a prompt, with those that the tokenizer puts around a text.
    ///
    /// # Errors
    /// If the text cannot be tokenized.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        Ok(self.tokenizer.encode(text)?.ids)
    }

    /// How many tokens may follow the longest of the prompts, if there is a limit.
    pub fn room(&self, prompts: &[Vec<u32>]) -> Option<usize> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        self.generator.context().map(|context| context.saturating_sub(longest))
    }

    /// Continues the prompts: [`write`].
    ///
    /// # Errors
    /// If a prompt does not fit, the settings mean nothing, or no token can be chosen.
    pub fn write(
        &self,
        prompts: &[Vec<u32>],
        settings: &Settings,
        watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Written>>, Error> {
        settings.check()?;
        let mut session = self.generator.session(prompts, settings.max_new)?;
        let spell = || Box::new(self.tokenizer.decode_stream(true)) as Box<dyn Spelling>;
        Ok(write(session.as_mut(), prompts, settings, &spell, watch)?)
    }

    /// How likely a text is, in windows of the model's context, each `stride` tokens after the last: see [`windows`].
    /// `done` is told after each window how many tokens were scored.
    ///
    /// # Errors
    /// If the text has fewer than two tokens, one outside the vocabulary, or the stride leaves no token in sight.
    pub fn likelihood(
        &self,
        tokens: &[u32],
        stride: Option<usize>,
        done: &mut dyn FnMut(usize),
    ) -> Result<Likelihood, Error> {
        let context = self.generator.context().unwrap_or(tokens.len()).min(tokens.len());
        if context < 2 {
            return Err(Error::Prompt { problems: vec!["the text has fewer than two tokens".into()] });
        }
        let stride = stride.unwrap_or_else(|| (context / 2).max(1));
        if stride == 0 || stride > context.max(2) - 1 && context < tokens.len() {
            let problem = format!("the stride is {stride}, expected 1 to {}", context - 1);
            return Err(Error::Prompt { problems: vec![problem] });
        }
        let mut found = Likelihood { tokens: 0, log_likelihood: 0.0 };
        for Window { before, scored } in windows(tokens.len(), context, stride.min(context - 1)) {
            let text = tokens[scored].to_vec();
            let mut session = self.generator.session(&[tokens[before].to_vec()], text.len())?;
            let scores = log_likelihoods(session.as_mut(), &[text])?;
            found.tokens += scores[0].len();
            found.log_likelihood += scores[0].iter().sum::<f64>();
            done(found.tokens);
        }
        Ok(found)
    }
}
