"""The peer of benches/decode.rs: the same decoder in PyTorch, written without what costs time.

usage: decode.py f32|bf16 FOLDER

Keys and values are written into buffers made beforehand, weights are read tensor by tensor. Answers
`write scores FILE`, `time prompt N` and `time tokens N`, line by line. The number of threads is that of OMP_NUM_THREADS.
"""
import json
import struct
import sys
import time

import torch
import torch.nn.functional as F

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD = 32_000, 2048, 9, 32, 8, 64
EPS, THETA, PROMPT, TOKENS, TEXT = 1e-5, 10_000.0, 128, 64, 96


def read(path, dtype):
    """Tensors by name; each is read into its own memory, so that none of the file counts."""
    tensors = {}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            tensor = torch.empty(entry["shape"])
            file.seek(8 + length + entry["data_offsets"][0])
            file.readinto(memoryview(tensor.numpy()).cast("B"))
            tensors[name] = tensor.to(dtype)
    return tensors


def turn(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder:
    def __init__(self, weights, dtype):
        self.weights, self.dtype = weights, dtype
        frequencies = THETA ** (-torch.arange(0, HEAD, 2, dtype=torch.float64) / HEAD)
        angles = torch.arange(PROMPT + TOKENS + 1, dtype=torch.float64)[:, None] * frequencies
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        shape = [LAYERS, 2, 1, KV_HEADS, PROMPT + TOKENS, HEAD]
        self.cache = torch.zeros(shape, dtype=dtype)

    def states(self, ids, at):
        """States of tokens that follow `at` others."""
        w, end = self.weights, at + len(ids)
        cos, sin = self.cos[at:end], self.sin[at:end]
        x = w["model.embed_tokens.weight"][ids][None]
        for layer in range(LAYERS):
            p = f"model.layers.{layer}."
            y = F.rms_norm(x, [WIDTH], w[p + "input_layernorm.weight"], EPS)

            def heads(name):
                return F.linear(y, w[p + f"self_attn.{name}_proj.weight"]).view(1, len(ids), -1, HEAD).transpose(1, 2)

            key, value = self.cache[layer]
            key[:, :, at:end] = turn(heads("k"), cos, sin)
            value[:, :, at:end] = heads("v")
            y = F.scaled_dot_product_attention(
                turn(heads("q"), cos, sin), key[:, :, :end], value[:, :, :end], is_causal=at == 0, enable_gqa=True
            )
            x = x + F.linear(y.transpose(1, 2).reshape(1, len(ids), -1), w[p + "self_attn.o_proj.weight"])
            y = F.rms_norm(x, [WIDTH], w[p + "post_attention_layernorm.weight"], EPS)
            gate = F.silu(F.linear(y, w[p + "mlp.gate_proj.weight"]))
            x = x + F.linear(gate * F.linear(y, w[p + "mlp.up_proj.weight"]), w[p + "mlp.down_proj.weight"])
        return F.rms_norm(x, [WIDTH], w["model.norm.weight"], EPS)

    def scores(self, states):
        return F.linear(states, self.weights["lm_head.weight"])


def text(count):
    return torch.arange(count) * 1543 % VOCABULARY


held, folder = sys.argv[1:]
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[held]
torch.set_num_interop_threads(1)
decoder = Decoder(read(f"{folder}/f32.safetensors", dtype), dtype)
print(f"torch {torch.__version__}, {held}, {torch.get_num_threads()} threads", flush=True)
with torch.inference_mode():
    for line in sys.stdin:
        how, what, rest = line.split()
        if how == "write":
            decoder.scores(decoder.states(text(TEXT), 0)).float().numpy().tofile(rest)
            print("written", flush=True)
        else:
            start = time.perf_counter()
            token = decoder.scores(decoder.states(text(PROMPT), 0)[:, -1]).argmax(-1)
            seconds = time.perf_counter() - start
            if what == "tokens":
                start = time.perf_counter()
                for at in range(PROMPT, PROMPT + TOKENS):
                    token = decoder.scores(decoder.states(token, at)[:, -1]).argmax(-1)
                seconds = time.perf_counter() - start
            print(seconds, flush=True)
