//! `config.json` -> system.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Device, TensorData};
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Parameter, Problem, check, load, parameters};

use crate::config::Config;
use crate::error::Error;
use crate::folder::Folder;
use crate::generator::Generator;
use crate::preset::Preset;
use crate::tensors::{Inputs, Outputs};
use crate::two_tower::TwoTower;
use crate::{
    align, alm, altclip, aquila, autoencoder, base_moe, beit, bert, brivl, chinese_clip, clip, consert, cpm,
    cpm2, efficientnet, ernie, ernie3, eva, eva_clip, fastmoe, glm, glm130b, gpt2, llama, m6, mae, mixtral,
    painter, pangu, plato, plug, roberta_series, scheduler, seggpt, stable_diffusion, switch_transformers,
    t5, taiyi, token_drawing, unet, vit, vqmodel, yuan,
};

/// What the zoo says of one system.
pub struct System {
    /// Its short name.
    pub name: &'static str,
    /// What it is, in a sentence.
    pub about: &'static str,
    /// Where the code is.
    pub file: &'static str,
    /// What it is good for.
    pub tasks: &'static [&'static str],
    /// The fixtures under `tests/fixtures` whose reference it agrees with.
    pub proved: &'static [&'static str],
    /// Its published sizes.
    pub presets: &'static [Preset],
    /// Whether a folder holds this system. Called with the folder and its first configuration file, if any.
    pub recognises: fn(&Folder, Option<&Config>) -> bool,
    /// The folder's weights: of ranks merged, of scaled whole numbers what they stand for.
    pub checkpoint: fn(&Folder) -> Result<Box<dyn Checkpoint>, Error>,
    /// What loading the folder would do, without reading a weight.
    pub describe: fn(&Folder) -> Result<Description, Error>,
    /// Loads the folder for a forward pass.
    pub open: Open,
    /// Loads the folder for writing text, if the system does.
    pub generator: Option<OpenGenerator>,
}

/// Loads a folder's model onto a device.
pub type Open = fn(&Folder, &LoadOptions, &Device) -> Result<Box<dyn Forward>, Error>;

/// Loads a folder's model onto a device for writing text.
pub type OpenGenerator = fn(&Folder, &LoadOptions, &Device) -> Result<Box<dyn Generator>, Error>;

/// The preset of this name, and its system.
pub fn preset(name: &str) -> Option<(&'static System, &'static Preset)> {
    let of = |system: &'static System| system.presets.iter().map(move |preset| (system, preset));
    SYSTEMS.iter().flat_map(of).find(|(_, preset)| preset.name == name)
}

/// A loaded model behind the forward contract.
pub trait Forward {
    /// Inputs and outputs by the reference implementation's names.
    ///
    /// # Errors
    /// If the inputs do not fit.
    fn forward(&self, inputs: Inputs) -> Result<Outputs, Error>;

    /// Its two towers, if pictures and texts meet in it.
    fn into_towers(self: Box<Self>) -> Option<Box<dyn TwoTower>> {
        None
    }
}

/// What `volary info` shows of a folder.
pub struct Description {
    /// Every parameter.
    pub parameters: Vec<Parameter>,
    /// What does not fit between the weights and the model.
    pub problems: Vec<Problem>,
    /// How many tensors the weights hold of each dtype.
    pub dtypes: BTreeMap<&'static str, usize>,
    /// How values are packed, if they are.
    pub quantization: Option<String>,
}

/// Every system, in the order of the list.
pub const SYSTEMS: &[System] = &[
    clip::SYSTEM,
    altclip::SYSTEM,
    chinese_clip::SYSTEM,
    taiyi::SYSTEM, // before BERT, as the next two
    roberta_series::SYSTEM,
    consert::SYSTEM, // before its trunk
    bert::SYSTEM,
    vit::SYSTEM, // before EVA, one of whose sizes it is
    beit::SYSTEM,
    mae::SYSTEM,
    painter::SYSTEM,
    seggpt::SYSTEM,
    llama::SYSTEM,
    aquila::SYSTEM,
    mixtral::SYSTEM,
    glm::SYSTEM,
    alm::SYSTEM,
    glm130b::SYSTEM,
    ernie::SYSTEM,
    ernie3::SYSTEM,
    plato::SYSTEM,
    plug::SYSTEM,
    gpt2::SYSTEM,
    cpm::SYSTEM,
    yuan::SYSTEM,
    pangu::SYSTEM,
    t5::SYSTEM,
    switch_transformers::SYSTEM,
    cpm2::SYSTEM,
    eva::SYSTEM,
    eva_clip::SYSTEM,
    efficientnet::SYSTEM,
    align::SYSTEM,
    brivl::SYSTEM,
    unet::SYSTEM,
    autoencoder::SYSTEM,
    vqmodel::SYSTEM,
    token_drawing::SYSTEM,
    scheduler::SYSTEM,
    stable_diffusion::SYSTEM,
    fastmoe::SYSTEM,
    base_moe::SYSTEM,
    m6::SYSTEM,
];

/// The configuration files that are looked for, in this order.
pub const CONFIGS: &[&str] =
    &["open_clip_config.json", "config.json", "params.json", stable_diffusion::INDEX];

impl System {
    /// The system of a folder.
    ///
    /// # Errors
    /// If it has no configuration, or one of no system here.
    pub fn of(folder: &Folder) -> Result<&'static System, Error> {
        if let Folder::Disk(path) | Folder::Variant { path, .. } = folder
            && !path.exists()
        {
            return Err(Error::io(path)(std::io::ErrorKind::NotFound.into()));
        }
        let config = first_config(folder)?;
        if let Some(system) = SYSTEMS.iter().find(|system| (system.recognises)(folder, config.as_ref())) {
            return Ok(system);
        }
        let Some(config) = config else {
            return Err(Error::NoConfig { folder: folder.path().into(), looked_for: CONFIGS });
        };
        let found = ["model_type", "architecture", "_class_name"]
            .iter()
            .find_map(|field| config.text(field).map(|value| format!("{field} `{value}`")));
        Err(Error::UnknownSystem {
            file: config.file().into(),
            found: found.unwrap_or_else(|| "a configuration without `model_type` or `architecture`".into()),
            known: SYSTEMS.iter().map(|system| system.name.to_owned()).collect(),
        })
    }

    /// The system of that name.
    pub fn named(name: &str) -> Option<&'static System> {
        SYSTEMS.iter().find(|system| system.name == name)
    }
}

/// The first configuration file of a folder, if it has one.
///
/// # Errors
/// If it is malformed.
pub fn first_config(folder: &Folder) -> Result<Option<Config>, Error> {
    CONFIGS.iter().find(|name| folder.has(name)).map(|name| folder.config(name)).transpose()
}

impl Description {
    /// Of models that together are one, by their names in it.
    pub fn of_parts<const N: usize>(parts: [(&str, Self); N]) -> Self {
        let mut all = Self {
            parameters: Vec::new(),
            problems: Vec::new(),
            dtypes: BTreeMap::new(),
            quantization: None,
        };
        for (name, part) in parts {
            all.parameters.extend(part.parameters.into_iter().map(|mut parameter| {
                parameter.path = format!("{name}.{}", parameter.path);
                parameter
            }));
            all.problems.extend(part.problems);
            for (dtype, count) in part.dtypes {
                *all.dtypes.entry(dtype).or_default() += count;
            }
        }
        all
    }
}

/// What `model` and the folder's weights have to do with each other.
///
/// # Errors
/// If the weights cannot be opened.
pub fn describe<M: Module>(folder: &Folder, model: &M, keys: &KeyMap) -> Result<Description, Error> {
    describe_with(folder.checkpoint()?.as_ref(), model, keys)
}

/// What `model` and a checkpoint have to do with each other.
///
/// # Errors
/// If a rule of the key map cannot be followed.
pub fn describe_with<M: Module>(
    checkpoint: &dyn Checkpoint,
    model: &M,
    keys: &KeyMap,
) -> Result<Description, Error> {
    let problems = check(model, checkpoint, keys, &LoadOptions::default())?;
    let mut dtypes = BTreeMap::new();
    for entry in checkpoint.entries() {
        *dtypes.entry(entry.dtype.name()).or_default() += 1;
    }
    let quantization = checkpoint.quantization().map(|quantization| quantization.to_string());
    Ok(Description { parameters: parameters(model), problems, dtypes, quantization })
}

/// Fills `model` with the folder's weights.
///
/// # Errors
/// If they cannot be opened or do not fit.
pub fn fill<M: Module>(folder: &Folder, model: M, keys: &KeyMap, options: &LoadOptions) -> Result<M, Error> {
    Ok(load(model, folder.checkpoint()?.as_ref(), keys, options)?)
}

/// Loads a folder and runs it once.
///
/// # Errors
/// If the folder cannot be loaded or the inputs do not fit.
pub fn forward(
    folder: &Folder,
    tensors: &BTreeMap<String, TensorData>,
    options: &LoadOptions,
    device: &Device,
) -> Result<Outputs, Error> {
    let system = System::of(folder)?;
    let model = (system.open)(folder, options, device)?;
    model.forward(Inputs::new(system.name, tensors, device))
}
