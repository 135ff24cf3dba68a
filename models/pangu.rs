//! PanGu-α: Chinese text decoders of up to 200 billion parameters (Zeng et al. 2021, <https://arxiv.org/abs/2104.12369>;
//! Huawei and Peng Cheng Laboratory). On GPT-2's blocks ([`crate::gpt2`]) lies a *query layer*, a block whose queries are
//! not made of the states but of a learned vector per position; it is counted among the layers.
//!
//! Two layouts: the ports to torch (`GPTPanguForCausalLM`; imone/pangu_2_6B, sunzeyeah/pangu-350M), and the names of the
//! authors' MindSpore checkpoints, which this crate reads as one file in a format that it knows (their own `.ckpt` and
//! `.npy` parts have to be converted). 2.6B and 13B were released; 200B never was.
//!
//! Checked against a formula in f64, written from the authors' code and the ports: no package runs it. The authors trained
//! with `x σ(1.702 x)` (`fast_gelu`), the ports' configurations say `gelu`: the forward pass gives the scores under each of
//! the three in use, so that one can see which of them a checkpoint was trained with.
//!
//! ```sh
//! volary forward path/to/pangu-350M --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{
    Embedding, KvCache, LayerNorm, LearnedPositions, Linear, LinearConfig, PreNormBlock,
};
use volary_kernels::ops::Activation;
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Rule, load};

use Rule::{Ignore, Rename, Under};

use crate::causal::Head;
use crate::config::{Config, ConfigError};
use crate::decoder::{Decoder, Reading, Runner, Text};
use crate::error::Error;
use crate::folder::Folder;
use crate::gpt2::{CONV1D, Gpt2Config, LINEAR, SMALL, through};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

/// The decoder, whose last layer is the query layer, and what separates documents.
#[derive(Clone, Debug, PartialEq)]
pub struct PanguConfig {
    /// The shape.
    pub decoder: Gpt2Config,
    /// The token that ends a document.
    pub end: Option<u32>,
}

/// A decoder.
#[derive(Module, Debug)]
pub struct Pangu {
    /// `[vocab_size, d_model]`.
    pub tokens: Embedding,
    /// `[n_positions, d_model]`.
    pub positions: LearnedPositions,
    /// All but the query layer.
    pub blocks: Vec<PreNormBlock>,
    /// Before the query layer. Nothing is normalised after it.
    pub norm: LayerNorm,
    /// What each position asks, `[n_positions, d_model]`.
    pub queries: LearnedPositions,
    /// The query layer.
    pub query_layer: PreNormBlock,
    /// `[vocab_size, d_model]`, unless the token table serves.
    pub head: Option<Linear>,
}

impl PanguConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Pangu {
        let config = &self.decoder;
        let Gpt2Config { vocab_size, n_positions, d_model, n_layers, .. } = *config;
        let table = || LearnedPositions::new(n_positions, d_model, 0.02, device);
        let head = || LinearConfig::new(d_model, vocab_size).with_bias(false).init(device);
        let last = n_layers.saturating_sub(1);
        Pangu {
            tokens: Embedding::new(vocab_size, d_model, 0.02, device),
            positions: table(),
            blocks: (0..last).map(|layer| config.block(layer, device)).collect(),
            norm: LayerNorm::new(d_model, config.layer_norm_eps, device),
            queries: table(),
            query_layer: config.block(last, device),
            head: (config.head == Head::Own).then(head),
        }
    }
}

impl Decoder for Pangu {
    fn read(&self, text: Text, caches: &mut [KvCache]) -> Tensor<3> {
        let Text { ids, positions, mask } = text;
        let [batch, seq] = ids.dims();
        let x = self.tokens.forward(ids) + self.positions.select(&positions, seq); // [batch, seq, d_model]
        let (caches, last) = caches.split_at_mut(caches.len().min(self.blocks.len()));
        let x = self.norm.forward(through(&self.blocks, x, &mask, caches));

        let PreNormBlock { norm1, attention, .. } = &self.query_layer;
        let [_, _, d_model] = x.dims();
        let asked = self.queries.select(&positions, seq).expand([batch, seq, d_model]);
        let query = attention.queries(asked); // [batch, n_heads, seq, d_head]
        let (key, value) = attention.keys_values(norm1.forward(x.clone()));
        let (key, value) = match last.first_mut() {
            Some(cache) => cache.append(key, value), // [batch, n_heads, past + seq, d_head]
            None => (key, value),
        };
        self.query_layer.mix(x, attention.attend(query, key, value, &mask))
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        match &self.head {
            Some(head) => head.forward(states),
            None => self.tokens.scores(states),
        }
    }

    fn n_layers(&self) -> usize {
        self.blocks.len() + 1
    }

    fn device(&self) -> Device {
        self.tokens.weight.device()
    }
}

impl Pangu {
    /// The same weights with another activation in every block.
    pub fn with_activation(mut self, activation: Activation) -> Self {
        self.blocks.iter_mut().chain([&mut self.query_layer]).for_each(|block| block.activation = activation);
        self
    }
}

/// The activations that checkpoints of PanGu-α were made with, by what their configurations call them: of the ports, of
/// MindSpore's `nn.GELU`, and of the authors' later code.
const ACTIVATIONS: &[(&str, Activation)] =
    &[("gelu", Activation::Gelu), ("gelu_tanh", Activation::GeluTanh), ("fast_gelu", Activation::QuickGelu)];

impl PanguConfig {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` of the ports; what it leaves out has the values of their `GPTPanguConfig`, which are those of 2.6B.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let default = &PANGU_2_6B;
        let d_model = config.size_or("hidden_size", default.d_model)?;
        let n_heads = config.size_or("num_heads", default.n_heads)?;
        config.divides("num_heads", n_heads, d_model)?;
        let named = config.text("activation_function");
        let activation = match ACTIVATIONS.iter().find(|(name, _)| named == Some(name)) {
            Some((_, activation)) => *activation,
            None => config.activation_or("activation_function", Activation::Gelu)?,
        };
        let vocab_size = config.size_or("vocab_size", default.vocab_size)?;
        let head = match (config.first_of("architectures"), config.flag_or("tie_word_embeddings", true)?) {
            (Some("GPTPanguModel"), _) => Head::Absent,
            (_, true) => Head::Tied,
            (_, false) => Head::Own,
        };
        let end = config.integer_or("eod_token_id", 9)?;
        Ok(Self {
            decoder: Gpt2Config {
                vocab_size,
                n_positions: config.size_or("max_position_embeddings", default.n_positions)?,
                d_model,
                d_ff: config.size_or("intermediate_size", 4 * d_model)?,
                n_layers: config.blocks_or("num_layers", default.n_layers)?,
                n_heads,
                d_head: d_model / n_heads,
                activation,
                layer_norm_eps: config.number_or("layer_norm_epsilon", default.layer_norm_eps)?,
                scale_scores: config.flag_or("scale_attn_weights", true)?,
                scale_by_layer: false,
                head,
            },
            end: u32::try_from(end).ok().filter(|&end| (end as usize) < vocab_size),
        })
    }
}

const PORT_BLOCK: &[Rule] = &[
    Under("ln_1.", "norm1.", LINEAR),
    Under("attn.q_proj.", "attention.query.", LINEAR),
    Under("attn.k_proj.", "attention.key.", LINEAR),
    Under("attn.v_proj.", "attention.value.", LINEAR),
    Under("attn.c_proj.", "attention.output.", LINEAR),
    Under("attn.out_proj.", "attention.output.", LINEAR),
    // the causal mask, and what it put in place of hidden scores
    Ignore("attn.bias"),
    Ignore("attn.masked_bias"),
    Under("ln_2.", "norm2.", LINEAR),
    Under("mlp.c_fc.", "mlp.up.", LINEAR),
    Under("mlp.c_proj.", "mlp.down.", LINEAR),
];

const PORT_TRUNK: &[Rule] = &[
    Rename("wte.weight", "tokens.weight"),
    Rename("wpe.weight", "positions.weight"),
    Rename("wqe.weight", "queries.weight"),
    Under("h.{}.", "blocks.{}.", PORT_BLOCK),
    Under("ln_f.", "norm.", LINEAR),
];

/// Keys of the ports with a head of its own, for a [`Port`].
pub const PORT_KEYS: KeyMap = KeyMap::new(&[
    Under("transformer.", "", PORT_TRUNK),
    Under("", "", PORT_TRUNK),
    Rename("lm_head.weight", "head.weight"),
]);

/// Keys of the ports whose head is the token table: a head in the file is a copy of it.
pub const PORT_KEYS_WITHOUT_HEAD: KeyMap = KeyMap::new(&[
    Under("transformer.", "", PORT_TRUNK),
    Under("", "", PORT_TRUNK),
    Ignore("lm_head.weight"),
]);

const MINDSPORE_NORM: &[Rule] = &[Rename("gamma", "weight"), Rename("beta", "bias")];

const MINDSPORE_BLOCK: &[Rule] = &[
    Under("layernorm1.", "norm1.", MINDSPORE_NORM),
    Under("attention.dense1.", "attention.query.", LINEAR),
    Under("attention.dense2.", "attention.key.", LINEAR),
    Under("attention.dense3.", "attention.value.", LINEAR),
    Under("attention.projection.", "attention.output.", CONV1D),
    Under("layernorm2.", "norm2.", MINDSPORE_NORM),
    Under("output.mapping.", "mlp.up.", CONV1D),
    Under("output.projection.", "mlp.down.", CONV1D),
];

/// Keys of the authors' code.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("backbone.word_embedding.embedding_table", "tokens.weight"),
    Rename("backbone.position_embedding.embedding_table", "positions.weight"),
    Rename("backbone.top_query_embedding.embedding_table", "queries.weight"),
    Under("backbone.blocks.{}.", "blocks.{}.", MINDSPORE_BLOCK),
    Under("backbone.layernorm.", "norm.", MINDSPORE_NORM),
    Under("backbone.top_query_layer.", "query_layer.", MINDSPORE_BLOCK),
]);

/// The model as the ports have it: the query layer is the last of the blocks.
#[derive(Module, Debug)]
pub struct Port {
    tokens: Embedding,
    positions: LearnedPositions,
    queries: LearnedPositions,
    blocks: Vec<PreNormBlock>,
    norm: LayerNorm,
    head: Option<Linear>,
}

impl From<Pangu> for Port {
    fn from(model: Pangu) -> Self {
        let Pangu { tokens, positions, mut blocks, norm, queries, query_layer, head } = model;
        blocks.push(query_layer);
        Self { tokens, positions, queries, blocks, norm, head }
    }
}

/// Who named the weights of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The ports to torch.
    Port,
    /// The authors.
    MindSpore,
}

impl Layout {
    /// The layout of a checkpoint: all of the authors' names have one beginning.
    pub fn of(checkpoint: &dyn Checkpoint) -> Self {
        match checkpoint.entries().iter().any(|entry| entry.name.starts_with("backbone.")) {
            true => Self::MindSpore,
            false => Self::Port,
        }
    }
}

impl PanguConfig {
    /// The key map of the ports of a model of this shape.
    pub const fn port_keys(&self) -> &'static KeyMap {
        match self.decoder.head {
            Head::Own => &PORT_KEYS,
            Head::Tied | Head::Absent => &PORT_KEYS_WITHOUT_HEAD,
        }
    }

    /// The model filled with the folder's weights.
    ///
    /// # Errors
    /// If they cannot be opened or do not fit.
    pub fn load(&self, folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Pangu, Error> {
        let checkpoint = folder.checkpoint()?;
        let checkpoint = checkpoint.as_ref();
        let untrained = self.init(device);
        match Layout::of(checkpoint) {
            Layout::MindSpore => Ok(load(untrained, checkpoint, &KEYS, options)?),
            Layout::Port => {
                let port = load(Port::from(untrained), checkpoint, self.port_keys(), options)?;
                let Port { tokens, positions, queries, mut blocks, norm, head } = port;
                // there is always one: that which the port was made with
                let query_layer = blocks.pop().unwrap_or_else(|| self.decoder.block(0, device));
                Ok(Pangu { tokens, positions, blocks, norm, queries, query_layer, head })
            }
        }
    }
}

/// PanGu-α as the registry knows it.
pub const SYSTEM: System = System {
    name: "pangu",
    about: "Chinese text decoders with a query layer: PanGu-α",
    file: "models/pangu.rs",
    tasks: &["generate", "forward"],
    proved: &["pangu_alpha"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("gpt_pangu")),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = PanguConfig::of(folder)?;
        let checkpoint = folder.checkpoint()?;
        let checkpoint = checkpoint.as_ref();
        let model = config.init(&Device::flex());
        match Layout::of(checkpoint) {
            Layout::MindSpore => describe_with(checkpoint, &model, &KEYS),
            Layout::Port => describe_with(checkpoint, &Port::from(model), config.port_keys()),
        }
    },
    open: |folder, options, device| Ok(Box::new(PanguRunner(runner(folder, options, device)?))),
    generator: Some(|folder, options, device| {
        let runner = runner(folder, options, device)?;
        match runner.head {
            Head::Absent => Err(Error::Task { system: SYSTEM.name, task: "write without a head" }),
            _ => Ok(Box::new(runner)),
        }
    }),
};

fn runner(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Runner<Pangu>, Error> {
    let config = PanguConfig::of(folder)?;
    let Gpt2Config { vocab_size, n_positions, head, .. } = config.decoder;
    let model = config.load(folder, options, device)?;
    Ok(Runner { model, vocab_size, n_positions, head, reading: Reading::Causal, end: config.end })
}

/// A decoder behind the forward contract.
struct PanguRunner(Runner<Pangu>);

impl Forward for PanguRunner {
    /// As [`Runner::forward`]; besides, for `input_ids` of no other case, `logits_gelu`, `logits_gelu_tanh` and
    /// `logits_fast_gelu`, whichever activation the configuration names.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        let Self(runner) = self;
        let asked = runner.ask(inputs)?;
        let mut outputs = runner.answer(&asked);
        if runner.head != Head::Absent {
            for case in asked.cases.iter().filter(|case| case.name.is_empty()) {
                for (name, activation) in ACTIVATIONS {
                    let model = runner.model.clone().with_activation(*activation);
                    let logits = model.logits(model.forward(case.text.clone()));
                    outputs.push(output(&format!("logits_{name}"), logits));
                }
            }
        }
        Ok(outputs)
    }
}

/// Zeng et al. 2021, table 1, as the authors' code and the ports have it: the paper gives 2.6B 40 heads.
const PANGU_2_6B: Gpt2Config =
    Gpt2Config { vocab_size: 40_000, activation: Activation::QuickGelu, ..SMALL }.sized(32, 2560, 32);
const PANGU_13B: Gpt2Config = Gpt2Config { vocab_size: 40_064, ..PANGU_2_6B.sized(40, 5120, 40) };

const fn preset(
    name: &'static str,
    decoder: Gpt2Config,
    weights: Weights,
    license: &'static str,
    parameters: usize,
) -> Preset {
    let source = "counted; table 1 of the paper rounds it, and the port of 350M has no other count";
    let shape = Shape::Pangu(PanguConfig { decoder, end: Some(9) });
    Preset { name, shape, weights, license, parameters, source }
}

const APACHE: &str = "Apache-2.0";
/// The ports' cards name none.
const UNSTATED: &str = "not stated";

/// Published sizes. 350M is not of the authors: it was trained for its port. The authors' own files of 2.6B and 13B are
/// MindSpore's, on OpenI.
pub const PRESETS: &[Preset] = &[
    preset("sunzeyeah/pangu-350M", PANGU_2_6B.sized(24, 1024, 16), Weights::Hub, UNSTATED, 345_368_576),
    preset("imone/pangu_2_6B", PANGU_2_6B, Weights::Hub, APACHE, 2_625_295_360),
    preset("sunzeyeah/pangu-13B", PANGU_13B, Weights::Hub, UNSTATED, 12_801_198_080),
    preset(
        "PanGu-α 200B",
        PANGU_2_6B.sized(64, 16384, 128),
        Weights::Unreleased,
        "never released",
        206_861_008_896,
    ),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::{Int, TensorData};
    use volary_weights::{parameters, read_tensors};

    use super::*;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pangu_alpha")
    }

    fn run(folder: &Path, inputs: &BTreeMap<String, TensorData>) -> Result<Outputs, Error> {
        let folder = Folder::Disk(folder.to_owned());
        crate::registry::forward(&folder, inputs, &LoadOptions::default(), &Device::flex())
    }

    fn inputs() -> BTreeMap<String, TensorData> {
        read_tensors(&fixture().join("inputs.safetensors")).unwrap()
    }

    fn config(fields: &str) -> Result<PanguConfig, ConfigError> {
        let text = format!("{{\"model_type\": \"gpt_pangu\"{fields}}}");
        PanguConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_a_key_in_either_layout() {
        let model = PanguConfig { decoder: PANGU_2_6B.sized(3, 8, 2), end: None }.init(&Device::flex());
        for parameter in parameters(&model) {
            let found = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(found.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&found[0]).unwrap(), [parameter.path]);
        }
        for parameter in parameters(&Port::from(model)) {
            let found = PORT_KEYS.keys(&parameter.path).unwrap();
            assert_eq!(found.len(), 1, "{}", parameter.path);
            assert_eq!(PORT_KEYS.paths(&found[0]).unwrap(), [parameter.path]);
        }
    }

    /// The authors' names, and the ports' torch file (`out_proj`, a copy of the tied head, buffers of the mask), both in
    /// half precision, which holds the numbers of the fixture.
    #[test]
    fn every_public_form_of_the_weights_is_read() {
        let expected = run(&fixture(), &inputs()).unwrap();
        for (from, to) in
            [("mindspore_names.safetensors", "model.safetensors"), ("pytorch_model.bin", "pytorch_model.bin")]
        {
            let folder = tempfile::tempdir().unwrap();
            std::fs::copy(fixture().join("config.json"), folder.path().join("config.json")).unwrap();
            std::fs::copy(fixture().join(from), folder.path().join(to)).unwrap();
            assert_eq!(run(folder.path(), &inputs()).unwrap(), expected, "{from}");
            let description = (SYSTEM.describe)(&Folder::Disk(folder.path().to_owned())).unwrap();
            assert!(description.problems.is_empty());
            assert_eq!(crate::preset::count(&description.parameters), 33180);
        }
    }

    #[test]
    fn documents_are_told_apart_by_their_end() {
        let given = run(&fixture(), &inputs()).unwrap();
        let mut bare = inputs();
        for name in ["packed.position_ids", "packed.visible"] {
            assert!(bare.remove(name).is_some());
        }
        assert_eq!(run(&fixture(), &bare).unwrap(), given);
    }

    /// Positions that ask nothing see all that is before them alike: the query layer adds the mean of the values of the
    /// normalised states, which it is not made of, to the states themselves, normalised once.
    #[test]
    fn queries_of_nothing_give_the_mean_of_the_values() {
        let config = PanguConfig { decoder: PANGU_2_6B.sized(1, 8, 2), end: None };
        let mut model = config.init(&Device::flex());
        model.queries.weight = model.queries.weight.map(|weight| weight * 0.0);
        let query = &mut model.query_layer.attention.query;
        query.bias = query.bias.take().map(|bias| bias.map(|bias| bias * 0.0));

        let ids = Tensor::<2, Int>::from_data([[3, 4, 9, 5]], &Device::flex());
        let x = model.norm.forward(model.positions.forward(model.tokens.forward(ids.clone())));
        let PreNormBlock { norm1, attention, .. } = &model.query_layer;
        let values = attention.value.forward(norm1.forward(x.clone()));
        let means = (1..=4).map(|seen| values.clone().narrow(1, 0, seen).mean_dim(1)).collect();
        let expected = model.query_layer.mix(x, attention.output.forward(Tensor::cat(means, 1)));
        let found = model.forward(ids).into_data();
        found.assert_approx_eq::<f32>(&expected.into_data(), burn::tensor::Tolerance::absolute(1e-5));
    }

    #[test]
    fn activations_go_by_the_names_of_all_three_sources() {
        for (name, expected) in [
            ("gelu", Activation::Gelu),
            ("gelu_tanh", Activation::GeluTanh),
            ("gelu_new", Activation::GeluTanh),
            ("fast_gelu", Activation::QuickGelu),
            ("relu", Activation::Relu),
        ] {
            let config = config(&format!(r#", "activation_function": "{name}""#)).unwrap();
            assert_eq!(config.decoder.activation, expected, "{name}");
        }
        for (fields, named) in [
            (r#", "activation_function": "mish""#, "`activation_function`"),
            (r#", "num_heads": 7"#, "`num_heads`: expected a divisor of 2560, found 7"),
            (r#", "num_layers": 0"#, "`num_layers`"),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        let default = config("").unwrap();
        assert_eq!(default.decoder, Gpt2Config { activation: Activation::Gelu, ..PANGU_2_6B });
    }
}
