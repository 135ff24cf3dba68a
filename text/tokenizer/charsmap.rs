//! The table by which SentencePiece rewrites characters (`nmt_nfkc` and the like), compiled into the model.
//!
//! Layout as in google/sentencepiece `normalizer.cc`: the length of a trie, the trie as a double array of
//! 32-bit units (darts-clone), and the replacements, each ended by a zero byte.

use std::path::Path;

use super::TokenizerError;

/// Longest-match replacement of characters.
#[derive(Clone, Debug)]
pub(super) struct CharsMap {
    units: Vec<u32>,
    replacements: String,
}

impl CharsMap {
    /// Reads `precompiled_charsmap`.
    ///
    /// # Errors
    /// [`TokenizerError::CharsMap`] if its parts do not fit together.
    pub fn read(file: &Path, bytes: &[u8]) -> Result<CharsMap, TokenizerError> {
        let wrong = |message| TokenizerError::CharsMap { file: file.into(), message };
        let (length, rest) = bytes.split_first_chunk().ok_or_else(|| wrong("it has no trie"))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length == 0 || !length.is_multiple_of(4) || length > rest.len() {
            return Err(wrong("its trie is longer than itself or no list of 32-bit units"));
        }
        let (trie, replacements) = rest.split_at(length);
        let units = trie.chunks_exact(4).map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]));
        let replacements =
            std::str::from_utf8(replacements).map_err(|_| wrong("its replacements are not UTF-8"))?;
        Ok(CharsMap { units: units.collect(), replacements: replacements.to_owned() })
    }

    /// What the longest beginning of the text that the table knows becomes, and that beginning's length
    /// in bytes.
    pub fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let mut found = None;
        let mut node = offset(*self.units.first()?);
        for (i, byte) in text.bytes().enumerate() {
            node ^= usize::from(byte);
            let Some(unit) = self.units.get(node).filter(|unit| label(**unit) == u32::from(byte)) else {
                break;
            };
            node ^= offset(*unit);
            if unit >> 8 & 1 == 1 {
                let value = self.units.get(node).map(|leaf| (leaf & 0x7fff_ffff) as usize);
                found = value.map(|value| (value, i + 1)).or(found);
            }
        }
        let (value, length) = found.filter(|(_, length)| text.is_char_boundary(*length))?;
        let replacement = self.replacements.get(value..)?;
        Some((replacement.split('\0').next().unwrap_or_default(), length))
    }
}

/// Where a unit's children are, to be combined with the unit's own place.
fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}

/// The byte that leads to a unit; no byte for a leaf.
fn label(unit: u32) -> u32 {
    unit & (1 << 31 | 0xff)
}
