//! What training a model takes of each device: memory, floating point operations, and bytes sent. Nothing is allocated, so that
//! models of trillions of parameters can be reasoned about.
//!
//! ```sh
//! volary plan M6-10T --data 1 --expert 512 --tensor 1 --pipeline 1 --batch 1024 --sequence 512 --dtype bf16
//! ```
//!
//! # Layout
//!
//! There are `D·E·T·P` devices. Blocks are dealt out to `P` stages, as evenly as they can, the first ones to the first. The experts
//! of a block are dealt out to `E` devices, which hold all else of their stage; `D` is how many such groups there are. So what is
//! no expert has `D·E` copies, an expert has `D`, and each of `D·E` replicas has `n = B·S / (D·E)` tokens of the `B` sequences of `S`
//! (an encoder reads `S` and a decoder writes `S`). Every matrix of a replica is divided among `T` devices, as in Megatron (Shoeybi et
//! al. 2019, <https://arxiv.org/abs/1909.08053>): projections by heads and by the width of MLPs, tables and heads by the vocabulary.
//! Norms, routers, and biases of outputs are on all `T`.
//!
//! # Memory of a device
//!
//! `w` is the bytes of the dtype, and `N` the numbers of its stage's weights that are on it.
//!
//! - weights `N·w`, gradients `N·w`
//! - states of Adam: two moments in f32, and weights in f32 where the dtype is another: `8·N`, or `12·N`
//! - activations: what autodiff keeps of the forward pass of all tokens of the device, without recomputation and without
//!   micro-batches. In f32 as bodies of ours for the CPU keep it, in other dtypes as Burn's operations do. For a token, `d` the width
//!   of the stream, `a` the number of attentions of a block, `h` that of heads, and `q = h·d_head`:
//!   - `2·d` of a norm: what goes in and what comes out; with Burn's `3·d`, what it scales besides
//!   - `2·(q + k) / T` of an attention, `k` as wide as the keys: queries, keys, values, and what they give. With Burn's, and where
//!     distances bias the scores, `(4·q + h·(3·S + 2)) / T`: keys and values are repeated for every head, and there are three tables of
//!     scores, and what divides them
//!   - `f·d_ff / T` of an MLP, `f` the values between its projections: 2, or 3 where there are three projections. With Burn's, by
//!     the activation, 1 (ReLU, GELU), 2 (SiLU) or 3 (GELU by `tanh`), and 1 more, or 3 where there are three projections
//!   - of experts `e + k·(m·d + f·d_ff / T)`: chances of `e` experts, and of each of `k` choices the rows that go into all but the
//!     last of `m` projections, and the row that comes back
//!   - a norm before every attention and MLP, and one after the last block, of an encoder and of a decoder; on the last stage
//!     `vocabulary / T` scores
//!
//!   Counted allocations of tiny models in f32 on a CPU are within 3 % of it (`tests/memory.rs`) where loads are even; what Burn's
//!   operations keep was counted likewise, in f32 as well. On a GPU it is Burn's in every dtype. Where loads differ by
//!   more than twice, a block's experts are there once more, and up to twice the rows, until the backward pass has read them. Masks,
//!   and what the backward pass itself needs, are not counted.
//!
//! # Operations of a step
//!
//! A product of two numbers and its sum are two operations, and the backward pass has twice those of the forward pass: six for each
//! product. A token's products are the numbers of the matrices that it meets (of experts those of its `k` choices; a table that is
//! looked up has none) and `2·S·q` in each attention, whether or not the future is hidden. Norms, activations and softmaxes are not
//! counted.
//!
//! # Bytes that a device sends in a step
//!
//! Loads are taken as even, and nothing is dropped. A ring of `r` devices sends `2·(r-1)/r` of what it adds up.
//!
//! - tokens to their experts and back, of each block with experts: `2·n·k·d·w·(E-1)/E`; their gradients backward, as many
//! - gradients of what is no expert, over `D·E`; of experts, over `D`
//! - tensor-parallel sums, forward and backward: `n·d·w` of each attention and MLP, `n·k·d·w` of experts; forward of the table, backward
//!   of the head
//! - streams to the next stage, and gradients to the one before: `n·d·w` each; inside a decoder also what the encoder has read, as
//!   much again
//!
//! What FasterMoE's copies of busy experts spare of the first is counted by [`volary_kernels::moe::Placement`].

use serde::Serialize;
use volary_kernels::ops::Activation;

use crate::folder::Folder;
use crate::llama::LlamaConfig;
use crate::mixtral::MixtralConfig;
use crate::preset::Shape;
use crate::registry::System;
use crate::switch_transformers::SwitchConfig;
use crate::t5::{self, MlpForm, T5Config};
use crate::{causal, error::Error};

/// A model, as far as its cost is concerned.
#[derive(Clone, Debug, PartialEq)]
pub struct Outline {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key-value heads.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Whether the projections of attentions have biases.
    pub attention_bias: bool,
    /// Whether those of MLPs that are no experts have them.
    pub mlp_bias: bool,
    /// Number of tokens; 0 where there is no table.
    pub vocab_size: usize,
    /// What makes scores.
    pub head: Scores,
    /// The blocks, one after the other.
    pub blocks: Vec<Block>,
    /// Numbers of what is after the last block and no head: norms, biases of distances.
    pub rest: usize,
}

/// What makes scores of states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// A projection.
    Own,
    /// The table of tokens.
    Tied,
    /// Nothing.
    Absent,
}

/// A block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    /// Attentions: two in a decoder that sees an encoder.
    pub attentions: usize,
    /// How many of them have scores that are biased by distances.
    pub biased: usize,
    /// Numbers of its norms.
    pub norms: usize,
    /// Width between the projections of its MLP, or of each expert.
    pub d_ff: usize,
    /// Projections of its MLP, or of each expert: three where there is a gated one.
    pub projections: usize,
    /// Between them.
    pub activation: Activation,
    /// Experts in the place of the MLP.
    pub experts: Option<Experts>,
    /// Whether it is the first that reads tokens, of an encoder or a decoder.
    pub is_first: bool,
}

/// The experts of a block. Their projections have no biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Experts {
    /// How many.
    pub count: usize,
    /// How many a token goes to.
    pub top_k: usize,
    /// Whether the router has biases.
    pub router_bias: bool,
    /// Numbers of each expert besides its projections.
    pub norm: usize,
}

/// How a model and its data are spread over devices, and what a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// `D`: groups that have all experts.
    pub data: u64,
    /// `T`: devices that share every matrix.
    pub tensor: u64,
    /// `E`: devices that the experts of a block are dealt out to.
    pub expert: u64,
    /// `P`: stages.
    pub pipeline: u64,
    /// `B`: sequences of a step, on all devices.
    pub batch: u64,
    /// `S`: tokens of each.
    pub sequence: u64,
    /// `w`: bytes of a weight, a gradient, an activation.
    pub bytes: u64,
}

/// Why there is no plan.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The formulas are not those of this model.
    #[error("{name}: no plans for {system}; there are for {}", PLANNED.join(", "))]
    NoOutline {
        /// What was asked for.
        name: String,
        /// Its system.
        system: String,
    },
    /// The layout does not fit the model.
    #[error("{}", problems.join("; "))]
    Layout {
        /// Everything that does not fit.
        problems: Vec<String>,
    },
    /// The folder cannot be read.
    #[error(transparent)]
    Model(#[from] Error),
}

const PLANNED: &[&str] = &["llama", "mixtral", "t5", "switch_transformers", "base_moe and m6_moe (presets)"];

/// What a step takes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Plan {
    /// How it is laid out.
    pub layout: Layout,
    /// Number of devices.
    pub devices: u128,
    /// Numbers of the whole model.
    pub parameters: u128,
    /// Those of experts.
    pub expert_parameters: u128,
    /// Those whose products a token meets, and norms and biases: all but the experts that it does not go to.
    pub active_parameters: u128,
    /// Tokens that are read or written in a step.
    pub tokens: u128,
    /// Operations of a step on all devices.
    pub operations: u128,
    /// A device of each stage.
    pub stages: Vec<Device>,
}

/// What a step takes of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Which stage, counted from 1.
    pub stage: usize,
    /// How many blocks it has.
    pub blocks: usize,
    /// Numbers of weights on it.
    pub numbers: u128,
    /// Bytes of weights.
    pub weights: u128,
    /// Bytes of gradients.
    pub gradients: u128,
    /// Bytes of the optimizer's states.
    pub optimizer: u128,
    /// Bytes of activations.
    pub activations: u128,
    /// Floating point operations.
    pub operations: u128,
    /// Bytes that it sends.
    pub sent: Sent,
}

/// Bytes that a device sends in a step.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Sent {
    /// Tokens to experts and back.
    pub to_experts: u128,
    /// The gradients of both.
    pub to_experts_backward: u128,
    /// To add up gradients of what is no expert.
    pub shared_gradients: u128,
    /// To add up gradients of experts.
    pub expert_gradients: u128,
    /// To add up what the parts of matrices give.
    pub tensor: u128,
    /// To the stages before and after.
    pub pipeline: u128,
}

impl Device {
    /// Bytes of all that it holds.
    pub fn memory(&self) -> u128 {
        self.weights + self.gradients + self.optimizer + self.activations
    }
}

impl Sent {
    /// All of them.
    pub fn all(&self) -> u128 {
        let Self { to_experts, to_experts_backward, shared_gradients, expert_gradients, tensor, pipeline } =
            self;
        to_experts + to_experts_backward + shared_gradients + expert_gradients + tensor + pipeline
    }
}

/// Numbers of weights: those that are divided among tensor-parallel devices, and those that are on each of them.
#[derive(Clone, Copy, Default)]
struct Numbers {
    split: u128,
    whole: u128,
}

impl Numbers {
    fn all(self) -> u128 {
        self.split + self.whole
    }

    /// On one of so many devices.
    fn on(self, tensor: u128) -> u128 {
        self.split.div_ceil(tensor) + self.whole
    }
}

impl core::ops::Add for Numbers {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { split: self.split + other.split, whole: self.whole + other.whole }
    }
}

impl core::iter::Sum for Numbers {
    fn sum<I: Iterator<Item = Self>>(each: I) -> Self {
        each.fold(Self::default(), |sum, numbers| sum + numbers)
    }
}

/// What a ring of so many sends of each thing that it adds up.
fn ring(bytes: u128, devices: u128) -> u128 {
    2 * bytes * (devices - 1) / devices
}

impl Outline {
    /// Of a preset's shape; nothing where the formulas are not its.
    pub fn of(shape: &Shape) -> Option<Self> {
        match shape {
            Shape::Llama(config) => Some(Self::llama(config, None)),
            Shape::Mixtral(MixtralConfig { llama, n_experts, top_k }) => {
                let experts = Experts { count: *n_experts, top_k: *top_k, router_bias: false, norm: 0 };
                Some(Self::llama(llama, Some(experts)))
            }
            Shape::M6(config) => {
                let experts = Experts {
                    count: config.n_experts,
                    top_k: config.n_prototypes,
                    router_bias: false,
                    norm: 0,
                };
                let block = |at| Block {
                    attentions: 1,
                    biased: 0,
                    norms: 4 * config.d_model, // two layer norms
                    d_ff: config.d_ff,
                    projections: 2,
                    activation: Activation::Gelu,
                    experts: Some(experts),
                    is_first: at == 0,
                };
                Some(Self {
                    d_model: config.d_model,
                    n_heads: config.n_heads,
                    n_kv_heads: config.n_heads,
                    d_head: config.d_model / config.n_heads,
                    attention_bias: true,
                    mlp_bias: false,
                    vocab_size: 0,
                    head: Scores::Absent,
                    blocks: (0..config.n_layers).map(block).collect(),
                    rest: 0,
                })
            }
            Shape::T5(config) => Some(Self::t5(config, |_, _| None)),
            Shape::Switch(config) => {
                let experts =
                    Experts { count: config.n_experts, top_k: 1, router_bias: config.router_bias, norm: 0 };
                Some(Self::t5(&config.t5, |side, block| {
                    let sparse = [config.sparse_encoder, config.sparse_decoder][side];
                    sparse.has(block).then_some(experts)
                }))
            }
            Shape::Cpm2Moe(config) => {
                let d_model = config.t5.d_model;
                let experts =
                    Experts { count: config.n_experts, top_k: 1, router_bias: false, norm: d_model };
                let mut outline = Self::t5(&config.t5, |_, _| Some(experts));
                // the norm before the MLP is each expert's own
                outline.blocks.iter_mut().for_each(|block| block.norms -= d_model);
                Some(outline)
            }
            _ => None,
        }
    }

    /// Of a folder's configuration; its weights are not looked at.
    ///
    /// # Errors
    /// If there is none, it is wrong, or the formulas are not those of its system.
    pub fn of_folder(folder: &Folder) -> Result<Self, PlanError> {
        let system = System::of(folder)?.name;
        let config = || folder.config("config.json");
        let wrong = |error| PlanError::Model(Error::Config(error));
        let shape = match system {
            "llama" => Some(Shape::Llama(LlamaConfig::parse(&config()?).map_err(wrong)?)),
            "mixtral" => Some(Shape::Mixtral(MixtralConfig::parse(&config()?).map_err(wrong)?)),
            "t5" => Some(Shape::T5(T5Config::parse(&config()?).map_err(wrong)?)),
            "switch_transformers" => Some(Shape::Switch(SwitchConfig::parse(&config()?).map_err(wrong)?)),
            _ => None,
        };
        shape.as_ref().and_then(Self::of).ok_or_else(|| PlanError::NoOutline {
            name: folder.path().display().to_string(),
            system: system.into(),
        })
    }

    fn llama(config: &LlamaConfig, experts: Option<Experts>) -> Self {
        let block = |at| Block {
            attentions: 1,
            biased: 0,
            norms: 2 * config.d_model,
            d_ff: config.d_ff,
            projections: 3,
            activation: config.activation,
            experts,
            is_first: at == 0,
        };
        Self {
            d_model: config.d_model,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            d_head: config.d_head,
            attention_bias: config.attention_bias,
            mlp_bias: config.mlp_bias,
            vocab_size: config.vocab_size,
            head: match config.head {
                causal::Head::Own => Scores::Own,
                causal::Head::Tied => Scores::Tied,
                causal::Head::Absent => Scores::Absent,
            },
            blocks: (0..config.n_layers).map(block).collect(),
            rest: config.d_model,
        }
    }

    /// `experts`: of a block of the encoder (0) or the decoder (1).
    fn t5(config: &T5Config, experts: impl Fn(usize, usize) -> Option<Experts>) -> Self {
        let block = |side: usize, at: usize| Block {
            attentions: 1 + side,
            biased: 1,
            norms: (2 + side) * config.d_model,
            d_ff: config.d_ff,
            projections: match config.mlp {
                MlpForm::Plain => 2,
                MlpForm::Gated => 3,
            },
            activation: config.activation,
            experts: experts(side, at),
            is_first: at == 0,
        };
        let encoder = (0..config.n_layers).map(|at| block(0, at));
        let decoder = (0..config.n_decoder_layers).map(|at| block(1, at));
        Self {
            d_model: config.d_model,
            n_heads: config.n_heads,
            n_kv_heads: config.n_heads,
            d_head: config.d_head,
            attention_bias: false,
            mlp_bias: false,
            vocab_size: config.vocab_size,
            head: match config.head {
                t5::Head::Own => Scores::Own,
                t5::Head::Tied | t5::Head::TiedUnscaled => Scores::Tied,
                t5::Head::Absent => Scores::Absent,
            },
            blocks: encoder.chain(decoder).collect(),
            rest: 2 * (config.d_model + config.n_buckets * config.n_heads),
        }
    }

    /// Widths of all queries and of all keys.
    fn widths(&self) -> [u128; 2] {
        [self.n_heads, self.n_kv_heads].map(|heads| heads as u128 * self.d_head as u128)
    }

    /// Numbers of the matrices of an attention.
    fn attention_matrices(&self) -> u128 {
        let [queries, keys] = self.widths();
        2 * self.d_model as u128 * (queries + keys)
    }

    /// Numbers of the matrices of an MLP or an expert.
    fn mlp_matrices(&self, block: &Block) -> u128 {
        block.projections as u128 * self.d_model as u128 * block.d_ff as u128
    }

    fn table(&self) -> Numbers {
        Numbers { split: self.vocab_size as u128 * self.d_model as u128, whole: 0 }
    }

    /// Numbers of a block that are no expert's.
    fn shared(&self, block: &Block) -> Numbers {
        let d_model = self.d_model as u128;
        let [queries, keys] = self.widths();
        let attentions = block.attentions as u128;
        let biases = match self.attention_bias {
            true => Numbers { split: queries + 2 * keys, whole: d_model },
            false => Numbers::default(),
        };
        let of_attentions = Numbers {
            split: attentions * (self.attention_matrices() + biases.split),
            whole: attentions * biases.whole + block.norms as u128,
        };
        let mlp = match block.experts {
            Some(Experts { count, router_bias, .. }) => {
                let count = count as u128;
                Numbers { split: 0, whole: d_model * count + if router_bias { count } else { 0 } }
            }
            None if self.mlp_bias => Numbers {
                split: self.mlp_matrices(block) + (block.projections - 1) as u128 * block.d_ff as u128,
                whole: d_model,
            },
            None => Numbers { split: self.mlp_matrices(block), whole: 0 },
        };
        of_attentions + mlp
    }

    /// Numbers of one expert of a block, if it has any.
    fn expert(&self, block: &Block) -> Numbers {
        match block.experts {
            Some(Experts { norm, .. }) => Numbers { split: self.mlp_matrices(block), whole: norm as u128 },
            None => Numbers::default(),
        }
    }

    /// Products of a token in a block, of sequences of this length.
    fn products(&self, block: &Block, sequence: u128) -> u128 {
        let [queries, _] = self.widths();
        let attention = self.attention_matrices() + 2 * sequence * queries;
        let mlp = match block.experts {
            Some(Experts { count, top_k, .. }) => {
                self.d_model as u128 * count as u128 + top_k as u128 * self.mlp_matrices(block)
            }
            None => self.mlp_matrices(block),
        };
        block.attentions as u128 * attention + mlp
    }

    /// Products of a token in the head.
    fn head_products(&self) -> u128 {
        match self.head {
            Scores::Own | Scores::Tied => self.table().all(),
            Scores::Absent => 0,
        }
    }

    /// Numbers of the whole model, and of its experts.
    pub fn parameters(&self) -> [u128; 2] {
        let experts: u128 = self.blocks.iter().map(|block| self.expert(block).all() * experts(block)).sum();
        let shared: u128 = self.blocks.iter().map(|block| self.shared(block).all()).sum();
        let tables = match self.head {
            Scores::Own => 2,
            Scores::Tied | Scores::Absent => 1,
        };
        [experts + shared + tables * self.table().all() + self.rest as u128, experts]
    }

    /// Everything that does not fit.
    fn problems(&self, layout: &Layout) -> Vec<String> {
        /// No flag is above it.
        const MOST: u64 = u32::MAX as u64;
        /// No step has more products.
        const PRODUCTS: f64 = 1e30;
        let Layout { data, tensor, expert, pipeline, batch, sequence, .. } = *layout;
        let flags = [
            ("--data", data),
            ("--tensor", tensor),
            ("--expert", expert),
            ("--pipeline", pipeline),
            ("--batch", batch),
            ("--sequence", sequence),
        ];
        let out = flags.iter().filter(|(_, value)| !(1..=MOST).contains(value));
        let mut problems: Vec<String> =
            out.map(|(flag, value)| format!("{flag} {value}: from 1 to {MOST}")).collect();
        let mut divides = |flag: &str, value: u64, what: &str, of: usize| {
            if value > 0 && !(of as u64).is_multiple_of(value) {
                problems.push(format!("{flag} {value} does not divide {what} {of}"));
            }
        };
        divides("--tensor", tensor, "the number of heads", self.n_heads);
        if self.n_kv_heads != self.n_heads {
            divides("--tensor", tensor, "the number of key-value heads", self.n_kv_heads);
        }
        let mut widths: Vec<usize> = self.blocks.iter().map(|block| block.d_ff).collect();
        widths.dedup();
        for width in widths {
            divides("--tensor", tensor, "the width of an MLP", width);
        }
        let mut counts: Vec<usize> =
            self.blocks.iter().filter_map(|block| Some(block.experts?.count)).collect();
        counts.dedup();
        for count in &counts {
            divides("--expert", expert, "the number of experts", *count);
        }
        if counts.is_empty() && expert > 1 {
            problems.push(format!("--expert {expert}: the model has no experts"));
        }
        if pipeline > self.blocks.len() as u64 {
            problems.push(format!("--pipeline {pipeline}: the model has {} blocks", self.blocks.len()));
        }
        let replicas = u128::from(data) * u128::from(expert);
        if replicas > 0 && !u128::from(batch).is_multiple_of(replicas) {
            problems.push(format!(
                "--batch {batch} does not divide into {replicas} replicas (--data {data} times --expert {expert})"
            ));
        }
        // in floating point, which does not overflow
        let [d_model, sequence] = [self.d_model, sequence as usize].map(|size| size as f64);
        let widest = d_model + self.n_heads as f64 * self.d_head as f64;
        let of_token: f64 = self.blocks.iter().fold(d_model * self.vocab_size as f64, |sum, block| {
            let mlps = block.experts.map_or(1.0, |experts| (experts.count + experts.top_k) as f64);
            sum + 2.0 * (widest + sequence) * widest * block.attentions as f64
                + mlps * (3.0 * block.d_ff as f64 + 1.0) * d_model
        });
        if of_token * batch as f64 * sequence > PRODUCTS {
            problems.push(format!("a step of more than {PRODUCTS:e} products"));
        }
        problems
    }

    /// What a step takes.
    ///
    /// # Errors
    /// With everything that does not fit.
    pub fn plan(&self, layout: &Layout) -> Result<Plan, PlanError> {
        let problems = self.problems(layout);
        if !problems.is_empty() {
            return Err(PlanError::Layout { problems });
        }
        let [parameters, expert_parameters] = self.parameters();
        let idle: u128 = self
            .blocks
            .iter()
            .filter_map(|block| {
                Some(self.expert(block).all() * (experts(block) - block.experts?.top_k as u128))
            })
            .sum();
        let sides = self.blocks.iter().filter(|block| block.is_first).count() as u128;
        let replicas = u128::from(layout.data) * u128::from(layout.expert);
        let stages: Vec<Device> =
            (0..layout.pipeline as usize).map(|stage| self.device(layout, stage)).collect();
        Ok(Plan {
            layout: *layout,
            devices: replicas * u128::from(layout.tensor) * u128::from(layout.pipeline),
            parameters,
            expert_parameters,
            active_parameters: parameters - idle,
            tokens: sides * u128::from(layout.batch) * u128::from(layout.sequence),
            operations: self.operations(layout, 0, self.blocks.len()),
            stages,
        })
    }

    /// The blocks of a stage: the first and how many.
    fn stage(&self, layout: &Layout, stage: usize) -> [usize; 2] {
        let (blocks, stages) = (self.blocks.len(), layout.pipeline as usize);
        let (each, more) = (blocks / stages, blocks % stages);
        [stage * each + stage.min(more), each + usize::from(stage < more)]
    }

    /// Operations of a step in some blocks, on all devices.
    fn operations(&self, layout: &Layout, first: usize, count: usize) -> u128 {
        let [batch, sequence] = [layout.batch, layout.sequence].map(u128::from);
        let blocks = &self.blocks[first..first + count];
        let products: u128 = blocks.iter().map(|block| self.products(block, sequence)).sum();
        let head = if first + count == self.blocks.len() { self.head_products() } else { 0 };
        6 * batch * sequence * (products + head)
    }

    fn device(&self, layout: &Layout, stage: usize) -> Device {
        let Layout { data, tensor, expert, batch, sequence, bytes, .. } = *layout;
        let [data, tensor, expert, batch, sequence, bytes] =
            [data, tensor, expert, batch, sequence, bytes].map(u128::from);
        let replicas = data * expert;
        let tokens = batch * sequence / replicas;
        let [first, count] = self.stage(layout, stage);
        let blocks = &self.blocks[first..first + count];
        let is_last = first + count == self.blocks.len();
        let looks_up = blocks.iter().any(|block| block.is_first);

        // weights
        let has_own_head = is_last && self.head == Scores::Own;
        let has_table = looks_up || is_last && self.head == Scores::Tied;
        let tables = u128::from(has_table) + u128::from(has_own_head);
        let table = self.table();
        let around =
            Numbers { split: tables * table.split, whole: if is_last { self.rest as u128 } else { 0 } };
        let shared: Numbers = blocks.iter().map(|block| self.shared(block)).sum();
        let shared = (shared + around).on(tensor);
        let of_experts: u128 =
            blocks.iter().map(|block| self.expert(block).on(tensor) * (experts(block) / expert)).sum();
        let numbers = shared + of_experts;
        let states = if bytes == 4 { 8 } else { 12 };

        // activations
        let d_model = self.d_model as u128;
        let is_own = bytes == 4;
        let [queries, keys] = self.widths();
        let composed = 4 * queries + self.n_heads as u128 * (3 * sequence + 2);
        let open = if is_own { 2 * (queries + keys) } else { composed };
        let norm = d_model * if is_own { 2 } else { 3 };
        let kept = |block: &Block| {
            let between = block.between(is_own) * block.d_ff as u128 / tensor;
            let mlp = match block.experts {
                Some(Experts { count, top_k, .. }) => {
                    count as u128 + top_k as u128 * (block.projections as u128 * d_model + between)
                }
                None => between,
            };
            let [all, biased] = [block.attentions, block.biased].map(|count| count as u128);
            all * norm + (biased * composed + (all - biased) * open) / tensor + norm + mlp
        };
        let ends = (first + 1..=first + count)
            .filter(|at| self.rest > 0 && self.blocks.get(*at).is_none_or(|next| next.is_first));
        let scores = match self.head {
            Scores::Own | Scores::Tied if is_last => (self.vocab_size as u128).div_ceil(tensor),
            _ => 0,
        };
        let kept: u128 = blocks.iter().map(kept).sum::<u128>() + ends.count() as u128 * norm + scores;

        // what is sent
        let stream = tokens * d_model * bytes;
        let choices = |block: &Block| block.experts.map_or(0, |experts| experts.top_k as u128);
        let to_experts: u128 =
            blocks.iter().map(|block| 2 * stream * choices(block) * (expert - 1) / expert).sum();
        let sums = |block: &Block| {
            let mlp = if block.experts.is_some() { choices(block) } else { 1 };
            2 * (block.attentions as u128 + mlp)
        };
        let lookups = match self.vocab_size {
            0 => 0,
            _ => blocks.iter().filter(|block| block.is_first).count() as u128,
        };
        let at_the_ends = lookups + u128::from(is_last && self.head != Scores::Absent);
        let sums: u128 = blocks.iter().map(sums).sum::<u128>() + at_the_ends;
        // into a block: its tokens, unless it looks them up, and in a decoder what the encoder has read
        let streams = |at: usize| {
            self.blocks.get(at).map_or(0, |block| block.attentions as u128 - u128::from(block.is_first))
        };
        Device {
            stage: stage + 1,
            blocks: count,
            numbers,
            weights: numbers * bytes,
            gradients: numbers * bytes,
            optimizer: numbers * states,
            activations: tokens * kept * bytes,
            operations: self.operations(layout, first, count) / (replicas * tensor),
            sent: Sent {
                to_experts,
                to_experts_backward: to_experts,
                shared_gradients: ring(shared * bytes, replicas),
                expert_gradients: ring(of_experts * bytes, data),
                tensor: sums * ring(stream, tensor),
                pipeline: (streams(first + count) + streams(first)) * stream,
            },
        }
    }
}

impl Block {
    /// How many values of the width between projections are kept for a token, by bodies of ours or by Burn's operations.
    fn between(&self, is_own: bool) -> u128 {
        let is_gated = self.projections == 3;
        if is_own {
            return if is_gated { 3 } else { 2 };
        }
        let of_activation = match self.activation {
            Activation::Relu | Activation::Gelu | Activation::Tanh => 1,
            Activation::Silu => 2,
            Activation::GeluTanh | Activation::QuickGelu => 3,
        };
        of_activation + if is_gated { 3 } else { 1 }
    }
}

/// How many experts a block has.
fn experts(block: &Block) -> u128 {
    block.experts.map_or(0, |experts| experts.count as u128)
}

impl Plan {
    /// The device that needs most memory.
    pub fn fullest(&self) -> Option<&Device> {
        self.stages.iter().max_by_key(|device| device.memory())
    }

    /// As lines of text.
    pub fn table(&self) -> String {
        let Layout { data, tensor, expert, pipeline, batch, sequence, .. } = self.layout;
        let mut lines = vec![
            format!(
                "devices      {}: data {data} x expert {expert} x tensor {tensor} x pipeline {pipeline}",
                self.devices
            ),
            format!(
                "parameters   {}, {} of them in experts; a token meets {}",
                numbers(self.parameters),
                numbers(self.expert_parameters),
                numbers(self.active_parameters),
            ),
            format!(
                "a step       {batch} sequences of {sequence}, {} tokens, {}",
                self.tokens,
                operations(self.operations)
            ),
        ];
        let Some(device) = self.fullest() else { return lines.join("\n") };
        lines.push(String::new());
        lines.push(match self.stages.len() {
            1 => "each device".into(),
            stages => format!(
                "a device of stage {} of {stages}, the fullest: {} blocks",
                device.stage, device.blocks
            ),
        });
        let Sent { to_experts, to_experts_backward, shared_gradients, expert_gradients, tensor, pipeline } =
            device.sent;
        let rows = [
            ("weights", bytes(device.weights)),
            ("gradients", bytes(device.gradients)),
            ("states of the optimizer", bytes(device.optimizer)),
            ("activations", bytes(device.activations)),
            ("memory in all", bytes(device.memory())),
            ("", String::new()),
            ("operations of a step", operations(device.operations)),
            ("", String::new()),
            ("sent to experts and back", bytes(to_experts)),
            ("their gradients, backward", bytes(to_experts_backward)),
            ("gradients of all but experts", bytes(shared_gradients)),
            ("gradients of experts", bytes(expert_gradients)),
            ("sums of tensor parallelism", bytes(tensor)),
            ("to other stages", bytes(pipeline)),
            ("sent in all", bytes(device.sent.all())),
        ];
        lines.extend(rows.into_iter().map(|(what, value)| match what {
            "" => String::new(),
            what => format!("  {what:<30} {value:>14}"),
        }));
        lines.join("\n")
    }
}

fn numbers(numbers: u128) -> String {
    short(numbers, 1000, ["", " K", " M", " B", " T", " P"])
}

fn bytes(bytes: u128) -> String {
    short(bytes, 1024, [" B", " KiB", " MiB", " GiB", " TiB", " PiB"])
}

fn operations(operations: u128) -> String {
    short(operations, 1000, [" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"])
}

/// With the largest unit that leaves at least one of it.
fn short(number: u128, step: u128, units: [&str; 6]) -> String {
    let mut unit = 0;
    let mut size = 1;
    while unit + 1 < units.len() && number / size >= step {
        size *= step;
        unit += 1;
    }
    match unit {
        0 => format!("{number}{}", units[0]),
        _ => format!("{:.2}{}", number as f64 / size as f64, units[unit]),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::module::Param;
    use burn::tensor::{Device as Where, Int, Tensor, TensorData};
    use volary_kernels::moe::gate::NaiveGate;
    use volary_kernels::moe::{Choices, Gate, MoeConfig, Noise, Phase, Placement};
    use volary_kernels::random::seeded;
    use volary_weights::parameters;

    use super::*;
    use crate::preset::{Preset, count};
    use crate::registry::{SYSTEMS, preset};

    const ONE: Layout =
        Layout { data: 1, tensor: 1, expert: 1, pipeline: 1, batch: 1, sequence: 1, bytes: 4 };

    fn outline(name: &str) -> Outline {
        Outline::of(&preset(name).unwrap().1.shape).unwrap()
    }

    /// A decoder of two blocks with four experts each, of which a token goes to two.
    fn tiny() -> MixtralConfig {
        let Shape::Mixtral(mixtral) = &preset("mistralai/Mixtral-8x7B-v0.1").unwrap().1.shape else {
            panic!("a Mixtral")
        };
        let llama = LlamaConfig {
            vocab_size: 11,
            d_model: 8,
            d_ff: 6,
            n_layers: 2,
            n_heads: 4,
            n_kv_heads: 2,
            d_head: 4,
            ..mixtral.llama.clone()
        };
        MixtralConfig { llama, n_experts: 4, top_k: 2 }
    }

    fn problems(outline: &Outline, layout: Layout) -> Vec<String> {
        match outline.plan(&layout) {
            Err(PlanError::Layout { problems }) => problems,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parameters_are_those_that_modules_count() {
        let mut planned = 0;
        let all = SYSTEMS.iter().flat_map(|system| system.presets);
        for Preset { name, shape, .. } in all {
            let Some(outline) = Outline::of(shape) else { continue };
            assert_eq!(outline.parameters()[0], shape.count() as u128, "{name}");
            planned += 1;
        }
        assert!(planned > 50, "{planned}");
        for name in ["llama", "mixtral", "switch_transformers", "t5"] {
            let folder =
                Folder::Disk(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name));
            let counted = (System::of(&folder).unwrap().describe)(&folder).unwrap().parameters;
            let outline = Outline::of_folder(&folder).unwrap();
            assert_eq!(outline.parameters()[0], count(&counted) as u128, "{name}");
        }
    }

    /// Every number is on one device of a group, but norms and routers of tensor-parallel ones and tables at both ends.
    #[test]
    fn devices_of_a_group_have_the_whole_model() {
        let outline = outline("mistralai/Mixtral-8x7B-v0.1");
        let [all, of_experts] = outline.parameters();
        let held = |layout: Layout| -> u128 {
            outline.plan(&layout).unwrap().stages.iter().map(|device| device.numbers).sum()
        };
        assert_eq!(held(ONE), all);
        assert_eq!(held(Layout { pipeline: 5, ..ONE }), all);
        assert_eq!(held(Layout { expert: 4, batch: 4, pipeline: 32, ..ONE }), all - of_experts / 4 * 3);
        // 65 norms of 4096, and 32 routers of 8 x 4096
        let whole = 65 * 4096 + 32 * 8 * 4096;
        assert_eq!(held(Layout { tensor: 8, ..ONE }), (all - whole) / 8 + whole);
        let tied = self::outline("meta-llama/Llama-3.2-1B");
        let stages = tied.plan(&Layout { pipeline: 2, ..ONE }).unwrap().stages;
        let both: u128 = stages.iter().map(|device| device.numbers).sum();
        assert_eq!(both, tied.parameters()[0] + 128_256 * 2048);
    }

    /// Two encoder blocks and one decoder block of width 4, two heads of 2, plain MLPs of 6, a table of 10 for everything.
    /// Two stages: the encoder, the decoder. Four sequences of 3 on two replicas: 6 tokens each.
    #[test]
    fn a_plan_by_hand() {
        let block = |side: usize, at: usize| Block {
            attentions: 1 + side,
            biased: 1,
            norms: 4 * (2 + side),
            d_ff: 6,
            projections: 2,
            activation: Activation::Relu,
            experts: None,
            is_first: at == 0,
        };
        let outline = Outline {
            d_model: 4,
            n_heads: 2,
            n_kv_heads: 2,
            d_head: 2,
            attention_bias: false,
            mlp_bias: false,
            vocab_size: 10,
            head: Scores::Tied,
            blocks: vec![block(0, 0), block(0, 1), block(1, 0)],
            rest: 5,
        };
        let layout = Layout { data: 2, tensor: 2, pipeline: 2, batch: 4, sequence: 3, bytes: 2, ..ONE };
        let plan = outline.plan(&layout).unwrap();
        // 64 of an attention and 48 of an MLP for each
        assert_eq!((plan.devices, plan.parameters), (8, 3 * (64 + 48) + 64 + 7 * 4 + 40 + 5));
        assert_eq!((plan.tokens, plan.active_parameters, plan.expert_parameters), (24, plan.parameters, 0));
        // 24 of 4 x 3 weights of attention: 2 x 3 x 4 products for each token
        let products = [2 * (64 + 24 + 48), 2 * (64 + 24) + 48 + 40];
        assert_eq!(plan.operations, 6 * 12 * (products[0] + products[1]));
        let encoder = Device {
            stage: 1,
            blocks: 2,
            numbers: 112 + 20 + 16,
            weights: 2 * 148,
            gradients: 2 * 148,
            optimizer: 12 * 148,
            // two blocks of two norms, queries, keys, values, what they give, scores of two heads over three, an MLP; a norm
            activations: 2 * 6 * (2 * (12 + (16 + 22) / 2 + 12 + 12 / 2) + 12),
            operations: 6 * 12 * products[0] / 4,
            sent: Sent {
                shared_gradients: 2 * 148,
                // 48 bytes of a stream: of two blocks forward and backward, two parts each, and of the table
                tensor: 48 * 9,
                // what was read, to the decoder
                pipeline: 48,
                ..Sent::default()
            },
        };
        let decoder = Device {
            stage: 2,
            blocks: 1,
            numbers: 64 + 24 + 20 + 12 + 5,
            weights: 2 * 125,
            gradients: 2 * 125,
            optimizer: 12 * 125,
            activations: 2 * 6 * (2 * (12 + 19) + 12 + 6 + 12 + 5),
            operations: 6 * 12 * products[1] / 4,
            sent: Sent { shared_gradients: 2 * 125, tensor: 48 * 8, pipeline: 48, ..Sent::default() },
        };
        assert_eq!(plan.stages, [encoder, decoder]);

        // in f32: norms of two, scores of the first attention only, an MLP of two
        let plan = outline.plan(&Layout { bytes: 4, ..layout }).unwrap();
        let activations = [2 * (8 + 19 + 8 + 6) + 8, (8 + 19) + (8 + (8 + 8) / 2) + (8 + 6) + 8 + 5];
        let found: Vec<u128> = plan.stages.iter().map(|stage| stage.activations).collect();
        assert_eq!(found, activations.map(|kept| 4 * 6 * kept));
    }

    /// Products are counted in every matrix that a tiny decoder has, over the rows that come to it.
    #[test]
    fn operations_are_those_of_rows_times_weights() {
        const BATCH: usize = 3;
        const SEQUENCE: usize = 5;
        let (config, device) = (tiny(), Where::flex());
        let model = seeded(1, &device, |device| config.init(device));
        let ids: Vec<i64> = (0..(BATCH * SEQUENCE) as i64).map(|at| at * 7 % 11).collect();
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [BATCH, SEQUENCE]), &device);
        let routers = model.forward(ids).router_logits;

        let mut products = 0;
        for parameter in parameters(&model.around).iter().filter(|parameter| parameter.path == "head.weight")
        {
            products += BATCH * SEQUENCE * parameter.shape.iter().product::<usize>();
        }
        for (block, logits) in model.blocks.iter().zip(routers) {
            let dispatch = block.gate.choose(logits).experts.dispatch();
            for parameter in parameters(block) {
                products += match parameter.shape[..] {
                    [experts, d_in, d_out] => {
                        (0..experts).map(|expert| dispatch.segment(expert).len() * d_in * d_out).sum()
                    }
                    [d_out, d_in] => BATCH * SEQUENCE * d_out * d_in,
                    _ => 0, // norms
                };
            }
            let heads = block.attention.queries(Tensor::zeros([BATCH, SEQUENCE, 8], &device)).dims();
            // each query with each key, each weight with each value
            products += 2 * heads.iter().product::<usize>() * SEQUENCE;
        }
        let outline = Outline::of(&Shape::Mixtral(config)).unwrap();
        let layout = Layout { batch: BATCH as u64, sequence: SEQUENCE as u64, ..ONE };
        assert_eq!(outline.plan(&layout).unwrap().operations, 6 * products as u128);
    }

    /// Ranks send what their dispatches say, and get as much back: where loads are even that is the plan, otherwise what
    /// [`Placement`] counts.
    #[test]
    fn bytes_are_those_of_rows_that_are_dispatched() {
        const EXPERTS: usize = 8;
        const TOKENS: usize = 32;
        let device = Where::flex();
        // token t likes expert t most, and the next one
        let likes = |token: usize, expert: usize| match (expert + EXPERTS - token % EXPERTS) % EXPERTS {
            0 => 2.0,
            1 => 1.0,
            _ => 0.0,
        };
        let even: Vec<f32> = (0..TOKENS * EXPERTS).map(|at| likes(at / EXPERTS, at % EXPERTS)).collect();
        let uneven: Vec<f32> =
            (0..TOKENS * EXPERTS).map(|at| (at * at % 17) as f32 + at as f32 * 0.01).collect();
        let identity: Vec<f32> =
            (0..EXPERTS * EXPERTS).map(|at| f32::from(at % EXPERTS == at / EXPERTS)).collect();
        let table = |values: Vec<f32>, rows| {
            Tensor::<2>::from_data(TensorData::new(values, [rows, EXPERTS]), &device)
        };
        let mut gate = NaiveGate::new(EXPERTS, EXPERTS, 2, &device);
        gate.gate.weight = Param::from_tensor(table(identity, EXPERTS));
        gate.gate.bias = None;
        let layer = MoeConfig::new(EXPERTS, EXPERTS, 4).init(Gate::Naive(gate), Activation::Gelu, &device);

        let experts = Experts { count: EXPERTS, top_k: 2, router_bias: false, norm: 0 };
        let block = Block {
            attentions: 1,
            biased: 0,
            norms: 0,
            d_ff: 4,
            projections: 2,
            activation: Activation::Gelu,
            experts: Some(experts),
            is_first: true,
        };
        let outline = Outline {
            d_model: EXPERTS,
            n_heads: 1,
            n_kv_heads: 1,
            d_head: 1,
            attention_bias: false,
            mlp_bias: false,
            vocab_size: 0,
            head: Scores::Absent,
            blocks: vec![block],
            rest: 0,
        };
        for (is_even, x) in [(true, even), (false, uneven)] {
            for ranks in [1, 2, 4] {
                let each = TOKENS / ranks;
                let (mut sent, mut ids) = (Vec::new(), Vec::new());
                for rank in 0..ranks {
                    let x = table(x.clone(), TOKENS).narrow(0, rank * each, each);
                    let (_, routing) = layer.forward(x, Phase::Eval, &mut Noise::Seeded(1));
                    let dispatch = routing.experts.dispatch();
                    let home = |expert: usize| expert / (EXPERTS / ranks);
                    let leaving = (0..EXPERTS).filter(|&expert| home(expert) != rank);
                    sent.push(leaving.map(|expert| dispatch.segment(expert).len()).sum::<usize>());
                    ids.extend(routing.experts.ids);
                }
                let placement = Placement::new(ranks, EXPERTS);
                let loads = placement.loads(&Choices { ids, top_k: 2, n_experts: EXPERTS });
                assert_eq!(placement.exchange(&loads).rows, sent.iter().sum::<usize>());
                let layout =
                    Layout { expert: ranks as u64, batch: ranks as u64, sequence: each as u64, ..ONE };
                let planned = outline.plan(&layout).unwrap().stages[0].sent.to_experts;
                let bytes = sent.iter().map(|rows| (2 * rows * EXPERTS * 4) as u128);
                assert_eq!(is_even || ranks == 1, bytes.clone().all(|bytes| bytes == planned), "{sent:?}");
            }
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_told_at_once() {
        let mixtral = outline("mistralai/Mixtral-8x7B-v0.1");
        let found = problems(
            &mixtral,
            Layout { data: 0, tensor: 3, expert: 5, pipeline: 33, batch: 7, sequence: u64::MAX, bytes: 2 },
        );
        for told in [
            "--data 0: from 1 to 4294967295",
            "--sequence 18446744073709551615: from 1 to",
            "--tensor 3 does not divide the number of heads 32",
            "--tensor 3 does not divide the number of key-value heads 8",
            "--tensor 3 does not divide the width of an MLP 14336",
            "--expert 5 does not divide the number of experts 8",
            "--pipeline 33: the model has 32 blocks",
        ] {
            assert!(found.iter().any(|problem| problem.starts_with(told)), "{told}: {found:?}");
        }
        let largest = Layout { batch: u64::from(u32::MAX), sequence: u64::from(u32::MAX), ..ONE };
        assert_eq!(problems(&mixtral, largest), ["a step of more than 1e30 products"]);
        let dense = outline("LLaMA-7B");
        let found = problems(&dense, Layout { expert: 2, data: 3, batch: 8, ..ONE });
        assert_eq!(
            found,
            [
                "--expert 2: the model has no experts",
                "--batch 8 does not divide into 6 replicas (--data 3 times --expert 2)"
            ]
        );
        assert!(Outline::of(&preset("openai/clip-vit-base-patch32").unwrap().1.shape).is_none());
    }

    #[test]
    fn sizes_are_short() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1536 * 1024), "1.50 MiB");
        assert_eq!(operations(2_500_000_000_000_000_000), "2500.00 PFLOP");
    }
}
