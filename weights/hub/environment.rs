//! The environment variables of Python's huggingface_hub, with the meaning that they have there.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::HubError;

/// Where the hub is unless `HF_ENDPOINT` says otherwise.
pub const ENDPOINT: &str = "https://huggingface.co";
/// How long to wait for an answer, or for the next byte, unless a variable says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What the environment asks for.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The folder with the repositories: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// `HF_ENDPOINT`, without a slash at the end.
    pub endpoint: String,
    /// `HF_TOKEN` or the token file, unless `HF_HUB_DISABLE_IMPLICIT_TOKEN`.
    pub token: Option<Token>,
    /// `HF_HUB_OFFLINE` or, where that is empty, `TRANSFORMERS_OFFLINE`.
    pub network: Reach,
    /// How long to wait for an answer: `HF_HUB_ETAG_TIMEOUT`.
    pub answer_timeout: Duration,
    /// How long to wait for the next byte: `HF_HUB_DOWNLOAD_TIMEOUT`.
    pub byte_timeout: Duration,
    /// Whether `HF_HUB_DISABLE_PROGRESS_BARS` allows progress bars.
    pub bars: Bars,
    /// How files get into a snapshot: `HF_HUB_DISABLE_SYMLINKS`.
    pub placing: Placing,
    /// The proxies.
    pub proxies: Proxies,
    /// `SSL_CERT_FILE`: the certificates to trust in place of the usual ones.
    pub certificates: Option<PathBuf>,
}

/// Whether the network may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// It may.
    Online,
    /// Not a single request.
    Offline,
}

/// Whether progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bars {
    /// Where there is a terminal.
    Shown,
    /// Never.
    Hidden,
}

/// How a file of a snapshot leads to its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placing {
    /// By a symbolic link; by a copy where that fails.
    Link,
    /// By a copy.
    Copy,
}

/// A secret. Its `Debug` does not show it, and it has no `Display`.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(String);

impl Token {
    /// The value of the header `Authorization`.
    pub(super) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    fn read(text: &str, origin: &str) -> Result<Option<Self>, HubError> {
        let text: String = text.chars().filter(|c| !matches!(c, '\r' | '\n')).collect();
        let text = text.trim();
        match text {
            "" => Ok(None),
            _ if text.bytes().all(|byte| byte.is_ascii_graphic()) => Ok(Some(Self(text.into()))),
            _ => Err(HubError::Token { origin: origin.into() }),
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Which proxy leads where.
#[derive(Clone, Default)]
pub struct Proxies {
    http: Option<String>,
    https: Option<String>,
    all: Option<String>,
    /// Hosts that are reached directly; `*` is every host.
    none: Vec<String>,
}

impl fmt::Debug for Proxies {
    /// A proxy's address may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxies(…)")
    }
}

impl Proxies {
    /// The proxy for a host, if there is one. `scheme` is `http` or `https`.
    pub fn to(&self, scheme: &str, host: &str, port: u16) -> Option<&str> {
        let host = host.to_ascii_lowercase();
        let is_direct = self.none.iter().any(|entry| {
            let entry = entry.strip_suffix(&format!(":{port}")).unwrap_or(entry);
            let domain = entry.trim_start_matches("*.").trim_start_matches('.');
            entry == "*" || host == domain || host.ends_with(&format!(".{domain}"))
        });
        let own = if scheme == "https" { &self.https } else { &self.http };
        own.as_deref().or(self.all.as_deref()).filter(|_| !is_direct)
    }
}

impl Environment {
    /// That of this process.
    ///
    /// # Errors
    /// If a variable cannot be followed.
    pub fn read() -> Result<Self, HubError> {
        Self::of(|name| std::env::var(name).ok(), std::env::home_dir())
    }

    /// That in which the variables have the values that `variable` gives, for a user at `home`.
    ///
    /// # Errors
    /// If a variable cannot be followed.
    pub fn of(variable: impl Fn(&str) -> Option<String>, home: Option<PathBuf>) -> Result<Self, HubError> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let is_true = |name: &str| set(name).is_some_and(|value| is_true(&value));
        let path = |text: String| expand(&text, home.as_deref(), &variable);

        let hf_home = set("HF_HOME").map(path).unwrap_or_else(|| {
            let caches = set("XDG_CACHE_HOME").map(path);
            let caches = caches.unwrap_or_else(|| home.clone().unwrap_or_default().join(".cache"));
            caches.join("huggingface")
        });
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")).map(path);
        let token_file = set("HF_TOKEN_PATH").map_or_else(|| hf_home.join("token"), path);
        let token = match is_true("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            true => None,
            false => {
                match ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"].into_iter().find(|name| set(name).is_some()) {
                    Some(name) => match Token::read(&set(name).unwrap_or_default(), name)? {
                        Some(token) => Some(token),
                        None => token_in(&token_file)?,
                    },
                    None => token_in(&token_file)?,
                }
            }
        };

        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.into());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
        if rest.is_none_or(|rest| rest.is_empty() || rest.contains(['@', '?', '#', ' '])) {
            return Err(HubError::Variable {
                name: "HF_ENDPOINT",
                found: endpoint.rsplit('@').next().unwrap_or_default().into(),
                expected: "it should read https://HOST or http://HOST, without a user",
            });
        }

        let seconds = |name: &'static str| match set(name) {
            None => Ok(TIMEOUT),
            Some(text) => match text.trim().parse::<u64>() {
                Ok(0) => Ok(TIMEOUT),
                Ok(seconds) => Ok(Duration::from_secs(seconds)),
                Err(_) => {
                    Err(HubError::Variable { name, found: text, expected: "it should be whole seconds" })
                }
            },
        };
        // The lower-case names come first; a server that runs CGI programs sets HTTP_PROXY from a request's header.
        let proxy = |lower: &str, upper: &str| set(lower).or_else(|| set(upper));
        let offline = set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE"));
        Ok(Self {
            cache: cache.unwrap_or_else(|| hf_home.join("hub")),
            endpoint,
            token,
            network: if offline.is_some_and(|value| self::is_true(&value)) {
                Reach::Offline
            } else {
                Reach::Online
            },
            answer_timeout: seconds("HF_HUB_ETAG_TIMEOUT")?,
            byte_timeout: seconds("HF_HUB_DOWNLOAD_TIMEOUT")?,
            bars: if is_true("HF_HUB_DISABLE_PROGRESS_BARS") { Bars::Hidden } else { Bars::Shown },
            placing: if is_true("HF_HUB_DISABLE_SYMLINKS") { Placing::Copy } else { Placing::Link },
            proxies: Proxies {
                http: proxy("http_proxy", "HTTP_PROXY"),
                https: proxy("https_proxy", "HTTPS_PROXY"),
                all: proxy("all_proxy", "ALL_PROXY"),
                none: proxy("no_proxy", "NO_PROXY")
                    .map(|list| {
                        list.split(',').map(|host| host.trim().to_ascii_lowercase()).collect::<Vec<_>>()
                    })
                    .unwrap_or_default()
                    .into_iter()
                    .filter(|host| !host.is_empty())
                    .collect(),
            },
            certificates: set("SSL_CERT_FILE").map(path),
        })
    }
}

/// The words that Python's client takes for yes.
fn is_true(value: &str) -> bool {
    ["1", "ON", "YES", "TRUE"].contains(&value.to_ascii_uppercase().as_str())
}

fn token_in(file: &Path) -> Result<Option<Token>, HubError> {
    match std::fs::read_to_string(file) {
        Ok(text) => Token::read(&text, &file.display().to_string()),
        // no token is no failure: most repositories need none
        Err(_) => Ok(None),
    }
}

/// A path with `~`, `$NAME` and `${NAME}` replaced; unknown names stay.
fn expand(text: &str, home: Option<&Path>, variable: &impl Fn(&str) -> Option<String>) -> PathBuf {
    let text = match (text.strip_prefix('~'), home) {
        (Some(rest), Some(home)) if rest.is_empty() || rest.starts_with('/') => {
            format!("{}{rest}", home.display())
        }
        _ => text.to_owned(),
    };
    let mut expanded = String::new();
    let mut rest = text.as_str();
    while let Some(at) = rest.find('$') {
        expanded.push_str(&rest[..at]);
        let after = &rest[at + 1..];
        let (name, length) = match after.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
            Some((name, _)) => (name, name.len() + 2),
            None => {
                let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(after.len());
                (&after[..end], end)
            }
        };
        match variable(name) {
            Some(value) => expanded.push_str(&value),
            None => expanded.push_str(&rest[at..at + 1 + length]),
        }
        rest = &after[length..];
    }
    expanded.push_str(rest);
    expanded.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> Result<Environment, HubError> {
        let find = |name: &str| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.to_string())
        };
        Environment::of(find, Some("/home/me".into()))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        for (variables, cache) in [
            (&[][..], "/home/me/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/hf"), ("XDG_CACHE_HOME", "/x")], "/home/me/hf/hub"),
            (&[("HF_HOME", "$DATA/hf"), ("DATA", "/d")], "/d/hf/hub"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/h")], "/old"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HUB_CACHE", "${A}b$C"), ("A", "/a")], "/ab$C"),
        ] {
            assert_eq!(with(variables).unwrap().cache, Path::new(cache), "{variables:?}");
        }
    }

    #[test]
    fn offline_takes_pythons_words() {
        for (variables, network) in [
            (&[("HF_HUB_OFFLINE", "1")][..], Reach::Offline),
            (&[("HF_HUB_OFFLINE", "yes")], Reach::Offline),
            (&[("HF_HUB_OFFLINE", "on")], Reach::Offline),
            (&[("HF_HUB_OFFLINE", "2")], Reach::Online),
            (&[("TRANSFORMERS_OFFLINE", "True")], Reach::Offline),
            (&[("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")], Reach::Online),
            (&[("HF_HUB_OFFLINE", ""), ("TRANSFORMERS_OFFLINE", "1")], Reach::Offline),
        ] {
            assert_eq!(with(variables).unwrap().network, network, "{variables:?}");
        }
    }

    #[test]
    fn a_token_is_found_and_never_shown() {
        let home = tempfile::tempdir().unwrap();
        std::fs::write(home.path().join("token"), "hf_file\n").unwrap();
        let home = home.path().to_str().unwrap();
        for (variables, token) in [
            (&[("HF_HOME", home)][..], Some("Bearer hf_file")),
            (&[("HF_HOME", home), ("HF_TOKEN", "hf_env\r\n")], Some("Bearer hf_env")),
            (&[("HF_HOME", home), ("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("Bearer hf_old")),
            (&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_TOKEN", "x")], None),
            (&[], None),
        ] {
            let environment = with(variables).unwrap();
            assert_eq!(environment.token.as_ref().map(Token::header).as_deref(), token, "{variables:?}");
            assert!(!format!("{environment:?}").contains("hf_"));
        }
        let error = with(&[("HF_TOKEN", "two words")]).unwrap_err();
        assert!(error.to_string().contains("HF_TOKEN") && !error.to_string().contains("two words"));
    }

    #[test]
    fn timeouts_and_endpoints_that_make_no_sense_are_told() {
        let environment =
            with(&[("HF_HUB_ETAG_TIMEOUT", "3"), ("HF_ENDPOINT", "http://mirror:8080/")]).unwrap();
        assert_eq!(environment.answer_timeout, Duration::from_secs(3));
        assert_eq!(environment.byte_timeout, TIMEOUT);
        assert_eq!(environment.endpoint, "http://mirror:8080");
        assert!(with(&[("HF_HUB_DOWNLOAD_TIMEOUT", "soon")]).unwrap_err().to_string().contains("soon"));
        let error = with(&[("HF_ENDPOINT", "https://me:secret@host")]).unwrap_err().to_string();
        assert!(error.contains("host") && !error.contains("secret"), "{error}");
        assert!(with(&[("HF_ENDPOINT", "huggingface.co")]).is_err());
    }

    #[test]
    fn proxies_by_scheme_and_host() {
        let proxies = with(&[
            ("https_proxy", "http://secure:1"),
            ("HTTP_PROXY", "http://plain:2"),
            ("NO_PROXY", "internal, .example.com,127.0.0.1:8080"),
        ])
        .unwrap()
        .proxies;
        assert_eq!(proxies.to("https", "huggingface.co", 443), Some("http://secure:1"));
        assert_eq!(proxies.to("http", "127.0.0.1", 80), Some("http://plain:2"));
        for (host, port) in
            [("internal", 80), ("a.example.com", 443), ("example.com", 443), ("127.0.0.1", 8080)]
        {
            assert_eq!(proxies.to("https", host, port), None, "{host}");
        }
        assert_eq!(
            with(&[("ALL_PROXY", "socks5://s:1")]).unwrap().proxies.to("http", "x", 1),
            Some("socks5://s:1")
        );
    }
}
