//! Low-rank changes of weights, added as the weights are read (LoRA, Hu et al. 2021, <https://arxiv.org/abs/2106.09685>):
//! `W + weight * alpha / rank * up down`, of matrices and of convolutions.
//!
//! Two namings are read: that of kohya's scripts (`lora_unet_down_blocks_0_..._to_q.lora_down.weight`, with an `alpha`), and
//! that of diffusers and peft (`unet.down_blocks.0....to_q.lora_A.weight`, and those before it: `lora.down`,
//! `lora_linear_layer.down`, `processor.to_q_lora.down`). Both name a weight by its key, so that one table of the keys that
//! there are serves both.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use burn::tensor::TensorData;
use volary_weights::format::low_rank::{LowRank, WithLowRank};
use volary_weights::{Checkpoint, KeyMap, read_tensors};

use crate::error::Error;

/// A file of changes.
#[derive(Clone, Debug)]
pub struct Lora {
    file: PathBuf,
    weight: f64,
    /// By what they change, as [`plain`] spells it.
    changes: BTreeMap<String, Change>,
}

/// The tensors of a change.
#[derive(Clone, Debug, Default)]
struct Change {
    down: Option<TensorData>,
    up: Option<TensorData>,
    alpha: Option<f64>,
}

/// A part of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Down,
    Up,
    Alpha,
}

/// How the names of a change's parts end.
const ENDS: &[(&str, Part)] = &[
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".alpha", Part::Alpha),
];

/// The parts of a pipeline that may be changed, as diffusers names them.
const PARTS: [&str; 3] = ["text_encoder", "unet", "vae"];

/// How the names begin, and the part of a pipeline that is meant.
const BEGINNINGS: &[(&str, &str)] = &[
    ("base_model.model.", ""),
    ("lora_unet_", "unet_"),
    ("lora_te_", "text_encoder_"),
    ("lora_te1_", "text_encoder_"),
    ("unet.", "unet_"),
    ("text_encoder.", "text_encoder_"),
];

impl Lora {
    /// Reads a file of changes that count `weight` times.
    ///
    /// # Errors
    /// If it cannot be read, or holds what is no change.
    pub fn open(file: &Path, weight: f64) -> Result<Self, Error> {
        let mut changes: BTreeMap<String, Change> = BTreeMap::new();
        let mut unknown = Vec::new();
        for (name, data) in read_tensors(file)? {
            let Some((stem, part)) =
                ENDS.iter().find_map(|(end, part)| Some((name.strip_suffix(end)?, *part)))
            else {
                unknown.push(name);
                continue;
            };
            let change = changes.entry(plain(stem)).or_default();
            match part {
                Part::Down => change.down = Some(data),
                Part::Up => change.up = Some(data),
                Part::Alpha => change.alpha = data.iter::<f64>().next(),
            }
        }
        let lora = Self { file: file.into(), weight, changes };
        match (unknown.is_empty(), lora.changes.is_empty()) {
            (true, false) => Ok(lora),
            (true, true) => Err(lora.wrong("no low-rank changes".into())),
            (false, _) => Err(lora.wrong(format!("not names of low-rank changes: {}", listed(&unknown)))),
        }
    }

    fn wrong(&self, problem: String) -> Error {
        Error::Data { file: self.file.clone(), problem }
    }
}

/// A name with all dots as underscores, and the part of the pipeline in front: what both namings come down to.
fn plain(stem: &str) -> String {
    let mut name = stem.to_owned();
    for (beginning, stands_for) in BEGINNINGS {
        if let Some(rest) = name.strip_prefix(beginning) {
            name = format!("{stands_for}{rest}");
        }
    }
    name.replace('.', "_").replace("_processor_", "_")
}

fn listed(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let more = names.len().saturating_sub(SHOWN);
    let shown = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{shown} and {more} more") } else { shown }
}

/// The checkpoints of text encoder, U-Net and autoencoder with all changes. Their keys follow the maps `stored`; the changes
/// go by what the maps `named` call them.
///
/// # Errors
/// With everything that changes no weight that is there, or does not fit it.
pub fn apply(
    loras: &[Lora],
    checkpoints: [Box<dyn Checkpoint>; 3],
    stored: [&KeyMap; 3],
    named: [&KeyMap; 3],
) -> Result<[Box<dyn Checkpoint>; 3], Error> {
    if loras.is_empty() {
        return Ok(checkpoints);
    }
    // what a change may be called, and the part and the key that it changes
    let mut keys: HashMap<String, (usize, String, Vec<usize>)> = HashMap::new();
    for (at, (part, checkpoint)) in PARTS.into_iter().zip(&checkpoints).enumerate() {
        let entries = checkpoint.entries();
        let found: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
        for (entry, name) in entries.iter().zip(stored[at].translated(&found, named[at])?) {
            let Some(stem) = name.as_ref().and_then(|name| name.strip_suffix(".weight")) else { continue };
            let name = format!("{part}_{}", stem.replace('.', "_"));
            let target = (at, entry.name.clone(), entry.shape.clone());
            // once called without the number of the only layer
            if let Some(short) = name.strip_suffix("_to_out_0") {
                keys.insert(format!("{short}_to_out"), target.clone());
            }
            keys.insert(name, target);
        }
    }
    let mut changes: [HashMap<String, Vec<LowRank>>; 3] = Default::default();
    for lora in loras {
        let (mut unknown, mut unfit) = (Vec::new(), Vec::new());
        for (name, change) in &lora.changes {
            let Some((at, key, shape)) = keys.get(name) else {
                unknown.push(name.clone());
                continue;
            };
            match change.low_rank(lora.weight).filter(|change| change.fits(shape)) {
                Some(change) => changes[*at].entry(key.clone()).or_default().push(change),
                None => unfit.push(name.clone()),
            }
        }
        if !unknown.is_empty() {
            return Err(lora.wrong(format!("no weights here are changed by {}", listed(&unknown))));
        }
        if !unfit.is_empty() {
            return Err(lora.wrong(format!("these do not fit the weights they change: {}", listed(&unfit))));
        }
    }
    let changed = |checkpoint, changes| -> Result<Box<dyn Checkpoint>, Error> {
        Ok(Box::new(WithLowRank::new(checkpoint, changes)?))
    };
    let ([text, unet, vae], [of_text, of_unet, of_vae]) = (checkpoints, changes);
    Ok([changed(text, of_text)?, changed(unet, of_unet)?, changed(vae, of_vae)?])
}

impl Change {
    /// The change, if it is whole.
    fn low_rank(&self, weight: f64) -> Option<LowRank> {
        let (down, up) = (self.down.as_ref()?, self.up.as_ref()?);
        let rank = *down.shape().as_slice().first()?;
        let values = |data: &TensorData| data.clone().convert::<f32>().iter::<f32>().collect::<Vec<_>>();
        let alpha = self.alpha.unwrap_or(rank as f64);
        let scale = (weight * alpha / rank as f64) as f32;
        Some(LowRank { up: values(up), down: values(down), rank, scale }).filter(|_| scale.is_finite())
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn all_namings_come_down_to_one() {
        let expected = "unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q";
        for name in [
            "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "base_model.model.unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
            "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q",
        ] {
            assert_eq!(plain(name), expected, "{name}");
        }
        assert_eq!(
            plain("lora_te_text_model_encoder_layers_3_mlp_fc1"),
            "text_encoder_text_model_encoder_layers_3_mlp_fc1"
        );
    }
}
