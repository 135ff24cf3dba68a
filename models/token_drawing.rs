//! Text to image by tokens: a causal decoder goes on after a caption with the codes of a picture, row by row, and the decoder
//! of a VQ-GAN makes pixels of them (Ramesh et al. 2021, <https://arxiv.org/abs/2102.12092>; Ding et al. 2021,
//! <https://arxiv.org/abs/2105.13290>).
//!
//! Both parts are in public layouts: `transformer` is LLaMA of `transformers`, whose last tokens are the codes, `vqvae` is
//! `VQModel` of `diffusers`.

use std::borrow::Cow;
use std::ops::ControlFlow;

use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_kernels::ops::{Activation, Pairing, RopeScaling};
use volary_text::generate::{Method, Piece, Sampling, Session, Settings, Silent, greedy, write};
use volary_text::tokenizer::Tokenizer;
use volary_vision::autoencoder::CodecConfig;
use volary_vision::image::Rgb8;
use volary_vision::patch::{patchify, unpatchify};
use volary_vision::residual::NormConfig;
use volary_vision::vq::{VqConfig, VqModel};
use volary_weights::LoadOptions;

use crate::autoencoder::NORM_EPS;
use crate::causal::Head;
use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::imagine::pictures;
use crate::llama::{Llama, LlamaConfig};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Description, Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output};
use crate::vqmodel;

/// A model that draws.
pub struct TokenDrawing {
    /// Between codes and pixels.
    pub vq: VqModel,
    /// Writes codes after captions.
    pub transformer: Llama,
    /// Of captions.
    pub tokenizer: Tokenizer,
    /// How they fit together.
    pub plan: Plan,
}

/// Shapes of the parts.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenDrawingConfig {
    /// Writes codes.
    pub transformer: LlamaConfig,
    /// Between codes and pixels.
    pub vq: VqConfig,
    /// How they fit together.
    pub plan: Plan,
}

/// How the parts fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The token of code 0; the others follow.
    pub first_code: usize,
    /// How many there are.
    pub n_codes: usize,
    /// Codes in a row, and in a column, of a picture.
    pub side: usize,
    /// Pixels of a side of the squares that `vqvae` takes for its pixels, their colours for its channels.
    pub patch: usize,
    /// Tokens of a caption, the special ones around it too; what is longer is cut.
    pub max_caption: usize,
}

/// How pictures are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct DrawSettings {
    /// How far scores are pushed away from those of the negative caption: 1 is not at all, and costs half.
    pub guidance: f32,
    /// How codes are drawn.
    pub sampling: Sampling,
    /// How many pictures of each caption.
    pub count: usize,
}

impl Default for DrawSettings {
    fn default() -> Self {
        let sampling = Sampling { temperature: 0.7, ..Sampling::default() };
        Self { guidance: 1.0, sampling, count: 1 }
    }
}

/// A caption cut to the tokens that fit.
pub struct Caption {
    /// With the special tokens around it.
    pub ids: Vec<u32>,
    /// How many did not fit.
    pub cut: usize,
}

impl Plan {
    /// `model_index.json` of a folder with these parts.
    ///
    /// # Errors
    /// If it is malformed, or the parts do not fit.
    pub fn parse(config: &Config, transformer: &LlamaConfig, vq: &VqConfig) -> Result<Self, ConfigError> {
        let plan = Self {
            first_code: config.size("first_code")?,
            n_codes: vq.n_codes,
            side: config.size("codes_per_side")?,
            patch: config.size_or("patch_size", 1)?,
            max_caption: config.size("max_caption")?,
        };
        let end = plan.first_code.saturating_add(plan.n_codes);
        if end > transformer.vocab_size {
            let (codes, tokens) = (plan.n_codes, transformer.vocab_size);
            let room = format!("room for {codes} codes among the transformer's {tokens} tokens");
            return Err(config.error("first_code", &room));
        }
        if plan.side > 256 {
            return Err(config.error("codes_per_side", "at most 256"));
        }
        let values = plan.patch.saturating_mul(plan.patch).saturating_mul(3);
        if [vq.codec.channels_in, vq.codec.channels_out] != [values; 2] {
            let [read, made] = [vq.codec.channels_in, vq.codec.channels_out];
            let wanted =
                format!("squares of as many values as `vqvae` has channels, {read} in and {made} out");
            return Err(config.error("patch_size", &wanted));
        }
        if plan.max_caption < 2 {
            return Err(config.error("max_caption", "at least 2"));
        }
        Ok(plan)
    }

    /// The tokens of a caption; an empty one stands for none.
    ///
    /// # Errors
    /// If it cannot be tokenized.
    pub fn caption(&self, tokenizer: &Tokenizer, text: &str) -> Result<Caption, Error> {
        let mut ids = tokenizer.encode(text)?.ids;
        let cut = ids.len().saturating_sub(self.max_caption);
        if cut > 0 {
            // the last one says that the caption ends
            ids.drain(self.max_caption - 1..ids.len() - 1);
        }
        Ok(Caption { ids, cut })
    }

    /// Pictures as `vqvae` sees them: `[batch, 3, height, width] -> [batch, 3 * patch * patch, height / patch, width /
    /// patch]`.
    pub fn fold(&self, pixels: Tensor<4>) -> Tensor<4> {
        let [batch, channels, height, width] = pixels.dims();
        let (patch, rows, columns) = (self.patch, height / self.patch, width / self.patch);
        let folded = patchify(pixels, patch).permute([0, 2, 1]);
        folded.reshape([batch, channels * patch * patch, rows, columns])
    }

    /// What [`Plan::fold`] folded.
    pub fn unfold(&self, folded: Tensor<4>) -> Tensor<4> {
        let [batch, channels, rows, columns] = folded.dims();
        let patches = folded.reshape([batch, channels, rows * columns]).permute([0, 2, 1]);
        unpatchify(patches, [rows, columns], self.patch).permute([0, 3, 1, 2])
    }

    /// Codes of a picture.
    pub fn len(&self) -> usize {
        self.side * self.side
    }

    /// Whether a picture has none.
    pub fn is_empty(&self) -> bool {
        self.side == 0
    }
}

/// What the folder's index calls it.
const CLASS: &str = "TokenDrawingPipeline";

/// Folders inside the model's.
pub const PARTS: [&str; 3] = ["transformer", "vqvae", "tokenizer"];

/// The folders of the parts, and their shapes.
struct Parts {
    folders: [Folder; 3],
    config: TokenDrawingConfig,
}

/// The folders of [`PARTS`].
///
/// # Errors
/// If one is missing.
pub fn folders(folder: &Folder) -> Result<[Folder; 3], Error> {
    match PARTS.map(|name| folder.part(name)) {
        [Some(transformer), Some(vqvae), Some(tokenizer)] => Ok([transformer, vqvae, tokenizer]),
        found => {
            let missing = PARTS.iter().zip(found).filter(|(_, part)| part.is_none());
            let missing = missing.map(|(name, _)| (*name).to_owned()).collect();
            Err(Error::NoParts { folder: folder.path().into(), missing, parts: &PARTS })
        }
    }
}

impl Parts {
    fn of(folder: &Folder) -> Result<Self, Error> {
        let index = folder.config("model_index.json")?;
        let folders = folders(folder)?;
        let [transformer, vqvae, _] = &folders;
        let decoder = LlamaConfig::parse(&transformer.config("config.json")?)?;
        let vq = vqmodel::parse(&vqvae.config("config.json")?)?;
        let plan = Plan::parse(&index, &decoder, &vq)?;
        Ok(Self { folders, config: TokenDrawingConfig { transformer: decoder, vq, plan } })
    }
}

impl TokenDrawingConfig {
    /// The shapes that a folder's configurations say.
    ///
    /// # Errors
    /// If a part is missing, a configuration malformed, or they do not fit together.
    pub fn of(folder: &Folder) -> Result<Self, Error> {
        Ok(Parts::of(folder)?.config)
    }

    /// Untrained parts. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> (Llama, VqModel) {
        (self.transformer.init(device), self.vq.init(device))
    }
}

/// The shapes of the embedded model: 64 codes of 1,024 make a picture of 64x64.
const EMOJI: TokenDrawingConfig = TokenDrawingConfig {
    transformer: LlamaConfig {
        vocab_size: 5120,
        n_positions: 128,
        d_model: 192,
        d_ff: 512,
        n_layers: 8,
        n_heads: 6,
        n_kv_heads: 6,
        d_head: 32,
        activation: Activation::Silu,
        attention_bias: false,
        mlp_bias: false,
        rms_norm_eps: 1e-6,
        rope_theta: 1000.0,
        rope_scaling: RopeScaling::Unscaled,
        pairing: Pairing::Half,
        head: Head::Tied,
    },
    vq: VqConfig {
        codec: CodecConfig {
            channels_in: 12,
            channels_out: 12,
            channels: Cow::Borrowed(&[32, 64, 64]),
            n_residuals: 1,
            d_latent: 64,
            norm: NormConfig { n_groups: 8, eps: NORM_EPS, activation: Activation::Silu },
            attends: true,
        },
        n_codes: 1024,
        d_code: 8,
        scaling_factor: 1.0,
    },
    plan: Plan { first_code: 4096, n_codes: 1024, side: 8, patch: 2, max_caption: 24 },
};

/// The model inside this program.
pub const PRESETS: &[Preset] = &[Preset {
    name: "volary/emoji-draw",
    shape: Shape::TokenDrawing(&EMOJI),
    weights: Weights::Embedded,
    license: "MIT OR Apache-2.0, trained on CC-BY-4.0, Apache-2.0 and MIT pictures",
    parameters: 5_561_076,
    source: "this repository",
}];

/// What draws by tokens, as the registry knows it.
pub const SYSTEM: System = System {
    name: "token_drawing",
    about: "pictures from texts by tokens: LLaMA's decoder writes the codes of a VQModel",
    file: "models/token_drawing.rs",
    tasks: &["imagine", "forward"],
    proved: &["token_drawing"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("_class_name") == Some(CLASS)),
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let Parts { folders: [transformer, vqvae, _], config } = Parts::of(folder)?;
        let (decoder, vq) = config.init(&Device::flex());
        Ok(Description::of_parts([
            ("transformer", describe(&transformer, &decoder, config.transformer.keys())?),
            ("vq", describe(&vqvae, &vq, &vqmodel::KEYS)?),
        ]))
    },
    open: |folder, options, device| Ok(Box::new(Runner(TokenDrawing::load(folder, options, device)?))),
    generator: None,
};

/// What draws, behind the forward contract.
struct Runner(TokenDrawing);

impl Forward for Runner {
    /// `input_ids`, captions of one length with the special tokens around them: `[batch, seq]`.
    ///
    /// Gives the likeliest codes as `indices`, `[batch, codes]`, and what they look like as `sample`, `[batch, 3, height,
    /// width]`, -1 to 1.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let Self(TokenDrawing { transformer, plan, .. }) = self;
        let ids = inputs.ids("input_ids", plan.first_code);
        inputs.missing("input_ids");
        inputs.finish()?;
        let Some(ids) = ids else { return Ok(Outputs::new()) }; // finished with an error
        let [batch, seq] = ids.dims();
        let ids: Vec<u32> = ids.into_data().convert::<i64>().iter::<i64>().map(|id| id as u32).collect();
        let prompts: Vec<&[u32]> = ids.chunks_exact(seq).collect();
        let inner = transformer.session(&prompts, plan.len());
        let codes = greedy(&mut Codes { inner, plan: *plan, guidance: None, rows: batch }, plan.len());
        let indices: Vec<i64> = codes.iter().flatten().map(|&code| i64::from(code)).collect();
        Ok(vec![
            ("indices".into(), TensorData::new(indices, [batch, plan.len()])),
            output("sample", self.0.paint(&codes)),
        ])
    }
}

impl TokenDrawing {
    /// Loads a folder: `model_index.json`, and the parts in `transformer`, `vqvae` and `tokenizer`.
    ///
    /// # Errors
    /// If a part is missing or malformed, or they do not fit together.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let Parts { folders: [transformer, vqvae, tokenizer], config } = Parts::of(folder)?;
        let (decoder, vq) = config.init(device);
        Ok(Self {
            tokenizer: tokenizer.tokenizer()?,
            vq: fill(&vqvae, vq, &vqmodel::KEYS, options)?,
            transformer: fill(&transformer, decoder, config.transformer.keys(), options)?,
            plan: config.plan,
        })
    }

    /// Height and width of a picture in pixels.
    pub fn side(&self) -> usize {
        let factor = 1 << self.vq.decoder.stages.len().saturating_sub(1);
        self.plan.side * self.plan.patch * factor
    }

    /// The codes of [`DrawSettings::count`] pictures of each caption, row by row.
    ///
    /// # Errors
    /// If a caption cannot be tokenized or has no tokens, or scores are not numbers.
    pub fn codes(
        &self,
        captions: &[impl AsRef<str>],
        negative: &str,
        settings: &DrawSettings,
        watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Vec<u32>>>, Error> {
        let Self { transformer, tokenizer, plan, .. } = self;
        let ids = |text: &str| match plan.caption(tokenizer, text)?.ids {
            ids if ids.is_empty() => {
                let problem =
                    format!("the caption {text:?} has no tokens: this tokenizer puts none around it");
                Err(Error::Prompt { problems: vec![problem] })
            }
            ids => Ok(ids),
        };
        let mut prompts: Vec<Vec<u32>> =
            captions.iter().map(|caption| ids(caption.as_ref())).collect::<Result<_, Error>>()?;
        let before = vec![Vec::new(); prompts.len()];
        let is_guided = settings.guidance != 1.0;
        if is_guided {
            let negative = ids(negative)?;
            prompts.extend(vec![negative; prompts.len()]);
        }
        let inner = transformer.session(&prompts, plan.len());
        let guidance = is_guided.then_some(settings.guidance);
        let mut session = Codes { inner, plan: *plan, guidance, rows: captions.len() };
        let settings = Settings {
            max_new: plan.len(),
            method: Method::Sample(settings.sampling.clone()),
            count: settings.count,
            ..Settings::default()
        };
        let written = write(&mut session, &before, &settings, &|| Box::new(Silent), watch)?;
        let codes =
            written.into_iter().map(|of_caption| of_caption.into_iter().map(|one| one.tokens).collect());
        Ok(codes.collect())
    }

    /// Draws [`DrawSettings::count`] pictures of each caption. Whoever watches may end it all: what is missing then is code 0.
    ///
    /// # Errors
    /// If a caption cannot be tokenized or has no tokens, or scores are not numbers.
    pub fn draw(
        &self,
        captions: &[impl AsRef<str>],
        negative: &str,
        settings: &DrawSettings,
        watch: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<Rgb8>>, Error> {
        let codes = self.codes(captions, negative, settings, watch)?;
        Ok(codes.into_iter().map(|codes| pictures(self.paint(&codes))).collect())
    }

    /// What codes look like, `[pictures, 3, height, width]`, values from -1 to 1. Codes that are missing are code 0.
    pub fn paint(&self, codes: &[Vec<u32>]) -> Tensor<4> {
        let Plan { side, .. } = self.plan;
        let padded = codes.iter().flat_map(|codes| {
            let missing = self.plan.len() - codes.len();
            codes.iter().map(|&code| i64::from(code)).chain(std::iter::repeat_n(0, missing))
        });
        let data = TensorData::new(padded.collect(), [codes.len(), side, side]);
        let codes = Tensor::<3, Int>::from_data(data, &self.transformer.tokens.weight.device());
        self.plan.unfold(self.vq.decode(self.vq.look_up(codes)))
    }
}

/// Captions, and after them codes alone: tokens of this session are codes. With guidance every row is read twice, after its
/// caption and after the negative one (Ho and Salimans 2022, <https://arxiv.org/abs/2207.12598>).
struct Codes<S> {
    /// Rows with their captions, then as many with the negative ones if there is guidance.
    inner: S,
    plan: Plan,
    guidance: Option<f32>,
    rows: usize,
}

impl<S: Session> Codes<S> {
    /// `[rows or 2 * rows, vocab_size] -> [rows, n_codes]`
    fn guide(&self, scores: Tensor<2>) -> Tensor<2> {
        let scores = scores.narrow(1, self.plan.first_code, self.plan.n_codes);
        let Some(guidance) = self.guidance else { return scores };
        let meant = scores.clone().narrow(0, 0, self.rows);
        let negative = scores.narrow(0, self.rows, self.rows);
        negative.clone() + (meant - negative) * guidance
    }

    fn twice<T: Copy>(&self, rows: &[T], negative: impl Fn(T) -> T) -> Vec<T> {
        let own = rows.iter().copied();
        match self.guidance {
            Some(_) => own.clone().chain(own.map(negative)).collect(),
            None => own.collect(),
        }
    }
}

impl<S: Session> Session for Codes<S> {
    fn start(&mut self) -> Tensor<2> {
        let scores = self.inner.start();
        self.guide(scores)
    }

    fn read(&mut self, codes: &[u32]) -> Tensor<2> {
        let tokens: Vec<u32> = codes.iter().map(|code| code + self.plan.first_code as u32).collect();
        let scores = self.inner.read(&self.twice(&tokens, |token| token));
        self.guide(scores)
    }

    fn select(&mut self, rows: &[usize]) {
        let count = self.rows;
        self.inner.select(&self.twice(rows, |row| row + count));
        self.rows = rows.len();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pretrained::EMOJI_DRAW;

    const PLAN: Plan = Plan { first_code: 2, n_codes: 3, side: 2, patch: 2, max_caption: 4 };

    /// Scores that a table gives for the last token, and for rows whose caption is 0 nothing at all.
    struct Table {
        captions: Vec<u32>,
    }

    impl Table {
        fn scores(&self, last: &[u32]) -> Tensor<2> {
            let rows = self.captions.iter().zip(last).flat_map(|(&caption, &last)| {
                (0..5)
                    .map(move |token| if caption == 0 { 0.0 } else { ((token * caption + last) % 7) as f32 })
            });
            let data = TensorData::new(rows.collect::<Vec<f32>>(), [last.len(), 5]);
            Tensor::from_data(data, &Device::flex())
        }
    }

    impl Session for Table {
        fn start(&mut self) -> Tensor<2> {
            self.scores(&vec![0; self.captions.len()])
        }

        fn read(&mut self, tokens: &[u32]) -> Tensor<2> {
            assert_eq!(tokens.len(), self.captions.len(), "one token a row");
            assert!(tokens.iter().all(|token| (2..5).contains(token)), "codes are tokens 2 to 4: {tokens:?}");
            self.scores(tokens)
        }

        fn select(&mut self, rows: &[usize]) {
            self.captions = rows.iter().map(|&row| self.captions[row]).collect();
        }
    }

    fn codes(captions: &[u32], guidance: Option<f32>) -> Codes<Table> {
        let mut all = captions.to_vec();
        if guidance.is_some() {
            all.extend(vec![0; captions.len()]);
        }
        Codes { inner: Table { captions: all }, plan: PLAN, guidance, rows: captions.len() }
    }

    fn values(scores: Tensor<2>) -> Vec<f32> {
        scores.into_data().iter::<f32>().collect()
    }

    #[test]
    fn scores_are_those_of_codes() {
        assert_eq!(values(codes(&[1, 3], None).start()), [2.0, 3.0, 4.0, 6.0, 2.0, 5.0]);
    }

    /// The negative caption's scores are zero: guidance multiplies what is left.
    #[test]
    fn guidance_leads_away_from_the_negative_caption() {
        let mut guided = codes(&[1, 3], Some(2.0));
        assert_eq!(values(guided.start()), [4.0, 6.0, 8.0, 12.0, 4.0, 10.0]);
        assert_eq!(values(guided.read(&[0, 2])), [8.0, 10.0, 12.0, 6.0, 12.0, 4.0]);
        assert_eq!(greedy(&mut codes(&[1, 3], Some(2.0)), 4), greedy(&mut codes(&[1, 3], None), 4));
    }

    #[test]
    fn rows_are_taken_with_their_negatives() {
        let mut guided = codes(&[1, 3], Some(2.0));
        guided.start();
        guided.select(&[1, 1, 0]);
        assert_eq!(guided.inner.captions, [3, 3, 1, 0, 0, 0]);
        guided.select(&[2]);
        assert_eq!(guided.inner.captions, [1, 0]);
    }

    #[test]
    fn squares_become_channels_and_squares_again() {
        let values: Vec<f32> = (0..2 * 3 * 4 * 6).map(|value| value as f32).collect();
        let pixels = Tensor::<4>::from_data(TensorData::new(values.clone(), [2, 3, 4, 6]), &Device::flex());
        let folded = PLAN.fold(pixels);
        assert_eq!(folded.dims(), [2, 12, 2, 3]);
        // the colours of the upper left pixel of the first square
        let first = folded.clone().slice([0..1, 0..3, 0..1, 0..1]).into_data();
        assert_eq!(first.iter::<f32>().collect::<Vec<_>>(), [0.0, 24.0, 48.0]);
        assert_eq!(PLAN.unfold(folded).into_data().iter::<f32>().collect::<Vec<_>>(), values);
    }

    #[test]
    fn the_embedded_folder_has_the_preset_s_shapes() {
        assert_eq!(TokenDrawingConfig::of(&EMOJI_DRAW).unwrap(), EMOJI);
    }

    #[test]
    fn a_long_caption_keeps_its_end() {
        let tokenizer = EMOJI_DRAW.part("tokenizer").unwrap().tokenizer().unwrap();
        let Caption { ids, cut } = PLAN.caption(&tokenizer, "a cat and a dog").unwrap();
        let whole = tokenizer.encode("a cat and a dog").unwrap().ids;
        assert_eq!((ids.len(), cut), (4, whole.len() - 4));
        assert_eq!((&ids[..3], ids[3]), (&whole[..3], whole[whole.len() - 1]));
        assert_eq!(PLAN.caption(&tokenizer, "cat").unwrap().cut, 0);
    }
}
