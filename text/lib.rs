//! Text: tokenizers, chat templates, writing text token by token, and filling blanks.

pub mod chat;
pub mod generate;
pub mod infill;
pub mod tokenizer;
