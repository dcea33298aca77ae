"""Mixture head: a token's distribution is a mixture of Gaussians with diagonal covariances, in closed form.

Source: GIVT, arXiv 2312.02116 section 3.2; DiCoDe, arXiv 2412.04446, has such a head for video. One pass a token; the
density is known, so that bits per dimension and exact accept / reject are too.

C numbers of a token, D hidden size, K components.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from visar.layers.heads.chain import Head


class MixtureHead(Head):
    """Mixture of K diagonal Gaussians whose parameters are linear in the hidden vector. GIVT, arXiv 2312.02116.

    Its chain is one transition: the first number of the first point chooses the component, through the normal
    distribution's integral.

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
    takes_guidance = False

    def __init__(
        self, channels: int, hidden_size: int, components: int = 16, floor: float = 1e-3, top_p: float = 1.0
    ) -> None:
        super().__init__()
        if components < 1 or floor <= 0 or not 0 < top_p <= 1:
            raise ValueError(f"components {components}, floor {floor}, top_p {top_p}; needed: >= 1, > 0, in (0, 1]")
        self.channels, self.components, self.floor, self.top_p = channels, components, floor, top_p
        self.output = nn.Linear(hidden_size, components * (1 + 2 * channels))

    def check_steps(self, steps: int | None) -> int:
        if steps not in (None, 1):
            raise ValueError(f"head_steps {steps}; a mixture is drawn in 1")
        return 1

    def reset_parameters(self, generator: torch.Generator | None) -> None:
        nn.init.normal_(self.output.weight, std=0.02, generator=generator)
        nn.init.normal_(self.output.bias, std=1.0, generator=generator)  # components must differ to part ways

    def parameters_of(self, features_LD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-weights [..., K], means and standard deviations [..., K, C], float32."""
        values = self.output(features_LD).float()
        logits, rest = values.split((self.components, 2 * self.components * self.channels), dim=-1)
        means, raw = rest.unflatten(-1, (self.components, 2 * self.channels)).chunk(2, dim=-1)
        return functional.log_softmax(logits, dim=-1), means, self.floor + functional.softplus(raw)

    def log_prob(self, features_LD: Tensor, tokens_LC: Tensor) -> Tensor:
        """Log-density of tokens, nats, float32 [...]; without the filter of components."""
        log_weights, means, deviations = self.parameters_of(features_LD)
        distance = ((tokens_LC.float()[..., None, :] - means) / deviations).square().sum(-1)
        constant = self.channels * math.log(2.0 * math.pi)
        each = -0.5 * (distance + constant) - deviations.log().sum(-1)
        return torch.logsumexp(log_weights + each, dim=-1)

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
        assert scale_BL is None, "a mixture takes no guidance"
        log_weights, means, deviations = self.parameters_of(features_RLD)
        weights = self._filtered(log_weights.exp())
        uniform_BL1 = torch.special.ndtr(x_BLC[..., :1].double()).float()
        chosen = (weights.cumsum(-1) < uniform_BL1).sum(-1, keepdim=True).clamp(max=self.components - 1)
        index_BL1C = chosen[..., None].expand(*chosen.shape, self.channels)
        return means.gather(-2, index_BL1C)[..., 0, :], deviations.gather(-2, index_BL1C)[..., 0, :]

    def _filtered(self, weights: Tensor) -> Tensor:
        if self.top_p == 1.0:
            return weights
        ordered, order = weights.sort(dim=-1, descending=True)
        kept = ordered * ((ordered.cumsum(-1) - ordered) < self.top_p)
        kept = torch.zeros_like(weights).scatter(-1, order, kept)
        return kept / kept.sum(-1, keepdim=True)
