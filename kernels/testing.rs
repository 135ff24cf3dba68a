//! Helpers of the tests: host values in, host values out, and gradients by finite differences.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// A tensor of these values in f32.
pub fn tensor<const D: usize>(shape: [usize; D], values: &[f64], device: &Device) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), (device, DType::F32))
}

/// Values of a tensor in order.
pub fn floats<const D: usize>(x: Tensor<D>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

/// `count` values in `-1..1`, exact in f32.
pub fn random(count: usize, rng: &mut fastrand::Rng) -> Vec<f64> {
    (0..count).map(|_| f64::from(rng.f32() * 2.0 - 1.0)).collect()
}

/// A random tensor in `-1..1`.
pub fn noise<const D: usize>(shape: [usize; D], seed: u64, device: &Device) -> Tensor<D> {
    tensor(shape, &random(shape.iter().product(), &mut fastrand::Rng::with_seed(seed)), device)
}

/// Every value is within `tolerance` of the expected one.
#[track_caller]
pub fn assert_close<const D: usize>(found: Tensor<D>, expected: &[f64], tolerance: f64) {
    let shape = found.dims();
    let found = floats(found);
    assert_eq!(found.len(), expected.len(), "number of values of {shape:?}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(error <= tolerance, "value {index} of {shape:?}: found {found}, expected {expected}");
    }
}

/// Every value is the expected one in the tensor's type, or one next to it where the sum was off by no more than `tolerance`.
#[cfg(any(feature = "cube-cpu", feature = "wgpu"))]
#[track_caller]
pub fn assert_rounded<const D: usize>(found: Tensor<D>, expected: &[f64], tolerance: f64) {
    let part = match found.dtype() {
        DType::BF16 => 1.0 / 256.0,
        DType::F16 => 1.0 / 2048.0,
        _ => 0.0,
    };
    let found = floats(found);
    assert_eq!(found.len(), expected.len());
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (found - expected).abs();
        assert!(
            error <= tolerance + part * expected.abs(),
            "value {index}: found {found}, expected {expected}"
        );
    }
}

/// The device that bodies of CubeCL are tested on.
#[cfg(any(feature = "cube-cpu", feature = "wgpu"))]
pub fn cube_device() -> Device {
    #[cfg(feature = "wgpu")]
    return Device::wgpu(burn::tensor::DeviceKind::DefaultDevice);
    #[cfg(not(feature = "wgpu"))]
    Device::cpu()
}

/// The types that [`cube_device`] computes in: WGSL has no bf16, and f16 only where the driver has it.
#[cfg(any(feature = "cube-cpu", feature = "wgpu"))]
pub fn cube_types() -> Vec<DType> {
    let types = [DType::F32, DType::F16, DType::BF16];
    types.into_iter().filter(|dtype| crate::cube::computes_in(&cube_device(), *dtype)).collect()
}

/// A tensor on [`cube_device`]: as it is, as a part of longer rows, and with its first two axes turned.
#[cfg(any(feature = "cube-cpu", feature = "wgpu"))]
pub fn on_cube<const D: usize>(x: &Tensor<D>) -> [Tensor<D>; 3] {
    let width = x.dims()[D - 1];
    let there = x.clone().to_device(&cube_device());
    let part = Tensor::cat(vec![there.clone(), there.clone()], D - 1).narrow(D - 1, 0, width);
    let turned = x.clone().swap_dims(0, 1).to_device(&cube_device()).swap_dims(0, 1);
    [there, part, turned]
}

/// The gradient of a random projection of `f` at `at` is finite and equals central differences.
#[track_caller]
pub fn assert_gradient<const D: usize, const E: usize>(
    f: impl Fn(Tensor<D>) -> Tensor<E>,
    shape: [usize; D],
    at: &[f64],
) {
    const STEP: f64 = 1.0 / 64.0;
    let device = Device::flex().autodiff();
    let x = tensor(shape, at, &device).require_grad();
    let y = f(x.clone());
    let weights = random(y.dims().iter().product(), &mut fastrand::Rng::with_seed(7));
    let project = |y: Tensor<E>| floats(y).iter().zip(&weights).map(|(y, weight)| y * weight).sum::<f64>();
    let gradients = (y.clone() * tensor(y.dims(), &weights, &device)).sum().backward();
    let found = floats(x.grad(&gradients).expect("x takes part in f"));
    for index in 0..at.len() {
        let moved = |step: f64| {
            let mut at = at.to_vec();
            at[index] += step;
            project(f(tensor(shape, &at, &device)))
        };
        let expected = (moved(STEP) - moved(-STEP)) / (2.0 * STEP);
        let error = (found[index] - expected).abs();
        assert!(
            error <= 2e-3 + 2e-3 * expected.abs(),
            "derivative {index} of {shape:?}: found {}, expected {expected}",
            found[index]
        );
    }
}
