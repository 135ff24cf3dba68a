use std::collections::HashMap;

use burn::nn::LinearConfig;
use burn::tensor::Device;
use half::f16;
use proptest::prelude::*;

use super::*;
use crate::format::SafetensorsFile;
use crate::load::{LoadOptions, load};
use crate::testing::{KEYS, Tiny, checkpoint, count, tiny};

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn entries(path: &Path) -> Vec<(String, Vec<usize>, Vec<u8>)> {
    let file = SafetensorsFile::open(path).unwrap();
    let mut entries: Vec<_> = crate::Checkpoint::entries(&file)
        .iter()
        .map(|entry| {
            let bytes = crate::Checkpoint::bytes(&file, &entry.name).unwrap().into_owned();
            (entry.name.clone(), entry.shape.clone(), bytes)
        })
        .collect();
    entries.sort();
    entries
}

#[test]
fn saving_undoes_loading() {
    let folder = folder();
    let [first, second] = ["first", "second"].map(|name| folder.path().join(format!("{name}.safetensors")));
    let mut tensors = tiny();
    // equal parts, which is how saving cuts a concatenation
    for tensor in &mut tensors {
        match tensor.key.as_str() {
            "upper" => *tensor = count("upper", &[2, 2], 200),
            "lower" => *tensor = count("lower", &[2, 2], 204),
            _ => {}
        }
    }
    let loaded =
        load(Tiny::new(&Device::flex()), &checkpoint(&tensors), &KEYS, &LoadOptions::default()).unwrap();
    save(&loaded, &KEYS, None, &first, None).unwrap();

    let mut expected: Vec<_> = tensors
        .into_iter()
        .filter(|tensor| !tensor.key.starts_with("cls.") && !tensor.key.ends_with("attn.bias"))
        .map(|tensor| (tensor.key, tensor.shape, tensor.bytes))
        .collect();
    expected.sort();
    assert_eq!(entries(&first), expected);

    let file = crate::open(&first).unwrap();
    let again = load(Tiny::new(&Device::flex()), file.as_ref(), &KEYS, &LoadOptions::default()).unwrap();
    save(&again, &KEYS, None, &second, None).unwrap();
    assert_eq!(
        std::fs::read(&first).unwrap(),
        std::fs::read(&second).unwrap(),
        "the same module, the same bytes"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the numbers: through every kind of rule and back.
    #[test]
    fn any_weights_survive_a_round_trip(weights in prop::collection::vec(-1e30f32..1e30, 32)) {
        let folder = folder();
        let path = folder.path().join("m.safetensors");
        let mut tensors = tiny();
        for tensor in tensors.iter_mut().filter(|tensor| tensor.dtype == safetensors::Dtype::F32) {
            let length = tensor.bytes.len() / 4;
            tensor.bytes = weights.iter().cycle().take(length).flat_map(|x| x.to_le_bytes()).collect();
        }
        let original = load(Tiny::new(&Device::flex()), &checkpoint(&tensors), &KEYS, &LoadOptions::default()).unwrap();
        save(&original, &KEYS, None, &path, None).unwrap();
        let file = crate::open(&path).unwrap();
        let again = load(Tiny::new(&Device::flex()), file.as_ref(), &KEYS, &LoadOptions::default()).unwrap();
        let numbers = |tiny: &Tiny| {
            let block = &tiny.blocks[1];
            [&block.query.weight, &block.key.weight, &block.value.weight, &block.conv, &tiny.pos, &tiny.stacked]
                .map(|param| param.val().into_data())
        };
        prop_assert_eq!(numbers(&again), numbers(&original));
    }
}

#[test]
fn the_reference_implementation_reads_what_is_saved() {
    let folder = folder();
    let path = folder.path().join("m.safetensors");
    let linear = LinearConfig::new(3, 2).init(&Device::flex());
    let keys = KeyMap::new(&[Rule::Transpose("fc.weight", "weight"), Rule::Rename("fc.bias", "bias")]);
    let metadata =
        HashMap::from([("format".to_owned(), "pt".to_owned()), ("author".to_owned(), "\"鸟\"".to_owned())]);
    save(&linear, &keys, Some(FloatDType::F16), &path, Some(metadata.clone())).unwrap();

    let bytes = std::fs::read(&path).unwrap();
    let (header, read) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header % 8, 0);
    assert_eq!(read.metadata().as_ref(), Some(&metadata));
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let weight = file.tensor("fc.weight").unwrap();
    assert_eq!((weight.dtype(), weight.shape()), (safetensors::Dtype::F16, &[2, 3][..]));
    let expected: Vec<u8> = linear
        .weight
        .val()
        .transpose()
        .into_data()
        .iter::<f32>()
        .flat_map(|x| f16::from_f32(x).to_le_bytes())
        .collect();
    assert_eq!(weight.data(), expected);
}

#[test]
fn a_failed_save_leaves_the_old_file_and_nothing_else() {
    let folder = folder();
    let path = folder.path().join("m.safetensors");
    let names = || {
        std::fs::read_dir(folder.path()).unwrap().map(|file| file.unwrap().file_name()).collect::<Vec<_>>()
    };
    let linear = LinearConfig::new(3, 2).init(&Device::flex());
    std::fs::write(&path, "old").unwrap();

    let keys = KeyMap::new(&[Rule::Rename("w", "weight")]);
    let error = save(&linear, &keys, None, &path, None).unwrap_err();
    assert!(error.to_string().ends_with("no rule fills parameter `bias`"), "{error}");
    let keys = KeyMap::new(&[Rule::Concat(&["a", "b"], "weight"), Rule::Rename("b", "bias")]);
    let error = save(&linear, &keys, None, &path, None).unwrap_err();
    assert!(
        error.to_string().ends_with("`weight` has 3 rows, which cannot be cut into 2 equal parts"),
        "{error}"
    );
    let keys = KeyMap::new(&[Rule::Rename("a", "weight"), Rule::Rename("a", "bias")]);
    assert!(
        matches!(save(&linear, &keys, None, &path, None), Err(Error::Duplicate { key, .. }) if key == "a")
    );
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(names(), ["m.safetensors"]);

    // the folder is in the way of the last step, the renaming
    let taken = folder.path().join("taken");
    std::fs::create_dir_all(taken.join("by")).unwrap();
    assert!(matches!(save_tensors(&taken, &[]), Err(Error::Io { .. })));
    assert!(!names().iter().any(|name| name.to_string_lossy().contains("partial")));
}

#[test]
fn a_panic_in_the_middle_leaves_no_partial_file() {
    let folder = folder();
    let path = folder.path().join("m.safetensors");
    let bytes = Box::new(|| panic!("the device is gone"));
    let tensor = Pending { key: "a".into(), dtype: Dtype::F32, shape: vec![1], bytes };
    let result =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| write(&path, vec![tensor], HashMap::new())));
    assert!(result.is_err());
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn plain_tensors_of_any_dtype_come_back_as_they_were() {
    let folder = folder();
    let path = folder.path().join("io.safetensors");
    let tensors = [
        ("f32", TensorData::new(vec![1.5f32, f32::NEG_INFINITY], [2])),
        ("f64", TensorData::new(vec![0.1f64], [1, 1])),
        ("f16", TensorData::new(vec![f16::from_f32(-2.0); 3], [3])),
        ("bf16", TensorData::new(vec![bf16::from_f32(3.0)], [1])),
        ("i64", TensorData::new(vec![i64::MIN, 7], [2, 1])),
        ("i32", TensorData::new(vec![-7i32], [1])),
        ("u8", TensorData::new(vec![255u8; 5], [5])),
        ("bool", TensorData::new(vec![true, false, true], [3])),
        ("scalar", TensorData::new(vec![42i64], [0usize; 0])),
        ("empty", TensorData::new(Vec::<f32>::new(), [0, 4])),
        ("text_model_output.pooler_output", TensorData::new(vec![0f32], [1])),
    ]
    .map(|(name, data)| (name.to_owned(), data));
    save_tensors(&path, &tensors).unwrap();
    assert_eq!(read_tensors(&path).unwrap(), BTreeMap::from(tensors.clone()));

    let twice = [tensors[0].clone(), tensors[0].clone()];
    assert!(matches!(save_tensors(&path, &twice), Err(Error::Duplicate { key, .. }) if key == "f32"));
}
