use super::scores::log_total;

/// What was written so far.
#[derive(Clone, Copy, Debug)]
pub struct Text<'a> {
    /// The prompt and what follows it.
    pub tokens: &'a [u32],
    /// How many of them are the prompt.
    pub prompt: usize,
}

/// Changes the scores of the next token; what is ruled out gets minus infinity.
///
/// Each is a value, and they are applied one after the other. The numbers match the logits processors of
/// `transformers`; presence and frequency penalties, which it lacks, those of OpenAI's interface.
#[derive(Clone, Debug, PartialEq)]
pub enum Processor {
    /// Scores of tokens that occur in the text, the prompt included, are divided by it where positive and multiplied
    /// where negative (Keskar et al. 2019, section 4.1).
    Repetition(f64),
    /// Taken from the score of each token that was written after the prompt.
    Presence(f64),
    /// Taken from the score of each token as often as it was written after the prompt.
    Frequency(f64),
    /// No sequence of so many tokens occurs twice, the prompt included (Paulus et al. 2017, section 2.5).
    NoRepeat(usize),
    /// Sequences that are not completed.
    Banned(Vec<Vec<u32>>),
    /// Rules out the `ends` until so many tokens are written.
    MinNew {
        /// How many.
        tokens: usize,
        /// What would end the text.
        ends: Vec<u32>,
    },
    /// The first token after the prompt.
    First(u32),
    /// Scores are divided by it.
    Temperature(f64),
    /// Only so many of the highest scores stay, and those equal to the last of them.
    TopK(usize),
    /// Only the likeliest tokens stay whose probabilities reach this sum, at least one (Holtzman et al. 2019, section
    /// 3.1).
    TopP(f64),
    /// Only tokens stay that have this share of the likeliest one's probability (Nguyen et al. 2024, section 3).
    MinP(f64),
}

const OUT: f32 = f32::NEG_INFINITY;

impl Processor {
    /// Changes `scores`, one for each token of the vocabulary. Tokens of the text that are outside it are passed over.
    pub fn apply(&self, text: &Text, scores: &mut [f32]) {
        let written = &text.tokens[text.prompt..];
        match self {
            Self::Repetition(penalty) => {
                let penalty = *penalty as f32;
                for token in distinct(text.tokens) {
                    change(
                        scores,
                        token,
                        |score| if score < 0.0 { score * penalty } else { score / penalty },
                    );
                }
            }
            Self::Presence(penalty) => {
                for token in distinct(written) {
                    change(scores, token, |score| score - *penalty as f32);
                }
            }
            Self::Frequency(penalty) => {
                for &token in written {
                    change(scores, token, |score| score - *penalty as f32);
                }
            }
            Self::NoRepeat(length) => {
                let Some(begun) = length.checked_sub(1).filter(|&begun| begun <= text.tokens.len()) else {
                    return;
                };
                let begin = &text.tokens[text.tokens.len() - begun..];
                for ngram in text.tokens.windows(*length).filter(|ngram| ngram[..begun] == *begin) {
                    change(scores, ngram[begun], |_| OUT);
                }
            }
            Self::Banned(sequences) => {
                for (last, before) in sequences.iter().filter_map(|sequence| sequence.split_last()) {
                    if text.tokens.ends_with(before) {
                        change(scores, *last, |_| OUT);
                    }
                }
            }
            Self::MinNew { tokens, ends } => {
                for &end in ends.iter().filter(|_| written.len() < *tokens) {
                    change(scores, end, |_| OUT);
                }
            }
            Self::First(first) => {
                if written.is_empty() {
                    scores.fill(OUT);
                    change(scores, *first, |_| 0.0);
                }
            }
            Self::Temperature(temperature) => {
                scores.iter_mut().for_each(|score| *score /= *temperature as f32);
            }
            Self::TopK(count) => {
                if (1..scores.len()).contains(count) {
                    let mut sorted = scores.to_vec();
                    let (_, &mut least, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
                    keep(scores, |score| score >= least);
                }
            }
            Self::TopP(sum) => {
                let total = log_total(scores);
                let mut order: Vec<usize> = (0..scores.len()).filter(|&token| scores[token] > OUT).collect();
                order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b])); // unlikely ones first
                order.pop();
                let mut below = 0.0;
                for token in order {
                    below += (f64::from(scores[token]) - total).exp();
                    if below > 1.0 - sum {
                        break;
                    }
                    scores[token] = OUT;
                }
            }
            Self::MinP(share) => {
                let best = scores.iter().copied().fold(OUT, f32::max);
                let least = f64::from(best) + share.ln();
                keep(scores, |score| f64::from(score) >= least);
            }
        }
    }
}

fn change(scores: &mut [f32], token: u32, to: impl Fn(f32) -> f32) {
    if let Some(score) = scores.get_mut(token as usize) {
        *score = to(*score);
    }
}

fn keep(scores: &mut [f32], stays: impl Fn(f32) -> bool) {
    for score in scores.iter_mut().filter(|score| !stays(**score)) {
        *score = OUT;
    }
}

fn distinct(tokens: &[u32]) -> Vec<u32> {
    let mut distinct = tokens.to_vec();
    distinct.sort_unstable();
    distinct.dedup();
    distinct
}

#[cfg(test)]
mod tests {
    use super::Processor::*;
    use super::*;

    const SCORES: [f32; 8] = [2.0, -1.0, 0.5, 3.0, 0.0, -2.5, 1.0, 0.25];

    fn after(processors: &[Processor], prompt: usize) -> Vec<f32> {
        let mut scores = SCORES.to_vec();
        let text = Text { tokens: &[3, 1, 4, 1, 5, 3, 1], prompt };
        processors.iter().for_each(|processor| processor.apply(&text, &mut scores));
        scores
    }

    /// Literals of `transformers`' logits processors.
    #[test]
    fn scores_are_those_of_transformers() {
        const O: f32 = OUT;
        let ends = |tokens, ends: &[u32]| MinNew { tokens, ends: ends.to_vec() };
        let cases: [(&[Processor], [f32; 8]); 17] = [
            (&[Repetition(1.3)], [2.0, -1.3, 0.5, 2.307_692, 0.0, -3.25, 1.0, 0.25]),
            (&[NoRepeat(1)], [2.0, O, 0.5, O, O, O, 1.0, 0.25]),
            (&[NoRepeat(2)], [2.0, -1.0, 0.5, 3.0, O, O, 1.0, 0.25]),
            (&[NoRepeat(3)], [2.0, -1.0, 0.5, 3.0, O, -2.5, 1.0, 0.25]),
            (&[Banned(vec![vec![3], vec![0]])], [O, -1.0, 0.5, O, 0.0, -2.5, 1.0, 0.25]),
            (&[ends(4, &[2, 6])], [2.0, -1.0, O, 3.0, 0.0, -2.5, O, 0.25]),
            (&[ends(3, &[2, 6])], SCORES),
            (
                &[Temperature(0.7)],
                [
                    2.857_143,
                    -1.428_571_5,
                    0.714_285_7,
                    4.285_714,
                    0.0,
                    -3.571_428_5,
                    1.428_571_5,
                    0.357_142_87,
                ],
            ),
            (&[TopK(3)], [2.0, O, O, 3.0, O, O, 1.0, O]),
            (&[TopP(0.8)], [2.0, O, O, 3.0, O, O, 1.0, O]),
            (&[TopP(0.95)], [2.0, O, 0.5, 3.0, O, O, 1.0, 0.25]),
            (&[TopP(0.01)], [O, O, O, 3.0, O, O, O, O]),
            (&[MinP(0.1)], [2.0, O, O, 3.0, O, O, 1.0, O]),
            (&[MinP(0.3)], [2.0, O, O, 3.0, O, O, O, O]),
            (
                &[
                    Repetition(1.3),
                    NoRepeat(2),
                    ends(4, &[0]),
                    Temperature(0.7),
                    TopK(5),
                    TopP(0.9),
                    MinP(0.15),
                ],
                [O, O, O, 3.296_703_3, O, O, 1.428_571_5, O],
            ),
            (
                &[Repetition(1.3), Temperature(1.5), TopK(6), TopP(0.9), MinP(0.15)],
                [1.333_333_4, O, 0.333_333_34, 1.538_461_6, O, O, 0.666_666_7, 0.166_666_67],
            ),
            (&[TopK(8), TopK(100), TopP(1.0), MinP(0.0)], SCORES),
        ];
        for (processors, expected) in cases {
            let found = after(processors, 4);
            let close = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 1e-6;
            assert!(found.iter().zip(&expected).all(close), "{processors:?}: {found:?}");
        }
    }

    #[test]
    fn penalties_count_what_was_written_after_the_prompt() {
        // after [3, 1]: 4, 1, 5, 3, 1
        assert_eq!(after(&[Presence(0.5)], 2), [2.0, -1.5, 0.5, 2.5, -0.5, -3.0, 1.0, 0.25]);
        assert_eq!(after(&[Frequency(0.5)], 2), [2.0, -2.0, 0.5, 2.5, -0.5, -3.0, 1.0, 0.25]);
        assert_eq!(after(&[Presence(0.5), Frequency(0.5)], 7), SCORES);
    }

    #[test]
    fn a_banned_sequence_may_begin_and_the_first_token_may_be_forced() {
        let banned = Banned(vec![vec![3, 1, 7], vec![4, 1, 0], vec![9, 9, 9, 9, 9, 9, 9, 9, 2]]);
        assert_eq!(after(&[banned], 2), [2.0, -1.0, 0.5, 3.0, 0.0, -2.5, 1.0, OUT]);
        assert_eq!(after(&[First(2)], 7), [OUT, OUT, 0.0, OUT, OUT, OUT, OUT, OUT]);
        assert_eq!(after(&[First(2)], 6), SCORES);
    }

    #[test]
    fn of_equal_scores_all_stay_among_the_highest() {
        let mut scores = [1.0, 2.0, 2.0, 0.0];
        TopK(1).apply(&Text { tokens: &[], prompt: 0 }, &mut scores);
        assert_eq!(scores, [OUT, 2.0, 2.0, OUT]);
    }

    /// Texts and vocabularies that leave nothing to do.
    #[test]
    fn nothing_is_assumed_of_the_text_or_the_vocabulary() {
        let all = [
            Repetition(1.3),
            Presence(1.0),
            Frequency(1.0),
            NoRepeat(2),
            NoRepeat(9),
            Banned(vec![vec![80], vec![]]),
            MinNew { tokens: 9, ends: vec![70] },
            First(60),
            Temperature(0.5),
            TopK(3),
            TopP(0.5),
            MinP(0.5),
        ];
        for (tokens, vocabulary) in [(&[][..], 0), (&[90, 91, 90], 0), (&[90, 91, 90], 1), (&[], 1)] {
            let mut scores = vec![0.0; vocabulary];
            all.iter().for_each(|processor| processor.apply(&Text { tokens, prompt: 0 }, &mut scores));
            assert!(scores.iter().all(|score| !score.is_nan()), "{scores:?}");
        }
    }
}
