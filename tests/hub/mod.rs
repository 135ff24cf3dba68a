//! Repositories over loopback: a stand-in hub, the real program, and every way in which things go wrong.
//!
//! After each, the cache serves either nothing or the right bytes.

mod faults;
mod python;
mod server;
mod uses;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use burn::tensor::TensorData;
use volary_weights::save_tensors;

use server::{Server, git_oid, sha256};

/// The repository of most tests.
const REPO: &str = "zoo/model";

type Files = BTreeMap<String, Vec<u8>>;

/// Weights of so many bytes, give or take a header.
fn weights(bytes: usize) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let values: Vec<f32> = (0..bytes / 4).map(|i| i as f32 * 0.5).collect();
    save_tensors(&path, &[("weight".to_owned(), TensorData::new(values, [bytes / 4]))]).unwrap();
    fs::read(path).unwrap()
}

/// A repository with one file of weights, texts, and what nobody needs.
fn single() -> Files {
    [
        ("config.json", br#"{"model_type": "none"}"#.to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("README.md", b"---\nlicense: mit\n---\n# It\n".to_vec()),
        ("model.safetensors", weights(60_000)),
        ("pytorch_model.bin", vec![1; 5000]),
        ("flax_model.msgpack", vec![2; 5000]),
        ("onnx/model.onnx", vec![3; 5000]),
    ]
    .map(|(name, data)| (name.to_owned(), data))
    .into()
}

/// What is wanted of [`single`].
const WANTED: [&str; 4] = ["README.md", "config.json", "model.safetensors", "tokenizer.json"];

/// A repository with three shards and their index.
fn sharded() -> Files {
    let mut files = Files::from([("config.json".to_owned(), b"{}".to_vec())]);
    let mut map = serde_json::Map::new();
    for i in 1..=3 {
        let shard = format!("model-0000{i}-of-00003.safetensors");
        map.insert(format!("weight.{i}"), shard.clone().into());
        files.insert(shard, weights(20_000 + 4 * i));
    }
    let index = serde_json::json!({ "weight_map": map });
    files.insert("model.safetensors.index.json".into(), index.to_string().into_bytes());
    files
}

/// A user's machine: a home with a cache, and nothing of the environment around.
struct Machine(tempfile::TempDir);

impl Machine {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    fn shelf(&self, repo: &str) -> PathBuf {
        self.cache().join(format!("models--{}", repo.replace('/', "--")))
    }

    /// The program with this machine's environment. `through` runs it, e.g. `sh -c …`.
    fn program(&self, server: &Server, through: &[&str]) -> Command {
        let program = assert_cmd::cargo::cargo_bin("volary");
        let mut command = match through {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.0.path())
            .env("HF_HUB_CACHE", self.cache())
            .env("HF_ENDPOINT", server.endpoint())
            .env("HF_HUB_ETAG_TIMEOUT", "1")
            .env("HF_HUB_DOWNLOAD_TIMEOUT", "1")
            .env("HF_TOKEN", "hf_very_secret")
            .current_dir(self.0.path());
        command
    }

    fn run(&self, server: &Server, arguments: &[&str]) -> Told {
        Told::of(self.program(server, &[]).args(arguments).output().unwrap())
    }

    /// What the cache would serve: every file of every snapshot that can be read.
    fn served(&self) -> Vec<(String, Vec<u8>)> {
        let mut served = Vec::new();
        for repo in folders(&self.cache()) {
            for commit in folders(&repo.join("snapshots")) {
                walk(&commit, "", &mut served);
            }
        }
        served
    }

    /// Asserts that nothing in the cache is wrong: snapshots have the bytes of `truth`, contents those of their names.
    fn assert_right(&self, truth: &[&Files], name: &str) {
        for (file, data) in self.served() {
            let is_true = truth.iter().any(|files| files.get(&file) == Some(&data));
            assert!(is_true, "{name}: the cache serves a wrong `{file}` of {} bytes", data.len());
        }
        for repo in folders(&self.cache()) {
            for entry in fs::read_dir(repo.join("blobs")).into_iter().flatten().flatten() {
                let blob = entry.file_name().into_string().unwrap();
                let data = fs::read(entry.path()).unwrap();
                let is_right =
                    blob == sha256(&data) || blob == git_oid(&data) || blob.ends_with(".incomplete");
                assert!(is_right, "{name}: {blob} has another content");
            }
        }
    }

    /// Lays a repository out as Python's client does, with links.
    fn lay_out(&self, repo: &str, commit: &str, files: &Files) {
        let shelf = self.shelf(repo);
        fs::create_dir_all(shelf.join("blobs")).unwrap();
        fs::create_dir_all(shelf.join("refs")).unwrap();
        fs::write(shelf.join("refs/main"), commit).unwrap();
        for (name, data) in files {
            let hash = if server::is_lfs(data) { sha256(data) } else { git_oid(data) };
            fs::write(shelf.join("blobs").join(&hash), data).unwrap();
            let path = shelf.join("snapshots").join(commit).join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            let up = "../".repeat(2 + name.matches('/').count());
            std::os::unix::fs::symlink(format!("{up}blobs/{hash}"), path).unwrap();
        }
    }
}

/// What the program said.
#[derive(Debug)]
struct Told {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Told {
    fn of(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let told =
            Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!told.stderr.contains("secret") && !told.stdout.contains("secret"), "{told:?}");
        assert!(!told.stderr.contains("panicked"), "{told:?}");
        told
    }

    /// The last line, which is the snapshot's folder.
    fn folder(&self) -> PathBuf {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        self.stdout.lines().last().unwrap().into()
    }
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect()
}

fn walk(root: &Path, inside: &str, files: &mut Vec<(String, Vec<u8>)>) {
    for entry in fs::read_dir(root.join(inside)).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        let name = if inside.is_empty() { name } else { format!("{inside}/{name}") };
        if entry.path().is_dir() {
            walk(root, &name, files);
        } else if let Ok(data) = fs::read(entry.path()) {
            files.push((name, data));
        }
    }
}

fn names(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    walk(folder, "", &mut files);
    let mut names: Vec<String> = files.into_iter().map(|(name, _)| name).collect();
    names.sort();
    names
}
