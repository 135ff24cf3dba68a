//! BERT: a bidirectional text encoder (Devlin et al. 2018, <https://arxiv.org/abs/1810.04805>), and its
//! descendants of the same shape: RoBERTa (Liu et al. 2019, <https://arxiv.org/abs/1907.11692>), XLM-RoBERTa
//! (Conneau et al. 2019, <https://arxiv.org/abs/1911.02116>) and CamemBERT.
//!
//! The numbers match `transformers` (`BertModel`, `RobertaModel`, `XLMRobertaModel`). Uploads of Google, of
//! HFL for Chinese and of Facebook AI are read, the first ones' `gamma` and `beta` too. A masked-LM head is loaded
//! where the weights have one (`BertForMaskedLM`, `RobertaForMaskedLM`); the heads of other classes are left aside.
//!
//! ```sh
//! volary forward path/to/bert-base-chinese --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, LayerNorm, Linear, LinearConfig, Mlp, MlpConfig, TiedHead,
};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{Checkpoint, KeyMap, Rule};

use Rule::{Ignore, Rename, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Number of positions in the table.
    pub n_positions: usize,
    /// How the tokens of a text are numbered.
    pub numbering: Numbering,
    /// Number of segments that a token may belong to.
    pub n_token_types: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// The MLP's activation.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// Whether there is a pooler.
    pub pooler: bool,
    /// Whether there is a masked-LM head.
    pub head: bool,
}

/// How the tokens of a text are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// BERT: 0, 1, 2, ...
    FromZero,
    /// RoBERTa: padding, of this id, keeps the id as its position; real tokens count on from there.
    AfterPadding(usize),
}

/// An encoder.
#[derive(Module, Debug)]
pub struct Bert {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`.
    pub positions: Embedding,
    /// `[n_token_types, d_model]`.
    pub token_types: Embedding,
    /// On the sum of the three.
    pub norm: LayerNorm,
    /// The blocks.
    pub blocks: Vec<BertBlock>,
    /// `[d_model, d_model]`, on the first token.
    pub pooler: Option<Linear>,
    /// Scores of tokens.
    pub head: Option<TiedHead>,
    #[module(skip)]
    numbering: Numbering,
    #[module(skip)]
    activation: Activation,
}

/// A post-norm transformer block.
#[derive(Module, Debug)]
pub struct BertBlock {
    /// Self-attention.
    pub attention: Attention,
    /// After the attention's residual.
    pub norm1: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    /// After the MLP's residual.
    pub norm2: LayerNorm,
    #[module(skip)]
    activation: Activation,
}

/// A batch of texts. One without more than ids is `ids.into()`.
#[derive(Clone, Debug)]
pub struct BertInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// The segment of each token, `[batch, seq]`; all 0 when `None`.
    pub token_types: Option<Tensor<2, Int>>,
    /// `[batch, seq]`; as the model numbers them when `None`.
    pub positions: Option<Tensor<2, Int>>,
    /// Which tokens are real, as [`Mask::Padding`].
    pub mask: Mask,
}

impl From<Tensor<2, Int>> for BertInput {
    fn from(ids: Tensor<2, Int>) -> Self {
        Self { ids, token_types: None, positions: None, mask: Mask::Full }
    }
}

/// What the encoder gives.
#[derive(Clone, Debug)]
pub struct BertOutput {
    /// `[batch, seq, d_model]`.
    pub hidden: Tensor<3>,
    /// `[batch, d_model]`, if there is a pooler.
    pub pooled: Option<Tensor<2>>,
}

impl BertConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Bert {
        let Self { d_model, layer_norm_eps, .. } = *self;
        let norm = || LayerNorm::new(d_model, layer_norm_eps, device);
        let table = |rows| Embedding::new(rows, d_model, 0.02, device);
        let block = |_| BertBlock {
            attention: AttentionConfig::new(d_model, self.n_heads).init(device),
            norm1: norm(),
            mlp: MlpConfig::new(d_model, self.d_ff).init(device),
            norm2: norm(),
            activation: self.activation,
        };
        Bert {
            tokens: table(self.vocab_size),
            positions: table(self.n_positions),
            token_types: table(self.n_token_types),
            norm: norm(),
            blocks: (0..self.n_layers).map(block).collect(),
            pooler: self.pooler.then(|| LinearConfig::new(d_model, d_model).init(device)),
            head: self.head.then(|| TiedHead::new(d_model, self.vocab_size, layer_norm_eps, device)),
            numbering: self.numbering,
            activation: self.activation,
        }
    }
}

impl BertBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let x = self.norm1.of_sum(x.clone(), self.attention.forward(x, mask));
        self.norm2.of_sum(x.clone(), self.mlp.forward(x, self.activation))
    }
}

impl Bert {
    /// Encodes a batch of texts.
    ///
    /// # Panics
    /// If an id, a type or a position is outside its table, or shapes differ.
    pub fn forward(&self, input: impl Into<BertInput>) -> BertOutput {
        let input = input.into();
        let words = self.tokens.forward(input.ids.clone());
        let x = self.norm.forward(self.embed(words, &input)); // [batch, seq, d_model]
        let hidden = self.encode(x, &input.mask);
        BertOutput { pooled: self.pool(&hidden), hidden }
    }

    /// The vectors of the tokens and of their segments and positions added up, before the norm:
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn embed(&self, words: Tensor<3>, input: &BertInput) -> Tensor<3> {
        let BertInput { ids, token_types, positions, .. } = input;
        let token_types = token_types.clone().unwrap_or_else(|| ids.zeros_like());
        let positions = positions.clone().unwrap_or_else(|| self.numbering.positions(ids));
        words + self.token_types.forward(token_types) + self.positions.forward(positions)
    }

    /// The blocks, on normalised embeddings: `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn encode(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        self.blocks.iter().fold(x, |x, block| block.forward(x, mask))
    }

    /// What goes into the last block, and what comes out of it; of a model without blocks `x` itself twice.
    pub fn encode_last_two(&self, x: Tensor<3>, mask: &Mask) -> [Tensor<3>; 2] {
        let step = |[_, x]: [Tensor<3>; 2], block: &BertBlock| [x.clone(), block.forward(x, mask)];
        self.blocks.iter().fold([x.clone(), x], step)
    }

    /// The pooler on the first token: `[batch, seq, d_model] -> [batch, d_model]`, if there is one.
    pub fn pool(&self, hidden: &Tensor<3>) -> Option<Tensor<2>> {
        let [batch, _, d_model] = hidden.dims();
        self.pooler.as_ref().map(|pooler| {
            let first = hidden.clone().narrow(1, 0, 1).reshape([batch, d_model]);
            pooler.forward(first).tanh()
        })
    }

    /// Scores of the token at every place: `[..., d_model] -> [..., vocab_size]`, if there is a masked-LM head.
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Option<Tensor<D>> {
        let head = self.head.as_ref()?;
        Some(head.forward(hidden, self.tokens.weight.val(), self.activation))
    }
}

impl Numbering {
    /// Positions of token ids: `[batch, seq] -> [batch, seq]`.
    pub fn positions(self, ids: &Tensor<2, Int>) -> Tensor<2, Int> {
        let [batch, seq] = ids.dims();
        match self {
            Self::FromZero => {
                Tensor::<1, Int>::arange(0..seq as i64, &ids.device()).unsqueeze::<2>().expand([batch, seq])
            }
            Self::AfterPadding(padding) => {
                let real = ids.clone().not_equal_elem(padding as i64).int();
                real.clone().cumsum(1) * real + padding as i64
            }
        }
    }
}

/// The `model_type`s of this shape.
const FAMILIES: &[&str] = &["bert", "roberta", "xlm-roberta", "camembert"];

impl BertConfig {
    /// The configuration of a folder. Whether there are a pooler and a masked-LM head, only the weights tell.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built, or there are no weights.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::fitted(&folder.config("config.json")?, folder.checkpoint()?.as_ref())?)
    }

    /// As [`BertConfig::parse`], with the pooler and the masked-LM head that the weights have.
    ///
    /// # Errors
    /// As [`BertConfig::parse`].
    pub fn fitted(config: &Config, checkpoint: &dyn Checkpoint) -> Result<Self, ConfigError> {
        let parsed = Self::parse(config)?;
        let has = |wanted: &str| {
            let is =
                |name: &str| PREFIXES.iter().find_map(|p| name.strip_prefix(p)).unwrap_or(name) == wanted;
            checkpoint.entries().iter().any(|entry| is(&entry.name))
        };
        Ok(Self {
            pooler: has("pooler.dense.weight"),
            head: HEADS.iter().any(|keys| keys.iter().all(|key| has(key)))
                && config.flag_or("tie_word_embeddings", true)?,
            ..parsed
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        if self.head { &KEYS_WITH_HEAD } else { &KEYS }
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `BertConfig` and its sisters.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let family = config.text("model_type").filter(|family| FAMILIES.contains(family));
        let family = family.ok_or_else(|| config.error("model_type", &FAMILIES.join(", ")))?;
        let vocab_size = if family == "roberta" { 50265 } else { BASE.vocab_size };
        let shape = Self::shape(config, &BertConfig { vocab_size, ..BASE })?;
        let numbering = match family {
            "bert" => Numbering::FromZero,
            _ => Numbering::after_padding(config, shape.n_positions)?,
        };
        Ok(Self { numbering, ..shape })
    }

    /// The shape in `config.json`, whoever's it is; what it leaves out is that of `default`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn shape(config: &Config, default: &Self) -> Result<Self, ConfigError> {
        config.only("position_embedding_type", &["\"absolute\""])?;
        config.only("is_decoder", &["false"])?;
        config.only("add_cross_attention", &["false"])?;
        let d_model = config.size_or("hidden_size", default.d_model)?;
        let n_heads = config.size_or("num_attention_heads", default.n_heads)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        Ok(Self {
            vocab_size: config.size_or("vocab_size", default.vocab_size)?,
            n_positions: config.size_or("max_position_embeddings", default.n_positions)?,
            numbering: default.numbering,
            n_token_types: config.size_or("type_vocab_size", default.n_token_types)?,
            d_model,
            d_ff: config.size_or("intermediate_size", default.d_ff)?,
            n_layers: config.blocks_or("num_hidden_layers", default.n_layers)?,
            n_heads,
            activation: config.activation_or("hidden_act", default.activation)?,
            layer_norm_eps: config.number_or("layer_norm_eps", default.layer_norm_eps)?,
            pooler: default.pooler,
            head: default.head,
        })
    }
}

/// `gamma` and `beta` are the names of the first uploads.
const NORM: &[Rule] =
    &[Rename("weight", "weight"), Rename("bias", "bias"), Rename("gamma", "weight"), Rename("beta", "bias")];

/// Keys of a linear layer.
pub const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

const BLOCK: &[Rule] = &[
    Under("attention.self.query.", "attention.query.", LINEAR),
    Under("attention.self.key.", "attention.key.", LINEAR),
    Under("attention.self.value.", "attention.value.", LINEAR),
    Under("attention.output.dense.", "attention.output.", LINEAR),
    Under("attention.output.LayerNorm.", "norm1.", NORM),
    Under("intermediate.dense.", "mlp.up.", LINEAR),
    Under("output.dense.", "mlp.down.", LINEAR),
    Under("output.LayerNorm.", "norm2.", NORM),
];

/// Keys of `BertModel` and its sisters without what stands before them in others.
pub const TRUNK: &[Rule] = &[Under("", "", ENCODER), Under("pooler.dense.", "pooler.", LINEAR)];

/// The same of a model that has no use for the pooler, which may be there.
pub const TRUNK_WITHOUT_POOLER: &[Rule] = &[Under("", "", ENCODER), Ignore("pooler.{*}")];

/// The same without a pooler.
pub const ENCODER: &[Rule] = &[
    Rename("embeddings.word_embeddings.weight", "tokens.weight"),
    Rename("embeddings.position_embeddings.weight", "positions.weight"),
    Rename("embeddings.token_type_embeddings.weight", "token_types.weight"),
    Under("embeddings.LayerNorm.", "norm.", NORM),
    Under("encoder.layer.{}.", "blocks.{}.", BLOCK),
    Ignore("embeddings.position_ids"),
    Ignore("embeddings.token_type_ids"),
];

/// Keys of the masked-LM head of `BertForMaskedLM` and `BertForPreTraining`.
pub const BERT_HEAD: &[Rule] = &[
    Under("transform.dense.", "transform.", LINEAR),
    Under("transform.LayerNorm.", "norm.", NORM),
    Rename("bias", "bias"),
    Ignore("decoder.weight"),
    Ignore("decoder.bias"),
];

const ROBERTA_HEAD: &[Rule] = &[
    Under("dense.", "transform.", LINEAR),
    Under("layer_norm.", "norm.", NORM),
    Rename("bias", "bias"),
    Ignore("decoder.weight"),
    Ignore("decoder.bias"),
];

/// By which keys each of the masked-LM heads is known; what is left of one is ignored.
const HEADS: &[[&str; 2]] = &[
    ["cls.predictions.transform.dense.weight", "cls.predictions.bias"],
    ["lm_head.dense.weight", "lm_head.bias"],
];

pub(crate) const PREFIXES: &[&str] = &["bert.", "roberta."];

/// Keys of `BertModel` and its sisters; the heads of other classes are ignored.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "", TRUNK),
    Ignore("cls.{*}"),
    Ignore("lm_head.{*}"),
    Ignore("classifier.{*}"),
    Ignore("qa_outputs.{*}"),
])
.with_prefixes(PREFIXES);

/// Keys of `BertForMaskedLM`, `BertForPreTraining` and their sisters.
pub const KEYS_WITH_HEAD: KeyMap = KeyMap::new(&[
    Under("", "", TRUNK),
    Under("cls.predictions.", "head.", BERT_HEAD),
    Under("lm_head.", "head.", ROBERTA_HEAD),
    Ignore("cls.seq_relationship.weight"),
    Ignore("cls.seq_relationship.bias"),
    Ignore("classifier.{*}"),
    Ignore("qa_outputs.{*}"),
])
.with_prefixes(PREFIXES);

/// BERT as the registry knows it.
pub const SYSTEM: System = System {
    name: "bert",
    about: "bidirectional text encoders: BERT, RoBERTa, XLM-RoBERTa",
    file: "models/bert.rs",
    tasks: &["embed", "fill", "forward"],
    proved: &["bert", "bert_legacy_bin", "roberta", "xlm_roberta", "bert_mlm", "roberta_mlm"],
    presets: PRESETS,
    recognises: |_, config| {
        let Some(config) = config else { return false };
        config.text("model_type").is_some_and(|family| FAMILIES.contains(&family))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = BertConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let config = BertConfig::of(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// An encoder behind the forward contract.
struct Runner {
    model: Bert,
    config: BertConfig,
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids` and `position_ids`.
    ///
    /// Gives `last_hidden_state`, with a pooler `pooler_output`, with a masked-LM head `logits`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let input = self.config.read(&mut inputs);
        inputs.finish()?;
        let Some(input) = input else { return Ok(Outputs::new()) }; // was an error
        let BertOutput { hidden, pooled } = self.model.forward(input);
        let mut outputs = vec![output("last_hidden_state", hidden.clone())];
        outputs.extend(pooled.map(|pooled| output("pooler_output", pooled)));
        outputs.extend(self.model.logits(hidden).map(|logits| output("logits", logits)));
        Ok(outputs)
    }
}

impl BertConfig {
    /// The longest text in tokens.
    pub fn context_length(&self) -> usize {
        match self.numbering {
            Numbering::FromZero => self.n_positions,
            Numbering::AfterPadding(padding) => self.n_positions - padding - 1,
        }
    }

    /// `input_ids`, and if they are there `attention_mask`, `token_type_ids` and `position_ids`. What is wrong with
    /// them is noted; `None` without usable ids.
    pub fn read(&self, inputs: &mut Inputs) -> Option<BertInput> {
        let ids = inputs.ids::<2>("input_ids", self.vocab_size);
        let real = inputs.mask("attention_mask");
        let token_types = inputs.ids::<2>("token_type_ids", self.n_token_types);
        let positions = inputs.ids::<2>("position_ids", self.n_positions);
        inputs.missing("input_ids");
        let ids = ids?;

        let [batch, seq] = ids.dims();
        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        inputs.row_or_like_ids("token_type_ids", token_types.as_ref().map(Tensor::dims), ids.dims());
        inputs.row_or_like_ids("position_ids", positions.as_ref().map(Tensor::dims), ids.dims());
        if positions.is_none() {
            let (last, end) = (self.numbering.last(&ids), self.n_positions - 1);
            if last > end {
                let problem = "`input_ids` has texts that reach position";
                inputs.problem(format!("{problem} {last}, the last one is {end}"));
            }
        }
        // shapes that do not fit were noted, and are not expanded
        let rows = |ids: Tensor<2, Int>| if ids.dims() == [1, seq] { ids.expand([batch, seq]) } else { ids };
        Some(BertInput {
            ids,
            token_types: token_types.map(rows),
            positions: positions.map(rows),
            mask: real.map_or(Mask::Full, Mask::Padding),
        })
    }
}

impl Numbering {
    /// That of RoBERTa in `config.json`, among so many positions.
    ///
    /// # Errors
    /// If the padding's id is none of them.
    pub fn after_padding(config: &Config, n_positions: usize) -> Result<Self, ConfigError> {
        let padding = usize::try_from(config.integer_or("pad_token_id", 1)?).ok();
        let padding = padding.filter(|&padding| padding < n_positions);
        let expected = format!("a position, 0 to {}", n_positions - 1);
        Ok(Self::AfterPadding(padding.ok_or_else(|| config.error("pad_token_id", &expected))?))
    }

    /// The highest position of any of the tokens, `[batch, seq]`.
    fn last(self, ids: &Tensor<2, Int>) -> usize {
        match self {
            Self::FromZero => ids.dims()[1] - 1,
            Self::AfterPadding(_) => {
                let positions = self.positions(ids).into_data().convert::<i64>();
                positions.iter::<i64>().max().unwrap_or(0) as usize
            }
        }
    }
}

/// Devlin et al. 2018, section 3: BERT base.
pub const BASE: BertConfig = BertConfig {
    vocab_size: 30522,
    n_positions: 512,
    numbering: Numbering::FromZero,
    n_token_types: 2,
    d_model: 768,
    d_ff: 3072,
    n_layers: 12,
    n_heads: 12,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-12,
    pooler: true,
    head: false,
};
/// The same, section 3: BERT large.
pub const LARGE: BertConfig = BertConfig { d_model: 1024, d_ff: 4096, n_layers: 24, n_heads: 16, ..BASE };
const CASED: BertConfig = BertConfig { vocab_size: 28996, ..BASE };
/// With the vocabulary of Google's Chinese BERT.
pub const CHINESE: BertConfig = BertConfig { vocab_size: 21128, ..BASE };

/// Liu et al. 2019, table 9. The first two of the 514 positions are never those of a real token.
const ROBERTA: BertConfig = roberta(50265, BASE);
const ROBERTA_LARGE: BertConfig = roberta(50265, LARGE);
const XLM_ROBERTA: BertConfig = roberta(250002, BASE);
/// Conneau et al. 2019: XLM-R large.
pub const XLM_ROBERTA_LARGE: BertConfig = roberta(250002, LARGE);

const fn roberta(vocab_size: usize, bert: BertConfig) -> BertConfig {
    BertConfig {
        vocab_size,
        n_positions: 514,
        numbering: Numbering::AfterPadding(1),
        n_token_types: 1,
        layer_norm_eps: 1e-5,
        ..bert
    }
}

const fn preset(name: &'static str, license: &'static str, config: BertConfig, parameters: usize) -> Preset {
    let source = match config.numbering {
        Numbering::FromZero => "transformers, BertModel with its pooler",
        Numbering::AfterPadding(_) => "transformers, (XLM)RobertaModel with its pooler",
    };
    Preset { name, shape: Shape::Bert(config), weights: Weights::Hub, license, parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("google-bert/bert-base-uncased", "Apache-2.0", BASE, 109_482_240),
    preset("google-bert/bert-base-cased", "Apache-2.0", CASED, 108_310_272),
    preset("google-bert/bert-large-uncased", "Apache-2.0", LARGE, 335_141_888),
    preset("google-bert/bert-base-chinese", "Apache-2.0", CHINESE, 102_267_648),
    preset("hfl/chinese-roberta-wwm-ext", "Apache-2.0", CHINESE, 102_267_648),
    preset("FacebookAI/roberta-base", "MIT", ROBERTA, 124_645_632),
    preset("FacebookAI/roberta-large", "MIT", ROBERTA_LARGE, 355_359_744),
    preset("FacebookAI/xlm-roberta-base", "MIT", XLM_ROBERTA, 278_043_648),
    preset("FacebookAI/xlm-roberta-large", "MIT", XLM_ROBERTA_LARGE, 559_890_432),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{FloatDType, TensorData, Tolerance};
    use volary_weights::{LoadOptions, parameters, save};

    use super::*;

    const TINY: BertConfig = BertConfig {
        vocab_size: 50,
        n_positions: 9,
        d_model: 8,
        d_ff: 16,
        n_layers: 2,
        n_heads: 2,
        layer_norm_eps: 1e-5,
        ..BASE
    };

    fn ids<const D: usize>(shape: [usize; D], values: &[i64]) -> TensorData {
        TensorData::new(values.to_vec(), shape)
    }

    fn fixture(name: &str) -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
    }

    fn run(folder: &Folder, inputs: &[(&str, TensorData)], options: &LoadOptions) -> Result<Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
        crate::registry::forward(folder, &inputs, options, &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        for config in [LARGE, XLM_ROBERTA] {
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = KEYS.keys(&parameter.path).unwrap();
                assert_eq!(keys.len(), 1, "{}", parameter.path);
                assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(of("encoder.layer.3.output.LayerNorm.gamma"), ["blocks.3.norm2.weight"]);
        assert_eq!(of("embeddings.LayerNorm.beta"), ["norm.bias"]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        let error = |fields: &str| {
            let text = format!("{{\"model_type\": \"roberta\", {fields}}}");
            let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
            BertConfig::parse(&config).unwrap_err().to_string()
        };
        for (fields, named) in [
            (
                r#""position_embedding_type": "relative_key""#,
                "`position_embedding_type`: expected \"absolute\"",
            ),
            (r#""is_decoder": true"#, "`is_decoder`"),
            (r#""add_cross_attention": true"#, "`add_cross_attention`"),
            (r#""hidden_size": 30"#, "`num_attention_heads`: expected a divisor of 30"),
            (r#""hidden_act": "mish""#, "`hidden_act`"),
            (r#""vocab_size": 0"#, "`vocab_size`"),
            (r#""num_hidden_layers": 2000000000"#, "`num_hidden_layers`: expected at most 1000 blocks"),
            (r#""pad_token_id": 512"#, "`pad_token_id`: expected a position, 0 to 511, found 512"),
            (r#""pad_token_id": -1"#, "`pad_token_id`"),
            (r#""layer_norm_eps": "small""#, "`layer_norm_eps`"),
            (r#""model_type": "electra""#, "`model_type`: expected bert, roberta, xlm-roberta, camembert"),
        ] {
            let message = error(fields);
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn roberta_counts_real_tokens_from_after_the_padding_id() {
        let tokens = Tensor::<2, Int>::from_data([[5, 1, 7, 1], [1, 1, 9, 8]], &Device::flex());
        let positions = |numbering: Numbering| numbering.positions(&tokens).into_data().convert::<i64>();
        let roberta = positions(Numbering::AfterPadding(1));
        assert_eq!(roberta, ids([2, 4], &[2, 1, 3, 1, 1, 1, 2, 3]));
        assert_eq!(positions(Numbering::FromZero), ids([2, 4], &[0, 1, 2, 3, 0, 1, 2, 3]));
    }

    #[test]
    fn real_tokens_do_not_see_padding() {
        let device = Device::flex();
        let model = TINY.init(&device);
        let real = Tensor::<2, burn::tensor::Bool>::from_data([[true, true, true, false, false]], &device);
        let encode = |tokens: [[i64; 5]; 1]| {
            let ids = Tensor::<2, Int>::from_data(tokens, &device);
            let input = BertInput { mask: Mask::Padding(real.clone()), ..ids.into() };
            let BertOutput { hidden, pooled } = model.forward(input);
            (hidden.narrow(1, 0, 3).into_data(), pooled.unwrap().into_data())
        };
        let (hidden, pooled) = encode([[3, 4, 5, 0, 0]]);
        let (other_hidden, other_pooled) = encode([[3, 4, 5, 6, 7]]);
        hidden.assert_approx_eq::<f32>(&other_hidden, Tolerance::default());
        pooled.assert_approx_eq::<f32>(&other_pooled, Tolerance::default());
    }

    #[test]
    fn a_pooler_is_there_if_the_weights_have_one() {
        let folder = std::env::temp_dir().join(format!("volary-bert-pooler-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let text = r#"{"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 9}"#;
        std::fs::write(folder.join("config.json"), text).unwrap();
        let tokens = [("input_ids", ids([1, 2], &[3, 4]))];
        for (pooler, expected) in
            [(true, vec!["last_hidden_state", "pooler_output"]), (false, vec!["last_hidden_state"])]
        {
            let model = BertConfig { pooler, ..TINY }.init(&Device::flex());
            save(&model, &KEYS, None, &folder.join("model.safetensors"), None).unwrap();
            let outputs = run(&Folder::Disk(folder.clone()), &tokens, &LoadOptions::default()).unwrap();
            assert_eq!(outputs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), expected);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_head_is_there_if_the_weights_have_all_of_it() {
        let source = fixture("bert_mlm");
        let mut tensors = volary_weights::read_tensors(&source.path().join("model.safetensors")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(source.path().join("config.json"), folder.path().join("config.json")).unwrap();
        let tokens = [("input_ids", ids([1, 2], &[8, 4]))];
        for expected in [vec!["last_hidden_state", "logits"], vec!["last_hidden_state"]] {
            let all: Vec<_> = tensors.clone().into_iter().collect();
            volary_weights::save_tensors(&folder.path().join("model.safetensors"), &all).unwrap();
            let outputs = run(&Folder::Disk(folder.path().into()), &tokens, &LoadOptions::default()).unwrap();
            assert_eq!(outputs.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), expected);
            tensors.remove("cls.predictions.bias");
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let two = || ids([1, 2], &[3, 4]);
        type Case<'a> = (&'a str, &'a [(&'a str, TensorData)], &'a [&'a str]);
        let cases: &[Case] = &[
            ("bert", &[], &["`input_ids` is missing"]),
            ("bert", &[("input_ids", ids([2], &[3, 4]))], &["`input_ids` is [2], expected 2 dimensions"]),
            ("bert", &[("input_ids", ids([1, 1], &[96]))], &["`input_ids` holds 96, expected 0 to 95"]),
            ("bert", &[("input_ids", ids([1, 1], &[-1]))], &["`input_ids` holds -1"]),
            ("bert", &[("input_ids", ids([1, 21], &[5; 21]))], &["reach position 20, the last one is 19"]),
            ("roberta", &[("input_ids", ids([1, 19], &[5; 19]))], &["reach position 20, the last one is 19"]),
            (
                "bert",
                &[
                    ("input_ids", two()),
                    ("attention_mask", ids([1, 3], &[1; 3])),
                    ("token_type_ids", ids([1, 2], &[0, 2])),
                    ("position_ids", ids([2, 2], &[0; 4])),
                    ("pixel_values", two()),
                ],
                &[
                    "`attention_mask` is [1, 3], `input_ids` [1, 2]",
                    "`token_type_ids` holds 2, expected 0 to 1",
                    "`position_ids` is [2, 2], `input_ids` [1, 2]",
                    "`pixel_values` is not one of",
                ],
            ),
        ];
        for (folder, inputs, named) in cases {
            let message = run(&fixture(folder), inputs, &LoadOptions::default()).unwrap_err().to_string();
            for part in *named {
                assert!(message.contains(part), "{message}");
            }
        }
        // 18 real tokens after padding id 1 are positions 2 to 19; padding keeps its place
        let padded: Vec<i64> = [[5; 18].as_slice(), &[1; 4]].concat();
        assert!(
            run(&fixture("roberta"), &[("input_ids", ids([1, 22], &padded))], &LoadOptions::default())
                .is_ok()
        );
    }

    #[test]
    fn half_precision_stays_close() {
        let inputs = [("input_ids", ids([1, 4], &[8, 4, 57, 77]))];
        let hidden = |dtype| {
            let options = LoadOptions { dtype: Some(dtype), ..LoadOptions::default() };
            run(&fixture("bert"), &inputs, &options).unwrap().remove(0).1
        };
        let tolerance = Tolerance::absolute(2e-2);
        hidden(FloatDType::F16).assert_approx_eq::<f32>(&hidden(FloatDType::F32), tolerance);
    }
}
