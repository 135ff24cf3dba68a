//! Chinese CLIP: CLIP's tower for pictures and a Chinese RoBERTa for texts, trained on pairs in Chinese (Yang et al. 2022,
//! OFA-Sys, <https://arxiv.org/abs/2211.01335>).
//!
//! The numbers match `transformers` (`ChineseCLIPModel`). The text's embedding is read off at its first token, without
//! BERT's pooler. Version 5 of transformers takes the vector of `[PAD]` as zero whatever the file says; here the file
//! counts, as it did before. With an `attention_mask` the difference is seen by no real token.
//!
//! They also match the authors' own code (`cn_clip`), in whose layout alone the smallest size was published, with a
//! convolutional tower. Beside the authors' file a `config.json` is needed: `model_type` `cn_clip`, and the fields of the
//! two files in their `model_configs` that the size names, `RN50.json` and `RBT3-chinese.json`.
//!
//! ```sh
//! volary classify cat.jpg --labels "一只猫,一条狗" --model OFA-Sys/chinese-clip-vit-base-patch16
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{Linear, LinearConfig};
use volary_kernels::ops::{Activation, Mask};
use volary_vision::resnet::ResNetConfig;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Rename, Reshape, Transpose, Under};

use crate::bert::{self, Bert, BertConfig, BertInput, CHINESE, LARGE};
use crate::clip::{
    RESNET_OPEN_CLIP, TowerOutput, TransformerConfig, VIT_OPEN_CLIP, VIT_TRANSFORMERS, VisionConfig,
    VisionTower, VitConfig, checked_resnet, normalise, resnet_stages,
};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared, compared_embeddings};
use crate::vit::side_or;

/// Shape of a whole Chinese CLIP.
#[derive(Clone, Debug, PartialEq)]
pub struct ChineseClipConfig {
    /// CLIP's tower for pictures.
    pub vision: VisionConfig,
    /// BERT, without a pooler.
    pub text: BertConfig,
    /// Width of the space where both meet.
    pub d_embed: usize,
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct ChineseClip {
    /// Pictures.
    pub vision: VisionTower,
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

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// `ChineseCLIPModel` of transformers.
    Transformers,
    /// The authors' own.
    Authors,
}

impl Layout {
    fn of(config: &Config) -> Option<Self> {
        match config.text("model_type") {
            Some("chinese_clip") => Some(Self::Transformers),
            Some("cn_clip") => Some(Self::Authors),
            _ => None,
        }
    }
}

/// The id of `[PAD]`, which the authors' code takes for padding wherever it stands.
const PADDING: i64 = 0;

impl ChineseClipConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        let config = folder.config("config.json")?;
        match Layout::of(&config) {
            Some(Layout::Transformers) => Ok((Self::parse(&config)?, Layout::Transformers)),
            Some(Layout::Authors) => Ok((Self::authors(&config)?, Layout::Authors)),
            None => Err(config.error("model_type", "chinese_clip or cn_clip").into()),
        }
    }

    /// `config.json` of transformers; what it leaves out has the values of `ChineseCLIPConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let text = config.object_or_empty("text_config")?;
        Ok(Self {
            vision: VisionConfig::Vit(VitConfig::transformers(&config.object_or_empty("vision_config")?)?),
            text: BertConfig::shape(&text, &BertConfig { pooler: false, ..bert::BASE })?,
            d_embed: config.size_or("projection_dim", 512)?,
        })
    }

    /// The fields of the authors' files for both towers. Blocks per stage may be a list or, as they write it, the text of
    /// one.
    ///
    /// # Errors
    /// If they are malformed, or ask for what is not built.
    pub fn authors(config: &Config) -> Result<Self, ConfigError> {
        let d_embed = config.size("embed_dim")?;
        let image_size = side_or(config, "image_resolution", 224)?;
        let width = config.size("vision_width")?;
        let head_width = config.size_or("vision_head_width", 64)?;
        let spelled = config.text("vision_layers").map(|text| serde_json::from_str(text).unwrap_or_default());
        let vision = match spelled.or_else(|| config.sizes("vision_layers")) {
            Some(layers) => {
                config.divides("vision_head_width", head_width, 32 * width)?;
                let (layers, n_heads) =
                    (resnet_stages(config, "vision_layers", layers)?, 32 * width / head_width);
                let resnet = ResNetConfig { image_size, width, layers, n_heads, d_embed };
                VisionConfig::ResNet(checked_resnet(resnet, config, "image_resolution")?)
            }
            None => {
                config.divides("vision_head_width", head_width, width)?;
                let patch_size = side_or(config, "vision_patch_size", 16)?;
                if patch_size > image_size {
                    return Err(config.error("vision_patch_size", "at most image_resolution"));
                }
                let n_layers = config.blocks_or("vision_layers", 12)?;
                VisionConfig::Vit(vit(image_size, patch_size, width, n_layers, width / head_width))
            }
        };
        let text = BertConfig {
            vocab_size: config.size_or("vocab_size", BASE_TEXT.vocab_size)?,
            n_positions: config.size_or("text_max_position_embeddings", BASE_TEXT.n_positions)?,
            n_token_types: config.size_or("text_type_vocab_size", BASE_TEXT.n_token_types)?,
            d_model: config.size("text_hidden_size")?,
            d_ff: config.size("text_intermediate_size")?,
            n_layers: config.blocks_or("text_num_hidden_layers", BASE_TEXT.n_layers)?,
            n_heads: config.size("text_num_attention_heads")?,
            activation: config.activation_or("text_hidden_act", BASE_TEXT.activation)?,
            ..BASE_TEXT
        };
        config.divides("text_num_attention_heads", text.n_heads, text.d_model)?;
        Ok(Self { vision, text, d_embed })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self, layout: Layout) -> &'static KeyMap {
        match (layout, &self.vision) {
            (Layout::Transformers, _) => &KEYS,
            (Layout::Authors, VisionConfig::Vit(_)) => &KEYS_AUTHORS_VIT,
            (Layout::Authors, VisionConfig::ResNet(_)) => &KEYS_AUTHORS_RESNET,
        }
    }

    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(
        &self,
        folder: &Folder,
        layout: Layout,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<ChineseClip, Error> {
        fill(folder, self.init(device), self.keys(layout), options)
    }
}

/// Keys of transformers' `ChineseCLIPModel`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Rename("visual_projection.weight", "vision.Vit.projection.weight"),
    Rename("text_projection.weight", "text_projection.weight"),
    Under("vision_model.", "vision.Vit.", VIT_TRANSFORMERS),
    Under("text_model.", "text.", bert::TRUNK_WITHOUT_POOLER),
]);

/// What the authors name alike whatever the tower for pictures.
const SHARED_AUTHORS: &[Rule] = &[
    Reshape("logit_scale", "logit_scale", Ones::Scalar),
    Transpose("text_projection", "text_projection.weight"),
    Under("bert.", "text.", bert::TRUNK_WITHOUT_POOLER),
];
/// Of a model that several devices trained.
const PREFIXES: &[&str] = &["module."];

/// Keys of the authors' code with a vision transformer.
pub const KEYS_AUTHORS_VIT: KeyMap =
    KeyMap::new(&[Under("", "", SHARED_AUTHORS), Under("visual.", "vision.Vit.", VIT_OPEN_CLIP)])
        .with_prefixes(PREFIXES);
/// Keys of the authors' code with a convolutional tower.
pub const KEYS_AUTHORS_RESNET: KeyMap =
    KeyMap::new(&[Under("", "", SHARED_AUTHORS), Under("visual.", "vision.ResNet.", RESNET_OPEN_CLIP)])
        .with_prefixes(PREFIXES);

/// Chinese CLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "chinese_clip",
    about: "CLIP with a Chinese RoBERTa as its tower for texts",
    file: "models/chinese_clip.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["chinese_clip", "cn_clip_resnet"],
    presets: PRESETS,
    recognises: |_, config| config.and_then(Layout::of).is_some(),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = ChineseClipConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys(layout))
    },
    open: |folder, options, device| {
        let (config, layout) = ChineseClipConfig::of(folder)?;
        Ok(Box::new(Loaded { model: config.load(folder, layout, options, device)?, config, layout }))
    },
    generator: None,
};

/// A Chinese CLIP and its shape.
struct Loaded {
    model: ChineseClip,
    config: ChineseClipConfig,
    layout: Layout,
}

impl TwoTower for Loaded {
    fn fit(&self) -> Fit {
        let ChineseClipConfig { vision, text, d_embed } = &self.config;
        Fit {
            image_size: vision.image_size(),
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
    /// `pixel_values`, `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`; in the authors'
    /// layout `image` and `text`.
    ///
    /// The poolers' outputs are the embeddings before they are normalised; the authors' features are normalised.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let size = self.config.vision.image_size();
        let name = if self.layout == Layout::Authors { "image" } else { "pixel_values" };
        let pixels = inputs.needed_pictures(name, [3, size, size]);
        let texts = match self.layout {
            Layout::Transformers => self.config.text.read(&mut inputs),
            Layout::Authors => self.authors_texts(&mut inputs),
        };
        inputs.finish()?;
        let (Some(pixels), Some(texts)) = (pixels, texts) else { return Ok(Outputs::new()) }; // finished with an error

        let (ChineseClip { vision, text, .. }, scale) = (&self.model, self.scale());
        let TowerOutput { hidden: patches, embedding: images } = vision.forward(pixels.cast(scale.dtype()));
        let hidden = text.forward(texts).hidden;
        let texts = self.model.embed(&hidden);
        if self.layout == Layout::Authors {
            let (images, texts) = (normalise(images), normalise(texts));
            let mut outputs = compared(images.clone(), texts.clone(), scale);
            outputs.extend([output("image_features", images), output("text_features", texts)]);
            return Ok(outputs);
        }
        let mut outputs = compared_embeddings(images.clone(), texts.clone(), scale);
        outputs.extend(patches.map(|patches| output("vision_model_output.last_hidden_state", patches)));
        outputs.extend([
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

impl Loaded {
    /// `text`, token ids of which the authors' code knows the padding.
    fn authors_texts(&self, inputs: &mut Inputs) -> Option<BertInput> {
        let BertConfig { vocab_size, n_positions, .. } = self.config.text;
        let ids = inputs.ids::<2>("text", vocab_size);
        inputs.missing("text");
        let ids = ids?;
        let [_, seq] = ids.dims();
        if seq > n_positions {
            inputs.problem(format!("`text` has {seq} tokens a row, at most {n_positions} fit"));
        }
        let mask = Mask::Padding(ids.clone().not_equal_elem(PADDING));
        Some(BertInput { mask, ..ids.into() })
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
    let shape = Shape::ChineseClip(ChineseClipConfig { vision: VisionConfig::Vit(vision), text, d_embed });
    let source = "counted here; the paper's table 1 says 188, 406, 407 and 958 million";
    Preset { name, shape, weights: Weights::Hub, license: "MIT", parameters, source }
}

const RESNET: ChineseClipConfig = ChineseClipConfig {
    vision: VisionConfig::ResNet(ResNetConfig {
        image_size: 224,
        width: 64,
        layers: [3, 4, 6, 3],
        n_heads: 32,
        d_embed: 1024,
    }),
    text: BertConfig { n_layers: 3, ..BASE_TEXT },
    d_embed: 1024,
};

/// Published sizes: Yang et al. 2022, table 1.
pub const PRESETS: &[Preset] = &[
    Preset {
        name: "OFA-Sys/chinese-clip-rn50",
        shape: Shape::ChineseClip(RESNET),
        weights: Weights::Hub,
        license: "MIT",
        parameters: 76_989_537,
        source: "the authors' code, sum over the parameters",
    },
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
            let layouts = match config.vision {
                VisionConfig::Vit(_) => &[Layout::Transformers, Layout::Authors][..],
                VisionConfig::ResNet(_) => &[Layout::Authors],
            };
            for &layout in layouts {
                let keys = config.keys(layout);
                for parameter in parameters(&config.init(&Device::flex())) {
                    let found = keys.keys(&parameter.path).unwrap();
                    assert_eq!(found.len(), 1, "{}", parameter.path);
                    assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
                }
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

    /// The two files that the authors' `RN50` names, put together.
    #[test]
    fn the_authors_configuration_is_read() {
        let fields = |change: (&str, &str)| {
            let text = r#"{"model_type": "cn_clip", "embed_dim": 1024, "image_resolution": 224,
                "vision_layers": "[3,4,6,3]", "vision_width": 64, "vision_patch_size": null, "vocab_size": 21128,
                "text_attention_probs_dropout_prob": 0.1, "text_hidden_act": "gelu", "text_hidden_dropout_prob": 0.1,
                "text_hidden_size": 768, "text_initializer_range": 0.02, "text_intermediate_size": 3072,
                "text_max_position_embeddings": 512, "text_num_attention_heads": 12, "text_num_hidden_layers": 3,
                "text_type_vocab_size": 2}"#;
            assert!(text.contains(change.0));
            let text = text.replace(change.0, change.1);
            ChineseClipConfig::authors(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
        };
        assert_eq!(fields(("", "")).unwrap(), RESNET);
        assert_eq!(fields((r#""[3,4,6,3]""#, "[3, 4, 6, 3]")).unwrap(), RESNET);
        for (field, from, to) in [
            ("vision_layers", "[3,4,6,3]", "[3,4,6]"),
            ("vision_layers", "[3,4,6,3]", "many"),
            ("vision_layers", "[3,4,6,3]", "[3,4,0,3]"),
            ("image_resolution", "224", "225"),
            ("vision_head_width", r#""vision_width": 64"#, r#""vision_width": 63"#),
            ("text_num_attention_heads", "_heads\": 12", "_heads\": 7"),
            ("text_hidden_act", "gelu", "mish"),
        ] {
            let message = fields((from, to)).unwrap_err().to_string();
            assert!(message.contains(&format!("`{field}`")), "{message}");
        }
    }

    #[test]
    fn padding_does_not_change_a_text() {
        let device = Device::flex();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chinese_clip");
        let folder = Folder::Disk(folder);
        let (config, layout) = ChineseClipConfig::of(&folder).unwrap();
        let model = config.load(&folder, layout, &LoadOptions::default(), &device).unwrap();
        let towers = Loaded { model, config, layout };
        let real = |rows: &[bool]| Tensor::<1, Bool>::from_data(rows, &device).unsqueeze();
        let short = towers.encode_texts(Tensor::from_data([[11, 7, 12]], &device), real(&[true; 3]));
        let padded = Tensor::from_data([[11, 7, 12, 0, 0]], &device);
        let padded = towers.encode_texts(padded, real(&[true, true, true, false, false]));
        padded.into_data().assert_approx_eq::<f32>(&short.into_data(), Tolerance::default());
    }
}
