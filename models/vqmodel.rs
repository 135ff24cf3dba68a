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
