//! `volary train`

use std::path::PathBuf;

use anyhow::{Result, bail};
use burn::module::Module;
use burn::tensor::Device;
use clap::{Args, Subcommand};
use volary::clip::{ClipConfig, ClipModel, EMOJI};
use volary::folder::Folder;
use volary::pretrained::{Clip, EMOJI_CLIP, EMOJI_DRAW};
use volary::recipe::clip_folder::{export, tokenizer};
use volary::recipe::contrastive::{Job, Recipe, train};
use volary::recipe::curve;
use volary::recipe::data::{Dataset, Gallery, HELD_OUT};
use volary::recipe::descent::Descent;
use volary::recipe::drawing;
use volary::recipe::evaluate::table;
use volary::recipe::mim;
use volary::recipe::moe_chars::{self, Router, Twin};
use volary::recipe::named_shapes::{self, Asked, SHAPES_CLIP};
use volary::recipe::segmentation::{self, evaluate, sheet};
use volary::recipe::shapes::Part;
use volary::token_drawing::{DrawSettings, TokenDrawing, TokenDrawingConfig, folders};
use volary_text::generate::Sampling;
use volary_weights::{LoadOptions, Packing};

use super::{Shared, Usage, say, say_json};

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
    /// A tiny bilingual CLIP on drawn shapes and their names, by gradient caching; goes on where the folder has a checkpoint.
    Contrastive(Contrastive),
    /// The model of this program that draws, on prepared emoji; goes on where the folder has a checkpoint.
    EmojiDraw(EmojiDraw),
    /// A tiny SegGPT on drawn shapes, and what it makes of shapes and colours that it has not seen.
    SeggptToy(SeggptToy),
    /// A tiny EVA that says what CLIP would see in hidden patches of drawn shapes.
    Mim(Mim),
    /// A language model of characters with experts and its dense twin, compared; goes on where the folder has checkpoints.
    MoeChars(MoeChars),
}

#[derive(Args)]
struct MoeChars {
    /// Where the checkpoints of both, their loss curves and the load of the experts over time go.
    #[arg(long)]
    out: PathBuf,
    /// How experts are chosen.
    #[arg(long, value_enum, default_value = "switch")]
    gate: Router,
    /// Experts of a block.
    #[arg(long, default_value_t = moe_chars::Recipe::default().shape.n_experts)]
    experts: usize,
    /// Optimizer steps of each twin.
    #[arg(long, default_value_t = moe_chars::Recipe::default().steps)]
    steps: usize,
    /// Rows per step.
    #[arg(long, default_value_t = moe_chars::Recipe::default().batch)]
    batch: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = moe_chars::Recipe::default().learning_rate)]
    learning_rate: f64,
    /// Weight of the loss that keeps the loads even.
    #[arg(long, default_value_t = moe_chars::Recipe::default().balance)]
    balance: f64,
    /// Of initial weights, texts and the gates' noise.
    #[arg(long, default_value_t = moe_chars::Recipe::default().seed)]
    seed: u64,
    /// Stop each twin after so many steps of all; the schedule stays that of the whole run.
    #[arg(long)]
    until: Option<usize>,
}

#[derive(Args)]
struct Contrastive {
    /// Where checkpoint, loss curve and, at the end, the model folder `export` go.
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps in all.
    #[arg(long, default_value_t = named_shapes::recipe().steps)]
    steps: usize,
    /// Pairs per step.
    #[arg(long, default_value_t = named_shapes::recipe().batch)]
    batch: usize,
    /// Pairs that are computed at once on each of two threads; the loss sees the whole batch all the same.
    #[arg(long, default_value_t = named_shapes::CHUNK)]
    chunk: usize,
    /// The highest learning rate.
    #[arg(long, default_value_t = named_shapes::recipe().learning_rate)]
    learning_rate: f64,
    /// Of initial weights, pictures, order and augmentation.
    #[arg(long, default_value_t = named_shapes::recipe().seed)]
    seed: u64,
    /// Stop after so many steps of all; the schedule stays that of the whole run.
    #[arg(long)]
    until: Option<usize>,
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

#[derive(Args)]
struct EmojiDraw {
    /// Prepared data: `recipes/emoji_clip/prepare.py` makes it.
    #[arg(long)]
    data: PathBuf,
    /// Where checkpoints, loss curves and, at the end, the model folder `export` go.
    #[arg(long)]
    out: PathBuf,
    /// Optimizer steps of the codes.
    #[arg(long, default_value_t = drawing::Recipe::codes().steps)]
    codes_steps: usize,
    /// Optimizer steps of the decoder.
    #[arg(long, default_value_t = drawing::Recipe::decoder().steps)]
    steps: usize,
    /// Of initial weights, order, captions and colours.
    #[arg(long, default_value_t = drawing::Recipe::decoder().seed)]
    seed: u64,
    /// How freely the drawings that are judged are drawn; a run that is done is only judged again.
    #[arg(long, default_value_t = DrawSettings::default().sampling.temperature)]
    temperature: f64,
    /// How strictly they follow their captions.
    #[arg(long, default_value_t = DrawSettings::default().guidance)]
    guidance: f32,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    match arguments.recipe {
        Which::EmojiClip(arguments) => emoji_clip(arguments, shared),
        Which::Contrastive(arguments) => contrastive(arguments, shared),
        Which::EmojiDraw(arguments) => emoji_draw(arguments, shared),
        Which::SeggptToy(arguments) => seggpt_toy(arguments, shared),
        Which::Mim(arguments) => mim(arguments, shared),
        Which::MoeChars(arguments) => moe_chars(arguments, shared),
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

fn moe_chars(arguments: MoeChars, shared: &Shared) -> Result<()> {
    let MoeChars { out, gate, experts, steps, batch, learning_rate, balance, seed, until } = arguments;
    let recipe = moe_chars::Recipe::default();
    let shape = moe_chars::Shape { router: gate, n_experts: experts, ..recipe.shape };
    let recipe = moe_chars::Recipe { shape, steps, batch, learning_rate, balance, seed, ..recipe };
    match recipe.problems() {
        problems if problems.is_empty() => {}
        problems => return Err(Usage(problems.join("; ")).into()),
    }
    let (device, texts) = (shared.device()?, moe_chars::Texts::embedded());
    let (mut told, mut losses, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for twin in Twin::ALL {
        let folder = out.join(twin.name());
        let until = until.unwrap_or(steps);
        let outcome = moe_chars::train(&recipe, twin, &texts, &folder, until, &device)?;
        let (parameters, products) = (outcome.model.num_params(), recipe.shape.products(recipe.seq));
        told.push(format!("{}: {parameters} parameters, {products} products for each byte", twin.name()));
        if twin == Twin::Experts {
            told.push(outcome.loads.told(steps.div_ceil(10)));
        }
        scores.push(moe_chars::evaluate(&outcome.model, &texts, recipe.seq, &device));
        losses.push(outcome.losses);
    }
    let lines: Vec<curve::Line> = Twin::ALL
        .iter()
        .zip(&losses)
        .map(|(twin, losses)| curve::Line { name: twin.name(), values: losses })
        .collect();
    std::fs::write(out.join("loss.svg"), curve::svg("nats per byte by step", &lines))?;
    if shared.json {
        return say_json(&scores);
    }
    told.extend([moe_chars::table(&scores[0], &scores[1]), moe_chars::specialists(&scores[1])]);
    say(told.join("\n").trim_end())
}

/// Of the pictures that a trained model is asked about.
const QUESTIONS_SEED: u64 = 1_000_003;

fn checked(recipe: &Descent) -> Result<()> {
    match recipe.steps.min(recipe.batch) {
        0 => Err(Usage("--steps and --batch are at least 1".into()).into()),
        _ => Ok(()),
    }
}

fn contrastive(arguments: Contrastive, shared: &Shared) -> Result<()> {
    const STYLES: usize = 20;
    let Contrastive { out, steps, batch, chunk, learning_rate, seed, until } = arguments;
    if steps.min(batch).min(chunk) == 0 {
        return Err(Usage("--steps, --batch and --chunk are at least 1".into()).into());
    }
    let chunk = Some(chunk);
    let recipe = Recipe { steps, batch, chunk, learning_rate, seed, ..named_shapes::recipe() };
    let data = named_shapes::learned(named_shapes::STYLES, seed);
    let (config, _) = ClipConfig::of(&SHAPES_CLIP)?;
    let outcome = train(&Job {
        recipe: &recipe,
        config: &config,
        init: None,
        data: &data,
        development: &[],
        tokenizer: &tokenizer(&data, &SHAPES_CLIP, None, &out)?,
        preprocessor: &SHAPES_CLIP.preprocessor()?,
        folder: &out,
        until: until.unwrap_or(steps),
        device: &shared.device()?,
    })?;
    let folder = out.join("export");
    export(&outcome.model, &SHAPES_CLIP, &out.join("tokenizer.json"), &folder)?;
    say(format!("{} steps; the model is in {}", outcome.losses.len(), folder.display()))?;
    let mut scores = Vec::new();
    for asked in [Asked::All, Asked::Unseen] {
        scores.extend(named_shapes::scores(&outcome.clip, asked, STYLES, QUESTIONS_SEED)?);
    }
    say(table(&scores).trim_end())
}

fn emoji_draw(arguments: EmojiDraw, shared: &Shared) -> Result<()> {
    /// Every so many of the held-out pictures are asked for.
    const STRIDE: usize = 8;
    let EmojiDraw { data: place, out, codes_steps, steps, seed, temperature, guidance } = arguments;
    let data = Dataset::read(&place, |style| drawing::STYLES.contains(&style))?;
    let device = shared.device()?;
    let [_, _, tokenizer] = folders(&EMOJI_DRAW)?;
    let tokenizer = tokenizer.tokenizer()?;
    let shape = TokenDrawingConfig::of(&EMOJI_DRAW)?;
    let recipe = drawing::Recipe { steps: codes_steps, seed, ..drawing::Recipe::codes() };
    let vq = drawing::train_codes(&recipe, &shape, &data, &out.join("codes"), &device)?;
    let recipe = drawing::Recipe { steps, seed, ..drawing::Recipe::decoder() };
    let data = Dataset::read(&place, |style| style == drawing::DRAWN_STYLE)?;
    let drawn = drawing::Drawn { data: &data, vq: &vq, tokenizer: &tokenizer, plan: &shape.plan };
    let decoder = drawing::train_decoder(&recipe, &shape.transformer, &drawn, &out.join("decoder"), &device)?;
    let folder = out.join("export");
    drawing::export(&vq, &decoder, &EMOJI_DRAW, &folder)?;
    say(format!("the model is in {}", folder.display()))?;
    let model = TokenDrawing::load(&Folder::Disk(folder), &shared.load_options(), &device)?;
    let judge = Clip::embedded().load(&device)?;
    let sampling = Sampling { temperature, ..DrawSettings::default().sampling };
    let settings = DrawSettings { guidance, sampling, ..DrawSettings::default() };
    for gallery in &Gallery::read(&place, |style| style == HELD_OUT[0])? {
        let judged = drawing::evaluate(&model, &judge, gallery, STRIDE, &settings)?;
        say(drawing::table(&judged.scores).trim_end())?;
        drawing::sheet(&judged.drawings)?.save_png(&out.join("drawings.png"))?;
    }
    Ok(())
}

fn emoji_clip(arguments: EmojiClip, shared: &Shared) -> Result<()> {
    let data = Dataset::read(&arguments.data, |style| !HELD_OUT.contains(&style))?;
    let development = Gallery::read(&arguments.data, |style| style == HELD_OUT[0])?;
    let device = shared.device()?;
    let init = arguments.init.as_deref().map(|name| start(name, shared, &device)).transpose()?;
    let tokenizer = tokenizer(&data, &EMOJI_CLIP, init.as_ref().map(|(folder, _)| folder), &arguments.out)?;
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
        preprocessor: &EMOJI_CLIP.preprocessor()?,
        folder: &arguments.out,
        until: arguments.until.unwrap_or(recipe.steps),
        device: &device,
    })?;
    let folder = arguments.out.join("export");
    export(&outcome.model, &EMOJI_CLIP, &arguments.out.join("tokenizer.json"), &folder)?;
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
