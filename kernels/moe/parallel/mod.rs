//! Experts spread over ranks: threads of this process ([`threads`]), or processes that MPI started (`mpi`, behind the feature
//! of this name).
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use volary_kernels::moe::gate::NaiveGate;
//! use volary_kernels::moe::parallel::{ParallelMoe, threads};
//! use volary_kernels::moe::{Gate, MoeConfig, Noise, Phase};
//! use volary_kernels::ops::Activation;
//! use volary_kernels::random::seeded;
//!
//! let device = Device::flex();
//! let whole = seeded(7, &device, |device| {
//!     MoeConfig::new(4, 8, 16).init(Gate::Naive(NaiveGate::new(8, 4, 2, device)), Activation::Gelu, device)
//! });
//! let outputs = threads::run(2, |ranks| {
//!     let layer = ParallelMoe::share_of(&whole, &ranks); // two of the four experts
//!     let x = Tensor::<2>::ones([3 + ranks.rank(), 8], &device); // this rank's tokens
//!     layer.forward(x, Phase::Eval, &mut Noise::Seeded(1)).0.dims()
//! });
//! assert_eq!(outputs, [[3, 8], [4, 8]]);
//! ```

mod collectives;
mod groups;
mod journey;
mod layer;
#[cfg(feature = "mpi")]
pub mod mpi;
mod ranks;
mod remote;
mod route;
mod shadows;
#[cfg(test)]
mod tests;
pub mod threads;
mod traffic;

pub use collectives::{Collectives, Pending};
pub use groups::Groups;
pub use layer::ParallelMoe;
pub use ranks::Ranks;
pub use shadows::Shadowing;
pub use traffic::{LayerTraffic, Traffic};
