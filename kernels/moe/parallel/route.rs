use burn::tensor::Tensor;

use super::Ranks;
use crate::moe::gate::swipe;
use crate::moe::{Choices, Gate, Noise, Phase, Routing};

/// The gate is of as many workers as there are ranks.
///
/// # Panics
/// If it is not.
pub(super) fn check(gate: &Gate, n_local: usize, size: usize) {
    let workers = match gate {
        Gate::GShard(gate) => gate.n_workers,
        Gate::Dc(gate) => gate.n_workers,
        Gate::Swipe(gate) => gate.n_workers,
        Gate::Faster(gate) => {
            assert_eq!(gate.node.n_local, n_local, "experts of a worker (left) and of a rank");
            size
        }
        Gate::Naive(_)
        | Gate::Noisy(_)
        | Gate::Switch(_)
        | Gate::Base(_)
        | Gate::KTop1(_)
        | Gate::Zero(_) => size,
    };
    assert_eq!(workers, size, "workers of the gate (left) and ranks");
}

/// `[tokens, d_model]` of this rank to where they go. Without tokens there is no loss.
///
/// # Panics
/// If the noise that was given does not fit, ranks have different numbers of tokens where the gate needs as many of each, or
/// another rank has ended.
pub(super) fn route(gate: &Gate, x: Tensor<2>, phase: Phase, noise: &mut Noise, ranks: &Ranks) -> Routing {
    let [tokens, _] = x.dims();
    let mut routing = match gate {
        Gate::GShard(gate) => gate.route_own(x, phase, noise),
        Gate::Dc(gate) => gate.route_own(x, phase, noise, |load| {
            let all = ranks.all_gather(load);
            let of_ranks = |count: usize| {
                let column = |expert| all.iter().skip(expert).step_by(load.len()).take(count).sum();
                (0..load.len()).map(column).collect::<Vec<usize>>()
            };
            (of_ranks(ranks.rank()), of_ranks(ranks.size()))
        }),
        Gate::Swipe(gate) if phase == Phase::Train => {
            let logits = gate.logits(x);
            let best = gate.best(&logits);
            gate.weigh(logits, moved(&best, ranks))
        }
        _ => gate.route(x, phase, noise),
    };
    if tokens == 0 {
        routing.aux_loss = None;
    }
    routing
}

/// Where this rank's tokens go when those of all ranks are moved.
fn moved(best: &Choices, ranks: &Ranks) -> Choices {
    let own: Vec<usize> =
        best.ids.iter().map(|expert| expert.expect("no choice is dropped before")).collect();
    let lengths = ranks.all_gather(&[own.len()]);
    assert!(
        lengths.iter().all(|length| *length == own.len()),
        "ranks have different numbers of choices: {lengths:?}"
    );
    let all = Choices { ids: ranks.all_gather(&own).into_iter().map(Some).collect(), ..best.clone() };
    let moved = swipe(&all, ranks.size()).experts;
    let first = ranks.rank() * own.len();
    Choices { ids: moved.ids[first..first + own.len()].to_vec(), ..moved }
}
