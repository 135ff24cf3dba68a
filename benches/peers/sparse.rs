//! The sparse layer of two benches: 2,048 tokens, 512 wide, 8 experts 2,048 wide of which each token goes to two; and an MLP
//! of as many products.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result};
use burn::module::Param;
use burn::tensor::{DType, Device, Distribution, Tensor, TensorData};
use volary_kernels::layers::{Linear, Mlp};
use volary_kernels::moe::gate::NaiveGate;
use volary_kernels::moe::{ExpertLinear, ExpertMlp, Experts, Gate, Moe, MoeConfig, Noise, Phase};
use volary_kernels::ops::Activation;

use super::program;

pub const TOKENS: usize = 2048;
const D_MODEL: usize = 512;
const D_FF: usize = 2048;
pub const EXPERTS: usize = 8;
pub const TOP_K: usize = 2;
/// What the peers look for in the folder that they are given.
const FILE: &str = "moe.f32";

/// The shapes of tokens, router, experts and the MLP, in the order of the file.
fn shapes() -> [Vec<usize>; 10] {
    let wide = TOP_K * D_FF;
    [
        vec![TOKENS, D_MODEL],
        vec![EXPERTS, D_MODEL],
        vec![EXPERTS, D_MODEL, D_FF],
        vec![EXPERTS, D_FF],
        vec![EXPERTS, D_FF, D_MODEL],
        vec![EXPERTS, D_MODEL],
        vec![wide, D_MODEL],
        vec![wide],
        vec![D_MODEL, wide],
        vec![D_MODEL],
    ]
}

/// Normal tokens; weights uniform in `±1/√d_in`, about.
pub fn write(folder: &Path) -> Result<()> {
    let device = Device::flex();
    device.seed(1);
    let values = |shape: Vec<usize>| {
        let count: usize = shape.iter().product();
        let (tokens, bound) = (shape[0] == TOKENS, 1.0 / (D_MODEL as f64).sqrt());
        let uniform = Distribution::Uniform(-bound, bound);
        let distribution = if tokens { Distribution::Normal(0.0, 1.0) } else { uniform };
        Tensor::<1>::random([count], distribution, &device).into_data().iter::<f32>().collect::<Vec<_>>()
    };
    program::write(&folder.join(FILE), &shapes().into_iter().flat_map(values).collect::<Vec<_>>())
}

/// Tokens, and what they go through.
pub struct Sparse {
    pub x: Tensor<2>,
    pub layer: Moe,
    pub dense: Mlp,
}

impl Sparse {
    /// What [`write()`] wrote, in a dtype.
    pub fn read(folder: &Path, dtype: DType, device: &Device) -> Result<Self> {
        let mut file = BufReader::new(File::open(folder.join(FILE))?);
        let mut shapes = shapes().into_iter();
        let mut next = || -> Result<TensorData> {
            let shape = shapes.next().context("there are no more")?;
            let mut bytes = vec![0; 4 * shape.iter().product::<usize>()];
            file.read_exact(&mut bytes)?;
            let values: Vec<f32> =
                bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            Ok(TensorData::new(values, shape))
        };
        let x = Tensor::<2>::from_data(next()?, device).cast(dtype);
        let two = |data| Param::from_tensor(Tensor::<2>::from_data(data, device).cast(dtype));
        let three = |data| Param::from_tensor(Tensor::<3>::from_data(data, device).cast(dtype));
        let one = |data| Some(Param::from_tensor(Tensor::<1>::from_data(data, device).cast(dtype)));
        let gate = NaiveGate { gate: Linear { weight: two(next()?), bias: None }, top_k: TOP_K };
        let up = ExpertLinear { weight: three(next()?), bias: Some(two(next()?)) };
        let down = ExpertLinear { weight: three(next()?), bias: Some(two(next()?)) };
        let mut layer = untrained(EXPERTS, device);
        layer.gate = Gate::Naive(gate);
        layer.experts = Experts::Plain(ExpertMlp { up, down });
        let dense = Mlp {
            up: Linear { weight: two(next()?), bias: one(next()?) },
            down: Linear { weight: two(next()?), bias: one(next()?) },
        };
        Ok(Self { x, layer, dense })
    }
}

/// A layer of so many experts.
pub fn untrained(n_experts: usize, device: &Device) -> Moe {
    let gate = Gate::Naive(NaiveGate::new(D_MODEL, n_experts, TOP_K, device));
    MoeConfig::new(n_experts, D_MODEL, D_FF).init(gate, Activation::Gelu, device)
}

pub fn forward(layer: &Moe, x: Tensor<2>) -> Tensor<2> {
    layer.forward(x, Phase::Eval, &mut Noise::Seeded(0)).0
}
