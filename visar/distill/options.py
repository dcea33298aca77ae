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
    """Blocks that the steps of a call start from, 0 first; when not given, 0 and the block before which three in ten
    blocks stand."""
    later_share: float = 0.35
    """Share of a batch that starts from one of the later `starts`."""
    vector_weight: float = 0.5
    """Weight of the squared error of the vectors' head; the cross-entropy of the codes has 1."""
    steps: int = 10_000
    """Optimiser steps."""
    batch_size: int = 512
    """Pairs of a step, over all processes."""
    learning_rate: float = 2e-3
    """At its peak."""
    weight_decay: float = 0.05
    """Of the matrices."""
    optimizer: Literal["adamw", "muon"] = "muon"
    """Muon: the matrices of the blocks by Muon, everything else by AdamW."""
    save_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """Of the weights in model/; int8: the student's matrices in 8 bits with a scale a row, all else in bfloat16."""


@dataclass(frozen=True, kw_only=True)
class DistillDD2(RunOptions):
    """Distils a one-step generator from a raster or next-scale model by conditional score distillation, arXiv
    2510.21003, or improves a student of `visar distill dd1` by it (--initial).

    The teacher is an exact score model of its tokens. A score network is first tuned to the teacher's score; then it
    follows the generator's while the generator moves to where the two agree. No images are needed. Writes a pipeline
    that `visar.load` reads; the score network stays beside it, tuned.safetensors and guidance.safetensors.
    """

    teacher: str
    """Name or folder of the pipeline to distil. Its default settings (guidance, top-p ...) are what is learned."""
    initial: Path | None = None
    """One-step student to start from, a folder (a run's model/) or an embedded name; when not given the generator is a
    copy of the tuned score network, as published."""
    score: Path | None = None
    """Weights of the score network from an earlier run: its tuned.safetensors, and no step tunes; or, to go on from
    its model/ as --initial, its guidance.safetensors, with a larger --first-fake."""
    pairs: Path | None = None
    """Folder of pairs, whose tokens tune the score network and whose conditions are learned; shared with
    `visar distill dd1`; pairs/ of the run's folder when not given."""
    num_pairs: int = 32_768
    """Pairs that are read, and made first where there are fewer."""
    pair_batch: int = 1024
    """Pairs made at a time."""
    flow_steps: int = 20
    """Steps of the flow map's solver a token."""
    held_out: int = 512
    """Pairs that are held out for validation."""
    tuning_steps: int | None = None
    """Steps that tune the score network, the first of --steps; when not given 600, or none with --score."""
    tuning_learning_rate: float = 5e-4
    """Of the score network while it is tuned, at its peak."""
    fake_learning_rate: float = 3e-4
    """Of the score network while it follows the generator, at its peak."""
    first_fake: int = 100
    """Updates of the score network before the first one of the generator."""
    fake_updates: int = 4
    """Updates of the score network before every further one of the generator."""
    noise_draws: int = 1
    """Noisy vectors of every token in an update of the score network; more cost a pass of its head each."""
    form: Literal["dmd", "sid"] = "dmd"
    """Of the generator's loss: dmd, along the difference of the denoised vectors; sid, their product with the error,
    through the gradients of both."""
    pair_weight: float = 0.0
    """Weight of a loss of pairs in the generator's updates, which keeps the noise of an image tied to the tokens that
    the teacher makes of it: the cross-entropy of `visar distill dd1`, or the squared error of a student that makes
    vectors; the distillation loss has 1."""
    times: tuple[float, ...] = (0.05, 0.98)
    """Range of the times at which scores are compared, 1 being pure noise."""
    shared_times: bool = False
    """One time an image in the generator's updates, instead of one a token."""
    history: Literal["vectors", "codes"] = "vectors"
    """What the teacher is told of the tokens before: the generator's vectors, or the codes nearest to them. Teachers
    that embed ids are told codes in any case."""
    output: Literal["soft", "codes", "vectors"] | None = None
    """What the images of an --initial student are made of: mean codes; the likeliest codes, moved by the gradient of
    the mean ones; or the vectors of its second head. When not given, as the student has it."""
    head_width: int = 384
    """Width of the score network's head."""
    head_depth: int = 3
    """Residual blocks of the score network's head."""
    steps: int = 3000
    """Optimiser steps: first those that tune, then one a generator's update."""
    batch_size: int = 192
    """Images of a step, over all processes."""
    learning_rate: float = 2e-4
    """Of the generator, at its peak."""
    weight_decay: float = 0.0
    """Of the matrices."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the generator. Muon: the matrices of the blocks by Muon, everything else by AdamW."""
    score_optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the score network, in both stages."""
    ema_decay: float = 0.995
    """Decay of the moving average of the generator's weights, which is validated and saved."""
    validate_every: int = 250
    """Steps between validations, each of which writes model/ anew; 0 = at the end only."""
    save_dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16"
    """Of the weights in model/; int8: the student's matrices in 8 bits with a scale a row, all else in bfloat16."""


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


@dataclass(frozen=True, kw_only=True)
class DistillIndependent:
    """Makes the baseline of one-step students: tokens drawn independently, by their frequencies at every position.

    Frequencies are counted over the teacher's own tokens, whatever the condition: nothing is trained.
    """

    teacher: str
    """Name or folder of the pipeline whose tokens are counted."""
    out: Path
    """Folder to write: the pipeline is model/ of it."""
    pairs: Path | None = None
    """Folder of pairs, such as a student's; those that are missing are made. When not given, pairs/ of `out`."""
    num_pairs: int = 65_536
    """Sequences to count."""
    pair_batch: int = 1024
    """Pairs made at a time."""
    flow_steps: int = 20
    """Steps of the flow map's solver a token."""
