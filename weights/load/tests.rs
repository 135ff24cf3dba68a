use std::borrow::Cow;
use std::fs;

use burn::module::{Module, Param, ParamId};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::*;
use crate::format::{Memory, SafetensorsFile};
use crate::rule::Rule;
use crate::save::save;
use crate::testing::{KEYS, Stored, Tiny, checkpoint, count, floats, ints, safetensors_bytes, tiny};

fn load_tiny(tensors: &[crate::testing::Stored]) -> Result<Tiny, Error> {
    load(Tiny::new(&Device::flex()), &checkpoint(tensors), &KEYS, &LoadOptions::default())
}

fn problems(result: Result<Tiny, Error>) -> Vec<Problem> {
    match result {
        Err(Error::Mismatch { problems, .. }) => problems,
        other => panic!("expected a mismatch, got {other:?}"),
    }
}

fn numbers<const D: usize>(param: &Param<Tensor<D>>) -> Vec<f32> {
    param.val().into_data().iter::<f32>().collect()
}

fn range(first: usize, end: usize) -> Vec<f32> {
    (first..end).map(|i| i as f32).collect()
}

#[test]
fn every_kind_of_rule_fills_its_parameters() {
    let tiny = load_tiny(&tiny()).unwrap();
    let block = &tiny.blocks[1];
    // q, k and v have 4, 2 and 2 rows of the fused 8
    let as_stored =
        |linear: &Linear| linear.weight.val().transpose().into_data().iter::<f32>().collect::<Vec<_>>();
    assert_eq!(as_stored(&block.query), range(1000, 1016));
    assert_eq!(as_stored(&block.key), range(1016, 1024));
    assert_eq!(as_stored(&block.value), range(1024, 1032));
    assert_eq!(numbers(block.value.bias.as_ref().unwrap()), [1506.0, 1507.0]);
    // [3, 4] -> [4, 3]
    assert_eq!(numbers(&block.conv)[..4], [1600.0, 1604.0, 1608.0, 1601.0]);
    assert_eq!(numbers(&tiny.pos), range(100, 112));
    assert_eq!(numbers(&tiny.stacked), range(200, 208));
    let swapped = [[400, 402, 404, 401, 403, 405], [406, 408, 410, 407, 409, 411]];
    assert_eq!(numbers(&tiny.experts), swapped.as_flattened().iter().map(|&n| n as f32).collect::<Vec<_>>());
    assert_eq!(numbers(&tiny.biases), range(500, 506));
    assert_eq!(tiny.ids.val().into_data().iter::<i64>().collect::<Vec<_>>(), [0, 1, -2]);
    assert_eq!(tiny.mask.val().into_data().iter::<bool>().collect::<Vec<_>>(), [true, false]);
}

/// The fused projection as GPT-2 stores it, 4 inputs and 4 + 2 + 2 outputs; saving undoes it.
#[test]
fn columns_of_a_fused_matrix_are_cut_and_transposed() {
    #[derive(Module, Debug)]
    struct Fused {
        parts: Vec<Param<Tensor<2>>>,
    }
    const KEYS: KeyMap = KeyMap::new(&[Rule::SplitTranspose("c_attn", &["parts.0", "parts.1", "parts.2"])]);
    let part = |rows: usize| Param::from_tensor(Tensor::zeros([rows, 4], &Device::flex()));
    let load = |stored: &[Stored]| {
        let fused = Fused { parts: vec![part(4), part(2), part(2)] };
        load(fused, &checkpoint(stored), &KEYS, &LoadOptions::default())
    };
    let fused = load(&[count("c_attn", &[4, 8], 0)]).unwrap();
    assert_eq!(numbers(&fused.parts[0])[..8], [0.0, 8.0, 16.0, 24.0, 1.0, 9.0, 17.0, 25.0]);
    assert_eq!(numbers(&fused.parts[1]), [4.0, 12.0, 20.0, 28.0, 5.0, 13.0, 21.0, 29.0]);
    assert_eq!(numbers(&fused.parts[2]), [6.0, 14.0, 22.0, 30.0, 7.0, 15.0, 23.0, 31.0]);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    crate::save(&fused, &KEYS, None, &path, None).unwrap();
    let saved = &crate::read_tensors(&path).unwrap()["c_attn"];
    assert_eq!(saved.shape().as_slice(), [4, 8]);
    assert_eq!(saved.iter::<f32>().collect::<Vec<_>>(), range(0, 32));

    let turned = load(&[count("c_attn", &[8, 4], 0)]).unwrap_err().to_string();
    assert!(turned.contains("the checkpoint has [8, 4], the model wants [4, 8]"), "{turned}");
    // the third value of the second row, which the second part has
    let broken = || floats("c_attn", &[4, 8], (0..32).map(|i| if i == 8 + 5 { f32::NAN } else { 0.0 }));
    let Err(Error::Mismatch { problems, .. }) = load(&[broken()]) else { panic!() };
    let [Problem::NotFinite { count: 1, first_index: 13, .. }] = problems[..] else { panic!("{problems:?}") };
    // beside another mistake
    let Err(Error::Mismatch { problems, .. }) = load(&[broken(), count("other", &[2], 0)]) else { panic!() };
    let [Problem::Unexpected { .. }, Problem::NotFinite { count: 1, first_index: 13, .. }] = problems[..]
    else {
        panic!("{problems:?}")
    };
}

#[test]
fn an_optional_prefix_is_stripped_where_it_stands() {
    let mut tensors = tiny();
    for tensor in tensors.iter_mut().filter(|tensor| !tensor.key.starts_with("cls.")) {
        tensor.key = format!("model.{}", tensor.key);
    }
    assert_eq!(numbers(&load_tiny(&tensors).unwrap().pos), range(100, 112));
    tensors.retain(|tensor| tensor.key != "model.head.bias");
    let [Problem::Missing { key, .. }] = &problems(load_tiny(&tensors))[..] else { panic!() };
    assert_eq!(key, "model.head.bias");
}

#[test]
fn all_mismatches_are_reported_at_once() {
    let mut tensors = tiny();
    tensors.retain(|tensor| tensor.key != "head.bias" && tensor.key != "h.0.qkv.weight");
    tensors.push(count("head.bais", &[2], 0));
    tensors.push(count("h.2.conv", &[3, 4], 0));
    for tensor in &mut tensors {
        match tensor.key.as_str() {
            "h.0.conv" => *tensor = count("h.0.conv", &[4, 3], 0),
            "h.1.qkv.bias" => *tensor = count("h.1.qkv.bias", &[9], 0),
            "upper" => *tensor = count("upper", &[4, 2], 0),
            "position_ids" => *tensor = count("position_ids", &[3], 0),
            "pos_embed" => {
                *tensor = floats("pos_embed", &[1, 3, 4], [f32::NAN, 1.0].into_iter().cycle().take(12))
            }
            _ => {}
        }
    }
    let found = problems(load_tiny(&tensors));
    let text: Vec<String> = found.iter().map(ToString::to_string).collect();
    let missing = |part: &str, nearest| {
        format!("missing `h.0.qkv.weight` for parameter `blocks.0.{part}.weight` (nearest: {nearest})")
    };
    let nearest = "h.1.qkv.weight";
    assert_eq!(
        text,
        [
            missing("query", nearest),
            missing("key", nearest),
            missing("value", nearest),
            "`h.0.conv`: the checkpoint has [4, 3], the model wants [3, 4]".to_owned(),
            "`h.1.qkv.bias`: the checkpoint has [9], the model wants [8]".to_owned(),
            "`upper + lower`: the checkpoint has [5, 2], the model wants [4, 2]".to_owned(),
            "`position_ids`: the checkpoint has F32, the model wants int".to_owned(),
            "missing `head.bias` for parameter `head.bias` (nearest: head.bais)".to_owned(),
            "unexpected `h.2.conv`: the model has no parameter `blocks.2.conv` (nearest: blocks.0.conv, blocks.1.conv)"
                .to_owned(),
            "unexpected `head.bais`: no rule knows it (nearest: head.bias)".to_owned(),
            "`pos_embed`: 6 NaN or infinite values as F32, the first at index 0".to_owned(),
        ],
    );
}

#[test]
fn a_check_finds_the_same_without_reading_a_tensor() {
    let mut tensors = tiny();
    tensors[0] = floats("pos_embed", &[1, 4, 4], [f32::NAN; 16]);
    let checkpoint = checkpoint(&tensors);
    let found = check(&Tiny::new(&Device::flex()), &checkpoint, &KEYS, &LoadOptions::default()).unwrap();
    let (key, expected, found_shape) = ("pos_embed".to_owned(), vec![1, 3, 4], vec![1, 4, 4]);
    assert_eq!(found, [Problem::Shape { key, expected, found: found_shape }]);
}

#[test]
fn values_that_are_no_numbers_are_counted_by_key_unless_they_are_allowed() {
    let mut tensors = tiny();
    let place = tensors.iter().position(|tensor| tensor.key == "h.1.qkv.weight").unwrap();
    // one in the part of the query, one in that of the value
    tensors[place] = floats(
        "h.1.qkv.weight",
        &[8, 4],
        (0..32).map(|i| if i == 5 || i == 30 { f32::INFINITY } else { 0.0 }),
    );
    let (key, dtype) = ("h.1.qkv.weight".to_owned(), Dtype::F32);
    assert_eq!(problems(load_tiny(&tensors)), [Problem::NotFinite { key, dtype, count: 2, first_index: 5 }]);

    let options = LoadOptions { not_finite: NotFinite::Allow, ..LoadOptions::default() };
    assert!(load(Tiny::new(&Device::flex()), &checkpoint(&tensors), &KEYS, &options).is_ok());
}

#[test]
fn a_weight_beyond_the_range_of_f16_is_refused_as_f16() {
    let keys = KeyMap::new(&[Rule::Rename("w", "weight")]);
    let checkpoint = checkpoint(&[floats("w", &[1, 2], [1.0, 70000.0])]);
    let linear = || LinearConfig::new(1, 2).with_bias(false).init(&Device::flex());
    let options = |dtype| LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
    let loaded = load(linear(), &checkpoint, &keys, &options(FloatDType::BF16)).unwrap();
    assert_eq!(loaded.weight.val().dtype(), DType::BF16);
    let error = load(linear(), &checkpoint, &keys, &options(FloatDType::F16)).unwrap_err();
    assert!(
        error.to_string().ends_with("`w`: 1 NaN or infinite values as F16, the first at index 1"),
        "{error}"
    );
}

#[test]
fn a_key_that_two_rules_match_is_an_error_even_when_one_ignores_it() {
    let file = crate::format::open(&crate::testing::fixture("vit_f16")).unwrap();
    let query = "vit.encoder.layer.0.attention.attention.query.weight";
    let keys = KeyMap::new(&[
        Rule::Rename("vit.encoder.layer.{}.attention.attention.query.weight", "blocks.{}.weight"),
        Rule::Ignore("vit.encoder.{*}"),
    ]);
    let linear = LinearConfig::new(32, 32).with_bias(false).init(&Device::flex());
    let problems = check(&linear, file.as_ref(), &keys, &LoadOptions::default()).unwrap();
    let rules = keys.rules.to_vec();
    assert!(problems.contains(&Problem::Ambiguous { key: query.to_owned(), rules }));
}

#[test]
fn the_dtype_is_kept_as_stored_when_asked() {
    let stored = checkpoint(&[crate::testing::Stored {
        key: "w".into(),
        dtype: safetensors::Dtype::F16,
        shape: vec![1, 2],
        bytes: vec![0x00, 0x3c, 0x00, 0xc0], // 1, -2
    }]);
    let keys = KeyMap::new(&[Rule::Rename("w", "weight")]);
    let linear = || LinearConfig::new(1, 2).with_bias(false).init(&Device::flex());
    let narrow =
        load(linear(), &stored, &keys, &LoadOptions { dtype: None, ..LoadOptions::default() }).unwrap();
    assert_eq!(narrow.weight.val().dtype(), DType::F16);
    let wide = load(linear(), &stored, &keys, &LoadOptions::default()).unwrap();
    assert_eq!((wide.weight.val().dtype(), numbers(&wide.weight)), (DType::F32, vec![1.0, -2.0]));
}

#[test]
fn a_parameter_may_be_missing_only_where_that_is_said() {
    let mut tensors = tiny();
    tensors.retain(|tensor| !tensor.key.starts_with("head."));
    assert_eq!(problems(load_tiny(&tensors)).len(), 2);

    let options = LoadOptions { allow_missing: &["head.{*}"], ..LoadOptions::default() };
    let loaded = load(Tiny::new(&Device::flex()), &checkpoint(&tensors), &KEYS, &options).unwrap();
    assert!(!loaded.head.unwrap().weight.is_initialized(), "it keeps its lazy initial value");
}

#[test]
fn two_names_of_a_key_may_lead_to_one_parameter_but_not_both_at_once() {
    let keys = KeyMap::new(&[Rule::Rename("ln.weight", "weight"), Rule::Rename("ln.gamma", "weight")]);
    let linear = || LinearConfig::new(1, 2).with_bias(false).init(&Device::flex());
    let load = |tensors: &[_]| load(linear(), &checkpoint(tensors), &keys, &LoadOptions::default());
    let (new, old) = (count("ln.weight", &[1, 2], 1), count("ln.gamma", &[1, 2], 3));
    assert_eq!(numbers(&load(std::slice::from_ref(&new)).unwrap().weight), [1.0, 2.0]);
    assert_eq!(numbers(&load(std::slice::from_ref(&old)).unwrap().weight), [3.0, 4.0]);
    let error = load(&[new, old]).unwrap_err().to_string();
    assert!(error.ends_with("parameter `weight` would be filled by each of ln.weight, ln.gamma"), "{error}");
    let error = load(&[ints("other", &[1])]).unwrap_err().to_string();
    assert!(error.contains("missing `ln.weight` for parameter `weight`"), "{error}");
}

#[test]
fn a_parameter_without_a_rule_and_an_integer_for_a_float_are_named() {
    let keys = KeyMap::new(&[Rule::Rename("bias", "bias")]);
    let linear = LinearConfig::new(1, 2).init(&Device::flex());
    let error =
        load(linear, &checkpoint(&[ints("bias", &[1, 2])]), &keys, &LoadOptions::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "test.safetensors: 2 mismatches between checkpoint and model\
         \n  no rule fills parameter `weight`\
         \n  `bias`: the checkpoint has I64, the model wants float"
    );
}

#[test]
fn listing_parameters_creates_none() {
    let huge = LinearConfig::new(1 << 20, 1 << 20).with_layout(LinearLayout::Col).init(&Device::flex()); // 4 TiB
    let found: Vec<_> = parameters(&huge).into_iter().map(|found| (found.path, found.shape)).collect();
    assert_eq!(found, [("weight".to_owned(), vec![1 << 20, 1 << 20]), ("bias".to_owned(), vec![1 << 20])]);
    assert!(!huge.weight.is_initialized());
}

#[test]
fn a_column_layout_is_loaded_alike_whether_it_was_initialized_or_not() {
    let keys = KeyMap::new(&[Rule::Rename("w", "weight")]);
    let checkpoint = checkpoint(&[count("w", &[2, 3], 0)]); // [d_out, d_in]
    let linear =
        || LinearConfig::new(3, 2).with_bias(false).with_layout(LinearLayout::Col).init(&Device::flex());
    let touched = linear();
    assert_eq!(touched.weight.val().dims(), [3, 2], "Burn holds [d_in, d_out]");
    for linear in [linear(), touched] {
        assert_eq!(parameters(&linear)[0].shape, [2, 3]);
        let loaded = load(linear, &checkpoint, &keys, &LoadOptions::default()).unwrap();
        assert_eq!(numbers(&loaded.weight), [0.0, 3.0, 1.0, 4.0, 2.0, 5.0]);
    }
}

#[test]
fn a_loaded_module_keeps_its_ids_and_can_be_trained() {
    let device = Device::flex().autodiff();
    let keys = KeyMap::new(&[Rule::Rename("w", "weight"), Rule::Rename("b", "bias")]);
    let tensors = [count("w", &[3, 2], 0), count("b", &[2], 0)];
    let linear = LinearConfig::new(3, 2).init(&device);
    let linear = Linear { bias: linear.bias.map(|bias| bias.set_require_grad(false)), ..linear };
    let ids: Vec<ParamId> = burn::module::list_param_ids(&linear);
    let loaded = load(linear, &checkpoint(&tensors), &keys, &LoadOptions::default()).unwrap();

    assert_eq!(burn::module::list_param_ids(&loaded), ids);
    let loss = loaded.forward(Tensor::<2>::ones([1, 3], &device)).sum();
    let gradients = loss.backward();
    let gradient = loaded.weight.val().grad(&gradients).expect("the weight is trained");
    assert_eq!(gradient.into_data().iter::<f32>().collect::<Vec<_>>(), [1.0; 6]);
    assert!(!loaded.bias.unwrap().val().is_require_grad(), "a frozen parameter stays frozen");

    // loaded for inference, trained later
    let plain = load(
        LinearConfig::new(3, 2).init(&Device::flex()),
        &checkpoint(&tensors),
        &keys,
        &LoadOptions::default(),
    );
    assert!(plain.unwrap().train().weight.val().is_require_grad());
}

/// A file whose values start `padding` bytes later than they have to.
fn padded(tensors: &[Stored], padding: usize) -> Vec<u8> {
    let file = safetensors_bytes(tensors);
    let (length, rest) = file.split_first_chunk().unwrap();
    let length = u64::from_le_bytes(*length);
    let (header, values) = rest.split_at(length as usize);
    let padding = vec![b' '; padding];
    [&(length + padding.len() as u64).to_le_bytes(), header, &padding, values].concat()
}

/// A folder with one file in it.
fn folder(file: &[u8]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("model.safetensors"), file).unwrap();
    folder
}

fn open(folder: &tempfile::TempDir) -> SafetensorsFile {
    SafetensorsFile::open(folder.path().join("model.safetensors")).unwrap()
}

const WEIGHT: KeyMap = KeyMap::new(&[Rule::Rename("w", "weight")]);

fn load_weight(checkpoint: &dyn Checkpoint, dtype: Option<FloatDType>) -> Param<Tensor<2>> {
    let [d_out, d_in] = checkpoint.entries()[0].shape[..] else { panic!("a matrix") };
    let linear = LinearConfig::new(d_out, d_in).with_bias(false).init(&Device::flex());
    let options = LoadOptions { dtype, ..LoadOptions::default() };
    load(linear, checkpoint, &WEIGHT, &options).unwrap().weight
}

/// Where the values of a tensor are, which nothing else holds.
fn address(param: Param<Tensor<2>>) -> usize {
    param.into_value().into_data().bytes().as_ptr().addr()
}

#[test]
fn a_file_loads_as_memory_does_wherever_its_values_start() {
    let copied = load_tiny(&tiny()).unwrap();
    let written = tempfile::tempdir().unwrap();
    let bytes = |module: &Tiny| {
        let path = written.path().join("written.safetensors");
        save(module, &KEYS, None, &path, None).unwrap();
        fs::read(path).unwrap()
    };
    for padding in 0..9 {
        let folder = folder(&padded(&tiny(), padding));
        let loaded =
            load(Tiny::new(&Device::flex()), &open(&folder), &KEYS, &LoadOptions::default()).unwrap();
        assert!(bytes(&loaded) == bytes(&copied), "{padding} bytes of padding");
    }
}

#[cfg(unix)]
#[test]
fn a_parameter_is_a_view_of_the_file_when_nothing_has_to_change() {
    let half =
        Stored { key: "w".into(), dtype: safetensors::Dtype::F16, shape: vec![1, 2], bytes: vec![0; 4] };
    let single = count("w", &[1, 2], 1);
    let (f16, f32) = (Some(FloatDType::F16), Some(FloatDType::F32));
    for (tensor, dtype, padding, is_view) in [
        (&half, f16, 0, true),
        (&half, None, 0, true),
        (&half, None, 2, true), // aligned enough for 2 bytes
        (&half, None, 1, false),
        (&half, f32, 0, false),
        (&single, f32, 0, true),
        (&single, None, 4, true),
        (&single, f32, 2, false),
        (&single, f16, 0, false),
    ] {
        let file = open(&folder(&padded(std::slice::from_ref(tensor), padding)));
        let place = file.bytes("w").unwrap().as_ptr().addr();
        let found = address(load_weight(&file, dtype)) == place;
        assert_eq!(found, is_view, "{:?} as {dtype:?} after {padding} bytes", tensor.dtype);
    }
}

#[cfg(unix)]
#[test]
fn a_part_of_a_fused_tensor_is_a_view_and_what_is_rearranged_is_not() {
    let file = open(&folder(&padded(&tiny(), 0)));
    let place = |key: &str| file.bytes(key).unwrap().as_ptr().addr();
    let tiny = load(Tiny::new(&Device::flex()), &file, &KEYS, &LoadOptions::default()).unwrap();
    let [block, _] = <[_; 2]>::try_from(tiny.blocks).unwrap();
    // Burn holds [d_in, d_out], which is swapped without a copy; 4 rows of 4 values are the query's
    let as_stored = |linear: Linear| linear.weight.transform_for_save();
    assert_eq!(address(as_stored(block.key)), place("h.0.qkv.weight") + 4 * 4 * 4);
    assert_eq!(address(tiny.pos), place("pos_embed"), "dimensions of 1 are no rearrangement");
    assert_ne!(address(block.conv), place("h.0.conv"), "transposed");
    assert_ne!(address(tiny.stacked), place("upper"), "stacked");
}

#[test]
fn a_change_of_a_loaded_tensor_stays_out_of_the_file() {
    let bytes = padded(&[count("w", &[2, 3], 1)], 0);
    let folder = folder(&bytes);
    let file = open(&folder);
    let loaded = load_weight(&file, None);
    // whoever holds a tensor alone may change it in place
    let changed = loaded.into_value().mul_scalar(-1.0).add_scalar(1.0);
    assert_eq!(changed.into_data().iter::<f32>().collect::<Vec<_>>(), [0.0, -1.0, -2.0, -3.0, -4.0, -5.0]);
    let mut data = load_weight(&file, None).into_value().into_data();
    data.as_mut_slice::<f32>().unwrap().fill(7.0);

    assert_eq!(numbers(&load_weight(&file, None)), range(1, 7));
    assert_eq!(fs::read(folder.path().join("model.safetensors")).unwrap(), bytes);
}

#[cfg(unix)]
#[test]
fn a_loaded_model_outlives_its_file() {
    let folder = folder(&padded(&[count("w", &[2, 3], 1)], 0));
    let loaded = load_weight(&open(&folder), None);
    drop(folder);
    assert_eq!(numbers(&loaded), range(1, 7));
}

#[test]
fn a_loaded_model_is_saved_over_its_own_file() {
    let folder = folder(&padded(&[count("w", &[2, 3], 1)], 3));
    let path = folder.path().join("model.safetensors");
    let linear = |weight| Linear { weight, bias: None };
    let loaded = linear(load_weight(&open(&folder), None));
    save(&loaded, &WEIGHT, None, &path, None).unwrap();
    let aligned = linear(load_weight(&open(&folder), None)); // a view now
    save(&aligned.clone().map(&mut Negated), &WEIGHT, None, &path, None).unwrap();
    assert_eq!(numbers(&aligned.weight), range(1, 7));
    let negated: Vec<f32> = range(1, 7).into_iter().map(|x| -x).collect();
    assert_eq!(numbers(&load_weight(&open(&folder), None)), negated);
}

struct Negated;

impl ModuleMapper for Negated {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| -tensor)
    }
}

#[test]
fn a_view_is_searched_for_values_that_are_no_numbers_unless_they_are_allowed() {
    use half::{bf16, f16};
    type Bytes = fn(f32) -> Vec<u8>;
    let types: [(safetensors::Dtype, Dtype, Bytes); 4] = [
        (safetensors::Dtype::F64, Dtype::F64, |x| f64::from(x).to_le_bytes().to_vec()),
        (safetensors::Dtype::F32, Dtype::F32, |x| x.to_le_bytes().to_vec()),
        (safetensors::Dtype::F16, Dtype::F16, |x| f16::from_f32(x).to_le_bytes().to_vec()),
        (safetensors::Dtype::BF16, Dtype::BF16, |x| bf16::from_f32(x).to_le_bytes().to_vec()),
    ];
    // more than one piece of what is searched at a time
    let mut values = vec![0.5f32; 1 << 16];
    (values[40_000], values[50_000]) = (f32::NEG_INFINITY, f32::NAN);
    for (stored, dtype, bytes) in types {
        let bytes = values.iter().flat_map(|&x| bytes(x)).collect();
        let tensor = Stored { key: "w".into(), dtype: stored, shape: vec![1 << 8, 1 << 8], bytes };
        let file = open(&folder(&padded(&[tensor], 0)));
        let linear = || LinearConfig::new(1 << 8, 1 << 8).with_bias(false).init(&Device::flex());
        let options = |not_finite| LoadOptions { dtype: None, not_finite, ..LoadOptions::default() };
        let refused = load(linear(), &file, &WEIGHT, &options(NotFinite::Refuse)).unwrap_err();
        let Error::Mismatch { problems, .. } = refused else { panic!("{refused:?}") };
        let key = "w".to_owned();
        assert_eq!(problems, [Problem::NotFinite { key, dtype, count: 2, first_index: 40_000 }]);
        let allowed = load(linear(), &file, &WEIGHT, &options(NotFinite::Allow)).unwrap();
        assert_eq!(numbers(&allowed.weight)[40_000], f32::NEG_INFINITY);
    }
}

#[test]
fn a_tensor_without_values_is_loaded() {
    let file = open(&folder(&padded(&[floats("w", &[0, 2], [])], 0)));
    assert_eq!(load_weight(&file, None).val().dims(), [0, 2]);
}

#[test]
fn weights_inside_the_program_are_views_as_well() {
    let bytes: &'static [u8] = padded(&[count("w", &[2, 3], 1)], 0).leak();
    let memory = Memory::new("m", Cow::Borrowed(bytes)).unwrap();
    let place = memory.bytes("w").unwrap().as_ptr().addr();
    let loaded = load_weight(&memory, None);
    assert_eq!(numbers(&loaded), range(1, 7));
    assert_eq!(address(loaded) == place, place.is_multiple_of(4));
}

mod packed {
    use volary_kernels::layers::{Embedding, Linear, LinearConfig};
    use volary_kernels::ops::Bits;

    use super::*;
    use crate::format::Checkpoint;
    use crate::quantized::{QuantizeOptions, quantize};
    use crate::save::save;
    use crate::testing::Stored;

    const BLOCKS_OF_8: Quantization = Quantization { bits: Bits::Eight, block: 8 };
    const KEYS: KeyMap = KeyMap::new(&[
        Rule::Rename("table", "table.weight"),
        Rule::Rename("up", "up.weight"),
        Rule::Split("qk", &["query.weight", "key.weight"]),
        Rule::Concat(&["left", "right"], "both.weight"),
        Rule::Transpose("turned", "turned.weight"),
        Rule::Rename("free", "free"),
        Rule::Rename("bias", "up.bias"),
    ]);

    #[derive(Module, Debug)]
    struct Layers {
        table: Embedding,
        up: Linear,
        query: Linear,
        key: Linear,
        both: Linear,
        turned: Linear,
        /// Of no layer.
        free: Param<Tensor<2>>,
    }

    fn layers() -> Layers {
        let device = &Device::flex();
        let linear = |rows, cols| LinearConfig::new(cols, rows).with_bias(false).init(device);
        Layers {
            table: Embedding::new(5, 16, 1.0, device),
            up: LinearConfig::new(16, 3).init(device),
            query: linear(4, 16),
            key: linear(2, 16),
            both: linear(4, 16),
            turned: linear(16, 8),
            free: Embedding::new(2, 16, 1.0, device).weight,
        }
    }

    fn tensors() -> Vec<Stored> {
        let noise = |key: &str, shape: &[usize]| {
            let count: usize = shape.iter().product();
            floats(key, shape, (0..count).map(|i| ((i * 7919 + key.len()) % 1000) as f32 / 500.0 - 1.0))
        };
        vec![
            noise("table", &[5, 16]),
            noise("up", &[3, 16]),
            noise("qk", &[6, 16]),
            noise("left", &[2, 16]),
            noise("right", &[2, 16]),
            noise("turned", &[8, 16]),
            noise("free", &[2, 16]),
            noise("bias", &[3]),
        ]
    }

    fn loaded(checkpoint: &dyn Checkpoint, packing: Packing) -> Layers {
        let options = LoadOptions { packing, ..LoadOptions::default() };
        load(layers(), checkpoint, &KEYS, &options).unwrap()
    }

    /// The packing of each matrix that is packed.
    fn packings(layers: &Layers) -> Vec<(&'static str, Quantization)> {
        let all = [
            ("table", &layers.table.weight),
            ("up", &layers.up.weight),
            ("query", &layers.query.weight),
            ("key", &layers.key.weight),
            ("both", &layers.both.weight),
            ("turned", &layers.turned.weight),
            ("free", &layers.free),
        ];
        let packed = |(name, param)| Some((name, Packed::of(param)?.quantization()));
        all.into_iter().filter_map(packed).collect()
    }

    fn values(layers: &Layers) -> Vec<Vec<f32>> {
        let Layers { table, up, query, key, both, turned, free } = layers;
        let of_layers = [&up.weight, &query.weight, &key.weight, &both.weight, &turned.weight];
        [&table.weight, free].into_iter().chain(of_layers).map(numbers).collect()
    }

    fn quantized(quantization: Quantization) -> (tempfile::TempDir, Box<dyn Checkpoint>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let options = QuantizeOptions { quantization, keep: vec!["free".into()], dtype: None };
        quantize(&checkpoint(&tensors()), &path, &options, &|_| {}).unwrap();
        let checkpoint = crate::open(folder.path()).unwrap();
        (folder, checkpoint)
    }

    #[test]
    fn matrices_of_layers_are_packed_while_they_are_read() {
        let floats = loaded(&checkpoint(&tensors()), Packing::AsStored);
        assert_eq!(packings(&floats), []);
        for bits in Bits::ALL {
            let quantization = Quantization { bits, block: 16 };
            let packed = loaded(&checkpoint(&tensors()), Packing::Into(quantization));
            // eight columns are no whole block
            let expected = ["table", "up", "query", "key", "both"].map(|name| (name, quantization));
            assert_eq!(packings(&packed), expected);
            assert_eq!(numbers(&packed.turned.weight), numbers(&floats.turned.weight));
            let matrix = PackedMatrix::pack(quantization, [4, 16], &numbers(&floats.query.weight));
            assert_eq!(Packed::of(&packed.query.weight), Some(&matrix));
            assert_eq!(parameters(&packed), parameters(&floats));
            assert_eq!(packed.num_params(), floats.num_params());
        }
        let turned = loaded(&checkpoint(&tensors()), Packing::Into(BLOCKS_OF_8)).turned;
        let matrix = PackedMatrix::pack(BLOCKS_OF_8, [16, 8], &numbers(&floats.turned.weight));
        assert_eq!(Packed::of(&turned.weight), Some(&matrix));
    }

    #[test]
    fn what_is_stored_packed_stays_so_unless_floats_are_wanted() {
        for bits in Bits::ALL {
            let quantization = Quantization { bits, block: 8 };
            let (_folder, checkpoint) = quantized(quantization);
            let packed = loaded(checkpoint.as_ref(), Packing::AsStored);
            let expected = ["table", "up", "query", "key", "both"].map(|name| (name, quantization));
            assert_eq!(packings(&packed), expected, "a turned matrix is unpacked");
            let floats = loaded(checkpoint.as_ref(), Packing::Floats);
            assert_eq!(packings(&floats), []);
            assert_eq!(values(&floats), values(&packed));
            let again = loaded(checkpoint.as_ref(), Packing::Into(quantization));
            assert_eq!(packings(&again).len(), 6);
            assert_eq!(Packed::of(&again.up.weight), Packed::of(&packed.up.weight));
        }
        let (_folder, checkpoint) = quantized(BLOCKS_OF_8);
        let four = Quantization { bits: Bits::Four, block: 8 };
        assert!(
            packings(&loaded(checkpoint.as_ref(), Packing::Into(four)))
                .iter()
                .all(|(_, found)| *found == four)
        );
    }

    #[test]
    fn what_cannot_be_packed_is_listed() {
        let mut tensors = tensors();
        let replace = |tensor: &mut Stored, value: f32| {
            let shape = tensor.shape.clone();
            let count = shape.iter().product::<usize>();
            *tensor =
                floats(&tensor.key.clone(), &shape, (0..count).map(|i| if i == 20 { value } else { 1.0 }));
        };
        replace(&mut tensors[0], f32::NAN);
        replace(&mut tensors[1], 1e30);
        let options = LoadOptions { packing: Packing::Into(BLOCKS_OF_8), ..LoadOptions::default() };
        let Err(Error::Mismatch { problems, .. }) = load(layers(), &checkpoint(&tensors), &KEYS, &options)
        else {
            panic!()
        };
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            problems,
            [
                "`table`: 1 NaN or infinite values as F32, the first at index 20",
                "`up`: 1 numbers too large for F16, the first at index 16",
            ]
        );
    }

    #[test]
    fn a_packed_module_is_neither_filled_again_nor_saved_as_zeros() {
        let packed = loaded(&checkpoint(&tensors()), Packing::Into(BLOCKS_OF_8));
        let again = load(packed.clone(), &checkpoint(&tensors()), &KEYS, &LoadOptions::default());
        let Err(Error::Packed { parameter }) = again else { panic!("{again:?}") };
        assert_eq!(parameter, "table.weight");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let saved = save(&packed, &KEYS, None, &path, None);
        let Err(Error::Unsaveable { key, .. }) = saved else { panic!("{saved:?}") };
        assert_eq!(key, "table.weight");
        save(&packed.clone().materialize(), &KEYS, None, &path, None).unwrap();
        let back = loaded(crate::open(folder.path()).unwrap().as_ref(), Packing::AsStored);
        assert_eq!(values(&back), values(&packed));
    }

    /// The product of a layer in another layout than checkpoints' is not that of its packed rows.
    #[test]
    fn layers_of_other_layouts_stay_floats() {
        let keys = KeyMap::new(&[Rule::Rename("up", "weight"), Rule::Rename("bias", "bias")]);
        let column = burn::nn::LinearConfig::new(16, 3).with_layout(LinearLayout::Col).init(&Device::flex());
        let options = LoadOptions { packing: Packing::Into(BLOCKS_OF_8), ..LoadOptions::default() };
        let kept: Vec<Stored> =
            tensors().into_iter().filter(|tensor| ["up", "bias"].contains(&tensor.key.as_str())).collect();
        let loaded = load(column, &checkpoint(&kept), &keys, &options).unwrap();
        assert!(Packed::of(&loaded.weight).is_none());
        assert_eq!(loaded.weight.val().dims(), [16, 3]);
    }
}

#[test]
fn each_matrix_of_several_is_swapped() {
    #[derive(Module, Debug)]
    struct Matrices {
        all: Param<Tensor<3>>,
    }
    const KEYS: KeyMap = KeyMap::new(&[Rule::Transpose("all", "all")]);
    let module = Matrices { all: burn::module::Initializer::Zeros.init([2, 2, 3], &Device::flex()) };
    let stored = checkpoint(&[count("all", &[2, 3, 2], 0)]);
    let module = load(module, &stored, &KEYS, &LoadOptions::default()).unwrap();
    assert_eq!(numbers(&module.all), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0, 6.0, 8.0, 10.0, 7.0, 9.0, 11.0]);
}
