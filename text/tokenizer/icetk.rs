//! GLM-130B's tokenizer: icetk's ids of images and text, and its spelling of white space.
//!
//! Facts: THUDM/icetk and the tokenizer of GLM-130B.

use super::proto::{Piece, PieceKind, Proto};
use super::sentencepiece::Layout;

/// How many ids before the text's are codes of images.
pub(super) const IMAGE_CODES: u32 = 20_000;

/// The tokens after the text's pieces.
const COMMANDS: [&str; 8] = ["[MASK]", "[gMASK]", "[sMASK]", "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"];

const LINE: &str = "<n>";
const TAB: &str = "<|tab|>";

/// The longest run of spaces that is one token.
const LONGEST_RUN: usize = 80;

fn run(length: usize) -> String {
    format!("<|blank_{length}|>")
}

/// Puts what is not in icetk's file after its pieces, and image codes before them.
pub(super) fn extend(proto: &mut Proto) -> Layout {
    let commands = COMMANDS.map(|text| (text.to_owned(), PieceKind::Control));
    let runs = [TAB.to_owned()].into_iter().chain((2..=LONGEST_RUN).map(run));
    let bytes = (0..=255_u8).map(|byte| (format!("<0x{byte:02X}>"), PieceKind::Byte));
    let more = commands.into_iter().chain(runs.map(|text| (text, PieceKind::UserDefined))).chain(bytes);
    proto.pieces.extend(more.map(|(text, kind)| Piece { text, score: 0.0, kind }));
    proto.byte_fallback = true;

    let codes = (0..IMAGE_CODES).map(|code| format!("<image_{code}>"));
    let texts = proto.pieces.iter().map(|piece| piece.text.clone());
    Layout {
        tokens: codes.chain(texts).collect(),
        ids: (0..proto.pieces.len() as u32).map(|piece| piece + IMAGE_CODES).collect(),
        aliases: Vec::new(),
    }
}

/// Line ends, tabs and runs of spaces as tokens, the longest runs first.
pub(super) fn spell_spaces(text: &str) -> String {
    let mut spelled = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(c) = rest.chars().next() {
        let spaces = rest.bytes().take(LONGEST_RUN).take_while(|byte| *byte == b' ').count();
        let length = match (c, spaces) {
            ('\n', _) => {
                spelled.push_str(LINE);
                1
            }
            ('\t', _) => {
                spelled.push_str(TAB);
                1
            }
            (_, 2..) => {
                spelled.push_str(&run(spaces));
                spaces
            }
            _ => {
                spelled.push(c);
                c.len_utf8()
            }
        };
        rest = &rest[length..];
    }
    spelled
}

/// Back from [`spell_spaces`].
pub(super) fn read_spaces(text: &str) -> String {
    let text = text.replace(LINE, "\n").replace(TAB, "\t");
    match text.contains("<|blank_") {
        true => (2..=LONGEST_RUN).fold(text, |text, length| text.replace(&run(length), &" ".repeat(length))),
        false => text,
    }
}
