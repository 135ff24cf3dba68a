//! AltCLIP: CLIP with another language tower, XLM-R in place of CLIP's own, so that pictures meet texts of many languages
//! (Chen et al. 2022, BAAI, <https://arxiv.org/abs/2211.06679>). AltCLIP speaks Chinese and English, `-m9` nine languages,
//! `-m18` eighteen.
//!
//! It is made in two stages. First the text tower learns to give parallel texts the vectors that CLIP's own text tower
//! gives them ([`volary_multimodal::distillation::teacher_mse`] of [`AltText::sentence`]), then both towers meet pictures,
//! with the tower for these held fixed ([`volary_multimodal::contrastive::locked_info_nce`]).
//!
//! The numbers match `transformers` (`AltCLIPModel`). Its own default configuration has CLIP's B/32 for pictures, which no
//! released weights have: read the folder's. The tower for pictures of `-m18` is not stated in a place that we could
//! check: ViT-H/14 is what the width 1024 where both meet and the size of its file say.
//!
//! ```sh
//! volary classify cat.jpg --labels "一只猫,a dog,un chien" --model BAAI/AltCLIP
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{LayerNorm, Linear, LinearConfig};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, Numbering, XLM_ROBERTA_LARGE};
use crate::clip::{TransformerConfig, VIT_TRANSFORMERS, VitConfig, VitTower, normalise};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared_embeddings};

/// Shape of a whole AltCLIP.
#[derive(Clone, Debug, PartialEq)]
pub struct AltClipConfig {
    /// CLIP's tower for pictures.
    pub vision: VitConfig,
    /// The tower for texts.
    pub text: AltTextConfig,
    /// Width of the space where both meet.
    pub d_embed: usize,
}

/// Shape of the tower for texts.
#[derive(Clone, Debug, PartialEq)]
pub struct AltTextConfig {
    /// XLM-R, without a pooler.
    pub roberta: BertConfig,
    /// Width of the teacher's sentence vectors.
    pub d_teacher: usize,
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct AltClip {
    /// Pictures.
    pub vision: VitTower,
    /// Texts.
    pub text: AltText,
    /// Logarithm of the factor on cosine similarities; `[1]`.
    pub logit_scale: Param<Tensor<1>>,
}

/// XLM-R, a norm, a map to the teacher's width, and a projection of the first token.
#[derive(Module, Debug)]
pub struct AltText {
    /// Bidirectional, post-norm.
    pub roberta: Bert,
    /// On what the last block gives.
    pub norm: LayerNorm,
    /// `[d_teacher, d_model]`.
    pub transformation: Linear,
    /// `[d_embed, d_teacher]`, no bias.
    pub projection: Linear,
}

impl AltClipConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> AltClip {
        AltClip {
            vision: self.vision.init(self.d_embed, device),
            text: self.text.init(self.d_embed, device),
            logit_scale: Initializer::Constant { value: (1.0_f64 / 0.07).ln() }.init([1], device),
        }
    }
}

impl AltTextConfig {
    /// An untrained tower. Nothing is allocated before first use.
    pub fn init(&self, d_embed: usize, device: &Device) -> AltText {
        let BertConfig { d_model, layer_norm_eps, .. } = self.roberta;
        AltText {
            roberta: self.roberta.init(device),
            norm: LayerNorm::new(d_model, layer_norm_eps, device),
            transformation: LinearConfig::new(d_model, self.d_teacher).init(device),
            projection: LinearConfig::new(self.d_teacher, d_embed).with_bias(false).init(device),
        }
    }
}

impl AltText {
    /// The tokens' states at the teacher's width, `[batch, seq, d_teacher]`.
    ///
    /// # Panics
    /// As [`Bert::forward`].
    pub fn forward(&self, input: impl Into<BertInput>) -> Tensor<3> {
        let hidden = self.roberta.forward(input).hidden; // [batch, seq, d_model]
        self.transformation.forward(self.norm.forward(hidden))
    }

    /// The first token's state, which learns from the teacher: `[batch, seq, d_teacher] -> [batch, d_teacher]`.
    pub fn sentence(&self, states: &Tensor<3>) -> Tensor<2> {
        states.clone().narrow(1, 0, 1).squeeze_dim(1)
    }

    /// Texts' embeddings, not normalised, `[batch, d_embed]`.
    ///
    /// # Panics
    /// As [`Bert::forward`].
    pub fn embed(&self, input: impl Into<BertInput>) -> Tensor<2> {
        self.projection.forward(self.sentence(&self.forward(input)))
    }
}

impl AltClipConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of transformers; what it leaves out has the values of `AltCLIPConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let text = config.object_or_empty("text_config")?;
        let roberta = BertConfig::shape(&text, &BertConfig { pooler: false, ..XLM_ROBERTA_LARGE })?;
        let numbering = Numbering::after_padding(&text, roberta.n_positions)?;
        Ok(Self {
            vision: VitConfig::transformers(&config.object_or_empty("vision_config")?)?,
            text: AltTextConfig {
                roberta: BertConfig { numbering, ..roberta },
                d_teacher: text.size_or("project_dim", 768)?,
            },
            d_embed: config.size_or("projection_dim", 768)?,
        })
    }
}

/// Keys of transformers' `AltCLIPModel`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Rename("visual_projection.weight", "vision.projection.weight"),
    Rename("text_projection.weight", "text.projection.weight"),
    Under("vision_model.", "vision.", VIT_TRANSFORMERS),
    Under(
        "text_model.",
        "text.",
        &[
            Under("roberta.", "roberta.", bert::TRUNK_WITHOUT_POOLER),
            Under("pre_LN.", "norm.", bert::LINEAR),
            Under("transformation.", "transformation.", bert::LINEAR),
        ],
    ),
]);

/// AltCLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "altclip",
    about: "CLIP with XLM-R as its tower for texts, in 2, 9 or 18 languages",
    file: "models/altclip.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["altclip"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("altclip")),
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &AltClipConfig::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = AltClipConfig::of(folder)?;
        Ok(Box::new(Loaded { model: config.load(folder, options, device)?, config }))
    },
    generator: None,
};

impl AltClipConfig {
    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<AltClip, Error> {
        fill(folder, self.init(device), &KEYS, options)
    }
}

/// An AltCLIP and its shape.
struct Loaded {
    model: AltClip,
    config: AltClipConfig,
}

impl TwoTower for Loaded {
    fn fit(&self) -> Fit {
        let AltClipConfig { vision, text, d_embed } = &self.config;
        Fit {
            image_size: vision.image_size,
            context_length: text.roberta.context_length(),
            vocab_size: text.roberta.vocab_size,
            d_embed: *d_embed,
        }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(self.model.vision.forward(pixels).embedding)
    }

    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        normalise(self.model.text.embed(BertInput { mask: Mask::Padding(real), ..ids.into() }))
    }

    fn scale(&self) -> Tensor<1> {
        self.model.logit_scale.val().exp()
    }
}

impl Forward for Loaded {
    /// `pixel_values`, `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`.
    ///
    /// The outputs of the towers are those before the projections into the space where they meet.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let size = self.config.vision.image_size;
        let pixels = inputs.needed_pictures("pixel_values", [3, size, size]);
        let texts = self.config.text.roberta.read(&mut inputs);
        inputs.finish()?;
        let (Some(pixels), Some(texts)) = (pixels, texts) else { return Ok(Outputs::new()) }; // finished with an error

        let (AltClip { vision, text, .. }, scale) = (&self.model, self.scale());
        let patches = vision.encode(pixels.cast(scale.dtype()));
        let class = vision.pool(&patches);
        let states = text.forward(texts);
        let sentence = text.sentence(&states);
        let images = vision.projection.forward(class.clone());
        let mut outputs = compared_embeddings(images, text.projection.forward(sentence.clone()), scale);
        outputs.extend([
            output("vision_model_output.last_hidden_state", patches),
            output("vision_model_output.pooler_output", class),
            output("text_model_output.last_hidden_state", states),
            output("text_model_output.pooler_output", sentence),
        ]);
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

const fn text(d_teacher: usize) -> AltTextConfig {
    AltTextConfig { roberta: BertConfig { pooler: false, ..XLM_ROBERTA_LARGE }, d_teacher }
}

/// CLIP's ViT-L/14 and XLM-R large.
const LARGE: AltClipConfig = AltClipConfig {
    vision: VitConfig {
        image_size: 224,
        patch_size: 14,
        transformer: TransformerConfig {
            d_model: 1024,
            d_ff: 4096,
            n_layers: 24,
            n_heads: 16,
            activation: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        },
    },
    text: text(768),
    d_embed: 768,
};

/// The width where both meet is published, the tower for pictures is not: see above.
const HUGE: AltClipConfig = AltClipConfig {
    vision: VitConfig {
        transformer: TransformerConfig {
            d_model: 1280,
            d_ff: 5120,
            n_layers: 32,
            n_heads: 16,
            activation: Activation::Gelu,
            ..LARGE.vision.transformer
        },
        ..LARGE.vision
    },
    text: text(1024),
    d_embed: 1024,
};

const fn preset(
    name: &'static str,
    config: AltClipConfig,
    parameters: usize,
    source: &'static str,
) -> Preset {
    let license = "CreativeML OpenRAIL-M";
    Preset { name, shape: Shape::AltClip(config), weights: Weights::Hub, license, parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("BAAI/AltCLIP", LARGE, 864_186_113, "transformers, AltCLIPModel"),
    preset("BAAI/AltCLIP-m9", LARGE, 864_186_113, "transformers, AltCLIPModel"),
    preset(
        "BAAI/AltCLIP-m18",
        HUGE,
        1_193_017_857,
        "counted here, with a ViT-H/14 that is not stated by its authors",
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
        for parameter in parameters(&LARGE.init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(of("text_model.pre_LN.bias"), ["text.norm.bias"]);
        assert_eq!(of("vision_model.encoder.layer.3.mlp.fc1.bias"), ["vision.blocks.3.mlp.up.bias"]);
        assert_eq!(of("text_model.roberta.pooler.dense.bias"), [""; 0]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let error = |fields: &str| {
            let config = Config::parse(Path::new("config.json"), fields.as_bytes()).unwrap();
            AltClipConfig::parse(&config).map_err(|error| error.to_string())
        };
        assert!(error("{}").is_ok());
        for (fields, named) in [
            (r#"{"text_config": {"position_embedding_type": "relative_key"}}"#, "`text_config.position_emb"),
            (r#"{"text_config": {"pad_token_id": 600}}"#, "`text_config.pad_token_id`: expected a position"),
            (r#"{"text_config": {"project_dim": 0}}"#, "`text_config.project_dim`"),
            (r#"{"vision_config": {"num_channels": 4}}"#, "`vision_config.num_channels`: expected 3"),
            (r#"{"vision_config": {"patch_size": 300}}"#, "`vision_config.patch_size`: expected at most"),
            (r#"{"vision_config": {"num_attention_heads": 7}}"#, "`vision_config.num_attention_heads`"),
            (r#"{"projection_dim": "wide"}"#, "`projection_dim`"),
        ] {
            let message = error(fields).unwrap_err();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn padding_does_not_change_a_text() {
        let device = Device::flex();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/altclip");
        let folder = Folder::Disk(folder);
        let config = AltClipConfig::of(&folder).unwrap();
        let model = config.load(&folder, &LoadOptions::default(), &device).unwrap();
        let towers = Loaded { model, config };
        let real = |rows: &[bool]| Tensor::<1, Bool>::from_data(rows, &device).unsqueeze();
        let short = towers.encode_texts(Tensor::from_data([[0, 7, 9, 2]], &device), real(&[true; 4]));
        let padded = Tensor::from_data([[0, 7, 9, 2, 1, 1]], &device);
        let padded = towers.encode_texts(padded, real(&[true, true, true, true, false, false]));
        padded.into_data().assert_approx_eq::<f32>(&short.clone().into_data(), Tolerance::default());
        let length: f32 = short.square().sum().into_scalar();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }
}
