use burn::tensor::{DType, Device, Tensor, TensorData};

/// Where random numbers come from.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for a pass")]
pub enum Noise {
    /// A sequence that this number starts. It moves on with every draw.
    Seeded(u64),
    /// These, for each draw: `[tokens, numbers of each]`. What their distribution is, the gate says.
    Given(Tensor<2>),
}

impl Noise {
    /// Even in `0..1`.
    ///
    /// # Panics
    /// If what was given has another shape.
    pub fn uniform(&mut self, shape: [usize; 2], device: &Device) -> Tensor<2> {
        self.draw(shape, device, |next| next())
    }

    /// Normal, of mean 0 and variance 1.
    ///
    /// # Panics
    /// If what was given has another shape.
    pub fn normal(&mut self, shape: [usize; 2], device: &Device) -> Tensor<2> {
        // Box and Muller's
        self.draw(shape, device, |next| {
            (-2.0 * (1.0 - next()).ln()).sqrt() * (std::f64::consts::TAU * next()).cos()
        })
    }

    fn draw(
        &mut self,
        shape: [usize; 2],
        device: &Device,
        one: impl Fn(&mut dyn FnMut() -> f64) -> f64,
    ) -> Tensor<2> {
        match self {
            Noise::Given(given) => {
                assert_eq!(given.dims(), shape, "random numbers that were given (left), and those wanted");
                given.clone().to_device(device)
            }
            Noise::Seeded(state) => {
                let mut next = || (next_bits(state) >> 11) as f64 / (1_u64 << 53) as f64;
                let count = shape.iter().product();
                let values: Vec<f32> = (0..count).map(|_| one(&mut next) as f32).collect();
                Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
            }
        }
    }
}

/// SplitMix64 (Steele et al. 2014).
fn next_bits(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut bits = *state;
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, floats};

    /// The first number of the published sequence from 0.
    #[test]
    fn bits_are_those_of_splitmix64() {
        assert_eq!(next_bits(&mut 0), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn distributions_have_their_moments() {
        let device = Device::flex();
        let moments = |draws: Tensor<2>| {
            let draws = floats(draws);
            let mean = draws.iter().sum::<f64>() / draws.len() as f64;
            (mean, draws.iter().map(|draw| (draw - mean).powi(2)).sum::<f64>() / draws.len() as f64)
        };
        let mut noise = Noise::Seeded(1);
        let (mean, variance) = moments(noise.uniform([100, 200], &device));
        assert!((mean - 0.5).abs() < 0.01 && (variance - 1.0 / 12.0).abs() < 0.005, "{mean} {variance}");
        let (mean, variance) = moments(noise.normal([100, 200], &device));
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }

    #[test]
    fn a_seed_repeats_itself_and_a_draw_does_not() {
        let device = Device::flex();
        let (mut one, mut other) = (Noise::Seeded(5), Noise::Seeded(5));
        let first = floats(one.uniform([2, 3], &device));
        assert_close(other.uniform([2, 3], &device), &first, 0.0);
        assert_ne!(floats(one.uniform([2, 3], &device)), first);
    }
}
