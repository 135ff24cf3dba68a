//! EfficientNet: inverted bottlenecks with squeeze and excitation, whose widths and depths grow together (Tan & Le 2019,
//! <https://arxiv.org/abs/1905.11946>). The numbers match timm's `tf_efficientnet_*`, which pad as TensorFlow does, and the
//! port in transformers' ALIGN, which does not.
//!
//! Activations are channels-last, so that 1x1 convolutions and normalisations are plain matrix work.

use burn::module::{Initializer, Module, Param};
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::ops::{ConvOptions, PadMode};
use burn::tensor::{Device, Tensor, module::conv2d};
use volary_kernels::layers::{BatchNorm, Linear, LinearConfig};

use crate::resnet::{normalise, pointwise};

const BATCH_NORM_EPS: f64 = 1e-3;
/// A block's squeezed width is its input's width over this.
const SQUEEZE: usize = 4;
/// Widths are multiples of this.
const DIVISOR: usize = 8;

/// Shape of an [`EfficientNet`]: B0 with all widths and depths multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct EfficientNetConfig {
    /// What widths are multiplied by; they are rounded to multiples of 8, down by no more than a tenth.
    pub width: f64,
    /// What depths are multiplied by; they are rounded up.
    pub depth: f64,
    /// Number of classes; without a classifier 0.
    pub n_classes: usize,
}

/// Blocks of one width.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StageConfig {
    /// Side of the depthwise convolutions.
    pub kernel_size: usize,
    /// By how much the first block shrinks the picture.
    pub stride: usize,
    /// How many times wider than its input a block is inside.
    pub expansion: usize,
    /// Width of the blocks' outputs.
    pub width: usize,
    /// Number of blocks.
    pub n_blocks: usize,
}

/// Where zeros stand around what a convolution shrinks, and which blocks have a shortcut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// As in TensorFlow and timm: as many zeros as make the output's sides the input's over the stride, rounded up, where
    /// their number is odd more of them right and below; a shortcut in every block that keeps its input's shape.
    TensorFlow,
    /// As in transformers: `k / 2 - 1` zeros left and above and `k / 2` right and below of what a kernel of side `k`
    /// shrinks, whatever its sides; no shortcut in the first block of a stage.
    Transformers,
}

/// Tan & Le 2019, table 1: EfficientNet-B0.
const B0: [StageConfig; 7] = [
    StageConfig { kernel_size: 3, stride: 1, expansion: 1, width: 16, n_blocks: 1 },
    StageConfig { kernel_size: 3, stride: 2, expansion: 6, width: 24, n_blocks: 2 },
    StageConfig { kernel_size: 5, stride: 2, expansion: 6, width: 40, n_blocks: 2 },
    StageConfig { kernel_size: 3, stride: 2, expansion: 6, width: 80, n_blocks: 3 },
    StageConfig { kernel_size: 5, stride: 1, expansion: 6, width: 112, n_blocks: 3 },
    StageConfig { kernel_size: 5, stride: 2, expansion: 6, width: 192, n_blocks: 4 },
    StageConfig { kernel_size: 3, stride: 1, expansion: 6, width: 320, n_blocks: 1 },
];

impl EfficientNetConfig {
    /// B0 with all widths times `width` and all depths times `depth`, without a classifier.
    pub const fn scaled(width: f64, depth: f64) -> Self {
        Self { width, depth, n_classes: 0 }
    }

    /// The same with a classifier.
    pub const fn with_classes(self, n_classes: usize) -> Self {
        Self { n_classes, ..self }
    }

    /// Width of the features.
    pub fn d_features(&self) -> usize {
        scaled_width(1280, self.width)
    }

    /// What comes after the stem.
    pub fn stages(&self) -> [StageConfig; 7] {
        B0.map(|stage| StageConfig {
            width: scaled_width(stage.width, self.width),
            n_blocks: (stage.n_blocks as f64 * self.depth).ceil() as usize,
            ..stage
        })
    }

    /// Width of what the last stage gives.
    pub fn d_last(&self) -> usize {
        let [.., last] = self.stages();
        last.width
    }

    /// An untrained network, in TensorFlow's manner.
    pub fn init(&self, device: &Device) -> EfficientNet {
        let (stem, d_features) = (scaled_width(32, self.width), self.d_features());
        let classifier = || LinearConfig::new(d_features, self.n_classes).init(device);
        let stages = self.blocks(Manner::TensorFlow, device).map(|blocks| Stage { blocks });
        EfficientNet {
            stem: PaddedConv::new([stem, 3, 3, 3], 2, 1, Manner::TensorFlow, device),
            stem_norm: norm(stem, device),
            stages: stages.into(),
            head: pointwise(self.d_last(), d_features, device),
            head_norm: norm(d_features, device),
            classifier: (self.n_classes > 0).then(classifier),
        }
    }

    /// An untrained network up to its last stage.
    pub fn trunk(&self, manner: Manner, device: &Device) -> Trunk {
        let stem = scaled_width(32, self.width);
        Trunk {
            stem: PaddedConv::new([stem, 3, 3, 3], 2, 1, manner, device),
            stem_norm: norm(stem, device),
            blocks: self.blocks(manner, device).into_iter().flatten().collect(),
        }
    }

    /// Those of each stage.
    fn blocks(&self, manner: Manner, device: &Device) -> [Vec<Block>; 7] {
        let mut d_in = scaled_width(32, self.width);
        self.stages().map(|stage| {
            let blocks = (0..stage.n_blocks).map(|at| {
                let stride = if at == 0 { stage.stride } else { 1 };
                let same_shape = stride == 1 && d_in == stage.width;
                let shortcut = same_shape && (at > 0 || manner == Manner::TensorFlow);
                let block = Block::new(d_in, &StageConfig { stride, ..stage }, shortcut, manner, device);
                d_in = stage.width;
                block
            });
            blocks.collect()
        })
    }
}

fn scaled_width(width: usize, by: f64) -> usize {
    let exact = width as f64 * by;
    let near = (exact + DIVISOR as f64 / 2.0) as usize / DIVISOR * DIVISOR;
    let near = near.max(DIVISOR);
    if (near as f64) < 0.9 * exact { near + DIVISOR } else { near }
}

fn norm(channels: usize, device: &Device) -> BatchNorm {
    BatchNorm::new(channels, BATCH_NORM_EPS, device)
}

/// A convolution without bias, channels last, padded with zeros.
#[derive(Module, Debug)]
pub struct PaddedConv {
    /// `[out, in / groups, side, side]`.
    pub weight: Param<Tensor<4>>,
    stride: usize,
    groups: usize,
    #[module(skip)]
    manner: Manner,
}

impl PaddedConv {
    /// An untrained convolution with a weight of `shape`.
    pub fn new(shape: [usize; 4], stride: usize, groups: usize, manner: Manner, device: &Device) -> Self {
        let std = (2.0 / (shape[1] * shape[2] * shape[3]) as f64).sqrt();
        Self { weight: Initializer::Normal { mean: 0.0, std }.init(shape, device), stride, groups, manner }
    }

    /// `[batch, height, width, in] -> [batch, height / stride, width / stride, out]`, rounded up in TensorFlow's manner and
    /// down in that of transformers.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [_, height, width, _] = x.dims();
        let [_, _, side, _] = self.weight.dims();
        let (rows, columns) = (self.padding(height, side), self.padding(width, side));
        let x = x.permute([0, 3, 1, 2]); // [batch, in, height, width]
        let x = match (rows, columns) {
            ((0, 0), (0, 0)) => x,
            _ => x.pad([rows, columns], PadMode::Constant(0.0)),
        };
        let options = ConvOptions::new([self.stride; 2], [0, 0], [1, 1], self.groups);
        conv2d(x, self.weight.val(), None, options).permute([0, 2, 3, 1])
    }

    /// Zeros before and after `length` values.
    fn padding(&self, length: usize, side: usize) -> (usize, usize) {
        if self.manner == Manner::Transformers && self.stride > 1 {
            return (side / 2 - 1, side / 2);
        }
        let reach = (length.div_ceil(self.stride) - 1) * self.stride + side;
        let total = reach.saturating_sub(length);
        (total / 2, total - total / 2)
    }
}

/// Expansion, depthwise convolution, squeeze and excitation, projection; where the shape stays, beside a shortcut.
#[derive(Module, Debug)]
pub struct Block {
    /// Absent where the block is no wider than its input.
    pub expansion: Option<Expansion>,
    /// Every channel by itself.
    pub depthwise: PaddedConv,
    /// `[inner]`.
    pub depthwise_norm: BatchNorm,
    /// `[d_in / 4, inner]`.
    pub squeeze: Linear,
    /// `[inner, d_in / 4]`.
    pub excite: Linear,
    /// `[d_out, inner]`.
    pub projection: Linear,
    /// `[d_out]`.
    pub projection_norm: BatchNorm,
    shortcut: bool,
}

/// The widening 1x1 convolution of a [`Block`].
#[derive(Module, Debug)]
pub struct Expansion {
    /// `[inner, d_in]`.
    pub conv: Linear,
    /// `[inner]`.
    pub norm: BatchNorm,
}

impl Block {
    fn new(d_in: usize, config: &StageConfig, shortcut: bool, manner: Manner, device: &Device) -> Self {
        let StageConfig { kernel_size, stride, expansion, width, .. } = *config;
        let inner = d_in * expansion;
        let squeezed = (d_in / SQUEEZE).max(1);
        let expanded = || Expansion { conv: pointwise(d_in, inner, device), norm: norm(inner, device) };
        Self {
            expansion: (expansion > 1).then(expanded),
            depthwise: PaddedConv::new([inner, 1, kernel_size, kernel_size], stride, inner, manner, device),
            depthwise_norm: norm(inner, device),
            squeeze: LinearConfig::new(inner, squeezed).init(device),
            excite: LinearConfig::new(squeezed, inner).init(device),
            projection: pointwise(inner, width, device),
            projection_norm: norm(width, device),
            shortcut,
        }
    }

    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let y = match &self.expansion {
            Some(Expansion { conv, norm }) => silu(normalise(norm, conv.forward(x.clone()))),
            None => x.clone(),
        };
        let y = silu(normalise(&self.depthwise_norm, self.depthwise.forward(y)));
        let mean = y.clone().mean_dim(1).mean_dim(2); // [batch, 1, 1, inner]
        let gate = sigmoid(self.excite.forward(silu(self.squeeze.forward(mean))));
        let y = normalise(&self.projection_norm, self.projection.forward(y * gate));
        if self.shortcut { x + y } else { y }
    }
}

/// Blocks of one width.
#[derive(Module, Debug)]
pub struct Stage {
    /// The first may shrink the picture.
    pub blocks: Vec<Block>,
}

/// A network up to its last stage, the blocks of all stages in one list.
#[derive(Module, Debug)]
pub struct Trunk {
    /// 3 -> stem, stride 2.
    pub stem: PaddedConv,
    /// `[stem]`.
    pub stem_norm: BatchNorm,
    /// Of all stages.
    pub blocks: Vec<Block>,
}

impl Trunk {
    /// Pixels `[batch, 3, height, width]` to a map, channels last, of a 32nd of their sides.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<4> {
        run(&self.stem, &self.stem_norm, self.blocks.iter(), pixels)
    }
}

/// Pixels through stem and blocks.
fn run<'a>(
    stem: &PaddedConv,
    stem_norm: &BatchNorm,
    blocks: impl Iterator<Item = &'a Block>,
    pixels: Tensor<4>,
) -> Tensor<4> {
    let x = pixels.permute([0, 2, 3, 1]); // [batch, height, width, 3]
    let x = silu(normalise(stem_norm, stem.forward(x)));
    blocks.fold(x, |x, block| block.forward(x))
}

/// The whole network.
#[derive(Module, Debug)]
pub struct EfficientNet {
    /// 3 -> stem, stride 2.
    pub stem: PaddedConv,
    /// `[stem]`.
    pub stem_norm: BatchNorm,
    /// Seven of them.
    pub stages: Vec<Stage>,
    /// `[d_features, width of the last stage]`.
    pub head: Linear,
    /// `[d_features]`.
    pub head_norm: BatchNorm,
    /// `[n_classes, d_features]`.
    pub classifier: Option<Linear>,
}

impl EfficientNet {
    /// A picture's map of features: pixels `[batch, 3, height, width] -> [batch, ⌈height / 32⌉, ⌈width / 32⌉, d_features]`.
    pub fn features(&self, pixels: Tensor<4>) -> Tensor<4> {
        let blocks = self.stages.iter().flat_map(|stage| &stage.blocks);
        let x = run(&self.stem, &self.stem_norm, blocks, pixels);
        silu(normalise(&self.head_norm, self.head.forward(x)))
    }

    /// Scores of classes by the mean of a map: `[batch, rows, columns, d_features] -> [batch, n_classes]`, if there is a
    /// classifier.
    pub fn logits(&self, features: Tensor<4>) -> Option<Tensor<2>> {
        let [batch, _, _, d_features] = features.dims();
        let mean = features.mean_dim(1).mean_dim(2).reshape([batch, d_features]);
        self.classifier.as_ref().map(|classifier| classifier.forward(mean))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{TensorData, Tolerance};

    use super::*;

    fn conv(side: usize, stride: usize) -> PaddedConv {
        let weight = Tensor::ones([1, 1, side, side], &Device::flex());
        PaddedConv { weight: Param::from_tensor(weight), stride, groups: 1, manner: Manner::TensorFlow }
    }

    /// With one zero right and below, whatever the sides, nine values have one window of 3x3 and not four.
    #[test]
    fn padding_in_the_manner_of_transformers() {
        let conv = |side| PaddedConv { manner: Manner::Transformers, ..conv(side, 2) };
        let odd = Tensor::<1, burn::tensor::Int>::arange(0..9, &Device::flex()).float().reshape([1, 3, 3, 1]);
        let found = conv(3).forward(odd.clone()).into_data();
        found.assert_eq(&TensorData::from([[[[36.0_f32]]]]), true);
        assert_eq!(conv(5).padding(8, 5), (1, 2));
        assert_eq!(PaddedConv { stride: 1, ..conv(3) }.forward(odd).dims(), [1, 3, 3, 1]);
    }

    /// Sums over 3x3 windows with stride 2: on even sides the zeros are right and below, on odd ones all around.
    #[test]
    fn padding_is_that_of_tensorflow() {
        let device = Device::flex();
        let even = Tensor::<1, burn::tensor::Int>::arange(0..16, &device).float().reshape([1, 4, 4, 1]);
        let expected = TensorData::from([45.0f32, 39.0, 66.0, 50.0]);
        let found = conv(3, 2).forward(even).reshape([4]).into_data();
        found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-5));

        let odd = Tensor::<1, burn::tensor::Int>::arange(0..9, &device).float().reshape([1, 3, 3, 1]);
        let expected = TensorData::from([8.0f32, 12.0, 20.0, 24.0]);
        let found = conv(3, 2).forward(odd).reshape([4]).into_data();
        found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(1e-5));
    }

    #[test]
    fn a_side_shrinks_by_the_stride_rounded_up() {
        for side in [1, 3, 5] {
            for stride in [1, 2] {
                for length in 1..9usize {
                    let x = Tensor::zeros([1, length, 2, 1], &Device::flex());
                    let expected = [1, length.div_ceil(stride), 2usize.div_ceil(stride), 1];
                    assert_eq!(conv(side, stride).forward(x).dims(), expected, "{side} {stride}");
                }
            }
        }
    }

    /// Of timm's `tf_efficientnet_b7`, and of a width that rounding down would cut by more than a tenth.
    #[test]
    fn widths_and_depths_of_b7() {
        let config = EfficientNetConfig::scaled(2.0, 3.1);
        assert_eq!((scaled_width(32, 2.0), config.d_features()), (64, 2560));
        assert_eq!(config.stages().map(|stage| stage.width), [32, 48, 80, 160, 224, 384, 640]);
        assert_eq!(config.stages().map(|stage| stage.n_blocks), [4, 7, 7, 10, 10, 13, 4]);
        assert_eq!(scaled_width(112, 0.1), 16);
    }
}
