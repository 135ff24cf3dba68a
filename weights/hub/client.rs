//! Requests, redirects, retries. The only place where the network is used.

use std::hash::{BuildHasher, RandomState};
use std::io::Read;
use std::sync::Arc;
use std::time::Duration;

use ureq::http::header::{self, HeaderName};
use ureq::http::{HeaderMap, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, TlsConfigBuilder, parse_pem};
use ureq::{Agent, BodyReader, Proxy, Timeout};

use super::environment::{Environment, Token};
use super::error::HubError;
use super::hash::Hash;
use super::id::RepoId;

/// How often something is tried that fails for a reason that may pass.
const ATTEMPTS: u32 = 5;
/// The wait before the second attempt; it doubles with each.
const FIRST_WAIT: Duration = Duration::from_millis(200);
/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(30);
const MOST_REDIRECTS: usize = 10;
/// The longest list or error page that is read.
const LONGEST_TEXT: u64 = 64 << 20;
/// How much of what a server says goes into a message.
const LONGEST_SAYING: usize = 200;

const COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");

/// A hub that may be asked.
///
/// There is none where the network is off: whoever holds a client may use it.
#[derive(Debug)]
pub(super) struct Client {
    agent: Agent,
    endpoint: Uri,
    environment: Environment,
}

/// The method of a request. Nothing here changes anything on the hub.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Get,
    Head,
}

/// How a request gets to its host.
#[derive(Clone, Copy)]
enum Way {
    Direct,
    Proxy,
}

/// The part of a file that is wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Part {
    Whole,
    From(u64),
    /// The first byte and how many.
    Slice(u64, u64),
}

impl Part {
    fn header(self) -> Option<String> {
        match self {
            Part::Whole => None,
            Part::From(start) => Some(format!("bytes={start}-")),
            Part::Slice(start, length) => Some(format!("bytes={start}-{}", start + length.max(1) - 1)),
        }
    }
}

/// An answer after all redirects.
pub(super) struct Answer {
    /// Where it came from, without its query.
    pub(super) url: String,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: BodyReader<'static>,
    /// What the hub said on the way.
    pub(super) meta: Meta,
}

/// What the hub says of a file.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Meta {
    pub(super) commit: Option<String>,
    /// The ETag; that of the linked content where there is one.
    pub(super) etag: Option<String>,
    pub(super) size: Option<u64>,
    /// The repository that a redirect led to, if it was another.
    pub(super) moved_to: Option<String>,
    /// Whether the content comes from elsewhere.
    pub(super) linked: Linked,
}

/// Where a file's content is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Linked {
    #[default]
    Here,
    Elsewhere,
}

/// What `api/models/…/revision/…` says.
pub(super) struct Info {
    pub(super) commit: String,
    pub(super) files: Vec<String>,
    /// The repository that answered.
    pub(super) name: Option<String>,
}

/// A file as `api/models/…/tree/…` lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) size: Option<u64>,
    pub(super) hash: Option<Hash>,
}

impl Client {
    pub(super) fn new(environment: &Environment) -> Result<Self, HubError> {
        let endpoint = parse(&environment.endpoint)?;
        let mut tls = with_cryptography(TlsConfig::builder());
        if let Some(file) = &environment.certificates {
            let io = |source| HubError::Io { path: file.clone(), source };
            let text = std::fs::read(file).map_err(io)?;
            let trusted: Vec<_> = parse_pem(&text)
                .filter_map(|item| match item {
                    Ok(PemItem::Certificate(certificate)) => Some(certificate),
                    _ => None,
                })
                .collect();
            tls = tls.root_certs(RootCerts::Specific(Arc::new(trusted)));
        }
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("volary/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .proxy(None)
            .tls_config(tls.build())
            .timeout_resolve(Some(environment.answer_timeout))
            .timeout_connect(Some(environment.answer_timeout))
            .timeout_send_request(Some(environment.answer_timeout))
            .timeout_per_read(Some(environment.byte_timeout))
            .build()
            .new_agent();
        Ok(Self { agent, endpoint, environment: environment.clone() })
    }

    /// The commit of a revision, and the names of its files.
    pub(super) fn info(&self, repo: &RepoId, name: &str) -> Result<Info, HubError> {
        let revision = encode_segment(repo.revision());
        let path = format!("/api/models/{}/revision/{revision}", encode(name));
        let (json, meta) = self.json(repo, &path)?;
        let url = || shown(&self.url(&path));
        let commit = json["sha"].as_str().filter(|sha| super::id::is_commit(sha));
        let commit = commit.ok_or_else(|| HubError::Answer {
            url: url(),
            problem: "the answer has no commit (`sha` of 40 hexadecimal digits)".into(),
        })?;
        let files = json["siblings"].as_array().ok_or_else(|| HubError::Answer {
            url: url(),
            problem: "the answer has no list of files (`siblings`)".into(),
        })?;
        let files = files.iter().filter_map(|file| file["rfilename"].as_str().map(Into::into)).collect();
        Ok(Info { commit: commit.into(), files, name: meta.moved_to })
    }

    /// Every file of a commit, with sizes and hashes.
    pub(super) fn tree(&self, repo: &RepoId, name: &str, commit: &str) -> Result<Vec<Listed>, HubError> {
        let mut url = self.url(&format!("/api/models/{}/tree/{commit}?recursive=true", encode(name)));
        let mut files = Vec::new();
        // a thousand pages of a thousand files
        for _ in 0..1000 {
            let (json, headers) = self.json_at(repo, &url)?;
            let page = json.as_array().ok_or_else(|| HubError::Answer {
                url: shown(&url),
                problem: "the answer is no list of files".into(),
            })?;
            files.extend(page.iter().filter(|entry| entry["type"] == "file").filter_map(|entry| {
                let sha256 = entry["lfs"]["oid"].as_str();
                let sha256 = sha256.map(|oid| oid.strip_prefix("sha256:").unwrap_or(oid));
                let oid = if entry["lfs"].is_object() { sha256 } else { entry["oid"].as_str() };
                Some(Listed {
                    name: entry["path"].as_str()?.into(),
                    size: entry["lfs"]["size"].as_u64().or(entry["size"].as_u64()),
                    hash: oid.and_then(Hash::parse),
                })
            }));
            let next = headers.get(header::LINK).and_then(|link| next_page(link.to_str().ok()?));
            let Some(next) = next else { return Ok(files) };
            // Mirrors pass on the address of the hub behind them: the list is asked of the endpoint and of no other.
            let next = join(&url, &next)?;
            let path = next.path_and_query().map(ToString::to_string).unwrap_or_default();
            url = join(&self.endpoint, &path)?;
        }
        Err(HubError::Answer { url: shown(&url), problem: "the list of files does not end".into() })
    }

    /// The repository that has taken the place of `name`, if requests for its files are redirected.
    pub(super) fn renamed(&self, repo: &RepoId, name: &str) -> Option<String> {
        let url = self.file_url(name, repo.revision(), "config.json");
        let answer = self.follow(repo, Method::Head, &url, Part::Whole).ok()?;
        answer.meta.moved_to
    }

    /// What the hub says of a file, without its content.
    pub(super) fn meta(&self, repo: &RepoId, name: &str, commit: &str, file: &str) -> Result<Meta, HubError> {
        let url = self.file_url(name, commit, file);
        with_retries(|| {
            let answer = self.follow(repo, Method::Head, &url, Part::Whole)?;
            self.check_status(repo, file, commit, answer).map(|answer| answer.meta)
        })
    }

    /// A file's content, or a part of it. Tried once. A status 416 is handed back, other failures are errors.
    pub(super) fn file(
        &self,
        repo: &RepoId,
        name: &str,
        commit: &str,
        file: &str,
        part: Part,
    ) -> Result<Answer, HubError> {
        let url = self.file_url(name, commit, file);
        let answer = self.follow(repo, Method::Get, &url, part)?;
        if answer.status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(answer);
        }
        self.check_status(repo, file, commit, answer)
    }

    /// Where people see the repository.
    pub(super) fn page(&self, repo: &RepoId) -> String {
        format!("{}/{}", self.environment.endpoint, repo.name)
    }

    fn url(&self, path: &str) -> Uri {
        parse(&format!("{}{path}", self.environment.endpoint)).unwrap_or_else(|_| self.endpoint.clone())
    }

    fn file_url(&self, name: &str, revision: &str, file: &str) -> Uri {
        let revision = encode_segment(revision);
        self.url(&format!("/{}/resolve/{revision}/{}", encode(name), encode(file)))
    }

    fn json(&self, repo: &RepoId, path: &str) -> Result<(serde_json::Value, Meta), HubError> {
        let url = self.url(path);
        with_retries(|| {
            let answer = self.follow(repo, Method::Get, &url, Part::Whole)?;
            let answer = self.check_status(repo, "", repo.revision(), answer)?;
            let meta = answer.meta.clone();
            Ok((read_json(answer)?, meta))
        })
    }

    fn json_at(&self, repo: &RepoId, url: &Uri) -> Result<(serde_json::Value, HeaderMap), HubError> {
        with_retries(|| {
            let answer = self.follow(repo, Method::Get, url, Part::Whole)?;
            let answer = self.check_status(repo, "", repo.revision(), answer)?;
            let headers = answer.headers.clone();
            Ok((read_json(answer)?, headers))
        })
    }

    /// Sends a request and follows where it leads. The token goes to the endpoint's own origin and nowhere else.
    fn follow(&self, repo: &RepoId, method: Method, url: &Uri, part: Part) -> Result<Answer, HubError> {
        let (asked, asked_url) = (repo_in(url), url);
        let mut url = url.clone();
        let mut meta = Meta::default();
        for _ in 0..MOST_REDIRECTS {
            let response = self.send(method, &url, part)?;
            let (head, body) = response.into_parts();
            let is_endpoint = origin(&url) == origin(&self.endpoint);
            let text = |name: &HeaderName| head.headers.get(name).and_then(|value| value.to_str().ok());
            let number = |name: &HeaderName| text(name).and_then(|value| value.trim().parse().ok());
            let location = text(&header::LOCATION).filter(|_| head.status.is_redirection());
            // What a content server says of itself (another ETag) is nothing that the hub says.
            if is_endpoint {
                let commit = text(&COMMIT).map(str::to_owned);
                if commit.is_some() || location.is_none() {
                    let plain = number(&header::CONTENT_LENGTH)
                        .filter(|_| location.is_none() && head.status == StatusCode::OK);
                    meta.etag = text(&LINKED_ETAG).or(text(&header::ETAG)).map(str::to_owned).or(meta.etag);
                    meta.size = number(&LINKED_SIZE).or(plain).or(meta.size);
                }
                meta.commit = commit.or(meta.commit);
            }
            let Some(location) = location else {
                if meta.moved_to.is_none() && is_endpoint {
                    meta.moved_to = repo_in(&url).filter(|name| Some(name) != asked.as_ref());
                }
                let elsewhere = if is_endpoint { String::new() } else { format!(" (at {})", host(&url)) };
                return Ok(Answer {
                    url: format!("{}{elsewhere}", shown(asked_url)),
                    status: head.status,
                    headers: head.headers,
                    body: body.into_with_config().limit(u64::MAX).reader(),
                    meta,
                });
            };
            let next = join(&url, location)?;
            if origin(&next) == origin(&self.endpoint) {
                meta.moved_to = repo_in(&next).filter(|name| Some(name) != asked.as_ref());
            } else if method == Method::Head {
                // The hub has said everything; the content server need not be asked.
                meta.linked = Linked::Elsewhere;
                return Ok(Answer {
                    url: shown(&url),
                    status: StatusCode::OK,
                    headers: head.headers,
                    body: body.into_with_config().limit(0).reader(),
                    meta,
                });
            } else {
                meta.linked = Linked::Elsewhere;
            }
            url = next;
        }
        let problem = format!("more than {MOST_REDIRECTS} redirects ({repo})");
        Err(HubError::Redirect { url: shown(&url), problem })
    }

    /// One request, one answer.
    fn send(
        &self,
        method: Method,
        url: &Uri,
        part: Part,
    ) -> Result<ureq::http::Response<ureq::Body>, HubError> {
        if url.scheme_str() == Some("https") && !has_cryptography() {
            return Err(HubError::Insecure {
                url: shown(url),
                reason: "this processor lacks the instructions that the encryption here is written in".into(),
            });
        }
        let timeout = match method {
            Method::Head => self.environment.answer_timeout,
            Method::Get => self.environment.byte_timeout.max(self.environment.answer_timeout),
        };
        let scheme = url.scheme_str().unwrap_or_default();
        let proxy = self.environment.proxies.to(scheme, host(url), port(url));
        let proxy = proxy.map(Proxy::new).transpose().map_err(|_| HubError::Unreachable {
            url: shown(url),
            reason: "the proxy of the environment (HTTPS_PROXY, HTTP_PROXY, ALL_PROXY) is no address".into(),
        })?;
        let way = if proxy.is_some() { Way::Proxy } else { Way::Direct };
        let request = match method {
            Method::Get => self.agent.get(url),
            Method::Head => self.agent.head(url),
        };
        let mut request = request.config().proxy(proxy).timeout_recv_response(Some(timeout)).build();
        if let Some(range) = part.header() {
            request = request.header(header::RANGE, range);
        }
        if let Some(token) = &self.environment.token
            && origin(url) == origin(&self.endpoint)
        {
            request = request.header(header::AUTHORIZATION, Token::header(token));
        }
        request.call().map_err(|error| match (self.failure(url, timeout, error), way) {
            (HubError::Unreachable { url, reason }, Way::Proxy) => HubError::Unreachable {
                url,
                reason: format!("{reason} (through the proxy of the environment)"),
            },
            (error, _) => error,
        })
    }

    /// What a failed request means.
    fn failure(&self, url: &Uri, timeout: Duration, error: ureq::Error) -> HubError {
        let url = shown(url);
        let unreachable = |reason: String| HubError::Unreachable { url: url.clone(), reason };
        match error {
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => unreachable(format!(
                "no connection within {} s",
                self.environment.answer_timeout.as_secs_f32()
            )),
            ureq::Error::Timeout(Timeout::PerRead) => {
                HubError::Stalled { url, wait: self.environment.byte_timeout }
            }
            ureq::Error::Timeout(_) => HubError::Stalled { url, wait: timeout },
            ureq::Error::HostNotFound => HubError::NoHost { url },
            // the system's own words for it
            ureq::Error::Io(error) if error.to_string().contains("failed to lookup address") => {
                HubError::NoHost { url }
            }
            // a certificate, or an answer that is no TLS
            ureq::Error::Io(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                HubError::Insecure { url, reason: error.to_string() }
            }
            ureq::Error::Io(error) => unreachable(error.to_string()),
            ureq::Error::ConnectProxyFailed(reason) => unreachable(format!("the proxy refused: {reason}")),
            ureq::Error::Rustls(error) => HubError::Insecure { url, reason: error.to_string() },
            ureq::Error::Tls(reason) => HubError::Insecure { url, reason: reason.into() },
            ureq::Error::BadUri(_) => unreachable("this is no address".into()),
            other => unreachable(other.to_string()),
        }
    }

    /// What ended a body early.
    pub(super) fn broken_body(
        &self,
        url: &str,
        error: &std::io::Error,
        found: u64,
        expected: Option<u64>,
    ) -> HubError {
        let timed_out = error.kind() == std::io::ErrorKind::TimedOut
            || error
                .get_ref()
                .and_then(|inner| inner.downcast_ref())
                .is_some_and(|inner| matches!(inner, ureq::Error::Timeout(_)));
        if timed_out {
            HubError::Stalled { url: url.into(), wait: self.environment.byte_timeout }
        } else {
            HubError::Cut { url: url.into(), expected, found }
        }
    }

    /// The error that a status means, if it means one.
    fn check_status(
        &self,
        repo: &RepoId,
        file: &str,
        revision: &str,
        answer: Answer,
    ) -> Result<Answer, HubError> {
        let status = answer.status.as_u16();
        let text = |name: &HeaderName| {
            let value = answer.headers.get(name).and_then(|value| value.to_str().ok());
            value.unwrap_or_default().to_owned()
        };
        let is_page = text(&header::CONTENT_TYPE).starts_with("text/html");
        if answer.status.is_success() {
            if is_page && answer.meta.commit.is_none() {
                return Err(HubError::WebPage { url: answer.url });
            }
            return Ok(answer);
        }
        let code = text(&ERROR_CODE);
        let message = text(&ERROR_MESSAGE);
        let repo = repo.clone();
        let wait = text(&header::RETRY_AFTER).trim().parse().ok().map(Duration::from_secs);
        let url = answer.url.clone();
        Err(match (status, code.as_str()) {
            (_, "GatedRepo") => HubError::Gated { page: self.page(&repo), repo },
            (_, "RepoNotFound") => {
                HubError::NoRepository { repo, endpoint: self.environment.endpoint.clone() }
            }
            (_, "RevisionNotFound") => HubError::NoRevision { repo, revision: revision.into() },
            (_, "EntryNotFound") if !file.is_empty() => {
                HubError::NoFile { repo, file: file.into(), revision: revision.into() }
            }
            (404, _) if !file.is_empty() => {
                HubError::NoFile { repo, file: file.into(), revision: revision.into() }
            }
            (404, _) => HubError::NoRepository { repo, endpoint: self.environment.endpoint.clone() },
            // The hub answers so for a repository that does not exist when there is no token.
            (401, "") if self.environment.token.is_none() && file.is_empty() => {
                HubError::NoRepository { repo, endpoint: self.environment.endpoint.clone() }
            }
            (401 | 403, _) => HubError::Denied { repo, url, status, message: saying(answer, message) },
            _ => HubError::Status { url, status, message: saying(answer, message), wait },
        })
    }
}

/// The first line of what a server says of its refusal, unless that is a web page.
fn saying(mut answer: Answer, header: String) -> String {
    if !header.is_empty() {
        return header.chars().take(LONGEST_SAYING).collect();
    }
    let mut text = Vec::new();
    let _ = answer.body.by_ref().take(4096).read_to_end(&mut text);
    let text = String::from_utf8_lossy(&text);
    let said = serde_json::from_str::<serde_json::Value>(&text).ok();
    let said = said.as_ref().and_then(|json| json["error"].as_str()).unwrap_or(&text).trim();
    if said.starts_with(['<', '{']) {
        return String::new();
    }
    said.lines().next().unwrap_or_default().chars().filter(|c| !c.is_control()).take(LONGEST_SAYING).collect()
}

fn read_json(mut answer: Answer) -> Result<serde_json::Value, HubError> {
    let mut text = Vec::new();
    let url = answer.url;
    if let Err(error) = answer.body.by_ref().take(LONGEST_TEXT).read_to_end(&mut text) {
        return Err(match error.kind() {
            std::io::ErrorKind::TimedOut => HubError::Stalled { url, wait: Duration::ZERO },
            _ => HubError::Cut { url, expected: None, found: text.len() as u64 },
        });
    }
    serde_json::from_slice(&text).map_err(|error| match text.trim_ascii_start().first() {
        Some(b'<') => HubError::WebPage { url },
        _ => HubError::Answer { url, problem: format!("the answer is no JSON: {error}") },
    })
}

/// Tries again what fails for a reason that may pass.
pub(super) fn with_retries<T>(mut attempt: impl FnMut() -> Result<T, HubError>) -> Result<T, HubError> {
    let mut patience = Patience::default();
    loop {
        match attempt() {
            Ok(value) => return Ok(value),
            Err(error) => patience.wait(error)?,
        }
    }
}

/// How much longer to try.
#[derive(Default)]
pub(super) struct Patience {
    failures: u32,
}

impl Patience {
    /// Something went forward: failures before do not count.
    pub(super) fn restore(&mut self) {
        self.failures = 0;
    }

    /// Waits before the next attempt; gives the error back if there should be none.
    pub(super) fn wait(&mut self, error: HubError) -> Result<(), HubError> {
        let Some(asked) = error.transient() else { return Err(error) };
        self.failures += 1;
        if self.failures >= ATTEMPTS || asked > LONGEST_WAIT {
            return Err(error);
        }
        let wait = FIRST_WAIT * 2u32.pow(self.failures - 1);
        // Up to half as much again, so that many that failed together do not come back together.
        let jitter = (RandomState::new().hash_one(self.failures) % 1000) as f64 / 2000.0;
        std::thread::sleep(wait.mul_f64(1.0 + jitter).max(asked));
        Ok(())
    }
}

/// TLS without a C compiler.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn with_cryptography(tls: TlsConfigBuilder) -> TlsConfigBuilder {
    tls.unversioned_rustls_crypto_provider(Arc::new(rustls_graviola::default_provider()))
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn with_cryptography(tls: TlsConfigBuilder) -> TlsConfigBuilder {
    tls
}

/// Whether the processor can run that cryptography: any since about 2015.
fn has_cryptography() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq")
        && std::arch::is_x86_feature_detected!("ssse3")
        && std::arch::is_x86_feature_detected!("avx2")
        && std::arch::is_x86_feature_detected!("bmi2")
        && std::arch::is_x86_feature_detected!("adx");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes")
        && std::arch::is_aarch64_feature_detected!("pmull")
        && std::arch::is_aarch64_feature_detected!("sha2");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    return false;
}

fn parse(url: &str) -> Result<Uri, HubError> {
    let refuse = || HubError::Redirect { url: without_secrets(url), problem: "this is no address".into() };
    let uri: Uri = url.parse().map_err(|_| refuse())?;
    let is_known = matches!(uri.scheme_str(), Some("http" | "https"));
    if is_known && uri.host().is_some_and(|host| !host.is_empty()) { Ok(uri) } else { Err(refuse()) }
}

/// A URL for messages: no user, no password, no query (which may be a signature).
fn shown(url: &Uri) -> String {
    without_secrets(&url.to_string())
}

fn without_secrets(url: &str) -> String {
    let url = url.split(['?', '#']).next().unwrap_or_default();
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let host = authority.rsplit('@').next().unwrap_or_default();
            format!("{scheme}://{host}{path}")
        }
        None => url.into(),
    }
}

fn host(url: &Uri) -> &str {
    url.host().unwrap_or_default()
}

fn port(url: &Uri) -> u16 {
    url.port_u16().unwrap_or(if url.scheme_str() == Some("https") { 443 } else { 80 })
}

/// Scheme, host and port: what a token is for.
fn origin(url: &Uri) -> (String, String, u16) {
    let host = host(url).to_ascii_lowercase();
    (url.scheme_str().unwrap_or_default().to_owned(), host, port(url))
}

/// Where a `Location` leads from `base`.
fn join(base: &Uri, location: &str) -> Result<Uri, HubError> {
    let location = location.trim();
    if location.contains("://") && !location.starts_with('/') {
        return parse(location);
    }
    let scheme = base.scheme_str().unwrap_or_default();
    if let Some(rest) = location.strip_prefix("//") {
        return parse(&format!("{scheme}://{rest}"));
    }
    let authority = base.authority().map(ToString::to_string).unwrap_or_default();
    let path = base.path();
    let path = match location.chars().next() {
        Some('/') => location.to_owned(),
        Some('?') => format!("{path}{location}"),
        _ => format!("{}/{location}", path.rsplit_once('/').map_or("", |(folder, _)| folder)),
    };
    parse(&format!("{scheme}://{authority}{path}"))
}

/// The repository in a URL of a file or of the interface.
fn repo_in(url: &Uri) -> Option<String> {
    let parts: Vec<&str> = url.path().trim_start_matches('/').split('/').collect();
    let at = match parts.as_slice() {
        [.., "api", "models", _, _] => return None,
        parts => parts.windows(2).position(|pair| pair == ["api", "models"]).map(|at| at + 2),
    };
    let at = match at {
        Some(at) => at,
        None => parts.iter().position(|part| *part == "resolve")?.checked_sub(2)?,
    };
    let name = format!("{}/{}", parts.get(at)?, parts.get(at + 1)?);
    // a redirect may not lead to what is no repository
    name.parse::<RepoId>().ok().map(|repo| repo.name)
}

/// The address after this page, by the header `Link`.
fn next_page(link: &str) -> Option<String> {
    link.split(',').find_map(|entry| {
        let (address, rest) = entry.trim().strip_prefix('<')?.split_once('>')?;
        rest.replace(['"', ' '], "").contains(";rel=next").then(|| address.to_owned())
    })
}

/// A path for a URL; `/` stays.
fn encode(path: &str) -> String {
    path.split('/').map(encode_segment).collect::<Vec<_>>().join("/")
}

fn encode_segment(segment: &str) -> String {
    let mut encoded = String::new();
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(byte.into()),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    #[test]
    fn a_location_is_joined_to_where_it_was_said() {
        let base = uri("http://hub:80/a/b/resolve/main/x.json?q=1");
        for (location, whole) in [
            ("/c/d/resolve/main/x.json", "http://hub:80/c/d/resolve/main/x.json"),
            ("y.json?moved=1", "http://hub:80/a/b/resolve/main/y.json?moved=1"),
            ("?moved=1", "http://hub:80/a/b/resolve/main/x.json?moved=1"),
            ("//cdn/y", "http://cdn/y"),
            ("https://cdn/y?url=http://z", "https://cdn/y?url=http://z"),
        ] {
            assert_eq!(join(&base, location).unwrap().to_string(), whole, "{location}");
        }
        for wrong in ["ftp://x/y", "file:///etc/passwd", "http://"] {
            assert!(join(&base, wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        assert_eq!(origin(&uri("https://Hub/a")), origin(&uri("https://hub:443/b?c")));
        for other in ["http://hub/a", "https://hub:8443/a", "https://hub.evil/a"] {
            assert_ne!(origin(&uri("https://hub/a")), origin(&uri(other)), "{other}");
        }
    }

    #[test]
    fn messages_show_neither_signatures_nor_passwords() {
        assert_eq!(without_secrets("https://me:secret@cdn:1/a/b?sig=secret#secret"), "https://cdn:1/a/b");
    }

    #[test]
    fn the_repository_is_read_off_a_url() {
        for (url, name) in [
            ("http://h/a/b/resolve/main/c.json", Some("a/b")),
            ("http://h/mirror/a/b/resolve/main/c.json", Some("a/b")),
            ("http://h/api/models/a/b/revision/main", Some("a/b")),
            ("http://h/x", None),
            ("http://h/../b/resolve/main/c", None),
        ] {
            assert_eq!(repo_in(&uri(url)).as_deref(), name, "{url}");
        }
    }

    #[test]
    fn pages_are_linked_and_names_encoded() {
        let link = r#"<http://h/a?cursor=1>; rel="prev", <http://h/a?cursor=2>; rel="next""#;
        assert_eq!(next_page(link).as_deref(), Some("http://h/a?cursor=2"));
        assert_eq!(next_page("<http://h>; rel=\"last\""), None);
        assert_eq!(encode("a b/猫?.json"), "a%20b/%E7%8C%AB%3F.json");
        assert_eq!(encode_segment("refs/pr/1"), "refs%2Fpr%2F1");
    }
}
