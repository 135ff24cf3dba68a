//! Chinese CLIP: CLIP's tower for pictures and a Chinese RoBERTa for texts, trained on pairs in Chinese (Yang et al. 2022,
//! OFA-Sys, <https://arxiv.org/abs/2211.01335>).
//!
//! The numbers match `transformers` (`ChineseCLIPModel`). The text's embedding is read off at its first token, without
//! BERT's pooler. Version 5 of transformers takes the vector of `[PAD]` as zero whatever the file says; here the file
//! counts, as it did before. With an `attention_mask` the difference is seen by no real token.
//!
//! ```sh
//! volary classify cat.jpg --labels "一只猫,一条狗" --model OFA-Sys/chinese-clip-vit-base-patch16
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{Linear, LinearConfig};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, CHINESE, LARGE};
use crate::clip::{TransformerConfig, VIT_TRANSFORMERS, VitConfig, VitTower, normalise};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared_embeddings};

/// Shape of a whole Chinese CLIP.
#[derive(Clone, Debug, PartialEq)]
pub struct ChineseClipConfig {
    /// CLIP's tower for pictures.
    pub vision: VitConfig,
    /// BERT, without a pooler.
    pub text: BertConfig,
    /// Width of the space where both meet.
    pub d_embed: usize,
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct ChineseClip {
    /// Pictures.
    pub vision: VitTower,
    /// Texts.
    pub text: Bert,
    /// `[d_embed, d_model]`, no bias.
    pub text_projection: Linear,
    /// Logarithm of the factor on cosine similarities; `[1]`.
    pub logit_scale: Param<Tensor<1>>,
}

impl ChineseClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> ChineseClip {
        ChineseClip {
            vision: self.vision.init(self.d_embed, device),
            text: self.text.init(device),
            text_projection: LinearConfig::new(self.text.d_model, self.d_embed).with_bias(false).init(device),
            logit_scale: Initializer::Constant { value: (1.0_f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl ChineseClip {
    /// The embedding of the first token's state, not normalised: `[batch, seq, d_model] -> [batch, d_embed]`.
    pub fn embed(&self, hidden: &Tensor<3>) -> Tensor<2> {
        self.text_projection.forward(hidden.clone().narrow(1, 0, 1).squeeze_dim(1))
    }
}

impl ChineseClipConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of transformers; what it leaves out has the values of `ChineseCLIPConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let text = config.object_or_empty("text_config")?;
        Ok(Self {
            vision: VitConfig::transformers(&config.object_or_empty("vision_config")?)?,
            text: BertConfig::shape(&text, &BertConfig { pooler: false, ..bert::BASE })?,
            d_embed: config.size_or("projection_dim", 512)?,
        })
    }

    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(
        &self,
        folder: &Folder,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<ChineseClip, Error> {
        fill(folder, self.init(device), &KEYS, options)
    }
}

/// Keys of transformers' `ChineseCLIPModel`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Rename("visual_projection.weight", "vision.projection.weight"),
    Rename("text_projection.weight", "text_projection.weight"),
    Under("vision_model.", "vision.", VIT_TRANSFORMERS),
    Under("text_model.", "text.", bert::TRUNK_WITHOUT_POOLER),
]);

/// Chinese CLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "chinese_clip",
    about: "CLIP with a Chinese RoBERTa as its tower for texts",
    file: "models/chinese_clip.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["chinese_clip"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("chinese_clip")),
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &ChineseClipConfig::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = ChineseClipConfig::of(folder)?;
        Ok(Box::new(Loaded { model: config.load(folder, options, device)?, config }))
    },
    generator: None,
};

/// A Chinese CLIP and its shape.
struct Loaded {
    model: ChineseClip,
    config: ChineseClipConfig,
}

impl TwoTower for Loaded {
    fn fit(&self) -> Fit {
        let ChineseClipConfig { vision, text, d_embed } = &self.config;
        Fit {
            image_size: vision.image_size,
            context_length: text.context_length(),
            vocab_size: text.vocab_size,
            d_embed: *d_embed,
        }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(self.model.vision.forward(pixels).embedding)
    }

    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        let input = BertInput { mask: Mask::Padding(real), ..ids.into() };
        normalise(self.model.embed(&self.model.text.forward(input).hidden))
    }

    fn scale(&self) -> Tensor<1> {
        self.model.logit_scale.val().exp()
    }
}

impl Forward for Loaded {
    /// `pixel_values`, `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`.
    ///
    /// The poolers' outputs are the embeddings before they are normalised.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let size = self.config.vision.image_size;
        let pixels = inputs.needed_pictures("pixel_values", [3, size, size]);
        let texts = self.config.text.read(&mut inputs);
        inputs.finish()?;
        let (Some(pixels), Some(texts)) = (pixels, texts) else { return Ok(Outputs::new()) }; // finished with an error

        let (ChineseClip { vision, text, .. }, scale) = (&self.model, self.scale());
        let patches = vision.encode(pixels.cast(scale.dtype()));
        let images = vision.projection.forward(vision.pool(&patches));
        let hidden = text.forward(texts).hidden;
        let texts = self.model.embed(&hidden);
        let mut outputs = compared_embeddings(images.clone(), texts.clone(), scale);
        outputs.extend([
            output("vision_model_output.last_hidden_state", patches),
            output("vision_model_output.pooler_output", images),
            output("text_model_output.last_hidden_state", hidden),
            output("text_model_output.pooler_output", texts),
        ]);
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

const fn vit(
    image_size: usize,
    patch_size: usize,
    d_model: usize,
    n_layers: usize,
    n_heads: usize,
) -> VitConfig {
    VitConfig {
        image_size,
        patch_size,
        transformer: TransformerConfig {
            d_model,
            d_ff: 4 * d_model,
            n_layers,
            n_heads,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        },
    }
}

const BASE_TEXT: BertConfig = BertConfig { pooler: false, ..CHINESE };
const LARGE_TEXT: BertConfig = BertConfig { vocab_size: CHINESE.vocab_size, pooler: false, ..LARGE };

const fn preset(
    name: &'static str,
    vision: VitConfig,
    text: BertConfig,
    d_embed: usize,
    parameters: usize,
) -> Preset {
    let shape = Shape::ChineseClip(ChineseClipConfig { vision, text, d_embed });
    let source = "counted here; the paper's table 1 says 188, 406, 407 and 958 million";
    Preset { name, shape, weights: Weights::Hub, license: "MIT", parameters, source }
}

/// Published sizes: Yang et al. 2022, table 1. Its smallest, with a ResNet-50, was never put into this layout.
pub const PRESETS: &[Preset] = &[
    preset("OFA-Sys/chinese-clip-vit-base-patch16", vit(224, 16, 768, 12, 12), BASE_TEXT, 512, 188_262_913),
    preset("OFA-Sys/chinese-clip-vit-large-patch14", vit(224, 14, 1024, 24, 16), BASE_TEXT, 768, 406_233_089),
    preset(
        "OFA-Sys/chinese-clip-vit-large-patch14-336px",
        vit(336, 14, 1024, 24, 16),
        BASE_TEXT,
        768,
        406_560_769,
    ),
    preset(
        "OFA-Sys/chinese-clip-vit-huge-patch14",
        vit(224, 14, 1280, 32, 16),
        LARGE_TEXT,
        1024,
        957_598_209,
    ),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Tolerance;
    use volary_weights::parameters;

    use super::*;

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        for preset in PRESETS {
            let Shape::ChineseClip(config) = &preset.shape else { panic!("{}", preset.name) };
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = KEYS.keys(&parameter.path).unwrap();
                assert_eq!(keys.len(), 1, "{}", parameter.path);
                assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
        assert_eq!(KEYS.paths("text_model.pooler.dense.weight").unwrap(), [""; 0]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let error = |fields: &str| {
            let config = Config::parse(Path::new("config.json"), fields.as_bytes()).unwrap();
            ChineseClipConfig::parse(&config).map_err(|error| error.to_string())
        };
        assert!(error("{}").is_ok());
        for (fields, named) in [
            (r#"{"text_config": {"hidden_act": "mish"}}"#, "`text_config.hidden_act`"),
            (r#"{"text_config": {"num_attention_heads": 7}}"#, "`text_config.num_attention_heads`"),
            (r#"{"vision_config": {"num_hidden_layers": 5000}}"#, "`vision_config.num_hidden_layers`"),
            (r#"{"projection_dim": -2}"#, "`projection_dim`"),
        ] {
            let message = error(fields).unwrap_err();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn padding_does_not_change_a_text() {
        let device = Device::flex();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chinese_clip");
        let folder = Folder::Disk(folder);
        let config = ChineseClipConfig::of(&folder).unwrap();
        let model = config.load(&folder, &LoadOptions::default(), &device).unwrap();
        let towers = Loaded { model, config };
        let real = |rows: &[bool]| Tensor::<1, Bool>::from_data(rows, &device).unsqueeze();
        let short = towers.encode_texts(Tensor::from_data([[11, 7, 12]], &device), real(&[true; 3]));
        let padded = Tensor::from_data([[11, 7, 12, 0, 0]], &device);
        let padded = towers.encode_texts(padded, real(&[true, true, true, false, false]));
        padded.into_data().assert_approx_eq::<f32>(&short.into_data(), Tolerance::default());
    }
}
