"""`visar bench`: how fast a model decodes, how near to the machine's limits, and whether the results are right.

Presets run on random weights of the released shapes, so anybody can repeat a figure; no claim on quality is made here.
"""

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import torch

from visar.bench.correctness import batches_agree, check_images, check_logits, paths_agree
from visar.bench.measure import Caller, decode_call, decode_row, eager_stop, sampling_row
from visar.bench.options import Bench
from visar.bench.peer import Peer, in_turns
from visar.bench.profiling import operations, table
from visar.bench.rows import Row, add_rows, compare_with_baseline, read_rows
from visar.bench.subjects import Subject, build, find_preset, load_subject, tiny
from visar.bench.timing import ceilings, machine_facts, seconds_of
from visar.bench.windows import check_windows, window_rows
from visar.kernels.invariance import batch_invariant
from visar.layers.quantize import check_quantization
from visar.pipelines.components import placement
from visar.samplers.index import find_sampler

Report = Callable[[str], None]
AGREEMENT_LIMIT = 4e8  # parameters: a float32 copy of a larger model adds nothing and takes its time


def bench(options: Bench, sampler_options: dict[str, Any], report: Report) -> list[Row]:
    """Runs the benchmark; `report` receives the lines of the table as they come.

    Args:
        options: what to time.
        sampler_options: the sampler's own settings.
        report: takes a line of text.

    Returns: one dict a row; docs/benchmarks.md explains the columns. Empty where nothing was timed.

    Raises:
        ValueError: settings that do not fit, results that are wrong, a peer that fails, or rows slower than the
            baseline (after all rows were written).
    """
    device = _check(options)
    baseline = [] if options.baseline is None else read_rows(options.baseline)
    if options.out is not None and options.out.exists():
        read_rows(options.out)  # they stay, and other files are not added to
    dtype = getattr(torch, options.dtype)
    facts = machine_facts(device)
    if options.preset is not None and device.type != "cuda":
        preset = tiny(find_preset(options.preset, options.grid))
        subject = build(f"{options.preset} (tiny)", preset, device, dtype, options.quantize)
        report(f"no GPU: a tiny model of the family of {options.preset} is checked, and nothing is timed")
        _check_results(subject, options, device, report)
        _try_sampler(subject, options, sampler_options, device, report)
        return []
    machine = ceilings(device) if device.type == "cuda" else {}
    _report_head(options, facts, machine, report)
    if options.preset is not None:
        subject = build(options.preset, find_preset(options.preset, options.grid), device, dtype, options.quantize)
    else:
        assert options.model is not None
        subject = load_subject(options.model, device, dtype, options.quantize)
    report(f"{subject.name}: built in {subject.build_s:.1f} s")
    _check_results(subject, options, device, report)
    if device.type != "cuda" and "captured" in options.paths:
        report("no GPU: eager path only")
        options = dataclasses.replace(options, paths=tuple(path for path in options.paths if path != "captured"))
        if not options.paths:
            raise ValueError("the captured path needs a GPU")
    rows = _rows(subject, options, sampler_options, device, machine, facts, report)
    if options.out is not None:
        add_rows(options.out, rows)
    if options.baseline is not None:
        known, worse = compare_with_baseline(rows, baseline)
        report(f"{known} of {len(rows)} rows are in {options.baseline}")
        if worse:
            raise ValueError("slower than the baseline:\n" + "\n".join(worse))
    return rows


def _check(options: Bench) -> torch.device:
    """Finds what cannot be done before anything is built.

    Raises:
        ValueError: see `bench`.
    """
    device, _ = placement(options.device)
    if options.runs < 1 or options.eager_steps < 1 or min(options.batch, default=0) < 1:
        raise ValueError(
            f"batch {options.batch}, runs {options.runs}, eager_steps {options.eager_steps}; they must be >= 1"
        )
    if (options.model is None) == (options.preset is None):
        raise ValueError("give a model or --preset, one of them")
    if options.preset is not None:
        find_preset(options.preset, options.grid)
    elif options.grid is not None:
        raise ValueError("--grid is for presets")
    if sum((bool(options.window), options.profile, options.compare is not None)) > 1:
        raise ValueError("choose one of --window, --profile and --compare")
    check_quantization(options.quantize)
    if options.quantize != "none" and options.preset is not None and find_preset(options.preset).generator is None:
        raise ValueError(f"--quantize {options.quantize} is of generators; {options.preset} has none")
    if options.quantize != "none" and options.deterministic == "batch":
        raise ValueError(f"deterministic batch is for weights that are not quantised; quantize is {options.quantize}")
    find_sampler(options.sampler)
    return device


def _report_head(options: Bench, facts: dict[str, Any], machine: dict[str, float], report: Report) -> None:
    report(", ".join(f"{key} {value}" for key, value in facts.items()))
    report(
        f"{options.dtype}, quantize {options.quantize}, deterministic {options.deterministic}, "
        f"guidance {options.guidance_scale}, top_k {options.top_k}, top_p {options.top_p}, sampler {options.sampler}"
    )
    if machine:
        report(", ".join(f"{key} {value:.4g}" for key, value in machine.items()))


def _check_results(subject: Subject, options: Bench, device: torch.device, report: Report) -> None:
    """Says whether results are right.

    Raises:
        ValueError: they are not.
    """
    report(check_images(subject, device))
    if subject.generator is None:
        return
    with batch_invariant(options.deterministic == "batch"):
        _, line = check_logits(subject, device)
    report(line)
    if device.type != "cuda":
        line = "an image's ids in a batch equal those of it alone (float32)"
        agree = batches_agree(subject.generator, device, options.guidance_scale)
        if not agree:
            raise ValueError(f"{subject.name}: {line}: {agree}: wrong results are not timed")
        report(f"{line}: {agree}")
    elif sum(parameter.numel() for parameter in subject.generator.parameters()) <= AGREEMENT_LIMIT:
        agree = paths_agree(subject.generator, 2, device, options.guidance_scale)
        report(f"captured ids equal eager ids (float32): {agree}")


def _try_sampler(
    subject: Subject, options: Bench, sampler_options: dict[str, Any], device: torch.device, report: Report
) -> None:
    """Runs the sampler and the decoder once and says what came out."""
    if subject.generator is None:
        image = decode_call(subject, 2, "eager", device)()
        report(f"decoded images {tuple(image.shape)}, finite: {bool(image.isfinite().all())}")
        return
    if options.window:
        check_windows(subject, tuple(window for window in options.window if window <= 8))
    caller = Caller(subject, 2, options, sampler_options, capture=False)
    image = caller.images()
    passes = sum(caller.statistics.forward_passes.values())
    report(f"{options.sampler}: {subject.num_tokens} tokens in {passes} passes, images {tuple(image.shape)}")


def _rows(
    subject: Subject,
    options: Bench,
    sampler_options: dict[str, Any],
    device: torch.device,
    machine: dict[str, float],
    facts: dict[str, Any],
    report: Report,
) -> list[Row]:
    if options.window:
        check_windows(subject, options.window)
    rows: list[Row] = []
    for batch in options.batch:
        for path in options.paths:
            common: Row = {
                "model": subject.name,
                "batch": batch,
                "path": path,
                "sampler": options.sampler,
                "sampler_options": {name: str(value) for name, value in sampler_options.items()},
                "grid": options.grid,
                "guidance_scale": options.guidance_scale,
                "top_k": options.top_k,
                "top_p": options.top_p,
                "dtype": options.dtype,
                "quantize": None if options.quantize == "none" else options.quantize,
                "deterministic": None if options.deterministic == "auto" else options.deterministic,
                "n": options.runs,
                "build_s": subject.build_s,
                **facts,
                **machine,
            }
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            try:
                found = _measure(subject, options, sampler_options, batch, path, device, machine, report)
            except torch.OutOfMemoryError:
                report(f"batch {batch:4d}  {path:8s} does not fit into this GPU's memory")
                continue
            peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
            for row in found:
                row = {**common, **row, "peak_gib": peak}
                report(_line(row))
                rows.append(row)
    return rows


def _measure(
    subject: Subject,
    options: Bench,
    sampler_options: dict[str, Any],
    batch: int,
    path: str,
    device: torch.device,
    machine: dict[str, float],
    report: Report,
) -> list[Row]:
    """Rows of one batch size and path."""
    if options.window:
        return [{"kind": "window", **row} for row in window_rows(subject, options, batch, path, device)]
    if options.profile:
        _profile(subject, options, sampler_options, batch, path, device, report)
        return []
    if options.compare is not None:
        return [{"kind": "compare", **_compare(subject, options, sampler_options, batch, path, device)}]
    if subject.generator is None:
        return [{"kind": "decode", **decode_row(subject, options, batch, path, device)}]
    return [{"kind": "sample", **sampling_row(subject, options, sampler_options, batch, path, device, machine)}]


def _profile(
    subject: Subject,
    options: Bench,
    sampler_options: dict[str, Any],
    batch: int,
    path: str,
    device: torch.device,
    report: Report,
) -> None:
    """Reports the operations of an average step."""
    call: Callable[[], object]
    if subject.generator is None:
        call, steps = decode_call(subject, batch, path, device), 1
    else:
        short = 8 if eager_stop(dataclasses.replace(options, eager_steps=8), subject.generator, "eager") else 0
        caller = Caller(subject, batch, options, sampler_options, capture=path == "captured", stop_after=short)
        call, steps = caller.tokens, short
    for _ in range(2):
        call()
    if subject.generator is not None:
        steps = steps or sum(caller.statistics.forward_passes.values())
    report(f"batch {batch}, {path}, a step of {steps}: {seconds_of(call, device) / steps * 1e6:.1f} us")
    for line in table(operations(call, steps, device)):
        report(line)


def _compare(
    subject: Subject, options: Bench, sampler_options: dict[str, Any], batch: int, path: str, device: torch.device
) -> Row:
    """Times of ours and of a peer's code, taken in turns."""
    assert options.compare is not None
    arguments = {
        "preset": subject.name,
        "batch": batch,
        "dtype": options.dtype,
        "guidance_scale": options.guidance_scale,
        "top_k": options.top_k,
    }
    ours: Callable[[], object]
    with Peer(options.compare, arguments) as peer:
        if subject.generator is None:
            ours = decode_call(subject, batch, path, device)
        else:
            caller = Caller(subject, batch, options, sampler_options, capture=path == "captured")
            ours = caller.images if peer.product == "images" else caller.tokens
        mine, theirs = in_turns(lambda: seconds_of(ours, device), peer.run, options.runs)
        return {
            "product": peer.product,
            "peer": str(options.compare),
            "peer_load_s": peer.load_s,
            **mine.row("ours"),
            "peer_ms": theirs.median * 1e3,
            "peer_spread": theirs.spread,
            "ratio": theirs.median / mine.median,
        }


def _line(row: Row) -> str:
    """A row as text."""
    start = f"batch {row['batch']:4d}  {row['path']:8s} "
    if row["kind"] == "window":
        return (
            f"{start}window {row['window']:3d} {row['pass_ms']:8.3f} ms  x{row['of_window_1']:.2f} of window 1  "
            f"x{row['of_one_token']:.2f} of a one-token step ({row['one_token_ms']:.3f} ms)  "
            f"spread {row['pass_spread']:.0%}"
        )
    if row["kind"] == "compare":
        return (
            f"{start}{row['product']}: ours {row['ours_ms']:.2f} ms (spread {row['ours_spread']:.0%}), "
            f"peer {row['peer_ms']:.2f} ms (spread {row['peer_spread']:.0%}): ratio {row['ratio']:.2f}"
        )
    line = f"{start}{row['images_per_s']:9.3f} images/s {row['ms_per_image']:9.2f} ms/image"
    if row["kind"] == "sample":
        parts = [
            f"{row['steps']} steps of {row['ms_per_step']:.3f} ms",
            f"{row['tokens_per_step']:.2f} tokens per step",
        ]
        if "head_passes" in row:
            parts.append(f"{row['head_passes']} passes of the head")
        if "of_floor" in row:
            parts.append(f"floor {row['floor_ms']:.3f} ms ({row['of_floor']:.0%})")
        if "host_us_per_step" in row:
            parts.append(f"host {row['host_us_per_step']:.1f} us a step")
        parts.append(f"tokens {row['tokens_ms']:.1f} ms (spread {row['tokens_spread']:.0%})")
        line += "  " + ", ".join(parts)
    line += f", decode {row['decode_ms']:.2f} ms (spread {row['decode_spread']:.0%})"
    if "together_ms" in row:
        line += f", together {row['together_ms']:.1f} ms (spread {row['together_spread']:.0%})"
    if row["peak_gib"] is not None:
        line += f", {row['peak_gib']:.2f} GiB"
    return f"{line}, n {row['n']}, first call {row['first_call_s']:.2f} s, second {row['second_call_s']:.2f} s"
