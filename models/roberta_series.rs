//! The text encoder of AltDiffusion: XLM-R, of which every token's state is mapped to the width that a diffusion model
//! was trained with (BAAI, <https://arxiv.org/abs/2211.06679>; -m18: <https://arxiv.org/abs/2308.09991>).
//!
//! The first ones map what the last block gives. Where `has_pre_transformation` is set (-m18), what goes into the last
//! block is normed and mapped, as Stable Diffusion 2 does with its own encoder. The numbers match diffusers
//! (`RobertaSeriesModelWithTransformation`).
//!
//! ```sh
//! volary forward path/to/AltDiffusion/text_encoder --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{LayerNorm, Linear, LinearConfig};
use volary_weights::{KeyMap, Rule};

use Rule::{Ignore, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, XLM_ROBERTA_LARGE};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct RobertaSeriesConfig {
    /// XLM-R, without a pooler.
    pub roberta: BertConfig,
    /// Width of what the diffusion model reads.
    pub d_context: usize,
    /// Which states are mapped.
    pub mapped: Mapped,
}

/// Which states are mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapped {
    /// What the last block gives.
    Last,
    /// What goes into the last block, normed.
    NormedBeforeLast,
}

/// An encoder.
#[derive(Module, Debug)]
pub struct RobertaSeries {
    /// Bidirectional, post-norm.
    pub roberta: Bert,
    /// On what goes into the last block, if that is mapped.
    pub norm: Option<LayerNorm>,
    /// `[d_context, d_model]`.
    pub transformation: Linear,
}

/// What an encoder gives.
#[derive(Clone, Debug)]
pub struct RobertaSeriesOutput {
    /// After the last block, `[batch, seq, d_model]`.
    pub hidden: Tensor<3>,
    /// What the diffusion model reads, `[batch, seq, d_context]`.
    pub context: Tensor<3>,
}

impl RobertaSeriesConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> RobertaSeries {
        let BertConfig { d_model, layer_norm_eps, .. } = self.roberta;
        let norm = || LayerNorm::new(d_model, layer_norm_eps, device);
        RobertaSeries {
            roberta: self.roberta.init(device),
            norm: (self.mapped == Mapped::NormedBeforeLast).then(norm),
            transformation: LinearConfig::new(d_model, self.d_context).init(device),
        }
    }
}

impl RobertaSeries {
    /// Encodes a batch of texts.
    ///
    /// # Panics
    /// As [`Bert::forward`].
    pub fn forward(&self, input: impl Into<BertInput>) -> RobertaSeriesOutput {
        let (input, roberta) = (input.into(), &self.roberta);
        let x = roberta.norm.forward(roberta.embed(roberta.tokens.forward(input.ids.clone()), &input));
        let [before, hidden] = roberta.encode_last_two(x, &input.mask); // [batch, seq, d_model]
        let mapped = match &self.norm {
            Some(norm) => norm.forward(before),
            None => hidden.clone(),
        };
        RobertaSeriesOutput { hidden, context: self.transformation.forward(mapped) }
    }
}

impl RobertaSeriesConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of diffusers.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let pre = config.flag_or("has_pre_transformation", false)?;
        Ok(Self {
            roberta: BertConfig { pooler: false, ..BertConfig::parse(config)? },
            d_context: config.size_or("project_dim", 512)?,
            mapped: if pre { Mapped::NormedBeforeLast } else { Mapped::Last },
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.mapped {
            Mapped::Last => &KEYS,
            Mapped::NormedBeforeLast => &KEYS_PRE,
        }
    }
}

/// Keys of `RobertaSeriesModelWithTransformation`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Ignore("logit_scale"),
    Under("roberta.", "roberta.", bert::TRUNK_WITHOUT_POOLER),
    Under("transformation.", "transformation.", bert::LINEAR),
]);

/// The same with `has_pre_transformation`: what would map the last states is there and has no use.
pub const KEYS_PRE: KeyMap = KeyMap::new(&[
    Ignore("logit_scale"),
    Under("roberta.", "roberta.", bert::TRUNK_WITHOUT_POOLER),
    Under("pre_LN.", "norm.", bert::LINEAR),
    Under("transformation_pre.", "transformation.", bert::LINEAR),
    Ignore("transformation.{*}"),
]);

/// The encoder as the registry knows it.
pub const SYSTEM: System = System {
    name: "roberta_series",
    about: "AltDiffusion's text encoder: XLM-R mapped to a diffusion model's width",
    file: "models/roberta_series.rs",
    tasks: &["forward"],
    proved: &["roberta_series", "roberta_series_pre"],
    presets: PRESETS,
    recognises: |_, config| {
        let series = |architecture: &str| architecture == "RobertaSeriesModelWithTransformation";
        config.is_some_and(|config| config.first_of("architectures").is_some_and(series))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = RobertaSeriesConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let config = RobertaSeriesConfig::of(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// An encoder behind the forward contract.
struct Runner {
    model: RobertaSeries,
    config: RobertaSeriesConfig,
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let input = self.config.roberta.read(&mut inputs);
        inputs.finish()?;
        let Some(input) = input else { return Ok(Outputs::new()) }; // finished with an error
        let RobertaSeriesOutput { hidden, context } = self.model.forward(input);
        Ok(vec![output("last_hidden_state", hidden), output("projection_state", context)])
    }
}

pub(crate) const ALT: RobertaSeriesConfig = RobertaSeriesConfig {
    roberta: BertConfig { pooler: false, ..XLM_ROBERTA_LARGE },
    d_context: 768,
    mapped: Mapped::Last,
};
pub(crate) const ALT_M18: RobertaSeriesConfig =
    RobertaSeriesConfig { d_context: 1024, mapped: Mapped::NormedBeforeLast, ..ALT };

const fn preset(name: &'static str, config: RobertaSeriesConfig, parameters: usize) -> Preset {
    Preset {
        name,
        shape: Shape::RobertaSeries(config),
        weights: Weights::Elsewhere("hub, a part of the pipeline"),
        license: "CreativeML OpenRAIL-M",
        parameters,
        source: "counted here, without the pooler and what else has no use",
    }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("AltDiffusion text encoder", ALT, 559_628_032),
    preset("AltDiffusion-m9 text encoder", ALT, 559_628_032),
    preset("AltDiffusion-m18 text encoder", ALT_M18, 559_892_480),
];

#[cfg(test)]
mod tests {
    use volary_weights::parameters;

    use super::*;

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        for config in [ALT, ALT_M18] {
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = config.keys().keys(&parameter.path).unwrap();
                assert_eq!(keys.len(), 1, "{}", parameter.path);
                assert_eq!(config.keys().paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
    }

    #[test]
    fn only_the_states_before_the_last_block_are_mapped_where_that_is_asked_for() {
        let device = Device::flex();
        let roberta = BertConfig {
            vocab_size: 20,
            n_positions: 12,
            d_model: 8,
            d_ff: 16,
            n_layers: 2,
            n_heads: 2,
            ..ALT.roberta
        };
        let ids = Tensor::from_data([[0, 7, 9, 2]], &device);
        for (mapped, same) in [(Mapped::Last, false), (Mapped::NormedBeforeLast, true)] {
            let config = RobertaSeriesConfig { roberta: roberta.clone(), d_context: 6, mapped };
            let mut model = config.init(&device);
            let context = model.forward(ids.clone()).context.into_data();
            model.roberta.blocks[1] = roberta.init(&device).blocks.remove(1);
            assert_eq!(model.forward(ids.clone()).context.into_data() == context, same, "{mapped:?}");
        }
    }
}
