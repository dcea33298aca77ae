"""Guidance: conventions, schedules, and that off means off."""

import pytest
import torch

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance, combine, double, repeat


def test_conventions_agree():
    null, conditional = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    by_hand = (1 + 0.7) * conditional - 0.7 * null
    scale = Guidance(0.7, convention="extrapolate").scales(1)[0]
    assert scale == Guidance(1.7).scales(1)[0]
    torch.testing.assert_close(combine(torch.cat([conditional, null]), scale), by_hand)


def test_linear_schedule_interval_and_lists():
    assert Guidance(3.0, schedule="linear").scales(5) == [1.0, 1.5, 2.0, 2.5, 3.0]
    assert Guidance(8.0, schedule="linear", start=2.0).scales(3) == [2.0, 5.0, 8.0]
    assert Guidance(2.0, convention="extrapolate", schedule="linear").scales(3) == [1.0, 2.0, 3.0]
    assert Guidance(4.0, interval=(1, 2)).scales(5) == [1.0, 4.0, 4.0, 1.0, 1.0]
    assert Guidance((1.0, 2.0)).scales(2) == [1.0, 2.0]
    assert Guidance(3.0, schedule="linear").scales(1) == [1.0]
    assert Guidance(2.0, convention="extrapolate", schedule="linear", interval=(1, 4)).at(2, 5) == 2.0


def test_active():
    assert not OFF.active(4)
    assert not Guidance(0.0, convention="extrapolate").active(4)
    assert not Guidance((1.0, 1.0)).active(2)
    assert Guidance((1.0, 1.5)).active(2)
    assert Guidance(0.5).active(1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(scale=-1.0), "-1.0"),
        (dict(scale=float("nan")), "nan"),
        (dict(convention="both"), "both"),
        (dict(schedule="cosine"), "cosine"),
        (dict(scale=(1.0, 2.0), schedule="linear"), "linear"),
        (dict(start=2.0), "linear"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)


def test_wrong_number_of_scales():
    with pytest.raises(ValueError, match="3 guidance scales for 2"):
        Guidance((1.0, 2.0, 3.0)).scales(2)


def test_doubling():
    condition = Condition(labels_BA=torch.tensor([[1], [2]]))
    both = double(condition, Condition(labels_BA=torch.tensor([[9], [9]])))
    assert both.labels_BA.flatten().tolist() == [1, 2, 9, 9]
    assert repeat(torch.tensor([1, 2]), 2).tolist() == [1, 2, 1, 2]
    with pytest.raises(ValueError, match="words_BT"):
        double(condition, Condition(words_BT=torch.zeros(2, 3, dtype=torch.int64)))
    with pytest.raises(ValueError, match="batch"):
        Condition(labels_BA=torch.zeros(2, 1), words_BT=torch.zeros(3, 1))
