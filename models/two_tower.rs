//! Two towers, one for pictures and one for texts, whose embeddings meet: what `classify`, `embed` and `search` need of
//! a model, whatever its towers are.

use burn::tensor::{Bool, Int, Tensor};

use crate::clip::normalise;
use crate::tensors::{Outputs, output};

/// A loaded model of two towers.
pub trait TwoTower {
    /// What its preprocessor and its tokenizer must fit.
    fn fit(&self) -> Fit;

    /// Unit vectors of pictures: `[batch, 3, image_size, image_size] -> [batch, d_embed]`.
    fn encode_images(&self, pixels: Tensor<4>) -> Tensor<2>;

    /// Unit vectors of texts: token ids `[batch, seq]`, padded at the end, and which of them are real, `[batch, seq]`,
    /// to `[batch, d_embed]`.
    fn encode_texts(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2>;

    /// The factor on cosine similarities, `[1]`.
    fn scale(&self) -> Tensor<1>;
}

/// What a preprocessor and a tokenizer must fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Side of the square pictures in pixels.
    pub image_size: usize,
    /// The longest text in tokens.
    pub context_length: usize,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the space where both towers meet.
    pub d_embed: usize,
}

/// `logits_per_image` `[images, texts]` and `logits_per_text` of embeddings, `[.., d_embed]`, not normalised.
pub(crate) fn compared(images: Tensor<2>, texts: Tensor<2>, scale: Tensor<1>) -> Outputs {
    let logits = normalise(images).matmul(normalise(texts).transpose()) * scale.unsqueeze();
    vec![output("logits_per_image", logits.clone()), output("logits_per_text", logits.transpose())]
}

/// As [`compared`], with the unit vectors, as the models of transformers give them.
pub(crate) fn compared_embeddings(images: Tensor<2>, texts: Tensor<2>, scale: Tensor<1>) -> Outputs {
    let mut outputs = compared(images.clone(), texts.clone(), scale);
    outputs.push(output("image_embeds", normalise(images)));
    outputs.push(output("text_embeds", normalise(texts)));
    outputs
}
