//! Assigning tokens to experts, an equal share to each.

/// The assignment of fairseq's BASE layer (Lewis et al. 2021; after Bertsekas's auction): in every round each expert bids
/// for the tokens that it values most, by how much more than the next one, and tokens go to the highest bid and get more
/// expensive, until every token has a bid. From the hundredth round on prices settle for less than the best. What is found
/// is balanced, and may be a little below the best sum.
///
/// - `scores`: `[tokens, n_experts]` row after row; what is no finite number counts as the smallest that is.
///
/// Gives the expert of each token. Where the experts do not divide the tokens, some have one less.
pub fn auction(scores: &[f32], n_experts: usize) -> Vec<usize> {
    let Some(problem) = Problem::new(scores, n_experts) else { return vec![0; scores.len()] };
    let Problem { scores, n_tokens, real } = problem;
    let share = n_tokens / n_experts;
    let value_of = |expert: usize, token: usize| scores[token * n_experts + expert];
    let (max, min) = scores.iter().fold((f32::MIN, f32::MAX), |(max, min), &s| (max.max(s), min.min(s)));
    let epsilon = ((max - min) / 50.0).max(1e-4);
    let mut values: Vec<Vec<f32>> =
        (0..n_experts).map(|expert| (0..n_tokens).map(|token| value_of(expert, token)).collect()).collect();
    let mut cost = vec![0.0_f32; n_tokens];
    let mut winners: Vec<(usize, usize)> = Vec::new(); // expert and token of the last round
    let mut wanted = vec![Vec::new(); n_experts];
    for round in 0..GIVE_UP {
        let mut bids = vec![vec![0.0_f32; n_tokens]; n_experts];
        for (expert, values) in values.iter().enumerate() {
            let mut order: Vec<usize> = (0..n_tokens).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
            let next = values[order[share]];
            order.truncate(share);
            for &token in &order {
                bids[expert][token] = values[token] - next + epsilon;
            }
            wanted[expert] = order;
        }
        if round > 0 && round < PATIENCE {
            // what was won is kept for the least bid, unless somebody bids more
            for &(expert, token) in &winners {
                bids[expert][token] = epsilon;
            }
        }
        let highest = |token: usize| {
            (1..n_experts).fold((0, bids[0][token]), |(best, high), expert| {
                match bids[expert][token] > high {
                    true => (expert, bids[expert][token]),
                    false => (best, high),
                }
            })
        };
        let highest: Vec<(usize, f32)> = (0..n_tokens).map(highest).collect();
        if highest.iter().all(|(_, bid)| *bid > 0.0) {
            break;
        }
        winners.clear();
        for (token, &(expert, bid)) in highest.iter().enumerate() {
            cost[token] += bid;
            if bid > 0.0 {
                winners.push((expert, token));
            }
        }
        for (expert, values) in values.iter_mut().enumerate() {
            for (token, value) in values.iter_mut().enumerate() {
                *value = value_of(expert, token) - cost[token];
            }
        }
        for &(expert, token) in &winners {
            // so that it is wanted next time too
            values[expert][token] = if round < PATIENCE { max } else { value_of(expert, token) };
        }
    }
    // each expert keeps what it wants; the rest fills up, so that nothing is left even of an auction without end
    let mut assigned: Vec<Option<usize>> = vec![None; n_tokens];
    let mut room = vec![share; n_experts];
    for (expert, tokens) in wanted.iter().enumerate() {
        for &token in tokens {
            if assigned[token].is_none() {
                assigned[token] = Some(expert);
                room[expert] -= 1;
            }
        }
    }
    let mut fill = |token: usize| {
        let free = (0..n_experts).filter(|&expert| room[expert] > 0);
        let best = free.max_by(|&a, &b| value_of(a, token).total_cmp(&value_of(b, token))).unwrap_or(0);
        room[best] = room[best].saturating_sub(1);
        best
    };
    (0..real).map(|token| assigned[token].unwrap_or_else(|| fill(token))).collect()
}

/// Rounds in which prices are those of an auction.
const PATIENCE: usize = 100;
/// Rounds after which the rest is filled up.
const GIVE_UP: usize = 10_000;

/// The assignment of the largest sum of scores, by shortest augmenting paths over the experts. Its time grows with the
/// square of the tokens: [`auction`] is for many.
///
/// - `scores`: `[tokens, n_experts]` row after row; what is no finite number counts as the smallest that is.
///
/// Gives the expert of each token. Where the experts do not divide the tokens, some have one less.
pub fn best_assignment(scores: &[f32], n_experts: usize) -> Vec<usize> {
    let Some(problem) = Problem::new(scores, n_experts) else { return vec![0; scores.len()] };
    let Problem { scores, n_tokens, real } = problem;
    let loss = |token: usize, expert: usize| -f64::from(scores[token * n_experts + expert]);
    let mut held: Vec<Vec<usize>> = vec![Vec::new(); n_experts];
    for new in 0..n_tokens {
        // the cheapest token to move from one expert to another, and what that costs
        let mut moves = vec![vec![(f64::INFINITY, 0); n_experts]; n_experts];
        for (from, tokens) in held.iter().enumerate() {
            for (to, cheapest) in moves[from].iter_mut().enumerate() {
                for &token in tokens {
                    let cost = loss(token, to) - loss(token, from);
                    if cost < cheapest.0 {
                        *cheapest = (cost, token);
                    }
                }
            }
        }
        let mut distance: Vec<f64> = (0..n_experts).map(|expert| loss(new, expert)).collect();
        let mut before: Vec<Option<usize>> = vec![None; n_experts];
        for _ in 1..n_experts {
            for from in 0..n_experts {
                for to in (0..n_experts).filter(|&to| to != from) {
                    let through = distance[from] + moves[from][to].0;
                    if through < distance[to] - 1e-12 {
                        (distance[to], before[to]) = (through, Some(from));
                    }
                }
            }
        }
        let free = (0..n_experts).filter(|&expert| held[expert].len() < n_tokens / n_experts);
        let end = free.min_by(|&a, &b| distance[a].total_cmp(&distance[b])).unwrap_or(0);
        let mut at = end;
        while let Some(from) = before[at] {
            let (_, token) = moves[from][at];
            held[from].retain(|&other| other != token);
            held[at].push(token);
            at = from;
        }
        held[at].push(new);
    }
    let mut assigned = vec![0; n_tokens];
    for (expert, tokens) in held.iter().enumerate() {
        for &token in tokens {
            assigned[token] = expert;
        }
    }
    assigned.truncate(real);
    assigned
}

/// Finite scores of as many tokens as experts have equal shares of.
struct Problem {
    scores: Vec<f32>,
    n_tokens: usize,
    /// The others value all experts the same.
    real: usize,
}

impl Problem {
    /// None where there is nothing to decide: no token, or one expert.
    fn new(scores: &[f32], n_experts: usize) -> Option<Self> {
        if n_experts < 2 || scores.is_empty() {
            return None;
        }
        let real = scores.len() / n_experts;
        let n_tokens = real.next_multiple_of(n_experts);
        let finite = scores.iter().copied().filter(|score| score.is_finite());
        let least = finite.reduce(f32::min).unwrap_or(0.0);
        let score = |score: &f32| if score.is_finite() { *score } else { least };
        let mut scores: Vec<f32> = scores.iter().map(score).collect();
        scores.resize(n_tokens * n_experts, least);
        Some(Self { scores, n_tokens, real })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::random;

    fn sum(scores: &[f32], n_experts: usize, assigned: &[usize]) -> f64 {
        assigned.iter().enumerate().map(|(token, expert)| f64::from(scores[token * n_experts + expert])).sum()
    }

    fn scores(count: usize, seed: u64) -> Vec<f32> {
        random(count, &mut fastrand::Rng::with_seed(seed)).into_iter().map(|score| score as f32).collect()
    }

    /// The best of all balanced assignments, tried one by one.
    fn by_trial(scores: &[f32], n_experts: usize, room: &mut [usize], token: usize) -> f64 {
        if token * n_experts == scores.len() {
            return 0.0;
        }
        let mut best = f64::NEG_INFINITY;
        for expert in 0..n_experts {
            if room[expert] > 0 {
                room[expert] -= 1;
                let rest = by_trial(scores, n_experts, room, token + 1);
                best = best.max(rest + f64::from(scores[token * n_experts + expert]));
                room[expert] += 1;
            }
        }
        best
    }

    #[test]
    fn the_best_assignment_is_that_of_all_trials_and_the_auction_comes_close() {
        for (tokens, n_experts) in [(6, 2), (6, 3), (8, 4), (5, 5)] {
            for seed in 0..8 {
                let scores = scores(tokens * n_experts, seed);
                let expected = by_trial(&scores, n_experts, &mut vec![tokens / n_experts; n_experts], 0);
                let best = best_assignment(&scores, n_experts);
                assert!((sum(&scores, n_experts, &best) - expected).abs() < 1e-5);
                let found = sum(&scores, n_experts, &auction(&scores, n_experts));
                assert!(
                    found <= expected + 1e-5 && found > expected - 0.04 * tokens as f64,
                    "{found} {expected}"
                );
            }
        }
    }

    #[test]
    fn every_expert_has_its_share() {
        for (tokens, n_experts) in [(64, 8), (30, 5), (7, 3), (2, 5), (40, 1)] {
            let mut scores = scores(tokens * n_experts, 3);
            scores[0] = f32::NAN;
            for assigned in [auction(&scores, n_experts), best_assignment(&scores, n_experts)] {
                assert_eq!(assigned.len(), tokens);
                for expert in 0..n_experts {
                    let load = assigned.iter().filter(|&&of| of == expert).count();
                    assert!(load <= tokens.div_ceil(n_experts), "{load} of {tokens}");
                }
            }
        }
        let same = auction(&[1.0; 32], 4); // of 8 tokens
        assert_eq!(same.iter().filter(|&&expert| expert == 3).count(), 2);
        assert!(auction(&[], 4).is_empty() && best_assignment(&[], 4).is_empty());
    }
}
