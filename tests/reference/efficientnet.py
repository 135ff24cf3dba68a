"""Writes tests/fixtures/efficientnet: a tiny EfficientNet with TensorFlow's padding, by timm.

usage: efficientnet.py FOLDER        needs timm 1.0 (Apache-2.0), torch, safetensors

Every parameter and running statistic is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64.
The picture's sides are odd, even and not alike, so that every way of padding is taken. `model_args` are those of timm's generator of
the family, which its public names fix.
"""
import json
import pathlib
import sys
from functools import partial

import timm
import torch
from safetensors.torch import save_file
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from timm.models.efficientnet import EfficientNet

SEED = 20232
CLASSES = 7
MULTIPLIERS = {"channel_multiplier": 0.1, "depth_multiplier": 0.5}
STAGES = [
    ["ds_r1_k3_s1_e1_c16_se0.25"],
    ["ir_r2_k3_s2_e6_c24_se0.25"],
    ["ir_r2_k5_s2_e6_c40_se0.25"],
    ["ir_r3_k3_s2_e6_c80_se0.25"],
    ["ir_r3_k5_s1_e6_c112_se0.25"],
    ["ir_r4_k5_s2_e6_c192_se0.25"],
    ["ir_r1_k3_s1_e6_c320_se0.25"],
]


def build():
    widths = partial(round_channels, multiplier=MULTIPLIERS["channel_multiplier"])
    return EfficientNet(
        block_args=decode_arch_def(STAGES, MULTIPLIERS["depth_multiplier"]),
        num_features=widths(1280),
        stem_size=32,
        round_chs_fn=widths,
        num_classes=CLASSES,
        pad_type="same",
        act_layer=torch.nn.SiLU,
        norm_layer=partial(torch.nn.BatchNorm2d, eps=1e-3),
    ).eval()


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        if not value.is_floating_point():
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


def outputs(model, image):
    with torch.no_grad():
        features = model.forward_features(image)
        return {"forward_features": features, "logits": model.forward_head(features)}


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(SEED)
model = build()
redraw(model, generator)
image = torch.randn(2, 3, 43, 34, generator=generator)
found = outputs(model, image)
double = build().double()
double.load_state_dict(model.state_dict())
exact = outputs(double, image.double())
per_output = {}
for key, value in found.items():
    error = (value.double() - exact[key]).abs().max().item()
    per_output[key] = {"atol": 20 * error, "rtol": 1e-5, "f32_vs_f64": error, "scale": value.abs().max().item()}
tensors = lambda named: {key: value.contiguous().clone() for key, value in named.items()}
halves = {key: value.half() if value.is_floating_point() else value for key, value in model.state_dict().items()}
save_file(tensors(halves), folder / "model.safetensors", {"format": "pt"})
save_file({"image": image}, folder / "inputs.safetensors")
save_file(tensors(found), folder / "outputs.safetensors")
config = {"architecture": "tf_efficientnet_b0", "num_classes": CLASSES, "model_args": MULTIPLIERS}
(folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
reference = {
    "reference": f"timm {timm.__version__} EfficientNet, pad_type same, BatchNorm eps 1e-3",
    "seed": SEED,
    "tolerance": {"atol": max(row["atol"] for row in per_output.values()), "rtol": 1e-5, "per_output": per_output},
    "params": sum(parameter.numel() for parameter in model.parameters()),
    "notes": "forward_features is before the pooling; the picture is 43 x 34.",
}
(folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")
