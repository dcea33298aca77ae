"""What a causal model reads in one pass beyond the committed tokens: a chain or a tree of drafted tokens.

Slot 0 is the last committed token; slots 1 ... M are the window's tokens. A slot sees the committed tokens, itself and
the slots that the window says, and stands at a place of its own, which is where its rotary angles are looked up.

B batch, M tokens, L = M + 1 slots.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Window:
    """Tokens, what each of their slots sees of the window, and where it stands.

    Attributes:
        tokens_BM: int64 token of every slot but slot 0.
        seen_BLL: bool; [b, i, j] is True when slot i sees slot j; None: itself and all slots before it, a chain.
        place_BL: int64, how many places every slot stands behind slot 0; None: 0, 1, 2 ..., a chain.
    """

    tokens_BM: Tensor
    seen_BLL: Tensor | None
    place_BL: Tensor | None

    @classmethod
    def chain(cls, tokens_BM: Tensor) -> "Window":
        """Tokens that follow one another."""
        return cls(tokens_BM, None, None)


@dataclass(frozen=True)
class DraftTree(Window):
    """A tree of drafts. A node comes after its parent, sees its ancestors and stands as deep below the root, slot 0.

    Attributes:
        seen_BLL: see Window; place_BL: depth of every slot, 0 for the root.
        parents_BM: int64 slot of every node's parent, 0 ... M; smaller than the node's own slot.
    """

    seen_BLL: Tensor
    place_BL: Tensor
    parents_BM: Tensor

    @classmethod
    def root(cls, batch: int, device: torch.device | str) -> "DraftTree":
        """A tree without nodes."""
        none = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        seen = torch.ones(batch, 1, 1, dtype=torch.bool, device=device)
        return cls(none, seen, torch.zeros(batch, 1, dtype=torch.int64, device=device), none)

    def begun(self, tokens_BM: Tensor, nodes: int) -> "DraftTree":
        """The first nodes of this tree of one row, for every row of tokens."""
        batch = tokens_BM.shape[0]
        return DraftTree(
            tokens_BM[:, :nodes],
            self.seen_BLL[:, : nodes + 1, : nodes + 1].expand(batch, -1, -1),
            self.place_BL[:, : nodes + 1].expand(batch, -1),
            self.parents_BM[:, :nodes].expand(batch, -1),
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
            seen,
            torch.cat([self.place_BL, self.place_BL.gather(1, parents_BW) + 1], dim=1),
            torch.cat([self.parents_BM, parents_BW], dim=1),
        )

    @classmethod
    def from_parents(cls, tokens_BM: Tensor, parents_BM: Tensor) -> "DraftTree":
        """A tree from its nodes' parents, which may differ from row to row."""
        batch, nodes = tokens_BM.shape
        line = torch.zeros(batch, nodes + 1, nodes + 1, dtype=torch.float32, device=tokens_BM.device)
        line[:, 1:].scatter_(2, parents_BM[..., None], 1.0)
        line = line + torch.eye(nodes + 1, device=tokens_BM.device)
        for _ in range(max(nodes.bit_length(), 1)):
            # Squaring a relation doubles the number of generations that it spans.
            line = (line @ line).clamp(max=1.0)
        seen = line > 0
        return cls(tokens_BM, seen, seen.sum(-1) - 1, parents_BM)
