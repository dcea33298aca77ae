"""`visar bench`: presets, checks before times, peers, baselines, windows; and the memory of sampling."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from visar.bench.correctness import check_images, check_logits, logits_errors
from visar.bench.options import Bench
from visar.bench.peer import Peer, in_turns
from visar.bench.rows import compare_with_baseline, read_rows
from visar.bench.run import bench
from visar.bench.subjects import PRESETS, Subject, build, find_preset, floor_seconds, tiny
from visar.checkpoints.common import empty
from visar.cli.main import main, parse
from visar.core.condition import Condition
from visar.generators.causal_state import RasterState
from visar.generators.raster import RasterGPT
from visar.pipelines.image import ImagePipeline
from visar.pipelines.loading import load
from visar.pipelines.memory import OutOfMemory, estimated_batch, largest_batch, memory_need

CPU = torch.device("cpu")
RELEASED_MILLIONS = {
    "llamagen-b": 111, "llamagen-l": 343, "llamagen-xl": 775, "llamagen-xxl": 1411, "llamagen-3b": 3096,
    "var-d16": 310, "var-d20": 601, "var-d24": 1034, "var-d30": 2010, "var-d36": 2353,
    "hmar-d16": 468, "hmar-d20": 846, "hmar-d24": 1383, "hmar-d30": 2560,
    "nar-b": 131, "nar-m": 295, "nar-l": 373, "nar-xl": 816, "nar-xxl": 1464, "nar-t2i-stage2": 819,
    "par-l-4x": 343, "par-xxl-16x": 1411,
    "mar-base": 208, "mar-large": 478, "mar-huge": 942,
}  # fmt: skip


def small(name: str, dtype: torch.dtype = torch.float32) -> Subject:
    return build(name, tiny(find_preset(name)), CPU, dtype)


class Greedy(RasterGPT):
    """A generator that a limited number of images at a time fits."""

    largest = 2

    def start(self, condition: Condition, *args: Any, **settings: Any) -> RasterState:
        if condition.batch > self.largest:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {condition.batch} images")
        return super().start(condition, *args, **settings)


@pytest.fixture
def greedy() -> ImagePipeline:
    subject = small("llamagen-b")
    generator = Greedy(**{k: v for k, v in subject.generator.config.items() if not k.startswith("_")}).eval()
    generator.load_state_dict(subject.generator.state_dict())
    pipeline = ImagePipeline(subject.tokenizer, generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of the smallest raster model."""
    subject, place = small("llamagen-b"), tmp_path_factory.mktemp("model")
    ImagePipeline(subject.tokenizer, subject.generator).save_pretrained(place)
    return place


# ---------------------------------------------------------------------------------------------------------- presets
@pytest.mark.parametrize("name", list(RELEASED_MILLIONS))
def test_presets_have_the_released_shapes_and_fitting_tokenizers(name: str) -> None:
    preset = PRESETS[name]
    assert preset.generator is not None
    generator, tokenizer = empty(preset.generator, preset.config), empty(preset.tokenizer, preset.tokenizer_config)
    millions = sum(parameter.numel() for parameter in generator.parameters()) / 1e6
    assert abs(millions / RELEASED_MILLIONS[name] - 1) < 0.02
    assert tokenizer.layout.num_tokens == sum(generator.block_sizes)
    assert tokenizer.layout.vocab_size == generator.config.get("vocab_size", 0)


def test_grid_changes_tokens_and_images_together() -> None:
    preset = find_preset("llamagen-b", 24)
    assert preset.config["grid"] == (24, 24) and preset.tokenizer_config["image_size"] == 384
    with pytest.raises(ValueError, match="grid 24 for var-d16"):
        find_preset("var-d16", 24)


@pytest.mark.parametrize("name", ["llamagen-b", "var-d16", "hmar-d16", "nar-b", "par-l-4x", "mar-base", "vq-16"])
def test_a_preset_without_a_gpu_is_checked_and_not_timed(name: str) -> None:
    lines: list[str] = []
    sampler = "masked" if name == "mar-base" else "ancestral"
    assert bench(Bench(preset=name, sampler=sampler, device="cpu"), {}, lines.append) == []
    assert any("nothing is timed" in line for line in lines)
    assert any("relative error" in line for line in lines) and not any("images/s" in line for line in lines)


def test_floor_counts_weights_cache_and_products() -> None:
    generator = small("llamagen-b").generator
    machine = {"copy_gb_s": 1.0, "matmul_tflop_s": 1e9}
    width, layers, hidden, vocab, steps = 64, 2, 96, 128, 16
    weights = 4 * (layers * (4 * width * width + 3 * width * hidden) + width * vocab)
    keys = sum(range(2, steps + 2)) * 2 * layers * width * 4
    assert floor_seconds(generator, 2, machine) == pytest.approx((steps * weights + 2 * keys) / 1e9)
    slow = {"copy_gb_s": 1e9, "matmul_tflop_s": 1e-12}
    assert floor_seconds(generator, 1, slow) > 2 * steps * weights / 4


# ------------------------------------------------------------------------------------------------------ correctness
@pytest.mark.parametrize("name", ["llamagen-b", "var-d16", "hmar-d16"])
def test_decoding_is_right_and_what_is_wrong_is_refused(name: str) -> None:
    subject = small(name)
    decoded, forced = logits_errors(subject, CPU)
    assert decoded < 1e-5 and forced == 0.0
    assert 1e-4 < logits_errors(small(name, torch.bfloat16), CPU)[0] < 2e-2

    class Wrong(type(subject.generator)):  # type: ignore[misc]
        def predict(self, state: Any) -> Tensor:
            return super().predict(state) * 1.03

    subject.generator.__class__ = Wrong
    with pytest.raises(ValueError, match="wrong results are not timed"):
        check_logits(subject, CPU)


def test_wrong_images_are_refused() -> None:
    subject = small("vq-16", torch.bfloat16)
    check_images(subject, CPU)

    class Wrong(type(subject.tokenizer)):  # type: ignore[misc]
        def decode(self, ids_BN: Tensor) -> Tensor:
            image_BCHW = super().decode(ids_BN)
            return image_BCHW if image_BCHW.dtype == torch.float32 else image_BCHW * 1.2

    subject.tokenizer.__class__ = Wrong
    with pytest.raises(ValueError, match="wrong results are not timed"):
        check_images(subject, CPU)


def test_wrong_models_end_the_command_with_status_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = RasterGPT.predict
    monkeypatch.setattr(RasterGPT, "predict", lambda self, state: right(self, state) + 1.0)
    assert main(["bench", "--model", str(folder), "--dtype", "float32", "--batch", "1", "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "wrong results are not timed" in captured.err and "images/s" not in captured.out


# ------------------------------------------------------------------------------------------------------------- rows
def test_rows_say_what_was_timed_and_meet_a_baseline(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows_file = tmp_path / "rows.jsonl"
    line = f"bench --model {folder} --batch 1 2 --runs 2 --eager-steps 4 --dtype float32 --device cpu"
    assert main([*line.split(), "--json", str(rows_file)]) == 0
    assert main([*line.split(), "--json", str(rows_file), "--sampler", "jacobi", "--sampler.window", "4"]) == 0
    rows = read_rows(rows_file)
    assert [(row["batch"], row["sampler"]) for row in rows] == [
        (1, "ancestral"), (2, "ancestral"), (1, "jacobi"), (2, "jacobi"),
    ]  # fmt: skip
    for row in rows:
        assert row["images_per_s"] * row["ms_per_image"] == pytest.approx(1e3)
        assert row["ms_per_step"] * row["steps"] == pytest.approx(row["tokens_ms"])
    assert rows[0]["steps"] == 16 and "together_ms" not in rows[0] and rows[0]["host_us_per_step"] > 0
    assert (
        rows[2]["together_ms"] > 0 and rows[2]["tokens_per_step"] > 1 and rows[2]["sampler_options"] == {"window": "4"}
    )

    fast = [{**row, "tokens_ms": row["tokens_ms"] / 100, "tokens_spread": 0.0} for row in rows[:2]]
    baseline = tmp_path / "fast.jsonl"
    baseline.write_text("".join(f"{json.dumps(row)}\n" for row in fast))
    capsys.readouterr()
    assert main([*line.split(), "--baseline", str(baseline)]) == 1
    assert "slower than the baseline" in capsys.readouterr().err
    slow = [{**row, "tokens_ms": row["tokens_ms"] * 1e4, "decode_ms": row["decode_ms"] * 1e4} for row in fast]
    baseline.write_text("".join(f"{json.dumps(row)}\n" for row in slow))
    assert main([*line.split(), "--baseline", str(baseline)]) == 0
    assert "2 of 2 rows" in capsys.readouterr().out


def test_a_median_is_worse_only_beyond_3_percent_and_twice_the_spread() -> None:
    def row(ms: float, spread: float, **other: Any) -> dict[str, Any]:
        return {"model": "m", "batch": 1, "path": "eager", "tokens_ms": ms, "tokens_spread": spread, **other}

    assert compare_with_baseline([row(102.9, 0.0)], [row(100.0, 0.0)]) == (1, [])
    assert len(compare_with_baseline([row(103.1, 0.0)], [row(100.0, 0.0)])[1]) == 1
    assert compare_with_baseline([row(119.0, 0.02)], [row(100.0, 0.10)]) == (1, [])
    assert len(compare_with_baseline([row(121.0, 0.02)], [row(100.0, 0.10)])[1]) == 1
    assert compare_with_baseline([row(200.0, 0.0, device="b")], [row(100.0, 0.0, device="a")]) == (0, [])
    assert len(compare_with_baseline([row(103.1, 0.0)], [row(900.0, 0.0), row(100.0, 0.0)])[1]) == 1


def test_windows_and_profiles_of_a_model(folder: Path) -> None:
    options = dict(model=str(folder), batch=(1,), dtype="float32", device="cpu", runs=2, paths=("eager",))
    rows = bench(Bench(**options, window=(1, 4, 8)), {}, lambda line: None)
    assert [row["window"] for row in rows] == [1, 4, 8] and rows[0]["of_window_1"] == 1.0
    assert all(row["pass_ms"] > 0 and row["of_one_token"] > 0 for row in rows)
    with pytest.raises(ValueError, match="window 9; .* 1 ... 8"):
        bench(Bench(**options, window=(9,)), {}, lambda line: None)
    lines: list[str] = []
    assert bench(Bench(**options, profile=True), {}, lines.append) == []
    assert any("calls/step" in line for line in lines) and any("aten::" in line for line in lines)


# ------------------------------------------------------------------------------------------------------------ peers
PEER = """
import torch
PRODUCT = "tokens"
def load(preset, batch, dtype, guidance_scale, top_k):
    print("what a peer prints harms nobody")
    weight = torch.randn(64, 64, dtype=getattr(torch, dtype))
    def make():
        x = torch.randn(batch, 64, dtype=weight.dtype)
        for _ in range(10 * batch):
            x = torch.tanh(x @ weight)
        return x
    return make
"""


def test_a_peer_is_timed_in_turns(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "visar_peer.py").write_text(PEER)
    options = Bench(
        model=str(folder), batch=(2,), dtype="float32", device="cpu", runs=3, paths=("eager",), compare=tmp_path
    )
    lines: list[str] = []
    (row,) = bench(options, {}, lines.append)
    assert row["product"] == "tokens" and row["ratio"] == pytest.approx(row["peer_ms"] / row["ours_ms"])
    assert row["peer_ms"] > 0 and row["peer_load_s"] > 0 and "ratio" in lines[-1]


def test_in_turns_alternates_after_warming_up() -> None:
    calls: list[str] = []

    def call(name: str, seconds: float) -> float:
        calls.append(name)
        return seconds

    ours, theirs = in_turns(lambda: call("a", 1.0), lambda: call("b", 3.0), 2)
    assert calls == ["a", "b"] * 4 and theirs.median / ours.median == 3.0 and len(ours.times) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no visar_peer.py in"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("def load(**_):\n    raise RuntimeError('no weights')", "RuntimeError: no weights"),
        ("PRODUCT = 'songs'", "PRODUCT 'songs'"),
        ("import os\ndef load(**_):\n    os.write(2, b'bye')\n    os._exit(3)", "status 3\n  bye"),
    ],
)  # fmt: skip
def test_a_peer_that_fails_says_why(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "visar_peer.py").write_text(text)
    arguments = {"preset": "x", "batch": 1, "dtype": "float32", "guidance_scale": 2.0, "top_k": 0}
    with pytest.raises(ValueError, match=message):
        Peer(tmp_path, arguments)


def test_a_peer_that_dies_later_says_so(tmp_path: Path) -> None:
    (tmp_path / "visar_peer.py").write_text("import os\ndef load(**_):\n    return lambda: os._exit(4)")
    with Peer(tmp_path, {}) as peer:
        for _ in range(2):
            with pytest.raises(ValueError, match="ended with status 4"):
                peer.run()


# ----------------------------------------------------------------------------------------------------------- memory
def test_need_counts_the_weights_and_the_cache_exactly() -> None:
    for name in ("llamagen-b", "var-d16", "hmar-d16"):
        subject = small(name)
        state = subject.generator.start(Condition(labels_BA=torch.zeros(3, 1, dtype=torch.int64)))
        need = memory_need(subject.generator, subject.tokenizer, 3, guided=False)
        cache = getattr(state, "cache", None)
        kept = 0 if cache is None else cache.keys.nbytes + cache.values.nbytes
        if name == "llamagen-b":  # a slot for writes beyond the last position
            kept = kept * (cache.num_slots - 1) // cache.num_slots
        assert need.cache == kept
        saved = [*subject.generator.parameters(), *subject.tokenizer.parameters()]
        assert need.weights >= sum(parameter.nbytes for parameter in saved)
        doubled = memory_need(subject.generator, subject.tokenizer, 3, guided=True)
        assert doubled.cache == 2 * need.cache and doubled.weights == need.weights


def test_search_finds_the_largest_power_of_two_within_the_limit() -> None:
    subject = small("llamagen-b")

    def need(batch: int) -> int:
        return memory_need(subject.generator, subject.tokenizer, batch, guided=True).batch

    for batch in (1, 2, 8, 32):
        assert largest_batch(need, need(batch), 1000) == batch
        assert largest_batch(need, need(2 * batch) - 1, 1000) == batch
    assert largest_batch(need, need(64), 5) == 4
    with pytest.raises(ValueError, match="one image needs"):
        largest_batch(need, need(1) - 1, 1000)
    assert estimated_batch(need, need(8), 64) == 8 and estimated_batch(need, need(64), 8) == 4
    assert estimated_batch(need, 0, 64) == 0


def test_search_halves_what_does_not_fit_after_all() -> None:
    tried: list[int] = []

    def measure(batch: int) -> int:
        tried.append(batch)
        if batch > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch

    assert largest_batch(measure, 100, 1000) == 8 and tried == [1, 2, 64, 32, 16, 8]


def test_auto_batches_fit_and_change_no_image(greedy: ImagePipeline) -> None:
    greedy.generator.largest = 1000
    settings = dict(guidance_scale=2.0)
    guided = memory_need(greedy.generator, greedy.tokenizer, 4, guided=True).batch
    assert greedy.find_batch_size(100, limit_bytes=guided, **settings) == 4
    assert greedy.find_batch_size(3, **settings) == 2 and greedy.find_batch_size(1000, **settings) <= 64
    made = [
        greedy(class_labels=1, num_images=5, seed=3, batch_size=size, output_type="np") for size in (None, 2, "auto")
    ]
    for other in made[1:]:
        assert torch.equal(made[0].tokens, other.tokens)
    with pytest.raises(ValueError, match="batch_size 'all'"):
        greedy(num_images=2, batch_size="all")


def test_out_of_memory_names_the_batch_and_keeps_what_was_made(greedy: ImagePipeline) -> None:
    with pytest.raises(OutOfMemory, match="with 8 images at a time; about 4 fit") as caught:
        greedy(class_labels=1, num_images=8, seed=3)
    assert (caught.value.batch, caught.value.fits, caught.value.done) == (8, 4, None)
    whole = greedy(class_labels=1, num_images=5, seed=3, batch_size=1)
    calls = 0

    def grow(pipeline: ImagePipeline, step: int, time: int, tensors: dict) -> dict:
        nonlocal calls
        calls += step == 15
        pipeline.generator.largest = 0 if calls == 2 else 2  # other programs take the memory
        return {}

    with pytest.raises(OutOfMemory, match="4 images made before are not lost") as caught:
        greedy(class_labels=1, num_images=5, seed=3, batch_size=2, callback_on_step_end=grow)
    done = caught.value.done
    assert torch.equal(done.tokens, whole.tokens[:4]) and done.seeds == [3, 4, 5, 6] and len(done.images) == 4


def test_the_command_writes_what_was_made_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls = 0
    start = RasterGPT.start

    def failing(self: RasterGPT, *args: Any, **settings: Any) -> RasterState:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return start(self, *args, **settings)

    monkeypatch.setattr(RasterGPT, "start", failing)
    line = ["sample", str(folder), "--num-images", "6", "--batch", "2", "--out", str(tmp_path), "--device", "cpu"]
    assert main(line) == 1
    assert "out of memory with 2 images at a time; about 1 fit" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.glob("*.png")) == [f"{i:06d}.png" for i in range(4)]
    calls = 10
    assert main([*line[:5], "auto", *line[6:]]) == 0
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_offloading_changes_nothing(folder: Path) -> None:
    plain, offloaded = load(folder, device="cpu"), load(folder, device="cpu", offload=True)
    assert offloaded.offload and not plain.offload
    images = [pipe(class_labels=1, num_images=2, seed=5, output_type="pt").images for pipe in (plain, offloaded)]
    assert torch.equal(*images)


# ------------------------------------------------------------------------------------------------- docs/benchmarks.md
DOCS = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
COMMANDS = [line.strip() for line in DOCS.splitlines() if line.startswith("    visar bench")]
TABLE = [[cell.strip() for cell in line.split("|")[1:-1]] for line in DOCS.splitlines()]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_page_parse(line: str) -> None:
    assert callable(parse(line.split()[1:]))


def test_the_memory_table_is_what_is_computed() -> None:
    rows = {row[0]: row[1:] for row in TABLE if len(row) == 7 and row[0] in PRESETS}
    assert set(rows) == {name for name, preset in PRESETS.items() if preset.generator is not None}
    for name, (weights, cache, *totals, batch) in rows.items():
        preset = PRESETS[name]
        assert preset.generator is not None
        generator = nn.Module.to(empty(preset.generator, preset.config), torch.bfloat16)
        tokenizer = nn.Module.to(empty(preset.tokenizer, preset.tokenizer_config), torch.bfloat16)
        needs = {size: memory_need(generator, tokenizer, size, guided=True) for size in (1, 8, 64)}
        assert float(weights) == pytest.approx(needs[1].weights / 2**30, abs=0.006)
        assert float(cache) == pytest.approx(needs[1].cache / 2**20, abs=0.6)
        for total, need in zip(totals, needs.values(), strict=True):
            assert float(total) == pytest.approx(need.total / 2**30, abs=0.006)
        fits = [2**i for i in range(14) if memory_need(generator, tokenizer, 2**i, True).total <= 11 * 2**30]
        assert int(batch) == max(fits)


def test_the_page_explains_every_column(folder: Path) -> None:
    options = Bench(
        model=str(folder), batch=(1,), dtype="float32", device="cpu", runs=1, paths=("eager",), eager_steps=16
    )
    (row,) = bench(options, {}, lambda line: None)
    times = [name for name in row if isinstance(row[name], float) and not name.endswith("_spread")]
    assert "together_ms" in times
    assert [name for name in times if f"`{name}`" not in DOCS and name not in ("guidance_scale", "top_p")] == []
