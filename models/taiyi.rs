//! Taiyi-CLIP: a Chinese RoBERTa that gives texts the vectors which OpenAI's CLIP gives pictures, by IDEA-CCNL (Zhang et
//! al. 2022, <https://arxiv.org/abs/2209.02970>). Its towers are in two places: the one for texts here, the one for
//! pictures unchanged in OpenAI's repository (ViT-B/32 for the base size, ViT-L/14 for the large one), whose temperature
//! serves too.
//!
//! The weights are those of transformers' `BertForSequenceClassification`: BERT, its pooler, and a classifier with as many
//! "labels" as CLIP's embedding is wide. A folder of that class counts as a Taiyi from 512 labels on; a classifier of
//! fewer is a BERT whose head is left aside. The numbers match that class.
//!
//! ```sh
//! volary classify cat.jpg --labels "一只猫,一条狗" --model openai/clip-vit-base-patch32 \
//!     --text-model IDEA-CCNL/Taiyi-CLIP-Roberta-102M-Chinese
//! ```

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{Linear, LinearConfig};
use volary_kernels::ops::Mask;
use volary_weights::{KeyMap, LoadOptions, Rule};

use Rule::Under;

use crate::bert::{self, Bert, BertConfig, BertInput, CHINESE, LARGE};
use crate::clip::normalise;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::two_tower::{Fit, TwoTower};

/// Shape of a tower for texts.
#[derive(Clone, Debug, PartialEq)]
pub struct TaiyiConfig {
    /// BERT, whose pooler is counted apart.
    pub bert: BertConfig,
    /// Width of the space where texts meet pictures.
    pub d_embed: usize,
}

/// A tower for texts.
#[derive(Module, Debug)]
pub struct Taiyi {
    /// Without its pooler, which stands here.
    pub bert: Bert,
    /// `[d_model, d_model]`, on the first token.
    pub pooler: Linear,
    /// `[d_embed, d_model]`, with a bias.
    pub projection: Linear,
}

impl TaiyiConfig {
    /// An untrained tower. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Taiyi {
        Taiyi {
            bert: self.bert.init(device),
            pooler: LinearConfig::new(self.bert.d_model, self.bert.d_model).init(device),
            projection: LinearConfig::new(self.bert.d_model, self.d_embed).init(device),
        }
    }

    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of transformers' `BertForSequenceClassification`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let bert = BertConfig { pooler: false, ..BertConfig::parse(config)? };
        let d_embed = config.count("id2label").filter(|&labels| labels > 0);
        let d_embed =
            d_embed.ok_or_else(|| config.error("id2label", "an entry for each number of an embedding"))?;
        Ok(Self { bert, d_embed })
    }

    /// The tower filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be read or do not fit.
    pub fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Taiyi, Error> {
        fill(folder, self.init(device), &KEYS, options)
    }
}

impl Taiyi {
    /// Texts' embeddings, not normalised, `[batch, d_embed]`.
    ///
    /// # Panics
    /// As [`Bert::forward`].
    pub fn embed(&self, input: impl Into<BertInput>) -> Tensor<2> {
        let hidden = self.bert.forward(input).hidden; // [batch, seq, d_model]
        let first = hidden.narrow(1, 0, 1).squeeze_dim(1);
        self.projection.forward(self.pooler.forward(first).tanh())
    }
}

/// Keys of transformers' `BertForSequenceClassification`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("bert.pooler.dense.", "pooler.", bert::LINEAR),
    Under("bert.", "bert.", bert::ENCODER),
    Under("classifier.", "projection.", bert::LINEAR),
]);

/// So wide is the embedding of the smallest CLIP.
const NARROWEST: usize = 512;

/// Taiyi-CLIP as the registry knows it.
pub const SYSTEM: System = System {
    name: "taiyi",
    about: "a Chinese tower for texts that goes with OpenAI's CLIP",
    file: "models/taiyi.rs",
    tasks: &["forward"],
    proved: &["taiyi"],
    presets: PRESETS,
    recognises: |_, config| {
        let Some(config) = config else { return false };
        config.text("model_type") == Some("bert")
            && config.first_of("architectures") == Some("BertForSequenceClassification")
            && config.count("id2label").is_some_and(|labels| labels >= NARROWEST)
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &TaiyiConfig::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = TaiyiConfig::of(folder)?;
        Ok(Box::new(Runner { model: config.load(folder, options, device)?, config }))
    },
    generator: None,
};

/// A tower for texts behind the forward contract.
struct Runner {
    model: Taiyi,
    config: TaiyiConfig,
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`. Gives `logits`: the embeddings.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let input = self.config.bert.read(&mut inputs);
        inputs.finish()?;
        let Some(input) = input else { return Ok(Outputs::new()) }; // finished with an error
        Ok(vec![output("logits", self.model.embed(input))])
    }
}

/// A Taiyi and the model whose tower for pictures it goes with.
pub struct TaiyiClip {
    clip: Box<dyn TwoTower>,
    texts: Taiyi,
    config: TaiyiConfig,
}

impl TaiyiClip {
    /// The Taiyi in `folder` with the pictures and the temperature of `clip`.
    ///
    /// # Errors
    /// If it cannot be loaded, or gives vectors of another width than `clip`.
    pub fn load(
        clip: Box<dyn TwoTower>,
        folder: &Folder,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<Self, Error> {
        let config = TaiyiConfig::of(folder)?;
        let (expected, found) = (clip.fit().d_embed, config.d_embed);
        if expected != found {
            return Err(Error::Width { folder: folder.path().into(), expected, found });
        }
        Ok(Self { clip, texts: config.load(folder, options, device)?, config })
    }
}

impl TwoTower for TaiyiClip {
    fn fit(&self) -> Fit {
        let BertConfig { vocab_size, .. } = self.config.bert;
        Fit { vocab_size, context_length: self.config.bert.context_length(), ..self.clip.fit() }
    }

    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.clip.encode_images(pixels)
    }

    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        normalise(self.texts.embed(BertInput { mask: Mask::Padding(real), ..ids.into() }))
    }

    fn scale(&self) -> Tensor<1> {
        self.clip.scale()
    }
}

const fn preset(name: &'static str, bert: BertConfig, d_embed: usize, parameters: usize) -> Preset {
    let bert = BertConfig { pooler: false, ..bert };
    Preset {
        name,
        shape: Shape::Taiyi(TaiyiConfig { bert, d_embed }),
        weights: Weights::Hub,
        license: "Apache-2.0",
        parameters,
        source: "counted here; the names say 102 and 326 million",
    }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("IDEA-CCNL/Taiyi-CLIP-Roberta-102M-Chinese", CHINESE, 512, 102_661_376),
    preset(
        "IDEA-CCNL/Taiyi-CLIP-Roberta-large-326M-Chinese",
        BertConfig { vocab_size: CHINESE.vocab_size, ..LARGE },
        768,
        326_309_632,
    ),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Tolerance;
    use volary_weights::parameters;

    use super::*;

    fn config(labels: usize) -> Config {
        let labels: Vec<String> =
            (0..labels).map(|label| format!("\"{label}\": \"LABEL_{label}\"")).collect();
        let text = format!(
            r#"{{"model_type": "bert", "architectures": ["BertForSequenceClassification"], "hidden_size": 8,
            "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50,
            "max_position_embeddings": 9, "id2label": {{{}}}}}"#,
            labels.join(", ")
        );
        Config::parse(Path::new("config.json"), text.as_bytes()).unwrap()
    }

    #[test]
    fn a_classifier_of_few_labels_is_no_taiyi() {
        let folder = Folder::Disk("no such folder".into());
        assert!((SYSTEM.recognises)(&folder, Some(&config(512))));
        assert!(!(SYSTEM.recognises)(&folder, Some(&config(511))));
        let message = TaiyiConfig::parse(&config(0)).unwrap_err().to_string();
        assert!(message.contains("`id2label`: expected an entry for each number"), "{message}");
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back() {
        for parameter in parameters(&TaiyiConfig::parse(&config(512)).unwrap().init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
        assert_eq!(KEYS.paths("bert.pooler.dense.bias").unwrap(), ["pooler.bias"]);
    }

    /// Of the same weights BERT's own pooler gives what the projection is put on.
    #[test]
    fn an_embedding_is_the_poolers_output_projected() {
        let device = Device::flex();
        let taiyi = TaiyiConfig::parse(&config(512)).unwrap().init(&device);
        let mut with_pooler = taiyi.bert.clone();
        with_pooler.pooler = Some(taiyi.pooler.clone());
        let ids = Tensor::<2, Int>::from_data([[3, 4, 5], [6, 7, 8]], &device);
        let pooled = with_pooler.forward(ids.clone()).pooled.unwrap();
        let expected = taiyi.projection.forward(pooled).into_data();
        taiyi.embed(ids).into_data().assert_approx_eq::<f32>(&expected, Tolerance::default());
    }
}
