//! What decoders with learned positions have in common: GPT-2, and what is built of its block. Texts in, scores out, at
//! once or token by token, and both behind the contracts of the registry.

use burn::tensor::{Bool, Device, Int, Tensor};
use volary_kernels::layers::KvCache;
use volary_kernels::ops::{Mask, Positions};
use volary_text::documents::{Documents, shifted};
use volary_text::generate::{Appending, LeftPadded, Session, indices};

use crate::causal::{self, CONTINUATION, GREEDY, Head, next_token_loss};
use crate::error::Error;
use crate::generator::{Generator, check_prompts};
use crate::registry::Forward;
use crate::tensors::{Inputs, Outputs, output};

/// A batch of texts. Whole ones of equal length are `ids.into()`.
#[derive(Clone, Debug)]
pub struct Text {
    /// `[batch, seq]`.
    pub ids: Tensor<2, Int>,
    /// Where the tokens stand.
    pub positions: Positions,
    /// What they see. The last token is aligned with the last key, where a cache holds the past.
    pub mask: Mask,
}

impl From<Tensor<2, Int>> for Text {
    fn from(ids: Tensor<2, Int>) -> Self {
        Self { ids, positions: Positions::From(0), mask: Mask::Causal }
    }
}

/// A model that scores the next token of texts.
pub trait Decoder {
    /// The states of texts, or of the tokens that follow those in `caches`, which grow by them: one cache per block, or
    /// none at all. `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, a position beyond the table, or the caches are full.
    fn read(&self, text: Text, caches: &mut [KvCache]) -> Tensor<3>;

    /// Scores of the next token: `[batch, seq, d_model] -> [batch, seq, vocab_size]`.
    fn logits(&self, states: Tensor<3>) -> Tensor<3>;

    /// How many blocks have caches.
    fn n_layers(&self) -> usize;

    /// Where it is.
    fn device(&self) -> Device;

    /// The states of a batch of texts, `[batch, seq, d_model]`.
    ///
    /// # Panics
    /// If an id is outside the vocabulary, a position beyond the table, or shapes differ.
    fn forward(&self, text: impl Into<Text>) -> Tensor<3>
    where
        Self: Sized,
    {
        self.read(text.into(), &mut [])
    }

    /// Rows that go on after these prompts, each by at most `max_new` tokens.
    ///
    /// # Panics
    /// If there is no prompt, one is empty, or an id is outside the vocabulary.
    fn session(
        &self,
        prompts: &[impl AsRef<[u32]>],
        max_new: usize,
        reading: Reading,
    ) -> DecoderSession<'_, Self>
    where
        Self: Sized,
    {
        let prompts = LeftPadded::new(prompts, &self.device());
        let capacity = prompts.longest() + max_new;
        let caches = (0..self.n_layers()).map(|_| KvCache::new(capacity)).collect();
        DecoderSession { model: self, prompts, caches, reading }
    }
}

/// What the tokens of a prompt see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Those before them.
    Causal,
    /// The whole prompt, those after them too: a prefix language model (Raffel et al. 2019, section 3.2.1).
    Prefix,
}

/// Texts that a decoder is continuing.
pub struct DecoderSession<'a, M> {
    model: &'a M,
    prompts: LeftPadded,
    caches: Vec<KvCache>,
    reading: Reading,
}

impl<M: Decoder> Appending for DecoderSession<'_, M> {
    fn prompts(&self) -> &LeftPadded {
        &self.prompts
    }

    fn append(&mut self, ids: Tensor<2, Int>) -> Tensor<3> {
        let [_, new] = ids.dims();
        let held = self.caches.first().map_or(0, KvCache::len);
        let positions = self.prompts.positions(held, new);
        let mask = match self.reading {
            Reading::Prefix if held == 0 => Mask::Full,
            _ => Mask::Causal,
        };
        let mask = Mask::All(vec![mask, self.prompts.mask(held + new)]);
        self.model.read(Text { ids, positions, mask }, &mut self.caches)
    }

    fn logits(&self, states: Tensor<3>) -> Tensor<3> {
        self.model.logits(states)
    }

    fn keep(&mut self, rows: &[usize]) {
        self.prompts.select(rows);
        let rows = indices(rows, &self.prompts.device());
        self.caches.iter_mut().for_each(|cache| cache.select(&rows));
    }
}

/// A decoder behind the contracts of the registry.
pub struct Runner<M> {
    /// The model.
    pub model: M,
    /// Number of tokens.
    pub vocab_size: usize,
    /// Number of positions.
    pub n_positions: usize,
    /// What makes scores of states.
    pub head: Head,
    /// How prompts are read.
    pub reading: Reading,
    /// The token that ends a document, if rows of several are told apart by it.
    pub end: Option<u32>,
}

/// What one forward pass was asked for.
pub struct Asked {
    /// One per set of inputs; at least one.
    pub cases: Vec<Case>,
    /// What to continue.
    pub prompt: Option<Vec<u32>>,
}

/// A set of inputs.
pub struct Case {
    /// What stands before its names, `packed.` or nothing.
    pub name: String,
    /// The texts.
    pub text: Text,
    /// Which tokens are no padding, `[batch, seq]`.
    real: Option<Tensor<2, Bool>>,
    /// Which tokens the loss is about, `[batch, seq]`.
    scored: Option<Tensor<2, Bool>>,
}

/// The case whose rows are several documents each.
const PACKED: &str = "packed.";

impl<M: Decoder> Runner<M> {
    /// The inputs of all cases.
    ///
    /// # Errors
    /// With everything that does not fit.
    pub fn ask(&self, mut inputs: Inputs) -> Result<Asked, Error> {
        let mut names = inputs.cases("input_ids");
        if names.is_empty() {
            names.push(String::new()); // for the error
        }
        let mut cases = Vec::new();
        for name in names {
            inputs.enter(&name);
            cases.extend(self.case(&mut inputs, name));
        }
        inputs.enter("");
        let prompt = causal::prompt(&mut inputs, self.vocab_size);
        if let Some(tokens) =
            prompt.as_ref().map(Vec::len).filter(|tokens| tokens + GREEDY > self.n_positions)
        {
            inputs.problem(format!(
                "`greedy.prompt_ids` has {tokens} tokens: with {GREEDY} more they do not fit into {} positions",
                self.n_positions
            ));
        }
        if prompt.is_some() && self.head == Head::Absent {
            inputs.problem("`greedy.prompt_ids` needs a head, and this model has none".into());
        }
        inputs.finish()?;
        Ok(Asked { cases, prompt })
    }

    fn case(&self, inputs: &mut Inputs, name: String) -> Option<Case> {
        let ids = inputs.ids::<2>("input_ids", self.vocab_size);
        let positions = inputs.ids::<2>("position_ids", self.n_positions);
        let (real, seen) = match inputs.rank("attention_mask") {
            Some(4) => (None, inputs.visible("attention_mask")),
            _ => (inputs.mask("attention_mask"), None),
        };
        let seen = seen.or(inputs.visible("visible"));
        let counted = inputs.mask("loss_mask");
        inputs.missing("input_ids");
        let ids = ids?;

        let [batch, seq] = ids.dims();
        inputs.like_ids("attention_mask", real.as_ref().map(Tensor::dims), ids.dims());
        inputs.like_ids("loss_mask", counted.as_ref().map(Tensor::dims), ids.dims());
        inputs.row_or_like_ids("position_ids", positions.as_ref().map(Tensor::dims), ids.dims());
        let fits = |seen: &[usize; 4]| [[1, 1, seq, seq], [batch, 1, seq, seq]].contains(seen);
        if let Some(found) = seen.as_ref().map(Tensor::dims).filter(|seen| !fits(seen)) {
            let expected = [batch, 1, seq, seq];
            let name = inputs.full("input_ids");
            inputs.problem(format!("what the tokens of `{name}` see is {found:?}, expected {expected:?}"));
        }
        let documents = self.end.filter(|_| name == PACKED).map(|end| Documents::new(&ids, end));
        let documents = documents.as_ref();
        let positions =
            positions.map(Positions::Each).or(documents.map(Documents::positions)).unwrap_or_else(|| {
                if seq > self.n_positions {
                    let (name, positions) = (inputs.full("input_ids"), self.n_positions);
                    inputs.problem(format!("`{name}` has {seq} tokens a row, expected at most {positions}"));
                }
                Positions::From(0)
            });
        let padding = real.clone().map_or(Mask::Full, Mask::Padding);
        let mask = match seen {
            Some(seen) => Mask::Visible(seen),
            None => Mask::All(vec![documents.map_or(Mask::Causal, Documents::mask), padding]),
        };
        let scored = counted.map(shifted).or(documents.map(Documents::scored)).or_else(|| real.clone());
        Some(Case { name, text: Text { ids, positions, mask }, real, scored })
    }

    /// The outputs of all cases: `last_hidden_state` without a head, or `logits` and `loss`, and what is decoded greedily
    /// ([`causal::continuation`]).
    pub fn answer(&self, asked: &Asked) -> Outputs {
        let mut outputs = Outputs::new();
        for Case { name, text, scored, .. } in &asked.cases {
            let states = self.model.forward(text.clone());
            if self.head == Head::Absent {
                outputs.push(output(&format!("{name}last_hidden_state"), states));
                continue;
            }
            let logits = self.model.logits(states);
            outputs.push(output(&format!("{name}logits"), logits.clone()));
            let loss = next_token_loss(logits, text.ids.clone(), scored.clone());
            outputs.extend(loss.map(|loss| output(&format!("{name}loss"), loss)));
        }
        let first = asked.cases.iter().find(|case| case.name.is_empty()).or(asked.cases.first());
        if let Some(Case { text, real, .. }) = first.filter(|_| self.head != Head::Absent) {
            let [_, seq] = text.ids.dims();
            if asked.prompt.is_some() || seq + CONTINUATION <= self.n_positions {
                let session = |prompt: &[u32], count| self.model.session(&[prompt], count, self.reading);
                let (prompt, ids, real) = (asked.prompt.clone(), text.ids.clone(), real.clone());
                outputs.extend(causal::continuation(prompt, ids, real, session));
            }
        }
        outputs
    }
}

impl<M: Decoder> Forward for Runner<M> {
    /// `input_ids`, and if wanted `position_ids` (counted from 0 without), `attention_mask` (which tokens are no padding,
    /// `[batch, seq]`, or which see which, `[batch, 1, seq, seq]`, in place of the causal mask), `visible` (the latter,
    /// `[batch, seq, seq]`), `loss_mask` (which tokens' successors the loss is about) and `greedy.prompt_ids`. With a name
    /// and a dot before them they are another case on the same weights. In the case `packed`, rows are several documents
    /// if the configuration names the token that ends one: positions and masks that are not given follow from it.
    ///
    /// Gives what [`Runner::answer`] says, for every case.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        Ok(self.answer(&self.ask(inputs)?))
    }
}

impl<M: Decoder> Generator for Runner<M> {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn context(&self) -> Option<usize> {
        Some(self.n_positions)
    }

    fn session<'a>(&'a self, prompts: &[Vec<u32>], max_new: usize) -> Result<Box<dyn Session + 'a>, Error> {
        check_prompts(self, prompts, max_new)?;
        Ok(Box::new(self.model.session(prompts, max_new, self.reading)))
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{TensorData, Tolerance};
    use volary_text::generate::greedy;

    use super::*;
    use crate::gpt2::{Gpt2Config, SMALL};
    use crate::pangu::PanguConfig;

    /// Heads that are narrower together than the residual stream.
    const TINY: Gpt2Config = Gpt2Config {
        vocab_size: 50,
        n_positions: 12,
        d_ff: 20,
        d_head: 3,
        scale_by_layer: true,
        ..SMALL.sized(3, 16, 4)
    };

    fn ids<const B: usize, const S: usize>(tokens: [[i64; S]; B]) -> Tensor<2, Int> {
        Tensor::from_data(tokens, &Device::flex())
    }

    fn row(tokens: &[u32]) -> Tensor<2, Int> {
        let data = TensorData::new(tokens.iter().map(|&id| i64::from(id)).collect(), [1, tokens.len()]);
        Tensor::from_data(data, &Device::flex())
    }

    fn close(found: Tensor<3>, expected: Tensor<3>) {
        found.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::absolute(1e-4));
    }

    /// What must hold of every decoder.
    fn both(test: impl Fn(&dyn Fn(Text) -> Tensor<3>)) {
        let (gpt2, pangu) =
            (TINY.init(&Device::flex()), PanguConfig { decoder: TINY, end: None }.init(&Device::flex()));
        test(&|text| gpt2.forward(text));
        test(&|text| pangu.forward(text));
    }

    /// One token at a time, several at a time and all at once are the same.
    fn decodes_in_pieces(model: &impl Decoder) {
        let text = ids([[3, 14, 15, 9, 2, 6, 5], [35, 8, 9, 7, 9, 32, 3]]);
        let whole = model.forward(text.clone());
        for pieces in [vec![1; 7], vec![7], vec![3, 1, 2, 1]] {
            let mut caches: Vec<_> = (0..model.n_layers()).map(|_| KvCache::new(7)).collect();
            let mut states = Vec::new();
            for piece in pieces {
                let held = caches[0].len();
                let text =
                    Text { positions: Positions::From(held), ..text.clone().narrow(1, held, piece).into() };
                states.push(model.read(text, &mut caches));
            }
            assert!(caches.iter().all(|cache| cache.len() == 7));
            close(Tensor::cat(states, 1), whole.clone());
        }
    }

    #[test]
    fn decoding_with_a_cache_is_the_whole_forward_pass() {
        decodes_in_pieces(&TINY.init(&Device::flex()));
        decodes_in_pieces(&PanguConfig { decoder: TINY, end: None }.init(&Device::flex()));
    }

    /// The scores and tokens of prompts of several lengths in one batch are those of the whole text so far, of each alone.
    fn goes_on(model: &impl Decoder, reading: Reading) {
        let prompts = [vec![7, 28, 6, 5], vec![23], vec![4, 44, 6]];
        let mut session = model.session(&prompts, 5, reading);
        let together = greedy(&mut session, 5);
        for (prompt, together) in prompts.iter().zip(&together) {
            let mut text = prompt.clone();
            for _ in 0..5 {
                let mask = match reading {
                    Reading::Causal => Mask::Causal,
                    Reading::Prefix => Mask::Prefix(vec![prompt.len()]),
                };
                let states = model.forward(Text { mask, ..row(&text).into() });
                let last = model.logits(states.narrow(1, text.len() - 1, 1));
                text.push(last.argmax(2).into_scalar::<i64>() as u32);
            }
            assert_eq!(text[prompt.len()..], *together, "{reading:?}");
        }

        // rows that are chosen anew go on as if they had been so from the start
        let mut session = model.session(&[vec![3, 4, 5], vec![6]], 3, Reading::Causal);
        session.start();
        session.read(&[7, 8]);
        session.select(&[1, 0, 1]);
        let chosen = session.read(&[9, 9, 10]);
        for (at, text) in [vec![6, 8, 9], vec![3, 4, 5, 7, 9], vec![6, 8, 10]].into_iter().enumerate() {
            let alone = model.session(&[text], 1, Reading::Causal).start();
            close(chosen.clone().narrow(0, at, 1).unsqueeze(), alone.unsqueeze());
        }
    }

    #[test]
    fn sessions_are_the_whole_forward_pass() {
        for reading in [Reading::Causal, Reading::Prefix] {
            goes_on(&TINY.init(&Device::flex()), reading);
            goes_on(&PanguConfig { decoder: TINY, end: None }.init(&Device::flex()), reading);
        }
    }

    #[test]
    fn the_past_ignores_the_future_and_real_tokens_the_padding() {
        both(|states| {
            let first = |tokens, mask: Mask| {
                let mask = Mask::All(vec![Mask::Causal, mask]);
                states(Text { mask, ..ids([tokens]).into() }).narrow(1, 0, 3)
            };
            let expected = first([3, 4, 5, 0, 0], Mask::Full);
            close(first([3, 4, 5, 6, 7], Mask::Full), expected.clone());
            let real = Tensor::from_data([[true, true, true, false, false]], &Device::flex());
            close(first([3, 4, 5, 0, 0], Mask::Padding(real)), expected);
        });
    }

    /// In a prefix the first token sees the last, and nothing sees what comes after the prefix.
    #[test]
    fn a_prefix_is_read_in_both_directions() {
        both(|states| {
            let read =
                |tokens, prefix| states(Text { mask: Mask::Prefix(vec![prefix]), ..ids([tokens]).into() });
            let first = |tokens| read(tokens, 3).narrow(1, 0, 1).into_data();
            assert_eq!(first([3, 4, 5, 6]), first([3, 4, 5, 7]));
            let moved = read([3, 4, 5, 6], 3).narrow(1, 0, 1) - read([3, 4, 8, 6], 3).narrow(1, 0, 1);
            assert!(moved.abs().max().into_scalar::<f64>() > 1e-3);
            close(read([3, 4, 5, 6], 0), states(ids([[3, 4, 5, 6]]).into()));
            close(read([3, 4, 5, 6], 1), states(ids([[3, 4, 5, 6]]).into()));
        });
    }

    /// Each document of a row has the states that it has alone.
    #[test]
    fn documents_in_a_row_do_not_see_each_other() {
        both(|states| {
            let packed = ids([[3, 4, 9, 5, 9, 6, 7, 8]]);
            let documents = Documents::new(&packed, 9);
            let (positions, mask) = (documents.positions(), documents.mask());
            let together = states(Text { ids: packed, positions, mask });
            let alone = Tensor::cat(
                vec![
                    states(ids([[3, 4, 9]]).into()),
                    states(ids([[5, 9]]).into()),
                    states(ids([[6, 7, 8]]).into()),
                ],
                1,
            );
            close(together, alone);
        });
    }
}
