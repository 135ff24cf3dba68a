//! The mixture of experts of CPM-2-MoE (Zhang et al. 2021, <https://arxiv.org/abs/2106.10715>): a BASE layer (Lewis et al.
//! 2021, <https://arxiv.org/abs/2103.16716>), in which every rank holds one expert, a whole feed-forward block with its
//! norm and residual. A folder holds one layer, with the experts of all ranks, or a whole model, CPM-2 ([`crate::cpm2`])
//! with such layers for its feed-forward blocks: `volary convert --upcycle base` makes one of a dense CPM-2, as the authors
//! did.
//!
//! The formula is that of `TsinghuaAI/CPM-2`, branch `moe`: a rank normalises its tokens with its own expert's norm, and
//! their products with the experts' fixed centroids are the affinities by which tokens are assigned. Nothing is weighed by
//! them.
//!
//! ```sh
//! volary forward path/to/layer --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, TensorData};
use volary_kernels::layers::{Attention, RmsNorm};
use volary_kernels::moe::gate::BaseGate;
use volary_kernels::moe::{
    Choices, ExpertMlpConfig, GatedExpertMlp, Phase, Routing, auction, best_assignment, mix,
};
use volary_kernels::ops::moe::of_each_row;
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Ignore, Rename, Stack, StackTranspose, Under};

use crate::config::{Config, ConfigError};
use crate::cpm2::{self, CROSS_ATTENTION, Given, SELF_ATTENTION, ZH_EN};
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::t5::{T5, T5Config, T5Input, T5Output};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct BaseMoeConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between an expert's projections.
    pub d_ff: usize,
    /// Number of experts, and of ranks.
    pub n_experts: usize,
    /// Added to mean squares.
    pub rms_norm_eps: f64,
}

/// A layer.
#[derive(Module, Debug)]
pub struct BaseMoe {
    /// Says where tokens go.
    pub gate: BaseGate,
    /// `[n_experts, d_model]`: the norm of each expert.
    pub norms: Param<Tensor<2>>,
    /// Three projections each.
    pub experts: GatedExpertMlp,
    #[module(skip)]
    eps: f64,
}

impl BaseMoeConfig {
    /// `config.json`.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        Ok(Self {
            d_model: config.size("d_model")?,
            d_ff: config.size("d_ff")?,
            n_experts: experts(config, "num_experts")?,
            rms_norm_eps: config.number_or("layer_norm_epsilon", 1e-6)?,
        })
    }

    /// An untrained layer. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> BaseMoe {
        let Self { d_model, d_ff, n_experts, rms_norm_eps: eps } = *self;
        BaseMoe {
            gate: BaseGate::new(d_model, n_experts, device),
            norms: Initializer::Ones.init([n_experts, d_model], device),
            experts: ExpertMlpConfig::new(n_experts, d_model, d_ff).with_bias(false).init_gated(device),
            eps,
        }
    }
}

impl BaseMoe {
    /// The affinities of the tokens of each rank: `[ranks, tokens, d_model] -> [ranks, tokens, n_experts]`.
    ///
    /// # Panics
    /// If there are not as many ranks as experts.
    pub fn affinity(&self, x: Tensor<3>) -> Tensor<3> {
        let [ranks, tokens, d_model] = x.dims();
        let features = rms(x, self.eps) * self.norms.val().unsqueeze_dim::<3>(1); // each rank's own
        let affinity = self.gate.affinity(features.reshape([ranks * tokens, d_model]));
        affinity.reshape([ranks as i64, tokens as i64, -1])
    }

    /// Each token through the expert that it likes best, by the norm of the rank that all of them are on:
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If there is no such rank.
    pub fn best(&self, x: Tensor<3>, rank: usize) -> Tensor<3> {
        let [batch, seq, d_model] = x.dims();
        let x = x.reshape([batch * seq, d_model]);
        let features = rms(x.clone(), self.eps) * self.norms.val().narrow(0, rank, 1);
        let experts = self.gate.route(features, Phase::Eval).experts.ids;
        self.forward(x, experts.into_iter().flatten().collect()).reshape([batch, seq, d_model])
    }

    /// Each token through its expert: `[tokens, d_model] -> [tokens, d_model]`.
    ///
    /// # Panics
    /// If there are not as many choices as tokens.
    pub fn forward(&self, x: Tensor<2>, experts: Vec<usize>) -> Tensor<2> {
        let [n_experts, _] = self.norms.dims();
        let ids = experts.into_iter().map(Some).collect();
        let weights = Tensor::ones([x.dims()[0], 1], &x.device());
        let routing = Routing::new(Choices { ids, top_k: 1, n_experts }, weights, None);
        mix(x, &routing, |rows, dispatch| {
            let normed = rms(rows.clone(), self.eps) * of_each_row(self.norms.val(), dispatch);
            rows + self.experts.forward(normed, Activation::GeluTanh, dispatch)
        })
    }
}

/// Shape of CPM-2-MoE: CPM-2 whose MLPs are all [`BaseMoe`]s.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpm2MoeConfig {
    /// All but the experts; `d_ff` is the width of one.
    pub t5: T5Config,
    /// Number of experts of a block.
    pub n_experts: usize,
}

/// CPM-2-MoE.
#[derive(Module, Debug)]
pub struct Cpm2Moe {
    /// Tokens, biases of distances, last norms and head. It has no blocks of its own.
    pub around: T5,
    /// The encoder's blocks.
    pub encoder: Vec<Cpm2MoeEncoderBlock>,
    /// The decoder's.
    pub decoder: Vec<Cpm2MoeDecoderBlock>,
}

/// A pre-norm block of the encoder.
#[derive(Module, Debug)]
pub struct Cpm2MoeEncoderBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Experts with norms of their own.
    pub experts: BaseMoe,
}

/// A pre-norm block of the decoder.
#[derive(Module, Debug)]
pub struct Cpm2MoeDecoderBlock {
    /// Before the self-attention.
    pub norm1: RmsNorm,
    /// Causal self-attention.
    pub attention: Attention,
    /// Before the cross-attention.
    pub norm2: RmsNorm,
    /// Attention to the encoder's states, without a bias of distances.
    pub cross: Attention,
    /// Experts with norms of their own.
    pub experts: BaseMoe,
}

impl Cpm2MoeConfig {
    /// `config.json`: CPM-2's, and `num_experts`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let t5 = cpm2::parse(config, config.size_or("vocab_size", CPM2_MOE.t5.vocab_size)?)?;
        Ok(Self { t5, n_experts: experts(config, "num_experts")? })
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Cpm2Moe {
        let t5 = &self.t5;
        let T5Config { d_model, d_ff, rms_norm_eps, n_layers, n_decoder_layers, .. } = *t5;
        let experts = BaseMoeConfig { d_model, d_ff, n_experts: self.n_experts, rms_norm_eps };
        let encoder = |_| Cpm2MoeEncoderBlock {
            norm1: t5.norm(device),
            attention: t5.attention(device),
            experts: experts.init(device),
        };
        let decoder = |_| Cpm2MoeDecoderBlock {
            norm1: t5.norm(device),
            attention: t5.attention(device),
            norm2: t5.norm(device),
            cross: t5.attention(device),
            experts: experts.init(device),
        };
        Cpm2Moe {
            around: T5Config { n_layers: 0, n_decoder_layers: 0, ..t5.clone() }.init(device),
            encoder: (0..n_layers).map(encoder).collect(),
            decoder: (0..n_decoder_layers).map(decoder).collect(),
        }
    }
}

impl Cpm2Moe {
    /// The states of a batch of texts and of what is written of them, which are all on one rank: by its expert's norm the
    /// affinities of tokens are found.
    ///
    /// # Panics
    /// If there is no such rank, an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: T5Input, rank: usize) -> T5Output {
        let T5Input { ids, mask, decoder_ids, decoder_mask, cross_mask } = input;
        let T5 { encoder, decoder, .. } = &self.around;

        let mut x = encoder.tokens.forward(ids); // [batch, seq, d_model]
        let [_, seq, _] = x.dims();
        let mask = Mask::All(vec![Mask::Bias(encoder.bias.forward(seq, seq)), mask]);
        for block in &self.encoder {
            x = x.clone() + block.attention.forward(block.norm1.forward(x), &mask);
            x = block.experts.best(x, rank);
        }
        let read = encoder.norm.forward(x);

        let mut x = encoder.tokens.forward(decoder_ids); // [batch, written, d_model]
        let [_, written, _] = x.dims();
        let bias = Mask::Bias(decoder.bias.forward(written, written));
        let mask = Mask::All(vec![bias, Mask::Causal, decoder_mask]);
        for block in &self.decoder {
            let attended = block.attention.forward(block.norm1.forward(x.clone()), &mask);
            let (sum, normed) = block.norm2.add(x, attended);
            let query = block.cross.queries(normed); // [batch, n_heads, written, d_head]
            let (key, value) = block.cross.keys_values(read.clone());
            x = sum + block.cross.attend(query, key, value, &cross_mask);
            x = block.experts.best(x, rank);
        }
        T5Output { encoder: read, decoder: decoder.norm.forward(x) }
    }
}

/// The file `300000.tar`.
const CPM2_MOE: Cpm2MoeConfig = Cpm2MoeConfig { t5: T5Config { vocab_size: 52736, ..ZH_EN }, n_experts: 32 };

/// Published sizes, to be counted.
pub const PRESETS: &[Preset] = &[Preset {
    name: "cpm-2-moe-300000",
    shape: Shape::Cpm2Moe(CPM2_MOE),
    weights: Weights::Application,
    license: "by application to BAAI",
    parameters: 198_550_269_952,
    source: "counted here of the released code's sizes; 198 B by its authors",
}];

/// Rows over the root of their mean square.
fn rms<const D: usize>(x: Tensor<D>, eps: f64) -> Tensor<D> {
    x.clone() / (x.square().mean_dim(D - 1) + eps).sqrt()
}

const LAYER: &[Rule] = &[
    Rename("expert_centroids", "gate.centroids"),
    Stack("expert_network.{}.layer_norm.weight", "norms", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wi_0.weight", "experts.gate.weight", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wi_1.weight", "experts.up.weight", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wo.weight", "experts.down.weight", Ones::Before(0)),
];
/// Keys of the layer, with the experts of all ranks.
pub const KEYS: KeyMap = KeyMap::new(LAYER);
/// Keys of a model: CPM-2's, and the layer's in the place of its feed-forward blocks'.
pub const MODEL_KEYS: KeyMap = KeyMap::new(&[
    Rename("word_embeds.weight", "around.encoder.tokens.weight"),
    Ignore("encoder.word_embeds.weight"), // copies
    Ignore("decoder.word_embeds.weight"),
    Rename(
        "encoder.blocks.0.self_attn.self_attn.relative_attention_bias.weight",
        "around.encoder.bias.weight",
    ),
    Under("encoder.blocks.{}.self_attn.", "encoder.{}.", SELF_ATTENTION),
    Under("encoder.blocks.{}.ff.", "encoder.{}.experts.", LAYER),
    Rename("encoder.final_layernorm.weight", "around.encoder.norm.weight"),
    Rename(
        "decoder.blocks.0.self_attn.self_attn.relative_attention_bias.weight",
        "around.decoder.bias.weight",
    ),
    Under("decoder.blocks.{}.self_attn.", "decoder.{}.", SELF_ATTENTION),
    Under("decoder.blocks.{}.cross_attn.", "decoder.{}.", CROSS_ATTENTION),
    Under("decoder.blocks.{}.ff.", "decoder.{}.experts.", LAYER),
    Rename("decoder.final_layernorm.weight", "around.decoder.norm.weight"),
    Rename("lm_head.weight", "around.head.weight"),
]);

/// The `model_type` of a whole model's folder.
pub(crate) const WHOLE: &str = "cpm2_moe";

/// The configuration of a whole model, if the folder holds one.
fn whole(folder: &Folder) -> Result<Option<Cpm2MoeConfig>, Error> {
    let config = folder.config("config.json")?;
    let is_whole = config.text("model_type") == Some(WHOLE);
    Ok(is_whole.then(|| Cpm2MoeConfig::parse(&config)).transpose()?)
}

/// The key map of a folder.
pub(crate) fn keys(folder: &Folder) -> Result<&'static KeyMap, Error> {
    Ok(if whole(folder)?.is_some() { &MODEL_KEYS } else { &KEYS })
}

fn read(folder: &Folder) -> Result<BaseMoeConfig, Error> {
    Ok(BaseMoeConfig::parse(&folder.config("config.json")?)?)
}

/// The layer as the registry knows it.
pub const SYSTEM: System = System {
    name: "base_moe",
    about: "CPM-2-MoE and its layers: experts with an equal share of the tokens each",
    file: "models/base_moe.rs",
    tasks: &["forward"],
    proved: &["base_moe"],
    presets: PRESETS,
    recognises: |_, config| {
        config
            .and_then(|config| config.text("model_type"))
            .is_some_and(|family| ["base_moe", WHOLE].contains(&family))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| match whole(folder)? {
        Some(config) => describe(folder, &config.init(&Device::flex()), &MODEL_KEYS),
        None => describe(folder, &read(folder)?.init(&Device::flex()), &KEYS),
    },
    open: |folder, options, device| {
        if let Some(config) = whole(folder)? {
            let model = fill(folder, config.init(device), &MODEL_KEYS, options)?;
            return Ok(Box::new(ModelRunner { model, config }));
        }
        let config = read(folder)?;
        let layer = fill(folder, config.init(device), &KEYS, options)?;
        Ok(Box::new(Runner { layer, config }))
    },
    generator: None,
};

/// A layer behind the forward contract.
struct Runner {
    layer: BaseMoe,
    config: BaseMoeConfig,
}

impl Forward for Runner {
    /// `rank_features`, `[ranks, tokens, d_model]`, as many ranks as experts.
    ///
    /// Gives `affinity`, and for the `balanced` assignment of the largest sum, for that of the `repo_auction`, and for
    /// `argmax`, by which models are used: `assignment_...` `[ranks, tokens]`, and `y_...`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let BaseMoeConfig { d_model, n_experts, .. } = self.config;
        let x = inputs.float::<3>("rank_features");
        inputs.missing("rank_features");
        let Some(x) = x else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [_, tokens, _] = x.dims();
        inputs.shaped("rank_features", Some(x.dims()), [n_experts, tokens, d_model]);
        inputs.finish()?;

        let affinity = self.layer.affinity(x.clone());
        let scores: Vec<f32> = affinity.to_data().convert::<f32>().iter::<f32>().collect();
        let argmax = |scores: &[f32], n_experts: usize| -> Vec<usize> {
            let best =
                |row: &[f32]| (1..n_experts).fold(0, |best, at| if row[at] > row[best] { at } else { best });
            scores.chunks(n_experts).map(best).collect()
        };
        type Assign<'a> = &'a dyn Fn(&[f32], usize) -> Vec<usize>;
        let ways: [(&str, Assign); 3] =
            [("balanced", &best_assignment), ("repo_auction", &auction), ("argmax", &argmax)];
        let mut outputs = vec![output("affinity", affinity)];
        for (name, assign) in ways {
            let of_rank = |scores: &[f32]| assign(scores, n_experts);
            let assigned: Vec<usize> = scores.chunks(tokens * n_experts).flat_map(of_rank).collect();
            let numbers = assigned.iter().map(|&expert| expert as i64).collect();
            outputs.push((format!("assignment_{name}"), TensorData::new(numbers, [n_experts, tokens])));
            let y = self.layer.forward(x.clone().reshape([n_experts * tokens, d_model]), assigned);
            outputs.push(output(&format!("y_{name}"), y.reshape([n_experts, tokens, d_model])));
        }
        Ok(outputs)
    }
}

/// A model behind the forward contract.
struct ModelRunner {
    model: Cpm2Moe,
    config: Cpm2MoeConfig,
}

impl Forward for ModelRunner {
    /// As [`crate::cpm2`]'s. Everything is on the first rank.
    ///
    /// Gives `lm_logits` and `encoder_last_hidden_state`.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        let Some(given) = Given::of(inputs, &self.config.t5)? else { return Ok(Outputs::new()) };
        let T5Output { encoder, decoder } = self.model.forward(given.input(), 0);
        let logits = self.model.around.logits(decoder);
        Ok(vec![output("lm_logits", logits), output("encoder_last_hidden_state", encoder)])
    }
}

#[cfg(test)]
mod tests {
    use volary_weights::parameters;

    use super::*;

    #[test]
    fn every_parameter_has_keys_and_they_lead_back() {
        let config = BaseMoeConfig { d_model: 4, d_ff: 6, n_experts: 3, rms_norm_eps: 1e-6 };
        for parameter in parameters(&config.init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
        let t5 = T5Config { n_layers: 2, n_decoder_layers: 3, vocab_size: 9, ..ZH_EN };
        for parameter in parameters(&Cpm2MoeConfig { t5, n_experts: 2 }.init(&Device::flex())) {
            let keys = MODEL_KEYS.keys(&parameter.path).unwrap();
            assert!(MODEL_KEYS.paths(&keys[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
        }
    }
}
