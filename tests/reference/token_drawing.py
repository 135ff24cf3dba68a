"""Writes tests/fixtures/token_drawing: a tiny folder that draws by tokens, by transformers and diffusers.

usage: token_drawing.py FOLDER        needs transformers 5, diffusers 0.42 (both Apache-2.0), torch, safetensors, tokenizers

The likeliest codes after two captions, among codes alone, and the picture that the VQModel makes of them, whose channels are the
colours of squares of 2 x 2 pixels. Every parameter is drawn anew; the tolerance is 20 times what f32 differs from f64.
"""
import json
import pathlib
import sys

import torch
from diffusers import VQModel
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

SEED, FIRST, CODES, SIDE, PATCH = 20415, 24, 12, 4, 2
folder = pathlib.Path(sys.argv[1])
generator = torch.Generator().manual_seed(SEED)


def redraw(model):
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = 0.2 if parameter.dim() < 2 else (1.5 / parameter[0].numel()) ** 0.5
        value = noise * scale + (parameter.data if parameter.dim() < 2 else 0)
        parameter.data = value.half().float()  # the file holds halves
    return model.eval()


decoder = redraw(LlamaForCausalLM(LlamaConfig(
    vocab_size=FIRST + CODES, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
)))
# sharper, so that no two codes are about as likely; its own head, or one code would follow itself
decoder.lm_head.weight.data *= 8
vq = redraw(VQModel(
    in_channels=3 * PATCH**2, out_channels=3 * PATCH**2, down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), layers_per_block=1, latent_channels=8,
    sample_size=2 * SIDE, num_vq_embeddings=CODES, norm_num_groups=4, vq_embed_dim=4,
))
captions = torch.tensor([[1, 7, 19, 2], [1, 11, 5, 2]])


def draw(decoder, vq):
    ids, gap = captions, []
    for _ in range(SIDE * SIDE):
        scores = decoder(ids).logits[:, -1, FIRST:]
        best = scores.topk(2).values
        gap.append((best[:, 0] - best[:, 1]).min().item())
        ids = torch.cat([ids, FIRST + scores.argmax(1, keepdim=True)], 1)
    codes = ids[:, captions.shape[1]:] - FIRST
    entries = vq.quantize.embedding(codes).reshape(-1, SIDE, SIDE, 4).permute(0, 3, 1, 2)
    painted = vq.decode(entries, force_not_quantize=True).sample  # [2, 12, 8, 8]
    rows = painted.permute(0, 2, 3, 1).reshape(-1, 2 * SIDE, 2 * SIDE, PATCH, PATCH, 3)
    pixels = rows.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 2 * SIDE * PATCH, 2 * SIDE * PATCH)
    return codes.contiguous(), pixels.contiguous(), min(gap)


with torch.no_grad():
    codes, pixels, gap = draw(decoder, vq)
    again, exact, _ = draw(decoder.double(), vq.double())
assert torch.equal(codes, again) and gap > 0.01 and len(codes.unique()) > 4, (gap, codes)
difference = (pixels - exact).abs().max().item()
decoder.half().save_pretrained(folder / "transformer")
vq.half().save_pretrained(folder / "vqvae")
(folder / "transformer/generation_config.json").unlink(missing_ok=True)
(folder / "tokenizer").mkdir()
vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3, **{chr(97 + at): 4 + at for at in range(20)}}
(folder / "tokenizer/tokenizer.json").write_text(Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")).to_str())
(folder / "tokenizer/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
(folder / "model_index.json").write_text(json.dumps({
    "_class_name": "TokenDrawingPipeline", "first_code": FIRST, "codes_per_side": SIDE, "patch_size": PATCH, "max_caption": 8,
}, indent=2))
save_file({"input_ids": captions}, folder / "inputs.safetensors")
save_file({"indices": codes, "sample": pixels}, folder / "outputs.safetensors")
scale = pixels.abs().max().item()
(folder / "reference.json").write_text(json.dumps({
    "reference": "transformers 5.23.0 LlamaForCausalLM, diffusers 0.42.1 VQModel",
    "seed": SEED,
    "tolerance": {"atol": 20 * difference, "rtol": 1e-5, "per_output": {
        "sample": {"atol": 20 * difference, "rtol": 1e-5, "f32_vs_f64": difference, "scale": scale},
        "indices": {"atol": 0.0, "rtol": 0.0},
    }},
    "notes": "tests/reference/token_drawing.py; scores are of codes alone.",
}, indent=2))
