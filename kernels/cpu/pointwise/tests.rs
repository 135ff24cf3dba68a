use super::*;
use crate::cpu::Instructions;

/// Of all orders of magnitude and both signs, some 65,000; infinite and NaN among them.
fn values() -> Vec<f32> {
    let special = [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN, 0.55, 1e-45];
    let spread = (0..u32::MAX - 70_000).step_by(65_537).map(f32::from_bits);
    let dense = (-30_000..30_000).map(|at| at as f32 * 0.004);
    special.into_iter().chain(spread).chain(dense).collect()
}

/// `erfc(x)` of `x >= 0`: its series near 0, its continued fraction elsewhere.
fn erfc(x: f64) -> f64 {
    if x < 2.5 {
        let (mut term, mut sum) = (x, x);
        for n in 1..80 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return 1.0 - sum * std::f64::consts::FRAC_2_SQRT_PI;
    }
    let fraction = (1..120).rev().fold(x, |below, n| x + f64::from(n) / 2.0 / below);
    (-x * x).exp() / fraction * std::f64::consts::FRAC_2_SQRT_PI / 2.0
}

fn exact(activation: Activation, x: f64) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    match activation {
        Activation::Gelu => {
            let tail = erfc(x.abs() * std::f64::consts::FRAC_1_SQRT_2) / 2.0;
            x * if x < 0.0 { tail } else { 1.0 - tail }
        }
        Activation::GeluTanh => x * sigmoid((8.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))),
        Activation::QuickGelu => x * sigmoid(1.702 * x),
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
    }
}

struct Each<'a, F>(&'a mut [f32], F);

struct Exp;

impl Body for Each<'_, Exp> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        each(self.0, exp::<FMA>);
    }
}

/// Where `exp` of it is a normal number; 0 below, what it is at the bound above.
#[test]
fn exponentials_are_right_to_the_last_digit() {
    for instructions in Instructions::all() {
        let mut found = values();
        instructions.run(Each(&mut found, Exp));
        for (x, found) in values().into_iter().zip(found) {
            assert_eq!(x.is_nan(), found.is_nan(), "{instructions:?} {x}: {found}");
            let exact = if x < LEAST { 0.0 } else { f64::from(x.min(MOST)).exp() };
            let error = (f64::from(found) - exact).abs();
            assert!(x.is_nan() || error <= 1.3e-7 * exact, "{instructions:?} {x}: {found} for {exact}");
        }
    }
}

/// `|error| <= share |exact| + least`, of every activation with all instructions.
#[test]
fn activations_are_exact_within_bounds() {
    for (activation, share, least) in [
        (Activation::Gelu, 3e-7, 1e-8),
        (Activation::GeluTanh, 3e-7, 1e-8),
        (Activation::QuickGelu, 3e-7, 1e-8),
        (Activation::Silu, 3e-7, 1e-8),
        (Activation::Relu, 0.0, 0.0),
        (Activation::Tanh, 3e-7, 0.0),
    ] {
        for instructions in Instructions::all() {
            let mut found = values();
            let (bias, factors) = (None, None);
            instructions.run(Finish { values: &mut found, bias, activation: Some(activation), factors });
            let (mut worst, mut worst_at) = (0.0, 0.0);
            for (x, found) in values().into_iter().zip(found) {
                let expected = exact(activation, f64::from(x));
                assert_eq!(x.is_nan(), found.is_nan(), "{activation:?} {instructions:?} {x}: {found}");
                if x.is_infinite() {
                    let limit = if x > 0.0 { expected } else { exact(activation, -1e3) };
                    assert!((f64::from(found) - limit).abs() < 1e-30 || f64::from(found) == limit);
                    continue;
                }
                let error = (f64::from(found) - expected).abs();
                let over = error - least - share * expected.abs();
                if over > worst {
                    (worst, worst_at) = (over, x);
                }
            }
            assert!(worst == 0.0, "{activation:?} {instructions:?}: {worst:e} too much at {worst_at}");
        }
    }
}
