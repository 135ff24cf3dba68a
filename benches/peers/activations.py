"""The peer of kernels/benches/activations.rs on PyTorch.

usage: activations.py VALUES

Says with how many threads it computes (OMP_NUM_THREADS), then answers `write WHAT FILE` and `time WHAT TIMES`, line by line.
"""
import sys
import time

import numpy
import torch
from torch.nn.functional import gelu, relu, silu

SHAPE, SCORES = (400, 3072), (8 * 12 * 50, 50)
torch.set_num_interop_threads(1)
x = torch.from_numpy(numpy.fromfile(sys.argv[1], dtype="<f4")).reshape(SHAPE)
other, bias = x * 0.5, x[7].clone()
scores = x.flatten()[: SCORES[0] * SCORES[1]].reshape(SCORES)
WORK = {
    "gelu": lambda: gelu(x),
    "gelu_tanh": lambda: gelu(x, approximate="tanh"),
    "quick_gelu": lambda: x * torch.sigmoid(1.702 * x),
    "silu": lambda: silu(x),
    "relu": lambda: relu(x),
    "tanh": lambda: torch.tanh(x),
    "bias_gelu": lambda: gelu(x + bias),
    "gated_silu": lambda: silu(x) * other,
    "softmax": lambda: scores.softmax(1),
}
print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        what, work, rest = line.split()
        work = WORK[work]
        if what == "write":
            work().numpy().tofile(rest)
            print("written", flush=True)
        else:
            start = time.perf_counter()
            for _ in range(int(rest)):
                work()
            print(time.perf_counter() - start, flush=True)
