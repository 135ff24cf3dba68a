//! Text: tokenizers.

pub mod tokenizer;
