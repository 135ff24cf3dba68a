//! Momentum contrast: a slow copy of the model writes what a queue keeps, and the model tells its own pair from the
//! queue (He et al. 2019, <https://arxiv.org/abs/1911.05722>).

use std::collections::VecDeque;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Distribution, Int, Tensor, TensorData};

/// The last embeddings of a momentum tower, the oldest written over first. It is state and not learned.
#[derive(Module, Debug)]
pub struct Queue {
    /// An embedding a column, `[d_embed, size]`.
    pub entries: Param<Tensor<2>>,
    /// The column that is written next, `[1]`.
    pub next: Param<Tensor<1, Int>>,
}

impl Queue {
    /// Random unit vectors, to be written over from the first on. Nothing is allocated before first use.
    pub fn new(d_embed: usize, size: usize, device: &Device) -> Self {
        let shape = [d_embed, size];
        let entries = move |device: &Device, _: bool| {
            let noise = Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), device);
            noise.clone() / noise.square().sum_dim(0).sqrt().clamp_min(1e-12)
        };
        let next = |device: &Device, _: bool| Tensor::<1, Int>::zeros([1], device);
        Self {
            entries: Param::uninitialized(ParamId::new(), entries, device.clone(), false, shape.into()),
            next: Param::uninitialized(ParamId::new(), next, device.clone(), false, [1].into()),
        }
    }

    /// Takes in embeddings, `[batch, d_embed]`, in order, going on at the first column after the last. Of more than
    /// fit, the last stay.
    ///
    /// # Panics
    /// If they are of another width.
    pub fn enqueue(self, embeddings: Tensor<2>) -> Self {
        let [d_embed, size] = self.entries.dims();
        let [batch, width] = embeddings.dims();
        assert_eq!(width, d_embed, "embeddings (left) are as wide as the queue's");
        let kept = batch.min(size);
        if kept == 0 {
            return self;
        }
        let next = self.next.val().into_scalar::<i64>().rem_euclid(size as i64) as usize;
        let first = (next + batch - kept) % size;
        let columns = embeddings.detach().narrow(0, batch - kept, kept).transpose(); // [d_embed, kept]
        let to_end = kept.min(size - first);
        let write = |entries: Tensor<2>, first: usize, columns: Tensor<2>| {
            let [_, count] = columns.dims();
            entries.slice_assign([0..d_embed, first..first + count], columns)
        };
        let next = (next + batch) % size;
        Self {
            entries: self.entries.map(|entries| {
                let entries = write(entries.detach(), first, columns.clone().narrow(1, 0, to_end));
                match kept - to_end {
                    0 => entries,
                    rest => write(entries, 0, columns.narrow(1, to_end, rest)),
                }
            }),
            next: self
                .next
                .map(|old| Tensor::from_data(TensorData::from([next as i64]), (&old.device(), old.dtype()))),
        }
    }

    /// Cosines over `temperature` of each query with its own counterpart and with every entry: unit vectors
    /// `[batch, d_embed]` both, `-> [batch, 1 + size]`, the own one first. Gradients reach the queries alone.
    pub fn logits(&self, queries: Tensor<2>, counterparts: Tensor<2>, temperature: f64) -> Tensor<2> {
        let own = (queries.clone() * counterparts.detach()).sum_dim(1); // [batch, 1]
        let others = queries.matmul(self.entries.val().detach()); // [batch, size]
        Tensor::cat(vec![own, others], 1) / temperature
    }
}

/// The cross-entropy of [`Queue::logits`], mean of the rows: `[batch, 1 + size] -> [1]`.
pub fn queue_cross_entropy(logits: Tensor<2>) -> Tensor<1> {
    -log_softmax(logits, 1).narrow(1, 0, 1).mean()
}

/// `share` of the slow copy's parameters and the rest of the model's: `θₖ ← m θₖ + (1 - m) θ_q` (equation 2). With a
/// share of 0 it becomes the model. What is no parameter (running statistics) stays, and nothing of it requires gradients.
///
/// # Panics
/// If the two are not of one shape.
pub fn momentum_update<M: Module>(slow: M, model: &M, share: f64) -> M {
    let mut parameters = Parameters::default();
    model.visit(&mut parameters);
    let slow = slow.map(&mut Follow { parameters: parameters.found, share, place: Place::default() });
    slow.no_grad()
}

/// Where in a module a visitor is.
#[derive(Default)]
struct Place(Vec<String>);

impl Place {
    /// Whether what is here is a running statistic and no parameter.
    fn is_running(&self) -> bool {
        self.0.last().is_some_and(|name| name.starts_with("running_"))
    }
}

/// All float parameters, flat, in order.
#[derive(Default)]
struct Parameters {
    found: VecDeque<Tensor<1>>,
    place: Place,
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if !self.place.is_running() {
            self.found.push_back(param.val().detach().flatten(0, D - 1));
        }
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.place.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.place.0.pop();
    }
}

/// Moves parameters towards others, which come in the same order.
struct Follow {
    parameters: VecDeque<Tensor<1>>,
    share: f64,
    place: Place,
}

impl ModuleMapper for Follow {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        if self.place.is_running() {
            return param;
        }
        let Some(model) = self.parameters.pop_front() else {
            panic!("the slow copy has a parameter at {} that the model lacks", self.place.0.join("."));
        };
        param.map(|slow| {
            let model = model.reshape(slow.dims());
            slow.detach() * self.share + model * (1.0 - self.share)
        })
    }

    fn enter_module(&mut self, name: &str, _: &str) {
        self.place.0.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.place.0.pop();
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;
    use volary_kernels::layers::{BatchNorm, Linear, LinearConfig, Mlp, MlpConfig};

    use super::*;

    /// Embeddings 2 wide, `[i, -i]` for each `i` from `first` on.
    fn numbered(first: usize, count: usize) -> Tensor<2> {
        let rows: Vec<f32> = (first..first + count).flat_map(|i| [i as f32, -(i as f32)]).collect();
        Tensor::from_data(TensorData::new(rows, [count, 2]), &Device::flex())
    }

    fn empty(size: usize, next: i64) -> Queue {
        let device = Device::flex();
        Queue {
            entries: Param::from_tensor(Tensor::zeros([2, size], &device)),
            next: Param::initialized(ParamId::new(), Tensor::from_data([next], &device)),
        }
    }

    fn state(queue: &Queue) -> (Vec<f32>, i64) {
        let [_, size] = queue.entries.dims();
        let values: Vec<f32> = queue.entries.val().into_data().iter::<f32>().collect();
        assert!((0..size).all(|at| values[at] == -values[size + at]), "embeddings stay together");
        (values[..size].to_vec(), queue.next.val().into_scalar::<i64>())
    }

    #[test]
    fn writing_goes_on_at_the_front() {
        let queue = empty(5, 3).enqueue(numbered(1, 4));
        assert_eq!(state(&queue), (vec![3.0, 4.0, 0.0, 1.0, 2.0], 2));
    }

    /// Whatever the batches, a queue holds the last `size` of all, each where its number says.
    #[test]
    fn the_last_ones_stay() {
        for size in 1..7 {
            for batches in [&[1, 1, 1, 1, 1, 1, 1][..], &[2, 3, 4], &[5, 0, 6], &[13], &[6, 6], &[3, 9, 1]] {
                let mut queue = empty(size, 0);
                let mut expected = vec![0.0; size];
                let mut written = 0;
                for &batch in batches {
                    queue = queue.enqueue(numbered(100 + written, batch));
                    (written..written + batch).for_each(|i| expected[i % size] = (100 + i) as f32);
                    written += batch;
                }
                assert_eq!(state(&queue), (expected, (written % size) as i64), "{size} {batches:?}");
            }
        }
    }

    #[test]
    fn a_place_outside_of_the_queue_is_inside_again() {
        for next in [-1, 4, 14] {
            assert_eq!(state(&empty(5, next).enqueue(numbered(7, 1))), (vec![0.0, 0.0, 0.0, 0.0, 7.0], 0));
        }
    }

    #[test]
    fn a_new_queue_has_unit_vectors() {
        let queue = Queue::new(3, 8, &Device::flex());
        let lengths = queue.entries.val().square().sum_dim(0).into_data();
        lengths.assert_approx_eq::<f32>(&TensorData::from([[1.0f32; 8]]), Tolerance::absolute(1e-5));
        assert_eq!(queue.next.val().into_scalar::<i64>(), 0);
    }

    /// The own pair has a cosine of 1, the two entries 0 and -1.
    #[test]
    fn scores_of_a_queue() {
        let device = Device::flex();
        let entries = Tensor::from_data([[0.0, -1.0], [1.0, 0.0]], &device);
        let queue = Queue { entries: Param::from_tensor(entries), ..empty(2, 0) };
        let pair = Tensor::<2>::from_data([[1.0, 0.0]], &device);
        let logits = queue.logits(pair.clone(), pair, 0.5);
        logits.clone().into_data().assert_eq(&TensorData::from([[2.0f32, 0.0, -2.0]]), true);
        let expected = (1.0 + (-2f32).exp() + (-4f32).exp()).ln();
        let loss = queue_cross_entropy(logits).into_data();
        loss.assert_approx_eq::<f32>(&TensorData::from([expected]), Tolerance::default());
    }

    #[test]
    fn no_gradient_reaches_queue_and_counterparts() {
        let device = Device::flex().autodiff();
        let queue = Queue::new(3, 4, &device);
        let leaf = || Tensor::<2>::ones([2, 3], &device).require_grad();
        let (queries, counterparts) = (leaf(), leaf());
        let loss = queue_cross_entropy(queue.logits(queries.clone(), counterparts.clone(), 1.0));
        let gradients = loss.backward();
        assert!(queries.grad(&gradients).is_some());
        assert!(counterparts.grad(&gradients).is_none());
        assert!(queue.entries.val().grad(&gradients).is_none());
    }

    fn constant(value: f32, bias: f32) -> Linear {
        let device = Device::flex();
        Linear {
            weight: Param::from_tensor(Tensor::full([1, 2], value, &device)),
            bias: Some(Param::from_tensor(Tensor::full([1], bias, &device))),
        }
    }

    #[test]
    fn a_slow_copy_moves_by_what_is_left_of_its_share() {
        let moved = momentum_update(constant(4.0, 0.0), &constant(8.0, -8.0), 0.75);
        moved.weight.val().into_data().assert_eq(&TensorData::from([[5.0f32, 5.0]]), true);
        moved.bias.unwrap().val().into_data().assert_eq(&TensorData::from([-2.0f32]), true);
    }

    #[test]
    fn a_share_of_none_or_all_copies_or_keeps() {
        let device = Device::flex();
        let (slow, model) = (MlpConfig::new(3, 5).init(&device), MlpConfig::new(3, 5).init(&device));
        let values = |mlp: &Mlp| [&mlp.up, &mlp.down].map(|linear| linear.weight.val().into_data());
        for (share, expected) in [(0.0, values(&model)), (1.0, values(&slow))] {
            let moved = values(&momentum_update(slow.clone(), &model, share));
            moved.iter().zip(&expected).for_each(|(moved, expected)| moved.assert_eq(expected, true));
        }
    }

    #[test]
    fn running_statistics_stay() {
        let device = Device::flex();
        let (slow, mut model) = (BatchNorm::new(2, 1e-5, &device), BatchNorm::new(2, 1e-5, &device));
        model.running_mean.update(Tensor::ones([2], &device));
        model.weight = Param::from_tensor(Tensor::full([2], 3.0, &device));
        let moved = momentum_update(slow, &model, 0.0);
        moved.weight.val().into_data().assert_eq(&TensorData::from([3.0f32, 3.0]), true);
        moved.running_mean.value_sync().into_data().assert_eq(&TensorData::from([0.0f32, 0.0]), true);
    }

    #[test]
    fn a_slow_copy_requires_no_gradients() {
        let device = Device::flex().autodiff();
        let layer = || LinearConfig::new(2, 1).init(&device);
        assert!(layer().weight.val().is_require_grad());
        assert!(!momentum_update(layer(), &layer(), 0.5).weight.val().is_require_grad());
    }
}
