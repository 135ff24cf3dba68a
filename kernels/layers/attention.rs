use burn::config::Config;
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor};

use super::{Linear, LinearConfig};
use crate::ops::{self, Mask};

/// Configuration of an [`Attention`] layer.
#[derive(Config, Debug)]
pub struct AttentionConfig {
    /// Width of input and output.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key-value heads; `None` is as many as query heads.
    pub n_kv_heads: Option<usize>,
    /// Width of a head; `None` is `d_model / n_heads`.
    pub d_head: Option<usize>,
    /// Width of the keys' and values' input; `None` is `d_model`.
    pub d_context: Option<usize>,
    /// Whether query, key and value projections have a bias.
    #[config(default = true)]
    pub bias: bool,
    /// Whether the key projection has one, if the others do; of a constant in every score the softmax makes nothing.
    #[config(default = true)]
    pub key_bias: bool,
    /// Whether the output projection has a bias.
    #[config(default = true)]
    pub output_bias: bool,
    /// Factor on the scores; `None` is `1 / √d_head`.
    pub scale: Option<f64>,
}

/// Multi-head attention with separate projections for query, key, value and output.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[n_heads * d_head, d_model]`.
    pub query: Linear,
    /// `[n_kv_heads * d_head, d_context]`.
    pub key: Linear,
    /// `[n_kv_heads * d_head, d_context]`.
    pub value: Linear,
    /// `[d_model, n_heads * d_head]`.
    pub output: Linear,
    n_heads: usize,
    n_kv_heads: usize,
    #[module(skip)]
    scale: Option<f64>,
}

impl AttentionConfig {
    /// An untrained layer.
    pub fn init(&self, device: &Device) -> Attention {
        let n_kv_heads = self.n_kv_heads.unwrap_or(self.n_heads);
        let d_head = self.d_head.unwrap_or(self.d_model / self.n_heads);
        let d_context = self.d_context.unwrap_or(self.d_model);
        let linear = |d_in, d_out, bias| LinearConfig::new(d_in, d_out).with_bias(bias).init(device);
        Attention {
            query: linear(self.d_model, self.n_heads * d_head, self.bias),
            key: linear(d_context, n_kv_heads * d_head, self.bias && self.key_bias),
            value: linear(d_context, n_kv_heads * d_head, self.bias),
            output: linear(self.n_heads * d_head, self.d_model, self.output_bias),
            n_heads: self.n_heads,
            n_kv_heads,
            scale: self.scale,
        }
    }
}

impl Attention {
    /// Self-attention: `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        self.cross(x.clone(), x, mask)
    }

    /// Cross-attention of `x` (`[batch, queries, d_model]`) to `context` (`[batch, keys, d_context]`).
    pub fn cross(&self, x: Tensor<3>, context: Tensor<3>, mask: &Mask) -> Tensor<3> {
        let query = self.queries(x);
        let (key, value) = self.keys_values(context);
        self.attend(query, key, value, mask)
    }

    /// Self-attention over the cached past and `x`; the cache grows by `x`'s length.
    pub fn cached(&self, x: Tensor<3>, cache: &mut KvCache, mask: &Mask) -> Tensor<3> {
        let query = self.queries(x.clone());
        let (key, value) = self.keys_values(x);
        let (key, value) = cache.append(key, value);
        self.attend(query, key, value, mask)
    }

    /// What is between the projections: of [`Attention::queries`] and [`Attention::keys_values`], which may have been
    /// kept or turned, to `[batch, queries, d_model]`.
    pub fn attend(&self, query: Tensor<4>, key: Tensor<4>, value: Tensor<4>, mask: &Mask) -> Tensor<3> {
        self.merge(ops::attention(query, key, value, mask, self.scale))
    }

    /// `[batch, seq, d_model] -> [batch, n_heads, seq, d_head]`.
    pub fn queries(&self, x: Tensor<3>) -> Tensor<4> {
        split_heads(self.query.forward(x), self.n_heads)
    }

    /// `[batch, seq, d_context] ->` keys and values, each `[batch, n_kv_heads, seq, d_head]`.
    pub fn keys_values(&self, context: Tensor<3>) -> (Tensor<4>, Tensor<4>) {
        (
            split_heads(self.key.forward(context.clone()), self.n_kv_heads),
            split_heads(self.value.forward(context), self.n_kv_heads),
        )
    }

    /// Joins the heads and projects: `[batch, n_heads, seq, d_head] -> [batch, seq, d_model]`.
    pub fn merge(&self, x: Tensor<4>) -> Tensor<3> {
        let [batch, n_heads, seq, d_head] = x.dims();
        self.output.forward(x.swap_dims(1, 2).reshape([batch, seq, n_heads * d_head]))
    }
}

fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch, seq, width] = x.dims();
    x.reshape([batch, seq, n_heads, width / n_heads]).swap_dims(1, 2) // [batch, n_heads, seq, d_head]
}

/// Keys and values of the tokens so far, in a buffer of fixed capacity allocated at the first use.
#[derive(Clone, Debug)]
pub struct KvCache {
    key: Option<Tensor<4>>,
    value: Option<Tensor<4>>,
    /// How many tokens are in the buffer.
    held: usize,
    /// How many were, and are no longer seen.
    gone: usize,
    capacity: usize,
    window: Option<usize>,
}

impl KvCache {
    /// An empty cache for at most `capacity` tokens per row.
    pub fn new(capacity: usize) -> Self {
        Self { key: None, value: None, held: 0, gone: 0, capacity, window: None }
    }

    /// An empty cache for any number of tokens, each of which sees `window`, itself among them, as [`Mask::Window`] has
    /// it. The buffer holds twice as many, so that those in sight move only once per `window` tokens.
    ///
    /// # Panics
    /// If the window is 0.
    pub fn sliding(window: usize) -> Self {
        assert!(window > 0, "a window of no token");
        Self { window: Some(window), ..Self::new(2 * window) }
    }

    /// How many tokens it has read. A sliding cache may have let go of the first of them.
    pub fn len(&self) -> usize {
        self.gone + self.held
    }

    /// Whether it has read no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens past the first `len`, keeping the buffer.
    ///
    /// # Panics
    /// If a sliding cache has let go of tokens that are in sight again.
    pub fn truncate(&mut self, len: usize) {
        let len = self.len().min(len);
        let first = self.window.map_or(0, |window| (len + 1).saturating_sub(window));
        assert!(self.gone <= first, "tokens {first} to {} are gone", self.gone);
        self.held = len - self.gone;
    }

    /// Row `i` becomes what row `rows[i]` was.
    pub fn select(&mut self, rows: &Tensor<1, Int>) {
        for buffer in [&mut self.key, &mut self.value] {
            *buffer = buffer.take().map(|held| held.select(0, rows.clone()));
        }
    }

    /// Stores new keys and values, `[batch, kv_heads, new, d_head]`, and returns all held so far; a sliding cache those
    /// that some new token sees, the new ones last.
    ///
    /// # Panics
    /// If they do not fit into the capacity.
    pub fn append(&mut self, key: Tensor<4>, value: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let (at, new, capacity) = (self.held, key.dims()[2], self.capacity);
        let end = at + new;
        let seen = self.window.map_or(at, |window| at.min(window - 1));
        let unseen = at - seen;
        if end <= capacity {
            self.held = end;
            let append = |buffer: &mut Option<Tensor<4>>, new: Tensor<4>| {
                store(buffer, new, at, capacity).narrow(2, unseen, end - unseen)
            };
            return (append(&mut self.key, key), append(&mut self.value, value));
        }
        let Some(window) = self.window else {
            panic!("cache of {capacity} tokens cannot hold {end}");
        };
        // what is in sight moves to the front; of more than fits, only what the next token sees is kept
        let kept = if seen + new <= capacity { seen + new } else { window - 1 };
        self.gone += end - kept;
        self.held = kept;
        let slide = |buffer: &mut Option<Tensor<4>>, new: Tensor<4>| {
            let sight = match buffer.as_ref() {
                Some(old) if seen > 0 => Tensor::cat(vec![old.clone().narrow(2, unseen, seen), new], 2),
                _ => new,
            };
            if kept > 0 {
                store(buffer, sight.clone().narrow(2, sight.dims()[2] - kept, kept), 0, capacity);
            }
            sight
        };
        (slide(&mut self.key, key), slide(&mut self.value, value))
    }
}

/// Writes `new` into the buffer, which is made if there is none, and gives all of it.
fn store(buffer: &mut Option<Tensor<4>>, new: Tensor<4>, at: usize, capacity: usize) -> Tensor<4> {
    let [batch, heads, seq, d_head] = new.dims();
    let held = buffer
        .take()
        .unwrap_or_else(|| Tensor::zeros([batch, heads, capacity, d_head], (&new.device(), new.dtype())));
    let held = held.slice_assign([0..batch, 0..heads, at..at + seq, 0..d_head], new);
    *buffer = Some(held.clone());
    held
}

#[cfg(test)]
mod tests;
