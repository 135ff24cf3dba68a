//! Every model of two towers serves the same commands: what they say is what a forward pass says.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use burn::tensor::{Device, Tensor, TensorData};
use serde_json::{Value, json};
use tempfile::TempDir;
use volary::altclip::{self, AltClipConfig};
use volary::bert::BertConfig;
use volary::brivl::BrivlConfig;
use volary::chinese_clip::{self, ChineseClipConfig};
use volary::clip::normalise;
use volary::eva_clip::EvaClipConfig;
use volary::folder::Folder;
use volary::registry::{System, forward};
use volary::taiyi::{self, TaiyiConfig};
use volary_kernels::random::seeded;
use volary_text::tokenizer::{BatchOptions, PadTo};
use volary_vision::image::{ReadOptions, read};
use volary_weights::{LoadOptions, save};

use crate::support::{copy_folder, fixture};

/// The preprocessor of pictures with 16 pixels a side.
fn write_preprocessor(folder: &Path) {
    let file = "preprocessor_config.json";
    let text = fs::read_to_string(fixture("image_chinese_clip").join(file)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["size"] = json!({"height": 16, "width": 16});
    fs::write(folder.join(file), config.to_string()).unwrap();
}

/// A folder with a fixture's shape, another's tokenizer, and as many tokens as that knows; no weights yet. `texts` leads
/// to the configuration of the tower for texts.
fn shell(shape: &str, file: &str, texts: &str, tokenizer: &str) -> (TempDir, Folder) {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture(shape), folder.path());
    copy_folder(&fixture(tokenizer), folder.path());
    fs::remove_file(folder.path().join(file.replace("config.json", "model.safetensors"))).unwrap();
    write_preprocessor(folder.path());
    let disk = Folder::Disk(folder.path().into());
    let text = fs::read_to_string(folder.path().join(file)).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let texts = config.pointer_mut(texts).unwrap();
    texts["vocab_size"] = json!(disk.tokenizer().unwrap().vocab_size());
    fs::write(folder.path().join(file), config.to_string()).unwrap();
    (folder, disk)
}

/// An untrained AltCLIP, Chinese CLIP, EVA-CLIP and BriVL.
fn folders() -> [TempDir; 4] {
    let device = Device::flex();
    let (alt, disk) = shell("altclip", "config.json", "/text_config", "tok_xlmr");
    let config = AltClipConfig::of(&disk).unwrap();
    let model = seeded(1, &device, |device| config.init(device));
    save(&model, &altclip::KEYS, None, &alt.path().join("model.safetensors"), None).unwrap();
    let (chinese, disk) = shell("chinese_clip", "config.json", "/text_config", "tok_bert");
    let (config, _) = ChineseClipConfig::of(&disk).unwrap();
    let model = seeded(1, &device, |device| config.init(device));
    save(&model, &chinese_clip::KEYS, None, &chinese.path().join("model.safetensors"), None).unwrap();
    let file = "open_clip_config.json";
    let (eva, disk) = shell("open_clip_eva02", file, "/model_cfg/text_cfg", "tok_clip");
    let (config, layout) = EvaClipConfig::of(&disk).unwrap();
    let weights = eva.path().join("open_clip_model.safetensors");
    save(&seeded(1, &device, |device| config.init(device)), config.keys(layout), None, &weights, None)
        .unwrap();
    let (brivl, disk) = shell("brivl", "config.json", "/bert", "tok_bert");
    let mut described = crate::support::json(&brivl.path().join("config.json"));
    described["IMG_SIZE"] = json!(16);
    fs::write(brivl.path().join("config.json"), described.to_string()).unwrap();
    let config = BrivlConfig::of(&Folder::Disk(fixture("brivl"))).unwrap();
    let vocab_size = disk.tokenizer().unwrap().vocab_size();
    let bert = BertConfig { vocab_size, ..config.bert.clone() };
    let config = BrivlConfig { image_size: 16, bert, ..config };
    let weights = brivl.path().join("model.safetensors");
    save(&seeded(1, &device, |device| config.init(device)), config.keys(), None, &weights, None).unwrap();
    [alt, chinese, eva, brivl]
}

fn picture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/pictures").join(name)
}

fn told(arguments: &[&str], paths: &[&Path]) -> Value {
    let mut command = Command::cargo_bin("volary").unwrap();
    command.env("HF_HUB_OFFLINE", "1").env("HF_HUB_CACHE", "no/cache").args(arguments).args(paths);
    let output = command.arg("--json").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What goes into the model of a folder for a picture and texts.
fn inputs(folder: &Folder, image: &Path, texts: &[&str]) -> BTreeMap<String, TensorData> {
    let device = Device::flex();
    let picture = read(image, ReadOptions::SEEN).unwrap();
    let pixels = folder.preprocessor().unwrap().batch(&[picture], &device).unwrap();
    let system = System::of(folder).unwrap().name;
    let pad = if system == "brivl" { PadTo::Length(20) } else { PadTo::Longest };
    let options = BatchOptions { max_length: None, pad };
    let (ids, real) = folder.tokenizer().unwrap().encode_batch(texts, &options).unwrap().to_tensors(&device);
    let named = |names: &[&'static str]| {
        let tensors = [pixels.into_data(), ids.into_data(), real.into_data()];
        names.iter().map(|&name| name.to_owned()).zip(tensors).collect()
    };
    match system {
        "eva_clip" => named(&["image", "text"]),
        "brivl" => named(&["image", "texts", "mask_texts"]),
        _ => named(&["pixel_values", "input_ids", "attention_mask"]),
    }
}

/// The rows of an output at length 1.
fn unit(rows: &TensorData) -> Vec<f32> {
    let rows = Tensor::<2>::from_data(rows.clone(), &Device::flex());
    normalise(rows).into_data().iter::<f32>().collect()
}

fn numbers(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

#[track_caller]
fn assert_close(found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len());
    let close = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-4);
    assert!(close, "{found:?} {expected:?}");
}

#[test]
fn classify_and_embed_say_what_a_forward_pass_says() {
    let image = picture("cat.png");
    let texts = ["一只猫", "a dog, a cat"];
    for folder in folders() {
        let disk = Folder::Disk(folder.path().into());
        let model = folder.path().to_str().unwrap();
        let inputs = inputs(&disk, &image, &texts);
        let outputs: BTreeMap<String, TensorData> =
            forward(&disk, &inputs, &LoadOptions::default(), &Device::flex()).unwrap().into_iter().collect();

        let logits: Vec<f32> = match outputs.get("logits_per_image") {
            Some(logits) => logits.iter::<f32>().collect(),
            None => outputs["similarity"].iter::<f32>().map(|cosine| cosine / 0.07).collect(), // BriVL's
        };
        let exponents: Vec<f32> = logits.iter().map(|logit| logit.exp()).collect();
        let expected: Vec<f32> = exponents.iter().map(|one| one / exponents.iter().sum::<f32>()).collect();
        let labels = folder.path().join("labels.txt");
        fs::write(&labels, texts.join("\n")).unwrap();
        let labels = labels.to_str().unwrap();
        let answers = told(&["classify", "--model", model, "--labels-file", labels], &[&image]);
        let probability = |text: &&str| {
            let labels = answers[0]["labels"].as_array().unwrap();
            let label = labels.iter().find(|label| label["label"] == **text).unwrap();
            label["probability"].as_f64().unwrap() as f32
        };
        assert_close(&texts.iter().map(probability).collect::<Vec<_>>(), &expected);

        let embedded = told(&["embed", "--model", model, texts[0], texts[1]], &[&image]);
        let found: Vec<Vec<f32>> =
            embedded.as_array().unwrap().iter().map(|row| numbers(&row["embedding"])).collect();
        let either = |one: &str, other: &str| unit(outputs.get(one).unwrap_or_else(|| &outputs[other]));
        assert_close(&found[..2].concat(), &either("text_embeds", "text_features"));
        assert_close(&found[2], &either("image_embeds", "image_features"));
    }
}

#[test]
fn search_ranks_with_any_towers() {
    let pictures = tempfile::tempdir().unwrap();
    copy_folder(&picture(""), pictures.path());
    let is_picture = |entry: &fs::DirEntry| entry.path().extension().is_some_and(|ending| ending == "png");
    let count = fs::read_dir(pictures.path()).unwrap().flatten().filter(is_picture).count();
    for folder in folders() {
        let model = folder.path().to_str().unwrap();
        let like = pictures.path().join("cat.png");
        let found = told(&["search", "--model", model, "--like"], &[&like, pictures.path()]);
        let found = found[0]["images"].as_array().unwrap();
        assert_eq!(found.len(), count.min(10));
        assert!(found[0]["image"].as_str().unwrap().ends_with("cat.png"), "{found:?}");
        assert!((found[0]["similarity"].as_f64().unwrap() - 1.0).abs() < 1e-3);
    }
}

/// A Taiyi beside the fixture `clip`: pictures as before, texts by the other tower.
#[test]
fn another_tower_for_texts_takes_the_place_of_the_models() {
    let device = Device::flex();
    let clip = tempfile::tempdir().unwrap();
    copy_folder(&fixture("clip"), clip.path());
    write_preprocessor(clip.path());
    let texts = tempfile::tempdir().unwrap();
    copy_folder(&fixture("tok_bert"), texts.path());
    let disk = Folder::Disk(texts.path().into());
    let write = |labels: usize| {
        let labels: BTreeMap<String, String> =
            (0..labels).map(|label| (label.to_string(), format!("LABEL_{label}"))).collect();
        let config = json!({
            "model_type": "bert", "architectures": ["BertForSequenceClassification"], "id2label": labels,
            "vocab_size": disk.tokenizer().unwrap().vocab_size(), "hidden_size": 8, "intermediate_size": 16,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 12,
        });
        fs::write(texts.path().join("config.json"), config.to_string()).unwrap();
        let config = TaiyiConfig::of(&disk).unwrap();
        let model = seeded(1, &device, |device| config.init(device));
        save(&model, &taiyi::KEYS, None, &texts.path().join("model.safetensors"), None).unwrap();
    };
    write(20);
    let towers = ["--model", clip.path().to_str().unwrap(), "--text-model", texts.path().to_str().unwrap()];
    let embedded = told(&[&["embed", "一只猫"], &towers[..]].concat(), &[&picture("cat.png")]);

    let clip_disk = Folder::Disk(clip.path().into());
    let pixels = clip_disk.preprocessor().unwrap();
    let pixels = pixels.batch(&[read(&picture("cat.png"), ReadOptions::SEEN).unwrap()], &device).unwrap();
    let inputs = BTreeMap::from([
        ("pixel_values".to_owned(), pixels.into_data()),
        ("input_ids".to_owned(), TensorData::from([[1i64, 2]])),
    ]);
    let outputs: BTreeMap<String, TensorData> =
        forward(&clip_disk, &inputs, &LoadOptions::default(), &device).unwrap().into_iter().collect();
    let expected: Vec<f32> = outputs["image_embeds"].iter::<f32>().collect();
    assert_close(&numbers(&embedded[1]["embedding"]), &expected);

    let ids = disk.tokenizer().unwrap();
    let options = BatchOptions { max_length: None, pad: PadTo::Longest };
    let (ids, _) = ids.encode_batch(&["一只猫"], &options).unwrap().to_tensors(&device);
    let taiyi = TaiyiConfig::of(&disk).unwrap().load(&disk, &LoadOptions::default(), &device).unwrap();
    assert_close(&numbers(&embedded[0]["embedding"]), &unit(&taiyi.embed(ids).into_data()));

    write(7);
    let mut command = Command::cargo_bin("volary").unwrap();
    let output = command.args([&["embed", "一只猫"], &towers[..]].concat()).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(error.contains("texts get 7 numbers, pictures 20"), "{error}");
}

#[test]
fn a_model_without_two_towers_is_told() {
    let folder = fixture("taiyi");
    let mut command = Command::cargo_bin("volary").unwrap();
    let output = command
        .args(["classify", "--labels", "cat", "--model"])
        .args([&folder, &picture("cat.png")])
        .output()
        .unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(error.contains("taiyi cannot compare pictures with text"), "{error}");
}
