//! Random weights that a seed determines.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::{Mutex, PoisonError};

use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Device, Tensor};

/// An untrained model whose weights are those of this seed, whatever else is drawn meanwhile.
///
/// The backend's generator is one for all threads, and weights are drawn when they are first used. Models that are made by
/// this function wait for each other; against what others draw, a model is made until it came out the same twice in a row.
pub fn seeded<M: Module>(seed: u64, device: &Device, init: impl Fn(&Device) -> M) -> M {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let _turn = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    let make = || {
        device.seed(seed);
        let model = init(device);
        let mut drawn = Drawn(DefaultHasher::new());
        model.visit(&mut drawn);
        (model, drawn.0.finish())
    };
    let (_, mut before) = make();
    loop {
        let (model, drawn) = make();
        if drawn == before {
            return model;
        }
        before = drawn;
    }
}

/// Uses every parameter, and hashes what it is.
struct Drawn(DefaultHasher);

impl ModuleVisitor for Drawn {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        for value in param.val().into_data().convert::<f32>().iter::<f32>() {
            value.to_bits().hash(&mut self.0);
        }
    }
}
