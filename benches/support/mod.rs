//! What benches share that run each side as a process of its own.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// The Python of the peers: `VOLARY_PYTHON`, or `python3`.
pub fn python() -> String {
    std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into())
}

/// What a program prints on standard output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?} does not start"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// What one run took.
#[derive(Clone, Copy)]
pub struct Figure {
    pub seconds: f64,
    /// Of the resident set at its peak.
    pub mib: f64,
}

/// Seconds and MiB, as the program prints them.
pub fn measured(command: &mut Command) -> Result<Figure> {
    let output = run(command)?;
    let mut words = output.split_whitespace().map(str::parse::<f64>);
    match (words.next(), words.next()) {
        (Some(Ok(seconds)), Some(Ok(mib))) => Ok(Figure { seconds, mib }),
        _ => bail!("{command:?} printed `{output}`, not seconds and MiB"),
    }
}

/// All values of one kind, sorted.
pub fn sorted(figures: &[Figure], pick: impl Fn(&Figure) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = figures.iter().map(pick).collect();
    values.sort_by(f64::total_cmp);
    values
}
