//! What products cost is counted. A test of its own, as the count is one for all threads.

use burn::tensor::{Device, Tensor};
use volary_kernels::count::Cost;
use volary_kernels::ops::moe::{Dispatch, Projection, grouped_mlp};
use volary_kernels::ops::{Activation, Bits, Mask, PackedMatrix, Quantization};
use volary_kernels::ops::{attention, convolution, linear, quantized_linear};

fn cost(work: impl FnOnce()) -> [u64; 2] {
    let before = Cost::so_far();
    work();
    let cost = Cost::so_far() - before;
    [cost.operations, cost.weights]
}

#[test]
fn products_are_counted() {
    let device = Device::flex();
    let ones = |shape: [usize; 2]| Tensor::<2>::ones(shape, &device);
    let three = |shape: [usize; 3]| Tensor::<3>::ones(shape, &device);
    let four = |shape: [usize; 4]| Tensor::<4>::ones(shape, &device);

    let found = cost(|| drop(linear(three([2, 3, 5]), ones([7, 5]), None, None)));
    assert_eq!(found, [2 * 6 * 5 * 7, 4 * 5 * 7]);

    let quantization = Quantization { bits: Bits::Eight, block: 32 };
    let packed = PackedMatrix::pack(quantization, [7, 32], &[1.0; 7 * 32]);
    let found = cost(|| drop(quantized_linear(ones([3, 32]), &packed)));
    assert_eq!(found, [2 * 3 * 32 * 7, quantization.bytes([7, 32]) as u64]);

    let found = cost(|| drop(convolution(four([2, 3, 9, 9]), four([4, 3, 3, 3]), None, 2, 1)));
    assert_eq!(found, [2 * 2 * 25 * 4 * 27, 4 * 4 * 27]);

    let keys = || four([2, 2, 11, 8]);
    let found = cost(|| drop(attention(four([2, 4, 5, 8]), keys(), keys(), &Mask::Full, None)));
    assert_eq!(found, [2 * 2 * 4 * 5 * 11 * (8 + 8), 0]);

    // of four experts, one has no rows
    let choices = [Some(0), Some(1), Some(3), Some(3), None, Some(0)];
    let dispatch = Dispatch::new(&choices, 2, 4);
    let projection = |shape: [usize; 3]| Projection { weight: three(shape), bias: None };
    let (up, down) = (projection([4, 3, 6]), projection([4, 6, 3]));
    let rows = ones([5, 3]);
    let found = cost(|| drop(grouped_mlp(rows, None, &up, &down, Activation::Relu, &dispatch)));
    assert_eq!(found, [2 * 5 * 36, 4 * 3 * 36]);
}
