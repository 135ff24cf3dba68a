use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Tensor, s};

use super::Ranks;
use crate::cpu::gradient::primitive;
use crate::moe::{Experts, ShadowCost};

/// Which experts are copied to every rank for a pass (He et al. 2022, FasterMoE,
/// <https://doi.org/10.1145/3503221.3508418>, section 4.2): their rows stay where they are, and what their copies learn goes
/// home in the backward pass.
#[derive(Clone, Debug, PartialEq)]
pub enum Shadowing {
    /// These, whatever the load.
    Always(Vec<usize>),
    /// The busiest, as long as that is cheaper. Ranks tell each other their loads in each pass.
    ByCost(ShadowCost),
}

impl Shadowing {
    /// The experts, going up.
    ///
    /// - `loads`: the rows of each expert on all ranks
    pub fn choose(&self, loads: &[usize]) -> Vec<usize> {
        let mut chosen = match self {
            Shadowing::Always(experts) => experts.clone(),
            Shadowing::ByCost(cost) => cost.choose(loads),
        };
        chosen.sort_unstable();
        chosen.dedup();
        chosen
    }

    /// Those of a pass, the same on all ranks.
    ///
    /// - `load`: the rows of each expert on this rank
    pub(super) fn agree(&self, load: &[usize], ranks: &Ranks) -> Vec<usize> {
        let mut loads = vec![0; load.len()];
        if self.is_told() {
            for (at, count) in ranks.all_gather(load).into_iter().enumerate() {
                loads[at % load.len()] += count;
            }
        }
        self.choose(&loads)
    }

    /// Whether ranks have to know each other's loads.
    pub(super) fn is_told(&self) -> bool {
        matches!(self, Shadowing::ByCost(_))
    }
}

/// The experts that are on every rank for a pass.
#[derive(Debug)]
pub(super) struct Shadows {
    /// Among the experts of all ranks, going up.
    pub ids: Vec<usize>,
    pub ranks: Ranks,
}

impl Shadows {
    /// What their owners have, on every rank. A graph of gradients begins at the copies where it begins at `experts`.
    ///
    /// - `experts`: those of this rank
    pub fn copy(&self, experts: &Experts) -> Option<Experts> {
        (!self.ids.is_empty()).then(|| experts.clone().map(&mut Copy(self)))
    }

    /// Adds to the gradients of this rank's experts what their copies on all ranks have.
    ///
    /// - `sums`: of `experts`, those of this rank, in the order of their parameters
    /// - `of_copies`: of the copies
    pub fn bring_home(
        &self,
        experts: &Experts,
        sums: &mut [FloatTensor<Flex>],
        of_copies: Vec<FloatTensor<Flex>>,
    ) {
        experts.visit(&mut Home { shadows: self, gradients: sums.iter_mut().zip(of_copies) });
    }
}

struct Copy<'a>(&'a Shadows);

impl ModuleMapper for Copy<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Shadows { ids, ranks } = self.0;
        param.map(|value| {
            let is_tracked = value.is_tracked();
            let value = value.detach();
            let n_local = value.dims()[0];
            // whose it is not gives another of the same shape
            let copy = |id: &usize| ranks.broadcast(value.clone().narrow(0, id % n_local, 1), id / n_local);
            Tensor::cat(ids.iter().map(copy).collect(), 0).set_require_grad(is_tracked)
        })
    }
}

struct Home<'a, G> {
    shadows: &'a Shadows,
    /// Of a parameter of this rank's experts, and of their copies.
    gradients: G,
}

impl<'a, G: Iterator<Item = (&'a mut FloatTensor<Flex>, FloatTensor<Flex>)>> ModuleVisitor for Home<'_, G> {
    fn visit_float<const D: usize>(&mut self, _: &Param<Tensor<D>>) {
        let Some((sum, of_copies)) = self.gradients.next() else { return };
        let mut own = Tensor::<D>::from_primitive::<Flex>(sum.clone());
        let of_copies = Tensor::<D>::from_primitive::<Flex>(of_copies);
        let n_local = own.dims()[0];
        for (at, id) in self.shadows.ids.iter().enumerate() {
            let of_copy = of_copies.clone().narrow(0, at, 1);
            if let Some(of_copies) = self.shadows.ranks.reduce(of_copy, id / n_local) {
                let local = id % n_local;
                let of_own = own.clone().narrow(0, local, 1);
                own = own.slice_assign(s![local..local + 1], of_own + of_copies);
            }
        }
        *sum = primitive(own);
    }
}
