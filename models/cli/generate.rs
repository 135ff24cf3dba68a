//! `volary generate`

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary_text::generate::{Rank, Written, rank};

use super::writing::{Live, WriterModel, Writing, read_text, told};
use super::{Shared, Usage, say, say_json};

/// Arguments of `generate`.
#[derive(Args)]
pub struct Arguments {
    /// What to continue; `-` reads it from standard input.
    #[arg(value_name = "PROMPT")]
    text: Option<String>,
    /// Continue this too, at the same time; may be given several times.
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// Continue each line of this file, at the same time; `-` is standard input.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// How many texts to show per prompt.
    #[arg(long, default_value_t = 1, value_name = "N")]
    num: usize,
    /// Draw so many texts per prompt and show the likeliest per token.
    #[arg(long, value_name = "N", conflicts_with = "beams")]
    best_of: Option<usize>,
    #[command(flatten)]
    model: WriterModel,
    #[command(flatten)]
    writing: Writing,
}

#[derive(Serialize)]
struct Answer<'a> {
    prompt: &'a str,
    #[serde(flatten)]
    best: Text<'a>,
    /// The other texts, if several were asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    others: Vec<Text<'a>>,
    /// Of all prompts together, without loading.
    seconds: f64,
    /// Of all prompts together.
    tokens_per_second: f64,
}

#[derive(Serialize)]
struct Text<'a> {
    text: &'a str,
    tokens: &'a [u32],
    stop: String,
    log_likelihood: f64,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { num, best_of, writing, model, .. } = &arguments;
    model.name()?;
    if best_of.is_some_and(|drawn| drawn < *num) {
        return Err(Usage("--best-of draws fewer texts than --num shows".into()).into());
    }
    let flags = writing.flags(Some(best_of.unwrap_or(*num)))?;
    let texts = arguments.texts()?;
    let writer = model.load(shared)?;
    let prompts = texts.iter().map(|text| writer.encode(text)).collect::<Result<Vec<_>, _>>()?;
    let settings = writing.settings(flags, &writer, writer.room(&prompts));

    // One text that grows at its end is shown as it is written.
    let live = !shared.json && prompts.len() == 1 && settings.grows();
    let mut out = live.then(Live::new);
    let begin = Instant::now();
    let mut written = writer.write(&prompts, &settings, &mut |piece| match &mut out {
        Some(out) if !piece.text.is_empty() => out.show(piece.text),
        _ => ControlFlow::Continue(()),
    })?;
    let seconds = begin.elapsed().as_secs_f64();
    if let Some(out) = out {
        out.finish()?;
        return say("");
    }

    let tokens: usize = written.iter().flatten().map(Written::chosen).sum();
    for texts in &mut written {
        if best_of.is_some() {
            rank(texts, &Rank::Mean);
        }
        texts.truncate(*num);
    }
    if !shared.json {
        return show(&written);
    }
    let answers: Vec<Answer> = texts
        .iter()
        .zip(&written)
        .filter_map(|(prompt, texts)| {
            let mut texts = texts.iter().map(Text::new);
            Some(Answer {
                prompt,
                best: texts.next()?,
                others: texts.collect(),
                seconds,
                tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
            })
        })
        .collect();
    say_json(&answers)
}

impl Arguments {
    /// Everything that is to be continued.
    fn texts(&self) -> Result<Vec<String>> {
        let mut texts = Vec::new();
        match self.text.as_deref() {
            Some("-") => {
                let text = read_text(Path::new("-"))?;
                texts.push(text.strip_suffix('\n').unwrap_or(&text).to_owned());
            }
            text => texts.extend(text.map(str::to_owned)),
        }
        texts.extend(self.prompt.iter().cloned());
        if let Some(file) = &self.prompts {
            texts.extend(read_text(file)?.lines().map(str::to_owned));
        }
        if texts.is_empty() {
            return Err(Usage(
                "there is nothing to continue: give a prompt, or `-` for standard input".into(),
            )
            .into());
        }
        if let Some(row) = texts.iter().position(String::is_empty) {
            return Err(Usage(format!("prompt {row} is empty")).into());
        }
        Ok(texts)
    }
}

impl<'a> Text<'a> {
    fn new(written: &'a Written) -> Self {
        let Written { tokens, text, stop, log_likelihood } = written;
        Self { text, tokens, stop: told(stop), log_likelihood: *log_likelihood }
    }
}

/// Texts one after the other, numbered where there are several.
fn show(written: &[Vec<Written>]) -> Result<()> {
    let several = written.iter().map(Vec::len).sum::<usize>() > 1;
    for (prompt, texts) in written.iter().enumerate() {
        for (candidate, Written { text, .. }) in texts.iter().enumerate() {
            match (several, texts.len()) {
                (false, _) => {}
                (true, 1) => say(format!("[{prompt}]"))?,
                (true, _) => say(format!("[{prompt}.{candidate}]"))?,
            }
            say(text)?;
        }
    }
    Ok(())
}
