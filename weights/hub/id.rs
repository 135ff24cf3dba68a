//! Names: of repositories, of revisions, of files.

use std::fmt;
use std::str::FromStr;

use super::error::HubError;

/// A repository and, if it was said, its revision: `owner/name[@revision]`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RepoId {
    /// `owner/name`
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: Option<String>,
}

/// The revision that is meant when none is said.
pub const MAIN: &str = "main";

impl RepoId {
    /// The revision; [`MAIN`] if none was said.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// The full commit that the revision is, if it is one.
    pub fn commit(&self) -> Option<&str> {
        self.revision.as_deref().filter(|revision| is_commit(revision))
    }

    /// The same repository at another revision.
    pub fn at(&self, revision: &str) -> Self {
        Self { name: self.name.clone(), revision: Some(revision.into()) }
    }
}

impl FromStr for RepoId {
    type Err = HubError;

    fn from_str(text: &str) -> Result<Self, HubError> {
        let refuse = |problem| HubError::Id { found: text.into(), problem };
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let (owner, repository) = name.split_once('/').ok_or(refuse("it does not read owner/name"))?;
        for part in [owner, repository] {
            let is_word = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if part.is_empty() || !part.chars().all(is_word) {
                return Err(refuse("owner and name are letters, digits, `-`, `_` and `.`"));
            }
            if part.starts_with(['-', '.']) || part.ends_with(['-', '.']) {
                return Err(refuse("owner and name neither start nor end with `-` or `.`"));
            }
            if part.contains("--") || part.contains("..") {
                return Err(refuse("`--` and `..` are not allowed"));
            }
        }
        if name.len() > 96 {
            return Err(refuse("it has more than 96 characters"));
        }
        if let Some(revision) = revision {
            check_path(revision).map_err(|_| refuse("the revision after `@` cannot be one"))?;
        }
        Ok(Self { name: name.into(), revision: revision.map(Into::into) })
    }
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// Whether this is a full commit: 40 lower-case hexadecimal digits.
pub fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Why a file name from outside is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum NameError {
    #[error("it is empty or has an empty part")]
    Empty,
    #[error("it has a part `.` or `..`")]
    Dots,
    #[error("it has a backslash, a colon or a control character")]
    Character,
    #[error("it is too long")]
    Long,
}

/// Whether a relative path with `/` stays below the folder it is joined to, on every system.
///
/// # Errors
/// If it does not, or might not.
pub fn check_path(path: &str) -> Result<(), NameError> {
    if path.len() > 1024 {
        return Err(NameError::Long);
    }
    if path.chars().any(|c| matches!(c, '\\' | ':') || c.is_control()) {
        return Err(NameError::Character);
    }
    for part in path.split('/') {
        match part {
            "" => return Err(NameError::Empty),
            "." | ".." => return Err(NameError::Dots),
            // Windows cuts these off: `.. ` would be `..`
            part if part.ends_with([' ', '.']) => return Err(NameError::Dots),
            part if part.len() > 255 => return Err(NameError::Long),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_reads_owner_name_revision() {
        let id: RepoId = "openai/clip-vit-base-patch32@refs/pr/3".parse().unwrap();
        assert_eq!((id.name.as_str(), id.revision()), ("openai/clip-vit-base-patch32", "refs/pr/3"));
        assert_eq!("a/b".parse::<RepoId>().unwrap().revision(), "main");
        for wrong in [
            "a", "a/b/c", "/b", "a/", "../b", "a/..", "a/b@", "a/b@../x", "a b/c", "a/b--c", "a/-b", "a/b@/x",
        ] {
            assert!(wrong.parse::<RepoId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for safe in
            ["config.json", "unet/diffusion_pytorch_model.safetensors", "a..b", ".gitattributes", "猫.json"]
        {
            assert_eq!(check_path(safe), Ok(()), "{safe}");
        }
        for unsafe_ in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a//b",
            "a/",
            "./a",
            "C:/x",
            "c:x",
            "a\\..\\b",
            "\\\\host\\x",
            "a\0b",
            ".. /x",
            "a/... ",
            "a\nb",
        ] {
            assert!(check_path(unsafe_).is_err(), "{unsafe_:?}");
        }
    }
}
