//! Experts of other ranks as one operation of Burn's autodiff.
//!
//! Each rank computes the rows that come to it in a graph of its own, which begins at these rows and at its experts and ends
//! where they leave again. In the model's graph all this is one node, whose parents are the rows that leave and this rank's
//! experts; its backward pass sends gradients where the rows went, runs the graphs there, and brings back what comes out.
//! So the model's graph has the same form on every rank, whatever the load, and ranks meet in the same order. Rows of copied
//! experts have one more such graph, which begins at the copies; their gradients go home at the end of the backward pass,
//! whether or not a rank had rows.

use std::marker::PhantomData;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients as Nodes;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::ops::FloatTensorOps;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Autodiff, DispatchKindConversion, DispatchTensor, Flex};
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};

use super::journey::Journey;
use super::shadows::Shadows;
use crate::cpu::gradient::{node, primitive};
use crate::moe::Experts;
use crate::ops::Activation;
use crate::ops::moe::{Dispatch, combine, permute};

/// `[rows, d_model] -> [rows, d_model]`, each through its expert, wherever that is.
///
/// - `experts`: those of this rank
/// - `shadows`: those of all ranks whose rows stay
///
/// # Panics
/// If rows and experts are on different devices, gradients are wanted anywhere but on the CPU, or another rank has ended.
pub(super) fn remote(
    rows: Tensor<2>,
    experts: &Experts,
    activation: Activation,
    journey: Journey,
    shadows: Shadows,
) -> Tensor<2> {
    let device = rows.device();
    let mut own = Own { is_tracked: rows.is_tracked(), device: &device };
    experts.visit(&mut own);
    if !own.is_tracked {
        let copies = shadows.copy(experts);
        let work = |here, experts: &Experts, dispatch: &Dispatch| {
            locally(tensor(here, &device), experts, activation, dispatch).into_data()
        };
        let out = journey.travel(
            rows.into_data(),
            |at, here| work(here, experts, &journey.chunks[at].dispatch),
            |here| work(here, copies.as_ref().expect(COPIES), &journey.staying),
        );
        return tensor(out, &device);
    }
    match rows.clone().try_into_primitive::<Autodiff<Flex, NoCheckpointing>>() {
        Ok(_) => record::<NoCheckpointing>(rows, experts, activation, journey, shadows),
        Err(_) => record::<BalancedCheckpointing>(rows, experts, activation, journey, shadows),
    }
}

const COPIES: &str = "rows stay whose experts are copied";

/// Whether gradients are wanted.
struct Own<'a> {
    is_tracked: bool,
    device: &'a Device,
}

impl ModuleVisitor for Own<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        assert_eq!(value.device(), *self.device, "where experts (left) and rows are");
        self.is_tracked |= value.is_tracked();
    }
}

/// Rows that came together, each through its expert.
fn locally(rows: Tensor<2>, experts: &Experts, activation: Activation, dispatch: &Dispatch) -> Tensor<2> {
    let ones = Tensor::ones([dispatch.rows(), 1], (&rows.device(), rows.dtype()));
    let sorted = permute(rows, dispatch);
    combine(experts.forward(sorted, activation, dispatch), ones, dispatch)
}

/// The forward pass, and its node in the model's graph.
fn record<C: CheckpointStrategy>(
    rows: Tensor<2>,
    experts: &Experts,
    activation: Activation,
    journey: Journey,
    shadows: Shadows,
) -> Tensor<2>
where
    DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
{
    let device = rows.device();
    let mut parents = Parents::<C> { nodes: Vec::with_capacity(PARENTS), checkpointing: PhantomData };
    parents.add(rows.clone());
    experts.visit(&mut parents);
    parents.nodes.resize_with(PARENTS, || node::<1, C>(&Tensor::zeros([1], &device)));
    let nodes =
        <[NodeGuard; PARENTS]>::try_from(parents.nodes).expect("experts have at most three projections");

    let leaves = experts.clone().map(&mut Leaves);
    let copies = shadows.copy(experts);
    let mut graphs = Graphs { of_chunks: journey.chunks.iter().map(|_| None).collect(), of_copies: None };
    let work = |here, experts: &Experts, dispatch: &Dispatch| {
        let here = tensor(here, &device).require_grad();
        let out = locally(here.clone(), experts, activation, dispatch);
        (out.clone().into_data(), Some(Graph { here, out }))
    };
    let out = journey.travel(
        rows.inner().into_data(),
        |at, here| {
            let (out, graph) = work(here, &leaves, &journey.chunks[at].dispatch);
            graphs.of_chunks[at] = graph;
            out
        },
        |here| {
            let (out, graph) = work(here, copies.as_ref().expect(COPIES), &journey.staying);
            graphs.of_copies = graph;
            out
        },
    );
    let out = primitive(tensor(out, &device.clone().inner()));
    let tape = Tape {
        journey: Arc::new(journey),
        shadows: Arc::new(shadows),
        experts: leaves,
        copies,
        graphs: Arc::new(Mutex::new(graphs)),
        device,
    };
    let out = match Remote.prepare::<C>(nodes).compute_bound().stateful() {
        OpsKind::Tracked(node) => node.finish(tape, out),
        OpsKind::UnTracked(node) => node.finish(out),
    };
    Tensor::from_primitive::<Autodiff<Flex, C>>(out)
}

/// The rows, and weight and bias of three projections.
const PARENTS: usize = 7;

/// What the node's gradient goes on to.
struct Parents<C> {
    nodes: Vec<NodeGuard>,
    checkpointing: PhantomData<C>,
}

impl<C: CheckpointStrategy> Parents<C>
where
    DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
{
    fn add<const D: usize>(&mut self, tensor: Tensor<D>) {
        self.nodes.push(node::<D, C>(&tensor));
    }
}

impl<C: CheckpointStrategy> ModuleVisitor for Parents<C>
where
    DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
{
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.add(param.val());
    }
}

/// Where the graph of this rank's experts begins.
struct Leaves;

impl ModuleMapper for Leaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|value| {
            let is_tracked = value.is_tracked();
            value.detach().set_require_grad(is_tracked)
        })
    }
}

/// What the backward pass needs.
#[derive(Clone, Debug)]
struct Tape {
    journey: Arc<Journey>,
    shadows: Arc<Shadows>,
    experts: Experts,
    /// Of the experts that are copied, if any are.
    copies: Option<Experts>,
    graphs: Arc<Mutex<Graphs>>,
    device: Device,
}

/// Where there were rows.
#[derive(Debug)]
struct Graphs {
    of_chunks: Vec<Option<Graph>>,
    of_copies: Option<Graph>,
}

/// What came here with a chunk and what left again, or what stayed and what became of it.
#[derive(Debug)]
struct Graph {
    here: Tensor<2>,
    out: Tensor<2>,
}

#[derive(Debug)]
struct Remote;

impl Backward<Flex, PARENTS> for Remote {
    type State = Tape;

    fn backward(self, ops: Ops<Tape, PARENTS>, nodes: &mut Nodes, _: &mut Checkpointer) {
        let Tape { journey, shadows, experts, copies, graphs, device } = ops.state;
        let mut graphs = graphs.lock().unwrap_or_else(PoisonError::into_inner);
        let Graphs { of_chunks, of_copies } = &mut *graphs;
        let [mut sums, mut sums_of_copies] = [(); 2].map(|()| Sums::default());
        let back = |graph: Option<Graph>, gradient, experts: &Experts, sums: &mut Sums| {
            let Graph { here, out } =
                graph.expect("there were rows, and the graph is gone back through once");
            let gradients = (out * tensor(gradient, &device)).sum().backward();
            let of_rows = here.grad(&gradients).expect("the graph begins at these rows");
            sums.add(experts, Some(gradients));
            of_rows.into_data()
        };
        let gradient = Tensor::<2>::from_primitive::<Flex>(nodes.consume::<Flex>(&ops.node));
        let gradient = journey.travel(
            gradient.into_data(),
            |at, gradient| back(of_chunks[at].take(), gradient, &experts, &mut sums),
            |gradient| {
                let copies = copies.as_ref().expect(COPIES);
                back(of_copies.take(), gradient, copies, &mut sums_of_copies)
            },
        );
        let mut of_experts = sums.of(&experts);
        if let Some(copies) = &copies {
            shadows.bring_home(&experts, &mut of_experts, sums_of_copies.of(copies));
        }
        let of_rows = primitive(tensor(gradient, &device.clone().inner()));
        for (parent, gradient) in ops.parents.into_iter().zip(std::iter::once(of_rows).chain(of_experts)) {
            if let Some(parent) = parent {
                nodes.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// The gradients of experts, summed over chunks, in the order of their parameters.
#[derive(Default)]
struct Sums {
    /// Of a chunk, if it had rows.
    gradients: Option<Gradients>,
    sums: Vec<FloatTensor<Flex>>,
    at: usize,
}

impl Sums {
    fn add(&mut self, experts: &Experts, gradients: Option<Gradients>) {
        (self.gradients, self.at) = (gradients, 0);
        experts.visit(self);
    }

    /// Zeros where nothing was added.
    fn of(mut self, experts: &Experts) -> Vec<FloatTensor<Flex>> {
        if self.sums.is_empty() {
            self.add(experts, None);
        }
        self.sums
    }
}

impl ModuleVisitor for Sums {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        let gradient = self.gradients.as_ref().and_then(|gradients| value.grad(gradients));
        let gradient = primitive(gradient.unwrap_or_else(|| value.inner().zeros_like()));
        match self.sums.get_mut(self.at) {
            Some(sum) => *sum = Flex::float_add(sum.clone(), gradient),
            None => self.sums.push(gradient),
        }
        self.at += 1;
    }
}

fn tensor(data: TensorData, device: &Device) -> Tensor<2> {
    let dtype = data.dtype();
    Tensor::from_data(data, (device, dtype))
}
