use std::fs;

use super::*;
use crate::format::{FILES, OpenOptions, open, open_with};
use crate::testing::{Stored, count, fixture, safetensors_bytes, torch_bytes};

/// A folder with two shards, `a` and `b` in the first, `c` in the second.
fn folder(index: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write =
        |name: &str, tensors: &[Stored]| fs::write(folder.path().join(name), safetensors_bytes(tensors));
    write("model-00001-of-00002.safetensors", &[count("a", &[2], 0), count("b", &[3], 10)]).unwrap();
    write("model-00002-of-00002.safetensors", &[count("c", &[1, 2], 20)]).unwrap();
    fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
    folder
}

const INDEX: &str = r#"{"metadata": {"total_size": 1}, "weight_map": {
    "a": "model-00001-of-00002.safetensors",
    "b": "model-00001-of-00002.safetensors",
    "c": "model-00002-of-00002.safetensors"}}"#;

fn names(checkpoint: &dyn Checkpoint) -> Vec<&str> {
    checkpoint.entries().iter().map(|entry| entry.name.as_str()).collect()
}

/// The problems, as they are told.
fn problems(folder: &Path) -> Vec<String> {
    match open(folder) {
        Err(Error::Shards { problems, .. }) => problems.iter().map(ToString::to_string).collect(),
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("opened"),
    }
}

#[test]
fn shards_are_one_checkpoint_whose_total_size_may_lie() {
    let folder = folder(INDEX);
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(names(checkpoint.as_ref()), ["a", "b", "c"]);
    assert_eq!(checkpoint.entries()[2].shape, [1, 2]);
    assert_eq!(*checkpoint.bytes("c").unwrap(), [20.0f32, 21.0].map(f32::to_le_bytes).concat());
    assert!(checkpoint.path().ends_with("model.safetensors.index.json"));
    assert!(matches!(checkpoint.bytes("d"), Err(Error::NoTensor { .. })));
    let by_file = open(&folder.path().join("model.safetensors.index.json")).unwrap();
    assert_eq!(by_file.entries(), checkpoint.entries());
}

#[test]
fn one_file_comes_before_its_shards() {
    let folder = folder(INDEX);
    let whole = safetensors_bytes(&[count("whole", &[1], 0)]);
    fs::write(folder.path().join("model.safetensors"), whole).unwrap();
    assert_eq!(names(open(folder.path()).unwrap().as_ref()), ["whole"]);
}

#[test]
fn torch_shards_are_read_the_same_way() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: Vec<u8>| fs::write(folder.path().join(name), bytes).unwrap();
    write("pytorch_model-00001-of-00002.bin", torch_bytes(&[count("a", &[2, 2], 0)], None, &[]));
    write("pytorch_model-00002-of-00002.bin", torch_bytes(&[count("b", &[3], 4)], None, &[]));
    write(
        "pytorch_model.bin.index.json",
        br#"{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}"#
            .to_vec(),
    );
    let checkpoint = open(folder.path()).unwrap();
    assert_eq!(names(checkpoint.as_ref()), ["a", "b"]);
    assert_eq!(*checkpoint.bytes("b").unwrap(), [4.0f32, 5.0, 6.0].map(f32::to_le_bytes).concat());
}

#[test]
fn the_fixture_has_the_tensors_of_its_shards() {
    let checkpoint = open(&fixture("llama_sharded")).unwrap();
    let total: usize =
        checkpoint.entries().iter().map(|entry| checkpoint.bytes(&entry.name).unwrap().len()).sum();
    assert_eq!(total, 119_168, "the total_size of its index");
}

#[test]
fn everything_that_is_wrong_comes_at_once() {
    let folder = folder(
        r#"{"weight_map": {
            "a": "model-00001-of-00002.safetensors", "moved": "model-00001-of-00002.safetensors",
            "a": "model-00002-of-00002.safetensors",
            "c": "model-00002-of-00002.safetensors", "d": "model-00003-of-00002.safetensors",
            "e": "../secret.safetensors", "f": "/etc/passwd", "g": "..", "h": "sub\\x", "i": "",
            "j": 1, "k": null, "l": ["x"], "m": {"x": 1}, "n": "text.safetensors"}}"#,
    );
    fs::write(folder.path().join("text.safetensors"), "not found").unwrap();
    let found = problems(folder.path());
    for expected in [
        "the index lists `a` twice",
        "the index wants `e` from `../secret.safetensors`, which is not the name of a file beside it",
        "the index wants `f` from `/etc/passwd`, which is not the name of a file beside it",
        "the index wants `g` from `..`, which is not the name of a file beside it",
        "the index wants `h` from `sub\\x`, which is not the name of a file beside it",
        "the index wants `i` from ``, which is not the name of a file beside it",
        "the index gives no file name for `j`, but something else",
        "the index gives no file name for `k`, but something else",
        "the index gives no file name for `l`, but something else",
        "the index gives no file name for `m`, but something else",
        "the shard model-00003-of-00002.safetensors is missing",
        "`moved` is not in model-00001-of-00002.safetensors, where the index has it",
        "model-00001-of-00002.safetensors has `b`, which the index does not list",
    ] {
        assert!(found.iter().any(|found| found == expected), "{expected}: not in {found:#?}");
    }
    assert!(found.iter().any(|found| found.ends_with("this is a text file, not weights")), "{found:#?}");
    assert_eq!(found.len(), 14, "{found:#?}");
    let message = open(folder.path()).err().unwrap().to_string();
    assert!(message.contains("model.safetensors.index.json: 14 problems with the shards\n  "), "{message}");
}

#[test]
fn a_key_in_two_shards_is_an_error_wherever_the_index_has_it() {
    let folder = folder(INDEX);
    let both = safetensors_bytes(&[count("c", &[1, 2], 20), count("a", &[2], 0)]);
    fs::write(folder.path().join("model-00002-of-00002.safetensors"), both).unwrap();
    assert_eq!(
        problems(folder.path()),
        ["`a` is in each of model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"]
    );
}

#[test]
fn an_index_that_is_none_is_called_what_it_is() {
    let with = |index: &str| problems(folder(index).path()).remove(0);
    assert!(with("{").starts_with("the index is not the expected JSON"));
    assert!(with("[]").starts_with("the index is not the expected JSON"));
    assert!(with(r#"{"weight_map": []}"#).starts_with("the index is not the expected JSON"));
    assert!(with(&format!("{}1", "[".repeat(100_000))).starts_with("the index is not the expected JSON"));
    let deep = format!(r#"{{"weight_map": {{"a": {}{}}}}}"#, "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(with(&deep), "the index gives no file name for `a`, but something else");
    assert_eq!(with("{}"), "the index has no `weight_map`, which says where each tensor is");
    let page = folder("<!DOCTYPE html><html>Sign in</html>");
    assert!(matches!(open(page.path()), Err(Error::NotWeights { found: Lookalike::WebPage, .. })));
}

#[test]
fn a_complete_set_needs_no_index() {
    let folder = folder(INDEX);
    fs::remove_file(folder.path().join("model.safetensors.index.json")).unwrap();
    assert_eq!(names(open(folder.path()).unwrap().as_ref()), ["a", "b", "c"]);

    fs::rename(
        folder.path().join("model-00001-of-00002.safetensors"),
        folder.path().join("model-00001-of-00003.safetensors"),
    )
    .unwrap();
    assert_eq!(
        problems(folder.path()),
        ["there are shards of sets of 2 and 3 files, and no index that says which set is meant"]
    );
    fs::remove_file(folder.path().join("model-00001-of-00003.safetensors")).unwrap();
    assert_eq!(problems(folder.path()), ["the shard model-00001-of-00002.safetensors is missing"]);
}

#[test]
fn a_variant_is_taken_in_every_spelling_and_never_replaced() {
    let fp16 = OpenOptions { variant: Some("fp16"), ..OpenOptions::default() };
    for name in [
        "model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "pytorch_model.fp16.bin",
        "diffusion_pytorch_model.fp16.bin",
        "model-00001-of-00001.fp16.safetensors",
        "diffusion_pytorch_model.fp16-00001-of-00001.safetensors",
    ] {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(name), safetensors_bytes(&[count("half", &[1], 0)])).unwrap();
        assert_eq!(names(open_with(folder.path(), &fp16).unwrap().as_ref()), ["half"], "{name}");
        assert!(matches!(open(folder.path()), Err(Error::NoWeights { .. })), "{name}");
    }
    for name in ["model.fp16.safetensors.index.json", "model.safetensors.index.fp16.json"] {
        let folder = folder("{}");
        fs::write(folder.path().join(name), INDEX).unwrap();
        assert_eq!(names(open_with(folder.path(), &fp16).unwrap().as_ref()), ["a", "b", "c"], "{name}");
    }

    let whole = folder(INDEX);
    fs::write(whole.path().join("model.safetensors"), safetensors_bytes(&[count("a", &[1], 0)])).unwrap();
    let error = open_with(whole.path(), &fp16).err().unwrap();
    assert!(
        matches!(&error, Error::NoVariant { looked_for, .. } if looked_for.len() > FILES.len()),
        "{error:?}"
    );
    assert!(error.to_string().contains("the variant `fp16`"), "{error}");
    let outside = OpenOptions { variant: Some("x/../../y"), ..OpenOptions::default() };
    assert!(matches!(open_with(whole.path(), &outside), Err(Error::NoVariant { .. })));
}
