#!/usr/bin/env python3
"""The OpenMoji pictures kept in the repository: four to try, and a held-out sample for the tests.

    python sample.py --packages packages --pictures ../../examples/pictures --sample ../../tests/fixtures/emoji_sample
"""
import argparse
import json
from collections import Counter
from pathlib import Path

from PIL import Image

import prepare

OPENMOJI = next(style for style in prepare.STYLES if style.name == "openmoji")
PICTURES = {"cat.png": "1F431", "pizza.png": "1F355", "bicycle.png": "1F6B2", "rocket.png": "1F680"}
PICTURE_SIZE = 160
SAMPLE = 48


def sample_rows(rows):
    """SAMPLE row numbers: as many of each group, one more of the largest groups, evenly spaced within a group."""
    groups = Counter(row["group"] for row in rows)
    each, rest = divmod(SAMPLE, len(groups))
    chosen = []
    for rank, (group, size) in enumerate(groups.most_common()):
        n = each + (rank < rest)
        members = [i for i, row in enumerate(rows) if row["group"] == group]
        chosen += [members[(2 * k + 1) * size // (2 * n)] for k in range(n)]
    return sorted(chosen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path("packages"))
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--sample", type=Path, required=True)
    args = parser.parse_args()

    captions = [prepare.read_json(package, args.packages) for package in prepare.CAPTION_PACKAGES]
    files = prepare.read_json(OPENMOJI.package, args.packages)
    rows = prepare.caption_rows(*captions)
    found = prepare.match(OPENMOJI, files, rows, prepare.names_of(rows, captions[0], [files]), {})

    def save(i, size, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = prepare.render(prepare.drawing(files["icons.json"], found[i]), size)
        Image.fromarray(pixels).save(path, optimize=True)

    row_of = {row["hexcode"]: i for i, row in enumerate(rows)}
    for name, hexcode in PICTURES.items():
        save(row_of[hexcode], PICTURE_SIZE, args.pictures / name)
    chosen = sample_rows(rows)
    for i in chosen:
        save(i, prepare.SIZE, args.sample / f"{rows[i]['hexcode']}.png")
    text = json.dumps([rows[i] for i in chosen], ensure_ascii=False, indent=1) + "\n"
    (args.sample / "captions.json").write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
