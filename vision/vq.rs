//! The autoencoder whose latents are entries of a codebook (van den Oord et al. 2017, <https://arxiv.org/abs/1711.00937>;
//! Esser et al. 2021, <https://arxiv.org/abs/2012.09841>). The numbers match diffusers' `VQModel`.

use burn::module::{Initializer, Module};
use burn::tensor::{Device, Int, Tensor};
use volary_kernels::layers::Embedding;
use volary_kernels::ops;

use crate::autoencoder::{CodecConfig, Decoder, Encoder};
use crate::conv::Conv;

/// Shape of a [`VqModel`].
#[derive(Clone, Debug, PartialEq)]
pub struct VqConfig {
    /// Encoder and decoder.
    pub codec: CodecConfig,
    /// Entries of the codebook.
    pub n_codes: usize,
    /// Width of an entry.
    pub d_code: usize,
    /// What latents are taken times, for a diffusion to see them.
    pub scaling_factor: f64,
}

/// An autoencoder with a codebook.
#[derive(Module, Debug)]
pub struct VqModel {
    /// To as many channels as a latent has.
    pub encoder: Encoder,
    /// `[d_code, d_latent, 1, 1]`.
    pub quant_conv: Conv,
    /// `[n_codes, d_code]`.
    pub codebook: Embedding,
    /// `[d_latent, d_code, 1, 1]`.
    pub post_quant_conv: Conv,
    /// From a latent.
    pub decoder: Decoder,
}

/// Latents and what stands in the codebook for them.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The entries, `[batch, d_code, height, width]`. Gradients go past the codebook: they reach the latents as if these
    /// were the entries.
    pub latents: Tensor<4>,
    /// Which entries they are, row by row: `[batch, height, width]`.
    pub indices: Tensor<3, Int>,
    /// Mean squared distance of the entries, which learn of it, from the latents, which do not: `[1]`.
    pub codebook_loss: Tensor<1>,
    /// The same distance, of which the latents learn and the entries do not: `[1]`.
    pub commitment_loss: Tensor<1>,
}

impl VqConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> VqModel {
        let Self { codec, n_codes, d_code, .. } = self;
        let bound = 1.0 / *n_codes as f64;
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        VqModel {
            encoder: codec.encoder(codec.d_latent, device),
            quant_conv: Conv::new(codec.d_latent, *d_code, 1, device),
            codebook: Embedding { weight: uniform.init([*n_codes, *d_code], device) },
            post_quant_conv: Conv::new(*d_code, codec.d_latent, 1, device),
            decoder: codec.decoder(device),
        }
    }
}

impl VqModel {
    /// `[batch, channels_in, height, width] -> [batch, d_code, height / factor, width / factor]`, before the codebook.
    ///
    /// # Panics
    /// If a side is shorter than the factor.
    pub fn encode(&self, pictures: Tensor<4>) -> Tensor<4> {
        let pictures = pictures.cast(self.encoder.conv_in.weight.val().dtype());
        self.quant_conv.forward(self.encoder.forward(pictures))
    }

    /// The nearest entries to latents of `[batch, d_code, height, width]`.
    pub fn quantize(&self, latents: Tensor<4>) -> Quantized {
        let [batch, d_code, height, width] = latents.dims();
        let rows = latents.clone().permute([0, 2, 3, 1]).reshape([batch * height * width, d_code]);
        let indices = ops::nearest(rows, self.codebook.weight.val()).reshape([batch, height, width]);
        let entries = self.look_up(indices.clone());
        let distance = |a: Tensor<4>, b: Tensor<4>| (a - b).square().mean();
        Quantized {
            latents: latents.clone() + (entries.clone() - latents.clone()).detach(),
            indices,
            codebook_loss: distance(entries.clone(), latents.clone().detach()),
            commitment_loss: distance(latents, entries.detach()),
        }
    }

    /// The entries of the codebook: `[batch, height, width] -> [batch, d_code, height, width]`.
    ///
    /// # Panics
    /// If there is no such entry.
    pub fn look_up(&self, indices: Tensor<3, Int>) -> Tensor<4> {
        let [batch, height, width] = indices.dims();
        let entries = self.codebook.forward(indices.reshape([batch, height * width])); // [batch, places, d_code]
        crate::residual::picture(entries, [height, width])
    }

    /// Entries of the codebook to pictures: `[batch, d_code, height, width] -> [batch, channels_out, factor * height,
    /// factor * width]`.
    pub fn decode(&self, entries: Tensor<4>) -> Tensor<4> {
        let entries = entries.cast(self.decoder.conv_in.weight.val().dtype());
        self.decoder.forward(self.post_quant_conv.forward(entries))
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::tensor::TensorData;

    use super::*;
    use crate::autoencoder::tests::tiny;
    use crate::residual::tests::{assert_close, assert_learns, noise};

    fn model(device: &Device) -> VqModel {
        VqConfig { codec: tiny(), n_codes: 5, d_code: 2, scaling_factor: 1.0 }.init(device)
    }

    /// The entries (0, 0), (4, 4) and (0, 8).
    fn with_entries(device: &Device) -> VqModel {
        let mut model = model(device);
        let entries = Tensor::from_data([[0.0, 0.0], [4.0, 4.0], [0.0, 8.0]], device);
        model.codebook.weight = Param::from_tensor(entries).set_require_grad(true);
        model
    }

    /// Of two rows and one column: (1, -1) and (3, 5).
    fn latents(device: &Device) -> Tensor<4> {
        Tensor::from_data([[[[1.0], [3.0]], [[-1.0], [5.0]]]], device)
    }

    #[test]
    fn the_nearest_entries() {
        let device = Device::flex();
        let quantized = with_entries(&device).quantize(latents(&device));
        quantized.indices.into_data().convert::<i64>().assert_eq(&TensorData::from([[[0_i64], [1]]]), true);
        let entries = Tensor::from_data([[[[0.0], [4.0]], [[0.0], [4.0]]]], &device);
        assert_close(quantized.latents, entries, 1e-6);
        for loss in [quantized.codebook_loss, quantized.commitment_loss] {
            assert_eq!(loss.into_scalar::<f32>(), 1.0);
        }
    }

    /// Past the codebook the gradient is that of the entries; each loss reaches the one of the two that is to move.
    #[test]
    fn gradients_go_past_the_codebook() {
        let device = Device::flex().autodiff();
        let model = with_entries(&device);
        let gradients = |loss: fn(Quantized) -> Tensor<1>| {
            let latents = latents(&device).require_grad();
            let gradients = loss(model.quantize(latents.clone())).backward();
            let values = |data: TensorData| data.iter::<f32>().collect::<Vec<_>>();
            let of_latents = latents.grad(&gradients).map(|gradient| values(gradient.into_data()));
            let codebook = model.codebook.weight.val().grad(&gradients);
            let of_codebook = codebook.map(|gradient| values(gradient.into_data()));
            let moved = |values: Option<Vec<f32>>| values.filter(|values| values.iter().any(|&x| x != 0.0));
            (moved(of_latents), moved(of_codebook))
        };
        let through = gradients(|quantized| (quantized.latents.clone() * quantized.latents).sum());
        assert_eq!(through, (Some(vec![0.0, 8.0, 0.0, 8.0]), None));
        // half of the distances to the four numbers
        let codebook = gradients(|quantized| quantized.codebook_loss);
        assert_eq!(codebook, (None, Some(vec![-0.5, 0.5, 0.5, -0.5, 0.0, 0.0])));
        let commitment = gradients(|quantized| quantized.commitment_loss);
        assert_eq!(commitment, (Some(vec![0.5, -0.5, -0.5, 0.5]), None));
    }

    #[test]
    fn everything_learns() {
        let device = Device::flex().autodiff();
        let model = model(&device);
        let quantized = model.quantize(model.encode(noise([2, 3, 8, 4], &device)));
        let loss = model.decode(quantized.latents).square().mean() + quantized.codebook_loss;
        assert_learns(&model, loss + quantized.commitment_loss * 0.25);
    }
}
