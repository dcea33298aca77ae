"""Coarse-to-fine generator: clusters of codes, the joint distribution of both stages, samplers, files, training."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visar import load, load_tokenizer
from visar.core.condition import Condition
from visar.core.guidance import OFF, Guidance
from visar.core.interface import FineSampling, TokenLayout
from visar.core.noise import Noise, Use, image_seeds
from visar.core.runtime import EAGER, Runtime
from visar.evaluate.exactness import all_sequences, check_distribution
from visar.generators.clusters import cluster_codes, inertia
from visar.generators.coarse_to_fine import COARSE_TO_FINE_PRESETS, CoarseToFine, default_clusters
from visar.generators.families import find_family
from visar.pipelines.drafters import load_drafter
from visar.pipelines.image import ImagePipeline
from visar.samplers import stages
from visar.samplers.filtering import filter_logits, sample_logits
from visar.samplers.index import SAMPLERS
from visar.samplers.jacobi import sample_jacobi
from visar.tokenizers.vq import VQTokenizer
from visar.train.generator import train_generator
from visar.train.tokenizer import train_tokenizer

ROOT = Path(__file__).parent / "fixtures"
TINY = SimpleNamespace(**runpy.run_path(str(ROOT / "tiny.py")))
RUNS = SimpleNamespace(**runpy.run_path(str(ROOT / "training.py")))
many, labels = TINY.many, TINY.labels

CODES, CLUSTERS = 5, torch.tensor([0, 1, 0, 2, 1])
RANKS = torch.tensor([1, 0, 0, 0, 1])
FILTERS = dict(guidance=Guidance(1.5), temperature=0.8, top_k=2, top_p=0.9)
FINE = FineSampling(temperature=0.7, top_k=1000, top_p=0.95, guidance_scale=2.0)
RASTER: dict[str, dict[str, Any]] = {
    "ancestral": {},
    "jacobi": dict(window=3, coupling="maximal", initial="left"),
    "speculative": dict(num_drafts=2),
    "static_tree": dict(branches=(2, 1)),
    "dynamic_tree": dict(depth=2, children=2, nodes=3),
    "k_seq": dict(num_chains=2, num_drafts=2),
    "grouped": dict(group=1, window=3, max_gap=1.0),
    "lantern": dict(max_moved=0.1, codebook=torch.randn(CODES, 3), depth=2, children=2, nodes=3),
    "flow": dict(codebook=torch.randn(CODES, 3), steps=4),
}
EXACT = [name for name in RASTER if name not in ("lantern", "flow")]


def made(
    codes: int = CODES, clusters: int = 3, grid: tuple[int, int] = (2, 2), set_clusters: bool = True, **changes: Any
) -> CoarseToFine:
    """A model whose conditionals differ."""
    sizes: dict[str, Any] = dict(width=8, num_layers=1, num_heads=1, hidden_width=16, num_classes=2)
    sizes |= dict(fine_width=8, fine_layers=1, fine_heads=1, fine_hidden_width=16)
    model = CoarseToFine(vocab_size=codes, clusters=clusters, grid=grid, **{**sizes, **changes}).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    if set_clusters:
        model.set_clusters(CLUSTERS, RANKS)
    return model


@torch.no_grad()
def joint(model: CoarseToFine, label: int, guidance: Guidance = OFF, **filters: Any) -> torch.Tensor:
    """Probabilities [J] of all images of a class, by teacher forcing of both stages."""
    sequences = all_sequences(model.config["vocab_size"], model.num_tokens)
    given = many(label, len(sequences))
    pairs = list(zip(model(sequences, given), model(sequences, model.null_condition(given)), strict=True))
    settings = model.fine_sampling
    fine = dict(temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    scales = guidance.at(0, 1), settings.guidance_scale
    total = torch.ones(len(sequences), dtype=torch.float64)
    ids = model.cluster_of[sequences], sequences
    for (logits, null), scale, each, own in zip(pairs, scales, ids, (filters, fine), strict=True):
        assert logits is not None and null is not None
        guided = torch.where(null.isinf(), null, null + (logits - null) * scale)
        probs = filter_logits(guided, **own).double().softmax(-1)
        total *= probs.gather(-1, each[..., None]).squeeze(-1).prod(-1)
    return total


def draws(model: Any, name: str, count: int, label: int = 1, **settings: Any):
    seeds = Noise(image_seeds(0, count))
    return SAMPLERS[name].load()(model, many(label, count), noise=seeds, **RASTER[name], **settings)


# ------------------------------------------------------------------------------------------------------- clusters
@pytest.mark.parametrize("codes, clusters", [(100, 7), (96, 8), (20, 20), (20, 1), (33, 32)])
def test_clusters_of_codes(codes, clusters):
    vectors = torch.randn(codes, 3, generator=torch.Generator().manual_seed(codes))
    found = {}
    for balanced in (True, False):
        cluster_V, rank_V = cluster_codes(vectors, clusters, balanced=balanced)
        sizes = torch.bincount(cluster_V, minlength=clusters)
        assert len(sizes) == clusters and sizes.min() >= 1
        if balanced:
            assert sizes.max() - sizes.min() <= 1
        for cluster in range(clusters):
            inside = (cluster_V == cluster).nonzero()[:, 0]
            assert sorted(rank_V[inside].tolist()) == list(range(len(inside)))
            distance = (vectors[inside] - vectors[inside].mean(0)).norm(dim=-1)
            assert (distance[rank_V[inside].argsort()].diff() >= -1e-6).all()
        found[balanced] = inertia(vectors, cluster_V)
        assert found[balanced] <= inertia(vectors, torch.arange(codes) * clusters // codes)
    assert found[False] <= found[True] * 1.05
    with pytest.raises(ValueError, match=f"clusters {codes + 1}; allowed: 1 ... {codes}"):
        cluster_codes(vectors, codes + 1)


def test_more_iterations_are_never_worse():
    vectors = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    for balanced in (True, False):
        values = [
            inertia(vectors, cluster_codes(vectors, 9, balanced=balanced, iterations=count)[0]) for count in (0, 1, 5)
        ]
        if not balanced:
            assert values[0] >= values[1] >= values[2] and values[0] > values[2]
        assert values[2] < 0.5 * inertia(vectors, torch.arange(300) * 9 // 300)


def test_clusters_depend_on_the_seed_alone():
    vectors = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(cluster_codes(vectors, 40, seed=1))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))
    assert not torch.equal(cluster_codes(vectors, 40, seed=2)[0], results[0][0])
    same = torch.ones(12, 2)
    for balanced in (True, False):
        assert torch.bincount(cluster_codes(same, 4, balanced=balanced)[0], minlength=4).min() >= 1


@pytest.mark.parametrize("name", ["emoji-vq", "emoji-vq-4096"])
def test_codes_of_one_cluster_look_alike(name):
    tokenizer: Any = load_tokenizer(name, device="cpu", dtype="float32")
    codebook = tokenizer.codebook.detach()
    cluster_V, _ = cluster_codes(codebook, default_clusters(len(codebook)))
    generator = torch.Generator().manual_seed(0)
    side = torch.linspace(-1, 1, 64)
    discs = (side[:, None] ** 2 + side**2 < 0.5).float()
    images = 1 - discs * torch.rand(2, 3, 1, 1, generator=generator) * 2
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        shown = tokenizer.decode(tokens)
        errors = []
        for same in (True, False):
            fits = (cluster_V == cluster_V[tokens][..., None]) == same
            fits &= torch.arange(len(codebook)) != tokens[..., None]
            picks = torch.multinomial(fits.flatten(0, 1).float(), 1, generator=generator).view_as(tokens)
            assert (cluster_V[picks] == cluster_V[tokens]).all() == same
            errors.append(float((tokenizer.decode(picks) - shown).square().mean()))
    assert errors[0] < 0.2 * errors[1], errors


def test_clusters_that_do_not_fit_are_refused():
    model = made()
    for clusters, ranks, message in (
        (CLUSTERS[:4], RANKS[:4], r"needed: \(5,\)"),
        (CLUSTERS.clamp(max=1), RANKS, r"clusters 2 of 0 \.\.\. 1; needed: all of 0 \.\.\. 2"),
        (CLUSTERS - 1, RANKS, r"clusters 3 of -1"),
        (CLUSTERS, torch.zeros(5, dtype=torch.int64), "ranks of the codes; needed: 0, 1"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_clusters(clusters, ranks)
    for changes, message in (
        (dict(clusters=6), "clusters 6; allowed: 1 ... 5"),
        (dict(fine_heads=3), "fine_width 8, fine_heads 3"),
        (dict(num_classes=0), "num_classes"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**changes)


# --------------------------------------------------------------------------------------------- the joint distribution
def test_the_likelihood_is_exact():
    model = made()
    sequences = all_sequences(CODES, 4)
    with torch.no_grad():
        coarse, fine = model.log_probs(sequences, many(1, len(sequences)))
    total = (coarse + fine).sum(1).double().exp()
    assert total.sum().item() == pytest.approx(1.0, abs=1e-5)
    torch.testing.assert_close(total, joint(model, 1), atol=1e-8, rtol=1e-4)
    for filters in ({}, FILTERS):
        model.fine_sampling = FINE if filters else FineSampling()
        assert joint(model, 0, **filters).sum().item() == pytest.approx(1.0, abs=1e-5)
    with torch.no_grad():  # given the labels, every cluster's codes have all the mass
        logits = model(sequences[:50], many(0, 50)).fine
    assert logits is not None
    inside = model.cluster_of == model.cluster_of[sequences[:50]][..., None]
    assert torch.equal(logits.isinf(), ~inside)


@pytest.mark.parametrize("settings", [{}, FILTERS])
def test_ancestral_draws_follow_the_joint(settings):
    model = made()
    model.fine_sampling = FINE if settings else FineSampling()
    out = draws(model, "ancestral", 100_000 if settings else TINY.DRAWS, **settings)
    check = check_distribution(out.tokens, joint(model, 1, **settings), CODES)
    assert check.passed, check
    assert out.statistics.forward_passes == {"generator": 4, "fine": 1}
    for batch in (1, 3, 8):  # an image of a seed is the same in every batch
        few = draws(model, "ancestral", batch, **settings)
        assert torch.equal(few.tokens, out.tokens[:batch])
    alone = SAMPLERS["ancestral"].load()(model, many(1, 1), noise=Noise([5]), **settings)
    assert torch.equal(alone.tokens, out.tokens[5:6])


@pytest.mark.parametrize("name", EXACT[1:])
def test_samplers_of_the_first_stage_stay_exact(name):
    model = made()
    model.fine_sampling = FINE
    out = draws(model, name, TINY.DRAWS if name in ("jacobi", "static_tree") else TINY.DRAWS // 4, **FILTERS)
    check = check_distribution(out.tokens, joint(model, 1, **FILTERS), CODES)
    assert check.passed, check
    assert out.statistics.mean_tokens_per_pass > 1.0


@pytest.mark.parametrize("name", RASTER)
def test_samplers_draw_the_labels_as_of_any_other_model(name):
    model, settings = made(grid=(3, 4)), RASTER[name]
    assert SAMPLERS[name].fits(model)
    SAMPLERS[name].check(model, {"guidance": OFF, **settings})
    out = draws(model, name, 6, **FILTERS)
    own = {**settings, "codebook": model.centres(settings["codebook"])} if "codebook" in settings else settings
    given = dict(noise=Noise(image_seeds(0, 6)), **own, **FILTERS)
    plain = SAMPLERS[name].load()(model.coarse, many(1, 6), **given)
    assert torch.equal(model.cluster_of[out.tokens], plain.tokens)
    assert out.statistics.tokens_per_pass == plain.statistics.tokens_per_pass
    assert out.statistics.proposed == plain.statistics.proposed
    assert (out.outcome_BN is None) == (plain.outcome_BN is None)
    by_name = SAMPLERS[name].load()(model=model, condition=many(1, 6), **{**given, **settings})
    assert torch.equal(by_name.tokens, out.tokens)


def fails(model: CoarseToFine, name: str = "ancestral", **settings: Any) -> bool:
    out = draws(model, name, TINY.DRAWS, **settings)
    return not check_distribution(out.tokens, joint(model, 1, **settings), CODES).passed


def test_planted_bugs_are_caught(monkeypatch):
    model = made()
    assert not fails(model)
    with monkeypatch.context() as patch:  # codes drawn by the labels' numbers
        patch.setattr(stages, "Use", SimpleNamespace(FINE=Use.TOKEN))
        assert fails(model)
    with monkeypatch.context() as patch:  # one number for all codes of an image
        uniform = Noise.uniform
        patch.setattr(Noise, "uniform", lambda self, use, place: uniform(self, use, place * (use != Use.FINE)))
        assert fails(model)
    with monkeypatch.context() as patch:  # codes that do not read all labels
        before = torch.tensor([0, 0, 1, 1])

        def shortened(self, state, labels_BN, first=0):
            every = self.fine(labels_BN * before, state.vector_RD[first : first + len(labels_BN)])
            return self._inside(every, labels_BN)

        patch.setattr(CoarseToFine, "fine_logits", shortened)
        assert fails(model)
    model.fine_sampling = FineSampling(guidance_scale=2.0)
    assert not fails(model)
    with monkeypatch.context() as patch:  # another strength
        patch.setattr(stages, "Guidance", lambda scale: Guidance(3.0))
        assert fails(model)


def test_a_batch_in_parts_and_replayed_steps(monkeypatch):
    model, runtime = made(grid=(3, 4)), TINY.ReplayRuntime()
    model.fine_sampling = FINE
    conditions = [Condition(labels_BA=torch.tensor(each)[:, None]) for each in ([0, 1, 1, 0, 1], [1, 0, 2, 1, 0])]
    for number, condition in enumerate(conditions):
        noise = Noise(image_seeds(100 * number, 5))
        given: dict[str, Any] = dict(noise=noise, window=3, **FILTERS)
        whole = sample_jacobi(model, condition, runtime=EAGER, **given)
        replayed = sample_jacobi(model, condition, runtime=runtime, **given)
        assert torch.equal(whole.tokens, replayed.tokens)
        with monkeypatch.context() as patch:
            patch.setattr(stages, "LARGEST", 2 * 12 * CODES)
            parts = sample_jacobi(model, condition, runtime=EAGER, **given)
        assert torch.equal(whole.tokens, parts.tokens) and parts.statistics.forward_passes["fine"] == 3
    assert sum("fine" in map(str, session.steps) for session in runtime.replayed.values()) == 1


@pytest.mark.parametrize("settings", [{}, dict(top_k=1000), dict(top_k=2), dict(top_p=0.6)], ids=str)
def test_codes_are_drawn_inside_their_cluster_by_the_kernel(device, monkeypatch, settings):
    generator = torch.Generator().manual_seed(0)
    cluster_V, label = torch.arange(300) * 40 // 300, torch.arange(12) * 3
    logits = (2 * torch.randn(12, 300, generator=generator)).masked_fill(cluster_V != label[:, None], -torch.inf)
    uniform = (torch.rand(12, generator=generator) * 0.99 + 0.005).to(device)
    got = sample_logits(logits.to(device), uniform, **settings).cpu()
    assert torch.equal(cluster_V[got], label)
    monkeypatch.setenv("VISAR_TRITON", "0")
    plain = sample_logits(logits.to(device), uniform, **settings).cpu()
    assert (got == plain).float().mean() > 0.9  # the same but for uniforms at the border of two codes


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captured_steps_on_a_gpu(dtype):
    model = made(
        codes=2000, clusters=60, grid=(4, 5), width=64, fine_width=64, num_heads=2, fine_heads=2, set_clusters=False
    )
    torch.nn.Module.to(model.cuda(), dtype)
    runtime = Runtime()
    for seed, label in ((0, 0), (10, 1), (20, 1)):
        for settings in (FineSampling(), FineSampling(0.9, 20, 0.95, 2.0)):
            model.fine_sampling = settings
            for name in ("ancestral", "jacobi", "static_tree"):
                given: dict[str, Any] = dict(noise=Noise(image_seeds(seed, 3), "cuda"), guidance=Guidance(1.5))
                condition = many(label, 3).to("cuda")
                sample = SAMPLERS[name].load()
                captured = sample(model, condition, runtime=runtime, **given)
                eager = sample(model, condition, runtime=EAGER, **given)
                assert captured.tokens.shape == (3, 20) and captured.statistics.forward_passes["fine"] == 1
                if dtype == torch.float32:
                    assert torch.equal(captured.tokens, eager.tokens)


def test_every_code_is_of_its_label_and_as_many_clusters_as_codes_or_one():
    model = made(clusters=5, set_clusters=False)
    sequences = all_sequences(CODES, 4)
    with torch.no_grad():
        coarse, fine = model.log_probs(sequences, many(0, len(sequences)))
        assert fine.abs().max() == 0.0
        flat = model.coarse(sequences, many(0, len(sequences))).log_softmax(-1)
    assert torch.equal(coarse, flat.gather(-1, sequences[..., None]).squeeze(-1))
    flat_draws = draws(model.coarse, "ancestral", 50, **FILTERS)
    assert torch.equal(draws(model, "ancestral", 50, **FILTERS).tokens, flat_draws.tokens)
    model = made(clusters=1, set_clusters=False)
    with torch.no_grad():
        coarse, fine = model.log_probs(sequences, many(0, len(sequences)))
    assert coarse.abs().max() == 0.0 and fine.max() < 0.0
    assert not fails(model)


def test_callbacks_see_codes_and_end_a_sampling():
    model, seen = made(grid=(3, 4)), []

    def watch(done, tokens_BN):
        seen.append((done, tokens_BN.clone()))
        return stop and done >= 5

    stop = False
    out = draws(model, "ancestral", 3, callback=watch)
    assert [done for done, _ in seen] == [*range(1, 13), 12]
    assert torch.equal(seen[-1][1], out.tokens)
    central = torch.tensor([2, 1, 3])  # the codes of rank 0
    assert torch.equal(model.preview(torch.arange(3)), central)
    for done, tokens in seen[:-1]:
        assert torch.equal(tokens[:, :done], central[CLUSTERS[out.tokens[:, :done]]])
        assert not tokens[:, done:].any()
    stop = True
    part = draws(model, "ancestral", 3, callback=watch)
    assert torch.equal(part.tokens, seen[4][1][:, :5])
    assert "fine" not in part.statistics.forward_passes


def test_settings_of_the_second_stage_are_checked():
    model = made()
    for settings, message in (
        (FineSampling(temperature=0.0), "temperature 0.0"),
        (FineSampling(top_p=1.5), "top_p 1.5"),
        (FineSampling(guidance_scale=-1.0), "guidance scale -1.0"),
    ):
        model.fine_sampling = settings
        for call in (draws, lambda model, name, count: SAMPLERS[name].check(model, {"guidance": OFF})):
            with pytest.raises(ValueError, match=message):
                call(model, "ancestral", 2)
    model.fine_sampling = FineSampling()
    with pytest.raises(ValueError, match="a codebook of 3 codes for a model of 5"):
        SAMPLERS["grouped"].check(model, {"guidance": OFF, "codebook": torch.randn(3, 2)})
    with pytest.raises(ValueError, match="4 children per node of a vocabulary of 3"):
        SAMPLERS["static_tree"].check(model, {"guidance": OFF, "branches": (4, 1)})
    assert not SAMPLERS["masked"].fits(model) and not SAMPLERS["next_scale"].fits(model)


def test_the_mean_of_a_cluster_is_its_vector():
    model, codebook = made(), torch.randn(CODES, 3)
    expected = torch.stack([codebook[CLUSTERS == cluster].mean(0) for cluster in range(3)])
    torch.testing.assert_close(model.centres(codebook), expected)


# ---------------------------------------------------------------------------------------------- files and training
@pytest.mark.parametrize("storage", ["plain", "int8"])
def test_save_and_load(tmp_path, storage):
    torch.manual_seed(0)
    sizes = dict(base_channels=32, channel_multipliers=(1, 1), num_res_blocks=1, latent_channels=16)
    tokenizer: Any = VQTokenizer(image_size=4, codebook_size=CODES, **sizes).eval()
    model = made()
    model.fine_sampling = FINE
    ImagePipeline(tokenizer, model).save_pretrained(tmp_path / "model", storage=storage)
    pipeline = load(tmp_path / "model", device="cpu", dtype="float32")
    again: Any = pipeline.generator
    assert isinstance(again, CoarseToFine) and again.fine_sampling == FINE
    assert torch.equal(again.cluster_of, CLUSTERS) and torch.equal(again.rank_of, RANKS)
    if storage == "plain":
        for sampler in ("ancestral", "jacobi"):
            mine = SAMPLERS[sampler].load()(model, many(1, 3), noise=Noise([1, 2, 3]), **FILTERS)
            general = {name: value for name, value in FILTERS.items() if name != "guidance"}
            theirs = pipeline(
                class_labels=[1] * 3, seed=1, sampler=sampler, guidance_scale=1.5, output_type="pt", **general
            )
            assert torch.equal(mine.tokens, theirs.tokens)
        assert load(tmp_path / "model", device="cpu", dtype="bfloat16").generator.cluster_of.dtype == torch.int64
    # A smaller model of the same clusters drafts labels.
    out = pipeline(
        class_labels=[1], seed=1, sampler="speculative", sampler_options=dict(drafter=str(tmp_path / "model"))
    )
    assert out.statistics.forward_passes["drafter"] and out.statistics.forward_passes["fine"] == 1
    with pytest.raises(ValueError, match="the drafter's vocabulary and grid are"):
        load_drafter(tmp_path / "model", made(clusters=4, set_clusters=False).coarse)


def test_gradients_are_the_same_with_activations_made_again():
    found = []
    tokens = torch.randint(CODES, (3, 4), generator=torch.Generator().manual_seed(0))
    for again in (False, True):
        model = made().train()
        if again:
            model.enable_gradient_checkpointing()
            assert model.coarse.gradient_checkpointing and model.fine.gradient_checkpointing
        coarse, fine = model.log_probs(tokens, many(1, 3))
        (coarse.sum() + fine.sum()).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(*found, strict=True))


def test_training_of_both_stages_or_of_one(tmp_path):
    data = RUNS.write_images(tmp_path / "bars.npz")
    train_tokenizer(RUNS.tokenizer_options(data, tmp_path / "tokenizer", steps=4))
    tokenizer = tmp_path / "tokenizer" / "model"
    common: dict[str, Any] = dict(family="coarse_to_fine", model_options='{"clusters": 5}', sample_guidance=1.5)
    options = RUNS.generator_options(data, tokenizer, tmp_path / "both", **common)
    train_generator(options)
    found = RUNS.losses(tmp_path / "both")
    assert sum(found[-3:]) < 0.95 * sum(found[:3])
    pipeline = load(tmp_path / "both" / "model", device="cpu", dtype="float32")
    generator: Any = pipeline.generator
    sizes = torch.bincount(generator.cluster_of)
    assert len(sizes) == 5 and sizes.max() - sizes.min() <= 1
    expected, _ = cluster_codes(load_tokenizer(str(tokenizer), device="cpu", dtype="float32").codebook, 5)
    assert torch.equal(generator.cluster_of, expected)
    for sampler, settings in (("jacobi", dict(window=4)), ("static_tree", {}), ("grouped", {})):
        out = pipeline(class_labels=["1"], seed=0, sampler=sampler, sampler_options=settings, output_type="pt")
        assert out.images.shape == (1, 3, 8, 8) and out.statistics.forward_passes["fine"] == 1

    weights = ("1,0", "0,1")
    for name, pair in zip(("coarse", "fine"), weights, strict=True):
        own = dict(scale_weights=tuple(map(float, pair.split(","))), initial=tmp_path / "both" / "model")
        train_generator(RUNS.generator_options(data, tokenizer, tmp_path / name, **common, **own, steps=3))
        after = load(tmp_path / name / "model", device="cpu", dtype="float32").generator.state_dict()
        before = generator.state_dict()
        changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
        assert changed == {name}
    with pytest.raises(ValueError, match="needed: 2 numbers >= 0"):
        train_generator(
            RUNS.generator_options(data, tokenizer, tmp_path / "no", **common, scale_weights=(1.0, 1.0, 1.0))
        )


def test_sizes_and_what_fits():
    assert set(COARSE_TO_FINE_PRESETS) == {"ctf-b", "ctf-l", "ctf-xl"}
    with torch.device("meta"):
        model = CoarseToFine(**COARSE_TO_FINE_PRESETS["ctf-b"])
    counts = [sum(each.numel() for each in part.parameters()) for part in (model.coarse, model.fine)]
    assert [round(count / 1e6) for count in counts] == [87, 321]
    layout = TokenLayout(((4, 4),), "grid", 16, 8)
    assert find_family("coarse_to_fine", layout).model is CoarseToFine
