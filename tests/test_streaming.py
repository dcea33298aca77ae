"""Folders and tables larger than memory: trained and evaluated while their pictures are decoded as they are needed."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from visar.data import decoding
from visar.data.images import ImageSet, load_image_set
from visar.evaluate.images import ArrayImages, SplitImages, open_images
from visar.train.images import PixelsAhead, take_split

# What a step of training and an evaluation do, and what they need: a limit of memory far below the decoded pictures.
PROGRAM = """
import resource, runpy, sys
from pathlib import Path
from visar.data import decoding
from visar.evaluate.extractors import EXTRACTORS, load_extractor
from visar.evaluate.images import open_images
from visar.evaluate.references import measure

fixtures, data, out = (Path(text) for text in sys.argv[1:4])
decoding.KEPT_BYTES = 2**20
tiny = runpy.run_path(str(fixtures / "evaluation.py"))
training = runpy.run_path(str(fixtures / "training.py"))
EXTRACTORS["tiny"] = tiny["TINY"]
extractor = load_extractor("tiny")
small = dict(image_size=32, steps=1, validate_every=0)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

training["train_tokenizer"](training["tokenizer_options"](data / "small", out / "small", **small))
measure(open_images(data / "small"), extractor, protocol="generation", batch_size=64)
before = peak()
result = training["train_tokenizer"](training["tokenizer_options"](data / "large", out / "large", **small))
images = open_images(data / "large")
reference = measure(images, extractor, protocol="generation", batch_size=64, keep_features=False)
assert reference.statistics["8"].count == len(images) == 20_000, len(images)
print(result.steps, peak() - before)
"""


def write_pictures(folder: Path, count: int) -> Path:
    """The same small picture under many names, in 4 classes; 16 of them for validation."""
    blob = io.BytesIO()
    PIL.Image.fromarray(np.full((32, 32, 3), 99, np.uint8)).save(blob, "PNG")
    for split, pictures in (("train", count - 16), ("val", 16)):
        for label in range(4):
            inner = folder / split / str(label)
            inner.mkdir(parents=True)
            (inner / "0.png").write_bytes(blob.getvalue())
            for number in range(1, pictures // 4):
                os.link(inner / "0.png", inner / f"{number}.png")
    return folder


@pytest.mark.slow
def test_a_folder_is_trained_on_and_evaluated_in_little_memory(tmp_path: Path) -> None:
    write_pictures(tmp_path / "small", 400)
    write_pictures(tmp_path / "large", 20_000)
    arguments = [str(Path(__file__).parent / "fixtures"), str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, growth = (int(word) for word in done.stdout.split()[-2:])
    assert steps == 1 and growth < 20_000 * 32 * 32 * 3 / 2, growth


@pytest.fixture
def streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """A set of which nothing stays in memory."""
    monkeypatch.setattr(decoding, "KEPT_BYTES", 0)
    draws = np.random.default_rng(0)
    for number in range(30):
        place = tmp_path / "set" / f"{number % 3}" / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(draws.integers(0, 256, (16, 16, 3), np.uint8)).save(place)
    return load_image_set(tmp_path / "set", 8)


def test_batches_are_those_of_pictures_in_memory(streamed: ImageSet) -> None:
    split = take_split(streamed, "train", "photographs", torch.device("cpu"))
    memory = ImageSet(**{**vars(streamed), "images": np.asarray(streamed.images)})
    other = take_split(memory, "train", "photographs", torch.device("cpu"))
    index_of = lambda step: torch.randint(len(split), (8,), generator=torch.Generator().manual_seed(step))  # noqa: E731
    ahead, plain = PixelsAhead(split, index_of), PixelsAhead(other, index_of)
    for step in (0, 1, 2, 7, 3, 3):  # a run may go on at any step
        assert torch.equal(ahead.take(step), plain.take(step))
    index = index_of(0)
    first, second = (each.batch(index, torch.Generator().manual_seed(5)) for each in (split, other))
    assert torch.equal(first, second) and first.is_contiguous(memory_format=torch.channels_last)


def test_splits_are_evaluated_as_those_in_memory(streamed: ImageSet, tmp_path: Path) -> None:
    images = open_images(f"{tmp_path / 'set'}@train", image_size=8)
    assert isinstance(images, SplitImages)
    index = streamed.indices("train")
    memory = ArrayImages(np.asarray(streamed.images)[index])
    assert images.digest() == memory.digest() and len(images) == len(memory) and images.size == memory.size
    assert torch.equal(torch.cat(list(images.batches(7))), torch.cat(list(memory.batches(7))))
    assert images.labels.classes == ("0", "1", "2") and images.labels.total == len(index)
