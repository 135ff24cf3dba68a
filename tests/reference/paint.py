"""Writes tests/fixtures/paint: what the authors' Painter, with the weights of tests/fixtures/painter, paints for a question.

usage: paint.py PAINTER FIXTURES      needs torch, timm, numpy, Pillow, safetensors

PAINTER is the folder of that name in a clone of github.com/baaivision/Painter (MIT). What it imports and this does not use
(detectron2, fairscale, fvcore) is left out. Pictures are prepared, and what is painted resized and cut off, as in its
`eval/*/painter_inference_*.py`.
"""
import json
import pathlib
import sys
from functools import partial
from unittest.mock import MagicMock

import numpy as np
import timm.layers
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

repository, fixtures = map(pathlib.Path, sys.argv[1:])
unused = ["fvcore", "fvcore.nn", "fvcore.nn.weight_init", "detectron2", "detectron2.layers"]
unused += ["fairscale", "fairscale.nn", "fairscale.nn.checkpoint"]
sys.modules |= {name: MagicMock(CNNBlockBase=torch.nn.Module) for name in unused}
sys.modules["timm.models.layers"] = timm.layers
sys.path.insert(0, str(repository))
from models_painter import Painter  # noqa: E402

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])

config = json.loads((fixtures / "painter/config.json").read_text())
config.pop("model_type")
norm = partial(torch.nn.LayerNorm, eps=config.pop("layer_norm_eps"))
model = Painter(**config, norm_layer=norm, out_feature="last_feat").eval()
model.load_state_dict(load_file(fixtures / "painter/model.safetensors"))

folder = fixtures / "paint"
folder.mkdir(exist_ok=True)
generator = np.random.default_rng(20221)
sizes = {"query": (23, 18), "prompt": (20, 30), "target": (20, 30)}
for name, (width, height) in sizes.items():
    coarse = generator.integers(0, 256, (height // 5, width // 5, 3), np.uint8)
    Image.fromarray(coarse).resize((width, height), Image.BICUBIC).save(folder / f"{name}.png")


def prepared(name):
    side = config["img_size"][1]
    picture = Image.open(folder / f"{name}.png").resize((side, side))
    return (np.array(picture) / 255.0 - MEAN) / STD


def stacked(above, below):
    both = np.concatenate((prepared(above), prepared(below)))
    return torch.tensor(both).permute(2, 0, 1)[None].float()


patches = model.patch_embed.num_patches
masked = (torch.arange(patches) >= patches // 2).float()[None]
pictures, answers = stacked("prompt", "query"), stacked("target", "target")
with torch.no_grad():
    _, painted, _ = model(pictures, answers, masked, torch.ones_like(answers))
painted = model.unpatchify(painted)[0].permute(1, 2, 0)
painted = torch.from_numpy(painted[len(painted) // 2 :].numpy() * STD + MEAN) * 255
for mode in ["nearest", "bilinear", "bicubic"]:
    cut = painted if mode == "bicubic" else painted.clip(0, 255)
    width, height = sizes["query"]
    large = F.interpolate(cut.permute(2, 0, 1)[None], size=[height, width], mode=mode)[0].permute(1, 2, 0)
    Image.fromarray(large.clip(0, 255).numpy().astype(np.uint8)).save(folder / f"{mode}.png")
reference = {
    "reference": "baaivision/Painter models_painter.py and eval/*/painter_inference_*.py, CPU, by tests/reference/paint.py",
    "notes": "tests/fixtures/painter paints an answer to query.png, shown prompt.png and target.png",
}
(folder / "reference.json").write_text(json.dumps(reference, indent=1) + "\n")
