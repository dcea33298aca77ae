"""An image depends on its seed and condition only: every setting of every sampler, in batches of any make-up."""

import runpy
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from visar.core.guidance import Guidance
from visar.core.noise import Noise, image_seeds
from visar.generators.causal_continuous import CausalContinuous
from visar.generators.hierarchical_masked import HierarchicalMaskedTransformer
from visar.generators.masked import MaskedGenerator
from visar.generators.one_step import student_of
from visar.generators.raster import RasterGPT
from visar.samplers.drafters.eagle import FeatureDrafter
from visar.samplers.drafters.heads import SpatialHeads
from visar.samplers.drafters.model import ModelDrafter
from visar.samplers.drafters.ngram import NgramDrafter
from visar.samplers.flow import code_scale
from visar.samplers.index import SAMPLERS
from visar.samplers.jacobi_drafts import COUPLINGS, INITIALS

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "tiny.py")))
IMAGES = 16
FILTERS = dict(temperature=0.9, top_k=7, top_p=0.9)
BOOK = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
GRID = (2, 5)
SHAPE = dict(vocab_size=8, grid=GRID, width=16)


def random_drafter(kind):
    """A drafter with weights that make its drafts differ."""
    torch.manual_seed(1)
    if kind is ModelDrafter:
        return ModelDrafter(TINY.transformer(8, GRID, seed=1, layers=1))
    drafter = kind(**SHAPE, **(dict(num_heads=2, hidden_width=16) if kind is FeatureDrafter else {})).eval()
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return drafter


def random_teacher():
    """A model that a one-step student can be made of."""
    torch.manual_seed(2)
    teacher = RasterGPT(
        **SHAPE, num_layers=1, num_heads=2, hidden_width=32, num_classes=2, token_input="codebook", codebook_width=4
    ).eval()
    teacher.set_codebook(BOOK)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return teacher


def over_vectors(distance=0.0):
    """A model of continuous tokens, with its weights moved by `distance`."""
    head = dict(width=8, depth=1, prediction="velocity", variance="large")
    sizes = dict(width=16, num_layers=1, num_heads=2, hidden_width=24, num_classes=3)
    made = CausalContinuous(channels=2, grid=GRID, head_arguments=head, **sizes).eval()
    random = torch.Generator().manual_seed(4)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=random)
        parameter.data += distance * torch.randn(parameter.shape, generator=random)
    return made


def any_order(distance=0.0):
    """A masked model of continuous tokens, with its weights moved by `distance`."""
    head = dict(width=8, depth=1, prediction="velocity", variance="large")
    made = MaskedGenerator(
        channels=2, grid=GRID, width=16, encoder_layers=1, decoder_layers=1, num_heads=2, buffer_size=2,
        head_arguments=head, num_classes=3,
    ).eval()  # fmt: skip
    random = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=random)
        parameter.data += distance * torch.randn(parameter.shape, generator=random)
    return made


TEACHER = random_teacher()
DRAWN_BY = dict(name="it", guidance={"scale": 2.0}, temperature=0.9, top_k=6, top_p=1.0, flow_steps=4)
DRAFTERS = [NgramDrafter(4.0), *(random_drafter(kind) for kind in (ModelDrafter, FeatureDrafter, SpatialHeads))]
STATIC = [dict(branches=(3, 2, 1)), dict(paths=((0,), (1,), (0, 0), (1, 0), (0, 0, 0)))]
DYNAMIC = dict(depth=3, children=3, nodes=8)
RELAXED = [
    dict(codebook=BOOK, num_neighbours=3, max_moved=0.3, tree="dynamic", **DYNAMIC),
    dict(codebook=BOOK, max_moved=0.3, greedy=True, **DYNAMIC),
    dict(neighbours=torch.tensor([[(code + 1) % 8] for code in range(8)]), max_ratio=3.0, tree="static", **STATIC[0]),
    dict(codebook=BOOK, max_ratio=3.0, tree="static", drafter=DRAFTERS[2], **STATIC[1]),
]
WINDOWS = [(1, 8), (5, 3), (12, 1), (12, 4)]
GROUPED = [
    dict(group=4, max_gap=0.5, max_distance=9.0, codebook=BOOK, window=6, initial="left"),
    dict(group=3, groups="static", codebook=BOOK, window=6, check_every=2),
]
SCALES = [
    dict(),
    dict(temperature=[1.0, 0.9, 0.8], top_k=[0, 4, 5], top_p=[1.0, 0.9, 0.8], temperature_after_filter=True),
]
CASES = {
    "ancestral": [dict(), dict()],
    "jacobi": [
        dict(initial=initial, coupling=coupling, adaptive=adaptive, window=12, check_every=2)
        for coupling, adaptive, initial in product(COUPLINGS, (False, True), INITIALS)
    ]
    + [
        dict(window=window, check_every=every, coupling="maximal", adaptive=adaptive)
        for (window, every), adaptive in product(WINDOWS, (False, True))
    ],
    "speculative": [dict(drafter=drafter, num_drafts=3, check_every=2) for drafter in DRAFTERS],
    "static_tree": [dict(drafter=each, check_every=2, **tree) for each, tree in product(DRAFTERS, STATIC)],
    "dynamic_tree": [dict(drafter=each, check_every=2, **DYNAMIC) for each in DRAFTERS],
    "k_seq": [dict(drafter=each, num_chains=2, num_drafts=3, check_every=2) for each in DRAFTERS],
    "grouped": GROUPED,
    "lantern": [dict(check_every=2, **each) for each in RELAXED],
    "next_scale": [
        dict(smooth=True),
        dict(num_scales=2),
        dict(prefix_tokens=torch.arange(IMAGES * 5).view(-1, 5) % 16),
    ]
    + SCALES,
    "masked_refinement": [
        dict(schedule="1/2/3", refinement_guidance=2.0),
        dict(schedule="1/1,3/2,3,4", greedy=True, num_scales=3, **SCALES[1]),
    ],
    "collaborative": [
        dict(followers=(TINY.over_scales(layers=1),), takes_over=(1,), num_scales=3, **each) for each in SCALES
    ],
    "flow": [dict(codebook=BOOK, steps=4), dict(codebook=BOOK, steps=2)],
    "one_step": [dict(steps=2, output="soft", teacher=TEACHER, teacher_range=(5, 7))],
    "continuous": [
        dict(head_steps=4, head_solver="dpm"),
        dict(head_steps=3, last_head_steps=2, head_schedule="two_stage"),
    ],
    "continuous_speculation": [
        dict(drafter=over_vectors(distance), num_drafts=3, head_steps=5) for distance in (0.002, 0.02)
    ],
    "masked_speculation": [
        dict(drafter=any_order(0.02), num_drafts=2, steps=6, target_share=0.2, rule=rule, head_steps=4)
        for rule in ("paper", "paper")
    ],
    "masked": [
        dict(steps=10, head_steps=2, last_head_steps=2, head_solver="ddim"),
        dict(steps=4, head_steps=3, last_head_steps=2, head_schedule="cosine"),
    ],
    "masked_edit": [
        dict(head_steps=3, head_solver="dpm"),
        dict(steps=3, head_steps=3, last_head_steps=2, head_schedule="cosine"),
    ],
    "edit": [
        dict(strategy=strategy, smooth=smooth, always_keep=2, **SCALES[smooth])
        for strategy, smooth in (("codes", True), ("map", False), ("map", True), ("refine", False))
    ],
}
OVER_SCALES = ("next_scale", "masked_refinement", "collaborative", "edit")
# Settings of an image, which are split with the batch.
PER_IMAGE = ("prefix_tokens", "given_tokens", "keep")


def student():
    """A one-step student with weights that make every part count."""
    made = student_of(TEACHER, code_scale(BOOK), (0, 4), BOOK, drawn_by=DRAWN_BY).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made


def model_of(sampler: str):
    if sampler == "one_step":
        return student()
    if sampler.startswith("masked") and sampler not in OVER_SCALES:
        return any_order()
    if sampler.startswith("continuous"):
        return over_vectors()
    if sampler in OVER_SCALES:
        return TINY.over_scales(HierarchicalMaskedTransformer)
    # Windows of an adaptive call grow from 4 slots: they differ within a batch where an image has many tokens.
    return TINY.transformer(8, (3, 4) if sampler == "jacobi" else GRID, layers=1)


def given(sampler: str, settings: dict) -> dict:
    random = torch.Generator().manual_seed(0)
    if sampler == "masked_edit":
        model = any_order()
        tokens = torch.randn(IMAGES, model.num_tokens, model.token_head.channels, generator=random)
        keep = torch.rand(IMAGES, model.num_tokens, generator=random).argsort(1) < 3  # as many in every image
        return settings | dict(given_tokens=tokens, keep=keep.view(IMAGES, 1, -1))
    if sampler != "edit":
        return settings
    tokens = torch.randint(16, (IMAGES, 14), generator=random)
    return settings | dict(given_tokens=tokens, keep=torch.rand(IMAGES, 3, 3, generator=random) < 0.5)


def splits() -> list[torch.Tensor]:
    """Images alone, in pairs, threes and eights, and all of them in another order."""
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(3))
    return [order[:1], order[1:3], order[3:6], order[8:], order]


# Every other case is guided and filtered.
@pytest.mark.parametrize(
    ("sampler", "settings", "guided"),
    [
        pytest.param(name, each, bool(i % 2) or "refinement_guidance" in each, id=f"{name}-{i}")
        for name, every in CASES.items()
        for i, each in enumerate(every)
    ],
)
def test_image_depends_on_its_seed_and_condition_only(sampler, settings, guided):
    model, settings = model_of(sampler), given(sampler, settings)
    guidance = Guidance(2.0, schedule="linear") if guided else Guidance()
    known = SAMPLERS[sampler].parameters()
    general = {name: value for name, value in FILTERS.items() if guided and name in known and name not in settings}
    seeds, label = torch.tensor(image_seeds(7, IMAGES)), torch.arange(IMAGES) % 3

    def drawn(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        mine = {name: value[rows] if name in PER_IMAGE else value for name, value in settings.items()}
        out = SAMPLERS[sampler].load()(
            model, TINY.labels(*label[rows].tolist()), noise=Noise(seeds[rows]), guidance=guidance, **general, **mine
        )
        return out.tokens, out.outcome_BN

    tokens, outcome = drawn(torch.arange(IMAGES))
    assert len(tokens.unique(dim=0)) > 2
    for rows in splits():
        some_tokens, some_outcome = drawn(rows)
        if tokens.is_floating_point():  # products are rounded by the number of rows
            torch.testing.assert_close(some_tokens, tokens[rows], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(some_tokens, tokens[rows]), rows
        assert some_outcome is None or torch.equal(some_outcome, outcome[rows]), rows


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_setting_is_split(sampler):
    tried = {name for case in CASES[sampler] for name in given(sampler, case)}
    assert tried - set(FILTERS) == set(SAMPLERS[sampler].settings())
