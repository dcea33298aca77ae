"""Options of `visar convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Convert:
    """Makes a folder that loads without a network from another project's weights files."""

    file: tyro.conf.Positional[Path]
    """Weights of the generator (or of a tokenizer alone): .pt, .pth or .safetensors."""
    out: Path
    """Folder to write; it must not exist or be empty."""
    tokenizer: Path | None = None
    """Weights of the tokenizer that the generator was trained with."""
    source: str | None = None
    """Project that the files are from, such as var; without it, the file tells."""
    weights: Literal["ema", "plain"] | None = None
    """Averaged weights (ema) or those of the last step (plain), for files with both; None: the project's choice."""
    second: Path | None = None
    """Weights of CoDe's refiner, or of HMAR's second training phase."""
    like: str | None = None
    """Official name (`visar models`) whose grid and sampling settings apply."""
    grid: tuple[int, int] | None = None
    """Rows and columns of tokens (LlamaGen; image size / 16 for released models)."""
    scales: tuple[int, ...] | None = None
    """Sizes of the scales (VAR, HMAR, CoDe) where the file does not tell them."""
    rope: Literal["1d", "2d"] = "2d"
    """Rotary positions of LlamaGen's layout: 2d, or 1d for D-AR's files."""
    num_heads: int | None = None
    """Number of attention heads, for sizes that were not released."""
    refinement_layers: int = 8
    """Number of blocks that HMAR's second training phase trained."""
    dtype: str = "float32"
    """Dtype of the stored weights: float32, bfloat16 or float16."""
    storage: Literal["plain", "int8"] = "plain"
    """Plain, or int8: matrices in 8 bits with a scale a row (of a pipeline, the generator's)."""
