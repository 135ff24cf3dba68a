//! The loss by which a tower for texts learns from another one.

use burn::tensor::Tensor;

/// The mean over texts and numbers of the squared differences between a student's sentence vectors and its teacher's
/// (Chen et al. 2022, <https://arxiv.org/abs/2211.06679>: the teacher stage).
///
/// Row `i` of both, `[batch, d_teacher]`, is of one text, or of a text and its translation. The vectors are not
/// normalised, and the teacher learns nothing.
///
/// Returns `[1]`.
pub fn teacher_mse(student: Tensor<2>, teacher: Tensor<2>) -> Tensor<1> {
    (student - teacher.detach()).square().mean()
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData, Tolerance};

    use super::*;

    #[test]
    fn a_teachers_loss_in_numbers() {
        let rows = |rows: [[f32; 2]; 2]| Tensor::<2>::from_floats(rows, &Device::flex());
        let loss = teacher_mse(rows([[1.0, 2.0], [3.0, 4.0]]), rows([[1.0, 0.0], [0.0, 5.0]]));
        let expected = TensorData::from([(0.0 + 4.0 + 9.0 + 1.0) / 4.0_f32]);
        loss.into_data().assert_approx_eq::<f32>(&expected, Tolerance::default());
    }
}
