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
        // before the norm, which then has `x` to itself and works in place
        let kept = match &self.shortcut {
            Some(shortcut) => shortcut.forward(x.clone()),
            None => x.clone(),
        };
        let y = self.conv1.forward(self.norm1.activated(x, self.activation));
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
        self.conv2.forward(y) + kept
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

#[cfg(test)]
pub(crate) mod tests {
    use burn::module::{ModuleVisitor, Param};
    use burn::tensor::{Distribution, Gradients, TensorData, Tolerance};

    use super::*;

    pub const NORM: NormConfig = NormConfig { n_groups: 2, eps: 1e-5, activation: Activation::Silu };

    /// Standard normal numbers.
    pub fn noise<const D: usize>(shape: [usize; D], device: &Device) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
    }

    pub fn assert_close<const D: usize>(found: Tensor<D>, expected: Tensor<D>, tolerance: f32) {
        found.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(tolerance));
    }

    /// Every parameter has a finite gradient.
    pub fn assert_learns<M: Module>(model: &M, loss: Tensor<1>) {
        struct Visitor<'a>(&'a Gradients, usize);
        impl ModuleVisitor for Visitor<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let gradient = param.val().grad(self.0).expect("a gradient");
                let size = gradient.abs().sum().into_scalar::<f32>();
                assert!(size.is_finite(), "{size}");
                self.1 += 1;
            }
        }
        let gradients = loss.backward();
        let mut visitor = Visitor(&gradients, 0);
        model.visit(&mut visitor);
        assert!(visitor.1 > 0, "a model without parameters");
    }

    #[test]
    fn pixels_become_squares() {
        let x = Tensor::<4>::from_data([[[[1.0, 2.0, 3.0]], [[4.0, 5.0, 6.0]]]], &Device::flex());
        let first = [[1.0, 1.0, 2.0, 2.0, 3.0, 3.0], [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]];
        let second = [[4.0, 4.0, 5.0, 5.0, 6.0, 6.0], [4.0, 4.0, 5.0, 5.0, 6.0, 6.0]];
        double(x).into_data().assert_eq(&TensorData::from([[first, second]]), false);
    }

    #[test]
    fn tokens_are_places_row_by_row_and_become_the_picture_again() {
        let x = noise([2, 3, 4, 5], &Device::flex());
        let place = x.clone().slice([1..2, 0..3, 2..3, 1..2]).flatten::<1>(0, 3);
        let token = tokens(x.clone()).slice([1..2, 11..12, 0..3]).flatten::<1>(0, 2);
        assert_close(token, place, 0.0);
        assert_close(picture(tokens(x.clone()), [4, 5]), x, 0.0);
    }

    /// Ones have 4 neighbours at each step but where the border begins, at the right and the bottom.
    #[test]
    fn halving_has_its_border_at_the_end() {
        let device = Device::flex();
        let mut conv = Conv::new(1, 1, 3, &device).strided(2, 0);
        conv.weight = Param::from_tensor(Tensor::ones([1, 1, 3, 3], &device));
        conv.bias = Param::from_tensor(Tensor::zeros([1], &device));
        let found = |side: usize| halve(&conv, Tensor::ones([1, 1, side, side], &device)).into_data();
        found(4).assert_eq(&TensorData::from([[[[9.0, 6.0], [6.0, 4.0]]]]), false);
        found(5).assert_eq(&TensorData::from([[[[9.0, 9.0], [9.0, 9.0]]]]), false);
    }

    /// A time that says nothing changes nothing, and one that scales by -1 leaves the shift alone.
    #[test]
    fn the_time_is_added_or_scales() {
        let device = Device::flex();
        let (x, time) = (noise([2, 4, 3, 3], &device), noise([2, 5], &device));
        let plain = ResidualBlock::new(4, 6, &NORM, &device);
        let expected = plain.forward(x.clone(), None);
        for shift in [TimeShift::Added, TimeShift::Scaled] {
            let block = plain.clone().with_time(5, shift, &device);
            let mut layer = block.time.clone().unwrap();
            layer.weight = layer.weight.map(|weight| weight.zeros_like());
            layer.bias = layer.bias.map(|bias| bias.map(|bias| bias.zeros_like()));
            let silent = ResidualBlock { time: Some(layer.clone()), ..block.clone() };
            assert_close(silent.forward(x.clone(), Some(&time)), expected.clone(), 1e-6);
            if shift == TimeShift::Scaled {
                let off = Tensor::cat(vec![-Tensor::ones([6], &device), Tensor::zeros([6], &device)], 0);
                layer.bias = Some(Param::from_tensor(off));
                let off = ResidualBlock { time: Some(layer), ..block };
                let shortcut = off.shortcut.as_ref().unwrap().forward(x.clone());
                let bias = off.conv2.bias.val().reshape([1, 6, 1, 1]);
                assert_close(off.forward(x.clone(), Some(&time)), shortcut + bias, 1e-6);
            }
        }
    }
}
