//! Rows that are normalised, scaled and moved.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Nodes, Operation, add_up, primitive};
use crate::cpu::Instructions;
use crate::cpu::host::{TASK, Values, tensor};
use crate::cpu::norm::RowNormSlope;
use crate::ops;

/// See [`ops::layer_norm`].
///
/// # Panics
/// If not all are [`is_tracked`](super::is_tracked), or their widths differ.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<1>,
    bias: Option<Tensor<1>>,
    eps: f64,
) -> Tensor<D> {
    let nodes = Nodes::of(&x).and(&weight);
    let (x, weight) = (x.inner(), weight.inner());
    let norm = Norm::<D> { x: Values::of(x.clone()), weight: Values::of(weight.clone()), eps, centred: true };
    match bias {
        None => nodes.record(norm, ops::layer_norm(x, weight, None, eps)),
        Some(bias) => {
            let nodes = nodes.and(&bias);
            nodes.record(Moved(norm), ops::layer_norm(x, weight, Some(bias.inner()), eps))
        }
    }
}

/// See [`ops::rms_norm`].
///
/// # Panics
/// If not both are [`is_tracked`](super::is_tracked), or their widths differ.
pub fn rms_norm<const D: usize>(x: Tensor<D>, weight: Tensor<1>, eps: f64) -> Tensor<D> {
    let nodes = Nodes::of(&x).and(&weight);
    let (x, weight) = (x.inner(), weight.inner());
    let norm =
        Norm::<D> { x: Values::of(x.clone()), weight: Values::of(weight.clone()), eps, centred: false };
    nodes.record(norm, ops::rms_norm(x, weight, eps))
}

#[derive(Clone, Debug)]
struct Norm<const D: usize> {
    x: Values,
    weight: Values,
    eps: f64,
    centred: bool,
}

impl<const D: usize> Norm<D> {
    /// Of `x`, of the weight, and of a bias.
    fn backward(self, gradient: FlexTensor) -> [FlexTensor; 3] {
        let Self { x, weight, eps, centred } = self;
        let gradient = Tensor::<D>::from_primitive::<Flex>(gradient);
        let (shape, width) = (gradient.dims(), weight.len());
        let gradient = Values::of(gradient);
        let mut of_x = vec![0.0; x.len()];
        let size = (TASK / width.max(1)).max(1) * width.max(1);
        let parts = of_x.par_chunks_mut(size).zip(x.par_chunks(size)).zip(gradient.par_chunks(size));
        // in one order whatever the threads are
        let parts: Vec<[Vec<f32>; 2]> = parts
            .map(|((values, x), gradient)| {
                let mut sums = [(); 2].map(|()| vec![0.0; width]);
                let [of_weight, of_bias] = &mut sums;
                let weight = &*weight;
                Instructions::in_use().run(RowNormSlope {
                    values,
                    x,
                    gradient,
                    weight,
                    of_weight,
                    of_bias,
                    eps,
                    centred,
                });
                sums
            })
            .collect();
        let mut sums = [(); 2].map(|()| vec![0.0_f32; width]);
        for part in &parts {
            sums.iter_mut().zip(part).for_each(|(sums, part)| add_up(sums, part));
        }
        let [of_weight, of_bias] = sums.map(|sums| primitive(tensor(sums, [width])));
        [primitive(tensor(of_x, shape)), of_weight, of_bias]
    }
}

impl<const D: usize> Operation<2> for Norm<D> {
    fn backward(self, gradient: FlexTensor, _: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let [of_x, of_weight, _] = self.backward(gradient);
        [Some(of_x), Some(of_weight)]
    }
}

/// With a bias.
#[derive(Clone, Debug)]
struct Moved<const D: usize>(Norm<D>);

impl<const D: usize> Operation<3> for Moved<D> {
    fn backward(self, gradient: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        self.0.backward(gradient).map(Some)
    }
}
