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
use volary_vision::autoencoder::{AutoencoderKl, AutoencoderKlConfig, CodecConfig, Posterior};
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
use crate::unet::{self, LIMITS, RESIDUAL};

/// Of every norm, whatever the configuration.
pub(crate) const NORM_EPS: f64 = 1e-6;

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
            let posterior = Posterior::of(moments.clone());
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};
    use volary_weights::LoadOptions;

    use super::*;

    const TYPES: &str = r#""down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"], "block_out_channels": [8, 16], "norm_num_groups": 4"#;

    fn config(fields: &str) -> Result<AutoencoderKlConfig, ConfigError> {
        parse(&Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap())
    }

    #[test]
    fn fields_are_read() {
        let fields = r#""in_channels": 1, "out_channels": 2, "layers_per_block": 3, "latent_channels": 5, "act_fn": "relu",
            "sample_size": [24, 32], "scaling_factor": 0.5, "shift_factor": 0.25, "use_quant_conv": false,
            "mid_block_add_attention": false"#;
        let expected = AutoencoderKlConfig {
            codec: CodecConfig {
                channels_in: 1,
                channels_out: 2,
                channels: Cow::Owned(vec![8, 16]),
                n_residuals: 3,
                d_latent: 5,
                norm: NormConfig { n_groups: 4, eps: 1e-6, activation: Activation::Relu },
                attends: false,
            },
            quant_conv: false,
            post_quant_conv: true,
            tile: 24,
            scaling_factor: 0.5,
            shift_factor: 0.25,
        };
        assert_eq!(config(&format!("{TYPES}, {fields}")).unwrap(), expected);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (field, value, expected) in [
            ("down_block_types", r#"["AttnDownEncoderBlock2D", "DownEncoderBlock2D"]"#, "a list of 2 of"),
            ("up_block_types", r#"["UpDecoderBlock2D"]"#, "a list of 2 of UpDecoderBlock2D"),
            ("latents_mean", "[0.0]", "null"),
            ("layers_per_block", "0", "a whole number"),
            ("norm_num_groups", "3", "a divisor of 8"),
            ("sample_size", "0", "a whole number"),
        ] {
            let message = config(&format!(r#"{TYPES}, "{field}": {value}"#)).unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")) && message.contains(expected), "{message}");
        }
    }

    /// Tiles of 32 pixels of the fixture's pictures and of the latents that these give; the numbers are diffusers' with
    /// `enable_tiling`.
    #[test]
    fn tiles_are_those_of_diffusers() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vae_kl");
        let (folder, device) = (Folder::Disk(path.clone()), Device::flex());
        let config =
            AutoencoderKlConfig { tile: 32, ..parse(&folder.config("config.json").unwrap()).unwrap() };
        let model = fill(&folder, config.init(&device), &KEYS, &LoadOptions::default()).unwrap();
        let inputs = volary_weights::read_tensors(&path.join("inputs.safetensors")).unwrap();
        let pictures = Tensor::<4>::from_data(inputs["sample"].clone(), &device);
        let close = |found: Tensor<4>, expected: &[f32]| {
            let expected = TensorData::new(expected.to_vec(), [1, 1, 1, expected.len()]);
            found.into_data().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-5));
        };
        let latents = model.encode_tiled(pictures, &config.tiles()).mean;
        assert_eq!(latents.dims(), [1, 4, 4, 6]);
        let expected = [-0.942864, -0.857766, -0.104700, -0.004148, 0.155086, -0.439812];
        close(latents.clone().slice([0..1, 1..2, 2..3]), &expected);
        let decoded = model.decode_tiled(latents, &config.tiles());
        assert_eq!(decoded.dims(), [1, 3, 32, 48]);
        let expected =
            [-0.748589, -0.267543, -0.575975, -0.503225, -0.899218, -1.090246, -1.357752, -1.747393];
        close(decoded.slice([0..1, 1..2, 27..28, 20..28]), &expected);
    }

    #[test]
    fn either_input_will_do_and_what_does_not_fit_is_told_all_at_once() {
        let folder = Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vae_kl"));
        let run = |inputs: &[(&str, &[usize])]| {
            let zeros = |shape: &[usize]| TensorData::zeros::<f32, _>(shape);
            let inputs: BTreeMap<_, _> =
                inputs.iter().map(|(name, shape)| (name.to_string(), zeros(shape))).collect();
            let outputs =
                crate::registry::forward(&folder, &inputs, &LoadOptions::default(), &Device::flex())?;
            Ok::<_, Error>(outputs.into_iter().map(|(name, _)| name).collect::<Vec<_>>())
        };
        assert_eq!(run(&[("sample", &[1, 3, 8, 9])]).unwrap(), ["moments", "std", "mean"]);
        assert_eq!(run(&[("latents", &[1, 4, 1, 1])]).unwrap(), ["decoded"]);
        let message = run(&[("sample", &[1, 4, 8, 7]), ("latents", &[1, 3, 1, 1])]).unwrap_err().to_string();
        for part in [
            "`sample` is [1, 4, 8, 7], expected [1, 3, 8, 7]",
            "`sample` has pictures of 8 x 7, expected at least 8 a side",
            "`latents` is [1, 3, 1, 1], expected [1, 4, 1, 1]",
        ] {
            assert!(message.contains(part), "{message}");
        }
        assert!(run(&[]).unwrap_err().to_string().contains("`sample` is missing"));
    }
}
