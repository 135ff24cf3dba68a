//! A page of pictures that needs no other file.

use std::fmt::Write;
use std::path::Path;

use rayon::prelude::*;
use volary_vision::image::{ImageError, ReadOptions, read};

use super::search::{Answer, Found};

/// The longer side of a thumbnail, in pixels: sharp on screens with two pixels a point.
const SIDE: usize = 320;
/// Of the JPEG that a thumbnail is kept in.
const QUALITY: u8 = 82;

const HEAD: &str = r#"<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>volary search</title>
<style>
:root { color-scheme: light dark; font: 15px/1.4 system-ui, sans-serif; }
body { margin: 1.5rem; background: Canvas; color: CanvasText; }
h2 { font-weight: 600; margin: 2rem 0 1rem; }
h2 img { height: 3rem; vertical-align: middle; border-radius: 4px; margin-inline-end: .5rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); }
li { border: 1px solid color-mix(in srgb, CanvasText 20%, Canvas); border-radius: 8px; overflow: hidden; }
.picture { height: 170px; display: flex; align-items: center; justify-content: center;
  background: color-mix(in srgb, CanvasText 6%, Canvas); }
.picture img { max-width: 100%; max-height: 100%; }
.picture em { padding: .5rem; font-size: 12px; overflow-wrap: anywhere; }
p { margin: .4rem .6rem; font-size: 13px; overflow-wrap: anywhere; }
b { font-variant-numeric: tabular-nums; margin-inline-end: .4rem; }
</style>
"#;

/// The page of these answers, each under its query. A picture that can no longer be read says why.
pub fn page(answers: &[Answer]) -> String {
    let mut page = String::from(HEAD);
    for Answer { query, like, images } in answers {
        page += "<h2>";
        for path in like {
            page += &thumbnail(path);
        }
        page += &escaped(query.as_deref().unwrap_or_default());
        page += "</h2>\n<ol>\n";
        let thumbnails: Vec<String> = images.par_iter().map(|found| thumbnail(&found.image)).collect();
        for (Found { image, similarity }, thumbnail) in images.iter().zip(thumbnails) {
            let name = escaped(image);
            let _ = writeln!(
                page,
                "<li><div class=\"picture\">{thumbnail}</div><p><b>{similarity:.3}</b>{name}</p></li>"
            );
        }
        page += "</ol>\n";
    }
    page + "</html>\n"
}

/// An element that shows a picture, or why that cannot be.
fn thumbnail(path: &str) -> String {
    let jpeg = || -> Result<Vec<u8>, ImageError> {
        read(Path::new(path), ReadOptions::SEEN)?.thumbnail(SIDE).to_jpeg(QUALITY)
    };
    match jpeg() {
        Ok(jpeg) => {
            format!("<img alt=\"{}\" src=\"data:image/jpeg;base64,{}\">", escaped(path), base64(&jpeg))
        }
        Err(error) => format!("<em>{}</em>", escaped(&error.to_string())),
    }
}

/// Text as HTML shows it, in an element or in quotes.
fn escaped(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut escaped, char| {
        match char {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            _ => escaped.push(char),
        }
        escaped
    })
}

/// RFC 4648, section 4.
pub fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().enumerate().fold(0, |bits, (i, &byte)| bits | u32::from(byte) << (16 - 8 * i));
        for digit in 0..4 {
            text.push(match digit > chunk.len() {
                true => '=',
                false => DIGITS[(bits >> (18 - 6 * digit)) as usize & 63].into(),
            });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The vectors of RFC 4648, section 10.
    #[test]
    fn base64_is_the_standard_s() {
        let cases = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ];
        for (bytes, text) in cases {
            assert_eq!(base64(bytes.as_bytes()), text);
        }
        assert_eq!(base64(&[0xFB, 0xFF]), "+/8=");
    }

    #[test]
    fn names_and_texts_cannot_break_out() {
        let name = "gone<script>\"'&.png";
        let found = Found { image: name.into(), similarity: 0.5 };
        let page = page(&[Answer { query: Some("<b>猫".into()), like: Vec::new(), images: vec![found] }]);
        assert!(page.contains("gone&lt;script&gt;&quot;&#39;&amp;.png") && page.contains("&lt;b&gt;猫"));
        assert!(!page.contains("<script>") && !page.contains("<b>猫"));
    }
}
