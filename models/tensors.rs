//! Named tensors going into and coming out of a forward pass.

use std::collections::BTreeMap;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::error::Error;

/// The inputs of a forward pass by the reference's argument names, asked for one by one; what is wrong
/// with them is gathered and told at the end.
pub struct Inputs<'a> {
    system: &'static str,
    tensors: &'a BTreeMap<String, TensorData>,
    asked: Vec<&'static str>,
    problems: Vec<String>,
    device: Device,
}

/// The outputs by the reference's names.
pub type Outputs = Vec<(String, TensorData)>;

impl<'a> Inputs<'a> {
    /// The tensors for `system`, to be placed on `device`.
    pub fn new(system: &'static str, tensors: &'a BTreeMap<String, TensorData>, device: &Device) -> Self {
        Self { system, tensors, asked: Vec::new(), problems: Vec::new(), device: device.clone() }
    }

    /// A float input of rank `D`, if there is one.
    pub fn float<const D: usize>(&mut self, name: &'static str) -> Option<Tensor<D>> {
        let data = self.ranked::<D>(name)?;
        if !data.dtype().is_float() {
            self.problems.push(format!("`{name}` holds {:?}, expected floating-point numbers", data.dtype()));
            return None;
        }
        Some(Tensor::from_data(data.convert::<f32>(), &self.device))
    }

    /// A whole-number input of rank `D`, if there is one, each at least 0 and below `limit`.
    pub fn ids<const D: usize>(&mut self, name: &'static str, limit: usize) -> Option<Tensor<D, Int>> {
        let data = self.ranked::<D>(name)?;
        if data.dtype().is_float() {
            self.problems.push(format!("`{name}` holds {:?}, expected whole numbers", data.dtype()));
            return None;
        }
        let data = data.convert::<i64>();
        if let Some(wrong) = data.iter::<i64>().find(|&id| id < 0 || id >= limit as i64) {
            self.problems.push(format!("`{name}` holds {wrong}, expected 0 to {}", limit - 1));
            return None;
        }
        Some(Tensor::from_data(data, &self.device))
    }

    /// A mask of rank 2, if there is one: `true` where it is not zero.
    pub fn mask(&mut self, name: &'static str) -> Option<Tensor<2, Bool>> {
        let data = self.ranked::<2>(name)?;
        let shape = data.shape().clone();
        let real: Vec<bool> = data.convert::<f32>().iter::<f32>().map(|value| value != 0.0).collect();
        Some(Tensor::from_data(TensorData::new(real, shape), &self.device))
    }

    /// That the input `name`, if it is there, has the shape of `input_ids`.
    pub fn like_ids(&mut self, name: &str, found: Option<[usize; 2]>, ids: [usize; 2]) {
        if let Some(found) = found.filter(|found| *found != ids) {
            self.problem(format!("`{name}` is {found:?}, `input_ids` {ids:?}"));
        }
    }

    /// As [`Inputs::like_ids`], or that it has one row, which stands for all.
    pub fn row_or_like_ids(&mut self, name: &str, found: Option<[usize; 2]>, ids: [usize; 2]) {
        self.like_ids(name, found.filter(|found| *found != [1, ids[1]]), ids);
    }

    /// Notes something wrong with the inputs.
    pub fn problem(&mut self, problem: String) {
        self.problems.push(problem);
    }

    /// That the input `name` was needed.
    pub fn missing(&mut self, name: &'static str) {
        if !self.tensors.contains_key(name) {
            self.problems.push(format!("the input `{name}` is missing"));
        }
    }

    /// That nothing is wrong and nothing is left over.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn finish(mut self) -> Result<(), Error> {
        for name in self.tensors.keys().filter(|name| !self.asked.contains(&name.as_str())) {
            self.problems.push(format!("the input `{name}` is not one of {}", self.asked.join(", ")));
        }
        if self.problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Input { system: self.system, problems: self.problems })
        }
    }

    fn ranked<const D: usize>(&mut self, name: &'static str) -> Option<TensorData> {
        self.asked.push(name);
        let data = self.tensors.get(name)?;
        let dims: Vec<usize> = data.shape().iter().copied().collect();
        if dims.len() != D || dims.contains(&0) {
            self.problems.push(format!("`{name}` is {dims:?}, expected {D} dimensions, none of them 0"));
            return None;
        }
        Some(data.clone())
    }
}

/// An output tensor as f32.
pub fn output<const D: usize>(name: &str, tensor: Tensor<D>) -> (String, TensorData) {
    (name.into(), tensor.into_data().convert::<f32>())
}
