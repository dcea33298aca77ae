"""Options of `visar distill`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from visar.train.options import RunOptions


@dataclass(frozen=True, kw_only=True)
class DistillDD1(RunOptions):
    """Distils a one-step generator from a raster or next-scale model by Distilled Decoding, arXiv 2412.17153.

    The teacher turns noise into tokens through its flow map; the student learns to predict all tokens of an image from
    the noise in one pass. No images are needed. Writes a pipeline that `visar.load` reads.
    """

    teacher: str
    """Name or folder of the pipeline to distil. Its default settings (guidance, top-p ...) are what is learned."""
    pairs: Path | None = None
    """Folder of pairs, shared by runs and by `visar distill pairs`; pairs/ of the run's folder when not given."""
    num_pairs: int = 500_000
    """Pairs made in all; they grow evenly over the first 80 % of the steps."""
    first_pairs: int = 65_536
    """Pairs made before the first step."""
    pair_batch: int = 1024
    """Pairs made at a time."""
    flow_steps: int = 20
    """Steps of the flow map's solver a token."""
    held_out: float = 0.05
    """Share of the pairs that are held out for validation, at most 4096."""
    starts: tuple[int, ...] = ()
    """Blocks that the steps of a call start from, 0 first; when not given, 0 and a third of the tokens."""
    later_share: float = 0.35
    """Share of a batch that starts from one of the later `starts`."""
    vector_weight: float = 0.5
    """Weight of the squared error of the vectors' head; the cross-entropy of the codes has 1."""
    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 512
    """Pairs of a step, over all processes."""
    learning_rate: float = 1e-3
    """At its peak."""
    weight_decay: float = 0.05
    """Of the matrices."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Muon: the matrices of the blocks by Muon, everything else by AdamW."""
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of the weights in model/."""


@dataclass(frozen=True, kw_only=True)
class DistillPairs:
    """Makes pairs of noise and tokens for `visar distill dd1`, beside it or before it, on as many GPUs as there are.

    Blocks that exist are left as they are.
    """

    teacher: str
    """Name or folder of the pipeline to distil."""
    out: Path
    """Folder of the pairs: what `--pairs` of `visar distill dd1` takes."""
    num_pairs: int = 500_000
    """Pairs in all."""
    pair_batch: int = 1024
    """Pairs made at a time."""
    flow_steps: int = 20
    """Steps of the flow map's solver a token."""
