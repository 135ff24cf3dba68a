"""The peer of benches/peers.rs and kernels/benches/moe.rs: PyTorch, eager.

usage: pytorch.py MODEL f32|bf16 FOLDER

Loads the model, says with how many threads it computes (OMP_NUM_THREADS), then answers `write WORK FILE` and `time WORK
TIMES`, line by line. Timings leave out what a work needs before it begins: the prompt before the tokens that are decoded.
"""
import logging
import pathlib
import sys
import time

import numpy
import torch
from safetensors.torch import load_file
from torch.nn.functional import gelu, linear

EXPERTS, TOP_K = 8, 2


def timed(run):
    start = time.perf_counter()
    output = run()
    return time.perf_counter() - start, output


def clip():
    from transformers import CLIPModel, logging

    logging.disable_progress_bar()

    model = CLIPModel.from_pretrained(weights, dtype=dtype).eval()
    pixels = inputs["pixels"].to(dtype)

    def run(work):
        what, batch = work.split("-")
        if what == "image":
            batch = pixels[: int(batch)]
            return timed(lambda: model.visual_projection(model.vision_model(batch).pooler_output))
        batch = inputs["ids"][: int(batch)]
        return timed(lambda: model.text_projection(model.text_model(batch).pooler_output))

    return run


def eva():
    import timm
    from timm.models.eva import checkpoint_filter_fn

    # as open_clip makes the tower of EVA02-B-16
    tower = timm.create_model("eva02_base_patch16_clip_224", num_classes=512, global_pool="token").eval().to(dtype)
    tower.load_state_dict(checkpoint_filter_fn(load_file(weights / "model.safetensors"), tower), assign=True)
    pixels = inputs["pixels"].to(dtype)
    return lambda work: timed(lambda: tower(pixels[: int(work.split("-")[1])]))


def llama():
    from transformers import LlamaForCausalLM, logging

    logging.disable_progress_bar()

    model = LlamaForCausalLM.from_pretrained(weights, dtype=dtype).eval()

    def decode(cache):
        for at in range(inputs["rest"].shape[1]):
            output = model(inputs["rest"][:, at : at + 1], past_key_values=cache, logits_to_keep=1)
        return output.logits

    def run(work):
        seconds, output = timed(lambda: model(inputs["prompt"], use_cache=True, logits_to_keep=1))
        return timed(lambda: decode(output.past_key_values)) if work == "decode" else (seconds, output.logits)

    return run


def unet():
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel.from_pretrained(weights, torch_dtype=dtype).eval()
    sample, context = (inputs[name].to(dtype) for name in ("sample", "encoder_hidden_states"))
    return lambda _: timed(lambda: model(sample, inputs["timestep"], context).sample)


def vae():
    from diffusers import AutoencoderKL

    model = AutoencoderKL.from_pretrained(weights, torch_dtype=dtype).eval()
    latents = inputs["latents"].to(dtype)
    return lambda _: timed(lambda: model.decode(latents).sample)


def moe():
    """See the shapes in benches/peers/sparse.rs."""
    tokens, d_model, d_ff, wide = 2048, 512, 2048, TOP_K * 2048
    shapes = [
        (tokens, d_model),
        (EXPERTS, d_model),
        (EXPERTS, d_model, d_ff),
        (EXPERTS, d_ff),
        (EXPERTS, d_ff, d_model),
        (EXPERTS, d_model),
        (wide, d_model),
        (wide,),
        (d_model, wide),
        (d_model,),
    ]
    parts = numpy.split(
        numpy.fromfile(folder / "moe.f32", dtype="<f4"), numpy.cumsum([numpy.prod(shape) for shape in shapes])[:-1]
    )
    x, gate, up, up_bias, down, down_bias, *mlp = [
        torch.from_numpy(part.reshape(shape)).to(dtype) for part, shape in zip(parts, shapes)
    ]

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

    work = {
        "layer": layer,
        "dense": lambda x: linear(gelu(linear(x, mlp[0], mlp[1])), mlp[2], mlp[3]),
        "tokens": lambda x: torch.cat([layer(token) for token in x.split(1)]),
    }
    return lambda name: timed(lambda: work[name](x))


if __name__ == "__main__":
    logging.disable()
    model, dtype, folder = sys.argv[1:]
    weights, folder = pathlib.Path(folder) / f"{model}-{dtype}", pathlib.Path(folder)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[dtype]
    torch.set_num_interop_threads(1)
    inputs = {} if model == "moe" else load_file(folder / f"{model}-inputs.safetensors")
    run = {"clip": clip, "eva": eva, "llama": llama, "unet": unet, "vae": vae, "moe": moe}[model]()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            what, work, rest = line.split()
            if what == "write":
                run(work)[1].float().numpy().tofile(rest)
                print("written", flush=True)
            else:
                print(sum(run(work)[0] for _ in range(int(rest))), flush=True)
