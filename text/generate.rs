//! Writing text token by token: what a model offers for it, and what is the same for all of them.

use burn::tensor::Tensor;

mod padded;

pub use padded::{LeftPadded, column, indices};

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
