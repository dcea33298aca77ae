"""The rule of exact speculation where a head's density is known: accept a draft by densities, else draw what is left.

Source: arXiv 2211.17192 section 2.3, with densities in place of probabilities. A draft x of density q is accepted with
chance min(1, p(x) / q(x)); otherwise the token has the density [p - q]+ / (1 - overlap), drawn by rejection: y from p
is taken with chance [1 - q(y) / p(y)]+. That may take any number of proposals. They go on over the following passes
while other images proceed, so that no image waits for another, and what an image gets does not depend on its batch.
After `MOST_PROPOSALS` the target's own draw is taken, which changes a token's distribution by at most
max d (1 - d)^MOST_PROPOSALS < 6e-6 in total variation, d the distance of the two; statistics count how often.

B images, M proposals of a pass, K components, C numbers of a token.
"""

import torch
from torch import Tensor

from visar.core.interface import DensityHead
from visar.core.noise import Noise, Use
from visar.core.runtime import Session
from visar.layers.heads.mixture import FIELDS, MixtureLaw

PROPOSALS = 16
"""Of one pass, each of which costs a density of both laws and no pass of a model."""
MOST_PROPOSALS = 1 << 16


def accepted(log_p: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """Where drafts are accepted, bool [...]: with chance min(1, p / q)."""
    return uniform.log() <= log_p - log_q


def taken(log_p: Tensor, log_q: Tensor, uniform: Tensor) -> Tensor:
    """Where proposals drawn from p are what is left of it, bool [...]: with chance [1 - q / p]+."""
    return uniform < -torch.expm1(log_q - log_p)


class Residual:
    """Rejected places whose token is still to be drawn, one an image at most, in static buffers of a session.

    Args:
        session, noise: of the call.
        heads: of the target and of the draft.

    Attributes:
        open_B: bool, images that have one.
        laws: of the target and of the draft there, [B, 1, K] and [B, 1, K, C].
    """

    def __init__(self, session: Session, noise: Noise, heads: tuple[DensityHead, DensityHead]) -> None:
        batch, device = noise.batch, noise.device
        self.noise, self.channels = noise, heads[0].channels
        self.open_B = session.static("open", torch.zeros(batch, dtype=torch.bool, device=device))
        self.proposed_B = session.static("proposed", torch.zeros(batch, dtype=torch.int64, device=device))
        self.laws = []
        for name, head in zip(("target", "draft"), heads, strict=True):
            weights = torch.zeros(batch, 1, head.components, device=device)
            means = torch.zeros(*weights.shape, head.channels, device=device)
            values = dict(log_weights=weights, means=means, deviations=torch.ones_like(means))
            self.laws.append(
                MixtureLaw(**{key: session.static(f"{name} {key}", each) for key, each in values.items()})
            )

    def open(self, rejected_B: Tensor, target: MixtureLaw, draft: MixtureLaw) -> None:
        """Opens the places of some images that have none, with both laws there, [B, 1, ...]."""
        for kept, new in zip(self.laws, (target, draft), strict=True):
            for name in FIELDS:
                old, value = getattr(kept, name), getattr(new, name)
                old.copy_(torch.where(rejected_B.view(-1, *[1] * (old.ndim - 1)), value, old))
        self.proposed_B.masked_fill_(rejected_B, 0)
        self.open_B.logical_or_(rejected_B)

    def draw(self, place_B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tokens [B, 1, C], bool [B] of the images that got one, whose places are closed; and int64 numbers of
        proposals and of fallbacks.

        Args:
            place_B: where the images' open places stand.
        """
        number_BM = self.proposed_B[:, None] + torch.arange(PROPOSALS, device=place_B.device)
        place_BM = place_B[:, None].expand_as(number_BM)
        first_BM = self.noise.normal(Use.RESIDUAL, place_BM, counter=3 * number_BM)
        normal_BMC = self.noise.normal(Use.RESIDUAL, place_BM, (self.channels,), counter=3 * number_BM + 1)
        uniform_BM = self.noise.uniform(Use.RESIDUAL, place_BM, counter=3 * number_BM + 2)
        target, draft = self.laws
        proposal_BMC = target.draw(first_BM, normal_BMC)
        taken_BM = taken(target.log_prob(proposal_BMC), draft.log_prob(proposal_BMC), uniform_BM)
        index_B, found_B = taken_BM.long().argmax(1), taken_BM.any(1)
        spent_B = self.open_B & ~found_B & (self.proposed_B + PROPOSALS >= MOST_PROPOSALS)
        count = torch.where(self.open_B, torch.where(found_B, index_B + 1, PROPOSALS), 0).sum()
        # Where none is taken the index is 0: a draw from the target.
        tokens_B1C = proposal_BMC.gather(1, index_B[:, None, None].expand(-1, 1, self.channels))
        got_B = self.open_B & (found_B | spent_B)
        self.proposed_B.add_(PROPOSALS)
        self.open_B.logical_and_(~got_B)
        return tokens_B1C, got_B, count, spent_B.sum()
