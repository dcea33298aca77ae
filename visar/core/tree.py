"""A tree of drafted tokens that a causal model reads in one pass.

Slot 0 is the root, the last committed token; slots 1 ... M are the nodes, each after its parent. A node sees the
committed tokens, its ancestors and itself; it stands at the position of its depth below the root.

B batch, M nodes, L = M + 1 slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class DraftTree:
    """Drafted tokens and who comes after whom.

    Attributes:
        tokens_BM: int64 token of every node.
        parents_BM: int64 slot of every node's parent, 0 ... M; smaller than the node's own slot.
        depth_BL: int64 depth of every slot; 0 for the root.
        seen_BLL: bool; [b, i, j] is True when slot j is slot i or one of its ancestors.
    """

    tokens_BM: Tensor
    parents_BM: Tensor
    depth_BL: Tensor
    seen_BLL: Tensor

    @classmethod
    def root(cls, batch: int, device: torch.device | str) -> "DraftTree":
        """A tree without nodes."""
        none = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        seen = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)
        return cls(none, none, torch.zeros(batch, 1, dtype=torch.int64, device=device), seen)

    def begun(self, tokens_BM: Tensor, nodes: int) -> "DraftTree":
        """The first nodes of this tree of one row, for every row of tokens."""
        batch = tokens_BM.shape[0]
        return DraftTree(
            tokens_BM[:, :nodes],
            self.parents_BM[:, :nodes].expand(batch, -1),
            self.depth_BL[:, : nodes + 1].expand(batch, -1),
            self.seen_BLL[:, : nodes + 1, : nodes + 1].expand(batch, -1, -1),
        )

    @property
    def num_nodes(self) -> int:
        """M."""
        return self.tokens_BM.shape[1]

    def grown(self, tokens_BW: Tensor, parents_BW: Tensor) -> "DraftTree":
        """The tree with W more nodes, whose parents are slots of this one."""
        new = tokens_BW.shape[1]
        first = self.num_nodes + 1
        lines_BWL = self.seen_BLL.gather(1, parents_BW[..., None].expand(-1, -1, first))
        itself_BWW = torch.eye(new, dtype=torch.bool, device=tokens_BW.device).expand(len(tokens_BW), -1, -1)
        seen = torch.cat([functional.pad(self.seen_BLL, (0, new)), torch.cat([lines_BWL, itself_BWW], dim=2)], dim=1)
        return DraftTree(
            torch.cat([self.tokens_BM, tokens_BW], dim=1),
            torch.cat([self.parents_BM, parents_BW], dim=1),
            torch.cat([self.depth_BL, self.depth_BL.gather(1, parents_BW) + 1], dim=1),
            seen,
        )

    @classmethod
    def from_parents(cls, tokens_BM: Tensor, parents_BM: Tensor) -> "DraftTree":
        """A tree from its nodes' parents, which may differ from row to row."""
        batch, nodes = tokens_BM.shape
        line = torch.zeros(batch, nodes + 1, nodes + 1, device=tokens_BM.device)
        line[:, 1:].scatter_(2, parents_BM[..., None], 1.0)
        line = line + torch.eye(nodes + 1, device=tokens_BM.device)
        for _ in range(max(nodes.bit_length(), 1)):
            # Squaring a relation doubles the number of generations that it spans.
            line = (line @ line).clamp(max=1.0)
        seen = line > 0
        return cls(tokens_BM, parents_BM, seen.sum(-1) - 1, seen)
