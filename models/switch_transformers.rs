//! Switch Transformers: T5 ([`crate::t5`]) in which every so many feed-forward layers are mixtures of experts, of which a
//! token goes to one (Fedus et al. 2021, <https://arxiv.org/abs/2101.03961>).
//!
//! The numbers match `transformers` (`SwitchTransformersForConditionalGeneration`), where an expert takes so many tokens
//! of every sequence, padding included, and a token that finds no room passes through. What it multiplies tokens with in
//! training, and its losses, are not built.
//!
//! ```sh
//! volary forward path/to/switch-base-8 --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use volary_kernels::layers::{Attention, LinearConfig, Mlp, MlpConfig, RmsNorm};
use volary_kernels::moe::gate::{Capacity, KTop1Gate};
use volary_kernels::moe::{Choices, ExpertMlp, ExpertMlpConfig, mix};
use volary_kernels::ops::{Activation, Mask};
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Ignore, Rename, StackTranspose, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::t5::{ATTENTION, Head, MlpForm, T5, T5Config, T5Input, buckets};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of an encoder and a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct SwitchConfig {
    /// All but the experts; `d_ff` is the width of one, and of other MLPs.
    pub t5: T5Config,
    /// Number of experts of a layer.
    pub n_experts: usize,
    /// How many tokens of a sequence an expert takes.
    pub capacity: usize,
    /// Whether routers have biases.
    pub router_bias: bool,
    /// Which blocks of the encoder have experts.
    pub sparse_encoder: Sparse,
    /// Which blocks of the decoder have experts.
    pub sparse_decoder: Sparse,
}

/// Which blocks have experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sparse {
    /// None.
    Never,
    /// All.
    Always,
    /// The second, and from there on every so many.
    Every(usize),
}

impl Sparse {
    const fn of_step(step: usize) -> Self {
        match step {
            0 => Self::Never,
            1 => Self::Always,
            step => Self::Every(step),
        }
    }

    /// Whether this block has them.
    pub const fn has(self, block: usize) -> bool {
        match self {
            Self::Never => false,
            Self::Always => true,
            Self::Every(step) => block % step == 1,
        }
    }
}

/// An encoder and a decoder.
#[derive(Module, Debug)]
pub struct Switch {
    /// Tokens, biases of distances, last norms and head. It has no blocks of its own.
    pub around: T5,
    /// The encoder's blocks.
    pub encoder: Vec<SwitchEncoderBlock>,
    /// The decoder's.
    pub decoder: Vec<SwitchDecoderBlock>,
}

/// A pre-norm block of the encoder.
#[derive(Module, Debug)]
pub struct SwitchEncoderBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: RmsNorm,
    /// The MLP, or the experts.
    pub mlp: FeedForward,
}

/// A pre-norm block of the decoder.
#[derive(Module, Debug)]
pub struct SwitchDecoderBlock {
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
    /// The MLP, or the experts.
    pub mlp: FeedForward,
}

/// What a block does to each token.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for a block")]
pub enum FeedForward {
    /// One MLP.
    Dense(DenseMlp),
    /// One of many.
    Sparse(SwitchMlp),
}

/// An MLP without biases.
#[derive(Module, Debug)]
pub struct DenseMlp {
    /// Two projections.
    pub mlp: Mlp,
    #[module(skip)]
    activation: Activation,
}

/// MLPs without biases, and what chooses one for each token.
#[derive(Module, Debug)]
pub struct SwitchMlp {
    /// Of one group.
    pub router: KTop1Gate,
    /// Two projections each.
    pub experts: ExpertMlp,
    #[module(skip)]
    activation: Activation,
}

/// What a router says of the tokens of a batch.
#[derive(Clone, Debug)]
pub struct Routed {
    /// `[batch, seq, n_experts]`.
    pub logits: Tensor<3>,
    /// One expert of each token, or none where it found no room: `[batch * seq]`.
    pub experts: Choices,
}

/// What both make of a batch.
#[derive(Clone, Debug)]
pub struct SwitchOutput {
    /// `[batch, seq, d_model]`.
    pub encoder: Tensor<3>,
    /// `[batch, written, d_model]`.
    pub decoder: Tensor<3>,
    /// Of each block of the encoder that has experts.
    pub encoder_routers: Vec<(usize, Routed)>,
    /// Of each block of the decoder that has experts.
    pub decoder_routers: Vec<(usize, Routed)>,
}

impl SwitchConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Switch {
        let t5 = &self.t5;
        let encoder = |block| SwitchEncoderBlock {
            norm1: t5.norm(device),
            attention: t5.attention(device),
            norm2: t5.norm(device),
            mlp: self.feed_forward(self.sparse_encoder.has(block), device),
        };
        let decoder = |block| SwitchDecoderBlock {
            norm1: t5.norm(device),
            attention: t5.attention(device),
            norm2: t5.norm(device),
            cross: t5.attention(device),
            norm3: t5.norm(device),
            mlp: self.feed_forward(self.sparse_decoder.has(block), device),
        };
        Switch {
            around: T5Config { n_layers: 0, n_decoder_layers: 0, ..t5.clone() }.init(device),
            encoder: (0..t5.n_layers).map(encoder).collect(),
            decoder: (0..t5.n_decoder_layers).map(decoder).collect(),
        }
    }

    fn feed_forward(&self, is_sparse: bool, device: &Device) -> FeedForward {
        let T5Config { d_model, d_ff, activation, .. } = self.t5;
        if !is_sparse {
            let mlp = MlpConfig::new(d_model, d_ff).with_bias(false).init(device);
            return FeedForward::Dense(DenseMlp { mlp, activation });
        }
        let router = LinearConfig::new(d_model, self.n_experts).with_bias(self.router_bias).init(device);
        FeedForward::Sparse(SwitchMlp {
            router: KTop1Gate { routers: vec![router], capacity: Capacity::Tokens(self.capacity) },
            experts: ExpertMlpConfig::new(self.n_experts, d_model, d_ff).with_bias(false).init(device),
            activation,
        })
    }
}

impl FeedForward {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, and what the router says, if there is one.
    pub fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Option<Routed>) {
        match self {
            FeedForward::Dense(DenseMlp { mlp, activation }) => (mlp.forward(x, *activation), None),
            FeedForward::Sparse(switch) => {
                let (y, routed) = switch.forward(x);
                (y, Some(routed))
            }
        }
    }
}

impl SwitchMlp {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, and what the router says.
    pub fn forward(&self, x: Tensor<3>) -> (Tensor<3>, Routed) {
        let [batch, seq, d_model] = x.dims();
        let x = x.reshape([batch * seq, d_model]);
        let logits = self.router.logits(&x); // of one group
        let routing = self.router.choose(logits.clone(), seq);
        let y = mix(x, &routing, |rows, dispatch| self.experts.forward(rows, self.activation, dispatch));
        let logits = Tensor::cat(logits, 1).reshape([batch as i64, seq as i64, -1]);
        (y.reshape([batch, seq, d_model]), Routed { logits, experts: routing.experts })
    }
}

impl SwitchEncoderBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, and what the router says, if there is one.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> (Tensor<3>, Option<Routed>) {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), mask);
        let (x, normed) = self.norm2.add(x, attended);
        let (y, routed) = self.mlp.forward(normed);
        (x + y, routed)
    }
}

impl SwitchDecoderBlock {
    /// `[batch, written, d_model] -> [batch, written, d_model]`, of what the encoder has `read`; and what the router says,
    /// if there is one.
    pub fn forward(
        &self,
        x: Tensor<3>,
        mask: &Mask,
        read: &Tensor<3>,
        cross_mask: &Mask,
    ) -> (Tensor<3>, Option<Routed>) {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), mask);
        let (x, normed) = self.norm2.add(x, attended);
        let query = self.cross.queries(normed); // [batch, n_heads, written, d_head]
        let (key, value) = self.cross.keys_values(read.clone());
        let (x, normed) = self.norm3.add(x, self.cross.attend(query, key, value, cross_mask));
        let (y, routed) = self.mlp.forward(normed);
        (x + y, routed)
    }
}

impl Switch {
    /// The states of a batch of texts and of what is written of them.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: T5Input) -> SwitchOutput {
        let T5Input { ids, mask, decoder_ids, decoder_mask, cross_mask } = input;
        let T5 { encoder, decoder, .. } = &self.around;

        let mut x = encoder.tokens.forward(ids); // [batch, seq, d_model]
        let [_, seq, _] = x.dims();
        let mask = Mask::All(vec![Mask::Bias(encoder.bias.forward(seq, seq)), mask]);
        let mut encoder_routers = Vec::new();
        for (at, block) in self.encoder.iter().enumerate() {
            let (y, routed) = block.forward(x, &mask);
            x = y;
            encoder_routers.extend(routed.map(|routed| (at, routed)));
        }
        let read = encoder.norm.forward(x);

        let mut x = encoder.tokens.forward(decoder_ids); // [batch, written, d_model]
        let [_, written, _] = x.dims();
        let bias = Mask::Bias(decoder.bias.forward(written, written));
        let mask = Mask::All(vec![bias, Mask::Causal, decoder_mask]);
        let mut decoder_routers = Vec::new();
        for (at, block) in self.decoder.iter().enumerate() {
            let (y, routed) = block.forward(x, &mask, &read, &cross_mask);
            x = y;
            decoder_routers.extend(routed.map(|routed| (at, routed)));
        }
        SwitchOutput { encoder: read, decoder: decoder.norm.forward(x), encoder_routers, decoder_routers }
    }

    /// Scores of the next token: `[batch, written, d_model] -> [batch, written, vocab_size]`.
    pub fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.around.logits(states)
    }
}

impl SwitchConfig {
    /// `config.json` of `transformers`; what it leaves out has the values of `SwitchTransformersConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        config.only("is_decoder", &["false"])?;
        config.only("router_dtype", &["\"float32\""])?;
        let head = match (config.first_of("architectures"), config.flag_or("tie_word_embeddings", true)?) {
            (Some("SwitchTransformersEncoderModel"), _) => {
                return Err(config.error("architectures", "a model with a decoder"));
            }
            (Some("SwitchTransformersModel"), _) => Head::Absent,
            (_, true) => Head::Tied,
            (_, false) => Head::Own,
        };
        let vocab_size = config.size_or("vocab_size", 32128)?;
        let n_layers = config.blocks_or("num_layers", 12)?;
        let n_decoder_layers = config.blocks_or("num_decoder_layers", 12)?;
        let (n_buckets, max_distance) = buckets(config)?;
        let has_experts = config.has("num_experts");
        Ok(Self {
            t5: T5Config {
                vocab_size,
                d_model: config.size_or("d_model", 768)?,
                d_ff: config.size_or("d_ff", 2048)?,
                n_layers,
                n_decoder_layers,
                n_heads: config.size_or("num_heads", 12)?,
                d_head: config.size_or("d_kv", 64)?,
                mlp: MlpForm::Plain,
                activation: config.activation_or("dense_act_fn", Activation::Relu)?,
                n_buckets,
                max_distance,
                rms_norm_eps: config.number_or("layer_norm_epsilon", 1e-6)?,
                head,
                start: config.token_or("decoder_start_token_id", 0, vocab_size)?,
                padding: config.token_or("pad_token_id", 0, vocab_size)?,
            },
            n_experts: if has_experts { experts(config, "num_experts")? } else { 8 },
            capacity: config.size_or("expert_capacity", 64)?,
            router_bias: config.flag_or("router_bias", false)?,
            sparse_encoder: sparse(config, ["encoder_sparse_step", "num_sparse_encoder_layers"], n_layers)?,
            sparse_decoder: sparse(
                config,
                ["decoder_sparse_step", "num_sparse_decoder_layers"],
                n_decoder_layers,
            )?,
        })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.t5.head {
            Head::Own => &OWN,
            Head::Tied | Head::TiedUnscaled | Head::Absent => &TIED,
        }
    }
}

/// Which blocks have experts: those of a step, or of the step that a number of them makes. For no block at all
/// transformers means a step of all, which leaves the second.
fn sparse(config: &Config, [step, count]: [&str; 2], n_layers: usize) -> Result<Sparse, ConfigError> {
    let whole = |field: &str, default: i64| match config.integer_or(field, default)? {
        number @ 0..=1000 => Ok(number as usize),
        _ => Err(config.error(field, "a whole number from 0 to 1000")),
    };
    let made = match whole(count, 3)? {
        0 => n_layers,
        count => n_layers / count,
    };
    Ok(Sparse::of_step(whole(step, made as i64)?))
}

const FEED_FORWARD: &[Rule] = &[
    Rename("wi.weight", "Dense.mlp.up.weight"),
    Rename("wo.weight", "Dense.mlp.down.weight"),
    Rename("router.classifier.weight", "Sparse.router.routers.0.weight"),
    Rename("router.classifier.bias", "Sparse.router.routers.0.bias"),
    StackTranspose("experts.expert_{}.wi.weight", "Sparse.experts.up.weight", Ones::Before(0)),
    StackTranspose("experts.expert_{}.wo.weight", "Sparse.experts.down.weight", Ones::Before(0)),
];
const BOTH: &[Rule] = &[
    Rename("shared.weight", "around.encoder.tokens.weight"),
    Ignore("encoder.embed_tokens.weight"), // copies
    Ignore("decoder.embed_tokens.weight"),
    Rename(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "around.encoder.bias.weight",
    ),
    Rename("encoder.block.{}.layer.0.layer_norm.weight", "encoder.{}.norm1.weight"),
    Under("encoder.block.{}.layer.0.SelfAttention.", "encoder.{}.attention.", ATTENTION),
    Rename("encoder.block.{}.layer.1.layer_norm.weight", "encoder.{}.norm2.weight"),
    Under("encoder.block.{}.layer.1.mlp.", "encoder.{}.mlp.", FEED_FORWARD),
    Rename("encoder.final_layer_norm.weight", "around.encoder.norm.weight"),
    Rename(
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "around.decoder.bias.weight",
    ),
    Rename("decoder.block.{}.layer.0.layer_norm.weight", "decoder.{}.norm1.weight"),
    Under("decoder.block.{}.layer.0.SelfAttention.", "decoder.{}.attention.", ATTENTION),
    Rename("decoder.block.{}.layer.1.layer_norm.weight", "decoder.{}.norm2.weight"),
    Under("decoder.block.{}.layer.1.EncDecAttention.", "decoder.{}.cross.", ATTENTION),
    Rename("decoder.block.{}.layer.2.layer_norm.weight", "decoder.{}.norm3.weight"),
    Under("decoder.block.{}.layer.2.mlp.", "decoder.{}.mlp.", FEED_FORWARD),
    Rename("decoder.final_layer_norm.weight", "around.decoder.norm.weight"),
];
const OWN: KeyMap = KeyMap::new(&[Under("", "", BOTH), Rename("lm_head.weight", "around.head.weight")]);
/// A head in the file is a copy of the table.
const TIED: KeyMap = KeyMap::new(&[Under("", "", BOTH), Ignore("lm_head.weight")]);

pub(crate) fn read(folder: &Folder) -> Result<SwitchConfig, Error> {
    Ok(SwitchConfig::parse(&folder.config("config.json")?)?)
}

/// Switch Transformers as the registry knows them.
pub const SYSTEM: System = System {
    name: "switch_transformers",
    about: "text encoders with a decoder, both of mixtures of experts: Switch Transformers",
    file: "models/switch_transformers.rs",
    tasks: &["forward"],
    proved: &["switch_transformers"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| config.text("model_type") == Some("switch_transformers"))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = read(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let config = read(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// An encoder and a decoder behind the forward contract.
struct Runner {
    model: Switch,
    config: SwitchConfig,
}

impl Forward for Runner {
    /// `input_ids` and `decoder_input_ids`, and if wanted `attention_mask` and `decoder_attention_mask`.
    ///
    /// Gives `encoder_last_hidden_state`; `logits`, or `last_hidden_state` without a head; and of every router, by its
    /// module's name, `....router.logits` and, of the tokens that found room, `....router.dispatch`, ones and zeros, both
    /// `[batch, tokens, num_experts]`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let T5Config { vocab_size, head, .. } = self.config.t5;
        let ids = inputs.ids::<2>("input_ids", vocab_size);
        let real = inputs.mask("attention_mask");
        let decoder_ids = inputs.ids::<2>("decoder_input_ids", vocab_size);
        let written = inputs.mask("decoder_attention_mask");
        inputs.missing("input_ids");
        inputs.missing("decoder_input_ids");
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
        inputs.finish()?;

        let mask = real.map_or(Mask::Full, Mask::Padding);
        let SwitchOutput { encoder, decoder, encoder_routers, decoder_routers } =
            self.model.forward(T5Input {
                ids,
                mask: mask.clone(),
                decoder_ids,
                decoder_mask: written.map_or(Mask::Full, Mask::Padding),
                cross_mask: mask,
            });
        let mut outputs = vec![output("encoder_last_hidden_state", encoder)];
        outputs.push(match head {
            Head::Absent => output("last_hidden_state", decoder),
            _ => output("logits", self.model.logits(decoder)),
        });
        for (stack, layer, routers) in [("encoder", 1, encoder_routers), ("decoder", 2, decoder_routers)] {
            for (block, Routed { logits, experts }) in routers {
                let name = format!("{stack}.block.{block}.layer.{layer}.mlp.router");
                outputs.push((format!("{name}.dispatch"), one_hot(&experts, logits.dims())));
                outputs.push(output(&format!("{name}.logits"), logits));
            }
        }
        Ok(outputs)
    }
}

/// Ones at the experts that tokens go to.
fn one_hot(experts: &Choices, shape: [usize; 3]) -> TensorData {
    let mut ones = vec![0_i64; shape.iter().product()];
    for (token, &expert) in experts.ids.iter().enumerate() {
        if let Some(expert) = expert {
            ones[token * experts.n_experts + expert] = 1;
        }
    }
    TensorData::new(ones, shape)
}

/// Fedus et al. 2021, table 9, and the hub's `config.json`: "base".
const BASE: SwitchConfig = SwitchConfig {
    t5: T5Config {
        vocab_size: 32128,
        d_model: 768,
        d_ff: 3072,
        n_layers: 12,
        n_decoder_layers: 12,
        n_heads: 12,
        d_head: 64,
        mlp: MlpForm::Plain,
        activation: Activation::Relu,
        n_buckets: 32,
        max_distance: 128,
        rms_norm_eps: 1e-6,
        head: Head::Tied,
        start: 0,
        padding: 0,
    },
    n_experts: 8,
    capacity: 64,
    router_bias: false,
    sparse_encoder: Sparse::Every(2),
    sparse_decoder: Sparse::Every(2),
};
const LARGE: SwitchConfig = SwitchConfig {
    t5: T5Config { d_model: 1024, d_ff: 4096, n_layers: 24, n_decoder_layers: 24, n_heads: 16, ..BASE.t5 },
    n_experts: 128,
    ..BASE
};
/// "Switch-C" of the same table.
const C: SwitchConfig = SwitchConfig {
    t5: T5Config { d_model: 2080, d_ff: 6144, n_layers: 15, n_decoder_layers: 15, n_heads: 32, ..BASE.t5 },
    n_experts: 2048,
    sparse_encoder: Sparse::Always,
    sparse_decoder: Sparse::Always,
    ..BASE
};

const fn base(n_experts: usize) -> SwitchConfig {
    SwitchConfig { n_experts, ..BASE }
}

const fn preset(name: &'static str, config: SwitchConfig, parameters: usize) -> Preset {
    let source = "transformers, SwitchTransformersForConditionalGeneration, tables counted once";
    let (shape, weights) = (Shape::Switch(config), Weights::Hub);
    Preset { name, shape, weights, license: "Apache-2.0", parameters, source }
}

/// Published sizes but `switch-xxl-128`, whose gated MLPs `transformers` does not have.
pub const PRESETS: &[Preset] = &[
    preset("google/switch-base-8", BASE, 619_339_008),
    preset("google/switch-base-16", base(16), 1_072_397_568),
    preset("google/switch-base-32", base(32), 1_978_514_688),
    preset("google/switch-base-64", base(64), 3_790_748_928),
    preset("google/switch-base-128", base(128), 7_415_217_408),
    preset("google/switch-base-256", base(256), 14_664_154_368),
    preset("google/switch-large-128", LARGE, 26_309_291_008),
    preset("google/switch-c-2048", C, 1_571_308_972_448),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::parameters;

    use super::*;

    fn config(fields: &str) -> Result<SwitchConfig, ConfigError> {
        let text = format!(r#"{{"model_type": "switch_transformers", {fields}}}"#);
        SwitchConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_keys_and_they_lead_back() {
        let biased = SwitchConfig { router_bias: true, ..BASE };
        let own = SwitchConfig { t5: T5Config { head: Head::Own, ..BASE.t5 }, ..BASE };
        for config in [BASE, biased, own] {
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = config.keys().keys(&parameter.path).unwrap();
                assert_eq!(config.keys().paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
    }

    /// As transformers counts them.
    #[test]
    fn blocks_with_experts_are_those_of_the_configuration() {
        let sparse = |fields: &str| {
            let config = config(&format!(r#""num_layers": 6, {fields}"#)).unwrap();
            (0..6).filter(|&block| config.sparse_encoder.has(block)).collect::<Vec<_>>()
        };
        assert_eq!(sparse(r#""num_sparse_encoder_layers": 3"#), [1, 3, 5]);
        assert_eq!(sparse(r#""num_sparse_encoder_layers": 2"#), [1, 4]);
        assert_eq!(sparse(r#""num_sparse_encoder_layers": 6"#), [0, 1, 2, 3, 4, 5]);
        assert_eq!(sparse(r#""num_sparse_encoder_layers": 0"#), [1]);
        assert_eq!(sparse(r#""num_sparse_encoder_layers": 7"#), [0; 0]);
        assert_eq!(sparse(r#""encoder_sparse_step": 3"#), [1, 4]);
    }

    /// Two tokens of each sequence find room at one expert; the others pass through.
    #[test]
    fn capacity_is_of_each_sequence() {
        let config = SwitchConfig {
            t5: T5Config { d_model: 4, d_ff: 6, ..BASE.t5 },
            n_experts: 1,
            capacity: 2,
            ..BASE
        };
        let FeedForward::Sparse(layer) = config.feed_forward(true, &Device::flex()) else { panic!() };
        let (y, routed) = layer.forward(Tensor::<3>::ones([2, 3, 4], &Device::flex()));
        assert_eq!(routed.experts.ids, [Some(0), Some(0), None, Some(0), Some(0), None]);
        let last = y.narrow(1, 2, 1).abs().sum().into_scalar::<f32>();
        assert_eq!(last, 0.0);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""router_dtype": "bfloat16""#, "`router_dtype`"),
            (r#""is_decoder": true"#, "`is_decoder`"),
            (r#""num_experts": 0"#, "`num_experts`"),
            (r#""encoder_sparse_step": -1"#, "`encoder_sparse_step`: expected a whole number from 0"),
            (r#""architectures": ["SwitchTransformersEncoderModel"]"#, "`architectures`"),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
