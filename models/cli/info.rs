//! `volary info`

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary::Error;
use volary::folder::Folder;
use volary::pictures;
use volary::preset::{Preset, bytes, count};
use volary::pretrained::{EMBEDDED, Place, locate};
use volary::record::Record;
use volary::registry::{Description, System, preset};
use volary_vision::image::content;
use volary_weights::hub::{Choice, HubError, Outline};
use volary_weights::{Parameter, Quantization};

use super::{Shared, say, say_json};

/// Arguments of `info`.
#[derive(Args)]
pub struct Arguments {
    /// A folder, a preset or owner/name[@revision], or a picture that was imagined; without it the model inside this program.
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
    license: Option<String>,
    /// Bytes of weights that a download would bring; of those here there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    download: Option<u64>,
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
    /// How weights are packed, if they are.
    #[serde(skip_serializing_if = "Option::is_none")]
    quantization: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    preprocessor: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
    /// Of a pipeline, which has preprocessor and tokenizer among them if it has any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    parts: Vec<Part>,
    /// What does not fit between weights and model.
    problems: Vec<String>,
}

/// A part of a pipeline.
#[derive(Serialize)]
struct Part {
    name: &'static str,
    /// What its configuration calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    class: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parameters: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokenizer: Option<String>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let name = arguments.name.as_deref().unwrap_or(EMBEDDED);
    let file = Path::new(name);
    if file.is_file() && content(file).is_ok() {
        return of_picture(&Record::read(file)?, shared);
    }
    let choice = Choice { variant: shared.variant.clone(), ..Choice::default() };
    let mut info = match (find(name, &choice, shared), preset(name)) {
        (Ok((folder, download)), _) => Info { download, ..of_folder(name, &folder)? },
        // A preset is known without its weights; what else went wrong is told.
        (Err(error), Some((system, preset))) => {
            if matches!(&error, Error::Hub(error) if !matches!(error, HubError::Offline { .. })) {
                eprintln!("warning: {error}; this is what is known without it");
            }
            of_preset(system, preset)
        }
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
    if let Some(bytes) = info.download {
        say(format!("download      {:.1} MiB, not here yet", bytes as f64 / f64::from(1 << 20)))?;
    }
    if let Some(stored) = &info.stored {
        let dtypes: Vec<String> = stored.dtypes.iter().map(|(dtype, n)| format!("{n} x {dtype}")).collect();
        say(format!("stored        {}", dtypes.join(", ")))?;
        if let Some(quantization) = &stored.quantization {
            say(format!("quantized     {quantization}"))?;
        }
        if let Some(preprocessor) = &stored.preprocessor {
            say(format!("preprocessor  {preprocessor}"))?;
        }
        if let Some(tokenizer) = &stored.tokenizer {
            say(format!("tokenizer     {tokenizer}"))?;
        }
        for Part { name, class, parameters, tokenizer } in &stored.parts {
            let parameters = parameters.map(|count| format!("{count} parameters"));
            let told: Vec<&str> =
                [class, &parameters, tokenizer].into_iter().flatten().map(String::as_str).collect();
            say(format!("part          {name}: {}", told.join(", ")))?;
        }
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

/// What a picture was imagined from. Its texts may come from anyone: what would move the cursor is not printed.
fn of_picture(record: &Record, shared: &Shared) -> Result<()> {
    if shared.json {
        return say_json(record);
    }
    say(record.told().replace(|c: char| c.is_control() && c != '\n', "\u{FFFD}"))
}

/// The folder of a name. Of a repository that is not in the cache, the headers of its weights; and the bytes that
/// are left to download.
fn find(name: &str, choice: &Choice, shared: &Shared) -> Result<(Folder, Option<u64>), Error> {
    match locate(name)? {
        Place::Here(folder) => Ok((folder.variant(choice.variant.as_deref())?, None)),
        Place::Hub(repo) => Ok(match shared.hub()?.outline(&repo, choice)? {
            Outline::Here(snapshot) => {
                (Folder::Disk(snapshot.folder).variant(choice.variant.as_deref())?, None)
            }
            Outline::There { snapshot, headers, bytes } => {
                (Folder::Headers { path: snapshot.folder, weights: headers }, Some(bytes))
            }
        }),
    }
}

fn of_preset(system: &System, preset: &Preset) -> Info {
    let parameters = preset.shape.parameters();
    Info {
        name: preset.name.into(),
        system: system.name,
        file: system.file,
        parameters: count(&parameters),
        memory: memory(&parameters),
        license: Some(preset.license.into()),
        download: None,
        stored: None,
        shapes: Vec::new(),
    }
}

fn of_folder(name: &str, folder: &Folder) -> Result<Info> {
    let system = System::of(folder)?;
    let Description { parameters, problems, dtypes, quantization } = (system.describe)(folder)?;
    let preprocessor = || match folder.preprocessor() {
        Ok(preprocessor) => match preprocessor.image_size() {
            Some([height, width]) => format!("{height}x{width} pixels"),
            None => "a size that depends on the picture".into(),
        },
        Err(error) => format!("none ({error})"),
    };
    let parts = match pictures::parts(folder) {
        Ok(parts) => parts.into_iter().map(|(name, folder)| part(name, &folder, &parameters)).collect(),
        Err(_) => Vec::new(), // it does not draw
    };
    let is_whole = parts.is_empty();
    Ok(Info {
        name: name.into(),
        system: system.name,
        file: system.file,
        parameters: count(&parameters),
        memory: memory(&parameters),
        license: preset(name).map(|(_, preset)| preset.license.to_owned()).or_else(|| folder.license()),
        download: None,
        stored: Some(Stored {
            dtypes,
            quantization,
            preprocessor: is_whole.then(preprocessor),
            tokenizer: is_whole.then(|| tokenizer(folder)),
            parts,
            problems: problems.iter().map(ToString::to_string).collect(),
        }),
        shapes: parameters.into_iter().map(|parameter| (parameter.path, parameter.shape)).collect(),
    })
}

fn tokenizer(folder: &Folder) -> String {
    match folder.tokenizer() {
        Ok(tokenizer) => format!("{} tokens", tokenizer.vocab_size()),
        Err(error) => format!("none ({error})"),
    }
}

/// A part of a pipeline that has these parameters.
fn part(name: &'static str, folder: &Folder, parameters: &[Parameter]) -> Part {
    let config = ["config.json", "scheduler_config.json"].iter().find_map(|file| folder.config(file).ok());
    let class = config.as_ref().and_then(|config| {
        let listed = config.texts("architectures").and_then(|names| names.into_iter().next());
        config.text("_class_name").map(str::to_owned).or(listed)
    });
    let own: Vec<Parameter> = parameters
        .iter()
        .filter(|parameter| parameter.path.starts_with(&format!("{name}.")))
        .cloned()
        .collect();
    Part {
        name,
        class,
        parameters: Some(count(&own)).filter(|&count| count > 0),
        tokenizer: config.is_none().then(|| tokenizer(folder)),
    }
}

/// In 8 and 4 bits as `--dtype` has it: matrices in blocks of 32, all else in f32.
fn memory(parameters: &[Parameter]) -> BTreeMap<&'static str, usize> {
    BTreeMap::from([
        ("f32", bytes(parameters, 4, None)),
        ("bf16", bytes(parameters, 2, None)),
        ("f16", bytes(parameters, 2, None)),
        ("int8", bytes(parameters, 4, Some(Quantization::INT8))),
        ("int4", bytes(parameters, 4, Some(Quantization::INT4))),
    ])
}
