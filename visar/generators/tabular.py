"""A generator that is a table: every conditional of a short sequence over a small vocabulary is one row of logits.

It has the interface of a raster generator (start, predict, verify, append, commit, guidance, ragged rows), so every
sampler of one token per step runs on it, and its joint distribution can be written down:
visar/evaluate/exactness.py compares what a sampler draws with it. Nothing is learned; use it to test a sampler or to
see how one works.

B images, R rows (2B when guided), N tokens, K drafted tokens, L positions of one call, V codes.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat
from visar.core.window import DraftTree


@dataclass
class TabularState:
    """Decoding state of a batch.

    Attributes:
        tokens: int64 [B, N + window + 1], the committed ids; the slack takes writes beyond the last position.
        length: int64 [B] committed tokens of every row when ragged, else [1] for all.
        label_R: int64 class of every row.
        scale_N: float32 [N + window + 1] guidance of every position; None when guidance is off.
        block: index of the block about to be predicted, set by the loop; not read here.
    """

    tokens: Tensor
    length: Tensor
    label_R: Tensor
    scale_N: Tensor | None
    block: int = 0

    @property
    def batch(self) -> int:
        """Number of images B."""
        return self.tokens.shape[0]


class TabularGenerator(ModelMixin, ConfigMixin):
    """Random conditional tables, one per class and one for the null class.

    Row offset[n] + (x_0 ... x_{n-1} read as a number in base V, x_0 first) of a class's table holds the logits of
    token n after that prefix, where offset[n] = 1 + V + ... + V^(n-1).

    Args:
        vocab_size: V.
        grid: (rows, columns); N = rows * columns tokens. The table has about V^N entries: keep V^N below 10^6.
        num_classes: classes; the null class has a table of its own.
        sharpness: standard deviation of the random logits.

    Raises:
        ValueError: the table would have more than 10^8 entries.
    """

    quantized_parts = ()

    @register_to_config
    def __init__(
        self, vocab_size: int = 4, grid: tuple[int, int] = (2, 2), num_classes: int = 2, sharpness: float = 1.0
    ) -> None:
        super().__init__()
        self.num_tokens = grid[0] * grid[1]
        powers = [vocab_size**n for n in range(self.num_tokens + 1)]
        if powers[-1] * (num_classes + 1) > 10**8:
            raise ValueError(
                f"vocab_size {vocab_size} and {self.num_tokens} tokens make too large a table; V^N <= 10^8"
            )
        self._offset = [sum(powers[:n]) for n in range(self.num_tokens + 1)]
        self.table = nn.Parameter(torch.randn(num_classes + 1, sum(powers[:-1]), vocab_size) * sharpness)

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens of every block: one each."""
        return (1,) * self.num_tokens

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """All blocks do the same work."""
        return ("token",) * self.num_tokens

    def null_condition(self, condition: Condition) -> Condition:
        """ "No class" for as many images."""
        return Condition(labels_BA=torch.full_like(self._labels(condition), self.config["num_classes"])[:, None])

    def example_condition(self, batch: int) -> Condition:
        """The first class for `batch` images, on the table's device."""
        return Condition(labels_BA=torch.zeros(batch, 1, dtype=torch.int64, device=self.table.device))

    def _labels(self, condition: Condition) -> Tensor:
        condition.check_without_first()
        labels, most = condition.labels_BA, self.config["num_classes"]
        if labels is None or labels.shape[1] != 1:
            raise ValueError("this model is conditioned on labels [B, 1]")
        wrong = labels[(labels < 0) | (labels > most)]
        if wrong.numel():
            raise ValueError(f"label {int(wrong[0])}; allowed: 0 ... {most} (null)")
        return labels[:, 0]

    def _rows(self, tokens_BN: Tensor, most: int) -> Tensor:
        """Table row of the conditional of tokens 0 ... most - 1, int64 [B, most]."""
        code = torch.zeros_like(tokens_BN[:, 0])
        rows = []
        for n in range(most):
            rows.append(code + self._offset[n])
            code = code * self.config["vocab_size"] + tokens_BN[:, n]
        return torch.stack(rows, dim=1)

    def forward(self, tokens_BN: Tensor, condition: Condition) -> Tensor:
        """Teacher-forced logits [B, N, V] of every token given those before it."""
        return self.table[self._labels(condition)[:, None], self._rows(tokens_BN, self.num_tokens)]

    def start(
        self,
        condition: Condition,
        guidance: Guidance = OFF,
        *,
        ragged: bool = False,
        window: int = 0,
        state: TabularState | None = None,
    ) -> TabularState:
        """Decoding state with no token committed; arguments as in RasterGPT.start."""
        guided = guidance.active(self.num_tokens)
        rows = double(condition, self.null_condition(condition)) if guided else condition
        device, length = self.table.device, self.num_tokens + window + 1
        if state is None:
            state = TabularState(
                tokens=torch.zeros(condition.batch, length, dtype=torch.int64, device=device),
                length=torch.zeros(condition.batch if ragged else 1, dtype=torch.int64, device=device),
                label_R=torch.zeros(rows.batch, dtype=torch.int64, device=device),
                scale_N=torch.ones(length, device=device) if guided else None,
            )
        state.tokens.zero_()
        state.length.zero_()
        state.label_R.copy_(self._labels(rows))
        if state.scale_N is not None:
            state.scale_N[: self.num_tokens].copy_(torch.tensor(guidance.scales(self.num_tokens)))
        return state

    def verify(self, state: TabularState, draft_BK: Tensor) -> Tensor:
        """Guided float32 logits [B, K + 1, V].

        Slot j is the conditional of position length + j given the first j drafts; beyond the last token it means
        nothing.
        """
        slot = torch.arange(draft_BK.shape[1] + 1, device=draft_BK.device)
        position = (state.length[:, None] + slot).expand(state.batch, -1)
        tokens = state.tokens.scatter(1, position[:, :-1], draft_BK)
        row = self._rows(tokens, self.num_tokens).gather(1, position.clamp(max=self.num_tokens - 1))
        parts = 1 if state.scale_N is None else 2
        logits = self.table[state.label_R[:, None], repeat(row, parts)]
        return logits.float() if state.scale_N is None else combine(logits, state.scale_N[position][..., None])

    def verify_tree(self, state: TabularState, tree: DraftTree) -> Tensor:
        """Guided float32 logits [B, M + 1, V] of what follows the root and every node."""
        length_B1 = state.length[:, None]
        codes = [(self._rows(state.tokens, self.num_tokens + 1).gather(1, length_B1) - self._start(length_B1))]
        for node in range(tree.num_nodes):
            parent = torch.cat(codes, dim=1).gather(1, tree.parents_BM[:, node, None])
            codes.append(parent * self.config["vocab_size"] + tree.tokens_BM[:, node, None])
        position = length_B1 + tree.place_BL
        inside = position < self.num_tokens
        row = torch.where(inside, torch.cat(codes, dim=1) + self._start(position), 0)
        parts = 1 if state.scale_N is None else 2
        logits = self.table[state.label_R[:, None], repeat(row, parts)]
        return logits.float() if state.scale_N is None else combine(logits, state.scale_N[position][..., None])

    def _start(self, position: Tensor) -> Tensor:
        """First table row of the conditionals of a position."""
        vocab_size = self.config["vocab_size"]
        return (torch.pow(vocab_size, position.clamp(max=self.num_tokens)) - 1) // (vocab_size - 1)

    def predict(self, state: TabularState) -> Tensor:
        """Guided float32 logits [B, 1, V] of the next token."""
        return self.verify(state, state.tokens[:, :0])

    def positions(self, state: TabularState) -> Tensor:
        """Where the next token stands in the tokenizer's order, int64 [1 or B, 1]."""
        return state.length[:, None].clone()

    def result(self, state: TabularState) -> Tensor:
        """The image's tokens int64 [B, N] in the tokenizer's order, 0 where none is committed yet; a view."""
        return state.tokens[:, : self.num_tokens]

    def append(self, state: TabularState, tokens_BK: Tensor) -> None:
        """Commits K tokens to every row."""
        slot = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        state.tokens.scatter_(1, (state.length[:, None] + slot).expand(state.batch, -1), tokens_BK)
        state.length += tokens_BK.shape[1]

    def commit(self, state: TabularState, tokens_BK: Tensor, count_B: Tensor) -> None:
        """Commits the first count_B tokens (0 ... K) of every row of a ragged state, none beyond the last position."""
        slot = torch.arange(tokens_BK.shape[1], device=tokens_BK.device)
        position = (state.length[:, None] + slot).clamp(max=state.tokens.shape[1] - 1)
        state.tokens.scatter_(1, position, tokens_BK)
        state.length.copy_((state.length + count_B).clamp(max=self.num_tokens))

    def commit_path(self, state: TabularState, slots_BK: Tensor, tokens_BL: Tensor, count_B: Tensor) -> None:
        """Commits nodes of a tree and the token after them; arguments as in RasterGPT.commit_path."""
        self.commit(state, tokens_BL, count_B)
