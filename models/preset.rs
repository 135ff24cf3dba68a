//! Published sizes as rows of data.

use burn::tensor::Device;
use volary_weights::{Parameter, Quantization, parameters};

/// A published size of a system.
pub struct Preset {
    /// The name its authors gave it; with a hub's owner where it has one.
    pub name: &'static str,
    /// Its configuration.
    pub shape: Shape,
    /// Where its weights are.
    pub weights: Weights,
    /// Under which license, as its authors state it.
    pub license: &'static str,
    /// Published parameter count; [`Preset::source`] says by whom.
    pub parameters: usize,
    /// Who published the count.
    pub source: &'static str,
}

/// The configuration of a preset: that of one of the systems.
pub enum Shape {
    /// [`crate::clip`]
    Clip(crate::clip::ClipConfig),
    /// [`crate::altclip`]
    AltClip(crate::altclip::AltClipConfig),
    /// [`crate::chinese_clip`]
    ChineseClip(crate::chinese_clip::ChineseClipConfig),
    /// [`crate::taiyi`]
    Taiyi(crate::taiyi::TaiyiConfig),
    /// [`crate::roberta_series`]
    RobertaSeries(crate::roberta_series::RobertaSeriesConfig),
    /// [`crate::bert`]
    Bert(crate::bert::BertConfig),
    /// [`crate::ernie`]
    Ernie(crate::ernie::ErnieConfig),
    /// [`crate::plato`]
    Plato(crate::plato::PlatoConfig),
    /// [`crate::plug`]
    Plug(crate::plug::PlugConfig),
    /// [`crate::ernie3`]
    Ernie3(crate::ernie3::Ernie3Config),
    /// [`crate::vit`]
    Vit(crate::vit::VitConfig),
    /// [`crate::beit`]
    Beit(crate::beit::BeitConfig),
    /// [`crate::eva`]
    Eva(crate::eva::EvaConfig),
    /// [`crate::eva_clip`]
    EvaClip(crate::eva_clip::EvaClipConfig),
    /// [`crate::mae`]
    Mae(crate::mae::MaeConfig),
    /// [`crate::painter`]
    Painter(&'static crate::painter::PainterConfig),
    /// [`crate::seggpt`]
    SegGpt(&'static crate::seggpt::SegGptConfig),
    /// [`crate::efficientnet`]
    EfficientNet(volary_vision::efficientnet::EfficientNetConfig),
    /// [`crate::align`]
    Align(crate::align::AlignConfig),
    /// [`crate::brivl`]
    Brivl(crate::brivl::BrivlConfig),
    /// [`crate::llama`]
    Llama(crate::llama::LlamaConfig),
    /// [`crate::glm`], [`crate::alm`]
    Glm(crate::glm::GlmConfig),
    /// [`crate::gpt2`], and [`crate::cpm`] and [`crate::yuan`], which have its shape.
    Gpt2(crate::gpt2::Gpt2Config),
    /// [`crate::pangu`]
    Pangu(crate::pangu::PanguConfig),
    /// [`crate::t5`], [`crate::cpm2`]
    T5(crate::t5::T5Config),
    /// [`crate::glm130b`]
    Glm130b(crate::glm130b::Glm130bConfig),
    /// [`crate::stable_diffusion`]
    StableDiffusion(&'static crate::stable_diffusion::StableDiffusionConfig),
    /// [`crate::unet`]
    UNet(volary_vision::unet::UNetConfig),
    /// [`crate::autoencoder`]
    AutoencoderKl(volary_vision::autoencoder::AutoencoderKlConfig),
    /// [`crate::vqmodel`]
    Vq(volary_vision::vq::VqConfig),
    /// [`crate::token_drawing`]
    TokenDrawing(&'static crate::token_drawing::TokenDrawingConfig),
    /// [`crate::mixtral`]
    Mixtral(crate::mixtral::MixtralConfig),
    /// [`crate::switch_transformers`]
    Switch(crate::switch_transformers::SwitchConfig),
    /// [`crate::m6`]
    M6(crate::m6::M6Config),
    /// [`crate::base_moe`]
    Cpm2Moe(crate::base_moe::Cpm2MoeConfig),
}

/// Where weights are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weights {
    /// In a repository of the Hugging Face hub, of the preset's own name.
    Hub,
    /// Posted in another place, which this says.
    Elsewhere(&'static str),
    /// Given by their authors to those who apply.
    Application,
    /// Inside this program.
    Embedded,
    /// Nowhere in public.
    Unreleased,
}

impl Weights {
    /// In a word or two, for lists.
    pub const fn told(self) -> &'static str {
        match self {
            Weights::Hub => "hub",
            Weights::Elsewhere(place) => place,
            Weights::Application => "by application",
            Weights::Embedded => "embedded",
            Weights::Unreleased => "never released",
        }
    }
}

/// The ends of the paths of what a model keeps and does not learn: running statistics of batch norms, queues.
const STATE: &[&str] = &[".running_mean", ".running_var", "_queue.entries", "_queue.next"];

/// How many numbers are learned; running statistics and queues are not.
pub fn count(parameters: &[Parameter]) -> usize {
    let is_learned = |path: &str| !STATE.iter().any(|end| path.ends_with(end));
    let learned = parameters.iter().filter(|parameter| is_learned(&parameter.path));
    learned.map(|parameter| parameter.shape.iter().product::<usize>()).sum()
}

/// The bytes of all parameters, running statistics included: floats of so many bytes, but matrices of linear layers and
/// embeddings packed if that is wanted.
pub fn bytes(parameters: &[Parameter], float: usize, packing: Option<Quantization>) -> usize {
    let of_one = |parameter: &Parameter| match (packing, &parameter.shape[..]) {
        (Some(quantization), &[rows, cols]) if parameter.can_pack && quantization.fits([rows, cols]) => {
            quantization.bytes([rows, cols])
        }
        (_, shape) => float * shape.iter().product::<usize>(),
    };
    parameters.iter().map(of_one).sum()
}

impl Shape {
    /// Counts the parameters without allocating them.
    pub fn count(&self) -> usize {
        count(&self.parameters())
    }

    /// Lists the parameters without allocating them.
    pub fn parameters(&self) -> Vec<Parameter> {
        let device = Device::flex();
        match self {
            Shape::Clip(config) => parameters(&config.init(&device)),
            Shape::AltClip(config) => parameters(&config.init(&device)),
            Shape::ChineseClip(config) => parameters(&config.init(&device)),
            Shape::Taiyi(config) => parameters(&config.init(&device)),
            Shape::RobertaSeries(config) => parameters(&config.init(&device)),
            Shape::Bert(config) => parameters(&config.init(&device)),
            Shape::Ernie(config) => parameters(&config.init(&device)),
            Shape::Plato(config) => parameters(&config.init(&device)),
            Shape::Plug(config) => parameters(&config.init(&device)),
            Shape::Ernie3(config) => parameters(&config.init(&device)),
            Shape::Vit(config) => parameters(&config.init(&device)),
            Shape::Beit(config) => parameters(&config.init(&device)),
            Shape::Eva(config) => parameters(&config.init(&device)),
            Shape::EvaClip(config) => parameters(&config.init(&device)),
            Shape::Mae(config) => parameters(&config.init(&device)),
            Shape::Painter(config) => parameters(&config.init(&device)),
            Shape::SegGpt(config) => parameters(&config.init(&device)),
            Shape::EfficientNet(config) => parameters(&config.init(&device)),
            Shape::Align(config) => parameters(&config.init(&device)),
            Shape::Brivl(config) => parameters(&config.init(&device)),
            Shape::Llama(config) => parameters(&config.init(&device)),
            Shape::Glm(config) => parameters(&config.init(&device)),
            Shape::Gpt2(config) => parameters(&config.init(&device)),
            Shape::Pangu(config) => parameters(&config.init(&device)),
            Shape::T5(config) => parameters(&config.init(&device)),
            Shape::Glm130b(config) => parameters(&config.init(&device)),
            Shape::StableDiffusion(config) => parameters(&config.init(&device)),
            Shape::UNet(config) => parameters(&config.init(&device)),
            Shape::AutoencoderKl(config) => parameters(&config.init(&device)),
            Shape::Vq(config) => parameters(&config.init(&device)),
            Shape::TokenDrawing(config) => parameters(&config.init(&device)),
            Shape::Mixtral(config) => parameters(&config.init(&device)),
            Shape::Switch(config) => parameters(&config.init(&device)),
            Shape::M6(config) => parameters(&config.init(&device)),
            Shape::Cpm2Moe(config) => parameters(&config.init(&device)),
        }
    }
}
