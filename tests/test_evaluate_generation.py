"""Evaluation runs: labels, shards, restarts, processes."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from visar.core.output import SampleStatistics
from visar.evaluate.extractors import EXTRACTORS, Extractor, load_extractor
from visar.evaluate.generation import collect, generate_images, remake_images, write_npz
from visar.evaluate.images import NpzImages
from visar.evaluate.labels import Label, LabelPlan, LabelTable
from visar.evaluate.options import RunOptions
from visar.evaluate.parts import load_part
from visar.evaluate.run import label_plan
from visar.io.shards import World, finished, missing_ranges

SCRIPT = Path(__file__).parent / "fixtures" / "evaluation.py"


TINY = SimpleNamespace(**runpy.run_path(str(SCRIPT)))
ONE = World(0, 1, torch.device("cpu"))
PLAN = LabelPlan("balanced", num_classes=5)


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setitem(EXTRACTORS, "tiny", TINY.TINY)
    return load_extractor("tiny")


def run(folder: Path, extractor: Extractor, **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "num_samples": 22,
        "batch_size": 4,
        "seed": 3,
        "world": ONE,
        "identity": {"model": "paint"},
    }
    generate = changes.pop("generate", TINY.paint)
    generate_images(generate, extractor, changes.pop("plan", PLAN), folder, **{**arguments, **changes})


# ---------------------------------------------------------------------------------------------------------- labels
def test_balanced_labels_are_balanced_whoever_asks() -> None:
    plan = LabelPlan("balanced", num_classes=7)
    labels = plan.labels(range(70), range(70))
    assert set(Counter(labels).values()) == {10}
    assert plan.labels([13, 69], [0, 0]) == [labels[13], labels[69]]
    assert "10 a class" in plan.describe(70) and "10 or 11 a class" in plan.describe(71)


def test_random_labels_are_functions_of_the_seed() -> None:
    plan = LabelPlan("random", num_classes=5)
    seeds = list(range(100, 1100))
    labels = plan.labels(range(1000), seeds)
    assert plan.labels([3, 999], [seeds[3], seeds[999]]) == [labels[3], labels[999]]
    counts = Counter(labels)
    assert len(counts) == 5 and all(abs(count - 200) < 60 for count in counts.values())


def test_histogram_labels_repeat_the_training_histogram_exactly() -> None:
    table = LabelTable.of([(0, 1)] * 6 + [(2, 0)] * 3 + [(1, 1)])
    plan = LabelPlan("histogram", table=table)
    labels = plan.labels(range(20), range(20))
    assert Counter(labels[:10]) == Counter(labels[10:]) == {(0, 1): 6, (2, 0): 3, (1, 1): 1}
    assert labels[:10] != sorted(labels[:10])  # shuffled
    assert plan.labels([7], [0]) == [labels[7]]
    assert table.leading(1) == LabelTable(((0,), (1,), (2,)), (6, 1, 3))
    with pytest.raises(ValueError, match="reads 3 label columns, the reference's images have 2"):
        table.leading(3)


def test_classes_of_a_reference_are_matched_by_name_or_not_at_all() -> None:
    table = LabelTable.of([(0, 1), (0, 1), (1, 0), (3, 0)], ("Cafe\u0301", "DOG", "unused", "cat"))
    found = table.in_classes(5, ("bird", "cat", "dog", "caf\u00e9", "x"))
    assert found == LabelTable(((1, 0), (2, 0), (3, 1)), (1, 1, 2)) and found.classes == (
        "bird",
        "cat",
        "dog",
        "caf\u00e9",
        "x",
    )
    with pytest.raises(ValueError, match="2 classes of the reference are none of the model's: DOG, cat"):
        table.in_classes(2, ("caf\u00e9", "unused"))
    assert table.in_classes(4, None) is table
    numbers = LabelTable.of([(0,), (9,)])
    assert numbers.in_classes(10, ("a",) * 10) is numbers and table.leading(1).classes == table.classes
    assert numbers.in_classes(1000, None) is numbers
    with pytest.raises(ValueError, match="the reference has the class 9, the model 9 classes, and no names to match"):
        numbers.in_classes(9, None)
    with pytest.raises(ValueError, match="the reference has 4 classes, the model 1000 classes, and no names to match"):
        table.in_classes(1000, None)


def test_policies_and_their_errors() -> None:
    table = LabelTable.of([(0,), (0,), (1,)])
    assert LabelPlan("prompts", prompts=("a", "b")).labels([0, 3], [0, 0]) == ["a", "b"]
    assert LabelPlan("none").labels([4], [0]) == [None]
    assert label_plan("auto", num_classes=3, table=table).policy == "histogram"
    assert label_plan("auto", num_classes=3, table=None).policy == "balanced"
    assert label_plan("auto", num_classes=3, table=None, prompts=("a",)).policy == "prompts"
    assert label_plan("auto", num_classes=0, table=None).policy == "none"
    plans = [label_plan(policy, num_classes=3, table=table) for policy in ("histogram", "balanced", "none")]
    assert len({plan.digest() for plan in plans}) == 3
    for policy, message in (("uniform", "choose auto, balanced"), ("histogram", "need the training labels")):
        with pytest.raises(ValueError, match=message):
            label_plan(policy, num_classes=3, table=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="number of classes"):
        LabelPlan("random")
    with pytest.raises(ValueError, match="sorted, distinct and of one length"):
        LabelTable(((1,), (0,)), (1, 1))


# ------------------------------------------------------------------------------------------------------------ runs
def test_pictures_do_not_depend_on_batch_or_order(tmp_path: Path, extractor: Extractor) -> None:
    digests = set()
    for batch_size in (1, 4, 50):
        run(tmp_path / str(batch_size), extractor, batch_size=batch_size)
        found = collect(tmp_path / str(batch_size), 22)
        digests.add(found.images_sha256)
        assert found.features["8"].shape == (22, 8) and found.features["logits"].shape == (22, 5)
        assert found.duplicates == 0 and found.forward_passes_per_image == {"generator": 4.0}
        assert found.statistics.tokens_per_pass == {4: 88}
    assert len(digests) == 1
    expected, _ = TINY.paint(list(range(3, 25)), PLAN.labels(range(22), range(3, 25)))
    torch.testing.assert_close(found.features["8"], extractor(expected)["8"], atol=1e-5, rtol=1e-5)
    assert torch.equal(remake_images([5], TINY.paint, PLAN, 3)[0], expected[5].movedim(0, -1))


def test_an_interrupted_run_goes_on_and_can_grow(tmp_path: Path, extractor: Extractor) -> None:
    run(tmp_path / "whole", extractor, num_samples=30)
    made: list[int] = []

    def failing(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        if seeds[0] >= 11:
            raise RuntimeError("power cut")
        made.extend(seeds)
        return TINY.paint(seeds, labels)

    def counting(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        made.extend(seeds)
        return TINY.paint(seeds, labels)

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", extractor, generate=failing)
    with pytest.raises(ValueError, match="up to 8 of 22"):
        collect(tmp_path / "cut", 22)
    (tmp_path / "cut" / "parts" / ".part-00000008-00000012.npz.abc.npz").write_bytes(b"half")
    run(tmp_path / "cut", extractor, generate=counting, batch_size=5)
    assert not list((tmp_path / "cut" / "parts").glob(".*"))
    run(tmp_path / "cut", extractor, generate=counting, batch_size=3, num_samples=30)
    assert sorted(made) == list(range(3, 33)) and len(made) == 30  # every picture once
    assert collect(tmp_path / "cut", 30).images_sha256 == collect(tmp_path / "whole", 30).images_sha256
    run(tmp_path / "fewer", extractor, num_samples=22)
    assert collect(tmp_path / "cut", 22).images_sha256 == collect(tmp_path / "fewer", 22).images_sha256


def test_another_run_is_not_continued(tmp_path: Path, extractor: Extractor) -> None:
    run(tmp_path, extractor)
    for change, named in (
        ({"seed": 4}, r"seed \(3 there, 4 now\)"),
        ({"identity": {"model": "other"}}, "model"),
        ({"plan": LabelPlan("none")}, "labels"),
        ({"keep_images": "png"}, "keep_images"),
    ):
        with pytest.raises(ValueError, match=f"another run: .*{named}"):
            run(tmp_path, extractor, **change)


def test_wrong_pictures_and_counts_are_named(tmp_path: Path, extractor: Extractor) -> None:
    def floats(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        return torch.zeros(len(seeds), 3, 8, 8), SampleStatistics()

    with pytest.raises(ValueError, match="float32"):
        run(tmp_path / "a", extractor, generate=floats)
    with pytest.raises(ValueError, match="num_samples 0"):
        run(tmp_path / "b", extractor, num_samples=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot make the folder"):
        run(tmp_path / "file", extractor)
    with pytest.raises(ValueError, match="num_samples 3: .* need 4 images"):
        RunOptions(out=tmp_path, num_samples=3)
    with pytest.raises(ValueError, match="choose none, png, npz"):
        run(tmp_path / "c", extractor, keep_images="jpg")
    run(tmp_path / "d", extractor)
    part = finished(tmp_path / "d" / "parts")[2][2]
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(ValueError, match="part-00000008-00000012.npz is broken"):
        collect(tmp_path / "d", 22)
    for content in (b"{", b"[1]", b"\xff"):
        (tmp_path / "d" / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            run(tmp_path / "d", extractor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(features_8=np.zeros((3, 8), np.float32)), "features_8 has 3 rows for 4 images"),
        (dict(features_8=np.full((4, 8), np.nan, np.float32)), "features_8 has 4 rows for 4 images, or is not finite"),
        (dict(features_8=np.zeros((4, 7), np.float32)), "other images or features than its name and the parts before"),
        (dict(features_9=np.zeros((4, 7), np.float32)), "other images or features than its name and the parts before"),
        (dict(features_8=None, features_logits=None), "features of 0 layers"),
        (dict(digests=np.zeros((4, 31), np.uint8)), "images 8 ... 12 of 12"),
        (dict(digests=np.zeros((3, 32), np.uint8)), "images 8 ... 11 of 12"),
        (dict(meta=np.array("[]")), "a list where a JSON object is needed"),
        (dict(meta=None), "is broken"),
    ],
)
def test_parts_without_rows_or_features_give_no_figures(
    change: dict, message: str, tmp_path: Path, extractor: Extractor
) -> None:
    run(tmp_path, extractor)
    part = finished(tmp_path / "parts")[2][2]
    with np.load(part) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez(part, **{name: value for name, value in {**arrays, **change}.items() if value is not None})
    with pytest.raises(ValueError, match=f"{part.name} .*{message}"):
        collect(tmp_path, 22)


def test_duplicates_are_counted(tmp_path: Path, extractor: Extractor) -> None:
    def same(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        return TINY.paint([seed // 2 for seed in seeds], [None] * len(seeds))

    run(tmp_path, extractor, generate=same, num_samples=21)
    assert collect(tmp_path, 21).duplicates == 10  # seeds 3 ... 23 are halved to 1 ... 11


def test_kept_pictures_are_the_pictures(tmp_path: Path, extractor: Extractor) -> None:
    run(tmp_path / "png", extractor, keep_images="png", num_samples=6)
    run(tmp_path / "npz", extractor, keep_images="npz", num_samples=6)
    expected, _ = TINY.paint(list(range(3, 9)), PLAN.labels(range(6), range(3, 9)))
    write_npz(tmp_path / "npz", 6, tmp_path / "samples.npz")
    with np.load(tmp_path / "samples.npz") as file:
        assert np.array_equal(file["arr_0"], expected.movedim(1, -1).numpy())
    assert torch.equal(next(iter(NpzImages(tmp_path / "samples.npz").batches(9))), expected)
    for i in range(6):
        image = np.asarray(Image.open(tmp_path / "png" / "images" / f"{i:08d}.png"))
        assert np.array_equal(image, expected[i].movedim(0, -1).numpy())
    with pytest.raises(ValueError, match="not stored"):
        write_npz(tmp_path / "png", 6, tmp_path / "no.npz")
    assert not (tmp_path / "no.npz").exists()


def test_clips_go_through_the_same_run(tmp_path: Path) -> None:
    def film(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        frames = [TINY.paint([seed + 1000 * t for seed in seeds], labels)[0] for t in range(3)]
        return torch.stack(frames, dim=1), SampleStatistics({"generator": 3})

    clip = load_extractor("efficientnet-lite0-clip")
    run(tmp_path, clip, generate=film, num_samples=5, keep_images="png")
    found = collect(tmp_path, 5)
    assert found.features["clip"].shape == (5, 640) and found.duplicates == 0
    expected, _ = film([3], [(0,)])
    torch.testing.assert_close(found.features["clip"][:1], clip(expected)["clip"], atol=1e-3, rtol=1e-3)
    assert Image.open(tmp_path / "images" / "00000000.png").size == (96, 32)
    with pytest.raises(ValueError, match="no 16x16 averages"):
        run(tmp_path / "t", clip, generate=film, keep_thumbnails=True)


def test_missing_ranges_cover_exactly_what_is_missing() -> None:
    generator = random.Random(0)
    for _ in range(50):
        total, size = generator.randint(1, 60), generator.randint(1, 9)
        done = []
        for _ in range(generator.randint(0, 6)):
            first = generator.randrange(70)
            done.append((first, first + generator.randint(1, 12), Path("x")))
        have = {i for first, stop, _ in done for i in range(first, stop)}
        ranges = missing_ranges(sorted(done), total, size)
        made = [i for first, stop in ranges for i in range(first, stop)]
        assert made == sorted(set(range(total)) - have)
        assert all(0 < stop - first <= size for first, stop in ranges)


def test_first_batch_of_a_process_does_not_count_for_speed(tmp_path: Path, extractor: Extractor) -> None:
    def slow_start(seeds: list[int], labels: list[Label]) -> tuple[Tensor, SampleStatistics]:
        time.sleep(0.3 if seeds[0] == 3 else 0.01)
        return TINY.paint(seeds, labels)

    run(tmp_path, extractor, generate=slow_start)
    assert collect(tmp_path, 22).images_per_second > 4 / 0.15
    assert not load_part(finished(tmp_path / "parts")[0][2]).warm


# ------------------------------------------------------------------------------------------------------- processes
def program(*arguments: str, processes: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *(launcher if processes > 1 else []), str(SCRIPT), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2]), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def figures(folder: Path) -> tuple[str, dict[str, Any]]:
    report = json.loads((folder / "metrics.json").read_text())
    return report["images_sha256"], report["metrics"]


def test_processes_and_kills_do_not_change_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRACTORS, "tiny", TINY.TINY)

    def here(folder: Path) -> None:
        monkeypatch.setattr(sys, "argv", ["evaluation.py", str(folder)])
        TINY.main()

    here(tmp_path / "one")
    expected_images, expected_metrics = figures(tmp_path / "one")

    fresh = tmp_path / "two"
    subprocess.run(program(str(fresh), processes=2), env=environment(), check=True, capture_output=True, timeout=120)
    assert json.loads((fresh / "metrics.json").read_text())["protocol"]["processes"] == 2

    # two processes killed at a random point; one process goes on
    killed = tmp_path / "killed"
    command = program(str(killed), "--delay", "0.4", processes=2)
    victim = subprocess.Popen(command, env=environment(), start_new_session=True, stderr=subprocess.DEVNULL)
    wanted = random.randint(1, 6)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("parts/part-*.npz"))) < wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    for child in children(victim.pid):
        os.kill(child, signal.SIGKILL)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    before = len(finished(killed / "parts"))
    assert wanted <= before < 10 and not (killed / "metrics.json").exists()
    here(killed)

    for folder in (fresh, killed):
        images, metrics = figures(folder)
        assert images == expected_images
        for name in ("distance", "inception_score", "kid", "precision", "recall"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-6)


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
