//! Normalisation in place: of groups of channels, and of rows.

#[cfg(feature = "autodiff")]
use super::few::dot;
use super::instructions::Body;
use super::pointwise::activate;
#[cfg(feature = "autodiff")]
use super::pointwise::fma;
use crate::ops::Activation;

/// Values whose sum is kept in f32 before it goes on in f64.
const BLOCK: usize = 1024;
/// Sums that are kept side by side.
const LANES: usize = 16;

/// Groups of channels are normalised, each channel is scaled and moved, and goes through the activation.
pub struct GroupNorm<'a> {
    /// Whole groups; each of their channels has so many `places`.
    pub values: &'a mut [f32],
    pub places: usize,
    /// The number of the first of them among the groups of all pictures.
    pub first: usize,
    pub n_groups: usize,
    /// Scale and shift, `[channels]`.
    pub factors: [&'a [f32]; 2],
    pub eps: f64,
    pub activation: Option<Activation>,
}

impl Body for GroupNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let [weight, bias] = self.factors;
        let width = weight.len() / self.n_groups; // channels of a group
        for (at, group) in (self.first..).zip(self.values.chunks_mut(width * self.places)) {
            let count = group.len() as f64;
            let mean = sum(group, |value| value) / count;
            let mean = mean as f32;
            let variance = sum(group, |value| (value - mean) * (value - mean)) / count;
            let inverse = (1.0 / (variance + self.eps).sqrt()) as f32;
            let first = at % self.n_groups * width;
            for (channel, values) in (first..).zip(group.chunks_mut(self.places)) {
                let (scale, shift) = (inverse * weight[channel], bias[channel]);
                for value in &mut *values {
                    *value = (*value - mean) * scale + shift;
                }
                if let Some(activation) = self.activation {
                    activate::<FMA>(values, activation);
                }
            }
        }
    }
}

/// Rows are normalised, scaled and moved.
pub struct RowNorm<'a> {
    /// Whole rows, as wide as `weight`.
    pub values: &'a mut [f32],
    /// `[width]`
    pub weight: &'a [f32],
    /// `[width]`
    pub bias: Option<&'a [f32]>,
    pub eps: f64,
    /// Whether the mean is taken away first.
    pub centred: bool,
}

impl Body for RowNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        for row in self.values.chunks_mut(self.weight.len()) {
            let [mean, inverse] = of_row(row, self.eps, self.centred);
            for (value, weight) in row.iter_mut().zip(self.weight) {
                *value = (*value - mean) * inverse * weight;
            }
            if let Some(bias) = self.bias {
                row.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
    }
}

/// The mean that is taken away from a row, and what it is taken times then.
#[inline(always)]
fn of_row(row: &[f32], eps: f64, centred: bool) -> [f32; 2] {
    let count = row.len() as f64;
    let mean = if centred { (sum(row, |value| value) / count) as f32 } else { 0.0 };
    let variance = sum(row, |value| (value - mean) * (value - mean)) / count;
    [mean, (1.0 / (variance + eps).sqrt()) as f32]
}

/// The way back through a [`RowNorm`].
#[cfg(feature = "autodiff")]
pub struct RowNormSlope<'a> {
    /// Become gradients of `x`: whole rows.
    pub values: &'a mut [f32],
    /// What was normalised.
    pub x: &'a [f32],
    /// Of what came out.
    pub gradient: &'a [f32],
    /// `[width]`
    pub weight: &'a [f32],
    /// Its gradient is added here, `[width]`.
    pub of_weight: &'a mut [f32],
    /// That of a bias, `[width]`.
    pub of_bias: &'a mut [f32],
    pub eps: f64,
    pub centred: bool,
}

#[cfg(feature = "autodiff")]
impl Body for RowNormSlope<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { values, x, gradient, weight, of_weight, of_bias, eps, centred } = self;
        let width = weight.len();
        let mut normal = vec![0.0; width];
        let rows = x.chunks(width).zip(gradient.chunks(width));
        for (values, (x, gradient)) in values.chunks_mut(width).zip(rows) {
            let [mean, inverse] = of_row(x, eps, centred);
            for (at, normal) in normal.iter_mut().enumerate() {
                *normal = (x[at] - mean) * inverse;
                values[at] = gradient[at] * weight[at];
                of_weight[at] = fma::<FMA>(gradient[at], *normal, of_weight[at]);
                of_bias[at] += gradient[at];
            }
            let count = width as f64;
            let along = (f64::from(dot::<f32, FMA>(values, &normal)) / count) as f32;
            let level = if centred { (sum(values, |value| value) / count) as f32 } else { 0.0 };
            for (value, normal) in values.iter_mut().zip(&normal) {
                *value = inverse * fma::<FMA>(-*normal, along, *value - level);
            }
        }
    }
}

/// The sum of `f` of all values.
#[inline(always)]
fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut total = 0.0;
    for block in values.chunks(BLOCK) {
        let (chunks, rest) = block.as_chunks::<LANES>();
        let mut lanes = [0.0_f32; LANES];
        for chunk in chunks {
            for (lane, &value) in lanes.iter_mut().zip(chunk) {
                *lane += f(value);
            }
        }
        total += f64::from(lanes.iter().sum::<f32>() + rest.iter().map(|&value| f(value)).sum::<f32>());
    }
    total
}
