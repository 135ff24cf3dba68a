//! Weight-only checkpoints in 8 or 4 bits with one scale per row: beside a matrix `<key>` of whole numbers stands a
//! vector `<key>_scale`, as GLM-130B and ChatGLM are quantized
//! (<https://github.com/THUDM/GLM-130B>, `quantization/layers.py`).
//!
//! A value is the number times its row's scale, worked out in f32. With 4 bits two columns share a byte, the even one in
//! its high half, both with a sign: a matrix `[rows, columns]` is stored as `[rows, columns / 2]`. How many bits they are
//! is not in the file.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::path::Path;

use burn::tensor::Bytes;
use half::f16;
use rayon::prelude::*;
use volary_kernels::ops::PackedMatrix;

use super::{Checkpoint, Contents, Dtype, Entry};
use crate::cast::values;
use crate::error::{Error, QuantizedError};
use crate::quantized::{Bits, Quantization};

/// What ends the name of a matrix's scales.
const SCALE: &str = "_scale";

/// A checkpoint as if it were not quantized: matrices beside which scales stand are f32, worked out when they are asked
/// for; the scales are not among the entries. Who wants the numbers themselves gets them from [`Checkpoint::packed`], if
/// the scales are f16.
#[derive(Debug)]
pub struct RowScaled<C> {
    stored: C,
    bits: Option<Bits>,
    contents: Contents,
    packed: HashSet<String>,
}

impl<C: Checkpoint> RowScaled<C> {
    /// The matrices of `stored`, whose numbers have so many bits; without any, everything is as it is stored.
    ///
    /// # Errors
    /// [`Error::Quantized`] with all matrices and scales that do not fit together.
    pub fn new(stored: C, bits: Option<Bits>) -> Result<Self, Error> {
        let path = stored.path().to_owned();
        let by_name: HashMap<&str, &Entry> =
            stored.entries().iter().map(|entry| (entry.name.as_str(), entry)).collect();
        let scale_of = |name: &str| by_name.get(format!("{name}{SCALE}").as_str()).filter(|_| bits.is_some());
        let (mut entries, mut packed, mut problems) = (Vec::new(), HashSet::new(), Vec::new());
        for entry in stored.entries() {
            let matrix = entry.name.strip_suffix(SCALE);
            if bits.is_some() && matrix.is_some_and(|matrix| by_name.contains_key(matrix)) {
                continue;
            }
            let Some(scale) = scale_of(&entry.name) else {
                entries.push(entry.clone());
                continue;
            };
            let [rows, width] = entry.shape[..] else {
                let (part, found) = (entry.name.clone(), entry.shape.clone());
                problems.push(QuantizedError::Rank { part, found });
                continue;
            };
            if scale.shape != [rows] {
                let (part, found) = (scale.name.clone(), scale.shape.clone());
                problems.push(QuantizedError::Shape { part, expected: vec![rows], found });
            }
            if !scale.dtype.is_float() {
                let (part, found) = (scale.name.clone(), scale.dtype);
                problems.push(QuantizedError::Dtype { part, expected: Dtype::F16, found });
            }
            // no overflow: a file holds these rows of so many bytes, or there are none
            let columns = if bits == Some(Bits::Four) { width.saturating_mul(2) } else { width };
            let (name, shape) = (entry.name.clone(), vec![rows, columns]);
            entries.push(Entry { name: name.clone(), shape, dtype: Dtype::F32 });
            packed.insert(name);
        }
        if !problems.is_empty() {
            return Err(Error::Quantized { path, problems });
        }
        Ok(Self { contents: Contents::new(path, entries), stored, bits, packed })
    }

    /// Bits and shape of a matrix that is quantized.
    fn packing(&self, name: &str) -> Result<Option<(Bits, [usize; 2])>, Error> {
        let entry = &self.contents.entries[self.contents.position(name)?];
        Ok(match (self.bits, &entry.shape[..]) {
            (Some(bits), &[rows, columns]) if self.packed.contains(name) => Some((bits, [rows, columns])),
            _ => None,
        })
    }

    /// Of what is stored.
    fn dtype(&self, name: &str) -> Dtype {
        let entry = self.stored.entries().iter().find(|entry| entry.name == name);
        entry.map_or(Dtype::F32, |entry| entry.dtype)
    }
}

/// Whole numbers as they are stored. Those of any width are exact in f32 up to 2^24, and only bytes count.
fn numbers(dtype: Dtype, stored: &[u8]) -> Vec<f32> {
    match dtype.is_float() {
        true => values(dtype, stored),
        false => values::<i64>(dtype, stored).into_iter().map(|number| number as f32).collect(),
    }
}

/// The byte that a stored number stands for; `None` where it is none. Some files have them as floats.
fn byte(value: f32) -> Option<i8> {
    let whole = value as i32;
    (whole as f32 == value && (-128..=255).contains(&whole)).then_some(whole as i8)
}

impl<C: Checkpoint> Checkpoint for RowScaled<C> {
    fn path(&self) -> &Path {
        &self.contents.path
    }

    fn entries(&self) -> &[Entry] {
        &self.contents.entries
    }

    fn shared(&self, name: &str) -> Option<Bytes> {
        let is_packed = self.bits.is_some() && self.packed.contains(name);
        if is_packed { None } else { self.stored.shared(name) }
    }

    fn bytes(&self, name: &str) -> Result<Cow<'_, [u8]>, Error> {
        let Some((bits, [rows, columns])) = self.packing(name)? else { return self.stored.bytes(name) };
        let scale = format!("{name}{SCALE}");
        let scales: Vec<f32> = values(self.dtype(&scale), &self.stored.bytes(&scale)?);
        let (stored, dtype) = (self.stored.bytes(name)?, self.dtype(name));
        let mut out = vec![0; rows * columns * size_of::<f32>()];
        if out.is_empty() {
            return Ok(Cow::Owned(out));
        }
        let rows = stored.par_chunks(stored.len() / rows).zip(&scales);
        out.par_chunks_mut(columns * size_of::<f32>()).zip(rows).for_each(|(out, (row, scale))| {
            let numbers = numbers(dtype, row);
            let number = |column: usize| match bits {
                Bits::Eight => byte(numbers[column]),
                Bits::Four => byte(numbers[column / 2]).map(|byte| match column % 2 {
                    0 => byte >> 4,
                    _ => byte << 4 >> 4,
                }),
            };
            for (column, out) in out.as_chunks_mut().0.iter_mut().enumerate() {
                // what is no number of that width is no number at all, and reported as such
                let number = number(column).map_or(f32::NAN, f32::from);
                *out = (number * scale).to_le_bytes();
            }
        });
        Ok(Cow::Owned(out))
    }

    fn packed(&self, name: &str) -> Result<Option<PackedMatrix>, Error> {
        let Some((bits, [rows, columns])) = self.packing(name)? else { return self.stored.packed(name) };
        let scale = format!("{name}{SCALE}");
        if self.dtype(&scale) != Dtype::F16 || columns == 0 {
            return Ok(None);
        }
        let scales: Vec<f16> = values(Dtype::F16, &self.stored.bytes(&scale)?);
        let (stored, dtype) = (self.stored.bytes(name)?, self.dtype(name));
        let codes = |stored: &[u8]| -> Option<Vec<u8>> {
            let code = |number| {
                let code = byte(number)? as u8;
                Some(match bits {
                    Bits::Eight => code,
                    // the even column in the low half, and 8 for 0
                    Bits::Four => code.rotate_left(4) ^ 0x88,
                })
            };
            numbers(dtype, stored).into_iter().map(code).collect()
        };
        // by rows, for numbers are wide on their way
        let row = (stored.len() / rows.max(1)).max(1);
        let codes: Option<Vec<Vec<u8>>> = stored.par_chunks(row).map(codes).collect();
        let quantization = Quantization { bits, block: columns };
        let matrix = |codes: Vec<Vec<u8>>| {
            PackedMatrix::symmetric(quantization, [rows, columns], codes.concat(), scales)
        };
        Ok(codes.map(matrix))
    }

    fn quantization(&self) -> Option<Quantization> {
        self.stored.quantization()
    }

    fn release(&self, name: &str) {
        self.stored.release(name);
        if self.packed.contains(name) {
            self.stored.release(&format!("{name}{SCALE}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Stored, checkpoint, floats, ints};

    fn bytes(key: &str, shape: &[usize], dtype: safetensors::Dtype, values: &[u8]) -> Stored {
        Stored { key: key.to_owned(), dtype, shape: shape.to_vec(), bytes: values.to_vec() }
    }

    fn numbers(checkpoint: &dyn Checkpoint, key: &str) -> Vec<f32> {
        let entry = checkpoint.entries().iter().find(|entry| entry.name == key).unwrap();
        values(entry.dtype, &checkpoint.bytes(key).unwrap())
    }

    #[test]
    fn eight_bits_are_numbers_times_their_rows_scale() {
        let stored = [
            bytes("a.weight", &[2, 3], safetensors::Dtype::I8, &[127, 0x81, 0, 1, 2, 0xff]),
            floats("a.weight_scale", &[2], [0.5, 2.0]),
            floats("a.bias", &[2], [1.0, 2.0]),
            floats("logit_scale", &[1], [3.0]),
        ];
        let read = RowScaled::new(checkpoint(&stored), Some(Bits::Eight)).unwrap();
        let names: Vec<&str> = read.entries().iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["a.bias", "logit_scale", "a.weight"]);
        assert_eq!(numbers(&read, "a.weight"), [63.5, -63.5, 0.0, 2.0, 4.0, -2.0]);
        assert_eq!(numbers(&read, "logit_scale"), [3.0]);
        assert!(read.bytes("a.weight_scale").is_err());
        read.release("a.weight");

        let plain = RowScaled::new(checkpoint(&stored), None).unwrap();
        assert_eq!(plain.entries().len(), 4);
        assert_eq!(*plain.bytes("a.weight").unwrap(), [127, 0x81, 0, 1, 2, 0xff]);
    }

    /// The even column is in the high half; whole numbers may be stored in any dtype, and what is none comes out as NaN.
    #[test]
    fn four_bits_are_two_columns_a_byte() {
        let expected = [7.0, -8.0, -1.0, 0.0];
        let scale = || floats("w_scale", &[1], [1.0]);
        let packed = [0x78, 0xf0];
        for stored in [
            bytes("w", &[1, 2], safetensors::Dtype::I8, &packed),
            bytes("w", &[1, 2], safetensors::Dtype::U8, &packed),
            floats("w", &[1, 2], [120.0, -16.0]),
            floats("w", &[1, 2], [120.0, 240.0]),
        ] {
            let read = RowScaled::new(checkpoint(&[stored, scale()]), Some(Bits::Four)).unwrap();
            assert_eq!(read.entries()[0].shape, [1, 4]);
            assert_eq!(numbers(&read, "w"), expected);
        }
        let odd = floats("w", &[1, 3], [0.5, 300.0, f32::NAN]);
        let read = RowScaled::new(checkpoint(&[odd, scale()]), Some(Bits::Four)).unwrap();
        assert!(numbers(&read, "w").iter().all(|value| value.is_nan()));
    }

    /// The packed numbers mean the same values.
    #[test]
    fn rows_stay_packed_when_their_scales_are_f16() {
        let half = |values: &[f32]| -> Vec<u8> {
            values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
        };
        let stored = [
            bytes("w", &[2, 3], safetensors::Dtype::I8, &[0x78, 0xf0, 0x12, 0x81, 0, 0xff]),
            bytes("w_scale", &[2], safetensors::Dtype::F16, &half(&[0.5, 3.0])),
            floats("v", &[1, 2], [1.0, 0.5]),
            bytes("v_scale", &[1], safetensors::Dtype::F16, &half(&[1.0])),
            bytes("u", &[1, 2], safetensors::Dtype::I8, &[1, 2]),
            floats("u_scale", &[1], [1.0]),
            floats("bias", &[2], [1.0, 2.0]),
        ];
        for (bits, columns) in [(Bits::Eight, 3), (Bits::Four, 6)] {
            let read = RowScaled::new(checkpoint(&stored), Some(bits)).unwrap();
            let matrix = read.packed("w").unwrap().unwrap();
            assert_eq!((matrix.shape(), matrix.quantization().block), ([2, columns], columns));
            assert_eq!(matrix.unpack(0..2), numbers(&read, "w"));
            for (name, why) in [("v", "no whole numbers"), ("u", "wide scales"), ("bias", "not quantized")] {
                assert_eq!(read.packed(name).unwrap(), None, "{why}");
            }
        }
    }

    #[test]
    fn what_does_not_fit_together_is_told_at_once() {
        let stored = [
            floats("a", &[2, 1], [1.0, 2.0]),
            floats("a_scale", &[1], [1.0]),
            floats("b", &[2], [1.0, 2.0]),
            floats("b_scale", &[2], [1.0, 1.0]),
            floats("c", &[1, 1], [1.0]),
            ints("c_scale", &[1]),
        ];
        let error = RowScaled::new(checkpoint(&stored), Some(Bits::Eight)).unwrap_err().to_string();
        for part in [
            "`a_scale` is of shape [1], expected [2]",
            "`b` is of shape [2], expected two dimensions",
            "`c_scale` is I64, expected F16",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }
}
