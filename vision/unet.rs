//! The U-Net of latent diffusion: residual blocks and transformers from fine to coarse and back, which sees the time and
//! a context, as of a text (Rombach et al. 2022, section 3.3, <https://arxiv.org/abs/2112.10752>). The numbers match
//! diffusers' `UNet2DConditionModel`.

use std::borrow::Cow;

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};
use volary_kernels::layers::{
    Attention, AttentionConfig, GatedMlp, GatedMlpConfig, GroupNorm, LayerNorm, Linear, LinearConfig,
};
use volary_kernels::ops::{Activation, Mask};

use crate::conv::Conv;
use crate::residual::{NormConfig, ResidualBlock, TimeShift, double, picture, tokens};

/// Of the norm before a stack of transformer blocks, whatever the rest has.
const TRANSFORMER_NORM_EPS: f64 = 1e-6;
/// Of the norms inside a transformer block.
const LAYER_NORM_EPS: f64 = 1e-5;
/// The slowest wave of the time has this many times the period of the fastest.
const PERIODS: f64 = 10_000.0;

/// Shape of a [`UNet`].
#[derive(Clone, Debug, PartialEq)]
pub struct UNetConfig {
    /// Of the sample; with a mask and a masked picture beside it, all of them.
    pub channels_in: usize,
    /// Of what it gives.
    pub channels_out: usize,
    /// From fine to coarse.
    pub stages: Cow<'static, [StageConfig]>,
    /// At the bottom.
    pub middle: Middle,
    /// Width of the context.
    pub d_context: usize,
    /// Norms and activation of everything but the transformers.
    pub norm: NormConfig,
    /// The time's waves.
    pub time: TimeConfig,
    /// How the time enters.
    pub time_shift: TimeShift,
    /// Side of the first convolution.
    pub kernel_in: usize,
    /// Side of the last one.
    pub kernel_out: usize,
    /// Whether samples from 0 to 1 are stretched to -1 to 1 first.
    pub stretch: bool,
}

/// Blocks of one resolution, on the way down and on the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageConfig {
    /// Number of channels.
    pub channels: usize,
    /// Residual blocks on the way down; on the way up one more.
    pub n_residuals: usize,
    /// What stands after each of them on the way down, if anything.
    pub down: Option<TransformerConfig>,
    /// And on the way up.
    pub up: Option<TransformerConfig>,
}

/// A stack of transformer blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TransformerConfig {
    /// Number of blocks.
    pub n_layers: usize,
    /// Number of attention heads.
    pub n_heads: usize,
}

/// What stands between the way down and the way up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Middle {
    /// A residual block, transformer blocks, a residual block.
    Transformer(TransformerConfig),
    /// A residual block.
    Residual,
    /// Nothing.
    Nothing,
}

/// How a time becomes numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TimeConfig {
    /// Width that the blocks see.
    pub d_time: usize,
    /// Whether the cosines stand before the sines.
    pub cosines_first: bool,
    /// Taken from the number of waves where their periods are spread.
    pub shift: f64,
}

/// A U-Net.
#[derive(Module, Debug)]
pub struct UNet {
    /// `[channels of the first stage, channels_in, kernel_in, kernel_in]`.
    pub conv_in: Conv,
    /// `[d_time, channels of the first stage]`, on the waves.
    pub time1: Linear,
    /// `[d_time, d_time]`.
    pub time2: Linear,
    /// From fine to coarse.
    pub down: Vec<DownStage>,
    /// At the bottom.
    pub middle: Bottom,
    /// From coarse to fine.
    pub up: Vec<UpStage>,
    /// `[channels of the first stage]`.
    pub norm_out: GroupNorm,
    /// `[channels_out, channels of the first stage, kernel_out, kernel_out]`.
    pub conv_out: Conv,
    #[module(skip)]
    time: TimeConfig,
    #[module(skip)]
    activation: Activation,
    stretch: bool,
}

/// One resolution on the way down.
#[derive(Module, Debug)]
pub struct DownStage {
    /// In their order.
    pub residuals: Vec<ResidualBlock>,
    /// One after each of them, or none.
    pub transformers: Vec<SpatialTransformer>,
    /// In steps of two; not in the coarsest.
    pub downsample: Option<Conv>,
}

/// Between the way down and the way up.
#[derive(Module, Debug)]
pub struct Bottom {
    /// None, one, or two around the transformer.
    pub residuals: Vec<ResidualBlock>,
    /// Between the two.
    pub transformer: Option<SpatialTransformer>,
}

/// One resolution on the way up.
#[derive(Module, Debug)]
pub struct UpStage {
    /// Each sees what is left of the way down, the last first, beside what comes from below.
    pub residuals: Vec<ResidualBlock>,
    /// One after each of them, or none.
    pub transformers: Vec<SpatialTransformer>,
    /// After pixels were doubled; not in the finest.
    pub upsample: Option<Conv>,
}

/// Transformer blocks on the places of a picture, beside a shortcut.
#[derive(Module, Debug)]
pub struct SpatialTransformer {
    /// `[channels]`.
    pub norm: GroupNorm,
    /// `[channels, channels]`.
    pub proj_in: Linear,
    /// In their order.
    pub blocks: Vec<TransformerBlock>,
    /// `[channels, channels]`.
    pub proj_out: Linear,
}

/// A pre-norm block that attends to the picture, then to the context.
#[derive(Module, Debug)]
pub struct TransformerBlock {
    /// Before the attention to the picture.
    pub norm1: LayerNorm,
    /// To the picture.
    pub attention: Attention,
    /// Before the attention to the context.
    pub norm2: LayerNorm,
    /// To the context.
    pub cross: Attention,
    /// Before the MLP.
    pub norm3: LayerNorm,
    /// GEGLU, four times as wide inside.
    pub mlp: GatedMlp,
}

impl UNetConfig {
    /// An untrained network. Nothing is allocated before first use.
    ///
    /// # Panics
    /// If it has no stage.
    pub fn init(&self, device: &Device) -> UNet {
        let channels = |stage: usize| self.stages[stage].channels;
        let (finest, coarsest) = (channels(0), self.stages.len() - 1);
        let d_time = self.time.d_time;
        let residual = |channels_in, channels_out| {
            ResidualBlock::new(channels_in, channels_out, &self.norm, device).with_time(
                d_time,
                self.time_shift,
                device,
            )
        };
        let transformer = |channels, config: &TransformerConfig| {
            SpatialTransformer::new(channels, self.d_context, config, self.norm.n_groups, device)
        };

        let down = self.stages.iter().enumerate().map(|(at, stage)| {
            let before = channels(at.saturating_sub(1));
            let width_in = |block| if block == 0 { before } else { stage.channels };
            DownStage {
                residuals: (0..stage.n_residuals)
                    .map(|block| residual(width_in(block), stage.channels))
                    .collect(),
                transformers: (0..stage.n_residuals)
                    .filter_map(|_| stage.down.map(|config| transformer(stage.channels, &config)))
                    .collect(),
                downsample: (at < coarsest)
                    .then(|| Conv::new(stage.channels, stage.channels, 3, device).strided(2, 1)),
            }
        });
        let bottom = channels(coarsest);
        let middle = match &self.middle {
            Middle::Transformer(config) => Bottom {
                residuals: vec![residual(bottom, bottom), residual(bottom, bottom)],
                transformer: Some(transformer(bottom, config)),
            },
            Middle::Residual => Bottom { residuals: vec![residual(bottom, bottom)], transformer: None },
            Middle::Nothing => Bottom { residuals: Vec::new(), transformer: None },
        };
        let up = self.stages.iter().enumerate().rev().map(|(at, stage)| {
            let (below, above) = (channels((at + 1).min(coarsest)), channels(at.saturating_sub(1)));
            let width_in = |block| {
                let from_below = if block == 0 { below } else { stage.channels };
                let skip = if block == stage.n_residuals { above } else { stage.channels };
                from_below + skip
            };
            UpStage {
                residuals: (0..=stage.n_residuals)
                    .map(|block| residual(width_in(block), stage.channels))
                    .collect(),
                transformers: (0..=stage.n_residuals)
                    .filter_map(|_| stage.up.map(|config| transformer(stage.channels, &config)))
                    .collect(),
                upsample: (at > 0).then(|| Conv::new(stage.channels, stage.channels, 3, device)),
            }
        });
        UNet {
            conv_in: Conv::new(self.channels_in, finest, self.kernel_in, device),
            time1: LinearConfig::new(finest, d_time).init(device),
            time2: LinearConfig::new(d_time, d_time).init(device),
            down: down.collect(),
            middle,
            up: up.collect(),
            norm_out: self.norm.init(finest, device),
            conv_out: Conv::new(finest, self.channels_out, self.kernel_out, device),
            time: self.time,
            activation: self.norm.activation,
            stretch: self.stretch,
        }
    }
}

impl SpatialTransformer {
    fn new(
        channels: usize,
        d_context: usize,
        config: &TransformerConfig,
        n_groups: usize,
        device: &Device,
    ) -> Self {
        let linear = || LinearConfig::new(channels, channels).init(device);
        let block = |_| TransformerBlock::new(channels, d_context, config.n_heads, device);
        Self {
            norm: GroupNorm::new(channels, n_groups, TRANSFORMER_NORM_EPS, device),
            proj_in: linear(),
            blocks: (0..config.n_layers).map(block).collect(),
            proj_out: linear(),
        }
    }

    /// `[batch, channels, height, width] -> [batch, channels, height, width]`; `context` is `[batch, seq, d_context]`.
    pub fn forward(&self, x: Tensor<4>, context: &Tensor<3>, mask: &Mask) -> Tensor<4> {
        let [.., height, width] = x.dims();
        let y = self.proj_in.forward(tokens(self.norm.forward(x.clone()))); // [batch, places, channels]
        let y = self.blocks.iter().fold(y, |y, block| block.forward(y, context, mask));
        picture(self.proj_out.forward(y), [height, width]) + x
    }
}

impl TransformerBlock {
    fn new(channels: usize, d_context: usize, n_heads: usize, device: &Device) -> Self {
        let norm = || LayerNorm::new(channels, LAYER_NORM_EPS, device);
        let attention = AttentionConfig::new(channels, n_heads).with_bias(false);
        Self {
            norm1: norm(),
            attention: attention.init(device),
            norm2: norm(),
            cross: attention.with_d_context(Some(d_context)).init(device),
            norm3: norm(),
            mlp: GatedMlpConfig::new(channels, 4 * channels).init(device),
        }
    }

    /// `[batch, places, channels] -> [batch, places, channels]`; `context` is `[batch, seq, d_context]`.
    pub fn forward(&self, x: Tensor<3>, context: &Tensor<3>, mask: &Mask) -> Tensor<3> {
        let attended = self.attention.forward(self.norm1.forward(x.clone()), &Mask::Full);
        let (x, normed) = self.norm2.add(x, attended);
        let (x, normed) = self.norm3.add(x, self.cross.cross(normed, context.clone(), mask));
        x + self.mlp.forward(normed, Activation::Gelu)
    }
}

impl UNet {
    /// What the network makes of a noisy sample: noise, velocity or sample, as it was trained.
    ///
    /// - `sample`: `[batch, channels_in, height, width]`
    /// - `timestep`: `[batch]`, or `[1]` for all of them
    /// - `context`: `[batch, seq, d_context]`, of which `mask` may hide tokens from the picture
    ///
    /// Returns `[batch, channels_out, height, width]`. All are taken into the dtype of the weights.
    ///
    /// # Panics
    /// If shapes do not fit.
    pub fn forward(
        &self,
        sample: Tensor<4>,
        timestep: Tensor<1>,
        context: Tensor<3>,
        mask: &Mask,
    ) -> Tensor<4> {
        let dtype = self.conv_in.weight.val().dtype();
        let [batch, ..] = sample.dims();
        let time = &self.embed(timestep, batch, dtype);
        let context = &context.cast(dtype);
        let sample = if self.stretch { sample * 2.0 - 1.0 } else { sample };

        let mut x = self.conv_in.forward(sample.cast(dtype));
        let mut skips = vec![x.clone()];
        for stage in &self.down {
            for (at, residual) in stage.residuals.iter().enumerate() {
                x = residual.forward(x, Some(time));
                if let Some(transformer) = stage.transformers.get(at) {
                    x = transformer.forward(x, context, mask);
                }
                skips.push(x.clone());
            }
            if let Some(downsample) = &stage.downsample {
                x = downsample.forward(x);
                skips.push(x.clone());
            }
        }

        for (at, residual) in self.middle.residuals.iter().enumerate() {
            x = residual.forward(x, Some(time));
            if let Some(transformer) = self.middle.transformer.as_ref().filter(|_| at == 0) {
                x = transformer.forward(x, context, mask);
            }
        }

        for stage in &self.up {
            for (at, residual) in stage.residuals.iter().enumerate() {
                // there is one for each: what the first convolution and every step of the way down gave
                let skip = skips.pop().into_iter();
                x = residual.forward(Tensor::cat([x].into_iter().chain(skip).collect(), 1), Some(time));
                if let Some(transformer) = stage.transformers.get(at) {
                    x = transformer.forward(x, context, mask);
                }
            }
            if let (Some(upsample), Some(next)) = (&stage.upsample, skips.last()) {
                // odd sides were rounded up on the way down
                let [.., height, width] = next.dims();
                x = upsample.forward(double(x).narrow(2, 0, height).narrow(3, 0, width));
            }
        }
        self.conv_out.forward(self.norm_out.activated(x, self.activation))
    }

    /// The time as the blocks see it, activated: `[batch] or [1] -> [batch, d_time]`.
    fn embed(&self, timestep: Tensor<1>, batch: usize, dtype: DType) -> Tensor<2> {
        let [_, width] = self.time1.weight.dims();
        let waves = self.time.waves(timestep.cast(DType::F32), width).cast(dtype); // [batch or 1, width]
        let time = self.time2.forward(self.activation.forward(self.time1.forward(waves)));
        let [_, d_time] = time.dims();
        self.activation.forward(time).expand([batch, d_time])
    }
}

impl TimeConfig {
    /// Sines and cosines of times, `[batch] -> [batch, width]`, an odd one out is 0 (Vaswani et al. 2017, section 3.5, and
    /// what diffusers makes of it).
    fn waves(&self, timestep: Tensor<1>, width: usize) -> Tensor<2> {
        let ([batch], device) = (timestep.dims(), timestep.device());
        let half = width / 2;
        let frequency = |wave: usize| (-PERIODS.ln() * wave as f64 / (half as f64 - self.shift)).exp() as f32;
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let frequencies = Tensor::<1>::from_data(frequencies.as_slice(), (&device, DType::F32));
        let angles = timestep.unsqueeze_dim::<2>(1) * frequencies.unsqueeze(); // [batch, half]
        let (sines, cosines) = (angles.clone().sin(), angles.cos());
        let mut waves = if self.cosines_first { vec![cosines, sines] } else { vec![sines, cosines] };
        if !width.is_multiple_of(2) {
            waves.push(Tensor::zeros([batch, 1], (&device, DType::F32)));
        }
        Tensor::cat(waves, 1)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Bool;

    use super::*;
    use crate::residual::tests::{NORM, assert_close, noise};

    /// Three resolutions: two transformers on the way down, one on the way up, and a residual block more than one.
    fn tiny() -> UNetConfig {
        let transformer = Some(TransformerConfig { n_layers: 2, n_heads: 2 });
        UNetConfig {
            channels_in: 3,
            channels_out: 2,
            stages: Cow::Owned(vec![
                StageConfig { channels: 4, n_residuals: 1, down: transformer, up: None },
                StageConfig { channels: 6, n_residuals: 2, down: None, up: transformer },
                StageConfig { channels: 8, n_residuals: 1, down: transformer, up: None },
            ]),
            middle: Middle::Transformer(TransformerConfig { n_layers: 1, n_heads: 4 }),
            d_context: 5,
            norm: NORM,
            time: TimeConfig { d_time: 10, cosines_first: true, shift: 0.0 },
            time_shift: TimeShift::Added,
            kernel_in: 3,
            kernel_out: 1,
            stretch: false,
        }
    }

    fn times(times: &[f32]) -> Tensor<1> {
        Tensor::from_data(times, &Device::flex())
    }

    #[test]
    fn odd_sides_come_back() {
        let device = Device::flex();
        for middle in [tiny().middle, Middle::Residual, Middle::Nothing] {
            let model = UNetConfig { middle, ..tiny() }.init(&device);
            for [height, width] in [[8, 4], [7, 5], [1, 2]] {
                let sample = noise([1, 3, height, width], &device);
                let found = model.forward(sample, times(&[3.0]), noise([1, 2, 5], &device), &Mask::Full);
                assert_eq!(found.dims(), [1, 2, height, width]);
            }
        }
    }

    #[test]
    fn rows_do_not_see_each_other_and_each_has_its_time() {
        let device = Device::flex();
        let model = tiny().init(&device);
        let (sample, context) = (noise([2, 3, 4, 4], &device), noise([2, 3, 5], &device));
        let both = model.forward(sample.clone(), times(&[1.0, 20.0]), context.clone(), &Mask::Full);
        let second = |times| {
            let context = context.clone().narrow(0, 1, 1);
            model.forward(sample.clone().narrow(0, 1, 1), times, context, &Mask::Full)
        };
        assert_close(second(times(&[20.0])), both.clone().narrow(0, 1, 1), 1e-5);
        let other = (second(times(&[1.0])) - both.narrow(0, 1, 1)).abs().max().into_scalar::<f32>();
        assert!(other > 1e-3, "the time changes nothing: {other}");
        // one time for all
        let one = model.forward(sample.clone(), times(&[20.0]), context.clone(), &Mask::Full);
        assert_close(one.narrow(0, 1, 1), second(times(&[20.0])), 1e-5);
    }

    #[test]
    fn hidden_tokens_of_the_context_do_not_matter() {
        let device = Device::flex();
        let model = tiny().init(&device);
        let (sample, context) = (noise([1, 3, 4, 4], &device), noise([1, 2, 5], &device));
        let run = |context, mask: &Mask| model.forward(sample.clone(), times(&[7.0]), context, mask);
        let longer = Tensor::cat(vec![context.clone(), noise([1, 1, 5], &device)], 1);
        let seen = Tensor::<2, Bool>::from_data([[true, true, false]], &device);
        let expected = run(context, &Mask::Full);
        assert_close(run(longer, &Mask::Padding(seen)), expected, 1e-5);
    }

    /// Two waves of width 5 at time 2: the slower one's frequency is 10000^(-1/2), or 10000^(-1/1) with a shift of 1.
    #[test]
    fn waves() {
        let waves = |cosines_first, shift| {
            let time = TimeConfig { d_time: 1, cosines_first, shift };
            time.waves(times(&[2.0]), 5).into_data().iter::<f32>().collect::<Vec<_>>()
        };
        let assert = |found: Vec<f32>, expected: [f64; 5]| {
            for (found, expected) in found.iter().zip(expected) {
                assert!((f64::from(*found) - expected).abs() < 1e-6, "{found} for {expected}");
            }
        };
        let (sin, cos) = (f64::sin, f64::cos);
        assert(waves(true, 0.0), [cos(2.0), cos(0.02), sin(2.0), sin(0.02), 0.0]);
        assert(waves(false, 1.0), [sin(2.0), sin(0.0002), cos(2.0), cos(0.0002), 0.0]);
    }

    #[test]
    fn samples_from_0_to_1_are_stretched() {
        let device = Device::flex();
        let model = tiny().init(&device);
        let (sample, context) = (noise([1, 3, 4, 4], &device), noise([1, 2, 5], &device));
        let expected = model.forward(sample.clone() * 2.0 - 1.0, times(&[7.0]), context.clone(), &Mask::Full);
        let model = UNet { stretch: true, ..model };
        assert_close(model.forward(sample, times(&[7.0]), context, &Mask::Full), expected, 1e-5);
    }

    /// Every parameter takes part, and none of its gradients is lost on the way.
    #[test]
    fn everything_learns() {
        let device = Device::flex().autodiff();
        for time_shift in [TimeShift::Added, TimeShift::Scaled] {
            let model = UNetConfig { time_shift, ..tiny() }.init(&device);
            let times = Tensor::from_data([3.0, 500.0], &device);
            let (sample, context) = (noise([2, 3, 6, 5], &device), noise([2, 3, 5], &device));
            let loss = model.forward(sample, times, context, &Mask::Full).square().mean();
            crate::residual::tests::assert_learns(&model, loss);
        }
    }
}
