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
    """A picture file; it is resized to the model's size."""
    box: Box = (0.25, 0.25, 0.75, 0.75)
    """Top, left, bottom, right as fractions of the picture."""
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
    """A picture: the given one, then the results."""
    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""
