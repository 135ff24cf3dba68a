//! PLATO-XL: dialogue by one transformer that reads the context both ways and writes the response from left to right
//! (Bao et al. 2021, <https://arxiv.org/abs/2109.09519>; "unified transformer" of PLATO-2,
//! <https://arxiv.org/abs/2006.16779>). Baidu released 11 billion parameters for English, and smaller ones for Chinese;
//! the Chinese one of 11 billion was never released.
//!
//! The numbers match PaddleNLP (`UnifiedTransformerLMHeadModel`). Its names of weights are read and, from files that
//! hold them, Knover's.
//!
//! ```sh
//! volary forward path/to/plato-xl --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::{Embedding, KvCache, LayerNorm, PreNormBlock, TiedHead};
use volary_kernels::ops::{Activation, Mask, Positions};
use volary_text::generate::{LeftPadded, Session, column, indices};
use volary_weights::{KeyMap, LoadOptions, Rule};

use Rule::{Ignore, Rename, Transpose, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a dialogue model.
#[derive(Clone, Debug, PartialEq)]
pub struct PlatoConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Number of positions in the table.
    pub n_positions: usize,
    /// How a dialogue's tokens are numbered when a response is written.
    pub numbering: Numbering,
    /// Number of kinds of tokens: context, response, and in PLATO-XL knowledge.
    pub n_token_types: usize,
    /// Number of speakers that are told apart, if they are.
    pub n_roles: Option<usize>,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// The MLP's activation, and the head's.
    pub activation: Activation,
    /// Added to variances.
    pub layer_norm_eps: f64,
    /// The token that a response begins with.
    pub start: u32,
    /// The token that ends a turn.
    pub end: u32,
    /// The token that fills short rows.
    pub padding: u32,
}

/// How a dialogue's tokens are numbered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numbering {
    /// 0, 1, 2, ... from the context's first token through the response.
    Continuous,
    /// The response from 0, and the context backwards from its last token, which has the number of tokens that a
    /// response may have: the distance between the two does not depend on either's length.
    Relative(usize),
}

/// A dialogue model.
#[derive(Module, Debug)]
pub struct Plato {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`.
    pub positions: Embedding,
    /// `[n_token_types, d_model]`.
    pub token_types: Embedding,
    /// `[n_roles, d_model]`.
    pub roles: Option<Embedding>,
    /// The blocks.
    pub blocks: Vec<PreNormBlock>,
    /// After the last one.
    pub norm: LayerNorm,
    /// Scores of tokens.
    pub head: TiedHead,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    numbering: Numbering,
    #[module(skip)]
    start: u32,
}

/// A batch of dialogues, each the context and what there is of the response.
#[derive(Clone, Debug)]
pub struct PlatoInput {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// 0 for the context and 1 for the response, `[batch, seq]`.
    pub token_types: Tensor<2, Int>,
    /// `[batch, seq]`.
    pub positions: Tensor<2, Int>,
    /// Who speaks, `[batch, seq]`; nobody's vector is added when `None`.
    pub roles: Option<Tensor<2, Int>>,
    /// Which keys are seen: of the context all, of the response those before.
    pub mask: Mask,
}

impl PlatoConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Plato {
        let Self { vocab_size, d_model, layer_norm_eps, .. } = *self;
        let norm = || LayerNorm::new(d_model, layer_norm_eps, device);
        let table = |rows| Embedding::new(rows, d_model, 0.02, device);
        let block =
            |_| PreNormBlock::new(d_model, self.d_ff, self.n_heads, self.activation, layer_norm_eps, device);
        Plato {
            tokens: table(vocab_size),
            positions: table(self.n_positions),
            token_types: table(self.n_token_types),
            roles: self.n_roles.map(table),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: norm(),
            head: TiedHead::new(d_model, vocab_size, layer_norm_eps, device),
            activation: self.activation,
            numbering: self.numbering,
            start: self.start,
        }
    }
}

impl Plato {
    /// The states of a batch of dialogues, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id, a type, a role or a position is outside its table, or shapes differ.
    pub fn forward(&self, input: PlatoInput) -> Tensor<3> {
        let x = self.embed(&input);
        self.norm.forward(self.blocks.iter().fold(x, |x, block| block.forward(x, &input.mask)))
    }

    /// The states of tokens that follow those in the caches, one per block, which grow by them. The mask is of all
    /// keys, those in the caches too.
    ///
    /// # Panics
    /// As [`Plato::forward`]; if a cache is full.
    pub fn decode(&self, input: PlatoInput, caches: &mut [KvCache]) -> Tensor<3> {
        let x = self.embed(&input);
        let layers = self.blocks.iter().zip(caches);
        self.norm.forward(layers.fold(x, |x, (block, cache)| block.cached(x, cache, &input.mask)))
    }

    /// Scores of the next token: `[..., d_model] -> [..., vocab_size]`.
    pub fn logits<const D: usize>(&self, states: Tensor<D>) -> Tensor<D> {
        self.head.forward(states, self.tokens.weight.val(), self.activation)
    }

    fn embed(&self, input: &PlatoInput) -> Tensor<3> {
        let PlatoInput { ids, token_types, positions, roles, .. } = input.clone();
        let x = self.tokens.forward(ids)
            + self.positions.forward(positions)
            + self.token_types.forward(token_types);
        match (&self.roles, roles) {
            (Some(table), Some(roles)) => x + table.forward(roles),
            _ => x,
        }
    }

    /// Responses to these contexts, each of at most `max_new` tokens. PLATO-XL draws twenty and answers with the best by
    /// [`Rank::Mean`](volary_text::generate::Rank).
    ///
    /// # Panics
    /// If there is no context, one is empty, or an id or role is outside its table.
    pub fn session(&self, contexts: &[PlatoContext], max_new: usize) -> PlatoSession<'_> {
        let device = self.tokens.weight.device();
        let ids: Vec<&[u32]> = contexts.iter().map(|context| &context.ids[..]).collect();
        let roles: Vec<&[u32]> = contexts.iter().map(|context| &context.roles[..]).collect();
        let (prompts, roles) = (LeftPadded::new(&ids, &device), LeftPadded::new(&roles, &device).ids());
        let caches = self.blocks.iter().map(|_| KvCache::new(prompts.longest() + 1 + max_new)).collect();
        PlatoSession { model: self, prompts, roles, caches, written: 0 }
    }
}

/// What was said so far, token by token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlatoContext {
    /// The tokens.
    pub ids: Vec<u32>,
    /// Who speaks each of them: 0 is the one who is to respond.
    pub roles: Vec<u32>,
}

impl PlatoContext {
    /// A dialogue of two, whose turns each end with `end`. The last turn is the other's.
    pub fn of(ids: Vec<u32>, end: u32) -> Self {
        let turn_of_each = ids.iter().scan(0, |turn, &id| {
            let this = *turn;
            *turn += u32::from(id == end);
            Some(this)
        });
        let turns: Vec<u32> = turn_of_each.collect();
        let last = turns.last().copied().unwrap_or(0);
        Self { roles: turns.into_iter().map(|turn| (last - turn + 1) % 2).collect(), ids }
    }
}

/// Responses that are being written.
pub struct PlatoSession<'a> {
    model: &'a Plato,
    prompts: LeftPadded,
    /// Of the prompts' tokens, `[rows, longest]`.
    roles: Tensor<2, Int>,
    caches: Vec<KvCache>,
    /// How many tokens of the response were read.
    written: usize,
}

impl PlatoSession<'_> {
    /// Where `count` tokens of the response from the next one on stand, `[rows, count]`.
    fn places(&self, rows: usize) -> Tensor<2, Int> {
        let device = self.model.tokens.weight.device();
        match self.model.numbering {
            Numbering::Relative(_) => Tensor::full([rows, 1], self.written as i64, &device),
            Numbering::Continuous => {
                each(self.prompts.positions(self.prompts.longest() + self.written, 1), rows, 1, &device)
            }
        }
    }

    /// One token of the response per row, after what is in the caches.
    fn response(&self, tokens: &[u32]) -> PlatoInput {
        let ids = column(tokens, &self.model.tokens.weight.device());
        PlatoInput {
            token_types: ids.ones_like(),
            positions: self.places(tokens.len()),
            roles: Some(ids.zeros_like()),
            mask: self.prompts.mask(self.prompts.longest() + self.written + 1),
            ids,
        }
    }

    fn scores(&mut self, input: PlatoInput) -> Tensor<2> {
        let [_, new] = input.ids.dims();
        self.written += 1;
        let states = self.model.decode(input, &mut self.caches); // [rows, new, d_model]
        self.model.logits(states.narrow(1, new - 1, 1).squeeze_dim(1))
    }
}

/// Positions as a tensor, `[rows, count]`.
fn each(positions: Positions, rows: usize, count: usize, device: &Device) -> Tensor<2, Int> {
    match positions {
        Positions::Each(each) => each,
        Positions::From(first) => {
            let places = Tensor::<1, Int>::arange(first as i64..(first + count) as i64, device);
            places.unsqueeze::<2>().expand([rows, count])
        }
    }
}

impl Session for PlatoSession<'_> {
    fn start(&mut self) -> Tensor<2> {
        let ids = self.prompts.ids();
        let [rows, longest] = ids.dims();
        let device = ids.device();
        let positions = match self.model.numbering {
            Numbering::Relative(response) => {
                let backwards: Vec<i64> = (0..longest).rev().map(|place| (response + place) as i64).collect();
                Tensor::<1, Int>::from_ints(backwards.as_slice(), &device)
                    .unsqueeze::<2>()
                    .expand([rows, longest])
            }
            Numbering::Continuous => each(self.prompts.positions(0, longest), rows, longest, &device),
        };
        let first = self.response(&vec![self.model.start; rows]);
        let join = |context, response| Tensor::cat(vec![context, response], 1);
        let input = PlatoInput {
            token_types: join(ids.zeros_like(), first.token_types),
            positions: join(positions, first.positions),
            roles: first.roles.map(|response| join(self.roles.clone(), response)),
            mask: Mask::All(vec![Mask::Prefix(vec![longest; rows]), first.mask]),
            ids: join(ids, first.ids),
        };
        self.scores(input)
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        let input = self.response(tokens);
        self.scores(input)
    }

    fn select(&mut self, rows: &[usize]) {
        self.prompts.select(rows);
        let rows = indices(rows, &self.model.tokens.weight.device());
        self.roles = self.roles.clone().select(0, rows.clone());
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

/// How many tokens Knover and PaddleNLP leave for a response.
const RESPONSE: usize = 128;

impl PlatoConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of PaddleNLP, or Knover's under that name; what it leaves out has the values of PaddleNLP's
    /// `UnifiedTransformerConfig`.
    ///
    /// Where speakers are told apart tokens are numbered relatively, as for PLATO-XL, elsewhere continuously: a
    /// configuration does not say it.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        config.only("normalize_before", &["true"])?;
        config.only("preprocess_cmd", &["\"n\""])?;
        config.only("pre_encoder_cmd", &["\"d\"", "\"\""])?;
        let d_model = config.size_or("hidden_size", 768)?;
        let n_heads = config.size_or("num_attention_heads", 12)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        let vocab_size = config.size_or("vocab_size", 30004)?;
        let n_positions = config.size_or("max_position_embeddings", 512)?;
        let d_ff = if config.has("inner_hidden_size") { "inner_hidden_size" } else { "intermediate_size" };
        let n_roles = config.has("role_type_size").then(|| config.size("role_type_size")).transpose()?;
        let token = |field: &str, default: i64| {
            let id = usize::try_from(config.integer_or(field, default)?).ok().filter(|&id| id < vocab_size);
            let expected = format!("a token, 0 to {}", vocab_size - 1);
            id.map(|id| id as u32).ok_or_else(|| config.error(field, &expected))
        };
        Ok(Self {
            vocab_size,
            n_positions,
            numbering: match n_roles {
                Some(_) => Numbering::Relative(RESPONSE.min(n_positions.div_ceil(2))),
                None => Numbering::Continuous,
            },
            n_token_types: config.size_or("type_vocab_size", 2)?,
            n_roles,
            d_model,
            d_ff: config.size_or(d_ff, 4 * d_model)?,
            n_layers: config.blocks_or("num_hidden_layers", 12)?,
            n_heads,
            activation: config.activation_or("hidden_act", Activation::Gelu)?,
            layer_norm_eps: config.number_or("epsilon", 1e-5)?,
            start: token("bos_token_id", 1)?,
            end: token("eos_token_id", 2)?,
            padding: token("pad_token_id", 0)?,
        })
    }
}

const NAMED: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// Paddle stores a projection as `[d_in, d_out]`.
const LINEAR: &[Rule] = &[Transpose("weight", "weight"), Rename("bias", "bias")];

const BLOCK: &[Rule] = &[
    Under("norm1.", "norm1.", NAMED),
    Under("self_attn.q_proj.", "attention.query.", LINEAR),
    Under("self_attn.k_proj.", "attention.key.", LINEAR),
    Under("self_attn.v_proj.", "attention.value.", LINEAR),
    Under("self_attn.out_proj.", "attention.output.", LINEAR),
    Under("norm2.", "norm2.", NAMED),
    Under("linear1.", "mlp.up.", LINEAR),
    Under("linear2.", "mlp.down.", LINEAR),
];

const STATIC_LINEAR: &[Rule] = &[Transpose("w_0", "weight"), Rename("b_0", "bias")];

const STATIC_NORM: &[Rule] = &[Rename("scale", "weight"), Rename("bias", "bias")];

const STATIC_BLOCK: &[Rule] = &[
    Under("pre_att_layer_norm_", "norm1.", STATIC_NORM),
    Under("multi_head_att_query_fc.", "attention.query.", STATIC_LINEAR),
    Under("multi_head_att_key_fc.", "attention.key.", STATIC_LINEAR),
    Under("multi_head_att_value_fc.", "attention.value.", STATIC_LINEAR),
    Under("multi_head_att_output_fc.", "attention.output.", STATIC_LINEAR),
    Under("pre_ffn_layer_norm_", "norm2.", STATIC_NORM),
    Under("ffn_fc_0.", "mlp.up.", STATIC_LINEAR),
    Under("ffn_fc_1.", "mlp.down.", STATIC_LINEAR),
];

const PADDLE: &[Rule] = &[
    Rename("embeddings.word_embeddings.weight", "tokens.weight"),
    Rename("embeddings.position_embeddings.weight", "positions.weight"),
    Rename("embeddings.token_type_embeddings.weight", "token_types.weight"),
    Rename("embeddings.role_embeddings.weight", "roles.weight"),
    Under("encoder.layers.{}.", "blocks.{}.", BLOCK),
    Under("encoder.norm.", "norm.", NAMED),
    Under("lm_head.transform.", "head.transform.", LINEAR),
    Under("lm_head.layer_norm.", "head.norm.", NAMED),
    Rename("lm_head.decoder_bias", "head.bias"),
    Ignore("lm_head.decoder_weight"),
];

const KNOVER: &[Rule] = &[
    Rename("word_embedding", "tokens.weight"),
    Rename("pos_embedding", "positions.weight"),
    Rename("sent_embedding", "token_types.weight"),
    Rename("role_embedding", "roles.weight"),
    Under("encoder_layer_{}_", "blocks.{}.", STATIC_BLOCK),
    Under("post_encoder_layer_norm_", "norm.", STATIC_NORM),
    Under("mask_lm_trans_fc.", "head.transform.", STATIC_LINEAR),
    Under("mask_lm_trans_layer_norm_", "head.norm.", STATIC_NORM),
    Rename("mask_lm_out_fc.b_0", "head.bias"),
];

/// Keys of PaddleNLP's `UnifiedTransformerLMHeadModel`, or of Knover.
pub const KEYS: KeyMap =
    KeyMap::new(&[Under("", "", PADDLE), Under("", "", KNOVER)]).with_prefixes(&["unified_transformer."]);

/// PLATO as the registry knows it.
pub const SYSTEM: System = System {
    name: "plato",
    about: "dialogue: PLATO-XL, PLATO-mini, the unified transformer",
    file: "models/plato.rs",
    tasks: &["generate", "forward"],
    proved: &["plato_xl"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| match config.text("model_type") {
            None => config.has("preprocess_cmd") && config.has("type_vocab_size"), // Knover's
            family => family == Some("unified_transformer"),
        })
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &PlatoConfig::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(|folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?))),
};

/// A dialogue model behind the forward contract.
struct Runner {
    model: Plato,
    config: PlatoConfig,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let config = PlatoConfig::of(folder)?;
        let model = fill(folder, config.init(device), &KEYS, options)?;
        Ok(Self { model, config })
    }
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `token_type_ids`, `position_ids`, `role_ids` and an additive `attention_mask`
    /// `[batch, 1, seq, seq]`. Without a mask every token but padding is seen.
    ///
    /// Gives `hidden_states` and `logits`. With roles also `logits_without_roles`. With the same number of tokens of
    /// type 1, the response, at the end of each row, two or more: `response_token_nll`, of each but the first given
    /// those before, and `rerank_score_mean_nll`, its mean.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let PlatoConfig { vocab_size, n_positions, n_token_types, n_roles, padding, .. } = self.config;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let token_types = inputs.ids::<2>("token_type_ids", n_token_types);
        let positions = inputs.ids::<2>("position_ids", n_positions);
        let roles = inputs.ids::<2>("role_ids", n_roles.unwrap_or(i64::MAX as usize));
        let bias = inputs.float::<4>("attention_mask");
        inputs.missing("input_ids");
        let Some(ids) = ids else { return inputs.finish().map(|()| Outputs::new()) }; // always an error

        let [batch, seq] = ids.dims();
        for (name, found) in
            [("token_type_ids", &token_types), ("position_ids", &positions), ("role_ids", &roles)]
        {
            inputs.like_ids(name, found.as_ref().map(Tensor::dims), ids.dims());
        }
        if positions.is_none() && seq > n_positions {
            let last = n_positions - 1;
            inputs.problem(format!(
                "`input_ids` has texts that reach position {}, the last one is {last}",
                seq - 1
            ));
        }
        let wanted = [batch, self.config.n_heads, seq, seq];
        if let Some(found) = bias.as_ref().map(Tensor::dims)
            && found.iter().zip(wanted).any(|(&axis, wanted)| axis != 1 && axis != wanted)
        {
            inputs.problem(format!("`attention_mask` is {found:?}, the scores {wanted:?}"));
        }
        inputs.finish()?;

        let mask = match bias {
            Some(bias) => Mask::Bias(bias),
            None => Mask::Padding(ids.clone().not_equal_elem(i64::from(padding))),
        };
        let input = PlatoInput {
            token_types: token_types.clone().unwrap_or_else(|| ids.zeros_like()),
            positions: positions.unwrap_or_else(|| each(Positions::From(0), batch, seq, &ids.device())),
            roles: roles.filter(|_| n_roles.is_some()),
            mask,
            ids: ids.clone(),
        };
        let without_roles = input.roles.is_some().then(|| PlatoInput { roles: None, ..input.clone() });
        let states = self.model.forward(input);
        let logits = self.model.logits(states.clone());
        let mut outputs = vec![output("hidden_states", states), output("logits", logits.clone())];
        outputs.extend(
            without_roles
                .map(|input| output("logits_without_roles", self.model.logits(self.model.forward(input)))),
        );
        if let Some(length) = token_types.and_then(response_length) {
            let targets = ids.narrow(1, seq - length + 1, length - 1);
            let chances = log_softmax(logits.narrow(1, seq - length, length - 1), 2);
            let nll = -chances.gather(2, targets.unsqueeze_dim(2)).squeeze_dim::<2>(2); // [batch, length - 1]
            outputs.push(output("rerank_score_mean_nll", nll.clone().mean_dim(1).squeeze_dim::<1>(1)));
            outputs.push(output("response_token_nll", nll));
        }
        Ok(outputs)
    }
}

/// How many tokens of type 1 end each of the rows, if all have as many, two or more, and no others.
fn response_length(token_types: Tensor<2, Int>) -> Option<usize> {
    let [_, seq] = token_types.dims();
    let types: Vec<i64> = token_types.into_data().convert::<i64>().iter::<i64>().collect();
    let length = |row: &[i64]| row.iter().rev().take_while(|&&kind| kind == 1).count();
    let first = length(&types[..seq]);
    let is_same =
        |row: &[i64]| length(row) == first && row.iter().filter(|&&kind| kind == 1).count() == first;
    (first >= 2 && types.chunks(seq).all(is_same)).then_some(first)
}

impl Generator for Runner {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn context(&self) -> Option<usize> {
        Some(self.config.n_positions)
    }

    /// The token that begins a response has a position too.
    fn room(&self, prompt: usize) -> Option<usize> {
        let room = self.config.n_positions.saturating_sub(prompt + 1);
        Some(match self.config.numbering {
            Numbering::Relative(response) => room.min(response.saturating_sub(1)),
            Numbering::Continuous => room,
        })
    }

    /// A prompt is a dialogue of two, whose turns each end with the end token. The last is the other's.
    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        let PlatoConfig { numbering, n_positions, end, .. } = self.config;
        // the token that begins a response has a position too
        check_prompts(self, prompts, max_new + 1)?;
        if let Numbering::Relative(response) = numbering {
            let mut problems = Vec::new();
            if max_new >= response {
                problems
                    .push(format!("{max_new} new tokens are too many: a response has fewer than {response}"));
            }
            for (row, prompt) in
                prompts.iter().enumerate().filter(|(_, prompt)| prompt.len() + response > n_positions)
            {
                let (found, room) = (prompt.len(), n_positions - response);
                problems.push(format!(
                    "prompt {row} has {found} tokens, at most {room} leave room for a response"
                ));
            }
            if !problems.is_empty() {
                return Err(Error::Prompt { problems });
            }
        }
        let contexts: Vec<_> = prompts.iter().map(|prompt| PlatoContext::of(prompt.clone(), end)).collect();
        Ok(Box::new(self.model.session(&contexts, max_new)))
    }
}

/// PaddleNLP's `plato-xl`: Bao et al. 2021, section 3.1.
const XL: PlatoConfig = PlatoConfig {
    vocab_size: 8001,
    n_positions: 1024,
    numbering: Numbering::Relative(RESPONSE),
    n_token_types: 3,
    n_roles: Some(128),
    d_model: 3072,
    d_ff: 18432,
    n_layers: 72,
    n_heads: 32,
    activation: Activation::Gelu,
    layer_norm_eps: 1e-5,
    start: 1,
    end: 2,
    padding: 0,
};

/// PaddleNLP's `plato-mini`.
const MINI: PlatoConfig = PlatoConfig {
    vocab_size: 30001,
    n_positions: 512,
    numbering: Numbering::Continuous,
    n_token_types: 2,
    n_roles: None,
    d_model: 768,
    d_ff: 3072,
    n_layers: 6,
    n_heads: 12,
    ..XL
};

/// PaddleNLP's `unified_transformer-12L-cn`.
const BASE: PlatoConfig = PlatoConfig { vocab_size: 30004, n_layers: 12, ..MINI };

const fn preset(name: &'static str, weights: Weights, config: PlatoConfig, parameters: usize) -> Preset {
    let source =
        "counted from PaddleNLP's configuration, with its head; the paper says 11 billion for PLATO-XL";
    Preset { name, shape: Shape::Plato(config), weights, license: "Apache-2.0", parameters, source }
}

const PADDLENLP: Weights = Weights::Elsewhere("PaddleNLP");

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("plato-xl", PADDLENLP, XL, 10_912_541_505),
    preset("PaddlePaddle/plato-mini", Weights::Hub, MINI, 66_586_417),
    preset("unified_transformer-12L-cn", PADDLENLP, BASE, 109_115_956),
    preset("unified_transformer-12L-cn-luge", PADDLENLP, BASE, 109_115_956),
];

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use burn::tensor::{TensorData, Tolerance};
    use volary_text::generate::{greedy, log_likelihoods};
    use volary_weights::{load, open, parameters, read_tensors, save};

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/plato_xl")
    }

    /// The fixture's model, with responses that begin with `start`.
    fn trained(start: u32, numbering: Numbering) -> Plato {
        let folder = Folder::Disk(fixture());
        let config = PlatoConfig { start, numbering, ..PlatoConfig::of(&folder).unwrap() };
        fill(&folder, config.init(&Device::flex()), &KEYS, &LoadOptions::default()).unwrap()
    }

    fn run(folder: &Path, inputs: &[(&str, TensorData)]) -> Result<Outputs, Error> {
        let inputs = inputs.iter().map(|(name, data)| (name.to_string(), data.clone())).collect();
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

    #[test]
    fn a_pickle_of_paddle_gives_the_same_numbers() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["config.json", "model_state.pdparams"] {
            std::fs::copy(fixture().join(name), folder.path().join(name)).unwrap();
        }
        let inputs = [("input_ids", ids([1, 4], &[8, 4, 57, 67]))];
        assert_eq!(run(folder.path(), &inputs).unwrap(), run(&fixture(), &inputs).unwrap());
    }

    #[test]
    fn the_names_of_knover_fill_the_same_model() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.safetensors");
        let model = trained(1, Numbering::Relative(10));
        save(&model, &KeyMap::new(KNOVER), None, &file, None).unwrap();
        let checkpoint = open(&file).unwrap();
        let names: Vec<&str> = checkpoint.entries().iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names.len(), parameters(&model).len());
        assert!(names.contains(&"encoder_layer_1_multi_head_att_query_fc.w_0"), "{names:?}");
        let config = PlatoConfig::of(&Folder::Disk(fixture())).unwrap();
        let again = load(config.init(&Device::flex()), &*checkpoint, &KEYS, &LoadOptions::default()).unwrap();
        let query = |model: &Plato| model.blocks[1].attention.query.weight.val().into_data();
        query(&again).assert_eq(&query(&model), true);
    }

    /// The fixture's contexts, the first tokens of its responses and the rest of them.
    fn dialogues() -> Vec<(PlatoContext, u32, Vec<u32>)> {
        let inputs = read_tensors(&fixture().join("inputs.safetensors")).unwrap();
        let rows = |name: &str| -> Vec<Vec<u32>> {
            let all: Vec<u32> = inputs[name].iter::<i64>().map(|id| id as u32).collect();
            all.chunks(12).map(<[u32]>::to_vec).collect()
        };
        let dialogue = |(ids, roles): (Vec<u32>, Vec<u32>)| {
            let context = PlatoContext { ids: ids[..8].to_vec(), roles: roles[..8].to_vec() };
            (context, ids[8], ids[9..].to_vec())
        };
        rows("input_ids").into_iter().zip(rows("role_ids")).map(dialogue).collect()
    }

    /// Beside a shorter candidate and one of other tokens.
    #[test]
    fn responses_fit_as_the_reference_has_it() {
        let outputs = read_tensors(&fixture().join("outputs.safetensors")).unwrap();
        let expected: Vec<f32> = outputs["rerank_score_mean_nll"].iter::<f32>().collect();
        let each: Vec<f32> = outputs["response_token_nll"].iter::<f32>().collect();
        for (row, (context, start, response)) in dialogues().into_iter().enumerate() {
            let model = trained(start, Numbering::Relative(10));
            let candidates = [response.clone(), response[..1].to_vec(), [&response[..2], &[0, 0]].concat()];
            let mut session = model.session(&[context.clone(), context.clone(), context], 4);
            let likelihoods = log_likelihoods(&mut session, &candidates).unwrap();
            let found: Vec<f32> = likelihoods[0].iter().map(|&likelihood| -likelihood as f32).collect();
            for (found, expected) in found.iter().zip(&each[row * 3..]) {
                assert!((found - expected).abs() < 6e-5, "{found:?} {each:?}");
            }
            assert!((found.iter().sum::<f32>() / 3.0 - expected[row]).abs() < 6e-5, "{found:?} {expected:?}");
            assert!((likelihoods[1][0] - likelihoods[0][0]).abs() < 1e-5);
            assert!((likelihoods[2][1] - likelihoods[0][1]).abs() < 1e-5);
        }
    }

    /// The cache picks what the scores of the whole dialogue pick, and contexts of several lengths in one batch are
    /// answered as each is alone.
    #[test]
    fn greedy_tokens_are_those_of_the_whole_forward_pass() {
        let row = |values: Vec<u32>| {
            let values: Vec<i64> = values.into_iter().map(i64::from).collect();
            Tensor::<1, Int>::from_ints(values.as_slice(), &Device::flex()).unsqueeze::<2>()
        };
        for numbering in [Numbering::Relative(10), Numbering::Continuous] {
            let model = trained(1, numbering);
            let contexts = [vec![7, 28, 66, 5, 2], vec![23, 2], vec![64, 2, 44, 66, 2, 9, 2]]
                .map(|context| PlatoContext::of(context, 2));
            let together = greedy(&mut model.session(&contexts, 5), 5);
            for (context, together) in contexts.iter().zip(together) {
                let length = context.ids.len() as u32;
                let mut response = vec![1];
                for new in 1..=5 {
                    let positions = match numbering {
                        Numbering::Relative(_) => (10..10 + length).rev().chain(0..new).collect(),
                        Numbering::Continuous => (0..length + new).collect(),
                    };
                    let states = model.forward(PlatoInput {
                        ids: row([&context.ids[..], &response].concat()),
                        token_types: row([vec![0; length as usize], vec![1; new as usize]].concat()),
                        positions: row(positions),
                        roles: Some(row([&context.roles[..], &vec![0; new as usize]].concat())),
                        mask: Mask::Prefix(vec![length as usize]),
                    });
                    let last = states.narrow(1, (length + new) as usize - 1, 1);
                    response.push(model.logits(last).argmax(2).into_scalar::<i64>() as u32);
                }
                assert_eq!(response[1..], together, "{numbering:?}");
            }
        }
    }

    #[test]
    fn a_session_goes_on_from_selected_rows() {
        let model = trained(1, Numbering::Relative(10));
        let contexts = [vec![3, 4, 5, 2], vec![6, 2]].map(|context| PlatoContext::of(context, 2));
        let mut session = model.session(&contexts, 3);
        session.start();
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (row, (context, token)) in [(1, 9), (0, 9), (1, 10)].into_iter().enumerate() {
            let mut alone = model.session(&contexts[context..=context], 1);
            alone.start();
            let alone = alone.read(&[token]).into_data();
            let chosen = chosen.clone().narrow(0, row, 1).into_data();
            chosen.assert_approx_eq::<f32>(&alone, Tolerance::absolute(1e-4));
        }
    }

    #[test]
    fn the_last_turn_is_the_others() {
        let roles = |ids: &[u32]| PlatoContext::of(ids.to_vec(), 2).roles;
        assert_eq!(roles(&[1, 7, 2, 8, 8, 2, 9, 2]), [1, 1, 1, 0, 0, 0, 1, 1]);
        assert_eq!(roles(&[7, 2, 8]), [0, 0, 1]);
        assert_eq!(roles(&[7]), [1]);
    }

    #[test]
    fn inputs_that_do_not_fit_are_told_all_at_once() {
        let bias = TensorData::new(vec![0f32; 9], [1, 1, 3, 3]);
        let inputs = [
            ("input_ids", ids([1, 2], &[3, 4])),
            ("attention_mask", bias),
            ("role_ids", ids([1, 2], &[0, 8])),
            ("token_type_ids", ids([1, 3], &[0; 3])),
        ];
        let message = run(&fixture(), &inputs).unwrap_err().to_string();
        for part in [
            "`role_ids` holds 8, expected 0 to 7",
            "`token_type_ids` is [1, 3], `input_ids` [1, 2]",
            "`attention_mask` is [1, 1, 3, 3], the scores [1, 4, 2, 2]",
        ] {
            assert!(message.contains(part), "{message}");
        }
        let message = run(&fixture(), &[("input_ids", ids([1, 33], &[3; 33]))]).unwrap_err().to_string();
        assert!(message.contains("reach position 32, the last one is 31"), "{message}");
    }

    #[test]
    fn prompts_leave_room_for_a_response() {
        let runner =
            Runner::load(&Folder::Disk(fixture()), &LoadOptions::default(), &Device::flex()).unwrap();
        assert_eq!(runner.config.numbering, Numbering::Relative(16));
        let message = |prompt: Vec<u32>, max_new| match runner.session(&[prompt], max_new) {
            Ok(_) => String::new(),
            Err(error) => error.to_string(),
        };
        assert_eq!(message(vec![5; 16], 15), "");
        assert!(message(vec![5; 17], 2).contains("prompt 0 has 17 tokens, at most 16 leave room"));
        assert!(message(vec![5; 3], 16).contains("16 new tokens are too many"));
        assert!(message(vec![72], 2).contains("holds 72, expected 0 to 71"));
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""normalize_before": false"#, "`normalize_before`: expected true"),
            (r#""preprocess_cmd": """#, "`preprocess_cmd`"),
            (r#""bos_token_id": 30004"#, "`bos_token_id`: expected a token, 0 to 30003"),
            (r#""hidden_size": 30"#, "`num_attention_heads`: expected a divisor of 30"),
        ] {
            let config = Config::parse(Path::new("config.json"), format!("{{{fields}}}").as_bytes()).unwrap();
            let message = PlatoConfig::parse(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
