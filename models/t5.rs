//! T5: a text encoder and a decoder that reads it (Raffel et al. 2019, <https://arxiv.org/abs/1910.10683>), T5 1.1
//! and mT5 (Xue et al. 2020, <https://arxiv.org/abs/2010.11934>), and what others trained in their shape, as FLAN-T5.
//! The encoder alone reads the prompts of many text-to-image models.
//!
//! The numbers match `transformers` (`T5ForConditionalGeneration`, `MT5ForConditionalGeneration`, `T5Model`,
//! `T5EncoderModel`), which reads Google's uploads.
//!
//! ```sh
//! volary forward path/to/t5-small --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, GatedMlp, GatedMlpConfig, KvCache, Linear, LinearConfig, Mlp,
    MlpConfig, Reach, RelativeBias, RmsNorm,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_text::generate::{RightPadded, Session, column, indices, matrix};
use volary_weights::{KeyMap, LoadOptions, Rule};

use Rule::{Ignore, Rename, Under};

use crate::causal::{self, token_loss};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder and a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct T5Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks of the encoder.
    pub n_layers: usize,
    /// Number of blocks of the decoder.
    pub n_decoder_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// The form of the MLP.
    pub mlp: MlpForm,
    /// Its activation.
    pub activation: Activation,
    /// Number of buckets that distances fall into.
    pub n_buckets: usize,
    /// Longer distances share a bucket.
    pub max_distance: usize,
    /// Added to mean squares.
    pub rms_norm_eps: f64,
    /// What makes scores of states.
    pub head: Head,
    /// The token that the decoder begins with.
    pub start: u32,
    /// The token that stands for none.
    pub padding: u32,
}

/// The form of an MLP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MlpForm {
    /// `down(act(up(x)))`: the first T5.
    Plain,
    /// `down(act(gate(x)) * up(x))`: from T5 1.1 on.
    Gated,
}

/// What makes scores of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A projection of its own: from T5 1.1 on.
    Own,
    /// The token table, of states over `√d_model`: the first T5.
    Tied,
    /// The token table, of states as they are: what `transformers` 5 makes of T5 1.1 and mT5 where the weights have no
    /// head.
    TiedUnscaled,
    /// Nothing: the states are the output.
    Absent,
}

/// An encoder and a decoder.
#[derive(Module, Debug)]
pub struct T5 {
    /// Reads.
    pub encoder: T5Encoder,
    /// Writes. Its tokens are in the encoder's table.
    pub decoder: T5Decoder,
    /// `[vocab_size, d_model]`, unless the token table serves.
    pub head: Option<Linear>,
    #[module(skip)]
    scaled: bool,
}

/// The encoder, with the token table.
#[derive(Module, Debug)]
pub struct T5Encoder {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// On the scores of every block.
    pub bias: RelativeBias,
    /// The blocks.
    pub blocks: Vec<EncoderBlock>,
    /// After the last one.
    pub norm: RmsNorm,
}

/// The decoder.
#[derive(Module, Debug)]
pub struct T5Decoder {
    /// On the scores of every block's self-attention.
    pub bias: RelativeBias,
    /// The blocks.
    pub blocks: Vec<DecoderBlock>,
    /// After the last one.
    pub norm: RmsNorm,
}

/// A pre-norm block of the encoder.
#[derive(Module, Debug)]
pub struct EncoderBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Self-attention; its scores are not divided by the root of the width.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: RmsNorm,
    /// The MLP.
    pub mlp: T5Mlp,
}

/// A pre-norm block of the decoder.
#[derive(Module, Debug)]
pub struct DecoderBlock {
    /// Before the self-attention.
    pub norm1: RmsNorm,
    /// Causal self-attention.
    pub attention: Attention,
    /// Before the cross-attention.
    pub norm2: RmsNorm,
    /// Attention to the encoder's states, without a bias of distances.
    pub cross: Attention,
    /// Before the MLP.
    pub norm3: RmsNorm,
    /// The MLP.
    pub mlp: T5Mlp,
}

/// Two projections or three, without biases.
#[derive(Module, Debug)]
pub struct T5Mlp {
    /// The projections.
    pub projections: Projections,
    #[module(skip)]
    activation: Activation,
}

/// The projections of a [`T5Mlp`].
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "all of a model are the same")]
pub enum Projections {
    /// [`MlpForm::Plain`].
    Plain(Mlp),
    /// [`MlpForm::Gated`].
    Gated(GatedMlp),
}

/// What is read and what has been written so far.
#[derive(Clone, Debug)]
pub struct T5Input {
    /// Read: `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// Which of these the encoder sees.
    pub mask: Mask,
    /// Written: `[batch, written]`, the token to begin with in front.
    pub decoder_ids: Tensor<2, Int>,
    /// What hides written tokens besides the future.
    pub decoder_mask: Mask,
    /// Which of the read tokens the decoder sees.
    pub cross_mask: Mask,
}

/// States of both.
#[derive(Clone, Debug)]
pub struct T5Output {
    /// `[batch, seq, d_model]`.
    pub encoder: Tensor<3>,
    /// `[batch, written, d_model]`.
    pub decoder: Tensor<3>,
}

/// What a block of the decoder sees of the encoder: keys and values of its states, `[batch, n_heads, seq, d_head]`.
#[derive(Clone, Debug)]
pub struct Memory {
    pub(crate) key: Tensor<4>,
    pub(crate) value: Tensor<4>,
}

impl T5Config {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> T5 {
        let head = || LinearConfig::new(self.d_model, self.vocab_size).with_bias(false).init(device);
        let block = |_| DecoderBlock {
            norm1: self.norm(device),
            attention: self.attention(device),
            norm2: self.norm(device),
            cross: self.attention(device),
            norm3: self.norm(device),
            mlp: self.mlp(device),
        };
        T5 {
            encoder: self.init_encoder(device),
            decoder: T5Decoder {
                bias: self.bias(Reach::Past, device),
                blocks: (0..self.n_decoder_layers).map(block).collect(),
                norm: self.norm(device),
            },
            head: (self.head == Head::Own).then(head),
            scaled: self.head == Head::Tied,
        }
    }

    /// An untrained encoder alone. Nothing is allocated before first use.
    pub fn init_encoder(&self, device: &Device) -> T5Encoder {
        let block = |_| EncoderBlock {
            norm1: self.norm(device),
            attention: self.attention(device),
            norm2: self.norm(device),
            mlp: self.mlp(device),
        };
        T5Encoder {
            tokens: Embedding::new(self.vocab_size, self.d_model, 1.0, device),
            bias: self.bias(Reach::BothSides, device),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: self.norm(device),
        }
    }

    pub(crate) fn norm(&self, device: &Device) -> RmsNorm {
        RmsNorm::new(self.d_model, self.rms_norm_eps, device)
    }

    pub(crate) fn bias(&self, reach: Reach, device: &Device) -> RelativeBias {
        RelativeBias::new(self.n_buckets, self.max_distance, self.n_heads, reach, device)
    }

    pub(crate) fn attention(&self, device: &Device) -> Attention {
        AttentionConfig::new(self.d_model, self.n_heads)
            .with_d_head(Some(self.d_head))
            .with_bias(false)
            .with_output_bias(false)
            .with_scale(Some(1.0))
            .init(device)
    }

    fn mlp(&self, device: &Device) -> T5Mlp {
        let Self { d_model, d_ff, activation, .. } = *self;
        let projections = match self.mlp {
            MlpForm::Plain => Projections::Plain(MlpConfig::new(d_model, d_ff).with_bias(false).init(device)),
            MlpForm::Gated => {
                Projections::Gated(GatedMlpConfig::new(d_model, d_ff).with_bias(false).init(device))
            }
        };
        T5Mlp { projections, activation }
    }
}

impl T5Mlp {
    /// `[..., d_model] -> [..., d_model]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match &self.projections {
            Projections::Plain(mlp) => mlp.forward(x, self.activation),
            Projections::Gated(mlp) => mlp.forward(x, self.activation),
        }
    }
}

impl EncoderBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), mask);
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed))
    }
}

impl DecoderBlock {
    /// `[batch, new, d_model] -> [batch, new, d_model]`, after the tokens that `cache` holds, if there is one.
    pub fn forward(
        &self,
        x: Tensor<3>,
        mask: &Mask,
        memory: &Memory,
        cross_mask: &Mask,
        cache: Option<&mut KvCache>,
    ) -> Tensor<3> {
        let own = self.norm1.forward(x.clone());
        let own = match cache {
            Some(cache) => self.attention.cached(own, cache, mask),
            None => self.attention.forward(own, mask),
        };
        let (x, normed) = self.norm2.add(x, own);
        let query = self.cross.queries(normed); // [batch, n_heads, new, d_head]
        let Memory { key, value } = memory.clone();
        let (x, normed) = self.norm3.add(x, self.cross.attend(query, key, value, cross_mask));
        ops::add(x, self.mlp.forward(normed))
    }
}

impl T5Encoder {
    /// The states of a batch of texts: `[batch, seq] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or the mask does not fit.
    pub fn forward(&self, ids: Tensor<2, Int>, mask: &Mask) -> Tensor<3> {
        self.encode(self.tokens.forward(ids), mask)
    }

    /// The states of what need not be tokens: `[batch, seq, d_model] -> [batch, seq, d_model]`.
    ///
    /// # Panics
    /// If the mask does not fit.
    pub fn encode(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let [_, seq, _] = x.dims();
        let bias = Mask::Bias(self.bias.forward(seq, seq)); // [1, n_heads, seq, seq]
        let mask = Mask::All(vec![bias, mask.clone()]);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, &mask));
        self.norm.forward(x)
    }
}

impl T5Decoder {
    /// What each block sees of the encoder's states `[batch, seq, d_model]`.
    pub fn memory(&self, states: &Tensor<3>) -> Vec<Memory> {
        let of_block = |block: &DecoderBlock| {
            let (key, value) = block.cross.keys_values(states.clone());
            Memory { key, value }
        };
        self.blocks.iter().map(of_block).collect()
    }

    /// The states of new tokens, `[batch, new, d_model] -> [batch, new, d_model]`. They are the first ones; or, with a
    /// cache for every block, they follow those in it, and the mask is of all.
    ///
    /// # Panics
    /// If a cache is full, or shapes or the numbers of blocks differ.
    pub fn forward(
        &self,
        x: Tensor<3>,
        mask: &Mask,
        memory: &[Memory],
        cross_mask: &Mask,
        mut caches: Option<&mut [KvCache]>,
    ) -> Tensor<3> {
        assert_eq!(memory.len(), self.blocks.len(), "there is a memory (left) for every block");
        let [_, new, _] = x.dims();
        let held = caches.as_ref().and_then(|caches| caches.first()).map_or(0, KvCache::len);
        let bias = Mask::Bias(self.bias.forward(new, held + new)); // [1, n_heads, new, held + new]
        let mask = Mask::All(vec![bias, Mask::Causal, mask.clone()]);
        let mut x = x;
        for (i, (block, memory)) in self.blocks.iter().zip(memory).enumerate() {
            let cache = caches.as_mut().map(|caches| &mut caches[i]);
            x = block.forward(x, &mask, memory, cross_mask, cache);
        }
        self.norm.forward(x)
    }
}

impl T5 {
    /// The states of a batch of texts and of what is written of them.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: T5Input) -> T5Output {
        let encoder = self.encoder.forward(input.ids, &input.mask); // [batch, seq, d_model]
        let decoder = self.decode(input.decoder_ids, &input.decoder_mask, &encoder, &input.cross_mask);
        T5Output { encoder, decoder }
    }

    /// The states of what is written, `[batch, written] -> [batch, written, d_model]`, of what the encoder has read.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn decode(&self, ids: Tensor<2, Int>, mask: &Mask, read: &Tensor<3>, cross_mask: &Mask) -> Tensor<3> {
        let memory = self.decoder.memory(read);
        self.decoder.forward(self.encoder.tokens.forward(ids), mask, &memory, cross_mask, None)
    }

    /// Scores of the next token: `[batch, written, d_model] -> [batch, written, vocab_size]`.
    pub fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        match &self.head {
            Some(head) => head.forward(states),
            None => {
                let [_, _, d_model] = states.dims();
                let states = if self.scaled { states / (d_model as f64).sqrt() } else { states };
                self.encoder.tokens.scores(states)
            }
        }
    }

    /// Texts that answer these prompts, each of at most `max_new` tokens after `start`.
    ///
    /// # Panics
    /// If there is no prompt, one is empty, or an id is outside the vocabulary.
    pub fn session(&self, prompts: &[impl AsRef<[u32]>], start: u32, max_new: usize) -> T5Session<'_> {
        let RightPadded { ids, real } = RightPadded::new(prompts, &self.encoder.tokens.weight.device());
        let seen = real.clone().map(|real| real.unsqueeze_dims(&[1, 1])); // [rows, 1, 1, longest]
        let mask = real.map_or(Mask::Full, Mask::Padding);
        let x = self.encoder.tokens.forward(ids);
        self.session_of(x, mask, seen, start, max_new)
    }

    /// Texts that answer what need not be tokens.
    ///
    /// - `x`: what the encoder reads, `[rows, seq, d_model]`, as `mask` lets it
    /// - `seen`: what the decoder sees of that, `[rows, 1, 1, seq]`; all when `None`.
    pub fn session_of(
        &self,
        x: Tensor<3>,
        mask: Mask,
        seen: Option<Tensor<4, Bool>>,
        start: u32,
        max_new: usize,
    ) -> T5Session<'_> {
        let caches = self.decoder.blocks.iter().map(|_| KvCache::new(max_new)).collect();
        T5Session { model: self, x, mask, seen, start, memory: Vec::new(), caches }
    }
}

/// Texts that a decoder is writing.
pub struct T5Session<'a> {
    model: &'a T5,
    x: Tensor<3>,
    mask: Mask,
    seen: Option<Tensor<4, Bool>>,
    start: u32,
    memory: Vec<Memory>,
    caches: Vec<KvCache>,
}

impl T5Session<'_> {
    /// The states of further tokens `[rows, new]`: `[rows, new, d_model]`.
    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3> {
        let x = self.model.encoder.tokens.forward(ids);
        let seen = self.seen.clone().map_or(Mask::Full, Mask::Visible);
        self.model.decoder.forward(x, &Mask::Full, &self.memory, &seen, Some(&mut self.caches))
    }
}

impl Session for T5Session<'_> {
    /// The encoder runs once, here.
    fn start(&mut self) -> Tensor<2> {
        let [rows, ..] = self.x.dims();
        let read = self.model.encoder.encode(self.x.clone(), &self.mask); // [rows, seq, d_model]
        self.memory = self.model.decoder.memory(&read);
        self.read(&vec![self.start; rows])
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        let states = self.append(column(tokens, &self.x.device())); // [rows, 1, d_model]
        self.model.logits(states).squeeze_dim(1)
    }

    fn read_all(&mut self, tokens: &[Vec<u32>]) -> Tensor<3> {
        let states = self.append(matrix(tokens, &self.x.device()));
        self.model.logits(states)
    }

    fn select(&mut self, rows: &[usize]) {
        let rows = indices(rows, &self.x.device());
        // rows selected of truth values are no truth values on the CPU backend
        self.seen = self.seen.take().map(|seen| seen.int().select(0, rows.clone()).bool());
        for Memory { key, value } in &mut self.memory {
            *key = key.clone().select(0, rows.clone());
            *value = value.clone().select(0, rows.clone());
        }
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

/// The `model_type`s of this shape.
const FAMILIES: &[&str] = &["t5", "mt5"];

/// The classes that have no decoder.
const ENCODERS: &[&str] = &["T5EncoderModel", "MT5EncoderModel"];

/// The classes that have no head.
const HEADLESS: &[&str] = &["T5Model", "MT5Model"];

impl T5Config {
    /// The configuration of a folder. Whether there is a head where the configuration does not rule it out, only the
    /// weights tell: transformers 5 calls all heads tied, and leaves out those that it tied.
    ///
    /// # Errors
    /// If the configuration is missing, malformed, or asks for what is not built, or there are no weights.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        let config = folder.config("config.json")?;
        let parsed = Self::parse(&config)?;
        if parsed.head != Head::Own || !config.flag_or("tie_word_embeddings", true)? {
            return Ok(parsed);
        }
        let has_head = folder.checkpoint()?.entries().iter().any(|entry| entry.name == OWN_HEAD_KEY);
        Ok(Self { head: if has_head { Head::Own } else { Head::TiedUnscaled }, ..parsed })
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `T5Config` or `MT5Config`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let family = config.text("model_type").filter(|family| FAMILIES.contains(family));
        let is_mt5 = match family {
            Some(family) => family == "mt5",
            None => return Err(config.error("model_type", &FAMILIES.join(", "))),
        };
        let or = |t5: usize, mt5: usize| if is_mt5 { mt5 } else { t5 };
        config.only("is_decoder", &["false"])?;
        // transformers 5 says `tie_word_embeddings` of all that it saves, heads of their own or not
        let is_tied = config.flag_or("tie_word_embeddings", true)?;
        let is_tied = !is_mt5 && config.flag_or("scale_decoder_outputs", is_tied)?;
        let head = match config.first_of("architectures") {
            Some(class) if HEADLESS.contains(&class) => Head::Absent,
            _ if is_tied => Head::Tied,
            _ => Head::Own,
        };
        let (mlp, activation) = match config.text("feed_forward_proj") {
            None if !config.has("feed_forward_proj") => match is_mt5 {
                true => (MlpForm::Gated, Activation::GeluTanh),
                false => (MlpForm::Plain, Activation::Relu),
            },
            name => name.and_then(feed_forward).ok_or_else(|| {
                let names = Activation::NAMES.join(", ");
                config.error("feed_forward_proj", &format!("one of {names}, or `gated-` and one of them"))
            })?,
        };
        let n_layers = config.blocks_or("num_layers", or(6, 8))?;
        let vocab_size = config.size_or("vocab_size", or(32128, 250_112))?;
        let (n_buckets, max_distance) = buckets(config)?;
        Ok(Self {
            vocab_size,
            d_model: config.size_or("d_model", 512)?,
            d_ff: config.size_or("d_ff", or(2048, 1024))?,
            n_layers,
            n_decoder_layers: config.blocks_or("num_decoder_layers", n_layers)?,
            n_heads: config.size_or("num_heads", or(8, 6))?,
            d_head: config.size_or("d_kv", 64)?,
            mlp,
            activation,
            n_buckets,
            max_distance,
            rms_norm_eps: config.number_or("layer_norm_epsilon", 1e-6)?,
            head,
            start: config.token_or("decoder_start_token_id", 0, vocab_size)?,
            padding: config.token_or("pad_token_id", 0, vocab_size)?,
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match (self.mlp, self.head) {
            (MlpForm::Plain, Head::Own) => &PLAIN_OWN,
            (MlpForm::Plain, Head::Tied | Head::TiedUnscaled | Head::Absent) => &PLAIN_TIED,
            (MlpForm::Gated, Head::Own) => &GATED_OWN,
            (MlpForm::Gated, Head::Tied | Head::TiedUnscaled | Head::Absent) => &GATED_TIED,
        }
    }

    /// The key map of its encoder alone, which may be in a file with the rest.
    pub const fn encoder_keys(&self) -> &'static KeyMap {
        match self.mlp {
            MlpForm::Plain => &PLAIN_ALONE,
            MlpForm::Gated => &GATED_ALONE,
        }
    }
}

/// `relu`, `gated-silu`; `gated-gelu` is the tanh approximation.
fn feed_forward(name: &str) -> Option<(MlpForm, Activation)> {
    match name.strip_prefix("gated-") {
        Some("gelu") => Some((MlpForm::Gated, Activation::GeluTanh)),
        Some(name) => Some((MlpForm::Gated, Activation::from_name(name)?)),
        None => Some((MlpForm::Plain, Activation::from_name(name)?)),
    }
}

/// Number of buckets and longest distance.
///
/// # Errors
/// If they make no table.
pub(crate) fn buckets(config: &Config) -> Result<(usize, usize), ConfigError> {
    let [count, longest] = ["relative_attention_num_buckets", "relative_attention_max_distance"];
    let n_buckets = config.size_or(count, 32)?;
    if n_buckets < 4 {
        return Err(config.error(count, "at least 4"));
    }
    let max_distance = config.size_or(longest, 128)?;
    if max_distance <= n_buckets / 2 {
        return Err(config.error(longest, &format!("more than {}, half of the buckets", n_buckets / 2)));
    }
    Ok((n_buckets, max_distance))
}

/// The projections of an attention.
pub(crate) const ATTENTION: &[Rule] = &[
    Rename("q.weight", "query.weight"),
    Rename("k.weight", "key.weight"),
    Rename("v.weight", "value.weight"),
    Rename("o.weight", "output.weight"),
];
const PLAIN: &[Rule] = &[Rename("wi.weight", "Plain.up.weight"), Rename("wo.weight", "Plain.down.weight")];
const GATED: &[Rule] = &[
    Rename("wi_0.weight", "Gated.gate.weight"),
    Rename("wi_1.weight", "Gated.up.weight"),
    Rename("wo.weight", "Gated.down.weight"),
];

const ENCODER: &[Rule] = &[
    Rename("shared.weight", "tokens.weight"),
    Ignore("encoder.embed_tokens.weight"), // a copy
    Rename("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "bias.weight"),
    Rename("encoder.block.{}.layer.0.layer_norm.weight", "blocks.{}.norm1.weight"),
    Under("encoder.block.{}.layer.0.SelfAttention.", "blocks.{}.attention.", ATTENTION),
    Rename("encoder.block.{}.layer.1.layer_norm.weight", "blocks.{}.norm2.weight"),
    Rename("encoder.final_layer_norm.weight", "norm.weight"),
];
const DECODER: &[Rule] = &[
    Ignore("embed_tokens.weight"), // a copy
    Rename("block.0.layer.0.SelfAttention.relative_attention_bias.weight", "bias.weight"),
    Rename("block.{}.layer.0.layer_norm.weight", "blocks.{}.norm1.weight"),
    Under("block.{}.layer.0.SelfAttention.", "blocks.{}.attention.", ATTENTION),
    Rename("block.{}.layer.1.layer_norm.weight", "blocks.{}.norm2.weight"),
    Under("block.{}.layer.1.EncDecAttention.", "blocks.{}.cross.", ATTENTION),
    // in the first uploads, and never used
    Ignore("block.0.layer.1.EncDecAttention.relative_attention_bias.weight"),
    Rename("block.{}.layer.2.layer_norm.weight", "blocks.{}.norm3.weight"),
    Rename("final_layer_norm.weight", "norm.weight"),
];

/// Where the projections of the MLPs are in modules.
const MLP: &str = "blocks.{}.mlp.projections.";

const PLAIN_ENCODER: &[Rule] =
    &[Under("", "", ENCODER), Under("encoder.block.{}.layer.1.DenseReluDense.", MLP, PLAIN)];
const GATED_ENCODER: &[Rule] =
    &[Under("", "", ENCODER), Under("encoder.block.{}.layer.1.DenseReluDense.", MLP, GATED)];
const PLAIN_BOTH: &[Rule] = &[
    Under("", "encoder.", PLAIN_ENCODER),
    Under("decoder.", "decoder.", DECODER),
    Under("decoder.", "decoder.", &[Under("block.{}.layer.2.DenseReluDense.", MLP, PLAIN)]),
];
const GATED_BOTH: &[Rule] = &[
    Under("", "encoder.", GATED_ENCODER),
    Under("decoder.", "decoder.", DECODER),
    Under("decoder.", "decoder.", &[Under("block.{}.layer.2.DenseReluDense.", MLP, GATED)]),
];

const OWN_HEAD_KEY: &str = "lm_head.weight";
const OWN_HEAD: Rule = Rename(OWN_HEAD_KEY, "head.weight");
/// A head in the file is a copy of the table, or means nothing.
const NO_HEAD: Rule = Ignore(OWN_HEAD_KEY);
const NO_DECODER: Rule = Ignore("decoder.{*}");

const PLAIN_OWN: KeyMap = KeyMap::new(&[Under("", "", PLAIN_BOTH), OWN_HEAD]);
const PLAIN_TIED: KeyMap = KeyMap::new(&[Under("", "", PLAIN_BOTH), NO_HEAD]);
const GATED_OWN: KeyMap = KeyMap::new(&[Under("", "", GATED_BOTH), OWN_HEAD]);
const GATED_TIED: KeyMap = KeyMap::new(&[Under("", "", GATED_BOTH), NO_HEAD]);
const PLAIN_ALONE: KeyMap = KeyMap::new(&[Under("", "", PLAIN_ENCODER), NO_DECODER, NO_HEAD]);
const GATED_ALONE: KeyMap = KeyMap::new(&[Under("", "", GATED_ENCODER), NO_DECODER, NO_HEAD]);

/// T5 as the registry knows it.
pub const SYSTEM: System = System {
    name: "t5",
    about: "text encoders with a decoder: T5, T5 1.1, FLAN-T5, mT5",
    file: "models/t5.rs",
    tasks: &["generate", "forward"],
    proved: &["t5", "t5_v11", "mt5"],
    presets: PRESETS,
    recognises: |_, config| {
        config.and_then(|config| config.text("model_type")).is_some_and(|family| FAMILIES.contains(&family))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = T5Config::of(folder)?;
        match is_encoder(folder)? {
            true => describe(folder, &config.init_encoder(&Device::flex()), config.encoder_keys()),
            false => describe(folder, &config.init(&Device::flex()), config.keys()),
        }
    },
    open: |folder, options, device| match is_encoder(folder)? {
        true => {
            let config = T5Config::of(folder)?;
            let model = fill(folder, config.init_encoder(device), config.encoder_keys(), options)?;
            Ok(Box::new(EncoderRunner { model, config }))
        }
        false => Ok(Box::new(Runner::load(folder, options, device)?)),
    },
    generator: Some(|folder, options, device| {
        if is_encoder(folder)? {
            return Err(Error::Task { system: SYSTEM.name, task: "write without a decoder" });
        }
        let runner = Runner::load(folder, options, device)?;
        match runner.config.head {
            Head::Absent => Err(Error::Task { system: SYSTEM.name, task: "write without a head" }),
            _ => Ok(Box::new(runner)),
        }
    }),
};

/// Whether a folder holds an encoder alone.
fn is_encoder(folder: &Folder) -> Result<bool, Error> {
    let config = folder.config("config.json")?;
    Ok(config.first_of("architectures").is_some_and(|class| ENCODERS.contains(&class)))
}

/// An encoder behind the forward contract.
struct EncoderRunner {
    model: T5Encoder,
    config: T5Config,
}

impl Forward for EncoderRunner {
    /// `input_ids`, and if wanted `attention_mask`; gives `last_hidden_state`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let ids = inputs.ids::<2>("input_ids", self.config.vocab_size);
        let real = inputs.mask("attention_mask");
        inputs.missing("input_ids");
        let Some(ids) = ids else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        inputs.finish()?;

        let mask = real.map_or(Mask::Full, Mask::Padding);
        Ok(vec![output("last_hidden_state", self.model.forward(ids, &mask))])
    }
}

/// An encoder and a decoder behind the contracts of the registry.
pub(crate) struct Runner {
    pub model: T5,
    pub config: T5Config,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let config = T5Config::of(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Self { model, config })
    }

    /// What the decoder reads to write `labels`, with padding for those that are not counted: each token in its place one
    /// later, after the one to begin with.
    fn shifted(&self, labels: Tensor<2, Int>, counted: Tensor<2, Bool>) -> Tensor<2, Int> {
        let [batch, written] = labels.dims();
        let start = Tensor::full([batch, 1], i64::from(self.config.start), &labels.device());
        let labels = labels.mask_fill(counted.bool_not(), i64::from(self.config.padding));
        Tensor::cat(vec![start, labels], 1).narrow(1, 0, written)
    }
}

impl Forward for Runner {
    /// `input_ids` and `decoder_input_ids`, and if wanted `attention_mask`, `decoder_attention_mask`, `labels` (-100 is
    /// not counted), which may stand for `decoder_input_ids`, and `greedy.prompt_ids`.
    ///
    /// Gives `encoder_last_hidden_state`, and `last_hidden_state` without a head. With one: `logits`; the `loss` of the
    /// labels; and the twelve `greedy.tokens` that answer `greedy.prompt_ids`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let T5Config { vocab_size, head, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let real = inputs.mask("attention_mask");
        let decoder_ids = inputs.ids::<2>("decoder_input_ids", vocab_size);
        let written = inputs.mask("decoder_attention_mask");
        let labels = inputs.labels("labels", vocab_size);
        let prompt = causal::prompt(&mut inputs, vocab_size);
        inputs.missing("input_ids");
        if labels.is_none() {
            inputs.missing("decoder_input_ids");
        }
        if head == Head::Absent && (labels.is_some() || prompt.is_some()) {
            inputs.problem("`labels` and `greedy.prompt_ids` need a head, and this model has none".into());
        }
        let decoder_ids =
            decoder_ids.or_else(|| labels.clone().map(|(labels, counted)| self.shifted(labels, counted)));
        let (Some(ids), Some(decoder_ids)) = (ids, decoder_ids) else {
            return inputs.finish().map(|()| Outputs::new()); // always an error
        };
        let ([batch, _], [rows, _]) = (ids.dims(), decoder_ids.dims());
        if rows != batch {
            inputs.problem(format!("`decoder_input_ids` has {rows} rows, `input_ids` {batch}"));
        }
        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        let wanted = ("decoder_input_ids", decoder_ids.dims());
        inputs.like("decoder_attention_mask", written.as_ref().map(Tensor::dims), wanted);
        inputs.like("labels", labels.as_ref().map(|(labels, _)| labels.dims()), wanted);
        inputs.finish()?;

        let mask = real.map_or(Mask::Full, Mask::Padding);
        let T5Output { encoder, decoder } = self.model.forward(T5Input {
            ids,
            mask: mask.clone(),
            decoder_ids,
            decoder_mask: written.map_or(Mask::Full, Mask::Padding),
            cross_mask: mask,
        });
        let mut outputs = vec![output("encoder_last_hidden_state", encoder)];
        if head == Head::Absent {
            outputs.push(output("last_hidden_state", decoder));
            return Ok(outputs);
        }
        let logits = self.model.logits(decoder); // [batch, written, vocab_size]
        outputs.push(output("logits", logits.clone()));
        let loss = labels.and_then(|(labels, counted)| token_loss(logits, labels, Some(counted)));
        outputs.extend(loss.map(|loss| output("loss", loss)));
        outputs.extend(prompt.map(|prompt| {
            let session = self.model.session(&[prompt], self.config.start, causal::GREEDY);
            causal::greedy_tokens(session)
        }));
        Ok(outputs)
    }
}

impl Generator for Runner {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    /// Distances have no end.
    fn context(&self) -> Option<usize> {
        None
    }

    fn before<'a>(&self, _: &'a [u32]) -> &'a [u32] {
        &[]
    }

    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        Ok(Box::new(self.model.session(prompts, self.config.start, max_new)))
    }
}

/// Raffel et al. 2019, section 2.3 and 3.7: "Small".
const SMALL: T5Config = T5Config {
    vocab_size: 32128,
    d_model: 512,
    d_ff: 2048,
    n_layers: 6,
    n_decoder_layers: 6,
    n_heads: 8,
    d_head: 64,
    mlp: MlpForm::Plain,
    activation: Activation::Relu,
    n_buckets: 32,
    max_distance: 128,
    rms_norm_eps: 1e-6,
    head: Head::Tied,
    start: 0,
    padding: 0,
};
const BASE: T5Config =
    T5Config { d_model: 768, d_ff: 3072, n_layers: 12, n_decoder_layers: 12, n_heads: 12, ..SMALL };
const LARGE: T5Config =
    T5Config { d_model: 1024, d_ff: 4096, n_layers: 24, n_decoder_layers: 24, n_heads: 16, ..SMALL };
const T5_3B: T5Config = T5Config { d_ff: 16384, n_heads: 32, d_head: 128, ..LARGE };
const T5_11B: T5Config = T5Config { d_ff: 65536, n_heads: 128, d_head: 128, ..LARGE };

/// The repository `google-research/text-to-text-transfer-transformer`, "T5.1.1".
const SMALL_11: T5Config = T5Config {
    d_ff: 1024,
    n_layers: 8,
    n_decoder_layers: 8,
    n_heads: 6,
    mlp: MlpForm::Gated,
    activation: Activation::GeluTanh,
    head: Head::Own,
    ..SMALL
};
const BASE_11: T5Config =
    T5Config { d_model: 768, d_ff: 2048, n_layers: 12, n_decoder_layers: 12, n_heads: 12, ..SMALL_11 };
const LARGE_11: T5Config =
    T5Config { d_model: 1024, d_ff: 2816, n_layers: 24, n_decoder_layers: 24, n_heads: 16, ..SMALL_11 };
const XL_11: T5Config = T5Config { d_model: 2048, d_ff: 5120, n_heads: 32, ..LARGE_11 };
const XXL_11: T5Config = T5Config { d_model: 4096, d_ff: 10240, n_heads: 64, ..LARGE_11 };

const fn multilingual(config: T5Config) -> T5Config {
    T5Config { vocab_size: 250_112, ..config }
}

const fn preset(name: &'static str, config: T5Config, parameters: usize) -> Preset {
    let source = "transformers, (M)T5ForConditionalGeneration, tables counted once";
    let license = "Apache-2.0";
    Preset { name, shape: Shape::T5(config), weights: Weights::Hub, license, parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("google-t5/t5-small", SMALL, 60_506_624),
    preset("google-t5/t5-base", BASE, 222_903_552),
    preset("google-t5/t5-large", LARGE, 737_668_096),
    preset("google-t5/t5-3b", T5_3B, 2_851_598_336),
    preset("google-t5/t5-11b", T5_11B, 11_307_321_344),
    preset("google/t5-v1_1-small", SMALL_11, 76_961_152),
    preset("google/t5-v1_1-base", BASE_11, 247_577_856),
    preset("google/t5-v1_1-large", LARGE_11, 783_150_080),
    preset("google/t5-v1_1-xl", XL_11, 2_849_757_184),
    preset("google/t5-v1_1-xxl", XXL_11, 11_135_332_352),
    preset("google/flan-t5-small", SMALL_11, 76_961_152),
    preset("google/flan-t5-base", BASE_11, 247_577_856),
    preset("google/flan-t5-large", LARGE_11, 783_150_080),
    preset("google/flan-t5-xl", XL_11, 2_849_757_184),
    preset("google/flan-t5-xxl", XXL_11, 11_135_332_352),
    preset("google/mt5-small", multilingual(SMALL_11), 300_176_768),
    preset("google/mt5-base", multilingual(BASE_11), 582_401_280),
    preset("google/mt5-large", multilingual(LARGE_11), 1_229_581_312),
    preset("google/mt5-xl", multilingual(XL_11), 3_742_619_648),
    preset("google/mt5-xxl", multilingual(XXL_11), 12_921_057_280),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};
    use volary_text::generate::greedy;
    use volary_weights::{parameters, save};

    use super::*;

    /// Heads wider together than the residual stream, and blocks of different number.
    const TINY: T5Config = T5Config {
        vocab_size: 50,
        d_model: 12,
        d_ff: 20,
        n_layers: 2,
        n_decoder_layers: 3,
        n_heads: 4,
        d_head: 5,
        n_buckets: 8,
        max_distance: 12,
        start: 3,
        ..SMALL
    };
    const TINY_11: T5Config =
        T5Config { mlp: MlpForm::Gated, activation: Activation::GeluTanh, head: Head::Own, ..TINY };

    fn ids<const B: usize, const S: usize>(tokens: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(tokens, &Device::flex())
    }

    fn real<const B: usize, const S: usize>(real: [[bool; S]; B]) -> Mask {
        Mask::Padding(Tensor::from_data(real, &Device::flex()))
    }

    fn input(ids: Tensor<2, Int>, mask: Mask, decoder_ids: Tensor<2, Int>) -> T5Input {
        T5Input { ids, mask: mask.clone(), decoder_ids, decoder_mask: Mask::Full, cross_mask: mask }
    }

    fn fixture(name: &str) -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name))
    }

    fn run(folder: &Folder, inputs: &[(&str, Tensor<2, Int>)]) -> Result<Outputs, Error> {
        let inputs: BTreeMap<_, _> =
            inputs.iter().map(|(name, ids)| (name.to_string(), ids.to_data())).collect();
        crate::registry::forward(folder, &inputs, &LoadOptions::default(), &Device::flex())
    }

    fn config(fields: &str) -> Result<T5Config, ConfigError> {
        let text = format!("{{\"model_type\": \"t5\", {fields}}}");
        T5Config::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[track_caller]
    fn assert_close<const D: usize>(found: Tensor<D>, expected: &Tensor<D>) {
        found.into_data().assert_approx_eq::<f32>(&expected.to_data(), Tolerance::absolute(1e-4));
    }

    #[test]
    fn every_parameter_has_one_key_and_every_key_one_parameter() {
        let tied_gated = T5Config { head: Head::Tied, ..TINY_11 };
        let own_plain = T5Config { head: Head::Own, ..TINY };
        let unscaled = T5Config { head: Head::TiedUnscaled, ..TINY_11 };
        for config in [TINY, TINY_11, tied_gated, own_plain, unscaled] {
            let model = config.init(&Device::flex());
            let encoder = parameters(&model.encoder);
            let both = [(config.keys(), parameters(&model)), (config.encoder_keys(), encoder)];
            for (keys, parameters) in both {
                for parameter in parameters {
                    let found = keys.keys(&parameter.path).unwrap();
                    assert_eq!(found.len(), 1, "{}", parameter.path);
                    assert_eq!(keys.paths(&found[0]).unwrap(), [parameter.path]);
                }
            }
        }
        let of = |key| TINY_11.keys().paths(key).unwrap();
        assert_eq!(
            of("decoder.block.11.layer.2.DenseReluDense.wi_1.weight"),
            ["decoder.blocks.11.mlp.projections.Gated.up.weight"]
        );
        assert_eq!(
            of("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
            ["encoder.bias.weight"]
        );
        assert!(of("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight").is_empty());
        // a bias of its own in another block is another model (UMT5)
        assert!(of("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight").is_empty());
    }

    #[test]
    fn what_is_written_ignores_the_future_and_both_the_padding() {
        for config in [TINY, TINY_11] {
            let model = config.init(&Device::flex());
            let read = ids([[7, 8, 9]]);
            let expected = model.forward(input(read, Mask::Full, ids([[3, 4, 5]])));
            let mask = real([[true, true, true, false, false]]);
            for (more, written) in
                [([[7, 8, 9, 0, 0]], [[3, 4, 5, 6, 7]]), ([[7, 8, 9, 33, 34]], [[3, 4, 5, 9, 0]])]
            {
                let found = model.forward(input(ids(more), mask.clone(), ids(written)));
                assert_close(found.encoder.narrow(1, 0, 3), &expected.encoder);
                assert_close(found.decoder.narrow(1, 0, 3), &expected.decoder);
            }
            // hidden tokens of what is written
            let first = model.forward(input(ids([[7, 8, 9]]), Mask::Full, ids([[3, 4, 5, 6, 7]])));
            let hidden = real([[true, true, false, true, true]]);
            let with = |written| T5Input {
                decoder_mask: hidden.clone(),
                ..input(ids([[7, 8, 9]]), Mask::Full, ids(written))
            };
            let [one, other] =
                [[[3, 4, 5, 6, 7]], [[3, 4, 11, 6, 7]]].map(|written| model.forward(with(written)));
            assert_close(one.decoder.clone().narrow(1, 3, 2), &other.decoder.narrow(1, 3, 2));
            assert_close(one.decoder.narrow(1, 0, 2), &first.decoder.narrow(1, 0, 2));
        }
    }

    /// Distances are told apart, also beyond the longest one with a bucket of its own, up to where all are one.
    #[test]
    fn the_encoder_knows_the_order_of_tokens() {
        let model = TINY.init(&Device::flex());
        let state = |x| model.encoder.forward(x, &Mask::Full);
        let [there, back] = [[[7, 8, 9]], [[9, 8, 7]]].map(|tokens| state(ids(tokens)));
        let difference = (there.clone() - back.flip([1])).abs().max().into_scalar::<f64>();
        assert!(difference > 1e-4, "{difference}");
        assert_close(state(ids([[5; 40]])).narrow(1, 39, 1), &state(ids([[5; 41]])).narrow(1, 40, 1));
    }

    /// Of trained references too: the caches pick what the scores of the whole text so far pick, and prompts of
    /// several lengths in one batch are answered as each is alone.
    #[test]
    fn greedy_tokens_are_those_of_the_whole_forward_pass() {
        for name in ["t5", "t5_v11", "mt5"] {
            let folder = fixture(name);
            let Runner { model, config } =
                Runner::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
            let prompts = [vec![7, 28, 66, 5], vec![23], (3..60).collect()];
            let together = greedy(&mut model.session(&prompts, config.start, 20), 20);
            for (prompt, together) in prompts.iter().zip(together) {
                let row = |tokens: &[u32]| {
                    let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
                    let shape = [1, tokens.len()];
                    Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), &Device::flex())
                };
                let mut written = vec![config.start];
                for _ in 0..20 {
                    let states = model.forward(input(row(prompt), Mask::Full, row(&written))).decoder;
                    let last = states.narrow(1, written.len() - 1, 1);
                    written.push(model.logits(last).argmax(2).into_scalar::<i64>() as u32);
                }
                assert_eq!(written[1..], together, "{name}");
            }
        }
    }

    #[test]
    fn a_session_scores_what_the_forward_pass_does_and_goes_on_from_selected_rows() {
        let model = TINY_11.init(&Device::flex());
        let scores = |prompt: Tensor<2, Int>, written: Tensor<2, Int>| {
            let [_, last] = written.dims();
            let states = model.forward(input(prompt, Mask::Full, written)).decoder;
            model.logits(states.narrow(1, last - 1, 1)).squeeze_dim::<2>(1)
        };
        let mut session = model.session(&[vec![3, 4, 5], vec![6]], 2, 3);
        let first = session.start();
        assert_close(first.clone().narrow(0, 0, 1), &scores(ids([[3, 4, 5]]), ids([[2]])));
        assert_close(first.narrow(0, 1, 1), &scores(ids([[6]]), ids([[2]])));
        session.read(&[7, 8]);
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        assert_close(chosen.clone().narrow(0, 0, 1), &scores(ids([[6]]), ids([[2, 8, 9]])));
        assert_close(chosen.clone().narrow(0, 1, 1), &scores(ids([[3, 4, 5]]), ids([[2, 7, 9]])));
        assert_close(chosen.narrow(0, 2, 1), &scores(ids([[6]]), ids([[2, 8, 10]])));

        let mut session = model.session(&[vec![3, 4, 5], vec![6]], 2, 3);
        session.start();
        let both = session.read_all(&[vec![7, 9], vec![8, 10]]); // [rows, new, vocab_size]
        assert_close(both.clone().slice([1..2, 0..1]).squeeze_dim(1), &scores(ids([[6]]), ids([[2, 8]])));
        assert_close(both.slice([1..2, 1..2]).squeeze_dim(1), &scores(ids([[6]]), ids([[2, 8, 10]])));
    }

    /// Where there are labels, they are what is written; -100 is not counted, and what is read in its place is padding.
    #[test]
    fn labels_stand_for_what_is_written() {
        let folder = fixture("t5");
        let outputs = |inputs: &[_]| run(&folder, inputs).unwrap().into_iter().collect::<BTreeMap<_, _>>();
        let read = ids([[7, 8, 9]]);
        let labelled = outputs(&[("input_ids", read.clone()), ("labels", ids([[4, -100, 5]]))]);
        let written = outputs(&[("input_ids", read.clone()), ("decoder_input_ids", ids([[0, 4, 0]]))]);
        assert_eq!(labelled["logits"], written["logits"]);
        let logits = Tensor::<3>::from_data(written["logits"].clone(), &Device::flex());
        let chances = burn::tensor::activation::log_softmax(logits, 2);
        let chance = |place, token| chances.clone().slice([0..1, place..place + 1, token..token + 1]);
        let expected = -(chance(0, 4) + chance(2, 5)) / 2.0;
        let loss = labelled["loss"].iter::<f64>().next().unwrap();
        assert!((loss - expected.into_scalar::<f64>()).abs() < 1e-5, "{loss}");
        assert!(!written.contains_key("loss"));

        let prompt =
            outputs(&[("input_ids", read.clone()), ("labels", ids([[4]])), ("greedy.prompt_ids", read)]);
        assert_eq!(prompt["greedy.tokens"].shape().as_slice(), [12]);
        assert_eq!(prompt["logits"].shape().as_slice(), [1, 1, 96]);
    }

    #[test]
    fn feed_forwards_and_heads_are_read_from_the_configuration() {
        for (fields, mlp, activation, head) in [
            (r#""d_model": 8"#, MlpForm::Plain, Activation::Relu, Head::Tied),
            (
                r#""feed_forward_proj": "gated-gelu", "tie_word_embeddings": false"#,
                MlpForm::Gated,
                Activation::GeluTanh,
                Head::Own,
            ),
            (r#""feed_forward_proj": "gated-silu""#, MlpForm::Gated, Activation::Silu, Head::Tied),
            (r#""feed_forward_proj": "gelu""#, MlpForm::Plain, Activation::Gelu, Head::Tied),
            (r#""model_type": "mt5""#, MlpForm::Gated, Activation::GeluTanh, Head::Own),
            // as transformers 5 saves them
            (
                r#""model_type": "mt5", "tie_word_embeddings": true"#,
                MlpForm::Gated,
                Activation::GeluTanh,
                Head::Own,
            ),
            (
                r#""tie_word_embeddings": true, "scale_decoder_outputs": false"#,
                MlpForm::Plain,
                Activation::Relu,
                Head::Own,
            ),
            (r#""architectures": ["T5Model"]"#, MlpForm::Plain, Activation::Relu, Head::Absent),
        ] {
            let config = config(fields).unwrap();
            assert_eq!((config.mlp, config.activation, config.head), (mlp, activation, head), "{fields}");
        }
        assert_eq!(config(r#""num_layers": 4"#).unwrap().n_decoder_layers, 4);
        assert_eq!(
            config(r#""model_type": "mt5", "tie_word_embeddings": false"#).unwrap().vocab_size,
            250_112
        );
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""model_type": "umt5""#, "`model_type`: expected t5, mt5"),
            (r#""is_decoder": true"#, "`is_decoder`"),
            (r#""feed_forward_proj": "gated-mish""#, "`feed_forward_proj`: expected one of gelu"),
            (r#""feed_forward_proj": 3"#, "`feed_forward_proj`"),
            (
                r#""relative_attention_num_buckets": 3"#,
                "`relative_attention_num_buckets`: expected at least 4",
            ),
            (
                r#""relative_attention_max_distance": 16"#,
                "`relative_attention_max_distance`: expected more than 16",
            ),
            (r#""num_decoder_layers": 2000000000"#, "`num_decoder_layers`: expected at most 1000 blocks"),
            (r#""decoder_start_token_id": 32128"#, "`decoder_start_token_id`: expected a token, 0 to 32127"),
            (r#""decoder_start_token_id": -1"#, "`decoder_start_token_id`: expected a token, 0 to 32127"),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        type Case<'a> = (&'a [(&'a str, Tensor<2, Int>)], &'a [&'a str]);
        let cases: &[Case] = &[
            (&[], &["`input_ids` is missing", "`decoder_input_ids` is missing"]),
            (
                &[("input_ids", ids([[96]])), ("labels", ids([[-1]]))],
                &["`input_ids` holds 96, expected 0 to 95", "`labels` holds -1, expected 0 to 95"],
            ),
            (
                &[
                    ("input_ids", ids([[3, 4]])),
                    ("attention_mask", ids([[1, 1, 1]])),
                    ("decoder_input_ids", ids([[0], [0]])),
                    ("decoder_attention_mask", ids([[1]])),
                    ("labels", ids([[1]])),
                    ("greedy.prompt_ids", ids([[1], [2]])),
                    ("token_type_ids", ids([[0, 0]])),
                ],
                &[
                    "`decoder_input_ids` has 2 rows, `input_ids` 1",
                    "`attention_mask` is [1, 3], `input_ids` [1, 2]",
                    "`decoder_attention_mask` is [1, 1], `decoder_input_ids` [2, 1]",
                    "`labels` is [1, 1], `decoder_input_ids` [2, 1]",
                    "`greedy.prompt_ids` has 2 rows, expected 1",
                    "`token_type_ids` is not one of",
                ],
            ),
        ];
        for (inputs, named) in cases {
            let message = run(&fixture("t5"), inputs).unwrap_err().to_string();
            for part in *named {
                assert!(message.contains(part), "{message}");
            }
        }
        // nothing but padding, and a longer text than any distance
        let read = ids([[5; 200]]);
        let inputs = [
            ("input_ids", read.clone()),
            ("attention_mask", read.zeros_like()),
            ("decoder_input_ids", ids([[0]])),
        ];
        let outputs = run(&fixture("t5"), &inputs).unwrap();
        assert!(outputs.iter().all(|(_, data)| data.iter::<f32>().all(f32::is_finite)));
    }

    /// What transformers 5 makes of the first has no head in its file: the table serves, of states as they are. The
    /// configurations of the others ask for one.
    #[test]
    fn a_head_that_transformers_tied_is_the_token_table() {
        let folder = tempfile::tempdir().unwrap();
        let disk = Folder::Disk(folder.path().to_owned());
        let whole = T5Config { head: Head::TiedUnscaled, ..TINY_11 }.init(&Device::flex());
        let keys = T5Config { head: Head::TiedUnscaled, ..TINY_11 }.keys();
        save(&whole, keys, None, &folder.path().join("model.safetensors"), None).unwrap();
        let states = whole.forward(input(ids([[7, 8, 9]]), Mask::Full, ids([[3, 4]]))).decoder;
        let expected = whole.encoder.tokens.scores(states);
        let sizes = r#""vocab_size": 50, "d_model": 12, "d_ff": 20, "num_layers": 2, "num_decoder_layers": 3,
            "num_heads": 4, "d_kv": 5, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
            "feed_forward_proj": "gated-gelu""#;
        let logits = |kind: &str| {
            std::fs::write(folder.path().join("config.json"), format!("{{{kind}, {sizes}}}")).unwrap();
            let outputs =
                run(&disk, &[("input_ids", ids([[7, 8, 9]])), ("decoder_input_ids", ids([[3, 4]]))])?;
            assert_eq!(outputs[1].0, "logits");
            Ok::<_, Error>(Tensor::<3>::from_data(outputs[1].1.clone(), &Device::flex()))
        };
        for tied in [
            r#""model_type": "t5", "tie_word_embeddings": true, "scale_decoder_outputs": false"#,
            r#""model_type": "mt5", "tie_word_embeddings": true"#,
        ] {
            assert_close(logits(tied).unwrap(), &expected);
        }
        for own in ["t5", "mt5"] {
            let own = format!(r#""model_type": "{own}", "tie_word_embeddings": false"#);
            assert!(logits(&own).unwrap_err().to_string().contains("missing `lm_head.weight`"));
        }
    }

    /// Folders of `T5EncoderModel`, whose file may hold a whole model, and of `T5Model`.
    #[test]
    fn an_encoder_alone_and_a_model_without_head_are_read() {
        let folder = std::env::temp_dir().join(format!("volary-t5-parts-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let disk = Folder::Disk(folder.clone());
        let whole = TINY_11.init(&Device::flex());
        let states = whole.forward(input(ids([[7, 8, 9]]), Mask::Full, ids([[3, 4]])));
        let file = folder.join("model.safetensors");
        let configure = |class: &str| {
            let text = format!(
                r#"{{"model_type": "t5", "architectures": ["{class}"], "vocab_size": 50, "d_model": 12, "d_ff": 20,
                "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "d_kv": 5,
                "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12,
                "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false}}"#
            );
            std::fs::write(folder.join("config.json"), text).unwrap();
        };
        configure("T5EncoderModel");
        let read = [("input_ids", ids([[7, 8, 9]]))];
        for in_file in ["encoder", "both"] {
            match in_file {
                "encoder" => save(&whole.encoder, TINY_11.encoder_keys(), None, &file, None).unwrap(),
                _ => save(&whole, TINY_11.keys(), None, &file, None).unwrap(),
            };
            let outputs = run(&disk, &read).unwrap();
            assert_eq!(outputs[0].0, "last_hidden_state");
            let found = Tensor::<3>::from_data(outputs[0].1.clone(), &Device::flex());
            assert_close(found, &states.encoder);
            assert!(SYSTEM.generator.unwrap()(&disk, &LoadOptions::default(), &Device::flex()).is_err());
        }
        configure("T5Model");
        let [read] = read;
        let outputs = run(&disk, &[read, ("decoder_input_ids", ids([[3, 4]]))]).unwrap();
        let names: Vec<&str> = outputs.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["encoder_last_hidden_state", "last_hidden_state"]);
        assert_close(Tensor::<3>::from_data(outputs[1].1.clone(), &Device::flex()), &states.decoder);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
