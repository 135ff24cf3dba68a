//! FastMoE: layers of mixtures of experts (He et al. 2021, <https://arxiv.org/abs/2103.13262>), with which WuDao 2.0 was
//! trained. A folder holds one layer, `FMoETransformerMLP`, with any of the library's gates, or a `SwipeGate` alone.
//!
//! The numbers match `laekov/fastmoe` on one worker; a gate alone, on several. Its kernels prune by the order in which
//! threads come; here the first tokens are served. Experts are read one by one, as the library keeps those of a class of
//! their own, or in one tensor; in one file, or in those of its workers, as it saves under Megatron-LM:
//!
//! ```text
//! layer/config.json                                        the whole layer's
//! layer/mp_rank_00/model_optim_rng.pt                      the gate, and the first worker's experts
//! layer/mp_rank_00_dp_rank_0001/model_optim_rng.pt         the second's, and so on
//! ```
//!
//! ```sh
//! volary forward path/to/layer --input in.safetensors --output out.safetensors
//! ```

use burn::tensor::{Device, Tensor, TensorData};
use volary_kernels::moe::gate::{
    DcGate, GShardGate, NaiveGate, NoisyGate, Swipe, SwipeGate, SwitchGate, ZeroGate, swipe,
};
use volary_kernels::moe::{Gate, Moe, MoeConfig, Noise, Phase, Routing};
use volary_kernels::ops::Activation;
use volary_weights::experts::open_workers;
use volary_weights::{Checkpoint, KeyMap, LoadOptions, Ones, Rule, load};

use Rule::{Rename, Stack, StackTranspose, Transpose, Under};

use crate::config::{Config, ConfigError};
use crate::error::Error;
use crate::folder::Folder;
use crate::registry::{Description, Forward, System, describe_with};
use crate::tensors::{Inputs, Outputs, output};

/// A layer.
#[derive(Clone, Debug, PartialEq)]
pub struct FastMoeConfig {
    /// The gate.
    pub gate: GateKind,
    /// Number of experts of all workers.
    pub n_experts: usize,
    /// Number of workers, each with an equal share of tokens and experts.
    pub n_workers: usize,
    /// How many experts a token goes to.
    pub top_k: usize,
    /// Width of input and output.
    pub d_model: usize,
    /// Width between an expert's projections; none of a gate alone.
    pub d_ff: Option<usize>,
    /// The experts' activation.
    pub activation: Activation,
    /// Capacities in training and at evaluation, for gates that have one.
    pub rates: [f64; 2],
    /// Of what a [`GateKind::Switch`] adds in training.
    pub jitter: f64,
}

/// The library's gates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GateKind {
    /// [`NaiveGate`]
    Naive,
    /// [`NoisyGate`]
    Noisy,
    /// [`GShardGate`]
    GShard,
    /// [`SwitchGate`]
    Switch,
    /// [`SwipeGate`]
    Swipe,
    /// [`DcGate`]
    Dc,
    /// [`ZeroGate`]
    Zero,
}

impl GateKind {
    /// By the names of the library's classes.
    const NAMES: &[(&'static str, Self)] = &[
        ("NaiveGate", Self::Naive),
        ("NoisyGate", Self::Noisy),
        ("GShardGate", Self::GShard),
        ("SwitchGate", Self::Switch),
        ("SwipeGate", Self::Swipe),
        ("DCGate", Self::Dc),
        ("ZeroGate", Self::Zero),
    ];

    /// How many choices a gate has that allows but one number of them.
    const fn choices(self) -> Option<usize> {
        match self {
            Self::GShard | Self::Dc => Some(2),
            Self::Switch => Some(1),
            Self::Naive | Self::Noisy | Self::Swipe | Self::Zero => None,
        }
    }
}

/// The library's own capacities.
const RATES: [f64; 2] = [1.2, 2.4];

/// So many experts are one layer's at most; M6-10T has 10,240.
const MOST_EXPERTS: usize = 65_536;

/// A number of experts that is not absurd.
///
/// # Errors
/// If it is missing, or something else.
pub(crate) fn experts(config: &Config, field: &str) -> Result<usize, ConfigError> {
    match config.size(field)? {
        count if count <= MOST_EXPERTS => Ok(count),
        _ => Err(config.error(field, &format!("at most {MOST_EXPERTS} experts"))),
    }
}

impl FastMoeConfig {
    /// Of a `config.json` with the library's argument names.
    ///
    /// # Errors
    /// If it is malformed, or asks for what is not built.
    pub fn parse(config: &Config) -> Result<Self, ConfigError> {
        let named = config.text("gate");
        let kind = GateKind::NAMES.iter().find(|(name, _)| Some(*name) == named);
        let Some(&(_, gate)) = kind else {
            let names: Vec<&str> = GateKind::NAMES.iter().map(|(name, _)| *name).collect();
            return Err(config.error("gate", &names.join(", ")));
        };
        let d_ff = config.has("d_hidden").then(|| config.size("d_hidden")).transpose()?;
        let n_workers = config.size_or("world_size", 1)?;
        if d_ff.is_some() && n_workers != 1 {
            return Err(config.error("world_size", "1 (a layer of several workers is not built)"));
        }
        if d_ff.is_none() && gate != GateKind::Swipe {
            return Err(config.error("d_hidden", "a width (only a SwipeGate stands alone)"));
        }
        let local = experts(config, "num_expert")?;
        let Some(n_experts) = local.checked_mul(n_workers).filter(|&count| count <= MOST_EXPERTS) else {
            return Err(config.error("world_size", &format!("at most {MOST_EXPERTS} experts in all")));
        };
        let top_k = config.size_or("top_k", gate.choices().unwrap_or(2))?;
        if gate.choices().is_some_and(|choices| choices != top_k) {
            return Err(config.error("top_k", "2 of a GShardGate or DCGate, 1 of a SwitchGate"));
        }
        if top_k > n_experts {
            return Err(config.error("top_k", &format!("at most {n_experts}, the number of experts")));
        }
        let rates = match config.numbers("capacity").as_deref() {
            None if !config.has("capacity") => RATES,
            Some([]) => RATES,
            Some(&[train, eval]) if train >= 0.0 && eval >= 0.0 => [train, eval],
            _ => return Err(config.error("capacity", "two numbers, none below 0")),
        };
        Ok(Self {
            gate,
            n_experts,
            n_workers,
            top_k,
            d_model: config.size("d_model")?,
            d_ff,
            activation: config.activation_or("activation", Activation::Gelu)?,
            rates,
            jitter: config.number_or("switch_eps", 0.1)?,
        })
    }

    /// An untrained layer, with experts of `d_ff`. Nothing is allocated before first use.
    pub fn init(&self, d_ff: usize, device: &Device) -> Moe {
        let Self { n_experts, n_workers, top_k, d_model, rates, .. } = *self;
        let gate = match self.gate {
            GateKind::Naive => Gate::Naive(NaiveGate::new(d_model, n_experts, top_k, device)),
            GateKind::Noisy => Gate::Noisy(NoisyGate::new(d_model, n_experts, top_k, device)),
            GateKind::GShard => {
                Gate::GShard(GShardGate { rates, n_workers, ..GShardGate::new(d_model, n_experts, device) })
            }
            GateKind::Switch => {
                let jitter = self.jitter;
                Gate::Switch(SwitchGate { rates, jitter, ..SwitchGate::new(d_model, n_experts, device) })
            }
            GateKind::Swipe => Gate::Swipe(self.init_swipe(device)),
            GateKind::Dc => Gate::Dc(DcGate { rates, n_workers, ..DcGate::new(d_model, n_experts, device) }),
            GateKind::Zero => Gate::Zero(ZeroGate { n_experts, top_k }),
        };
        MoeConfig::new(n_experts, d_model, d_ff).init(gate, self.activation, device)
    }

    /// An untrained gate alone.
    pub fn init_swipe(&self, device: &Device) -> SwipeGate {
        let gate = SwipeGate::new(self.d_model, self.n_experts, self.top_k, device);
        SwipeGate { n_workers: self.n_workers, ..gate }
    }

    /// The key map of a layer with this gate.
    pub const fn keys(&self) -> &'static KeyMap {
        match self.gate {
            GateKind::Naive => &NAIVE,
            GateKind::Noisy => &NOISY,
            GateKind::GShard => &GSHARD,
            GateKind::Switch => &SWITCH,
            GateKind::Swipe => &SWIPE,
            GateKind::Dc => &DC,
            GateKind::Zero => &ZERO,
        }
    }
}

const LINEAR: &[Rule] = &[Rename("weight", "weight"), Rename("bias", "bias")];
const EXPERTS: &[Rule] = &[
    StackTranspose("experts.{}.htoh4.weight", "experts.Plain.up.weight", Ones::Before(1)),
    Stack("experts.{}.htoh4.bias", "experts.Plain.up.bias", Ones::Before(1)),
    StackTranspose("experts.{}.h4toh.weight", "experts.Plain.down.weight", Ones::Before(1)),
    Stack("experts.{}.h4toh.bias", "experts.Plain.down.bias", Ones::Before(1)),
    Transpose("experts.htoh4.weight", "experts.Plain.up.weight"),
    Rename("experts.htoh4.bias", "experts.Plain.up.bias"),
    Transpose("experts.h4toh.weight", "experts.Plain.down.weight"),
    Rename("experts.h4toh.bias", "experts.Plain.down.bias"),
];
const NAIVE: KeyMap = KeyMap::new(&[Under("gate.gate.", "gate.Naive.gate.", LINEAR), Under("", "", EXPERTS)]);
const NOISY: KeyMap = KeyMap::new(&[
    Rename("gate.w_gate", "gate.Noisy.gate"),
    Rename("gate.w_noise", "gate.Noisy.noise"),
    Under("", "", EXPERTS),
]);
const GSHARD: KeyMap =
    KeyMap::new(&[Under("gate.gate.", "gate.GShard.gate.", LINEAR), Under("", "", EXPERTS)]);
const SWITCH: KeyMap =
    KeyMap::new(&[Under("gate.gate.", "gate.Switch.gate.", LINEAR), Under("", "", EXPERTS)]);
const SWIPE: KeyMap = KeyMap::new(&[Under("gate.gate.", "gate.Swipe.gate.", LINEAR), Under("", "", EXPERTS)]);
const DC: KeyMap = KeyMap::new(&[Under("gate.gate.", "gate.Dc.gate.", LINEAR), Under("", "", EXPERTS)]);
const ZERO: KeyMap = KeyMap::new(EXPERTS);
/// Of a gate alone.
const ALONE: KeyMap = KeyMap::new(&[Under("gate.", "gate.", LINEAR)]);

pub(crate) fn read(folder: &Folder) -> Result<FastMoeConfig, Error> {
    Ok(FastMoeConfig::parse(&folder.config("config.json")?)?)
}

/// The weights of a folder, those of all workers merged.
fn checkpoint(folder: &Folder, config: &FastMoeConfig) -> Result<Box<dyn Checkpoint>, Error> {
    if let Folder::Disk(path) = folder
        && let Some(merged) = open_workers(path, config.keys())?
    {
        return Ok(merged);
    }
    folder.checkpoint()
}

/// FastMoE as the registry knows it.
pub const SYSTEM: System = System {
    name: "fastmoe",
    about: "layers of FastMoE: mixtures of experts behind any of its gates",
    file: "models/fastmoe.rs",
    tasks: &["forward"],
    proved: &[
        "fastmoe_gshard",
        "fastmoe_naive",
        "fastmoe_noisy",
        "fastmoe_swipe",
        "fastmoe_swipe_workers",
        "fastmoe_switch",
    ],
    presets: &[],
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("fastmoe_moe")),
    checkpoint: |folder| checkpoint(folder, &read(folder)?),
    describe: |folder| -> Result<Description, Error> {
        let (config, device) = (read(folder)?, Device::flex());
        let checkpoint = checkpoint(folder, &config)?;
        match config.d_ff {
            Some(d_ff) => describe_with(checkpoint.as_ref(), &config.init(d_ff, &device), config.keys()),
            None => describe_with(checkpoint.as_ref(), &config.init_swipe(&device), &ALONE),
        }
    },
    open: |folder, options, device| open(folder, options, device),
    generator: None,
};

fn open(folder: &Folder, options: &LoadOptions, device: &Device) -> Result<Box<dyn Forward>, Error> {
    let config = read(folder)?;
    let checkpoint = checkpoint(folder, &config)?;
    Ok(match config.d_ff {
        Some(d_ff) => {
            let layer = load(config.init(d_ff, device), checkpoint.as_ref(), config.keys(), options)?;
            Box::new(Runner { layer, config })
        }
        None => {
            let gate = load(config.init_swipe(device), checkpoint.as_ref(), &ALONE, options)?;
            Box::new(GateRunner { gate, config })
        }
    })
}

/// A layer behind the forward contract.
struct Runner {
    layer: Moe,
    config: FastMoeConfig,
}

/// The random numbers of the reference, by what the gate draws, and how many for each token.
const NOISES: [&str; 3] = ["normal_noise", "uniform_noise_0_1", "routing_uniform_0_1"];

impl Forward for Runner {
    /// `x`, `[tokens, d_model]`; and the random numbers that the gate would draw, which are the same every time where they
    /// are not given: `normal_noise` `[tokens, num_expert]` of a NoisyGate, `uniform_noise_0_1` of the same shape of a
    /// SwitchGate, `routing_uniform_0_1` `[tokens]` of a GShardGate or DCGate.
    ///
    /// Gives for `train.` and for `eval.`: `y`, `gate_idx` (-1 is dropped), `gate_score`, `dropped`, and `balance_loss` if
    /// the gate has one in that phase; that of a NaiveGate is 0.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let FastMoeConfig { d_model, n_experts, gate, .. } = self.config;
        let x = inputs.float::<2>("x");
        inputs.missing("x");
        let [normal, uniform, routing] = NOISES;
        let given = match gate {
            GateKind::Noisy => inputs.float::<2>(normal).map(|drawn| (normal, n_experts, drawn)),
            GateKind::Switch => inputs.float::<2>(uniform).map(|drawn| (uniform, n_experts, drawn)),
            GateKind::GShard | GateKind::Dc => {
                inputs.float::<1>(routing).map(|drawn| (routing, 1, drawn.unsqueeze_dim(1)))
            }
            GateKind::Naive | GateKind::Swipe | GateKind::Zero => None,
        };
        let Some(x) = x else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [tokens, _] = x.dims();
        inputs.shaped("x", Some(x.dims()), [tokens, d_model]);
        if let Some((name, count, drawn)) = &given {
            inputs.shaped(name, Some(drawn.dims()), [tokens, *count]);
        }
        inputs.finish()?;

        let mut outputs = Outputs::new();
        for (name, phase) in [("train", Phase::Train), ("eval", Phase::Eval)] {
            let mut noise = match &given {
                Some((_, _, drawn)) => Noise::Given(drawn.clone()),
                None => Noise::Seeded(0),
            };
            let (y, routing) = self.layer.forward(x.clone(), phase, &mut noise);
            let Routing { experts, weights, aux_loss, dropped, .. } = routing;
            outputs.push(output(&format!("{name}.y"), y));
            outputs.push((format!("{name}.gate_idx"), experts.numbers()));
            outputs.push(output(&format!("{name}.gate_score"), weights));
            outputs.push((format!("{name}.dropped"), TensorData::from([dropped as i64])));
            // the library's own says so too
            let loss =
                aux_loss.or_else(|| (gate == GateKind::Naive).then(|| Tensor::zeros([1], &x.device())));
            outputs.extend(loss.map(|loss| output(&format!("{name}.balance_loss"), loss)));
        }
        Ok(outputs)
    }
}

/// A gate alone behind the forward contract. The module's name is that of the gate inside it.
struct GateRunner {
    gate: SwipeGate,
    config: FastMoeConfig,
}

impl Forward for GateRunner {
    /// `rank_inputs`, `[workers, tokens, d_model]`.
    ///
    /// Gives `original_idx` and `swipe_idx`, before and after choices are moved, and `swipe_score`, all
    /// `[workers, tokens, top_k]`; how many were `moved`; and `capacity_left_after_choice`, `[top_k, workers]`.
    fn forward(&self, mut inputs: Inputs) -> Result<Outputs, Error> {
        let FastMoeConfig { d_model, n_workers, top_k, .. } = self.config;
        let x = inputs.float::<3>("rank_inputs");
        inputs.missing("rank_inputs");
        let Some(x) = x else { return inputs.finish().map(|()| Outputs::new()) }; // always an error
        let [_, tokens, _] = x.dims();
        inputs.shaped("rank_inputs", Some(x.dims()), [n_workers, tokens, d_model]);
        inputs.finish()?;

        let logits = self.gate.logits(x.reshape([n_workers * tokens, d_model]));
        let best = self.gate.best(&logits);
        let Swipe { experts, room, moved } = swipe(&best, n_workers);
        let by_worker = |data: TensorData| {
            TensorData::new(data.iter::<i64>().collect::<Vec<_>>(), [n_workers, tokens, top_k])
        };
        let swiped = by_worker(experts.numbers());
        let weights: Tensor<3> = self.gate.weigh(logits, experts).weights.reshape([n_workers, tokens, top_k]);
        let room: Vec<i64> = room.concat().into_iter().map(|room| room as i64).collect();
        Ok(vec![
            ("original_idx".into(), by_worker(best.numbers())),
            ("swipe_idx".into(), swiped),
            output("swipe_score", weights),
            ("moved".into(), TensorData::from([moved as i64])),
            ("capacity_left_after_choice".into(), TensorData::new(room, [top_k, n_workers])),
        ])
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use volary_weights::{parameters, save};

    use super::*;

    fn config(fields: &str) -> Result<FastMoeConfig, ConfigError> {
        let text = format!(r#"{{"model_type": "fastmoe_moe", "num_expert": 4, "d_model": 6, {fields}}}"#);
        FastMoeConfig::parse(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap())
    }

    #[test]
    fn every_parameter_has_keys_and_they_lead_back() {
        for (name, _) in GateKind::NAMES {
            let choices = if *name == "SwitchGate" { 1 } else { 2 };
            let config = config(&format!(r#""gate": "{name}", "top_k": {choices}, "d_hidden": 5"#)).unwrap();
            for parameter in parameters(&config.init(5, &Device::flex())) {
                let keys = config.keys().keys(&parameter.path).unwrap();
                assert_eq!(keys.len(), 1, "{}", parameter.path);
                assert_eq!(config.keys().paths(&keys[0]).unwrap(), [parameter.path]);
            }
        }
    }

    /// What is saved one by one is read; and so are experts in one tensor.
    #[test]
    fn experts_are_read_one_by_one_or_fused() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(r#""gate": "NaiveGate", "d_hidden": 5"#).unwrap();
        let layer = config.init(5, &Device::flex());
        const FUSED: KeyMap = KeyMap::new(&[
            Under("gate.gate.", "gate.Naive.gate.", LINEAR),
            Transpose("experts.htoh4.weight", "experts.Plain.up.weight"),
            Rename("experts.htoh4.bias", "experts.Plain.up.bias"),
            Transpose("experts.h4toh.weight", "experts.Plain.down.weight"),
            Rename("experts.h4toh.bias", "experts.Plain.down.bias"),
        ]);
        let text = r#"{"model_type": "fastmoe_moe", "gate": "NaiveGate", "num_expert": 4, "d_model": 6, "d_hidden": 5}"#;
        std::fs::write(folder.path().join("config.json"), text).unwrap();
        let x = Tensor::<2>::from_data([[0.1, 0.2, 0.3, -0.4, 0.5, 0.6]], &Device::flex());
        let inputs = [("x".to_owned(), x.clone().into_data())].into();
        let (expected, _) = layer.forward(x, Phase::Eval, &mut Noise::Seeded(0));
        for (keys, name) in [(config.keys(), "experts.3.htoh4.weight"), (&FUSED, "experts.htoh4.weight")] {
            let file = folder.path().join("model.safetensors");
            save(&layer, keys, None, &file, None).unwrap();
            assert!(volary_weights::read_tensors(&file).unwrap().contains_key(name));
            let disk = Folder::Disk(folder.path().to_owned());
            let (options, device) = (LoadOptions::default(), Device::flex());
            let outputs = crate::registry::forward(&disk, &inputs, &options, &device).unwrap();
            let (_, found) = outputs.iter().find(|(name, _)| name == "eval.y").unwrap();
            assert_eq!(*found, expected.to_data());
        }
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for (fields, named) in [
            (r#""gate": "SoftGate""#, "`gate`: expected NaiveGate, NoisyGate"),
            (r#""gate": "NaiveGate""#, "`d_hidden`: expected a width"),
            (r#""gate": "NaiveGate", "d_hidden": 5, "world_size": 2"#, "`world_size`: expected 1"),
            (r#""gate": "GShardGate", "d_hidden": 5, "top_k": 3"#, "`top_k`: expected 2"),
            (r#""gate": "NaiveGate", "d_hidden": 5, "top_k": 5"#, "`top_k`: expected at most 4"),
            (r#""gate": "SwipeGate", "num_expert": 70000"#, "`num_expert`: expected at most 65536"),
            (r#""gate": "GShardGate", "d_hidden": 5, "capacity": [1]"#, "`capacity`: expected two numbers"),
            (r#""gate": "GShardGate", "d_hidden": 5, "capacity": 1"#, "`capacity`: expected"),
        ] {
            let message = config(fields).unwrap_err().to_string();
            assert!(message.contains(named), "{message}");
        }
    }
}
