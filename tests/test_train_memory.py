"""Blocks whose activations are computed again, and the memory that a run says it takes."""

import pytest
import torch
from torch import nn

from visar.core.condition import Condition
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.next_scale import NextScaleTransformer
from visar.generators.raster import RasterGPT
from visar.train.memory import activation_bytes, checkpoint_blocks, kept_bytes, sentence, state_bytes

SIZES = dict(vocab_size=16, codebook_width=4, width=32, num_layers=3, num_heads=2, num_classes=3)


def build(kind: str):
    torch.manual_seed(0)
    if kind == "raster":
        model = RasterGPT(grid=(3, 3), hidden_width=48, **SIZES)
    elif kind == "scales":
        model = NextScaleTransformer(scales=(1, 2, 3), **SIZES)
    else:
        model = HierarchicalMaskedTransformer(scales=(1, 2, 3), num_refinement_layers=1, **SIZES)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("kind", ["raster", "scales", "hmar"])
def test_blocks_that_are_computed_again_give_the_same_gradients_and_keep_less(kind):
    model = build(kind)
    ids = torch.randint(16, (4, model.num_tokens), generator=torch.Generator().manual_seed(0))
    condition = Condition(labels_BA=torch.tensor([[0], [1], [2], [3]]))

    def loss() -> torch.Tensor:
        return model(ids, condition).logsumexp(-1).mean()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        loss().backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    outside = list(model.state_dict().values())
    before, kept = gradients(), kept_bytes(loss, outside)
    checkpoint_blocks([model])
    after, now = gradients(), kept_bytes(loss, outside)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert now < 0.7 * kept


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="gradient_checkpointing: this model has no blocks"):
        checkpoint_blocks([nn.Linear(2, 2)])


def test_memory_of_a_linear_layer_is_known():
    """Its input is kept for the weight's gradient, and what is squared; states are weights, average, gradients ..."""
    layer = nn.Linear(8, 16, bias=False)

    def losses(rows: int):
        return [lambda: layer(torch.randn(rows, 8)).square().mean()]

    assert activation_bytes(losses, 5, list(layer.parameters())) == 5 * (8 + 16) * 4
    adam = torch.optim.AdamW(layer.parameters())
    assert state_bytes([layer], [adam], layer) == (1 + 1 + 1 + 2) * layer.weight.nbytes
    assert state_bytes([layer], [torch.optim.Muon(layer.parameters())], layer) == 4 * layer.weight.nbytes
    assert sentence(2**30, 2**31, 64).startswith("memory: about 3.00 GiB; 1.00 for weights")
