//! Text: tokenizers, and writing text token by token.

pub mod generate;
pub mod tokenizer;
