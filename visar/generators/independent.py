"""Independent tokens: each drawn by how often a code stands at its position, in one pass. A baseline.

Source: Distilled Decoding, arXiv 2412.17153, the one-step baseline of its tables: what a model that draws all tokens
at once without noise as its input learns at best. The condition is not looked at.

B images, N tokens, V codes.
"""

from dataclasses import dataclass

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.layers.conditioning import example_condition


@dataclass
class IndependentState:
    """The tokens int64 [B, N], 0 before they are drawn; block: set by the loop, not read here."""

    tokens: Tensor
    block: int = 0


class IndependentGenerator(ModelMixin, ConfigMixin):
    """A table of log-frequencies, [N, V]; its only block is the image.

    Args:
        num_tokens: N.
        vocab_size: V.
        num_classes, attributes, word_vocab_size: of the conditions that it takes and does not look at.
    """

    quantized_parts = ()
    read_once_per_block = ()

    @register_to_config
    def __init__(
        self,
        num_tokens: int = 256,
        vocab_size: int = 16384,
        num_classes: int = 1000,
        attributes: tuple[int, ...] = (),
        word_vocab_size: int = 0,
    ) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.log_probs = nn.Parameter(torch.zeros(num_tokens, vocab_size), requires_grad=False)

    @torch.no_grad()
    def set_counts(self, counts_NV: Tensor) -> None:
        """Takes over how often every code stands at every position; codes that never do are never drawn."""
        self.log_probs.copy_((counts_NV.double() / counts_NV.sum(1, keepdim=True)).log())

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """One block: all tokens."""
        return (self.num_tokens,)

    @property
    def block_kinds(self) -> tuple[str, ...]:
        """One kind."""
        return ("image",)

    def cache_bytes(self, rows: int, positions: int | None = None) -> int:
        """Keys and values: none."""
        return 0

    def null_condition(self, condition: Condition) -> Condition:
        """The condition itself: it changes nothing."""
        return condition

    def example_condition(self, batch: int) -> Condition:
        """Some condition for `batch` images, on the table's device."""
        return example_condition(self.config, batch).to(self.device)

    def start(
        self, condition: Condition, guidance: Guidance = OFF, *, state: IndependentState | None = None
    ) -> IndependentState:
        """Decoding state with no token drawn.

        Raises:
            ValueError: guidance, or first tokens.
        """
        condition.check_without_first()
        if guidance.active(1):
            raise ValueError(
                f"guidance_scale {guidance.scale}; tokens that no condition changes take none, leave it at 1"
            )
        if state is None:
            shape = (condition.batch, self.num_tokens)
            state = IndependentState(torch.zeros(shape, dtype=torch.int64, device=self.log_probs.device))
        state.tokens.zero_()
        return state

    def predict(self, state: IndependentState) -> Tensor:
        """float32 logits [B, N, V]: the same of every image."""
        return self.log_probs.float().expand(len(state.tokens), -1, -1)

    def positions(self, state: IndependentState) -> Tensor:
        """Where the tokens stand in the tokenizer's order, int64 [1, N]."""
        return torch.arange(self.num_tokens, device=state.tokens.device)[None]

    def append(self, state: IndependentState, tokens_BL: Tensor) -> None:
        """Commits all tokens."""
        state.tokens.copy_(tokens_BL)

    def result(self, state: IndependentState) -> Tensor:
        """The image's tokens int64 [B, N]; a view."""
        return state.tokens
