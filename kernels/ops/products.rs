use half::f16;

use crate::cpu::Instructions;

/// The dot products of many f16 rows with one f32 row, summed in f32: `rows` `[out.len(), x.len()]`, row after row.
///
/// On the CPU, with the [`Instructions`] in use; bodies differ in the order of
/// their sums.
///
/// # Panics
/// If `rows` does not hold `out.len()` rows as wide as `x`.
pub fn products(rows: &[f16], x: &[f32], out: &mut [f32]) {
    assert_eq!(rows.len(), out.len() * x.len(), "one output per row");
    Instructions::in_use().products(rows, x, out);
}
