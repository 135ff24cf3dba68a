//! ALIGN: an EfficientNet for pictures and a BERT for texts, trained on pairs as noisy as the web has them (Jia et al. 2021,
//! <https://arxiv.org/abs/2102.05918>). The public weights are Kakao Brain's, trained on COYO-700M.
//!
//! The numbers match `transformers` (`AlignModel`), whose EfficientNet puts zeros around pictures in its own manner and takes
//! the last stage's mean for the picture.
//!
//! ```sh
//! volary classify cat.jpg --labels "a cat,a dog" --model kakaobrain/align-base
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{Linear, LinearConfig};
use volary_kernels::ops::{Activation, Mask};
use volary_vision::efficientnet::{EfficientNetConfig, Manner, Trunk};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::bert::{self, BASE, Bert, BertConfig, BertInput, BertOutput, LINEAR};
use crate::clip::{BATCH_NORM, normalise};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower, compared_embeddings};
use crate::vit::side_or;

/// Shape of a whole ALIGN.
#[derive(Clone, Debug, PartialEq)]
pub struct AlignConfig {
    /// Side of the square pictures of its training in pixels.
    pub image_size: usize,
    /// The tower for pictures; the width of its last stage is that of the space where both meet.
    pub vision: EfficientNetConfig,
    /// BERT, whose pooler does not serve the embedding.
    pub text: BertConfig,
}

/// Both towers and the temperature.
#[derive(Module, Debug)]
pub struct Align {
    /// Pictures.
    pub vision: Trunk,
    /// Texts.
    pub text: Bert,
    /// `[d_embed, d_model]`.
    pub text_projection: Linear,
    /// Cosine similarities are divided by it; `[1]`.
    pub temperature: Param<Tensor<1>>,
}

impl AlignConfig {
    /// An untrained model.
    pub fn init(&self, device: &Device) -> Align {
        Align {
            vision: self.vision.trunk(Manner::Transformers, device),
            text: self.text.init(device),
            text_projection: LinearConfig::new(self.text.d_model, self.d_embed()).init(device),
            temperature: Initializer::Ones.init([1], device),
        }
    }

    /// Width of the space where both towers meet.
    pub fn d_embed(&self) -> usize {
        self.vision.d_last()
    }

    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of transformers; what it leaves out has the values of `AlignConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let vision = config.object_or_empty("vision_config")?;
        for (field, allowed) in VISION_FIXED {
            vision.only(field, allowed)?;
        }
        let multiplier = |field: &str, default: f64| match vision.number_or(field, default)? {
            by if by > 0.0 && by <= 32.0 => Ok(by),
            _ => Err(vision.error(field, "a number above 0 and at most 32")),
        };
        let align = Self {
            image_size: match side_or(&vision, "image_size", 600)? {
                side if side >= SHORTEST => side,
                _ => return Err(vision.error("image_size", &format!("at least {SHORTEST} pixels"))),
            },
            vision: EfficientNetConfig::scaled(
                multiplier("width_coefficient", 2.0)?,
                multiplier("depth_coefficient", 3.1)?,
            ),
            text: BertConfig::shape(&config.object_or_empty("text_config")?, &TEXT)?,
        };
        match config.size_or("projection_dim", 640)? == align.d_embed() {
            true => Ok(align),
            false => {
                let expected = format!("{}, the width of the last stage for pictures", align.d_embed());
                Err(config.error("projection_dim", &expected))
            }
        }
    }
}

/// Settings of `vision_config` of which only these values are built: EfficientNet-B0's, which two numbers scale.
const VISION_FIXED: &[(&str, &[&str])] = &[
    ("num_channels", &["3"]),
    ("depth_divisor", &["8"]),
    ("kernel_sizes", &["[3,3,5,3,5,5,3]"]),
    ("in_channels", &["[32,16,24,40,80,112,192]"]),
    ("out_channels", &["[16,24,40,80,112,192,320]"]),
    ("depthwise_padding", &["[]"]),
    ("strides", &["[1,2,2,2,1,2,1]"]),
    ("num_block_repeats", &["[1,2,2,3,3,4,1]"]),
    ("expand_ratios", &["[1,6,6,6,6,6,6]"]),
    ("squeeze_expansion_ratio", &["0.25"]),
    ("hidden_act", &["\"swish\"", "\"silu\""]),
    ("pooling_type", &["\"mean\""]),
    ("batch_norm_eps", &["0.001"]),
];

impl Align {
    /// The last stage's map and its mean, which is a picture's embedding, not normalised: `[batch, 3, height, width]` to
    /// `[batch, rows, columns, d_embed]` and `[batch, d_embed]`.
    pub fn see(&self, pixels: Tensor<4>) -> (Tensor<4>, Tensor<2>) {
        let map = self.vision.forward(pixels);
        let [batch, _, _, d_embed] = map.dims();
        (map.clone(), map.mean_dim(1).mean_dim(2).reshape([batch, d_embed]))
    }

    /// The embedding of the first token's state, not normalised: `[batch, seq, d_model] -> [batch, d_embed]`.
    pub fn embed(&self, hidden: &Tensor<3>) -> Tensor<2> {
        self.text_projection.forward(hidden.clone().narrow(1, 0, 1).squeeze_dim(1))
    }
}

const BLOCK: &[Rule] = &[
    Reshape("expansion.expand_conv.weight", "expansion.conv.weight", Ones::After(2)),
    Under("expansion.expand_bn.", "expansion.norm.", BATCH_NORM),
    Rename("depthwise_conv.depthwise_conv.weight", "depthwise.weight"),
    Under("depthwise_conv.depthwise_norm.", "depthwise_norm.", BATCH_NORM),
    Reshape("squeeze_excite.reduce.weight", "squeeze.weight", Ones::After(2)),
    Rename("squeeze_excite.reduce.bias", "squeeze.bias"),
    Reshape("squeeze_excite.expand.weight", "excite.weight", Ones::After(2)),
    Rename("squeeze_excite.expand.bias", "excite.bias"),
    Reshape("projection.project_conv.weight", "projection.weight", Ones::After(2)),
    Under("projection.project_bn.", "projection_norm.", BATCH_NORM),
];

/// Keys of transformers' `AlignModel`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Reshape("temperature", "temperature", Ones::Scalar),
    Under("text_projection.", "text_projection.", LINEAR),
    Under("text_model.", "text.", bert::TRUNK),
    Rename("vision_model.embeddings.convolution.weight", "vision.stem.weight"),
    Under("vision_model.embeddings.batchnorm.", "vision.stem_norm.", BATCH_NORM),
    Under("vision_model.encoder.blocks.{}.", "vision.blocks.{}.", BLOCK),
]);

/// ALIGN as the registry knows it.
pub const SYSTEM: System = System {
    name: "align",
    about: "two towers, an EfficientNet for pictures and a BERT for texts",
    file: "models/align.rs",
    tasks: &["classify", "embed", "search", "forward"],
    proved: &["align"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("align")),
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &AlignConfig::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = AlignConfig::of(folder)?;
        let model = fill(folder, config.init(device), &KEYS, options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// An ALIGN behind the forward contract.
struct Runner {
    model: Align,
    config: AlignConfig,
}

impl TwoTower for Runner {
    fn fit(&self) -> Fit {
        let AlignConfig { image_size, text, .. } = &self.config;
        Fit {
            image_size: *image_size,
            context_length: text.context_length(),
            vocab_size: text.vocab_size,
            d_embed: self.config.d_embed(),
        }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        normalise(self.model.see(pixels).1)
    }

    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        let input = BertInput { mask: Mask::Padding(real), ..ids.into() };
        normalise(self.model.embed(&self.model.text.forward(input).hidden))
    }

    fn scale(&self) -> Tensor<1> {
        self.model.temperature.val().recip()
    }
}

/// A picture with shorter sides has no map.
const SHORTEST: usize = 32;

impl Forward for Runner {
    /// `pixel_values` of any size from 32 pixels a side, `input_ids`, and if wanted `attention_mask`, `token_type_ids` and
    /// `position_ids`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let pixels = inputs.float::<4>("pixel_values");
        inputs.missing("pixel_values");
        if let Some([_, found @ ..]) = pixels.as_ref().map(Tensor::dims)
            && (found[0] != 3 || found[1] < SHORTEST || found[2] < SHORTEST)
        {
            let wanted = format!("[3, height, width] with sides of at least {SHORTEST}");
            inputs.problem(format!("`pixel_values` has pictures of {found:?}, expected {wanted}"));
        }
        let texts = self.config.text.read(&mut inputs);
        inputs.finish()?;
        let (Some(pixels), Some(texts)) = (pixels, texts) else { return Ok(Outputs::new()) }; // finished with an error

        let scale = self.scale();
        let (map, images) = self.model.see(pixels.cast(scale.dtype()));
        let BertOutput { hidden, pooled } = self.model.text.forward(texts);
        let mut outputs = compared_embeddings(images.clone(), self.model.embed(&hidden), scale);
        outputs.extend([
            output("vision_model_output.last_hidden_state", map.permute([0, 3, 1, 2])),
            output("vision_model_output.pooler_output", images),
            output("text_model_output.last_hidden_state", hidden),
        ]);
        outputs.extend(pooled.map(|pooled| output("text_model_output.pooler_output", pooled)));
        Ok(outputs)
    }

    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        Some(self)
    }
}

const TEXT: BertConfig = BertConfig { activation: Activation::Gelu, pooler: true, ..BASE };

/// Published sizes. The paper's own, with BERT-Large, were never released.
pub const PRESETS: &[Preset] = &[Preset {
    name: "kakaobrain/align-base",
    shape: Shape::Align(AlignConfig {
        image_size: 289,
        vision: EfficientNetConfig::scaled(2.0, 3.1),
        text: TEXT,
    }),
    weights: Weights::Hub,
    license: "not stated",
    parameters: 172_117_841,
    source: "transformers, AlignModel",
}];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};
    use volary_weights::{LoadOptions, parameters, read_tensors};

    use super::*;

    fn fixture() -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/align"))
    }

    fn tensors(file: &str) -> BTreeMap<String, TensorData> {
        read_tensors(&fixture().path().join(file)).unwrap()
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        for parameter in parameters(&AlignConfig::of(&fixture()).unwrap().init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
    }

    /// Unit vectors and the factor on their cosines, as the forward pass has them; padding changes no text.
    #[test]
    fn the_towers_say_what_the_forward_pass_says() {
        let device = Device::flex();
        let towers = (SYSTEM.open)(&fixture(), &LoadOptions::default(), &device).unwrap();
        let towers = towers.into_towers().unwrap();
        assert_eq!(towers.fit(), Fit { image_size: 64, context_length: 12, vocab_size: 40, d_embed: 32 });
        let (inputs, expected) = (tensors("inputs.safetensors"), tensors("outputs.safetensors"));
        let images = towers.encode_images(Tensor::from_data(inputs["pixel_values"].clone(), &device));
        let short = Tensor::from_data([[1, 3, 2]], &device); // the third text without its padding
        let real = Tensor::<2, Int>::ones([1, 3], &device).equal_elem(1);
        let third = towers.encode_texts(short, real);
        let logits = images.clone().matmul(third.clone().transpose()) * towers.scale().unsqueeze();
        let close = |found: TensorData, expected: Tensor<2>| {
            found.assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
        };
        let wanted = |name: &str| Tensor::<2>::from_data(expected[name].clone(), &device);
        close(images.into_data(), wanted("image_embeds"));
        close(third.into_data(), wanted("text_embeds").narrow(0, 2, 1));
        close(logits.into_data(), wanted("logits_per_image").narrow(1, 2, 1));
    }

    #[test]
    fn pictures_that_are_too_small_are_told() {
        let mut inputs = tensors("inputs.safetensors");
        inputs.insert("pixel_values".into(), TensorData::new(vec![0.5_f32; 3 * 31 * 64], [1, 3, 31, 64]));
        let found = crate::registry::forward(&fixture(), &inputs, &LoadOptions::default(), &Device::flex());
        let message = found.unwrap_err().to_string();
        assert!(message.contains("`pixel_values` has pictures of [3, 31, 64]"), "{message}");
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let error = |fields: &str| {
            let config = Config::parse(Path::new("config.json"), fields.as_bytes()).unwrap();
            AlignConfig::parse(&config).map_err(|error| error.to_string())
        };
        assert!(error("{}").is_ok());
        for (fields, named) in [
            (r#"{"projection_dim": 512}"#, "`projection_dim`: expected 640"),
            (r#"{"vision_config": {"depthwise_padding": [18]}}"#, "`vision_config.depthwise_padding`"),
            (r#"{"vision_config": {"image_size": 31}}"#, "`vision_config.image_size`: expected at least 32"),
            (r#"{"vision_config": {"pooling_type": "max"}}"#, "`vision_config.pooling_type`"),
            (r#"{"vision_config": {"width_coefficient": -1}}"#, "`vision_config.width_coefficient`"),
            (r#"{"text_config": {"num_attention_heads": 7}}"#, "`text_config.num_attention_heads`"),
        ] {
            let message = error(fields).unwrap_err();
            assert!(message.contains(named), "{message}");
        }
    }
}
