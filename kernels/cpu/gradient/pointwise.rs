//! Activations, and softmax.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::{Nodes, Operation, primitive};
use crate::cpu::Instructions;
use crate::cpu::host::{Values, change};
use crate::cpu::pointwise::{Finish, Slope, SoftmaxSlope};
use crate::ops::{self, Activation};

/// `act(x)`.
///
/// # Panics
/// If `x` is not [`is_tracked`](super::is_tracked).
pub fn activated<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    let nodes = Nodes::of(&x);
    let x = x.inner();
    let y = activation.forward(x.clone());
    nodes.record(Activated::<D> { x: Values::of(x), activation }, y)
}

#[derive(Clone, Debug)]
struct Activated<const D: usize> {
    x: Values,
    activation: Activation,
}

impl<const D: usize> Operation<1> for Activated<D> {
    fn backward(self, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let Self { x, activation } = self;
        let gradient = change(Tensor::<D>::from_primitive::<Flex>(gradient), 1, |at, values| {
            let x = &x[at..at + values.len()];
            Instructions::in_use().run(Slope { values, x, activation });
        });
        [Some(primitive(gradient))]
    }
}

/// `act(gate) * x`, of the same shape.
///
/// # Panics
/// If not both are [`is_tracked`](super::is_tracked).
pub fn gated<const D: usize>(gate: Tensor<D>, x: Tensor<D>, activation: Activation) -> Tensor<D> {
    let nodes = Nodes::of(&gate).and(&x);
    let [gate, x] = [gate, x].map(Tensor::inner);
    let y = activation.gated(gate.clone(), x.clone());
    nodes.record(Gated { gate, x: Values::of(x), activation }, y)
}

#[derive(Clone, Debug)]
struct Gated<const D: usize> {
    gate: Tensor<D>,
    x: Values,
    activation: Activation,
}

impl<const D: usize> Operation<2> for Gated<D> {
    fn backward(self, gradient: FlexTensor, [to_gate, to_x]: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let Self { gate, x, activation } = self;
        let gradient = Tensor::<D>::from_primitive::<Flex>(gradient);
        let of_x = to_x.then(|| primitive(activation.gated(gate.clone(), gradient.clone())));
        let of_gate = to_gate.then(|| {
            let gate = Values::of(gate);
            primitive(change(gradient, 1, |at, values| {
                let own = at..at + values.len();
                Instructions::in_use().run(Slope { values, x: &gate[own.clone()], activation });
                let factors = Some(&x[own]);
                Instructions::in_use().run(Finish { values, bias: None, activation: None, factors });
            }))
        });
        [of_gate, of_x]
    }
}

/// Over the last axis.
///
/// # Panics
/// If `x` is not [`is_tracked`](super::is_tracked).
pub fn softmax<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    let nodes = Nodes::of(&x);
    let y = ops::softmax(x.inner());
    nodes.record(Softmax::<D>(Values::of(y.clone())), y)
}

/// What came of it.
#[derive(Clone, Debug)]
struct Softmax<const D: usize>(Values);

impl<const D: usize> Operation<1> for Softmax<D> {
    fn backward(self, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let gradient = Tensor::<D>::from_primitive::<Flex>(gradient);
        let width = gradient.dims()[D - 1].max(1);
        let gradient = change(gradient, width, |row, values| {
            let y = &self.0[row * width..row * width + values.len()];
            Instructions::in_use().run(SoftmaxSlope { values, y, width });
        });
        [Some(primitive(gradient))]
    }
}
