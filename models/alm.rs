//! ALM 1.0: a [GLM](crate::glm) of BAAI for Arabic, trained on ArabicText 2022
//! (<https://github.com/FlagAI-Open/FlagAI>, `examples/ALM`).
//!
//! FlagAI's `ALMModel` is its `GLMModel` under another name: the same blocks, positions, masks and files. Its authors say
//! 335M parameters, which is GLM-Large; the size of its vocabulary they do not say, and a folder's own `config.json`
//! decides. BAAI's model hub has the weights as `ALM-1.0`; `model_type` `alm` in the configuration marks a folder of it.
//!
//! ```sh
//! volary forward path/to/ALM-1.0 --input in.safetensors --output out.safetensors
//! ```

use crate::glm;
use crate::preset::{Preset, Shape, Weights};
use crate::registry::System;

/// ALM as the registry knows it.
pub const SYSTEM: System = System {
    name: "alm",
    about: "the Arabic language model ALM 1.0, a GLM",
    file: "models/alm.rs",
    tasks: &["fill", "generate", "forward"],
    proved: &["glm"],
    presets: PRESETS,
    recognises: |_, config| {
        config.is_some_and(|config| glm::is_glm(config) && config.text("model_type") == Some("alm"))
    },
    checkpoint: glm::weights,
    describe: glm::describe_folder,
    open: |folder, options, device| Ok(Box::new(glm::Runner::load(folder, options, device)?)),
    generator: Some(glm::generator),
};

/// Published sizes.
pub const PRESETS: &[Preset] = &[Preset {
    name: "ALM-1.0",
    shape: Shape::Glm(glm::LARGE),
    weights: Weights::Elsewhere("model.baai.ac.cn"),
    license: "Apache-2.0",
    parameters: 334_688_256,
    source: "GLM-Large, as its authors' 335M",
}];
