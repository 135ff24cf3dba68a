//! Gates, one file each.

mod base;
mod dc;
mod faster;
mod gshard;
mod k_top_1;
mod naive;
mod noisy;
mod swipe;
mod switch;
mod zero;

pub use base::BaseGate;
pub use dc::DcGate;
pub use faster::{FasterGate, Node};
pub use gshard::GShardGate;
pub use k_top_1::{Capacity, KTop1Gate};
pub use naive::NaiveGate;
pub use noisy::NoisyGate;
pub use swipe::{Swipe, SwipeGate, swipe};
pub use switch::SwitchGate;
pub use zero::ZeroGate;

use burn::module::Module;
use burn::tensor::Tensor;

use super::{Noise, Phase, Routing};

/// What routes tokens, any of them.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one for a layer")]
pub enum Gate {
    /// The best of a projection.
    Naive(NaiveGate),
    /// The best after learned noise.
    Noisy(NoisyGate),
    /// Two of limited capacity, the second by chance.
    GShard(GShardGate),
    /// One of limited capacity.
    Switch(SwitchGate),
    /// Moved to workers that have room.
    Swipe(SwipeGate),
    /// As GShard, with the capacity of all workers together.
    Dc(DcGate),
    /// Two, of which few are far away.
    Faster(FasterGate),
    /// An equal share for each expert.
    Base(BaseGate),
    /// One in each of several groups.
    KTop1(KTop1Gate),
    /// Always the first.
    Zero(ZeroGate),
}

impl Gate {
    /// `[tokens, d_model]` to where they go. Gates that draw nothing leave `noise` alone.
    ///
    /// # Panics
    /// If the noise that was given does not fit.
    pub fn route(&self, x: Tensor<2>, phase: Phase, noise: &mut Noise) -> Routing {
        match self {
            Gate::Naive(gate) => gate.route(x),
            Gate::Noisy(gate) => gate.route(x, phase, noise),
            Gate::GShard(gate) => gate.route(x, phase, noise),
            Gate::Switch(gate) => gate.route(x, phase, noise),
            Gate::Swipe(gate) => gate.route(x, phase),
            Gate::Dc(gate) => gate.route(x, phase, noise),
            Gate::Faster(gate) => gate.route(x),
            Gate::Base(gate) => gate.route(x, phase),
            Gate::KTop1(gate) => gate.route(x),
            Gate::Zero(gate) => gate.route(x),
        }
    }
}
