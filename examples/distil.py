"""Distils a generator into a one-step student (Distilled Decoding 1), and shows both on the same seeds.

A student learns the teacher's map from noise to tokens, so the same seed is nearly the same image in one pass.
docs/distill.md explains it and does the same by commands.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import visar
from visar.distill.dd1 import distill_dd1
from visar.distill.options import DistillDD1
from visar.io.pictures import grid


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="emoji-var")
    parser.add_argument("--num-pairs", type=int, default=65_536, help="noise and tokens to learn from")
    parser.add_argument("--pair-batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--flow-steps", type=int, default=20)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("distilled"))
    options = parser.parse_args(arguments)

    run = DistillDD1(
        teacher=options.teacher,
        out=options.out,
        num_pairs=options.num_pairs,
        first_pairs=min(options.num_pairs, 65_536),
        pair_batch=options.pair_batch,
        flow_steps=options.flow_steps,
        steps=options.steps,
        batch_size=options.batch_size,
    )
    if options.device is not None:
        run = replace(run, device=options.device, mixed_precision="no" if options.device == "cpu" else "bf16")
    distill_dd1(run)

    teacher, student = (visar.load(name, device=options.device) for name in (options.teacher, options.out / "model"))
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
    theirs = teacher(num_images=8, seed=1000, sampler="flow", sampler_options={"steps": options.flow_steps})
    ours = student(num_images=8, seed=1000)
    grid([*theirs.images, *ours.images], columns=8).save(options.out / "teacher_and_student.png")
    agreement = float((theirs.tokens == ours.tokens).float().mean())
    print(f"passes {theirs.statistics.forward_passes} and {ours.statistics.forward_passes}")
    print(f"{agreement:.1%} of the tokens are the teacher's")
    return agreement


if __name__ == "__main__":
    main()
