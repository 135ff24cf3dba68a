//! The variational autoencoder of Stable Diffusion: pictures to latents an eighth as large, and back (Rombach et al. 2022,
//! <https://arxiv.org/abs/2112.10752>; Kingma & Welling 2013, <https://arxiv.org/abs/1312.6114>).
//!
//! The numbers match diffusers' `AutoencoderKL`, and its folders are read: `vae/` of a pipeline, the first uploads too,
//! whose attention has other names. The names of the authors' single files are in [`crate::ldm`].
//!
//! ```sh
//! volary forward path/to/sd-vae-ft-mse --input in.safetensors --output out.safetensors
//! ```

use std::borrow::Cow;

use burn::tensor::{Device, Tensor};
use volary_kernels::ops::Activation;
use volary_vision::autoencoder::{AutoencoderKl, AutoencoderKlConfig, CodecConfig};
use volary_vision::residual::NormConfig;
use volary_weights::{KeyMap, Rule};

use Rule::Under;

use crate::bert::LINEAR;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::unet::{self, LIMITS};

/// Of every norm, whatever the configuration.
const NORM_EPS: f64 = 1e-6;

/// Encoder and decoder in `config.json` of diffusers; `d_latent` are the channels of a latent that does not say.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub(crate) fn codec(config: &Config, d_latent: usize) -> Result<CodecConfig, ConfigError> {
    let channels = unet::channels(config, &[64])?;
    blocks(config, "down_block_types", "DownEncoderBlock2D", channels.len())?;
    blocks(config, "up_block_types", "UpDecoderBlock2D", channels.len())?;
    let width = |field, default| Ok(config.each_size_or(field, 1, LIMITS.0, default)?[0]);
    Ok(CodecConfig {
        channels_in: width("in_channels", 3)?,
        channels_out: width("out_channels", 3)?,
        n_residuals: config.each_size_or("layers_per_block", 1, 100, 1)?[0],
        d_latent: width("latent_channels", d_latent)?,
        norm: unet::norm(config, &channels, NORM_EPS)?,
        attends: config.flag_or("mid_block_add_attention", true)?,
        channels: channels.into(),
    })
}

/// Refuses blocks that are not all of the one type that is built, one for each resolution.
fn blocks(config: &Config, field: &str, built: &str, count: usize) -> Result<(), ConfigError> {
    let is_built = |types: Vec<String>| types.len() == count && types.iter().all(|name| name == built);
    let default = !config.has(field) && count == 1;
    match default || config.texts(field).is_some_and(is_built) {
        true => Ok(()),
        false => Err(config.error(field, &format!("a list of {count} of {built}"))),
    }
}

/// `config.json` of diffusers; what it leaves out has the values of `AutoencoderKL`.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config) -> Result<AutoencoderKlConfig, ConfigError> {
    config.only("latents_mean", &["null"])?;
    config.only("latents_std", &["null"])?;
    Ok(AutoencoderKlConfig {
        codec: codec(config, 4)?,
        quant_conv: config.flag_or("use_quant_conv", true)?,
        post_quant_conv: config.flag_or("use_post_quant_conv", true)?,
        tile: match config.sizes("sample_size").as_deref() {
            Some(&[side, ..]) if side > 0 => side,
            _ => config.size_or("sample_size", 32)?,
        },
        scaling_factor: config.number_or("scaling_factor", 0.18215)?,
        shift_factor: config.number_or("shift_factor", 0.0)?,
    })
}

const RESIDUAL: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("conv1.", "conv1.", LINEAR),
    Under("norm2.", "norm2.", LINEAR),
    Under("conv2.", "conv2.", LINEAR),
    Under("conv_shortcut.", "shortcut.", LINEAR),
];

const MIDDLE: &[Rule] = &[
    Under("resnets.{}.", "residuals.{}.", RESIDUAL),
    Under("attentions.0.group_norm.", "attention.norm.", LINEAR),
    Under("attentions.0.to_q.", "attention.attention.query.", LINEAR),
    Under("attentions.0.to_k.", "attention.attention.key.", LINEAR),
    Under("attentions.0.to_v.", "attention.attention.value.", LINEAR),
    Under("attentions.0.to_out.0.", "attention.attention.output.", LINEAR),
    // of the first uploads
    Under("attentions.0.query.", "attention.attention.query.", LINEAR),
    Under("attentions.0.key.", "attention.attention.key.", LINEAR),
    Under("attentions.0.value.", "attention.attention.value.", LINEAR),
    Under("attentions.0.proj_attn.", "attention.attention.output.", LINEAR),
];

/// Keys of encoder and decoder.
pub(crate) const CODEC: &[Rule] = &[
    Under("encoder.conv_in.", "encoder.conv_in.", LINEAR),
    Under("encoder.down_blocks.{}.resnets.{}.", "encoder.stages.{}.residuals.{}.", RESIDUAL),
    Under("encoder.down_blocks.{}.downsamplers.0.conv.", "encoder.stages.{}.downsample.", LINEAR),
    Under("encoder.mid_block.", "encoder.middle.", MIDDLE),
    Under("encoder.conv_norm_out.", "encoder.norm_out.", LINEAR),
    Under("encoder.conv_out.", "encoder.conv_out.", LINEAR),
    Under("decoder.conv_in.", "decoder.conv_in.", LINEAR),
    Under("decoder.mid_block.", "decoder.middle.", MIDDLE),
    Under("decoder.up_blocks.{}.resnets.{}.", "decoder.stages.{}.residuals.{}.", RESIDUAL),
    Under("decoder.up_blocks.{}.upsamplers.0.conv.", "decoder.stages.{}.upsample.", LINEAR),
    Under("decoder.conv_norm_out.", "decoder.norm_out.", LINEAR),
    Under("decoder.conv_out.", "decoder.conv_out.", LINEAR),
];

/// Keys of diffusers.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "", CODEC),
    Under("quant_conv.", "quant_conv.", LINEAR),
    Under("post_quant_conv.", "post_quant_conv.", LINEAR),
]);

/// The autoencoder as the registry knows it.
pub const SYSTEM: System = System {
    name: "autoencoder_kl",
    about: "the variational autoencoder of Stable Diffusion: AutoencoderKL",
    file: "models/autoencoder.rs",
    tasks: &["forward"],
    proved: &["vae_kl", "vae_kl_legacy"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("_class_name") == Some("AutoencoderKL")),
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
    model: AutoencoderKl,
    codec: CodecConfig,
}

/// Pictures under `name`, of the right channels and large enough to be encoded; what is wrong with them is noted.
pub(crate) fn read_pictures(
    inputs: &mut Inputs,
    name: &'static str,
    codec: &CodecConfig,
) -> Option<Tensor<4>> {
    let pictures = inputs.float::<4>(name)?;
    let [batch, _, height, width] = pictures.dims();
    inputs.shaped(name, Some(pictures.dims()), [batch, codec.channels_in, height, width]);
    let factor = codec.factor();
    if height.min(width) < factor {
        let name = inputs.full(name);
        inputs.problem(format!(
            "`{name}` has pictures of {height} x {width}, expected at least {factor} a side"
        ));
    }
    Some(pictures)
}

impl Forward for Runner {
    /// `sample`, pictures `[batch, in_channels, height, width]`, and `latents`, `[batch, latent_channels, height, width]`, not
    /// scaled; either may be left out.
    ///
    /// Gives of pictures `moments`, their two halves `mean` and `std`, and of latents `decoded`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pictures = read_pictures(&mut inputs, "sample", &self.codec);
        let latents = inputs.float::<4>("latents");
        if let Some([batch, channels, height, width]) = latents.as_ref().map(Tensor::dims) {
            let wanted = [batch, self.codec.d_latent, height, width];
            inputs.shaped("latents", Some([batch, channels, height, width]), wanted);
        }
        inputs.needed(&["sample", "latents"]);
        inputs.finish()?;
        let mut outputs = Outputs::new();
        if let Some(pictures) = pictures {
            let moments = self.model.moments(pictures);
            let posterior = volary_vision::autoencoder::Posterior::of(moments.clone());
            outputs.push(output("moments", moments));
            outputs.push(output("std", posterior.std()));
            outputs.push(output("mean", posterior.mean));
        }
        outputs.extend(latents.map(|latents| output("decoded", self.model.decode(latents))));
        Ok(outputs)
    }
}

/// Rombach et al. 2022, `kl-f8`, as Stable Diffusion has it.
pub const F8: AutoencoderKlConfig = AutoencoderKlConfig {
    codec: CodecConfig {
        channels_in: 3,
        channels_out: 3,
        channels: Cow::Borrowed(&[128, 256, 512, 512]),
        n_residuals: 2,
        d_latent: 4,
        norm: NormConfig { n_groups: 32, eps: NORM_EPS, activation: Activation::Silu },
        attends: true,
    },
    quant_conv: true,
    post_quant_conv: true,
    tile: 512,
    scaling_factor: 0.18215,
    shift_factor: 0.0,
};

const fn preset(name: &'static str, weights: Weights, license: &'static str, tile: usize) -> Preset {
    let shape = Shape::AutoencoderKl(AutoencoderKlConfig { tile, ..F8 });
    Preset { name, shape, weights, license, parameters: 83_653_863, source: "diffusers" }
}

const PART: Weights = Weights::Elsewhere("hub, a part of the pipeline");

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("stable-diffusion-v1-4 autoencoder", PART, "CreativeML OpenRAIL-M", 512),
    preset("stable-diffusion-2-1 autoencoder", PART, "CreativeML OpenRAIL++-M", 768),
    preset("stabilityai/sd-vae-ft-ema", Weights::Hub, "MIT", 256),
    preset("stabilityai/sd-vae-ft-mse", Weights::Hub, "MIT", 256),
];
