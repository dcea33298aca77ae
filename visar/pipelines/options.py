"""Options that several commands share: where a model runs and what is asked of its distributions."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model runs and in which dtype."""

    device: str | None = None
    """cpu, cuda, ...; a GPU if there is one."""
    dtype: str | None = None
    """float32, bfloat16 or float16; float32 on a CPU and bfloat16 on a GPU when not given."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Guidance and what is left of a token's distribution; what is not given is the model's own default."""

    guidance_scale: float | None = None
    """1.0 = off; the model's own default when not given, as for temperature, top_k and top_p."""
    temperature: float | None = None
    """> 0; 1.0 = off."""
    top_k: int | None = None
    """0 = off."""
    top_p: float | None = None
    """In (0, 1]; 1.0 = off."""
