//! Pictures cut into patches.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor, module::linear};

/// Projects every square patch to a vector: a convolution whose stride is its kernel (Dosovitskiy et al.
/// 2020, section 3.1), computed as one matrix product.
#[derive(Module, Debug)]
pub struct PatchEmbedding {
    /// `[d_model, channels, patch_size, patch_size]`.
    pub weight: Param<Tensor<4>>,
    /// `[d_model]`.
    pub bias: Option<Param<Tensor<1>>>,
}

impl PatchEmbedding {
    /// An untrained projection of patches of `patch_size x patch_size` pixels, with a bias.
    pub fn new(channels: usize, patch_size: usize, d_model: usize, device: &Device) -> Self {
        let std = 1.0 / ((channels * patch_size * patch_size) as f64).sqrt();
        let shape = [d_model, channels, patch_size, patch_size];
        Self {
            weight: Initializer::Normal { mean: 0.0, std }.init(shape, device),
            bias: Some(Initializer::Zeros.init([d_model], device)),
        }
    }

    /// The same without a bias.
    pub fn without_bias(self) -> Self {
        Self { bias: None, ..self }
    }

    /// `[batch, channels, height, width] -> [batch, patches, d_model]`, patches row by row; what does not
    /// fill a patch at the right and the bottom is ignored, as a convolution would.
    pub fn forward(&self, pixels: Tensor<4>) -> Tensor<3> {
        let [d_model, channels, side, _] = self.weight.dims();
        let [batch, _, height, width] = pixels.dims();
        let (rows, columns) = (height / side, width / side);
        let pixels = pixels.narrow(2, 0, rows * side).narrow(3, 0, columns * side);
        let patches = pixels
            .reshape([batch, channels, rows, side, columns, side])
            .permute([0, 2, 4, 1, 3, 5]) // [batch, rows, columns, channels, side, side]
            .reshape([batch, rows * columns, channels * side * side]);
        let weight = self.weight.val().reshape([d_model, channels * side * side]);
        linear(patches, weight.transpose(), self.bias.as_ref().map(|bias| bias.val()))
    }
}
