//! Matrix products tile by tile, for convolutions and for half precision: the rows of one matrix as they lie, with columns
//! that are laid out on the way.
//!
//! A tile's columns are packed in panels of [`PANEL`], a block of the inner axis at a time, which stays in a core's cache
//! while all rows pass by. Rows, which are weights mostly, are not laid out anew as a whole: pictures of few pixels would
//! wait for that longer than for the product. A value's sum is taken in one order whatever the tiles and the threads are.

use std::ops::Range;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::Instructions;

/// Columns of a panel.
pub const PANEL: usize = 64;
/// Narrower panels are as wide as a multiple of this.
pub const LANES: usize = 16;
/// Panels of a tile.
const PANELS: usize = 4;
/// Inner places of a block.
const BLOCK: usize = 128;
/// Inner places that are packed at a time.
const STRIP: usize = 16;
/// Rows that pass a panel at a time.
pub const ROWS: usize = 6;
/// Tasks for each thread, where there are rows and columns for so many.
const TASKS: usize = 4;

/// A matrix whose columns are asked for piece by piece.
pub trait Columns<T>: Sync {
    /// Writes places `inner` of [`PANEL`] columns from `first` on to `strip`, `[inner, PANEL]`, and 0 beyond the last
    /// column.
    fn pack(&self, inner: Range<usize>, first: usize, strip: &mut [T]);
}

/// A matrix whose columns lie one behind the other.
pub struct Transposed<'a, T> {
    /// `[columns, inner]`
    values: &'a [T],
    inner: usize,
}

impl<'a, T> Transposed<'a, T> {
    /// Of `values`, `[columns, inner]`.
    pub fn new(values: &'a [T], inner: usize) -> Self {
        Self { values, inner }
    }
}

impl<T: Number> Columns<T> for Transposed<'_, T> {
    fn pack(&self, inner: Range<usize>, first: usize, strip: &mut [T]) {
        for lane in 0..PANEL {
            let start = (first + lane) * self.inner + inner.start;
            let column = self.values.get(start..start + inner.len()).unwrap_or_default();
            let place = |at| column.get(at).copied().unwrap_or_default();
            strip[lane..].iter_mut().step_by(PANEL).enumerate().for_each(|(at, value)| *value = place(at));
        }
    }
}

/// `out`, `[matrices, rows, columns]`, becomes the products of `rows`, `[rows, inner]`, with each of the matrices. Sums are
/// f32.
///
/// - `bias`: a number for each row, added to its products
///
/// # Panics
/// If sizes do not fit.
pub fn product<T: Number>(
    rows: &[T],
    inner: usize,
    matrices: &[impl Columns<T>],
    columns: usize,
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    product_with(T::body(), rows, inner, matrices, columns, bias, out);
}

fn product_with<T: Number>(
    body: Body,
    rows: &[T],
    inner: usize,
    matrices: &[impl Columns<T>],
    columns: usize,
    bias: Option<&[f32]>,
    out: &mut [T],
) {
    if out.is_empty() {
        return;
    }
    let n_rows = out.len() / (matrices.len() * columns);
    assert_eq!(out.len(), matrices.len() * n_rows * columns, "whole rows of {columns} columns");
    assert_eq!(rows.len(), n_rows * inner, "{n_rows} rows of {inner} numbers");
    if let Some(bias) = bias {
        assert_eq!(bias.len(), n_rows, "a bias of every row");
    }
    let width = PANELS * PANEL;
    let n_tiles = columns.div_ceil(width);
    let bands = (TASKS * rayon::current_num_threads()).div_ceil(matrices.len() * n_tiles);
    let height = n_rows.div_ceil(bands).next_multiple_of(ROWS).max(4 * ROWS);

    let mut tasks: Vec<Task<T>> = Vec::new();
    for (matrix, out) in out.chunks_mut(n_rows * columns).enumerate() {
        for (band, out) in out.chunks_mut(height * columns).enumerate() {
            let before = tasks.len();
            let task = |tile| Task { matrix, row: band * height, column: tile * width, out: Vec::new() };
            tasks.extend((0..n_tiles).map(task));
            for row in out.chunks_mut(columns) {
                for (task, piece) in tasks[before..].iter_mut().zip(row.chunks_mut(width)) {
                    task.out.push(piece);
                }
            }
        }
    }
    tasks.into_par_iter().for_each_init(Scratch::default, |scratch, task| {
        let rows = &rows[task.row * inner..][..task.out.len() * inner];
        let matrix = &matrices[task.matrix];
        task.run(body, rows, inner, matrix, bias, scratch);
    });
}

/// A piece of the output.
struct Task<'a, T> {
    matrix: usize,
    /// The first row.
    row: usize,
    /// The first column.
    column: usize,
    /// Of each row a piece.
    out: Vec<&'a mut [T]>,
}

/// Room for what a task lays out.
#[derive(Default)]
struct Scratch<T> {
    /// `[STRIP, PANEL]`
    strip: Vec<T>,
    /// `[panels, words, PANEL]`
    panels: Vec<f32>,
    /// `[ROWS, words]`
    rows: Vec<f32>,
    /// `[rows, panels, PANEL]`
    sums: Vec<f32>,
}

impl<T: Number> Task<'_, T> {
    /// `rows` are its own.
    fn run(
        mut self,
        body: Body,
        rows: &[T],
        inner: usize,
        matrix: &impl Columns<T>,
        bias: Option<&[f32]>,
        Scratch { strip, panels, rows: some, sums }: &mut Scratch<T>,
    ) {
        let (height, width) = (self.out.len(), self.out[0].len());
        let n_panels = width.div_ceil(PANEL);
        let stride = n_panels * PANEL;
        strip.resize(STRIP * PANEL, T::default());
        sums.clear();
        sums.resize(height * stride, 0.0);
        for first in (0..inner).step_by(BLOCK) {
            let block = first..inner.min(first + BLOCK);
            let words = block.len().div_ceil(body.per_word());
            panels.resize(n_panels * words * PANEL, 0.0);
            for (at, panel) in panels.chunks_mut(words * PANEL).enumerate() {
                let words = STRIP / body.per_word();
                for (at_strip, panel) in panel.chunks_mut(words * PANEL).enumerate() {
                    let start = first + at_strip * STRIP;
                    let part = start..block.end.min(start + STRIP);
                    let strip = &mut strip[..part.len() * PANEL];
                    matrix.pack(part, self.column + at * PANEL, strip);
                    T::lay_out(body, strip, PANEL, panel);
                }
            }
            some.resize(ROWS * words, 0.0);
            for (row, sums) in (0..).step_by(ROWS).zip(sums.chunks_mut(ROWS * stride)) {
                let count = sums.len() / stride;
                for (at, some) in some.chunks_mut(words).enumerate().take(count) {
                    let row = (row + at) * inner;
                    T::lay_out(body, &rows[row + block.start..row + block.end], 1, some);
                }
                let some = &some[..count * words];
                for (at, panel) in panels.chunks(words * PANEL).enumerate() {
                    body.add(some, panel, PANEL, &mut sums[at * PANEL..], stride);
                }
            }
        }
        for (at, (out, sums)) in self.out.iter_mut().zip(sums.chunks_mut(stride)).enumerate() {
            let sums = &mut sums[..width];
            if let Some(bias) = bias {
                sums.iter_mut().for_each(|sum| *sum += bias[self.row + at]);
            }
            T::narrow(sums, out);
        }
    }
}

/// What matrices hold.
pub trait Number: Copy + Default + Send + Sync {
    /// The fastest that runs here.
    fn body() -> Body {
        Body::of_floats()
    }

    /// Numbers as a body reads them: rows `[inner, width]` become words `[words, width]`.
    fn lay_out(body: Body, from: &[Self], width: usize, to: &mut [f32]);
    /// Rounds.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Number for f32 {
    fn lay_out(_: Body, from: &[f32], _: usize, to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for f16 {
    fn lay_out(_: Body, from: &[f16], _: usize, to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Number for bf16 {
    fn body() -> Body {
        match Body::of_floats() {
            #[cfg(target_arch = "x86_64")]
            Body::Avx512 if is_x86_feature_detected!("avx512bf16") => Body::Pairs,
            body => body,
        }
    }

    fn lay_out(body: Body, from: &[bf16], width: usize, to: &mut [f32]) {
        if body.per_word() == 1 {
            return from.iter().zip(to).for_each(|(from, to)| *to = from.to_f32());
        }
        let pair = |low: bf16, high: bf16| {
            f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
        };
        if width == 1 {
            let (pairs, odd) = from.as_chunks::<2>();
            to.iter_mut().zip(pairs).for_each(|(to, &[low, high])| *to = pair(low, high));
            if let (Some(to), Some(&odd)) = (to.get_mut(pairs.len()), odd.first()) {
                *to = pair(odd, bf16::ZERO);
            }
            return;
        }
        for (two, to) in from.chunks(2 * width).zip(to.chunks_mut(width)) {
            match two.split_at(width) {
                (low, []) => to.iter_mut().zip(low).for_each(|(to, &low)| *to = pair(low, bf16::ZERO)),
                (low, high) => {
                    to.iter_mut()
                        .zip(low.iter().zip(high))
                        .for_each(|(to, (&low, &high))| *to = pair(low, high));
                }
            }
        }
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(from);
    }
}

/// Which instructions are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Body {
    /// Those of the compiler's choice.
    Plain,
    /// 8 numbers at a time.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 16 numbers at a time.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// 16 pairs of bf16 at a time.
    #[cfg(target_arch = "x86_64")]
    Pairs,
}

impl Body {
    /// That in f32 for the instructions in use.
    pub fn of_floats() -> Self {
        Self::of(Instructions::in_use())
    }

    fn of(instructions: Instructions) -> Self {
        match instructions {
            Instructions::Plain => Self::Plain,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
        }
    }

    /// Inner places that a word of 32 bits holds.
    fn per_word(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => 2,
            _ => 1,
        }
    }

    /// Adds to `sums`, rows of `width` every `stride`, the products of as many `rows`, `[rows, words]`, up to [`ROWS`], with
    /// a `panel`, `[words, width]`. The width is a multiple of [`LANES`] up to [`PANEL`].
    ///
    /// # Panics
    /// If sizes do not fit.
    pub fn add(self, rows: &[f32], panel: &[f32], width: usize, sums: &mut [f32], stride: usize) {
        match rows.len() / (panel.len() / width) {
            1 => self.add_rows::<1>(rows, panel, width, sums, stride),
            2 => self.add_rows::<2>(rows, panel, width, sums, stride),
            3 => self.add_rows::<3>(rows, panel, width, sums, stride),
            4 => self.add_rows::<4>(rows, panel, width, sums, stride),
            5 => self.add_rows::<5>(rows, panel, width, sums, stride),
            _ => self.add_rows::<ROWS>(rows, panel, width, sums, stride),
        }
    }

    fn add_rows<const R: usize>(
        self,
        rows: &[f32],
        panel: &[f32],
        width: usize,
        sums: &mut [f32],
        stride: usize,
    ) {
        let words = panel.len() / width;
        assert!(width.is_multiple_of(LANES) && (LANES..=PANEL).contains(&width), "a panel of {width}");
        assert!(rows.len() == R * words && panel.len() == words * width, "{R} rows of {words} words");
        assert!(sums.len() >= (R - 1) * stride + width, "{R} rows of sums");
        match (self, width / LANES) {
            (Self::Plain, _) => plain(rows, panel, width, sums, stride),
            // SAFETY (of all): the instructions were found on this machine, and the sizes are as they should be.
            #[cfg(target_arch = "x86_64")]
            (Self::Avx2, _) => unsafe { avx2::<R, 2>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, 1) => unsafe { avx512::<R, 1>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, 2) => unsafe { avx512::<R, 2>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, 3) => unsafe { avx512::<R, 3>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Avx512, _) => unsafe { avx512::<R, 4>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Pairs, 4) => unsafe { pairs::<R, 4>(rows, panel, width, sums, stride) },
            #[cfg(target_arch = "x86_64")]
            (Self::Pairs, _) => unsafe { pairs::<R, 1>(rows, panel, width, sums, stride) },
        }
    }
}

fn plain(rows: &[f32], panel: &[f32], width: usize, sums: &mut [f32], stride: usize) {
    let words = panel.len() / width;
    for (row, sums) in rows.chunks(words).zip(sums.chunks_mut(stride)) {
        for (value, panel) in row.iter().zip(panel.chunks(width)) {
            for (sum, other) in sums.iter_mut().zip(panel) {
                *sum += value * other;
            }
        }
    }
}

/// The body of `R` rows in registers of so many lanes, `S` of them side by side, which divide the width.
///
/// # Safety
/// `rows` are `R` times as many words as the panel, and `sums` hold `R` rows of `width`.
#[cfg(target_arch = "x86_64")]
macro_rules! body {
    (
        $name:ident, $features:literal, $lanes:literal,
        $zero:ident, $load:ident, $store:ident, $set:ident, |$sum:ident, $value:ident, $other:ident| $add:expr
    ) => {
        #[target_feature(enable = $features)]
        #[allow(clippy::needless_range_loop)] // several arrays side by side
        unsafe fn $name<const R: usize, const S: usize>(
            rows: &[f32],
            panel: &[f32],
            width: usize,
            sums: &mut [f32],
            stride: usize,
        ) {
            use std::arch::x86_64::*;

            let words = panel.len() / width;
            let (rows, panel, sums) = (rows.as_ptr(), panel.as_ptr(), sums.as_mut_ptr());
            for from in (0..width).step_by($lanes * S) {
                let mut held = [[$zero(); S]; R];
                for r in 0..R {
                    for s in 0..S {
                        // SAFETY: the caller gives whole rows.
                        held[r][s] = unsafe { $load(sums.add(r * stride + from + s * $lanes)) };
                    }
                }
                for word in 0..words {
                    let mut others = [$zero(); S];
                    for s in 0..S {
                        // SAFETY: as above.
                        others[s] = unsafe { $load(panel.add(word * width + from + s * $lanes)) };
                    }
                    for r in 0..R {
                        // SAFETY: as above.
                        let $value = $set(unsafe { *rows.add(r * words + word) });
                        for s in 0..S {
                            let ($sum, $other) = (held[r][s], others[s]);
                            held[r][s] = $add;
                        }
                    }
                }
                for r in 0..R {
                    for s in 0..S {
                        // SAFETY: as above.
                        unsafe { $store(sums.add(r * stride + from + s * $lanes), held[r][s]) };
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
body!(
    avx2,
    "avx2,fma",
    8,
    _mm256_setzero_ps,
    _mm256_loadu_ps,
    _mm256_storeu_ps,
    _mm256_set1_ps,
    |sum, value, other| _mm256_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
body!(
    avx512,
    "avx512f",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    |sum, value, other| _mm512_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
body!(
    pairs,
    "avx512f,avx512bf16",
    16,
    _mm512_setzero_ps,
    _mm512_loadu_ps,
    _mm512_storeu_ps,
    _mm512_set1_ps,
    // SAFETY: words of as many bits
    |sum, value, other| unsafe {
        _mm512_dpbf16_ps(
            sum,
            std::mem::transmute::<__m512, __m512bh>(value),
            std::mem::transmute::<__m512, __m512bh>(other),
        )
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    /// A matrix, `[inner, columns]`.
    struct Held<'a, T>(&'a [T], usize);

    impl<T: Number> Columns<T> for Held<'_, T> {
        fn pack(&self, inner: Range<usize>, first: usize, strip: &mut [T]) {
            let &Held(values, columns) = self;
            for (at, strip) in inner.zip(strip.chunks_mut(PANEL)) {
                for (column, value) in (first..).zip(strip) {
                    let is_there = column < columns;
                    *value = if is_there { values[at * columns + column] } else { T::default() };
                }
            }
        }
    }

    /// All bodies beside a sum in f64, with broken and whole rows, panels, tiles, strips and blocks.
    #[test]
    fn bodies_agree() {
        let mut random = fastrand::Rng::with_seed(3);
        for [n_rows, inner, columns, count] in [
            [1, 1, 1, 1],
            [7, 33, 65, 2],
            [26, 131, 260, 1],
            [5, 300, 64, 3],
            [3, 2, 600, 1],
            [64, 15, 31, 1],
        ] {
            let mut values = |count| -> Vec<f32> { (0..count).map(|_| random.f32() * 2.0 - 1.0).collect() };
            let (rows, others) = (values(n_rows * inner), values(count * inner * columns));
            let bias = values(n_rows);
            let mut bodies: Vec<Body> = Instructions::all().into_iter().map(Body::of).collect();
            check(&rows, &others, [inner, columns], &bias, &bodies, 4e-6);
            let [rows, others] = [rows, others]
                .map(|values| -> Vec<bf16> { values.into_iter().map(bf16::from_f32).collect() });
            bodies.push(bf16::body());
            check(&rows, &others, [inner, columns], &bias, &bodies, 5e-3);
        }
    }

    fn check<T: Number + Into<f64>>(
        rows: &[T],
        others: &[T],
        [inner, columns]: [usize; 2],
        bias: &[f32],
        bodies: &[Body],
        tolerance: f64,
    ) {
        let matrices: Vec<Held<T>> =
            others.chunks(inner * columns).map(|values| Held(values, columns)).collect();
        let products = matrices.iter().flat_map(|Held(values, _)| {
            rows.chunks(inner).flat_map(move |row| {
                (0..columns).map(move |column| {
                    let column = values[column..].iter().step_by(columns);
                    row.iter().zip(column).map(|(&a, &b)| a.into() * b.into()).sum::<f64>()
                })
            })
        });
        let products: Vec<f64> = products.collect();
        let tolerance = tolerance * (inner as f64).sqrt().max(2.0);
        for &body in bodies {
            for bias in [None, Some(bias)] {
                let mut out = vec![T::default(); products.len()];
                product_with(body, rows, inner, &matrices, columns, bias, &mut out);
                for (at, (&found, product)) in out.iter().zip(&products).enumerate() {
                    let (row, column) = (at / columns % (rows.len() / inner), at % columns);
                    let expected = product + bias.map_or(0.0, |bias| f64::from(bias[row]));
                    let found: f64 = found.into();
                    let apart = (found - expected).abs();
                    assert!(apart < tolerance, "{body:?} at {row}, {column}: {found}, not {expected}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "2 rows of 3 numbers")]
    fn rows_must_be_whole() {
        product(&[0.0; 5], 3, &[Held(&[0.0; 6], 2)], 2, None, &mut [0.0; 4]);
    }
}
