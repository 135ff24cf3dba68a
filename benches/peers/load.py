"""The peer of benches/load.rs: safetensors and torch.

usage: load.py load|map FILE_OR_FOLDER f16|f32    prints seconds and peak MiB
       load.py shard FILE FOLDER                  writes FILE as a sharded pytorch_model.bin

`load` reads every value once, `map` leaves the tensors as the library hands them out (mapped, where they are f16).
"""
import json
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file

SHARD_BYTES = 500_000_000


def state_dict(path):
    if path.is_file():
        return load_file(path)
    state = {}
    index = json.loads((path / "pytorch_model.bin.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        state |= torch.load(path / shard, map_location="cpu", weights_only=True)
    return state


def load(path, dtype, touch):
    start = time.perf_counter()
    state = state_dict(path)
    for key in list(state):
        if state[key].is_floating_point():
            state[key] = state[key].to(dtype)
        if touch:
            # one value of every page
            state[key].reshape(-1).view(torch.uint8)[::4096].sum()
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def shard(source, folder):
    weight_map, pending, size, shards = {}, {}, 0, []
    for key, value in load_file(source).items():
        if size + value.nbytes > SHARD_BYTES and pending:
            shards.append(pending)
            pending, size = {}, 0
        pending[key] = value.clone()
        size += value.nbytes
    shards.append(pending)
    for number, tensors in enumerate(shards, 1):
        name = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        torch.save(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


what, first, second = sys.argv[1], pathlib.Path(sys.argv[2]), sys.argv[3]
if what == "shard":
    shard(first, pathlib.Path(second))
else:
    load(first, torch.float16 if second == "f16" else torch.float32, touch=what == "load")
