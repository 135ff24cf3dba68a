//! Our side of the peer bench: writes models with random weights in their public layouts, and runs them.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use burn::module::Module;
use burn::tensor::{DType, Device, Distribution, FloatDType, Int, Tensor, TensorData};
use serde_json::{Value, json};
use volary::clip::{self, ClipConfig};
use volary::eva_clip::{self, EvaClipConfig};
use volary::folder::Folder;
use volary::llama::{KEYS, Llama, LlamaCache, LlamaConfig, LlamaInput};
use volary::preset::Shape;
use volary::registry::{SYSTEMS, System};
use volary::tensors::Inputs;
use volary::{autoencoder, unet};
use volary_kernels::ops::{Activation, Mask, Positions};
use volary_weights::{KeyMap, LoadOptions, load, open, read_tensors, save, save_tensors};

use super::program::{self, Done, timed};
use super::sparse::{self, Sparse};

/// What weights and activations are held in.
pub const DTYPES: [(&str, FloatDType); 2] = [("f32", FloatDType::F32), ("bf16", FloatDType::BF16)];
/// As diffusers calls them.
const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";
/// As transformers and open_clip do.
const MODEL: &str = "model.safetensors";
const CLIP: &str = "openai/clip-vit-base-patch32";
const EVA: &str = "timm/eva02_base_patch16_clip_224.merged2b_s8b_b131k";
const LLAMA: &str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0";
/// Of its 22 blocks; 527 million parameters are left.
const LLAMA_BLOCKS: usize = 9;
const PROMPT: usize = 128;
const DECODED: usize = 64;
/// The largest batch of pictures, and that of texts.
const PICTURES: usize = 32;
const TEXTS: usize = 8;

fn preset<T>(name: &str, pick: impl Fn(&'static Shape) -> Option<T>) -> Result<T> {
    let mut presets = SYSTEMS.iter().flat_map(|system| system.presets).filter(|preset| preset.name == name);
    presets.find_map(|preset| pick(&preset.shape)).with_context(|| format!("{name} is not among the presets"))
}

fn clip_config() -> Result<&'static ClipConfig> {
    preset(CLIP, |shape| if let Shape::Clip(config) = shape { Some(config) } else { None })
}

fn eva_config() -> Result<&'static EvaClipConfig> {
    preset(EVA, |shape| if let Shape::EvaClip(config) = shape { Some(config) } else { None })
}

fn llama_config() -> Result<LlamaConfig> {
    let whole =
        preset(LLAMA, |shape| if let Shape::Llama(config) = shape { Some(config.clone()) } else { None })?;
    Ok(LlamaConfig { n_layers: LLAMA_BLOCKS, ..whole })
}

/// The file of what goes into a model: the last that is written of it.
pub fn inputs(model: &str, folder: &Path) -> PathBuf {
    folder.join(format!("{model}-inputs.safetensors"))
}

/// Random weights of a model in both dtypes, and what goes into it.
pub fn write(model: &str, folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(1);
    let pixels = || ("pixels", noise([PICTURES, 3, 224, 224], &device));
    let latents = || noise([1, 4, 64, 64], &device);
    let tensors = match model {
        "clip" => {
            let config = clip_config()?;
            let keys = clip::Layout::Transformers.keys(&config.vision);
            write_model(folder, model, &config.init(&device), keys, MODEL, &json!({ "model_type": "clip" }))?;
            vec![pixels(), ("ids", texts(config.text.vocab_size))]
        }
        "eva" => {
            let config = eva_config()?;
            let keys = config.keys(eva_clip::Layout::OpenClip);
            write_model(folder, model, &config.init(&device), keys, MODEL, &json!({}))?;
            vec![pixels()]
        }
        "llama" => {
            let config = llama_config()?;
            let told = json!({
                "model_type": "llama",
                "architectures": ["LlamaForCausalLM"],
                "vocab_size": config.vocab_size,
                "max_position_embeddings": config.n_positions,
                "hidden_size": config.d_model,
                "intermediate_size": config.d_ff,
                "num_hidden_layers": config.n_layers,
                "num_attention_heads": config.n_heads,
                "num_key_value_heads": config.n_kv_heads,
                "rms_norm_eps": config.rms_norm_eps,
                "rope_theta": config.rope_theta,
                "tie_word_embeddings": false,
            });
            write_model(folder, model, &config.init(&device), &KEYS, MODEL, &told)?;
            let ids = |from: usize, count: usize| {
                let ids = (from..from + count).map(|at| (at * 1543 % config.vocab_size) as i64);
                TensorData::new(ids.collect::<Vec<_>>(), [1, count])
            };
            vec![("prompt", ids(1, PROMPT)), ("rest", ids(1 + PROMPT, DECODED))]
        }
        "unet" => {
            let told = json!({
                "_class_name": "UNet2DConditionModel",
                "cross_attention_dim": 768,
                "sample_size": 64,
            });
            let unet = unet::V1.init(&device);
            ensure!(unet.num_params() == 859_520_964, "{} parameters", unet.num_params());
            write_model(folder, model, &unet, &unet::KEYS, WEIGHTS, &told)?;
            let context = noise([1, 77, 768], &device);
            let timestep = TensorData::from([421.0_f32]);
            vec![("sample", latents()), ("timestep", timestep), ("encoder_hidden_states", context)]
        }
        "vae" => {
            let blocks = |block| vec![block; 4];
            let told = json!({
                "_class_name": "AutoencoderKL",
                "block_out_channels": [128, 256, 512, 512],
                "down_block_types": blocks("DownEncoderBlock2D"),
                "up_block_types": blocks("UpDecoderBlock2D"),
                "layers_per_block": 2,
                "sample_size": 512,
            });
            write_model(folder, model, &autoencoder::F8.init(&device), &autoencoder::KEYS, WEIGHTS, &told)?;
            vec![("latents", latents())]
        }
        "moe" => {
            sparse::write(folder)?;
            vec![]
        }
        _ => bail!("`{model}` is no model"),
    };
    let tensors: Vec<_> = tensors.into_iter().map(|(name, data)| (name.to_owned(), data)).collect();
    Ok(save_tensors(&inputs(model, folder), &tensors)?)
}

fn noise<const D: usize>(shape: [usize; D], device: &Device) -> TensorData {
    Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), device).into_data()
}

/// Any words between those that begin and end a text: the two last of the vocabulary.
fn texts(vocab_size: usize) -> TensorData {
    const LENGTH: usize = 77;
    let word = |at: usize| match at % LENGTH {
        0 => vocab_size - 2,
        at if at == LENGTH - 1 => vocab_size - 1,
        _ => at * 1543 % (vocab_size - 2),
    };
    TensorData::new((0..TEXTS * LENGTH).map(|at| word(at) as i64).collect::<Vec<_>>(), [TEXTS, LENGTH])
}

fn write_model<M: Module>(
    folder: &Path,
    name: &str,
    model: &M,
    keys: &KeyMap,
    file: &str,
    config: &Value,
) -> Result<()> {
    for (dtype, float) in DTYPES {
        let folder = folder.join(format!("{name}-{dtype}"));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("config.json"), config.to_string())?;
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]); // transformers asks for it
        save(model, keys, Some(float), &folder.join(file), Some(metadata))?;
    }
    Ok(())
}

/// Loads a model, and runs it as it is asked to.
pub fn child(model: &str, dtype: &str, folder: &Path) -> Result<()> {
    let device = Device::flex();
    let dtype_of = |name| DTYPES.iter().find(|(dtype, _)| *dtype == name).map(|(_, dtype)| *dtype);
    let float = dtype_of(dtype).with_context(|| format!("`{dtype}` is no dtype"))?;
    let options = LoadOptions { dtype: Some(float), ..LoadOptions::default() };
    if model == "moe" {
        let Sparse { x, layer, dense } = Sparse::read(folder, DType::from(float), &device)?;
        return program::serve(|work| match work {
            "layer" => Ok(timed(|| sparse::forward(&layer, x.clone()))),
            "dense" => Ok(timed(|| dense.forward(x.clone(), Activation::Gelu))),
            _ => bail!("`{work}` is no work"),
        });
    }
    let mut inputs = read_tensors(&inputs(model, folder))?;
    let folder = folder.join(format!("{model}-{dtype}"));
    let mut input = |name: &str| inputs.remove(name).with_context(|| format!("there are no `{name}`"));
    match model {
        "clip" => {
            let (config, checkpoint) = (clip_config()?, open(&folder)?);
            let keys = clip::Layout::Transformers.keys(&config.vision);
            let model = load(config.init(&device), checkpoint.as_ref(), keys, &options)?;
            let pixels = Tensor::<4>::from_data(input("pixels")?, &device).cast(float);
            let ids = Tensor::<2, Int>::from_data(input("ids")?, &device);
            program::serve(|work| {
                let (what, batch) = batch(work)?;
                let (pixels, ids) = (pixels.clone(), ids.clone());
                Ok(match what {
                    "image" => timed(|| model.vision.forward(pixels.narrow(0, 0, batch)).embedding),
                    _ => timed(|| model.text.forward(ids.narrow(0, 0, batch), &Mask::Causal).embedding),
                })
            })
        }
        "eva" => {
            let (config, checkpoint) = (eva_config()?, open(&folder)?);
            let keys = config.keys(eva_clip::Layout::OpenClip);
            let tower = load(config.init(&device), checkpoint.as_ref(), keys, &options)?.vision;
            let pixels = Tensor::<4>::from_data(input("pixels")?, &device).cast(float);
            program::serve(|work| {
                let pixels = pixels.clone().narrow(0, 0, batch(work)?.1);
                Ok(timed(|| tower.pool(tower.forward(pixels)).output))
            })
        }
        "llama" => {
            let (config, checkpoint) = (llama_config()?, open(&folder)?);
            let model = load(config.init(&device), checkpoint.as_ref(), &KEYS, &options)?;
            let prompt = Tensor::<2, Int>::from_data(input("prompt")?, &device);
            let rest = Tensor::<2, Int>::from_data(input("rest")?, &device);
            program::serve(|work| {
                let mut cache = model.cache(PROMPT + DECODED);
                let prefill = timed(|| next(&model, prompt.clone(), &mut cache));
                if work == "prefill" {
                    return Ok(prefill);
                }
                Ok(timed(|| {
                    let one = |at| rest.clone().narrow(1, at, 1);
                    (1..DECODED)
                        .fold(next(&model, one(0), &mut cache), |_, at| next(&model, one(at), &mut cache))
                }))
            })
        }
        _ => {
            let folder = Folder::Disk(folder);
            let system = System::of(&folder)?;
            let model = (system.open)(&folder, &options, &device)?;
            program::serve(|_| {
                let start = Instant::now();
                let mut outputs = model.forward(Inputs::new(system.name, &inputs, &device))?;
                let seconds = start.elapsed().as_secs_f64();
                let (_, output) = outputs.pop().context("nothing came out")?;
                Ok(Done { seconds, output })
            })
        }
    }
}

/// `image-8`: what, and how many.
fn batch(work: &str) -> Result<(&str, usize)> {
    let (what, batch) = work.split_once('-').with_context(|| format!("`{work}` has no number"))?;
    Ok((what, batch.parse()?))
}

/// Scores of the token after `ids`, `[1, seq] -> [1, 1, vocab_size]`.
fn next(model: &Llama, ids: Tensor<2, Int>, cache: &mut LlamaCache) -> Tensor<3> {
    let [_, seq] = ids.dims();
    let input = LlamaInput { ids, positions: Positions::From(cache.len()), mask: Mask::Full };
    model.logits(model.decode(input, cache).narrow(1, seq - 1, 1))
}
