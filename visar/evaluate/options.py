"""Options of `visar eval`, its modes, `visar acceptance` and `visar stats`; flags are made from the fields."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

LabelPolicy = Literal["balanced", "random", "histogram", "prompts", "none"]
KeepImages = Literal["none", "png", "npz"]
ResizeChain = Literal["none", "adm", "torchvision"]


@dataclass(frozen=True)
class Eval:
    """Generates images, scores them against a reference and writes the figure with its whole protocol.

    Under torchrun or accelerate launch the images are shared among the processes. A run that was stopped goes on where
    it was when the same command is given again.
    """

    model: tyro.conf.Positional[str]
    """A model's name or folder (`visar models`); or pictures: a folder of them, an .npz, or PLACE@val."""
    reference: str
    """A shipped statistics file's name, a file of `visar stats`, an ADM batch, an .npz of images, a folder, or
    PLACE@train, a split of an image set."""
    out: Path = Path("evaluation")
    """Folder for metrics.json, card.md and the state of the run."""
    num_samples: int = 10_000
    """Pictures; published ImageNet figures use 50,000."""
    batch_size: Annotated[int | Literal["auto"], tyro.conf.arg(aliases=("--batch",))] = 64
    """Pictures at a time; auto finds how many fit into memory."""
    seed: int = 0
    """Image i has seed + i."""
    labels: LabelPolicy | Literal["auto"] = "auto"
    """auto is the training histogram where the model or the reference knows it, else balanced classes."""
    prompts: Path | None = None
    """Text file, one prompt a line, for models conditioned on words."""
    sampler: str | None = None
    """See `visar samplers`; its own settings are given as --sampler.NAME VALUE. The model's default when not given."""
    guidance_scale: float | None = None
    """1.0 = off; the model's own default when not given, as for temperature, top_k and top_p."""
    guidance_schedule: Literal["constant", "linear"] = "constant"
    """linear rises from 1.0 at the first block to the scale at the last."""
    temperature: float | None = None
    """> 0; 1.0 = off."""
    top_k: int | None = None
    """0 = off."""
    top_p: float | None = None
    """In (0, 1]; 1.0 = off."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (FD-Lite0) or inception-v3 (FID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor; needed for inception-v3 without a network."""
    layer: str | None = None
    """Features of the distance; the extractor's own choice when not given."""
    spatial: bool = False
    """Also sFID; inception-v3 only."""
    resize: ResizeChain = "none"
    """How pictures of a reference folder get their size: adm is the chain of ImageNet statistics."""
    image_size: int | None = None
    """That size in pixels."""
    train: str | None = None
    """Training pictures (folder, .npz, PLACE@train): also print the copy rate and draw the nearest ones."""
    held_out: str | None = None
    """Real pictures that were not trained on (PLACE@val): the copy rate's null."""
    keep_images: KeepImages = "none"
    """png: one file an image; npz: one file that ADM's evaluator reads."""
    uint8_rule: Literal["round", "truncate"] = "round"
    """How pixels are rounded; truncate only to reproduce figures that were made so."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for every weight of the generator's blocks and head; needs torchao."""


@dataclass(frozen=True)
class Stats:
    """Writes a statistics file of real pictures, to evaluate against without the pictures."""

    source: tyro.conf.Positional[str]
    """A folder of pictures, an .npz of images, or PLACE@train, a split of an image set with its labels."""
    out: Path
    """File to write, .npz."""
    protocol: Literal["generation", "reconstruction"] = "generation"
    """What it is a reference for: generation (training pictures) or reconstruction (a tokenizer's originals)."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (FD-Lite0) or inception-v3 (FID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor."""
    layer: str | None = None
    """Features of the distance; the extractor's own choice when not given."""
    spatial: bool = False
    """Also sFID's features; inception-v3 only."""
    resize: ResizeChain = "none"
    """How pictures of a folder get their size: adm is the chain of ImageNet statistics."""
    image_size: int | None = None
    """That size in pixels."""
    keep_features: bool = False
    """Store every picture's features too: KID, precision and recall need them."""
    batch_size: int = 64
    """Pictures at a time."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""


@dataclass(frozen=True)
class EvalTokenizer:
    """Encodes and decodes pictures and prints PSNR, SSIM, the reconstructions' distance and use of the codebook."""

    tokenizer: tyro.conf.Positional[str]
    """A tokenizer's name, or its folder."""
    images: str
    """Pictures that were not trained on: a folder, an .npz, or PLACE@val, a split of an image set."""
    out: Path = Path("reconstruction")
    """Folder for metrics.json."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (rFD-Lite0) or inception-v3 (rFID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor."""
    resize: ResizeChain = "none"
    """How pictures of a folder get their size."""
    image_size: int | None = None
    """That size in pixels."""
    batch_size: int = 64
    """Pictures at a time."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""


@dataclass(frozen=True)
class Compare:
    """The same seeds through several samplers or models: one table, relative to the first, and a picture of the trade.

    Without --samplers and --runs, the names are folders that `visar eval` wrote.
    """

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Models (each goes through every sampler), or folders written by `visar eval`."""
    out: Path = Path("comparison")
    """Folder for compare.md, compare.json, pareto.png, and a folder a run."""
    samplers: tuple[str, ...] = ()
    """Each as NAME or NAME:setting=value,setting=value, such as static_tree:branches=2,1,drafter=eagle. Settings of
    all: guidance_scale, guidance_schedule, temperature, top_k, top_p, as in next_scale:guidance_scale=2,top_p=0.9."""
    runs: tuple[str, ...] = ()
    """Instead of names and --samplers, each as MODEL/SAMPLER, such as emoji-raster/ancestral
    runs/var/model/next_scale:top_k=900: the last slash before the first colon divides model and sampler."""
    reference: str = ""
    """As of `visar eval`; its other flags have their defaults but for these:"""
    num_samples: int = 10_000
    """Pictures a run."""
    batch_size: int = 64
    """Pictures at a time."""
    speed_batches: tuple[int, ...] = ()
    """Also time whole calls of these batch sizes, tokens and decoding, and say the peak of GPU memory."""
    seed: int = 0
    """Image i has seed + i in every run."""
    guidance_scale: float | None = None
    """1.0 = off, of runs that do not say their own; each model's own default when not given. Where that default rises
    from block to block, so does this."""
    extractor: str = "efficientnet-lite0"
    """efficientnet-lite0 (FD-Lite0) or inception-v3 (FID)."""
    extractor_weights: Path | None = None
    """Weights file of the extractor."""
    train: str | None = None
    """Training pictures, for the copy rate."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""
