use burn::module::{Initializer, Module, Param};
use burn::tensor::module::embedding;
use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::ops::Positions;

/// A learned vector per position, added to the sequence.
#[derive(Module, Debug)]
pub struct LearnedPositions {
    /// `[positions, d_model]`.
    pub weight: Param<Tensor<2>>,
}

impl LearnedPositions {
    /// An untrained table, normal with deviation `std`.
    pub fn new(positions: usize, d_model: usize, std: f64, device: &Device) -> Self {
        Self { weight: Initializer::Normal { mean: 0.0, std }.init([positions, d_model], device) }
    }

    /// Adds the first `seq` positions to `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If the sequence is longer than the table.
    pub fn forward(&self, x: Tensor<3>) -> Tensor<3> {
        let [_, seq, _] = x.dims();
        let [positions, _] = self.weight.val().dims();
        assert!(seq <= positions, "a sequence of {seq} tokens is longer than {positions} positions");
        x + self.weight.val().narrow(0, 0, seq).unsqueeze()
    }

    /// The vectors of `seq` tokens that stand at `positions`: `[batch or 1, seq, d_model]`.
    ///
    /// # Panics
    /// If one stands beyond the table.
    pub fn select(&self, positions: &Positions, seq: usize) -> Tensor<3> {
        match positions {
            Positions::From(first) => {
                let [positions, _] = self.weight.val().dims();
                let end = first + seq;
                assert!(end <= positions, "position {} is beyond {positions} positions", end - 1);
                self.weight.val().narrow(0, *first, seq).unsqueeze()
            }
            Positions::Each(each) => embedding(self.weight.val(), each.clone()),
        }
    }
}

/// What a [`RelativeBias`] tells apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Keys before and after the query: half of the buckets for each.
    BothSides,
    /// Keys up to the query; later ones count as the query's own place.
    Past,
}

/// A learned number per head for the distance between query and key, added to the score (Raffel et al. 2019, section
/// 2.1). Distances share buckets: short ones have one each, longer ones ever fewer, all beyond `max_distance` one.
#[derive(Module, Debug)]
pub struct RelativeBias {
    /// `[buckets, n_heads]`.
    pub weight: Param<Tensor<2>>,
    max_distance: usize,
    #[module(skip)]
    reach: Reach,
}

impl RelativeBias {
    /// An untrained table, normal with deviation 0.02.
    ///
    /// # Panics
    /// If there are fewer than 4 buckets, or `max_distance` is no longer than the distances with a bucket of their own:
    /// half of the buckets, or a quarter with [`Reach::BothSides`].
    pub fn new(buckets: usize, max_distance: usize, n_heads: usize, reach: Reach, device: &Device) -> Self {
        let exact = exact(buckets, reach);
        assert!(buckets >= 4, "{buckets} buckets are fewer than 4");
        assert!(max_distance > exact, "the longest distance {max_distance} is not above {exact}");
        let weight = Initializer::Normal { mean: 0.0, std: 0.02 }.init([buckets, n_heads], device);
        Self { weight, max_distance, reach }
    }

    /// What is added to the scores of the last `queries` of `keys` tokens: `[1, n_heads, queries, keys]`.
    ///
    /// # Panics
    /// If there are more queries than keys.
    pub fn forward(&self, queries: usize, keys: usize) -> Tensor<4> {
        assert!(queries <= keys, "{queries} queries are more than {keys} keys");
        let weight = self.weight.val();
        let [buckets, n_heads] = weight.dims();
        let bucket = |offset| bucket(offset, buckets, self.max_distance, self.reach) as i64;
        let length = keys as i64;
        let of_offset: Vec<i64> = (1 - length..length).map(bucket).collect(); // key - query
        let rows: Vec<i64> = (keys - queries..keys)
            .flat_map(|query| of_offset[keys - 1 - query..][..keys].iter().copied())
            .collect();
        let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [queries * keys]), &weight.device());
        let bias = weight.select(0, rows).reshape([queries, keys, n_heads]);
        bias.permute([2, 0, 1]).unsqueeze()
    }
}

/// How many distances have a bucket of their own.
fn exact(buckets: usize, reach: Reach) -> usize {
    match reach {
        Reach::BothSides => buckets / 4,
        Reach::Past => buckets / 2,
    }
}

/// The bucket of a key that stands `offset` after its query. Beyond the `exact` distances with one each it grows with
/// the logarithm, in f32 as in the reference (`_relative_position_bucket` of `transformers`).
fn bucket(offset: i64, buckets: usize, max_distance: usize, reach: Reach) -> usize {
    let (first, of_side, distance) = match reach {
        Reach::BothSides if offset > 0 => (buckets / 2, buckets / 2, offset as usize),
        Reach::BothSides => (0, buckets / 2, offset.unsigned_abs() as usize),
        Reach::Past => (0, buckets, (-offset).max(0) as usize),
    };
    let exact = exact(buckets, reach);
    if distance < exact {
        return first + distance;
    }
    let whole = (max_distance as f64 / exact as f64).ln() as f32;
    let share = (distance as f32 / exact as f32).ln() / whole;
    let beyond = (share * (of_side - exact) as f32) as usize;
    first + (exact + beyond).min(of_side - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, floats, tensor};

    fn positions() -> LearnedPositions {
        let table = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        LearnedPositions { weight: Param::from_tensor(tensor([3, 2], &table, &Device::flex())) }
    }

    #[test]
    fn the_first_rows_are_added_to_every_row_of_the_batch() {
        let x = tensor([2, 2, 2], &[0.0, 0.0, 0.0, 0.0, 10.0, 10.0, 20.0, 20.0], &Device::flex());
        let expected = [1.0, 2.0, 3.0, 4.0, 11.0, 12.0, 23.0, 24.0];
        assert_close(positions().forward(x), &expected, 0.0);
    }

    #[test]
    fn positions_pick_rows() {
        let positions = positions();
        assert_close(positions.select(&Positions::From(1), 2), &[3.0, 4.0, 5.0, 6.0], 0.0);
        let each = Tensor::from_data([[2, 0], [0, 0]], &Device::flex());
        let expected = [5.0, 6.0, 1.0, 2.0, 1.0, 2.0, 1.0, 2.0];
        assert_close(positions.select(&Positions::Each(each), 2), &expected, 0.0);
    }

    #[test]
    #[should_panic(expected = "position 3 is beyond 3 positions")]
    fn a_place_beyond_the_table_panics() {
        positions().select(&Positions::From(2), 2);
    }

    #[test]
    #[should_panic(expected = "a sequence of 4 tokens is longer than 3 positions")]
    fn a_longer_sequence_panics() {
        positions().forward(Tensor::zeros([1, 4, 2], &Device::flex()));
    }

    /// Of `T5Attention._relative_position_bucket` for 32 buckets and a longest distance of 128, and for 8 and 12.
    #[test]
    fn buckets_of_the_reference() {
        let both = |offset| bucket(offset, 32, 128, Reach::BothSides);
        let past = |offset| bucket(offset, 32, 128, Reach::Past);
        let offsets =
            [-100_000, -128, -91, -90, -64, -63, -16, -15, -8, -7, 0, 1, 7, 8, 15, 16, 90, 91, 1 << 20];
        let expected = [15, 15, 15, 14, 14, 13, 10, 9, 8, 7, 0, 17, 23, 24, 25, 26, 30, 31, 31];
        assert_eq!(offsets.map(both), expected);
        let offsets =
            [-100_000, -128, -127, -100, -91, -64, -46, -45, -32, -31, -23, -16, -15, -1, 0, 1, 128];
        let expected = [31, 31, 31, 30, 29, 26, 24, 23, 21, 21, 18, 16, 15, 1, 0, 0, 0];
        assert_eq!(offsets.map(past), expected);
        let offsets = [-14, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 14];
        let both = offsets.map(|offset| bucket(offset, 8, 12, Reach::BothSides));
        assert_eq!(both, [3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 1, 0, 5, 6, 6, 6, 7, 7]);
        let past = offsets.map(|offset| bucket(offset, 8, 12, Reach::Past));
        assert_eq!(past, [7, 7, 6, 6, 6, 5, 4, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    /// Whatever the table, no distance is outside of it, and longer ones never have a lower bucket.
    #[test]
    fn buckets_grow_and_stay_in_the_table() {
        for (buckets, max_distance) in [(4, 3), (5, 100), (8, 12), (32, 128), (33, 17), (64, 1 << 20)] {
            for reach in [Reach::BothSides, Reach::Past] {
                for sign in [-1, 1] {
                    let distances = (0..200).chain([1_000, 1 << 20, 1 << 40]);
                    let found: Vec<usize> = distances
                        .map(|distance| bucket(sign * distance, buckets, max_distance, reach))
                        .collect();
                    assert!(found.iter().all(|&found| found < buckets), "{buckets} {max_distance} {found:?}");
                    assert!(found[1..].is_sorted(), "{buckets} {max_distance} {found:?}");
                }
            }
        }
    }

    #[test]
    fn the_last_queries_have_the_last_rows() {
        for reach in [Reach::BothSides, Reach::Past] {
            let bias = RelativeBias::new(8, 12, 3, reach, &Device::flex());
            let whole = bias.forward(20, 20);
            assert_eq!(whole.dims(), [1, 3, 20, 20]);
            for queries in [1, 7] {
                let last = whole.clone().narrow(2, 20 - queries, queries);
                assert_close(bias.forward(queries, 20), &floats(last), 0.0);
            }
        }
    }

    /// Head h of bucket b has the number 10 b + h.
    #[test]
    fn a_bias_literal() {
        let table: Vec<f64> =
            (0..4).flat_map(|bucket| [10.0 * bucket as f64, 10.0 * bucket as f64 + 1.0]).collect();
        let bias = RelativeBias {
            weight: Param::from_tensor(tensor([4, 2], &table, &Device::flex())),
            max_distance: 3,
            reach: Reach::Past,
        };
        let first = [0.0, 0.0, 0.0, 10.0, 0.0, 0.0, 20.0, 10.0, 0.0];
        let second = first.map(|value| value + 1.0);
        assert_close(bias.forward(3, 3), &[first, second].concat(), 0.0);
    }
}
