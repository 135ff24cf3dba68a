use burn::module::{Initializer, Module, Param, RunningState};
use burn::tensor::{Device, Tensor};

use crate::ops::{self, Activation};

/// `(x - mean) / √(variance + eps) * weight + bias` over the last axis (Ba et al. 2016).
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[d_model]`.
    pub weight: Param<Tensor<1>>,
    /// `[d_model]`.
    pub bias: Option<Param<Tensor<1>>>,
    eps: f64,
}

impl LayerNorm {
    /// The identity scale over `d_model` channels, with a bias.
    pub fn new(d_model: usize, eps: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Ones.init([d_model], device),
            bias: Some(Initializer::Zeros.init([d_model], device)),
            eps,
        }
    }

    /// `[..., d_model] -> [..., d_model]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::layer_norm(x, self.weight.val(), self.bias(), self.eps)
    }

    /// `x + y`, and the norm of it, each `[..., d_model]`; see [`ops::add_layer_norm`].
    pub fn add<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        ops::add_layer_norm(x, y, self.weight.val(), self.bias(), self.eps)
    }

    /// The norm of `x + y`, `[..., d_model]`; see [`ops::layer_norm_of_sum`].
    pub fn of_sum<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> Tensor<D> {
        ops::layer_norm_of_sum(x, y, self.weight.val(), self.bias(), self.eps)
    }

    fn bias(&self) -> Option<Tensor<1>> {
        self.bias.as_ref().map(|bias| bias.val())
    }
}

/// `x / √(mean(x²) + eps) * weight` over the last axis (Zhang & Sennrich 2019).
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d_model]`.
    pub weight: Param<Tensor<1>>,
    eps: f64,
}

impl RmsNorm {
    /// The identity scale over `d_model` channels.
    pub fn new(d_model: usize, eps: f64, device: &Device) -> Self {
        Self { weight: Initializer::Ones.init([d_model], device), eps }
    }

    /// `[..., d_model] -> [..., d_model]`.
    ///
    /// Half precision is normalised in f32, where the squares do not overflow, and rounded at the end.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }

    /// `x + y`, and the norm of it, each `[..., d_model]`; see [`ops::add_rms_norm`].
    pub fn add<const D: usize>(&self, x: Tensor<D>, y: Tensor<D>) -> (Tensor<D>, Tensor<D>) {
        ops::add_rms_norm(x, y, self.weight.val(), self.eps)
    }
}

/// Normalisation of groups of neighbouring channels (Wu & He 2018), channels first; see [`ops::group_norm`].
#[derive(Module, Debug)]
pub struct GroupNorm {
    /// `[channels]`.
    pub weight: Param<Tensor<1>>,
    /// `[channels]`.
    pub bias: Param<Tensor<1>>,
    n_groups: usize,
    eps: f64,
}

impl GroupNorm {
    /// The identity scale over `channels` in `n_groups` groups.
    pub fn new(channels: usize, n_groups: usize, eps: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Ones.init([channels], device),
            bias: Initializer::Zeros.init([channels], device),
            n_groups,
            eps,
        }
    }

    /// `[batch, channels, ...] -> [batch, channels, ...]`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        ops::group_norm(x, self.weight.val(), self.bias.val(), self.n_groups, self.eps, None)
    }

    /// The same with an activation after it.
    pub fn activated<const D: usize>(&self, x: Tensor<D>, activation: Activation) -> Tensor<D> {
        let activation = Some(activation);
        ops::group_norm(x, self.weight.val(), self.bias.val(), self.n_groups, self.eps, activation)
    }
}

/// Normalisation of every channel over the batch (Ioffe & Szegedy 2015), channels last.
///
/// On an autodiff device it uses the batch's statistics and updates the running ones, elsewhere the
/// running ones.
#[derive(Module, Debug)]
pub struct BatchNorm {
    /// `[channels]`.
    pub weight: Param<Tensor<1>>,
    /// `[channels]`.
    pub bias: Param<Tensor<1>>,
    /// `[channels]`.
    pub running_mean: RunningState<Tensor<1>>,
    /// `[channels]`, the unbiased variance.
    pub running_var: RunningState<Tensor<1>>,
    eps: f64,
}

impl BatchNorm {
    /// The share of a new batch in the running statistics, PyTorch's default.
    const MOMENTUM: f64 = 0.1;

    /// The identity over `channels`, with running statistics of a standard normal.
    pub fn new(channels: usize, eps: f64, device: &Device) -> Self {
        Self {
            weight: Initializer::Ones.init([channels], device),
            bias: Initializer::Zeros.init([channels], device),
            running_mean: RunningState::new(Tensor::zeros([channels], device)),
            running_var: RunningState::new(Tensor::ones([channels], device)),
            eps,
        }
    }

    /// `[rows, channels] -> [rows, channels]`, where the rows are all positions of all pictures.
    pub fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        if x.device().is_autodiff() {
            self.forward_train(x)
        } else {
            let inverse = (self.running_var.value() + self.eps).sqrt().recip();
            let scale = self.weight.val() * inverse;
            let shift = self.bias.val() - self.running_mean.value() * scale.clone();
            x * scale.unsqueeze() + shift.unsqueeze()
        }
    }

    fn forward_train(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, channels] = x.dims();
        let mean = x.clone().mean_dim(0); // [1, channels]
        let centred = x - mean.clone();
        let variance = centred.clone().square().mean_dim(0); // [1, channels]
        let unbiased = rows as f64 / (rows.max(2) - 1) as f64;
        blend(&self.running_mean, mean.detach().reshape([channels]), Self::MOMENTUM);
        blend(&self.running_var, variance.clone().detach().reshape([channels]) * unbiased, Self::MOMENTUM);
        let scale = self.weight.val().unsqueeze() * (variance + self.eps).sqrt().recip();
        centred * scale + self.bias.val().unsqueeze()
    }
}

fn blend(running: &RunningState<Tensor<1>>, new: Tensor<1>, momentum: f64) {
    let old = running.value_sync().to_device(&new.device());
    running.update((old * (1.0 - momentum) + new * momentum).detach());
}

#[cfg(test)]
mod tests;
