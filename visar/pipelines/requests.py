"""What a call asks for: seeds and numbered classes image by image, classes and labels as text."""

from collections.abc import Sequence

import torch

from visar.condition import Condition
from visar.noise import Noise, Use, image_seeds


def seeds_of_images(
    num_images: int,
    seed: int | None,
    seeds: Sequence[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
) -> list[int]:
    """See `ImagePipeline.prepare_seeds`."""
    if sum(source is not None for source in (seed, seeds, generator)) > 1:
        raise ValueError("give one of seed, seeds and generator")
    if seeds is not None:
        if len(seeds) != num_images:
            raise ValueError(f"{len(seeds)} seeds for {num_images} images")
        return [int(value) for value in seeds]
    if seed is not None:
        return image_seeds(seed, num_images)
    generators = generator if isinstance(generator, list) else [generator] * num_images
    if len(generators) != num_images:
        raise ValueError(f"{len(generators)} generators for {num_images} images")
    return [
        int(torch.randint(2**62, (), generator=each, device=each.device if each is not None else "cpu"))
        for each in generators
    ]


def numbered_classes(
    num_classes: int,
    seeds: list[int],
    class_labels: Sequence[int | str] | None,
    attributes: dict[str, str] | None,
) -> tuple[Condition, list[str]]:
    """Conditions and descriptions for a model whose classes have no names; a class that is not given is drawn.

    Raises:
        ValueError: attributes, or a class that is no number of 0 ... num_classes - 1.
    """
    if attributes:
        raise ValueError(f"this model has no attributes; got {', '.join(attributes)}")
    if class_labels is None:
        drawn = Noise(seeds).uniform(Use.CONDITION, 0) * num_classes
        labels = drawn.long().clamp(max=num_classes - 1)
    else:
        wrong = [label for label in class_labels if not (isinstance(label, int) and 0 <= label < num_classes)]
        if wrong:
            raise ValueError(f"class {wrong[0]!r}; this model's classes are the numbers 0 ... {num_classes - 1}")
        labels = torch.tensor([int(label) for label in class_labels])
    return Condition(labels_BA=labels[:, None]), [f"class {int(label)}" for label in labels]


def number_or_name(text: str) -> int | str:
    """A class as a command line gives it."""
    return int(text) if text.removeprefix("-").isdecimal() else text


def named_values(pairs: Sequence[str]) -> dict[str, str] | None:
    """Labels by name from texts such as "style=noto"; None for none.

    Raises:
        ValueError: a text without "=".
    """
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"attribute {pair!r}; write it as name=value, such as style=noto")
        found[name] = value
    return found or None
