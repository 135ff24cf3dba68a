//! The autoencoder with a codebook: pictures to entries of it, and back (van den Oord et al. 2017,
//! <https://arxiv.org/abs/1711.00937>; Esser et al. 2021, <https://arxiv.org/abs/2012.09841>).
//!
//! The numbers match diffusers' `VQModel`, and its folders are read; of norms that see the latent (MoVQ) is said that they
//! are not built.
//!
//! ```sh
//! volary forward path/to/vqvae --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::Device;
use burn::tensor::TensorData;
use volary_vision::autoencoder::CodecConfig;
use volary_vision::vq::{VqConfig, VqModel};
use volary_weights::{KeyMap, Rule};

use Rule::{Rename, Under};

use crate::autoencoder::{CODEC, codec, read_pictures};
use crate::bert::LINEAR;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::unet::LIMITS;

/// `config.json` of diffusers; what it leaves out has the values of `VQModel`.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config) -> Result<VqConfig, ConfigError> {
    config.only("norm_type", &["\"group\""])?;
    let codec = codec(config, 3)?;
    Ok(VqConfig {
        n_codes: config.size_or("num_vq_embeddings", 256)?,
        d_code: config.each_size_or("vq_embed_dim", 1, LIMITS.0, codec.d_latent)?[0],
        scaling_factor: config.number_or("scaling_factor", 0.18215)?,
        codec,
    })
}

/// Keys of diffusers.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "", CODEC),
    Under("quant_conv.", "quant_conv.", LINEAR),
    Rename("quantize.embedding.weight", "codebook.weight"),
    Under("post_quant_conv.", "post_quant_conv.", LINEAR),
]);

/// The autoencoder as the registry knows it.
pub const SYSTEM: System = System {
    name: "vqmodel",
    about: "an autoencoder whose latents are entries of a codebook: VQModel",
    file: "models/vqmodel.rs",
    tasks: &["forward"],
    proved: &["vqmodel"],
    presets: &[],
    recognises: |_, config| config.is_some_and(|config| config.text("_class_name") == Some("VQModel")),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = parse(&folder.config("config.json")?)?;
        describe(folder, &config.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| {
        let config = parse(&folder.config("config.json")?)?;
        Ok(Box::new(Runner {
            model: fill(folder, config.init(device), &KEYS, options)?,
            codec: config.codec,
        }))
    },
    generator: None,
};

/// An autoencoder behind the forward contract.
struct Runner {
    model: VqModel,
    codec: CodecConfig,
}

impl Forward for Runner {
    /// `sample`, pictures `[batch, in_channels, height, width]`.
    ///
    /// Gives `latents`, what the codebook has for them as `quantized`, and which entries these are as `indices`,
    /// `[batch * height * width]`; and the pictures that come back as `sample`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pictures = read_pictures(&mut inputs, "sample", &self.codec);
        inputs.missing("sample");
        inputs.finish()?;
        let Some(pictures) = pictures else { return Ok(Outputs::new()) }; // was an error
        let latents = self.model.encode(pictures);
        let quantized = self.model.quantize(latents.clone());
        let indices: Vec<i64> = quantized.indices.into_data().iter::<i64>().collect();
        let shape = [indices.len()];
        Ok(vec![
            output("latents", latents),
            output("quantized", quantized.latents.clone()),
            ("indices".into(), TensorData::new(indices, shape)),
            output("sample", self.model.decode(quantized.latents)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::parameters;

    use super::*;

    fn config(fields: &str) -> Result<VqConfig, ConfigError> {
        let text = format!(
            r#"{{"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "norm_num_groups": 4{fields}}}"#
        );
        parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        for parameter in parameters(&config("").unwrap().init(&Device::flex())) {
            let found = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(KEYS.paths(&found[0]).unwrap(), [parameter.path]);
        }
    }

    #[test]
    fn an_entry_is_as_wide_as_a_latent_unless_it_is_said() {
        let wide =
            |fields| config(fields).map(|config| (config.n_codes, config.d_code, config.codec.d_latent));
        assert_eq!(wide("").unwrap(), (256, 3, 3));
        assert_eq!(wide(r#", "latent_channels": 7, "num_vq_embeddings": 9"#).unwrap(), (9, 7, 7));
        assert_eq!(wide(r#", "vq_embed_dim": 2"#).unwrap(), (256, 2, 3));
        let message = config(r#", "norm_type": "spatial""#).unwrap_err().to_string();
        assert!(message.contains("`norm_type`: expected \"group\""), "{message}");
    }
}
