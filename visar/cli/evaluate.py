"""What `visar eval`, its mode --tokenizer and `visar stats` do; flags are made from the fields."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from visar.core.guidance import Guidance
from visar.data.images import SPLITS
from visar.evaluate.extractors import load_extractor
from visar.evaluate.images import open_images
from visar.evaluate.metrics import null_estimable
from visar.evaluate.options import Eval, EvalTokenizer, Stats
from visar.evaluate.pipeline import Sampling
from visar.evaluate.reconstruction import evaluate_reconstruction
from visar.evaluate.references import make_statistics
from visar.evaluate.report import Report, table
from visar.evaluate.run import evaluate_images, evaluate_pipeline
from visar.evaluate.scoring import load_scoring
from visar.io.files import read_text
from visar.io.progress import Progress
from visar.io.shards import World, join_world, leave_world
from visar.pipelines.components import load_tokenizer, placement
from visar.pipelines.loading import load

Echo = Callable[[list[tuple[str, ...]]], None]


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
        sampler_options: settings of the sampler, from --sampler.NAME VALUE.
        echo: prints a table: header and rows.
        progress: told (what, done, total).
        world: the processes; None joins those of the launcher, for this call.

    Returns: the report in the first process, None in the others.
    """
    joined = world or join_world(placement(options.device)[0])
    report: Report | None = None
    if not _is_pictures(options.model):
        report = _score_model(options, sampler_options, joined, progress)
    elif joined.rank == 0:
        report = _score_pictures(options, joined.device, progress)
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


def _score_pictures(options: Eval, device: torch.device, progress: Progress | None) -> Report:
    batch_size = 64 if isinstance(options.batch_size, str) else options.batch_size
    images = open_images(options.model, options.resize, options.image_size)
    scoring = load_scoring(options, device, batch_size=batch_size)
    return evaluate_images(images, scoring, options.out, batch_size=batch_size, progress=progress)


def _score_model(
    options: Eval, sampler_options: dict[str, Any], world: World, progress: Progress | None
) -> Report | None:
    guidance = None
    if options.guidance_scale is not None:
        guidance = Guidance(options.guidance_scale, schedule=options.guidance_schedule)
    elif options.guidance_schedule != "constant":
        raise ValueError("--guidance-schedule linear needs --guidance-scale")
    return evaluate_pipeline(
        load(options.model, device=world.device, dtype=options.dtype, quantize=options.quantize),
        Sampling(options.sampler, sampler_options, guidance, options.temperature, options.top_k, options.top_p),
        options,
        options,
        name=options.model,
        uint8_rule=options.uint8_rule,
        prompts=() if options.prompts is None else read_prompts(options.prompts),
        world=world,
        progress=progress,
    )


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
            "-" if not null_estimable(found) else f"{found.null_constant:.6g}",
        )
        for layer, found in made.statistics.items()
    ]
    echo([("layer", "images", "features", "null constant"), *rows])


def evaluate_tokenizer(options: EvalTokenizer, echo: Echo, progress: Progress | None = None) -> None:
    """Runs `visar eval --tokenizer`; arguments as of `evaluate`."""
    from visar.io.files import atomic_write

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
        progress=None if progress is None else lambda done: progress("images", done, len(images)),
    )
    with atomic_write(options.out / "metrics.json") as path:
        path.write_text(json.dumps(asdict(found), indent=2) + "\n", encoding="utf-8")
    shown = {
        "images": str(found.num_images),
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
    prompts = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    if not prompts:
        raise ValueError(f"no prompt in {path}: it needs one per line")
    return prompts
