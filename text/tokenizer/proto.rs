//! The protobuf of a SentencePiece `.model`: the few fields that matter, every length checked.
//!
//! Field numbers: `sentencepiece_model.proto` of google/sentencepiece.

use std::path::Path;

use super::TokenizerError;

/// What a piece is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PieceKind {
    /// Found in text.
    Normal,
    /// Stands for what no piece spells.
    Unknown,
    /// Never found in text: `<s>`, `</s>`, `<pad>`.
    Control,
    /// Found in text before anything else, and kept whole.
    UserDefined,
    /// Only a step on the way to longer pieces.
    Unused,
    /// One byte, `<0x0A>`.
    Byte,
}

/// One piece of the vocabulary.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: PieceKind,
}

/// How normalized text is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Unigram,
    Bpe,
    Word,
    Char,
}

/// A `.model` file.
#[derive(Clone, Debug)]
pub(super) struct Proto {
    pub pieces: Vec<Piece>,
    pub algorithm: Algorithm,
    pub byte_fallback: bool,
    pub space_as_suffix: bool,
    pub charsmap: Vec<u8>,
    pub add_dummy_prefix: bool,
    pub remove_extra_spaces: bool,
    pub escape_spaces: bool,
}

impl Proto {
    /// Reads a file's bytes. What protobuf leaves out has SentencePiece's defaults.
    ///
    /// # Errors
    /// [`TokenizerError::Protobuf`] with the byte where reading stopped.
    pub fn read(file: &Path, bytes: &[u8]) -> Result<Proto, TokenizerError> {
        let mut proto = Proto {
            pieces: Vec::new(),
            algorithm: Algorithm::Unigram,
            byte_fallback: false,
            space_as_suffix: false,
            charsmap: Vec::new(),
            add_dummy_prefix: true,
            remove_extra_spaces: true,
            escape_spaces: true,
        };
        let mut reader = Reader { file, bytes, at: 0, base: 0 };
        let (mut trainer, mut normalizer) = (false, false);
        while let Some((field, value)) = reader.field()? {
            match (field, value) {
                (1, Field::Bytes(message)) => proto.pieces.push(piece(message)?),
                (2, Field::Bytes(message)) => {
                    proto.trainer(message)?;
                    trainer = true;
                }
                (3, Field::Bytes(message)) => {
                    proto.normalizer(message)?;
                    normalizer = true;
                }
                _ => {}
            }
        }
        match (proto.pieces.is_empty(), trainer && normalizer) {
            (true, _) => Err(TokenizerError::EmptyVocab { file: file.into() }),
            // They follow the pieces: a file without them has been cut.
            (_, false) => Err(reader.wrong("a model with its trainer_spec and normalizer_spec")),
            (_, true) => Ok(proto),
        }
    }

    fn trainer(&mut self, mut reader: Reader) -> Result<(), TokenizerError> {
        while let Some((field, value)) = reader.field()? {
            match (field, value) {
                (3, Field::Number(kind)) => {
                    self.algorithm = match kind {
                        1 => Algorithm::Unigram,
                        2 => Algorithm::Bpe,
                        3 => Algorithm::Word,
                        4 => Algorithm::Char,
                        _ => return Err(reader.wrong("a model type from 1 to 4")),
                    }
                }
                (24, Field::Number(set)) => self.space_as_suffix = set != 0,
                (35, Field::Number(set)) => self.byte_fallback = set != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, mut reader: Reader) -> Result<(), TokenizerError> {
        while let Some((field, value)) = reader.field()? {
            match (field, value) {
                (2, Field::Bytes(map)) => self.charsmap = map.bytes.to_vec(),
                (3, Field::Number(set)) => self.add_dummy_prefix = set != 0,
                (4, Field::Number(set)) => self.remove_extra_spaces = set != 0,
                (5, Field::Number(set)) => self.escape_spaces = set != 0,
                _ => {}
            }
        }
        Ok(())
    }
}

fn piece(mut reader: Reader) -> Result<Piece, TokenizerError> {
    let mut piece = Piece { text: String::new(), score: 0.0, kind: PieceKind::Normal };
    while let Some((field, value)) = reader.field()? {
        match (field, value) {
            (1, Field::Bytes(text)) => {
                let text = std::str::from_utf8(text.bytes).map_err(|_| text.wrong("UTF-8"))?;
                piece.text = text.to_owned();
            }
            (2, Field::Float(score)) if score.is_finite() => piece.score = score,
            (2, _) => return Err(reader.wrong("a finite score")),
            (3, Field::Number(kind)) => {
                piece.kind = match kind {
                    1 => PieceKind::Normal,
                    2 => PieceKind::Unknown,
                    3 => PieceKind::Control,
                    4 => PieceKind::UserDefined,
                    5 => PieceKind::Unused,
                    6 => PieceKind::Byte,
                    _ => return Err(reader.wrong("a piece type from 1 to 6")),
                }
            }
            _ => {}
        }
    }
    match piece.text.is_empty() {
        true => Err(reader.wrong("a piece with text")),
        false => Ok(piece),
    }
}

/// A value as it lies in the file.
enum Field<'a> {
    Number(u64),
    Float(f32),
    Bytes(Reader<'a>),
    Skipped,
}

/// One message of the file, and where it begins there.
struct Reader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
    base: usize,
}

impl<'a> Reader<'a> {
    /// The next field's number and value; `None` at the message's end.
    fn field(&mut self) -> Result<Option<(u64, Field<'a>)>, TokenizerError> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let key = self.number()?;
        let value = match key & 7 {
            0 => Field::Number(self.number()?),
            1 => self.take(8).map(|_| Field::Skipped)?,
            2 => {
                let length = self.number()?;
                let length = usize::try_from(length).map_err(|_| self.wrong("a length within the file"))?;
                Field::Bytes(self.take(length)?)
            }
            5 => {
                let four = self.take(4)?.bytes;
                Field::Float(f32::from_le_bytes([four[0], four[1], four[2], four[3]]))
            }
            _ => return Err(self.wrong("a protobuf field")),
        };
        Ok(Some((key >> 3, value)))
    }

    fn number(&mut self) -> Result<u64, TokenizerError> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.take(1)?.bytes[0];
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(self.wrong("a number of at most 10 bytes"))
    }

    fn take(&mut self, length: usize) -> Result<Reader<'a>, TokenizerError> {
        let end = self.at.checked_add(length).filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| self.wrong("as many bytes as the field says"))?;
        let inner =
            Reader { file: self.file, bytes: &self.bytes[self.at..end], at: 0, base: self.base + self.at };
        self.at = end;
        Ok(inner)
    }

    fn wrong(&self, expected: &'static str) -> TokenizerError {
        TokenizerError::Protobuf { file: self.file.into(), at: self.base + self.at, expected }
    }
}
