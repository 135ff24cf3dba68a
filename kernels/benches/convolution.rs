//! Convolutions, matrices in bf16 and attention at the sizes of Stable Diffusion's U-Net, each beside Burn's.

use std::hint::black_box;

use burn::tensor::ops::{AttentionModuleOptions, ConvOptions};
use burn::tensor::{DType, Device, Distribution, Tensor, module};
use criterion::{Criterion, criterion_group, criterion_main};
use volary_kernels::ops::{Mask, attention, convolution, linear};

fn noise<const D: usize>(shape: [usize; D], dtype: DType) -> Tensor<D> {
    Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex()).cast(dtype)
}

/// Channels in and out, the picture's side, the kernel's, and the stride.
fn convolutions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("convolution");
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16)] {
        for [channels_in, channels_out, side, kernel, stride] in
            [[320, 320, 64, 3, 1], [320, 320, 64, 3, 2], [1280, 1280, 8, 3, 1], [320, 320, 64, 1, 1]]
        {
            let x = noise([1, channels_in, side, side], dtype);
            let weight = noise([channels_out, channels_in, kernel, kernel], dtype);
            let options = ConvOptions::new([stride; 2], [kernel / 2; 2], [1, 1], 1);
            let name = format!("{name}, {channels_in} of {side}x{side}, kernel {kernel}, stride {stride}");
            group.bench_function(&name, |bencher| {
                let run = || convolution(x.clone(), weight.clone(), None, stride, kernel / 2);
                bencher.iter(|| black_box(run()))
            });
            group.bench_function(format!("{name}, Burn"), |bencher| {
                bencher.iter(|| black_box(module::conv2d(x.clone(), weight.clone(), None, options.clone())))
            });
        }
    }
}

fn matrices(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("linear");
    for [rows, d_in, d_out] in [[4096, 320, 1280], [256, 1280, 1280], [1, 1280, 1280]] {
        let (x, weight) = (noise([rows, d_in], DType::BF16), noise([d_out, d_in], DType::BF16));
        let name = format!("bf16, {rows} x {d_in} x {d_out}");
        group.bench_function(&name, |bencher| {
            bencher.iter(|| black_box(linear(x.clone(), weight.clone(), None, None)))
        });
        group.bench_function(format!("{name}, Burn"), |bencher| {
            bencher.iter(|| black_box(module::linear(x.clone(), weight.clone().transpose(), None)))
        });
    }
}

fn attentions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    for [queries, keys, d_head] in [[1024, 1024, 80], [1024, 77, 80]] {
        let query = noise([1, 8, queries, d_head], DType::F32);
        let [key, value] = [(); 2].map(|()| noise([1, 8, keys, d_head], DType::F32));
        let name = format!("{queries} x {keys} x {d_head}");
        group.bench_function(&name, |bencher| {
            let run = || attention(query.clone(), key.clone(), value.clone(), &Mask::Full, None);
            bencher.iter(|| black_box(run()))
        });
        group.bench_function(format!("{name}, Burn"), |bencher| {
            let options = AttentionModuleOptions::default();
            let run = || module::attention(query.clone(), key.clone(), value.clone(), None, None, options);
            bencher.iter(|| black_box(run()))
        });
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10);
    targets = convolutions, matrices, attentions
}
criterion_main!(benches);
