use burn::module::Module;
use burn::tensor::{Device, Tensor};

use super::{Attention, AttentionConfig, KvCache, LayerNorm, Mlp, MlpConfig};
use crate::ops::{self, Activation, Mask};

/// The plain pre-norm transformer block: `x + attention(norm1(x))`, then `x + mlp(norm2(x))`.
#[derive(Module, Debug)]
pub struct PreNormBlock {
    /// Before the attention.
    pub norm1: LayerNorm,
    /// Self-attention, with biases.
    pub attention: Attention,
    /// Before the MLP.
    pub norm2: LayerNorm,
    /// Two projections, with biases.
    pub mlp: Mlp,
    /// Between them.
    #[module(skip)]
    pub activation: Activation,
}

impl PreNormBlock {
    /// An untrained block.
    pub fn new(
        d_model: usize,
        d_ff: usize,
        n_heads: usize,
        activation: Activation,
        eps: f64,
        device: &Device,
    ) -> Self {
        Self {
            norm1: LayerNorm::new(d_model, eps, device),
            attention: AttentionConfig::new(d_model, n_heads).init(device),
            norm2: LayerNorm::new(d_model, eps, device),
            mlp: MlpConfig::new(d_model, d_ff).init(device),
            activation,
        }
    }

    /// `[batch, seq, d_model] -> [batch, seq, d_model]`.
    pub fn forward(&self, x: Tensor<3>, mask: &Mask) -> Tensor<3> {
        self.mix(x.clone(), self.attention.forward(self.norm1.forward(x), mask))
    }

    /// As [`PreNormBlock::forward`] after what is in the cache, which grows by `x`'s length.
    pub fn cached(&self, x: Tensor<3>, cache: &mut KvCache, mask: &Mask) -> Tensor<3> {
        self.mix(x.clone(), self.attention.cached(self.norm1.forward(x), cache, mask))
    }

    /// The second half, after what the attention gave: `x = x + attended`, then `x + mlp(norm2(x))`.
    pub fn mix(&self, x: Tensor<3>, attended: Tensor<3>) -> Tensor<3> {
        let (x, normed) = self.norm2.add(x, attended);
        ops::add(x, self.mlp.forward(normed, self.activation))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, floats, noise};

    fn block() -> PreNormBlock {
        PreNormBlock::new(12, 20, 3, Activation::Gelu, 1e-5, &Device::flex())
    }

    /// What the sublayers add vanishes with their last projections.
    #[test]
    fn the_residual_passes_through() {
        let mut block = block();
        for linear in [&mut block.attention.output, &mut block.mlp.down] {
            linear.weight = linear.weight.clone().map(|weight| weight.zeros_like());
            linear.bias = None;
        }
        let x = noise([2, 4, 12], 1, &Device::flex());
        assert_close(block.forward(x.clone(), &Mask::Full), &floats(x), 0.0);
    }

    #[test]
    fn a_cache_gives_what_the_whole_gives() {
        let (block, x) = (block(), noise([2, 5, 12], 2, &Device::flex()));
        let whole = floats(block.forward(x.clone(), &Mask::Causal));
        let mut cache = KvCache::new(5);
        let first = block.cached(x.clone().narrow(1, 0, 3), &mut cache, &Mask::Causal);
        let rest = block.cached(x.narrow(1, 3, 2), &mut cache, &Mask::Causal);
        assert_close(Tensor::cat(vec![first, rest], 1), &whole, 1e-6);
    }
}
