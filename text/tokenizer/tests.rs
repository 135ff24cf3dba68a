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
    folder.write("config.json", br#"{"model_type": "clip", "tokenizer_class": "GPT2Tokenizer"}"#);
    assert_eq!(folder.load().unwrap().encode("a").unwrap().tokens, ["a"]);
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

#[derive(Deserialize)]
struct PieceCases {
    encode: Vec<PieceCase>,
    decode: Vec<DecodeCase>,
}

#[derive(Deserialize)]
struct PieceCase {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

const MODELS: [&str; 6] = ["unigram", "unigram_bytes", "bpe", "bpe_bare", "char", "word"];

#[test]
fn models_give_the_ids_of_the_sentencepiece_library() {
    for name in MODELS {
        let folder = Folder::new(&format!("spm-{name}"));
        folder.write("tokenizer.model", std::fs::read(fixture("spm").join(format!("{name}.model"))).unwrap());
        let tokenizer = folder.load().unwrap();
        assert_eq!(tokenizer.kind(), TokenizerKind::SentencePiece);
        let cases = std::fs::read(fixture("spm").join(format!("{name}.json"))).unwrap();
        let cases: PieceCases = serde_json::from_slice(&cases).unwrap();
        let unknown = tokenizer.unk_id().unwrap();
        for case in &cases.encode {
            assert_eq!(tokenizer.encode(&case.text).unwrap().ids, case.ids, "{name}: {:?}", case.text);
            // The library writes unknown pieces as " \u{2047} ".
            if !case.ids.contains(&unknown) {
                assert_eq!(tokenizer.decode(&case.ids, true), case.decoded, "{name}: {:?}", case.ids);
            }
        }
        for case in &cases.decode {
            assert_eq!(tokenizer.decode(&case.ids, true), case.text, "{name}: {:?}", case.ids);
        }
    }
}

#[test]
fn a_broken_model_is_an_error_and_never_a_panic() {
    let folder = Folder::new("spm-broken");
    let whole = std::fs::read(fixture("spm").join("char.model")).unwrap();
    let load = |bytes: &[u8]| folder.write("tokenizer.model", bytes).load();
    for end in 0..whole.len() {
        let error = load(&whole[..end]).unwrap_err().to_string();
        assert!(error.contains("tokenizer.model: "), "{error}");
    }
    let mut random = 1_u64;
    for _ in 0..80 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut bytes = whole.clone();
        let at = (random >> 33) as usize % bytes.len();
        bytes[at] = (random >> 20) as u8;
        if let Ok(tokenizer) = load(&bytes) {
            let ids = tokenizer.encode("a small  cat 猫\n<tool>").unwrap().ids;
            tokenizer.decode(&ids, false);
        }
    }
    assert!(load(&whole[..30]).unwrap_err().to_string().contains("byte "));
    assert!(load(b"not a model at all").is_err());
    assert!(load(b"").unwrap_err().to_string().contains("the vocabulary is empty"));
    // A piece that says it is longer than the file: 2^60 bytes.
    let long = [0x0a, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10];
    let error = load(&long).unwrap_err().to_string();
    assert!(error.ends_with("byte 10 must be part of as many bytes as the field says"), "{error}");
    let twice = [0x0a, 3, 0x0a, 1, b'a', 0x0a, 3, 0x0a, 1, b'a', 0x12, 0, 0x1a, 0];
    assert!(load(&twice).unwrap_err().to_string().contains(r#""a" is both token 0 and token 1"#));
    let error = load(&twice[5..]).unwrap_err().to_string();
    assert!(error.contains("its piece of type UNKNOWN"), "{error}");
}

#[test]
fn a_broken_table_of_characters_never_panics() {
    let file = Path::new("x.model");
    for bytes in [&[][..], &[1], &[4, 0, 0, 0], &[3, 0, 0, 0, 1, 2, 3], &[4, 0, 0, 0, 1, 2, 3, 4, 0xff]] {
        assert!(charsmap::CharsMap::read(file, bytes).is_err(), "{bytes:?}");
    }
    let mut random = 9_u32;
    for _ in 0..2000 {
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 17;
            random ^= random << 5;
            random
        };
        let mut bytes = 16_u32.to_le_bytes().to_vec();
        bytes.extend((0..4).flat_map(|_| next().to_le_bytes()));
        bytes.extend("猫 x\0é\0".bytes());
        let map = charsmap::CharsMap::read(file, &bytes).unwrap();
        for text in ["", "a", "猫", "\u{1}\u{2}\u{3}"] {
            assert!(map.longest(text).is_none_or(|(_, length)| length <= text.len()));
        }
    }
}

#[derive(Deserialize)]
struct CpmCase {
    text: String,
    words: String,
    ids: Vec<u32>,
    decoded: String,
}

/// Words from Python's jieba 0.42.1, ids from transformers' `CpmTokenizer`.
#[test]
fn cpm_cuts_words_and_then_pieces() {
    let folder = Folder::new("cpm");
    folder
        .write("spiece.model", std::fs::read(fixture("spm").join("cpm.model")).unwrap())
        .write("tokenizer_config.json", br#"{"tokenizer_class": "CpmTokenizer"}"#);
    let cpm = folder.load().unwrap();
    let pangu = Tokenizer::from_folder_as(&folder.0, TokenizerKind::PanguAlpha).unwrap();
    let cases = std::fs::read(fixture("spm").join("cpm.json")).unwrap();
    let cases: Vec<CpmCase> = serde_json::from_slice(&cases).unwrap();
    for CpmCase { text, words, ids, decoded } in &cases {
        assert_eq!(chinese::spaced_words(text), *words);
        assert_eq!(cpm.encode(text).unwrap().ids, *ids, "{text:?}");
        assert_eq!(cpm.decode(ids, true), *decoded, "{text:?}");
    }
    assert_eq!(cpm.encode("是").unwrap().type_ids, [0, 0, 2]);
    assert_eq!(cpm.token_to_id("<eod>"), cpm.eod_id());
    let text = "今天天气 很好\n我们是";
    let encoding = pangu.encode(text).unwrap();
    assert!(!encoding.ids.contains(&cpm.sep_id().unwrap()));
    assert_eq!(pangu.decode(&encoding.ids, true), text);
}

/// Feeds every tokenizer of the fixtures token by token.
#[test]
fn a_stream_yields_what_decoding_all_at_once_does() {
    let spm = |name: &str| {
        let folder = Folder::new(&format!("stream-{name}"));
        folder.write("tokenizer.model", std::fs::read(fixture("spm").join(format!("{name}.model"))).unwrap());
        folder.load().unwrap()
    };
    let whole = |name: &str| Tokenizer::from_folder(&fixture(name)).unwrap();
    let tokenizers = ["tok_bert", "tok_clip", "tok_gpt2", "tok_t5", "tok_xlmr"].map(whole);
    for tokenizer in tokenizers.into_iter().chain(MODELS.map(spm)) {
        for text in [
            "a small cat  is 猫🦒 don't , sleeping ！\n\nΩ e\u{301} \u{fffd}x",
            "  two  spaces ",
            "一只小猫正睡在木桌上。",
            "👩‍👩‍👧",
            "",
        ] {
            let ids = tokenizer.encode(text).unwrap().ids;
            for skip_special in [true, false] {
                let mut stream = tokenizer.decode_stream(skip_special);
                let parts: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
                let all = parts.concat() + &stream.finish();
                assert_eq!(all, tokenizer.decode(&ids, skip_special), "{:?} {text:?}", tokenizer.file);
                // U+FFFD is only given out where the text has it.
                let expected = text.matches('\u{fffd}').count();
                assert!(all.matches('\u{fffd}').count() <= expected, "{all:?}");
            }
        }
    }
}

#[test]
fn a_stream_of_any_tokens_ends_as_decoding_does() {
    let spm = |name: &str| {
        let folder = Folder::new(&format!("any-{name}"));
        folder.write("tokenizer.model", std::fs::read(fixture("spm").join(format!("{name}.model"))).unwrap());
        folder.load().unwrap()
    };
    let whole = |name: &str| Tokenizer::from_folder(&fixture(name)).unwrap();
    let cleaning = tiny_bert(
        "any-cleaning",
        &["do", "n", "'", "t", "##n", "##'", "##t", ".", ",", "s", "ve", "##ve", "?"],
        json!({"clean_up_tokenization_spaces": true}),
    );
    let tokenizers = ["tok_bert", "tok_clip", "tok_gpt2", "tok_t5", "tok_xlmr"].map(whole).into_iter();
    let tokenizers = tokenizers.chain(MODELS.map(spm)).chain([cleaning.load().unwrap()]);
    for tokenizer in tokenizers {
        let mut random = fastrand::Rng::with_seed(3);
        let size = tokenizer.vocab_size() as u32;
        // Half of the tokens are bytes or short pieces, so that characters are cut everywhere.
        for _ in 0..500 {
            let skip_special = random.bool();
            let few = if random.bool() { size } else { size.min(60) };
            let ids: Vec<u32> = (0..random.usize(..14)).map(|_| random.u32(..few)).collect();
            let mut stream = tokenizer.decode_stream(skip_special);
            let parts: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
            let all = parts.concat() + &stream.finish();
            assert_eq!(all, tokenizer.decode(&ids, skip_special), "{:?} {ids:?} {parts:?}", tokenizer.file);
        }
    }
}

#[test]
fn a_stream_holds_back_the_bytes_of_half_a_character() {
    let tokenizer = Tokenizer::from_folder(&fixture("tok_gpt2")).unwrap();
    let ids = tokenizer.encode("x🦒").unwrap().ids;
    assert_eq!(ids.len(), 5, "one token for x, four bytes");
    let mut stream = tokenizer.decode_stream(true);
    let parts: Vec<String> = ids.iter().map(|id| stream.push(*id)).collect();
    assert_eq!(parts, ["x", "", "", "", "🦒"]);
    assert_eq!(stream.finish(), "");

    let mut stream = tokenizer.decode_stream(true);
    let parts: Vec<String> = ids[..3].iter().map(|id| stream.push(*id)).collect();
    assert_eq!(parts, ["x", "", ""]);
    assert_eq!(stream.finish(), "\u{fffd}");

    // Nothing is quadratic: a long stream keeps few tokens.
    let mut stream = tokenizer.decode_stream(true);
    let text: String =
        (0..500).flat_map(|_| ids.iter().map(|id| stream.push(*id)).collect::<Vec<_>>()).collect();
    assert_eq!(text, "x🦒".repeat(500));
}

#[test]
fn glm_has_its_commands_after_the_pieces() {
    let folder = Folder::new("glm-zh");
    let model = std::fs::read(fixture("spm").join("bpe.model")).unwrap();
    folder.write("cog-pretrain.model", &model);
    let pieces = 700;
    let glm = folder.load().unwrap();
    assert_eq!(glm.kind(), TokenizerKind::GlmChinese);
    let ids =
        [glm.eos_id(), glm.sep_id(), glm.cls_id(), glm.mask_id(), glm.unk_id(), glm.sop_id(), glm.eop_id()];
    assert_eq!(ids, [0, 1, 2, 3, 4, 6, 7].map(|i| Some(pieces + i)));
    assert_eq!([glm.smask_id(), glm.gmask_id()], [Some(pieces + 8), Some(pieces + 9)]);
    assert_eq!(glm.pad_id(), glm.eos_id());
    let encoding = glm.encode("cat [gMASK]").unwrap();
    assert_eq!((encoding.ids[0], encoding.ids[encoding.ids.len() - 1]), (pieces + 2, pieces));
    assert_eq!(encoding.ids[encoding.ids.len() - 2], pieces + 9);
    assert_eq!(glm.decode(&encoding.ids, true), "cat");

    // Without the fix [gMASK] has the id of the end of a piece.
    folder.write(
        "tokenizer_config.json",
        br#"{"tokenizer_class": "GLMChineseTokenizer", "fix_command_token": false}"#,
    );
    let glm = folder.load().unwrap();
    assert_eq!(glm.kind(), TokenizerKind::GlmChineseUnfixed);
    assert_eq!([glm.gmask_id(), glm.eop_id(), glm.smask_id()], [7, 7, 8].map(|i| Some(pieces + i)));
    assert_eq!(glm.encode_without_special("[gMASK]").unwrap().ids, [pieces + 7]);

    // The ids that a folder declares hold.
    folder
        .write("tokenizer_config.json", br#"{"tokenizer_class": "GLMChineseTokenizer"}"#)
        .write("added_tokens.json", br#"{"[gMASK]": 709, "[sMASK]": 708}"#);
    assert_eq!(folder.load().unwrap().gmask_id(), Some(709));
    folder.write("added_tokens.json", br#"{"[gMASK]": 708, "[sMASK]": 709}"#);
    assert!(folder.error().contains(r#"added token "[gMASK]" declares id 708"#), "{}", folder.error());
}

#[test]
fn glm_in_english_has_its_commands_after_the_words() {
    let folder = Folder::copy("glm-gpt2", "tok_gpt2", &["vocab.json", "merges.txt"]);
    folder.write("tokenizer_config.json", br#"{"tokenizer_class": "GLMGPT2Tokenizer"}"#);
    let glm = folder.load().unwrap();
    let words = 420;
    assert_eq!(
        [glm.sop_id(), glm.eop_id(), glm.cls_id(), glm.mask_id()],
        [0, 1, 2, 3].map(|i| Some(words + i))
    );
    assert_eq!(
        [glm.sep_id(), glm.unk_id(), glm.gmask_id(), glm.smask_id()],
        [4, 5, 6, 7].map(|i| Some(words + i))
    );
    assert_eq!(glm.eos_id(), Some(0));
    let ids = glm.encode("x [MASK]").unwrap().ids;
    assert_eq!((ids[0], ids[ids.len() - 2], ids[ids.len() - 1]), (words + 2, words + 3, 0));

    let folder = tiny_bert("glm-bert", &["cat"], json!({"tokenizer_class": "GLMBertTokenizer"}));
    let glm = folder.load().unwrap();
    assert_eq!([glm.sop_id(), glm.eop_id(), glm.gmask_id()], [Some(6), Some(7), None]);
    assert_eq!(glm.encode("cat [MASK]").unwrap().ids, [2, 5, 4, 3]);
}

#[test]
fn roberta_has_two_marks_between_texts() {
    let folder = Folder::new("roberta");
    folder
        .write("vocab.json", r#"{"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4, "b": 5, "<mask>": 6}"#)
        .write("merges.txt", "#version: 0.2\n")
        .write("config.json", br#"{"model_type": "roberta"}"#);
    let roberta = folder.load().unwrap();
    assert_eq!(roberta.encode("a<mask>").unwrap().ids, [0, 4, 6, 2]);
    let pair = roberta.encode_pair("a", "b").unwrap();
    assert_eq!((pair.ids, pair.type_ids), (vec![0, 4, 2, 2, 5, 2], vec![0; 6]));
    assert_eq!([roberta.cls_id(), roberta.pad_id(), roberta.mask_id()], [0, 1, 6].map(Some));
}

#[test]
fn glm_130b_has_images_before_text_and_commands_after_it() {
    let folder = Folder::new("glm130b");
    folder.write("ice_text.model", std::fs::read(fixture("spm").join("unigram.model")).unwrap());
    let ice = folder.load().unwrap();
    assert_eq!(ice.kind(), TokenizerKind::Glm130b);
    let after = 20_000 + 380;
    assert_eq!([ice.mask_id(), ice.gmask_id(), ice.smask_id()], [0, 1, 2].map(|i| Some(after + i)));
    assert_eq!([ice.sop_id(), ice.eop_id(), ice.eos_id()], [Some(after + 4), Some(after + 5), Some(20_002)]);
    assert_eq!(ice.token_to_id("<image_19999>"), Some(19_999));
    assert_eq!(ice.token_to_id("<|tab|>"), Some(after + 8));
    assert_eq!(ice.token_to_id("<|blank_80|>"), Some(after + 87));
    assert_eq!(ice.vocab_size() as u32, after + 88 + 256);
    let text = "a small  cat\tis\n🦒   x[gMASK]";
    let ids = ice.encode(text).unwrap().ids;
    assert_eq!(ids[ids.len() - 1], after + 1);
    for token in ["<|blank_2|>", "<|tab|>", "<|blank_3|>", "<0xF0>"] {
        assert!(ids.contains(&ice.token_to_id(token).unwrap()), "{token}");
    }
    assert_eq!(ice.decode(&ids, true), "a small  cat\tis\n🦒   x");
}

/// `▂` is a token as in CPM-2's vocabularies.
fn cpm2(test: &str, tokens: &[&str]) -> Tokenizer {
    let folder = Folder::new(test);
    folder.write(
        "vocab.txt",
        [&["<pad>", "<unk>", "<eod>", "<s_0>", "\u{2582}", "\u{2583}"], tokens].concat().join("\n"),
    );
    folder.load().unwrap()
}

#[test]
fn cpm2_takes_the_longest_pieces_of_words() {
    let tokenizer = cpm2("cpm2", &["今天", "天气", "很", "好", "，", "A", "BC", "1", "我们"]);
    assert_eq!(tokenizer.kind(), TokenizerKind::Cpm2);
    // Full-width letters are halved, Chinese punctuation stays.
    let encoding = tokenizer.encode("今天天气很好，ＡＢＣ１ 我们\n不").unwrap();
    let tokens = ["今天", "天气", "很", "好", "，", "A", "BC", "1", "\u{2582}", "我们", "\u{2583}", "<unk>"];
    assert_eq!(encoding.tokens, tokens);
    assert_eq!(tokenizer.decode(&encoding.ids, true), "今天天气很好，ABC1 我们\n");
    assert_eq!([tokenizer.eod_id(), tokenizer.eos_id(), tokenizer.pad_id()], [Some(2), Some(2), Some(0)]);
    assert_eq!(tokenizer.encode("好<s_0>").unwrap().ids, [9, 3]);
    let long = "好".repeat(3);
    assert_eq!(tokenizer.encode(&long).unwrap().ids, [9, 9, 9]);
}

#[test]
fn bilingual_cpm2_leaves_out_spaces_between_english_words() {
    let tokenizer = cpm2("cpm2-en", &["play", "##ing", "the", "game", "我们", "，", "Ａ"]);
    let encoding = tokenizer.encode("playing the game 我们 the，Ａ").unwrap();
    let tokens = ["play", "##ing", "the", "game", "\u{2582}", "我们", "\u{2582}", "the", "，", "Ａ"];
    assert_eq!(encoding.tokens, tokens);
    assert_eq!(tokenizer.decode(&encoding.ids[..8], true), "playing the game 我们 the");
}

#[test]
fn plato_numbers_its_pieces_by_vocab_txt() {
    let folder = Folder::new("plato");
    folder
        .write("spm.model", std::fs::read(fixture("spm").join("char.model")).unwrap())
        .write("vocab.txt", "[PAD]\n[CLS]\n[SEP]\n[UNK]\na\n\u{2581}\nt\n[MASK]\n");
    let plato = folder.load().unwrap();
    assert_eq!(plato.kind(), TokenizerKind::Plato);
    assert_eq!(plato.encode("a \u{201c}at").unwrap().ids, [1, 5, 4, 5, 3, 4, 6, 2]);
    assert_eq!(plato.encode_pair("a", "t").unwrap().type_ids, [0, 0, 0, 0, 1, 1, 1]);
    assert_eq!(plato.encode_without_special("[CLS]a[SEP]").unwrap().ids, [1, 5, 4, 2]);
    assert_eq!([plato.cls_id(), plato.sep_id(), plato.pad_id(), plato.unk_id()], [1, 2, 0, 3].map(Some));
    assert_eq!(plato.decode(&[1, 5, 4, 6, 5, 6, 2], true), "at t");
    folder.write("vocab.txt", "a\nb\n");
    assert!(
        folder.error().ends_with(r#"vocab.txt: unk_token is "[UNK]", which the vocabulary lacks"#),
        "{}",
        folder.error()
    );
}

#[test]
fn a_kind_that_is_said_outranks_the_files() {
    let folder = Folder::new("said");
    folder
        .write("spiece.model", std::fs::read(fixture("spm").join("bpe.model")).unwrap())
        .write("tokenizer_config.json", br#"{"tokenizer_class": "T5Tokenizer", "extra_ids": 3}"#);
    let t5 = folder.load().unwrap();
    assert_eq!(t5.token_to_id("<extra_id_0>"), Some(702));
    assert_eq!(t5.vocab_size(), 703);
    let llama = Tokenizer::from_folder_as(&folder.0, TokenizerKind::Llama).unwrap();
    let ids = llama.encode("cat").unwrap().ids;
    assert_eq!(Some(ids[0]), llama.bos_id());
    assert_eq!(ids[1..], llama.encode_without_special("cat").unwrap().ids);
    assert_eq!(llama.special_ids(), [0, 1, 2]);
}

#[test]
fn words_that_are_not_chinese_are_cut_as_python_cuts_them() {
    let words = ["第", "5", "-", "6", "章", "e", ".", "g", ".", "㐀", "x", "_", "y", "占", "12.5%", "\r\n"];
    let words = [&words[..], &["v1.2", ".", "3", "，", "T恤"]].concat();
    assert_eq!(chinese::words(&words.concat()), words);
}

#[test]
fn a_configuration_says_what_stands_around_a_mask() {
    let folder =
        Folder::copy("mask-space", "tok_xlmr", &["sentencepiece.bpe.model", "tokenizer_config.json"]);
    let mask = folder.load().unwrap().mask_id().unwrap();
    assert_eq!(folder.load().unwrap().encode_without_special("\u{2028}<mask>").unwrap().ids.len(), 3);
    folder.write("special_tokens_map.json", br#"{"mask_token": {"content": "<mask>", "lstrip": true}}"#);
    assert_eq!(folder.load().unwrap().encode_without_special("\u{2028}<mask>").unwrap().ids, [mask]);
}

#[test]
fn paddle_writes_ids_behind_its_tokens() {
    let folder = Folder::new("paddle");
    folder.write("vocab.txt", "[PAD]\t0\n[CLS]\t1\n[SEP]\t2\n[UNK]\t3\n[MASK]\t4\ncat\t5\n");
    folder.write("tokenizer_config.json", br#"{"tokenizer_class": "ErnieTokenizer"}"#);
    assert_eq!(folder.load().unwrap().encode("cat").unwrap().ids, [1, 5, 2]);
}
