//! The products of a mixture of experts on a GPU: 2,048 tokens, 512 wide, 8 experts 2,048 wide of which each token goes to
//! two. All experts in one launch, beside a loop of Burn's own products, one for each expert, in f32 and in bf16.
//!
//! ```sh
//! cargo bench -p volary-kernels --features cuda --bench grouped_matmul -- [rounds]
//! ```
//!
//! With `--features cube-cpu` it runs on CubeCL's CPU runtime, which shows that it works and nothing of a GPU's speed.
//! Both must agree with the products on this machine's CPU before anything is timed.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use burn::tensor::{DType, Device, DeviceType, Tensor, TensorData};
use volary_kernels::ops::moe::{Dispatch, combine, grouped_matmul, permute};

const TOKENS: usize = 2048;
const D_MODEL: usize = 512;
const D_FF: usize = 2048;
const EXPERTS: usize = 8;
const TOP_K: usize = 2;

fn main() -> Result<()> {
    let rounds = std::env::args().skip(1).find(|word| word != "--bench");
    let rounds: usize = rounds.map_or(Ok(20), |word| word.parse())?;
    let device = device()?;
    println!(
        "{device:?}\n\n| what | type | program | milliseconds | TFLOP/s |\n| --- | --- | --- | --- | --- |"
    );
    let mut rng = fastrand::Rng::with_seed(1);
    let choices: Vec<Option<usize>> = (0..TOKENS * TOP_K).map(|_| Some(rng.usize(0..EXPERTS))).collect();
    let dispatch = Dispatch::new(&choices, TOP_K, EXPERTS);
    for dtype in [DType::F32, DType::BF16] {
        for (what, d_in, d_out) in [("up", D_MODEL, D_FF), ("down", D_FF, D_MODEL)] {
            let x = random(&mut rng, [dispatch.rows(), d_in], dtype);
            let weight = random(&mut rng, [EXPERTS, d_in, d_out], dtype);
            let expected =
                grouped_matmul(x.clone().cast(DType::F32), weight.clone().cast(DType::F32), &dispatch);
            let (x, weight) = (x.to_device(&device), weight.to_device(&device));
            let one = || grouped_matmul(x.clone(), weight.clone(), &dispatch);
            let each = || expert_by_expert(&x, &weight, &dispatch);
            let flops = 2.0 * (dispatch.rows() * d_in * d_out) as f64;
            for (program, run) in
                [("one launch", &one as &dyn Fn() -> Tensor<2>), ("expert by expert", &each)]
            {
                agree(run(), &expected, dtype).with_context(|| format!("{what}, {dtype:?}, {program}"))?;
                let seconds = time(run, rounds, &device)?;
                let rate = flops / seconds / 1e12;
                println!("| {what} | {dtype:?} | {program} | {:.4} | {rate:.2} |", seconds * 1e3);
            }
        }
        let x = random(&mut rng, [TOKENS, D_MODEL], dtype).to_device(&device);
        let mix = random(&mut rng, [TOKENS, TOP_K], dtype).to_device(&device);
        let rows = permute(x.clone(), &dispatch);
        for (what, run) in [
            ("permute", &(|| permute(x.clone(), &dispatch)) as &dyn Fn() -> Tensor<2>),
            ("combine", &|| combine(rows.clone(), mix.clone(), &dispatch)),
        ] {
            let seconds = time(run, rounds, &device)?;
            println!("| {what} | {dtype:?} | one launch | {:.4} | |", seconds * 1e3);
        }
    }
    Ok(())
}

fn device() -> Result<Device> {
    #[cfg(feature = "cuda")]
    let kind = DeviceType::Cuda;
    #[cfg(not(feature = "cuda"))]
    let kind = DeviceType::Cpu;
    let devices = Device::enumerate(kind.clone()).into_vec();
    devices.into_iter().next().with_context(|| format!("this machine has no device of the kind {kind:?}"))
}

/// Values in `-1..1`, of this type.
fn random<const D: usize>(rng: &mut fastrand::Rng, shape: [usize; D], dtype: DType) -> Tensor<D> {
    let values: Vec<f32> = (0..shape.iter().product()).map(|_| rng.f32() * 2.0 - 1.0).collect();
    Tensor::from_data(TensorData::new(values, shape), &Device::flex()).cast(dtype)
}

/// One product after the other.
fn expert_by_expert(x: &Tensor<2>, weight: &Tensor<3>, dispatch: &Dispatch) -> Tensor<2> {
    let experts = (0..dispatch.n_experts()).map(|expert| (expert, dispatch.segment(expert)));
    let products = experts.filter(|(_, rows)| !rows.is_empty()).map(|(expert, rows)| {
        let weight = weight.clone().narrow(0, expert, 1).squeeze_dim::<2>(0);
        x.clone().narrow(0, rows.start, rows.len()).matmul(weight)
    });
    Tensor::cat(products.collect(), 0)
}

/// Whether no value is further off than rounding makes it, in parts of the greatest.
fn agree(found: Tensor<2>, expected: &Tensor<2>, dtype: DType) -> Result<()> {
    let found = found.to_device(&Device::flex()).cast(DType::F32);
    let greatest = expected.clone().abs().max().into_scalar::<f32>();
    let error = (found - expected.clone()).abs().max().into_scalar::<f32>() / greatest;
    let tolerance = if dtype == DType::F32 { 1e-5 } else { 1e-2 };
    ensure!(error <= tolerance, "off by {error} of the greatest value, more than {tolerance}");
    Ok(())
}

/// Seconds of a run: the median of `rounds` of ten each.
fn time(run: &dyn Fn() -> Tensor<2>, rounds: usize, device: &Device) -> Result<f64> {
    const RUNS: usize = 10;
    let mut seconds = Vec::with_capacity(rounds);
    for _ in 0..rounds {
        device.sync()?;
        let start = Instant::now();
        for _ in 0..RUNS {
            std::hint::black_box(run());
        }
        device.sync()?;
        seconds.push(start.elapsed().as_secs_f64() / RUNS as f64);
    }
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().context("at least one round")
}
