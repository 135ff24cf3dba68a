use burn::tensor::{Int, Tensor};

use super::{LeftPadded, Session, column, matrix};

/// Prompts padded on the left, and after them columns of new tokens: the [`Session`] of a model that reads prompts and what
/// follows them alike.
pub trait Appending {
    /// What the rows were prompted with.
    fn prompts(&self) -> &LeftPadded;

    /// The states of further tokens `[rows, new]`, which the caches grow by: `[rows, new, d_model]`.
    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3>;

    /// Scores of the next token: `[rows, new, d_model] -> [rows, new, vocab_size]`.
    fn logits(&self, states: Tensor<3>) -> Tensor<3>;

    /// [`Session::select`]
    fn keep(&mut self, rows: &[usize]);

    /// Scores of what follows the last of further tokens: `[rows, new] -> [rows, vocab_size]`.
    fn next(&mut self, ids: Tensor<2, Int>) -> Tensor<2> {
        let [_, new] = ids.dims();
        let states = self.append(ids);
        self.logits(states.narrow(1, new - 1, 1)).squeeze_dim(1)
    }
}

impl<S: Appending> Session for S {
    fn start(&mut self) -> Tensor<2> {
        self.next(self.prompts().ids())
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        self.next(column(tokens, &self.prompts().device()))
    }

    fn read_all(&mut self, tokens: &[Vec<u32>]) -> Tensor<3> {
        let states = self.append(matrix(tokens, &self.prompts().device()));
        self.logits(states)
    }

    fn select(&mut self, rows: &[usize]) {
        self.keep(rows);
    }
}
