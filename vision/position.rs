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

    #[test]
    fn untrained_tables_change_nothing() {
        let positions = DecomposedPositions::new([2, 3], 4, &Device::flex());
        let query = Tensor::<4>::ones([2, 3, 6, 4], &Device::flex());
        assert_eq!(positions.forward(query).abs().max().into_scalar::<f32>(), 0.0);
    }
}
