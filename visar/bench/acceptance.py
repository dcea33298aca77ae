"""What speculative samplers accept of their drafts, and what that is worth in time: one row per sampler and batch
size.

Background is what an image set is drawn on: acceptance there says little about the rest, where distributions are flat.
So tokens whose part of the finished image is all background are counted apart.

B batch, N tokens, V codes, R rows (2B when guided), h w token grid.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from visar.bench.options import Acceptance
from visar.core.condition import Condition
from visar.core.guidance import Guidance, combine, double
from visar.core.interface import Continuous, Masked, Windowed
from visar.core.noise import image_seeds
from visar.core.output import SampleOutput, SampleStatistics
from visar.io.files import atomic_write
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.samplers.filtering import filtered_probs
from visar.samplers.index import GENERAL, find_sampler, plain_sampler
from visar.samplers.settings import parse_sampler

Echo = Callable[[list[tuple[str, ...]]], None]
Progress = Callable[[str, int, int], None]

HEAD_PASSES = ("head_passes", "drafter_head_passes")
UNDRAFTED = (
    "jacobi:window=8",
    "jacobi:window=16",
    "jacobi:window=32",
    "jacobi:window=16,initial=left",
    "jacobi:window=16,initial=left_law",
    "jacobi:window=16,initial=above",
    "jacobi:window=16,initial=above_law",
    "jacobi:window=32,coupling=maximal",
    "jacobi:window=32,coupling=gumbel",
    "jacobi:window=32,adaptive=true",
    "grouped:window=16,group=25",
)
DRAFTED = (
    "speculative:num_drafts=4",
    "static_tree:branches=4,2,1,1",
    "dynamic_tree:depth=4,children=4,nodes=24",
    "k_seq:num_chains=4,num_drafts=3",
    "lantern:max_moved=0.2,num_neighbours=100,depth=4,children=4,nodes=24",
    "lantern:tree=static,max_ratio=10,num_neighbours=10,branches=4,2,1,1",
)
"""Settings of the default list; those of DRAFTED are tried with every drafter."""


@dataclass(frozen=True)
class AcceptanceRow:
    """One sampler at one batch size.

    Attributes:
        sampler, exact, batch, images: what was run.
        passes: calls of the generator per batch, mean; drafter_passes: those of the drafter.
        tokens_per_pass: committed tokens of an image per pass in which it was not done, mean.
        acceptance: accepted / verified drafts; None where nothing is drafted.
        foreground: share of tokens that are not background.
        foreground_acceptance: of the foreground tokens at which a draft was verified, the share that are an accepted
            draft (for trees: one of the siblings).
        background_acceptance: the same for the others.
        foreground_tokens_per_pass: foreground tokens / foreground tokens that were no accepted draft.
        top1, entropy: mean largest probability and mean entropy in nats of the distributions that are sampled (guided,
            filtered), along the images; foreground_top1, foreground_entropy: of the foreground tokens. None where
            tokens are continuous.
        seconds: wall-clock time of the sampling per image, median over calls.
        speedup: ancestral seconds of the same batch size / seconds; those of plain draws where tokens are continuous.
        head_passes, drafter_head_passes: passes of the heads of continuous tokens per batch, mean.
    """

    sampler: str
    exact: bool
    batch: int
    images: int
    passes: float
    drafter_passes: float
    tokens_per_pass: float
    acceptance: float | None
    foreground: float
    foreground_acceptance: float | None
    background_acceptance: float | None
    foreground_tokens_per_pass: float | None
    top1: float | None
    entropy: float | None
    foreground_top1: float | None
    foreground_entropy: float | None
    seconds: float
    speedup: float
    head_passes: float | None = None
    drafter_head_passes: float | None = None


def default_samplers(drafters: tuple[str, ...]) -> tuple[str, ...]:
    """The usual list, with every drafter."""
    return (*UNDRAFTED, *(f"{sampler},drafter={drafter}" for drafter in drafters for sampler in DRAFTED))


def background_tokens(image_BCHW: Tensor, grid: tuple[int, int], background: str = "white") -> Tensor:
    """bool [B, N]: the token's part of the image is all background, at least 250 / 255 (black: at most 5 / 255).

    Args:
        image_BCHW: in [-1, 1].
        grid: (h, w) of the tokens.
        background: "white" or "black".

    Raises:
        ValueError: another background.
    """
    if background not in ("white", "black"):
        raise ValueError(f"background {background!r}; choose white or black")
    level_BCHW = (image_BCHW.float() + 1.0) * 127.5
    if background == "black":
        level_BCHW = 255.0 - level_BCHW
    least_BChw = -functional.adaptive_max_pool2d(-level_BCHW, grid)
    return (least_BChw.amin(1) >= 250.0).flatten(1)


@torch.no_grad()
def probs_statistics(
    model: Any,
    tokens_BN: Tensor,
    condition: Condition,
    guidance: Guidance,
    filters: tuple[float, int, float],
    rows: int = 16,
) -> tuple[Tensor, Tensor]:
    """Largest probability and entropy in nats, float32 [B, N], of the distributions that tokens were sampled from.

    Args:
        model: a raster generator. tokens_BN, condition: of the images.
        guidance, filters: (temperature, top_k, top_p) of the sampling.
        rows: images at a time.
    """
    scale_N1 = torch.tensor(guidance.scales(model.num_tokens), device=tokens_BN.device)[:, None]
    guided, tops, entropies = guidance.active(model.num_tokens), [], []
    for first in range(0, len(tokens_BN), rows):
        part = slice(first, first + rows)
        ids_BN, given = tokens_BN[part], condition.rows(part)
        if guided:
            logits_RNV = model(torch.cat([ids_BN, ids_BN]), double(given, model.null_condition(given)))
            probs_BNV = filtered_probs(combine(logits_RNV, scale_N1), *filters)
        else:
            probs_BNV = filtered_probs(model(ids_BN, given), *filters)
        tops.append(probs_BNV.amax(-1))
        entropies.append(torch.special.entr(probs_BNV).sum(-1))
    return torch.cat(tops), torch.cat(entropies)


def _mean(values: Tensor, where: Tensor) -> float | None:
    chosen = values[where]
    return float(chosen.float().mean()) if chosen.numel() else None


def measure(
    pipeline: ImagePipeline,
    sampler: str,
    batch: int,
    *,
    calls: int = 4,
    seed: int = 0,
    background: str = "white",
    ancestral_seconds: float | None = None,
    **settings: Any,
) -> AcceptanceRow:
    """Measures a sampler at a batch size.

    Args:
        pipeline: a raster model's, or one of continuous tokens, on its device.
        sampler: NAME or NAME:setting=value,setting=value.
        batch: images of a call; calls: how many are timed; seed: of the first image.
        background: background of the images.
        ancestral_seconds: an image, to be compared with; None: this is it.
        settings: guidance_scale, temperature, top_k, top_p; see `ImagePipeline.sampling_settings`.

    Raises:
        ValueError: a sampler or setting that does not exist or fit.
    """
    name, options = parse_sampler(sampler)
    chosen = {**pipeline.sampling_settings(**settings, sampler=name), "sampler_options": options}
    device, model = pipeline.generator.device, pipeline.generator
    seconds: list[float] = []
    counts = SampleStatistics()
    made: list[SampleOutput] = []
    conditions = [
        pipeline.prepare_condition(image_seeds(seed + call * batch, batch))[0].to(device) for call in range(calls)
    ]
    for call in (0, *range(calls)):  # the first time untimed: steps are captured
        _synchronize(device)
        begun = time.perf_counter()
        out = pipeline.sample_tokens(conditions[call], image_seeds(seed + call * batch, batch), **chosen)
        _synchronize(device)
        seconds.append(time.perf_counter() - begun)
        made.append(out)
    made, seconds = made[1:], seconds[1:]
    for out in made:
        counts = counts + out.statistics
    tokens_BN = torch.cat([out.tokens for out in made])
    flat_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
    if pipeline.tokenizer.layout.arrangement != "sequence":  # whose tokens have no part of the image of their own
        flat_BN = torch.cat(
            [background_tokens(pipeline.decode(out.tokens), tuple(model.config["grid"]), background) for out in made]
        )
    ids = isinstance(model, Windowed)
    probs: list[tuple[Tensor, Tensor]] = []
    if ids:
        temperature, top_k, top_p = (chosen.get(setting, neutral) for setting, neutral in GENERAL.items())
        probs = [
            probs_statistics(model, out.tokens, condition, chosen["guidance"], (temperature, top_k, top_p))
            for out, condition in zip(made, conditions, strict=True)
        ]
    top_BN, entropy_BN = (torch.cat([pair[i] for pair in probs]) if ids else None for i in range(2))
    pieces = [out.outcome_BN for out in made if out.outcome_BN is not None]
    outcome_BN = torch.cat(pieces) if pieces else torch.zeros_like(flat_BN, dtype=torch.int64)
    verified_BN, accepted_BN = outcome_BN > 0, outcome_BN == 2
    front = int((~flat_BN).sum())
    drawn = int((~flat_BN & ~accepted_BN).sum())
    each = statistics.median(seconds) / batch
    return AcceptanceRow(
        sampler=sampler,
        exact=find_sampler(name).exact,
        batch=batch,
        images=len(tokens_BN),
        passes=counts.forward_passes["generator"] / calls,
        drafter_passes=counts.forward_passes.get("drafter", 0) / calls,
        tokens_per_pass=counts.mean_tokens_per_pass or model.num_tokens * calls / counts.forward_passes["generator"],
        acceptance=counts.acceptance_rate,
        foreground=front / flat_BN.numel(),
        foreground_acceptance=_mean(accepted_BN, verified_BN & ~flat_BN),
        background_acceptance=_mean(accepted_BN, verified_BN & flat_BN),
        foreground_tokens_per_pass=front / drawn if drawn and ids else None,
        top1=None if top_BN is None else float(top_BN.mean()),
        entropy=None if entropy_BN is None else float(entropy_BN.mean()),
        foreground_top1=None if top_BN is None else _mean(top_BN, ~flat_BN),
        foreground_entropy=None if entropy_BN is None else _mean(entropy_BN, ~flat_BN),
        seconds=each,
        speedup=1.0 if ancestral_seconds is None else ancestral_seconds / each,
        **{name: counts.counts[name] / calls for name in HEAD_PASSES if name in counts.counts},
    )


def compared_with(pipeline: ImagePipeline) -> str:
    """The sampler that others are compared with.

    Raises:
        ValueError: the model is neither a raster one nor one of continuous tokens.
    """
    if isinstance(pipeline.generator, Windowed | Continuous | Masked):
        return plain_sampler(pipeline.generator).name
    raise ValueError(
        f"a raster model or one of continuous tokens is needed; this one is a {type(pipeline.generator).__name__}"
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_acceptance(
    pipeline: ImagePipeline,
    samplers: tuple[str, ...],
    batch_sizes: tuple[int, ...] = (1, 8, 32),
    *,
    on_row: Callable[[list[AcceptanceRow]], None] | None = None,
    **settings: Any,
) -> list[AcceptanceRow]:
    """Rows of the plain sampler and of others, at every batch size.

    Args:
        pipeline: a raster model's, or one of continuous tokens, on its device.
        samplers: each as NAME or NAME:setting=value,setting=value.
        batch_sizes: images of a call.
        on_row: told the rows so far, after each.
        settings: arguments of `measure`.

    Raises:
        ValueError: see `measure`; or a model of another kind.
    """
    plain = compared_with(pipeline)
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes {batch_sizes}; they must be >= 1")
    if settings.get("calls", 1) < 1:
        raise ValueError(f"calls {settings['calls']}; it must be >= 1")
    general = {name: settings.get(name) for name in ("guidance_scale", "temperature", "top_k", "top_p")}
    for sampler in samplers:  # a slip shows before the first row
        name, own = parse_sampler(sampler)
        pipeline.check_settings(sampler=name, sampler_options=own, **general)
    rows: list[AcceptanceRow] = []
    for batch in batch_sizes:
        ancestral: float | None = None
        for sampler in (plain, *(other for other in samplers if other != plain)):
            rows.append(measure(pipeline, sampler, batch, ancestral_seconds=ancestral, **settings))
            ancestral = rows[-1].seconds if ancestral is None else ancestral
            pipeline.runtime.clear()
            if on_row is not None:
                on_row(rows)
    return rows


def table(rows: list[AcceptanceRow]) -> list[tuple[str, ...]]:
    """Header and rows of the printed table."""

    def share(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    columns: dict[str, Callable[[AcceptanceRow], str]] = {
        "sampler": lambda row: row.sampler,
        "distribution": lambda row: "exact" if row.exact else "lossy",
        "batch": lambda row: str(row.batch),
        "passes": lambda row: f"{row.passes:.1f}",
        "drafter passes": lambda row: f"{row.drafter_passes:.0f}",
        "tokens/pass": lambda row: f"{row.tokens_per_pass:.2f}",
        "accepted": lambda row: share(row.acceptance),
        "foreground": lambda row: share(row.foreground),
        "accepted there": lambda row: share(row.foreground_acceptance),
        "on background": lambda row: share(row.background_acceptance),
        "tokens/pass there": lambda row: share(row.foreground_tokens_per_pass),
        "top-1": lambda row: share(row.top1),
        "entropy": lambda row: share(row.entropy, 2),
        "ms/image": lambda row: f"{1e3 * row.seconds:.2f}",
        "speed-up": lambda row: f"{row.speedup:.2f}",
    }
    if any(row.head_passes is not None for row in rows):
        columns["head passes"] = lambda row: share(row.head_passes, 0)
        columns["drafter head passes"] = lambda row: share(row.drafter_head_passes, 0)
    return [tuple(columns), *(tuple(shown(row) for shown in columns.values()) for row in rows)]


def markdown(rows: list[AcceptanceRow]) -> str:
    """The printed table as Markdown."""
    header, *body = table(rows)
    lines = [header, ("---",) * len(header), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def acceptance(options: Acceptance, echo: Echo, progress: Progress | None = None) -> list[AcceptanceRow]:
    """Runs `visar acceptance`.

    Args:
        options: its flags.
        echo: prints a table: header and rows.
        progress: told (what, done, total).
    """
    pipeline = load(options.model, device=options.device, dtype=options.dtype)
    plain = compared_with(pipeline)
    if plain != "ancestral" and not options.samplers:
        raise ValueError(
            "continuous tokens have no list of usual samplers: give --samplers, such as "
            "continuous_speculation:num_drafts=8,drafter=FOLDER or masked:steps=16"
        )
    samplers = options.samplers or default_samplers(options.drafters)
    total = len(options.batch_sizes) * (1 + sum(sampler != plain for sampler in samplers))
    device = pipeline.generator.device
    facts = {
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(pipeline.generator.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }

    def on_row(rows: list[AcceptanceRow]) -> None:
        content = {**facts, "rows": [asdict(row) for row in rows]}
        for name, text in (("acceptance.json", json.dumps(content, indent=2)), ("acceptance.md", markdown(rows))):
            with atomic_write(options.out / name) as path:
                path.write_text(text + "\n" * (not text.endswith("\n")), encoding="utf-8")
        if progress is not None:
            progress("samplers", len(rows), total)

    rows = measure_acceptance(
        pipeline,
        samplers,
        options.batch_sizes,
        on_row=on_row,
        calls=options.calls,
        seed=options.seed,
        background=options.background,
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    echo(table(rows))
    return rows
