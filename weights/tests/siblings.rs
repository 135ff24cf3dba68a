//! Every torch, Paddle and tensor-parallel file of the fixtures has the tensors of the `model.safetensors` beside it.
//!
//! `VOLARY_FIXTURES=folder` looks at the fixtures there instead of those in the repository.
#![allow(clippy::unwrap_used)] // a test may panic

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::f16;
use volary_weights::format::{
    Checkpoint, Dtype, MegatronLayout, Merge, OpenOptions, RankOptions, megatron, open, open_with,
};

/// A Megatron encoder-decoder: `[q; k; v]`, or `[k; v]` for cross-attention, and heads along the columns of the bias.
const ENCODER_DECODER: MegatronLayout = MegatronLayout {
    merges: &[
        ("word_embeds.weight", Merge::Vocabulary),
        ("lm_head.weight", Merge::Vocabulary),
        ("encoder.word_embeds.weight", Merge::Vocabulary),
        ("decoder.word_embeds.weight", Merge::Vocabulary),
        ("encoder.final_layernorm.weight", Merge::Replicated),
        ("decoder.final_layernorm.weight", Merge::Replicated),
        ("encoder.blocks.{}.self_attn.self_attn.project.weight", Merge::Fused(3)),
        ("decoder.blocks.{}.self_attn.self_attn.project.weight", Merge::Fused(3)),
        ("encoder.blocks.{}.self_attn.self_attn.relative_attention_bias.weight", Merge::Row),
        ("decoder.blocks.{}.self_attn.self_attn.relative_attention_bias.weight", Merge::Row),
        ("encoder.blocks.{}.self_attn.self_attn.dense.weight", Merge::Row),
        ("decoder.blocks.{}.self_attn.self_attn.dense.weight", Merge::Row),
        ("decoder.blocks.{}.cross_attn.cross_attn.project_q.weight", Merge::Column),
        ("decoder.blocks.{}.cross_attn.cross_attn.project_kv.weight", Merge::Fused(2)),
        ("decoder.blocks.{}.cross_attn.cross_attn.dense.weight", Merge::Row),
        ("encoder.blocks.{}.self_attn.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.self_attn.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.cross_attn.layer_norm.weight", Merge::Replicated),
        ("encoder.blocks.{}.ff.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.ff.layer_norm.weight", Merge::Replicated),
        ("encoder.blocks.{}.ff.dense_relu_dense.wi_0.weight", Merge::Column),
        ("decoder.blocks.{}.ff.dense_relu_dense.wi_0.weight", Merge::Column),
        ("encoder.blocks.{}.ff.dense_relu_dense.wi_1.weight", Merge::Column),
        ("decoder.blocks.{}.ff.dense_relu_dense.wi_1.weight", Merge::Column),
        ("encoder.blocks.{}.ff.dense_relu_dense.wo.weight", Merge::Row),
        ("decoder.blocks.{}.ff.dense_relu_dense.wo.weight", Merge::Row),
    ],
};

/// What is known to differ from the `model.safetensors` beside a file.
struct Exception {
    folder: &'static str,
    /// What the torch file has before every key.
    prefix: &'static str,
    /// What it has besides, by the ends of the keys.
    besides: &'static [&'static str],
    /// What it calls otherwise: its name for a part of a key, and theirs.
    renames: &'static [(&'static str, &'static str)],
}

const EXACT: Exception = Exception { folder: "", prefix: "", besides: &[], renames: &[] };

const EXCEPTIONS: &[Exception] = &[
    // mask buffers and tied tables, which safetensors files leave out
    Exception { folder: "cpm1_hf", besides: &["lm_head.weight", ".attn.bias", ".attn.masked_bias"], ..EXACT },
    Exception {
        folder: "pangu_alpha",
        besides: &["lm_head.weight", ".attn.bias", ".attn.masked_bias"],
        renames: &[(".attn.out_proj.", ".attn.c_proj.")],
        ..EXACT
    },
    Exception { folder: "cpm2", besides: &["coder.word_embeds.weight"], ..EXACT },
    Exception { folder: "plug", besides: &["cls.predictions.decoder_weight"], ..EXACT },
    Exception {
        folder: "ernie3_small",
        besides: &["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
        ..EXACT
    },
    Exception { folder: "plato_xl", besides: &["lm_head.decoder_weight"], ..EXACT },
    Exception { folder: "glm", prefix: "glm.", ..EXACT },
];

fn fixtures() -> PathBuf {
    match std::env::var_os("VOLARY_FIXTURES") {
        Some(folder) => folder.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures"),
    }
}

/// All torch and Paddle files under a folder; of ranks, the folder.
fn torch_files(folder: &Path, found: &mut Vec<PathBuf>) {
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            torch_files(&path, found);
        } else if name.starts_with("mp_rank_") {
            if !found.iter().any(|known| known == folder) {
                found.push(folder.to_owned());
            }
        } else if [".bin", ".pt", ".pth", ".pdparams"].iter().any(|end| name.ends_with(end)) {
            found.push(path);
        }
    }
}

/// Every tensor as f32 with its shape; integers, which the files keep beside their weights, as well.
fn tensors(checkpoint: &dyn Checkpoint) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
    let values = |dtype: Dtype, bytes: &[u8]| -> Vec<f32> {
        match dtype {
            Dtype::F32 => bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            Dtype::F16 => {
                bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect()
            }
            Dtype::I64 => bytes.as_chunks().0.iter().map(|bytes| i64::from_le_bytes(*bytes) as f32).collect(),
            _ => bytes.iter().map(|&byte| byte.into()).collect(),
        }
    };
    let read = |entry: &volary_weights::Entry| {
        let bytes = checkpoint.bytes(&entry.name).unwrap();
        (entry.name.clone(), (entry.shape.clone(), values(entry.dtype, &bytes)))
    };
    checkpoint.entries().iter().map(read).collect()
}

#[test]
fn torch_files_have_the_tensors_of_the_safetensors_beside_them() {
    let root = fixtures();
    let mut wrong = Vec::new();
    let mut compared = 0;
    for folder in std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path()) {
        let safetensors = folder.join("model.safetensors");
        if !safetensors.is_file() {
            continue;
        }
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let exception = EXCEPTIONS.iter().find(|known| known.folder == name).unwrap_or(&EXACT);
        let mut files = Vec::new();
        torch_files(&folder, &mut files);
        let expected = tensors(open(&safetensors).unwrap().as_ref());
        for file in files {
            let layout = if name.starts_with("cpm2") { ENCODER_DECODER } else { megatron::GPT2 };
            let ranks = RankOptions::new(layout);
            let several = file.is_dir() && std::fs::read_dir(&file).unwrap().count() > 1;
            let merged = OpenOptions { ranks: several.then_some(&ranks), ..OpenOptions::default() };
            let plain = OpenOptions::default();
            let checkpoint = match open_with(&file, if name == "plug" { &plain } else { &merged }) {
                Ok(checkpoint) => checkpoint,
                Err(error) => {
                    wrong.push(error.to_string());
                    continue;
                }
            };
            let renamed = |key: String| {
                let key = key.strip_prefix(exception.prefix).unwrap_or(&key).to_owned();
                exception.renames.iter().fold(key, |key, (from, to)| key.replace(from, to))
            };
            let mut found: BTreeMap<_, _> =
                tensors(checkpoint.as_ref()).into_iter().map(|(key, value)| (renamed(key), value)).collect();
            let known = |key: &str| expected.contains_key(key);
            found.retain(|key, _| known(key) || !exception.besides.iter().any(|end| key.ends_with(end)));
            for key in expected.keys().filter(|key| !found.contains_key(*key)) {
                wrong.push(format!("{}: lacks {key}", file.display()));
            }
            for (key, value) in &found {
                match expected.get(key) {
                    None => wrong.push(format!("{}: also has {key}", file.display())),
                    Some(wanted) if wanted.0 != value.0 => {
                        wrong.push(format!("{}: {key} is {:?}, not {:?}", file.display(), value.0, wanted.0));
                    }
                    Some(wanted) if wanted != value => {
                        wrong.push(format!("{}: {key} differs", file.display()))
                    }
                    Some(_) => {}
                }
            }
            compared += 1;
        }
    }
    println!("{compared} files compared");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(compared >= 2, "only {compared} files in {}", root.display());
}
