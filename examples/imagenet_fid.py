"""FID of 50,000 images of an official ImageNet checkpoint by its paper's protocol; `visar reproduce` in a few lines.

Under torchrun the images are shared among the GPUs, and a run that was stopped resumes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from visar.evaluate.options import RunOptions
from visar.evaluate.reproduce import find, reproduce
from visar.io.shards import join_world, leave_world
from visar.pipelines.components import placement


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", help="a row of `visar reproduce`, such as llamagen-b-256")
    parser.add_argument("--reference", required=True, help="ADM's batch; `visar reproduce ROW --dry-run` says where")
    parser.add_argument("--num-samples", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--extractor", default="inception-v3")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("imagenet_fid"))
    options = parser.parse_args(arguments)

    row = find(options.row)
    world = join_world(placement(options.device)[0])
    run = RunOptions(
        out=options.out, num_samples=options.num_samples, batch_size=options.batch_size, labels=row.labels
    )
    figures = reproduce(row, run, reference=options.reference, extractor=options.extractor, world=world, report=print)
    leave_world(world)
    for line in figures or ():  # in the first process
        print("  ".join(cell.ljust(10) for cell in line))


if __name__ == "__main__":
    main()
