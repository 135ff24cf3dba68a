//! What causal decoders have in common behind the forward contract: the loss, and what is decoded greedily.

use burn::tensor::activation::log_softmax;
use burn::tensor::{Bool, DType, Int, Tensor, TensorData};
use volary_text::generate::{Session, greedy};

use crate::tensors::{Inputs, Outputs};

/// What makes scores of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A projection of its own.
    Own,
    /// The token table.
    Tied,
    /// Nothing: the states are the output.
    Absent,
}

/// The mean cross-entropy of every real token but the first of each row given those before it, in nats, `[1]`;
/// `None` where there is none.
///
/// - `logits`: `[batch, seq, vocab_size]`
/// - `ids` and which of them are `real`: `[batch, seq]`; all when `None`.
pub fn next_token_loss(
    logits: Tensor<3>,
    ids: Tensor<2, Int>,
    real: Option<Tensor<2, Bool>>,
) -> Option<Tensor<1>> {
    let [_, seq] = ids.dims();
    if seq < 2 {
        return None;
    }
    let after_first = |real: Tensor<2, Bool>| real.narrow(1, 1, seq - 1);
    token_loss(logits.narrow(1, 0, seq - 1), ids.narrow(1, 1, seq - 1), real.map(after_first))
}

/// The mean cross-entropy of the tokens that are counted, in nats, `[1]`; `None` where there is none.
///
/// - `logits`: of each token, `[batch, seq, vocab_size]`
/// - `ids` and which of them are `counted`: `[batch, seq]`; all when `None`.
pub fn token_loss(
    logits: Tensor<3>,
    ids: Tensor<2, Int>,
    counted: Option<Tensor<2, Bool>>,
) -> Option<Tensor<1>> {
    let chances = log_softmax(logits.cast(DType::F32), 2); // [batch, seq, vocab_size]
    let chances = chances.gather(2, ids.unsqueeze_dim(2)).squeeze_dim::<2>(2);
    match counted {
        None => Some(-chances.mean()),
        Some(counted) => {
            let count = counted.clone().int().sum().into_scalar::<i64>();
            let sum = chances.mask_fill(counted.bool_not(), 0.0).sum();
            (count > 0).then(|| -sum / count as f64)
        }
    }
}

/// How many tokens the forward contract continues the first row of `input_ids` by.
pub const CONTINUATION: usize = 8;
/// How many it continues `greedy.prompt_ids` by.
pub const GREEDY: usize = 12;

/// `greedy.prompt_ids`, one row, if it is asked for.
pub fn prompt(inputs: &mut Inputs, vocab_size: usize) -> Option<Vec<u32>> {
    let prompt = inputs.ids::<2>("greedy.prompt_ids", vocab_size)?;
    match prompt.dims() {
        [1, _] => Some(tokens(prompt)),
        [rows, _] => {
            inputs.problem(format!("`greedy.prompt_ids` has {rows} rows, expected 1"));
            None
        }
    }
}

/// Decoded greedily, without a stop: the twelve `greedy.tokens` after `prompt`, or else the eight `greedy_ids` after the
/// real tokens of the first row of `ids`, if there are any. A prompt and how many tokens are to follow make a session.
pub fn continuation<S: Session>(
    prompt: Option<Vec<u32>>,
    ids: Tensor<2, Int>,
    real: Option<Tensor<2, Bool>>,
    session: impl FnOnce(&[u32], usize) -> S,
) -> Outputs {
    match (prompt, first_row(ids, real)) {
        (Some(prompt), _) => vec![greedy_tokens(session(&prompt, GREEDY))],
        (None, row) if !row.is_empty() => {
            let tokens = decode(session(&row, CONTINUATION), CONTINUATION);
            vec![("greedy_ids".into(), TensorData::new(tokens, [1, CONTINUATION]))]
        }
        (None, _) => Outputs::new(),
    }
}

/// The twelve `greedy.tokens` that a session of one row writes, without a stop. It has room for [`GREEDY`].
pub fn greedy_tokens(session: impl Session) -> (String, TensorData) {
    ("greedy.tokens".into(), TensorData::new(decode(session, GREEDY), [GREEDY]))
}

fn decode(mut session: impl Session, count: usize) -> Vec<i64> {
    greedy(&mut session, count).swap_remove(0).into_iter().map(i64::from).collect()
}

/// The real tokens of the first of the rows `[batch, seq]`.
fn first_row(ids: Tensor<2, Int>, real: Option<Tensor<2, Bool>>) -> Vec<u32> {
    let row = tokens(ids.narrow(0, 0, 1));
    let Some(real) = real else { return row };
    let real = real.narrow(0, 0, 1).into_data();
    row.into_iter().zip(real.iter::<bool>()).filter(|(_, real)| *real).map(|(token, _)| token).collect()
}

/// All tokens, row by row.
fn tokens(ids: Tensor<2, Int>) -> Vec<u32> {
    ids.into_data().convert::<i64>().iter::<i64>().map(|id| id as u32).collect()
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    /// Scores 0 and ln 3 of two tokens are chances 1/4 and 3/4.
    #[test]
    fn the_loss_of_literal_scores() {
        let scores =
            || Tensor::<3>::from_data([[[0.0, 3f64.ln()], [0.0, 3f64.ln()], [9.0, 0.0]]], &Device::flex());
        let ids = || Tensor::from_data([[0, 1, 0]], &Device::flex());
        let loss = |real: Option<[[bool; 3]; 1]>| {
            let real = real.map(|real| Tensor::from_data(real, &Device::flex()));
            next_token_loss(scores(), ids(), real).map(|loss| loss.into_scalar::<f64>())
        };
        let (one, both) = ((4f64 / 3.0).ln(), ((4f64 / 3.0).ln() + 4f64.ln()) / 2.0);
        assert!((loss(None).unwrap() - both).abs() < 1e-6);
        assert!((loss(Some([[true, true, false]])).unwrap() - one).abs() < 1e-6);
        assert!(loss(Some([[true, false, false]])).is_none());
    }
}
