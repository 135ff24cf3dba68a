//! Products with a packed matrix at the sizes of MLPs, beside those with the matrix in f32: one row, and many.

use std::hint::black_box;
use std::time::Duration;

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use volary_kernels::ops::{PackedMatrix, Quantization, linear, quantized_linear};

/// `[rows, cols]`.
const SHAPES: [[usize; 2]; 3] = [[4864, 1024], [1024, 2816], [11008, 4096]];

fn products(criterion: &mut Criterion) {
    let device = Device::flex();
    for [rows, cols] in SHAPES {
        let dense = Tensor::<2>::random([rows, cols], Distribution::Normal(0.0, 0.02), &device);
        let values: Vec<f32> = dense.clone().into_data().iter().collect();
        let packed = [Quantization::INT8, Quantization::INT4]
            .map(|quantization| PackedMatrix::pack(quantization, [rows, cols], &values));
        for many in [1, 4, 5, 16, 128, 512] {
            let mut group = criterion.benchmark_group(format!("{many} rows, {cols} -> {rows}"));
            group.sample_size(10).warm_up_time(Duration::from_millis(300));
            group.measurement_time(Duration::from_secs(1));
            group.throughput(Throughput::Elements((many * rows * cols) as u64));
            let x = Tensor::<2>::random([many, cols], Distribution::Normal(0.0, 1.0), &device);
            group.bench_function("f32", |bencher| {
                bencher.iter(|| black_box(linear(x.clone(), dense.clone(), None, None)))
            });
            for matrix in &packed {
                group.bench_function(matrix.quantization().to_string(), |bencher| {
                    bencher.iter(|| black_box(quantized_linear(x.clone(), matrix)))
                });
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
