//! Pairs of channels are turned in place.

use super::instructions::Body;
use super::pointwise::fma;
use crate::ops::Pairing;

/// The first channels of heads are turned by their positions' angles.
pub struct Turn<'a> {
    /// Whole rows of `d_head`, of `[batch, heads, seq, d_head]`.
    pub values: &'a mut [f32],
    /// The number of the first of them.
    pub first: usize,
    pub heads: usize,
    pub seq: usize,
    pub d_head: usize,
    /// `[batch or 1, seq, pairs]`
    pub cos: &'a [f32],
    /// As `cos`.
    pub sin: &'a [f32],
    pub pairs: usize,
    pub pairing: Pairing,
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
