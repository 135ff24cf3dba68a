//! LLaMA: a causal text decoder (Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>), Llama 2 and 3
//! (<https://arxiv.org/abs/2307.09288>, <https://arxiv.org/abs/2407.21783>), and what others trained in its
//! shape: TinyLlama, and Aquila of BAAI ([`crate::aquila`]).
//!
//! The numbers match `transformers` (`LlamaForCausalLM`, `LlamaModel`), which reads Meta's uploads named `-hf` and those
//! from Llama 3 on. Meta's own files (`params.json`, `consolidated.00.pth`) are read too: [`original`].
//!
//! ```sh
//! volary forward path/to/TinyLlama-1.1B-Chat-v1.0 --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, GatedMlp, GatedMlpConfig, KvCache, Linear, LinearConfig, RmsNorm,
};
use volary_kernels::ops::{
    self, Activation, DynamicScaling, Llama3Scaling, Mask, Pairing, Positions, Rope, RopeConfig, RopeScaling,
    YarnScaling,
};
use volary_text::generate::{Appending, LeftPadded, Session, indices};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Under};

use crate::causal::{self, Head, next_token_loss};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

pub mod original;

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Longest sequence it was trained for. Longer ones run.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key-value heads; each serves as many query heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// The MLP's activation.
    pub activation: Activation,
    /// Whether the projections of the attention have a bias.
    pub attention_bias: bool,
    /// Whether those of the MLP have one.
    pub mlp_bias: bool,
    /// Added to mean squares.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How they are slowed for longer sequences.
    pub rope_scaling: RopeScaling,
    /// Which channels of a head turn together.
    pub pairing: Pairing,
    /// What makes scores of states.
    pub head: Head,
}

/// A decoder.
#[derive(Module, Debug)]
pub struct Llama {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// The blocks.
    pub blocks: Vec<LlamaBlock>,
    /// After the last one.
    pub norm: RmsNorm,
    /// `[vocab_size, d_model]`, unless the token table serves.
    pub head: Option<Linear>,
    #[module(skip)]
    rope: RopeConfig,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct LlamaBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Grouped-query self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: RmsNorm,
    /// Three projections.
    pub mlp: GatedMlp,
    #[module(skip)]
    activation: Activation,
}

/// A batch of texts. Whole ones of equal length are `ids.into()`.
#[derive(Clone, Debug)]
pub struct LlamaInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// Where the tokens stand.
    pub positions: Positions,
    /// What hides keys besides the future, as [`Mask::Padding`].
    pub mask: Mask,
}

impl From<Tensor<2, Int>> for LlamaInput {
    fn from(ids: Tensor<2, Int>) -> Self {
        Self { ids, positions: Positions::From(0), mask: Mask::Full }
    }
}

/// Where the tokens of a pass stand, and which of them they see.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// A table that reaches the last of the positions.
    pub rope: &'a Rope,
    /// Where the tokens stand.
    pub positions: &'a Positions,
    /// Which keys a query may attend to.
    pub mask: &'a Mask,
}

/// Keys and values of a text so far, and the rotary table for as long as it may get.
#[derive(Clone, Debug)]
pub struct LlamaCache {
    pub(crate) rope: Rope,
    pub(crate) blocks: Vec<KvCache>,
}

impl LlamaCache {
    /// How many tokens each row holds.
    pub fn len(&self) -> usize {
        self.blocks.first().map_or(0, KvCache::len)
    }

    /// Whether it holds no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl LlamaConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Llama {
        let Self { vocab_size, d_model, d_head, .. } = *self;
        let norm = || RmsNorm::new(d_model, self.rms_norm_eps, device);
        let block = |_| LlamaBlock {
            norm1: norm(),
            attention: self.attention(device),
            norm2: norm(),
            mlp: GatedMlpConfig::new(d_model, self.d_ff).with_bias(self.mlp_bias).init(device),
            activation: self.activation,
        };
        let head = || LinearConfig::new(d_model, vocab_size).with_bias(false).init(device);
        Llama {
            tokens: Embedding::new(vocab_size, d_model, 0.02, device),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: norm(),
            head: (self.head == Head::Own).then(head),
            rope: RopeConfig {
                d_rot: d_head,
                positions: self.n_positions,
                theta: self.rope_theta,
                pairing: self.pairing,
                scaling: self.rope_scaling,
            },
        }
    }
}

impl LlamaConfig {
    /// The untrained attention of a block.
    pub(crate) fn attention(&self, device: &Device) -> Attention {
        AttentionConfig::new(self.d_model, self.n_heads)
            .with_n_kv_heads(Some(self.n_kv_heads))
            .with_d_head(Some(self.d_head))
            .with_bias(self.attention_bias)
            .with_output_bias(self.attention_bias)
            .init(device)
    }
}

impl LlamaBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, after the tokens that `cache` holds, if there is one.
    pub fn forward(&self, x: Tensor<3>, place: Place, cache: Option<&mut KvCache>) -> Tensor<3> {
        let attended = attend(&self.attention, self.norm1.forward(x.clone()), place, cache);
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed, self.activation))
    }
}

/// Rotary self-attention: `[batch, seq, d_model] -> [batch, seq, d_model]`, after the tokens that `cache` holds, if there
/// is one.
pub(crate) fn attend(
    attention: &Attention,
    x: Tensor<3>,
    place: Place,
    cache: Option<&mut KvCache>,
) -> Tensor<3> {
    let Place { rope, positions, mask } = place;
    let query = rope.apply(attention.queries(x.clone()), positions); // [batch, n_heads, seq, d_head]
    let (key, value) = attention.keys_values(x); // [batch, n_kv_heads, seq, d_head]
    let key = rope.apply(key, positions);
    let (key, value) = match cache {
        Some(cache) => cache.append(key, value), // [batch, n_kv_heads, past + seq, d_head]
        None => (key, value),
    };
    attention.merge(ops::attention(query, key, value, mask, None))
}

impl Llama {
    /// The states of a batch of texts, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: impl Into<LlamaInput>) -> Tensor<3> {
        let LlamaInput { ids, positions, mask } = input.into();
        let rope = self.rope_of(&ids, &positions);
        let mask = Mask::All(vec![Mask::Causal, mask]);
        let place = Place { rope: &rope, positions: &positions, mask: &mask };
        let x = self.tokens.forward(ids); // [batch, seq, d_model]
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, place, None));
        self.norm.forward(x)
    }

    /// The states of tokens that follow those in `cache`, which grows by them: `[batch, new, d_model]`. The mask is of
    /// all keys, those in the cache too.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, the cache is full, or shapes differ.
    pub fn decode(&self, input: LlamaInput, cache: &mut LlamaCache) -> Tensor<3> {
        let LlamaInput { ids, positions, mask } = input;
        let LlamaCache { rope, blocks: caches } = cache;
        let mask = Mask::All(vec![Mask::Causal, mask]);
        let place = Place { rope, positions: &positions, mask: &mask };
        let x = self.tokens.forward(ids); // [batch, new, d_model]
        let layers = self.blocks.iter().zip(caches);
        let x = layers.fold(x, |x, (block, cache)| block.forward(x, place, Some(cache)));
        self.norm.forward(x)
    }

    /// Scores of the next token: `[batch, seq, d_model] -> [batch, seq, vocab_size]`.
    pub fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        match &self.head {
            Some(head) => head.forward(states),
            None => self.tokens.scores(states),
        }
    }

    /// An empty cache for texts of at most `capacity` tokens.
    pub fn cache(&self, capacity: usize) -> LlamaCache {
        self.cache_of(self.blocks.len(), capacity)
    }

    /// The same of so many blocks, which need not be its own.
    pub(crate) fn cache_of(&self, n_blocks: usize, capacity: usize) -> LlamaCache {
        let blocks = (0..n_blocks).map(|_| KvCache::new(capacity)).collect();
        LlamaCache { rope: self.rope(capacity, &self.tokens.weight.device()), blocks }
    }

    /// Texts that go on after these prompts, each by at most `max_new` tokens.
    ///
    /// # Panics
    /// If there is no prompt, one is empty, or an id is outside the vocabulary.
    pub fn session(&self, prompts: &[impl AsRef<[u32]>], max_new: usize) -> LlamaSession<'_> {
        LlamaSession::new(self, prompts, max_new)
    }

    /// A table that reaches the last of the positions of these tokens.
    pub(crate) fn rope_of(&self, ids: &Tensor<2, Int>, positions: &Positions) -> Rope {
        let [_, seq] = ids.dims();
        let end = match positions {
            Positions::From(first) => first + seq,
            Positions::Each(each) => each.clone().max().into_scalar::<i64>() as usize + 1,
        };
        self.rope(end, &ids.device())
    }

    fn rope(&self, positions: usize, device: &Device) -> Rope {
        RopeConfig { positions, ..self.rope.clone() }.init(device)
    }
}

/// A decoder whose tokens, head and caches are LLaMA's, whatever its blocks are.
pub trait Continue {
    /// [`Llama::decode`]
    fn decode(&self, input: LlamaInput, cache: &mut LlamaCache) -> Tensor<3>;

    /// [`Llama::logits`]
    fn logits(&self, states: Tensor<3>) -> Tensor<3>;

    /// [`Llama::cache`]
    fn cache(&self, capacity: usize) -> LlamaCache;

    /// Where its weights are.
    fn device(&self) -> Device;
}

impl Continue for Llama {
    fn decode(&self, input: LlamaInput, cache: &mut LlamaCache) -> Tensor<3> {
        self.decode(input, cache)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.logits(states)
    }

    fn cache(&self, capacity: usize) -> LlamaCache {
        self.cache(capacity)
    }

    fn device(&self) -> Device {
        self.tokens.weight.device()
    }
}

/// Texts that a decoder is continuing.
pub struct LlamaSession<'a, M = Llama> {
    model: &'a M,
    prompts: LeftPadded,
    cache: LlamaCache,
}

impl<'a, M: Continue> LlamaSession<'a, M> {
    /// Texts that go on after these prompts, each by at most `max_new` tokens.
    ///
    /// # Panics
    /// If there is no prompt, one is empty, or an id is outside the vocabulary.
    pub fn new(model: &'a M, prompts: &[impl AsRef<[u32]>], max_new: usize) -> Self {
        let prompts = LeftPadded::new(prompts, &model.device());
        let cache = model.cache(prompts.longest() + max_new);
        Self { model, prompts, cache }
    }
}

impl<M: Continue> Appending for LlamaSession<'_, M> {
    fn prompts(&self) -> &LeftPadded {
        &self.prompts
    }

    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [_, new] = ids.dims();
        let held = self.cache.len();
        let positions = self.prompts.positions(held, new);
        let input = LlamaInput { ids, positions, mask: self.prompts.mask(held + new) };
        self.model.decode(input, &mut self.cache)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.model.logits(states)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.prompts.select(rows);
        let rows = indices(rows, &self.model.device());
        self.cache.blocks.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

/// The `model_type`s of this shape.
const FAMILIES: &[&str] = &["llama", "aquila"];

impl LlamaConfig {
    /// `config.json` of `transformers`; what it leaves out has the values of `LlamaConfig`. Ids of special tokens
    /// are not read: they change no number, and some uploads' lie outside the vocabulary.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let family = config.text("model_type").filter(|family| FAMILIES.contains(family));
        let family = family.ok_or_else(|| config.error("model_type", &FAMILIES.join(", ")))?;
        let vocab_size = if family == "aquila" { 100_008 } else { 32000 };
        Self::parse_with(config, &Self { vocab_size, ..LLAMA_7B })
    }

    /// As [`LlamaConfig::parse`], with the values of `defaults` for what is left out, of whatever `model_type`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub(crate) fn parse_with(config: &Config, defaults: &Self) -> Result<Self, ConfigError> {
        config.only("is_causal", &["true"])?;
        config.only("partial_rotary_factor", &["1", "1.0"])?;
        config.only("add_cross_attention", &["false"])?;
        let d_model = config.size_or("hidden_size", defaults.d_model)?;
        let n_heads = config.size_or("num_attention_heads", defaults.n_heads)?;
        let is_grouped = defaults.n_kv_heads < defaults.n_heads;
        let n_kv_heads = if is_grouped { defaults.n_kv_heads } else { n_heads };
        let n_kv_heads = config.size_or("num_key_value_heads", n_kv_heads)?;
        config.divides("num_key_value_heads", n_kv_heads, n_heads)?;
        if !config.has("head_dim") {
            config.divides("num_attention_heads", n_heads, d_model)?;
        }
        let d_head = config.size_or("head_dim", d_model / n_heads)?;
        if !d_head.is_multiple_of(2) || d_head > 65536 {
            return Err(
                config.error("head_dim", "an even width (`hidden_size / num_attention_heads` if not set)")
            );
        }
        let n_positions = config.size_or("max_position_embeddings", defaults.n_positions)?;
        let (rope_theta, rope_scaling) = rope(config, n_positions, defaults.rope_theta)?;
        let head = match (config.first_of("architectures"), config.flag_or("tie_word_embeddings", false)?) {
            (Some("LlamaModel" | "AquilaModel" | "MixtralModel"), _) => Head::Absent,
            (_, true) => Head::Tied,
            (_, false) => Head::Own,
        };
        Ok(Self {
            vocab_size: config.size_or("vocab_size", defaults.vocab_size)?,
            n_positions,
            d_model,
            d_ff: config.size_or("intermediate_size", defaults.d_ff)?,
            n_layers: config.blocks_or("num_hidden_layers", defaults.n_layers)?,
            n_heads,
            n_kv_heads,
            d_head,
            activation: config.activation_or("hidden_act", Activation::Silu)?,
            attention_bias: config.flag_or("attention_bias", false)?,
            mlp_bias: config.flag_or("mlp_bias", false)?,
            rms_norm_eps: config.number_or("rms_norm_eps", defaults.rms_norm_eps)?,
            rope_theta,
            rope_scaling,
            pairing: Pairing::Half,
            head,
        })
    }
}

/// Base and scaling of the rotary frequencies: `rope_theta` and `rope_scaling`, or, from transformers 5 on, all in
/// `rope_parameters`. The pretraining's longest sequence is that of the configuration where it is not said.
fn rope(config: &Config, n_positions: usize, theta: f64) -> Result<(f64, RopeScaling), ConfigError> {
    let field = if config.has("rope_scaling") { "rope_scaling" } else { "rope_parameters" };
    let rope = config.object_or_empty(field)?;
    rope.only("partial_rotary_factor", &["1", "1.0"])?;
    let positive = |of: &Config, field: &str, default: f64| match of.number_or(field, default)? {
        number if number > 0.0 => Ok(number),
        _ => Err(of.error(field, "a number above 0")),
    };
    let theta = positive(if rope.has("rope_theta") { &rope } else { config }, "rope_theta", theta)?;

    let field = if rope.has("rope_type") { "rope_type" } else { "type" };
    let kind = if rope.has(field) { rope.text(field) } else { Some("default") };
    let needed = |field: &str| positive(&rope, field, 0.0);
    let pretrained = || positive(&rope, "original_max_position_embeddings", n_positions as f64);
    let scaling = match kind {
        Some("default") => RopeScaling::Unscaled,
        Some("linear") => RopeScaling::Linear(needed("factor")?),
        Some("llama3") => {
            let scaling = Llama3Scaling {
                factor: needed("factor")?,
                low: needed("low_freq_factor")?,
                high: needed("high_freq_factor")?,
                pretrained: pretrained()?,
            };
            if scaling.high <= scaling.low {
                return Err(rope.error("high_freq_factor", "more than `low_freq_factor`"));
            }
            RopeScaling::Llama3(scaling)
        }
        Some("dynamic") => {
            RopeScaling::Dynamic(DynamicScaling { factor: needed("factor")?, pretrained: n_positions as f64 })
        }
        Some("yarn") => {
            let pretrained = pretrained()?;
            let factor = positive(&rope, "factor", n_positions as f64 / pretrained)?;
            let sharper = |weight: f64| if factor > 1.0 { 0.1 * weight * factor.ln() + 1.0 } else { 1.0 };
            let ratio = match (rope.number_or("mscale", 0.0)?, rope.number_or("mscale_all_dim", 0.0)?) {
                (over, under) if over != 0.0 && under != 0.0 => sharper(over) / sharper(under),
                _ => sharper(1.0),
            };
            RopeScaling::Yarn(YarnScaling {
                factor,
                fast: positive(&rope, "beta_fast", 32.0)?,
                slow: positive(&rope, "beta_slow", 1.0)?,
                pretrained,
                magnitude: rope.number_or("attention_factor", ratio)?,
                whole_pairs: rope.flag_or("truncate", true)?,
            })
        }
        _ => return Err(rope.error(field, "default, linear, dynamic, yarn or llama3")),
    };
    Ok((theta, scaling))
}

const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// A block without its MLP.
pub(crate) const ATTENTION: &[Rule] = &[
    Rename("input_layernorm.weight", "norm1.weight"),
    Under("self_attn.q_proj.", "attention.query.", LINEAR),
    Under("self_attn.k_proj.", "attention.key.", LINEAR),
    Under("self_attn.v_proj.", "attention.value.", LINEAR),
    Under("self_attn.o_proj.", "attention.output.", LINEAR),
    Ignore("self_attn.rotary_emb.inv_freq"),
    Rename("post_attention_layernorm.weight", "norm2.weight"),
];
const BLOCK: &[Rule] = &[
    Under("", "", ATTENTION),
    Under("mlp.gate_proj.", "mlp.gate.", LINEAR),
    Under("mlp.up_proj.", "mlp.up.", LINEAR),
    Under("mlp.down_proj.", "mlp.down.", LINEAR),
];

/// What is around the blocks.
pub(crate) const AROUND: &[Rule] = &[
    Rename("embed_tokens.weight", "tokens.weight"),
    Rename("norm.weight", "norm.weight"),
    Ignore("rotary_emb.inv_freq"),
];
const TRUNK: &[Rule] = &[Under("", "", AROUND), Under("layers.{}.", "blocks.{}.", BLOCK)];

/// Keys of `LlamaForCausalLM` with a head of its own. Those of `LlamaModel` have nothing before them.
pub const KEYS: KeyMap =
    KeyMap::new(&[Under("model.", "", TRUNK), Under("", "", TRUNK), Rename("lm_head.weight", "head.weight")]);

/// Keys of `LlamaModel`, or of `LlamaForCausalLM` whose head is the token table: a head in the file is a copy of it,
/// or means nothing.
pub const KEYS_WITHOUT_HEAD: KeyMap =
    KeyMap::new(&[Under("model.", "", TRUNK), Under("", "", TRUNK), Ignore("lm_head.weight")]);

impl LlamaConfig {
    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.head {
            Head::Own => &KEYS,
            Head::Tied | Head::Absent => &KEYS_WITHOUT_HEAD,
        }
    }
}

/// The configuration of a folder, its weights, and their names.
fn read(folder: &Folder) -> Result<(LlamaConfig, Box<dyn Checkpoint>, &'static KeyMap), Error> {
    let name = if folder.has("config.json") { "config.json" } else { "params.json" };
    let config = folder.config(name)?;
    if original::is(&config) {
        let checkpoint = original::checkpoint(folder)?;
        let config = original::parse(&config, original::rows(checkpoint.as_ref()))?;
        return Ok((config, checkpoint, &original::KEYS));
    }
    let config = LlamaConfig::parse(&config)?;
    let keys = config.keys();
    Ok((config, folder.checkpoint()?, keys))
}

/// LLaMA as the registry knows it.
pub const SYSTEM: System = System {
    name: "llama",
    about: "causal text decoders: LLaMA, Llama 2 and 3, TinyLlama",
    file: "models/llama.rs",
    tasks: &["generate", "forward"],
    proved: &["llama", "llama_bf16", "llama_rope3", "llama_sharded"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| match config.text("model_type") {
            Some(family) => family == "llama",
            None => original::is(config),
        })
    },
    checkpoint: |folder| Ok(read(folder)?.1),
    describe: |folder| {
        let (config, checkpoint, keys) = read(folder)?;
        describe_with(checkpoint.as_ref(), &config.init(&Device::flex()), keys)
    },
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(|folder, options, device| {
        let runner = Runner::load(folder, options, device)?;
        match runner.config.head {
            Head::Absent => Err(Error::Task { system: SYSTEM.name, task: "write without a head" }),
            _ => Ok(Box::new(runner)),
        }
    }),
};

/// A decoder behind the forward contract.
struct Runner {
    model: Llama,
    config: LlamaConfig,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let (config, checkpoint, keys) = read(folder)?;
        let model = load(config.init(device), checkpoint.as_ref(), keys, options)?;
        Ok(Self { model, config })
    }
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `position_ids` and `greedy.prompt_ids`.
    ///
    /// Gives `last_hidden_state` without a head. With one: `logits`; `loss`, the mean over real tokens of
    /// [`next_token_loss`]; and greedily decoded, without a stop, the twelve `greedy.tokens` after
    /// `greedy.prompt_ids`, or else the eight `greedy_ids` after the real tokens of the first row.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let LlamaConfig { vocab_size, n_positions, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let real = inputs.mask("attention_mask");
        // past the trained length too, where a text is longer
        let farthest = ids.as_ref().map_or(0, |ids| ids.dims()[1]).max(n_positions);
        let positions = inputs.ids::<2>("position_ids", farthest);
        let prompt = causal::prompt(&mut inputs, vocab_size);
        inputs.missing("input_ids");
        let Some(ids) = ids else { return inputs.finish().map(|()| Outputs::new()) }; // always an error

        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        inputs.row_or_like_ids("position_ids", positions.as_ref().map(Tensor::dims), ids.dims());
        if self.config.head == Head::Absent && prompt.is_some() {
            inputs.problem("`greedy.prompt_ids` needs a head, and this model has none".into());
        }
        inputs.finish()?;

        let states = self.model.forward(LlamaInput {
            ids: ids.clone(),
            positions: positions.map_or(Positions::From(0), Positions::Each),
            mask: real.clone().map_or(Mask::Full, Mask::Padding),
        });
        if self.config.head == Head::Absent {
            return Ok(vec![output("last_hidden_state", states)]);
        }
        let logits = self.model.logits(states);
        let mut outputs = vec![output("logits", logits.clone())];
        outputs.extend(next_token_loss(logits, ids.clone(), real.clone()).map(|loss| output("loss", loss)));
        let session = |prompt: &[u32], count| self.model.session(&[prompt], count);
        outputs.extend(causal::continuation(prompt, ids, real, session));
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

    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        Ok(Box::new(self.model.session(prompts, max_new)))
    }
}

/// Touvron et al. 2023, "Llama 2", table 1 and appendix A.2.1: 7B.
const LLAMA_2_7B: LlamaConfig = LlamaConfig {
    vocab_size: 32000,
    n_positions: 4096,
    d_model: 4096,
    d_ff: 11008,
    n_layers: 32,
    n_heads: 32,
    n_kv_heads: 32,
    d_head: 128,
    activation: Activation::Silu,
    attention_bias: false,
    mlp_bias: false,
    rms_norm_eps: 1e-5,
    rope_theta: 10000.0,
    rope_scaling: RopeScaling::Unscaled,
    pairing: Pairing::Half,
    head: Head::Own,
};
const LLAMA_2_13B: LlamaConfig =
    LlamaConfig { d_model: 5120, d_ff: 13824, n_layers: 40, n_heads: 40, n_kv_heads: 40, ..LLAMA_2_7B };
const LLAMA_2_70B: LlamaConfig =
    LlamaConfig { d_model: 8192, d_ff: 28672, n_layers: 80, n_heads: 64, n_kv_heads: 8, ..LLAMA_2_7B };

/// "The Llama 3 herd of models", table 3: 8B.
const LLAMA_3_8B: LlamaConfig = LlamaConfig {
    vocab_size: 128_256,
    n_positions: 8192,
    d_ff: 14336,
    n_kv_heads: 8,
    rope_theta: 500_000.0,
    ..LLAMA_2_7B
};
const LLAMA_3_2_1B: LlamaConfig = LlamaConfig {
    n_positions: 131_072,
    d_model: 2048,
    d_ff: 8192,
    n_layers: 16,
    d_head: 64,
    rope_scaling: RopeScaling::Llama3(Llama3Scaling {
        factor: 32.0,
        low: 1.0,
        high: 4.0,
        pretrained: 8192.0,
    }),
    head: Head::Tied,
    ..LLAMA_3_8B
};

/// Zhang et al. 2024, <https://arxiv.org/abs/2401.02385>, table 2.
const TINY_LLAMA: LlamaConfig = LlamaConfig {
    n_positions: 2048,
    d_model: 2048,
    d_ff: 5632,
    n_layers: 22,
    n_kv_heads: 4,
    d_head: 64,
    ..LLAMA_2_7B
};

/// Touvron et al. 2023, "LLaMA", table 2: 7B.
pub(crate) const LLAMA_7B: LlamaConfig = LlamaConfig { n_positions: 2048, rms_norm_eps: 1e-6, ..LLAMA_2_7B };
const LLAMA_13B: LlamaConfig =
    LlamaConfig { d_model: 5120, d_ff: 13824, n_layers: 40, n_heads: 40, n_kv_heads: 40, ..LLAMA_7B };
pub(crate) const LLAMA_33B: LlamaConfig =
    LlamaConfig { d_model: 6656, d_ff: 17920, n_layers: 60, n_heads: 52, n_kv_heads: 52, ..LLAMA_7B };
const LLAMA_65B: LlamaConfig = LlamaConfig {
    d_model: 8192,
    d_ff: 22016,
    n_layers: 80,
    n_heads: 64,
    n_kv_heads: 64,
    rms_norm_eps: 1e-5,
    ..LLAMA_7B
};

const fn preset(name: &'static str, license: &'static str, config: LlamaConfig, parameters: usize) -> Preset {
    let source = "transformers, LlamaForCausalLM";
    Preset { name, shape: Shape::Llama(config), weights: Weights::Hub, license, parameters, source }
}

/// Of the first LLaMA, which Meta gave to those who applied.
const fn first(name: &'static str, config: LlamaConfig, parameters: usize) -> Preset {
    let (license, source) = ("LLaMA license (non-commercial)", "transformers, LlamaForCausalLM");
    let (shape, weights) = (Shape::Llama(config), Weights::Application);
    Preset { name, shape, weights, license, parameters, source }
}

const LLAMA_2: &str = "Llama 2 Community License";
const LLAMA_3: &str = "Meta Llama 3 Community License";
const LLAMA_3_2: &str = "Llama 3.2 Community License";

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    first("LLaMA-7B", LLAMA_7B, 6_738_415_616),
    first("LLaMA-13B", LLAMA_13B, 13_015_864_320),
    first("LLaMA-33B", LLAMA_33B, 32_528_943_616),
    first("LLaMA-65B", LLAMA_65B, 65_285_660_672),
    preset("meta-llama/Llama-2-7b-hf", LLAMA_2, LLAMA_2_7B, 6_738_415_616),
    preset("meta-llama/Llama-2-13b-hf", LLAMA_2, LLAMA_2_13B, 13_015_864_320),
    preset("meta-llama/Llama-2-70b-hf", LLAMA_2, LLAMA_2_70B, 68_976_648_192),
    preset("meta-llama/Meta-Llama-3-8B", LLAMA_3, LLAMA_3_8B, 8_030_261_248),
    preset("meta-llama/Llama-3.2-1B", LLAMA_3_2, LLAMA_3_2_1B, 1_235_814_400),
    preset("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "Apache-2.0", TINY_LLAMA, 1_100_048_384),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::ops::ControlFlow;
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};
    use volary_text::generate::{
        Beams, Method, Patience, Settings, Silent, Stop, greedy, log_likelihoods, write,
    };
    use volary_weights::{parameters, save};

    use super::*;

    /// Grouped heads, wider together than the residual stream.
    const TINY: LlamaConfig = LlamaConfig {
        vocab_size: 50,
        n_positions: 16,
        d_model: 12,
        d_ff: 20,
        n_layers: 2,
        n_heads: 4,
        n_kv_heads: 2,
        d_head: 6,
        ..LLAMA_2_7B
    };

    fn ids<const B: usize, const S: usize>(tokens: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(tokens, &Device::flex())
    }

    fn fixture(name: &str) -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
    }

    fn run(folder: &Folder, inputs: &[(&str, Tensor<2, Int>)]) -> Result<Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, ids)| (name.to_string(), ids.to_data())).collect();
        crate::registry::forward(folder, &inputs, &LoadOptions::default(), &Device::flex())
    }

    fn config(fields: &str) -> Result<LlamaConfig, ConfigError> {
        let text = format!("{{\"model_type\": \"llama\", {fields}}}");
        LlamaConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        let biased = LlamaConfig { attention_bias: true, mlp_bias: true, ..TINY };
        for config in [TINY, biased, LlamaConfig { head: Head::Tied, ..TINY }] {
            let keys = config.keys();
            for parameter in parameters(&config.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert_eq!(keys.paths(&found[0]).unwrap(), [parameter.path]);
            }
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(of("model.layers.3.mlp.down_proj.weight"), ["blocks.3.mlp.down.weight"]);
        assert_eq!(of("layers.3.mlp.down_proj.weight"), ["blocks.3.mlp.down.weight"]);
        assert!(of("layers.3.self_attn.rotary_emb.inv_freq").is_empty());
    }

    /// One token at a time, several at a time and all at once are the same.
    #[test]
    fn decoding_with_a_cache_is_the_whole_forward_pass() {
        let model = TINY.init(&Device::flex());
        let text = ids([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 32, 3]]);
        let whole = model.forward(text.clone()).into_data();
        for pieces in [vec![1; 7], vec![7], vec![3, 1, 2, 1]] {
            let mut cache = model.cache(7);
            let mut states = Vec::new();
            for piece in pieces {
                let ids = text.clone().narrow(1, cache.len(), piece);
                let input = LlamaInput { positions: Positions::From(cache.len()), ..ids.into() };
                states.push(model.decode(input, &mut cache));
            }
            assert_eq!(cache.len(), 7);
            Tensor::cat(states, 1).into_data().assert_approx_eq::<f32>(&whole, Tolerance::default());
        }
    }

    /// Of a trained reference too: the cache picks what the scores of the whole text so far pick, and prompts of several
    /// lengths in one batch go on as each does alone.
    #[test]
    fn greedy_tokens_are_those_of_the_whole_forward_pass() {
        for name in ["llama", "llama_bf16", "llama_rope3", "llama_sharded", "aquila_hf"] {
            let folder = fixture(name);
            let Runner { model, .. } =
                Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
            let prompts = [vec![7, 28, 66, 5], vec![23], vec![64, 44, 66]];
            let together = greedy(&mut model.session(&prompts, 6), 6);
            for (prompt, together) in prompts.iter().zip(together) {
                let mut text = prompt.clone();
                for _ in 0..6 {
                    let row = text.iter().map(|&id| i64::from(id)).collect();
                    let ids = Tensor::from_data(TensorData::new(row, [1, text.len()]), &Device::flex());
                    let last = model.forward(ids).narrow(1, text.len() - 1, 1);
                    text.push(model.logits(last).argmax(2).into_scalar::<i64>() as u32);
                }
                assert_eq!(text[prompt.len()..], together, "{name}");
            }
        }
    }

    /// Rows that are chosen anew go on as if they had been so from the start.
    #[test]
    fn a_session_goes_on_from_selected_rows() {
        let model = TINY.init(&Device::flex());
        let mut session = model.session(&[vec![3, 4, 5], vec![6]], 3);
        session.start();
        session.read(&[7, 8]);
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (row, text) in [vec![6, 8, 9], vec![3, 4, 5, 7, 9], vec![6, 8, 10]].into_iter().enumerate() {
            let alone = model.session(&[text], 1).start().into_data();
            chosen
                .clone()
                .narrow(0, row, 1)
                .into_data()
                .assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-4));
        }
    }

    /// Tokens read at once are scored as if they came one by one, in rows of unequal prompts.
    #[test]
    fn a_session_reads_several_tokens_at_once() {
        let model = TINY.init(&Device::flex());
        let prompts = [vec![3, 4, 5], vec![6]];
        let continuations = [vec![7, 8, 9, 10], vec![20, 21]];
        let found = log_likelihoods(&mut model.session(&prompts, 4), &continuations).unwrap();
        for ((prompt, continuation), found) in prompts.iter().zip(&continuations).zip(found) {
            let text: Vec<i64> = prompt.iter().chain(continuation).map(|&id| i64::from(id)).collect();
            let length = text.len();
            let ids = Tensor::from_data(TensorData::new(text, [1, length]), &Device::flex());
            let scores = burn::tensor::activation::log_softmax(model.logits(model.forward(ids)), 2);
            for (at, (&token, found)) in continuation.iter().zip(found).enumerate() {
                let place =
                    [0..1, prompt.len() - 1 + at..prompt.len() + at, token as usize..token as usize + 1];
                let expected: f64 = scores.clone().slice(place).into_scalar();
                assert!((found - expected).abs() < 1e-4, "{found} {expected}");
            }
        }
    }

    /// Literals of transformers 5: three beams after [7, 28, 66, 5], with stop tokens, length penalty and patience.
    #[test]
    fn beams_are_those_of_transformers() {
        use Patience::{Certain, Estimate, First};
        let folder = fixture("llama");
        let Runner { model, .. } = Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
        type Case<'a> = (&'a [u32], f64, &'a [Patience], [(&'a [u32], f64); 3]);
        let cases: &[Case] = &[
            (
                &[13, 63],
                1.0,
                &[First],
                [(&[6, 70, 13], -2.195_383), (&[6, 50, 78, 70, 13], -2.316_197), (&[63], -2.841_789)],
            ),
            (
                &[13, 63],
                1.0,
                &[Estimate],
                [
                    (&[6, 70, 13], -2.195_383),
                    (&[6, 50, 78, 70, 13], -2.316_197),
                    (&[6, 2, 0, 74, 70, 13], -2.318_559),
                ],
            ),
            (
                &[13, 63],
                1.0,
                &[Certain],
                [
                    (&[6, 70, 13], -2.195_383),
                    (&[6, 2, 0, 74, 70, 47, 38, 87, 2, 22], -2.301_412),
                    (&[6, 50, 78, 70, 13], -2.316_197),
                ],
            ),
            (
                &[13, 63],
                0.0,
                &[First, Estimate, Certain],
                [(&[63], -2.841_789), (&[6, 70, 13], -6.586_150), (&[6, 50, 78, 70, 13], -11.580_985)],
            ),
            (
                &[13, 63],
                2.0,
                &[First],
                [(&[6, 50, 78, 70, 13], -0.463_239), (&[6, 70, 13], -0.731_794), (&[63], -2.841_789)],
            ),
            (
                &[13, 63],
                2.0,
                &[Estimate, Certain],
                [
                    (&[6, 2, 0, 74, 70, 47, 38, 87, 2, 22], -0.230_141),
                    (&[6, 2, 0, 74, 70, 47, 38, 87, 2, 76], -0.232_071),
                    (&[6, 2, 0, 74, 70, 47, 38, 87, 2, 61], -0.233_510),
                ],
            ),
            (
                &[0],
                1.0,
                &[Estimate, Certain],
                [
                    (&[6, 70, 0], -2.319_269),
                    (&[6, 2, 0], -2.329_067),
                    (&[6, 70, 13, 37, 70, 22, 1, 30, 77, 6], -2.342_696),
                ],
            ),
        ];
        for (stop_tokens, length_penalty, patience, expected) in cases {
            for &patience in *patience {
                let settings = Settings {
                    max_new: 10,
                    stop_tokens: stop_tokens.to_vec(),
                    count: 3,
                    method: Method::Beams(Beams { width: 3, length_penalty: *length_penalty, patience }),
                    ..Settings::default()
                };
                let prompts = [vec![7, 28, 66, 5]];
                let mut session = model.session(&prompts, settings.max_new);
                let silent = &|| Box::new(Silent) as Box<_>;
                let written =
                    write(&mut session, &prompts, &settings, silent, &mut |_| ControlFlow::Continue(()));
                for (found, (tokens, score)) in written.unwrap()[0].iter().zip(expected) {
                    let mut text = found.tokens.clone();
                    text.extend(match found.stop {
                        Stop::Token(token) => Some(token),
                        _ => None,
                    });
                    assert_eq!(text, *tokens, "{stop_tokens:?} {length_penalty} {patience:?}");
                    let own = found.log_likelihood / (text.len() as f64).powf(*length_penalty);
                    assert!((own - score).abs() < 1e-4, "{own} {score}");
                }
            }
        }
    }

    #[test]
    fn the_past_ignores_the_future_and_real_tokens_the_padding() {
        let model = TINY.init(&Device::flex());
        let states = |tokens, mask| {
            let input = LlamaInput { mask, ..LlamaInput::from(ids([tokens])) };
            model.forward(input).narrow(1, 0, 3).into_data()
        };
        let expected = states([3, 4, 5, 0, 0], Mask::Full);
        states([3, 4, 5, 6, 7], Mask::Full).assert_approx_eq::<f32>(&expected, Tolerance::default());
        let real = Tensor::from_data([[true, true, true, false, false]], &Device::flex());
        states([3, 4, 5, 0, 0], Mask::Padding(real)).assert_approx_eq::<f32>(&expected, Tolerance::default());
    }

    /// Padding on the left is not seen either, and positions that are moved together make no difference.
    #[test]
    fn padding_may_be_on_the_left() {
        let model = TINY.init(&Device::flex());
        let expected = model.forward(ids([[3, 4, 5]])).into_data();
        let real = Tensor::from_data([[false, false, true, true, true]], &Device::flex());
        for positions in [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0, 0, 900, 901, 902]] {
            let states = model.forward(LlamaInput {
                ids: ids([[0, 0, 3, 4, 5]]),
                positions: Positions::Each(ids([positions])),
                mask: Mask::Padding(real.clone()),
            });
            let states = states.narrow(1, 2, 3).into_data();
            states.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-4));
        }
    }

    #[test]
    fn rotary_settings_are_read_from_all_their_places() {
        let rope = |fields: &str| {
            let config = config(fields).unwrap();
            (config.rope_theta, config.rope_scaling)
        };
        let llama3 = r#"{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192"#;
        let scaling = LLAMA_3_2_1B.rope_scaling;
        let yarn = YarnScaling {
            factor: 4.0,
            fast: 32.0,
            slow: 1.0,
            pretrained: 16.0,
            magnitude: 0.1 * 4f64.ln() + 1.0,
            whole_pairs: true,
        };
        let magnitude = (0.2 * 4f64.ln() + 1.0) / (0.1 * 4f64.ln() + 1.0);
        let unlike = YarnScaling { fast: 16.0, slow: 2.0, magnitude, whole_pairs: false, ..yarn };
        for (fields, expected) in [
            (r#""rope_scaling": null"#, (10000.0, RopeScaling::Unscaled)),
            (r#""rope_theta": 5e5"#, (5e5, RopeScaling::Unscaled)),
            (
                r#""rope_parameters": {"rope_type": "default", "rope_theta": 5e5}"#,
                (5e5, RopeScaling::Unscaled),
            ),
            (r#""rope_scaling": {"type": "linear", "factor": 2}"#, (10000.0, RopeScaling::Linear(2.0))),
            (
                r#""max_position_embeddings": 64, "rope_scaling": {"type": "dynamic", "factor": 2}"#,
                (10000.0, RopeScaling::Dynamic(DynamicScaling { factor: 2.0, pretrained: 64.0 })),
            ),
            (
                r#""max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": 16}"#,
                (10000.0, RopeScaling::Yarn(yarn)),
            ),
            (
                r#""max_position_embeddings": 16, "rope_scaling": {"type": "yarn", "factor": 4,
                "mscale": 2, "mscale_all_dim": 1, "beta_fast": 16, "beta_slow": 2, "truncate": false}"#,
                (10000.0, RopeScaling::Yarn(unlike)),
            ),
            (&format!(r#""rope_theta": 5e5, "rope_scaling": {llama3}}}"#), (5e5, scaling)),
            (&format!(r#""rope_parameters": {llama3}, "rope_theta": 5e5}}"#), (5e5, scaling)),
        ] {
            assert_eq!(rope(fields), expected, "{fields}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""model_type": "mistral""#, "`model_type`: expected llama, aquila"),
            (r#""hidden_size": 30"#, "`num_attention_heads`: expected a divisor of 30"),
            (r#""num_key_value_heads": 5"#, "`num_key_value_heads`: expected a divisor of 32"),
            (r#""head_dim": 7"#, "`head_dim`: expected an even width"),
            (r#""hidden_act": "mish""#, "`hidden_act`"),
            (r#""is_causal": false"#, "`is_causal`"),
            (r#""partial_rotary_factor": 0.5"#, "`partial_rotary_factor`"),
            (r#""num_hidden_layers": 2000000000"#, "`num_hidden_layers`: expected at most 1000 blocks"),
            (r#""rope_theta": 0"#, "`rope_theta`: expected a number above 0, found 0"),
            (
                r#""rope_scaling": {"type": "longrope"}"#,
                "`rope_scaling.type`: expected default, linear, dynamic, yarn or llama3",
            ),
            (
                r#""rope_scaling": {"rope_type": 3}"#,
                "`rope_scaling.rope_type`: expected default, linear, dynamic, yarn or llama3",
            ),
            (
                r#""rope_scaling": {"type": "linear"}"#,
                "`rope_scaling.factor`: expected a number above 0, found nothing",
            ),
            (
                r#""rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4,
                    "original_max_position_embeddings": 8192}"#,
                "`rope_parameters.high_freq_factor`: expected more than `low_freq_factor`, found 4",
            ),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        type Case<'a> = (&'a [(&'a str, Tensor<2, Int>)], &'a [&'a str]);
        let cases: &[Case] = &[
            (&[], &["`input_ids` is missing"]),
            (&[("input_ids", ids([[90]]))], &["`input_ids` holds 90, expected 0 to 89"]),
            (
                &[
                    ("input_ids", ids([[3, 4]])),
                    ("attention_mask", ids([[1, 1, 1]])),
                    ("position_ids", ids([[0, 64]])),
                    ("greedy.prompt_ids", ids([[1], [2]])),
                    ("token_type_ids", ids([[0, 0]])),
                ],
                &[
                    "`attention_mask` is [1, 3], `input_ids` [1, 2]",
                    "`position_ids` holds 64, expected 0 to 63",
                    "`greedy.prompt_ids` has 2 rows, expected 1",
                    "`token_type_ids` is not one of",
                ],
            ),
        ];
        for (inputs, named) in cases {
            let message = run(&fixture("llama"), inputs).unwrap_err().to_string();
            for part in *named {
                assert!(message.contains(part), "{message}");
            }
        }
        // longer than it was trained for, and with nothing but padding in the first row
        let names = |inputs: &[_]| {
            let outputs = run(&fixture("llama"), inputs).unwrap();
            outputs.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let long = [("input_ids", ids([[5; 70]]))];
        assert_eq!(names(&long), ["logits", "loss", "greedy_ids"]);
        let counted = Tensor::arange(0..70, &Device::flex()).unsqueeze::<2>();
        let [ids_alone] = long.clone();
        let numbered = run(&fixture("llama"), &[ids_alone, ("position_ids", counted)]).unwrap();
        assert_eq!(numbered[0], run(&fixture("llama"), &long).unwrap()[0]);
        let padded = [("input_ids", ids([[5]])), ("attention_mask", ids([[0]]))];
        assert_eq!(names(&padded), ["logits"]);
    }

    /// The files of `LlamaModel` and of tied models, some of which hold a copy of the table as `lm_head.weight`.
    #[test]
    fn a_head_is_read_where_there_is_one() {
        let folder = std::env::temp_dir().join(format!("volary-llama-head-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let own = TINY.init(&Device::flex());
        const BARE: KeyMap = KeyMap::new(&[Under("", "", TRUNK), Rename("lm_head.weight", "head.weight")]);
        let text = ids([[3, 4]]);
        let states = own.forward(text.clone());
        let tied = states.clone().matmul(own.tokens.weight.val().transpose().unsqueeze());
        for (keys, fields, name, expected) in [
            (KEYS, r#""tie_word_embeddings": false"#, "logits", own.logits(states.clone())),
            (KEYS, r#""tie_word_embeddings": true"#, "logits", tied),
            (BARE, r#""architectures": ["LlamaModel"]"#, "last_hidden_state", states),
        ] {
            let text_of_config = format!(
                r#"{{"model_type": "llama", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 50,
                "rms_norm_eps": 1e-5, {fields}}}"#
            );
            std::fs::write(folder.join("config.json"), text_of_config).unwrap();
            save(&own, &keys, None, &folder.join("model.safetensors"), None).unwrap();
            let outputs = run(&Folder::Disk(folder.clone()), &[("input_ids", text.clone())]).unwrap();
            assert_eq!(outputs[0].0, name);
            outputs[0].1.assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
