//! One file per command; here are the flags that all of them share.

mod bench;
mod chat;
mod classify;
mod contact_sheet;
mod convert;
mod doctor;
mod drawing;
mod embed;
mod eval;
mod examples;
mod fetch;
mod fill;
mod forward;
mod generate;
mod imagine;
mod info;
mod list;
mod paint;
mod perplexity;
mod plan;
mod preprocess;
mod preview;
mod progress;
mod quantize;
mod replay;
mod search;
mod segment;
mod tokenize;
#[cfg(feature = "train")]
mod train;
mod variations;
mod verify;
mod writing;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use burn::tensor::{Device, FloatDType};
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use volary::folder::Folder;
use volary::pretrained::{EMBEDDED, resolve};
use volary::{Clip, Error};
use volary_kernels::{Instructions, memory};
use volary_weights::hub::{Environment, Hub, LOCK_FILE, Pins, Reach};
use volary_weights::{LoadOptions, Packing, Quantization};

/// A multimodal model zoo: pictures and text, in Chinese and English.
#[derive(Parser)]
#[command(name = "volary", version, arg_required_else_help = true, infer_subcommands = false)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    shared: Shared,
}

/// What every command understands.
#[derive(Args, Clone)]
pub struct Shared {
    /// Where to compute: `cpu`, `cuda` or `cuda:N`.
    #[arg(long, global = true, default_value = "cpu")]
    device: String,
    /// The numbers that weights are held and computed in, f32 without it; int8 and int4 pack matrices into 8 or 4 bits, in
    /// blocks of 32. What is stored packed stays so unless this names floats. `auto` is f32 on the CPU and bf16 on a
    /// GPU, and is told. `convert` and `quantize` write floats as these.
    #[arg(long, global = true, value_enum)]
    dtype: Option<Dtype>,
    /// The variant of the weights, e.g. `fp16` for `model.fp16.safetensors`.
    #[arg(long, global = true)]
    pub variant: Option<String>,
    /// Print JSON.
    #[arg(long, global = true)]
    pub json: bool,
    /// Never use the network.
    #[arg(long, global = true)]
    pub offline: bool,
    /// Hold every repository to the commits and contents of the lock file.
    #[arg(long, global = true)]
    pub locked: bool,
    /// The lock file: written by `fetch`, checked by `verify`, used with `--locked`.
    #[arg(long, global = true, value_name = "FILE", default_value = LOCK_FILE)]
    pub lock: PathBuf,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    Auto,
    F32,
    Bf16,
    F16,
    Int8,
    Int4,
}

#[derive(Subcommand)]
enum Command {
    /// Name what pictures show, among labels of your own or all that the model knows.
    Classify(classify::Arguments),
    /// Turn pictures and texts into vectors.
    Embed(embed::Arguments),
    /// Search a folder of pictures by text or by a picture.
    Search(search::Arguments),
    /// Segment a picture as examples show it.
    Segment(segment::Arguments),
    /// Answer a picture with a picture, as examples show it: depth, keypoints, restoration, ...
    Paint(paint::Arguments),
    /// Draw a picture from a text, or change one.
    Imagine(Box<imagine::Arguments>),
    /// Draw variations of a picture.
    Variations(Box<variations::Arguments>),
    /// Make a picture of `imagine` or `variations` again, by the record that it carries.
    Replay(replay::Arguments),
    /// Continue a text.
    Generate(Box<generate::Arguments>),
    /// Talk with a model.
    Chat(Box<chat::Arguments>),
    /// Fill the blanks of a text: [MASK], and for GLM [sMASK] and [gMASK].
    Fill(Box<fill::Arguments>),
    /// Measure how well a model predicts a text.
    Perplexity(perplexity::Arguments),
    /// Run a checkpoint folder on given tensors: to compare with another implementation.
    Forward(forward::Arguments),
    /// Write the pixel tensors that a folder's preprocessor makes of pictures.
    Preprocess(preprocess::Arguments),
    /// Print the tokens that a folder's tokenizer makes of texts.
    Tokenize(tokenize::Arguments),
    /// Show what a folder or preset is: shapes, parameters, memory, keys that do not match; or what a picture was imagined from.
    Info(info::Arguments),
    /// Write a folder's weights as safetensors, in another dtype or split by size, with all that belongs to them.
    Convert(convert::Arguments),
    /// Write a folder's weights in 8 or 4 bits.
    Quantize(quantize::Arguments),
    /// Download repositories, verify every byte, write the lock file and print their folders.
    Fetch(fetch::Arguments),
    /// Hash what was downloaded again and compare it with the lock file.
    Verify(verify::Arguments),
    /// Compute what training a model takes of each of many devices: memory, operations, bytes sent.
    Plan(plan::Arguments),
    /// List the systems and their published sizes.
    List(list::Arguments),
    /// Measure retrieval on pictures with captions, in both directions and languages.
    Eval(eval::Arguments),
    /// Measure how fast a model runs here: tokens, images or pictures a second, beside what the machine can do.
    Bench(bench::Arguments),
    /// Check this machine and this program.
    Doctor,
    /// Train a model by one of the recipes here.
    #[cfg(feature = "train")]
    Train(train::Arguments),
}

/// Runs the program. 0: done; 1: a failure; 2: wrong use.
pub fn run() -> ExitCode {
    let Cli { command, shared } = Cli::parse();
    let shared = shared.resolved();
    memory::keep_freed();
    // On one of the threads that compute: handing small products over to them and waiting would take longer than these.
    let result = rayon::scope(|_| command.run(&shared));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever reads our output (`head`) may stop reading: that is no failure.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", told(&error));
            ExitCode::from(if error.is::<Usage>() { 2 } else { 1 })
        }
    }
}

impl Command {
    fn run(self, shared: &Shared) -> Result<()> {
        if let (Err(unknown), false) = (Instructions::wanted(), matches!(self, Self::Doctor)) {
            return Err(Usage(unknown).into());
        }
        match self {
            Self::Classify(arguments) => classify::run(arguments, shared),
            Self::Embed(arguments) => embed::run(arguments, shared),
            Self::Search(arguments) => search::run(arguments, shared),
            Self::Segment(arguments) => segment::run(arguments, shared),
            Self::Paint(arguments) => paint::run(arguments, shared),
            Self::Imagine(arguments) => imagine::run(*arguments, shared),
            Self::Variations(arguments) => variations::run(*arguments, shared),
            Self::Replay(arguments) => replay::run(arguments, shared),
            Self::Generate(arguments) => generate::run(*arguments, shared),
            Self::Chat(arguments) => chat::run(*arguments, shared),
            Self::Fill(arguments) => fill::run(*arguments, shared),
            Self::Perplexity(arguments) => perplexity::run(arguments, shared),
            Self::Forward(arguments) => forward::run(arguments, shared),
            Self::Preprocess(arguments) => preprocess::run(arguments, shared),
            Self::Tokenize(arguments) => tokenize::run(arguments, shared),
            Self::Info(arguments) => info::run(arguments, shared),
            Self::Convert(arguments) => convert::run(arguments, shared),
            Self::Quantize(arguments) => quantize::run(arguments, shared),
            Self::Fetch(arguments) => fetch::run(arguments, shared),
            Self::Verify(arguments) => verify::run(arguments, shared),
            Self::Plan(arguments) => plan::run(arguments, shared),
            Self::List(arguments) => list::run(arguments, shared),
            Self::Eval(arguments) => eval::run(arguments, shared),
            Self::Bench(arguments) => bench::run(arguments, shared),
            Self::Doctor => doctor::run(shared),
            #[cfg(feature = "train")]
            Self::Train(arguments) => train::run(arguments, shared),
        }
    }
}

/// The command was used wrongly, which the argument parser could not see.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Usage(pub String);

/// An error and its causes, without those that it spells out itself.
fn told(error: &anyhow::Error) -> String {
    error.chain().map(ToString::to_string).fold(String::new(), |told, cause| match told.as_str() {
        "" => cause,
        known if known.contains(&cause) => told,
        _ => format!("{told}: {cause}"),
    })
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

impl Shared {
    /// With what `--dtype auto` is here, which is told.
    fn resolved(self) -> Self {
        let Some(Dtype::Auto) = self.dtype else { return self };
        let (dtype, why) = match self.device.as_str() {
            "cpu" => (Dtype::F32, "processors are fastest in it here"),
            _ => (Dtype::Bf16, "GPUs are fastest in it"),
        };
        let shared = Self { dtype: Some(dtype), ..self };
        eprintln!("--dtype auto: {}, as {why}", shared.dtype_name().unwrap_or_default());
        shared
    }

    /// The cache and the hub, as the environment and the flags want them.
    pub fn hub(&self) -> Result<Hub, Error> {
        let mut environment = Environment::read()?;
        if self.offline {
            environment.network = Reach::Offline;
        }
        let hub = Hub::new(&environment)?.with_progress(progress::of(&environment));
        Ok(if self.locked { hub.with_pins(Pins::read(&self.lock)?) } else { hub })
    }

    /// The cache alone: nothing can be asked of the hub.
    pub fn offline_hub(&self) -> Result<Hub, Error> {
        let environment = Environment { network: Reach::Offline, ..Environment::read()? };
        Ok(Hub::new(&environment)?)
    }

    /// The folder of a model's name.
    pub fn folder(&self, name: &str) -> Result<Folder, Error> {
        resolve(name, self.variant.as_deref(), || self.hub())
    }

    /// The device that was asked for.
    pub fn device(&self) -> Result<Device> {
        Ok(volary::device::choose(&self.device)?)
    }

    /// The dtype that was asked for, as the flag has it.
    pub fn dtype_name(&self) -> Option<String> {
        Some(self.dtype?.to_possible_value()?.get_name().to_owned())
    }

    /// The same, with that dtype where none was asked for.
    ///
    /// # Errors
    /// If the flag has no such value.
    pub fn with_dtype(self, name: &str) -> Result<Self> {
        let dtype =
            Dtype::from_str(name, false).map_err(|problem| Usage(format!("--dtype {name}: {problem}")))?;
        Ok(Self { dtype: self.dtype.or(Some(dtype)), ..self })
    }

    /// How weights are loaded.
    pub fn load_options(&self) -> LoadOptions {
        let (dtype, packing) = match self.dtype {
            None | Some(Dtype::Auto) => (FloatDType::F32, Packing::AsStored),
            Some(Dtype::F32) => (FloatDType::F32, Packing::Floats),
            Some(Dtype::Bf16) => (FloatDType::BF16, Packing::Floats),
            Some(Dtype::F16) => (FloatDType::F16, Packing::Floats),
            Some(Dtype::Int8) => (FloatDType::F32, Packing::Into(Quantization::INT8)),
            Some(Dtype::Int4) => (FloatDType::F32, Packing::Into(Quantization::INT4)),
        };
        LoadOptions { dtype: Some(dtype), packing, ..LoadOptions::default() }
    }

    /// The dtype that floats are to be written in, if one was asked for.
    pub fn written_dtype(&self) -> Result<Option<FloatDType>, Usage> {
        Ok(match self.dtype {
            None | Some(Dtype::Auto) => None,
            Some(Dtype::F32) => Some(FloatDType::F32),
            Some(Dtype::Bf16) => Some(FloatDType::BF16),
            Some(Dtype::F16) => Some(FloatDType::F16),
            Some(Dtype::Int8 | Dtype::Int4) => {
                let told =
                    "--dtype int8 and int4 say how weights are held; `volary quantize --bits` writes them";
                return Err(Usage(told.into()));
            }
        })
    }
}

/// Which two-tower model to use.
#[derive(Args, Clone)]
pub struct Model {
    /// A folder, a preset, or owner/name; without it the model inside this program.
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Another tower for texts beside the model's tower for pictures: a Taiyi-CLIP.
    #[arg(long, value_name = "NAME", requires = "model")]
    pub text_model: Option<String>,
}

impl Model {
    /// Its name.
    pub fn name(&self) -> &str {
        self.model.as_deref().unwrap_or(EMBEDDED)
    }

    /// Whether it is the one inside this program.
    pub fn is_embedded(&self) -> bool {
        self.name() == EMBEDDED
    }

    /// Loads it.
    pub fn load(&self, shared: &Shared) -> Result<Clip> {
        let folder = shared.folder(self.name())?;
        let mut clip = Clip::in_folder(folder).options(shared.load_options());
        if let Some(name) = &self.text_model {
            clip = clip.texts_by(shared.folder(name)?);
        }
        Ok(clip.load(&shared.device()?)?)
    }
}

/// Writes a line to standard output; a closed pipe is an error and not a panic.
pub fn say(line: impl AsRef<str>) -> Result<()> {
    writeln!(io::stdout().lock(), "{}", line.as_ref())?;
    Ok(())
}

/// Writes a value as JSON to standard output.
pub fn say_json(value: &impl Serialize) -> Result<()> {
    say(serde_json::to_string_pretty(value).context("the result cannot be written as JSON")?)
}
