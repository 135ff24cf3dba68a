//! Attention and the layers at the sizes of CLIP B/32, each beside the plain composition of tensor operations.

use burn::tensor::{Device, Distribution, Tensor, activation::softmax};
use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use volary_kernels::layers::{AttentionConfig, LayerNorm, Linear, LinearConfig, MlpConfig, RmsNorm};
use volary_kernels::ops::{Activation, Mask, Positions, RopeConfig, attention};

const BATCH: usize = 4;
const D_MODEL: usize = 768;
const N_HEADS: usize = 12;
const D_HEAD: usize = D_MODEL / N_HEADS;
/// 7 x 7 patches and the class token.
const PATCHES: usize = 50;
/// The text tower's length.
const TOKENS: usize = 77;

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
}

fn plain_attention(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, mask: Option<Tensor<4>>) -> Tensor<4> {
    let scores = q.matmul(k.transpose()) / (D_HEAD as f64).sqrt();
    let scores = match mask {
        Some(mask) => scores + mask,
        None => scores,
    };
    softmax(scores, 3).matmul(v)
}

fn plain_linear(linear: &Linear, x: Tensor<3>) -> Tensor<3> {
    let bias = linear.bias.as_ref().expect("the benched layers have one").val();
    x.matmul(linear.weight.val().transpose().unsqueeze()) + bias.unsqueeze()
}

fn plain_layer_norm(norm: &LayerNorm, x: Tensor<3>) -> Tensor<3> {
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2);
    let bias = norm.bias.as_ref().expect("the benched layers have one").val();
    centred / (variance + 1e-5).sqrt() * norm.weight.val().unsqueeze() + bias.unsqueeze()
}

fn attentions(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let [q, k, v] = [(); 3].map(|()| noise([BATCH, N_HEADS, PATCHES, D_HEAD]));
    group.bench_function("patches", |bencher| {
        bencher.iter(|| black_box(attention(q.clone(), k.clone(), v.clone(), &Mask::Full, None)))
    });
    group.bench_function("patches, plain", |bencher| {
        bencher.iter(|| black_box(plain_attention(q.clone(), k.clone(), v.clone(), None)))
    });

    let [q, k, v] = [(); 3].map(|()| noise([BATCH, N_HEADS, TOKENS, D_HEAD]));
    let future = Tensor::<2>::full([TOKENS, TOKENS], f32::NEG_INFINITY, &Device::flex()).triu(1);
    let future = future.unsqueeze::<4>();
    group.bench_function("causal tokens", |bencher| {
        bencher.iter(|| black_box(attention(q.clone(), k.clone(), v.clone(), &Mask::Causal, None)))
    });
    group.bench_function("causal tokens, plain", |bencher| {
        bencher.iter(|| black_box(plain_attention(q.clone(), k.clone(), v.clone(), Some(future.clone()))))
    });

    let rope = RopeConfig::new(D_HEAD, TOKENS).init(&Device::flex());
    group.bench_function("rope", |bencher| {
        bencher.iter(|| black_box(rope.apply(q.clone(), &Positions::From(0))))
    });
}

fn layers(criterion: &mut Criterion) {
    let device = Device::flex();
    let mut group = criterion.benchmark_group("layers");
    let x = noise([BATCH, PATCHES, D_MODEL]);

    let linear = LinearConfig::new(D_MODEL, 4 * D_MODEL).init(&device);
    group.bench_function("linear", |bencher| bencher.iter(|| black_box(linear.forward(x.clone()))));
    group.bench_function("linear, plain", |bencher| {
        bencher.iter(|| black_box(plain_linear(&linear, x.clone())))
    });

    let norm = LayerNorm::new(D_MODEL, 1e-5, &device);
    group.bench_function("layer norm", |bencher| bencher.iter(|| black_box(norm.forward(x.clone()))));
    group.bench_function("layer norm, plain", |bencher| {
        bencher.iter(|| black_box(plain_layer_norm(&norm, x.clone())))
    });
    let norm = RmsNorm::new(D_MODEL, 1e-5, &device);
    group.bench_function("rms norm", |bencher| bencher.iter(|| black_box(norm.forward(x.clone()))));

    let mlp = MlpConfig::new(D_MODEL, 4 * D_MODEL).init(&device);
    group.bench_function("mlp", |bencher| {
        bencher.iter(|| black_box(mlp.forward(x.clone(), Activation::QuickGelu)))
    });
    group.bench_function("mlp, plain", |bencher| {
        bencher.iter(|| {
            let hidden = Activation::QuickGelu.forward(plain_linear(&mlp.up, x.clone()));
            black_box(plain_linear(&mlp.down, hidden))
        })
    });

    let layer = AttentionConfig::new(D_MODEL, N_HEADS).init(&device);
    group.bench_function("attention", |bencher| {
        bencher.iter(|| black_box(layer.forward(x.clone(), &Mask::Full)))
    });
    group.bench_function("attention, plain", |bencher| {
        bencher.iter(|| {
            let heads = |linear| {
                plain_linear(linear, x.clone()).reshape([BATCH, PATCHES, N_HEADS, D_HEAD]).swap_dims(1, 2)
            };
            let [q, k, v] = [&layer.query, &layer.key, &layer.value].map(heads);
            let joined = plain_attention(q, k, v, None).swap_dims(1, 2).reshape([BATCH, PATCHES, D_MODEL]);
            black_box(plain_linear(&layer.output, joined))
        })
    });
}

criterion_group!(benches, attentions, layers);
criterion_main!(benches);
