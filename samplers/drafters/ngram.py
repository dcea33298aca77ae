"""A drafter without weights: votes of the tokens that an image has so far.

B batch, J drafts so far, M nodes, W nodes of a level, V codes, N tokens, T positions with slack.
"""

import torch
from torch import Tensor

from visar import kernels
from visar.core.runtime import Session
from visar.core.window import DraftTree
from visar.samplers.drafters.interface import Kept, Target


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
        self.vocab_size, self.columns = target.model.config["vocab_size"], target.model.config["grid"][-1]
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

    def _probs(self, draft_BJ: Tensor) -> Tensor:
        length_B1, drafts = self.state.length[:, None], draft_BJ.shape[1]
        slot = torch.arange(drafts, device=draft_BJ.device)
        tokens_BT = self.state.tokens.scatter(1, length_B1 + slot, draft_BJ)
        every_BN = torch.arange(self.num_tokens, device=tokens_BT.device).expand(len(tokens_BT), -1)
        here_B1 = (length_B1 + drafts).clamp(max=self.num_tokens - 1)
        left_BN, above_BN = self._neighbours(tokens_BT, every_BN)
        left_B1, above_B1 = self._neighbours(tokens_BT, here_B1)
        same_left_BN, same_above_BN = (left_BN == left_B1).float(), (above_BN == above_B1).float()
        vote_BN = (1.0 + self.weight * same_left_BN) * (1.0 + self.weight * same_above_BN)
        vote_BN = vote_BN * (every_BN < here_B1)
        votes_BV = torch.zeros(len(tokens_BT), self.vocab_size, dtype=torch.float32, device=tokens_BT.device)
        votes_BV = votes_BV.scatter_add(1, tokens_BT[:, : self.num_tokens], vote_BN) + 1.0 / self.vocab_size
        return votes_BV / votes_BV.sum(-1, keepdim=True)

    def _by_kernel(self, draft_BM: Tensor, parents_BM: Tensor | None, first: int, nodes: int, depth: int) -> Tensor:
        """Distributions [B, W, V] behind W nodes, or behind a chain, in one launch."""
        from visar.kernels.ngram import ngram_probs

        with kernels.on(draft_BM.device):
            return ngram_probs(
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
        return self._probs(draft_BJ)

    def extend_tree(self, tree: DraftTree, first: int, depth: int) -> Tensor:
        if self.fused:
            return self._by_kernel(tree.tokens_BM, tree.parents_BM, first, tree.num_nodes + 1 - first, depth)
        probs = []
        for slot in range(first, tree.num_nodes + 1):
            # A node's ancestors have rising slots, so its seen slots in order are the path to it.
            path_BJ = tree.seen_BLL[:, slot, 1:].float().topk(depth, dim=1).indices.sort(dim=1).values
            probs.append(self._probs(tree.tokens_BM.gather(1, path_BJ)))
        return torch.stack(probs, dim=1)

    def observe(self, start_B: Tensor, features_RLD: Tensor | None, count_B: Tensor) -> None:
        """Needs nothing: the votes are those of the committed tokens."""
