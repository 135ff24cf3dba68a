use burn::tensor::DType;

use super::*;
use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};

fn param<const D: usize>(shape: [usize; D], values: &[f64]) -> Param<Tensor<D>> {
    Param::from_tensor(tensor(shape, values, &Device::flex()))
}

fn layer_norm(eps: f64) -> LayerNorm {
    LayerNorm {
        weight: param([4], &[1.0, 2.0, -1.0, 0.5]),
        bias: Some(param([4], &[0.1, 0.2, 0.3, 0.4])),
        eps,
    }
}

fn rms_norm(eps: f64) -> RmsNorm {
    RmsNorm { weight: param([4], &[1.0, 2.0, -1.0, 0.5]), eps }
}

/// Mean 3.5, variance 5.25, eps 0.5.
#[test]
fn layer_norm_literal() {
    let x = tensor([1, 4], &[1.0, 2.0, 4.0, 7.0], &Device::flex());
    let expected = [-0.9425720703, -1.0510864843, 0.0914855859, 1.1298004492];
    assert_close(layer_norm(0.5).forward(x.clone()), &expected, 1e-6);
    let unbiased = LayerNorm { bias: None, ..layer_norm(0.5) };
    let expected = [-1.0425720703, -1.2510864843, -0.2085144141, 0.7298004492];
    assert_close(unbiased.forward(x), &expected, 1e-6);
}

/// Mean square 17.5, eps 0.5: divided by √18.
#[test]
fn rms_norm_literal() {
    let x = tensor([1, 4], &[1.0, 2.0, 4.0, 7.0], &Device::flex());
    let expected = [0.2357022604, 0.9428090416, -0.9428090416, 0.8249579114];
    assert_close(rms_norm(0.5).forward(x), &expected, 1e-6);
}

/// The sum is what both tests above normalise.
#[test]
fn norms_of_sums_are_literal() {
    let of = |values: [f64; 4]| tensor([1, 4], &values, &Device::flex());
    let (x, y) = (of([0.0, 4.0, 2.5, 3.0]), of([1.0, -2.0, 1.5, 4.0]));
    let layer = [-0.9425720703, -1.0510864843, 0.0914855859, 1.1298004492];
    let (sum, normed) = layer_norm(0.5).add(x.clone(), y.clone());
    assert_close(sum, &[1.0, 2.0, 4.0, 7.0], 0.0);
    assert_close(normed, &layer, 1e-6);
    assert_close(layer_norm(0.5).of_sum(x.clone(), y.clone()), &layer, 1e-6);
    let (sum, normed) = rms_norm(0.5).add(x, y);
    assert_close(sum, &[1.0, 2.0, 4.0, 7.0], 0.0);
    assert_close(normed, &[0.2357022604, 0.9428090416, -0.9428090416, 0.8249579114], 1e-6);
}

/// Squares of 300 and more overflow f16.
#[test]
fn half_precision_does_not_overflow() {
    let x = tensor([2, 4], &[300.0, -600.0, 900.0, 1200.0, 0.5, 1.0, -1.5, 2.0], &Device::flex());
    for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let cast = |param: Param<Tensor<1>>| Param::from_tensor(param.val().cast(dtype));
        let expected = floats(rms_norm(1e-5).forward(x.clone()));
        let norm = RmsNorm { weight: cast(rms_norm(1e-5).weight), eps: 1e-5 };
        let found = norm.forward(x.clone().cast(dtype));
        assert_eq!(found.dtype(), dtype);
        assert_close(found, &expected, tolerance);

        let expected = floats(layer_norm(1e-5).forward(x.clone()));
        let LayerNorm { weight, bias, eps } = layer_norm(1e-5);
        let norm = LayerNorm { weight: cast(weight), bias: bias.map(cast), eps };
        assert_close(norm.forward(x.clone().cast(dtype)), &expected, tolerance);
    }
}

#[test]
fn a_row_does_not_see_another() {
    let x = noise([3, 5, 4], 1, &Device::flex());
    let row = x.clone().narrow(0, 1, 1).narrow(1, 2, 1);
    let of_row = |y: Tensor<3>| y.narrow(0, 1, 1).narrow(1, 2, 1);
    let (layer, rms) = (layer_norm(1e-5), rms_norm(1e-5));
    assert_close(of_row(layer.forward(x.clone())), &floats(layer.forward(row.clone())), 1e-6);
    assert_close(of_row(rms.forward(x)), &floats(rms.forward(row)), 1e-6);
}

#[test]
fn gradients_match_finite_differences() {
    let at = random(8, &mut fastrand::Rng::with_seed(1));
    let (layer, rms) = (layer_norm(1e-2).train(), rms_norm(1e-2).train());
    assert_gradient(|x| layer.forward(x), [2, 4], &at);
    assert_gradient(|x| rms.forward(x), [2, 4], &at);
    let x = noise([3, 4], 2, &Device::flex().autodiff());
    let with_weight = |weight| {
        let norm = RmsNorm { weight: Param::from_tensor(weight), eps: 1e-2 };
        norm.forward(x.clone())
    };
    assert_gradient(with_weight, [4], &at[..4]);
}

/// Two channels with running mean (1, -2) and variance (4, 1/4), weight (2, -1), bias (1/2, 1), eps 1/10.
fn batch_norm() -> BatchNorm {
    let device = Device::flex();
    BatchNorm {
        weight: param([2], &[2.0, -1.0]),
        bias: param([2], &[0.5, 1.0]),
        running_mean: RunningState::new(tensor([2], &[1.0, -2.0], &device)),
        running_var: RunningState::new(tensor([2], &[4.0, 0.25], &device)),
        eps: 0.1,
    }
}

#[test]
fn batch_norm_evaluates_with_the_running_statistics() {
    let norm = batch_norm();
    let x = tensor([2, 2], &[1.0, 2.0, 3.0, -4.0], &Device::flex());
    let expected = [0.5, -5.7612340378, 2.4754591933, 4.3806170189];
    assert_close(norm.forward(x.clone()), &expected, 1e-5);
    // and leaves them
    assert_eq!(floats(norm.running_mean.value()), [1.0, -2.0]);
    // a row alone gives the same
    assert_close(norm.forward(x.narrow(0, 1, 1)), &expected[2..], 1e-5);
}

/// Columns (1, 3, 8) and (2, -4, 5): means 4 and 1, variances 26/3 and 14, unbiased 13 and 21.
#[test]
fn batch_norm_trains_with_the_batch() {
    let norm = batch_norm().train();
    let x = tensor([3, 2], &[1.0, 2.0, 3.0, -4.0, 8.0, 5.0], &Device::flex().autodiff());
    let expected = [-1.5264411855, 0.7336881794, -0.1754803952, 2.3315591032, 3.2019215807, -0.0652472826];
    assert_close(norm.forward(x.clone()), &expected, 1e-5);
    let running = |norm: &BatchNorm| (norm.running_mean.value_sync(), norm.running_var.value_sync());
    let (mean, var) = running(&norm);
    assert_close(mean, &[1.3, -1.7], 1e-6); // 0.9 · 1 + 0.1 · 4, ...
    assert_close(var, &[4.9, 2.325], 1e-5); // 0.9 · 4 + 0.1 · 13, ...
    norm.forward(x);
    let (mean, var) = running(&norm);
    assert_close(mean, &[1.57, -1.43], 1e-6);
    assert_close(var, &[5.71, 4.1925], 1e-5);
    // evaluation afterwards uses them
    let scale = 2.0 / 5.81_f64.sqrt();
    let y = norm.valid().forward(tensor([1, 2], &[2.57, -1.43], &Device::flex()));
    assert_close(y, &[0.5 + scale, 1.0], 1e-5);
}

#[test]
fn batch_norm_standardises_the_batch() {
    let norm = BatchNorm::new(3, 0.0, &Device::flex()).train();
    let y = norm.forward(noise([50, 3], 1, &Device::flex().autodiff()) * 7.0 + 3.0);
    assert_close(y.clone().mean_dim(0), &[0.0; 3], 1e-5);
    assert_close(y.square().mean_dim(0), &[1.0; 3], 1e-5);
}

#[test]
fn batch_norm_gradients_match_finite_differences() {
    let norm = batch_norm().train();
    assert_gradient(|x| norm.forward(x), [4, 2], &random(8, &mut fastrand::Rng::with_seed(1)));
    let x = noise([4, 2], 2, &Device::flex().autodiff());
    let with_weight = |weight| {
        let norm = BatchNorm { weight: Param::from_tensor(weight), ..batch_norm().train() };
        norm.forward(x.clone())
    };
    assert_gradient(with_weight, [2], &[0.7, -1.2]);
    let with_bias = |bias| {
        let norm = BatchNorm { bias: Param::from_tensor(bias), ..batch_norm().train() };
        norm.forward(x.clone())
    };
    assert_gradient(with_bias, [2], &[0.7, -1.2]);
}
