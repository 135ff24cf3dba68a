use std::cell::RefCell;
use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;

use super::*;

/// A model that is a function of the text to the scores of the next token.
struct Toy<F> {
    scores: F,
    rows: Vec<Vec<u32>>,
    /// How many rows were read at each step.
    read: Vec<usize>,
}

impl<F: Fn(&[u32]) -> Vec<f32>> Toy<F> {
    fn new(prompts: &[Vec<u32>], scores: F) -> Self {
        Self { scores, rows: prompts.to_vec(), read: Vec::new() }
    }

    fn scores(&mut self) -> Tensor<2> {
        self.read.push(self.rows.len());
        let rows: Vec<Vec<f32>> = self.rows.iter().map(|row| (self.scores)(row)).collect();
        let vocab_size = rows.first().map_or(0, Vec::len);
        Tensor::from_data(TensorData::new(rows.concat(), [self.rows.len(), vocab_size]), &Device::flex())
    }
}

impl<F: Fn(&[u32]) -> Vec<f32>> Session for Toy<F> {
    fn start(&mut self) -> Tensor<2> {
        self.scores()
    }

    fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
        assert_eq!(tokens.len(), self.rows.len());
        self.rows.iter_mut().zip(tokens).for_each(|(row, token)| row.push(*token));
        self.scores()
    }

    fn select(&mut self, rows: &[usize]) {
        self.rows = rows.iter().map(|&row| self.rows[row].clone()).collect();
    }
}

/// Scores that look random and depend on the whole text.
fn noise(seed: u64, vocab_size: usize) -> impl Fn(&[u32]) -> Vec<f32> {
    move |text| {
        let mix = |hash: u64, token: &u32| (hash ^ u64::from(*token + 1)).wrapping_mul(0x0100_0000_01b3);
        let mut random = fastrand::Rng::with_seed(text.iter().fold(seed, mix));
        (0..vocab_size).map(|_| random.f32() * 6.0 - 3.0).collect()
    }
}

/// Scores that make one token certain: the one after the last, of ten.
fn counting(text: &[u32]) -> Vec<f32> {
    let next = (text.last().unwrap() + 1) % 10;
    (0..10).map(|token| if token == next { 20.0 } else { 0.0 }).collect()
}

/// Spells tokens as letters.
struct Letters;

impl Spelling for Letters {
    fn push(&mut self, token: u32) -> String {
        char::from(b'a' + token as u8).to_string()
    }

    fn finish(&mut self) -> String {
        String::new()
    }
}

fn letters() -> Box<dyn Spelling> {
    Box::new(Letters)
}

fn on(_: Piece) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn written(
    prompts: &[Vec<u32>],
    scores: impl Fn(&[u32]) -> Vec<f32>,
    settings: &Settings,
) -> Result<Vec<Vec<Written>>, GenerateError> {
    write(&mut Toy::new(prompts, scores), prompts, settings, &letters, &mut on)
}

fn log_softmax(scores: &[f32]) -> Vec<f64> {
    let total: f64 = scores.iter().map(|&score| f64::from(score).exp()).sum();
    scores.iter().map(|&score| f64::from(score) - total.ln()).collect()
}

#[test]
fn a_text_ends_by_a_token_a_text_or_its_length() {
    let prompts = [vec![3], vec![6], vec![0, 1]];
    let settings = Settings {
        max_new: 4,
        stop_tokens: vec![9],
        stop_texts: vec!["gh".into(), "de".into()],
        ..Settings::default()
    };
    let texts = written(&prompts, counting, &settings).unwrap().concat();
    let shown: Vec<_> = texts.iter().map(|t| (&t.tokens[..], t.text.as_str(), t.stop.clone())).collect();
    assert_eq!(
        shown,
        [
            (&[4, 5, 6, 7][..], "ef", Stop::Text("gh".into())),
            (&[7, 8], "hi", Stop::Token(9)),
            (&[2, 3, 4], "c", Stop::Text("de".into())),
        ]
    );
    assert_eq!(texts[1].chosen(), 3);
    let each = log_softmax(&counting(&[0]))[1];
    assert!((texts[1].log_likelihood - 3.0 * each).abs() < 1e-9);
    assert!((texts[1].mean_log_likelihood() - each).abs() < 1e-9);
    let settings = Settings { stop_texts: vec![], stop_tokens: vec![], ..settings };
    let texts = written(&prompts, counting, &settings).unwrap().concat();
    assert!(texts.iter().all(|text| text.stop == Stop::Length && text.tokens.len() == 4), "{texts:?}");
}

/// Rows that ended are read on until at most half of the rows go on.
#[test]
fn rows_that_ended_leave_the_batch_when_that_is_worth_it() {
    let prompts = [vec![0], vec![5], vec![6], vec![7]];
    let settings = Settings { max_new: 9, stop_tokens: vec![9], ..Settings::default() };
    let mut session = Toy::new(&prompts, counting);
    let texts = write(&mut session, &prompts, &settings, &letters, &mut on).unwrap().concat();
    assert_eq!(texts.map_tokens(), [&[1, 2, 3, 4, 5, 6, 7, 8][..], &[6, 7, 8], &[7, 8], &[8]]);
    assert_eq!(session.read, [4, 4, 4, 2, 1, 1, 1, 1, 1]);
}

trait MapTokens {
    fn map_tokens(&self) -> Vec<&[u32]>;
}

impl MapTokens for Vec<Written> {
    fn map_tokens(&self) -> Vec<&[u32]> {
        self.iter().map(|text| text.tokens.as_slice()).collect()
    }
}

#[test]
fn the_pieces_are_the_text_and_whoever_watches_may_end_it() {
    let prompts = [vec![0], vec![3]];
    let settings = Settings { max_new: 6, stop_texts: vec!["fh".into(), "gh".into()], ..Settings::default() };
    let pieces = RefCell::new(Vec::new());
    let mut watch = |piece: Piece| {
        pieces.borrow_mut().push((piece.prompt, piece.token, piece.text.to_owned()));
        if pieces.borrow().len() == 7 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut session = Toy::new(&prompts, counting);
    let texts = write(&mut session, &prompts, &settings, &letters, &mut watch).unwrap().concat();
    let expected = [
        (0, 1, "b"),
        (1, 4, "e"),
        (0, 2, "c"),
        (1, 5, ""), // f may begin fh
        (0, 3, "d"),
        (1, 6, "f"), // g may begin gh
        (0, 4, "e"),
    ];
    let pieces = pieces.into_inner();
    assert!(pieces.iter().map(|(row, token, text)| (*row, *token, text.as_str())).eq(expected), "{pieces:?}");
    assert_eq!((texts[0].text.as_str(), &texts[0].stop), ("bcde", &Stop::Caller));
    assert_eq!((texts[1].text.as_str(), &texts[1].stop), ("efg", &Stop::Caller));
}

#[test]
fn draws_depend_on_the_seed_and_on_no_other_prompt() {
    let prompts = [vec![1], vec![2, 3], vec![4]];
    let settings = |seed, count| Settings {
        max_new: 12,
        stop_tokens: vec![0],
        count,
        method: Method::Sample(Sampling { temperature: 0.9, top_k: 20, top_p: 0.95, min_p: 0.01, seed }),
        ..Settings::default()
    };
    let together = written(&prompts, noise(7, 30), &settings(5, 3)).unwrap();
    assert_eq!(written(&prompts, noise(7, 30), &settings(5, 3)).unwrap(), together);
    assert_ne!(written(&prompts, noise(7, 30), &settings(6, 3)).unwrap(), together);
    for (prompt, together) in prompts.iter().zip(&together) {
        let alone = written(std::slice::from_ref(prompt), noise(7, 30), &settings(5, 3)).unwrap();
        assert_eq!(alone.concat(), *together);
        assert_ne!(together[0], together[1]);
    }
    let fewer = written(&prompts, noise(7, 30), &settings(5, 1)).unwrap();
    assert!(fewer.iter().zip(&together).all(|(few, all)| few[0] == all[0]));
}

#[test]
fn temperature_zero_is_greedy_and_so_is_one_beam() {
    let prompts = [vec![1], vec![2]];
    let settings = Settings { max_new: 8, stop_tokens: vec![0, 1], ..Settings::default() };
    let expected = written(&prompts, noise(3, 12), &settings).unwrap();
    let cold = Method::Sample(Sampling { temperature: 0.0, seed: 9, ..Sampling::default() });
    let beam = Method::Beams(Beams { width: 1, patience: Patience::First, ..Beams::default() });
    for method in [cold, beam] {
        let found = written(&prompts, noise(3, 12), &Settings { method, ..settings.clone() }).unwrap();
        for (found, expected) in found.concat().iter().zip(expected.concat()) {
            assert_eq!((&found.tokens, &found.stop), (&expected.tokens, &expected.stop));
            assert!((found.log_likelihood - expected.log_likelihood).abs() < 1e-9);
        }
    }
}

#[test]
fn what_cannot_go_on_is_an_error() {
    let settings = Settings { max_new: 3, ..Settings::default() };
    let beams = Settings { method: Method::Beams(Beams::default()), ..settings.clone() };
    let nan = |text: &[u32]| vec![0.0, 1.0, if text.len() == 3 { f32::NAN } else { 0.0 }];
    for settings in [&settings, &beams] {
        let run = |scores: &dyn Fn(&[u32]) -> Vec<f32>, settings: &Settings| {
            written(&[vec![9], vec![9, 9]], scores, settings).unwrap_err().to_string()
        };
        assert_eq!(run(&nan, settings), "prompt 1: after 1 new tokens the model scores token 2 as NaN");
        let infinite = |_: &[u32]| vec![f32::INFINITY];
        assert_eq!(run(&infinite, settings), "prompt 0: after 0 new tokens the model scores token 0 as inf");
        let nothing = |_: &[u32]| vec![f32::NEG_INFINITY; 4];
        assert_eq!(run(&nothing, settings), "prompt 0: after 0 new tokens no token is allowed");
        let banned = Settings { banned: vec![vec![0], vec![1], vec![2]], ..settings.clone() };
        let flat = |_: &[u32]| vec![0.0; 3];
        assert_eq!(run(&flat, &banned), "prompt 0: after 0 new tokens no token is allowed");
        assert_eq!(run(&|_| vec![], settings), "the vocabulary is empty");
        let unknown = Settings { banned: vec![vec![1, 3]], forced_first: Some(8), ..settings.clone() };
        assert_eq!(
            run(&flat, &unknown),
            "a banned token is 3, expected 0 to 2; the forced first token is 8, expected 0 to 2"
        );
    }
    let mut one_row = Toy::new(&[vec![1]], counting);
    let error = write(&mut one_row, &[vec![1], vec![2]], &settings, &letters, &mut on).unwrap_err();
    assert_eq!(error, GenerateError::Rows { expected: 2, found: 1 });
    assert_eq!(written(&[], counting, &settings), Ok(Vec::new()));
}

/// All texts that end by a stop token or at the longest length, by the scores of beam search, the best first.
fn all_texts(
    prompt: &[u32],
    scores: &dyn Fn(&[u32]) -> Vec<f32>,
    settings: &Settings,
    length_penalty: f64,
) -> Vec<(f64, Vec<u32>)> {
    let mut open = vec![(0.0, Vec::new())];
    let mut done = Vec::new();
    for _ in 0..settings.max_new {
        for (sum, text) in std::mem::take(&mut open) {
            let next = log_softmax(&scores(&[prompt, &text].concat()));
            for (token, log) in next.into_iter().enumerate() {
                let (sum, text) = (sum + log, [&text[..], &[token as u32]].concat());
                if settings.stop_tokens.contains(&(token as u32)) || text.len() == settings.max_new {
                    done.push((sum / (text.len() as f64).powf(length_penalty), text));
                } else {
                    open.push((sum, text));
                }
            }
        }
    }
    done.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    done
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// Beams wide enough to hold every sequence find the best of all.
    #[test]
    fn wide_beams_find_what_brute_force_finds(
        seed: u64,
        vocab_size in 2usize..5,
        max_new in 1usize..5,
        stops in 0usize..3,
        length_penalty in -1.0f64..2.0,
        prompts in prop::collection::vec(prop::collection::vec(0u32..5, 1..4), 1..4),
    ) {
        let width = vocab_size.pow(max_new as u32);
        let settings = Settings {
            max_new,
            stop_tokens: (0..stops as u32).collect(),
            count: width.min(5),
            method: Method::Beams(Beams { width, length_penalty, patience: Patience::Certain }),
            ..Settings::default()
        };
        let found = written(&prompts, noise(seed, vocab_size), &settings).unwrap();
        for (prompt, found) in prompts.iter().zip(found) {
            let expected = all_texts(prompt, &noise(seed, vocab_size), &settings, length_penalty);
            prop_assert_eq!(found.len(), settings.count.min(expected.len()));
            for (found, (score, _)) in found.iter().zip(&expected) {
                let own = found.log_likelihood / (found.chosen() as f64).powf(length_penalty);
                // scores are rounded to f32 on the way
                prop_assert!((own - score).abs() < 1e-5, "{} {}", own, score);
                let mut text = found.tokens.clone();
                text.extend(match found.stop { Stop::Token(token) => Some(token), _ => None });
                let close = |other: &&(f64, Vec<u32>)| (other.0 - score).abs() < 1e-5 && other.1 == text;
                prop_assert!(expected.iter().any(|other| close(&other)), "{:?}", text);
            }
        }
    }

    /// Narrow beams too treat every prompt as if it were alone.
    #[test]
    fn beams_do_not_depend_on_other_prompts(
        seed: u64,
        width in 1usize..5,
        patience in prop::sample::select(vec![Patience::First, Patience::Estimate, Patience::Certain]),
        prompts in prop::collection::vec(prop::collection::vec(0u32..9, 1..4), 1..5),
    ) {
        let settings = Settings {
            max_new: 7,
            stop_tokens: vec![0, 3],
            count: width,
            no_repeat_ngram: 2,
            method: Method::Beams(Beams { width, length_penalty: 0.7, patience }),
            ..Settings::default()
        };
        let together = written(&prompts, noise(seed, 9), &settings).unwrap();
        for (prompt, together) in prompts.iter().zip(together) {
            let alone = written(std::slice::from_ref(prompt), noise(seed, 9), &settings).unwrap();
            prop_assert_eq!(alone, [together]);
        }
    }

    /// Whatever is drawn, processors hold: no pair of tokens comes twice, none is banned, and none ends it early.
    #[test]
    fn what_is_ruled_out_is_not_written(seed: u64, temperature in 0.1f64..3.0) {
        let settings = Settings {
            max_new: 20,
            min_new: 5,
            stop_tokens: vec![0],
            no_repeat_ngram: 2,
            banned: vec![vec![1], vec![2, 3]],
            forced_first: Some(7),
            count: 4,
            method: Method::Sample(Sampling { temperature, seed, ..Sampling::default() }),
            ..Settings::default()
        };
        for text in written(&[vec![5, 6]], noise(seed, 9), &settings).unwrap().concat() {
            prop_assert!(text.tokens.len() >= 5);
            prop_assert_eq!(text.tokens[0], 7);
            let whole = [&[5, 6], &text.tokens[..]].concat();
            let mut pairs: Vec<&[u32]> = whole.windows(2).collect();
            prop_assert!(!text.tokens.contains(&1) && !pairs.contains(&&[2, 3][..]));
            pairs.sort_unstable();
            prop_assert!(pairs.windows(2).all(|pair| pair[0] != pair[1]));
        }
    }
}

/// Literals of `transformers` 5 on a table of scores: three beams, each way to end.
#[test]
fn beams_end_a_text_by_a_stop_text_too() {
    let settings = Settings {
        max_new: 6,
        stop_texts: vec!["de".into()],
        count: 2,
        method: Method::Beams(Beams { width: 3, length_penalty: 0.0, patience: Patience::First }),
        ..Settings::default()
    };
    let texts = written(&[vec![1]], counting, &settings).unwrap().concat();
    assert_eq!((texts[0].text.as_str(), &texts[0].stop), ("c", &Stop::Text("de".into())));
    assert_eq!(texts[0].tokens, [2, 3, 4]);
    assert!(texts[0].log_likelihood > texts[1].log_likelihood);
}

#[test]
fn given_texts_are_scored_as_the_model_would_write_them() {
    let prompts = [vec![1], vec![2, 3], vec![4]];
    let continuations = [vec![5, 6, 7], vec![8], vec![]];
    let model = noise(2, 9);
    let found = log_likelihoods(&mut Toy::new(&prompts, &model), &continuations).unwrap();
    for ((prompt, continuation), found) in prompts.iter().zip(&continuations).zip(found) {
        let mut text = prompt.clone();
        assert_eq!(found.len(), continuation.len());
        for (&token, found) in continuation.iter().zip(found) {
            assert!((found - log_softmax(&model(&text))[token as usize]).abs() < 1e-6);
            text.push(token);
        }
    }
    // what is longer than is read at once
    let long: Vec<u32> = (0..150).map(|i| i % 9).collect();
    let found = log_likelihoods(&mut Toy::new(&[vec![1]], &model), std::slice::from_ref(&long)).unwrap();
    for (at, found) in found[0].iter().enumerate() {
        let text = [&[1], &long[..at]].concat();
        assert!((found - log_softmax(&model(&text))[long[at] as usize]).abs() < 1e-6, "{at}");
    }
}
