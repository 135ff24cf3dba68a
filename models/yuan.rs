//! Yuan 1.0: Chinese text decoders of 13 and 245 billion parameters (Wu et al. 2021, <https://arxiv.org/abs/2110.04725>;
//! Inspur). The models are GPT-2's ([`crate::gpt2`]) with 2048 positions, trained as a language model (LM), or as a
//! prefix language model (PLM), in which the tokens of the prompt all see each other.
//!
//! **The weights were never public**: one asked Inspur for an interface. So there is no layout to read and nothing that
//! could be called loaded. A folder is what the authors' code (Megatron-LM) would have saved: the names of CPM-1
//! ([`crate::cpm`]) with the `model_type` `yuan1` and, for the second kind, `"prefix_lm": true`.
//!
//! The numbers match GPT-2 of `transformers` under a causal mask and under a prefix mask, which is the same function: the
//! weights of the fixture are renamed. Not to be taken for Yuan 2.0, another model.
//!
//! ```sh
//! volary info "Yuan 1.0 245B"
//! ```

use burn::tensor::Device;
use volary_weights::LoadOptions;

use crate::config::{Config, ConfigError};
use crate::cpm::{KEYS, checkpoint, megatron_sizes};
use crate::decoder::{Reading, Runner};
use crate::error::Error;
use crate::folder::Folder;
use crate::gpt2::{Gpt2, Gpt2Config, SMALL};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{System, describe_with};

/// The decoder, and how it was trained.
#[derive(Clone, Debug, PartialEq)]
pub struct YuanConfig {
    /// The shape.
    pub decoder: Gpt2Config,
    /// How it reads prompts.
    pub reading: Reading,
}

impl YuanConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// Sizes by the names of Megatron-LM's arguments, and `prefix_lm`; what is left out has the values of the smaller model,
    /// trained as a language model.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let reading = match config.flag_or("prefix_lm", false)? {
            true => Reading::Prefix,
            false => Reading::Causal,
        };
        Ok(Self { decoder: megatron_sizes(config, &YUAN_13B)?, reading })
    }

    fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Runner<Gpt2>, Error> {
        let weights = checkpoint(folder, &self.decoder)?;
        let runner = self.decoder.load(weights.as_ref(), &KEYS, options, device)?;
        Ok(Runner { reading: self.reading, ..runner })
    }
}

/// Yuan 1.0 as the registry knows it.
pub const SYSTEM: System = System {
    name: "yuan1",
    about: "Chinese text decoders, causal and prefix: Yuan 1.0 (never public; its architecture)",
    file: "models/yuan.rs",
    tasks: &["generate", "forward"],
    proved: &["yuan_prefix"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("yuan1")),
    checkpoint: |folder| checkpoint(folder, &YuanConfig::of(folder)?.decoder),
    describe: |folder| {
        let YuanConfig { decoder, .. } = YuanConfig::of(folder)?;
        describe_with(checkpoint(folder, &decoder)?.as_ref(), &decoder.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| Ok(Box::new(YuanConfig::of(folder)?.load(folder, options, device)?)),
    generator: Some(|folder, options, device| {
        Ok(Box::new(YuanConfig::of(folder)?.load(folder, options, device)?))
    }),
};

/// Wu et al. 2021, table 3; 53,228 word pieces, padded to a multiple of 128 for each of eight ranks' shares.
const BASE: Gpt2Config = Gpt2Config { vocab_size: 53_248, n_positions: 2048, ..SMALL };
const YUAN_13B: Gpt2Config = BASE.sized(40, 5120, 40);
/// The paper does not say how many heads; they change no count.
const YUAN_245B: Gpt2Config = BASE.sized(76, 16384, 128);

const fn preset(name: &'static str, config: Gpt2Config, parameters: usize, source: &'static str) -> Preset {
    let (weights, license) = (Weights::Application, "by application");
    Preset { name, shape: Shape::Gpt2(config), weights, license, parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("Yuan 1.0 13B", YUAN_13B, 12_868_700_160, "counted; the paper says 13 B"),
    preset("Yuan 1.0 245B", YUAN_245B, 245_735_325_696, "counted; the paper says 245.7 B"),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Tensor, Tolerance};
    use volary_kernels::ops::Mask;
    use volary_weights::read_tensors;

    use super::*;
    use crate::decoder::{Decoder, Text};

    fn folder() -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/yuan_prefix"))
    }

    /// The reference was given a mask of what each token sees: prefixes of 5 and 9 tokens, then each those before it.
    #[test]
    fn a_prefix_mask_is_that_of_the_reference() {
        let config = YuanConfig::of(&folder()).unwrap();
        assert_eq!(config.reading, Reading::Prefix);
        let Runner { model, .. } = config.load(&folder(), &LoadOptions::default(), &Device::flex()).unwrap();
        let inputs = read_tensors(&folder().path().join("inputs.safetensors")).unwrap();
        let ids = Tensor::from_data(inputs["prefix.input_ids"].clone(), &Device::flex());
        let logits = |mask| model.logits(model.forward(Text { mask, ..ids.clone().into() })).into_data();
        let outputs = read_tensors(&folder().path().join("outputs.safetensors")).unwrap();
        let expected = &outputs["prefix.logits"];
        logits(Mask::Prefix(vec![5, 9])).assert_approx_eq::<f32>(expected, Tolerance::absolute(1e-4));
        let causal = logits(Mask::Causal);
        assert!(causal.iter::<f32>().zip(expected.iter::<f32>()).any(|(a, b)| (a - b).abs() > 1.0));
    }

    #[test]
    fn a_language_model_reads_prompts_causally() {
        let config = |text: &str| {
            YuanConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
        };
        assert_eq!(config("{}").unwrap(), YuanConfig { decoder: YUAN_13B, reading: Reading::Causal });
        assert!(config(r#"{"prefix_lm": "yes"}"#).is_err());
    }
}
