use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::ops::moe::Dispatch;

/// Whether a gate is being trained. Noise and capacities differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Learning.
    Train,
    /// Being used.
    Eval,
}

/// Where tokens go.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The experts of each token.
    pub experts: Choices,
    /// `[tokens, top_k]`: what each choice counts. Those of dropped choices mean nothing.
    pub weights: Tensor<2>,
    /// Grows as the load gets uneven; `[1]`. None where the gate has none, or it means nothing in this phase.
    pub aux_loss: Option<Tensor<1>>,
    /// How many choices were dropped.
    pub dropped: usize,
    /// How many choices each expert gets.
    pub load: Vec<usize>,
}

impl Routing {
    /// Counts drops and loads.
    pub fn new(experts: Choices, weights: Tensor<2>, aux_loss: Option<Tensor<1>>) -> Self {
        let (dropped, load) = (experts.dropped(), experts.load());
        Self { experts, weights, aux_loss, dropped, load }
    }
}

/// The experts of each token, some of them dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choices {
    /// `[tokens, top_k]` row after row; none where the choice was dropped.
    pub ids: Vec<Option<usize>>,
    /// How many choices a token has.
    pub top_k: usize,
    /// How many experts there are.
    pub n_experts: usize,
}

impl Choices {
    /// How many were dropped.
    pub fn dropped(&self) -> usize {
        self.ids.iter().filter(|expert| expert.is_none()).count()
    }

    /// How many each expert gets.
    pub fn load(&self) -> Vec<usize> {
        let mut load = vec![0; self.n_experts];
        for &expert in self.ids.iter().flatten() {
            load[expert] += 1;
        }
        load
    }

    /// Sorted by expert.
    pub fn dispatch(&self) -> Dispatch {
        Dispatch::new(&self.ids, self.top_k, self.n_experts)
    }

    /// `[tokens, top_k]`, -1 where a choice was dropped.
    pub fn numbers(&self) -> TensorData {
        let ids = self.ids.iter().map(|expert| expert.map_or(-1, |expert| expert as i64)).collect();
        TensorData::new(ids, [self.ids.len() / self.top_k, self.top_k])
    }

    /// The values of a table `[tokens, n_experts]` at the choices: `[tokens, top_k]`. A dropped one has that of the first
    /// expert.
    pub fn pick(&self, table: Tensor<2>) -> Tensor<2> {
        let ids: Vec<i64> = self.ids.iter().map(|expert| expert.map_or(0, |expert| expert as i64)).collect();
        let shape = [ids.len() / self.top_k, self.top_k];
        let ids: Tensor<2, Int> = Tensor::from_data(TensorData::new(ids, shape), &table.device());
        table.gather(1, ids)
    }

    /// Drops choices of experts that already have `capacity` of the same group of so many choices: those that come first
    /// are served.
    pub(super) fn prune(&mut self, capacity: usize, group: usize) {
        for group in self.ids.chunks_mut(group.max(1)) {
            serve(group, vec![capacity; self.n_experts]);
        }
    }

    /// Drops choices of experts that have no room left: those that come first are served.
    #[cfg(feature = "parallel")]
    pub(super) fn fit(&mut self, room: Vec<usize>) {
        serve(&mut self.ids, room);
    }
}

/// Drops choices of experts that have no room left.
fn serve(choices: &mut [Option<usize>], mut room: Vec<usize>) {
    for choice in choices {
        if let Some(expert) = *choice {
            match room[expert].checked_sub(1) {
                Some(less) => room[expert] = less,
                None => *choice = None,
            }
        }
    }
}

/// The values of a tensor.
pub(super) fn host(values: &Tensor<2>) -> Vec<f32> {
    values.clone().into_data().convert::<f32>().iter::<f32>().collect()
}

/// The `top_k` largest of each row, the largest first, of equal ones the first.
pub(super) fn largest(scores: &[f32], n_experts: usize, top_k: usize) -> Choices {
    let mut ids = Vec::with_capacity(scores.len() / n_experts.max(1) * top_k);
    let mut order: Vec<usize> = Vec::with_capacity(n_experts);
    for row in scores.chunks(n_experts.max(1)) {
        order.clear();
        order.extend(0..n_experts);
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        ids.extend(order.iter().take(top_k).map(|&expert| Some(expert)));
    }
    Choices { ids, top_k, n_experts }
}

/// Ones: what every choice counts where nothing weighs them.
pub(super) fn ones(tokens: usize, top_k: usize, device: &Device) -> Tensor<2> {
    Tensor::ones([tokens, top_k], device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, tensor};

    #[test]
    fn the_first_come_are_served_in_every_group() {
        let ids = [0, 1, 0, 0, 0, 1, 1, 1].map(Some).to_vec();
        let mut choices = Choices { ids, top_k: 2, n_experts: 2 };
        choices.prune(2, 4);
        assert_eq!(choices.ids, [Some(0), Some(1), Some(0), None, Some(0), Some(1), Some(1), None]);
        assert_eq!((choices.dropped(), choices.load()), (2, vec![3, 3]));
        assert_eq!(choices.numbers(), TensorData::from([[0i64, 1], [0, -1], [0, 1], [1, -1]]));
        let table = tensor([4, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], &Device::flex());
        assert_close(choices.pick(table), &[1.0, 2.0, 3.0, 3.0, 5.0, 6.0, 8.0, 7.0], 0.0);
    }

    #[test]
    fn the_largest_come_first_and_nothing_panics() {
        let choices = largest(&[0.1, 0.3, 0.2, 5.0, 5.0, f32::NAN], 3, 2);
        assert_eq!(choices.ids[..2], [Some(1), Some(2)]);
        assert_eq!(choices.ids.len(), 4);
        assert_eq!(largest(&[5.0, 1.0, 5.0], 3, 2).ids, [Some(0), Some(2)]);
    }
}
