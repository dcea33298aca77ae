"""Proofs by enumeration: does a sampler draw from the distribution it claims?

On a model whose sequences can all be listed (visar/generators/tabular.py, or a tiny transformer) the joint
distribution of ancestral sampling is a table. A sampler's draws are compared with it in three ways: total variation
distance against the distance that as many perfect draws show (a simulated floor), and chi-squared tests of the joint,
of every position and of every adjacent pair, corrected for their number (Holm, 1979).

N tokens, V codes, J = V^N sequences.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.samplers.filtering import filter_logits


def all_sequences(vocab_size: int, num_tokens: int) -> Tensor:
    """Every sequence, int64 [J, N], in lexicographic order."""
    return torch.cartesian_prod(*[torch.arange(vocab_size)] * num_tokens).view(-1, num_tokens)


@torch.no_grad()
def joint_distribution(model: Any, condition: Condition, guidance: Guidance = OFF, **filters: Any) -> Tensor:
    """Probability float64 [J] of every sequence of an enumerable model under ancestral sampling, by teacher forcing.

    Args:
        model: with forward(tokens, condition), null_condition, num_tokens and a vocab_size in its configuration.
        condition: of one image.
        guidance, filters: what the sampler is given (temperature, top_k, top_p).
    """
    sequences = all_sequences(model.config["vocab_size"], model.num_tokens).to(condition_device(condition))
    many = condition.rows(torch.zeros(len(sequences), dtype=torch.int64))
    logits = model(sequences, many).float()
    if guidance.active(model.num_tokens):
        null = model(sequences, model.null_condition(many)).float()
        scale = torch.tensor(guidance.scales(model.num_tokens), device=logits.device)
        logits = null + (logits - null) * scale[:, None]
    probs = torch.softmax(filter_logits(logits, **filters).double(), dim=-1)
    return probs.gather(-1, sequences[..., None]).squeeze(-1).prod(-1)


def condition_device(condition: Condition) -> torch.device:
    """Where a condition's tensors are."""
    return next(value.device for value in vars(condition).values() if value is not None)


def count_sequences(tokens_BN: Tensor, vocab_size: int) -> Tensor:
    """How often each of the J sequences occurs, float64 [J]."""
    num_tokens = tokens_BN.shape[1]
    place = vocab_size ** torch.arange(num_tokens - 1, -1, -1, device=tokens_BN.device)
    return torch.bincount((tokens_BN * place).sum(-1), minlength=vocab_size**num_tokens).double()


def total_variation(first: Tensor, second: Tensor) -> Tensor:
    """Half the L1 distance of two distributions along the last axis."""
    return (first - second).abs().sum(-1) / 2


def noise_floor(probs_J: Tensor, num_draws: int, deviations: float = 5.0, repeats: int = 200, seed: int = 0) -> float:
    """Total variation distance that `num_draws` perfect draws show at most: mean + 5 standard deviations, simulated.

    The distance is nearly normal (skewed where few sequences have most of the mass), so that wrong alarms are rare.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.poisson((probs_J.cpu() * num_draws).expand(repeats, -1), generator=generator)
    distance = total_variation(counts / counts.sum(-1, keepdim=True), probs_J.cpu())
    return float(distance.mean() + deviations * distance.std())


def chi_squared(counts: Tensor, probs: Tensor, pool_below: float = 5.0) -> float:
    """p-value of Pearson's test; cells with fewer than `pool_below` expected counts become one. 0.0 if a cell of no
    probability was seen."""
    if bool((counts[probs == 0] > 0).any()):
        return 0.0
    expected = probs * counts.sum()
    rare = expected < pool_below
    observed = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    if expected[-1] < pool_below:
        observed, expected = observed[:-1], expected[:-1]
    freedom = len(expected) - 1
    if freedom < 1:
        return 1.0
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor(freedom / 2, dtype=torch.float64), statistic.cpu() / 2))


def holm(p_values: list[float]) -> float:
    """Smallest p-value after Holm's correction, which for the smallest is Bonferroni's."""
    return min(1.0, min(p_values) * len(p_values))


@dataclass(frozen=True)
class DistributionCheck:
    """Outcome of a comparison.

    Attributes:
        distance: total variation distance between the draws' joint and the distribution.
        floor: what perfect draws show at most, see `noise_floor`.
        p_value: smallest of the chi-squared tests, corrected for their number.
        num_draws: draws compared.
    """

    distance: float
    floor: float
    p_value: float
    num_draws: int

    @property
    def passed(self) -> bool:
        """Whether the draws are compatible with the distribution (about one wrong alarm in 20 000)."""
        return self.distance <= self.floor and self.p_value >= 3e-5


def check_distribution(tokens_BN: Tensor, probs_J: Tensor, vocab_size: int) -> DistributionCheck:
    """Compares draws, int64 [B, N], with the joint distribution of `joint_distribution`.

    Raises:
        ValueError: the distribution has another number of sequences.
    """
    num_draws, num_tokens = tokens_BN.shape
    if probs_J.numel() != vocab_size**num_tokens:
        raise ValueError(f"{probs_J.numel()} probabilities for {vocab_size}^{num_tokens} sequences")
    probs_J, counts_J = probs_J.cpu(), count_sequences(tokens_BN, vocab_size).cpu()
    shape = (vocab_size,) * num_tokens
    probs, counts = probs_J.view(shape), counts_J.view(shape)
    marginals = [(n,) for n in range(num_tokens)] + list(itertools.pairwise(range(num_tokens)))
    p_values = [chi_squared(counts_J, probs_J)]
    for axes in marginals:
        others = [n for n in range(num_tokens) if n not in axes]
        some_counts, some_probs = (counts.sum(others), probs.sum(others)) if others else (counts, probs)
        p_values.append(chi_squared(some_counts.flatten(), some_probs.flatten()))
    return DistributionCheck(
        distance=float(total_variation(counts_J / num_draws, probs_J)),
        floor=noise_floor(probs_J, num_draws),
        p_value=holm(p_values),
        num_draws=num_draws,
    )


def position_distances(tokens_BN: Tensor, probs_J: Tensor, vocab_size: int) -> list[float]:
    """Total variation distance of every position's marginal from the distribution's: what a lossy sampler changes."""
    num_tokens = tokens_BN.shape[1]
    probs = probs_J.cpu().view((vocab_size,) * num_tokens)
    distances = []
    for n in range(num_tokens):
        others = [m for m in range(num_tokens) if m != n]
        marginal = probs.sum(others) if others else probs
        seen = torch.bincount(tokens_BN[:, n].cpu(), minlength=vocab_size).double() / len(tokens_BN)
        distances.append(float(total_variation(seen, marginal)))
    return distances
