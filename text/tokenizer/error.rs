use std::path::PathBuf;

/// Why a tokenizer could not be loaded, trained or applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The folder holds none of the files a tokenizer is read from.
    #[error("{}: no tokenizer here; looked for {}", .folder.display(), .looked_for.join(", "))]
    NotFound {
        /// The folder that was searched.
        folder: PathBuf,
        /// The files, or pairs of files, any one of which would do.
        looked_for: Vec<&'static str>,
    },
    /// A file exists and cannot be read.
    #[error("{}: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A text file is not UTF-8.
    #[error("{}: not UTF-8 at byte {at}", .file.display())]
    NotUtf8 {
        /// The file.
        file: PathBuf,
        /// The first byte that is not UTF-8.
        at: usize,
    },
    /// A JSON file does not parse.
    #[error("{}: {source}", .file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// Line, column and reason.
        source: serde_json::Error,
    },
    /// A field is absent or holds something else than it must.
    #[error("{}: {field} must be {expected}, found {found}", .file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, dotted from the root of the file.
        field: String,
        /// What it must hold.
        expected: &'static str,
        /// What it holds.
        found: String,
    },
    /// A vocabulary without tokens.
    #[error("{}: the vocabulary is empty", .file.display())]
    EmptyVocab {
        /// The file.
        file: PathBuf,
    },
    /// Token ids that do not count 0, 1, 2, ... without gap or repetition.
    #[error("{}: ids must count from 0 to {last}; missing: {missing:?}; given twice: {repeated:?}", .file.display())]
    Ids {
        /// The file.
        file: PathBuf,
        /// The largest id in the file.
        last: u32,
        /// Ids below `last` that no token has (the first 16).
        missing: Vec<u32>,
        /// Ids that several tokens share (the first 16).
        repeated: Vec<u32>,
    },
    /// A merge that is not two tokens with one space between them.
    #[error("{}: {at} must be two tokens and one space, found {text:?}", .file.display())]
    MergeNotPair {
        /// The file.
        file: PathBuf,
        /// The line or the field.
        at: String,
        /// What stands there.
        text: String,
    },
    /// A merge of, or into, tokens that the vocabulary lacks.
    #[error("{}: {at} needs the token {token:?}, which the vocabulary lacks", .file.display())]
    MergeUnknown {
        /// The file.
        file: PathBuf,
        /// The line or the field.
        at: String,
        /// The token that is not in the vocabulary.
        token: String,
    },
    /// A token that must be in the vocabulary and is not.
    #[error("{}: {field} is {token:?}, which the vocabulary lacks", .file.display())]
    UnknownToken {
        /// The file.
        file: PathBuf,
        /// The field that names the token.
        field: String,
        /// The token.
        token: String,
    },
    /// A SentencePiece model that breaks off or holds what cannot be.
    #[error("{}: byte {at} must be part of {expected}", .file.display())]
    Protobuf {
        /// The file.
        file: PathBuf,
        /// Where reading stopped.
        at: usize,
        /// What must stand there.
        expected: &'static str,
    },
    /// A SentencePiece model whose table of characters is broken.
    #[error("{}: precompiled_charsmap: {message}", .file.display())]
    CharsMap {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        message: &'static str,
    },
    /// A token that is in a vocabulary twice.
    #[error("{}: {token:?} is both token {first} and token {second}", .file.display())]
    Twice {
        /// The file.
        file: PathBuf,
        /// The token.
        token: String,
        /// Its first place.
        first: usize,
        /// Its second place.
        second: usize,
    },
    /// An added token whose declared id is not the one it would get.
    #[error("{}: added token {token:?} declares id {declared}, but its place in the vocabulary is {found}", .file.display())]
    AddedTokenId {
        /// The file.
        file: PathBuf,
        /// The token.
        token: String,
        /// The id that the file gives it.
        declared: u32,
        /// The id that the vocabulary gives it.
        found: u32,
    },
    /// A tokenizer class that cannot be built from its vocabulary files alone.
    #[error("{}: tokenizer_class {class:?} needs a tokenizer.json; from {files} these can be read: {}", .file.display(), .known.join(", "))]
    UnknownClass {
        /// The file that names the class.
        file: PathBuf,
        /// The class.
        class: String,
        /// The vocabulary files that were found.
        files: &'static str,
        /// The classes that these files are enough for.
        known: Vec<&'static str>,
    },
    /// Rows of unequal length, and no token to pad them with.
    #[error("row {row} has {length} of {columns} tokens and this tokenizer has no pad_token")]
    NoPadToken {
        /// The first row that is too short.
        row: usize,
        /// Its length.
        length: usize,
        /// The length it must have.
        columns: usize,
    },
    /// Rows too short to hold even the special tokens.
    #[error("rows of {length} tokens cannot hold the {special} special tokens")]
    TooShort {
        /// The length asked for.
        length: usize,
        /// How many special tokens every row has.
        special: usize,
    },
    /// A vocabulary size that is smaller than the alphabet of the texts.
    #[error(
        "vocab_size is {vocab_size}, but the special tokens and the characters of the texts take {needed}"
    )]
    VocabTooSmall {
        /// The size asked for.
        vocab_size: usize,
        /// The least size that covers every character.
        needed: usize,
    },
    /// The tokenizers library refused a file or a text.
    #[error("{}: {message}", .file.display())]
    Library {
        /// The file that the tokenizer was read from.
        file: PathBuf,
        /// What the library said.
        message: String,
    },
}
