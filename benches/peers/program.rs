// What benches beside other programs share: each program is a process that waits while another one computes.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A program that answers a line with a line.
pub struct Program {
    process: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it, and tells what it says of itself.
    pub fn start(command: &mut Command) -> Result<Self> {
        let told = format!("{command:?}");
        let mut process = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("{told} does not start"))?;
        let (asks, answers) = (process.stdin.take(), process.stdout.take());
        let asks = asks.context("it is piped")?;
        let answers = BufReader::new(answers.context("it is piped")?);
        let mut program = Self { process, asks, answers };
        eprintln!("{}", program.answer()?);
        Ok(program)
    }

    pub fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.asks, "{question}")?;
        self.answer()
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the program ended, see above");
        Ok(line.trim().to_owned())
    }

    /// What Linux counts of it so far, of all its threads, in hundredths of a second.
    fn cpu_seconds(&self) -> Result<f64> {
        let file = format!("/proc/{}/stat", self.process.id());
        let status = std::fs::read_to_string(file).context("/proc is read for CPU time")?;
        let (_, fields) = status.rsplit_once(')').context("no name in its stat")?;
        // after the state, which is no number, come ten others
        let ticks: Vec<f64> = fields.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        Ok(ticks.get(10..12).context("no times in its stat")?.iter().sum::<f64>() / 100.0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill(); // it may have ended
        let _ = self.process.wait();
    }
}

/// Values one after the other, as little-endian f32.
#[allow(dead_code)] // not every bench has such files
pub fn write(file: &Path, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    std::fs::write(file, bytes).with_context(|| format!("{} is not written", file.display()))
}

/// What [`write`] wrote.
#[allow(dead_code)]
pub fn read(file: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(file).with_context(|| format!("{} is not read", file.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// That two programs make the same, as a share of the greatest number.
pub fn agree(ours: &[f32], theirs: &[f32], tolerance: f32) -> Result<()> {
    ensure!(ours.len() == theirs.len(), "{} numbers and {}", ours.len(), theirs.len());
    let scale = theirs.iter().fold(0.0_f32, |most, value| most.max(value.abs()));
    let apart = ours.iter().zip(theirs).map(|(a, b)| (a - b).abs());
    let worst = apart.max_by(f32::total_cmp).context("there are no numbers")? / scale; // NaN is worst
    eprintln!("greatest difference of {} numbers: {worst:.1e} of the greatest", ours.len());
    ensure!(worst <= tolerance, "the programs differ by {worst:e}, {tolerance:e} is allowed");
    Ok(())
}

/// A question that a program answers with the seconds that its work took.
pub struct Work {
    /// Which of the programs.
    pub program: usize,
    pub question: String,
    /// How many times it does the work in one answer.
    pub times: usize,
}

/// Seconds of one work, sorted.
#[derive(Clone, Default)]
pub struct Figures {
    pub wall: Vec<f64>,
    pub cpu: Vec<f64>,
}

impl Figures {
    pub fn median(&self) -> f64 {
        self.wall[self.wall.len() / 2]
    }
}

/// All works in turns, after a turn that does not count.
pub fn in_turns(programs: &mut [Program], works: &[Work], rounds: usize) -> Result<Vec<Figures>> {
    let mut figures = vec![Figures::default(); works.len()];
    for round in 0..=rounds {
        for (Work { program, question, times }, figures) in works.iter().zip(&mut figures) {
            let program = &mut programs[*program];
            let before = program.cpu_seconds()?;
            let wall: f64 = program.ask(question)?.parse().context("seconds were expected")?;
            if round > 0 {
                figures.wall.push(wall / *times as f64);
                figures.cpu.push((program.cpu_seconds()? - before) / *times as f64);
            }
        }
    }
    for Figures { wall, cpu } in &mut figures {
        wall.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
    }
    Ok(figures)
}

/// The median, the least and the greatest.
pub fn told(sorted: &[f64]) -> String {
    let (median, least, greatest) = (sorted[sorted.len() / 2], sorted[0], sorted[sorted.len() - 1]);
    format!("{median:.3} ({least:.3}-{greatest:.3})")
}
