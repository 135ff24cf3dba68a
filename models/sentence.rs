//! Sentences as vectors: BERT and its descendants, and ERNIE, with a pooling on top, in the folders of sentence-transformers
//! (Reimers & Gurevych 2019, <https://arxiv.org/abs/1908.10084>).
//!
//! `modules.json` lists the steps: a transformer, in the folder itself or a part of it (`0_Transformer`), a pooling
//! (`1_Pooling/config.json`), and maybe a normalisation. A folder without these gives the mean over tokens, as
//! sentence-transformers does with it. The numbers match theirs.
//!
//! ```sh
//! volary embed "A cat sleeps." "一只猫" --model path/to/all-MiniLM-L6-v2
//! ```

use burn::tensor::{Bool, Device, Int, Tensor};
use ndarray::Array2;
use volary_kernels::ops::Mask;
use volary_text::tokenizer::{BatchOptions, PadTo, Tokenizer};
use volary_weights::{Checkpoint, LoadOptions, load};

use crate::bert::{Bert, BertConfig, BertInput};
use crate::config::Config;
use crate::ernie::{self, Ernie, ErnieConfig, ErnieInput};
use crate::error::Error;
use crate::folder::Folder;

/// How the states of a text's tokens become one vector. Padding takes no part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// That of the first token.
    First,
    /// The highest value of each channel.
    Max,
    /// Their mean.
    Mean,
    /// Their sum over the square root of their number.
    MeanSqrt,
    /// The mean over the tokens and over the last two layers (ConSERT).
    MeanLastTwo,
}

impl Pooling {
    /// The names in a pooling's configuration, in the order in which several are joined.
    const NAMES: &[(&str, Pooling)] = &[
        ("pooling_mode_cls_token", Pooling::First),
        ("pooling_mode_max_tokens", Pooling::Max),
        ("pooling_mode_mean_tokens", Pooling::Mean),
        ("pooling_mode_mean_sqrt_len_tokens", Pooling::MeanSqrt),
        ("pooling_mode_mean_last_2_tokens", Pooling::MeanLastTwo),
    ];

    /// Those of the last two layers' states, `[batch, seq, d_model]` each, of which `real` tokens count
    /// (`[batch, seq]`): `[batch, d_model]`.
    pub fn forward(self, [before, last]: &[Tensor<3>; 2], real: &Tensor<2, Bool>) -> Tensor<2> {
        let [batch, seq, d_model] = last.dims();
        let mask = real.clone().unsqueeze_dim::<3>(2).expand([batch, seq, d_model]);
        // a text without tokens has the zero vector
        let count = || real.clone().int().sum_dim(1).clamp_min(1).float().cast(last.dtype()); // [batch, 1]
        let sum = |states: &Tensor<3>| {
            states.clone().mask_fill(mask.clone().bool_not(), 0.0).sum_dim(1).squeeze_dim::<2>(1)
        };
        match self {
            Pooling::First => last.clone().narrow(1, 0, 1).squeeze_dim(1),
            Pooling::Max => {
                last.clone().mask_fill(mask.bool_not(), f32::NEG_INFINITY).max_dim(1).squeeze_dim(1)
            }
            Pooling::Mean => sum(last) / count(),
            Pooling::MeanSqrt => sum(last) / count().sqrt(),
            Pooling::MeanLastTwo => (sum(before) + sum(last)) / count() * 0.5,
        }
    }

    /// The poolings in the configuration of a pooling, whose results are joined.
    ///
    /// # Errors
    /// If there is none, or one that is not built.
    pub fn parse(config: &Config) -> Result<Vec<Pooling>, Error> {
        let known =
            |field: &str| Self::NAMES.iter().find(|(name, _)| *name == field).map(|(_, pooling)| *pooling);
        if config.has("pooling_mode") {
            // newer ones name the one that they mean
            let named = config.text("pooling_mode").and_then(|mode| {
                ["", "_token", "_tokens"].iter().find_map(|end| known(&format!("pooling_mode_{mode}{end}")))
            });
            return named
                .map(|pooling| vec![pooling])
                .ok_or_else(|| config.error("pooling_mode", "mean, cls, max").into());
        }
        for field in
            config.fields().filter(|field| field.starts_with("pooling_mode") && known(field).is_none())
        {
            config.only(field, &["false"])?;
        }
        let mut poolings = Vec::new();
        for (name, pooling) in Self::NAMES {
            if config.flag_or(name, false)? {
                poolings.push(*pooling);
            }
        }
        match poolings.is_empty() {
            true => Err(config.error(Self::NAMES[2].0, "true, or another pooling").into()),
            false => Ok(poolings),
        }
    }
}

/// What stands after a transformer in a folder of sentence-transformers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steps {
    /// The part of the folder that holds the transformer; empty for the folder itself.
    pub transformer: String,
    /// What is joined to one vector.
    pub poolings: Vec<Pooling>,
    /// Whether it is brought to length 1.
    pub normalise: bool,
}

impl Steps {
    /// Of a folder.
    ///
    /// # Errors
    /// If its files are malformed, or ask for what is not built.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        let pooling = |part: &str| -> Result<Vec<Pooling>, Error> {
            Pooling::parse(&folder.config(&format!("{part}/config.json"))?)
        };
        if folder.has("modules.json") {
            let (mut transformer, mut poolings, mut normalise) = (None, Vec::new(), false);
            for (place, module) in folder.config_list("modules.json")?.into_iter().enumerate() {
                let path = module.text("path").unwrap_or_default();
                let kind = module.text("type").unwrap_or_default();
                match (place, kind.rsplit('.').next().unwrap_or_default()) {
                    (0, "Transformer") => transformer = Some(path.to_owned()),
                    (1, "Pooling") => poolings = pooling(path)?,
                    (2, "Normalize") => normalise = true,
                    _ => {
                        return Err(module
                            .error("type", "Transformer, then Pooling, then maybe Normalize")
                            .into());
                    }
                }
            }
            let transformer = transformer.unwrap_or_default();
            let poolings = if poolings.is_empty() { vec![Pooling::Mean] } else { poolings };
            return Ok(Self { transformer, poolings, normalise });
        }
        let poolings = match folder.has("1_Pooling/config.json") {
            true => pooling("1_Pooling")?,
            false => vec![Pooling::Mean],
        };
        let inside = !folder.has("config.json") && folder.has("0_Transformer/config.json");
        let transformer = if inside { "0_Transformer" } else { "" }.to_owned();
        Ok(Self { transformer, poolings, normalise: false })
    }

    /// The folder with the transformer's configuration, that, and its weights, which may be in another: some uploads
    /// have the one in the folder itself and the other in the part.
    ///
    /// # Errors
    /// If there is no configuration, or there are no weights.
    pub fn transformer(&self, folder: &Folder) -> Result<(Folder, Config, Box<dyn Checkpoint>), Error> {
        let parts = [self.transformer.as_str(), "", "0_Transformer"];
        let places: Vec<Folder> = parts.iter().filter_map(|part| folder.part(part)).collect();
        let places = if places.is_empty() { vec![folder.clone()] } else { places };
        let part = places.iter().find(|place| place.has("config.json")).unwrap_or(&places[0]).clone();
        let config = part.config("config.json")?;
        let none = |found: &Result<_, Error>| {
            matches!(found, Err(Error::Weights(volary_weights::Error::NoWeights { .. })))
        };
        let checkpoint = places.iter().map(Folder::checkpoint).find(|found| !none(found));
        let checkpoint = checkpoint.unwrap_or_else(|| part.checkpoint())?;
        Ok((part, config, checkpoint))
    }
}

/// A text encoder with its tokenizer, for whole sentences.
pub struct SentenceEncoder {
    model: Trunk,
    steps: Steps,
    tokenizer: Tokenizer,
    width: usize,
    longest: usize,
    lowercase: bool,
    device: Device,
}

/// What makes states of tokens.
enum Trunk {
    Bert(Bert),
    Ernie(Ernie),
}

/// So many texts are encoded at once.
const BATCH: usize = 32;

impl SentenceEncoder {
    /// Reads a folder onto `device`.
    ///
    /// # Errors
    /// If a file is missing or broken, or weights, configuration and tokenizer do not fit together.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let steps = Steps::of(folder)?;
        let (part, config, checkpoint) = steps.transformer(folder)?;
        let is_ernie = config.text("model_type").is_some_and(|family| ernie::FAMILIES.contains(&family));
        let (config, model) = if is_ernie {
            let (config, layout) = ErnieConfig::fitted(&config, checkpoint.as_ref())?;
            let config = ErnieConfig { bert: BertConfig { head: false, ..config.bert }, ..config };
            let model = load(config.init(device), checkpoint.as_ref(), layout.keys(&config), options)?;
            (config.bert, Trunk::Ernie(model))
        } else {
            let config = BertConfig { head: false, ..BertConfig::fitted(&config, checkpoint.as_ref())? };
            let model = load(config.init(device), checkpoint.as_ref(), config.keys(), options)?;
            (config, Trunk::Bert(model))
        };
        let tokenizer = part.tokenizer().or_else(|error| folder.tokenizer().map_err(|_| error))?;
        if tokenizer.vocab_size() > config.vocab_size {
            return Err(Error::Vocabulary {
                folder: part.path().into(),
                expected: config.vocab_size,
                found: tokenizer.vocab_size(),
            });
        }
        let settings = "sentence_bert_config.json";
        let settings = if part.has(settings) { Some(part.config(settings)?) } else { None };
        let positions = config.context_length();
        let wanted = match &settings {
            Some(settings) => settings.size_or("max_seq_length", positions)?,
            None => tokenizer.model_max_length().unwrap_or(positions),
        };
        let lowercase = settings.map_or(Ok(false), |settings| settings.flag_or("do_lower_case", false))?;
        Ok(Self {
            model,
            width: config.d_model * steps.poolings.len(),
            steps,
            tokenizer,
            longest: wanted.min(positions),
            lowercase,
            device: device.clone(),
        })
    }

    /// The width of a vector.
    pub fn width(&self) -> usize {
        self.width
    }

    /// What the transformer's states go through.
    pub fn steps(&self) -> &Steps {
        &self.steps
    }

    /// Vectors of texts, `[texts, width]`. What is longer than the model reads is cut.
    ///
    /// # Errors
    /// If a text cannot be tokenized.
    pub fn encode(&self, texts: &[impl AsRef<str>]) -> Result<Array2<f32>, Error> {
        let spelled = |text: &str| if self.lowercase { text.to_lowercase() } else { text.to_owned() };
        let options = BatchOptions { max_length: Some(self.longest), pad: PadTo::Longest };
        let mut values = Vec::with_capacity(texts.len() * self.width);
        for chunk in texts.chunks(BATCH) {
            let chunk: Vec<String> = chunk.iter().map(|text| spelled(text.as_ref())).collect();
            let (ids, real) = self.tokenizer.encode_batch(&chunk, &options)?.to_tensors(&self.device);
            let vectors = self.encode_ids(ids, real.equal_elem(1)).into_data().convert::<f32>();
            values.extend(vectors.iter::<f32>());
        }
        Ok(Array2::from_shape_vec((texts.len(), self.width), values)
            .expect("as many values as texts are wide"))
    }

    /// Vectors of tokens `[batch, seq]`, of which some are `real`: `[batch, width]`.
    pub fn encode_ids(&self, ids: Tensor<2, Int>, real: Tensor<2, Bool>) -> Tensor<2> {
        let input = BertInput { mask: Mask::Padding(real.clone()), ..ids.into() };
        let states = match &self.model {
            Trunk::Bert(bert) => {
                let x = bert.embed(bert.tokens.forward(input.ids.clone()), &input);
                bert.encode_last_two(bert.norm.forward(x), &input.mask)
            }
            Trunk::Ernie(ernie) => {
                let input = ErnieInput { bert: input, tasks: None };
                ernie.bert.encode_last_two(ernie.embed(&input), &input.bert.mask)
            }
        };
        let pooled = self.steps.poolings.iter().map(|pooling| pooling.forward(&states, &real)).collect();
        let vectors = Tensor::cat(pooled, 1);
        match self.steps.normalise {
            true => unit(vectors),
            false => vectors,
        }
    }
}

/// Rows of length 1: `[..., width] -> [..., width]`. A row of zeros stays.
pub fn unit<const D: usize>(vectors: Tensor<D>) -> Tensor<D> {
    let length = vectors.clone().square().sum_dim(D - 1).sqrt().clamp_min(1e-12);
    vectors / length
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{TensorData, Tolerance};

    use super::*;

    fn states(values: [[[f32; 2]; 3]; 1]) -> Tensor<3> {
        Tensor::from_data(values, &Device::flex())
    }

    #[test]
    fn poolings_of_literal_states() {
        let both =
            [states([[[1.0, 1.0], [3.0, 5.0], [9.0, 9.0]]]), states([[[1.0, -4.0], [2.0, 6.0], [7.0, 7.0]]])];
        let real = Tensor::<2, Bool>::from_data([[true, true, false]], &Device::flex());
        for (pooling, expected) in [
            (Pooling::First, [1.0, -4.0]),
            (Pooling::Max, [2.0, 6.0]),
            (Pooling::Mean, [1.5, 1.0]),
            (Pooling::MeanSqrt, [3.0 / 2f32.sqrt(), 2.0 / 2f32.sqrt()]),
            (Pooling::MeanLastTwo, [1.75, 2.0]),
        ] {
            let found = pooling.forward(&both, &real).into_data();
            let expected = TensorData::new(expected.to_vec(), [1, 2]);
            found.assert_approx_eq::<f32>(&expected, Tolerance::default());
        }
    }

    #[test]
    fn rows_get_length_one_and_zeros_stay() {
        let rows = Tensor::<2>::from_data([[3.0, -4.0], [0.0, 0.0]], &Device::flex());
        let expected = TensorData::from([[0.6f32, -0.8], [0.0, 0.0]]);
        unit(rows).into_data().assert_approx_eq::<f32>(&expected, Tolerance::default());
    }

    #[test]
    fn a_pooling_is_read_in_the_words_of_old_and_new_files() {
        let read = |text: &str| {
            Pooling::parse(&Config::parse(Path::new("1_Pooling/config.json"), text.as_bytes()).unwrap())
        };
        let old = r#"{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true, "pooling_mode_cls_token": true}"#;
        assert_eq!(read(old).unwrap(), [Pooling::First, Pooling::Mean]);
        assert_eq!(read(r#"{"pooling_mode": "mean"}"#).unwrap(), [Pooling::Mean]);
        assert_eq!(read(r#"{"pooling_mode": "cls"}"#).unwrap(), [Pooling::First]);
        assert_eq!(read(r#"{"pooling_mode": "mean_sqrt_len_tokens"}"#).unwrap(), [Pooling::MeanSqrt]);
        for (text, named) in [
            ("{}", "`pooling_mode_mean_tokens`: expected true, or another pooling"),
            (r#"{"pooling_mode_lasttoken": true}"#, "`pooling_mode_lasttoken`: expected false"),
            (r#"{"pooling_mode": "attention"}"#, "`pooling_mode`: expected mean, cls, max"),
            (r#"{"pooling_mode_mean_tokens": 1}"#, "`pooling_mode_mean_tokens`: expected true or false"),
        ] {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    /// A folder with the fixture's tokenizer and a tiny untrained model whose weights are in a part, as
    /// sentence-transformers writes them.
    fn folder(modules: Option<&str>) -> tempfile::TempDir {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("0_Transformer");
        std::fs::create_dir_all(&part).unwrap();
        for entry in std::fs::read_dir(fixtures.join("tok_bert")).unwrap().flatten() {
            std::fs::copy(entry.path(), part.join(entry.file_name())).unwrap();
        }
        let vocab_size = Folder::Disk(part.clone()).tokenizer().unwrap().vocab_size();
        let text = format!(
            r#"{{"model_type": "bert", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 2, "vocab_size": {vocab_size}, "max_position_embeddings": 12}}"#
        );
        std::fs::write(part.join("config.json"), text).unwrap();
        let disk = Folder::Disk(part.clone());
        let config = BertConfig::parse(&disk.config("config.json").unwrap()).unwrap();
        let model = config.init(&Device::flex());
        volary_weights::save(&model, config.keys(), None, &part.join("model.safetensors"), None).unwrap();
        std::fs::write(part.join("sentence_bert_config.json"), r#"{"max_seq_length": 6}"#).unwrap();
        let pooling = folder.path().join("1_Pooling");
        std::fs::create_dir_all(&pooling).unwrap();
        std::fs::write(pooling.join("config.json"), r#"{"pooling_mode_mean_tokens": true}"#).unwrap();
        if let Some(modules) = modules {
            std::fs::write(folder.path().join("modules.json"), modules).unwrap();
        }
        folder
    }

    fn module(path: &str, kind: &str) -> String {
        format!(r#"{{"idx": 0, "path": "{path}", "type": "sentence_transformers.models.{kind}"}}"#)
    }

    #[test]
    fn a_folder_says_whether_vectors_have_length_one() {
        let [transformer, pooling, normalise] =
            [module("0_Transformer", "Transformer"), module("1_Pooling", "Pooling"), module("", "Normalize")];
        let lengths = |modules: Option<&str>| {
            let folder = Folder::Disk(folder(modules).keep());
            let encoder = SentenceEncoder::load(&folder, &LoadOptions::default(), &Device::flex()).unwrap();
            let texts = ["一只猫", "a cat sleeps and sleeps and sleeps and sleeps"];
            let vectors = encoder.encode(&texts).unwrap();
            std::fs::remove_dir_all(folder.path()).unwrap();
            assert_eq!((vectors.nrows(), vectors.ncols(), encoder.width()), (2, 8, 8));
            vectors.rows().into_iter().map(|row| row.dot(&row).sqrt()).collect::<Vec<f32>>()
        };
        let with = format!("[{transformer}, {pooling}, {normalise}]");
        assert!(lengths(Some(&with)).iter().all(|length| (length - 1.0).abs() < 1e-5));
        for modules in [Some(format!("[{transformer}, {pooling}]")), None] {
            assert!(lengths(modules.as_deref()).iter().all(|length| (length - 1.0).abs() > 1e-3));
        }
    }

    /// In either layout an ERNIE gives the mean of what its forward pass gives.
    #[test]
    fn an_ernie_encodes_too() {
        let folder = folder(None);
        let part = folder.path().join("0_Transformer");
        let text =
            std::fs::read_to_string(part.join("config.json")).unwrap().replace("\"bert\"", "\"ernie\"");
        std::fs::write(part.join("config.json"), text.replacen('{', "{\"use_task_id\": true,", 1)).unwrap();
        let config = Folder::Disk(part.clone()).config("config.json").unwrap();
        for layout in [ernie::Layout::Transformers, ernie::Layout::Paddle] {
            let config = ErnieConfig::parse(&config, layout).unwrap();
            let model = config.init(&Device::flex());
            let file = part.join("model.safetensors");
            volary_weights::save(&model, layout.keys(&config), None, &file, None).unwrap();
            let disk = Folder::Disk(folder.path().into());
            let encoder = SentenceEncoder::load(&disk, &LoadOptions::default(), &Device::flex()).unwrap();
            let ids = Tensor::<2, Int>::from_data([[5, 6, 7]], &Device::flex());
            let found = encoder.encode_ids(ids.clone(), ids.clone().greater_elem(0)).into_data();
            let expected: Tensor<2> = model.forward(ids).hidden.mean_dim(1).squeeze_dim(1);
            found.assert_approx_eq::<f32>(&expected.into_data(), Tolerance::default());
        }
    }

    #[test]
    fn padding_and_what_is_cut_do_not_matter() {
        let folder = folder(None);
        let disk = Folder::Disk(folder.path().into());
        let encoder = SentenceEncoder::load(&disk, &LoadOptions::default(), &Device::flex()).unwrap();
        let long = "a cat sleeps and sleeps and sleeps";
        let both = encoder.encode(&["猫", long]).unwrap();
        let alone = encoder.encode(&["猫"]).unwrap();
        let longer = encoder.encode(&[format!("{long} and sleeps")]).unwrap();
        let close = |a: ndarray::ArrayView1<f32>, b: ndarray::ArrayView1<f32>| {
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5)
        };
        assert!(close(both.row(0), alone.row(0)));
        assert!(close(both.row(1), longer.row(0)));
        assert!(!close(both.row(0), both.row(1)));
    }

    #[test]
    fn steps_that_are_not_built_are_refused() {
        for modules in [
            format!("[{}, {}]", module("0_Transformer", "Transformer"), module("2_Dense", "Dense")),
            format!("[{}]", module("1_Pooling", "Pooling")),
            "{}".to_owned(),
        ] {
            let folder = folder(Some(&modules));
            let message = Steps::of(&Folder::Disk(folder.path().into())).unwrap_err().to_string();
            assert!(message.contains("modules.json"), "{message}");
        }
    }
}
