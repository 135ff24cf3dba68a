//! The convolutional tower of CLIP: a ResNet with a three-convolution stem, average pooling before every
//! strided step and attention pooling at the end (Radford et al. 2021, section 2.4; He et al. 2019).
//!
//! Activations are channels-last, so that 1x1 convolutions and normalisations are plain matrix work.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, activation::relu};
use volary_kernels::layers::{BatchNorm, Linear, LinearConfig};
use volary_kernels::ops::{self, Mask};

use crate::conv::Conv3x3;

const BATCH_NORM_EPS: f64 = 1e-5;
/// A bottleneck's output is this many times as wide as its 3x3 convolution.
const EXPANSION: usize = 4;

/// Shape of a [`ResNet`].
#[derive(Clone, Debug, PartialEq)]
pub struct ResNetConfig {
    /// Side of the square input in pixels; a multiple of 32.
    pub image_size: usize,
    /// Width of the stem; the last stage is 32 times as wide.
    pub width: usize,
    /// Bottlenecks per stage.
    pub layers: [usize; 4],
    /// Heads of the attention pooling.
    pub n_heads: usize,
    /// Width of the picture's embedding.
    pub d_embed: usize,
}

/// 1x1, 3x3, 1x1 convolutions beside a shortcut.
#[derive(Module, Debug)]
pub struct Bottleneck {
    /// `[planes, in]`.
    pub conv1: Linear,
    /// `[planes]`.
    pub bn1: BatchNorm,
    /// `[planes, planes, 3, 3]`.
    pub conv2: Conv3x3,
    /// `[planes]`.
    pub bn2: BatchNorm,
    /// `[4 planes, planes]`.
    pub conv3: Linear,
    /// `[4 planes]`.
    pub bn3: BatchNorm,
    /// Where width or size changes: pooling, 1x1 convolution, normalisation.
    pub shortcut: Option<Shortcut>,
    stride: usize,
}

/// The projection of a [`Bottleneck`]'s input onto its output's shape.
#[derive(Module, Debug)]
pub struct Shortcut {
    /// `[4 planes, in]`.
    pub conv: Linear,
    /// `[4 planes]`.
    pub bn: BatchNorm,
}

impl Bottleneck {
    fn new(channels_in: usize, planes: usize, stride: usize, device: &Device) -> Self {
        let channels_out = planes * EXPANSION;
        let changes = stride > 1 || channels_in != channels_out;
        Self {
            conv1: pointwise(channels_in, planes, device),
            bn1: BatchNorm::new(planes, BATCH_NORM_EPS, device),
            conv2: Conv3x3::new(planes, planes, 1, device),
            bn2: BatchNorm::new(planes, BATCH_NORM_EPS, device),
            conv3: pointwise(planes, channels_out, device),
            bn3: BatchNorm::new(channels_out, BATCH_NORM_EPS, device),
            shortcut: changes.then(|| Shortcut {
                conv: pointwise(channels_in, channels_out, device),
                bn: BatchNorm::new(channels_out, BATCH_NORM_EPS, device),
            }),
            stride,
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = relu(normalise(&self.bn1, self.conv1.forward(x.clone())));
        let y = relu(normalise(&self.bn2, self.conv2.forward(y)));
        let y = normalise(&self.bn3, self.conv3.forward(average_pool(y, self.stride)));
        let shortcut = match &self.shortcut {
            Some(Shortcut { conv, bn }) => normalise(bn, conv.forward(average_pool(x, self.stride))),
            None => x,
        };
        relu(y + shortcut)
    }
}

/// Attention from the mean of all positions to all positions.
#[derive(Module, Debug)]
pub struct AttentionPool {
    /// `[1 + positions, channels]`, the mean's first.
    pub positions: Param<Tensor<2>>,
    /// `[channels, channels]`.
    pub query: Linear,
    /// `[channels, channels]`.
    pub key: Linear,
    /// `[channels, channels]`.
    pub value: Linear,
    /// `[d_embed, channels]`.
    pub output: Linear,
    n_heads: usize,
}

impl AttentionPool {
    /// `[batch, height, width, channels] -> [batch, d_embed]`.
    fn forward(&self, x: Tensor<4>) -> Tensor<2> {
        let [batch, height, width, channels] = x.dims();
        let (n_heads, d_head) = (self.n_heads, channels / self.n_heads);
        let x = x.reshape([batch, height * width, channels]);
        let mean = x.clone().mean_dim(1); // [batch, 1, channels]
        let x = Tensor::cat(vec![mean, x], 1) + self.positions.val().unsqueeze();
        let heads = |x: Tensor<3>| {
            let [batch, seq, _] = x.dims();
            x.reshape([batch, seq, n_heads, d_head]).swap_dims(1, 2) // [batch, n_heads, seq, d_head]
        };
        let query = heads(self.query.forward(x.clone().narrow(1, 0, 1)));
        let key = heads(self.key.forward(x.clone()));
        let value = heads(self.value.forward(x));
        let pooled = ops::attention(query, key, value, &Mask::Full, None); // [batch, n_heads, 1, d_head]
        self.output.forward(pooled.reshape([batch, channels]))
    }
}

/// The whole tower.
#[derive(Module, Debug)]
pub struct ResNet {
    /// 3 -> width / 2, stride 2.
    pub conv1: Conv3x3,
    /// `[width / 2]`.
    pub bn1: BatchNorm,
    /// width / 2 -> width / 2.
    pub conv2: Conv3x3,
    /// `[width / 2]`.
    pub bn2: BatchNorm,
    /// width / 2 -> width.
    pub conv3: Conv3x3,
    /// `[width]`.
    pub bn3: BatchNorm,
    /// Four stages of bottlenecks.
    pub stages: Vec<Stage>,
    /// Pooling and projection.
    pub pool: AttentionPool,
}

/// Bottlenecks at one resolution.
#[derive(Module, Debug)]
pub struct Stage {
    /// The first may halve the resolution.
    pub blocks: Vec<Bottleneck>,
}

impl ResNetConfig {
    /// An untrained tower.
    pub fn init(&self, device: &Device) -> ResNet {
        let (half, width) = (self.width / 2, self.width);
        let mut channels = width;
        let stages = self.layers.iter().enumerate().map(|(stage, &n_blocks)| {
            let planes = width << stage;
            let blocks = (0..n_blocks).map(|block| {
                let stride = if stage > 0 && block == 0 { 2 } else { 1 };
                let bottleneck = Bottleneck::new(channels, planes, stride, device);
                channels = planes * EXPANSION;
                bottleneck
            });
            Stage { blocks: blocks.collect() }
        });
        let stages = stages.collect();
        let positions = (self.image_size / 32).pow(2) + 1;
        let std = (channels as f64).powf(-0.5);
        ResNet {
            conv1: Conv3x3::new(3, half, 2, device),
            bn1: BatchNorm::new(half, BATCH_NORM_EPS, device),
            conv2: Conv3x3::new(half, half, 1, device),
            bn2: BatchNorm::new(half, BATCH_NORM_EPS, device),
            conv3: Conv3x3::new(half, width, 1, device),
            bn3: BatchNorm::new(width, BATCH_NORM_EPS, device),
            stages,
            pool: AttentionPool {
                positions: Initializer::Normal { mean: 0.0, std }.init([positions, channels], device),
                query: LinearConfig::new(channels, channels).init(device),
                key: LinearConfig::new(channels, channels).init(device),
                value: LinearConfig::new(channels, channels).init(device),
                output: LinearConfig::new(channels, self.d_embed).init(device),
                n_heads: self.n_heads,
            },
        }
    }
}

impl ResNet {
    /// `[batch, 3, image_size, image_size] -> [batch, d_embed]`.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<2> {
        self.pool.forward(self.features(pixels, self.stages.len())) // of [batch, size / 32, size / 32, 32 width]
    }

    /// What the first `stages` stages see in each cell of a grid, 0 or more each: `[batch, 3, height, width]` to
    /// `[batch, height / cell, width / cell, 4 width 2^(stages - 1)]`, where a `cell` is `2^(stages + 1)` pixels. Height
    /// and width are its multiples, and need not be the model's.
    ///
    /// # Panics
    /// If they are not.
    pub fn features(&self, pixels: Tensor<4>, stages: usize) -> Tensor<4> {
        let x = pixels.permute([0, 2, 3, 1]); // [batch, height, width, 3]
        let x = relu(normalise(&self.bn1, self.conv1.forward(x)));
        let x = relu(normalise(&self.bn2, self.conv2.forward(x)));
        let x = relu(normalise(&self.bn3, self.conv3.forward(x)));
        let x = average_pool(x, 2);
        let blocks = self.stages.iter().take(stages).flat_map(|stage| &stage.blocks);
        blocks.fold(x, |x, block| block.forward(x))
    }
}

/// A 1x1 convolution without bias.
pub(crate) fn pointwise(channels_in: usize, channels_out: usize, device: &Device) -> Linear {
    let std = (2.0 / channels_in as f64).sqrt();
    let mut conv = LinearConfig::new(channels_in, channels_out).with_bias(false).init(device);
    conv.weight = Initializer::Normal { mean: 0.0, std }.init([channels_out, channels_in], device);
    conv
}

/// Every channel of a picture, channels last.
pub(crate) fn normalise(norm: &BatchNorm, x: Tensor<4>) -> Tensor<4> {
    let [batch, height, width, channels] = x.dims();
    norm.forward(x.reshape([batch * height * width, channels])).reshape([batch, height, width, channels])
}

/// The mean of every `side x side` square, channels last.
fn average_pool(x: Tensor<4>, side: usize) -> Tensor<4> {
    if side == 1 {
        return x;
    }
    let [batch, height, width, channels] = x.dims();
    x.reshape([batch * height / side, side, width * channels])
        .mean_dim(1)
        .reshape([batch * height / side * (width / side), side, channels])
        .mean_dim(1)
        .reshape([batch, height / side, width / side, channels])
}
