//! EfficientNet: a convolutional tower for pictures (Tan & Le 2019, <https://arxiv.org/abs/1905.11946>), which BriVL
//! and ALIGN see with. The weights trained by Noisy Student (Xie et al. 2019, <https://arxiv.org/abs/1911.04252>) are
//! read as timm publishes them.
//!
//! The numbers match timm's `tf_efficientnet_*`, which pad as TensorFlow does.
//!
//! ```sh
//! volary forward path/to/tf_efficientnet_b5.ns_jft_in1k --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::{Device, Tensor};
use volary_vision::efficientnet::{EfficientNet, EfficientNetConfig};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::clip::BATCH_NORM;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::vit::{timm_args, timm_classes, timm_pretrained};

/// Multipliers of width and depth of timm's sizes.
const SIZES: &[(&str, f64, f64)] = &[
    ("b0", 1.0, 1.0),
    ("b1", 1.0, 1.1),
    ("b2", 1.1, 1.2),
    ("b3", 1.2, 1.4),
    ("b4", 1.4, 1.8),
    ("b5", 1.6, 2.2),
    ("b6", 1.8, 2.6),
    ("b7", 2.0, 3.1),
    ("b8", 2.2, 3.6),
    ("l2", 4.3, 5.3),
];

/// The multipliers of `tf_efficientnet_{size}`, after which `_` or `.` and the weights' name may stand.
fn multipliers(architecture: &str) -> Option<(f64, f64)> {
    let size = architecture.strip_prefix("tf_efficientnet_")?.split(['_', '.']).next()?;
    let &(_, width, depth) = SIZES.iter().find(|row| row.0 == size)?;
    Some((width, depth))
}

/// The network that timm knows by this name, without a classifier; `None` if it is none of `tf_efficientnet_{b0 to b8,
/// l2}`.
pub fn architecture(name: &str) -> Option<EfficientNetConfig> {
    multipliers(name).map(|(width, depth)| EfficientNetConfig::scaled(width, depth))
}

/// `config.json` of timm. Of `model_args` the multipliers are read, `channel_multiplier` and `depth_multiplier`, and
/// what changes no number is passed over.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config) -> Result<EfficientNetConfig, ConfigError> {
    let own = config.text("architecture").and_then(multipliers);
    let (width, depth) =
        own.ok_or_else(|| config.error("architecture", "tf_efficientnet_ with b0 to b8 or l2"))?;
    let args = config.object_or_empty("model_args")?;
    timm_args(&args, &[ARGS], &[])?;
    let multiplier = |field: &str, own: f64| match args.number_or(field, own)? {
        by if by > 0.0 && by <= 32.0 => Ok(by),
        _ => Err(args.error(field, "a number above 0 and at most 32")),
    };
    let classes = timm_classes(config, &timm_pretrained(config)?, &args)?;
    let (width, depth) = (multiplier("channel_multiplier", width)?, multiplier("depth_multiplier", depth)?);
    Ok(EfficientNetConfig::scaled(width, depth).with_classes(classes))
}

/// Arguments that are read, and those that only matter for training.
const ARGS: &[&str] =
    &["channel_multiplier", "depth_multiplier", "num_classes", "drop_rate", "drop_path_rate"];

const SQUEEZE_EXCITE: &[Rule] = &[
    Reshape("conv_reduce.weight", "squeeze.weight", Ones::After(2)),
    Rename("conv_reduce.bias", "squeeze.bias"),
    Reshape("conv_expand.weight", "excite.weight", Ones::After(2)),
    Rename("conv_expand.bias", "excite.bias"),
];

/// Blocks that do not widen.
const SEPARABLE: &[Rule] = &[
    Rename("conv_dw.weight", "depthwise.weight"),
    Under("bn1.", "depthwise_norm.", BATCH_NORM),
    Under("se.", "", SQUEEZE_EXCITE),
    Reshape("conv_pw.weight", "projection.weight", Ones::After(2)),
    Under("bn2.", "projection_norm.", BATCH_NORM),
];

/// Blocks that do.
const INVERTED: &[Rule] = &[
    Reshape("conv_pw.weight", "expansion.conv.weight", Ones::After(2)),
    Under("bn1.", "expansion.norm.", BATCH_NORM),
    Rename("conv_dw.weight", "depthwise.weight"),
    Under("bn2.", "depthwise_norm.", BATCH_NORM),
    Under("se.", "", SQUEEZE_EXCITE),
    Reshape("conv_pwl.weight", "projection.weight", Ones::After(2)),
    Under("bn3.", "projection_norm.", BATCH_NORM),
];

/// Keys of timm without what stands before them in others.
pub const TRUNK: &[Rule] = &[
    Rename("conv_stem.weight", "stem.weight"),
    Under("bn1.", "stem_norm.", BATCH_NORM),
    Under("blocks.0.{}.", "stages.0.blocks.{}.", SEPARABLE),
    Under("blocks.1.{}.", "stages.1.blocks.{}.", INVERTED),
    Under("blocks.2.{}.", "stages.2.blocks.{}.", INVERTED),
    Under("blocks.3.{}.", "stages.3.blocks.{}.", INVERTED),
    Under("blocks.4.{}.", "stages.4.blocks.{}.", INVERTED),
    Under("blocks.5.{}.", "stages.5.blocks.{}.", INVERTED),
    Under("blocks.6.{}.", "stages.6.blocks.{}.", INVERTED),
    Reshape("conv_head.weight", "head.weight", Ones::After(2)),
    Under("bn2.", "head_norm.", BATCH_NORM),
    Rename("classifier.weight", "classifier.weight"),
    Rename("classifier.bias", "classifier.bias"),
];

/// Keys of timm.
pub const KEYS: KeyMap = KeyMap::new(TRUNK);

/// EfficientNet as the registry knows it.
pub const SYSTEM: System = System {
    name: "efficientnet",
    about: "convolutional towers for pictures: EfficientNet",
    file: "models/efficientnet.rs",
    tasks: &["forward"],
    proved: &["efficientnet"],
    presets: PRESETS,
    recognises: |_, config| {
        let named = config.and_then(|config| config.text("architecture"));
        named.is_some_and(|name| multipliers(name).is_some())
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = parse(&folder.config("config.json")?)?;
        describe(folder, &config.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| {
        let config = parse(&folder.config("config.json")?)?;
        Ok(Box::new(Runner { model: fill(folder, config.init(device), &KEYS, options)? }))
    },
    generator: None,
};

/// A network behind the forward contract.
struct Runner {
    model: EfficientNet,
}

impl Forward for Runner {
    /// `image`, normalised pixels `[batch, 3, height, width]` of any size.
    ///
    /// Gives `forward_features`, `[batch, d_features, rows, columns]`, and with a classifier `logits`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pixels = inputs.float::<4>("image");
        inputs.missing("image");
        if let Some([_, channels, ..]) = pixels.as_ref().map(Tensor::dims)
            && channels != 3
        {
            inputs.problem(format!("`image` has {channels} channels, expected 3"));
        }
        inputs.finish()?;
        let Some(pixels) = pixels else { return Ok(Outputs::new()) }; // was an error
        let features = self.model.features(pixels); // [batch, rows, columns, d_features]
        let mut outputs = vec![output("forward_features", features.clone().permute([0, 3, 1, 2]))];
        outputs.extend(self.model.logits(features).map(|logits| output("logits", logits)));
        Ok(outputs)
    }
}

const fn preset(name: &'static str, width: f64, depth: f64, parameters: usize) -> Preset {
    Preset {
        name,
        shape: Shape::EfficientNet(EfficientNetConfig::scaled(width, depth).with_classes(1000)),
        weights: Weights::Hub,
        license: "Apache-2.0",
        parameters,
        source: "timm, with the classifier",
    }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("timm/tf_efficientnet_b0.ns_jft_in1k", 1.0, 1.0, 5_288_548),
    preset("timm/tf_efficientnet_b1.ns_jft_in1k", 1.0, 1.1, 7_794_184),
    preset("timm/tf_efficientnet_b2.ns_jft_in1k", 1.1, 1.2, 9_109_994),
    preset("timm/tf_efficientnet_b3.ns_jft_in1k", 1.2, 1.4, 12_233_232),
    preset("timm/tf_efficientnet_b4.ns_jft_in1k", 1.4, 1.8, 19_341_616),
    preset("timm/tf_efficientnet_b5.ns_jft_in1k", 1.6, 2.2, 30_389_784),
    preset("timm/tf_efficientnet_b6.ns_jft_in1k", 1.8, 2.6, 43_040_704),
    preset("timm/tf_efficientnet_b7.ns_jft_in1k", 2.0, 3.1, 66_347_960),
    preset("timm/tf_efficientnet_b8.ra_in1k", 2.2, 3.6, 87_413_142),
    preset("timm/tf_efficientnet_l2.ns_jft_in1k", 4.3, 5.3, 480_309_308),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::parameters;

    use super::*;

    fn config(text: &str) -> Result<EfficientNetConfig, ConfigError> {
        parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        let model = EfficientNetConfig::scaled(0.1, 0.5).with_classes(3).init(&Device::flex());
        for parameter in parameters(&model) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
    }

    #[test]
    fn names_of_timm_old_and_new() {
        let b5 = Some(EfficientNetConfig::scaled(1.6, 2.2));
        for name in ["tf_efficientnet_b5", "tf_efficientnet_b5_ns", "tf_efficientnet_b5.ns_jft_in1k"] {
            assert_eq!(architecture(name), b5, "{name}");
        }
        // other paddings, other blocks, other stages
        for name in ["efficientnet_b5", "tf_efficientnet_es", "tf_efficientnetv2_b0", "tf_efficientnet_b9"] {
            assert_eq!(architecture(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let named = |rest: &str| format!(r#"{{"architecture": "tf_efficientnet_b0"{rest}}}"#);
        assert_eq!(config(&named("")).unwrap().n_classes, 1000);
        assert_eq!(config(&named(r#", "num_classes": 0"#)).unwrap().n_classes, 0);
        for (args, field) in [
            (r#""act_layer": "relu""#, "`model_args.act_layer`"),
            (r#""channel_multiplier": 0"#, "`model_args.channel_multiplier`"),
            (r#""channel_multiplier": 1e9"#, "`model_args.channel_multiplier`"),
            (r#""depth_multiplier": -1"#, "`model_args.depth_multiplier`"),
            (r#""depth_multiplier": "deep""#, "`model_args.depth_multiplier`"),
            (r#""num_classes": -1"#, "`model_args.num_classes`"),
        ] {
            let message = config(&named(&format!(r#", "model_args": {{{args}}}"#))).unwrap_err().to_string();
            assert!(message.contains(field), "{message}");
        }
    }
}
