#!/usr/bin/env python3
"""Emoji in ten drawing styles with English and Chinese captions, from pinned npm packages.

    python prepare.py --packages packages --out data

Writes into --out
    emoji.safetensors  per style `<style>.pixels` uint8 [n_pictures, 64, 64, 4] (RGBA, straight alpha)
                       and `<style>.index` int64 [n_pictures], ascending: the row of captions.json it shows
    captions.json      rows {hexcode, emoji, group, subgroup, en: {name, keywords}, zh: {name, keywords}}
    report.json        counts per style and group, package versions, licenses
The bytes depend on nothing but the pinned versions: two runs write the same files.
"""
import argparse
import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import resvg_py
from PIL import Image, ImageOps
from safetensors.numpy import save

SIZE = 64  # pixels, both sides


class Package(NamedTuple):
    name: str
    version: str
    license: str  # of the artwork or the texts, which for FxEmojis is not the package's (Apache-2.0 is its code's)
    sha512: str  # base64, as `npm view NAME@VERSION dist.integrity` prints it after "sha512-"


TWEMOJI = Package("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==")
NOTO = Package("@iconify-json/noto", "1.2.9", "Apache-2.0", "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==")
FLUENT_FLAT = Package("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==")
FLUENT = Package("@iconify-json/fluent-emoji", "1.2.7", "MIT", "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==")
NOTO_V1 = Package("@iconify-json/noto-v1", "1.2.5", "Apache-2.0", "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==")
EMOJIONE = Package("@iconify-json/emojione", "1.2.3", "CC-BY-4.0", "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==")
FXEMOJI = Package("@iconify-json/fxemoji", "1.2.2", "CC-BY-4.0", "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==")
FLAG = Package("@iconify-json/flag", "1.2.12", "MIT", "B5zphOSTn54UX9v1sKsR1atuhyuXExiAkjuLQA8aeDcB68+P6oiStEDeEEVkbHgwvFvklPM2G7GhqFw6VMnXhw==")
CIRCLE_FLAGS = Package("@iconify-json/circle-flags", "1.2.11", "MIT", "vrx2btOkTQ4/P75ElEDnjXShmNTwInXuhhpIQQ6U6YUTdxfWyvm/4ijNG8FX8iWFr+sqqQRCvXpm2RfRtjVXfg==")
OPENMOJI = Package("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==")
EMOJIBASE = Package("emojibase-data", "17.0.0", "MIT", "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==")
CLDR = Package("cldr-annotations-full", "48.2.0", "Unicode-3.0", "DV7A+rEcgUSNTRsVGNGqBZRmAkGfwhGHO5Q1dRwzBoBnVrHWp804JP7/QJdEc66iHmx3+zLWVIMCFLm0lW7PUQ==")
CLDR_DERIVED = Package("cldr-annotations-derived-full", "48.2.0", "Unicode-3.0", "log62km+AOzI7n/NEuNNFV0mg9DWnt67EYCh1RwxZq9dyRuyteB586LT83Ke8TchEfnwI9cIk2P31zO4nTvZmw==")
CAPTION_PACKAGES = (EMOJIBASE, CLDR, CLDR_DERIVED)


class Style(NamedTuple):
    name: str
    package: Package
    keys: str  # how its pictures are named: a key of MATCHERS
    pictures: int  # how many must come out


STYLES = (
    Style("twemoji", TWEMOJI, "slug", 1914),
    Style("noto", NOTO, "slug", 1653),
    Style("fluent_flat", FLUENT_FLAT, "slug", 1595),
    Style("fluent_color", FLUENT, "slug", 1595),
    Style("noto_v1", NOTO_V1, "slug", 1218),
    Style("emojione2", EMOJIONE, "slug", 1080),
    Style("fxemoji", FXEMOJI, "squashed", 883),
    Style("flag_icons", FLAG, "country-4x3", 258),
    Style("circle_flags", CIRCLE_FLAGS, "country", 256),
    Style("openmoji", OPENMOJI, "slug", 1914),  # held out: evaluation only
)


class Failure(Exception):
    """What was expected, and what was found."""


# --- packages ---------------------------------------------------------------------------------


def tarball(package, folder):
    """The path of the package's verified tarball in `folder`, downloaded if it is not there."""
    path = folder / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if not path.exists():
        if shutil.which("npm") is None:
            raise Failure(f"{path} is not there and npm, which downloads it, is not on PATH")
        spec = f"{package.name}@{package.version}"
        done = subprocess.run(["npm", "pack", spec, "--pack-destination", str(folder)], capture_output=True, text=True)
        if done.returncode != 0 or not path.exists():
            raise Failure(f"`npm pack {spec}` exited {done.returncode} without {path}:\n{done.stderr.strip()}")
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise Failure(f"{path}: sha512 is {found}, expected {package.sha512}; delete it to download it again")
    return path


WANTED = re.compile(
    r"package/(icons|chars|(en|zh)/data|en/shortcodes/\w+(-native)?|meta/(groups|unicode-names)"
    r"|annotations(Derived)?/(en|zh)/annotations)\.json"
)


def read_json(package, folder):
    """{member: parsed JSON} of a tarball. Nothing is unpacked to disk, so no member can escape a folder."""
    with tarfile.open(tarball(package, folder)) as archive:
        wanted = [m for m in archive if m.isfile() and WANTED.fullmatch(m.name)]
        return {m.name.removeprefix("package/"): json.load(archive.extractfile(m)) for m in wanted}


# --- captions ---------------------------------------------------------------------------------


def codepoints(hexcode):
    """A comparable key: lower case, without the variation selectors U+FE0E and U+FE0F."""
    return "-".join(c for c in hexcode.lower().split("-") if c not in ("fe0e", "fe0f"))


def caption_rows(emojibase, cldr, cldr_derived):
    """One row per emoji in Unicode order. Names and keywords are CLDR's, then emojibase's."""
    groups, subgroups = emojibase["meta/groups.json"]["groups"], emojibase["meta/groups.json"]["subgroups"]
    languages = {}  # {"en": ({hexcode: emojibase row}, {emoji: CLDR annotation})}
    for language in ("en", "zh"):
        derived = cldr_derived[f"annotationsDerived/{language}/annotations.json"]["annotationsDerived"]["annotations"]
        direct = cldr[f"annotations/{language}/annotations.json"]["annotations"]["annotations"]
        annotations = {e.replace("\ufe0f", ""): a for e, a in (derived | direct).items()}
        languages[language] = ({e["hexcode"]: e for e in emojibase[f"{language}/data.json"]}, annotations)

    rows = []
    emoji = [e for e in emojibase["en/data.json"] if groups.get(str(e.get("group"))) not in (None, "component")]
    for entry in sorted(emoji, key=lambda e: e["order"]):
        row = {
            "hexcode": entry["hexcode"],
            "emoji": entry["emoji"],
            "group": groups[str(entry["group"])],
            "subgroup": subgroups[str(entry["subgroup"])],
        }
        for language, (entries, annotations) in languages.items():
            annotation = annotations.get(entry["emoji"].replace("\ufe0f", ""), {})
            own = entries[entry["hexcode"]]
            name = (annotation.get("tts") or [own["label"]])[0]
            keywords = dict.fromkeys([*annotation.get("default", []), *own.get("tags", [])])
            row[language] = {"name": name, "keywords": [k for k in keywords if k and k != name]}
        rows.append(row)
    return rows


# --- which picture shows which row ------------------------------------------------------------


def slug(name):
    """'Côte d’Ivoire' -> 'cote-divoire': how the icon sets spell a CLDR name."""
    name = re.sub("['’“”]", "", name.lower())
    name = "".join(c for c in unicodedata.normalize("NFD", name) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9#*]+", "-", name).strip("-")


def squash(name):
    return re.sub(r"[^a-z0-9]", "", name.lower())


class Names(NamedTuple):
    by_codepoints: dict  # {codepoints: row}
    by_slug: dict  # {slug of the English name, or any set's icon name for a known code point: row}
    by_squashed: dict  # {squashed English, Unicode or short name that only one row has: row}


def names_of(rows, emojibase, sets):
    by_codepoints = {codepoints(r["hexcode"]): i for i, r in enumerate(rows)}
    by_slug = {slug(r["en"]["name"]): i for i, r in enumerate(rows)}
    for files in sets:
        for hexcode, icon in files.get("chars.json", {}).items():
            if codepoints(hexcode) in by_codepoints:
                by_slug.setdefault(icon, by_codepoints[codepoints(hexcode)])

    owners = {}  # {squashed name: the rows that have it}
    shortcodes = [codes for path, codes in sorted(emojibase.items()) if path.startswith("en/shortcodes/")]
    for i, row in enumerate(rows):
        names = [row["en"]["name"], emojibase["meta/unicode-names.json"].get(row["hexcode"], "")]
        for codes in shortcodes:
            found = codes.get(row["hexcode"], [])
            names += [found] if isinstance(found, str) else found
        for name in names:
            owners.setdefault(squash(name), set()).add(i)
    by_squashed = {n: min(o) for n, o in owners.items() if len(o) == 1 and len(n) >= 3}
    return Names(by_codepoints, by_slug, by_squashed)


def icon_names(files):
    return [*files["icons.json"]["icons"], *files["icons.json"].get("aliases", {})]


def match_slug(files, rows, names):
    """Code points where the set lists them, else the slug."""
    for hexcode, icon in files.get("chars.json", {}).items():
        if codepoints(hexcode) in names.by_codepoints:
            yield names.by_codepoints[codepoints(hexcode)], icon
    for icon in icon_names(files):
        if icon in names.by_slug:
            yield names.by_slug[icon], icon


def match_squashed(files, rows, names):
    for icon in icon_names(files):
        if squash(icon) in names.by_squashed:
            yield names.by_squashed[squash(icon)], icon


def match_country(files, rows, suffix):
    """Icons named by ISO 3166 code; a flag emoji is that code in two regional indicators."""
    known = set(icon_names(files))
    for i, row in enumerate(rows):
        letters = [ord(c) - 0x1F1E6 for c in row["emoji"]]
        if len(letters) == 2 and all(0 <= letter < 26 for letter in letters):
            icon = "".join(chr(ord("a") + letter) for letter in letters) + suffix
            if icon in known:
                yield i, icon


MATCHERS = {  # each yields (row, icon); the first icon of a row wins
    "slug": match_slug,
    "squashed": match_squashed,
    "country": lambda files, rows, names: match_country(files, rows, ""),
    "country-4x3": lambda files, rows, names: match_country(files, rows, "-4x3"),
}


def match(style, files, rows, names, said):
    """{row: icon}. `said` is {icon: English name, or None for no emoji}, judged by eye; its icons are not guessed at."""
    known, by_name, found = set(icon_names(files)), {row["en"]["name"]: i for i, row in enumerate(rows)}, {}
    for icon, name in said.items():
        if icon not in known or (name is not None and name not in by_name):
            raise Failure(f"matches.json: {style.name}: expected an icon and an emoji, found {icon!r}: {name!r}")
        if name is not None and found.setdefault(by_name[name], icon) != icon:
            raise Failure(f"matches.json: {style.name}: {name!r} is both {found[by_name[name]]!r} and {icon!r}")
    for i, icon in MATCHERS[style.keys](files, rows, names):
        if icon not in said:
            found.setdefault(i, icon)
    if len(found) != style.pictures:
        raise Failure(f"{style.name}: expected {style.pictures} pictures, found {len(found)}")
    return found


# --- pictures ---------------------------------------------------------------------------------


class Drawing(NamedTuple):
    svg: str
    mirrored: bool


def drawing(icons, name):
    """The SVG of an icon of an iconify set; an alias may mirror its parent."""
    mirrored = False
    while name not in icons["icons"]:
        alias = icons["aliases"][name]
        unknown = set(alias) - {"parent", "hFlip", "hidden"}
        if unknown:
            raise Failure(f"alias {name}: expected parent, hFlip or hidden, found {sorted(unknown)}")
        name, mirrored = alias["parent"], mirrored != alias.get("hFlip", False)
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{SIZE}" height="{SIZE}">{icon["body"]}</svg>'
    )  # a drawing that is not square is centred: SVG's default preserveAspectRatio
    return Drawing(svg, mirrored)


def render(drawing, size=SIZE):
    """uint8 [size, size, 4]."""
    png = resvg_py.svg_to_bytes(svg_string=drawing.svg, width=size, height=size, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    pixels = np.asarray(ImageOps.mirror(picture) if drawing.mirrored else picture)
    if pixels.shape != (size, size, 4):
        raise Failure(f"a drawing came out as {pixels.shape}, expected {(size, size, 4)}")
    return pixels


def progress(line, end="\n"):
    print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, end=end, file=sys.stderr, flush=True)


def render_style(style, found, icons, pool):
    """uint8 [n_pictures, SIZE, SIZE, 4] in the order of the rows."""
    drawings = [drawing(icons, found[i]) for i in sorted(found)]
    pixels = np.empty((len(drawings), SIZE, SIZE, 4), np.uint8)
    for n, picture in enumerate(pool.map(render, drawings, chunksize=16)):
        pixels[n] = picture
        if sys.stderr.isatty() and n % 16 == 0:
            progress(f"{style.name}: {n} of {len(drawings)}", end="")
    empty = [found[i] for i, p in zip(sorted(found), pixels) if (p[..., 3] > 32).mean() < 0.01]
    if empty:
        raise Failure(f"{style.name}: expected a drawing, found nothing visible in {', '.join(empty)}")
    progress(f"{style.name}: {len(drawings)} pictures")
    return pixels


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", type=Path, default=Path("packages"), help="where the tarballs are kept")
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--jobs", type=int, default=2, help="rendering processes")
    args = parser.parse_args()
    args.packages.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    progress("reading packages")
    emojibase, cldr, cldr_derived = (read_json(package, args.packages) for package in CAPTION_PACKAGES)
    sets = {style.name: read_json(style.package, args.packages) for style in STYLES}
    rows = caption_rows(emojibase, cldr, cldr_derived)
    names = names_of(rows, emojibase, sets.values())

    said = json.loads((Path(__file__).parent / "matches.json").read_text(encoding="utf8"))
    matches = {style: match(style, sets[style.name], rows, names, said.get(style.name, {})) for style in STYLES}

    tensors, styles = {}, {}
    with ProcessPoolExecutor(args.jobs) as pool:
        for style, found in matches.items():
            tensors[f"{style.name}.pixels"] = render_style(style, found, sets[style.name]["icons.json"], pool)
            tensors[f"{style.name}.index"] = np.array(sorted(found), np.int64)
            styles[style.name] = {
                "package": style.package.name,
                "version": style.package.version,
                "license": style.package.license,
                "pictures": len(found),
                "groups": Counter(rows[i]["group"] for i in sorted(found)),
            }

    report = {
        "size": SIZE,
        "rows": len(rows),
        "groups": Counter(row["group"] for row in rows),
        "captions": {lang: sum(1 + len(row[lang]["keywords"]) for row in rows) for lang in ("en", "zh")},
        "caption_packages": {p.name: {"version": p.version, "license": p.license} for p in CAPTION_PACKAGES},
        "styles": styles,
    }
    (args.out / "emoji.safetensors").write_bytes(save(tensors))
    for file, value in (("captions.json", rows), ("report.json", report)):
        (args.out / file).write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf8")
    progress(f"wrote {len(rows)} rows, {sum(len(f) for f in matches.values())} pictures into {args.out}")


if __name__ == "__main__":
    try:
        main()
    except Failure as failure:
        sys.exit(f"prepare.py: {failure}")
