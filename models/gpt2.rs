//! GPT-2: a causal text decoder with learned positions (Radford et al. 2019, "Language Models are Unsupervised Multitask
//! Learners"), and what others trained in its shape: CPM-1 as the hub has it ([`crate::cpm`]), and the sizes of GPT-3
//! (Brown et al. 2020, <https://arxiv.org/abs/2005.14165>), which was never released.
//!
//! The numbers match `transformers` (`GPT2LMHeadModel`, `GPT2Model`), which reads OpenAI's uploads.
//!
//! ```sh
//! volary forward path/to/gpt2 --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{
    AttentionConfig, Embedding, KvCache, LayerNorm, LearnedPositions, Linear, LinearConfig, PreNormBlock,
};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Split, SplitTranspose, Transpose, Under};

use crate::causal::Head;
use crate::config::{Config, ConfigError};
use crate::decoder::{Decoder, Reading, Runner, Text};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{System, describe};

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpt2Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Longest sequence.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of heads.
    pub n_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// The MLP's activation.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// Whether scores are divided by `√d_head`.
    pub scale_scores: bool,
    /// Whether the scores of block `i`, from 0, are divided by `i + 1` too.
    pub scale_by_layer: bool,
    /// What makes scores of states.
    pub head: Head,
}

/// A decoder.
#[derive(Module, Debug)]
pub struct Gpt2 {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`.
    pub positions: LearnedPositions,
    /// The blocks.
    pub blocks: Vec<PreNormBlock>,
    /// After the last one.
    pub norm: LayerNorm,
    /// `[vocab_size, d_model]`, unless the token table serves.
    pub head: Option<Linear>,
}

impl Gpt2Config {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Gpt2 {
        let Self { vocab_size, d_model, .. } = *self;
        let head = || LinearConfig::new(d_model, vocab_size).with_bias(false).init(device);
        Gpt2 {
            tokens: Embedding::new(vocab_size, d_model, 0.02, device),
            positions: LearnedPositions::new(self.n_positions, d_model, 0.02, device),
            blocks: (0..self.n_layers).map(|layer| self.block(layer, device)).collect(),
            norm: LayerNorm::new(d_model, self.layer_norm_eps, device),
            head: (self.head == Head::Own).then(head),
        }
    }

    /// An untrained block; `layer` counts from 0.
    pub fn block(&self, layer: usize, device: &Device) -> PreNormBlock {
        let Self { d_model, d_ff, n_heads, activation, layer_norm_eps, .. } = *self;
        let root = if self.scale_scores { (self.d_head as f64).sqrt() } else { 1.0 };
        let depth = if self.scale_by_layer { layer as f64 + 1.0 } else { 1.0 };
        let attention = AttentionConfig::new(d_model, n_heads)
            .with_d_head(Some(self.d_head))
            .with_scale(Some(1.0 / (root * depth)))
            .init(device);
        let block = PreNormBlock::new(d_model, d_ff, n_heads, activation, layer_norm_eps, device);
        PreNormBlock { attention, ..block }
    }
}

/// Through one block after the other, with a cache each or none at all: `[batch, seq, d_model] -> [batch, seq, d_model]`.
pub(crate) fn through(
    blocks: &[PreNormBlock],
    x: Tensor<3>,
    mask: &Mask,
    caches: &mut [KvCache],
) -> Tensor<3> {
    let mut caches = caches.iter_mut();
    blocks.iter().fold(x, |x, block| match caches.next() {
        Some(cache) => block.cached(x, cache, mask),
        None => block.forward(x, mask),
    })
}

impl Decoder for Gpt2 {
    fn read(&self, text: Text, caches: &mut [KvCache]) -> Tensor<3> {
        let Text { ids, positions, mask } = text;
        let [_, seq] = ids.dims();
        let x = self.tokens.forward(ids) + self.positions.select(&positions, seq); // [batch, seq, d_model]
        self.norm.forward(through(&self.blocks, x, &mask, caches))
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        match &self.head {
            Some(head) => head.forward(states),
            None => self.tokens.scores(states),
        }
    }

    fn n_layers(&self) -> usize {
        self.blocks.len()
    }

    fn device(&self) -> Device {
        self.tokens.weight.device()
    }
}

impl Gpt2Config {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `GPT2Config`. Ids of special tokens are not
    /// read: they change no number, and some uploads' lie outside the vocabulary. Neither is `reorder_and_upcast_attn`,
    /// which changes how half precision is rounded.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        config.only("model_type", &["\"gpt2\""])?;
        config.only("add_cross_attention", &["false"])?;
        let d_model = config.size_or("n_embd", 768)?;
        let n_heads = config.size_or("n_head", 12)?;
        config.divides("n_head", n_heads, d_model)?;
        config.flag_or("reorder_and_upcast_attn", false)?;
        let head = match (config.first_of("architectures"), config.flag_or("tie_word_embeddings", true)?) {
            (Some("GPT2Model"), _) => Head::Absent,
            (_, true) => Head::Tied,
            (_, false) => Head::Own,
        };
        Ok(Self {
            vocab_size: config.size_or("vocab_size", 50257)?,
            n_positions: config.size_or("n_positions", 1024)?,
            d_model,
            d_ff: config.size_or("n_inner", 4 * d_model)?,
            n_layers: config.blocks_or("n_layer", 12)?,
            n_heads,
            d_head: d_model / n_heads,
            activation: config.activation_or("activation_function", Activation::GeluTanh)?,
            layer_norm_eps: config.number_or("layer_norm_epsilon", 1e-5)?,
            scale_scores: config.flag_or("scale_attn_weights", true)?,
            scale_by_layer: config.flag_or("scale_attn_by_inverse_layer_idx", false)?,
            head,
        })
    }

    /// The model filled with weights that go by `keys`, ready to run.
    ///
    /// # Errors
    /// If they do not fit.
    pub(crate) fn load(
        &self,
        weights: &dyn Checkpoint,
        keys: &KeyMap,
        options: &LoadOptions,
        device: &Device,
    ) -> Result<Runner<Gpt2>, Error> {
        Ok(Runner {
            model: load(self.init(device), weights, keys, options)?,
            vocab_size: self.vocab_size,
            n_positions: self.n_positions,
            head: self.head,
            reading: Reading::Causal,
            end: None,
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.head {
            Head::Own => &KEYS,
            Head::Tied | Head::Absent => &KEYS_WITHOUT_HEAD,
        }
    }
}

/// A layer with a weight and a bias.
pub(crate) const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// One whose weight is stored `[d_in, d_out]`.
pub(crate) const CONV1D: &[Rule] = &[Transpose("weight", "weight"), Rename("bias", "bias")];

const BLOCK: &[Rule] = &[
    Under("ln_1.", "norm1.", LINEAR),
    SplitTranspose(
        "attn.c_attn.weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Split("attn.c_attn.bias", &["attention.query.bias", "attention.key.bias", "attention.value.bias"]),
    Under("attn.c_proj.", "attention.output.", CONV1D),
    // the causal mask, and what it put in place of hidden scores
    Ignore("attn.bias"),
    Ignore("attn.masked_bias"),
    Under("ln_2.", "norm2.", LINEAR),
    Under("mlp.c_fc.", "mlp.up.", CONV1D),
    Under("mlp.c_proj.", "mlp.down.", CONV1D),
];

const TRUNK: &[Rule] = &[
    Rename("wte.weight", "tokens.weight"),
    Rename("wpe.weight", "positions.weight"),
    Under("h.{}.", "blocks.{}.", BLOCK),
    Under("ln_f.", "norm.", LINEAR),
];

/// Keys of `GPT2LMHeadModel` with a head of its own. Those of `GPT2Model`, and of OpenAI's first uploads, have nothing
/// before them.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("transformer.", "", TRUNK),
    Under("", "", TRUNK),
    Rename("lm_head.weight", "head.weight"),
    Ignore("multiple_choice_head.{*}"),
]);

/// Keys of `GPT2Model`, or of `GPT2LMHeadModel` whose head is the token table: a head in the file is a copy of it.
pub const KEYS_WITHOUT_HEAD: KeyMap = KeyMap::new(&[
    Under("transformer.", "", TRUNK),
    Under("", "", TRUNK),
    Ignore("lm_head.weight"),
    Ignore("multiple_choice_head.{*}"),
]);

/// GPT-2 as the registry knows it.
pub const SYSTEM: System = System {
    name: "gpt2",
    about: "causal text decoders: GPT-2, CPM-1 as the hub has it, the sizes of GPT-3 (never released)",
    file: "models/gpt2.rs",
    tasks: &["generate", "forward"],
    proved: &["gpt2", "gpt2_bare", "cpm1_hf"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| match config.text("model_type") {
            // FlagAI's name no type; its CPM-large-ch is stored as the hub's
            None => ["n_embd", "n_head", "n_layer"].iter().all(|size| config.has(size)),
            family => family == Some("gpt2"),
        })
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = Gpt2Config::of(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let config = Gpt2Config::of(folder)?;
        Ok(Box::new(config.load(folder.checkpoint()?.as_ref(), config.keys(), options, device)?))
    },
    generator: Some(|folder, options, device| {
        let config = Gpt2Config::of(folder)?;
        match config.head {
            Head::Absent => Err(Error::Task { system: SYSTEM.name, task: "write without a head" }),
            _ => Ok(Box::new(config.load(folder.checkpoint()?.as_ref(), config.keys(), options, device)?)),
        }
    }),
};

/// Radford et al. 2019, table 2, as uploaded: the smallest.
pub(crate) const SMALL: Gpt2Config = Gpt2Config {
    vocab_size: 50257,
    n_positions: 1024,
    d_model: 768,
    d_ff: 4 * 768,
    n_layers: 12,
    n_heads: 12,
    d_head: 64,
    activation: Activation::GeluTanh,
    layer_norm_eps: 1e-5,
    scale_scores: true,
    scale_by_layer: false,
    head: Head::Tied,
};

impl Gpt2Config {
    /// Of the same kind: so many blocks of this width, with heads that share it and an MLP four times as wide.
    pub(crate) const fn sized(self, n_layers: usize, d_model: usize, n_heads: usize) -> Self {
        Self { d_model, d_ff: 4 * d_model, n_layers, n_heads, d_head: d_model / n_heads, ..self }
    }
}

const fn openai(
    name: &'static str,
    n_layers: usize,
    d_model: usize,
    n_heads: usize,
    parameters: usize,
) -> Preset {
    Preset {
        name,
        shape: Shape::Gpt2(SMALL.sized(n_layers, d_model, n_heads)),
        weights: Weights::Hub,
        license: "MIT",
        parameters,
        source: "transformers, GPT2LMHeadModel",
    }
}

/// Brown et al. 2020, table 2.1. Their alternating banded-sparse layers are not modelled: they have the parameters of
/// dense ones.
const fn gpt3(name: &'static str, config: Gpt2Config, parameters: usize) -> Preset {
    Preset {
        name,
        shape: Shape::Gpt2(Gpt2Config { n_positions: 2048, ..config }),
        weights: Weights::Unreleased,
        license: "never released",
        parameters,
        source: "counted; table 2.1 of the paper rounds it",
    }
}

/// Published sizes. In the table of GPT-3 the heads of 13B are together 5120 wide and its residual stream 5140. Those of
/// 1.3B would be 3072 wide at 24; 1.3 billion is what 16 heads give, as wide as the stream.
pub const PRESETS: &[Preset] = &[
    openai("openai-community/gpt2", 12, 768, 12, 124_439_808),
    openai("openai-community/gpt2-medium", 24, 1024, 16, 354_823_168),
    openai("openai-community/gpt2-large", 36, 1280, 20, 774_030_080),
    openai("openai-community/gpt2-xl", 48, 1600, 25, 1_557_611_200),
    gpt3("GPT-3 125M", SMALL.sized(12, 768, 12), 125_226_240),
    gpt3("GPT-3 350M", SMALL.sized(24, 1024, 16), 355_871_744),
    gpt3("GPT-3 760M", SMALL.sized(24, 1536, 16), 760_300_032),
    gpt3("GPT-3 1.3B", SMALL.sized(24, 2048, 16), 1_315_723_264),
    gpt3("GPT-3 2.7B", SMALL.sized(32, 2560, 32), 2_651_553_280),
    gpt3("GPT-3 6.7B", SMALL.sized(32, 4096, 32), 6_658_404_352),
    gpt3("GPT-3 13B", Gpt2Config { d_head: 128, ..SMALL.sized(40, 5140, 40) }, 12_936_488_380),
    gpt3("GPT-3 175B", SMALL.sized(96, 12288, 96), 174_604_259_328),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{Int, Tolerance};
    use volary_kernels::layers::Attention;
    use volary_weights::{parameters, read_tensors, save};

    use super::*;

    const TINY: Gpt2Config =
        Gpt2Config { vocab_size: 50, n_positions: 16, d_ff: 20, ..SMALL.sized(2, 12, 3) };

    fn fixture(name: &str) -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn ids<const B: usize, const S: usize>(tokens: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(tokens, &Device::flex())
    }

    fn run(folder: &Path, inputs: &[(&str, Tensor<2, Int>)]) -> Result<crate::tensors::Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, ids)| (name.to_string(), ids.to_data())).collect();
        let folder = Folder::Disk(folder.to_owned());
        crate::registry::forward(&folder, &inputs, &LoadOptions::default(), &Device::flex())
    }

    fn config(fields: &str) -> Result<Gpt2Config, ConfigError> {
        let text = format!("{{\"model_type\": \"gpt2\", {fields}}}");
        Gpt2Config::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_its_parameters() {
        for config in [TINY, Gpt2Config { head: Head::Own, ..TINY }] {
            let keys = config.keys();
            for parameter in parameters(&config.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path));
            }
        }
        let of = |key| KEYS.paths(key).unwrap();
        let fused = ["attention.query.weight", "attention.key.weight", "attention.value.weight"];
        assert_eq!(of("h.3.attn.c_attn.weight"), fused.map(|part| format!("blocks.3.{part}")));
        assert_eq!(of("transformer.wpe.weight"), ["positions.weight"]);
        assert!(of("h.0.attn.bias").is_empty() && of("transformer.h.0.attn.masked_bias").is_empty());
    }

    /// Scores are products of queries and keys: dividing them is dividing the queries.
    #[test]
    fn scales_of_scores_are_scales_of_queries() {
        let text = || ids([[3, 14, 15, 9, 2]]);
        let plain = TINY.init(&Device::flex());
        let with = |scale_scores, scale_by_layer| {
            let config = Gpt2Config { scale_scores, scale_by_layer, ..TINY };
            let mut model = plain.clone();
            for (layer, block) in model.blocks.iter_mut().enumerate() {
                // the weights of the one, the scale of the other
                let Attention { query, key, value, output, .. } = block.attention.clone();
                block.attention = config.block(layer, &Device::flex()).attention;
                block.attention.query = query;
                block.attention.key = key;
                block.attention.value = value;
                block.attention.output = output;
            }
            model
        };
        for (flags, factors) in [((false, false), [2.0, 2.0]), ((true, true), [1.0, 0.5])] {
            let mut scaled = plain.clone();
            for (block, factor) in scaled.blocks.iter_mut().zip(factors) {
                let query = &mut block.attention.query;
                query.weight = query.weight.clone().map(|weight| weight * factor); // heads of 4 channels
                query.bias = query.bias.clone().map(|bias| bias.map(|bias| bias * factor));
            }
            let expected = scaled.forward(text()).into_data();
            let found = with(flags.0, flags.1).forward(text()).into_data();
            found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-5));
            let unscaled = plain.forward(text()).into_data();
            assert!(found.iter::<f32>().zip(unscaled.iter::<f32>()).any(|(a, b)| (a - b).abs() > 1e-4));
        }
    }

    /// The torch file of the hub's CPM-1: half precision, a copy of the tied head, buffers of the mask.
    #[test]
    fn the_torch_file_holds_the_same_model() {
        let source = fixture("cpm1_hf");
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "pytorch_model.bin"] {
            std::fs::copy(source.join(name), folder.path().join(name)).unwrap();
        }
        let text = [("input_ids", ids([[18, 38, 12, 31]]))];
        assert_eq!(run(folder.path(), &text).unwrap(), run(&source, &text).unwrap());
        let disk = Folder::Disk(folder.path().to_owned());
        assert!((SYSTEM.describe)(&disk).unwrap().problems.is_empty());
    }

    /// The files of `GPT2Model`, of a tied head with and without a copy, and of a head of its own.
    #[test]
    fn a_head_is_read_where_there_is_one() {
        let folder = tempfile::tempdir().unwrap();
        let own = Gpt2Config { head: Head::Own, ..TINY }.init(&Device::flex());
        const BARE: KeyMap = KeyMap::new(&[Under("", "", TRUNK), Rename("lm_head.weight", "head.weight")]);
        let text = ids([[3, 4]]);
        let states = own.forward(text.clone());
        let tied = Gpt2 { head: None, ..own.clone() }.logits(states.clone());
        for (keys, fields, name, expected) in [
            (KEYS, r#""tie_word_embeddings": false"#, "logits", own.logits(states.clone())),
            (KEYS, r#""tie_word_embeddings": true"#, "logits", tied),
            (BARE, r#""architectures": ["GPT2Model"]"#, "last_hidden_state", states),
        ] {
            let config = format!(
                r#"{{"model_type": "gpt2", "n_embd": 12, "n_inner": 20, "n_layer": 2, "n_head": 3, "n_positions": 16,
                "vocab_size": 50, {fields}}}"#
            );
            std::fs::write(folder.path().join("config.json"), config).unwrap();
            save(&own, &keys, None, &folder.path().join("model.safetensors"), None).unwrap();
            let outputs = run(folder.path(), &[("input_ids", text.clone())]).unwrap();
            assert_eq!(outputs[0].0, name);
            outputs[0].1.assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""add_cross_attention": true"#, "`add_cross_attention`"),
            (r#""n_embd": 30"#, "`n_head`: expected a divisor of 30"),
            (r#""activation_function": "mish""#, "`activation_function`"),
            (r#""n_layer": 2000000000"#, "`n_layer`: expected at most 1000 blocks"),
            (r#""scale_attn_weights": 1"#, "`scale_attn_weights`: expected true or false"),
            (r#""n_inner": 0"#, "`n_inner`"),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        let wide = config(r#""n_embd": 24, "n_head": 2, "n_inner": 7, "n_layer": 1"#).unwrap();
        assert_eq!((wide.d_ff, wide.d_head), (7, 12));
        assert_eq!(config(r#""n_inner": null"#).unwrap(), SMALL);
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        type Case<'a> = (&'a [(&'a str, Tensor<2, Int>)], &'a [&'a str]);
        let cases: &[Case] = &[
            (&[], &["`input_ids` is missing"]),
            (&[("input_ids", ids([[90]]))], &["`input_ids` holds 90, expected 0 to 89"]),
            (&[("input_ids", ids([[5; 33]]))], &["`input_ids` has 33 tokens a row, expected at most 32"]),
            (
                &[
                    ("input_ids", ids([[3, 4]])),
                    ("attention_mask", ids([[1, 1, 1]])),
                    ("position_ids", ids([[0, 32]])),
                    ("greedy.prompt_ids", ids([[7; 21]])),
                    ("token_type_ids", ids([[0, 0]])),
                    ("other.loss_mask", ids([[0, 0]])),
                ],
                &[
                    "`attention_mask` is [1, 3], `input_ids` [1, 2]",
                    "`position_ids` holds 32, expected 0 to 31",
                    "`greedy.prompt_ids` has 21 tokens: with 12 more they do not fit into 32 positions",
                    "`token_type_ids` is not one of",
                    "`other.loss_mask` is not one of",
                ],
            ),
        ];
        for (inputs, named) in cases {
            let message = run(&fixture("gpt2"), inputs).unwrap_err().to_string();
            for part in *named {
                assert!(message.contains(part), "{message}");
            }
        }
        let names = |inputs: &[_]| {
            let outputs = run(&fixture("gpt2"), inputs).unwrap();
            outputs.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        // no room to go on in, and nothing but padding in the first row
        assert_eq!(names(&[("input_ids", ids([[5; 32]]))]), ["logits", "loss"]);
        assert_eq!(names(&[("input_ids", ids([[5]])), ("attention_mask", ids([[0]]))]), ["logits"]);
    }

    /// A mask of which token sees which does what the padding and the causal mask do.
    #[test]
    fn what_tokens_see_may_be_given_whole() {
        let mut inputs = read_tensors(&fixture("gpt2").join("inputs.safetensors")).unwrap();
        let logits = |inputs: &BTreeMap<_, _>| {
            let folder = Folder::Disk(fixture("gpt2"));
            let outputs = crate::registry::forward(&folder, inputs, &LoadOptions::default(), &Device::flex());
            outputs.map(|outputs| outputs[0].1.clone())
        };
        let expected = logits(&inputs).unwrap();
        let real: Vec<i64> = inputs["attention_mask"].iter::<i64>().collect();
        let seen = |[row, query, key]: [usize; 3]| i64::from(key <= query && real[row * 11 + key] == 1);
        let seen: Vec<i64> = (0..3 * 11 * 11).map(|i| seen([i / 121, i / 11 % 11, i % 11])).collect();
        let visible = burn::tensor::TensorData::new(seen, [3, 1, 11, 11]);
        inputs.insert("attention_mask".into(), visible.clone());
        logits(&inputs).unwrap().assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-4));
        let turned = burn::tensor::TensorData::new(visible.iter::<i64>().collect(), [3, 11, 1, 11]);
        inputs.insert("attention_mask".into(), turned);
        let message = logits(&inputs).unwrap_err().to_string();
        assert!(message.contains("see is [3, 11, 1, 11], expected [3, 1, 11, 11]"), "{message}");
    }
}
