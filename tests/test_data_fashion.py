"""Fashion-MNIST as an image set, from tiny idx files."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from visar.cli.main import main
from visar.data.fashion_mnist import CLASSES, build_fashion, read_idx
from visar.data.images import load_image_set


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def files(train: int = 40, test: int = 7) -> dict[str, bytes]:
    draws = np.random.default_rng(0)
    found = {}
    for part, count in (("train", train), ("t10k", test)):
        found[f"{part}-images-idx3-ubyte"] = idx(draws.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        found[f"{part}-labels-idx1-ubyte"] = idx((np.arange(count) % 10).astype(np.uint8))
    return found


def write(folder: Path, contents: dict[str, bytes], zipped: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, blob in contents.items():
        (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(blob) if zipped else blob)
    return folder


def deb(contents: dict[str, bytes], folder: Path) -> Path:
    import io
    import tarfile

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, blob in contents.items():
            member = tarfile.TarInfo(f"./usr/share/datasets/fashion-mnist/{name}.gz")
            member.size = len(gzip.compress(blob))
            archive.addfile(member, io.BytesIO(gzip.compress(blob)))
    path = folder / "dataset-fashion-mnist_1_all.deb"
    parts = b"!<arch>\n"
    for name, blob in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data.getvalue())):
        parts += (
            f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(blob):<10}`\n".encode() + blob + b"\n" * (len(blob) % 2)
        )
    path.write_bytes(parts)
    return path


def test_pictures_labels_and_splits(tmp_path):
    contents = files()
    out = build_fashion(write(tmp_path / "raw", contents), tmp_path / "fashion.zip")
    images = load_image_set(out)
    assert images.images.shape == (47, 32, 32, 3) and images.image_size == 32
    grey = read_idx(contents["train-images-idx3-ubyte"], "train")
    assert np.array_equal(images.images[:40, 2:-2, 2:-2, 1], grey) and images.images[:, :2].max() == 0
    assert [len(images.indices(split)) for split in ("train", "val", "test")] == [36, 4, 7]
    assert images.labels_NA[:12, 0].tolist() == [*range(10), 0, 1]
    assert images.vocabulary.attributes == {"class": CLASSES}
    assert load_image_set(out, 16).images.shape == (47, 16, 16, 3)


def test_places_give_the_same_file(tmp_path):
    contents = files()
    wanted = build_fashion(write(tmp_path / "a", contents), tmp_path / "a.zip").read_bytes()
    write(tmp_path / "b" / "raw", contents, zipped=False)
    assert build_fashion(tmp_path / "b", tmp_path / "b.zip").read_bytes() == wanted
    assert build_fashion(deb(contents, tmp_path), tmp_path / "c.zip").read_bytes() == wanted


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-images-idx3-ubyte", lambda blob: blob[:-5], "damaged: 31355 values, 40 x 28 x 28 expected"),
        ("train-images-idx3-ubyte", lambda blob: blob[:2] + b"\x0d" + blob[3:], "no idx file of bytes"),
        ("t10k-images-idx3-ubyte", lambda blob: b"", "no idx file of bytes"),
        ("t10k-images-idx3-ubyte", lambda blob: b"\x1f\x8bnot gzip", "damaged"),
        ("t10k-labels-idx1-ubyte", lambda blob: idx(np.zeros(6, np.uint8)), r"labels \(6,\)"),
        ("train-labels-idx1-ubyte", lambda blob: idx(np.full(40, 10, np.uint8)), "label 10; allowed: 0 ... 9"),
        ("train-images-idx3-ubyte", lambda blob: idx(np.zeros((40, 32, 32), np.uint8)), r"images \(40, 32, 32\)"),
    ],
)
def test_damaged_files(tmp_path, name, change, message):
    contents = files()
    contents[name] = change(contents[name])
    with pytest.raises(ValueError, match=message):
        build_fashion(write(tmp_path, contents, zipped=False), tmp_path / "out" / "fashion.zip")
    assert not (tmp_path / "out").exists()


def test_missing_files_and_damaged_sets(tmp_path, capsys):
    contents = files()
    del contents["t10k-labels-idx1-ubyte"]
    assert main(["data", "fashion-mnist", "--source", str(write(tmp_path, contents)), "--out", "x.zip"]) == 1
    assert "lacks t10k-labels-idx1-ubyte" in capsys.readouterr().err
    (tmp_path / "odd.deb").write_bytes(b"!<arch>\nnonsense" * 8)
    with pytest.raises(ValueError, match="damaged or no Debian package"):
        build_fashion(tmp_path / "odd.deb", tmp_path / "x.zip")
    out = build_fashion(write(tmp_path / "raw", files()), tmp_path / "fashion.zip")
    blob = bytearray(out.read_bytes())
    blob[len(blob) // 2] ^= 255
    out.write_bytes(bytes(blob))
    with pytest.raises(ValueError, match="fashion.zip is damaged"):
        load_image_set(out)
