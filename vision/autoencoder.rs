//! The convolutional autoencoder of latent diffusion: pictures to a few channels an eighth as large, and back (Rombach et
//! al. 2022, section 3.1, <https://arxiv.org/abs/2112.10752>; Esser et al. 2021, <https://arxiv.org/abs/2012.09841>).
//! The numbers match diffusers' `AutoencoderKL`.

use std::borrow::Cow;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use volary_kernels::layers::{Attention, AttentionConfig, GroupNorm};
use volary_kernels::ops::{Activation, Mask};

use crate::conv::Conv;
use crate::residual::{NormConfig, ResidualBlock, double, halve, picture, tokens};

mod tiles;

pub use tiles::Tiles;

/// Shape of an [`Encoder`] and its [`Decoder`].
#[derive(Clone, Debug, PartialEq)]
pub struct CodecConfig {
    /// Channels of the pictures that are read.
    pub channels_in: usize,
    /// Channels of the pictures that are made.
    pub channels_out: usize,
    /// Number of channels at each resolution, from fine to coarse; each is half as large as the one before it.
    pub channels: Cow<'static, [usize]>,
    /// Residual blocks of each in the encoder; the decoder has one more.
    pub n_residuals: usize,
    /// Channels of a latent.
    pub d_latent: usize,
    /// Norms and activation.
    pub norm: NormConfig,
    /// Whether places see each other at the coarsest resolution.
    pub attends: bool,
}

/// A picture to the features of its latent.
#[derive(Module, Debug)]
pub struct Encoder {
    /// `[channels of the finest, channels_in, 3, 3]`.
    pub conv_in: Conv,
    /// From fine to coarse.
    pub stages: Vec<EncoderStage>,
    /// At the coarsest.
    pub middle: Bottom,
    /// `[channels of the coarsest]`.
    pub norm_out: GroupNorm,
    /// `[out, channels of the coarsest, 3, 3]`.
    pub conv_out: Conv,
    #[module(skip)]
    activation: Activation,
}

/// One resolution of an encoder.
#[derive(Module, Debug)]
pub struct EncoderStage {
    /// In their order.
    pub residuals: Vec<ResidualBlock>,
    /// In steps of two; not in the coarsest.
    pub downsample: Option<Conv>,
}

/// A latent to its picture.
#[derive(Module, Debug)]
pub struct Decoder {
    /// `[channels of the coarsest, d_latent, 3, 3]`.
    pub conv_in: Conv,
    /// At the coarsest.
    pub middle: Bottom,
    /// From coarse to fine.
    pub stages: Vec<DecoderStage>,
    /// `[channels of the finest]`.
    pub norm_out: GroupNorm,
    /// `[channels_out, channels of the finest, 3, 3]`.
    pub conv_out: Conv,
    #[module(skip)]
    activation: Activation,
}

/// One resolution of a decoder.
#[derive(Module, Debug)]
pub struct DecoderStage {
    /// In their order.
    pub residuals: Vec<ResidualBlock>,
    /// After pixels were doubled; not in the finest.
    pub upsample: Option<Conv>,
}

/// The coarsest resolution: a residual block, attention, a residual block.
#[derive(Module, Debug)]
pub struct Bottom {
    /// Two.
    pub residuals: Vec<ResidualBlock>,
    /// Between them, if places see each other.
    pub attention: Option<PictureAttention>,
}

/// Attention of every place to every other, with one head, beside a shortcut.
#[derive(Module, Debug)]
pub struct PictureAttention {
    /// `[channels]`.
    pub norm: GroupNorm,
    /// One head.
    pub attention: Attention,
}

impl CodecConfig {
    /// How many pixels of a side become one.
    pub fn factor(&self) -> usize {
        1 << (self.channels.len() - 1)
    }

    /// An untrained encoder to so many channels.
    ///
    /// # Panics
    /// If there is no resolution.
    pub fn encoder(&self, channels_out: usize, device: &Device) -> Encoder {
        let coarsest = self.channels.len() - 1;
        let residual = |channels_in, out| ResidualBlock::new(channels_in, out, &self.norm, device);
        let stage = |(at, &channels): (usize, &usize)| EncoderStage {
            residuals: (0..self.n_residuals)
                .map(|block| {
                    let before = if block == 0 { self.channels[at.saturating_sub(1)] } else { channels };
                    residual(before, channels)
                })
                .collect(),
            downsample: (at < coarsest).then(|| Conv::new(channels, channels, 3, device).strided(2, 0)),
        };
        let bottom = self.channels[coarsest];
        Encoder {
            conv_in: Conv::new(self.channels_in, self.channels[0], 3, device),
            stages: self.channels.iter().enumerate().map(stage).collect(),
            middle: self.middle(bottom, device),
            norm_out: self.norm.init(bottom, device),
            conv_out: Conv::new(bottom, channels_out, 3, device),
            activation: self.norm.activation,
        }
    }

    /// An untrained decoder.
    ///
    /// # Panics
    /// If there is no resolution.
    pub fn decoder(&self, device: &Device) -> Decoder {
        let coarsest = self.channels.len() - 1;
        let residual = |channels_in, out| ResidualBlock::new(channels_in, out, &self.norm, device);
        let stage = |(at, &channels): (usize, &usize)| DecoderStage {
            residuals: (0..=self.n_residuals)
                .map(|block| {
                    let before = if block == 0 { self.channels[(at + 1).min(coarsest)] } else { channels };
                    residual(before, channels)
                })
                .collect(),
            upsample: (at > 0).then(|| Conv::new(channels, channels, 3, device)),
        };
        let bottom = self.channels[coarsest];
        Decoder {
            conv_in: Conv::new(self.d_latent, bottom, 3, device),
            middle: self.middle(bottom, device),
            stages: self.channels.iter().enumerate().rev().map(stage).collect(),
            norm_out: self.norm.init(self.channels[0], device),
            conv_out: Conv::new(self.channels[0], self.channels_out, 3, device),
            activation: self.norm.activation,
        }
    }

    fn middle(&self, channels: usize, device: &Device) -> Bottom {
        let residual = || ResidualBlock::new(channels, channels, &self.norm, device);
        Bottom {
            residuals: vec![residual(), residual()],
            attention: self.attends.then(|| PictureAttention {
                norm: self.norm.init(channels, device),
                attention: AttentionConfig::new(channels, 1).init(device),
            }),
        }
    }
}

impl Encoder {
    /// `[batch, channels_in, height, width] -> [batch, out, height / factor, width / factor]`, rounded down.
    ///
    /// # Panics
    /// If a side is shorter than the factor.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let mut x = self.conv_in.forward(x);
        for stage in &self.stages {
            x = stage.residuals.iter().fold(x, |x, residual| residual.forward(x, None));
            if let Some(downsample) = &stage.downsample {
                x = halve(downsample, x);
            }
        }
        let x = self.middle.forward(x);
        self.conv_out.forward(self.norm_out.activated(x, self.activation))
    }
}

impl Decoder {
    /// `[batch, d_latent, height, width] -> [batch, channels_out, height * factor, width * factor]`.
    pub fn forward(&self, latents: Tensor<4>) -> Tensor<4> {
        let mut x = self.middle.forward(self.conv_in.forward(latents));
        for stage in &self.stages {
            x = stage.residuals.iter().fold(x, |x, residual| residual.forward(x, None));
            if let Some(upsample) = &stage.upsample {
                x = upsample.forward(double(x));
            }
        }
        self.conv_out.forward(self.norm_out.activated(x, self.activation))
    }
}

impl Bottom {
    fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        self.residuals.iter().enumerate().fold(x, |x, (at, residual)| {
            let x = residual.forward(x, None);
            match self.attention.as_ref().filter(|_| at == 0) {
                Some(attention) => attention.forward(x),
                None => x,
            }
        })
    }
}

impl PictureAttention {
    /// `[batch, channels, height, width] -> [batch, channels, height, width]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let [.., height, width] = x.dims();
        let y = self.attention.forward(tokens(self.norm.forward(x.clone())), &Mask::Full);
        picture(y, [height, width]) + x
    }
}

/// Shape of an [`AutoencoderKl`].
#[derive(Clone, Debug, PartialEq)]
pub struct AutoencoderKlConfig {
    /// Encoder and decoder.
    pub codec: CodecConfig,
    /// Whether a convolution by 1 x 1 follows the encoder.
    pub quant_conv: bool,
    /// Whether one precedes the decoder.
    pub post_quant_conv: bool,
    /// What pictures are cut into where they are large: the side of a tile.
    pub tile: usize,
    /// What latents are taken times, for a diffusion to see them.
    pub scaling_factor: f64,
    /// What is taken from them before that.
    pub shift_factor: f64,
}

/// A variational autoencoder: a latent is a normal distribution.
#[derive(Module, Debug)]
pub struct AutoencoderKl {
    /// To twice as many channels as a latent has.
    pub encoder: Encoder,
    /// `[2 d_latent, 2 d_latent, 1, 1]`.
    pub quant_conv: Option<Conv>,
    /// `[d_latent, d_latent, 1, 1]`.
    pub post_quant_conv: Option<Conv>,
    /// From a latent.
    pub decoder: Decoder,
}

/// What an encoder knows of a latent: a normal distribution of each of its numbers.
#[derive(Clone, Debug)]
pub struct Posterior {
    /// `[batch, d_latent, height, width]`.
    pub mean: Tensor<4>,
    /// The logarithm of the variance, from -30 to 20; `[batch, d_latent, height, width]`.
    pub logvar: Tensor<4>,
}

impl AutoencoderKlConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> AutoencoderKl {
        let d_latent = self.codec.d_latent;
        let pointwise = |channels| Conv::new(channels, channels, 1, device);
        AutoencoderKl {
            encoder: self.codec.encoder(2 * d_latent, device),
            quant_conv: self.quant_conv.then(|| pointwise(2 * d_latent)),
            post_quant_conv: self.post_quant_conv.then(|| pointwise(d_latent)),
            decoder: self.codec.decoder(device),
        }
    }

    /// Tiles as diffusers cuts them.
    pub fn tiles(&self) -> Tiles {
        Tiles { pixels: self.tile, factor: self.codec.factor() }
    }
}

impl AutoencoderKl {
    /// Pictures, mostly from -1 to 1: `[batch, channels_in, height, width]`. Their latents have `height / factor` rows and
    /// `width / factor` columns.
    ///
    /// # Panics
    /// If a side is shorter than the factor.
    pub fn encode(&self, pictures: Tensor<4>) -> Posterior {
        Posterior::of(self.moments(pictures))
    }

    /// Mean and logarithm of the variance below each other: `[batch, 2 d_latent, ...]`.
    pub fn moments(&self, pictures: Tensor<4>) -> Tensor<4> {
        let pictures = pictures.cast(self.encoder.conv_in.weight.val().dtype());
        through(&self.quant_conv, self.encoder.forward(pictures))
    }

    /// `[batch, d_latent, height, width] -> [batch, channels_out, factor * height, factor * width]`, unscaled latents.
    pub fn decode(&self, latents: Tensor<4>) -> Tensor<4> {
        let latents = latents.cast(self.decoder.conv_in.weight.val().dtype());
        self.decoder.forward(through(&self.post_quant_conv, latents))
    }

    /// The same one picture after the other: the memory of one.
    pub fn decode_sliced(&self, latents: Tensor<4>) -> Tensor<4> {
        let pictures = latents.split(1, 0).into_iter().map(|latent| self.decode(latent));
        Tensor::cat(pictures.collect(), 0)
    }

    /// The same in overlapping tiles, whose seams are blended: the memory of one tile, and not quite the same picture, as
    /// norms and attention see a tile only. What fits into one tile is not cut.
    pub fn decode_tiled(&self, latents: Tensor<4>, tiles: &Tiles) -> Tensor<4> {
        tiles.decode(latents, |tile| self.decode(tile))
    }

    /// As [`AutoencoderKl::encode`] in overlapping tiles.
    pub fn encode_tiled(&self, pictures: Tensor<4>, tiles: &Tiles) -> Posterior {
        Posterior::of(tiles.encode(pictures, |tile| self.moments(tile)))
    }
}

/// Through a layer, where there is one.
fn through(layer: &Option<Conv>, x: Tensor<4>) -> Tensor<4> {
    match layer {
        Some(layer) => layer.forward(x),
        None => x,
    }
}

impl Posterior {
    /// Of its mean and the logarithm of its variance below each other: `[batch, 2 d_latent, height, width]`.
    pub fn of(moments: Tensor<4>) -> Self {
        let channels = moments.dims()[1] / 2;
        let mean = moments.clone().narrow(1, 0, channels);
        Self { mean, logvar: moments.narrow(1, channels, channels).clamp(-30.0, 20.0) }
    }

    /// The standard deviation: `[batch, d_latent, height, width]`.
    pub fn std(&self) -> Tensor<4> {
        (self.logvar.clone() * 0.5).exp()
    }

    /// The likeliest latent.
    pub fn mode(&self) -> Tensor<4> {
        self.mean.clone()
    }

    /// The latent that standard normal `noise`, `[batch, d_latent, height, width]`, picks.
    pub fn sample(&self, noise: Tensor<4>) -> Tensor<4> {
        self.mean.clone() + self.std() * noise.cast(self.mean.dtype())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::residual::tests::{NORM, assert_close, assert_learns, noise};

    /// Three resolutions.
    pub fn tiny() -> CodecConfig {
        CodecConfig {
            channels_in: 3,
            channels_out: 2,
            channels: Cow::Borrowed(&[4, 6, 8]),
            n_residuals: 1,
            d_latent: 3,
            norm: NORM,
            attends: true,
        }
    }

    fn config() -> AutoencoderKlConfig {
        AutoencoderKlConfig {
            codec: tiny(),
            quant_conv: true,
            post_quant_conv: true,
            tile: 16,
            scaling_factor: 1.0,
            shift_factor: 0.0,
        }
    }

    #[test]
    fn sizes() {
        let device = Device::flex();
        let codec = CodecConfig { attends: false, ..tiny() };
        for codec in [tiny(), codec] {
            let model = AutoencoderKlConfig { codec, ..config() }.init(&device);
            let latent = model.encode(noise([1, 3, 9, 4], &device)).mode();
            assert_eq!(latent.dims(), [1, 3, 2, 1]);
            assert_eq!(model.decode(latent).dims(), [1, 2, 8, 4]);
        }
    }

    #[test]
    fn slices_are_the_whole() {
        let device = Device::flex();
        let (model, latents) = (config().init(&device), noise([3, 3, 2, 4], &device));
        assert_close(model.decode_sliced(latents.clone()), model.decode(latents), 1e-5);
    }

    #[test]
    fn what_fits_into_a_tile_is_the_whole() {
        let device = Device::flex();
        let (model, tiles) = (config().init(&device), config().tiles());
        let (pictures, latents) = (noise([1, 3, 16, 12], &device), noise([1, 3, 4, 3], &device));
        let tiled = model.encode_tiled(pictures.clone(), &tiles).mean;
        assert_close(tiled, model.encode(pictures).mean, 0.0);
        assert_close(model.decode_tiled(latents.clone(), &tiles), model.decode(latents), 0.0);
    }

    #[test]
    fn a_posterior_is_cut_in_halves() {
        let moments = [1.0, -2.0, 2.0 * 3.0_f32.ln(), -1000.0];
        let moments = Tensor::<1>::from_data(moments.as_slice(), &Device::flex()).reshape([1, 4, 1, 1]);
        let posterior = Posterior::of(moments);
        let numbers = |tensor: Tensor<4>| tensor.into_data().iter::<f32>().collect::<Vec<_>>();
        assert_eq!(numbers(posterior.mode()), [1.0, -2.0]);
        let std = numbers(posterior.std());
        assert!((std[0] - 3.0).abs() < 1e-6 && (std[1] - (-15.0_f32).exp()).abs() < 1e-12, "{std:?}");
        let sample = numbers(posterior.sample(Tensor::full([1, 2, 1, 1], 2.0, &Device::flex())));
        assert!((sample[0] - 7.0).abs() < 1e-5 && (sample[1] + 2.0).abs() < 1e-5, "{sample:?}");
    }

    #[test]
    fn everything_learns() {
        let device = Device::flex().autodiff();
        let model = config().init(&device);
        let posterior = model.encode(noise([2, 3, 8, 8], &device));
        let latents = posterior.sample(noise([2, 3, 2, 2], &device));
        assert_learns(&model, model.decode(latents).square().mean());
    }
}
