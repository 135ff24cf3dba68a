//! Texts with blanks, filled one after the other: autoregressive blank infilling (Du et al. 2022, "GLM",
//! <https://arxiv.org/abs/2103.10360>, section 2).
//!
//! A [`Blanks`] says what stands where; how a model reads it is the model's own affair. [`fill`] goes through the blanks
//! of one text, [`likelihoods`] compares what might stand in one.

use crate::generate::{GenerateError, Session, log_likelihoods};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// What a blank is to be filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blank {
    /// A few words: `[MASK]`.
    Span,
    /// Whole sentences: `[sMASK]`.
    Sentence,
    /// The rest of the document: `[gMASK]`.
    Document,
}

impl Blank {
    const ALL: [Blank; 3] = [Blank::Span, Blank::Sentence, Blank::Document];

    /// How it is written in a text.
    pub const fn written(self) -> &'static str {
        match self {
            Blank::Span => "[MASK]",
            Blank::Sentence => "[sMASK]",
            Blank::Document => "[gMASK]",
        }
    }
}

/// The tokens that steer infilling.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Commands {
    /// `[MASK]`.
    pub span: Option<u32>,
    /// `[sMASK]`.
    pub sentence: Option<u32>,
    /// `[gMASK]`.
    pub document: Option<u32>,
    /// `sop`, which begins what fills a blank.
    pub start: u32,
    /// `eop`, which ends it.
    pub end: u32,
    /// Stands before every text, if anything does.
    pub first: Option<u32>,
    /// Stands after every text that does not end in a blank.
    pub last: Option<u32>,
}

impl Commands {
    /// Those of a tokenizer; `None` for one without the tokens around what fills a blank, or without any blank.
    pub fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let commands = Self {
            span: tokenizer.mask_id(),
            sentence: tokenizer.smask_id(),
            document: tokenizer.gmask_id(),
            start: tokenizer.sop_id()?,
            end: tokenizer.eop_id()?,
            first: tokenizer.cls_id(),
            last: tokenizer.eos_id(),
        };
        Blank::ALL.iter().any(|blank| commands.id(*blank).is_some()).then_some(commands)
    }

    /// The token of a blank, if the model knows it.
    pub fn id(&self, blank: Blank) -> Option<u32> {
        match blank {
            Blank::Span => self.span,
            Blank::Sentence => self.sentence,
            Blank::Document => self.document,
        }
    }

    /// The blank that a token is.
    pub fn blank(&self, token: u32) -> Option<Blank> {
        Blank::ALL.into_iter().find(|&blank| self.id(blank) == Some(token))
    }

    /// The tokens after which nothing more belongs to a blank.
    pub fn ends(&self) -> Vec<u32> {
        std::iter::once(self.end).chain(self.last).collect()
    }

    /// The blank that is put after a text without one: the rest of the document, or the first that the model knows.
    fn appended(&self) -> Option<u32> {
        self.document.or(self.span).or(self.sentence)
    }
}

/// Why a text cannot be filled.
#[derive(Debug, thiserror::Error)]
pub enum BlanksError {
    /// A blank that the model was not trained on.
    #[error("the model does not know {}; it knows {}", found.written(), known.join(", "))]
    Unknown {
        /// The blank.
        found: Blank,
        /// How those it knows are written.
        known: Vec<&'static str>,
    },
    /// The text cannot be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A text with blanks, of which the first few may be filled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blanks {
    context: Vec<u32>,
    /// Which tokens of the context are blanks, in order.
    places: Vec<(usize, Blank)>,
    /// What fills them, from the first on.
    spans: Vec<Vec<u32>>,
}

impl Blanks {
    /// The blanks in a text's tokens; `None` where there is none.
    pub fn new(context: Vec<u32>, commands: &Commands) -> Option<Self> {
        let places: Vec<_> = context
            .iter()
            .enumerate()
            .filter_map(|(at, &token)| Some((at, commands.blank(token)?)))
            .collect();
        (!places.is_empty()).then_some(Self { context, places, spans: Vec::new() })
    }

    /// As [`Blanks::new`]; tokens without a blank get one at their end, in place of the last of [`Commands`] if they have
    /// it. `None` where the model knows no blank.
    pub fn or_appended(mut context: Vec<u32>, commands: &Commands) -> Option<Self> {
        if !context.iter().any(|&token| commands.blank(token).is_some()) {
            if commands.last.is_some() && context.last().copied() == commands.last {
                context.pop();
            }
            context.push(commands.appended()?);
        }
        Self::new(context, commands)
    }

    /// A text in which blanks are written `[MASK]`, `[sMASK]` and `[gMASK]`. One without any gets one at its end. Spaces
    /// before a blank are left out, as GLM's tokenizers do.
    ///
    /// # Errors
    /// If the model does not know one of the blanks, or the text cannot be tokenized.
    pub fn of_text(text: &str, tokenizer: &Tokenizer, commands: &Commands) -> Result<Self, BlanksError> {
        let known = || Blank::ALL.into_iter().filter(|&blank| commands.id(blank).is_some());
        let unknown = |found| BlanksError::Unknown { found, known: known().map(Blank::written).collect() };
        let mut context: Vec<u32> = commands.first.into_iter().collect();
        let mut rest = text;
        let mut ends_in_blank = false;
        while let Some((at, blank)) = first_blank(rest) {
            let before = rest[..at].trim_end();
            if !before.is_empty() {
                context.extend(tokenizer.encode_without_special(before)?.ids);
            }
            context.push(commands.id(blank).ok_or_else(|| unknown(blank))?);
            rest = &rest[at + blank.written().len()..];
            ends_in_blank = rest.is_empty();
        }
        if !rest.is_empty() {
            context.extend(tokenizer.encode_without_special(rest)?.ids);
        }
        let has_blank = rest.len() < text.len();
        if has_blank && !ends_in_blank {
            context.extend(commands.last);
        }
        Self::or_appended(context, commands).ok_or_else(|| unknown(Blank::Document))
    }

    /// The text's tokens, with a token for each blank.
    pub fn context(&self) -> &[u32] {
        &self.context
    }

    /// The first blank that is not filled: where it stands in the context, and what it is.
    pub fn next(&self) -> Option<(usize, Blank)> {
        self.places.get(self.spans.len()).copied()
    }

    /// The blanks that are filled: where each stands in the context, and with what.
    pub fn filled(&self) -> impl Iterator<Item = (usize, &[u32])> {
        self.places.iter().zip(&self.spans).map(|((at, _), span)| (*at, span.as_slice()))
    }

    /// Fills the next blank; nothing happens where there is none.
    pub fn fill(&mut self, span: Vec<u32>) {
        if self.next().is_some() {
            self.spans.push(span);
        }
    }

    /// The tokens with every filled blank replaced by what fills it, and where the next blank stands in them.
    pub fn written(&self) -> (Vec<u32>, Option<usize>) {
        let mut text = Vec::with_capacity(self.context.len());
        let mut done = 0;
        for (at, span) in self.filled() {
            text.extend_from_slice(&self.context[done..at]);
            text.extend_from_slice(span);
            done = at + 1;
        }
        let next = self.next().map(|(at, _)| text.len() + at - done);
        text.extend_from_slice(&self.context[done..]);
        (text, next)
    }
}

/// Where the first blank begins in a text.
fn first_blank(text: &str) -> Option<(usize, Blank)> {
    Blank::ALL
        .into_iter()
        .filter_map(|blank| Some((text.find(blank.written())?, blank)))
        .min_by_key(|(at, _)| *at)
}

/// Fills the blanks of a text in order: each with what `write` makes of it, so that those after it are written with it in
/// sight.
///
/// # Errors
/// Those of `write`; the blanks before it stay filled.
pub fn fill<E>(text: &mut Blanks, mut write: impl FnMut(&Blanks) -> Result<Vec<u32>, E>) -> Result<(), E> {
    while text.next().is_some() {
        let span = write(text)?;
        text.fill(span);
    }
    Ok(())
}

/// How likely a span is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Likelihood {
    /// The sum over its tokens of the logarithm of each one's probability after those before it.
    pub sum: f64,
    /// How many they are.
    pub tokens: usize,
}

impl Likelihood {
    /// Of a span whose tokens have these log-probabilities.
    fn of(tokens: &[f64]) -> Self {
        Self { sum: tokens.iter().sum(), tokens: tokens.len() }
    }

    /// Over the number of tokens, which does not favour short spans; 0 for an empty one.
    pub fn mean(self) -> f64 {
        self.sum / self.tokens.max(1) as f64
    }
}

/// How likely each of the candidates is to be written in a session: to fill a blank (a cloze question, whose answers are
/// the words that stand for its classes), or to go on after a text. The session has a row for each, of the same text.
///
/// # Errors
/// If there is not one row per candidate, or scores are not finite.
///
/// # Panics
/// If a token is outside the vocabulary, or the session has not the room.
pub fn likelihoods(
    session: &mut dyn Session,
    candidates: &[Vec<u32>],
) -> Result<Vec<Likelihood>, GenerateError> {
    Ok(log_likelihoods(session, candidates)?.iter().map(|tokens| Likelihood::of(tokens)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMMANDS: Commands = Commands {
        span: Some(83),
        sentence: Some(87),
        document: None,
        start: 85,
        end: 86,
        first: Some(82),
        last: Some(80),
    };

    #[test]
    fn blanks_are_filled_in_order() {
        let mut text = Blanks::new(vec![82, 83, 5, 87, 6, 80], &COMMANDS).unwrap();
        assert_eq!(text.next(), Some((1, Blank::Span)));
        assert_eq!(text.written(), (vec![82, 83, 5, 87, 6, 80], Some(1)));
        text.fill(vec![7, 8, 9]);
        assert_eq!(text.next(), Some((3, Blank::Sentence)));
        assert_eq!(text.written(), (vec![82, 7, 8, 9, 5, 87, 6, 80], Some(5)));
        text.fill(vec![]);
        assert_eq!(text.next(), None);
        assert_eq!(text.written(), (vec![82, 7, 8, 9, 5, 6, 80], None));
        assert_eq!(text.filled().collect::<Vec<_>>(), [(1, &[7, 8, 9][..]), (3, &[])]);
        text.fill(vec![1]);
        assert_eq!(text.filled().count(), 2);
    }

    #[test]
    fn each_blank_is_written_with_those_before_it_in_sight() {
        let mut text = Blanks::new(vec![83, 5, 83], &COMMANDS).unwrap();
        let mut seen = Vec::new();
        let write = |text: &Blanks| {
            seen.push(text.written().0);
            if seen.len() < 2 { Ok(vec![7]) } else { Err("stopped") }
        };
        assert_eq!(fill(&mut text, write), Err("stopped"));
        assert_eq!(seen, [vec![83, 5, 83], vec![7, 5, 83]]);
        assert_eq!(text.written(), (vec![7, 5, 83], Some(2)));
    }

    #[test]
    fn a_text_without_a_blank_gets_one() {
        assert_eq!(Blanks::new(vec![82, 5], &COMMANDS), None);
        for tokens in [vec![82, 5], vec![82, 5, 80]] {
            assert_eq!(Blanks::or_appended(tokens, &COMMANDS).unwrap().context(), [82, 5, 83]);
        }
        let document = Commands { document: Some(88), ..COMMANDS };
        assert_eq!(Blanks::or_appended(vec![82, 5], &document).unwrap().next(), Some((2, Blank::Document)));
        assert_eq!(Blanks::or_appended(vec![82, 5], &Commands::default()), None);
    }

    /// The first token, the text around the blanks without the spaces before them, and the last token unless a blank ends
    /// the text.
    #[test]
    fn blanks_are_found_in_a_written_text() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/tok_bert");
        let tokenizer = Tokenizer::from_folder(folder.as_ref()).unwrap();
        assert_eq!(Commands::of(&tokenizer), None);
        let commands = Commands { span: tokenizer.mask_id(), ..COMMANDS };
        let ids = |text: &str| tokenizer.encode_without_special(text).unwrap().ids;
        let span = commands.span.unwrap();
        let read =
            |text: &str| Blanks::of_text(text, &tokenizer, &commands).map(|text| text.context().to_vec());
        let between =
            [&[82], &ids("a cat")[..], &[span], &ids("on")[..], &[87], &ids(".")[..], &[80]].concat();
        assert_eq!(read("a cat [MASK] on [sMASK].").unwrap(), between);
        let last = [&[82], &ids("a cat")[..], &[span]].concat();
        assert_eq!(read("a cat [MASK]").unwrap(), last);
        assert_eq!(read("a cat").unwrap(), last, "a blank is put after a text without one");
        assert_eq!(read("").unwrap(), [82, span]);
        assert_eq!(read("[MASK]a").unwrap(), [&[82, span], &ids("a")[..], &[80]].concat());
        let error = read("a [gMASK]").unwrap_err().to_string();
        assert_eq!(error, "the model does not know [gMASK]; it knows [MASK], [sMASK]");
    }

    #[test]
    fn a_mean_does_not_favour_short_spans() {
        let long = Likelihood::of(&[-0.5, -1.0, -0.75]);
        assert_eq!((long.sum, long.tokens, long.mean()), (-2.25, 3, -0.75));
        let short = Likelihood::of(&[-1.5]);
        assert!(short.sum > long.sum && short.mean() < long.mean());
        assert_eq!(Likelihood::of(&[]).mean(), 0.0);
    }
}
