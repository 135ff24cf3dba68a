use std::ops::Add;

/// Bytes that are sent to other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Numbers: how many rows go where, and what gates tell each other.
    pub counts: u64,
    /// Rows of tokens and of gradients.
    pub rows: u64,
    /// Values that were given to be summed, 4 bytes each. How often they travel is up to those who sum them: at least
    /// `2 (size - 1) / size` times for each rank.
    pub reduced: u64,
    /// What one gave to the others.
    pub broadcast: u64,
}

impl Add for Traffic {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            counts: self.counts + other.counts,
            rows: self.rows + other.rows,
            reduced: self.reduced + other.reduced,
            broadcast: self.broadcast + other.broadcast,
        }
    }
}

/// What the traffic of a [`super::ParallelMoe`] depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerTraffic {
    /// How many ranks share the experts.
    pub size: u64,
    /// How many experts each has.
    pub n_local: u64,
    /// Into how many chunks tokens are cut.
    pub chunks: u64,
    /// Width of a row.
    pub d_model: u64,
    /// Bytes of a value: 4 in f32, 2 in bf16.
    pub value: u64,
}

impl LayerTraffic {
    /// Of a rank in a forward pass, without what its gate tells others.
    ///
    /// - `out`: how many of its tokens' choices are experts of other ranks
    /// - `back`: how many choices of other ranks' tokens are experts of this one
    ///
    /// Each of the former is sent to its expert, each of the latter sent back:
    ///
    /// ```text
    /// rows   = (out + back) d_model value
    /// counts = 4 chunks n_local (size - 1)
    /// ```
    ///
    /// Over all ranks `out` and `back` are the same sum, and rows are `2 out d_model value`. Of tokens that are spread evenly,
    /// `out` is `tokens top_k (size - 1) / size`.
    pub fn forward(&self, out: u64, back: u64) -> Traffic {
        let counts = 4 * self.chunks * self.n_local * (self.size - 1);
        Traffic { counts, ..self.backward(out, back) }
    }

    /// Of a rank in a backward pass: a gradient for each row of the forward pass, and no counts, which are known.
    pub fn backward(&self, out: u64, back: u64) -> Traffic {
        Traffic { rows: (out + back) * self.d_model * self.value, ..Traffic::default() }
    }
}
