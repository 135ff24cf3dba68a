//! What the character models read: four kinds of text that have little in common.

use fastrand::Rng;

use crate::recipe::run::mix;

/// A kind of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Genesis in the King James Version of 1611, a verse a line.
    English,
    /// Poems of the Tang and Song dynasties in simplified, and of the Shijing in traditional characters, shuffled.
    Chinese,
    /// Emoji with their English and Chinese names: the vocabulary of the CLIP inside this program, shuffled.
    Names,
    /// Sums and products of whole numbers, made here.
    Sums,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 4] = [Kind::English, Kind::Chinese, Kind::Names, Kind::Sums];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Kind::English => "English",
            Kind::Chinese => "Chinese",
            Kind::Names => "names",
            Kind::Sums => "sums",
        }
    }

    fn text(self) -> String {
        const SEED: u64 = 7;
        match self {
            Kind::English => include_str!("english.txt").into(),
            Kind::Chinese => include_str!("chinese.txt").into(),
            Kind::Names => {
                let mut lines: Vec<&str> =
                    include_str!("../../embedded/emoji-clip/vocabulary.tsv").lines().collect();
                Rng::with_seed(SEED).shuffle(&mut lines);
                lines.join("\n")
            }
            Kind::Sums => {
                let mut rng = Rng::with_seed(SEED);
                let line = |_| match (rng.u32(0..1000), rng.u32(0..1000), rng.bool()) {
                    (a, b, true) => format!("{a}+{b}={}\n", a + b),
                    (a, b, false) => format!("{a}*{}={}\n", b % 10, a * (b % 10)),
                };
                (0..12_000).map(line).collect()
            }
        }
    }
}

/// The bytes of each kind of text, in two parts.
#[derive(Clone, Debug)]
pub struct Texts {
    /// Learned from.
    learned: Vec<Vec<u8>>,
    /// The last tenth of each, kept from learning.
    held_out: Vec<Vec<u8>>,
}

impl Texts {
    /// Those inside this program.
    pub fn embedded() -> Self {
        let halves = |kind: Kind| {
            let mut text = kind.text().into_bytes();
            let held_out = text.split_off(text.len() / 10 * 9);
            (text, held_out)
        };
        let (learned, held_out) = Kind::ALL.into_iter().map(halves).unzip();
        Self { learned, held_out }
    }

    /// So many bytes of one kind of text that is learned, both chosen by these numbers.
    ///
    /// # Panics
    /// If no text is as long.
    pub fn row(&self, seed: u64, number: u64, bytes: usize) -> &[u8] {
        let mut rng = Rng::with_seed(mix([seed, number]));
        let text = &self.learned[rng.usize(0..self.learned.len())];
        &text[rng.usize(0..=text.len() - bytes)..][..bytes]
    }

    /// What is held out of one kind, in pieces of so many bytes, each of which begins with the last byte of the one before.
    pub fn held_out(&self, kind: Kind, bytes: usize) -> Vec<&[u8]> {
        let text = &self.held_out[kind as usize];
        let starts = (0..).map(|piece| piece * (bytes - 1)).take_while(|start| start + bytes <= text.len());
        starts.map(|start| &text[start..start + bytes]).collect()
    }
}

/// How many characters of UTF-8 end in these bytes, or go on after them: bytes that are not inside a character.
pub fn characters(bytes: &[u8]) -> usize {
    bytes.iter().filter(|byte| **byte & 0xC0 != 0x80).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_every_byte_to_be_predicted_once() {
        let texts = Texts { learned: vec![], held_out: vec![b"0123456789".to_vec()] };
        assert_eq!(texts.held_out(Kind::English, 4), [b"0123", b"3456", b"6789"]);
        assert_eq!(texts.held_out(Kind::English, 11), [] as [&[u8]; 0]);
    }

    #[test]
    fn rows_come_of_every_kind_and_of_nothing_that_is_held_out() {
        let texts = Texts::embedded();
        let mut seen = [0; 4];
        for number in 0..200 {
            let row = texts.row(1, number, 33);
            assert_eq!(row, texts.row(1, number, 33));
            let of_kind = |text: &Vec<u8>| text.windows(33).any(|window| window == row);
            seen[texts.learned.iter().position(of_kind).unwrap()] += 1;
        }
        assert!(seen.iter().all(|&rows| rows > 25), "{seen:?}");
        for (kind, learned) in Kind::ALL.into_iter().zip(&texts.learned) {
            let held_out = &texts.held_out[kind as usize];
            assert_eq!([learned.clone(), held_out.clone()].concat(), kind.text().as_bytes());
            assert!(held_out.len() * 9 >= learned.len() && held_out.len() > 6000, "{}", kind.name());
        }
    }

    #[test]
    fn characters_are_counted_and_not_bytes() {
        assert_eq!(characters("一只cat".as_bytes()), 5);
        assert_eq!(characters(&"一只".as_bytes()[1..]), 1);
    }
}
