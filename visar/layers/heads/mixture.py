"""Mixture head: a token's distribution is a mixture of Gaussians with diagonal covariances, in closed form.

Source: GIVT, arXiv 2312.02116 section 3.2; DiCoDe, arXiv 2412.04446, has such a head for video. One pass a token; the
density is known, so that bits per dimension and exact accept / reject are too.

C numbers of a token, D hidden size, K components.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.layers.heads.chain import Head, guided


@dataclass(frozen=True)
class MixtureLaw:
    """Mixtures of diagonal Gaussians, float32.

    Attributes:
        log_weights: of the components, [..., K]; -inf for those that are never drawn.
        means, deviations: [..., K, C].
    """

    log_weights: Tensor
    means: Tensor
    deviations: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "MixtureLaw":
        """The law with every tensor changed."""
        return MixtureLaw(change(self.log_weights), change(self.means), change(self.deviations))

    @staticmethod
    def concatenate(laws: list["MixtureLaw"]) -> "MixtureLaw":
        """Laws [B, L, ...] of as many components one after the other along axis 1."""
        return MixtureLaw(*(torch.cat([getattr(law, name) for law in laws], dim=1) for name in FIELDS))

    def log_prob(self, tokens: Tensor) -> Tensor:
        """Log-density of tokens [..., C], nats, float32 [...]."""
        distance = ((tokens.float()[..., None, :] - self.means) / self.deviations).square().sum(-1)
        constant = tokens.shape[-1] * math.log(2.0 * math.pi)
        each = -0.5 * (distance + constant) - self.deviations.log().sum(-1)
        return torch.logsumexp(self.log_weights + each, dim=-1)

    def chosen(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [..., C] of the component that a standard normal [...] chooses, through its integral."""
        uniform = torch.special.ndtr(first.double()).float()
        weights = self.log_weights.exp()
        below = (weights.cumsum(-1) < uniform[..., None]).sum(-1)
        # Never a component without weight, whatever the sum of the weights rounds to.
        last = torch.where(weights > 0, torch.arange(weights.shape[-1], device=first.device), 0).amax(-1)
        index = torch.minimum(below, last)[..., None, None].expand(*below.shape, 1, self.means.shape[-1])
        shape = (*below.shape, *self.means.shape[-2:])
        mean, deviation = (each.expand(shape).gather(-2, index)[..., 0, :] for each in (self.means, self.deviations))
        return mean, deviation

    def draw(self, first: Tensor, normal: Tensor) -> Tensor:
        """Tokens [..., C] of standard normals [...], for the component, and [..., C]."""
        mean, deviation = self.chosen(first)
        return mean + deviation * normal


FIELDS = tuple(field.name for field in fields(MixtureLaw))


class MixtureHead(Head):
    """Mixture of K diagonal Gaussians whose parameters are linear in the hidden vector. GIVT, arXiv 2312.02116.

    Its chain is one transition: the first number of the first point chooses the component, through the normal
    distribution's integral. Guidance is linear in the parameters, that is in the hidden vectors, so that what is drawn
    has a closed form too; GIVT guides densities, which has none.

    Args:
        channels: C.
        hidden_size: D.
        components: K (GIVT: 16).
        floor: smallest standard deviation.
        top_p: components outside the likeliest that make up this share are never drawn; 1.0 = off, and lossy below.

    Raises:
        ValueError: a number outside its range.
    """

    steps = 1

    def __init__(
        self, channels: int, hidden_size: int, components: int = 16, floor: float = 1e-3, top_p: float = 1.0
    ) -> None:
        super().__init__()
        if components < 1 or floor <= 0 or not 0 < top_p <= 1:
            raise ValueError(f"components {components}, floor {floor}, top_p {top_p}; needed: >= 1, > 0, in (0, 1]")
        self.channels, self.components, self.floor, self.top_p = channels, components, floor, top_p
        self.output = nn.Linear(hidden_size, components * (1 + 2 * channels))

    def check_steps(self, steps: int | None, solver: str | None = None) -> int:
        self.check_solver(solver)
        if steps not in (None, 1):
            raise ValueError(f"head_steps {steps}; a mixture is drawn in 1")
        return 1

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.output.weight, std=0.02, generator=generator)
        nn.init.normal_(self.output.bias, std=1.0, generator=generator)  # components must differ to part ways

    def parameters_of(self, features_LD: Tensor, scale_BL: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights [..., K], means and standard deviations [..., K, C], float32; guided where there is a scale."""
        values = guided(self.output(features_LD), scale_BL)
        logits, rest = values.split((self.components, 2 * self.components * self.channels), dim=-1)
        means, raw = rest.unflatten(-1, (self.components, 2 * self.channels)).chunk(2, dim=-1)
        return functional.log_softmax(logits, dim=-1), means, self.floor + functional.softplus(raw)

    def log_prob(self, features_LD: Tensor, tokens_LC: Tensor) -> Tensor:
        """Log-density of tokens, nats, float32 [...]; without the filter of components."""
        log_weights, means, deviations = self.parameters_of(features_LD)
        return MixtureLaw(log_weights, means, deviations).log_prob(tokens_LC)

    def law(self, features_RLD: Tensor, *, temperature: float = 1.0, scale_BL: Tensor | None = None) -> MixtureLaw:
        """What `draw` draws from with the same arguments; components that top_p leaves out have no weight."""
        log_weights, means, deviations = self.parameters_of(features_RLD, scale_BL)
        return MixtureLaw(self._filtered(log_weights), means, temperature * deviations)

    def loss(self, features_LD: Tensor, tokens_LC: Tensor, random: torch.Generator) -> Tensor:
        return -self.log_prob(features_LD, tokens_LC)

    def transition(
        self,
        x_BLC: Tensor,
        index: int,
        features_RLD: Tensor,
        *,
        steps: int | None = None,
        scale_BL: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | float]:
        return self.law(features_RLD, scale_BL=scale_BL).chosen(x_BLC[..., 0])

    def _filtered(self, log_weights: Tensor) -> Tensor:
        if self.top_p == 1.0:
            return log_weights
        weights = log_weights.exp()
        ordered, order = weights.sort(dim=-1, descending=True)
        kept = ordered * ((ordered.cumsum(-1) - ordered) < self.top_p)
        kept = torch.zeros_like(weights).scatter(-1, order, kept)
        return (kept / kept.sum(-1, keepdim=True)).log()
