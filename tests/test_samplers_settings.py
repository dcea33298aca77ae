"""Settings of samplers given as text, on the command line and in lists of samplers."""

import inspect
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visar.cli.compare import split_run
from visar.cli.sampler_flags import take_sampler_options
from visar.core.guidance import OFF
from visar.core.interface import Categorical
from visar.pipelines.sampling import chosen_settings
from visar.samplers.index import SAMPLERS, SamplerEntry
from visar.samplers.settings import annotations, describe, parse_sampler, take_setting


@pytest.mark.parametrize(
    ("sampler", "name", "text", "value"),
    [
        ("jacobi", "window", "32", 32),
        ("jacobi", "adaptive", "True", True),
        ("jacobi", "adaptive", "false", False),
        ("jacobi", "coupling", "gumbel", "gumbel"),
        ("grouped", "max_gap", "0.5", 0.5),
        ("lantern", "max_moved", "0.2", 0.2),
        ("lantern", "max_moved", "none", None),
        ("static_tree", "branches", "2,1", (2, 1)),
        ("static_tree", "branches", "(2, 1)", (2, 1)),
        ("static_tree", "branches", "3", (3,)),
        ("static_tree", "paths", "((0,), (1,), (0, 0))", ((0,), (1,), (0, 0))),
        ("speculative", "drafter", "runs/d/model", "runs/d/model"),
        ("speculative", "drafter", "none", None),
    ],
)
def test_texts_become_values(sampler, name, text, value):
    found = take_setting(sampler, name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("sampler", "name", "value", "found"),
    [
        ("jacobi", "window", np.int64(32), 32),
        ("lantern", "max_moved", np.float32(0.5), 0.5),
        ("lantern", "max_moved", 1, 1.0),
        ("lantern", "max_moved", None, None),
        ("static_tree", "branches", 3, (3,)),
        ("static_tree", "branches", [2, "1"], (2, 1)),
        ("static_tree", "branches", np.array([2, 1]), (2, 1)),
        ("static_tree", "branches", torch.tensor([2, 1]), (2, 1)),
        ("static_tree", "paths", [[0], [1], [0, 0]], ((0,), (1,), (0, 0))),
        ("collaborative", "takes_over", 5, (5,)),
        ("masked_refinement", "schedule", [1, [1, 3], 2], (1, (1, 3), 2)),
        ("masked_refinement", "schedule", "1/1,3/2", "1/1,3/2"),
    ],
)
def test_values_from_python(sampler, name, value, found):
    taken = take_setting(sampler, name, value)
    assert taken == found and type(taken) is type(found)


@pytest.mark.parametrize(
    ("sampler", "name", "value", "allowed"),
    [
        ("jacobi", "window", 16.0, "a whole number"),
        ("jacobi", "window", True, "a whole number"),
        ("jacobi", "window", None, "a whole number"),
        ("jacobi", "window", [16], "a whole number"),
        ("jacobi", "adaptive", 1, "true or false"),
        ("jacobi", "coupling", 3, "none, maximal, gumbel"),
        ("lantern", "max_moved", [0.1], "a number or none"),
        ("static_tree", "branches", ["a"], "a whole number, or several as in 4,2,1"),
        ("static_tree", "paths", [[0.5]], "none"),
        ("speculative", "drafter", 3, "a drafter's folder"),
        ("speculative", "drafter", SimpleNamespace(start=print), "a drafter's folder"),
        ("collaborative", "followers", object(), "a model's name or folder"),
        ("collaborative", "takes_over", 6.5, "a whole number"),
        ("masked_refinement", "schedule", [1, 2.5], "a whole number"),
        ("masked_refinement", "refinement_guidance", None, "a number"),
    ],
)
def test_values_that_are_none_of_a_setting(sampler, name, value, allowed):
    with pytest.raises(ValueError, match=f"sampler {sampler}: {name} .*; allowed: .*{allowed}"):
        take_setting(sampler, name, value)


@pytest.mark.parametrize(
    ("sampler", "name", "text", "message"),
    [
        ("jacobi", "window", "wide", "window 'wide'; allowed: a whole number"),
        ("jacobi", "window", "1.5", "allowed: a whole number"),
        ("jacobi", "adaptive", "maybe", "'maybe'; allowed: true or false"),
        ("jacobi", "coupling", "gumble", "allowed: none, maximal, gumbel"),
        ("lantern", "max_moved", "much", "allowed: a number or none"),
        ("lantern", "codebook", "file", "a Tensor, which cannot be given as text or none"),
        ("static_tree", "branches", "2,x", "several as in 4,2,1"),
        ("static_tree", "branches", "", "several as in 4,2,1"),
        ("static_tree", "paths", "0,1", r"tuples such as \(\(0,\)"),
        ("speculative", "drafter", "", "ngram, eagle, heads"),
        ("speculative", "window", "3", "no setting 'window'; its settings: drafter, num_drafts"),
        ("spec", "window", "3", "unknown sampler 'spec'"),
    ],
)
def test_other_texts_are_refused(sampler, name, text, message):
    with pytest.raises(ValueError, match=message):
        take_setting(sampler, name, text)


def test_every_setting_says_what_it_takes():
    for sampler in SAMPLERS:
        assert all(describe(annotation) for annotation in annotations(sampler, general=True).values())
    assert describe(annotations("next_scale", general=True)["top_k"]) == "a whole number, or several as in 4,2,1"
    assert describe(annotations("collaborative")["followers"]) == "a model's name or folder, or several as in 4,2,1"


def test_command_line():
    line = "model --sampler static_tree --sampler.branches 2,1 --seed 2 --sampler.drafter=ngram"
    assert take_sampler_options(shlex.split(line)) == (
        ["model", "--sampler", "static_tree", "--seed", "2"],
        {"branches": (2, 1), "drafter": "ngram"},
    )


def test_lists_of_samplers():
    assert parse_sampler("ancestral") == ("ancestral", {})
    assert parse_sampler("static_tree:branches=4,2,1,drafter=ngram,check-every=2") == (
        "static_tree",
        {"branches": (4, 2, 1), "drafter": "ngram", "check_every": 2},
    )
    for text, message in (
        ("jacoby", "unknown sampler 'jacoby'"),
        ("jacobi:window", "setting=value"),
        ("jacobi:window=wide", "a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_sampler(text)


def test_settings_of_all_samplers_in_a_text():
    assert parse_sampler("ancestral", general=True) == ("ancestral", {})
    line = "static_tree:branches=4,2,top-p=0.8,guidance_scale=4,guidance-schedule=linear"
    assert parse_sampler(line, general=True) == (
        "static_tree",
        {"branches": (4, 2), "top_p": 0.8, "guidance_scale": 4.0, "guidance_schedule": "linear"},
    )
    line = "collaborative:followers=a/b,takes_over=5,top_k=600,temperature=1.1,1,1"
    assert parse_sampler(line, general=True) == (
        "collaborative",
        {"followers": ("a/b",), "takes_over": (5,), "top_k": 600, "temperature": (1.1, 1.0, 1.0)},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ancestral:topp=1",
            "no setting 'topp'; its settings: temperature, top_k, top_p, guidance_scale, guidance_schedule$",
        ),
        ("jacobi:windw=1", "its settings: temperature, top_k, top_p, window, initial, .*, guidance_scale"),
        ("ancestral:top_p=0.9,0.8", r"top_p '0.9,0.8'; allowed: a number \(one per scale: next_scale, masked_refine"),
        ("next_scale:top_k=1.5", "top_k '1.5'; allowed: a whole number, or several as in 4,2,1$"),
        ("next_scale:guidance_scale=1,2", "guidance_scale '1,2'; allowed: a number$"),
        ("ancestral:top_p=1.5", "top_p 1.5"),
        ("next_scale:temperature=1,0", "temperature 0.0"),
        ("ancestral:guidance_scale=-1", "guidance scale -1.0"),
        ("ancestral:guidance_schedule=steep", "'steep'; allowed: constant, linear"),
        ("collaborative:followers=emoji-var", "needs takes_over"),
    ],
)
def test_wrong_settings_of_all_samplers_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sampler(text, general=True)


def test_general_settings_are_no_settings_of_a_sampler_alone():
    with pytest.raises(ValueError, match="no setting 'top_p'"):
        parse_sampler("ancestral:top_p=0.9")


def sample_narrow(model, condition, *, noise, guidance, top_p: float = 1.0, callback=None, runtime=None):
    """A sampler of one general setting."""


def check_narrow(model, guidance, top_p):
    if top_p == 0.5:
        raise ValueError("top_p 0.5 is refused")


def test_a_sampler_has_the_general_settings_of_its_function(monkeypatch):
    module = sys.modules[__name__]
    monkeypatch.setitem(sys.modules, "visar.samplers.narrow", module)
    monkeypatch.setitem(SAMPLERS, "narrow", SamplerEntry("narrow", "narrow", True, "no paper", Categorical))
    assert list(annotations("narrow", general=True)) == ["top_p", "guidance_scale", "guidance_schedule"]
    with pytest.raises(ValueError, match="sampler narrow has no setting 'top_k'; its settings: top_p, guidance_scale"):
        parse_sampler("narrow:top_k=3", general=True)
    defaults = {"top_k": 12, "top_p": 0.9}
    given = {"temperature": None, "top_k": None, "top_p": None}
    assert chosen_settings(defaults, "narrow", None, given) == {"sampler": "narrow", "top_p": 0.9, "guidance": OFF}
    for name in ("temperature", "top_k"):
        with pytest.raises(ValueError, match=f"sampler narrow has no {name}"):
            chosen_settings(defaults, "narrow", None, given | {name: 1})
    SAMPLERS["narrow"].check(None, {"guidance": OFF})
    with pytest.raises(ValueError, match="top_p 0.5 is refused"):
        SAMPLERS["narrow"].check(None, {"guidance": OFF, "top_p": 0.5})


def test_every_check_reads_arguments_of_its_sampler():
    for entry in SAMPLERS.values():
        model, *names = inspect.signature(entry.load("check")).parameters
        assert model == "model" and names[0] == "guidance"
        assert set(names) <= {"guidance", *entry.parameters()}
        assert {"temperature", "top_k", "top_p"} & set(entry.parameters()) <= set(names)


def test_a_run_is_a_model_and_a_sampler():
    assert split_run("emoji-var/ancestral") == ("emoji-var", "ancestral")
    assert split_run("runs/var/model/collaborative:followers=runs/a/model,takes_over=5") == (
        "runs/var/model",
        "collaborative:followers=runs/a/model,takes_over=5",
    )
    for text in ("ancestral", "/ancestral", "ancestral:drafter=a/b"):
        with pytest.raises(ValueError, match="write MODEL/SAMPLER"):
            split_run(text)
