//! Maps of another size, as a network resizes them. Pictures are resized by [`crate::resample`].

/// How a map is read between its cells. The numbers are those of PyTorch's `interpolate` with `align_corners=False` and
/// without antialiasing: what lies beyond the border repeats it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interpolation {
    /// The cell that starts before.
    Nearest,
    /// The two nearest cells, by how near they are.
    Bilinear,
    /// Four cells, by Keys' cubic with `a = -0.75`, which overshoots.
    Bicubic,
}

impl Interpolation {
    /// For each of `to` places along a side which of `from` cells it takes, and how much of them.
    pub(crate) fn taps(self, from: usize, to: usize) -> Vec<Vec<(usize, f32)>> {
        let cell = |at: i64| at.clamp(0, from as i64 - 1) as usize;
        let centre = |place: usize| (place as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let taps = |place: usize| match self {
            Self::Nearest => {
                let scale = from as f32 / to as f32;
                vec![(cell((place as f32 * scale) as i64), 1.0)]
            }
            Self::Bilinear => {
                let centre = centre(place).max(0.0);
                let t = centre.fract() as f32;
                let first = centre as i64;
                vec![(cell(first), 1.0 - t), (cell(first + 1), t)]
            }
            Self::Bicubic => {
                let centre = centre(place);
                let t = centre - centre.floor();
                let weights = [far(1.0 + t), near(t), near(1.0 - t), far(2.0 - t)];
                let first = centre.floor() as i64 - 1;
                (first..).zip(weights).map(|(at, weight)| (cell(at), weight as f32)).collect()
            }
        };
        (0..to).map(taps).collect()
    }

    /// A map of `[height, width]`, row by row, at another size.
    pub(crate) fn resize(self, map: &[f32], from: [usize; 2], to: [usize; 2]) -> Vec<f32> {
        let (rows, columns) = (self.taps(from[0], to[0]), self.taps(from[1], to[1]));
        let width = from[1];
        let mut resized = Vec::with_capacity(to[0] * to[1]);
        let mut row = vec![0.0; width];
        for taps in &rows {
            row.fill(0.0);
            for &(source, weight) in taps {
                let source = &map[source * width..][..width];
                row.iter_mut().zip(source).for_each(|(sum, value)| *sum += weight * value);
            }
            let read =
                |taps: &Vec<(usize, f32)>| taps.iter().map(|&(at, weight)| weight * row[at]).sum::<f32>();
            resized.extend(columns.iter().map(read));
        }
        resized
    }
}

/// What [`Interpolation::Bicubic`] makes of cells beside the place.
const A: f64 = -0.75;

/// How much a cell up to 1 away counts.
fn near(t: f64) -> f64 {
    ((A + 2.0) * t - (A + 3.0)) * t * t + 1.0
}

/// How much a cell from 1 to 2 away counts.
fn far(t: f64) -> f64 {
    ((A * t - 5.0 * A) * t + 8.0 * A) * t - 4.0 * A
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of `torch.nn.functional.interpolate(torch.tensor([[[[0., 1, 4], [9, 16, 25]]]]), size, mode=...)`.
    #[test]
    fn literals_of_torch() {
        let map = [0.0, 1.0, 4.0, 9.0, 16.0, 25.0];
        let cases: [(_, [usize; 2], &[f32]); 6] = [
            (Interpolation::Nearest, [3, 4], &[0.0, 0.0, 1.0, 4.0, 0.0, 0.0, 1.0, 4.0, 9.0, 9.0, 16.0, 25.0]),
            (Interpolation::Nearest, [1, 2], &[0.0, 1.0]),
            (
                Interpolation::Bilinear,
                [3, 4],
                &[0.0, 0.625, 2.125, 4.0, 4.5, 7.0, 10.75, 14.5, 9.0, 13.375, 19.375, 25.0],
            ),
            (Interpolation::Bilinear, [1, 2], &[5.5, 13.0]),
            (
                Interpolation::Bicubic,
                [4, 3],
                &[
                    -0.949_218_75,
                    -0.582_031_25,
                    1.785_156_2,
                    2.039_062_5,
                    4.398_437_5,
                    8.757_812_5,
                    6.960_937_5,
                    12.601_562,
                    20.242_188,
                    9.949_219,
                    17.582_031,
                    27.214_844,
                ],
            ),
            (Interpolation::Bicubic, [1, 2], &[5.195_312_5, 13.281_25]),
        ];
        for (interpolation, to, expected) in cases {
            let found = interpolation.resize(&map, [2, 3], to);
            assert_eq!(found.len(), expected.len());
            let close = found.iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5);
            assert!(close, "{interpolation:?} {to:?}: {found:?}");
        }
    }
}
