"""EfficientNet-Lite0: the network, its weights file, its features."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch_fidelity.utils import create_feature_extractor

from visar.evaluate.efficientnet_lite import EfficientNetLite0, lite0_weights_path, load_efficientnet_lite0
from visar.evaluate.extractors import EXTRACTORS, FeatureExtractorInceptionSpatial, load_extractor

SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    return load_efficientnet_lite0()


def pictures(count: int) -> torch.Tensor:
    with np.load(SAMPLE) as file:
        return torch.from_numpy(file["images"][:count]).movedim(-1, 1).contiguous()


def test_timms_layers_give_the_recorded_numbers(network: EfficientNetLite0) -> None:
    """Recorded from layers that were written out here, padded as TensorFlow does: an image of odd sides."""
    image = pictures(1)[..., :51, :47].float() / 127.5 - 1.0
    last, _, logits = network.pooled(image)
    torch.testing.assert_close(last[0, [7, 185, 98]], torch.tensor([10.9943, 9.8748, 8.9305]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(logits[0, [800, 604, 531]], torch.tensor([23.676, 21.8, 21.2809]), atol=1e-3, rtol=1e-3)
    assert [tuple(each.shape[2:]) for each in network.features(image)] == [(26, 24), (13, 12), (7, 6), (4, 3), (2, 2)]


def test_recognises_a_clock(network: EfficientNetLite0) -> None:
    with np.load(SAMPLE) as file:
        row = list(file["captions"]).index("five o\u2019clock, blob style")
    image = pictures(64)[row : row + 1].float() / 127.5 - 1.0
    logits = network(F.interpolate(image, size=128, mode="bilinear"))
    assert set(logits[0].topk(3).indices.tolist()) == {409, 892, 826}  # analog clock, wall clock, stopwatch


def test_features_are_maps_of_five_resolutions_and_differentiable(network: EfficientNetLite0) -> None:
    image = (pictures(2).float() / 127.5 - 1.0).requires_grad_()
    maps = network.features(image)
    assert [tuple(each.shape[1:]) for each in maps] == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (112, 4, 4),
        (320, 2, 2),
    ]
    maps[1].square().mean().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in network.parameters())
    torch.testing.assert_close(network.pooled(image)[0], maps[-1].mean(dim=(2, 3)))


def test_features_do_not_depend_on_the_batch(network: EfficientNetLite0) -> None:
    image = pictures(3).float() / 127.5 - 1.0
    together = network.pooled(image)[1]
    alone = torch.cat([network.pooled(image[i : i + 1])[1] for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    content = torch.load(lite0_weights_path(), weights_only=True)
    content["_fc.bias"] = content["_fc.bias"] + 1
    torch.save(content, tmp_path / "changed.pth")
    with pytest.raises(ValueError, match="changed.pth has sha256"):
        load_efficientnet_lite0(path=tmp_path / "changed.pth")


def test_float64_is_meant_and_agrees_with_float32() -> None:
    images = pictures(2)
    single, double = load_extractor(), load_extractor(dtype="float64")
    assert next(double.module.parameters()).dtype == torch.float64
    first, second = single(images)["320"], double(images)["320"]
    assert not torch.equal(first, second)
    torch.testing.assert_close(first, second, atol=1e-3, rtol=1e-3)


def test_extractor_is_registered_with_torch_fidelity_under_its_own_name() -> None:
    ours = load_extractor()
    theirs = create_feature_extractor("visar-efficientnet-lite0", ["1280", "320"], cuda=False, verbose=False)
    images = pictures(2)
    head, last = theirs(images)
    torch.testing.assert_close(last, ours(images)["320"])
    assert head.shape == (2, 1280) and theirs.get_default_feature_layer_for_metric("fid") == "320"


def test_clip_features_are_mean_and_change() -> None:
    clip = load_extractor("efficientnet-lite0-clip")
    images = pictures(3)
    still = images[0].expand(1, 4, -1, -1, -1)
    moving = images[None]
    found = clip(torch.cat([still[:, :3], moving]))["clip"]
    frames = load_extractor()(images)["320"]
    assert found.shape == (2, 640)
    torch.testing.assert_close(found[0, :320], frames[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0, 320:], torch.zeros(320), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(found[1, :320], frames.mean(dim=0), atol=1e-4, rtol=1e-4)
    change = (frames[1:] - frames[:-1]).abs().mean(dim=0)
    torch.testing.assert_close(found[1, 320:], change, atol=1e-4, rtol=1e-4)
    assert EXTRACTORS["efficientnet-lite0-clip"].distance == "FD-Lite0-clip"
    with pytest.raises(ValueError, match="T >= 2"):
        clip(images)


def test_errors_name_the_choices() -> None:
    with pytest.raises(ValueError, match="efficientnet-lite0, efficientnet-lite0-clip, craft, inception-v3"):
        load_extractor("inception")
    with pytest.raises(ValueError, match="float32 or float64"):
        load_extractor(dtype="float16")
    with pytest.raises(ValueError, match="320, 1280, logits"):
        load_extractor(layer="2048")
    with pytest.raises(ValueError, match="sFID"):
        load_extractor(spatial=True)
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        load_extractor()(torch.zeros(1, 3, 8, 8))


def test_inception_gives_sfid_features_and_refuses_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(
        "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url",
        lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no network")),
    )
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_extractor("inception-v3")
    torch.save({"weights": Path("/nowhere")}, tmp_path / "code.pth")
    with pytest.raises(ValueError, match="code.pth is refused"):
        load_extractor("inception-v3", weights=tmp_path / "code.pth")
    random = _random_inception()
    torch.save(random.state_dict(), tmp_path / "inception.pth")
    extractor = load_extractor("inception-v3", weights=tmp_path / "inception.pth", spatial=True, dtype="float64")
    assert extractor.layers == ("2048", "logits_unbiased", "spatial")
    found = extractor(pictures(1))
    assert {name: value.shape[1] for name, value in found.items()} == {
        "2048": 2048,
        "logits_unbiased": 1008,
        "spatial": 2023,
    }
    assert extractor.width("spatial") == 2023
    plain = FeatureExtractorInceptionSpatial("any", ["2048"], str(tmp_path / "inception.pth"))
    torch.testing.assert_close(plain(pictures(1))[0], found["2048"], atol=1e-3, rtol=1e-3)
    only = FeatureExtractorInceptionSpatial("any", ["spatial"], str(tmp_path / "inception.pth"))
    torch.testing.assert_close(only(pictures(1))[0], found["spatial"], atol=1e-3, rtol=1e-3)


def _random_inception() -> FeatureExtractorInceptionSpatial:
    """Inception with the weights of its initialisation: its constructor insists on loading some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *args, **kwargs: {}
        )
        patch.setattr(FeatureExtractorInceptionSpatial, "load_state_dict", lambda *args, **kwargs: None)
        return FeatureExtractorInceptionSpatial("any", ["2048"])
