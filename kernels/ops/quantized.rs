//! Matrices of whole numbers in blocks, and the products with them: weights in 8 or 4 bits, activations in f32, many rows of
//! them rounded to 16 bits.

use std::fmt;
use std::ops::Range;

use burn::tensor::{DType, Device, Tensor, TensorData};
use half::f16;
use rayon::prelude::*;

use super::linear::uncounted;
use crate::count;
use crate::cpu::Instructions;
use crate::cpu::host::{self, Values, is_host};
use crate::cpu::quantized::{self, Unpack};
use crate::cpu::rounded;

/// So many rows of activations, in f32, read the matrix where it lies; for more panels of it are unpacked for the product of
/// floats.
const FEW_ROWS: usize = 16;
/// So many rows are rounded, where the matrix has [`MANY_VALUES`].
const MANY_ROWS: usize = 5;
/// Of a matrix that activations are worth rounding for: products with smaller ones take no time, and stay those of floats.
const MANY_VALUES: usize = 1 << 20;
/// Values of a panel: 16 MiB in f32.
const PANEL: usize = 1 << 22;

/// How many bits a value takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bits {
    /// From -127 to 127.
    Eight,
    /// From 0 to 15, or from -8 to 7.
    Four,
}

impl Bits {
    /// Both.
    pub const ALL: [Bits; 2] = [Bits::Eight, Bits::Four];

    /// The number.
    pub const fn count(self) -> u64 {
        match self {
            Bits::Eight => 8,
            Bits::Four => 4,
        }
    }

    /// The bytes that so many values take; with 4 bits an even number of them.
    pub const fn bytes(self, values: usize) -> usize {
        match self {
            Bits::Eight => values,
            Bits::Four => values / 2,
        }
    }

    /// Writes the number of a column into a row of zeros.
    pub fn put(self, row: &mut [u8], col: usize, code: i32) {
        match self {
            Bits::Eight => row[col] = code as i8 as u8,
            Bits::Four => row[col / 2] |= (code as u8) << (4 * (col % 2)),
        }
    }
}

/// How matrices are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// Per value.
    pub bits: Bits,
    /// Values that share a scale.
    pub block: usize,
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "int{} in blocks of {}", self.bits.count(), self.block)
    }
}

impl Quantization {
    /// 8 bits in blocks of 32.
    pub const INT8: Self = Self { bits: Bits::Eight, block: 32 };
    /// 4 bits in blocks of 32.
    pub const INT4: Self = Self { bits: Bits::Four, block: 32 };

    /// Whether a matrix of `[rows, cols]` is worth packing, and can be: it has a whole block, and with 4 bits an even
    /// number of columns.
    pub const fn fits(self, [rows, cols]: [usize; 2]) -> bool {
        let whole_bytes = match self.bits {
            Bits::Eight => true,
            Bits::Four => cols.is_multiple_of(2),
        };
        rows > 0 && cols >= self.block && whole_bytes
    }

    /// The bytes of a packed matrix of `[rows, cols]`, scales and minima included.
    pub const fn bytes(self, [rows, cols]: [usize; 2]) -> usize {
        let blocks = cols.div_ceil(self.block);
        let halves = match self.bits {
            Bits::Eight => blocks,
            Bits::Four => 2 * blocks,
        };
        rows * (self.bits.bytes(cols) + 2 * halves)
    }

    /// The range of every block of a matrix of so many columns.
    pub fn ranges(self, cols: usize, values: &[f32]) -> Vec<BlockRange> {
        let Self { bits, block } = self;
        values
            .par_chunks(cols.max(1))
            .flat_map_iter(|row| row.chunks(block).map(move |block| BlockRange::of(block, bits)))
            .collect()
    }
}

/// What the numbers of a block mean: `q * scale + min`.
#[derive(Debug, Clone, Copy)]
pub struct BlockRange {
    /// Between neighbouring numbers.
    pub scale: f16,
    /// What 0 means; 0 with 8 bits.
    pub min: f16,
    bits: Bits,
}

impl BlockRange {
    /// The narrowest range that holds all of `values`. With 8 bits `scale` is the largest magnitude over 127; with 4 bits
    /// `min` is the least value and `scale` the span over 15. Both are rounded outwards, so that every value comes back
    /// within `scale / 2`.
    pub fn of(values: &[f32], bits: Bits) -> Self {
        match bits {
            Bits::Eight => {
                let largest = values.iter().fold(0.0_f32, |largest, value| largest.max(value.abs()));
                Self { scale: at_least(largest / 127.0), min: f16::ZERO, bits }
            }
            Bits::Four => {
                let lowest = values.iter().copied().fold(f32::INFINITY, f32::min);
                let highest = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let min = -at_least(-lowest);
                Self { scale: at_least((highest - min.to_f32()) / 15.0), min, bits }
            }
        }
    }

    /// Whether the values are within the range of f16.
    pub fn is_finite(self) -> bool {
        self.scale.is_finite() && self.min.is_finite()
    }

    /// The number for a value, and what will be read for it.
    pub fn code(self, value: f32) -> (i32, f32) {
        let (scale, min) = (self.scale.to_f32(), self.min.to_f32());
        let code = if scale > 0.0 { ((value - min) / scale).round_ties_even() } else { 0.0 };
        let code = match self.bits {
            Bits::Eight => code.clamp(-127.0, 127.0),
            Bits::Four => code.clamp(0.0, 15.0),
        };
        (code as i32, code * scale + min)
    }
}

/// The least f16 that is not below `x`.
fn at_least(x: f32) -> f16 {
    let rounded = f16::from_f32(x);
    match rounded.to_f32() < x {
        true if rounded.is_sign_negative() => f16::from_bits(rounded.to_bits() - 1),
        true => f16::from_bits(rounded.to_bits() + 1),
        false => rounded,
    }
}

/// A matrix of `[rows, cols]` in 8 or 4 bits, in the memory of the host.
///
/// A block is so many neighbouring values of one row, the last one of a row may be shorter.
#[derive(Clone, PartialEq)]
pub struct PackedMatrix {
    quantization: Quantization,
    shape: [usize; 2],
    /// `[rows, cols]` of i8; or `[rows, cols / 2]`, the even column in the low four bits, the odd one above it.
    codes: Vec<u8>,
    /// `[rows, blocks]`.
    scales: Vec<f16>,
    /// `[rows, blocks]`; `None` when the numbers are symmetric about zero.
    mins: Option<Vec<f16>>,
}

impl fmt::Debug for PackedMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackedMatrix({:?}, {})", self.shape, self.quantization)
    }
}

impl PackedMatrix {
    /// Numbers about zero. With 8 bits a code is an i8 and means `code * scale`; with 4 bits it is from 0 to 15, the even
    /// column in the low half of a byte, and means `(code - 8) * scale`. A block as long as a row is a scale per row.
    ///
    /// # Panics
    /// If `codes` are not the bytes of `shape`, `scales` not one per block, or the columns odd with 4 bits.
    pub fn symmetric(
        quantization: Quantization,
        shape: [usize; 2],
        codes: Vec<u8>,
        scales: Vec<f16>,
    ) -> Self {
        Self { quantization, shape, codes, scales, mins: None }.checked()
    }

    /// Numbers of 4 bits from a minimum upwards: a code from 0 to 15 means `code * scale + min`.
    ///
    /// # Panics
    /// If `codes` are not the bytes of `shape`, `scales` and `mins` not one per block, or the columns odd.
    pub fn from_minima(
        block: usize,
        shape: [usize; 2],
        codes: Vec<u8>,
        scales: Vec<f16>,
        mins: Vec<f16>,
    ) -> Self {
        let quantization = Quantization { bits: Bits::Four, block };
        assert_eq!(mins.len(), scales.len(), "a minimum per scale");
        Self { quantization, shape, codes, scales, mins: Some(mins) }.checked()
    }

    fn checked(self) -> Self {
        let Quantization { bits, block } = self.quantization;
        let [rows, cols] = self.shape;
        assert!(block > 0, "blocks of no value");
        assert!(bits == Bits::Eight || cols.is_multiple_of(2), "{cols} columns are odd");
        assert_eq!(self.codes.len(), rows * bits.bytes(cols), "bytes of {self:?}");
        assert_eq!(self.scales.len(), rows * self.blocks(), "scales of {self:?}");
        self
    }

    /// The nearest packed matrix, as `volary quantize` packs it: symmetric with 8 bits, from minima with 4.
    ///
    /// Values that are no numbers, or too large for f16, come back as such or as anything.
    ///
    /// # Panics
    /// If `values` are not those of `shape`, or the columns odd with 4 bits.
    pub fn pack(quantization: Quantization, shape: [usize; 2], values: &[f32]) -> Self {
        let [rows, cols] = shape;
        let Quantization { bits, block } = quantization;
        assert_eq!(values.len(), rows * cols, "values of {shape:?}");
        let mut codes = vec![0; rows * bits.bytes(cols)];
        let ranges = quantization.ranges(cols, values);
        if !codes.is_empty() {
            codes
                .par_chunks_mut(bits.bytes(cols))
                .zip(values.par_chunks(cols))
                .zip(ranges.par_chunks(cols.div_ceil(block)))
                .for_each(|((codes, values), ranges)| {
                    for (col, &value) in values.iter().enumerate() {
                        let (code, _) = ranges[col / block].code(value);
                        bits.put(codes, col, code);
                    }
                });
        }
        let scales = ranges.iter().map(|range| range.scale).collect();
        match bits {
            Bits::Eight => Self::symmetric(quantization, shape, codes, scales),
            Bits::Four => {
                let mins = ranges.iter().map(|range| range.min).collect();
                Self::from_minima(block, shape, codes, scales, mins)
            }
        }
    }

    /// How it is packed.
    pub fn quantization(&self) -> Quantization {
        self.quantization
    }

    /// `[rows, cols]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// How many blocks were packed from values too large for f16, and the place of the first value of the first.
    pub fn not_finite(&self) -> Option<(usize, usize)> {
        let mins = self.mins.iter().flatten().copied().chain(std::iter::repeat(f16::ZERO));
        let is_finite = |(scale, min): (&f16, f16)| scale.is_finite() && min.is_finite();
        let mut bad = self.scales.iter().zip(mins).enumerate().filter(|&(_, range)| !is_finite(range));
        let (first, _) = bad.next()?;
        let blocks = self.blocks();
        Some((1 + bad.count(), first / blocks * self.shape[1] + first % blocks * self.quantization.block))
    }

    /// The bytes it takes.
    pub fn bytes(&self) -> usize {
        self.codes.len() + 2 * (self.scales.len() + self.mins.as_ref().map_or(0, Vec::len))
    }

    /// Blocks of a row.
    pub(crate) fn blocks(&self) -> usize {
        self.shape[1].div_ceil(self.quantization.block)
    }

    /// The codes of rows.
    pub(crate) fn codes(&self, rows: Range<usize>) -> &[u8] {
        let width = self.quantization.bits.bytes(self.shape[1]);
        &self.codes[rows.start * width..rows.end * width]
    }

    /// The scales of rows, and what code 0 means in them; block by block. Without the latter it means 0 with 8 bits, and
    /// -8 scales with 4.
    pub(crate) fn halves(&self, rows: Range<usize>) -> (&[f16], Option<&[f16]>) {
        let blocks = rows.start * self.blocks()..rows.end * self.blocks();
        (&self.scales[blocks.clone()], self.mins.as_ref().map(|mins| &mins[blocks]))
    }

    /// Some of its rows.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn rows(&self, rows: Range<usize>) -> Self {
        let [_, cols] = self.shape;
        let blocks = rows.start * self.blocks()..rows.end * self.blocks();
        let mins = self.mins.as_ref().map(|mins| mins[blocks.clone()].to_vec());
        Self {
            quantization: self.quantization,
            shape: [rows.len(), cols],
            codes: self.codes(rows).to_vec(),
            scales: self.scales[blocks].to_vec(),
            mins,
        }
    }

    /// Matrices below each other; `None` when there is none, or they differ in columns or packing.
    pub fn stack(parts: Vec<Self>) -> Option<Self> {
        let mut parts = parts.into_iter();
        let mut all = parts.next()?;
        for part in parts {
            let alike = part.quantization == all.quantization
                && part.shape[1] == all.shape[1]
                && part.mins.is_some() == all.mins.is_some();
            if !alike {
                return None;
            }
            all.shape[0] += part.shape[0];
            all.codes.extend(part.codes);
            all.scales.extend(part.scales);
            if let (Some(mins), Some(more)) = (&mut all.mins, part.mins) {
                mins.extend(more);
            }
        }
        Some(all)
    }

    /// The values of one row.
    ///
    /// # Panics
    /// If there is no such row, or `out` is not as long as a row.
    pub fn unpack_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.shape[1], "columns");
        let (scales, mins) = self.halves(row..row + 1);
        let codes = self.codes(row..row + 1);
        Instructions::in_use().run(Unpack { quantization: self.quantization, codes, scales, mins, out });
    }

    /// The values of some rows, `[rows, cols]`.
    ///
    /// # Panics
    /// If it has not so many.
    pub fn unpack(&self, rows: Range<usize>) -> Vec<f32> {
        let [_, cols] = self.shape;
        let mut out = vec![0.0; rows.len() * cols];
        if cols > 0 {
            let each = out.par_chunks_mut(cols).enumerate();
            each.for_each(|(row, out)| self.unpack_row(rows.start + row, out));
        }
        out
    }

    fn tensor(&self, rows: Range<usize>, device: &Device) -> Tensor<2> {
        let shape = [rows.len(), self.shape[1]];
        Tensor::from_data(TensorData::new(self.unpack(rows), shape), (device, DType::F32))
    }
}

/// `y = x Wᵀ`, `[..., cols] -> [..., rows]`, for a packed matrix `W` of `[rows, cols]`. It is never unpacked as a whole.
///
/// Products are summed in f32 whatever the dtype of `x`, which the result gets. `W` is a constant to autodiff.
///
/// On the CPU five rows and more are rounded to 16 bits if `W` has a million values, each 32 columns by a scale of their own: a
/// value by at most 1.6e-5 of the greatest magnitude among them. Sums of products are whole numbers there within those
/// columns. Where blocks are neither 32 columns nor a multiple, nor a row, where gradients are wanted, and on other devices,
/// panels of `W` are unpacked on the host at every call instead: right, and slow.
///
/// # Panics
/// If the last dimension of `x` is not `cols`.
pub fn quantized_linear<const D: usize>(x: Tensor<D>, weight: &PackedMatrix) -> Tensor<D> {
    let [rows, cols] = weight.shape();
    let mut shape = x.dims();
    assert_eq!(shape[D - 1], cols, "width of the input against {weight:?}");
    let many: usize = shape[..D - 1].iter().product();
    shape[D - 1] = rows;
    count::add(many * rows * cols, weight.quantization().bytes(weight.shape()));
    let (device, dtype) = (x.device(), x.dtype());
    if many == 0 || rows == 0 || cols == 0 {
        return Tensor::zeros(shape, (&device, dtype));
    }
    let is_many = many >= MANY_ROWS && rows * cols >= MANY_VALUES;
    let y = if is_host(&x) && is_many && rounded::has_whole_chunks(weight) {
        host::tensor(rounded::products(weight, &Values::of(x)), shape)
    } else if is_host(&x) && many <= FEW_ROWS {
        let mut y = vec![0.0; many * rows];
        quantized::products(weight, &Values::of(x), &mut y);
        host::tensor(y, shape)
    } else {
        let x = x.cast(DType::F32);
        let height = (PANEL / cols).max(1);
        let panels = (0..rows).step_by(height).map(|start| {
            let panel = weight.tensor(start..rows.min(start + height), &device);
            uncounted(x.clone(), panel, None, None)
        });
        Tensor::cat(panels.collect(), D - 1)
    };
    y.cast(dtype)
}

#[cfg(test)]
mod tests;
