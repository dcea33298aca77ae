"""CRAFT's VGG-16 as an extractor: the numbers of its weights, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from visar.evaluate.craft import craft_weights_path, load_craft
from visar.evaluate.extractors import EXTRACTORS, load_extractor

pytest.importorskip("easyocr_en_models", reason="the package of CRAFT's weights")
SAMPLE = Path(__file__).parent / "fixtures" / "sample_64.npz"


def test_features_are_the_recorded_numbers_alone_and_together() -> None:
    with np.load(SAMPLE) as file:
        images = torch.from_numpy(file["images"][:2]).movedim(-1, 1).contiguous()
    extractor = load_extractor("craft")
    found = extractor(images)["conv4_3"]
    assert found.shape == (2, 512) and extractor.width("conv4_3") == 512
    expected = torch.tensor([15.1674, 8.2162, 7.4523, 5.3670])
    torch.testing.assert_close(found[0, [327, 84, 215, 30]], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(extractor(images[1:])["conv4_3"], found[1:], atol=1e-4, rtol=1e-4)
    assert (extractor.kind.distance, extractor.layers) == ("FD-CRAFT", ("conv4_3",))
    with pytest.raises(ValueError, match=r"uint8 \[B, 3, H, W\]"):
        extractor(images.float())


def test_network_is_the_first_ten_convolutions_of_torchvisions() -> None:
    network = load_craft()
    convolutions = [layer for layer in network.layers if isinstance(layer, torch.nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512]
    assert isinstance(network.layers[-1], torch.nn.ReLU) and len(network.layers) == 33
    assert not network.training and not any(parameter.requires_grad for parameter in network.parameters())
    assert network(torch.rand(1, 3, 96, 64)).shape == (1, 512, 12, 8)


def test_only_the_tensors_of_its_layers_count(tmp_path: Path) -> None:
    content = torch.load(craft_weights_path(), map_location="cpu", weights_only=True)
    layers = {name: value for name, value in content.items() if name.startswith("module.basenet.slice")}
    save_file({name: value.clone() for name, value in layers.items()}, tmp_path / "layers.safetensors")
    extractor = load_extractor("craft", weights=tmp_path / "layers.safetensors")
    assert extractor.weights == EXTRACTORS["craft"].weights == load_extractor("craft").weights
    torch.save(
        {**layers, "module.basenet.slice1.0.bias": layers["module.basenet.slice1.0.bias"] + 1}, tmp_path / "a.pth"
    )
    with pytest.raises(ValueError, match="a.pth: the tensors have sha256"):
        load_extractor("craft", weights=tmp_path / "a.pth")
    torch.save({"module.basenet.slice1.0.bias": torch.zeros(64)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match="b.pth is not CRAFT's weights"):
        load_extractor("craft", weights=tmp_path / "b.pth")
