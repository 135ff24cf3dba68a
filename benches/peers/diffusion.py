"""The peer of benches/diffusion.rs: diffusers on PyTorch.

usage: diffusion.py unet|vae f32|bf16 FOLDER INPUTS OUTPUT

Loads, runs once, writes what came out of it, runs once more, and prints the seconds of that and the process's peak MiB.
"""
import resource
import sys
import time

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging
from safetensors.torch import load_file, save_file

logging.set_verbosity_error()
logging.disable_progress_bar()
what, dtype, folder, inputs, output = sys.argv[1:]
dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[what]
model = kind.from_pretrained(folder, torch_dtype=dtype).eval()
inputs = {name: tensor.to(dtype) for name, tensor in load_file(inputs).items()}


def run():
    if what == "vae":
        return model.decode(inputs["latents"]).sample
    return model(inputs["sample"], inputs["timestep"].float(), inputs["encoder_hidden_states"]).sample


with torch.inference_mode():
    save_file({"output": run().float()}, output)
    start = time.perf_counter()
    run()
    print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
