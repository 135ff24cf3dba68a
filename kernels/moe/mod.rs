//! Mixtures of experts (Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>): a gate says which of many MLPs a token
//! goes through.
//!
//! Gates return a [`Routing`] and keep nothing. Their semantics are those of FastMoE
//! (<https://github.com/laekov/fastmoe>, He et al. 2021, <https://arxiv.org/abs/2103.13262>) where it has them; where its
//! kernels leave an order open, who comes first is served first.

mod assignment;
mod balance;
mod experts;
pub mod gate;
mod layer;
mod noise;
#[cfg(feature = "parallel")]
pub mod parallel;
mod routing;
mod shadow;

pub use assignment::{auction, best_assignment};
pub use balance::{Balance, cv_squared, gshard_loss, switch_loss, z_loss};
pub use experts::{ExpertLinear, ExpertMlp, ExpertMlpConfig, Experts, GatedExpertMlp};
pub use gate::Gate;
pub use layer::{Moe, MoeConfig, mix};
pub use noise::Noise;
pub use routing::{Choices, Phase, Routing};
pub use shadow::{Exchange, Placement, ShadowCost};

#[cfg(test)]
mod testing;
