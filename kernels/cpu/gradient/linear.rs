//! Products with a weight.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Nodes, Operation, add_up, primitive};
use crate::cpu::host::{TASK, Values, tensor};
use crate::cpu::matmul::{Columns, Rows, product, turned};

/// `x Wᵀ + b`: `[rows, d_in] -> [rows, d_out]`; `weight` is `[d_out, d_in]`.
///
/// # Panics
/// If not all are [`is_tracked`](super::is_tracked), or their widths differ.
pub fn linear(x: Tensor<2>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<2> {
    let nodes = Nodes::of(&x).and(&weight);
    let [x, weight] = [x, weight].map(Tensor::inner);
    let ([rows, d_in], [d_out, _]) = (x.dims(), weight.dims());
    let linear = Linear { x: Values::of(x), weight: Values::of(weight), shape: [rows, d_in, d_out] };
    match bias {
        None => {
            let out = linear.forward(|_, _, _| ());
            nodes.record(linear, out)
        }
        Some(bias) => {
            let nodes = nodes.and(&bias);
            let bias = Values::of(bias.inner());
            assert_eq!(bias.len(), d_out, "width of a bias (left) and of what it is added to");
            let out = linear.forward(|_, first, values| {
                values.iter_mut().zip(&bias[first..]).for_each(|(value, bias)| *value += bias);
            });
            nodes.record(Biased(linear), out)
        }
    }
}

#[derive(Clone, Debug)]
struct Linear {
    x: Values,
    weight: Values,
    /// Rows, `d_in`, `d_out`.
    shape: [usize; 3],
}

impl Linear {
    fn forward(&self, finish: impl Fn(usize, usize, &mut [f32]) + Sync) -> Tensor<2> {
        let [rows, d_in, d_out] = self.shape;
        let out = product(&self.x, &[Columns::new(&self.weight, d_in)], self.shape, finish);
        tensor(out, [rows, d_out])
    }
}

impl Operation<2> for Linear {
    fn backward(self, gradient: FlexTensor, [to_x, to_weight]: [bool; 2]) -> [Option<FlexTensor>; 2] {
        let [rows, d_in, d_out] = self.shape;
        let gradient = Values::of(Tensor::<2>::from_primitive::<Flex>(gradient));
        let x = to_x.then(|| {
            let x = product(&gradient, &[Rows::new(&self.weight, d_in)], [rows, d_out, d_in], |_, _, _| ());
            primitive(tensor(x, [rows, d_in]))
        });
        let weight = to_weight.then(|| {
            let turned = turned(&gradient, [rows, d_out]);
            let weight = product(&turned, &[Rows::new(&self.x, d_in)], [d_out, rows, d_in], |_, _, _| ());
            primitive(tensor(weight, [d_out, d_in]))
        });
        [x, weight]
    }
}

/// With a bias.
#[derive(Clone, Debug)]
struct Biased(Linear);

impl Operation<3> for Biased {
    fn backward(
        self,
        gradient: FlexTensor,
        [to_x, to_weight, to_bias]: [bool; 3],
    ) -> [Option<FlexTensor>; 3] {
        let [_, _, d_out] = self.0.shape;
        let bias = to_bias.then(|| {
            let gradient = Values::of(Tensor::<2>::from_primitive::<Flex>(gradient.clone()));
            primitive(tensor(sums_of_columns(&gradient, d_out), [d_out]))
        });
        let [x, weight] = self.0.backward(gradient, [to_x, to_weight]);
        [x, weight, bias]
    }
}

/// Of rows of `width`; in one order whatever the threads are.
fn sums_of_columns(values: &[f32], width: usize) -> Vec<f32> {
    let rows = (TASK / width).max(1);
    let parts: Vec<Vec<f32>> = values
        .par_chunks(rows * width)
        .map(|part| {
            let mut sums = vec![0.0; width];
            part.chunks_exact(width).for_each(|row| add_up(&mut sums, row));
            sums
        })
        .collect();
    let mut sums = vec![0.0; width];
    parts.iter().for_each(|part| add_up(&mut sums, part));
    sums
}
