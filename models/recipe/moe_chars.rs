//! A language model of characters whose MLPs are mixtures of experts, and its dense twin: the same decoder, with one MLP of
//! as many products for each token. Both learn from the same bytes in the same order, and are asked about the same ones.
//!
//! Texts are read as bytes of UTF-8; what is told is bits per character.

use std::fs;
use std::path::Path;

use burn::module::Module;
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use volary_kernels::layers::{Attention, Mlp, MlpConfig, RmsNorm};
use volary_kernels::moe::gate::{
    BaseGate, Capacity, DcGate, GShardGate, KTop1Gate, NaiveGate, NoisyGate, SwipeGate, SwitchGate,
};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase, Routing};
use volary_kernels::ops::{Activation, Mask, Pairing, Positions, RopeScaling};
use volary_kernels::random::seeded;

use super::load::{Load, LoadMonitor, sum};
use super::run::{
    Computed, State, Store, TrainError, check, file_error, gradients, learning_rate, mean_of_last, mix,
    progress,
};
use crate::causal::{Head, token_loss};
use crate::llama::{Llama, LlamaConfig, LlamaInput, Place, attend};

mod texts;

pub use texts::{Kind, Texts};

use texts::characters;

/// How a token's experts are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Router {
    /// The two best.
    Naive,
    /// The two best after learned noise.
    Noisy,
    /// Two of limited capacity, the second by chance.
    Gshard,
    /// The best, of limited capacity.
    Switch,
    /// Two, moved where there is room.
    Swipe,
    /// As gshard, by the capacity of all.
    Dc,
    /// One, an equal share for each expert.
    Base,
    /// The best of each of two groups.
    KTop1,
}

impl Router {
    /// How many experts a token goes to.
    pub const fn top_k(self) -> usize {
        match self {
            Router::Switch | Router::Base => 1,
            _ => 2,
        }
    }

    /// How many projections `[d_model, n_experts]` it has.
    const fn projections(self) -> usize {
        match self {
            Router::Noisy => 2,
            _ => 1,
        }
    }

    fn gate(self, d_model: usize, n_experts: usize, device: &Device) -> Gate {
        let top_k = self.top_k();
        match self {
            Router::Naive => Gate::Naive(NaiveGate::new(d_model, n_experts, top_k, device)),
            Router::Noisy => Gate::Noisy(NoisyGate::new(d_model, n_experts, top_k, device)),
            Router::Gshard => Gate::GShard(GShardGate::new(d_model, n_experts, device)),
            Router::Switch => Gate::Switch(SwitchGate::new(d_model, n_experts, device)),
            Router::Swipe => Gate::Swipe(SwipeGate::new(d_model, n_experts, top_k, device)),
            Router::Dc => Gate::Dc(DcGate::new(d_model, n_experts, device)),
            Router::Base => Gate::Base(BaseGate::new(d_model, n_experts, device)),
            Router::KTop1 => {
                Gate::KTop1(KTop1Gate::new(d_model, n_experts, top_k, Capacity::Factor(1.25), device))
            }
        }
    }
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Twin {
    /// One MLP for all tokens.
    Dense,
    /// A mixture of experts.
    Experts,
}

impl Twin {
    /// Both.
    pub const ALL: [Twin; 2] = [Twin::Dense, Twin::Experts];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Twin::Dense => "dense",
            Twin::Experts => "experts",
        }
    }
}

/// Shape of both.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shape {
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of attention heads.
    pub n_heads: usize,
    /// Width between the projections of all experts that a token goes to, together.
    pub d_ff: usize,
    /// Number of experts of a block.
    pub n_experts: usize,
    /// How they are chosen.
    pub router: Router,
}

/// Every byte.
const BYTES: usize = 256;
/// The largest number of experts.
const MOST: usize = 4096;
const ACTIVATION: Activation = Activation::Gelu;

impl Shape {
    /// Whether it can be built: what is wrong otherwise.
    pub fn problems(&self) -> Vec<String> {
        let Self { n_layers, d_model, n_heads, d_ff, n_experts, router } = *self;
        let top_k = router.top_k();
        let rules = [
            (n_layers.min(d_model).min(n_heads).min(d_ff) > 0, "every size is at least 1".to_owned()),
            (
                n_heads > 0 && d_model.is_multiple_of(2 * n_heads),
                format!("{n_heads} heads of an even width make {d_model}"),
            ),
            (d_ff.is_multiple_of(top_k), format!("{top_k} experts of a token divide the width {d_ff}")),
            (
                n_experts >= top_k.max(2) && n_experts.is_multiple_of(2),
                format!("an even number of experts, not {n_experts}"),
            ),
            (n_experts <= MOST, format!("at most {MOST} experts")),
        ];
        rules.into_iter().filter(|(holds, _)| !holds).map(|(_, rule)| rule).collect()
    }

    /// Width of one expert.
    pub const fn expert_width(&self) -> usize {
        self.d_ff / self.router.top_k()
    }

    /// Width of the dense twin's MLP: that of a token's experts, and as much more as has the products of the router.
    pub const fn dense_width(&self) -> usize {
        self.d_ff + self.router.projections() * self.n_experts / 2
    }

    /// Products of numbers for each token of a forward pass over so many: those of a projection, of keys with queries and of
    /// weights with values. The same for both twins.
    pub const fn products(&self, seq: usize) -> usize {
        let attention = self.d_model * (4 * self.d_model + 2 * seq);
        self.n_layers * (attention + 2 * self.d_model * self.dense_width()) + self.d_model * BYTES
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, twin: Twin, device: &Device) -> CharModel {
        let Self { d_model, n_experts, router, .. } = *self;
        let llama = LlamaConfig {
            vocab_size: BYTES,
            n_positions: 0,
            d_model,
            d_ff: 0,
            n_layers: 0,
            n_heads: self.n_heads,
            n_kv_heads: self.n_heads,
            d_head: d_model / self.n_heads,
            activation: ACTIVATION,
            attention_bias: false,
            mlp_bias: false,
            rms_norm_eps: 1e-5,
            rope_theta: 1e4,
            rope_scaling: RopeScaling::Unscaled,
            pairing: Pairing::Half,
            head: Head::Tied,
        };
        let norm = || RmsNorm::new(d_model, llama.rms_norm_eps, device);
        let mlp = || match twin {
            Twin::Dense => FeedForward::Dense(MlpConfig::new(d_model, self.dense_width()).init(device)),
            Twin::Experts => {
                let gate = router.gate(d_model, n_experts, device);
                let experts = MoeConfig::new(n_experts, d_model, self.expert_width());
                FeedForward::Sparse(experts.init(gate, ACTIVATION, device))
            }
        };
        let block =
            |_| CharBlock { norm1: norm(), attention: llama.attention(device), norm2: norm(), mlp: mlp() };
        CharModel { blocks: (0..self.n_layers).map(block).collect(), around: llama.init(device) }
    }
}

/// A causal decoder of bytes.
#[derive(Module, Debug)]
pub struct CharModel {
    /// Bytes, last norm, and the head, which is the table of bytes. It has no blocks of its own.
    pub around: Llama,
    /// The blocks.
    pub blocks: Vec<CharBlock>,
}

/// A pre-norm transformer block.
#[derive(Module, Debug)]
pub struct CharBlock {
    /// Before the attention.
    pub norm1: RmsNorm,
    /// Rotary self-attention.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: RmsNorm,
    /// The MLP, or the experts.
    pub mlp: FeedForward,
}

/// What a block does to each token.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for a block")]
pub enum FeedForward {
    /// One MLP.
    Dense(Mlp),
    /// Some of many.
    Sparse(Moe),
}

impl CharModel {
    /// Scores of the next byte, `[batch, seq, 256]`, and where each block with experts sent the tokens, row after row.
    ///
    /// # Panics
    /// If an id is no byte.
    pub fn forward(&self, ids: Tensor<2, Int>, phase: Phase, noise: &mut Noise) -> (Tensor<3>, Vec<Routing>) {
        let LlamaInput { ids, positions, .. } = ids.into();
        let rope = self.around.rope_of(&ids, &positions);
        let place = Place { rope: &rope, positions: &Positions::From(0), mask: &Mask::Causal };
        let mut x = self.around.tokens.forward(ids); // [batch, seq, d_model]
        let mut routings = Vec::new();
        for block in &self.blocks {
            let attended = attend(&block.attention, block.norm1.forward(x.clone()), place, None);
            let (sum, normed) = block.norm2.add(x, attended);
            let mixed = match &block.mlp {
                FeedForward::Dense(mlp) => mlp.forward(normed, ACTIVATION),
                FeedForward::Sparse(experts) => {
                    let (y, routing) = experts.forward(normed, phase, noise);
                    routings.push(routing);
                    y
                }
            };
            x = sum + mixed;
        }
        (self.around.logits(self.around.norm.forward(x)), routings)
    }

    /// The mean cross-entropy of each byte after the first of rows of equal length, in nats, `[1]`; and the routings.
    fn entropy(
        &self,
        rows: &[&[u8]],
        phase: Phase,
        noise: &mut Noise,
        device: &Device,
    ) -> (Tensor<1>, Vec<Routing>) {
        let (count, length) = (rows.len(), rows.first().map_or(0, |row| row.len()));
        let ids: Vec<i64> = rows.concat().into_iter().map(i64::from).collect();
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, [count, length]), device);
        let read = ids.clone().narrow(1, 0, length - 1);
        let (scores, routings) = self.forward(read, phase, noise);
        let loss = token_loss(scores, ids.narrow(1, 1, length - 1), None);
        (loss.expect("every byte is counted"), routings)
    }
}

/// The settings of a run; written beside its checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recipe {
    /// Shape of both models.
    pub shape: Shape,
    /// Optimizer steps in all. A run may go on with another number: the schedule is the new one from there on.
    pub steps: usize,
    /// Rows per step.
    pub batch: usize,
    /// Parts of a batch, each computed on a thread of its own. Capacities are those of a part.
    pub parts: usize,
    /// Bytes of a row that are predicted.
    pub seq: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Weight of the gates' losses, which keep loads even.
    pub balance: f64,
    /// Steps between checkpoints.
    pub checkpoint_every: usize,
    /// Of initial weights, rows and the gates' noise.
    pub seed: u64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            shape: Shape {
                n_layers: 2,
                d_model: 64,
                n_heads: 4,
                d_ff: 256,
                n_experts: 8,
                router: Router::Switch,
            },
            steps: 2000,
            batch: 16,
            parts: 2,
            seq: 96,
            learning_rate: 3e-3,
            balance: 0.01,
            checkpoint_every: 100,
            seed: 1,
        }
    }
}

impl Recipe {
    /// What cannot be trained, and why.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = self.shape.problems();
        let sizes = [("steps", self.steps), ("batch", self.batch), ("parts", self.parts), ("seq", self.seq)];
        problems.extend(
            sizes.iter().filter(|(_, size)| *size == 0).map(|(name, _)| format!("{name} is at least 1")),
        );
        if self.seq > LONGEST {
            problems.push(format!("seq is at most {LONGEST}"));
        }
        problems
    }

    fn is_same(&self, saved: Self) -> bool {
        Recipe { steps: self.steps, ..saved } == *self
    }
}

/// The longest row.
const LONGEST: usize = 2048;

/// A trained twin.
pub struct Outcome {
    /// Without autodiff.
    pub model: CharModel,
    /// The cross-entropy of each step in nats per byte, without the gates' losses.
    pub losses: Vec<f32>,
    /// What its experts got; nothing of the dense one.
    pub loads: LoadMonitor,
}

/// What one part of a batch tells besides its loss.
struct Seen {
    /// Nats per byte, times the part's share of the batch.
    entropy: f32,
    loads: Vec<Load>,
}

/// Trains one of the twins, or goes on where the folder has a checkpoint, up to step `until` of all. The curve of its loss and, of
/// experts, the picture of their load over time are drawn with every checkpoint.
///
/// # Errors
/// If files of the run cannot be read or written, or the loss diverges.
pub fn train(
    recipe: &Recipe,
    twin: Twin,
    texts: &Texts,
    folder: &Path,
    until: usize,
    device: &Device,
) -> Result<Outcome, TrainError> {
    /// Steps that the bar speaks of.
    const SHOWN: usize = 20;
    let device = &device.clone().autodiff();
    let optimizer = AdamWConfig::new().with_beta_2(0.98).with_weight_decay(0.01).init();
    let store = Store { folder, title: "nats per byte by step" };
    let model = seeded(recipe.seed, device, |device| recipe.shape.init(twin, device));
    let fresh = State { model, optimizer, losses: Vec::new() };
    let (mut state, saved) = store.resume(fresh, |saved| recipe.is_same(saved))?;
    let mut loads = match saved {
        Some(folder) => {
            let file = folder.join(LOADS);
            let csv = fs::read_to_string(&file).map_err(|error| file_error(&file, error))?;
            LoadMonitor::read(&csv).map_err(|error| file_error(&file, error))?
        }
        None => LoadMonitor::default(),
    };
    let bar = progress(recipe.steps);
    bar.set_position(state.losses.len() as u64);
    for step in state.losses.len()..until.min(recipe.steps) {
        let first = (step * recipe.batch) as u64;
        let numbers: Vec<u64> = (first..first + recipe.batch as u64).collect();
        let parts: Vec<&[u64]> = numbers.chunks(recipe.batch.div_ceil(recipe.parts)).collect();
        let (loss, seen, gradients) =
            gradients(parts.len(), &state.model, device, parts, |model, numbers| {
                let share = numbers.len() as f64 / recipe.batch as f64;
                let rows: Vec<&[u8]> =
                    numbers.iter().map(|&number| texts.row(recipe.seed, number, recipe.seq + 1)).collect();
                let mut noise = Noise::Seeded(mix([recipe.seed, numbers[0], 1]));
                let (entropy, routings) = model.entropy(&rows, Phase::Train, &mut noise, device);
                let seen = Seen {
                    entropy: entropy.clone().into_scalar::<f32>() * share as f32,
                    loads: routings.iter().map(Load::of).collect(),
                };
                let uneven = routings.into_iter().filter_map(|routing| routing.aux_loss);
                let loss = uneven.fold(entropy, |sum, loss| sum + loss * recipe.balance);
                Ok(Computed { loss: loss * share, seen })
            })?;
        check(step, loss)?;
        let rate = learning_rate(recipe.learning_rate, step, (recipe.steps / 20).max(1), recipe.steps);
        state.model = state.optimizer.step(rate, state.model, gradients);
        state.losses.push(seen.iter().map(|seen| seen.entropy).sum());
        if twin == Twin::Experts {
            loads.see(sum(seen.into_iter().map(|seen| seen.loads)));
        }
        let told = format!("{}: loss {:.3}", twin.name(), mean_of_last(&state.losses, SHOWN));
        bar.inc(1);
        bar.set_message(match twin {
            Twin::Dense => told,
            Twin::Experts => format!("{told}, {}", loads.told(SHOWN)),
        });
        let done = step + 1;
        if done % recipe.checkpoint_every.max(1) == 0 || done == until.min(recipe.steps) {
            store.save(&state, recipe, &[(LOADS, loads.csv().as_bytes())])?;
            if twin == Twin::Experts {
                let drawn = folder.join("load.svg");
                let picture = loads.svg("part of the choices that each expert gets, by step");
                fs::write(&drawn, picture).map_err(|error| file_error(&drawn, error))?;
            }
        }
    }
    bar.finish();
    Ok(Outcome { model: state.model.valid(), losses: state.losses, loads })
}

const LOADS: &str = "loads.csv";

/// How well a model predicts what was held out of one kind of text.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Score {
    /// Which, or nothing for all of them.
    pub kind: &'static str,
    /// How many characters were predicted.
    pub characters: usize,
    /// Bits for each of them.
    pub bits: f64,
    /// Of each block with experts, which part of the choices each of them got.
    pub shares: Vec<Vec<f64>>,
}

/// Scores a model on everything that was held out, kind by kind and, at the end, all together, in rows of `seq` bytes.
pub fn evaluate(model: &CharModel, texts: &Texts, seq: usize, device: &Device) -> Vec<Score> {
    const ROWS: usize = 16;
    let mut scores = Vec::new();
    let (mut all_bits, mut all_characters) = (0.0, 0);
    for kind in Kind::ALL {
        let (mut bits, mut count) = (0.0, 0);
        let mut parts = Vec::new();
        for (at, rows) in texts.held_out(kind, seq + 1).chunks(ROWS).enumerate() {
            let mut noise = Noise::Seeded(mix([kind as u64, at as u64]));
            let (nats, routings) = model.entropy(rows, Phase::Eval, &mut noise, device);
            bits += nats.into_scalar::<f64>() * (rows.len() * seq) as f64 / core::f64::consts::LN_2;
            count += rows.iter().map(|row| characters(&row[1..])).sum::<usize>();
            parts.push(routings.iter().map(Load::of).collect());
        }
        let shares = sum(parts).into_iter().map(|load| load.shares()).collect();
        scores.push(Score { kind: kind.name(), characters: count, bits: bits / count.max(1) as f64, shares });
        all_bits += bits;
        all_characters += count;
    }
    let bits = all_bits / all_characters.max(1) as f64;
    scores.push(Score { kind: "all", characters: all_characters, bits, shares: Vec::new() });
    scores
}

/// The scores of both twins as lines of text.
pub fn table(dense: &[Score], experts: &[Score]) -> String {
    let mut lines =
        format!("{:<8} {:>10}   bits per character: dense   experts   gain\n", "held out", "characters");
    for (dense, experts) in dense.iter().zip(experts) {
        lines += &format!(
            "{:<8} {:>10} {:>28.3} {:>9.3} {:>5.1} %\n",
            dense.kind,
            dense.characters,
            dense.bits,
            experts.bits,
            100.0 * (1.0 - experts.bits / dense.bits),
        );
    }
    lines
}

/// Which part of each kind of text each expert of the last block got, as lines of text in percent.
pub fn specialists(scores: &[Score]) -> String {
    let mut lines = format!("{:<8} percent of the choices of each expert, last block\n", "held out");
    for Score { kind, shares, .. } in scores {
        let Some(shares) = shares.last() else { continue };
        let shares: String = shares.iter().map(|share| format!("{:>5.0}", 100.0 * share)).collect();
        lines += &format!("{kind:<8}{shares}\n");
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(router: Router) -> Shape {
        Shape { n_layers: 2, d_model: 16, n_heads: 2, d_ff: 24, n_experts: 4, router }
    }

    const ROUTERS: [Router; 8] = [
        Router::Naive,
        Router::Noisy,
        Router::Gshard,
        Router::Switch,
        Router::Swipe,
        Router::Dc,
        Router::Base,
        Router::KTop1,
    ];

    /// Products of a token, counted in the weights that it meets: a matrix has one for each of its numbers.
    #[test]
    fn twins_have_the_products_that_are_told() {
        let device = Device::flex();
        let matrices = |module: &dyn Fn() -> Vec<volary_weights::Parameter>| -> usize {
            let weights = module();
            let matrices = weights.iter().filter(|parameter| parameter.shape.len() == 2);
            matrices.map(|parameter| parameter.shape.iter().product::<usize>()).sum()
        };
        for router in ROUTERS {
            let shape = shape(router);
            let dense = shape.init(Twin::Dense, &device);
            let scores = |seq: usize| shape.n_layers * 2 * seq * shape.d_model; // keys with queries, weights with values
            let expected = matrices(&|| volary_weights::parameters(&dense)) + scores(10);
            assert_eq!(shape.products(10), expected, "{router:?}");

            let FeedForward::Sparse(layer) = &shape.init(Twin::Experts, &device).blocks[0].mlp else {
                panic!("experts")
            };
            let gate = matrices(&|| volary_weights::parameters(&layer.gate));
            let of_experts = 2 * shape.d_model * shape.expert_width() * router.top_k();
            assert_eq!(gate + of_experts, 2 * shape.d_model * shape.dense_width(), "{router:?}");
        }
    }

    #[test]
    fn every_router_sends_every_token_and_the_past_ignores_the_future() {
        let device = Device::flex();
        for router in ROUTERS {
            let model = seeded(1, &device, |device| shape(router).init(Twin::Experts, device));
            let scores = |bytes: &[i64]| {
                let ids = Tensor::from_data(TensorData::new(bytes.to_vec(), [1, bytes.len()]), &device);
                let (scores, routings) = model.forward(
                    ids,
                    Phase::Eval,
                    &mut Noise::Given(Tensor::ones([bytes.len(), 1], &device)),
                );
                assert_eq!(routings.len(), 2);
                assert_eq!(
                    routings[0].load.iter().sum::<usize>() + routings[0].dropped,
                    router.top_k() * bytes.len()
                );
                scores.narrow(1, 0, 3).into_data()
            };
            let (one, other) = (scores(&[3, 4, 5, 6]), scores(&[3, 4, 5, 200]));
            one.assert_approx_eq::<f32>(&other, burn::tensor::Tolerance::default());
        }
    }

    /// A model that knows nothing needs 8 bits for each byte, 24 for a Chinese character.
    #[test]
    fn bits_are_those_of_characters() {
        let device = Device::flex();
        let mut model = shape(Router::Switch).init(Twin::Dense, &device);
        model.around.tokens.weight = model.around.tokens.weight.map(|weight| weight.zeros_like());
        let scores = evaluate(&model, &Texts::embedded(), 64, &device);
        let names: Vec<&str> = scores.iter().map(|score| score.kind).collect();
        assert_eq!(names, ["English", "Chinese", "names", "sums", "all"]);
        assert!((scores[0].bits - 8.0).abs() < 1e-4 && (scores[3].bits - 8.0).abs() < 1e-4, "{scores:?}");
        assert!((22.0..24.0).contains(&scores[1].bits), "some are line ends: {scores:?}");
        let characters: usize = scores[..4].iter().map(|score| score.characters).sum();
        assert_eq!(scores[4].characters, characters);
    }

    #[test]
    fn what_cannot_be_built_is_told_at_once() {
        let recipe = Recipe {
            shape: Shape {
                d_model: 10,
                n_heads: 4,
                d_ff: 7,
                n_experts: 1,
                router: Router::Naive,
                n_layers: 0,
            },
            steps: 0,
            seq: 5000,
            ..Recipe::default()
        };
        assert_eq!(recipe.problems().len(), 6, "{:?}", recipe.problems());
        assert_eq!(Recipe::default().problems(), [] as [String; 0]);
    }
}
