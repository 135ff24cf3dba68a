//! A loss curve as SVG.

use std::fmt::Write;

/// Draws `points`, (step, value), as a line with axes and the running mean; zero is always in the frame.
pub fn svg(title: &str, points: &[(usize, f32)]) -> String {
    const WIDTH: f32 = 720.0;
    const HEIGHT: f32 = 360.0;
    const MARGIN: f32 = 48.0;
    let last = points.iter().map(|&(step, _)| step).max().unwrap_or(1).max(1) as f32;
    let finite = || points.iter().map(|&(_, value)| value).filter(|value| value.is_finite());
    let bottom = finite().fold(0.0f32, f32::min);
    let range = (finite().fold(0.0f32, f32::max) - bottom).max(1e-6);
    let x = |step: f32| MARGIN + (WIDTH - 2.0 * MARGIN) * step / last;
    let y =
        |value: f32| HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * ((value - bottom) / range).clamp(0.0, 1.0);
    let line = |values: &mut dyn Iterator<Item = (usize, f32)>| {
        values.fold(String::new(), |mut path, (step, value)| {
            let _ = write!(path, "{:.1},{:.1} ", x(step as f32), y(value));
            path
        })
    };
    // At most 1,000 points: more cannot be told apart.
    let stride = points.len().div_ceil(1000).max(1);
    let raw = line(&mut points.iter().step_by(stride).copied());
    let mut mean = points.first().map_or(0.0, |&(_, value)| value);
    let mut smoothed = points.iter().map(|&(step, value)| {
        mean += 0.02 * (value - mean);
        (step, mean)
    });
    let smooth = line(&mut smoothed.by_ref().step_by(stride));
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{MARGIN}\" y=\"24\" font-size=\"15\">{title}</text>\n"
    );
    for tick in 0..=4 {
        let (value, step) = (bottom + range * tick as f32 / 4.0, last * tick as f32 / 4.0);
        let (row, column) = (y(value), x(step));
        let right = WIDTH - MARGIN;
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
    let _ = write!(
        out,
        "<polyline points=\"{raw}\" fill=\"none\" stroke=\"#9ecae1\" stroke-width=\"0.8\"/>\n\
         <polyline points=\"{smooth}\" fill=\"none\" stroke=\"#08519c\" stroke-width=\"1.8\"/>\n</svg>\n"
    );
    out
}

#[cfg(test)]
mod tests {
    use super::svg;

    #[test]
    fn every_point_is_drawn_inside_the_frame() {
        let drawn = svg("loss", &[(0, 4.0), (10, 2.0), (20, 1.0)]);
        assert!(drawn.contains("48.0,48.0 "), "the highest value starts at the frame's top left: {drawn}");
        assert!(drawn.contains("672.0,246.0 "), "the last at its right: {drawn}");
        let below = svg("loss", &[(0, 0.0), (10, -1.0), (20, -2.0)]);
        assert!(
            below.contains("48.0,48.0 ") && below.contains("672.0,312.0 "),
            "zero is the highest: {below}"
        );
    }
}
