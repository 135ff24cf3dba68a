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

/// Characters, and bytes of some that have no token.
fn characters() -> impl Iterator<Item = String> {
    let bytes = [0xc3u8, 0xa9, 0xe4, 0xb8, 0xad].map(|byte| format!("<0x{byte:02X}>"));
    let characters = ('a'..='z').chain('A'..='Z').chain('0'..='9').chain(".,!?'-:;()#\n<>_+*/=[]".chars());
    ["▁".to_owned()].into_iter().chain(bytes).chain(characters.map(String::from))
}

/// Special tokens and characters, as many as the model has.
fn vocabulary() -> Vec<String> {
    let special = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
    let tokens: Vec<String> = special.chain(characters()).take(90).collect();
    assert_eq!(tokens.len(), 90);
    tokens
}

/// The model of a fixture with a tokenizer like Llama's, whose first special token is the unknown one; `first` stands
/// before every text.
fn folder(name: &str, tokens: &[String], special: &[usize], first: Option<usize>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy_folder(&fixture(name), folder.path());
    let vocab: Value = tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let added = |id: &usize| {
        json!({"id": id, "content": tokens[*id], "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true})
    };
    let text = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let post_processor = first.map(|first| {
        let token = &tokens[first];
        let begin = json!({"SpecialToken": {"id": token, "type_id": 0}});
        json!({
            "type": "TemplateProcessing",
            "single": [begin, text("A")],
            "pair": [begin, text("A"), text("B")],
            "special_tokens": {token: {"id": token, "ids": [first], "tokens": [token]}}
        })
    });
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": special.iter().map(added).collect::<Vec<_>>(),
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": null,
        "post_processor": post_processor,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"}
        ]},
        "model": {"type": "BPE", "unk_token": tokens[special[0]], "byte_fallback": true, "vocab": vocab, "merges": []}
    });
    write(folder.path(), "tokenizer.json", &tokenizer.to_string());
    write(folder.path(), "tokenizer_config.json", r#"{"tokenizer_class": "PreTrainedTokenizerFast"}"#);
    folder
}

fn model() -> TempDir {
    folder("llama", &vocabulary(), &[0, 1, 2], Some(1))
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
    let line = "from flags: sample, top_p, count; from the folder: max_new, min_new, sample, temperature, stop_tokens\n";
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
    let file = write(model.path(), "text.txt", "fizz");
    let (code, said) = failure(volary().arg("perplexity").arg(&file).arg("--model").arg(model.path()));
    assert_eq!((code, said.as_str()), (1, "error: the text holds 90, expected 0 to 89\n"));

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

/// A template for the model: the roles' first letters before what they say.
const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}: {{ m.content }}\n{% endfor %}\
    {% if add_generation_prompt %}a:{% endif %}";

fn set_template(model: &TempDir, template: &str) {
    let config =
        json!({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "chat_template": template});
    write(model.path(), "tokenizer_config.json", &config.to_string());
}

fn chat(model: &TempDir, arguments: &[&str], lines: &str) -> Command {
    let mut command = volary();
    command.arg("chat").arg("--model").arg(model.path()).args(["--max-new", "5"]).args(arguments);
    command.write_stdin(lines.to_owned());
    command
}

/// Answers of a conversation, one a line.
fn conversation(model: &TempDir, arguments: &[&str], lines: &str) -> Vec<Value> {
    let said = told(chat(model, arguments, lines).arg("--json"));
    said.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// What `generate` makes of the text that a template is to give.
fn continued(model: &TempDir, text: &str) -> Value {
    answers(&mut generate(model, &[text, "--max-new", "5"])).remove(0)["tokens"].clone()
}

#[test]
fn a_conversation_is_the_text_of_its_template() {
    let model = model();
    set_template(&model, TEMPLATE);
    let found = conversation(&model, &["--system", "Be.", "--temperature", "0"], "Hi\n\nAnd?\n");
    let [first, second] = &found[..] else { panic!("{found:?}") };
    assert_eq!(first["tokens"], continued(&model, "s: Be.\nu: Hi\na:"));
    let answer = first["text"].as_str().unwrap().trim();
    assert_eq!(second["tokens"], continued(&model, &format!("s: Be.\nu: Hi\na: {answer}\nu: And?\na:")));
    assert_eq!((second["prompt"].as_str(), second["forgotten"].as_u64()), (Some("And?"), Some(0)));

    let shown = told(&mut chat(&model, &["--system", "Be.", "--temperature", "0"], "Hi\nAnd?"));
    assert_eq!(shown, format!("{}\n{}\n", first["text"].as_str().unwrap(), second["text"].as_str().unwrap()));
}

#[test]
fn commands_forget_and_keep_in_mind() {
    let model = model();
    set_template(&model, TEMPLATE);
    let lines = "/system Be.\nHi\n/reset\nHi\n/bogus\n/system\n/reset\nHi\n/exit\nHi\n";
    let output = chat(&model, &["--json", "--temperature", "0"], lines).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "/bogus is no command; there are /reset, /system TEXT and /exit\n");
    let said = String::from_utf8(output.stdout).unwrap();
    let found: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let [first, again, without] = &found[..] else { panic!("{found:?}") };
    assert_eq!(first["tokens"], again["tokens"]);
    assert_eq!(without["tokens"], continued(&model, "u: Hi\na:"));
}

/// 64 tokens of context: of three turns the first falls away, the system's sentence stays.
#[test]
fn the_oldest_turns_fall_away() {
    let model = model();
    set_template(&model, TEMPLATE);
    let lines = "aaaaaaaaaaaaa\nbbbbbbbbbbbbb\nccccccccccccc\n"; // 25 tokens each with its answer, at most
    let output = chat(&model, &["--json", "--system", "Be.", "--temperature", "0"], lines).output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said, "(2 of the oldest turns no longer fit and are forgotten)\n");
    let said = String::from_utf8(output.stdout).unwrap();
    let found: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(found.iter().map(|turn| turn["forgotten"].as_u64().unwrap()).eq([0, 0, 2]));
    let answer = found[1]["text"].as_str().unwrap().trim();
    let text = format!("s: Be.\nu: bbbbbbbbbbbbb\na: {answer}\nu: ccccccccccccc\na:");
    assert_eq!(found[2]["tokens"], continued(&model, &text));
}

#[test]
fn what_is_wrong_with_a_conversation_is_told_in_a_line() {
    let model = model();
    let failed = |arguments: &[&str], lines: &str| {
        let (code, said) = failure(&mut chat(&model, arguments, lines));
        assert_eq!((code, said.lines().count()), (1, 1), "{said}");
        said
    };
    assert!(failed(&[], "Hi\n").contains("no chat template here"));
    set_template(
        &model,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}x",
    );
    let said = failed(&["--system", "Be."], "Hi\n");
    assert_eq!(said, "error: the chat template refuses this conversation: no system here\n");
    set_template(&model, "{% for %}");
    assert!(failed(&[], "Hi\n").contains("chat template, line 1"));
    set_template(&model, TEMPLATE);
    assert!(failed(&[], &"x".repeat(70)).contains("prompt 0 has 77 tokens: with 5 more they do not fit"));

    let mut bytes = volary();
    bytes.arg("chat").arg("--model").arg(model.path()).write_stdin(&b"\nab\xffc\n"[..]);
    assert_eq!(failure(&mut bytes), (1, "error: standard input: line 2 is not UTF-8 at byte 2\n".into()));
    let (code, _) = failure(&mut chat(&model, &["--top-p", "2"], ""));
    assert_eq!(code, 2);
}

/// GLM's tokens, those of the fixture's configuration among them.
fn glm() -> TempDir {
    let special = [
        "<|endoftext|>",
        "[SEP]",
        "[CLS]",
        "[MASK]",
        "[UNK]",
        "<|startofpiece|>",
        "<|endofpiece|>",
        "[sMASK]",
        "[gMASK]",
    ];
    let special = special.map(str::to_owned).into_iter();
    let mut tokens: Vec<String> = characters().collect();
    let rest = tokens.split_off(80);
    let filler = (0..).map(|at| format!("{{{at}}}"));
    let tokens: Vec<String> = tokens.into_iter().chain(special).chain(rest).chain(filler).take(96).collect();
    folder("glm", &tokens, &[84, 80, 81, 82, 83, 85, 86, 87, 88], None)
}

/// Each blank is filled with those before it in sight; the whole text is given, and the parts.
#[test]
fn blanks_are_filled() {
    let model = glm();
    let fill = |text: &str| -> Value {
        let mut command = volary();
        command.args(["fill", text, "--max-new", "4", "--json", "--model"]).arg(model.path());
        serde_json::from_str(&told(&mut command)).unwrap()
    };
    let found = &fill("ab [MASK] c [sMASK].")[0];
    let blanks = found["blanks"].as_array().unwrap();
    let text = |at: usize| blanks[at]["text"].as_str().unwrap();
    assert_eq!(blanks.len(), 2);
    assert_eq!(found["filled"], format!("ab{} c{}.", text(0), text(1)));
    assert_eq!(fill("ab [MASK] c.")[0]["blanks"].as_array().unwrap().len(), 1);
    // a text without a blank gets one at its end
    let continued = &fill("ab")[0];
    assert_eq!(continued["filled"], format!("ab{}", continued["blanks"][0]["text"].as_str().unwrap()));
    let generated = answers(&mut generate(&model, &["ab", "--max-new", "4"])).remove(0);
    assert_eq!(generated["tokens"], continued["blanks"][0]["tokens"]);

    let plain = self::model();
    let mut command = volary();
    command.args(["fill", "a [MASK]", "--model"]).arg(plain.path());
    assert_eq!(failure(&mut command), (1, "error: llama cannot fill blanks\n".into()));
}
