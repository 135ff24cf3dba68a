use super::*;
use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};
use burn::tensor::DType;

/// `[batch, heads, kv_heads, queries, keys, d_head]`.
type Shape = [usize; 6];

const SHAPES: [Shape; 11] = [
    [1, 1, 1, 1, 1, 1],
    [2, 3, 3, 5, 5, 7],
    [2, 4, 2, 5, 9, 8],  // grouped, and the past in a cache
    [3, 4, 1, 7, 5, 3],  // one head of keys; queries that see no key
    [1, 2, 2, 6, 1, 3],  // one key
    [2, 2, 1, 1, 11, 6], // one query
    [2, 1, 1, 3, 4, 1],
    [1, 1, 1, 515, 517, 4],  // scores of more than 256 Ki: the backend's tiled path
    [1, 2, 1, 100, 330, 20], // more than a block of the own body
    [2, 1, 1, 17, 5, 70],    // wider than a panel of it, and queries that see no key
    [1, 3, 3, 16, 64, 16],   // whole panels
];

/// What a mask adds to the score of `[batch, head, query, key]`: a bias, or -∞ where the key is hidden.
fn term(mask: &Mask, queries: usize, keys: usize) -> Box<dyn Fn([usize; 4]) -> f64> {
    let shown = |shown: bool| if shown { 0.0 } else { f64::NEG_INFINITY };
    let past = move |query: usize, key: usize| key + queries <= query + keys;
    match mask {
        Mask::Full => Box::new(|_| 0.0),
        Mask::Causal => Box::new(move |[_, _, query, key]| shown(past(query, key))),
        Mask::Window(window) => {
            let window = *window;
            Box::new(move |[_, _, query, key]| {
                shown(past(query, key) && query + keys < key + queries + window)
            })
        }
        Mask::Prefix(prefix) => {
            let prefix = prefix.clone();
            Box::new(move |[row, _, query, key]| shown(past(query, key) || key < prefix[row]))
        }
        Mask::Padding(real) => {
            let real: Vec<bool> = real.clone().into_data().iter::<bool>().collect();
            Box::new(move |[row, _, _, key]| shown(real[row * keys + key]))
        }
        Mask::Visible(visible) => {
            let dims = visible.dims();
            let visible: Vec<bool> = visible.clone().into_data().iter::<bool>().collect();
            Box::new(move |place| shown(visible[index(place, dims)]))
        }
        Mask::Bias(bias) => {
            let dims = bias.dims();
            let bias = floats(bias.clone());
            Box::new(move |place| bias[index(place, dims)])
        }
        Mask::All(masks) => {
            let terms: Vec<_> = masks.iter().map(|mask| term(mask, queries, keys)).collect();
            Box::new(move |place| terms.iter().map(|term| term(place)).sum())
        }
    }
}

/// Where a place of the scores lies in something of `dims`, some of which are 1.
fn index(place: [usize; 4], dims: [usize; 4]) -> usize {
    place.iter().zip(dims).fold(0, |at, (&i, dim)| at * dim + i.min(dim - 1))
}

/// The formula in f64, loop by loop.
fn reference(q: &[f64], k: &[f64], v: &[f64], shape: Shape, mask: &Mask, scale: f64) -> Vec<f64> {
    let [batch, heads, kv_heads, queries, keys, d_head] = shape;
    let term = term(mask, queries, keys);
    let mut out = Vec::new();
    for row in 0..batch {
        for head in 0..heads {
            let kv = (row * kv_heads + head * kv_heads / heads) * keys;
            for query in 0..queries {
                let q = &q[((row * heads + head) * queries + query) * d_head..][..d_head];
                let weights: Vec<f64> = (0..keys)
                    .map(|key| {
                        let k = &k[(kv + key) * d_head..][..d_head];
                        let score: f64 = q.iter().zip(k).map(|(q, k)| q * k).sum();
                        (score * scale + term([row, head, query, key])).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                out.extend((0..d_head).map(|channel| {
                    let sum: f64 = (0..keys).map(|key| weights[key] * v[(kv + key) * d_head + channel]).sum();
                    if total > 0.0 { sum / total } else { 0.0 }
                }));
            }
        }
    }
    out
}

/// Every kind of mask and what they combine to. The first row of the padding hides every key.
fn masks([batch, heads, _, queries, keys, _]: Shape, rng: &mut fastrand::Rng, device: &Device) -> Vec<Mask> {
    let real: Vec<bool> = (0..batch * keys).map(|place| place >= keys && rng.bool()).collect();
    let real = Tensor::<1, Bool>::from_data(real.as_slice(), device).reshape([batch, keys]);
    let padding = Mask::Padding(real);
    let prefix = Mask::Prefix((0..batch).map(|_| rng.usize(0..=keys)).collect());
    let mut visible = |shape: [usize; 4]| {
        let visible: Vec<bool> = (0..shape.iter().product()).map(|_| rng.bool()).collect();
        Mask::Visible(Tensor::<1, Bool>::from_data(visible.as_slice(), device).reshape(shape))
    };
    let each_visible = visible([batch, heads, queries, keys]);
    let row_visible = visible([batch, 1, queries, keys]);
    let mut bias = |shape: [usize; 4]| {
        let values = random(shape.iter().product(), rng);
        Mask::Bias(tensor(shape, &values, device))
    };
    let full_bias = bias([batch, heads, queries, keys]);
    let head_bias = bias([1, heads, queries, keys]);
    let key_bias = bias([batch, 1, 1, keys]);
    vec![
        Mask::Full,
        Mask::Causal,
        Mask::Window(1),
        Mask::Window(3),
        Mask::All(vec![Mask::Window(4), padding.clone()]),
        prefix.clone(),
        padding.clone(),
        each_visible,
        row_visible.clone(),
        Mask::All(vec![row_visible, Mask::Causal, head_bias.clone()]),
        full_bias.clone(),
        head_bias.clone(),
        key_bias.clone(),
        Mask::All(vec![]),
        Mask::All(vec![Mask::Causal, padding.clone()]),
        Mask::All(vec![prefix.clone(), padding.clone()]),
        Mask::All(vec![Mask::Causal, prefix.clone()]),
        Mask::All(vec![full_bias, head_bias.clone(), key_bias.clone()]),
        Mask::All(vec![Mask::All(vec![prefix, padding]), Mask::Full, head_bias, key_bias]),
    ]
}

fn matches_reference(shape: Shape, seed: u64, device: &Device) {
    let [batch, heads, kv_heads, queries, keys, d_head] = shape;
    let mut rng = fastrand::Rng::with_seed(seed);
    let q = random(batch * heads * queries * d_head, &mut rng);
    let k = random(batch * kv_heads * keys * d_head, &mut rng);
    let v = random(batch * kv_heads * keys * d_head, &mut rng);
    for mask in masks(shape, &mut rng, device) {
        let scale = rng.bool().then_some(1.7);
        let found = attention(
            tensor([batch, heads, queries, d_head], &q, device),
            tensor([batch, kv_heads, keys, d_head], &k, device),
            tensor([batch, kv_heads, keys, d_head], &v, device),
            &mask,
            scale,
        );
        let scale = scale.unwrap_or(1.0 / (d_head as f64).sqrt());
        assert_close(found, &reference(&q, &k, &v, shape, &mask, scale), 1e-5);
    }
}

fn random_shapes() -> impl Iterator<Item = Shape> {
    let mut rng = fastrand::Rng::with_seed(1);
    (0..12).map(move |_| {
        let kv_heads = rng.usize(1..=3);
        let heads = kv_heads * rng.usize(1..=3);
        [rng.usize(1..=3), heads, kv_heads, rng.usize(1..=9), rng.usize(1..=19), rng.usize(1..=17)]
    })
}

#[test]
fn equals_the_formula() {
    for (seed, shape) in SHAPES.into_iter().chain(random_shapes()).enumerate() {
        matches_reference(shape, seed as u64, &Device::flex());
    }
}

#[test]
fn equals_the_formula_under_autodiff() {
    for (seed, shape) in SHAPES.into_iter().chain(random_shapes()).enumerate() {
        matches_reference(shape, seed as u64, &Device::flex().autodiff());
    }
}

#[test]
fn a_query_that_sees_nothing_gets_zeros() {
    for device in [Device::flex(), Device::flex().autodiff()] {
        let real = Tensor::<2, Bool>::from_data([[false, false, false], [true, false, true]], &device);
        let x = noise([2, 2, 3, 4], 1, &device);
        let y = attention(x.clone(), x.clone(), x, &Mask::Padding(real), None);
        assert_eq!(floats(y.clone().narrow(0, 0, 1)), [0.0; 24]);
        assert!(floats(y.narrow(0, 1, 1)).iter().all(|y| *y != 0.0 && y.is_finite()));
    }
}

/// Masks are made once, on the plain device.
#[test]
fn a_plain_mask_serves_the_autodiff_device() {
    let (plain, autodiff) = (Device::flex(), Device::flex().autodiff());
    let shape = [2, 2, 2, 3, 5, 4];
    let masks_on = |device| masks(shape, &mut fastrand::Rng::with_seed(4), device);
    let x = noise([2, 2, 5, 4], 1, &autodiff);
    for (own, other) in masks_on(&autodiff).iter().zip(&masks_on(&plain)) {
        let run = |mask| attention(x.clone().narrow(2, 0, 3), x.clone(), x.clone(), mask, None);
        assert_close(run(other), &floats(run(own)), 0.0);
    }
}

#[test]
fn a_bias_of_minus_infinity_hides() {
    for device in [Device::flex(), Device::flex().autodiff()] {
        let [q, k, v] = [1, 2, 3].map(|seed| noise([1, 2, 3, 4], seed, &device));
        let hidden = f64::NEG_INFINITY;
        let bias = tensor([1, 1, 3, 3], &[0.0, hidden, hidden, 0.0, 0.0, hidden, 0.0, 0.0, 0.0], &device);
        let causal = attention(q.clone(), k.clone(), v.clone(), &Mask::Causal, None);
        assert_close(attention(q, k, v, &Mask::Bias(bias), None), &floats(causal), 1e-6);
    }
}

#[test]
fn a_window_of_a_larger_bias_is_read_in_place() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| noise([1, 2, 3, 4], seed, &device));
    let table = noise([1, 2, 7, 9], 4, &device);
    let window = table.narrow(2, 2, 3).narrow(3, 5, 3);
    let copied = tensor([1, 2, 3, 3], &floats(window.clone()), &device);
    let expected = attention(q.clone(), k.clone(), v.clone(), &Mask::Bias(copied), None);
    assert_close(attention(q, k, v, &Mask::Bias(window), None), &floats(expected), 0.0);
}

#[test]
fn half_precision_is_close_to_f32() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| noise([2, 4, 5, 8], seed, &device));
    let (k, v) = (k.narrow(1, 0, 2), v.narrow(1, 0, 2));
    let bias = noise([1, 4, 5, 5], 4, &device);
    let mask = |bias| Mask::All(vec![Mask::Causal, Mask::Bias(bias)]);
    let expected = floats(attention(q.clone(), k.clone(), v.clone(), &mask(bias.clone()), None));
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let [q, k, v] = [&q, &k, &v].map(|x| x.clone().cast(dtype));
        for bias in [bias.clone().cast(dtype), bias.clone()] {
            let found = attention(q.clone(), k.clone(), v.clone(), &mask(bias), None);
            assert_eq!(found.dtype(), dtype);
            assert_close(found, &expected, tolerance);
        }
    }
}

#[test]
fn half_precision_of_many_queries_is_close_to_f32() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| noise([1, 2, 40, 24], seed, &device));
    for mask in [Mask::Full, Mask::Causal] {
        let expected = floats(attention(q.clone(), k.clone(), v.clone(), &mask, None));
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let [q, k, v] = [&q, &k, &v].map(|x| x.clone().cast(dtype));
            let found = attention(q, k, v, &mask, None);
            assert_eq!(found.dtype(), dtype);
            assert_close(found, &expected, tolerance);
        }
    }
}

/// What is no number is seen by those who see it, and by nobody else.
#[test]
fn what_is_no_number_stays_none() {
    let device = Device::flex();
    let [q, k, v] = [1, 2, 3].map(|seed| noise([1, 1, 20, 4], seed, &device));
    let bad = Tensor::<4>::full([1, 1, 1, 4], f32::NAN, &device);
    let k = Tensor::cat(vec![k.narrow(2, 0, 19), bad], 2);
    let found = floats(attention(q, k, v, &Mask::Causal, None));
    let (before, last) = found.split_at(19 * 4);
    assert!(before.iter().all(|value| value.is_finite()) && last.iter().all(|value| value.is_nan()));
}

/// Beside those of Burn's operations: blocks of queries whole and broken, heads that share keys, queries that see no key.
#[test]
fn gradients_agree() {
    let device = Device::flex().autodiff();
    for (causal, [batch, heads, kv_heads, queries, keys], [d_head, d_value]) in [
        (false, [2, 4, 2, 130, 75], [20, 12]),
        (true, [1, 3, 3, 64, 150], [8, 8]),
        (true, [2, 2, 1, 40, 40], [33, 16]),
        (true, [1, 1, 1, 30, 20], [8, 4]),
        (false, [1, 2, 1, 1, 1], [1, 1]),
    ] {
        let gradients = |attention: &dyn Fn([Tensor<4>; 3]) -> Tensor<4>| {
            let all = [[heads, queries, d_head], [kv_heads, keys, d_head], [kv_heads, keys, d_value]];
            let mut seed = 0;
            let all = all.map(|[heads, seq, width]| {
                seed += 1;
                noise([batch, heads, seq, width], seed, &device).require_grad()
            });
            let y = attention(all.clone());
            let gradients = (y.clone() * noise(y.dims(), 9, &device)).sum().backward();
            all.map(|x| floats(x.grad(&gradients).unwrap()))
        };
        let mask = if causal { Mask::Causal } else { Mask::Full };
        let found = gradients(&|[q, k, v]| attention(q, k, v, &mask, Some(0.7)));
        let seen =
            |query: usize| if causal { (query + 1 + keys).saturating_sub(queries).min(keys) } else { keys };
        let bias: Vec<f64> =
            (0..queries * keys).map(|at| if at % keys < seen(at / keys) { 0.0 } else { -1e30 }).collect();
        let sees: Vec<f64> = (0..queries).map(|query| if seen(query) > 0 { 1.0 } else { 0.0 }).collect();
        let expected = gradients(&|[q, k, v]| {
            let [k, v] = [k, v].map(|x| repeat_heads(x, heads / kv_heads));
            let scores = q.matmul(k.swap_dims(2, 3)) * 0.7 + tensor([1, 1, queries, keys], &bias, &device);
            let weights = burn::tensor::activation::softmax(scores, 3);
            weights.matmul(v) * tensor([1, 1, queries, 1], &sees, &device)
        });
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.len(), expected.len());
            assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5 * (1.0 + b.abs())));
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let device = Device::flex().autodiff();
    let shape = [2, 4, 2, 2, 3, 2];
    let q = noise([2, 4, 2, 2], 1, &device);
    let k = noise([2, 2, 3, 2], 2, &device);
    let v = noise([2, 2, 3, 2], 3, &device);
    let (flat_q, flat_k, flat_v) = (floats(q.clone()), floats(k.clone()), floats(v.clone()));
    for mask in masks(shape, &mut fastrand::Rng::with_seed(4), &device) {
        assert_gradient(|q| attention(q, k.clone(), v.clone(), &mask, None), q.dims(), &flat_q);
        assert_gradient(|k| attention(q.clone(), k, v.clone(), &mask, None), k.dims(), &flat_k);
        assert_gradient(|v| attention(q.clone(), k.clone(), v, &mask, None), v.dims(), &flat_v);
    }
    let bias = noise([1, 4, 1, 3], 5, &device);
    let with_bias = |bias| {
        let mask = Mask::All(vec![Mask::Causal, Mask::Bias(bias)]);
        attention(q.clone(), k.clone(), v.clone(), &mask, None)
    };
    assert_gradient(with_bias, bias.dims(), &floats(bias.clone()));
}

/// Runs attention of 4 heads over 3 tokens in a batch of 2, keys and values as given.
fn misuse(key: [usize; 4], value: [usize; 4], mask: Mask) {
    let device = Device::flex();
    let [q, k, v] = [[2, 4, 3, 8], key, value].map(|shape| Tensor::zeros(shape, &device));
    attention(q, k, v, &mask, None);
}

#[test]
#[should_panic(expected = "4 query heads do not divide into 3 key-value heads")]
fn heads_that_do_not_divide_panic() {
    misuse([2, 3, 3, 8], [2, 3, 3, 8], Mask::Full);
}

#[test]
#[should_panic(expected = "keys (left) share batch and d_head with the queries [2, 4, 3, 8]")]
fn keys_of_another_width_panic() {
    misuse([2, 4, 3, 6], [2, 4, 3, 6], Mask::Full);
}

#[test]
#[should_panic(expected = "values (left) share batch, heads and length with the keys [2, 4, 3, 8]")]
fn values_of_another_length_panic() {
    misuse([2, 4, 3, 8], [2, 4, 5, 8], Mask::Full);
}

#[test]
#[should_panic(expected = "a prefix mask has one length (left) per row of the batch")]
fn a_prefix_for_fewer_rows_panics() {
    misuse([2, 4, 3, 8], [2, 4, 3, 8], Mask::Prefix(vec![1]));
}

#[test]
#[should_panic(expected = "a padding mask (left) is [batch, keys]")]
fn padding_of_another_length_panics() {
    let real = Tensor::<2, Bool>::from_data([[true, false], [true, true]], &Device::flex());
    misuse([2, 4, 3, 8], [2, 4, 3, 8], Mask::Padding(real));
}

#[test]
#[should_panic(
    expected = "a bias of [1, 2, 3, 3] does not fit scores [batch, heads, queries, keys] of [2, 4, 3, 3]"
)]
fn a_bias_for_fewer_heads_panics() {
    misuse([2, 4, 3, 8], [2, 4, 3, 8], Mask::Bias(Tensor::zeros([1, 2, 3, 3], &Device::flex())));
}
