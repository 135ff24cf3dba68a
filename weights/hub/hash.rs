//! The two hashes by which the hub names contents.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};

/// So much of a file is held while it is hashed.
const CHUNK: usize = 1 << 20;

/// The name of a content: what the hub's ETag says.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Hash {
    /// SHA-256 of the bytes: files in large file storage. 64 hexadecimal digits.
    Sha256(String),
    /// SHA-1 of `blob LENGTH\0` and the bytes, as git names them: all other files. 40 hexadecimal digits.
    Git(String),
}

impl Hash {
    /// Reads 64 or 40 hexadecimal digits, with the quotes and the `W/` of an ETag or without.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let text = text.strip_prefix("W/").unwrap_or(text).trim_matches('"').to_ascii_lowercase();
        let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
        match text.len() {
            64 if is_hex => Some(Hash::Sha256(text)),
            40 if is_hex => Some(Hash::Git(text)),
            _ => None,
        }
    }

    /// What it is called.
    pub fn kind(&self) -> &'static str {
        match self {
            Hash::Sha256(_) => "sha256",
            Hash::Git(_) => "git object id",
        }
    }

    /// Its digits.
    pub fn digits(&self) -> &str {
        match self {
            Hash::Sha256(digits) | Hash::Git(digits) => digits,
        }
    }

    /// The hash of a file, of the same kind as this one.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_file_like(&self, path: &Path) -> io::Result<Hash> {
        match self {
            Hash::Sha256(_) => sha256(path),
            Hash::Git(_) => git(path),
        }
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.digits())
    }
}

/// SHA-256 of what is added piece by piece.
#[derive(Clone, Default)]
pub(super) struct Hasher(Sha256);

impl Hasher {
    /// Adds what comes next.
    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// Adds what is in a file.
    pub(super) fn add_file(&mut self, file: &mut File) -> io::Result<u64> {
        each_chunk(file, |chunk| self.add(chunk))
    }

    /// The hash of all that was added.
    pub(super) fn finish(self) -> Hash {
        Hash::Sha256(hex(&self.0.finalize()))
    }
}

/// SHA-256 of a file.
///
/// # Errors
/// If it cannot be read.
pub fn sha256(path: &Path) -> io::Result<Hash> {
    let mut hasher = Hasher::default();
    hasher.add_file(&mut File::open(path)?)?;
    Ok(hasher.finish())
}

/// The name that git gives to a file's content.
fn git(path: &Path) -> io::Result<Hash> {
    let mut file = File::open(path)?;
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", file.metadata()?.len()));
    each_chunk(&mut file, |chunk| hasher.update(chunk))?;
    Ok(Hash::Git(hex(&hasher.finalize())))
}

fn each_chunk(file: &mut File, mut add: impl FnMut(&[u8])) -> io::Result<u64> {
    let (mut chunk, mut total) = (vec![0; CHUNK], 0);
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok(total),
            Ok(read) => {
                add(&chunk[..read]);
                total += read as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn git_and_sha256_name_a_known_content() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "hello\n").unwrap();
        // `git hash-object` and `sha256sum` of the same
        assert_eq!(git(file.path()).unwrap().digits(), "ce013625030ba8dba906f756967f9e9ca394464a");
        assert_eq!(
            sha256(file.path()).unwrap().digits(),
            "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"
        );
    }

    #[test]
    fn etags_are_read_with_and_without_quotes() {
        let digits = "ce013625030ba8dba906f756967f9e9ca394464a";
        for text in [digits.to_owned(), format!("\"{digits}\""), format!("W/\"{}\"", digits.to_uppercase())] {
            assert_eq!(Hash::parse(&text), Some(Hash::Git(digits.into())), "{text}");
        }
        for text in ["", "\"cdn\"", "ce0136", &"g".repeat(40), &format!("../{}", &digits[3..])] {
            assert_eq!(Hash::parse(text), None, "{text}");
        }
    }
}
