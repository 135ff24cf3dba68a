//! The layout of Meta's own code for LLaMA, which FlagAI's for Aquila has too: `params.json` (or, of FlagAI,
//! `config.json`), the names of the weights, `consolidated.00.pth` and its sisters for tensor-parallel ranks.
//!
//! Rotary embedding turns adjacent channels here, where `transformers` has moved the rows of queries and keys so that the
//! halves of a head turn.

use volary_kernels::ops::{Activation, Pairing, RopeScaling};
use volary_weights::format::{Checkpoint, MegatronLayout, Merge, OpenOptions, RankOptions};
use volary_weights::{KeyMap, Rule};

use Rule::{Ignore, Rename, Split, Under};

use super::{Head, LlamaConfig};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;

/// Whether a configuration names its sizes so.
pub(crate) fn is(config: &Config) -> bool {
    ["dim", "n_layers", "n_heads", "multiple_of"].iter().all(|field| config.has(field))
}

/// The configuration; `rows` is how many the token table has, for those that leave it to the tokenizer (-1).
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub(crate) fn parse(config: &Config, rows: usize) -> Result<LlamaConfig, ConfigError> {
    config.only("use_scaled_rope", &["false"])?;
    let vocab_size = match config.integer_or("vocab_size", -1)? {
        -1 => rows,
        _ => config.size("vocab_size")?,
    };
    let d_model = config.size("dim")?;
    let n_heads = config.size("n_heads")?;
    config.divides("n_heads", n_heads, d_model)?;
    let n_kv_heads = config.size_or("n_kv_heads", n_heads)?;
    config.divides("n_kv_heads", n_kv_heads, n_heads)?;
    let d_head = d_model / n_heads;
    if !d_head.is_multiple_of(2) {
        return Err(config.error("n_heads", "heads of an even width"));
    }
    let rope_theta = config.number_or("rope_theta", 10000.0)?;
    if rope_theta <= 0.0 {
        return Err(config.error("rope_theta", "a number above 0"));
    }
    Ok(LlamaConfig {
        vocab_size,
        n_positions: config.size_or("max_seq_len", 2048)?,
        d_model,
        d_ff: d_ff(config, d_model)?,
        n_layers: config.blocks_or("n_layers", 32)?,
        n_heads,
        n_kv_heads,
        d_head,
        activation: Activation::Silu,
        attention_bias: false,
        mlp_bias: false,
        rms_norm_eps: config.number_or("norm_eps", 1e-6)?,
        rope_theta,
        rope_scaling: RopeScaling::Unscaled,
        pairing: Pairing::Interleaved,
        head: Head::Own,
    })
}

/// Two thirds of four times the width, times `ffn_dim_multiplier` if there is one, rounded up to a `multiple_of`.
fn d_ff(config: &Config, d_model: usize) -> Result<usize, ConfigError> {
    let multiple = config.size("multiple_of")?;
    let times = config.number_or("ffn_dim_multiplier", 1.0)?;
    if !(times > 0.0 && times < 1000.0) {
        return Err(config.error("ffn_dim_multiplier", "a number above 0 and below 1000"));
    }
    let wide = (times * (8 * d_model / 3) as f64) as usize;
    Ok(wide.max(1).next_multiple_of(multiple))
}

const BLOCK: &[Rule] = &[
    Rename("attention_norm.weight", "norm1.weight"),
    Rename("attention.wq.weight", "attention.query.weight"),
    Rename("attention.wk.weight", "attention.key.weight"),
    Rename("attention.wv.weight", "attention.value.weight"),
    // FlagAI's with flash attention
    Split(
        "attention.Wqkv.weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Rename("attention.wo.weight", "attention.output.weight"),
    Ignore("attention.inner_attention.rope.freqs"),
    Rename("ffn_norm.weight", "norm2.weight"),
    Rename("feed_forward.w1.weight", "mlp.gate.weight"),
    Rename("feed_forward.w3.weight", "mlp.up.weight"),
    Rename("feed_forward.w2.weight", "mlp.down.weight"),
];

/// Keys of Meta's `Transformer` and FlagAI's `AQUILAModel`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("tok_embeddings.weight", "tokens.weight"),
    Under("layers.{}.", "blocks.{}.", BLOCK),
    Rename("norm.weight", "norm.weight"),
    Rename("output.weight", "head.weight"),
    Ignore("rope.freqs"),
]);

/// How Meta's ranks of LLaMA and Llama 2 are merged; each has columns of the token table.
const LAYOUT: MegatronLayout = MegatronLayout {
    merges: &[
        ("tok_embeddings.weight", Merge::Row),
        ("layers.{}.attention_norm.weight", Merge::Replicated),
        ("layers.{}.attention.wq.weight", Merge::Column),
        ("layers.{}.attention.wk.weight", Merge::Column),
        ("layers.{}.attention.wv.weight", Merge::Column),
        ("layers.{}.attention.wo.weight", Merge::Row),
        ("layers.{}.attention.inner_attention.rope.freqs", Merge::Replicated),
        ("layers.{}.ffn_norm.weight", Merge::Replicated),
        ("layers.{}.feed_forward.w1.weight", Merge::Column),
        ("layers.{}.feed_forward.w3.weight", Merge::Column),
        ("layers.{}.feed_forward.w2.weight", Merge::Row),
        ("norm.weight", Merge::Replicated),
        ("output.weight", Merge::Column),
        ("rope.freqs", Merge::Replicated),
    ],
};

/// The weights of a folder, ranks merged.
///
/// # Errors
/// If there are none, or they are broken.
pub(crate) fn checkpoint(folder: &Folder) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions::new(LAYOUT);
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), ..OpenOptions::default() })
}

/// How many rows the token table has; 1 if there is none, which is told when the weights are compared.
pub(crate) fn rows(checkpoint: &dyn Checkpoint) -> usize {
    let table = checkpoint.entries().iter().find(|entry| entry.name == "tok_embeddings.weight");
    table.and_then(|entry| entry.shape.first().copied()).filter(|&rows| rows > 0).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::{Device, TensorData, Tolerance};
    use volary_weights::{LoadOptions, parameters, read_tensors};

    use super::super::{LLAMA_2_70B, LLAMA_7B, LLAMA_33B, LLAMA_65B};
    use super::*;
    use crate::registry::System;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn config(fields: &str) -> Result<LlamaConfig, ConfigError> {
        let config = Config::parse(Path::new("params.json"), format!("{{{fields}}}").as_bytes()).unwrap();
        assert!(is(&config), "{fields}");
        parse(&config, 32000)
    }

    /// Meta's own files say these; the heads turn otherwise than in transformers' names.
    #[test]
    fn the_parameters_of_meta_are_those_of_the_published_sizes() {
        let paired = |config| LlamaConfig { pairing: Pairing::Interleaved, ..config };
        for (fields, expected) in [
            (
                r#""dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06"#,
                LLAMA_7B,
            ),
            (
                r#""dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-06"#,
                LLAMA_33B,
            ),
            (
                r#""dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-05"#,
                LLAMA_65B,
            ),
            (
                r#""dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
                "n_layers": 80, "norm_eps": 1e-05, "max_seq_len": 4096"#,
                LLAMA_2_70B,
            ),
        ] {
            assert_eq!(config(&format!(r#"{fields}, "vocab_size": -1"#)).unwrap(), paired(expected));
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let sizes = r#""dim": 32, "multiple_of": 16, "n_layers": 2, "n_heads": 4"#;
        for (fields, named) in [
            (r#""use_scaled_rope": true"#, "`use_scaled_rope`"),
            (r#""n_heads": 5"#, "`n_heads`: expected a divisor of 32"),
            (r#""n_heads": 32"#, "`n_heads`: expected heads of an even width"),
            (r#""n_kv_heads": 3"#, "`n_kv_heads`: expected a divisor of 4"),
            (r#""multiple_of": 0"#, "`multiple_of`: expected a whole number from 1"),
            (r#""ffn_dim_multiplier": -1"#, "`ffn_dim_multiplier`: expected a number above 0"),
            (r#""n_layers": 2000000000"#, "`n_layers`: expected at most 1000 blocks"),
            (r#""vocab_size": 0"#, "`vocab_size`: expected a whole number from 1"),
            (r#""rope_theta": 0"#, "`rope_theta`: expected a number above 0, found 0"),
        ] {
            let message = config(&format!("{sizes}, {fields}")).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn every_parameter_has_a_key_that_leads_back_to_it() {
        let sizes = r#""dim": 32, "multiple_of": 16, "n_layers": 2, "n_heads": 4"#;
        for parameter in parameters(&config(sizes).unwrap().init(&Device::flex())) {
            let found = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(found.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&found[0]).unwrap(), [parameter.path]);
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(of("layers.31.feed_forward.w1.weight"), ["blocks.31.mlp.gate.weight"]);
        assert_eq!(of("layers.3.attention.Wqkv.weight").len(), 3);
        assert!(of("layers.3.attention.inner_attention.rope.freqs").is_empty());
    }

    /// Two ranks, and a vocabulary that only the tables tell.
    #[test]
    fn the_ranks_of_meta_are_merged() {
        let inputs = read_tensors(&fixture("aquila_flagai").join("inputs.safetensors")).unwrap();
        let [ranks, whole] = ["llama_original", "aquila_flagai"].map(|name| {
            let folder = Folder::Disk(fixture(name));
            let outputs =
                crate::registry::forward(&folder, &inputs, &LoadOptions::default(), &Device::flex()).unwrap();
            let outputs: BTreeMap<String, TensorData> = outputs.into_iter().collect();
            (System::of(&folder).unwrap().name, outputs)
        });
        assert_eq!((ranks.0, whole.0), ("llama", "aquila"));
        ranks.1["logits"].assert_approx_eq::<f32>(&whole.1["logits"], Tolerance::absolute(1e-6));
        assert_eq!(ranks.1["greedy.tokens"], whole.1["greedy.tokens"]);
    }
}
