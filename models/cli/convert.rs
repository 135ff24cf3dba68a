//! `volary convert`

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use volary::experts::{Numbers, spread_folder};
use volary::export::{Existing, Export, Progress, convert_folder};
use volary::growth::{Mixture, Upcycle, delink_folder, upcycle_folder};
use volary_weights::{ConvertOptions, NotFinite, Overflow};

use super::{Shared, say, say_json};

/// Arguments of `convert`.
#[derive(Args)]
pub struct Arguments {
    /// A checkpoint folder, a preset, or owner/name.
    source: String,
    /// The folder to be written.
    out: PathBuf,
    /// The largest file, e.g. 200MB or 1GiB: more is split into shards. Without it 5GB, and one file for open_clip,
    /// which reads no shards.
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_shard_size: Option<u64>,
    /// The format of the weights.
    #[arg(long, value_enum, default_value = "safetensors")]
    to: To,
    /// Spread the experts of a mixture evenly over so many files, one for each rank that loads them; without it they come
    /// together again.
    #[arg(long, value_name = "RANKS", conflicts_with = "max_shard_size", value_parser = ranks)]
    expert_ranks: Option<usize>,
    /// How experts are numbered in these files: as in the whole model, which any reader of shards loads, or from 0 in each,
    /// as FastMoE's workers do.
    #[arg(long, value_enum, default_value = "global", requires = "expert_ranks")]
    expert_numbers: ExpertNumbers,
    /// Make a mixture of experts of a dense model, which gives the same at first: of a LLaMA a Mixtral, of a CPM-2 a model
    /// with BASE layers. Every expert is a copy of the MLP.
    #[arg(long, value_name = "SYSTEM", value_enum, requires = "experts", conflicts_with = "expert_ranks")]
    upcycle: Option<Mixtures>,
    /// How many experts each layer gets.
    #[arg(long, requires = "upcycle", value_parser = clap::value_parser!(u32).range(1..=65536))]
    experts: Option<u32>,
    /// How many experts a token of a Mixtral goes to.
    #[arg(long, default_value = "2", requires = "upcycle")]
    top_k: usize,
    /// Of the new gates.
    #[arg(long, default_value = "0", requires = "upcycle")]
    seed: u64,
    /// Give the layers of an M6 that share their parameters parameters of their own, which are the same at first.
    #[arg(long, conflicts_with_all = ["upcycle", "expert_ranks"])]
    delink: bool,
    /// Replace the folder if it is there and has weights in it.
    #[arg(long)]
    force: bool,
    /// Let numbers become infinite that are too large for --dtype.
    #[arg(long)]
    allow_overflow: bool,
    /// Keep NaN and infinite values.
    #[arg(long)]
    allow_not_finite: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum To {
    Safetensors,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExpertNumbers {
    Global,
    Local,
}

#[derive(Clone, Copy, ValueEnum)]
enum Mixtures {
    Mixtral,
    Base,
}

/// Runs the command. Without `--dtype` floats stay as they are stored.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { source, out, max_shard_size, to: To::Safetensors, force, .. } = arguments;
    let options = ConvertOptions {
        dtype: shared.written_dtype()?,
        max_shard_size,
        not_finite: if arguments.allow_not_finite { NotFinite::Allow } else { NotFinite::Refuse },
        overflow: if arguments.allow_overflow { Overflow::Allow } else { Overflow::Refuse },
    };
    let bar = Bar::default();
    let (source, existing) = (shared.folder(&source)?, existing(force));
    let export = if let Some(ranks) = arguments.expert_ranks {
        let numbers = match arguments.expert_numbers {
            ExpertNumbers::Global => Numbers::Global,
            ExpertNumbers::Local => Numbers::Local,
        };
        spread_folder(&source, &out, existing, (ranks, numbers), &options, &bar)?
    } else if let (Some(into), Some(experts)) = (arguments.upcycle, arguments.experts) {
        let into = match into {
            Mixtures::Mixtral => Mixture::Mixtral { top_k: arguments.top_k },
            Mixtures::Base => Mixture::Base,
        };
        let upcycle = Upcycle { into, n_experts: experts as usize, seed: arguments.seed };
        upcycle_folder(&source, &out, existing, &upcycle, &options, &bar)?
    } else if arguments.delink {
        delink_folder(&source, &out, existing, &options, &bar)?
    } else {
        convert_folder(&source, &out, existing, &options, &bar)?
    };
    drop(bar);
    let written = Written::new(&export);
    if shared.json {
        return say_json(&written);
    }
    written.say()?;
    say(format!("{}: {:.1} MiB", out.display(), mebibytes(written.bytes)))
}

/// What may be at the place of the new folder.
pub fn existing(force: bool) -> Existing {
    if force { Existing::Replace } else { Existing::Refuse }
}

/// The files of a new folder.
#[derive(Serialize)]
pub struct Written {
    files: Vec<WrittenFile>,
    /// Of all files.
    pub bytes: u64,
    /// Files of the source that were not taken along.
    left_out: Vec<String>,
}

#[derive(Serialize)]
struct WrittenFile {
    file: String,
    bytes: u64,
}

impl Written {
    /// Of an export.
    pub fn new(export: &Export) -> Self {
        let file = |(file, bytes): &(String, u64)| WrittenFile { file: file.clone(), bytes: *bytes };
        Self {
            files: export.files.iter().map(file).collect(),
            bytes: export.files.iter().map(|(_, bytes)| bytes).sum(),
            left_out: export.left_out.clone(),
        }
    }

    /// One line a file.
    pub fn say(&self) -> Result<()> {
        for WrittenFile { file, bytes } in &self.files {
            say(format!("{bytes:>14}  {file}"))?;
        }
        for file in &self.left_out {
            eprintln!("left out: {file}");
        }
        Ok(())
    }
}

/// So many MiB.
pub fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// A bar of the tensors' bytes on standard error, where that is a terminal; cleared at the end.
pub struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        let style = ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} {bytes_per_sec} eta {eta}")
            .expect("the template is valid");
        Self(ProgressBar::new(0).with_style(style))
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

impl Progress for Bar {
    fn begin(&self, bytes: u64) {
        self.0.set_length(bytes);
    }

    fn done(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

/// A number of ranks: Megatron's folders have four digits for them.
fn ranks(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(ranks @ 1..=9999) => Ok(ranks),
        _ => Err(format!("`{text}` is no number of ranks: expected 1 to 9999")),
    }
}

/// A number of bytes: `5GB`, `1.5GiB`, `200MB`, `4096`.
fn size(text: &str) -> Result<u64, String> {
    const UNITS: &[(&str, u64)] = &[
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
        ("TiB", 1 << 40),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
        ("B", 1),
        ("", 1),
    ];
    let lower = text.trim().to_lowercase();
    UNITS
        .iter()
        .find_map(|(unit, bytes)| {
            let number: f64 = lower.strip_suffix(&unit.to_lowercase())?.trim().parse().ok()?;
            let size = number * *bytes as f64;
            (size.is_finite() && size >= 1.0).then_some(size as u64)
        })
        .ok_or_else(|| format!("`{text}` is no size: expected a number with KB, MB, GB, KiB, MiB or GiB"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("5GB", 5_000_000_000), ("1.5 GiB", 3 << 29), ("200mb", 200_000_000), ("4096", 4096), ("7B", 7)]
        {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for text in ["", "GB", "-1GB", "0", "NaN", "inf", "5XB", "1e400"] {
            assert!(size(text).is_err(), "{text}");
        }
    }
}
