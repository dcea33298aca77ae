"""Images from Python: by name, by seed, by two samplers, and one of them made again alone."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import visar


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="emoji-raster", help="a name of `visar models`, or a folder")
    parser.add_argument("--class-label", default=None, help="a class by name or number; none draws classes")
    parser.add_argument("--num-images", type=int, default=4)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--sampler", default="jacobi", help="the second sampler; the first is the model's default")
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", type=Path, default=Path("samples"))
    options = parser.parse_args(arguments)

    pipe = visar.load(options.model, device=options.device)
    pipe.set_progress_bar_config(disable=True)
    label = options.class_label
    label = int(label) if label is not None and label.isdecimal() else label
    out = pipe(class_labels=label, num_images=options.num_images, seed=options.seed)

    options.out.mkdir(parents=True, exist_ok=True)
    for seed, image, description in zip(out.seeds, out.images, out.descriptions, strict=True):
        image.save(options.out / f"{seed}.png")
        print(f"seed {seed}: {description}")
    print("passes:", out.statistics.forward_passes)

    # The same seeds through another sampler: an exact one has the same distribution, in fewer passes.
    other = pipe(class_labels=label, num_images=options.num_images, seed=options.seed, sampler=options.sampler)
    print(f"passes of {options.sampler}:", other.statistics.forward_passes)

    # Image i of a call has seed + i and depends on nothing else: the last one can be made again by itself.
    last = pipe(class_labels=label, seed=out.seeds[-1])
    print("the last one alone is the same:", bool((last.tokens == out.tokens[-1:]).all()))


if __name__ == "__main__":
    main()
