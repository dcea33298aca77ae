"""Raster transformer: parity with LlamaGen and D-AR, cached against full passes, windows, ragged rows, conditions."""

import math
from dataclasses import replace

import pytest
import torch

from visar.core.condition import NULL_WORD, Condition
from visar.core.guidance import OFF, Guidance
from visar.core.noise import Noise, image_seeds
from visar.generators.raster import RasterGPT
from visar.samplers.ancestral import sample_ancestral
from visar.samplers.filtering import filter_logits


def from_parity(folder, rope):
    """Our model with a parity folder's weights."""
    config, arguments = folder.config, folder.config["constructor"]["ModelArgs"]
    side = math.isqrt(arguments["block_size"])
    text = arguments["model_type"] == "t2i"
    model = RasterGPT(
        vocab_size=arguments["vocab_size"],
        grid=(side, side) if side**2 == arguments["block_size"] else (1, arguments["block_size"]),
        width=arguments["dim"],
        num_layers=arguments["n_layer"],
        num_heads=arguments["n_head"],
        hidden_width=config["derived"]["ffn_hidden"],
        num_classes=0 if text else arguments["num_classes"],
        caption_width=arguments["caption_dim"] if text else 0,
        caption_length=arguments["cls_token_num"] if text else 120,
        rope=rope,
    )
    model.load_state_dict(folder.checkpoint())
    return model.eval()


def greedy(model, condition, guidance):
    """Arg-max decoding through the cache, and the unguided logits of every step."""
    state, raw = model.start(condition, guidance), []
    for block in range(model.num_tokens):
        state.block = block
        raw.append(model.raw_logits(state))
        model.append(state, model.predict(state).argmax(-1))
    return state.tokens[:, : model.num_tokens], torch.cat(raw, 1)


@pytest.mark.parametrize(("system", "rope"), [("llamagen_gpt_c2i", "2d"), ("dar_gpt", "1d")])
@torch.no_grad()
def test_class_conditional_parity(parity, system, rope):
    folder = parity(system)
    model, io = from_parity(folder, rope), folder.io
    logits = model(io["tf.tokens"], Condition(labels_BA=io["tf.labels"].long()[:, None]))
    torch.testing.assert_close(logits, io["tf.logits"], atol=3e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), io["tf.tokens"].flatten())
    torch.testing.assert_close(loss[None], io["tf.loss"], atol=3e-5, rtol=0)
    condition = Condition(labels_BA=torch.tensor(folder.config["greedy_labels"])[:, None])
    cases = [key.removesuffix(".tokens") for key in io if key.startswith("greedy.") and key.endswith(".tokens")]
    assert cases
    for case in cases:
        name = case.removeprefix("greedy.cfg")
        if "to" in name:
            first, last = (float(value) for value in name.split("to"))
            guidance = Guidance(last, schedule="linear", start=first)
        elif "_interval" in name:
            scale, interval = name.split("_interval")
            guidance = Guidance(float(scale), interval=(0, int(interval) + 1))
        else:
            guidance = Guidance(float(name))
        tokens, raw = greedy(model, condition, guidance)
        assert torch.equal(tokens, io[f"{case}.tokens"].long()), case
        if raw.shape == io[f"{case}.raw_logits"].shape:
            torch.testing.assert_close(raw, io[f"{case}.raw_logits"], atol=3e-5, rtol=0)
        else:
            assert not guidance.active(model.num_tokens)
            torch.testing.assert_close(raw, io[f"{case}.raw_logits"][: len(raw)], atol=3e-5, rtol=0)
        sampled = sample_ancestral(
            model, condition, noise=Noise(image_seeds(0, condition.batch)), guidance=guidance, top_k=1
        )
        assert torch.equal(sampled.tokens, tokens)


@torch.no_grad()
def test_caption_parity(parity):
    folder = parity("llamagen_gpt_t2i")
    model, io = from_parity(folder, "2d"), folder.io
    condition = Condition(text_BTC=io["in.caption_emb"], text_mask_BT=io["in.caption_mask"].bool())
    logits = model(io["tf.tokens"], condition)
    torch.testing.assert_close(logits, io["tf.logits_image"], atol=3e-5, rtol=0)
    null = model(io["tf.tokens"], model.null_condition(condition))
    torch.testing.assert_close(null, io["tf.logits_image_uncond"], atol=3e-5, rtol=0)
    valid = io["tf.valid"]
    entropy = torch.nn.functional.cross_entropy(logits.transpose(1, 2), io["tf.tokens"], reduction="none")
    loss = (entropy * valid[:, None]).sum() / (valid.sum() * entropy.shape[1]).clamp(min=1)
    torch.testing.assert_close(loss[None], io["tf.loss"], atol=3e-5, rtol=0)
    for scale in folder.config["greedy_cfg_scales"]:
        tokens, raw = greedy(model, condition, Guidance(scale))
        assert torch.equal(tokens, io[f"greedy.cfg{scale}.tokens"].long())
        torch.testing.assert_close(raw, io[f"greedy.cfg{scale}.raw_logits"][: len(raw)], atol=3e-5, rtol=0)
    for key in io:
        if key.startswith("greedy.nomask_cfg") and key.endswith(".tokens"):
            scale = float(key.removeprefix("greedy.nomask_cfg").removesuffix(".tokens"))
            tokens, _ = greedy(model, Condition(text_BTC=io["in.caption_emb"]), Guidance(scale))
            assert torch.equal(tokens, io[key].long())


def test_filter_parity(parity):
    folder = parity("llamagen_gpt_c2i")
    io = folder.io
    for case in folder.config["filter_cases"]:
        filtered = filter_logits(io["filter.logits"], top_k=case["top_k"], top_p=case["top_p"])
        assert torch.equal(filtered, io[f"filter.out_k{case['top_k']}_p{case['top_p']}"]), case
    assert torch.equal(filter_logits(io["filter.ties_logits"], top_k=4), io["filter.ties_out_k4_p1.0"])
    last = io["filter.sample_logits3d"][:, -1]
    probability = torch.softmax(filter_logits(last, temperature=0.7, top_k=8, top_p=0.9), -1)
    torch.testing.assert_close(probability, io["filter.sample_probs_t0.7_k8_p0.9"], atol=1e-6, rtol=0)
    assert torch.equal(last.argmax(-1, keepdim=True), io["filter.sample_greedy_idx"])


CONDITIONS = {
    "class": dict(num_classes=5),
    "attributes": dict(num_classes=5, attributes=(3, 2)),
    "word sum": dict(num_classes=5, word_vocab_size=9, num_words=4),
    "word prefix": dict(num_classes=0, word_vocab_size=9, num_words=4, words="prefix", prefix_rotation="identity"),
    "captions": dict(num_classes=0, caption_width=6, caption_length=5),
}


def tiny(kind, **changes) -> tuple[RasterGPT, Condition]:
    torch.manual_seed(0)
    settings = dict(vocab_size=11, grid=(3, 2), width=16, num_layers=2, num_heads=2, hidden_width=24)
    model = RasterGPT(**settings, **CONDITIONS[kind], **changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    words = torch.tensor([[2, 3, 0], [4, 5, 6], [1, 0, 0]])
    if kind == "captions":
        mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
        return model, Condition(text_BTC=torch.randn(3, 5, 6) * mask[..., None], text_mask_BT=mask)
    columns = 0 if kind == "word prefix" else 1 + len(model.config["attributes"])
    labels = torch.tensor([[0, 1, 0], [4, 3, 1], [5, 0, 2]])[:, :columns] if columns else None
    return model, Condition(labels_BA=labels, words_BT=words if "word" in kind else None)


@torch.no_grad()
def test_a_used_state_takes_captions_with_and_without_a_mask():
    model, masked = tiny("captions")
    for first, second in ((masked, replace(masked, text_mask_BT=None)), (replace(masked, text_mask_BT=None), masked)):
        expected = model.predict(model.start(second))
        again = model.start(second, state=model.start(first))
        torch.testing.assert_close(model.predict(again), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("rope", ["2d", "1d"])
@torch.no_grad()
def test_cached_steps_windows_and_ragged_rows_equal_the_full_pass(kind, rope):
    model, condition = tiny(kind, rope=rope)
    tokens = torch.randint(11, (3, 6), generator=torch.Generator().manual_seed(2))
    full = model(tokens, condition)
    null = model(tokens, model.null_condition(condition))
    guided = null + (full - null) * 1.7
    for guidance, expected in ((OFF, full), (Guidance(1.7), guided)):
        state = model.start(condition, guidance)
        for n in range(6):
            state.block = n
            torch.testing.assert_close(model.predict(state)[:, 0], expected[:, n], atol=2e-5, rtol=1e-5)
            model.append(state, tokens[:, n : n + 1])
        ragged = model.start(condition, guidance, ragged=True, window=3)
        for counts in ([1, 3, 0], [2, 1, 2], [0, 1, 1], [3, 1, 3]):
            at = ragged.length.clone()
            drafts = torch.stack([torch.nn.functional.pad(tokens[b], (0, 4))[at[b] : at[b] + 3] for b in range(3)])
            logits = model.verify(ragged, drafts)
            for b in range(3):
                for slot in range(4):
                    if at[b] + slot < 6:
                        torch.testing.assert_close(logits[b, slot], expected[b, at[b] + slot], atol=2e-5, rtol=1e-5)
            # What was drafted beyond the committed tokens is forgotten, also when it was wrong.
            model.verify(ragged, (drafts + 1) % 11)
            model.verify(ragged, drafts)
            model.commit(ragged, drafts, torch.tensor(counts))
        assert torch.equal(ragged.tokens[:, :6], tokens)
        assert ragged.length.tolist() == [6, 6, 6]


@torch.no_grad()
def test_state_can_be_used_again():
    model, condition = tiny("word prefix")
    noise = Noise([3, 4, 5])
    state = model.start(condition, Guidance(2.0))
    for n in range(6):
        state.block = n
        model.append(state, model.predict(state).argmax(-1))
    first = state.tokens.clone()
    other = sample_ancestral(model, condition, noise=noise, guidance=Guidance(2.0)).tokens
    again = model.start(condition, Guidance(2.0), state=state)
    assert again is state
    for n in range(6):
        state.block = n
        model.append(state, model.predict(state).argmax(-1))
    assert torch.equal(state.tokens, first) and other.shape == (3, 6)


@torch.no_grad()
def test_codebook_input_equals_a_table_of_mapped_codes():
    model, condition = tiny("class", token_input="codebook", codebook_width=3)
    codebook = torch.randn(11, 3)
    model.set_codebook(codebook)
    table, _ = tiny("class")
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("codebook")}
    table.load_state_dict({**weights, "tok_embeddings.weight": model.codebook_proj(codebook)})
    tokens = torch.randint(11, (3, 6))
    torch.testing.assert_close(model(tokens, condition), table(tokens, condition))
    torch.testing.assert_close(model(codebook[tokens], condition), model(tokens, condition))
    with pytest.raises(ValueError, match="codebook"):
        model.set_codebook(torch.randn(5, 3))
    with pytest.raises(ValueError, match="table"):
        table.set_codebook(codebook)


@torch.no_grad()
def test_null_condition_and_padding():
    model, condition = tiny("word sum")
    null = model.null_condition(condition)
    assert null.labels_BA.tolist() == [[5]] * 3 and null.words_BT.tolist() == [[NULL_WORD, 0, 0]] * 3
    tokens = torch.randint(11, (3, 6))
    longer = Condition(labels_BA=condition.labels_BA, words_BT=torch.nn.functional.pad(condition.words_BT, (0, 1)))
    torch.testing.assert_close(model(tokens, condition), model(tokens, longer))


def test_prefix_rotation_and_rope_kind_matter():
    model, condition = tiny("attributes")
    tokens = torch.randint(11, (3, 6))
    for changes in (dict(prefix_rotation="identity"), dict(rope="1d")):
        other, _ = tiny("attributes", **changes)
        other.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert (model(tokens, condition) - other(tokens, condition)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_classes=0), "needed"),
        (dict(num_classes=3, caption_width=4), "exclude"),
        (dict(width=18), "multiple of 4"),
        (dict(rope="3d"), "3d"),
        (dict(prefix_rotation="half"), "half"),
        (dict(token_input="pixels"), "pixels"),
        (dict(words="mean"), "mean"),
    ],
)
def test_bad_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        RasterGPT(**{"vocab_size": 4, "width": 16, "num_heads": 2, "num_layers": 1, "hidden_width": 8} | settings)


def test_bad_conditions():
    model, _ = tiny("attributes")
    for condition, message in (
        (Condition(labels_BA=torch.tensor([[6, 0, 0]])), "label 6 in column 0"),
        (Condition(labels_BA=torch.tensor([[0, -1, 0]])), "label -1 in column 1"),
        (Condition(labels_BA=torch.tensor([[0]])), r"labels \[B, 3\]"),
        (Condition(words_BT=torch.tensor([[2]])), r"labels \[B, 3\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.start(condition)
    words, _ = tiny("word prefix")
    with pytest.raises(ValueError, match="up to 4"):
        words.start(Condition(words_BT=torch.zeros(1, 5, dtype=torch.int64)))
    captions, _ = tiny("captions")
    with pytest.raises(ValueError, match="text features"):
        captions.start(Condition(text_BTC=torch.zeros(1, 4, 6)))


def test_save_and_load(tmp_path):
    model, condition = tiny("attributes", token_input="codebook", codebook_width=3)
    model.save_pretrained(tmp_path)
    loaded = RasterGPT.from_pretrained(tmp_path).eval()
    tokens = torch.randint(11, (3, 6))
    with torch.no_grad():
        assert torch.equal(model(tokens, condition), loaded(tokens, condition))


def test_reset_parameters_starts_uniform():
    model, condition = tiny("attributes")
    model.reset_parameters(torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(torch.randint(11, (3, 6)), condition)
    assert torch.equal(logits, torch.zeros_like(logits))
    assert 0.015 < model.layers[0].attention.wqkv.weight.std() < 0.025


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
