//! Decoding with a 7B model in 4 or 8 bits: tokens a second, bytes read a second, peak memory.
//!
//! ```sh
//! cargo bench --bench large -- [4 | 8] [tokens]
//! ```
//!
//! AquilaChat-7B with random weights, which are made packed, row by row. A token reads every matrix once but the token
//! table, of which it reads a row: the speed of memory is the ceiling, so that is measured beside it, in turns.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{DType, Device, Int, Tensor};
use half::f16;
use rayon::prelude::*;
use volary::bench::peak_memory;
use volary::llama::{Llama, LlamaCache, LlamaConfig, LlamaInput};
use volary::preset::{Shape, bytes};
use volary::registry::SYSTEMS;
use volary_kernels::layers::Packed;
use volary_kernels::ops::{Bits, Mask, PackedMatrix, Positions, Quantization};

const MODEL: &str = "BAAI/AquilaChat-7B";
const PROMPT: usize = 64;
/// Decoded in turns with reading memory.
const ROUNDS: usize = 4;

fn main() -> Result<()> {
    // cargo adds `--bench`
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|argument| argument.parse().ok()).collect();
    let quantization = match numbers.first().unwrap_or(&4) {
        4 => Quantization::INT4,
        8 => Quantization::INT8,
        bits => bail!("{bits} bits are neither 4 nor 8"),
    };
    let tokens = *numbers.get(1).unwrap_or(&32);
    let config = config()?;
    let device = Device::flex();
    let parameters = volary_weights::parameters(&config.init(&device));
    let all = bytes(&parameters, 4, Some(quantization));
    let read = all - quantization.bytes([config.vocab_size, config.d_model]);
    println!("{MODEL}: {quantization}, {:.2} GB, of which a token reads {:.2}", gb(all), gb(read));

    let start = Instant::now();
    let model = config.init(&device).map(&mut Random { quantization, matrix: 0 });
    println!(
        "made in {:.1} s, peak memory {:.0} MiB",
        start.elapsed().as_secs_f64(),
        peak_memory().context("only Linux tells")?
    );

    let mut cache = model.cache(PROMPT + ROUNDS * tokens);
    let prompt: Vec<i64> = (0..PROMPT as i64).map(|i| i * 1543 % config.vocab_size as i64).collect();
    let prompt = Tensor::<1, Int>::from_data(&prompt[..], &device).unsqueeze();
    let start = Instant::now();
    let mut token = next(&model, prompt, &mut cache);
    let seconds = start.elapsed().as_secs_f64();
    println!("prompt of {PROMPT}: {seconds:.2} s, {:.1} tokens/s", PROMPT as f64 / seconds);

    println!("| tokens/s | GB/s | memory GB/s | CPU s a token | GB a CPU s | memory GB a CPU s |");
    println!("| --- | --- | --- | --- | --- | --- |");
    let mut peak = 0.0;
    for _ in 0..ROUNDS {
        let decoding = timed(|| {
            for _ in 0..tokens {
                token = next(&model, token.clone(), &mut cache);
            }
            Ok(())
        })?;
        if peak == 0.0 {
            peak = peak_memory().context("only Linux tells")?; // without what is allocated next
        }
        let [memory, memory_of_cpu] = memory_speed()?;
        let bytes = tokens as f64 * gb(read);
        println!(
            "| {:.2} | {:.1} | {:.1} | {:.3} | {:.1} | {:.1} |",
            tokens as f64 / decoding.wall,
            bytes / decoding.wall,
            memory,
            decoding.cpu / tokens as f64,
            bytes / decoding.cpu,
            memory_of_cpu,
        );
    }
    println!("peak memory {peak:.0} MiB");
    Ok(())
}

fn config() -> Result<&'static LlamaConfig> {
    let presets = SYSTEMS.iter().flat_map(|system| system.presets);
    match presets.filter(|preset| preset.name == MODEL).map(|preset| &preset.shape).next() {
        Some(Shape::Llama(config)) => Ok(config),
        _ => bail!("{MODEL} is not a LLaMA among the presets"),
    }
}

fn gb(bytes: usize) -> f64 {
    bytes as f64 / 1e9
}

/// The likeliest token after `ids`, `[1, seq] -> [1, 1]`.
fn next(model: &Llama, ids: Tensor<2, Int>, cache: &mut LlamaCache) -> Tensor<2, Int> {
    let [_, seq] = ids.dims();
    let input = LlamaInput { ids, positions: Positions::From(cache.len()), mask: Mask::Full };
    let states = model.decode(input, cache).narrow(1, seq - 1, 1); // [1, 1, d_model]
    model.logits(states).argmax(2).reshape([1, 1])
}

/// Gives every matrix random packed values, about as large as those of a trained model.
struct Random {
    quantization: Quantization,
    matrix: u64,
}

impl ModuleMapper for Random {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let &[rows, cols] = param.lazy_shape().as_slice() else { return param };
        self.matrix += 1;
        let matrix = random(self.quantization, [rows, cols], self.matrix);
        Packed::hold(param, matrix, DType::F32)
    }
}

fn random(quantization: Quantization, [rows, cols]: [usize; 2], seed: u64) -> PackedMatrix {
    let Quantization { bits, block } = quantization;
    let width = bits.bytes(cols);
    let mut codes = vec![0; rows * width];
    let mut scales = vec![f16::ZERO; rows * cols.div_ceil(block)];
    let row = |(row, (codes, scales)): (usize, (&mut [u8], &mut [f16]))| {
        let mut rng = fastrand::Rng::with_seed(seed << 32 | row as u64);
        rng.fill(codes);
        let deviation = 0.02;
        let step = match bits {
            Bits::Eight => deviation / 74.0,
            Bits::Four => deviation / 4.6,
        };
        scales.fill_with(|| f16::from_f32(step * (0.5 + rng.f32())));
    };
    codes.par_chunks_mut(width).zip(scales.par_chunks_mut(cols.div_ceil(block))).enumerate().for_each(row);
    match bits {
        Bits::Eight => PackedMatrix::symmetric(quantization, [rows, cols], codes, scales),
        Bits::Four => {
            let mins = scales.iter().map(|scale| f16::from_f32(-7.5 * scale.to_f32())).collect();
            PackedMatrix::from_minima(block, [rows, cols], codes, scales, mins)
        }
    }
}

/// By the clock, and of all cores together: on a machine that others use only the latter can be compared.
struct Time {
    wall: f64,
    cpu: f64,
}

/// Seconds that `work` takes.
fn timed(work: impl FnOnce() -> Result<()>) -> Result<Time> {
    let (start, cpu) = (Instant::now(), cpu_seconds()?);
    work()?;
    Ok(Time { wall: start.elapsed().as_secs_f64(), cpu: cpu_seconds()? - cpu })
}

/// What Linux counts of this process so far, in hundredths.
fn cpu_seconds() -> Result<f64> {
    let status = std::fs::read_to_string("/proc/self/stat").context("/proc is read for CPU time")?;
    let (_, fields) = status.rsplit_once(')').context("no name in /proc/self/stat")?;
    let ticks: Vec<f64> = fields.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    // after the state, which is no number, come ten others
    Ok(ticks.get(10..12).context("no times in /proc/self/stat")?.iter().sum::<f64>() / 100.0)
}

/// GB that all cores read, each in eight places at once: a second, and a CPU second.
fn memory_speed() -> Result<[f64; 2]> {
    const WORDS: usize = 1 << 26; // 512 MiB
    const PASSES: usize = 8;
    let words = vec![1_u64; WORDS];
    let cores = rayon::current_num_threads();
    let pass = || {
        words.par_chunks(WORDS / cores).for_each(|part| {
            let streams: Vec<&[[u64; 8]]> =
                part.chunks(part.len() / 8).map(|stream| stream.as_chunks().0).collect();
            let mut sums = [[0_u64; 8]; 8];
            for i in 0..streams.iter().map(|stream| stream.len()).min().unwrap_or(0) {
                for (sums, stream) in sums.iter_mut().zip(&streams) {
                    for (sum, word) in sums.iter_mut().zip(&stream[i]) {
                        *sum ^= *word;
                    }
                }
            }
            black_box(sums);
        });
    };
    let Time { wall, cpu } = timed(|| {
        (0..PASSES).for_each(|_| pass());
        Ok(())
    })?;
    let read = gb(8 * WORDS * PASSES);
    Ok([read / wall, read / cpu])
}
