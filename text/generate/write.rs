use std::ops::ControlFlow;

use super::scores::{At, Scores, draw, likeliest, log_total};
use super::spelling::Cut;
use super::{GenerateError, Method, Processor, Session, Settings, Spelling, Text, beams};

/// A text that was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// The new tokens, without the one that stopped it.
    pub tokens: Vec<u32>,
    /// What they spell, up to a stop text.
    pub text: String,
    /// Why it ends.
    pub stop: Stop,
    /// Sum of the model's log-probabilities of the new tokens, a stop token included; before any processor.
    pub log_likelihood: f64,
}

/// Why a text ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// A stop token came.
    Token(u32),
    /// A stop text came.
    Text(String),
    /// It is as long as was allowed.
    Length,
    /// Whoever was watching had enough.
    Caller,
}

/// A token as it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// Which of the prompts it follows.
    pub prompt: usize,
    /// Which of that prompt's texts it belongs to.
    pub candidate: usize,
    /// The token; it may be the one that stops the text.
    pub token: u32,
    /// The text that is certain now: whole characters, and nothing that a stop text may still cut off.
    pub text: &'a str,
}

impl Written {
    /// How many tokens the model chose, a stop token included.
    pub fn chosen(&self) -> usize {
        self.tokens.len() + usize::from(matches!(self.stop, Stop::Token(_)))
    }

    /// Log-probability per token.
    pub fn mean_log_likelihood(&self) -> f64 {
        self.log_likelihood / self.chosen().max(1) as f64
    }
}

/// Continues the prompts that `session` was made of, [`Settings::count`] texts each; where an encoder reads them, empty ones
/// stand for them here; with [`Method::Beams`] the best
/// first, and fewer where there are no more.
///
/// `spell` begins the spelling of one text. `watch` sees every token as it is written and may end it all; beams are shown
/// when they are chosen. All arithmetic after the model's scores is on the host, so that equal scores give equal tokens
/// everywhere. A text does not depend on what other prompts there are.
///
/// # Errors
/// If the settings mean nothing, or no token can be chosen.
pub fn write<'a>(
    session: &mut dyn Session,
    prompts: &[Vec<u32>],
    settings: &Settings,
    spell: &dyn Fn() -> Box<dyn Spelling + 'a>,
    watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
) -> Result<Vec<Vec<Written>>, GenerateError> {
    settings.check()?;
    if prompts.is_empty() {
        return Ok(Vec::new());
    }
    if let Method::Beams(beams) = &settings.method {
        return beams::search(session, prompts, settings, beams, spell, watch);
    }
    let processors = settings.processors();
    let new = |prompt: usize| (0..settings.count).map(move |candidate| (prompt, candidate));
    let mut rows: Vec<Row> = (0..prompts.len())
        .flat_map(new)
        .map(|(prompt, candidate)| Row::new(prompt, candidate, &prompts[prompt], settings, spell()))
        .collect();

    // Which text each row of the session writes. Before the first token there is one row per prompt.
    let mut seats: Vec<usize> = Vec::new();
    'writing: for step in 0..settings.max_new {
        let scores = match step {
            0 => Scores::read(session.start(), prompts.len())?,
            _ => {
                let last: Vec<u32> = seats.iter().map(|&row| rows[row].last()).collect();
                Scores::read(session.read(&last), seats.len())?
            }
        };
        settings.check_tokens(scores.vocab_size())?;
        let seated: Vec<(usize, usize)> = match step {
            0 => rows.iter().enumerate().map(|(row, text)| (text.prompt, row)).collect(),
            _ => seats.iter().copied().enumerate().collect(),
        };
        for &(seat, row) in &seated {
            let row = &mut rows[row];
            if row.stop.is_none() {
                let scores = scores.row(seat, row.at())?;
                let (token, text) = row.step(scores, &processors, settings)?;
                let piece = Piece { prompt: row.prompt, candidate: row.candidate, token, text: &text };
                if watch(piece).is_break() {
                    break 'writing;
                }
            }
        }
        // Rows that ended are read on with any token, until half of the work would be for nothing.
        let going: Vec<(usize, usize)> =
            seated.iter().copied().filter(|&(_, row)| rows[row].stop.is_none()).collect();
        if going.is_empty() {
            break;
        }
        let kept = if 2 * going.len() <= seated.len() { &going } else { &seated };
        let moved: Vec<usize> = kept.iter().map(|&(seat, _)| seat).collect();
        let rows_now = if step == 0 { prompts.len() } else { seats.len() };
        if !moved.iter().copied().eq(0..rows_now) {
            session.select(&moved);
        }
        seats = kept.iter().map(|&(_, row)| row).collect();
    }

    let mut texts = vec![Vec::new(); prompts.len()];
    for row in rows {
        texts[row.prompt].push(row.finish());
    }
    Ok(texts)
}

/// A text in the making.
struct Row<'a> {
    prompt: usize,
    candidate: usize,
    /// The prompt and what follows it.
    tokens: Vec<u32>,
    prompt_length: usize,
    random: fastrand::Rng,
    spelling: Box<dyn Spelling + 'a>,
    cut: Cut<'a>,
    text: String,
    log_likelihood: f64,
    stop: Option<Stop>,
}

impl<'a> Row<'a> {
    fn new(
        prompt: usize,
        candidate: usize,
        tokens: &[u32],
        settings: &'a Settings,
        spelling: Box<dyn Spelling + 'a>,
    ) -> Self {
        let seed = match &settings.method {
            Method::Sample(sampling) => sampling.seed,
            Method::Greedy | Method::Beams(_) => 0,
        };
        Self {
            prompt,
            candidate,
            tokens: tokens.to_vec(),
            prompt_length: tokens.len(),
            random: fastrand::Rng::with_seed(stream(seed, candidate as u64)),
            spelling,
            cut: Cut::new(&settings.stop_texts),
            text: String::new(),
            log_likelihood: 0.0,
            stop: None,
        }
    }

    fn at(&self) -> At {
        At { prompt: self.prompt, written: self.tokens.len() - self.prompt_length }
    }

    /// What the session reads next; of a text that ended, any token.
    fn last(&self) -> u32 {
        if self.stop.is_some() { 0 } else { self.tokens.last().copied().unwrap_or(0) }
    }

    /// Chooses a token, and gives it with the text that may be shown now.
    fn step(
        &mut self,
        scores: &[f32],
        processors: &[Processor],
        settings: &Settings,
    ) -> Result<(u32, String), GenerateError> {
        let mut processed = scores.to_vec();
        let text = Text { tokens: &self.tokens, prompt: self.prompt_length };
        processors.iter().for_each(|processor| processor.apply(&text, &mut processed));
        let token = match &settings.method {
            Method::Sample(sampling) if sampling.temperature > 0.0 => draw(&processed, &mut self.random),
            _ => likeliest(&processed),
        };
        let token = token.ok_or_else(|| self.at().no_token())?;
        self.log_likelihood += f64::from(scores[token as usize]) - log_total(scores);
        if settings.stop_tokens.contains(&token) {
            self.stop = Some(Stop::Token(token));
            return Ok((token, self.rest()));
        }
        self.tokens.push(token);
        let piece = self.spelling.push(token);
        let mut shown = self.show(&piece);
        if self.stop.is_none() && self.at().written == settings.max_new {
            self.stop = Some(Stop::Length);
            shown += &self.rest();
        }
        Ok((token, shown))
    }

    /// Adds to the text what may be shown.
    fn show(&mut self, piece: &str) -> String {
        let (shown, stop) = self.cut.push(piece);
        self.text += &shown;
        if let Some(stop) = stop {
            self.stop = Some(Stop::Text(stop.to_owned()));
        }
        shown
    }

    /// What was held back, now that the text ends; it may still complete a stop text.
    fn rest(&mut self) -> String {
        let piece = self.spelling.finish();
        let mut shown = self.show(&piece);
        if !matches!(self.stop, Some(Stop::Text(_))) {
            let held = self.cut.finish();
            self.text += &held;
            shown += &held;
        }
        shown
    }

    fn finish(mut self) -> Written {
        if self.stop.is_none() {
            self.rest();
        }
        Written {
            tokens: self.tokens.split_off(self.prompt_length),
            text: self.text,
            stop: self.stop.unwrap_or(Stop::Caller),
            log_likelihood: self.log_likelihood,
        }
    }
}

/// The text of some tokens and the stop text that cuts it, if one does.
pub(super) fn spelled(
    tokens: &[u32],
    mut spelling: Box<dyn Spelling + '_>,
    stops: &[String],
) -> (String, Option<String>) {
    let mut text: String = tokens.iter().map(|&token| spelling.push(token)).collect();
    text += &spelling.finish();
    let mut cut = Cut::new(stops);
    let (mut shown, stop) = cut.push(&text);
    shown += &cut.finish();
    (shown, stop.map(str::to_owned))
}

/// The seed of one of many independent streams (the finaliser of SplitMix64, Steele et al. 2014).
fn stream(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add((index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
