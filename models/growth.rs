//! Larger models made of smaller ones, which compute the same at first: mixtures of experts of dense models ("up-cycling",
//! Komatsuzaki et al. 2022, <https://arxiv.org/abs/2212.05055>), and M6-10T's layers of their own of layers that shared
//! their parameters ("pseudo to real", Lin et al. 2021, <https://arxiv.org/abs/2110.03888>).
//!
//! One tensor is held at a time, as everywhere where folders are written.

use std::path::Path;

use burn::tensor::TensorData;
use serde_json::{Map, Value, json};
use volary_multimodal::noise::Philox;
use volary_weights::format::{Checkpoint, Entry, Origin, Rearranged};
use volary_weights::{ConvertOptions, Dtype, KeyMap, Ones, Rule};

use Rule::{Rename, Stack, Under};

use crate::config::Config;
use crate::error::Error;
use crate::export::{Existing, Export, Progress, meant, write_folder};
use crate::folder::Folder;
use crate::llama::LlamaConfig;
use crate::registry::System;
use crate::{base_moe, cpm2, llama, m6};

/// A mixture that a dense model becomes. Every expert is a copy of the MLP, and gates are drawn anew.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Upcycle {
    /// What it becomes.
    pub into: Mixture,
    /// How many experts each layer gets.
    pub n_experts: usize,
    /// Of the gates.
    pub seed: u64,
}

/// The systems that a dense model may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mixture {
    /// A LLaMA becomes a Mixtral. A token's experts, which are the same, are weighed by what sums to 1: what comes out is
    /// what the dense model gives up to the rounding of these weights and of sums in another order.
    Mixtral {
        /// How many experts a token goes to.
        top_k: usize,
    },
    /// A CPM-2 becomes a CPM-2-MoE. Its one expert is not weighed: only sums may have another order.
    Base,
}

/// How the keys of one become those of the other.
struct Recipe {
    /// The system that is taken.
    from: &'static str,
    /// The experts' keys, as a stack of the MLP's.
    experts: KeyMap,
    /// The gate's key, by one of the MLP's.
    gates: KeyMap,
    /// The gate's values `[n_experts, d_model]`, of as many normally distributed numbers.
    draw: fn([usize; 2], Vec<f32>) -> Vec<f32>,
}

const MIXTRAL_BLOCK: &[Rule] = &[
    Stack("block_sparse_moe.experts.{}.w1.weight", "mlp.gate_proj.weight", Ones::Before(0)),
    Stack("block_sparse_moe.experts.{}.w3.weight", "mlp.up_proj.weight", Ones::Before(0)),
    Stack("block_sparse_moe.experts.{}.w2.weight", "mlp.down_proj.weight", Ones::Before(0)),
];
const MIXTRAL_GATE: &[Rule] = &[Rename("block_sparse_moe.gate.weight", "mlp.gate_proj.weight")];
const MIXTRAL: Recipe = Recipe {
    from: llama::SYSTEM.name,
    experts: KeyMap::new(&[
        Under("model.layers.{}.", "model.layers.{}.", MIXTRAL_BLOCK),
        Under("layers.{}.", "layers.{}.", MIXTRAL_BLOCK),
    ]),
    gates: KeyMap::new(&[
        Under("model.layers.{}.", "model.layers.{}.", MIXTRAL_GATE),
        Under("layers.{}.", "layers.{}.", MIXTRAL_GATE),
    ]),
    draw: narrow,
};

const BASE_BLOCK: &[Rule] = &[
    Stack("expert_network.{}.layer_norm.weight", "layer_norm.weight", Ones::Before(0)),
    Stack("expert_network.{}.dense_relu_dense.wi_0.weight", "dense_relu_dense.wi_0.weight", Ones::Before(0)),
    Stack("expert_network.{}.dense_relu_dense.wi_1.weight", "dense_relu_dense.wi_1.weight", Ones::Before(0)),
    Stack("expert_network.{}.dense_relu_dense.wo.weight", "dense_relu_dense.wo.weight", Ones::Before(0)),
];
const BASE_GATE: &[Rule] = &[Rename("expert_centroids", "dense_relu_dense.wi_0.weight")];
const BASE: Recipe = Recipe {
    from: cpm2::SYSTEM.name,
    experts: KeyMap::new(&[
        Under("encoder.blocks.{}.ff.", "encoder.blocks.{}.ff.", BASE_BLOCK),
        Under("decoder.blocks.{}.ff.", "decoder.blocks.{}.ff.", BASE_BLOCK),
    ]),
    gates: KeyMap::new(&[
        Under("encoder.blocks.{}.ff.", "encoder.blocks.{}.ff.", BASE_GATE),
        Under("decoder.blocks.{}.ff.", "decoder.blocks.{}.ff.", BASE_GATE),
    ]),
    draw: orthogonal,
};

impl Upcycle {
    const fn recipe(&self) -> &'static Recipe {
        match self.into {
            Mixture::Mixtral { .. } => &MIXTRAL,
            Mixture::Base => &BASE,
        }
    }

    /// The mixture's weights.
    ///
    /// # Errors
    /// If a tensor is there under a name that an expert gets.
    pub fn checkpoint(&self, dense: Box<dyn Checkpoint>) -> Result<Box<dyn Checkpoint>, Error> {
        let Recipe { experts, gates, draw, .. } = self.recipe();
        let (mut tensors, mut layers) = (Vec::new(), 0..);
        for entry in dense.entries() {
            if let (Some(name), [_, d_model]) = (gates.keys(&entry.name)?.pop(), &entry.shape[..]) {
                let shape = [self.n_experts, *d_model];
                let normals = Philox::new(self.seed, layers.next().unwrap_or(0)).normals(shape[0] * shape[1]);
                let values = TensorData::new(draw(shape, normals), shape);
                let (values, dtype) = match entry.dtype {
                    Dtype::BF16 => (values.convert::<half::bf16>(), Dtype::BF16),
                    Dtype::F16 => (values.convert::<half::f16>(), Dtype::F16),
                    _ => (values, Dtype::F32),
                };
                let made = Origin::Made(values.as_bytes().to_vec());
                tensors.push((Entry { name, shape: shape.to_vec(), dtype }, made));
            }
            match experts.stacked_keys(&entry.name, self.n_experts)? {
                names if names.is_empty() => tensors.push((entry.clone(), Origin::whole(&entry.name))),
                names => tensors.extend(
                    names
                        .into_iter()
                        .map(|name| (Entry { name, ..entry.clone() }, Origin::whole(&entry.name))),
                ),
            }
        }
        Ok(Box::new(Rearranged::new(dense.path().to_owned(), vec![dense], tensors)?))
    }

    /// The mixture's configuration.
    ///
    /// # Errors
    /// If the dense model has what the mixture has not.
    fn config(&self, dense: &Config) -> Result<Vec<u8>, Error> {
        let mut fields = dense.values();
        match self.into {
            Mixture::Mixtral { top_k } => {
                dense.only("attention_bias", &["false"])?;
                dense.only("mlp_bias", &["false"])?;
                if top_k == 0 || top_k > self.n_experts {
                    let problem = format!("{top_k} experts for each token, of {}", self.n_experts);
                    return Err(Error::Request { problems: vec![problem] });
                }
                let LlamaConfig {
                    vocab_size,
                    n_positions,
                    d_model,
                    d_ff,
                    n_layers,
                    n_heads,
                    n_kv_heads,
                    rms_norm_eps,
                    rope_theta,
                    ..
                } = LlamaConfig::parse(dense)?;
                // what both may leave out means something else in each
                for (field, value) in [
                    ("vocab_size", json!(vocab_size)),
                    ("max_position_embeddings", json!(n_positions)),
                    ("hidden_size", json!(d_model)),
                    ("intermediate_size", json!(d_ff)),
                    ("num_hidden_layers", json!(n_layers)),
                    ("num_attention_heads", json!(n_heads)),
                    ("num_key_value_heads", json!(n_kv_heads)),
                    ("rms_norm_eps", json!(rms_norm_eps)),
                    ("tie_word_embeddings", json!(false)),
                ] {
                    fields.entry(field).or_insert(value);
                }
                if !dense.has("rope_parameters") {
                    fields.entry("rope_theta").or_insert(json!(rope_theta));
                }
                for field in ["attention_bias", "mlp_bias", "pretraining_tp"] {
                    fields.remove(field);
                }
                let class = match dense.first_of("architectures") {
                    Some("LlamaModel") => "MixtralModel",
                    _ => "MixtralForCausalLM",
                };
                fields.insert("architectures".into(), json!([class]));
                fields.insert("model_type".into(), json!("mixtral"));
                fields.insert("num_local_experts".into(), json!(self.n_experts));
                fields.insert("num_experts_per_tok".into(), json!(top_k));
            }
            Mixture::Base => {
                fields.insert("model_type".into(), json!(base_moe::WHOLE));
                fields.insert("num_experts".into(), json!(self.n_experts));
            }
        }
        Ok(written(&fields))
    }
}

fn written(fields: &Map<String, Value>) -> Vec<u8> {
    format!("{:#}\n", Value::Object(fields.clone())).into_bytes()
}

/// Writes the mixture that the folder's dense model becomes, and its other files as they are.
///
/// # Errors
/// As [`convert_folder`](crate::export::convert_folder); if the folder's model is not what becomes such a mixture.
pub fn upcycle_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    upcycle: &Upcycle,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Export, Error> {
    let system = System::of(source)?;
    if system.name != upcycle.recipe().from || !source.has("config.json") {
        return Err(Error::Task { system: system.name, task: "become this mixture of experts" });
    }
    let mut config = source.config("config.json")?;
    if upcycle.into == Mixture::Base {
        let known = json!({ "vocab_size": cpm2::config_of(source)?.vocab_size });
        config = Config::parse(config.file(), known.to_string().as_bytes())?.overlaid(&config);
    }
    let config = upcycle.config(&config)?;
    let open = |folder: &Folder| upcycle.checkpoint(meant(folder)?);
    write_folder(source, out, existing, options, progress, &open, &|_| config.clone())
}

/// Writes the model whose layers have parameters of their own that a [`crate::m6`] folder's, whose layers share them,
/// becomes, and its other files as they are.
///
/// # Errors
/// As [`convert_folder`](crate::export::convert_folder); if the folder holds no such model.
pub fn delink_folder(
    source: &Folder,
    out: &Path,
    existing: Existing,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<Export, Error> {
    let system = System::of(source)?;
    let Some(shape) = m6::shared(source)? else {
        return Err(Error::Task { system: system.name, task: "be delinked: its layers share no parameters" });
    };
    let mut fields = source.config("config.json")?.values();
    fields.insert(m6::SHARED.into(), json!(false));
    let open = |folder: &Folder| delinked(meant(folder)?, shape.n_layers);
    write_folder(source, out, existing, options, progress, &open, &|_| written(&fields))
}

/// The first block's tensors for each of so many.
fn delinked(shared: Box<dyn Checkpoint>, n_layers: usize) -> Result<Box<dyn Checkpoint>, Error> {
    let mut tensors = Vec::new();
    for entry in shared.entries() {
        match entry.name.strip_prefix("blocks.0.") {
            Some(rest) => tensors.extend((0..n_layers).map(|layer| {
                (
                    Entry { name: format!("blocks.{layer}.{rest}"), ..entry.clone() },
                    Origin::whole(&entry.name),
                )
            })),
            None => tensors.push((entry.clone(), Origin::whole(&entry.name))),
        }
    }
    Ok(Box::new(Rearranged::new(shared.path().to_owned(), vec![shared], tensors)?))
}

/// With the deviation of `transformers`' new layers.
fn narrow(_: [usize; 2], normals: Vec<f32>) -> Vec<f32> {
    normals.into_iter().map(|value| 0.02 * value).collect()
}

/// Unit rows at right angles to each other (Gram and Schmidt), as many as there can be at a time.
fn orthogonal([_, columns]: [usize; 2], normals: Vec<f32>) -> Vec<f32> {
    let mut rows: Vec<Vec<f64>> = Vec::new();
    for row in normals.chunks(columns.max(1)) {
        let mut row: Vec<f64> = row.iter().copied().map(f64::from).collect();
        for other in &rows[rows.len() - rows.len() % columns..] {
            let along: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum();
            row.iter_mut().zip(other).for_each(|(value, other)| *value -= along * other);
        }
        let length = row.iter().map(|value| value * value).sum::<f64>().sqrt();
        rows.push(row.into_iter().map(|value| value / length.max(f64::MIN_POSITIVE)).collect());
    }
    rows.concat().into_iter().map(|value| value as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn centroids_are_at_right_angles() {
        let rows = orthogonal([7, 5], Philox::new(1, 0).normals(35));
        let dot = |a: usize, b: usize| {
            (0..5).map(|at| f64::from(rows[a * 5 + at]) * f64::from(rows[b * 5 + at])).sum::<f64>()
        };
        for group in [0..5, 5..7] {
            for a in group.clone() {
                for b in group.clone() {
                    let expected = f64::from(u8::from(a == b));
                    assert!((dot(a, b) - expected).abs() < 1e-6, "{a} and {b}: {}", dot(a, b));
                }
            }
        }
    }
}
