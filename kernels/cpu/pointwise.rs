//! Exponentials and what is made of them, value by value, without branches: the compiler makes vectors of them.
//!
//! Errors against exact values, over all of f32, are those that the tests allow.

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
    x * sigmoid::<FMA>(1.702 * x)
}

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
    /// The tail from here on is 0.
    const FAR: f32 = 14.0;
    const ABOVE: [f32; 4] = [0.499_999_97, 0.334_602_2, 0.104_482_11, 0.013_632_71];
    const BELOW: [f32; 5] = [1.0, 1.467_085_4, 0.879_563_3, 0.261_345_27, 0.034_192_72];

    let size = x.abs();
    let size = if size > FAR { FAR } else { size };
    let fraction = polynomial::<FMA, 4>(size, ABOVE) / polynomial::<FMA, 5>(size, BELOW);
    let tail = fraction * exp::<FMA>(-0.5 * size * size);
    relu(x) - size * tail
}

/// `x σ(2u) = x / 2 (1 + tanh u)` with `u = √(2/π) (x + 0.044715 x³)`.
#[inline(always)]
fn gelu_tanh<const FMA: bool>(x: f32) -> f32 {
    const SCALE: f32 = 1.595_769_2; // 2 √(2/π)
    let x = at_least(x, -10.0);
    x * sigmoid::<FMA>(x * fma::<FMA>(x * x, SCALE * 0.044_715, SCALE))
}

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
