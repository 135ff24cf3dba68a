use burn::module::{Module, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor};

use super::Ranks;

/// Ranks in groups of two kinds: those that share the experts of a layer, and those that have the same experts and other
/// data. Ranks `0..n` share a set of experts, ranks `n..2 n` the next one.
#[derive(Clone, Debug)]
pub struct Groups {
    /// All ranks.
    pub world: Ranks,
    /// Those that have the other experts: for [`super::ParallelMoe`].
    pub experts: Ranks,
    /// Those that have the same experts.
    pub data: Ranks,
}

impl Groups {
    /// - `n`: how many ranks share a set of experts
    ///
    /// # Panics
    /// If `n` does not divide the ranks, or another rank has ended.
    pub fn new(world: &Ranks, n: usize) -> Self {
        let (rank, size) = (world.rank(), world.size());
        assert!(n > 0 && size.is_multiple_of(n), "{size} ranks are not in groups of {n}");
        Self { world: world.clone(), experts: world.split(rank / n), data: world.split(rank % n) }
    }

    /// Sums gradients over the ranks that have the same parameters: over those that have the same experts for what is under
    /// the `experts` of a [`super::ParallelMoe`], over all for everything else. They are then the gradients of the sum of all
    /// ranks' losses: for a mean, divide losses by the ranks.
    ///
    /// # Panics
    /// If ranks give different modules, or another rank has ended.
    pub fn reduce<M: Module>(&self, module: &M, gradients: &mut Gradients) {
        module.visit(&mut Reduce { groups: self, gradients, inside: 0 });
    }
}

struct Reduce<'a> {
    groups: &'a Groups,
    gradients: &'a mut Gradients,
    /// How many layers' experts this is in: one or none.
    inside: usize,
}

/// Where a [`super::ParallelMoe`] has what is different on each rank.
const EXPERTS: (&str, &str) = ("experts", "Struct:ParallelMoe");

impl ModuleVisitor for Reduce<'_> {
    fn enter_module(&mut self, name: &str, container: &str) {
        self.inside += usize::from((name, container) == EXPERTS);
    }

    fn exit_module(&mut self, name: &str, container: &str) {
        self.inside -= usize::from((name, container) == EXPERTS);
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let ranks = if self.inside > 0 { &self.groups.data } else { &self.groups.world };
        let value = param.val();
        if ranks.size() == 1 || !value.is_require_grad() {
            return;
        }
        let gradient = value.grad(self.gradients).unwrap_or_else(|| value.clone().inner().zeros_like());
        value.grad_replace(self.gradients, ranks.all_reduce(gradient));
    }
}
