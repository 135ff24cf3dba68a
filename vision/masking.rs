//! Patches that a model in training does not see: blocks of them stand behind a mask token, or any of them are left out.

use burn::tensor::{Device, Int, Tensor, TensorData};
use fastrand::Rng;

/// Hides blocks of patches (Bao et al. 2021, "BEiT", algorithm 1, <https://arxiv.org/abs/2106.08254>; EVA does as BEiT): what
/// stands alone could be guessed from its neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockMasking {
    /// Rows and columns of the grid of patches.
    pub grid: [usize; 2],
    /// At most so many are hidden.
    pub masked: usize,
    /// The least patches of a block.
    pub smallest: usize,
}

impl BlockMasking {
    /// Which patches are hidden, row by row: blocks, as in the authors' code, until there are enough or ten in a row do not
    /// fit. At least one patch is hidden, where any may be.
    pub fn draw(&self, rng: &mut Rng) -> Vec<bool> {
        /// Height over width of a block, or width over height.
        const SLIMMEST: f64 = 0.3;
        const TRIES: usize = 10;
        let [rows, columns] = self.grid;
        let mut hidden = vec![false; rows * columns];
        let most = self.masked.min(hidden.len());
        let (mut count, mut tries) = (0, 0);
        while count < most && tries < TRIES {
            tries += 1;
            let least = self.smallest as f64;
            let area = least + ((most - count) as f64 - least).max(0.0) * rng.f64();
            let aspect = (SLIMMEST.ln() * (1.0 - 2.0 * rng.f64())).exp();
            let height = (area * aspect).sqrt().round() as usize;
            let width = (area / aspect).sqrt().round() as usize;
            if height >= rows || width >= columns {
                continue;
            }
            let (top, left) = (rng.usize(..=rows - height), rng.usize(..=columns - width));
            let block = (0..height * width).map(|at| (top + at / width) * columns + left + at % width);
            let fresh: Vec<usize> = block.filter(|&at| !hidden[at]).collect();
            if (1..=most - count).contains(&fresh.len()) {
                fresh.iter().for_each(|&at| hidden[at] = true);
                (count, tries) = (count + fresh.len(), 0);
            }
        }
        if count == 0 && most > 0 {
            hidden[rng.usize(..rows * columns)] = true;
        }
        hidden
    }
}

/// Leaves patches out of training (Li et al. 2022, "FLIP", <https://arxiv.org/abs/2212.00794>; `PatchDropout` of EVA-CLIP and
/// open_clip): those that stay are computed, what is no patch always stays.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PatchDropout {
    /// The share that is left out, from 0 to below 1.
    pub rate: f64,
}

impl PatchDropout {
    /// How many of so many patches stay: the share's part rounded down, at least one.
    pub fn kept(&self, patches: usize) -> usize {
        ((patches as f64 * (1.0 - self.rate)) as usize).max(1).min(patches)
    }

    /// Draws which patches of each picture of a batch stay.
    pub fn draw(&self, batch: usize, patches: usize, rng: &mut Rng) -> Kept {
        let kept = self.kept(patches);
        let rows = (0..batch).flat_map(|_| {
            let mut row = rng.choose_multiple(0..patches as i64, kept);
            row.sort_unstable();
            row
        });
        Kept { patches: rows.collect(), shape: [batch, kept] }
    }
}

/// Which patches of each picture of a batch stay, in their order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept {
    patches: Vec<i64>,
    shape: [usize; 2],
}

impl Kept {
    /// Those patches of each picture, row after row.
    pub fn rows(&self) -> impl Iterator<Item = &[i64]> {
        self.patches.chunks_exact(self.shape[1].max(1))
    }

    /// Those of `count` pictures from `first` on.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn of(&self, first: usize, count: usize) -> Self {
        let [_, kept] = self.shape;
        Self { patches: self.patches[first * kept..][..count * kept].to_vec(), shape: [count, kept] }
    }

    /// The tokens that stay, of sequences in which `prefix` tokens stand before the patches: `[batch, prefix + patches, d]` to
    /// `[batch, prefix + kept, d]`.
    ///
    /// # Panics
    /// If there are more or fewer pictures than these patches are of.
    pub fn pick(&self, tokens: Tensor<3>, prefix: usize) -> Tensor<3> {
        let ([batch, ..], [expected, _]) = (tokens.dims(), self.shape);
        assert_eq!(batch, expected, "pictures (left) and those that patches were drawn for");
        let places = self.places(prefix, &tokens.device());
        pick(tokens, places)
    }

    /// Where the tokens that stay stood in their sequences, `prefix` tokens before the patches among them: `[batch, prefix +
    /// kept]`.
    pub fn places(&self, prefix: usize, device: &Device) -> Tensor<2, Int> {
        let [batch, kept] = self.shape;
        let first = prefix as i64;
        let places = self.rows().flat_map(|row| (0..first).chain(row.iter().map(move |patch| first + patch)));
        Tensor::from_data(TensorData::new(places.collect::<Vec<_>>(), [batch, prefix + kept]), device)
    }
}

/// Rows of each sample: `[batch, n, d]` at `[batch, m]` is `[batch, m, d]`.
pub fn pick(x: Tensor<3>, at: Tensor<2, Int>) -> Tensor<3> {
    let ([batch, _, d], [_, m]) = (x.dims(), at.dims());
    x.gather(1, at.unsqueeze_dim::<3>(2).expand([batch, m, d]))
}

#[cfg(test)]
mod tests {
    use proptest::{prop_assert, prop_assert_eq, proptest};

    use super::*;

    /// EVA's setting: 105 of 16 x 16 patches.
    const EVA: BlockMasking = BlockMasking { grid: [16, 16], masked: 105, smallest: 16 };

    proptest! {
        #[test]
        fn no_more_are_hidden_than_may_be(
            (rows, columns) in (1_usize..12, 1_usize..12),
            masked in 0_usize..160,
            smallest in 0_usize..20,
            seed: u64,
        ) {
            let masking = BlockMasking { grid: [rows, columns], masked, smallest };
            let hidden = masking.draw(&mut Rng::with_seed(seed));
            prop_assert_eq!(hidden.len(), rows * columns);
            let count = hidden.iter().filter(|&&hidden| hidden).count();
            prop_assert!(count <= masked && (count > 0 || masked == 0), "{} of {}", count, masked);
            prop_assert_eq!(hidden, masking.draw(&mut Rng::with_seed(seed)));
        }

        #[test]
        fn as_many_stay_as_should(batch in 0_usize..5, patches in 1_usize..50, rate in 0.0..1.0, seed: u64) {
            let dropout = PatchDropout { rate };
            let kept = dropout.draw(batch, patches, &mut Rng::with_seed(seed));
            prop_assert_eq!(kept.rows().count(), batch);
            let expected = ((1.0 - rate) * patches as f64) as usize;
            for row in kept.rows() {
                prop_assert_eq!(row.len(), expected.max(1));
                prop_assert!(row.windows(2).all(|pair| pair[0] < pair[1]), "in order, each once: {:?}", row);
                prop_assert!(row[0] >= 0 && row[row.len() - 1] < patches as i64);
            }
            prop_assert_eq!(&kept, &dropout.draw(batch, patches, &mut Rng::with_seed(seed)));
            for first in 0..batch {
                let rest = kept.of(first, batch - first);
                prop_assert!(rest.rows().eq(kept.rows().skip(first)));
            }
        }
    }

    /// About two fifths, most of them with hidden ones above or below and at a side.
    #[test]
    fn what_is_hidden_hangs_together() {
        let mut rng = Rng::with_seed(1);
        let (mut count, mut inside) = (0, 0);
        for _ in 0..100 {
            let hidden = EVA.draw(&mut rng);
            let at = |row: usize, column: usize| row < 16 && column < 16 && hidden[row * 16 + column];
            for (row, column) in
                (0..256).map(|at| (at / 16, at % 16)).filter(|&(row, column)| at(row, column))
            {
                count += 1;
                let upright = at(row + 1, column) || at(row.wrapping_sub(1), column);
                let across = at(row, column + 1) || at(row, column.wrapping_sub(1));
                inside += usize::from(upright && across);
            }
        }
        assert!((9_500..=10_500).contains(&count), "{count}");
        assert!(inside as f64 > 0.95 * count as f64, "{inside} of {count}");
    }

    /// Every patch stays as often as any other, and without a rate all do.
    #[test]
    fn no_patch_is_preferred() {
        let mut counts = [0; 10];
        let kept = PatchDropout { rate: 0.5 }.draw(4000, 10, &mut Rng::with_seed(2));
        kept.rows().flatten().for_each(|&patch| counts[patch as usize] += 1);
        assert!(counts.iter().all(|count| (1850..2150).contains(count)), "{counts:?}");
        let all = PatchDropout { rate: 0.0 }.draw(1, 4, &mut Rng::with_seed(2));
        assert_eq!(all.patches, [0, 1, 2, 3]);
    }

    /// Of sequences of one class token and three patches.
    #[test]
    fn tokens_before_the_patches_stay() {
        let kept = Kept { patches: vec![0, 2, 1, 2], shape: [2, 2] };
        let device = Device::flex();
        let tokens = Tensor::<1, Int>::arange(0..8, &device).float().reshape([2, 4, 1]);
        let found = kept.pick(tokens, 1).into_data();
        found.assert_eq(&TensorData::new(vec![0.0_f32, 1.0, 3.0, 4.0, 6.0, 7.0], [2, 3, 1]), true);
    }
}
