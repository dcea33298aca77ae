"""Building the emoji image set: packages of vector drawings are drawn at 128 x 128, put on white and halved.

Every step is deterministic: packages are pinned by hash, drawing is done by resvg, and the pixels of the result are
compared with the recorded sha256.
"""

import hashlib
import io
import json
import multiprocessing
import os
import re
import zipfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import PIL.Image
from diffusers.utils.logging import tqdm

from visar.data.emoji import FILE, PIXELS_SHA256, pack_pixels
from visar.data.emoji_splits import SPLITS, concept_key, shipped_splits, unit_hash
from visar.data.packages import NAMES, STYLE_PACKAGES, fetch_package, read_members
from visar.io.arrays import read_arrays
from visar.io.files import atomic_write

SIZE = 64
DRAWN_SIZE = 128
TONES = (0, 1, 3, 5)  # 0 is none (yellow); 2 and 4 are left out as near-copies of their neighbours
SMALLEST_CLASS = 40  # Unicode subgroups of fewer images are put together
RESVG_VERSION = "0.5.0"  # what the recorded pixels were drawn with
_LEFT_OUT_SUBGROUPS = ("country-flag", "subdivision-flag", "skin-tone", "hair-style")
_BLANK_DEVIATION = 6.0  # images that vary less, in levels of 0 ... 255, are blank

STYLE_WORDS = {
    "noto": "noto",
    "twemoji": "twemoji",
    "fluent-flat": "flat fluent",
    "fluent-3d": "3d fluent",
    "noto-blob": "blob",
    "emojione": "emojione",
    "fxemoji": "firefox",
}
STYLE_LICENCES = {
    "noto": ("Apache-2.0", "Noto Emoji, Copyright Google Inc."),
    "twemoji": ("CC-BY-4.0", "Twemoji, Copyright Twitter, Inc. and other contributors (jdecked/twemoji)"),
    "fluent-flat": ("MIT", "Fluent Emoji, Copyright Microsoft Corporation"),
    "fluent-3d": ("MIT", "Fluent Emoji, Copyright Microsoft Corporation; WebP packaging Copyright LobeHub"),
    "noto-blob": ("Apache-2.0", "Noto Emoji (v1), Copyright Google Inc."),
    "emojione": ("CC-BY-4.0", "EmojiTwo / EmojiOne 2, Copyright Ranks.com Inc. and the EmojiTwo contributors"),
    "fxemoji": (
        "CC-BY-4.0",
        "FxEmojis, Copyright Mozilla Foundation (the package says Apache-2.0; upstream: that is for its code)",
    ),
}


@dataclass(frozen=True)
class Emoji:
    """What Unicode says about one emoji.

    Attributes:
        code: code points in hexadecimal joined by "-", without variation selectors.
        name: lower-case name.
        tone: skin tone, 0 (none) ... 5.
        group, subgroup: where it belongs.
        tags: keywords.
        order: its place in the standard order.
    """

    code: str
    name: str
    tone: int
    group: str
    subgroup: str
    tags: tuple[str, ...]
    order: int


@dataclass(frozen=True)
class Drawing:
    """One image to be drawn.

    Attributes:
        code: which emoji.
        source: an SVG text, or an encoded bitmap.
        width, height: in pixels, of the drawn SVG.
    """

    code: str
    source: str | bytes
    width: int = DRAWN_SIZE
    height: int = DRAWN_SIZE


# --------------------------------------------------------------------------------------------------- names and sources
def normal_code(code: str) -> str:
    """Lower-case code points without variation selectors."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def read_emoji_names(path: Path) -> dict[str, Emoji]:
    """Emoji by code from the package of names; mixed tones, country flags and components are left out."""
    files = {name: json.loads(blob) for name, blob in read_members(path, r"en/data\.json|meta/groups\.json")}
    groups, subgroups = files["meta/groups.json"]["groups"], files["meta/groups.json"]["subgroups"]
    found = {}
    for base in files["en/data.json"]:
        for entry in (base, *base.get("skins", [])):
            tone = entry.get("tone", 0)
            if base.get("group") is None or isinstance(tone, list):
                continue
            subgroup = subgroups[str(base["subgroup"])]
            if subgroup not in _LEFT_OUT_SUBGROUPS:
                code = normal_code(entry["hexcode"])
                tags = tuple(base.get("tags", []))
                group = groups[str(base["group"])]
                found[code] = Emoji(code, entry["label"].lower(), tone, group, subgroup, tags, base.get("order", 0))
    return found


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


def read_drawings(path: Path, names: dict[str, Emoji]) -> list[Drawing]:
    """Drawings of known emoji in a style's package, ordered by code.

    Packages of bitmaps name them by code. Those of SVG list codes, or else their icons' names are compared with
    Unicode's.
    """
    bitmaps = {normal_code(Path(name).stem): blob for name, blob in read_members(path, r".*\.webp")}
    if bitmaps:
        return [Drawing(code, bitmaps[code]) for code in sorted(bitmaps) if code in names]
    files = {name: json.loads(blob) for name, blob in read_members(path, r"icons\.json|chars\.json")}
    icons, characters = files["icons.json"], files.get("chars.json", {})
    by_name = {_letters(emoji.name): code for code, emoji in names.items()}
    icon_of: dict[str, str] = {}
    for code, icon in characters.items():
        if normal_code(code) in names and icon in icons["icons"]:
            icon_of.setdefault(normal_code(code), icon)
    if not characters:
        for icon in icons["icons"]:
            if _letters(icon) in by_name:
                icon_of.setdefault(by_name[_letters(icon)], icon)
    return [_svg(code, icons["icons"][icon_of[code]], icons) for code in sorted(icon_of)]


def _svg(code: str, icon: dict[str, Any], defaults: dict[str, Any]) -> Drawing:
    left, top = icon.get("left", 0), icon.get("top", 0)
    width, height = (icon.get(side, defaults.get(side, 16)) for side in ("width", "height"))
    text = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    zoom = DRAWN_SIZE / max(width, height)
    return Drawing(code, text, round(width * zoom), round(height * zoom))


# ------------------------------------------------------------------------------------------------------------- drawing
def on_white(image: PIL.Image.Image, size: int = SIZE) -> np.ndarray:
    """An image in the middle of a white square, reduced to uint8 [size, size, 3]."""
    image = image.convert("RGBA")
    side = max(image.size)
    square = PIL.Image.new("RGBA", (side, side), (255, 255, 255, 255))
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    flat = square.convert("RGB")
    if side != size:
        exact = side % size == 0
        flat = flat.resize((size, size), PIL.Image.Resampling.BOX if exact else PIL.Image.Resampling.LANCZOS)
    return np.asarray(flat)


def draw(drawing: Drawing) -> np.ndarray:
    """uint8 [64, 64, 3] of a drawing."""
    blob = drawing.source
    if isinstance(blob, str):
        import resvg_py

        blob = bytes(
            resvg_py.svg_to_bytes(svg_string=blob, width=drawing.width, height=drawing.height, skip_system_fonts=True)
        )
    with PIL.Image.open(io.BytesIO(blob)) as image:
        return on_white(image)


def _draw_all(style: str, drawings: Sequence[Drawing], kept: Path, processes: int) -> np.ndarray:
    """Images of one style, uint8 [N, 64, 64, 3]; read from the file `kept` if they are there already."""
    if kept.is_file():
        return read_arrays(kept, ["images"])["images"]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        drawn = pool.map(draw, drawings, chunksize=32)
        images = np.stack(list(tqdm(drawn, desc=f"draw {style}", total=len(drawings))))
    with atomic_write(kept) as temporary:
        np.savez(temporary, images=images)
    return images


def _resvg_version() -> str:
    try:
        return metadata.version("resvg-py")
    except metadata.PackageNotFoundError as error:
        raise ImportError("drawing needs resvg-py: pip install 'torch-visar[data]'") from error


# --------------------------------------------------------------------------------------------------------------- files
def key_split(style: str, code: str) -> int:
    """Split by key alone: that of the clips, and the first key of the still images' order in their file.

    For the still images it is older than the shipped split, and stays because the recorded sha256 is over the pixels
    in this order.
    """
    key = concept_key(code)
    if unit_hash(f"concept:{key}") < 0.04:
        return 2
    return int(unit_hash(f"pair:{style}:{key}") < 0.05)


def class_names(places: Sequence[tuple[str, str]]) -> list[str]:
    """Class "group/subgroup" of every image; small subgroups of a group become "group/other".

    Where even those together are few, they join the group's largest subgroup.

    Args:
        places: (group, subgroup) of every image.
    """
    count = Counter(places)
    largest: dict[str, str] = {}
    for (group, subgroup), _ in count.most_common():
        largest.setdefault(group, subgroup)
    few: Counter[str] = Counter()
    for (group, _), pictures in count.items():
        few[group] += pictures if pictures < SMALLEST_CLASS else 0
    names = {}
    for (group, subgroup), pictures in count.items():
        together = "other" if few[group] >= SMALLEST_CLASS else largest[group]
        names[group, subgroup] = f"{group}/{subgroup if pictures >= SMALLEST_CLASS else together}"
    return [names[place] for place in places]


def emoji_facts(pictures: Sequence[tuple[str, Emoji]], images_NHWC: np.ndarray, dropped: Counter[str]) -> dict:
    """The content of meta.json.

    Args:
        pictures: style and emoji of every image, in file order.
        images_NHWC: their pixels.
        dropped: numbers of images left out, by reason and style.
    """
    styles = list(STYLE_PACKAGES)
    names = class_names([(emoji.group, emoji.subgroup) for _, emoji in pictures])
    classes, groups = sorted(set(names)), sorted({emoji.group for _, emoji in pictures})
    tags = {emoji.name: list(emoji.tags) for _, emoji in pictures}
    labels = sorted(tags)
    return {
        "format": 1,
        "size": SIZE,
        "count": len(pictures),
        "tones": list(TONES),
        "classes": classes,
        "groups": groups,
        "styles": styles,
        "style_words": STYLE_WORDS,
        "splits": list(SPLITS),
        "licences": {
            style: {"spdx": licence, "attribution": text} for style, (licence, text) in STYLE_LICENCES.items()
        },
        "labels": labels,
        "tags": [tags[label] for label in labels],
        "style": "".join(str(styles.index(style)) for style, _ in pictures),
        "tone": "".join(str(emoji.tone) for _, emoji in pictures),
        "class": [classes.index(name) for name in names],
        "group": "".join(str(groups.index(emoji.group)) for _, emoji in pictures),
        "label": [labels.index(emoji.name) for _, emoji in pictures],
        "hex": [emoji.code for _, emoji in pictures],
        "pixels_sha256": hashlib.sha256(images_NHWC.tobytes()).hexdigest(),
        "dropped": dict(sorted(dropped.items())),
    }


def write_archive(path: Path, files: dict[str, bytes], deflated: Sequence[str] = ("meta.json",)) -> None:
    """A zip file that depends on its contents only, written whole or not at all."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, blob in files.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            compressed = name in deflated
            archive.writestr(
                info, blob, zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED, 9 if compressed else None
            )


def plain_json(value: object) -> bytes:
    """Compact UTF-8 JSON."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def collect_pictures(
    names: dict[str, Emoji], sources: dict[str, list[Drawing]], images: dict[str, np.ndarray]
) -> tuple[list[tuple[str, Emoji]], np.ndarray, Counter[str]]:
    """Images to keep, in file order: wanted tones, not blank, and no exact copy of an earlier one.

    Args:
        names: emoji by code.
        sources, images: drawings and their pixels by style, in the order of the styles' numbers.

    Returns: (style and emoji of every image, pixels uint8 [N, 64, 64, 3], numbers left out by reason and style).
    """
    kept: list[tuple[str, Emoji, np.ndarray]] = []
    seen: set[bytes] = set()
    dropped: Counter[str] = Counter()
    for style, drawings in sources.items():
        for drawing, image in zip(drawings, images[style], strict=True):
            emoji = names[drawing.code]
            if emoji.tone not in TONES:
                continue
            pixels = hashlib.sha256(image.tobytes()).digest()
            if image.astype(np.int16).std() < _BLANK_DEVIATION:
                dropped[f"blank:{style}"] += 1
            elif pixels in seen:
                dropped[f"duplicate:{style}"] += 1
            else:
                seen.add(pixels)
                kept.append((style, emoji, image))
    styles = list(STYLE_PACKAGES)
    kept.sort(key=lambda x: (key_split(x[0], x[1].code), styles.index(x[0]), x[1].order, x[1].code))
    return [(style, emoji) for style, emoji, _ in kept], np.stack([image for *_, image in kept]), dropped


def build_emoji(out: str | Path, processes: int | None = None) -> Path:
    """Builds emoji64.zip and, beside it, ATTRIBUTION.md; about 32 MB of downloads and some minutes of drawing.

    Downloads and drawn images are kept in the folder `packages`, so a second call resumes where the first ended; the
    folder may be removed afterwards. A finished file is left as it is.

    Args:
        out: folder.
        processes: that draw; None = one a core.

    Returns: path of emoji64.zip.

    Raises:
        ImportError: resvg-py is missing.
        ValueError: no npm client, a failed download, a package or a result with another sha256 than recorded.
    """
    out = Path(out)
    if (out / FILE).is_file():
        return out / FILE
    version = _resvg_version()
    packages = out / "packages"
    tarballs = {style: fetch_package(package, packages) for style, package in STYLE_PACKAGES.items()}
    names = read_emoji_names(fetch_package(NAMES, packages))
    sources, images = {}, {}
    for style, tarball in tarballs.items():
        sources[style] = read_drawings(tarball, names)
        kept = packages / f"drawn-{style}-{STYLE_PACKAGES[style].version}-resvg-{version}.npz"
        images[style] = _draw_all(style, sources[style], kept, processes or os.cpu_count() or 1)
    pictures, pixels, dropped = collect_pictures(names, sources, images)
    facts = emoji_facts(pictures, pixels, dropped)
    if facts["pixels_sha256"] != PIXELS_SHA256:
        raise ValueError(
            f"the {len(pictures)} images drawn have sha256 {facts['pixels_sha256']}, the recorded one is "
            f"{PIXELS_SHA256}; they were drawn with resvg-py {version} and Pillow {PIL.__version__}, the recorded "
            f"ones with resvg-py {RESVG_VERSION}: pip install resvg-py=={RESVG_VERSION}, remove "
            f"{packages}/drawn-*.npz and run the command again"
        )
    facts["split"] = "".join(str(split) for split in shipped_splits(PIXELS_SHA256, len(pictures)))
    attribution = resources.files("visar.data").joinpath("ATTRIBUTION.md").read_bytes()
    with atomic_write(out / "ATTRIBUTION.md") as temporary:
        temporary.write_bytes(attribution)
    write_archive(out / FILE, {"meta.json": plain_json(facts), "pixels.npy.xz": pack_pixels(pixels)})
    return out / FILE
