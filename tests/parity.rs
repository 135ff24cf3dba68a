//! Every system against the references of its fixtures, through the program's own forward contract.

use std::ffi::OsStr;
use std::path::Path;

use assert_cmd::Command;
use volary::registry::SYSTEMS;
use volary_weights::read_tensors;

use crate::support::{copy_folder, differences, fixture, json};

/// Runs the program with these arguments and an `--output`, and compares what it writes with the fixture's
/// reference.
fn compare(folder: &Path, arguments: &[&OsStr]) -> Vec<String> {
    let out = tempfile::tempdir().unwrap();
    let output = out.path().join("out.safetensors");
    Command::cargo_bin("volary").unwrap().args(arguments).arg("--output").arg(&output).assert().success();
    let found = read_tensors(&output).unwrap();
    let expected = read_tensors(&folder.join("outputs.safetensors")).unwrap();
    differences(&found, &expected, &json(&folder.join("reference.json")))
}

#[test]
fn every_proved_fixture_agrees() {
    let mut wrong = Vec::new();
    for system in SYSTEMS {
        assert!(!system.proved.is_empty(), "{} is proved by nothing", system.name);
        for name in system.proved {
            let folder = fixture(name);
            let input = folder.join("inputs.safetensors");
            let arguments = ["forward".as_ref(), folder.as_os_str(), "--input".as_ref(), input.as_os_str()];
            let problems = compare(&folder, &arguments);
            wrong.extend(problems.into_iter().map(|problem| format!("{name}: {problem}")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The authors' own file, in half precision without a loss, beside which others put safetensors.
#[test]
fn weights_in_the_authors_file_agree() {
    for name in ["painter", "seggpt"] {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path();
        copy_folder(&fixture(name), folder);
        std::fs::remove_file(folder.join("model.safetensors")).unwrap();
        let input = folder.join("inputs.safetensors");
        let arguments = ["forward".as_ref(), folder.as_os_str(), "--input".as_ref(), input.as_os_str()];
        let wrong = compare(folder, &arguments);
        assert!(wrong.is_empty(), "{name}: {wrong:?}");
    }
}

/// A comparison that cannot fail proves nothing.
#[test]
fn a_changed_reference_is_noticed() {
    let folder = fixture("bert");
    let expected = read_tensors(&folder.join("outputs.safetensors")).unwrap();
    let mut found = expected.clone();
    let changed = found["pooler_output"].iter::<f32>().map(|value| value + 1e-3).collect::<Vec<_>>();
    let shape = found["pooler_output"].shape().clone();
    found.insert("pooler_output".into(), burn::tensor::TensorData::new(changed, shape));
    assert_eq!(differences(&found, &expected, &json(&folder.join("reference.json"))).len(), 1);
}

#[test]
fn preprocessing_agrees() {
    for name in ["image_clip", "image_clip_legacy", "image_open_clip", "image_vit", "image_timm"] {
        let folder = fixture(name);
        let mut images: Vec<_> =
            std::fs::read_dir(folder.join("images")).unwrap().map(|entry| entry.unwrap().path()).collect();
        images.sort();
        let mut arguments = vec!["preprocess".as_ref(), folder.as_os_str()];
        arguments.extend(images.iter().map(|image| image.as_os_str()));
        let wrong = compare(&folder, &arguments);
        assert!(wrong.is_empty(), "{name}: {wrong:?}");
    }
}

/// What `volary tokenize` prints for a fixture's texts, from the tokenizer in another folder.
fn compare_tokens(name: &str, folder: &Path) {
    let cases = json(&fixture(name).join("cases.json"));
    let cases = cases["encode"].as_array().unwrap();
    let texts: Vec<&str> = cases.iter().map(|case| case["text"].as_str().unwrap()).collect();
    let output = Command::cargo_bin("volary")
        .unwrap()
        .arg("tokenize")
        .arg(folder)
        .args(["--json", "--"])
        .args(&texts)
        .output()
        .unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    for (found, case) in found.as_array().unwrap().iter().zip(cases) {
        assert_eq!(found["ids"], case["ids"], "{name}: {}", case["text"]);
        assert_eq!(found["tokens"], case["tokens"], "{name}: {}", case["text"]);
    }
    assert_eq!(found.as_array().unwrap().len(), cases.len());
}

#[test]
fn tokenizing_agrees() {
    for name in ["tok_bert", "tok_clip", "tok_gpt2", "tok_t5", "tok_xlmr"] {
        let folder = fixture(name);
        compare_tokens(name, &folder);
        let raw = tempfile::tempdir().unwrap();
        copy_folder(&folder, raw.path());
        std::fs::remove_file(raw.path().join("tokenizer.json")).unwrap();
        compare_tokens(name, raw.path());
    }
}
