use std::sync::Arc;

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Tensor, TensorData};

use crate::ops::PackedMatrix;

/// A parameter's value as a packed matrix.
///
/// The parameter that holds it is a `Param<Tensor<2>>` like any other: its shape, device and dtype are those of the
/// values, which [`Param::val`] unpacks at every call. [`Linear`](super::Linear) and [`Embedding`](super::Embedding)
/// compute with the packed numbers instead. It is a constant: no gradient reaches it. `Module::materialize` puts the
/// values in its place.
#[derive(Module, Debug)]
pub struct Packed {
    #[module(skip)]
    matrix: Arc<PackedMatrix>,
}

impl Packed {
    /// What a parameter's path says between the parameter and this.
    pub const NAME: &'static str = "packed";
    /// What Burn calls the layers that compute with packed numbers when it visits their fields.
    pub const LAYERS: [&'static str; 2] = ["Struct:Linear", "Struct:Embedding"];

    /// The parameter with this value, which counts as one of `dtype`.
    ///
    /// # Panics
    /// If the matrix is not of the parameter's shape, or `dtype` none of floats.
    pub fn hold<const D: usize>(
        param: Param<Tensor<D>>,
        matrix: PackedMatrix,
        dtype: DType,
    ) -> Param<Tensor<D>> {
        let shape = param.lazy_shape();
        assert_eq!(shape.as_slice(), matrix.shape(), "shape of the parameter against {matrix:?}");
        // one number that is seen everywhere: a shape without memory
        let zero = Tensor::<D>::zeros([1; D], (&param.lazy_device(), dtype));
        let id = param.id;
        let base = param.set_require_grad(false).transform_for_load(zero.expand(shape), id);
        base.apply_reparameterization(Once(Some(Packed { matrix: Arc::new(matrix) })))
    }

    /// The packed value of a parameter, if that is what it holds.
    pub fn of<const D: usize>(param: &Param<Tensor<D>>) -> Option<&PackedMatrix> {
        param.reparameterization::<Packed>().map(|packed| &*packed.matrix)
    }
}

impl Reparameterization for Packed {
    const NAME: &'static str = Packed::NAME;

    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let [rows, _] = self.matrix.shape();
        let data = TensorData::new(self.matrix.unpack(0..rows), base.shape());
        Tensor::from_data(data, (&base.device(), base.dtype()))
    }
}

/// Attaches it to the one parameter there is.
struct Once(Option<Packed>);

impl Reparameterizer for Once {
    type Reparam = Packed;

    fn reparameterize<const D: usize>(
        &mut self,
        _: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Packed>) {
        (param, self.0.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::{Embedding, Linear, LinearConfig};
    use crate::ops::Quantization;
    use crate::testing::{assert_close, floats, noise, random};
    use burn::tensor::{Device, Int};

    /// A layer and the same in 8 or 4 bits, then with the values that those mean.
    fn packed(quantization: Quantization) -> [Linear; 3] {
        let device = Device::flex();
        let plain = LinearConfig::new(40, 6).init(&device);
        let values: Vec<f32> = floats(plain.weight.val()).iter().map(|&value| value as f32).collect();
        let matrix = PackedMatrix::pack(quantization, [6, 40], &values);
        let meant = Tensor::from_data(TensorData::new(matrix.unpack(0..6), [6, 40]), &device);
        let lazy = LinearConfig::new(40, 6).init(&device).weight;
        let packed = Linear { weight: Packed::hold(lazy, matrix, DType::F32), ..plain.clone() };
        let meant = Linear { weight: Param::from_tensor(meant), ..plain.clone() };
        [plain, packed, meant]
    }

    #[test]
    fn a_packed_layer_computes_with_the_values_it_means() {
        for (quantization, loss) in [(Quantization::INT8, 0.01), (Quantization::INT4, 0.1)] {
            let [plain, packed, meant] = packed(quantization);
            let x = noise([2, 3, 40], 1, &Device::flex());
            let y = floats(packed.forward(x.clone()));
            assert_close(meant.forward(x.clone()), &y, 1e-5);
            assert_close(packed.weight.val(), &floats(meant.weight.val()), 0.0);
            assert_close(plain.forward(x.clone()), &y, loss);
            assert_ne!(floats(plain.forward(x)), y);
        }
    }

    #[test]
    fn it_is_a_parameter_of_its_shape_and_dtype() {
        let [_, packed, meant] = packed(Quantization::INT4);
        assert_eq!(packed.num_params(), 6 * 40 + 6);
        assert_eq!(packed.weight.lazy_shape(), meant.weight.lazy_shape());
        let weight = LinearConfig::new(4, 2).init(&Device::flex()).weight;
        let matrix = PackedMatrix::pack(Quantization::INT8, [2, 4], &[1.0; 8]);
        let narrow = Packed::hold(weight, matrix, DType::BF16);
        assert_eq!(narrow.val().dtype(), DType::BF16);
        assert_close(narrow.val(), &[1.0; 8], 0.0);
        let dense = packed.clone().materialize();
        assert!(Packed::of(&dense.weight).is_none());
        assert_close(dense.weight.val(), &floats(meant.weight.val()), 0.0);
        let moved = packed.clone().to_device(&Device::flex()).fork(&Device::flex()).valid();
        assert_eq!(Packed::of(&moved.weight), Packed::of(&packed.weight));
    }

    /// What comes before it can be trained, and so can the bias; the matrix cannot.
    #[test]
    fn it_is_a_constant_to_autodiff() {
        let [_, packed, meant] = packed(Quantization::INT8).map(|layer| layer.train());
        let x = noise([2, 40], 1, &Device::flex().autodiff()).require_grad();
        let gradients = packed.forward(x.clone()).powi_scalar(2).sum().backward();
        let found = floats(x.grad(&gradients).unwrap());
        assert!(packed.bias.unwrap().val().grad(&gradients).is_some());
        assert!(packed.weight.base().grad(&gradients).is_none());
        let gradients = meant.forward(x.clone()).powi_scalar(2).sum().backward();
        assert_close(x.grad(&gradients).unwrap(), &found, 1e-5);
    }

    #[test]
    fn a_packed_table_gives_the_rows_it_means_and_serves_as_a_head() {
        let device = Device::flex();
        let values: Vec<f32> =
            random(5 * 64, &mut fastrand::Rng::with_seed(1)).iter().map(|&x| x as f32).collect();
        let matrix = PackedMatrix::pack(Quantization::INT4, [5, 64], &values);
        let meant = Tensor::from_data(TensorData::new(matrix.unpack(0..5), [5, 64]), &device);
        let meant = Embedding { weight: Param::from_tensor(meant) };
        let lazy = Embedding::new(5, 64, 1.0, &device);
        let packed = Embedding { weight: Packed::hold(lazy.weight, matrix, DType::F32) };
        let ids = Tensor::<2, Int>::from_data([[4, 0, 4], [1, 2, 3]], &device);
        assert_close(packed.forward(ids.clone()), &floats(meant.forward(ids)), 0.0);
        let x = noise([1, 2, 64], 1, &device);
        assert_close(packed.scores(x.clone()), &floats(meant.scores(x)), 1e-5);
    }
}
