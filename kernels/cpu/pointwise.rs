//! Exponentials and what is made of them, value by value, without branches: the compiler makes vectors of them.
//!
//! Errors against exact values, over all of f32, are those that the tests allow.

#[cfg(feature = "autodiff")]
use super::few::dot;
use super::instructions::Body;
use crate::ops::Activation;

/// `a b + c`.
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial with these coefficients, the constant first.
#[inline(always)]
fn polynomial<const FMA: bool, const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[N - 1];
    for at in (0..N - 1).rev() {
        sum = fma::<FMA>(sum, x, coefficients[at]);
    }
    sum
}

/// `x`, or the least that it may be; NaN stays.
#[inline(always)]
fn at_least(x: f32, least: f32) -> f32 {
    if x < least { least } else { x }
}

/// `x` between two bounds; NaN stays.
#[inline(always)]
fn clamp(x: f32, low: f32, high: f32) -> f32 {
    let x = at_least(x, low);
    if x > high { high } else { x }
}

/// What `exp` is right between: below it is 0, above it stays as it is there.
const LEAST: f32 = -87.3;
const MOST: f32 = 88.3;

/// `exp(x)` of `x` up to [`MOST`]; 0 instead of what is no normal number.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    /// Added to a number below 2^22, it leaves the nearest whole number in the lowest bits.
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
    /// ln 2 in two parts, the first of few bits.
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    const MORE: [f32; 5] = [0.5, 0.166_665_13, 0.041_666_187, 0.008_369_598, 0.001_395_171_7];

    let within = clamp(x, LEAST, MOST);
    let rounded = fma::<FMA>(within, std::f32::consts::LOG2_E, ROUND);
    let whole = rounded - ROUND;
    let rest = fma::<FMA>(whole, -LN_2[1], fma::<FMA>(whole, -LN_2[0], within)); // ±ln 2 / 2
    let of_rest = fma::<FMA>(rest * rest, polynomial::<FMA, 5>(rest, MORE), rest) + 1.0;
    let power = (rounded.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let of_whole = f32::from_bits((power.wrapping_add(127) << 23) as u32);
    if x < LEAST { 0.0 } else { of_rest * of_whole }
}

/// `1 / (1 + exp(-x))`, right to all digits down to `exp(LEAST)`.
#[inline(always)]
fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// `x σ(1.702 x)`.
#[inline(always)]
fn quick_gelu<const FMA: bool>(x: f32) -> f32 {
    let x = at_least(x, -50.0);
    x * sigmoid::<FMA>(QUICK_GELU * x)
}

const QUICK_GELU: f32 = 1.702;

/// `x σ(x)`.
#[inline(always)]
fn silu<const FMA: bool>(x: f32) -> f32 {
    let x = at_least(x, -87.0);
    x * sigmoid::<FMA>(x)
}

/// By a polynomial near 0, and by an exponential elsewhere.
#[inline(always)]
fn tanh<const FMA: bool>(x: f32) -> f32 {
    const NEAR: f32 = 0.55;
    const MORE: [f32; 5] = [-0.333_333_2, 0.133_326_02, -0.053_853_855, 0.021_077_753, -0.006_282_467];

    let size = x.abs();
    let square = x * x;
    let near = fma::<FMA>(x * square, polynomial::<FMA, 5>(square, MORE), x);
    let part = exp::<FMA>(-2.0 * size);
    let far = ((1.0 - part) / (1.0 + part)).copysign(x);
    if size < NEAR { near } else { far }
}

/// `x Φ(x) = max(x, 0) - |x| (1 - Φ(|x|))`; the tail of the normal distribution is `exp(-x² / 2)` times a fraction of two
/// polynomials.
#[inline(always)]
fn gelu<const FMA: bool>(x: f32) -> f32 {
    let size = normal_size(x);
    let [tail, _] = normal_tail::<FMA>(size);
    relu(x) - size * tail
}

/// `|x|`, or from where on the tail of the normal distribution is 0.
#[inline(always)]
fn normal_size(x: f32) -> f32 {
    const FAR: f32 = 14.0;
    let size = x.abs();
    if size > FAR { FAR } else { size }
}

/// `1 - Φ(size)`, and `exp(-size² / 2)`.
#[inline(always)]
fn normal_tail<const FMA: bool>(size: f32) -> [f32; 2] {
    const ABOVE: [f32; 4] = [0.499_999_97, 0.334_602_2, 0.104_482_11, 0.013_632_71];
    const BELOW: [f32; 5] = [1.0, 1.467_085_4, 0.879_563_3, 0.261_345_27, 0.034_192_72];

    let density = exp::<FMA>(-0.5 * size * size);
    [polynomial::<FMA, 4>(size, ABOVE) / polynomial::<FMA, 5>(size, BELOW) * density, density]
}

/// `x σ(2u) = x / 2 (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    let x = at_least(x, -10.0);
    x * sigmoid::<FMA>(x * fma::<FMA>(x * x, GELU_TANH * 0.044_715, GELU_TANH))
}

/// `2 √(2/π)`.
const GELU_TANH: f32 = 1.595_769_2;

/// `max(x, 0)`; NaN stays.
#[inline(always)]
fn relu(x: f32) -> f32 {
    at_least(x, 0.0)
}

/// Every value becomes what `f` makes of it.
#[inline(always)]
fn each(values: &mut [f32], f: impl Fn(f32) -> f32) {
    for value in values {
        *value = f(*value);
    }
}

/// Every value becomes what `f` makes of it and of its neighbour in `others`.
#[cfg(feature = "autodiff")]
#[inline(always)]
fn each_with(values: &mut [f32], others: &[f32], f: impl Fn(f32, f32) -> f32) {
    for (value, &other) in values.iter_mut().zip(others) {
        *value = f(*value, other);
    }
}

/// The activation of every value.
#[inline(always)]
pub fn activate<const FMA: bool>(values: &mut [f32], activation: Activation) {
    match activation {
        Activation::Gelu => each(values, gelu::<FMA>),
        Activation::GeluTanh => each(values, gelu_tanh::<FMA>),
        Activation::QuickGelu => each(values, quick_gelu::<FMA>),
        Activation::Silu => each(values, silu::<FMA>),
        Activation::Relu => each(values, relu),
        Activation::Tanh => each(values, tanh::<FMA>),
    }
}

/// Derivatives of the activations, by what goes into them. Beyond [`STEEP`] they do not change any more.
#[cfg(feature = "autodiff")]
mod slope {
    use super::{clamp, exp, fma, normal_size, normal_tail, sigmoid};

    /// Where exponentials of all of them are still within f32.
    const STEEP: f32 = 40.0;

    /// `Φ(x) + x φ(x)`.
    #[inline(always)]
    pub fn gelu<const FMA: bool>(x: f32) -> f32 {
        const DENSITY: f32 = 0.398_942_3; // 1 / √(2 π)
        let size = normal_size(x);
        let [tail, density] = normal_tail::<FMA>(size);
        let below = if x < 0.0 { tail } else { 1.0 - tail };
        fma::<FMA>(x.signum() * size * DENSITY, density, below)
    }

    /// `σ(2u) + x σ(2u) (1 - σ(2u)) 2u'`.
    #[inline(always)]
    pub fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
        const SCALE: f32 = super::GELU_TANH;
        const CUBIC: f32 = SCALE * 0.044_715;
        let x = clamp(x, -10.0, 10.0);
        let part = sigmoid::<FMA>(x * fma::<FMA>(x * x, CUBIC, SCALE));
        fma::<FMA>(x * part * (1.0 - part), fma::<FMA>(x * x, 3.0 * CUBIC, SCALE), part)
    }

    /// `σ(a x) + a x σ(a x) (1 - σ(a x))`.
    #[inline(always)]
    pub fn swish<const FMA: bool>(x: f32, a: f32) -> f32 {
        let x = a * clamp(x, -STEEP, STEEP);
        let part = sigmoid::<FMA>(x);
        fma::<FMA>(x * part, 1.0 - part, part)
    }

    /// 0 at 0.
    #[inline(always)]
    pub fn relu(x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }

    /// `1 - tanh² = 4 e^(-2|x|) / (1 + e^(-2|x|))²`.
    #[inline(always)]
    pub fn tanh<const FMA: bool>(x: f32) -> f32 {
        let part = exp::<FMA>(-2.0 * clamp(x, -STEEP, STEEP).abs());
        4.0 * part / ((1.0 + part) * (1.0 + part))
    }
}

/// Values times the activation's derivative.
#[cfg(feature = "autodiff")]
pub struct Slope<'a> {
    pub values: &'a mut [f32],
    /// What went into the activation, as many.
    pub x: &'a [f32],
    pub activation: Activation,
}

#[cfg(feature = "autodiff")]
impl Body for Slope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { values, x, activation } = self;
        match activation {
            Activation::Gelu => each_with(values, x, |value, x| value * slope::gelu::<FMA>(x)),
            Activation::GeluTanh => each_with(values, x, |value, x| value * slope::gelu_tanh::<FMA>(x)),
            Activation::QuickGelu => {
                each_with(values, x, |value, x| value * slope::swish::<FMA>(x, QUICK_GELU));
            }
            Activation::Silu => each_with(values, x, |value, x| value * slope::swish::<FMA>(x, 1.0)),
            Activation::Relu => each_with(values, x, |value, x| value * slope::relu(x)),
            Activation::Tanh => each_with(values, x, |value, x| value * slope::tanh::<FMA>(x)),
        }
    }
}

/// Rows become their product with the derivative of the softmax that gave rows of `y`.
#[cfg(feature = "autodiff")]
pub struct SoftmaxSlope<'a> {
    pub values: &'a mut [f32],
    pub y: &'a [f32],
    pub width: usize,
}

#[cfg(feature = "autodiff")]
impl Body for SoftmaxSlope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { values, y, width } = self;
        for (values, y) in values.chunks_exact_mut(width).zip(y.chunks_exact(width)) {
            let mean = dot::<f32, FMA>(values, y);
            each_with(values, y, |value, y| (value - mean) * y);
        }
    }
}

/// `act(values + bias) * factors`, where each of the three may be missing.
pub struct Finish<'a> {
    /// Rows as wide as `bias`.
    pub values: &'a mut [f32],
    pub bias: Option<&'a [f32]>,
    pub activation: Option<Activation>,
    /// As many as `values`.
    pub factors: Option<&'a [f32]>,
}

impl Body for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        if let Some(bias) = self.bias {
            for row in self.values.chunks_exact_mut(bias.len()) {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        if let Some(activation) = self.activation {
            activate::<FMA>(self.values, activation);
        }
        if let Some(factors) = self.factors {
            self.values.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
        }
    }
}

/// The softmax of every row. One of `-∞` alone becomes zeros.
pub struct Softmax<'a> {
    pub values: &'a mut [f32],
    pub width: usize,
}

/// Sums and greatest values that are kept side by side.
const LANES: usize = 16;

impl Body for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.values.chunks_exact_mut(self.width) {
            let most = greatest(row);
            let most = if most == f32::NEG_INFINITY { 0.0 } else { most };
            let sum = exponentials::<FMA>(row, most);
            let factor = 1.0 / if sum < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { sum };
            each(row, |x| x * factor);
        }
    }
}

/// The greatest value but NaN.
#[inline(always)]
pub fn greatest(values: &[f32]) -> f32 {
    let more = |most: f32, x: f32| if x > most { x } else { most };
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane = more(*lane, x);
        }
    }
    lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |most, &x| more(most, x))
}

/// Every value becomes `exp(value - most)`; returns their sum.
#[inline(always)]
pub fn exponentials<const FMA: bool>(values: &mut [f32], most: f32) -> f32 {
    let (chunks, rest) = values.as_chunks_mut::<LANES>();
    let mut lanes = [0.0_f32; LANES];
    for chunk in chunks {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *x = exp::<FMA>(*x - most);
            *lane += *x;
        }
    }
    each(rest, |x| exp::<FMA>(x - most));
    lanes.iter().chain(rest.iter()).sum()
}

#[cfg(test)]
mod tests;
