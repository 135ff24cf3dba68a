//! The product of rows with each expert's own matrix, of all experts in one launch.
//!
//! A cube of units makes one tile of what comes out. The rows of a tile are of one expert: a list says of which, and
//! which rows, so that segments may be of any length. Panels of rows and of the expert's matrix come through shared
//! memory, the next ones being read while these are multiplied; sums are kept in registers, in f32.

use burn::backend::cubecl::dtype_to_elem_type;
use burn::tensor::DType;
use burn_cubecl::tensor::CubeTensor;
use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::ir::features::MmaConfig;
use cubecl::ir::{DeviceProperties, ElemType, FloatKind};
use cubecl::prelude::*;

use super::{address_type, by_rows, empty, upload, width};

/// How a cube makes a tile of what comes out.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
pub struct Plan {
    /// Workers of a cube along the rows and along the columns: units, or planes where there are tensor cores.
    pub workers: [usize; 2],
    /// Rows and columns of a worker.
    pub share: [usize; 2],
    /// Units of a worker.
    pub units: usize,
    /// Values of a row that are in shared memory at a time.
    pub depth: usize,
    /// Values between the lines in shared memory, so that they do not lie in the same banks.
    pub gap: usize,
    /// Whether the planes multiply fragments of 16 by 16 by 16.
    pub tensor_cores: bool,
}

/// Rows and columns of what tensor cores multiply at a time.
const FRAGMENT: usize = 16;
/// Bytes of a line of rows in shared memory.
const DEPTH: usize = 64;
/// Bytes that a unit reads at a time.
pub const READ: usize = 16;

impl Plan {
    /// For segments of so many rows each, about, of values of this type, on such a device.
    pub fn new(rows: usize, dtype: DType, device: &DeviceProperties) -> Self {
        let (size, hardware) = (dtype.size(), &device.hardware);
        let value = dtype_to_elem_type(dtype);
        let sums = ElemType::Float(FloatKind::F32);
        let fragment = FRAGMENT as u32;
        let fragments =
            MmaConfig { a_type: value, b_type: value, cd_type: sums, m: fragment, n: fragment, k: fragment };
        let has_planes = hardware.plane_size_min == 32 && hardware.plane_size_max == 32;
        let units = hardware.max_units_per_cube as usize;
        if has_planes && units >= 256 && device.features.matmul.cmma.contains(&fragments) {
            let share = rows.div_ceil(2).next_power_of_two().clamp(FRAGMENT, 64);
            return Self::of([2, 4], [share, 32], 32, size, true);
        }
        let grids = [[16, 16], [8, 8], [2, 2], [1, 2]];
        let workers = grids.into_iter().find(|grid| grid[0] * grid[1] <= units).unwrap_or([1, 1]);
        let share = rows.div_ceil(workers[0]).next_power_of_two().clamp(2, 8);
        Self::of(workers, [share, 8], 1, size, false)
    }

    fn of(workers: [usize; 2], share: [usize; 2], units: usize, size: usize, tensor_cores: bool) -> Self {
        Self { workers, share, units, depth: DEPTH / size, gap: READ / size, tensor_cores }
    }

    /// Rows of a tile.
    fn rows(&self) -> usize {
        self.workers[0] * self.share[0]
    }

    /// Columns of a tile.
    fn columns(&self) -> usize {
        self.workers[1] * self.share[1]
    }

    /// Sums of a unit, where there are no tensor cores, in vectors of `width`.
    fn sums(&self, width: usize) -> usize {
        if self.tensor_cores { 1 } else { self.share[0] * self.share[1] / width }
    }

    /// Fragments of a plane along the rows and along the columns, where there are tensor cores.
    fn fragments(&self) -> [usize; 2] {
        if self.tensor_cores { self.share.map(|length| length / FRAGMENT) } else { [0, 0] }
    }

    fn cube(&self) -> CubeDim {
        CubeDim::new_2d(self.units as u32, (self.workers[0] * self.workers[1]) as u32)
    }

    /// Lines of a matrix in shared memory, of so many values each, `width` of them read at a time.
    fn panel(&self, lines: usize, values: usize, width: usize) -> Panel {
        let units = self.workers[0] * self.workers[1] * self.units;
        Panel { lines, width: values / width, pitch: (values + self.gap) / width, units }
    }
}

/// Lines of a matrix in shared memory. Lengths are in vectors of values.
#[derive(Clone, Copy, Debug, Hash, PartialEq, Eq)]
struct Panel {
    lines: usize,
    /// Of a line.
    width: usize,
    /// From a line to the next.
    pitch: usize,
    /// That read it.
    units: usize,
}

impl Panel {
    /// Vectors that each unit reads.
    fn turns(&self) -> usize {
        (self.lines * self.width).div_ceil(self.units)
    }

    /// Vectors in shared memory, with what is between the lines.
    fn vectors(&self) -> usize {
        self.lines * self.pitch
    }

    /// Whether every unit has a vector in every turn.
    fn is_even(&self) -> bool {
        (self.lines * self.width).is_multiple_of(self.units)
    }
}

/// The product of each row with the matrix of its expert, and its bias: `[rows, d_in] -> [rows, d_out]`.
///
/// - `x`: `[rows, d_in]`, sorted by expert
/// - `weight`: `[n_experts, d_in, d_out]`; where the values of a column lie side by side, as in one whose last two
///   dimensions were swapped, they are read so
/// - `bias`: `[n_experts, d_out]`
/// - `offsets`: where each expert's rows begin, and where the last one's end
pub fn grouped(
    x: CubeTensor,
    weight: CubeTensor,
    bias: Option<CubeTensor>,
    offsets: &[usize],
    plan: Option<Plan>,
) -> CubeTensor {
    let x = by_rows(x);
    let turned = weight.meta.strides()[2] != 1 && weight.meta.strides()[1] == 1;
    let weight = if turned { weight } else { by_rows(weight) };
    let [rows, d_in] = x.meta.shape().dims();
    let [_, _, d_out] = weight.meta.shape().dims();
    let out = empty(&x, [rows, d_out]);

    let lengths = offsets.windows(2).map(|bounds| bounds[1] - bounds[0]).filter(|length| *length > 0);
    let (client, dtype) = (x.client.clone(), x.dtype);
    let plan = plan.unwrap_or_else(|| Plan::new(rows / lengths.count(), dtype, client.properties()));
    let tiles = tiles(offsets, plan.rows());
    let count = CubeCount::Static((tiles.len() / 3) as u32, d_out.div_ceil(plan.columns()) as u32, 1);

    let x_stride = x.meta.strides()[0];
    let strides = weight.meta.strides();
    let (expert_stride, row_stride, column_stride) = (strides[0], strides[1], strides[2]);
    let read_x = width(&x, &[d_in, x_stride]);
    let (stride, read_w) = match turned {
        true => (column_stride, width(&weight, &[d_in, column_stride, expert_stride])),
        false => (row_stride, width(&weight, &[d_out, row_stride, expert_stride])),
    };
    let (read_x, read_w, written) = match turned {
        true => (read_x.min(read_w), read_x.min(read_w), 1),
        false => (read_x, read_w, read_w),
    };
    let address = address_type(&[&x, &weight, &out]);
    // SAFETY: `tiles` are of rows and experts that there are, and what is read and written is within the lengths and strides
    // of the tensors.
    unsafe {
        grouped_kernel::launch_unchecked(
            &client,
            count,
            plan.cube(),
            address,
            read_x,
            read_w,
            written,
            x.into_buffer_arg(),
            weight.into_buffer_arg(),
            bias.map(|bias| by_rows(bias).into_buffer_arg()).into(),
            upload(&client, &tiles),
            out.clone().into_buffer_arg(),
            d_in,
            d_out,
            x_stride,
            stride,
            expert_stride,
            plan,
            turned,
            dtype_to_elem_type(dtype),
        );
    }
    out
}

/// The expert of each tile, its first row, and the end of the expert's rows.
fn tiles(offsets: &[usize], rows: usize) -> Vec<u32> {
    let segments = offsets.windows(2).enumerate();
    let tiles = segments.flat_map(|(expert, bounds)| {
        (bounds[0]..bounds[1]).step_by(rows).map(move |first| [expert, first, bounds[1]])
    });
    tiles.flatten().map(|value| value as u32).collect()
}

#[cube(launch_unchecked, address_type = "dynamic")]
fn grouped_kernel<F: Float, X: Size, W: Size, O: Size>(
    x: &[Vector<F, X>],
    weight: &[Vector<F, W>],
    bias: ComptimeOption<&[Vector<F, O>]>,
    tiles: &[u32],
    out: &mut [Vector<F, O>],
    d_in: usize,
    d_out: usize,
    x_stride: usize,
    stride: usize,
    expert_stride: usize,
    #[comptime] plan: Plan,
    #[comptime] turned: bool,
    #[define(F)] _dtype: ElemType,
) {
    let of_x = X::value();
    let of_w = W::value();
    let of_out = O::value();
    let tile = CUBE_POS_X as usize * 3;
    let expert = tiles[tile] as usize;
    let first = tiles[tile + 1] as usize;
    let end = tiles[tile + 2] as usize;
    let column = CUBE_POS_Y as usize * comptime!(plan.columns());
    let down = UNIT_POS_Y as usize / comptime!(plan.workers[1]);
    let across = UNIT_POS_Y as usize % comptime!(plan.workers[1]);

    let rows = comptime!(plan.panel(plan.rows(), plan.depth, of_x));
    let matrix = comptime!(match turned {
        true => plan.panel(plan.columns(), plan.depth, of_w),
        false => plan.panel(plan.depth, plan.columns(), of_w),
    });
    let mut shared_rows = Shared::<[Vector<F, X>]>::new_aligned_slice(comptime!(rows.vectors()), ALIGNMENT);
    let mut shared_matrix =
        Shared::<[Vector<F, W>]>::new_aligned_slice(comptime!(matrix.vectors()), ALIGNMENT);
    let mut next_rows = Array::<Vector<F, X>>::new(comptime!(rows.turns()));
    let mut next_matrix = Array::<Vector<F, W>>::new(comptime!(matrix.turns()));
    let in_x = Lines { start: 0, stride: x_stride / of_x, lines: end, width: d_in / of_x };
    let in_weight = if comptime!(turned) {
        Lines {
            start: expert * expert_stride / of_w,
            stride: stride / of_w,
            lines: d_out,
            width: d_in / of_w,
        }
    } else {
        Lines {
            start: expert * expert_stride / of_w,
            stride: stride / of_w,
            lines: d_in,
            width: d_out / of_w,
        }
    };

    let mut sums = Array::<Vector<f32, O>>::new(comptime!(plan.sums(of_out)));
    #[unroll]
    for at in 0..comptime!(plan.sums(of_out)) {
        sums[at] = Vector::new(0.0);
    }
    let mut fragments = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..comptime!(plan.fragments()[0] * plan.fragments()[1]) {
        fragments.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            FRAGMENT,
            FRAGMENT,
            FRAGMENT,
            MatrixLayout::Undefined,
            0.0,
        ));
    }

    fetch(x, &in_x, first, 0, &mut next_rows, rows);
    if comptime!(turned) {
        fetch(weight, &in_weight, column, 0, &mut next_matrix, matrix);
    } else {
        fetch(weight, &in_weight, 0, column / of_w, &mut next_matrix, matrix);
    }
    let depth = comptime!(plan.depth);
    for next in range_stepped(depth, d_in + depth, depth) {
        sync_cube();
        put(&next_rows, &mut shared_rows, rows);
        put(&next_matrix, &mut shared_matrix, matrix);
        sync_cube();
        fetch(x, &in_x, first, next / of_x, &mut next_rows, rows);
        if comptime!(turned) {
            fetch(weight, &in_weight, column, next / of_w, &mut next_matrix, matrix);
        } else {
            fetch(weight, &in_weight, next, column / of_w, &mut next_matrix, matrix);
        }
        if comptime!(plan.tensor_cores) {
            multiply_fragments::<F, X, W>(
                &shared_rows,
                &shared_matrix,
                &fragments,
                down,
                across,
                plan,
                [rows, matrix],
                turned,
            );
        } else {
            multiply_values::<F, X, W, O>(
                &shared_rows,
                &shared_matrix,
                &mut sums,
                down,
                across,
                plan,
                [rows, matrix],
                turned,
            );
        }
    }

    if comptime!(plan.tensor_cores) {
        let [high, wide] = comptime!(plan.fragments());
        let size = comptime!(FRAGMENT * FRAGMENT);
        let planes = comptime!(plan.workers[0] * plan.workers[1]);
        let mut shared = Shared::<[f32]>::new_aligned_slice(comptime!(size * planes), ALIGNMENT);
        let own = UNIT_POS_Y as usize * size;
        #[unroll]
        for at in 0..comptime!(high * wide) {
            let row = first + down * comptime!(plan.share[0]) + comptime!(at / wide * FRAGMENT);
            let column = column + across * comptime!(plan.share[1]) + comptime!(at % wide * FRAGMENT);
            let mine = &mut shared[own..own + size];
            cmma::store(mine, &fragments[at], FRAGMENT as u32, MatrixLayout::RowMajor);
            sync_plane();
            #[unroll]
            for turn in 0..comptime!(size / of_out / plan.units) {
                let place = (turn * comptime!(plan.units) + UNIT_POS_X as usize) * of_out;
                let mut sum = Vector::<f32, O>::new(0.0);
                #[unroll]
                for value in 0..of_out {
                    sum.insert(value, shared[own + place + value]);
                }
                write(sum, &bias, out, expert, row + place / FRAGMENT, end, column + place % FRAGMENT, d_out);
            }
            sync_plane();
        }
    } else {
        let wide = comptime!(plan.share[1] / of_out);
        #[unroll]
        for at in 0..comptime!(plan.sums(of_out)) {
            let row = first + down * comptime!(plan.share[0]) + comptime!(at / wide);
            let vector = across + comptime!(at % wide * plan.workers[1]);
            write(sums[at], &bias, out, expert, row, end, column + vector * of_out, d_out);
        }
    }
}

/// Bytes between places where a plane may read a fragment.
const ALIGNMENT: usize = 32;

/// Lines in memory. Lengths are in vectors of values.
#[derive(CubeType)]
struct Lines {
    start: usize,
    stride: usize,
    lines: usize,
    width: usize,
}

/// Reads a panel whose corner is at `line` and `vector`; zeros where nothing lies.
#[cube]
fn fetch<F: Float, N: Size>(
    memory: &[Vector<F, N>],
    place: &Lines,
    line: usize,
    vector: usize,
    into: &mut Array<Vector<F, N>>,
    #[comptime] panel: Panel,
) {
    #[unroll]
    for turn in 0..comptime!(panel.turns()) {
        let at = comptime!(turn * panel.units) + UNIT_POS as usize;
        let line = line + at / panel.width;
        let vector = vector + at % panel.width;
        let mut value = Vector::new(F::from_int(0));
        if line < place.lines && vector < place.width {
            value = memory[place.start + line * place.stride + vector];
        }
        into[turn] = value;
    }
}

/// Writes what `fetch` has read.
#[cube]
fn put<F: Float, N: Size>(
    values: &Array<Vector<F, N>>,
    shared: &mut Shared<[Vector<F, N>]>,
    #[comptime] panel: Panel,
) {
    #[unroll]
    for turn in 0..comptime!(panel.turns()) {
        let at = comptime!(turn * panel.units) + UNIT_POS as usize;
        if comptime!(panel.is_even()) || at < comptime!(panel.lines * panel.width) {
            shared[at / panel.width * panel.pitch + at % panel.width] = values[turn];
        }
    }
}

/// Adds the products of a unit's rows and columns. Its rows lie side by side; its columns, in vectors of `O`, lie as far
/// apart as there are units, so that the units of a row read side by side.
#[cube]
fn multiply_values<F: Float, X: Size, W: Size, O: Size>(
    rows: &Shared<[Vector<F, X>]>,
    matrix: &Shared<[Vector<F, W>]>,
    sums: &mut Array<Vector<f32, O>>,
    down: usize,
    across: usize,
    #[comptime] plan: Plan,
    #[comptime] panels: [Panel; 2],
    #[comptime] turned: bool,
) {
    let of_out = O::value();
    let [high, wide] = comptime!([plan.share[0], plan.share[1] / of_out]);
    let [row_pitch, pitch] = comptime!(panels.map(|panel| panel.pitch));
    let of_x = X::value();
    let apart = comptime!(plan.workers[1]);
    let mut held = Array::<Vector<F, X>>::new(high);
    for at in 0..comptime!(panels[0].width) {
        #[unroll]
        for row in 0..high {
            held[row] = rows[(down * high + row) * row_pitch + at];
        }
        if comptime!(turned) {
            #[unroll]
            for column in 0..wide {
                let right = matrix[(across + column * apart) * pitch + at];
                #[unroll]
                for value in 0..of_x {
                    let right = Vector::<f32, O>::new(f32::cast_from(right.extract(value)));
                    #[unroll]
                    for row in 0..high {
                        let left = Vector::<f32, O>::new(f32::cast_from(held[row].extract(value)));
                        sums[row * wide + column] = fma(left, right, sums[row * wide + column]);
                    }
                }
            }
        } else {
            #[unroll]
            for value in 0..of_x {
                #[unroll]
                for column in 0..wide {
                    let right = matrix[(at * of_x + value) * pitch + across + column * apart];
                    let right = Vector::<f32, O>::cast_from(right);
                    #[unroll]
                    for row in 0..high {
                        let left = Vector::<f32, O>::new(f32::cast_from(held[row].extract(value)));
                        sums[row * wide + column] = fma(left, right, sums[row * wide + column]);
                    }
                }
            }
        }
    }
}

/// Adds the products of a plane's rows and columns, which lie side by side.
#[cube]
fn multiply_fragments<F: Float, X: Size, W: Size>(
    rows: &Shared<[Vector<F, X>]>,
    matrix: &Shared<[Vector<F, W>]>,
    sums: &Sequence<Matrix<f32>>,
    down: usize,
    across: usize,
    #[comptime] plan: Plan,
    #[comptime] panels: [Panel; 2],
    #[comptime] turned: bool,
) {
    let [high, wide] = comptime!(plan.fragments());
    let [row_pitch, pitch] = comptime!(panels.map(|panel| panel.pitch));
    let of_x = X::value();
    let of_w = W::value();
    let layout = comptime!(if turned { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor });
    #[unroll]
    for step in 0..comptime!(plan.depth / FRAGMENT) {
        let mut rights = Sequence::<Matrix<Vector<F, W>>>::new();
        #[unroll]
        for at in 0..wide {
            let column = across * comptime!(plan.share[1]) + comptime!(at * FRAGMENT);
            let start = if comptime!(turned) {
                column * pitch + comptime!(step * FRAGMENT / of_w)
            } else {
                comptime!(step * FRAGMENT * pitch) + column / of_w
            };
            rights.push(Matrix::<Vector<F, W>>::from_slice(
                MatrixIdent::B,
                FRAGMENT,
                FRAGMENT,
                FRAGMENT,
                layout,
                &matrix[start..comptime!(panels[1].vectors())],
                comptime!((pitch * of_w) as u32),
            ));
        }
        #[unroll]
        for row in 0..high {
            let line = down * comptime!(plan.share[0]) + comptime!(row * FRAGMENT);
            let start = line * row_pitch + comptime!(step * FRAGMENT / of_x);
            let left = Matrix::<Vector<F, X>>::from_slice(
                MatrixIdent::A,
                FRAGMENT,
                FRAGMENT,
                FRAGMENT,
                MatrixLayout::RowMajor,
                &rows[start..comptime!(panels[0].vectors())],
                comptime!((row_pitch * of_x) as u32),
            );
            #[unroll]
            for at in 0..wide {
                let sum = &sums[row * wide + at];
                cmma::execute(&left, &rights[at], sum, sum);
            }
        }
    }
}

/// Writes sums of a row, with the biases of their columns, where there is such a row of the expert and such columns.
#[cube]
fn write<F: Float, O: Size>(
    sum: Vector<f32, O>,
    bias: &ComptimeOption<&[Vector<F, O>]>,
    out: &mut [Vector<F, O>],
    expert: usize,
    row: usize,
    end: usize,
    column: usize,
    d_out: usize,
) {
    if row < end && column < d_out {
        let at = (expert * d_out + column) / O::value();
        let bias: ComptimeOption<Vector<f32, O>> = bias.as_ref().map(|bias| Vector::cast_from(bias[at]));
        let sum = sum + bias.unwrap_or(Vector::new(0.0));
        out[(row * d_out + column) / O::value()] = Vector::cast_from(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_are_of_one_expert_each() {
        assert_eq!(tiles(&[0, 3, 3, 8], 2), [[0, 0, 3], [0, 2, 3], [2, 3, 8], [2, 5, 8], [2, 7, 8]].concat());
        assert!(tiles(&[0, 0], 2).is_empty());
    }
}

#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
mod device_tests {
    use super::super::held;
    use super::*;
    use crate::testing::{assert_rounded, cube_device, cube_types, floats, noise};
    use burn::tensor::{Device, Tensor};
    use burn_cubecl::Cube;
    use cubecl::client::Client;

    /// Each row through the matrix of its expert, in f64.
    fn one_by_one(
        x: &Tensor<2>,
        weight: &Tensor<3>,
        bias: Option<&Tensor<2>>,
        offsets: &[usize],
    ) -> Vec<f64> {
        let ([_, d_in], [_, _, d_out]) = (x.dims(), weight.dims());
        let (x, weight, bias) = (floats(x.clone()), floats(weight.clone()), bias.cloned().map(floats));
        let mut out = Vec::with_capacity(offsets[offsets.len() - 1] * d_out);
        for (expert, bounds) in offsets.windows(2).enumerate() {
            for (row, column) in
                (bounds[0]..bounds[1]).flat_map(|row| (0..d_out).map(move |column| (row, column)))
            {
                let products =
                    (0..d_in).map(|at| x[row * d_in + at] * weight[(expert * d_in + at) * d_out + column]);
                out.push(
                    products.sum::<f64>() + bias.as_ref().map_or(0.0, |bias| bias[expert * d_out + column]),
                );
            }
        }
        out
    }

    /// Segments of so many rows.
    fn offsets(lengths: &[usize]) -> Vec<usize> {
        let ends = lengths.iter().scan(0, |end, length| {
            *end += length;
            Some(*end)
        });
        std::iter::once(0).chain(ends).collect()
    }

    fn client() -> Client {
        held(Tensor::<1>::zeros([1], &cube_device())).client
    }

    /// Plans of so few units as a CPU has, and the plan that is chosen.
    fn plans(dtype: DType) -> Vec<Option<Plan>> {
        let units = client().properties().hardware.max_units_per_cube;
        let plans = [([1, 1], [2, 8]), ([1, 2], [4, 8]), ([2, 1], [8, 16])];
        let plans = plans.map(|(workers, share)| Plan::of(workers, share, 1, dtype.size(), false));
        let plans = plans.into_iter().filter(|plan| plan.cube().num_elems() <= units);
        plans.map(Some).chain([None]).collect()
    }

    /// A GPU has 48 KiB of shared memory for a cube, and registers for 64 sums of a unit, or 8 fragments of a plane.
    #[test]
    fn plans_fit_a_gpu() {
        let mut device = client().properties().clone();
        device.hardware.max_units_per_cube = 1024;
        for dtype in [DType::F32, DType::BF16] {
            for (rows, expected) in [(1, 32), (20, 32), (33, 64), (64, 64), (100, 128), (5000, 128)] {
                let plan = Plan::new(rows, dtype, &device);
                assert!(!plan.tensor_cores && plan.sums(1) <= 64, "{plan:?}");
                assert_eq!(
                    [plan.rows(), plan.columns(), plan.cube().num_elems() as usize],
                    [expected, 128, 256]
                );
                for matrix in
                    [plan.panel(plan.depth, plan.columns(), 1), plan.panel(plan.columns(), plan.depth, 1)]
                {
                    let values = plan.panel(plan.rows(), plan.depth, 1).vectors() + matrix.vectors();
                    assert!(values * dtype.size() <= 48 << 10, "{plan:?}");
                }
            }
        }
        (device.hardware.plane_size_min, device.hardware.plane_size_max) = (32, 32);
        let [value, sum] = [FloatKind::BF16, FloatKind::F32].map(ElemType::Float);
        device.features.matmul.cmma.insert(MmaConfig {
            a_type: value,
            b_type: value,
            cd_type: sum,
            m: 16,
            n: 16,
            k: 16,
        });
        assert!(!Plan::new(512, DType::F32, &device).tensor_cores);
        for (rows, expected) in [(1, 32), (33, 64), (64, 64), (65, 128), (5000, 128)] {
            let plan = Plan::new(rows, DType::BF16, &device);
            assert!(plan.tensor_cores && plan.fragments().iter().product::<usize>() <= 8, "{plan:?}");
            assert_eq!([plan.rows(), plan.columns(), plan.cube().num_elems() as usize], [expected, 128, 256]);
        }
    }

    /// Widths that are and are not multiples of what is read at a time, one row, no rows, rows of many tiles; weights as they
    /// are and turned, with and without biases. Each is a kernel of its own: not every shape is tried with every plan.
    #[test]
    fn products_are_every_row_through_its_expert() {
        let shapes = [
            (&[5, 0, 17, 1][..], 32, 24),
            (&[3, 9], 33, 40),
            (&[0, 0, 4], 40, 7),
            (&[1], 1, 1),
            (&[2, 2, 2, 2, 2, 2, 2, 2, 0, 1, 0, 3], 20, 18),
            (&[70], 100, 9),
        ];
        let cases =
            shapes.into_iter().flat_map(|shape| cube_types().into_iter().map(move |dtype| (shape, dtype)));
        for (at, ((lengths, d_in, d_out), dtype)) in cases.enumerate() {
            let (offsets, seed) = (offsets(lengths), 10 * at as u64);
            let x = noise([offsets[lengths.len()], d_in], seed, &Device::flex()).cast(dtype);
            let weight = noise([lengths.len(), d_in, d_out], seed + 1, &Device::flex()).cast(dtype);
            let bias = noise([lengths.len(), d_out], seed + 2, &Device::flex()).cast(dtype);
            let plans = plans(dtype);
            for turn in 0..4 {
                let (is_turned, is_biased) = (turn % 2 == 1, (turn + at) % 4 < 2);
                let bias = is_biased.then_some(&bias);
                let expected = one_by_one(&x, &weight, bias, &offsets);
                let device = cube_device();
                let weight = match is_turned {
                    true => weight.clone().swap_dims(1, 2).to_device(&device).swap_dims(1, 2),
                    false => weight.clone().to_device(&device),
                };
                let bias = bias.map(|bias| held(bias.clone().to_device(&device)));
                let plan = plans[(turn + at / 3) % plans.len()];
                let found = grouped(held(x.clone().to_device(&device)), held(weight), bias, &offsets, plan);
                assert_rounded(Tensor::<2>::from_primitive::<Cube>(found), &expected, 1e-5);
            }
        }
    }
}
