//! Texts of several documents in one row, as language models are trained on them.

use burn::tensor::{Bool, Int, Tensor, TensorData};
use volary_kernels::ops::{Mask, Positions};

/// Rows of several documents one after the other, each but the last ended by a separator, which belongs to it. No token
/// sees another document than its own, and positions start anew in each: every document is read as if it were alone
/// (`get_masks_and_position_ids` of Megatron-LM with both of its resets).
#[derive(Clone, Debug)]
pub struct Documents {
    /// Which document of its row a token is in, `[batch, seq]`.
    numbers: Tensor<2, Int>,
    positions: Tensor<2, Int>,
    /// Where a token is no separator.
    inner: Tensor<2, Bool>,
}

impl Documents {
    /// The documents of the rows `[batch, seq]`, separated by the token `end`.
    pub fn new(ids: &Tensor<2, Int>, end: u32) -> Self {
        let [batch, seq] = ids.dims();
        let tokens: Vec<i64> = ids.to_data().convert::<i64>().iter::<i64>().collect();
        let (mut numbers, mut positions) = (Vec::new(), Vec::new());
        for row in tokens.chunks(seq) {
            let (mut number, mut position) = (0, 0);
            for &token in row {
                numbers.push(number);
                positions.push(position);
                (number, position) =
                    if token == i64::from(end) { (number + 1, 0) } else { (number, position + 1) };
            }
        }
        let whole =
            |values: Vec<i64>| Tensor::from_data(TensorData::new(values, [batch, seq]), &ids.device());
        let inner = ids.clone().not_equal_elem(i64::from(end));
        Self { numbers: whole(numbers), positions: whole(positions), inner }
    }

    /// Where each token stands in its document, from 0 on.
    pub fn positions(&self) -> Positions {
        Positions::Each(self.positions.clone())
    }

    /// What a token sees: itself and those before it in its document.
    pub fn mask(&self) -> Mask {
        let [batch, seq] = self.numbers.dims();
        let query = self.numbers.clone().reshape([batch, 1, seq, 1]).expand([batch, 1, seq, seq]);
        let key = self.numbers.clone().reshape([batch, 1, 1, seq]).expand([batch, 1, seq, seq]);
        Mask::All(vec![Mask::Causal, Mask::Visible(query.equal(key))])
    }

    /// Whether a token is worth guessing from those before it: not the first of a document, which follows a separator.
    /// The first of a row is.
    pub fn scored(&self) -> Tensor<2, Bool> {
        shifted(self.inner.clone())
    }
}

/// The mask `[batch, seq]` of tokens whose successors count, as a mask of the successors: moved by one to the right. The
/// first column, which nothing comes before, is `true`.
pub fn shifted(mask: Tensor<2, Bool>) -> Tensor<2, Bool> {
    let [batch, seq] = mask.dims();
    let first = Tensor::<2, Int>::ones([batch, 1], &mask.device()).bool();
    Tensor::cat(vec![first, mask], 1).narrow(1, 0, seq)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    fn flags<const D: usize>(flags: Tensor<D, Bool>) -> Vec<i64> {
        flags.int().into_data().convert::<i64>().iter::<i64>().collect()
    }

    #[test]
    fn documents_start_after_separators() {
        let ids = Tensor::from_data([[5, 7, 5, 6, 7, 7], [5, 6, 5, 6, 5, 6]], &Device::flex());
        let documents = Documents::new(&ids, 7);
        let Positions::Each(positions) = documents.positions() else { panic!() };
        let positions: Vec<i64> = positions.into_data().convert::<i64>().iter::<i64>().collect();
        assert_eq!(positions, [0, 1, 0, 1, 2, 0, 0, 1, 2, 3, 4, 5]);
        assert_eq!(flags(documents.scored()), [1, 1, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn a_token_sees_the_past_of_its_own_document() {
        let ids = Tensor::from_data([[7, 5, 7, 6]], &Device::flex());
        let Mask::All(masks) = Documents::new(&ids, 7).mask() else { panic!() };
        let [Mask::Causal, Mask::Visible(same)] = &masks[..] else { panic!() };
        assert_eq!(same.dims(), [1, 1, 4, 4]);
        assert_eq!(flags(same.clone()), [1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 1]);
    }

    #[test]
    fn a_row_of_one_token_is_a_document() {
        let ids = Tensor::from_data([[7], [3]], &Device::flex());
        assert_eq!(flags(Documents::new(&ids, 7).scored()), [1, 1]);
    }
}
