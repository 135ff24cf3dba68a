//! Where the patches of a picture stand: tables that are resized, and learned vectors for distances.

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::interpolation::Interpolation;

/// A table of positions for another number of patches, by bicubic interpolation: `[rows * columns, d]`, row by row,
/// from `from` to `to` (rows, columns).
///
/// The numbers are those of [`Interpolation::Bicubic`]. With `from == to` the table stays as it is.
///
/// # Panics
/// If the table has not `from[0] * from[1]` rows.
pub fn resize_positions(table: Tensor<2>, from: [usize; 2], to: [usize; 2]) -> Tensor<2> {
    let [positions, d] = table.dims();
    assert_eq!(positions, from[0] * from[1], "positions of a table (left) and of a grid of {from:?}");
    if from == to {
        return table;
    }
    let (device, dtype) = (table.device(), table.dtype());
    let matrix = |from, to| Tensor::<2>::from_data(bicubic(from, to), &device).cast(dtype);
    let rows = matrix(from[0], to[0]).matmul(table.reshape([from[0], from[1] * d])); // [to rows, columns * d]
    let columns = matrix(from[1], to[1]).unsqueeze::<3>(); // [1, to columns, columns]
    columns.matmul(rows.reshape([to[0], from[1], d])).reshape([to[0] * to[1], d])
}

/// What each of `to` places takes from each of `from`: `[to, from]`.
fn bicubic(from: usize, to: usize) -> TensorData {
    let mut weights = vec![0.0_f32; to * from];
    for (row, taps) in weights.chunks_exact_mut(from).zip(Interpolation::Bicubic.taps(from, to)) {
        for (source, weight) in taps {
            row[source] += weight;
        }
    }
    TensorData::new(weights, [to, from])
}

/// A learned vector for how many rows, and one for how many columns, a key stands from its query; their products with
/// the query are added to the score (Li et al. 2021, MViTv2, section 4.1, <https://arxiv.org/abs/2112.01526>).
#[derive(Module, Debug)]
pub struct DecomposedPositions {
    /// `[2 * rows - 1, d_head]`, the query furthest above its key first.
    pub rows: Param<Tensor<2>>,
    /// `[2 * columns - 1, d_head]`, the query furthest left of its key first.
    pub columns: Param<Tensor<2>>,
}

impl DecomposedPositions {
    /// Untrained tables for a grid of rows and columns: zeros, which change no score.
    pub fn new([rows, columns]: [usize; 2], d_head: usize, device: &Device) -> Self {
        let table = |places: usize| Initializer::Zeros.init([2 * places - 1, d_head], device);
        Self { rows: table(rows), columns: table(columns) }
    }

    /// What is added to the scores of queries `[batch, n_heads, rows * columns, d_head]`, which are not scaled:
    /// `[batch, n_heads, queries, keys]`.
    ///
    /// # Panics
    /// If there are not as many queries as places in the grid.
    pub fn forward(&self, query: Tensor<4>) -> Tensor<4> {
        let [batch, heads, patches, d_head] = query.dims();
        let ([tall, _], [wide, _]) = (self.rows.val().dims(), self.columns.val().dims());
        let [rows, columns] = [tall.div_ceil(2), wide.div_ceil(2)];
        assert_eq!(patches, rows * columns, "queries (left) and places of a grid of {rows} x {columns}");
        let query = query.reshape([batch * heads, rows, columns, d_head]);
        let of_rows = query
            .clone()
            .swap_dims(0, 1) // [rows, batch * heads, columns, d_head]
            .reshape([rows, batch * heads * columns, d_head])
            .matmul(of_distances(self.rows.val(), rows))
            .reshape([rows, batch * heads, columns, rows])
            .swap_dims(0, 1)
            .reshape([batch * heads, patches, rows, 1]);
        let of_columns = query
            .permute([2, 0, 1, 3]) // [columns, batch * heads, rows, d_head]
            .reshape([columns, batch * heads * rows, d_head])
            .matmul(of_distances(self.columns.val(), columns))
            .reshape([columns, batch * heads, rows, columns])
            .permute([1, 2, 0, 3])
            .reshape([batch * heads, patches, 1, columns]);
        (of_rows + of_columns).reshape([batch, heads, patches, patches])
    }
}

/// The vectors of a table for each place of a query and each of a key: `[query, d, key]`.
fn of_distances(table: Tensor<2>, places: usize) -> Tensor<3> {
    let [_, d] = table.dims();
    let distance = |at: usize| (at / places + places - 1 - at % places) as i64;
    let distances: Vec<i64> = (0..places * places).map(distance).collect();
    let distances =
        Tensor::<1, Int>::from_data(TensorData::new(distances, [places * places]), &table.device());
    table.select(0, distances).reshape([places, places, d]).swap_dims(1, 2)
}

/// A learned number per head for how many rows and columns a key stands from its query, added to the score; three more
/// where one of the two is a class token before the patches (Bao et al. 2021, BEiT, section 2.4,
/// <https://arxiv.org/abs/2106.08254>; Liu et al. 2021, Swin, section 3.2).
#[derive(Module, Debug)]
pub struct GridBias {
    /// `[(2 * rows - 1) * (2 * columns - 1) + 3, n_heads]`: distances row by row, the query furthest above and left of its
    /// key first; then the class token's to a patch, a patch's to it, its own to itself.
    pub table: Param<Tensor<2>>,
    rows: usize,
    columns: usize,
}

impl GridBias {
    /// An untrained table for a grid of rows and columns: zeros, which change no score.
    pub fn new([rows, columns]: [usize; 2], n_heads: usize, device: &Device) -> Self {
        let distances = (2 * rows - 1) * (2 * columns - 1);
        Self { table: Initializer::Zeros.init([distances + 3, n_heads], device), rows, columns }
    }

    /// What is added to the scores of a class token and the patches row by row: `[1, n_heads, 1 + patches, 1 + patches]`.
    pub fn forward(&self) -> Tensor<4> {
        let table = self.table.val();
        let ([entries, n_heads], patches) = (table.dims(), self.rows * self.columns);
        let entry = |query: usize, key: usize| match (query.checked_sub(1), key.checked_sub(1)) {
            (None, Some(_)) => entries - 3,
            (Some(_), None) => entries - 2,
            (None, None) => entries - 1,
            (Some(query), Some(key)) => {
                let row = query / self.columns + self.rows - 1 - key / self.columns;
                let column = query % self.columns + self.columns - 1 - key % self.columns;
                row * (2 * self.columns - 1) + column
            }
        };
        let tokens = 1 + patches;
        let chosen: Vec<i64> =
            (0..tokens * tokens).map(|pair| entry(pair / tokens, pair % tokens) as i64).collect();
        let chosen = TensorData::new(chosen, [tokens * tokens]);
        let bias = table.select(0, Tensor::<1, Int>::from_data(chosen, &self.table.device()));
        bias.reshape([tokens, tokens, n_heads]).permute([2, 0, 1]).unsqueeze()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;

    fn floats<const D: usize>(shape: [usize; D], values: &[f32]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values.to_vec(), shape), &Device::flex())
    }

    /// Of `torch.nn.functional.interpolate(torch.tensor([[[[0., 1, 4], [9, 16, 25]]]]), (3, 4), mode="bicubic")`.
    #[test]
    fn a_table_resized_as_torch_does() {
        let table = floats([6, 1], &[0.0, 1.0, 4.0, 9.0, 16.0, 25.0]);
        let expected = [
            -0.81564355_f32,
            -0.74712145,
            0.643931,
            2.3550317,
            4.2128906,
            6.399414,
            11.1015625,
            14.930664,
            9.241423,
            13.545948,
            21.559193,
            27.506296,
        ];
        resize_positions(table, [2, 3], [3, 4])
            .into_data()
            .assert_approx_eq::<f32>(&TensorData::new(expected.to_vec(), [12, 1]), Tolerance::absolute(1e-5));
    }

    #[test]
    fn a_constant_stays_constant_and_the_same_size_the_same() {
        for (from, to) in [([1, 1], [5, 2]), ([7, 3], [2, 9]), ([4, 4], [8, 4])] {
            let ones = Tensor::<2>::ones([from[0] * from[1], 3], &Device::flex());
            let wanted = Tensor::<2>::ones([to[0] * to[1], 3], &Device::flex()).into_data();
            resize_positions(ones, from, to)
                .into_data()
                .assert_approx_eq::<f32>(&wanted, Tolerance::absolute(1e-6));
        }
        let table = floats([2, 2], &[0.1, -7.0, 3.0, 1e-9]);
        resize_positions(table.clone(), [1, 2], [1, 2]).into_data().assert_eq(&table.into_data(), true);
    }

    /// Row vectors 1, 2, 3 for distances -1, 0, 1 and column vectors 10, 20, 30; the query is 1 everywhere but 2 in the
    /// last place of a 2 x 2 grid.
    #[test]
    fn distances_literal() {
        let positions = DecomposedPositions {
            rows: Param::from_tensor(floats([3, 1], &[1.0, 2.0, 3.0])),
            columns: Param::from_tensor(floats([3, 1], &[10.0, 20.0, 30.0])),
        };
        let query = floats([1, 1, 4, 1], &[1.0, 1.0, 1.0, 2.0]);
        let expected = vec![
            22.0_f32, 12.0, 21.0, 11.0, // from above left: to itself, its right, below, below right
            32.0, 22.0, 31.0, 21.0, // from above right
            23.0, 13.0, 22.0, 12.0, // from below left
            66.0, 46.0, 64.0, 44.0, // from below right, twice
        ];
        let expected = TensorData::new(expected, [1, 1, 4, 4]);
        positions.forward(query).into_data().assert_eq(&expected, true);
    }

    /// Each entry of the table is its own number. Two rows of one column: a patch is 0 or 1 below its key, or 1 above it.
    #[test]
    fn a_grid_bias_literal() {
        let bias = GridBias::new([2, 1], 1, &Device::flex());
        let table = Param::from_tensor(floats([6, 1], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]));
        let expected = vec![
            5.0_f32, 3.0, 3.0, // the class token to itself and to the patches
            4.0, 1.0, 0.0, // the upper patch
            4.0, 2.0, 1.0, // the lower patch
        ];
        let expected = TensorData::new(expected, [1, 1, 3, 3]);
        GridBias { table, ..bias }.forward().into_data().assert_eq(&expected, true);
    }

    /// Only the distance matters, whichever patches it lies between.
    #[test]
    fn a_grid_bias_is_the_same_everywhere() {
        let bias = GridBias::new([3, 4], 2, &Device::flex());
        let table = Tensor::<1, Int>::arange(0..76, &Device::flex()).float().reshape([38, 2]);
        let found = GridBias { table: Param::from_tensor(table), ..bias }.forward();
        let at = |query: usize, key: usize| {
            found.clone().slice([0..1, 1..2, 1 + query..2 + query, 1 + key..2 + key]).into_scalar::<f32>()
        };
        // one down and one left, from two places; back is another number
        assert_eq!(at(1, 4), at(6, 9));
        assert_ne!(at(1, 4), at(4, 1));
        assert_ne!(at(1, 4), at(1, 6));
    }

    #[test]
    fn untrained_tables_change_nothing() {
        let positions = DecomposedPositions::new([2, 3], 4, &Device::flex());
        let query = Tensor::<4>::ones([2, 3, 6, 4], &Device::flex());
        assert_eq!(positions.forward(query).abs().max().into_scalar::<f32>(), 0.0);
    }
}
