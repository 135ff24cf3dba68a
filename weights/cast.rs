//! Stored bytes -> values of the wanted type, in parallel chunks, and the few rearrangements that rules ask for.

use burn::tensor::{BoolStore, DType, Element, FloatDType};
use bytemuck::{Pod, Zeroable};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::format::Dtype;

/// Values per parallel task.
const CHUNK: usize = 1 << 14;
/// Values that are widened at a time on the stack.
const STRIP: usize = 512;
/// The side of a square that is transposed at a time.
const TILE: usize = 32;

/// The dtype in which files store what Burn calls `dtype`; `None` for quantized tensors.
pub(crate) fn stored(dtype: DType) -> Option<Dtype> {
    Some(match dtype {
        DType::F64 => Dtype::F64,
        DType::F32 | DType::Flex32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::BF16 => Dtype::BF16,
        DType::I64 => Dtype::I64,
        DType::I32 => Dtype::I32,
        DType::I16 => Dtype::I16,
        DType::I8 => Dtype::I8,
        DType::U64 => Dtype::U64,
        DType::U32 => Dtype::U32,
        DType::U16 => Dtype::U16,
        DType::U8 => Dtype::U8,
        DType::Bool(_) => Dtype::Bool,
        DType::QFloat(_) => return None,
    })
}

/// What Burn calls the values of a file.
pub(crate) fn native(dtype: Dtype) -> DType {
    match dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::BF16 => DType::BF16,
        Dtype::I64 => DType::I64,
        Dtype::I32 => DType::I32,
        Dtype::I16 => DType::I16,
        Dtype::I8 => DType::I8,
        Dtype::U64 => DType::U64,
        Dtype::U32 => DType::U32,
        Dtype::U16 => DType::U16,
        Dtype::U8 => DType::U8,
        Dtype::Bool => DType::Bool(BoolStore::Native),
    }
}

/// The float type that holds stored floats as they are; f32 for anything else.
pub(crate) fn as_stored(dtype: Dtype) -> FloatDType {
    match dtype {
        Dtype::F64 => FloatDType::F64,
        Dtype::F16 => FloatDType::F16,
        Dtype::BF16 => FloatDType::BF16,
        _ => FloatDType::F32,
    }
}

/// The dtype in which files store floats of this type.
pub(crate) fn float_stored(dtype: FloatDType) -> Dtype {
    match dtype {
        FloatDType::F64 => Dtype::F64,
        FloatDType::F32 | FloatDType::Flex32 => Dtype::F32,
        FloatDType::F16 => Dtype::F16,
        FloatDType::BF16 => Dtype::BF16,
    }
}

/// A type into which stored values are read.
pub(crate) trait Value: Element + Default + Zeroable {
    /// Reads as many stored values as `out` holds.
    fn read(from: Dtype, bytes: &[u8], out: &mut [Self]);

    /// Whether this is a number and not infinite.
    fn is_finite(self) -> bool {
        true
    }
}

/// So many zeros. The system hands them out as they are first touched, by whichever thread fills them.
pub(crate) fn zeros<T: Value>(count: usize) -> Vec<T> {
    bytemuck::zeroed_vec(count)
}

/// All values in `bytes`, which are stored as `from`.
pub(crate) fn values<T: Value>(from: Dtype, bytes: &[u8]) -> Vec<T> {
    let mut out = zeros(bytes.len() / from.size());
    read_into(from, bytes, &mut out);
    out
}

/// Reads `bytes`, which are stored as `from`, into `out`.
///
/// Returns how many values are NaN or infinite and the place of the first; `None` when all are numbers.
pub(crate) fn read_into<T: Value>(from: Dtype, bytes: &[u8], out: &mut [T]) -> Option<(usize, usize)> {
    out.par_chunks_mut(CHUNK)
        .zip(bytes.par_chunks(CHUNK * from.size()))
        .enumerate()
        .filter_map(|(chunk, (out, bytes))| {
            T::read(from, bytes, out);
            let (count, first) = not_finite(out)?; // while they are in the cache
            Some((count, chunk * CHUNK + first))
        })
        .reduce_with(sum)
}

/// How many of `values` are NaN or infinite and the place of the first; `None` when all are numbers.
fn not_finite<T: Value>(values: &[T]) -> Option<(usize, usize)> {
    // one bit and no early end: so it is done many at a time
    if values.iter().fold(true, |all, value| all & value.is_finite()) {
        return None;
    }
    let count = values.iter().filter(|value| !value.is_finite()).count();
    Some((count, values.iter().position(|value| !value.is_finite())?))
}

fn sum((a, first): (usize, usize), (b, second): (usize, usize)) -> (usize, usize) {
    (a + b, first.min(second))
}

/// What [`read_into`] says of `bytes` that are left where they are. They are aligned for their dtype.
pub(crate) fn find_not_finite(dtype: Dtype, bytes: &[u8]) -> Option<(usize, usize)> {
    fn of<T: Value + Pod>(bytes: &[u8]) -> Option<(usize, usize)> {
        let chunks = bytemuck::cast_slice::<_, T>(bytes).par_chunks(CHUNK).enumerate();
        let found = chunks.filter_map(|(chunk, values)| {
            let (count, first) = not_finite(values)?;
            Some((count, chunk * CHUNK + first))
        });
        found.reduce_with(sum)
    }
    match dtype {
        Dtype::F64 => of::<f64>(bytes),
        Dtype::F32 => of::<f32>(bytes),
        Dtype::F16 => of::<f16>(bytes),
        Dtype::BF16 => of::<bf16>(bytes),
        _ => None,
    }
}

/// `[.., rows, cols]` -> `[.., cols, rows]`
pub(crate) fn transposed<T: Value>(values: &[T], rows: usize, cols: usize) -> Vec<T> {
    let mut out = zeros(values.len());
    if rows == 0 || cols == 0 {
        return out;
    }
    for (out, values) in out.chunks_exact_mut(rows * cols).zip(values.chunks_exact(rows * cols)) {
        out.par_chunks_mut(TILE * rows).enumerate().for_each(|(strip, out)| {
            let first_col = strip * TILE;
            for first_row in (0..rows).step_by(TILE) {
                for (i, out) in out.chunks_exact_mut(rows).enumerate() {
                    let tile = &mut out[first_row..rows.min(first_row + TILE)];
                    for (row, out) in (first_row..).zip(tile) {
                        *out = values[row * cols + first_col + i];
                    }
                }
            }
        });
    }
    out
}

/// Reads values that are stored as `T` itself.
macro_rules! copy {
    ($bytes:ident, $out:ident, $T:ty) => {
        for (out, bytes) in $out.iter_mut().zip($bytes.as_chunks().0) {
            *out = <$T>::from_le_bytes(*bytes) as _;
        }
    };
}

/// Reads floats of any width through f32, a strip at a time.
fn through_f32<T>(from: Dtype, bytes: &[u8], out: &mut [T], narrow: impl Fn(&[f32], &mut [T])) {
    let mut strip = [0.0; STRIP];
    for (out, bytes) in out.chunks_mut(STRIP).zip(bytes.chunks(STRIP * from.size())) {
        let strip = &mut strip[..out.len()];
        f32::read(from, bytes, strip);
        narrow(strip, out);
    }
}

impl Value for f32 {
    fn read(from: Dtype, bytes: &[u8], out: &mut [f32]) {
        match from {
            Dtype::F32 => copy!(bytes, out, f32),
            Dtype::F64 => copy!(bytes, out, f64),
            Dtype::BF16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            Dtype::F16 => {
                let mut strip = [f16::ZERO; STRIP];
                for (out, bytes) in out.chunks_mut(STRIP).zip(bytes.chunks(2 * STRIP)) {
                    let strip = &mut strip[..out.len()];
                    f16::read(from, bytes, strip);
                    strip.convert_to_f32_slice(out);
                }
            }
            // plans only pair floats with floats
            _ => out.fill(f32::NAN),
        }
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Value for f64 {
    fn read(from: Dtype, bytes: &[u8], out: &mut [f64]) {
        match from {
            Dtype::F64 => copy!(bytes, out, f64),
            _ => through_f32(from, bytes, out, |strip, out| {
                out.iter_mut().zip(strip).for_each(|(out, &value)| *out = value.into());
            }),
        }
    }

    fn is_finite(self) -> bool {
        self.is_finite()
    }
}

impl Value for f16 {
    fn read(from: Dtype, bytes: &[u8], out: &mut [f16]) {
        match from {
            Dtype::F16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f16::from_le_bytes(*bytes);
                }
            }
            _ => through_f32(from, bytes, out, |strip, out| out.convert_from_f32_slice(strip)),
        }
    }

    fn is_finite(self) -> bool {
        f16::is_finite(self)
    }
}

impl Value for bf16 {
    fn read(from: Dtype, bytes: &[u8], out: &mut [bf16]) {
        match from {
            Dtype::BF16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = bf16::from_le_bytes(*bytes);
                }
            }
            _ => through_f32(from, bytes, out, |strip, out| out.convert_from_f32_slice(strip)),
        }
    }

    fn is_finite(self) -> bool {
        bf16::is_finite(self)
    }
}

impl Value for i64 {
    fn read(from: Dtype, bytes: &[u8], out: &mut [i64]) {
        match from {
            Dtype::I64 => copy!(bytes, out, i64),
            Dtype::I32 => copy!(bytes, out, i32),
            Dtype::I16 => copy!(bytes, out, i16),
            Dtype::I8 => copy!(bytes, out, i8),
            Dtype::U32 => copy!(bytes, out, u32),
            Dtype::U16 => copy!(bytes, out, u16),
            _ => copy!(bytes, out, u8), // U8; plans let no other kind through
        }
    }
}

impl Value for bool {
    fn read(_: Dtype, bytes: &[u8], out: &mut [bool]) {
        out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = byte != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of<T: Copy, const N: usize>(values: &[T], le: impl Fn(T) -> [u8; N]) -> Vec<u8> {
        values.iter().flat_map(|&value| le(value)).collect()
    }

    #[test]
    fn narrow_floats_widen_exactly() {
        // more than a strip, and not a whole number of them
        let numbers: Vec<f32> = (0..STRIP * 2 + 7).map(|i| i as f32 / 4.0 - 100.0).collect();
        let halves: Vec<f16> = numbers.iter().map(|&x| f16::from_f32(x)).collect();
        assert_eq!(values::<f32>(Dtype::F16, &bytes_of(&halves, f16::to_le_bytes)), numbers);
        let brain = [bf16::from_f32(1.5), bf16::from_f32(-3.0e38)];
        assert_eq!(values::<f32>(Dtype::BF16, &bytes_of(&brain, bf16::to_le_bytes)), brain.map(bf16::to_f32));
        assert_eq!(values::<f64>(Dtype::F64, &bytes_of(&[0.1f64], f64::to_le_bytes)), [0.1]);
    }

    #[test]
    fn wide_floats_round_to_narrow_ones() {
        let thirds = bytes_of(&[1.0f32 / 3.0, 70000.0], f32::to_le_bytes);
        let halves: Vec<f16> = values(Dtype::F32, &thirds);
        assert_eq!(halves[0].to_f32(), 0.33325195);
        assert!(halves[1].is_infinite(), "70000 is beyond f16");
        let brain: Vec<bf16> = values(Dtype::F32, &thirds);
        assert_eq!(brain.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), [0.33398438, 70144.0]);
    }

    #[test]
    fn integers_of_any_width_keep_their_sign() {
        assert_eq!(values::<i64>(Dtype::I8, &[0xff, 0x7f]), [-1, 127]);
        assert_eq!(values::<i64>(Dtype::U8, &[0xff, 0x7f]), [255, 127]);
        assert_eq!(values::<i64>(Dtype::I32, &bytes_of(&[-5i32], i32::to_le_bytes)), [-5]);
        assert_eq!(values::<bool>(Dtype::U8, &[0, 1, 2]), [false, true, true]);
    }

    #[test]
    fn the_first_value_that_is_no_number_is_found_across_chunks() {
        let mut numbers = vec![0.0f32; CHUNK * 3];
        let read = |numbers: &[f32]| {
            read_into(Dtype::F32, &bytes_of(numbers, f32::to_le_bytes), &mut zeros::<f32>(numbers.len()))
        };
        assert_eq!(read(&numbers), None);
        numbers[CHUNK + 5] = f32::NEG_INFINITY;
        numbers[CHUNK * 2 + 1] = f32::NAN;
        assert_eq!(read(&numbers), Some((2, CHUNK + 5)));
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        for (batch, rows, cols) in [(1, 1, 5), (1, 33, 70), (3, 2, 3), (2, 64, 32), (1, 0, 4)] {
            let numbers: Vec<f32> = (0..batch * rows * cols).map(|i| i as f32).collect();
            let once = transposed(&numbers, rows, cols);
            assert_eq!(transposed(&once, cols, rows), numbers, "[{batch}, {rows}, {cols}]");
        }
        assert_eq!(transposed(&[1i64, 2, 3, 4, 5, 6], 2, 3), [1, 4, 2, 5, 3, 6]);
    }
}
