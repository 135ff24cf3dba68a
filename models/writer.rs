//! A folder that writes text: its tokenizer, its model and its own settings.

use std::ops::ControlFlow;

use burn::tensor::Device;
use volary_text::generate::{Piece, Settings, Spelling, Window, Written, log_likelihoods, windows, write};
use volary_text::infill::{self, Blanks, Commands, Likelihood};
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
    system: &'static str,
}

/// A text whose blanks are filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Filled {
    /// All of it.
    pub text: String,
    /// What fills each blank.
    pub spans: Vec<Written>,
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
        let mut config = GenerationConfig::of(folder, generator.vocab_size())?;
        if let Some(commands) = generator.commands() {
            config.stop_tokens.get_or_insert_default().extend(commands.ends());
        }
        Ok(Self { tokenizer, generator, config, system: system.name })
    }

    /// The tokens of a prompt, with those that the tokenizer puts around a text; blanks where the model fills them.
    ///
    /// # Errors
    /// If the text cannot be tokenized, or has a blank that the model does not know.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, Error> {
        match self.generator.commands() {
            Some(commands) => self.encode_blanks(text, commands),
            None => Ok(self.tokenizer.encode(text)?.ids),
        }
    }

    /// As [`Writer::encode`], of a text that holds the special tokens around it already, as chat templates make them.
    ///
    /// # Errors
    /// As [`Writer::encode`].
    pub fn encode_rendered(&self, text: &str) -> Result<Vec<u32>, Error> {
        match self.generator.commands() {
            Some(commands) => self.encode_blanks(text, commands),
            None => Ok(self.tokenizer.encode_without_special(text)?.ids),
        }
    }

    fn encode_blanks(&self, text: &str, commands: &Commands) -> Result<Vec<u32>, Error> {
        Ok(Blanks::of_text(text, &self.tokenizer, commands)?.context().to_vec())
    }

    /// Fills the blanks of a text, `[MASK]`, `[sMASK]` and `[gMASK]`, in order, each with those before it in sight. Without
    /// a `max_new` all of the room is shared among them.
    ///
    /// # Errors
    /// If the model does not fill blanks or not one of these, or as [`Writer::write`].
    pub fn fill(&self, text: &str, settings: &Settings, max_new: Option<usize>) -> Result<Filled, Error> {
        let unable = Error::Task { system: self.system, task: "fill blanks" };
        let commands = self.generator.commands().ok_or(unable)?;
        let mut blanks = Blanks::of_text(text, &self.tokenizer, commands)?;
        let is_blank = |&&token: &&u32| commands.blank(token).is_some();
        let count = blanks.context().iter().filter(is_blank).count();
        let room =
            self.room(&[blanks.context().to_vec()]).map(|room| (room + 1).saturating_sub(count) / count);
        let free = room.map_or(settings.max_new, |room| settings.max_new.min(room.max(1)));
        let settings = &Settings { max_new: max_new.unwrap_or(free), ..settings.clone() };
        settings.check()?;
        let mut spans = Vec::new();
        infill::fill(&mut blanks, |blanks| -> Result<Vec<u32>, Error> {
            let mut session = self.generator.fill(std::slice::from_ref(blanks), settings.max_new)?;
            let before = [blanks.written().0];
            let watch = &mut |_: Piece| ControlFlow::Continue(());
            let written = write(session.as_mut(), &before, settings, &|| self.spelling(), watch)?.concat();
            let tokens = written.first().map(|written| written.tokens.clone()).unwrap_or_default();
            spans.extend(written.into_iter().next());
            Ok(tokens)
        })?;
        Ok(Filled { text: self.tokenizer.decode(&blanks.written().0, true), spans })
    }

    /// How many tokens may follow the longest of the prompts, if there is a limit.
    pub fn room(&self, prompts: &[Vec<u32>]) -> Option<usize> {
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        self.generator.room(longest)
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
        let before: Vec<Vec<u32>> =
            prompts.iter().map(|prompt| self.generator.before(prompt).to_vec()).collect();
        Ok(write(session.as_mut(), &before, settings, &|| self.spelling(), watch)?)
    }

    fn spelling(&self) -> Box<dyn Spelling + '_> {
        Box::new(self.tokenizer.decode_stream(true))
    }

    /// How likely all tokens of a text but the first are, in windows of the model's context, each `stride` tokens after the
    /// last: see [`windows`]. `done` is told after each window how many of how many tokens were scored.
    ///
    /// # Errors
    /// If the text has fewer than two tokens, one outside the vocabulary, the stride leaves no token in sight, or the model
    /// does not go on in the text that it reads, as those with an encoder.
    pub fn likelihood(
        &self,
        text: &str,
        stride: Option<usize>,
        done: &mut dyn FnMut(usize, usize),
    ) -> Result<Likelihood, Error> {
        // a model of blanks continues a text in one at its end
        let blank = usize::from(self.generator.commands().is_some());
        let tokens = match blank {
            0 => self.encode(text)?,
            _ => self.tokenizer.encode_without_special(text)?.ids,
        };
        if self.generator.before(&[0]).is_empty() {
            return Err(Error::Task { system: self.system, task: "foretell the text that it reads" });
        }
        let known = self.generator.vocab_size();
        if let Some(id) = tokens.iter().find(|&&id| id as usize >= known) {
            return Err(Error::Prompt {
                problems: vec![format!("the text holds {id}, expected 0 to {}", known - 1)],
            });
        }
        let room = self.generator.room(blank).unwrap_or(tokens.len());
        let context = room.min(tokens.len());
        if context < 2 {
            return Err(Error::Prompt { problems: vec!["the text has fewer than two tokens".into()] });
        }
        let stride = stride.unwrap_or_else(|| (context / 2).max(1));
        if stride == 0 || stride >= context && context < tokens.len() {
            let problem = format!("the stride is {stride}, expected 1 to {}", context - 1);
            return Err(Error::Prompt { problems: vec![problem] });
        }
        let mut found = Likelihood { sum: 0.0, tokens: 0 };
        for Window { before, scored } in windows(tokens.len(), context, stride.min(context - 1)) {
            let text = tokens[scored].to_vec();
            let mut session = self.generator.session(&[tokens[before].to_vec()], text.len())?;
            let scores = log_likelihoods(session.as_mut(), &[text])?;
            found.tokens += scores[0].len();
            found.sum += scores[0].iter().sum::<f64>();
            done(found.tokens, tokens.len() - 1);
        }
        Ok(found)
    }
}
