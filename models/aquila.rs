//! Aquila: causal text decoders for Chinese and English in LLaMA's shape ([`crate::llama`]), by BAAI (2023,
//! <https://github.com/FlagAI-Open/FlagAI/tree/master/examples/Aquila>): Aquila-7B and 33B, AquilaChat-7B, AquilaCode.
//!
//! Two layouts are read: the hub's, which has transformers' names; and FlagAI's own, which has Meta's
//! ([`crate::llama::original`]), with queries, keys and values apart or in one (`Wqkv`), in `pytorch_model.bin` under
//! `module`. The numbers match FlagAI's `AQUILAModel` and `transformers` (`LlamaForCausalLM`).
//!
//! AquilaChat wants its turns as `###Human: ...###Assistant:` after a sentence that says who speaks. It is there in 7B; no
//! 33B tuned for chats was found. The base models add 1e-6 to mean squares, those for chats and code 1e-5: the folder's
//! configuration decides. It may name ids of special tokens outside of the vocabulary, which are not read.
//!
//! ```sh
//! volary forward path/to/Aquila-7B --input in.safetensors --output out.safetensors
//! ```

use crate::llama::{LLAMA_7B, LLAMA_33B, LlamaConfig, SYSTEM as LLAMA};
use crate::preset::{Preset, Shape, Weights};
use crate::registry::System;

/// The hub's `config.json` of each.
const AQUILA_7B: LlamaConfig = LlamaConfig { vocab_size: 100_008, ..LLAMA_7B };
const AQUILA_33B: LlamaConfig = LlamaConfig { vocab_size: 100_008, ..LLAMA_33B };
const CHAT_7B: LlamaConfig = LlamaConfig { rms_norm_eps: 1e-5, ..AQUILA_7B };

const fn preset(name: &'static str, config: LlamaConfig, parameters: usize) -> Preset {
    let source = "transformers, LlamaForCausalLM";
    let license = "BAAI Aquila Model Licence Agreement";
    Preset { name, shape: Shape::Llama(config), weights: Weights::Hub, license, parameters, source }
}

/// Published sizes.
pub const PRESETS: &[Preset] = &[
    preset("BAAI/Aquila-7B", AQUILA_7B, 7_295_537_152),
    preset("BAAI/AquilaChat-7B", CHAT_7B, 7_295_537_152),
    preset("BAAI/AquilaCode-multi", CHAT_7B, 7_295_537_152),
    preset("BAAI/AquilaCode-py", CHAT_7B, 7_295_537_152),
    preset("BAAI/Aquila-33B", AQUILA_33B, 33_434_266_112),
];

/// Aquila as the registry knows it.
pub const SYSTEM: System = System {
    name: "aquila",
    about: "causal text decoders for Chinese and English: Aquila, AquilaChat, AquilaCode",
    file: "models/aquila.rs",
    proved: &["aquila_flagai", "aquila_flagai_wqkv", "aquila_hf"],
    presets: PRESETS,
    recognises: |_, config| config.is_some_and(|config| config.text("model_type") == Some("aquila")),
    ..LLAMA
};

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::{Path, PathBuf};

    use burn::tensor::{Device, TensorData, Tolerance};
    use volary_weights::{LoadOptions, read_tensors};

    use super::*;
    use crate::folder::Folder;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
    }

    fn run(folder: &Path) -> BTreeMap<String, TensorData> {
        let inputs = read_tensors(&fixture("aquila_flagai").join("inputs.safetensors")).unwrap();
        let folder = Folder::Disk(folder.into());
        assert_eq!(System::of(&folder).unwrap().name, "aquila");
        let (options, device) = (LoadOptions::default(), Device::flex());
        crate::registry::forward(&folder, &inputs, &options, &device).unwrap().into_iter().collect()
    }

    /// FlagAI's wrapped torch file holds the numbers of the safetensors beside it, with heads of adjacent channels; the
    /// fused one and the hub's have the same function.
    #[test]
    fn all_layouts_are_one_function() {
        let folder = std::env::temp_dir().join(format!("volary-aquila-bin-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for file in ["config.json", "pytorch_model.bin"] {
            std::fs::copy(fixture("aquila_flagai").join(file), folder.join(file)).unwrap();
        }
        let expected = run(&fixture("aquila_flagai"));
        let bin = run(&folder);
        let others = ["aquila_flagai_wqkv", "aquila_hf"].map(|name| run(&fixture(name)));
        for found in [bin].iter().chain(&others) {
            assert_eq!(found["greedy.tokens"], expected["greedy.tokens"]);
            found["logits"].assert_approx_eq::<f32>(&expected["logits"], Tolerance::absolute(5e-5));
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
