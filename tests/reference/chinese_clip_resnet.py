"""Writes tests/fixtures/cn_clip_resnet: a tiny Chinese CLIP with a convolutional tower, by its authors' code.

usage: chinese_clip_resnet.py FOLDER        needs cn_clip 1.6 (MIT, OFA-Sys/Chinese-CLIP), torch, safetensors

Every parameter and running statistic is drawn anew, so that each matters; the tolerance is 20 times what f32 differs from f64.
`config.json` has the fields of the two files in the authors' `model_configs` that `RN50` names, which they too put together.
"""
import json
import pathlib
import sys

import torch
from cn_clip.clip.model import CLIP
from safetensors.torch import save_file

SEED = 20413
CONFIG = {
    "embed_dim": 12,
    "image_resolution": 64,
    "vision_layers": "[1,2,1,1]",
    "vision_width": 4,
    "vision_head_width": 32,
    "vision_patch_size": None,
    "vocab_size": 40,
    "text_attention_probs_dropout_prob": 0.1,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.1,
    "text_hidden_size": 24,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 32,
    "text_max_position_embeddings": 16,
    "text_num_attention_heads": 3,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}


def build():
    return CLIP(**{**CONFIG, "vision_layers": json.loads(CONFIG["vision_layers"])}).eval()


def redraw(model, generator):
    state = model.state_dict()
    for key, value in state.items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if key == "logit_scale":
            continue
        if key.endswith("running_var"):
            state[key] = 0.5 + noise.abs()
        elif value.dim() < 2:
            state[key] = value + 0.2 * noise
        else:
            state[key] = noise * (2.0 / value[0].numel()) ** 0.5
        state[key] = state[key].half().float()  # the file holds halves
    model.load_state_dict(state)


def outputs(model, image, text):
    with torch.no_grad():
        images, texts, _ = model(image, text)
        per_image, per_text = model.get_similarity(image, text)
    return {"image_features": images, "text_features": texts, "logits_per_image": per_image, "logits_per_text": per_text}


folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
generator = torch.Generator().manual_seed(SEED)
model = build()
redraw(model, generator)
image = torch.randn(2, 3, 64, 64, generator=generator)
text = torch.tensor([[11, 3, 5, 12, 0, 0], [11, 9, 30, 4, 39, 12], [11, 12, 0, 0, 0, 0]])  # 0 is padding
found = outputs(model, image, text)
double = build().double()
double.load_state_dict(model.state_dict())
exact = outputs(double, image.double(), text)
per_output = {}
for key, value in found.items():
    error = (value.double() - exact[key]).abs().max().item()
    per_output[key] = {"atol": 20 * error, "rtol": 1e-5, "f32_vs_f64": error, "scale": value.abs().max().item()}
tensors = model.state_dict()
halves = {key: value.half() if value.is_floating_point() and key != "logit_scale" else value for key, value in tensors.items()}
save_file({key: value.contiguous().clone() for key, value in halves.items()}, folder / "model.safetensors", {"format": "pt"})
save_file({"image": image, "text": text}, folder / "inputs.safetensors")
save_file({key: value.contiguous().clone() for key, value in found.items()}, folder / "outputs.safetensors")
(folder / "config.json").write_text(json.dumps({"model_type": "cn_clip", **CONFIG}, indent=2) + "\n")
reference = {
    "reference": "OFA-Sys/Chinese-CLIP cn_clip.clip.model.CLIP (ModifiedResNet and BertModel)",
    "seed": SEED,
    "tolerance": {"atol": max(row["atol"] for row in per_output.values()), "rtol": 1e-5, "per_output": per_output},
    "params": sum(value.numel() for value in model.parameters()),
    "notes": "Features are normalised, as the model's forward gives them. The tokens that are 0 are padding.",
}
(folder / "reference.json").write_text(json.dumps(reference, indent=2) + "\n")
