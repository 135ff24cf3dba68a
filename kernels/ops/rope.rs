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

#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::is_host;
use crate::cpu::rope::Turns;
#[cfg(feature = "cube")]
use crate::cube::{self, is_cube_with};

/// Which two channels of a head turn together.
#[derive(Config, Debug, Copy, PartialEq, Eq, Hash)]
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
    /// By a larger base, where a text is longer than those of the pretraining.
    Dynamic(DynamicScaling),
    /// By wavelength, and the attention sharper.
    Yarn(YarnScaling),
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

/// Scaling that grows with the text (`_compute_dynamic_ntk_parameters` of `transformers`): for `n` positions, more than
/// `pretrained`, `theta` becomes
///
/// ```text
/// theta (factor n / pretrained - (factor - 1))^(d_rot / (d_rot - 2))
/// ```
///
/// A table has one base for all its positions: a text that is yet to grow is read with that of its full length.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct DynamicScaling {
    /// How fast the base grows.
    pub factor: f64,
    /// Longest sequence of the pretraining.
    pub pretrained: f64,
}

/// YaRN's scaling (Peng et al. 2023, <https://arxiv.org/abs/2309.00071>; `_compute_yarn_parameters` of `transformers`).
/// Pair `c(turns)` turns so often within the pretrained length,
///
/// ```text
/// c(turns) = d_rot ln(pretrained / (2π turns)) / (2 ln theta)
/// slow = clamp((i - c(fast)) / (c(slow) - c(fast)), 0, 1)
/// θᵢ' = θᵢ (1 - slow + slow / factor)
/// ```
///
/// with both ends rounded outwards to whole pairs, and kept within the channels.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct YarnScaling {
    /// What the frequencies of slow pairs are divided by.
    pub factor: f64,
    /// Pairs that turn more often than this stay as they are.
    pub fast: f64,
    /// Pairs that turn less often than this are slow.
    pub slow: f64,
    /// Longest sequence of the pretraining.
    pub pretrained: f64,
    /// What queries and keys are multiplied by.
    pub magnitude: f64,
    /// Whether the ends are rounded.
    pub whole_pairs: bool,
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

/// Cosine and sine of every angle, times the scaling's magnitude, computed once in f64 and kept in f32.
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
        let frequencies = self.scaling.frequencies(self.d_rot, self.theta, self.positions);
        let angles = (0..self.positions)
            .flat_map(|position| frequencies.iter().map(move |frequency| position as f64 * frequency))
            .collect();
        Rope::new(angles, [self.positions, self.d_rot / 2], self.pairing, self.scaling.magnitude(), device)
    }
}

impl RopeScaling {
    /// The frequency of every pair, in radians per position, for texts of so many positions.
    pub fn frequencies(self, d_rot: usize, theta: f64, positions: usize) -> Vec<f64> {
        let plain = frequencies(d_rot, theta).into_iter();
        match self {
            Self::Unscaled => plain.collect(),
            Self::Linear(factor) => plain.map(|frequency| frequency / factor).collect(),
            Self::Llama3(scaling) => plain.map(|frequency| scaling.apply(frequency)).collect(),
            Self::Dynamic(scaling) => frequencies(d_rot, scaling.theta(d_rot, theta, positions)),
            Self::Yarn(scaling) => {
                let slow = scaling.slow_share(d_rot, theta);
                let scaled = |slow: f64| 1.0 - slow + slow / scaling.factor;
                plain.enumerate().map(|(pair, frequency)| frequency * scaled(slow(pair))).collect()
            }
        }
    }

    /// What queries and keys are multiplied by.
    pub fn magnitude(self) -> f64 {
        match self {
            Self::Yarn(YarnScaling { magnitude, .. }) => magnitude,
            Self::Unscaled | Self::Linear(_) | Self::Llama3(_) | Self::Dynamic(_) => 1.0,
        }
    }
}

impl Llama3Scaling {
    fn apply(self, frequency: f64) -> f64 {
        let Self { factor, low, high, pretrained } = self;
        let turns = pretrained * frequency / (2.0 * PI);
        let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
        frequency * (smooth + (1.0 - smooth) / factor)
    }
}

impl DynamicScaling {
    /// The base for texts of so many positions. One pair alone turns by 1 whatever the base.
    fn theta(self, d_rot: usize, theta: f64, positions: usize) -> f64 {
        let Self { factor, pretrained } = self;
        let length = (positions as f64).max(pretrained);
        let growth = factor * length / pretrained - (factor - 1.0);
        if d_rot > 2 { theta * growth.powf(d_rot as f64 / (d_rot - 2) as f64) } else { theta }
    }
}

impl YarnScaling {
    /// How slow a pair is, from 0 to 1.
    fn slow_share(self, d_rot: usize, theta: f64) -> impl Fn(usize) -> f64 {
        let Self { fast, slow, pretrained, whole_pairs, .. } = self;
        let pair_of = |turns: f64| d_rot as f64 * (pretrained / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln());
        let (first, last) = (pair_of(fast), pair_of(slow));
        let (first, last) = if whole_pairs { (first.floor(), last.ceil()) } else { (first, last) };
        let (first, last) = (first.max(0.0), last.min(d_rot as f64 - 1.0));
        let width = if first == last { 0.001 } else { last - first };
        move |pair| ((pair as f64 - first) / width).clamp(0.0, 1.0)
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
        Rope::new(angles, [positions, self.d_rot / 2], Pairing::Interleaved, 1.0, device)
    }
}

/// `theta^(-2i / d_rot)` for every pair `i`.
fn frequencies(d_rot: usize, theta: f64) -> Vec<f64> {
    (0..d_rot / 2).map(|pair| theta.powf(-2.0 * pair as f64 / d_rot as f64)).collect()
}

impl Rope {
    fn new(angles: Vec<f64>, shape: [usize; 2], pairing: Pairing, magnitude: f64, device: &Device) -> Self {
        let table = |of: fn(f64) -> f64| {
            let values: Vec<f32> = angles.iter().map(|&angle| (magnitude * of(angle)) as f32).collect();
            Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
        };
        Self { cos: table(f64::cos), sin: table(f64::sin), pairing }
    }

    /// Turns queries or keys, `[batch, heads, seq, d_head]`, by their positions; the shape stays.
    ///
    /// Computed in f32 whatever the dtype of `x`, which the result has again: on the CPU in one pass, gradients in f32 included, on a
    /// GPU in one launch where no gradients are wanted.
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
        if is_host(&x) {
            return Turns { cos, sin, pairing: self.pairing }.forward(x);
        }
        #[cfg(feature = "autodiff")]
        if is_tracked(&x) {
            let [cos, sin] = [cos, sin].map(Tensor::inner);
            return gradient::turned(x, Turns { cos, sin, pairing: self.pairing });
        }
        #[cfg(feature = "cube")]
        if is_cube_with(&x, &[&cos, &sin]) {
            return cube::rope::turn(x, cos, sin, self.pairing);
        }
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
