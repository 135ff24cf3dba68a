//! A mixture of experts beside its twins: an MLP of as many products, and every token through its experts alone; and as
//! experts get more while tokens stay as many.

use burn::tensor::{Device, Distribution, Tensor};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use volary_kernels::layers::MlpConfig;
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase};
use volary_kernels::ops::Activation;

const TOKENS: usize = 2048;
const D_MODEL: usize = 512;
const D_FF: usize = 2048;
const TOP_K: usize = 2;

fn layer(n_experts: usize, device: &Device) -> Moe {
    let gate = Gate::Naive(NaiveGate::new(D_MODEL, n_experts, TOP_K, device));
    MoeConfig::new(n_experts, D_MODEL, D_FF).init(gate, Activation::Gelu, device)
}

fn forward(layer: &Moe, x: Tensor<2>) -> Tensor<2> {
    layer.forward(x, Phase::Eval, &mut Noise::Seeded(0)).0
}

fn layers(criterion: &mut Criterion) {
    let device = Device::flex();
    let x = Tensor::<2>::random([TOKENS, D_MODEL], Distribution::Normal(0.0, 1.0), &device);
    let mut group = criterion.benchmark_group(format!("{TOKENS} tokens, {D_MODEL} -> {D_FF}, top {TOP_K}"));
    group.sample_size(10);
    let dense = MlpConfig::new(D_MODEL, TOP_K * D_FF).init(&device);
    group.bench_function("dense", |bencher| {
        bencher.iter(|| black_box(dense.forward(x.clone(), Activation::Gelu)))
    });
    let eight = layer(8, &device);
    group.bench_function("token by token", |bencher| {
        bencher.iter(|| {
            for token in 0..TOKENS {
                black_box(forward(&eight, x.clone().narrow(0, token, 1)));
            }
        })
    });
    for n_experts in [8, 16, 64, 256] {
        let layer = layer(n_experts, &device);
        group.bench_function(BenchmarkId::new("experts", n_experts), |bencher| {
            bencher.iter(|| black_box(forward(&layer, x.clone())))
        });
    }
}

criterion_group!(benches, layers);
criterion_main!(benches);
