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
    """Project that the files are from, such as var; found out from the file when not given."""
    weights: Literal["ema", "plain"] | None = None
    """Averaged (ema) weights or those of the last step (plain), of files with both; None: what the project takes."""
    second: Path | None = None
    """CoDe's refiner, or the file of HMAR's second training phase."""
    like: str | None = None
    """Official name (`visar models`) whose grid and sampling settings apply."""
    grid: tuple[int, int] | None = None
    """Rows and columns of tokens (LlamaGen; image size / 16 for released models)."""
    scales: tuple[int, ...] | None = None
    """Sizes of the scales (VAR, HMAR, CoDe) where the file does not tell them."""
    rope: Literal["1d", "2d"] = "2d"
    """Rotary positions of LlamaGen's layout: 2d, or 1d for D-AR's files."""
    num_heads: int | None = None
    """Attention heads, for sizes that were not released."""
    refinement_layers: int = 8
    """Blocks that HMAR's second training phase trained."""
    dtype: str = "float32"
    """Of the stored weights: float32, bfloat16 or float16."""
