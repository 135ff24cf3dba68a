//! The losses that pull a picture and its text together.

use burn::tensor::{Int, Tensor, activation::log_softmax};

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
    let device = images.device();
    let logits = images.matmul(texts.transpose()) * scale.unsqueeze(); // [batch, batch]
    let square = [batch, batch];
    let row = concepts.clone().reshape([batch, 1]).expand(square);
    let same = row.equal(concepts.reshape([1, batch]).expand(square));
    let diagonal = Tensor::<2>::eye(batch, &device);
    let twins = same.bool_and(diagonal.clone().equal_elem(0.0));
    let logits = logits.mask_fill(twins, -1e4);
    let direction = |logits: Tensor<2>| -(log_softmax(logits, 1) * diagonal.clone()).sum() / batch as f64;
    (direction(logits.clone()) + direction(logits.transpose())) * 0.5
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
    use burn::tensor::{Device, TensorData, Tolerance};

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
