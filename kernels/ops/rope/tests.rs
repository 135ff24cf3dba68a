use super::*;
use crate::testing::{assert_close, assert_gradient, floats, noise, tensor};

const PAIRINGS: [Pairing; 2] = [Pairing::Half, Pairing::Interleaved];

fn rope(d_rot: usize, positions: usize, pairing: Pairing) -> Rope {
    RopeConfig::new(d_rot, positions).with_pairing(pairing).init(&Device::flex())
}

fn each(positions: &[&[i32]]) -> Positions {
    let flat = positions.concat();
    let shape = [positions.len(), positions[0].len()];
    Positions::Each(Tensor::from_data(TensorData::new(flat, shape), &Device::flex()))
}

/// 1, 2, 3, 4 at positions 1 and 3; by the formula in Python's floats, frequencies 1 and 0.01.
#[test]
fn literals() {
    let x = tensor([1, 1, 2, 4], &[1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0], &Device::flex());
    let half = [
        [-1.984110649, 1.959900667, 2.462377902, 4.019799668],
        [-1.413352521, 1.879118067, -2.828857482, 4.058191135],
    ];
    let interleaved = [
        [-1.142639664, 1.922075597, 2.959850668, 4.029799502],
        [-1.272232513, -1.838864985, 2.878668100, 4.088186636],
    ];
    for (pairing, expected) in PAIRINGS.into_iter().zip([half, interleaved]) {
        let turned = rope(4, 4, pairing).apply(x.clone(), &each(&[&[1, 3]]));
        assert_close(turned, &expected.concat(), 1e-6);
    }
}

/// Llama 3.2's settings; by `_compute_llama3_parameters` of transformers in Python's floats. Pairs 0 and 14 turn
/// often enough, 15 to 17 lie between, 18 and 31 are slow.
#[test]
fn scaled_frequencies() {
    let scaling =
        RopeScaling::Llama3(Llama3Scaling { factor: 32.0, low: 1.0, high: 4.0, pretrained: 8192.0 });
    let scaled = scaling.frequencies(64, 500_000.0, 1);
    for (pair, expected) in [
        (0, 1.0),
        (14, 0.003211445994752591),
        (15, 0.001290547928209264),
        (16, 0.00042955679655936815),
        (17, 9.70828780262767e-05),
        (18, 1.9461638184831125e-05),
        (31, 9.41830672543491e-08),
    ] {
        let found = scaled[pair];
        assert!((found / expected - 1.0).abs() < 1e-12, "pair {pair}: {found}, not {expected}");
    }
    assert_eq!(RopeScaling::Linear(4.0).frequencies(2, 10.0, 1), [0.25]);
    assert_eq!(RopeScaling::Unscaled.frequencies(2, 10.0, 1), [1.0]);
}

#[track_caller]
fn assert_frequencies(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    let close = |(found, expected): (&f64, &f64)| (found / expected - 1.0).abs() < 1e-12;
    assert!(found.iter().zip(expected).all(close), "{found:?}, not {expected:?}");
}

/// By `_compute_yarn_parameters` of transformers in Python's floats.
#[test]
fn yarn_slows_the_pairs_that_turn_seldom() {
    let scaling = YarnScaling {
        factor: 4.0,
        fast: 8.0,
        slow: 1.0,
        pretrained: 64.0,
        magnitude: 1.25,
        whole_pairs: true,
    };
    let found = RopeScaling::Yarn(scaling).frequencies(16, 1000.0, 1);
    let slow = [
        0.018747355233311395,
        0.007905694150420948,
        0.00333380358040831,
        0.0014058533129758727,
        0.0005928434264154137,
    ];
    assert_frequencies(&found, &[&[1.0, 0.3162723775714368, 0.08891397050194613], &slow[..]].concat());
    let scaling = YarnScaling { whole_pairs: false, ..scaling };
    let found = RopeScaling::Yarn(scaling).frequencies(16, 1000.0, 1);
    assert_frequencies(&found, &[&[1.0, 0.3271079572503725, 0.08255919119644803], &slow[..]].concat());

    // and all of a head is longer
    let rope = RopeConfig::new(16, 4).with_scaling(RopeScaling::Yarn(scaling)).init(&Device::flex());
    let x = noise([1, 1, 4, 16], 1, &Device::flex());
    let norm = |x: Tensor<4>| x.square().sum_dim(3).sqrt();
    let expected = norm(x.clone()) * 1.25;
    assert_close(norm(rope.apply(x, &Positions::From(0))), &floats(expected), 1e-5);
}

/// By `_compute_dynamic_ntk_parameters` of transformers in Python's floats.
#[test]
fn the_base_grows_with_the_text() {
    let scaling = RopeScaling::Dynamic(DynamicScaling { factor: 2.0, pretrained: 8.0 });
    let plain = [1.0, 0.17782794100389226, 0.03162277660168379, 0.005623413251903491];
    assert_frequencies(&scaling.frequencies(8, 1000.0, 3), &plain);
    assert_frequencies(&scaling.frequencies(8, 1000.0, 8), &plain);
    let grown = [1.0, 0.14756634381891678, 0.02177582582808276, 0.0032133790010877095];
    assert_frequencies(&scaling.frequencies(8, 1000.0, 11), &grown);
    assert_eq!(scaling.frequencies(2, 1000.0, 11), [1.0]);
}

/// Interpolated by 2, position 6 is position 3.
#[test]
fn the_table_is_of_the_scaled_frequencies() {
    let linear = RopeConfig::new(8, 8).with_scaling(RopeScaling::Linear(2.0)).init(&Device::flex());
    let plain = rope(8, 4, Pairing::Half);
    assert_close(linear.sin.narrow(0, 6, 1), &floats(plain.sin.narrow(0, 3, 1)), 1e-7);
}

#[test]
fn position_zero_is_the_identity_and_norms_stay() {
    let x = noise([2, 3, 5, 8], 1, &Device::flex());
    for pairing in PAIRINGS {
        let turned = rope(8, 5, pairing).apply(x.clone(), &Positions::From(0));
        let first = |x: Tensor<4>| floats(x.narrow(2, 0, 1));
        assert_eq!(first(turned.clone()), first(x.clone()));
        let norm = |x: Tensor<4>| x.square().sum_dim(3);
        assert_close(norm(turned), &floats(norm(x.clone())), 1e-5);
    }
}

/// The product of a query at `m` and a key at `n` is that at `m + 40` and `n + 40`, and not that at `m + 1`.
#[test]
fn products_depend_on_the_difference_only() {
    let [q, k] = [1, 2].map(|seed| noise([1, 1, 1, 16], seed, &Device::flex()));
    for pairing in PAIRINGS {
        let rope = rope(16, 64, pairing);
        let product = |m: usize, n: usize| {
            let q = rope.apply(q.clone(), &Positions::From(m));
            let k = rope.apply(k.clone(), &Positions::From(n));
            (q * k).sum().into_scalar::<f64>()
        };
        for (m, n) in [(0, 0), (3, 1), (2, 17)] {
            assert!((product(m, n) - product(m + 40, n + 40)).abs() < 2e-6);
            assert!((product(m, n) - product(m + 1, n)).abs() > 1e-3);
        }
    }
}

/// A checkpoint neither stores nor misses it.
#[test]
fn a_table_is_no_parameter() {
    assert_eq!(rope(8, 5, Pairing::Half).num_params(), 0);
}

#[test]
fn positions_per_row_are_those_of_the_offset() {
    let x = noise([2, 2, 3, 8], 1, &Device::flex());
    for pairing in PAIRINGS {
        let rope = rope(8, 9, pairing);
        let found = rope.apply(x.clone(), &each(&[&[4, 5, 6], &[0, 1, 2]]));
        for (row, first) in [(0, 4), (1, 0)] {
            let alone = rope.apply(x.clone().narrow(0, row, 1), &Positions::From(first));
            assert_close(found.clone().narrow(0, row, 1), &floats(alone), 0.0);
        }
        let shared = rope.apply(x.clone(), &each(&[&[4, 5, 6]]));
        assert_close(shared, &floats(rope.apply(x.clone(), &Positions::From(4))), 0.0);
    }
}

/// The body for the CPU beside tensor operations, which an autodiff device gets.
#[test]
fn bodies_agree() {
    let (plain, tracked) = (Device::flex(), Device::flex().autodiff());
    for pairing in [Pairing::Half, Pairing::Interleaved] {
        for (d_rot, [batch, heads, seq, d_head]) in
            [(2, [1, 1, 1, 2]), (6, [2, 3, 5, 9]), (64, [3, 2, 1, 64])]
        {
            let config = RopeConfig::new(d_rot, 20).with_pairing(pairing);
            let ids: Vec<i64> = (0..(batch * seq) as i64).map(|at| at * 7 % 20).collect();
            let turned = |positions: &dyn Fn(&Device) -> Positions, device: &Device| {
                let x = noise([batch, seq, heads, d_head], 1, device).swap_dims(1, 2);
                floats(config.init(device).apply(x, &positions(device)))
            };
            let all = |device: &Device| {
                let ids = Tensor::<1, Int>::from_data(&ids[..], device);
                Positions::Each(ids.reshape([batch, seq]))
            };
            let from = |_: &Device| Positions::From(7);
            for positions in [&all as &dyn Fn(&Device) -> Positions, &from] {
                let expected = turned(positions, &tracked);
                for (found, expected) in turned(positions, &plain).iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-6, "{pairing:?} {d_rot}: {found} {expected}");
                }
            }
        }
    }
}

#[test]
fn partial_rotation_leaves_the_rest() {
    let x = noise([1, 2, 3, 10], 1, &Device::flex());
    for pairing in PAIRINGS {
        let rope = rope(6, 8, pairing);
        let turned = rope.apply(x.clone(), &Positions::From(5));
        assert_eq!(floats(turned.clone().narrow(3, 6, 4)), floats(x.clone().narrow(3, 6, 4)));
        let alone = rope.apply(x.clone().narrow(3, 0, 6), &Positions::From(5));
        assert_close(turned.narrow(3, 0, 6), &floats(alone), 0.0);
    }
}

#[test]
fn half_precision_is_turned_in_f32() {
    let rope = rope(8, 4000, Pairing::Half);
    let x = noise([1, 1, 2, 8], 1, &Device::flex());
    for (dtype, tolerance) in [(DType::F16, 5e-4), (DType::BF16, 4e-3)] {
        let x = x.clone().cast(dtype);
        let expected = rope.apply(x.clone().cast(DType::F32), &Positions::From(3998));
        let found = rope.apply(x, &Positions::From(3998));
        assert_eq!(found.dtype(), dtype);
        assert_close(found, &floats(expected), tolerance);
    }
}

#[test]
fn gradients_match_finite_differences() {
    let x = floats(noise::<4>([1, 2, 2, 6], 1, &Device::flex()));
    for pairing in PAIRINGS {
        let rope = rope(4, 4, pairing);
        assert_gradient(|x| rope.apply(x, &Positions::From(1)), [1, 2, 2, 6], &x);
        assert_gradient(|x| rope.apply(x, &each(&[&[3, 0]])), [1, 2, 2, 6], &x);
    }
}

/// Row 2, column 1 of a 3x4 grid: half of the channels as at position 2, the other half as at position 1.
#[test]
fn a_grid_is_a_line_along_each_axis() {
    let (rows, cols) = (3, 4);
    let x = noise([1, 2, 1 + rows * cols, 8], 1, &Device::flex());
    let grid = GridRopeConfig::new(8, rows, cols).with_class_tokens(1).init(&Device::flex());
    let line = rope(4, 4, Pairing::Interleaved);
    let turned = grid.apply(x.clone(), &Positions::From(0));
    assert_eq!(floats(turned.clone().narrow(2, 0, 1)), floats(x.clone().narrow(2, 0, 1)));
    for row in 0..rows {
        for col in 0..cols {
            let patch =
                |x: &Tensor<4>, channel| x.clone().narrow(2, 1 + row * cols + col, 1).narrow(3, channel, 4);
            for (channel, position) in [(0, row), (4, col)] {
                let expected = line.apply(patch(&x, channel), &Positions::From(position));
                assert_close(patch(&turned, channel), &floats(expected), 0.0);
            }
        }
    }
}

/// A grid of twice the pretrained side walks in half steps.
#[test]
fn a_larger_grid_is_spread_over_the_pretrained_one() {
    let pretrained = GridRopeConfig::new(8, 3, 3).init(&Device::flex());
    let fine = GridRopeConfig::new(8, 6, 6).with_pretrained_side(Some(3)).init(&Device::flex());
    for (row, col) in [(0, 0), (1, 2), (2, 1)] {
        let coarse = pretrained.sin.clone().narrow(0, row * 3 + col, 1);
        assert_close(fine.sin.clone().narrow(0, row * 12 + col * 2, 1), &floats(coarse), 1e-7);
    }
}

/// Dropped patches keep the angles of their places.
#[test]
fn a_subset_of_patches_turns_as_in_the_whole() {
    let x = noise([1, 1, 10, 4], 1, &Device::flex());
    let grid = GridRopeConfig::new(4, 3, 3).with_class_tokens(1).init(&Device::flex());
    let whole = grid.apply(x.clone(), &Positions::From(0));
    let kept = Tensor::from_data([0, 2, 9], &Device::flex());
    let subset = grid.apply(x.select(2, kept.clone()), &each(&[&[0, 2, 9]]));
    assert_close(subset, &floats(whole.select(2, kept)), 0.0);
}

#[test]
#[should_panic(expected = "positions 3..5 are beyond a rotary table of 4")]
fn a_sequence_beyond_the_table_panics() {
    rope(4, 4, Pairing::Half).apply(Tensor::zeros([1, 1, 2, 4], &Device::flex()), &Positions::From(3));
}

#[test]
#[should_panic]
fn a_position_beyond_the_table_panics() {
    rope(4, 4, Pairing::Half).apply(Tensor::zeros([1, 1, 2, 4], &Device::flex()), &each(&[&[0, 4]]));
}

#[test]
#[should_panic(expected = "positions are [1, 3], the sequence is [1, 2]")]
fn positions_of_another_length_panic() {
    rope(4, 4, Pairing::Half).apply(Tensor::zeros([1, 1, 2, 4], &Device::flex()), &each(&[&[0, 1, 2]]));
}

#[test]
#[should_panic(expected = "6 channels turn, but a head has 4")]
fn a_head_narrower_than_the_rotation_panics() {
    rope(6, 4, Pairing::Half).apply(Tensor::zeros([1, 1, 2, 4], &Device::flex()), &Positions::From(0));
}
