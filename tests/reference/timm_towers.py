"""Writes tests/fixtures/timm_beit and tests/fixtures/timm_eva_large: tiny towers for pictures, by timm.

usage: timm_towers.py FIXTURES        needs timm 1.0 (Apache-2.0), torch, safetensors

Every parameter is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64.
"""
import json
import pathlib
import sys

import timm
import torch
from safetensors.torch import save_file

TOWERS = {
    "timm_beit": {
        "architecture": "beitv2_base_patch16_224",
        "num_classes": 7,
        "model_args": {
            "img_size": [16, 24],
            "patch_size": 4,
            "embed_dim": 24,
            "depth": 2,
            "num_heads": 3,
            "mlp_ratio": 2.5,
            "use_shared_rel_pos_bias": True,
            "use_abs_pos_emb": True,
            "global_pool": "token",
            "use_fc_norm": True,
        },
        "seed": 20411,
    },
    "timm_eva_large": {
        "architecture": "eva_large_patch14_196",
        "num_classes": 5,
        "model_args": {"img_size": 20, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3},
        "seed": 20412,
    },
}


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        if key.endswith("gamma_1") or key.endswith("gamma_2"):
            state[key] = 0.5 + 0.2 * noise
        elif key.endswith("relative_position_bias_table"):
            state[key] = noise
        elif value.dim() < 2:
            state[key] = value + 0.2 * noise
        else:
            state[key] = noise * (2.0 / value[0].numel()) ** 0.5
        state[key] = state[key].half().float()  # the file holds halves
    model.load_state_dict(state)


def outputs(model, pixels):
    with torch.no_grad():
        features = model.forward_features(pixels)
        return {
            "forward_features": features,
            "pre_logits": model.forward_head(features, pre_logits=True),
            "logits": model.forward_head(features),
        }


def write(folder, tower):
    def build():
        return timm.create_model(tower["architecture"], num_classes=tower["num_classes"], **tower["model_args"]).eval()

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(tower["seed"])
    model = build()
    redraw(model, generator)
    sides = tower["model_args"]["img_size"]
    height, width = sides if isinstance(sides, list) else (sides, sides)
    pixels = torch.randn(2, 3, height, width, generator=generator)
    found = outputs(model, pixels)
    double = build().double()
    double.load_state_dict(model.state_dict())
    exact = outputs(double, pixels.double())
    per_output = {}
    for key, value in found.items():
        error = (value.double() - exact[key]).abs().max().item()
        per_output[key] = {"atol": 20 * error, "rtol": 1e-5, "f32_vs_f64": error, "scale": value.abs().max().item()}
    halves = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
    save_file({"pixel_values": pixels}, folder / "inputs.safetensors")
    save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / "outputs.safetensors")
    config = {key: tower[key] for key in ("architecture", "num_classes", "model_args")}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    reference = {
        "reference": f"timm {timm.__version__} {type(model).__name__}",
        "seed": tower["seed"],
        "tolerance": {"atol": max(row["atol"] for row in per_output.values()), "rtol": 1e-5, "per_output": per_output},
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }
    (folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")


for name, tower in TOWERS.items():
    write(pathlib.Path(sys.argv[1]) / name, tower)
