use std::ops::Range;

use burn::tensor::TensorData;

use super::Ranks;
use crate::ops::moe::Dispatch;

/// Where the rows of a layer's tokens travel: those of one chunk after the other, in each the rows for one rank after the
/// other, and of these the rows of one expert after the other. Behind them are those that stay: of one copied expert after
/// the other.
#[derive(Debug)]
pub(super) struct Journey {
    ranks: Ranks,
    pub chunks: Vec<Chunk>,
    /// Those that stay, by the copies.
    pub staying: Dispatch,
}

/// The rows of some tokens, and those of other ranks that come here meanwhile.
#[derive(Debug)]
pub(super) struct Chunk {
    /// Rows of this rank's tokens.
    rows: Range<usize>,
    /// How many of them go to each rank.
    send: Vec<usize>,
    /// How many come here from each rank.
    receive: Vec<usize>,
    /// Those that come here, by this rank's experts.
    pub dispatch: Dispatch,
}

impl Journey {
    /// Tells all ranks how many rows they will get.
    ///
    /// - `dispatch`: of `chunks` times the experts of all ranks, those of a chunk side by side, and of so many `copies`
    pub fn new(dispatch: &Dispatch, chunks: usize, copies: usize, ranks: &Ranks) -> Self {
        let travelling = dispatch.n_experts() - copies;
        let (size, n_experts) = (ranks.size(), travelling / chunks);
        let n_local = n_experts / size;
        let count = |chunk: usize, expert: usize| dispatch.segment(chunk * n_experts + expert).len();
        // for each rank the numbers of its experts, chunk after chunk
        let mut counts = Vec::with_capacity(chunks * n_experts);
        for rank in 0..size {
            for chunk in 0..chunks {
                counts.extend((0..n_local).map(|local| count(chunk, rank * n_local + local)));
            }
        }
        let coming = ranks.all_to_all(&counts); // [size, chunks, n_local]
        let chunk = |chunk: usize| {
            let of_ranks = |counts: &[usize]| -> Vec<Vec<usize>> {
                let first = |rank: usize| (rank * chunks + chunk) * n_local;
                (0..size).map(|rank| counts[first(rank)..][..n_local].to_vec()).collect()
            };
            let sums = |counts: &[usize]| of_ranks(counts).iter().map(|counts| counts.iter().sum()).collect();
            let experts = of_ranks(&coming).into_iter().flat_map(|counts| counts.into_iter().enumerate());
            let choices: Vec<Option<usize>> =
                experts.flat_map(|(expert, count)| std::iter::repeat_n(Some(expert), count)).collect();
            let [first, last] = [chunk * n_experts, (chunk + 1) * n_experts - 1];
            Chunk {
                rows: dispatch.segment(first).start..dispatch.segment(last).end,
                send: sums(&counts),
                receive: sums(&coming),
                dispatch: Dispatch::new(&choices, 1, n_local),
            }
        };
        let of_copy = |copy: usize| dispatch.segment(travelling + copy).map(move |_| Some(copy));
        let staying: Vec<Option<usize>> = (0..copies).flat_map(of_copy).collect();
        Self {
            ranks: ranks.clone(),
            chunks: (0..chunks).map(chunk).collect(),
            staying: Dispatch::new(&staying, 1, copies),
        }
    }

    /// Rows `[rows, width]` travel to where they belong, become what `work` makes of them there, and come back. While a
    /// chunk is worked on, the next one travels; while the first one travels, those that stay are worked on.
    ///
    /// - `work`: the rows that came with a chunk, at least one, to as many; it is called for one chunk after the other
    /// - `stay`: the rows that stay, if there are any, to as many
    pub fn travel(
        &self,
        rows: TensorData,
        mut work: impl FnMut(usize, TensorData) -> TensorData,
        stay: impl FnOnce(TensorData) -> TensorData,
    ) -> TensorData {
        let (shape, dtype) = (rows.shape().clone(), rows.dtype());
        let width = shape[1] * dtype.size();
        let leave = |chunk: &Chunk| {
            let bytes = &rows.as_bytes()[chunk.rows.start * width..chunk.rows.end * width];
            self.ranks.rows(bytes.to_vec(), &chunk.send, &chunk.receive, width)
        };
        let (mut next, mut returning) = (self.chunks.first().map(leave), Vec::new());
        let mut stayed = rows.as_bytes()[(shape[0] - self.staying.rows()) * width..].to_vec();
        if !stayed.is_empty() {
            let here = TensorData::from_bytes_vec(stayed, [self.staying.rows(), shape[1]], dtype);
            stayed = stay(here).as_bytes().to_vec();
        }
        for (at, chunk) in self.chunks.iter().enumerate() {
            let Some(coming) = next.take() else { break };
            let mut bytes = coming.wait();
            next = self.chunks.get(at + 1).map(leave);
            if !bytes.is_empty() {
                let here = TensorData::from_bytes_vec(bytes, [chunk.dispatch.rows(), shape[1]], dtype);
                bytes = work(at, here).as_bytes().to_vec();
            }
            returning.push(self.ranks.rows(bytes, &chunk.receive, &chunk.send, width));
        }
        let bytes = returning.into_iter().flat_map(|pending| pending.wait()).chain(stayed).collect();
        TensorData::from_bytes_vec(bytes, shape, dtype)
    }
}
