//! Bodies for the devices of CubeCL behind [`crate::ops`].

pub mod moe;

mod grouped;
mod rows;

use burn::backend::DispatchDevice;
use burn::tensor::{DType, Shape, Tensor};
use burn_cubecl::Cube;
use burn_cubecl::kernel::into_contiguous_aligned;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Whether a tensor lies on a device of CubeCL, in f32 or in less, and no gradients are wanted.
pub fn is_cube<const D: usize>(x: &Tensor<D>) -> bool {
    matches!(x.device().as_dispatch(), DispatchDevice::Cube(_))
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
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

/// A tensor like `x`, of another shape, before it is written.
fn empty(x: &CubeTensor, shape: [usize; 2]) -> CubeTensor {
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
