"""What goes wrong outside of the program: odd values, full disks, killed runs, closed outputs. Nothing is lost."""

import errno
import json
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from visar.cli.main import main
from visar.cli.sample import describe_passes
from visar.core.checks import Range, check_range
from visar.evaluate.extractors import EXTRACTORS
from visar.io.files import (
    atomic_write,
    check_file_output,
    check_folder_output,
    locked,
    replaced_folder,
    restore_folder,
)
from visar.pipelines.components import placement
from visar.pipelines.loading import load

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
TRAINING = runpy.run_path(str(FIXTURES / "training.py"))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
FAULTS = runpy.run_path(str(FIXTURES / "faults.py"))
TRAIN, tiny_pipeline = FAULTS["TRAIN"], FAULTS["tiny_pipeline"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with pictures in it; features are cheap ones."""
    monkeypatch.chdir(tmp_path)
    TRAINING["write_images"](tmp_path / "images.npz")
    monkeypatch.setitem(EXTRACTORS, "tiny", runpy.run_path(str(FIXTURES / "evaluation.py"))["TINY"])
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 8 x 8 images in 4 numbered classes."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------- numbers and devices
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sample {tiny} --num-images 1000000000", "num_images 1000000000; allowed: 1 ... 100000"),
        ("sample {tiny} --seed 18446744073709551616", "seed 18446744073709551616; allowed: 0 ... 9223372036854775807"),
        ("eval {tiny} --reference images.npz --image-size 0", "image_size 0; allowed: 1 ... 16384"),
        ("acceptance {tiny} --batch-sizes 1 1000000000", "batch_sizes (1, 1000000000); allowed: 1 ... 65536"),
        ("train tokenizer --data x --out run --codebook-size 1000000000", "codebook_size 1000000000; allowed: 1 ..."),
        ("train tokenizer --data x --out run --l1-weight -1", "l1_weight -1.0; allowed: 0 ... 1000000"),
        ("train tokenizer --data x --out run --max-minutes nan", "max_minutes nan; allowed: 0 ..."),
        ("train generator --data x --tokenizer y --out run --num-layers -1", "num_layers -1; allowed: 1 ... 1024"),
        ("train generator --data x --tokenizer y --out run --num-heads 0", "num_heads 0; allowed: 1 ... 1024"),
        (
            "train generator --data x --tokenizer y --out run --dropout nan",
            "dropout nan; allowed: 0 and above",
        ),
        ("sample {tiny} --sampler jacobi --sampler.window 1000000000", "window 1000000000; allowed: 1 ... 4096"),
        ("sample {tiny} --sampler speculative --sampler.num-drafts 100000", "num_drafts 100000; allowed: 1 ... 1000"),
        ("sample {tiny} --sampler static_tree --sampler.branches 99,99", "nodes 9900; allowed: 1 ... 1024"),
        ("sample {tiny} --sampler dynamic_tree --sampler.depth 10000", "depth 10000; allowed: 1 ... 128"),
        (
            "sample {tiny} --sampler k_seq --sampler.num-chains 900",
            "num_chains * num_drafts 3600; allowed: 1 ...",
        ),
        ("sample {tiny} --sampler grouped --sampler.group 1000000000", "group 1000000000; allowed: 1 ... 1048576"),
        ("sample {tiny} --sampler flow --sampler.steps 1000000000", "steps 1000000000; allowed: 2 ... 10000"),
        ("seeds --images 1000000000", "images 1000000000; allowed: 1 ... 100000"),
        ("distill pairs --teacher x --out y --num-pairs 1", "num_pairs 1; allowed: 2 ... 1000000000"),
        ("distill dd1 --teacher x --out y --pair-batch 1000000", "pair_batch 1000000; allowed: 1 ... 65536"),
        ("sample {tiny} --device mps", "device 'mps': this machine or this build of torch has none"),
        ("sample {tiny} --device xpu", "device 'xpu': this machine or this build of torch has none"),
        ("sample {tiny} --device meta", "device 'meta': this machine or this build of torch has none"),
        ("sample {tiny} --out a.gif", "makes still images, so a.gif must end in .png, .jpg, .jpeg or .webp"),
        ("sample {tiny} --out a.bmp", "cannot write a.bmp: an image's name ends in .png, .jpg, .jpeg, .webp"),
        ("stats images.npz --out a.pt", "cannot write a.pt: its name must end in .npz"),
        ("bench --preset llamagen-b --out images.npz/x", "cannot write images.npz/x: "),
        ("seeds --out images.npz/x", "cannot write images.npz/x: "),
        ("train tokenizer --data images.npz --out images.npz", "images.npz is not a folder that can be written to"),
        ("distill pairs --teacher {tiny} --out images.npz/x", "images.npz is not a folder that can be written to"),
        ("edit {tiny} x.png --out images.npz/x.png", "cannot write images.npz/x.png: "),
        ("data emoji --out images.npz", "images.npz is not a folder that can be written to"),
    ],
)
def test_values_out_of_range_are_named_at_once(line, message, place, tiny, capsys):
    before = sorted(os.listdir(place))
    assert main(line.format(tiny=tiny).split()) == 1
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(place)) == before


def test_ranges():
    check_range("x", 1, Range(0, 1))
    check_range("x", (0, 1), Range(0, 1))
    below, above, nan = Range(0, 1, open_high=True), Range(0, 1, open_low=True), float("nan")
    for value, allowed in ((1, below), (0, above), (nan, Range(0, 1))):
        with pytest.raises(ValueError, match="allowed"):
            check_range("x", value, allowed)
    with pytest.raises(ValueError, match=r"x \(1, 2\); allowed: 0 \.\.\. 1"):
        check_range("x", (1, 2), Range(0, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_images=10**9), "num_images 1000000000; allowed: 1 ... 100000"),
        (dict(num_images=50_000, class_labels=[0, 1, 2]), "class_labels: images 150000; allowed: 1 ... 100000"),
        (dict(batch_size=10**9), "batch_size 1000000000; allowed: 1 ... 65536"),
        (dict(seed=2**64), "seed 18446744073709551616 is outside"),
        (dict(condition=3), "condition 3; a Condition is needed"),
    ],
)
def test_arguments_out_of_range_are_named_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**arguments)


def test_missing_memory_names_what_to_lower(place, tiny, capsys):
    model = json.dumps({"vocab_size": 2**40, "grid": [4, 4]})
    line = "train generator --data images.npz --device cpu --out run --variants 1 --tracker none --tokenizer".split()
    assert main([*line, str(tiny / "tokenizer"), "--model-options", model]) == 1
    error = capsys.readouterr().err
    assert "visar: " in error and "allocate" in error and "Traceback" not in error


def test_devices_that_are_there():
    assert placement("cpu")[0].type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA device"):
            placement("cuda:3")


def test_passes_are_told_apart():
    assert describe_passes({"generator": 256}) == "256 passes"
    assert describe_passes({"generator": 104, "drafter": 416}) == "104 passes + 416 of the drafter"
    assert describe_passes({"drafter": 6, "refiner": 4}) == "passes: 6 of the drafter + 4 of the refiner"


# ------------------------------------------------------------------------------------------------ settings left on


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_default_dtype_changes_nothing(dtype, tiny):
    def make() -> list[torch.Tensor]:
        pipeline = load(tiny, device="cpu")
        found = []
        for sampler, options in (("jacobi", {}), ("static_tree", {"drafter": "ngram"})):
            out = pipeline(seed=0, num_images=2, sampler=sampler, sampler_options=options, output_type="pt")
            found += [out.tokens, out.images]
        return found

    expected = make()
    torch.set_default_dtype(dtype)
    try:
        found = make()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_training_mode_left_on():
    pipeline = tiny_pipeline()
    expected = pipeline(seed=0, output_type="pt").images
    pipeline.generator.train()
    assert torch.equal(pipeline(seed=0, output_type="pt").images, expected)
    pipeline.generator.input_dropout.p = 0.1
    with pytest.raises(ValueError, match="RasterGPT is in training mode"):
        pipeline(seed=0)
    pipeline.generator.eval()
    pipeline.tokenizer.train()
    pipeline.tokenizer.decoder.mid[0].dropout.p = 0.1
    with pytest.raises(ValueError, match="VQTokenizer is in training mode"):
        pipeline(seed=0)


@pytest.mark.parametrize("sampler", ["ancestral", "jacobi"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_autocast_around_a_call(sampler, guidance):
    pipeline = tiny_pipeline()
    with torch.autocast("cpu", torch.bfloat16):
        found = pipeline(seed=0, num_images=2, guidance_scale=guidance, sampler=sampler, output_type="pt")
    assert found.images.isfinite().all() and found.tokens.shape == (2, 16)


@pytest.mark.parametrize("sampler", ["ancestral", "jacobi", "static_tree"])
def test_weights_that_are_not_finite_make_no_images(sampler):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.generator.output.weight[3, 5] = float("nan")
    options = {"drafter": "ngram"} if sampler == "static_tree" else {}
    with pytest.raises(ValueError, match="logits are not finite"):
        pipeline(seed=0, sampler=sampler, sampler_options=options)


@pytest.mark.parametrize("make", ["tiny_pipeline", "pyramid_pipeline"])
def test_images_that_are_not_numbers_are_not_taken_in_silence(make):
    pipeline = FAULTS[make]()
    image = torch.zeros(2, 3, 8, 8)
    image[1, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match="image with values from 0 to inf; needed: in "):
        pipeline.tokenizer.encode(image)
    image[1, 2, 3, 4] = float("nan")
    with pytest.warns(RuntimeWarning, match="image with pixels that are NaN: its ids mean nothing"):
        pipeline.tokenizer.encode(image)
    with torch.no_grad():
        next(pipeline.tokenizer.decoder.parameters()).view(-1)[0] = float("nan")
    for kind in ("pil", "pt", "np"):
        with pytest.raises(ValueError, match="decoded images are not finite: the tokenizer has weights that are not"):
            pipeline(seed=0, output_type=kind)


# ---------------------------------------------------------------------------------------------------------- full disks
def test_file_systems_without_flush_and_modes(place, tiny, monkeypatch):
    def refused(*arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    monkeypatch.setattr(os, "fsync", refused)
    monkeypatch.setattr(Path, "chmod", refused)
    assert main(["sample", str(tiny), "--device", "cpu", "--out", "grid.png"]) == 0
    assert main([*TRAIN, "--steps", "1"]) == 0
    assert Image.open("grid.png").size[0] >= 8 and (place / "run" / "model" / "config.json").is_file()


def test_a_limit_on_sizes_stops_training_with_one_line_and_it_resumes(place):
    command = [sys.executable, "-m", "visar", *TRAIN, "--steps", "2", "--save-every", "1"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "visar: cannot write run/" in done.stderr
    assert not [path for path in (place / "run").rglob("*") if ".part" in path.name]
    assert main([*TRAIN, "--steps", "2", "--save-every", "1"]) == 0


def test_saved_weights_can_be_read_by_others(place):
    assert main([*TRAIN, "--steps", "1"]) == 0
    umask = os.umask(0)
    os.umask(umask)
    for path in (place / "run").rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


def test_saved_pipelines_can_be_read_by_others(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}
    with pytest.raises(ValueError, match="cannot write .*not a folder"):
        tiny_pipeline().save_pretrained(tmp_path / "model" / "model_index.json")


# ---------------------------------------------------------------------------------------------------- kills and locks
def test_signals_end_training_with_a_checkpoint(place, capsys):
    command = [sys.executable, "-m", "visar", *TRAIN, "--steps", "100000", "--log-every", "1", "--validate-every", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    log = place / "run" / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.01)
    assert main([*TRAIN, "--steps", "100000"]) == 1
    assert "run is in use by another run" in capsys.readouterr().err
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, error
    assert "stopped by SIGTERM at step" in error and "to resume" in error and out.startswith("stopped after ")
    (checkpoint,) = (place / "run" / "checkpoints").iterdir()
    assert (place / "run" / "model" / "config.json").is_file()
    step = int(checkpoint.name.removeprefix("step-"))
    assert main([*command[3:], "--max-minutes", "1e-9"]) == 0
    assert len(log.read_text().splitlines()) == step + 1


def test_a_killed_process_frees_its_folder_and_its_temporaries_go(tmp_path):
    program = f"""
import time
from pathlib import Path
from visar.io.files import atomic_write, locked
folder = Path({str(tmp_path)!r})
with locked(folder), atomic_write(folder / "a.png") as path:
    print("here", flush=True)
    time.sleep(600)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "here\n"
    with pytest.raises(ValueError, match="in use by another run"), locked(tmp_path):
        pass
    process.kill()
    process.communicate()
    (tmp_path / ".hidden.png").write_text("mine")
    assert len(os.listdir(tmp_path)) == 2
    with locked(tmp_path):
        assert os.listdir(tmp_path) == [".hidden.png"]


def test_locks_leave_no_empty_folders(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not os.listdir(tmp_path)
    with locked(tmp_path / "a"):
        (tmp_path / "a" / "file").write_text("x")
    assert os.listdir(tmp_path / "a") == ["file"]


def test_folders_are_replaced_or_stay(tmp_path):
    final = tmp_path / "model"
    with replaced_folder(final) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(KeyError), replaced_folder(final) as folder:
        (folder / "file").write_text("half")
        raise KeyError
    assert os.listdir(tmp_path) == ["model"] and (final / "file").read_text() == "old"
    final.rename(tmp_path / ".model.old")  # a kill between the two renames
    restore_folder(final)
    assert os.listdir(tmp_path) == ["model"] and (final / "file").read_text() == "old"


def test_damaged_and_foreign_run_folders_name_the_file(place, capsys):
    assert main([*TRAIN, "--steps", "1"]) == 0
    checkpoint = "checkpoints/step-00000001"
    (place / "run" / "checkpoints" / "step-mine").mkdir()  # somebody's own folder is left alone
    other = place / "other.pt"
    torch.save({"step": 1, "parts": {"model": {"module": {}, "optimizers": []}}}, other)
    for path, content, message in (
        (f"{checkpoint}/config.json", b"{", "config.json is missing or damaged"),
        (f"{checkpoint}/config.json", b"[1]", "config.json holds a list"),
        (f"{checkpoint}/config.json", b"{}", "holds a run with other options"),
        (f"{checkpoint}/state.pt", b"", "state.pt is damaged"),
        (f"{checkpoint}/state.pt", b"\x80\x04N.", "state.pt is damaged"),
        (f"{checkpoint}/state.pt", other.read_bytes(), "state.pt does not fit this run"),
        ("metrics.jsonl", b"[3]\n", "metrics.jsonl holds lines that are not of a training run"),
        ("metrics.jsonl", b"\xff\xfe\n", "metrics.jsonl holds lines that are not of a training run"),
    ):
        file = place / "run" / path
        before = file.read_bytes()
        file.write_bytes(content)
        assert main([*TRAIN, "--steps", "1"]) == 1
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
        file.write_bytes(before)
    assert main([*TRAIN, "--steps", "1"]) == 0


# ------------------------------------------------------------------------------------------------------------ outputs
def test_places_that_cannot_be_written_are_found_before(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dead").symlink_to(tmp_path / "nowhere" / "deep")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("file/below", "not a folder"),
        (".", "it is a folder"),
        ("pipe", "not a regular file"),
        ("n" * 256, "longer than 255 bytes"),
        ("a\0b", "null character"),
        ("a\udcff", "cannot be encoded"),
    ):
        with pytest.raises(ValueError, match=f"cannot write.*{message}"):
            check_file_output(tmp_path / name)
    with pytest.raises(ValueError, match="must end in .npz"):
        check_file_output(tmp_path / "a.png", (".npz",))
    with pytest.raises(ValueError, match="link to .*nowhere"):
        check_folder_output(tmp_path / "dead")
    with pytest.raises(ValueError, match="not a folder"):
        check_folder_output(tmp_path / "file")
    with pytest.raises(ValueError, match="not a regular file"), atomic_write(tmp_path / "pipe"):
        pass
    assert sorted(os.listdir(tmp_path)) == ["dead", "file", "pipe"]


def test_pipes_in_place_of_files_are_not_waited_for(place, tiny, capsys):
    os.mkfifo(place / "pipe")
    (place / "set.zip").symlink_to("pipe")
    for line in (
        "train tokenizer --data set.zip --out run",
        "train generator --data images.npz --tokenizer {tiny}/tokenizer --tokens pipe --variants 1 --out run",
        "eval {tiny} --reference images.npz --extractor tiny --prompts pipe",
        "stats pipe --out x.npz",
        "stats set.zip --out x.npz",
        "bench --preset llamagen-b --baseline pipe",
        "convert pipe --out x",
        "edit {tiny} pipe",
        "sample pipe",
    ):
        assert main([*line.format(tiny=tiny).split(), "--device", "cpu"][: None if "convert" not in line else -2]) == 1
        error = capsys.readouterr().err
        assert "Traceback" not in error and error.strip(), line


def test_an_empty_output_is_wrong_usage(capsys):
    for line in (["stats", "images.npz", "--out="], ["sample", "emoji-raster", "--out", ""]):
        assert main(line) == 2
        assert "--out is empty; name a file or a folder" in capsys.readouterr().err


def test_long_names_and_links_are_written(tmp_path):
    with atomic_write(tmp_path / ("n" * 251 + ".png")) as path:
        path.write_text("x")
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as path:
        path.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


@pytest.mark.parametrize(
    ("shell", "statuses"),
    [
        ("{visar} --help | head -1", (0,)),
        ("{visar} train tokenizer --help | head -1", (0,)),
        ("{visar} --help > /dev/full", (1,)),
        ("{visar} --help >&-", (0,)),
        ("PYTHONIOENCODING=ascii {visar} sample --help", (0,)),
        ("{visar} nonsense >&- 2>&-", (2,)),
    ],
)
def test_closed_and_full_outputs_end_without_a_traceback(shell, statuses):
    line = shell.format(visar=f"{sys.executable} -m visar")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode in statuses and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
