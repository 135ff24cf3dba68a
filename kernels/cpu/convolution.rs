//! Convolutions as products of the weights with the places under them, which are gathered panel by panel: no picture is
//! copied as a whole, and no weight.

use std::ops::Range;

use super::matmul::{Right, product};
use super::tiles::{Number, Tile};

/// Sizes of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Of the input.
    pub channels_in: usize,
    /// Height and width of the input.
    pub picture: [usize; 2],
    /// Height and width of a weight.
    pub kernel: [usize; 2],
    /// From one place to the next.
    pub stride: usize,
    /// Zeros on every side.
    pub border: usize,
}

impl Sizes {
    /// Height and width of the output.
    ///
    /// # Panics
    /// If the picture with its border is smaller than the kernel.
    pub fn output(&self) -> [usize; 2] {
        let side = |at: usize| {
            let room = (self.picture[at] + 2 * self.border).checked_sub(self.kernel[at]);
            room.map(|room| room / self.stride + 1)
        };
        match (side(0), side(1)) {
            (Some(height), Some(width)) => [height, width],
            _ => panic!("a kernel of {:?} on a picture of {:?}", self.kernel, self.picture),
        }
    }

    /// Weights of an output channel.
    fn inner(&self) -> usize {
        self.channels_in * self.kernel[0] * self.kernel[1]
    }
}

/// The convolution of `x`, `[batch, channels_in, ...]`, with `weight`, `[channels_out, channels_in, ...]`:
/// `[batch, channels_out, height, width]`.
///
/// # Panics
/// If sizes do not fit.
pub fn convolve<T: Number>(x: &[T], weight: &[T], bias: Option<&[f32]>, sizes: Sizes) -> Vec<T> {
    let [height, width] = sizes.output();
    let picture = sizes.channels_in * sizes.picture[0] * sizes.picture[1];
    let pictures: Vec<Patches<T>> =
        x.chunks(picture.max(1)).map(|x| Patches { x, sizes, width, places: height * width }).collect();
    let channels_out = weight.len() / sizes.inner().max(1);
    product(weight, &pictures, [channels_out, sizes.inner(), height * width], |channel, _, values| {
        if let Some(bias) = bias {
            values.iter_mut().for_each(|value| *value += bias[channel]);
        }
    })
}

/// What a convolution sees of a picture: a column for each place of the output.
struct Patches<'a, T> {
    /// `[channels_in, height, width]`
    x: &'a [T],
    sizes: Sizes,
    /// Of the output.
    width: usize,
    /// Of the output.
    places: usize,
}

impl<T: Number> Right<T> for Patches<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let mut seen = [[T::default(); C]; 2];
        for (at, words) in inner.clone().step_by(K::PER_WORD).zip(panel) {
            let [row, next] = &mut seen;
            self.row(at, first, row);
            let next = (K::PER_WORD == 2 && at + 1 < inner.end).then(|| {
                self.row(at + 1, first, next);
                &next[..]
            });
            T::across::<K, C>(row, next, words);
        }
    }
}

impl<T: Number> Patches<'_, T> {
    /// What places from `first` on see under one place of their kernels; zeros beyond the last one.
    fn row(&self, at: usize, first: usize, out: &mut [T]) {
        let Sizes { picture: [height, width], kernel: [_, kernel_width], stride, border, .. } = self.sizes;
        let kernel = self.sizes.kernel[0] * kernel_width;
        let (channel, at) = (at / kernel, at % kernel);
        let (down, right) = (at / kernel_width, at % kernel_width);
        let channel = &self.x[channel * height * width..][..height * width];
        let end = self.places.min(first + out.len());
        let (mut place, mut lane) = (first, 0);
        while place < end {
            let (row, column) = (place / self.width, place % self.width);
            let count = (self.width - column).min(end - place);
            let out = &mut out[lane..lane + count];
            let row = (row * stride + down).checked_sub(border);
            match row.filter(|&row| row < height) {
                Some(row) => self.line(&channel[row * width..][..width], column, right, out),
                None => out.fill(T::default()),
            }
            place += count;
            lane += count;
        }
        out[lane..].fill(T::default());
    }

    /// What `out.len()` neighbours from `column` on see in a row of the picture, `right` of where their kernels begin.
    fn line(&self, row: &[T], column: usize, right: usize, out: &mut [T]) {
        let Sizes { stride, border, .. } = self.sizes;
        if stride != 1 {
            for (at, out) in (column..).zip(out) {
                let seen = (at * stride + right).checked_sub(border);
                *out = seen.and_then(|seen| row.get(seen)).copied().unwrap_or_default();
            }
            return;
        }
        // the first of `out` that sees the row, and the first that no longer does
        let start = border.saturating_sub(column + right).min(out.len());
        let end = (row.len() + border).saturating_sub(column + right).clamp(start, out.len());
        out[..start].fill(T::default());
        out[end..].fill(T::default());
        if start < end {
            let seen = column + start + right - border;
            out[start..end].copy_from_slice(&row[seen..seen + end - start]);
        }
    }
}
