//! Larger models made of smaller ones compute the same, and can be trained apart.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use burn::tensor::{Device, TensorData};
use volary::folder::Folder;
use volary::m6::{M6, M6Config, MODEL_KEYS};
use volary::registry::forward;
use volary_kernels::random::seeded;
use volary_weights::{LoadOptions, read_tensors, save};

use crate::support::{done, fixture, json, names, refused};

fn outputs(folder: &Path, inputs: &BTreeMap<String, TensorData>) -> BTreeMap<String, TensorData> {
    let folder = Folder::Disk(folder.into());
    forward(&folder, inputs, &LoadOptions::default(), &Device::flex()).unwrap().into_iter().collect()
}

fn inputs(name: &str) -> BTreeMap<String, TensorData> {
    read_tensors(&fixture(name).join("inputs.safetensors")).unwrap()
}

/// The largest difference between outputs of that name.
fn difference(a: &BTreeMap<String, TensorData>, b: &BTreeMap<String, TensorData>, name: &str) -> f32 {
    assert_eq!(a[name].shape(), b[name].shape(), "{name}");
    a[name].iter::<f32>().zip(b[name].iter::<f32>()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// What two experts of a token are weighed by sums to 1 but for rounding: a few units in the last place of each layer's
/// MLP, and no more.
#[test]
fn a_mixtral_made_of_a_llama_gives_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    for (name, experts, top_k) in
        [("llama", "8", "2"), ("llama", "3", "1"), ("llama_rope3", "4", "4"), ("llama_bf16", "4", "2")]
    {
        let out = scratch.path().join(format!("{name}-{experts}-{top_k}"));
        done(
            "convert",
            &fixture(name),
            &out,
            &["--upcycle", "mixtral", "--experts", experts, "--top-k", top_k],
        );
        let config = json(&out.join("config.json"));
        assert_eq!(config["model_type"], "mixtral");
        assert_eq!(config["num_local_experts"].to_string(), experts);
        let inputs = inputs(name);
        let (dense, mixture) = (outputs(&fixture(name), &inputs), outputs(&out, &inputs));
        let off = difference(&dense, &mixture, "logits");
        assert!(off <= 1e-5, "{name}, {top_k} of {experts}: off by {off}");
        for name in ["greedy.tokens", "greedy_ids"].into_iter().filter(|name| dense.contains_key(*name)) {
            assert_eq!(mixture[name], dense[name]);
        }
        // the routers differ from layer to layer, and tokens go to several experts
        let routers: Vec<&TensorData> =
            ["router_logits.0", "router_logits.1"].map(|name| &mixture[name]).into();
        assert_ne!(routers[0], routers[1]);
    }
}

#[test]
fn a_seed_determines_the_gates() {
    let scratch = tempfile::tempdir().unwrap();
    let made = |name: &str, seed: &str| {
        let out = scratch.path().join(name);
        done("convert", &fixture("llama"), &out, &["--upcycle", "mixtral", "--experts", "4", "--seed", seed]);
        read_tensors(&out.join("model.safetensors")).unwrap()
    };
    let [first, again, other] = [made("a", "1"), made("b", "1"), made("c", "2")];
    assert_eq!(first, again);
    let gate = "model.layers.0.block_sparse_moe.gate.weight";
    assert_ne!(first[gate], other[gate]);
    assert_eq!(first[gate].shape().to_vec(), [4, 32]);
    let w1 = |expert: usize| &first[&format!("model.layers.2.block_sparse_moe.experts.{expert}.w1.weight")];
    assert_eq!(w1(0), w1(3));
}

/// The one expert of a token is not weighed.
#[test]
fn a_base_model_made_of_a_cpm2_gives_the_same() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("base");
    done("convert", &fixture("cpm2"), &out, &["--upcycle", "base", "--experts", "4"]);
    let inputs = inputs("cpm2");
    let (dense, mixture) = (outputs(&fixture("cpm2"), &inputs), outputs(&out, &inputs));
    for name in ["lm_logits", "encoder_last_hidden_state"] {
        let off = difference(&dense, &mixture, name);
        assert!(off <= 2e-5, "{name} is off by {off}");
    }
    // spread over ranks it is the same, too
    let ranks = scratch.path().join("ranks");
    done("convert", &out, &ranks, &["--expert-ranks", "4"]);
    assert_eq!(outputs(&ranks, &inputs), mixture);
    assert!(names(&ranks).contains(&"model-00004-of-00004.safetensors".to_owned()));
}

#[test]
fn what_cannot_grow_is_told() {
    let scratch = tempfile::tempdir().unwrap();
    let out = scratch.path().join("out");
    for (name, arguments, reason) in [
        (
            "bert",
            &["--upcycle", "mixtral", "--experts", "4"][..],
            "bert cannot become this mixture of experts",
        ),
        ("llama", &["--upcycle", "base", "--experts", "4"], "llama cannot become this mixture of experts"),
        (
            "llama",
            &["--upcycle", "mixtral", "--experts", "4", "--top-k", "5"],
            "5 experts for each token, of 4",
        ),
        ("llama", &["--delink"], "llama cannot be delinked"),
    ] {
        let told = refused("convert", &fixture(name), &out, arguments);
        assert!(told.contains(reason), "{told}");
    }
    assert_eq!(names(scratch.path()), Vec::<String>::new());
}

/// An M6 of three blocks that are one, and its folder.
fn pseudo(folder: &Path) -> (M6Config, M6) {
    let text = r#"{"model_type": "m6", "num_layers": 3, "share_layers": true, "d_model": 8, "num_heads": 2, "d_ff": 6,
        "num_experts": 4, "num_prototypes": 2}"#;
    fs::create_dir(folder).unwrap();
    fs::write(folder.join("config.json"), text).unwrap();
    let config = M6Config::parse(&Folder::Disk(folder.into()).config("config.json").unwrap()).unwrap();
    let model = seeded(1, &Device::flex(), |device| config.init(device));
    save(&model, &MODEL_KEYS, None, &folder.join("model.safetensors"), None).unwrap();
    (config, model)
}

#[test]
fn a_delinked_model_gives_the_same_bit_for_bit() {
    let scratch = tempfile::tempdir().unwrap();
    let (linked, apart) = (scratch.path().join("linked"), scratch.path().join("apart"));
    pseudo(&linked);
    done("convert", &linked, &apart, &["--delink"]);
    let [few, many] =
        [&linked, &apart].map(|folder| read_tensors(&folder.join("model.safetensors")).unwrap().len());
    assert_eq!(many, 3 * few);
    assert_eq!(json(&apart.join("config.json"))["share_layers"], false);
    let states: Vec<f32> = (0..80).map(|at| (at as f32 * 0.7).sin()).collect();
    let inputs = [("hidden_states".to_owned(), TensorData::new(states, [2, 5, 8]))].into();
    let found = outputs(&apart, &inputs);
    assert_eq!(found, outputs(&linked, &inputs));
    assert_ne!(found["last_hidden_state"], inputs["hidden_states"]);
    let told = refused("convert", &apart, &scratch.path().join("again"), &["--delink"]);
    assert!(told.contains("m6_moe cannot be delinked: its layers share no parameters"), "{told}");
}

/// A block that is all blocks moves along the sum of their gradients; delinked, each moves along its own.
#[cfg(feature = "train")]
#[test]
fn delinked_layers_are_trained_apart() {
    use burn::module::Module;
    use burn::optim::{GradientsParams, SgdConfig};
    use burn::tensor::{Tensor, Tolerance};
    use volary_kernels::moe::{Experts, Phase};
    use volary_kernels::ops::Mask;

    let scratch = tempfile::tempdir().unwrap();
    let (_, linked) = pseudo(&scratch.path().join("linked"));
    let device = Device::flex().autodiff();
    let linked = linked.to_device(&device).train();
    let apart = linked.clone().delink();
    let states: Vec<f32> = (0..80).map(|at| (at as f32 * 0.7).sin()).collect();
    let x = Tensor::<3>::from_data(TensorData::new(states, [2, 5, 8]), &device);
    let trained = |model: M6| {
        let loss = model.forward(x.clone(), &Mask::Full, Phase::Train).0.square().mean();
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        SgdConfig::new().init().step(1.0, model, gradients)
    };
    let weight = |model: &M6, block: usize| match &model.blocks[block].moe.experts {
        Experts::Plain(experts) => experts.down.weight.val().inner(),
        Experts::Gated(_) => panic!("they have two projections"),
    };
    let before = weight(&linked, 0);
    let (linked, apart) = (trained(linked), trained(apart));
    assert_eq!([linked.blocks.len(), apart.blocks.len()], [1, 3]);
    let moved = |model: &M6, block: usize| weight(model, block) - before.clone();
    let steps = [0, 1, 2].map(|block| moved(&apart, block));
    let largest = |step: Tensor<3>| step.abs().max().into_scalar::<f32>();
    for (a, b) in [(0, 1), (1, 2), (0, 2)] {
        let apart = largest(steps[a].clone() - steps[b].clone());
        assert!(apart > 0.05 * largest(steps[a].clone()), "{a} and {b}: {apart}");
    }
    let [first, second, third] = steps;
    let sum = (first + second + third).into_data();
    moved(&linked, 0).into_data().assert_approx_eq::<f32>(&sum, Tolerance::absolute(1e-6));
}
