"""Writes tests/fixtures/gguf with the `gguf` package (PyPI, 0.19.0, MIT), ggml's own writer and numpy dequantization.

`small.gguf` has random blocks of every type that Volary reads, and metadata of every kind; `expected.safetensors` has
the same tensors as the package multiplies them out.
Run from the root of the repository: python tests/reference/gguf.py
"""

import json
import struct
import sys
from pathlib import Path

# this file has the package's name
sys.path = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf import GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

FOLDER = Path("tests/fixtures/gguf")
ROWS, COLUMNS = 2, 512
rng = np.random.default_rng(11)
# where a block has its f16 scales
HALVES = {T.Q4_0: [0], T.Q4_1: [0, 2], T.Q5_0: [0], T.Q5_1: [0, 2], T.Q8_0: [0], T.Q2_K: [80, 82],
          T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2], T.Q6_K: [208]}


def blocks(kind):
    values, size = GGML_QUANT_SIZES[kind]
    stored = rng.integers(0, 256, (ROWS * COLUMNS // values, size), dtype=np.uint8)
    for at in HALVES[kind]:
        halves = rng.normal(0, 0.1, len(stored)).astype(np.float16)
        stored[:, at:at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return stored.reshape(ROWS, -1)


def save_safetensors(path, tensors):
    header, data = {}, b""
    for name, value in tensors.items():
        raw = np.ascontiguousarray(value, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


FOLDER.mkdir(parents=True, exist_ok=True)
writer = GGUFWriter(FOLDER / "small.gguf", "volary")
writer.add_uint8("test.u8", 200)
writer.add_int8("test.i8", -100)
writer.add_uint16("test.u16", 60000)
writer.add_int16("test.i16", -30000)
writer.add_uint32("test.u32", 4_000_000_000)
writer.add_int32("test.i32", -2_000_000_000)
writer.add_float32("test.f32", 0.5)
writer.add_uint64("test.u64", 2**63)
writer.add_int64("test.i64", -(2**62))
writer.add_float64("test.f64", 0.1)
writer.add_bool("test.bool", True)
writer.add_string("test.string", "鸟舍 volary")
writer.add_array("test.tokens", ["<s>", "你好", ""])
writer.add_array("test.numbers", [1, -2, 3])

expected = {}
for kind in HALVES:
    stored = blocks(kind)
    writer.add_tensor(kind.name.lower(), stored, raw_dtype=kind)
    expected[kind.name.lower()] = dequantize(stored, kind)
numbers = rng.normal(0, 1, (3, 2, 4))
writer.add_tensor("f32", numbers.astype(np.float32))
expected["f32"] = numbers.astype(np.float32)
writer.add_tensor("f16", numbers.astype(np.float16))
expected["f16"] = numbers.astype(np.float16).astype(np.float32)
writer.add_tensor("f64", numbers)
expected["f64"] = numbers.astype(np.float32)
brain = (rng.normal(0, 1, (4, 6)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
writer.add_tensor("bf16", brain.view(np.uint8), raw_dtype=T.BF16)
expected["bf16"] = (brain.astype(np.uint32) << 16).view(np.float32)
for width in (8, 16, 32, 64):
    integers = np.array([1, -2, 2 ** (width - 2)], dtype=f"i{width // 8}")
    writer.add_tensor(f"i{width}", integers)
    expected[f"i{width}"] = integers.astype(np.float32)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
save_safetensors(FOLDER / "expected.safetensors", expected)
