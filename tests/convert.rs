//! Out again: every fixture converted and quantized, and what cannot be.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use burn::tensor::{Device, TensorData};
use half::{bf16, f16};
use serde_json::{Value, json};
use volary::folder::Folder;
use volary::registry::{SYSTEMS, System, forward};
use volary_weights::format::SafetensorsFile;
use volary_weights::{Dtype, LoadOptions, Packing, Quantization, open, read_tensors, save_tensors};

use crate::support::{copy_folder, done, fixture, names, refused, volary};

/// Every tensor by its name, as it is stored.
fn tensors(folder: &Path) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let checkpoint = open(folder).unwrap();
    let entries = checkpoint.entries().iter();
    let stored = |name: &str| checkpoint.bytes(name).unwrap().into_owned();
    entries
        .map(|entry| (entry.name.clone(), (entry.dtype, entry.shape.clone(), stored(&entry.name))))
        .collect()
}

fn outputs(folder: &Path, inputs: &Path) -> BTreeMap<String, TensorData> {
    outputs_as(folder, inputs, Packing::AsStored)
}

fn outputs_as(folder: &Path, inputs: &Path, packing: Packing) -> BTreeMap<String, TensorData> {
    let inputs = read_tensors(&inputs.join("inputs.safetensors")).unwrap();
    let folder = Folder::Disk(folder.into());
    let options = LoadOptions { packing, ..LoadOptions::default() };
    forward(&folder, &inputs, &options, &Device::flex()).unwrap().into_iter().collect()
}

/// The fixtures that systems say they agree with; not schedulers, which have no weights, nor pipelines, whose parts are
/// converted by themselves.
fn families() -> impl Iterator<Item = (&'static str, PathBuf)> {
    let is_one_model = |folder: &PathBuf| {
        !["scheduler_config.json", "model_index.json"].iter().any(|file| folder.join(file).exists())
    };
    let all = SYSTEMS.iter().flat_map(|system| system.proved).map(|name| (*name, fixture(name)));
    all.filter(move |(_, folder)| is_one_model(folder))
}

/// Those of `outputs` that are measured, not picked: tokens may change with the weights.
fn floats(outputs: BTreeMap<String, TensorData>) -> impl Iterator<Item = (String, TensorData)> {
    outputs.into_iter().filter(|(_, data)| data.dtype().is_float())
}

fn cosine(a: &TensorData, b: &TensorData) -> f64 {
    let (a, b): (Vec<f64>, Vec<f64>) = (a.iter().collect(), b.iter().collect());
    if a == b {
        return 1.0; // zeros too
    }
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

#[test]
fn every_fixture_comes_through_as_it_was() {
    for (name, source) in families() {
        let scratch = tempfile::tempdir().unwrap();
        let (whole, sharded, back) =
            (scratch.path().join("whole"), scratch.path().join("sharded"), scratch.path().join("back"));
        done("convert", &source, &whole, &[]);
        done("convert", &source, &sharded, &["--max-shard-size", "20KB"]);
        done("convert", &sharded, &back, &[]);
        let (expected, reference) = (tensors(&source), outputs(&source, &source));
        let is_large = expected.values().map(|(_, _, bytes)| bytes.len()).sum::<usize>() > 20_000;
        let has_index = names(&sharded).iter().any(|file| file.ends_with(".safetensors.index.json"));
        assert_eq!(has_index, is_large, "{name}");
        for folder in [&whole, &sharded, &back] {
            assert_eq!(tensors(folder), expected, "{name}");
            assert_eq!(outputs(folder, &source), reference, "{name}");
            for file in ["config.json", "open_clip_config.json", "reference.json"] {
                assert_eq!(
                    fs::read(folder.join(file)).ok(),
                    fs::read(source.join(file)).ok(),
                    "{name}: {file}"
                );
            }
        }
        // the same tensors make the same file
        let weights = names(&whole).into_iter().find(|file| file.ends_with("model.safetensors")).unwrap();
        assert_eq!(fs::read(whole.join(&weights)).unwrap(), fs::read(back.join(&weights)).unwrap(), "{name}");
        assert_eq!(SafetensorsFile::open(whole.join(&weights)).unwrap().metadata()["format"], "pt");
        assert_eq!(
            names(scratch.path()),
            ["back", "sharded", "whole"],
            "{name}: something was left beside them"
        );
    }
}

/// Also those of no system yet: whatever can be opened can be converted.
#[test]
fn every_folder_with_weights_keeps_its_tensors() {
    let mut converted = 0;
    for entry in fs::read_dir(fixture("")).unwrap() {
        let source = entry.unwrap().path();
        if !source.is_dir() || open(&source).is_err() || source.join("model_index.json").exists() {
            continue;
        }
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        done("convert", &source, &out, &["--max-shard-size", "50KB"]);
        assert_eq!(tensors(&out), tensors(&source), "{}", source.display());
        converted += 1;
    }
    let proved: BTreeSet<&str> = families().map(|(name, _)| name).collect();
    assert!(converted >= proved.len(), "{converted} of {}", proved.len());
}

#[test]
fn narrow_weights_are_rounded_and_the_configuration_says_so() {
    for (name, source) in families() {
        for (dtype, named, round) in [
            ("f16", "float16", (|x| f16::from_f32(x).to_le_bytes()) as fn(f32) -> [u8; 2]),
            ("bf16", "bfloat16", |x| bf16::from_f32(x).to_le_bytes()),
        ] {
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("out");
            done("convert", &source, &out, &["--dtype", dtype]);
            let found = tensors(&out);
            for (key, (stored, shape, bytes)) in tensors(&source) {
                let floats: Vec<f32> = match stored {
                    Dtype::F32 => bytes.as_chunks().0.iter().map(|x| f32::from_le_bytes(*x)).collect(),
                    Dtype::F16 => {
                        bytes.as_chunks().0.iter().map(|x| f16::from_le_bytes(*x).to_f32()).collect()
                    }
                    Dtype::BF16 => {
                        bytes.as_chunks().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32()).collect()
                    }
                    _ => {
                        assert_eq!(found[&key], (stored, shape, bytes), "{name}: {key}");
                        continue;
                    }
                };
                let rounded: Vec<u8> = floats.into_iter().flat_map(round).collect();
                assert_eq!((&found[&key].1, &found[&key].2), (&shape, &rounded), "{name}: {key}");
            }
            let before = fs::read_to_string(source.join("config.json")).unwrap_or_default();
            let after = fs::read_to_string(out.join("config.json")).unwrap_or_default();
            let expected = ["float32", "float16", "bfloat16"].iter().fold(before, |text, old| {
                // not that of a router, which is one to compute in
                ["\"dtype", "torch_dtype"].iter().fold(text, |text, field| {
                    text.replace(&format!("{field}\": \"{old}\""), &format!("{field}\": \"{named}\""))
                })
            });
            assert_eq!(after, expected, "{name}");
            let reference = outputs(&source, &source);
            for (output, data) in floats(outputs(&out, &source)) {
                let cosine = cosine(&data, &reference[&output]);
                let least = match (dtype, name) {
                    // a place between two entries of a codebook may get the other one
                    ("bf16", "vqmodel") => 0.99,
                    // transformers' own mT5 with its weights rounded to bf16 gives 0.9976 too
                    ("bf16", _) => 0.997,
                    _ => 0.999,
                };
                assert!(cosine > least, "{name}: {output} in {dtype}: {cosine}");
            }
        }
    }
}

#[test]
fn the_embedded_model_comes_out_and_answers_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("emoji");
    let written = done("convert", Path::new("volary/emoji-clip"), &out, &[]);
    let files: Vec<&str> =
        written["files"].as_array().unwrap().iter().map(|file| file["file"].as_str().unwrap()).collect();
    assert_eq!(
        files,
        [
            "README.md",
            "open_clip_config.json",
            "open_clip_model.safetensors",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json"
        ]
    );
    let eight = scratch.path().join("eight");
    done("quantize", &out, &eight, &[]);
    let classify = |model: &Path| {
        let picture = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pictures/pizza.png");
        let output = Command::cargo_bin("volary")
            .unwrap()
            .arg("classify")
            .arg(picture)
            .args(["--labels", "一只猫,a pizza,自行车", "--json", "--model"])
            .arg(model)
            .output()
            .unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        answer[0]["labels"].clone()
    };
    let embedded = classify(Path::new("volary/emoji-clip"));
    assert_eq!(classify(&out), embedded);
    let quantized = classify(&eight);
    assert_eq!(quantized[0]["label"], embedded[0]["label"]);
    let probability = |answer: &Value| answer[0]["probability"].as_f64().unwrap();
    assert!((probability(&quantized) - probability(&embedded)).abs() < 0.02, "{quantized} {embedded}");
}

#[test]
fn a_folder_that_is_there_is_only_replaced_by_force() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    copy_folder(&fixture("bert"), &source);
    done("convert", &source, &out, &["--dtype", "f16"]);
    fs::write(out.join("note.txt"), "mine").unwrap();
    let before = tensors(&out);
    for command in ["convert", "quantize"] {
        let told = refused(command, &source, &out, &[]);
        assert!(told.contains(out.to_str().unwrap()) && told.contains("--force"), "{told}");
    }
    assert_eq!(tensors(&out), before);
    assert!(out.join("note.txt").exists());

    done("convert", &source, &out, &["--force"]);
    assert_eq!(tensors(&out), tensors(&source));
    assert!(!out.join("note.txt").exists());

    // nothing but weights is ever replaced, and not where they are read from
    let pictures = scratch.path().join("pictures");
    fs::create_dir(&pictures).unwrap();
    fs::write(pictures.join("cat.png"), "a cat").unwrap();
    let file = scratch.path().join("file");
    fs::write(&file, "a file").unwrap();
    for (place, reason) in [(&pictures, "no weights"), (&file, "no folder"), (&source, "read from")] {
        let told = refused("convert", &source, place, &["--force"]);
        assert!(told.contains(reason), "{told}");
    }
    assert_eq!(fs::read(pictures.join("cat.png")).unwrap(), b"a cat");
    assert_eq!(names(scratch.path()), ["file", "out", "pictures", "source"]);

    let empty = scratch.path().join("empty");
    fs::create_dir(&empty).unwrap();
    done("convert", &source, &empty, &["--force"]);
    assert_eq!(tensors(&empty), tensors(&source));
}

#[test]
fn what_fails_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    copy_folder(&fixture("bert"), &source);
    let weights = source.join("model.safetensors");
    let sound = fs::read(&weights).unwrap();
    let mut damaged = read_tensors(&weights).unwrap();
    let key = "encoder.layer.0.attention.self.query.weight";
    let mut values = vec![0.5_f32; 32 * 32];
    values[5] = 70000.0;
    damaged.insert(key.into(), TensorData::new(values.clone(), [32, 32]));
    save_tensors(&weights, &damaged.clone().into_iter().collect::<Vec<_>>()).unwrap();

    let told = refused("convert", &source, &out, &["--dtype", "f16", "--max-shard-size", "30KB"]);
    assert!(
        told.contains(key) && told.contains("1 numbers too large for F16") && told.contains("index 5"),
        "{told}"
    );
    assert_eq!(names(scratch.path()), ["source"]);
    done("convert", &source, &out, &["--dtype", "f16", "--allow-overflow"]);
    fs::remove_dir_all(&out).unwrap();
    done("convert", &source, &out, &["--dtype", "bf16"]);
    fs::remove_dir_all(&out).unwrap();

    values[5] = f32::NAN;
    damaged.insert(key.into(), TensorData::new(values, [32, 32]));
    save_tensors(&weights, &damaged.into_iter().collect::<Vec<_>>()).unwrap();
    for command in ["convert", "quantize"] {
        let told = refused(command, &source, &out, &[]);
        assert!(told.contains(key) && told.contains("NaN"), "{told}");
        assert_eq!(names(scratch.path()), ["source"]);
    }
    done("convert", &source, &out, &["--allow-not-finite"]);
    fs::remove_dir_all(&out).unwrap();

    fs::write(&weights, &sound[..sound.len() - 7]).unwrap();
    let told = refused("convert", &source, &out, &[]);
    assert!(told.contains("model.safetensors") && told.contains("truncated"), "{told}");
    fs::remove_file(&weights).unwrap();
    assert!(refused("convert", &source, &out, &[]).contains("no weights"));
    fs::write(&weights, &sound).unwrap();
    let told = refused("convert", &source, &scratch.path().join("no/such/place"), &[]);
    assert!(told.contains("no/such/place"), "{told}");
    // the place is inside a file
    refused("convert", &source, &weights.join("out"), &[]);
    assert_eq!(names(scratch.path()), ["source"]);
}

/// A disk that is full half-way, by a limit on the size of files.
#[cfg(unix)]
#[test]
fn a_write_that_fails_leaves_nothing() {
    let scratch = tempfile::tempdir().unwrap();
    for command in ["convert", "quantize"] {
        let output = std::process::Command::new("sh")
            .args([
                "-c",
                "trap '' XFSZ; ulimit -f 40; exec \"$@\"",
                "sh",
                env!("CARGO_BIN_EXE_volary"),
                command,
            ])
            .args([fixture("clip"), scratch.path().join("out")])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("out/model.safetensors") && told.contains("too large"), "{told}");
        assert_eq!(names(scratch.path()), Vec::<String>::new());
    }
}

#[test]
fn what_belongs_to_the_weights_comes_along() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    copy_folder(&fixture("bert"), &source);
    copy_folder(&fixture("tok_bert"), &source);
    for (file, content) in
        [("LICENSE", "free"), ("README.md", "card"), (".hidden", ""), ("tf_model.h5", ""), ("a.png", "")]
    {
        fs::write(source.join(file), content).unwrap();
    }
    fs::create_dir(source.join("onnx")).unwrap();
    let written = done("convert", &source, &out, &[]);
    for file in
        ["LICENSE", "README.md", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "config.json"]
    {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(source.join(file)).unwrap(), "{file}");
    }
    assert_eq!(written["left_out"], json!([".hidden", "a.png", "tf_model.h5"]));
    assert!(!out.join("inputs.safetensors").exists(), "tensors that are no weights");
    let total: u64 = names(&out).iter().map(|name| fs::metadata(out.join(name)).unwrap().len()).sum();
    assert_eq!(written["bytes"], total);
}

/// Every part of a pipeline is converted in its own folder.
#[test]
fn a_pipeline_comes_through_part_by_part() {
    let scratch = tempfile::tempdir().unwrap();
    let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
    copy_folder(&fixture("bert_legacy_bin"), &source.join("text_encoder"));
    copy_folder(&fixture("vit"), &source.join("unet"));
    let unet = source.join("unet");
    fs::rename(unet.join("model.safetensors"), unet.join("diffusion_pytorch_model.safetensors")).unwrap();
    fs::create_dir(source.join("scheduler")).unwrap();
    fs::write(source.join("scheduler/scheduler_config.json"), "{}").unwrap();
    let index = json!({
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "BertModel"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [null, null],
    });
    fs::write(source.join("model_index.json"), index.to_string()).unwrap();
    // the whole of it as one file, which is no component
    fs::write(source.join("v1-5-pruned.safetensors"), "").unwrap();
    done("convert", &source, &out, &["--dtype", "f16"]);
    assert_eq!(names(&out), ["model_index.json", "scheduler", "text_encoder", "unet"]);
    assert!(tensors(&out.join("text_encoder")).values().any(|(dtype, ..)| *dtype == Dtype::F16));
    assert!(out.join("unet/diffusion_pytorch_model.safetensors").exists());
    assert!(out.join("scheduler/scheduler_config.json").exists());
    assert_eq!(names(&out.join("text_encoder")).iter().filter(|name| name.ends_with(".bin")).count(), 0);

    fs::remove_file(source.join("unet/diffusion_pytorch_model.safetensors")).unwrap();
    fs::write(source.join("unet/other.safetensors"), "").unwrap();
    let told = refused("convert", &source, &scratch.path().join("again"), &[]);
    assert!(told.contains("unet") && told.contains("no weights"), "{told}");
}

/// In several files, and again in one for each part: the picture is the same. Another dtype is that of every part.
#[test]
fn a_pipeline_draws_as_before() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("pipe_sd");
    let [shards, back, half] = ["shards", "back", "half"].map(|name| scratch.path().join(name));
    done("convert", &source, &shards, &["--max-shard-size", "20KB"]);
    assert!(shards.join("unet/diffusion_pytorch_model.safetensors.index.json").exists());
    done("convert", &shards, &back, &["--dtype", "f32"]);
    for part in ["text_encoder", "unet", "vae"] {
        assert_eq!(tensors(&back.join(part)), tensors(&source.join(part)), "{part}");
    }
    for file in ["model_index.json", "prompt.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"]
    {
        assert_eq!(fs::read(back.join(file)).unwrap(), fs::read(source.join(file)).unwrap(), "{file}");
    }
    assert_eq!(outputs(&back, &source), outputs(&source, &source));
    done("convert", &source, &half, &["--dtype", "bf16"]);
    for part in ["text_encoder", "unet", "vae"] {
        let kept = |dtype: Dtype| !dtype.is_float() || dtype == Dtype::BF16;
        assert!(tensors(&half.join(part)).values().all(|(dtype, ..)| kept(*dtype)), "{part}");
    }
    assert_eq!(outputs(&half, &source).len(), outputs(&source, &source).len());
}

#[test]
fn sizes_that_are_none_are_wrong_use() {
    let scratch = tempfile::tempdir().unwrap();
    let source = fixture("bert");
    for arguments in [
        &["--max-shard-size", "big"][..],
        &["--max-shard-size", "0"],
        &["--to", "gguf"],
        &["--dtype", "int8"],
    ] {
        let output = volary("convert", &source, &scratch.path().join("out"), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
    for arguments in [&["--bits", "3"][..], &["--block", "31"], &["--dtype", "int4"]] {
        let output = volary("quantize", &source, &scratch.path().join("out"), arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    }
}

/// Every system reads quantized weights without knowing. The least cosine to the outputs of the weights as they were:
/// 0.99 in 8 bits; in 4 bits 0.8, for the six logits of a tiny CLIP lie close to zero, and T5 does not divide its scores.
#[test]
fn every_fixture_runs_quantized() {
    // a matrix with fewer columns than a block stays as it is, and the toys of convolutions and single layers have no others
    let has_a_block = |(_, source): &(&str, PathBuf)| {
        tensors(source).values().any(|(_, shape, _)| matches!(shape[..], [_, cols] if cols >= 32))
    };
    let left_out: Vec<&str> =
        families().filter(|family| !has_a_block(family)).map(|(name, _)| name).collect();
    let is_layer = |name: &&str| name.starts_with("fastmoe_") || name.ends_with("_moe");
    let (layers, models): (Vec<&str>, Vec<&str>) = left_out.into_iter().partition(is_layer);
    assert_eq!((layers.len(), models), (8, vec!["vae_kl", "vae_kl_legacy", "vqmodel"]));
    for (name, source) in families().filter(has_a_block) {
        let reference = outputs(&source, &source);
        // a router may choose another expert
        let in_four = if name == "switch_transformers" { 0.75 } else { 0.8 };
        for (bits, block, least) in [("8", "32", 0.99), ("4", "32", in_four)] {
            let scratch = tempfile::tempdir().unwrap();
            let out = scratch.path().join("out");
            let report = done("quantize", &source, &out, &["--bits", bits, "--block", block]);
            assert!(!report["tensors"].as_array().unwrap().is_empty(), "{name}");
            // the names of a toy take more than its numbers
            let file = names(&out).into_iter().find(|file| file.ends_with("model.safetensors")).unwrap();
            let names = u64::from_le_bytes(*fs::read(out.join(file)).unwrap().first_chunk().unwrap());
            let numbers = report["bytes_after"].as_u64().unwrap() - names;
            assert!(numbers < report["bytes_before"].as_u64().unwrap(), "{name}");
            let shapes = |folder: &Path| -> BTreeMap<String, Vec<usize>> {
                let folder = Folder::Disk(folder.into());
                let checkpoint = (System::of(&folder).unwrap().checkpoint)(&folder).unwrap();
                checkpoint.entries().iter().map(|entry| (entry.name.clone(), entry.shape.clone())).collect()
            };
            assert_eq!(shapes(&out), shapes(&source), "{name}");
            let found = floats(outputs(&out, &source));
            let worst = found.map(|(output, data)| cosine(&data, &reference[&output])).fold(1.0, f64::min);
            println!("{name}: {bits} bits: cosine {worst:.5}");
            assert!(worst > least, "{name}: {bits} bits: {worst}");
            // packed as it is computed with, or unpacked beforehand: the same numbers
            let unpacked = floats(outputs_as(&out, &source, Packing::Floats));
            let packed = outputs(&out, &source);
            let worst = unpacked.map(|(output, data)| cosine(&data, &packed[&output])).fold(1.0, f64::min);
            assert!(worst > 0.999_999, "{name}: {bits} bits: {worst} of what the packed numbers mean");
        }
        // without a quantized file
        let packed = floats(outputs_as(&source, &source, Packing::Into(Quantization::INT8)));
        let worst = packed.map(|(output, data)| cosine(&data, &reference[&output])).fold(1.0, f64::min);
        assert!(worst > 0.99, "{name}: packed while it is read: {worst}");
    }
}

#[test]
fn what_is_quantized_is_shown_and_comes_back() {
    let scratch = tempfile::tempdir().unwrap();
    let (out, back) = (scratch.path().join("out"), scratch.path().join("back"));
    done("quantize", &fixture("clip"), &out, &["--keep", "*embedding*"]);
    let told = Command::cargo_bin("volary").unwrap().arg("info").arg(&out).output().unwrap();
    let told = String::from_utf8(told.stdout).unwrap();
    assert!(told.contains("int8 in blocks of 32"), "{told}");
    let key = "text_model.embeddings.token_embedding.weight";
    assert_eq!(tensors(&out)[key], tensors(&fixture("clip"))[key]);

    done("convert", &out, &back, &[]);
    assert_eq!(tensors(&back), tensors(&out));
    let told = refused("quantize", &fixture("clip"), &back, &["--force", "--keep", "*embeding*"]);
    assert!(told.contains("*embeding*"), "{told}");
    assert_eq!(tensors(&back), tensors(&out), "a failure replaces nothing");
}

#[test]
fn a_quantized_file_without_its_scales_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    done("quantize", &fixture("bert"), &out, &[]);
    let weights = out.join("model.safetensors");
    let file = fs::read(&weights).unwrap();
    // names of the same length: the file stays what it is but for them
    let text = b"pooler.dense.weight.scales";
    let at = file.windows(text.len()).position(|window| window == text).unwrap();
    let mut renamed = file.clone();
    renamed[at + text.len() - 1] = b'z';
    fs::write(&weights, renamed).unwrap();
    let output = Command::cargo_bin("volary").unwrap().arg("info").arg(&out).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(told.contains("model.safetensors"), "{told}");
    assert!(
        told.contains("`pooler.dense.weight.scales` is missing beside `pooler.dense.weight.q8`"),
        "{told}"
    );
}

/// Runs where the Python that the variable `VOLARY_PYTHON` names, or `python3`, has torch and transformers.
#[test]
fn transformers_reads_what_is_written() {
    let python = std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into());
    let import = ["-c", "import torch, transformers"];
    if !std::process::Command::new(&python).args(import).output().is_ok_and(|output| output.status.success())
    {
        println!("skipped: `{python}` has no torch and transformers; name one that has in VOLARY_PYTHON");
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/convert_roundtrip.py");
    let cases: &[(&str, &[&str])] = &[
        ("clip", &["--dtype", "f32"]),
        ("altclip", &["--dtype", "f32"]),
        ("chinese_clip", &["--dtype", "f32"]),
        ("taiyi", &["--dtype", "f32"]),
        ("bert", &["--dtype", "f32"]),
        ("bert", &["--dtype", "f32", "--max-shard-size", "30KB"]),
        ("bert_legacy_bin", &[]),
        ("vit_f16", &["--dtype", "f32"]),
        ("llama", &["--max-shard-size", "30KB"]),
        ("llama_bf16", &["--dtype", "f32"]),
        ("llama_sharded", &[]),
    ];
    for (name, arguments) in cases {
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        done("convert", &fixture(name), &out, arguments);
        let output =
            std::process::Command::new(&python).arg(&script).args([&out, &fixture(name)]).output().unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        println!("{name} {arguments:?}\n{told}");
        assert!(output.status.success(), "{name}: {told}{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Ranks are merged as their system does it, by both commands, and `info` reads them.
#[test]
fn ranks_become_one_checkpoint() {
    for (name, ranks) in [("cpm1", "80000"), ("cpm2", "100000"), ("glm", "blocklm"), ("glm130b", "49300")] {
        let scratch = tempfile::tempdir().unwrap();
        let (source, out) = (scratch.path().join("source"), scratch.path().join("out"));
        fs::create_dir(&source).unwrap();
        fs::copy(fixture(name).join("config.json"), source.join("config.json")).unwrap();
        copy_tree(&fixture(name).join(ranks), &source.join(ranks));
        done("convert", &source, &out, &["--dtype", "f32"]);
        assert_eq!(outputs(&out, &fixture(name)), outputs(&fixture(name), &fixture(name)), "{name}");
        done("quantize", &source, &scratch.path().join("eight"), &[]);
        let info = Command::cargo_bin("volary").unwrap().arg("info").arg(&source).output().unwrap();
        assert!(info.status.success(), "{name}: {}", String::from_utf8_lossy(&info.stderr));
    }
}

/// Copies a folder and those in it.
fn copy_tree(from: &Path, to: &Path) {
    copy_folder(from, to);
    for entry in fs::read_dir(from).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        copy_tree(&entry.path(), &to.join(entry.file_name()));
    }
}
