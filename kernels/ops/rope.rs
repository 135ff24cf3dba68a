//! Rotary position embedding.
//!
//! Pair `i` of a head's channels is a point in the plane; at position `m` it turns by the angle `m θᵢ`:
//!
//! ```text
//! θᵢ = theta^(-2i / d_rot),   i = 0 .. d_rot / 2
//! a' = a cos(m θᵢ) - b sin(m θᵢ)
//! b' = b cos(m θᵢ) + a sin(m θᵢ)
//! ```
//!
//! so that the product of a query at `m` and a key at `n` depends on `m - n` only (Su et al. 2021, "RoFormer",
//! equations 15 and 34).

use std::f64::consts::PI;

use burn::config::Config;
use burn::module::Module;
use burn::tensor::{DType, Device, Int, Tensor, TensorData};

/// Which two channels of a head turn together.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// Channels `i` and `i + d_rot / 2`: `rotate_half` of Hugging Face's LLaMA and GPT-NeoX.
    Half,
    /// Channels `2i` and `2i + 1`: the paper, GPT-J, Meta's LLaMA, EVA-02.
    Interleaved,
}

/// Configuration of a [`Rope`] along a sequence.
#[derive(Config, Debug)]
pub struct RopeConfig {
    /// How many channels of a head turn, from the first on; even. The rest of the head stays.
    pub d_rot: usize,
    /// Length of the table: the longest sequence it serves.
    pub positions: usize,
    /// Base of the frequencies.
    #[config(default = 10000.0)]
    pub theta: f64,
    /// Which channels turn together.
    #[config(default = "Pairing::Half")]
    pub pairing: Pairing,
    /// How the frequencies are slowed for longer sequences.
    #[config(default = "RopeScaling::Unscaled")]
    pub scaling: RopeScaling,
}

/// How frequencies are slowed so that a model serves longer sequences than it was pretrained on.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    Unscaled,
    /// Every frequency over this factor (Chen et al. 2023, "position interpolation").
    Linear(f64),
    /// By wavelength.
    Llama3(Llama3Scaling),
}

/// Llama 3.1's scaling (`_compute_llama3_parameters` of `transformers`): with the wavelength `λ = 2π / θᵢ` and
/// `turns = pretrained / λ`, how often a pair turns within the pretrained length,
///
/// ```text
/// smooth = clamp((turns - low) / (high - low), 0, 1)
/// θᵢ' = θᵢ (smooth + (1 - smooth) / factor)
/// ```
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Llama3Scaling {
    /// What the frequencies of slow pairs are divided by.
    pub factor: f64,
    /// Pairs that turn less often than this are slow.
    pub low: f64,
    /// Pairs that turn more often than this stay as they are.
    pub high: f64,
    /// Longest sequence of the pretraining.
    pub pretrained: f64,
}

/// Configuration of a [`Rope`] over a picture's patches, row by row, as EVA-02 turns them (Fang et al. 2023;
/// `VisionRotaryEmbeddingFast` in `baaivision/EVA`).
///
/// The first half of the rotary channels turns by the patch's row, the second by its column, each with the
/// frequencies of `d_rot / 2` channels and in adjacent pairs.
#[derive(Config, Debug)]
pub struct GridRopeConfig {
    /// How many channels of a head turn, from the first on; a multiple of 4.
    pub d_rot: usize,
    /// Patches from top to bottom.
    pub rows: usize,
    /// Patches from left to right.
    pub cols: usize,
    /// Tokens before the patches, which stay as they are.
    #[config(default = 0)]
    pub class_tokens: usize,
    /// Side of the grid the weights were pretrained on: the patches are spread evenly over it. `None` is this
    /// grid itself.
    pub pretrained_side: Option<usize>,
    /// Base of the frequencies.
    #[config(default = 10000.0)]
    pub theta: f64,
}

/// Where in the table the tokens of a sequence stand.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one is made per forward pass, and never stored in numbers")]
pub enum Positions {
    /// Every row of the batch stands at this position and those that follow.
    From(usize),
    /// A position per token, `[batch or 1, seq]`.
    Each(Tensor<2, Int>),
}

/// Cosine and sine of every angle, computed once in f64 and kept in f32.
#[derive(Module, Debug)]
pub struct Rope {
    /// `[positions, d_rot / 2]`.
    pub cos: Tensor<2>,
    /// `[positions, d_rot / 2]`.
    pub sin: Tensor<2>,
    #[module(skip)]
    pairing: Pairing,
}

impl RopeConfig {
    /// Computes the table.
    ///
    /// # Panics
    /// If `d_rot` is zero or odd.
    pub fn init(&self, device: &Device) -> Rope {
        assert!(
            self.d_rot > 0 && self.d_rot.is_multiple_of(2),
            "{} rotary channels do not make pairs",
            self.d_rot
        );
        let frequencies: Vec<f64> = frequencies(self.d_rot, self.theta)
            .into_iter()
            .map(|frequency| self.scaling.apply(frequency))
            .collect();
        let angles = (0..self.positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .collect();
        Rope::new(angles, [self.positions, self.d_rot / 2], self.pairing, device)
    }
}

impl RopeScaling {
    /// The frequency, in radians per position, that takes the place of `frequency`.
    pub fn apply(self, frequency: f64) -> f64 {
        match self {
            Self::Unscaled => frequency,
            Self::Linear(factor) => frequency / factor,
            Self::Llama3(Llama3Scaling { factor, low, high, pretrained }) => {
                let turns = pretrained * frequency / (2.0 * PI);
                let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                frequency * (smooth + (1.0 - smooth) / factor)
            }
        }
    }
}

impl GridRopeConfig {
    /// Computes the table: the class tokens, then the patches row by row.
    ///
    /// # Panics
    /// If `d_rot` is zero or no multiple of 4.
    pub fn init(&self, device: &Device) -> Rope {
        assert!(
            self.d_rot > 0 && self.d_rot.is_multiple_of(4),
            "{} rotary channels do not make pairs for rows and for columns",
            self.d_rot
        );
        let frequencies = frequencies(self.d_rot / 2, self.theta);
        let place = |index: usize, side: usize| match self.pretrained_side {
            Some(pretrained) => index as f64 / side as f64 * pretrained as f64,
            None => index as f64,
        };
        let mut angles = vec![0.0; self.class_tokens * self.d_rot / 2];
        for row in 0..self.rows {
            for col in 0..self.cols {
                angles.extend(frequencies.iter().map(|frequency| place(row, self.rows) * frequency));
                angles.extend(frequencies.iter().map(|frequency| place(col, self.cols) * frequency));
            }
        }
        let positions = self.class_tokens + self.rows * self.cols;
        Rope::new(angles, [positions, self.d_rot / 2], Pairing::Interleaved, device)
    }
}

/// `theta^(-2i / d_rot)` for every pair `i`.
fn frequencies(d_rot: usize, theta: f64) -> Vec<f64> {
    (0..d_rot / 2).map(|pair| theta.powf(-2.0 * pair as f64 / d_rot as f64)).collect()
}

impl Rope {
    fn new(angles: Vec<f64>, shape: [usize; 2], pairing: Pairing, device: &Device) -> Self {
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| of(angle) as f32).collect();
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), pairing }
    }

    /// Turns queries or keys, `[batch, heads, seq, d_head]`, by their positions; the shape stays.
    ///
    /// Computed in f32 whatever the dtype of `x`, which the result has again.
    ///
    /// # Panics
    /// If the heads are narrower than `d_rot`, `positions` does not fit the sequence, or a position is beyond
    /// the table.
    pub fn apply(&self, x: Tensor<4>, positions: &Positions) -> Tensor<4> {
        let [batch, heads, seq, d_head] = x.dims();
        let [_, pairs] = self.cos.dims();
        let d_rot = 2 * pairs;
        assert!(d_rot <= d_head, "{d_rot} channels turn, but a head has {d_head}");
        let cos = at(&self.cos, positions, batch, seq); // [batch or 1, 1, seq, pairs]
        let sin = at(&self.sin, positions, batch, seq);
        let dtype = x.dtype();
        let rest = (d_rot < d_head).then(|| x.clone().narrow(3, d_rot, d_head - d_rot));
        let x = x.narrow(3, 0, d_rot).cast(DType::F32);
        let turn = |a: Tensor<4>, b: Tensor<4>| {
            let turned = a.clone() * cos.clone() - b.clone() * sin.clone();
            (turned, b * cos + a * sin)
        };
        let turned = match self.pairing {
            Pairing::Half => {
                let (a, b) = turn(x.clone().narrow(3, 0, pairs), x.narrow(3, pairs, pairs));
                Tensor::cat(vec![a, b], 3)
            }
            Pairing::Interleaved => {
                let x = x.reshape([batch, heads, seq, pairs, 2]);
                let (a, b) = turn(x.clone().narrow(4, 0, 1).squeeze_dim(4), x.narrow(4, 1, 1).squeeze_dim(4));
                Tensor::stack::<5>(vec![a, b], 4).reshape([batch, heads, seq, d_rot])
            }
        };
        let turned = turned.cast(dtype);
        match rest {
            Some(rest) => Tensor::cat(vec![turned, rest], 3),
            None => turned,
        }
    }
}

/// The rows of a table that `positions` name, `[batch or 1, 1, seq, pairs]`.
fn at(table: &Tensor<2>, positions: &Positions, batch: usize, seq: usize) -> Tensor<4> {
    let [held, pairs] = table.dims();
    match positions {
        Positions::From(first) => {
            assert!(
                first + seq <= held,
                "positions {first}..{} are beyond a rotary table of {held}",
                first + seq
            );
            table.clone().narrow(0, *first, seq).reshape([1, 1, seq, pairs])
        }
        Positions::Each(each) => {
            let [rows, columns] = each.dims();
            assert!(
                (rows == batch || rows == 1) && columns == seq,
                "positions are [{rows}, {columns}], the sequence is [{batch}, {seq}]"
            );
            table.clone().select(0, each.clone().reshape([rows * seq])).reshape([rows, 1, seq, pairs])
        }
    }
}

#[cfg(test)]
mod tests;
