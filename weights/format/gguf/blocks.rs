//! ggml's quantized blocks -> f32, in ggml's order of operations, so that every bit agrees.
//!
//! The layouts are those of `ggml-common.h`; each function is checked against the `gguf` package's numpy reference.

use half::f16;
use rayon::prelude::*;

/// The values of a block of the simple types.
const SMALL: usize = 32;
/// The values of a block of the types whose names end in `_K`.
const LARGE: usize = 256;
/// How many bytes of blocks a thread takes at a time, about.
const CHUNK: usize = 1 << 14;

/// A way to store values in blocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blocks(&'static Layout);

#[derive(Debug)]
struct Layout {
    /// ggml's number for it.
    id: u32,
    name: &'static str,
    /// The values of a block, and the bytes they take.
    values: usize,
    bytes: usize,
    /// Reads one block.
    read: fn(&[u8], &mut [f32]),
}

const LAYOUTS: &[Layout] = &[
    Layout { id: 2, name: "Q4_0", values: SMALL, bytes: 18, read: q4_0 },
    Layout { id: 3, name: "Q4_1", values: SMALL, bytes: 20, read: q4_1 },
    Layout { id: 6, name: "Q5_0", values: SMALL, bytes: 22, read: q5_0 },
    Layout { id: 7, name: "Q5_1", values: SMALL, bytes: 24, read: q5_1 },
    Layout { id: 8, name: "Q8_0", values: SMALL, bytes: 34, read: q8_0 },
    Layout { id: 10, name: "Q2_K", values: LARGE, bytes: 84, read: q2_k },
    Layout { id: 11, name: "Q3_K", values: LARGE, bytes: 110, read: q3_k },
    Layout { id: 12, name: "Q4_K", values: LARGE, bytes: 144, read: q4_k },
    Layout { id: 13, name: "Q5_K", values: LARGE, bytes: 176, read: q5_k },
    Layout { id: 14, name: "Q6_K", values: LARGE, bytes: 210, read: q6_k },
];

impl Blocks {
    pub fn of(id: u32) -> Option<Self> {
        LAYOUTS.iter().find(|layout| layout.id == id).map(Self)
    }

    pub fn name(self) -> &'static str {
        self.0.name
    }

    pub fn values(self) -> usize {
        self.0.values
    }

    pub fn bytes(self) -> usize {
        self.0.bytes
    }

    /// The values of whole blocks as little-endian f32.
    pub fn dequantize(self, stored: &[u8]) -> Vec<u8> {
        let Layout { values, bytes, read, .. } = self.0;
        let mut out = vec![0; stored.len() / bytes * values * size_of::<f32>()];
        let blocks = (CHUNK / bytes).max(1);
        out.par_chunks_mut(blocks * values * size_of::<f32>())
            .zip(stored.par_chunks(blocks * bytes))
            .for_each(|(out, stored)| {
                let mut block = [0.0; LARGE];
                let block = &mut block[..*values];
                let out = out.chunks_exact_mut(values * size_of::<f32>());
                for (out, stored) in out.zip(stored.chunks_exact(*bytes)) {
                    read(stored, block);
                    for (out, value) in out.chunks_exact_mut(size_of::<f32>()).zip(&*block) {
                        out.copy_from_slice(&value.to_le_bytes());
                    }
                }
            });
        out
    }
}

/// The half-precision number at `at`.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 4 bits each: the low ones are the first half of the block, the high ones the second.
fn nibbles(quants: &[u8]) -> impl Iterator<Item = u8> {
    quants.iter().map(|q| q & 15).chain(quants.iter().map(|q| q >> 4))
}

/// `d, 16 bytes of nibbles`: `d (q - 8)`
fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (out, q) in out.iter_mut().zip(nibbles(&block[2..])) {
        *out = d * f32::from(q as i8 - 8);
    }
}

/// `d, m, 16 bytes of nibbles`: `d q + m`
fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (out, q) in out.iter_mut().zip(nibbles(&block[4..])) {
        *out = d * f32::from(q) + m;
    }
}

/// The fifth bits, one for each value, and the nibbles after them.
fn five_bits(block: &[u8]) -> impl Iterator<Item = u8> {
    let high = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    nibbles(&block[4..]).enumerate().map(move |(i, q)| q | ((high >> i & 1) as u8) << 4)
}

/// `d, 4 bytes of fifth bits, 16 bytes of nibbles`: `d (q - 16)`
fn q5_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (out, q) in out.iter_mut().zip(five_bits(&block[2..])) {
        *out = d * f32::from(q as i8 - 16);
    }
}

/// `d, m, 4 bytes of fifth bits, 16 bytes of nibbles`: `d q + m`
fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (out, q) in out.iter_mut().zip(five_bits(&block[4..])) {
        *out = d * f32::from(q) + m;
    }
}

/// `d, 32 signed bytes`: `d q`
fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half(block, 0);
    for (out, &q) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(q as i8) * d;
    }
}

/// `16 bytes of 4-bit scale and minimum, 64 bytes of 2 bits, d, dmin`: `d scale q - dmin minimum`, 16 values a scale.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, quants) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half(block, 80), half(block, 82));
    for (group, (out, scale)) in out.chunks_exact_mut(16).zip(scales).enumerate() {
        let (scale, minimum) = (d * f32::from(scale & 15), dmin * f32::from(scale >> 4));
        for (i, out) in out.iter_mut().enumerate() {
            let (byte, bits) = two_bits(16 * group + i);
            *out = scale * f32::from(quants[byte] >> bits & 3) - minimum;
        }
    }
}

/// Where the two bits of value `i` are: 128 values share 32 bytes, each 32 of them two bits further up.
fn two_bits(i: usize) -> (usize, usize) {
    (i / 128 * 32 + i % 32, i % 128 / 32 * 2)
}

/// `32 bytes of high bits, 64 bytes of 2 bits, 12 bytes of 6-bit scales, d`: `d (scale - 32) q`, 16 values a scale.
/// A high bit that is not set takes 4 from q.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, quants, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        // four low bits in the first 8 bytes, two high bits in the last 4
        let low = packed[group % 8] >> (group / 8 * 4) & 15;
        let scale = low | (packed[8 + group % 4] >> (group / 4 * 2) & 3) << 4;
        let scale = d * f32::from(scale as i8 - 32);
        for (j, out) in out.iter_mut().enumerate() {
            let i = 16 * group + j;
            let (byte, bits) = two_bits(i);
            let q = (quants[byte] >> bits & 3) as i8;
            let is_high = high[i % 32] >> (i / 32) & 1 == 1;
            *out = scale * f32::from(if is_high { q } else { q - 4 });
        }
    }
}

/// The 6-bit scale and minimum of each 32 values, from 12 bytes.
fn scale_and_minimum(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, minimum) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let both = packed[group + 4];
        (both & 15 | (packed[group - 4] >> 6) << 4, both >> 4 | (packed[group] >> 6) << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

/// The nibble of value `i`: 64 values share 32 bytes, the first half of them in the low bits.
fn nibble(quants: &[u8], i: usize) -> u8 {
    quants[i / 64 * 32 + i % 32] >> (i % 64 / 32 * 4) & 15
}

/// `d, dmin, 12 bytes of scales and minima, 128 bytes of nibbles`: `d scale q - dmin minimum`, 32 values a scale.
fn q4_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, packed, quants) = (half(block, 0), half(block, 2), &block[4..16], &block[16..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for (i, out) in out.iter_mut().enumerate() {
            *out = scale * f32::from(nibble(quants, 32 * group + i)) - minimum;
        }
    }
}

/// As [`q4_k`], with 32 bytes of fifth bits before the nibbles: bit `g` of byte `i` is for value `i` of group `g`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let (d, dmin, packed) = (half(block, 0), half(block, 2), &block[4..16]);
    let (high, quants) = (&block[16..48], &block[48..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (scale, minimum) = scale_and_minimum(packed, group);
        let (scale, minimum) = (d * scale, dmin * minimum);
        for (i, out) in out.iter_mut().enumerate() {
            let q = nibble(quants, 32 * group + i) | (high[i] >> group & 1) << 4;
            *out = scale * f32::from(q) - minimum;
        }
    }
}

/// `128 bytes of nibbles, 64 bytes of 2 high bits, 16 signed scales, d`: `d scale (q - 32)`, 16 values a scale.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let scale = d * f32::from(scales[group] as i8);
        for (j, out) in out.iter_mut().enumerate() {
            let i = 16 * group + j;
            // 128 values share 64 bytes: the first half of them in the low bits
            let nibble = low[i / 128 * 64 + i % 64] >> (i % 128 / 64 * 4) & 15;
            let (byte, bits) = two_bits(i);
            let q = nibble | (high[byte] >> bits & 3) << 4;
            *out = scale * f32::from(q as i8 - 32);
        }
    }
}
