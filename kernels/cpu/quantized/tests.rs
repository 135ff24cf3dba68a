use super::*;
use crate::testing::random;

fn noise(count: usize, seed: u64) -> Vec<f32> {
    random(count, &mut fastrand::Rng::with_seed(seed)).iter().map(|&x| x as f32).collect()
}

/// Every body is right for every tail: of rows, of columns, of blocks.
#[test]
fn bodies_equal_unpacked_products() {
    let shapes =
        [(1, 2), (1, 32), (3, 30), (4, 34), (5, 64), (33, 96), (7, 100), (2, 256), (40, 66), (70, 1090)];
    for (bits, (rows, cols)) in Bits::ALL.into_iter().flat_map(|bits| shapes.map(|shape| (bits, shape))) {
        for block in [2, 32, 64, cols] {
            let weight =
                PackedMatrix::pack(Quantization { bits, block }, [rows, cols], &noise(rows * cols, 1));
            let unpacked = weight.unpack(0..rows);
            for many in [1, 3] {
                let x = noise(many * cols, 2);
                for body in Instructions::all() {
                    let mut y = vec![f32::NAN; rows * many];
                    products_with(body, &weight, &x, &mut y);
                    for (i, &y) in y.iter().enumerate() {
                        let w = &unpacked[i % rows * cols..][..cols];
                        let expected: f64 =
                            w.iter().zip(&x[i / rows * cols..]).map(|(w, x)| f64::from(w * x)).sum();
                        assert!(
                            (f64::from(y) - expected).abs() < 2e-6 * cols as f64,
                            "{body:?} {weight:?}: value {i} is {y}, expected {expected}"
                        );
                    }
                }
            }
        }
    }
}
