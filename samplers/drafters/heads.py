"""A drafter of heads that read the target's last hidden vectors, one per spatial offset.

Hidden vector h_t is the one that predicts token t; it has seen the condition and the tokens before t. The heads end in
the target's own output head, which is not part of their weights. They are trained on frozen targets with `heads_loss`.

B batch, R rows (2B when guided), N tokens, L slots of a pass, J drafts so far, X any positions, D hidden size, V
codes, T slots of a memory, M nodes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from visar.core.guidance import repeat
from visar.core.interface import Features
from visar.core.runtime import Session
from visar.core.window import DraftTree
from visar.layers.packable import Packable
from visar.samplers.drafters.interface import Kept, Target, check_features, probs_or_uniform, weights_key
from visar.samplers.filtering import filtered_probs
from visar.samplers.verify import row_at


class SpatialHeads(Packable, ModelMixin, ConfigMixin):
    """Heads that predict several tokens to the right at once, helped by the hidden vectors of the row above.

    Multi-token heads are Medusa's (arXiv 2401.10774); the second, vertical offset is a grid's own: the token below is
    as predictable as the one two steps to the right. The hidden vector for position m = t + k is

        right_k(h_t) + below(h_(m - columns + 1)),    right_k(h) = h + silu(W_k h),    below(h) = V silu(U h),

    where h_(m - columns + 1) is the one that had just read the token above m, if it is known. All offsets end in the
    target's head.

    Args:
        vocab_size, grid, width: the target's.
        num_right: largest k, the most drafts of a pass. Medusa: 5.
        target, target_digest: see FeatureDrafter.
    """

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 16384,
        grid: tuple[int, int] = (16, 16),
        width: int = 1280,
        num_right: int = 5,
        target: str = "",
        target_digest: str = "",
    ) -> None:
        super().__init__()
        self.right = nn.ModuleList(nn.Linear(width, width) for _ in range(num_right))
        self.below_in = nn.Linear(width, width)
        self.below_out = nn.Linear(width, width, bias=False)
        for layer in (*self.right, self.below_out):
            nn.init.zeros_(layer.weight)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Weights to train from: all heads give back the vector that they are given."""
        nn.init.normal_(self.below_in.weight, std=0.02, generator=generator)
        for layer in (*self.right, self.below_in):
            nn.init.zeros_(layer.bias)
        for layer in (*self.right, self.below_out):
            nn.init.zeros_(layer.weight)

    def forward(self, last_BXD: Tensor, above_BXD: Tensor, known_BX: Tensor, offset: int) -> Tensor:
        """Hidden vectors [..., D] for `offset` >= 1 positions to the right.

        last_BXD: h_t. above_BXD: h_(m - columns + 1), used where known_BX.
        """
        right = last_BXD + functional.silu(self.right[offset - 1](last_BXD))
        below = self.below_out(functional.silu(self.below_in(above_BXD)))
        return right + below * known_BX[..., None]

    def key(self) -> tuple:
        """See Drafter."""
        return ("heads", *weights_key(self))

    def start(self, session: Session, kept: Kept, target: Target) -> "HeadsDrafting":
        """See Drafter."""
        check_features(self, target.model)
        if target.depth > len(self.right):
            raise ValueError(f"{target.depth} drafts one after another; these heads reach {len(self.right)}")
        return HeadsDrafting(self, session, target)


def above_index(last_T: Tensor, offset: int, columns: int) -> tuple[Tensor, Tensor]:
    """Where the vector is that had just read the token above position last + offset, and whether it is known there."""
    above_T = last_T + offset - columns + 1
    return above_T.clamp(min=0), (above_T >= 0) & (above_T <= last_T)


def heads_predictions(
    heads: Any, hidden_BND: Tensor, call: Callable[..., Tensor] | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Every offset of `SpatialHeads`, and their predictions [B, N - offset, D] of the vectors that far ahead.

    Args:
        hidden_BND: teacher-forced hidden vectors of the target.
        call: the heads as they are to be called; None is `heads` itself.
    """
    predict: Callable[..., Tensor] = heads if call is None else call
    num_tokens, columns = hidden_BND.shape[1], heads.config["grid"][-1]
    for offset in range(1, min(len(heads.right), num_tokens - 1) + 1):
        last = torch.arange(num_tokens - offset, device=hidden_BND.device)
        above, known = above_index(last, offset, columns)
        yield offset, predict(hidden_BND[:, last], hidden_BND[:, above], known[None], offset)


def heads_loss(
    heads: Any,
    model: Features,
    hidden_BND: Tensor,
    decay: float = 0.8,
    call: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Cross-entropy with a frozen target's distributions at all offsets, weighted decay^(k - 1).

    Medusa, arXiv 2401.10774, section 2.2.

    Args:
        model: the target, for its output head.
        hidden_BND: its teacher-forced hidden vectors, `model.hidden(tokens, condition)`.
        decay: 0.8.
        call: the heads as they are to be called, such as behind gradient averaging; None is `heads` itself.

    Differs from the paper: the target's distributions, against which drafts are verified, replace the data's tokens.
    """
    hidden_BND = hidden_BND.detach()
    with torch.no_grad():
        probs_BNV = torch.softmax(model.output(hidden_BND).float(), dim=-1)
    total, weights = hidden_BND.new_zeros((), dtype=torch.float32), 0.0
    for offset, predicted in heads_predictions(heads, hidden_BND, call):
        log_probs = torch.log_softmax(model.output(predicted).float(), dim=-1)
        weight = decay ** (offset - 1)
        total = total - weight * (probs_BNV[:, offset:] * log_probs).sum(-1).mean()
        weights += weight
    return total / weights


class HeadsDrafting:
    """SpatialHeads at work: remembers the hidden vectors of all committed positions."""

    reads_features = True

    def __init__(self, heads: Any, session: Session, target: Target) -> None:
        self.heads, self.target, self.columns = heads, target, heads.config["grid"][-1]
        rows, weight = target.state.batch * target.state.parts, heads.below_in.weight
        length = target.model.num_tokens + target.depth + 1
        memory = torch.zeros(rows, length, heads.config["width"], device=weight.device, dtype=weight.dtype)
        self.memory_RTD = session.static("memory", memory)

    def calls(self, depth: int) -> int:
        return depth

    def _probs(self, drafts: int) -> Tensor:
        state = self.target.state
        last_R = repeat(state.length - 1, state.parts)
        above_R = last_R + drafts + 2 - self.columns
        known_R = (above_R >= 0) & (above_R <= last_R)
        last_RD = row_at(self.memory_RTD, last_R.clamp(min=0))
        above_RD = row_at(self.memory_RTD, torch.where(known_R, above_R, 0))
        hidden_R1D = self.heads(last_RD, above_RD, known_R, drafts + 1)[:, None]
        depth_BL = torch.full((1, 1), drafts, device=hidden_R1D.device)
        logits_B1V = self.target.model.guided_logits(state, hidden_R1D, depth_BL)
        return probs_or_uniform(filtered_probs(logits_B1V[:, 0], *self.target.filters), state.length > 0)

    def begin(self) -> Tensor:
        return self._probs(0)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        return self._probs(draft_BJ.shape[1])

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        return self._probs(depth)[:, None].expand(-1, tree.num_nodes + 1 - first, -1)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        assert features_RLD is not None
        start_R1 = repeat(start_B, self.target.state.parts)[:, None]
        position_RL = start_R1 + torch.arange(features_RLD.shape[1], device=features_RLD.device)
        index = position_RL.clamp(max=self.memory_RTD.shape[1] - 1)[..., None].expand_as(features_RLD)
        self.memory_RTD.scatter_(1, index, features_RLD.to(self.memory_RTD.dtype))
