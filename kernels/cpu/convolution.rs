//! Convolutions as products of the weights with the places under them, which are gathered panel by panel: no picture is
//! copied as a whole, and no weight.

use std::ops::Range;

use super::matmul::{COLUMNS, Right, product};
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

/// A place under the kernel: what a word of the inner axis is of.
#[derive(Clone, Copy)]
struct Tap {
    channel: usize,
    down: usize,
    right: usize,
}

impl<T: Number> Right<T> for Patches<'_, T> {
    fn lay_out<K: Tile<C>, const C: usize>(&self, inner: Range<usize>, first: usize, panel: &mut [[f32; C]]) {
        let words = panel.len();
        self.lay_out_all::<K, C>(inner, first, panel, words);
    }

    fn lay_out_all<K: Tile<C>, const C: usize>(
        &self,
        inner: Range<usize>,
        first: usize,
        panels: &mut [[f32; C]],
        words: usize,
    ) {
        let lanes = panels.len() / words * C;
        let end = self.places.min(first + lanes);
        let given = inner.len().div_ceil(K::PER_WORD);
        for (at, panel) in panels.chunks_mut(words).enumerate() {
            let own = (end - first).saturating_sub(at * C).min(C);
            panel.iter_mut().for_each(|words| words[own..].fill(0.0));
            panel[given..].fill([0.0; C]);
        }
        let mut seen = [[T::default(); COLUMNS]; 2];
        let mut place = first;
        while place < end {
            // neighbours in a row of the output
            let (row, column) = (place / self.width, place % self.width);
            let count = (self.width - column).min(end - place).min(COLUMNS);
            let (mut tap, mut left) = (self.tap(inner.start), inner.len());
            for word in 0..given {
                let taps = left.min(K::PER_WORD);
                for seen in &mut seen[..taps] {
                    self.line(tap, [row, column], &mut seen[..count]);
                    tap = self.after(tap);
                }
                left -= taps;
                let mut lane = place - first;
                let mut from = 0;
                while from < count {
                    let some = (C - lane % C).min(count - from);
                    let [one, next] = [&seen[0][from..from + some], &seen[1][from..from + some]];
                    let words = &mut panels[lane / C * words + word][lane % C..][..some];
                    T::across::<K, C>(one, (taps == 2).then_some(next), words);
                    (lane, from) = (lane + some, from + some);
                }
            }
            place += count;
        }
    }

    fn at_once(&self) -> usize {
        COLUMNS
    }
}

impl<T: Number> Patches<'_, T> {
    fn tap(&self, at: usize) -> Tap {
        let [height, width] = self.sizes.kernel;
        Tap { channel: at / (height * width), down: at / width % height, right: at % width }
    }

    /// The next one, without a division.
    #[inline(always)]
    fn after(&self, tap: Tap) -> Tap {
        let ([height, width], Tap { channel, down, right }) = (self.sizes.kernel, tap);
        match (down + 1 < height, right + 1 < width) {
            (_, true) => Tap { right: right + 1, ..tap },
            (true, false) => Tap { channel, down: down + 1, right: 0 },
            (false, false) => Tap { channel: channel + 1, down: 0, right: 0 },
        }
    }

    /// What `out.len()` neighbours from `row` and `column` of the output on see at one place of their kernels.
    #[inline(always)]
    fn line(&self, Tap { channel, down, right }: Tap, [row, column]: [usize; 2], out: &mut [T]) {
        let Sizes { picture: [height, width], stride, border, .. } = self.sizes;
        let row = (row * stride + down).wrapping_sub(border);
        if row >= height {
            return out.fill(T::default());
        }
        let row = &self.x[(channel * height + row) * width..][..width];
        let start = (column * stride + right).wrapping_sub(border);
        match row.get(start..start.saturating_add(out.len())).filter(|_| stride == 1) {
            Some(seen) => out.copy_from_slice(seen),
            None => {
                for (at, out) in out.iter_mut().enumerate() {
                    *out = row.get(start.wrapping_add(at * stride)).copied().unwrap_or_default();
                }
            }
        }
    }
}
