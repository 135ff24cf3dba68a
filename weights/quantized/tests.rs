use proptest::prelude::*;

use super::*;
use crate::error::Error;
use crate::format::{Memory, SafetensorsFile};
use crate::open;
use crate::testing::{Stored, checkpoint, count, floats, ints, safetensors_bytes};

const SILENT: &dyn Fn(u64) = &|_| {};
const EIGHT: Quantization = Quantization { bits: Bits::Eight, block: 32 };
const FOUR: Quantization = Quantization { bits: Bits::Four, block: 32 };

fn options(quantization: Quantization) -> QuantizeOptions {
    QuantizeOptions { quantization, keep: Vec::new(), dtype: None }
}

/// The file that a checkpoint is quantized into, and what was lost.
fn quantized(tensors: &[Stored], options: &QuantizeOptions) -> Result<(tempfile::TempDir, Vec<Loss>), Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    match quantize(&checkpoint(tensors), &path, options, SILENT) {
        Ok(losses) => Ok((folder, losses)),
        Err(error) => {
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "a file was left: {error}");
            Err(error)
        }
    }
}

fn raw(folder: &tempfile::TempDir) -> SafetensorsFile {
    SafetensorsFile::open(folder.path().join("model.safetensors")).unwrap()
}

fn numbers(checkpoint: &dyn Checkpoint, key: &str) -> Vec<f32> {
    let entry = checkpoint.entries().iter().find(|entry| entry.name == key).unwrap();
    values(entry.dtype, &checkpoint.bytes(key).unwrap())
}

/// What the module's documentation says, by hand.
#[test]
fn eight_bits_are_laid_out_as_documented() {
    // blocks of 2: [127, -63.5], [0, 0] and the short [2]
    let matrix = floats("w", &[1, 5], [127.0, -63.5, 0.0, 0.0, 2.0]);
    let scheme = Quantization { bits: Bits::Eight, block: 2 };
    let (folder, _) = quantized(&[matrix], &options(scheme)).unwrap();
    let file = raw(&folder);
    assert_eq!(
        file.metadata()["volary.quantization"],
        r#"{"bits":8,"block":2,"symmetric":true,"version":1}"#
    );
    let entry = |name: &str, shape: &[usize], dtype| Entry { name: name.into(), shape: shape.into(), dtype };
    assert_eq!(file.entries(), [entry("w.scales", &[1, 3], Dtype::F16), entry("w.q8", &[1, 5], Dtype::I8)]);
    // -63.5 lies between two numbers: the even one
    assert_eq!(*file.bytes("w.q8").unwrap(), [127, -64_i8 as u8, 0, 0, 127]);
    let scales = numbers(&file, "w.scales");
    assert_eq!(scales[..2], [1.0, 0.0]);
    assert!((scales[2] - 2.0 / 127.0).abs() < 2e-5 && scales[2] >= 2.0 / 127.0, "{scales:?}");
    let read = open(folder.path()).unwrap();
    assert_eq!(read.entries(), [entry("w", &[1, 5], Dtype::F32)]);
    assert_eq!(numbers(read.as_ref(), "w")[..4], [127.0, -64.0, 0.0, 0.0]);
    assert_eq!(read.quantization(), Some(scheme));
    assert_eq!(scheme.to_string(), "int8 in blocks of 2");
}

#[test]
fn four_bits_are_laid_out_as_documented() {
    // blocks of 4: from -2 in steps of 1, and the short one from 0.5 in steps of 0.25
    let matrix = floats("w", &[1, 6], [-2.0, 13.0, 0.0, -1.0, 4.25, 0.5]);
    let (folder, _) = quantized(&[matrix], &options(Quantization { bits: Bits::Four, block: 4 })).unwrap();
    let file = raw(&folder);
    assert_eq!(*file.bytes("w.q4").unwrap(), [0xf0, 0x12, 0x0f]);
    assert_eq!(numbers(&file, "w.scales"), [1.0, 0.25]);
    assert_eq!(numbers(&file, "w.mins"), [-2.0, 0.5]);
    assert!(file.entries().iter().all(|entry| ["w.q4", "w.scales", "w.mins"].contains(&entry.name.as_str())));
    let read = open(folder.path()).unwrap();
    assert_eq!(numbers(read.as_ref(), "w"), [-2.0, 13.0, 0.0, -1.0, 4.25, 0.5]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Every value comes back within half of the scale of its block, however large or small it is.
    #[test]
    fn each_value_comes_back_within_half_a_step(
        rows in 1_usize..4,
        half in 4_usize..40,
        block in prop::sample::select(vec![2_usize, 8, 32]),
        bits in prop::sample::select(vec![Bits::Eight, Bits::Four]),
        magnitude in -20_i32..9,
        offset in prop::sample::select(vec![0.0_f32, 1.0, -1.0, 100.0]),
        seed: u32,
    ) {
        let cols = (2 * half).max(block);
        let size = 2.0_f32.powi(magnitude);
        let noise = |i: usize| (seed.wrapping_add(i as u32).wrapping_mul(2_654_435_761) >> 8) as f32 / 1.6e7 - 0.5;
        let matrix: Vec<f32> = (0..rows * cols).map(|i| size * (noise(i) + offset)).collect();
        let scheme = Quantization { bits, block };
        let (folder, losses) = quantized(&[floats("w", &[rows, cols], matrix.clone())], &options(scheme)).unwrap();
        let scales = numbers(&raw(&folder), "w.scales");
        let found = numbers(open(folder.path()).unwrap().as_ref(), "w");
        prop_assert_eq!(found.len(), matrix.len());
        let blocks = cols.div_ceil(block);
        for (i, (&x, &q)) in matrix.iter().zip(&found).enumerate() {
            let scale = scales[i / cols * blocks + i % cols / block];
            // f32 itself rounds
            let bound = scale / 2.0 * 1.000_01 + x.abs() * 2e-7;
            prop_assert!((x - q).abs() <= bound, "{x} came back as {q}, scale {scale}");
        }
        // what is reported is what happened
        let error = |i: usize| f64::from((matrix[i] - found[i]).abs());
        let worst = (0..matrix.len()).map(error).fold(0.0, f64::max);
        let largest = matrix.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        prop_assert!((losses[0].max - worst / f64::from(largest)).abs() < 1e-9);
    }

    /// Text that is no description is an error and no panic.
    #[test]
    fn any_description_is_read_or_refused(text in "\\PC{0,40}|\\{\"version\":1,\"bits\":[0-9]{1,3},\"block\":[0-9]{1,25},\"symmetric\":(true|false)\\}") {
        let _ = Description::read(&text);
    }
}

/// The numbers of the module's documentation: 4 bits from a minimum lose less than 4 bits about zero.
#[test]
fn errors_on_normal_values_are_as_documented() {
    let mut state = 1_u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (f64::from(state) + 0.5) / f64::from(u32::MAX)
    };
    let matrix: Vec<f32> = (0..256 * 256)
        .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
        .collect();
    let mean = |scheme| {
        let tensors = [floats("w", &[256, 256], matrix.clone())];
        quantized(&tensors, &options(scheme)).unwrap().1[0].mean
    };
    let about_zero = |values: &[f32]| {
        let scale = values.iter().fold(0.0_f32, |largest, x| largest.max(x.abs())) / 7.0;
        values.iter().map(|x| f64::from((x - (x / scale).round() * scale).abs())).sum::<f64>()
    };
    let sum: f64 = matrix.iter().map(|x| f64::from(x.abs())).sum();
    let symmetric = matrix.chunks(32).map(about_zero).sum::<f64>() / sum;
    let [eight, four] = [EIGHT, FOUR].map(mean);
    let near = |x: f64, percent: f64| (100.0 * x - percent).abs() < 0.05 * percent;
    assert!(near(eight, 0.56) && near(four, 8.1) && near(symmetric, 10.2), "{eight} {four} {symmetric}");
}

#[test]
fn biases_small_matrices_and_integers_stay() {
    let tensors = [
        count("bias", &[64], 0),
        count("conv", &[2, 2, 32], 0),
        count("narrow", &[4, 31], 0),
        count("odd", &[2, 33], 0),
        count("none", &[0, 64], 0),
        count("w", &[2, 32], 0),
        ints("ids", &[1, 2]),
    ];
    let keys = |scheme| {
        let (folder, losses) = quantized(&tensors, &options(scheme)).unwrap();
        let read = open(folder.path()).unwrap();
        for Stored { key, shape, .. } in &tensors {
            let entry = read.entries().iter().find(|entry| entry.name == *key).unwrap();
            assert_eq!(entry.shape, *shape, "{key}");
            if !losses.iter().any(|loss| loss.key == *key) {
                assert_eq!(read.bytes(key).unwrap(), checkpoint(&tensors).bytes(key).unwrap(), "{key}");
            }
        }
        assert_eq!(read.entries().len(), tensors.len());
        losses.into_iter().map(|loss| loss.key).collect::<Vec<_>>()
    };
    assert_eq!(keys(EIGHT), ["odd", "w"]);
    assert_eq!(keys(FOUR), ["w"]);
}

#[test]
fn what_is_to_be_kept_is_kept_in_the_dtype_that_is_asked_for() {
    let tensors = [count("text.embed.weight", &[2, 32], 0), count("w", &[2, 32], 0)];
    let mut options = options(EIGHT);
    options.keep = vec!["*embed*".into()];
    options.dtype = Some(FloatDType::F16);
    let (folder, losses) = quantized(&tensors, &options).unwrap();
    assert_eq!(losses.iter().map(|loss| loss.key.as_str()).collect::<Vec<_>>(), ["w"]);
    let read = open(folder.path()).unwrap();
    assert_eq!(numbers(read.as_ref(), "text.embed.weight"), (0..64).map(|i| i as f32).collect::<Vec<_>>());
    assert_eq!(raw(&folder).entries()[0].dtype, Dtype::F16);

    options.keep = vec!["*embd*".into()];
    let error = quantized(&tensors, &options).unwrap_err();
    assert!(matches!(&error, Error::NoTensor { key, .. } if key == "*embd*"), "{error}");
}

#[test]
fn patterns_match_names() {
    for (pattern, name) in [
        ("a", "a"),
        ("*", ""),
        ("*", "a.b"),
        ("a*", "a"),
        ("a*c", "abc"),
        ("*b*b", "abab"),
        ("*.0.*.w", "h.0.x.w"),
    ] {
        assert!(fits(pattern, name), "{pattern} {name}");
    }
    for (pattern, name) in [("a", "ab"), ("a*a", "a"), ("*b", "ba"), ("a*b*c", "acb"), ("", "a")] {
        assert!(!fits(pattern, name), "{pattern} {name}");
    }
}

#[test]
fn values_that_cannot_be_quantized_are_listed() {
    let line = |values: [f32; 2]| values.into_iter().chain([0.5; 30]);
    let tensors = [
        floats("fine", &[1, 32], line([1.0, 2.0])),
        floats("large", &[1, 32], line([1.0, 1e30])),
        floats("nan", &[1, 32], line([1.0, f32::NAN])),
        floats("bias", &[1], [f32::INFINITY]),
    ];
    let error = quantized(&tensors, &options(EIGHT)).unwrap_err();
    let Error::Values { problems, .. } = &error else { panic!("{error}") };
    let mut told: Vec<String> = problems.iter().map(ToString::to_string).collect();
    told.sort();
    assert_eq!(
        told,
        [
            "`bias`: 1 NaN or infinite values as F32, the first at index 0",
            "`large`: 1 numbers too large for F16, the first at index 0",
            "`nan`: 1 NaN or infinite values as F32, the first at index 1",
        ]
    );
}

#[test]
fn what_is_quantized_already_is_refused_by_its_names() {
    let error =
        quantized(&[count("w.q8", &[2, 32], 0), count("x.mins", &[2], 0)], &options(FOUR)).unwrap_err();
    assert!(matches!(&error, Error::Reserved { keys, .. } if *keys == ["w.q8", "x.mins"]), "{error}");
    let error = quantized(&[], &options(Quantization { bits: Bits::Four, block: 7 })).unwrap_err();
    assert!(error.to_string().contains("blocks of 7 values"), "{error}");
}

/// A quantized matrix `w` of `[2, 40]` in 4 bits, as `damage` leaves it.
fn damaged(description: &str, damage: impl FnOnce(&mut Vec<Stored>)) -> Result<Box<dyn Checkpoint>, Error> {
    let tensor = |key: &str, dtype, shape: &[usize]| {
        let bytes = if dtype == safetensors::Dtype::F16 { 2 } else { 1 };
        Stored {
            key: key.into(),
            dtype,
            shape: shape.into(),
            bytes: vec![0; shape.iter().product::<usize>() * bytes],
        }
    };
    let mut tensors = vec![
        tensor("w.q4", safetensors::Dtype::U8, &[2, 20]),
        tensor("w.scales", safetensors::Dtype::F16, &[2, 2]),
        tensor("w.mins", safetensors::Dtype::F16, &[2, 2]),
    ];
    damage(&mut tensors);
    let plain = safetensors_bytes(&tensors);
    let length = u64::from_le_bytes(plain[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&plain[8..8 + length]).unwrap().trim_end();
    let metadata = serde_json::json!({ METADATA: description });
    let comma = if tensors.is_empty() { "" } else { "," };
    let header = format!("{{\"__metadata__\":{metadata}{comma}{}", &header[1..]);
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&plain[8 + length..]);
    unpacked(Memory::new("q.safetensors", file).unwrap())
}

const DESCRIPTION: &str = r#"{"version":1,"bits":4,"block":32,"symmetric":false}"#;

fn faults(description: &str, damage: impl FnOnce(&mut Vec<Stored>)) -> Vec<String> {
    match damaged(description, damage).map(|_| ()) {
        Err(Error::Quantized { path, problems }) => {
            assert_eq!(path, Path::new("q.safetensors"));
            problems.iter().map(ToString::to_string).collect()
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_sound_file_is_read() {
    let read = damaged(DESCRIPTION, |_| {}).unwrap();
    assert_eq!(numbers(read.as_ref(), "w"), [0.0; 80]);
    let Err(Error::NoTensor { key, nearest, .. }) = read.bytes("v") else { panic!() };
    assert_eq!((key.as_str(), &nearest[..]), ("v", &["w".to_owned()][..]));
    assert!(read.bytes("w.q4").is_err(), "the parts are not to be seen");
    assert_eq!(damaged(DESCRIPTION, Vec::clear).unwrap().entries(), []);
}

#[test]
fn faults_of_the_description_are_told() {
    for (description, told) in [
        ("", "not the expected JSON"),
        ("[1]", "not the expected JSON"),
        (r#"{"version":1,"bits":4,"block":32}"#, "missing field `symmetric`"),
        (r#"{"version":1,"bits":4,"block":32,"symmetric":false,"more":1}"#, "unknown field `more`"),
        (r#"{"version":2,"bits":[4,8],"groups":64}"#, "it is of version 2, known is 1"),
        (r#"{"version":1,"bits":3,"block":32,"symmetric":false}"#, "3 bits, with minima, are not read"),
        (r#"{"version":1,"bits":4,"block":32,"symmetric":true}"#, "4 bits, symmetric, are not read"),
        (r#"{"version":1,"bits":4,"block":0,"symmetric":false}"#, "blocks of 0 values"),
        (r#"{"version":1,"bits":4,"block":33,"symmetric":false}"#, "blocks of 33 values"),
        (r#"{"version":1,"bits":4,"block":18446744073709551614,"symmetric":false}"#, "blocks of"),
    ] {
        let found = faults(description, |_| {});
        assert!(found.len() == 1 && found[0].contains(told), "{description}: {found:?}");
    }
}

#[test]
fn all_faults_of_the_parts_are_told_at_once() {
    assert_eq!(
        faults(DESCRIPTION, |tensors| drop(tensors.drain(1..))),
        ["`w.scales` is missing beside `w.q4`", "`w.mins` is missing beside `w.q4`"]
    );
    assert_eq!(
        faults(DESCRIPTION, |tensors| drop(tensors.remove(0))),
        ["`w.mins` belongs to no `w.q4`", "`w.scales` belongs to no `w.q4`"]
    );
    // one column more or less is another number of blocks, or not
    assert_eq!(
        faults(DESCRIPTION, |tensors| {
            tensors[1].shape = vec![1, 4];
            tensors[2] = count("w.mins", &[2, 2], 0);
            tensors.push(count("w", &[1], 0));
        }),
        [
            "`w` is there both as it is and quantized",
            "`w.scales` is of shape [1, 4], expected [2, 2]",
            "`w.mins` is F32, expected F16",
        ]
    );
    assert_eq!(
        faults(DESCRIPTION, |tensors| {
            tensors[0].dtype = safetensors::Dtype::I8;
            tensors[0].shape = vec![40];
        }),
        ["`w.q4` is I8, expected U8", "`w.q4` is of shape [40], expected two dimensions"]
    );
    // 8 bits have no minima, and 4-bit parts belong to nothing
    let eight = r#"{"version":1,"bits":8,"block":32,"symmetric":true}"#;
    assert_eq!(faults(eight, |_| {}), ["`w.mins` belongs to no `w.q8`", "`w.scales` belongs to no `w.q8`"]);
}

#[test]
fn a_matrix_without_columns_is_empty() {
    let read = damaged(DESCRIPTION, |tensors| {
        for tensor in tensors {
            tensor.shape[1] = 0;
            tensor.bytes.clear();
        }
    })
    .unwrap();
    assert_eq!(read.bytes("w").unwrap().len(), 0);
}
