//! SegGPT: a picture segmented as an example shows it (Wang et al. 2023, <https://arxiv.org/abs/2304.03284>, BAAI). It is a
//! [`mod@crate::painter`] whose answers are segmentations, in whatever colours the example has, with a token that says
//! whether one thing or a kind of things is meant; of several examples, what each says of the question is averaged in
//! every block.
//!
//! The numbers match the authors' `models_seggpt.py` (`seggpt_vit_large.pth`, with or without a `config.json` of the
//! constructor's arguments) and `SegGptForImageSegmentation` of transformers, whose layouts are read.
//!
//! ```sh
//! volary segment cat.jpg --prompt dog.jpg --mask dog_mask.png --model BAAI/seggpt-vit-large
//! ```

use std::borrow::Cow;

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};
use volary_kernels::ops::Activation;
use volary_vision::image::Rgb8;
use volary_vision::interpolation::Interpolation;
use volary_vision::palette::Painting;
use volary_vision::patch::patchify;
use volary_vision::resample::Filter;
use volary_weights::{KeyMap, LoadOptions, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::paint::{Easel, Example, misfits};
use crate::painter::{ATTENTION, Asked, CHANNELS, Distance, LARGE, Painter, PainterConfig, RULES, Rows};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output, scalar};
use crate::vit::{side_or, sides_or};

/// Shape of a SegGPT.
#[derive(Clone, Debug, PartialEq)]
pub struct SegGptConfig {
    /// All but the tokens of kinds.
    pub trunk: PainterConfig,
    /// How many blocks average over the examples stream by stream; from there on all that is in the batch. The authors do
    /// it while there are two streams, transformers one block less.
    pub apart: usize,
}

/// What an example marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Meant {
    /// Things or stuff of a kind.
    Semantic,
    /// One thing.
    Instance,
}

/// A SegGPT.
#[derive(Module, Debug)]
pub struct SegGpt {
    /// All but the tokens of kinds.
    pub trunk: Painter,
    /// `[d_model]`, of [`Meant::Semantic`].
    pub semantic_token: Param<Tensor<1>>,
    /// `[d_model]`, of [`Meant::Instance`].
    pub instance_token: Param<Tensor<1>>,
    apart: usize,
}

impl SegGptConfig {
    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> SegGpt {
        let token = || Initializer::Normal { mean: 0.0, std: 0.02 }.init([self.trunk.d_model], device);
        SegGpt {
            trunk: self.trunk.init(device),
            semantic_token: token(),
            instance_token: token(),
            apart: self.apart,
        }
    }
}

impl SegGpt {
    /// What the model paints, examples included: `[batch, 3, height, width]`.
    ///
    /// - `pictures`, `answers`: `[batch, 3, height, width]`, normalised: an example above a question
    /// - `masked`: `[batch, patches]`, 1 where a patch of the answer is to be painted, else 0
    /// - `meant`: what is meant in each row; `None` stands for no token
    ///
    /// # Panics
    /// If the pictures are not of the model's size, or there is not one `meant` per row.
    pub fn forward(
        &self,
        pictures: Tensor<4>,
        answers: Tensor<4>,
        masked: Tensor<2>,
        meant: &[Option<Meant>],
        rows: Rows,
    ) -> Tensor<4> {
        let [batch, ..] = pictures.dims();
        assert_eq!(meant.len(), batch, "what is meant (left), and rows of the batch");
        let kinds = Tensor::stack::<2>(meant.iter().map(|&meant| self.token(meant)).collect(), 0);
        let kinds = kinds.unsqueeze_dim::<3>(1); // [batch, 1, d_model]
        let streams = self.trunk.embed(pictures, answers, masked).map(|x| x + kinds.clone());
        let features = self.trunk.encode(streams, |layer| rows.sharing(layer, self.apart));
        self.trunk.decode(features)
    }

    /// `[d_model]`
    fn token(&self, meant: Option<Meant>) -> Tensor<1> {
        match meant {
            Some(Meant::Semantic) => self.semantic_token.val(),
            Some(Meant::Instance) => self.instance_token.val(),
            None => self.semantic_token.val().zeros_like(),
        }
    }
}

/// The mean distance of what is painted from the answers, `[batch, 3, height, width]` both, over valid pixels (1, else 0)
/// of masked patches, of which there is at least one. `[1]`
pub fn loss(
    config: &PainterConfig,
    painted: Tensor<4>,
    answers: Tensor<4>,
    masked: Tensor<2>,
    valid: Tensor<4>,
) -> Tensor<1> {
    let counted = config.pixels(masked) * valid;
    let distance = config.distance.of(painted, answers);
    (distance * counted.clone()).sum() / counted.sum()
}

/// A public layout of weights and configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// The authors'.
    Authors,
    /// `transformers`.
    Transformers,
}

impl Layout {
    /// The key map of the layout.
    pub const fn keys(self) -> &'static KeyMap {
        match self {
            Self::Authors => &KEYS,
            Self::Transformers => &KEYS_TRANSFORMERS,
        }
    }
}

impl SegGptConfig {
    /// The configuration of a folder and the layout of its weights.
    ///
    /// # Errors
    /// If the configuration is malformed, or asks for what is not built.
    pub fn of(folder: &Folder) -> Result<(Self, Layout), Error> {
        if !folder.has("config.json") {
            return Ok((AUTHORS, Layout::Authors));
        }
        let config = folder.config("config.json")?;
        Ok(match ["embed_dim", "img_size"].iter().any(|field| config.has(field)) {
            true => (Self::authors(&config)?, Layout::Authors),
            false => (Self::transformers(&config)?, Layout::Transformers),
        })
    }

    /// The authors' constructor arguments; what is left out has the values of the released model.
    ///
    /// # Errors
    /// If they are malformed, or ask for what is not built.
    pub fn authors(config: &Config) -> Result<Self, ConfigError> {
        Ok(Self { trunk: PainterConfig::authors(config)?, ..AUTHORS })
    }

    /// `config.json` of `transformers`; what it leaves out has the values of `SegGptConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn transformers(config: &Config) -> Result<Self, ConfigError> {
        config.only("num_channels", &["3"])?;
        if config.first_of("architectures").is_some_and(|name| name != "SegGptForImageSegmentation") {
            return Err(config.error("architectures", "SegGptForImageSegmentation"));
        }
        let d_model = config.size_or("hidden_size", LARGE.d_model)?;
        let patch_size = side_or(config, "patch_size", LARGE.patch_size)?;
        let layer_norm_eps = config.number_or("layer_norm_eps", LARGE.layer_norm_eps)?;
        let taps = match config.sizes("intermediate_hidden_state_indices") {
            Some(taps) => Cow::Owned(taps),
            None if !config.has("intermediate_hidden_state_indices") => LARGE.taps,
            None => {
                return Err(
                    config.error("intermediate_hidden_state_indices", "the numbers of blocks, ascending")
                );
            }
        };
        let merge = match config.integer_or("merge_index", 2)? {
            merge @ 0..=1000 => merge as usize,
            _ => return Err(config.error("merge_index", "the number of a block")),
        };
        let beta = match config.number_or("beta", 0.01)? {
            beta if beta > 0.0 => beta,
            _ => return Err(config.error("beta", "a number above 0")),
        };
        let trunk = PainterConfig {
            image_size: match config.has("image_size") {
                true => sides_or(config, "image_size", 0)?,
                false => LARGE.image_size,
            },
            patch_size,
            d_model,
            d_ff: config.size_or("mlp_dim", 4 * d_model)?,
            n_layers: config.blocks_or("num_hidden_layers", LARGE.n_layers)?,
            n_heads: config.size_or("num_attention_heads", LARGE.n_heads)?,
            activation: config.activation_or("hidden_act", Activation::Gelu)?,
            layer_norm_eps,
            qkv_bias: config.flag_or("qkv_bias", true)?,
            relative_positions: config.flag_or("use_relative_position_embeddings", true)?,
            position_grid: side_or(config, "pretrain_image_size", 224)? / patch_size,
            class_position: true,
            merge,
            taps,
            d_decoder: config.size_or("decoder_hidden_size", LARGE.d_decoder)?,
            decoder_norm_eps: layer_norm_eps,
            distance: Distance::SmoothL1(beta),
        };
        let taps = "intermediate_hidden_state_indices";
        let fields = ["image_size", "pretrain_image_size", "num_attention_heads", "merge_index", taps];
        Ok(Self { trunk: trunk.checked(config, fields)?, apart: merge })
    }
}

/// Keys of the authors.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("", "trunk.", RULES),
    Reshape("type_token_cls", "semantic_token", Ones::Before(3)),
    Reshape("type_token_ins", "instance_token", Ones::Before(3)),
]);

const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// Keys of `SegGptForImageSegmentation`.
pub const KEYS_TRANSFORMERS: KeyMap = KeyMap::new(&[
    Under(
        "model.embeddings.",
        "",
        &[
            Under("patch_embeddings.projection.", "trunk.patches.", PAIR),
            Reshape("mask_token", "trunk.mask_token", Ones::Before(3)),
            Reshape("segment_token_input", "trunk.picture_token", Ones::Before(3)),
            Reshape("segment_token_prompt", "trunk.answer_token", Ones::Before(3)),
            Reshape("type_token_semantic", "semantic_token", Ones::Before(3)),
            Reshape("type_token_instance", "instance_token", Ones::Before(3)),
            Reshape("position_embeddings", "trunk.positions.weight", Ones::Before(1)),
        ],
    ),
    Under(
        "model.encoder.layers.{}.",
        "trunk.blocks.{}.",
        &[
            Under("layernorm_before.", "norm1.", PAIR),
            Under("attention.", "", ATTENTION),
            Under("layernorm_after.", "norm2.", PAIR),
            Under("mlp.lin1.", "mlp.up.", PAIR),
            Under("mlp.lin2.", "mlp.down.", PAIR),
        ],
    ),
    Under("model.encoder.layernorm.", "trunk.norm.", PAIR),
    Under(
        "decoder.",
        "trunk.decoder.",
        &[
            Under("decoder_embed.", "embed.", PAIR),
            Under("decoder_pred.conv.", "conv.", PAIR),
            Under("decoder_pred.layernorm.", "norm.", PAIR),
            Reshape("decoder_pred.head.weight", "colours.weight", Ones::After(2)),
            Rename("decoder_pred.head.bias", "colours.bias"),
        ],
    ),
]);

/// The authors' file, which they post without a configuration.
const FILE: &str = "seggpt_vit_large.pth";

/// SegGPT as the registry knows it.
pub const SYSTEM: System = System {
    name: "seggpt",
    about: "SegGPT: pictures segmented as an example shows it",
    file: "models/seggpt.rs",
    tasks: &["segment", "paint", "forward"],
    proved: &["seggpt", "seggpt_hf"],
    presets: PRESETS,
    recognises: |folder, config| match config {
        Some(config) => config.text("model_type") == Some("seggpt"),
        None => folder.has(FILE),
    },
    checkpoint: Folder::checkpoint,
    describe: |folder| {
        let (config, layout) = SegGptConfig::of(folder)?;
        describe(folder, &config.init(&Device::flex()), layout.keys())
    },
    open: |folder, options, device| {
        let (config, layout) = SegGptConfig::of(folder)?;
        let model = fill(folder, config.init(device), layout.keys(), options)?;
        Ok(Box::new(Runner { model, config, layout }))
    },
    generator: None,
};

/// A SegGPT behind the forward contract.
struct Runner {
    model: SegGpt,
    config: SegGptConfig,
    layout: Layout,
}

impl Forward for Runner {
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error> {
        match self.layout {
            Layout::Authors => self.authors(inputs),
            Layout::Transformers => self.transformers(inputs),
        }
    }
}

impl Runner {
    /// `imgs`, `tgts`, and optionally `bool_masked_pos`, `valid` and `seg_type` (0: a kind, 1: one thing), to `pred_patches`
    /// and `loss`. `ensemble.imgs` and `ensemble.tgts` are one question with several examples, of one thing unless
    /// `ensemble.seg_type` says otherwise, its lower half to be painted; `ensemble.query_image` is the answer.
    fn authors(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        const ENSEMBLE: &str = "ensemble.";
        let device = self.model.semantic_token.val().device();
        let trunk = &self.config.trunk;
        inputs.needed(&["imgs"]);
        let mut cases = Vec::new();
        for case in inputs.cases("imgs") {
            inputs.enter(&case);
            let asked = Asked::of(&mut inputs, trunk);
            let kinds = inputs.ids::<2>("seg_type", 2);
            let Some(asked) = asked else { continue };
            let [batch, ..] = asked.pictures.dims();
            inputs.shaped("seg_type", kinds.as_ref().map(Tensor::dims), [batch, 1]);
            let meant = |kind| if kind == 0 { Meant::Semantic } else { Meant::Instance };
            let kinds = kinds.map(|kinds| kinds.into_data().iter::<i64>().map(meant).map(Some).collect());
            cases.push((case, asked, kinds));
        }
        inputs.finish()?;
        let mut outputs = Outputs::new();
        for (case, asked, kinds) in cases {
            let Asked { pictures, answers, masked, valid } = asked.like(&self.model.trunk);
            let [batch, _, height, _] = pictures.dims();
            let (rows, masked, default) = match case == ENSEMBLE {
                true => (
                    Rows::Examples,
                    self.config.trunk.lower_half(batch, &device).cast(masked.dtype()),
                    Some(Meant::Instance),
                ),
                false => (Rows::Questions, masked, None),
            };
            let kinds: Vec<Option<Meant>> = kinds.unwrap_or_else(|| vec![default; batch]);
            let painted = self.model.forward(pictures, answers.clone(), masked.clone(), &kinds, rows);
            match rows {
                Rows::Examples => {
                    let answer = painted.narrow(0, 0, 1).narrow(2, height / 2, height / 2);
                    outputs.push(output(&format!("{case}query_image"), answer));
                }
                Rows::Questions => {
                    let patches = patchify(painted.clone(), trunk.patch_size);
                    outputs.push(output(&format!("{case}pred_patches"), patches));
                    let loss = loss(trunk, painted, answers, masked, valid);
                    outputs.push(output(&format!("{case}loss"), loss));
                }
            }
        }
        Ok(outputs)
    }

    /// `pixel_values`, `prompt_pixel_values`, `prompt_masks`, and optionally `bool_masked_pos`, to `pred_masks.instance`,
    /// `pred_masks.semantic`, and `pred_masks.ensemble`, which asks the first picture with all examples; with `labels`,
    /// the answers, there is a `loss`, of the first of them.
    fn transformers(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let trunk = &self.config.trunk;
        let [height, width] = self.config.trunk.picture_size();
        let names = ["pixel_values", "prompt_pixel_values", "prompt_masks"];
        let [asked, examples, shown] =
            names.map(|name| inputs.needed_pictures(name, [CHANNELS, height, width]));
        let labels = inputs.float::<4>("labels");
        let masked = inputs.mask("bool_masked_pos");
        if let Some(dims) = asked.as_ref().map(Tensor::dims) {
            let first = ("pixel_values", dims);
            inputs.like("prompt_pixel_values", examples.as_ref().map(Tensor::dims), first);
            inputs.like("prompt_masks", shown.as_ref().map(Tensor::dims), first);
            inputs.like("labels", labels.as_ref().map(Tensor::dims), first);
            let found = masked.as_ref().map(Tensor::dims).filter(|found| *found != [1, trunk.patches()]);
            inputs.shaped("bool_masked_pos", found, [dims[0], trunk.patches()]);
        }
        inputs.finish()?;
        let (Some(asked), Some(examples), Some(shown)) = (asked, examples, shown) else {
            return Ok(Outputs::new()); // finished with an error
        };
        let dtype = self.model.semantic_token.val().dtype();
        let [asked, examples, shown] = [asked, examples, shown].map(|pictures| pictures.cast(dtype));
        let labels = labels.map(|labels| labels.cast(dtype));
        let [batch, ..] = asked.dims();
        let masked = masked.map(|masked| masked.float().expand([batch, trunk.patches()]));
        let masked =
            masked.unwrap_or_else(|| self.config.trunk.lower_half(batch, &asked.device())).cast(dtype);
        let below = |upper: &Tensor<4>, lower: Tensor<4>| Tensor::cat(vec![upper.clone(), lower], 2);
        let answers = below(&shown, labels.clone().unwrap_or_else(|| shown.clone()));
        let paint = |asked: Tensor<4>, meant, rows| {
            let pictures = below(&examples, asked);
            self.model.forward(pictures, answers.clone(), masked.clone(), &vec![Some(meant); batch], rows)
        };
        let first = asked.clone().narrow(0, 0, 1).expand(asked.dims());
        let instance = paint(asked.clone(), Meant::Instance, Rows::Questions);
        let mut outputs = vec![
            output("pred_masks.instance", instance.clone()),
            output("pred_masks.semantic", paint(asked, Meant::Semantic, Rows::Questions)),
            output("pred_masks.ensemble", paint(first, Meant::Semantic, Rows::Examples)),
        ];
        if labels.is_some() {
            let valid = answers.ones_like();
            let loss = loss(trunk, instance, answers.clone(), masked.clone(), valid);
            outputs.push(scalar("loss", loss));
        }
        Ok(outputs)
    }
}

/// A SegGPT that segments pictures. Several examples are averaged as the authors do it, whatever the layout.
pub struct Segmenter {
    /// The model.
    pub model: SegGpt,
    /// Its shape.
    pub config: SegGptConfig,
    /// For pictures and masks.
    pub easel: Easel,
}

impl Segmenter {
    /// Loads a folder.
    ///
    /// # Errors
    /// If it is malformed, of another system, or its preprocessor makes pictures of another size than the model sees.
    pub fn load(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Self, Error> {
        let system = System::of(folder)?;
        if system.name != SYSTEM.name {
            return Err(Error::Task { system: system.name, task: "segment pictures as an example shows it" });
        }
        let (config, layout) = SegGptConfig::of(folder)?;
        let size = config.trunk.picture_size();
        let of_authors = Easel::of_authors(size, Filter::Nearest);
        let easel = match layout {
            Layout::Authors => of_authors,
            Layout::Transformers => Easel { preprocessor: folder.preprocessor()?, ..of_authors },
        };
        let preprocessor = &easel.preprocessor;
        if preprocessor.image_size() != Some(size) {
            let ([height, width], folder) = (size, folder.path().display());
            let made = preprocessor.image_size().map_or("varying sizes".into(), |[h, w]| format!("{w}x{h}"));
            let problem = format!(
                "{folder}: its preprocessor makes pictures of {made}, the model sees {width}x{height}"
            );
            return Err(Error::Input { system: SYSTEM.name, problems: vec![problem] });
        }
        // transformers mixes the two streams of several examples in one block, which the authors keep apart
        let config = SegGptConfig { apart: config.trunk.merge + 1, ..config };
        let model = fill(folder, config.init(device), layout.keys(), options)?;
        Ok(Self { model, config, easel })
    }

    /// The segmentation of a picture as the examples show it, in their colours on black, at the picture's size.
    ///
    /// # Errors
    /// If there is no example, a mask is not as large as its picture, or marks nothing.
    pub fn segment(&self, picture: &Rgb8, examples: &[Example], meant: Meant) -> Result<Painting, Error> {
        let mut problems = misfits(examples);
        let black = |(number, example): (usize, &Example)| {
            let black = example.answer.pixels().iter().all(|&sample| sample == 0);
            black.then(|| format!("example {number}: the mask is black, it marks nothing"))
        };
        problems.extend((1..).zip(examples).filter_map(black));
        if !problems.is_empty() {
            return Err(Error::Prompt { problems });
        }
        self.paint(picture, examples, meant, Interpolation::Nearest)
    }

    /// The answer to a picture as the examples show it, whatever that is, at the picture's size.
    ///
    /// # Errors
    /// If there is no example, or an answer is not as large as its picture.
    pub fn paint(
        &self,
        picture: &Rgb8,
        examples: &[Example],
        meant: Meant,
        interpolation: Interpolation,
    ) -> Result<Painting, Error> {
        let token = self.model.semantic_token.val();
        let (device, dtype, count) = (token.device(), token.dtype(), examples.len());
        let asked = self.easel.question(picture, examples, &device)?;
        let [pictures, answers] = asked.map(|pictures| pictures.cast(dtype));
        let masked = self.config.trunk.lower_half(count, &device).cast(dtype);
        let meant = vec![Some(meant); count];
        let painted = self.model.forward(pictures, answers, masked, &meant, Rows::Examples);
        Ok(self.easel.answer(painted, picture, interpolation))
    }
}

/// `seggpt_vit_large_patch16_input896x448` of the authors.
const AUTHORS: SegGptConfig = SegGptConfig { trunk: LARGE, apart: 3 };
/// The same in transformers.
const TRANSFORMERS: SegGptConfig = SegGptConfig { trunk: LARGE, apart: 2 };

const fn large(name: &'static str, config: &'static SegGptConfig, source: &'static str) -> Preset {
    let weights = Weights::Hub;
    Preset { name, shape: Shape::SegGpt(config), weights, license: "MIT", parameters: 370_723_203, source }
}

/// What presets point to.
const RELEASED: [&SegGptConfig; 2] = [&AUTHORS, &TRANSFORMERS];

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    large("BAAI/SegGPT", RELEASED[0], "the authors' constructor; seggpt_vit_large.pth is 1.48 GB of f32"),
    large("BAAI/seggpt-vit-large", RELEASED[1], "transformers, SegGptForImageSegmentation"),
];

#[cfg(test)]
mod tests {
    use burn::tensor::{TensorData, Tolerance};
    use volary_weights::parameters;

    use super::*;
    use crate::painter::tests::{TINY, config, random, run};

    fn tiny() -> SegGptConfig {
        SegGptConfig { trunk: TINY, apart: TINY.merge + 1 }
    }

    fn read(fixture: &str, name: &str) -> TensorData {
        let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let file = fixtures.join(fixture).join("inputs.safetensors");
        volary_weights::read_tensors(&file).unwrap()[name].clone()
    }

    #[test]
    fn every_parameter_has_one_key_and_leads_back() {
        for keys in [KEYS, KEYS_TRANSFORMERS] {
            for parameter in parameters(&tiny().init(&Device::flex())) {
                let from = keys.keys(&parameter.path).unwrap();
                assert_eq!(from.len(), 1, "{}", parameter.path);
                assert!(keys.paths(&from[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
            }
        }
    }

    #[test]
    fn nothing_said_is_the_released_model() {
        let found = SegGptConfig::transformers(&config(r#""model_type": "seggpt""#)).unwrap();
        assert_eq!(found, TRANSFORMERS);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""architectures": ["SegGptModel"]"#, "`architectures`"),
            (r#""num_channels": 1"#, "`num_channels`"),
            (r#""image_size": [880, 448]"#, "`image_size`"),
            (r#""pretrain_image_size": 8"#, "`pretrain_image_size`"),
            (r#""num_attention_heads": 7"#, "`num_attention_heads`"),
            (r#""intermediate_hidden_state_indices": []"#, "`intermediate_hidden_state_indices`"),
            (r#""intermediate_hidden_state_indices": [5, 5]"#, "`intermediate_hidden_state_indices`"),
            (r#""intermediate_hidden_state_indices": [5, 24]"#, "features of block 24, of 24 from 0"),
            (r#""intermediate_hidden_state_indices": "all""#, "`intermediate_hidden_state_indices`"),
            (r#""merge_index": 6"#, "`merge_index`: expected at most 5"),
            (r#""merge_index": -1"#, "`merge_index`"),
            (r#""beta": 0"#, "`beta`"),
        ] {
            let message = SegGptConfig::transformers(&config(fields)).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }

    /// The same example twice says what it says once; and which of two comes first says nothing.
    #[test]
    fn examples_are_averaged() {
        let (config, device) = (tiny(), Device::flex());
        let model = config.init(&device);
        let upper = random([2, 3, 4, 4]);
        let shown = random([2, 3, 4, 4]);
        let asked = random([1, 3, 4, 4]);
        let paint = |upper: Tensor<4>, shown: Tensor<4>, rows| {
            let [count, ..] = upper.dims();
            let pictures = Tensor::cat(vec![upper, asked.clone().expand([count, 3, 4, 4])], 2);
            let answers = Tensor::cat(vec![shown.clone(), shown], 2);
            let masked = config.trunk.lower_half(count, &device);
            let painted = model.forward(pictures, answers, masked, &vec![Some(Meant::Instance); count], rows);
            painted.narrow(0, 0, 1).narrow(2, 5, 3).into_data() // the first row sees the picture above
        };
        let one = |x: &Tensor<4>| x.clone().narrow(0, 0, 1);
        let twice = |x: &Tensor<4>| Tensor::cat(vec![one(x), one(x)], 0);
        let alone = paint(one(&upper), one(&shown), Rows::Questions);
        let tolerance = Tolerance::absolute(1e-5);
        alone.assert_approx_eq::<f32>(&paint(twice(&upper), twice(&shown), Rows::Examples), tolerance);
        alone.assert_approx_eq::<f32>(&paint(one(&upper), one(&shown), Rows::Examples), tolerance);
        let both = paint(upper.clone(), shown.clone(), Rows::Examples);
        both.assert_approx_eq::<f32>(&paint(upper.flip([0]), shown.flip([0]), Rows::Examples), tolerance);
        let apart = alone.iter::<f32>().zip(both.iter::<f32>()).any(|(a, b)| (a - b).abs() > 1e-3);
        assert!(apart, "the second example changes something");
    }

    #[test]
    fn what_is_meant_is_told_apart() {
        let (config, device) = (tiny(), Device::flex());
        let model = config.init(&device);
        let (pictures, answers) =
            (random([1, 3, 8, 4]).expand([3, 3, 8, 4]), random([1, 3, 8, 4]).expand([3, 3, 8, 4]));
        let meant = [None, Some(Meant::Semantic), Some(Meant::Instance)];
        let painted =
            model.forward(pictures, answers, config.trunk.lower_half(3, &device), &meant, Rows::Questions);
        let row = |at| painted.clone().narrow(0, at, 1);
        for (a, b) in [(0, 1), (0, 2), (1, 2)] {
            assert!((row(a) - row(b)).abs().max().into_scalar::<f32>() > 1e-5, "{a} {b}");
        }
    }

    /// Of transformers 5.23 on the fixture, its pictures as labels.
    #[test]
    fn the_loss_of_labels() {
        let input = |name| (name, read("seggpt_hf", name));
        let mut inputs = ["pixel_values", "prompt_pixel_values", "prompt_masks"].map(input).to_vec();
        inputs.push(("labels", inputs[0].1.clone()));
        let loss = |inputs: &[(&str, TensorData)]| {
            let outputs = run("seggpt_hf", inputs).unwrap();
            let (_, loss) = outputs.iter().find(|(name, _)| name == "loss").unwrap();
            loss.iter::<f32>().next().unwrap()
        };
        let found = loss(&inputs);
        assert!((found - 0.955_030_6).abs() < 2e-6, "{found}");
        let third = (0..48).map(|patch| patch % 3 == 0).collect::<Vec<_>>();
        inputs.push(("bool_masked_pos", TensorData::new(third, [1, 48])));
        let found = loss(&inputs);
        assert!((found - 0.984_324_3).abs() < 2e-6, "{found}");
    }

    #[test]
    fn inputs_that_do_not_fit_are_told() {
        let floats = |shape: &[usize]| TensorData::new(vec![0.5_f32; shape.iter().product()], shape);
        let (one, two) = (floats(&[1, 3, 16, 24]), floats(&[2, 3, 16, 24]));
        let given = |extra: (&'static str, TensorData)| {
            let names = ["pixel_values", "prompt_pixel_values", "prompt_masks"];
            let kept = names.into_iter().filter(|name| *name != extra.0).map(|name| (name, one.clone()));
            kept.chain([extra.clone()]).collect::<Vec<_>>()
        };
        for (extra, named) in [
            (
                ("prompt_masks", two.clone()),
                "`prompt_masks` is [2, 3, 16, 24], `pixel_values` [1, 3, 16, 24]",
            ),
            (("labels", two.clone()), "`labels` is [2, 3, 16, 24]"),
            (("pixel_values", floats(&[1, 3, 32, 24])), "[3, 32, 24], expected [3, 16, 24]"),
            (("bool_masked_pos", floats(&[2, 48])), "`bool_masked_pos` is [2, 48], expected [1, 48]"),
            (("seg_type", floats(&[1, 1])), "`seg_type` is not one of"),
        ] {
            let message = run("seggpt_hf", &given(extra)).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
        let message = run("seggpt_hf", &[("pixel_values", one)]).unwrap_err().to_string();
        assert!(
            message.contains("`prompt_pixel_values` is missing; the input `prompt_masks` is missing"),
            "{message}"
        );
        let one = floats(&[1, 3, 32, 16]);
        let kind = TensorData::new(vec![2_i64], [1, 1]);
        let message = run("seggpt", &[("imgs", one.clone()), ("tgts", one), ("seg_type", kind)])
            .unwrap_err()
            .to_string();
        assert!(message.contains("`seg_type` holds 2, expected 0 to 1"), "{message}");
    }

    #[test]
    fn examples_that_show_nothing_are_refused() {
        let (config, device) = (tiny(), Device::flex());
        let easel = Easel::of_authors(config.trunk.picture_size(), Filter::Nearest);
        let segmenter = Segmenter { model: config.init(&device), config, easel };
        let flat = |width, height, value| Rgb8::new(width, height, vec![value; 3 * width * height]).unwrap();
        let example = |answer| Example { picture: flat(5, 7, 9), answer };
        let refused = |examples: &[Example]| {
            segmenter.segment(&flat(6, 3, 1), examples, Meant::Instance).unwrap_err().to_string()
        };
        assert_eq!(refused(&[]), "there is no example");
        let (small, black) = (example(flat(5, 6, 255)), example(flat(5, 7, 0)));
        let told =
            "example 1: the picture is 5x7, its answer 5x6; example 2: the mask is black, it marks nothing";
        assert_eq!(refused(&[small, black]), told);
        let painting =
            segmenter.segment(&flat(6, 3, 1), &[example(flat(5, 7, 255))], Meant::Semantic).unwrap();
        let painted = painting.to_rgb();
        assert_eq!([painted.width(), painted.height()], [6, 3], "as large as what was asked about");
    }
}
