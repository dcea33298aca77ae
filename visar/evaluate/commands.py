"""What `visar eval`, its mode --tokenizer and `visar stats` do; flags are made from the fields."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from visar.data.images import SPLITS
from visar.evaluate.extractors import load_extractor
from visar.evaluate.generation import KeepImages
from visar.evaluate.images import ResizeChain, open_images
from visar.evaluate.labels import LabelPolicy
from visar.evaluate.reconstruction import evaluate_reconstruction
from visar.evaluate.references import load_reference
from visar.evaluate.report import Report, table
from visar.evaluate.run import (
    Progress,
    RunOptions,
    ScoreOptions,
    evaluate_images,
    make_statistics,
    stacked,
)
from visar.evaluate.sharding import World, join_world, leave_world
from visar.guidance import Guidance
from visar.pipelines.loading import load, load_tokenizer, placement

Echo = Callable[[list[tuple[str, ...]]], None]


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
    """float32 or bfloat16; float32 on a CPU, bfloat16 on a GPU."""
    quantize: Literal["none", "int8", "fp8"] = "none"
    """8 bits for every weight of the generator's blocks and head; needs torchao."""


def evaluate(
    options: Eval,
    sampler_options: dict[str, Any],
    echo: Echo,
    progress: Progress | None = None,
    world: World | None = None,
) -> Report | None:
    """Runs `visar eval`.

    Args:
        options: its flags.
        sampler_options: of --sampler.NAME VALUE.
        echo: prints a table: header and rows.
        progress: told (what, done, total).
        world: the processes; None joins those of the launcher, for this call.

    Returns: the report in the first process, None in the others.
    """
    score = ScoreOptions(
        reference=options.reference,
        extractor=options.extractor,
        extractor_weights=options.extractor_weights,
        layer=options.layer,
        spatial=options.spatial,
        resize=options.resize,
        image_size=options.image_size,
        train=options.train,
        held_out=options.held_out,
    )
    joined = world or join_world(placement(options.device)[0])
    report: Report | None = None
    if not _is_pictures(options.model):
        report = _score_model(options, sampler_options, score, joined, progress)
    elif joined.rank == 0:
        report = _score_pictures(options, score, joined.device, progress)
    if world is None:
        leave_world(joined)
    if report is not None:
        echo(table([report]))
    return report


def _is_pictures(model: str) -> bool:
    path, (place, at, split) = Path(model), model.rpartition("@")
    if at and split in SPLITS and Path(place).exists():
        return True
    return path.suffix in (".npz", ".zip", ".parquet") or (path.is_dir() and not (path / "model_index.json").exists())


def _score_pictures(options: Eval, score: ScoreOptions, device: torch.device, progress: Progress | None) -> Report:
    extractor = score.load_extractor(device)
    images = open_images(options.model, options.resize, options.image_size)
    batch_size = 64 if isinstance(options.batch_size, str) else options.batch_size
    reference = load_reference(
        score.reference,
        extractor,
        batch_size=batch_size,
        resize=options.resize,
        image_size=options.image_size,
    )
    return evaluate_images(
        images,
        reference,
        extractor,
        options.out,
        batch_size=batch_size,
        train_NHWC=None if score.train is None else stacked(open_images(score.train)),
        held_out_NHWC=None if score.held_out is None else stacked(open_images(score.held_out)),
        progress=progress,
    )


def _score_model(
    options: Eval,
    sampler_options: dict[str, Any],
    score: ScoreOptions,
    world: World,
    progress: Progress | None,
) -> Report | None:
    from visar.evaluate.pipeline import Sampling, evaluate_pipeline

    guidance = None
    if options.guidance_scale is not None:
        guidance = Guidance(options.guidance_scale, schedule=options.guidance_schedule)
    elif options.guidance_schedule != "constant":
        raise ValueError("--guidance-schedule linear needs --guidance-scale")
    prompts = () if options.prompts is None else read_prompts(options.prompts)
    pipeline = load(options.model, device=world.device, dtype=options.dtype, quantize=options.quantize)
    batch_size = options.batch_size
    if isinstance(batch_size, str):
        batch_size = pipeline.find_batch_size(
            options.num_samples,
            sampler=options.sampler,
            sampler_options=sampler_options,
            guidance_scale=guidance,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    return evaluate_pipeline(
        pipeline,
        Sampling(options.sampler, sampler_options, guidance, options.temperature, options.top_k, options.top_p),
        score,
        RunOptions(
            out=options.out,
            num_samples=options.num_samples,
            batch_size=batch_size,
            seed=options.seed,
            labels=options.labels,
            keep_images=options.keep_images,
        ),
        name=options.model,
        uint8_rule=options.uint8_rule,
        prompts=prompts,
        world=world,
        progress=progress,
    )


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


def stats(options: Stats, echo: Echo, progress: Progress | None = None) -> None:
    """Runs `visar stats`; arguments as of `evaluate`."""
    device = placement(options.device)[0]
    extractor = load_extractor(
        options.extractor,
        device=device,
        weights=options.extractor_weights,
        layer=options.layer,
        spatial=options.spatial,
    )
    made = make_statistics(
        options.source,
        extractor,
        options.out,
        protocol=options.protocol,
        batch_size=options.batch_size,
        resize=options.resize,
        image_size=options.image_size,
        keep_features=options.keep_features,
        progress=progress,
    )
    rows = [
        (
            layer,
            str(found.count),
            str(found.width),
            "-" if found.null_constant is None else f"{found.null_constant:.6g}",
        )
        for layer, found in made.statistics.items()
    ]
    echo([("layer", "pictures", "features", "null constant"), *rows])


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
    """float32 or bfloat16; float32 on a CPU, bfloat16 on a GPU."""


def evaluate_tokenizer(options: EvalTokenizer, echo: Echo, progress: Progress | None = None) -> None:
    """Runs `visar eval --tokenizer`; arguments as of `evaluate`."""
    from visar.files import atomic_write

    device = placement(options.device)[0]
    extractor = load_extractor(options.extractor, device=device, weights=options.extractor_weights)
    images = open_images(options.images, options.resize, options.image_size)
    tokenizer: Any = load_tokenizer(options.tokenizer, device=device, dtype=options.dtype)
    found = evaluate_reconstruction(
        tokenizer,
        images,
        extractor,
        batch_size=options.batch_size,
        device=device,
        progress=None if progress is None else lambda done: progress("pictures", done, len(images)),
    )
    with atomic_write(options.out / "metrics.json") as path:
        path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    shown = {
        "pictures": str(found.num_images),
        "PSNR": f"{found.psnr:.2f}",
        "SSIM": f"{found.ssim:.4f}",
        found.distance_name: f"{found.distance:.2f}",
        "codes used": "-" if found.codes_used is None else f"{found.codes_used:.1%}",
        "perplexity": "-" if found.code_perplexity is None else f"{found.code_perplexity:.1f}",
    }
    echo([tuple(shown), tuple(shown.values())])


def read_prompts(path: Path) -> tuple[str, ...]:
    """The lines of a text file that are not blank.

    Raises:
        ValueError: no such file, or nothing in it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the prompts {path}: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise ValueError(f"no prompt in {path}: one a line")
    return prompts
