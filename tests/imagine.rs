//! `volary imagine`, `variations`, `replay`, and `info` of a picture.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::{Duration, Instant};

use burn::tensor::{Device, TensorData};
use serde_json::Value;
use tempfile::TempDir;
use volary::folder::Folder;
use volary::ldm;
use volary::record::{KEYWORD, PARAMETERS, Record};
use volary::stable_diffusion::{Parts, TextModel};
use volary_vision::image::{ReadOptions, Rgb8, content, png_texts, read};
use volary_weights::{LoadOptions, read_tensors, save, save_tensors};

use crate::cli::{example, volary};
use crate::support::{copy_folder, fixture};

/// A folder in which the program runs.
struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        volary().current_dir(&self.0).args(arguments).output().unwrap()
    }

    /// What it printed on standard output and on standard error.
    #[track_caller]
    fn does(&self, arguments: &[&str]) -> [String; 2] {
        let Output { status, stdout, stderr } = self.run(arguments);
        let told = [stdout, stderr].map(|text| String::from_utf8(text).unwrap());
        assert!(status.success(), "{}", told[1]);
        told
    }

    /// What it said when it failed, with this code, leaving no file.
    #[track_caller]
    fn fails(&self, code: i32, arguments: &[&str]) -> String {
        let before = self.files();
        let output = self.run(arguments);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{told}");
        assert!(told.starts_with("error: "), "{told}");
        assert_eq!(self.files(), before);
        told
    }

    /// Imagines with the toy of that name, in few steps.
    fn imagine(&self, model: &str, arguments: &[&str]) -> [String; 2] {
        let model = fixture(model);
        self.does(&[&["imagine", "--steps", "3", "--model", model.to_str().unwrap()], arguments].concat())
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.at(file)).unwrap()
    }

    fn picture(&self, file: &str) -> Rgb8 {
        read(&self.at(file), ReadOptions::STORED).unwrap()
    }

    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// A picture of one colour.
    fn grey(&self, file: &str, side: usize, value: u8) {
        Rgb8::new(side, side, vec![value; 3 * side * side]).unwrap().save_png(&self.at(file)).unwrap();
    }
}

/// A copy of a pipeline, to be spoiled.
fn copy_pipeline(name: &str, to: &Path) {
    copy_folder(&fixture(name), to);
    for part in fs::read_dir(fixture(name)).unwrap().map(Result::unwrap).filter(|part| part.path().is_dir()) {
        copy_folder(&part.path(), &to.join(part.file_name()));
    }
}

#[test]
fn a_seed_is_a_picture_whatever_else_is_made_and_on_how_many_threads() {
    let place = Place::new();
    for model in ["pipe_sd", "pipe_taiyi", "pipe_alt", "token_drawing"].map(fixture) {
        let seeded = |threads: &str, flags: &[&str]| {
            let mut command = volary();
            command.current_dir(&place.0).env("RAYON_NUM_THREADS", threads);
            // so many tokens are a picture of the last
            command.args(["imagine", "一只猫 cat", "--steps", "16", "--model"]).arg(&model).args(flags);
            let output = command.output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        for threads in ["1", "2", "5"] {
            seeded(threads, &["--seed", "7", "-o", &format!("on-{threads}.png")]);
        }
        let one = place.bytes("on-1.png");
        assert!(place.bytes("on-2.png") == one && place.bytes("on-5.png") == one, "{model:?}");
        seeded("2", &["--seed", "6", "--count", "3", "-o", "of.png"]);
        assert!(place.bytes("of-2.png") == one, "{model:?}");
        assert!(place.picture("of-1.png") != place.picture("of-2.png"));
    }
}

#[test]
fn a_sheet_is_pictures_beside_each_other() {
    let place = Place::new();
    let grid = ["--seed", "3", "--grid", "2x3", "-o", "sheet.png", "--size", "24x16"];
    place.imagine("pipe_sd", &[&["a cat"], &grid[..]].concat());
    place.imagine("pipe_sd", &["a cat", "--seed", "3", "--count", "6", "-o", "p.png", "--size", "24x16"]);
    let sheet = place.picture("sheet.png");
    assert_eq!([sheet.width(), sheet.height()], [3 * 24, 2 * 16]);
    for at in 0..6 {
        let picture = place.picture(&format!("p-{}.png", at + 1));
        let (row, column) = (at / 3, at % 3);
        for y in 0..16 {
            let start = 3 * ((16 * row + y) * sheet.width() + 24 * column);
            let line = &sheet.pixels()[start..][..3 * 24];
            assert!(line == &picture.pixels()[3 * 24 * y..][..3 * 24], "picture {at}, line {y}");
        }
    }
    place.does(&["replay", "sheet.png"]);
    assert!(place.bytes("sheet.replay.png") == place.bytes("sheet.png"));
}

#[test]
fn a_random_seed_is_told_and_recorded() {
    let place = Place::new();
    let [told, _] = place.imagine("pipe_sd", &["a cat"]);
    let seed: u64 = told.trim().rsplit(' ').next().unwrap().parse().unwrap();
    let file = format!("imagined-{seed}.png");
    assert_eq!(told, format!("{file}: seed {seed}\n"));
    assert_eq!(place.files(), [file.as_str()]);
    assert_eq!(Record::read(&place.at(&file)).unwrap().seed, seed);
}

#[test]
fn the_record_makes_the_picture_again() {
    let place = Place::new();
    place.grey("grey.png", 64, 90);
    place.grey("white.png", 64, 255);
    let change = ["--init-image", "grey.png", "--strength", "0.7"];
    let all = ["--negative", "the city lights", "--guidance", "3.3", "--scheduler", "ddim", "--eta", "0.4"];
    let flags: [(&str, Vec<&str>); 5] = [
        ("pipe_sd", all.to_vec()),
        ("pipe_taiyi", vec!["--scheduler", "euler-ancestral", "--dtype", "bf16"]),
        ("pipe_sd", change.to_vec()),
        ("pipe_sd", [&change[..], &["--mask", "white.png"]].concat()),
        ("pipe_sd_inpaint", vec!["--init-image", "grey.png", "--mask", "white.png"]),
    ];
    for (model, flags) in flags {
        place.imagine(model, &[&["一只猫 \"cat\"", "-o", "first.png"], &flags[..]].concat());
        place.does(&["replay", "first.png", "-o", "again.png"]);
        assert!(place.bytes("again.png") == place.bytes("first.png"), "{flags:?}");
    }
}

/// The weights of all parts in one file, under the names of Stable Diffusion's authors.
fn write_single_file(folder: &Path, scratch: &Path, file: &Path) {
    let (parts, device) = (Parts::of(&Folder::Disk(folder.into())).unwrap(), Device::flex());
    let config = parts.config().unwrap();
    let (checkpoints, keys) = (parts.checkpoints().unwrap(), parts.keys(&config).unwrap());
    let models = parts.load(&config, checkpoints, keys, &LoadOptions::default(), &device).unwrap();
    let TextModel::Clip(text) = models.text else { panic!("the text encoder is CLIP's") };
    let path = |name: &str| scratch.join(name);
    save(&text, &ldm::TEXT, None, &path("text"), None).unwrap();
    save(&models.unet, &ldm::UNET, None, &path("unet"), None).unwrap();
    save(&models.vae, &ldm::AUTOENCODER, None, &path("vae"), None).unwrap();
    let of = |name: &str, prefix: &str| {
        let tensors = read_tensors(&path(name)).unwrap().into_iter();
        tensors.map(|(key, data)| (format!("{prefix}{key}"), data)).collect::<Vec<_>>()
    };
    let all = [of("text", ""), of("unet", ""), of("vae", "first_stage_model.")].concat();
    save_tensors(file, &all).unwrap();
}

/// A LoRA, a learned token, the weights in a single file, and all of them; then from another place.
#[test]
fn the_record_knows_the_files_beside_the_model() {
    let (place, scratch) = (Place::new(), tempfile::tempdir().unwrap());
    write_single_file(&fixture("pipe_sd"), scratch.path(), &place.at("single.safetensors"));
    let constant =
        |rows: usize, columns: usize| TensorData::new(vec![0.6f32; rows * columns], [rows, columns]);
    let change = |key: &str, rows, columns| {
        let parts = [("lora_up", constant(rows, 1)), ("lora_down", constant(1, columns))];
        parts.map(|(part, data)| (format!("{key}.{part}.weight"), data))
    };
    let changes = [
        change("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 16, 16),
        change("lora_unet_down_blocks_0_attentions_0_proj_in", 4, 4),
        change("lora_unet_mid_block_resnets_1_conv2", 4, 36),
        change("vae.decoder.mid_block.attentions.0.to_q", 8, 8),
    ];
    save_tensors(&place.at("style.safetensors"), &changes.concat()).unwrap();
    let vector = TensorData::new((0..16).map(|at| at as f32 / 4.0 - 2.0).collect(), [16]);
    save_tensors(&place.at("toy.safetensors"), &[("<toy>".to_owned(), vector)]).unwrap();

    // with the single file no other weights are needed
    copy_pipeline("pipe_sd", &place.at("bare"));
    for weights in ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"] {
        fs::remove_file(place.at(&format!("bare/{weights}.safetensors"))).unwrap();
    }
    let asked = ["imagine", "a <toy>", "--seed", "5", "--steps", "3"];
    assert!(place.fails(1, &[&asked[..], &["--model", "bare"]].concat()).contains("no weights"));

    let whole = fixture("pipe_sd").to_str().unwrap().to_owned();
    let lora = ["--lora", "style.safetensors:0.5"];
    let embedding = ["--embedding", "toy.safetensors"];
    let single = ["--single-file", "single.safetensors", "--model", "bare"];
    let whole = ["--model", &whole];
    let made = |file: &str, flags: &[&[&str]]| {
        place.does(&[&asked[..], &["-o", file], &flags.concat()].concat());
        place.does(&["replay", file, "-o", "again.png"]);
        assert!(place.bytes("again.png") == place.bytes(file), "{file}");
        place.picture(file)
    };
    let plain = made("plain.png", &[&whole]);
    let [styled, learned] =
        [made("lora.png", &[&whole, &lora]), made("embedding.png", &[&whole, &embedding])];
    assert!(styled != plain && learned != plain && styled != learned);
    assert!(made("single.png", &[&single]) == plain);
    assert!(made("single-lora.png", &[&single, &lora]) == styled);
    let all = made("first.png", &[&single, &lora, &embedding]);
    assert!(all != styled && all != learned);

    let record = Record::read(&place.at("first.png")).unwrap();
    let expected =
        ["LoRA: style.safetensors (", "Embedding: toy.safetensors (", "Weights: single.safetensors ("];
    assert!(expected.iter().all(|part| record.told().contains(part)), "{}", record.told());
    assert_eq!(record.loras[0].weight, 0.5);

    let names = ["style.safetensors", "toy.safetensors", "single.safetensors"];
    for name in names {
        fs::rename(place.at(name), scratch.path().join(name)).unwrap();
    }
    let told = place.fails(1, &["replay", "first.png"]);
    assert!(names.iter().all(|name| told.contains(&format!("{name}: No such file"))), "{told}");
    let moved = names.map(|name| scratch.path().join(name).to_str().unwrap().to_owned());
    let found = ["--lora", &moved[0], "--embedding", &moved[1], "--single-file", &moved[2]];
    place.does(&[&["replay", "first.png", "-o", "again.png"], &found[..]].concat());
    assert!(place.bytes("again.png") == place.bytes("first.png"));
}

#[test]
fn a_picture_in_tiles_comes_again() {
    let place = Place::new();
    let size = ["--size", "128x64", "--seed", "2"];
    place.imagine("pipe_sd", &[&["a cat", "-o", "whole.png"], &size[..]].concat());
    place.imagine("pipe_sd", &[&["a cat", "-o", "tiled.png", "--decode", "tiled"], &size[..]].concat());
    assert!(place.picture("whole.png") != place.picture("tiled.png"));
    for file in ["whole", "tiled"] {
        let record = Record::read(&place.at(&format!("{file}.png"))).unwrap();
        assert_eq!((record.tiled, record.told().contains("VAE: tiled")), (file == "tiled", file == "tiled"));
        place.does(&["replay", &format!("{file}.png")]);
        assert!(place.bytes(&format!("{file}.replay.png")) == place.bytes(&format!("{file}.png")));
    }
}

#[test]
fn a_pipeline_says_what_its_parts_are() {
    let [told, _] = Place::new().does(&["info", fixture("pipe_sd").to_str().unwrap()]);
    for expected in [
        "part          text_encoder: CLIPTextModel, ",
        "part          tokenizer: ",
        "part          unet: UNet2DConditionModel, ",
        "part          vae: AutoencoderKL, ",
        "part          scheduler: DDIMScheduler\n",
    ] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    assert!(!told.contains("none ("), "{told}");
}

#[test]
fn a_png_says_how_it_was_made() {
    let place = Place::new();
    place.grey("grey.png", 64, 90);
    let flags =
        ["--negative", "a dog", "--seed", "11", "--init-image", "grey.png", "-o", "cat.png", "--json"];
    let [json, _] = place.imagine("pipe_sd", &[&["一只猫"], &flags[..]].concat());
    let answer: Value = serde_json::from_str(&json).unwrap();
    let answer = &answer[0];
    assert_eq!(answer["image"], "cat.png");
    assert!(answer["seconds"].as_f64().unwrap() > 0.0);
    let [info, _] = place.does(&["info", "cat.png", "--json"]);
    let record: Value = serde_json::from_str(&info).unwrap();
    for (name, value) in record.as_object().unwrap() {
        assert_eq!(value, &answer[name], "{name}");
    }
    for (name, value) in [
        ("prompt", Value::from("一只猫")),
        ("negative", "a dog".into()),
        ("scheduler", "DDIMScheduler".into()),
        ("steps", 3.into()),
        ("guidance", 7.5.into()),
        ("seed", 11.into()),
        ("width", 64.into()),
        ("height", 64.into()),
        ("version", env!("CARGO_PKG_VERSION").into()),
    ] {
        assert_eq!(record[name], value, "{name}");
    }
    assert_eq!(record["model"]["name"], fixture("pipe_sd").to_str().unwrap());
    assert_eq!(record["model"]["hash"].as_str().unwrap().len(), 64);
    assert_eq!(record["init"]["strength"], 0.8);
    assert_eq!(record["init"]["picture"]["path"], "grey.png");
    let hash = volary_weights::hub::sha256(&place.at("grey.png")).unwrap();
    assert_eq!(record["init"]["picture"]["sha256"], hash.digits());

    let [told, _] = place.does(&["info", "cat.png"]);
    let texts = png_texts(&content(&place.at("cat.png")).unwrap(), "cat.png").unwrap();
    let [(keyword, _), (for_people, parameters)] = &texts[..] else { panic!("{texts:?}") };
    assert_eq!([keyword, for_people], [KEYWORD, PARAMETERS]);
    assert_eq!(told, format!("{parameters}\n"));
    let start = "一只猫\nNegative prompt: a dog\nSteps: 3, Sampler: DDIMScheduler, CFG scale: 7.5, Seed: 11, Size: 64x64, \
                 Denoising strength: 0.8, Picture: grey.png (";
    assert!(parameters.starts_with(start), "{parameters}");
}

#[test]
fn another_model_or_file_is_refused_unless_it_is_forced() {
    let place = Place::new();
    place.grey("grey.png", 64, 90);
    copy_pipeline("pipe_sd", &place.at("model"));
    place.does(&[
        "imagine",
        "a cat",
        "--model",
        "model",
        "--steps",
        "3",
        "--init-image",
        "grey.png",
        "-o",
        "cat.png",
    ]);

    // moved, then another one in its place
    fs::rename(place.at("grey.png"), place.at("moved.png")).unwrap();
    assert!(place.fails(1, &["replay", "cat.png"]).contains("grey.png: No such file"));
    place.does(&["replay", "cat.png", "--init-image", "moved.png", "-o", "again.png"]);
    assert!(place.bytes("again.png") == place.bytes("cat.png"));
    place.grey("grey.png", 64, 91);
    let told = place.fails(1, &["replay", "cat.png"]);
    assert!(told.contains("grey.png: another file than the picture was made with: SHA-256 "), "{told}");
    fs::rename(place.at("moved.png"), place.at("grey.png")).unwrap();

    // the same elsewhere; then another one
    fs::rename(place.at("model"), place.at("moved")).unwrap();
    place.does(&["replay", "cat.png", "--model", "moved", "-o", "again.png"]);
    assert!(place.bytes("again.png") == place.bytes("cat.png"));
    let mut weights = place.bytes("moved/unet/diffusion_pytorch_model.safetensors");
    let end = weights.len() - 4;
    weights[end..].copy_from_slice(&2f32.to_le_bytes());
    fs::write(place.at("moved/unet/diffusion_pytorch_model.safetensors"), weights).unwrap();
    let told = place.fails(1, &["replay", "cat.png", "--model", "moved"]);
    assert!(told.contains("moved: another model than cat.png was made with, model: its hash is "), "{told}");
    place.does(&["replay", "cat.png", "--model", "moved", "--force", "-o", "other.png"]);
    let [made, again] = ["cat.png", "other.png"].map(|file| Record::read(&place.at(file)).unwrap());
    assert_ne!(made.model.hash, again.model.hash);
    assert_eq!((again.model.name.as_str(), made.seed), ("moved", again.seed));
    assert!(place.picture("other.png") != place.picture("cat.png"));
}

#[test]
fn pictures_without_a_record_are_refused_by_name() {
    let place = Place::new();
    let picture = example("cat.png");
    for command in ["replay", "info"] {
        let told = place.fails(1, &[command, picture.to_str().unwrap()]);
        assert!(told.contains("cat.png: no record of how it was made (a PNG text `volary`)"), "{told}");
    }
    let grey = Rgb8::new(1, 1, vec![0; 3]).unwrap();
    for (record, expected) in [
        ("{}", "bad.png: its record cannot be read: missing field `version`"),
        ("[", "bad.png: its record cannot be read: EOF"),
    ] {
        grey.save_png_with(&place.at("bad.png"), &[(KEYWORD, record)]).unwrap();
        for command in ["replay", "info"] {
            let told = place.fails(1, &[command, "bad.png"]);
            assert!(told.contains(expected), "{told}");
        }
    }
    assert!(place.fails(1, &["replay", "none.png"]).contains("none.png: No such file"));
}

/// A record is from anyone: what it asks for is checked as flags are.
#[test]
fn a_record_that_asks_for_the_impossible_is_refused() {
    let place = Place::new();
    place.imagine("pipe_sd", &["\u{1b}[2Ja cat", "-o", "cat.png"]);
    assert!(place.does(&["info", "cat.png"])[0].starts_with("\u{FFFD}[2Ja cat\n"));
    let record = Record::read(&place.at("cat.png")).unwrap();
    let grid = Some([usize::MAX, 2]);
    let impossible = Record { steps: 0, guidance: 1e300, eta: 7.0, grid, width: 65, height: 0, ..record };
    impossible.save(&place.picture("cat.png"), &place.at("cat.png")).unwrap();
    let told = place.fails(1, &["replay", "cat.png"]);
    for expected in ["0 steps", "pictures: expected 1 to 10000", "an eta of 7"] {
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn variations_begin_from_the_picture_and_its_prompt() {
    let place = Place::new();
    place.imagine("pipe_sd", &["a small cat", "--seed", "1", "-o", "cat.png"]);
    let model = fixture("pipe_sd");
    let variations = |flags: &[&str]| {
        let command =
            ["variations", "cat.png", "--model", model.to_str().unwrap(), "--steps", "10", "--seed", "5"];
        place.does(&[&command[..], flags].concat())
    };
    variations(&["--count", "2", "-o", "near.png"]);
    variations(&["--strength", "1", "--prompt", "the table", "-o", "far.png"]);
    let [near, far] = ["near-2.png", "far.png"].map(|file| Record::read(&place.at(file)).unwrap());
    assert_eq!((near.prompt.as_str(), near.seed, near.init.unwrap().strength), ("a small cat", 6, 0.3));
    assert_eq!((far.prompt.as_str(), far.init.unwrap().strength), ("the table", 1.0));
    assert!(place.picture("near-1.png") != place.picture("near-2.png"));
    place.does(&["replay", "near-2.png"]);
    assert!(place.bytes("near-2.replay.png") == place.bytes("near-2.png"));
}

#[test]
fn what_draws_by_tokens_is_asked_in_the_same_way() {
    let place = Place::new();
    copy_pipeline("token_drawing", &place.at("model"));
    let imagine = ["imagine", "a", "--model", "model"];
    let imagine = |flags: &[&str]| place.does(&[&imagine[..], flags].concat());
    imagine(&["--seed", "4", "-o", "one.png"]);
    imagine(&["--seed", "3", "--count", "2", "-o", "of.png"]);
    assert!(place.bytes("of-2.png") == place.bytes("one.png"));
    assert!(place.picture("of-1.png") != place.picture("of-2.png"));
    imagine(&["--seed", "4", "--guidance", "30", "--negative", "c", "-o", "guided.png"]);
    assert!(place.picture("guided.png") != place.picture("one.png"));
    imagine(&["--seed", "4", "--temperature", "0", "-o", "cold.png"]);
    imagine(&["--seed", "9", "--temperature", "0", "-o", "colder.png"]);
    assert!(
        place.picture("cold.png") == place.picture("colder.png"),
        "the likeliest codes have no chance in them"
    );
    imagine(&["--seed", "4", "--temperature", "50", "-o", "hot.png"]);
    for file in ["one", "guided", "cold", "hot"] {
        place.does(&["replay", &format!("{file}.png")]);
        assert!(place.bytes(&format!("{file}.replay.png")) == place.bytes(&format!("{file}.png")));
    }
    let record = Record::read(&place.at("one.png")).unwrap();
    assert_eq!((record.steps, record.guidance, record.width, record.height), (16, 1.0, 16, 16));
    assert!(
        record
            .told()
            .contains("Steps: 16, CFG scale: 1, Seed: 4, Size: 16x16, Temperature: 0.7, Model: model")
    );

    let told = place.fails(1, &["imagine", "", "--model", "model"]);
    assert!(told.contains("the caption \"\" has no tokens"), "{told}");
    let told = place.fails(
        1,
        &["imagine", "", "--model", "model", "--size", "64x64", "--scheduler", "ddim", "--eta", "1"],
    );
    for expected in ["pictures of 16x16 pixels", "it takes no scheduler", "it takes no eta"] {
        assert!(told.contains(expected), "{told}");
    }
    let told =
        place.fails(1, &["imagine", "", "--model", "model", "--steps", "20", "--init-image", "one.png"]);
    for expected in ["this model draws in 16 steps", "it takes no picture to change"] {
        assert!(told.contains(expected), "{told}");
    }
    let told = place.fails(1, &["imagine", "", "--model", "model", "--embedding", "one.png"]);
    assert!(told.contains("takes no LoRA, embedding or single file"), "{told}");
    fs::write(place.at("model/tokenizer/more.json"), "{}").unwrap();
    assert!(place.fails(1, &["replay", "one.png"]).contains("another model than one.png was made with"));
}

/// Without a model, without a network, in both languages.
#[test]
fn the_model_inside_the_program_draws() {
    let place = Place::new();
    place.does(&["imagine", "一只红色的猫", "--seed", "1", "-o", "cat.png"]);
    place.does(&["imagine", "a red cat", "--seed", "1", "-o", "cat.en.png"]);
    assert!(place.picture("cat.png") != place.picture("cat.en.png"));
    place.does(&["replay", "cat.png"]);
    assert!(place.bytes("cat.replay.png") == place.bytes("cat.png"));
    let record = Record::read(&place.at("cat.png")).unwrap();
    assert_eq!((record.width, record.height, &record.model.name[..]), (64, 64, "volary/emoji-draw"));
    let told = place.fails(1, &["imagine", "a cat", "--size", "512x512"]);
    assert!(told.contains("this model draws pictures of 64x64 pixels"), "{told}");
}

#[test]
fn wrong_use_is_told_before_anything_is_loaded() {
    let place = Place::new();
    place.grey("grey.png", 64, 90);
    for diffusion in [&["imagine", "a cat", "--scheduler", "ddim"][..], &["variations", "grey.png"]] {
        let told = place.fails(2, diffusion);
        assert!(told.contains("give --model") && told.contains("volary fetch IDEA-CCNL/Taiyi"), "{told}");
    }
    place.grey("small.png", 32, 255);
    // no model of that name is looked for
    let told = place.fails(
        1,
        &[
            "imagine",
            "a cat",
            "--model",
            "nobody/nothing",
            "--steps",
            "0",
            "--guidance",
            "NaN",
            "--strength",
            "1.5",
            "--init-image",
            "grey.png",
            "--mask",
            "small.png",
            "--eta",
            "-1",
            "--temperature",
            "-2",
            "--lora",
            "no.safetensors:0.5",
            "--size",
            "72x64",
            "--embedding",
            "none.pt",
            "--count",
            "0",
        ],
    );
    for expected in [
        "no.safetensors: No such file",
        "none.pt: No such file",
        "0 steps: expected 1 or more",
        "a guidance of NaN",
        "a strength of 1.5: expected 0 to 1",
        "an eta of -1: expected 0 to 1",
        "a temperature of -2: expected 0 or more",
        "0 pictures: expected 1 to 10000",
        "the mask has 32x32 pixels, the picture 64x64",
        "the picture has 64x64 pixels, asked are 72x64",
    ] {
        assert!(told.contains(expected), "{expected}: {told}");
    }
    let missing = ["--init-image", "no.png", "--mask", "none.png", "--strength", "nan"];
    let told = place.fails(1, &[&["imagine", "a cat", "--model", "nobody/nothing"], &missing[..]].concat());
    for expected in ["no.png: No such file", "none.png: No such file", "a strength of NaN"] {
        assert!(told.contains(expected), "{told}");
    }
    for (arguments, expected) in [
        (&["--size", "64"][..], "expected two numbers from 1 on with an x between them"),
        (&["--grid", "0x3"], "expected two numbers from 1 on"),
        (&["--lora", "a.safetensors:inf"], "expected a finite weight"),
        (&["--mask", "small.png"], "--init-image"),
        (&["--strength", "0.5"], "--init-image"),
        (&["--scheduler", "best"], "possible values: ddpm, ddim, pndm, euler"),
        (&["-o", "cat.jpg"], "cat.jpg: pictures are written as PNG"),
        (&["-o", "no/cat.png"], "no: no such folder"),
    ] {
        let told = place.fails(2, &[&["imagine", "a cat", "--model", "nobody/nothing"], arguments].concat());
        assert!(told.contains(expected), "{arguments:?}: {told}");
    }
}

#[test]
fn what_the_model_cannot_draw_is_told() {
    let place = Place::new();
    let [sd, paints] = ["pipe_sd", "pipe_sd_inpaint"].map(|name| fixture(name).to_str().unwrap().to_owned());
    place.grey("grey.png", 60, 90);
    for (arguments, expected) in [
        (&["--model", &sd, "--size", "60x64"][..], "60x64 pixels: both sides must be multiples of 8"),
        (&["--model", &sd, "--init-image", "grey.png"], "60x60 pixels: both sides must be multiples of 8"),
        (&["--model", &sd, "--size", "800000x8"], "800000x8 pixels are too many"),
        (&["--model", &sd, "--steps", "2000"], "2000 steps: expected 1 to 1000"),
        (&["--model", &sd, "--scheduler", "euler", "--eta", "0.5"], "an eta of 0.5: only DDIM has one"),
        (&["--model", &paints], "it needs a picture and a mask"),
        (&["--model", "nowhere"], "`nowhere` is neither a folder nor a preset"),
        (&["--model", fixture("clip").to_str().unwrap()], "clip cannot draw pictures from texts"),
    ] {
        let told = place.fails(1, &[&["imagine", "a cat"], arguments].concat());
        assert!(told.contains(expected), "{told}");
    }
}

#[test]
fn prompts_may_be_empty_or_very_long() {
    let place = Place::new();
    place.imagine("pipe_sd", &["", "-o", "any.png"]);
    assert_eq!(Record::read(&place.at("any.png")).unwrap().prompt, "");
    let prompt = "cat and ".repeat(1250);
    assert_eq!(prompt.len(), 10_000);
    let [_, told] = place.imagine("pipe_sd", &[&prompt, "-o", "long.png"]);
    assert!(told.contains("it is read in 8 pieces") && told.contains("is left out: "), "{told}");
    assert_eq!(Record::read(&place.at("long.png")).unwrap().prompt, prompt);
}

#[test]
fn missing_folders_and_weights_that_are_no_numbers_are_told() {
    let place = Place::new();
    copy_pipeline("pipe_sd", &place.at("model"));
    let weights = place.at("model/unet/diffusion_pytorch_model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, bytes).unwrap();
    let imagine = ["imagine", "a cat", "--model", "model", "--steps", "3"];
    let told = place.fails(1, &imagine);
    assert!(told.contains("diffusion_pytorch_model.safetensors") && told.contains("NaN"), "{told}");
    fs::remove_dir_all(place.at("model/vae")).unwrap();
    fs::remove_dir_all(place.at("model/scheduler")).unwrap();
    let told = place.fails(1, &imagine);
    let expected =
        "model: no folder vae, scheduler; a pipeline has text_encoder, tokenizer, unet, vae, scheduler";
    assert!(told.contains(expected), "{told}");
}

/// Killed in the middle of a file, by the limit of its size, the program leaves none under its name; one that was there
/// before stays.
#[cfg(unix)]
#[test]
fn a_killed_run_leaves_no_half_picture() {
    use std::os::unix::process::ExitStatusExt;

    let place = Place::new();
    let killed = || {
        // 4 or 8 KiB, by the shell's unit; the picture has over 9
        let status = std::process::Command::new("sh")
            .args(["-c", "ulimit -c 0; ulimit -f 8; exec \"$@\"", "sh"])
            .arg(assert_cmd::cargo::cargo_bin("volary"))
            .args([
                "imagine",
                "a cat",
                "--steps",
                "2",
                "--seed",
                "4",
                "--offline",
                "-o",
                "cat.png",
                "--model",
            ])
            .arg(fixture("pipe_sd"))
            .current_dir(&place.0)
            .output()
            .unwrap()
            .status;
        assert!(status.signal().is_some(), "not killed: {status}");
    };
    killed();
    assert!(!place.at("cat.png").exists());
    place.imagine("pipe_sd", &["a dog", "-o", "cat.png"]);
    let before = place.bytes("cat.png");
    killed();
    assert!(place.bytes("cat.png") == before);
}

/// Whatever it is doing when it is ended, each file under its name is whole.
#[cfg(unix)]
#[test]
fn an_ended_run_leaves_whole_pictures() {
    let place = Place::new();
    let mut run = std::process::Command::new(assert_cmd::cargo::cargo_bin("volary"))
        .args([
            "imagine",
            "a cat",
            "--steps",
            "1",
            "--count",
            "10000",
            "--offline",
            "-o",
            "cat.png",
            "--model",
        ])
        .arg(fixture("pipe_sd"))
        .current_dir(&place.0)
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let begin = Instant::now();
    while !place.at("cat-20.png").exists() && begin.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(1));
    }
    run.kill().unwrap();
    assert!(!run.wait().unwrap().success(), "ended before its time");
    let made: Vec<String> = place.files().into_iter().filter(|name| name.ends_with(".png")).collect();
    assert!(made.len() >= 20, "{made:?}");
    for name in &made {
        let record = Record::read(&place.at(name)).unwrap();
        let picture = place.picture(name);
        assert_eq!([picture.width(), picture.height()], [record.width, record.height], "{name}");
    }
}
