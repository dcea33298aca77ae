"""The head of noisy vectors: its start, what it depends on, broadcasting, and the names and numbers of MAR."""

import pytest
import torch

from visar.layers.diffusion_head import DiffusionHead


def head(**changed) -> DiffusionHead:
    made = DiffusionHead(**{"channels": 3, "hidden_size": 8, "width": 16, "depth": 2, **changed})
    torch.manual_seed(0)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@torch.no_grad()
def test_a_fresh_head_gives_zero_and_has_gradients_for_the_first_step():
    made = DiffusionHead(3, 8, width=16, depth=2, out_channels=6)
    out = made(torch.randn(5, 3), torch.rand(5), torch.randn(5, 8))
    assert out.shape == (5, 6) and not out.any()
    with torch.enable_grad():
        made(torch.randn(5, 3), torch.rand(5), torch.randn(5, 8)).square().sub(1).sum().backward()
    assert made.final_layer.linear.bias.grad is not None
    made.reset_parameters(torch.Generator().manual_seed(1))
    again = DiffusionHead(3, 8, width=16, depth=2, out_channels=6)
    again.reset_parameters(torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_tokens_are_independent_and_draws_share_a_hidden_vector():
    made = head()
    x, time, hidden = torch.randn(4, 2, 5, 3), torch.rand(4, 2, 5) * 1000, torch.randn(2, 5, 8)
    out = made(x, time, hidden)
    for draw in range(4):
        assert torch.allclose(out[draw], made(x[draw], time[draw], hidden), atol=1e-5)
    for changed in ("x", "time", "hidden"):
        given = {"x": x[0].clone(), "time": time[0].clone(), "hidden": hidden.clone()}
        given[changed][1, 3] += 1.0
        moved = (made(*given.values()) - out[0]).abs().amax(-1) > 1e-4
        assert moved.nonzero().tolist() == [[1, 3]]


def reference(
    state: dict[str, torch.Tensor], x: torch.Tensor, time: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """MAR's formulas, written out on its parameter names."""

    def linear(name: str, value: torch.Tensor) -> torch.Tensor:
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def silu(value: torch.Tensor) -> torch.Tensor:
        return value * torch.sigmoid(value)

    def norm(value: torch.Tensor) -> torch.Tensor:
        centred = value - value.mean(-1, keepdim=True)
        return centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)

    angles = time[:, None] * torch.tensor([10_000 ** (-i / 128) for i in range(128)], dtype=torch.float64)
    waves = torch.cat([angles.cos(), angles.sin()], -1)
    condition = linear("time_embed.mlp.2", silu(linear("time_embed.mlp.0", waves))) + linear("cond_embed", hidden)
    x = linear("input_proj", x)
    for block in ("res_blocks.0", "res_blocks.1"):
        shift, scale, gate = linear(f"{block}.adaLN_modulation.1", silu(condition)).chunk(3, -1)
        normed = norm(x) * state[f"{block}.in_ln.weight"] + state[f"{block}.in_ln.bias"]
        branch = linear(f"{block}.mlp.2", silu(linear(f"{block}.mlp.0", normed * (1 + scale) + shift)))
        x = x + gate * branch
    shift, scale = linear("final_layer.adaLN_modulation.1", silu(condition)).chunk(2, -1)
    return linear("final_layer.linear", norm(x) * (1 + scale) + shift)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_names_and_numbers_are_those_of_mar(dtype):
    made = head().to(dtype)
    x, time, hidden = torch.randn(7, 3).double(), torch.tensor([0, 1, 17.5, 100, 500, 999, 1000.0]), torch.randn(7, 8)
    state = {key: value.double() for key, value in made.state_dict().items()}
    expected = reference(state, x, time.double(), hidden.double())
    assert torch.allclose(made(x, time, hidden).double(), expected, atol=2e-3)
