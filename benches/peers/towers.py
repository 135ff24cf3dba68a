"""The peer of benches/towers.rs: open_clip and timm on PyTorch.

usage: towers.py OPEN_CLIP_NAME THREADS WEIGHTS PIXELS

Says with how many threads it computes, then answers `write BATCH FILE` and `time BATCH TIMES`, line by line.
"""
import logging
import sys
import time

import open_clip
import torch
from safetensors.torch import load_file, save_file
from timm.models.eva import checkpoint_filter_fn

logging.disable()  # it warns of weights that are not fetched
name, threads, weights, pixels = sys.argv[1:]
torch.set_num_threads(int(threads))
torch.set_num_interop_threads(1)
tower = open_clip.create_model(name, precision="fp32").visual.eval()
state = load_file(weights)
if hasattr(tower, "trunk"):  # an EVA, under the authors' names
    tower.trunk.load_state_dict(checkpoint_filter_fn(state, tower.trunk))
else:
    prefix = "visual."
    tower.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})
pixels = load_file(pixels)["pixels"]
print(f"torch {torch.__version__}, open_clip {open_clip.__version__}, {torch.get_num_threads()} threads", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        what, batch, rest = line.split()
        batch = pixels[: int(batch)]
        if what == "write":
            save_file({"features": tower(batch).clone()}, rest)
            print("written", flush=True)
        else:
            start = time.perf_counter()
            for _ in range(int(rest)):
                tower(batch)
            print(time.perf_counter() - start, flush=True)
