//! The commands that write text, with an untrained model whose tokens are single characters.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{copy_folder, fixture};

/// The program, without a network and with an empty cache.
fn volary() -> Command {
    let mut command = Command::cargo_bin("volary").unwrap();
    command.env("HF_HUB_OFFLINE", "1").env("HF_HUB_CACHE", "no/cache");
    command
}

/// Special tokens, a space, the bytes of characters that have no token, and characters: as many as the model has.
fn vocabulary() -> Vec<String> {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>", "▁"].map(str::to_owned).to_vec();
    tokens.extend([0xc3u8, 0xa9, 0xe4, 0xb8, 0xad].map(|byte| format!("<0x{byte:02X}>")));
    let characters = ('a'..='z').chain('A'..='Z').chain('0'..='9').chain(".,!?'-:;()#\n<>_+*/=".chars());
    tokens.extend(characters.map(String::from));
    tokens.truncate(90);
    assert_eq!(tokens.len(), 90);
    tokens
}

/// The model of a fixture with a tokenizer like Llama's.
fn model() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture("llama"), folder.path());
    let vocab: Value = vocabulary().into_iter().enumerate().map(|(id, token)| (token, json!(id))).collect();
    let special = |id: usize, token: &str| {
        json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let first = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [first, text("A")],
            "pair": [first, text("A"), text("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"}
        ]},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": true, "vocab": vocab, "merges": []}
    });
    write(folder.path(), "tokenizer.json", &tokenizer.to_string());
    write(folder.path(), "tokenizer_config.json", r#"{"tokenizer_class": "LlamaTokenizer"}"#);
    folder
}

fn write(folder: &Path, name: &str, text: &str) -> PathBuf {
    let file = folder.join(name);
    fs::write(&file, text).unwrap();
    file
}

/// Standard output of a run that succeeds.
fn told(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Exit code and standard error of a run that fails.
fn failure(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    assert!(!output.status.success() && output.stdout.is_empty(), "{output:?}");
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

fn generate(model: &TempDir, arguments: &[&str]) -> Command {
    let mut command = volary();
    command.arg("generate").args(arguments).arg("--model").arg(model.path());
    command
}

fn answers(command: &mut Command) -> Vec<Value> {
    serde_json::from_str(&told(command.arg("--json"))).unwrap()
}

/// The tokens of `answer` spelled by hand, where no byte of a character is among them.
fn spelled(answer: &Value) -> String {
    let tokens = vocabulary();
    let ids = answer["tokens"].as_array().unwrap();
    ids.iter().map(|id| tokens[id.as_u64().unwrap() as usize].replace('▁', " ")).collect()
}

#[test]
fn a_text_is_written_as_it_comes_and_as_json() {
    let model = model();
    let streamed = told(&mut generate(&model, &["Hello", "--max-new", "9"]));
    let answers = answers(&mut generate(&model, &["Hello", "--max-new", "9"]));
    let [answer] = &answers[..] else { panic!("{answers:?}") };
    assert_eq!(streamed, format!("{}\n", answer["text"].as_str().unwrap()));
    assert_eq!(answer["text"], spelled(answer));
    assert_eq!((answer["prompt"].as_str(), answer["stop"].as_str()), (Some("Hello"), Some("length")));
    assert_eq!(answer["tokens"].as_array().unwrap().len(), 9);
    assert!(answer["seconds"].as_f64() > Some(0.0) && answer["tokens_per_second"].as_f64() > Some(0.0));
}

/// From the command line, a file and standard input; each is written as if it were alone.
#[test]
fn prompts_are_written_together_and_as_if_alone() {
    let model = model();
    let lines = write(model.path(), "lines.txt", "Hello there, you\n12\n");
    let draws = ["--seed", "4", "--max-new", "12"];
    let mut together = generate(&model, &["-", "--prompt", "ab", "--prompts", lines.to_str().unwrap()]);
    let together = answers(together.args(draws).write_stdin("from outside\n"));
    let prompts = ["from outside", "ab", "Hello there, you", "12"];
    assert!(together.iter().map(|answer| answer["prompt"].as_str().unwrap()).eq(prompts));
    for (prompt, together) in prompts.iter().zip(&together) {
        let alone = &answers(generate(&model, &[prompt]).args(draws))[0];
        assert_eq!((&alone["text"], &alone["tokens"]), (&together["text"], &together["tokens"]));
    }
    let shown = told(generate(&model, &["ab", "--prompt", "12"]).args(draws));
    let text = |row: usize| together[row]["text"].as_str().unwrap();
    assert_eq!(shown, format!("[0]\n{}\n[1]\n{}\n", text(1), text(3)));
}

#[test]
fn seeds_repeat_and_differ_and_the_best_of_many_is_the_likeliest() {
    let model = model();
    let draw = |arguments: &[&str]| {
        answers(generate(&model, &["Hello", "--max-new", "8", "--temperature", "0.8"]).args(arguments))
            .remove(0)
    };
    let five = draw(&["--seed", "5"]);
    assert_eq!(draw(&["--seed", "5"])["tokens"], five["tokens"]);
    assert_ne!(draw(&["--seed", "6"])["tokens"], five["tokens"]);
    let several = draw(&["--seed", "5", "--num", "3"]);
    assert_eq!(several["tokens"], five["tokens"]);
    assert_eq!(several["others"].as_array().unwrap().len(), 2);

    let mean = |answer: &Value| {
        // the model is untrained: none of these ends by a token
        answer["log_likelihood"].as_f64().unwrap() / answer["tokens"].as_array().unwrap().len() as f64
    };
    let all = draw(&["--num", "6"]);
    let best =
        std::iter::once(&all).chain(all["others"].as_array().unwrap()).map(mean).fold(f64::MIN, f64::max);
    let chosen = draw(&["--best-of", "6"]);
    assert_eq!(mean(&chosen), best);
    assert!(chosen.get("others").is_none());
}

/// What comes before a stop text is shown, and never a part of it.
#[test]
fn a_text_ends_before_a_stop_text() {
    let model = model();
    let whole =
        answers(&mut generate(&model, &["Hello", "--max-new", "12"]))[0]["text"].as_str().unwrap().to_owned();
    let characters: Vec<char> = whole.chars().collect();
    let stop: String = characters[4..7].iter().collect(); // three tokens
    let before = whole.split(&stop).next().unwrap();
    let arguments = ["Hello", "--max-new", "12", "--stop", "not there", "--stop", &stop];
    assert_eq!(told(&mut generate(&model, &arguments)), format!("{before}\n"));
    let answer = &answers(&mut generate(&model, &arguments))[0];
    assert_eq!(answer["stop"], format!("text {stop:?}"));
    assert_eq!(answer["text"], before);
}

/// Flags are over `generation_config.json`, and `--verbose` says so.
#[test]
fn the_folder_says_how_it_writes_unless_a_flag_does() {
    let model = model();
    let config = r#"{"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": true, "temperature": 0.5,
        "eos_token_id": [2, 999]}"#;
    write(model.path(), "generation_config.json", config);
    let tokens = |arguments: &[&str]| answers(&mut generate(&model, arguments))[0]["tokens"].clone();
    let own = tokens(&["Hello"]);
    assert_eq!(own.as_array().unwrap().len(), 5);
    assert_eq!(own, tokens(&["Hello", "--temperature", "0.5", "--seed", "0"]));
    assert_eq!(tokens(&["Hello", "--max-new", "7", "--min-new", "7"]).as_array().unwrap().len(), 7);
    let output = generate(&model, &["Hello", "--verbose", "--top-p", "0.9"]).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    let line =
        "from flags: sample, top_p, count; from the folder: max_new, sample, temperature, stop_tokens\n";
    assert!(said.ends_with(line), "{said}");

    write(model.path(), "generation_config.json", r#"{"top_p": 7}"#);
    let (code, said) = failure(&mut generate(&model, &["Hello", "--seed", "1"]));
    assert_eq!((code, said.as_str()), (1, "error: top_p is 7, expected above 0 and at most 1\n"));
}

/// Beams find what is at least as likely as the greedy text.
#[test]
fn beams_find_likelier_texts() {
    let model = model();
    let likelihood = |arguments: &[&str]| {
        let answers = answers(generate(&model, &["Hello", "--max-new", "10"]).args(arguments));
        (answers[0]["log_likelihood"].as_f64().unwrap(), answers[0]["others"].as_array().map_or(0, Vec::len))
    };
    let (greedy, _) = likelihood(&[]);
    let (beams, others) = likelihood(&["--beams", "8", "--num", "3"]);
    assert!(beams > greedy, "{beams} {greedy}");
    assert_eq!(others, 2);
}

#[test]
fn wrong_use_is_told_in_a_line() {
    let model = model();
    for (arguments, said) in [
        (
            &["Hello", "--temperature", "-1", "--top-p", "0"][..],
            "temperature is -1, expected 0 or more; top_p is 0, expected above 0 and at most 1",
        ),
        (&["Hello", "--num", "3", "--best-of", "2"], "--best-of draws fewer texts than --num shows"),
        (&["Hello", "--max-new", "0"], "max_new is 0, expected at least 1"),
        (&[], "there is nothing to continue: give a prompt, or `-` for standard input"),
        (&[""], "prompt 0 is empty"),
        (&["a", "--prompt", ""], "prompt 1 is empty"),
    ] {
        assert_eq!(
            failure(&mut generate(&model, arguments)),
            (2, format!("error: {said}\n")),
            "{arguments:?}"
        );
    }
    let (code, said) = failure(volary().args(["generate", "Hello"]));
    assert_eq!(code, 2);
    assert!(said.contains("volary fetch TinyLlama/TinyLlama-1.1B-Chat-v1.0"), "{said}");
    assert!(!generate(&model, &["Hello", "--beams", "2", "--seed", "1"]).output().unwrap().status.success());
}

#[test]
fn what_cannot_be_continued_is_told_in_a_line() {
    let model = model();
    let long = "a".repeat(64);
    let failed = |arguments: &[&str]| {
        let (code, said) = failure(&mut generate(&model, arguments));
        assert_eq!((code, said.lines().count()), (1, 1), "{said}");
        said
    };
    let said = failed(&[&long]);
    assert!(
        said.contains("prompt 0 has 65 tokens: with 1 more they do not fit into the context of 64"),
        "{said}"
    );
    let said = failed(&["ab", "--prompt", &long[..50], "--max-new", "20"]);
    assert!(said.contains("prompt 1 has 51 tokens: with 20 more"), "{said}");

    let (code, said) = failure(generate(&model, &["-"]).write_stdin(&b"caf\xc3\xa9 \xff"[..]));
    assert_eq!((code, said.as_str()), (1, "error: standard input: not UTF-8 at byte 6\n"));
    let file = model.path().join("latin.txt");
    fs::write(&file, b"caf\xe9\n").unwrap();
    let said = failed(&["--prompts", file.to_str().unwrap()]);
    assert!(said.contains("latin.txt: not UTF-8 at byte 3"), "{said}");

    // a tokenizer with more tokens than the model
    let json = fs::read_to_string(model.path().join("tokenizer.json")).unwrap();
    fs::write(model.path().join("tokenizer.json"), json.replace("\"z\":34", "\"z\":90,\"zz\":34")).unwrap();
    let said = failed(&["fizz"]);
    assert!(said.contains("prompt 0 holds 90, expected 0 to 89"), "{said}");

    let (code, said) = failure(volary().args(["generate", "Hello", "--model"]).arg(fixture("vit")));
    assert_eq!((code, said.as_str()), (1, "error: vit cannot write text\n"));
}

/// Windows of any stride score every token but the first.
#[test]
fn the_perplexity_of_a_file() {
    let model = model();
    let text = "The cat sat on the mat. ".repeat(9); // 216 characters, a token each
    let file = write(model.path(), "text.txt", &text);
    let report = |arguments: &[&str]| -> Value {
        let mut command = volary();
        command.arg("perplexity").arg(&file).arg("--model").arg(model.path()).args(arguments).arg("--json");
        serde_json::from_str(&told(&mut command)).unwrap()
    };
    for stride in ["1", "20", "63"] {
        let report = report(&["--stride", stride]);
        assert_eq!((report["tokens"].as_u64(), report["bytes"].as_u64()), (Some(216), Some(216)));
        let number = |name: &str| report[name].as_f64().unwrap();
        assert!((number("perplexity").ln() - number("nats_per_token")).abs() < 1e-9);
        // one token a byte
        assert!((number("bits_per_byte") * 2f64.ln() - number("nats_per_token")).abs() < 1e-9);
        // an untrained model is about as good as none
        assert!((number("nats_per_token") - 90f64.ln()).abs() < 1.0, "{report}");
    }
    let shown = told(volary().arg("perplexity").arg(&file).arg("--model").arg(model.path()));
    assert_eq!(shown.lines().count(), 5, "{shown}");

    let mut wide = volary();
    wide.arg("perplexity").arg(&file).args(["--stride", "64", "--model"]).arg(model.path());
    assert_eq!(failure(&mut wide), (1, "error: the stride is 64, expected 1 to 63\n".into()));
    let empty = write(model.path(), "empty.txt", "");
    let mut nothing = volary();
    nothing.arg("perplexity").arg(&empty).arg("--model").arg(model.path());
    assert_eq!(failure(&mut nothing), (1, "error: the text has fewer than two tokens\n".into()));
}
