use burn::tensor::Tensor;

/// How much of a tile its neighbour covers too: a quarter.
const OVERLAP: f64 = 0.25;

/// Squares that overlap, as diffusers cuts pictures and latents into.
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
        Cut::new(self.latent(), self.pixels).apply(latents, decode)
    }

    /// Pictures, `[batch, channels, height, width]`, through `encode` tile by tile.
    pub fn encode(&self, pictures: Tensor<4>, encode: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        Cut::new(self.pixels, self.latent()).apply(pictures, encode)
    }
}

impl Cut {
    fn new(side: usize, other: usize) -> Self {
        let blend = (other as f64 * OVERLAP) as usize;
        let step = (side as f64 * (1.0 - OVERLAP)) as usize;
        Self { side, step: step.max(1), blend, kept: other - blend }
    }

    fn apply(&self, x: Tensor<4>, f: impl Fn(Tensor<4>) -> Tensor<4>) -> Tensor<4> {
        let [.., height, width] = x.dims();
        if height <= self.side && width <= self.side {
            return f(x);
        }
        let mut above: Vec<Tensor<4>> = Vec::new();
        let mut rows = Vec::new();
        for top in (0..height).step_by(self.step) {
            let strip = x.clone().narrow(2, top, self.side.min(height - top));
            let mut row: Vec<Tensor<4>> = Vec::new();
            for left in (0..width).step_by(self.step) {
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
    let rest = tile.narrow(axis, extent, length - extent);
    Tensor::cat(vec![faded, rest], axis)
}
