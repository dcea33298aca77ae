"""What tokenizers and samplers hand back: the token layout, and tokens with the counts that a speed claim needs."""

import warnings
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class SampleStatistics:
    """Counts of one call of a sampler.

    Attributes:
        forward_passes: model calls by name ("generator", "drafter", ...); a guided call on a doubled batch is one.
        tokens_per_pass: histogram: committed tokens in one pass of one image -> how often; lossless bookkeeping of
            what a parallel sampler gains. An ancestral raster sampler has {1: B * N}.
        proposed: drafted tokens that were verified; 0 for samplers that draft nothing.
        accepted: how many of them were accepted.
        counts: other counts by name, such as passes of heads or transitions that were equal.
        seconds: wall-clock time of the sampling loop, tokens only (device work finished).
    """

    forward_passes: dict[str, int] = field(default_factory=dict)
    tokens_per_pass: dict[int, int] = field(default_factory=dict)
    proposed: int = 0
    accepted: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: "SampleStatistics") -> "SampleStatistics":
        """Counts of two calls together."""
        return SampleStatistics(
            forward_passes=dict(Counter(self.forward_passes) + Counter(other.forward_passes)),
            tokens_per_pass=dict(Counter(self.tokens_per_pass) + Counter(other.tokens_per_pass)),
            proposed=self.proposed + other.proposed,
            accepted=self.accepted + other.accepted,
            seconds=self.seconds + other.seconds,
            counts=dict(Counter(self.counts) + Counter(other.counts)),
        )

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / proposed in [0, 1]; None when nothing was drafted."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def mean_tokens_per_pass(self) -> float:
        """Mean of the histogram; 0.0 when it is empty."""
        passes = sum(self.tokens_per_pass.values())
        return sum(count * times for count, times in self.tokens_per_pass.items()) / passes if passes else 0.0


@dataclass
class SampleOutput:
    """Tokens of a batch (int64 [B, N], or float [B, N, C] for continuous ones) and the counts of the call.

    latent: float [B, C, h, w] for images, what the tokenizer's `decode_latents` makes them of, from samplers that have
    it anyway or whose images are not those of their tokens (smoothing, editing of maps); None: decode the tokens.
    outcome_BN: int8, how every token came about, from speculative samplers: 2 an accepted draft, 1 drawn where drafts
    were rejected, 0 drawn where none was verified.
    """

    tokens: Tensor
    statistics: SampleStatistics = field(default_factory=SampleStatistics)
    latent: Tensor | None = None
    outcome_BN: Tensor | None = None

    @property
    def latent_BChw(self) -> Tensor | None:
        """The former name of `latent`."""
        warnings.warn("SampleOutput.latent_BChw is now SampleOutput.latent", DeprecationWarning, stacklevel=2)
        return self.latent
