"""`visar reproduce`: a paper's figure by one command."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

from visar.evaluate.options import Reproduce, RunOptions
from visar.evaluate.reproduce import find, plan, published, references, reproduce
from visar.io.files import check_folder_output, locked
from visar.io.progress import Progress
from visar.io.shards import join_world, leave_world
from visar.pipelines.components import placement


def run_reproduce(
    options: Reproduce,
    report: Callable[[str], object],
    echo: Callable[[Sequence[tuple[str, ...]]], object],
    progress: Progress | None = None,
) -> None:
    """Runs `visar reproduce`.

    Args:
        options: its flags.
        report: prints a line.
        echo: prints a table: header and rows.
        progress: told (what, done, total).

    Raises:
        ValueError: no such row, no reference, or see `reproduce`.
    """
    if not options.name:
        header = ("row", "official name", "FID of the paper", "paper")
        echo(
            [header] + [(row.name, row.model, f"{row.figures['FID']:.2f}", row.paper) for row in published().values()]
        )
        return
    row = find(options.name)
    if options.dry_run:
        for line in plan(row, options.num_samples):
            report(line)
        return
    wanted = references()[row.reference]
    if options.reference is None:
        raise ValueError(f"reference: give --reference, the file {wanted['file']}; it is at {wanted['url']}")
    run = RunOptions(
        out=options.out,
        num_samples=options.num_samples,
        batch_size=options.batch_size,
        seed=options.seed,
        labels=row.labels,
        keep_images=options.keep_images,
    )
    check_folder_output(options.out)
    world = join_world(placement(options.device)[0])
    with locked(options.out) if world.rank == 0 else nullcontext():
        rows = reproduce(
            row,
            run,
            reference=str(options.reference),
            extractor=options.extractor,
            extractor_weights=options.extractor_weights,
            dtype=options.dtype,
            report=report,
            world=world,
            progress=progress,
        )
    leave_world(world)
    if rows is not None:
        echo(rows)
