"""Options of `visar edit`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from visar.cli.flags import names_image

Box = tuple[float, float, float, float]
"""Top, left, bottom, right as fractions in 0 ... 1."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Redraws a part of an image by a model over scales, or a masked one: inpainting, outpainting or a class edit."""

    model: tyro.conf.Positional[str]
    """Model: an embedded or official name (`visar models`), or a folder made by save_pretrained."""
    picture: tyro.conf.Positional[Path]
    """Image file to edit; its centre square is resized to the model's size."""
    box: Box = (0.25, 0.25, 0.75, 0.75)
    """Box as top, left, bottom, right, in fractions of the centre square."""
    keep: Literal["outside", "inside"] = "outside"
    """Part that stays: outside of the box, to inpaint or edit it; inside, to outpaint."""
    strategy: Literal["codes", "map", "refine"] | None = None
    """Method of models over scales: codes (VAR), map (CoDe), or refine (hierarchical masked models); when not given,
    codes."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class to edit towards, by name or number; when not given, drawn from the training set's distribution."""
    attribute: tuple[str, ...] = ()
    """Further labels as name=value, such as style=noto."""
    unconditional: bool = False
    """Give the model no condition: the rest of the image alone decides."""
    paste: bool = True
    """Paste the given pixels back where the image stays; otherwise they too have gone through the tokenizer."""
    num_images: int = 4
    """Number of results."""
    seed: int = 0
    """Seed of the first result; result i has seed + i."""
    guidance_scale: float | None = None
    """Guidance scale, 1.0 = off; when not given, the model's own default, as for temperature, top-k and top-p."""
    temperature: float | None = None
    """Temperature, > 0; 1.0 = off."""
    top_k: int | None = None
    """Number of likeliest codes that may be drawn (top-k); 0 = off."""
    top_p: float | None = None
    """Probability mass of the likeliest codes that may be drawn (top-p), in (0, 1]; 1.0 = off."""
    steps: int | None = None
    """Passes of a masked model, up to the number of tokens that are drawn; when not given, 64 or that number."""
    out: Path = Path("edited.png")
    """An image file, for the given image and the results side by side; or a folder, for one file per result."""
    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    dtype: str | None = None
    """Dtype of the weights: float32, bfloat16 or float16; when not given, bfloat16 on a GPU and float32 on a CPU."""


def edit(options: Edit) -> str:
    """Runs `visar edit`; returns what to print.

    Raises:
        ValueError: a file that is not an image, or a value out of range.
    """
    import PIL.Image

    from visar.data.crops import center_crop
    from visar.data.pictures import read_picture
    from visar.io.files import atomic_write, locked
    from visar.io.pictures import grid
    from visar.pipelines.editing import edit_images
    from visar.pipelines.loading import load
    from visar.pipelines.requests import named_values, number_or_name

    single = names_image(options.out)
    given = PIL.Image.fromarray(read_picture(options.picture, None, str(options.picture)))
    pipeline = load(options.model, device=options.device, dtype=options.dtype)
    pipeline.set_progress_bar_config(disable=True)
    label = None if options.class_name is None else number_or_name(options.class_name, pipeline.vocabulary)
    result = edit_images(
        pipeline,
        [given] * options.num_images,
        box=options.box,
        keep=options.keep,
        strategy=options.strategy,
        class_labels=None if label is None else [label] * options.num_images,
        attributes=named_values(options.attribute),
        unconditional=options.unconditional,
        paste=options.paste,
        seed=options.seed,
        guidance_scale=options.guidance_scale,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        sampler_options={} if options.steps is None else {"steps": options.steps},
    )
    shown = center_crop(given, result.images[0].width)
    if single:
        with atomic_write(options.out) as path:
            grid([shown, *result.images], columns=1 + options.num_images).save(path)
    else:
        names = ["given", *(f"{seed:06d}" for seed in result.seeds)]
        with locked(options.out):
            for name, image in zip(names, [shown, *result.images], strict=True):
                with atomic_write(options.out / f"{name}.png") as path:
                    image.save(path)
    lines = [f"seed {seed}: {text}" for seed, text in zip(result.seeds, result.descriptions, strict=True)]
    return "\n".join([*lines, f"the given image and {options.num_images} edits: {options.out}"])
