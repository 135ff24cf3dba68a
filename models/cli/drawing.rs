//! What the commands that imagine pictures share: their flags, and how pictures are made, shown and saved.

use std::fmt::Display;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use volary::Error;
use volary::folder::Folder;
use volary::imagine::{Coding, Imagine, Imagined, Init, Texts, strength_problem};
use volary::pictures::{Draws, Sketch, drawing, pipeline_hash};
use volary::pretrained::EMBEDDED_DRAWER;
use volary::record::{Change, Model, Record, Source, Weighted};
use volary_vision::image::{ReadOptions, Rgb8, read};

use super::preview::Preview;
use super::{Shared, Usage, say, say_json};

/// Which model draws, and how.
#[derive(Args)]
pub struct Drawing {
    /// A folder in diffusers' layout, a preset, or owner/name: Stable Diffusion 1 or 2, Taiyi, AltDiffusion; or a folder that
    /// draws by tokens, which takes no size, steps, scheduler, picture or file beside it. Without it the small model inside
    /// this program, which draws emoji by tokens.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// What the picture does not show.
    #[arg(long, default_value = "", value_name = "TEXT")]
    negative: String,
    /// How many steps are made, 50 without it; where a picture is changed, --strength times as many.
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// How strictly the prompt is followed; without it 7.5, by tokens 1. At 1 --negative has no effect, and a step takes half
    /// the time.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    guidance: Option<f64>,
    /// Where the first picture begins; the next one has the next number. Equal seeds give equal pictures. Without it a random
    /// one, which is printed.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many pictures, each in a file of its own.
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "grid")]
    count: usize,
    /// So many rows and columns of pictures, in one file.
    #[arg(long, value_name = "RxC", value_parser = pair)]
    grid: Option<[usize; 2]>,
    /// How the steps are made, in place of the folder's own way.
    #[arg(long, value_enum)]
    scheduler: Option<Scheduler>,
    /// How much noise --scheduler ddim draws at each step, 0 to 1; without it none.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    eta: Option<f64>,
    /// How freely codes are drawn by a model that draws by tokens: 0 takes the likeliest, and more is more varied; without it
    /// the model's own.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// A file of low-rank changes of the weights (LoRA), and how much it counts, 1 without a number; may be repeated.
    #[arg(long, value_name = "FILE[:WEIGHT]", value_parser = lora)]
    lora: Vec<(PathBuf, f64)>,
    /// A file of a learned token (textual inversion), which the prompt may name; may be repeated.
    #[arg(long, value_name = "FILE")]
    embedding: Vec<PathBuf>,
    /// A file with the weights of all parts under the names of Stable Diffusion's authors, in place of those in the model's
    /// folder.
    #[arg(long, value_name = "FILE")]
    single_file: Option<PathBuf>,
    /// Whether the autoencoder sees a picture as a whole or in overlapping tiles, which takes the memory of one tile and
    /// gives not quite the same picture; without it in tiles where a picture has more than 1024x1024 pixels.
    #[arg(long, value_enum)]
    decode: Option<Decode>,
    /// Show the picture as it becomes, where standard error is a terminal that can (kitty's or iTerm2's pictures, or 24-bit
    /// colours). It takes at most a fifth of the time.
    #[arg(long)]
    pub preview: bool,
    /// Where the picture goes, a PNG; imagined-SEED.png without it. Of several, -1, -2, ... are behind the name.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// How an autoencoder can be asked to see a picture.
#[derive(Clone, Copy, ValueEnum)]
enum Decode {
    Whole,
    Tiled,
}

impl From<Decode> for Coding {
    fn from(decode: Decode) -> Self {
        match decode {
            Decode::Whole => Coding::Whole,
            Decode::Tiled => Coding::Tiled,
        }
    }
}

/// The schedulers that can be asked for.
#[derive(Clone, Copy, ValueEnum)]
enum Scheduler {
    Ddpm,
    Ddim,
    Pndm,
    Euler,
    EulerAncestral,
    /// DPM-Solver++ (2M)
    Dpm,
    /// For models that were distilled for few steps
    Lcm,
}

impl Scheduler {
    /// Its class in diffusers.
    fn class(self) -> &'static str {
        match self {
            Scheduler::Ddpm => "DDPMScheduler",
            Scheduler::Ddim => "DDIMScheduler",
            Scheduler::Pndm => "PNDMScheduler",
            Scheduler::Euler => "EulerDiscreteScheduler",
            Scheduler::EulerAncestral => "EulerAncestralDiscreteScheduler",
            Scheduler::Dpm => "DPMSolverMultistepScheduler",
            Scheduler::Lcm => "LCMScheduler",
        }
    }
}

/// Two numbers with an x between them.
///
/// # Errors
/// If it is something else.
pub fn pair(text: &str) -> Result<[usize; 2], String> {
    let numbers = text.split_once(['x', 'X']).and_then(|(a, b)| Some([a.parse().ok()?, b.parse().ok()?]));
    match numbers {
        Some(numbers) if !numbers.contains(&0) => Ok(numbers),
        _ => Err("expected two numbers from 1 on with an x between them".into()),
    }
}

/// A file, and how much it counts.
fn lora(text: &str) -> Result<(PathBuf, f64), String> {
    let weighted = text.rsplit_once(':').and_then(|(file, weight)| Some((file, weight.parse::<f64>().ok()?)));
    match weighted {
        Some((_, weight)) if !weight.is_finite() => Err("expected a finite weight".into()),
        Some((file, weight)) => Ok((file.into(), weight)),
        None => Ok((text.into(), 1.0)),
    }
}

/// What is asked for beside the flags.
pub struct Subject {
    /// What is shown.
    pub prompt: String,
    /// Height and width in pixels, if it is said.
    pub size: Option<[usize; 2]>,
    /// A picture that is changed.
    pub init: Option<Given>,
}

/// A picture that is changed, as it is given.
pub struct Given {
    /// The picture.
    pub picture: PathBuf,
    /// How much of the way from noise is walked anew.
    pub strength: f64,
    /// White where something new is painted.
    pub mask: Option<PathBuf>,
}

impl Drawing {
    /// Makes the pictures.
    ///
    /// # Errors
    /// With everything that is wrong with flags and files, before the model is loaded; then with what is wrong for the model.
    pub fn run(self, subject: Subject, shared: &Shared) -> Result<()> {
        let is_diffusion = subject.init.is_some() || self.scheduler.is_some() || self.single_file.is_some();
        let name = match self.model {
            Some(name) => name,
            None if is_diffusion => return Err(no_diffusion().into()),
            None => EMBEDDED_DRAWER.into(),
        };
        let seed = self.seed.unwrap_or_else(|| fastrand::u32(..).into()); // few digits, to be typed again
        let output = self.output.unwrap_or_else(|| format!("imagined-{seed}.png").into());
        check_output(&output)?;
        let mut problems = Problems::default();
        let init = subject.init.and_then(|given| problems.change(&given));
        let weighted =
            |(path, weight): (PathBuf, f64)| Some(Weighted { file: problems.source(&path)?, weight });
        let loras = self.lora.into_iter().filter_map(weighted).collect();
        let embeddings = self.embedding.iter().filter_map(|path| problems.source(path)).collect();
        let single_file = self.single_file.and_then(|path| problems.source(&path));
        let mut asked = Imagine {
            prompt: subject.prompt,
            negative: self.negative,
            size: subject.size,
            seed,
            count: self.grid.map_or(self.count, |[rows, columns]| rows.saturating_mul(columns)),
            scheduler: self.scheduler.map(|scheduler| scheduler.class().to_owned()),
            eta: self.eta.unwrap_or_default(),
            temperature: self.temperature,
            init: init.as_ref().and_then(|change| problems.init(change)),
            coding: self.decode.map(Coding::from),
            ..Imagine::default()
        };
        let over = |asked: &mut Imagine, usual: &Imagine| {
            asked.steps = self.steps.unwrap_or(usual.steps);
            asked.guidance = self.guidance.unwrap_or(usual.guidance);
            asked.temperature = self.temperature.or(usual.temperature);
        };
        over(&mut asked, &Imagine::default());
        problems.none(&asked)?;

        let folder = shared.folder(&name)?;
        let mut record = Record {
            version: env!("CARGO_PKG_VERSION").into(),
            prompt: asked.prompt.clone(),
            negative: asked.negative.clone(),
            model: model_of(&name, &folder, shared)?,
            // these are known once it is made
            scheduler: String::new(),
            width: 0,
            height: 0,
            tiled: false,
            steps: asked.steps,
            guidance: asked.guidance,
            eta: asked.eta,
            temperature: asked.temperature,
            seed,
            grid: self.grid,
            init,
            loras,
            embeddings,
            single_file,
        };
        let model =
            (drawing(&folder)?.open)(&folder, &record.extras(), &shared.load_options(), &shared.device()?)?;
        over(&mut asked, &model.usual());
        (record.steps, record.guidance, record.temperature) =
            (asked.steps, asked.guidance, asked.temperature);
        make(model.as_ref(), &asked, &record, &output, self.preview, shared)
    }
}

/// What is wrong with a request, as far as it is known without the model.
#[derive(Default)]
pub struct Problems(Vec<String>);

impl Problems {
    fn or_told<T, E: Display>(&mut self, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.0.push(error.to_string())).ok()
    }

    /// A file as it is.
    pub fn source(&mut self, path: &Path) -> Option<Source> {
        self.or_told(Source::of(path))
    }

    /// A picture to change as it is. Its strength is looked at here as well: without the picture there is nothing to ask for.
    fn change(&mut self, Given { picture, strength, mask }: &Given) -> Option<Change> {
        let (found, mask) = (self.source(picture), mask.as_ref().map(|mask| self.source(mask)));
        if found.is_none() {
            self.0.extend(strength_problem(*strength));
        }
        Some(Change { picture: found?, strength: *strength, mask: mask.flatten() })
    }

    /// Where the content of a file that was recorded is, among `given` files or in its place.
    pub fn find(&mut self, source: &Source, given: &[Source]) -> Option<Source> {
        self.or_told(source.find(given))
    }

    /// The pictures of a change.
    pub fn init(&mut self, change: &Change) -> Option<Init> {
        let mut picture = |source: &Source| self.or_told(read(&source.path, ReadOptions::SEEN));
        let (given, mask) = (picture(&change.picture), change.mask.as_ref().map(picture));
        Some(Init { picture: given?, strength: change.strength, mask: mask.flatten() })
    }

    /// Goes on if there is none, neither here nor in what is asked.
    pub fn none(mut self, asked: &Imagine) -> Result<(), Error> {
        self.0.extend(asked.problems());
        if self.0.is_empty() { Ok(()) } else { Err(Error::Request { problems: self.0 }) }
    }
}

/// What a record says of a model.
pub fn model_of(name: &str, folder: &Folder, shared: &Shared) -> Result<Model, Error> {
    Ok(Model {
        name: name.into(),
        variant: shared.variant.clone(),
        hash: pipeline_hash(folder)?,
        dtype: shared.dtype_name(),
        device: shared.device.clone(),
    })
}

#[derive(Serialize)]
struct Answer {
    image: String,
    /// Of all its pictures, without loading.
    seconds: f64,
    #[serde(flatten)]
    record: Record,
}

/// Makes what is asked for: a sheet, or pictures each in a file of its own, which is there as soon as it is made. The record
/// is completed for each. An interrupt ends the program where it is: a file is complete under its name or not there.
pub fn make(
    model: &dyn Draws,
    asked: &Imagine,
    record: &Record,
    output: &Path,
    preview: bool,
    shared: &Shared,
) -> Result<()> {
    let mut view = View::new(asked.count, preview);
    let (mut answers, mut sheet) = (Vec::new(), Vec::new());
    let mut begin = Instant::now();
    for at in 0..asked.count {
        let seed = asked.seed.wrapping_add(at as u64);
        let one = Imagine { seed, count: 1, ..asked.clone() };
        let imagined = model.draw(&one, &mut |sketch| view.step(at, sketch))?;
        if at == 0 {
            view.tell(&imagined, asked);
        }
        let [height, width] = imagined.size;
        let tiled = imagined.coding == Coding::Tiled;
        let made = Record { scheduler: imagined.scheduler, width, height, tiled, ..record.clone() };
        imagined.pictures.iter().for_each(|picture| view.made(picture));
        sheet.extend(imagined.pictures);
        let (record, file) = match made.grid {
            Some(_) if at + 1 < asked.count => continue,
            Some(_) => (made, output.to_owned()),
            None => (Record { seed, ..made }, numbered(output, at, asked.count)),
        };
        let columns = record.grid.map_or(1, |[_, columns]| columns);
        record.save(&Rgb8::sheet(&sheet, columns)?, &file)?;
        sheet.clear();
        let (image, seconds) = (file.display().to_string(), begin.elapsed().as_secs_f64());
        view.done(|| match shared.json {
            true => Ok(()),
            false => say(format!("{image}: seed {}", record.seed)),
        })?;
        answers.push(Answer { image, seconds, record });
        begin = Instant::now();
    }
    if shared.json { say_json(&answers) } else { Ok(()) }
}

/// The file of a picture among so many.
fn numbered(output: &Path, at: usize, count: usize) -> PathBuf {
    let stem = output.file_stem().unwrap_or_default().to_string_lossy();
    match count {
        1 => output.to_owned(),
        _ => output.with_file_name(format!("{stem}-{}.png", at + 1)),
    }
}

/// What stands in the way of a file, told before the work and not after it.
pub fn check_output(file: &Path) -> Result<()> {
    let ends = file.extension().is_some_and(|end| end.eq_ignore_ascii_case("png"));
    if !ends {
        return Err(Usage(format!(
            "{}: pictures are written as PNG, in files that end in .png",
            file.display()
        ))
        .into());
    }
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        return Err(Usage(format!("{}: no such folder", folder.display())).into());
    }
    Ok(())
}

/// What is asked for takes a diffusion, and no model is named.
fn no_diffusion() -> Usage {
    let name = "IDEA-CCNL/Taiyi-Stable-Diffusion-1B-Chinese-v0.1";
    Usage(format!(
        "the model inside this program draws by tokens, after a prompt alone: to change pictures, or for a scheduler or a file \
         of weights, give --model a folder, a preset or owner/name. For example:\n  \
         volary fetch {name}\n  \
         volary variations cat.png --model {name}\n\
         `volary list --task imagine` shows what can be read."
    ))
}

/// Bar and preview on standard error, where that is a terminal.
struct View {
    bar: ProgressBar,
    preview: Option<Preview>,
    count: usize,
}

impl View {
    fn new(count: usize, preview: bool) -> Self {
        let style = ProgressStyle::with_template("{msg}{wide_bar} {pos}/{len} steps  {per_sec}  eta {eta}");
        let bar = ProgressBar::no_length().with_style(style.expect("the template is valid"));
        Self { bar, preview: preview.then(Preview::of_terminal).flatten(), count }
    }

    /// Of picture `at`.
    fn step(&mut self, at: usize, sketch: &Sketch) -> ControlFlow<()> {
        if self.count > 1 {
            self.bar.set_message(format!("{}/{}  ", at + 1, self.count));
        }
        self.bar.set_length((self.count * sketch.total) as u64);
        self.bar.set_position((at * sketch.total + sketch.done) as u64);
        // the last is shown when it is made
        let is_due = |preview: &&mut Preview| sketch.done < sketch.total && preview.is_due();
        if let Some(preview) = self.preview.as_mut().filter(is_due) {
            let begin = Instant::now();
            let picture = (sketch.preview)();
            self.bar.suspend(|| preview.show(&picture, begin));
        }
        ControlFlow::Continue(())
    }

    /// What became of the prompts, if they are long, and of the picture, if it is large.
    fn tell(&self, imagined: &Imagined, asked: &Imagine) {
        let Texts { rows, left_out } = imagined.texts;
        self.bar.suspend(|| {
            if asked.coding.is_none() && imagined.coding == Coding::Tiled {
                eprintln!(
                    "the picture is large: it is decoded in tiles, unless --decode whole says otherwise"
                );
            }
            if rows > 1 {
                eprintln!("the text is longer than the text encoder reads: it is read in {rows} pieces");
            }
            if left_out > 0 {
                eprintln!("the end of the text is left out: {left_out} tokens");
            }
        });
    }

    /// A picture is made.
    fn made(&mut self, picture: &Rgb8) {
        if let Some(preview) = &mut self.preview {
            self.bar.suspend(|| preview.show(picture, Instant::now()));
        }
    }

    /// A file is done: a line above the bar, behind the preview.
    fn done(&mut self, line: impl FnOnce() -> Result<()>) -> Result<()> {
        if let Some(preview) = &mut self.preview {
            preview.leave();
        }
        self.bar.suspend(line)
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
