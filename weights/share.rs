//! The experts of a mixture, spread evenly over processes (ranks).
//!
//! What is spread are the parameters that a key map stacks ([`Rule::Stack`](crate::Rule::Stack),
//! [`Rule::StackTranspose`](crate::Rule::StackTranspose)): rank 1 of 4 holds the second quarter of the places along their
//! first dimension. Every rank holds all of everything else.

use std::ops::Range;

use burn::module::{Module, ModuleMapper, Param, ParamId};
use burn::tensor::{Device, Tensor};

use crate::error::{Error, PartProblem};
use crate::load::Path;
use crate::rule::{KeyMap, Line};

/// What one of several ranks holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    rank: usize,
    ranks: usize,
}

impl Default for Share {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl Share {
    /// All of it.
    pub const WHOLE: Self = Self { rank: 0, ranks: 1 };

    /// The share of rank `rank`, from 0, of `ranks`; none where there is no such rank.
    pub const fn new(rank: usize, ranks: usize) -> Option<Self> {
        if rank < ranks { Some(Self { rank, ranks }) } else { None }
    }

    /// Which rank it is, from 0.
    pub const fn rank(self) -> usize {
        self.rank
    }

    /// How many ranks there are.
    pub const fn ranks(self) -> usize {
        self.ranks
    }

    /// The places among those of all ranks, of which each has `own`.
    pub(crate) fn places(self, own: usize) -> Range<usize> {
        let first = self.rank.saturating_mul(own);
        first..first.saturating_add(own)
    }

    /// The part of a model that the rank holds: of every parameter that `keys` stacks its places, of the others all.
    /// Nothing is allocated for what was not used before, and [`load()`](crate::load()) with this share
    /// ([`LoadOptions::share`](crate::LoadOptions::share)) fills it.
    ///
    /// # Errors
    /// [`Error::Rule`]; [`Error::Parts`] with all parameters that cannot be cut into so many equal parts.
    pub fn of<M: Module>(self, model: M, keys: &KeyMap) -> Result<M, Error> {
        let stacks = keys.lines()?.into_iter().filter(Line::is_stack).collect();
        let mut cutter = Cutter { path: Path::default(), stacks, share: self, problems: Vec::new() };
        let model = model.map(&mut cutter);
        match cutter.problems.is_empty() {
            true => Ok(model),
            false => Err(Error::Parts { path: "the model".into(), problems: cutter.problems }),
        }
    }
}

struct Cutter {
    path: Path,
    stacks: Vec<Line>,
    share: Share,
    problems: Vec<PartProblem>,
}

impl ModuleMapper for Cutter {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let (path, Share { ranks, .. }) = (self.path.joined(), self.share);
        if ranks == 1 || !self.stacks.iter().any(|line| line.leads_to(&path)) {
            return param;
        }
        let mut shape = param.lazy_shape();
        let experts = shape[0];
        if !experts.is_multiple_of(ranks) {
            self.problems.push(PartProblem::Uneven { parameter: path, experts, ranks });
            return param;
        }
        let places = self.share.places(experts / ranks);
        shape[0] = places.len();
        let (device, is_used) = (param.lazy_device(), param.is_initialized());
        let is_learned = !is_used || param.val().is_require_grad(); // what was never used is not frozen either
        let init = move |device: &Device, is_learned| {
            let whole = param.val().detach().set_require_grad(false);
            let part = whole.narrow(0, places.start, places.len());
            part.to_device(device).set_require_grad(is_learned)
        };
        let part = Param::uninitialized(ParamId::new(), init, device, is_learned, shape);
        if is_used {
            part.val(); // so that the whole need not be kept
        }
        part
    }

    fn enter_module(&mut self, name: &str, container: &str) {
        self.path.enter(name, container);
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.exit();
    }
}
