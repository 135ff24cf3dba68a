//! Mixtral: causal text decoders in LLaMA's shape ([`crate::llama`]) whose MLPs are mixtures of experts (Jiang et al. 2024,
//! <https://arxiv.org/abs/2401.04088>). Every token goes to the two experts of eight that its block's router likes best.
//!
//! The numbers match `transformers` (`MixtralForCausalLM`).
//!
//! ```sh
//! volary forward path/to/Mixtral-8x7B-v0.1 --input in.safetensors --output out.safetensors
//! ```

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{Attention, KvCache, LinearConfig, RmsNorm};
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::{ExpertMlpConfig, GatedExpertMlp, mix};
use volary_kernels::ops::{self, Activation, Mask, Pairing, Positions, RopeScaling};
use volary_text::generate::Session;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Ignore, Rename, StackTranspose, Under};

use crate::causal::{self, Head, next_token_loss};
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::fastmoe::experts;
use crate::folder::Folder;
use crate::generator::{Generator, check_prompts};
use crate::llama::{
    AROUND, ATTENTION, Continue, Llama, LlamaCache, LlamaConfig, LlamaInput, LlamaSession, Place, attend,
};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct MixtralConfig {
    /// All but the experts; `d_ff` is the width of one.
    pub llama: LlamaConfig,
    /// Number of experts of a block.
    pub n_experts: usize,
    /// How many of them a token goes to.
    pub top_k: usize,
}

/// A decoder.
#[derive(Module, Debug)]
pub struct Mixtral {
    /// Tokens, last norm and head. It has no blocks of its own.
    pub around: Llama,
    /// The blocks.
    pub blocks: Vec<MixtralBlock>,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct MixtralBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Grouped-query self-attention.
    pub attention: Attention,
    /// Before the experts.
    pub norm2: RmsNorm,
    /// Says which experts a token goes to.
    pub gate: NaiveGate,
    /// Three projections each.
    pub experts: GatedExpertMlp,
    #[module(skip)]
    activation: Activation,
}

/// What a decoder makes of a batch of texts.
#[derive(Clone, Debug)]
pub struct MixtralOutput {
    /// `[batch, seq, d_model]`.
    pub states: Tensor<3>,
    /// What the router of each block says of each token, `[batch * seq, n_experts]`.
    pub router_logits: Vec<Tensor<2>>,
}

impl MixtralConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Mixtral {
        let Self { n_experts, top_k, .. } = *self;
        let LlamaConfig { d_model, d_ff, activation, .. } = self.llama;
        let norm = || RmsNorm::new(d_model, self.llama.rms_norm_eps, device);
        let block = |_| MixtralBlock {
            norm1: norm(),
            attention: self.llama.attention(device),
            norm2: norm(),
            gate: NaiveGate {
                gate: LinearConfig::new(d_model, n_experts).with_bias(false).init(device),
                top_k,
            },
            experts: ExpertMlpConfig::new(n_experts, d_model, d_ff).with_bias(false).init_gated(device),
            activation,
        };
        Mixtral {
            around: LlamaConfig { n_layers: 0, ..self.llama.clone() }.init(device),
            blocks: (0..self.llama.n_layers).map(block).collect(),
        }
    }
}

impl MixtralBlock {
    /// `[batch, seq, d_model] -> [batch, seq, d_model]`, after the tokens that `cache` holds, if there is one; and what the
    /// router says of each token, `[batch * seq, n_experts]`.
    pub fn forward(&self, x: Tensor<3>, place: Place, cache: Option<&mut KvCache>) -> (Tensor<3>, Tensor<2>) {
        let attended = attend(&self.attention, self.norm1.forward(x.clone()), place, cache);
        let (x, normed) = self.norm2.add(x, attended);
        let (mixed, router_logits) = self.mix(normed);
        (ops::add(x, mixed), router_logits)
    }

    fn mix(&self, x: Tensor<3>) -> (Tensor<3>, Tensor<2>) {
        let [batch, seq, d_model] = x.dims();
        let x = x.reshape([batch * seq, d_model]);
        let logits = self.gate.logits(x.clone()); // [batch * seq, n_experts]
        let routing = self.gate.choose(logits.clone());
        let y = mix(x, &routing, |rows, dispatch| self.experts.forward(rows, self.activation, dispatch));
        (y.reshape([batch, seq, d_model]), logits)
    }
}

impl Mixtral {
    /// The states of a batch of texts.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or shapes differ.
    pub fn forward(&self, input: impl Into<LlamaInput>) -> MixtralOutput {
        let LlamaInput { ids, positions, mask } = input.into();
        let rope = self.around.rope_of(&ids, &positions);
        let mask = Mask::All(vec![Mask::Causal, mask]);
        let place = Place { rope: &rope, positions: &positions, mask: &mask };
        let mut x = self.around.tokens.forward(ids); // [batch, seq, d_model]
        let mut router_logits = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (y, logits) = block.forward(x, place, None);
            x = y;
            router_logits.push(logits);
        }
        MixtralOutput { states: self.around.norm.forward(x), router_logits }
    }

    /// Texts that go on after these prompts, each by at most `max_new` tokens.
    ///
    /// # Panics
    /// If there is no prompt, one is empty, or an id is outside the vocabulary.
    pub fn session(&self, prompts: &[impl AsRef<[u32]>], max_new: usize) -> LlamaSession<'_, Self> {
        LlamaSession::new(self, prompts, max_new)
    }
}

impl Continue for Mixtral {
    fn decode(&self, input: LlamaInput, cache: &mut LlamaCache) -> Tensor<3> {
        let LlamaInput { ids, positions, mask } = input;
        let LlamaCache { rope, blocks: caches } = cache;
        let mask = Mask::All(vec![Mask::Causal, mask]);
        let place = Place { rope, positions: &positions, mask: &mask };
        let x = self.around.tokens.forward(ids); // [batch, new, d_model]
        let layers = self.blocks.iter().zip(caches);
        let x = layers.fold(x, |x, (block, cache)| block.forward(x, place, Some(cache)).0);
        self.around.norm.forward(x)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.around.logits(states)
    }

    fn cache(&self, capacity: usize) -> LlamaCache {
        self.around.cache_of(self.blocks.len(), capacity)
    }

    fn device(&self) -> Device {
        self.around.tokens.weight.device()
    }
}

impl MixtralConfig {
    /// `config.json` of `transformers`; what it leaves out has the values of `MixtralConfig` there.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        config.only("sliding_window", &["null"])?;
        let defaults = LlamaConfig { n_positions: 131_072, ..MIXTRAL_8X7B.llama };
        let llama = LlamaConfig::parse_with(config, &defaults)?;
        let has_experts = config.has("num_local_experts");
        let n_experts = if has_experts { experts(config, "num_local_experts")? } else { 8 };
        let top_k = config.size_or("num_experts_per_tok", 2)?;
        if top_k > n_experts {
            return Err(config.error("num_experts_per_tok", &format!("at most {n_experts}")));
        }
        Ok(Self { llama, n_experts, top_k })
    }

    /// The key map of a model of this shape.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.llama.head {
            Head::Own => &KEYS,
            Head::Tied | Head::Absent => &KEYS_WITHOUT_HEAD,
        }
    }
}

const BLOCK: &[Rule] = &[
    Under("", "", ATTENTION),
    Rename("block_sparse_moe.gate.weight", "gate.gate.weight"),
    StackTranspose("block_sparse_moe.experts.{}.w1.weight", "experts.gate.weight", Ones::Before(0)),
    StackTranspose("block_sparse_moe.experts.{}.w3.weight", "experts.up.weight", Ones::Before(0)),
    StackTranspose("block_sparse_moe.experts.{}.w2.weight", "experts.down.weight", Ones::Before(0)),
];
const TRUNK: &[Rule] = &[Under("", "around.", AROUND), Under("layers.{}.", "blocks.{}.", BLOCK)];

/// Keys of `MixtralForCausalLM` with a head of its own. Those of `MixtralModel` have nothing before them.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("model.", "", TRUNK),
    Under("", "", TRUNK),
    Rename("lm_head.weight", "around.head.weight"),
]);
/// The same without one.
pub const KEYS_WITHOUT_HEAD: KeyMap =
    KeyMap::new(&[Under("model.", "", TRUNK), Under("", "", TRUNK), Ignore("lm_head.weight")]);

pub(crate) fn read(folder: &Folder) -> Result<MixtralConfig, Error> {
    Ok(MixtralConfig::parse(&folder.config("config.json")?)?)
}

/// Mixtral as the registry knows it.
pub const SYSTEM: System = System {
    name: "mixtral",
    about: "causal text decoders of mixtures of experts: Mixtral 8x7B and 8x22B",
    file: "models/mixtral.rs",
    tasks: &["generate", "forward"],
    proved: &["mixtral"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("mixtral")),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let config = read(folder)?;
        describe(folder, &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| Ok(Box::new(Runner::load(folder, options, device)?)),
    generator: Some(|folder, options, device| {
        let runner = Runner::load(folder, options, device)?;
        match runner.config.llama.head {
            Head::Absent => Err(Error::Task { system: SYSTEM.name, task: "write without a head" }),
            _ => Ok(Box::new(runner)),
        }
    }),
};

/// A decoder behind the forward contract.
struct Runner {
    model: Mixtral,
    config: MixtralConfig,
}

impl Runner {
    fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let config = read(folder)?;
        let model = fill(folder, config.init(device), config.keys(), options)?;
        Ok(Self { model, config })
    }
}

impl Forward for Runner {
    /// As LLaMA's: `input_ids`, and if wanted `attention_mask`, `position_ids` and `greedy.prompt_ids`.
    ///
    /// Gives `last_hidden_state` without a head; with one `logits`, `loss`, and what is decoded greedily. Besides,
    /// `router_logits.N` of each block, `[batch * seq, num_local_experts]`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let LlamaConfig { vocab_size, n_positions, head, .. } = self.config.llama;
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
        if head == Head::Absent && prompt.is_some() {
            inputs.problem("`greedy.prompt_ids` needs a head, and this model has none".into());
        }
        inputs.finish()?;

        let MixtralOutput { states, router_logits } = self.model.forward(LlamaInput {
            ids: ids.clone(),
            positions: positions.map_or(Positions::From(0), Positions::Each),
            mask: real.clone().map_or(Mask::Full, Mask::Padding),
        });
        let named = |(block, logits)| output(&format!("router_logits.{block}"), logits);
        let mut outputs: Outputs = router_logits.into_iter().enumerate().map(named).collect();
        if head == Head::Absent {
            outputs.push(output("last_hidden_state", states));
            return Ok(outputs);
        }
        let logits = self.model.logits(states);
        outputs.push(output("logits", logits.clone()));
        outputs.extend(next_token_loss(logits, ids.clone(), real.clone()).map(|loss| output("loss", loss)));
        let session = |prompt: &[u32], count| self.model.session(&[prompt], count);
        outputs.extend(causal::continuation(prompt, ids, real, session));
        Ok(outputs)
    }
}

impl Generator for Runner {
    fn vocab_size(&self) -> usize {
        self.config.llama.vocab_size
    }

    fn context(&self) -> Option<usize> {
        Some(self.config.llama.n_positions)
    }

    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        Ok(Box::new(self.model.session(prompts, max_new)))
    }
}

/// Jiang et al. 2024, table 1, and the hub's `config.json`.
const MIXTRAL_8X7B: MixtralConfig = MixtralConfig {
    llama: LlamaConfig {
        vocab_size: 32000,
        n_positions: 32768,
        d_model: 4096,
        d_ff: 14336,
        n_layers: 32,
        n_heads: 32,
        n_kv_heads: 8,
        d_head: 128,
        activation: Activation::Silu,
        attention_bias: false,
        mlp_bias: false,
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        rope_scaling: RopeScaling::Unscaled,
        pairing: Pairing::Half,
        head: Head::Own,
    },
    n_experts: 8,
    top_k: 2,
};
/// The hub's `config.json`.
const MIXTRAL_8X22B: MixtralConfig = MixtralConfig {
    llama: LlamaConfig {
        n_positions: 65536,
        d_model: 6144,
        d_ff: 16384,
        n_layers: 56,
        n_heads: 48,
        ..MIXTRAL_8X7B.llama
    },
    ..MIXTRAL_8X7B
};

const fn preset(name: &'static str, config: MixtralConfig, parameters: usize) -> Preset {
    let source = "transformers, MixtralForCausalLM";
    let (shape, weights) = (Shape::Mixtral(config), Weights::Hub);
    Preset { name, shape, weights, license: "Apache-2.0", parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("mistralai/Mixtral-8x7B-v0.1", MIXTRAL_8X7B, 46_702_792_704),
    preset("mistralai/Mixtral-8x7B-Instruct-v0.1", MIXTRAL_8X7B, 46_702_792_704),
    preset("mistralai/Mixtral-8x22B-v0.1", MIXTRAL_8X22B, 140_620_634_112),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Int, TensorData, Tolerance};
    use volary_text::generate::greedy;
    use volary_weights::parameters;

    use super::*;

    fn fixture() -> Folder {
        Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mixtral"))
    }

    fn load() -> Mixtral {
        Runner::load(&fixture(), &LoadOptions::default(), &Device::flex()).unwrap().model
    }

    fn row(tokens: &[u32]) -> Tensor<2, Int> {
        let tokens: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
        let shape = [1, tokens.len()];
        Tensor::from_data(TensorData::new(tokens, shape), &Device::flex())
    }

    #[test]
    fn every_parameter_has_keys_and_they_lead_back() {
        let small = LlamaConfig { vocab_size: 9, n_layers: 2, ..MIXTRAL_8X7B.llama };
        for head in [Head::Own, Head::Tied] {
            let config = MixtralConfig { llama: LlamaConfig { head, ..small.clone() }, ..MIXTRAL_8X7B };
            for parameter in parameters(&config.init(&Device::flex())) {
                let keys = config.keys().keys(&parameter.path).unwrap();
                assert_eq!(config.keys().paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
    }

    /// The cache picks what the scores of the whole text so far pick, and prompts of several lengths in one batch go on
    /// as each does alone.
    #[test]
    fn greedy_tokens_are_those_of_the_whole_forward_pass() {
        let model = load();
        let prompts = [vec![7, 28, 66, 5], vec![23], vec![64, 44, 66]];
        let together = greedy(&mut model.session(&prompts, 6), 6);
        for (prompt, together) in prompts.iter().zip(together) {
            let mut text = prompt.clone();
            for _ in 0..6 {
                let states = model.forward(row(&text)).states.narrow(1, text.len() - 1, 1);
                text.push(model.logits(states).argmax(2).into_scalar::<i64>() as u32);
            }
            assert_eq!(text[prompt.len()..], together);
        }
    }

    #[test]
    fn the_past_ignores_the_future() {
        let model = load();
        let states = |tokens: &[u32]| model.forward(row(tokens)).states.narrow(1, 0, 3).into_data();
        let expected = states(&[3, 4, 5]);
        states(&[3, 4, 5, 6, 7]).assert_approx_eq::<f32>(&expected, Tolerance::default());
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""sliding_window": 4096"#, "`sliding_window`"),
            (r#""num_local_experts": 1"#, "`num_experts_per_tok`: expected at most 1"),
            (r#""num_local_experts": 1000000"#, "`num_local_experts`: expected at most 65536"),
            (r#""num_key_value_heads": 5"#, "`num_key_value_heads`: expected a divisor of 32"),
        ] {
            let text = format!(r#"{{"model_type": "mixtral", {fields}}}"#);
            let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
            let message = MixtralConfig::parse(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
