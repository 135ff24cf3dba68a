"""The peer of benches/load.rs: safetensors and torch.

usage: load.py load FILE_OR_FOLDER f16|f32 none|pages|all    prints seconds and peak MiB
       load.py shard FILE FOLDER                             writes FILE as a sharded pytorch_model.bin

`none` leaves the tensors as the library hands them out (mapped, where they are f16), `pages` reads one value of every
page, `all` finds out whether all values are finite.
"""
import json
import pathlib
import resource
import sys
import time

import torch
from safetensors.torch import load_file

SHARD_BYTES = 500_000_000
PAGE = 4096


def state_dict(path):
    if path.is_file():
        return load_file(path)
    state = {}
    index = json.loads((path / "pytorch_model.bin.index.json").read_text())
    for shard in sorted(set(index["weight_map"].values())):
        state |= torch.load(path / shard, map_location="cpu", weights_only=True)
    return state


def load(path, dtype, read):
    start = time.perf_counter()
    state = state_dict(path)
    for key in list(state):
        if state[key].is_floating_point():
            state[key] = state[key].to(dtype)
        if read == "pages":
            state[key].reshape(-1)[:: PAGE // state[key].itemsize].sum()
        elif read == "all" and not torch.isfinite(state[key]).all():
            sys.exit(f"{key} is not finite")
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


match sys.argv[1:]:
    case ["shard", file, folder]:
        shard(pathlib.Path(file), pathlib.Path(folder))
    case ["load", path, dtype, read]:
        load(pathlib.Path(path), torch.float16 if dtype == "f16" else torch.float32, read)
