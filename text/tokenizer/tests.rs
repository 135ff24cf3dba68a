use std::path::{Path, PathBuf};

use burn::tensor::Device;
use serde::Deserialize;
use serde_json::{Value, json};

use super::*;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures");

#[derive(Deserialize)]
struct Cases {
    encode: Vec<EncodeCase>,
    decode: Vec<DecodeCase>,
    pair: Vec<PairCase>,
    padded: Option<Padded>,
}

#[derive(Deserialize)]
struct EncodeCase {
    text: String,
    ids: Vec<u32>,
    tokens: Vec<String>,
    ids_without_special: Vec<u32>,
}

#[derive(Deserialize)]
struct DecodeCase {
    ids: Vec<u32>,
    text: String,
}

#[derive(Deserialize)]
struct PairCase {
    text: String,
    text_pair: String,
    ids: Vec<u32>,
    token_type_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Padded {
    max_length: usize,
    texts: Vec<String>,
    input_ids: Vec<Vec<u32>>,
    attention_mask: Vec<Vec<u32>>,
}

/// A folder for one test, removed at its end.
struct Folder(PathBuf);

impl Folder {
    fn new(test: &str) -> Folder {
        let name = format!("volary-text-{}-{test}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    /// The named files of a fixture.
    fn copy(test: &str, fixture: &str, files: &[&str]) -> Folder {
        let folder = Folder::new(test);
        for file in files {
            folder.write(file, std::fs::read(Path::new(FIXTURES).join(fixture).join(file)).unwrap());
        }
        folder
    }

    fn write(&self, file: &str, bytes: impl AsRef<[u8]>) -> &Folder {
        std::fs::write(self.0.join(file), bytes).unwrap();
        self
    }

    fn load(&self) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::from_folder(&self.0)
    }

    fn error(&self) -> String {
        self.load().unwrap_err().to_string()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(FIXTURES).join(name)
}

/// Everything that a fixture's `cases.json` records of the Python tokenizer.
fn assert_as_python(tokenizer: &Tokenizer, fixture: &Path) {
    let cases = std::fs::read(fixture.join("cases.json")).unwrap();
    let cases: Cases = serde_json::from_slice(&cases).unwrap();
    for case in &cases.encode {
        let encoding = tokenizer.encode(&case.text).unwrap();
        assert_eq!(encoding.ids, case.ids, "{:?}", case.text);
        assert_eq!(encoding.tokens, case.tokens, "{:?}", case.text);
        let alone = tokenizer.encode_without_special(&case.text).unwrap();
        assert_eq!(alone.ids, case.ids_without_special, "{:?}", case.text);
    }
    for case in &cases.decode {
        assert_eq!(tokenizer.decode(&case.ids, true), case.text, "{:?}", case.ids);
    }
    for case in &cases.pair {
        let encoding = tokenizer.encode_pair(&case.text, &case.text_pair).unwrap();
        assert_eq!(encoding.ids, case.ids, "{:?}", case.text);
        assert_eq!(encoding.type_ids, case.token_type_ids, "{:?}", case.text);
    }
    if let Some(padded) = &cases.padded {
        let options =
            BatchOptions { max_length: Some(padded.max_length), pad: PadTo::Length(padded.max_length) };
        let batch = tokenizer.encode_batch(&padded.texts, &options).unwrap();
        assert_eq!(batch.ids, padded.input_ids);
        assert_eq!(batch.attention_mask, padded.attention_mask);
        for (text, truncated) in padded.texts.iter().zip(&batch.truncated) {
            let whole = tokenizer.encode(text).unwrap().ids.len();
            assert_eq!(*truncated, whole > padded.max_length, "{text:?}");
        }
    }
}

#[test]
fn tokenizer_json_gives_the_ids_of_python() {
    for name in ["tok_bert", "tok_clip", "tok_gpt2", "tok_t5", "tok_xlmr"] {
        let folder = fixture(name);
        assert_as_python(&Tokenizer::from_folder(&folder).unwrap(), &folder);
    }
}

#[test]
fn vocabulary_files_give_the_ids_of_python() {
    let config = ["tokenizer_config.json", "special_tokens_map.json"];
    for (name, files) in [
        ("tok_bert", &["vocab.txt"][..]),
        ("tok_clip", &["vocab.json", "merges.txt"]),
        ("tok_gpt2", &["vocab.json", "merges.txt"]),
        ("tok_t5", &["spiece.model"]),
        ("tok_xlmr", &["sentencepiece.bpe.model"]),
    ] {
        let folder = Folder::copy(name, name, &[files, &config].concat());
        assert_as_python(&folder.load().unwrap(), &fixture(name));
    }
}

#[test]
fn an_embedded_tokenizer_gives_the_ids_of_python() {
    for name in ["tok_bert", "tok_clip"] {
        let folder = fixture(name);
        let json = std::fs::read(folder.join("tokenizer.json")).unwrap();
        let config = std::fs::read(folder.join("tokenizer_config.json")).unwrap();
        assert_as_python(&Tokenizer::from_bytes(&json, Some(&config)).unwrap(), &folder);
        assert_as_python(&Tokenizer::from_bytes(&json, None).unwrap(), &folder);
    }
}

#[test]
fn vocabulary_files_alone_are_enough() {
    let bert = Folder::copy("alone-bert", "tok_bert", &["vocab.txt"]);
    assert_as_python(&bert.load().unwrap(), &fixture("tok_bert"));
    let clip = Folder::copy("alone-clip", "tok_clip", &["vocab.json", "merges.txt"]);
    assert_as_python(&clip.load().unwrap(), &fixture("tok_clip"));
}

#[test]
fn config_json_names_the_family_where_no_tokenizer_class_does() {
    let folder = Folder::copy("model-type", "tok_clip", &["vocab.json", "merges.txt"]);
    folder.write("config.json", br#"{"model_type": "gpt2"}"#);
    assert_eq!(folder.load().unwrap().encode("a").unwrap().tokens, ["a"]);
    folder.write("config.json", br#"{"model_type": "clip"}"#);
    let marked = ["<|startoftext|>", "a</w>", "<|endoftext|>"];
    assert_eq!(folder.load().unwrap().encode("a").unwrap().tokens, marked);
    folder.write("config.json", br#"{"model_type": "albert"}"#);
    assert!(folder.error().contains(r#""albert" needs a tokenizer.json"#), "{}", folder.error());
}

/// `[PAD] [UNK] [CLS] [SEP] [MASK]`, then these.
fn tiny_bert(test: &str, tokens: &[&str], config: Value) -> Folder {
    let folder = Folder::new(test);
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    folder
        .write("vocab.txt", [&special, tokens].concat().join("\n"))
        .write("tokenizer_config.json", config.to_string());
    folder
}

#[test]
fn bert_options_change_the_words() {
    let tokens = ["cafe", "café", "CAFÉ", "CAFE", "一", "猫", "一猫"];
    let words = |test: &str, config: Value, text: &str| {
        let tokenizer = tiny_bert(test, &tokens, config).load().unwrap();
        tokenizer.encode_without_special(text).unwrap().tokens
    };
    assert_eq!(words("default", json!({}), "CAFÉ 一猫"), ["cafe", "一", "猫"]);
    assert_eq!(words("cased", json!({"do_lower_case": false}), "CAFÉ"), ["CAFÉ"]);
    let stripped = json!({"do_lower_case": false, "strip_accents": true});
    assert_eq!(words("strip", stripped, "CAFÉ"), ["CAFE"]);
    assert_eq!(words("accents", json!({"strip_accents": false}), "CAFÉ"), ["café"]);
    assert_eq!(words("chinese", json!({"tokenize_chinese_chars": false}), "一猫"), ["一猫"]);
}

#[test]
fn bert_options_outrank_the_normalizer_of_tokenizer_json() {
    let folder = Folder::copy("outrank", "tok_bert", &["tokenizer.json"]);
    folder.write("tokenizer_config.json", br#"{"do_lower_case": false}"#);
    let tokenizer = folder.load().unwrap();
    assert_eq!(tokenizer.encode_without_special("Cat cat").unwrap().tokens, ["[UNK]", "cat"]);
}

#[test]
fn words_of_more_than_100_characters_are_unknown() {
    let tokenizer = tiny_bert("long", &["a", "##a"], json!({})).load().unwrap();
    let words = |n: usize| tokenizer.encode_without_special(&"a".repeat(n)).unwrap().tokens;
    assert_eq!(words(100).len(), 100);
    assert_eq!(words(101), ["[UNK]"]);
}

#[test]
fn named_tokens_come_from_strings_and_from_objects() {
    let tokens = ["<p>", "<m>", "cat"];
    let config = json!({"pad_token": "<p>", "model_max_length": 1e30, "padding_side": "left"});
    let folder = tiny_bert("named", &tokens, config);
    folder.write(
        "special_tokens_map.json",
        br#"{"mask_token": {"content": "<m>", "lstrip": true, "normalized": false}}"#,
    );
    let tokenizer = folder.load().unwrap();
    assert_eq!(tokenizer.pad_id(), Some(5));
    assert_eq!(tokenizer.mask_id(), Some(6));
    assert_eq!(tokenizer.unk_id(), Some(1));
    assert_eq!(tokenizer.cls_id(), Some(2));
    assert_eq!(tokenizer.sep_id(), Some(3));
    assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (None, None));
    assert_eq!(tokenizer.model_max_length(), None);
    assert_eq!(tokenizer.padding_side(), Side::Left);
    assert_eq!(tokenizer.vocab_size(), 8);
    assert_eq!(tokenizer.token_to_id("cat"), Some(7));
    assert_eq!(tokenizer.id_to_token(7).as_deref(), Some("cat"));
    assert_eq!(tokenizer.id_to_token(8), None);
    assert_eq!(tokenizer.encode("cat <m>").unwrap().ids, [2, 7, 6, 3]);

    let batch = tokenizer.encode_batch(&["cat", "cat cat"], &BatchOptions::default()).unwrap();
    assert_eq!(batch.ids, [[5, 2, 7, 3], [2, 7, 7, 3]]);
    assert_eq!(batch.attention_mask, [[0, 1, 1, 1], [1, 1, 1, 1]]);
}

#[test]
fn tokens_that_the_vocabulary_lacks_follow_its_last() {
    let config = json!({"additional_special_tokens": ["<ent>"], "mask_token": "<hole>"});
    let tokenizer = tiny_bert("follow", &["cat"], config).load().unwrap();
    assert_eq!(tokenizer.mask_id(), Some(6));
    assert_eq!(tokenizer.token_to_id("<ent>"), Some(7));
    assert_eq!(tokenizer.encode("<ent>cat<hole>").unwrap().ids, [2, 7, 5, 6, 3]);
    assert_eq!(tokenizer.decode(&[2, 7, 5, 6, 3], true), "cat");
    assert_eq!(tokenizer.decode(&[5, 99], true), "cat");
}

#[test]
fn cutting_keeps_the_last_special_token() {
    let tokenizer = Tokenizer::from_folder(&fixture("tok_clip")).unwrap();
    let options = BatchOptions { max_length: Some(4), pad: PadTo::Longest };
    let batch = tokenizer.encode_batch(&["a a a a", "a"], &options).unwrap();
    let eos = tokenizer.eos_id().unwrap();
    assert_eq!(batch.shape(), [2, 4]);
    assert_eq!([batch.ids[0][3], batch.ids[1][2]], [eos, eos]);
    assert_eq!(batch.truncated, [true, false]);
    let one = BatchOptions { max_length: Some(1), pad: PadTo::Longest };
    let error = tokenizer.encode_batch(&["a"], &one).unwrap_err().to_string();
    assert_eq!(error, "rows of 1 tokens cannot hold the 2 special tokens");
}

#[test]
fn a_batch_becomes_two_tensors() {
    let tokenizer = tiny_bert("tensors", &["cat"], json!({})).load().unwrap();
    let options = BatchOptions { max_length: None, pad: PadTo::Length(4) };
    let batch = tokenizer.encode_batch(&["cat", "cat cat cat"], &options).unwrap();
    let (ids, mask) = batch.to_tensors(&Device::default());
    assert_eq!(ids.dims(), [2, 4]);
    let values = |tensor: burn::tensor::Tensor<2, burn::tensor::Int>| {
        tensor.into_data().iter::<i64>().collect::<Vec<_>>()
    };
    assert_eq!(values(ids), [2, 5, 3, 0, 2, 5, 5, 3]);
    assert_eq!(values(mask), [1, 1, 1, 0, 1, 1, 1, 1]);

    let empty = tokenizer.encode_batch(&[] as &[&str], &options).unwrap();
    assert_eq!(empty.shape(), [0, 0]);
}

#[test]
fn rows_that_nothing_can_pad_are_an_error() {
    let folder = Folder::copy("no-pad", "tok_gpt2", &["vocab.json", "merges.txt"]);
    let tokenizer = folder.load().unwrap();
    let error = tokenizer.encode_batch(&["aa", "a"], &BatchOptions::default()).unwrap_err();
    assert!(matches!(error, TokenizerError::NoPadToken { row: 1, .. }), "{error}");
}

#[test]
fn an_empty_folder_says_what_was_looked_for() {
    let error = Folder::new("empty").error();
    assert!(error.ends_with("looked for tokenizer.json, vocab.json + merges.txt, vocab.txt, \
        spiece.model, sentencepiece.bpe.model, tokenizer.model, spm.model, cog-pretrain.model, ice_text.model, \
        chinese_vocab.model, vocab.model"), "{error}");
}

#[test]
fn malformed_files_are_errors_that_name_the_file_and_the_field() {
    let clip = |test: &str, vocab: &str, merges: &str| {
        let folder = Folder::new(test);
        folder
            .write("vocab.json", vocab)
            .write("merges.txt", merges)
            .write("tokenizer_config.json", br#"{"tokenizer_class": "CLIPTokenizer"}"#);
        folder.error()
    };
    let bert = |test: &str, config: &str| {
        let folder = tiny_bert(test, &["cat"], Value::Null);
        folder.write("tokenizer_config.json", config);
        folder.error()
    };
    let ends = r#""<|startoftext|>": 2, "<|endoftext|>": 3"#;
    let vocab = format!(r#"{{"a": 0, "b": 1, {ends}}}"#);
    for (error, expected) in [
        (clip("truncated", r#"{"a": 0, "#, ""), "vocab.json: EOF while parsing"),
        (clip("list", "[]", ""), "vocab.json: the file must be an object of tokens and ids, found []"),
        (clip("none", "{}", ""), "vocab.json: the vocabulary is empty"),
        (clip("float", r#"{"a": 0.5}"#, ""), "vocab.json: a must be an id, found 0.5"),
        (clip("minus", r#"{"a": -1}"#, ""), "vocab.json: a must be an id, found -1"),
        (clip("gap", r#"{"a": 0, "b": 2}"#, ""), "from 0 to 2; missing: [1]; given twice: []"),
        (clip("twice", r#"{"a": 0, "b": 0}"#, ""), "missing: []; given twice: [0]"),
        (clip("huge", r#"{"a": 4294967295}"#, ""), "from 0 to 4294967295; missing: [0, 1, "),
        (clip("unk", r#"{"a": 0}"#, ""), r#"unk_token is "<|endoftext|>", which the vocabulary lacks"#),
        (
            clip("one", &vocab, "#version: 0.2\na\n"),
            r#"merges.txt: line 2 must be two tokens and one space, found "a""#,
        ),
        (clip("three", &vocab, "a b c\n"), "merges.txt: line 1 must be two tokens"),
        (clip("blank", &vocab, "\n"), "merges.txt: line 1 must be two tokens"),
        (clip("left", &vocab, "z b\n"), r#"merges.txt: line 1 needs the token "z""#),
        (clip("made", &vocab, "a b\n"), r#"merges.txt: line 1 needs the token "ab""#),
        (bert("json", "{"), "tokenizer_config.json: EOF while parsing"),
        (bert("array", "[]"), "tokenizer_config.json: the file must be an object"),
        (bert("length", r#"{"model_max_length": "x"}"#), r#"model_max_length must be a length, found "x""#),
        (bert("side", r#"{"padding_side": "up"}"#), r#"padding_side must be "left" or "right", found "up""#),
        (bert("lower", r#"{"do_lower_case": 1}"#), "do_lower_case must be true or false, found 1"),
        (bert("token", r#"{"pad_token": 0}"#), "pad_token must be a token, found 0"),
        (bert("content", r#"{"pad_token": {}}"#), "pad_token.content must be a string, found null"),
        (bert("unknown", r#"{"unk_token": "?"}"#), r#"unk_token is "?", which the vocabulary lacks"#),
        (
            bert("decoder", r#"{"added_tokens_decoder": {"x": "y"}}"#),
            r#"added_tokens_decoder.x must be keyed by an id, found "x""#,
        ),
        (bert("shifted", r#"{"added_tokens_decoder": {"9": "y"}}"#), r#"added token "y" declares id 9"#),
    ] {
        assert!(error.contains(expected), "{error}\nshould contain\n{expected}");
    }
    let empty = Folder::new("empty-txt");
    assert!(empty.write("vocab.txt", "").error().contains("vocab.txt: the vocabulary is empty"));
    assert!(empty.write("vocab.txt", b"a\n\xff").error().contains("not UTF-8 at byte 2"));
}

/// A small `tokenizer.json` that loads, to be spoilt.
fn word_piece() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 0, "content": "[UNK]", "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }],
        "normalizer": null,
        "pre_tokenizer": { "type": "BertPreTokenizer" },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": {},
        },
        "decoder": null,
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": { "[UNK]": 0, "a": 1 },
        },
    })
}

#[test]
fn malformed_tokenizer_json_is_an_error_and_never_a_panic() {
    let load = |value: &Value| Tokenizer::from_bytes(value.to_string().as_bytes(), None);
    assert_eq!(load(&word_piece()).unwrap().encode("a b").unwrap().ids, [1, 0]);
    let bpe = |prefix: &str, merges: Value| {
        json!({
            "type": "BPE", "continuing_subword_prefix": prefix, "merges": merges,
            "vocab": { "[UNK]": 0, "a": 1, "b": 2 },
        })
    };
    let special = json!({ "SpecialToken": { "id": "[CLS]", "type_id": 0 } });
    let added = |id: u32, content: &str| {
        json!([{
            "id": id, "content": content, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false, "special": true,
        }])
    };
    for (at, spoilt, expected) in [
        ("/model", json!(null), "model must be an object, found null"),
        ("/model/vocab", json!({}), "the vocabulary is empty"),
        ("/model/vocab", json!([]), "the vocabulary is empty"),
        ("/model/vocab", json!({"[UNK]": 0, "a": 5}), "from 0 to 5; missing: [1, 2, 3, 4]"),
        ("/model/vocab", json!({"[UNK]": 0, "a": "1"}), r#"model.vocab.a must be an id, found "1""#),
        ("/model/unk_token", json!("?"), r#"unk_token is "?", which the vocabulary lacks"#),
        ("/model/type", json!("Novel"), "tokenizer.json: "),
        ("/model", bpe("", json!(["a b c"])), "model.merges.0 must be two tokens"),
        ("/model", bpe("", json!([["a"]])), "model.merges.0 must be two tokens"),
        ("/model", bpe("", json!([["a", "b"]])), r#"model.merges.0 needs the token "ab""#),
        ("/model", bpe("##", json!([["a", "b"]])), "model.merges.0 needs the token \"##b\""),
        ("/post_processor/single/0", special, r#"single.0 must be one of its special_tokens, found "[CLS]""#),
        ("/post_processor/single/0/Sequence/id", json!("B"), "single.0 must be a sequence of this template"),
        (
            "/added_tokens",
            added(7, "<x>"),
            r#"added token "<x>" declares id 7, but its place in the vocabulary is 2"#,
        ),
        (
            "/added_tokens",
            added(0, "a"),
            r#"added token "a" declares id 0, but its place in the vocabulary is 1"#,
        ),
        ("/added_tokens/0/id", json!("0"), r#"added_tokens.0.id must be an id, found "0""#),
        ("/normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AA"}), "tokenizer.json: "),
    ] {
        let mut value = word_piece();
        *value.pointer_mut(at).unwrap() = spoilt;
        let error = load(&value).unwrap_err().to_string();
        assert!(error.contains(expected), "{at}: {error}\nshould contain\n{expected}");
    }
    let whole = word_piece().to_string();
    for end in (0..whole.len()).filter(|end| whole.is_char_boundary(*end)) {
        assert!(Tokenizer::from_bytes(&whole.as_bytes()[..end], None).is_err());
    }
}

#[test]
fn a_trained_vocabulary_covers_its_texts() {
    let texts = ["a small cat is sleeping", "一只小猫正睡在木桌上。", "two small cats 猫猫", "small"];
    let json = train_wordpiece(texts, 80).unwrap();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes(), None).unwrap();
    for (id, token) in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"].iter().enumerate() {
        assert_eq!(tokenizer.token_to_id(token), Some(id as u32));
    }
    assert_eq!(tokenizer.pad_id(), Some(0));
    assert!(tokenizer.vocab_size() <= 80);
    for text in texts {
        let encoding = tokenizer.encode(text).unwrap();
        assert!(!encoding.tokens.contains(&"[UNK]".to_owned()), "{:?}", encoding.tokens);
        assert_eq!([encoding.ids[0], encoding.ids[encoding.ids.len() - 1]], [2, 3]);
    }
    let alone = tokenizer.encode_without_special("SMALL 小猫").unwrap();
    assert_eq!(alone.tokens, ["small", "小", "猫"]);
    let pair = tokenizer.encode_pair("cat", "猫").unwrap();
    assert_eq!((pair.type_ids[0], pair.type_ids[pair.type_ids.len() - 1]), (0, 1));
}

#[test]
fn merges_are_the_most_frequent_neighbours_and_ties_go_to_the_lower_ids() {
    // Characters a b c, ##a ##b ##c. "ab" stands 3 times; then "abc" and "ca" once each.
    let json = train_wordpiece(["ab ab abc", "ca"], 13).unwrap();
    let tokenizer = Tokenizer::from_bytes(json.as_bytes(), None).unwrap();
    let token = |id: u32| tokenizer.id_to_token(id).unwrap();
    let tokens: Vec<String> = (5..13).map(token).collect();
    assert_eq!(tokens, ["a", "b", "c", "##a", "##b", "##c", "ab", "ca"]);
}

#[test]
fn training_depends_on_neither_order_nor_chance() {
    let texts: Vec<String> = (0..200)
        .map(|i: u32| format!("word{} {} 猫{}", i % 17, "abcdefgh".repeat(1 + i as usize % 3), i % 5))
        .collect();
    let json = train_wordpiece(&texts, 120).unwrap();
    let reversed = train_wordpiece(texts.iter().rev(), 120).unwrap();
    assert_eq!(json, reversed);
    let error = train_wordpiece(["abc"], 9).unwrap_err();
    assert!(matches!(error, TokenizerError::VocabTooSmall { needed: 10, .. }), "{error}");
}
