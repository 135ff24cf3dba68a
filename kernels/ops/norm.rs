use burn::tensor::{DType, Tensor, module};

use super::add::are_host;
use super::{Activation, add};
use crate::cpu::Instructions;
#[cfg(feature = "autodiff")]
use crate::cpu::gradient::{self, is_tracked};
use crate::cpu::host::{self, Values, is_host};
use crate::cpu::norm::{GroupNorm, RowNorm};
#[cfg(feature = "cube")]
use crate::cube::{self, is_cube_with};

/// Layer normalisation (Ba et al. 2016): `(x - mean) / √(variance + eps) * weight + bias` over the last axis.
///
/// - `x`: `[..., width]`
/// - `weight`, `bias`: `[width]`
///
/// On the CPU in place where nobody else holds `x`; half precision is normalised in f32 and rounded at the end. On a GPU in one
/// launch. Gradients in f32 on the CPU are by a body of ours, too. Other gradients, and other devices, have Burn's.
///
/// # Panics
/// If `weight` or `bias` is not as wide as `x`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    #[cfg(feature = "autodiff")]
    if is_tracked(&x) && is_tracked(&weight) && bias.as_ref().is_none_or(is_tracked) {
        return gradient::layer_norm(x, weight, bias, eps);
    }
    #[cfg(feature = "cube")]
    if is_cube_with(&x, &[&weight, bias.as_ref().unwrap_or(&weight)]) {
        return cube::norm::by_row(x, weight, bias, eps, true);
    }
    match is_host(&x) {
        true => Rows::layer(weight, bias, eps).change(x),
        false => module::layer_norm(x, weight, bias, eps),
    }
}

/// `x + y`, and the [`layer_norm`] of it: what a block hands on, and what goes into its next part.
///
/// - `x`, `y`: `[..., width]`
/// - `weight`, `bias`: `[width]`
///
/// On the CPU in one pass, and both in place where nobody else holds `x` and `y`.
///
/// # Panics
/// If `x` and `y` differ in shape, or `weight` or `bias` is not as wide.
pub fn add_layer_norm<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    if are_host(&x, &y) {
        return Rows::layer(weight, bias, eps).add(x, y);
    }
    let sum = add(x, y);
    (sum.clone(), layer_norm(sum, weight, bias, eps))
}

/// The [`layer_norm`] of `x + y`, "Add & Norm" (Vaswani et al. 2017).
///
/// - `x`, `y`: `[..., width]`
/// - `weight`, `bias`: `[width]`
///
/// On the CPU in one pass, and in place where nobody else holds one of `x` and `y`.
///
/// # Panics
/// If `x` and `y` differ in shape, or `weight` or `bias` is not as wide.
pub fn layer_norm_of_sum<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    match are_host(&x, &y) {
        true => Rows::layer(weight, bias, eps).change_sum(x, y),
        false => layer_norm(add(x, y), weight, bias, eps),
    }
}

/// Root-mean-square normalisation (Zhang & Sennrich 2019): `x / √(mean(x²) + eps) * weight` over the last axis.
///
/// - `x`: `[..., width]`
/// - `weight`: `[width]`
///
/// Half precision is normalised in f32 and rounded at the end. On the CPU it works in place where nobody else holds `x`, on a
/// GPU in one launch. Gradients in f32 on the CPU are by a body of ours, too. For other gradients, and on other devices, it is
/// composed of tensor operations.
///
/// # Panics
/// If `weight` is not as wide as `x`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    if is_host(&x) {
        return Rows::root_mean_square(weight, eps).change(x);
    }
    #[cfg(feature = "autodiff")]
    if is_tracked(&x) && is_tracked(&weight) {
        return gradient::rms_norm(x, weight, eps);
    }
    #[cfg(feature = "cube")]
    if is_cube_with(&x, &[&weight]) {
        return cube::norm::by_row(x, weight, None, eps, false);
    }
    let dtype = x.dtype();
    if let DType::F16 | DType::BF16 = dtype {
        return composed_rms(x.cast(DType::F32), weight.cast(DType::F32), eps).cast(dtype);
    }
    composed_rms(x, weight, eps)
}

fn composed_rms<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean_square = x.clone().square().mean_dim(D - 1);
    x / (mean_square + eps).sqrt() * weight.unsqueeze()
}

/// `x + y`, and the [`rms_norm`] of it: what a block hands on, and what goes into its next part.
///
/// - `x`, `y`: `[..., width]`
/// - `weight`: `[width]`
///
/// On the CPU in one pass, and both in place where nobody else holds `x` and `y`.
///
/// # Panics
/// If `x` and `y` differ in shape, or `weight` is not as wide.
pub fn add_rms_norm<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    weight: Tensor<1>,
    eps: f64,
) -> (Tensor<D>, Tensor<D>) {
    if are_host(&x, &y) {
        return Rows::root_mean_square(weight, eps).add(x, y);
    }
    let sum = add(x, y);
    (sum.clone(), rms_norm(sum, weight, eps))
}

/// How rows are normalised on the CPU.
struct Rows {
    weight: Values,
    bias: Option<Values>,
    eps: f64,
    centred: bool,
}

impl Rows {
    fn layer(weight: Tensor<1>, bias: Option<Tensor<1>>, eps: f64) -> Self {
        Self { weight: Values::of(weight), bias: bias.map(Values::of), eps, centred: true }
    }

    fn root_mean_square(weight: Tensor<1>, eps: f64) -> Self {
        Self { weight: Values::of(weight), bias: None, eps, centred: false }
    }

    fn change<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let width = self.width(&x);
        host::change(x, width, |_, values| self.normalise(values))
    }

    fn add<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        let width = self.width(&x);
        host::add_and_change(x, y, width, |values| self.normalise(values))
    }

    fn change_sum<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        let width = self.width(&x);
        host::change_sum(x, y, width, |values| self.normalise(values))
    }

    /// That of the rows, which those of the factors must be.
    fn width<const D: usize>(&self, x: &Tensor<D>) -> usize {
        let width = x.dims()[D - 1];
        let widths = [self.weight.len(), self.bias.as_deref().map_or(width, <[f32]>::len)];
        assert_eq!(widths, [width; 2], "widths of weight and bias (left) and of what is normalised");
        width.max(1)
    }

    fn normalise(&self, values: &mut [f32]) {
        let Self { weight, bias, eps, centred } = self;
        let (weight, bias) = (&**weight, bias.as_deref());
        Instructions::in_use().run(RowNorm { values, weight, bias, eps: *eps, centred: *centred });
    }
}

/// Group normalisation (Wu & He 2018), and an activation after it: the channels of a picture are cut into `n_groups`
/// groups of neighbours, each is normalised over its channels and all places, `(x - mean) / √(variance + eps)`, and
/// every channel is scaled and moved by its `weight` and `bias`.
///
/// - `x`: `[batch, channels, ...]`
/// - `weight`, `bias`: `[channels]`
///
/// Half precision is normalised in f32 and rounded at the end. On the CPU it works in place where nobody else holds `x`, the
/// activation included, and on a GPU in one launch; where gradients are wanted, and on other devices, it is composed of tensor operations.
///
/// # Panics
/// If `x` has fewer than two dimensions, `n_groups` does not divide the channels, or `weight` or `bias` are not theirs.
pub fn group_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    n_groups: usize,
    eps: f64,
    activation: Option<Activation>,
) -> Tensor<D> {
    let channels = x.dims()[1];
    assert!(
        n_groups > 0 && channels.is_multiple_of(n_groups),
        "{channels} channels do not divide into {n_groups} groups"
    );
    assert_eq!(
        [weight.dims(), bias.dims()],
        [[channels]; 2],
        "weight and bias (left) of {channels} channels"
    );
    if is_host(&x) {
        let places = x.dims()[2..].iter().product::<usize>().max(1);
        let [weight, bias] = [weight, bias].map(Values::of);
        let width = channels / n_groups; // channels of a group
        return host::change(x, width * places, |first, values| {
            let factors = [&*weight, &*bias];
            Instructions::in_use().run(GroupNorm {
                values,
                first,
                factors,
                n_groups,
                places,
                eps,
                activation,
            });
        });
    }
    #[cfg(feature = "cube")]
    if is_cube_with(&x, &[&weight, &bias]) {
        return cube::norm::by_group(x, weight, bias, n_groups, eps, activation);
    }
    let dtype = x.dtype();
    let [weight, bias] = [weight, bias].map(|factor| factor.cast(DType::F32));
    let y = composed(x.cast(DType::F32), weight, bias, n_groups, eps);
    activation.map_or(y.clone(), |activation| activation.forward(y)).cast(dtype)
}

/// The same of tensor operations, without an activation.
fn composed<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Tensor<1>,
    n_groups: usize,
    eps: f64,
) -> Tensor<D> {
    let shape = x.dims();
    let (batch, channels) = (shape[0], shape[1]);
    let places: usize = shape[2..].iter().product();
    let x = x.reshape([batch, n_groups, channels / n_groups * places]);
    let centred = x.clone() - x.mean_dim(2);
    let variance = centred.clone().square().mean_dim(2); // [batch, n_groups, 1]
    let x = (centred / (variance + eps).sqrt()).reshape([batch, channels, places]);
    let [weight, bias] = [weight, bias].map(|factor| factor.reshape([1, channels, 1]));
    (x * weight + bias).reshape(shape)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, assert_gradient, floats, noise, random, tensor};
    use burn::tensor::Device;

    /// Channels (1, 3) and (5, 7) are one group of mean 4 and variance 5, channels (2, 2) and (2, 2) one without any.
    #[test]
    fn literal() {
        let x = tensor([1, 4, 2], &[1.0, 3.0, 5.0, 7.0, 2.0, 2.0, 2.0, 2.0], &Device::flex());
        let weight = tensor([4], &[3.0, -3.0, 1.0, 1.0], &Device::flex());
        let bias = tensor([4], &[0.0, 1.0, -1.0, 2.0], &Device::flex());
        let norm = |activation| group_norm(x.clone(), weight.clone(), bias.clone(), 2, 4.0, activation);
        assert_close(norm(None), &[-3.0, -1.0, 0.0, -2.0, -1.0, -1.0, 2.0, 2.0], 1e-6);
        let relu = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0, 2.0];
        assert_close(norm(Some(Activation::Relu)), &relu, 1e-6);
        let silu = [-0.1422776, -0.2689414, 0.0, -0.2384058, -0.2689414, -0.2689414, 1.7615942, 1.7615942];
        assert_close(norm(Some(Activation::Silu)), &silu, 1e-6);
    }

    /// The two bodies, on whole and broken chunks, far from zero, and in parts of larger tensors.
    #[test]
    fn bodies_agree() {
        for (at, shape, n_groups) in [
            (0, [1, 1, 1, 1], 1),
            (1, [2, 6, 3, 5], 3),
            (2, [1, 4, 33, 32], 2),
            (3, [2, 8, 1, 17], 8),
            (4, [3, 5, 7, 1], 1),
        ] {
            let (device, channels) = (Device::flex(), shape[1]);
            let [batch, _, height, width] = shape;
            let x = noise([batch, channels, width, height + 1], at, &device).narrow(3, 1, height) + 30.0;
            let x = x.swap_dims(2, 3);
            let (weight, bias) = (noise([channels], 9, &device), noise([channels], 10, &device));
            for activation in [None, Some(Activation::Silu), Some(Activation::Gelu)] {
                let found = group_norm(x.clone(), weight.clone(), bias.clone(), n_groups, 1e-5, activation);
                let expected = composed(x.clone(), weight.clone(), bias.clone(), n_groups, 1e-5);
                let expected = activation.map_or(expected.clone(), |activation| activation.forward(expected));
                assert_close(found, &floats(expected), 2e-4);
            }
        }
    }

    /// Of mean 2 and variance 4; of mean square 8.
    #[test]
    fn literals_of_rows() {
        let x = tensor([1, 2, 4], &[0.0, 0.0, 4.0, 4.0, 4.0, 4.0, 0.0, 0.0], &Device::flex());
        let weight = tensor([4], &[1.0, 2.0, 3.0, -4.0], &Device::flex());
        let bias = tensor([4], &[0.0, 1.0, 0.0, 0.5], &Device::flex());
        let found = layer_norm(x.clone(), weight.clone(), Some(bias), 0.0);
        assert_close(found, &[-1.0, -1.0, 3.0, -3.5, 1.0, 3.0, -3.0, 4.5], 1e-6);
        let half = std::f64::consts::SQRT_2;
        let expected = [0.0, 0.0, 3.0, -4.0, 1.0, 2.0, 0.0, 0.0].map(|x| x * half);
        assert_close(rms_norm(x, weight, 0.0), &expected, 1e-6);
    }

    /// Beside Burn's operations: odd widths, one value, none, parts of others, far from zero, in half precision.
    #[test]
    fn bodies_of_rows_agree() {
        let device = Device::flex();
        for (seed, [batch, rows, width]) in
            (0..).zip([[1, 1, 1], [2, 3, 5], [1, 70, 33], [2, 9, 1030], [2, 0, 4]])
        {
            let x = noise([batch, rows, width + 1], seed, &device).narrow(2, 1, width) + 3.0;
            let (weight, bias) = (noise([width], 9, &device), noise([width], 10, &device));
            for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F16, 4e-3), (DType::BF16, 3e-2)] {
                let [weight, bias] = [&weight, &bias].map(|factor| factor.clone().cast(dtype));
                let x = x.clone().cast(dtype);
                let [whole_weight, whole_bias] =
                    [&weight, &bias].map(|factor| factor.clone().cast(DType::F32));
                let exact = x.clone().cast(DType::F32);
                for bias in [None, Some((bias, whole_bias))] {
                    let (bias, whole_bias) = bias.unzip();
                    let found = layer_norm(x.clone(), weight.clone(), bias, 1e-5);
                    assert_eq!(found.dtype(), dtype);
                    let expected = composed_layer(exact.clone(), whole_weight.clone(), whole_bias, 1e-5);
                    assert_close(found, &floats(expected), tolerance);
                }
                let found = rms_norm(x, weight, 1e-5);
                assert_eq!(found.dtype(), dtype);
                assert_close(found, &floats(composed_rms(exact, whole_weight, 1e-5)), tolerance);
            }
        }
    }

    fn composed_layer(x: Tensor<3>, weight: Tensor<1>, bias: Option<Tensor<1>>, eps: f64) -> Tensor<3> {
        let centred = x.clone() - x.mean_dim(2);
        let variance = centred.clone().square().mean_dim(2);
        let y = centred / (variance + eps).sqrt() * weight.unsqueeze();
        bias.map_or(y.clone(), |bias| y + bias.unsqueeze())
    }

    /// Beside those of Burn's operations, of all that goes in.
    #[test]
    fn gradients_of_rows_agree() {
        let device = Device::flex().autodiff();
        for shape in [[1, 1], [3, 5], [70, 300], [1000, 33]] {
            let width = shape[1];
            let gradients = |norm: &dyn Fn(Tensor<2>, Tensor<1>, Tensor<1>) -> Tensor<2>| {
                let x = (noise(shape, 1, &device) * 3.0 + 1.0).detach().require_grad();
                let [weight, bias] = [2, 3].map(|seed| noise([width], seed, &device).require_grad());
                let y = norm(x.clone(), weight.clone(), bias.clone());
                let gradients = (y * noise(shape, 4, &device)).sum().backward();
                [
                    x.grad(&gradients).map(floats),
                    weight.grad(&gradients).map(floats),
                    bias.grad(&gradients).map(floats),
                ]
            };
            let mean = |x: Tensor<2>| x.mean_dim(1);
            let layer = |x: Tensor<2>, weight: Tensor<1>| {
                let centred = x.clone() - mean(x);
                centred.clone() / (mean(centred.square()) + 0.1).sqrt() * weight.unsqueeze()
            };
            for (found, expected) in [
                (
                    gradients(&|x, weight, bias| layer_norm(x, weight, Some(bias), 0.1)),
                    gradients(&|x, weight, bias| layer(x, weight) + bias.unsqueeze()),
                ),
                (
                    gradients(&|x, weight, _| layer_norm(x, weight, None, 0.1)),
                    gradients(&|x, weight, _| layer(x, weight)),
                ),
                (
                    gradients(&|x, weight, _| rms_norm(x, weight, 0.1)),
                    gradients(&|x, weight, _| composed_rms(x, weight, 0.1)),
                ),
            ] {
                for (found, expected) in found.iter().zip(&expected) {
                    let [found, expected] =
                        [found, expected].map(|values| values.as_deref().unwrap_or_default());
                    assert_eq!(found.len(), expected.len());
                    let is_close = |(a, b): (&f64, &f64)| (a - b).abs() < 2e-4 * (1.0 + b.abs());
                    assert!(found.iter().zip(expected).all(is_close), "{shape:?}");
                }
            }
        }
    }

    #[test]
    fn gradients_of_rows_match_finite_differences() {
        let device = Device::flex().autodiff();
        let at = random(12, &mut fastrand::Rng::with_seed(1));
        let (weight, bias) = (noise([4], 2, &device), noise([4], 3, &device));
        assert_gradient(|x| layer_norm(x, weight.clone(), Some(bias.clone()), 0.1), [3, 4], &at);
        assert_gradient(|x| rms_norm(x, weight.clone(), 0.1), [3, 4], &at);
        let y = noise([3, 4], 4, &device);
        let of_sum = |x| layer_norm_of_sum(x, y.clone(), weight.clone(), Some(bias.clone()), 0.1);
        assert_gradient(of_sum, [3, 4], &at);
        let product = |(sum, normed): (Tensor<2>, Tensor<2>)| sum * normed;
        let added = |x| product(add_layer_norm(x, y.clone(), weight.clone(), Some(bias.clone()), 0.1));
        assert_gradient(added, [3, 4], &at);
        assert_gradient(|x| product(add_rms_norm(x, y.clone(), weight.clone(), 0.1)), [3, 4], &at);
    }

    #[test]
    fn sums_and_their_norms_are_those_of_two_steps() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for shape in [[1, 1, 1], [2, 3, 5], [1, 70, 333], [2, 0, 4]] {
                assert_same_as_two_steps(dtype, shape);
            }
        }
    }

    /// Bit for bit: of whole tensors, those that others hold, and parts of others and turned ones.
    fn assert_same_as_two_steps(dtype: DType, [batch, rows, width]: [usize; 3]) {
        let device = Device::flex();
        let factor = |seed| noise([width], seed, &device).cast(dtype);
        let (weight, bias) = (factor(1), Some(factor(2)));
        let of = |shape, seed| (noise(shape, seed, &device) * 3.0).cast(dtype);
        let whole = |seed| of([batch, rows, width], seed);
        let part = || of([batch, rows, width + 1], 6).narrow(2, 1, width);
        let turned = || of([batch, width, rows], 7).swap_dims(1, 2);
        let held = whole(3);
        let operands: [&dyn Fn() -> (Tensor<3>, Tensor<3>); 5] = [
            &|| (whole(4), whole(5)),
            &|| (held.clone(), whole(4)),
            &|| (whole(4), held.clone()),
            &|| (held.clone(), held.clone()),
            &|| (part(), turned()),
        ];
        for operands in operands {
            let (x, y) = operands();
            let sum = x + y;
            let normed = layer_norm(sum.clone(), weight.clone(), bias.clone(), 1e-5);
            let (x, y) = operands();
            let found = add_layer_norm(x, y, weight.clone(), bias.clone(), 1e-5);
            assert_same(found.into(), [sum.clone(), normed.clone()]);
            let (x, y) = operands();
            let found = layer_norm_of_sum(x, y, weight.clone(), bias.clone(), 1e-5);
            assert_same([found], [normed]);
            let normed = rms_norm(sum.clone(), weight.clone(), 1e-5);
            let (x, y) = operands();
            assert_same(add_rms_norm(x, y, weight.clone(), 1e-5).into(), [sum, normed]);
        }
        assert_same([held], [whole(3)]);
    }

    #[track_caller]
    fn assert_same<const N: usize>(found: [Tensor<3>; N], expected: [Tensor<3>; N]) {
        for (found, expected) in found.into_iter().zip(expected) {
            assert_eq!(found.dtype(), expected.dtype());
            assert_eq!(found.dims(), expected.dims());
            assert_eq!(floats(found), floats(expected));
        }
    }

    #[test]
    fn sums_and_their_norms_take_no_more_room() {
        let ones = || Tensor::<1>::ones([5], &Device::flex());
        let place = |x: &Tensor<2>| Values::of(x.clone()).as_ptr();
        let [x, y] = [1, 2].map(|seed| noise([3, 5], seed, &Device::flex()));
        let places = [&x, &y].map(place);
        let (sum, normed) = add_rms_norm(x, y, ones(), 1e-5);
        assert_eq!([&sum, &normed].map(place), places);
        let held = sum.clone();
        let normed = layer_norm_of_sum(sum, normed, ones(), None, 1e-5);
        assert_eq!(place(&normed), places[1]);
        let free = noise([3, 5], 3, &Device::flex());
        let at = place(&free);
        assert_eq!(place(&layer_norm_of_sum(free, held, ones(), None, 1e-5)), at);
    }

    #[test]
    #[should_panic(expected = "shapes of what is added up")]
    fn what_is_added_up_is_of_one_shape() {
        let ones = |shape| Tensor::<2>::ones(shape, &Device::flex());
        let _ = add_rms_norm(ones([2, 3]), ones([1, 3]), Tensor::ones([3], &Device::flex()), 0.1);
    }

    #[test]
    #[should_panic(expected = "widths of weight and bias")]
    fn rows_are_as_wide_as_their_weight() {
        let _ = rms_norm(Tensor::<2>::ones([2, 4], &Device::flex()), Tensor::ones([3], &Device::flex()), 0.1);
    }

    #[test]
    fn a_picture_may_be_empty() {
        let ones = Tensor::ones([4], &Device::flex());
        let x = tensor([2, 4, 0], &[], &Device::flex());
        assert_eq!(group_norm(x, ones.clone(), ones, 2, 1e-5, None).dims(), [2, 4, 0]);
    }

    #[test]
    fn what_others_hold_stays() {
        let x = noise([1, 4, 9], 1, &Device::flex());
        let before = floats(x.clone());
        let ones = Tensor::ones([4], &Device::flex());
        let _ = group_norm(x.clone(), ones.clone(), ones.clone(), 2, 1e-5, None);
        assert_close(x, &before, 0.0);
        assert_close(ones, &[1.0; 4], 0.0);
    }

    #[test]
    fn half_precision_does_not_overflow() {
        let x = noise([2, 4, 10], 3, &Device::flex()) * 900.0;
        let (weight, bias) = (noise([4], 4, &Device::flex()), noise([4], 5, &Device::flex()));
        for (dtype, tolerance) in [(DType::F16, 2e-3), (DType::BF16, 2e-2)] {
            let [weight, bias] = [weight.clone(), bias.clone()].map(|factor| factor.cast(dtype));
            let norm = |x, weight, bias| group_norm(x, weight, bias, 2, 1e-5, Some(Activation::Silu));
            let x = x.clone().cast(dtype);
            let found = norm(x.clone(), weight.clone(), bias.clone());
            assert_eq!(found.dtype(), dtype);
            let [x, weight, bias] =
                [x.flatten::<1>(0, 2), weight, bias].map(|tensor| tensor.cast(DType::F32));
            assert_close(found, &floats(norm(x.reshape([2, 4, 10]), weight, bias)), tolerance);
        }
    }

    #[test]
    fn gradients_match_finite_differences() {
        let device = Device::flex().autodiff();
        let at = random(24, &mut fastrand::Rng::with_seed(1));
        let (weight, bias) = (noise([4], 2, &device), noise([4], 3, &device));
        let silu = Some(Activation::Silu);
        assert_gradient(|x| group_norm(x, weight.clone(), bias.clone(), 2, 0.1, silu), [1, 4, 6], &at);
        let x = noise([2, 4, 3], 4, &device);
        let at = random(4, &mut fastrand::Rng::with_seed(5));
        assert_gradient(|weight| group_norm(x.clone(), weight, bias.clone(), 2, 0.1, silu), [4], &at);
    }

    #[test]
    #[should_panic(expected = "6 channels do not divide into 4 groups")]
    fn groups_have_as_many_channels() {
        let ones = Tensor::ones([6], &Device::flex());
        let _ = group_norm(Tensor::<3>::ones([1, 6, 2], &Device::flex()), ones.clone(), ones, 4, 1e-5, None);
    }
}
