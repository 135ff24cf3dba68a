use super::*;
use crate::testing::random;

fn noise(count: usize, rng: &mut fastrand::Rng) -> Vec<f32> {
    random(count, rng).iter().map(|&x| x as f32).collect()
}

/// As [`PackedMatrix::pack`], and symmetric ones of 4 bits.
fn matrices(block: usize, shape: [usize; 2], rng: &mut fastrand::Rng) -> [PackedMatrix; 3] {
    let [rows, cols] = shape;
    let values = noise(rows * cols, rng);
    let [eight, four] =
        Bits::ALL.map(|bits| PackedMatrix::pack(Quantization { bits, block }, shape, &values));
    let (codes, scales) = (four.codes(0..rows).to_vec(), four.halves(0..rows).0.to_vec());
    let symmetric = PackedMatrix::symmetric(four.quantization(), shape, codes, scales);
    [eight, four, symmetric]
}

/// Products are within what rounding can make of them: of a value 1.6e-5 of the greatest magnitude in its chunk, and of the
/// sum as of one of floats.
fn check(weight: &PackedMatrix, x: &[f32]) {
    let [rows, cols] = weight.shape();
    let unpacked = weight.unpack(0..rows);
    for instructions in Instructions::all() {
        let y = products_with(instructions, weight, x);
        assert_eq!(y.len(), x.len() / cols * rows);
        for (at, &y) in y.iter().enumerate() {
            let (w, x) = (&unpacked[at % rows * cols..][..cols], &x[at / rows * cols..][..cols]);
            let (mut expected, mut bound) = (0.0, 1e-30);
            for (w, x) in w.chunks(CHUNK).zip(x.chunks(CHUNK)) {
                let greatest = x.iter().fold(0.0, |greatest: f64, &x| greatest.max(f64::from(x).abs()));
                for (&w, &x) in w.iter().zip(x) {
                    let product = f64::from(w) * f64::from(x);
                    expected += product;
                    bound += 1.6e-5 * greatest * f64::from(w).abs() + 1e-6 * product.abs();
                }
                let largest = w.iter().fold(0.0, |largest: f64, &w| largest.max(f64::from(w).abs()));
                bound += 1e-6 * largest * greatest; // of codes and their minimum, which are summed up apart
            }
            let error = (f64::from(y) - expected).abs();
            assert!(error <= bound, "{instructions:?} {weight:?} {at}: {y} for {expected}, {bound:e}");
        }
    }
}

/// Whole and broken tiles, panels, chunks, lines and depths; blocks of a chunk, of several, of a row.
#[test]
fn products_are_those_of_unpacked_values() {
    let mut rng = fastrand::Rng::with_seed(1);
    let shapes = [[1, 2], [3, 30], [33, 32], [5, 34], [40, 70], [7, 450], [2, 512], [66, 546], [300, 96]];
    for [rows, cols] in shapes {
        for block in [32, 64, 128, cols] {
            for weight in matrices(block, [rows, cols], &mut rng) {
                for many in [1, 5, 14, 29] {
                    let x = noise(many * cols, &mut rng);
                    check(&weight, &x);
                }
            }
        }
    }
    for weight in matrices(32, [70, 70], &mut rng) {
        check(&weight, &noise(300 * 70, &mut rng));
    }
}

/// Rows of very different sizes, outliers, zeros, and values that f32 hardly holds.
#[test]
fn every_chunk_has_a_scale() {
    let mut rng = fastrand::Rng::with_seed(2);
    let factors = [1.0, 1e30, 1e-30, 0.0, 3e34, 1e-38, 1e-44];
    for weight in matrices(32, [9, 230], &mut rng) {
        let mut x = noise(factors.len() * 230, &mut rng);
        for (x, factor) in x.chunks_mut(230).zip(factors) {
            x.iter_mut().for_each(|x| *x *= factor);
            x[100] *= 1000.0;
        }
        check(&weight, &x);
    }
}

/// Where scales are powers of 2 and sums are short, nothing is rounded: what comes out is the sum of whole numbers.
#[test]
fn whole_numbers_stay() {
    let (rows, cols, many) = (35, 96, 17);
    let mut rng = fastrand::Rng::with_seed(3);
    let codes: Vec<i8> = (0..rows * cols).map(|_| rng.i8(..)).collect();
    let halves = |count: usize, value: f32| vec![f16::from_f32(value); count];
    let eight = PackedMatrix::symmetric(
        Quantization::INT8,
        [rows, cols],
        codes.iter().map(|&code| code as u8).collect(),
        halves(rows * 3, 0.5),
    );
    let halved: Vec<u8> =
        codes.chunks(2).map(|codes| (codes[0] as u8) & 0xf | (codes[1] as u8) << 4).collect();
    let four = PackedMatrix::symmetric(Quantization::INT4, [rows, cols], halved, halves(rows * 3, 0.5));
    // every chunk has the greatest number of 16 bits, so that its scale is 2
    let x: Vec<i64> =
        (0..many * cols).map(|at| if at % CHUNK == 7 { 32767 } else { rng.i64(-100..=100) }).collect();
    let floats: Vec<f32> = x.iter().map(|&x| 2.0 * x as f32).collect();
    for (weight, code) in
        [(&eight, (|code| i64::from(code)) as fn(i8) -> i64), (&four, |code| i64::from(code as u8 & 0xf) - 8)]
    {
        let expected: Vec<f32> = (0..many * rows)
            .map(|at| {
                let row = codes[at % rows * cols..][..cols].iter().zip(&x[at / rows * cols..]);
                row.map(|(&w, &x)| code(w) * x).sum::<i64>() as f32
            })
            .collect();
        for instructions in Instructions::all() {
            assert_eq!(products_with(instructions, weight, &floats), expected, "{instructions:?} {weight:?}");
        }
    }
}

/// Rows that are not finite are those that floats have, and others are not changed by them.
#[test]
fn rows_that_are_not_finite_stay_so() {
    let mut rng = fastrand::Rng::with_seed(4);
    for weight in matrices(64, [37, 100], &mut rng) {
        for instructions in Instructions::all() {
            let finite = noise(20 * 100, &mut rng);
            let mut x = finite.clone();
            for (row, value) in [(3, f32::NAN), (7, f32::INFINITY), (19, f32::NEG_INFINITY)] {
                x[row * 100 + 99 - row] = value;
            }
            let expected = products_with(instructions, &weight, &finite);
            let y = products_with(instructions, &weight, &x);
            for (row, (y, finite)) in y.chunks(37).zip(expected.chunks(37)).enumerate() {
                match row {
                    3 | 7 | 19 => {
                        let mut expected = [0.0; 37];
                        let x = &x[row * 100..][..100];
                        quantized::products_with(instructions, &weight, x, &mut expected);
                        for (y, expected) in y.iter().zip(expected) {
                            assert!(y.is_nan() && expected.is_nan() || y.is_infinite() && *y == expected);
                        }
                    }
                    _ => assert_eq!(y, finite),
                }
            }
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let mut rng = fastrand::Rng::with_seed(5);
    for weight in matrices(32, [515, 600], &mut rng) {
        let x = noise(130 * 600, &mut rng);
        let [one, three] = [1, 3].map(|threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| products(&weight, &x))
        });
        assert_eq!(one, three);
    }
}

#[test]
fn halves_are_widened() {
    for bits in 0..=u16::MAX {
        let (found, expected) = (from_half(bits.into()), f16::from_bits(bits).to_f32());
        assert!(found == expected || found.is_nan() && expected.is_nan(), "{bits:#x}: {found}");
        assert_eq!(found.is_sign_negative(), expected.is_sign_negative());
    }
}
