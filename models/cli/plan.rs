//! `volary plan`

use anyhow::Result;
use burn::tensor::FloatDType;
use clap::Args;
use serde::Serialize;
use volary::plan::{Device, Layout, Outline, Plan, PlanError};
use volary::registry::preset;

use super::{Shared, Usage, say, say_json};

/// What the numbers mean, for `--help`.
const MEANING: &str = "\
There are D x E x T x P devices. What is no expert has D x E copies, an expert has D. Each of D x E replicas has
n = B x S / (D x E) tokens; every matrix of a replica is divided among T devices, and its blocks among P stages.

memory       weights and gradients of the dtype, Adam's states in f32 (8 or, of half precision, 12 bytes a weight),
             activations of n tokens, all that is kept for the backward pass, without recomputation
operations   6 for each product of a weight with a token, and of queries, keys and values: forward and backward
to experts   2 n k d w (E-1)/E bytes of a block with experts whose loads are even: k choices, width d, w bytes of a number;
             as many backward
gradients    rings: 2 (r-1)/r of their bytes, r = D x E, of experts D
tensor       rings over T: n d w of each attention and MLP, n k d w of experts, forward and backward
stages       n d w to the next, and back; inside a decoder twice as much

All formulas: the documentation of volary::plan.";

/// Arguments of `plan`.
#[derive(Args)]
#[command(after_help = MEANING)]
pub struct Arguments {
    /// A preset, or a folder with a configuration: LLaMA's shape, T5, Mixtral, Switch Transformers; of presets also M6 and CPM-2-MoE.
    name: String,
    /// D: groups that have all experts.
    #[arg(long, default_value_t = 1)]
    data: u64,
    /// T: devices that share every matrix.
    #[arg(long, default_value_t = 1)]
    tensor: u64,
    /// E: devices that the experts of a block are dealt out to.
    #[arg(long, default_value_t = 1)]
    expert: u64,
    /// P: stages that the blocks are dealt out to.
    #[arg(long, default_value_t = 1)]
    pipeline: u64,
    /// B: sequences of a step, on all devices.
    #[arg(long)]
    batch: u64,
    /// S: tokens of each; an encoder reads and a decoder writes as many.
    #[arg(long)]
    sequence: u64,
}

#[derive(Serialize)]
struct Told<'a> {
    name: &'a str,
    #[serde(flatten)]
    plan: &'a Plan,
    fullest: Option<&'a Device>,
}

/// Runs the command.
pub fn run(arguments: Arguments, shared: &Shared) -> Result<()> {
    let Arguments { name, data, tensor, expert, pipeline, batch, sequence } = arguments;
    let bytes = match shared.written_dtype()? {
        None | Some(FloatDType::F32) => 4,
        Some(_) => 2,
    };
    let outline = match preset(&name) {
        Some((system, preset)) => Outline::of(&preset.shape)
            .ok_or_else(|| PlanError::NoOutline { name: name.clone(), system: system.name.into() })?,
        None => Outline::of_folder(&shared.folder(&name)?)?,
    };
    let plan = match outline.plan(&Layout { data, tensor, expert, pipeline, batch, sequence, bytes }) {
        Err(error @ PlanError::Layout { .. }) => return Err(Usage(error.to_string()).into()),
        plan => plan?,
    };
    if shared.json {
        return say_json(&[Told { name: &name, plan: &plan, fullest: plan.fullest() }]);
    }
    say(format!("{name}, weights and activations of {bytes} bytes"))?;
    say(plan.table())
}
