//! Products of two matrices in f32 or half precision, for linear layers, experts, convolutions and attention. Sums are f32.
//!
//! A task has some rows and some columns of the product. [`DEPTH`] words of the inner axis at a time, its rows are copied
//! side by side, and the columns are laid out in panels that are as wide as a tile of the product, which is summed in
//! registers; a panel stays in the nearest cache while all rows go by. A word is a number in f32, or two neighbours in bf16
//! where the machine multiplies such pairs. What is laid out next is asked for while the first tile is summed. A value's
//! sum is taken in one order whatever the tasks and the threads are.

use std::cell::RefCell;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

#[cfg(feature = "autodiff")]
use super::host::by_task;
use super::instructions::Instructions;

/// Words of the inner axis that are laid out at a time.
pub const DEPTH: usize = 256;
/// The same where rows are few, and whole rows of the right matrix are laid out.
const SHALLOW: usize = 32;
/// So many rows are few.
const FEW: usize = 48;
/// Rows of a task, at most.
const ROWS: usize = 256;
/// Columns of a task, at most.
const COLUMNS: usize = 256;
/// Tasks for each thread, where there are rows and columns for so many.
const TASKS: usize = 4;
/// Words of a cache's line.
const LINE: usize = 16;

/// The right one of two matrices, which is asked for panel by panel.
pub trait Right<T>: Sync {
    /// Lays out `inner` places of `C` columns from `first` on, as words; zeros beyond the last column.
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]);

    /// Where `inner` places of `columns` lie, to be asked for early.
    fn ahead(&self, _inner: Range<usize>, _columns: Range<usize>) -> Option<Ahead> {
        None
    }

    /// Whether these are whole rows that follow each other.
    fn is_whole(&self, _columns: &Range<usize>) -> bool {
        false
    }
}

/// A matrix that lies row after row, `[inner, columns]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    values: &'a [T],
    columns: usize,
}

/// A matrix that lies column after column, `[columns, inner]`, as checkpoints have the weights of linear layers.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, T> {
    values: &'a [T],
    inner: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Of `values`, `[inner, columns]`.
    pub fn new(values: &'a [T], columns: usize) -> Self {
        Self { values, columns }
    }
}

impl<'a, T> Columns<'a, T> {
    /// Of `values`, `[columns, inner]`.
    pub fn new(values: &'a [T], inner: usize) -> Self {
        Self { values, inner }
    }
}

impl<T: Number> Right<T> for Rows<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let wide = C.min(self.columns.saturating_sub(first));
        let row = |at: usize| &self.values[at * self.columns..][first..first + wide];
        for (at, words) in inner.clone().step_by(K::PER_WORD).zip(panel) {
            let next = (K::PER_WORD == 2 && at + 1 < inner.end).then(|| row(at + 1));
            T::across::<K, C>(row(at), next, &mut words[..wide]);
            words[wide..].fill(0.0);
        }
    }

    fn ahead(&self, inner: Range<usize>, columns: Range<usize>) -> Option<Ahead> {
        let start = self.values.as_ptr().wrapping_add(inner.start * self.columns + columns.start);
        Some(match self.is_whole(&columns) {
            true => Ahead::new(start, 0, usize::MAX),
            false => Ahead::new(start, self.columns, columns.len()),
        })
    }

    fn is_whole(&self, columns: &Range<usize>) -> bool {
        columns.len() == self.columns
    }
}

impl<T: Number> Right<T> for Columns<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let mut lines = [[0.0_f32; DEPTH]; LINE];
        for from in (0..C).step_by(K::LANES) {
            for (at, line) in lines.iter_mut().enumerate().take(K::LANES) {
                let column = (first + from + at) * self.inner;
                match self.values.get(column + inner.start..column + inner.end) {
                    Some(column) => T::words::<K, C>(column, &mut line[..panel.len()]),
                    None => line.fill(0.0),
                }
            }
            // SAFETY: whoever chose the tile found its instructions on this machine.
            unsafe { K::turn(&lines, panel, from) };
        }
    }

    fn ahead(&self, inner: Range<usize>, columns: Range<usize>) -> Option<Ahead> {
        let start = self.values.as_ptr().wrapping_add(columns.start * self.inner + inner.start);
        Some(Ahead::new(start, self.inner, inner.len()))
    }
}

/// Lines of memory that are asked for early.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    start: *const u8,
    /// Bytes from one run of lines to the next.
    stride: usize,
    /// The logarithm of how many lines follow each other.
    run: u32,
    /// Lines that are left out.
    from: usize,
}

impl Ahead {
    /// Runs of so many numbers, every `stride` numbers.
    fn new<T>(start: *const T, stride: usize, run: usize) -> Self {
        let run = (run / (4 * LINE) * size_of::<T>()).max(1).ilog2();
        Self { start: start.cast(), stride: stride * size_of::<T>(), run, from: 0 }
    }

    /// A line.
    #[inline(always)]
    fn line(self, at: usize) -> *const i8 {
        let at = self.from + at;
        let within = at & ((1 << self.run) - 1);
        self.start.wrapping_add((at >> self.run) * self.stride + within * 4 * LINE).cast()
    }
}

/// What matrices hold.
pub trait Number: Pod + Default + Send + Sync {
    /// The fastest tiles that these instructions have.
    fn tiles(instructions: Instructions) -> Tiles {
        Tiles::of_floats(instructions)
    }

    /// Numbers that follow each other on the inner axis, as words.
    fn words<K: Tile<C>, const C: usize>(from: &[Self], to: &mut [f32]);

    /// Numbers beside each other on the other axis, each a word with that in `next`, if there is such.
    fn across<K: Tile<C>, const C: usize>(from: &[Self], next: Option<&[Self]>, to: &mut [f32]);

    /// Rounds.
    fn narrow(from: &[f32], to: &mut [Self]);
}

impl Number for f32 {
    #[inline(always)]
    fn words<K: Tile<C>, const C: usize>(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    #[inline(always)]
    fn across<K: Tile<C>, const C: usize>(from: &[f32], _: Option<&[f32]>, to: &mut [f32]) {
        to.copy_from_slice(from);
    }

    fn narrow(from: &[f32], to: &mut [f32]) {
        to.copy_from_slice(from);
    }
}

impl Number for f16 {
    fn words<K: Tile<C>, const C: usize>(from: &[f16], to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn across<K: Tile<C>, const C: usize>(from: &[f16], _: Option<&[f16]>, to: &mut [f32]) {
        from.convert_to_f32_slice(to);
    }

    fn narrow(from: &[f32], to: &mut [f16]) {
        to.convert_from_f32_slice(from);
    }
}

impl Number for bf16 {
    fn tiles(instructions: Instructions) -> Tiles {
        match Tiles::of_floats(instructions) {
            #[cfg(target_arch = "x86_64")]
            Tiles::Avx512 if is_x86_feature_detected!("avx512bf16") => Tiles::Pairs,
            tiles => tiles,
        }
    }

    #[inline(always)]
    fn words<K: Tile<C>, const C: usize>(from: &[bf16], to: &mut [f32]) {
        if K::PER_WORD == 1 {
            return from.iter().zip(to).for_each(|(&from, to)| *to = pair(bf16::ZERO, from));
        }
        let (pairs, odd) = from.as_chunks::<2>();
        to.iter_mut().zip(pairs).for_each(|(to, &[low, high])| *to = pair(low, high));
        if let (Some(to), Some(&odd)) = (to.get_mut(pairs.len()), odd.first()) {
            *to = pair(odd, bf16::ZERO);
        }
    }

    #[inline(always)]
    fn across<K: Tile<C>, const C: usize>(from: &[bf16], next: Option<&[bf16]>, to: &mut [f32]) {
        let both = to.iter_mut().zip(from);
        match next {
            Some(next) => both.zip(next).for_each(|((to, &low), &high)| *to = pair(low, high)),
            None if K::PER_WORD == 2 => both.for_each(|(to, &low)| *to = pair(low, bf16::ZERO)),
            None => both.for_each(|(to, &from)| *to = pair(bf16::ZERO, from)),
        }
    }

    fn narrow(from: &[f32], to: &mut [bf16]) {
        to.convert_from_f32_slice(from);
    }
}

/// Two numbers in a word. One above zero is the same number in f32.
#[inline(always)]
fn pair(low: bf16, high: bf16) -> f32 {
    f32::from_bits(u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16)
}

/// The products of `rows`, `[rows, inner]`, with each of the matrices, `[matrices, rows, columns]`, by several threads beside
/// each other.
///
/// - `finish`: gets the row and the first column of values that follow each other, in f32, and changes them before they are
///   rounded
///
/// # Panics
/// If the sizes do not fit.
pub fn product<T: Number>(
    rows: &[T],
    matrices: &[impl Right<T>],
    shape: [usize; 3],
    finish: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Vec<T> {
    product_with(T::tiles(Instructions::in_use()), rows, matrices, shape, finish)
}

fn product_with<T: Number>(
    tiles: Tiles,
    x: &[T],
    matrices: &[impl Right<T>],
    [rows, inner, columns]: [usize; 3],
    finish: impl Fn(usize, usize, &mut [f32]) + Sync,
) -> Vec<T> {
    assert_eq!(x.len(), rows * inner, "{rows} rows of {inner} numbers");
    let mut out = vec![T::default(); matrices.len() * rows * columns];
    if out.is_empty() {
        return out;
    }
    let across = columns.div_ceil(COLUMNS);
    let width = columns.div_ceil(across).next_multiple_of(2 * LINE); // of every tile's columns
    let wanted = (TASKS * rayon::current_num_threads()).div_ceil(matrices.len() * across);
    let bands = wanted.min(rows.div_ceil(ROWS / 4)).max(rows.div_ceil(ROWS));
    let height = rows.div_ceil(bands);

    let mut tasks: Vec<Task<T>> = Vec::new();
    for (matrix, out) in out.chunks_mut(rows * columns).enumerate() {
        for (band, out) in out.chunks_mut(height * columns).enumerate() {
            let before = tasks.len();
            let starts = (0..columns).step_by(width);
            tasks.extend(starts.map(|column| Task { matrix, row: band * height, column, out: Vec::new() }));
            for row in out.chunks_mut(columns) {
                for (task, piece) in tasks[before..].iter_mut().zip(row.chunks_mut(width)) {
                    task.out.push(piece);
                }
            }
        }
    }
    tasks.into_par_iter().for_each(|Task { matrix, row, column, out }| {
        let mut sums = Sums::zeros(out.len(), out[0].len());
        let x = &x[row * inner..(row + out.len()) * inner];
        let columns = column..column + out[0].len();
        tiles.run(Add { x, right: &matrices[matrix], inner, columns, sums: &mut sums });
        for ((row, out), sums) in (row..).zip(out).zip(sums.rows()) {
            finish(row, column, sums);
            T::narrow(sums, out);
        }
    });
    out
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

/// Adds to `sums` the products of its rows of `x`, `[rows, inner]`, with `columns` of a matrix, on the calling thread.
///
/// # Panics
/// If the sizes do not fit.
pub fn add<T: Number>(x: &[T], right: &impl Right<T>, inner: usize, columns: Range<usize>, sums: &mut Sums) {
    T::tiles(Instructions::in_use()).run(Add { x, right, inner, columns, sums });
}

/// Sums of products, `[rows, columns]`.
#[derive(Clone, Debug)]
pub struct Sums {
    lines: Vec<Line>,
    rows: usize,
    columns: usize,
}

impl Sums {
    /// Of so many rows and columns.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        let lines = vec![Line::zeroed(); rows * Self::stride(columns) / LINE];
        Self { lines, rows, columns }
    }

    /// How far rows are apart: whole panels of any tile.
    fn stride(columns: usize) -> usize {
        columns.next_multiple_of(2 * LINE)
    }

    /// One after the other.
    pub fn rows(&mut self) -> impl Iterator<Item = &mut [f32]> {
        let (columns, stride) = (self.columns, Self::stride(self.columns));
        let all: &mut [f32] = bytemuck::cast_slice_mut(&mut self.lines);
        all.chunks_mut(stride.max(1)).map(move |row| &mut row[..columns])
    }
}

/// Numbers as long and as aligned as a cache's line.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

// SAFETY: numbers alone, without gaps.
unsafe impl Zeroable for Line {}
// SAFETY: as above.
unsafe impl Pod for Line {}

/// Room for what is laid out.
#[derive(Clone, Debug, Default)]
pub struct Room(Vec<Line>);

impl Room {
    /// So many values, whatever they are.
    pub fn of(&mut self, count: usize) -> &mut [f32] {
        let needed = count.div_ceil(LINE);
        if self.0.len() < needed {
            self.0.resize(needed, Line::zeroed());
        }
        &mut bytemuck::cast_slice_mut(&mut self.0[..needed])[..count]
    }
}

/// What is done by tiles.
pub trait ByTile {
    /// Does it.
    fn run<K: Tile<C>, const C: usize>(self);
}

/// See [`add`].
struct Add<'a, T, R> {
    x: &'a [T],
    right: &'a R,
    inner: usize,
    columns: Range<usize>,
    sums: &'a mut Sums,
}

impl<T: Number, R: Right<T>> ByTile for Add<'_, T, R> {
    fn run<K: Tile<C>, const C: usize>(self) {
        thread_local! {
            /// Copies of rows, and panels.
            static ROOM: RefCell<[Room; 2]> = RefCell::default();
        }
        let Self { x, right, inner, columns, sums } = self;
        let (rows, stride) = (sums.rows, Sums::stride(columns.len()));
        let across = columns.len().next_multiple_of(C);
        assert_eq!([rows * inner, sums.columns], [x.len(), columns.len()], "numbers of rows, and columns");
        let is_shallow = rows <= FEW && right.is_whole(&columns);
        let (depth, at_once) = if is_shallow { (SHALLOW, across) } else { (DEPTH, C) };
        let depth = depth * K::PER_WORD;
        let sums: &mut [f32] = bytemuck::cast_slice_mut(&mut sums.lines);
        ROOM.with_borrow_mut(|[copies, panels]| {
            let copies = copies.of(rows * DEPTH).as_chunks_mut().0;
            for from in (0..inner).step_by(depth) {
                let part = from..inner.min(from + depth);
                let words = part.len().div_ceil(K::PER_WORD);
                for (copy, x) in copies.iter_mut().zip(x.chunks(inner)) {
                    T::words::<K, C>(&x[part.clone()], &mut copy[..words]);
                }
                for first in (0..across).step_by(at_once) {
                    let panels = panels.of(words * at_once).as_chunks_mut().0;
                    for (at, panel) in panels.chunks_mut(words).enumerate() {
                        right.lay_out::<K, C>(part.clone(), columns.start + first + at * C, panel);
                    }
                    let next = columns.start + first + at_once;
                    let next = match next < columns.end {
                        true => right.ahead(part.clone(), next..next + at_once),
                        false => {
                            let next = part.end..inner.min(part.end + depth);
                            right.ahead(next, columns.start..columns.end.min(columns.start + at_once))
                        }
                    };
                    for (at, panel) in panels.chunks(words).enumerate() {
                        let next = next.map(|next| Ahead { from: at * words * C / LINE, ..next });
                        multiply::<K, C>(copies, panel, &mut sums[first + at * C..], stride, next);
                    }
                }
            }
        });
    }
}

/// Adds to rows of `sums`, `stride` apart, the products of as many rows of `x` with a panel. `next` is asked for on the way.
pub fn multiply<K: Tile<C>, const C: usize>(
    mut x: &[[f32; DEPTH]],
    panel: &[[f32; C]],
    mut sums: &mut [f32],
    stride: usize,
    mut next: Option<Ahead>,
) {
    // tiles of similar height: low ones wait for each sum
    let mut tiles = x.len().div_ceil(K::ROWS);
    while !x.is_empty() {
        let rows = x.len().div_ceil(tiles);
        // SAFETY: whoever chose the tile found its instructions on this machine.
        unsafe { K::add(&x[..rows], panel, sums, stride, next.take()) };
        (x, tiles) = (&x[rows..], tiles - 1);
        sums = sums.get_mut(rows * stride..).unwrap_or_default();
    }
}

/// Which tiles there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tiles {
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

impl Tiles {
    /// Those of f32.
    pub fn of_floats(instructions: Instructions) -> Self {
        match instructions {
            Instructions::Plain => Self::Plain,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx2 => Self::Avx2,
            #[cfg(target_arch = "x86_64")]
            Instructions::Avx512 => Self::Avx512,
        }
    }

    /// Does something by them.
    pub fn run(self, body: impl ByTile) {
        match self {
            Self::Plain => body.run::<Plain, 8>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => body.run::<Avx2, 16>(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => body.run::<Avx512, 32>(),
            #[cfg(target_arch = "x86_64")]
            Self::Pairs => body.run::<Pairs, 32>(),
        }
    }
}

/// Tiles of `C` columns.
pub trait Tile<const C: usize> {
    /// Places of the inner axis in a word.
    const PER_WORD: usize = 1;
    /// Rows of a tile, at most.
    const ROWS: usize;
    /// Columns that are turned at a time.
    const LANES: usize;

    /// Adds to rows of `sums`, `stride` apart, the products of as many of `x`, up to [`Self::ROWS`], with a panel.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn add(
        x: &[[f32; DEPTH]],
        panel: &[[f32; C]],
        sums: &mut [f32],
        stride: usize,
        next: Option<Ahead>,
    );

    /// Words of the first lines become columns of a panel, from `first` on.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn turn(lines: &[[f32; DEPTH]; LINE], panel: &mut [[f32; C]], first: usize);
}

/// The same, from a word on.
fn turn<const C: usize>(lines: &[[f32; DEPTH]], panel: &mut [[f32; C]], first: usize, from: usize) {
    for (at, line) in lines.iter().enumerate() {
        for (words, word) in panel.iter_mut().zip(line).skip(from) {
            words[first + at] = *word;
        }
    }
}

/// Tiles of the compiler's choice.
#[derive(Debug)]
pub struct Plain;

impl<const C: usize> Tile<C> for Plain {
    const ROWS: usize = 4;
    const LANES: usize = C;

    unsafe fn add(
        x: &[[f32; DEPTH]],
        panel: &[[f32; C]],
        sums: &mut [f32],
        stride: usize,
        _: Option<Ahead>,
    ) {
        let mut held = [[0.0_f32; C]; 4];
        for (at, columns) in panel.iter().enumerate() {
            for (x, held) in x.iter().zip(&mut held) {
                for (sum, &column) in held.iter_mut().zip(columns) {
                    *sum = match cfg!(target_arch = "aarch64") {
                        true => x[at].mul_add(column, *sum),
                        false => x[at] * column + *sum,
                    };
                }
            }
        }
        for ((held, sums), _) in held.iter().zip(sums.chunks_mut(stride)).zip(x) {
            sums.iter_mut().zip(held).for_each(|(sum, held)| *sum += held);
        }
    }

    unsafe fn turn(lines: &[[f32; DEPTH]; LINE], panel: &mut [[f32; C]], first: usize) {
        turn(&lines[..C], panel, first, 0);
    }
}

/// The same with vectors that the compiler cannot but keep in registers.
#[cfg(target_arch = "x86_64")]
macro_rules! vectors {
    (
        $(#[$doc:meta])* $name:ident, $features:literal, $per_word:literal, $lanes:literal, [$($rows:literal),*],
        $zero:ident, $splat:ident, $load:ident, $plus:ident, $store:ident, $turn:ident,
        |$sum:ident, $value:ident, $other:ident| $add:expr
    ) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name;

        impl $name {
            #[target_feature(enable = $features)]
            #[allow(clippy::needless_range_loop)] // several arrays side by side
            fn tile<const R: usize>(
                x: &[[f32; DEPTH]],
                panel: &[[f32; 2 * $lanes]],
                sums: &mut [f32],
                stride: usize,
                next: Option<Ahead>,
            ) {
                use std::arch::x86_64::*;

                assert!(x.len() == R && panel.len() <= DEPTH && sums.len() >= (R - 1) * stride + 2 * $lanes);
                let (x, sums) = (x.as_ptr(), sums.as_mut_ptr());
                let mut held = [[$zero(); 2]; R];
                for (at, columns) in panel.iter().enumerate() {
                    if let Some(next) = next {
                        for line in 0..2 * $lanes / LINE {
                            _mm_prefetch::<_MM_HINT_T0>(next.line(at * (2 * $lanes / LINE) + line));
                        }
                    }
                    // SAFETY: both halves of an array.
                    let halves = unsafe { [$load(columns.as_ptr()), $load(columns.as_ptr().add($lanes))] };
                    for row in 0..R {
                        // SAFETY: there are `R` rows, and each has as many words as a panel may have.
                        let $value = $splat(unsafe { *x.add(row).cast::<f32>().add(at) });
                        for half in 0..2 {
                            let ($sum, $other) = (held[row][half], halves[half]);
                            held[row][half] = $add;
                        }
                    }
                }
                for row in 0..R {
                    for half in 0..2 {
                        // SAFETY: so many rows were asked for.
                        unsafe {
                            let sum = sums.add(row * stride + half * $lanes);
                            $store(sum, $plus($load(sum), held[row][half]));
                        }
                    }
                }
            }
        }

        impl Tile<{ 2 * $lanes }> for $name {
            const PER_WORD: usize = $per_word;
            const ROWS: usize = [$($rows),*].len();
            const LANES: usize = $lanes;

            #[target_feature(enable = $features)]
            unsafe fn add(
                x: &[[f32; DEPTH]],
                panel: &[[f32; 2 * $lanes]],
                sums: &mut [f32],
                stride: usize,
                next: Option<Ahead>,
            ) {
                match x.len() {
                    $($rows => Self::tile::<$rows>(x, panel, sums, stride, next),)*
                    rows => panic!("a tile of {rows} rows"),
                }
            }

            #[target_feature(enable = $features)]
            unsafe fn turn(lines: &[[f32; DEPTH]; LINE], panel: &mut [[f32; 2 * $lanes]], first: usize) {
                let whole = panel.len() / $lanes * $lanes;
                for (at, block) in (0..).step_by($lanes).zip(panel[..whole].chunks_mut($lanes)) {
                    $turn(&lines.as_flattened()[at..], DEPTH, block, first);
                }
                turn(&lines[..$lanes], panel, first, whole);
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 8 numbers at a time.
    Avx2,
    "avx2,fma",
    1,
    8,
    [1, 2, 3, 4, 5, 6],
    _mm256_setzero_ps,
    _mm256_set1_ps,
    _mm256_loadu_ps,
    _mm256_add_ps,
    _mm256_storeu_ps,
    turn_8,
    |sum, value, other| _mm256_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 16 numbers at a time.
    Avx512,
    "avx512f",
    1,
    16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_add_ps,
    _mm512_storeu_ps,
    turn_16,
    |sum, value, other| _mm512_fmadd_ps(value, other, sum)
);
#[cfg(target_arch = "x86_64")]
vectors!(
    /// Tiles of 16 pairs of bf16 at a time.
    Pairs,
    "avx512f,avx512bf16",
    2,
    16,
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    _mm512_setzero_ps,
    _mm512_set1_ps,
    _mm512_loadu_ps,
    _mm512_add_ps,
    _mm512_storeu_ps,
    turn_16,
    |sum, value, other| {
        // SAFETY: words of as many bits.
        let [value, other] = unsafe { std::mem::transmute::<[__m512; 2], [__m512bh; 2]>([value, other]) };
        _mm512_dpbf16_ps(sum, value, other)
    }
);

/// `[rows, columns]` turned, `[columns, rows]`.
#[cfg(feature = "autodiff")]
pub fn turned(x: &[f32], [rows, columns]: [usize; 2]) -> Vec<f32> {
    /// Both sides of what is turned at a time: a line of a cache, which is read and written whole.
    const SIDE: usize = 16;
    let mut out = vec![0.0; rows * columns];
    by_task(&mut out, SIDE * rows.max(1), |at, values| {
        let first = at / rows;
        for row in (0..rows).step_by(SIDE) {
            for (column, out) in (first..).zip(values.chunks_mut(rows)) {
                let out = &mut out[row..rows.min(row + SIDE)];
                for (at, out) in out.iter_mut().enumerate() {
                    *out = x[(row + at) * columns + column];
                }
            }
        }
    });
    out
}

/// 8 rows of `w`, `stride` apart, become columns of `panel` from `first` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn turn_8(w: &[f32], stride: usize, panel: &mut [[f32; 16]], first: usize) {
    use std::arch::x86_64::*;

    let mut rows = [_mm256_setzero_ps(); 8];
    for (at, row) in rows.iter_mut().enumerate() {
        // SAFETY: so many numbers were just cut out.
        *row = unsafe { _mm256_loadu_ps(w[at * stride..][..8].as_ptr()) };
    }
    let pairs: [__m256; 8] = std::array::from_fn(|at| match at % 2 {
        0 => _mm256_unpacklo_ps(rows[at], rows[at + 1]),
        _ => _mm256_unpackhi_ps(rows[at - 1], rows[at]),
    });
    // Of four rows, place `at % 4` in each half.
    let fours: [__m256; 8] = std::array::from_fn(|at| {
        let (low, high) = (pairs[at / 4 * 4 + at % 4 / 2], pairs[at / 4 * 4 + at % 4 / 2 + 2]);
        match at % 2 {
            0 => _mm256_shuffle_ps::<0x44>(low, high),
            _ => _mm256_shuffle_ps::<0xee>(low, high),
        }
    });
    for (at, packed) in panel[..8].iter_mut().enumerate() {
        let (low, high) = (fours[at % 4], fours[4 + at % 4]);
        let row = match at / 4 {
            0 => _mm256_permute2f128_ps::<0x20>(low, high),
            _ => _mm256_permute2f128_ps::<0x31>(low, high),
        };
        // SAFETY: so many numbers were just cut out.
        unsafe { _mm256_storeu_ps(packed[first..first + 8].as_mut_ptr(), row) };
    }
}

/// 16 rows of `w`, `stride` apart, become columns of `panel` from `first` on.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn turn_16(w: &[f32], stride: usize, panel: &mut [[f32; 32]], first: usize) {
    use std::arch::x86_64::*;

    let mut rows = [_mm512_setzero_ps(); 16];
    for (at, row) in rows.iter_mut().enumerate() {
        // SAFETY: so many numbers were just cut out.
        *row = unsafe { _mm512_loadu_ps(w[at * stride..][..16].as_ptr()) };
    }
    let mut pairs = rows;
    for at in (0..16).step_by(2) {
        pairs[at] = _mm512_unpacklo_ps(rows[at], rows[at + 1]);
        pairs[at + 1] = _mm512_unpackhi_ps(rows[at], rows[at + 1]);
    }
    // Of four rows, place `at % 4` in each quarter.
    let mut fours = pairs;
    for at in (0..16).step_by(4) {
        for half in 0..2 {
            let [low, high] = [pairs[at + half], pairs[at + 2 + half]].map(|pair| _mm512_castps_pd(pair));
            fours[at + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            fours[at + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
    }
    for place in 0..4 {
        let [a, b, c, d] = [0, 4, 8, 12].map(|rows| fours[rows + place]);
        let [low, high] = [_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b)];
        let [low_2, high_2] = [_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d)];
        let quarters = [
            _mm512_shuffle_f32x4::<0x88>(low, low_2),
            _mm512_shuffle_f32x4::<0xdd>(low, low_2),
            _mm512_shuffle_f32x4::<0x88>(high, high_2),
            _mm512_shuffle_f32x4::<0xdd>(high, high_2),
        ];
        for (quarter, row) in quarters.into_iter().enumerate() {
            let packed = &mut panel[4 * quarter + place][first..first + 16];
            // SAFETY: so many numbers were just cut out.
            unsafe { _mm512_storeu_ps(packed.as_mut_ptr(), row) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    /// Products of all tiles beside sums in f64: whole and broken tiles, panels, words, depths and tasks; few rows; several
    /// matrices; none.
    #[test]
    fn tiles_agree() {
        let sizes = [
            [1, 1, 1, 1],
            [3, 2, 5, 2],
            [14, 256, 32, 1],
            [31, 257, 33, 1],
            [5, 600, 70, 3],
            [29, 40, 16, 1],
            [270, 7, 290, 1],
            [64, 15, 31, 2],
            [0, 3, 4, 1],
            [4, 0, 3, 1],
            [3, 4, 0, 1],
            [2, 3, 4, 0],
        ];
        for [rows, inner, columns, count] in sizes {
            let mut rng = fastrand::Rng::with_seed(rows as u64);
            let mut values =
                |count| -> Vec<f32> { random(count, &mut rng).iter().map(|&x| x as f32).collect() };
            let (x, matrices) = (values(rows * inner), values(count * inner * columns));
            let floats: Vec<Tiles> = Instructions::all().into_iter().map(Tiles::of_floats).collect();
            let shape = [rows, inner, columns];
            check(&x, &matrices, shape, &floats, 1e-6);
            let half = |values: &[f32]| -> Vec<f16> { values.iter().map(|&x| f16::from_f32(x)).collect() };
            check(&half(&x), &half(&matrices), shape, &floats, 1e-3);
            let half = |values: &[f32]| -> Vec<bf16> { values.iter().map(|&x| bf16::from_f32(x)).collect() };
            let tiles = Instructions::all().into_iter().map(bf16::tiles);
            let tiles: Vec<Tiles> = floats.into_iter().chain(tiles).collect();
            check(&half(&x), &half(&matrices), shape, &tiles, 5e-3);
        }
    }

    fn check<T: Number + Into<f64>>(
        x: &[T],
        values: &[T],
        [rows, inner, columns]: [usize; 3],
        tiles: &[Tiles],
        tolerance: f64,
    ) {
        let matrices: Vec<&[T]> = values.chunks((inner * columns).max(1)).collect();
        let turned: Vec<Vec<T>> = matrices
            .iter()
            .map(|values| {
                let place = |at: usize| values[at % inner * columns + at / inner];
                (0..inner * columns).map(place).collect()
            })
            .collect();
        let by_rows: Vec<_> = matrices.iter().map(|values| Rows::new(values, columns)).collect();
        let by_columns: Vec<_> = turned.iter().map(|values| Columns::new(values, inner)).collect();
        let expected: Vec<f64> = (0..matrices.len() * rows * columns)
            .map(|at| {
                let (matrix, row, column) = (at / columns / rows, at / columns % rows, at % columns);
                let term = |k: usize| {
                    let (left, right): (f64, f64) =
                        (x[row * inner + k].into(), matrices[matrix][k * columns + column].into());
                    left * right
                };
                (0..inner).map(term).sum::<f64>() + (row + 2 * column) as f64
            })
            .collect();
        let finish = |row: usize, column: usize, values: &mut [f32]| {
            for (column, value) in (column..).zip(values) {
                *value += (row + 2 * column) as f32;
            }
        };
        for &tiles in tiles {
            let shape = [rows, inner, columns];
            let found = [
                product_with(tiles, x, &by_rows, shape, finish),
                product_with(tiles, x, &by_columns, shape, finish),
            ];
            for (at, (&expected, found)) in
                found.iter().flat_map(|found| expected.iter().zip(found)).enumerate()
            {
                let found: f64 = (*found).into();
                let bound = tolerance * ((inner as f64).sqrt() + expected.abs());
                assert!(
                    (found - expected).abs() <= bound,
                    "{tiles:?} {shape:?} {at}: {found} for {expected}"
                );
            }
        }
    }

    /// Few rows with whole rows of a matrix, and with some of its columns.
    #[test]
    fn parts_of_a_matrix_are_added() {
        let (rows, inner, columns) = (17, 70, 100);
        let mut rng = fastrand::Rng::with_seed(1);
        let mut values = |count| -> Vec<f32> { random(count, &mut rng).iter().map(|&x| x as f32).collect() };
        let (x, w) = (values(rows * inner), values(inner * columns));
        let right = Rows::new(&w, columns);
        for part in [0..columns, 32..96, 5..6] {
            let mut sums = Sums::zeros(rows, part.len());
            sums.rows().for_each(|row| row.fill(1.0));
            add(&x, &right, inner, part.clone(), &mut sums);
            for (row, sums) in sums.rows().enumerate() {
                for (column, sum) in part.clone().zip(sums) {
                    let term = |k: usize| f64::from(x[row * inner + k]) * f64::from(w[k * columns + column]);
                    let expected = (0..inner).map(term).sum::<f64>() + 1.0;
                    assert!((f64::from(*sum) - expected).abs() < 1e-5, "{row}, {column}: {sum} for {expected}");
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "2 rows of 3 numbers")]
    fn sizes_must_fit() {
        product(&[0.0; 5], &[Rows::new(&[0.0; 12], 4)], [2, 3, 4], |_, _, _| ());
    }
}
