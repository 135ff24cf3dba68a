//! ERNIE 3.0: one universal module that reads long texts in segments with a memory, and above it one task module for
//! understanding and one for writing (Sun et al. 2021, <https://arxiv.org/abs/2107.02137>; Titan, Wang et al. 2021,
//! <https://arxiv.org/abs/2112.12731>). Neither was ever released; what was are the small encoders in [`crate::ernie`].
//!
//! Attention to relative positions and to the memory is that of Transformer-XL (Dai et al. 2019,
//! <https://arxiv.org/abs/1901.02860>). The fixture's reference is a formula oracle, written from the papers: the
//! projections between the modules, where the norms stand, and the names of weights are assumptions.
//!
//! ```sh
//! volary forward path/to/ernie3_universal --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::module::linear;
use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_kernels::layers::{
    Attention, AttentionConfig, Embedding, LayerNorm, Linear, LinearConfig, Mlp, MlpConfig,
};
use volary_kernels::ops::{self, Activation, Mask};
use volary_weights::{KeyMap, Rule};

use Rule::{Rename, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};

/// Shape of the three modules.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ernie3Config {
    /// Number of tokens.
    pub vocab_size: usize,
    /// The module that both tasks share.
    pub universal: StackConfig,
    /// Each task's own module.
    pub task: StackConfig,
    /// How many tokens before a segment are remembered, in each block.
    pub memory: usize,
    /// Added to variances.
    pub layer_norm_eps: f64,
}

/// Shape of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Width of the MLP.
    pub d_ff: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
}

/// A universal module with its task modules.
#[derive(Module, Debug)]
pub struct Ernie3 {
    /// `[vocab_size, d_model]`; scores of tokens too.
    pub tokens: Embedding,
    /// The universal module.
    pub universal: Vec<RelativeBlock>,
    /// For understanding.
    pub nlu: TaskModule,
    /// For writing.
    pub nlg: TaskModule,
    #[module(skip)]
    memory: usize,
}

/// A task's own blocks, between projections from and to the universal module's width.
#[derive(Module, Debug)]
pub struct TaskModule {
    /// `[d_task, d_model]`.
    pub input: Linear,
    /// `d_task` wide.
    pub blocks: Vec<RelativeBlock>,
    /// `[d_model, d_task]`.
    pub output: Linear,
}

/// A post-norm block whose attention goes by relative positions.
#[derive(Module, Debug)]
pub struct RelativeBlock {
    /// Without biases.
    pub attention: Attention,
    /// Of the encodings of distances, `[d_model, d_model]`.
    pub distance: Linear,
    /// What every query asks of keys, `[n_heads, d_head]`: `u` of Transformer-XL.
    pub content_bias: Param<Tensor<2>>,
    /// What every query asks of distances, `[n_heads, d_head]`: `v` of Transformer-XL.
    pub distance_bias: Param<Tensor<2>>,
    /// After the attention's residual.
    pub norm1: LayerNorm,
    /// Two projections.
    pub mlp: Mlp,
    /// After the MLP's residual.
    pub norm2: LayerNorm,
}

/// What a text is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Branch {
    /// Understanding: every token sees its whole segment and what is remembered.
    Nlu,
    /// Writing: no token sees those after it.
    Nlg,
}

/// What went into each block for the last tokens before a segment, `[batch, remembered, d_model]` each.
#[derive(Clone, Debug)]
pub struct Memory {
    /// Of the universal module.
    pub universal: Vec<Tensor<3>>,
    /// Of the task module.
    pub task: Vec<Tensor<3>>,
}

/// What the model gives for a segment.
#[derive(Clone, Debug)]
pub struct Ernie3Output {
    /// The universal module's states, `[batch, seq, d_model]`.
    pub universal: Tensor<3>,
    /// Scores of tokens, `[batch, seq, vocab_size]`.
    pub logits: Tensor<3>,
    /// For the segment that follows.
    pub memory: Memory,
}

impl StackConfig {
    fn init(&self, eps: f64, device: &Device) -> Vec<RelativeBlock> {
        let Self { d_model, d_ff, n_heads, .. } = *self;
        let bias = || Initializer::Zeros.init([n_heads, d_model / n_heads], device);
        let block = |_| RelativeBlock {
            attention: AttentionConfig::new(d_model, n_heads)
                .with_bias(false)
                .with_output_bias(false)
                .init(device),
            distance: LinearConfig::new(d_model, d_model).with_bias(false).init(device),
            content_bias: bias(),
            distance_bias: bias(),
            norm1: LayerNorm::new(d_model, eps, device),
            mlp: MlpConfig::new(d_model, d_ff).init(device),
            norm2: LayerNorm::new(d_model, eps, device),
        };
        (0..self.n_layers).map(block).collect()
    }
}

impl Ernie3Config {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Ernie3 {
        let (wide, narrow) = (self.universal.d_model, self.task.d_model);
        let task = || TaskModule {
            input: LinearConfig::new(wide, narrow).init(device),
            blocks: self.task.init(self.layer_norm_eps, device),
            output: LinearConfig::new(narrow, wide).init(device),
        };
        Ernie3 {
            tokens: Embedding::new(self.vocab_size, wide, 0.02, device),
            universal: self.universal.init(self.layer_norm_eps, device),
            nlu: task(),
            nlg: task(),
            memory: self.memory,
        }
    }
}

impl RelativeBlock {
    /// A segment `[batch, seq, d_model]` after what is remembered, `[batch, remembered, d_model]`:
    /// `[batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, remembered: Option<&Tensor<3>>, mask: &Mask) -> Tensor<3> {
        let context = match remembered {
            Some(remembered) => Tensor::cat(vec![remembered.clone(), x.clone()], 1),
            None => x.clone(),
        };
        let query = self.attention.queries(x.clone()); // [batch, n_heads, seq, d_head]
        let (key, value) = self.attention.keys_values(context);
        let distances = self.distances(query.clone(), key.dims()[2]);
        let mask = Mask::All(vec![Mask::Bias(distances), mask.clone()]);
        let query = query + self.content_bias.val().unsqueeze_dims(&[0, 2]);
        let attended = self.attention.merge(ops::attention(query, key, value, &mask, None));
        let x = self.norm1.of_sum(x, attended);
        self.norm2.of_sum(x.clone(), self.mlp.forward(x, Activation::Gelu))
    }

    /// The scores of the distances from queries `[batch, n_heads, seq, d_head]` to the last `keys` tokens, over the
    /// square root of the head's width: `[batch, n_heads, seq, keys]`.
    fn distances(&self, query: Tensor<4>, keys: usize) -> Tensor<4> {
        let [batch, n_heads, seq, d_head] = query.dims();
        let device = query.device();
        let query = query + self.distance_bias.val().unsqueeze_dims(&[0, 2]);
        // of every distance there is, from that to the last key to that to the first
        let encoded = encoded(1 - seq as i64..keys as i64, n_heads * d_head, &device).cast(query.dtype());
        let count = encoded.dims()[0];
        let encoded = self.distance.forward(encoded).reshape([1, count, n_heads, d_head]).swap_dims(1, 2);
        let scores = query.matmul(encoded.transpose()); // [batch, n_heads, seq, distances]
        // the last query stands at the last key
        let place = |i: usize| (0..keys).map(move |j| ((i + keys - seq) + (seq - 1) - j) as i64);
        let places: Vec<i64> = (0..seq).flat_map(place).collect();
        let places: Tensor<4, Int> = Tensor::from_data(TensorData::new(places, [1, 1, seq, keys]), &device);
        scores.gather(3, places.expand([batch, n_heads, seq, keys])) / (d_head as f64).sqrt()
    }
}

/// Sines, then cosines of distances, which may be negative: `[distances, d_model]`.
fn encoded(distances: std::ops::Range<i64>, d_model: usize, device: &Device) -> Tensor<2> {
    let frequency = |pair: usize| 10000f64.powf(-2.0 * pair as f64 / d_model as f64);
    let count = (distances.end - distances.start) as usize;
    let row = |distance: i64| {
        let angles = move || (0..d_model / 2).map(move |pair| distance as f64 * frequency(pair));
        angles().map(f64::sin).chain(angles().map(f64::cos)).map(|value| value as f32)
    };
    let values: Vec<f32> = distances.flat_map(row).collect();
    Tensor::from_data(TensorData::new(values, [count, d_model]), device)
}

impl Ernie3 {
    /// Reads one segment `[batch, seq]` after what is remembered.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, or the memory is of another model or batch.
    pub fn forward(&self, ids: Tensor<2, Int>, branch: Branch, memory: Option<&Memory>) -> Ernie3Output {
        let mask = match branch {
            Branch::Nlu => Mask::Full,
            Branch::Nlg => Mask::Causal,
        };
        self.forward_with(ids, branch, memory, &mask)
    }

    /// As [`Ernie3::forward`], with a mask of one's own over what is remembered and the segment.
    ///
    /// # Panics
    /// As [`Ernie3::forward`]; if the mask does not fit.
    pub fn forward_with(
        &self,
        ids: Tensor<2, Int>,
        branch: Branch,
        memory: Option<&Memory>,
        mask: &Mask,
    ) -> Ernie3Output {
        let task = match branch {
            Branch::Nlu => &self.nlu,
            Branch::Nlg => &self.nlg,
        };
        let x = self.tokens.forward(ids); // [batch, seq, d_model]
        let (universal, seen) =
            self.read(&self.universal, x, memory.map(|memory| &memory.universal[..]), mask);
        let x = task.input.forward(universal.clone());
        let (x, seen_by_task) = self.read(&task.blocks, x, memory.map(|memory| &memory.task[..]), mask);
        let logits = linear(task.output.forward(x), self.tokens.weight.val().transpose(), None);
        Ernie3Output { universal, logits, memory: Memory { universal: seen, task: seen_by_task } }
    }

    /// Blocks, and what they are to remember.
    fn read(
        &self,
        blocks: &[RelativeBlock],
        x: Tensor<3>,
        memory: Option<&[Tensor<3>]>,
        mask: &Mask,
    ) -> (Tensor<3>, Vec<Tensor<3>>) {
        let mut kept = Vec::with_capacity(blocks.len());
        let x = blocks.iter().enumerate().fold(x, |x, (layer, block)| {
            let remembered = memory.map(|memory| &memory[layer]);
            let all = match remembered {
                Some(remembered) => Tensor::cat(vec![remembered.clone(), x.clone()], 1),
                None => x.clone(),
            };
            let length = all.dims()[1];
            let rest = self.memory.min(length);
            // what is remembered teaches nothing to the past
            kept.push(all.narrow(1, length - rest, rest).detach());
            block.forward(x, remembered, mask)
        });
        (x, kept)
    }
}

impl Ernie3Config {
    /// The configuration of a folder.
    ///
    /// # Errors
    /// If it is missing, malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Self::parse(&folder.config("config.json")?)?)
    }

    /// `config.json` with the fixture's fields.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let stack = |d_model: &str, d_ff: &str, n_layers: &str, n_heads: &str, default: StackConfig| {
            let width = config.size_or(d_model, default.d_model)?;
            let heads = config.size_or(n_heads, default.n_heads)?;
            config.divides(n_heads, heads, width)?;
            if !width.is_multiple_of(2) {
                return Err(config.error(d_model, "an even width"));
            }
            Ok(StackConfig {
                d_model: width,
                d_ff: config.size_or(d_ff, 4 * width)?,
                n_layers: config.blocks_or(n_layers, default.n_layers)?,
                n_heads: heads,
            })
        };
        let universal = ["hidden_size", "intermediate_size", "num_layers", "num_heads"];
        let task = ["task_hidden_size", "task_intermediate_size", "task_num_layers", "task_num_heads"];
        let of = |[a, b, c, d]: [&str; 4], default| stack(a, b, c, d, default);
        Ok(Self {
            vocab_size: config.size_or("vocab_size", BASE.vocab_size)?,
            universal: of(universal, BASE.universal)?,
            task: of(task, BASE.task)?,
            memory: config.size_or("memory_length", BASE.memory)?,
            layer_norm_eps: config.number_or("layer_norm_eps", BASE.layer_norm_eps)?,
        })
    }
}

const NAMED: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

const BLOCK: &[Rule] = &[
    Rename("q.weight", "attention.query.weight"),
    Rename("k.weight", "attention.key.weight"),
    Rename("v.weight", "attention.value.weight"),
    Rename("o.weight", "attention.output.weight"),
    Rename("r.weight", "distance.weight"),
    Rename("r_w_bias", "content_bias"),
    Rename("r_r_bias", "distance_bias"),
    Under("norm1.", "norm1.", NAMED),
    Under("fc1.", "mlp.up.", NAMED),
    Under("fc2.", "mlp.down.", NAMED),
    Under("norm2.", "norm2.", NAMED),
];

/// The fixture's names.
pub const KEYS: KeyMap = KeyMap::new(&[
    Rename("word_embeddings.weight", "tokens.weight"),
    Under("universal.{}.", "universal.{}.", BLOCK),
    Under("nlu_in.", "nlu.input.", NAMED),
    Under("nlu.{}.", "nlu.blocks.{}.", BLOCK),
    Under("nlu_out.", "nlu.output.", NAMED),
    Under("nlg_in.", "nlg.input.", NAMED),
    Under("nlg.{}.", "nlg.blocks.{}.", BLOCK),
    Under("nlg_out.", "nlg.output.", NAMED),
]);

/// The large ERNIE 3.0 as the registry knows it.
pub const SYSTEM: System = System {
    name: "ernie3",
    about: "understanding and writing above one universal module with a memory: ERNIE 3.0 and Titan, never released",
    file: "models/ernie3.rs",
    tasks: &["forward"],
    proved: &["ernie3_universal"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| config.text("model_type") == Some("ernie3_universal"))
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &Ernie3Config::of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = Ernie3Config::of(folder)?;
        let model = fill(folder, config.init(device), &KEYS, options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// The inputs of the forward contract, in the order in which they are read.
const SEGMENTS: [&str; 4] = ["segment1_ids", "segment2_ids", "segment3_ids", "segment4_ids"];

/// The three modules behind the forward contract.
struct Runner {
    model: Ernie3,
    config: Ernie3Config,
}

impl Forward for Runner {
    /// `segment1_ids`, and if wanted up to three segments that follow it.
    ///
    /// Gives for both branches and each segment `nlu.universal1`, `nlu.logits1`, `nlg.universal1`, ...
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let segments: Vec<_> =
            SEGMENTS.iter().map(|name| inputs.ids::<2>(name, self.config.vocab_size)).collect();
        inputs.missing(SEGMENTS[0]);
        let given: Vec<(usize, Tensor<2, Int>)> =
            segments.into_iter().enumerate().filter_map(|(at, ids)| Some((at, ids?))).collect();
        let batch = given.first().map_or(0, |(_, ids)| ids.dims()[0]);
        for (at, ids) in &given {
            if ids.dims()[0] != batch {
                inputs.problem(format!("`{}` has {} rows, expected {batch}", SEGMENTS[*at], ids.dims()[0]));
            }
        }
        inputs.finish()?;

        let mut outputs = Outputs::new();
        for (branch, name) in [(Branch::Nlu, "nlu"), (Branch::Nlg, "nlg")] {
            let mut memory = None;
            for (at, ids) in &given {
                let found = self.model.forward(ids.clone(), branch, memory.as_ref());
                outputs.push(output(&format!("{name}.universal{}", at + 1), found.universal));
                outputs.push(output(&format!("{name}.logits{}", at + 1), found.logits));
                memory = Some(found.memory);
            }
        }
        Ok(outputs)
    }
}

/// Sun et al. 2021, section 4.2; the vocabulary is that of the small ones.
const BASE: Ernie3Config = Ernie3Config {
    vocab_size: 40000,
    universal: StackConfig { d_model: 4096, d_ff: 16384, n_layers: 48, n_heads: 64 },
    task: StackConfig { d_model: 768, d_ff: 3072, n_layers: 12, n_heads: 12 },
    memory: 128,
    layer_norm_eps: 1e-5,
};

/// Wang et al. 2021: its MLP is 16 times as wide as its states, without which it would have 87 billion.
const TITAN: Ernie3Config = Ernie3Config {
    universal: StackConfig { d_model: 12288, d_ff: 196_608, n_layers: 48, n_heads: 192 },
    ..BASE
};

const fn preset(name: &'static str, config: Ernie3Config, parameters: usize, source: &'static str) -> Preset {
    Preset {
        name,
        shape: Shape::Ernie3(config),
        weights: Weights::Unreleased,
        license: "none",
        parameters,
        source,
    }
}

/// Published sizes, never released.
pub const PRESETS: &[Preset] = &[
    preset(
        "ernie-3.0",
        BASE,
        10_831_805_952,
        "counted with projections of distances, task modules and tables, which are assumed; the paper says 10 billion, \
         attention and MLPs of the universal module are 9.66 billion",
    ),
    preset(
        "ernie-3.0-titan",
        TITAN,
        268_894_109_184,
        "counted with projections of distances, task modules and tables, which are assumed; the paper says 260 billion, \
         attention and MLPs of the universal module are 260.9 billion",
    ),
];

#[cfg(test)]
mod tests {
    use burn::tensor::{Distribution, Tolerance};
    use volary_weights::parameters;

    use super::*;

    const TINY: Ernie3Config = Ernie3Config {
        vocab_size: 20,
        universal: StackConfig { d_model: 12, d_ff: 24, n_layers: 3, n_heads: 3 },
        task: StackConfig { d_model: 8, d_ff: 16, n_layers: 2, n_heads: 2 },
        memory: 3,
        layer_norm_eps: 1e-5,
    };

    /// Untrained, but for biases that are not zero.
    fn model(memory: usize) -> Ernie3 {
        let device = Device::flex();
        let mut model = Ernie3Config { memory, ..TINY }.init(&device);
        let blocks = model.universal.iter_mut().chain(&mut model.nlu.blocks).chain(&mut model.nlg.blocks);
        for block in blocks {
            for bias in [&mut block.content_bias, &mut block.distance_bias] {
                *bias =
                    Param::from_tensor(Tensor::random(bias.dims(), Distribution::Normal(0.0, 1.0), &device));
            }
        }
        model
    }

    fn text() -> Tensor<2, Int> {
        Tensor::from_data(
            [[3, 14, 15, 9, 2, 6, 5, 3, 5, 8, 9, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]],
            &Device::flex(),
        )
    }

    /// The scores of the text read in segments of these lengths.
    fn in_segments(model: &Ernie3, branch: Branch, lengths: &[usize]) -> TensorData {
        let (mut memory, mut first, mut logits) = (None, 0, Vec::new());
        for &length in lengths {
            let found = model.forward(text().narrow(1, first, length), branch, memory.as_ref());
            logits.push(found.logits);
            memory = Some(found.memory);
            first += length;
        }
        Tensor::cat(logits, 1).into_data()
    }

    /// A text in segments with a memory is a text in one piece, each of whose tokens sees back from its segment's start
    /// as far as the memory reaches: in the deeper blocks too, which remember states that reached back themselves.
    #[test]
    fn segments_with_a_memory_are_the_whole_within_its_reach() {
        for (memory, lengths) in [(3, [4, 4, 4]), (5, [2, 6, 4]), (1, [4, 3, 5]), (12, [5, 5, 2])] {
            let model = model(memory);
            for branch in [Branch::Nlu, Branch::Nlg] {
                let mut hidden = Vec::new();
                let mut first = 0usize;
                for length in lengths {
                    for query in first..first + length {
                        let last = if branch == Branch::Nlg { query } else { first + length - 1 };
                        let seen = first.saturating_sub(memory)..=last;
                        hidden.extend(
                            (0..12).map(|key| if seen.contains(&key) { 0f32 } else { f32::NEG_INFINITY }),
                        );
                    }
                    first += length;
                }
                let bias = Tensor::from_data(TensorData::new(hidden, [1, 1, 12, 12]), &Device::flex());
                let whole = model.forward_with(text(), branch, None, &Mask::Bias(bias)).logits.into_data();
                let found = in_segments(&model, branch, &lengths);
                found.assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-4));
            }
        }
    }

    #[test]
    fn without_limits_writing_in_segments_is_writing_at_once() {
        let model = model(12);
        let whole = model.forward(text(), Branch::Nlg, None).logits.into_data();
        in_segments(&model, Branch::Nlg, &[1, 7, 4])
            .assert_approx_eq::<f32>(&whole, Tolerance::absolute(1e-4));
    }

    #[test]
    fn writing_ignores_the_future_and_understanding_does_not() {
        let model = model(3);
        let changed = text().slice_assign([0..2, 11..12], Tensor::from_data([[19], [19]], &Device::flex()));
        let moved = |branch| {
            let first = |ids| model.forward(ids, branch, None).logits.narrow(1, 0, 11);
            (first(text()) - first(changed.clone())).abs().max().into_scalar::<f32>()
        };
        assert!(moved(Branch::Nlg) < 1e-5);
        assert!(moved(Branch::Nlu) > 1e-3);
    }

    #[test]
    fn no_more_is_remembered_than_the_memory_holds() {
        let model = model(3);
        let found = model.forward(text().narrow(1, 0, 2), Branch::Nlu, None);
        assert_eq!(found.memory.universal[0].dims(), [2, 2, 12]);
        let found = model.forward(text().narrow(1, 2, 2), Branch::Nlu, Some(&found.memory));
        assert_eq!((found.memory.universal.len(), found.memory.task.len()), (3, 2));
        assert!(found.memory.task.iter().all(|kept| kept.dims() == [2, 3, 8]));
    }

    #[test]
    fn encodings_of_literal_distances() {
        let found = encoded(-1..2, 4, &Device::flex()).into_data();
        let (one, hundredth) = (1f32, 0.01f32);
        let expected = TensorData::from([
            [-one.sin(), -hundredth.sin(), one.cos(), hundredth.cos()],
            [0.0, 0.0, 1.0, 1.0],
            [one.sin(), hundredth.sin(), one.cos(), hundredth.cos()],
        ]);
        found.assert_approx_eq::<f32>(&expected, Tolerance::default());
    }

    /// What the counts that are known for the two are of.
    #[test]
    fn attention_and_mlps_of_the_universal_module_are_as_published() {
        for (config, billions) in [(BASE, 9.66), (TITAN, 260.9)] {
            let of_core = |path: &str| {
                path.starts_with("universal.") && (path.contains(".attention.") || path.contains(".mlp."))
            };
            let all = parameters(&config.init(&Device::flex()));
            let core: usize = all
                .iter()
                .filter(|parameter| of_core(&parameter.path))
                .map(|parameter| parameter.shape.iter().product::<usize>())
                .sum();
            assert!((core as f64 / 1e9 - billions).abs() < billions * 1e-3, "{core}");
        }
    }

    #[test]
    fn every_parameter_has_one_key() {
        for parameter in parameters(&TINY.init(&Device::flex())) {
            let keys = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(keys.len(), 1, "{}", parameter.path);
            assert_eq!(KEYS.paths(&keys[0]).unwrap(), [parameter.path]);
        }
    }
}
