//! What the embedded model was trained to name.

/// A concept in both languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The emoji.
    pub emoji: &'static str,
    /// Its CLDR short name in English.
    pub en: &'static str,
    /// Its CLDR short name in Chinese.
    pub zh: &'static str,
}

const TABLE: &str = include_str!("embedded/emoji-clip/vocabulary.tsv");

/// All of them, in CLDR's order.
pub fn words() -> Vec<Word> {
    TABLE
        .lines()
        .filter_map(|line| {
            let mut fields = line.split('\t');
            Some(Word { emoji: fields.next()?, en: fields.next()?, zh: fields.next()? })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::words;

    #[test]
    fn every_line_is_a_word() {
        let words = words();
        assert_eq!(words.len(), 1914);
        assert!(words.iter().all(|word| !word.en.is_empty() && !word.zh.is_empty()));
        assert!(words.iter().any(|word| (word.emoji, word.en, word.zh) == ("🐱", "cat face", "猫脸")));
    }
}
