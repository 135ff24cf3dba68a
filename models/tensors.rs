//! Named tensors going into and coming out of a forward pass.

use std::collections::BTreeMap;

use burn::tensor::{Bool, Device, Int, Tensor, TensorData};

use crate::error::Error;

/// The inputs of a forward pass by the reference's argument names, asked for one by one; what is wrong
/// with them is gathered and told at the end.
pub struct Inputs<'a> {
    system: &'static str,
    tensors: &'a BTreeMap<String, TensorData>,
    /// What stands before the names of the case that is being asked for, with a dot at the end; or nothing.
    case: String,
    asked: Vec<String>,
    problems: Vec<String>,
    device: Device,
}

/// The label of what is not to be predicted.
const NOT_COUNTED: i64 = -100;

/// The outputs by the reference's names.
pub type Outputs = Vec<(String, TensorData)>;

impl<'a> Inputs<'a> {
    /// The tensors for `system`, to be placed on `device`.
    pub fn new(system: &'static str, tensors: &'a BTreeMap<String, TensorData>, device: &Device) -> Self {
        let case = String::new();
        Self { system, tensors, case, asked: Vec::new(), problems: Vec::new(), device: device.clone() }
    }

    /// The cases that have an input `name`, in order: `packed.` where there is `packed.input_ids`, nothing where there is
    /// `input_ids`. Each is another run of the same weights.
    pub fn cases(&self, name: &str) -> Vec<String> {
        let case = |key: &String| key.strip_suffix(name).map(str::to_owned);
        self.tensors.keys().filter_map(case).filter(|case| case.is_empty() || case.ends_with('.')).collect()
    }

    /// Asks for the inputs of another case from here on, as [`Inputs::cases`] names it.
    pub fn enter(&mut self, case: &str) {
        self.case = case.to_owned();
    }

    /// A float input of rank `D`, if there is one.
    pub fn float<const D: usize>(&mut self, name: &'static str) -> Option<Tensor<D>> {
        let data = self.ranked::<D>(name)?;
        if !data.dtype().is_float() {
            let found = data.dtype();
            self.problem(format!("`{}` holds {found:?}, expected floating-point numbers", self.full(name)));
            return None;
        }
        Some(Tensor::from_data(data.convert::<f32>(), &self.device))
    }

    /// As [`Inputs::pictures`], which must be there.
    pub fn needed_pictures(&mut self, name: &'static str, wanted: [usize; 3]) -> Option<Tensor<4>> {
        self.missing(name);
        self.pictures(name, wanted)
    }

    /// Weights of rank `D`, if there are any: floats, or whole numbers or truth values, which are 0 and 1.
    pub fn weights<const D: usize>(&mut self, name: &'static str) -> Option<Tensor<D>> {
        let data = self.ranked::<D>(name)?;
        Some(Tensor::from_data(data.convert::<f32>(), &self.device))
    }

    /// A whole-number input of rank `D`, if there is one, each at least 0 and below `limit`.
    pub fn ids<const D: usize>(&mut self, name: &'static str, limit: usize) -> Option<Tensor<D, Int>> {
        let data = self.ranked::<D>(name)?;
        Some(Tensor::from_data(self.whole(name, data, limit)?, &self.device))
    }

    /// Ids to be predicted, if there are any, and which of them count: each is below `limit`, or -100, which does not
    /// count and becomes 0.
    pub fn labels(&mut self, name: &'static str, limit: usize) -> Option<(Tensor<2, Int>, Tensor<2, Bool>)> {
        let data = self.ranked::<2>(name)?;
        let shape = data.shape().clone();
        let counts: Vec<bool> = data.iter::<f64>().map(|label| label != NOT_COUNTED as f64).collect();
        let data = match data.dtype().is_float() {
            true => data, // to be refused
            false => {
                let id = |label| if label == NOT_COUNTED { 0 } else { label };
                TensorData::new(data.iter::<i64>().map(id).collect::<Vec<_>>(), shape.clone())
            }
        };
        let ids = Tensor::from_data(self.whole(name, data, limit)?, &self.device);
        Some((ids, Tensor::from_data(TensorData::new(counts, shape), &self.device)))
    }

    /// Pictures `[batch, channels, height, width]`, if there are any; `wanted` are their channels, height and width.
    pub fn pictures(&mut self, name: &'static str, wanted: [usize; 3]) -> Option<Tensor<4>> {
        let pictures = self.float::<4>(name)?;
        let [_, found @ ..] = pictures.dims();
        if found != wanted {
            self.problem(format!("`{}` has pictures of {found:?}, expected {wanted:?}", self.full(name)));
            return None;
        }
        Some(pictures)
    }

    /// Whole numbers in a list or a single one, if there are any, each at least 0 and below `limit`.
    pub fn list(&mut self, name: &'static str, limit: usize) -> Option<Vec<usize>> {
        let data = self.one_or_list(name)?;
        let data = self.whole(name, data, limit)?;
        Some(data.iter::<i64>().map(|number| number as usize).collect())
    }

    /// Numbers in a list or a single one, if there are any, whole or not.
    pub fn numbers(&mut self, name: &'static str) -> Option<Tensor<1>> {
        let data = self.one_or_list(name)?;
        let numbers: Vec<f32> = data.iter::<f32>().collect();
        Some(Tensor::from_data(numbers.as_slice(), &self.device))
    }

    fn one_or_list(&mut self, name: &str) -> Option<TensorData> {
        let data = self.find(name)?;
        let dims: Vec<usize> = data.shape().iter().copied().collect();
        if dims.len() > 1 || dims.contains(&0) {
            self.problem(format!("`{}` is {dims:?}, expected one number or a list", self.full(name)));
            return None;
        }
        Some(data)
    }

    fn whole(&mut self, name: &str, data: TensorData, limit: usize) -> Option<TensorData> {
        if data.dtype().is_float() {
            let found = data.dtype();
            self.problem(format!("`{}` holds {found:?}, expected whole numbers", self.full(name)));
            return None;
        }
        let data = data.convert::<i64>();
        if let Some(wrong) = data.iter::<i64>().find(|&id| id < 0 || id >= limit as i64) {
            self.problem(format!("`{}` holds {wrong}, expected 0 to {}", self.full(name), limit - 1));
            return None;
        }
        Some(data)
    }

    /// A mask of rank 2, if there is one: `true` where it is not zero.
    pub fn mask(&mut self, name: &'static str) -> Option<Tensor<2, Bool>> {
        self.truths(name)
    }

    /// A mask of rank `D`, if there is one: `true` where it is not zero.
    pub fn truths<const D: usize>(&mut self, name: &'static str) -> Option<Tensor<D, Bool>> {
        let data = self.ranked::<D>(name)?;
        let shape = data.shape().clone();
        let real: Vec<bool> = data.convert::<f32>().iter::<f32>().map(|value| value != 0.0).collect();
        Some(Tensor::from_data(TensorData::new(real, shape), &self.device))
    }

    /// Which token sees which, if it is said: `true` where it is not zero. One of rank 4 is `[batch, heads, seq, seq]`, one
    /// of rank 3 is the same for all heads; any axis but the last two may be 1.
    pub fn visible(&mut self, name: &'static str) -> Option<Tensor<4, Bool>> {
        let data = match self.rank(name) {
            Some(3) => self.ranked::<3>(name),
            _ => self.ranked::<4>(name),
        }?;
        let shape = match data.shape().as_slice() {
            &[batch, queries, keys] => vec![batch, 1, queries, keys],
            shape => shape.to_vec(),
        };
        let seen: Vec<bool> = data.convert::<f32>().iter::<f32>().map(|value| value != 0.0).collect();
        Some(Tensor::from_data(TensorData::new(seen, shape), &self.device))
    }

    /// How many dimensions the input `name` has, if it is there.
    pub fn rank(&self, name: &str) -> Option<usize> {
        self.tensors.get(&self.full(name)).map(|data| data.shape().as_slice().len())
    }

    /// That the input `name`, if it is there, has the shape of `input_ids`.
    pub fn like_ids(&mut self, name: &str, found: Option<[usize; 2]>, ids: [usize; 2]) {
        self.like(name, found, ("input_ids", ids));
    }

    /// That the input `name`, if it is there, has the shape of another one.
    pub fn like<const D: usize>(&mut self, name: &str, found: Option<[usize; D]>, other: (&str, [usize; D])) {
        let (other, wanted) = other;
        if let Some(found) = found.filter(|found| *found != wanted) {
            self.problem(format!("`{}` is {found:?}, `{}` {wanted:?}", self.full(name), self.full(other)));
        }
    }

    /// That the input `name`, if it is there, has this shape.
    pub fn shaped<const D: usize>(&mut self, name: &str, found: Option<[usize; D]>, wanted: [usize; D]) {
        if let Some(found) = found.filter(|found| *found != wanted) {
            self.problem(format!("`{}` is {found:?}, expected {wanted:?}", self.full(name)));
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
        let name = self.full(name);
        if !self.tensors.contains_key(&name) {
            self.problems.push(format!("the input `{name}` is missing"));
        }
    }

    /// That there is a case of one of these inputs, or that the first of them is missing.
    pub fn needed(&mut self, names: &[&'static str]) {
        self.enter("");
        if let [first, ..] = names
            && names.iter().all(|name| self.cases(name).is_empty())
        {
            self.missing(first);
        }
    }

    /// One number for each of so many rows: those of the input `name`, of which one alone stands for all.
    pub fn each_row(&mut self, name: &str, numbers: Vec<usize>, rows: usize) -> Option<Vec<usize>> {
        match numbers[..] {
            [number] => Some(vec![number; rows]),
            _ if numbers.len() == rows => Some(numbers),
            _ => {
                let (name, found) = (self.full(name), numbers.len());
                self.problem(format!(
                    "`{name}` has {found} numbers, expected one, or one for each of {rows} rows"
                ));
                None
            }
        }
    }

    /// That nothing is wrong and nothing is left over.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub fn finish(mut self) -> Result<(), Error> {
        for name in self.tensors.keys().filter(|name| !self.asked.contains(name)) {
            self.problems.push(format!("the input `{name}` is not one of {}", self.asked.join(", ")));
        }
        if self.problems.is_empty() {
            Ok(())
        } else {
            Err(Error::Input { system: self.system, problems: self.problems })
        }
    }

    fn ranked<const D: usize>(&mut self, name: &str) -> Option<TensorData> {
        let data = self.find(name)?;
        let dims: Vec<usize> = data.shape().iter().copied().collect();
        if dims.len() != D || dims.contains(&0) {
            self.problem(format!(
                "`{}` is {dims:?}, expected {D} dimensions, none of them 0",
                self.full(name)
            ));
            return None;
        }
        Some(data)
    }

    fn find(&mut self, name: &str) -> Option<TensorData> {
        let name = self.full(name);
        let data = self.tensors.get(&name).cloned();
        if !self.asked.contains(&name) {
            self.asked.push(name);
        }
        data
    }

    /// An input's name in the case that is being asked for.
    pub fn full(&self, name: &str) -> String {
        format!("{}{name}", self.case)
    }
}

/// An output tensor as f32.
pub fn output<const D: usize>(name: &str, tensor: Tensor<D>) -> (String, TensorData) {
    (name.into(), tensor.into_data().convert::<f32>())
}

/// A single number as f32, without a dimension.
pub fn scalar(name: &str, tensor: Tensor<1>) -> (String, TensorData) {
    (name.into(), TensorData::new(vec![tensor.into_scalar::<f32>()], [0; 0]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_come_as_floats_whole_numbers_or_truths() {
        let kinds = [
            TensorData::from([[1f32, 0.0]]),
            TensorData::from([[1i64, 0]]),
            TensorData::from([[1u8, 0]]),
            TensorData::from([[true, false]]),
        ];
        for data in kinds {
            let tensors = BTreeMap::from([("keep".to_owned(), data)]);
            let mut inputs = Inputs::new("test", &tensors, &Device::flex());
            let found = inputs.weights::<2>("keep").unwrap().into_data();
            assert_eq!(found, TensorData::from([[1f32, 0.0]]));
            assert!(inputs.finish().is_ok());
        }
    }
}
