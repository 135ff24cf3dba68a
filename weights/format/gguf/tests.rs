use std::fs;

use super::*;
use crate::cast::values;
use crate::format::{SafetensorsFile, open};
use crate::testing::fixture;

fn small() -> Vec<u8> {
    fs::read(fixture("gguf/small.gguf")).unwrap()
}

fn parse(bytes: impl Into<Cow<'static, [u8]>>) -> Result<Gguf<Cow<'static, [u8]>>, Error> {
    Gguf::parse("m.gguf".into(), bytes.into())
}

fn refusal(bytes: Vec<u8>) -> GgufError {
    match parse(bytes) {
        Err(Error::Gguf { reason, .. }) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_type_has_the_bits_of_the_reference() {
    let file = open(&fixture("gguf/small.gguf")).unwrap();
    let expected = SafetensorsFile::open(fixture("gguf/expected.safetensors")).unwrap();
    assert_eq!(file.entries().len(), expected.entries().len());
    for Entry { name, shape, .. } in expected.entries() {
        let found = file.entries().iter().find(|entry| entry.name == *name).unwrap();
        assert_eq!(found.shape, *shape, "{name}");
        let wanted: Vec<f32> = values(Dtype::F32, &expected.bytes(name).unwrap());
        let stored = file.bytes(name).unwrap();
        assert_eq!(stored.len(), found.dtype.bytes_of(shape).unwrap(), "{name}");
        let values: Vec<f32> = match found.dtype {
            dtype if dtype.is_float() => values(dtype, &stored),
            dtype => values::<i64>(dtype, &stored).into_iter().map(|value| value as f32).collect(),
        };
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&values), bits(&wanted), "{name}");
    }
}

#[test]
fn a_tensor_knows_how_it_is_stored() {
    let file = parse(small()).unwrap();
    assert_eq!(file.stored_as("q4_k"), Some("Q4_K"));
    assert_eq!(file.stored_as("bf16"), Some("BF16"));
    assert_eq!(file.stored_as("none"), None);
    let dtype = |name: &str| file.entries().iter().find(|entry| entry.name == name).unwrap().dtype;
    assert_eq!([dtype("q8_0"), dtype("f16"), dtype("i64")], [Dtype::F32, Dtype::F16, Dtype::I64]);
}

#[test]
fn metadata_of_every_kind_is_read() {
    let file = parse(small()).unwrap();
    assert_eq!(file.metadata().next().unwrap(), ("general.architecture", Value::String("volary")));
    for (key, expected) in [
        ("test.u8", Value::U8(200)),
        ("test.i8", Value::I8(-100)),
        ("test.u16", Value::U16(60000)),
        ("test.i16", Value::I16(-30000)),
        ("test.u32", Value::U32(4_000_000_000)),
        ("test.i32", Value::I32(-2_000_000_000)),
        ("test.f32", Value::F32(0.5)),
        ("test.u64", Value::U64(1 << 63)),
        ("test.i64", Value::I64(-(1 << 62))),
        ("test.f64", Value::F64(0.1)),
        ("test.bool", Value::Bool(true)),
        ("test.string", Value::String("鸟舍 volary")),
    ] {
        assert_eq!(file.get(key), Some(expected), "{key}");
    }
    let Some(Value::Array(tokens)) = file.get("test.tokens") else { panic!("no array") };
    assert_eq!(tokens.iter().collect::<Vec<_>>(), ["<s>", "你好", ""].map(Value::String));
    let Some(Value::Array(numbers)) = file.get("test.numbers") else { panic!("no array") };
    assert_eq!(numbers.iter().collect::<Vec<_>>(), [1, -2, 3].map(Value::I32));
    assert_eq!(
        (numbers.len(), numbers.is_empty(), numbers.iter().next().unwrap().as_u64()),
        (3, false, Some(1))
    );
    assert_eq!(file.get("test.i8").unwrap().as_u64(), None);
    assert_eq!(file.get("none"), None);
}

#[test]
fn version_2_has_the_same_layout_and_others_are_refused() {
    let version = |version: u32| {
        let mut bytes = small();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        bytes
    };
    assert_eq!(parse(version(2)).unwrap().entries(), parse(small()).unwrap().entries());
    assert_eq!(refusal(version(1)), GgufError::Version { found: 1 });
    assert_eq!(refusal(version(4)), GgufError::Version { found: 4 });
    assert_eq!(refusal(version(3 << 24)), GgufError::BigEndian);
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A tensor's description.
fn info(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let dims_bytes: Vec<u8> = dims.iter().flat_map(|dim| dim.to_le_bytes()).collect();
    let count = (dims.len() as u32).to_le_bytes();
    [&text(name)[..], &count, &dims_bytes, &kind.to_le_bytes(), &offset.to_le_bytes()].concat()
}

/// A line of metadata: key, type, value.
fn pair(key: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&text(key)[..], &kind.to_le_bytes(), value].concat()
}

fn file(pairs: &[Vec<u8>], infos: &[Vec<u8>], data: usize) -> Vec<u8> {
    let counts = [infos.len() as u64, pairs.len() as u64].map(u64::to_le_bytes).concat();
    let mut bytes = [b"GGUF\x03\0\0\0", &counts[..], &pairs.concat(), &infos.concat()].concat();
    bytes.resize(bytes.len().next_multiple_of(32) + data, 0);
    bytes
}

#[test]
fn every_lie_is_named() {
    let key = || "a".to_owned();
    let one = |dims: &[u64], kind, offset, data| refusal(file(&[], &[info("a", dims, kind, offset)], data));
    assert!(parse(file(&[], &[info("a", &[2, 3], 0, 0)], 24)).is_ok());
    assert_eq!(one(&[2, 3], 0, 0, 23), GgufError::OutOfFile { key: key(), end: 24, found: 23 });
    assert_eq!(one(&[2], 0, 8, 64), GgufError::Unaligned { key: key(), offset: 8, alignment: 32 });
    assert_eq!(one(&[u64::MAX, 2], 0, 0, 8), GgufError::TooLarge { key: key(), shape: vec![2, usize::MAX] });
    assert_eq!(
        one(&[1 << 60, 1 << 4], 2, 0, 8),
        GgufError::TooLarge { key: key(), shape: vec![1 << 4, 1 << 60] },
        "few bytes as stored, too many as f32"
    );
    assert_eq!(one(&[1; 5], 0, 0, 8), GgufError::Dimensions { key: key(), found: 5 });
    assert_eq!(one(&[33], 2, 0, 64), GgufError::Row { key: key(), row: 33, name: "Q4_0", block: 32 });
    for (id, name) in [(19, "IQ1_S"), (4, "unknown"), (9, "Q8_1"), (u32::MAX, "unknown")] {
        assert_eq!(one(&[32], id, 0, 64), GgufError::TensorType { key: key(), id, name });
    }
    let twice = file(&[], &[info("a", &[1], 0, 0), info("a", &[1], 0, 32)], 64);
    assert_eq!(refusal(twice), GgufError::DuplicateKey { key: key() });
    let overlap = file(&[], &[info("a", &[9], 0, 0), info("b", &[1], 0, 32)], 64);
    assert_eq!(refusal(overlap), GgufError::Overlap { key: "b".into(), begin: 32, other: key() });
    let long = "x".repeat(2000);
    assert_eq!(refusal(file(&[], &[info(&long, &[1], 0, 0)], 4)), GgufError::LongName { length: 2000 });

    let meta = |pairs: &[Vec<u8>]| refusal(file(pairs, &[], 0));
    assert_eq!(meta(&[pair("a", 13, &[])]), GgufError::MetadataType { key: key(), found: 13 });
    let flag = || pair("a", 7, &[1]);
    assert_eq!(meta(&[flag(), flag()]), GgufError::DuplicateMetadata { key: key() });
    let alignment = |size: u32| pair("general.alignment", 4, &size.to_le_bytes());
    assert_eq!(meta(&[alignment(24)]), GgufError::Alignment { found: "24".into() });
    assert_eq!(meta(&[alignment(0)]), GgufError::Alignment { found: "0".into() });
    let array = |kind: u32, length: u64| [&kind.to_le_bytes()[..], &length.to_le_bytes()].concat();
    let deep = (0..9).flat_map(|_| array(9, 1)).collect::<Vec<_>>();
    assert_eq!(meta(&[pair("a", 9, &deep)]), GgufError::MetadataDepth { key: key() });
    assert!(matches!(meta(&[pair("a", 9, &array(8, u64::MAX))]), GgufError::Truncated { .. }));
    assert!(matches!(meta(&[pair("a", 9, &array(10, u64::MAX))]), GgufError::Truncated { .. }));
    assert!(matches!(meta(&[pair("a", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff])]), GgufError::NotText { .. }));

    let mut counts = file(&[], &[], 0);
    counts[8..24].fill(0xff);
    assert!(matches!(refusal(counts), GgufError::Truncated { .. }), "counts that lie cost nothing");
    assert!(matches!(parse(&b"<html>"[..]), Err(Error::NotWeights { .. })));
}

#[test]
fn the_alignment_is_what_the_metadata_says() {
    let alignment = pair("general.alignment", 4, &64u32.to_le_bytes());
    let mut bytes = file(&[alignment], &[info("a", &[1], 0, 0), info("b", &[2], 0, 64)], 0);
    bytes.truncate(bytes.len() - bytes.len() % 32);
    bytes.resize(bytes.len().next_multiple_of(64) + 72, 7);
    let file = parse(bytes.clone()).unwrap();
    assert_eq!(&*file.bytes("b").unwrap(), &bytes[bytes.len() - 8..]);
}

#[test]
fn a_scalar_and_an_empty_tensor_are_tensors() {
    let file =
        parse(file(&[], &[info("a", &[], 0, 0), info("b", &[0, 3], 8, 32), info("c", &[1], 0, 32)], 36));
    let file = file.unwrap();
    let shapes: Vec<_> =
        file.entries().iter().map(|entry| (entry.name.as_str(), entry.shape.clone())).collect();
    assert_eq!(shapes, [("a", vec![]), ("b", vec![3, 0]), ("c", vec![1])]);
    assert_eq!(file.bytes("b").unwrap().len(), 0);
}
