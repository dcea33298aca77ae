"""Grouped speculative decoding: a draft stands for the codes that are as likely and look alike. Lossy.

Source: GSD, arXiv 2508.07747 (junhyukso/GSD@4216c7c); it is speculative Jacobi decoding with another acceptance rule.
A draft x is accepted with probability min(1, p(C) / q(C)) for a group C of codes around x; what is accepted is x
itself. So inside a group the proportions of q survive, and the distribution changes. The bound for one draft: the
total variation distance of its token's distribution from p is at most E_q |f - min(1, p / q)|, where f is the chance
of accepting it.

B batch, K drafts, V codes, G codes of a group, C code width.
"""

from typing import Literal

import torch
from torch import Tensor

from visar.core.checks import CODES, check_range
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Callback, Windowed
from visar.core.noise import Noise
from visar.core.output import SampleOutput
from visar.core.runtime import EAGER, Runtime
from visar.samplers.jacobi import check_jacobi, run_jacobi
from visar.samplers.jacobi_drafts import Initial
from visar.samplers.stages import in_stages


def group_members(
    p_BKV: Tensor,
    draft_BK: Tensor,
    codebook_VC: Tensor | None,
    *,
    below: int,
    above: int,
    max_gap: float,
    max_distance: float,
) -> tuple[Tensor, Tensor]:
    """Codes of the group of each draft, int64 [B, K, G], and bool [B, K, G] of those that belong to it.

    The draft, the `below` codes next below it in the order of p and the `above` next above, as far as there are any,
    without those whose probability differs by `max_gap` or more or whose code vectors are `max_distance` (squared) or
    more away. A draft among the `below` least likely codes stands alone, as in the released code.
    """
    order_BKV = p_BKV.argsort(dim=-1, stable=True)
    rank_BK1 = (order_BKV == draft_BK[..., None]).int().argmax(-1, keepdim=True)
    rank_BKG = rank_BK1 + torch.arange(-below, above + 1, device=p_BKV.device)
    vocab_size = p_BKV.shape[-1]
    codes_BKG = order_BKV.gather(-1, rank_BKG.clamp(0, vocab_size - 1))
    member_BKG = (rank_BK1 >= below) & (rank_BKG < vocab_size)
    gap_BKG = (p_BKV.gather(-1, codes_BKG) - p_BKV.gather(-1, draft_BK[..., None])).abs()
    member_BKG = member_BKG & (gap_BKG < max_gap)
    if codebook_VC is not None:
        apart_BKGC = codebook_VC[codes_BKG] - codebook_VC[draft_BK][..., None, :]
        member_BKG = member_BKG & (apart_BKGC.square().sum(-1) < max_distance)
    return codes_BKG, member_BKG | (rank_BKG == rank_BK1)


def group_chance(
    p_BKV: Tensor,
    q_BKV: Tensor,
    draft_BK: Tensor,
    codebook_VC: Tensor | None,
    *,
    below: int,
    above: int,
    max_gap: float,
    max_distance: float,
) -> Tensor:
    """Probability min(1, p(C) / q(C)) of accepting drafts, [B, K]; arXiv 2508.07747, dynamic groups.

    Arguments as in `group_members`. A draft that p excludes is never accepted.
    """
    codes_BKG, member_BKG = group_members(
        p_BKV, draft_BK, codebook_VC, below=below, above=above, max_gap=max_gap, max_distance=max_distance
    )
    return _ratio(
        (p_BKV.gather(-1, codes_BKG) * member_BKG).sum(-1), (q_BKV.gather(-1, codes_BKG) * member_BKG).sum(-1)
    ) * (p_BKV.gather(-1, draft_BK[..., None]).squeeze(-1) > 0)


def _ratio(target: Tensor, drafted: Tensor) -> Tensor:
    return (target / drafted.clamp(min=torch.finfo(torch.float32).tiny)).clamp(max=1.0)


def static_chance(p_BKV: Tensor, q_BKV: Tensor, draft_BK: Tensor, group_V: Tensor) -> Tensor:
    """Probability min(1, p(C) / q(C)) of accepting drafts, [B, K], for a fixed partition int64 [V] of the codes."""
    same_BKV = group_V == group_V[draft_BK][..., None]
    chance_BK = _ratio((p_BKV * same_BKV).sum(-1), (q_BKV * same_BKV).sum(-1))
    return chance_BK * (p_BKV.gather(-1, draft_BK[..., None]).squeeze(-1) > 0)


def static_groups(codebook_VC: Tensor, group: int, iterations: int = 20) -> Tensor:
    """Partition int64 [V] of the codes into about V / group clusters by k-means on the code vectors, without chance.

    The first centres are chosen one after another, each the code farthest from those before it.
    """
    codes_VC = codebook_VC.float()
    count = max(1, round(len(codes_VC) / group))
    chosen = [0]
    nearest_V = (codes_VC - codes_VC[0]).square().sum(-1)
    for _ in range(count - 1):
        chosen.append(int(nearest_V.argmax()))
        nearest_V = torch.minimum(nearest_V, (codes_VC - codes_VC[chosen[-1]]).square().sum(-1))
    centre_SC = codes_VC[chosen]
    group_V = torch.cdist(codes_VC, centre_SC).argmin(-1)
    for _ in range(iterations):
        # Sums as a product: adding in place takes another order on every run of a GPU.
        within_SV = (group_V == torch.arange(count, device=group_V.device)[:, None]).float()
        size_S1 = within_SV.sum(1, keepdim=True)
        centre_SC = torch.where(size_S1 > 0, within_SV @ codes_VC / size_S1.clamp(min=1), centre_SC)
        group_V = torch.cdist(codes_VC, centre_SC).argmin(-1)
    return group_V


def check_grouped(
    model: Windowed,
    guidance: Guidance,
    temperature: float,
    top_k: int,
    top_p: float,
    group: int,
    max_gap: float,
    max_distance: float,
    groups: Literal["dynamic", "static"],
    codebook: Tensor | None,
    window: int,
    initial: Initial,
    check_every: int,
) -> None:
    """Checks the arguments of `sample_grouped`; errors as there."""
    check_range("group", group, CODES)
    if not max_gap > 0 or not max_distance > 0:
        raise ValueError(f"max_gap {max_gap}, max_distance {max_distance}; both must be > 0")
    if groups not in ("dynamic", "static"):
        raise ValueError(f"groups {groups!r}; choose dynamic or static")
    if codebook is None and groups == "static":
        raise ValueError("static groups need the tokenizer's codebook")
    vocab_size = model.config["vocab_size"]
    if codebook is not None and codebook.shape[0] != vocab_size:
        raise ValueError(f"a codebook of {codebook.shape[0]} codes for a model of {vocab_size}")
    check_jacobi(model, guidance, temperature, top_k, top_p, window, initial, "none", check_every)


def group_table(codebook: Tensor | None, groups: str, group: int, device: torch.device) -> Tensor | None:
    """What the rule of acceptance reads: the partition of static groups, or the code vectors if they are given."""
    if codebook is None:
        return None
    vectors_VC = codebook.to(device, torch.float32)
    return static_groups(vectors_VC, group) if groups == "static" else vectors_VC


@in_stages
@torch.no_grad()
def sample_grouped(
    model: Windowed,
    condition: Condition,
    *,
    noise: Noise,
    guidance: Guidance = OFF,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    group: int = 14,
    max_gap: float = 0.15,
    max_distance: float = 0.5,
    groups: Literal["dynamic", "static"] = "dynamic",
    codebook: Tensor | None = None,
    window: int = 16,
    initial: Initial = "random",
    check_every: int = 8,
    callback: Callback | None = None,
    runtime: Runtime = EAGER,
) -> SampleOutput:
    """Draws tokens by grouped speculative decoding. Lossy: faster than SJD, and away from the model's distribution.

    GSD, arXiv 2508.07747, on top of SJD, arXiv 2410.01699, algorithm 1.

    Args:
        model: a generator of one token per step with start, verify and commit.
        condition: of the B images.
        noise: one seed per image.
        guidance: classifier-free guidance. GSD: 3 (Lumina-mGPT).
        temperature: > 0; 1.0 = off. GSD: 1.0.
        top_k: 0 = off. GSD: 2000 (Lumina-mGPT).
        top_p: in (0, 1]; 1.0 = off. GSD: 1.0.
        group: G codes of a group, half of them less likely than the draft; 1 = off (exact SJD). GSD: 3 to 50 in the
            paper (25 for its FID, 50 for its speed), 14 in the released code. For static groups, their mean size.
        max_gap: largest difference in probability inside a dynamic group; 1.0 = off. Released code: 0.15.
        max_distance: largest squared distance of code vectors inside a dynamic group. Released code: 0.5, between rows
            of the transformer's input embedding; here between rows of `codebook`.
        groups: "dynamic" around each draft, or "static" clusters of the codebook (the paper's ablation).
        codebook: the tokenizer's code vectors [V, C]; None leaves distances out. Needed for static groups.
        window, initial, check_every, callback, runtime: see sample_jacobi. GSD: window 16.

    Returns: tokens int64 [B, N] and statistics.

    Raises:
        ValueError: a setting out of range, or a condition or codebook that does not fit the model.
    """
    rule = (group, max_gap, max_distance, groups, codebook)
    check_grouped(model, guidance, temperature, top_k, top_p, *rule, window, initial, check_every)
    group = min(group, model.config["vocab_size"])
    below = group // 2
    table = group_table(codebook, groups, group, noise.device)

    def chance(p_BKV: Tensor, q_BKV: Tensor, draft_BK: Tensor, static: Tensor | None) -> Tensor:
        if groups == "static":
            assert static is not None
            return static_chance(p_BKV, q_BKV, draft_BK, static)
        limits = dict(max_gap=max_gap, max_distance=max_distance)
        return group_chance(p_BKV, q_BKV, draft_BK, static, below=below, above=group - 1 - below, **limits)

    return run_jacobi(
        model,
        condition,
        noise=noise,
        guidance=guidance,
        filters=(temperature, top_k, top_p),
        window=window,
        initial=initial,
        coupling="none",
        adaptive=False,
        check_every=check_every,
        callback=callback,
        runtime=runtime,
        chance=chance,
        table=table,
        key=("grouped", groups, group, max_gap, max_distance, table is None),
    )
