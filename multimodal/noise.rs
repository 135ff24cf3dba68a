//! Random numbers that are the same everywhere: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
//! 2, 3"), a function of seed and place, computed on the host.

use std::f64::consts::TAU;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Philox {
    key: [u32; 2],
    stream: u64,
    block: u64,
}

impl Philox {
    /// The stream of that number under a seed. All are independent.
    pub const fn new(seed: u64, stream: u64) -> Self {
        Self { key: [seed as u32, (seed >> 32) as u32], stream, block: 0 }
    }

    /// Four more numbers.
    fn next_block(&mut self) -> [u32; 4] {
        let [block, stream] = [self.block, self.stream];
        self.block += 1;
        philox([block as u32, (block >> 32) as u32, stream as u32, (stream >> 32) as u32], self.key)
    }

    /// So many unit normal numbers, by Box and Muller: of each two in turn a distance and an angle of 32 bits.
    pub fn normals(mut self, count: usize) -> Vec<f32> {
        let mut values = Vec::with_capacity(count + 3);
        while values.len() < count {
            for pair in self.next_block().chunks(2) {
                // above 0, up to 1
                let [distance, turn] =
                    [pair[0], pair[1]].map(|bits| (f64::from(bits) + 1.0) / 4_294_967_296.0);
                let radius = (-2.0 * distance.ln()).sqrt();
                let (sine, cosine) = (TAU * turn).sin_cos();
                values.extend([(radius * cosine) as f32, (radius * sine) as f32]);
            }
        }
        values.truncate(count);
        values
    }
}

/// Ten rounds.
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let product = |factor: u64, value: u32| {
            let product = factor * u64::from(value);
            ((product >> 32) as u32, product as u32)
        };
        let (high0, low0) = product(0xD251_1F53, counter[0]);
        let (high1, low1) = product(0xCD9E_8D57, counter[2]);
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with their code.
    #[test]
    fn known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let (counter, key) =
            ([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]);
        assert_eq!(philox(counter, key), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn normals_are_normal_and_go_on_the_same() {
        let values = Philox::new(42, 3).normals(40_000);
        let mean = |power: i32| values.iter().map(|v| f64::from(*v).powi(power)).sum::<f64>() / 40_000.0;
        assert!(mean(1).abs() < 0.02 && (mean(2) - 1.0).abs() < 0.03 && (mean(4) - 3.0).abs() < 0.2);
        assert_eq!(Philox::new(42, 3).normals(5), values[..5]);
        assert!(values.iter().all(|value| value.is_finite()));
    }
}
