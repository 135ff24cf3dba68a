"""Writes tests/fixtures/pictures, resample and preprocess_cases with the references themselves.

Needs pillow 13, numpy, safetensors and transformers 5.23 (whose PIL backend runs without torch). open_clip and timm
resize, pad and crop with Pillow through torchvision; the few calls that they come down to are spelt out below.
Run from the root of the repository: python tests/reference/pictures.py
"""

import json
import math
import random
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from safetensors.numpy import save_file

FIXTURES = Path("tests/fixtures")
rng = np.random.default_rng(7)
random.seed(7)


def noise(height, width, channels):
    """Half noise, half waves, so that both clipping and rounding are met."""
    y, x, c = np.mgrid[0:height, 0:width, 0:channels]
    waves = 127.5 + 127.5 * np.sin(x / 3.0 + y / 5.0 + c)
    return np.where(rng.random((height, width, 1)) < 0.5, rng.integers(0, 256, (height, width, channels)), waves).astype(np.uint8)


def pictures():
    folder = FIXTURES / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    rgb, rgba, la, grey = (Image.fromarray(a.squeeze()) for a in (noise(11, 17, 3), noise(11, 17, 4), noise(11, 17, 2), noise(11, 17, 1)))
    palette = rgb.quantize(13)
    rgb.save(folder / "rgb.png")
    rgba.save(folder / "rgba.png")
    la.save(folder / "grey_alpha.png")
    grey.save(folder / "grey.png")
    grey.convert("1").save(folder / "bits.png")
    grey.save(folder / "grey_key.png", transparency=int(grey.getpixel((0, 0))))
    rgb.save(folder / "rgb_key.png", transparency=rgb.getpixel((2, 3)))
    palette.save(folder / "palette.png")
    palette.save(folder / "palette_alpha.png", transparency=bytes([0, 100, 255, 3]))
    rgb.quantize(4).save(folder / "palette_2bit.png")
    rgb.save(folder / "rgb.bmp")
    palette.save(folder / "palette.bmp")
    grey.save(folder / "grey.bmp")
    rgb.save(folder / "rgb.webp", lossless=True)
    rgba.save(folder / "rgba.webp", lossless=True, exact=True)
    palette.save(folder / "palette.gif")
    palette.save(folder / "palette_key.gif", transparency=2)
    grey.save(folder / "grey.gif")
    smooth = Image.fromarray((127.5 + 90 * np.sin(np.mgrid[0:24, 0:32].sum(0)[..., None] / 9.0 + np.arange(4))).astype(np.uint8))
    smooth.convert("RGB").save(folder / "rgb.jpg", quality=95, subsampling=0)
    smooth.convert("L").save(folder / "grey.jpg", quality=95)
    smooth.convert("RGB").save(folder / "progressive.jpg", quality=95, progressive=True)
    Image.fromarray(np.asarray(smooth), mode="CMYK").save(folder / "cmyk.jpg", quality=95)
    corners = Image.fromarray(np.repeat(np.repeat(noise(2, 3, 3), 8, 0), 8, 1))
    for code in range(2, 9):
        exif = Image.Exif()
        exif[0x0112] = code
        corners.save(folder / f"exif{code}.png", exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    corners.save(folder / "exif6.jpg", exif=exif, quality=100, subsampling=0)
    # Pillow writes no 16-bit colour and no interlacing, but reads both.
    for name, kind, channels in [("rgb16.png", 2, 3), ("rgba16.png", 6, 4), ("grey_alpha16.png", 4, 2)]:
        rows = rng.integers(0, 65536, (11, 17 * channels)).astype(">u2")
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 17, 11, 16, kind, 0, 0, 0)),
                  (b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))), (b"IEND", b"")]
        data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
        (folder / name).write_bytes(b"\x89PNG\r\n\x1a\n" + data)

    expected = {}
    for file in sorted(folder.glob("*.*")):
        if file.suffix in (".safetensors",):
            continue
        image = Image.open(file)
        expected[f"{file.name}.stored"] = np.array(image.convert("RGB"))
        over = Image.new("RGBA", image.size, (255, 255, 255, 255))
        seen = Image.alpha_composite(over, image.convert("RGBA")).convert("RGB")
        turned = ImageOps.exif_transpose(image)
        expected[f"{file.name}.seen"] = np.array(seen if turned.size == image.size and turned.tobytes() == image.tobytes() else turned.convert("RGB"))
    save_file(expected, folder / "expected.safetensors")


def resample():
    folder = FIXTURES / "resample"
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    cases = [((37, 53), (16, 16)), ((9, 100), (32, 7)), ((5, 3), (21, 20)), ((1, 1), (4, 6)), ((1, 41), (9, 1)),
             ((64, 48), (13, 48)), ((30, 20), (30, 31)), ((211, 7), (3, 5))]
    for i, ((h, w), size) in enumerate(cases):
        for channels in (3, 4):
            source = noise(h, w, channels)
            tensors[f"{i}.{channels}.source"] = source
            # RGBX and not RGBA: alpha would weigh the colours.
            image = Image.fromarray(source if channels == 3 else source, mode="RGB" if channels == 3 else "RGBX")
            for code in range(6):
                tensors[f"{i}.{channels}.{code}"] = np.asarray(image.resize(size[::-1], code))
    save_file(tensors, folder / "expected.safetensors")


CODES = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def shortest(image, edge, code):
    w, h = image.size
    short, long = min(w, h), max(w, h)
    new = int(edge * long / short)
    return image.resize((edge, new) if w <= h else (new, edge), code)


def keep_ratio(image, size, code, longest):
    w, h = image.size
    ratio = (max if longest else min)(h / size[0], w / size[1])
    return image.resize((round(w / ratio), round(h / ratio)), code)


def centre(image, size, fill=0):
    w, h = image.size
    ph, pw = max(size[0] - h, 0), max(size[1] - w, 0)
    if ph or pw:
        bands = len(image.getbands())
        fill = tuple(fill) if isinstance(fill, list) else (fill,) * bands if bands > 1 else fill
        border = (pw // 2, ph // 2, (pw + 1) // 2, (ph + 1) // 2)
        palette = image.getpalette() if image.mode == "P" else None
        image = ImageOps.expand(image, border=border, fill=fill)
        if palette:
            image.putpalette(palette)
        w, h = image.size
    top, left = int(round((h - size[0]) / 2.0)), int(round((w - size[1]) / 2.0))
    return image.crop((left, top, left + size[1], top + size[0]))


def tensor(image, mean, std):
    x = np.array(image).transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    return (x - np.array(mean, np.float32)[:, None, None]) / np.array(std, np.float32)[:, None, None]


def open_clip(image, cfg):
    size, mode, code = cfg["size"], cfg.get("resize_mode", "shortest"), CODES[cfg.get("interpolation", "bicubic")]
    pair = [size, size] if isinstance(size, int) else size
    if mode == "longest":
        image = centre(keep_ratio(image, pair, code, True), pair, cfg.get("fill_color", 0))
    elif mode == "squash":
        image = image.resize(pair[::-1], code)
    elif pair[0] == pair[1]:
        image = centre(shortest(image, pair[0], code), pair)
    else:
        image = centre(keep_ratio(image, pair, CODES["bicubic"], False), pair)
    return tensor(image.convert("RGB"), cfg["mean"], cfg["std"])


def timm(image, cfg):
    image = image.convert("RGB")
    size, code = cfg["input_size"][1:], CODES[cfg["interpolation"]]
    scaled = [math.floor(x / cfg["crop_pct"]) for x in size]
    mode = cfg.get("crop_mode", "center")
    if mode == "squash":
        image = centre(image.resize(scaled[::-1], code), size)
    elif mode == "border":
        image = centre(keep_ratio(image, scaled, code, True), size, [round(255 * v) for v in cfg["mean"]])
    elif scaled[0] == scaled[1]:
        image = centre(shortest(image, scaled[0], code), size)
    else:
        image = centre(keep_ratio(image, scaled, code, False), size)
    return tensor(image, cfg["mean"], cfg["std"])


def transformers(image, cfg):
    import importlib

    name = cfg.get("image_processor_type") or cfg["feature_extractor_type"]
    name = name.replace("FeatureExtractor", "").replace("ImageProcessor", "")
    module = {"CLIP": "clip", "ChineseCLIP": "chinese_clip", "ViT": "vit", "Beit": "beit", "DeiT": "deit", "Siglip": "siglip",
              "Blip": "blip", "Bit": "bit", "EfficientNet": "efficientnet"}[name]
    module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor = getattr(module, f"{name}ImageProcessorPil")(**{k: v for k, v in cfg.items() if not k.endswith("_type")})
    return processor(image, return_tensors="np")["pixel_values"][0].astype(np.float32)


MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def preprocess_cases():
    folder = FIXTURES / "preprocess_cases"
    folder.mkdir(parents=True, exist_ok=True)
    clip, vit = {"image_processor_type": "CLIPImageProcessor"}, {"feature_extractor_type": "ViTFeatureExtractor"}
    small = {"size": {"shortest_edge": 12}, "crop_size": {"height": 12, "width": 12}}
    every = ["rgb.png", "rgba.png", "grey_alpha.png", "grey.png", "bits.png", "grey_key.png", "rgb_key.png", "palette.png",
             "palette_alpha.png", "palette.gif", "palette_key.gif"]
    oc = {"mean": MEAN, "std": STD}
    tm = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.9}
    cases = [("preprocessor_config.json", {**clip, **small}, image) for image in every]
    cases += [("preprocessor_config.json", {**clip, **small, "resample": code}, "rgb.png") for code in range(1, 6)]  # it refuses 0
    cases += [("preprocessor_config.json", c, "rgb.png") for c in [
        {**clip, "size": 9, "crop_size": 14},
        {**clip, "size": 9, "crop_size": [14, 7]},
        {**clip, "size": [10, 6], "crop_size": {"height": 9, "width": 9}},
        {**clip, "size": {"shortest_edge": 12, "longest_edge": 15}, "do_center_crop": False},
        {**clip, "size": {"shortest_edge": 7, "longest_edge": 15}, "do_center_crop": False},
        {**clip, "size": {"max_height": 8, "max_width": 9}, "do_center_crop": False},
        {**clip, "do_resize": False, "crop_size": 20},
        {**clip, "do_resize": False, "crop_size": {"height": 6, "width": 21}},
        {**clip, **small, "do_rescale": False},
        {**clip, **small, "do_normalize": False},
        {**clip, **small, "do_rescale": False, "do_normalize": False},
        {**clip, **small, "rescale_factor": 0.1, "image_mean": 0.25, "image_std": [0.5, 2.0, 1.0]},
        {**clip, "size": {"height": 8, "width": 15}, "do_center_crop": None, "crop_size": None},
        {**clip, **small, "default_to_square": True, "size": 13},
        {**vit, "size": 10},
        {**vit, "size": [10, 7], "do_convert_rgb": None},
        {**vit, "size": {"height": 5, "width": 30}, "do_center_crop": True, "crop_size": 11},
        {"image_processor_type": "BeitImageProcessor", "size": 20, "do_center_crop": True, "crop_size": 15},
        {"image_processor_type": "DeiTImageProcessor", "size": 20, "crop_size": 15},
        {"image_processor_type": "SiglipImageProcessor", "size": {"height": 9, "width": 9}},
        {"image_processor_type": "SiglipImageProcessor", "size": 9},
        {"image_processor_type": "BlipImageProcessor", "size": {"height": 9, "width": 12}},
        {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 13}, "crop_size": 9},
        {"feature_extractor_type": "ChineseCLIPFeatureExtractor", "size": 13, "crop_size": 9},
    ]]
    for image in every:
        cases += [("open_clip_config.json", {**oc, "size": 9}, image)]
        cases += [("open_clip_config.json", {**oc, "size": [12, 14], "resize_mode": "longest", "fill_color": 3}, image)]
        cases += [("config.json", {**tm, "input_size": [3, 9, 9]}, image)]
    cases += [("open_clip_config.json", {**oc, **c}, "rgb.png") for c in [
        {"size": [8, 15]}, {"size": [15, 8], "interpolation": "bilinear"}, {"size": 15, "interpolation": "bilinear"},
        {"size": 10, "resize_mode": "squash"}, {"size": [9, 20], "resize_mode": "squash"}, {"size": 21, "resize_mode": "longest"},
        {"size": 10, "resize_mode": "longest", "fill_color": 255, "interpolation": "bilinear"}]]
    cases += [("config.json", {**tm, **c}, "rgb.png") for c in [
        {"input_size": [3, 8, 15]}, {"input_size": [3, 15, 8], "crop_mode": "squash"}, {"input_size": [3, 13, 13], "crop_mode": "border"},
        {"input_size": [3, 13, 9], "crop_mode": "border", "crop_pct": 1.0}, {"input_size": [3, 10, 10], "crop_pct": 1.25},
        {"input_size": [3, 10, 10], "crop_pct": 1.25, "crop_mode": "squash"}, *({"input_size": [3, 11, 11], "interpolation": i} for i in CODES)]]
    top = {"image_processor_type": "EfficientNetImageProcessor", "size": {"height": 13, "width": 13}, "include_top": False}
    cases += [("preprocessor_config.json", {**top, **c}, "rgb.png") for c in [  # the first as ALIGN's
        {"do_center_crop": True, "crop_size": 9, "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False,
         "resample": 2}, {}]]
    run = {"preprocessor_config.json": transformers, "open_clip_config.json": open_clip, "config.json": timm}
    wrap = {"preprocessor_config.json": lambda c: c, "open_clip_config.json": lambda c: {"model_cfg": {}, "preprocess_cfg": c},
            "config.json": lambda c: {"architecture": "eva02_base_patch14_224", "pretrained_cfg": c}}
    expected = {}
    for i, (file, cfg, image) in enumerate(cases):
        expected[str(i)] = run[file](Image.open(FIXTURES / "pictures" / image), cfg)
    rows = [{"file": file, "config": wrap[file](cfg), "picture": image} for file, cfg, image in cases]
    (folder / "cases.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    save_file({k: np.ascontiguousarray(v) for k, v in expected.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    pictures()
    resample()
    preprocess_cases()
