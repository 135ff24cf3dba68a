/// Makes text of one row's tokens as they come, never a part of a character.
pub trait Spelling {
    /// The text that is certain now that `token` has come; it may be empty.
    fn push(&mut self, token: u32) -> String;

    /// The rest, now that no token will come.
    fn finish(&mut self) -> String;
}

/// Spells nothing, for those who want tokens alone.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Spelling for Silent {
    fn push(&mut self, _: u32) -> String {
        String::new()
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

/// Holds back what may be the beginning of a stop text, and cuts at the first whole one.
#[derive(Debug)]
pub(super) struct Cut<'a> {
    stops: &'a [String],
    held: String,
}

impl<'a> Cut<'a> {
    pub fn new(stops: &'a [String]) -> Self {
        Self { stops, held: String::new() }
    }

    /// What may be shown after `text`, and the stop text that it completes.
    pub fn push(&mut self, text: &str) -> (String, Option<&'a str>) {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            let shown = self.held[..at].to_owned();
            self.held.clear();
            return (shown, Some(stop));
        }
        let begins = |&at: &usize| {
            let end = &self.held[at..];
            self.stops.iter().any(|stop| stop.starts_with(end))
        };
        let at = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(at);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// What was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(stops: &[&str], pieces: &[&str]) -> (Vec<String>, Option<String>) {
        let stops: Vec<String> = stops.iter().map(|stop| (*stop).to_owned()).collect();
        let mut cut = Cut::new(&stops);
        let mut shown = Vec::new();
        for piece in pieces {
            let (text, stop) = cut.push(piece);
            shown.push(text);
            if let Some(stop) = stop {
                return (shown, Some(stop.to_owned()));
            }
        }
        shown.push(cut.finish());
        (shown, None)
    }

    #[test]
    fn what_may_begin_a_stop_text_waits() {
        let strings = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        for (stops, pieces, expected, stop) in [
            (&["###"][..], &["a#", "b##", "c#"][..], &["a", "#b", "##c", "#"][..], None),
            (&["###"], &["a#", "#", "#b"], &["a", "", ""], Some("###")),
            (&["\nUser:"], &["hi\n", "Use", "d"], &["hi", "", "\nUsed", ""], None),
            (&["cd", "abcx"], &["abc", "d"], &["", "ab"], Some("cd")),
            (&["b", "ab"], &["xab"], &["x"], Some("ab")),
            (&["句号"], &["一句", "号二"], &["一", ""], Some("句号")),
            (&[], &["a", "b"], &["a", "b", ""], None),
        ] {
            assert_eq!(shown(stops, pieces), (strings(expected), stop.map(str::to_owned)), "{stops:?}");
        }
    }
}
