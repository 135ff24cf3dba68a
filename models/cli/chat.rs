//! `volary chat`

use std::io::{self, BufRead, IsTerminal, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use serde::Serialize;
use volary::chat::{Answer, Chat, Style};
use volary_text::generate::Settings;

use super::writing::{Live, WriterModel, Writing, load, told};
use super::{Shared, say};

/// Arguments of `chat`. Each line of standard input is a turn.
#[derive(Args)]
#[command(
    after_help = "Commands: /reset forgets the conversation, /system TEXT says what to keep in mind, /exit ends."
)]
pub struct Arguments {
    /// What the model is to keep in mind.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Draw so many answers and give the likeliest per token.
    #[arg(long, default_value_t = 1, value_name = "N")]
    best_of: usize,
    #[command(flatten)]
    model: WriterModel,
    #[command(flatten)]
    writing: Writing,
}

/// What a line is.
#[derive(Debug, PartialEq)]
enum Line<'a> {
    Empty,
    Exit,
    Reset,
    System(&'a str),
    Unknown(&'a str),
    Said(&'a str),
}

#[derive(Serialize)]
struct Told<'a> {
    prompt: &'a str,
    text: &'a str,
    tokens: &'a [u32],
    stop: String,
    /// How many of the oldest turns were forgotten.
    forgotten: usize,
}

/// Runs the command. With `--json` every answer is an object on a line of its own.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { system, best_of, model, writing } = arguments;
    let flags = writing.flags(Some(best_of))?;
    let folder = model.folder(shared)?;
    let writer = load(&folder, shared)?;
    let style = Style::of(&folder, &writer)?;
    // at least half of the context is for what was said before
    let half = writer.generator.context().map_or(usize::MAX, |context| context / 2);
    let room = writer.generator.room(0).map(|room| room.min(half));
    let settings = writing.settings(flags, &writer, room);
    let mut chat = Chat::new(&writer, style);
    chat.set_system(system.as_deref().unwrap_or_default());

    let mut input = io::stdin().lock();
    let person = input.is_terminal();
    for number in 1.. {
        if person {
            eprint!("> ");
            io::stderr().flush()?;
        }
        let mut line = Vec::new();
        if input.read_until(b'\n', &mut line).context("standard input")? == 0 {
            break;
        }
        let line = String::from_utf8(line).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            anyhow!("standard input: line {number} is not UTF-8 at byte {at}")
        })?;
        match read(&line) {
            Line::Empty => {}
            Line::Exit => break,
            Line::Reset => chat.reset(),
            Line::System(text) => chat.set_system(text),
            Line::Unknown(command) => {
                eprintln!("{command} is no command; there are /reset, /system TEXT and /exit");
            }
            Line::Said(said) => match answer(&mut chat, said, &settings, shared) {
                // a person may say it otherwise
                Err(error) if person && error.is::<volary::Error>() => eprintln!("error: {error}"),
                answered => answered?,
            },
        }
    }
    Ok(())
}

fn answer(chat: &mut Chat, said: &str, settings: &Settings, shared: &Shared) -> Result<()> {
    // an answer that is still to be chosen is not shown as it grows
    let mut out = (!shared.json && settings.grows()).then(Live::new);
    let answer = chat.answer(said, settings, &mut |piece| match &mut out {
        Some(out) if !piece.text.is_empty() => out.show(piece.text),
        _ => ControlFlow::Continue(()),
    })?;
    let Answer { written, forgotten } = &answer;
    match out {
        Some(out) => {
            out.finish()?;
            say("")?;
        }
        None if !shared.json => say(&written.text)?,
        None => {
            let stop = told(&written.stop);
            let told = Told {
                prompt: said,
                text: &written.text,
                tokens: &written.tokens,
                stop,
                forgotten: *forgotten,
            };
            say(serde_json::to_string(&told).context("the answer cannot be written as JSON")?)?;
        }
    }
    if *forgotten > 0 {
        eprintln!("({forgotten} of the oldest turns no longer fit and are forgotten)");
    }
    Ok(())
}

fn read(line: &str) -> Line<'_> {
    let line = line.trim();
    if !line.starts_with('/') {
        return if line.is_empty() { Line::Empty } else { Line::Said(line) };
    }
    match line.split_once(char::is_whitespace).unwrap_or((line, "")) {
        ("/exit" | "/quit", "") => Line::Exit,
        ("/reset", "") => Line::Reset,
        ("/system", text) => Line::System(text.trim()),
        (command, _) => Line::Unknown(command),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_turns_or_commands() {
        for (line, expected) in [
            ("\n", Line::Empty),
            (" hello /exit\r\n", Line::Said("hello /exit")),
            ("/exit\n", Line::Exit),
            ("/reset", Line::Reset),
            ("/system  Be brief. \n", Line::System("Be brief.")),
            ("/system", Line::System("")),
            ("/systems x", Line::Unknown("/systems")),
            ("/reset now", Line::Unknown("/reset")),
        ] {
            assert_eq!(read(line), expected, "{line:?}");
        }
    }
}
