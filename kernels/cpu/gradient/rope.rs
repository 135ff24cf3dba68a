//! Pairs of channels that are turned.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;

use super::{Nodes, Operation, primitive};
use crate::cpu::rope::Turns;

/// `x` turned; on the way back its gradient is turned backwards.
///
/// # Panics
/// If `x` is not [`is_tracked`](super::is_tracked).
pub fn turned(x: Tensor<4>, turns: Turns) -> Tensor<4> {
    let nodes = Nodes::of(&x);
    let y = turns.forward(x.inner());
    nodes.record(turns, y)
}

impl Operation<1> for Turns {
    fn backward(self, gradient: FlexTensor, _: [bool; 1]) -> [Option<FlexTensor>; 1] {
        let gradient = Tensor::<4>::from_primitive::<Flex>(gradient);
        [Some(primitive(self.transposed().forward(gradient)))]
    }
}
