//! Convolutions.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use volary_kernels::ops::convolution;

/// A 3x3 convolution, channels last, with a border of zeros.
#[derive(Module, Debug)]
pub struct Conv3x3 {
    /// `[out, in, 3, 3]`.
    pub weight: Param<Tensor<4>>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<1>>>,
    stride: usize,
}

impl Conv3x3 {
    /// An untrained convolution without a bias.
    pub fn new(channels_in: usize, channels_out: usize, stride: usize, device: &Device) -> Self {
        let std = (2.0 / (9 * channels_in) as f64).sqrt();
        let weight = Initializer::Normal { mean: 0.0, std }.init([channels_out, channels_in, 3, 3], device);
        Self { weight, bias: None, stride }
    }

    /// The same with a bias of zeros.
    pub fn with_bias(self, device: &Device) -> Self {
        let channels_out = self.weight.lazy_shape().as_slice()[0];
        Self { bias: Some(Initializer::Zeros.init([channels_out], device)), ..self }
    }

    /// `[batch, height, width, in] -> [batch, height / stride, width / stride, out]`.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        convolution(x.permute([0, 3, 1, 2]), self.weight.val(), bias, self.stride, 1).permute([0, 2, 3, 1])
    }
}

/// A square convolution with a bias, channels first, with a border of zeros.
#[derive(Module, Debug)]
pub struct Conv {
    /// `[out, in, side, side]`.
    pub weight: Param<Tensor<4>>,
    /// `[out]`.
    pub bias: Param<Tensor<1>>,
    stride: usize,
    border: usize,
}

impl Conv {
    /// An untrained convolution by `side x side`, an odd number, that keeps a picture's size: weight and bias uniform in
    /// `±1/√(in side²)`. Nothing is allocated before first use.
    pub fn new(channels_in: usize, channels_out: usize, side: usize, device: &Device) -> Self {
        let bound = 1.0 / ((channels_in * side * side) as f64).sqrt();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        Self {
            weight: uniform.init([channels_out, channels_in, side, side], device),
            bias: uniform.init([channels_out], device),
            stride: 1,
            border: side / 2,
        }
    }

    /// The same in steps of `stride`, with a border of so many zeros.
    pub fn strided(self, stride: usize, border: usize) -> Self {
        Self { stride, border, ..self }
    }

    /// `[batch, in, height, width] -> [batch, out, height / stride, width / stride]`, rounded as the border has it.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        convolution(x, self.weight.val(), Some(self.bias.val()), self.stride, self.border)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;

    /// The sum of the neighbours, and 10 more: a picture of ones has 4, 6 or 9 of them.
    #[test]
    fn sums_of_neighbours_and_a_bias() {
        let device = Device::flex();
        let conv = Conv3x3 {
            weight: Param::from_tensor(Tensor::ones([1, 1, 3, 3], &device)),
            bias: Some(Param::from_tensor(Tensor::full([1], 10.0, &device))),
            stride: 1,
        };
        let expected = vec![14.0_f32, 16.0, 14.0, 16.0, 19.0, 16.0, 14.0, 16.0, 14.0];
        let found = conv.forward(Tensor::ones([1, 3, 3, 1], &device));
        found.into_data().assert_eq(&TensorData::new(expected, [1, 3, 3, 1]), true);
    }
}
