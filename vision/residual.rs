//! What U-Nets and autoencoders of pictures are built from, channels first: residual blocks of two convolutions, and
//! their steps between sizes. The numbers match diffusers' `ResnetBlock2D`, `Downsample2D` and `Upsample2D`.

use burn::module::Module;
use burn::tensor::ops::PadMode;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{GroupNorm, Linear, LinearConfig};
use volary_kernels::ops::Activation;

use crate::conv::Conv;

/// How a network of residual blocks normalises and activates.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormConfig {
    /// Groups of channels that are normalised together.
    pub n_groups: usize,
    /// Added to variances.
    pub eps: f64,
    /// After every norm.
    pub activation: Activation,
}

impl NormConfig {
    /// An untrained norm.
    pub fn init(&self, channels: usize, device: &Device) -> GroupNorm {
        GroupNorm::new(channels, self.n_groups, self.eps, device)
    }
}

/// How the time enters a residual block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeShift {
    /// Added before the second norm.
    Added,
    /// Scales what the second norm gives, by one more than its first half, and adds its second half.
    Scaled,
}

/// `x + conv2(act(norm2(conv1(act(norm1(x))))))`, with the time in the middle of it.
#[derive(Module, Debug)]
pub struct ResidualBlock {
    /// `[in]`.
    pub norm1: GroupNorm,
    /// `[out, in, 3, 3]`.
    pub conv1: Conv,
    /// `[out, d_time]`, or `[2 out, d_time]` where it scales; not in a network without time.
    pub time: Option<Linear>,
    /// `[out]`.
    pub norm2: GroupNorm,
    /// `[out, out, 3, 3]`.
    pub conv2: Conv,
    /// `[out, in, 1, 1]`, where the width changes.
    pub shortcut: Option<Conv>,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    shift: TimeShift,
}

impl ResidualBlock {
    /// An untrained block without time.
    pub fn new(channels_in: usize, channels_out: usize, norm: &NormConfig, device: &Device) -> Self {
        let changes = channels_in != channels_out;
        Self {
            norm1: norm.init(channels_in, device),
            conv1: Conv::new(channels_in, channels_out, 3, device),
            time: None,
            norm2: norm.init(channels_out, device),
            conv2: Conv::new(channels_out, channels_out, 3, device),
            shortcut: changes.then(|| Conv::new(channels_in, channels_out, 1, device)),
            activation: norm.activation,
            shift: TimeShift::Added,
        }
    }

    /// The same with a time of `d_time` numbers.
    pub fn with_time(self, d_time: usize, shift: TimeShift, device: &Device) -> Self {
        let [channels] = self.norm2.weight.lazy_shape().dims();
        let d_out = match shift {
            TimeShift::Added => channels,
            TimeShift::Scaled => 2 * channels,
        };
        Self { time: Some(LinearConfig::new(d_time, d_out).init(device)), shift, ..self }
    }

    /// `[batch, in, height, width] -> [batch, out, height, width]`; `time`, which was activated, is `[batch, d_time]`.
    pub fn forward(&self, x: Tensor<4>, time: Option<&Tensor<2>>) -> Tensor<4> {
        let y = self.conv1.forward(self.norm1.activated(x.clone(), self.activation));
        let time = self.time.as_ref().zip(time).map(|(layer, time)| {
            let time = layer.forward(time.clone());
            let [batch, width] = time.dims();
            time.reshape([batch, width, 1, 1])
        });
        let y = match (time, self.shift) {
            (None, _) => self.norm2.activated(y, self.activation),
            (Some(time), TimeShift::Added) => self.norm2.activated(y + time, self.activation),
            (Some(time), TimeShift::Scaled) => {
                let channels = y.dims()[1];
                let (scale, shift) =
                    (time.clone().narrow(1, 0, channels), time.narrow(1, channels, channels));
                self.activation.forward(self.norm2.forward(y) * (scale + 1.0) + shift)
            }
        };
        let y = self.conv2.forward(y);
        match &self.shortcut {
            Some(shortcut) => y + shortcut.forward(x),
            None => y + x,
        }
    }
}

/// A convolution that halves a picture whose right and bottom have got one more row of zeros: sides are rounded down.
pub fn halve(conv: &Conv, x: Tensor<4>) -> Tensor<4> {
    conv.forward(x.pad([(0, 1), (0, 1)], PadMode::Constant(0.0)))
}

/// Every pixel becomes a square of four: `[batch, channels, height, width] -> [batch, channels, 2 height, 2 width]`.
pub fn double(x: Tensor<4>) -> Tensor<4> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch * channels, height, 1, width, 1])
        .expand([batch * channels, height, 2, width, 2])
        .reshape([batch, channels, 2 * height, 2 * width])
}

/// Places as a sequence, row by row: `[batch, channels, height, width] -> [batch, height * width, channels]`.
pub fn tokens(x: Tensor<4>) -> Tensor<3> {
    let [batch, channels, height, width] = x.dims();
    x.reshape([batch, channels, height * width]).swap_dims(1, 2)
}

/// The reverse of [`tokens`] for a picture of `height x width`.
pub fn picture(tokens: Tensor<3>, [height, width]: [usize; 2]) -> Tensor<4> {
    let [batch, _, channels] = tokens.dims();
    tokens.swap_dims(1, 2).reshape([batch, channels, height, width])
}
