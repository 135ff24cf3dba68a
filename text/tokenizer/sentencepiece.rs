//! SentencePiece: unigram and byte-pair models, from the pieces and settings of a `.model` file.
//!
//! The ids are those of google/sentencepiece (`normalizer.cc`, `unigram_model.cc`, `bpe_model.cc`). The
//! tokenizers library has both algorithms, but neither user-defined symbols nor SentencePiece's own order
//! of merges, and it splits characters for the normalizer differently.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, HashMap};
use std::ops::Range;
use std::path::Path;

use super::TokenizerError;
use super::charsmap::CharsMap;
use super::proto::{Algorithm, Piece, PieceKind, Proto};

/// What a space becomes.
pub(super) const SPACE: &str = "\u{2581}";

/// How much worse than the worst piece an unknown character is.
const UNKNOWN_PENALTY: f32 = 10.0;

/// The ids of pieces, where they are not the pieces' places in the file.
#[derive(Clone, Debug, Default)]
pub(super) struct Layout {
    /// The tokens by id.
    pub tokens: Vec<String>,
    /// The id of each piece of the file.
    pub ids: Vec<u32>,
    /// Further names of ids.
    pub aliases: Vec<(String, u32)>,
}

impl Layout {
    /// Every piece in its place, then these tokens.
    pub fn in_order(pieces: &[Piece], more: impl IntoIterator<Item = String>) -> Layout {
        let tokens = pieces.iter().map(|piece| piece.text.clone()).chain(more).collect();
        Layout { tokens, ids: (0..pieces.len() as u32).collect(), aliases: Vec::new() }
    }
}

/// A SentencePiece model.
#[derive(Clone, Debug)]
pub(super) struct SentencePiece {
    pieces: Vec<Piece>,
    layout: Layout,
    /// The piece of a text.
    index: HashMap<String, u32>,
    /// The ids of tokens that are no piece's text.
    extra: HashMap<String, u32>,
    unknown: u32,
    /// The pieces of the 256 bytes, where unknown characters fall back to them.
    bytes: Option<Vec<u32>>,
    /// The lengths of user-defined symbols in bytes, longest first.
    symbol_lengths: Vec<usize>,
    longest: usize,
    lowest_score: f32,
    highest_score: f32,
    algorithm: Algorithm,
    charsmap: Option<CharsMap>,
    space: &'static str,
    space_as_suffix: bool,
    pub add_dummy_prefix: bool,
    pub remove_extra_spaces: bool,
}

/// A piece and the part of the normalized text that it stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Cut {
    pub piece: u32,
    pub at: Range<usize>,
}

impl SentencePiece {
    /// Checks a file's pieces against each other.
    ///
    /// # Errors
    /// [`TokenizerError`] for a piece that is there twice, a missing unknown piece or missing bytes.
    pub fn new(file: &Path, proto: Proto, layout: Layout) -> Result<SentencePiece, TokenizerError> {
        let mut index = HashMap::with_capacity(proto.pieces.len());
        for (i, piece) in proto.pieces.iter().enumerate() {
            if let Some(first) = index.insert(piece.text.clone(), i as u32) {
                let (token, first, second) = (piece.text.clone(), first as usize, i);
                return Err(TokenizerError::Twice { file: file.into(), token, first, second });
            }
        }
        let lacks = |what: &str| TokenizerError::UnknownToken {
            file: file.into(),
            field: what.into(),
            token: "<unk>".into(),
        };
        let unknown = proto.pieces.iter().position(|piece| piece.kind == PieceKind::Unknown);
        let unknown = unknown.ok_or_else(|| lacks("its piece of type UNKNOWN"))? as u32;
        let bytes = (0..=255_u8).map(|byte| {
            let token = format!("<0x{byte:02X}>");
            index
                .get(&token)
                .copied()
                .filter(|i| proto.pieces[*i as usize].kind == PieceKind::Byte)
                .ok_or(token)
        });
        let bytes = match proto.byte_fallback {
            true => Some(bytes.collect::<Result<Vec<u32>, String>>().map_err(|token| {
                TokenizerError::UnknownToken { file: file.into(), field: "a byte piece".into(), token }
            })?),
            false => None,
        };

        let lengths = |wanted: &dyn Fn(PieceKind) -> bool| {
            let wanted = proto.pieces.iter().filter(|piece| wanted(piece.kind));
            let mut lengths: Vec<usize> = wanted.map(|piece| piece.text.len()).collect();
            lengths.sort_unstable_by_key(|length| Reverse(*length));
            lengths.dedup();
            lengths
        };
        let scores =
            proto.pieces.iter().filter(|piece| piece.kind == PieceKind::Normal).map(|piece| piece.score);
        let (lowest_score, highest_score) =
            scores.fold((f32::MAX, f32::MIN), |(low, high), score| (low.min(score), high.max(score)));
        let known = |token: &String| !index.contains_key(token);
        let extra = layout.tokens.iter().enumerate().filter(|(_, token)| known(token));
        let charsmap =
            (!proto.charsmap.is_empty()).then(|| CharsMap::read(file, &proto.charsmap)).transpose()?;
        Ok(SentencePiece {
            extra: extra
                .map(|(id, token)| (token.clone(), id as u32))
                .chain(layout.aliases.iter().cloned())
                .collect(),
            symbol_lengths: lengths(&|kind| kind == PieceKind::UserDefined),
            longest: lengths(&found_in_text).first().copied().unwrap_or(0),
            pieces: proto.pieces,
            layout,
            index,
            unknown,
            bytes,
            lowest_score,
            highest_score,
            algorithm: proto.algorithm,
            charsmap,
            space: if proto.escape_spaces { SPACE } else { " " },
            space_as_suffix: proto.space_as_suffix,
            add_dummy_prefix: proto.add_dummy_prefix,
            remove_extra_spaces: proto.remove_extra_spaces,
        })
    }

    /// The id of a piece.
    pub fn id(&self, piece: u32) -> u32 {
        self.layout.ids[piece as usize]
    }

    /// The piece that a text is, or the unknown one.
    pub fn piece_of(&self, text: &str) -> u32 {
        self.index.get(text).copied().unwrap_or(self.unknown)
    }

    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        let piece = self.index.get(token).map(|piece| self.id(*piece));
        piece.or_else(|| self.extra.get(token).copied())
    }

    pub fn tokens(&self) -> &[String] {
        &self.layout.tokens
    }

    /// Whether unknown characters become bytes.
    pub fn has_bytes(&self) -> bool {
        self.bytes.is_some()
    }

    /// The text as the pieces spell it: rewritten characters, single spaces, spaces as `▁`.
    pub fn normalize(&self, text: &str, prefix: bool) -> String {
        let mut rest = text;
        if self.remove_extra_spaces {
            while let Some((" ", length)) = self.next(rest) {
                rest = &rest[length..];
            }
        }
        if rest.is_empty() {
            return String::new();
        }
        let prefix = prefix && self.add_dummy_prefix;
        let mut normal = String::with_capacity(text.len() + text.len() / 4 + 3);
        if prefix && !self.space_as_suffix {
            normal.push_str(self.space);
        }
        let mut after_space = self.remove_extra_spaces;
        while let Some((mut part, length)) = self.next(rest) {
            if after_space {
                part = part.trim_start_matches(' ');
            }
            if !part.is_empty() {
                for c in part.chars() {
                    match c {
                        ' ' => normal.push_str(self.space),
                        c => normal.push(c),
                    }
                }
                after_space = self.remove_extra_spaces && part.ends_with(' ');
            }
            rest = &rest[length..];
        }
        if self.remove_extra_spaces {
            normal.truncate(normal.trim_end_matches(self.space).len());
        }
        if prefix && self.space_as_suffix {
            normal.push_str(self.space);
        }
        normal
    }

    /// What the beginning of the text becomes, and how many bytes it takes: a user-defined symbol, what
    /// the table rewrites, or one character.
    fn next<'a>(&'a self, text: &'a str) -> Option<(&'a str, usize)> {
        let first = text.chars().next()?.len_utf8();
        if let Some(length) = self.symbol(text) {
            return Some((&text[..length], length));
        }
        let rewritten = self.charsmap.as_ref().and_then(|map| map.longest(text));
        Some(rewritten.unwrap_or((&text[..first], first)))
    }

    /// The length of the longest user-defined symbol that the text begins with.
    fn symbol(&self, text: &str) -> Option<usize> {
        let is_symbol = |length: &usize| {
            let piece = text.get(..*length).and_then(|text| self.index.get(text));
            piece.is_some_and(|piece| self.pieces[*piece as usize].kind == PieceKind::UserDefined)
        };
        self.symbol_lengths.iter().copied().find(is_symbol)
    }

    /// A piece that may be found in text.
    fn find(&self, text: &str) -> Option<u32> {
        let piece = self.index.get(text).copied();
        piece.filter(|piece| found_in_text(self.pieces[*piece as usize].kind))
    }

    /// Cuts normalized text. Unknown characters beside each other are one unknown piece, or their bytes.
    pub fn cut(&self, text: &str) -> Vec<Cut> {
        let cuts = match self.algorithm {
            Algorithm::Unigram => self.cut_unigram(text),
            Algorithm::Bpe => self.cut_bpe(text),
            Algorithm::Word => self.cut_words(text),
            Algorithm::Char => self.symbols(text).into_iter().map(|at| self.whole(text, at)).collect(),
        };
        let mut done: Vec<Cut> = Vec::with_capacity(cuts.len());
        for cut in cuts {
            match (&self.bytes, done.last_mut()) {
                _ if cut.piece != self.unknown => done.push(cut),
                (Some(bytes), _) => {
                    let spelled = cut.at.clone().zip(text[cut.at].bytes());
                    done.extend(
                        spelled.map(|(i, byte)| Cut { piece: bytes[usize::from(byte)], at: i..i + 1 }),
                    );
                }
                (None, Some(last)) if last.piece == self.unknown => last.at.end = cut.at.end,
                _ => done.push(cut),
            }
        }
        done
    }

    fn whole(&self, text: &str, at: Range<usize>) -> Cut {
        Cut { piece: self.piece_of(&text[at.clone()]), at }
    }

    /// User-defined symbols and, between them, characters.
    fn symbols(&self, text: &str) -> Vec<Range<usize>> {
        let mut symbols = Vec::new();
        let mut at = 0;
        while let Some(c) = text[at..].chars().next() {
            let length = self.symbol(&text[at..]).unwrap_or(c.len_utf8());
            symbols.push(at..at + length);
            at += length;
        }
        symbols
    }

    fn cut_words(&self, text: &str) -> Vec<Cut> {
        let starts = text.match_indices(self.space).map(|(at, space)| match self.space_as_suffix {
            true => at + space.len(),
            false => at,
        });
        let mut starts: Vec<usize> = [0].into_iter().chain(starts).chain([text.len()]).collect();
        starts.dedup();
        starts.windows(2).map(|two| self.whole(text, two[0]..two[1])).collect()
    }

    /// The pieces whose scores have the greatest sum.
    fn cut_unigram(&self, text: &str) -> Vec<Cut> {
        /// The best way to reach a byte.
        #[derive(Clone)]
        struct Best {
            score: f32,
            piece: u32,
            start: usize,
        }
        let mut best: Vec<Option<Best>> = vec![None; text.len() + 1];
        let unknown_score = self.lowest_score - UNKNOWN_PENALTY;
        for (start, c) in text.char_indices() {
            let so_far = best[start].as_ref().map_or(0.0, |best| best.score);
            let mut reach = |end: usize, piece: u32, score: f32| match &best[end] {
                Some(known) if known.score >= score => {}
                _ => best[end] = Some(Best { score, piece, start }),
            };
            let mut single = false;
            let window = &text[start..text.floor_char_boundary(start + self.longest)];
            for length in window.char_indices().map(|(i, c)| i + c.len_utf8()) {
                let Some(piece) = self.find(&window[..length]) else {
                    continue;
                };
                let score = match self.pieces[piece as usize].kind {
                    PieceKind::Unused => continue,
                    // A symbol outweighs whatever else could be read in its place.
                    PieceKind::UserDefined => length as f32 * self.highest_score - 0.1,
                    _ => self.pieces[piece as usize].score,
                };
                reach(start + length, piece, score + so_far);
                single |= length == c.len_utf8();
            }
            if !single {
                reach(start + c.len_utf8(), self.unknown, unknown_score + so_far);
            }
        }
        let mut cuts = Vec::new();
        let mut end = text.len();
        while let Some(Best { piece, start, .. }) = best[end] {
            cuts.push(Cut { piece, at: start..end });
            end = start;
        }
        cuts.reverse();
        cuts
    }

    /// Neighbours are merged into the piece with the highest score first, of equal ones the leftmost.
    fn cut_bpe(&self, text: &str) -> Vec<Cut> {
        let mut symbols: Vec<Symbol> = Vec::new();
        for at in self.symbols(text) {
            let frozen = self.symbol(&text[at.clone()]) == Some(at.len());
            symbols.push(Symbol { left: symbols.len().checked_sub(1), right: None, at, frozen });
        }
        let count = symbols.len();
        for (i, symbol) in symbols.iter_mut().enumerate() {
            symbol.right = Some(i + 1).filter(|right| *right < count);
        }
        let mut queue = BinaryHeap::new();
        let mut unused: HashMap<&str, usize> = HashMap::new();
        let mut offer =
            |symbols: &[Symbol], queue: &mut BinaryHeap<Merge>, left: Option<usize>, right: Option<usize>| {
                let (Some(left), Some(right)) = (left, right) else { return };
                let (first, second) = (&symbols[left], &symbols[right]);
                if first.frozen || second.frozen {
                    return;
                }
                let merged = &text[first.at.start..second.at.end];
                let Some(piece) = self.find(merged) else { return };
                let Piece { score, kind, .. } = self.pieces[piece as usize];
                queue.push(Merge { score, left, right, length: merged.len() });
                if kind == PieceKind::Unused {
                    unused.insert(merged, first.at.len());
                }
            };
        for right in 1..count {
            offer(&symbols, &mut queue, Some(right - 1), Some(right));
        }
        while let Some(Merge { left, right, length, .. }) = queue.pop() {
            let (first, second) = (symbols[left].at.clone(), symbols[right].at.clone());
            if first.is_empty() || second.is_empty() || first.len() + second.len() != length {
                continue; // one of them has been merged with another since
            }
            symbols[left].at.end = second.end;
            symbols[right].at = second.end..second.end;
            let beyond = symbols[right].right;
            symbols[left].right = beyond;
            if let Some(beyond) = beyond {
                symbols[beyond].left = Some(left);
            }
            let before = symbols[left].left;
            offer(&symbols, &mut queue, before, Some(left));
            offer(&symbols, &mut queue, Some(left), beyond);
        }

        let mut cuts = Vec::new();
        let mut next = (count > 0).then_some(0);
        while let Some(i) = next {
            next = symbols[i].right;
            let mut stack = vec![symbols[i].at.clone()];
            while let Some(at) = stack.pop() {
                let cut = self.whole(text, at);
                let parts = match self.pieces[cut.piece as usize].kind {
                    PieceKind::Unused => unused.get(&text[cut.at.clone()]),
                    _ => None,
                };
                match parts {
                    Some(left) => {
                        let middle = cut.at.start + left;
                        stack.extend([middle..cut.at.end, cut.at.start..middle]);
                    }
                    None => cuts.push(cut),
                }
            }
        }
        cuts
    }
}

fn found_in_text(kind: PieceKind) -> bool {
    matches!(kind, PieceKind::Normal | PieceKind::UserDefined | PieceKind::Unused)
}

/// A part of the text that is merged with its neighbours; empty once it has become part of the left one.
struct Symbol {
    left: Option<usize>,
    right: Option<usize>,
    at: Range<usize>,
    frozen: bool,
}

/// Two symbols that make a piece.
struct Merge {
    score: f32,
    left: usize,
    right: usize,
    length: usize,
}

impl Ord for Merge {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Merge {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Merge {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Merge {}

/// Text from pieces, as the sentencepiece library puts it together.
///
/// The space that stands before the first word is dropped if the model adds or trims one. Bytes that are no
/// UTF-8 become U+FFFD, one each.
pub(super) fn join(tokens: &[String], trim_first: bool, trim_all: bool, has_bytes: bool) -> String {
    let mut text = String::new();
    let mut pending: Vec<u8> = Vec::new();
    let mut first = trim_first;
    for token in tokens {
        if let Some(byte) = byte_of(token).filter(|_| has_bytes) {
            pending.push(byte);
            continue;
        }
        flush(&mut text, &mut pending);
        first &= text.is_empty();
        let trimmed = token.strip_prefix(SPACE).filter(|_| first);
        if trimmed.is_some() && !trim_all {
            first = false;
        }
        text.push_str(&trimmed.unwrap_or(token).replace(SPACE, " "));
    }
    flush(&mut text, &mut pending);
    text
}

/// The byte of a token like `<0x0A>`.
pub(super) fn byte_of(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

fn flush(text: &mut String, pending: &mut Vec<u8>) {
    for chunk in pending.utf8_chunks() {
        text.push_str(chunk.valid());
        text.extend(chunk.invalid().iter().map(|_| char::REPLACEMENT_CHARACTER));
    }
    pending.clear();
}
