//! The program as a user meets it.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use burn::tensor::Device;
use ndarray::Axis;
use serde_json::Value;
use volary::Clip;
use volary::bert::BertConfig;
use volary::folder::Folder;
use volary_kernels::random::seeded;
use volary_vision::image::{ReadOptions, Rgb8, read};
use volary_weights::{read_tensors, save};

use crate::support::{copy_folder, fixture};

/// The program, without a network and with an empty cache.
pub fn volary() -> Command {
    let mut command = Command::cargo_bin("volary").unwrap();
    command.env("HF_HUB_OFFLINE", "1").env("HF_HUB_CACHE", "no/cache");
    command
}

/// A picture of `examples/pictures`.
pub fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pictures").join(name)
}

fn stdout(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn classify_among_labels_in_both_languages() {
    let labels = "一只猫,a pizza,自行车,a rocket";
    let told = stdout(
        volary()
            .arg("classify")
            .args([example("pizza.png"), example("rocket.png")])
            .args(["--labels", labels, "--json"]),
    );
    let answers: Value = serde_json::from_str(&told).unwrap();
    for (answer, (name, label)) in
        answers.as_array().unwrap().iter().zip([("pizza.png", "a pizza"), ("rocket.png", "a rocket")])
    {
        assert!(answer["image"].as_str().unwrap().ends_with(name));
        let labels = answer["labels"].as_array().unwrap();
        assert_eq!(labels.len(), 4);
        assert_eq!(labels[0]["label"], label);
        let sum: f64 = labels.iter().map(|label| label["probability"].as_f64().unwrap()).sum();
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    }
}

#[test]
fn classify_without_labels_names_in_both_languages() {
    let told = stdout(volary().arg("classify").arg(example("bicycle.png")).args(["--json", "--top", "3"]));
    let answers: Value = serde_json::from_str(&told).unwrap();
    let labels = answers[0]["labels"].as_array().unwrap();
    assert_eq!(labels.len(), 3);
    assert_eq!((labels[0]["label"].as_str(), labels[0]["zh"].as_str()), (Some("bicycle"), Some("自行车")));
}

/// Each label's vector is the mean of its sentences' unit vectors, made a unit vector again.
#[test]
fn classify_averages_templates() {
    let templates = ["a photo of a {}", "一张{}的照片"];
    let labels = ["cat", "bicycle", "rocket"];
    let mut command = volary();
    command.arg("classify").arg(example("cat.png")).args(["--json", "--labels", &labels.join(",")]);
    for template in templates {
        command.args(["--template", template]);
    }
    let told: Value = serde_json::from_str(&stdout(&mut command)).unwrap();

    let clip = Clip::embedded().load(&Device::flex()).unwrap();
    let picture = clip.encode_images(&[read(&example("cat.png"), ReadOptions::SEEN).unwrap()]).unwrap();
    let scale = clip.scale();
    let logits = labels.map(|label| {
        let sentences = templates.map(|template| template.replace("{}", label));
        let sum = clip.encode_texts(&sentences).unwrap().sum_axis(Axis(0));
        scale * sum.dot(&picture.row(0)) / sum.dot(&sum).sqrt()
    });
    let total: f32 = logits.iter().map(|logit| logit.exp()).sum();
    for (label, logit) in labels.iter().zip(logits) {
        let answers = told[0]["labels"].as_array().unwrap();
        let found = answers.iter().find(|answer| answer["label"] == *label).unwrap();
        let found = found["probability"].as_f64().unwrap() as f32;
        assert!((found - logit.exp() / total).abs() < 1e-4, "{label}: {found}");
    }
}

#[test]
fn a_broken_picture_does_not_stop_the_others() {
    let scratch = tempfile::tempdir().unwrap();
    let text = scratch.path().join("text.png");
    fs::write(&text, "this is no picture").unwrap();
    let output = volary()
        .arg("classify")
        .args([&text, &example("cat.png"), &scratch.path().join("gone.png")])
        .args(["--labels", "cat,dog", "--json"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(answers[0]["error"].as_str().unwrap().contains("text.png"));
    assert_eq!(answers[1]["labels"].as_array().unwrap().len(), 2);
    assert!(answers[2]["error"].as_str().unwrap().contains("gone.png"));
}

#[test]
fn every_kind_of_picture_is_classified() {
    let mut pictures: Vec<PathBuf> = fs::read_dir(fixture("pictures"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
            ["png", "jpg", "webp", "gif", "bmp"].contains(&ending)
        })
        .collect();
    pictures.sort();
    assert!(pictures.len() > 20, "{}", pictures.len());
    let output =
        volary().arg("classify").args(&pictures).args(["--labels", "cat,dog", "--json"]).output().unwrap();
    let answers: Value = serde_json::from_slice(&output.stdout).unwrap();
    for (answer, path) in answers.as_array().unwrap().iter().zip(&pictures) {
        // Either an answer or a reason.
        let ok =
            answer["labels"].is_array() || answer["error"].as_str().is_some_and(|error| error.len() > 10);
        assert!(ok, "{}: {answer}", path.display());
    }
}

#[test]
fn wrong_use_is_exit_code_2() {
    for arguments in [
        &["classify"][..],
        &["classify", "a.png", "--labels", " , "],
        &["classify", "a.png", "--template", "no place"],
        &["search", "."],
        &["search", ".", "cat", "--weight", "0.5"],
        &["search", ".", "cat", "--weight", "0,0"],
        &["list", "--task", "dance"],
        &["nonsense"],
    ] {
        let output = volary().args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(!output.stderr.is_empty());
    }
}

#[test]
fn a_model_that_is_not_there_is_told() {
    for (name, told) in [
        ("openai/clip-vit-base-patch32", "the network is off"),
        ("someone/something@v1", "someone/something@v1 is not complete in /"),
        ("clip-vit-base-patch32", "did you mean `openai/clip-vit-base-patch32`"),
        ("no such thing", "neither a folder nor a preset"),
    ] {
        let output = volary()
            .arg("classify")
            .arg(example("cat.png"))
            .args(["--labels", "cat", "--model", name])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{name}");
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(message.contains(told), "{name}: {message}");
    }
}

#[test]
fn a_device_that_is_not_there_is_told() {
    let output =
        volary().arg("classify").arg(example("cat.png")).args(["--device", "cuda:7"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("CUDA"));
}

#[test]
fn embeddings_are_unit_vectors() {
    let scratch = tempfile::tempdir().unwrap();
    let file = scratch.path().join("out.safetensors");
    volary()
        .arg("embed")
        .arg(example("cat.png"))
        .args(["a cat", "一只猫", "-o"])
        .arg(&file)
        .assert()
        .success();
    let tensors = read_tensors(&file).unwrap();
    for (name, rows) in [("image", 1), ("text", 2)] {
        let values: Vec<f32> = tensors[name].iter::<f32>().collect();
        let width = values.len() / rows;
        for row in values.chunks_exact(width) {
            let length: f32 = row.iter().map(|value| value * value).sum();
            assert!((length - 1.0).abs() < 1e-4, "{name}: {length}");
        }
    }
}

/// A text encoder turns texts into vectors, and says that it cannot look at pictures.
#[test]
fn texts_are_embedded_by_a_text_encoder() {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tok_bert"), folder.path());
    let disk = Folder::Disk(folder.path().into());
    let vocab_size = disk.tokenizer().unwrap().vocab_size();
    let config = format!(
        r#"{{"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": {vocab_size}, "max_position_embeddings": 12}}"#
    );
    fs::write(folder.path().join("config.json"), config).unwrap();
    let config = BertConfig::parse(&disk.config("config.json").unwrap()).unwrap();
    let weights = folder.path().join("model.safetensors");
    save(&seeded(1, &Device::flex(), |device| config.init(device)), config.keys(), None, &weights, None)
        .unwrap();

    let embed = |inputs: &[&std::ffi::OsStr]| {
        let mut command = volary();
        command.arg("embed").args(inputs).args(["--json", "--model"]).arg(folder.path());
        command
    };
    let told = stdout(&mut embed(&["一只猫".as_ref(), "a cat".as_ref()]));
    let answers: Value = serde_json::from_str(&told).unwrap();
    for (answer, text) in answers.as_array().unwrap().iter().zip(["一只猫", "a cat"]) {
        assert_eq!((&answer["input"], &answer["kind"]), (&text.into(), &"text".into()));
        assert_eq!(answer["embedding"].as_array().unwrap().len(), 8);
    }
    let output = embed(&[example("cat.png").as_os_str()]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("a text encoder cannot look at pictures"), "{said}");
}

#[test]
fn a_model_is_packed_while_it_is_loaded() {
    let probability = |dtype| {
        let picture = example("bicycle.png");
        let arguments = ["--labels", "bicycle,cat,house", "--json", "--dtype", dtype];
        let told: Value =
            serde_json::from_str(&stdout(volary().arg("classify").arg(picture).args(arguments))).unwrap();
        assert_eq!(told[0]["labels"][0]["label"], "bicycle", "{dtype}: {told}");
        told[0]["labels"][1]["probability"].as_f64().unwrap()
    };
    let [float, eight, four] = ["f32", "int8", "int4"].map(probability);
    assert!(eight != float && (eight / float - 1.0).abs() < 0.05, "{eight} for {float}");
    assert!(four != eight && (four / float - 1.0).abs() < 0.5, "{four} for {float}");
}

#[test]
fn info_shows_what_a_folder_is() {
    let told = stdout(volary().arg("info").arg(fixture("clip")).arg("--json"));
    let info: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((info["system"].as_str(), info["parameters"].as_u64()), (Some("clip"), Some(43_521)));
    let told = stdout(volary().args(["info", "google-bert/bert-base-uncased", "--json"]));
    let info: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(info["parameters"].as_u64(), Some(109_482_240));
    assert_eq!(info["memory"]["f16"].as_u64(), Some(2 * 109_482_240));
    let told = stdout(volary().args(["info", "BAAI/AquilaChat-7B", "--json"]));
    let info: Value = serde_json::from_str(&told).unwrap();
    // 65 norms stay in f32; matrices take 17 / 16 bytes a value, or 5 / 8
    let (norms, matrices) = (65 * 4096, 2 * 100_008 * 4096 + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008));
    assert_eq!(info["memory"]["int8"].as_u64(), Some(matrices * 17 / 16 + 4 * norms));
    assert_eq!(info["memory"]["int4"].as_u64(), Some(matrices * 5 / 8 + 4 * norms));
}

#[test]
fn a_variant_takes_the_place_of_the_other_weights_in_every_command() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::copy(fixture("vit_f16").join("config.json"), at("config.json")).unwrap();
    fs::copy(fixture("vit_f16").join("model.safetensors"), at("model.fp16.safetensors")).unwrap();
    fs::write(at("model.safetensors"), "no weights at all").unwrap();
    let input = fixture("vit_f16").join("inputs.safetensors");
    let forward = |variant: &[&str]| {
        let mut command = volary();
        command.arg("forward").arg(folder.path()).arg("--input").arg(&input);
        command.arg("--output").arg(at("outputs.safetensors")).args(variant);
        command
    };
    forward(&[]).assert().code(1);
    stdout(&mut forward(&["--variant", "fp16"]));
    let info = |path: &Path| {
        let told = stdout(volary().arg("info").arg(path).args(["--json", "--variant", "fp16"]));
        serde_json::from_str::<Value>(&told).unwrap()["stored"]["dtypes"].clone()
    };
    assert_eq!(info(folder.path()), serde_json::json!({"F16": 56}));

    let out = at("out");
    stdout(volary().arg("convert").args([folder.path(), &out]).args(["--variant", "fp16"]));
    let written = volary_weights::open(&out.join("model.safetensors")).unwrap();
    assert_eq!(written.entries().len(), 56);

    let mut embedded = volary();
    embedded.args(["embed", "a cat", "--variant", "int3"]); // it has none
    for mut command in [forward(&["--variant", "int3"]), embedded] {
        let output = command.output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains("no weights of the variant `int3`"), "{told}");
    }
}

#[test]
fn eval_on_the_held_out_sample() {
    let told = stdout(volary().arg("eval").arg(fixture("emoji_sample")).arg("--json"));
    let scores: Value = serde_json::from_str(&told).unwrap();
    assert_eq!(scores.as_array().unwrap().len(), 2, "one row a language");
    for score in scores.as_array().unwrap() {
        assert_eq!(score["pictures"], 48);
        assert!(score["image_to_text"]["at_10"].as_f64().unwrap() >= 0.5, "{score}");
        assert!(score["five_way"].as_f64().unwrap() >= 0.75, "{score}");
    }
}

#[test]
fn doctor_finds_the_model_well() {
    let told = stdout(volary().args(["doctor", "--json"]));
    let checks: Value = serde_json::from_str(&told).unwrap();
    let model = checks.as_array().unwrap().iter().find(|check| check["name"] == "model").unwrap();
    assert_eq!(model["ok"], true, "{model}");
}

#[test]
fn doctor_names_the_kernels_in_use() {
    let told = stdout(volary().env("VOLARY_CPU", "plain").arg("doctor"));
    assert!(told.contains("ok  kernels    plain, of plain"), "{told}");
    #[cfg(target_arch = "x86_64")]
    {
        let told = stdout(volary().env_remove("VOLARY_CPU").arg("doctor"));
        let used = told.lines().find(|line| line.starts_with("ok  kernels")).unwrap();
        let has_vnni = used.contains("kernels    avx512") && is_x86_feature_detected!("avx512vnni");
        assert_eq!(used.contains(" + avx512vnni"), has_vnni, "{used}");
    }
    let output = volary().env("VOLARY_CPU", "mmx").arg("doctor").output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("VOLARY_CPU is `mmx`"));
}

#[test]
fn kernels_that_nobody_knows_are_refused() {
    let output = volary().env("VOLARY_CPU", "mmx").arg("list").output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("error: VOLARY_CPU is `mmx`"));
}

/// A toy model, a query and an example with its mask, in a folder.
fn segmentation() -> (tempfile::TempDir, PathBuf) {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    copy_folder(&fixture("seggpt_hf"), &model);
    let preprocessor =
        r#"{"image_processor_type": "SegGptImageProcessor", "size": {"height": 16, "width": 24}}"#;
    fs::write(model.join("preprocessor_config.json"), preprocessor).unwrap();
    for (name, value) in [("mask.png", 255), ("black.png", 0)] {
        let pixels = (0..160 * 160).flat_map(|at| [if at % 160 < 64 { value } else { 0 }; 3]).collect();
        Rgb8::new(160, 160, pixels).unwrap().save_png(&scratch.path().join(name)).unwrap();
    }
    (scratch, model)
}

#[test]
fn segment_writes_a_mask_and_an_overlay_as_large_as_the_picture() {
    let (scratch, model) = segmentation();
    let size = |picture: &Path| {
        let picture = read(picture, ReadOptions::SEEN).unwrap();
        [picture.width(), picture.height()]
    };
    let prompt = size(&example("cat.png"));
    assert_eq!(prompt, [160, 160], "as large as the mask");
    let segment = |prompts: usize, output: &str| {
        let mut command = volary();
        command.current_dir(&scratch).arg("segment").arg(example("rocket.png"));
        for _ in 0..prompts {
            command.arg("--prompt").arg(example("cat.png")).args(["--mask", "mask.png"]);
        }
        command.arg("--model").arg(&model).args(["--json", "--output", output]);
        let answers: Value = serde_json::from_str(&stdout(&mut command)).unwrap();
        answers[0].clone()
    };
    let answer = segment(1, "one.png");
    assert_eq!(
        (answer["mask"].as_str(), answer["overlay"].as_str()),
        (Some("one.png"), Some("rocket.overlay.png"))
    );
    assert!((0.0..=1.0).contains(&answer["covered"].as_f64().unwrap()));
    let asked = size(&example("rocket.png"));
    for file in ["one.png", "rocket.overlay.png"] {
        assert_eq!(size(&scratch.path().join(file)), asked, "{file}");
    }
    segment(2, "two.png");
    let names =
        fs::read_dir(&scratch).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(!names.into_iter().any(|name| name.ends_with(".partial")));
}

#[test]
fn segment_says_what_is_wrong() {
    let (scratch, model) = segmentation();
    let fails = |arguments: &[&str], code: i32, told: &str| {
        let output = volary().current_dir(&scratch).arg("segment").args(arguments).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{message}");
        assert!(message.contains(told), "{message}");
    };
    let (model, query) = (model.to_str().unwrap(), example("cat.png"));
    let query = query.to_str().unwrap();
    let with = |prompt: &'static str, mask: &'static str| {
        [query, "--prompt", prompt, "--mask", mask, "--model", model]
    };
    fails(&[query, "--model", model], 2, "--prompt");
    fails(
        &[&with("mask.png", "mask.png")[..], &["--prompt", "mask.png"]].concat(),
        2,
        "2 --prompt and 1 --mask",
    );
    fails(
        &[&with("mask.png", "mask.png")[..], &["-o", "a.png", "--overlay", "a.png"]].concat(),
        2,
        "both a.png",
    );
    fails(&with("mask.png", "black.png"), 1, "example 1: the mask is black, it marks nothing");
    fails(&with("gone.png", "mask.png"), 1, "gone.png");
    fails(&with("model/config.json", "mask.png"), 1, "config.json");
    fs::write(
        scratch.path().join("model/preprocessor_config.json"),
        r#"{"image_processor_type": "SegGptImageProcessor"}"#,
    )
    .unwrap();
    fails(&with("mask.png", "mask.png"), 1, "makes pictures of 448x448, the model sees 24x16");
    let other = fixture("vit");
    let vit = [query, "--prompt", "mask.png", "--mask", "mask.png", "--model", other.to_str().unwrap()];
    fails(&vit, 1, "vit cannot segment pictures as an example shows it");
}

/// 512 tokens a device, of which each goes to 80 experts, 1024 numbers of 2 bytes, there and back, in 48 blocks.
#[test]
fn a_plan_tells_memory_operations_and_bytes() {
    let plan = |layout: &[&str]| {
        let mut command = volary();
        command
            .args(["plan", "M6-10T", "--batch", "512", "--sequence", "512", "--dtype", "bf16"])
            .args(layout);
        command
    };
    let told: Value = serde_json::from_str(&stdout(plan(&["--expert", "512"]).arg("--json"))).unwrap();
    let told = &told[0];
    assert_eq!(
        (told["devices"].as_u64(), told["parameters"].as_u64()),
        (Some(512), Some(10_050_928_508_928))
    );
    let sent = &told["fullest"]["sent"];
    assert_eq!(sent["to_experts"].as_u64(), Some(2 * 512 * 80 * 1024 * 2 / 512 * 511 * 48));
    assert_eq!(sent["to_experts"], sent["to_experts_backward"]);
    let table = stdout(&mut plan(&["--expert", "512", "--pipeline", "4"]));
    assert!(table.contains("2048: data 1 x expert 512 x tensor 1 x pipeline 4"), "{table}");
    assert!(table.contains("memory in all") && table.contains("of 4, the fullest"), "{table}");

    let refused = plan(&["--expert", "3", "--tensor", "0", "--pipeline", "49"]).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    let told = String::from_utf8_lossy(&refused.stderr);
    for problem in ["--expert 3 does not divide", "--tensor 0:", "--pipeline 49: the model has 48 blocks"] {
        assert!(told.contains(problem), "{told}");
    }
    let unknown =
        volary().args(["plan", "volary/emoji-clip", "--batch", "1", "--sequence", "1"]).output().unwrap();
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("no plans for clip"));
}
