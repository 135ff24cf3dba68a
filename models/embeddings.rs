//! Tokens that were learned by themselves, with all weights held fixed, and that a prompt may name (textual inversion, Gal et
//! al. 2022, <https://arxiv.org/abs/2208.01618>).
//!
//! A file is read as diffusers writes it (`learned_embeds.safetensors` or `.bin`: the token's name and its vectors), or as
//! the web UI does (`emb_params`, or `string_to_param` in a `.pt`): there the token is named as the file.

use std::path::PathBuf;

use burn::tensor::{Device, Tensor, TensorData};
use volary_text::tokenizer::Tokenizer;
use volary_weights::read_tensors;

use crate::error::Error;

/// Learned tokens, behind a vocabulary.
#[derive(Clone, Debug, Default)]
pub struct Embeddings {
    /// What a prompt says, and the ids that it stands for.
    names: Vec<(String, Vec<u32>)>,
    /// `[tokens, d_token]`
    values: Vec<f32>,
    d_token: usize,
}

/// The names of vectors that do not name their token.
const NAMELESS: &[&str] = &["emb_params", "string_to_param.*", "*"];

impl Embeddings {
    /// The tokens of files, behind a vocabulary of so many.
    ///
    /// # Errors
    /// If a file cannot be read, holds no vectors of width `d_token`, or names a token that another named.
    pub fn open(files: &[PathBuf], vocab_size: usize, d_token: usize) -> Result<Self, Error> {
        let mut all = Self { d_token, ..Self::default() };
        for file in files {
            let wrong = |problem: String| Error::Data { file: file.clone(), problem };
            let mut found = 0;
            for (key, data) in &read_tensors(file)? {
                let name = match NAMELESS.contains(&key.as_str()) {
                    true => file.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
                    false => key.clone(),
                };
                let dims: Vec<usize> = data.shape().iter().copied().collect();
                let count = match dims[..] {
                    [width] if width == d_token => 1,
                    [count, width] if width == d_token && count > 0 => count,
                    _ => {
                        let expected = format!("expected vectors of {d_token} numbers");
                        return Err(wrong(format!("`{key}` is {dims:?}, {expected}")));
                    }
                };
                if name.is_empty() || all.names.iter().any(|(known, _)| *known == name) {
                    return Err(wrong(format!("the token `{name}` is there already, or has no name")));
                }
                let first = vocab_size + all.values.len() / d_token;
                all.values.extend(data.clone().convert::<f32>().iter::<f32>());
                all.names.push((name, (first..first + count).map(|id| id as u32).collect()));
                found += 1;
            }
            if found == 0 || all.values.iter().any(|value| !value.is_finite()) {
                return Err(wrong("no vectors, or some that are no numbers".into()));
            }
        }
        // of names that begin alike the longest is meant
        all.names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
        Ok(all)
    }

    /// What they add to a vocabulary's embeddings, `[tokens, d_token]`, if anything.
    pub fn rows(&self, device: &Device) -> Option<Tensor<2>> {
        if self.values.is_empty() {
            return None;
        }
        let shape = [self.values.len() / self.d_token, self.d_token];
        Some(Tensor::from_data(TensorData::new(self.values.clone(), shape), device))
    }

    /// A text's tokens without marks, with learned ones where it names them.
    ///
    /// # Errors
    /// If it cannot be tokenized.
    pub fn tokens(&self, tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
        let next = |rest: &str| {
            let places = self.names.iter().filter_map(|(name, ids)| Some((rest.find(name)?, name, ids)));
            places.min_by_key(|(place, ..)| *place).map(|(place, name, ids)| (place, name.len(), ids))
        };
        let (mut tokens, mut rest) = (Vec::new(), text);
        while let Some((place, length, ids)) = next(rest) {
            tokens.extend(words(tokenizer, &rest[..place])?);
            tokens.extend(ids);
            rest = &rest[place + length..];
        }
        tokens.extend(words(tokenizer, rest)?);
        Ok(tokens)
    }
}

fn words(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    match text.is_empty() {
        true => Ok(Vec::new()),
        false => Ok(tokenizer.encode_without_special(text)?.ids),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::save_tensors;

    use super::*;

    fn tokenizer() -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pipe_sd/tokenizer");
        Tokenizer::from_folder(&folder).unwrap()
    }

    #[test]
    fn a_prompt_names_learned_tokens() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |file: &str, key: &str, data: TensorData| {
            let path = scratch.path().join(file);
            save_tensors(&path, &[(key.to_owned(), data)]).unwrap();
            path
        };
        let files = [
            write("a.safetensors", "<cat-toy>", TensorData::from([1f32, 2.0])),
            write("style.safetensors", "emb_params", TensorData::from([[3f32, 4.0], [5.0, 6.0]])),
        ];
        let embeddings = Embeddings::open(&files, 574, 2).unwrap();
        let tokenizer = tokenizer();
        let plain = |text: &str| tokenizer.encode_without_special(text).unwrap().ids;
        let found = embeddings.tokens(&tokenizer, "a <cat-toy> in style of a cat").unwrap();
        let expected = [plain("a"), vec![574], plain("in"), vec![575, 576], plain("of a cat")].concat();
        assert_eq!(found, expected);
        let rows = embeddings.rows(&Device::flex()).unwrap().into_data();
        assert_eq!(rows, TensorData::from([[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]]));
        let message = Embeddings::open(&files[..1], 574, 3).unwrap_err().to_string();
        assert!(message.ends_with("`<cat-toy>` is [2], expected vectors of 3 numbers"), "{message}");
        let twice = [files[0].clone(), files[0].clone()];
        assert!(Embeddings::open(&twice, 574, 2).unwrap_err().to_string().contains("is there already"));
    }
}
