//! The U-Net of Stable Diffusion: what turns noise into a picture's latent, step by step, told by a context (Rombach et
//! al. 2022, <https://arxiv.org/abs/2112.10752>). It is that of Stable Diffusion 1 and 2, of Taiyi and of AltDiffusion,
//! with 9 channels where it paints into pictures.
//!
//! The numbers match diffusers' `UNet2DConditionModel`, and its folders are read: `unet/` of a pipeline. The names of the
//! authors' single files are in [`crate::ldm`]. Not built are what SDXL adds, class labels, image projections and the
//! blocks of other families; they are refused by name.
//!
//! ```sh
//! volary forward path/to/stable-diffusion-v1-5/unet --input in.safetensors --output out.safetensors
//! ```

use std::borrow::Cow;

use burn::tensor::{Device, Tensor};
use volary_kernels::ops::{Activation, Mask};
use volary_vision::residual::{NormConfig, TimeShift};
use volary_vision::unet::{Middle, StageConfig, TimeConfig, TransformerConfig, UNet, UNetConfig};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Reshape, Split, Under};

use crate::bert::LINEAR;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// The most channels, and the most resolutions, that are believed.
pub(crate) const LIMITS: (usize, usize) = (65_536, 12);
/// The most blocks.
const BLOCKS: usize = 1000;
const MIDDLE: &str = "mid_block_type";

/// `config.json` of diffusers; what it leaves out has the values of `UNet2DConditionModel`.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config) -> Result<UNetConfig, ConfigError> {
    for &(field, allowed) in FIXED {
        config.only(field, allowed)?;
    }
    let channels = channels(config, &[320, 640, 1280, 1280])?;
    let (count, (limit, _)) = (channels.len(), LIMITS);
    let each = |field: &str, limit, default| config.each_size_or(field, count, limit, default);
    let n_residuals = each("layers_per_block", BLOCKS, 2)?;
    let n_layers = each("transformer_layers_per_block", BLOCKS, 1)?;
    let in_all: usize = n_residuals.iter().zip(&n_layers).map(|(residuals, layers)| residuals * layers).sum();
    if in_all > BLOCKS {
        return Err(config.error("layers_per_block", &format!("at most {BLOCKS} blocks in all")));
    }
    // which diffusers took for their width when it named the field
    let n_heads = each("attention_head_dim", limit, 8)?;
    let contexts = each("cross_attention_dim", limit, 1280)?;
    if contexts.iter().any(|width| *width != contexts[0]) {
        return Err(config.error("cross_attention_dim", "one width for all blocks"));
    }
    let transformer = |at: usize| -> Result<TransformerConfig, ConfigError> {
        config.divides("attention_head_dim", n_heads[at], channels[at])?;
        Ok(TransformerConfig { n_layers: n_layers[at], n_heads: n_heads[at] })
    };
    let [cross_down, plain_down] = ["CrossAttnDownBlock2D", "DownBlock2D"];
    let [cross_up, plain_up] = ["CrossAttnUpBlock2D", "UpBlock2D"];
    let down = attends(config, "down_block_types", [cross_down, plain_down], count)?;
    let mut up = attends(config, "up_block_types", [cross_up, plain_up], count)?;
    up.reverse();
    let stages = (0..count).map(|at| {
        Ok(StageConfig {
            channels: channels[at],
            n_residuals: n_residuals[at],
            down: down[at].then(|| transformer(at)).transpose()?,
            up: up[at].then(|| transformer(at)).transpose()?,
        })
    });
    let is_null = config.fields().any(|field| field == MIDDLE) && !config.has(MIDDLE);
    let middle = match config.text(MIDDLE) {
        None if is_null => Middle::Nothing,
        None if !config.has(MIDDLE) => Middle::Transformer(transformer(count - 1)?),
        Some("UNetMidBlock2DCrossAttn") => Middle::Transformer(transformer(count - 1)?),
        Some("UNetMidBlock2D") => Middle::Residual,
        _ => return Err(config.error(MIDDLE, "UNetMidBlock2DCrossAttn, UNetMidBlock2D or null")),
    };
    let time = TimeConfig {
        d_time: config.size_or("time_embedding_dim", 4 * channels[0])?,
        cosines_first: config.flag_or("flip_sin_to_cos", true)?,
        shift: config.number_or("freq_shift", 0.0)?,
    };
    if time.shift == (channels[0] / 2) as f64 {
        return Err(config.error("freq_shift", "not half of the first of `block_out_channels`"));
    }
    Ok(UNetConfig {
        channels_in: config.each_size_or("in_channels", 1, limit, 4)?[0],
        channels_out: config.each_size_or("out_channels", 1, limit, 4)?[0],
        middle,
        d_context: contexts[0],
        norm: norm(config, &channels, config.number_or("norm_eps", 1e-5)?)?,
        stages: stages.collect::<Result<_, ConfigError>>()?,
        time,
        time_shift: match config.text("resnet_time_scale_shift").unwrap_or("default") {
            "default" => TimeShift::Added,
            "scale_shift" => TimeShift::Scaled,
            _ => return Err(config.error("resnet_time_scale_shift", "default or scale_shift")),
        },
        kernel_in: kernel(config, "conv_in_kernel")?,
        kernel_out: kernel(config, "conv_out_kernel")?,
        stretch: config.flag_or("center_input_sample", false)?,
    })
}

/// Fields of which only these values are built.
const FIXED: &[(&str, &[&str])] = &[
    ("only_cross_attention", &["false"]),
    ("downsample_padding", &["1"]),
    ("mid_block_scale_factor", &["1", "1.0"]),
    ("resnet_out_scale_factor", &["1", "1.0"]),
    ("resnet_skip_time_act", &["false"]),
    ("reverse_transformer_layers_per_block", &["null"]),
    ("encoder_hid_dim", &["null"]),
    ("encoder_hid_dim_type", &["null"]),
    ("num_attention_heads", &["null"]),
    ("dual_cross_attention", &["false"]),
    ("class_embed_type", &["null"]),
    ("num_class_embeds", &["null"]),
    ("class_embeddings_concat", &["false"]),
    ("projection_class_embeddings_input_dim", &["null"]),
    ("addition_embed_type", &["null"]),
    ("time_embedding_type", &["\"positional\""]),
    ("time_embedding_act_fn", &["null"]),
    ("timestep_post_act", &["null"]),
    ("time_cond_proj_dim", &["null"]),
    ("attention_type", &["\"default\""]),
    ("mid_block_only_cross_attention", &["false"]),
    ("cross_attention_norm", &["null"]),
];

/// `block_out_channels`, from fine to coarse.
pub(crate) fn channels(config: &Config, default: &[usize]) -> Result<Vec<usize>, ConfigError> {
    const FIELD: &str = "block_out_channels";
    if !config.has(FIELD) {
        return Ok(default.to_vec());
    }
    let (widest, most) = LIMITS;
    let channels = config.sizes(FIELD).filter(|channels| {
        (1..=most).contains(&channels.len()) && channels.iter().all(|width| (1..=widest).contains(width))
    });
    let expected = format!("a list of 1 to {most} whole numbers from 1 to {widest}");
    channels.ok_or_else(|| config.error(FIELD, &expected))
}

/// Norms over so many channels, with the groups and the activation of the configuration.
pub(crate) fn norm(config: &Config, channels: &[usize], eps: f64) -> Result<NormConfig, ConfigError> {
    let n_groups = config.size_or("norm_num_groups", 32)?;
    channels.iter().try_for_each(|&channels| config.divides("norm_num_groups", n_groups, channels))?;
    Ok(NormConfig { n_groups, eps, activation: config.activation_or("act_fn", Activation::Silu)? })
}

/// Which of `count` blocks are of the first of two types.
fn attends(
    config: &Config,
    field: &str,
    [with, without]: [&str; 2],
    count: usize,
) -> Result<Vec<bool>, ConfigError> {
    if !config.has(field) && count == 4 {
        // diffusers' own: all but the coarsest
        let mut attends = vec![true; count];
        attends[if field == "up_block_types" { 0 } else { count - 1 }] = false;
        return Ok(attends);
    }
    let types = config.texts(field).filter(|types| {
        types.len() == count && types.iter().all(|name| [with, without].contains(&name.as_str()))
    });
    let types =
        types.ok_or_else(|| config.error(field, &format!("a list of {count} of {with}, {without}")))?;
    Ok(types.iter().map(|name| name == with).collect())
}

/// The side of a convolution that keeps a picture's size.
fn kernel(config: &Config, field: &str) -> Result<usize, ConfigError> {
    match config.size_or(field, 3)? {
        side @ (1 | 3 | 5 | 7) => Ok(side),
        _ => Err(config.error(field, "1, 3, 5 or 7")),
    }
}

/// Keys of a residual block, with its time where it has one.
pub(crate) const RESIDUAL: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("conv1.", "conv1.", LINEAR),
    Under("time_emb_proj.", "time.", LINEAR),
    Under("norm2.", "norm2.", LINEAR),
    Under("conv2.", "conv2.", LINEAR),
    Under("conv_shortcut.", "shortcut.", LINEAR),
];

const ATTENTION: &[Rule] = &[
    Rename("to_q.weight", "query.weight"),
    Rename("to_k.weight", "key.weight"),
    Rename("to_v.weight", "value.weight"),
    Under("to_out.0.", "output.", LINEAR),
];

const BLOCK: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("attn1.", "attention.", ATTENTION),
    Under("norm2.", "norm2.", LINEAR),
    Under("attn2.", "cross.", ATTENTION),
    Under("norm3.", "norm3.", LINEAR),
    Split("ff.net.0.proj.weight", &["mlp.up.weight", "mlp.gate.weight"]),
    Split("ff.net.0.proj.bias", &["mlp.up.bias", "mlp.gate.bias"]),
    Under("ff.net.2.", "mlp.down.", LINEAR),
];

/// Projections that are matrices: Stable Diffusion 2.
pub(crate) const TRANSFORMER_OF_MATRICES: &[Rule] = &[
    Under("norm.", "norm.", LINEAR),
    Under("proj_in.", "proj_in.", LINEAR),
    Under("transformer_blocks.{}.", "blocks.{}.", BLOCK),
    Under("proj_out.", "proj_out.", LINEAR),
];

/// A matrix that is stored as a convolution by 1 x 1.
pub(crate) const POINTWISE: &[Rule] = &[Reshape("weight", "weight", Ones::After(2)), Rename("bias", "bias")];

/// Projections that are convolutions: Stable Diffusion 1.
pub(crate) const TRANSFORMER: &[Rule] = &[
    Under("norm.", "norm.", LINEAR),
    Under("proj_in.", "proj_in.", POINTWISE),
    Under("transformer_blocks.{}.", "blocks.{}.", BLOCK),
    Under("proj_out.", "proj_out.", POINTWISE),
];

/// Keys of diffusers with one kind of transformers or the other.
macro_rules! keys {
    ($transformer:expr) => {
        KeyMap::new(&[
            Under("conv_in.", "conv_in.", LINEAR),
            Under("time_embedding.linear_1.", "time1.", LINEAR),
            Under("time_embedding.linear_2.", "time2.", LINEAR),
            Under("down_blocks.{}.resnets.{}.", "down.{}.residuals.{}.", RESIDUAL),
            Under("down_blocks.{}.attentions.{}.", "down.{}.transformers.{}.", $transformer),
            Under("down_blocks.{}.downsamplers.0.conv.", "down.{}.downsample.", LINEAR),
            Under("mid_block.resnets.{}.", "middle.residuals.{}.", RESIDUAL),
            Under("mid_block.attentions.0.", "middle.transformer.", $transformer),
            Under("up_blocks.{}.resnets.{}.", "up.{}.residuals.{}.", RESIDUAL),
            Under("up_blocks.{}.attentions.{}.", "up.{}.transformers.{}.", $transformer),
            Under("up_blocks.{}.upsamplers.0.conv.", "up.{}.upsample.", LINEAR),
            Under("conv_norm_out.", "norm_out.", LINEAR),
            Under("conv_out.", "conv_out.", LINEAR),
        ])
    };
}

/// Keys of diffusers.
pub const KEYS: KeyMap = keys!(TRANSFORMER);

/// The same with `use_linear_projection`. Both load either.
pub const KEYS_WITH_LINEAR_PROJECTION: KeyMap = keys!(TRANSFORMER_OF_MATRICES);

/// The key map of a configuration.
///
/// # Errors
/// If `use_linear_projection` is neither true nor false.
pub fn keys(config: &Config) -> Result<&'static KeyMap, ConfigError> {
    match config.flag_or("use_linear_projection", false)? {
        true => Ok(&KEYS_WITH_LINEAR_PROJECTION),
        false => Ok(&KEYS),
    }
}

/// The U-Net as the registry knows it.
pub const SYSTEM: System = System {
    name: "unet",
    about: "the U-Net of Stable Diffusion 1 and 2: UNet2DConditionModel",
    file: "models/unet.rs",
    tasks: &["forward"],
    proved: &["unet_sd1", "unet_sd2"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| config.text("_class_name") == Some("UNet2DConditionModel"))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = folder.config("config.json")?;
        describe(folder, &parse(&config)?.init(&Device::flex()), keys(&config)?)
    },
    open: |folder, options, device| {
        let config = folder.config("config.json")?;
        let shape = parse(&config)?;
        let model = fill(folder, shape.init(device), keys(&config)?, options)?;
        Ok(Box::new(Runner { model, channels: shape.channels_in, d_context: shape.d_context }))
    },
    generator: None,
};

/// A U-Net behind the forward contract.
struct Runner {
    model: UNet,
    channels: usize,
    d_context: usize,
}

impl Forward for Runner {
    /// `sample`, `[batch, in_channels, height, width]`; `timestep`, one number or one for each of the batch; and
    /// `encoder_hidden_states`, `[batch, seq, cross_attention_dim]`, of which an `encoder_attention_mask` `[batch, seq]` may
    /// hide some.
    ///
    /// Gives `sample`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let sample = inputs.float::<4>("sample");
        let timestep = inputs.numbers("timestep");
        let context = inputs.float::<3>("encoder_hidden_states");
        let seen = inputs.mask("encoder_attention_mask");
        for name in ["sample", "timestep", "encoder_hidden_states"] {
            inputs.missing(name);
        }
        let batch = sample.as_ref().map(|sample| sample.dims()[0]);
        if let Some([batch, _, height, width]) = sample.as_ref().map(Tensor::dims) {
            inputs.shaped("sample", sample.as_ref().map(Tensor::dims), [batch, self.channels, height, width]);
        }
        if let Some(([times], batch)) = timestep.as_ref().map(Tensor::dims).zip(batch)
            && times != 1
            && times != batch
        {
            inputs
                .problem(format!("`timestep` has {times} numbers, expected one, or one for each of {batch}"));
        }
        if let Some(([rows, seq, width], batch)) = context.as_ref().map(Tensor::dims).zip(batch) {
            inputs.shaped("encoder_hidden_states", Some([rows, seq, width]), [batch, seq, self.d_context]);
            inputs.shaped("encoder_attention_mask", seen.as_ref().map(Tensor::dims), [batch, seq]);
        }
        inputs.finish()?;
        let (Some(sample), Some(timestep), Some(context)) = (sample, timestep, context) else {
            return Ok(Outputs::new()); // was an error
        };
        let mask = seen.map_or(Mask::Full, Mask::Padding);
        Ok(vec![output("sample", self.model.forward(sample, timestep, context, &mask))])
    }
}

const fn stage(channels: usize, n_heads: usize, attends: bool) -> StageConfig {
    let transformer = if attends { Some(TransformerConfig { n_layers: 1, n_heads }) } else { None };
    StageConfig { channels, n_residuals: 2, down: transformer, up: transformer }
}

/// Rombach et al. 2022, as `v1-inference.yaml` of Stable Diffusion has it.
pub const V1: UNetConfig = UNetConfig {
    channels_in: 4,
    channels_out: 4,
    stages: Cow::Borrowed(&[
        stage(320, 8, true),
        stage(640, 8, true),
        stage(1280, 8, true),
        stage(1280, 8, false),
    ]),
    middle: Middle::Transformer(TransformerConfig { n_layers: 1, n_heads: 8 }),
    d_context: 768,
    norm: NormConfig { n_groups: 32, eps: 1e-5, activation: Activation::Silu },
    time: TimeConfig { d_time: 1280, cosines_first: true, shift: 0.0 },
    time_shift: TimeShift::Added,
    kernel_in: 3,
    kernel_out: 3,
    stretch: false,
};

/// As `v2-inference.yaml` has it: heads of 64, and a wider context.
pub const V2: UNetConfig = UNetConfig {
    stages: Cow::Borrowed(&[
        stage(320, 5, true),
        stage(640, 10, true),
        stage(1280, 20, true),
        stage(1280, 20, false),
    ]),
    middle: Middle::Transformer(TransformerConfig { n_layers: 1, n_heads: 20 }),
    d_context: 1024,
    ..V1
};

/// Beside the latent a mask and the latent of the picture that is masked.
const INPAINTING: UNetConfig = UNetConfig { channels_in: 9, ..V1 };
const INPAINTING_2: UNetConfig = UNetConfig { channels_in: 9, ..V2 };

const fn preset(name: &'static str, license: &'static str, shape: UNetConfig, parameters: usize) -> Preset {
    let weights = Weights::Elsewhere("hub, a part of the pipeline");
    Preset { name, shape: Shape::UNet(shape), weights, license, parameters, source: "diffusers" }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("stable-diffusion-v1-4 U-Net", OPENRAIL, V1, 859_520_964),
    preset("stable-diffusion-v1-5 U-Net", OPENRAIL, V1, 859_520_964),
    preset("stable-diffusion-inpainting U-Net", OPENRAIL, INPAINTING, 859_535_364),
    preset("Taiyi-Stable-Diffusion-1B-Chinese-v0.1 U-Net", OPENRAIL, V1, 859_520_964),
    preset("AltDiffusion U-Net", OPENRAIL, V1, 859_520_964),
    preset("AltDiffusion-m9 U-Net", OPENRAIL, V1, 859_520_964),
    preset("AltDiffusion-m18 U-Net", OPENRAIL, V2, 865_910_724),
    preset("stable-diffusion-2-1 U-Net", OPENRAIL_2, V2, 865_910_724),
    preset("stable-diffusion-2-inpainting U-Net", OPENRAIL_2, INPAINTING_2, 865_925_124),
];

const OPENRAIL: &str = "CreativeML OpenRAIL-M";
const OPENRAIL_2: &str = "CreativeML OpenRAIL++-M";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::TensorData;
    use volary_weights::LoadOptions;

    use super::*;

    fn config(fields: &str) -> Result<UNetConfig, ConfigError> {
        let text = format!(r#"{{"_class_name": "UNet2DConditionModel"{fields}}}"#);
        parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn what_is_left_out_has_the_values_of_diffusers() {
        let cross_attention_dim = r#", "cross_attention_dim": 768"#;
        assert_eq!(config(cross_attention_dim).unwrap(), V1);
        let v2 = r#", "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": true"#;
        assert_eq!(config(v2).unwrap(), V2);
    }

    #[test]
    fn fields_are_read() {
        let shape = config(
            r#", "in_channels": 9, "out_channels": 3, "block_out_channels": [8, 16], "layers_per_block": [1, 3],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "attention_head_dim": [2, 4], "transformer_layers_per_block": [1, 2], "cross_attention_dim": [5, 5],
            "norm_num_groups": 4, "norm_eps": 0.5, "act_fn": "gelu", "flip_sin_to_cos": false, "freq_shift": 1,
            "time_embedding_dim": 24, "resnet_time_scale_shift": "scale_shift", "conv_in_kernel": 5, "conv_out_kernel": 1,
            "center_input_sample": true, "mid_block_type": null, "sample_size": [8, 16]"#,
        );
        let (fine, coarse) =
            (TransformerConfig { n_layers: 1, n_heads: 2 }, TransformerConfig { n_layers: 2, n_heads: 4 });
        let expected = UNetConfig {
            channels_in: 9,
            channels_out: 3,
            stages: Cow::Owned(vec![
                StageConfig { channels: 8, n_residuals: 1, down: None, up: Some(fine) },
                StageConfig { channels: 16, n_residuals: 3, down: Some(coarse), up: None },
            ]),
            middle: Middle::Nothing,
            d_context: 5,
            norm: NormConfig { n_groups: 4, eps: 0.5, activation: Activation::Gelu },
            time: TimeConfig { d_time: 24, cosines_first: false, shift: 1.0 },
            time_shift: TimeShift::Scaled,
            kernel_in: 5,
            kernel_out: 1,
            stretch: true,
        };
        assert_eq!(shape.unwrap(), expected);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (field, value, expected) in [
            ("class_embed_type", r#""timestep""#, "null"),
            ("num_class_embeds", "1000", "null"),
            ("addition_embed_type", r#""text_time""#, "null"),
            ("encoder_hid_dim_type", r#""text_proj""#, "null"),
            ("time_cond_proj_dim", "256", "null"),
            ("num_attention_heads", "8", "null"),
            ("only_cross_attention", "[true, true, true, false]", "false"),
            ("dual_cross_attention", "true", "false"),
            ("time_embedding_type", r#""fourier""#, "positional"),
            ("resnet_time_scale_shift", r#""ada_group""#, "default or scale_shift"),
            ("down_block_types", r#"["DownBlock2D"]"#, "a list of 4 of CrossAttnDownBlock2D, DownBlock2D"),
            ("up_block_types", r#"["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"]"#, "UpBlock2D"),
            ("mid_block_type", r#""UNetMidBlock2DSimpleCrossAttn""#, "UNetMidBlock2DCrossAttn"),
            ("mid_block_type", "7", "UNetMidBlock2DCrossAttn"),
            ("block_out_channels", "[]", "a list of 1 to 12"),
            ("block_out_channels", "[320, 0, 1280, 1280]", "from 1 to 65536"),
            ("block_out_channels", "[320, 640, 1280, 99999999999]", "from 1 to 65536"),
            ("layers_per_block", "[2, 2, 2]", "a list of 4"),
            ("layers_per_block", "1000", "at most 1000 blocks in all"),
            ("attention_head_dim", "7", "a divisor of"),
            ("cross_attention_dim", "[768, 768, 768, 1024]", "one width"),
            ("norm_num_groups", "33", "a divisor of 320"),
            ("norm_num_groups", "0", "a whole number"),
            ("freq_shift", "160", "not half"),
            ("conv_in_kernel", "4", "1, 3, 5 or 7"),
            ("act_fn", r#""snake""#, "one of"),
            ("flip_sin_to_cos", r#""yes""#, "true or false"),
        ] {
            let message = config(&format!(r#", "{field}": {value}"#)).unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")) && message.contains(expected), "{message}");
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let folder = Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/unet_sd1"));
        let zeros = |shape: &[usize]| TensorData::zeros::<f32, _>(shape);
        type Case<'a> = (&'a [(&'a str, TensorData)], &'a [&'a str]);
        let cases: &[Case] = &[
            (&[], &["`sample` is missing", "`timestep` is missing", "`encoder_hidden_states` is missing"]),
            (
                &[
                    ("sample", zeros(&[2, 3, 8, 8])),
                    ("timestep", zeros(&[3])),
                    ("encoder_hidden_states", zeros(&[1, 7, 21])),
                    ("encoder_attention_mask", zeros(&[2, 6])),
                    ("class_labels", zeros(&[2])),
                ],
                &[
                    "`sample` is [2, 3, 8, 8], expected [2, 4, 8, 8]",
                    "`timestep` has 3 numbers, expected one, or one for each of 2",
                    "`encoder_hidden_states` is [1, 7, 21], expected [2, 7, 20]",
                    "`encoder_attention_mask` is [2, 6], expected [2, 7]",
                    "`class_labels` is not one of",
                ],
            ),
        ];
        for (inputs, named) in cases {
            let inputs: BTreeMap<_, _> =
                inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
            let found = crate::registry::forward(&folder, &inputs, &LoadOptions::default(), &Device::flex());
            let message = found.unwrap_err().to_string();
            for part in *named {
                assert!(message.contains(part), "{message}");
            }
        }
    }
}
