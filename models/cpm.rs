//! CPM-1, also WuDao Wen Yuan 1.0: a Chinese text decoder (Zhang et al. 2020, <https://arxiv.org/abs/2012.00413>; Tsinghua
//! University and BAAI). The model is GPT-2's ([`crate::gpt2`]) with a vocabulary of 30,000; this file reads it as its
//! authors posted it, in Megatron-LM's names and as two tensor-parallel ranks:
//!
//! ```text
//! config.json                          {"model_type": "cpm1", "num_layers": 32, "hidden_size": 2560, ...}
//! 80000/mp_rank_00_model_states.pt
//! 80000/mp_rank_01_model_states.pt
//! ```
//!
//! The archive has no `config.json`: write one. PaddleNLP's uploads (`gpt-cpm-large-cn`, `gpt-cpm-small-cn-distill`; `gpt`)
//! are read as well, by its code's names: no fixture of them comes from there. The large model is also on the hub as
//! `TsinghuaAI/CPM-Generate` and in FlagAI as `CPM-large-ch`, in GPT-2's names, and is read as that. There its end token is
//! 50256, which the vocabulary lacks: a text ends with `<eod>`, 7.
//!
//! The numbers match the authors' code (`GPT2Model` of TsinghuaAI/CPM-1-Generate).
//!
//! ```sh
//! volary forward path/to/CPM-large --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::Device;
use volary_kernels::ops::Activation;
use volary_weights::format::{OpenOptions, RankOptions, megatron};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule};

use Rule::{Ignore, Rename, Split, Under};

use crate::config::{Config, ConfigError};
use crate::decoder::Runner;
use crate::error::Error;
use crate::folder::Folder;
use crate::gpt2::{CONV1D, Gpt2, Gpt2Config, LINEAR, SMALL};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{System, describe_with};

/// The decoder, and what separates documents.
#[derive(Clone, Debug, PartialEq)]
pub struct CpmConfig {
    /// The shape.
    pub decoder: Gpt2Config,
    /// The token that ends a document.
    pub end: Option<u32>,
}

impl CpmConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// Sizes by the names of Megatron-LM's arguments, or of PaddleNLP's configurations (`model_type` `gpt`); what is left
    /// out has the values of the large model.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let (decoder, end) = match config.text("model_type") {
            Some("gpt") => (paddle_sizes(config, &LARGE)?, "eos_token_id"),
            _ => (megatron_sizes(config, &LARGE)?, "eod_token"),
        };
        let end = config.integer_or(end, 7)?;
        // a vocabulary without it has no documents to tell apart
        let end = u32::try_from(end).ok().filter(|&end| (end as usize) < decoder.vocab_size);
        Ok(Self { decoder, end })
    }

    fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Runner<Gpt2>, Error> {
        let weights = checkpoint(folder, &self.decoder)?;
        let runner = self.decoder.load(weights.as_ref(), &KEYS, options, device)?;
        Ok(Runner { end: self.end, ..runner })
    }
}

/// A decoder whose sizes go by the names of Megatron-LM's arguments; those that are left out are those of `default`.
///
/// # Errors
/// If one is malformed.
pub(crate) fn megatron_sizes(config: &Config, default: &Gpt2Config) -> Result<Gpt2Config, ConfigError> {
    Ok(Gpt2Config {
        layer_norm_eps: config.number_or("layernorm_epsilon", default.layer_norm_eps)?,
        ..sizes(config, default, "ffn_hidden_size", "num_layers")?
    })
}

/// A decoder whose sizes go by the names of PaddleNLP's `GPTConfig`; those that are left out are those of `default`.
fn paddle_sizes(config: &Config, default: &Gpt2Config) -> Result<Gpt2Config, ConfigError> {
    // with it, queries, keys and values lie together for each head
    config.only("fuse_attention_qkv", &["false"])?;
    Ok(Gpt2Config {
        activation: match config.text("hidden_act") {
            // its code takes the approximation
            Some("gelu") => Activation::GeluTanh,
            _ => config.activation_or("hidden_act", Activation::GeluTanh)?,
        },
        ..sizes(config, default, "intermediate_size", "num_hidden_layers")?
    })
}

/// What both name alike, but for these two.
fn sizes(
    config: &Config,
    default: &Gpt2Config,
    d_ff: &str,
    n_layers: &str,
) -> Result<Gpt2Config, ConfigError> {
    let d_model = config.size_or("hidden_size", default.d_model)?;
    let n_heads = config.size_or("num_attention_heads", default.n_heads)?;
    config.divides("num_attention_heads", n_heads, d_model)?;
    Ok(Gpt2Config {
        vocab_size: config.size_or("vocab_size", default.vocab_size)?,
        n_positions: config.size_or("max_position_embeddings", default.n_positions)?,
        d_model,
        d_ff: config.size_or(d_ff, 4 * d_model)?,
        n_layers: config.blocks_or(n_layers, default.n_layers)?,
        n_heads,
        d_head: d_model / n_heads,
        ..default.clone()
    })
}

/// The weights of a folder, ranks merged.
///
/// # Errors
/// If there are none, or they are broken.
pub(crate) fn checkpoint(folder: &Folder, decoder: &Gpt2Config) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions { vocab_size: Some(decoder.vocab_size), ..RankOptions::new(megatron::GPT2) };
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), ..OpenOptions::default() })
}

const BLOCK: &[Rule] = &[
    Under("input_layernorm.", "norm1.", LINEAR),
    Split(
        "attention.query_key_value.weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Split(
        "attention.query_key_value.bias",
        &["attention.query.bias", "attention.key.bias", "attention.value.bias"],
    ),
    Under("attention.dense.", "attention.output.", LINEAR),
    Under("post_attention_layernorm.", "norm2.", LINEAR),
    Under("mlp.dense_h_to_4h.", "mlp.up.", LINEAR),
    Under("mlp.dense_4h_to_h.", "mlp.down.", LINEAR),
];

/// PaddleNLP stores weights `[d_in, d_out]`.
const PADDLE_BLOCK: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("self_attn.q_proj.", "attention.query.", CONV1D),
    Under("self_attn.k_proj.", "attention.key.", CONV1D),
    Under("self_attn.v_proj.", "attention.value.", CONV1D),
    Under("self_attn.out_proj.", "attention.output.", CONV1D),
    Under("norm2.", "norm2.", LINEAR),
    Under("linear1.", "mlp.up.", CONV1D),
    Under("linear2.", "mlp.down.", CONV1D),
];

const PADDLE: &[Rule] = &[
    Rename("embeddings.word_embeddings.weight", "tokens.weight"),
    Rename("embeddings.position_embeddings.weight", "positions.weight"),
    Under("decoder.layers.{}.", "blocks.{}.", PADDLE_BLOCK),
    Under("decoder.norm.", "norm.", LINEAR),
];

/// Keys of Megatron-LM's first GPT-2: `[q; k; v]` fused, every weight `[d_out, d_in]`; and those of PaddleNLP.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("word_embeddings.weight", "tokens.weight"),
    Rename("position_embeddings.weight", "positions.weight"),
    Under("transformer.layers.{}.", "blocks.{}.", BLOCK),
    Under("transformer.final_layernorm.", "norm.", LINEAR),
    Under("gpt.", "", PADDLE),
    Under("", "", PADDLE),
    Ignore("lm_head.decoder_weight"),
])
.with_prefixes(&["module."]);

/// CPM-1 as the registry knows it.
pub const SYSTEM: System = System {
    name: "cpm1",
    about: "Chinese text decoders as their authors posted them: CPM-1 (WuDao Wen Yuan 1.0), in ranks or whole",
    file: "models/cpm.rs",
    tasks: &["generate", "forward"],
    proved: &["cpm1"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| matches!(config.text("model_type"), Some("cpm1" | "gpt")))
    },
    checkpoint: |folder| checkpoint(folder, &CpmConfig::of(folder)?.decoder),
    describe: |folder| {
        let CpmConfig { decoder, .. } = CpmConfig::of(folder)?;
        describe_with(checkpoint(folder, &decoder)?.as_ref(), &decoder.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| Ok(Box::new(CpmConfig::of(folder)?.load(folder, options, device)?)),
    generator: Some(|folder, options, device| {
        Ok(Box::new(CpmConfig::of(folder)?.load(folder, options, device)?))
    }),
};

/// Zhang et al. 2020, table 2.
const BASE: Gpt2Config = Gpt2Config { vocab_size: 30_000, ..SMALL };
const LARGE: Gpt2Config = BASE.sized(32, 2560, 32);

const fn preset(name: &'static str, config: Gpt2Config, weights: Weights, parameters: usize) -> Preset {
    let (license, source) = ("MIT", "counted; table 2 of the paper rounds it");
    Preset { name, shape: Shape::Gpt2(config), weights, license, parameters, source }
}

/// Published sizes. The small one is also that of CPM-Distill, which learned from the large one.
pub const PRESETS: &[Preset] = &[
    preset("CPM-small", BASE.sized(12, 768, 12), Weights::Unreleased, 108_882_432),
    preset("mymusise/CPM-Generate-distill", BASE.sized(12, 768, 12), Weights::Hub, 108_882_432),
    preset("CPM-medium", BASE.sized(24, 1024, 16), Weights::Unreleased, 334_080_000),
    preset("TsinghuaAI/CPM-Generate", LARGE, Weights::Hub, 2_597_073_920),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::TensorData;
    use volary_weights::{parameters, read_tensors, save};

    use super::*;
    use crate::tensors::Outputs;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cpm1")
    }

    fn inputs() -> BTreeMap<String, TensorData> {
        read_tensors(&fixture().join("inputs.safetensors")).unwrap()
    }

    fn run(folder: &Path, inputs: &BTreeMap<String, TensorData>) -> Result<Outputs, Error> {
        let folder = Folder::Disk(folder.to_owned());
        crate::registry::forward(&folder, inputs, &LoadOptions::default(), &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_its_parameters() {
        for parameter in parameters(&BASE.sized(2, 12, 3).init(&Device::flex())) {
            let found = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(found.len(), 1, "{}", parameter.path);
            assert!(KEYS.paths(&found[0]).unwrap().contains(&parameter.path));
        }
    }

    /// The authors' files, of half the heads each: beside the configuration, in the folder of their iteration, and in one
    /// that is named by a file. Half precision holds the numbers of the fixture.
    #[test]
    fn two_ranks_are_the_whole_model() {
        let expected = run(&fixture(), &inputs()).unwrap();
        let ranks = ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"];
        for (place, tracker) in [
            ("", None),
            ("80000", None),
            ("80000", Some(("latest_checkpointed_iteration.txt", "80000\n"))),
            ("80000", Some(("latest", "80000"))),
        ] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path();
            std::fs::copy(fixture().join("config.json"), path.join("config.json")).unwrap();
            std::fs::create_dir_all(path.join(place)).unwrap();
            for rank in ranks {
                std::fs::copy(fixture().join("80000").join(rank), path.join(place).join(rank)).unwrap();
            }
            if let Some((name, text)) = tracker {
                std::fs::write(path.join(name), text).unwrap();
            }
            assert_eq!(run(path, &inputs()).unwrap(), expected, "{place} {tracker:?}");
            let description = (SYSTEM.describe)(&Folder::Disk(path.to_owned())).unwrap();
            assert!(description.problems.is_empty());
            assert_eq!(description.dtypes, BTreeMap::from([("F16", 28)]));
            std::fs::remove_file(path.join(place).join(ranks[1])).unwrap();
            let message = run(path, &inputs()).unwrap_err().to_string();
            assert!(message.contains("rank 1 of 2 is missing"), "{message}");
        }
    }

    /// PaddleNLP's names and its configuration's: the same model.
    #[test]
    fn weights_in_the_names_of_paddle_are_read() {
        const NAMES: KeyMap = KeyMap::new(&[Under("gpt.", "", PADDLE)]);
        let source = Folder::Disk(fixture());
        let config = CpmConfig::of(&source).unwrap();
        let (options, device) = (LoadOptions::default(), Device::flex());
        let Runner { model, .. } = config.load(&source, &options, &device).unwrap();
        let folder = tempfile::tempdir().unwrap();
        save(&model, &NAMES, None, &folder.path().join("model.safetensors"), None).unwrap();
        let stored = read_tensors(&folder.path().join("model.safetensors")).unwrap();
        assert_eq!(stored["gpt.decoder.layers.0.linear1.weight"].shape().as_slice(), [32, 128]);
        let paddle = r#"{"model_type": "gpt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 88, "max_position_embeddings": 24, "intermediate_size": 128, "hidden_act": "gelu",
            "eos_token_id": 7}"#;
        std::fs::write(folder.path().join("config.json"), paddle).unwrap();
        assert_eq!(CpmConfig::of(&Folder::Disk(folder.path().to_owned())).unwrap(), config);
        assert_eq!(run(folder.path(), &inputs()).unwrap(), run(&fixture(), &inputs()).unwrap());
    }

    /// Rows of the table beyond the vocabulary are cut: a smaller one in the configuration scores fewer tokens.
    #[test]
    fn a_padded_table_is_cut_to_the_vocabulary() {
        let folder = tempfile::tempdir().unwrap();
        let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
        std::fs::write(folder.path().join("config.json"), config.replace("88", "87")).unwrap();
        for rank in ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"] {
            std::fs::copy(fixture().join("80000").join(rank), folder.path().join(rank)).unwrap();
        }
        let ids = BTreeMap::from([("input_ids".to_owned(), inputs()["input_ids"].clone())]);
        let outputs = run(folder.path(), &ids).unwrap();
        assert_eq!(outputs[0].1.shape().as_slice(), [2, 12, 87]);
    }

    /// Positions, mask and what the loss is about follow from the end token, to the bit.
    #[test]
    fn documents_are_told_apart_by_their_end() {
        let given = run(&fixture(), &inputs()).unwrap();
        let mut bare = inputs();
        for name in ["packed.position_ids", "packed.attention_mask", "packed.loss_mask"] {
            assert!(bare.remove(name).is_some());
        }
        let derived = run(&fixture(), &bare).unwrap();
        let of = |outputs: &Outputs, wanted: &str| {
            outputs.iter().find(|(name, _)| name == wanted).map(|(_, data)| data.clone()).unwrap()
        };
        for name in ["packed.logits", "packed.loss"] {
            assert_eq!(of(&given, name), of(&derived, name), "{name}");
        }
        // without the name of the case the row is one text
        let text = BTreeMap::from([("input_ids".to_owned(), bare["packed.input_ids"].clone())]);
        assert_ne!(of(&run(&fixture(), &text).unwrap(), "logits"), of(&given, "packed.logits"));
    }

    #[test]
    fn an_end_outside_the_vocabulary_ends_nothing() {
        let config = |fields: &str| {
            let text = format!("{{\"model_type\": \"cpm1\"{fields}}}");
            CpmConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
        };
        assert_eq!(config("").unwrap(), CpmConfig { decoder: LARGE, end: Some(7) });
        assert_eq!(config(r#", "eod_token": 30000"#).unwrap().end, None);
        let message = config(r#", "num_attention_heads": 7"#).unwrap_err().to_string();
        assert!(message.contains("`num_attention_heads`: expected a divisor of 2560, found 7"), "{message}");
    }
}
