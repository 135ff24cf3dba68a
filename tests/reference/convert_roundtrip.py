"""Loads an exported folder with transformers, and compares its outputs with a fixture's reference.

Needs torch and transformers. Run as: python tests/reference/convert_roundtrip.py EXPORTED FIXTURE
Prints the largest difference of each output; exit code 1 if one is beyond the tolerance in reference.json.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file


def flat(outputs, prefix=""):
    """Nested outputs by their dotted names."""
    for name, value in outputs.items():
        if isinstance(value, torch.Tensor):
            yield prefix + name, value
        elif hasattr(value, "items"):
            yield from flat(value, f"{prefix}{name}.")


def main():
    exported, fixture = map(Path, sys.argv[1:])
    reference = json.loads((fixture / "reference.json").read_text())
    architecture = getattr(transformers, reference["reference"].split()[-1])
    model, info = architecture.from_pretrained(
        exported, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        inputs = load_file(fixture / "inputs.safetensors")
        found = dict(flat(model.eval()(**inputs)))
        if model.can_generate():
            row, count = inputs["input_ids"][:1], 8
            model.generation_config.eos_token_id = None  # a greedy reference does not stop
            tokens = model.generate(row, do_sample=False, max_new_tokens=count)
            found["greedy_ids"] = tokens[:, row.shape[1] :]
    wrong = 0
    tolerance = reference["tolerance"]
    for name, expected in load_file(fixture / "outputs.safetensors").items():
        own = {**tolerance, **tolerance.get("per_output", {}).get(name, {})}
        difference = (found[name].double() - expected.double()).abs()
        bound = own["atol"] + own["rtol"] * expected.double().abs()
        fits = found[name].shape == expected.shape and bool((difference <= bound).all())
        print(f"{name}: {difference.max().item():.2g}{'' if fits else ' is too much'}")
        wrong += not fits
    sys.exit(1 if wrong else 0)


main()
