//! `volary info`

use std::collections::BTreeMap;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary::folder::Folder;
use volary::preset::{Preset, count};
use volary::pretrained::{EMBEDDED, resolve};
use volary::registry::{Description, SYSTEMS, System};

use super::{Shared, say, say_json};

/// Arguments of `info`.
#[derive(Args)]
pub struct Arguments {
    /// A folder or a preset; without it the model inside this program.
    name: Option<String>,
    /// Also list every parameter with its shape.
    #[arg(long)]
    parameters: bool,
}

#[derive(Serialize)]
struct Info {
    name: String,
    system: &'static str,
    file: &'static str,
    parameters: usize,
    /// Bytes of the weights by dtype.
    memory: BTreeMap<&'static str, usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    license: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stored: Option<Stored>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    shapes: Vec<(String, Vec<usize>)>,
}

/// What a folder has beside the model's shape.
#[derive(Serialize)]
struct Stored {
    /// Stored tensors by dtype.
    dtypes: BTreeMap<&'static str, usize>,
    preprocessor: String,
    tokenizer: String,
    /// What does not fit between weights and model.
    problems: Vec<String>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let name = arguments.name.as_deref().unwrap_or(EMBEDDED);
    let mut info = match (resolve(name), preset(name)) {
        (Ok(folder), _) => of_folder(name, &folder)?,
        (Err(_), Some((system, preset))) => of_preset(system, preset),
        (Err(error), None) => return Err(error.into()),
    };
    if !arguments.parameters {
        info.shapes.clear();
    }
    if shared.json {
        return say_json(&info);
    }
    say(format!("{}: {} ({})", info.name, info.system, info.file))?;
    say(format!("parameters    {}", info.parameters))?;
    for (dtype, bytes) in &info.memory {
        say(format!("memory {dtype:<5}  {:.1} MiB", *bytes as f64 / f64::from(1 << 20)))?;
    }
    if let Some(license) = info.license {
        say(format!("license       {license}"))?;
    }
    if let Some(stored) = &info.stored {
        let dtypes: Vec<String> = stored.dtypes.iter().map(|(dtype, n)| format!("{n} x {dtype}")).collect();
        say(format!("stored        {}", dtypes.join(", ")))?;
        say(format!("preprocessor  {}", stored.preprocessor))?;
        say(format!("tokenizer     {}", stored.tokenizer))?;
        for problem in &stored.problems {
            say(format!("does not fit  {problem}"))?;
        }
    }
    for (path, shape) in &info.shapes {
        say(format!("  {path} {shape:?}"))?;
    }
    let problems = info.stored.map_or(0, |stored| stored.problems.len());
    anyhow::ensure!(problems == 0, "{problems} keys do not fit");
    Ok(())
}

fn preset(name: &str) -> Option<(&'static System, &'static Preset)> {
    let of = |system: &'static System| system.presets.iter().map(move |preset| (system, preset));
    SYSTEMS.iter().flat_map(of).find(|(_, preset)| preset.name == name)
}

fn of_preset(system: &System, preset: &Preset) -> Info {
    Info {
        name: preset.name.into(),
        system: system.name,
        file: system.file,
        parameters: preset.shape.count(),
        memory: memory(preset.shape.count()),
        license: Some(preset.license),
        stored: None,
        shapes: Vec::new(),
    }
}

fn of_folder(name: &str, folder: &Folder) -> Result<Info> {
    let system = System::of(folder)?;
    let Description { parameters, problems } = (system.describe)(folder)?;
    let count = count(&parameters);
    let mut dtypes = BTreeMap::new();
    for entry in folder.checkpoint()?.entries() {
        *dtypes.entry(entry.dtype.name()).or_default() += 1;
    }
    let preprocessor = match folder.preprocessor() {
        Ok(preprocessor) => match preprocessor.image_size() {
            Some([height, width]) => format!("{height}x{width} pixels"),
            None => "a size that depends on the picture".into(),
        },
        Err(error) => format!("none ({error})"),
    };
    let tokenizer = match folder.tokenizer() {
        Ok(tokenizer) => format!("{} tokens", tokenizer.vocab_size()),
        Err(error) => format!("none ({error})"),
    };
    Ok(Info {
        name: name.into(),
        system: system.name,
        file: system.file,
        parameters: count,
        memory: memory(count),
        license: preset(name).map(|(_, preset)| preset.license),
        stored: Some(Stored {
            dtypes,
            preprocessor,
            tokenizer,
            problems: problems.iter().map(ToString::to_string).collect(),
        }),
        shapes: parameters.into_iter().map(|parameter| (parameter.path, parameter.shape)).collect(),
    })
}

fn memory(parameters: usize) -> BTreeMap<&'static str, usize> {
    BTreeMap::from([("f32", 4 * parameters), ("bf16", 2 * parameters), ("f16", 2 * parameters)])
}
