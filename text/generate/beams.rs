//! Beam search, with the bookkeeping of `transformers`.

use std::ops::ControlFlow;

use super::scores::{At, Scores, log_total};
use super::write::spelled;
use super::{
    Beams, GenerateError, Patience, Piece, Processor, Session, Settings, Spelling, Stop, Text, Written,
};

/// See [`super::write`].
pub(super) fn search<'a>(
    session: &mut dyn Session,
    prompts: &[Vec<u32>],
    settings: &Settings,
    beams: &Beams,
    spell: &dyn Fn() -> Box<dyn Spelling + 'a>,
    watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
) -> Result<Vec<Vec<Written>>, GenerateError> {
    let processors = settings.processors();
    let rules = Rules { settings, beams, processors: &processors, spell };
    let mut searches: Vec<Search> =
        prompts.iter().enumerate().map(|(prompt, tokens)| Search::new(prompt, tokens)).collect();

    // The session has a row for each unfinished sequence of every prompt.
    for step in 0..settings.max_new {
        let last: Vec<u32> =
            searches.iter().flat_map(|search| search.running.iter().map(Beam::last)).collect();
        let scores = Scores::read(if step == 0 { session.start() } else { session.read(&last) }, last.len())?;
        settings.check_tokens(scores.vocab_size())?;
        let mut sources = Vec::new();
        let mut first = 0;
        for search in &mut searches {
            let rows = search.running.len();
            if rows > 0 {
                sources.extend(search.step(&scores, first, &rules)?);
            }
            first += rows;
        }
        if sources.is_empty() {
            break;
        }
        if !sources.iter().copied().eq(0..last.len()) {
            session.select(&sources);
        }
    }

    let mut texts = Vec::with_capacity(prompts.len());
    let mut watching = true;
    for (prompt, search) in searches.into_iter().enumerate() {
        let finished = search.finished.into_iter().take(settings.count);
        let written: Vec<Written> = finished.map(|(_, beam, stop)| rules.written(beam, stop)).collect();
        for (candidate, text) in written.iter().enumerate() {
            let token = text.tokens.last().copied().or(match text.stop {
                Stop::Token(token) => Some(token),
                _ => None,
            });
            if let Some(token) = token.filter(|_| watching) {
                watching = watch(Piece { prompt, candidate, token, text: &text.text }).is_continue();
            }
        }
        texts.push(written);
    }
    Ok(texts)
}

/// What is the same for all prompts.
struct Rules<'r, 'a> {
    settings: &'r Settings,
    beams: &'r Beams,
    processors: &'r [Processor],
    spell: &'r dyn Fn() -> Box<dyn Spelling + 'a>,
}

/// A sequence.
#[derive(Clone)]
struct Beam {
    /// The prompt and what follows it.
    tokens: Vec<u32>,
    prompt: usize,
    /// Sum of the processed log-probabilities.
    score: f64,
    /// Sum of the model's own.
    log_likelihood: f64,
}

/// A token that may follow one of the sequences.
#[derive(Clone, Copy)]
struct Candidate {
    beam: usize,
    token: u32,
    score: f64,
    log_likelihood: f64,
}

/// The search of one prompt.
struct Search {
    prompt: usize,
    /// Unfinished sequences, the best first; none when the search has ended.
    running: Vec<Beam>,
    /// Finished ones with the scores by which they are compared, the best first.
    finished: Vec<(f64, Beam, Stop)>,
}

impl Beam {
    fn written(&self) -> usize {
        self.tokens.len() - self.prompt
    }

    fn last(&self) -> u32 {
        self.tokens.last().copied().unwrap_or(0)
    }
}

impl Search {
    fn new(prompt: usize, tokens: &[u32]) -> Self {
        let beam = Beam { tokens: tokens.to_vec(), prompt: tokens.len(), score: 0.0, log_likelihood: 0.0 };
        Self { prompt, running: vec![beam], finished: Vec::new() }
    }

    /// Reads the scores of its rows, which begin at `first`, and gives the rows that the unfinished sequences, chosen
    /// anew, go on from.
    fn step(&mut self, scores: &Scores, first: usize, rules: &Rules) -> Result<Vec<usize>, GenerateError> {
        let Rules { settings, beams, .. } = *rules;
        let candidates = self.candidates(scores, first, rules)?;
        let mut running = Vec::with_capacity(beams.width);
        let mut sources = Vec::with_capacity(beams.width);
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let Candidate { beam: source, token, score, log_likelihood } = candidate;
            let mut beam = Beam { score, log_likelihood, ..self.running[source].clone() };
            beam.tokens.push(token);
            match rules.stop(&beam) {
                // an end that is not among the best now is no end
                Some(stop) if rank < beams.width => {
                    let length = beam.written() as f64;
                    self.finished.push((beam.score / length.powf(beams.length_penalty), beam, stop));
                }
                Some(_) => {}
                None if running.len() < beams.width => {
                    running.push(beam);
                    sources.push(first + source);
                }
                None => {}
            }
        }
        self.finished.sort_by(|(a, ..), (b, ..)| b.total_cmp(a));
        self.finished.truncate(beams.width);
        if running.first().is_none_or(|best| self.is_over(best, beams, settings.max_new)) {
            running.clear();
            sources.clear();
        }
        self.running = running;
        Ok(sources)
    }

    /// The best tokens that may follow the sequences, the best first: enough that `width` remain if all others end.
    fn candidates(
        &self,
        scores: &Scores,
        first: usize,
        rules: &Rules,
    ) -> Result<Vec<Candidate>, GenerateError> {
        let Rules { settings, beams, processors, .. } = *rules;
        let at = At { prompt: self.prompt, written: self.running[0].written() };
        let mut candidates = Vec::new();
        for (index, beam) in self.running.iter().enumerate() {
            let raw = scores.row(first + index, at)?;
            let total = log_total(raw);
            let mut processed: Vec<f32> =
                raw.iter().map(|&score| (f64::from(score) - total) as f32).collect();
            let text = Text { tokens: &beam.tokens, prompt: beam.prompt };
            processors.iter().for_each(|processor| processor.apply(&text, &mut processed));
            let allowed = processed.iter().enumerate().filter(|(_, score)| score.is_finite());
            candidates.extend(allowed.map(|(token, &score)| Candidate {
                beam: index,
                token: token as u32,
                score: beam.score + f64::from(score),
                log_likelihood: beam.log_likelihood + f64::from(raw[token]) - total,
            }));
        }
        if candidates.is_empty() && self.finished.is_empty() {
            return Err(at.no_token());
        }
        let enough = beams.width * (1 + settings.stop_tokens.len()).max(2);
        let order = |a: &Candidate, b: &Candidate| {
            b.score.total_cmp(&a.score).then(a.beam.cmp(&b.beam)).then(a.token.cmp(&b.token))
        };
        if enough < candidates.len() {
            candidates.select_nth_unstable_by(enough, order);
            candidates.truncate(enough);
        }
        candidates.sort_by(order);
        Ok(candidates)
    }

    /// Whether there are enough finished sequences that no unfinished one is expected to beat.
    fn is_over(&self, best: &Beam, beams: &Beams, max_new: usize) -> bool {
        let Some((worst, ..)) = self.finished.get(beams.width - 1) else { return false };
        let length = match beams.patience {
            Patience::First => return true,
            Patience::Certain if beams.length_penalty > 0.0 => max_new,
            Patience::Estimate | Patience::Certain => best.written(),
        };
        best.score / (length as f64).powf(beams.length_penalty) <= *worst
    }
}

impl Rules<'_, '_> {
    /// Why a sequence ends with its last token, if it does.
    fn stop(&self, beam: &Beam) -> Option<Stop> {
        let Settings { stop_tokens, stop_texts, max_new, .. } = self.settings;
        let new = &beam.tokens[beam.prompt..];
        if let Some(&token) = new.last().filter(|token| stop_tokens.contains(token)) {
            return Some(Stop::Token(token));
        }
        if !stop_texts.is_empty()
            && let (_, Some(stop)) = spelled(new, (self.spell)(), stop_texts)
        {
            return Some(Stop::Text(stop));
        }
        (new.len() == *max_new).then_some(Stop::Length)
    }

    fn written(&self, mut beam: Beam, stop: Stop) -> Written {
        let mut tokens = beam.tokens.split_off(beam.prompt);
        if matches!(stop, Stop::Token(_)) {
            tokens.pop();
        }
        let (text, _) = spelled(&tokens, (self.spell)(), &self.settings.stop_texts);
        Written { tokens, text, stop, log_likelihood: beam.log_likelihood }
    }
}
