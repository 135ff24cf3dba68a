//! Broken checkpoints: each gives exit code 1 and one message that names the file and the key.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use assert_cmd::Command;
use burn::tensor::TensorData;
use serde_json::{Value, json};
use volary_weights::{read_tensors, save_tensors};

use crate::support::{copy_folder, fixture};

const WEIGHTS: &str = "model.safetensors";
const KEY: &str = "encoder.layer.1.attention.self.query.weight";

/// What is done to a good folder, and what the message must name.
struct Case {
    name: &'static str,
    fixture: &'static str,
    damage: fn(&Path),
    names: &'static [&'static str],
}

/// Changes the tensors of a folder.
fn tensors(folder: &Path, change: fn(&mut BTreeMap<String, TensorData>)) {
    let file = folder.join(WEIGHTS);
    let mut tensors = read_tensors(&file).unwrap();
    change(&mut tensors);
    save_tensors(&file, &tensors.into_iter().collect::<Vec<_>>()).unwrap();
}

/// Changes the header's JSON text, leaving the values as they are.
fn header(folder: &Path, change: fn(String) -> String) {
    let file = folder.join(WEIGHTS);
    let bytes = fs::read(&file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let text = change(String::from_utf8(bytes[8..8 + length].to_vec()).unwrap());
    let damaged = [&(text.len() as u64).to_le_bytes()[..], text.as_bytes(), &bytes[8 + length..]].concat();
    fs::write(file, damaged).unwrap();
}

/// Changes a JSON file of a folder.
fn config(folder: &Path, change: fn(&mut Value)) {
    let file = folder.join("config.json");
    let mut value = crate::support::json(&file);
    change(&mut value);
    fs::write(file, value.to_string()).unwrap();
}

fn weights(folder: &Path, content: &[u8]) {
    fs::write(folder.join(WEIGHTS), content).unwrap();
}

const CASES: &[Case] = &[
    Case {
        name: "truncated",
        fixture: "bert",
        damage: |folder| {
            let bytes = fs::read(folder.join(WEIGHTS)).unwrap();
            weights(folder, &bytes[..bytes.len() - 1000]);
        },
        names: &[WEIGHTS],
    },
    Case { name: "empty", fixture: "bert", damage: |folder| weights(folder, b""), names: &[WEIGHTS] },
    Case {
        name: "header longer than the file",
        fixture: "bert",
        damage: |folder| weights(folder, &[&u64::MAX.to_le_bytes()[..], b"{}"].concat()),
        names: &[WEIGHTS],
    },
    Case {
        name: "header is no JSON",
        fixture: "bert",
        damage: |folder| header(folder, |text| text.replacen('{', "[", 1)),
        names: &[WEIGHTS],
    },
    Case {
        name: "offsets beyond the end",
        fixture: "bert",
        damage: |folder| {
            header(folder, |text| {
                let mut header: Value = serde_json::from_str(&text).unwrap();
                header[KEY]["data_offsets"] = json!([1_u64 << 40, (1_u64 << 40) + 4096]);
                header.to_string()
            });
        },
        names: &[WEIGHTS, KEY],
    },
    Case {
        name: "a shape that its bytes do not have",
        fixture: "bert",
        damage: |folder| {
            header(folder, |text| {
                let mut header: Value = serde_json::from_str(&text).unwrap();
                header[KEY]["shape"] = json!([32, 31]);
                header.to_string()
            });
        },
        names: &[WEIGHTS, KEY],
    },
    Case {
        name: "a renamed key",
        fixture: "bert",
        damage: |folder| {
            tensors(folder, |tensors| {
                let tensor = tensors.remove(KEY).unwrap();
                tensors.insert(KEY.replace("query", "qeury"), tensor);
            });
        },
        names: &[WEIGHTS, KEY, "qeury"],
    },
    Case {
        name: "a missing key",
        fixture: "clip",
        damage: |folder| tensors(folder, |tensors| drop(tensors.remove("visual_projection.weight"))),
        names: &[WEIGHTS, "visual_projection.weight"],
    },
    Case {
        name: "a key too many",
        fixture: "vit",
        damage: |folder| {
            tensors(folder, |tensors| {
                let extra = tensors.values().next().unwrap().clone();
                tensors.insert("encoder.layer.9.extra".into(), extra);
            });
        },
        names: &[WEIGHTS, "encoder.layer.9.extra"],
    },
    Case {
        name: "a wrong shape",
        fixture: "bert",
        damage: |folder| {
            tensors(folder, |tensors| {
                tensors.insert(KEY.into(), TensorData::new(vec![0.5_f32; 32 * 16], [16, 32]));
            });
        },
        names: &[WEIGHTS, KEY, "[32, 32]", "[16, 32]"],
    },
    Case {
        name: "NaN",
        fixture: "bert",
        damage: |folder| {
            tensors(folder, |tensors| {
                tensors.insert(KEY.into(), TensorData::new(vec![f32::NAN; 32 * 32], [32, 32]));
            });
        },
        names: &[WEIGHTS, KEY, "NaN"],
    },
    Case {
        name: "whole numbers for floats",
        fixture: "bert",
        damage: |folder| {
            tensors(folder, |tensors| {
                tensors.insert(KEY.into(), TensorData::new(vec![1_i64; 32 * 32], [32, 32]));
            });
        },
        names: &[WEIGHTS, KEY],
    },
    Case {
        name: "no configuration",
        fixture: "bert",
        damage: |folder| fs::remove_file(folder.join("config.json")).unwrap(),
        names: &["config.json"],
    },
    Case {
        name: "configuration is no JSON",
        fixture: "clip",
        damage: |folder| fs::write(folder.join("config.json"), "{\"model_type\": \"clip\"").unwrap(),
        names: &["config.json"],
    },
    Case {
        name: "a width that is a word",
        fixture: "clip",
        damage: |folder| config(folder, |config| config["text_config"]["hidden_size"] = json!("wide")),
        names: &["config.json", "text_config.hidden_size", "wide"],
    },
    Case {
        name: "heads that do not divide the width",
        fixture: "bert",
        damage: |folder| config(folder, |config| config["num_attention_heads"] = json!(5)),
        names: &["config.json", "num_attention_heads"],
    },
    Case {
        name: "two billion layers",
        fixture: "clip",
        damage: |folder| {
            config(folder, |config| config["vision_config"]["num_hidden_layers"] = json!(2_000_000_000));
        },
        names: &["config.json", "vision_config.num_hidden_layers"],
    },
    Case {
        name: "an unknown system",
        fixture: "bert",
        damage: |folder| config(folder, |config| config["model_type"] = json!("mamba")),
        names: &["config.json", "mamba", "clip", "bert", "vit"],
    },
    Case {
        name: "no weights",
        fixture: "bert",
        damage: |folder| fs::remove_file(folder.join(WEIGHTS)).unwrap(),
        names: &["bert", WEIGHTS, "pytorch_model.bin"],
    },
    Case {
        name: "a web page",
        fixture: "bert",
        damage: |folder| weights(folder, b"<!DOCTYPE html><html><body>Sign in</body></html>"),
        names: &[WEIGHTS],
    },
    Case {
        name: "a pointer of git-lfs",
        fixture: "bert",
        damage: |folder| {
            weights(
                folder,
                b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 437955512\n",
            );
        },
        names: &[WEIGHTS, "lfs"],
    },
    Case {
        name: "a truncated torch file",
        fixture: "bert_legacy_bin",
        damage: |folder| {
            let file = folder.join("pytorch_model.bin");
            let bytes = fs::read(&file).unwrap();
            fs::write(file, &bytes[..bytes.len() / 2]).unwrap();
        },
        names: &["pytorch_model.bin"],
    },
];

#[test]
fn each_is_told_by_file_and_key() {
    let mut wrong = Vec::new();
    for Case { name, fixture: of, damage, names } in CASES {
        let scratch = tempfile::tempdir().unwrap();
        let folder = scratch.path().join(of);
        copy_folder(&fixture(of), &folder);
        damage(&folder);
        let output = Command::cargo_bin("volary")
            .unwrap()
            .arg("forward")
            .arg(&folder)
            .arg("--input")
            .arg(folder.join("inputs.safetensors"))
            .arg("--output")
            .arg(scratch.path().join("out.safetensors"))
            .output()
            .unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        if output.status.code() != Some(1) {
            wrong.push(format!("{name}: exit code {:?}: {message}", output.status.code()));
        }
        if message.contains("panicked") || message.matches("error:").count() != 1 {
            wrong.push(format!("{name}: not one message: {message}"));
        }
        for expected in *names {
            if !message.contains(expected) {
                wrong.push(format!("{name}: does not name {expected}: {message}"));
            }
        }
        if scratch.path().join("out.safetensors").exists() {
            wrong.push(format!("{name}: an output was written"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(CASES.len() >= 12);
}

/// All that is wrong comes in one message.
#[test]
fn several_problems_come_at_once() {
    let scratch = tempfile::tempdir().unwrap();
    let folder = scratch.path().join("bert");
    copy_folder(&fixture("bert"), &folder);
    tensors(&folder, |tensors| {
        tensors.remove("pooler.dense.bias").unwrap();
        tensors.insert(KEY.into(), TensorData::new(vec![0.5_f32; 8], [8]));
        tensors.insert("surprise".into(), TensorData::new(vec![0.5_f32; 8], [8]));
    });
    let output = Command::cargo_bin("volary").unwrap().arg("info").arg(&folder).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stdout);
    for name in ["pooler.dense.bias", KEY, "surprise"] {
        assert!(told.contains(name), "{name} is not in {told}");
    }
}
