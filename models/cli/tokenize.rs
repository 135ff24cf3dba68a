//! `volary tokenize`

use anyhow::Result;
use clap::Args;
use serde::Serialize;

use super::{Shared, say, say_json};

/// Arguments of `tokenize`.
#[derive(Args)]
pub struct Arguments {
    /// A folder with a tokenizer.
    folder: String,
    /// Texts; put `--` before one that begins with a dash.
    #[arg(required = true, value_name = "TEXT")]
    texts: Vec<String>,
}

#[derive(Serialize)]
struct Tokens {
    ids: Vec<u32>,
    tokens: Vec<String>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let tokenizer = shared.folder(&arguments.folder)?.tokenizer()?;
    let encode = |text: &String| -> Result<Tokens> {
        let encoding = tokenizer.encode(text)?;
        Ok(Tokens { ids: encoding.ids, tokens: encoding.tokens })
    };
    let texts = arguments.texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
    if shared.json {
        return say_json(&texts);
    }
    for Tokens { ids, tokens } in texts {
        let pairs: Vec<String> = tokens.iter().zip(&ids).map(|(token, id)| format!("{token}:{id}")).collect();
        say(pairs.join(" "))?;
    }
    Ok(())
}
