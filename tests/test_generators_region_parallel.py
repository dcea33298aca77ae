"""Region-parallel transformer: a plain reference, its order and masks, cached passes, exact sampling."""

import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Categorical, Windowed
from visar.core.noise import Noise
from visar.evaluate.exactness import check_distribution, joint_distribution
from visar.generators.ordered import OrderedTransformer
from visar.generators.orders import region_order
from visar.generators.raster import RasterGPT
from visar.generators.region_parallel import REGION_PARALLEL_PRESETS, RegionParallelTransformer
from visar.samplers.ancestral import sample_ancestral

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
CONDITIONS = {
    "class": dict(num_classes=5),
    "word prefix": dict(num_classes=5, word_vocab_size=9, num_words=4, words="prefix"),
    "captions": dict(num_classes=0, caption_width=6, caption_length=5),
}


def tiny(kind="class", **changes):
    torch.manual_seed(0)
    settings = dict(vocab_size=11, grid=(4, 6), regions=4, width=16, num_layers=2, num_heads=2, hidden_width=24)
    model = RegionParallelTransformer(**settings | CONDITIONS[kind] | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if kind == "captions":
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
        return model, Condition(text_BTC=torch.randn(3, 5, 6), text_mask_BT=mask)
    words = torch.tensor([[2, 3, 0], [4, 5, 6], [1, 0, 0]]) if kind == "word prefix" else None
    return model, Condition(labels_BA=torch.tensor([[0], [4], [5]]), words_BT=words)


def decode(model, condition, guidance=OFF, tokens_BN=None, first_of_kind=False):
    """Guided logits of given tokens in the order of the blocks, decoded with every block's own number or with that of
    the first of its kind, as captured steps do."""
    state, found, kinds = model.start(condition, guidance), [], model.block_kinds
    for block in range(len(kinds)):
        state.block = kinds.index(kinds[block]) if first_of_kind else block
        found.append(model.predict(state))
        model.append(state, tokens_BN[:, model.positions(state)[0]])
    assert torch.equal(model.result(state), tokens_BN)
    return torch.cat(found, dim=1)


def plain(model, tokens_BN, label_B):
    """PAR as its authors lay it out: tokens reordered by a reshape, learned ones behind the first group, a causal mask
    that is full within groups; the last token of every region is not read."""
    weights, config = model.state_dict(), model.config
    (rows, columns), regions, num_heads = config["grid"], config["regions"], config["num_heads"]
    side, head_width = math.isqrt(config["regions"]), config["width"] // config["num_heads"]
    place = torch.arange(rows * columns).view(side, rows // side, side, columns // side)
    place = place.permute(1, 3, 0, 2).reshape(-1)
    embedded = weights["tok_embeddings.weight"][tokens_BN[:, place]]
    first = weights["cls_embedding.embedding_table.weight"][label_B][:, None]
    batch, kept = len(tokens_BN), rows * columns - regions
    learned = weights["learned_inputs"].expand(batch, -1, -1)
    x = torch.cat([first, embedded[:, :regions], learned, embedded[:, regions:kept]], dim=1)
    angle = torch.zeros(x.shape[1], head_width // 2)
    turning = torch.zeros(x.shape[1], dtype=torch.bool)
    kinds = [-1, *range(regions), *[-1] * (regions - 1), *range(regions, kept)]
    for slot, number in enumerate(kinds):
        if number >= 0:
            turning[slot] = True
            for i in range(head_width // 4):
                frequency = 10000 ** (-2 * i / (head_width // 2))
                angle[slot, i] = int(place[number]) // columns * frequency
                angle[slot, head_width // 4 + i] = int(place[number]) % columns * frequency
    turn = torch.polar(turning[:, None].float().expand_as(angle), angle)
    # Groups of M: the last token that is drawn alone leads the first of them.
    group = torch.tensor([max(slot - regions, -1) // regions for slot in range(x.shape[1])])
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    seen |= (group[None] == group[:, None]) & (group >= 0)

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * weights[f"{name}.weight"]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    for layer in range(config["num_layers"]):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.attention_norm") @ weights[f"{name}.attention.wqkv.weight"].T
        query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in y.chunk(3, dim=-1))
        scores = (rotated(query) @ rotated(key).mT / head_width**0.5).masked_fill(~seen, -math.inf)
        y = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        x = x + y @ weights[f"{name}.attention.wo.weight"].T
        y = norm(x, f"{name}.ffn_norm")
        up = functional.silu(y @ weights[f"{name}.feed_forward.w1.weight"].T)
        up = up * (y @ weights[f"{name}.feed_forward.w3.weight"].T)
        x = x + up @ weights[f"{name}.feed_forward.w2.weight"].T
    logits = norm(x, "norm") @ weights["output.weight"].T
    found = torch.empty(batch, rows * columns, logits.shape[-1])
    found[:, place] = logits
    return found


@pytest.mark.parametrize("changes", [{}, dict(grid=(2, 8)), dict(grid=(8, 4), regions=16)])
@torch.no_grad()
def test_logits_equal_a_plain_reference(changes):
    model, condition = tiny(**changes)
    tokens = torch.randint(11, (3, model.num_tokens))
    torch.testing.assert_close(model(tokens, condition), plain(model, tokens, condition.labels_BA[:, 0]))


@torch.no_grad()
def test_one_region_is_the_raster_model():
    model, condition = tiny("word prefix", regions=1)
    raster = RasterGPT(**{key: model.config[key] for key in model.config if key != "regions" and key[0] != "_"}).eval()
    raster.load_state_dict(model.state_dict())
    tokens = torch.randint(11, (3, 24))
    torch.testing.assert_close(model(tokens, condition), raster(tokens, condition), atol=1e-5, rtol=1e-5)
    assert model.block_sizes == raster.block_sizes
    settings = dict(noise=Noise([3, 4, 5]), guidance=Guidance(2.0), top_p=0.9)
    drawn, expected = (sample_ancestral(each, condition, **settings) for each in (model, raster))
    assert torch.equal(drawn.tokens, expected.tokens)
    assert drawn.statistics.forward_passes == expected.statistics.forward_passes


@pytest.mark.parametrize(
    ("shape", "regions", "passes"),
    [
        ((24, 24), 4, 147),
        ((24, 24), 16, 51),
        ((16, 16), 4, 67),
        ((16, 16), 16, 31),
        ((8, 8), 4, 19),
        ((8, 8), 16, 19),
        ((4, 6), 4, 9),
        ((4, 4), 16, 16),
        ((3, 5), 1, 15),
    ],
)
def test_order(shape, regions, passes):
    order, side = region_order(shape, regions), math.isqrt(regions)
    assert sorted(order.places) == list(range(math.prod(shape))) and len(order.blocks) == passes
    tokens = math.prod(shape)
    assert passes == regions + (tokens - regions) // regions
    region_of = [
        (place // shape[1]) * side // shape[0] * side + place % shape[1] * side // shape[1] for place in range(tokens)
    ]
    several = tokens > regions
    assert [region_of[block[0]] for block in order.blocks[:regions]] == list(range(regions))
    for block in order.blocks[regions:]:
        assert [region_of[place] for place in block] == list(range(regions))
        assert len({place - order.blocks[region][0] for region, place in enumerate(block)}) == 1
    assert order.learned == tuple(
        regions - 1 if block == regions - 1 and several else 0 for block in range(len(order.blocks))
    )
    assert len(order.inputs) == tokens - len(order.blocks[-1]) + (regions - 1 if several else 0)
    (sources,) = order.sources
    assert sources == (0,) * regions + tuple(range(regions)) * ((tokens - regions) // regions)


def test_bad_regions():
    for shape, regions in (((4, 6), 16), ((4, 4), 2), ((4, 4), 0), ((4, 4), -4), ((2, 4, 4), 4)):
        with pytest.raises(ValueError, match=rf"regions {regions} on grid .*root divides rows and columns"):
            region_order(shape, regions)


def test_kinds_and_protocols():
    model, _ = tiny(grid=(8, 8))
    kinds = ["first block of 1", "block of 1", "block of 1", "block of 1 and 3 learned"]
    assert list(model.block_kinds) == kinds + ["block of 4"] * 14 + ["last block of 4"]
    assert isinstance(model, Categorical) and not isinstance(model, Windowed)
    millions = {"l": 343, "xl": 775, "xxl": 1400, "3b": 3100}
    for name, preset in REGION_PARALLEL_PRESETS.items():
        with torch.device("meta"):
            large = RegionParallelTransformer(**preset)
        assert abs(sum(p.numel() for p in large.parameters()) / 1e6 / millions[name.split("-")[1]] - 1) < 0.02
        assert len(large.block_sizes) == (147 if name.endswith("-4x") else 51)


@pytest.mark.parametrize("kind", [*CONDITIONS, "single tokens"])
@torch.no_grad()
def test_cached_blocks_equal_the_full_pass(kind):
    model, condition = tiny(grid=(2, 2)) if kind == "single tokens" else tiny(kind)
    tokens = torch.randint(11, (3, model.num_tokens))
    place_N = torch.tensor(model.order.places)
    full = model(tokens, condition)[:, place_N]
    null = model(tokens, model.null_condition(condition))[:, place_N]
    blocks = len(model.block_sizes)
    for guidance in (OFF, Guidance(2.5), Guidance(3.0, schedule="linear")):
        scale_N = torch.tensor(guidance.scales(blocks)).repeat_interleave(torch.tensor(model.block_sizes))
        for first_of_kind in (False, True):
            logits = decode(model, condition, guidance, tokens, first_of_kind)
            torch.testing.assert_close(logits, null + (full - null) * scale_N[:, None], atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_a_token_is_seen_by_later_groups_and_by_no_others():
    model, condition = tiny()
    tokens = torch.randint(11, (3, model.num_tokens))
    logits = model(tokens, condition)
    block_of = {place: block for block, places in enumerate(model.order.blocks) for place in places}
    for place in range(model.num_tokens):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        moved = (model(other, condition) - logits).abs().amax((0, 2))
        later = torch.tensor([block_of[n] > block_of[place] for n in range(model.num_tokens)])
        assert (moved[later] > 1e-5).all() and (moved[~later] == 0).all()
    alone = torch.tensor([block_of[n] < 4 for n in range(model.num_tokens)])
    for number in range(3):
        kept = model.learned_inputs[number].clone()
        model.learned_inputs[number] += 1
        moved = (model(tokens, condition) - logits).abs().amax((0, 2))
        model.learned_inputs[number] = kept
        assert (moved[~alone] > 1e-5).all() and (moved[alone] == 0).all()


def enumerable():
    return tiny(grid=(4, 2), vocab_size=2, num_classes=2)[0]


@pytest.mark.parametrize(
    ("guidance", "filters"),
    [
        (OFF, {}),
        (Guidance(2.0), dict(temperature=0.7)),
        (Guidance(1.5), dict(top_k=1)),
        (Guidance(3.0), dict(top_p=0.8, temperature=1.3)),
    ],
)
def test_sampling_is_exact_at_every_batch_size(guidance, filters):
    model = enumerable()
    probs = joint_distribution(model, TINY.many(1, 1), guidance, **filters)
    assert abs(float(probs.sum()) - 1) < 1e-5
    settings = dict(guidance=guidance, **filters)
    draws = TINY.DRAWS // 2
    tokens = sample_ancestral(model, TINY.many(1, draws), noise=Noise(range(draws)), **settings).tokens
    assert check_distribution(tokens, probs, 2).passed
    for batch in (1, 3, 8):
        parts = [Noise(range(first, first + batch)) for first in range(0, 24, batch)]
        found = [sample_ancestral(model, TINY.many(1, batch), noise=part, **settings).tokens for part in parts]
        assert torch.equal(torch.cat(found), tokens[:24])


def test_planted_bugs_are_found(monkeypatch):
    model = enumerable()
    probs = joint_distribution(model, TINY.many(1, 1))

    def passed():
        draws = sample_ancestral(model, TINY.many(1, 6000), noise=Noise(range(6000))).tokens
        return check_distribution(draws, probs, 2).passed

    assert passed()
    tables = model.tables(torch.device("cpu"))
    tables.source_HN[0, 4:] = torch.tensor([0, 1, 3, 2])  # two regions take each other's conditional
    assert not passed()
    tables.source_HN[0, 4:] = torch.arange(4)
    assert passed()
    positions = OrderedTransformer.positions
    monkeypatch.setattr(OrderedTransformer, "positions", lambda self, state: positions(self, state).flip(1))
    assert not passed()


def test_an_image_is_a_function_of_its_seed_and_stops_where_it_is_told(tmp_path):
    model, _ = tiny()
    labels = torch.tensor([[0], [1], [2], [3], [4], [5], [0], [3]])
    settings = dict(guidance=Guidance(2.0), top_p=0.95)
    seeds = [9, 8, 31, 2, 5, 77, 1, 0]
    batch = sample_ancestral(model, Condition(labels_BA=labels), noise=Noise(seeds), **settings).tokens
    for row, seed in enumerate(seeds):
        condition = Condition(labels_BA=labels[row : row + 1])
        assert torch.equal(sample_ancestral(model, condition, noise=Noise([seed]), **settings).tokens[0], batch[row])
    part = sample_ancestral(
        model, Condition(labels_BA=labels), noise=Noise(seeds), callback=lambda done, _: done >= 5, **settings
    )
    drawn = torch.zeros(24, dtype=torch.bool)
    drawn[list(model.order.places[:8])] = True
    assert torch.equal(part.tokens, batch * drawn)
    model.save_pretrained(tmp_path)
    loaded = RegionParallelTransformer.from_pretrained(tmp_path).eval()
    again = sample_ancestral(loaded, Condition(labels_BA=labels), noise=Noise(seeds), **settings).tokens
    assert torch.equal(again, batch)


@pytest.mark.gpu
@torch.no_grad()
def test_captured_ids_equal_eager_ids():
    from visar.core.runtime import EAGER, Runtime

    model, condition = tiny()
    model, condition, runtime = model.cuda(), condition.to("cuda"), Runtime()
    for guidance in (OFF, Guidance(2.0)):
        for seed in range(4):
            settings = dict(noise=Noise([seed, seed + 1, seed + 2], "cuda"), guidance=guidance, top_k=7)
            eager = sample_ancestral(model, condition, runtime=EAGER, **settings).tokens
            captured = sample_ancestral(model, condition, runtime=runtime, **settings).tokens
            assert torch.equal(eager, captured)
