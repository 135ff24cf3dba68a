use burn::config::Config;
use burn::module::{Initializer, Module, Param};
use burn::tensor::{Device, Tensor};

use crate::ops::Activation;
use crate::ops::moe::{Dispatch, Projection, grouped_linear, grouped_mlp};

/// A projection of each expert.
#[derive(Module, Debug)]
pub struct ExpertLinear {
    /// `[n_experts, d_in, d_out]`.
    pub weight: Param<Tensor<3>>,
    /// `[n_experts, d_out]`.
    pub bias: Option<Param<Tensor<2>>>,
}

/// Configuration of an [`ExpertMlp`] or a [`GatedExpertMlp`].
#[derive(Config, Debug)]
pub struct ExpertMlpConfig {
    /// Number of experts.
    pub n_experts: usize,
    /// Width of input and output.
    pub d_model: usize,
    /// Width between the projections.
    pub d_ff: usize,
    /// Whether the projections have biases.
    #[config(default = true)]
    pub bias: bool,
}

/// `down(act(up(x)))` of each expert.
#[derive(Module, Debug)]
pub struct ExpertMlp {
    /// `[n_experts, d_model, d_ff]`.
    pub up: ExpertLinear,
    /// `[n_experts, d_ff, d_model]`.
    pub down: ExpertLinear,
}

/// `down(act(gate(x)) * up(x))` of each expert.
#[derive(Module, Debug)]
pub struct GatedExpertMlp {
    /// `[n_experts, d_model, d_ff]`, goes through the activation.
    pub gate: ExpertLinear,
    /// `[n_experts, d_model, d_ff]`.
    pub up: ExpertLinear,
    /// `[n_experts, d_ff, d_model]`.
    pub down: ExpertLinear,
}

/// Experts of either form.
#[derive(Module, Debug)]
pub enum Experts {
    /// Two projections each.
    Plain(ExpertMlp),
    /// Three.
    Gated(GatedExpertMlp),
}

impl ExpertMlpConfig {
    /// Untrained experts with two projections. Nothing is allocated before first use.
    pub fn init(&self, device: &Device) -> ExpertMlp {
        ExpertMlp { up: self.up(device), down: self.down(device) }
    }

    /// Untrained experts with three projections. Nothing is allocated before first use.
    pub fn init_gated(&self, device: &Device) -> GatedExpertMlp {
        GatedExpertMlp { gate: self.up(device), up: self.up(device), down: self.down(device) }
    }

    fn up(&self, device: &Device) -> ExpertLinear {
        ExpertLinear::new(self.n_experts, self.d_model, self.d_ff, self.bias, device)
    }

    fn down(&self, device: &Device) -> ExpertLinear {
        ExpertLinear::new(self.n_experts, self.d_ff, self.d_model, self.bias, device)
    }
}

impl ExpertLinear {
    /// Untrained: uniform in `±1/√d_in`. Nothing is allocated before first use.
    fn new(n_experts: usize, d_in: usize, d_out: usize, bias: bool, device: &Device) -> Self {
        let bound = 1.0 / (d_in as f64).sqrt();
        let uniform = Initializer::Uniform { min: -bound, max: bound };
        Self {
            weight: uniform.init([n_experts, d_in, d_out], device),
            bias: bias.then(|| uniform.init([n_experts, d_out], device)),
        }
    }

    /// `[rows, d_in] -> [rows, d_out]`, each through its expert.
    ///
    /// # Panics
    /// If there are not as many rows or experts as in `dispatch`.
    pub fn forward(&self, rows: Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
        grouped_linear(rows, &self.projection(), dispatch)
    }

    fn projection(&self) -> Projection {
        Projection { weight: self.weight.val(), bias: self.bias.as_ref().map(|bias| bias.val()) }
    }
}

impl ExpertMlp {
    /// `[rows, d_model] -> [rows, d_model]`, each through its expert.
    ///
    /// # Panics
    /// If there are not as many rows or experts as in `dispatch`.
    pub fn forward(&self, rows: Tensor<2>, activation: Activation, dispatch: &Dispatch) -> Tensor<2> {
        grouped_mlp(rows, None, &self.up.projection(), &self.down.projection(), activation, dispatch)
    }
}

impl GatedExpertMlp {
    /// `[rows, d_model] -> [rows, d_model]`, each through its expert.
    ///
    /// # Panics
    /// If there are not as many rows or experts as in `dispatch`.
    pub fn forward(&self, rows: Tensor<2>, activation: Activation, dispatch: &Dispatch) -> Tensor<2> {
        let [gate, up, down] = [&self.gate, &self.up, &self.down].map(ExpertLinear::projection);
        grouped_mlp(rows, Some(&gate), &up, &down, activation, dispatch)
    }
}

impl Experts {
    /// How many there are.
    pub fn n_experts(&self) -> usize {
        self.up().weight.lazy_shape()[0]
    }

    /// The projection that both forms have first.
    pub(in crate::moe) fn up(&self) -> &ExpertLinear {
        match self {
            Experts::Plain(experts) => &experts.up,
            Experts::Gated(experts) => &experts.up,
        }
    }

    /// `[rows, d_model] -> [rows, d_model]`, each through its expert.
    ///
    /// # Panics
    /// If there are not as many rows or experts as in `dispatch`.
    pub fn forward(&self, rows: Tensor<2>, activation: Activation, dispatch: &Dispatch) -> Tensor<2> {
        match self {
            Experts::Plain(experts) => experts.forward(rows, activation, dispatch),
            Experts::Gated(experts) => experts.forward(rows, activation, dispatch),
        }
    }
}
