//! Pictures cut into patches.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Bool, Device, Tensor};
use volary_kernels::ops::linear;

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
        linear(patches, weight, self.bias.as_ref().map(|bias| bias.val()), None)
    }
}

/// Patches `[batch, patches, d_model]` with the learned `token`, `[d_model]`, in the place of the `masked` ones, `[batch,
/// patches]`.
///
/// # Panics
/// If shapes differ.
pub fn hide(patches: Tensor<3>, masked: Tensor<2, Bool>, token: Tensor<1>) -> Tensor<3> {
    let shape = patches.dims();
    patches.mask_where(masked.unsqueeze_dim::<3>(2).expand(shape), token.unsqueeze::<3>().expand(shape))
}

/// The pixels of every square patch: `[batch, channels, height, width] -> [batch, patches, side * side * channels]`, patches
/// row by row, in each the pixels row by row, of each pixel its channels.
///
/// # Panics
/// If `side` does not divide height and width.
pub fn patchify(pixels: Tensor<4>, side: usize) -> Tensor<3> {
    let [batch, channels, height, width] = pixels.dims();
    assert!(
        height.is_multiple_of(side) && width.is_multiple_of(side),
        "a picture of {height} x {width} is not made of patches of {side} x {side}"
    );
    let (rows, columns) = (height / side, width / side);
    pixels
        .reshape([batch, channels, rows, side, columns, side])
        .permute([0, 2, 4, 3, 5, 1]) // [batch, rows, columns, side, side, channels]
        .reshape([batch, rows * columns, side * side * channels])
}

/// The reverse of [`patchify`] for `rows` and `columns` of patches, channels last: `[batch, patches, side * side * channels]
/// -> [batch, rows * side, columns * side, channels]`.
///
/// # Panics
/// If the sizes do not fit.
pub fn unpatchify(patches: Tensor<3>, [rows, columns]: [usize; 2], side: usize) -> Tensor<4> {
    let [batch, found, width] = patches.dims();
    assert_eq!(found, rows * columns, "patches (left) and places of a grid of {rows} x {columns}");
    let channels = width / (side * side);
    patches
        .reshape([batch, rows, columns, side, side, channels])
        .swap_dims(2, 3) // [batch, rows, side, columns, side, channels]
        .reshape([batch, rows * side, columns * side, channels])
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Int, TensorData};

    use super::*;

    fn counted() -> Tensor<4> {
        Tensor::<1, Int>::arange(0..2 * 3 * 4 * 6, &Device::flex()).float().reshape([2, 3, 4, 6])
    }

    /// Channels stand 24 apart, rows 6.
    #[test]
    fn a_patch_is_its_pixels_row_by_row() {
        let patches = patchify(counted(), 2); // of 2 x 3 in a picture, the last: rows 2 and 3, columns 4 and 5
        let last = [16, 40, 64, 17, 41, 65, 22, 46, 70, 23, 47, 71].map(|value| value as f32);
        let found = patches.narrow(0, 0, 1).narrow(1, 5, 1).into_data();
        found.assert_eq(&TensorData::new(last.to_vec(), [1, 1, 12]), true);
    }

    #[test]
    fn patches_become_the_picture_again() {
        let back = unpatchify(patchify(counted(), 2), [2, 3], 2).permute([0, 3, 1, 2]);
        back.into_data().assert_eq(&counted().into_data(), true);
    }
}
