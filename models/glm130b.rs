//! GLM-130B: a bilingual language model that fills blanks (Zeng et al. 2022, "GLM-130B: An Open Bilingual Pre-trained
//! Model", <https://arxiv.org/abs/2210.02414>). Its authors give the weights to those who apply.
//!
//! Other than in [GLM](crate::glm), positions turn queries and keys, the residual stream carries normalised states
//! (DeepNorm), the MLP is gated, and a text with blanks is read anew for each of them: what fills one takes its place
//! before the next is filled.
//!
//! The numbers match SwissArmyTransformer's `GLM130B` (0.4.12), in f32; those of checkpoints in 8 and 4 bits the formula of
//! the authors' `quantization/layers.py`. Tensor-parallel ranks are merged, quantized ones too.
//!
//! ```sh
//! volary forward path/to/glm-130b-sat --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_kernels::layers::{Embedding, GatedMlp, GatedMlpConfig, KvCache, LayerNorm, Linear, LinearConfig};
use volary_kernels::ops::{self, Activation, Mask, Pairing, Positions, Rope, RopeConfig, RopeScaling};
use volary_text::generate::{Appending, LeftPadded, Session, greedy, indices};
use volary_text::infill::{Blank, Blanks, Commands};
use volary_weights::format::{MegatronLayout, Merge, OpenOptions, RankOptions};
use volary_weights::{Bits, Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Split, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::glm;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Glm130bConfig {
    /// Rows of the token table, padding of the vocabulary included: every one has a score.
    pub vocab_size: usize,
    /// The longest text it was trained for.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
}

/// A model.
#[derive(Module, Debug)]
pub struct Glm130b {
    /// `[vocab_size, d_model]`; makes the scores as well.
    pub tokens: Embedding,
    /// The blocks.
    pub blocks: Vec<Glm130bBlock>,
    /// After the last one.
    pub norm: LayerNorm,
    #[module(skip)]
    rope: RopeConfig,
}

/// A transformer block with DeepNorm.
#[derive(Module, Debug)]
pub struct Glm130bBlock {
    /// Before the attention, and on what is added to it.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Glm130bAttention,
    /// Before the MLP, and on what is added to it.
    pub norm2: LayerNorm,
    /// Three projections.
    pub mlp: GatedMlp,
    /// √(2 n_layers): how much of the normalised states goes on.
    #[module(skip)]
    alpha: f64,
}

/// Multi-head attention with one projection for queries, keys and values.
#[derive(Module, Debug)]
pub struct Glm130bAttention {
    /// `[n_heads * 3 * d_head, d_model]`: head by head the query, the key and the value.
    pub qkv: Linear,
    /// `[d_model, d_model]`.
    pub output: Linear,
    #[module(skip)]
    n_heads: usize,
    /// The number of its block, from 1.
    #[module(skip)]
    layer: usize,
}

/// A batch of texts.
#[derive(Clone, Debug)]
pub struct Glm130bInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// Where the tokens stand.
    pub positions: Positions,
    /// What a token sees: [`Mask::Prefix`] over the text, causal over what follows it.
    pub mask: Mask,
}

/// Where the tokens of a pass stand, and which of them they see.
#[derive(Clone, Copy)]
struct Place<'a> {
    rope: &'a Rope,
    positions: &'a Positions,
    mask: &'a Mask,
}

impl Glm130bConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Glm130b {
        let Self { d_model, n_heads, .. } = *self;
        let norm = || LayerNorm::new(d_model, self.layer_norm_eps, device);
        let block = |block| Glm130bBlock {
            norm1: norm(),
            attention: Glm130bAttention {
                qkv: LinearConfig::new(d_model, 3 * d_model).init(device),
                output: LinearConfig::new(d_model, d_model).init(device),
                n_heads,
                layer: block + 1,
            },
            norm2: norm(),
            mlp: GatedMlpConfig::new(d_model, self.d_ff).init(device),
            alpha: (2.0 * self.n_layers as f64).sqrt(),
        };
        Glm130b {
            tokens: Embedding::new(self.vocab_size, d_model, 0.02, device),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: norm(),
            rope: RopeConfig {
                d_rot: d_model / n_heads,
                positions: self.n_positions,
                theta: self.rope_theta,
                pairing: Pairing::Half,
                scaling: RopeScaling::Unscaled,
            },
        }
    }
}

impl Glm130bAttention {
    fn forward(&self, x: Tensor<3>, place: Place, cache: Option<&mut KvCache>) -> Tensor<3> {
        let [batch, seq, d_model] = x.dims();
        let d_head = d_model / self.n_heads;
        let qkv = self.qkv.forward(x).reshape([batch, seq, self.n_heads, 3, d_head]);
        let part = |which| qkv.clone().narrow(3, which, 1).squeeze_dim::<4>(3).swap_dims(1, 2);
        let query = place.rope.apply(part(0), place.positions); // [batch, n_heads, seq, d_head]
        let key = place.rope.apply(part(1), place.positions);
        let (key, value) = match cache {
            Some(cache) => cache.append(key, part(2)), // [batch, n_heads, past + seq, d_head]
            None => (key, part(2)),
        };
        // Over the layer and times it: the products of half precision stay small, the scores are the same.
        let layer = self.layer as f64;
        let scale = layer / (d_head as f64).sqrt();
        let x = ops::attention(query / layer, key, value, place.mask, Some(scale));
        self.output.forward(x.swap_dims(1, 2).reshape([batch, seq, d_model]))
    }
}

impl Glm130bBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, after the tokens that `cache` holds, if there is one.
    fn forward(&self, x: Tensor<3>, place: Place, cache: Option<&mut KvCache>) -> Tensor<3> {
        let x = self.norm1.forward(x);
        let x = self.norm2.of_sum(x.clone() * self.alpha, self.attention.forward(x, place, cache));
        x.clone() * self.alpha + self.mlp.forward(x, Activation::Gelu)
    }
}

impl Glm130b {
    /// The states of a batch of texts, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: Glm130bInput) -> Tensor<3> {
        let [_, seq] = input.ids.dims();
        let end = match &input.positions {
            Positions::From(first) => first + seq,
            Positions::Each(each) => each.clone().max().into_scalar::<i64>() as usize + 1,
        };
        let rope = self.rope(end, &input.ids.device());
        let place = Place { rope: &rope, positions: &input.positions, mask: &input.mask };
        let x = self.tokens.forward(input.ids); // [batch, seq, d_model]
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, place, None));
        self.norm.forward(x)
    }

    /// Scores of the next token: `[batch, seq, d_model] -> [batch, seq, vocab_size]`.
    pub fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.tokens.scores(states)
    }

    /// Texts that go on, each by at most `max_new` tokens.
    ///
    /// # Panics
    /// If there is no text, one is empty, or an id is outside the vocabulary.
    pub fn session(&self, texts: &[Text], max_new: usize) -> Glm130bSession<'_> {
        let device = self.tokens.weight.device();
        let prompts = LeftPadded::new(texts, &device);
        let capacity = prompts.longest() + max_new;
        Glm130bSession {
            model: self,
            prompts,
            texts: texts.to_vec(),
            rope: self.rope(capacity, &device),
            caches: self.blocks.iter().map(|_| KvCache::new(capacity)).collect(),
        }
    }

    fn rope(&self, positions: usize, device: &Device) -> Rope {
        RopeConfig { positions, ..self.rope.clone() }.init(device)
    }
}

/// A text as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    ids: Vec<u32>,
    /// How many tokens it has that all see each other.
    context: usize,
    /// The blank whose position all tokens have that come after the context; without one, positions count on.
    blank: Option<usize>,
}

impl Text {
    /// One that goes on after its end.
    pub fn new(ids: Vec<u32>) -> Self {
        Self { context: ids.len(), ids, blank: None }
    }

    /// One whose next blank is to be filled, the blanks before it replaced by what fills them. Without an open blank, one
    /// that goes on after its end.
    ///
    /// What fills a `[MASK]` has its position; what fills another blank is counted on from the end of the text.
    pub fn of(text: &Blanks, commands: &Commands) -> Self {
        let (mut ids, at) = text.written();
        let context = ids.len();
        let Some((_, blank)) = text.next() else { return Self::new(ids) };
        ids.push(commands.start);
        Self { ids, context, blank: at.filter(|_| blank == Blank::Span) }
    }

    /// The position of a token of the text, or of what is written after it.
    fn position(&self, token: usize) -> usize {
        self.blank.filter(|_| token >= self.context).unwrap_or(token)
    }
}

impl AsRef<[u32]> for Text {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

/// Texts that a model is continuing.
pub struct Glm130bSession<'a> {
    model: &'a Glm130b,
    prompts: LeftPadded,
    /// In the order that was selected last.
    texts: Vec<Text>,
    rope: Rope,
    caches: Vec<KvCache>,
}

impl Appending for Glm130bSession<'_> {
    fn prompts(&self) -> &LeftPadded {
        &self.prompts
    }

    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [rows, new] = ids.dims();
        let held = self.caches.first().map_or(0, KvCache::len);
        let texts = || self.texts.iter().zip(self.prompts.padding());
        let places: Vec<i64> = texts()
            .flat_map(|(text, &padding)| {
                let place =
                    move |column: usize| column.checked_sub(padding).map_or(0, |at| text.position(at));
                (held..held + new).map(move |column| place(column) as i64)
            })
            .collect();
        let places = Tensor::from_data(TensorData::new(places, [rows, new]), &ids.device());
        let context = texts().map(|(text, padding)| padding + text.context).collect();
        let mask = Mask::All(vec![Mask::Prefix(context), self.prompts.mask(held + new)]);
        let place = Place { rope: &self.rope, positions: &Positions::Each(places), mask: &mask };
        let layers = self.model.blocks.iter().zip(&mut self.caches);
        let x = self.model.tokens.forward(ids); // [rows, new, d_model]
        let x = layers.fold(x, |x, (block, cache)| block.forward(x, place, Some(cache)));
        self.model.norm.forward(x)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.model.logits(states)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.prompts.select(rows);
        self.texts = rows.iter().map(|&row| self.texts[row].clone()).collect();
        let rows = indices(rows, &self.model.tokens.weight.device());
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

impl Glm130bConfig {
    /// The configuration of a folder, and how many bits its matrices have if they are quantized.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Option<Bits>), Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` with the arguments of SwissArmyTransformer; what it leaves out has the values of GLM-130B. With them
    /// comes how many bits the matrices have if they are quantized.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<(Self, Option<Bits>), ConfigError> {
        config.only("layernorm_order", &["\"post\""])?;
        config.only("position_encoding_2d", &["false"])?;
        config.only("no_glu", &["false"])?;
        let bits = match config.integer_or("quantization_bit_width", 0)? {
            0 => None,
            8 => Some(Bits::Eight),
            4 => Some(Bits::Four),
            _ => return Err(config.error("quantization_bit_width", "4 or 8")),
        };
        let d_model = config.size_or("hidden_size", 12288)?;
        let n_heads = config.size_or("num_attention_heads", 96)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        let d_head = d_model / n_heads;
        if !d_head.is_multiple_of(2) || d_head > 65536 {
            return Err(config.error("num_attention_heads", "heads of an even width, at most 65536"));
        }
        let rope_theta = config.number_or("rotary_base", 10000.0)?;
        if rope_theta <= 0.0 {
            return Err(config.error("rotary_base", "a number above 0"));
        }
        let config = Self {
            vocab_size: config.size_or("vocab_size", 150_528)?,
            n_positions: config.size_or("max_sequence_length", 2048)?,
            d_model,
            d_ff: config.size_or("inner_hidden_size", 32768)?,
            n_layers: config.blocks_or("num_layers", 70)?,
            n_heads,
            layer_norm_eps: config.number_or("layernorm_epsilon", 1e-5)?,
            rope_theta,
        };
        Ok((config, bits))
    }
}

const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

const BLOCK: &[Rule] = &[
    Under("input_layernorm.", "norm1.", LINEAR),
    Under("attention.query_key_value.", "attention.qkv.", LINEAR),
    Under("attention.dense.", "attention.output.", LINEAR),
    Ignore("attention.rotary_emb.inv_freq"),
    Under("post_attention_layernorm.", "norm2.", LINEAR),
    Split("mlp.dense_h_to_4h.weight", &["mlp.up.weight", "mlp.gate.weight"]),
    Split("mlp.dense_h_to_4h.bias", &["mlp.up.bias", "mlp.gate.bias"]),
    Under("mlp.dense_4h_to_h.", "mlp.down.", LINEAR),
];

/// Keys of SwissArmyTransformer.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("transformer.word_embeddings.weight", "tokens.weight"),
    Under("transformer.layers.{}.", "blocks.{}.", BLOCK),
    Under("transformer.final_layernorm.", "norm.", LINEAR),
]);

/// How the parts that tensor-parallel ranks hold make a tensor: each has heads of its own, and a part of either half of
/// the gated layer.
pub const RANKS: MegatronLayout = MegatronLayout {
    merges: &[
        ("transformer.word_embeddings.weight", Merge::Vocabulary),
        ("transformer.layers.{}.input_layernorm.weight", Merge::Replicated),
        ("transformer.layers.{}.input_layernorm.bias", Merge::Replicated),
        ("transformer.layers.{}.attention.query_key_value.weight", Merge::Column),
        ("transformer.layers.{}.attention.query_key_value.bias", Merge::Column),
        ("transformer.layers.{}.attention.dense.weight", Merge::Row),
        ("transformer.layers.{}.attention.dense.bias", Merge::Replicated),
        ("transformer.layers.{}.attention.rotary_emb.inv_freq", Merge::Replicated),
        ("transformer.layers.{}.post_attention_layernorm.weight", Merge::Replicated),
        ("transformer.layers.{}.post_attention_layernorm.bias", Merge::Replicated),
        ("transformer.layers.{}.mlp.dense_h_to_4h.weight", Merge::Fused(2)),
        ("transformer.layers.{}.mlp.dense_h_to_4h.bias", Merge::Fused(2)),
        ("transformer.layers.{}.mlp.dense_4h_to_h.weight", Merge::Row),
        ("transformer.layers.{}.mlp.dense_4h_to_h.bias", Merge::Replicated),
        ("transformer.final_layernorm.weight", Merge::Replicated),
        ("transformer.final_layernorm.bias", Merge::Replicated),
    ],
};

/// The weights of a folder, ranks merged, with matrices of so many bits worked out.
///
/// # Errors
/// If there are none, or they are broken.
pub fn checkpoint(
    folder: &Folder,
    config: &Glm130bConfig,
    bits: Option<Bits>,
) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions { vocab_size: Some(config.vocab_size), ..RankOptions::new(RANKS) };
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), scaled: bits, ..OpenOptions::default() })
}

/// GLM-130B as the registry knows it.
pub const SYSTEM: System = System {
    name: "glm130b",
    about: "the bilingual language model GLM-130B, which fills blanks",
    file: "models/glm130b.rs",
    tasks: &["fill", "generate", "forward"],
    proved: &["glm130b", "glm130b_int8", "glm130b_int4"],
    presets: PRESETS,
    recognises: |_, config| {
        let family = config.and_then(|config| config.text("model_type"));
        family.is_some_and(|family| ["glm130b", "glm-130b"].contains(&family))
    },
    checkpoint: |folder| {
        let (config, bits) = Glm130bConfig::of(folder)?;
        checkpoint(folder, &config, bits)
    },
    describe: |folder| {
        let (config, bits) = Glm130bConfig::of(folder)?;
        describe_with(checkpoint(folder, &config, bits)?.as_ref(), &config.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(|folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?))),
};

/// How many tokens the forward contract decodes greedily.
const GREEDY: usize = 12;

/// A model behind the forward contract, and one that writes.
struct Runner {
    model: Glm130b,
    config: Glm130bConfig,
    /// If the folder says what they are.
    commands: Option<Commands>,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let (config, bits) = Glm130bConfig::of(folder)?;
        let checkpoint = checkpoint(folder, &config, bits)?;
        let model = load(config.init(device), checkpoint.as_ref(), &KEYS, options)?;
        // nothing stands before a text
        let commands = glm::commands(folder, config.vocab_size)?;
        let commands = commands.map(|commands| Commands { first: None, ..commands });
        Ok(Self { model, config, commands })
    }

    /// The batch of the case that the inputs are at.
    fn case(&self, inputs: &mut Inputs) -> Option<Glm130bInput> {
        let Glm130bConfig { vocab_size, n_positions, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let positions = inputs.ids::<2>("position_ids", n_positions);
        let context = inputs.list("sep", usize::MAX >> 1);
        let hidden = inputs.truths::<4>("attention_mask_true_is_hidden");
        let ids = ids?;
        let [batch, seq] = ids.dims();
        inputs.row_or_like_ids("position_ids", positions.as_ref().map(Tensor::dims), ids.dims());
        let context = inputs.each_row("sep", context.unwrap_or_else(|| vec![0]), batch)?;
        let mask = match hidden {
            None => Mask::Prefix(context.into_iter().map(|tokens| tokens.min(seq)).collect()),
            Some(hidden) => {
                let dims = hidden.dims();
                if !dims.iter().zip([batch, self.config.n_heads, seq, seq]).all(|(&a, b)| a == b || a == 1) {
                    let name = inputs.full("attention_mask_true_is_hidden");
                    inputs.problem(format!("`{name}` is {dims:?}, expected [{batch}, 1, {seq}, {seq}]"));
                    return None;
                }
                Mask::Visible(hidden.bool_not())
            }
        };
        Some(Glm130bInput { ids, positions: positions.map_or(Positions::From(0), Positions::Each), mask })
    }

    /// The text to be continued, of the case that the inputs are at.
    fn prompt(&self, inputs: &mut Inputs) -> Option<Text> {
        let ids = inputs.ids::<2>("context_ids", self.config.vocab_size)?;
        let [rows, _] = ids.dims();
        if rows != 1 {
            let name = inputs.full("context_ids");
            inputs.problem(format!("`{name}` has {rows} rows, expected 1"));
        }
        Some(Text::new(ids.into_data().convert::<i64>().iter::<i64>().map(|id| id as u32).collect()))
    }
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `position_ids` and either `sep` (one number, or one for each row: how many tokens all
    /// see) or `attention_mask_true_is_hidden` (`[batch, 1, seq, seq]`), which counts if both are there; `context_ids`, a
    /// text that goes on. Any of them may have the name of a case before it.
    ///
    /// Gives `logits`; and of a context, decoded greedily without a stop, the twelve `tokens` after it.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let (mut cases, mut prompts) = (Vec::new(), Vec::new());
        for name in inputs.cases("input_ids") {
            inputs.enter(&name);
            cases.extend(self.case(&mut inputs).map(|case| (name, case)));
        }
        for name in inputs.cases("context_ids") {
            inputs.enter(&name);
            prompts.extend(self.prompt(&mut inputs).map(|text| (name, text)));
        }
        inputs.needed(&["input_ids", "context_ids"]);
        inputs.finish()?;

        let mut outputs = Outputs::new();
        for (name, input) in cases {
            let logits = self.model.logits(self.model.forward(input));
            outputs.push(output(&format!("{name}logits"), logits));
        }
        for (name, text) in prompts {
            let tokens = greedy(&mut self.model.session(&[text], GREEDY), GREEDY);
            let tokens: Vec<i64> = tokens.into_iter().flatten().map(i64::from).collect();
            outputs.push((format!("{name}tokens"), TensorData::new(tokens, [GREEDY])));
        }
        Ok(outputs)
    }
}

impl Generator for Runner {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn context(&self) -> Option<usize> {
        Some(self.config.n_positions)
    }

    /// What is written fills the first blank of a prompt, or one put at its end; where the folder does not say which
    /// tokens are blanks, it follows the prompt.
    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        let text = |prompt: &Vec<u32>| {
            let commands = self.commands.as_ref()?;
            Some(Text::of(&Blanks::or_appended(prompt.clone(), commands)?, commands))
        };
        let texts: Vec<Text> =
            prompts.iter().map(|prompt| text(prompt).unwrap_or_else(|| Text::new(prompt.clone()))).collect();
        Ok(Box::new(self.model.session(&texts, max_new)))
    }

    fn commands(&self) -> Option<&Commands> {
        self.commands.as_ref()
    }

    fn fill<'a>(&'a self, texts: &[Blanks], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        let commands =
            self.commands.as_ref().ok_or(Error::Task { system: SYSTEM.name, task: glm::NO_COMMANDS })?;
        let texts: Vec<Text> = texts.iter().map(|text| Text::of(text, commands)).collect();
        let rows: Vec<Vec<u32>> = texts.iter().map(|text| text.ids.clone()).collect();
        check_prompts(self, &rows, max_new)?;
        Ok(Box::new(self.model.session(&texts, max_new)))
    }
}

/// The paper's table 11.
const B130: Glm130bConfig = Glm130bConfig {
    vocab_size: 150_528,
    n_positions: 2048,
    d_model: 12288,
    d_ff: 32768,
    n_layers: 70,
    n_heads: 96,
    layer_norm_eps: 1e-5,
    rope_theta: 10000.0,
};

/// The one published size.
pub const PRESETS: &[Preset] = &[Preset {
    name: "GLM-130B",
    shape: Shape::Glm130b(B130),
    weights: Weights::Application,
    license: "GLM-130B License",
    parameters: 128_697_794_560,
    source: "GLM130B of SwissArmyTransformer 0.4.12",
}];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::Tolerance;
    use burn::tensor::activation::log_softmax;
    use volary_text::infill::{fill, likelihoods};
    use volary_weights::{parameters, read_tensors};

    use super::*;

    const TINY: Glm130bConfig = Glm130bConfig {
        vocab_size: 50,
        n_positions: 32,
        d_model: 12,
        d_ff: 20,
        n_layers: 3,
        n_heads: 3,
        ..B130
    };
    const COMMANDS: Commands = Commands {
        span: Some(40),
        sentence: None,
        document: Some(42),
        start: 43,
        end: 44,
        first: None,
        last: Some(46),
    };

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn ids(rows: &[&[i64]]) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(rows.concat(), [rows.len(), rows[0].len()]), &Device::flex())
    }

    fn run(folder: &Path, inputs: &BTreeMap<String, TensorData>) -> Result<Outputs, Error> {
        let folder = Folder::Disk(folder.to_owned());
        crate::registry::forward(&folder, inputs, &LoadOptions::default(), &Device::flex())
    }

    /// The whole of a text at once, and what is written after it: scores of what follows.
    fn whole(model: &Glm130b, text: &Text, written: &[u32]) -> Tensor<2> {
        let tokens: Vec<i64> = text.ids.iter().chain(written).map(|&id| i64::from(id)).collect();
        let places: Vec<i64> = (0..tokens.len()).map(|token| text.position(token) as i64).collect();
        let states = model.forward(Glm130bInput {
            ids: ids(&[&tokens]),
            positions: Positions::Each(ids(&[&places])),
            mask: Mask::Prefix(vec![text.context]),
        });
        model.logits(states.narrow(1, tokens.len() - 1, 1)).squeeze_dim(1)
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_leads_back_to_it() {
        for parameter in parameters(&TINY.init(&Device::flex())) {
            let found = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(found.len(), 1, "{}", parameter.path);
            assert!(KEYS.paths(&found[0]).unwrap().contains(&parameter.path));
        }
        // the half that goes through the activation is the second
        let halves = KEYS.paths("transformer.layers.7.mlp.dense_h_to_4h.weight").unwrap();
        assert_eq!(halves, ["blocks.7.mlp.up.weight", "blocks.7.mlp.gate.weight"]);
    }

    /// The authors' folder of an iteration, beside the configuration.
    #[test]
    fn ranks_are_read_as_the_whole_is() {
        let inputs = read_tensors(&fixture("glm130b").join("inputs.safetensors")).unwrap();
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("49300")).unwrap();
        for file in ["config.json", "49300/mp_rank_00_model_states.pt"] {
            std::fs::copy(fixture("glm130b").join(file), folder.path().join(file)).unwrap();
        }
        assert_eq!(run(folder.path(), &inputs).unwrap(), run(&fixture("glm130b"), &inputs).unwrap());
    }

    /// Numbers taken for those of another width make matrices of another shape, and a file without a width named would
    /// give whole numbers for weights.
    #[test]
    fn the_width_of_numbers_has_to_be_named() {
        let config = std::fs::read_to_string(fixture("glm130b_int4").join("config.json")).unwrap();
        for (width, named) in [("8", "[32, 16]"), ("0", "weight_scale")] {
            let folder = tempfile::tempdir().unwrap();
            let file = "model.safetensors";
            std::fs::copy(fixture("glm130b_int4").join(file), folder.path().join(file)).unwrap();
            let wrong = config.replace("_width\": 4", &format!("_width\": {width}"));
            std::fs::write(folder.path().join("config.json"), wrong).unwrap();
            let message = run(folder.path(), &BTreeMap::new()).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    /// The text with a mask or with the number of tokens that it is made of.
    #[test]
    fn a_mask_says_what_the_number_of_tokens_says() {
        let mut inputs = read_tensors(&fixture("glm130b").join("inputs.safetensors")).unwrap();
        inputs.remove("greedy.context_ids");
        let both = run(&fixture("glm130b"), &inputs).unwrap();
        let mut one = inputs.clone();
        one.remove("sep");
        assert_eq!(run(&fixture("glm130b"), &one).unwrap(), both);
        inputs.remove("attention_mask_true_is_hidden");
        assert_eq!(run(&fixture("glm130b"), &inputs).unwrap(), both);
    }

    /// What fills a `[MASK]` has its position; what fills another blank is counted on.
    #[test]
    fn a_text_is_read_anew_for_every_blank() {
        let mut blanks = Blanks::new(vec![7, 40, 8, 42], &COMMANDS).unwrap();
        let text = Text::of(&blanks, &COMMANDS);
        assert_eq!(text, Text { ids: vec![7, 40, 8, 42, 43], context: 4, blank: Some(1) });
        assert_eq!([3, 4, 5].map(|token| text.position(token)), [3, 1, 1]);
        blanks.fill(vec![20, 21, 22]);
        let text = Text::of(&blanks, &COMMANDS);
        assert_eq!(text, Text { ids: vec![7, 20, 21, 22, 8, 42, 43], context: 6, blank: None });
        assert_eq!([5, 6, 7].map(|token| text.position(token)), [5, 6, 7]);
        blanks.fill(vec![9]);
        assert_eq!(Text::of(&blanks, &COMMANDS), Text::new(vec![7, 20, 21, 22, 8, 9]));
    }

    /// Cached or not, alone or in a batch of several lengths and kinds.
    #[test]
    fn what_is_written_with_caches_is_what_the_whole_text_says() {
        let folder = Folder::Disk(fixture("glm130b"));
        let Runner { model, .. } = Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
        let texts = [
            Text::new(vec![16, 54, 7]),
            Text::of(&Blanks::new(vec![7, 40, 8, 9, 13], &COMMANDS).unwrap(), &COMMANDS),
            Text::of(&Blanks::new(vec![3, 42], &COMMANDS).unwrap(), &COMMANDS),
        ];
        let together = greedy(&mut model.session(&texts, 6), 6);
        for (text, together) in texts.iter().zip(together) {
            let mut written = Vec::new();
            for _ in 0..6 {
                written.push(whole(&model, text, &written).argmax(1).into_scalar::<i64>() as u32);
            }
            assert_eq!(written, together);
        }
    }

    #[test]
    fn a_session_goes_on_from_selected_rows() {
        let model = TINY.init(&Device::flex());
        let texts =
            [Text::of(&Blanks::new(vec![3, 40, 5], &COMMANDS).unwrap(), &COMMANDS), Text::new(vec![6])];
        let mut session = model.session(&texts, 3);
        session.start();
        session.read(&[7, 8]);
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (row, (text, written)) in [(1, [8, 9]), (0, [7, 9]), (1, [8, 10])].into_iter().enumerate() {
            let alone = whole(&model, &texts[text], &written).into_data();
            let chosen = chosen.clone().narrow(0, row, 1).into_data();
            chosen.assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-4));
        }
    }

    /// Read at once or one by one, in rows of several lengths and kinds.
    #[test]
    fn candidates_for_a_blank_are_scored() {
        let model = TINY.init(&Device::flex());
        let texts =
            [Text::of(&Blanks::new(vec![3, 40, 5], &COMMANDS).unwrap(), &COMMANDS), Text::new(vec![6])];
        let candidates = [vec![7, 8, 9], vec![10, 11, 12]];
        let found = likelihoods(&mut model.session(&texts, 3), &candidates).unwrap();
        for ((found, candidate), text) in found.into_iter().zip(&candidates).zip(&texts) {
            let mut expected = 0.0;
            for (step, &token) in candidate.iter().enumerate() {
                let chances = log_softmax(whole(&model, text, &candidate[..step]), 1);
                expected += chances.narrow(1, token as usize, 1).into_scalar::<f64>();
            }
            assert!((found.sum - expected).abs() < 1e-4, "{found:?}, expected {expected}");
        }
    }

    #[test]
    fn the_past_ignores_the_future_and_a_text_sees_all_of_itself() {
        let model = TINY.init(&Device::flex());
        let states = |tokens: [i64; 5]| {
            let mask = Mask::Prefix(vec![3]);
            model.forward(Glm130bInput { ids: ids(&[&tokens]), positions: Positions::From(0), mask })
        };
        let apart = |a: &Tensor<3>, b: &Tensor<3>, first: usize, count: usize| {
            let of = |x: &Tensor<3>| x.clone().narrow(1, first, count);
            (of(a) - of(b)).abs().max().into_scalar::<f32>()
        };
        let base = states([3, 4, 5, 6, 7]);
        let later = states([3, 4, 5, 6, 9]);
        assert!(apart(&base, &later, 0, 4) < 1e-5 && apart(&base, &later, 4, 1) > 1e-3);
        assert!(apart(&base, &states([3, 4, 8, 6, 7]), 0, 1) > 1e-4);
    }

    /// Over the layer and times it: no score changes.
    #[test]
    fn the_layer_of_an_attention_changes_no_number() {
        let model = TINY.init(&Device::flex());
        let rope = model.rope(4, &Device::flex());
        let place = Place { rope: &rope, positions: &Positions::From(0), mask: &Mask::Prefix(vec![2]) };
        let x = model.tokens.forward(ids(&[&[3, 4, 5, 6]])) * 50.0;
        let attend = |layer| {
            let attention = Glm130bAttention { layer, ..model.blocks[0].attention.clone() };
            attention.forward(x.clone(), place, None).into_data()
        };
        attend(70).assert_approx_eq::<f32>(&attend(1), Tolerance::absolute(1e-5));
    }

    #[test]
    fn several_blanks_are_filled_in_order() {
        let model = TINY.init(&Device::flex());
        let mut blanks = Blanks::new(vec![3, 40, 5, 42], &COMMANDS).unwrap();
        let write = |blanks: &Blanks| {
            Ok::<_, ()>(greedy(&mut model.session(&[Text::of(blanks, &COMMANDS)], 3), 3).remove(0))
        };
        fill(&mut blanks, write).unwrap();
        let spans: Vec<_> = blanks.filled().map(|(_, span)| span.to_vec()).collect();
        let second = Text { ids: [&[3], &spans[0][..], &[5, 42, 43]].concat(), context: 6, blank: None };
        for step in 0..3 {
            let scores = whole(&model, &second, &spans[1][..step]);
            assert_eq!(scores.argmax(1).into_scalar::<i64>() as u32, spans[1][step]);
        }
    }

    /// A folder that does not say which tokens are blanks goes on after its prompts.
    #[test]
    fn the_generator_fills_blanks_where_it_knows_them() {
        let folder = tempfile::tempdir().unwrap();
        let file = "model.safetensors";
        std::fs::copy(fixture("glm130b").join(file), folder.path().join(file)).unwrap();
        let config = std::fs::read_to_string(fixture("glm130b").join("config.json")).unwrap();
        let open = |config: &str| {
            std::fs::write(folder.path().join("config.json"), config).unwrap();
            let folder = Folder::Disk(folder.path().to_owned());
            Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap()
        };
        let first = |runner: &Runner, prompt: &[u32]| {
            Generator::session(runner, &[prompt.to_vec()], 1).unwrap().start().into_data()
        };
        let plain = open(&config);
        let expected = whole(&plain.model, &Text::new(vec![16, 54]), &[]).into_data();
        first(&plain, &[16, 54]).assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-4));
        assert!(plain.commands().is_none());
        let blanks = Blanks::new(vec![16, 40], &COMMANDS).unwrap();
        assert!(plain.fill(std::slice::from_ref(&blanks), 1).is_err());

        let tokens =
            r#"{"command_tokens": {"MASK": 40, "gMASK": 42, "sop": 43, "eop": 44, "ENC": 45, "eos": 46},"#;
        let steered = open(&config.replacen('{', tokens, 1));
        assert_eq!(steered.commands(), Some(&COMMANDS));
        let text = Text { ids: vec![16, 54, 42, 43], context: 3, blank: None };
        let expected = whole(&steered.model, &text, &[]).into_data();
        first(&steered, &[16, 54]).assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-4));
        assert!(steered.fill(&[blanks], 1).is_ok());
        let message = Generator::session(&steered, &[vec![5; 40], vec![96]], 2).err().unwrap().to_string();
        assert!(
            message.contains("prompt 0 has 40 tokens") && message.contains("prompt 1 holds 96"),
            "{message}"
        );
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let data = |rows: &[&[i64]]| ids(rows).into_data();
        for (inputs, named) in [
            (vec![], &["`input_ids` is missing"][..]),
            (
                vec![
                    ("input_ids", data(&[&[3, 96]])),
                    ("a.input_ids", data(&[&[3, 4]])),
                    ("a.position_ids", data(&[&[0, 32]])),
                    ("a.sep", TensorData::from([1i64, 2])),
                    ("b.input_ids", data(&[&[3, 4]])),
                    ("b.attention_mask_true_is_hidden", TensorData::from([[[[0i64, 1, 1]]]])),
                    ("c.context_ids", data(&[&[3], &[4]])),
                    ("labels", data(&[&[3]])),
                ],
                &[
                    "`input_ids` holds 96, expected 0 to 95",
                    "`a.position_ids` holds 32, expected 0 to 31",
                    "`a.sep` has 2 numbers, expected one, or one for each of 1 rows",
                    "`b.attention_mask_true_is_hidden` is [1, 1, 1, 3], expected [1, 1, 2, 2]",
                    "`c.context_ids` has 2 rows, expected 1",
                    "`labels` is not one of",
                ],
            ),
        ] {
            let inputs: BTreeMap<_, _> =
                inputs.into_iter().map(|(name, data)| (name.to_string(), data)).collect();
            let message = run(&fixture("glm130b"), &inputs).unwrap_err().to_string();
            for part in named {
                assert!(message.contains(part), "{part}: {message}");
            }
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""layernorm_order": "pre""#, "`layernorm_order`"),
            (r#""position_encoding_2d": true"#, "`position_encoding_2d`"),
            (r#""no_glu": true"#, "`no_glu`"),
            (r#""quantization_bit_width": 3"#, "`quantization_bit_width`: expected 4 or 8, found 3"),
            (r#""hidden_size": 30"#, "`num_attention_heads`: expected a divisor of 30"),
            (r#""hidden_size": 96"#, "`num_attention_heads`: expected heads of an even width"),
            (r#""rotary_base": 0"#, "`rotary_base`: expected a number above 0"),
            (r#""num_layers": 2000000000"#, "`num_layers`: expected at most 1000 blocks"),
        ] {
            let config = Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap();
            let message = Glm130bConfig::parse(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
