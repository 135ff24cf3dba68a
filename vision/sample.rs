//! Reading a map between its cells. Coordinates are PyTorch's with `align_corners=False`: -1 and 1 are the outer edges of
//! the first and the last cell.

use burn::tensor::activation::relu;
use burn::tensor::{Device, Int, Tensor};

/// The middles of `rows x columns` equal parts of the square from -1 to 1, moved by the affine maps `theta`:
/// `[batch, 2, 3] -> [batch, rows, columns, 2]`, horizontal before vertical (Jaderberg et al. 2015, equation 1; the
/// numbers match `torch.nn.functional.affine_grid`).
pub fn affine_grid(theta: Tensor<3>, [rows, columns]: [usize; 2]) -> Tensor<4> {
    let device = theta.device();
    let [batch, _, _] = theta.dims();
    let middles = |parts: usize| (count(parts, &device) * 2.0 + 1.0) / parts as f64 - 1.0; // [parts]
    let x = middles(columns).reshape([1, columns]).expand([rows, columns]).reshape([rows * columns, 1]);
    let y = middles(rows).reshape([rows, 1]).expand([rows, columns]).reshape([rows * columns, 1]);
    let points = Tensor::cat(vec![x.clone(), y, x.ones_like()], 1); // [rows * columns, 3]
    let points = points.unsqueeze::<3>().expand([batch, rows * columns, 3]);
    points.matmul(theta.swap_dims(1, 2)).reshape([batch, rows, columns, 2])
}

/// A map's values at `points`, bilinear between the middles of its cells and zero beyond them:
/// `[batch, height, width, channels]` and `[batch, points, 2] -> [batch, points, channels]`. The numbers match
/// `torch.nn.functional.grid_sample` with its defaults.
///
/// A point's value is its weights over all cells times their values, so that gradients reach map and points.
pub fn grid_sample(map: Tensor<4>, points: Tensor<3>) -> Tensor<3> {
    let device = map.device();
    let [batch, height, width, channels] = map.dims();
    let [_, n_points, _] = points.dims();
    // a cell counts the more the nearer its middle is, and nothing from a distance of 1 on
    let weights = |axis: usize, cells: usize| {
        let at = ((points.clone().narrow(2, axis, 1) + 1.0) * cells as f64 - 1.0) * 0.5; // [batch, n_points, 1]
        let cell = count(cells, &device).reshape([1, 1, cells]);
        relu(-(at - cell).abs() + 1.0) // [batch, n_points, cells]
    };
    let rows = weights(1, height).unsqueeze_dim::<4>(3);
    let columns = weights(0, width).unsqueeze_dim::<4>(2);
    let weights = (rows * columns).reshape([batch, n_points, height * width]);
    weights.matmul(map.reshape([batch, height * width, channels]))
}

/// `0, 1, 2, ...`: `[length]`.
fn count(length: usize, device: &Device) -> Tensor<1> {
    Tensor::<1, Int>::arange(0..length as i64, device).float()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{TensorData, Tolerance};

    use super::*;

    fn assert_close<const D: usize>(found: Tensor<D>, expected: &[f32]) {
        let found = found.flatten::<1>(0, D - 1).into_data();
        let expected = TensorData::new(expected.to_vec(), [expected.len()]);
        found.assert_approx_eq::<f32>(&expected, Tolerance::absolute(2e-6));
    }

    /// 0 to 11 in three rows.
    fn map(device: &Device) -> Tensor<4> {
        count(12, device).reshape([1, 3, 4, 1])
    }

    /// Of `affine_grid` and `grid_sample` of PyTorch: two rows of three points, stretched, sheared and moved.
    #[test]
    fn literals_of_a_sheared_grid() {
        let device = Device::flex();
        let theta = Tensor::from_data([[[0.5, -0.25, 0.1], [0.25, 0.75, -0.3]]], &device);
        let grid = affine_grid(theta, [2, 3]);
        let expected = [
            -0.10833334,
            -0.8416667,
            0.225,
            -0.675,
            0.55833334,
            -0.5083333,
            -0.35833335,
            -0.09166668,
            -0.025,
            0.07499999,
            0.30833334,
            0.24166667,
        ];
        assert_close(grid.clone(), &expected);
        let expected = [0.9464583, 1.925625, 3.5666668, 4.233333, 5.9, 7.566667];
        assert_close(grid_sample(map(&device), grid.reshape([1, 6, 2])), &expected);
    }

    /// Also of PyTorch: both corners, of whose four neighbours three are outside; the middle; beyond the edge; far away.
    #[test]
    fn what_is_outside_is_zero() {
        let device = Device::flex();
        let points = [[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0], [-1.2, 0.3], [5.0, 0.0], [0.25, -0.5]];
        let points = Tensor::<2>::from_data(points, &device).unsqueeze::<3>();
        assert_close(grid_sample(map(&device), points), &[0.0, 2.75, 5.5, 0.58, 0.0, 3.0]);
    }

    /// The middles of as many parts as there are cells are the cells' middles.
    #[test]
    fn the_identity_reads_every_cell() {
        let device = Device::flex();
        let identity = Tensor::from_data([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]], &device);
        let points = affine_grid(identity, [3, 4]).reshape([1, 12, 2]);
        let expected: Vec<f32> = (0..12).map(|value| value as f32).collect();
        assert_close(grid_sample(map(&device), points), &expected);
    }
}
