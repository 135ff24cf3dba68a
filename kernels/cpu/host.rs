//! Tensors whose values lie in this machine's memory: bodies read and write them where they lie.

use std::marker::PhantomData;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{DType, Device, Element, Tensor, TensorData};
use bytemuck::Pod;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

/// Values of a parallel task: few enough to stay in a core's nearest cache, many enough to be worth a thread.
pub const TASK: usize = 8 * 1024;

/// An expression in which a name stands for the type of a tensor's values that [`is_host`].
macro_rules! by_type {
    ($dtype:expr, $name:ident => $body:expr) => {
        match $dtype {
            burn::tensor::DType::F32 => {
                type $name = f32;
                $body
            }
            burn::tensor::DType::F16 => {
                type $name = half::f16;
                $body
            }
            _ => {
                type $name = half::bf16;
                $body
            }
        }
    };
}
pub(crate) use by_type;

/// Whether a tensor lies in this machine's memory, in f32 or in less, and no gradients are wanted.
pub fn is_host<const D: usize>(x: &Tensor<D>) -> bool {
    let device = x.device();
    device == Device::flex()
        && !device.is_autodiff()
        && matches!(x.dtype(), DType::F32 | DType::F16 | DType::BF16)
}

/// Whether the values of a tensor that [`is_host`] lie in order, so that [`Values`] copies none.
pub fn is_in_order<const D: usize>(x: &Tensor<D>) -> bool {
    x.clone().try_into_primitive::<Flex>().is_ok_and(|x| x.is_contiguous())
}

/// The values of a tensor, in order.
#[derive(Clone, Debug)]
pub struct Values<T = f32>(FlexTensor, PhantomData<T>);

impl<T: Element + Pod> Values<T> {
    /// As they are. Nothing is copied of values that lie in order; others are brought into order.
    ///
    /// # Panics
    /// If it is not [`is_host`], or its values are of another type.
    pub fn held<const D: usize>(x: Tensor<D>) -> Self {
        assert_eq!(x.dtype(), T::dtype(), "type of a tensor's values (left) and of those wanted");
        let x = x.try_into_primitive::<Flex>();
        let x = x.unwrap_or_else(|error| panic!("the tensor is not in this machine's memory: {error:?}"));
        Self(if x.is_contiguous() { x } else { x.to_contiguous() }, PhantomData)
    }
}

impl Values {
    /// In f32. Nothing is copied of f32 values that lie in order; others are cast, or brought into order.
    ///
    /// # Panics
    /// If it is not [`is_host`].
    pub fn of<const D: usize>(x: Tensor<D>) -> Self {
        Self::held(x.cast(DType::F32))
    }
}

impl<T: Element + Pod> std::ops::Deref for Values<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.0.as_slice().unwrap_or_default() // of this type and in order, as `held` makes them
    }
}

/// Rows of a tensor of four axes where they lie, each in order.
#[derive(Debug)]
pub struct Rows<T> {
    held: FlexTensor,
    /// How far its first, second and third axis go.
    strides: [usize; 3],
    width: usize,
    of: PhantomData<T>,
}

/// Rows, each in order and as far behind the one before.
#[derive(Clone, Copy, Debug)]
pub struct Strided<'a, T> {
    /// From the first one on.
    pub values: &'a [T],
    /// How far they are apart.
    pub stride: usize,
    /// How long each is.
    pub width: usize,
}

impl<T: Element + Pod> Rows<T> {
    /// As they are. Nothing is copied of rows that are in order, as those of a part of a buffer are.
    ///
    /// # Panics
    /// If it is not [`is_host`], or its values are of another type.
    pub fn held(x: Tensor<4>) -> Self {
        assert_eq!(x.dtype(), T::dtype(), "type of a tensor's values (left) and of those wanted");
        let [.., width] = x.dims();
        let x = x.try_into_primitive::<Flex>();
        let mut x = x.unwrap_or_else(|error| panic!("the tensor is not in this machine's memory: {error:?}"));
        let is_forward = |x: &FlexTensor| x.layout().strides().iter().all(|&stride| stride >= 0);
        let is_in_order = |x: &FlexTensor| width == 1 || x.layout().strides()[3] == 1;
        if !is_forward(&x) || !is_in_order(&x) {
            x = x.to_contiguous();
        }
        let strides = std::array::from_fn(|axis| x.layout().strides()[axis].unsigned_abs());
        Self { held: x, strides, width, of: PhantomData }
    }

    /// Those at one place of the first two axes.
    pub fn at(&self, [first, second]: [usize; 2]) -> Strided<'_, T> {
        let start = self.held.layout().start_offset() + first * self.strides[0] + second * self.strides[1];
        Strided { values: &self.held.storage()[start..], stride: self.strides[2], width: self.width }
    }
}

impl<'a, T> Strided<'a, T> {
    /// One of them.
    #[inline(always)]
    pub fn row(self, at: usize) -> &'a [T] {
        &self.values[at * self.stride..][..self.width]
    }
}

/// A tensor of these values.
pub fn tensor<T: Element, const D: usize>(values: Vec<T>, shape: [usize; D]) -> Tensor<D> {
    Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(values, shape)))
}

/// What the values of a tensor that [`is_host`] may be.
pub trait Float: Element + Pod + Send + Sync {
    /// Calls `body` with these values in f32, and rounds what it makes of them; `whole` is for it to use.
    fn in_f32(values: &mut [Self], whole: &mut Vec<f32>, body: impl FnOnce(&mut [f32]));

    /// Adds to each value of `x` that of `y`: sums are f32, and rounded.
    fn add(x: &mut [Self], y: &[Self]);
}

impl Float for f32 {
    fn in_f32(values: &mut [Self], _: &mut Vec<f32>, body: impl FnOnce(&mut [f32])) {
        body(values);
    }

    fn add(x: &mut [Self], y: &[Self]) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

macro_rules! half {
    ($name:ident) => {
        impl Float for $name {
            fn in_f32(values: &mut [Self], whole: &mut Vec<f32>, body: impl FnOnce(&mut [f32])) {
                whole.resize(values.len(), 0.0);
                values.convert_to_f32_slice(whole);
                body(whole);
                values.convert_from_f32_slice(whole);
            }

            fn add(x: &mut [Self], y: &[Self]) {
                const BLOCK: usize = 256;
                let [mut sums, mut others] = [[0.0; BLOCK]; 2];
                for (x, y) in x.chunks_mut(BLOCK).zip(y.chunks(BLOCK)) {
                    let (sums, others) = (&mut sums[..x.len()], &mut others[..y.len()]);
                    x.convert_to_f32_slice(sums);
                    y.convert_to_f32_slice(others);
                    f32::add(sums, others);
                    x.convert_from_f32_slice(sums);
                }
            }
        }
    };
}
half!(f16);
half!(bf16);

/// Values that tasks change: where they lie if nobody else holds them, and otherwise in a copy, into which each task takes
/// its own part.
struct Changed<T> {
    held: Values<T>,
    copy: Option<Vec<T>>,
}

impl<T: Float> Changed<T> {
    fn of<const D: usize>(x: Tensor<D>) -> Self {
        Self { held: Values::held(x), copy: None }
    }

    /// Whether nobody else holds them.
    fn are_own(&self) -> bool {
        let Values(held, _) = &self.held;
        held.is_unique() && held.bytes().len() == size_of_val::<[T]>(&self.held)
    }

    /// Parts of so many values, each for a task.
    fn parts(&mut self, size: usize) -> impl IndexedParallelIterator<Item = &mut [T]> {
        let (values, from): (&mut [T], &[T]) = match self.are_own() {
            true => (self.held.0.storage_mut(), &[]),
            false => (self.copy.insert(vec![T::zeroed(); self.held.len()]), &self.held),
        };
        values.par_chunks_mut(size).enumerate().map(move |(task, part)| {
            if !from.is_empty() {
                part.copy_from_slice(&from[task * size..][..part.len()]);
            }
            part
        })
    }

    fn tensor<const D: usize>(self, shape: [usize; D]) -> Tensor<D> {
        match self.copy {
            Some(copy) => tensor(copy, shape),
            None => Tensor::from_primitive::<Flex>(self.held.0),
        }
    }
}

/// Calls `body` with rows of `width` values of `x` and the number of the first of them, until all have been changed, several
/// calls at a time. Where nobody else holds `x` it is changed where it lies, and copied on the way otherwise.
///
/// Half precision becomes f32 for each call, and is rounded again after it.
///
/// # Panics
/// If `x` is not [`is_host`], or `width` does not divide the values.
pub fn change<const D: usize>(
    x: Tensor<D>,
    width: usize,
    body: impl Fn(usize, &mut [f32]) + Sync,
) -> Tensor<D> {
    let shape = x.dims();
    if shape.contains(&0) {
        return x;
    }
    assert_rows(shape, width);
    by_type!(x.dtype(), T => {
        let rows = rows(width);
        let mut x = Changed::<T>::of(x);
        x.parts(rows * width).enumerate().for_each_init(Vec::new, |whole, (task, x)| {
            T::in_f32(x, whole, |values| body(task * rows, values));
        });
        x.tensor(shape)
    })
}

/// `x + y`, and what `body` makes of rows of `width` values of it; both where `x` and `y` lie, as far as nobody else holds
/// them.
///
/// Half precision is added up in f32 and rounded, and is rounded again after each call.
///
/// # Panics
/// If not both are [`is_host`], they differ in shape or type, or `width` does not divide the values.
pub fn add_and_change<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    width: usize,
    body: impl Fn(&mut [f32]) + Sync,
) -> (Tensor<D>, Tensor<D>) {
    let shape = same_shape(&x, &y);
    assert_rows(shape, width);
    by_type!(x.dtype(), T => {
        let size = rows(width) * width;
        let (mut x, mut y) = (Changed::<T>::of(x), Changed::<T>::of(y));
        x.parts(size).zip(y.parts(size)).for_each_init(Vec::new, |whole, (x, y)| {
            T::add(x, y);
            y.copy_from_slice(x);
            T::in_f32(y, whole, &body);
        });
        (x.tensor(shape), y.tensor(shape))
    })
}

/// What `body` makes of rows of `width` values of `x + y`, where one of them lies that nobody else holds.
///
/// Half precision is added up in f32 and rounded, and is rounded again after each call.
///
/// # Panics
/// If not both are [`is_host`], they differ in shape or type, or `width` does not divide the values.
pub fn change_sum<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    width: usize,
    body: impl Fn(&mut [f32]) + Sync,
) -> Tensor<D> {
    assert_rows(x.dims(), width);
    by_type!(x.dtype(), T => add_by_part::<T, D>(x, y, rows(width) * width, |whole, sum| {
        T::in_f32(sum, whole, &body);
    }))
}

/// `x + y`, where one of them lies that nobody else holds.
///
/// # Panics
/// If not both are [`is_host`], or they differ in shape or type.
pub fn add<const D: usize>(x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
    by_type!(x.dtype(), T => add_by_part::<T, D>(x, y, TASK, |_, _| {}))
}

/// What `then` makes of parts of `x + y`, where one of them lies that nobody else holds.
fn add_by_part<T: Float, const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    size: usize,
    then: impl Fn(&mut Vec<f32>, &mut [T]) + Sync,
) -> Tensor<D> {
    let shape = same_shape(&x, &y);
    let (mut x, mut y) = (Changed::<T>::of(x), Changed::<T>::of(y));
    if y.are_own() && !x.are_own() {
        std::mem::swap(&mut x, &mut y);
    }
    x.parts(size).zip(y.held.par_chunks(size)).for_each_init(Vec::new, |whole, (x, y)| {
        T::add(x, y);
        then(whole, x);
    });
    x.tensor(shape)
}

/// The shape that both have.
#[track_caller]
pub fn same_shape<const D: usize>(x: &Tensor<D>, y: &Tensor<D>) -> [usize; D] {
    assert_eq!(x.dims(), y.dims(), "shapes of what is added up");
    x.dims()
}

#[track_caller]
fn assert_rows<const D: usize>(shape: [usize; D], width: usize) {
    let count: usize = shape.iter().product();
    assert!(count.is_multiple_of(width), "{shape:?} in rows of {width}");
}

/// How many rows of so many values are a task.
fn rows(width: usize) -> usize {
    (TASK / width).max(1)
}

/// Calls `body` with rows of `width` values and the number of the first of them, several calls at a time.
pub fn by_rows<T: Send>(values: &mut [T], width: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    by_task(values, rows(width) * width, |at, values| body(at / width, values));
}

/// Calls `body` with the place of each part of so many values, and the part.
pub fn by_task<T: Send>(values: &mut [T], size: usize, body: impl Fn(usize, &mut [T]) + Sync) {
    if (1..=size).contains(&values.len()) {
        return body(0, values);
    }
    values.par_chunks_mut(size).enumerate().for_each(|(task, part)| body(task * size, part));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{assert_close, floats, noise};

    /// Whole tensors, those that others hold, parts of others, and turned ones.
    #[test]
    fn every_value_is_changed_once() {
        let device = Device::flex();
        let large = noise([3, 40, 500], 1, &device);
        for x in [
            large.clone() + 0.0,
            large.clone(),
            large.clone().narrow(0, 1, 1),
            large.clone().narrow(0, 0, 2),
            large.clone().narrow(2, 3, 490),
            large.clone().swap_dims(0, 2),
            Tensor::zeros([3, 0, 500], &device),
        ] {
            let [.., width] = x.dims();
            let expected = floats(x.clone());
            let sum = |(at, x): (usize, &f64)| f64::from(*x as f32 + (at / width) as f32);
            let expected: Vec<f64> = expected.iter().enumerate().map(sum).collect();
            let changed = change(x, width, |first, rows| {
                for (row, values) in (first..).zip(rows.chunks_mut(width)) {
                    values.iter_mut().for_each(|value| *value += row as f32);
                }
            });
            assert_close(changed, &expected, 0.0);
        }
    }

    #[test]
    fn rows_are_read_where_they_lie() {
        let buffer = noise([2, 3, 9, 5], 1, &Device::flex());
        let place = Values::of(buffer.clone()).as_ptr();
        let part = buffer.clone().narrow(2, 4, 2);
        let rows = Rows::<f32>::held(part.clone());
        assert_eq!(rows.at([0, 0]).row(0).as_ptr(), place.wrapping_add(4 * 5));
        for x in [part, buffer.clone().swap_dims(1, 2), buffer.clone().swap_dims(2, 3), buffer.flip([2])] {
            let [batch, heads, seq, width] = x.dims();
            let expected: Vec<f32> = x.clone().into_data().iter().collect();
            let rows = Rows::<f32>::held(x);
            for (at, expected) in expected.chunks(width).enumerate() {
                let [row, head, batch_row] = [at % seq, at / seq % heads, at / seq / heads % batch];
                assert_eq!(rows.at([batch_row, head]).row(row), expected);
            }
        }
    }

    #[test]
    fn what_others_hold_stays() {
        let x = noise([4, 9], 1, &Device::flex());
        let before = floats(x.clone());
        for part in [x.clone(), x.clone().narrow(0, 1, 2)] {
            let _ = change(part, 9, |_, values| values.fill(0.0));
        }
        assert_close(x, &before, 0.0);
    }

    #[test]
    fn what_nobody_else_holds_is_not_copied() {
        let x = noise([4, 9], 1, &Device::flex());
        let place = Values::of(x.clone()).as_ptr();
        let y = change(x, 9, |_, values| values.fill(1.0));
        assert_eq!(Values::of(y.clone()).as_ptr(), place);
        assert_close(y, &[1.0; 36], 0.0);
    }

    #[test]
    fn half_precision_is_changed_in_f32() {
        for dtype in [DType::F16, DType::BF16] {
            let x = Tensor::<1>::ones([3], (&Device::flex(), dtype));
            let y = change(x, 1, |_, values| values.iter_mut().for_each(|value| *value *= 1e30));
            assert_eq!(y.dtype(), dtype);
            assert!(floats(y).iter().all(|&y| y.is_infinite() || y > 0.99e30));
        }
    }
}
