//! A stand-in hub on loopback with faults: one port for the hub, one for its content server.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// What goes wrong with a file, or with all files of the repository (`""`).
#[derive(Clone, Debug, PartialEq)]
pub enum Fault {
    /// 401 with the code of a gated repository, from the list on.
    Gated,
    /// HEAD and the list are fine, GET answers so.
    Status(u16),
    /// The first GETs answer so, then all is well.
    StatusTimes(u16, usize),
    /// 429 once, with a second to wait.
    Busy,
    /// The first body ends after so many bytes.
    Cut(usize),
    /// Every body does.
    CutAlways(usize),
    /// A body of the right length, all zeros; the first ones, or always.
    Corrupt(usize),
    /// One bit is another.
    FlipLast,
    /// So many milliseconds of silence in the middle of every body.
    Stall(u64),
    /// Bytes in so many pieces, 20 ms apart.
    Drip(usize),
    /// No ETag, no commit.
    NoEtag,
    /// No word of the linked content.
    NoLinked,
    /// A wrong hash in the headers.
    WrongEtag,
    /// A relative redirect first.
    Relative,
    /// A web page in place of the file.
    Html,
    /// A web page in place of the list.
    HtmlList,
    /// No JSON in place of the list.
    BrokenList,
    /// No list of the tree; only the siblings.
    NoTree,
    /// The list of the tree in pages of one.
    Pages,
    /// The list leads to the other port.
    PagesElsewhere,
    /// The repository has another name.
    Renamed(&'static str),
    /// Redirects to itself.
    Loop,
    /// A redirect to no address.
    BadLocation,
    /// A listed file is not there.
    Gone,
    /// Ranges are not understood: always the whole.
    IgnoreRange,
    /// 206 from another place than was asked for.
    WrongRange,
    /// 416 to every range.
    NoRange,
    /// The content length says less than there is, and less is sent.
    Short,
    /// More is sent than there is.
    Long,
    /// The list says another size.
    ListedSize(u64),
    /// The list says another hash.
    ListedHash,
    /// The files come from another commit than the list.
    OtherCommit,
    /// The connection ends without an answer.
    Silent,
}

#[derive(Clone, Debug)]
pub struct Request {
    pub server: &'static str,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub headers: HashMap<String, String>,
}

#[derive(Default)]
pub struct State {
    pub repos: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Names that the list has beside the files.
    pub listed: Vec<String>,
    pub faults: HashMap<(String, String), Fault>,
    log: Vec<Request>,
    seen: HashMap<String, usize>,
    ports: [u16; 2],
    pub commits: HashMap<String, String>,
}

/// It runs until the test ends.
#[derive(Clone)]
pub struct Server(Arc<Mutex<State>>);

pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn sha256(data: &[u8]) -> String {
    hex(&Sha256::digest(data))
}

pub fn git_oid(data: &[u8]) -> String {
    hex(&Sha1::new().chain_update(format!("blob {}\0", data.len())).chain_update(data).finalize())
}

pub fn is_lfs(data: &[u8]) -> bool {
    data.len() >= 1024
}

impl State {
    pub fn commit(&self, repo: &str) -> String {
        self.commits.get(repo).cloned().unwrap_or_else(|| hex(&Sha1::digest(repo)))
    }

    fn fault(&self, repo: &str, file: &str) -> Option<Fault> {
        let of = |file: &str| self.faults.get(&(repo.to_owned(), file.to_owned()));
        of(file).or_else(|| of("")).cloned()
    }

    fn times(&mut self, what: &str) -> usize {
        let times = self.seen.entry(what.to_owned()).or_default();
        *times += 1;
        *times
    }
}

struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    /// What is done to the body on its way.
    fault: Option<Fault>,
}

impl Reply {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), fault: None }
    }

    fn with(mut self, name: &str, value: impl ToString) -> Self {
        self.headers.push((name.into(), value.to_string()));
        self
    }
}

impl Server {
    /// A hub with one repository.
    pub fn new(repo: &str, files: BTreeMap<String, Vec<u8>>) -> Self {
        let state = State { repos: BTreeMap::from([(repo.into(), files)]), ..State::default() };
        let server = Self(Arc::new(Mutex::new(state)));
        let listeners =
            [TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap()];
        for (i, listener) in listeners.iter().enumerate() {
            server.0.lock().unwrap().ports[i] = listener.local_addr().unwrap().port();
        }
        for (listener, side) in listeners.into_iter().zip(["hub", "cdn"]) {
            let server = server.clone();
            thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let server = server.clone();
                    thread::spawn(move || server.serve(side, stream));
                }
            });
        }
        server
    }

    pub fn with(self, file: &str, fault: Fault) -> Self {
        self.set(file, fault);
        self
    }

    /// A fault for a file of the first repository.
    pub fn set(&self, file: &str, fault: Fault) {
        self.change(|state| {
            let repo = state.repos.keys().next().unwrap().clone();
            state.faults.insert((repo, file.into()), fault);
        });
    }

    pub fn heal(&self) {
        self.change(|state| {
            state.faults.clear();
            state.listed.clear();
        });
    }

    pub fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.change(|state| state.ports[0]))
    }

    /// The requests since the last time.
    pub fn log(&self) -> Vec<Request> {
        self.change(|state| std::mem::take(&mut state.log))
    }

    fn serve(&self, side: &'static str, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 {
            return;
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        let mut headers = HashMap::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let range = headers.get("range").cloned();
        let reply = {
            let mut state = self.0.lock().unwrap();
            let reply = route(&mut state, side, &method, &path, range.as_deref());
            let status = reply.as_ref().map_or(0, |reply| reply.status);
            state.log.push(Request { server: side, method: method.clone(), path, status, headers });
            reply
        };
        if let Some(reply) = reply {
            let _ = send(stream, reply, method == "HEAD");
        }
    }
}

fn send(mut stream: TcpStream, reply: Reply, is_head: bool) -> std::io::Result<()> {
    let Reply { status, headers, mut body, fault } = reply;
    let mut length = body.len();
    match &fault {
        Some(Fault::Short) => {
            length = length.div_ceil(2);
            body.truncate(length);
        }
        Some(Fault::Long) => {
            body.extend([7; 500]);
            length = body.len();
        }
        _ => {}
    }
    let mut head = format!("HTTP/1.1 {status} Said\r\nContent-Length: {length}\r\nConnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    if is_head {
        return Ok(());
    }
    match fault {
        Some(Fault::Cut(n) | Fault::CutAlways(n)) => stream.write_all(&body[..n.min(body.len())]),
        Some(Fault::Stall(milliseconds)) => {
            let (first, second) = body.split_at(body.len() / 2);
            stream.write_all(first)?;
            stream.flush()?;
            thread::sleep(Duration::from_millis(milliseconds));
            stream.write_all(second)
        }
        Some(Fault::Drip(pieces)) => {
            for piece in body.chunks(body.len().div_ceil(pieces).max(1)) {
                stream.write_all(piece)?;
                stream.flush()?;
                thread::sleep(Duration::from_millis(20));
            }
            Ok(())
        }
        _ => stream.write_all(&body),
    }
}

fn route(state: &mut State, side: &str, method: &str, path: &str, range: Option<&str>) -> Option<Reply> {
    let (path, query) = path.split_once('?').unwrap_or((path, ""));
    let parts: Vec<String> = path.trim_matches('/').split('/').map(decode).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let not_found = |code: &str| Some(Reply::new(404, "not found").with("X-Error-Code", code));
    match parts.as_slice() {
        [owner, name, rest @ ..] if side == "cdn" => {
            let repo = format!("{owner}/{name}");
            let file = rest.join("/");
            let data = state.repos.get(&repo)?.get(&file)?.clone();
            content(state, &repo, &file, data, method, range, vec![("ETag".into(), "\"cdn\"".into())])
        }
        ["api", "models", owner, name, what, rest @ ..] => {
            let repo = format!("{owner}/{name}");
            let fault = state.fault(&repo, "");
            if let Some(Fault::Renamed(to)) = fault {
                let to = format!("/api/models/{to}/{what}/{}?{query}", rest.join("/"));
                return Some(Reply::new(307, "").with("Location", to));
            }
            let Some(files) = state.repos.get(&repo) else { return not_found("RepoNotFound") };
            match fault {
                Some(Fault::Gated) => return Some(Reply::new(401, "{}").with("X-Error-Code", "GatedRepo")),
                Some(Fault::HtmlList) => {
                    return Some(Reply::new(200, "<html>log in</html>").with("Content-Type", "text/html"));
                }
                Some(Fault::BrokenList) => return Some(Reply::new(200, "{\"sha\": ")),
                Some(Fault::NoTree) if *what == "tree" => return not_found("EntryNotFound"),
                _ => {}
            }
            let known = ["main", "v1", &state.commit(&repo), &state.commit(&repo)[..8]].contains(&rest[0]);
            if !known {
                return not_found("RevisionNotFound");
            }
            if *what == "revision" {
                let names = files.keys().chain(&state.listed);
                let siblings: Vec<Value> = names.map(|name| json!({ "rfilename": name })).collect();
                let body = json!({ "id": repo, "sha": state.commit(&repo), "siblings": siblings });
                return Some(Reply::new(200, body.to_string()).with("Content-Type", "application/json"));
            }
            let mut entries: Vec<Value> = files
                .iter()
                .map(|(name, data)| {
                    let fault = state.fault(&repo, name);
                    let size = match fault {
                        Some(Fault::ListedSize(size)) => size,
                        _ => data.len() as u64,
                    };
                    let oid = if fault == Some(Fault::ListedHash) { sha256(b"other") } else { sha256(data) };
                    let mut entry =
                        json!({ "type": "file", "path": name, "size": size, "oid": git_oid(data) });
                    if is_lfs(data) {
                        entry["lfs"] = json!({ "oid": oid, "size": size, "pointerSize": 134 });
                    } else if fault == Some(Fault::ListedHash) {
                        entry["oid"] = json!(git_oid(b"other"));
                    }
                    entry
                })
                .collect();
            let extra = state
                .listed
                .iter()
                .map(|name| json!({ "type": "file", "path": name, "size": 1, "oid": git_oid(b"x") }));
            entries.extend(extra);
            let mut reply = Reply::new(200, "").with("Content-Type", "application/json");
            match state.fault(&repo, "") {
                Some(fault @ (Fault::Pages | Fault::PagesElsewhere)) => {
                    let page = query.split('&').find_map(|pair| pair.strip_prefix("cursor=")?.parse().ok());
                    let page: usize = page.unwrap_or(0);
                    let port = state.ports[usize::from(fault == Fault::PagesElsewhere)];
                    let next = format!(
                        "<http://127.0.0.1:{port}{path}?recursive=true&cursor={}>; rel=\"next\"",
                        page + 1
                    );
                    if page + 1 < entries.len() {
                        reply = reply.with("Link", next);
                    }
                    reply.body = Value::from(vec![entries[page].clone()]).to_string().into();
                }
                _ => reply.body = Value::from(entries).to_string().into(),
            }
            Some(reply)
        }
        [owner, name, "resolve", revision, rest @ ..] => {
            let repo = format!("{owner}/{name}");
            let file = rest.join("/");
            let fault = state.fault(&repo, &file);
            let commit = match fault {
                Some(Fault::OtherCommit) => "f".repeat(40),
                _ => state.commit(&repo),
            };
            match fault {
                Some(Fault::Html) => {
                    return Some(
                        Reply::new(200, "<html>please log in</html>").with("Content-Type", "text/html"),
                    );
                }
                Some(Fault::Renamed(to)) => {
                    return Some(
                        Reply::new(307, "").with("Location", format!("/{to}/resolve/{revision}/{file}")),
                    );
                }
                Some(Fault::Relative) if query.is_empty() => {
                    let reply = Reply::new(307, "").with("Location", format!("{path}?moved=1"));
                    return Some(reply.with("X-Repo-Commit", commit));
                }
                Some(Fault::Loop) => return Some(Reply::new(302, "").with("Location", path)),
                Some(Fault::BadLocation) => {
                    return Some(Reply::new(302, "").with("Location", "file:///etc/passwd"));
                }
                Some(Fault::Gated) => return Some(Reply::new(401, "no").with("X-Error-Code", "GatedRepo")),
                Some(Fault::Gone) => {
                    return not_found("EntryNotFound").map(|reply| reply.with("X-Repo-Commit", commit));
                }
                _ => {}
            }
            let Some(files) = state.repos.get(&repo) else { return not_found("RepoNotFound") };
            let Some(data) = files.get(&file).cloned() else { return not_found("EntryNotFound") };
            let wrong = fault == Some(Fault::WrongEtag);
            let etag = if wrong { git_oid(b"other") } else { git_oid(&data) };
            let mut headers = Vec::new();
            if fault != Some(Fault::NoEtag) {
                headers = vec![("X-Repo-Commit".to_owned(), commit), ("ETag".into(), format!("\"{etag}\""))];
            }
            if !is_lfs(&data) || fault == Some(Fault::NoEtag) {
                return content(state, &repo, &file, data, method, range, headers);
            }
            if fault != Some(Fault::NoLinked) {
                let hash = if wrong { sha256(b"other") } else { sha256(&data) };
                headers.push(("X-Linked-Etag".into(), format!("\"{hash}\"")));
                headers.push(("X-Linked-Size".into(), data.len().to_string()));
            }
            let location = format!("http://127.0.0.1:{}/{repo}/{file}?sig=secret", state.ports[1]);
            let mut reply = Reply::new(302, "").with("Location", location);
            reply.headers.extend(headers);
            Some(reply)
        }
        _ => Some(Reply::new(404, "{}")),
    }
}

fn content(
    state: &mut State,
    repo: &str,
    file: &str,
    mut data: Vec<u8>,
    method: &str,
    range: Option<&str>,
    headers: Vec<(String, String)>,
) -> Option<Reply> {
    let mut fault = state.fault(repo, file);
    let times = if method == "GET" { state.times(&format!("{repo}/{file}")) } else { 0 };
    if method == "GET" {
        match fault {
            Some(Fault::Status(status)) => return Some(Reply::new(status, "<html>no</html>")),
            Some(Fault::StatusTimes(status, n)) if times <= n => {
                return Some(Reply::new(status, "<html>no</html>"));
            }
            Some(Fault::Busy) if times == 1 => return Some(Reply::new(429, "busy").with("Retry-After", 1)),
            Some(Fault::Silent) => return None,
            Some(Fault::Cut(_)) if times > 1 => fault = None,
            Some(Fault::Corrupt(n)) if times <= n => data = vec![0; data.len()],
            Some(Fault::FlipLast) => *data.last_mut()? ^= 1,
            _ => {}
        }
    }
    let ranged = range.and_then(|range| {
        let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
        Some((start.parse::<usize>().ok()?, end.parse::<usize>().ok()))
    });
    let mut reply = match (ranged, &fault) {
        (Some(_), Some(Fault::NoRange)) => Reply::new(416, ""),
        (Some((start, end)), fault) if *fault != Some(Fault::IgnoreRange) => {
            let start = if *fault == Some(Fault::WrongRange) { start / 2 } else { start };
            let end = end.unwrap_or(data.len() - 1).min(data.len() - 1);
            let range = format!("bytes {start}-{end}/{}", data.len());
            Reply::new(206, &data[start.min(data.len())..end + 1]).with("Content-Range", range)
        }
        _ => Reply::new(200, data),
    };
    reply.headers.extend(headers);
    reply.fault = fault;
    Some(reply)
}

fn decode(text: &str) -> String {
    let (mut bytes, mut rest) = (Vec::new(), text.as_bytes());
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after) {
            (b'%', [a, b, tail @ ..]) => {
                let digits = String::from_utf8_lossy(&[*a, *b]).into_owned();
                bytes.push(u8::from_str_radix(&digits, 16).unwrap_or(b'?'));
                rest = tail;
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
