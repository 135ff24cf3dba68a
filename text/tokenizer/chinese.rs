//! The tokenizers that cut Chinese into words first: CPM-1 and PanGu-alpha, CPM-2 and Yuan 1.0; and PLATO's
//! way to clean a text.
//!
//! Facts: transformers `CpmTokenizer`, TsinghuaAI CPM-2 `EncDecTokenizer` (the Chinese and the bilingual
//! one), PaddleNLP `UnifiedTransformerTokenizer`.

use std::collections::HashMap;
use std::io::BufReader;
use std::sync::OnceLock;

use flate2::read::ZlibDecoder;
use jieba_rs::Jieba;
use tokenizers::normalizers::StripAccents;
use tokenizers::{NormalizedString, Normalizer, Result};

use super::sentencepiece::{SPACE, SentencePiece};

/// What a space of the text becomes, so that it is not taken for one between words.
const BLOCK_SPACE: char = '\u{2582}';
/// What a line's end becomes.
const BLOCK_LINE: char = '\u{2583}';

/// jieba's dictionary, words and how often they occur (fxsjy/jieba, MIT license), deflated.
const DICTIONARY: &[u8] = include_bytes!("../data/jieba.txt.z");

/// Cuts text into words as Python's jieba does: by its dictionary (unpacked at the first use) and its model
/// of unknown words. What is neither Chinese nor ASCII of a word is cut into characters.
pub(super) fn words(text: &str) -> Vec<&str> {
    static JIEBA: OnceLock<Jieba> = OnceLock::new();
    let jieba = JIEBA.get_or_init(|| {
        let mut dictionary = BufReader::new(ZlibDecoder::new(DICTIONARY));
        Jieba::with_dict(&mut dictionary).expect("the embedded dictionary is whole")
    });
    let mut words = Vec::new();
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let length = rest.find(|c| !within_words(c)).unwrap_or(rest.len());
        let (block, after) = match length {
            0 if rest.starts_with("\r\n") => rest.split_at(2),
            0 => rest.split_at(c.len_utf8()),
            length => rest.split_at(length),
        };
        rest = after;
        if length == 0 {
            words.push(block);
            continue;
        }
        for token in jieba.cut(block, true) {
            match token.word.chars().any(is_chinese) || jieba.has_word(token.word) {
                true => words.push(token.word),
                // The crate leaves together what Python cuts: 5-6, e.g.
                false => words.extend(numbers_apart(token.word)),
            }
        }
    }
    words
}

/// What jieba looks for words in.
fn within_words(c: char) -> bool {
    is_chinese(c) || c.is_ascii_alphanumeric() || "+#&._%-".contains(c)
}

fn is_chinese(c: char) -> bool {
    ('\u{4e00}'..='\u{9fd5}').contains(&c)
}

/// Runs of ASCII letters and digits, each with its decimals and percent sign, and what stands between them.
fn numbers_apart(word: &str) -> Vec<&str> {
    let run = |text: &str, digits: fn(&char) -> bool| text.chars().take_while(digits).count();
    let mut parts = Vec::new();
    let mut rest = word;
    while !rest.is_empty() {
        let mut length = run(rest, char::is_ascii_alphanumeric);
        if length == 0 {
            length = rest.find(|c: char| c.is_ascii_alphanumeric()).unwrap_or(rest.len());
        } else {
            let decimals =
                rest[length..].strip_prefix('.').map_or(0, |after| run(after, char::is_ascii_digit));
            length += if decimals > 0 { decimals + 1 } else { 0 };
            length += usize::from(rest[length..].starts_with('%'));
        }
        let (part, after) = rest.split_at(length);
        parts.push(part);
        rest = after;
    }
    parts
}

fn blocked(word: &str) -> String {
    let block = |c| match c {
        ' ' => BLOCK_SPACE,
        '\n' => BLOCK_LINE,
        c => c,
    };
    word.chars().map(block).collect()
}

/// The words with a space between each two; the text's own spaces and line ends are blocks.
pub(super) fn spaced_words(text: &str) -> String {
    words(text).into_iter().map(blocked).collect::<Vec<_>>().join(" ")
}

/// Back from [`spaced_words`].
pub(super) fn unblock(text: &str) -> String {
    let unblock = |c| match c {
        ' ' => None,
        BLOCK_SPACE => Some(' '),
        BLOCK_LINE => Some('\n'),
        c => Some(c),
    };
    text.chars().filter_map(unblock).collect()
}

/// What CPM's tokenizer does to characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cleaning {
    pub remove_space: bool,
    pub keep_accents: bool,
    pub lower_case: bool,
}

impl Cleaning {
    pub fn apply(self, text: &str) -> Result<String> {
        let mut text = match self.remove_space {
            true => single_spaces(text),
            false => text.to_owned(),
        };
        text = text.replace("``", "\"").replace("''", "\"");
        if !self.keep_accents {
            text = without_accents(text)?;
        }
        Ok(match self.lower_case {
            true => text.to_lowercase(),
            false => text,
        })
    }
}

/// PLATO: compatibility forms and accents taken apart, plain quotes and dashes, no control characters.
pub(super) fn clean_plato(text: &str) -> Result<String> {
    let clean = |c: char| match c {
        '\u{201c}' | '\u{201d}' => Some('"'),
        '\u{2018}' | '\u{2019}' => Some('\''),
        '\u{2014}' => Some('-'),
        c if c.is_whitespace() => Some(' '),
        c if c.is_control() => None,
        c => Some(c),
    };
    Ok(without_accents(single_spaces(text))?.chars().filter_map(clean).collect())
}

fn single_spaces(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn without_accents(text: String) -> Result<String> {
    let mut text = NormalizedString::from(text);
    text.nfkd();
    StripAccents.normalize(&mut text)?;
    Ok(text.get().to_owned())
}

/// The ids of a text: a piece that ends in a digit and a comma is cut again without the comma.
pub(super) fn cut_cpm(model: &SentencePiece, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    for cut in model.cut(text) {
        let number = text[cut.at].strip_suffix(',').filter(|text| text.ends_with(|c: char| c.is_numeric()));
        let Some(number) = number else {
            ids.push(model.id(cut.piece));
            continue;
        };
        let alone = model.normalize(&number.replace(SPACE, ""), true);
        let mut pieces: Vec<&str> = model.cut(&alone).into_iter().map(|cut| &alone[cut.at]).collect();
        if !number.starts_with(SPACE)
            && let Some(first) = pieces.first_mut()
            && let Some(rest) = first.strip_prefix(SPACE)
        {
            *first = rest;
        }
        let pieces = pieces.into_iter().filter(|piece| !piece.is_empty());
        ids.extend(pieces.chain([","]).map(|piece| model.id(model.piece_of(piece))));
    }
    ids
}

/// A vocabulary of whole words and pieces, the longest taken first.
#[derive(Clone, Debug)]
pub(super) struct WordPieces {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    unknown: u32,
    bilingual: bool,
}

/// Longer words are unknown as a whole.
const MAX_WORD_CHARS: usize = 200;

/// What marks a piece within a word that is not Chinese.
const CONTINUES: &str = "##";

impl WordPieces {
    /// The tokens of a vocabulary in the order of their ids; of equal ones the later counts.
    /// `None` if `<unk>` is not among them.
    pub fn new(tokens: Vec<String>) -> Option<WordPieces> {
        let ids: HashMap<String, u32> = tokens.iter().cloned().zip(0..).collect();
        Some(WordPieces {
            unknown: *ids.get("<unk>")?,
            bilingual: tokens.iter().any(|token| token.starts_with(CONTINUES)),
            tokens,
            ids,
        })
    }

    pub fn tokens(&self) -> &[String] {
        &self.tokens
    }

    pub fn id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    /// The ids of a text.
    pub fn cut(&self, text: &str) -> Vec<u32> {
        let text: String = match self.bilingual {
            true => text.to_owned(),
            false => text.chars().map(half_width).collect(),
        };
        let mut ids = Vec::new();
        for word in words(&text) {
            self.cut_word(&blocked(word), &mut ids);
        }
        if !self.bilingual {
            return ids;
        }
        let Some(space) = self.id(BLOCK_SPACE.encode_utf8(&mut [0; 4])) else {
            return ids;
        };
        let foreign = |id: Option<&u32>| id.is_some_and(|id| *id != space && self.is_foreign(*id));
        let between = |i: usize| i > 0 && foreign(ids.get(i - 1)) && foreign(ids.get(i + 1));
        let kept = (0..ids.len()).filter(|i| ids[*i] != space || !between(*i));
        kept.map(|i| ids[i]).collect()
    }

    fn cut_word(&self, word: &str, ids: &mut Vec<u32>) {
        let ends: Vec<usize> = word.char_indices().map(|(at, c)| at + c.len_utf8()).collect();
        if ends.len() > MAX_WORD_CHARS {
            ids.push(self.unknown);
            return;
        }
        let mut start = 0;
        while start < word.len() {
            let longest = ends.iter().rev().take_while(|end| **end > start).find_map(|end| {
                let part = &word[start..*end];
                let id = match self.bilingual && start > 0 && !has_chinese(part) {
                    true => self.id(&format!("{CONTINUES}{part}")),
                    false => self.id(part),
                };
                id.map(|id| (id, *end))
            });
            let next = ends.iter().find(|end| **end > start);
            let (id, end) = longest.unwrap_or((self.unknown, next.copied().unwrap_or(word.len())));
            ids.push(id);
            start = end;
        }
    }

    fn is_foreign(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(|token| !has_chinese(token))
    }

    /// The text of some tokens.
    pub fn join(&self, tokens: &[String]) -> String {
        let is_foreign = |token: &str| !has_chinese(token) && token != BLOCK_SPACE.encode_utf8(&mut [0; 4]);
        let mut text = String::new();
        for (i, token) in tokens.iter().enumerate() {
            let continued = token.strip_prefix(CONTINUES).filter(|_| self.bilingual && i > 0);
            let apart = self.bilingual && i > 0 && is_foreign(&tokens[i - 1]) && is_foreign(token);
            if apart && continued.is_none() {
                text.push(' ');
            }
            text.extend(continued.unwrap_or(token).chars().map(|c| match c {
                BLOCK_SPACE => ' ',
                BLOCK_LINE => '\n',
                c => c,
            }));
        }
        text
    }
}

fn has_chinese(text: &str) -> bool {
    text.chars().any(|c| ('\u{4e00}'..='\u{9fff}').contains(&c))
}

/// Full-width ASCII and the ideographic space as ASCII, but for Chinese punctuation.
fn half_width(c: char) -> char {
    match c {
        '，' | '。' | '！' | '（' | '）' | '？' | '、' | '；' | '：' => c,
        '\u{3000}' => ' ',
        '\u{ff00}'..='\u{ff5e}' => char::from_u32(u32::from(c) - 0xfee0).unwrap_or(c),
        c => c,
    }
}
