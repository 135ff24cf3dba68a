//! Pairs of channels are turned in place.

use burn::tensor::Tensor;

use super::host::{Values, change};
use super::instructions::{Body, Instructions};
use super::pointwise::fma;
use crate::ops::Pairing;

/// How the first channels of heads are turned.
#[derive(Clone, Debug)]
pub struct Turns {
    /// Of their positions' angles, `[batch or 1, 1, seq, pairs]`.
    pub cos: Tensor<4>,
    /// As `cos`.
    pub sin: Tensor<4>,
    pub pairing: Pairing,
}

impl Turns {
    /// `[batch, heads, seq, d_head]`, in place where nobody else holds it.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let ([_, heads, seq, d_head], [.., pairs]) = (x.dims(), self.cos.dims());
        let [cos, sin] = [&self.cos, &self.sin].map(|angles| Values::of(angles.clone()));
        change(x, d_head, |first, values| {
            let (cos, sin, pairing) = (&*cos, &*sin, self.pairing);
            let turn = Turn { values, first, heads, seq, d_head, cos, sin, pairs, pairing };
            Instructions::in_use().run(turn);
        })
    }

    /// The other way round. What `forward` also takes times a factor is taken times that again: it is the transpose.
    #[cfg(feature = "autodiff")]
    pub fn transposed(self) -> Self {
        Self { sin: self.sin.neg(), ..self }
    }
}

/// The first channels of heads are turned by their positions' angles.
struct Turn<'a> {
    /// Whole rows of `d_head`, of `[batch, heads, seq, d_head]`.
    values: &'a mut [f32],
    /// The number of the first of them.
    first: usize,
    heads: usize,
    seq: usize,
    d_head: usize,
    /// `[batch or 1, seq, pairs]`
    cos: &'a [f32],
    /// As `cos`.
    sin: &'a [f32],
    pairs: usize,
    pairing: Pairing,
}

impl Body for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn run<const FMA: bool>(self) {
        let Self { values, first, heads, seq, d_head, cos, sin, pairs, pairing } = self;
        let turn = |a: &mut f32, b: &mut f32, cos: f32, sin: f32| {
            (*a, *b) = (fma::<FMA>(*a, cos, -(*b * sin)), fma::<FMA>(*b, cos, *a * sin));
        };
        for (at, row) in (first..).zip(values.chunks_mut(d_head)) {
            let place = (at / (heads * seq) * seq + at % seq) * pairs % cos.len();
            let angles = cos[place..place + pairs].iter().zip(&sin[place..place + pairs]);
            match pairing {
                Pairing::Half => {
                    let (a, b) = row[..2 * pairs].split_at_mut(pairs);
                    a.iter_mut().zip(b).zip(angles).for_each(|((a, b), (&cos, &sin))| turn(a, b, cos, sin));
                }
                Pairing::Interleaved => {
                    let pairs = row[..2 * pairs].as_chunks_mut().0.iter_mut();
                    pairs.zip(angles).for_each(|([a, b], (&cos, &sin))| turn(a, b, cos, sin));
                }
            }
        }
    }
}
