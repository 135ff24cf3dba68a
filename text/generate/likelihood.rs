use std::ops::Range;

use super::scores::{At, Scores, log_total};
use super::{GenerateError, Session};

/// Log-probabilities of given tokens after the prompts of `session`, one row each: what the model would have thought of
/// writing them.
///
/// # Errors
/// If there is not one continuation per prompt, or scores are not finite.
///
/// # Panics
/// If a token is outside the vocabulary, or the session has not the room.
pub fn log_likelihoods(
    session: &mut dyn Session,
    continuations: &[Vec<u32>],
) -> Result<Vec<Vec<f64>>, GenerateError> {
    /// How many tokens are read at once: their scores of a large vocabulary take as many hundred kilobytes each.
    const CHUNK: usize = 64;
    let rows = continuations.len();
    let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
    let mut found = vec![Vec::new(); rows];
    if longest == 0 {
        return Ok(found);
    }
    let mut look = |scores: Scores, column: usize| -> Result<(), GenerateError> {
        for (row, continuation) in continuations.iter().enumerate() {
            if let Some(&token) = continuation.get(column) {
                let at = At { prompt: row, written: column };
                let scores = scores.row(row, at)?;
                let score = scores[token as usize];
                found[row].push(f64::from(score) - log_total(scores));
            }
        }
        Ok(())
    };
    look(Scores::read(session.start(), rows)?, 0)?;
    for first in (0..longest - 1).step_by(CHUNK) {
        let columns = first..(first + CHUNK).min(longest - 1);
        // shorter rows are read on with any token
        let tokens = |row: &Vec<u32>| columns.clone().map(|at| row.get(at).copied().unwrap_or(0)).collect();
        let tokens: Vec<Vec<u32>> = continuations.iter().map(tokens).collect();
        let scores = session.read_all(&tokens); // [rows, new, vocab_size]
        for (index, column) in columns.enumerate() {
            look(Scores::read(scores.clone().narrow(1, index, 1).squeeze_dim(1), rows)?, column + 1)?;
        }
    }
    Ok(found)
}

/// A part of a long text: some tokens are scored after those before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// What is read first.
    pub before: Range<usize>,
    /// What is scored; it follows at once.
    pub scored: Range<usize>,
}

/// Windows of at most `context` tokens, each `stride` further than the last, that together score every token of a text of
/// `length` but its first, once. With a stride below the context every token but those of the first window has at least
/// `context - stride` before it.
///
/// # Panics
/// If the stride is 0, or not below a context of at least 2.
pub fn windows(length: usize, context: usize, stride: usize) -> Vec<Window> {
    assert!(0 < stride && stride < context, "a stride of {stride} in a context of {context}");
    let mut windows = Vec::new();
    let mut scored = 1;
    for first in (0..length).step_by(stride) {
        let end = (first + context).min(length);
        if scored < end {
            windows.push(Window { before: first..scored, scored: scored..end });
        }
        scored = end;
        if end == length {
            break;
        }
    }
    windows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_score_every_token_once() {
        let shown = |length, context, stride| -> Vec<_> {
            let windows = windows(length, context, stride);
            windows.into_iter().map(|window| (window.before, window.scored)).collect()
        };
        assert_eq!(shown(10, 4, 2), [(0..1, 1..4), (2..4, 4..6), (4..6, 6..8), (6..8, 8..10)]);
        assert_eq!(shown(10, 4, 3), [(0..1, 1..4), (3..4, 4..7), (6..7, 7..10)]);
        assert_eq!(shown(11, 4, 3), [(0..1, 1..4), (3..4, 4..7), (6..7, 7..10), (9..10, 10..11)]);
        assert_eq!(shown(3, 4, 1), [(0..1, 1..3)]);
        assert_eq!(shown(1, 4, 2), []);
        assert_eq!(shown(0, 4, 2), []);
    }
}
