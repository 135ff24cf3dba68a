use burn::tensor::Tensor;

/// How much of a tile its neighbour covers too: a quarter.
const OVERLAP: f64 = 0.25;

/// Squares that overlap, as diffusers cuts pictures and latents into. Of a side that is no multiple of four times the
/// factor a quarter is not whole on either side, and the tiles do not quite meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Side in pixels.
    pub pixels: usize,
    /// Pixels of a latent's side.
    pub factor: usize,
}

/// Tiles on the one side, and where they are joined on the other.
struct Cut {
    /// Side of a tile.
    side: usize,
    /// What a tile has at least; less at an end gives nothing.
    least: usize,
    /// From one tile's start to the next one's.
    step: usize,
    /// What two of the other side blend over.
    blend: usize,
    /// What is kept of each of the other side.
    kept: usize,
}

impl Tiles {
    /// Side of a tile of latents; at least 1.
    pub fn latent(&self) -> usize {
        (self.pixels / self.factor).max(1)
    }

    /// Latents, `[batch, d_latent, height, width]`, through `decode` tile by tile.
    pub fn decode(&self, latents: Tensor<4>, decode: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        Cut::new(self.latent(), self.pixels, 1).apply(latents, decode)
    }

    /// Pictures, `[batch, channels, height, width]`, through `encode` tile by tile.
    pub fn encode(&self, pictures: Tensor<4>, encode: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        Cut::new(self.pixels, self.latent(), self.factor).apply(pictures, encode)
    }
}

impl Cut {
    fn new(side: usize, other: usize, least: usize) -> Self {
        let blend = (other as f64 * OVERLAP) as usize;
        let step = (side as f64 * (1.0 - OVERLAP)) as usize;
        Self { side, least, step: step.max(1), blend, kept: other - blend }
    }

    fn apply(&self, x: Tensor<4>, f: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        let [.., height, width] = x.dims();
        if height <= self.side && width <= self.side {
            return f(x);
        }
        let starts = |length: usize| (0..=length.saturating_sub(self.least)).step_by(self.step);
        let mut above: Vec<Tensor<4>> = Vec::new();
        let mut rows = Vec::new();
        for top in starts(height) {
            let strip = x.clone().narrow(2, top, self.side.min(height - top));
            let mut row: Vec<Tensor<4>> = Vec::new();
            for left in starts(width) {
                let mut tile = f(strip.clone().narrow(3, left, self.side.min(width - left)));
                if let Some(above) = above.get(row.len()) {
                    tile = blended(above, tile, 2, self.blend);
                }
                if let Some(before) = row.last() {
                    tile = blended(before, tile, 3, self.blend);
                }
                row.push(tile);
            }
            let kept = row.iter().map(|tile| {
                let [.., height, width] = tile.dims();
                tile.clone().narrow(2, 0, self.kept.min(height)).narrow(3, 0, self.kept.min(width))
            });
            rows.push(Tensor::cat(kept.collect(), 3));
            above = row;
        }
        Tensor::cat(rows, 2)
    }
}

/// `tile`, whose first lines fade in from the last ones of `before`.
fn blended(before: &Tensor<4>, tile: Tensor<4>, axis: usize, extent: usize) -> Tensor<4> {
    let (length, past) = (tile.dims()[axis], before.dims()[axis]);
    let extent = extent.min(length).min(past);
    if extent == 0 {
        return tile;
    }
    let share: Vec<f32> = (0..extent).map(|line| line as f32 / extent as f32).collect();
    let mut shape = [1; 4];
    shape[axis] = extent;
    let share = Tensor::<1>::from_data(share.as_slice(), (&tile.device(), tile.dtype())).reshape(shape);
    let end = before.clone().narrow(axis, past - extent, extent);
    let start = tile.clone().narrow(axis, 0, extent);
    let faded = end * (-share.clone() + 1.0) + start * share;
    if extent == length {
        return faded;
    }
    Tensor::cat(vec![faded, tile.narrow(axis, extent, length - extent)], axis)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use burn::tensor::ops::PadMode;
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::residual::double;
    use crate::residual::tests::{assert_close, noise};

    /// What looks at each place alone cannot tell a tile from the whole.
    #[test]
    fn seams_of_what_is_local_are_not_seen() {
        let tiles = Tiles { pixels: 8, factor: 2 };
        for [height, width] in [[4, 4], [5, 3], [6, 9], [4, 13]] {
            let latents = noise([2, 3, height, width], &Device::flex());
            assert_close(tiles.decode(latents.clone(), double), double(latents.clone()), 1e-6);
            let half = |x: Tensor<4>| {
                let [batch, channels, height, width] = x.dims();
                let (rows, columns) = (height / 2, width / 2);
                let x = x.narrow(2, 0, 2 * rows).narrow(3, 0, 2 * columns);
                let x = x.reshape([batch, channels, rows, 2, columns, 2]);
                x.mean_dim(5).mean_dim(3).reshape([batch, channels, rows, columns])
            };
            // a line more, which is too little for a latent
            let pictures = double(latents.clone()).pad([(0, 1), (0, 1)], PadMode::Constant(9.0));
            assert_close(tiles.encode(pictures, half), latents, 1e-6);
        }
    }

    /// Tiles of 4 every 3 that are as large on the other side, the first all 0, the second all 1: over the one line that
    /// both cover the first is kept, as a fade begins with it.
    #[test]
    fn a_seam_fades() {
        let count = Cell::new(0);
        let numbered = |tile: Tensor<4>| tile.zeros_like() + f64::from(count.replace(count.get() + 1));
        let found = Cut::new(4, 4, 1).apply(Tensor::zeros([1, 1, 1, 5], &Device::flex()), numbered);
        found.into_data().assert_eq(&TensorData::from([[[[0.0, 0.0, 0.0, 0.0, 1.0]]]]), false);
        count.set(0);
        // 8 every 6, two lines fade: the second starts at 0, and is half there at the next
        let found = Cut::new(8, 8, 1).apply(Tensor::zeros([1, 1, 9, 1], &Device::flex()), numbered);
        let found: Vec<f32> = found.into_data().iter().collect();
        assert_eq!(found, [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0]);
    }
}
