"""Sets of pictures, references from whatever holds one, and the statistics file."""

import dataclasses
import json
import runpy
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, Resize

from visar.evaluate.extractors import EXTRACTORS, Extractor, load_extractor
from visar.evaluate.images import (
    UINT8_RULES,
    ArrayImages,
    FolderImages,
    NpzImages,
    SplitImages,
    image_set,
    open_images,
    resized,
)
from visar.evaluate.labels import LabelTable
from visar.evaluate.metrics import compute_metrics
from visar.evaluate.references import load_reference, load_statistics, make_statistics, save_statistics
from visar.evaluate.statistics import frechet_distance

TINY = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent / "fixtures" / "evaluation.py")))


@pytest.fixture
def extractor(monkeypatch: pytest.MonkeyPatch) -> Extractor:
    monkeypatch.setitem(EXTRACTORS, "tiny", TINY.TINY)
    return load_extractor("tiny")


def pictures(count: int, first: int = 0) -> np.ndarray:
    images, _ = TINY.paint(list(range(first, first + count)), [(i % 5,) for i in range(count)])
    return images.movedim(1, -1).numpy()


def folder_of(path: Path, images: np.ndarray) -> Path:
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(path / f"{i:03d}.png")
    return path


def test_every_kind_of_reference_gives_the_same_statistics(tmp_path: Path, extractor: Extractor) -> None:
    images = pictures(30)
    np.savez(tmp_path / "images.npz", images=images)
    np.savez_compressed(tmp_path / "batch.npz", arr_0=images)
    array = load_reference(images, extractor, batch_size=7)
    statistics = array.statistics["8"]
    np.savez(tmp_path / "adm.npz", mu=statistics.mu_D, sigma=statistics.sigma_DD, arr_0=images[:10])
    save_statistics(array, tmp_path / "own.npz")
    found = {
        "folder": load_reference(folder_of(tmp_path / "folder", images), extractor, batch_size=4),
        "npz of images": load_reference(tmp_path / "images.npz", extractor),
        "ADM batch": load_reference(tmp_path / "adm.npz", extractor),
        "statistics file": load_reference(tmp_path / "own.npz", extractor),
        "images": load_reference(torch.from_numpy(images), extractor),
    }
    assert {name: reference.kind for name, reference in found.items()} == {name: name for name in found}
    for reference in [*found.values(), load_reference(tmp_path / "batch.npz", extractor)]:
        np.testing.assert_allclose(reference.statistics["8"].sigma_DD, statistics.sigma_DD, rtol=1e-6, atol=1e-9)
        assert frechet_distance(reference.statistics["8"], statistics) < 1e-6
        assert len(reference.sha256) == 64
    # ADM: distance by the stored statistics of all pictures, precision and recall by the stored pictures
    assert found["ADM batch"].features["8"].shape == (10, 8)
    features = extractor(torch.from_numpy(pictures(12, 100)).movedim(-1, 1))
    metrics = compute_metrics(features, found["ADM batch"], extractor.kind)
    assert metrics.distance == pytest.approx(compute_metrics(features, array, extractor.kind).distance, rel=1e-6)
    assert metrics.precision is not None and metrics.null_distance is None
    assert any("10 images of the reference" in note for note in found["ADM batch"].notes)


def test_statistics_file_keeps_everything(tmp_path: Path, extractor: Extractor) -> None:
    labels = LabelTable.of([(i % 3, i % 2) for i in range(20)])
    made = make_statistics(
        ArrayImages(pictures(20), "pictures"), extractor, tmp_path / "s.npz", labels=labels, keep_features=True
    )
    read = load_statistics(tmp_path / "s.npz")
    assert read.labels == labels and read.protocol == "generation" and read.extractor == "tiny"
    np.testing.assert_array_equal(read.statistics["8"].mu_D, made.statistics["8"].mu_D)
    np.testing.assert_allclose(read.statistics["8"].sigma_DD, made.statistics["8"].sigma_DD, rtol=0, atol=1e-12)
    assert read.statistics["8"].count == 20
    assert read.statistics["8"].null_constant == made.statistics["8"].null_constant is not None
    torch.testing.assert_close(read.features["8"], made.features["8"])
    assert made.sha256 in read.notes[0]
    with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
        assert json.loads(str(file["visar"]))["source_sha256"] == made.sha256
    make_statistics(ArrayImages(pictures(20)), extractor, tmp_path / "small.npz")
    assert not load_statistics(tmp_path / "small.npz").features


def test_a_file_of_320_features_fits_into_the_wheel(tmp_path: Path) -> None:
    lite0 = load_extractor()
    reference = make_statistics(ArrayImages(pictures(6)), lite0, tmp_path / "lite0.npz")
    assert (tmp_path / "lite0.npz").stat().st_size < 500_000
    assert reference.statistics["320"].width == 320


def test_protocols_and_extractors_are_never_mixed(tmp_path: Path, extractor: Extractor) -> None:
    make_statistics(ArrayImages(pictures(20)), extractor, tmp_path / "r.npz", protocol="reconstruction")
    with pytest.raises(ValueError, match="a reference for reconstruction, not for generation"):
        load_reference(tmp_path / "r.npz", extractor)
    assert load_reference(tmp_path / "r.npz", extractor, protocol="reconstruction").protocol == "reconstruction"
    with pytest.raises(ValueError, match="choose generation or reconstruction"):
        load_reference(tmp_path / "r.npz", extractor, protocol="gFID")
    with pytest.raises(ValueError, match="made with tiny, the samples' extractor is efficientnet-lite0"):
        load_reference(tmp_path / "r.npz", load_extractor(), protocol="reconstruction")
    other = dataclasses.replace(extractor, layers=("9", "logits"))
    with pytest.raises(ValueError, match="holds layer 8, the extractor computes 9"):
        load_reference(tmp_path / "r.npz", other, protocol="reconstruction")
    lite0 = load_extractor()
    make_statistics(ArrayImages(pictures(4)), lite0, tmp_path / "l.npz")
    with pytest.raises(ValueError, match="other weights of efficientnet-lite0"):
        load_reference(tmp_path / "l.npz", dataclasses.replace(lite0, weights="0" * 64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"a": np.zeros(3)}, "holds a; mu and sigma, or images"),
        ({"mu": np.zeros(8)}, "not sigma"),
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, r"shape \(9,\)"),
        ({"mu": np.zeros(8), "sigma": np.eye(9)}, r"\(8, 8\)"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.float32)}, "float32"),
        ({"arr_0": np.asfortranarray(np.zeros((2, 8, 9, 3), np.uint8))}, "Fortran order"),
        ({"mu": np.full(8, np.nan), "sigma": np.eye(8)}, "mu has values that are not finite"),
        ({"mu": np.zeros(8), "sigma": np.diag([np.inf] * 8)}, "sigma has values that are not finite"),
        ({"mu": np.zeros(8), "sigma": np.eye(8) * 1j}, "sigma is complex128; real numbers"),
        ({"mu": np.zeros(8), "sigma": np.tri(8)}, "sigma is not symmetric"),
        ({"mu": np.array(["a"] * 8), "sigma": np.eye(8)}, "mu is <U1; real numbers"),
        ({"mu": np.array([None] * 8), "sigma": np.eye(8)}, "its array mu: Object arrays"),
        ({"arr_0": np.zeros((2, 3, 8, 8), np.uint8)}, r"\(2, 3, 8, 8\)"),
        ({"images": np.zeros((0, 8, 8, 3), np.uint8)}, "N > 0"),
    ],
)
def test_npz_without_what_is_needed(
    tmp_path: Path, extractor: Extractor, arrays: dict[str, np.ndarray], message: str
) -> None:
    np.savez(tmp_path / "x.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        load_reference(tmp_path / "x.npz", extractor)


def test_broken_files_are_named(tmp_path: Path, extractor: Extractor) -> None:
    with pytest.raises(ValueError, match="no file .*none.npz"):
        load_reference(tmp_path / "none.npz", extractor)
    make_statistics(ArrayImages(pictures(20)), extractor, tmp_path / "s.npz")
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="cut.npz is damaged"):
        load_reference(tmp_path / "cut.npz", extractor)
    with pytest.raises(ValueError, match="not a statistics file"):
        np.savez(tmp_path / "i.npz", images=pictures(2))
        load_statistics(tmp_path / "i.npz")
    with pytest.raises(ValueError, match="end in .npz"):
        make_statistics(ArrayImages(pictures(4)), extractor, tmp_path / "s.pt")
    with pytest.raises(ValueError, match="uint8"):
        load_reference(np.zeros((2, 8, 8, 3)), extractor)
    with pytest.raises(ValueError, match="no images at .*x.txt"):
        open_images(tmp_path / "x.txt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mu_8": np.zeros(7)}, r"mu_8 has shape \(7,\) and sigma_upper_8 \(36,\)"),
        ({"mu_8": np.full(8, np.nan)}, "mu_8 has values that are not finite"),
        ({"sigma_upper_8": np.zeros(35)}, r"sigma_upper_8 \(35,\)"),
        ({"features_8": np.zeros((5, 8), np.float32)}, r"features_8 has shape \(5, 8\); 20 x 8 is needed"),
        ({"features_8": np.full((20, 8), np.inf, np.float32)}, "features_8 has values that are not finite"),
        ({"label_rows": np.zeros((2, 1))}, "label_rows is float64"),
        ({"label_counts": np.array([20])}, r"label_counts int64 \(1,\)"),
        ({"label_counts": np.array([0, 20])}, "one count above 0"),
        ({"label_classes": np.array(["one"])}, "label_rows has the class 1, label_classes 1 names"),
        ({"label_classes": np.array([1, 2])}, "label_rows is"),
        ({"visar": np.array("{")}, "its array visar does not describe it"),
        ({"visar": np.array("[]")}, "its array visar does not describe it"),
        ({"visar": np.array('{"format": 1}')}, "does not describe it .KeyError"),
        ({"visar": np.array('{"format": 1, "layers": {"8": {"count": "many"}}}')}, "does not describe it .KeyError"),
    ],
)
def test_statistics_files_of_other_forms_are_named(
    tmp_path: Path, extractor: Extractor, changes: dict[str, np.ndarray], message: str
) -> None:
    labels = LabelTable.of([(i % 2,) for i in range(20)], ("a", "b"))
    make_statistics(ArrayImages(pictures(20)), extractor, tmp_path / "s.npz", labels=labels, keep_features=True)
    with np.load(tmp_path / "s.npz") as file:
        arrays = dict(file)
    np.savez(tmp_path / "s.npz", **{**arrays, **changes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"s\.npz.*{message}"):
        load_statistics(tmp_path / "s.npz")


def test_every_damaged_array_is_named(tmp_path: Path, extractor: Extractor) -> None:
    arrays = {"arr_0": pictures(4), "mu": np.random.default_rng(0).normal(size=8), "sigma": np.eye(8)}
    for name in arrays:
        np.savez(tmp_path / "bad.npz", **arrays)  # type: ignore[arg-type]
        blob = bytearray((tmp_path / "bad.npz").read_bytes())
        with zipfile.ZipFile(tmp_path / "bad.npz") as archive:
            blob[archive.getinfo(f"{name}.npy").header_offset + 30 + len(name) + 4 + 150] ^= 0xFF
        (tmp_path / "bad.npz").write_bytes(blob)
        with pytest.raises(ValueError, match=rf"bad\.npz is damaged.*its array {name}: Bad CRC-32"):
            load_reference(tmp_path / "bad.npz", extractor)


def test_unreadable_picture_is_named(tmp_path: Path, extractor: Extractor) -> None:
    folder = folder_of(tmp_path / "f", pictures(5))
    (folder / "003.png").write_bytes((folder / "003.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"003\.png is not a readable image \([^)]*\)$"):
        load_reference(folder, extractor)
    for name in ("000.png", "004.png"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
        (folder / name).write_bytes(b"no picture")
        with pytest.raises(ValueError, match=r"00[03]\.png is not .*; [12] more of 5 images cannot be read"):
            load_reference(folder, extractor)
    for name in ("000.png", "004.png"):
        (folder / name).write_bytes((tmp_path / name).read_bytes())
    (folder / "003.png").unlink()
    Image.new("RGB", (40, 30)).save(folder / "009.png")
    with pytest.raises(ValueError, match="009.png has 40x30 pixels, the images before it 32x32"):
        load_reference(folder, extractor)
    assert load_reference(folder, extractor, resize="adm", image_size=16).resize == "adm to 16"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        FolderImages(tmp_path / "empty")
    with pytest.raises(ValueError, match="takes no size"):
        FolderImages(folder, "none", 16)
    with pytest.raises(ValueError, match="choose none, adm or torchvision"):
        FolderImages(folder, "lanczos", 16)  # type: ignore[arg-type]


def test_sets_are_read_the_same_in_any_batch_size(tmp_path: Path) -> None:
    images = pictures(11)
    np.savez(tmp_path / "x.npz", arr_0=images)
    folder = folder_of(tmp_path / "f", images)
    for source in (ArrayImages(images), NpzImages(tmp_path / "x.npz"), FolderImages(folder)):
        assert len(source) == 11 and source.size == (32, 32)
        for batch_size in (1, 4, 100):
            read = torch.cat(list(source.batches(batch_size)))
            assert torch.equal(read, torch.from_numpy(images).movedim(-1, 1))
    digest = FolderImages(folder).digest()
    (folder / "000.png").rename(folder / "z.png")
    assert FolderImages(folder).digest() != digest


def test_a_split_of_an_image_set_brings_its_labels(tmp_path: Path, extractor: Extractor) -> None:
    for split, count in (("train", 6), ("val", 3)):
        for i, image in enumerate(pictures(count)):
            place = tmp_path / "set" / split / ("cat" if i % 3 else "dog")
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i}.png")
    train = open_images(f"{tmp_path / 'set'}@train", image_size=32)
    assert len(train) == 6 and train.name == "set@train" and isinstance(train, SplitImages)
    assert train.labels == LabelTable(((0,), (1,)), (4, 2)) and train.labels.classes == ("cat", "dog")
    reference = load_reference(f"{tmp_path / 'set'}@train", extractor, image_size=32)
    assert reference.labels == train.labels
    assert len(open_images(f"{tmp_path / 'set'}@val", image_size=32)) == 3
    make_statistics(train, extractor, tmp_path / "set.npz")
    stored = load_statistics(tmp_path / "set.npz").labels
    assert stored == train.labels and stored is not None and stored.classes == ("cat", "dog")
    with pytest.raises(ValueError, match="no images in its split test"):
        open_images(f"{tmp_path / 'set'}@test", image_size=32)


def test_a_file_is_read_once_until_it_changes(tmp_path: Path) -> None:
    path, images = tmp_path / "set.npz", np.zeros((20, 16, 16, 3), np.uint8)
    np.savez(path, images=images, labels=np.arange(20) % 2)
    first = image_set(path)
    assert image_set(str(path)) is first
    assert len(open_images(f"{path}@train")) + len(open_images(f"{path}@val")) == 20
    np.savez(path, images=images[:10] + 1, labels=np.arange(10) % 2)
    assert image_set(path).images.shape[0] == 10


def test_resize_chains() -> None:
    picture = Image.fromarray(np.arange(100 * 60 * 3, dtype=np.uint32).reshape(60, 100, 3).astype(np.uint8))
    for chain in ("adm", "torchvision"):
        assert resized(picture, chain, 16).size == (16, 16)
    flat = Image.new("RGB", (90, 70), (10, 200, 30))
    assert np.unique(np.asarray(resized(flat, "adm", 16)).reshape(-1, 3), axis=0).tolist() == [[10, 200, 30]]
    # from 64 to 16 the chain is two box halvings: means of 4 x 4 blocks
    small = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    blocks = small.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(np.asarray(resized(Image.fromarray(blocks), "adm", 16)), small)


@pytest.mark.parametrize("size", [16, 31, 64])
def test_the_torchvision_chain_is_torchvisions(size: int) -> None:
    base = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 18, 3), dtype=np.uint8))
    for width, height in ((64, 43), (43, 64), (50, 37), (65, 65), (100, 33), (33, 71), (20, 9)):
        picture = base.resize((width, height), Image.Resampling.BICUBIC)
        theirs = Compose([Resize(size), CenterCrop(size)])(picture)
        assert np.array_equal(np.asarray(resized(picture, "torchvision", size)), np.asarray(theirs))


def test_orientation_is_heeded_by_every_chain_but_that_of_adm(tmp_path: Path) -> None:
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(pixels, -1)
    for chain, size, shown in (("none", None, upright), ("torchvision", 32, upright), ("adm", 32, pixels)):
        read = next(FolderImages(tmp_path, chain, size).batches(1))[0].movedim(0, -1).numpy()  # type: ignore[arg-type]
        assert np.array_equal(read, shown)


def test_uint8_rules() -> None:
    levels = torch.arange(256) / 255.0
    value = torch.cat([levels, levels + 0.6 / 255.0, torch.tensor([-0.1, 1.2])])
    rounded, truncated = UINT8_RULES["round"](value), UINT8_RULES["truncate"](value)
    assert rounded[:256].tolist() == list(range(256))
    assert rounded[256:511].tolist() == list(range(1, 256))
    assert truncated[256:511].tolist() == list(range(255))
    assert rounded[-2:].tolist() == truncated[-2:].tolist() == [0, 255]


def test_clips_are_read_as_clips(tmp_path: Path) -> None:
    clips = np.stack([pictures(3), pictures(3, 50)])
    np.savez(tmp_path / "clips.npz", images=clips)
    read: Tensor = next(iter(open_images(tmp_path / "clips.npz").batches(2)))
    assert read.shape == (2, 3, 3, 32, 32)
    assert torch.equal(read, torch.from_numpy(clips).movedim(-1, -3))
