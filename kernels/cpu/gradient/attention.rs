//! Attention whose scores are worked out once more on the way back, block by block (Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>): they are never kept.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Nodes, Operation, primitive};
use crate::cpu::Instructions;
use crate::cpu::attention::{Sizes, scale_scores};
use crate::cpu::host::{self, Values, tensor};
use crate::cpu::matmul::{Columns, Right, Rows, Sums, add, turned};
use crate::cpu::pointwise::{Softmax, SoftmaxSlope};

/// Queries whose scores are worked out at a time.
const QUERIES: usize = 64;

/// `softmax(q kᵀ · scale + bias) v` of each head: `[batch, heads, queries, d_value]`.
///
/// - `query`: `[batch, heads, queries, d_head]`
/// - `key`, `value`: `[batch, kv_heads, keys, ..]`, each serves `heads / kv_heads` heads of queries that follow each other
/// - `bias`: of all scores, `[batch, heads, queries, keys]`, without gradients
/// - `forward`: what gives it of tensors without gradients
///
/// # Panics
/// If not all are [`is_tracked`](super::is_tracked).
pub fn attention(
    [query, key, value]: [Tensor<4>; 3],
    bias: Option<Tensor<4>>,
    sizes: Sizes,
    forward: impl FnOnce([Tensor<4>; 3]) -> Tensor<4>,
) -> Tensor<4> {
    let nodes = Nodes::of(&query).and(&key).and(&value);
    let inputs = [query, key, value].map(Tensor::inner);
    let out = forward(inputs.clone());
    let ([batch, heads, ..], [_, kv_heads, ..]) = (inputs[0].dims(), inputs[1].dims());
    nodes.record(Attention { inputs: inputs.map(Values::of), bias, batch, heads, kv_heads, sizes }, out)
}

#[derive(Clone, Debug)]
struct Attention {
    /// Queries, keys and values.
    inputs: [Values; 3],
    bias: Option<Tensor<4>>,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    sizes: Sizes,
}

impl Operation<3> for Attention {
    fn backward(self, gradient: FlexTensor, _: [bool; 3]) -> [Option<FlexTensor>; 3] {
        let Self { inputs: [query, key, value], bias, batch, heads, kv_heads, sizes } = self;
        let Sizes { queries, keys, d_head, d_value, .. } = sizes;
        let gradient = Values::of(Tensor::<4>::from_primitive::<Flex>(gradient));
        let (bias, group) = (bias.map(host::Rows::held), heads / kv_heads);
        let lengths = [group * queries * d_head, keys * d_head, keys * d_value].map(|length| length.max(1));
        let mut out = [&query, &key, &value].map(|values| vec![0.0; values.len()]);
        let [of_query, of_key, of_value] = &mut out;
        let heads_of_keys = of_query
            .par_chunks_mut(lengths[0])
            .zip(of_key.par_chunks_mut(lengths[1]))
            .zip(of_value.par_chunks_mut(lengths[2]));
        heads_of_keys.enumerate().for_each(|(at, ((of_query, of_key), of_value))| {
            let part = |values: &Values, length: usize| at * length..values.len().min((at + 1) * length);
            let group = Group {
                query: &query[part(&query, lengths[0])],
                key: &key[part(&key, lengths[1])],
                value: &value[part(&value, lengths[2])],
                gradient: &gradient[part(&gradient, group * queries * d_value)],
                bias: bias.as_ref().map(|bias| (bias, [at / kv_heads, at % kv_heads * group])),
                sizes,
            };
            group.backward(of_query, of_key, of_value);
        });
        let [of_query, of_key, of_value] = out;
        [
            primitive(tensor(of_query, [batch, heads, queries, d_head])),
            primitive(tensor(of_key, [batch, kv_heads, keys, d_head])),
            primitive(tensor(of_value, [batch, kv_heads, keys, d_value])),
        ]
        .map(Some)
    }
}

/// Heads of queries that share keys.
struct Group<'a> {
    /// `[heads, queries, d_head]`
    query: &'a [f32],
    /// `[keys, d_head]`
    key: &'a [f32],
    /// `[keys, d_value]`
    value: &'a [f32],
    /// `[heads, queries, d_value]`
    gradient: &'a [f32],
    /// With the place of the first head's.
    bias: Option<(&'a host::Rows<f32>, [usize; 2])>,
    sizes: Sizes,
}

impl Group<'_> {
    /// Each is as long as what it is the gradient of.
    fn backward(&self, of_query: &mut [f32], of_key: &mut [f32], of_value: &mut [f32]) {
        let Sizes { queries, keys, d_head, d_value, scale, .. } = self.sizes;
        let [mut key_sums, mut value_sums] = [d_head, d_value].map(|width| Sums::zeros(keys, width));
        let (key_columns, value_columns) =
            (Columns::new(self.key, d_head), Columns::new(self.value, d_value));
        for head in 0..of_query.len() / (queries * d_head) {
            for first in (0..queries).step_by(QUERIES) {
                let count = QUERIES.min(queries - first);
                let rows = head * queries + first..head * queries + first + count;
                let query = &self.query[rows.start * d_head..rows.end * d_head];
                let gradient = &self.gradient[rows.start * d_value..rows.end * d_value];

                let mut weights = product(query, &key_columns, [count, d_head, keys]);
                for (row, weights) in (first..).zip(weights.chunks_mut(keys)) {
                    let bias =
                        self.bias.map(|(bias, [batch, first])| bias.at([batch, first + head]).row(row));
                    scale_scores::<false>(weights, scale, bias);
                    weights[self.sizes.seen(row)..].fill(f32::NEG_INFINITY);
                }
                Instructions::in_use().run(Softmax { values: &mut weights, width: keys });
                add(
                    &turned(&weights, [count, keys]),
                    &Rows::new(gradient, d_value),
                    count,
                    0..d_value,
                    &mut value_sums,
                );

                let mut slopes = product(gradient, &value_columns, [count, d_value, keys]);
                Instructions::in_use().run(SoftmaxSlope { values: &mut slopes, y: &weights, width: keys });
                slopes.iter_mut().for_each(|slope| *slope *= scale);
                add(
                    &turned(&slopes, [count, keys]),
                    &Rows::new(query, d_head),
                    count,
                    0..d_head,
                    &mut key_sums,
                );
                let of_rows = product(&slopes, &Rows::new(self.key, d_head), [count, keys, d_head]);
                of_query[rows.start * d_head..rows.end * d_head].copy_from_slice(&of_rows);
            }
        }
        put(key_sums, d_head, of_key);
        put(value_sums, d_value, of_value);
    }
}

/// On the calling thread.
fn product(x: &[f32], right: &impl Right<f32>, [rows, inner, columns]: [usize; 3]) -> Vec<f32> {
    let mut sums = Sums::zeros(rows, columns);
    add(x, right, inner, 0..columns, &mut sums);
    let mut out = vec![0.0; rows * columns];
    put(sums, columns, &mut out);
    out
}

fn put(mut sums: Sums, columns: usize, out: &mut [f32]) {
    for (sums, out) in sums.rows().zip(out.chunks_mut(columns.max(1))) {
        out.copy_from_slice(sums);
    }
}
