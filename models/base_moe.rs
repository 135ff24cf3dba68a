//! The mixture of experts of CPM-2-MoE (Zhang et al. 2021, <https://arxiv.org/abs/2106.10715>): a BASE layer (Lewis et al.
//! 2021, <https://arxiv.org/abs/2103.16716>), in which every rank holds one expert, a whole feed-forward block with its
//! norm and residual. A folder holds one layer, with the experts of all ranks.
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
use volary_kernels::moe::{Choices, ExpertMlpConfig, GatedExpertMlp, Routing, auction, best_assignment, mix};
use volary_kernels::ops::Activation;
use volary_kernels::ops::moe::of_each_row;
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Stack, StackTranspose};

use crate::config::{Config, ConfigError};
use crate::cpm2::ZH_EN;
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::t5::{T5, T5Config};
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

/// Shape of CPM-2-MoE: T5 1.1 whose MLPs are all [`BaseMoe`]s.
#[derive(Clone, Debug, PartialEq)]
pub struct Cpm2MoeConfig {
    /// All but the experts; `d_ff` is the width of one.
    pub t5: T5Config,
    /// Number of experts of a block.
    pub n_experts: usize,
}

/// CPM-2-MoE, to be counted. It does not run: by which expert's norm a token's affinities are found depends on the rank
/// that the token is on.
#[derive(Module, Debug)]
pub struct Cpm2Moe {
    /// Tokens, biases of distances, last norms and head. It has no blocks of its own.
    pub around: T5,
    /// The encoder's blocks.
    pub encoder: Vec<Cpm2MoeBlock>,
    /// The decoder's, with attention to what the encoder has read.
    pub decoder: Vec<Cpm2MoeBlock>,
}

/// A pre-norm block.
#[derive(Module, Debug)]
pub struct Cpm2MoeBlock {
    /// The norm before each attention.
    pub norms: Vec<RmsNorm>,
    /// Self-attention, and in the decoder cross-attention.
    pub attentions: Vec<Attention>,
    /// Experts with norms of their own.
    pub experts: BaseMoe,
}

impl Cpm2MoeConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Cpm2Moe {
        let T5Config { d_model, d_ff, rms_norm_eps, n_layers, n_decoder_layers, .. } = self.t5;
        let experts = BaseMoeConfig { d_model, d_ff, n_experts: self.n_experts, rms_norm_eps };
        let block = |attentions: usize| Cpm2MoeBlock {
            norms: (0..attentions).map(|_| self.t5.norm(device)).collect(),
            attentions: (0..attentions).map(|_| self.t5.attention(device)).collect(),
            experts: experts.init(device),
        };
        Cpm2Moe {
            around: T5Config { n_layers: 0, n_decoder_layers: 0, ..self.t5.clone() }.init(device),
            encoder: (0..n_layers).map(|_| block(1)).collect(),
            decoder: (0..n_decoder_layers).map(|_| block(2)).collect(),
        }
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

/// Keys of the layer, with the experts of all ranks.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("expert_centroids", "gate.centroids"),
    Stack("expert_network.{}.layer_norm.weight", "norms", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wi_0.weight", "experts.gate.weight", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wi_1.weight", "experts.up.weight", Ones::Before(0)),
    StackTranspose("expert_network.{}.dense_relu_dense.wo.weight", "experts.down.weight", Ones::Before(0)),
]);

fn read(folder: &Folder) -> Result<BaseMoeConfig, Error> {
    Ok(BaseMoeConfig::parse(&folder.config("config.json")?)?)
}

/// The layer as the registry knows it.
pub const SYSTEM: System = System {
    name: "base_moe",
    about: "layers of CPM-2-MoE: experts with an equal share of the tokens each",
    file: "models/base_moe.rs",
    tasks: &["forward"],
    proved: &["base_moe"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("base_moe")),
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &read(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
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
    }
}
