"""Writes tests/fixtures/align: a tiny ALIGN, by transformers.

usage: align.py FOLDER        needs transformers 5 (Apache-2.0), torch, safetensors

Every parameter and running statistic is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64.
The picture's sides are odd, even and not alike: the zeros around it do not depend on them.
"""
import json
import pathlib
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AlignConfig, AlignModel

SEED = 20414
VISION = {"width_coefficient": 0.1, "depth_coefficient": 0.5, "hidden_dim": 32, "image_size": 64}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 12,
}


def build():
    config = AlignConfig(text_config=TEXT, vision_config=VISION, projection_dim=32, temperature_init_value=0.07)
    return AlignModel(config).eval()


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        if not value.is_floating_point() or key == "temperature":
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        elif value.dim() < 2:
            state[key] = value + 0.2 * noise
        else:
            state[key] = noise * (2.0 / value[0].numel()) ** 0.5
        state[key] = state[key].half().float()  # the file holds halves
    model.load_state_dict(state)


def outputs(model, inputs):
    with torch.no_grad():
        found = model(**inputs)
    named = {key: found[key] for key in ("logits_per_image", "logits_per_text", "image_embeds", "text_embeds")}
    for part in ("vision_model_output", "text_model_output"):
        for key in ("last_hidden_state", "pooler_output"):
            named[f"{part}.{key}"] = found[part][key]
    return named


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(SEED)
model = build()
redraw(model, generator)
inputs = {
    "pixel_values": torch.randn(2, 3, 43, 66, generator=generator),
    "input_ids": torch.tensor([[1, 7, 9, 30, 2, 0], [1, 5, 39, 11, 8, 2], [1, 3, 2, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
}
found = outputs(model, inputs)
double = build().double()
double.load_state_dict(model.state_dict())
exact = outputs(double, {**inputs, "pixel_values": inputs["pixel_values"].double()})
per_output = {}
for key, value in found.items():
    error = (value.double() - exact[key]).abs().max().item()
    per_output[key] = {"atol": 20 * error, "rtol": 1e-5, "f32_vs_f64": error, "scale": value.abs().max().item()}
model.save_pretrained(folder)
stored = load_file(folder / "model.safetensors")  # the names are those that transformers writes
halves = {k: v.half() if v.is_floating_point() and k != "temperature" else v for k, v in stored.items()}
save_file(halves, folder / "model.safetensors", {"format": "pt"})
save_file(inputs, folder / "inputs.safetensors")
save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / "outputs.safetensors")
reference = {
    "reference": f"transformers {transformers.__version__} AlignModel",
    "seed": SEED,
    "tolerance": {"atol": max(row["atol"] for row in per_output.values()), "rtol": 1e-5, "per_output": per_output},
    "params": sum(parameter.numel() for parameter in model.parameters()),
    "notes": "The picture is 43 x 66.",
}
(folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")
