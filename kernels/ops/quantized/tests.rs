use super::*;
use crate::testing::{assert_close, floats, noise, random, tensor};

const SCHEMES: [Quantization; 4] = [
    Quantization::INT8,
    Quantization::INT4,
    Quantization { bits: Bits::Eight, block: 6 },
    Quantization { bits: Bits::Four, block: 128 },
];

fn values(count: usize, seed: u64) -> Vec<f32> {
    random(count, &mut fastrand::Rng::with_seed(seed)).iter().map(|&x| x as f32).collect()
}

/// The plain twin: all of it unpacked, and Burn's product.
fn twin<const D: usize>(x: Tensor<D>, weight: &PackedMatrix) -> Tensor<D> {
    let [rows, _] = weight.shape();
    let dense = weight.tensor(0..rows, &x.device()).cast(x.dtype());
    burn::tensor::module::linear(x, dense.transpose(), None)
}

#[test]
fn literals() {
    let half = f16::from_f32;
    let x = tensor([1, 4], &[1.0, 10.0, 100.0, 1000.0], &Device::flex());
    // blocks of 2: [1, -2] at 0.5 and [3, -128] at 2
    let eight = Quantization { bits: Bits::Eight, block: 2 };
    let matrix = PackedMatrix::symmetric(eight, [1, 4], vec![1, 0xfe, 3, 0x80], vec![half(0.5), half(2.0)]);
    assert_eq!(matrix.unpack(0..1), [0.5, -1.0, 6.0, -256.0]);
    assert_close(quantized_linear(x.clone(), &matrix), &[0.5 - 10.0 + 600.0 - 256_000.0], 0.0);
    // a scale per row: codes 8 and 9 mean 0 and 1, 15 and 0 mean 7 and -8
    let four = Quantization { bits: Bits::Four, block: 4 };
    let matrix = PackedMatrix::symmetric(four, [1, 4], vec![0x98, 0x0f], vec![half(0.25)]);
    assert_eq!(matrix.unpack(0..1), [0.0, 0.25, 1.75, -2.0]);
    assert_close(quantized_linear(x.clone(), &matrix), &[2.5 + 175.0 - 2000.0], 0.0);
    // from a minimum
    let matrix = PackedMatrix::from_minima(4, [1, 4], vec![0x10, 0xf2], vec![half(0.5)], vec![half(-1.0)]);
    assert_eq!(matrix.unpack(0..1), [-1.0, -0.5, 0.0, 6.5]);
    assert_close(quantized_linear(x, &matrix), &[-1.0 - 5.0 + 6500.0], 0.0);
}

/// Few rows, many, and many that are multiplied as floats; none is none.
#[test]
fn products_equal_those_with_the_unpacked_matrix() {
    for (rows, cols) in [(1, 32), (5, 30), (37, 130), (64, 64)] {
        for quantization in SCHEMES {
            let matrix = PackedMatrix::pack(quantization, [rows, cols], &values(rows * cols, 1));
            for many in [1, 2, FEW_ROWS, FEW_ROWS + 1, 40] {
                let x = noise([many, cols], 2, &Device::flex());
                let expected = floats(twin(x.clone(), &matrix));
                assert_close(quantized_linear(x, &matrix), &expected, 1e-5);
            }
            let none = Tensor::<3>::zeros([2, 0, cols], &Device::flex());
            assert_eq!(quantized_linear(none, &matrix).dims(), [2, 0, rows]);
        }
    }
}

/// By at most 1.6e-5 of the greatest magnitude, which is 1, with 1,024 values that are no greater.
#[test]
fn many_rows_are_rounded_for_a_large_matrix() {
    let [rows, cols] = [MANY_VALUES / 1024, 1024];
    for quantization in [Quantization::INT8, Quantization::INT4] {
        let matrix = PackedMatrix::pack(quantization, [rows, cols], &values(rows * cols, 1));
        let x = noise([MANY_ROWS, cols], 2, &Device::flex());
        let expected = floats(twin(x.clone(), &matrix));
        let y = quantized_linear(x, &matrix);
        assert_close(y.clone(), &expected, 1.6e-5 * cols as f64);
        assert_ne!(floats(y), expected);
    }
}

#[test]
fn a_matrix_of_several_panels_is_put_together_again() {
    let cols = 1 << 14;
    let broken = Quantization { bits: Bits::Four, block: 48 };
    let matrix = PackedMatrix::pack(broken, [PANEL / cols + 3, cols], &values(PANEL + 3 * cols, 1));
    let x = noise([FEW_ROWS + 1, cols], 2, &Device::flex());
    let few = quantized_linear(x.clone().narrow(0, 0, 2), &matrix);
    assert_close(quantized_linear(x, &matrix).narrow(0, 0, 2), &floats(few), 2e-2);
}

#[test]
fn half_precision_stays_and_is_summed_in_f32() {
    let matrix = PackedMatrix::pack(Quantization::INT8, [3, 737], &[1.0; 3 * 737]);
    for (dtype, many) in [(DType::F16, 1), (DType::F16, FEW_ROWS + 1)] {
        let y = quantized_linear(Tensor::<2>::ones([many, 737], (&Device::flex(), dtype)), &matrix);
        assert_eq!(y.dtype(), dtype);
        // the scale 1 / 127 is rounded up to f16
        assert_close(y, &vec![737.5; 3 * many], 0.5);
    }
}

#[test]
fn values_come_back_within_half_a_step() {
    for quantization in SCHEMES {
        let [rows, cols] = [5, 70];
        let original: Vec<f32> = values(rows * cols, 3).iter().map(|x| x * x * 40.0 - 3.0).collect();
        let matrix = PackedMatrix::pack(quantization, [rows, cols], &original);
        assert_eq!(matrix.bytes(), quantization.bytes([rows, cols]));
        let blocks = matrix.blocks();
        for (i, (x, back)) in original.iter().zip(matrix.unpack(0..rows)).enumerate() {
            let scale = matrix.scales[i / cols * blocks + i % cols / quantization.block].to_f32();
            assert!((x - back).abs() <= scale / 2.0 * 1.00001, "{quantization}: {x} came back as {back}");
        }
    }
}

#[test]
fn rows_and_stacks_hold_the_same_values() {
    for quantization in SCHEMES {
        let matrix = PackedMatrix::pack(quantization, [5, 66], &values(5 * 66, 1));
        let parts = [0..2, 2..2, 2..5].map(|rows| matrix.rows(rows));
        assert_eq!(parts[2].unpack(1..3), matrix.unpack(3..5));
        assert_eq!(PackedMatrix::stack(parts.into()), Some(matrix));
    }
    let [eight, four] = [Quantization::INT8, Quantization::INT4]
        .map(|scheme| PackedMatrix::pack(scheme, [1, 32], &[0.5; 32]));
    assert_eq!(PackedMatrix::stack(vec![eight, four]), None);
    assert_eq!(PackedMatrix::stack(Vec::new()), None);
}

/// 5 and 8.5 bits a value.
#[test]
fn bytes_are_counted() {
    assert_eq!(Quantization::INT4.bytes([4096, 11008]), 4096 * 11008 * 5 / 8);
    assert_eq!(Quantization::INT8.bytes([4096, 11008]), 4096 * 11008 * 17 / 16);
    assert!(Quantization::INT8.fits([1, 33]) && !Quantization::INT4.fits([1, 33]));
    assert!(!Quantization::INT8.fits([1, 31]) && !Quantization::INT8.fits([0, 64]));
}
