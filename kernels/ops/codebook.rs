use burn::tensor::{DType, Int, Tensor};

/// Distances that are held at a time.
const PANEL: usize = 1 << 22;

/// The entry of a codebook that is nearest to each vector by Euclid's distance, the first of several:
/// `[vectors, d]` and `[entries, d] -> [vectors]`. No gradient goes through it; half precision is compared in f32.
///
/// # Panics
/// If the widths differ, or the codebook has no entry.
pub fn nearest(x: Tensor<2>, codebook: Tensor<2>) -> Tensor<1, Int> {
    let ([vectors, width], [entries, d]) = (x.dims(), codebook.dims());
    assert_eq!(width, d, "width of the vectors (left) and of the codebook");
    assert!(entries > 0, "a codebook without entries");
    let [x, codebook] = [x, codebook].map(|rows| rows.detach().cast(DType::F32));
    if vectors == 0 {
        return Tensor::zeros([0], &x.device());
    }
    let halves = codebook.clone().square().sum_dim(1).transpose() * 0.5; // [1, entries]
    let codebook = codebook.transpose();
    let height = (PANEL / entries).max(1);
    // |x - e|² is |x|² + 2 (|e|² / 2 - x e)
    let panels = (0..vectors).step_by(height).map(|at| {
        let panel = x.clone().narrow(0, at, height.min(vectors - at));
        (halves.clone() - panel.matmul(codebook.clone())).argmin(1).flatten(0, 1)
    });
    Tensor::cat(panels.collect(), 0)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::testing::{floats, noise, tensor};

    fn ids(found: Tensor<1, Int>) -> Vec<i64> {
        found.into_data().iter::<i64>().collect()
    }

    #[test]
    fn literal() {
        let codebook = tensor([3, 2], &[0.0, 0.0, 3.0, 4.0, 3.0, 4.0], &Device::flex());
        let x = tensor([4, 2], &[1.0, 1.0, 2.0, 2.0, 30.0, -1.0, 0.0, 0.0], &Device::flex());
        assert_eq!(ids(nearest(x, codebook.clone())), [0, 1, 1, 0]);
        assert_eq!(ids(nearest(tensor([0, 2], &[], &Device::flex()), codebook)), Vec::<i64>::new());
    }

    /// More vectors than fit into a panel, against distances one by one.
    #[test]
    fn panels_join() {
        let device = Device::flex();
        let (entries, vectors) = (1 << 21, 3);
        let (codebook, x) = (noise([entries, 1], 1, &device), noise([vectors, 1], 2, &device));
        let (values, xs) = (floats(codebook.clone()), floats(x.clone()));
        let found = ids(nearest(x, codebook));
        for (id, x) in found.into_iter().zip(xs) {
            let least = values.iter().map(|value| (value - x).abs()).fold(f64::INFINITY, f64::min);
            assert!((values[id as usize] - x).abs() <= least + 1e-3, "{x}");
        }
    }
}
