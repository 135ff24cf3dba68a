//! What the commands that write text need of a system.

use volary_text::generate::Session;
use volary_text::infill::{Blanks, Commands};

use crate::config::Config;
use crate::error::Error;
use crate::folder::Folder;

/// A loaded model that writes text.
pub trait Generator {
    /// How many tokens it knows.
    fn vocab_size(&self) -> usize;

    /// How many tokens a prompt and what follows it may have together, if there is a limit.
    fn context(&self) -> Option<usize>;

    /// How many tokens may follow a prompt of so many, if there is a limit.
    fn room(&self, prompt: usize) -> Option<usize> {
        self.context().map(|context| context.saturating_sub(prompt))
    }

    /// What stands before the new tokens in the text that is written, as penalties for repetition see it: the prompt, or
    /// nothing where an encoder reads that.
    fn before<'a>(&self, prompt: &'a [u32]) -> &'a [u32] {
        prompt
    }

    /// Rows that go on after these prompts, each by at most `max_new` tokens.
    ///
    /// # Errors
    /// [`Error::Prompt`] with everything that does not fit: see [`check_prompts`].
    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error>;

    /// Its command tokens, if it fills blanks.
    fn commands(&self) -> Option<&Commands> {
        None
    }

    /// Rows that fill the next blanks of these texts, each by at most `max_new` tokens. What fills a blank ends with one of
    /// [`Commands::ends`].
    ///
    /// # Errors
    /// [`Error::Prompt`] with everything that does not fit (see [`check_prompts`]), or if the model fills no blanks.
    fn fill<'a>(&'a self, _texts: &[Blanks], _max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        Err(Error::Prompt { problems: vec!["the model fills no blanks".into()] })
    }
}

/// That there is a prompt, that none is empty, holds an unknown token, or leaves less room than `max_new` tokens in the
/// context.
///
/// # Errors
/// [`Error::Prompt`] with everything that is wrong.
pub fn check_prompts(generator: &dyn Generator, prompts: &[Vec<u32>], max_new: usize) -> Result<(), Error> {
    let mut problems = Vec::new();
    if prompts.is_empty() {
        problems.push("there is no prompt".to_owned());
    }
    for (row, prompt) in prompts.iter().enumerate() {
        let tokens = prompt.len();
        if prompt.is_empty() {
            problems.push(format!("prompt {row} is empty"));
        }
        if let Some(id) = prompt.iter().find(|&&id| id as usize >= generator.vocab_size()) {
            problems.push(format!("prompt {row} holds {id}, expected 0 to {}", generator.vocab_size() - 1));
        }
        if let Some(context) = generator.context().filter(|&context| tokens + max_new > context) {
            problems.push(format!(
                "prompt {row} has {tokens} tokens: with {max_new} more they do not fit into the context of {context}"
            ));
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Prompt { problems }) }
}

/// What configurations call the tokens that end a text; CPM-1 and PanGu-α end documents.
const ENDS: [&str; 3] = ["eos_token_id", "eod_token_id", "eod_token"];

/// The tokens that end a text: `eos_token_id`, or what else it is called, of `generation_config.json`, or else of
/// `config.json`, one or a list. Those outside the vocabulary, which some uploads name, are left out.
///
/// # Errors
/// If a file is malformed.
pub fn end_tokens(folder: &Folder, vocab_size: usize) -> Result<Vec<u32>, Error> {
    for name in ["generation_config.json", "config.json"] {
        if !folder.has(name) {
            continue;
        }
        let config: Config = folder.config(name)?;
        if let Some(end) = ENDS.into_iter().find(|end| config.has(end)) {
            let ids = match config.sizes(end) {
                Some(ids) => ids,
                None => vec![config.integer_or(end, 0)?.try_into().unwrap_or(usize::MAX)],
            };
            return Ok(ids.into_iter().filter(|&id| id < vocab_size).map(|id| id as u32).collect());
        }
    }
    Ok(Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The hub's CPM-1 names one outside its vocabulary.
    #[test]
    fn texts_end_with_what_the_configuration_names() {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        for (name, expected) in [("gpt2", &[0][..]), ("cpm1", &[7]), ("pangu_alpha", &[9]), ("cpm1_hf", &[])]
        {
            assert_eq!(end_tokens(&Folder::Disk(fixtures.join(name)), 88).unwrap(), expected, "{name}");
        }
    }
}
