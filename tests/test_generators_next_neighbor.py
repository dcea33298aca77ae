"""Next-neighbor transformer: parity with NAR, a plain reference, order, masks, cached passes, exact sampling."""

import itertools
import math
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from visar.checkpoints.common import build
from visar.checkpoints.nar import convert_generator
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import Categorical, Windowed
from visar.core.noise import Noise, image_seeds
from visar.evaluate.exactness import check_distribution, joint_distribution
from visar.generators.next_neighbor import NEXT_NEIGHBOR_BOXES, NEXT_NEIGHBOR_PRESETS, NextNeighborTransformer
from visar.generators.ordered import OrderedTransformer
from visar.generators.orders import neighbor_order
from visar.pipelines.loading import load
from visar.samplers.ancestral import sample_ancestral
from visar.tokenizers.vq import VQTokenizer
from visar.train.generator import train_generator

ROOT = Path(__file__).parent
TINY = SimpleNamespace(**runpy.run_path(str(ROOT / "fixtures" / "tiny.py")))
TRAINING = SimpleNamespace(**runpy.run_path(str(ROOT / "fixtures" / "training.py")))


def decode(model, condition, guidance=OFF, tokens_BN=None, first_of_kind=False):
    """Tokens, and guided logits in the order of the blocks, of arg-max decoding or of given tokens.

    first_of_kind: every block is decoded as the first of its kind, as a captured step does.
    """
    state, found, kinds = model.start(condition, guidance), [], model.block_kinds
    for block in range(len(kinds)):
        state.block = kinds.index(kinds[block]) if first_of_kind else block
        found.append(model.predict(state))
        drawn = found[-1].argmax(-1) if tokens_BN is None else tokens_BN[:, model.positions(state)[0]]
        model.append(state, drawn)
    return model.result(state).clone(), torch.cat(found, dim=1)


# ------------------------------------------------------------------------------------------------- numbers of the peer
def from_parity(folder, grid, num_heads, name="checkpoint.safetensors"):
    """The model of a parity folder's file. Images' keys say what the released file nests."""
    content = {key.removeprefix("model."): value for key, value in folder.checkpoint(name).items()}
    config, state = convert_generator({"model": content}, grid=grid, num_heads=num_heads)
    return build(NextNeighborTransformer, config, state, name, torch.float32)


def check_decoding(model, io, name, condition, guidance):
    assert len(model.block_sizes) == int(io[f"{name}.num_forwards"])
    assert model.block_sizes == tuple(io[f"{name}.step_width"].tolist())
    tokens, logits = decode(model, condition, guidance)
    assert torch.equal(tokens, io[f"{name}.tokens"].long()), name
    expected = io[f"{name}.guided_logits_flat"]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    noise = Noise(image_seeds(0, condition.batch))
    sampled = sample_ancestral(model, condition, noise=noise, guidance=guidance, top_k=1)
    assert torch.equal(sampled.tokens, tokens)
    assert sampled.statistics.forward_passes == {"generator": len(model.block_sizes)}


@torch.no_grad()
def test_image_parity(parity):
    folder = parity("nar-image")
    config, io = folder.config, folder.io
    model = from_parity(folder, (config["grid"],) * 2, config["c2i"]["n_head"])
    assert torch.equal(torch.tensor(model.order.places), io["decode_order"])
    place_I = torch.tensor(model.order.inputs)
    assert torch.equal(model.tables(place_I.device).seen_II, io["tf.mask"][1:, 1:][place_I][:, place_I])
    torch.testing.assert_close(model.tables(place_I.device).rope[1:], io["rope.freqs_cis"][1:][place_I])
    condition = Condition(labels_BA=io["tf.labels"][:, None])
    logits = model(io["tf.idx"], condition)
    torch.testing.assert_close(logits, io["tf.mixed"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(functional.cross_entropy(logits.flatten(0, 1), io["tf.idx"].flatten()), io["tf.loss"])
    null = model(io["tf.idx"], model.null_condition(condition))
    torch.testing.assert_close(null, io["tf_uncond.mixed"], atol=2e-5, rtol=1e-5)
    scale = config["cfg_scale"]
    # There, guidance ends once more tokens than cfg_interval are drawn.
    begins = itertools.accumulate((0, *model.block_sizes[:-1]))
    last = sum(begin <= config["cfg_interval"] for begin in begins) - 1
    for name, guidance in (
        ("greedy_cfg", Guidance(scale)),
        ("greedy_nocfg", OFF),
        ("greedy_cfg_interval", Guidance(scale, interval=(0, last))),
    ):
        check_decoding(model, io, name, condition, guidance)


@torch.no_grad()
def test_caption_parity(parity):
    folder = parity("nar-image")
    config, io = folder.config, folder.io
    model = from_parity(folder, (config["grid"],) * 2, config["t2i"]["n_head"], "checkpoint-t2i.safetensors")
    assert model.prefix_length == config["t2i"]["cls_token_num"]
    condition = Condition(text_BTC=io["t2i.caption"], text_mask_BT=io["t2i.emb_mask"].bool())
    logits = model(io["t2i.idx"], condition)
    torch.testing.assert_close(logits, io["t2i.mixed"], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(functional.cross_entropy(logits.flatten(0, 1), io["t2i.idx"].flatten()), io["t2i.loss"])
    check_decoding(model, io, "t2i_greedy_cfg", condition, Guidance(config["cfg_scale"]))


@torch.no_grad()
def test_video_parity(parity):
    folder = parity("nar-video")
    config, io = folder.config, folder.io
    model = from_parity(folder, tuple(config["ar"]["latent_shape"]), config["ar"]["n_head"])
    assert torch.equal(torch.tensor(model.order.places), io["decode_order"])
    condition = Condition(labels_BA=io["tf.labels"][:, None])
    torch.testing.assert_close(model(io["tf.idx"], condition), io["tf.mixed"], atol=2e-5, rtol=1e-5)
    null = model(io["tf.idx"], model.null_condition(condition))
    torch.testing.assert_close(null, io["tf_uncond.mixed"], atol=2e-5, rtol=1e-5)
    for name, guidance in (("greedy_cfg", Guidance(config["cfg_scale"])), ("greedy_nocfg", OFF)):
        check_decoding(model, io, name, condition, guidance)


# ------------------------------------------------------------------------------------------------------ small models
CONDITIONS = {
    "class": dict(num_classes=5),
    "attributes": dict(num_classes=5, attributes=(3, 2)),
    "word sum": dict(num_classes=5, word_vocab_size=9, num_words=4),
    "word prefix": dict(num_classes=0, word_vocab_size=9, num_words=4, words="prefix", prefix_rotation="identity"),
    "captions": dict(num_classes=0, caption_width=6, caption_length=5),
}


def tiny(kind="class", **changes):
    torch.manual_seed(0)
    settings = dict(vocab_size=11, grid=(3, 4), width=16, num_layers=2, num_heads=2, hidden_width=24)
    model = NextNeighborTransformer(**settings | CONDITIONS[kind] | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    words = torch.tensor([[2, 3, 0], [4, 5, 6], [1, 0, 0]])
    if kind == "captions":
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
        return model, Condition(text_BTC=torch.randn(3, 5, 6), text_mask_BT=mask)
    columns = 0 if kind == "word prefix" else 1 + len(model.config["attributes"])
    labels = torch.tensor([[0, 1, 0], [4, 3, 1], [5, 0, 2]])[:, :columns] if columns else None
    return model, Condition(labels_BA=labels, words_BT=words if "word" in kind else None)


def enumerable(grid=(2, 2), vocab_size=3):
    model, _ = tiny(vocab_size=vocab_size, grid=grid, num_classes=2)
    return model


BOX = dict(grid=(2, 3, 4), positions="learned")


def plain(model, tokens_BN, label_B):
    """The model's definition without caches and without an order: all tokens in raster order, who sees whom by
    distance, and every token's logits by looking for its neighbors one after the other."""
    weights, config = model.state_dict(), model.config
    shape, width, num_heads = config["grid"], config["width"], config["num_heads"]
    cells = list(itertools.product(*map(range, shape)))
    x = torch.cat(
        [
            weights["cls_embedding.embedding_table.weight"][label_B][:, None],
            weights["tok_embeddings.weight"][tokens_BN],
        ],
        dim=1,
    )
    if config["positions"] == "learned":
        x = x + weights["position_embedding"]
    distance = torch.tensor([-1, *map(sum, cells)])
    hidden_from = distance[None] > distance[:, None]
    head_width = width // num_heads
    turn = torch.ones(len(cells) + 1, head_width // 2, dtype=torch.complex64)
    if config["positions"] == "rope":
        turn[0] = 0
        for n, cell in enumerate(cells, 1):
            for axis in (0, 1):
                for i in range(head_width // 4):
                    angle = cell[axis] * 10000 ** (-2 * i / (head_width // 2))
                    turn[n, axis * head_width // 4 + i] = complex(math.cos(angle), math.sin(angle))

    def norm(x, name):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5) ** -0.5 * weights[f"{name}.weight"]

    def rotated(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    heads = []
    for layer in range(config["num_layers"] + len(shape) - 1):
        name = f"layers.{layer}"
        y = norm(x, f"{name}.attention_norm") @ weights[f"{name}.attention.wqkv.weight"].T
        query, key, value = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in y.chunk(3, dim=-1))
        scores = rotated(query) @ rotated(key).mT / head_width**0.5
        seen = scores.masked_fill(hidden_from, -math.inf).softmax(-1) @ value
        x = x + seen.transpose(1, 2).flatten(2) @ weights[f"{name}.attention.wo.weight"].T
        y = norm(x, f"{name}.ffn_norm")
        up = functional.silu(y @ weights[f"{name}.feed_forward.w1.weight"].T)
        up = up * (y @ weights[f"{name}.feed_forward.w3.weight"].T)
        x = x + up @ weights[f"{name}.feed_forward.w2.weight"].T
        number = layer - config["num_layers"]
        if number >= -1:
            suffix = "" if number == -1 else f".{number}"
            prefix = "" if number == -1 else "other_"
            plural = "" if number == -1 else "s"
            output = weights[f"{prefix}output{plural}{suffix}.weight"]
            heads.append(norm(x, f"{prefix}norm{plural}{suffix}") @ output.T)
    logits = []
    for cell in cells:
        from_neighbors = []
        for number, axis in enumerate(reversed(range(len(shape)))):
            neighbor = tuple(value - (i == axis) for i, value in enumerate(cell))
            if neighbor in cells:
                from_neighbors.append(heads[number][:, 1 + cells.index(neighbor)])
        from_neighbors = from_neighbors or [head[:, 0] for head in heads]
        logits.append(sum(from_neighbors) / len(from_neighbors))
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize(
    "changes",
    [dict(grid=(3, 5)), dict(grid=(4, 1)), dict(grid=(2, 3), positions="learned", num_layers=1), BOX],
    ids=lambda changes: " x ".join(map(str, changes["grid"])),
)
@torch.no_grad()
def test_other_sizes_equal_a_plain_reference(changes):
    model, condition = tiny(**changes)
    tokens = torch.randint(11, (3, model.num_tokens))
    torch.testing.assert_close(model(tokens, condition), plain(model, tokens, condition.labels_BA[:, 0]))


# ------------------------------------------------------------------------------------------------------------- orders
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 6), (3, 7), (2, 3, 4), (4, 16, 16), (2, 2, 2, 3)])
def test_order(shape):
    order = neighbor_order(shape)
    cells = list(itertools.product(*map(range, shape)))
    assert sorted(order.places) == list(range(len(cells)))
    assert len(order.blocks) == sum(shape) - len(shape) + 1
    for distance, block in enumerate(order.blocks):
        assert list(block) == [n for n, cell in enumerate(cells) if sum(cell) == distance]
    assert order.inputs == order.places[: -len(order.blocks[-1])] and order.learned == (0,) * len(order.blocks)
    numbers = iter(range(len(cells)))
    for before, block in itertools.pairwise(((), *order.blocks)):
        for place, number in zip(block, numbers, strict=False):
            for head, axis in enumerate(reversed(range(len(shape)))):
                source = order.sources[head][number]
                if not before:
                    assert source == 0
                elif cells[place][axis] == 0:
                    assert source == -1
                else:
                    step = [a - b for a, b in zip(cells[place], cells[before[source]], strict=True)]
                    assert step == [int(i == axis) for i in range(len(shape))]
    with pytest.raises(ValueError, match=r"grid \(3, 0\); needed: axes of at least one"):
        neighbor_order((3, 0))


def test_passes_and_kinds():
    model, _ = tiny(grid=(16, 16))
    assert len(model.block_kinds) == 31
    assert len(set(model.block_kinds)) == 17  # one for every length of a diagonal but 1, the first and the last
    assert model.block_kinds[1:-1] == model.block_kinds[-2:0:-1]
    assert len(tiny(grid=(4, 16, 16), positions="learned")[0].block_kinds) == 34
    assert isinstance(model, Categorical) and not isinstance(model, Windowed)


# ---------------------------------------------------------------------------------------------------- cached, visible
@pytest.mark.parametrize("kind", [*CONDITIONS, "box", "column"])
@torch.no_grad()
def test_cached_blocks_equal_the_full_pass(kind):
    shapes = {"box": BOX, "column": dict(grid=(4, 1))}
    model, condition = tiny("class", **shapes[kind]) if kind in shapes else tiny(kind)
    tokens = torch.randint(11, (3, model.num_tokens))
    place_N = torch.tensor(model.order.places)
    full = model(tokens, condition)[:, place_N]
    null = model(tokens, model.null_condition(condition))[:, place_N]
    last = len(model.block_sizes) - 1
    for guidance in (OFF, Guidance(2.5), Guidance(3.0, schedule="linear"), Guidance(2.0, interval=(1, last))):
        scale_N = torch.tensor(guidance.scales(last + 1)).repeat_interleave(torch.tensor(model.block_sizes))
        for first_of_kind in (False, True):
            result, logits = decode(model, condition, guidance, tokens, first_of_kind)
            assert torch.equal(result, tokens)
            torch.testing.assert_close(logits, null + (full - null) * scale_N[:, None], atol=3e-5, rtol=1e-5)


@torch.no_grad()
def test_a_used_state_starts_anew():
    model, condition = tiny("captions")
    without = Condition(text_BTC=condition.text_BTC)
    for first, second in ((condition, without), (without, condition)):
        state = model.start(first, Guidance(2.0))
        model.predict(state)
        model.append(state, torch.ones(3, 1, dtype=torch.int64))
        expected = model.predict(model.start(second, Guidance(2.0)))
        again = model.start(second, Guidance(2.0), state=state)
        assert torch.equal(model.predict(again), expected) and not model.result(again).any()


@pytest.mark.parametrize("changes", [{}, BOX], ids=["grid", "box"])
@torch.no_grad()
def test_a_token_is_seen_by_later_blocks_and_by_no_others(changes):
    model, condition = tiny(**changes)
    tokens = torch.randint(11, (3, model.num_tokens))
    logits = model(tokens, condition)
    block_of = {place: block for block, places in enumerate(model.order.blocks) for place in places}
    for place in range(model.num_tokens):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 11
        moved = (model(other, condition) - logits).abs().amax((0, 2))
        later = torch.tensor([block_of[n] > block_of[place] for n in range(model.num_tokens)])
        assert (moved[later] > 1e-5).all() and (moved[~later] == 0).all()


@torch.no_grad()
def test_padding_is_seen_by_nobody_and_captions_by_all():
    model, condition = tiny("captions")
    tokens = torch.randint(11, (3, model.num_tokens))
    logits = model(tokens, condition)
    for position in range(5):
        text = condition.text_BTC.clone()
        text[:, position] += 1
        changed = Condition(text_BTC=text, text_mask_BT=condition.text_mask_BT)
        moved = (model(tokens, changed) - logits).abs().amax(-1)
        valid = condition.text_mask_BT[:, position]
        assert (moved[valid] > 1e-5).all() and (moved[~valid] == 0).all()
        decoded, before = (decode(model, each, OFF, tokens)[1] for each in (changed, condition))
        assert torch.equal(decoded[~valid], before[~valid])


# ------------------------------------------------------------------------------------------------------ distributions
CASES = [
    (OFF, {}),
    (Guidance(2.0), {}),
    (Guidance(1.5), dict(temperature=0.7, top_k=2)),
    (Guidance(3.0), dict(top_p=0.8, temperature=1.3)),
]


@pytest.mark.parametrize(("guidance", "filters"), CASES)
def test_sampling_is_exact_at_every_batch_size(guidance, filters):
    model = enumerable()
    probs = joint_distribution(model, TINY.many(1, 1), guidance, **filters)
    assert abs(float(probs.sum()) - 1) < 1e-5
    settings = dict(guidance=guidance, **filters)
    draws = TINY.DRAWS // 2
    tokens = sample_ancestral(model, TINY.many(1, draws), noise=Noise(range(draws)), **settings).tokens
    assert check_distribution(tokens, probs, 3).passed
    # An image of a seed is the same in every batch, so that their distribution is, too.
    for batch in (1, 3, 8):
        parts = [Noise(range(first, first + batch)) for first in range(0, 24, batch)]
        found = [sample_ancestral(model, TINY.many(1, batch), noise=part, **settings).tokens for part in parts]
        assert torch.equal(torch.cat(found), tokens[:24])


class OneNumber(Noise):
    """A planted bug: all tokens are drawn with the number of the first."""

    def uniform(self, use, position, *settings):
        return super().uniform(use, position * 0, *settings)


def test_planted_bugs_are_found(monkeypatch):
    model = enumerable()
    probs = joint_distribution(model, TINY.many(1, 1))

    def passed(noise=Noise):
        draws = sample_ancestral(model, TINY.many(1, TINY.DRAWS), noise=noise(range(TINY.DRAWS))).tokens
        return check_distribution(draws, probs, 3).passed

    assert passed() and not passed(OneNumber)
    weights = model.tables(torch.device("cpu")).weight_HN.clone()
    model.tables(torch.device("cpu")).weight_HN[0, -1] = 1.0  # the last token's heads do not add up to 1
    assert not passed()
    model.tables(torch.device("cpu")).weight_HN.copy_(weights)
    assert passed()
    read = OrderedTransformer._read_block

    def one_by_one(self, state, x, first):  # the first token of a block does not see the others
        for number, each in enumerate(x.split(1, dim=1)):
            read(self, state, each, first + number)
        kept = [features[:, :1].clone() for features in state.features]
        read(self, state, x, first)
        for features, each in zip(state.features, kept, strict=True):
            features[:, :1].copy_(each)

    monkeypatch.setattr(OrderedTransformer, "_read_block", one_by_one)
    assert not passed()


def test_an_image_is_a_function_of_its_seed():
    model, _ = tiny(grid=(5, 4))
    settings = dict(guidance=Guidance(2.0), top_p=0.95)
    labels = torch.tensor([[0], [1], [2], [3], [4], [5], [0], [3]])
    seeds = [9, 8, 31, 2, 5, 77, 1, 0]
    batch = sample_ancestral(model, Condition(labels_BA=labels), noise=Noise(seeds), **settings).tokens
    for row, seed in enumerate(seeds):
        condition = Condition(labels_BA=labels[row : row + 1])
        assert torch.equal(sample_ancestral(model, condition, noise=Noise([seed]), **settings).tokens[0], batch[row])


def test_a_callback_sees_where_tokens_are_and_ends_the_sampling():
    model, seen = enumerable((3, 3), 4), []
    settings = dict(noise=Noise([1, 2]), guidance=Guidance(1.5))
    whole = sample_ancestral(model, TINY.labels(0, 1), **settings)
    assert whole.statistics.tokens_per_pass == {1: 4, 2: 4, 3: 2}

    def stop(done, tokens_BN):
        seen.append((done, tokens_BN.clone()))
        return done >= 3

    part = sample_ancestral(model, TINY.labels(0, 1), callback=stop, **settings)
    assert [done for done, _ in seen] == [1, 3]
    drawn = torch.zeros(9, dtype=torch.bool)
    drawn[[0, 1, 3]] = True
    assert torch.equal(part.tokens, whole.tokens * drawn) and torch.equal(part.tokens, seen[-1][1])
    first = sample_ancestral(model, TINY.labels(0, 1), callback=lambda done, _: True, **settings)
    assert torch.equal(first.tokens, whole.tokens[:, :1])


# ------------------------------------------------------------------------------------------------- files and training
def test_save_and_load(tmp_path):
    for name, changes in (("grid", {}), ("box", BOX)):
        model, condition = tiny(**changes)
        model.save_pretrained(tmp_path / name)
        loaded = NextNeighborTransformer.from_pretrained(tmp_path / name).eval()
        tokens = torch.randint(11, (3, model.num_tokens))
        with torch.no_grad():
            assert torch.equal(model(tokens, condition), loaded(tokens, condition))


def test_reset_parameters_starts_uniform():
    model, condition = tiny("captions")
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(torch.randint(11, (3, 12)), condition)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert 0.015 < model.layers[2].attention.wqkv.weight.std() < 0.025


def test_gradient_checkpointing_changes_no_gradient():
    model, condition = tiny()
    tokens, gradients = torch.randint(11, (3, 12)), []
    for _ in range(2):
        model.train().zero_grad()
        model(tokens, condition).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        model.enable_gradient_checkpointing()
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_bad_settings():
    for changes, message in (
        (dict(grid=(2, 3, 4)), "positions 'rope' on 3 axes; choose learned, or rope for two"),
        (dict(positions="sine"), "positions 'sine' on 2 axes"),
        (dict(width=18), "must be a multiple of 4"),
        (dict(num_classes=0), "are needed"),
        (dict(caption_width=4), "exclude"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny(**changes)
    with pytest.raises(ValueError, match="label 6 in column 0"):
        tiny()[0].start(TINY.labels(6))


@pytest.mark.parametrize("family", ["next_neighbor", "region_parallel"])
def test_training_end_to_end(family, tmp_path):
    data = TRAINING.write_images(tmp_path / "bars.npz")
    torch.manual_seed(0)
    small = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=16)
    VQTokenizer(image_size=8, codebook_size=32, **small).save_pretrained(tmp_path / "tokenizer")
    options = dict(steps=12, family=family, gradient_checkpointing=True)
    train_generator(TRAINING.generator_options(data, tmp_path / "tokenizer", tmp_path / "run", **options))
    losses = TRAINING.losses(tmp_path / "run")
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    pipeline = load(tmp_path / "run" / "model", device="cpu", dtype="float32")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(class_labels=["1"], seed=0, output_type="pt").images.shape == (1, 3, 8, 8)


def test_presets_have_the_released_sizes():
    millions = {"nar-b": 130.6, "nar-m": 295.5, "nar-l": 372.5, "nar-xl": 816.0, "nar-xxl": 1464.5}
    millions |= {"nar-t2i-stage1": 819.2, "nar-t2i-stage2": 819.2, "nar-ucf101-l": 368.7, "nar-ucf101-lp": 693.6}
    presets = NEXT_NEIGHBOR_PRESETS | NEXT_NEIGHBOR_BOXES
    assert presets.keys() == millions.keys()
    for name, preset in presets.items():
        with torch.device("meta"):
            model = NextNeighborTransformer(**preset)
        # The null caption is a buffer, which the paper counts.
        count = sum(value.numel() for value in model.state_dict().values())
        assert abs(count / 1e6 - millions[name]) < 0.06, name


@pytest.mark.gpu
@pytest.mark.parametrize("kind", CONDITIONS)
@torch.no_grad()
def test_captured_ids_equal_eager_ids(kind):
    from visar.core.runtime import EAGER, Runtime

    model, condition = tiny(kind)
    model, condition = model.cuda(), condition.to("cuda")
    runtime = Runtime()
    for guidance in (OFF, Guidance(2.0)):
        for seed in range(4):
            noise = Noise(image_seeds(seed, 3), "cuda")
            settings = dict(noise=noise, guidance=guidance, top_k=7, top_p=0.9)
            eager = sample_ancestral(model, condition, runtime=EAGER, **settings).tokens
            captured = sample_ancestral(model, condition, runtime=runtime, **settings).tokens
            assert torch.equal(eager, captured)
