use burn::tensor::Tensor;
use burn::tensor::module::conv2d;
use burn::tensor::ops::ConvOptions;

use crate::count;
use crate::cpu::convolution::{Sizes, convolve};
use crate::cpu::host::{Values, by_type, is_host, tensor};

/// Convolution (LeCun et al. 1989), as networks have it: without turning the kernel.
///
/// - `x`: `[batch, in, height, width]`
/// - `weight`: `[out, in, kernel height, kernel width]`
/// - `bias`: `[out]`
///
/// The kernel moves in steps of `stride`, over a picture with a `border` of so many zeros on every side. Returns
/// `[batch, out, (height + 2 border - kernel height) / stride + 1, ...]`, rounded down.
///
/// On the CPU weights are read where they lie, in half precision too, and sums are f32; where gradients are wanted, and on
/// other devices, it is Burn's.
///
/// # Panics
/// If `weight` or `bias` does not fit, `stride` is 0, or the kernel is larger than the picture with its border.
pub fn convolution(
    x: Tensor<4>,
    weight: Tensor<4>,
    bias: Option<Tensor<1>>,
    stride: usize,
    border: usize,
) -> Tensor<4> {
    let [batch, channels_in, height, width] = x.dims();
    let [channels_out, found, kernel_height, kernel_width] = weight.dims();
    assert_eq!(found, channels_in, "channels of the kernel (left) and of the picture");
    assert!(
        stride > 0 && kernel_height * kernel_width > 0,
        "a kernel of {:?} in steps of {stride}",
        weight.dims()
    );
    if let Some(bias) = &bias {
        assert_eq!(bias.dims(), [channels_out], "a bias (left) of {channels_out} channels");
    }
    let sizes = Sizes {
        channels_in,
        picture: [height, width],
        kernel: [kernel_height, kernel_width],
        stride,
        border,
    };
    let [height, width] = sizes.output();
    let places = batch * height * width;
    count::add(places * weight.shape().num_elements(), count::bytes(&weight));
    let dtype = x.dtype();
    if !is_host(&x) || weight.dtype() != dtype {
        return conv2d(x, weight, bias, ConvOptions::new([stride; 2], [border; 2], [1, 1], 1));
    }
    let shape = [batch, channels_out, height, width];
    let bias: Option<Vec<f32>> = bias.map(|bias| bias.into_data().iter().collect());
    by_type!(dtype, T => {
        let [x, weight] = [x, weight].map(Values::<T>::held);
        tensor(convolve(&x, &weight, bias.as_deref(), sizes), shape)
    })
}

#[cfg(test)]
mod tests {
    use burn::tensor::{DType, Device};

    use super::*;
    use crate::testing::{assert_close, floats, noise, tensor};

    /// The kernel is not turned, and the border is zeros.
    #[test]
    fn literal() {
        let x = tensor([1, 1, 2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &Device::flex());
        let weight = tensor([2, 1, 1, 2], &[1.0, 10.0, 0.0, -1.0], &Device::flex());
        let bias = tensor([2], &[0.5, 0.0], &Device::flex());
        let found = convolution(x.clone(), weight.clone(), Some(bias), 1, 0);
        assert_eq!(found.dims(), [1, 2, 2, 2]);
        assert_close(found, &[21.5, 32.5, 54.5, 65.5, -2.0, -3.0, -5.0, -6.0], 0.0);
        // every second place of rows and columns with a zero around
        let found = convolution(x, weight.narrow(0, 0, 1), None, 2, 1);
        assert_eq!(found.dims(), [1, 1, 2, 2]);
        assert_close(found, &[0.0, 0.0, 40.0, 65.0], 0.0);
    }

    /// Beside Burn's: odd and even sides, more than a tile, a block and a panel of everything, pictures of one pixel.
    #[test]
    fn bodies_agree() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut cases = vec![
            // batch, in, out, height, width, kernel, stride, border
            [1, 70, 25, 17, 19, 3, 3, 1, 1],
            [2, 40, 7, 9, 8, 5, 5, 2, 2],
            [1, 3, 100, 64, 5, 3, 3, 1, 1],
            [3, 600, 13, 1, 1, 1, 1, 1, 0],
            [1, 130, 6, 8, 8, 3, 3, 1, 1],
        ];
        for _ in 0..60 {
            let mut up_to = |most| random.usize(1..=most);
            let (height, width, kernel, across) = (up_to(20), up_to(20), up_to(4), up_to(4));
            let border = (kernel.max(across)) / 2;
            cases.push([up_to(3), up_to(30), up_to(15), height, width, kernel, across, up_to(3), border]);
        }
        for [batch, channels_in, channels_out, height, width, kernel, across, stride, border] in cases {
            let x = noise([batch, channels_in, width, height], 1, &Device::flex()).swap_dims(2, 3);
            let weight = noise([channels_out + 1, channels_in, kernel, across], 2, &Device::flex());
            let weight = weight.narrow(0, 1, channels_out);
            let bias = noise([channels_out], 3, &Device::flex());
            let options = ConvOptions::new([stride; 2], [border; 2], [1, 1], 1);
            for (dtype, tolerance) in [(DType::F32, 2e-6), (DType::F16, 1e-3), (DType::BF16, 8e-3)] {
                let [x, weight] = [&x, &weight].map(|tensor| tensor.clone().cast(dtype));
                let bias = bias.clone().cast(dtype);
                let found = convolution(x.clone(), weight.clone(), Some(bias.clone()), stride, border);
                assert_eq!(found.dtype(), dtype);
                let [x, weight] = [x, weight].map(|tensor| tensor.cast(DType::F32));
                let expected = conv2d(x, weight, Some(bias.cast(DType::F32)), options.clone());
                assert_eq!(found.dims(), expected.dims());
                let inner = (channels_in * kernel * across) as f64;
                assert_close(found, &floats(expected), tolerance * inner.sqrt().max(2.0));
            }
        }
    }

    /// What one picture gives does not depend on its neighbours, bit by bit.
    #[test]
    fn a_batch_is_its_pictures() {
        let x = noise([3, 5, 9, 31], 1, &Device::flex());
        let weight = noise([61, 5, 3, 3], 2, &Device::flex());
        let both = convolution(x.clone(), weight.clone(), None, 1, 1);
        for at in 0..3 {
            let one = convolution(x.clone().narrow(0, at, 1), weight.clone(), None, 1, 1);
            assert_close(one, &floats(both.clone().narrow(0, at, 1)), 0.0);
        }
    }

    #[test]
    fn nothing_may_be_empty_but_the_batch() {
        let weight = noise([2, 3, 3, 3], 1, &Device::flex());
        let x = tensor([0, 3, 4, 4], &[], &Device::flex());
        assert_eq!(convolution(x, weight, None, 1, 1).dims(), [0, 2, 4, 4]);
    }

    #[test]
    #[should_panic(expected = "a kernel of [3, 3] on a picture of [1, 9]")]
    fn a_kernel_fits_into_the_picture() {
        let _ = convolution(
            noise([1, 1, 1, 9], 1, &Device::flex()),
            noise([1, 1, 3, 3], 2, &Device::flex()),
            None,
            1,
            0,
        );
    }
}
