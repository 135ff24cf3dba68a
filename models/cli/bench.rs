//! `volary bench`

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary::bench::{Rate, bench, peak_memory};
use volary_kernels::{Instructions, Peak};

use super::{Model, Shared, say, say_json};

/// Arguments of `bench`.
#[derive(Args)]
pub struct Arguments {
    /// A folder, a preset, or owner/name; without it the model inside this program that looks at pictures.
    #[arg(value_name = "MODEL")]
    model: Option<String>,
    /// How often everything is done; the median counts.
    #[arg(long, default_value_t = 5, value_name = "N")]
    rounds: usize,
}

#[derive(Serialize)]
struct Report {
    device: String,
    kernels: &'static str,
    threads: usize,
    seconds_to_load: f64,
    /// Of the processor; of no other device.
    peak_gflops: Option<f64>,
    /// Of the processor's memory.
    peak_gbytes_per_second: Option<f64>,
    /// Of this process, in MiB, where the system tells.
    peak_memory: Option<f64>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    what: String,
    unit: &'static str,
    per_second: f64,
    seconds: f64,
    gflops: f64,
    /// Weights that were read.
    gbytes_per_second: f64,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let model = Model { model: arguments.model, text_model: None };
    let (folder, device) = (shared.folder(model.name())?, shared.device()?);
    let found = bench(&folder, &shared.load_options(), &device, arguments.rounds)?;
    let peak_memory = peak_memory();
    let peak = (shared.device == "cpu").then(Peak::measure);
    let report = Report {
        device: shared.device.clone(),
        kernels: Instructions::in_use().name(),
        threads: rayon::current_num_threads(),
        seconds_to_load: found.seconds_to_load,
        peak_gflops: peak.map(|peak| peak.operations * 1e-9),
        peak_gbytes_per_second: peak.map(|peak| peak.bytes * 1e-9),
        peak_memory,
        rows: found.rates.iter().map(Row::of).collect(),
    };
    if shared.json {
        return say_json(&report);
    }
    say(format!("{}, {} threads, kernels {}", report.device, report.threads, report.kernels))?;
    if let Some(Peak { operations, bytes }) = peak {
        let (operations, bytes) = (operations * 1e-9, bytes * 1e-9);
        say(format!("this machine: {operations:.0} GFLOP/s in f32, reads {bytes:.1} GB/s"))?;
    }
    say(format!("loaded in {:.2} s", report.seconds_to_load))?;
    say(format!("{:24} {:>18} {:>10} {:>22} {:>20}", "", "", "seconds", "GFLOP/s", "weights GB/s"))?;
    for row in &report.rows {
        let share = |rate: f64, most: Option<f64>| match most {
            Some(most) => format!("{rate:.1} ({:.0} %)", 100.0 * rate / most),
            None => format!("{rate:.1}"),
        };
        let rate = format!("{:.2} {}/s", row.per_second, row.unit);
        let gflops = share(row.gflops, report.peak_gflops);
        let gbytes = share(row.gbytes_per_second, report.peak_gbytes_per_second);
        say(format!("{:24} {rate:>18} {:>10.4} {gflops:>22} {gbytes:>20}", row.what, row.seconds))?;
    }
    match report.peak_memory {
        Some(mib) => say(format!("peak memory {mib:.0} MiB")),
        None => Ok(()),
    }
}

impl Row {
    fn of(rate: &Rate) -> Self {
        Self {
            what: rate.what.clone(),
            unit: rate.unit,
            per_second: rate.per_second(),
            seconds: rate.seconds,
            gflops: rate.operations() * 1e-9,
            gbytes_per_second: rate.weights() * 1e-9,
        }
    }
}
