//! Text: tokenizers, chat templates, writing text token by token, filling blanks, and texts of several documents.

pub mod chat;
pub mod documents;
pub mod generate;
pub mod infill;
pub mod tokenizer;
