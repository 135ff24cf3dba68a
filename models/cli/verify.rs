//! `volary verify`

use std::path::Path;

use anyhow::{Result, ensure};
use clap::Args;
use serde::Serialize;
use volary_weights::hub::{Lock, Pins, Report};

use super::{Shared, say, say_json};

/// Arguments of `verify`.
#[derive(Args)]
pub struct Arguments {
    /// Repositories (owner/name[@revision]) or folders; without any, all that the lock file has.
    #[arg(value_name = "OWNER/NAME|DIR")]
    names: Vec<String>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    file: String,
    ok: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let hub = shared.offline_hub()?;
    let must_be_there = arguments.names.is_empty() || shared.locked;
    let lock = if must_be_there { Pins::read(&shared.lock)?.into_lock() } else { Lock::read(&shared.lock)? };
    let reports: Vec<Report> = match arguments.names.is_empty() {
        true => lock
            .repositories
            .iter()
            .map(|entry| hub.verify(&entry.repo(), &lock))
            .collect::<Result<_, _>>()?,
        false => {
            let verify = |name: &String| match Path::new(name).is_dir() {
                true => hub.verify_folder(Path::new(name), &lock),
                false => hub.verify(&name.parse()?, &lock),
            };
            arguments.names.iter().map(verify).collect::<Result<_, _>>()?
        }
    };
    let rows = reports.iter().flat_map(|report| {
        report.findings.iter().map(|finding| Row {
            name: report.name.clone(),
            file: finding.file.clone(),
            ok: finding.problem.is_none(),
            problem: finding.problem.as_ref().map(ToString::to_string),
        })
    });
    let rows: Vec<Row> = rows.collect();
    if shared.json {
        say_json(&rows)?;
    } else {
        for Row { name, file, problem, .. } in &rows {
            if let Some(problem) = problem {
                say(format!("{name}: {file}: {problem}"))?;
            }
        }
        for report in &reports {
            let wrong = report.findings.iter().filter(|finding| finding.problem.is_some()).count();
            say(format!(
                "{}: {} of {} files are right",
                report.name,
                report.findings.len() - wrong,
                report.findings.len()
            ))?;
        }
    }
    let wrong = rows.iter().filter(|row| !row.ok).count();
    ensure!(wrong == 0, "{wrong} of {} files are not what they should be", rows.len());
    Ok(())
}
