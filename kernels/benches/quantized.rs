//! Products of few rows with a packed matrix at the size of a 7B model's MLP, beside the twin: unpacked beforehand, and
//! Burn's own product.

use burn::tensor::module::linear;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use volary_kernels::ops::{PackedMatrix, Quantization, quantized_linear};

const ROWS: usize = 11008;
const COLS: usize = 4096;

fn products(criterion: &mut Criterion) {
    let device = Device::flex();
    let dense = Tensor::<2>::random([ROWS, COLS], Distribution::Normal(0.0, 0.02), &device);
    let values: Vec<f32> = dense.clone().into_data().iter().collect();
    for many in [1, 4, 64] {
        let mut group = criterion.benchmark_group(format!("{many} rows, {COLS} -> {ROWS}"));
        group.sample_size(10);
        let x = Tensor::<2>::random([many, COLS], Distribution::Normal(0.0, 1.0), &device);
        for quantization in [Quantization::INT4, Quantization::INT8] {
            let matrix = PackedMatrix::pack(quantization, [ROWS, COLS], &values);
            group.throughput(Throughput::Bytes(matrix.bytes() as u64));
            group.bench_function(quantization.to_string(), |bencher| {
                bencher.iter(|| black_box(quantized_linear(x.clone(), &matrix)))
            });
        }
        let matrix = PackedMatrix::pack(Quantization::INT4, [ROWS, COLS], &values);
        let unpacked = TensorData::new(matrix.unpack(0..ROWS), [ROWS, COLS]);
        let unpacked = Tensor::<2>::from_data(unpacked, &device);
        group.throughput(Throughput::Bytes(4 * (ROWS * COLS) as u64));
        group.bench_function("twin", |bencher| {
            bencher.iter(|| black_box(linear(x.clone(), unpacked.clone().transpose(), None)))
        });
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
