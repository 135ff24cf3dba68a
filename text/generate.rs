//! Writing text token by token: what a model offers for it, and what is the same for all of them.
//!
//! A model offers a [`Session`]; [`write`] writes texts with it as the [`Settings`] say: greedily, drawn, or by beam
//! search, changed by [`Processor`]s, until a stop token, a stop text or a length. [`rank`] chooses among several, and
//! [`log_likelihoods`] scores given ones.

use burn::tensor::Tensor;

mod appending;
mod beams;
mod error;
mod likelihood;
mod padded;
mod processor;
mod rank;
mod scores;
mod settings;
mod spelling;
#[cfg(test)]
mod tests;
mod write;

pub use appending::Appending;
pub use error::GenerateError;
pub use likelihood::{Window, log_likelihoods, windows};
pub use padded::{LeftPadded, RightPadded, column, indices, matrix};
pub use processor::{Processor, Text};
pub use rank::{Rank, rank};
pub use settings::{Beams, Method, Patience, Sampling, Settings};
pub use spelling::{Silent, Spelling};
pub use write::{Piece, Stop, Written, write};

/// Rows of text that a model is continuing: what they were prompted with, and the caches of what was read since.
///
/// Whatever is special to a model is inside: where its tokens stand, what they see, the states of an encoder.
pub trait Session {
    /// Reads the prompts: the scores of the first new token of every row, `[rows, vocab_size]`. Called once, first.
    fn start(&mut self) -> Tensor<2>;

    /// Reads one more token per row: the scores of the next, `[rows, vocab_size]`.
    ///
    /// # Panics
    /// If there is not one token per row, one is outside the vocabulary, or the caches are full.
    fn read(&mut self, tokens: &[u32]) -> Tensor<2>;

    /// Row `i` goes on from what row `rows[i]` was; a row may be taken several times, or not at all.
    ///
    /// # Panics
    /// If there is no such row.
    fn select(&mut self, rows: &[usize]);

    /// Reads several more tokens per row, as many of each: the scores after every one, `[rows, new, vocab_size]`.
    /// [`Session::read`] one by one, unless a model can read them at once.
    ///
    /// # Panics
    /// As [`Session::read`], and if there is no token.
    fn read_all(&mut self, tokens: &[Vec<u32>]) -> Tensor<3> {
        let new = tokens.first().map_or(0, Vec::len);
        let column = |at: usize| tokens.iter().map(|row| row[at]).collect::<Vec<_>>();
        Tensor::stack((0..new).map(|at| self.read(&column(at))).collect(), 1)
    }
}

/// The `count` likeliest tokens, one after the other, of every row.
pub fn greedy(session: &mut dyn Session, count: usize) -> Vec<Vec<u32>> {
    let mut written: Vec<Vec<u32>> = Vec::new();
    for step in 0..count {
        let scores = match step {
            0 => session.start(),
            _ => session.read(&written.iter().map(|row| row[step - 1]).collect::<Vec<_>>()),
        };
        written.resize(scores.dims()[0], Vec::with_capacity(count));
        let best = scores.argmax(1).into_data().convert::<i64>();
        for (row, token) in written.iter_mut().zip(best.iter::<i64>()) {
            row.push(token as u32);
        }
    }
    written
}
