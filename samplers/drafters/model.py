"""A drafter that is a smaller generator of the same tokens.

B batch, J drafts so far, W nodes of a level, X tokens that are read again, V codes.
"""

from typing import Any

import torch
from torch import Tensor

from visar.core.interface import Trees
from visar.core.runtime import Session
from visar.core.window import DraftTree
from visar.samplers.drafters.interface import Kept, Target, check_fit, weights_key
from visar.samplers.filtering import filtered_probs
from visar.samplers.verify import row_at


class ModelDrafter:
    """A smaller generator of the same tokens drafts (arXiv 2211.17192, 2302.01318).

    It runs with the same condition and guidance as the target, which makes its distributions agree better. Expected
    speed-up: (1 - a^(K+1)) / ((1 - a) (K c + 1)) for K drafts, acceptance a and cost ratio c.

    Args:
        generator: of one token per step, with start and verify (and verify_tree for trees).
    """

    def __init__(self, generator: Trees) -> None:
        self.generator = generator

    def key(self) -> tuple:
        return ("model", *weights_key(self.generator))

    def start(self, session: Session, kept: Kept, target: Target) -> "ModelDrafting":
        check_fit(self.generator, target.model)
        kept.drafter = self.generator.start(
            target.condition, target.guidance, ragged=True, window=target.window + 1, state=kept.drafter
        )
        return ModelDrafting(self.generator, kept.drafter, target)


class ModelDrafting:
    """A generator beside the target, with a cache of its own.

    Its cache lacks the last accepted draft of a chain, which was never fed to it, and holds the nodes of a tree in the
    tree's order. So every pass begins by reading what is missing: two tokens for chains, the last pass's for trees.
    """

    reads_features = False

    def __init__(self, generator: Trees, own: Any, target: Target) -> None:
        self.generator, self.own, self.target = generator, own, target
        self.reread = 1 if target.chain else target.depth + 1

    def calls(self, depth: int) -> int:
        return depth

    def begin(self) -> Tensor:
        own, length_B = self.own, self.target.state.length
        own.tokens[:, :-1].copy_(self.target.state.tokens)
        own.length.copy_((length_B - self.reread).clamp(min=0))
        position_BX = own.length[:, None] + torch.arange(self.reread, device=length_B.device)
        logits_BXV = self.generator.verify(own, own.tokens.gather(1, position_BX))
        logits_BV = row_at(logits_BXV, length_B - own.length)
        own.length.copy_(length_B)
        return filtered_probs(logits_BV, *self.target.filters)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        return filtered_probs(self.generator.verify(self.own, draft_BJ)[:, -1], *self.target.filters)

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        return filtered_probs(self.generator.verify_tree(self.own, tree)[:, first:], *self.target.filters)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Needs nothing: `begin` reads the committed tokens."""
