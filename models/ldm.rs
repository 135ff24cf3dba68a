//! The names in the single files of Stable Diffusion's authors (CompVis' `latent-diffusion`), in which the parts of a
//! pipeline stand beside each other: `v1-5-pruned-emaonly.safetensors` and its many descendants.
//!
//! Blocks are numbered there from the first convolution to the last, and the decoder's resolutions from fine to coarse. So a
//! map names every block; these are of four resolutions with two residual blocks each, which all of Stable Diffusion 1 and
//! 2 have. Everything that is not the part's is passed over.

use volary_weights::{KeyMap, Rule};

use Rule::{Ignore, Under};

use crate::bert::LINEAR;
use crate::clip::TEXT_TRANSFORMERS;
use crate::unet::{POINTWISE, TRANSFORMER, TRANSFORMER_OF_MATRICES};

const RESIDUAL: &[Rule] = &[
    Under("in_layers.0.", "norm1.", LINEAR),
    Under("in_layers.2.", "conv1.", LINEAR),
    Under("emb_layers.1.", "time.", LINEAR),
    Under("out_layers.0.", "norm2.", LINEAR),
    Under("out_layers.3.", "conv2.", LINEAR),
    Under("skip_connection.", "shortcut.", LINEAR),
];

/// What the training of a diffusion leaves beside its parts.
const SCHEDULE: &[Rule] = &[
    Ignore("betas"),
    Ignore("alphas_cumprod"),
    Ignore("alphas_cumprod_prev"),
    Ignore("sqrt_alphas_cumprod"),
    Ignore("sqrt_one_minus_alphas_cumprod"),
    Ignore("log_one_minus_alphas_cumprod"),
    Ignore("sqrt_recip_alphas_cumprod"),
    Ignore("sqrt_recipm1_alphas_cumprod"),
    Ignore("posterior_variance"),
    Ignore("posterior_log_variance_clipped"),
    Ignore("posterior_mean_coef1"),
    Ignore("posterior_mean_coef2"),
    Ignore("logvar"),
    Ignore("model_ema.{*}"),
];

/// Of the U-Net with one kind of transformers or the other.
macro_rules! unet {
    ($transformer:expr) => {
        &[
            Under("time_embed.0.", "time1.", LINEAR),
            Under("time_embed.2.", "time2.", LINEAR),
            Under("input_blocks.0.0.", "conv_in.", LINEAR),
            Under("input_blocks.1.0.", "down.0.residuals.0.", RESIDUAL),
            Under("input_blocks.1.1.", "down.0.transformers.0.", $transformer),
            Under("input_blocks.2.0.", "down.0.residuals.1.", RESIDUAL),
            Under("input_blocks.2.1.", "down.0.transformers.1.", $transformer),
            Under("input_blocks.3.0.op.", "down.0.downsample.", LINEAR),
            Under("input_blocks.4.0.", "down.1.residuals.0.", RESIDUAL),
            Under("input_blocks.4.1.", "down.1.transformers.0.", $transformer),
            Under("input_blocks.5.0.", "down.1.residuals.1.", RESIDUAL),
            Under("input_blocks.5.1.", "down.1.transformers.1.", $transformer),
            Under("input_blocks.6.0.op.", "down.1.downsample.", LINEAR),
            Under("input_blocks.7.0.", "down.2.residuals.0.", RESIDUAL),
            Under("input_blocks.7.1.", "down.2.transformers.0.", $transformer),
            Under("input_blocks.8.0.", "down.2.residuals.1.", RESIDUAL),
            Under("input_blocks.8.1.", "down.2.transformers.1.", $transformer),
            Under("input_blocks.9.0.op.", "down.2.downsample.", LINEAR),
            Under("input_blocks.10.0.", "down.3.residuals.0.", RESIDUAL),
            Under("input_blocks.11.0.", "down.3.residuals.1.", RESIDUAL),
            Under("middle_block.0.", "middle.residuals.0.", RESIDUAL),
            Under("middle_block.1.", "middle.transformer.", $transformer),
            Under("middle_block.2.", "middle.residuals.1.", RESIDUAL),
            Under("output_blocks.0.0.", "up.0.residuals.0.", RESIDUAL),
            Under("output_blocks.1.0.", "up.0.residuals.1.", RESIDUAL),
            Under("output_blocks.2.0.", "up.0.residuals.2.", RESIDUAL),
            Under("output_blocks.2.1.conv.", "up.0.upsample.", LINEAR),
            Under("output_blocks.3.0.", "up.1.residuals.0.", RESIDUAL),
            Under("output_blocks.3.1.", "up.1.transformers.0.", $transformer),
            Under("output_blocks.4.0.", "up.1.residuals.1.", RESIDUAL),
            Under("output_blocks.4.1.", "up.1.transformers.1.", $transformer),
            Under("output_blocks.5.0.", "up.1.residuals.2.", RESIDUAL),
            Under("output_blocks.5.1.", "up.1.transformers.2.", $transformer),
            Under("output_blocks.5.2.conv.", "up.1.upsample.", LINEAR),
            Under("output_blocks.6.0.", "up.2.residuals.0.", RESIDUAL),
            Under("output_blocks.6.1.", "up.2.transformers.0.", $transformer),
            Under("output_blocks.7.0.", "up.2.residuals.1.", RESIDUAL),
            Under("output_blocks.7.1.", "up.2.transformers.1.", $transformer),
            Under("output_blocks.8.0.", "up.2.residuals.2.", RESIDUAL),
            Under("output_blocks.8.1.", "up.2.transformers.2.", $transformer),
            Under("output_blocks.8.2.conv.", "up.2.upsample.", LINEAR),
            Under("output_blocks.9.0.", "up.3.residuals.0.", RESIDUAL),
            Under("output_blocks.9.1.", "up.3.transformers.0.", $transformer),
            Under("output_blocks.10.0.", "up.3.residuals.1.", RESIDUAL),
            Under("output_blocks.10.1.", "up.3.transformers.1.", $transformer),
            Under("output_blocks.11.0.", "up.3.residuals.2.", RESIDUAL),
            Under("output_blocks.11.1.", "up.3.transformers.2.", $transformer),
            Under("out.0.", "norm_out.", LINEAR),
            Under("out.2.", "conv_out.", LINEAR),
        ]
    };
}

/// The U-Net of Stable Diffusion 1 in a single file.
pub const UNET: KeyMap = KeyMap::new(&[
    Under("model.diffusion_model.", "", unet!(TRANSFORMER)),
    Ignore("first_stage_model.{*}"),
    Ignore("cond_stage_model.{*}"),
    Under("", "", SCHEDULE),
]);

/// The same of Stable Diffusion 2. Both load either.
pub const UNET_2: KeyMap = KeyMap::new(&[
    Under("model.diffusion_model.", "", unet!(TRANSFORMER_OF_MATRICES)),
    Ignore("first_stage_model.{*}"),
    Ignore("cond_stage_model.{*}"),
    Under("", "", SCHEDULE),
]);

const CODEC_RESIDUAL: &[Rule] = &[
    Under("norm1.", "norm1.", LINEAR),
    Under("conv1.", "conv1.", LINEAR),
    Under("norm2.", "norm2.", LINEAR),
    Under("conv2.", "conv2.", LINEAR),
    Under("nin_shortcut.", "shortcut.", LINEAR),
];

const MIDDLE: &[Rule] = &[
    Under("block_1.", "residuals.0.", CODEC_RESIDUAL),
    Under("attn_1.norm.", "attention.norm.", LINEAR),
    Under("attn_1.q.", "attention.attention.query.", POINTWISE),
    Under("attn_1.k.", "attention.attention.key.", POINTWISE),
    Under("attn_1.v.", "attention.attention.value.", POINTWISE),
    Under("attn_1.proj_out.", "attention.attention.output.", POINTWISE),
    Under("block_2.", "residuals.1.", CODEC_RESIDUAL),
];

const AUTOENCODER_PARTS: &[Rule] = &[
    Under("encoder.conv_in.", "encoder.conv_in.", LINEAR),
    Under("encoder.down.{}.block.{}.", "encoder.stages.{}.residuals.{}.", CODEC_RESIDUAL),
    Under("encoder.down.{}.downsample.conv.", "encoder.stages.{}.downsample.", LINEAR),
    Under("encoder.mid.", "encoder.middle.", MIDDLE),
    Under("encoder.norm_out.", "encoder.norm_out.", LINEAR),
    Under("encoder.conv_out.", "encoder.conv_out.", LINEAR),
    Under("quant_conv.", "quant_conv.", LINEAR),
    Under("post_quant_conv.", "post_quant_conv.", LINEAR),
    Under("decoder.conv_in.", "decoder.conv_in.", LINEAR),
    Under("decoder.mid.", "decoder.middle.", MIDDLE),
    Under("decoder.up.3.block.{}.", "decoder.stages.0.residuals.{}.", CODEC_RESIDUAL),
    Under("decoder.up.3.upsample.conv.", "decoder.stages.0.upsample.", LINEAR),
    Under("decoder.up.2.block.{}.", "decoder.stages.1.residuals.{}.", CODEC_RESIDUAL),
    Under("decoder.up.2.upsample.conv.", "decoder.stages.1.upsample.", LINEAR),
    Under("decoder.up.1.block.{}.", "decoder.stages.2.residuals.{}.", CODEC_RESIDUAL),
    Under("decoder.up.1.upsample.conv.", "decoder.stages.2.upsample.", LINEAR),
    Under("decoder.up.0.block.{}.", "decoder.stages.3.residuals.{}.", CODEC_RESIDUAL),
    Under("decoder.norm_out.", "decoder.norm_out.", LINEAR),
    Under("decoder.conv_out.", "decoder.conv_out.", LINEAR),
    Ignore("loss.{*}"),
];

/// The autoencoder in a single file, or in one of its own (`vae-ft-mse-840000-ema-pruned`).
pub const AUTOENCODER: KeyMap = KeyMap::new(&[
    Under("", "", AUTOENCODER_PARTS),
    Ignore("model.diffusion_model.{*}"),
    Ignore("cond_stage_model.{*}"),
    Under("", "", SCHEDULE),
])
.with_prefixes(&["first_stage_model."]);

/// CLIP's text transformer in a single file of Stable Diffusion 1.
pub const TEXT: KeyMap = KeyMap::new(&[
    Under("cond_stage_model.transformer.text_model.", "", TEXT_TRANSFORMERS),
    Ignore("model.diffusion_model.{*}"),
    Ignore("first_stage_model.{*}"),
    Under("", "", SCHEDULE),
]);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{Device, TensorData};
    use volary_weights::{LoadOptions, load, open, save};

    use super::*;
    use crate::folder::Folder;
    use crate::{autoencoder, unet};

    #[test]
    fn names_of_the_authors() {
        let path = |keys: &KeyMap, key: &str| keys.paths(key).unwrap().join(" ");
        for (key, expected) in [
            ("input_blocks.0.0.weight", "conv_in.weight"),
            ("input_blocks.3.0.op.bias", "down.0.downsample.bias"),
            ("input_blocks.7.1.proj_in.weight", "down.2.transformers.0.proj_in.weight"),
            ("input_blocks.11.0.out_layers.3.weight", "down.3.residuals.1.conv2.weight"),
            ("middle_block.2.emb_layers.1.weight", "middle.residuals.1.time.weight"),
            ("output_blocks.2.1.conv.weight", "up.0.upsample.weight"),
            ("output_blocks.5.2.conv.weight", "up.1.upsample.weight"),
            ("output_blocks.9.0.skip_connection.bias", "up.3.residuals.0.shortcut.bias"),
            ("out.2.weight", "conv_out.weight"),
        ] {
            assert_eq!(path(&UNET, &format!("model.diffusion_model.{key}")), expected);
        }
        for (key, expected) in [
            ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.stages.1.residuals.0.shortcut.weight"),
            ("decoder.up.3.block.2.norm1.bias", "decoder.stages.0.residuals.2.norm1.bias"),
            ("decoder.up.1.upsample.conv.weight", "decoder.stages.2.upsample.weight"),
            ("decoder.mid.attn_1.proj_out.weight", "decoder.middle.attention.attention.output.weight"),
        ] {
            assert_eq!(path(&AUTOENCODER, key), expected);
        }
    }

    /// Both parts beside each other in one file, each with what the other and the schedule leave there.
    #[test]
    fn parts_are_found_in_a_single_file() {
        let fixture =
            |name| Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name));
        let (device, options) = (Device::flex(), LoadOptions::default());
        let scratch = tempfile::tempdir().unwrap();
        let write = |file: &str, save: &dyn Fn(&Path)| {
            let path = scratch.path().join(file);
            save(&path);
            volary_weights::read_tensors(&path).unwrap()
        };

        let (unet, vae) = (fixture("unet_sd1"), fixture("vae_kl"));
        let unet_config = unet::parse(&unet.config("config.json").unwrap()).unwrap();
        let vae_config = autoencoder::parse(&vae.config("config.json").unwrap()).unwrap();
        let source =
            load(unet_config.init(&device), unet.checkpoint().unwrap().as_ref(), &unet::KEYS, &options);
        let unet = source.unwrap();
        let source =
            load(vae_config.init(&device), vae.checkpoint().unwrap().as_ref(), &autoencoder::KEYS, &options);
        let vae = source.unwrap();

        let unet_file = write("unet", &|path| save(&unet, &UNET, None, path, None).unwrap());
        let vae_file = write("vae", &|path| save(&vae, &AUTOENCODER, None, path, None).unwrap());
        // Stable Diffusion 1 has two more: its third resolution is wider than its second
        assert_eq!(unet_file.len(), 686 - 2);
        let matrices = write("matrices", &|path| save(&unet, &UNET_2, None, path, None).unwrap());
        assert!(matrices.keys().eq(unet_file.keys()));
        let rank = |file: &BTreeMap<String, TensorData>| {
            file["model.diffusion_model.middle_block.1.proj_in.weight"].shape().len()
        };
        assert_eq!((rank(&unet_file), rank(&matrices)), (4, 2));
        let under = vae_file.into_iter().map(|(name, data)| (format!("first_stage_model.{name}"), data));
        let betas = [("betas".to_owned(), TensorData::from([0.1_f32, 0.2]))];
        let all: Vec<_> = unet_file.into_iter().chain(under).chain(betas).collect();
        volary_weights::save_tensors(&scratch.path().join("model.safetensors"), &all).unwrap();

        let single = open(&scratch.path().join("model.safetensors")).unwrap();
        let again = load(unet_config.init(&device), single.as_ref(), &UNET, &options).unwrap();
        let file = write("again", &|path| save(&again, &unet::KEYS, None, path, None).unwrap());
        let original = fixture("unet_sd1").path().join("diffusion_pytorch_model.safetensors");
        assert_eq!(file, volary_weights::read_tensors(&original).unwrap());
        let again = load(vae_config.init(&device), single.as_ref(), &AUTOENCODER, &options).unwrap();
        let file = write("again", &|path| save(&again, &autoencoder::KEYS, None, path, None).unwrap());
        let original = fixture("vae_kl").path().join("diffusion_pytorch_model.safetensors");
        assert_eq!(file, volary_weights::read_tensors(&original).unwrap());
    }
}
