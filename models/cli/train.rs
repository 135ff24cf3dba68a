//! `volary train`

use std::path::PathBuf;

use anyhow::{Result, bail};
use burn::tensor::Device;
use clap::{Args, Subcommand};
use volary::clip::{ClipConfig, ClipModel, EMOJI};
use volary::folder::Folder;
use volary::recipe::contrastive::{Job, Recipe, train};
use volary::recipe::data::{EmojiData, Gallery};
use volary::recipe::descent::Descent;
use volary::recipe::emoji::{HELD_OUT, export, preprocessor, tokenizer};
use volary::recipe::mim;
use volary::recipe::segmentation::{self, evaluate, sheet};
use volary::recipe::shapes::Part;
use volary_weights::{LoadOptions, Packing};

use super::{Shared, Usage, say};

/// Arguments of `train`.
#[derive(Args)]
pub struct Arguments {
    #[command(subcommand)]
    recipe: Which,
}

#[derive(Subcommand)]
enum Which {
    /// The bilingual CLIP of this program, on prepared emoji; goes on where the folder has a checkpoint.
    EmojiClip(EmojiClip),
    /// A tiny SegGPT on drawn shapes, and what it makes of shapes and colours that it has not seen.
    SeggptToy(SeggptToy),
    /// A tiny EVA that says what CLIP would see in hidden patches of drawn shapes.
    Mim(Mim),
}

#[derive(Args)]
struct SeggptToy {
    /// Where the loss curve and, at the end, the model folder `export` and the answers to some questions, `unseen.png`, go.
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps.
    #[arg(long, default_value_t = segmentation::RECIPE.steps)]
    steps: usize,
    /// Questions per step.
    #[arg(long, default_value_t = segmentation::RECIPE.batch)]
    batch: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = segmentation::RECIPE.learning_rate)]
    learning_rate: f64,
    /// Of initial weights and pictures.
    #[arg(long, default_value_t = segmentation::RECIPE.seed)]
    seed: u64,
}

#[derive(Args)]
struct Mim {
    /// Where the loss curve and, at the end, the model folder `export` and some answers, `unseen.png`, go.
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps.
    #[arg(long, default_value_t = mim::RECIPE.steps)]
    steps: usize,
    /// Pictures per step.
    #[arg(long, default_value_t = mim::RECIPE.batch)]
    batch: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = mim::RECIPE.learning_rate)]
    learning_rate: f64,
    /// Of initial weights and pictures.
    #[arg(long, default_value_t = mim::RECIPE.seed)]
    seed: u64,
}

#[derive(Args)]
struct EmojiClip {
    /// Prepared data: `recipes/emoji_clip/prepare.py` makes it.
    #[arg(long)]
    data: PathBuf,
    /// Where checkpoint, loss curve and, at the end, the model folder `export` go.
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps in all.
    #[arg(long, default_value_t = Recipe::default().steps)]
    steps: usize,
    /// Pairs per step.
    #[arg(long, default_value_t = Recipe::default().batch)]
    batch: usize,
    /// Parts of a batch, each computed on a thread of its own.
    #[arg(long, default_value_t = Recipe::default().accumulate)]
    accumulate: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = Recipe::default().learning_rate)]
    learning_rate: f64,
    /// Of initial weights, order, captions and augmentation.
    #[arg(long, default_value_t = Recipe::default().seed)]
    seed: u64,
    /// A model folder of this shape to start from, or `volary/emoji-clip`; random weights without.
    #[arg(long)]
    init: Option<String>,
    /// Stop after so many steps of all; the schedule stays that of the whole run.
    #[arg(long)]
    until: Option<usize>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    match arguments.recipe {
        Which::EmojiClip(arguments) => emoji_clip(arguments, shared),
        Which::SeggptToy(arguments) => seggpt_toy(arguments, shared),
        Which::Mim(arguments) => mim(arguments, shared),
    }
}

fn seggpt_toy(arguments: SeggptToy, shared: &Shared) -> Result<()> {
    const QUESTIONS: usize = 100;
    const SHOWN: usize = 5;
    let SeggptToy { out, steps, batch, learning_rate, seed } = arguments;
    let recipe = Descent { steps, batch, learning_rate, seed, ..segmentation::RECIPE };
    checked(&recipe)?;
    let device = shared.device()?;
    let outcome = segmentation::train(&recipe, &out, &device)?;
    let folder = outcome.folder.display();
    say(format!("{} steps; the model is in {folder}", outcome.losses.len()))?;
    for (what, part) in [("learned", Part::Learned), ("unseen", Part::Unseen)] {
        for examples in [1, 2] {
            let overlap = evaluate(&outcome.folder, part, examples, QUESTIONS, QUESTIONS_SEED, &device)?;
            say(format!("{what} shapes and colours, examples: {examples}, mean IoU: {overlap:.3}"))?;
        }
    }
    let sheet = sheet(&outcome.folder, Part::Unseen, SHOWN, QUESTIONS_SEED, &device)?;
    Ok(sheet.save_png(&out.join("unseen.png"))?)
}

fn mim(arguments: Mim, shared: &Shared) -> Result<()> {
    const PICTURES: usize = 200;
    const SHOWN: usize = 5;
    let Mim { out, steps, batch, learning_rate, seed } = arguments;
    let recipe = Descent { steps, batch, learning_rate, seed, ..mim::RECIPE };
    checked(&recipe)?;
    let device = shared.device()?;
    let outcome = mim::train(&recipe, &out, &device)?;
    let folder = outcome.folder.display();
    say(format!("{} steps; the model is in {folder}", outcome.losses.len()))?;
    say("mean cosine at hidden patches:")?;
    for (what, part) in [("learned", Part::Learned), ("unseen", Part::Unseen)] {
        let mim::Score { model, constant, places } =
            mim::evaluate(&outcome.folder, part, PICTURES, QUESTIONS_SEED, &device)?;
        say(format!(
            "{what} shapes and colours: {model:.3}, of the best constant {constant:.3}, of the best for each place {places:.3}"
        ))?;
    }
    let sheet = mim::sheet(&outcome.folder, Part::Unseen, SHOWN, QUESTIONS_SEED, &device)?;
    Ok(sheet.save_png(&out.join("unseen.png"))?)
}

/// Of the pictures that a trained model is asked about.
const QUESTIONS_SEED: u64 = 1_000_003;

fn checked(recipe: &Descent) -> Result<()> {
    match recipe.steps.min(recipe.batch) {
        0 => Err(Usage("--steps and --batch are at least 1".into()).into()),
        _ => Ok(()),
    }
}

fn emoji_clip(arguments: EmojiClip, shared: &Shared) -> Result<()> {
    let data = EmojiData::read(&arguments.data, |style| !HELD_OUT.contains(&style))?;
    let development = Gallery::read(&arguments.data, |style| style == HELD_OUT[0])?;
    let device = shared.device()?;
    let init = arguments.init.as_deref().map(|name| start(name, shared, &device)).transpose()?;
    let tokenizer = tokenizer(&data, init.as_ref().map(|(folder, _)| folder), &arguments.out)?;
    let recipe = Recipe {
        steps: arguments.steps,
        batch: arguments.batch,
        accumulate: arguments.accumulate,
        learning_rate: arguments.learning_rate,
        seed: arguments.seed,
        ..Recipe::default()
    };
    let outcome = train(&Job {
        recipe: &recipe,
        config: &EMOJI,
        init: init.as_ref().map(|(_, model)| model),
        data: &data,
        development: &development,
        tokenizer: &tokenizer,
        preprocessor: &preprocessor()?,
        folder: &arguments.out,
        until: arguments.until.unwrap_or(recipe.steps),
        device: &device,
    })?;
    let folder = arguments.out.join("export");
    export(&outcome.model, &arguments.out.join("tokenizer.json"), &folder)?;
    say(format!("{} steps; the model is in {}", outcome.losses.len(), folder.display()))
}

/// The folder and the model that a run starts from.
fn start(name: &str, shared: &Shared, device: &Device) -> Result<(Folder, ClipModel)> {
    let folder = shared.folder(name)?;
    let (config, layout) = ClipConfig::of(&folder)?;
    if config != EMOJI {
        bail!("{}: a model of another shape than this recipe's", folder.path().display());
    }
    let floats = LoadOptions { packing: Packing::Floats, ..LoadOptions::default() }; // packed ones are constants
    let model = config.load(&folder, layout, &floats, &device.clone().autodiff())?;
    Ok((folder, model))
}
