//! What the experts of a run are given to do, step by step: numbers for the bar, and a picture.

use std::fmt::Write;

use volary_kernels::moe::{Balance, Routing};

/// What the experts of one layer get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Choices of each expert.
    pub experts: Vec<usize>,
    /// Choices that were dropped.
    pub dropped: usize,
}

/// What the experts of every layer got, step by step.
///
/// ```
/// use volary::recipe::load::{Load, LoadMonitor};
///
/// let mut monitor = LoadMonitor::default();
/// monitor.see(vec![Load { experts: vec![6, 2], dropped: 0 }]); // one step of one layer of two experts
/// assert_eq!(monitor.told(1), "load: cv 0.50, max/mean 1.50, entropy 0.81 of 1, dropped 0.0 %");
/// assert!(monitor.svg("load").contains("<polygon"));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LoadMonitor {
    /// Of each step, of each layer.
    steps: Vec<Vec<Load>>,
}

/// That a text is not what [`LoadMonitor::csv`] writes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("line {line}: `{found}` is not `step,layer,dropped,load of each expert`")]
pub struct LoadError {
    /// Which, counted from 1.
    pub line: usize,
    /// What it is.
    pub found: String,
}

impl Load {
    /// Of what a gate said.
    pub fn of(routing: &Routing) -> Self {
        Self { experts: routing.load.clone(), dropped: routing.dropped }
    }

    /// Both together.
    ///
    /// # Panics
    /// If they are not of as many experts.
    pub fn add(&mut self, other: &Load) {
        assert_eq!(self.experts.len(), other.experts.len(), "experts of one load (left) and another");
        self.experts.iter_mut().zip(&other.experts).for_each(|(load, other)| *load += other);
        self.dropped += other.dropped;
    }

    /// Which part of all that were not dropped each expert gets; zeros where there are none.
    pub fn shares(&self) -> Vec<f64> {
        let all = self.experts.iter().sum::<usize>().max(1) as f64;
        self.experts.iter().map(|&load| load as f64 / all).collect()
    }

    /// How even it is.
    pub fn balance(&self) -> Balance {
        Balance::of(&self.experts, self.dropped)
    }
}

/// The loads of the same layers in parts of a batch, added up.
///
/// # Panics
/// If the parts are not of the same layers.
pub fn sum(parts: impl IntoIterator<Item = Vec<Load>>) -> Vec<Load> {
    let both = |mut sum: Vec<Load>, part: Vec<Load>| {
        assert_eq!(sum.len(), part.len(), "layers of one part (left) and another");
        sum.iter_mut().zip(&part).for_each(|(sum, load)| sum.add(load));
        sum
    };
    parts.into_iter().reduce(both).unwrap_or_default()
}

impl LoadMonitor {
    /// The loads of one more step, layer by layer.
    ///
    /// # Panics
    /// If they are not of the layers and experts that the steps before had.
    pub fn see(&mut self, layers: Vec<Load>) {
        let shape = |layers: &[Load]| layers.iter().map(|load| load.experts.len()).collect::<Vec<_>>();
        if let Some(first) = self.steps.first() {
            assert_eq!(shape(&layers), shape(first), "experts of each layer (left) and of those before");
        }
        self.steps.push(layers);
    }

    /// How many steps it saw.
    pub fn steps(&self) -> usize {
        self.steps.len()
    }

    /// The loads of each layer in the newest steps, added up; none where nothing was seen.
    pub fn newest(&self, steps: usize) -> Vec<Load> {
        sum(self.steps[self.steps.len().saturating_sub(steps)..].iter().cloned())
    }

    /// How even the newest steps are, in a few words: means over the layers. Entropies are of their highest.
    pub fn told(&self, steps: usize) -> String {
        let layers = self.newest(steps);
        let mean =
            |of: &dyn Fn(&Load) -> f64| layers.iter().map(of).sum::<f64>() / layers.len().max(1) as f64;
        let most = |load: &Load| (load.experts.len().max(2) as f64).ln();
        format!(
            "load: cv {:.2}, max/mean {:.2}, entropy {:.2} of 1, dropped {:.1} %",
            mean(&|load| load.balance().variation),
            mean(&|load| load.balance().max_over_mean),
            mean(&|load| load.balance().entropy / most(load)),
            100.0 * mean(&|load| load.balance().drop_rate),
        )
    }

    /// One line for each layer of each step, to be read by [`LoadMonitor::read`].
    pub fn csv(&self) -> String {
        let mut out = String::new();
        for (step, layers) in self.steps.iter().enumerate() {
            for (layer, Load { experts, dropped }) in layers.iter().enumerate() {
                let experts: Vec<String> = experts.iter().map(usize::to_string).collect();
                let _ = writeln!(out, "{step},{layer},{dropped},{}", experts.join(","));
            }
        }
        out
    }

    /// What [`LoadMonitor::csv`] has written.
    ///
    /// # Errors
    /// With the first line that is something else.
    pub fn read(csv: &str) -> Result<Self, LoadError> {
        let mut monitor = Self::default();
        for (at, line) in csv.lines().enumerate() {
            let wrong = || LoadError { line: at + 1, found: line.into() };
            let numbers: Result<Vec<usize>, _> = line.split(',').map(str::parse).collect();
            let numbers = numbers.map_err(|_| wrong())?;
            let [step, layer, dropped, experts @ ..] = &numbers[..] else { return Err(wrong()) };
            if *layer == 0 && *step == monitor.steps.len() {
                monitor.steps.push(Vec::new());
            }
            let is_next = *step + 1 == monitor.steps.len();
            let first = monitor.steps.first().and_then(|layers| layers.get(*layer));
            let fits = *step == 0 || first.is_some_and(|load| load.experts.len() == experts.len());
            match monitor.steps.last_mut() {
                Some(layers) if is_next && fits && layers.len() == *layer && !experts.is_empty() => {
                    layers.push(Load { experts: experts.to_vec(), dropped: *dropped });
                }
                _ => return Err(wrong()),
            }
        }
        let layers = monitor.steps.first().map_or(0, Vec::len);
        match monitor.steps.iter().position(|step| step.len() != layers) {
            Some(step) => {
                Err(LoadError { line: csv.lines().count(), found: format!("the end of step {step}") })
            }
            None => Ok(monitor),
        }
    }

    /// Draws which part of the choices each expert gets over time: one panel for each layer, one band for each expert, the
    /// first at the bottom. Dashes are where the bands would meet, were the loads even. Dropped choices are not drawn.
    pub fn svg(&self, title: &str) -> String {
        const WIDTH: f64 = 720.0;
        const MARGIN: f64 = 48.0;
        const PANEL: f64 = 110.0;
        const GAP: f64 = 26.0;
        /// Steps are added up to at most so many points.
        const POINTS: usize = 96;
        let layers = self.steps.first().map_or(0, Vec::len);
        let height = MARGIN + layers as f64 * (PANEL + GAP) + 12.0;
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n<text x=\"{MARGIN}\" y=\"24\" font-size=\"15\">{title}</text>\n"
        );
        let stride = self.steps.len().div_ceil(POINTS).max(1);
        let times: Vec<Vec<Load>> =
            self.steps.chunks(stride).map(|steps| sum(steps.iter().cloned())).collect();
        let right = WIDTH - MARGIN;
        let last = times.len().saturating_sub(1).max(1) as f64;
        let x = |time: usize| MARGIN + (right - MARGIN) * time as f64 / last;
        for layer in 0..layers {
            let top = MARGIN + layer as f64 * (PANEL + GAP);
            let y = |part: f64| top + PANEL * (1.0 - part);
            let n_experts = self.steps[0][layer].experts.len();
            // below each expert, at each time
            let below = |time: &Vec<Load>, expert: usize| {
                let experts = &time[layer].experts;
                let all: usize = experts.iter().sum();
                experts[..expert].iter().sum::<usize>() as f64 / all.max(1) as f64
            };
            for expert in 0..n_experts {
                let mut points = String::new();
                // a single time is drawn as wide as the panel
                let all: Vec<usize> = if times.len() == 1 { vec![0, 0] } else { (0..times.len()).collect() };
                let edge = |expert: usize| {
                    let places = all.iter().enumerate();
                    places
                        .map(|(place, &time)| (x(place), y(below(&times[time], expert))))
                        .collect::<Vec<_>>()
                };
                for (x, y) in edge(expert).into_iter().chain(edge(expert + 1).into_iter().rev()) {
                    let _ = write!(points, "{x:.1},{y:.1} ");
                }
                let hue = 360.0 * expert as f64 / n_experts as f64;
                let _ = writeln!(
                    out,
                    "<polygon points=\"{points}\" fill=\"hsl({hue:.0},55%,68%)\" stroke=\"white\" stroke-width=\"0.4\"/>"
                );
            }
            for expert in 1..n_experts {
                let row = y(expert as f64 / n_experts as f64);
                let _ = writeln!(
                    out,
                    "<line x1=\"{MARGIN}\" x2=\"{right}\" y1=\"{row:.1}\" y2=\"{row:.1}\" stroke=\"#333\" stroke-width=\"0.5\" stroke-dasharray=\"3 4\"/>"
                );
            }
            let _ = writeln!(
                out,
                "<text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">layer {layer}</text>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">1</text>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">0</text>",
                top - 6.0,
                MARGIN - 6.0,
                top + 10.0,
                MARGIN - 6.0,
                top + PANEL,
            );
        }
        let _ = writeln!(
            out,
            "<text x=\"{MARGIN}\" y=\"{:.1}\">step 0</text><text x=\"{right}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n</svg>",
            height - 12.0,
            height - 12.0,
            self.steps.len(),
        );
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(experts: &[usize], dropped: usize) -> Load {
        Load { experts: experts.to_vec(), dropped }
    }

    fn monitor() -> LoadMonitor {
        let mut monitor = LoadMonitor::default();
        monitor.see(vec![load(&[3, 1], 0), load(&[0, 2, 0], 2)]);
        monitor.see(vec![load(&[1, 3], 0), load(&[2, 0, 2], 0)]);
        monitor
    }

    #[test]
    fn what_was_written_is_read() {
        assert_eq!(monitor().csv(), "0,0,0,3,1\n0,1,2,0,2,0\n1,0,0,1,3\n1,1,0,2,0,2\n");
        assert_eq!(LoadMonitor::read(&monitor().csv()), Ok(monitor()));
        assert_eq!(LoadMonitor::read(""), Ok(LoadMonitor::default()));
        for (csv, line) in [
            ("0,0,0", 1),
            ("0,0,0,1\nx,0,0,1\n", 2),
            ("0,1,0,1\n", 1),
            ("0,0,0,1\n2,0,0,1\n", 2),
            ("0,0,0,1\n1,0,0,1,2\n", 2),
            ("0,0,0,1\n0,1,0,1\n1,0,0,1\n", 3),
            ("0,0,0,1\n1,0,0,1\n1,1,0,1\n", 3),
        ] {
            assert_eq!(LoadMonitor::read(csv).map_err(|error| error.line), Err(line), "{csv:?}");
        }
    }

    #[test]
    fn the_newest_steps_are_added_up() {
        assert_eq!(monitor().newest(1), [load(&[1, 3], 0), load(&[2, 0, 2], 0)]);
        assert_eq!(monitor().newest(9), [load(&[4, 4], 0), load(&[2, 2, 2], 2)]);
        assert_eq!(LoadMonitor::default().newest(1), []);
        // of two even layers, of which one dropped 2 of 8
        let told = monitor().told(2);
        assert_eq!(told, "load: cv 0.00, max/mean 1.00, entropy 1.00 of 1, dropped 12.5 %");
    }

    /// The bands of the first panel, from 158 to 48: three quarters of the height, then one quarter.
    #[test]
    fn bands_are_as_high_as_the_loads() {
        let drawn = monitor().svg("load");
        assert!(drawn.contains("points=\"48.0,158.0 672.0,158.0 672.0,130.5 48.0,75.5 \""), "{drawn}");
        assert_eq!(drawn.matches("<polygon").count(), 5);
        assert!(drawn.contains("layer 1") && !drawn.contains("layer 2"));
        assert!(LoadMonitor::default().svg("nothing").ends_with("</svg>\n"));
    }

    #[test]
    #[should_panic(expected = "experts of each layer")]
    fn a_step_has_the_experts_of_those_before() {
        let mut monitor = monitor();
        monitor.see(vec![load(&[3, 1], 0)]);
    }
}
