"""Clips against real clips: the distance of their features, and how much they move.

B clips, T frames, C channels, H W pixels of a frame, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from visar.evaluate.extractors import load_extractor
from visar.evaluate.statistics import FeatureStatistics, RunningStatistics, frechet_distance

EXTRACTOR = "efficientnet-lite0-clip"
_BATCH = 16  # clips whose features are computed at a time


@dataclass(frozen=True)
class ClipScores:
    """What sets of clips are compared by.

    Attributes:
        distance: Frechet distance of features of clips (FD-Lite0-clip: frames' features and their changes in time; it
            is not FVD).
        motion: mean absolute change of a pixel from frame to frame, in levels of 0 ... 255, of the clips made.
        real_motion: of the real ones.
    """

    distance: float
    motion: float
    real_motion: float

    @property
    def relative_motion(self) -> float:
        """How much the clips move over how much real ones do; 1.0 is as much, inf where real ones stand still."""
        return self.motion / self.real_motion if self.real_motion else float("inf")


def _check(clips: np.ndarray) -> None:
    if clips.dtype != np.uint8 or clips.ndim != 5 or clips.shape[1] < 2 or clips.shape[4] != 3 or len(clips) < 2:
        raise ValueError(
            f"clips are {clips.dtype} {clips.shape}; uint8 [B, T, H, W, 3] of at least two clips of two frames is "
            "needed"
        )


def motion(clips_BTHWC: np.ndarray) -> np.ndarray:
    """Mean absolute change of a pixel from frame to frame, in levels of 0 ... 255, of every clip, float64 [B].

    Raises:
        ValueError: no uint8 clips, or fewer than two clips or frames.
    """
    _check(clips_BTHWC)
    return np.array([np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in clips_BTHWC])


def clip_statistics(clips_BTHWC: np.ndarray, features: Callable[[Tensor], Tensor]) -> FeatureStatistics:
    """Statistics of the features of clips.

    Args:
        clips_BTHWC: uint8 [B, T, H, W, 3].
        features: uint8 [B, T, 3, H, W] to floats [B, D].

    Raises:
        ValueError: see `motion`.
    """
    _check(clips_BTHWC)
    running = RunningStatistics()
    for first in range(0, len(clips_BTHWC), _BATCH):
        running.update(features(torch.from_numpy(clips_BTHWC[first : first + _BATCH]).movedim(-1, 2)))
    return running.finish()


def score_clips(
    made_BTHWC: np.ndarray,
    real_BTHWC: np.ndarray,
    *,
    features: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> ClipScores:
    """Compares clips with real ones.

    Args:
        made_BTHWC, real_BTHWC: uint8 [B, T, H, W, 3]; distances of few clips are far above those of many.
        features: see `clip_statistics`; None is the extractor efficientnet-lite0-clip.
        device: where its network is.

    Raises:
        ValueError: see `motion`.
        ImportError: the package of the extractor's weights is not installed.
    """
    if features is None:
        extractor = load_extractor(EXTRACTOR, device=device)
        features = lambda clip_BTCHW: extractor(clip_BTCHW)["clip"]  # noqa: E731
    first, second = (clip_statistics(clips, features) for clips in (made_BTHWC, real_BTHWC))
    moves = [float(motion(clips).mean()) for clips in (made_BTHWC, real_BTHWC)]
    return ClipScores(frechet_distance(first, second), *moves)
