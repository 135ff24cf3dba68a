//! ConSERT: sentence vectors from BERT, trained to tell two views of a sentence apart from views of others (Yan et al.
//! 2021, <https://arxiv.org/abs/2105.11741>). Views differ in the embedding layer, so that no text is written anew.
//!
//! The encoder's numbers match `transformers`; views, poolings and the loss match the authors' code where the random
//! choices are given (the fixture's reference for these is an oracle written from it). Folders are in the layout of
//! sentence-transformers, see [`crate::sentence`].
//!
//! ```sh
//! volary embed "A cat sleeps." "A cat is asleep." --model path/to/unsup-consert-base
//! ```

use burn::tensor::activation::log_softmax;
use burn::tensor::{Bool, Device, Int, Tensor, TensorData};
use fastrand::Rng;
use volary_kernels::ops::Mask;
use volary_weights::load;

use crate::bert::{BASE, Bert, BertConfig, BertInput, LARGE};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe_with};
use crate::sentence::{Pooling, Steps, unit};
use crate::tensors::{Inputs, Outputs, output};

/// A way to make another view of a sentence in the embedding layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Augmentation {
    /// The sentence as it is.
    None,
    /// Real tokens change places: their positions are permuted.
    Shuffle,
    /// This share of the channels is zero, others for each sentence.
    FeatureCutoff(f64),
    /// This share of the real tokens is zero.
    TokenCutoff(f64),
    /// A run of this share of the real tokens is zero.
    SpanCutoff(f64),
    /// Every value is zero with this probability, and the rest grows by as much.
    Dropout(f64),
}

/// What is changed in the embeddings of a batch.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Where the tokens stand, `[batch, seq]`; as they come when `None`.
    pub positions: Option<Tensor<2, Int>>,
    /// What each embedding is multiplied with after its norm: `[batch, seq, d_model]`, where any axis may be 1.
    pub keep: Option<Tensor<3>>,
}

impl Augmentation {
    /// Draws a view of texts of these lengths, padded to the longest, for embeddings `d_model` wide.
    pub fn draw(self, lengths: &[usize], d_model: usize, random: &mut Rng, device: &Device) -> View {
        let batch = lengths.len();
        let seq = lengths.iter().copied().max().unwrap_or(0);
        let part = |share: f64, whole: usize| (share * whole as f64) as usize;
        let keep = |values: Vec<f32>, shape: [usize; 3]| View {
            positions: None,
            keep: Some(Tensor::from_data(TensorData::new(values, shape), device)),
        };
        let mut rows = |zeros: &mut dyn FnMut(&mut Vec<f32>, usize, &mut Rng), width: usize| {
            let row = |&length: &usize| {
                let mut row = vec![1.0; width];
                zeros(&mut row, length, random);
                row
            };
            lengths.iter().flat_map(row).collect::<Vec<f32>>()
        };
        match self {
            Augmentation::None => View::default(),
            Augmentation::Shuffle => {
                let row = |&length: &usize| {
                    let mut places: Vec<i64> = (0..seq as i64).collect();
                    random.shuffle(&mut places[..length]);
                    places
                };
                let places = lengths.iter().flat_map(row).collect::<Vec<i64>>();
                let places = Tensor::from_data(TensorData::new(places, [batch, seq]), device);
                View { positions: Some(places), keep: None }
            }
            Augmentation::FeatureCutoff(share) => {
                let values = rows(
                    &mut |row, _, random| {
                        let chosen = random.choose_multiple(0..row.len(), part(share, row.len()));
                        chosen.into_iter().for_each(|channel| row[channel] = 0.0);
                    },
                    d_model,
                );
                keep(values, [batch, 1, d_model])
            }
            Augmentation::TokenCutoff(share) => {
                let values = rows(
                    &mut |row, length, random| {
                        let chosen = random.choose_multiple(0..length, part(share, length));
                        chosen.into_iter().for_each(|token| row[token] = 0.0);
                    },
                    seq,
                );
                keep(values, [batch, seq, 1])
            }
            Augmentation::SpanCutoff(share) => {
                let values = rows(
                    &mut |row, length, random| {
                        let cut = part(share, length);
                        let first = random.usize(0..=length - cut.min(length));
                        row[first..][..cut.min(length)].fill(0.0);
                    },
                    seq,
                );
                keep(values, [batch, seq, 1])
            }
            Augmentation::Dropout(chance) => {
                let count = batch * seq * d_model;
                let grown = (1.0 / (1.0 - chance)) as f32;
                let values = (0..count).map(|_| if random.f64() < chance { 0.0 } else { grown }).collect();
                keep(values, [batch, seq, d_model])
            }
        }
    }
}

/// The states of the last two layers of a view: `[batch, seq, d_model]` each.
///
/// # Panics
/// If an id or a position is outside its table, or shapes differ.
pub fn encode(model: &Bert, input: &BertInput, view: &View) -> [Tensor<3>; 2] {
    let input = BertInput { positions: view.positions.clone().or(input.positions.clone()), ..input.clone() };
    let words = model.tokens.forward(input.ids.clone());
    let x = model.norm.forward(model.embed(words, &input)); // [batch, seq, d_model]
    let x = match &view.keep {
        Some(keep) => x * keep.clone(),
        None => x,
    };
    model.encode_last_two(x, &input.mask)
}

/// NT-Xent (Chen et al. 2020) as ConSERT has it: of the two views `a` and `b` of each sentence, `[batch, width]`, each
/// is told apart from all others by their cosines over `temperature`; the sum of both directions' means, `[1]`.
pub fn nt_xent(a: Tensor<2>, b: Tensor<2>, temperature: f64) -> Tensor<1> {
    let [batch, _] = a.dims();
    let own = Tensor::<2>::eye(batch, &a.device());
    let (a, b) = (unit(a), unit(b));
    let direction = |from: &Tensor<2>, to: &Tensor<2>| {
        let others = from.clone().matmul(from.clone().transpose()) / temperature - own.clone() * 1e9;
        let pairs = from.clone().matmul(to.clone().transpose()) / temperature;
        let chances = log_softmax(Tensor::cat(vec![pairs, others], 1), 1).narrow(1, 0, batch);
        -(chances * own.clone()).sum() / batch as f64
    };
    direction(&a, &b) + direction(&b, &a)
}

/// ConSERT as the registry knows it.
pub const SYSTEM: System = System {
    name: "consert",
    about: "sentence vectors from BERT: ConSERT",
    file: "models/consert.rs",
    tasks: &["embed", "forward"],
    proved: &["consert"],
    presets: PRESETS,
    recognises: |folder, config| {
        let says = |config: &crate::config::Config| {
            config.has("consert_temperature") && config.text("model_type") == Some("bert")
        };
        config.is_some_and(says) || {
            let steps = Steps::of(folder).ok();
            folder.has("1_Pooling/config.json")
                && steps.is_some_and(|steps| steps.poolings.contains(&Pooling::MeanLastTwo))
        }
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, checkpoint) = config(folder)?;
        describe_with(checkpoint.as_ref(), &config.init(&Device::flex()), config.keys())
    },
    open: |folder, options, device| {
        let (config, checkpoint) = config(folder)?;
        let model = load(config.init(device), checkpoint.as_ref(), config.keys(), options)?;
        let settings = Steps::of(folder)?.transformer(folder)?.1;
        let temperature = settings.number_or("consert_temperature", TEMPERATURE)?;
        if temperature <= 0.0 {
            return Err(settings.error("consert_temperature", "a number above 0").into());
        }
        Ok(Box::new(Runner { model, config, temperature }))
    },
    generator: None,
};

/// That of the paper, section 4.1.
const TEMPERATURE: f64 = 0.1;

fn config(folder: &Folder) -> Result<(BertConfig, Box<dyn volary_weights::Checkpoint>), Error> {
    let (_, config, checkpoint) = Steps::of(folder)?.transformer(folder)?;
    let config = BertConfig { head: false, ..BertConfig::fitted(&config, checkpoint.as_ref())? };
    Ok((config, checkpoint))
}

/// A sentence encoder behind the forward contract.
struct Runner {
    model: Bert,
    config: BertConfig,
    temperature: f64,
}

impl Forward for Runner {
    /// `input_ids`, and if wanted `attention_mask`, `token_type_ids`, `position_ids`, and the choices for views:
    /// `shuffled_position_ids`, `feature_keep` (`[batch, d_model]`) and `token_keep` (`[batch, seq]`).
    ///
    /// Gives `embedding_last_mean`, `embedding_last2_mean` and its `cosine_matrix_last2`; for each choice the view as
    /// training pools it, `view_shuffle`, `view_feature_cutoff`, `view_token_cutoff`; and the losses
    /// `ntxent_feature_cutoff_vs_shuffle` and `ntxent_token_cutoff_vs_none`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let input = self.config.read(&mut inputs);
        let shuffled = inputs.ids::<2>("shuffled_position_ids", self.config.n_positions);
        let features = inputs.weights::<2>("feature_keep");
        let tokens = inputs.weights::<2>("token_keep");
        let Some(input) = input else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [batch, seq] = input.ids.dims();
        inputs.like_ids("shuffled_position_ids", shuffled.as_ref().map(Tensor::dims), [batch, seq]);
        inputs.like_ids("token_keep", tokens.as_ref().map(Tensor::dims), [batch, seq]);
        let wide = [batch, self.config.d_model];
        if let Some(found) = features.as_ref().map(Tensor::dims).filter(|found| *found != wide) {
            inputs.problem(format!("`feature_keep` is {found:?}, expected {wide:?}"));
        }
        inputs.finish()?;

        let real: Tensor<2, Bool> = match &input.mask {
            Mask::Padding(real) => real.clone(),
            _ => input.ids.clone().greater_equal_elem(0),
        };
        let plain = encode(&self.model, &input, &View::default());
        let none = Pooling::Mean.forward(&plain, &real);
        let evaluated = Pooling::MeanLastTwo.forward(&plain, &real);
        let directions = unit(evaluated.clone());
        let mut outputs = vec![
            output("embedding_last_mean", none.clone()),
            output("embedding_last2_mean", evaluated),
            output("cosine_matrix_last2", directions.clone().matmul(directions.transpose())),
        ];
        let mut view = |name: &str, view: Option<View>| -> Option<Tensor<2>> {
            let vectors = Pooling::Mean.forward(&encode(&self.model, &input, &view?), &real);
            outputs.push(output(name, vectors.clone()));
            Some(vectors)
        };
        let keep = |keep: Tensor<3>| View { positions: None, keep: Some(keep) };
        let shuffle = shuffled.map(|positions| View { positions: Some(positions), keep: None });
        let shuffle = view("view_shuffle", shuffle);
        let features = view("view_feature_cutoff", features.map(|rows| keep(rows.unsqueeze_dim(1))));
        let tokens = view("view_token_cutoff", tokens.map(|rows| keep(rows.unsqueeze_dim(2))));
        let mut loss = |name: &str, a: Option<Tensor<2>>, b: Option<Tensor<2>>| {
            if let (Some(a), Some(b)) = (a, b) {
                outputs.push(output(name, nt_xent(a, b, self.temperature)));
            }
        };
        loss("ntxent_feature_cutoff_vs_shuffle", features, shuffle);
        loss("ntxent_token_cutoff_vs_none", tokens, Some(none));
        Ok(outputs)
    }
}

const fn preset(name: &'static str, config: BertConfig, parameters: usize) -> Preset {
    Preset {
        name,
        shape: Shape::Bert(config),
        weights: Weights::Elsewhere("the authors' drives"),
        license: "not stated",
        parameters,
        source: "transformers, BertModel with its pooler",
    }
}

/// Published sizes.
pub const PRESETS: &[Preset] =
    &[preset("unsup-consert-base", BASE, 109_482_240), preset("unsup-consert-large", LARGE, 335_141_888)];

#[cfg(test)]
mod tests {
    use burn::tensor::Tolerance;

    use super::*;

    fn kept(augmentation: Augmentation, lengths: &[usize], d_model: usize) -> Vec<Vec<f32>> {
        let view = augmentation.draw(lengths, d_model, &mut Rng::with_seed(3), &Device::flex());
        let keep = view.keep.unwrap();
        let [_, seq, width] = keep.dims();
        keep.into_data().iter::<f32>().collect::<Vec<_>>().chunks(seq * width).map(<[f32]>::to_vec).collect()
    }

    fn zeros(row: &[f32]) -> Vec<usize> {
        row.iter().enumerate().filter(|(_, value)| **value == 0.0).map(|(at, _)| at).collect()
    }

    #[test]
    fn a_shuffle_permutes_the_positions_of_real_tokens() {
        let lengths = [7, 3, 1];
        let view = Augmentation::Shuffle.draw(&lengths, 4, &mut Rng::with_seed(3), &Device::flex());
        let places: Vec<i64> = view.positions.unwrap().into_data().convert::<i64>().iter::<i64>().collect();
        for (row, length) in places.chunks(7).zip(lengths) {
            assert!(row[length..].iter().enumerate().all(|(at, &place)| place == (length + at) as i64));
            let mut sorted = row[..length].to_vec();
            sorted.sort();
            assert_eq!(sorted, (0..length as i64).collect::<Vec<_>>());
        }
        assert_ne!(places[..7], [0, 1, 2, 3, 4, 5, 6]);
        assert!(view.keep.is_none());
    }

    #[test]
    fn a_cutoff_takes_its_share_of_each_sentence() {
        let features = kept(Augmentation::FeatureCutoff(0.2), &[7, 3], 24);
        assert!(features.iter().all(|row| row.len() == 24 && zeros(row).len() == 4), "{features:?}");
        assert_ne!(features[0], features[1]);

        let tokens = kept(Augmentation::TokenCutoff(0.4), &[10, 5], 24);
        for (row, length) in tokens.iter().zip([10, 5]) {
            assert_eq!((row.len(), zeros(row).len()), (10, length * 2 / 5));
            assert!(zeros(row).iter().all(|&token| token < length), "padding is not cut");
        }

        let spans = kept(Augmentation::SpanCutoff(0.4), &[10, 5], 24);
        for (row, length) in spans.iter().zip([10, 5]) {
            let cut = zeros(row);
            assert_eq!(cut.len(), length * 2 / 5);
            assert!(cut.windows(2).all(|pair| pair[1] == pair[0] + 1) && cut[cut.len() - 1] < length);
        }
    }

    #[test]
    fn dropout_keeps_the_mean() {
        let rows = kept(Augmentation::Dropout(0.2), &[50], 100);
        assert!(rows[0].iter().all(|&value| value == 0.0 || value == 1.25));
        let mean = rows[0].iter().sum::<f32>() / 5000.0;
        assert!((mean - 1.0).abs() < 0.03, "{mean}");
    }

    #[test]
    fn without_a_change_a_view_is_the_sentence() {
        let config = BertConfig {
            vocab_size: 20,
            n_positions: 8,
            d_model: 8,
            d_ff: 16,
            n_layers: 2,
            n_heads: 2,
            ..BASE
        };
        let model = config.init(&Device::flex());
        let input: BertInput = Tensor::<2, Int>::from_data([[3, 4, 5]], &Device::flex()).into();
        let view = Augmentation::None.draw(&[3], 8, &mut Rng::with_seed(3), &Device::flex());
        let [_, last] = encode(&model, &input, &view);
        last.into_data().assert_eq(&model.forward(input).hidden.into_data(), true);
    }

    /// Two sentences whose views are orthogonal to the other's: each direction is `ln(1 + 2 e^-(1/T)) - 0`, with the
    /// similarities 1 (pair), 0 (the other's two views).
    #[test]
    fn the_loss_of_orthogonal_sentences() {
        let rows = || Tensor::<2>::from_data([[2.0, 0.0], [0.0, 3.0]], &Device::flex());
        let expected = 2.0 * (1.0 + 2.0 * (-1f64 / 0.5).exp()).ln();
        let loss = nt_xent(rows(), rows(), 0.5).into_scalar::<f64>();
        assert!((loss - expected).abs() < 1e-5, "{loss} {expected}");
    }

    /// With one sentence there is nothing to tell it from.
    #[test]
    fn a_sentence_alone_costs_nothing() {
        let row = |values: [f64; 2]| Tensor::<2>::from_data([values], &Device::flex());
        let loss = nt_xent(row([1.0, 2.0]), row([-3.0, 1.0]), 0.1);
        loss.into_data().assert_approx_eq::<f32>(&TensorData::from([0.0f32]), Tolerance::absolute(1e-6));
    }
}
