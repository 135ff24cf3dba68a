//! Where to compute.

use burn::tensor::Device;

use crate::error::Error;

/// The device of a name: `cpu`, `cuda` or `cuda:N`.
///
/// # Errors
/// If the name is another, the build has no CUDA, or the machine has no such device.
pub fn choose(name: &str) -> Result<Device, Error> {
    let wrong = || Error::Device(format!("`{name}` is no device; known: cpu, cuda, cuda:N"));
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::flex()),
        None if name == "cuda" => cuda(0),
        Some(("cuda", index)) => cuda(index.parse().map_err(|_| wrong())?),
        _ => Err(wrong()),
    }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize) -> Result<Device, Error> {
    use burn::tensor::DeviceType;

    // The first operation on a device that is not there panics, so ask before.
    let found = Device::enumerate(DeviceType::Cuda).into_vec().len();
    if index < found {
        Ok(Device::cuda(index))
    } else {
        Err(Error::Device(match found {
            0 => "no CUDA device: the driver was not found or sees no GPU (`nvidia-smi` tells)".into(),
            found => {
                format!("cuda:{index}: this machine has {found} CUDA devices, cuda:0 to cuda:{}", found - 1)
            }
        }))
    }
}

#[cfg(not(feature = "cuda"))]
fn cuda(_index: usize) -> Result<Device, Error> {
    Err(Error::Device("this build has no CUDA: build it with `cargo build --release --features cuda`".into()))
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn names() {
        assert!(choose("cpu").is_ok());
        for name in ["gpu", "cuda:x", "cuda:", "cpu:0", ""] {
            let message = choose(name).unwrap_err().to_string();
            assert!(message.contains("known: cpu, cuda, cuda:N"), "{message}");
        }
    }
}
