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
    """Model to time instead of a preset: an embedded or official name, or a folder."""
    preset: str | None = None
    """Released shape with random weights: llamagen-b, -l, -xl, -xxl, -3b, var-d16, -d20, -d24, -d30, -d36, hmar-d16,
    -d20, -d24, -d30, mar-base, -large, -huge (with --sampler masked), or vq-16 (decoding alone)."""
    batch: tuple[int, ...] = (1, 8)
    """Batch sizes to time, in images."""
    sampler: str = "ancestral"
    """Sampler to time (`visar samplers`); its own settings are given as --sampler.NAME VALUE."""
    grid: int | None = None
    """Tokens per side, for llamagen-* and vq-16; 16 when not given."""
    guidance_scale: float = 2.0
    """Guidance scale; 1.0 = off; any other doubles the batch."""
    top_k: int = 0
    """Number of likeliest codes that may be drawn (top-k); 0 = off."""
    top_p: float = 1.0
    """Probability mass of the likeliest codes that may be drawn (top-p), in (0, 1]; 1.0 = off."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of the weights and the cache."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """int8 or fp8: store the weights of the generator's blocks and head in 8 bits; needs torchao."""
    deterministic: Literal["auto", "batch", "off"] = "auto"
    """When decoding gives the same bits in every batch size. batch: always; auto: in float32 only; off: never. See
    docs/seeds.md."""
    paths: tuple[PathName, ...] = ("eager", "captured")
    """How steps run: eager, or captured as CUDA graphs, which needs a GPU."""
    runs: int = 3
    """Number of timed calls, after two that warm up and capture."""
    eager_steps: int = 64
    """Steps per timed eager call of a raster model (captured calls are timed whole): all eager steps of a model take
    the same time."""
    window: tuple[int, ...] = ()
    """Numbers of slots of verification passes to time instead, such as 1 4 8 16 32 64 96; raster models only."""
    profile: bool = False
    """List the operations that take the most time instead."""
    compare: Path | None = None
    """Folder with visar_peer.py: `def load(preset, batch, dtype, guidance_scale, top_k)` returns a function that makes
    one batch. It runs in its own process, in turns with visar. A line PRODUCT = "tokens" or "images" (the default)
    says what a call makes."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=("--json",))] = None
    """File that the rows are added to, one JSON object per line."""
    baseline: Path | None = None
    """File of earlier rows to compare with: exit status 1 if a median is worse by more than 3 % and twice the
    spread."""


@dataclass(frozen=True)
class Acceptance(Placement, Filters):
    """Measures speculative samplers: tokens per pass, accepted drafts, speed against plain sampling.

    Passes run as CUDA graphs on a GPU; every sampler is called once untimed first. Writes acceptance.json and
    acceptance.md after every row.
    """

    model: tyro.conf.Positional[str]
    """Name or folder of a raster model, or of one over continuous tokens."""
    out: Path = Path("acceptance")
    """Folder for acceptance.json and acceptance.md."""
    samplers: tuple[str, ...] = ()
    """Samplers, each as NAME or NAME:setting=value,setting=value; when not given, all with usual settings, which
    models over continuous tokens do not have. Plain sampling is always measured first."""
    drafters: tuple[str, ...] = ("ngram",)
    """Drafters of the samplers with usual settings: ngram, eagle, heads, folders of drafters, or names of smaller
    models."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Batch sizes to measure, in images per call."""
    calls: int = 4
    """Number of timed calls per row."""
    seed: int = 0
    """Seed of the first image; image i has seed + i, whatever the sampler."""
    background: Literal["white", "black"] = "white"
    """Background colour of the training images, by which blank tokens are known."""


@dataclass(frozen=True)
class Seeds:
    """Compares images of the same seeds made in other batches, orders and processes, resumed, with other threads.

    One row per model and sampler. A cell is "equal", or the share of images that are, to the last bit of their pixels.
    """

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """Embedded models to compare; all generators when not given."""
    samplers: tuple[str, ...] = ()
    """Samplers to compare, as they stand in the table, such as ancestral or jacobi:window=8; all when not given."""
    out: Path = Path("seeds.json")
    """JSON file for the rows; the table is written beside it, with the ending .md."""
    settings: tuple[str, ...] = ("float32:auto",)
    """Settings to compare, each as DTYPE:DETERMINISTIC, such as bfloat16:batch or bfloat16:off; the column dtype
    compares with the first."""
    batch: int = 64
    """Batch size of the reference run."""
    other_batches: tuple[int, ...] = (1, 5, 16, 256)
    """Batch sizes that are compared with the reference; those larger than the number of images are left out."""
    images: int = 256
    """Number of images of ancestral and next_scale."""
    slow_images: int = 64
    """Number of images of the other samplers."""
    calls: int = 16
    """Largest number of calls with smaller batches: batch 1 is compared on as many images."""
    processes: int = 2
    """2: also make each half of the images in a process of its own; 1: do not."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
