//! Operations of Burn's autodiff whose both directions are bodies of ours.

mod attention;
mod linear;
mod norm;
mod pointwise;
mod rope;

pub use attention::attention;
pub use linear::linear;
pub use norm::{layer_norm, rms_norm};
pub use pointwise::{activated, gated, softmax};
pub use rope::turned;

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{
    BalancedCheckpointing, CheckpointStrategy, NoCheckpointing,
};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::{Autodiff, DispatchKindConversion, DispatchTensor, Flex};
use burn::tensor::{DType, Device, Tensor};

/// Whether a tensor of f32 lies in this machine's memory, and gradients may be wanted.
pub fn is_tracked<const D: usize>(x: &Tensor<D>) -> bool {
    let device = x.device();
    device.is_autodiff() && device.inner() == Device::flex() && x.dtype() == DType::F32
}

/// What an operation keeps for its backward pass.
trait Operation<const N: usize>: Clone + Debug + Send + 'static {
    /// Gradients of what goes in, of the gradient of what comes out; at least those that are wanted.
    fn backward(self, gradient: FlexTensor, wanted: [bool; N]) -> [Option<FlexTensor>; N];
}

/// What goes into an operation, in the graph of gradients.
struct Nodes<const N: usize> {
    nodes: [NodeGuard; N],
    /// Whether the graph computes cheap operations once more on the way back.
    is_balanced: bool,
}

impl Nodes<1> {
    fn of<const D: usize>(x: &Tensor<D>) -> Self {
        match x.clone().try_into_primitive::<Autodiff<Flex, NoCheckpointing>>() {
            Ok(x) => Self { nodes: [x.node()], is_balanced: false },
            Err(_) => Self { nodes: [node::<D, BalancedCheckpointing>(x)], is_balanced: true },
        }
    }

    fn and<const D: usize>(self, other: &Tensor<D>) -> Nodes<2> {
        let other = self.like(other);
        let [node] = self.nodes;
        Nodes { nodes: [node, other], is_balanced: self.is_balanced }
    }
}

impl Nodes<2> {
    fn and<const D: usize>(self, other: &Tensor<D>) -> Nodes<3> {
        let other = self.like(other);
        let [first, second] = self.nodes;
        Nodes { nodes: [first, second, other], is_balanced: self.is_balanced }
    }
}

impl<const N: usize> Nodes<N> {
    /// Another one, of the same graph.
    fn like<const D: usize>(&self, other: &Tensor<D>) -> NodeGuard {
        match self.is_balanced {
            true => node::<D, BalancedCheckpointing>(other),
            false => node::<D, NoCheckpointing>(other),
        }
    }

    /// `out`, which came of them, with the way back.
    fn record<O: Operation<N>, const D: usize>(self, operation: O, out: Tensor<D>) -> Tensor<D> {
        match self.is_balanced {
            true => self.recorded::<O, BalancedCheckpointing, D>(operation, out),
            false => self.recorded::<O, NoCheckpointing, D>(operation, out),
        }
    }

    fn recorded<O: Operation<N>, C: CheckpointStrategy, const D: usize>(
        self,
        operation: O,
        out: Tensor<D>,
    ) -> Tensor<D>
    where
        DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
    {
        let out = primitive(out);
        let step = Step::<O>(PhantomData);
        let out = match step.prepare::<C>(self.nodes).compute_bound().stateful() {
            OpsKind::Tracked(node) => node.finish(operation, out),
            OpsKind::UnTracked(node) => node.finish(out),
        };
        Tensor::from_primitive::<Autodiff<Flex, C>>(out)
    }
}

/// The way back through an operation.
#[derive(Debug)]
struct Step<O>(PhantomData<O>);

impl<O: Operation<N>, const N: usize> Backward<Flex, N> for Step<O> {
    type State = O;

    fn backward(self, ops: Ops<O, N>, gradients: &mut Gradients, _: &mut Checkpointer) {
        let gradient = gradients.consume::<Flex>(&ops.node);
        let wanted = ops.parents.each_ref().map(Option::is_some);
        for (parent, gradient) in ops.parents.into_iter().zip(ops.state.backward(gradient, wanted)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                gradients.register::<Flex>(parent.id, gradient);
            }
        }
    }
}

/// Adds to each sum its value.
fn add_up(sums: &mut [f32], values: &[f32]) {
    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
}

/// A tensor in the graph of gradients.
///
/// # Panics
/// If its gradients are not computed on the CPU, or in another way.
pub fn node<const D: usize, C: CheckpointStrategy>(x: &Tensor<D>) -> NodeGuard
where
    DispatchTensor: DispatchKindConversion<Autodiff<Flex, C>>,
{
    let x = x.clone().try_into_primitive::<Autodiff<Flex, C>>();
    x.expect("all tensors have gradients, on the CPU and in the same way").node()
}

/// A tensor without gradients, as Burn's backend has it.
///
/// # Panics
/// If it is not on the CPU.
pub fn primitive<const D: usize>(x: Tensor<D>) -> FlexTensor {
    x.try_into_primitive::<Flex>().expect("the tensor is on the CPU, without gradients")
}
