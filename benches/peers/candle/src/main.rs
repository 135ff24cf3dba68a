//! The peer of `kernels/benches/moe.rs` on candle.
//!
//! usage: volary-peer-candle VALUES
//!
//! Answers `write WHAT FILE` and `time WHAT TIMES`, line by line; computes with `RAYON_NUM_THREADS` threads.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use candle_core::{Device, IndexOp, Tensor};

const TOKENS: usize = 2048;
const D_MODEL: usize = 512;
const D_FF: usize = 2048;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

struct Parts {
    gate: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    mlp: [Tensor; 4],
}

impl Parts {
    /// Expert by expert, each on the tokens that go to it.
    fn layer(&self, x: &Tensor) -> Result<Tensor> {
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
            let tokens = Tensor::new(tokens, x.device())?;
            let weights = Tensor::from_vec(weights, (count, 1), x.device())?;
            let inner = x.index_select(&tokens, 0)?.matmul(&self.up.i(expert)?)?;
            let inner = inner.broadcast_add(&self.up_bias.i(expert)?)?.gelu_erf()?;
            let y = inner.matmul(&self.down.i(expert)?)?.broadcast_add(&self.down_bias.i(expert)?)?;
            out = out.index_add(&tokens, &y.broadcast_mul(&weights)?, 0)?;
        }
        Ok(out)
    }

    fn dense(&self, x: &Tensor) -> Result<Tensor> {
        let [up, up_bias, down, down_bias] = &self.mlp;
        let inner = x.matmul(&up.t()?)?.broadcast_add(up_bias)?.gelu_erf()?;
        Ok(inner.matmul(&down.t()?)?.broadcast_add(down_bias)?)
    }
}

fn main() -> Result<()> {
    let file = std::env::args().nth(1).context("usage: volary-peer-candle VALUES")?;
    let bytes = std::fs::read(file)?;
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    let mut left = &values[..];
    let mut next = |shape: &[usize]| -> Result<Tensor> {
        let (part, rest) = left.split_at(shape.iter().product());
        left = rest;
        Ok(Tensor::from_slice(part, shape, &Device::Cpu)?)
    };
    let x = next(&[TOKENS, D_MODEL])?;
    let wide = TOP_K * D_FF;
    let parts = Parts {
        gate: next(&[EXPERTS, D_MODEL])?,
        up: next(&[EXPERTS, D_MODEL, D_FF])?,
        up_bias: next(&[EXPERTS, D_FF])?,
        down: next(&[EXPERTS, D_FF, D_MODEL])?,
        down_bias: next(&[EXPERTS, D_MODEL])?,
        mlp: [next(&[wide, D_MODEL])?, next(&[wide])?, next(&[D_MODEL, wide])?, next(&[D_MODEL])?],
    };
    println!("candle, {} threads", std::env::var("RAYON_NUM_THREADS").unwrap_or_default());
    for line in std::io::stdin().lines() {
        let line = line?;
        let [what, work, rest] = line.split_whitespace().collect::<Vec<_>>()[..] else {
            bail!("`{line}` is not three words")
        };
        let run = || match work {
            "layer" => parts.layer(&x),
            "dense" => parts.dense(&x),
            _ => bail!("`{work}` is no work"),
        };
        match what {
            "write" => {
                let values = run()?.flatten_all()?.to_vec1::<f32>()?;
                std::fs::write(rest, values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
                println!("written");
            }
            "time" => {
                let start = Instant::now();
                for _ in 0..rest.parse()? {
                    std::hint::black_box(run()?);
                }
                println!("{}", start.elapsed().as_secs_f64());
            }
            _ => bail!("`{what}` is neither `write` nor `time`"),
        }
    }
    Ok(())
}
