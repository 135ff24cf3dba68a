"""Writes tests/fixtures/taiyi: a tiny text tower of Taiyi-CLIP, by transformers' BertForSequenceClassification.

usage: taiyi.py FOLDER        needs transformers 5.23.0 (Apache-2.0), torch, safetensors

Every parameter is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64, or 1e-5.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import save_file

SEED = 20911
LABELS = 512


def build():
    config = transformers.BertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=14,
        layer_norm_eps=1e-4,
        num_labels=LABELS,
    )
    return transformers.BertForSequenceClassification(config).eval()


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator)
            state[key] = value + 0.1 * noise if value.dim() < 2 else noise * value.shape[-1] ** -0.5
    model.load_state_dict(state)


def main():
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    model = build()
    redraw(model, generator)
    mask = torch.ones(3, 9, dtype=torch.int64)
    mask[1, 5:], mask[2, 7:] = 0, 0
    inputs = {
        "input_ids": torch.randint(1, 60, (3, 9), generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (3, 9), generator=generator),
    }
    with torch.no_grad():
        logits = model(**inputs).logits
        exact = model.double()(**inputs).logits
    model.float()
    difference = (logits.double() - exact).abs().max().item()
    atol = max(20 * difference, 1e-5)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
    save_file(inputs, folder / "inputs.safetensors")
    save_file({"logits": logits}, folder / "outputs.safetensors")
    model.config.architectures = ["BertForSequenceClassification"]
    config = {**model.config.to_diff_dict(), "id2label": {str(i): f"LABEL_{i}" for i in range(LABELS)}}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    reference = {
        "reference": f"transformers {transformers.__version__} BertForSequenceClassification",
        "seed": SEED,
        "tolerance": {
            "atol": atol,
            "rtol": 1e-5,
            "per_output": {"logits": {"atol": atol, "rtol": 1e-5, "f32_vs_f64": difference}},
        },
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }
    (folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")


main()
