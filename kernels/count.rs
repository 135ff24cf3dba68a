//! What products cost: counted as they are made, by all threads.

use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

use burn::tensor::Tensor;

static OPERATIONS: AtomicU64 = AtomicU64::new(0);
static WEIGHTS: AtomicU64 = AtomicU64::new(0);

/// What the products of linear layers, convolutions, attention and experts took.
///
/// Counted are their forward passes through [`crate::ops`], whatever device and body they have. Norms, activations, sums, and
/// products that a model makes by itself are not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating point operations: two for each product of two numbers.
    pub operations: u64,
    /// Bytes of the weights, each time they are used.
    pub weights: u64,
}

impl Cost {
    /// All since the program began.
    pub fn so_far() -> Self {
        let [operations, weights] = [&OPERATIONS, &WEIGHTS].map(|count| count.load(Ordering::Relaxed));
        Self { operations, weights }
    }
}

impl Sub for Cost {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self { operations: self.operations - before.operations, weights: self.weights - before.weights }
    }
}

/// So many products of two numbers are made, of weights of so many bytes.
pub(crate) fn add(products: usize, weights: usize) {
    OPERATIONS.fetch_add(2 * products as u64, Ordering::Relaxed);
    WEIGHTS.fetch_add(weights as u64, Ordering::Relaxed);
}

/// The bytes of a weight.
pub(crate) fn bytes<const D: usize>(weight: &Tensor<D>) -> usize {
    weight.shape().num_elements() * weight.dtype().size()
}
