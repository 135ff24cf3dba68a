//! Bodies for the devices of CubeCL behind [`crate::ops`], where Burn composes several launches: norms, activations with what
//! is around them, rotary embedding, softmax, attention, and sparse experts. They are for inference: where gradients are
//! wanted, tensor operations are composed.
//!
//! They are run without a GPU, and tested so beside those of the CPU, in two ways:
//! - with the feature `wgpu`, through WGSL on Mesa's lavapipe (22.3 does): f32 and f16, without planes' own operations, tensor
//!   cores or bf16, which WGSL does not have. Burn's feature `vulkan`, which compiles to SPIR-V itself, crashed there;
//! - with the feature `cube-cpu`, on CubeCL's own CPU runtime, whose build downloads LLVM: all three types.
//!
//! On NVIDIA GPUs they are compiled for, and not yet measured.
//!
//! CUDA graphs are there in Burn 0.22.1: `graph_prepare`, `graph_start_capture`, `graph_stop_capture` and `graph_replay` of
//! its `Backend`, by `cubecl-cuda` 0.11. (`Device::capture` is something else: it records operations, not launches.) Decoding
//! does not use them. A replay repeats launches with the very numbers they were recorded with, but every token's differ: where
//! the cache is written and how much of it is read, places in the rotary table, and the lists of rows that sparse experts
//! bring from the host. These would have to come from memory of the device, as they do nowhere yet.

pub mod attention;
pub mod moe;
pub mod norm;
pub mod pointwise;
pub mod rope;
pub mod softmax;

mod grouped;
mod rows;
mod together;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::kernel::{into_contiguous, into_contiguous_aligned};
use burn_cubecl::tensor::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Whether a tensor lies on a device of CubeCL, in f32 or in less, and no gradients are wanted.
pub fn is_cube<const D: usize>(x: &Tensor<D>) -> bool {
    matches!(x.device().as_dispatch(), DispatchDevice::Cube(_))
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// Whether a tensor [`is_cube`], and so are those that it is taken with, which are of one type.
pub fn is_cube_with<const D: usize, const E: usize>(x: &Tensor<D>, others: &[&Tensor<E>]) -> bool {
    let mut pairs = others.iter().zip(others.iter().skip(1));
    is_cube(x) && others.iter().all(|other| is_cube(other)) && pairs.all(|(a, b)| a.dtype() == b.dtype())
}

/// Whether a tensor has no values: there is nothing to launch.
fn is_empty<const D: usize>(x: &Tensor<D>) -> bool {
    x.shape().num_elements() == 0
}

/// A tensor as rows along its last axis, as they lie on its device.
fn rows_of<const D: usize>(x: Tensor<D>) -> CubeTensor {
    let width = x.dims()[D - 1];
    let rows = x.shape().num_elements() / width;
    held(x.reshape([rows, width]))
}

/// What `x` became, in its former shape.
fn shaped<const D: usize, const E: usize>(x: CubeTensor, shape: [usize; D]) -> Tensor<D> {
    Tensor::<E>::from_primitive::<Cube>(x).reshape(shape)
}

/// Whether a device of CubeCL computes in such values.
#[cfg(all(test, any(feature = "cube-cpu", feature = "wgpu")))]
pub fn computes_in(device: &burn::tensor::Device, dtype: DType) -> bool {
    let client = held(Tensor::<1>::zeros([1], device)).client;
    client.properties().supports_type(burn::backend::cubecl::dtype_to_elem_type(dtype))
}

/// A tensor as it lies on its device.
///
/// # Panics
/// If it is not [`is_cube`].
fn held<const D: usize>(x: Tensor<D>) -> CubeTensor {
    let x = x.try_into_primitive::<Cube>();
    x.unwrap_or_else(|error| panic!("the tensor is not on a device of CubeCL: {error:?}"))
}

/// A tensor whose rows' values lie side by side.
fn by_rows(x: CubeTensor) -> CubeTensor {
    let lies_so = !x.meta.is_tiled() && x.meta.strides().last() == Some(&1);
    if lies_so { x } else { into_contiguous_aligned(x) }
}

/// A tensor whose values lie side by side, in order.
fn side_by_side(x: CubeTensor) -> CubeTensor {
    let lies_so = !x.meta.is_tiled() && x.is_contiguous();
    if lies_so { x } else { into_contiguous(x) }
}

/// A tensor like `x`, of another shape, before it is written.
fn empty<const D: usize>(x: &CubeTensor, shape: [usize; D]) -> CubeTensor {
    let shape = Shape::from(shape);
    let memory = x.client.empty(shape.num_elements() * x.dtype.size());
    CubeTensor::new_contiguous(x.client.clone(), x.device.clone(), shape, memory, x.dtype)
}

/// How many values of a tensor are read at a time, where runs and steps are of such lengths.
fn width(x: &CubeTensor, lengths: &[usize]) -> usize {
    let size = x.dtype.size();
    let widths = x.client.io_optimized_vector_sizes(size).filter(|width| {
        width * size <= grouped::READ && lengths.iter().all(|length| length.is_multiple_of(*width))
    });
    widths.max().unwrap_or(1)
}

/// A cube for each of so many rows, and more where a device has not as many in one direction: those do nothing.
fn cubes(rows: usize, client: &Client) -> CubeCount {
    calculate_cube_count_elemwise(client, rows, CubeDim::new_1d(1))
}

/// Cubes for so many units, and their units.
fn by_unit(units: usize, client: &Client) -> (CubeCount, CubeDim) {
    let cube = CubeDim::new(client, units);
    (calculate_cube_count_elemwise(client, units, cube), cube)
}

/// What places within all of the tensors are counted in.
fn address_type(tensors: &[&CubeTensor]) -> AddressType {
    tensors.iter().map(|tensor| tensor.required_address_type()).max().unwrap_or_default()
}

/// Whole numbers for a kernel.
fn upload(client: &Client, values: &[u32]) -> BufferArg {
    let memory: Handle = client.create_from_slice(u32::as_bytes(values));
    // SAFETY: so many values have just been put there.
    unsafe { BufferArg::from_raw_parts(memory, values.len()) }
}
