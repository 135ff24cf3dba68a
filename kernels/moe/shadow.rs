//! Copies of busy experts on every worker (He et al. 2022, FasterMoE, <https://doi.org/10.1145/3503221.3508418>): a token
//! whose expert is copied stays where it is. Which experts are copied, what that costs, and what it spares.

use super::Choices;

/// What a step's parts cost, of experts with two projections.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ShadowCost {
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the projections.
    pub d_ff: usize,
    /// Bytes of a number.
    pub bytes: usize,
    /// Bytes per second between workers.
    pub network: f64,
    /// Floating point operations per second of a worker.
    pub compute: f64,
}

impl Default for ShadowCost {
    /// FastMoE's: 2048 and twice that, f32, 50 Gb/s, 11.5 TFLOP/s.
    fn default() -> Self {
        Self { d_model: 2048, d_ff: 4096, bytes: 4, network: 50e9 / 8.0, compute: 11.5e12 }
    }
}

impl ShadowCost {
    /// Seconds of a step in which the busiest expert that is not copied gets so many rows, and so many are copied:
    /// `3 B c + 4 B f + n m`. A row costs `c`, four operations for each number of a projection, once forward and twice
    /// backward; it is sent four times, `f` each: there and back, and its gradient there and back. A copy costs `m`, to send
    /// both projections.
    pub fn latency(&self, busiest: usize, copies: usize) -> f64 {
        let numbers = self.d_model as f64 * self.d_ff as f64;
        let compute = 4.0 * numbers / self.compute;
        let feature = (self.d_model * self.bytes) as f64 / self.network;
        let model = 2.0 * numbers * self.bytes as f64 / self.network;
        (3.0 * compute + 4.0 * feature) * busiest as f64 + copies as f64 * model
    }

    /// Which experts are to be copied, the busiest first: one more as long as [`ShadowCost::latency`] falls. The least busy
    /// one is never copied.
    ///
    /// - `loads`: the rows of each expert on all workers, as [`Placement::totals`] has it.
    pub fn choose(&self, loads: &[usize]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..loads.len()).collect();
        order.sort_by(|&a, &b| loads[b].cmp(&loads[a]));
        let latency = |copies: usize| self.latency(loads[order[copies]], copies);
        let copies = (1..order.len()).take_while(|&copies| latency(copies) < latency(copies - 1)).count();
        order.truncate(copies);
        order
    }
}

/// Which worker computes what: experts are dealt out in equal parts, the first to the first worker; copied ones are on all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    n_workers: usize,
    is_shadowed: Vec<bool>,
}

/// What a pass exchanges.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exchange {
    /// Rows that leave their worker, on the way to their experts. As many come back, and their gradients go the same ways.
    pub rows: usize,
    /// Experts that are sent, each to every worker but its own. As many gradients come back and are added up.
    pub experts: usize,
    /// Rows that each worker computes.
    pub computed: Vec<usize>,
}

impl Placement {
    /// Nothing is copied.
    ///
    /// # Panics
    /// If the workers do not divide the experts.
    pub fn new(n_workers: usize, n_experts: usize) -> Self {
        assert!(
            n_workers > 0 && n_experts.is_multiple_of(n_workers),
            "{n_workers} workers do not divide {n_experts} experts"
        );
        Self { n_workers, is_shadowed: vec![false; n_experts] }
    }

    /// With copies of these experts.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn shadowing(mut self, experts: &[usize]) -> Self {
        for &expert in experts {
            self.is_shadowed[expert] = true;
        }
        self
    }

    /// Whose expert it is.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn home(&self, expert: usize) -> usize {
        assert!(expert < self.is_shadowed.len(), "expert {expert} of {}", self.is_shadowed.len());
        expert / (self.is_shadowed.len() / self.n_workers)
    }

    /// Which worker computes the rows that `source` has for an expert.
    ///
    /// # Panics
    /// If there is no such expert.
    pub fn worker(&self, source: usize, expert: usize) -> usize {
        if self.is_shadowed[expert] { source } else { self.home(expert) }
    }

    /// The experts of a worker: its own and the copies, going up.
    pub fn held(&self, worker: usize) -> Vec<usize> {
        let experts = 0..self.is_shadowed.len();
        experts.filter(|&expert| self.is_shadowed[expert] || self.home(expert) == worker).collect()
    }

    /// The rows that each worker has for each expert, `[worker][expert]`, where each has the next equal part of the tokens.
    ///
    /// # Panics
    /// If the workers do not divide the tokens, or the choices are of other experts.
    pub fn loads(&self, choices: &Choices) -> Vec<Vec<usize>> {
        let Choices { ids, top_k, n_experts } = choices;
        let tokens = ids.len() / top_k;
        assert!(
            tokens.is_multiple_of(self.n_workers),
            "{} workers do not divide {tokens} tokens",
            self.n_workers
        );
        assert_eq!(*n_experts, self.is_shadowed.len(), "experts of the choices (left) and of the workers");
        let of_worker = |ids: &[Option<usize>]| {
            Choices { ids: ids.to_vec(), top_k: *top_k, n_experts: *n_experts }.load()
        };
        match ids.len() / self.n_workers {
            0 => vec![vec![0; *n_experts]; self.n_workers],
            each => ids.chunks(each).map(of_worker).collect(),
        }
    }

    /// The rows of each expert, of such loads.
    pub fn totals(&self, loads: &[Vec<usize>]) -> Vec<usize> {
        (0..self.is_shadowed.len()).map(|expert| loads.iter().map(|load| load[expert]).sum()).collect()
    }

    /// What is exchanged of such loads, and who computes how much.
    ///
    /// # Panics
    /// If the loads are of other workers or experts.
    pub fn exchange(&self, loads: &[Vec<usize>]) -> Exchange {
        assert_eq!(loads.len(), self.n_workers, "workers that have loads (left) and those there are");
        let (mut rows, mut computed) = (0, vec![0; self.n_workers]);
        for (source, load) in loads.iter().enumerate() {
            assert_eq!(
                load.len(),
                self.is_shadowed.len(),
                "experts that have loads (left) and those there are"
            );
            for (expert, &load) in load.iter().enumerate() {
                let worker = self.worker(source, expert);
                computed[worker] += load;
                rows += if worker == source { 0 } else { load };
            }
        }
        let experts = self.is_shadowed.iter().filter(|is_shadowed| **is_shadowed).count();
        Exchange { rows, experts: experts * (self.n_workers - 1), computed }
    }
}

#[cfg(test)]
mod tests {
    use burn::module::Param;
    use burn::tensor::{Device, Int, Tensor, TensorData};

    use super::super::gate::{NaiveGate, SwitchGate};
    use super::super::{ExpertLinear, ExpertMlp, Experts, Gate, Moe, MoeConfig, Noise, Phase, Routing};
    use super::*;
    use crate::ops::Activation;
    use crate::ops::moe::{Dispatch, combine, permute};
    use crate::random::seeded;
    use crate::testing::{assert_close, floats, noise};

    const NONE: [usize; 0] = [];
    /// A row costs 7, a copy 2.
    const PLAIN: ShadowCost = ShadowCost { d_model: 1, d_ff: 1, bytes: 1, network: 1.0, compute: 4.0 };

    #[test]
    fn the_busiest_are_copied_while_that_is_cheaper() {
        assert_eq!((PLAIN.latency(10, 0), PLAIN.latency(3, 2)), (70.0, 25.0));
        // 70, 65, 25, 27
        assert_eq!(PLAIN.choose(&[9, 3, 10, 3]), [2, 0]);
        // 70, 72: what is behind two equals is not seen
        assert_eq!(PLAIN.choose(&[10, 10, 0]), NONE);
        assert_eq!(PLAIN.choose(&[5]), NONE);
        assert_eq!(PLAIN.choose(&[]), NONE);
    }

    /// By FastMoE's settings a row takes 14 microseconds, and a copy, 64 MiB at 50 Gb/s, 10.7 milliseconds: as 767.2 rows.
    #[test]
    fn the_defaults_are_fastmoe_s() {
        let cost = ShadowCost::default();
        assert!((cost.latency(1000, 0) - 0.013_996_2).abs() < 1e-7, "{}", cost.latency(1000, 0));
        assert!((cost.latency(0, 1) - 0.010_737_4).abs() < 1e-7);
        assert_eq!(cost.choose(&[0, 768]), [1]);
        assert_eq!(cost.choose(&[0, 767]), NONE);
    }

    #[test]
    fn the_cost_never_rises() {
        let mut rng = fastrand::Rng::with_seed(6);
        let mut copies = 0;
        for _ in 0..500 {
            let loads: Vec<usize> = (0..rng.usize(1..24)).map(|_| rng.usize(0..2000)).collect();
            let d_model = rng.usize(1..400);
            let compute = 10f64.powf(6.0 * rng.f64());
            let cost = ShadowCost { d_model, d_ff: 2 * d_model, bytes: 4, network: 1e3, compute };
            let mut left = loads.clone();
            left.sort_unstable_by(|a, b| b.cmp(a));
            let copied: Vec<usize> = cost.choose(&loads).into_iter().map(|expert| loads[expert]).collect();
            assert_eq!(copied, left[..copied.len()], "the busiest");
            let costs: Vec<f64> = (0..left.len()).map(|copies| cost.latency(left[copies], copies)).collect();
            assert!(costs[..=copied.len()].windows(2).all(|pair| pair[1] < pair[0]), "{costs:?}");
            let next = costs.get(copied.len() + 1);
            assert!(next.is_none_or(|&next| next >= costs[copied.len()]), "one more does not pay: {costs:?}");
            copies += copied.len();
        }
        assert!(copies > 300, "{copies}");
    }

    #[test]
    fn rows_of_copied_experts_stay() {
        let loads = [vec![5, 1, 2, 0], vec![4, 0, 3, 1]];
        let plain = Placement::new(2, 4);
        assert_eq!(plain.totals(&loads), [9, 1, 5, 1]);
        assert_eq!(plain.exchange(&loads), Exchange { rows: 2 + 4, experts: 0, computed: vec![10, 6] });
        let shadowed = plain.shadowing(&[0]);
        assert_eq!(shadowed.exchange(&loads), Exchange { rows: 2, experts: 1, computed: vec![6, 10] });
        assert_eq!([shadowed.held(0), shadowed.held(1)], [vec![0, 1], vec![0, 2, 3]]);
    }

    #[test]
    fn loads_are_those_of_each_part_of_the_tokens() {
        let ids = vec![Some(0), Some(3), Some(1), None, Some(3), Some(3), Some(0), Some(2)];
        let choices = Choices { ids, top_k: 2, n_experts: 4 };
        let placement = Placement::new(2, 4);
        let loads = placement.loads(&choices);
        assert_eq!(loads, [[1, 1, 0, 1], [1, 0, 1, 2]]);
        assert_eq!(placement.totals(&loads), choices.load());
        let nothing = Choices { ids: vec![], ..choices };
        assert_eq!(placement.loads(&nothing), [[0; 4]; 2]);
    }

    /// The weights of some experts, as a worker holds them.
    fn held(experts: &ExpertMlp, ids: &[usize]) -> ExpertMlp {
        let of = |linear: &ExpertLinear| {
            let device = linear.weight.device();
            let ids: Vec<i64> = ids.iter().map(|&id| id as i64).collect();
            let ids: Tensor<1, Int> = Tensor::from_data(TensorData::new(ids.clone(), [ids.len()]), &device);
            ExpertLinear {
                weight: Param::initialized(linear.weight.id, linear.weight.val().select(0, ids.clone())),
                bias: linear.bias.as_ref().map(|bias| Param::initialized(bias.id, bias.val().select(0, ids))),
            }
        };
        ExpertMlp { up: of(&experts.up), down: of(&experts.down) }
    }

    /// Every worker computes the rows that [`Placement`] gives it with the experts that it holds, and rows go back to where
    /// they came from; and how many rows left their worker.
    fn by_workers(layer: &Moe, x: Tensor<2>, routing: &Routing, placement: &Placement) -> (Tensor<2>, usize) {
        let Experts::Plain(experts) = &layer.experts else { panic!("two projections") };
        let whole = routing.experts.dispatch();
        let each = routing.experts.ids.len() / placement.n_workers;
        let rows = permute(x, &whole);
        // expert and source of each row
        let mut of_rows = vec![(0, 0); whole.rows()];
        for (choice, &expert) in routing.experts.ids.iter().enumerate() {
            let Some(expert) = expert else { continue };
            let before = routing.experts.ids[..choice].iter().filter(|id| **id == Some(expert)).count();
            of_rows[whole.segment(expert).start + before] = (expert, choice / each);
        }
        let (mut parts, mut order, mut left) = (Vec::new(), Vec::new(), 0);
        for worker in 0..placement.n_workers {
            let ids = placement.held(worker);
            let mine: Vec<usize> = (0..of_rows.len())
                .filter(|&row| placement.worker(of_rows[row].1, of_rows[row].0) == worker)
                .collect();
            left += mine.iter().filter(|&&row| of_rows[row].1 != worker).count();
            if mine.is_empty() {
                continue;
            }
            let local: Vec<Option<usize>> =
                mine.iter().map(|&row| ids.iter().position(|&id| id == of_rows[row].0)).collect();
            let dispatch = Dispatch::new(&local, 1, ids.len());
            let places: Vec<i64> = mine.iter().map(|&row| row as i64).collect();
            let places = Tensor::from_data(TensorData::new(places, [mine.len()]), &rows.device());
            let here = rows.clone().select(0, places);
            // rows are sorted by expert already
            parts.push(held(experts, &ids).forward(here, Activation::Gelu, &dispatch));
            order.extend(mine);
        }
        let mut back = vec![0_i64; order.len()];
        order.iter().enumerate().for_each(|(place, &row)| back[row] = place as i64);
        let device = rows.device();
        let back = Tensor::from_data(TensorData::new(back, [order.len()]), &device);
        let rows = Tensor::cat(parts, 0).select(0, back);
        (combine(rows, routing.weights.clone(), &whole), left)
    }

    /// Outputs and gradients of a run by several workers, with and without copies, are those of one; and rows that were
    /// sent are those that were counted.
    #[test]
    fn a_shadowed_run_is_the_run_without_shadows() {
        const TOKENS: usize = 24;
        const EXPERTS: usize = 6;
        let device = Device::flex().autodiff();
        let gates: [fn(&Device) -> Gate; 2] = [
            |device| Gate::Naive(NaiveGate::new(5, EXPERTS, 2, device)),
            |device| Gate::Switch(SwitchGate { rates: [0.9, 0.9], ..SwitchGate::new(5, EXPERTS, device) }),
        ];
        for (at, gate) in gates.into_iter().enumerate() {
            let layer = seeded(4, &device, |device| {
                MoeConfig::new(EXPERTS, 5, 7).init(gate(device), Activation::Gelu, device)
            });
            let x: Tensor<2> = noise([TOKENS, 5], at as u64, &device).require_grad();
            let run = || layer.forward(x.clone(), Phase::Train, &mut Noise::Seeded(3));
            let (y, routing) = run();
            let mix = noise([TOKENS, 5], 9, &device);
            let Experts::Plain(experts) = &layer.experts else { panic!("two projections") };
            let gradients = |y: Tensor<2>| {
                let gradients = (y * mix.clone()).sum().backward();
                let of_x = floats(x.grad(&gradients).unwrap());
                (of_x, floats(experts.up.weight.val().grad(&gradients).unwrap()))
            };
            let (expected, (of_x, of_up)) = (floats(y.clone()), gradients(y));
            for n_workers in [1, 2, 3] {
                let plain = Placement::new(n_workers, EXPERTS);
                let loads = plain.loads(&routing.experts);
                let totals = plain.totals(&loads);
                let mut busiest: Vec<usize> = (0..EXPERTS).collect();
                busiest.sort_by_key(|&expert| std::cmp::Reverse(totals[expert]));
                let mut sent = Vec::new();
                for copies in [0, 2, EXPERTS] {
                    let copied = &busiest[..copies];
                    let placement = plain.clone().shadowing(copied);
                    // a graph is gone through once
                    let (y, left) = by_workers(&layer, x.clone(), &run().1, &placement);
                    assert_close(y.clone(), &expected, 1e-5);
                    let found = gradients(y);
                    for (found, expected) in [(&found.0, &of_x), (&found.1, &of_up)] {
                        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 2e-5));
                    }
                    let exchange = placement.exchange(&loads);
                    assert_eq!(exchange.rows, left);
                    assert_eq!(
                        exchange.computed.iter().sum::<usize>(),
                        TOKENS * routing.experts.top_k - routing.dropped
                    );
                    sent.push(left);
                }
                assert!(n_workers == 1 || sent[1] < sent[0], "{sent:?}");
                assert_eq!((sent[2], n_workers > 1), (0, sent[0] > 0));
            }
        }
    }
}
