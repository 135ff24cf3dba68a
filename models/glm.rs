//! GLM: a language model that fills blanks (Du et al. 2022, "GLM: General Language Model Pretraining with Autoregressive
//! Blank Infilling", <https://arxiv.org/abs/2103.10360>). Wen Hui 1.0 of WuDao is its largest, 10B, in English and in
//! Chinese. Not GLM-4, which `transformers` calls `glm` as well.
//!
//! A text with blanks is read in both directions. What fills a blank is written after the text, from left to right: each
//! of its tokens has the position of the blank, and counts 1, 2, ... in a second table, where the text's own are all 0.
//! With several blanks, what fills one is seen by those after it.
//!
//! The numbers match FlagAI's `GLMModel` (1.8.4). Files of the authors (`blocklm-*`, also in tensor-parallel ranks),
//! of FlagAI, of the hub (`THUDM/glm-*`), of SwissArmyTransformer and of PaddleNLP are read.
//!
//! ```sh
//! volary forward path/to/glm-10b --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use volary_kernels::layers::{Attention, AttentionConfig, Embedding, KvCache, LayerNorm, Mlp, MlpConfig};
use volary_kernels::ops::{self, Activation, Mask};
use volary_text::generate::{Appending, LeftPadded, Session, greedy, indices};
use volary_text::infill::{Blanks, Commands};
use volary_weights::format::{OpenOptions, RankOptions, megatron};
use volary_weights::{Checkpoint, Entry, KeyMap, LoadOptions, Rule, load};

use Rule::{Rename, Split, SplitTranspose, Transpose, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Description, Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct GlmConfig {
    /// Rows of the token table, padding of the vocabulary included: every one has a score.
    pub vocab_size: usize,
    /// Rows of either position table: one more than the longest text.
    pub n_positions: usize,
    /// Width of the residual stream; the MLP is four times as wide.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// Added to variances.
    pub layer_norm_eps: f64,
}

/// A model.
#[derive(Module, Debug)]
pub struct Glm {
    /// `[vocab_size, d_model]`; makes the scores as well.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`: where a token of the text stands, or the blank that a token fills.
    pub positions: Embedding,
    /// `[n_positions, d_model]`: where a token stands in what fills a blank, from 1; 0 for the text.
    pub block_positions: Embedding,
    /// The blocks.
    pub blocks: Vec<GlmBlock>,
    /// After the last one.
    pub norm: LayerNorm,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct GlmBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
}

/// A batch of texts.
#[derive(Clone, Debug)]
pub struct GlmInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// Positions in the first table, `[batch, seq]`.
    pub positions: Tensor<2, Int>,
    /// Positions in the second one, `[batch, seq]`.
    pub block_positions: Tensor<2, Int>,
    /// What a token sees: [`Mask::Prefix`] over the text, causal over what fills its blanks.
    pub mask: Mask,
}

impl GlmConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Glm {
        let d_model = self.d_model;
        let norm = || LayerNorm::new(d_model, self.layer_norm_eps, device);
        let table = |rows| Embedding::new(rows, d_model, 0.02, device);
        let block = |_| GlmBlock {
            norm1: norm(),
            attention: AttentionConfig::new(d_model, self.n_heads).init(device),
            norm2: norm(),
            mlp: MlpConfig::new(d_model, 4 * d_model).init(device),
        };
        Glm {
            tokens: table(self.vocab_size),
            positions: table(self.n_positions),
            block_positions: table(self.n_positions),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: norm(),
        }
    }
}

impl GlmBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, after the tokens that `cache` holds, if there is one.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask, cache: Option<&mut KvCache>) -> Tensor<3> {
        let normed = self.norm1.forward(x.clone());
        let attended = match cache {
            Some(cache) => self.attention.cached(normed, cache, mask),
            None => self.attention.forward(normed, mask),
        };
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed, Activation::GeluTanh))
    }
}

impl Glm {
    /// The states of a batch of texts, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id or a position is outside its table, or shapes differ.
    pub fn forward(&self, input: GlmInput) -> Tensor<3> {
        let x = self.embed(&input);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, &input.mask, None));
        self.norm.forward(x)
    }

    /// The states of tokens `[batch, new]` that follow those in the caches, which grow by them:
    /// `[batch, new, d_model]`.
    ///
    /// # Panics
    /// As [`Glm::forward`]; if a cache is full.
    pub fn decode(&self, input: GlmInput, caches: &mut [KvCache]) -> Tensor<3> {
        let x = self.embed(&input);
        let layers = self.blocks.iter().zip(caches);
        let x = layers.fold(x, |x, (block, cache)| block.forward(x, &input.mask, Some(cache)));
        self.norm.forward(x)
    }

    /// What goes into the first block and what comes out of each, `[n_layers + 1]` times `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// As [`Glm::forward`].
    pub fn trace(&self, input: &GlmInput) -> Vec<Tensor<3>> {
        let mut states = vec![self.embed(input)];
        for (layer, block) in self.blocks.iter().enumerate() {
            states.push(block.forward(states[layer].clone(), &input.mask, None));
        }
        states
    }

    /// Scores of the next token: `[batch, seq, d_model] -> [batch, seq, vocab_size]`.
    pub fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.tokens.scores(states)
    }

    /// Texts whose next blanks are being filled, each by at most `max_new` tokens. A text without an open blank goes on
    /// after what fills its last one.
    ///
    /// # Panics
    /// If there is no text, or an id is outside the vocabulary.
    pub fn session(&self, texts: &[Blanks], commands: &Commands, max_new: usize) -> GlmSession<'_> {
        let rows: Vec<Row> = texts.iter().map(|text| Row::of(text, commands)).collect();
        let prompts = LeftPadded::new(&rows, &self.tokens.weight.device());
        let capacity = prompts.longest() + max_new;
        let caches = self.blocks.iter().map(|_| KvCache::new(capacity)).collect();
        GlmSession { model: self, prompts, rows, caches }
    }

    fn embed(&self, input: &GlmInput) -> Tensor<3> {
        self.tokens.forward(input.ids.clone())
            + self.positions.forward(input.positions.clone())
            + self.block_positions.forward(input.block_positions.clone())
    }
}

/// The mean cross-entropy of the targets in nats, weighted by `weights`, `[1]`.
///
/// - `logits`: `[batch, seq, vocab_size]`
/// - `targets`, `weights`: `[batch, seq]`; 1 where a target counts, 0 where not.
pub fn masked_loss(logits: Tensor<3>, targets: Tensor<2, Int>, weights: Tensor<2>) -> Tensor<1> {
    let [batch, seq] = targets.dims();
    let chances = log_softmax(logits.cast(DType::F32), 2).gather(2, targets.unsqueeze_dim(2));
    -(chances.reshape([batch, seq]) * weights.clone()).sum() / weights.sum()
}

/// A text as the model reads it: itself, then what fills its blanks, then the `sop` of the next.
#[derive(Clone)]
struct Row {
    ids: Vec<u32>,
    /// The position of each token in either table.
    places: Vec<[usize; 2]>,
    /// How many tokens the text has, all of which see each other.
    context: usize,
}

impl Row {
    fn of(text: &Blanks, commands: &Commands) -> Self {
        let mut ids = text.context().to_vec();
        let context = ids.len();
        let mut places: Vec<[usize; 2]> = (0..context).map(|position| [position, 0]).collect();
        let open = text.next().map(|(blank, _)| (blank, &[][..]));
        for (blank, span) in text.filled().chain(open) {
            ids.push(commands.start);
            ids.extend_from_slice(span);
            places.extend((1..=span.len() + 1).map(|place| [blank, place]));
        }
        Self { ids, places, context }
    }

    /// The position of a token of the text, or of what is written after it.
    fn place(&self, token: usize) -> [usize; 2] {
        match (self.places.get(token), self.places.last()) {
            (Some(&place), _) => place,
            (None, Some([blank, last])) => [*blank, last + token + 1 - self.places.len()],
            (None, None) => [0, 0],
        }
    }
}

impl AsRef<[u32]> for Row {
    fn as_ref(&self) -> &[u32] {
        &self.ids
    }
}

/// Texts whose blanks are being filled.
pub struct GlmSession<'a> {
    model: &'a Glm,
    prompts: LeftPadded,
    /// In the order that was selected last.
    rows: Vec<Row>,
    caches: Vec<KvCache>,
}

impl Appending for GlmSession<'_> {
    fn prompts(&self) -> &LeftPadded {
        &self.prompts
    }

    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [rows, new] = ids.dims();
        let held = self.caches.first().map_or(0, KvCache::len);
        let padding = self.prompts.padding();
        let places: Vec<[usize; 2]> = self
            .rows
            .iter()
            .zip(padding)
            .flat_map(|(row, &padding)| {
                let place =
                    move |column: usize| column.checked_sub(padding).map_or([0, 0], |at| row.place(at));
                (held..held + new).map(place)
            })
            .collect();
        let table = |which: usize| {
            let places: Vec<i64> = places.iter().map(|place| place[which] as i64).collect();
            Tensor::from_data(TensorData::new(places, [rows, new]), &ids.device())
        };
        let context = self.rows.iter().zip(padding).map(|(row, padding)| padding + row.context);
        let mask = Mask::All(vec![Mask::Prefix(context.collect()), self.prompts.mask(held + new)]);
        let input = GlmInput { ids: ids.clone(), positions: table(0), block_positions: table(1), mask };
        self.model.decode(input, &mut self.caches)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.model.logits(states)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.prompts.select(rows);
        self.rows = rows.iter().map(|&row| self.rows[row].clone()).collect();
        let rows = indices(rows, &self.model.tokens.weight.device());
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

impl GlmConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of the hub's and FlagAI's uploads; what it leaves out has the values of the hub's `GLMConfig`.
    /// `attention_scale` is not read: dividing scores by it and multiplying them again changes no number.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        config.only("relative_encoding", &["false"])?;
        config.only("block_position_encoding", &["true"])?;
        config.only("output_predict", &["true"])?;
        config.only("max_memory_length", &["0"])?;
        let d_model = config.size_or("hidden_size", 1024)?;
        let n_heads = config.size_or("num_attention_heads", 16)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        Ok(Self {
            vocab_size: config.size_or("vocab_size", 30592)?,
            n_positions: config.size_or("max_sequence_length", 512)? + 1,
            d_model,
            n_layers: config.blocks_or("num_layers", 24)?,
            n_heads,
            layer_norm_eps: config.number_or("layernorm_epsilon", 1e-5)?,
        })
    }
}

/// The command tokens of a folder: those that its configuration lists as `command_tokens`, or else its tokenizer's, if it
/// has one that can be read and knows blanks.
///
/// # Errors
/// If the list is malformed.
pub fn commands(folder: &Folder, vocab_size: usize) -> Result<Option<Commands>, Error> {
    let config = folder.config("config.json")?;
    if !config.has("command_tokens") {
        return Ok(folder.tokenizer().ok().as_ref().and_then(Commands::of));
    }
    let list = config.object("command_tokens")?;
    let needed = |name: &str| match list.integer_or(name, -1)? {
        id @ 0.. if (id as usize) < vocab_size => Ok(id as u32),
        _ => Err(list.error(name, &format!("a token, 0 to {}", vocab_size - 1))),
    };
    let optional = |name: &str| if list.has(name) { needed(name).map(Some) } else { Ok(None) };
    Ok(Some(Commands {
        span: optional("MASK")?,
        sentence: optional("sMASK")?,
        document: optional("gMASK")?,
        start: needed("sop")?,
        end: needed("eop")?,
        first: optional("ENC")?,
        last: optional("eos")?,
    }))
}

const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

const QUERY_KEY_VALUE: &[&str] =
    &["attention.query.weight", "attention.key.weight", "attention.value.weight"];

/// What is stored alike everywhere.
const ALIKE: &[Rule] = &[
    Under("input_layernorm.", "norm1.", LINEAR),
    Under("post_attention_layernorm.", "norm2.", LINEAR),
    Split(
        "attention.query_key_value.bias",
        &["attention.query.bias", "attention.key.bias", "attention.value.bias"],
    ),
];

const BLOCK: &[Rule] = &[
    Under("", "", ALIKE),
    Split("attention.query_key_value.weight", QUERY_KEY_VALUE),
    Under("attention.dense.", "attention.output.", LINEAR),
    Under("mlp.dense_h_to_4h.", "mlp.up.", LINEAR),
    Under("mlp.dense_4h_to_h.", "mlp.down.", LINEAR),
];

/// As PaddleNLP stores them, `[d_in, d_out]`.
const TURNED: &[Rule] = &[Transpose("weight", "weight"), Rename("bias", "bias")];

const PADDLE_BLOCK: &[Rule] = &[
    Under("", "", ALIKE),
    SplitTranspose("attention.query_key_value.weight", QUERY_KEY_VALUE),
    Under("attention.dense.", "attention.output.", TURNED),
    Under("mlp.dense_h_to_4h.", "mlp.up.", TURNED),
    Under("mlp.dense_4h_to_h.", "mlp.down.", TURNED),
];

const TABLES: &[Rule] = &[
    Rename("word_embeddings.weight", "tokens.weight"),
    Rename("transformer.word_embeddings.weight", "tokens.weight"),
    Rename("transformer.position_embeddings.weight", "positions.weight"),
    Rename("transformer.block_position_embeddings.weight", "block_positions.weight"),
    Rename("mixins.block_position_embedding.block_position_embeddings.weight", "block_positions.weight"),
    Under("transformer.final_layernorm.", "norm.", LINEAR),
];

/// Keys of the authors' code, whose tables are elsewhere in SwissArmyTransformer's. The hub's uploads have `glm.` before
/// them, some of FlagAI's `model.`.
pub const KEYS: KeyMap =
    KeyMap::new(&[Under("", "", TABLES), Under("transformer.layers.{}.", "blocks.{}.", BLOCK)])
        .with_prefixes(&["glm.", "model."]);

/// The same keys in PaddleNLP's files, where weights are stored the other way round.
pub const PADDLE_KEYS: KeyMap =
    KeyMap::new(&[Under("", "", TABLES), Under("transformer.layers.{}.", "blocks.{}.", PADDLE_BLOCK)])
        .with_prefixes(&["glm."]);

/// The key map of a checkpoint: which side of a fused projection is the longer one tells.
pub fn keys(checkpoint: &dyn Checkpoint) -> &'static KeyMap {
    let is_turned = |entry: &Entry| {
        let fused = entry.name.ends_with("attention.query_key_value.weight");
        fused && matches!(entry.shape[..], [d_in, d_out] if d_out > d_in)
    };
    if checkpoint.entries().iter().any(is_turned) { &PADDLE_KEYS } else { &KEYS }
}

/// The weights of a folder, ranks merged.
///
/// # Errors
/// If there are none, or they are broken.
pub fn checkpoint(folder: &Folder, config: &GlmConfig) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions { vocab_size: Some(config.vocab_size), ..RankOptions::new(megatron::GPT2) };
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), ..OpenOptions::default() })
}

/// GLM as the registry knows it.
pub const SYSTEM: System = System {
    name: "glm",
    about: "language models that fill blanks: GLM from 110M to 10B (Wen Hui)",
    file: "models/glm.rs",
    tasks: &["fill", "generate", "forward"],
    proved: &["glm"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| is_glm(config) && config.text("model_type") != Some("alm"))
    },
    checkpoint: weights,
    describe: describe_folder,
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(generator),
};

/// Whether a configuration is that of a GLM: some of FlagAI's do not name a type.
pub(crate) fn is_glm(config: &Config) -> bool {
    let family = match config.text("model_type") {
        Some(family) => ["glm", "alm"].contains(&family),
        None => config.has("block_position_encoding"),
    };
    family && config.has("num_layers")
}

pub(crate) fn weights(folder: &Folder) -> Result<Box<dyn Checkpoint>, Error> {
    checkpoint(folder, &GlmConfig::of(folder)?)
}

pub(crate) fn describe_folder(folder: &Folder) -> Result<Description, Error> {
    let config = GlmConfig::of(folder)?;
    let checkpoint = checkpoint(folder, &config)?;
    describe_with(checkpoint.as_ref(), &config.init(&Device::flex()), keys(checkpoint.as_ref()))
}

pub(crate) fn generator(
    folder: &Folder,
    options: &LoadOptions,
    device: &Device,
) -> Result<Box<dyn Generator>, Error> {
    let runner = Runner::load(folder, options, device)?;
    runner.steered()?;
    Ok(Box::new(runner))
}

/// What a model cannot do whose folder does not say which tokens are blanks.
pub(crate) const NO_COMMANDS: &str = "write without the ids of its command tokens";

/// How many tokens the forward contract decodes greedily.
const GREEDY: usize = 12;

/// A model behind the forward contract, and one that fills blanks.
pub(crate) struct Runner {
    model: Glm,
    config: GlmConfig,
    commands: Option<Commands>,
}

impl Runner {
    pub(crate) fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let config = GlmConfig::of(folder)?;
        let checkpoint = checkpoint(folder, &config)?;
        let keys = keys(checkpoint.as_ref());
        let model = load(config.init(device), checkpoint.as_ref(), keys, options)?;
        let commands = commands(folder, config.vocab_size)?;
        Ok(Self { model, config, commands })
    }

    /// The command tokens.
    fn steered(&self) -> Result<&Commands, Error> {
        self.commands.as_ref().ok_or(Error::Task { system: SYSTEM.name, task: NO_COMMANDS })
    }
}

/// A text to be read, and what is asked of it.
struct Case {
    name: String,
    input: GlmInput,
    /// Targets and their weights.
    targets: Option<(Tensor<2, Int>, Tensor<2>)>,
}

impl Runner {
    /// The case that the inputs are at.
    fn case(&self, inputs: &mut Inputs, name: &str) -> Option<Case> {
        let GlmConfig { vocab_size, n_positions, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let positions = inputs.ids::<3>("position_ids", n_positions);
        let context = inputs.list("sep", usize::MAX >> 1);
        let targets = inputs.ids::<2>("target_ids", vocab_size);
        let weights = inputs.weights::<2>("loss_mask");
        let ids = ids?;
        let [batch, seq] = ids.dims();
        if let Some(found) = positions.as_ref().map(Tensor::dims)
            && found != [batch, 2, seq]
            && found != [1, 2, seq]
        {
            let name = inputs.full("position_ids");
            inputs.problem(format!("`{name}` is {found:?}, expected [{batch}, 2, {seq}]"));
            return None;
        }
        if positions.is_none() && seq > n_positions {
            let name = inputs.full("input_ids");
            inputs.problem(format!("`{name}` has {seq} tokens, and there are {n_positions} positions"));
        }
        let context = inputs.each_row("sep", context.unwrap_or_else(|| vec![0]), batch)?;
        inputs.like_ids("target_ids", targets.as_ref().map(Tensor::dims), ids.dims());
        inputs.like_ids("loss_mask", weights.as_ref().map(Tensor::dims), ids.dims());
        let (positions, block_positions) = match positions {
            Some(positions) => {
                let table =
                    |which| positions.clone().narrow(1, which, 1).squeeze_dim::<2>(1).expand([batch, seq]);
                (table(0), table(1))
            }
            None => {
                let counted = Tensor::<1, Int>::arange(0..seq as i64, &ids.device());
                (counted.unsqueeze::<2>().expand([batch, seq]), ids.zeros_like())
            }
        };
        let targets = targets.map(|targets| {
            let weights = weights.unwrap_or_else(|| targets.ones_like().float());
            (targets, weights)
        });
        // a text may be said to be longer than it is: all see all then
        let mask = Mask::Prefix(context.into_iter().map(|tokens| tokens.min(seq)).collect());
        let input = GlmInput { ids, positions, block_positions, mask };
        Some(Case { name: name.to_owned(), input, targets })
    }

    /// The text whose first blank is to be filled, of the case that the inputs are at.
    fn prompt(&self, inputs: &mut Inputs) -> Option<(Blanks, &Commands)> {
        let GlmConfig { vocab_size, n_positions, .. } = self.config;
        let ids = inputs.ids::<2>("context_ids", vocab_size)?;
        let name = inputs.full("context_ids");
        let [rows, tokens] = ids.dims();
        if rows != 1 {
            inputs.problem(format!("`{name}` has {rows} rows, expected 1"));
        }
        if tokens + 1 + GREEDY > n_positions {
            inputs.problem(format!("`{name}` has {tokens} tokens, and with {GREEDY} more they are too many"));
        }
        let Some(commands) = &self.commands else {
            inputs.problem(format!("`{name}` needs `command_tokens` in config.json, or a tokenizer"));
            return None;
        };
        let tokens = ids.into_data().convert::<i64>().iter::<i64>().map(|id| id as u32).collect();
        let text = Blanks::new(tokens, commands);
        if text.is_none() {
            inputs.problem(format!("`{name}` has no blank"));
        }
        Some((text?, commands))
    }
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `position_ids` (`[batch, 2, seq]`), `sep` (one number, or one for each row: how many
    /// tokens all see), `target_ids` and `loss_mask`; or `context_ids`, a text with a blank. Any of them may have the name
    /// of a case before it, as `mask.input_ids`.
    ///
    /// Gives `logits`; `block_inputs_and_outputs`, what goes into the first block and comes out of each; `loss`, the
    /// [`masked_loss`] of the targets; and of a context, decoded greedily without a stop, the twelve `tokens` that fill
    /// its first blank.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let (mut cases, mut prompts) = (Vec::new(), Vec::new());
        for name in inputs.cases("input_ids") {
            inputs.enter(&name);
            cases.extend(self.case(&mut inputs, &name));
        }
        for name in inputs.cases("context_ids") {
            inputs.enter(&name);
            prompts.extend(self.prompt(&mut inputs).map(|prompt| (name, prompt)));
        }
        inputs.needed(&["input_ids", "context_ids"]);
        inputs.finish()?;

        let mut outputs = Outputs::new();
        for Case { name, input, targets } in cases {
            let states = self.model.trace(&input);
            let last = states.last().map(|state| self.model.norm.forward(state.clone()));
            let Some(logits) = last.map(|last| self.model.logits(last)) else { continue };
            outputs.push(output(&format!("{name}logits"), logits.clone()));
            outputs.push(output(&format!("{name}block_inputs_and_outputs"), Tensor::stack::<4>(states, 0)));
            if let Some((targets, weights)) = targets {
                outputs.push(output(&format!("{name}loss"), masked_loss(logits, targets, weights)));
            }
        }
        for (name, (text, commands)) in prompts {
            let session = &mut self.model.session(&[text], commands, GREEDY);
            let tokens: Vec<i64> = greedy(session, GREEDY).into_iter().flatten().map(i64::from).collect();
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

    /// The token that begins what fills a blank has a position too.
    fn room(&self, prompt: usize) -> Option<usize> {
        Some(self.config.n_positions.saturating_sub(prompt + 1))
    }

    /// What is written fills the first blank of a prompt, or one put at its end.
    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        let commands = self.steered()?;
        let text = |prompt: &Vec<u32>| Blanks::or_appended(prompt.clone(), commands);
        let texts: Option<Vec<Blanks>> = prompts.iter().map(text).collect();
        self.fill(&texts.ok_or(Error::Task { system: SYSTEM.name, task: NO_COMMANDS })?, max_new)
    }

    fn commands(&self) -> Option<&Commands> {
        self.commands.as_ref()
    }

    fn fill<'a>(&'a self, texts: &[Blanks], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        let commands = self.steered()?;
        let rows: Vec<Vec<u32>> = texts.iter().map(|text| Row::of(text, commands).ids).collect();
        check_prompts(self, &rows, max_new)?;
        Ok(Box::new(self.model.session(texts, commands, max_new)))
    }
}

/// The authors' `model_blocklm_*.sh` and the hub's configurations: base, for the vocabulary of BERT.
const BASE: GlmConfig = GlmConfig {
    vocab_size: 30592,
    n_positions: 513,
    d_model: 768,
    n_layers: 12,
    n_heads: 12,
    layer_norm_eps: 1e-5,
};
pub(crate) const LARGE: GlmConfig = GlmConfig { d_model: 1024, n_layers: 24, n_heads: 16, ..BASE };
const M410: GlmConfig = GlmConfig { n_layers: 30, ..LARGE };
const M515: GlmConfig = GlmConfig { d_model: 1152, n_heads: 18, ..M410 };
/// For the vocabulary of GPT-2.
const ROBERTA_LARGE: GlmConfig = GlmConfig { vocab_size: 50304, ..LARGE };
const B2: GlmConfig =
    GlmConfig { n_positions: 1025, d_model: 2048, n_layers: 36, n_heads: 32, ..ROBERTA_LARGE };
const B10: GlmConfig = GlmConfig { d_model: 4096, n_layers: 48, n_heads: 64, ..B2 };
/// For that of CogView.
const LARGE_CHINESE: GlmConfig = GlmConfig { vocab_size: 50048, n_positions: 1025, ..LARGE };
const B10_CHINESE: GlmConfig = GlmConfig { vocab_size: 50048, ..B10 };

const fn preset(name: &'static str, weights: Weights, config: GlmConfig, parameters: usize) -> Preset {
    let source = "GLMModel of FlagAI 1.8.4";
    Preset { name, shape: Shape::Glm(config), weights, license: "MIT", parameters, source }
}

/// The links of the authors' repository.
const LINKED: Weights = Weights::Elsewhere("github.com/THUDM/GLM");

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("blocklm-base-blank", LINKED, BASE, 109_338_624),
    preset("blocklm-large-blank", LINKED, LARGE, 334_688_256),
    preset("blocklm-1.25-generation", LINKED, M410, 410_265_600),
    preset("THUDM/glm-515m", Weights::Hub, M515, 514_632_960),
    preset("THUDM/glm-roberta-large", Weights::Hub, ROBERTA_LARGE, 354_873_344),
    preset("THUDM/glm-2b", Weights::Hub, B2, 1_920_122_880),
    preset("THUDM/glm-10b", Weights::Hub, B10, 9_880_682_496),
    preset("THUDM/glm-large-chinese", Weights::Hub, LARGE_CHINESE, 355_659_776),
    preset("THUDM/glm-10b-chinese", Weights::Hub, B10_CHINESE, 9_879_633_920),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::Tolerance;
    use volary_text::infill::{fill, likelihoods};
    use volary_weights::{parameters, read_tensors, save};

    use super::*;

    const TINY: GlmConfig =
        GlmConfig { vocab_size: 50, n_positions: 33, d_model: 12, n_layers: 2, n_heads: 3, ..BASE };
    const COMMANDS: Commands = Commands {
        span: Some(40),
        sentence: Some(41),
        document: Some(42),
        start: 43,
        end: 44,
        first: Some(45),
        last: Some(46),
    };

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/glm")
    }

    fn trained() -> Runner {
        Runner::load(&Folder::Disk(fixture()), &LoadOptions::default(), &Device::flex()).unwrap()
    }

    fn blanks(ids: &[u32]) -> Blanks {
        Blanks::new(ids.to_vec(), &COMMANDS).unwrap()
    }

    fn ids(rows: &[&[i64]]) -> Tensor<2, Int> {
        let flat: Vec<i64> = rows.concat();
        Tensor::from_data(TensorData::new(flat, [rows.len(), rows[0].len()]), &Device::flex())
    }

    fn run(inputs: &[(&str, TensorData)]) -> Result<Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
        crate::registry::forward(&Folder::Disk(fixture()), &inputs, &LoadOptions::default(), &Device::flex())
    }

    #[test]
    fn every_parameter_has_a_key_and_every_key_leads_back_to_it() {
        for keys in [KEYS, PADDLE_KEYS] {
            for parameter in parameters(&TINY.init(&Device::flex())) {
                let found = keys.keys(&parameter.path).unwrap();
                assert_eq!(found.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&found[0]).unwrap().contains(&parameter.path));
            }
        }
        let of = |key| KEYS.paths(key).unwrap();
        assert_eq!(of("transformer.word_embeddings.weight"), ["tokens.weight"]);
        assert_eq!(
            of("mixins.block_position_embedding.block_position_embeddings.weight"),
            ["block_positions.weight"]
        );
    }

    /// As `convert.py` of PaddleNLP makes them: `glm.` before every key, and weights but tables turned.
    #[test]
    fn paddles_files_are_read_as_the_authors_are() {
        const PREFIXED: KeyMap = KeyMap::new(&[Under("glm.", "", PADDLE_KEYS.rules)]);
        let model = trained().model;
        let folder = tempfile::tempdir().unwrap();
        std::fs::copy(fixture().join("config.json"), folder.path().join("config.json")).unwrap();
        let file = folder.path().join("model.safetensors");
        save(&model, &PREFIXED, None, &file, None).unwrap();
        let stored = read_tensors(&file).unwrap();
        let shape =
            |key: &str| stored[&format!("glm.transformer.layers.0.{key}")].shape().as_slice().to_vec();
        assert_eq!(shape("attention.query_key_value.weight"), [32, 96]);
        assert_eq!(shape("mlp.dense_h_to_4h.weight"), [32, 128]);
        let folder = Folder::Disk(folder.path().to_owned());
        let read = Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap().model;
        let tensors = |model: &Glm| {
            let block = &model.blocks[1];
            let linears =
                [&block.attention.query, &block.attention.value, &block.attention.output, &block.mlp.up];
            linears.map(|linear| linear.weight.val().into_data())
        };
        assert_eq!(tensors(&read), tensors(&model));
        assert!((SYSTEM.describe)(&folder).unwrap().problems.is_empty());
    }

    /// The hub's file with `glm.` before its keys, and the authors' tensor-parallel ranks, which FlagAI's configurations
    /// without a type may go with.
    #[test]
    fn every_public_form_of_the_weights_is_read() {
        let inputs = read_tensors(&fixture().join("inputs.safetensors")).unwrap();
        let scores = |folder: &Path| {
            let folder = Folder::Disk(folder.to_owned());
            let outputs =
                crate::registry::forward(&folder, &inputs, &LoadOptions::default(), &Device::flex()).unwrap();
            outputs.into_iter().find(|(name, _)| name == "mask.logits").unwrap().1
        };
        let expected = scores(&fixture());
        let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
        let untyped = config.replace(r#""model_type": "glm","#, "");
        for (config, files) in [
            (&config, &[("pytorch_model.bin", "pytorch_model.bin")][..]),
            (
                &untyped,
                &[
                    ("blocklm/250000/mp_rank_00_model_states.pt", "250000/mp_rank_00_model_states.pt"),
                    ("blocklm/250000/mp_rank_01_model_states.pt", "250000/mp_rank_01_model_states.pt"),
                ],
            ),
        ] {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("config.json"), config).unwrap();
            for (from, to) in files {
                let to = folder.path().join(to);
                std::fs::create_dir_all(to.parent().unwrap()).unwrap();
                std::fs::copy(fixture().join(from), to).unwrap();
            }
            assert_eq!(scores(folder.path()), expected, "{files:?}");
            assert_eq!(System::of(&Folder::Disk(folder.path().to_owned())).unwrap().name, "glm");
        }
    }

    #[test]
    fn a_row_is_the_text_then_what_fills_its_blanks() {
        let mut text = blanks(&[45, 7, 40, 8, 42]);
        let row = Row::of(&text, &COMMANDS);
        assert_eq!(row.ids, [45, 7, 40, 8, 42, 43]);
        assert_eq!(row.places[4..], [[4, 0], [2, 1]]);
        assert_eq!([row.place(6), row.place(7)], [[2, 2], [2, 3]]);
        text.fill(vec![9, 10]);
        let row = Row::of(&text, &COMMANDS);
        assert_eq!(row.ids, [45, 7, 40, 8, 42, 43, 9, 10, 43]);
        assert_eq!(row.places[5..], [[2, 1], [2, 2], [2, 3], [4, 1]]);
        assert_eq!(row.context, 5);
    }

    /// The whole of a row at once, as it is trained: the text, all spans, and one more token after the other.
    fn whole(model: &Glm, text: &Blanks, written: &[u32], commands: &Commands) -> Tensor<2> {
        let mut row = Row::of(text, commands);
        row.ids.extend_from_slice(written);
        let places: Vec<[usize; 2]> = (0..row.ids.len()).map(|token| row.place(token)).collect();
        let table =
            |which: usize| ids(&[&places.iter().map(|place| place[which] as i64).collect::<Vec<_>>()]);
        let tokens: Vec<i64> = row.ids.iter().map(|&id| i64::from(id)).collect();
        let states = model.forward(GlmInput {
            ids: ids(&[&tokens]),
            positions: table(0),
            block_positions: table(1),
            mask: Mask::Prefix(vec![row.context]),
        });
        model.logits(states.narrow(1, tokens.len() - 1, 1)).squeeze_dim(1)
    }

    /// A trained reference too: with caches or without, several texts of several lengths at once or one alone, of which
    /// one already has a blank filled.
    #[test]
    fn what_is_written_with_caches_is_what_the_whole_text_says() {
        let Runner { model, commands, .. } = trained();
        let commands = commands.unwrap();
        let mut second = Blanks::new(vec![82, 18, 83, 51, 54, 83, 65, 29, 80], &commands).unwrap();
        second.fill(vec![60, 61, 62]);
        let texts = [
            Blanks::new(vec![82, 8, 88], &commands).unwrap(),
            second,
            Blanks::new(vec![82, 16, 4, 87, 41, 27, 80], &commands).unwrap(),
        ];
        let together = greedy(&mut model.session(&texts, &commands, 6), 6);
        for (text, together) in texts.iter().zip(together) {
            let mut written = Vec::new();
            for _ in 0..6 {
                let scores = whole(&model, text, &written, &commands);
                written.push(scores.argmax(1).into_scalar::<i64>() as u32);
            }
            assert_eq!(written, together);
        }
    }

    #[test]
    fn a_session_goes_on_from_selected_rows() {
        let model = TINY.init(&Device::flex());
        let texts = [blanks(&[45, 3, 40, 5, 46]), blanks(&[45, 40])];
        let mut session = model.session(&texts, &COMMANDS, 3);
        session.start();
        session.read(&[7, 8]);
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (row, (text, written)) in [(1, [8, 9]), (0, [7, 9]), (1, [8, 10])].into_iter().enumerate() {
            let alone = whole(&model, &texts[text], &written, &COMMANDS).into_data();
            let chosen = chosen.clone().narrow(0, row, 1).into_data();
            chosen.assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-4));
        }
    }

    /// The text knows nothing of what fills its blanks, and all of it what lies ahead.
    #[test]
    fn the_text_is_read_in_both_directions_and_what_fills_it_in_one() {
        let model = TINY.init(&Device::flex());
        let states = |tokens: [i64; 6]| {
            model.forward(GlmInput {
                ids: ids(&[&tokens]),
                positions: ids(&[&[0, 1, 2, 1, 1, 1]]),
                block_positions: ids(&[&[0, 0, 0, 1, 2, 3]]),
                mask: Mask::Prefix(vec![3]),
            })
        };
        let same = |a: &Tensor<3>, b: &Tensor<3>, first: usize, count: usize| {
            let of = |x: &Tensor<3>| x.clone().narrow(1, first, count);
            (of(a) - of(b)).abs().max().into_scalar::<f32>() < 1e-5
        };
        let base = states([45, 40, 3, 43, 5, 6]);
        let later = states([45, 40, 3, 43, 5, 9]);
        assert!(same(&base, &later, 0, 5) && !same(&base, &later, 5, 1));
        let ahead = states([45, 40, 7, 43, 5, 6]);
        assert!(!same(&base, &ahead, 0, 1));
    }

    /// Each blank is filled with those before it in sight: as greedy decoding of the whole says.
    #[test]
    fn several_blanks_are_filled_in_order() {
        let model = TINY.init(&Device::flex());
        let write = |text: &Blanks| {
            Ok::<_, ()>(greedy(&mut model.session(std::slice::from_ref(text), &COMMANDS, 3), 3).remove(0))
        };
        let mut text = blanks(&[45, 3, 40, 5, 41, 46]);
        fill(&mut text, write).unwrap();
        let spans: Vec<_> = text.filled().map(|(at, span)| (at, span.to_vec())).collect();
        assert_eq!(spans.iter().map(|(at, span)| (*at, span.len())).collect::<Vec<_>>(), [(2, 3), (4, 3)]);
        let mut second = blanks(&[45, 3, 40, 5, 41, 46]);
        second.fill(spans[0].1.clone());
        for step in 0..3 {
            let scores = whole(&model, &second, &spans[1].1[..step], &COMMANDS);
            assert_eq!(scores.argmax(1).into_scalar::<i64>() as u32, spans[1].1[step]);
        }
    }

    /// A candidate's likelihood is the product of its tokens' probabilities, each after those before it.
    #[test]
    fn candidates_for_a_blank_are_scored() {
        let model = TINY.init(&Device::flex());
        let text = blanks(&[45, 3, 40, 5, 46]);
        let candidates = [vec![7, 8, 9], vec![10], vec![7, 11]];
        let mut session = model.session(&vec![text.clone(); 3], &COMMANDS, 3);
        let found = likelihoods(&mut session, &candidates).unwrap();
        for (found, candidate) in found.into_iter().zip(&candidates) {
            let mut expected = 0.0;
            for (step, &token) in candidate.iter().enumerate() {
                let chances = log_softmax(whole(&model, &text, &candidate[..step], &COMMANDS), 1);
                expected += chances.narrow(1, token as usize, 1).into_scalar::<f64>();
            }
            assert!((found.sum - expected).abs() < 1e-4, "{found:?}, expected {expected}");
        }
    }

    /// A single `sep` is that of every row, and without one and without positions a text is read from left to right.
    #[test]
    fn what_is_not_given_has_the_references_defaults() {
        let tokens = ids(&[&[82, 5, 6, 7], &[82, 8, 9, 1]]);
        let logits = |more: &[(&str, TensorData)]| {
            let inputs = [&[("input_ids", tokens.to_data())], more].concat();
            run(&inputs).unwrap().swap_remove(0).1
        };
        let both = TensorData::from([3i64, 3]);
        let expected = logits(&[("sep", both)]);
        assert_eq!(logits(&[("sep", TensorData::new(vec![3i64], [0; 0]))]), expected);
        assert_eq!(logits(&[("sep", TensorData::from([3i64]))]), expected);
        let causal = logits(&[("sep", TensorData::from([0i64]))]);
        assert_eq!(logits(&[]), causal);
        let positions = TensorData::from([[[0i64, 1, 2, 3], [0, 0, 0, 0]]]);
        assert_eq!(logits(&[("position_ids", positions)]), causal);
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let data = |rows: &[&[i64]]| ids(rows).into_data();
        for (inputs, named) in [
            (vec![], &["`input_ids` is missing"][..]),
            (
                vec![
                    ("a.input_ids", data(&[&[3, 96]])),
                    ("b.input_ids", data(&[&[3, 4]])),
                    ("b.position_ids", TensorData::from([[[0i64, 33], [0, 0]]])),
                    ("b.sep", TensorData::from([1i64, 2, 3])),
                    ("b.target_ids", data(&[&[3]])),
                    ("context_ids", data(&[&[3, 4]])),
                    ("c.context_ids", data(&[&[83; 30]])),
                    ("d.sep", TensorData::from([1i64])),
                ],
                &[
                    "`a.input_ids` holds 96, expected 0 to 95",
                    "`b.position_ids` holds 33, expected 0 to 32",
                    "`b.sep` has 3 numbers, expected one, or one for each of 1 rows",
                    "`context_ids` has no blank",
                    "`c.context_ids` has 30 tokens",
                    "`d.sep` is not one of",
                ],
            ),
            (
                vec![
                    ("input_ids", data(&[&[3; 34]])),
                    ("target_ids", data(&[&[3]])),
                    ("loss_mask", TensorData::from([[1f32]])),
                ],
                &["`input_ids` has 34 tokens", "`target_ids` is [1, 1]", "`loss_mask` is [1, 1]"],
            ),
            (
                vec![("input_ids", data(&[&[3, 4]])), ("position_ids", TensorData::from([[[0i64, 1]]]))],
                &["`position_ids` is [1, 1, 2], expected [1, 2, 2]"],
            ),
        ] {
            let message = run(&inputs).unwrap_err().to_string();
            for part in named {
                assert!(message.contains(part), "{part}: {message}");
            }
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""relative_encoding": true"#, "`relative_encoding`"),
            (r#""block_position_encoding": false"#, "`block_position_encoding`"),
            (r#""max_memory_length": 8"#, "`max_memory_length`"),
            (r#""hidden_size": 30"#, "`num_attention_heads`: expected a divisor of 30"),
            (r#""num_layers": 2000000000"#, "`num_layers`: expected at most 1000 blocks"),
        ] {
            let config = Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap();
            let message = GlmConfig::parse(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    /// What the commands that write text see: prompts with and without a blank, and those that are too long.
    #[test]
    fn the_generator_fills_the_first_blank_of_a_prompt() {
        let folder = Folder::Disk(fixture());
        let writer = generator(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
        let reference = read_tensors(&fixture().join("outputs.safetensors")).unwrap();
        let expected: Vec<u32> =
            reference["greedy_gmask.tokens"].iter::<i64>().map(|token| token as u32).collect();
        let context = [82, 8, 70, 57, 63, 53, 46, 88];
        for prompt in [&context[..], &context[..7]] {
            let mut session = writer.session(&[prompt.to_vec()], 12).unwrap();
            assert_eq!(greedy(session.as_mut(), 12)[0], expected);
        }
        let message = writer.session(&[vec![82; 30], vec![96]], 12).err().unwrap().to_string();
        assert!(
            message.contains("prompt 0 has 30 tokens") && message.contains("prompt 1 holds 96"),
            "{message}"
        );
        let commands = writer.commands().unwrap();
        assert_eq!(commands.ends(), [86, 80]);
        let text = Blanks::new(context.to_vec(), commands).unwrap();
        assert_eq!(greedy(writer.fill(&[text], 12).unwrap().as_mut(), 12), [expected]);
    }

    #[test]
    fn alm_is_a_glm_of_its_own_name() {
        let folder = tempfile::tempdir().unwrap();
        let config = std::fs::read_to_string(fixture().join("config.json")).unwrap();
        std::fs::write(folder.path().join("config.json"), config.replace(r#""glm""#, r#""alm""#)).unwrap();
        save(&trained().model, &KEYS, None, &folder.path().join("model.safetensors"), None).unwrap();
        let folder = Folder::Disk(folder.path().to_owned());
        let system = System::of(&folder).unwrap();
        assert_eq!(system.name, "alm");
        assert!((system.describe)(&folder).unwrap().problems.is_empty());
        assert!((system.generator.unwrap())(&folder, &LoadOptions::default(), &Device::flex()).is_ok());
    }
}
