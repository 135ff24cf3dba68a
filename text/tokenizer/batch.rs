use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Side, Tokenizer, TokenizerError};

/// How many columns a batch has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PadTo {
    /// As many as its longest row.
    Longest,
    /// Exactly this many; longer rows are cut.
    Length(usize),
}

/// How texts of different lengths become one rectangle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchOptions {
    /// The most tokens of a row, special ones included; `None` cuts nothing.
    pub max_length: Option<usize>,
    /// How far rows are padded.
    pub pad: PadTo,
}

impl Default for BatchOptions {
    fn default() -> Self {
        BatchOptions { max_length: None, pad: PadTo::Longest }
    }
}

/// Token ids of several texts, all rows of one length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// The ids, `[batch, seq]`.
    pub ids: Vec<Vec<u32>>,
    /// 1 for tokens and 0 for padding, `[batch, seq]`.
    pub attention_mask: Vec<Vec<u32>>,
    /// Which of two texts a token belongs to, `[batch, seq]`; padding is 0.
    pub type_ids: Vec<Vec<u32>>,
    /// Which rows were cut, `[batch]`.
    pub truncated: Vec<bool>,
}

impl Batch {
    /// The number of rows and of columns.
    pub fn shape(&self) -> [usize; 2] {
        [self.ids.len(), self.ids.first().map_or(0, Vec::len)]
    }

    /// `input_ids` and `attention_mask` (1 or 0), both `[batch, seq]`.
    pub fn to_tensors(&self, device: &Device) -> (Tensor<2, Int>, Tensor<2, Int>) {
        let shape = self.shape();
        let tensor = |rows: &[Vec<u32>]| {
            let flat: Vec<i64> = rows.iter().flatten().map(|id| i64::from(*id)).collect();
            Tensor::from_data(TensorData::new(flat, shape), device)
        };
        (tensor(&self.ids), tensor(&self.attention_mask))
    }
}

impl Tokenizer {
    /// The texts with special tokens, cut and padded to one length.
    ///
    /// Cutting removes words, never special tokens: CLIP's `<|endoftext|>` and BERT's `[SEP]` stay last.
    ///
    /// # Errors
    /// [`TokenizerError::TooShort`] if the special tokens alone are longer than a row may be,
    /// [`TokenizerError::NoPadToken`] if rows differ and nothing can pad them.
    pub fn encode_batch(
        &self,
        texts: &[impl AsRef<str>],
        options: &BatchOptions,
    ) -> Result<Batch, TokenizerError> {
        let limit = match (options.max_length, options.pad) {
            (Some(max), PadTo::Length(columns)) => Some(max.min(columns)),
            (None, PadTo::Length(columns)) => Some(columns),
            (max, PadTo::Longest) => max,
        };
        let texts = texts.iter().map(AsRef::as_ref).collect();
        let rows = self.encode_truncated(texts, limit)?;

        let longest = rows.iter().map(|(row, _)| row.len()).max().unwrap_or(0);
        let columns = match options.pad {
            PadTo::Longest => longest,
            PadTo::Length(columns) => columns,
        };
        let mut batch = Batch::default();
        for (i, (row, truncated)) in rows.into_iter().enumerate() {
            let length = row.len();
            let padding = columns.saturating_sub(length);
            let pad = match (padding, self.pad_id()) {
                (0, _) => 0,
                (_, Some(pad)) => pad,
                (_, None) => {
                    return Err(TokenizerError::NoPadToken { row: i, length, columns });
                }
            };
            let side = self.padding_side();
            batch.ids.push(padded(row.get_ids(), pad, padding, side));
            batch.attention_mask.push(padded(&vec![1; length], 0, padding, side));
            batch.type_ids.push(padded(row.get_type_ids(), 0, padding, side));
            batch.truncated.push(truncated);
        }
        Ok(batch)
    }
}

fn padded(row: &[u32], value: u32, count: usize, side: Side) -> Vec<u32> {
    let padding = vec![value; count];
    match side {
        Side::Left => [&padding, row].concat(),
        Side::Right => [row, &padding].concat(),
    }
}
