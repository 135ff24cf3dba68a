//! What is kept of a forward pass for the backward pass is what `volary plan` says: allocations of tiny models, counted.
#![allow(clippy::unwrap_used)] // a test may panic

use std::alloc::{GlobalAlloc, Layout as Memory, System};
use std::sync::atomic::{AtomicI64, Ordering};

use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use volary::causal::next_token_loss;
use volary::llama::LlamaConfig;
use volary::m6::M6Config;
use volary::mixtral::MixtralConfig;
use volary::plan::{Layout, Outline};
use volary::preset::Shape;
use volary::registry::preset;
use volary::switch_transformers::{Sparse, SwitchConfig};
use volary::t5::{MlpForm, T5Config, T5Input};
use volary_kernels::moe::Phase;
use volary_kernels::ops::{Activation, Mask};
use volary_kernels::random::seeded;

/// Counts what the whole process holds.
struct Counting;

static HELD: AtomicI64 = AtomicI64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Memory) -> *mut u8 {
        HELD.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: the caller's promises are those that the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Memory) -> *mut u8 {
        HELD.fetch_add(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Memory) {
        HELD.fetch_sub(layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Memory, size: usize) -> *mut u8 {
        HELD.fetch_add(size as i64 - layout.size() as i64, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const BATCH: usize = 16;
const SEQUENCE: usize = 40;

/// A model, and the loss of a forward pass.
struct Tiny {
    name: String,
    shape: Shape,
    run: Box<dyn Fn() -> Tensor<1>>,
}

impl Tiny {
    /// Bytes that are held between the forward and the backward pass.
    fn kept(&self) -> i64 {
        let pass = || {
            let before = HELD.load(Ordering::Relaxed);
            let loss = (self.run)();
            let kept = HELD.load(Ordering::Relaxed) - before;
            drop(loss.backward());
            kept
        };
        // parameters are allocated in the first pass, and so is what kernels hold for the next time
        pass();
        pass();
        pass()
    }

    /// Bytes that the plan has for them.
    fn planned(&self) -> i64 {
        let [batch, sequence] = [BATCH, SEQUENCE].map(|size| size as u64);
        let layout = Layout { data: 1, tensor: 1, expert: 1, pipeline: 1, batch, sequence, bytes: 4 };
        Outline::of(&self.shape).unwrap().plan(&layout).unwrap().stages[0].activations as i64
    }
}

fn ids(device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = (0..(BATCH * SEQUENCE) as i64).map(|at| at * at * 7 % 199).collect();
    Tensor::from_data(TensorData::new(ids, [BATCH, SEQUENCE]), device)
}

fn shape(name: &str) -> &'static Shape {
    &preset(name).unwrap().1.shape
}

fn llama(device: &Device) -> (LlamaConfig, Tiny) {
    let Shape::Llama(config) = shape("LLaMA-7B") else { panic!("a LLaMA") };
    let config = LlamaConfig {
        vocab_size: 300,
        d_model: 80,
        d_ff: 112,
        n_layers: 3,
        n_heads: 6,
        n_kv_heads: 2,
        d_head: 16,
        ..config.clone()
    };
    let model = seeded(1, device, |device| config.init(device)).train();
    let ids = ids(device);
    let run = Box::new(move || {
        let logits = model.logits(model.forward(ids.clone()));
        next_token_loss(logits, ids.clone(), None).unwrap()
    });
    (config.clone(), Tiny { name: "LLaMA".into(), shape: Shape::Llama(config), run })
}

fn mixtral(llama: LlamaConfig, n_experts: usize, device: &Device) -> Tiny {
    let config = MixtralConfig { llama, n_experts, top_k: 2 };
    let model = seeded(1, device, |device| config.init(device)).train();
    let ids = ids(device);
    let run = Box::new(move || {
        let logits = model.around.logits(model.forward(ids.clone()).states);
        next_token_loss(logits, ids.clone(), None).unwrap()
    });
    Tiny { name: format!("Mixtral of {n_experts}"), shape: Shape::Mixtral(config), run }
}

fn m6(n_experts: usize, device: &Device) -> Tiny {
    let Shape::M6(config) = shape("M6-10T") else { panic!("an M6") };
    let sizes = M6Config { n_layers: 3, d_model: 80, n_heads: 5, d_ff: 112, ..config.clone() };
    let config = M6Config { shared: false, n_experts, n_prototypes: 2, ..sizes };
    let model = seeded(1, device, |device| config.init(device)).train();
    let x: Tensor<3> = Tensor::ones([BATCH, SEQUENCE, 80], device).require_grad();
    let run = Box::new(move || model.forward(x.clone(), &Mask::Causal, Phase::Train).0.sum());
    Tiny { name: format!("M6 of {n_experts}"), shape: Shape::M6(config), run }
}

fn t5(mlp: MlpForm, activation: Activation) -> T5Config {
    let Shape::T5(config) = shape("google-t5/t5-small") else { panic!("a T5") };
    T5Config {
        vocab_size: 300,
        d_model: 80,
        d_ff: 112,
        n_layers: 2,
        n_decoder_layers: 1,
        n_heads: 6,
        d_head: 16,
        mlp,
        activation,
        ..config.clone()
    }
}

fn input(ids: &Tensor<2, Int>) -> T5Input {
    T5Input {
        ids: ids.clone(),
        mask: Mask::Full,
        decoder_ids: ids.clone(),
        decoder_mask: Mask::Full,
        cross_mask: Mask::Full,
    }
}

fn dense_t5(mlp: MlpForm, activation: Activation, device: &Device) -> Tiny {
    let config = t5(mlp, activation);
    let model = seeded(1, device, |device| config.init(device)).train();
    let ids = ids(device);
    let run = Box::new(move || {
        let logits = model.logits(model.forward(input(&ids)).decoder);
        next_token_loss(logits, ids.clone(), None).unwrap()
    });
    Tiny { name: format!("T5, {mlp:?} {activation:?}"), shape: Shape::T5(config), run }
}

fn switch(device: &Device) -> Tiny {
    let Shape::Switch(config) = shape("google/switch-base-8") else { panic!("a Switch") };
    let config = SwitchConfig {
        t5: t5(MlpForm::Plain, Activation::Relu),
        n_experts: 1,
        sparse_encoder: Sparse::Always,
        sparse_decoder: Sparse::Always,
        ..config.clone()
    };
    let model = seeded(1, device, |device| config.init(device)).train();
    let ids = ids(device);
    let run = Box::new(move || {
        let logits = model.logits(model.forward(input(&ids)).decoder);
        next_token_loss(logits, ids.clone(), None).unwrap()
    });
    Tiny { name: "Switch".into(), shape: Shape::Switch(config), run }
}

/// One test: others would be counted with it. All experts have the same load, as every token goes to all of them.
#[test]
fn what_is_kept_is_what_is_planned() {
    rayon::ThreadPoolBuilder::new().num_threads(1).build_global().unwrap();
    let device = &Device::flex().autodiff();
    let (config, dense) = llama(device);
    let mut models = vec![dense, mixtral(config.clone(), 2, device), m6(2, device), switch(device)];
    for mlp in [MlpForm::Plain, MlpForm::Gated] {
        for activation in Activation::ALL {
            models.push(dense_t5(mlp, activation, device));
        }
    }
    for model in &models {
        let (kept, planned) = (model.kept() as f64, model.planned() as f64);
        let (name, of_planned) = (&model.name, kept / planned);
        assert!((1.0..1.03).contains(&of_planned), "{name}: {kept} bytes are {of_planned:.4} of {planned}");
    }

    // experts are there once more, and their rows up to twice
    let (d_model, d_ff, n_layers) = (config.d_model, config.d_ff, config.n_layers);
    let uneven = mixtral(config, 7, device);
    let (kept, planned) = (uneven.kept(), uneven.planned());
    let experts = (4 * n_layers * 7 * 3 * d_model * d_ff) as i64;
    let padding = (4 * n_layers * BATCH * SEQUENCE * 2 * (2 * d_model + d_ff)) as i64;
    assert!(
        (planned + experts..planned + experts + padding).contains(&kept),
        "{kept} {planned} {experts} {padding}"
    );
}
