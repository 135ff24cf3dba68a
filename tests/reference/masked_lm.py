"""Tiny masked language models in transformers' layout, with their scores.

Needs torch, transformers and safetensors. Run as: python tests/reference/masked_lm.py tests/fixtures
Writes bert_mlm, roberta_mlm and ernie_mlm. The tolerance is 20 times the difference between f32 and f64.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

COMMON = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=48,
    vocab_size=60,
    type_vocab_size=2,
    layer_norm_eps=1e-4,
)
CASES = {
    "bert_mlm": ("BertForMaskedLM", dict(COMMON, max_position_embeddings=16, pad_token_id=0), 4101),
    "roberta_mlm": ("RobertaForMaskedLM", dict(COMMON, max_position_embeddings=18, pad_token_id=1), 4102),
    "ernie_mlm": (
        "ErnieForMaskedLM",
        dict(COMMON, max_position_embeddings=16, pad_token_id=0, use_task_id=True, task_type_vocab_size=3),
        4103,
    ),
}


def write(folder, name, config, seed):
    torch.manual_seed(seed)
    architecture = getattr(transformers, name)
    model = architecture(architecture.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that every one matters
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (0.5 if parameter.ndim == 1 else 0.0))
    padding = config["pad_token_id"]
    ids = torch.randint(4, config["vocab_size"], (3, 11))
    mask = torch.ones_like(ids)
    for row, length in enumerate([11, 8, 5]):
        ids[row, length:] = padding
        mask[row, length:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.randint(0, 2, ids.shape)}
    if config.get("use_task_id"):
        inputs["task_type_ids"] = torch.randint(0, config["task_type_vocab_size"], ids.shape)
    with torch.no_grad():
        logits = model(**inputs).logits
        exact = model.double()(**inputs).logits
    error = (logits.double() - exact).abs().max().item()
    model.float().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    save_file({key: value.contiguous() for key, value in inputs.items()}, folder / "inputs.safetensors")
    save_file({"logits": logits.contiguous()}, folder / "outputs.safetensors")
    reference = {
        "reference": f"transformers {transformers.__version__} {name}",
        "seed": seed,
        "tolerance": {"atol": max(1e-5, 20 * error), "rtol": 1e-5},
        "f32_vs_f64_error": error,
        "output_scale": exact.abs().max().item(),
    }
    (folder / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")


def main():
    for name, (architecture, config, seed) in CASES.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, architecture, config, seed)


main()
