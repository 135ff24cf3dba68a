//! The chart of the peer bench: a line for each row, a dot for each program, by its seconds as a share of PyTorch's in f32.

use std::fmt::Write;

/// A row's seconds in f32 of Volary, PyTorch and candle, and in bf16 of Volary and PyTorch, where they are known.
pub struct Bar {
    pub what: String,
    pub seconds: [Option<f64>; 5],
}

/// What a dot is called, its colour, and whether it is filled: those of bf16 are not.
const DOTS: [(&str, &str, bool); 5] = [
    ("volary f32", "#0a5", true),
    ("PyTorch f32", "#666", true),
    ("candle f32", "#c60", true),
    ("volary bf16", "#0a5", false),
    ("PyTorch bf16", "#666", false),
];
const WIDTH: f64 = 760.0;
/// Where the first line is, and from one to the next.
const TOP: f64 = 92.0;
const STEP: f64 = 30.0;
/// Where lines begin and end.
const LEFT: f64 = 220.0;
const RIGHT: f64 = WIDTH - 40.0;
/// The shares at both ends.
const LEAST: f64 = 1.0 / 16.0;
const MOST: f64 = 16.0;

/// Rows that have no seconds of PyTorch in f32 are left out.
pub fn svg(bars: &[Bar]) -> String {
    let rows: Vec<(&Bar, f64)> = bars.iter().filter_map(|bar| Some((bar, bar.seconds[1]?))).collect();
    let bottom = TOP + STEP * (rows.len() as f64 - 1.0) + 24.0;
    let height = bottom + 36.0;
    let x = |share: f64| {
        let share = share.clamp(LEAST, MOST);
        LEFT + (RIGHT - LEFT) * (share / LEAST).log2() / (MOST / LEAST).log2()
    };
    let mut svg = format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="13">
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
<text x="16" y="26" font-size="15">Time by that of PyTorch in f32: to the left is faster</text>
"##
    );
    // a string takes all that is written
    for (at, &dot) in DOTS.iter().enumerate() {
        let left = 24.0 + 145.0 * at as f64;
        let _ = writeln!(
            svg,
            r##"{}<text x="{}" y="54">{}</text>"##,
            circle(left, 50.0, dot),
            left + 11.0,
            dot.0
        );
    }
    let mut share = LEAST;
    while share <= MOST {
        let (x, colour) = (x(share), if share == 1.0 { "#666" } else { "#ddd" });
        let name = if share < 1.0 { format!("1/{}", 1.0 / share) } else { share.to_string() };
        let _ = writeln!(
            svg,
            r##"<path d="M{x:.1} {}V{bottom}" stroke="{colour}"/><text x="{x:.1}" y="{}" text-anchor="middle">{name}</text>"##,
            TOP - 18.0,
            bottom + 20.0
        );
        share *= 2.0;
    }
    for (at, (bar, pytorch)) in rows.iter().enumerate() {
        let y = TOP + STEP * at as f64;
        let _ = writeln!(
            svg,
            r##"<text x="{}" y="{:.1}" text-anchor="end">{}</text>"##,
            LEFT - 14.0,
            y + 4.5,
            bar.what
        );
        for (seconds, &dot) in bar.seconds.iter().zip(&DOTS) {
            if let Some(seconds) = seconds {
                let _ = writeln!(svg, "{}", circle(x(seconds / pytorch), y, dot));
            }
        }
    }
    svg + "</svg>\n"
}

fn circle(x: f64, y: f64, (_, colour, filled): (&str, &str, bool)) -> String {
    let fill = if filled { colour } else { "#fff" };
    format!(r##"<circle cx="{x:.1}" cy="{y:.1}" r="5" fill="{fill}" stroke="{colour}" stroke-width="2"/>"##)
}
