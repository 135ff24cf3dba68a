//! The losses that pull a picture and its text together.

use burn::tensor::{
    Int, Tensor,
    activation::{log_softmax, softmax},
};

/// InfoNCE over a batch of pairs, the mean of both directions (Radford et al. 2021, figure 3).
///
/// - `images`, `texts`: unit vectors, `[batch, d_embed]`; row `i` of both belong together.
/// - `scale`: the factor on cosine similarities, `[1]`.
/// - `concepts`: what each pair shows, `[batch]`. Pairs of one concept are not each other's negatives.
///
/// Returns `[1]`.
pub fn info_nce(
    images: Tensor<2>,
    texts: Tensor<2>,
    scale: Tensor<1>,
    concepts: Tensor<1, Int>,
) -> Tensor<1> {
    let [batch, _] = images.dims();
    let diagonal = Tensor::<2>::eye(batch, &images.device());
    let logits = without_twins(images.matmul(texts.transpose()) * scale.unsqueeze(), concepts);
    let direction = |logits: Tensor<2>| -(log_softmax(logits, 1) * diagonal.clone()).sum() / batch as f64;
    (direction(logits.clone()) + direction(logits.transpose())) * 0.5
}

/// Logits `[batch, batch]` without those of another pair of the same concept.
fn without_twins(logits: Tensor<2>, concepts: Tensor<1, Int>) -> Tensor<2> {
    let square = logits.dims();
    let [batch, _] = square;
    let row = concepts.clone().reshape([batch, 1]).expand(square);
    let same = row.equal(concepts.reshape([1, batch]).expand(square));
    let diagonal = Tensor::<2>::eye(batch, &logits.device());
    logits.mask_fill(same.bool_and(diagonal.equal_elem(0.0)), -1e4)
}

/// [`info_nce`] of a batch that is larger than memory: gradient caching (Gao et al. 2021,
/// <https://arxiv.org/abs/2101.06983>). All embeddings are computed once without a graph, chunk by chunk; what the loss
/// changes with each of them is kept; then each chunk is computed again with a graph, and [`CachedInfoNce::chunk`] leads
/// those gradients on into the towers.
///
/// The gradients have a closed form. With logits `S = s I Tᵀ`, their softmaxes by rows `P` and by columns `Q`, the unit matrix
/// `E` and `n` pairs,
///
/// ```text
/// G = (P + Q - 2E) / 2n
/// dI = s G T     dT = s Gᵀ I     ds = Σ G ∘ I Tᵀ
/// ```
///
/// where `P` and `Q`, and so `G`, are 0 at two pairs of one concept.
#[derive(Clone, Debug)]
pub struct CachedInfoNce {
    /// Of the whole batch, `[1]`.
    pub loss: Tensor<1>,
    /// What the loss changes with each picture's embedding, `[batch, d_embed]`.
    pub images: Tensor<2>,
    /// With each text's, `[batch, d_embed]`.
    pub texts: Tensor<2>,
    /// With the factor on cosine similarities, `[1]`.
    pub scale: Tensor<1>,
}

impl CachedInfoNce {
    /// Of embeddings without a graph; the arguments are those of [`info_nce`].
    pub fn new(images: Tensor<2>, texts: Tensor<2>, scale: Tensor<1>, concepts: Tensor<1, Int>) -> Self {
        let [images, texts] = [images, texts].map(Tensor::detach);
        let scale = scale.detach();
        let loss = info_nce(images.clone(), texts.clone(), scale.clone(), concepts.clone());
        let [batch, _] = images.dims();
        let cosines = images.clone().matmul(texts.clone().transpose()); // [batch, batch]
        let logits = without_twins(cosines.clone() * scale.clone().unsqueeze(), concepts);
        let pairs = Tensor::<2>::eye(batch, &logits.device()) * 2.0;
        let gradient = (softmax(logits.clone(), 1) + softmax(logits, 0) - pairs) / (2 * batch) as f64;
        let of_cosines = gradient.clone() * scale.unsqueeze();
        Self {
            loss,
            images: of_cosines.clone().matmul(texts),
            texts: of_cosines.transpose().matmul(images),
            scale: (gradient * cosines).sum(),
        }
    }

    /// A chunk's share of the loss, `[1]`, of its pairs `first`, `first + 1`, ..., computed again with a graph. Added up over
    /// all chunks it has the value and the gradients of [`info_nce`] of the whole batch.
    ///
    /// # Panics
    /// If the batch has no such pairs.
    pub fn chunk(&self, first: usize, images: Tensor<2>, texts: Tensor<2>, scale: Tensor<1>) -> Tensor<1> {
        let ([pairs, _], [batch, _]) = (images.dims(), self.images.dims());
        let share = pairs as f64 / batch as f64;
        let along = |x: Tensor<2>, gradient: &Tensor<2>| (x * gradient.clone().narrow(0, first, pairs)).sum();
        // linear in what is given: the gradients are those that were kept
        let linear =
            along(images, &self.images) + along(texts, &self.texts) + (scale * self.scale.clone()) * share;
        linear.clone() - linear.detach() + self.loss.clone() * share
    }
}

/// InfoNCE in which the tower for pictures learns nothing (Zhai et al. 2022, <https://arxiv.org/abs/2111.07991>): the
/// second stage of AltCLIP. Every pair shows something of its own.
///
/// `images`, `texts`: unit vectors, `[batch, d_embed]`; `scale`: the factor on cosine similarities, `[1]`. Returns `[1]`.
pub fn locked_info_nce(images: Tensor<2>, texts: Tensor<2>, scale: Tensor<1>) -> Tensor<1> {
    let [batch, _] = images.dims();
    let each = Tensor::arange(0..batch as i64, &images.device());
    info_nce(images.detach(), texts, scale, each)
}

/// Cross-entropy of pictures against a fixed bank of text embeddings, with label smoothing.
///
/// - `images`: unit vectors, `[batch, d_embed]`; `bank`: unit vectors, `[entries, d_embed]`, not trained.
/// - `targets`: the bank entry that describes each picture, `[batch]`.
///
/// Returns `[1]`.
pub fn bank_cross_entropy(
    images: Tensor<2>,
    bank: Tensor<2>,
    scale: Tensor<1>,
    targets: Tensor<1, Int>,
    smoothing: f64,
) -> Tensor<1> {
    let [batch, _] = images.dims();
    let logits = images.matmul(bank.transpose()) * scale.unsqueeze(); // [batch, entries]
    let log_probability = log_softmax(logits, 1);
    let chosen = log_probability.clone().gather(1, targets.reshape([batch, 1]));
    -(chosen.mean() * (1.0 - smoothing) + log_probability.mean() * smoothing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::{Device, Distribution, TensorData, Tolerance};

    /// For orthonormal pairs each direction is `ln(e^s + n - 1) - s`.
    #[test]
    fn info_nce_of_orthonormal_pairs() {
        let device = Device::flex();
        let eye = Tensor::<2>::eye(3, &device);
        let scale = Tensor::<1>::from_floats([2.0], &device);
        let concepts = Tensor::<1, Int>::from_ints([7, 8, 9], &device);
        let loss = info_nce(eye.clone(), eye, scale, concepts);
        let expected = (2.0_f32.exp() + 2.0).ln() - 2.0;
        loss.into_data().assert_approx_eq::<f32>(&TensorData::from([expected]), Tolerance::default());
    }

    /// Two towers of one layer, pairs of which some are twins: chunks of any size give the loss and the gradients of the whole
    /// batch in one go.
    #[test]
    fn cached_gradients_are_those_of_the_whole_batch() {
        const BATCH: usize = 11;
        let device = Device::flex().autodiff();
        device.seed(3);
        let noise = |shape: [usize; 2]| Tensor::<2>::random(shape, Distribution::Normal(0.0, 1.0), &device);
        let inputs = [noise([BATCH, 7]), noise([BATCH, 5])];
        let towers = [noise([7, 4]).require_grad(), noise([5, 4]).require_grad()];
        let scale = Tensor::<1>::from_floats([2.5], &device).require_grad();
        let concepts = Tensor::<1, Int>::from_ints([1, 2, 3, 1, 4, 5, 2, 6, 7, 8, 9], &device);
        let embed = |side: usize, first: usize, pairs: usize| {
            let x = inputs[side].clone().narrow(0, first, pairs).matmul(towers[side].clone());
            x.clone() / x.square().sum_dim(1).sqrt()
        };
        let gradients = |loss: Tensor<1>| {
            let gradients = loss.backward();
            let [images, texts] = [0, 1].map(|side| towers[side].grad(&gradients).unwrap());
            [images.flatten::<1>(0, 1), texts.flatten(0, 1), scale.grad(&gradients).unwrap()]
        };
        let loss = info_nce(embed(0, 0, BATCH), embed(1, 0, BATCH), scale.clone(), concepts.clone());
        let value = loss.to_data();
        let expected = gradients(loss);
        for chunk in [1, 2, 4, BATCH] {
            let starts: Vec<usize> = (0..BATCH).step_by(chunk).collect();
            let whole = |side| {
                let parts = starts.iter().map(|&first| embed(side, first, chunk.min(BATCH - first)).detach());
                Tensor::cat(parts.collect(), 0).inner()
            };
            let plain = concepts.clone().inner();
            let cached = CachedInfoNce::new(whole(0), whole(1), scale.clone().inner(), plain);
            cached.loss.to_data().assert_approx_eq::<f32>(&value, Tolerance::absolute(1e-6));
            let (mut total, mut sum) = (0.0, expected.clone().map(|gradient| gradient * 0.0));
            for &first in &starts {
                let pairs = chunk.min(BATCH - first);
                let share =
                    cached.chunk(first, embed(0, first, pairs), embed(1, first, pairs), scale.clone());
                total += share.clone().into_scalar::<f32>();
                let own = gradients(share);
                sum.iter_mut().zip(own).for_each(|(sum, own)| *sum = sum.clone() + own);
            }
            assert!((total - cached.loss.into_scalar::<f32>()).abs() < 1e-5, "{total}");
            for (sum, expected) in sum.iter().zip(&expected) {
                sum.to_data().assert_approx_eq::<f32>(&expected.to_data(), Tolerance::absolute(1e-5));
            }
        }
    }

    /// Orthogonal pictures, texts turned by a right angle: all the weight is on the wrong one.
    #[test]
    fn locked_info_nce_of_swapped_pairs() {
        let device = Device::flex();
        let images = Tensor::<2>::eye(2, &device);
        let scale = Tensor::<1>::from_floats([2.0], &device);
        let loss = locked_info_nce(images.clone(), images.flip([0]), scale);
        let expected = (2.0_f32.exp() + 1.0).ln();
        loss.into_data().assert_approx_eq::<f32>(&TensorData::from([expected]), Tolerance::default());
    }

    /// Twins of one concept are left out: two identical pairs cost what one alone would.
    #[test]
    fn twins_are_not_negatives() {
        let device = Device::flex();
        let images = Tensor::<2>::from_floats([[1.0, 0.0], [1.0, 0.0]], &device);
        let scale = Tensor::<1>::from_floats([5.0], &device);
        let concepts = Tensor::<1, Int>::from_ints([4, 4], &device);
        let loss: f32 = info_nce(images.clone(), images, scale, concepts).into_scalar();
        assert!(loss.abs() < 1e-6, "{loss}");
    }

    #[test]
    fn bank_of_orthonormal_entries() {
        let device = Device::flex();
        let bank = Tensor::<2>::eye(4, &device);
        let images = bank.clone().narrow(0, 1, 2);
        let scale = Tensor::<1>::from_floats([3.0], &device);
        let targets = Tensor::<1, Int>::from_ints([1, 2], &device);
        let loss = bank_cross_entropy(images, bank, scale, targets, 0.0);
        let expected = (3.0_f32.exp() + 3.0).ln() - 3.0;
        loss.into_data().assert_approx_eq::<f32>(&TensorData::from([expected]), Tolerance::default());
    }
}
