//! What benches beside other programs share: each program is a process that waits while another one computes.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use burn::tensor::{Tensor, TensorData};
use volary_kernels::Instructions;

/// Between two works: threads of the one before may still be waiting for more, which they do by spinning.
const PAUSE: Duration = Duration::from_millis(50);

/// A program that answers a line with a line: see [`serve`].
pub struct Program {
    process: Child,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Program {
    /// Starts it with so many threads, and tells what it says of itself.
    pub fn start(command: &mut Command, threads: usize) -> Result<Self> {
        let told = format!("{command:?}");
        for variable in ["RAYON_NUM_THREADS", "OMP_NUM_THREADS"] {
            command.env(variable, threads.to_string());
        }
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

    /// What comes out of a work.
    pub fn values(&mut self, work: &str, folder: &Path) -> Result<Vec<f32>> {
        let file = folder.join("output.f32");
        self.ask(&format!("write {work} {}", file.display()))?;
        read(&file)
    }

    fn answer(&mut self) -> Result<String> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the program ended, see above");
        Ok(line.trim().to_owned())
    }

    fn file(&self, name: &str) -> Result<String> {
        let file = format!("/proc/{}/{name}", self.process.id());
        std::fs::read_to_string(&file).with_context(|| format!("{file} is not read"))
    }

    /// What Linux counts of it so far, of all its threads, in hundredths of a second.
    fn cpu_seconds(&self) -> Result<f64> {
        let status = self.file("stat")?;
        let (_, fields) = status.rsplit_once(')').context("no name in its stat")?;
        // after the state, which is no number, come ten others
        let ticks: Vec<f64> = fields.split_whitespace().filter_map(|field| field.parse().ok()).collect();
        Ok(ticks.get(10..12).context("no times in its stat")?.iter().sum::<f64>() / 100.0)
    }

    /// The peak of its resident set so far, mapped files included, as Linux counts it.
    pub fn peak_mib(&self) -> Result<f64> {
        let status = self.file("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM line")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.process.kill(); // it may have ended
        let _ = self.process.wait();
    }
}

/// A script in the Python that `VOLARY_PYTHON` names.
pub fn python(script: &Path) -> Command {
    let mut command = Command::new(std::env::var("VOLARY_PYTHON").unwrap_or_else(|_| "python3".into()));
    command.arg(script);
    command
}

/// PyTorch's side: `pytorch.py` of the folder of peers.
pub fn pytorch(peers: &Path) -> Command {
    python(&peers.join("pytorch.py"))
}

/// candle's side: the program that `VOLARY_CANDLE` names, or the one that cargo makes of the folder of peers, if it can.
pub fn candle(peers: &Path) -> Option<PathBuf> {
    if let Some(program) = std::env::var_os("VOLARY_CANDLE") {
        return Some(program.into());
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("candle");
    eprintln!("VOLARY_CANDLE names no program: cargo builds candle's in {}", target.display());
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.args(["build", "--release", "--locked", "--manifest-path"]);
    command.arg(peers.join("candle/Cargo.toml")).arg("--target-dir").arg(&target);
    if command.status().is_ok_and(|status| status.success()) {
        return Some(target.join("release/volary-peer-candle"));
    }
    eprintln!("it cannot: candle is not run");
    None
}

/// What a work took, and what came out of it.
pub struct Done {
    pub seconds: f64,
    pub output: TensorData,
}

/// Computes something, on one of the threads that compute, as the command line does. Flex is done when it gives the tensor.
pub fn timed<const D: usize>(run: impl FnOnce() -> Tensor<D> + Send) -> Done {
    rayon::scope(|_| {
        let start = Instant::now();
        let output = run();
        Done { seconds: start.elapsed().as_secs_f64(), output: output.into_data() }
    })
}

/// Our own side: says what it computes with, and answers `write WORK FILE` and `time WORK TIMES`, line by line, until
/// there is no more.
pub fn serve(mut run: impl FnMut(&str) -> Result<Done>) -> Result<()> {
    volary_kernels::memory::keep_freed(); // as the command line does
    println!("volary, {} threads, {}", rayon::current_num_threads(), Instructions::in_use().name());
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["write", work, file] => {
                write(Path::new(file), &run(work)?.output.iter::<f32>().collect::<Vec<_>>())?;
                println!("written");
            }
            ["time", work, times] => {
                let mut seconds = 0.0;
                for _ in 0..times.parse()? {
                    seconds += run(work)?.seconds;
                }
                println!("{seconds}");
            }
            _ => bail!("`{line}` is neither `write WORK FILE` nor `time WORK TIMES`"),
        }
    }
    Ok(())
}

/// Values one after the other, as little-endian f32.
pub fn write(file: &Path, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    std::fs::write(file, bytes).with_context(|| format!("{} is not written", file.display()))
}

/// What [`write`] wrote.
pub fn read(file: &Path) -> Result<Vec<f32>> {
    let bytes = std::fs::read(file).with_context(|| format!("{} is not read", file.display()))?;
    Ok(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
}

/// How far programs are apart: the root of the mean square of the difference, as a share of that of what is expected.
pub fn apart(found: &[f32], expected: &[f32]) -> Result<f64> {
    ensure!(found.len() == expected.len(), "{} numbers for {}", found.len(), expected.len());
    let square = |value: f32| f64::from(value) * f64::from(value);
    let apart: f64 = found.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    Ok((apart / expected.iter().map(|&value| square(value)).sum::<f64>()).sqrt())
}

/// A work that a program is asked to do.
pub struct Work {
    /// Which of the programs.
    pub program: usize,
    pub work: String,
    /// How many times it does it in one answer.
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

/// All works in turns.
pub fn in_turns(programs: &mut [Program], works: &[Work], rounds: usize) -> Result<Vec<Figures>> {
    let mut figures = vec![Figures::default(); works.len()];
    for _ in 0..rounds {
        for (Work { program, work, times }, figures) in works.iter().zip(&mut figures) {
            std::thread::sleep(PAUSE);
            let program = &mut programs[*program];
            let before = program.cpu_seconds()?;
            let answer = program.ask(&format!("time {work} {times}"))?;
            let wall: f64 = answer.parse().with_context(|| format!("`{answer}` is no number of seconds"))?;
            figures.wall.push(wall / *times as f64);
            figures.cpu.push((program.cpu_seconds()? - before) / *times as f64);
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
