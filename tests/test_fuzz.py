"""Seeded odd values, damaged files and odd arrays, by the hundred: a result or one error that explains, never a crash.

Every list is a function of its seed. What a case finds is the case's text: it can be run again alone.
"""

import copy
import json
import os
import random
import runpy
import time
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from visar.bench.rows import read_rows
from visar.cli.evaluate import read_prompts
from visar.cli.main import COMMANDS, main
from visar.core.condition import Condition
from visar.data.fashion_mnist import build_fashion, read_idx
from visar.data.images import load_image_set
from visar.data.pictures import read_picture
from visar.evaluate.extractors import EXTRACTORS
from visar.evaluate.images import ArrayImages, NpzImages
from visar.evaluate.parts import load_part
from visar.evaluate.references import load_statistics
from visar.evaluate.report import load_report
from visar.io.files import load_weights
from visar.pipelines.loading import load
from visar.train.token_cache import TokenCache

ROOT = Path(__file__).parent.parent
FAULTS, TRAINING, EVALUATION = (
    runpy.run_path(str(ROOT / "tests" / "fixtures" / f"{name}.py")) for name in ("faults", "training", "evaluation")
)

COUNT = int(os.environ.get("VISAR_FUZZ", "1"))  # times as many cases


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved pipelines, and files that commands read."""
    return FAULTS["write_place"](tmp_path_factory.mktemp("models"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with pictures in it; features are cheap ones."""
    monkeypatch.chdir(tmp_path)
    TRAINING["write_images"](tmp_path / "images.npz")
    monkeypatch.setitem(EXTRACTORS, "tiny", EVALUATION["TINY"])
    return tmp_path


def fault(call: Callable[[], object], *words: str, seconds: float = 20) -> str | None:
    """What is wrong with a call: an error that is no ValueError with one of the words, or too long a time; or None."""
    begun = time.monotonic()
    try:
        call()
    except ValueError as error:
        if not str(error) or (words and not any(word in str(error) for word in words)):
            return f"ValueError: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None if time.monotonic() - begun < seconds else "it took too long"


def assert_none(found: dict[Any, str | None]) -> None:
    """Fails with all that is wrong, by case."""
    wrong = {case: text for case, text in found.items() if text is not None}
    assert not wrong, "\n".join(f"{case}: {text:.300}" for case, text in wrong.items())


# --------------------------------------------------------------------------------------------------------- odd values
VALUES = (
    "0 -1 1 1000000000 9223372036854775808 18446744073709551616 1e9 nan inf -inf 1e38 1e-38 0.5 x none true "
    "() , / . .. /dev/null nowhere a\x00b é \udcff"
).split(" ")
ODD = [*VALUES, "", " ", "{}", "[[[[", "n" * 300, "[" * 100_000]
LINES = {
    "sample {m}/tiny --device cpu": "num-images seed class attribute guidance-scale temperature top-k top-p "
    "batch-size sampler dtype device quantize out prompt",
    "sample {m}/tiny --device cpu --sampler jacobi": "sampler.window sampler.coupling sampler.adaptive "
    "sampler.initial sampler.check-every",
    "sample {m}/tiny --device cpu --sampler static_tree --sampler.drafter ngram": "sampler.branches sampler.paths",
    "sample {m}/tiny --device cpu --sampler dynamic_tree --sampler.drafter ngram": "sampler.depth sampler.children "
    "sampler.nodes sampler.drafter",
    "sample {m}/tiny --device cpu --sampler k_seq --sampler.drafter ngram": "sampler.num-chains sampler.num-drafts",
    "sample {m}/tiny --device cpu --sampler grouped": "sampler.group sampler.max-gap sampler.max-distance",
    "sample {m}/tiny --device cpu --sampler flow": "sampler.steps",
    "sample {m}/pyramid --device cpu --sampler next_scale": "sampler.num-scales sampler.smooth top-k temperature",
    "edit {m}/pyramid {m}/given.png --device cpu --num-images 1": "box keep class num-images seed temperature out",
    "eval {m}/tiny --reference images.npz --extractor tiny --device cpu --num-samples 4": "num-samples batch-size "
    "seed labels prompts sampler guidance-scale temperature layer resize image-size train held-out keep-images dtype "
    "out",
    "reproduce nowhere --reference images.npz --extractor tiny --device cpu": "num-samples batch-size seed dtype "
    "device extractor-weights keep-images reference out",
    "stats images.npz --out stats.npz --extractor tiny --device cpu": "out layer resize image-size batch-size device",
    "eval --tokenizer {m}/tiny/tokenizer --images images.npz --extractor tiny --device cpu": "out batch-size "
    "image-size",
    "eval --compare": "out reference runs samplers num-samples batch-size speed-batches",
    "acceptance {m}/tiny --device cpu --calls 1 --batch-sizes 1 --samplers ancestral": "batch-sizes calls seed "
    "drafters temperature top-k out samplers",
    "bench --model nowhere --device cpu": "batch runs grid window guidance-scale top-k dtype out baseline",
    "seeds nowhere --device cpu": "images batch other-batches calls processes settings samplers out",
    "train tokenizer --data nowhere --device cpu --out run": "steps batch-size gradient-accumulation learning-rate "
    "warmup-steps ema-decay seed max-minutes save-every keep-checkpoints image-size codebook-size codebook-decay "
    "l1-weight l2-weight adversarial-weight perceptual-weight commitment-weight model-options preset out initial",
    "train generator --data nowhere --tokenizer {m}/tiny/tokenizer --device cpu --out run": "num-layers num-heads "
    "width hidden-width dropout label-dropout class-balance variants scale-weights self-correction steps "
    "model-options",
    "train drafter --data nowhere --target {m}/tiny --device cpu --out run": "num-heads num-right input-noise kind",
    "distill dd1 --teacher nowhere --device cpu --out run": "num-pairs first-pairs pair-batch flow-steps held-out "
    "later-share vector-weight starts steps teacher pairs",
    "distill dd2 --teacher nowhere --device cpu --out run": "num-pairs pair-batch flow-steps held-out tuning-steps "
    "first-fake fake-updates noise-draws times head-width head-depth score initial steps",
    "distill independent --teacher nowhere --out apart": "num-pairs pair-batch flow-steps pairs",
    "distill pairs --teacher nowhere --out pairs": "num-pairs pair-batch flow-steps teacher out",
    "convert {m}/vq.pt --out out": "out grid num-heads dtype source scales like tokenizer second weights",
    "data fashion-mnist --source nowhere --out fashion.zip": "source out",
    "data moving-emoji --emoji nowhere --out moving": "emoji clips seed workers out",
    "demo nowhere": "host port device dtype",
    "models": "classes attributes",
    "env": "device",
    "completion": "shell",
    "samplers": "sampler",
}


def odd_lines(count: int) -> list[tuple[str, str, str]]:
    """A seeded choice of commands with one odd value each."""
    every = [(line, flag, value) for line, flags in LINES.items() for flag in flags.split() for value in ODD]
    # Writing into folders of others is what the test must not do.
    every = [case for case in every if not (case[1] == "out" and case[2] in ("/", ".."))]
    return random.Random(0).sample(every, min(len(every), count))


def test_odd_values_get_a_message_and_no_traceback(place: Path, models: Path, capsys: pytest.CaptureFixture) -> None:
    def run(line: str, flag: str, value: str) -> None:
        status = main([*line.format(m=models).split(), f"--{flag}", value])
        error = capsys.readouterr().err
        assert status in (0, 1, 2) and "Traceback" not in error and (status == 0 or error.strip())

    cases = odd_lines(COUNT * 140)
    assert_none({case: fault(lambda case=case: run(*case)) for case in cases})


def test_every_command_gets_odd_values() -> None:
    tried = {name for name in COMMANDS for line in LINES if line == name or line.startswith(f"{name} ")}
    # Which download, or draw as many clips as are asked for.
    assert set(COMMANDS) - tried == {"data emoji", "data clips", "data doom"}


# ------------------------------------------------------------------------------------------------------ damaged files
def damaged(blob: bytes, draws: random.Random) -> bytes:
    """The file with a few bytes changed, cut, doubled, emptied or moved."""
    made = bytearray(blob)
    at, length = draws.randrange(len(blob)), draws.choice((1, 4, 64, 1024))
    match draws.randrange(6):
        case 0:
            return bytes(made[:at])
        case 1:
            made[at : at + length] = bytes(min(length, len(blob) - at))
        case 2:
            made[at:at] = made[at : at + length]
        case 3:
            del made[at : at + length]
        case _:
            for _ in range(draws.choice((1, 2, 8))):
                made[draws.randrange(len(made))] ^= 1 << draws.randrange(8)
    return bytes(made)


def picture(kind: str) -> bytes:
    blob = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(blob, kind)
    return blob.getvalue()


def read_all(path: Path) -> None:
    for images in NpzImages(path).batches(7):
        assert images.dtype == torch.uint8


def parquet(path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet files need pyarrow (extra train)")
    from pyarrow import parquet

    cells = [{"bytes": picture("PNG"), "path": None}] * 6
    parquet.write_table(pyarrow.table({"image": cells, "label": [0, 1] * 3, "text": ["a", "b", "c"] * 2}), path)


def fashion(path: Path) -> None:
    tools = runpy.run_path(str(ROOT / "tests" / "test_data_fashion.py"))
    build_fashion(tools["write"](path.parent / "fashion", tools["files"](12, 3)), path)


def clips(path: Path) -> None:
    tools = runpy.run_path(str(ROOT / "tests" / "test_data_clips.py"))
    tools["test_file_is_read_back_and_its_damage_is_seen"](path.parent)
    (path.parent / "clips.zip").rename(path)


READERS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    **{
        f"x.{kind.lower()}": (
            lambda path, kind=kind: path.write_bytes(picture(kind)),
            lambda path: read_picture(path, 8, str(path)),
        )
        for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")
    },
    "images.npz": (TRAINING["write_images"], load_image_set),
    "scored.npz": (TRAINING["write_images"], read_all),
    "x.parquet": (parquet, lambda path: load_image_set(path, 8)),
    "fashion.zip": (fashion, load_image_set),
    "x.safetensors": (lambda path: save_file({"a": torch.ones(9), "b": torch.arange(4)}, path), load_weights),
    "x.pt": (lambda path: torch.save({"model": {"a": torch.ones(9)}, "step": 3}, path), load_weights),
    "ids.safetensors": (
        lambda path: TokenCache(torch.zeros(2, 1, 4, dtype=torch.int16), {}).save(path),
        TokenCache.load,
    ),
    "rows.json": (lambda path: path.write_text('{"kind": "sample", "batch": 1}\n' * 3), read_rows),
    "prompts.txt": (lambda path: path.write_text("a red ball\nfür dich\n", encoding="utf-8"), read_prompts),
    "x-idx3-ubyte": (
        lambda path: path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 9, *range(9)])),
        lambda path: read_idx(path.read_bytes(), path.name),
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_named(name: str, tmp_path: Path) -> None:
    write, read = READERS[name]
    write(tmp_path / name)
    whole, draws = (tmp_path / name).read_bytes(), random.Random(name)
    read(tmp_path / name)
    found = {}
    for number in range(COUNT * 30):
        (tmp_path / name).write_bytes(damaged(whole, draws))
        found[number] = fault(lambda: read(tmp_path / name), name)
    assert_none(found)


# ---------------------------------------------------------------------------------------------------- odd facts (JSON)
FACTS = [None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "\udcff", [], [1], {}, {"x": 1}, [[]]]


def changed(value: Any, draws: random.Random) -> Any:
    """A JSON value with one of its parts replaced, removed or doubled."""
    made = copy.deepcopy(value)
    node, key = [made], 0
    while isinstance(inner := node[key], dict | list) and inner and draws.random() < 0.8:
        node, key = inner, draws.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
    if node[key] is made:
        return draws.choice(FACTS)
    match draws.randrange(5):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[draws.choice(("", "x", "_class_name", "names"))] = node.pop(key)
        case _:
            node[key] = draws.choice(FACTS)
    return made


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Path:
    """What `visar eval` and `visar stats` write."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EXTRACTORS, "tiny", EVALUATION["TINY"])
        data = str(TRAINING["write_images"](folder / "images.npz"))
        common = ["--extractor", "tiny", "--device", "cpu"]
        assert main(["stats", data, "--out", str(folder / "stats.npz"), *common]) == 0
        line = f"eval {models}/tiny --reference {data} --num-samples 4 --batch-size 4 --out {folder}/scores"
        assert main([*line.split(), *common]) == 0
    return folder


def in_npz(path: Path, key: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Writes the archive with the JSON of one of its arrays changed."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}

    def write(target: Path) -> None:
        text = json.dumps(change(json.loads(str(arrays[key]))))
        np.savez(target, **{**arrays, key: np.array(text)})

    return write


def test_odd_facts_in_archives_are_named(run_folder: Path, tmp_path: Path) -> None:
    (part,) = (run_folder / "scores" / "parts").iterdir()
    for path, key, read in ((run_folder / "stats.npz", "visar", load_statistics), (part, "meta", load_part)):
        draws, found = random.Random(0), {}
        for number in range(COUNT * 60):
            in_npz(path, key, lambda facts, draws=draws: changed(facts, draws))(tmp_path / path.name)
            found[number] = fault(lambda path=path, read=read: read(tmp_path / path.name), path.name)
        assert_none(found)


def test_odd_facts_of_image_sets_are_named(tmp_path: Path) -> None:
    fashion(tmp_path / "whole.zip")
    with zipfile.ZipFile(tmp_path / "whole.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    facts, draws, found = json.loads(files["meta.json"]), random.Random(0), {}
    for number in range(COUNT * 60):
        with zipfile.ZipFile(tmp_path / "odd.zip", "w") as archive:
            archive.writestr("pixels.npy.xz", files["pixels.npy.xz"])
            archive.writestr("meta.json", json.dumps(changed(facts, draws)))
        found[number] = fault(lambda: load_image_set(tmp_path / "odd.zip"), "odd.zip")
    assert_none(found)


def test_odd_reports_are_named(run_folder: Path, tmp_path: Path) -> None:
    facts, draws, found = json.loads((run_folder / "scores" / "metrics.json").read_text()), random.Random(0), {}
    for number in range(COUNT * 60):
        (tmp_path / "metrics.json").write_text(json.dumps(changed(facts, draws)))
        found[number] = fault(lambda: load_report(tmp_path), "metrics.json")
    assert_none(found)


@pytest.mark.parametrize("kind", ["tiny", "pyramid"])
@pytest.mark.parametrize("file", ["model_index.json", "generator/config.json", "tokenizer/config.json"])
def test_odd_facts_of_models_are_named(kind: str, file: str, models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for path in (models / kind).rglob("*"):
        if path.is_file():
            (folder / path.relative_to(models / kind)).parent.mkdir(parents=True, exist_ok=True)
            os.link(path, folder / path.relative_to(models / kind))
    facts, draws, found = json.loads((folder / file).read_text()), random.Random(file), {}
    (folder / file).unlink()
    for number in range(COUNT * 12):
        (folder / file).write_text(json.dumps(odd := changed(facts, draws)))
        found[number, str(odd)[:200]] = fault(lambda: load(folder, device="cpu"), "model")
    assert_none(found)


# ---------------------------------------------------------------------------------------------------------- odd arrays
ARRAYS: list[Any] = [
    *(None, -1, 0, 1.5, float("nan"), 2**64, "x", "", [], [[]], ["x", 1], {}, True, object()),
    *(np.zeros(0), np.zeros((2, 3)), np.array(3), np.array(["x"]), np.array([None]), np.float32(1), np.int64(2)),
    *(torch.zeros(0), torch.zeros(2, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan")), torch.zeros(1, 16)),
    *(torch.zeros(1, 16, dtype=torch.int64), torch.full((1, 16), 99), torch.zeros(3, 8, 8, dtype=torch.uint8)),
    *(torch.zeros(1, 3, 8, 8, dtype=torch.complex64), torch.zeros(1, 3, 8, 8).to_sparse(), torch.zeros(1, 1, 8, 8)),
    *(torch.zeros(1, 3, 7, 8), torch.zeros(0, 3, 8, 8), torch.zeros(1, 16, dtype=torch.bool), 10**9),
]
ARGUMENTS = (
    "class_labels prompt num_images attributes sampler sampler_options guidance_scale temperature top_k top_p seed "
    "seeds generator batch_size output_type condition"
).split()


@pytest.mark.parametrize("kind", ["tiny", "pyramid"])
def test_odd_arrays_in_models(kind: str, models: Path) -> None:
    tokenizer, found = load(models / kind, device="cpu").tokenizer, {}
    with torch.no_grad():
        for number, value in enumerate(ARRAYS):
            for call in (tokenizer.encode, tokenizer.decode, tokenizer.latents):
                found[number, call.__name__, str(value)[:60]] = fault(lambda call=call, value=value: call(value))
    assert_none(found)


@pytest.mark.parametrize("kind", ["tiny", "pyramid"])
def test_odd_arguments_of_a_call(kind: str, models: Path) -> None:
    pipeline = load(models / kind, device="cpu")
    pipeline.set_progress_bar_config(disable=True)
    cases = [(name, value) for name in ARGUMENTS for value in ARRAYS]
    found = {}
    for name, value in random.Random(0).sample(cases, min(len(cases), COUNT * 120)):
        found[name, str(value)[:60]] = fault(lambda name=name, value=value: pipeline(**{name: value}))
    assert_none(found)


def test_odd_arrays_as_images_and_conditions() -> None:
    found = {}
    for number, value in enumerate(ARRAYS):
        for call in (ArrayImages, lambda value: Condition(labels_BA=value)):
            found[number, call.__name__] = fault(lambda call=call, value=value: call(value))
    assert_none(found)
