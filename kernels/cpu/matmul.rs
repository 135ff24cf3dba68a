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
use rayon::prelude::*;

use super::host::Strided;
#[cfg(feature = "autodiff")]
use super::host::by_task;
use super::instructions::Instructions;
use super::tiles::{Ahead, ByTile, DEPTH, LINE, Number, Tile, Tiles, multiply};

/// Words of the inner axis that are laid out at a time where rows are few, and whole rows of the right matrix are laid out.
const SHALLOW: usize = 32;
/// Columns that are laid out at a time where they lie side by side.
const BESIDE: usize = 64;
/// So many rows are few.
pub const FEW: usize = 64;
/// Rows of a task, at most.
const ROWS: usize = 256;
/// Columns of a task, at most.
pub const COLUMNS: usize = 256;
/// Tasks for each thread, where there are rows and columns for so many.
const TASKS: usize = 4;

/// The right one of two matrices, which is asked for panel by panel.
pub trait Right<T>: Sync {
    /// Lays out `inner` places of `C` columns from `first` on, as words; zeros beyond the last column.
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]);

    /// The same of panels that follow each other, each of so many words: zeros beyond the last place.
    fn lay_out_all<K: Tile<C>, const C: usize>(
        &self,
        inner: Range<usize>,
        first: usize,
        panels: &mut [[f32; C]],
        words: usize,
    ) {
        for (panel, first) in panels.chunks_mut(words).zip((first..).step_by(C)) {
            let (own, beyond) = panel.split_at_mut(inner.len().div_ceil(K::PER_WORD));
            self.lay_out::<K, C>(inner.clone(), first, own);
            beyond.fill([0.0; C]);
        }
    }

    /// Where `inner` places of `columns` lie, to be asked for early.
    fn ahead(&self, _inner: Range<usize>, _columns: Range<usize>) -> Option<Ahead> {
        None
    }

    /// Whether these are whole rows that follow each other.
    fn is_whole(&self, _columns: &Range<usize>) -> bool {
        false
    }

    /// Columns that are laid out at a time, at least: those that lie side by side are read in longer runs.
    fn at_once(&self) -> usize {
        1
    }
}

/// A matrix that lies row after row, `[inner, columns]`.
#[derive(Clone, Copy, Debug)]
pub struct Rows<'a, T> {
    values: &'a [T],
    /// How far rows are apart.
    stride: usize,
    columns: usize,
}

/// A matrix that lies column after column, `[columns, inner]`, as checkpoints have the weights of linear layers.
#[derive(Clone, Copy, Debug)]
pub struct Columns<'a, T> {
    values: &'a [T],
    /// How far columns are apart.
    stride: usize,
    columns: usize,
}

impl<'a, T> Rows<'a, T> {
    /// Of `values`, `[inner, columns]`.
    pub fn new(values: &'a [T], columns: usize) -> Self {
        Self { values, stride: columns, columns }
    }

    /// Of rows where they lie.
    pub fn of(rows: Strided<'a, T>) -> Self {
        Self { values: rows.values, stride: rows.stride, columns: rows.width }
    }
}

impl<'a, T> Columns<'a, T> {
    /// Of `values`, `[columns, inner]`.
    pub fn new(values: &'a [T], inner: usize) -> Self {
        Self { values, stride: inner, columns: values.len() / inner.max(1) }
    }

    /// Of so many rows where they lie.
    pub fn of(rows: Strided<'a, T>, columns: usize) -> Self {
        Self { values: rows.values, stride: rows.stride, columns }
    }
}

impl<T: Number> Right<T> for Rows<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let wide = C.min(self.columns.saturating_sub(first));
        let row = |at: usize| &self.values[at * self.stride..][first..first + wide];
        for (at, words) in inner.clone().step_by(K::PER_WORD).zip(panel) {
            let next = (K::PER_WORD == 2 && at + 1 < inner.end).then(|| row(at + 1));
            T::across::<K, C>(row(at), next, &mut words[..wide]);
            words[wide..].fill(0.0);
        }
    }

    fn ahead(&self, inner: Range<usize>, columns: Range<usize>) -> Option<Ahead> {
        let start = self.values.as_ptr().wrapping_add(inner.start * self.stride + columns.start);
        Some(match self.is_whole(&columns) {
            true => Ahead::new(start, 0, usize::MAX),
            false => Ahead::new(start, self.stride, columns.len()),
        })
    }

    fn is_whole(&self, columns: &Range<usize>) -> bool {
        columns.len() == self.stride
    }

    fn at_once(&self) -> usize {
        BESIDE
    }
}

impl<T: Number> Right<T> for Columns<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        if let Some((words, stride)) = self.words::<K, C>(&inner, first) {
            for from in (0..C).step_by(K::LANES) {
                // SAFETY: whoever chose the tile found its instructions on this machine.
                unsafe { K::turn(&words[from * stride..], stride, panel, from) };
            }
            return;
        }
        let mut lines = [[0.0_f32; DEPTH]; LINE];
        for from in (0..C).step_by(K::LANES) {
            for (at, line) in lines.iter_mut().enumerate().take(K::LANES) {
                let column = first + from + at;
                match column < self.columns {
                    true => {
                        let places = &self.values[column * self.stride..][inner.clone()];
                        T::words::<K, C>(places, &mut line[..panel.len()]);
                    }
                    false => line.fill(0.0),
                }
            }
            // SAFETY: as above.
            unsafe { K::turn(lines.as_flattened(), DEPTH, panel, from) };
        }
    }

    fn ahead(&self, inner: Range<usize>, columns: Range<usize>) -> Option<Ahead> {
        let start = self.values.as_ptr().wrapping_add(columns.start * self.stride + inner.start);
        Some(Ahead::new(start, self.stride, inner.len()))
    }
}

impl<'a, T: Number> Columns<'a, T> {
    /// `C` whole columns from `first` on, and how far they are apart, where what they hold are words as they lie.
    fn words<K: Tile<C>, const C: usize>(
        self,
        inner: &Range<usize>,
        first: usize,
    ) -> Option<(&'a [f32], usize)> {
        let are_whole = first + C <= self.columns
            && [inner.start, inner.end, self.stride].iter().all(|at| at.is_multiple_of(K::PER_WORD));
        let start = first * self.stride + inner.start;
        let end = (first + C - 1) * self.stride + inner.end;
        let words = are_whole.then(|| T::as_words::<K, C>(&self.values[start..end])).flatten()?;
        Some((words, self.stride / K::PER_WORD))
    }
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

/// The same with tiles of the caller's choice, whose words `T` may be.
pub(super) fn product_with<T: Number>(
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
    // More tasks come of fewer columns first: rows that are copied again cost less than columns that are laid out again.
    let wanted = (TASKS * rayon::current_num_threads()).div_ceil(matrices.len());
    let bands = rows.div_ceil(ROWS);
    let across = wanted.div_ceil(bands).min(columns.div_ceil(COLUMNS / 4)).max(columns.div_ceil(COLUMNS));
    let bands = wanted.div_ceil(across).min(rows.div_ceil(ROWS / 4)).max(bands);
    let width = columns.div_ceil(across).next_multiple_of(2 * LINE); // of every tile's columns
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
        // not shallow, whatever its columns: which are whole depends on the threads, and with it the order of sums
        let right = &matrices[matrix];
        tiles.run(Add { x, right, inner, columns, is_shallow: false, sums: &mut sums });
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

/// Adds to `sums` the products of its rows of `x`, `[rows, inner]`, with `columns` of a matrix, on the calling thread. Up to
/// [`FEW`] rows are summed in another order than more, where the columns are all.
///
/// # Panics
/// If the sizes do not fit.
pub fn add<T: Number>(x: &[T], right: &impl Right<T>, inner: usize, columns: Range<usize>, sums: &mut Sums) {
    let is_shallow = sums.rows <= FEW && right.is_whole(&columns);
    T::tiles(Instructions::in_use()).run(Add { x, right, inner, columns, is_shallow, sums });
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

/// See [`add`].
struct Add<'a, T, R> {
    x: &'a [T],
    right: &'a R,
    inner: usize,
    columns: Range<usize>,
    /// Whether whole rows of the right matrix are laid out, few at a time.
    is_shallow: bool,
    sums: &'a mut Sums,
}

impl<T: Number, R: Right<T>> ByTile for Add<'_, T, R> {
    fn run<K: Tile<C>, const C: usize>(self) {
        thread_local! {
            /// Copies of rows, and panels.
            static ROOM: RefCell<[Room; 2]> = RefCell::default();
        }
        let Self { x, right, inner, columns, is_shallow, sums } = self;
        let (rows, stride) = (sums.rows, Sums::stride(columns.len()));
        let across = columns.len().next_multiple_of(C);
        assert_eq!([rows * inner, sums.columns], [x.len(), columns.len()], "numbers of rows, and columns");
        let (depth, at_once) = match is_shallow {
            true => (SHALLOW, across),
            false => (DEPTH / K::WORDS * K::WORDS, across.min(right.at_once().next_multiple_of(C))),
        };
        let depth = depth * K::PER_WORD;
        let sums: &mut [f32] = bytemuck::cast_slice_mut(&mut sums.lines);
        ROOM.with_borrow_mut(|[copies, panels]| {
            let copies = copies.of(rows * DEPTH).as_chunks_mut().0;
            for from in (0..inner).step_by(depth) {
                let part = from..inner.min(from + depth);
                let given = part.len().div_ceil(K::PER_WORD);
                let words = K::whole_words(part.len());
                for (copy, x) in copies.iter_mut().zip(x.chunks(inner)) {
                    T::words::<K, C>(&x[part.clone()], &mut copy[..given]);
                    copy[given..words].fill(0.0);
                }
                for first in (0..across).step_by(at_once) {
                    let panels = panels.of(words * at_once.min(across - first)).as_chunks_mut().0;
                    right.lay_out_all::<K, C>(part.clone(), columns.start + first, panels, words);
                    let next = columns.start + first + at_once;
                    let next = match next < columns.end {
                        true => right.ahead(part.clone(), next..next + at_once),
                        false => {
                            let next = part.end..inner.min(part.end + depth);
                            right.ahead(next, columns.start..columns.end.min(columns.start + at_once))
                        }
                    };
                    for (at, panel) in panels.chunks(words).enumerate() {
                        let next = next.map(|next| next.after(at * words * C / LINE));
                        multiply::<K, C>(copies, panel, &mut sums[first + at * C..], stride, next);
                    }
                }
            }
        });
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

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

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
            [20, 258, 70, 1],
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
            #[allow(unused_mut)]
            let mut tiles: Vec<Tiles> = floats.into_iter().chain(tiles).collect();
            #[cfg(target_arch = "x86_64")]
            if tiles.contains(&Tiles::Amx) && is_x86_feature_detected!("avx512bf16") {
                tiles.push(Tiles::Pairs); // which the machine has beside what it prefers
            }
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
                    assert!(
                        (f64::from(*sum) - expected).abs() < 1e-5,
                        "{row}, {column}: {sum} for {expected}"
                    );
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
