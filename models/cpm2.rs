//! CPM-2: an encoder-decoder of 11 billion parameters for Chinese, and for Chinese and English (Zhang et al. 2021,
//! <https://arxiv.org/abs/2106.10715>), and the vectors that prompt tuning teaches it.
//!
//! Its mathematics are those of T5 1.1 ([`crate::t5`]) whatever its configuration says of the feed-forward layers. The
//! numbers match the authors' code (`TsinghuaAI/CPM-2-Finetune`), whose names and tensor-parallel ranks are read: the
//! configuration beside the folder that they lie in.
//!
//! ```text
//! cpm2/config.json                            configs/model/cpm2_config.json with "model_type": "cpm2"
//! cpm2/100000/mp_rank_00_model_states.pt      and the other ranks
//! ```
//!
//! ```sh
//! volary forward path/to/cpm2 --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use volary_kernels::layers::Embedding;
use volary_kernels::ops::{Activation, Mask};
use volary_weights::format::{MegatronLayout, Merge, OpenOptions, RankOptions};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Split, Under};

use crate::causal;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::t5::{self, Head, MlpForm, T5, T5Config, T5Input, T5Output, buckets};
use crate::tensors::{Inputs, Outputs, output};

/// The authors' `configs/model/cpm2_config.json`, which says `relu` where the code has a gated tanh-GELU, with their
/// vocabulary of Chinese. Texts begin with `<s>`, 1, and are padded with `<pad>`, 5.
const ZH: T5Config = T5Config {
    vocab_size: 26240,
    d_model: 4096,
    d_ff: 10240,
    n_layers: 24,
    n_decoder_layers: 24,
    n_heads: 64,
    d_head: 64,
    mlp: MlpForm::Gated,
    activation: Activation::GeluTanh,
    n_buckets: 32,
    max_distance: 128,
    rms_norm_eps: 1e-6,
    head: Head::Own,
    start: 1,
    padding: 5,
};

/// The vocabulary of Chinese and English.
pub(crate) const ZH_EN: T5Config = T5Config { vocab_size: 51968, ..ZH };

const fn preset(name: &'static str, config: T5Config, parameters: usize) -> Preset {
    let source = "transformers, T5ForConditionalGeneration of this shape; the authors say 11 billion";
    let license = "by application to BAAI";
    Preset { name, shape: Shape::T5(config), weights: Weights::Application, license, parameters, source }
}

/// Published sizes, by the names of the authors' folders: Chinese; Chinese and English, and that which the experts of
/// CPM-2-MoE began from.
pub const PRESETS: &[Preset] = &[
    preset("cpm-2-100000", ZH, 11_087_097_856),
    preset("cpm-2-36000", ZH_EN, 11_297_861_632),
    preset("cpm-2-32000", ZH_EN, 11_297_861_632),
];

/// The configuration of a folder. A vocabulary that is not said is that of the weights, as the authors' configuration
/// leaves it to their tokenizer.
///
/// # Errors
/// If it is missing, malformed, or asks for what is not built; if it says no vocabulary, and there are no weights.
pub fn config_of(folder: &Folder) -> Result<T5Config, Error> {
    let config = folder.config("config.json")?;
    let vocab_size = match config.has("vocab_size") {
        true => config.size("vocab_size")?,
        false => {
            let checkpoint = checkpoint(folder, None)?;
            let table = checkpoint.entries().iter().find(|entry| entry.name == "word_embeds.weight");
            table.and_then(|entry| entry.shape.first().copied()).unwrap_or(ZH.vocab_size)
        }
    };
    Ok(parse(&config, vocab_size)?)
}

/// The authors' `config.json`; what it leaves out is as in the published sizes.
///
/// # Errors
/// If it is malformed, or asks for what is not built.
pub fn parse(config: &Config, vocab_size: usize) -> Result<T5Config, ConfigError> {
    config.only("do_dim_trick", &["false"])?;
    let n_layers = config.blocks_or("num_layers", ZH.n_layers)?;
    let (n_buckets, max_distance) = buckets(config)?;
    Ok(T5Config {
        vocab_size,
        d_model: config.size_or("d_model", ZH.d_model)?,
        d_ff: config.size_or("d_ff", ZH.d_ff)?,
        n_layers,
        n_decoder_layers: config.blocks_or("num_decoder_layers", n_layers)?,
        n_heads: config.size_or("num_heads", ZH.n_heads)?,
        d_head: config.size_or("d_kv", ZH.d_head)?,
        n_buckets,
        max_distance,
        rms_norm_eps: config.number_or("layer_norm_epsilon", ZH.rms_norm_eps)?,
        start: config.token_or("decoder_start_token_id", ZH.start, vocab_size)?,
        ..ZH
    })
}

pub(crate) const SELF_ATTENTION: &[Rule] = &[
    Rename("layer_norm.weight", "norm1.weight"),
    Split(
        "self_attn.project.weight",
        &["attention.query.weight", "attention.key.weight", "attention.value.weight"],
    ),
    Rename("self_attn.dense.weight", "attention.output.weight"),
];
pub(crate) const CROSS_ATTENTION: &[Rule] = &[
    Rename("layer_norm.weight", "norm2.weight"),
    Rename("cross_attn.project_q.weight", "cross.query.weight"),
    Split("cross_attn.project_kv.weight", &["cross.key.weight", "cross.value.weight"]),
    Rename("cross_attn.dense.weight", "cross.output.weight"),
];
const FEED_FORWARD: &[Rule] = &[
    Rename("wi_0.weight", "Gated.gate.weight"),
    Rename("wi_1.weight", "Gated.up.weight"),
    Rename("wo.weight", "Gated.down.weight"),
];

const ENCODER: &[Rule] = &[
    Ignore("word_embeds.weight"), // a copy
    Rename("blocks.0.self_attn.self_attn.relative_attention_bias.weight", "bias.weight"),
    Under("blocks.{}.self_attn.", "blocks.{}.", SELF_ATTENTION),
    Rename("blocks.{}.ff.layer_norm.weight", "blocks.{}.norm2.weight"),
    Under("blocks.{}.ff.dense_relu_dense.", "blocks.{}.mlp.projections.", FEED_FORWARD),
    Rename("final_layernorm.weight", "norm.weight"),
];
const DECODER: &[Rule] = &[
    Ignore("word_embeds.weight"), // a copy
    Rename("blocks.0.self_attn.self_attn.relative_attention_bias.weight", "bias.weight"),
    Under("blocks.{}.self_attn.", "blocks.{}.", SELF_ATTENTION),
    Under("blocks.{}.cross_attn.", "blocks.{}.", CROSS_ATTENTION),
    Rename("blocks.{}.ff.layer_norm.weight", "blocks.{}.norm3.weight"),
    Under("blocks.{}.ff.dense_relu_dense.", "blocks.{}.mlp.projections.", FEED_FORWARD),
    Rename("final_layernorm.weight", "norm.weight"),
];
const BOTH: &[Rule] = &[
    Rename("word_embeds.weight", "encoder.tokens.weight"),
    Under("encoder.", "encoder.", ENCODER),
    Under("decoder.", "decoder.", DECODER),
    Rename("lm_head.weight", "head.weight"),
];

/// Keys of the authors' `EncDecModel`.
pub const KEYS: KeyMap = KeyMap::new(BOTH);

/// Keys of an `EncDecModel` with a tuned prompt, a [`Prompted`].
pub const PROMPTED_KEYS: KeyMap =
    KeyMap::new(&[Under("", "model.", BOTH), Rename("encoder.prompt_embeds.weight", "prompt.vectors")]);

/// Keys of a [`Prompt`] alone.
pub const PROMPT_KEYS: KeyMap = KeyMap::new(&[Rename("encoder.prompt_embeds.weight", "vectors")]);

/// How the authors' tensor-parallel ranks are merged; tables of distances are split by head.
pub const LAYOUT: MegatronLayout = MegatronLayout {
    merges: &[
        ("word_embeds.weight", Merge::Vocabulary),
        ("encoder.word_embeds.weight", Merge::Vocabulary),
        ("decoder.word_embeds.weight", Merge::Vocabulary),
        ("lm_head.weight", Merge::Vocabulary),
        ("encoder.prompt_embeds.weight", Merge::Replicated),
        ("encoder.blocks.{}.self_attn.layer_norm.weight", Merge::Replicated),
        ("encoder.blocks.{}.self_attn.self_attn.project.weight", Merge::Fused(3)),
        ("encoder.blocks.{}.self_attn.self_attn.dense.weight", Merge::Row),
        ("encoder.blocks.{}.self_attn.self_attn.relative_attention_bias.weight", Merge::Row),
        ("encoder.blocks.{}.ff.layer_norm.weight", Merge::Replicated),
        ("encoder.blocks.{}.ff.dense_relu_dense.wi_0.weight", Merge::Column),
        ("encoder.blocks.{}.ff.dense_relu_dense.wi_1.weight", Merge::Column),
        ("encoder.blocks.{}.ff.dense_relu_dense.wo.weight", Merge::Row),
        ("encoder.final_layernorm.weight", Merge::Replicated),
        ("decoder.blocks.{}.self_attn.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.self_attn.self_attn.project.weight", Merge::Fused(3)),
        ("decoder.blocks.{}.self_attn.self_attn.dense.weight", Merge::Row),
        ("decoder.blocks.{}.self_attn.self_attn.relative_attention_bias.weight", Merge::Row),
        ("decoder.blocks.{}.cross_attn.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.cross_attn.cross_attn.project_q.weight", Merge::Column),
        ("decoder.blocks.{}.cross_attn.cross_attn.project_kv.weight", Merge::Fused(2)),
        ("decoder.blocks.{}.cross_attn.cross_attn.dense.weight", Merge::Row),
        ("decoder.blocks.{}.ff.layer_norm.weight", Merge::Replicated),
        ("decoder.blocks.{}.ff.dense_relu_dense.wi_0.weight", Merge::Column),
        ("decoder.blocks.{}.ff.dense_relu_dense.wi_1.weight", Merge::Column),
        ("decoder.blocks.{}.ff.dense_relu_dense.wo.weight", Merge::Row),
        ("decoder.final_layernorm.weight", Merge::Replicated),
    ],
};

/// The weights of a folder, ranks merged, tables cut to `vocab_size` if it is given.
///
/// # Errors
/// If there are none, or they are broken.
pub fn checkpoint(folder: &Folder, vocab_size: Option<usize>) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions { vocab_size, ..RankOptions::new(LAYOUT) };
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), ..OpenOptions::default() })
}

/// CPM-2 as the registry knows it.
pub const SYSTEM: System = System {
    name: "cpm2",
    about: "an encoder-decoder for Chinese and English: CPM-2 (Wen Yuan), with prompt tuning",
    file: "models/cpm2.rs",
    tasks: &["generate", "forward"],
    proved: &["cpm2"],
    presets: PRESETS,
    recognises: |_, config| {
        // the authors' own configuration names no system
        let theirs = ["d_kv", "num_decoder_layers", "init_method_std"];
        config.is_some_and(|config| match config.text("model_type") {
            Some(family) => family == "cpm2",
            None => theirs.iter().all(|field| config.has(field)),
        })
    },
    checkpoint: |folder| checkpoint(folder, Some(config_of(folder)?.vocab_size)),
    describe: |folder| {
        let config = config_of(folder)?;
        let checkpoint = checkpoint(folder, Some(config.vocab_size))?;
        describe_with(checkpoint.as_ref(), &config.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| Ok(Box::new(Runner(read(folder, options, device)?))),
    generator: Some(|folder, options, device| Ok(Box::new(read(folder, options, device)?))),
};

/// What the forward contract is given.
pub(crate) struct Given {
    ids: Tensor<2, Int>,
    decoder_ids: Tensor<2, Int>,
    visible: Option<Tensor<4, Bool>>,
    decoder_visible: Option<Tensor<4, Bool>>,
    cross_visible: Option<Tensor<4, Bool>>,
}

impl Given {
    /// Of inputs that fit a model; there are always some.
    ///
    /// # Errors
    /// If they do not.
    pub(crate) fn of(mut inputs: Inputs, config: &T5Config) -> Result<Option<Self>, Error> {
        let T5Config { vocab_size, n_heads, .. } = *config;
        let ids = inputs.ids::<2>("enc_input_ids", vocab_size);
        let decoder_ids = inputs.ids::<2>("dec_input_ids", vocab_size);
        let visible = inputs.visible("enc_attention_mask");
        let decoder_visible = inputs.visible("dec_attention_mask");
        let cross_visible = inputs.visible("cross_attention_mask");
        inputs.missing("enc_input_ids");
        inputs.missing("dec_input_ids");
        let (Some(ids), Some(decoder_ids)) = (ids, decoder_ids) else {
            return inputs.finish().map(|()| None); // always an error
        };
        let ([batch, read], [rows, written]) = (ids.dims(), decoder_ids.dims());
        if rows != batch {
            inputs.problem(format!("`dec_input_ids` has {rows} rows, `enc_input_ids` {batch}"));
        }
        for (name, mask, queries, keys) in [
            ("enc_attention_mask", &visible, read, read),
            ("dec_attention_mask", &decoder_visible, written, written),
            ("cross_attention_mask", &cross_visible, written, read),
        ] {
            let Some([b, heads, q, k]) = mask.as_ref().map(Tensor::dims) else { continue };
            if ![1, batch].contains(&b) || ![1, n_heads].contains(&heads) || [q, k] != [queries, keys] {
                let expected = format!("[{batch}, 1, {queries}, {keys}]");
                inputs.problem(format!("`{name}` is {:?}, expected {expected}", [b, heads, q, k]));
            }
        }
        inputs.finish()?;
        Ok(Some(Self { ids, decoder_ids, visible, decoder_visible, cross_visible }))
    }

    /// The same as the model takes it.
    pub(crate) fn input(&self) -> T5Input {
        T5Input {
            ids: self.ids.clone(),
            mask: mask_of(&self.visible),
            decoder_ids: self.decoder_ids.clone(),
            decoder_mask: mask_of(&self.decoder_visible),
            cross_mask: mask_of(&self.cross_visible),
        }
    }
}

fn mask_of(visible: &Option<Tensor<4, Bool>>) -> Mask {
    visible.clone().map_or(Mask::Full, Mask::Visible)
}

/// CPM-2 behind the forward contract.
struct Runner(t5::Runner);

fn read(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<t5::Runner, Error> {
    let config = config_of(folder)?;
    let checkpoint = checkpoint(folder, Some(config.vocab_size))?;
    let model = load(config.init(device), checkpoint.as_ref(), &KEYS, options)?;
    Ok(t5::Runner { model, config })
}

impl Forward for Runner {
    /// `enc_input_ids` and `dec_input_ids`, and if wanted `enc_attention_mask`, `dec_attention_mask` and
    /// `cross_attention_mask`, each `[batch, 1, queries, keys]` of 1 for what is seen; the future never is.
    ///
    /// Gives `lm_logits`; `encoder_last_hidden_state`, and of each row i, as `encoder_last_hidden_state_row<i>`, those of
    /// the tokens that see something; and the twelve `greedy.tokens` that answer the first row.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        let Some(given) = Given::of(inputs, &self.0.config)? else { return Ok(Outputs::new()) };
        let T5Output { encoder, decoder } = self.0.model.forward(given.input());
        let Given { ids, visible, cross_visible, .. } = given;
        let [batch, _] = ids.dims();
        let mut outputs = vec![
            output("lm_logits", self.0.model.logits(decoder)),
            output("encoder_last_hidden_state", encoder.clone()),
        ];
        for row in 0..batch {
            let states = encoder.clone().narrow(0, row, 1); // [1, read, d_model]
            let seeing = visible.as_ref().map(|visible| seeing(visible, row));
            let states = match seeing {
                Some(places) if places.is_empty() => continue,
                Some(places) => {
                    let places = TensorData::from(places.as_slice());
                    states.select(1, Tensor::<1, Int>::from_data(places, &encoder.device()))
                }
                None => states,
            };
            outputs.push(output(&format!("encoder_last_hidden_state_row{row}"), states));
        }

        let first =
            |visible: &Option<Tensor<4, Bool>>| visible.clone().map(|visible| visible.narrow(0, 0, 1));
        let x = self.0.model.encoder.tokens.forward(ids.narrow(0, 0, 1)); // [1, read, d_model]
        let seen = first(&cross_visible).map(|seen| seen.narrow(2, 0, 1)); // [1, heads or 1, 1, read]
        let mask = mask_of(&first(&visible));
        let session = self.0.model.session_of(x, mask, seen, self.0.config.start, causal::GREEDY);
        outputs.push(causal::greedy_tokens(session));
        Ok(outputs)
    }
}

/// The queries of a row that see a key, by their places. A mask `[batch or 1, heads, queries, keys]` of one row is for all.
fn seeing(visible: &Tensor<4, Bool>, row: usize) -> Vec<i64> {
    let [rows, heads, queries, keys] = visible.dims();
    let visible: Vec<bool> =
        visible.clone().narrow(0, row.min(rows - 1), 1).into_data().iter::<bool>().collect();
    let sees = |query: usize| {
        (0..heads).any(|head| visible[(head * queries + query) * keys..][..keys].contains(&true))
    };
    (0..queries).filter(|&query| sees(query)).map(|query| query as i64).collect()
}

/// Vectors that the encoder reads in place of tokens: all that prompt tuning learns (section 4 of the paper, after
/// Lester et al. 2021, <https://arxiv.org/abs/2104.08691>).
#[derive(Module, Debug)]
pub struct Prompt {
    /// `[length, d_model]`.
    pub vectors: Param<Tensor<2>>,
}

/// What the vectors of a [`Prompt`] are before training, as in the authors' scripts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptStart<'a> {
    /// Standard normal.
    Random,
    /// Those of a text's tokens, and for the rest that of one token, such as `<mask>` (6 in the vocabulary of Chinese).
    Tokens {
        /// May be empty.
        text: &'a [u32],
        /// For the rest.
        rest: u32,
    },
    /// Those of a text's tokens, and for the rest those of every hundredth of the vocabulary.
    Spread {
        /// May be empty.
        text: &'a [u32],
    },
}

impl Prompt {
    /// How many vectors the paper uses.
    pub const LENGTH: usize = 100;

    /// `length` vectors for a model with these tokens.
    ///
    /// # Panics
    /// If a token is outside the vocabulary.
    pub fn new(length: usize, start: PromptStart, tokens: &Embedding) -> Self {
        let table = tokens.weight.val();
        let [vocab_size, d_model] = table.dims();
        let rest = |text: &[u32], rest: &dyn Fn(usize) -> u32| {
            let rest = (text.len()..length).map(|place| rest(place - text.len()));
            text.iter().copied().chain(rest).take(length).map(i64::from).collect::<Vec<_>>()
        };
        let ids = match start {
            PromptStart::Random => {
                let normal = Initializer::Normal { mean: 0.0, std: 1.0 };
                return Self { vectors: normal.init([length, d_model], &table.device()) };
            }
            PromptStart::Tokens { text, rest: token } => rest(text, &|_| token),
            PromptStart::Spread { text } => rest(text, &|place| (100 * (place + 1) % vocab_size) as u32),
        };
        let outside = ids.iter().find(|&&id| id >= vocab_size as i64);
        assert!(outside.is_none(), "the token {outside:?} is outside the vocabulary of {vocab_size}");
        let ids = Tensor::<1, Int>::from_data(TensorData::from(ids.as_slice()), &table.device());
        Self { vectors: Param::from_tensor(table.select(0, ids).detach()) }
    }

    /// Token ids with all vectors in front: `[batch, seq] -> [batch, length + seq]`. Below 0 are the vectors: the first is
    /// -1, the second -2. They may as well stand in the middle of a text, or behind it.
    pub fn before(&self, ids: Tensor<2, Int>) -> Tensor<2, Int> {
        let [batch, _] = ids.dims();
        let [length, _] = self.vectors.val().dims();
        let vectors = -Tensor::<1, Int>::arange(1..length as i64 + 1, &ids.device());
        Tensor::cat(vec![vectors.unsqueeze::<2>().expand([batch, length]), ids], 1)
    }

    /// A padding mask for [`Prompt::before`]: `[batch, seq] -> [batch, length + seq]`.
    pub fn mask_before(&self, real: Tensor<2, Bool>) -> Tensor<2, Bool> {
        let [batch, _] = real.dims();
        let [length, _] = self.vectors.val().dims();
        let vectors = Tensor::<2, Int>::ones([batch, length], &real.device()).bool();
        Tensor::cat(vec![vectors, real], 1)
    }

    /// What the encoder reads: ids, with vectors below 0, `[batch, seq] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or names a vector that is not there.
    pub fn embed(&self, ids: Tensor<2, Int>, tokens: &Embedding) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let is_vector = ids.clone().lower_elem(0);
        let read = tokens.forward(ids.clone().mask_fill(is_vector.clone(), 0));
        let vector = (-ids - 1).mask_fill(is_vector.clone().bool_not(), 0);
        let vectors = embedding(self.vectors.val(), vector); // [batch, seq, d_model]
        let [_, _, d_model] = read.dims();
        read.mask_where(is_vector.unsqueeze_dim::<3>(2).expand([batch, seq, d_model]), vectors)
    }
}

/// A frozen model with a prompt that is learned. An optimizer that steps over it changes the prompt alone.
#[derive(Module, Debug)]
pub struct Prompted {
    /// Not trained.
    pub model: T5,
    /// Trained.
    pub prompt: Prompt,
}

impl Prompted {
    /// Freezes the model, which lies on an autodiff device if the prompt is to be trained.
    pub fn new(model: T5, prompt: Prompt) -> Self {
        Self { model: model.no_grad(), prompt }
    }

    /// As [`T5::forward`], with ids of vectors below 0 among those that are read; masks are of them too.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: T5Input) -> T5Output {
        let x = self.prompt.embed(input.ids, &self.model.encoder.tokens);
        let encoder = self.model.encoder.encode(x, &input.mask); // [batch, seq, d_model]
        let decoder = self.model.decode(input.decoder_ids, &input.decoder_mask, &encoder, &input.cross_mask);
        T5Output { encoder, decoder }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::Tolerance;
    use volary_text::generate::greedy;
    use volary_weights::{format::open, parameters, read_tensors, save};

    use super::*;

    const TINY: T5Config = T5Config {
        vocab_size: 40,
        d_model: 16,
        d_ff: 24,
        n_layers: 1,
        n_decoder_layers: 2,
        n_heads: 2,
        d_head: 6,
        ..ZH
    };

    fn ids<const B: usize, const S: usize>(tokens: [[i64; S]; B], device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(tokens, device)
    }

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cpm2")
    }

    fn run(
        folder: &Path,
        inputs: &BTreeMap<String, TensorData>,
    ) -> Result<BTreeMap<String, TensorData>, Error> {
        let folder = Folder::Disk(folder.into());
        let outputs = crate::registry::forward(&folder, inputs, &LoadOptions::default(), &Device::flex())?;
        Ok(outputs.into_iter().collect())
    }

    /// A folder with the fixture's ranks and this configuration, as the authors lay them out, in a new place.
    fn ranks(name: &str, config: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("volary-cpm2-{name}-{}", std::process::id()));
        std::fs::create_dir_all(folder.join("100000")).unwrap();
        for rank in ["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"] {
            std::fs::copy(fixture().join("100000").join(rank), folder.join("100000").join(rank)).unwrap();
        }
        std::fs::write(folder.join("latest_checkpointed_iteration.txt"), "100000\n").unwrap();
        std::fs::write(folder.join("config.json"), config).unwrap();
        folder
    }

    fn config() -> String {
        std::fs::read_to_string(fixture().join("config.json")).unwrap()
    }

    #[test]
    fn every_parameter_has_one_key_that_leads_back_to_it() {
        let model = TINY.init(&Device::flex());
        let prompt = Prompt::new(3, PromptStart::Random, &model.encoder.tokens);
        let of_model = parameters(&model);
        let all = parameters(&Prompted::new(model, prompt));
        for (keys, parameters) in [(KEYS, of_model), (PROMPTED_KEYS, all)] {
            for parameter in parameters {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
            }
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(
            of("decoder.blocks.7.cross_attn.cross_attn.project_kv.weight"),
            ["decoder.blocks.7.cross.key.weight", "decoder.blocks.7.cross.value.weight"]
        );
        assert!(of("decoder.word_embeds.weight").is_empty());
    }

    /// The ranks hold the same numbers as the one file, and the authors' configuration says neither system nor vocabulary.
    #[test]
    fn the_ranks_of_the_authors_are_read() {
        let inputs = read_tensors(&fixture().join("inputs.safetensors")).unwrap();
        let expected = run(&fixture(), &inputs).unwrap();
        let theirs = config()
            .replace("\"vocab_size\": 88,", "")
            .replace("\"model_type\": \"cpm2\"", "\"do_dim_trick\": false");
        assert!(!theirs.contains("cpm2") && !theirs.contains("vocab"), "{theirs}");
        for (name, config) in [("ranks", config()), ("theirs", theirs)] {
            let folder = ranks(name, &config);
            let found = run(&folder, &inputs).unwrap();
            assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
            for (name, expected) in &expected {
                assert_eq!(found[name], *expected, "{name}");
            }
            std::fs::remove_dir_all(&folder).unwrap();
        }
    }

    /// Merged tables of distances have the columns of the first rank's heads, then those of the second's.
    #[test]
    fn merged_ranks_are_the_tensors_of_the_one_file() {
        let folder = ranks("merged", &config());
        let merged = checkpoint(&Folder::Disk(folder.clone()), Some(88)).unwrap();
        let whole = open(&fixture().join("model.safetensors")).unwrap();
        for entry in whole.entries() {
            let halves = merged.bytes(&entry.name).unwrap();
            let halves =
                halves.chunks_exact(2).map(|half| half::f16::from_le_bytes([half[0], half[1]]).to_f32());
            let singles = whole.bytes(&entry.name).unwrap();
            let singles = singles
                .chunks_exact(4)
                .map(|single| f32::from_le_bytes([single[0], single[1], single[2], single[3]]));
            assert!(halves.eq(singles), "{}", entry.name);
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_smaller_vocabulary_cuts_the_tables_and_a_larger_one_is_told() {
        let folder = ranks("vocabulary", &config().replace("88", "87"));
        let config = config_of(&Folder::Disk(folder.clone())).unwrap();
        assert_eq!(config.vocab_size, 87);
        assert!(super::read(&Folder::Disk(folder.clone()), &LoadOptions::default(), &Device::flex()).is_ok());
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap().replace("87", "89");
        std::fs::write(folder.join("config.json"), text).unwrap();
        let message = run(&folder, &BTreeMap::new()).unwrap_err().to_string();
        assert!(message.contains("`word_embeds.weight` has 88 rows"), "{message}");
        std::fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""do_dim_trick": true"#, "`do_dim_trick`"),
            (r#""relative_attention_num_buckets": 2"#, "`relative_attention_num_buckets`"),
            (r#""num_layers": 1001"#, "`num_layers`: expected at most 1000 blocks"),
            (r#""decoder_start_token_id": 40"#, "`decoder_start_token_id`: expected a token, 0 to 39"),
        ] {
            let config = Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap();
            let message = parse(&config, 40).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let inputs = |extra: &[(&str, TensorData)]| {
            let mut inputs = read_tensors(&fixture().join("inputs.safetensors")).unwrap();
            inputs.extend(extra.iter().map(|(name, data)| (name.to_string(), data.clone())));
            inputs
        };
        let ones = |shape: [usize; 4]| TensorData::ones::<f32, _>(shape);
        let message = run(&fixture(), &BTreeMap::new()).unwrap_err().to_string();
        assert!(
            message.contains("`enc_input_ids` is missing") && message.contains("`dec_input_ids` is missing")
        );
        let wrong = inputs(&[
            ("dec_input_ids", TensorData::from([[1i64, 2]])),
            ("cross_attention_mask", ones([2, 3, 2, 40])),
            ("enc_attention_mask", ones([2, 1, 40, 39])),
        ]);
        let message = run(&fixture(), &wrong).unwrap_err().to_string();
        for named in [
            "`dec_input_ids` has 1 rows, `enc_input_ids` 2",
            "`enc_attention_mask` is [2, 1, 40, 39], expected [2, 1, 40, 40]",
            "`dec_attention_mask` is [2, 1, 9, 9], expected [2, 1, 2, 2]",
            "`cross_attention_mask` is [2, 3, 2, 40], expected [2, 1, 2, 40]",
        ] {
            assert!(message.contains(named), "{message}");
        }
        // masks of one row and of every head are for all; without masks all is seen but the future
        let all = inputs(&[
            ("enc_attention_mask", ones([1, 1, 40, 40])),
            ("dec_attention_mask", ones([2, 4, 9, 9])),
            ("cross_attention_mask", ones([1, 4, 9, 40])),
        ]);
        let bare: BTreeMap<_, _> = all
            .iter()
            .filter(|(name, _)| name.ends_with("ids"))
            .map(|(name, data)| (name.clone(), data.clone()))
            .collect();
        let [all, bare] = [all, bare].map(|inputs| run(&fixture(), &inputs).unwrap());
        assert_eq!(all["greedy.tokens"], bare["greedy.tokens"]);
        bare["lm_logits"].assert_approx_eq::<f32>(&all["lm_logits"], Tolerance::absolute(1e-5));
        assert_eq!(bare["encoder_last_hidden_state_row1"].shape().as_slice(), [1, 40, 32]);
        // a row of which nothing is seen
        let none = inputs(&[("enc_attention_mask", TensorData::zeros::<f32, _>([1, 1, 40, 40]))]);
        let none = run(&fixture(), &none).unwrap();
        assert!(!none.contains_key("encoder_last_hidden_state_row0"));
        assert!(none["lm_logits"].iter::<f32>().all(f32::is_finite));
    }

    /// Vectors take the places of ids below 0, wherever these are.
    #[test]
    fn a_prompt_is_read_in_place_of_tokens() {
        let device = Device::flex();
        let tokens = &TINY.init(&device).encoder.tokens;
        let row = |ids: i64| tokens.forward(Tensor::from_data([[ids]], &device)).into_data();
        let prompt = Prompt::new(3, PromptStart::Tokens { text: &[7, 8], rest: 9 }, tokens);
        let read = prompt.before(ids([[5, 6], [4, 4]], &device));
        let places: Vec<i64> = read.clone().into_data().convert::<i64>().iter::<i64>().collect();
        assert_eq!(places, [-1, -2, -3, 5, 6, -1, -2, -3, 4, 4]);
        let x = prompt.embed(read, tokens);
        for (place, token) in [7, 8, 9, 5, 6].into_iter().enumerate() {
            assert_eq!(x.clone().slice([0..1, place..place + 1]).into_data(), row(token));
        }
        let middle = prompt.embed(ids([[5, -3, 6]], &device), tokens);
        assert_eq!(middle.narrow(1, 1, 1).into_data(), row(9));

        let real = Tensor::<2, Bool>::from_data([[true, true], [true, false]], &device);
        let real: Vec<bool> = prompt.mask_before(real).into_data().iter::<bool>().collect();
        assert_eq!(real, [true, true, true, true, true, true, true, true, true, false]);

        let table = Embedding::new(250, 4, 1.0, &device);
        let spread = Prompt::new(4, PromptStart::Spread { text: &[3] }, &table);
        let rows = Tensor::<1, Int>::from_ints([3, 100, 200, 50], &device);
        assert_eq!(spread.vectors.val().into_data(), table.weight.val().select(0, rows).into_data());
        let random = Prompt::new(Prompt::LENGTH, PromptStart::Random, &table);
        assert_eq!(random.vectors.val().dims(), [100, 4]);
    }

    /// A model reads a prompt that is the vectors of a text as it reads that text, and answers it.
    #[test]
    fn a_prompt_of_a_text_is_that_text() {
        let device = Device::flex();
        let model = TINY.init(&device);
        let prompt = Prompt::new(2, PromptStart::Tokens { text: &[7, 8], rest: 0 }, &model.encoder.tokens);
        let input = |read: Tensor<2, Int>| T5Input {
            ids: read,
            mask: Mask::Full,
            decoder_ids: ids([[1, 3]], &device),
            decoder_mask: Mask::Full,
            cross_mask: Mask::Full,
        };
        let expected = model.forward(input(ids([[7, 8, 5, 6]], &device)));
        let answer = greedy(&mut model.session(&[[7, 8, 5, 6]], 1, 5), 5);
        let prompted = Prompted::new(model, prompt);
        let read = prompted.prompt.before(ids([[5, 6]], &device));
        let found = prompted.forward(input(read.clone()));
        assert_eq!(found.encoder.into_data(), expected.encoder.into_data());
        assert_eq!(found.decoder.into_data(), expected.decoder.into_data());
        let x = prompted.prompt.embed(read, &prompted.model.encoder.tokens);
        assert_eq!(greedy(&mut prompted.model.session_of(x, Mask::Full, None, 1, 5), 5), answer);

        let file =
            std::env::temp_dir().join(format!("volary-cpm2-prompt-{}.safetensors", std::process::id()));
        save(&prompted.prompt, &PROMPT_KEYS, None, &file, None).unwrap();
        assert_eq!(open(&file).unwrap().entries()[0].name, "encoder.prompt_embeds.weight");
        std::fs::remove_file(&file).unwrap();
    }

    /// An untrained model that is frozen is taught by the vectors to answer two texts a little more as it should (by 0.17
    /// to 0.72 nats over a dozen seeds), and nothing else changes.
    #[cfg(feature = "train")]
    #[test]
    fn prompt_tuning_changes_the_vectors_alone_and_lowers_the_loss() {
        use burn::optim::{AdamWConfig, GradientsParams};

        let device = Device::flex().autodiff();
        device.seed(1);
        let model = TINY.init(&device);
        let prompt = Prompt::new(5, PromptStart::Spread { text: &[] }, &model.encoder.tokens);
        let mut prompted = Prompted::new(model, prompt);
        let values = |prompted: &Prompted| {
            let file =
                std::env::temp_dir().join(format!("volary-cpm2-tuned-{}.safetensors", std::process::id()));
            save(prompted, &PROMPTED_KEYS, None, &file, None).unwrap();
            let values = read_tensors(&file).unwrap();
            std::fs::remove_file(&file).unwrap();
            values
        };
        let before = values(&prompted);
        let loss_of = |prompted: &Prompted| {
            let states = prompted.forward(T5Input {
                ids: prompted.prompt.before(ids([[20, 21, 22], [20, 23, 22]], &device)),
                mask: Mask::Full,
                decoder_ids: ids([[1, 30], [1, 31]], &device),
                decoder_mask: Mask::Full,
                cross_mask: Mask::Full,
            });
            let labels = ids([[30, 2], [31, 2]], &device);
            causal::token_loss(prompted.model.logits(states.decoder), labels, None).unwrap()
        };
        let mut optimizer = AdamWConfig::new().with_weight_decay(0.1).init();
        let mut losses = Vec::new();
        for _ in 0..30 {
            let loss = loss_of(&prompted);
            losses.push(loss.clone().into_scalar::<f32>());
            let gradients = GradientsParams::from_grads(loss.backward(), &prompted);
            assert_eq!(gradients.len(), 1);
            prompted = optimizer.step(1.0, prompted, gradients);
        }
        assert!(losses[29] < losses[0] - 0.1, "{losses:?}");
        for (key, value) in values(&prompted) {
            assert_eq!(value != before[&key], key == "encoder.prompt_embeds.weight", "{key}");
        }
    }
}
