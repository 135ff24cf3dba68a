use burn::module::{Module, Param, ParamId};
use burn::nn::{Linear, LinearConfig, LinearLayout};
use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::*;
use crate::rule::Rule;
use crate::testing::{KEYS, Tiny, checkpoint, count, floats, ints, tiny};

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
    assert_eq!(tiny.ids.val().into_data().iter::<i64>().collect::<Vec<_>>(), [0, 1, -2]);
    assert_eq!(tiny.mask.val().into_data().iter::<bool>().collect::<Vec<_>>(), [true, false]);
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
