"""An image depends on its seed and condition alone: on a CPU, and what the table of `visar seeds` says."""

import json

import numpy as np
import pytest
import torch

import visar
from visar.bench.options import Seeds
from visar.bench.seeds import PLAIN, SAMPLERS, Made, cell, markdown, seeds_matrix
from visar.checkpoints import hub
from visar.pipelines.components import load_tokenizer
from visar.samplers.index import SAMPLERS as INDEX
from visar.samplers.settings import parse_sampler
from visar.tokenizers.decoding import decode_tokens


def test_every_embedded_generator_and_sampler_has_a_row():
    generators = {name for name in hub.embedded_names() if hub.about(name)["kind"] not in ("tokenizer", "drafter")}
    assert set(SAMPLERS) == generators
    named = {parse_sampler(text)[0] for texts in SAMPLERS.values() for text in texts}
    # No embedded model is a one-step student, or makes continuous tokens.
    assert named == set(INDEX) - {
        "edit",
        "one_step",
        "continuous",
        "continuous_speculation",
        "masked",
        "masked_edit",
        "masked_speculation",
    }
    assert {text for texts in SAMPLERS.values() for text in texts} >= set(PLAIN)


@pytest.mark.parametrize("name", ["emoji-msvq", "emoji-vq"])
def test_decoded_pixels_do_not_depend_on_the_batch(name):
    tokenizer = load_tokenizer(name, device="cpu")
    layout = tokenizer.layout
    ids = torch.randint(layout.vocab_size, (2, layout.num_tokens), generator=torch.Generator().manual_seed(0))
    together = decode_tokens(tokenizer, ids)
    assert torch.equal(together, torch.cat([decode_tokens(tokenizer, one) for one in ids.split(1)]))
    assert decode_tokens(tokenizer, ids[:0]).shape == (0, *together.shape[1:])


def test_a_table_of_a_cpu(tmp_path):
    lines = []
    options = Seeds(
        models=("emoji-var-small",), out=tmp_path / "seeds.json", batch=2, other_batches=(1, 64), images=3, calls=2,
        processes=1, device="cpu",
    )  # fmt: skip
    result = seeds_matrix(options, lines.append)
    assert result == json.loads((tmp_path / "seeds.json").read_text()) and len(lines) == 2
    (row,) = result["rows"]
    counts = {name: value["of"] for name, value in row["cells"].items()}
    assert counts == {"batch 1": 2, "order": 3, "resume": 1, "threads": 2}
    assert all(row["cells"][name]["images"] == 1.0 for name in ("batch 1", "order", "resume"))
    table = (tmp_path / "seeds.md").read_text()
    assert (
        table == markdown(result)
        and "| emoji-var-small | `next_scale` | float32 | auto | equal | equal | equal |" in table
    )


def test_a_cell_counts_images_that_are_the_same_throughout():
    ids, pixels = np.zeros((1001, 4), np.int64), np.zeros((1001, 3, 2, 2), np.uint8)
    other = Made(ids.copy(), pixels.copy())
    other.pixels[5, 0, 1, 1] = other.pixels[6, 2, 0, 0] = 1
    other.ids[6, 3] = 1
    value = cell(Made(ids, pixels), other)
    assert value == {"images": 999 / 1001, "ids": 1000 / 1001, "of": 1001}
    row = {"model": "m", "sampler": "s", "dtype": "d", "deterministic": "off", "cells": {"order": value}}
    assert "| 99.8 % |" in markdown({"facts": {}, "reference": "batch 1", "rows": [row]})


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (dict(models=("emoji-vq",)), "model 'emoji-vq'; choose from emoji-raster"),
        (dict(images=0), ">= 1"),
        (dict(processes=3), "processes 3"),
        (dict(models=("emoji-var-small",), settings=("float32:maybe",)), "deterministic 'maybe'"),
    ],
)
def test_wrong_settings(tmp_path, wrong, says):
    with pytest.raises(ValueError, match=says):
        seeds_matrix(Seeds(out=tmp_path / "seeds.json", device="cpu", **wrong), lambda line: None)


def test_wrong_values_of_deterministic():
    with pytest.raises(ValueError, match="deterministic 'yes'; choose one of auto, batch, off"):
        visar.load("emoji-var-small", deterministic="yes")


def test_the_mode_needs_weights_that_are_not_quantised():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match="not quantised; quantize is 'int8'"):
        visar.load("emoji-var-small", deterministic="batch", quantize="int8")
    pipe = visar.load("emoji-var-small", device="cpu", deterministic="batch")
    assert pipe.deterministic == "batch"
    pipe.deterministic = "never"
    with pytest.raises(ValueError, match="deterministic 'never'"):
        pipe(seed=1)
