//! Mixtures of experts on several ranks: saved by so many, loaded by others, and killed in between.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, Tensor, TensorData};
use volary::fastmoe::FastMoeConfig;
use volary::folder::Folder;
use volary::mixtral::MixtralConfig;
use volary::registry::forward;
use volary_kernels::moe::{Moe, Noise, Phase, mix};
use volary_kernels::ops::Activation;
use volary_kernels::ops::moe::Dispatch;
use volary_kernels::random::seeded;
use volary_weights::{LoadOptions, Saving, Share, load, open, read_tensors};

use crate::support::{done, fixture, json, names, refused};

/// What a folder gives for a fixture's inputs.
fn outputs(folder: &Path, inputs: &str) -> BTreeMap<String, TensorData> {
    let inputs = read_tensors(&fixture(inputs).join("inputs.safetensors")).unwrap();
    let folder = Folder::Disk(folder.into());
    forward(&folder, &inputs, &LoadOptions::default(), &Device::flex()).unwrap().into_iter().collect()
}

/// A layer of FastMoE's with eight experts, and its configuration.
fn layer(folder: &Path, seed: u64) -> (FastMoeConfig, Moe) {
    let text = r#"{"model_type": "fastmoe_moe", "gate": "NaiveGate", "num_expert": 8, "d_model": 16, "d_hidden": 24}"#;
    fs::write(folder.join("config.json"), text).unwrap();
    let config = FastMoeConfig::parse(&Folder::Disk(folder.into()).config("config.json").unwrap()).unwrap();
    let layer = seeded(seed, &Device::flex(), |device| config.init(24, device));
    (config, layer)
}

fn save_at(ranks: usize, folder: &Path, config: &FastMoeConfig, layer: &Moe) {
    let saving = Saving::begin(folder, ranks).unwrap();
    for rank in 0..ranks {
        let part = Share::new(rank, ranks).unwrap().of(layer.clone(), config.keys()).unwrap();
        saving.write(rank, &part, config.keys(), None).unwrap();
    }
    saving.commit(config.keys()).unwrap();
}

/// Each rank with its own experts on the rows that are for them, as with an exchange between processes.
fn together(ranks: &[Moe], x: Tensor<2>) -> Tensor<2> {
    let own = 8 / ranks.len();
    let routing = ranks[0].gate.route(x.clone(), Phase::Eval, &mut Noise::Seeded(0));
    mix(x, &routing, |rows, dispatch| {
        let of_rank = |(rank, layer): (usize, &Moe)| {
            let experts = rank * own..(rank + 1) * own;
            let span = dispatch.segment(experts.start).start..dispatch.segment(experts.end - 1).end;
            let own_expert =
                |expert: usize| vec![Some(expert - experts.start); dispatch.segment(expert).len()];
            let choices: Vec<_> = experts.clone().flat_map(own_expert).collect();
            let rows = rows.clone().narrow(0, span.start, span.len());
            layer.experts.forward(rows, Activation::Gelu, &Dispatch::new(&choices, 1, own))
        };
        Tensor::cat(ranks.iter().enumerate().map(of_rank).collect(), 0)
    })
}

#[test]
fn saved_at_four_ranks_loaded_at_one_two_and_eight() {
    let scratch = tempfile::tempdir().unwrap();
    let (config, layer) = layer(scratch.path(), 1);
    save_at(4, scratch.path(), &config, &layer);
    let x = seeded(2, &Device::flex(), |device| {
        volary_kernels::layers::LinearConfig::new(16, 64).with_bias(false).init(device)
    });
    let x = x.weight.val() * 4.0; // [64, 16]
    let (expected, _) = layer.forward(x.clone(), Phase::Eval, &mut Noise::Seeded(0));
    let checkpoint = open(scratch.path()).unwrap();
    for ranks in [1, 2, 8] {
        let loaded = |rank| {
            let share = Share::new(rank, ranks).unwrap();
            let untrained = share.of(config.init(24, &Device::flex()), config.keys()).unwrap();
            let options = LoadOptions { share, ..LoadOptions::default() };
            load(untrained, checkpoint.as_ref(), config.keys(), &options).unwrap()
        };
        let parts: Vec<Moe> = (0..ranks).map(loaded).collect();
        assert_eq!(together(&parts, x.clone()).into_data(), expected.to_data(), "{ranks} ranks");
    }
    let inputs = [("x".to_owned(), x.into_data())].into();
    let folder = Folder::Disk(scratch.path().into());
    let whole = forward(&folder, &inputs, &LoadOptions::default(), &Device::flex()).unwrap();
    let (_, y) = whole.iter().find(|(name, _)| name == "eval.y").unwrap();
    assert_eq!(*y, expected.into_data());
}

/// A whole decoder goes from four ranks to two to eight to one.
#[test]
fn a_decoder_is_the_same_at_any_number_of_ranks() {
    let scratch = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(fixture("mixtral").join("config.json")).unwrap();
    let text = text.replace("\"num_local_experts\": 4", "\"num_local_experts\": 8");
    fs::write(scratch.path().join("config.json"), text).unwrap();
    let config = Folder::Disk(scratch.path().into()).config("config.json").unwrap();
    let config = MixtralConfig::parse(&config).unwrap();
    let model = seeded(3, &Device::flex(), |device| config.init(device));
    volary_weights::save(&model, config.keys(), None, &scratch.path().join("model.safetensors"), None)
        .unwrap();
    let expected = outputs(scratch.path(), "mixtral");
    assert!(expected["logits"].iter::<f32>().any(|logit| logit.abs() > 1e-3));
    for ranks in [4, 2, 8, 1] {
        let checkpoint = open(scratch.path()).unwrap();
        let saving = Saving::begin(scratch.path(), ranks).unwrap();
        for rank in 0..ranks {
            let share = Share::new(rank, ranks).unwrap();
            let untrained = share.of(config.init(&Device::flex()), config.keys()).unwrap();
            let options = LoadOptions { share, ..LoadOptions::default() };
            let part = load(untrained, checkpoint.as_ref(), config.keys(), &options).unwrap();
            saving.write(rank, &part, config.keys(), None).unwrap();
        }
        saving.commit(config.keys()).unwrap();
        assert_eq!(outputs(scratch.path(), "mixtral"), expected, "{ranks} ranks");
    }
}

/// Where the process that is killed saves.
const INTO: &str = "VOLARY_TEST_SAVES_INTO";

/// A process that the system ends at its first write beyond a limit, wherever that falls.
#[cfg(unix)]
#[test]
fn a_killed_save_leaves_the_old_checkpoint_whole() {
    use std::os::unix::process::ExitStatusExt;
    const NAME: &str = "experts::a_killed_save_leaves_the_old_checkpoint_whole";
    if let Some(folder) = std::env::var_os(INTO) {
        let (config, layer) = layer(Path::new(&folder), 5);
        save_at(4, Path::new(&folder), &config, &layer);
        return;
    }
    let mut kills = 0;
    for blocks in [1, 2, 8, 14, 200] {
        let scratch = tempfile::tempdir().unwrap();
        let (config, old) = layer(scratch.path(), 4);
        save_at(2, scratch.path(), &config, &old);
        let before = outputs(scratch.path(), "fastmoe_naive");
        let status = std::process::Command::new("sh")
            .args(["-c", &format!("ulimit -c 0; ulimit -f {blocks}; exec \"$@\""), "sh"])
            .arg(std::env::current_exe().unwrap())
            .args([NAME, "--exact", "--test-threads=1"])
            .env(INTO, scratch.path())
            .output()
            .unwrap()
            .status;
        kills += usize::from(status.signal().is_some());
        let after = outputs(scratch.path(), "fastmoe_naive");
        assert_eq!(after == before, !status.success(), "{blocks} blocks: {status}");
        save_at(8, scratch.path(), &config, &old);
        assert_eq!(outputs(scratch.path(), "fastmoe_naive"), before);
        assert_eq!(names(scratch.path()).len(), 1 + 8 + 1, "{:?}", names(scratch.path()));
    }
    assert_eq!(kills, 4);
}

/// Every system with experts, by the command: spread, read as it is, and together again.
#[test]
fn the_command_spreads_experts_and_brings_them_together() {
    for (name, ranks, experts) in [
        ("mixtral", "2", "experts.3.w1"),
        ("switch_transformers", "3", "experts.expert_2.wi"),
        ("fastmoe_gshard", "2", "experts.3.htoh4.weight"),
        ("base_moe", "4", "expert_network.3.layer_norm"),
        ("m6_moe", "3", "experts.5.wi"),
    ] {
        let scratch = tempfile::tempdir().unwrap();
        let (spread, back) = (scratch.path().join("spread"), scratch.path().join("back"));
        done("convert", &fixture(name), &spread, &["--expert-ranks", ranks]);
        let expected = outputs(&fixture(name), name);
        assert_eq!(outputs(&spread, name), expected, "{name}");
        let index = &json(&spread.join("model.safetensors.index.json"))["weight_map"];
        let last = format!("model-0000{ranks}-of-0000{ranks}.safetensors");
        let homes = index.as_object().unwrap().iter().filter(|(key, _)| key.contains(experts));
        let homes: Vec<&str> = homes.map(|(_, file)| file.as_str().unwrap()).collect();
        assert!(!homes.is_empty() && homes.iter().all(|home| *home == last), "{name}: {homes:?}");
        done("convert", &spread, &back, &[]);
        assert!(back.join("model.safetensors").is_file());
        assert_eq!(outputs(&back, name), expected, "{name}");
    }
}

/// FastMoE's own layout, of experts one by one and in one tensor: a folder for each worker, numbers within it.
#[test]
fn fastmoe_is_written_as_its_workers_do_and_read_again() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    let expected = outputs(&fixture("fastmoe_naive"), "fastmoe_naive");
    let local = ["--expert-ranks", "2", "--expert-numbers", "local"];
    let written = done("convert", &fixture("fastmoe_naive"), &at("workers"), &local);
    let files: Vec<&str> =
        written["files"].as_array().unwrap().iter().map(|file| file["file"].as_str().unwrap()).collect();
    assert_eq!(
        files,
        [
            "config.json",
            "mp_rank_00/model_optim_rng.safetensors",
            "mp_rank_00_dp_rank_0001/model_optim_rng.safetensors",
            "reference.json",
        ]
    );
    let keys = |folder: &Path| {
        let tensors = read_tensors(&folder.join("model_optim_rng.safetensors")).unwrap();
        tensors.into_iter().map(|(key, data)| (key, data.shape().to_vec())).collect::<Vec<_>>()
    };
    let first = keys(&at("workers/mp_rank_00"));
    let second = keys(&at("workers/mp_rank_00_dp_rank_0001"));
    assert_eq!(first.len(), second.len() + 2, "the gate");
    assert!(second.iter().all(|tensor| first.contains(tensor)));
    assert_eq!(outputs(&at("workers"), "fastmoe_naive"), expected);
    // no reader takes the first worker's experts for all of them
    let told = open(&at("workers")).err().unwrap().to_string();
    assert!(told.contains("mp_rank_00_dp_rank_0001"), "{told}");

    // three workers cannot share what two have saved, four can
    let told = refused("convert", &at("workers"), &at("three"), &["--expert-ranks", "3"]);
    assert!(told.contains("4 experts cannot be spread evenly over 3 ranks"), "{told}");
    done("convert", &at("workers"), &at("four"), &["--expert-ranks", "4"]);
    assert_eq!(outputs(&at("four"), "fastmoe_naive"), expected);
    done("convert", &at("workers"), &at("whole"), &[]);
    assert_eq!(outputs(&at("whole"), "fastmoe_naive"), expected);
}

#[test]
fn what_has_no_experts_or_no_such_numbers_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    let told = refused("convert", &fixture("bert"), &out, &["--expert-ranks", "2"]);
    assert!(told.contains("bert cannot be spread over ranks: it has no experts"), "{told}");
    let local = ["--expert-ranks", "2", "--expert-numbers", "local"];
    let told = refused("convert", &fixture("mixtral"), &out, &local);
    assert!(told.contains("mixtral cannot number experts within ranks"), "{told}");
    let told = refused("convert", &fixture("fastmoe_swipe_workers"), &out, &["--expert-ranks", "2"]);
    assert!(told.contains("there are no experts"), "{told}");
    assert_eq!(names(scratch.path()), Vec::<String>::new());
}
