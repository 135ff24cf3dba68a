//! M6-T (Yang et al. 2021, <https://arxiv.org/abs/2105.15082>): the mixture of experts of Alibaba's M6, in which every token
//! goes to the best expert of each of k prototypes, groups of experts with a router of their own, and what they give is
//! summed. A folder holds one layer, or the blocks of a model; they may be one, with which M6-10T's training began, until
//! `volary convert --delink` gives each parameters of its own.
//!
//! Neither weights nor code were released: the reference is the paper's formula, and names are ours. The presets are
//! architectures alone, counted and never loaded: M6-T's and M6-10T's own tables, and, in the same shape, models of the
//! sizes that BaGuaLu (<https://doi.org/10.1145/3503221.3508417>) and WuDao 2.0 were announced with, constructed by us.
//!
//! ```sh
//! volary forward path/to/layer --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{Attention, AttentionConfig, LayerNorm};
use volary_kernels::moe::gate::{Capacity, KTop1Gate};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase, Routing};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Stack, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct M6MoeConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between an expert's projections.
    pub d_ff: usize,
    /// Number of experts.
    pub n_experts: usize,
    /// Number of prototypes, which divides that of experts.
    pub n_prototypes: usize,
    /// How many tokens an expert takes over an even load.
    pub capacity_factor: f64,
    /// How many it takes in a second run, if there is one.
    pub tight_capacity: Option<usize>,
}

impl M6MoeConfig {
    /// `config.json`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let n_experts = experts(config, "num_experts")?;
        let n_prototypes = config.size_or("num_prototypes", 1)?;
        config.divides("num_prototypes", n_prototypes, n_experts)?;
        config.only("activation", &["\"gelu\"", "\"gelu (erf)\""])?;
        let capacity_factor = config.number_or("capacity_factor", 1.25)?;
        if capacity_factor < 0.0 {
            return Err(config.error("capacity_factor", "a number not below 0"));
        }
        Ok(Self {
            d_model: config.size("d_model")?,
            d_ff: config.size("d_ff")?,
            n_experts,
            n_prototypes,
            capacity_factor,
            tight_capacity: config
                .has("tight_capacity")
                .then(|| config.size("tight_capacity"))
                .transpose()?,
        })
    }

    /// An untrained layer. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Moe {
        let Self { d_model, d_ff, n_experts, n_prototypes, capacity_factor, .. } = *self;
        let capacity = Capacity::Factor(capacity_factor);
        let gate = KTop1Gate::new(d_model, n_experts, n_prototypes, capacity, device);
        MoeConfig::new(n_experts, d_model, d_ff).init(Gate::KTop1(gate), Activation::Gelu, device)
    }
}

/// Shape of the blocks of a whole model. What is before and after them was not published.
#[derive(Clone, Debug, PartialEq)]
pub struct M6Config {
    /// Number of blocks.
    pub n_layers: usize,
    /// Whether all blocks are one and the same, as M6-10T's were in the first part of its training.
    pub shared: bool,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// Width between an expert's projections, which have no biases.
    pub d_ff: usize,
    /// Number of experts of a block.
    pub n_experts: usize,
    /// Number of prototypes, which divides that of experts.
    pub n_prototypes: usize,
}

/// The blocks of a model.
#[derive(Module, Debug)]
pub struct M6 {
    /// One after the other; of a model whose blocks are the same, that one.
    pub blocks: Vec<M6Block>,
    #[module(skip)]
    n_layers: usize,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct M6Block {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the experts.
    pub norm2: LayerNorm,
    /// In the place of an MLP.
    pub moe: Moe,
}

impl M6Config {
    /// `config.json`, whose names are ours.
    ///
    /// # Errors
    /// If it is malformed.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let n_experts = experts(config, "num_experts")?;
        let n_prototypes = config.size_or("num_prototypes", 1)?;
        config.divides("num_prototypes", n_prototypes, n_experts)?;
        let (d_model, n_heads) = (config.size("d_model")?, config.size("num_heads")?);
        config.divides("num_heads", n_heads, d_model)?;
        Ok(Self {
            n_layers: config.blocks_or("num_layers", BASE.n_layers)?,
            shared: config.flag_or(SHARED, false)?,
            d_model,
            n_heads,
            d_ff: config.size("d_ff")?,
            n_experts,
            n_prototypes,
        })
    }

    /// Untrained blocks. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> M6 {
        let Self { n_layers, shared, d_model, n_heads, d_ff, n_experts, n_prototypes } = *self;
        let norm = || LayerNorm::new(d_model, 1e-5, device);
        let block = |_| {
            let gate = KTop1Gate::new(d_model, n_experts, n_prototypes, Capacity::Factor(1.25), device);
            let experts = MoeConfig::new(n_experts, d_model, d_ff).with_bias(false);
            M6Block {
                norm1: norm(),
                attention: AttentionConfig::new(d_model, n_heads).init(device),
                norm2: norm(),
                moe: experts.init(Gate::KTop1(gate), Activation::Gelu, device),
            }
        };
        M6 { blocks: (0..if shared { n_layers.min(1) } else { n_layers }).map(block).collect(), n_layers }
    }
}

impl M6 {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, and where each block sent the tokens. A token that finds no room
    /// passes a block's experts by.
    ///
    /// # Panics
    /// If the mask does not fit.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask, phase: Phase) -> (Tensor<3>, Vec<Routing>) {
        let (mut x, mut routings) = (x, Vec::with_capacity(self.n_layers));
        for block in self.blocks.iter().cycle().take(self.n_layers) {
            let attended = block.attention.forward(block.norm1.forward(x.clone()), mask);
            let (sum, normed) = block.norm2.add(x, attended);
            // the gate draws nothing
            let (y, routing) = block.moe.forward(normed, phase, &mut Noise::Seeded(0));
            x = sum + y;
            routings.push(routing);
        }
        (x, routings)
    }

    /// The same model with blocks of their own, if they were one (Lin et al. 2021, "pseudo to real"). What they compute is the
    /// same until they are trained.
    pub fn delink(self) -> Self {
        let copies =
            self.blocks.iter().cycle().take(self.n_layers).map(|block| block.clone().map(&mut Apart));
        Self { blocks: copies.collect(), n_layers: self.n_layers }
    }
}

/// Makes parameters that an optimizer does not take for those that they were copied from.
struct Apart;

impl ModuleMapper for Apart {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (_, value, mapper) = param.consume();
        // a leaf of its own, too, whose gradient is not the sum of all copies'
        Param::from_mapped_value(ParamId::new(), value.detach(), mapper)
    }
}

/// Yang et al. 2021, table 1: "base".
const BASE: M6Config = M6Config {
    n_layers: 5,
    shared: false,
    d_model: 1024,
    n_heads: 16,
    d_ff: 4096,
    n_experts: 32,
    n_prototypes: 1,
};
const T_10B: M6Config = M6Config { n_layers: 10, n_experts: 128, ..BASE };
const T_100B: M6Config = M6Config { n_layers: 24, n_experts: 512, ..BASE };
const T_1T: M6Config = M6Config { n_layers: 24, n_experts: 960, d_ff: 21248, ..BASE };
/// Lin et al. 2021, <https://arxiv.org/abs/2110.03888>.
const T_10T: M6Config = M6Config { n_layers: 48, n_experts: 10240, d_ff: 9984, n_prototypes: 80, ..BASE };
/// Constructed by us: as M6-10T, with as many experts as make its size.
const BAGUALU: M6Config = M6Config { n_experts: 14800, ..T_10T };
/// Constructed by us, in the same way.
const WUDAO_2: M6Config = M6Config { n_experts: 1780, n_prototypes: 2, ..T_10T };

const TABLE: &str = "counted here of the paper's table, blocks alone";
const OURS: &str = "constructed by us to the announced size, blocks alone: no table was published";

const fn preset(name: &'static str, config: M6Config, source: &'static str, parameters: usize) -> Preset {
    let (shape, weights) = (Shape::M6(config), Weights::Unreleased);
    Preset { name, shape, weights, license: "none stated", parameters, source }
}

/// Published sizes, architectures alone.
pub const PRESETS: &[Preset] = &[
    preset("M6-T-base", BASE, TABLE, 1_363_353_600),
    preset("M6-T-10B", T_10B, TABLE, 10_780_753_920),
    preset("M6-T-100B", T_100B, TABLE, 103_192_657_920),
    preset("M6-T-1T", T_1T, TABLE, 1_002_730_881_024),
    preset("M6-10T", T_10T, TABLE, 10_050_928_508_928),
    preset("BaGuaLu-14.5T", BAGUALU, OURS, 14_526_642_782_208),
    preset("WuDao-2.0", WUDAO_2, OURS, 1_747_300_712_448),
];

const LAYER: &[Rule] = &[
    Rename("router.{}.weight", "gate.KTop1.routers.{}.weight"),
    Rename("wi", "experts.Plain.up.weight"),
    Rename("bi", "experts.Plain.up.bias"),
    Rename("wo", "experts.Plain.down.weight"),
    Rename("bo", "experts.Plain.down.bias"),
    // for ranks, one by one
    Stack("experts.{}.wi", "experts.Plain.up.weight", Ones::Before(0)),
    Stack("experts.{}.bi", "experts.Plain.up.bias", Ones::Before(0)),
    Stack("experts.{}.wo", "experts.Plain.down.weight", Ones::Before(0)),
    Stack("experts.{}.bo", "experts.Plain.down.bias", Ones::Before(0)),
];
/// Keys of the layer.
pub const KEYS: KeyMap = KeyMap::new(LAYER);

const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];
const BLOCK: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("attention.query.", "attention.query.", LINEAR),
    Under("attention.key.", "attention.key.", LINEAR),
    Under("attention.value.", "attention.value.", LINEAR),
    Under("attention.output.", "attention.output.", LINEAR),
    Under("norm2.", "norm2.", LINEAR),
    Under("moe.", "moe.", LAYER),
];
/// Keys of a model's blocks: of one, where it is all of them.
pub const MODEL_KEYS: KeyMap = KeyMap::new(&[Under("blocks.{}.", "blocks.{}.", BLOCK)]);

/// The `model_type` of a folder with a model's blocks.
const MODEL: &str = "m6";
/// The field of its configuration that says whether these are one.
pub(crate) const SHARED: &str = "share_layers";

/// The shape of a model's blocks, if the folder holds such.
fn model(folder: &Folder) -> Result<Option<M6Config>, Error> {
    let config = folder.config("config.json")?;
    let is_model = config.text("model_type") == Some(MODEL);
    Ok(is_model.then(|| M6Config::parse(&config)).transpose()?)
}

/// The same, if they are all one.
pub(crate) fn shared(folder: &Folder) -> Result<Option<M6Config>, Error> {
    match System::of(folder)?.name == SYSTEM.name {
        true => Ok(model(folder)?.filter(|config| config.shared)),
        false => Ok(None),
    }
}

/// The key map of a folder.
pub(crate) fn keys(folder: &Folder) -> Result<&'static KeyMap, Error> {
    Ok(if model(folder)?.is_some() { &MODEL_KEYS } else { &KEYS })
}

fn read(folder: &Folder) -> Result<M6MoeConfig, Error> {
    Ok(M6MoeConfig::parse(&folder.config("config.json")?)?)
}

/// The layer as the registry knows it.
pub const SYSTEM: System = System {
    name: "m6_moe",
    about: "blocks and layers of M6-T: the best expert of each of several prototypes",
    file: "models/m6.rs",
    tasks: &["forward"],
    proved: &["m6_moe"],
    presets: PRESETS,
    recognises: |_, config| {
        config
            .and_then(|config| config.text("model_type"))
            .is_some_and(|family| ["m6_moe", MODEL].contains(&family))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| match model(folder)? {
        Some(config) => describe(folder, &config.init(&Device::flex()), &MODEL_KEYS),
        None => describe(folder, &read(folder)?.init(&Device::flex()), &KEYS),
    },
    open: |folder, options, device| {
        if let Some(config) = model(folder)? {
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
    layer: Moe,
    config: M6MoeConfig,
}

impl Forward for Runner {
    /// `x`, `[tokens, d_model]`.
    ///
    /// Gives `y`; `expert_index` (-1 is dropped) and `gate`, `[tokens, num_prototypes]`; all three again as `tight.` with
    /// the capacity of that name, if the configuration has one; and `aux_loss_switch_sum_over_prototypes`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let x = inputs.float::<2>("x");
        inputs.missing("x");
        let Some(x) = x else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [tokens, _] = x.dims();
        inputs.shaped("x", Some(x.dims()), [tokens, self.config.d_model]);
        inputs.finish()?;

        let mut runs = vec![("", self.layer.clone())];
        if let (Some(capacity), Gate::KTop1(gate)) = (self.config.tight_capacity, &self.layer.gate) {
            let gate = KTop1Gate { capacity: Capacity::Tokens(capacity), ..gate.clone() };
            let mut tight = self.layer.clone();
            tight.gate = Gate::KTop1(gate);
            runs.push(("tight.", tight));
        }
        let mut outputs = Outputs::new();
        for (case, layer) in runs {
            let (y, routing) = layer.forward(x.clone(), Phase::Eval, &mut Noise::Seeded(0));
            outputs.push(output(&format!("{case}y"), y));
            outputs.push((format!("{case}expert_index"), routing.experts.numbers()));
            outputs.push(output(&format!("{case}gate"), routing.weights));
            if case.is_empty() {
                let loss = routing.aux_loss;
                outputs.extend(loss.map(|loss| output("aux_loss_switch_sum_over_prototypes", loss)));
            }
        }
        Ok(outputs)
    }
}

/// Blocks behind the forward contract.
struct ModelRunner {
    model: M6,
    config: M6Config,
}

impl Forward for ModelRunner {
    /// `hidden_states`, `[batch, seq, d_model]`, and if wanted `attention_mask`, `[batch, seq]`.
    ///
    /// Gives `last_hidden_state`, and of each block `expert_index.N` (-1 is dropped), `[batch * seq, num_prototypes]`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let x = inputs.float::<3>("hidden_states");
        let real = inputs.mask("attention_mask");
        inputs.missing("hidden_states");
        let Some(x) = x else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [batch, seq, _] = x.dims();
        inputs.shaped("hidden_states", Some(x.dims()), [batch, seq, self.config.d_model]);
        inputs.shaped("attention_mask", real.as_ref().map(Tensor::dims), [batch, seq]);
        inputs.finish()?;

        let mask = real.map_or(Mask::Full, Mask::Padding);
        let (x, routings) = self.model.forward(x, &mask, Phase::Eval);
        let mut outputs = vec![output("last_hidden_state", x)];
        for (block, routing) in routings.into_iter().enumerate() {
            outputs.push((format!("expert_index.{block}"), routing.experts.numbers()));
        }
        Ok(outputs)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};
    use volary_weights::parameters;

    use super::*;

    /// Blocks in a row are those of their parts, and what has no room passes.
    #[test]
    fn a_token_without_room_passes_the_experts_by() {
        let device = Device::flex();
        let config = M6Config {
            n_layers: 1,
            shared: false,
            d_model: 8,
            n_heads: 2,
            d_ff: 6,
            n_experts: 4,
            n_prototypes: 2,
        };
        let mut model = config.init(&device);
        let x = Tensor::<3>::random([2, 5, 8], Distribution::Normal(0.0, 1.0), &device);
        let block = &model.blocks[0];
        let attended = x.clone() + block.attention.forward(block.norm1.forward(x.clone()), &Mask::Full);
        let (y, routings) = model.forward(x.clone(), &Mask::Full, Phase::Train);
        assert_eq!(routings[0].load.iter().sum::<usize>() + routings[0].dropped, 20);
        let mixed = (y - attended.clone()).abs().sum().into_scalar::<f32>();
        assert!(mixed > 1e-3, "{mixed}");
        if let Gate::KTop1(gate) = &mut model.blocks[0].moe.gate {
            gate.capacity = Capacity::Tokens(0);
        }
        let (y, _) = model.forward(x, &Mask::Full, Phase::Train);
        y.into_data().assert_approx_eq::<f32>(&attended.into_data(), Tolerance::default());
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        let config = M6MoeConfig {
            d_model: 4,
            d_ff: 6,
            n_experts: 6,
            n_prototypes: 3,
            capacity_factor: 1.25,
            tight_capacity: None,
        };
        for parameter in parameters(&config.init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
    }
}
