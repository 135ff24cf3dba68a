//! Text: tokenizers, writing text token by token, and filling blanks.

pub mod generate;
pub mod infill;
pub mod tokenizer;
