//! Masked language models: what stood where a text is masked.

use std::collections::BTreeMap;

use burn::tensor::{Device, TensorData};
use volary_text::tokenizer::Tokenizer;
use volary_weights::LoadOptions;

use crate::error::Error;
use crate::folder::Folder;
use crate::registry::{Forward, System};
use crate::tensors::Inputs;

/// How a masked word is written, whatever the model's own token is.
pub const MASK: &str = "[MASK]";

/// What a forward pass calls the scores of tokens: transformers, and Paddle.
const SCORES: [&str; 2] = ["logits", "prediction_scores"];

/// A model that foretells masked tokens, loaded: any whose forward pass gives such scores for `input_ids`.
pub struct Masked {
    system: &'static System,
    tokenizer: Tokenizer,
    model: Box<dyn Forward>,
    device: Device,
}

/// A text whose masks are filled.
#[derive(Clone, Debug, PartialEq)]
pub struct Unmasked {
    /// With the likeliest token for each mask.
    pub text: String,
    /// What may stand at each mask, the likeliest first.
    pub masks: Vec<Vec<Candidate>>,
}

/// What may stand at a mask.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// Its id.
    pub token: u32,
    /// Its spelling.
    pub text: String,
    /// Given the rest of the text.
    pub probability: f64,
}

impl Masked {
    /// Loads a folder.
    ///
    /// # Errors
    /// If it is malformed, or its tokenizer knows no mask.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let system = System::of(folder)?;
        let tokenizer = folder.tokenizer()?;
        if tokenizer.mask_id().is_none() {
            return Err(Error::Task { system: system.name, task: "fill masks: its tokenizer has no mask" });
        }
        Ok(Self { system, tokenizer, model: (system.open)(folder, options, device)?, device: device.clone() })
    }

    /// The `top` likeliest tokens at every [`MASK`] of a text, or at the model's own mask token.
    ///
    /// # Errors
    /// If there is no mask, the text does not fit, or the model has no head for masks.
    pub fn fill(&self, text: &str, top: usize) -> Result<Unmasked, Error> {
        let mask = self.tokenizer.mask_id().unwrap_or_default();
        let own = self.tokenizer.id_to_token(mask).unwrap_or_default();
        let mut ids = self.tokenizer.encode(&text.replace(MASK, &own))?.ids;
        let places: Vec<usize> = (0..ids.len()).filter(|&at| ids[at] == mask).collect();
        let problem = |problem: String| Error::Input { system: self.system.name, problems: vec![problem] };
        if places.is_empty() {
            return Err(problem(format!("there is no {MASK} in the text")));
        }
        let row: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        let shape = [1, ids.len()];
        let inputs = BTreeMap::from([
            ("input_ids".to_owned(), TensorData::new(row, shape)),
            ("attention_mask".to_owned(), TensorData::new(vec![1i64; ids.len()], shape)),
        ]);
        let outputs = self.model.forward(Inputs::new(self.system.name, &inputs, &self.device))?;
        let logits =
            outputs.into_iter().find(|(name, _)| SCORES.contains(&name.as_str())).map(|(_, logits)| logits);
        let headless = Error::Task { system: self.system.name, task: "fill masks without a head for them" };
        let logits = logits.filter(|logits| logits.shape()[..2] == shape).ok_or(headless)?;
        let vocab_size = logits.shape()[2];
        let scores: Vec<f32> = logits.iter::<f32>().collect();
        if let Some(at) = scores.iter().position(|score| score.is_nan()) {
            return Err(problem(format!("the model scores a token at place {} as NaN", at / vocab_size)));
        }
        let masks: Vec<Vec<Candidate>> = places
            .iter()
            .map(|&place| self.candidates(&scores[place * vocab_size..][..vocab_size], top))
            .collect();
        for (place, candidates) in places.into_iter().zip(&masks) {
            if let Some(best) = candidates.first() {
                ids[place] = best.token;
            }
        }
        Ok(Unmasked { text: self.tokenizer.decode(&ids, true), masks })
    }

    fn candidates(&self, scores: &[f32], top: usize) -> Vec<Candidate> {
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let Some(best) = order.first().map(|&best| f64::from(scores[best])) else { return Vec::new() };
        let weight = |token: usize| (f64::from(scores[token]) - best).exp();
        let total: f64 = (0..scores.len()).map(weight).sum();
        let candidate = |token: usize| Candidate {
            token: token as u32,
            text: self.tokenizer.decode(&[token as u32], false).trim().to_owned(),
            probability: weight(token) / total,
        };
        order.into_iter().take(top.max(1)).map(candidate).collect()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;
    use volary_text::tokenizer::train_wordpiece;

    use super::*;
    use crate::tensors::{Outputs, output};

    /// Finds the token after the one before a mask likeliest, `e` times as likely as the next, and so on.
    struct Next {
        vocab_size: usize,
        outputs: &'static str,
    }

    impl Forward for Next {
        fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
            let ids = inputs.ids::<2>("input_ids", self.vocab_size);
            inputs.mask("attention_mask");
            inputs.finish()?;
            let ids: Vec<i64> = ids.unwrap().into_data().convert::<i64>().iter::<i64>().collect();
            let mut scores = Vec::new();
            for at in 0..ids.len() {
                let wanted = ids[at.saturating_sub(1)] + 1;
                scores.extend((0..self.vocab_size as i64).map(|token| -((token - wanted).abs() as f32)));
            }
            let data = TensorData::new(scores, [1, ids.len(), self.vocab_size]);
            Ok(vec![output(self.outputs, Tensor::<3>::from_data(data, &Device::flex()))])
        }
    }

    fn masked(outputs: &'static str) -> Masked {
        let json = train_wordpiece(["abcdefghij"], 40).unwrap();
        let tokenizer = Tokenizer::from_bytes(json.as_bytes(), None).unwrap();
        let model = Box::new(Next { vocab_size: tokenizer.vocab_size(), outputs });
        Masked { system: System::named("bert").unwrap(), tokenizer, model, device: Device::flex() }
    }

    #[test]
    fn every_mask_has_its_candidates() {
        let found = masked("logits").fill("a [MASK] c h[MASK]", 3).unwrap();
        assert_eq!(found.text, "a b c h i");
        assert_eq!(masked("prediction_scores").fill("a [MASK] c h[MASK]", 3).unwrap(), found);
        let texts =
            |mask: usize| found.masks[mask].iter().map(|found| found.text.as_str()).collect::<Vec<_>>();
        assert_eq!((texts(0)[0], texts(1)[0]), ("b", "i"));
        let [best, second, third] = &found.masks[0][..] else { panic!("{found:?}") };
        // of two equally likely ones the first
        assert_eq!([second.token, third.token], [best.token - 1, best.token + 1]);
        assert!((best.probability / second.probability - std::f64::consts::E).abs() < 1e-6);
        assert_eq!(second.probability, third.probability);
        let all: f64 =
            masked("logits").fill("a [MASK]", 1000).unwrap().masks[0].iter().map(|c| c.probability).sum();
        assert!((all - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_cannot_be_filled_is_an_error() {
        let message = |outputs, text| masked(outputs).fill(text, 1).unwrap_err().to_string();
        assert_eq!(message("logits", "a b"), "bert: there is no [MASK] in the text");
        assert_eq!(message("pooler_output", "a [MASK]"), "bert cannot fill masks without a head for them");
    }
}
