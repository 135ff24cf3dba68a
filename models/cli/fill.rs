//! `volary fill`

use anyhow::Result;
use clap::Args;
use serde::Serialize;
use volary::masked::{Candidate, Masked};
use volary::registry::System;
use volary_text::generate::Written;

use super::writing::{WriterModel, Writing, load, told};
use super::{Shared, Usage, say, say_json};

/// Arguments of `fill`.
#[derive(Args)]
pub struct Arguments {
    /// Texts with blanks: [MASK] for a word, or for GLM a few; [sMASK] a sentence, [gMASK] the rest.
    #[arg(required = true, value_name = "TEXT")]
    texts: Vec<String>,
    /// How many candidates to show per mask.
    #[arg(long, default_value_t = 5, value_name = "N")]
    top: usize,
    #[command(flatten)]
    model: WriterModel,
    #[command(flatten)]
    writing: Writing,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    Masks { text: String, filled: String, masks: Vec<Vec<Candidate>> },
    Blanks { text: String, filled: String, blanks: Vec<Blank> },
}

#[derive(Serialize)]
struct Blank {
    text: String,
    tokens: Vec<u32>,
    stop: String,
    log_likelihood: f64,
}

/// Runs the command. A model that writes fills blanks of any length; another foretells one token for each.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { texts, top, model, writing } = arguments;
    let flags = writing.flags(None)?;
    let folder = model.folder(shared)?;
    if let Some(row) = texts.iter().position(String::is_empty) {
        return Err(Usage(format!("text {row} is empty")).into());
    }
    let answers: Vec<Answer> = match System::of(&folder)?.generator {
        Some(_) => {
            let writer = load(&folder, shared)?;
            let settings = writing.settings(flags, &writer, None);
            let answer = |text: String| -> Result<Answer> {
                let filled = writer.fill(&text, &settings, writing.max_new)?;
                Ok(Answer::Blanks {
                    text,
                    filled: filled.text,
                    blanks: filled.spans.into_iter().map(Blank::new).collect(),
                })
            };
            texts.into_iter().map(answer).collect::<Result<_>>()?
        }
        None => {
            let masked = Masked::load(&folder, &shared.load_options(), &shared.device()?)?;
            let answer = |text: String| -> Result<Answer> {
                let found = masked.fill(&text, top)?;
                Ok(Answer::Masks { text, filled: found.text, masks: found.masks })
            };
            texts.into_iter().map(answer).collect::<Result<_>>()?
        }
    };
    if shared.json {
        return say_json(&answers);
    }
    for answer in answers {
        match answer {
            Answer::Blanks { filled, .. } => say(filled)?,
            Answer::Masks { filled, masks, .. } => {
                say(filled)?;
                for (mask, candidates) in masks.iter().enumerate() {
                    let shown = |Candidate { text, probability, .. }: &Candidate| {
                        format!("{text} {:.1} %", 100.0 * probability)
                    };
                    let shown: Vec<String> = candidates.iter().map(shown).collect();
                    say(format!("  {}: {}", mask + 1, shown.join(", ")))?;
                }
            }
        }
    }
    Ok(())
}

impl Blank {
    fn new(written: Written) -> Self {
        let Written { tokens, text, stop, log_likelihood } = written;
        Self { text, tokens, stop: told(&stop), log_likelihood }
    }
}
