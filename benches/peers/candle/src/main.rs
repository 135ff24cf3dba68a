//! The peer of `benches/peers.rs` and `kernels/benches/moe.rs` on candle, in f32.
//!
//! usage: volary-peer-candle MODEL FOLDER
//!
//! Answers `write WORK FILE` and `time WORK TIMES`, line by line; computes with `RAYON_NUM_THREADS` threads.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{DType, Device, IndexOp, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::clip::{ClipConfig, ClipModel};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use candle_transformers::models::stable_diffusion::StableDiffusionConfig;

const DEVICE: Device = Device::Cpu;

/// Does a work: the seconds that it took, and what came out of it.
type Run = Box<dyn Fn(&str) -> Result<(f64, Tensor)>>;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, folder] = &arguments[..] else { bail!("usage: volary-peer-candle MODEL FOLDER") };
    let folder = Path::new(folder);
    let weights = folder.join(format!("{model}-f32"));
    let inputs =
        || candle_core::safetensors::load(folder.join(format!("{model}-inputs.safetensors")), &DEVICE);
    let run = match model.as_str() {
        "clip" => clip(&weights, &inputs()?)?,
        "llama" => llama(&weights, &inputs()?)?,
        "unet" => unet(&weights, &inputs()?)?,
        "vae" => vae(&weights, &inputs()?)?,
        "moe" => moe(folder)?,
        _ => bail!("`{model}` is no model"),
    };
    println!("candle, {} threads", std::env::var("RAYON_NUM_THREADS").unwrap_or_default());
    for line in std::io::stdin().lines() {
        let line = line?;
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["write", work, file] => {
                let values = run(work)?.1.flatten_all()?.to_vec1::<f32>()?;
                std::fs::write(
                    file,
                    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>(),
                )?;
                println!("written");
            }
            ["time", work, times] => {
                let mut seconds = 0.0;
                for _ in 0..times.parse()? {
                    seconds += run(work)?.0;
                }
                println!("{seconds}");
            }
            _ => bail!("`{line}` is neither `write WORK FILE` nor `time WORK TIMES`"),
        }
    }
    Ok(())
}

fn timed(run: impl FnOnce() -> candle_core::Result<Tensor>) -> Result<(f64, Tensor)> {
    let start = Instant::now();
    let output = run()?;
    Ok((start.elapsed().as_secs_f64(), output))
}

type Inputs = HashMap<String, Tensor>;

fn input(inputs: &Inputs, name: &str) -> Result<Tensor> {
    inputs.get(name).cloned().with_context(|| format!("there are no `{name}`"))
}

fn variables(weights: &Path) -> Result<VarBuilder<'static>> {
    let files: [PathBuf; 1] = [weights.join("model.safetensors")];
    // SAFETY: nobody changes the file while this program runs.
    Ok(unsafe { VarBuilder::from_mmaped_safetensors(&files, DType::F32, &DEVICE)? })
}

fn clip(weights: &Path, inputs: &Inputs) -> Result<Run> {
    let model = ClipModel::new(variables(weights)?, &ClipConfig::vit_base_patch32())?;
    let (pixels, ids) = (input(inputs, "pixels")?, input(inputs, "ids")?);
    Ok(Box::new(move |work| {
        let (what, batch) = work.split_once('-').context("how many?")?;
        let batch = batch.parse()?;
        match what {
            "image" => timed(|| model.get_image_features(&pixels.narrow(0, 0, batch)?)),
            _ => timed(|| model.get_text_features(&ids.narrow(0, 0, batch)?)),
        }
    }))
}

fn llama(weights: &Path, inputs: &Inputs) -> Result<Run> {
    let config: LlamaConfig = serde_json::from_slice(&std::fs::read(weights.join("config.json"))?)?;
    let config = config.into_config(false);
    let model = Llama::load(variables(weights)?, &config)?;
    let (prompt, rest) = (input(inputs, "prompt")?, input(inputs, "rest")?);
    let (before, decoded) = (prompt.dim(1)?, rest.dim(1)?);
    Ok(Box::new(move |work| {
        let mut cache = Cache::new(true, DType::F32, &config, &DEVICE)?;
        let prefill = timed(|| model.forward(&prompt, 0, &mut cache))?;
        if work == "prefill" {
            return Ok(prefill);
        }
        timed(|| {
            let mut next = |at| model.forward(&rest.narrow(1, at, 1)?, before + at, &mut cache);
            (1..decoded).try_fold(next(0)?, |_, at| next(at))
        })
    }))
}

/// As diffusers calls them.
fn diffusers(weights: &Path) -> PathBuf {
    weights.join("diffusion_pytorch_model.safetensors")
}

fn unet(weights: &Path, inputs: &Inputs) -> Result<Run> {
    let config = StableDiffusionConfig::v1_5(None, None, None);
    let model = config.build_unet(diffusers(weights), &DEVICE, 4, false, DType::F32)?;
    let (sample, context) = (input(inputs, "sample")?, input(inputs, "encoder_hidden_states")?);
    let timestep = f64::from(input(inputs, "timestep")?.i(0)?.to_scalar::<f32>()?);
    Ok(Box::new(move |_| timed(|| model.forward(&sample, timestep, &context))))
}

fn vae(weights: &Path, inputs: &Inputs) -> Result<Run> {
    let config = StableDiffusionConfig::v1_5(None, None, None);
    let model = config.build_vae(diffusers(weights), &DEVICE, DType::F32)?;
    let latents = input(inputs, "latents")?;
    Ok(Box::new(move |_| timed(|| model.decode(&latents))))
}

const EXPERTS: usize = 8;
const TOP_K: usize = 2;

/// A sparse layer, and an MLP of as many products; see the shapes in `benches/peers/sparse.rs`.
struct Sparse {
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    mlp: [Tensor; 4],
}

impl Sparse {
    fn read(folder: &Path) -> Result<Self> {
        let (tokens, d_model, d_ff, wide) = (2048, 512, 2048, TOP_K * 2048);
        let mut file = BufReader::new(File::open(folder.join("moe.f32"))?);
        let mut next = |shape: &[usize]| -> Result<Tensor> {
            let mut bytes = vec![0; 4 * shape.iter().product::<usize>()];
            file.read_exact(&mut bytes)?;
            Ok(Tensor::from_raw_buffer(&bytes, DType::F32, shape, &DEVICE)?)
        };
        Ok(Self {
            x: next(&[tokens, d_model])?,
            gate: next(&[EXPERTS, d_model])?,
            up: next(&[EXPERTS, d_model, d_ff])?,
            up_bias: next(&[EXPERTS, d_ff])?,
            down: next(&[EXPERTS, d_ff, d_model])?,
            down_bias: next(&[EXPERTS, d_model])?,
            mlp: [next(&[wide, d_model])?, next(&[wide])?, next(&[d_model, wide])?, next(&[d_model])?],
        })
    }

    /// Expert by expert, each on the tokens that go to it.
    fn layer(&self) -> candle_core::Result<Tensor> {
        let x = &self.x;
        let logits = x.matmul(&self.gate.t()?)?.to_vec2::<f32>()?;
        let mut chosen = vec![(Vec::<u32>::new(), Vec::<f32>::new()); EXPERTS];
        for (token, row) in logits.iter().enumerate() {
            let mut order: Vec<usize> = (0..EXPERTS).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
            let sum: f32 = order[..TOP_K].iter().map(|&expert| row[expert].exp()).sum();
            for &expert in &order[..TOP_K] {
                chosen[expert].0.push(token as u32);
                chosen[expert].1.push(row[expert].exp() / sum);
            }
        }
        let mut out = x.zeros_like()?;
        for (expert, (tokens, weights)) in chosen.into_iter().enumerate() {
            if tokens.is_empty() {
                continue;
            }
            let count = tokens.len();
            let tokens = Tensor::new(tokens, &DEVICE)?;
            let weights = Tensor::from_vec(weights, (count, 1), &DEVICE)?;
            let inner = x.index_select(&tokens, 0)?.matmul(&self.up.i(expert)?)?;
            let inner = inner.broadcast_add(&self.up_bias.i(expert)?)?.gelu_erf()?;
            let y = inner.matmul(&self.down.i(expert)?)?.broadcast_add(&self.down_bias.i(expert)?)?;
            out = out.index_add(&tokens, &y.broadcast_mul(&weights)?, 0)?;
        }
        Ok(out)
    }

    fn dense(&self) -> candle_core::Result<Tensor> {
        let [up, up_bias, down, down_bias] = &self.mlp;
        let inner = self.x.matmul(&up.t()?)?.broadcast_add(up_bias)?.gelu_erf()?;
        inner.matmul(&down.t()?)?.broadcast_add(down_bias)
    }
}

fn moe(folder: &Path) -> Result<Run> {
    let sparse = Sparse::read(folder)?;
    Ok(Box::new(move |work| match work {
        "layer" => timed(|| sparse.layer()),
        "dense" => timed(|| sparse.dense()),
        _ => bail!("`{work}` is no work"),
    }))
}
