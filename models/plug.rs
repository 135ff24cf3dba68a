//! PLUG: Chinese text written by a decoder over a bidirectional encoder (Alibaba 2021; StructBERT, Wang et al. 2019,
//! <https://arxiv.org/abs/1908.04577>, below PALM, Bi et al. 2020, <https://arxiv.org/abs/2004.07159>). Its 27 billion
//! parameters are given to those who apply.
//!
//! The numbers match AliceMind's `PalmForPreTraining`. Its tensor-parallel files (`mp_rank_00_model_states.pt`, ...) and
//! one file of the same names are read.
//!
//! ```sh
//! volary forward path/to/plug --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, KvCache, LayerNorm, Linear, LinearConfig, Mlp, MlpConfig,
    PreNormBlock, TiedHead,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_text::generate::{RightPadded, Session, column, indices};
use volary_weights::format::{Checkpoint, MegatronLayout, Merge, OpenOptions, RankOptions};
use volary_weights::{KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Split, Under};

use crate::bert::BERT_HEAD;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder with its decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct PlugConfig {
    /// Number of tokens, with those that make the table divisible.
    pub vocab_size: usize,
    /// Number of positions in the table.
    pub n_positions: usize,
    /// Number of segments that a token may belong to.
    pub n_token_types: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of the encoder's blocks.
    pub n_layers: usize,
    /// Number of the decoder's blocks.
    pub n_decoder_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// The MLP's activation, and the head's.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// The tokens that mean something to the loop that writes.
    pub special: Special,
}

/// The tokens that mean something to the loop that writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Special {
    /// `[CLS]`, before a passage and before what is written.
    pub start: u32,
    /// `[SEP]`, after a passage and after what is written.
    pub end: u32,
    /// `[UNK]`, in place of tokens that no word has.
    pub unknown: u32,
    /// So many tokens have words.
    pub words: u32,
}

impl Special {
    /// The Chinese vocabulary of Google's BERT.
    pub const CHINESE_BERT: Self = Self { start: 101, end: 102, unknown: 100, words: 21128 };
}

/// An encoder with its decoder.
#[derive(Module, Debug)]
pub struct Plug {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`.
    pub positions: Embedding,
    /// `[n_token_types, d_model]`.
    pub token_types: Embedding,
    /// On the sum of the three.
    pub embedding_norm: LayerNorm,
    /// The encoder's blocks.
    pub encoder: Vec<PreNormBlock>,
    /// After the encoder.
    pub encoder_norm: LayerNorm,
    /// The decoder's blocks.
    pub decoder: Vec<PlugBlock>,
    /// After the decoder.
    pub decoder_norm: LayerNorm,
    /// The encoder's scores of hidden tokens.
    pub head: TiedHead,
    /// `[3, d_model]`, on the first token: does the second sentence follow the first, precede it, or neither.
    pub order: Linear,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    start: u32,
}

/// A pre-norm block of the decoder.
#[derive(Module, Debug)]
pub struct PlugBlock {
    /// Before the self-attention.
    pub norm1: LayerNorm,
    /// Over what is written.
    pub attention: Attention,
    /// Before the cross-attention.
    pub norm2: LayerNorm,
    /// Over the encoder's states.
    pub cross: Attention,
    /// Before the MLP.
    pub norm3: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
}

/// How often the norm after the encoder is applied.
///
/// The reference writes text with activation checkpointing turned off, where its code applies the norm twice. It was
/// trained with checkpointing, where it is applied once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalNorm {
    /// As in training.
    Once,
    /// As in the reference's inference.
    Twice,
}

/// A batch of passages.
#[derive(Clone, Debug)]
pub struct PlugInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// The segment of each token, `[batch, seq]`; all 0 when `None`.
    pub token_types: Option<Tensor<2, Int>>,
    /// Which tokens are real, as [`Mask::Padding`].
    pub mask: Mask,
}

/// What the decoder sees of a batch of passages: keys and values of each of its blocks.
#[derive(Clone, Debug)]
pub struct PlugMemory {
    /// Each `[batch, n_heads, seq, d_head]`.
    pub keys_values: Vec<(Tensor<4>, Tensor<4>)>,
    /// Which tokens are real.
    pub mask: Mask,
}

impl PlugConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Plug {
        let Self { vocab_size, d_model, d_ff, n_heads, activation, layer_norm_eps, .. } = *self;
        let norm = || LayerNorm::new(d_model, layer_norm_eps, device);
        let table = |rows| Embedding::new(rows, d_model, 0.02, device);
        let attention = || AttentionConfig::new(d_model, n_heads).init(device);
        let block = |_| PlugBlock {
            norm1: norm(),
            attention: attention(),
            norm2: norm(),
            cross: attention(),
            norm3: norm(),
            mlp: MlpConfig::new(d_model, d_ff).init(device),
        };
        let encoder = |_| PreNormBlock::new(d_model, d_ff, n_heads, activation, layer_norm_eps, device);
        Plug {
            tokens: table(vocab_size),
            positions: table(self.n_positions),
            token_types: table(self.n_token_types),
            embedding_norm: norm(),
            encoder: (0..self.n_layers).map(encoder).collect(),
            encoder_norm: norm(),
            decoder: (0..self.n_decoder_layers).map(block).collect(),
            decoder_norm: norm(),
            head: TiedHead::new(d_model, vocab_size, layer_norm_eps, device),
            order: LinearConfig::new(d_model, 3).init(device),
            activation,
            start: self.special.start,
        }
    }
}

impl PlugBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`. The cache, if there is one, holds what was written before.
    pub fn forward(
        &self,
        x: Tensor<3>,
        mask: &Mask,
        memory: (&(Tensor<4>, Tensor<4>), &Mask),
        activation: Activation,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let normed = self.norm1.forward(x.clone());
        let attended = match cache {
            Some(cache) => self.attention.cached(normed, cache, mask),
            None => self.attention.forward(normed, mask),
        };
        let (x, normed) = self.norm2.add(x, attended);
        let ((key, value), seen) = memory;
        let query = self.cross.queries(normed);
        let crossed = self.cross.merge(ops::attention(query, key.clone(), value.clone(), seen, None));
        let (x, normed) = self.norm3.add(x, crossed);
        x + self.mlp.forward(normed, activation)
    }
}

impl Plug {
    /// The encoder's states: `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id or a type is outside its table, a text is too long, or shapes differ.
    pub fn encode(&self, input: PlugInput, norm: FinalNorm) -> Tensor<3> {
        let PlugInput { ids, token_types, mask } = input;
        let x = self.embed(ids, token_types, 0);
        let x = self.encoder.iter().fold(x, |x, block| block.forward(x, &mask));
        let x = self.encoder_norm.forward(x);
        match norm {
            FinalNorm::Once => x,
            FinalNorm::Twice => self.encoder_norm.forward(x),
        }
    }

    /// What the decoder sees of the encoder's states `[batch, seq, d_model]`, whose padding `mask` hides.
    pub fn remember(&self, states: &Tensor<3>, mask: Mask) -> PlugMemory {
        let keys_values = self.decoder.iter().map(|block| block.cross.keys_values(states.clone())).collect();
        PlugMemory { keys_values, mask }
    }

    /// The decoder's states of whole texts, `[batch, seq, d_model]`; the mask is of the texts themselves.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, a text is too long, or shapes differ.
    pub fn decode(&self, ids: Tensor<2, Int>, mask: &Mask, memory: &PlugMemory) -> Tensor<3> {
        let x = self.embed(ids, None, 0);
        let layers = self.decoder.iter().zip(&memory.keys_values);
        let x = layers
            .fold(x, |x, (block, seen)| block.forward(x, mask, (seen, &memory.mask), self.activation, None));
        self.decoder_norm.forward(x)
    }

    /// The decoder's scores of the next token: `[..., d_model] -> [..., vocab_size]`.
    pub fn logits<const D: usize>(&self, states: Tensor<D>) -> Tensor<D> {
        self.tokens.scores(states)
    }

    /// The encoder's scores of the token at every place: `[batch, seq, d_model] -> [batch, seq, vocab_size]`.
    pub fn predictions(&self, states: Tensor<3>) -> Tensor<3> {
        self.head.forward(states, self.tokens.weight.val(), self.activation)
    }

    /// Scores of the three orders of two sentences, by the encoder's first state:
    /// `[batch, seq, d_model] -> [batch, 3]`.
    pub fn order(&self, states: Tensor<3>) -> Tensor<2> {
        self.order.forward(states.narrow(1, 0, 1).squeeze_dim::<2>(1))
    }

    /// Texts of at most `max_new` tokens about these passages, which are encoded once.
    ///
    /// # Panics
    /// If there is no passage, one is empty, too long, or an id is outside the vocabulary.
    pub fn session(&self, passages: &[impl AsRef<[u32]>], max_new: usize) -> PlugSession<'_> {
        let RightPadded { ids, real } = RightPadded::new(passages, &self.tokens.weight.device());
        let mask = real.map_or(Mask::Full, Mask::Padding);
        let states = self.encode(PlugInput { ids, token_types: None, mask: mask.clone() }, FinalNorm::Twice);
        let caches = self.decoder.iter().map(|_| KvCache::new(1 + max_new)).collect();
        PlugSession { model: self, rows: passages.len(), memory: self.remember(&states, mask), caches }
    }

    /// Writes on after a passage (its tokens, without special ones), as far as `chunks` goes; `pick` chooses among the
    /// scores `[1, vocab_size]`.
    ///
    /// # Panics
    /// If an id or a special token is outside the vocabulary, or the table of positions is shorter than a passage.
    pub fn write(&self, mut chunks: Chunks, mut pick: impl FnMut(&Tensor<2>) -> u32) -> Vec<u32> {
        'passage: loop {
            let mut session = self.session(&[chunks.passage()], Chunks::CHUNK);
            let mut scores = session.start();
            loop {
                match chunks.draw(pick(&scores)) {
                    Drawn::Again => {}
                    Drawn::Read(token) => scores = session.read(&[token]),
                    Drawn::Restart => continue 'passage,
                    Drawn::Done => return chunks.text(),
                }
            }
        }
    }

    fn embed(&self, ids: Tensor<2, Int>, token_types: Option<Tensor<2, Int>>, first: usize) -> Tensor<3> {
        let [batch, seq] = ids.dims();
        let places = Tensor::<1, Int>::arange(first as i64..(first + seq) as i64, &ids.device());
        let token_types = token_types.unwrap_or_else(|| ids.zeros_like());
        let x = self.tokens.forward(ids)
            + self.positions.forward(places.unsqueeze::<2>().expand([batch, seq]))
            + self.token_types.forward(token_types);
        self.embedding_norm.forward(x)
    }
}

/// Texts that the decoder is writing.
pub struct PlugSession<'a> {
    model: &'a Plug,
    rows: usize,
    memory: PlugMemory,
    caches: Vec<KvCache>,
}

impl PlugSession<'_> {
    fn append(&mut self, tokens: &[u32]) -> Tensor<2> {
        let PlugSession { model, memory, caches, .. } = self;
        let written = caches.first().map_or(0, KvCache::len);
        let x = model.embed(column(tokens, &model.tokens.weight.device()), None, written);
        let layers = model.decoder.iter().zip(&memory.keys_values).zip(caches);
        let x = layers.fold(x, |x, ((block, seen), cache)| {
            block.forward(x, &Mask::Full, (seen, &memory.mask), model.activation, Some(cache))
        });
        model.logits(model.decoder_norm.forward(x).squeeze_dim::<2>(1))
    }
}

impl Session for PlugSession<'_> {
    fn start(&mut self) -> Tensor<2> {
        self.append(&vec![self.model.start; self.rows])
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        self.append(tokens)
    }

    fn select(&mut self, rows: &[usize]) {
        self.rows = rows.len();
        let rows = indices(rows, &self.model.tokens.weight.device());
        for (key, value) in &mut self.memory.keys_values {
            *key = key.clone().select(0, rows.clone());
            *value = value.clone().select(0, rows.clone());
        }
        if let Mask::Padding(real) = &mut self.memory.mask {
            // as numbers: selected truth values cannot be negated on the CPU
            *real = real.clone().int().select(0, rows.clone()).equal_elem(1);
        }
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

/// What PLUG does to write more than its decoder learned to: after every 128 tokens drawn, what was written since the
/// last time is put after the passage, of which the last 512 tokens are kept, and the decoder begins anew.
///
/// The token that ends a text is passed over until 80 % of the wanted length is there.
///
/// ```
/// use volary::plug::{Chunks, Drawn, Special};
///
/// let mut chunks = Chunks::new(&[7, 8], 10, Special::CHINESE_BERT);
/// assert_eq!(chunks.passage(), [101, 7, 8, 102]);
/// assert_eq!(chunks.draw(55), Drawn::Read(55));
/// assert_eq!(chunks.draw(102), Drawn::Again); // too early
/// ```
#[derive(Clone, Debug)]
pub struct Chunks {
    passage: Vec<u32>,
    /// Written since the passage last grew.
    chunk: Vec<u32>,
    text: Vec<u32>,
    drawn: usize,
    length: usize,
    special: Special,
}

/// What is to be done with a token that was drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drawn {
    /// Another one is drawn by the same scores.
    Again,
    /// This one, which may be another than was drawn, is written and read by the decoder.
    Read(u32),
    /// The passage has changed: it is encoded, and the decoder begins anew.
    Restart,
    /// The text is done.
    Done,
}

impl Chunks {
    /// So many tokens are drawn before the decoder begins anew.
    pub const CHUNK: usize = 128;
    /// The longest passage, special tokens included.
    pub const PASSAGE: usize = 512;

    /// To write `length` tokens, at least one, on after the last 510 tokens of a passage.
    pub fn new(passage: &[u32], length: usize, special: Special) -> Self {
        let kept = &passage[passage.len().saturating_sub(Self::PASSAGE - 2)..];
        Self {
            passage: [&[special.start], kept, &[special.end]].concat(),
            chunk: Vec::new(),
            text: Vec::new(),
            drawn: 0,
            length: length.max(1),
            special,
        }
    }

    /// What the encoder is to read.
    pub fn passage(&self) -> &[u32] {
        &self.passage
    }

    /// What is written so far; of unknown tokens in a row there is one.
    pub fn text(&self) -> Vec<u32> {
        let mut text = self.text.clone();
        text.dedup_by(|a, b| *a == self.special.unknown && a == b);
        text
    }

    /// Takes the token that was drawn.
    pub fn draw(&mut self, token: u32) -> Drawn {
        let Special { end, unknown, words, .. } = self.special;
        let token = if token < words { token } else { unknown };
        if token == end && self.text.len() > self.length * 4 / 5 {
            return Drawn::Done;
        }
        if token != end {
            self.chunk.push(token);
            self.text.push(token);
        }
        self.drawn += 1;
        if self.drawn >= self.length {
            return Drawn::Done;
        }
        if self.drawn.is_multiple_of(Self::CHUNK) {
            grow(&mut self.passage, &mut self.chunk, end, Self::PASSAGE);
            return Drawn::Restart;
        }
        if token == end { Drawn::Again } else { Drawn::Read(token) }
    }
}

/// Appends what was written to a passage, before its end token, and keeps the last `most` tokens.
fn grow(passage: &mut Vec<u32>, written: &mut Vec<u32>, end: u32, most: usize) {
    passage.pop_if(|last| *last == end);
    passage.append(written);
    passage.push(end);
    passage.drain(..passage.len().saturating_sub(most));
}

/// Texts of any length: after every [`Chunks::CHUNK`] tokens the passages grow by them, and the decoder begins anew.
struct LongSession<'a> {
    model: &'a Plug,
    session: PlugSession<'a>,
    passages: Vec<Vec<u32>>,
    /// Of each row, what was read since its passage last grew.
    written: Vec<Vec<u32>>,
    /// How many tokens the decoder writes before it begins anew, and how many a passage has at most.
    limits: [usize; 2],
    end: u32,
}

impl<'a> LongSession<'a> {
    fn new(model: &'a Plug, passages: &[Vec<u32>], config: &PlugConfig) -> Self {
        let limits = [Chunks::CHUNK.min(config.n_positions - 1), Chunks::PASSAGE.min(config.n_positions)];
        Self {
            model,
            session: model.session(passages, limits[0]),
            passages: passages.to_vec(),
            written: vec![Vec::new(); passages.len()],
            limits,
            end: config.special.end,
        }
    }
}

impl Session for LongSession<'_> {
    fn start(&mut self) -> Tensor<2> {
        self.session.start()
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        self.written.iter_mut().zip(tokens).for_each(|(written, &token)| written.push(token));
        let [chunk, passage] = self.limits;
        if self.written.iter().all(|written| written.len() < chunk) {
            return self.session.read(tokens);
        }
        for (grown, written) in self.passages.iter_mut().zip(&mut self.written) {
            grow(grown, written, self.end, passage);
        }
        self.session = self.model.session(&self.passages, chunk);
        self.session.start()
    }

    fn select(&mut self, rows: &[usize]) {
        self.session.select(rows);
        self.passages = rows.iter().map(|&row| self.passages[row].clone()).collect();
        self.written = rows.iter().map(|&row| self.written[row].clone()).collect();
    }
}

impl PlugConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` with the fields of AliceMind's configuration; what it leaves out has the values of the 27 billion.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let d_model = config.size_or("hidden_size", LARGE.d_model)?;
        let n_heads = config.size_or("num_attention_heads", LARGE.n_heads)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        Ok(Self {
            vocab_size: config.size_or("vocab_size", LARGE.vocab_size)?,
            n_positions: config.size_or("max_position_embeddings", LARGE.n_positions)?,
            n_token_types: config.size_or("type_vocab_size", LARGE.n_token_types)?,
            d_model,
            d_ff: config.size_or("intermediate_size", LARGE.d_ff)?,
            n_layers: config.blocks_or("num_hidden_layers", LARGE.n_layers)?,
            n_decoder_layers: config.blocks_or("dec_hidden_layers", LARGE.n_decoder_layers)?,
            n_heads,
            activation: config.activation_or("hidden_act", LARGE.activation)?,
            layer_norm_eps: config.number_or("layernorm_epsilon", LARGE.layer_norm_eps)?,
            special: Special::CHINESE_BERT,
        })
    }
}

const NAMED: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

const QKV: &[Rule] = &[
    Split("query_key_value.weight", &["query.weight", "key.weight", "value.weight"]),
    Split("query_key_value.bias", &["query.bias", "key.bias", "value.bias"]),
];

const ENCODER_BLOCK: &[Rule] = &[
    Under("attention.LayerNorm.", "norm1.", NAMED),
    Under("attention.self.", "attention.", QKV),
    Under("attention.output.dense.", "attention.output.", NAMED),
    Under("LayerNorm.", "norm2.", NAMED),
    Under("intermediate.dense.", "mlp.up.", NAMED),
    Under("output.dense.", "mlp.down.", NAMED),
];

const DECODER_BLOCK: &[Rule] = &[
    Under("input_layernorm.", "norm1.", NAMED),
    Under("attention.", "attention.", QKV),
    Under("attention.dense.", "attention.output.", NAMED),
    Under("post_attention_layernorm.", "norm2.", NAMED),
    Under("cross_attention.query.", "cross.query.", NAMED),
    Split("cross_attention.key_value.weight", &["cross.key.weight", "cross.value.weight"]),
    Split("cross_attention.key_value.bias", &["cross.key.bias", "cross.value.bias"]),
    Under("cross_attention.dense.", "cross.output.", NAMED),
    Under("post_cross_attention_layernorm.", "norm3.", NAMED),
    Under("intermediate.", "mlp.up.", NAMED),
    Under("output.", "mlp.down.", NAMED),
];

/// Keys of AliceMind's `PalmForPreTraining`. Nothing reads its pooler.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("bert.embeddings.word_embeddings.weight", "tokens.weight"),
    Rename("bert.embeddings.position_embeddings.weight", "positions.weight"),
    Rename("bert.embeddings.token_type_embeddings.weight", "token_types.weight"),
    Under("bert.embeddings.LayerNorm.", "embedding_norm.", NAMED),
    Under("bert.encoder.layer.{}.", "encoder.{}.", ENCODER_BLOCK),
    Under("bert.encoder.LayerNorm.", "encoder_norm.", NAMED),
    Ignore("bert.pooler.{*}"),
    Under("decoder.decoder.layer.{}.", "decoder.{}.", DECODER_BLOCK),
    Under("decoder.decoder.final_layernorm.", "decoder_norm.", NAMED),
    Under("cls.predictions.", "head.", BERT_HEAD),
    Ignore("cls.predictions.decoder_weight"),
    Under("cls.seq_relationship.", "order.", NAMED),
]);

/// How AliceMind's tensor-parallel ranks are put together.
pub const RANKS: MegatronLayout = MegatronLayout {
    merges: &[
        ("bert.embeddings.word_embeddings.weight", Merge::Vocabulary),
        ("cls.predictions.decoder_weight", Merge::Vocabulary),
        ("cls.predictions.bias", Merge::Vocabulary),
        ("bert.encoder.layer.{}.attention.self.query_key_value.weight", Merge::Fused(3)),
        ("bert.encoder.layer.{}.attention.self.query_key_value.bias", Merge::Fused(3)),
        ("bert.encoder.layer.{}.attention.output.dense.weight", Merge::Row),
        ("bert.encoder.layer.{}.intermediate.dense.weight", Merge::Column),
        ("bert.encoder.layer.{}.intermediate.dense.bias", Merge::Column),
        ("bert.encoder.layer.{}.output.dense.weight", Merge::Row),
        ("decoder.decoder.layer.{}.attention.query_key_value.weight", Merge::Fused(3)),
        ("decoder.decoder.layer.{}.attention.query_key_value.bias", Merge::Fused(3)),
        ("decoder.decoder.layer.{}.attention.dense.weight", Merge::Row),
        ("decoder.decoder.layer.{}.cross_attention.query.weight", Merge::Column),
        ("decoder.decoder.layer.{}.cross_attention.query.bias", Merge::Column),
        ("decoder.decoder.layer.{}.cross_attention.key_value.weight", Merge::Fused(2)),
        ("decoder.decoder.layer.{}.cross_attention.key_value.bias", Merge::Fused(2)),
        ("decoder.decoder.layer.{}.cross_attention.dense.weight", Merge::Row),
        ("decoder.decoder.layer.{}.intermediate.weight", Merge::Column),
        ("decoder.decoder.layer.{}.intermediate.bias", Merge::Column),
        ("decoder.decoder.layer.{}.output.weight", Merge::Row),
        // norms, other tables, the biases after merged rows, the small heads
        ("bert.{*}", Merge::Replicated),
        ("decoder.{*}", Merge::Replicated),
        ("cls.{*}", Merge::Replicated),
    ],
};

/// PLUG as the registry knows it.
pub const SYSTEM: System = System {
    name: "plug",
    about: "Chinese text generation: PLUG, an encoder with a decoder",
    file: "models/plug.rs",
    tasks: &["generate", "forward"],
    proved: &["plug"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("plug")),
    checkpoint: |folder| checkpoint(folder, &PlugConfig::of(folder)?),
    describe: |folder| {
        let config = PlugConfig::of(folder)?;
        let checkpoint = checkpoint(folder, &config)?;
        describe_with(checkpoint.as_ref(), &config.init(&Device::flex()), &KEYS)
    },
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(|folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?))),
};

/// The weights of a folder, ranks merged.
fn checkpoint(folder: &Folder, config: &PlugConfig) -> Result<Box<dyn Checkpoint>, Error> {
    let ranks = RankOptions { vocab_size: Some(config.vocab_size), ..RankOptions::new(RANKS) };
    folder.checkpoint_with(&OpenOptions { ranks: Some(&ranks), ..OpenOptions::default() })
}

/// An encoder with its decoder behind the forward contract.
struct Runner {
    model: Plug,
    config: PlugConfig,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let config = PlugConfig::of(folder)?;
        let checkpoint = checkpoint(folder, &config)?;
        let model = load(config.init(device), checkpoint.as_ref(), &KEYS, options)?;
        Ok(Self { model, config })
    }
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids`, `decode_input_ids` and `decode_attention_mask`
    /// (`[batch, 1, seq, seq]`, 1 where a key is seen; causal without).
    ///
    /// Gives `sequence_output` with the final norm twice, `prediction_scores` and `seq_relationship_score` of it, and
    /// with `decode_input_ids` its `decoder_logits`. With the final norm once: `once.sequence_output` and
    /// `once.decoder_logits`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let PlugConfig { vocab_size, n_token_types, n_positions, n_heads, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let real = inputs.mask("attention_mask");
        let token_types = inputs.ids::<2>("token_type_ids", n_token_types);
        let written = inputs.ids::<2>("decode_input_ids", vocab_size);
        let seen = inputs.weights::<4>("decode_attention_mask");
        inputs.missing("input_ids");
        let Some(ids) = ids else { return inputs.finish().map(|()| Outputs::new()) }; // always an error

        let [batch, _] = ids.dims();
        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        inputs.like_ids("token_type_ids", token_types.as_ref().map(Tensor::dims), ids.dims());
        for (name, text) in [("input_ids", Some(&ids)), ("decode_input_ids", written.as_ref())] {
            let Some([rows, seq]) = text.map(|text| text.dims()) else { continue };
            if rows != batch {
                inputs.problem(format!("`{name}` has {rows} rows, `input_ids` {batch}"));
            }
            if seq > n_positions {
                let last = n_positions - 1;
                inputs.problem(format!(
                    "`{name}` has texts that reach position {}, the last one is {last}",
                    seq - 1
                ));
            }
        }
        if let (Some(found), Some(text)) = (seen.as_ref().map(Tensor::dims), &written) {
            let [_, seq] = text.dims();
            let wanted = [batch, n_heads, seq, seq];
            if found.iter().zip(wanted).any(|(&axis, wanted)| axis != 1 && axis != wanted) {
                inputs.problem(format!("`decode_attention_mask` is {found:?}, the scores {wanted:?}"));
            }
        }
        inputs.finish()?;

        let mask = real.map_or(Mask::Full, Mask::Padding);
        let causal = match seen {
            Some(seen) => Mask::Bias((seen - 1.0) * 10000.0),
            None => Mask::Causal,
        };
        let input = PlugInput { ids, token_types, mask: mask.clone() };
        let mut outputs = Outputs::new();
        for (norm, prefix) in [(FinalNorm::Twice, ""), (FinalNorm::Once, "once.")] {
            let states = self.model.encode(input.clone(), norm);
            if let Some(written) = &written {
                let memory = self.model.remember(&states, mask.clone());
                let logits = self.model.logits(self.model.decode(written.clone(), &causal, &memory));
                outputs.push(output(&format!("{prefix}decoder_logits"), logits));
            }
            if norm == FinalNorm::Twice {
                outputs.push(output("prediction_scores", self.model.predictions(states.clone())));
                outputs.push(output("seq_relationship_score", self.model.order(states.clone())));
            }
            outputs.push(output(&format!("{prefix}sequence_output"), states));
        }
        Ok(outputs)
    }
}

impl Generator for Runner {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Of a passage, and apart from it of what is written.
    fn context(&self) -> Option<usize> {
        Some(self.config.n_positions)
    }

    /// Passages grow with what is written, and forget what is too far back.
    fn room(&self, _: usize) -> Option<usize> {
        None
    }

    fn before<'a>(&self, _: &'a [u32]) -> &'a [u32] {
        &[]
    }

    /// A prompt is a passage between its special tokens.
    fn session<'a>(&'a self, prompts: &[Vec<u32>], _max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, 0)?;
        let PlugConfig { vocab_size, special: Special { start, end, .. }, .. } = self.config;
        let unknown = |(what, id): &(&str, u32)| {
            (*id as usize >= vocab_size)
                .then(|| format!("the token that {what} a text, {id}, is not among the model's {vocab_size}"))
        };
        let problems: Vec<String> = [("begins", start), ("ends", end)].iter().filter_map(unknown).collect();
        if !problems.is_empty() {
            return Err(Error::Prompt { problems });
        }
        Ok(Box::new(LongSession::new(&self.model, prompts, &self.config)))
    }
}

/// AliceMind's configuration of the 27 billion.
const LARGE: PlugConfig = PlugConfig {
    vocab_size: 21504,
    n_positions: 2048,
    n_token_types: 3,
    d_model: 8192,
    d_ff: 32768,
    n_layers: 24,
    n_decoder_layers: 6,
    n_heads: 128,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-5,
    special: Special::CHINESE_BERT,
};

/// The published size, called 27 billion.
pub const PRESETS: &[Preset] = &[Preset {
    name: "damo/nlp_plug_text-generation_27B",
    shape: Shape::Plug(LARGE),
    weights: Weights::Application,
    license: "by agreement",
    parameters: 26_033_484_803,
    source: "counted from AliceMind's configuration, without the pooler that nothing reads",
}];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::{TensorData, Tolerance};
    use volary_text::generate::greedy;
    use volary_weights::parameters;

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/plug")
    }

    /// The fixture's model, which begins texts with token 1.
    fn trained() -> Plug {
        let folder = Folder::Disk(fixture());
        let mut config = PlugConfig::of(&folder).unwrap();
        config.special = Special { start: 1, end: 2, unknown: 0, words: 80 };
        let checkpoint = checkpoint(&folder, &config).unwrap();
        load(config.init(&Device::flex()), checkpoint.as_ref(), &KEYS, &LoadOptions::default()).unwrap()
    }

    fn run(folder: &Path, inputs: &[(&str, TensorData)]) -> Result<Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
        crate::registry::forward(
            &Folder::Disk(folder.into()),
            &inputs,
            &LoadOptions::default(),
            &Device::flex(),
        )
    }

    fn ids<const D: usize>(shape: [usize; D], values: &[i64]) -> TensorData {
        TensorData::new(values.to_vec(), shape)
    }

    /// The fixture's values are exact in half precision, so that its one rank holds the same.
    #[test]
    fn a_rank_gives_the_same_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "mp_rank_00_model_states.pt"] {
            std::fs::copy(fixture().join(name), folder.path().join(name)).unwrap();
        }
        let inputs =
            [("input_ids", ids([1, 4], &[8, 4, 57, 67])), ("decode_input_ids", ids([1, 2], &[3, 9]))];
        assert_eq!(run(folder.path(), &inputs).unwrap(), run(&fixture(), &inputs).unwrap());
    }

    #[test]
    fn every_parameter_has_one_key_and_is_merged_by_one_rule() {
        for parameter in parameters(&trained()) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert!(KEYS.paths(&keys[0]).unwrap().contains(&parameter.path));
        }
    }

    /// The cache picks what the scores of the whole text pick, and passages of several lengths in one batch are written
    /// on as each is alone.
    #[test]
    fn greedy_tokens_are_those_of_the_whole_forward_pass() {
        let model = trained();
        let passages = [vec![7, 28, 66, 5, 2], vec![23, 2], vec![64, 2, 44, 66, 79, 9, 2]];
        let together = greedy(&mut model.session(&passages, 5), 5);
        for (passage, together) in passages.iter().zip(together) {
            let row = |values: &[u32]| {
                let values: Vec<i64> = values.iter().map(|&id| i64::from(id)).collect();
                Tensor::<1, Int>::from_ints(values.as_slice(), &Device::flex()).unsqueeze::<2>()
            };
            let input = PlugInput { ids: row(passage), token_types: None, mask: Mask::Full };
            let memory = model.remember(&model.encode(input, FinalNorm::Twice), Mask::Full);
            let mut text = vec![1];
            for _ in 0..5 {
                let states = model.decode(row(&text), &Mask::Causal, &memory);
                let last = states.narrow(1, text.len() - 1, 1);
                text.push(model.logits(last).argmax(2).into_scalar::<i64>() as u32);
            }
            assert_eq!(text[1..], together);
        }
    }

    #[test]
    fn a_session_goes_on_from_selected_rows() {
        let model = trained();
        let passages = [vec![3, 4, 5, 2], vec![6, 2]];
        let mut session = model.session(&passages, 3);
        session.start();
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (row, (passage, token)) in [(1, 9), (0, 9), (1, 10)].into_iter().enumerate() {
            let mut alone = model.session(&passages[passage..=passage], 1);
            alone.start();
            let alone = alone.read(&[token]).into_data();
            let chosen = chosen.clone().narrow(0, row, 1).into_data();
            chosen.assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-4));
        }
    }

    const SPECIAL: Special = Special { start: 1, end: 2, unknown: 0, words: 1000 };

    /// Two rows, of which the second goes on alone: each chunk is what a new session of the grown passage writes.
    #[test]
    fn a_long_text_is_written_chunk_by_chunk() {
        let model = trained();
        let config = PlugConfig {
            n_positions: model.positions.weight.dims()[0],
            special: Special { start: 1, end: 2, unknown: 0, words: 80 },
            ..LARGE
        };
        let prompts = [vec![1, 5, 6, 2], vec![1, 7, 9, 11, 2]];
        let mut session = LongSession { limits: [3, 7], ..LongSession::new(&model, &prompts, &config) };
        let mut found = vec![session.start()];
        for tokens in [[20, 30], [21, 31], [22, 32], [23, 33]] {
            found.push(session.read(&tokens));
        }
        session.select(&[1]);
        found.extend([session.read(&[34]), session.read(&[35]), session.read(&[36])]);
        let alone = |passage: &[u32], read: &[u32]| {
            let mut session = model.session(&[passage], 9);
            read.iter().fold(session.start(), |_, &token| session.read(&[token]))
        };
        let grown = [7, 9, 11, 30, 31, 32, 2]; // the last seven
        let again = [30, 31, 32, 33, 34, 35, 2];
        let expected = [
            alone(&prompts[1], &[]),
            alone(&prompts[1], &[30]),
            alone(&prompts[1], &[30, 31]),
            alone(&grown, &[]),
            alone(&grown, &[33]),
            alone(&grown, &[33, 34]),
            alone(&again, &[]),
            alone(&again, &[36]),
        ];
        for (found, expected) in found.into_iter().zip(expected) {
            let last = found.dims()[0] - 1;
            let found = found.narrow(0, last, 1).into_data();
            found.assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
        }
    }

    #[test]
    fn an_end_counts_only_after_four_fifths() {
        let mut chunks = Chunks::new(&[5], 10, SPECIAL);
        for token in 10..18 {
            assert_eq!(chunks.draw(token), Drawn::Read(token));
        }
        assert_eq!(chunks.draw(2), Drawn::Again, "eight of ten are not more than four fifths");
        assert_eq!(chunks.draw(18), Drawn::Done, "the end that was passed over was drawn too");
        assert_eq!(chunks.text(), (10..19).collect::<Vec<_>>());

        let mut chunks = Chunks::new(&[5], 10, SPECIAL);
        for token in 10..19 {
            chunks.draw(token);
        }
        assert_eq!(chunks.draw(2), Drawn::Done);
        assert_eq!(chunks.text().len(), 9);
    }

    #[test]
    fn after_a_chunk_the_passage_grows_and_the_decoder_begins_anew() {
        let mut chunks = Chunks::new(&[5, 6], 300, SPECIAL);
        for token in 0..127 {
            assert_eq!(chunks.draw(100 + token), Drawn::Read(100 + token));
        }
        assert_eq!(chunks.draw(2), Drawn::Restart, "the 128th drawn");
        let expected: Vec<u32> = [1, 5, 6].into_iter().chain(100..227).chain([2]).collect();
        assert_eq!(chunks.passage(), expected);
        assert_eq!(chunks.draw(7), Drawn::Read(7));
        assert_eq!(chunks.passage(), expected, "until the next time");
    }

    /// Token `n` is drawn as the `n`th, so that what is kept can be read off.
    #[test]
    fn of_a_passage_the_last_512_tokens_are_kept() {
        let long: Vec<u32> = (0..600).map(|_| 3).collect();
        let mut chunks = Chunks::new(&long, 1000, Special { words: 5000, ..SPECIAL });
        assert_eq!(chunks.passage().len(), 512);
        let mut restarts = 0;
        for token in 1000..2000 {
            match chunks.draw(token) {
                Drawn::Read(_) => {}
                Drawn::Restart => {
                    restarts += 1;
                    assert_eq!((chunks.passage().len(), chunks.passage().last()), (512, Some(&2)));
                    assert_eq!(chunks.passage()[510], token);
                }
                other => assert_eq!((other, token), (Drawn::Done, 1999)),
            }
        }
        assert_eq!(restarts, 7);
        assert_eq!(chunks.passage()[0], 1000 + 7 * 128 - 511);
        assert_eq!(chunks.text(), (1000..2000).collect::<Vec<_>>());
    }

    #[test]
    fn tokens_without_a_word_are_unknown_and_told_once() {
        let mut chunks = Chunks::new(&[5], 10, SPECIAL);
        assert_eq!(chunks.draw(1000), Drawn::Read(0));
        for token in [1001, 7, 7, 1002] {
            chunks.draw(token);
        }
        assert_eq!(chunks.text(), [0, 7, 7, 0]);
    }

    #[test]
    fn writing_follows_the_chunks() {
        let model = trained();
        let no_end = |scores: &Tensor<2>| {
            let low = Tensor::full([1, 1], -1e9, &Device::flex());
            scores.clone().slice_assign([0..1, 2..3], low).argmax(1).into_scalar::<i64>() as u32
        };
        let special = Special { words: 80, unknown: 81, ..SPECIAL };
        let text = model.write(Chunks::new(&[5, 6], 12, special), no_end);

        let mut session = model.session(&[[1, 5, 6, 2]], 12);
        let mut expected = vec![no_end(&session.start())];
        while expected.len() < 12 {
            let last = *expected.last().unwrap();
            expected.push(no_end(&session.read(&[last])));
        }
        assert_eq!(text, expected);
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let message = run(
            &fixture(),
            &[
                ("input_ids", ids([1, 2], &[3, 4])),
                ("attention_mask", ids([1, 3], &[1; 3])),
                ("decode_input_ids", ids([2, 33], &[3; 66])),
                ("decode_attention_mask", TensorData::new(vec![1f32; 4], [1, 1, 2, 2])),
            ],
        )
        .unwrap_err()
        .to_string();
        for part in [
            "`attention_mask` is [1, 3], `input_ids` [1, 2]",
            "`decode_input_ids` has 2 rows, `input_ids` 1",
            "`decode_input_ids` has texts that reach position 32, the last one is 31",
            "`decode_attention_mask` is [1, 1, 2, 2], the scores [1, 4, 33, 33]",
        ] {
            assert!(message.contains(part), "{message}");
        }
        let runner =
            Runner::load(&Folder::Disk(fixture()), &LoadOptions::default(), &Device::flex()).unwrap();
        let error = runner.session(&[vec![5]], 32).err().unwrap().to_string();
        assert!(error.contains("begins a text, 101, is not among the model's 80"), "{error}");
        assert!(error.contains("ends a text, 102, is not among the model's 80"), "{error}");
    }
}
