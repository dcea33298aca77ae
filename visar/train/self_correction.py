"""Histories with wrong codes in them, so that a generator over scales learns to make up for its own mistakes.

Source: Infinity's self-correction, arXiv 2412.04431 section 3.4, for codes instead of bits: some codes of a scale are
replaced, and the finer scales' targets are what the map then lacks. In sampling all codes of a scale are drawn
independently, so a scale always holds some that do not fit together; without this a model has never seen such a map.

B images, L positions of a scale, N all positions, h w the finest grid.
"""

import torch
from torch import Tensor

from visar.tokenizers.multiscale_quantizer import MultiScaleQuantizer


@torch.no_grad()
def self_correction(
    quantizer: MultiScaleQuantizer, tokens_BN: Tensor, largest: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Histories with replaced codes, and targets that lead from them back to the image.

    Args:
        quantizer: quantizer of the tokenizer.
        tokens_BN: int64 ids of images.
        largest: every image replaces a share of its codes that is uniform on 0 ... largest. A replacement is the code
            of another image of the batch at the same position.
        generator: on the tokens' device.

    Returns: int64 [B, N] histories, which inputs are made from, and int64 [B, N] targets. Before an image's first
        replaced code both are its ids.
    """
    batch, device = tokens_BN.shape[0], tokens_BN.device
    goal_BChw = quantizer.running_maps(tokens_BN)[-1]
    share_B1 = torch.rand(batch, 1, generator=generator, device=device) * largest
    map_BChw = torch.zeros_like(goal_BChw)
    astray_B1 = torch.zeros_like(share_B1, dtype=torch.bool)
    histories, targets = [], []
    for scale, ids_BL in enumerate(tokens_BN.split(quantizer.sizes, dim=1)):
        nearest_BL = quantizer.nearest(quantizer.at_scale(goal_BChw - map_BChw, scale))
        target_BL = torch.where(astray_B1, nearest_BL, ids_BL)
        replaced_BL = torch.rand(ids_BL.shape, generator=generator, device=device) < share_B1
        others_B = torch.randperm(batch, generator=generator, device=device)
        history_BL = torch.where(replaced_BL, ids_BL[others_B], target_BL)
        astray_B1 = astray_B1 | (history_BL != target_BL).any(1, keepdim=True)
        map_BChw = quantizer.accumulate(map_BChw, scale, quantizer.embedding(history_BL))
        histories.append(history_BL)
        targets.append(target_BL)
    return torch.cat(histories, dim=1), torch.cat(targets, dim=1)
