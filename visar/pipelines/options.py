"""Options that several commands share: where a model runs and what is asked of its distributions."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a model runs and in which dtype."""

    device: str | None = None
    """Device to run on: cpu, cuda, cuda:1, ...; when not given, a GPU if there is one."""
    dtype: str | None = None
    """Dtype of the weights: float32, bfloat16 or float16; when not given, bfloat16 on a GPU and float32 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Filters:
    """Guidance and what is left of a token's distribution; what is not given is the model's own default."""

    guidance_scale: float | None = None
    """Guidance scale, 1.0 = off; when not given, the model's own default, as for temperature, top-k and top-p."""
    temperature: float | None = None
    """Temperature, > 0; 1.0 = off."""
    top_k: int | None = None
    """Number of likeliest codes that may be drawn (top-k); 0 = off."""
    top_p: float | None = None
    """Probability mass of the likeliest codes that may be drawn (top-p), in (0, 1]; 1.0 = off."""
