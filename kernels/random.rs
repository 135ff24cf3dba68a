//! Random weights that a seed determines.

use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};

/// An untrained model whose weights are those of this seed, whatever other models are made by this function meanwhile: the
/// backend's generator is one for all threads, and weights are drawn when they are first used.
pub fn seeded<M: Module>(seed: u64, device: &Device, init: impl FnOnce(&Device) -> M) -> M {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    device.seed(seed);
    let model = init(device);
    model.visit(&mut Drawn);
    model
}

/// Uses every parameter once.
struct Drawn;

impl ModuleVisitor for Drawn {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        param.val();
    }
}
