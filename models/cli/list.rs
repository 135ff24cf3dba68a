//! `volary list`

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary::preset::Preset;
use volary::registry::{SYSTEMS, System};

use super::{Shared, Usage, say, say_json};

/// Arguments of `list`.
#[derive(Args)]
pub struct Arguments {
    /// Only systems that can do this.
    #[arg(long)]
    task: Option<String>,
}

#[derive(Serialize)]
struct Listed {
    system: &'static str,
    about: &'static str,
    tasks: &'static [&'static str],
    proved: &'static [&'static str],
    presets: Vec<Size>,
}

#[derive(Serialize)]
struct Size {
    name: &'static str,
    parameters: usize,
    weights: &'static str,
    license: &'static str,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let fits = |system: &&System| match &arguments.task {
        Some(task) => system.tasks.contains(&task.as_str()),
        None => true,
    };
    let listed: Vec<Listed> = SYSTEMS.iter().filter(fits).map(listed).collect();
    if listed.is_empty() {
        let mut tasks: Vec<&str> = SYSTEMS.iter().flat_map(|system| system.tasks).copied().collect();
        tasks.sort_unstable();
        tasks.dedup();
        return Err(Usage(format!("no system does that; known tasks: {}", tasks.join(", "))).into());
    }
    if shared.json {
        return say_json(&listed);
    }
    for system in listed {
        say(format!("{}: {}", system.system, system.about))?;
        say(format!("  tasks: {}; agrees with: {}", system.tasks.join(", "), system.proved.join(", ")))?;
        for Size { name, parameters, weights, license } in system.presets {
            say(format!("  {name:<48} {:>9.1} M  {weights:<14} {license}", parameters as f64 / 1e6))?;
        }
    }
    Ok(())
}

fn listed(system: &System) -> Listed {
    let size = |preset: &Preset| Size {
        name: preset.name,
        parameters: preset.parameters,
        weights: preset.weights.told(),
        license: preset.license,
    };
    Listed {
        system: system.name,
        about: system.about,
        tasks: system.tasks,
        proved: system.proved,
        presets: system.presets.iter().map(size).collect(),
    }
}
