//! Small pictures in a terminal, each drawn over the one before.

use std::env;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use volary_vision::image::Rgb8;

use super::contact_sheet::base64;

/// The longer side in half rows of text.
const SIDE: usize = 40;
/// The longer side in pixels, where a terminal shows pictures.
const PIXELS: usize = 320;
/// Of a JPEG.
const QUALITY: u8 = 85;
/// For one part of time that goes into previews, so many go into the picture.
const SPARED: u32 = 4;

/// How a terminal shows pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Protocol {
    /// Kitty's graphics, <https://sw.kovidgoyal.net/kitty/graphics-protocol/>.
    Kitty,
    /// iTerm2's inline images, <https://iterm2.com/documentation-images.html>.
    Iterm,
    /// Two colours a character.
    HalfBlocks,
}

impl Protocol {
    /// What a terminal says of itself in the environment.
    fn of(variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let is = |name: &str, values: &[&str]| {
            variable(name).is_some_and(|value| values.iter().any(|part| value.contains(part)))
        };
        let is_between = is("TERM", &["screen", "tmux"]); // it swallows what it does not know
        match () {
            () if !is_between && (is("TERM", &["kitty", "ghostty"]) || is("TERM_PROGRAM", &["ghostty"])) => {
                Some(Protocol::Kitty)
            }
            () if !is_between && is("TERM_PROGRAM", &["iTerm.app", "WezTerm"]) => Some(Protocol::Iterm),
            () if is("COLORTERM", &["truecolor", "24bit"]) => Some(Protocol::HalfBlocks),
            () => None,
        }
    }
}

/// Previews on standard error.
pub struct Preview {
    protocol: Protocol,
    /// Rows of text that the last one takes, above the cursor.
    shown: usize,
    /// When the last one was done, and how long it took.
    last: Option<(Instant, Duration)>,
}

impl Preview {
    /// None where standard error is no terminal that can.
    pub fn of_terminal() -> Option<Self> {
        let protocol = Protocol::of(|name| env::var(name).ok()).filter(|_| io::stderr().is_terminal())?;
        Some(Self { protocol, shown: 0, last: None })
    }

    /// Whether another one takes no more than its share of time.
    pub fn is_due(&self) -> bool {
        self.last.is_none_or(|(done, took)| done.elapsed() >= SPARED * took)
    }

    /// Shows a picture that was asked for at `begin`. A terminal that went away is no failure.
    pub fn show(&mut self, picture: &Rgb8, begin: Instant) {
        let (frame, rows) = frame(self.protocol, picture, self.shown);
        // in one piece: an interrupt leaves no colour behind
        let _ = io::stderr().lock().write_all(frame.as_bytes());
        self.shown = rows;
        self.last = Some((Instant::now(), begin.elapsed()));
    }

    /// The next one stands below.
    pub fn leave(&mut self) {
        self.shown = 0;
    }
}

/// A picture as a terminal takes it, and the rows of text that it takes. It covers the one before, of `shown` rows; the
/// cursor is left below.
fn frame(protocol: Protocol, picture: &Rgb8, shown: usize) -> (String, usize) {
    let small = picture.thumbnail(SIDE);
    let (columns, rows) = (small.width(), small.height().div_ceil(2));
    let room = "\n".repeat(rows.saturating_sub(shown));
    let mut frame = format!("{room}\x1b[{}A\r", rows.max(shown));
    match protocol {
        Protocol::Kitty => {
            let picture = picture.thumbnail(PIXELS);
            let text = base64(picture.pixels());
            let mut pieces = text.as_bytes().chunks(4096).peekable();
            let (width, height) = (picture.width(), picture.height());
            let mut head = format!("a=T,f=24,s={width},v={height},c={columns},r={rows},i=1,p=1,q=2,C=1,");
            while let Some(piece) = pieces.next() {
                let more = u8::from(pieces.peek().is_some());
                let piece = String::from_utf8_lossy(piece);
                frame += &format!("\x1b_G{head}m={more};{piece}\x1b\\");
                head.clear();
            }
            frame += &format!("\x1b[{rows}B");
        }
        Protocol::Iterm => {
            // a thumbnail is never too large for a JPEG
            let jpeg = picture.thumbnail(PIXELS).to_jpeg(QUALITY).unwrap_or_default();
            let picture = base64(&jpeg);
            frame += &format!(
                "\x1b7\x1b]1337;File=inline=1;width={columns};height={rows}:{picture}\x07\x1b8\x1b[{rows}B"
            );
        }
        Protocol::HalfBlocks => {
            let pixel = |x: usize, y: usize| &small.pixels()[3 * (y * columns + x)..][..3];
            for row in 0..rows {
                for x in 0..columns {
                    let [r, g, b] = [0, 1, 2].map(|channel| pixel(x, 2 * row)[channel]);
                    frame += &format!("\x1b[38;2;{r};{g};{b}m");
                    if 2 * row + 1 < small.height() {
                        let [r, g, b] = [0, 1, 2].map(|channel| pixel(x, 2 * row + 1)[channel]);
                        frame += &format!("\x1b[48;2;{r};{g};{b}m");
                    }
                    frame.push('▀');
                }
                frame += "\x1b[0m\n";
            }
        }
    }
    (frame, rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terminals_are_known_by_what_they_say() {
        let cases = [
            ("TERM=xterm-kitty COLORTERM=truecolor", Some(Protocol::Kitty)),
            ("TERM=xterm-256color TERM_PROGRAM=iTerm.app", Some(Protocol::Iterm)),
            ("TERM=xterm-256color COLORTERM=truecolor", Some(Protocol::HalfBlocks)),
            ("TERM=tmux-256color TERM_PROGRAM=WezTerm COLORTERM=24bit", Some(Protocol::HalfBlocks)),
            ("TERM=dumb", None),
            ("", None),
        ];
        for (variables, expected) in cases {
            let variable = |name: &str| {
                let mut pairs = variables.split(' ').filter_map(|pair| pair.split_once('='));
                pairs.find(|(known, _)| *known == name).map(|(_, value)| value.to_owned())
            };
            assert_eq!(Protocol::of(variable), expected, "{variables}");
        }
    }

    /// Of three rows of pixels, the last has no lower half.
    #[test]
    fn two_pixels_are_one_character() {
        let picture = Rgb8::new(1, 3, vec![1, 2, 3, 4, 5, 6, 7, 8, 9]).unwrap();
        let upper = "\x1b[38;2;1;2;3m\x1b[48;2;4;5;6m▀\x1b[0m\n";
        let lower = "\x1b[38;2;7;8;9m▀\x1b[0m\n";
        let expected = |room: &str| (format!("{room}\x1b[2A\r{upper}{lower}"), 2);
        assert_eq!(frame(Protocol::HalfBlocks, &picture, 0), expected("\n\n"));
        assert_eq!(frame(Protocol::HalfBlocks, &picture, 2), expected(""), "over the one before");
    }

    #[test]
    fn kitty_gets_pixels_in_pieces() {
        let picture = Rgb8::new(64, 32, vec![0; 64 * 32 * 3]).unwrap();
        let (frame, rows) = frame(Protocol::Kitty, &picture, 10);
        let pieces: Vec<&str> = frame.split("\x1b_G").skip(1).collect();
        assert_eq!((pieces.len(), rows), (2, 10), "6144 bytes are 8192 digits");
        assert!(pieces[0].starts_with("a=T,f=24,s=64,v=32,c=40,r=10,i=1,p=1,q=2,C=1,m=1;AAAA"), "{frame:?}");
        assert!(pieces[1].starts_with("m=0;AAAA") && pieces[1].ends_with("\x1b\\\x1b[10B"));
    }

    #[test]
    fn iterm_gets_a_file() {
        let picture = Rgb8::new(8, 8, vec![9; 8 * 8 * 3]).unwrap();
        let (frame, _) = frame(Protocol::Iterm, &picture, 0);
        assert!(frame.contains("\x1b]1337;File=inline=1;width=8;height=4:/9j/"), "{frame:?}");
    }
}
