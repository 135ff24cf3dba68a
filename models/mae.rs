//! MAE: a vision transformer that sees a quarter of a picture's patches, and a small one that paints the others (He et
//! al. 2021, <https://arxiv.org/abs/2111.06377>). [`mod@crate::painter`] starts from it.
//!
//! The numbers match `ViTMAEForPreTraining` of transformers, whose layout is read. The encoder is a [`mod@crate::vit`]; it
//! sees the patches in the order of their noise.
//!
//! ```sh
//! volary forward path/to/vit-mae-base --input in.safetensors --output out.safetensors
//! ```

use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Int, Tensor, TensorData};
use volary_kernels::layers::{LayerNorm, LearnedPositions, Linear, LinearConfig};
use volary_kernels::ops::Activation;
use volary_vision::masking::pick;
use volary_vision::patch::patchify;
use volary_weights::{KeyMap, Ones, Rule};

use Rule::{Rename, Reshape, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::{Forward, System, describe, fill};
use crate::tensors::{Inputs, Outputs, output, scalar};
use crate::vit::{self, BLOCK, Head, TRUNK, Vit, VitBlock, VitConfig, side_or, sides_or};

/// Shape of an MAE.
#[derive(Clone, Debug, PartialEq)]
pub struct MaeConfig {
    /// The encoder, without a head.
    pub encoder: VitConfig,
    /// Width of the decoder's residual stream.
    pub d_decoder: usize,
    /// Width of its MLP.
    pub d_decoder_ff: usize,
    /// Number of its blocks.
    pub n_decoder_layers: usize,
    /// Number of its attention heads.
    pub n_decoder_heads: usize,
    /// The share of patches that the encoder does not see.
    pub mask_ratio: f64,
    /// Whether the loss compares with patches that are normalised one by one.
    pub normalised_targets: bool,
}

/// An MAE.
#[derive(Module, Debug)]
pub struct Mae {
    /// The encoder.
    pub encoder: Vit,
    /// `[d_decoder, d_model]`.
    pub embed: Linear,
    /// `[d_decoder]`, stands for a patch that the encoder has not seen.
    pub mask_token: Param<Tensor<1>>,
    /// `[1 + patches, d_decoder]`.
    pub positions: LearnedPositions,
    /// The decoder's blocks.
    pub blocks: Vec<VitBlock>,
    /// After them.
    pub norm: LayerNorm,
    /// `[patch_size² * channels, d_decoder]`.
    pub pixels: Linear,
}

/// Which patches the encoder sees, and in which order.
#[derive(Clone, Debug)]
pub struct Shuffle {
    /// The patches in their new order, of which the encoder sees the first: `[batch, patches]`.
    pub order: Tensor<2, Int>,
    /// Where each patch went: `[batch, patches]`.
    pub places: Tensor<2, Int>,
    /// How many the encoder sees.
    pub seen: usize,
}

impl MaeConfig {
    /// How many patches the encoder sees.
    pub fn seen(&self) -> usize {
        (self.encoder.patches() as f64 * (1.0 - self.mask_ratio)) as usize
    }

    /// What the decoder's blocks are.
    fn decoder(&self) -> VitConfig {
        VitConfig {
            d_model: self.d_decoder,
            d_ff: self.d_decoder_ff,
            n_layers: self.n_decoder_layers,
            n_heads: self.n_decoder_heads,
            ..self.encoder.clone()
        }
    }

    /// An untrained model. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> Mae {
        let VitConfig { d_model, patch_size, channels, layer_norm_eps, .. } = self.encoder;
        let (d_decoder, decoder) = (self.d_decoder, self.decoder());
        Mae {
            encoder: self.encoder.init(device),
            embed: LinearConfig::new(d_model, d_decoder).init(device),
            mask_token: Initializer::Normal { mean: 0.0, std: 0.02 }.init([d_decoder], device),
            positions: LearnedPositions::new(1 + self.encoder.patches(), d_decoder, 0.02, device),
            blocks: (0..self.n_decoder_layers).map(|_| decoder.block(device)).collect(),
            norm: LayerNorm::new(d_decoder, layer_norm_eps, device),
            pixels: LinearConfig::new(d_decoder, patch_size * patch_size * channels).init(device),
        }
    }
}

impl Shuffle {
    /// Every row's patches by their noise, `[batch, patches]`, the least first; of equal ones the first.
    pub fn new(noise: &Tensor<2>, seen: usize) -> Self {
        let ([batch, patches], device) = (noise.dims(), noise.device());
        let noise: Vec<f32> = noise.to_data().convert::<f32>().iter::<f32>().collect();
        let (mut order, mut places) = (Vec::with_capacity(noise.len()), vec![0_i64; noise.len()]);
        for (row, noise) in noise.chunks_exact(patches).enumerate() {
            let mut sorted: Vec<usize> = (0..patches).collect();
            sorted.sort_by(|&a, &b| noise[a].total_cmp(&noise[b]));
            for (place, &patch) in sorted.iter().enumerate() {
                places[row * patches + patch] = place as i64;
                order.push(patch as i64);
            }
        }
        let tensor = |ids| Tensor::from_data(TensorData::new(ids, [batch, patches]), &device);
        Self { order: tensor(order), places: tensor(places), seen }
    }

    /// 1 where the encoder does not see a patch, else 0: `[batch, patches]`.
    pub fn hidden(&self) -> Tensor<2> {
        self.places.clone().greater_equal_elem(self.seen as i64).float()
    }
}

impl Mae {
    /// What the encoder makes of the patches it sees, `[batch, 3, height, width] -> [batch, 1 + seen, d_model]`, the class
    /// token first.
    ///
    /// # Panics
    /// If the pictures are not of the model's size.
    pub fn encode(&self, pixels: Tensor<4>, shuffle: &Shuffle) -> Tensor<3> {
        let Vit { patches, class_token, positions, blocks, norm, .. } = &self.encoder;
        let table = positions.iter().map(|positions| positions.weight.val().unsqueeze::<3>());
        let x = patches.forward(pixels);
        let [batch, count, d_model] = x.dims();
        let x = table.clone().fold(x, |x, table| x + table.narrow(1, 1, count));
        let x = pick(x, shuffle.order.clone().narrow(1, 0, shuffle.seen));
        let class = class_token.iter().map(|token| {
            let token = token.val().unsqueeze::<3>(); // [1, 1, d_model]
            table
                .clone()
                .fold(token, |token, table| token + table.narrow(1, 0, 1))
                .expand([batch, 1, d_model])
        });
        let x = Tensor::cat(class.chain([x]).collect(), 1);
        let x = blocks.iter().fold(x, |x, block| block.forward(x));
        norm.iter().fold(x, |x, norm| norm.forward(x))
    }

    /// What it paints of all patches, `[batch, 1 + seen, d_model] -> [batch, patches, patch_size² * channels]`.
    pub fn decode(&self, seen: Tensor<3>, shuffle: &Shuffle) -> Tensor<3> {
        let x = self.embed.forward(seen); // [batch, 1 + seen, d_decoder]
        let ([batch, tokens, d_decoder], [_, patches]) = (x.dims(), shuffle.places.dims());
        let hidden = self.mask_token.val().unsqueeze::<3>().expand([batch, patches + 1 - tokens, d_decoder]);
        let all = Tensor::cat(vec![x.clone().narrow(1, 1, tokens - 1), hidden], 1);
        let x = Tensor::cat(vec![x.narrow(1, 0, 1), pick(all, shuffle.places.clone())], 1);
        let x = self.blocks.iter().fold(self.positions.forward(x), |x, block| block.forward(x));
        let x = self.pixels.forward(self.norm.forward(x)); // [batch, 1 + patches, patch_size² * channels]
        x.narrow(1, 1, patches)
    }
}

/// The mean squared distance of painted patches from those of the pictures, where the encoder has not seen them. `[1]`
pub fn loss(config: &MaeConfig, painted: Tensor<3>, pixels: Tensor<4>, shuffle: &Shuffle) -> Tensor<1> {
    let wanted = patchify(pixels, config.encoder.patch_size); // [batch, patches, values]
    let [batch, patches, values] = wanted.dims();
    let wanted = match config.normalised_targets {
        true => {
            let centred = wanted.clone() - wanted.mean_dim(2);
            let variance = centred.clone().square().sum_dim(2) / (values.max(2) - 1) as f64;
            centred / (variance + 1e-6).sqrt()
        }
        false => wanted,
    };
    let distance = (painted - wanted).square().mean_dim(2).reshape([batch, patches]);
    let hidden = shuffle.hidden().cast(distance.dtype());
    (distance * hidden.clone()).sum() / hidden.sum()
}

impl MaeConfig {
    /// `config.json` of `transformers`; what it leaves out has the values of `ViTMAEConfig`.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn transformers(config: &Config) -> Result<Self, ConfigError> {
        if config.first_of("architectures").is_some_and(|name| name != "ViTMAEForPreTraining") {
            return Err(config.error("architectures", "ViTMAEForPreTraining"));
        }
        let d_model = config.size_or("hidden_size", 768)?;
        let n_heads = config.size_or("num_attention_heads", 12)?;
        config.divides("num_attention_heads", n_heads, d_model)?;
        let d_decoder = config.size_or("decoder_hidden_size", 512)?;
        let n_decoder_heads = config.size_or("decoder_num_attention_heads", 16)?;
        config.divides("decoder_num_attention_heads", n_decoder_heads, d_decoder)?;
        let encoder = VitConfig {
            image_size: sides_or(config, "image_size", 224)?,
            patch_size: side_or(config, "patch_size", 16)?,
            channels: config.size_or("num_channels", 3)?,
            d_model,
            d_ff: config.size_or("intermediate_size", 3072)?,
            n_layers: config.blocks_or("num_hidden_layers", 12)?,
            n_heads,
            activation: config.activation_or("hidden_act", Activation::Gelu)?,
            layer_norm_eps: config.number_or("layer_norm_eps", 1e-12)?,
            qkv_bias: config.flag_or("qkv_bias", true)?,
            ..ENCODER
        };
        let [height, width] = encoder.image_size;
        if height != width || !height.is_multiple_of(encoder.patch_size) {
            let wanted = format!("a square made of patches of {0} x {0} pixels", encoder.patch_size);
            return Err(config.error("image_size", &wanted));
        }
        let mae = Self {
            encoder,
            d_decoder,
            d_decoder_ff: config.size_or("decoder_intermediate_size", 2048)?,
            n_decoder_layers: config.blocks_or("decoder_num_hidden_layers", 8)?,
            n_decoder_heads,
            mask_ratio: config.number_or("mask_ratio", 0.75)?,
            normalised_targets: config.flag_or("norm_pix_loss", false)?,
        };
        match mae.mask_ratio {
            ratio if (0.0..1.0).contains(&ratio) && mae.seen() > 0 => Ok(mae),
            _ => Err(config.error("mask_ratio", "at least 0, and so low that a patch is seen")),
        }
    }
}

const PAIR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];

/// Keys of `ViTMAEForPreTraining`.
pub const KEYS: KeyMap = KeyMap::new(&[
    Under("vit.", "encoder.", TRUNK),
    Under("decoder.decoder_embed.", "embed.", PAIR),
    Reshape("decoder.mask_token", "mask_token", Ones::Before(2)),
    Reshape("decoder.decoder_pos_embed", "positions.weight", Ones::Before(1)),
    Under("decoder.decoder_encoder.layer.{}.", "blocks.{}.", BLOCK),
    Under("decoder.decoder_norm.", "norm.", PAIR),
    Under("decoder.decoder_pred.", "pixels.", PAIR),
]);

fn of(folder: &Folder) -> Result<MaeConfig, Error> {
    Ok(MaeConfig::transformers(&folder.config("config.json")?)?)
}

/// MAE as the registry knows it.
pub const SYSTEM: System = System {
    name: "mae",
    about: "MAE: vision transformers that paint what they do not see",
    file: "models/mae.rs",
    tasks: &["forward"],
    proved: &["vit_mae"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("vit_mae")),
    checkpoint: Folder::checkpoint,
    describe: |folder| describe(folder, &of(folder)?.init(&Device::flex()), &KEYS),
    open: |folder, options, device| {
        let config = of(folder)?;
        let model = fill(folder, config.init(device), &KEYS, options)?;
        Ok(Box::new(Runner { model, config }))
    },
    generator: None,
};

/// An MAE behind the forward contract.
struct Runner {
    model: Mae,
    config: MaeConfig,
}

impl Forward for Runner {
    /// `pixel_values` and `noise`, which the reference draws where it is not given; here the patches then stay in their
    /// order, so that the upper ones are seen.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let VitConfig { image_size: [height, width], channels, .. } = self.config.encoder;
        let patches = self.config.encoder.patches();
        let pixels = inputs.needed_pictures("pixel_values", [channels, height, width]);
        let noise = inputs.float::<2>("noise");
        if let Some([batch, ..]) = pixels.as_ref().map(Tensor::dims) {
            inputs.shaped("noise", noise.as_ref().map(Tensor::dims), [batch, patches]);
        }
        inputs.finish()?;
        let Some(pixels) = pixels else { return Ok(Outputs::new()) }; // finished with an error

        let [batch, ..] = pixels.dims();
        let noise = noise.unwrap_or_else(|| Tensor::zeros([batch, patches], &pixels.device()));
        let shuffle = Shuffle::new(&noise, self.config.seen());
        let pixels = pixels.cast(self.model.encoder.patches.weight.val().dtype());
        let painted = self.model.decode(self.model.encode(pixels.clone(), &shuffle), &shuffle);
        Ok(vec![
            output("logits", painted.clone()),
            scalar("loss", loss(&self.config, painted, pixels, &shuffle)),
            output("mask", shuffle.hidden()),
            ("ids_restore".into(), shuffle.places.into_data().convert::<i64>()),
        ])
    }
}

/// He et al. 2021, table 8 and appendix A.1: ViT-B.
const ENCODER: VitConfig = VitConfig { head: Head::Absent, ..vit::BASE };
const LARGE: VitConfig = VitConfig { d_model: 1024, d_ff: 4096, n_layers: 24, n_heads: 16, ..ENCODER };
const HUGE: VitConfig =
    VitConfig { patch_size: 14, d_model: 1280, d_ff: 5120, n_layers: 32, n_heads: 16, ..ENCODER };

const fn facebook(name: &'static str, encoder: VitConfig, parameters: usize) -> Preset {
    let config = MaeConfig {
        encoder,
        d_decoder: 512,
        d_decoder_ff: 2048,
        n_decoder_layers: 8,
        n_decoder_heads: 16,
        mask_ratio: 0.75,
        normalised_targets: false,
    };
    let (shape, weights, license) = (Shape::Mae(config), Weights::Hub, "Apache-2.0");
    Preset { name, shape, weights, license, parameters, source: "transformers, ViTMAEForPreTraining" }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    facebook("facebook/vit-mae-base", ENCODER, 111_907_840),
    facebook("facebook/vit-mae-large", LARGE, 329_541_888),
    facebook("facebook/vit-mae-huge", HUGE, 657_074_508),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::{Distribution, Tolerance};
    use volary_weights::{LoadOptions, parameters};

    use super::*;

    const TINY: MaeConfig = MaeConfig {
        encoder: VitConfig {
            image_size: [8; 2],
            patch_size: 2,
            d_model: 8,
            d_ff: 16,
            n_layers: 2,
            n_heads: 2,
            ..ENCODER
        },
        d_decoder: 12,
        d_decoder_ff: 20,
        n_decoder_layers: 1,
        n_decoder_heads: 3,
        mask_ratio: 0.6,
        normalised_targets: false,
    };

    fn random<const D: usize>(shape: [usize; D]) -> Tensor<D> {
        Tensor::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex())
    }

    #[test]
    fn every_parameter_has_one_key_and_leads_back() {
        for parameter in parameters(&TINY.init(&Device::flex())) {
            let from = KEYS.keys(&parameter.path).unwrap();
            assert_eq!(from.len(), 1, "{}", parameter.path);
            assert!(KEYS.paths(&from[0]).unwrap().contains(&parameter.path), "{}", parameter.path);
        }
    }

    #[test]
    fn a_shuffle_literal() {
        let noise = Tensor::from_floats([[0.3, 0.1, 0.2, 0.1], [0.0, 1.0, 2.0, 3.0]], &Device::flex());
        let shuffle = Shuffle::new(&noise, 1);
        shuffle
            .order
            .clone()
            .into_data()
            .convert::<i64>()
            .assert_eq(&[[1_i64, 3, 2, 0], [0, 1, 2, 3]].into(), true);
        shuffle
            .places
            .clone()
            .into_data()
            .convert::<i64>()
            .assert_eq(&[[3_i64, 0, 2, 1], [0, 1, 2, 3]].into(), true);
        shuffle
            .hidden()
            .into_data()
            .assert_eq(&[[1.0_f32, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]].into(), true);
    }

    /// 6 of 16 patches are seen; what is under the others changes nothing of what is painted.
    #[test]
    fn hidden_patches_are_not_seen() {
        let model = TINY.init(&Device::flex());
        let shuffle = Shuffle::new(&random([2, 16]), TINY.seen());
        assert_eq!(shuffle.seen, 6);
        let hidden = shuffle.hidden().unsqueeze_dim::<3>(2).expand([2, 16, 12]);
        let hidden = volary_vision::patch::unpatchify(hidden, [4; 2], 2).permute([0, 3, 1, 2]);
        let pixels = random([2, 3, 8, 8]);
        let other = pixels.clone() + hidden * 5.0;
        let paint = |pixels| model.decode(model.encode(pixels, &shuffle), &shuffle).into_data();
        paint(pixels).assert_approx_eq::<f32>(&paint(other), Tolerance::absolute(1e-5));
    }

    /// A painting that is right where it counts costs nothing, whatever it is elsewhere.
    #[test]
    fn only_hidden_patches_cost() {
        let shuffle = Shuffle::new(&random([2, 16]), TINY.seen());
        let pixels = random([2, 3, 8, 8]);
        let seen = (shuffle.hidden() * -1.0 + 1.0).unsqueeze_dim::<3>(2);
        let painted = patchify(pixels.clone(), 2) + seen * 3.0;
        assert_eq!(loss(&TINY, painted.clone(), pixels.clone(), &shuffle).into_scalar::<f32>(), 0.0);
        let off = loss(&TINY, painted + 2.0, pixels, &shuffle).into_scalar::<f32>();
        assert!((off - 4.0).abs() < 1e-4, "{off}");
    }

    /// Of transformers 5.23 on the fixture, with these options in its configuration.
    #[test]
    fn losses_of_other_options() {
        let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vit_mae");
        let folder = Folder::Disk(fixture.clone());
        let inputs = volary_weights::read_tensors(&fixture.join("inputs.safetensors")).unwrap();
        for (normalised_targets, mask_ratio, expected) in [(true, 0.75, 2.189_187), (false, 0.3, 2.093_542)] {
            let config = MaeConfig { normalised_targets, mask_ratio, ..of(&folder).unwrap() };
            let device = Device::flex();
            let model = fill(&folder, config.init(&device), &KEYS, &LoadOptions::default()).unwrap();
            let outputs = Runner { model, config }.forward(Inputs::new("mae", &inputs, &device)).unwrap();
            let (_, loss) = outputs.iter().find(|(name, _)| name == "loss").unwrap();
            let found = loss.iter::<f32>().next().unwrap();
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""architectures": ["ViTMAEModel"]"#, "`architectures`"),
            (r#""image_size": [224, 208]"#, "`image_size`"),
            (r#""image_size": 225"#, "`image_size`"),
            (r#""mask_ratio": 1.0"#, "`mask_ratio`"),
            (r#""mask_ratio": 0.999"#, "`mask_ratio`"),
            (r#""mask_ratio": -0.5"#, "`mask_ratio`"),
            (r#""decoder_num_attention_heads": 5"#, "`decoder_num_attention_heads`"),
        ] {
            let text = format!("{{{fields}}}");
            let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
            let message = MaeConfig::transformers(&config).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
