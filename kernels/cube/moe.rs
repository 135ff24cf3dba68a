//! Rows of experts: brought into their order, through their projections, and summed up.

use burn::tensor::{DType, Tensor};
use burn_cubecl::Cube;

use super::{grouped, held, rows};

/// `out[row] = x[from[row]]`.
pub fn gather(x: Tensor<2>, from: &[u32]) -> Tensor<2> {
    Tensor::from_primitive::<Cube>(rows::gather(held(x), from))
}

/// The product of each row with the matrix of its expert, and its bias.
///
/// - `offsets`: where each expert's rows begin, and where the last one's end
pub fn grouped_linear(
    x: Tensor<2>,
    weight: Tensor<3>,
    bias: Option<Tensor<2>>,
    offsets: &[usize],
) -> Tensor<2> {
    let out = grouped::grouped(held(x), held(weight), bias.map(held), offsets, None);
    Tensor::from_primitive::<Cube>(out)
}

/// `out[token]` is the sum of `weights[token][choice] * rows[places[token][choice]]` over the choices that have a place.
pub fn combine(rows: Tensor<2>, weights: Tensor<2>, places: &[Option<usize>]) -> Tensor<2> {
    let places: Vec<u32> = places.iter().map(|place| place.map_or(u32::MAX, |place| place as u32)).collect();
    let out = self::rows::combine(held(rows), held(weights.cast(DType::F32)), &places);
    Tensor::from_primitive::<Cube>(out)
}
