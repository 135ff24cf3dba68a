use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::{
    NormalizedString, Normalizer, OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer,
};

use super::config::Config;
use super::files::{self, MAX_WORD_CHARS};
use super::{TokenizerError, TokenizerKind, guard};

/// The special tokens of a trained vocabulary, ids 0 to 4.
const SPECIAL: [&str; 5] = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];

/// Two neighbouring pieces of a word.
type Pair = (u32, u32);

/// Trains a lower-cased BERT tokenizer on texts; returns its `tokenizer.json`.
///
/// The vocabulary is the special tokens, every character of the texts, and then merges of the most
/// frequent neighbours (of equally frequent ones the pair with the lower ids) until it has `vocab_size`
/// tokens or every word is one. Equal texts in any order give equal bytes: the library's own trainer
/// numbers pieces in hash order, so it does not.
///
/// # Errors
/// [`TokenizerError::VocabTooSmall`] if the characters alone do not fit.
pub fn train_wordpiece(
    texts: impl IntoIterator<Item = impl AsRef<str>>,
    vocab_size: usize,
) -> Result<String, TokenizerError> {
    let counts = count_words(texts)?;
    let mut vocab = Vocab::default();
    for token in SPECIAL {
        vocab.insert(token.to_owned());
    }
    let characters: BTreeSet<char> = counts.keys().flat_map(|word| word.chars()).collect();
    let continuing: BTreeSet<char> = counts.keys().flat_map(|word| word.chars().skip(1)).collect();
    for c in characters {
        vocab.insert(c.to_string());
    }
    for c in continuing {
        vocab.insert(format!("##{c}"));
    }
    if vocab.tokens.len() > vocab_size {
        return Err(TokenizerError::VocabTooSmall { vocab_size, needed: vocab.tokens.len() });
    }
    merge_most_frequent(&counts, &mut vocab, vocab_size);

    let tokens = vocab.tokens.into_iter().enumerate();
    let tokens: Map<String, Value> = tokens.map(|(id, token)| (token, json!(id))).collect();
    Ok(files::bert(tokens, &Config::default(), TokenizerKind::Bert).to_string())
}

#[derive(Default)]
struct Vocab {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
}

impl Vocab {
    fn insert(&mut self, token: String) -> u32 {
        *self.ids.entry(token).or_insert_with_key(|token| {
            self.tokens.push(token.clone());
            self.tokens.len() as u32 - 1
        })
    }
}

/// The words of the texts as BERT splits them, in alphabetical order.
fn count_words(
    texts: impl IntoIterator<Item = impl AsRef<str>>,
) -> Result<BTreeMap<String, i64>, TokenizerError> {
    let normalizer = BertNormalizer::default();
    let mut counts = BTreeMap::new();
    for text in texts {
        let mut normalized = NormalizedString::from(text.as_ref());
        let split = guard(Path::new("the training texts"), || {
            normalizer.normalize(&mut normalized)?;
            let mut words = PreTokenizedString::from(normalized);
            BertPreTokenizer.pre_tokenize(&mut words)?;
            Ok(words)
        })?;
        for (word, _, _) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            if (1..=MAX_WORD_CHARS).contains(&word.chars().count()) {
                *counts.entry(word.to_owned()).or_default() += 1;
            }
        }
    }
    Ok(counts)
}

/// Byte-pair merges over the words' pieces, with counts kept up to date where a merge changes them.
fn merge_most_frequent(counts: &BTreeMap<String, i64>, vocab: &mut Vocab, vocab_size: usize) {
    let mut words: Vec<(Vec<u32>, i64)> = Vec::with_capacity(counts.len());
    for (word, count) in counts {
        let piece = |(i, c): (usize, char)| match i {
            0 => vocab.ids[&c.to_string()],
            _ => vocab.ids[&format!("##{c}")],
        };
        words.push((word.chars().enumerate().map(piece).collect(), *count));
    }
    let mut pairs: HashMap<Pair, i64> = HashMap::new();
    let mut places: HashMap<Pair, BTreeSet<usize>> = HashMap::new();
    for (i, (word, count)) in words.iter().enumerate() {
        for pair in neighbours(word) {
            *pairs.entry(pair).or_default() += count;
            places.entry(pair).or_default().insert(i);
        }
    }
    let mut queue: BinaryHeap<(i64, Reverse<Pair>)> =
        pairs.iter().map(|(pair, count)| (*count, Reverse(*pair))).collect();

    while vocab.tokens.len() < vocab_size {
        let Some((count, Reverse(pair))) = queue.pop() else {
            return;
        };
        if count < 1 || pairs.get(&pair) != Some(&count) {
            continue; // a stale entry: the pair's count has changed and was queued again
        }
        let [left, right] = [pair.0, pair.1].map(|id| vocab.tokens[id as usize].as_str());
        let merged = format!("{left}{}", right.strip_prefix("##").unwrap_or(right));
        let merged = vocab.insert(merged);

        let mut changed: BTreeSet<Pair> = BTreeSet::new();
        for i in places.remove(&pair).unwrap_or_default() {
            let (word, count) = &mut words[i];
            for old in neighbours(word) {
                *pairs.entry(old).or_default() -= *count;
                changed.insert(old);
            }
            join(word, pair, merged);
            for new in neighbours(word) {
                *pairs.entry(new).or_default() += *count;
                places.entry(new).or_default().insert(i);
                changed.insert(new);
            }
        }
        for pair in changed {
            queue.push((pairs[&pair], Reverse(pair)));
        }
    }
}

fn neighbours(word: &[u32]) -> impl Iterator<Item = Pair> + '_ {
    word.windows(2).map(|two| (two[0], two[1]))
}

/// Replaces every occurrence of the pair, from the left.
fn join(word: &mut Vec<u32>, pair: Pair, merged: u32) {
    let mut i = 0;
    while i + 1 < word.len() {
        if (word[i], word[i + 1]) == pair {
            word[i] = merged;
            word.remove(i + 1);
        }
        i += 1;
    }
}
