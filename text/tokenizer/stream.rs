use super::{CLEAN_UP, Tokenizer};
use crate::generate::Spelling;

/// Text from tokens as they come, [`Tokenizer::decode_stream`].
///
/// The parts together are what [`Tokenizer::decode`] makes of all the tokens. A character whose bytes have
/// not all come is held back, and so is what a later token may still change: the space at the end of a
/// tokenizer that trims its text, or the ` n'` that may become `n't`.
///
/// ```no_run
/// # fn next_token() -> Option<u32> { None }
/// # let tokenizer = volary_text::tokenizer::Tokenizer::from_folder("gpt2".as_ref())?;
/// let mut stream = tokenizer.decode_stream(true);
/// while let Some(id) = next_token() {
///     print!("{}", stream.push(id));
/// }
/// println!("{}", stream.finish());
/// # Ok::<(), volary_text::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct DecodeStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special: bool,
    /// The newest tokens, and enough before them that they decode as they do after all.
    window: Vec<u32>,
    /// The tokens of the window that came before everything had last been given out.
    settled: usize,
    /// How many bytes of the window's text have been given out.
    given: usize,
}

impl Tokenizer {
    /// A decoder for tokens that come one by one. `skip_special` leaves special tokens out.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { tokenizer: self, skip_special, window: Vec::new(), settled: 0, given: 0 }
    }

    /// How much of a text that may go on is certain, in bytes.
    fn certain(&self, text: &str) -> usize {
        let mut certain = text.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if self.word_end.is_some() {
            certain = certain.trim_end();
        }
        if self.clean_up {
            let begun = |apart: &str| {
                let starts = (1..apart.len()).rev().filter_map(|length| apart.get(..length));
                starts.filter(|start| certain.ends_with(start)).map(str::len).max()
            };
            // What becomes "n't" in two steps.
            let apart = CLEAN_UP.iter().map(|(apart, _)| *apart).chain([" n ' t"]);
            let held = apart.filter_map(begun).max();
            certain = &certain[..certain.len() - held.unwrap_or(0)];
        }
        certain.len()
    }
}

impl Spelling for DecodeStream<'_> {
    fn push(&mut self, token: u32) -> String {
        DecodeStream::push(self, token)
    }

    fn finish(&mut self) -> String {
        DecodeStream::finish(self)
    }
}

impl DecodeStream<'_> {
    /// Takes the next token; returns the text that has become certain, often none.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        self.window.push(id);
        let text = self.tokenizer.decode(&self.window, self.skip_special);
        let certain = self.tokenizer.certain(&text);
        let Some(part) = text.get(self.given..certain) else {
            return String::new();
        };
        let part = part.to_owned();
        self.given = certain;
        if certain == text.len() {
            self.forget(&text);
        }
        part
    }

    /// The text that was held back; the next token begins another text.
    pub fn finish(&mut self) -> String {
        let text = self.tokenizer.decode(&self.window, self.skip_special);
        let rest = text.get(self.given..).unwrap_or_default().to_owned();
        *self = self.tokenizer.decode_stream(self.skip_special);
        rest
    }

    /// Drops the tokens that later ones no longer need. Whatever a decoder does at a text's beginning is
    /// over once something is to be seen there, and spaces are put right up to the next letter.
    fn forget(&mut self, all: &str) {
        let rest = &self.window[self.settled..];
        let text = self.tokenizer.decode(rest, self.skip_special);
        let visible = |c: char| match self.tokenizer.clean_up {
            true => c.is_alphanumeric(),
            false => !c.is_whitespace() && c != char::REPLACEMENT_CHARACTER,
        };
        if self.settled > 0 && text.contains(visible) && all.ends_with(&text) {
            self.window.drain(..self.settled);
            self.given = text.len();
        }
        self.settled = self.window.len();
    }
}
