"""Who proposes tokens: the interface of drafters, and two that need no training of their own.

A drafter object holds weights or settings; `start` opens a drafting for one batch, whose tensors live in the sampler's
session. For every pass the sampler calls `begin` once, which catches up with the committed tokens and returns the law
of the next position, and then `extend` (a chain) or `extend_tree` (a level of a tree) for the laws behind the drafts.
Whatever the laws are, speculation stays exact, because each draft is judged against the law it was drawn from. Only a
drafter that looks at other images would break the rule that an image depends on its own seed.

B batch, J drafts so far, W nodes of a level, L slots of a pass, R rows (2B when guided), D width, V codes, N tokens.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from visar import kernels
from visar.condition import Condition
from visar.guidance import Guidance
from visar.runtime import Session
from visar.samplers.verify import Generator, row_at, token_law
from visar.tree import DraftTree


@dataclass(frozen=True)
class Target:
    """What a drafter works beside.

    Attributes:
        model, state: the generator and its decoding state.
        condition, guidance: of the call.
        window: most tokens that are drafted in a pass; depth: most of them one after another.
        filters: temperature, top_k and top_p, which drafters of the same kind of law apply too.
        chain: whether a pass's tokens all follow one another.
    """

    model: Generator
    state: Any
    condition: Condition
    guidance: Guidance
    window: int
    depth: int
    filters: tuple[float, int, float]
    chain: bool = True


@dataclass
class Kept:
    """Decoding states that a session keeps for its next call: the target's, and the drafter's if it has one."""

    target: Any = None
    drafter: Any = None


class Drafting(Protocol):
    """A drafter at work on one batch.

    Attributes:
        reads_features: whether `observe` needs the target's hidden vectors.
    """

    reads_features: bool

    def calls(self, depth: int) -> int:
        """Forward passes of a model that drafting to this depth takes; 0 when no model is run."""
        ...

    def begin(self) -> Tensor:
        """Law float32 [B, V] of the position after the committed tokens."""
        ...

    def extend(self, draft_BJ: Tensor) -> Tensor:
        """Law float32 [B, V] of the position after J drafts."""
        ...

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        """Laws float32 [B, W, V] behind the nodes from slot `first` on: the tree's last level, all at `depth`."""
        ...

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Takes what the target's pass showed, before the next `begin`.

        start_B: tokens that were committed before the pass; count_B: tokens it committed; features_RLD: the target's
        hidden vectors, row j of which predicted position start + j; None unless reads_features.
        """
        ...


class Drafter(Protocol):
    """Something that can start a drafting."""

    def key(self) -> tuple:
        """What a captured pass depends on beside the target."""
        ...

    def start(self, session: Session, kept: Kept, target: Target) -> Drafting:
        """Opens a drafting.

        Raises:
            ValueError: the drafter does not fit the target.
        """
        ...


def check_fit(drafter: Generator, model: Generator) -> None:
    """Checks that two models speak of the same tokens.

    Raises:
        ValueError: other vocabulary or other grid.
    """
    if "grid" not in drafter.config:
        raise ValueError(f"a {type(drafter).__name__} cannot draft here; the drafter must draw one token a step too")
    ours, theirs = ((m.config["vocab_size"], tuple(m.config["grid"])) for m in (drafter, model))
    if ours != theirs:
        raise ValueError(f"the drafter's vocabulary and grid are {ours}, the generator's {theirs}; they must agree")


def weights_key(module: nn.Module) -> tuple[int, int]:
    """Tells a module, and where its weights are, from others; see Drafter.key."""
    return id(module), hash(tuple(parameter.data_ptr() for parameter in module.parameters()))


class ModelDrafter:
    """A smaller generator of the same tokens drafts (arXiv 2211.17192, 2302.01318).

    It runs with the same condition and guidance as the target, which makes its laws agree better. Expected speed-up:
    (1 - a^(K+1)) / ((1 - a) (K c + 1)) for K drafts, acceptance a and cost ratio c.

    Args:
        generator: of one token a step, with start and verify (and verify_tree for trees).
    """

    def __init__(self, generator: Generator) -> None:
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

    def __init__(self, generator: Generator, own: Any, target: Target) -> None:
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
        return token_law(logits_BV, *self.target.filters)

    def extend(self, draft_BJ: Tensor) -> Tensor:
        return token_law(self.generator.verify(self.own, draft_BJ)[:, -1], *self.target.filters)

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        return token_law(self.generator.verify_tree(self.own, tree)[:, first:], *self.target.filters)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Needs nothing: `begin` reads the committed tokens."""


class NgramDrafter:
    """A free drafter: what followed the same neighbours earlier in the same image.

    The idea is that of arXiv 2407.12021 (n-gram tables learnt while decoding), with the two neighbours of a grid, left
    and above, as the context. Each token of the image so far votes for itself with

        (1 + weight [same left neighbour]) (1 + weight [same upper neighbour])

    and each code has 1 / V votes besides. Image tokens seldom repeat, so expect gains on flat backgrounds only. The
    table belongs to one image, so that an image depends on its own seed only.

    Args:
        weight: >= 0; 0 counts the tokens alone.

    Raises:
        ValueError: negative weight.
    """

    def __init__(self, weight: float = 16.0) -> None:
        if not weight >= 0.0:
            raise ValueError(f"weight {weight}; it must be >= 0")
        self.weight = weight

    def key(self) -> tuple:
        return ("ngram", self.weight)

    def start(self, session: Session, kept: Kept, target: Target) -> "NgramDrafting":
        return NgramDrafting(target, self.weight)


class NgramDrafting:
    """Votes of the committed tokens and of the drafts so far."""

    reads_features = False

    def __init__(self, target: Target, weight: float) -> None:
        self.vocab_size, self.columns = target.model.config["vocab_size"], target.model.config["grid"][1]
        self.num_tokens, self.state, self.weight = target.model.num_tokens, target.state, weight
        self.fused = kernels.available(self.state.tokens.device) and self.vocab_size <= kernels.MAX_CODES

    def calls(self, depth: int) -> int:
        return 0

    def _neighbours(self, tokens_BT: Tensor, position_BX: Tensor) -> tuple[Tensor, Tensor]:
        """Left and upper neighbours' tokens, int64 [B, X]; V where there is none."""
        left_BX = tokens_BT.gather(1, (position_BX - 1).clamp(min=0))
        above_BX = tokens_BT.gather(1, (position_BX - self.columns).clamp(min=0))
        left_BX = torch.where(position_BX % self.columns == 0, self.vocab_size, left_BX)
        return left_BX, torch.where(position_BX < self.columns, self.vocab_size, above_BX)

    def _law(self, draft_BJ: Tensor) -> Tensor:
        length_B1, drafts = self.state.length[:, None], draft_BJ.shape[1]
        slot = torch.arange(drafts, device=draft_BJ.device)
        tokens_BT = self.state.tokens.scatter(1, length_B1 + slot, draft_BJ)
        every_BN = torch.arange(self.num_tokens, device=tokens_BT.device).expand(len(tokens_BT), -1)
        here_B1 = (length_B1 + drafts).clamp(max=self.num_tokens - 1)
        left_BN, above_BN = self._neighbours(tokens_BT, every_BN)
        left_B1, above_B1 = self._neighbours(tokens_BT, here_B1)
        vote_BN = (1.0 + self.weight * (left_BN == left_B1)) * (1.0 + self.weight * (above_BN == above_B1))
        vote_BN = vote_BN * (every_BN < here_B1)
        votes_BV = torch.zeros(len(tokens_BT), self.vocab_size, device=tokens_BT.device)
        votes_BV = votes_BV.scatter_add(1, tokens_BT[:, : self.num_tokens], vote_BN) + 1.0 / self.vocab_size
        return votes_BV / votes_BV.sum(-1, keepdim=True)

    def _by_kernel(self, draft_BM: Tensor, parents_BM: Tensor | None, first: int, nodes: int, depth: int) -> Tensor:
        """Laws [B, W, V] behind W nodes, or behind a chain, in one launch."""
        from visar.kernels.ngram import ngram_laws

        with kernels.on(draft_BM.device):
            return ngram_laws(
                self.state.tokens,
                self.state.length,
                draft_BM,
                parents_BM,
                first=first,
                nodes=nodes,
                depth=depth,
                num_tokens=self.num_tokens,
                columns=self.columns,
                vocab_size=self.vocab_size,
                weight=self.weight,
            )

    def begin(self) -> Tensor:
        return self.extend(self.state.tokens[:, :0])

    def extend(self, draft_BJ: Tensor) -> Tensor:
        if self.fused:
            return self._by_kernel(draft_BJ, None, 0, 1, draft_BJ.shape[1])[:, 0]
        return self._law(draft_BJ)

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        if self.fused:
            return self._by_kernel(tree.tokens_BM, tree.parents_BM, first, tree.num_nodes + 1 - first, depth)
        laws = []
        for slot in range(first, tree.num_nodes + 1):
            # A node's ancestors have rising slots, so its seen slots in order are the path to it.
            path_BJ = tree.seen_BLL[:, slot, 1:].float().topk(depth, dim=1).indices.sort(dim=1).values
            laws.append(self._law(tree.tokens_BM.gather(1, path_BJ)))
        return torch.stack(laws, dim=1)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Needs nothing: the votes are those of the committed tokens."""
