"""Options of `visar bench`, `visar acceptance` and `visar seeds`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from visar.pipelines.options import Filters, Placement

PathName = Literal["eager", "captured"]


@dataclass(frozen=True)
class Bench:
    """Times decoding on this machine, after checking that it is right: tokens, images, windows, or against a peer.

    Presets have random weights of the released shapes: anybody can repeat a figure, and none says anything about
    quality. Without a GPU a preset is replaced by a tiny model of its family and only checked, not timed.
    docs/benchmarks.md explains every column, and the file that --compare needs.
    """

    model: str | None = None
    """An embedded or official name, or a folder; instead of --preset."""
    preset: str | None = None
    """A released shape with random weights: llamagen-b, -l, -xl, -xxl, -3b, var-d16, -d20, -d24, -d30, -d36, hmar-d16,
    -d20, -d24, -d30, or vq-16 (decoding alone)."""
    batch: tuple[int, ...] = (1, 8)
    """Images at a time."""
    sampler: str = "ancestral"
    """See `visar samplers`; its own settings are given as --sampler.NAME VALUE."""
    grid: int | None = None
    """Tokens a side, for llamagen-* and vq-16; 16 when not given."""
    guidance_scale: float = 2.0
    """1.0 = off; otherwise the batch is doubled."""
    top_k: int = 0
    """0 = off."""
    top_p: float = 1.0
    """1.0 = off."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights and the cache."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for every weight of the generator's blocks and head instead; needs torchao."""
    deterministic: Literal["auto", "batch", "off"] = "auto"
    """batch: decoding that is the same bits in every batch size; auto: in float32 only. See docs/seeds.md."""
    paths: tuple[PathName, ...] = ("eager", "captured")
    """Ways to run a step; captured needs a GPU."""
    runs: int = 3
    """Timed calls, after two that warm up and capture."""
    eager_steps: int = 64
    """Steps of a timed eager call of a raster model (captured ones are timed whole): eager steps of one model take
    the same time each."""
    window: tuple[int, ...] = ()
    """Times a verification pass of so many slots instead, such as 1 4 8 16 32 64 96; raster models only."""
    profile: bool = False
    """Lists the operations that take the most time instead."""
    compare: Path | None = None
    """Folder with visar_peer.py: `def load(preset, batch, dtype, guidance_scale, top_k)` returns a function that makes
    one batch. It runs in a process of its own, in turns with ours. A line PRODUCT = "tokens" or "images" (the
    default) says what a call makes."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("--json",))] = None
    """Adds the rows to this file, one JSON object a line."""
    baseline: Path | None = None
    """Rows written before: exit status 1 if a median is worse by more than 3 % and twice the spread."""


@dataclass(frozen=True)
class Acceptance(Placement, Filters):
    """Measures speculative samplers of a raster model: tokens a pass, accepted drafts, speed against ancestral ones.

    Passes run as CUDA graphs on a GPU; every sampler is called once untimed first. Writes acceptance.json and
    acceptance.md after every row.
    """

    model: tyro.conf.Positional[str]
    """A raster model's name or folder."""
    out: Path = Path("acceptance")
    """Folder for acceptance.json and acceptance.md."""
    samplers: tuple[str, ...] = ()
    """Each as NAME or NAME:setting=value,setting=value; when not given, all with usual settings. Ancestral sampling is
    always measured first."""
    drafters: tuple[str, ...] = ("ngram",)
    """Drafters of the usual list: ngram, eagle, heads, folders of drafters, or smaller models' names."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Images of a call."""
    calls: int = 4
    """Timed calls a row; image i of a batch size has seed + i whatever the sampler."""
    seed: int = 0
    """Of the first image."""
    background: Literal["white", "black"] = "white"
    """What the pictures are drawn on."""


@dataclass(frozen=True)
class Seeds:
    """Compares images of the same seeds made in other batches, orders and processes, resumed, with other threads.

    A row a model and sampler; every cell is "equal" or the share of images that are, to the last bit of their pixels.
    """

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Embedded models; all generators when not given."""
    samplers: tuple[str, ...] = ()
    """Only these rows' samplers, as they stand in the table, such as ancestral or jacobi:window=8."""
    out: Path = Path("seeds.json")
    """File for the rows; the table goes beside it, with the ending .md."""
    settings: tuple[str, ...] = ("float32:auto",)
    """Each as DTYPE:DETERMINISTIC, such as bfloat16:batch or bfloat16:off; the first is what the column dtype compares
    with."""
    batch: int = 64
    """Images at a time of the reference run."""
    other_batches: tuple[int, ...] = (1, 5, 16, 256)
    """Batches that are compared with it; those larger than the number of images are left out."""
    images: int = 256
    """Images of ancestral and next_scale."""
    slow_images: int = 64
    """Images of the other samplers."""
    calls: int = 16
    """Most calls of a smaller batch: batch 1 is compared on so many images."""
    processes: int = 2
    """2 = also make each half of the images in a process of its own; 1 = do not."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
