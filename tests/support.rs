//! Where fixtures lie, and how tensors are compared with a reference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use burn::tensor::TensorData;
use serde_json::Value;

/// A folder under `tests/fixtures`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The JSON in a file, as Python writes it: the value `Infinity`, which JSON lacks, is read as null.
pub fn json(file: &Path) -> Value {
    let text = std::fs::read_to_string(file).unwrap();
    serde_json::from_str(&text.replace("\": Infinity", "\": null")).unwrap()
}

/// What differs between outputs and a reference, by the reference's own tolerance.
pub fn differences(
    found: &BTreeMap<String, TensorData>,
    expected: &BTreeMap<String, TensorData>,
    reference: &Value,
) -> Vec<String> {
    let mut differences = Vec::new();
    for (name, wanted) in expected {
        let Some(data) = found.get(name) else {
            differences.push(format!("no output `{name}`"));
            continue;
        };
        if data.shape() != wanted.shape() {
            differences.push(format!("`{name}` is {:?}, not {:?}", data.shape(), wanted.shape()));
            continue;
        }
        let tolerance = &reference["tolerance"];
        let bound = |kind: &str| {
            let own = tolerance["per_output"][name][kind].as_f64();
            own.or(tolerance[kind].as_f64()).expect("the reference states its tolerance")
        };
        let (atol, rtol) = (bound("atol"), bound("rtol"));
        let worst = data
            .iter::<f64>()
            .zip(wanted.iter::<f64>())
            .map(|(a, b)| (a - b).abs() - rtol * b.abs())
            .fold(0.0_f64, |worst, excess| if excess <= worst || worst.is_nan() { worst } else { excess });
        if worst > atol || worst.is_nan() {
            differences.push(format!("`{name}` is off by {worst:e}, {atol:e} is allowed"));
        }
    }
    differences
}

/// Copies a folder's files.
pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}

/// Runs a command that makes a folder of another.
pub fn volary(command: &str, source: &Path, out: &Path, arguments: &[&str]) -> Output {
    Command::cargo_bin("volary").unwrap().arg(command).args([source, out]).args(arguments).output().unwrap()
}

/// The same, when it is to succeed: what it says as JSON.
pub fn done(command: &str, source: &Path, out: &Path, arguments: &[&str]) -> Value {
    let output = volary(command, source, out, &[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The same, when it is to fail: its message.
pub fn refused(command: &str, source: &Path, out: &Path, arguments: &[&str]) -> String {
    let output = volary(command, source, out, arguments);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{message}");
    assert_eq!(message.matches("error:").count(), 1, "{message}");
    message
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}
