use super::{GenerateError, Processor};

/// How texts are written.
///
/// ```
/// use volary_text::generate::{Method, Sampling, Settings};
///
/// let settings = Settings {
///     max_new: 100,
///     stop_tokens: vec![2],
///     method: Method::Sample(Sampling { temperature: 0.7, top_p: 0.9, ..Sampling::default() }),
///     ..Settings::default()
/// };
/// settings.check()?;
/// # Ok::<(), volary_text::generate::GenerateError>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// The most tokens after a prompt, a stop token included.
    pub max_new: usize,
    /// Stop tokens are ruled out before so many others.
    pub min_new: usize,
    /// Tokens that end a text.
    pub stop_tokens: Vec<u32>,
    /// Texts that end a text; what was written from there on is cut off.
    pub stop_texts: Vec<String>,
    /// See [`Processor::Repetition`]; 1 changes nothing.
    pub repetition_penalty: f64,
    /// See [`Processor::Presence`]; 0 changes nothing.
    pub presence_penalty: f64,
    /// See [`Processor::Frequency`]; 0 changes nothing.
    pub frequency_penalty: f64,
    /// See [`Processor::NoRepeat`]; 0 changes nothing.
    pub no_repeat_ngram: usize,
    /// Sequences of tokens that are never written.
    pub banned: Vec<Vec<u32>>,
    /// The first new token, if it is not free.
    pub forced_first: Option<u32>,
    /// How tokens are chosen by their scores.
    pub method: Method,
    /// How many texts per prompt.
    pub count: usize,
}

/// How tokens are chosen by their scores.
#[derive(Clone, Debug, PartialEq)]
pub enum Method {
    /// The likeliest, one after the other; of equals the one with the smallest id.
    Greedy,
    /// Drawn by their probabilities.
    Sample(Sampling),
    /// The likeliest sequence as far as a few candidates at a time show it.
    Beams(Beams),
}

/// How tokens are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Scores are divided by it; 0 is [`Method::Greedy`].
    pub temperature: f64,
    /// See [`Processor::TopK`]; 0 changes nothing.
    pub top_k: usize,
    /// See [`Processor::TopP`]; 1 changes nothing.
    pub top_p: f64,
    /// See [`Processor::MinP`]; 0 changes nothing.
    pub min_p: f64,
    /// Where the draws begin. The n-th text of a prompt has a stream of draws of its own, the same whatever other
    /// prompts there are.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0 }
    }
}

/// Beam search, as `transformers` has it.
///
/// The log-probabilities of a sequence's tokens, stop token included, after the [`Processor`]s, add up to its score;
/// those that ended are compared by `score / length ^ length_penalty`, the length counted in new tokens, the stop token
/// among them.
#[derive(Clone, Debug, PartialEq)]
pub struct Beams {
    /// How many unfinished sequences are followed, and how many finished ones kept.
    pub width: usize,
    /// Above 0 long sequences gain; 0 compares plain sums.
    pub length_penalty: f64,
    /// When the search ends.
    pub patience: Patience,
}

impl Default for Beams {
    fn default() -> Self {
        Self { width: 4, length_penalty: 1.0, patience: Patience::Estimate }
    }
}

/// When a beam search ends, before the longest length. The names in brackets are those of `transformers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As soon as `width` sequences ended (`early_stopping=True`).
    First,
    /// When besides the best unfinished one would lose to all of them if it ended now (`early_stopping=False`).
    Estimate,
    /// When besides no unfinished one could win any more, however long (`early_stopping="never"`).
    Certain,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_new: 128,
            min_new: 0,
            stop_tokens: Vec::new(),
            stop_texts: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            no_repeat_ngram: 0,
            banned: Vec::new(),
            forced_first: None,
            method: Method::Greedy,
            count: 1,
        }
    }
}

impl Settings {
    /// That every setting means something.
    ///
    /// # Errors
    /// [`GenerateError::Settings`] with all that do not.
    pub fn check(&self) -> Result<(), GenerateError> {
        let mut problems = Vec::new();
        let mut need = |holds: bool, name: &str, expected: &str, found: String| {
            if !holds {
                problems.push(format!("{name} is {found}, expected {expected}"));
            }
        };
        let Self { max_new, min_new, repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        let above = |x: f64| x.is_finite() && x > 0.0;
        let positive = "a number above 0";
        need(max_new > 0, "max_new", "at least 1", "0".into());
        need(min_new <= max_new, "min_new", &format!("at most max_new, {max_new}"), min_new.to_string());
        need(above(repetition_penalty), "repetition_penalty", positive, repetition_penalty.to_string());
        for (name, penalty) in
            [("presence_penalty", presence_penalty), ("frequency_penalty", frequency_penalty)]
        {
            need(penalty.is_finite(), name, "a number", penalty.to_string());
        }
        need(!self.stop_texts.iter().any(String::is_empty), "a stop text", "some text", "empty".into());
        need(!self.banned.iter().any(Vec::is_empty), "a banned sequence", "some token", "empty".into());
        need(self.count > 0, "count", "at least 1", "0".into());
        match &self.method {
            Method::Greedy => {
                need(self.count <= 1, "count", "1 without sampling or beams", self.count.to_string());
            }
            Method::Sample(Sampling { temperature, top_p, min_p, .. }) => {
                let (t, p, m) = (*temperature, *top_p, *min_p);
                need(t.is_finite() && t >= 0.0, "temperature", "0 or more", t.to_string());
                need(p > 0.0 && p <= 1.0, "top_p", "above 0 and at most 1", p.to_string());
                need((0.0..=1.0).contains(&m), "min_p", "0 to 1", m.to_string());
                need(t != 0.0 || self.count <= 1, "count", "1 at temperature 0", self.count.to_string());
            }
            Method::Beams(Beams { width, length_penalty, .. }) => {
                need(*width > 0, "beams", "at least 1", "0".into());
                let penalty = *length_penalty;
                need(penalty.is_finite(), "length_penalty", "a number", penalty.to_string());
                let most = format!("at most as many as beams, {width}");
                need(self.count <= *width, "count", &most, self.count.to_string());
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(GenerateError::Settings { problems }) }
    }

    /// That tokens named here are among `vocab_size`. Stop tokens need not be.
    pub(super) fn check_tokens(&self, vocab_size: usize) -> Result<(), GenerateError> {
        let named = self.banned.iter().flatten().map(|&id| ("a banned token", id));
        let named = named.chain(self.forced_first.map(|id| ("the forced first token", id)));
        let problems: Vec<String> = named
            .filter(|&(_, id)| id as usize >= vocab_size)
            .map(|(what, id)| format!("{what} is {id}, expected 0 to {}", vocab_size - 1))
            .collect();
        if problems.is_empty() { Ok(()) } else { Err(GenerateError::Settings { problems }) }
    }

    /// Whether a prompt has one text, which grows at its end only.
    pub fn grows(&self) -> bool {
        self.count == 1 && !matches!(self.method, Method::Beams(_))
    }

    /// What changes the scores, in this order: that of `transformers`, which draws from them after the last.
    pub fn processors(&self) -> Vec<Processor> {
        let mut processors = Vec::new();
        let mut add = |changes: bool, processor: Processor| {
            if changes {
                processors.push(processor);
            }
        };
        add(self.repetition_penalty != 1.0, Processor::Repetition(self.repetition_penalty));
        add(self.presence_penalty != 0.0, Processor::Presence(self.presence_penalty));
        add(self.frequency_penalty != 0.0, Processor::Frequency(self.frequency_penalty));
        add(self.no_repeat_ngram > 0, Processor::NoRepeat(self.no_repeat_ngram));
        add(!self.banned.is_empty(), Processor::Banned(self.banned.clone()));
        add(self.min_new > 0, Processor::MinNew { tokens: self.min_new, ends: self.stop_tokens.clone() });
        if let Some(first) = self.forced_first {
            add(true, Processor::First(first));
        }
        if let Method::Sample(Sampling { temperature, top_k, top_p, min_p, .. }) = self.method
            && temperature > 0.0
        {
            add(temperature != 1.0, Processor::Temperature(temperature));
            add(top_k > 0, Processor::TopK(top_k));
            add(top_p < 1.0, Processor::TopP(top_p));
            add(min_p > 0.0, Processor::MinP(min_p));
        }
        processors
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_mean_nothing_are_told_all_at_once() {
        let sampling = Sampling { temperature: -1.0, top_p: 0.0, min_p: f64::NAN, ..Sampling::default() };
        let settings = Settings {
            max_new: 3,
            min_new: 4,
            stop_texts: vec![String::new()],
            repetition_penalty: 0.0,
            presence_penalty: f64::INFINITY,
            banned: vec![vec![]],
            method: Method::Sample(sampling),
            count: 0,
            ..Settings::default()
        };
        assert_eq!(
            settings.check().unwrap_err().to_string(),
            "min_new is 4, expected at most max_new, 3; repetition_penalty is 0, expected a number above 0; \
             presence_penalty is inf, expected a number; a stop text is empty, expected some text; \
             a banned sequence is empty, expected some token; count is 0, expected at least 1; \
             temperature is -1, expected 0 or more; top_p is 0, expected above 0 and at most 1; \
             min_p is NaN, expected 0 to 1"
        );
        let beams = Method::Beams(Beams { width: 2, length_penalty: f64::NAN, patience: Patience::Certain });
        let cold = Method::Sample(Sampling { temperature: 0.0, ..Sampling::default() });
        for (method, problem) in [
            (Method::Greedy, "count is 3, expected 1 without sampling or beams"),
            (cold, "count is 3, expected 1 at temperature 0"),
            (
                beams,
                "length_penalty is NaN, expected a number; count is 3, expected at most as many as beams, 2",
            ),
        ] {
            let settings = Settings { count: 3, method, ..Settings::default() };
            assert_eq!(settings.check().unwrap_err().to_string(), problem);
        }
        assert_eq!(Settings::default().check(), Ok(()));
    }

    #[test]
    fn only_what_changes_something_is_done_and_in_order() {
        assert_eq!(Settings::default().processors(), []);
        let all = Settings {
            min_new: 1,
            stop_tokens: vec![2],
            repetition_penalty: 1.1,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            no_repeat_ngram: 3,
            banned: vec![vec![7]],
            forced_first: Some(4),
            method: Method::Sample(Sampling { temperature: 0.5, top_k: 5, top_p: 0.9, min_p: 0.1, seed: 1 }),
            ..Settings::default()
        };
        let expected = [
            Processor::Repetition(1.1),
            Processor::Presence(0.5),
            Processor::Frequency(0.25),
            Processor::NoRepeat(3),
            Processor::Banned(vec![vec![7]]),
            Processor::MinNew { tokens: 1, ends: vec![2] },
            Processor::First(4),
            Processor::Temperature(0.5),
            Processor::TopK(5),
            Processor::TopP(0.9),
            Processor::MinP(0.1),
        ];
        assert_eq!(all.processors(), expected);
    }
}
