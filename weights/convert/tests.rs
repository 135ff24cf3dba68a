use std::collections::BTreeMap;
use std::fs;

use proptest::prelude::*;
use safetensors::Dtype as Stored;

use super::*;
use crate::open;
use crate::testing::{checkpoint, count, floats, ints, tiny};

const SILENT: &dyn Fn(u64) = &|_| {};

/// Every tensor by its name.
fn tensors(checkpoint: &dyn Checkpoint) -> BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> {
    let tensor = |entry: &Entry| {
        let bytes = checkpoint.bytes(&entry.name).unwrap().into_owned();
        (entry.name.clone(), (entry.dtype, entry.shape.clone(), bytes))
    };
    checkpoint.entries().iter().map(tensor).collect()
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn whatever_the_size_of_a_shard_the_tensors_are_the_same() {
    let source = checkpoint(&tiny());
    for (limit, files) in [(None, 1), (Some(1), 20 + 1), (Some(200), 5 + 1), (Some(u64::MAX), 1)] {
        let folder = tempfile::tempdir().unwrap();
        let options = ConvertOptions { max_shard_size: limit, ..ConvertOptions::default() };
        let written = convert(&source, folder.path(), "model", &options, SILENT).unwrap();
        assert_eq!((written.len(), names(folder.path()).len()), (files, files), "{limit:?}");
        assert_eq!(tensors(open(folder.path()).unwrap().as_ref()), tensors(&source), "{limit:?}");
    }
}

/// The names and contents are those of huggingface_hub's `split_torch_state_dict_into_shards`.
#[test]
fn shards_are_filled_in_order_and_a_giant_has_its_own() {
    // 8, 16, 40 and 8 bytes
    let source =
        checkpoint(&[count("a", &[2], 0), count("b", &[4], 0), count("c", &[10], 0), count("d", &[2], 0)]);
    let folder = tempfile::tempdir().unwrap();
    let options = ConvertOptions { max_shard_size: Some(24), ..ConvertOptions::default() };
    convert(&source, folder.path(), "model", &options, SILENT).unwrap();
    let index = fs::read_to_string(folder.path().join("model.safetensors.index.json")).unwrap();
    assert_eq!(
        index,
        r#"{
  "metadata": {
    "total_size": 72
  },
  "weight_map": {
    "a": "model-00002-of-00003.safetensors",
    "b": "model-00002-of-00003.safetensors",
    "c": "model-00001-of-00003.safetensors",
    "d": "model-00003-of-00003.safetensors"
  }
}
"#
    );
    let shard = crate::format::SafetensorsFile::open(folder.path().join("model-00002-of-00003.safetensors"));
    assert_eq!(shard.unwrap().metadata()["format"], "pt");
}

#[test]
fn a_checkpoint_without_tensors_is_a_file_without_tensors() {
    let folder = tempfile::tempdir().unwrap();
    convert(&checkpoint(&[]), folder.path(), "model", &ConvertOptions::default(), SILENT).unwrap();
    assert_eq!(open(folder.path()).unwrap().entries(), []);
}

#[test]
fn whole_numbers_and_truth_values_keep_their_dtype() {
    let folder = tempfile::tempdir().unwrap();
    let options = ConvertOptions { dtype: Some(FloatDType::F16), ..ConvertOptions::default() };
    convert(&checkpoint(&tiny()), folder.path(), "model", &options, SILENT).unwrap();
    let found = tensors(open(folder.path()).unwrap().as_ref());
    assert_eq!(
        (found["position_ids"].0, found["mask"].0, found["upper"].0),
        (Dtype::I64, Dtype::Bool, Dtype::F16)
    );
    assert_eq!(found["position_ids"], tensors(&checkpoint(&tiny()))["position_ids"]);
}

#[test]
fn progress_adds_up_to_all_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let source = checkpoint(&tiny());
    let done = std::cell::Cell::new(0);
    let options = ConvertOptions { dtype: Some(FloatDType::BF16), ..ConvertOptions::default() };
    convert(&source, folder.path(), "model", &options, &|bytes| done.set(done.get() + bytes)).unwrap();
    assert_eq!(done.get(), tensors(&source).values().map(|(_, _, bytes)| bytes.len() as u64).sum::<u64>());
}

/// A source with faults of both kinds, among them in one tensor.
fn faulty() -> crate::format::Memory {
    checkpoint(&[
        floats("both", &[4], [1.0, f32::NAN, -70000.0, 65519.0]),
        floats("fine", &[2], [65504.0, -1.0]),
        floats("infinite", &[2], [0.0, f32::NEG_INFINITY]),
        floats("large", &[3], [65520.0, 1.0, 1e30]),
        ints("position_ids", &[70000]),
    ])
}

#[test]
fn what_cannot_be_kept_is_listed_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let options =
        ConvertOptions { dtype: Some(FloatDType::F16), max_shard_size: Some(8), ..ConvertOptions::default() };
    let error = convert(&faulty(), folder.path(), "model", &options, SILENT).unwrap_err();
    let Error::Values { problems, .. } = &error else { panic!("{error}") };
    let not_finite = |key: &str, first_index| Problem::NotFinite {
        key: key.into(),
        dtype: Dtype::F32,
        count: 1,
        first_index,
    };
    let overflow = |key: &str, count, first_index| Problem::Overflow {
        key: key.into(),
        dtype: Dtype::F16,
        count,
        first_index,
    };
    assert_eq!(
        *problems,
        [not_finite("both", 1), overflow("both", 1, 2), not_finite("infinite", 1), overflow("large", 2, 0)]
    );
    let told = error.to_string();
    assert!(told.starts_with("test.safetensors: 4 tensors with values that cannot be kept"), "{told}");
    assert!(told.contains("`large`: 2 numbers too large for F16, the first at index 0"), "{told}");
    assert_eq!(names(folder.path()), Vec::<String>::new());
}

#[test]
fn what_is_allowed_is_kept() {
    let options = |not_finite, overflow| ConvertOptions {
        dtype: Some(FloatDType::F16),
        not_finite,
        overflow,
        ..ConvertOptions::default()
    };
    let faults = |options: &ConvertOptions| {
        let folder = tempfile::tempdir().unwrap();
        match convert(&faulty(), folder.path(), "model", options, SILENT) {
            Ok(_) => tensors(open(folder.path()).unwrap().as_ref())["both"].2.clone(),
            Err(Error::Values { problems, .. }) => vec![problems.len() as u8],
            Err(error) => panic!("{error}"),
        }
    };
    assert_eq!(faults(&options(NotFinite::Allow, Overflow::Refuse)), [2]);
    assert_eq!(faults(&options(NotFinite::Refuse, Overflow::Allow)), [2]);
    let kept = faults(&options(NotFinite::Allow, Overflow::Allow));
    let halves: Vec<f16> = kept.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect();
    assert!(halves[1].is_nan());
    assert_eq!([halves[0], halves[2], halves[3]], [f16::ONE, f16::NEG_INFINITY, f16::from_f32(65504.0)]);
}

#[test]
fn a_folder_that_is_not_there_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let gone = folder.path().join("gone");
    let error =
        convert(&checkpoint(&tiny()), &gone, "model", &ConvertOptions::default(), SILENT).unwrap_err();
    assert!(matches!(&error, Error::Io { path, .. } if path.starts_with(&gone)), "{error}");
}

proptest! {
    /// Narrow floats are what rounding each number by itself gives, and widening them again is exact.
    #[test]
    fn narrowing_is_rounding(numbers in proptest::collection::vec(-60000.0_f32..60000.0, 1..70)) {
        let source = checkpoint(&[floats("x", &[numbers.len()], numbers.iter().copied())]);
        let converted = |source: &dyn Checkpoint, dtype| {
            let folder = tempfile::tempdir().unwrap();
            let options = ConvertOptions { dtype: Some(dtype), ..ConvertOptions::default() };
            convert(source, folder.path(), "model", &options, SILENT).unwrap();
            fs::read(folder.path().join("model.safetensors")).unwrap()
        };
        let bytes = |file: &[u8]| {
            tensors(&crate::format::Memory::new("x", file.to_vec()).unwrap())["x"].2.clone()
        };
        let halves = converted(&source, FloatDType::F16);
        let expected: Vec<u8> = numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
        prop_assert_eq!(bytes(&halves), expected);
        let brain = converted(&source, FloatDType::BF16);
        let expected: Vec<u8> = numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
        prop_assert_eq!(bytes(&brain), expected);
        let wide = converted(&crate::format::Memory::new("x", halves).unwrap(), FloatDType::F32);
        let expected: Vec<u8> =
            numbers.iter().flat_map(|&x| f16::from_f32(x).to_f32().to_le_bytes()).collect();
        prop_assert_eq!(bytes(&wide), expected);
    }
}

#[test]
fn doubles_are_read_as_they_are() {
    let bytes = [1e300_f64, 0.1].iter().flat_map(|x| x.to_le_bytes()).collect();
    let stored = crate::testing::Stored { key: "x".into(), dtype: Stored::F64, shape: vec![2], bytes };
    let source = checkpoint(&[stored]);
    let folder = tempfile::tempdir().unwrap();
    let mut options = ConvertOptions::default();
    convert(&source, folder.path(), "model", &options, SILENT).unwrap();
    assert_eq!(tensors(open(folder.path()).unwrap().as_ref()), tensors(&source));
    options.dtype = Some(FloatDType::F32);
    let error = convert(&source, folder.path(), "model", &options, SILENT).unwrap_err();
    assert!(error.to_string().contains("1 numbers too large for F32"), "{error}");
}
