use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::Tensor;

use super::journey::Journey;
use super::remote::remote;
use super::route::{check, route};
use super::shadows::Shadows;
use super::{LayerTraffic, Ranks, Shadowing};
use crate::moe::{Experts, Gate, Moe, Noise, Phase, Routing};
use crate::ops::Activation;
use crate::ops::moe::{Dispatch, combine, permute};

/// A [`Moe`] whose experts are spread over ranks: of `size` ranks each has `n_experts / size`, those of rank 0 first, and
/// tokens of its own. The gate is the same on all. It does what FastMoE does with a `moe_group` (He et al. 2021, section 4):
/// tokens are sorted by expert, ranks tell each other how many come, tokens travel, experts work, tokens travel back.
///
/// Outputs are those of a [`Moe`] that has all experts, for the tokens of each rank. Gradients are exact: after a backward
/// pass of the ranks' losses a rank has the gradients of their *sum*, for its own tokens and experts, and what its own loss
/// adds to those of the gate: [`super::Groups::reduce`] sums the latter. All ranks have to go forward and backward, a rank
/// without tokens too.
///
/// How gates treat tokens of other ranks, as FastMoE's:
/// - GShard's capacity is of a rank's own tokens, and its loss is of these and of as many experts as a rank has.
/// - DC's capacity is of all ranks' tokens: those of rank 0 come first.
/// - Swipe moves tokens to ranks that have room. All ranks need as many tokens.
/// - Faster has its [`crate::moe::gate::Node`], which each rank's gate is made with. Experts that are shadowed count as near;
///   that their tokens stay is for [`ParallelMoe::with_shadowing`] to say.
/// - Switch and k-top-1 have capacities of a rank's own tokens, BASE assigns equal shares of these: as if each rank were alone
///   with all experts. FastMoE's Switch counts all ranks' tokens; this one does not.
#[derive(Module, Debug)]
pub struct ParallelMoe {
    /// Says where tokens go, among the experts of all ranks.
    pub gate: Gate,
    /// Those of this rank.
    pub experts: Experts,
    #[module(skip)]
    activation: Activation,
    #[module(skip)]
    ranks: Ranks,
    #[module(skip)]
    chunks: usize,
    #[module(skip)]
    shadowing: Option<Shadowing>,
}

impl ParallelMoe {
    /// - `gate`: of all experts, the same on all ranks
    /// - `experts`: those of this rank, as many on all ranks
    ///
    /// # Panics
    /// If the gate is of another number of workers than there are ranks.
    pub fn new(gate: Gate, experts: Experts, activation: Activation, ranks: &Ranks) -> Self {
        check(&gate, experts.n_experts(), ranks.size());
        Self { gate, experts, activation, ranks: ranks.clone(), chunks: 1, shadowing: None }
    }

    /// This rank's share of a layer.
    ///
    /// # Panics
    /// If the ranks do not divide its experts; as [`ParallelMoe::new`].
    pub fn share_of(layer: &Moe, ranks: &Ranks) -> Self {
        let (n_experts, size) = (layer.experts.n_experts(), ranks.size());
        assert!(n_experts.is_multiple_of(size), "{size} ranks do not divide {n_experts} experts");
        let n_local = n_experts / size;
        let experts = layer.experts.clone().map(&mut Share { first: ranks.rank() * n_local, n_local });
        Self::new(layer.gate.clone(), experts, layer.activation, ranks)
    }

    /// Tokens are cut into so many chunks: while experts work on one, the next one travels. The result is the same. It is 1
    /// until it is said.
    ///
    /// # Panics
    /// If there are none.
    pub fn with_chunks(self, chunks: usize) -> Self {
        assert!(chunks > 0, "tokens cannot be cut into no chunks");
        Self { chunks, ..self }
    }

    /// In each pass some experts are copied from their rank to all others, which compute their own rows of these; in the
    /// backward pass the gradients of the copies are summed on the rank that they came from. The result is the same: only what
    /// is sent differs, and who works. The copies are kept until the backward pass. No expert is copied until it is said.
    ///
    /// - `shadowing`: the same on all ranks
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn with_shadowing(self, shadowing: Shadowing) -> Self {
        let n_experts = self.experts.n_experts() * self.ranks.size();
        if let Shadowing::Always(experts) = &shadowing {
            assert!(
                experts.iter().all(|expert| *expert < n_experts),
                "experts {experts:?}, of which there are {n_experts}, cannot be copied"
            );
        }
        Self { shadowing: Some(shadowing), ..self }
    }

    /// `[..., d_model] -> [..., d_model]`, and where this rank's tokens went. The loss of the routing is of this rank's tokens.
    ///
    /// # Panics
    /// If the noise that was given does not fit the gate, `x` and the experts are on different devices, gradients are wanted
    /// anywhere but on the CPU, or another rank has ended.
    pub fn forward<const D: usize>(
        &self,
        x: Tensor<D>,
        phase: Phase,
        noise: &mut Noise,
    ) -> (Tensor<D>, Routing) {
        let shape = x.dims();
        let (d_model, tokens) = (shape[D - 1], shape[..D - 1].iter().product::<usize>());
        let x = x.reshape([tokens, d_model]);
        let routing = route(&self.gate, x.clone(), phase, noise, &self.ranks);
        let shadowing = self.shadowing.as_ref().filter(|_| self.ranks.size() > 1);
        let ids = shadowing.map_or(Vec::new(), |shadowing| shadowing.agree(&routing.load, &self.ranks));
        let dispatch = self.dispatch(&routing, &ids);
        let journey = Journey::new(&dispatch, self.chunks, ids.len(), &self.ranks);
        let shadows = Shadows { ids, ranks: self.ranks.clone() };
        let rows = permute(x.clone(), &dispatch);
        let rows = remote(rows, &self.experts, self.activation, journey, shadows); // [rows, d_model]
        let y = match dispatch.rows() {
            // adds nothing, but the backward pass of a rank without rows, too, has to go by the others
            0 => x.zeros_like() + rows.sum().unsqueeze(),
            _ => {
                let weights = routing.weights.clone().cast(rows.dtype());
                combine(rows, weights, &dispatch)
            }
        };
        (y.reshape(shape), routing)
    }

    /// Choices sorted by chunk, and in each by expert: chunk `c` has the experts from `c n_experts` on. Behind all chunks, those
    /// of experts that are copied.
    fn dispatch(&self, routing: &Routing, copied: &[usize]) -> Dispatch {
        let choices = &routing.experts;
        let of_chunk = (choices.ids.len() / choices.top_k).div_ceil(self.chunks).max(1) * choices.top_k;
        let behind = self.chunks * choices.n_experts;
        let place = |at: usize, expert: usize| match copied.binary_search(&expert) {
            Ok(copy) => behind + copy,
            Err(_) => at / of_chunk * choices.n_experts + expert,
        };
        let ids = choices.ids.iter().enumerate();
        let ids: Vec<Option<usize>> =
            ids.map(|(at, expert)| expert.map(|expert| place(at, expert))).collect();
        Dispatch::new(&ids, choices.top_k, behind + copied.len())
    }

    /// What the layer's traffic depends on, for tokens whose values are of so many bytes.
    pub fn traffic(&self, value: usize) -> LayerTraffic {
        let shape = self.experts.up().weight.lazy_shape();
        let numbers = self.experts.num_params() / shape[0];
        let [size, n_local, chunks, d_model, value, numbers] =
            [self.ranks.size(), shape[0], self.chunks, shape[1], value, numbers].map(|number| number as u64);
        let is_told = self.shadowing.as_ref().is_some_and(Shadowing::is_told);
        LayerTraffic { size, n_local, chunks, d_model, value, numbers, is_told }
    }
}

struct Share {
    first: usize,
    n_local: usize,
}

impl ModuleMapper for Share {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| {
            let is_tracked = value.is_require_grad();
            value.detach().narrow(0, self.first, self.n_local).set_require_grad(is_tracked)
        })
    }
}
