//! `volary plan`

use anyhow::Result;
use burn::tensor::FloatDType;
use clap::Args;
use serde::Serialize;
use volary::plan::{Device, Layout, Outline, Plan, PlanError};
use volary::registry::preset;

use super::{Shared, Usage, say, say_json};

/// Arguments of `plan`.
///
/// There are data x expert x tensor x pipeline devices. Each of data x expert replicas has an equal part of the batch; a
/// block's experts are dealt out to the devices of a group, every matrix of a replica to tensor devices, and blocks to stages.
/// Loads are taken as even; activations are kept without recomputation; the optimizer is Adam with states in f32. The formulas are
/// in the documentation of `volary::plan`.
#[derive(Args)]
pub struct Arguments {
    /// A preset, or a folder with a configuration: LLaMA's shape, T5, Mixtral, Switch Transformers; of presets also M6 and CPM-2-MoE.
    name: String,
    /// Groups that have all experts.
    #[arg(long, default_value_t = 1)]
    data: u64,
    /// Devices that share every matrix.
    #[arg(long, default_value_t = 1)]
    tensor: u64,
    /// Devices that the experts of a block are dealt out to.
    #[arg(long, default_value_t = 1)]
    expert: u64,
    /// Stages that the blocks are dealt out to.
    #[arg(long, default_value_t = 1)]
    pipeline: u64,
    /// Sequences of a step, on all devices.
    #[arg(long)]
    batch: u64,
    /// Tokens of each; an encoder reads and a decoder writes as many.
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
