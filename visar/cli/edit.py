"""Options of `visar edit`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

Box = tuple[float, float, float, float]
"""Top, left, bottom, right as fractions in 0 ... 1."""


@dataclasses.dataclass(frozen=True)
class Edit:
    """Draws a part of a picture anew with a model over scales: inpainting, outpainting or a class edit."""

    model: tyro.conf.Positional[str]
    """An embedded or official name (`visar models`), or a folder made by save_pretrained."""
    picture: tyro.conf.Positional[Path]
    """A picture file; its centre square is resized to the model's size."""
    box: Box = (0.25, 0.25, 0.75, 0.75)
    """Top, left, bottom, right as fractions of that square."""
    keep: Literal["outside", "inside"] = "outside"
    """What stays: outside of the box to inpaint or edit it, inside to outpaint."""
    strategy: Literal["codes", "map", "refine"] = "codes"
    """codes (VAR), map (CoDe), or refine (hierarchical masked models)."""
    class_name: Annotated[str | None, tyro.conf.arg(name="class", metavar="NAME")] = None
    """Class to edit towards, by name or number; drawn from the training law when not given."""
    attribute: tuple[str, ...] = ()
    """Further labels as name=value."""
    unconditional: bool = False
    """Give the model nothing: the rest of the picture alone decides."""
    paste: bool = True
    """Put the given pixels back where the picture stays; otherwise they too have gone through the tokenizer."""
    num_images: int = 4
    """Results."""
    seed: int = 0
    """Result i has seed + i."""
    guidance_scale: float | None = None
    """1.0 = off; the model's own default when not given, as for the next three."""
    temperature: float | None = None
    """> 0; 1.0 = off."""
    top_k: int | None = None
    """0 = off."""
    top_p: float | None = None
    """In (0, 1]; 1.0 = off."""
    out: Path = Path("edited.png")
    """A picture: the given one, then the results; or a folder, for one file each."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""


def edit(options: Edit) -> str:
    """Runs `visar edit`; returns what to print.

    Raises:
        ValueError: a file that is no picture, or a value out of range.
    """
    import PIL.Image

    from visar.data.crops import center_crop
    from visar.data.pictures import read_picture
    from visar.io.files import atomic_write
    from visar.io.pictures import WRITTEN_AS, grid
    from visar.pipelines.editing import edit_images
    from visar.pipelines.loading import load
    from visar.pipelines.requests import named_values, number_or_name

    if options.num_images < 1:
        raise ValueError(f"num_images {options.num_images}; it must be >= 1")
    single = options.out.suffix.lower() in WRITTEN_AS
    if options.out.suffix and not single:
        raise ValueError(f"out {options.out}; it must end in one of {', '.join(WRITTEN_AS)}, or in none: a folder")
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
    )
    shown = center_crop(given, result.images[0].width)
    if single:
        with atomic_write(options.out) as path:
            grid([shown, *result.images], columns=1 + options.num_images).save(path)
    else:
        names = ["given", *(f"{seed:06d}" for seed in result.seeds)]
        for name, image in zip(names, [shown, *result.images], strict=True):
            with atomic_write(options.out / f"{name}.png") as path:
                image.save(path)
    lines = [f"seed {seed}: {text}" for seed, text in zip(result.seeds, result.descriptions, strict=True)]
    return "\n".join([*lines, f"the given picture and {options.num_images} edits: {options.out}"])
