//! Pictures whose answers are given, as `segment` and `paint` read them.

use std::path::{Path, PathBuf};

use anyhow::Result;
use volary::Error;
use volary::paint::Example;
use volary_vision::image::{ReadOptions, Rgb8, read};

use super::Usage;

/// The picture that is asked about, and the examples: each prompt with the answer in the same place. `answer` is what the
/// flag calls answers. Every picture that cannot be read is told.
pub fn read_all(
    query: &Path,
    prompts: &[PathBuf],
    answers: &[PathBuf],
    answer: &str,
) -> Result<(Rgb8, Vec<Example>)> {
    if prompts.len() != answers.len() {
        let (prompts, answers) = (prompts.len(), answers.len());
        let told = format!("{prompts} --prompt and {answers} --{answer}: each prompt has one {answer}");
        return Err(Usage(told).into());
    }
    let mut problems = Vec::new();
    let mut picture = |path: &Path| {
        let picture = read(path, ReadOptions::SEEN);
        picture.map_err(|error| problems.push(error.to_string())).ok()
    };
    let asked = picture(query);
    let pairs = prompts.iter().zip(answers).map(|(prompt, answer)| (picture(prompt), picture(answer)));
    let examples = pairs
        .filter_map(|(picture, answer)| Some(Example { picture: picture?, answer: answer? }))
        .collect::<Vec<_>>();
    match asked {
        Some(asked) if problems.is_empty() => Ok((asked, examples)),
        _ => Err(Error::Prompt { problems }.into()),
    }
}

/// A file here, named after the picture that is asked about.
pub fn beside(query: &Path, end: &str) -> PathBuf {
    let name = query.file_stem().map_or("query".into(), |stem| stem.to_string_lossy().into_owned());
    PathBuf::from(format!("{name}.{end}"))
}
