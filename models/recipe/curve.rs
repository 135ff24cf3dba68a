//! Loss curves as SVG.

use std::fmt::Write;

/// What is drawn as one line.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// What it is of; shown where there are several.
    pub name: &'a str,
    /// One value per step.
    pub values: &'a [f32],
}

/// Pale for the values, dark for their running mean.
const COLOURS: [[&str; 2]; 4] =
    [["#9ecae1", "#08519c"], ["#fdae6b", "#a63603"], ["#a1d99b", "#006d2c"], ["#bcbddc", "#54278f"]];

/// Draws lines over the same steps, each with its running mean, and axes; zero is always in the frame.
pub fn svg(title: &str, lines: &[Line]) -> String {
    const WIDTH: f32 = 720.0;
    const HEIGHT: f32 = 360.0;
    const MARGIN: f32 = 48.0;
    /// At most so many points of a line: more cannot be told apart.
    const POINTS: usize = 1000;
    let steps = lines.iter().map(|line| line.values.len()).max().unwrap_or(0);
    let last = steps.saturating_sub(1).max(1) as f32;
    let finite = || lines.iter().flat_map(|line| line.values).copied().filter(|value| value.is_finite());
    let bottom = finite().fold(0.0f32, f32::min);
    let range = (finite().fold(0.0f32, f32::max) - bottom).max(1e-6);
    let x = |step: f32| MARGIN + (WIDTH - 2.0 * MARGIN) * step / last;
    let y =
        |value: f32| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * ((value - bottom) / range).clamp(0.0, 1.0);
    let path = |values: &mut dyn Iterator<Item = f32>, stride: usize| {
        values.enumerate().step_by(stride).fold(String::new(), |mut path, (step, value)| {
            let _ = write!(path, "{:.1},{:.1} ", x(step as f32), y(value));
            path
        })
    };
    let right = WIDTH - MARGIN;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{MARGIN}\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    for tick in 0..=4 {
        let (value, step) = (bottom + range * tick as f32 / 4.0, last * tick as f32 / 4.0);
        let (row, column) = (y(value), x(step));
        let _ = writeln!(
            out,
            "<line x1=\"{MARGIN}\" x2=\"{right}\" y1=\"{row:.1}\" y2=\"{row:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{value:.2}</text>\
             <text x=\"{column:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{step:.0}</text>",
            MARGIN - 6.0,
            row + 4.0,
            HEIGHT - MARGIN + 18.0,
        );
    }
    for (at, (line, [pale, dark])) in lines.iter().zip(COLOURS.iter().cycle()).enumerate() {
        let stride = line.values.len().div_ceil(POINTS).max(1);
        let raw = path(&mut line.values.iter().copied(), stride);
        let mut mean = line.values.first().copied().unwrap_or(0.0);
        let mut smoothed = line.values.iter().map(|value| {
            mean += 0.02 * (value - mean);
            mean
        });
        let smooth = path(&mut smoothed, stride);
        let _ = writeln!(
            out,
            "<polyline points=\"{raw}\" fill=\"none\" stroke=\"{pale}\" stroke-width=\"0.8\"/>\n\
             <polyline points=\"{smooth}\" fill=\"none\" stroke=\"{dark}\" stroke-width=\"1.8\"/>"
        );
        if lines.len() > 1 {
            let row = MARGIN + 16.0 * (at + 1) as f32;
            let _ = writeln!(
                out,
                "<text x=\"{right}\" y=\"{row:.1}\" text-anchor=\"end\" fill=\"{dark}\">{}</text>",
                line.name
            );
        }
    }
    out + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(values: &[f32]) -> String {
        svg("loss", &[Line { name: "one", values }])
    }

    #[test]
    fn every_value_is_drawn_inside_the_frame() {
        let drawn = one(&[4.0, 2.0, 1.0]);
        assert!(drawn.contains("48.0,48.0 "), "the highest value starts at the frame's top left: {drawn}");
        assert!(drawn.contains("672.0,246.0 "), "the last at its right: {drawn}");
        let below = one(&[0.0, -1.0, -2.0]);
        assert!(
            below.contains("48.0,48.0 ") && below.contains("672.0,312.0 "),
            "zero is the highest: {below}"
        );
    }

    #[test]
    fn several_lines_share_the_axes_and_are_named() {
        let drawn = svg(
            "loss",
            &[Line { name: "first", values: &[4.0, 2.0] }, Line { name: "second", values: &[2.0, 0.0] }],
        );
        // in the middle of the frame, and at its lower right
        assert!(drawn.contains("points=\"48.0,180.0 672.0,312.0 \""), "{drawn}");
        assert!(drawn.contains(">first</text>") && drawn.contains(">second</text>"), "{drawn}");
        assert!(!one(&[1.0]).contains(">one</text>"));
    }
}
