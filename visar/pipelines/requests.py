"""What a call asks for: seeds and numbered classes image by image, classes and labels as text."""

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from visar.core.checks import IMAGES, check_range
from visar.core.condition import Condition
from visar.core.noise import Noise, Use, image_seeds
from visar.data.vocabulary import Vocabulary, match_names


def _as_list(name: str, values: Any) -> Any:
    """Arrays and tensors as lists or numbers, and all else as it is.

    Raises:
        ValueError: a tensor without plain values, such as a sparse one.
    """
    try:
        return values.tolist() if isinstance(values, torch.Tensor | np.ndarray) else values
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{name}: a tensor that is sparse, or on the meta device, is no list") from error


def each_image(name: str, values: Any, num_images: int) -> list[Any]:
    """Classes or prompts, one or several, each for `num_images` images.

    Raises:
        ValueError: none at all, too many, or one that is no text (or, for classes, no whole number).
    """
    kinds: tuple[type, ...] = (str,) if name == "prompt" else (str, Integral)
    values = _as_list(name, values)
    listed = [values] if isinstance(values, kinds) or not isinstance(values, Iterable) else list(values)
    listed = [value.item() if isinstance(value, torch.Tensor) and value.ndim == 0 else value for value in listed]
    if not listed:
        raise ValueError(f"{name} is empty; give one or several, or leave it out")
    wrong = [value for value in listed if not isinstance(value, kinds)]
    if wrong:
        needed = "a text" if name == "prompt" else "a name or a whole number"
        raise ValueError(f"{name} {wrong[0]!r}; {needed} is needed")
    check_range(f"{name}: images", len(listed) * num_images, IMAGES)
    return [value for value in listed for _ in range(num_images)]


def without_empty(prompt: Any, num_images: int) -> tuple[Any, int]:
    """A prompt, and images of it; empty texts are no prompt, and a list of them a number of images.

    Raises:
        ValueError: some texts of a list are empty, others are not.
    """
    if isinstance(prompt, str):
        return (prompt if prompt.strip() else None), num_images
    if not isinstance(prompt, list | tuple) or not prompt:
        return prompt, num_images
    empty = [text for text in prompt if isinstance(text, str) and not text.strip()]
    if not empty:
        return prompt, num_images
    if len(empty) < len(prompt):
        raise ValueError(f"{len(empty)} of {len(prompt)} prompts are empty; give all of them, or none")
    return None, len(prompt) * num_images


# Arguments of other pipelines that this one does not have, and what to use instead.
_FOREIGN = {
    "negative_prompt": "guidance is away from no condition: leave it out",
    "num_inference_steps": "steps are settings of samplers (sampler_options; `visar samplers` lists them)",
    "eta": "noise is a setting of samplers (sampler_options; `visar samplers` lists them)",
    "latents": "images are functions of seeds: give seed, seeds or generator",
    "guidance_rescale": "give a visar.Guidance as guidance_scale",
    "timesteps": "steps are settings of samplers (sampler_options; `visar samplers` lists them)",
    "num_frames": "it makes still images, no clips",
    "image": "use `visar edit`, or pipeline.sample_tokens with the sampler edit",
}


def check_others(others: dict[str, Any], tensors: Sequence[str] | None, size: tuple[int, int] | None) -> None:
    """Checks the arguments of a call that only other pipelines have: those that ask for nothing pass.

    Args:
        others: arguments by name.
        tensors: what a callback wants to be given.
        size: (height, width) of the pipeline's images, where it is known; arguments of these names may say so.

    Raises:
        ValueError: an argument that cannot be honoured; says what to use instead.
    """
    if tensors is not None and (isinstance(tensors, str) or set(tensors) - {"tokens"}):
        raise ValueError(f"callback_on_step_end_tensor_inputs {tensors!r}; allowed: ['tokens']")
    for name, value in others.items():
        if name in ("height", "width"):
            if value is not None and (size is None or value != size[name == "width"]):
                own = "of one size" if size is None else f"{size[0]} x {size[1]}"
                raise ValueError(f"{name} {value!r}; this model's images are {own}")
        elif name in _FOREIGN:
            if value is not None and value != "" and value != [""] and not (name == "eta" and value == 0.0):
                raise ValueError(f"{name}={value!r:.80} is nothing that this pipeline has: {_FOREIGN[name]}")
        else:
            # What Python itself raises for a name that nobody knows.
            raise TypeError(f"ImagePipeline.__call__ has no argument {name!r}")


def check_returned(returned: Any, tokens: torch.Tensor) -> None:
    """Checks what a callback returned: other tokens would be no sample of the model.

    Raises:
        ValueError: it changed the tokens.
    """
    if isinstance(returned, Mapping) and returned.get("tokens", tokens) is not tokens:
        raise ValueError("the callback returned other tokens; it may look at them and interrupt, not replace them")


def each_begins(first_tokens: Any, num_images: int) -> torch.Tensor:
    """First tokens of every image int64 [B, K], from those of all [K] or of each [B, K].

    Raises:
        ValueError: no whole numbers, or rows of another number of images.
    """
    needed = f"needed: whole numbers [K], or [{num_images}, K] with a row for every image"
    if not isinstance(first_tokens, torch.Tensor):
        raise ValueError(f"first_tokens of type {type(first_tokens).__name__}; {needed}")
    kind = first_tokens.dtype
    if kind.is_floating_point or kind.is_complex or kind == torch.bool or first_tokens.ndim not in (1, 2):
        raise ValueError(f"first_tokens of shape {tuple(first_tokens.shape)}, {kind}; {needed}")
    rows_BK = first_tokens.long().reshape(-1, first_tokens.shape[-1])
    if len(rows_BK) not in (1, num_images) or not rows_BK.shape[1]:
        raise ValueError(f"first_tokens of shape {tuple(first_tokens.shape)}; {needed}")
    return rows_BK.expand(num_images, -1)


def _whole(seed: Any) -> int:
    try:
        return operator.index(seed)
    except TypeError as error:
        raise ValueError(f"seed {seed!r}; it must be a whole number of 0 ... 2^63 - 1") from error


def _fresh(generator: torch.Generator, seed: Any) -> bool:
    """Whether a generator was made of that seed and has drawn nothing yet."""
    if generator.initial_seed() != seed:
        return False
    return torch.equal(generator.get_state(), torch.Generator(generator.device).manual_seed(seed).get_state())


def seeds_of_images(
    num_images: int,
    seed: int | None,
    seeds: Sequence[int] | None,
    generator: torch.Generator | list[torch.Generator] | None,
) -> list[int]:
    """See `ImagePipeline.prepare_seeds`.

    Servers send a seed and a generator that was made of it: the seed is taken.
    """
    if seed is not None and isinstance(generator, torch.Generator) and _fresh(generator, seed):
        generator = None
    if sum(source is not None for source in (seed, seeds, generator)) > 1:
        raise ValueError("give one of seed, seeds and generator")
    if seeds is not None:
        seeds = _as_list("seeds", seeds)
        if not isinstance(seeds, Sequence):
            raise ValueError(f"seeds {seeds!r}; give one per image, or `seed` for all of them")
        if len(seeds) != num_images:
            raise ValueError(f"{len(seeds)} seeds for {num_images} images")
        return [_whole(value) for value in seeds]
    if seed is not None:
        return image_seeds(_whole(seed), num_images)
    generators = list(generator) if isinstance(generator, list | tuple) else [generator] * num_images
    wrong = [each for each in generators if not isinstance(each, torch.Generator | None)]
    if wrong:
        raise ValueError(f"generator {wrong[0]!r}; a torch.Generator is needed, or one per image")
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
        wrong = [
            label for label in class_labels if not (isinstance(label, Integral) and 0 <= int(label) < num_classes)
        ]
        if wrong:
            raise ValueError(f"class {wrong[0]!r}; this model's classes are the numbers 0 ... {num_classes - 1}")
        labels = torch.tensor([int(label) for label in class_labels])
    return Condition(labels_BA=labels[:, None]), [f"class {int(label)}" for label in labels]


def number_or_name(text: str, vocabulary: Vocabulary | None) -> int | str:
    """A class as a command line gives it: a number only where no class of the model has that name."""
    named = vocabulary is not None and match_names(text.strip(), vocabulary.attributes.get("class", ()))
    return int(text) if text.removeprefix("-").isdecimal() and not named else text


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
