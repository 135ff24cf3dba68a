"""The peer of kernels/benches/moe.rs on PyTorch.

usage: moe.py VALUES

Says with how many threads it computes (OMP_NUM_THREADS), then answers `write WHAT FILE` and `time WHAT TIMES`, line by line.
"""
import sys
import time

import numpy
import torch
from torch.nn.functional import gelu, linear

TOKENS, D_MODEL, D_FF, EXPERTS, TOP_K = 2048, 512, 2048, 8, 2
WIDE = TOP_K * D_FF
SHAPES = [
    (TOKENS, D_MODEL),
    (EXPERTS, D_MODEL),
    (EXPERTS, D_MODEL, D_FF),
    (EXPERTS, D_FF),
    (EXPERTS, D_FF, D_MODEL),
    (EXPERTS, D_MODEL),
    (WIDE, D_MODEL),
    (WIDE,),
    (D_MODEL, WIDE),
    (D_MODEL,),
]
torch.set_num_interop_threads(1)
values = torch.from_numpy(numpy.fromfile(sys.argv[1], dtype="<f4"))
parts = values.split([torch.Size(shape).numel() for shape in SHAPES])
x, gate, up, up_bias, down, down_bias, *mlp = [part.reshape(shape) for part, shape in zip(parts, SHAPES)]


def layer(x):
    """Expert by expert, each on the tokens that go to it."""
    weights, experts = linear(x, gate).topk(TOP_K)
    weights = weights.softmax(1)
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        tokens, choices = torch.where(experts == expert)
        if len(tokens) == 0:
            continue
        inner = gelu(torch.addmm(up_bias[expert], x[tokens], up[expert]))
        y = torch.addmm(down_bias[expert], inner, down[expert])
        out.index_add_(0, tokens, y * weights[tokens, choices, None])
    return out


def dense(x):
    return linear(gelu(linear(x, mlp[0], mlp[1])), mlp[2], mlp[3])


def tokens(x):
    return torch.cat([layer(token) for token in x.split(1)])


WORK = {"layer": layer, "dense": dense, "tokens": tokens}
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        what, work, rest = line.split()
        work = WORK[work]
        if what == "write":
            work(x).numpy().tofile(rest)
            print("written", flush=True)
        else:
            start = time.perf_counter()
            for _ in range(int(rest)):
                work(x)
            print(time.perf_counter() - start, flush=True)
