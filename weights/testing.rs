//! Checkpoints made by hand, and a small module to load them into.

use std::path::{Path, PathBuf};

use burn::module::{Module, Param, ParamId};
use burn::nn::{Initializer, Linear, LinearConfig, LinearLayout};
use burn::tensor::{Bool, Device, Int, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use crate::format::Memory;
use crate::rule::{KeyMap, Ones, Rule};

/// A file of a fixture folder.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures")).join(name)
}

/// A tensor of f32.
pub fn floats(key: &str, shape: &[usize], values: impl IntoIterator<Item = f32>) -> Stored {
    let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
    Stored { key: key.to_owned(), dtype: Dtype::F32, shape: shape.to_vec(), bytes }
}

/// A tensor of f32 that counts from `first`.
pub fn count(key: &str, shape: &[usize], first: usize) -> Stored {
    let length: usize = shape.iter().product();
    floats(key, shape, (first..first + length).map(|i| i as f32))
}

/// A tensor of i64.
pub fn ints(key: &str, values: &[i64]) -> Stored {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Stored { key: key.to_owned(), dtype: Dtype::I64, shape: vec![values.len()], bytes }
}

/// A tensor of booleans.
pub fn bools(key: &str, values: &[bool]) -> Stored {
    let bytes = values.iter().map(|&value| value.into()).collect();
    Stored { key: key.to_owned(), dtype: Dtype::BOOL, shape: vec![values.len()], bytes }
}

/// A tensor as a file has it.
#[derive(Clone)]
pub struct Stored {
    pub key: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// A safetensors file, as the reference implementation writes it.
pub fn safetensors_bytes(tensors: &[Stored]) -> Vec<u8> {
    let views = tensors.iter().map(|Stored { key, dtype, shape, bytes }| {
        (key, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape says"))
    });
    safetensors::serialize(views, None).unwrap()
}

/// The same in memory, as a checkpoint called `test.safetensors`.
pub fn checkpoint(tensors: &[Stored]) -> Memory {
    Memory::new("test.safetensors", safetensors_bytes(tensors)).unwrap()
}

/// Parameters of every kind, each reached by another rule.
#[derive(Module, Debug)]
pub struct Tiny {
    pub blocks: Vec<Block>,
    pub pos: Param<Tensor<2>>,        // [3, 4]
    pub stacked: Param<Tensor<2>>,    // [4, 2]
    pub experts: Param<Tensor<3>>,    // [2, 2, 3], stored one by one as [1, 3, 2]
    pub biases: Param<Tensor<2>>,     // [2, 3], stored one by one
    pub ids: Param<Tensor<1, Int>>,   // [3]
    pub mask: Param<Tensor<1, Bool>>, // [2]
    pub head: Option<Linear>,         // [2, 4] -> [4, 2] as Burn holds it
}

#[derive(Module, Debug)]
pub struct Block {
    pub query: Linear,          // d_out 4
    pub key: Linear,            // d_out 2, as with grouped queries
    pub value: Linear,          // d_out 2
    pub conv: Param<Tensor<2>>, // [4, 3], stored as [3, 4]
}

pub const KEYS: KeyMap = KeyMap::new(&[
    Rule::Under(
        "h.{}.",
        "blocks.{}.",
        &[
            Rule::Split("qkv.weight", &["query.weight", "key.weight", "value.weight"]),
            Rule::Split("qkv.bias", &["query.bias", "key.bias", "value.bias"]),
            Rule::Transpose("conv", "conv"),
            Rule::Ignore("attn.bias"),
        ],
    ),
    Rule::Reshape("pos_embed", "pos", Ones::Before(1)),
    Rule::Concat(&["upper", "lower"], "stacked"),
    Rule::StackTranspose("experts.{}.weight", "experts", Ones::Before(1)),
    Rule::Stack("experts.{}.bias", "biases", Ones::Before(0)),
    Rule::Rename("position_ids", "ids"),
    Rule::Rename("mask", "mask"),
    Rule::Rename("head.weight", "head.weight"),
    Rule::Rename("head.bias", "head.bias"),
    Rule::Ignore("cls.{*}"),
])
.with_prefixes(&["model."]);

impl Tiny {
    pub fn new(device: &Device) -> Self {
        let linear = |d_out| LinearConfig::new(4, d_out).with_layout(LinearLayout::Col).init(device);
        let floats = |shape: [usize; 2]| Initializer::Zeros.init(shape, device);
        let block = || Block { query: linear(4), key: linear(2), value: linear(2), conv: floats([4, 3]) };
        Self {
            blocks: vec![block(), block()],
            pos: floats([3, 4]),
            stacked: floats([4, 2]),
            experts: Initializer::Zeros.init([2, 2, 3], device),
            biases: floats([2, 3]),
            ids: Param::initialized(ParamId::new(), Tensor::zeros([3], device)),
            mask: Param::initialized(ParamId::new(), Tensor::from_data([false, false], device)),
            head: Some(linear(2)),
        }
    }
}

/// A checkpoint that fits [`Tiny`].
pub fn tiny() -> Vec<Stored> {
    let mut tensors = vec![
        count("pos_embed", &[1, 3, 4], 100),
        count("upper", &[3, 2], 200), // 3 + 1 rows
        count("lower", &[1, 2], 206),
        count("experts.0.weight", &[1, 3, 2], 400),
        count("experts.1.weight", &[1, 3, 2], 406),
        count("experts.0.bias", &[3], 500),
        count("experts.1.bias", &[3], 503),
        ints("position_ids", &[0, 1, -2]),
        bools("mask", &[true, false]),
        count("head.weight", &[2, 4], 300),
        count("head.bias", &[2], 400),
        count("cls.predictions.bias", &[5], 0),
    ];
    for block in 0..2 {
        tensors.extend([
            count(&format!("h.{block}.qkv.weight"), &[8, 4], 1000 * block),
            count(&format!("h.{block}.qkv.bias"), &[8], 1000 * block + 500),
            count(&format!("h.{block}.conv"), &[3, 4], 1000 * block + 600),
            ints(&format!("h.{block}.attn.bias"), &[7]),
        ]);
    }
    tensors
}

/// A torch.save archive as torch lays it out: one storage for each tensor, inside `wrapper` if there is one, with
/// `numbers` beside it.
pub fn torch_bytes(tensors: &[Stored], wrapper: Option<&str>, numbers: &[(&str, u8)]) -> Vec<u8> {
    let text = |text: &str| [b"X", &(text.len() as u32).to_le_bytes()[..], text.as_bytes()].concat();
    let int = |value: usize| [b"J", &(value as i32).to_le_bytes()[..]].concat();
    let tuple = |items: Vec<Vec<u8>>| [b"(", &items.concat()[..], b"t"].concat();
    let class = |dtype| match dtype {
        Dtype::F16 => "HalfStorage",
        Dtype::BF16 => "BFloat16Storage",
        Dtype::I64 => "LongStorage",
        Dtype::BOOL => "BoolStorage",
        _ => "FloatStorage",
    };
    let mut dictionary = b"}(".to_vec();
    for (i, Stored { key, dtype, shape, .. }) in tensors.iter().enumerate() {
        let elements = shape.iter().product();
        let global = format!("ctorch\n{}\n", class(*dtype)).into_bytes();
        let storage = [
            tuple(vec![text("storage"), global, text(&i.to_string()), text("cpu"), int(elements)]),
            b"Q".into(),
        ];
        let steps = (0..shape.len()).map(|d| int(shape[d + 1..].iter().product())).collect();
        let sizes = shape.iter().map(|&size| int(size)).collect();
        let hooks = b"ccollections\nOrderedDict\n)R".to_vec();
        let view = tuple(vec![storage.concat(), int(0), tuple(sizes), tuple(steps), b"\x89".into(), hooks]);
        dictionary
            .extend([text(key), b"ctorch._utils\n_rebuild_tensor_v2\n".into(), view, b"R".into()].concat());
    }
    dictionary.push(b'u');
    let numbers: Vec<u8> =
        numbers.iter().flat_map(|(name, value)| [text(name), vec![b'K', *value]].concat()).collect();
    let object = match wrapper {
        Some(wrapper) => [b"}(", &text(wrapper)[..], &dictionary, &numbers, b"u"].concat(),
        None => dictionary,
    };
    let mut files = vec![("data.pkl".to_owned(), [b"\x80\x02", &object[..], b"."].concat())];
    files.extend(tensors.iter().enumerate().map(|(i, tensor)| (format!("data/{i}"), tensor.bytes.clone())));
    files.push(("version".to_owned(), b"3\n".to_vec()));
    zip_bytes("archive/", &files)
}

/// A zip archive of plain entries. Their checksums are left zero: no reader here looks at them.
pub fn zip_bytes(folder: &str, files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in files {
        let name = format!("{folder}{name}");
        let size = (content.len() as u32).to_le_bytes();
        let common = [&[0; 12][..], &size, &size, &(name.len() as u16).to_le_bytes(), &[0; 2]].concat();
        let local = (out.len() as u32).to_le_bytes();
        out.extend([&b"PK\x03\x04\0\0"[..], &common[..2], &common[2..], name.as_bytes(), content].concat());
        let entry = [&b"PK\x01\x02\0\0\0\0"[..], &common, &[0; 10], &local, name.as_bytes()].concat();
        directory.extend(entry);
    }
    let count = (files.len() as u16).to_le_bytes();
    let (length, start) = ((directory.len() as u32).to_le_bytes(), (out.len() as u32).to_le_bytes());
    [&out[..], &directory, b"PK\x05\x06\0\0\0\0", &count, &count, &length, &start, &[0; 2]].concat()
}
