//! M6-T (Yang et al. 2021, <https://arxiv.org/abs/2105.15082>): the mixture of experts of Alibaba's M6, in which every token
//! goes to the best expert of each of k prototypes, groups of experts with a router of their own, and what they give is
//! summed. A folder holds one layer.
//!
//! Neither weights nor code were released: the reference is the paper's formula, and names are ours.
//!
//! ```sh
//! volary forward path/to/layer --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::Device;
use volary_kernels::moe::gate::{Capacity, KTop1Gate};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase};
use volary_kernels::ops::Activation;
use volary_weights::{KeyMap, Rule};

use Rule::Rename;

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
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

/// Keys of the layer.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("router.{}.weight", "gate.KTop1.routers.{}.weight"),
    Rename("wi", "experts.Plain.up.weight"),
    Rename("bi", "experts.Plain.up.bias"),
    Rename("wo", "experts.Plain.down.weight"),
    Rename("bo", "experts.Plain.down.bias"),
]);

fn read(folder: &Folder) -> Result<M6MoeConfig, Error> {
    Ok(M6MoeConfig::parse(&folder.config("config.json")?)?)
}

/// The layer as the registry knows it.
pub const SYSTEM: System = System {
    name: "m6_moe",
    about: "layers of M6-T: the best expert of each of several prototypes",
    file: "models/m6.rs",
    tasks: &["forward"],
    proved: &["m6_moe"],
    presets: &[],
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("m6_moe")),
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

#[cfg(test)]
mod tests {
    use volary_weights::parameters;

    use super::*;

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
