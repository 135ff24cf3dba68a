use std::ops::Add;

/// Bytes that are sent to other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Numbers: how many rows go where, and what gates tell each other.
    pub counts: u64,
    /// Rows of tokens and of gradients.
    pub rows: u64,
    /// Values that were given to be summed, 4 bytes each. Where the sum is for all, how often they travel is up to those who sum
    /// them: at least `2 (size - 1) / size` times for each rank. Where it is for one, those of the others travel once.
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
    /// Bytes of a value, of rows and of experts: 4 in f32, 2 in bf16.
    pub value: u64,
    /// Numbers of an expert.
    pub numbers: u64,
    /// Whether ranks tell each other their loads, to choose what is copied.
    pub is_told: bool,
}

impl LayerTraffic {
    /// Of a rank in a forward pass, without what its gate tells others.
    ///
    /// - `out`: how many of its tokens' choices are experts of other ranks, and not copied
    /// - `back`: how many choices of other ranks' tokens are experts of this one, and not copied
    /// - `copied`: how many of its experts are copied to the others
    ///
    /// Each of the former is sent to its expert, each of the latter sent back:
    ///
    /// ```text
    /// rows      = (out + back) d_model value
    /// counts    = 4 chunks n_local (size - 1), and if loads are told, 4 n_local size (size - 1) more
    /// broadcast = copied numbers value (size - 1)
    /// ```
    ///
    /// Over all ranks `out` and `back` are the same sum, and rows are `2 out d_model value`. Of tokens that are spread evenly,
    /// `out` is `tokens top_k (size - 1) / size`.
    pub fn forward(&self, out: u64, back: u64, copied: u64) -> Traffic {
        let told = if self.is_told { self.size } else { 0 };
        let counts = 4 * (self.chunks + told) * self.n_local * (self.size - 1);
        let broadcast = copied * self.numbers * self.value * (self.size - 1);
        Traffic { counts, broadcast, ..self.travelled(out, back) }
    }

    /// Of a rank in a backward pass: a gradient for each row of the forward pass, and no counts, which are known. Gradients of
    /// copies are in f32:
    ///
    /// ```text
    /// reduced = 4 copies numbers
    /// ```
    ///
    /// Over all ranks a copied expert costs `(size - 1) numbers (value + 4)` in both passes, and spares `4 d_model value` for each
    /// of its rows that were elsewhere.
    ///
    /// - `copies`: how many experts of other ranks are copied here
    pub fn backward(&self, out: u64, back: u64, copies: u64) -> Traffic {
        let reduced = 4 * copies * self.numbers;
        Traffic { reduced, ..self.travelled(out, back) }
    }

    fn travelled(&self, out: u64, back: u64) -> Traffic {
        Traffic { rows: (out + back) * self.d_model * self.value, ..Traffic::default() }
    }
}
