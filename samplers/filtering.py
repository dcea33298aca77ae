"""Temperature, top-k, top-p and the draw of a token: what turns logits into the distribution that is sampled.

Order: temperature, then top-k, then top-p on what top-k left (FoundationVision/LlamaGen@ce98ec4,
autoregressive/models/generate.py). B batch, L positions, V codes.
"""

from numbers import Integral, Real

import torch
from torch import Tensor
from torch.nn import functional

from visar import kernels
from visar.kernels import finite


def check_filters(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> None:
    """Checks sampling settings.

    Raises:
        ValueError: temperature not positive, top_k negative or not whole, top_p outside (0, 1].
    """
    if not isinstance(temperature, Real) or not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature {temperature}; it must be a finite number > 0 (1.0 = off; top_k=1 is greedy)")
    if not isinstance(top_k, Integral) or top_k < 0:
        raise ValueError(f"top_k {top_k!r}; it must be a whole number >= 0 (0 = off)")
    if not isinstance(top_p, Real) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p {top_p}; it must be in (0, 1] (1.0 = off)")


def filter_logits(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [..., V] with the excluded codes at -inf and the others unchanged but for the temperature.

    Args:
        temperature: divides the logits; 1.0 = off.
        top_k: keeps the k largest, and all that tie with the k-th; 0 = off.
        top_p: keeps the fewest most likely codes whose probabilities reach p (up to a millionth, which is what sums
            round to), and ties with the last; the most likely code always stays; 1.0 = off. Codes that tie exactly at
            the edge all stay, so that the result does not depend on how a sort orders them:
            FoundationVision/VAR@78b9539 keeps only as many of them as p needs, and
            FoundationVision/LlamaGen@ce98ec4 one code more where probabilities add up to p exactly.
    """
    if (top_k or top_p < 1.0) and fits_kernels(logits):
        from visar.kernels.draw import filter_codes

        with kernels.on(logits.device):
            return filter_codes(logits.flatten(0, -2).contiguous(), temperature, top_k, top_p).view(logits.shape)
    if temperature != 1.0:
        logits = logits / temperature
    top_k = min(top_k, logits.shape[-1])
    if top_k:
        largest = torch.topk(logits, top_k, dim=-1).values
        logits = logits.masked_fill(logits < largest[..., -1:], float("-inf"))
    if top_p < 1.0:
        ordered = largest if top_k else torch.sort(logits, dim=-1, descending=True).values
        probability = torch.exp(ordered - torch.logsumexp(logits, dim=-1, keepdim=True))
        before = functional.pad(probability.cumsum(-1)[..., :-1], (1, 0))
        beyond = (before >= top_p * kernels.REACHED) & (before > 0)
        cut = ordered.masked_fill(beyond, float("inf")).amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < cut, float("-inf"))
    return logits


def fits_kernels(logits: Tensor) -> bool:
    """Whether kernels that hold a whole distribution (visar/kernels/distributions.py) take such logits or probs."""
    fits = logits.dtype == torch.float32 and logits.dim() > 1 and logits.shape[-1] <= kernels.MAX_CODES
    return fits and not logits.requires_grad and kernels.usable(logits)


_BLOCK = 128


def _invert(mass: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """First cell with positive mass whose cumulative mass exceeds the threshold (the last positive one if none does).

    A cell of no mass is never chosen: not even where rounding makes the cumulative sums uneven.

    Returns: int64 [...] cells, and the cumulative mass before every cell.
    """
    cumulative = mass.cumsum(-1)
    # Ranks: cells beyond the threshold, the first highest; below them the others, the last highest; no mass is 0.
    place = torch.arange(1, mass.shape[-1] + 1, device=mass.device)
    rank = torch.where(cumulative > threshold[..., None], 2 * mass.shape[-1] + 1 - place, place) * (mass > 0)
    return rank.argmax(-1), cumulative - mass


def draw(mass: Tensor, uniform: Tensor) -> Tensor:
    """Draws codes in proportion to `mass` by inverting the distribution function, in blocks and then inside the block.

    Two short sums instead of a long one keep float32 accurate, and the result the same on every run of a GPU.

    Args:
        mass: float32 [..., V] >= 0, with a positive sum (it need not be 1).
        uniform: float32 [...] in (0, 1).

    Returns: int64 [...]; a code of no mass is never drawn.
    """
    if fits_kernels(mass) and uniform.shape == mass.shape[:-1]:
        from visar.kernels.draw import draw_mass

        with kernels.on(mass.device):
            return draw_mass(mass, uniform)
    if mass.shape[-1] <= _BLOCK:
        return _invert(mass, uniform * mass.sum(-1))[0]
    padded = functional.pad(mass, (0, -mass.shape[-1] % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    blocks = padded.sum(-1)
    threshold = uniform * blocks.sum(-1)
    block, before = _invert(blocks, threshold)
    rest = threshold - before.gather(-1, block[..., None]).squeeze(-1)
    chosen = padded.gather(-2, block[..., None, None].expand(*block.shape, 1, _BLOCK)).squeeze(-2)
    return block * _BLOCK + _invert(chosen, rest)[0]


def categorical(logits: Tensor, uniform: Tensor) -> Tensor:
    """Codes int64 [...] drawn from softmax(logits), float32 [..., V], -inf never; uniform [...] is in (0, 1)."""
    return draw(torch.softmax(logits, dim=-1), uniform)


def sample_logits(
    logits: Tensor, uniform: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Codes int64 [...] drawn from softmax(filter_logits(logits)), logits float32 [..., V], uniform [...] in (0, 1).

    On a GPU one kernel does it; its sums are rounded in another order, so that a uniform number within rounding of the
    border between two codes may fall to the other.
    """
    if not fits_kernels(logits):
        filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        finite.note(filtered)
        return categorical(filtered, uniform)
    from visar.kernels.draw import draw_codes

    with kernels.on(logits.device):
        uniform_M = uniform.reshape(-1).contiguous()
        codes_M = draw_codes(logits.flatten(0, -2).contiguous(), uniform_M, temperature, top_k, top_p)
    return codes_M.view(uniform.shape)


def filtered_probs(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """The distribution that is sampled, float32 [..., V]: filtered logits made probabilities."""
    logits = logits.float()
    if fits_kernels(logits):
        from visar.kernels.draw import probs_of

        with kernels.on(logits.device):
            return probs_of(logits, temperature, top_k, top_p)
    filtered = filter_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    finite.note(filtered)
    return torch.softmax(filtered, dim=-1)
