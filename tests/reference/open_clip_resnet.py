"""Writes tests/fixtures/open_clip_resnet: a tiny CLIP with a convolutional tower, by open_clip.

usage: open_clip_resnet.py FOLDER        needs open_clip_torch 3.3.0 (MIT), torch, safetensors

Every parameter and running statistic is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64.
"""
import json
import pathlib
import sys

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file

SEED = 20231
CONFIG = {
    "embed_dim": 20,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 3, "layers": 2},
}
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def build():
    return CLIP(
        embed_dim=CONFIG["embed_dim"],
        vision_cfg=dict(CONFIG["vision_cfg"]),
        text_cfg=dict(CONFIG["text_cfg"]),
        quick_gelu=CONFIG["quick_gelu"],
    ).eval()


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        if not value.is_floating_point() or key in ("logit_scale", "attn_mask"):
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        elif value.dim() < 2:
            state[key] = value + 0.1 * noise
        else:
            fan_in = value[0].numel() if value.dim() > 1 else value.numel()
            state[key] = noise * fan_in**-0.5
    model.load_state_dict(state)


def outputs(model, inputs):
    with torch.no_grad():
        image_features, text_features = model.encode_image(inputs["image"]), model.encode_text(inputs["text"])
        unit = [features / features.norm(dim=-1, keepdim=True) for features in (image_features, text_features)]
        logits = model.logit_scale.exp() * unit[0] @ unit[1].T
    return {
        "image_features": image_features,
        "text_features": text_features,
        "logits_per_image": logits,
        "logits_per_text": logits.T,
    }


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(SEED)
model = build()
redraw(model, generator)
text = torch.randint(1, 59, (3, 12), generator=generator)
for row, end in enumerate((11, 6, 3)):
    text[row, end] = 59  # the highest id ends a text
    text[row, end + 1 :] = 0
inputs = {"image": torch.randn(2, 3, 64, 64, generator=generator), "text": text}
found = outputs(model, inputs)
double = build().double()
double.load_state_dict(model.state_dict())
exact = outputs(double, {**inputs, "image": inputs["image"].double()})
per_output = {}
for key, value in found.items():
    error = (value.double() - exact[key]).abs().max().item()
    per_output[key] = {"atol": 20 * error, "rtol": 1e-5, "f32_vs_f64": error}
tensors = lambda named: {key: value.contiguous().clone() for key, value in named.items()}
save_file(tensors(model.state_dict()), folder / "open_clip_model.safetensors", {"format": "pt"})
save_file(tensors(inputs), folder / "inputs.safetensors")
save_file(tensors(found), folder / "outputs.safetensors")
config = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": MEAN, "std": STD}}
(folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
reference = {
    "reference": f"open_clip {open_clip.__version__} CLIP (ModifiedResNet)",
    "seed": SEED,
    "tolerance": {"atol": max(row["atol"] for row in per_output.values()), "rtol": 1e-5, "per_output": per_output},
    "params": sum(parameter.numel() for parameter in model.parameters()),
    "notes": "Features are not normalised; logits are of the normalised ones times exp(logit_scale).",
}
(folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")
